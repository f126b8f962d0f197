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
Why this file exists: `benchmarks/clean_images.py` decides what a reward is taught at t = 0. Its two arms must differ in that
alone, and its table must be the mean of what was counted.
"""

from pathlib import Path

import pytest
import torch

from benchmarks import clean_images
from benchmarks.compare.methods import reward_config
from examples.shapes.base_scores import load_pipeline
from examples.shapes.settings import CLIP, REWARD_SETTINGS
from trl_spo import StepAwareRewardModel, wrap_pipeline
from trl_spo.preference_collator import StepPreferenceCollator


def shown(arm: str, pipeline, batch: dict, timesteps: torch.Tensor, folder: Path) -> torch.Tensor:
    """The images `(2B, 3, 32, 32)` that the reward of an arm sees of a batch, first images first."""
    config = reward_config(REWARD_SETTINGS, 1, 0, folder)
    config.cache_latents = False
    pairs = clean_images.rendered_preferences(4, "train", 0)
    model = StepAwareRewardModel.from_clip(CLIP, processor=CLIP)
    trainer = clean_images.ARMS[arm](config, pipeline, model, train_dataset=pairs)
    seen = []
    forward = model.forward
    model.forward = lambda images, **more: seen.append(images) or forward(images, **more)
    trainer._score_pairs(model, batch, timesteps, torch.Generator().manual_seed(3))
    return seen[0]


def test_the_arms_differ_at_timestep_zero_alone(tmp_path):
    pipeline = wrap_pipeline(load_pipeline())
    batch = StepPreferenceCollator(32)(list(clean_images.rendered_preferences(4, "validation", 1)))
    before = batch["images_0"].clone()
    timesteps = torch.tensor([0, 101, 0, 501])
    raw, decoded = (shown(arm, pipeline, batch, timesteps, tmp_path) for arm in ("as they are", "round trip"))
    noised = (timesteps > 0).repeat(2)
    assert torch.equal(raw[noised], decoded[noised])
    assert torch.equal(raw[~noised], torch.cat([batch["images_0"][[0, 2]], batch["images_1"][[0, 2]]]))
    distance = (raw - decoded)[~noised].abs().mean((1, 2, 3))
    assert (distance > 1e-3).all() and (distance < 0.2).all()  # another image, but of the same scene
    assert decoded.abs().max() <= 1 and torch.equal(batch["images_0"], before)


def test_the_table_is_the_mean_of_what_was_counted():
    """Two seeds and four pairs: 4 of 8 against 6 of 8, +0.25; of the differences, a row of two seeds each has mean 0.25."""
    arms = {"as they are": [[True, False, True, False]] * 2, "round trip": [[True, True, True, False]] * 2}
    rows = clean_images.summary({"rendered": {"raw, utility": arms}})
    row = rows["rendered"]["raw, utility"]
    assert (row["as they are"], row["round trip"], row["difference"]) == (0.5, 0.75, 0.25)
    # Both seeds agree, so the error is that of a mean of four pairs: the root of ((3 x 0.25^2 + 0.75^2) / 3) / 4 = 0.25.
    assert row["se"] == pytest.approx(0.25)
    assert clean_images.table(rows).endswith("| rendered pairs | raw, utility | 0.500 | 0.750 | +0.250 ± 0.250 |")
