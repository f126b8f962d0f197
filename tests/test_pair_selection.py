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

"""Necessity: a wrong index here trains the model on the loser, and every metric but the image would look fine."""

import math

import pytest
import torch

from trl_spo import PairSelection, select_pairs
from trl_spo.pair_selection import (
    draw_two_candidates,
    gather_candidates,
    random_index,
    resample_index,
    select_random_pairs,
)


SCORES = torch.tensor([[1.0, 0.0, 5.0], [3.0, 0.1, 5.0], [2.0, -0.1, 5.0]])  # (K = 3, B = 3)


def test_best_and_worst_by_hand():
    """Gaps 2, 0.2 and 0; tanh(1) = 0.76, tanh(0.1) = 0.0997. Only the first exceeds 0.3."""
    selection = select_pairs(SCORES, 0.3)
    assert isinstance(selection, PairSelection)
    assert selection.chosen.tolist()[:2] == [1, 1]
    assert selection.rejected.tolist()[:2] == [0, 2]
    assert selection.valid.tolist() == [True, False, False]
    assert select_pairs(SCORES, 0.09).valid.tolist() == [True, True, False]


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.4, 0.9])
def test_threshold_is_a_score_gap_of_two_atanh(threshold):
    gap = 2 * math.atanh(threshold)
    scores = torch.tensor([[gap - 1e-3, gap + 1e-3], [0.0, 0.0]], dtype=torch.float64)
    assert select_pairs(scores, threshold).valid.tolist() == [False, True]


def test_threshold_equals_softmax_difference():
    scores = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    best, worst = scores.max(0).values, scores.min(0).values
    probabilities = torch.softmax(torch.stack([best, worst]), 0)
    expected = probabilities[0] - probabilities[1] > 0.4
    assert torch.equal(select_pairs(scores, 0.4).valid, expected)
    assert 0 < expected.sum() < 200


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_compared_in_float32(dtype):
    """tanh rounded to half precision moves the threshold: of 4,000 pairs, about ten would change sides."""
    scores = torch.randn(2, 4000, generator=torch.Generator().manual_seed(4)).to(dtype)
    exact = torch.tanh((scores[0].double() - scores[1].double()).abs() / 2)
    assert torch.equal(select_pairs(scores, 0.3).valid, exact > 0.3)


def test_shifting_scores_changes_nothing_and_negating_swaps():
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    base = select_pairs(scores, 0.3)
    shifted = select_pairs(scores + torch.randn(50, dtype=torch.float64) * 10, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(base, shifted, strict=True))
    negated = select_pairs(-scores, 0.3)
    assert torch.equal(negated.chosen, base.rejected)
    assert torch.equal(negated.rejected, base.chosen)
    assert torch.equal(negated.valid, base.valid)


def test_permuting_prompts_permutes_pairs():
    scores = torch.randn(4, 20, generator=torch.Generator().manual_seed(2))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    for permuted, original in zip(select_pairs(scores[:, order], 0.3), select_pairs(scores, 0.3), strict=True):
        assert torch.equal(permuted, original[order])


def test_a_gap_too_large_for_float32_is_a_clear_one():
    """Regression: the difference was infinite, the pair invalid, and the message spoke of equal scores."""
    scores = torch.tensor([[3e38, -3e38], [-3e38, 3e38]])
    selection = select_pairs(scores, 0.3)
    assert selection.valid.tolist() == [True, True]
    assert selection.chosen.tolist() == [0, 1]
    halves = torch.tensor([[0.3, 0.62], [0.0, 0.0]])  # a gap of 0.619 is a threshold of 0.3
    assert select_pairs(halves, 0.3).valid.tolist() == [False, True]


def test_constant_and_non_finite_scores_are_no_pairs():
    scores = torch.tensor([[1.0, float("nan"), float("inf")], [1.0, 0.0, 0.0]])
    assert select_pairs(scores, 0.0).valid.tolist() == [False, False, False]


@pytest.mark.parametrize(
    "scores, threshold", [(torch.zeros(3), 0.3), (torch.zeros(1, 3), 0.3), (SCORES, 1.0), (SCORES, -0.1)]
)
def test_bad_input(scores, threshold):
    with pytest.raises(ValueError, match="shape|threshold"):
        select_pairs(scores, threshold)


def test_random_pairs_are_ordered_distinct_and_uniform():
    scores = torch.arange(3.0)[:, None].expand(3, 6000)
    selection = select_random_pairs(scores, 0.0, torch.Generator().manual_seed(0))
    assert (selection.chosen > selection.rejected).all()
    counts = torch.bincount(selection.chosen * 3 + selection.rejected, minlength=9)
    assert counts[[3, 6, 7]].sum() == 6000  # (1, 0), (2, 0), (2, 1)
    assert ((counts[[3, 6, 7]] - 2000).abs() < 5 * math.sqrt(6000 * 2 / 9)).all()


def test_two_random_by_hand():
    """
    Drawn are (0, 1), (1, 2) and (2, 0) of SCORES: 1 against 3, 0.1 against -0.1, and a tie. tanh(1) = 0.76 exceeds 0.3,
    tanh(0.1) = 0.0997 exceeds 0.09 only.
    """
    candidates = torch.tensor([[0, 1, 2], [1, 2, 0]])
    selection = select_random_pairs(SCORES, 0.3, candidates=candidates)
    assert selection.chosen.tolist()[:2] == [1, 1]
    assert selection.rejected.tolist()[:2] == [0, 2]
    assert selection.valid.tolist() == [True, False, False]
    assert select_random_pairs(SCORES, 0.09, candidates=candidates).valid.tolist() == [True, True, False]
    turned = select_random_pairs(SCORES, 0.3, candidates=candidates.flip(0))
    for name in ("chosen", "rejected"):  # which of the two was drawn first says nothing
        assert torch.equal(getattr(turned, name)[:2], getattr(selection, name)[:2])
    assert torch.equal(turned.valid, selection.valid)


def test_draws_repeat_with_the_generator_and_without_one_follow_the_global_seed():
    scores = torch.randn(4, 200, generator=torch.Generator().manual_seed(5))
    draws = {
        "two candidates": lambda generator=None: draw_two_candidates(4, 200, generator),
        "random pairs": lambda generator=None: torch.stack(select_random_pairs(scores, 0.3, generator)[:2]),
        "resampling": lambda generator=None: random_index(4, 200, generator),
    }
    for name, draw in draws.items():
        first = draw(torch.Generator().manual_seed(6))
        assert torch.equal(first, draw(torch.Generator().manual_seed(6))), name
        assert not torch.equal(first, draw(torch.Generator().manual_seed(7))), name
        torch.manual_seed(8)
        first = draw()
        torch.manual_seed(8)
        assert torch.equal(first, draw()), name
        assert not torch.equal(first, draw()), name


def test_draws_are_made_where_the_generator_is():
    """Not on the default device, which `torch.set_default_device` may have moved."""
    with torch.device("meta"):
        generator = torch.Generator("cpu").manual_seed(0)
        assert draw_two_candidates(4, 5, generator).device.type == "cpu"
        assert random_index(4, 5, generator).device.type == "cpu"


def test_results_are_where_the_scores_are():
    """The meta device stands for an accelerator: scores there, random numbers and drawn candidates on the CPU."""
    scores = torch.zeros(4, 5, device="meta")
    candidates = draw_two_candidates(4, 5, torch.Generator().manual_seed(0))
    selection = select_random_pairs(scores, 0.3, candidates=candidates)
    assert {value.device.type for value in selection} == {"meta"}
    assert resample_index(selection, 4, "random", torch.Generator().manual_seed(0)).device.type == "meta"


def test_gather_picks_one_candidate_per_prompt():
    candidates = torch.arange(12.0).view(3, 2, 2)  # (K, B, D)
    index = torch.tensor([2, 0])
    assert gather_candidates(candidates, index).tolist() == [[8.0, 9.0], [2.0, 3.0]]
    with torch.device("meta"):  # a default device elsewhere changes nothing
        assert gather_candidates(candidates, index).tolist() == [[8.0, 9.0], [2.0, 3.0]]


def test_resampling_is_uniform_and_blind_to_scores():
    selection = PairSelection(torch.zeros(8000).long(), torch.ones(8000).long(), torch.ones(8000).bool())
    index = resample_index(selection, 4, "random", torch.Generator().manual_seed(0))
    counts = torch.bincount(index, minlength=4)
    assert ((counts - 2000).abs() < 5 * math.sqrt(8000 * 3 / 16)).all()
    swapped = PairSelection(selection.rejected, selection.chosen, selection.valid)
    assert torch.equal(index, resample_index(swapped, 4, "random", torch.Generator().manual_seed(0)))
    assert torch.equal(index, resample_index(selection, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(resample_index(selection, 4, "chosen"), selection.chosen)
    assert torch.equal(resample_index(selection, 4, "rejected"), selection.rejected)
    with pytest.raises(ValueError, match="got 'best'"):
        resample_index(selection, 4, "best")
