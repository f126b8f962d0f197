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
Necessity: preferences of one's own begin as files with names. Tables and folders must become the pairs that were meant, or be
refused with the file and the line; nothing may be fetched, and nothing that is a file may be looked for on the Hub.
"""

import base64
import io
import json

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from tests.testing_utils import tiny_sd_pipeline
from trl_spo.evaluation.preference_preview import preference_sheet, preview_text
from trl_spo.evaluation.sheets import BETTER
from trl_spo.images import read_image
from trl_spo.label_session import LabelSession, Task
from trl_spo.pair_files import read_image_folder, read_pair_table
from trl_spo.preference_collator import StepPreferenceCollator
from trl_spo.preference_dataset import load_preference_dataset, prepare_preference_dataset
from trl_spo.prompts import load_prompts
from trl_spo.scripts import data as script
from trl_spo.scripts import sample
from trl_spo.scripts.errors import CommandError, run
from trl_spo.scripts.label_pairs import open_folder, save_pair


RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def images(tmp_path):
    """A folder with a red and a blue image."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8), RED).save(tmp_path / "pictures" / "red.png")
    Image.new("RGB", (12, 8), BLUE).save(tmp_path / "pictures" / "blue.png")
    return tmp_path


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def command(*arguments):
    """`trl-spo data ARGUMENTS`."""
    run(script.main, script.make_parser("trl-spo data"), list(map(str, arguments)))


def colours(dataset) -> list[tuple]:
    """Colour of the preferred image of each row, `None` for a tie."""
    found = []
    for row in dataset:
        preferred = None if row["label_0"] == 0.5 else ("jpg_0" if row["label_0"] > 0.5 else "jpg_1")
        found.append(preferred and read_image(row[preferred]).getpixel((0, 0)))
    return found


TABLES = {
    "trl.jsonl": '{"prompt": "a", "chosen": "pictures/red.png", "rejected": "pictures/blue.png"}\n\n'
    '{"prompt": "b", "chosen": "pictures/blue.png", "rejected": "pictures/red.png"}\n',
    "trl.json": '[{"prompt": "a", "chosen": "pictures/red.png", "rejected": "pictures/blue.png"},'
    ' {"prompt": "b", "chosen": "pictures/blue.png", "rejected": "pictures/red.png"}]',
    "trl.csv": "prompt,chosen,rejected\na,pictures/red.png,pictures/blue.png\nb,pictures/blue.png,pictures/red.png\n",
    "label.csv": "caption,image_0,image_1,label\na,pictures/red.png,pictures/blue.png,0\nb,pictures/red.png,pictures/blue.png,1\n",
    "labels.tsv": "prompt\tjpg_0\tjpg_1\tlabel_0\tlabel_1\na\tpictures/red.png\tpictures/blue.png\t1\t0\n"
    "b\tpictures/red.png\tpictures/blue.png\t0\t1\n",
    "messages.jsonl": '{"prompt": [{"role": "user", "content": "a"}], "chosen": "pictures/red.png", "rejected": "pictures/blue.png"}\n'
    '{"prompt": [{"role": "user", "content": "b"}], "chosen": "pictures/blue.png", "rejected": "pictures/red.png"}\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_become_the_pairs_that_were_meant(images, name, monkeypatch):
    """Paths are relative to the table, wherever the program runs."""
    file = write(images / name, TABLES[name])
    (images / "elsewhere").mkdir()
    monkeypatch.chdir(images / "elsewhere")
    for streaming in (False, True):
        dataset = prepare_preference_dataset(load_preference_dataset(file, streaming=streaming))
        rows = list(dataset)
        assert [row.get("caption") or row.get("prompt") for row in rows] == ["a", "b"]
        assert colours(rows) == [RED, BLUE]
    batch = StepPreferenceCollator(resolution=4)(rows)
    assert batch["prompts"] == ["a", "b"] and (batch["label_0"] - batch["label_1"]).abs().tolist() == [1, 1]


def test_ties_missing_labels_and_other_columns(images):
    pair = {"prompt": "a", "image_0": "pictures/red.png", "image_1": "pictures/blue.png"}
    lines = [pair | {"label": label, "source": "me"} for label in ("tie", 0.5, None, "", 1)]
    file = write(images / "p.jsonl", "\n".join(map(json.dumps, lines)))
    rows = read_pair_table(file)
    assert [row["label_0"] for row in rows] == [0.5, 0.5, None, None, 0.0]
    assert [row["has_label"] for row in rows] == [True, True, False, False, True]
    assert rows[0]["source"] == "me"
    assert len(prepare_preference_dataset(load_preference_dataset(file))) == 3


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.csv", "prompt,chosen\na,pictures/red.png\n", r"line 2 needs the columns `chosen` and `rejected`"),
        ("p.csv", "prompt,chosen,rejected\na,pictures/red.png,no.png\n", r"line 2: there is no image '.*no.png'"),
        ("p.csv", "prompt,chosen,rejected\na,b,pictures/red.png,pictures/red.png\n", "line 2 has more cells"),
        ("p.csv", "prompt,chosen,rejected\na,,pictures/red.png\n", "line 2 needs the path of an image in `chosen`"),
        ("p.jsonl", '{"prompt": "a"\n', "line 1 is not JSON"),
        ("p.jsonl", "[1]\n", "line 1 must be an object"),
        ("p.json", '{"a": 1}', "must hold a list of rows"),
        ("p.json", "nonsense", "is not JSON"),
        ("p.jsonl", "", "has no rows"),
        (
            "p.csv",
            "prompt,image_0,image_1,label\na,pictures/red.png,pictures/red.png,left\n",
            "line 2: `label` must say which image is the better one",
        ),
        (
            "p.csv",
            "prompt,image_0,image_1,label_0,label_1\na,pictures/red.png,pictures/red.png,1,1\n",
            "line 2: `label_0` and `label_1` must be",
        ),
        (
            "p.jsonl",
            '{"prompt": "a", "chosen": "https://example.com/a.png", "rejected": "pictures/red.png"}',
            "line 1 has the address 'https://example.com/a.png' in `chosen`. Nothing is downloaded",
        ),
        ("p.jsonl", '{"prompt": "a", "chosen": 3, "rejected": "pictures/red.png"}', "needs the path of an image"),
    ],
)
def test_mistakes_in_tables_name_file_and_line(images, name, text, message):
    file = write(images / name, text)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_preference_dataset(file)
    assert name in str(error.value)


def test_paths_are_images(images):
    path = images / "pictures" / "red.png"
    assert read_image(str(path)).getpixel((0, 0)) == read_image(path).getpixel((0, 0)) == RED
    with pytest.raises(OSError, match="is not a file"):
        read_image("nowhere.png")
    for address in (
        "https://example.com/a.png",
        "s3://bucket/a.png",
        "data:image/png;base64,AAAA",
        "file:///etc/passwd",
    ):
        with pytest.raises(ValueError, match="Nothing is downloaded"):
            read_image(address)
    rows = [{"prompt": "a", "chosen": str(path), "rejected": str(images / "pictures" / "blue.png")}]
    batch = StepPreferenceCollator(resolution=4)(list(prepare_preference_dataset(rows)))
    assert batch["images_0"][0, :, 0, 0].tolist() == [1, -1, -1]


@pytest.mark.parametrize("name", ["p.txt", "p.md", "pairs", "p.xlsx"])
def test_an_existing_file_is_never_looked_up_on_the_hub(tmp_path, name):
    write(tmp_path / name, "x")
    with pytest.raises(
        ValueError, match="not a file of preference pairs: these end in .parquet, .jsonl, .json, .csv, .tsv"
    ):
        load_preference_dataset(tmp_path / name)


@pytest.mark.parametrize("load", [load_prompts, load_preference_dataset])
def test_a_name_that_is_nowhere(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="'nodir'.* no dataset of (that name|the Hub)"):
        load("nodir")


# --- folders of images -----------------------------------------------------------------------------------------------


def make_images(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), BLUE if "rejected" in name or "1" in path.stem[-1:] else RED).save(path)


def test_folders_of_images(tmp_path):
    make_images(tmp_path, "red_fox_2_chosen.png", "red_fox_2_rejected.jpg", "cat-chosen.png", "cat-rejected.png")
    make_images(tmp_path, "chosen/dog.png", "rejected/dog.png", "new/owl_0.png", "new/owl_1.png")
    write(tmp_path / "cat.txt", "a cat,\nwith a hat\n")
    write(tmp_path / "notes.md", "not an image")
    rows = {row["caption"]: row for row in read_image_folder(tmp_path)}
    assert {name: row["label_0"] for name, row in rows.items()} == {
        "red fox": 1.0,
        "a cat, with a hat": 1.0,
        "dog": 1.0,
        "owl": None,
    }
    assert colours([row for row in rows.values() if row["has_label"]]) == [RED] * 3


def test_a_blind_test_of_two_models(tmp_path):
    """Two folders of `trl-spo sample` called 0 and 1 are pairs, with the prompts that it wrote down."""
    tiny_sd_pipeline(tmp_path / "model").save_pretrained(tmp_path / "model")
    for name in ("0", "1"):
        arguments = ["--model_name_or_path", str(tmp_path / "model"), "--prompt", "a cat", "a dog"]
        arguments += ["--num_inference_steps", "1", "--device", "cpu", "--output_dir", str(tmp_path / "blind" / name)]
        run(sample.main, sample.make_parser("trl-spo sample"), arguments)
    dataset = script.load_pairs(str(tmp_path / "blind"))
    assert dataset["caption"][:] == ["a cat", "a dog"] and dataset["has_label"][:] == [False, False]


@pytest.mark.parametrize(
    "names, message",
    [
        (["fox_chosen.png"], "fox_chosen.png' has no partner: there is no fox_rejected"),
        (["fox.png"], "fox.png' belongs to no pair"),
        (["fox_chosen.png", "fox_chosen.jpg", "fox_rejected.png"], "are the same side of one pair"),
        ([], "holds no images"),
    ],
)
def test_folders_that_are_no_pairs(tmp_path, names, message):
    make_images(tmp_path, *names)
    with pytest.raises(ValueError, match=message):
        read_image_folder(tmp_path)


# --- build -----------------------------------------------------------------------------------------------------------


def label_folder(path):
    """Six pairs, red against blue: red, blue, tie, skipped, and twice red; by two annotators."""
    open_folder(path, {"seed": 0})
    for index in range(6):
        save_pair(path, index, f"prompt {index % 3}", [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)])
    session = LabelSession(path, 6, 0)
    for annotator in ("anna", "ben"):
        for index, choice in enumerate([0, 1, "tie", "skip", 0, 0]):
            if choice in (0, 1):
                left = session.left_image(annotator, Task(index, 0))
                choice = "left" if left == choice else "right"
            session.decide(annotator, Task(index, 0), choice)
    return path


def test_what_is_built_needs_no_other_file(tmp_path, capsys):
    """From the clicks to a parquet file that both `datasets` and this package read, after the images are gone."""
    folder = label_folder(tmp_path / "labels")
    command("build", folder, "--output", tmp_path / "built")
    assert "5 pairs in" in capsys.readouterr().out
    for path in (folder / "images").iterdir():
        path.unlink()
    dataset = prepare_preference_dataset(load_preference_dataset(tmp_path / "built"))
    assert colours(dataset) == [RED, BLUE, None, RED, RED]
    assert dataset[0]["votes"][1]["annotator"] == "ben"
    viewed = load_dataset("parquet", data_files=str(tmp_path / "built" / "train.parquet"), split="train")
    assert viewed[0]["jpg_0"].size == (8, 8)
    assert [path.name for path in (tmp_path / "built").iterdir()] == ["train.parquet"]


def test_a_part_of_the_prompts_is_kept_apart(tmp_path):
    """All pairs of a prompt are on one side: of three prompts, one third is one prompt."""
    command(
        "build", label_folder(tmp_path / "labels"), "--output", tmp_path / "built", "--validation_fraction", "0.34"
    )
    splits = [
        load_preference_dataset(tmp_path / "built", split=name)["caption"][:] for name in ("train", "validation")
    ]
    assert len(set(splits[1])) == 1 and not set(splits[0]) & set(splits[1])
    assert len(splits[0]) + len(splits[1]) == 5


def test_a_table_is_built_into_one_file_again_and_again(images):
    file = write(images / "trl.csv", TABLES["trl.csv"])
    for _ in range(2):
        command("build", file, "--output", images / "pairs.parquet")
    assert colours(load_preference_dataset(images / "pairs.parquet")) == [RED, BLUE]


@pytest.mark.parametrize(
    "prepare, message",
    [
        (
            lambda folder: make_images(folder, "in/a_0.png", "in/a_1.png"),
            "No pair of .* has a label. Label them: trl-spo label",
        ),
        (lambda folder: make_images(folder, "in/a_chosen.png"), "has no partner"),
        (
            lambda folder: label_folder(folder / "out") and make_images(folder, "in/a_chosen.png"),
            "the clicks of a labelling",
        ),
        (
            lambda folder: (
                make_images(folder, "in/a_chosen.png", "in/a_rejected.png")
                or write(folder / "in" / "a_chosen.png", "text")
            ),
            "An image of pair 0 cannot be read",
        ),
        (lambda folder: None, "does not exist"),
    ],
)
def test_what_cannot_be_built(tmp_path, prepare, message, capsys):
    prepare(tmp_path)
    with pytest.raises(CommandError, match=message):
        command("build", tmp_path / "in", "--output", tmp_path / "out")
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.parquet"))


# --- preview ---------------------------------------------------------------------------------------------------------


def test_preview_says_what_there_is(tmp_path, capsys):
    command("preview", label_folder(tmp_path / "labels"), "--output", tmp_path / "sheet.png")
    text = capsys.readouterr().out
    for line in ("pairs          5", "ties           1 (20% of the labels", "prompts        3", "8 x 8 (100%)"):
        assert line in text
    assert "anna (5 votes), ben (5 votes)" in text
    assert "agreement      anna and ben: 100% of 5 pairs, Cohen's kappa 1.00" in text
    assert "left           preferred in" in text
    assert "second image   preferred in 25% of 8 votes; if it does not matter, 15% to 85% are expected" in text
    assert Image.open(tmp_path / "sheet.png").width > 600


def test_the_sheet_frames_the_preferred_image(images):
    """Green around the left image of the first pair and the right one of the second; none around a tie."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), RED).save(buffer, format="PNG")
    row = {"prompt": "p", "jpg_0": buffer.getvalue(), "jpg_1": buffer.getvalue()}
    rows = [row | {"label_0": label, "label_1": 1 - label} for label in (1.0, 0.25, 0.5)]
    from datasets import Dataset

    sheet = np.asarray(preference_sheet(Dataset.from_list(rows), columns=3, size=60))
    green = tuple(int(BETTER[i : i + 2], 16) for i in (1, 3, 5))
    found = np.flatnonzero((sheet == green).all(-1).any(0))
    assert found.min() == 12 and found.max() < 12 + 70 + 154 + 70  # nothing over the third cell
    is_framed = [(sheet[:, start : start + 66] == green).all(-1).any() for start in (12, 82, 166, 236, 320, 390)]
    assert is_framed == [True, False, False, True, False, False]


def test_preview_of_broken_and_unlabelled_rows():
    from datasets import Dataset

    png = base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
    )
    rows = [
        {"prompt": "a\nb", "jpg_0": png, "jpg_1": b"no image", "label_0": 1.0, "label_1": 0.0},
        {"prompt": "", "jpg_0": png, "jpg_1": png, "label_0": 0.0, "label_1": 0.0},
    ]
    dataset = Dataset.from_list(rows)
    text = preview_text(dataset)
    assert "pairs          2, 1 of them without a label" in text and "unreadable (25%)" in text
    assert preference_sheet(dataset).size[0] > 300
