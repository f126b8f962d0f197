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

"""Necessity: a number without the right error bar, or an image that depends on its batch, is how results fail to repeat."""

import math

import pytest
import torch

from trl_spo import StepAwareRewardModel, wrap_pipeline
from trl_spo.evaluation import compare, comparison_table, generate_images, mean_and_se, score_images, win_rate

from .testing_utils import PROMPTS, brightness_reward, tiny_clip, tiny_sd_pipeline


@pytest.fixture
def pipeline(tmp_path):
    return wrap_pipeline(tiny_sd_pipeline(tmp_path))


def test_images_depend_on_prompt_and_seed_alone(pipeline):
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0}
    whole = generate_images(pipeline, PROMPTS[:5], batch_size=5, **settings)
    assert whole.min() >= 0 and whole.max() <= 1
    torch.testing.assert_close(
        whole, generate_images(pipeline, PROMPTS[:5], batch_size=2, **settings), atol=1e-5, rtol=0
    )
    order = [3, 0, 4]
    some = generate_images(pipeline, [PROMPTS[i] for i in order], seeds=order, **settings)
    torch.testing.assert_close(whole[order], some, atol=1e-5, rtol=0)
    other = generate_images(pipeline, PROMPTS[:1], seeds=[99], **settings)
    assert (other - whole[:1]).abs().max() > 1e-3


def test_seeds_must_match_prompts(pipeline):
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        generate_images(pipeline, PROMPTS[:2], seeds=[1])


def test_models_and_callables_are_scored_alike(tmp_path):
    folder = tiny_clip(tmp_path)
    model = StepAwareRewardModel.from_clip(folder, processor=folder)
    images = torch.rand(5, 3, 16, 16)
    expected = model.score(images * 2 - 1, PROMPTS[:5], torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(score_images(images, PROMPTS[:5], model, batch_size=2), expected, atol=1e-5, rtol=1e-5)
    as_callable = score_images(images, PROMPTS[:5], brightness_reward, batch_size=2)
    torch.testing.assert_close(as_callable, brightness_reward(images, PROMPTS[:5], torch.zeros(5)))


def test_mean_and_standard_error_by_hand():
    """1, 2, 3, 4: mean 2.5, sample deviation sqrt(5 / 3), standard error half of it."""
    result = mean_and_se(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert result["mean"] == 2.5
    assert result["se"] == pytest.approx(math.sqrt(5 / 3) / 2)
    assert math.isnan(mean_and_se(torch.tensor([1.0]))["se"])


def test_paired_difference_and_win_rate_by_hand():
    """Differences 1, 1, 0, 1: mean 0.75, deviation 0.5, error 0.25; three wins and a draw are 3.5 / 4."""
    before, after = {"score": torch.tensor([0.0, 5.0, 2.0, 9.0])}, {"score": torch.tensor([1.0, 6.0, 2.0, 10.0])}
    result = compare(before, after)
    assert result["delta"]["score"] == {"mean": 0.75, "se": pytest.approx(0.25)}
    assert result["win_rate"]["score"]["mean"] == 0.875
    assert win_rate(before["score"], after["score"])["mean"] == pytest.approx(0.125)
    assert "| score | 4.000 ± 1.958 | 4.750 ± 2.056 | +0.750 ± 0.250 | 0.875 ± 0.125 |" in comparison_table(result)
