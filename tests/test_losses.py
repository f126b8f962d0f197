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

"""Necessity: the two losses are the paper; their values are derived here, not recorded."""

import math

import pytest
import torch

from trl_spo import spo_loss, step_preference_loss


def test_ratio_one_and_ln_two_before_the_first_update():
    logps = torch.tensor([0.3, -1.2])
    output = spo_loss(logps, logps - 1, logps, logps - 1)
    assert output.losses.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-7)
    assert output.chosen_ratio.tolist() == output.rejected_ratio.tolist() == [1.0, 1.0]


def test_value_by_hand():
    """log r_w = 0.02, log r_l = -0.03, beta = 10: margin 0.5, loss = ln(1 + e^-0.5) = 0.4740770."""
    output = spo_loss(torch.tensor([1.02]), torch.tensor([0.97]), torch.tensor([1.0]), torch.tensor([1.0]))
    assert output.losses.item() == pytest.approx(0.4740770, abs=1e-5)
    assert output.chosen_ratio.item() == pytest.approx(math.exp(0.02), rel=1e-5)


def test_bounds_of_the_paper():
    """Clipped at [0.9, 1.1]: beta ln(1.1 / 0.9) = 2.00671, e^-2.00671 = 0.13443, so losses lie in [0.12613, 2.13284]."""
    far = torch.tensor([500.0])
    zero = torch.zeros(1)
    assert spo_loss(far, -far, zero, zero).losses.item() == pytest.approx(0.12613, abs=1e-5)
    assert spo_loss(-far, far, zero, zero).losses.item() == pytest.approx(2.13284, abs=1e-5)


def test_ratios_are_for_the_log_and_carry_no_graph():
    """They are logged over a whole run: with a graph, every logged value would keep the activations of its step."""
    logps = torch.tensor([0.01, -0.02], requires_grad=True)
    output = spo_loss(logps, logps - 0.01, torch.zeros(2), torch.zeros(2))
    assert output.losses.requires_grad
    assert not output.chosen_ratio.requires_grad
    assert not output.rejected_ratio.requires_grad


@pytest.mark.parametrize("logratio", [0.0, 0.05, -0.05, 1.0, 88.0, 200.0, -200.0, 1e30, -1e30])
def test_gradients_are_finite_at_any_logratio(logratio):
    logps = torch.tensor([logratio], requires_grad=True)
    output = spo_loss(logps, torch.zeros(1), torch.zeros(1), torch.zeros(1))
    output.losses.sum().backward()
    assert torch.isfinite(output.losses).all()
    assert torch.isfinite(logps.grad).all()
    assert (logps.grad != 0).item() == (abs(logratio) < 0.1)


def test_equals_the_published_form_where_that_is_finite():
    """clip(exp(d)) and log(sigmoid) as the paper writes it, in float64."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn((2, 2, 100), generator=generator, dtype=torch.float64) * 0.1
    ratios = torch.exp(policy - reference).clamp(0.9, 1.1)
    expected = -torch.log(torch.sigmoid(10 * (ratios[0].log() - ratios[1].log())))
    torch.testing.assert_close(spo_loss(*policy, *reference).losses, expected)


def test_swapping_flips_the_margin():
    """loss(w, l) - loss(l, w) = -margin, as -log sigmoid(m) + log sigmoid(-m) = -m."""
    chosen, rejected, zero = torch.tensor([0.03]), torch.tensor([-0.01]), torch.zeros(1)
    difference = spo_loss(chosen, rejected, zero, zero).losses - spo_loss(rejected, chosen, zero, zero).losses
    assert difference.item() == pytest.approx(-10 * 0.04, abs=1e-5)


def test_step_preference_loss_by_hand():
    """Gap 2 for the preferred image: ln(1 + e^-2) = 0.126928; against it: 2.126928."""
    scores = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 3.0])
    labels = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0])
    assert step_preference_loss(*scores, *labels).tolist() == pytest.approx([0.126928, 2.126928], abs=1e-5)


def test_tie_has_minimum_zero_at_equal_scores():
    """Labels 0.5 / 0.5 and a gap of 2: 0.5 * (0.126928 + 2.126928) - ln 2 = 0.433781."""
    half = torch.full((2,), 0.5)
    losses = step_preference_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]), half, half)
    assert losses.tolist() == pytest.approx([0.0, 0.433781], abs=1e-5)
    scores = torch.tensor([0.7], requires_grad=True)
    step_preference_loss(scores, torch.tensor([0.7]), half[:1], half[:1]).sum().backward()
    assert scores.grad.item() == pytest.approx(0.0, abs=1e-7)


def test_weights_are_normalised_over_the_batch():
    scores = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 3.0])
    labels = torch.ones(2), torch.zeros(2)
    weighted = step_preference_loss(*scores, *labels, weights=torch.tensor([3.0, 1.0]))
    assert weighted.item() == pytest.approx((3 * 0.126928 + 2.126928) / 4, abs=1e-5)


def test_swapping_images_and_labels_changes_nothing():
    generator = torch.Generator().manual_seed(1)
    scores_0, scores_1, label_0 = torch.rand((3, 10), generator=generator)
    torch.testing.assert_close(
        step_preference_loss(scores_0, scores_1, label_0, 1 - label_0),
        step_preference_loss(scores_1, scores_0, 1 - label_0, label_0),
    )


def test_half_precision_scores_are_compared_in_float32():
    """-log softmax is ln(1 + e^-gap). In float16 it would be off by up to 5e-4, in bfloat16 by 4e-3."""
    generator = torch.Generator().manual_seed(2)
    ones, zeros = torch.ones(50), torch.zeros(50)
    for dtype in (torch.float16, torch.bfloat16):
        scores_0, scores_1 = (torch.randn((2, 50), generator=generator) * 2).to(dtype)
        expected = torch.log1p(torch.exp(scores_1.double() - scores_0.double()))
        losses = step_preference_loss(scores_0, scores_1, ones, zeros)
        torch.testing.assert_close(losses, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_labels_and_weights_of_any_dtype_leave_the_loss_in_float32(dtype):
    """A data set holds labels as integers or doubles. Gap 2: 0.126928 and 2.126928, weighted 3 : 1."""
    scores = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 3.0])
    labels = torch.ones(2, dtype=dtype), torch.zeros(2, dtype=dtype)
    losses = step_preference_loss(*scores, *labels)
    weighted = step_preference_loss(*scores, *labels, weights=torch.tensor([3, 1], dtype=dtype))
    assert losses.dtype == weighted.dtype == torch.float32
    assert losses.tolist() == pytest.approx([0.126928, 2.126928], abs=1e-5)
    assert weighted.item() == pytest.approx((3 * 0.126928 + 2.126928) / 4, abs=1e-5)
