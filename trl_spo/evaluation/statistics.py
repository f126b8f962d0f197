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

"""Statistics of an evaluation; pure functions of scores."""

import math
from statistics import NormalDist

import torch


def mean_and_se(values: torch.Tensor) -> dict[str, float]:
    """`{"mean", "se"}` of independent values `(N,)`; the standard error is the sample deviation over sqrt(N)."""
    values = torch.as_tensor(values, dtype=torch.float64)
    se = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return {"mean": values.mean().item(), "se": se}


def win_rate(after: torch.Tensor, before: torch.Tensor) -> dict[str, float]:
    """
    Share of prompts on which `after (N,)` beats `before (N,)` with the same seed; a draw counts one half. With its
    standard error.
    """
    wins = (after > before).double() + 0.5 * (after == before).double()
    return mean_and_se(wins)


def compare(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, dict[str, dict[str, float]]]:
    """
    Paired comparison of two sets of scores on the same prompts and seeds.

    Args:
        before, after (`dict[str, torch.Tensor]`): per metric, `(N,)` scores.

    Returns:
        `{"before", "after", "delta", "win_rate"}`, each a dictionary from metric to `{"mean", "se"}`. The standard
        error of `delta` is that of the paired difference.
    """
    return {
        "before": {name: mean_and_se(values) for name, values in before.items()},
        "after": {name: mean_and_se(values) for name, values in after.items()},
        "delta": {name: mean_and_se(after[name].double() - before[name].double()) for name in before},
        "win_rate": {name: win_rate(after[name], before[name]) for name in before},
    }


def comparison_table(comparison: dict) -> str:
    """A Markdown table of what [`compare`] returns."""
    lines = ["| metric | before | after | paired difference | win rate |", "|---|---|---|---|---|"]
    for name in comparison["before"]:
        cells = [
            f"{comparison[part][name]['mean']:{sign}.3f} ± {comparison[part][name]['se']:.3f}"
            for part, sign in (("before", ""), ("after", ""), ("delta", "+"), ("win_rate", ""))
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- statistics over prompts -----------------------------------------------------------------------------------------


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


def student_t_quantile(probability: float, degrees: int) -> float:
    """
    Quantile of Student's t distribution with an integer number of degrees of freedom. From the finite trigonometric
    series of its distribution function (Abramowitz and Stegun, 26.7.3 and 26.7.4) by bisection.
    """
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"Need 0 < probability < 1 and degrees >= 1, got {probability} and {degrees}.")

    def two_sided(theta: float) -> float:  # P(|T| < sqrt(degrees) tan(theta))
        sin, cos = math.sin(theta), math.cos(theta)
        odd = degrees % 2
        term, total = (cos, cos) if odd else (1.0, 1.0)
        if degrees == 1:
            total = 0.0
        for k in range(2 + odd, degrees - 1, 2):  # factors 2/3, 4/5, ... or 1/2, 3/4, ...
            term *= cos * cos * (k - 1) / k
            total += term
        return 2 / math.pi * (theta + sin * total) if odd else sin * total

    target = abs(2 * probability - 1)
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle) < target else (low, middle)
    return math.copysign(math.sqrt(degrees) * math.tan(low), probability - 0.5)


def mean_interval(values: torch.Tensor, confidence: float = 0.95) -> tuple[float, float]:
    """
    Student's t confidence interval for the mean of independent values `(N,)`; `nan` for fewer than two.
    """
    if len(values) < 2:
        return float("nan"), float("nan")
    summary = mean_and_se(values)
    reach = student_t_quantile((1 + confidence) / 2, len(values) - 1) * summary["se"]
    return summary["mean"] - reach, summary["mean"] + reach


def wilson_interval(share: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """
    Wilson's score interval for a share (of prompts won) among `count` independent prompts. Unlike share ± 1.96 SE it
    stays inside [0, 1] and does not shrink to a point when every prompt is won. Where prompts may count fractions
    (draws, several images each) it errs on the wide side: no variable in [0, 1] varies more than yes and no.
    """
    if not 0 <= share <= 1 or count < 1:
        raise ValueError(f"Need a share in [0, 1] and at least one prompt, got {share} and {count}.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def paired_statistics(
    scores: torch.Tensor, prompts: list[str], base_scores: torch.Tensor | None = None, confidence: float = 0.95
) -> dict[str, float]:
    """
    What one metric says about a model, and about a base model on the same prompts and seeds.

    Args:
        scores (`torch.Tensor` of shape `(N,)`): of the model's images.
        prompts (`list[str]`): their prompts. Several images of one prompt count as one observation, their mean.
        base_scores (`torch.Tensor` of shape `(N,)`, *optional*): of the base model's images, in the same order.
        confidence (`float`, *optional*, defaults to `0.95`): of the intervals.

    Returns:
        `dict[str, float]`: `num_images`, `num_prompts`, `mean`, `se` (standard error over prompts), and with a base
        `base_mean`, `base_se`, `difference` with `difference_se`, `difference_low`, `difference_high` (paired, t
        interval) and `win_rate` with `win_rate_low`, `win_rate_high` (a draw counts one half; Wilson interval).
    """
    means = prompt_means(scores, prompts)
    result = {"num_images": len(prompts), "num_prompts": len(means), **mean_and_se(means)}
    if base_scores is not None:
        base = mean_and_se(prompt_means(base_scores, prompts))
        result |= {"base_mean": base["mean"], "base_se": base["se"]}
        differences = prompt_means(scores.double() - base_scores.double(), prompts)
        difference, (low, high) = mean_and_se(differences), mean_interval(differences, confidence)
        result |= {"difference": difference["mean"], "difference_se": difference["se"]}
        result |= {"difference_low": low, "difference_high": high}
        wins = (scores > base_scores).double() + 0.5 * (scores == base_scores).double()
        share = prompt_means(wins, prompts).mean().item()
        low, high = wilson_interval(share, len(means), confidence)
        result |= {"win_rate": share, "win_rate_low": low, "win_rate_high": high}
    return result
