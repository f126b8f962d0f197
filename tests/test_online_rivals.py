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
Why: a comparison is worth what its rivals are worth. Flow-GRPO and DiffusionNFT are checked against numbers worked out by hand,
at the point where old and new policy are the same, and by whether they learn a reward that is easy to learn.
"""

import math

import pytest
import torch

from benchmarks.compare.methods import Meter, Recorder, adapter_state
from benchmarks.compare.online import ONLINE_DEFAULTS, DiffusionNFT, FlowGRPO, group_advantages, nft_loss
from examples.shapes.base_scores import load_flow_pipeline
from trl_spo import wrap_pipeline


@pytest.fixture()
def pipeline():
    return wrap_pipeline(load_flow_pipeline())


def brightness(images, prompts, timesteps):
    return images.mean((1, 2, 3))


def make(kind, pipeline, **settings):
    name = {FlowGRPO: "grpo", DiffusionNFT: "nft"}[kind]
    return kind(pipeline, brightness, 0, {**ONLINE_DEFAULTS[name], "groups": 2, "group_size": 4, **settings})


def test_advantages_by_hand():
    """Deviations -1, 1 and -3, 3: their root mean square is 5 ** 0.5."""
    advantages = group_advantages(torch.tensor([4.0, 6.0, 10.0, 16.0]), 2)
    assert advantages.tolist() == pytest.approx([-1 / 5**0.5, 1 / 5**0.5, -3 / 5**0.5, 3 / 5**0.5], abs=1e-3)


def test_equal_rewards_of_a_group_teach_nothing():
    assert group_advantages(torch.full((8,), 3.0), 4).abs().max() == 0


def test_nft_loss_by_hand():
    """
    One number per image: x_0 = 0, old 1, new 3, beta 0.5. Positive: 0.5 * 1 + 0.5 * 3 = 2, its error 4 over weight 2; negative:
    1.5 * 1 - 0.5 * 3 = 0, its error 0. With r = 0.75 the loss is 0.75 * 2 / 0.5.
    """
    loss = nft_loss(
        torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0), torch.ones(1, 1, 1, 1), torch.tensor([0.75]), beta=0.5
    )
    assert loss.tolist() == pytest.approx([3.0])


def test_nft_pulls_towards_good_images_and_away_from_bad_ones():
    """At new = old the gradient towards x_0 has the sign of r - 1/2, and vanishes at 1/2."""
    for good, sign in ((1.0, 1), (0.0, -1), (0.5, 0)):
        current = torch.full((1, 1, 1, 1), 2.0, requires_grad=True)
        nft_loss(torch.zeros(1, 1, 1, 1), current, current.detach(), torch.tensor([good]), beta=1.0).backward()
        assert math.copysign(1, current.grad.item()) * (current.grad.abs().item() > 1e-6) == sign


@pytest.mark.parametrize("window", [None, 2])
def test_ratios_are_one_before_an_update_and_rows_of_groups_share_what_they_should(pipeline, window):
    method = make(FlowGRPO, pipeline, window=window)
    with method.sampler("flow_sde") as timesteps:
        pipeline.denoiser.eval()
        samples = method.collect(timesteps)
        losses = method.losses(samples, torch.arange(8))
    # min(1 A, 1 A) = A at every step
    torch.testing.assert_close(losses.detach(), -samples.advantages, rtol=1e-4, atol=1e-5)
    assert len(samples.steps) == (2 if window else sum(pipeline.step_is_stochastic(i, 0.7) for i in range(10)))
    first = samples.steps[0][1].view(2, 4, -1)
    assert torch.allclose(first, first[:, :1].expand_as(first), atol=1e-5) == (window is not None)
    assert pipeline.step_rule.sampler == "ddim"  # evaluations sample as they do for other methods


def test_the_old_policy_of_nft_samples_and_the_new_one_is_untouched_by_it(pipeline):
    method = make(DiffusionNFT, pipeline)
    before = adapter_state(pipeline.denoiser)
    with torch.no_grad():
        for parameter in method.parameters:
            parameter.add_(0.1)
    moved = adapter_state(pipeline.denoiser)
    with method.old_policy():
        for name, value in adapter_state(pipeline.denoiser).items():
            assert torch.equal(value, before[name])
    for name, value in adapter_state(pipeline.denoiser).items():
        assert torch.equal(value, moved[name])
    method.updates = 250
    method.move_old_policy()
    for name, value in method.old.items():
        torch.testing.assert_close(value, 0.25 * before[name] + 0.75 * moved[name])


@pytest.mark.parametrize(
    ("kind", "settings", "per_sample"),
    [
        (FlowGRPO, {}, 10 + 3 * 9),  # sampling; forward and twice backward for each stochastic step
        (FlowGRPO, {"window": 2, "beta": 0.1}, 10 + 4 * 2),  # the reference, too
        (DiffusionNFT, {"timesteps_per_image": 2}, 10 + 2 * 4),  # the old policy and the new one at two timesteps
    ],
)
def test_evaluations_are_those_that_are_counted(pipeline, kind, settings, per_sample):
    method = make(kind, pipeline, **settings)
    stochastic = sum(pipeline.step_is_stochastic(i, 0.7) for i in range(len(pipeline.set_timesteps(10))))
    if kind is FlowGRPO and not settings:
        per_sample = 10 + 3 * stochastic
    meter = Meter(pipeline.denoiser)
    method.update()
    meter.close()
    assert meter.evaluations == 8 * per_sample


@pytest.mark.parametrize("kind", [FlowGRPO, DiffusionNFT])
def test_a_simple_reward_is_learnt(pipeline, kind):
    """Brightness: 3,000 evaluations raise the mean over fresh samples by more than three standard errors."""
    settings = {"learning_rate": 4e-3, "groups": 4}
    method = make(kind, pipeline, **settings, **({"window": 2} if kind is FlowGRPO else {"timesteps_per_image": 2}))

    def look():
        generators = [torch.Generator().manual_seed(i) for i in range(48)]
        images = pipeline.sample(method.texts[torch.arange(48)], generators, 10, 1.0, 1.0)
        return images.mean((1, 2, 3)).double()

    before = look()
    method.train(Recorder(pipeline.denoiser, [3000]))
    gain = look() - before
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5
