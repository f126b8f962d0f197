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
from torch.overrides import TorchFunctionMode

from trl_spo import ddim_step_stats
from trl_spo.scheduling_ddim import DDIMStepRule, ddim_predict


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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_dynamic_thresholding_agrees_with_diffusers(prediction_type):
    """Imagen's thresholding divides by a quantile instead of clipping at 1, and wins over `clip_sample`."""
    scheduler = make_scheduler(
        thresholding=True, clip_sample=True, sample_max_value=2.0, prediction_type=prediction_type
    )
    sample, output, noise = torch.randn((3, 2, 3, 8, 8), generator=torch.Generator().manual_seed(3)) * 2
    expected = scheduler.step(output, 500, sample, eta=1.0, variance_noise=noise)
    stats = ddim_step_stats(scheduler, output, 500, sample, 1.0)
    clipped = ddim_step_stats(make_scheduler(prediction_type=prediction_type), output, 500, sample, 1.0)
    assert not torch.allclose(stats.pred_original_sample, clipped.pred_original_sample)
    torch.testing.assert_close(stats.pred_original_sample, expected.pred_original_sample)
    torch.testing.assert_close(stats.prev_sample_mean + stats.std_dev_t * noise, expected.prev_sample)


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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("half", ["sample", "output", "both"])
def test_half_precision_input_is_computed_in_float32(half, prediction_type):
    scheduler = make_scheduler(steps_offset=1, clip_sample=False, prediction_type=prediction_type)
    sample, output = torch.randn((2, 1, 4, 2, 2), generator=torch.Generator().manual_seed(4))
    sample = sample if half == "output" else sample.half()
    output = output if half == "sample" else output.half()
    stats = ddim_step_stats(scheduler, output, 901, sample, 1.0)
    exact = ddim_step_stats(scheduler, output.double(), 901, sample.double(), 1.0)
    assert stats.prev_sample_mean.dtype == stats.pred_original_sample.dtype == torch.float32
    torch.testing.assert_close(stats.prev_sample_mean.double(), exact.prev_sample_mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.pred_original_sample.double(), exact.pred_original_sample, atol=1e-5, rtol=1e-5)


def test_a_timestep_is_a_number_whatever_its_type():
    """Some schedulers count in floating point, data sets in int32; one timestep may stand for the whole batch."""
    scheduler = make_scheduler(steps_offset=1)
    sample, output = torch.randn((2, 3, 4, 2, 2), generator=torch.Generator().manual_seed(5))
    expected = ddim_step_stats(scheduler, output, 501, sample, 1.0)
    for timestep in (torch.tensor(501.0), torch.tensor(501, dtype=torch.int32), torch.tensor([501]), [501, 501, 501]):
        stats = ddim_step_stats(scheduler, output, timestep, sample, 1.0)
        assert torch.equal(stats.prev_sample_mean, expected.prev_sample_mean)
        assert stats.std_dev_t.flatten()[0] == expected.std_dev_t


class Copies(TorchFunctionMode):
    """Notes the target and `non_blocking` of every copy between devices."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.to:
            targets = [value.type for value in args[1:] if isinstance(value, torch.device)]
            self.found |= {(target, kwargs.get("non_blocking", False)) for target in targets}
        return function(*args, **kwargs)


@pytest.mark.parametrize("device, expected", [("cpu", {("cpu", False)}), ("meta", {("meta", True)})])
def test_only_copies_to_the_host_are_waited_for(device, expected):
    """A copy to an accelerator need not stop the program; one to the host that is not waited for is read too early."""
    scheduler = make_scheduler(steps_offset=1)
    sample, timestep = torch.zeros(2, 4, 2, 2, device=device), torch.tensor([501, 1], device=device)
    with Copies() as copies:
        ddim_step_stats(scheduler, sample, timestep, sample, 1.0)
    assert copies.found == expected


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_schedule_follows_the_timesteps_and_the_samples(device):
    """The meta device stands for an accelerator; a table left on the CPU would fail there or give CPU results."""
    scheduler = make_scheduler(steps_offset=1)
    sample = torch.zeros(2, 4, 2, 2, device="meta")
    for timestep in (torch.tensor([501, 1], device=device), torch.tensor([501], device=device)):
        stats = ddim_step_stats(scheduler, sample, timestep, sample, 1.0)
        assert [value.device.type for value in stats] == ["meta"] * 3
    assert scheduler.alphas_cumprod.device.type == "cpu"


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
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(2, 1\)"):
        ddim_step_stats(make_scheduler(), zeros, torch.tensor([[1], [2]]), zeros, 1.0)
    three = torch.zeros(3, 4, 2, 2)
    with pytest.raises(ValueError, match=r"shape \(3,\), got \(2,\)"):
        ddim_step_stats(make_scheduler(), three, torch.tensor([1, 2]), three, 1.0)
    scheduler = make_scheduler()
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="got 'flow'"):
        ddim_step_stats(scheduler, zeros, 1, zeros, 1.0)


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr_is_finite_at_every_number_of_steps(prediction_type):
    """
    By hand: at t = 999 no signal is left, so x_{t-1} at eta 1 is sqrt(a_prev) x_0 plus noise of variance 1 - a_prev, and
    nothing of x_t. Regression: rounding put a number below zero under a root for 39 of the first 100 numbers of steps.
    """
    scheduler = make_scheduler(prediction_type=prediction_type, **ZERO_SNR)
    output = torch.full((1, 1, 1, 1), -2.0 if prediction_type == "v_prediction" else 2.0)
    for steps in range(2, 101):
        scheduler.set_timesteps(steps)
        first, second = scheduler.timesteps[:2]
        assert first == 999
        mean, std, original = ddim_step_stats(scheduler, output, first, torch.ones_like(output), 1.0)
        a_prev = scheduler.alphas_cumprod[999 - 1000 // steps]
        assert original.item() == 2.0
        torch.testing.assert_close(std, (1 - a_prev) ** 0.5)
        assert mean.item() == pytest.approx(2 * a_prev.item() ** 0.5, abs=1e-3)
        rest = ddim_step_stats(scheduler, output, second, torch.ones_like(output), 1.0)
        assert rest.prev_sample_mean.isfinite() and rest.std_dev_t.isfinite()


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("eta", [0.0, 0.999, 1.0])
def test_no_schedule_has_a_step_that_is_not_finite(schedule, eta):
    """A cosine schedule ends within rounding of no signal without being told to."""
    for spacing in ("leading", "trailing", "linspace"):
        scheduler = DDIMScheduler(beta_schedule=schedule, timestep_spacing=spacing, prediction_type="v_prediction")
        for steps in range(1, 101):
            scheduler.set_timesteps(steps)
            sample = torch.ones(len(scheduler.timesteps), 1, 1, 1)
            stats = ddim_step_stats(scheduler, sample, scheduler.timesteps, sample, eta)
            assert all(value.isfinite().all() for value in stats), (spacing, steps)


def test_predicted_noise_without_signal_is_refused_where_it_is_asked_for():
    rule = DDIMStepRule(make_scheduler(prediction_type="epsilon", **ZERO_SNR))
    with pytest.raises(ValueError, match="timestep 999 .* set `prediction_type='v_prediction'`"):
        rule.set_timesteps(STEPS)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        rule.check_predictable([0, 999])
    rule.check_predictable([0, 998])
    leading = DDIMStepRule(make_scheduler(prediction_type="epsilon", **{**ZERO_SNR, "timestep_spacing": "leading"}))
    assert leading.set_timesteps(STEPS)[0] == 900  # never asks about t = 999
    DDIMStepRule(make_scheduler(prediction_type="v_prediction", **ZERO_SNR)).set_timesteps(STEPS)


def test_the_code_of_a_card_samples_finite_images_without_terminal_snr():
    rule = DDIMStepRule(make_scheduler(prediction_type="v_prediction", **ZERO_SNR))
    assert rule.sampling_code(1.0).arguments == ["eta=0.999"]
    assert rule.sampling_code(0.5).arguments == ["eta=0.5"]
    for eta, finite in ((1.0, False), (0.999, True)):  # the first is why
        results = []
        for steps in range(2, 101):
            rule.scheduler.set_timesteps(steps)
            sample = torch.ones(1, 1, 1, 1)
            results.append(rule.scheduler.step(sample, 999, sample, eta=eta, variance_noise=sample).prev_sample)
        assert torch.cat(results).isfinite().all() == finite


def test_scheduler_is_only_read():
    scheduler = make_scheduler(steps_offset=1)
    before = (scheduler.timesteps.clone(), scheduler.alphas_cumprod.clone(), dict(scheduler.config))
    zeros = torch.zeros(1, 4, 2, 2)
    ddim_step_stats(scheduler, zeros, 901, zeros, 1.0)
    assert torch.equal(before[0], scheduler.timesteps)
    assert torch.equal(before[1], scheduler.alphas_cumprod)
    assert before[2] == dict(scheduler.config)


class TestStepRule:
    """The rule of a pipeline says the same as the functions, and knows what its sampler can do."""

    def test_answers_are_those_of_the_functions(self):
        users = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
        rule = DDIMStepRule(users)
        assert rule.set_timesteps(STEPS) == rule.scheduler.timesteps.tolist() == list(range(900, -1, -100))
        assert users.num_inference_steps is None and rule.num_train_timesteps == 1000
        sample, output = torch.randn((2, 2, 4, 8), generator=torch.Generator().manual_seed(5))
        timesteps = torch.tensor([900, 300])
        for ours, expected in zip(
            rule.distribution(output, timesteps, sample, 0.5),
            ddim_step_stats(rule.scheduler, output, timesteps, sample, 0.5),
            strict=True,
        ):
            assert torch.equal(ours, expected)
        noisy = rule.add_noise(sample, output, timesteps)
        torch.testing.assert_close(
            rule.predict_original_sample(output, timesteps, noisy), sample, atol=1e-4, rtol=1e-4
        )

    def test_the_last_step_may_branch_only_if_it_has_noise(self):
        rule = DDIMStepRule(make_scheduler(steps_offset=1, set_alpha_to_one=True))
        rule.set_timesteps(STEPS)
        assert [rule.is_stochastic(step, 1.0) for step in range(STEPS)] == [True] * (STEPS - 1) + [False]
        assert not any(rule.is_stochastic(step, 0.0) for step in range(STEPS))
        rule.set_timesteps(2)  # the answers of another schedule are other answers
        assert [rule.is_stochastic(step, 1.0) for step in range(2)] == [True, False]

    def test_the_range_of_eta(self):
        rule = DDIMStepRule(make_scheduler())
        for eta in (0.0, 0.5, 1.0):
            rule.check_eta(eta)
        for eta in (-0.1, 1.1, float("nan")):
            with pytest.raises(ValueError, match="`eta` of DDIM must lie in"):
                rule.check_eta(eta)
