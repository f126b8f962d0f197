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

"""Plan a rollout, its first phase: where it branches, for how many steps, and how clear a pair must be there."""

from dataclasses import dataclass

import torch

from .pipelines.base import SPOPipeline
from .rollout_settings import RolloutSettings


@dataclass(frozen=True)
class BranchPlan:
    """
    Where a rollout branches.

    Attributes:
        lengths (`dict[int, int]`): first step of each branch -> number of its steps.
        stop (`int`): the rollout ends before this step.
    """

    lengths: dict[int, int]
    stop: int


def branch_lengths(pipeline: SPOPipeline, start: int, end: int, num_inner_steps: int, eta: float) -> dict[int, int]:
    """
    First step of each branch -> number of its steps: fewer than j where branching ends or a deterministic step follows.

    Raises:
        ValueError: if all steps from `start` to `end` are deterministic, so that no candidates would differ.
    """
    lengths = {}
    step = start
    while step < end:
        length = 0
        while length < num_inner_steps and step + length < end and pipeline.step_is_stochastic(step + length, eta):
            length += 1
        if length:
            lengths[step] = length
        step += max(length, 1)
    if not lengths:
        raise ValueError(
            f"Steps {start} to {end - 1} of the scheduler are deterministic (sigma = 0), so their candidates would be "
            "equal. Branch earlier steps, or set `set_alpha_to_one=False` in the scheduler."
        )
    return lengths


def plan_branches(
    pipeline: SPOPipeline, settings: RolloutSettings, generator: torch.Generator | None = None
) -> BranchPlan:
    """
    The branches of one rollout: every eligible place, or `num_branches` random ones of them. Call it after
    `pipeline.set_timesteps`.
    """
    pipeline.check_eta(settings.eta)
    lengths = branch_lengths(
        pipeline, settings.branch_start_step, settings.end, settings.num_inner_steps, settings.eta
    )
    if settings.num_branches is None or settings.num_branches >= len(lengths):
        return BranchPlan(lengths, settings.end)
    places = list(lengths)
    drawn = torch.randperm(len(places), generator=generator, device=generator and generator.device)
    kept = sorted(places[i] for i in drawn[: settings.num_branches].tolist())
    lengths = {step: lengths[step] for step in kept}
    return BranchPlan(lengths, max(step + length for step, length in lengths.items()))


def step_stds(pipeline: SPOPipeline, num_steps: int, eta: float, timesteps: list[int]) -> list[float]:
    """Standard deviation of every step of the schedule, on the CPU; 0 for deterministic steps."""
    origin = torch.zeros(num_steps, 1, 1, 1)
    stds = pipeline.step_distribution(origin, torch.tensor(timesteps), origin, eta).std_dev_t
    stds = stds.flatten().tolist()
    return [std if pipeline.step_is_stochastic(step, eta) else 0.0 for step, std in enumerate(stds)]


def thresholds_by_step(pipeline: SPOPipeline, settings: RolloutSettings, timesteps: list[int]) -> list[float]:
    """
    The preference threshold of every step. A pair `(low, high)` is interpolated in the standard deviation of the step,
    between the smallest and the largest of the stochastic steps: noisier steps ask for clearer pairs (LPO,
    https://huggingface.co/papers/2502.01051, section 4.3).
    """
    threshold = settings.preference_threshold
    if not isinstance(threshold, tuple):
        return [threshold] * len(timesteps)
    low, high = threshold
    stds = step_stds(pipeline, len(timesteps), settings.eta, timesteps)
    stochastic = [std for std in stds if std > 0]
    smallest = min(stochastic)
    spread = max(max(stochastic) - smallest, 1e-12)
    thresholds = []
    for std in stds:
        position = (std - smallest) / spread if std > 0 else 0.0
        thresholds.append(low + position * (high - low))
    return thresholds
