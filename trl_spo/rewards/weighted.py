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

"""Several rewards at once: [`WeightedReward`], which brings each to a common scale at every step."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from .base import Reward, wrap_reward


ROUNDING = 1e-6  # of the scores: a deviation below it is what float32 leaves of equal scores


class PartTexts:
    """The text features of several rewards, of which one index tensor picks rows. Rows come on the CPU."""

    rows_on_cpu = True

    def __init__(self, texts: dict[str, Any], rows: torch.Tensor | None = None):
        self.texts = texts
        self.rows = rows

    def __getitem__(self, rows: torch.Tensor) -> "PartTexts":
        return PartTexts(self.texts, rows if self.rows is None else self.rows[rows])

    def of(self, name: str, device: torch.device) -> Any:
        """The rows of one reward; features of a network are on `device`, a list of prompts is not."""
        text = self.texts[name]
        if self.rows is None:
            return text
        return text[self.rows if isinstance(text, list) else self.rows.to(device, non_blocking=True)]


class WeightedReward(Reward):
    r"""
    The weighted sum of several rewards, each of which is brought to a common scale at every step.

    Rewards have scales of their own, and the differences between candidates grow from step to step, in each reward in its
    own way. So at every branching step the scores of a reward are centred over the K candidates of each prompt, and divided
    by their standard deviation over candidates and prompts of the rollout:

        d[k, b] = s[k, b] - mean_k s[k, b]
        std     = sqrt(mean_b sum_k d[k, b]^2 / (K - 1))
        score   = sum over rewards of weight * d / std

    Pairs do not change when a constant is added to all scores of a prompt, so the centring changes nothing. The scale does
    change: `preference_threshold` now asks for a gap in units of such deviations, so 0.3 asks for 0.62 of one. A reward whose
    candidates all have the same score at a step, up to rounding, adds nothing there. Prompts with a score that is not
    finite do not count for the deviation, and their pair is left out.

    A single reward is not brought to another scale; its weight multiplies its scores.

    Finished images of other prompts and other times are compared by the weighted sum of the scores themselves
    ([`~WeightedReward.total`]).

    Args:
        rewards (`dict[str, Any]`): by the name under which each is logged, everything that [`wrap_reward`] takes. All see the
            same: images, latents, or noisy latents.
        weights (`dict[str, float]`, *optional*): finite and not 0; below 0 for what is to be avoided. 1 by default.

    Raises:
        ValueError: for no rewards, for weights that do not fit, and for rewards that see different things.

    Example:

    ```python
    >>> from trl_spo import WeightedReward, load_metric

    >>> reward = WeightedReward(
    ...     {"pickscore": load_metric("pickscore"), "aesthetic": load_metric("aesthetic")},
    ...     {"pickscore": 0.7, "aesthetic": 0.3},
    ... )
    >>> trainer = SPOTrainer(config, pipeline, reward, train_dataset=prompts)
    ```
    """

    def __init__(self, rewards: Mapping[str, Any], weights: Mapping[str, float] | None = None):
        if not rewards:
            raise ValueError("`rewards` is empty: name at least one reward.")
        self.weights = checked_weights(rewards, weights)
        self.parts = {name: wrap_reward(reward) for name, reward in rewards.items()}
        self.sees = self._common_view()
        self.name = " + ".join(f"{weight:g} x {name}" for name, weight in self.weights.items())
        self.can_be_traced = all(reward.can_be_traced for reward in self.parts.values())
        self.shares_denoiser = any(reward.shares_denoiser for reward in self.parts.values())
        known = [reward.num_train_timesteps for reward in self.parts.values()]
        self.num_train_timesteps = min((number for number in known if number is not None), default=None)
        networks = [reward.module for reward in self.parts.values() if reward.module is not None]
        self.module = torch.nn.ModuleList(networks) if networks else None

    def _common_view(self) -> str:
        sees = {name: reward.sees.replace("_", " ") for name, reward in self.parts.items()}
        if len(set(sees.values())) > 1:
            each = ", ".join(f"{name!r} judges {what}" for name, what in sees.items())
            raise ValueError(
                f"A rollout shows one thing to all of its rewards, and {each}. Combine rewards of one kind."
            )
        return next(iter(self.parts.values())).sees

    # --- what is asked of every reward ---------------------------------------------------------------------------

    def check_prompts(self, prompts: list[str]) -> None:
        for reward in self.parts.values():
            reward.check_prompts(prompts)

    def check_pipeline(self, pipeline) -> None:
        for reward in self.parts.values():
            reward.check_pipeline(pipeline)

    def prepare(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "WeightedReward":
        """Prepares each of its rewards; those without a network are not cast."""
        self.check_dtype(dtype)
        for reward in self.parts.values():
            reward.prepare(device, None if reward.module is None else dtype)
        return self

    def encode_prompts(self, prompts: list[str]) -> PartTexts:
        return PartTexts({name: reward.encode_prompts(prompts) for name, reward in self.parts.items()})

    def score(self, samples: torch.Tensor, text: PartTexts, timesteps: torch.Tensor) -> torch.Tensor:
        return self.total(self.score_parts(samples, text, timesteps))

    # --- of several rewards ------------------------------------------------------------------------------------------

    def score_parts(self, samples: torch.Tensor, text: PartTexts, timesteps: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = {}
        for name, reward in self.parts.items():
            scores[name] = reward.score(samples, text.of(name, samples.device), timesteps)
        return scores

    def total(self, scores: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum(weight * scores[name] for name, weight in self.weights.items())

    def combine(self, scores: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(self.parts) == 1:
            return self.total(scores)
        return self.total({name: standardised(values) for name, values in scores.items()}).float()


def standardised(scores: torch.Tensor) -> torch.Tensor:
    """
    Deviations from the mean of each prompt, in units of their standard deviation.

    Args:
        scores (`torch.Tensor` of shape `(K, B)`): of K candidates of B prompts at one step.

    Returns:
        `torch.Tensor` of shape `(K, B)`: float64. Zeros where no prompt has candidates that differ, NaN where a prompt has a
        score that is not finite.
    """
    scores = scores.double()
    deviations = scores - scores.mean(0)
    finite = scores[:, scores.isfinite().all(0)]
    if finite.numel() == 0:
        return deviations
    variances = (finite - finite.mean(0)).square().sum(0) / max(len(scores) - 1, 1)
    std = variances.mean().sqrt()
    if std <= ROUNDING * finite.abs().max():
        return deviations * 0
    return deviations / std


def checked_weights(rewards: Mapping[str, Any], weights: Mapping[str, float] | None) -> dict[str, float]:
    """
    One weight per reward, in the order of the rewards.

    Raises:
        ValueError: for a weight without a reward, a reward without a weight, or a weight that is 0 or not finite.
    """
    weights = dict.fromkeys(rewards, 1.0) if weights is None else dict(weights)
    if weights.keys() != rewards.keys():
        raise ValueError(
            f"There must be one weight per reward, got weights for {[*weights]} and rewards {[*rewards]}."
        )
    for name, weight in weights.items():
        if not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight == 0:
            raise ValueError(f"The weight of {name!r} must be a finite number other than 0, got {weight!r}.")
    return {name: float(weights[name]) for name in rewards}
