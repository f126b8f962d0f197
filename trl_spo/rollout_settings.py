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

"""The settings of a rollout, checked once: [`RolloutSettings`]."""

from dataclasses import dataclass, replace
from typing import Any

from .scheduling_ddim import stable_diffusion_snr


RESAMPLE = ("random", "chosen", "rejected")
PAIRS = ("best_worst", "random")
REWARD_TIMESTEPS = ("next", "branch")
SNR_TOLERANCE = 0.05  # a schedule seldom hits a noise level exactly: this close is the same


@dataclass(frozen=True)
class RolloutSettings:
    """
    The settings of [`stepwise_rollout`]. [`SPOConfig.rollout_settings`] makes them of a config.

    Attributes:
        num_candidates (`int`): K, candidates drawn from one x_t, at least 2.
        num_inference_steps (`int`): S, denoising steps.
        branch_start_step (`int`): first step that branches.
        branch_end_step (`int`, *optional*): first step that does not branch any more; the rollout stops there, since
            what comes later cannot give pairs. `None`: every step after the first that branches may branch.
        branch_start_timestep, branch_end_timestep (`int`, *optional*): the same as noise levels: those of these timesteps of
            Stable Diffusion 1, compared by signal-to-noise ratio, so that a number means the same in every family and for
            every number of steps. They go before `branch_start_step` and `branch_end_step`; see `resolve`.
        num_inner_steps (`int`): j, steps that a candidate goes on alone before it is scored.
        num_branches (`int`, *optional*): branch only at this many random places of those that may branch, and stop after
            the last of them. `None`: branch at every eligible step.
        eta (`float`): noise of the steps, above 0; its range is that of the pipeline's sampler.
        guidance_scale (`float`): w; values of 1 and less disable guidance.
        preference_threshold (`float` or `tuple[float, float]`): see [`select_pairs`]; a pair `(low, high)` is interpolated
            in the standard deviation of the step.
        resample (`str`): the candidate that goes on: "random", "chosen" or "rejected".
        pair (`str`): "best_worst", or "random" for two random candidates.
        reward_timestep (`str`): "next", a candidate x_{t-1} is scored at its own timestep; or "branch", at the t of the
            x_t it was drawn from, as the public code of LPO does.
        height, width (`int`, *optional*): image size in pixels; `None`: the model's own.
        rollout_micro_batch_size (`int`, *optional*): maximum number of latents in one denoiser call (guidance doubles
            them).
        vae_decode_batch_size (`int`, *optional*): maximum number of images in one decoder call.
        reward_batch_size (`int`, *optional*): maximum number of samples in one reward call.
        scoring_image_size (`int`, *optional*): decode for scoring at this size, in pixels of the short side.
        defer_scoring (`bool`): score the candidates of all steps together after the rollout; needs
            `resample="random"`, and is ignored otherwise.

    Raises:
        ValueError: for settings that cannot give pairs.
    """

    num_candidates: int = 4
    num_inference_steps: int = 20
    branch_start_step: int = 4
    branch_end_step: int | None = None
    branch_start_timestep: int | None = None
    branch_end_timestep: int | None = None
    num_inner_steps: int = 1
    num_branches: int | None = None
    eta: float = 1.0
    guidance_scale: float = 5.0
    preference_threshold: float | tuple[float, float] = 0.3
    resample: str = "random"
    pair: str = "best_worst"
    reward_timestep: str = "next"
    height: int | None = None
    width: int | None = None
    rollout_micro_batch_size: int | None = None
    vae_decode_batch_size: int | None = None
    reward_batch_size: int | None = None
    scoring_image_size: int | None = None
    defer_scoring: bool = False

    def __post_init__(self):
        threshold = self.preference_threshold
        if isinstance(threshold, (list, tuple)):
            object.__setattr__(self, "preference_threshold", tuple(threshold))
        for name, (holds, expected) in self._rules().items():
            if not holds:
                raise ValueError(f"`{name}` must be {expected}; got {getattr(self, name)!r}.")

    @property
    def end(self) -> int:
        """First step that cannot branch."""
        return self.num_inference_steps if self.branch_end_step is None else self.branch_end_step

    @property
    def deferred(self) -> bool:
        """Whether scores can wait until the end of the rollout: only if the next x_t does not depend on them."""
        return self.defer_scoring and self.resample == "random"

    def resolve(self, step_rule, timesteps: list[int]) -> "RolloutSettings":
        """
        The same settings with branch ranges as step numbers of a schedule: branching starts and ends with the first step whose
        latents have no more noise than Stable Diffusion 1 has at the timesteps that are given.

        Args:
            step_rule ([`StepRule`]): knows the signal-to-noise ratio of each timestep.
            timesteps (`list[int]`): the schedule, `num_inference_steps` of them.

        Raises:
            ValueError: if no step lies in the range.
        """
        if self.branch_start_timestep is None and self.branch_end_timestep is None:
            return self
        # Translate each end of the range that is given as a noise level; the other stays a step number.
        found = {}
        for name in ("branch_start", "branch_end"):
            wanted = getattr(self, f"{name}_timestep")
            if wanted is None:
                found[f"{name}_step"] = getattr(self, f"{name}_step")
                continue
            least = stable_diffusion_snr(wanted) * (1 - SNR_TOLERANCE)
            clear = [step for step, timestep in enumerate(timesteps) if step_rule.snr(timestep) >= least]
            found[f"{name}_step"] = clear[0] if clear else len(timesteps)

        # A range that is empty on this schedule would give no pairs.
        end = len(timesteps) if found["branch_end_step"] is None else found["branch_end_step"]
        if found["branch_start_step"] >= end:
            raise ValueError(
                f"No step of the schedule {timesteps} lies between `branch_start_timestep={self.branch_start_timestep}` and "
                f"`branch_end_timestep={self.branch_end_timestep}`. Take more steps or a wider range."
            )
        return replace(self, branch_start_timestep=None, branch_end_timestep=None, **found)

    def _rules(self) -> dict[str, tuple[bool, str]]:
        """Name of a setting -> whether it is acceptable, and what it must be."""
        # Settings that decide which pairs a rollout can give.
        rules = {
            "num_inference_steps": (self.num_inference_steps >= 1, "at least 1"),
            "num_candidates": (self.num_candidates >= 2, "at least 2, or there is no pair"),
            "eta": (self.eta > 0, "above 0; without noise the steps are deterministic and all candidates are equal"),
            "num_inner_steps": (self.num_inner_steps >= 1, "at least 1"),
            "branch_end_step": (self.end <= self.num_inference_steps, f"at most {self.num_inference_steps} steps"),
            "branch_start_step": (
                self.branch_start_timestep is not None or 0 <= self.branch_start_step < self.end,
                f"in [0, {self.end}), before branching ends",
            ),
            "num_branches": (self.num_branches is None or self.num_branches >= 1, "at least 1, or None for all"),
            "preference_threshold": (
                is_threshold(self.preference_threshold),
                "in [0, 1), a difference of probabilities, or two of them (low, high) with low <= high",
            ),
            "resample": (self.resample in RESAMPLE, "'random', 'chosen' or 'rejected'"),
            "pair": (self.pair in PAIRS, "'best_worst' or 'random'"),
            "reward_timestep": (self.reward_timestep in REWARD_TIMESTEPS, "'next' or 'branch'"),
        }

        # Optional settings, where `None` leaves the choice to the step numbers, the model or the whole batch.
        for name in ("branch_start_timestep", "branch_end_timestep"):
            value = getattr(self, name)
            rules[name] = (value is None or 0 <= value < 1000, "in [0, 1000), a timestep of Stable Diffusion 1")
        for name in ("height", "width"):
            value = getattr(self, name)
            rules[name] = (value is None or value >= 1, "at least 1 pixel, or None for the model's own")
        for name in ("rollout_micro_batch_size", "vae_decode_batch_size", "reward_batch_size"):
            value = getattr(self, name)
            rules[name] = (value is None or value >= 1, "at least 1")
        size = self.scoring_image_size
        rules["scoring_image_size"] = (size is None or size >= 1, "at least 1 pixel")
        return rules


def is_threshold(threshold: Any) -> bool:
    """Whether this is a difference of probabilities, or a pair (low, high) of them."""
    parts = threshold if isinstance(threshold, (list, tuple)) else (threshold, threshold)
    return len(parts) == 2 and 0 <= parts[0] <= parts[1] < 1
