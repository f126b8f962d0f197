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

"""Necessity: beta, the ratios and the KL all inherit the scale of these three functions; it is checked by hand."""

import math

import pytest
import torch

from trl_spo import ddim_step_stats, gaussian_log_prob
from trl_spo.step_distribution import gaussian_kl, sample_candidates

from .testing_utils import ddim_scheduler


def test_log_prob_by_hand():
    """
    One sample of two dimensions, mean 0, std 2: x = 1 gives -1/8 and x = 3 gives -9/8, each minus
    ln 2 + ln(2 pi) / 2 = 1.6120857. The mean over dimensions is -(1/8 + 9/8) / 2 - 1.6120857 = -2.2370857.
    """
    log_prob = gaussian_log_prob(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), torch.tensor(2.0))
    assert log_prob.shape == (1,)
    assert log_prob.item() == pytest.approx(-2.2370857, abs=1e-6)


def test_log_prob_equals_torch_distributions_for_every_sample():
    generator = torch.Generator().manual_seed(0)
    value, mean = torch.randn((2, 5, 4, 3, 3), generator=generator)
    std = torch.rand((5, 1, 1, 1), generator=generator) + 0.1
    expected = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(value).mean(dim=(1, 2, 3))
    torch.testing.assert_close(gaussian_log_prob(value, mean, std), expected)


def test_gradient_flows_into_the_mean_only():
    """d/dmean of the averaged log-prob is (x - mean) / (std^2 D): (1 - 0) / (4 * 2) = 0.125."""
    value = torch.ones(1, 2, requires_grad=True)
    mean = torch.zeros(1, 2, requires_grad=True)
    gaussian_log_prob(value, mean, torch.tensor(2.0)).sum().backward()
    torch.testing.assert_close(mean.grad, torch.full((1, 2), 0.125))
    assert value.grad is None


@pytest.mark.parametrize("std", [torch.tensor(0.0), torch.tensor([[1.0], [0.0]])])
def test_no_density_without_noise(std):
    with pytest.raises(ValueError, match="sigma = 0 has no density"):
        gaussian_log_prob(torch.zeros(2, 3), torch.zeros(2, 3), std)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("std", [2.0, 1e-3])
def test_half_precision_is_scored_in_float32(std, dtype):
    """The square of sigma = 1e-3 has two significant bits left in float16."""
    noise, mean = torch.randn((2, 3, 4, 2, 2), generator=torch.Generator().manual_seed(2))
    mean, std = (mean * std).to(dtype), torch.tensor(std).to(dtype)
    value = (mean + std * noise).to(dtype)
    exact = torch.distributions.Normal(mean.double(), std.double()).log_prob(value.double()).mean((1, 2, 3))
    log_prob = gaussian_log_prob(value, mean, std)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, exact.float(), rtol=1e-5, atol=1e-5)


def test_the_mean_decides_between_float32_and_float64():
    """Latents or sigmas in double precision do not turn the loss of a float32 policy into doubles."""
    mean, std = torch.zeros(1, 2), torch.full((1, 1), 2.0)
    value = torch.tensor([[1.0, 3.0]])
    assert gaussian_log_prob(value.double(), mean, std).dtype == torch.float32
    assert gaussian_log_prob(value, mean, std.double()).dtype == torch.float32
    assert gaussian_log_prob(value, mean.double(), std).dtype == torch.float64


def test_a_number_as_std_goes_where_the_mean_is():
    value, mean = torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2)
    with torch.device("meta"):  # a default device elsewhere changes nothing
        assert gaussian_log_prob(value, mean, 2.0).item() == pytest.approx(-2.2370857, abs=1e-6)


def test_kl_by_hand_and_by_torch():
    """Means 2 apart, std 2: 4 / (2 * 4) = 0.5 per dimension."""
    assert gaussian_kl(torch.full((1, 3), 2.0), torch.zeros(1, 3), torch.tensor(2.0)).item() == pytest.approx(0.5)
    mean, ref_mean = torch.randn((2, 4, 3, 2, 2), generator=torch.Generator().manual_seed(1))
    std = torch.tensor(0.3)
    normals = [torch.distributions.Normal(m, std.expand_as(m)) for m in (mean, ref_mean)]
    expected = torch.distributions.kl_divergence(*normals).mean((1, 2, 3))
    torch.testing.assert_close(gaussian_kl(mean, ref_mean, std), expected)


def test_candidates_have_the_mean_and_deviation_and_repeat():
    mean, std = torch.tensor([[3.0], [-1.0]]), torch.tensor([[0.5], [2.0]])
    draw = sample_candidates(mean, std, 20_000, torch.Generator().manual_seed(0))
    assert draw.shape == (20_000, 2, 1)
    for row in range(2):  # five standard errors of mean and deviation
        bound = 5 * std[row].item() / math.sqrt(20_000)
        assert draw[:, row].mean().item() == pytest.approx(mean[row].item(), abs=bound)
        assert draw[:, row].std().item() == pytest.approx(std[row].item(), abs=bound)
    assert torch.equal(draw, sample_candidates(mean, std, 20_000, torch.Generator().manual_seed(0)))
    assert not torch.equal(draw[:4], sample_candidates(mean, std, 4, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_candidate_is_the_sample_of_diffusers_with_the_same_generator(dtype):
    scheduler = ddim_scheduler()
    scheduler.set_timesteps(10)
    sample, output = torch.randn((2, 2, 4, 3, 3), generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = scheduler.step(output, 501, sample, eta=1.0, generator=torch.Generator().manual_seed(4)).prev_sample
    stats = ddim_step_stats(scheduler, output, 501, sample, 1.0)
    draw = sample_candidates(stats.prev_sample_mean, stats.std_dev_t, 1, torch.Generator().manual_seed(4))
    torch.testing.assert_close(draw[0], expected)


def test_candidates_are_drawn_where_the_mean_is():
    """The meta device stands for an accelerator."""
    mean, std = torch.zeros(2, 3, device="meta"), torch.ones(2, 1, device="meta")
    draw = sample_candidates(mean, std, 4)
    assert draw.device.type == "meta"
    assert draw.shape == (4, 2, 3)


def test_candidates_are_rounded_before_anyone_sees_them():
    draw = sample_candidates(torch.zeros(2, 3), torch.tensor(1.0), 4, dtype=torch.bfloat16)
    assert draw.dtype == torch.bfloat16
