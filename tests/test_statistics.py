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
Necessity: error bars are read at the edges, where there are one or two prompts, every prompt is won, or counts come as
integers. The values in the middle are in `test_evaluation.py`.
"""

import math
import warnings

import pytest
import torch

from trl_spo.evaluation.statistics import (
    mean_and_se,
    mean_interval,
    paired_statistics,
    prompt_means,
    wilson_interval,
)


def test_one_value_has_no_standard_error_and_two_have_one():
    """1 and 3: mean 2, deviation sqrt(2), standard error 1. That one value has none is said without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, interval = mean_and_se(torch.tensor([4.0])), mean_interval(torch.tensor([4.0]))
    assert one["mean"] == 4
    assert math.isnan(one["se"])
    assert all(math.isnan(bound) for bound in interval)
    two = torch.tensor([1.0, 3.0])
    assert mean_and_se(two) == {"mean": 2.0, "se": pytest.approx(1.0)}
    reach = math.tan(math.pi * 0.475)  # t with one degree of freedom is Cauchy's distribution
    assert mean_interval(two) == pytest.approx((2 - reach, 2 + reach), rel=1e-9)


def test_integers_and_large_offsets_are_taken_in_double_precision():
    """The 1 in 10^9 + 1 is lost in float32, and integers have no mean there."""
    values = torch.tensor([0, 1, 2, 3]) + 10**9
    assert mean_and_se(values) == {"mean": 10**9 + 1.5, "se": pytest.approx(math.sqrt(5 / 3) / 2)}
    assert prompt_means(values, ["a", "a", "b", "b"]).tolist() == [10**9 + 0.5, 10**9 + 2.5]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float32, torch.float64])
def test_differences_and_wins_do_not_depend_on_the_type_of_the_scores(dtype):
    """Differences 1, 0, -2: mean -1 / 3, deviation sqrt(7 / 3), error sqrt(7) / 3. One win, one draw, one loss."""
    before, after = torch.tensor([1, 1, 2]).to(dtype), torch.tensor([2, 1, 0]).to(dtype)
    paired = paired_statistics(after, ["a", "b", "c"], before)
    assert paired["difference"] == pytest.approx(-1 / 3, rel=1e-12)
    assert paired["difference_se"] == pytest.approx(math.sqrt(7) / 3, rel=1e-12)
    assert paired["win_rate"] == 0.5


def test_no_images_have_no_prompt_means():
    assert prompt_means(torch.zeros(0), []).tolist() == []


def test_paired_statistics_hold_the_intervals_at_the_stated_confidence():
    """
    Base 1, 2, 3: deviation 1, error sqrt(1 / 3). Scores 2, 2, 5: deviation sqrt(3), error 1. Differences 1, 0, 2: mean 1,
    error sqrt(1 / 3). Two wins and a draw.
    """
    base, difference = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 2.0])
    for confidence in (0.5, 0.95):
        result = paired_statistics(base + difference, ["a", "b", "c"], base, confidence)
        # t with two degrees of freedom has a closed form.
        reach = confidence * math.sqrt(2 / (1 - confidence**2)) * math.sqrt(1 / 3)
        share = wilson_interval(2.5 / 3, 3, confidence)
        assert result == pytest.approx(
            {
                "num_images": 3,
                "num_prompts": 3,
                "mean": 3.0,
                "se": 1.0,
                "base_mean": 2.0,
                "base_se": math.sqrt(1 / 3),
                "difference": 1.0,
                "difference_se": math.sqrt(1 / 3),
                "difference_low": 1 - reach,
                "difference_high": 1 + reach,
                "win_rate": 2.5 / 3,
                "win_rate_low": share[0],
                "win_rate_high": share[1],
            }
        )


def test_equal_scores_have_an_interval_of_no_width():
    """A model compared with itself differs by exactly nothing."""
    assert mean_interval(torch.zeros(4)) == (0, 0)


def test_wilson_interval_of_one_prompt_and_inside_zero_and_one():
    """One prompt, won: from 1 / (1 + z^2) to 1. Rounding must not carry a bound out of [0, 1], whatever the count."""
    z = 1.959963984540054
    assert wilson_interval(1.0, 1) == pytest.approx((1 / (1 + z**2), 1.0), rel=1e-9)
    for count in range(1, 300):
        for confidence in (0.5, 0.9, 0.95, 0.99):
            low, high = wilson_interval(1.0, count, confidence)
            assert 0 < low < high <= 1
            assert high == pytest.approx(1)
            low, high = wilson_interval(0.0, count, confidence)
            assert 0 <= low < high < 1
            assert low == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("share, count", [(-0.1, 10), (1.1, 10), (1.9, 10), (0.5, 0), (0.5, -1)])
def test_an_impossible_share_is_refused(share, count):
    with pytest.raises(ValueError, match="Need a share in"):
        wilson_interval(share, count)
