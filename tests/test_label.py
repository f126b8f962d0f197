# Copyright 2026 The trl_spo authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Necessity: an hour of somebody's clicks is worth more than the program that took them. Every decision is on the disk before the
next pair appears, whatever is clicked twice, killed, or full; and the labels that come out are the ones that were meant.
"""

import json
import resource
import threading
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.testing_utils import brightness_reward, tiny_sd_pipeline, tiny_spo_config
from trl_spo import SPOTrainer
from trl_spo.evaluation.agreement import agreement_between, cohens_kappa, self_agreement, side_bias
from trl_spo.label_folder import (
    CLICKS,
    Click,
    Pair,
    append_line,
    cut_torn_line,
    label_rows,
    read_clicks,
    read_lines,
    read_pairs,
    valid_clicks,
    write_pair,
)
from trl_spo.label_session import REPEAT_DISTANCE, LabelSession, Task, check_annotator
from trl_spo.pipelines.auto import wrap_pipeline
from trl_spo.preference_dataset import load_preference_dataset
from trl_spo.scripts import label as script
from trl_spo.scripts import sample
from trl_spo.scripts.errors import CommandError, run
from trl_spo.scripts.label_pairs import PairSampler, copy_pairs, open_folder, prompt_order


needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="The page needs gradio.")


def make_folder(path, num_pairs: int, repeat_fraction: float = 0.0, seed: int = 0) -> LabelSession:
    """A folder of pairs whose first image is red and whose second one is blue."""
    open_folder(path, {"seed": seed})
    for colour, side in (("red", 0), ("blue", 1)):
        Image.new("RGB", (8, 8), colour).save(path / "images" / f"{side}.png")
    for index in range(num_pairs):
        write_pair(path, Pair(f"{index:05d}", f"prompt {index}", ("images/0.png", "images/1.png")))
    return LabelSession(path, num_pairs, repeat_fraction, seed)


def prefer(session: LabelSession, annotator: str, task: Task, image: int):
    """Clicks on the side where the image is."""
    return session.decide(annotator, task, "left" if session.left_image(annotator, task) == image else "right")


def label_all(session: LabelSession, annotator: str, choose) -> list[Task]:
    """Decides everything; `choose(task)` is 0, 1 or a word. Returns what was shown, in order."""
    shown = []
    while (task := session.current(annotator)) is not None:
        choice = choose(task)
        prefer(session, annotator, task, choice) if choice in (0, 1) else session.decide(annotator, task, choice)
        shown.append(task)
    return shown


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_line_is_whole_or_not_there(tmp_path):
    """A disk that takes only a part of a line: the kernel's own refusal, through the limit on the size of a file."""
    file = tmp_path / "clicks.jsonl"
    append_line(file, {"a": "ä"})
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            append_line(file, {"b": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    append_line(file, {"c": 3})
    assert [record for _, record in read_lines(file)] == [{"a": "ä"}, {"c": 3}]


@pytest.mark.parametrize("torn", [b'{"annotator": "an', b"{", "ü".encode()[:1]])
def test_half_a_line_of_a_killed_program_is_cut_off(tmp_path, torn):
    session = make_folder(tmp_path, 2)
    prefer(session, "anna", Task(0, 0), 0)
    whole = (tmp_path / CLICKS).read_bytes()
    with open(tmp_path / CLICKS, "ab") as file:
        file.write(torn)
    assert len(read_clicks(tmp_path)) == 1  # while another program writes
    open_folder(tmp_path, {})
    assert (tmp_path / CLICKS).read_bytes() == whole
    assert cut_torn_line(tmp_path / CLICKS) == 0


def test_a_broken_line_is_named(tmp_path):
    make_folder(tmp_path, 1)
    (tmp_path / CLICKS).write_text('{"annotator": "anna"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 has no 'pair'"):
        read_clicks(tmp_path)
    (tmp_path / CLICKS).write_text("\n{}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_clicks(tmp_path)


def test_a_pair_outside_of_the_folder_is_refused(tmp_path):
    make_folder(tmp_path / "labels", 1)
    write_pair(tmp_path / "labels", Pair("00001", "secret", ("images/0.png", "../../etc/passwd")))
    with pytest.raises(ValueError, match="line 2 names '../../etc/passwd', which is not in the folder"):
        LabelSession(tmp_path / "labels", 2)


# --- the session -----------------------------------------------------------------------------------------------------


def test_labels_are_those_that_were_meant(tmp_path):
    """Whatever side an image was on. The sides are drawn, so both occur among twenty pairs (chance of failure: 2e-6)."""
    session = make_folder(tmp_path, 20)
    wanted = [index % 2 for index in range(18)] + ["tie", "skip"]
    label_all(session, "anna", lambda task: wanted[task.index])
    assert {session.left_image("anna", Task(index, 0)) for index in range(20)} == {0, 1}
    rows = label_rows(tmp_path)
    assert [row["label_0"] for row in rows] == [1.0, 0.0] * 9 + [0.5]
    assert all(row["label_0"] + row["label_1"] == 1 for row in rows)
    assert rows[0]["caption"] == "prompt 0"


def test_the_second_click_on_a_pair_changes_nothing(tmp_path):
    """A double click, or a second window with the same name that still shows the pair."""
    session = make_folder(tmp_path, 3)
    assert prefer(session, "anna", Task(0, 0), 0).saved
    outcome = prefer(session, "anna", Task(0, 0), 1)
    assert not outcome.saved and "already" in outcome.message
    assert session.current("anna") == Task(1, 0)
    assert [row["label_0"] for row in label_rows(tmp_path)] == [1.0]


def test_clicks_at_the_same_time(tmp_path):
    """Eight windows, four of each annotator, race for the same forty pairs: each pair is decided once by each."""
    session = make_folder(tmp_path, 40)
    start = threading.Barrier(8)

    def window(annotator):
        start.wait()
        for index in range(40):
            prefer(session, annotator, Task(index, 0), index % 2)

    threads = [threading.Thread(target=window, args=(name,)) for name in ["anna", "ben"] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clicks = read_clicks(tmp_path)
    assert len(clicks) == 80 == len({click.key for click in clicks})
    assert [row["label_0"] for row in label_rows(tmp_path)] == [1.0, 0.0] * 20


def test_undo(tmp_path):
    session = make_folder(tmp_path, 3)
    prefer(session, "anna", Task(0, 0), 0)
    session.decide("anna", Task(1, 0), "skip")
    prefer(session, "ben", Task(0, 0), 0)  # not anna's, and later
    assert session.undo("anna", Task(2, 0)).saved
    assert session.current("anna") == Task(1, 0)
    assert not session.undo("anna", Task(2, 0)).saved  # the second half of a double click: the page still shows pair 2
    assert session.current("anna") == Task(1, 0)
    assert session.undo("anna", Task(1, 0)).saved
    prefer(session, "anna", Task(0, 0), 1)
    assert session.undo("clara", Task(0, 0)).message == "There is nothing to undo."

    # The file remembers everything, and a new session continues from it.
    assert [click.choice for click in read_clicks(tmp_path)].count("undo") == 2
    again = LabelSession(tmp_path, 3)
    assert again.current("anna") == Task(1, 0) and again.current("ben") == Task(1, 0)
    assert label_rows(tmp_path)[0]["label_0"] == 0.5  # ben the first, anna the second


def test_a_full_disk_leaves_everything_as_it_was(tmp_path):
    session = make_folder(tmp_path, 2)
    prefer(session, "anna", Task(0, 0), 0)
    before = (tmp_path / CLICKS).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), limits[1]))
    try:
        with pytest.raises(OSError):
            prefer(session, "anna", Task(1, 0), 0)
        with pytest.raises(OSError):
            session.undo("anna", Task(1, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / CLICKS).read_bytes() == before
    assert session.current("anna") == Task(1, 0)
    assert prefer(session, "anna", Task(1, 0), 0).saved


@pytest.mark.parametrize("fraction, repeats", [(0.0, 0), (0.1, 4), (0.25, 10), (1.0, 40)])
def test_repeats(tmp_path, fraction, repeats):
    """Their number is exact, they come later than their pair and with swapped sides, and each annotator has others."""
    session = make_folder(tmp_path, 40, fraction)
    shown = label_all(session, "anna", lambda task: 0)
    again = [task for task in shown if task.showing == 1]
    assert len(again) == repeats and len(set(shown)) == len(shown) == 40 + repeats
    for task in again:
        first = shown.index(Task(task.index, 0))
        assert shown.index(task) > first
        assert task.index > 40 - REPEAT_DISTANCE - 1 or shown.index(task) - first >= REPEAT_DISTANCE
        assert session.left_image("anna", task) == 1 - session.left_image("anna", task._replace(showing=0))
    assert session.progress("anna") == (40 + repeats, 40 + repeats)
    other = LabelSession(tmp_path, 40, fraction, seed=5)  # another seed changes nothing that was shown
    assert all(other.left_image("anna", task) == session.left_image("anna", task) for task in shown)


def test_what_was_skipped_is_not_repeated(tmp_path):
    session = make_folder(tmp_path, 12, 1.0)
    shown = label_all(session, "anna", lambda task: "skip" if task.index % 2 else 0)
    assert sorted(task.index for task in shown if task.showing == 1) == [0, 2, 4, 6, 8, 10]
    assert len(label_rows(tmp_path)) == 6


def test_several_annotators_are_averaged_and_nobody_counts_twice(tmp_path):
    """Anna sees pair 0 twice and contradicts herself (0.5), ben prefers its first image (1): (0.5 + 1) / 2."""
    session = make_folder(tmp_path, 2, 1.0)
    prefer(session, "anna", Task(0, 0), 0)
    prefer(session, "anna", Task(0, 1), 1)
    prefer(session, "ben", Task(0, 0), 0)
    prefer(session, "ben", Task(1, 0), 1)
    assert [row["label_0"] for row in label_rows(tmp_path)] == [0.75, 0.0]


@pytest.mark.parametrize("name", ["", "  ", "a" * 61, "a\x00b"])
def test_names_of_annotators(name):
    with pytest.raises(ValueError, match="visible characters"):
        check_annotator(name)
    assert check_annotator("  Anna  Müller ") == "Anna Müller"


def test_refused_choices(tmp_path):
    session = make_folder(tmp_path, 1)
    with pytest.raises(ValueError, match="A choice is one of"):
        session.decide("anna", Task(0, 0), "both")
    with pytest.raises(ValueError, match="There is no pair 1"):
        session.decide("anna", Task(1, 0), "left")
    assert read_clicks(tmp_path) == []


# --- agreement -------------------------------------------------------------------------------------------------------


def test_kappa_by_hand():
    """
    Cohen's own arithmetic: 20 of 50 both yes, 15 both no, 5 only the first yes, 10 only the second yes. p = 35/50 = 0.7,
    p_e = (25 * 30 + 25 * 20) / 50^2 = 0.5, kappa = 0.2 / 0.5 = 0.4.
    """
    first = [1] * 20 + [0] * 15 + [1] * 5 + [0] * 10
    second = [1] * 20 + [0] * 15 + [0] * 5 + [1] * 10
    found = cohens_kappa(first, second)
    assert found.n == 50 and found.share == 0.7 and found.kappa == pytest.approx(0.4)
    assert cohens_kappa([1, 1], [1, 1]).kappa != cohens_kappa([1, 1], [1, 1]).kappa  # NaN: chance alone explains it
    assert cohens_kappa([], []).n == 0


def test_agreement_with_oneself_and_others(tmp_path):
    session = make_folder(tmp_path, 20, 1.0)
    label_all(session, "steady", lambda task: task.index % 2)
    label_all(session, "fickle", lambda task: (task.index + task.showing) % 2)
    label_all(session, "leftist", lambda task: "left")
    votes = [row["votes"] for row in label_rows(tmp_path)]
    found = self_agreement(votes)
    assert found["steady"] == (20, 1.0, 1.0)
    assert found["fickle"].share == 0.0 and found["fickle"].kappa == -1.0
    assert found["leftist"].share == 0.0  # a side is not a preference, and the repeats show it
    between = agreement_between(votes)
    assert between["fickle", "steady"].share == 1.0 and len(between) == 3
    bias = side_bias([[vote for vote in row if vote["annotator"] == "leftist"] for row in votes])
    assert bias.n == 40 and bias.share == 1.0 and bias.half_width == pytest.approx(0.155, abs=1e-3)


# --- where pairs come from -------------------------------------------------------------------------------------------


def test_sampled_pairs_do_not_depend_on_interruptions(tmp_path):
    """Two runs, of which one is stopped after each batch, make the same files; what is there is not made again."""
    pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path))
    prompts = prompt_order(["a cat", "a dog", "a fox"], 5, seed=0)
    assert sorted(prompts[:3]) == ["a cat", "a dog", "a fox"] and len(prompts) == 5
    sampler = {"num_inference_steps": 2, "guidance_scale": 1.0}
    for name in ("whole", "parts"):
        open_folder(tmp_path / name, {"seed": 3})
    heard = []
    PairSampler(tmp_path / "whole", pipeline, prompts, 3, 8, sampler, heard.append).run()
    for end in (1, 2, 5):
        PairSampler(tmp_path / "parts", pipeline, prompts[:end], 3, 2, sampler, heard.append).run()
    assert [pair.name for pair in heard] == ["00000", "00001", "00002", "00003", "00004"] * 2
    assert heard[1].seeds == (5, 6) and heard[1].prompt == prompts[1]
    files = sorted(path.name for path in (tmp_path / "whole" / "images").iterdir())
    assert len(files) == 10
    for file in files:  # equal up to rounding, as batches have other sizes
        pixels = [np.asarray(Image.open(tmp_path / name / "images" / file), dtype=int) for name in ("whole", "parts")]
        assert abs(pixels[0] - pixels[1]).max() <= 1 and pixels[0].std() > 5


def test_the_command_samples_as_the_lora_was_trained_and_from_the_seed_it_was_given(tmp_path):
    """
    Regression: a `--seed` ended in a `TypeError`, and `--protocol`, which a LoRA's own sampler is the default of, was not heard.
    The first pair must be what `sample` makes of the same prompt and seeds.
    """
    tiny_sd_pipeline(tmp_path / "model").save_pretrained(tmp_path / "model")
    model = ["--model_name_or_path", str(tmp_path / "model"), "--device", "cpu"]
    trainer = SPOTrainer(
        tiny_spo_config(tmp_path / "lora", num_inference_steps=3, guidance_scale=2.0, eta=0.5),
        str(tmp_path / "model"),
        brightness_reward,
        train_dataset=["a cat"],
    )
    trainer.save_model()
    (tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    own = [*model, "--lora", str(tmp_path / "lora"), "--seed", "7"]
    where = ["--prompts", str(tmp_path / "prompts.txt"), "--num_pairs", "1", "--output_dir", str(tmp_path / "labels")]
    arguments = script.make_parser("trl-spo label").parse_args_and_config([*own, *where])
    _, sampler = script.prepare(*arguments, tmp_path / "labels")
    sampler.run()

    sample_arguments = [
        *own,
        "--prompt",
        "a cat",
        "--images_per_prompt",
        "2",
        "--output_dir",
        str(tmp_path / "samples"),
    ]
    run(sample.main, sample.make_parser("trl-spo sample"), sample_arguments)
    (pair,) = read_pairs(tmp_path / "labels").values()
    assert pair.seeds == (7, 8)
    for file, seed in zip(pair.images, pair.seeds, strict=True):
        pixels = np.asarray(Image.open(tmp_path / "labels" / file))
        expected = np.asarray(Image.open(next((tmp_path / "samples").glob(f"*_seed{seed}.png"))))
        assert np.array_equal(pixels, expected)
    stored = json.loads((tmp_path / "labels" / "label.json").read_text())
    assert (stored["seed"], stored["sampler"]["num_inference_steps"], stored["sampler"]["eta"]) == (7, 3, 0.5)


@pytest.mark.parametrize("seeds", [["1", "2"], ["-1"]])
def test_a_labelling_has_one_seed(tmp_path, seeds, capsys):
    arguments = ["--prompts", "none.txt", "--seed", *seeds, "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        run(script.main, script.make_parser("trl-spo label"), arguments)
    assert "A labelling has one --seed of at least 0" in capsys.readouterr().err


def test_a_sampler_that_fails_says_so(tmp_path):
    open_folder(tmp_path, {"seed": 0})
    sampler = PairSampler(tmp_path, wrap_pipeline(tiny_sd_pipeline(tmp_path)), ["a cat"], 0, 8, {"height": 3}, print)
    sampler.run()
    assert sampler.trouble.startswith("No more pairs can be made: ")


def test_other_settings_do_not_mix(tmp_path):
    open_folder(tmp_path, {"model": "a", "seed": 0})
    assert open_folder(tmp_path, {}) == {"model": "a", "seed": 0}  # whatever is there
    with pytest.raises(ValueError, match="model was 'a' and is 'b'"):
        open_folder(tmp_path, {"model": "b", "seed": 0})
    with pytest.raises(ValueError, match="no pairs to label: name prompts"):
        open_folder(tmp_path / "new", {})


def test_pairs_of_a_dataset_are_copied_once(tmp_path):
    rows = [{"prompt": "a", "chosen": str(tmp_path / "x.png"), "rejected": str(tmp_path / "y.png")}] * 3
    Image.new("RGB", (4, 4), "red").save(tmp_path / "x.png")
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "y.png")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    dataset, columns = script.existing_pairs(str(tmp_path / "pairs.jsonl"), num_pairs=2)
    open_folder(tmp_path / "labels", {"seed": 0})
    for _ in range(2):
        copy_pairs(tmp_path / "labels", dataset, columns)
    session = LabelSession(tmp_path / "labels", 2)
    assert [pair.prompt for pair in session.pairs] == ["a", "a"]
    assert Image.open(tmp_path / "labels" / session.pairs[1].images[1]).getpixel((0, 0)) == (0, 0, 255)


# --- the dataset -----------------------------------------------------------------------------------------------------


def test_the_folder_is_a_dataset(tmp_path):
    session = make_folder(tmp_path, 4)
    with pytest.raises(ValueError, match="has no labels yet"):
        load_preference_dataset(tmp_path)
    label_all(session, "anna", lambda task: [0, 1, "tie", "skip"][task.index])
    dataset = load_preference_dataset(tmp_path)
    assert dataset["label_0"][:] == [1.0, 0.0, 0.5] and dataset["caption"][:] == ["prompt 0", "prompt 1", "prompt 2"]
    assert [row["label_0"] for row in load_preference_dataset(tmp_path, streaming=True)] == [1.0, 0.0, 0.5]


def test_undone_clicks_do_not_count():
    click = Click("anna", "00000", 0, 0, "left", "")
    other = click._replace(choice="right")
    undo = click._replace(choice="undo")
    assert valid_clicks([click, undo, other]) == [other]
    assert valid_clicks([click, undo, undo]) == []
    assert valid_clicks([click, other]) == [click]  # of two at once, the first


# --- the command -----------------------------------------------------------------------------------------------------


@needs_gradio
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompts", "p.txt", "--dataset_name", "d"], "exclude each other"),
        (["--dataset_name", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--num_pairs", "0"], "`num_pairs` must be at least 1"),
        (["--repeat_fraction", "2"], "`repeat_fraction` must be in"),
        (["--annotator", " "], "visible characters"),
        ([], "There are no pairs to label"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, capsys):
    own = ["--output_dir", str(tmp_path / "labels"), "--port", "0", "--no_open_browser"]
    with pytest.raises(SystemExit) as stop:
        run(script.main, script.make_parser("trl-spo label"), [*own, *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@needs_gradio
def test_one_program_per_port_and_folder(tmp_path):
    import filelock

    with script.listen("127.0.0.1", 0) as listener:
        listener.listen()
        with pytest.raises(SystemExit, match="cannot be served"):
            script.listen("127.0.0.1", listener.getsockname()[1])
    make_folder(tmp_path, 1)
    with filelock.FileLock(tmp_path / script.LOCK), pytest.raises(CommandError, match="Another `trl-spo label`"):
        own = ["--output_dir", str(tmp_path), "--port", "0", "--no_open_browser"]
        run(script.main, script.make_parser("trl-spo label"), own)


@needs_gradio
def test_a_host_for_everybody_is_warned_about(caplog, capsys, monkeypatch):
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    listener = SimpleNamespace(getsockname=lambda: ("0.0.0.0", 80), listen=lambda backlog: None)
    script.serve(None, listener, script.LabelArguments(host="0.0.0.0", open_browser=False))
    assert "the page asks for no password" in caplog.text
    script.serve(None, listener, script.LabelArguments(open_browser=False))
    assert caplog.text.count("password") == 1
