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

import numpy as np
import pytest
import torch
from PIL import ImageColor

from trl_spo import stepwise_rollout, wrap_pipeline
from trl_spo.visualization import (
    LOSE,
    NEXT,
    WIN,
    before_after_sheet,
    candidate_tree,
    plot_accuracy_by_timestep,
    plot_curves,
    to_pil,
)

from .testing_utils import PROMPTS, brightness_reward, tiny_sd_pipeline


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
    assert has(sheet, WIN).any() and has(sheet, LOSE).any()
    assert not has(before_after_sheet(red, blue, PROMPTS[:2]), WIN).any()


def test_tree_frames_winner_loser_and_continuation(tmp_path):
    pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path))
    settings = {"num_inference_steps": 4, "branch_start_step": 1, "guidance_scale": 1.0}
    pairs = stepwise_rollout(
        pipeline, PROMPTS[:2], brightness_reward, return_trajectory=True, preference_threshold=0.0, **settings
    )
    tree = candidate_tree(pipeline, pairs, prompt_row=1)
    assert tree.width == 12 + 3 * (96 + 14 + 12)
    green, red, blue = (has(tree, color)[: tree.height - 30] for color in (WIN, LOSE, NEXT))
    for column in range(3):  # winner in the first row, loser in the last, as rows are sorted by score
        left = slice(column * 122, column * 122 + 122)
        assert np.argwhere(green[:, left])[:, 0].max() < np.argwhere(red[:, left])[:, 0].min()
        rank = (
            pairs.branches[column].scores[:, 1]
            > pairs.branches[column].scores[pairs.branches[column].next_index[1], 1]
        ).sum()
        assert np.argwhere(blue[:, left])[:, 0].min() == 52 + int(rank) * 130
    with pytest.raises(ValueError, match="return_trajectory=True"):
        candidate_tree(pipeline, stepwise_rollout(pipeline, PROMPTS[:1], brightness_reward, **settings))


def test_curves_draw_what_was_logged():
    history = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6, "kl": 0.1}, {"train_runtime": 3.0}]
    figure = plot_curves(history, ["loss", "kl", "never"])
    assert [axes.get_title() for axes in figure.axes] == ["loss", "kl"]
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1, 0.7], [2, 0.6]]
    with pytest.raises(ValueError, match="log history"):
        plot_curves(history, ["never"])


def test_accuracy_curve_has_a_line_per_model():
    figure = plot_accuracy_by_timestep({"step-aware": {0: 0.9, 501: 0.8}, "plain": {501: 0.7, 0: 0.9}})
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines["plain"] == [[0, 0.9], [501, 0.7]]
    assert lines["chance"][0][1] == 0.5
