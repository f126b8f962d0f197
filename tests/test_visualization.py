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

"""Necessity: a picture that frames the wrong candidate misleads more than no picture; pixels are checked where they mean."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageFont

from trl_spo import SPOTrainer, stepwise_rollout, wrap_pipeline
from trl_spo.captions import can_draw, fit_lines, font, font_file, font_files, printable
from trl_spo.evaluation.curves import plot_accuracy_by_timestep, plot_curves
from trl_spo.evaluation.sheets import (
    BETTER,
    NEXT,
    WORSE,
    before_after_sheet,
    candidate_tree,
)
from trl_spo.images import to_pil
from trl_spo.training.callbacks import ImageLoggingCallback

from .testing_utils import PROMPTS, brightness_reward, tiny_sd_pipeline, tiny_spo_config


def solid(*color, count=1):
    return torch.tensor(color, dtype=torch.float32).view(1, 3, 1, 1).expand(count, 3, 16, 16)


def has(image, color) -> np.ndarray:
    return (np.asarray(image) == np.array(ImageColor.getrgb(color))).all(-1)


def test_to_pil_keeps_colours_and_enlarges_without_blur():
    image = torch.zeros(3, 2, 2)
    image[0, 0, 0] = 1.0
    picture = to_pil(image, 8)
    assert picture.size == (8, 8)
    assert set(picture.get_flattened_data() if hasattr(picture, "get_flattened_data") else picture.getdata()) == {
        (255, 0, 0),
        (0, 0, 0),
    }


def test_sheet_has_before_left_of_after_and_marks_direction():
    red, blue = solid(1, 0, 0, count=2), solid(0, 0, 1, count=2)
    scores = {"score": torch.tensor([1.0, 1.0])}, {"score": torch.tensor([2.0, 0.0])}
    sheet = before_after_sheet(red, blue, PROMPTS[:2], *scores, columns=2, title="title")
    reds, blues = has(sheet, "#ff0000"), has(sheet, "#0000ff")
    assert reds.sum() == blues.sum() == 2 * 128 * 128
    assert np.argwhere(reds)[:, 1].min() < np.argwhere(blues)[:, 1].min()
    assert has(sheet, BETTER).any() and has(sheet, WORSE).any()
    assert not has(before_after_sheet(red, blue, PROMPTS[:2]), BETTER).any()


PROMPTS_THAT_HURT = [
    "",
    "word " * 200,
    "x" * 500,
    "一只红色的猫在蓝色背景上" * 10,
    "кот 🐱 und ein Schloß, naïve — “quotes” \u202e\u0000\ud83d",
    "two\nlines\tand a tab",
]


@pytest.mark.parametrize("prompt", PROMPTS_THAT_HURT, ids=["empty", "words", "word", "chinese", "mixed", "lines"])
def test_texts_of_any_kind_stay_in_their_place(prompt):
    face = font(12, printable(prompt))
    lines = fit_lines(printable(prompt), face, 200, 2)
    assert len(lines) <= 2 and all(face.getlength(line) <= 200 for line in lines)
    assert len(prompt) < 30 or lines[-1].endswith("…") == (face.getlength(printable(prompt)) > 400)
    images = solid(1, 0, 0, count=2)
    sheet = before_after_sheet(images, images, [prompt, "a red cat"], title=prompt or None, columns=2, size=64)
    column = np.asarray(sheet)[45:, 12 + 2 * 64 + 8 : 12 + 2 * 64 + 22]
    assert (column == 255).all(), "the prompt runs into its neighbour"


def test_lines_break_between_words_and_lose_nothing_that_fits():
    face = font(12)
    assert fit_lines("a red cat", face, 500, 2) == ["a red cat"]
    width = face.getlength("a red cat on")
    assert fit_lines("a red cat on a blue dog", face, width, 3) == ["a red cat on", "a blue dog"]
    assert fit_lines("a red cat on a blue dog", face, width, 1)[0].endswith("…")


def test_a_prompt_without_end_is_not_measured_to_its_end():
    """Regression: letters were taken away one by one, each time measuring all that was left: minutes for a prompt of 100,000."""
    face = font(12)
    measured = []

    class Counting:
        def getlength(self, text):
            measured.append(len(text))
            return face.getlength(text)

    lines = fit_lines("word " * 100_000, Counting(), 200, 2)
    assert len(lines) == 2 and all(face.getlength(line) <= 200 for line in lines)
    assert face.getlength(lines[0] + " word") > 200  # no room is left
    assert sum(measured) < 20_000


def test_a_font_is_found_for_what_dejavu_lacks_or_it_stays(monkeypatch):
    assert font(12, "naïve Ж").getname()[0] == "DejaVu Sans"
    has_chinese = [file for file in font_files() if can_draw(file, "猫")]
    assert (font(12, "猫").getname()[0] == "DejaVu Sans") == (not has_chinese)
    assert isinstance(font(12, "\U000e0001"), ImageFont.FreeTypeFont)  # in no font
    # Pillow's own font is left where there is no other; it has fewer characters, and texts are drawn all the same.
    monkeypatch.setattr("trl_spo.captions.font_files", lambda: ())
    font_file.cache_clear()
    assert isinstance(font(12, "naïve 猫 again"), ImageFont.FreeTypeFont)
    font_file.cache_clear()


def test_a_font_can_draw_what_its_table_of_characters_lists():
    """Judged by the glyphs, so compared with what the font file itself says (fontTools comes with matplotlib)."""
    from fontTools.ttLib import TTFont

    file = font_files()[0]
    listed = TTFont(file).getBestCmap()
    for character in "aßЖ…“猫あ\u0e01\U0001f408":
        assert can_draw(file, character) == (ord(character) in listed), character


def test_sheets_need_no_matplotlib():
    code = (
        "import sys, torch; sys.modules['matplotlib'] = None\n"
        "from trl_spo.evaluation.sheets import before_after_sheet\n"
        "image = torch.zeros(1, 3, 8, 8)\n"
        "print(before_after_sheet(image, image, ['a red cat'], title='title').size)\n"
        "import trl_spo.evaluation.curves\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.startswith("(292,") and "pip install trl-spo[eval]" in result.stderr


def test_sheets_with_scores_of_one_side_and_errors():
    red, blue = solid(1, 0, 0, count=2), solid(0, 0, 1, count=2)
    sheet = before_after_sheet(red, blue, PROMPTS[:2], after_scores={"a long name of a metric": torch.ones(2)})
    assert not has(sheet, BETTER).any() and sheet.width == 12 + 2 * (2 * 128 + 24)
    with pytest.raises(ValueError, match="'after': 1"):
        before_after_sheet(red, blue[:1], PROMPTS[:2])
    with pytest.raises(ValueError, match="scores of 'reward'"):
        before_after_sheet(red, blue, PROMPTS[:2], {"reward": torch.ones(3)})


def test_tree_frames_chosen_rejected_and_continuation(tmp_path):
    pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path))
    settings = {"num_inference_steps": 4, "branch_start_step": 1, "guidance_scale": 1.0}
    pairs = stepwise_rollout(
        pipeline, PROMPTS[:2], brightness_reward, return_trajectory=True, preference_threshold=0.0, **settings
    )
    tree = candidate_tree(pipeline, pairs, prompt_row=1)
    assert tree.width == 12 + 3 * (96 + 14 + 12)
    green, red, blue = (has(tree, color)[: tree.height - 30] for color in (BETTER, WORSE, NEXT))
    for column in range(3):  # chosen in the first row, rejected in the last, as rows are sorted by score
        left = slice(column * 122, column * 122 + 122)
        assert np.argwhere(green[:, left])[:, 0].max() < np.argwhere(red[:, left])[:, 0].min()
        rank = (
            pairs.branches[column].scores[:, 1]
            > pairs.branches[column].scores[pairs.branches[column].next_index[1], 1]
        ).sum()
        assert np.argwhere(blue[:, left])[:, 0].min() == 52 + int(rank) * 130
    titled = candidate_tree(pipeline, pairs, prompt_row=1, title="a prompt " * 50)
    assert (
        titled.height == tree.height + 26
        and titled.crop((0, 52, *titled.size)).tobytes() == tree.crop((0, 26, *tree.size)).tobytes()
    )
    with pytest.raises(IndexError, match=r"in \[0, 2\)"):
        candidate_tree(pipeline, pairs, prompt_row=2)
    with pytest.raises(ValueError, match="return_trajectory=True"):
        candidate_tree(pipeline, stepwise_rollout(pipeline, PROMPTS[:1], brightness_reward, **settings))


def test_curves_draw_what_was_logged():
    history = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6, "kl": 0.1}, {"train_runtime": 3.0}]
    figure = plot_curves(history, ["loss", "kl", "never"])
    assert [axes.get_title() for axes in figure.axes] == ["loss", "kl"]
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1, 0.7], [2, 0.6]]
    with pytest.raises(ValueError, match="log history"):
        plot_curves(history, ["never"])


def test_all_curves_share_panels_by_prefix():
    history = [
        {"step": 1, "epoch": 0.1, "loss": 0.7, "rewards/chosen": 0.1, "rewards/rejected": -0.1, "note": "text"},
        {"step": 2, "epoch": 0.2, "loss": 0.6, "rewards/chosen": 0.2, "eval_reward_mean": float("nan")},
        {"step": 2, "train_runtime": 3.0, "train_loss": 0.5, "total_flos": 0.0},
    ]
    figure = plot_curves(history, "all", title="all")
    assert [axes.get_title() for axes in figure.axes] == ["loss", "rewards", "eval_reward_mean"]
    assert [line.get_label() for line in figure.axes[1].lines] == ["chosen", "rejected"]
    assert Image.open(io.BytesIO(figure._repr_png_())).width == 1200  # what a notebook shows
    with pytest.raises(ValueError, match="no metric"):
        plot_curves([{"train_loss": 1.0}])


def test_accuracy_curve_has_a_line_per_model():
    figure = plot_accuracy_by_timestep({"step-aware": {0: 0.9, 501: 0.8}, "plain": {501: 0.7, 0: 0.9}})
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines["plain"] == [[0, 0.9], [501, 0.7]]
    assert lines["chance"][0][1] == 0.5
    evaluation = {"eval_accuracy": 0.7, "eval_accuracy/t_0": 0.2, "eval_accuracy/t_501": 0.6, "eval_loss": 0.7}
    axes = plot_accuracy_by_timestep({"model": evaluation}).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0, 0.2], [501, 0.6]] and axes.get_ylim()[0] < 0.2
    with pytest.raises(ValueError, match="no accuracy by timestep"):
        plot_accuracy_by_timestep({"model": {"loss": 1.0}})


def run_with_images(folder, report_to):
    """Two steps of SPO with images at steps 0, 1 and, as training ends there, 2; returns the trainer."""
    config = tiny_spo_config(
        folder / "run", num_inference_steps=3, max_steps=3, log_images_steps=2, num_eval_images=2, report_to=report_to
    )
    trainer = SPOTrainer(config, tiny_sd_pipeline(folder), brightness_reward, train_dataset=PROMPTS)
    trainer.train()
    return trainer


def test_images_arrive_in_tensorboard_and_in_the_folder(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "events")
    try:
        trainer = run_with_images(tmp_path, "tensorboard")
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    folder = tmp_path / "run" / "images"
    assert sorted(path.name for path in folder.glob("step_*.png")) == [f"step_{i:06d}.png" for i in (0, 2, 3)]
    record = json.loads((folder / "samples.json").read_text())
    assert record == {"step": 3, "prompts": PROMPTS[:2], "images": ["sample_0.png", "sample_1.png"]}
    expected = [to_pil(image) for image in trainer.generate(PROMPTS[:2])]
    for name, picture in zip(record["images"], expected, strict=True):
        assert Image.open(folder / name).tobytes() == picture.tobytes()
    events = EventAccumulator(str(next((tmp_path / "events").rglob("events.*")).parent), size_guidance={"images": 0})
    events.Reload()
    logged = {tag: events.Images(tag) for tag in events.Tags()["images"]}
    assert len(logged) == 2
    for i, images in enumerate(logged[tag] for tag in sorted(logged)):
        assert [image.step for image in images] == [0, 2, 3]
        picture = np.asarray(Image.open(io.BytesIO(images[-1].encoded_image_string)).convert("RGB"), dtype=int)
        assert abs(picture - np.asarray(expected[i], dtype=int)).max() <= 1  # TensorBoard rounds down


def test_images_arrive_in_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run_with_images(tmp_path, "wandb")
    wandb.finish()
    files = sorted(tmp_path.glob("wandb/offline-run-*/files/media/images/samples_*.png"))
    assert len(files) == 3 * 2


def test_images_arrive_in_trackio(tmp_path, monkeypatch):
    if "trackio" not in sys.modules:
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    run_with_images(tmp_path, "trackio")
    assert len(list((tmp_path / "trackio").rglob("media/**/*.png"))) == 3 * 2


def test_trackers_are_imported_only_when_they_are_asked_for(tmp_path):
    known = set(sys.modules)
    trainer = run_with_images(tmp_path, "none")
    assert any(isinstance(callback, ImageLoggingCallback) for callback in trainer.callback_handler.callbacks)
    assert not {"wandb", "trackio"} & (set(sys.modules) - known)
