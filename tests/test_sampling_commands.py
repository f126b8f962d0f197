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
Necessity: `sample` and `evaluate` are how people judge what they trained. One seed with two pictures, an image that is lost, a
setting that nobody wrote down, or a label at the wrong image of a grid leads to a wrong judgement that no error message tells.
"""

import hashlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trl_spo import SPOTrainer, wrap_pipeline
from trl_spo.captions import captioned_grid, cell_picture
from trl_spo.evaluation.curves import plot_accuracy_by_timestep, plot_curves
from trl_spo.evaluation.evaluate import evaluate_pipeline
from trl_spo.evaluation.metrics import METRICS
from trl_spo.evaluation.protocols import DEFAULT_PROTOCOL, PROTOCOLS, trained_protocol
from trl_spo.evaluation.sheets import (
    BETTER,
    WORSE,
    before_after_sheet,
    candidate_tree,
    evenly_spaced,
    labelled_grid,
)
from trl_spo.evaluation.statistics import paired_statistics, statistics_table, wilson_interval
from trl_spo.export import merge_lora
from trl_spo.images import eight_bits
from trl_spo.sampler_file import read_sampler
from trl_spo.sampling import generate_images
from trl_spo.scripts import evaluate, sample
from trl_spo.scripts.errors import run
from trl_spo.scripts.sample_plan import AXES

from .flow_testing import tiny_sd3_pipeline
from .test_visualization import has
from .testing_utils import PROMPTS, brightness_reward, tiny_clip, tiny_sd_pipeline, tiny_spo_config


FAMILIES = {
    "unet": (tiny_sd_pipeline, {"eta": 0.7, "negative_prompt": "a blue dog", "height": 24, "guidance_rescale": 0.3}),
    "flow": (tiny_sd3_pipeline, {"eta": 0.9, "sampler": "cps", "num_inference_steps": 4}),
}


class Trained:
    """A pipeline on disk, and the folder of a run with checkpoints that it is the base of."""

    def __init__(self, folder: Path, family: str):
        make, settings = FAMILIES[family]
        torch.manual_seed(0)
        make(folder).save_pretrained(folder / "base")
        self.config = tiny_spo_config(
            folder / "run", max_steps=2, save_strategy="steps", save_steps=1, learning_rate=0.5, **settings
        )
        self.trainer = SPOTrainer(self.config, folder / "base", brightness_reward, train_dataset=PROMPTS)
        self.trainer.train()
        self.trainer.save_model()
        self.base = folder / "base"
        self.run = folder / "run"

    def arguments(self, output: Path, *more, prompts=PROMPTS[:3]) -> list[str]:
        file = output.parent / "prompts.txt"
        file.write_text("".join(f"{prompt}\n" for prompt in prompts))
        own = ["--model_name_or_path", self.base, "--prompts", file, "--device", "cpu", "--output_dir", output]
        return [str(argument) for argument in (*own, *more)]

    def sample(self, output: Path, *more, **kwargs) -> list[np.ndarray]:
        """The images of `sample`."""
        parsed = sample.make_parser().parse_args_and_config(self.arguments(output, *more, **kwargs))
        return [np.asarray(Image.open(path)) for path in sample.main(*parsed)]

    def evaluate(self, output: Path, *more, **kwargs):
        """The result of `evaluate` with the CLIP of the tests."""
        clip = tiny_clip(output.parent)
        options = {"clip_score": {"model": str(clip), "processor": str(clip)}}
        more = ["--metrics", "clip_score", "--metric_options", json.dumps(options), *more]
        parsed = evaluate.make_parser().parse_args_and_config(self.arguments(output, *more, **kwargs))
        return evaluate.main(*parsed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Trained]:
    return {family: Trained(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture
def unet(trained) -> Trained:
    return trained["unet"]


def pixels(images: torch.Tensor) -> list[np.ndarray]:
    return list(eight_bits(images).permute(0, 2, 3, 1).numpy())


def equal(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return len(some) == len(others) and all(
        np.array_equal(one, other) for one, other in zip(some, others, strict=True)
    )


def record_of(folder: Path) -> dict:
    return json.loads((folder / "samples.json").read_text())


# --- one seed, one picture -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
class TestOneSeedIsOnePicture:
    def test_the_sampler_is_stored_with_the_model(self, trained, family):
        """In the run and in each checkpoint, by the names of the config."""
        one = trained[family]
        stored = json.loads((one.run / "sampler.json").read_text())
        scheduler = stored.pop("scheduler")
        assert scheduler == wrap_pipeline(str(one.base)).step_rule.sampler_name
        assert stored == {name: getattr(one.config, name) for name in stored} and len(stored) == 9
        assert read_sampler(one.run / "checkpoint-1") == read_sampler(one.run / "pytorch_lora_weights.safetensors")
        assert read_sampler(one.run)["eta"] == FAMILIES[family][1]["eta"]

    def test_both_commands_use_it(self, trained, family, tmp_path):
        """Regression: with defaults, `evaluate` took eta 0 and `sample` eta 1. The trainer's own images are the third."""
        one = trained[family]
        sampled = one.sample(tmp_path / "sample", "--lora", one.run)
        evaluated = one.evaluate(tmp_path / "evaluate", "--lora", one.run)
        assert evaluated.protocol.name == "trained"
        assert equal(sampled, pixels(evaluated.images))
        own = pixels(one.trainer.generate(PROMPTS[:3]))
        assert max(np.abs(a.astype(int) - b).max() for a, b in zip(own, sampled, strict=True)) <= 1
        assert record_of(tmp_path / "sample")["sampler"]["eta"] == FAMILIES[family][1]["eta"]

    def test_a_merged_model_keeps_it(self, trained, family, tmp_path):
        """The images are those of the LoRA on its base, to the rounding of the merged weights."""
        one = trained[family]
        merged = merge_lora(one.base, one.run, tmp_path / "merged")
        assert read_sampler(merged) == read_sampler(one.run)
        sampled = one.sample(tmp_path / "sample", "--lora", one.run)
        evaluated = one.evaluate(tmp_path / "evaluate", "--model_name_or_path", merged)
        assert evaluated.protocol.name == "trained"
        assert evaluated.protocol == one.evaluate(tmp_path / "lora", "--lora", one.run).protocol
        difference = [np.abs(a.astype(int) - b).mean() for a, b in zip(pixels(evaluated.images), sampled, strict=True)]
        assert max(difference) < 2

    def test_without_a_lora_both_use_the_default(self, trained, family, tmp_path):
        one = trained[family]
        sampled = one.sample(tmp_path / "sample", "--seed", 4)
        evaluated = one.evaluate(tmp_path / "evaluate", "--seed", 4)
        assert equal(sampled, pixels(evaluated.images))
        by_hand = generate_images(wrap_pipeline(str(one.base)), PROMPTS[:3], seeds=[4, 5, 6])  # 20 steps, 5, eta 1
        assert equal(sampled, pixels(by_hand))
        assert evaluated.protocol.name == "default with seed=4" and evaluated.protocol.scheduler is not None

    def test_options_go_before_it(self, trained, family, tmp_path):
        one = trained[family]
        options = ["--lora", one.run, "--num_inference_steps", 3, "--guidance_scale", 1]
        sampled = one.sample(tmp_path / "sample", *options)
        evaluated = one.evaluate(tmp_path / "evaluate", *options)
        assert equal(sampled, pixels(evaluated.images))
        assert evaluated.protocol.name == "trained with num_inference_steps=3, guidance_scale=1.0"
        assert evaluated.protocol.eta == FAMILIES[family][1]["eta"]


def test_a_named_protocol_is_that_protocol(unet, tmp_path):
    """Published numbers name one; what the LoRA was trained with does not reach into it."""
    sampled = unet.sample(tmp_path / "sample", "--lora", unet.run, "--protocol", "spo-paper")
    evaluated = unet.evaluate(tmp_path / "evaluate", "--lora", unet.run, "--protocol", "spo-paper")
    assert evaluated.protocol == PROTOCOLS["spo-paper"]
    assert equal(sampled, pixels(evaluated.images))
    assert "name a protocol" not in evaluated.report()
    assert "name a protocol" in unet.evaluate(tmp_path / "again", "--lora", unet.run).report()


def test_a_lora_of_another_program_gets_the_default(unet, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    weights = (unet.run / "pytorch_lora_weights.safetensors").read_bytes()
    (tmp_path / "other" / "pytorch_lora_weights.safetensors").write_bytes(weights)
    unet.sample(tmp_path / "out", "--lora", tmp_path / "other", "--num_prompts", 1)
    assert "does not say what sampler it was trained for" in capsys.readouterr().out
    assert trained_protocol(tmp_path / "other") is DEFAULT_PROTOCOL


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"eta": "much"}', "`eta` in .* must be a number of at least 0, got 'much'"),
        ('{"num_inference_steps": 1e9}', "`num_inference_steps` in .* must be a whole number from 1 to 1000"),
        ("[1]", "must hold the settings of a sampler by name"),
        ("{", "is not JSON"),
    ],
)
def test_a_broken_file_is_refused_before_anything_is_loaded(unet, tmp_path, content, message):
    """It may come from anywhere."""
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    (tmp_path / "sampler.json").write_text(content)
    arguments = ["--lora", tmp_path, "--model_name_or_path", "no/such/pipeline"]
    with pytest.raises(SystemExit, match=message):
        run(sample.main, sample.make_parser(), unet.arguments(tmp_path / "out", *arguments))


# --- sample ----------------------------------------------------------------------------------------------------------


class TestSample:
    def test_what_exists_survives_an_interruption(self, unet, tmp_path, monkeypatch, capsys):
        """Regression: all images were kept in memory until the last was made."""
        made = []
        original = type(wrap_pipeline(str(unet.base))).sample

        def sample_twice(pipeline, *args, **kwargs):
            if len(made) == 2:
                raise KeyboardInterrupt
            made.append(original(pipeline, *args, **kwargs))
            return made[-1]

        monkeypatch.setattr("trl_spo.pipelines.base.SPOPipeline.sample", sample_twice)
        with pytest.raises(SystemExit) as stop:
            unet.sample(tmp_path / "out", "--batch_size", 1, "--num_inference_steps", 2)
        assert stop.value.code == 130 and "Stopped: 2 of 3 images" in capsys.readouterr().err
        listed = [image["file"] for image in record_of(tmp_path / "out")["images"]]
        assert listed == sorted(path.name for path in (tmp_path / "out").glob("*.png")) and len(listed) == 2

    def test_a_second_call_into_the_same_folder(self, unet, tmp_path):
        """Regression: `samples.json` listed the last call only, and images of the first were there without a word."""
        short = ["--num_inference_steps", 2]
        first = unet.sample(tmp_path / "out", *short, "--seed", 3)
        unet.sample(tmp_path / "out", *short, "--seed", 10, "--guidance_scale", 2, "--num_prompts", 1)
        names = [f"0000{i}_seed{3 + i}.png" for i in range(3)]
        assert equal(first, [np.asarray(Image.open(tmp_path / "out" / name)) for name in names])
        record = record_of(tmp_path / "out")
        assert [image["file"] for image in record["images"]] == ["00003_seed10.png"]
        assert record["sampler"]["guidance_scale"] == 2
        assert [image["file"] for image in record["earlier"][0]["images"]] == names
        assert record["earlier"][0]["sampler"]["guidance_scale"] == 5
        (tmp_path / "out" / names[0]).unlink()
        unet.sample(tmp_path / "out", *short, "--num_prompts", 1)
        record = record_of(tmp_path / "out")
        assert [len(run["images"]) for run in record["earlier"]] == [2, 1]  # what was deleted is not listed

    def test_a_folder_of_something_else(self, unet, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "samples.json").write_text('{"step": 3, "images": ["sample_0.png"]}')  # of a training
        with pytest.raises(SystemExit, match="was not written by .*sample"):
            run(sample.main, sample.make_parser(), unet.arguments(tmp_path / "out"))

    def test_a_random_seed_is_written_down(self, unet, tmp_path):
        short = ["--num_inference_steps", 2, "--num_prompts", 2]
        images = unet.sample(tmp_path / "one", *short, "--seed", -1)
        first, second = (image["seed"] for image in record_of(tmp_path / "one")["images"])
        assert 0 <= first == second - 1
        assert equal(images, unet.sample(tmp_path / "again", *short, "--seed", first))

    def test_several_seeds(self, unet, tmp_path):
        short = ["--num_inference_steps", 2]
        images = unet.sample(tmp_path / "out", *short, "--seed", 7, 3, prompts=PROMPTS[:2])
        listed = [(image["prompt"], image["seed"]) for image in record_of(tmp_path / "out")["images"]]
        assert listed == [(PROMPTS[0], 7), (PROMPTS[0], 3), (PROMPTS[1], 7), (PROMPTS[1], 3)]
        assert equal(images[2:3], unet.sample(tmp_path / "one", *short, "--seed", 7, prompts=PROMPTS[1:2]))

    def test_the_base_model_beside_the_lora(self, unet, tmp_path):
        trained = ["--protocol", "spo-paper", "--num_inference_steps", 2]
        both = unet.sample(tmp_path / "both", *trained, "--lora", unet.run, "--base")
        base = unet.sample(tmp_path / "base", *trained)
        lora = unet.sample(tmp_path / "lora", *trained, "--lora", unet.run)
        assert equal(both, base + lora) and not equal(base, lora)
        images = record_of(tmp_path / "both")["images"]
        assert [image["model"] for image in images] == ["base model"] * 3 + ["LoRA"] * 3
        assert images[0]["file"] == "00000_seed0_base.png" and images[3]["file"] == "00003_seed0.png"
        grid = np.asarray(Image.open(tmp_path / "both" / "grid.png"))
        left, right = (np.kron(image, np.ones((12, 12, 1))) for image in (both[0], both[3]))  # 16 pixels become 192
        row = grid[55 : 55 + 192, 12:]
        assert np.array_equal(row[:, :192], left) and np.array_equal(row[:, 196:388], right)

    def test_a_grid_has_the_right_image_at_every_place(self, unet, tmp_path):
        """Each cell is what a call with that checkpoint and that weight makes, whatever was loaded before it."""
        short = ["--num_inference_steps", 2, "--num_prompts", 1]
        axes = ["--x", "lora_scale=0,1", "--y", "checkpoint=2,1,last"]
        images = unet.sample(tmp_path / "out", *short, "--lora", unet.run, *axes)
        assert len(images) == 6
        cells = {}
        for image, entry in zip(images, record_of(tmp_path / "out")["images"], strict=True):
            cells[entry["lora_scale"], entry["checkpoint"]] = image
        grid = np.asarray(Image.open(tmp_path / "out" / "grid.png"))
        for row, checkpoint in enumerate(("2", "1", "last")):
            folder = unet.run if checkpoint == "last" else unet.run / f"checkpoint-{checkpoint}"
            for column, scale in enumerate((0.0, 1.0)):
                alone = tmp_path / f"{checkpoint}{scale}"
                (expected,) = unet.sample(alone, *short, "--lora", folder, "--lora_scale", scale)
                assert np.array_equal(cells[scale, checkpoint], expected), (checkpoint, scale)
                height = expected.shape[0] * 12
                top = grid.shape[0] - 12 - (3 - row) * (height + 4)
                left = grid.shape[1] - 12 - (2 - column) * (192 + 4)
                shown = grid[top : top + height : 12, left : left + 192 : 12]
                assert np.array_equal(shown, expected), (checkpoint, scale)
        assert not np.array_equal(cells[1.0, "1"], cells[1.0, "2"])
        assert {path.name for path in (tmp_path / "out").glob("0*.png")} >= {
            "00001_seed0_lora_scale-1_checkpoint-1.png"
        }

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--x", "lora_scal=0,1"], "--x must be NAME=VALUE.* did you mean lora_scale"),
            (["--x", "eta=0,b"], "values of --x eta must be numbers, got '0,b'"),
            (["--x", "eta=" + ",".join(map(str, range(11)))], "1 to 10 different values of eta, got 11"),
            (["--x", "eta=1,1"], "1 to 10 different values"),
            (["--x", "eta=0,1", "--y", "eta=0"], "both change eta"),
            (["--x", "checkpoint=1"], "grid over checkpoint needs a --lora"),
            (["--base"], "--base shows .* there is no --lora"),
            (["--lora", "RUN", "--x", "checkpoint=1,3"], "no checkpoint '3' in .*; there are 1, 2, and `last`"),
            (["--lora", "RUN", "--x", "eta=0,1", "--base"], "--base is a grid of its own"),
            (["--seed", "1", "2", "--images_per_prompt", "2"], "--seed names 2 seeds"),
            (["--seed", "-2"], "`seed` must be 0 or more, or -1 for a random one"),
            (
                ["--x", "eta=0,1", "--y", "guidance_scale=1,2", "--images_per_prompt", "6"],
                "at most 16 of them; these are 18",
            ),
            (["--lora", "nothing-here"], "no LoRA at 'nothing-here': no file or folder here has this name"),
            (["--protocol", "other"], "no protocol 'other'; there are spo-paper"),
        ],
    )
    def test_mistakes_are_found_before_anything_is_loaded(self, unet, tmp_path, arguments, message):
        arguments = [str(unet.run) if word == "RUN" else word for word in arguments]
        arguments = unet.arguments(tmp_path / "out", "--model_name_or_path", "no/such/pipeline", *arguments)
        with pytest.raises(SystemExit, match=message):
            run(sample.main, sample.make_parser(), arguments)
        assert not list((tmp_path / "out").glob("*"))

    def test_axes_are_settings_of_the_sampler(self):
        """A misspelt one would only show in the middle of a run."""
        assert set(AXES) - {"checkpoint", "lora_scale"} <= set(DEFAULT_PROTOCOL.sampler())


# --- evaluate --------------------------------------------------------------------------------------------------------


class TestEvaluate:
    def test_the_report_says_what_was_evaluated(self, unet, tmp_path, capsys):
        """Regression: two reports could not be told apart; neither file named model, LoRA, prompts or weights."""
        unet.evaluate(tmp_path / "out", "--lora", unet.run, "--lora_scale", 0.5, "--base", "--num_prompts", 2)
        written = json.loads((tmp_path / "out" / "metrics.json").read_text())
        weights = unet.run / "pytorch_lora_weights.safetensors"
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        assert written["model"]["model"] == str(unet.base) and written["model"]["dtype"] == "float32"
        assert written["lora"] == {"source": str(unet.run), "file": weights.name, "sha256": digest, "scale": 0.5}
        assert written["base"] == "the same model without the LoRA"
        prompts = "".join(f"{prompt}\n" for prompt in PROMPTS[:2]).encode()
        assert written["prompts"] == {
            "source": str(tmp_path / "prompts.txt"),
            "count": 2,
            "distinct": 2,
            "sha256": hashlib.sha256(prompts).hexdigest(),
        }
        assert written["metric_weights"]["clip_score"]["model"] == str(tmp_path / "clip")
        report, printed = (tmp_path / "out" / "metrics.md").read_text(), capsys.readouterr().out
        for text in (report, printed):
            for part in (
                str(unet.base),
                digest,
                "scale `0.5`",
                "without the LoRA",
                str(tmp_path / "clip"),
                "`float32`",
            ):
                assert part in text

    def test_the_base_is_the_model_without_its_lora(self, unet, tmp_path):
        """Switched off between two batches, and on again."""
        both = unet.evaluate(tmp_path / "both", "--lora", unet.run, "--base", "--batch_size", 2)
        base = unet.evaluate(tmp_path / "base", "--protocol", "trained", "--lora", unet.run, "--lora_scale", 0)
        lora = unet.evaluate(tmp_path / "lora", "--lora", unet.run)
        assert equal(pixels(both.base_images), pixels(base.images)) and equal(pixels(both.images), pixels(lora.images))
        assert not equal(pixels(base.images), pixels(lora.images))
        with pytest.raises(ValueError, match="without its LoRA, and it has none"):
            evaluate_pipeline(str(unet.base), PROMPTS[:1], {"m": lambda images, _: images[:, 0, 0, 0]}, base="no_lora")

    def test_help_names_what_there_is(self):
        """Names that a user has to look up elsewhere; the help of a new one is easily forgotten."""
        text = " ".join(evaluate.make_parser().format_help().split())
        for name in (*METRICS, *PROTOCOLS, "trained", "step_reward"):
            assert name in text, name

    def test_one_prompt_has_no_interval(self):
        """Regression: `16.07 ± nan`, `(+nan to +nan)` and "100.0% (20.7% to 100.0%)"."""
        scores = torch.tensor([2.0]), torch.tensor([1.0])
        table = statistics_table({"score": paired_statistics(scores[0], ["a cat"], scores[1])}).splitlines()[2]
        no = "(one prompt: no interval)"
        assert table == f"| score | 2.0000 ± – | 1.0000 ± – | +1.0000 {no} | 100.0% {no} |"

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--metrics", "pick_score"], "no metric 'pick_score'; did you mean pickscore.* There are pickscore, "),
            (
                ["--metrics", "pickscore", "--metric_options", '{"pickscore": {"modle": "x"}}'],
                "'pickscore' has no option 'modle'; did you mean model\\? It takes model, processor",
            ),
            (["--lora", "./spo-shape"], "no LoRA at './spo-shape': the path does not exist"),
            (["--seed", "1", "2"], "An evaluation has one --seed"),
            (["--seed", "-1"], "An evaluation has one --seed of at least 0"),
            (["--protocol", "other"], "no protocol 'other'"),
        ],
    )
    def test_mistakes_are_found_before_anything_is_loaded(self, unet, tmp_path, arguments, message):
        arguments = unet.arguments(tmp_path / "out", "--model_name_or_path", "no/such/pipeline", *arguments)
        with pytest.raises(SystemExit, match=message):
            run(evaluate.main, evaluate.make_parser(), arguments)

    @pytest.mark.parametrize("script", [evaluate, sample])
    def test_a_lora_of_another_model_is_found_before_sampling(self, trained, tmp_path, script, monkeypatch):
        monkeypatch.setattr(
            "trl_spo.pipelines.base.SPOPipeline.sample", None
        )  # to call it would be an error of its own
        arguments = trained["unet"].arguments(tmp_path / "out", "--lora", trained["flow"].run)
        with pytest.raises(SystemExit, match="is not a LoRA of a unet"):
            run(script.main, script.make_parser(), arguments)


# --- pictures --------------------------------------------------------------------------------------------------------


class TestSheets:
    @pytest.mark.parametrize("width, shown", [(16, 192), (32, 192), (100, 200), (130, 130), (192, 192), (1024, 192)])
    def test_cells_have_a_sensible_size(self, width, shown):
        """Regression: a sheet of one image of 32 pixels was 40 pixels wide."""
        picture = Image.effect_noise((width, width // 2), 50).convert("RGB")
        cell = cell_picture(picture)
        assert cell.size == (shown, round(shown / 2))
        if width < shown:  # every pixel is a square
            assert np.array_equal(np.asarray(cell)[:: shown // width, :: shown // width], np.asarray(picture))

    def test_captions_stand_below_their_images(self):
        pictures = [Image.new("RGB", (16, 16), color) for color in ("#ff0000", "#0000ff")]
        with_text = np.asarray(
            captioned_grid(pictures, ["", "a blue square " * 30], title="a title\nin small letters")
        )
        assert (with_text[251:, :204] == 255).all() and (with_text[251:, 216:] != 255).any()
        assert (with_text[:40, :, :] != 255).any() and with_text.shape[1] == 12 + 2 * 204
        with pytest.raises(ValueError, match="1 for 2 images"):
            captioned_grid(pictures, ["one"])

    def test_what_is_shown_is_spread_evenly(self):
        assert evenly_spaced(10, 3) == [0, 3, 6] and evenly_spaced(2, 16) == [0, 1] and evenly_spaced(5, 0) == []
        assert evenly_spaced(500, 16) == [i * 500 // 16 for i in range(16)]

    def test_labels_must_fit(self):
        picture = Image.new("RGB", (16, 16))
        with pytest.raises(ValueError, match="1 and 2 labels for rows of \\[1\\] images"):
            labelled_grid([[picture]], ["row"], ["one", "two"])

    def test_noise_has_no_colour(self):
        """Regression: a score that moved by 0.01 among scores that differ by 10 was drawn green or red."""
        images = torch.zeros(3, 3, 8, 8)
        before = {"score": torch.tensor([10.0, 20.0, 30.0])}
        for change, coloured in ((0.01, False), (5.0, True)):
            after = {"score": before["score"] + torch.tensor([change, -change, 0.0])}
            sheet = before_after_sheet(images, images, PROMPTS[:3], before, after)
            assert has(sheet, BETTER).any() == has(sheet, WORSE).any() == coloured

    def test_images_of_a_training_have_step_and_prompt(self, tmp_path):
        """Regression: four images in a row, without either."""
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter
        from transformers import TrainerState

        from trl_spo.training.callbacks import ImageLoggingCallback

        config = tiny_spo_config(tmp_path / "run", num_inference_steps=3)
        trainer = SPOTrainer(config, tiny_sd_pipeline(tmp_path), brightness_reward, train_dataset=PROMPTS)
        writer = SummaryWriter(str(tmp_path / "events"))
        trainer.callback_handler.callbacks[0].tb_writer = writer
        state = TrainerState(is_world_process_zero=True, global_step=7)
        ImageLoggingCallback(trainer, PROMPTS[:2], every=1)._log(trainer.args, state)
        writer.close()
        written = Image.open(tmp_path / "run" / "images" / "step_000007.png")
        pictures = [Image.open(tmp_path / "run" / "images" / f"sample_{i}.png") for i in range(2)]
        expected = captioned_grid(pictures, PROMPTS[:2], title="Step 7")
        assert np.array_equal(np.asarray(written), np.asarray(expected))
        events = EventAccumulator(str(tmp_path / "events"))
        events.Reload()
        texts = [events.Tensors(f"samples/{i}/text_summary")[0].tensor_proto.string_val[0].decode() for i in range(2)]
        assert texts == PROMPTS[:2]

    def test_a_tree_says_what_is_seen(self, tmp_path):
        from trl_spo import stepwise_rollout

        pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path))
        pairs = stepwise_rollout(
            pipeline,
            PROMPTS[:1],
            brightness_reward,
            return_trajectory=True,
            num_inference_steps=4,
            branch_start_step=1,
            guidance_scale=1.0,
        )
        tree = candidate_tree(pipeline, pairs)
        columns = 58 + pairs.branches[0].scores.shape[0] * (96 + 34)
        assert has(tree.crop((12, columns, tree.width, tree.height - 26)), "#777777").sum() > 300


class TestCurves:
    HISTORY = [
        {"step": 1, "loss": 0.694, "kl": 1e-6, "rewards/margins": 0.001, "rewards/accuracies": 0.5, "grad_norm": 0.3},
        {"step": 1, "pairs/valid_fraction": 0.5, "clip_ratio": 0.0, "eval_reward_mean": 20.0, "eval_reward_std": 2.0},
        {"step": 2, "loss": 0.692, "kl": 2e-6, "rewards/margins": 0.002, "rewards/accuracies": 0.6, "grad_norm": 0.2},
        {"step": 2, "pairs/valid_fraction": 0.4, "clip_ratio": 0.0, "eval_reward_mean": 20.1, "eval_reward_std": 2.0},
    ]

    def test_six_panels_by_default(self):
        titles = [axes.get_title() for axes in plot_curves(self.HISTORY).axes]
        assert titles == [
            *["eval_reward_mean", "rewards/margins", "rewards/accuracies"],
            *["kl", "loss", "pairs/valid_fraction"],
        ]

    def test_noise_does_not_look_like_an_event(self):
        """Regression: 0.002 of loss filled the panel."""
        axes = {axes.get_title(): axes for axes in plot_curves(self.HISTORY).axes}
        for name, smallest in (("loss", 0.1), ("kl", 5e-4), ("rewards/margins", 0.01), ("eval_reward_mean", 1.0)):
            low, high = axes[name].get_ylim()
            assert high - low >= smallest, name
            values = axes[name].lines[0].get_ydata()
            assert low <= min(values) and max(values) <= high, name
        assert axes["loss"].lines[1].get_ydata()[0] == math.log(2)

    def test_legends_stand_beside_the_data(self):
        history = [{"step": i, "rewards/chosen": i, "rewards/rejected": -i} for i in range(3)]
        figure = plot_curves(history, "all")
        figure.savefig(io.BytesIO())  # which places everything
        (axes,) = figure.axes
        assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1
        assert [line.get_color() for line in axes.lines] == [BETTER, WORSE]

    def test_errors_where_there_are_numbers_for_them(self):
        """20 ± 2 * 2 / sqrt(16) = 19 to 21; Wilson's interval for pairs."""
        figure = plot_curves(self.HISTORY, ["eval_reward_mean", "kl"], num_eval_prompts=16)
        (bars,) = figure.axes[0].containers
        assert bars[2][0].get_segments()[0][:, 1] == pytest.approx([19.0, 21.0]) and not figure.axes[1].containers
        axes = plot_accuracy_by_timestep({"model": {0: 0.9, 500: 0.6}}, num_pairs=100).axes[0]
        segments = axes.containers[0][2][0].get_segments()
        assert segments[1][:, 1] == pytest.approx(wilson_interval(0.6, 100))
