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
Compute the statistics of an evaluation: pure functions from scores to means, intervals and win rates.

The unit of every statistic is the prompt. Several images of one prompt are averaged first, because they are not
independent evidence about other prompts.
"""

import math
from collections.abc import Mapping
from statistics import NormalDist

import torch


try:
    from scipy.stats import t as student_t
except ImportError as error:
    raise ImportError("The statistics of an evaluation need scipy: `pip install trl-spo[eval]`.") from error


NO_INTERVAL = "one prompt: no interval"


def prompt_means(values: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """
    Mean value of each distinct prompt, in order of first appearance: `(N,)` values of N images -> `(P,)`, float64.
    """
    if len(values) != len(prompts):
        raise ValueError(f"There must be one value per prompt, got {len(values)} values for {len(prompts)} prompts.")
    position = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    index = torch.tensor([position[prompt] for prompt in prompts], dtype=torch.long)
    sums = torch.zeros(len(position), dtype=torch.float64).index_add_(0, index, torch.as_tensor(values).double())
    return sums / torch.bincount(index, minlength=len(position))


def mean_and_se(values: torch.Tensor) -> dict[str, float]:
    """`{"mean", "se"}` of independent values `(N,)`; the standard error is the sample deviation over sqrt(N)."""
    values = torch.as_tensor(values, dtype=torch.float64)
    se = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": values.mean().item(), "se": se}


def mean_interval(values: torch.Tensor, confidence: float = 0.95) -> tuple[float, float]:
    """
    Student's t confidence interval for the mean of independent values `(N,)`; `nan` for fewer than two.
    """
    _check_confidence(confidence)
    summary = mean_and_se(values)
    # One value has no standard error, and t no quantile without degrees of freedom: both are nan.
    reach = float(student_t.ppf((1 + confidence) / 2, len(values) - 1)) * summary["se"]
    return summary["mean"] - reach, summary["mean"] + reach


def wilson_interval(share: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """
    Wilson's score interval for a share (of prompts won) among `count` independent prompts.

    Unlike share ± 1.96 SE it stays inside [0, 1] and does not shrink to a point when every prompt is won. For whole
    wins it equals `scipy.stats.binomtest(wins, count).proportion_ci(method="wilson")`, which does not take the
    fractional wins of ties and of several images per prompt. With these the interval is conservative: of all variables
    in [0, 1] with this mean, a yes/no variable has the largest variance.
    """
    _check_confidence(confidence)
    if not 0 <= share <= 1 or count < 1:
        raise ValueError(f"Need a share in [0, 1] and at least one prompt, got {share} and {count}.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie between 0 and 1, got {confidence}.")


def paired_statistics(
    scores: torch.Tensor, prompts: list[str], base_scores: torch.Tensor | None = None, confidence: float = 0.95
) -> dict[str, float]:
    """
    What one metric says about a model, and about a base model on the same prompts and seeds.

    Args:
        scores (`torch.Tensor` of shape `(N,)`): scores of the model's images.
        prompts (`list[str]`): the prompts of the images. Several images of one prompt count as one observation, their
            mean.
        base_scores (`torch.Tensor` of shape `(N,)`, *optional*): scores of the base model's images, in the same order.
        confidence (`float`, *optional*, defaults to `0.95`): probability that an interval covers the true value.

    Returns:
        `dict[str, float]`: `num_images`, `num_prompts`, `mean`, `se` (standard error over prompts), and with a base
        `base_mean`, `base_se`, `difference` with `difference_se`, `difference_low`, `difference_high` (paired, t
        interval) and `win_rate` with `win_rate_low`, `win_rate_high` (a tie counts one half; Wilson interval).
    """
    means = prompt_means(scores, prompts)
    result = {"num_images": len(prompts), "num_prompts": len(means), **mean_and_se(means)}
    if base_scores is None:
        return result

    # The base model by itself, and the difference image by image.
    base = mean_and_se(prompt_means(base_scores, prompts))
    differences = prompt_means(scores.double() - base_scores.double(), prompts)
    difference = mean_and_se(differences)
    low, high = mean_interval(differences, confidence)
    result |= {"base_mean": base["mean"], "base_se": base["se"]}
    result |= {"difference": difference["mean"], "difference_se": difference["se"]}
    result |= {"difference_low": low, "difference_high": high}

    # How often an image beats the base model's.
    wins = (scores > base_scores).double() + 0.5 * (scores == base_scores).double()
    share = prompt_means(wins, prompts).mean().item()
    low, high = wilson_interval(share, len(means), confidence)
    return result | {"win_rate": share, "win_rate_low": low, "win_rate_high": high}


def statistics_table(statistics: Mapping[str, Mapping[str, float]]) -> str:
    """
    A Markdown table of what [`paired_statistics`] returned for each metric, with a base model for all or for none.
    """
    has_base = all("base_mean" in values for values in statistics.values())
    head = ["metric", "mean"]
    if has_base:
        head += ["base", "paired difference (95% CI)", "win rate (95% CI)"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, s in statistics.items():
        single = s.get("num_prompts") == 1  # says nothing about others: there is no error and no interval
        cells = [name, _with_error(s["mean"], s["se"])]
        if has_base:
            cells.append(_with_error(s["base_mean"], s["base_se"]))
            interval = f"{s['difference_low']:+.4f} to {s['difference_high']:+.4f}"
            cells.append(f"{s['difference']:+.4f} ({NO_INTERVAL if single else interval})")
            interval = f"{s['win_rate_low']:.1%} to {s['win_rate_high']:.1%}"
            cells.append(f"{s['win_rate']:.1%} ({NO_INTERVAL if single else interval})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_error(mean: float, error: float) -> str:
    """A mean and its standard error, a dash where there is none."""
    return f"{mean:.4f} ± " + ("–" if math.isnan(error) else f"{error:.4f}")
