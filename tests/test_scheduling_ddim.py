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
Necessity: every log-probability of SPO rests on the mean and standard deviation of a DDIM step. The public code's own
step is wrong at the last timestep for two common scheduler settings, and nothing noticed. So: agreement with diffusers
on every timestep of every setting.
"""

import pytest
import torch
from diffusers import DDIMScheduler

from trl_spo import ddim_step_stats
from trl_spo.scheduling_ddim import ddim_predict


STEPS = 10


def make_scheduler(**config) -> DDIMScheduler:
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **config)
    scheduler.set_timesteps(STEPS)
    return scheduler


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("steps_offset", [0, 1])
def test_agrees_with_diffusers_on_every_timestep(
    steps_offset, set_alpha_to_one, clip_sample, prediction_type, spacing
):
    scheduler = make_scheduler(
        steps_offset=steps_offset,
        set_alpha_to_one=set_alpha_to_one,
        clip_sample=clip_sample,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
    )
    generator = torch.Generator().manual_seed(0)
    assert len(scheduler.timesteps) == STEPS
    for timestep in scheduler.timesteps.tolist():
        sample, output, noise = torch.randn((3, 2, 4, 4, 4), generator=generator)
        expected = scheduler.step(output, timestep, sample, eta=1.0, variance_noise=noise)
        stats = ddim_step_stats(scheduler, output, timestep, sample, 1.0)
        torch.testing.assert_close(stats.prev_sample_mean + stats.std_dev_t * noise, expected.prev_sample)
        torch.testing.assert_close(stats.pred_original_sample, expected.pred_original_sample)


def test_timestep_per_sample_equals_one_by_one():
    scheduler = make_scheduler(steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    timesteps = scheduler.timesteps[torch.tensor([0, 4, 9])]
    sample, output = torch.randn((2, 3, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    together = ddim_step_stats(scheduler, output, timesteps, sample, 0.7)
    assert together.std_dev_t.shape == (3, 1, 1, 1)
    for i, timestep in enumerate(timesteps):  # 0-d tensors
        alone = ddim_step_stats(scheduler, output[i : i + 1], timestep, sample[i : i + 1], 0.7)
        assert alone.std_dev_t.ndim == 0
        assert torch.equal(together.prev_sample_mean[i], alone.prev_sample_mean[0])
        assert together.std_dev_t[i].item() == alone.std_dev_t.item()


def test_sigma_by_hand():
    """sigma^2 = (1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev), at t = 501 with 10 steps: prev = 401."""
    scheduler = make_scheduler(steps_offset=1, set_alpha_to_one=False)
    a_t, a_prev = scheduler.alphas_cumprod[501].item(), scheduler.alphas_cumprod[401].item()
    expected = ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)) ** 0.5
    zeros = torch.zeros(1, 4, 2, 2)
    assert ddim_step_stats(scheduler, zeros, 501, zeros, 1.0).std_dev_t.item() == pytest.approx(expected, rel=1e-6)
    assert ddim_step_stats(scheduler, zeros, 501, zeros, 0.5).std_dev_t.item() == pytest.approx(expected / 2, rel=1e-6)


@pytest.mark.parametrize("config", [{"set_alpha_to_one": True, "steps_offset": 1}, {"steps_offset": 0}])
def test_last_step_is_deterministic_not_nan(config):
    """Regression: with these settings the public step gives NaN log-probabilities or is off by 0.09."""
    scheduler = make_scheduler(**{"set_alpha_to_one": False, **config})
    sample = torch.randn(1, 4, 2, 2)
    stats = ddim_step_stats(scheduler, sample, scheduler.timesteps[-1], sample, 1.0)
    assert stats.std_dev_t.item() == 0
    assert torch.isfinite(stats.prev_sample_mean).all()


def test_half_precision_input_is_computed_in_float32():
    scheduler = make_scheduler(steps_offset=1)
    sample = torch.randn(1, 4, 2, 2).half()
    stats = ddim_step_stats(scheduler, sample, 901, sample, 1.0)
    exact = ddim_step_stats(scheduler, sample.double(), 901, sample.double(), 1.0)
    assert stats.prev_sample_mean.dtype == torch.float32
    torch.testing.assert_close(stats.prev_sample_mean.double(), exact.prev_sample_mean, atol=1e-5, rtol=1e-5)


def test_prediction_at_any_training_timestep():
    """The reward model is trained at timesteps outside the schedule: x_t made from x_0 and noise must give x_0 back."""
    scheduler = make_scheduler(clip_sample=False)
    clean, noise = torch.randn((2, 3, 4, 2, 2), generator=torch.Generator().manual_seed(2))
    timesteps = torch.tensor([3, 507, 998])
    noisy = scheduler.add_noise(clean, noise, timesteps)
    torch.testing.assert_close(ddim_predict(scheduler, noise, timesteps, noisy)[0], clean, atol=2e-4, rtol=1e-4)


def test_errors_name_the_problem():
    zeros = torch.zeros(2, 4, 2, 2)
    with pytest.raises(ValueError, match="set_timesteps"):
        ddim_step_stats(DDIMScheduler(), zeros, 1, zeros, 1.0)
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
        ddim_step_stats(make_scheduler(), zeros, torch.tensor([1, 2, 3]), zeros, 1.0)
    scheduler = make_scheduler()
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="got 'flow'"):
        ddim_step_stats(scheduler, zeros, 1, zeros, 1.0)


def test_scheduler_is_only_read():
    scheduler = make_scheduler(steps_offset=1)
    before = (scheduler.timesteps.clone(), scheduler.alphas_cumprod.clone(), dict(scheduler.config))
    zeros = torch.zeros(1, 4, 2, 2)
    ddim_step_stats(scheduler, zeros, 901, zeros, 1.0)
    assert torch.equal(before[0], scheduler.timesteps)
    assert torch.equal(before[1], scheduler.alphas_cumprod)
    assert before[2] == dict(scheduler.config)
