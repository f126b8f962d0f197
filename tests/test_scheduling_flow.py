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
Necessity: a step that leaves another noise level than the network expects makes grain, and every score of its candidates
is of that grain. Most public flow samplers do so at some step; the numbers here are derived, not copied.
"""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.flow_testing import tiny_sd3_pipeline
from trl_spo import flow_step_stats, wrap_pipeline
from trl_spo.scheduling_flow import (
    LARGEST_ETA,
    SAMPLERS,
    FlowStepRule,
    flow_add_noise,
    flow_step_coefficients,
    noise_excess,
)
from trl_spo.training.memory import peak_activation_bytes


EXACT = ("ddim", "precise", "cps")
STOCHASTIC = tuple(sampler for sampler in SAMPLERS if sampler != "ode")


def sd3_sigmas(steps: int) -> list[float]:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.double().tolist()


def grid(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs t > t' > 0, with t = 1 among them."""
    values = torch.linspace(0.02, 1, count, dtype=torch.float64)
    pairs = [(t.item(), s.item()) for t in values for s in values if s < t]
    current, following = torch.tensor(pairs, dtype=torch.float64).T
    return current, following


def by_hand(velocity, sample, t, following, k):
    """(1 - t') x_0 + k e, with x_0 and e from x_t and v."""
    return (1 - following) * (sample - t * velocity) + k * (sample + (1 - t) * velocity)


class TestAgainstDiffusers:
    @pytest.mark.parametrize("family", ["sd3", "flux"])
    def test_the_ode_is_the_euler_step(self, family):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=family == "flux")
        if family == "flux":
            scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8), mu=1.15)
        else:
            scheduler.set_timesteps(8)
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(2, 4, 6, 6, generator=generator)
        for i, timestep in enumerate(scheduler.timesteps):
            velocity = torch.randn(sample.shape, generator=generator)
            expected = scheduler.step(velocity, timestep, sample).prev_sample
            sigma, following = scheduler.sigmas[i].item(), scheduler.sigmas[i + 1].item()
            for sampler, eta in [("ode", 1.0), *((name, 0.0) for name in STOCHASTIC)]:
                found = flow_step_stats(velocity, sigma, following, sample, eta, sampler)
                assert torch.allclose(found.prev_sample_mean, expected, atol=1e-5), sampler
                assert found.std_dev_t == 0
            sample = expected


class TestFormulas:
    def test_ddim_at_eta_1_is_the_ddpm_posterior(self):
        """q(x_t' | x_t, x_0) of the process x_t = a x_0 + t e with a = 1 - t, by Bayes' rule for Gaussians."""
        t, following = grid()
        scale = (1 - t) / (1 - following)  # x_t = scale x_t' + noise of variance `added`
        added = t**2 - scale**2 * following**2
        precision = 1 / following**2 + scale**2 / added
        std = precision**-0.5
        # The mean is std^2 ((1 - t') x_0 / t'^2 + scale x_t / added); at x_0 = 0, e = 1, x_t = t it is k.
        k = std**2 * scale * t / added
        for sampler in ("ddim", "precise"):  # precise at a = sqrt(2), which is eta 1
            factor, found = flow_step_coefficients(t, following, 1.0, sampler)
            assert torch.allclose(found, std, atol=1e-10) and torch.allclose(factor, k, atol=1e-10), sampler

    @pytest.mark.parametrize("eta", [0.3, 0.7, 1.0, 1.2])
    def test_flow_sde_as_published(self, eta):
        """Euler-Maruyama: x - h (v + g^2 / (2t) (x + (1 - t) v)) with g = a sqrt(t / (1 - t)), std g sqrt(h)."""
        generator = torch.Generator().manual_seed(1)
        sample, velocity = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator)
        t, following = 0.6, 0.45
        g, h = eta * math.sqrt(t / (1 - t)), t - following
        found = flow_step_stats(velocity, t, following, sample, eta, "flow_sde")
        expected = sample - h * (velocity + g**2 / (2 * t) * (sample + (1 - t) * velocity))
        assert torch.allclose(found.prev_sample_mean, expected, atol=1e-12)
        assert found.std_dev_t.item() == pytest.approx(g * math.sqrt(h))
        # At the pole 1 - t comes from the next sigma, and t stays 1.
        first = flow_step_stats(velocity, 1.0, 0.96, sample, eta, "flow_sde").std_dev_t.item()
        assert first == pytest.approx(eta * math.sqrt(1 / 0.04) * math.sqrt(0.04)) == pytest.approx(eta)

    def test_dance_and_cps_as_published(self):
        factor, std = flow_step_coefficients(torch.tensor(0.6), torch.tensor(0.45), 0.3, "dance_sde")
        assert std.item() == pytest.approx(0.3 * math.sqrt(0.15))
        assert factor.item() == pytest.approx(0.45 - 0.3**2 * 0.15 / 1.2)
        factor, std = flow_step_coefficients(torch.tensor(0.6), torch.tensor(0.45), 0.5, "cps")
        assert std.item() == pytest.approx(0.45 * math.sin(math.pi / 4)) == pytest.approx(factor.item())

    def test_precise_integrates_the_sde_with_frozen_x0(self):
        """de = -(g^2 / (2 t)) e dt in the noise coordinate: many small Euler steps of the frozen SDE give its k and s."""
        t, following, eta = 0.8, 0.5, 0.6
        times = torch.linspace(t, following, 20_001, dtype=torch.float64)
        k, variance = t, 0.0
        for current, after in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            # With x_0 frozen, e = (x - (1 - t) x_0) / t and x - mean = k e: the Euler step of flow_sde at a = sqrt(2) eta.
            g2, h = 2 * eta**2 * current / (1 - current), current - after
            shrink = after / current - g2 * h / (2 * current**2)
            k, variance = k * shrink, variance * shrink**2 + g2 * h
        factor, std = flow_step_coefficients(torch.tensor(t), torch.tensor(following), eta, "precise")
        assert factor.item() == pytest.approx(k, rel=1e-3) and std.item() == pytest.approx(variance**0.5, rel=1e-3)

    @pytest.mark.parametrize("sampler", STOCHASTIC)
    def test_mean_and_x0_of_a_batch(self, sampler):
        generator = torch.Generator().manual_seed(2)
        sample, velocity = torch.randn(2, 3, 4, 2, 2, generator=generator)
        t, following = torch.tensor([1.0, 0.7, 0.3]), torch.tensor([0.9, 0.5, 0.0])
        eta = 0.5
        found = flow_step_stats(velocity, t, following, sample, eta, sampler)
        factor, std = flow_step_coefficients(t, following, eta, sampler)
        for row in range(3):
            values = (velocity[row], sample[row], t[row], following[row], factor[row].float())
            assert torch.allclose(found.prev_sample_mean[row], by_hand(*values), atol=1e-5)
            assert torch.allclose(found.pred_original_sample[row], sample[row] - t[row] * velocity[row], atol=1e-6)
        assert torch.allclose(found.std_dev_t.flatten(), std.float())
        assert found.std_dev_t.shape == (3, 1, 1, 1) and found.std_dev_t[2] == 0 and (found.std_dev_t[:2] > 0).all()
        assert found.prev_sample_mean.dtype == torch.float32


class TestNoise:
    @pytest.mark.parametrize("sampler", EXACT)
    @pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
    def test_the_noise_level_is_what_the_next_call_expects(self, sampler, eta):
        t, following = grid()
        factor, std = flow_step_coefficients(t, following, eta, sampler)
        assert torch.allclose((factor**2 + std**2).sqrt(), following, atol=1e-10)
        assert noise_excess(sd3_sigmas(20), eta, sampler) == pytest.approx([1.0] * 19)

    def test_flow_sde_leaves_far_too_much_before_the_end_of_sd3(self):
        """Known values: 12.9 times with 20 steps, 26.9 times with 10, at the last but one step; at most 1.2 before."""
        for steps, factor in ((20, 12.9), (10, 26.9)):
            excess = noise_excess(sd3_sigmas(steps), 0.7, "flow_sde")
            assert len(excess) == steps - 1 and excess[-1] == pytest.approx(factor, abs=0.1)
        assert max(noise_excess(sd3_sigmas(20), 0.7, "flow_sde")[:-1]) < 1.25

    @pytest.mark.parametrize("sampler, eta, converges", [
        ("ddim", 1.0, True), ("ddim", 0.5, True), ("precise", 0.7, True), ("flow_sde", 0.7, True), ("ode", 1.0, True),
        ("cps", 0.5, False), ("cps", 0.8, False),
    ])  # fmt: skip
    def test_marginals_of_a_gaussian(self, sampler, eta, converges):
        """
        x_0 ~ N(1.5, 0.6^2) has an affine velocity, so mean and variance pass exactly through every step. With 2,000 steps
        the final standard deviation is 0.6; CPS shrinks it, and more steps do not help.
        """
        mean, std = 1.5, 0.6
        raw = np.linspace(1, 0, 2001)
        sigmas = (3 * raw / (1 + 2 * raw)).tolist()
        first, second = 0.0, 1.0  # mean and variance of x_1 = e
        for t, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            total = (1 - t) ** 2 * std**2 + t**2
            slope = ((1 - t) * -(std**2) + t) / total  # E[e - x_0 | x_t] = slope (x_t - (1 - t) mean) - mean
            ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
            velocity = slope * (ends - (1 - t) * mean) - mean
            step = flow_step_stats(velocity, t, following, ends, eta, sampler)
            offset, at_one = step.prev_sample_mean.flatten().tolist()
            first, second = (
                offset + (at_one - offset) * first,
                (at_one - offset) ** 2 * second + step.std_dev_t.item() ** 2,
            )
        assert first == pytest.approx(mean, abs=2e-3)
        ratio = math.sqrt(second) / std
        assert ratio == pytest.approx(1, abs=0.005) if converges else ratio < 0.95

    def test_forward_noise(self):
        sample, noise = torch.ones(2, 1, 2), torch.full((2, 1, 2), 3.0)
        assert flow_add_noise(sample, noise, torch.tensor([0.0, 0.25]))[:, 0, 0].tolist() == [1.0, 1.5]


class TestRule:
    def rule(self, sampler="ddim", shift=3.0):
        return FlowStepRule(FlowMatchEulerDiscreteScheduler(shift=shift), sampler)

    def test_timesteps_are_integers_with_exact_sigmas_behind_them(self):
        rule = self.rule()
        timesteps = rule.set_timesteps(20)
        assert timesteps == [round(1000 * sigma) for sigma in sd3_sigmas(20)[:-1]]
        assert rule.sigma(timesteps[3]).item() == pytest.approx(sd3_sigmas(20)[3])
        assert rule.sigma(torch.tensor([timesteps[3], 500])).tolist() == pytest.approx([sd3_sigmas(20)[3], 0.5])

    def test_steps_close_to_the_image_never_branch_and_get_no_noise(self):
        rule = self.rule()
        timesteps = rule.set_timesteps(20)
        assert [rule.is_stochastic(step, 1.0) for step in range(20)] == [True] * 18 + [False] * 2
        sample, velocity = torch.randn(2, 1, 4, 2, 2)
        for step in (18, 19):
            found = rule.distribution(velocity, timesteps[step], sample, 1.0)
            t, following = sd3_sigmas(20)[step : step + 2]
            assert found.std_dev_t == 0
            assert torch.allclose(found.prev_sample_mean, sample + (following - t) * velocity, atol=1e-5)

    def test_rows_of_different_timesteps(self):
        rule = self.rule()
        timesteps = torch.tensor(rule.set_timesteps(20))[[2, 18, 10]]
        sample, velocity = torch.randn(2, 3, 4, 2, 2)
        together = rule.distribution(velocity, timesteps, sample, 0.8)
        for row in range(3):
            alone = rule.distribution(velocity[row : row + 1], timesteps[row].item(), sample[row : row + 1], 0.8)
            assert torch.allclose(together.prev_sample_mean[row], alone.prev_sample_mean[0], atol=1e-6)
            assert together.std_dev_t[row].item() == pytest.approx(alone.std_dev_t.item())

    def test_noise_and_x0_at_any_timestep(self):
        rule = self.rule()
        sample, noise = torch.randn(2, 3, 4, 2, 2)
        timesteps = torch.tensor([0, 123, 999])
        noisy = rule.add_noise(sample, noise, timesteps)
        found = rule.predict_original_sample(noise - sample, timesteps, noisy)
        assert torch.allclose(found, sample, atol=1e-5)

    def test_too_many_steps_for_integers(self):
        with pytest.raises(ValueError, match="100 steps of this schedule are so close"):
            self.rule(shift=12.0).set_timesteps(100)

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_range_of_eta(self, sampler):
        rule = self.rule(sampler)
        rule.set_timesteps(20)
        rule.check_eta(0.0)
        rule.check_eta(min(LARGEST_ETA[sampler], 9.0))
        for eta in (-0.1, LARGEST_ETA[sampler] + 0.1):
            if math.isfinite(eta):
                with pytest.raises(ValueError, match=f"`eta` must be in .* for the sampler '{sampler}', got"):
                    rule.check_eta(eta)
        assert rule.is_stochastic(3, 1.0) == (sampler != "ode") and not rule.is_stochastic(3, 0.0)

    def test_too_much_noise_is_said_once_with_step_and_factor(self, monkeypatch):
        said = []
        monkeypatch.setattr("trl_spo.scheduling_flow.logger.warning", said.append)
        rule = self.rule("flow_sde")
        rule.set_timesteps(20)
        rule.check_eta(0.7)
        rule.check_eta(0.7)
        assert len(said) == 1 and "leaves 12.8 times the noise" in said[0] and "after step 18" in said[0]
        for sampler in EXACT:
            exact = self.rule(sampler)
            exact.set_timesteps(20)
            exact.check_eta(1.0)
        assert len(said) == 1

    def test_bad_input(self):
        sample = torch.zeros(2, 4)
        with pytest.raises(ValueError, match="must be one of .*'ddim'.* got 'euler'"):
            flow_step_stats(sample, 0.5, 0.4, sample, sampler="euler")
        with pytest.raises(ValueError, match=r"`eta` must be in \[0, 1\] for the sampler 'ddim', got 1.5"):
            flow_step_stats(sample, 0.5, 0.4, sample, eta=1.5)
        with pytest.raises(ValueError, match="from `sigma` down to `next_sigma`"):
            flow_step_stats(sample, 0.4, 0.5, sample)
        with pytest.raises(ValueError, match=r"`sigma` must lie in \[0, 1\]"):
            flow_step_stats(sample, 700.0, 0.5, sample)
        with pytest.raises(ValueError, match=r"`sigma` must be a number or have shape \(2,\), got \(3,\)"):
            flow_step_stats(sample, torch.full((3,), 0.5), 0.4, sample)
        with pytest.raises(ValueError, match="no step at timestep 501"):
            rule = self.rule()
            rule.set_timesteps(5)
            rule.distribution(sample, 501, sample, 1.0)


def test_an_estimate_of_memory_leaves_no_table_behind(tmp_path):
    """Regression: the table of sigmas was made of tensors without values, and the run after the estimate read it."""
    pipeline = wrap_pipeline(tiny_sd3_pipeline(tmp_path))
    pipeline.set_timesteps(4)
    timesteps = torch.tensor([900, 500])
    peak_activation_bytes(lambda: pipeline.step_rule.sigma(timesteps))
    torch.testing.assert_close(pipeline.step_rule.sigma(timesteps), torch.tensor([0.9, 0.5]))
