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
Running means of metrics between two logs, the same for both trainers.

A training step computes metrics on the device, a rollout on the CPU. Reading each of them at once would stop the device
dozens of times per step. So values are summed where they are, and read when they are logged: one copy per device.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object


REDUCTIONS = ("mean", "sum", "per_process")


def gather_from_processes(own: Any) -> list:
    """What every process has, in the order of their ranks. Every process must call it."""
    return gather_object([own]) if PartialState().num_processes > 1 else [own]


def positions_by_device(tensors: Sequence[torch.Tensor]) -> dict[torch.device, list[int]]:
    """Which of the tensors are on which device. No value is read."""
    positions = {}
    for i, tensor in enumerate(tensors):
        positions.setdefault(tensor.device, []).append(i)
    return positions


def read_scalars(tensors: Sequence[torch.Tensor]) -> list[float]:
    """The values of tensors without dimensions, which may be on several devices: the host waits once per device."""
    values = [0.0] * len(tensors)
    for positions in positions_by_device(tensors).values():
        stacked = torch.stack([tensors[i] for i in positions])
        for i, value in zip(positions, stacked.tolist(), strict=True):
            values[i] = value
    return values


@dataclass
class _Sum:
    reduce: str
    total: torch.Tensor | float = 0.0
    weight: torch.Tensor | float = 0.0


class RunningMeans:
    """
    Metrics since the last log: values are added under a name, and come back as one number per name.

    Every metric may live on a device of its own. What is not finite is left out.
    """

    def __init__(self):
        self._sums: dict[str, _Sum] = {}

    def add(
        self,
        name: str,
        values: torch.Tensor | float,
        mask: torch.Tensor | None = None,
        reduce: str = "mean",
    ) -> None:
        """
        Add values to a metric. Nothing is copied to the host.

        Args:
            name (`str`): of the metric.
            values (`torch.Tensor` of any shape, or a number): detached here. Values of a metric that come from several
                devices are summed on the first of them.
            mask (`torch.Tensor`, *optional*): weights of the values, or whether they count; broadcasts against them.
            reduce (`str`, *optional*, defaults to `"mean"`):
                What is logged: `"mean"`, of all values that were added anywhere; `"sum"`, of all of them; or
                `"per_process"`, their sum over the number of processes, for seconds, which pass everywhere at once.

        Raises:
            ValueError: for another `reduce`, or another one than the metric has.
        """
        if reduce not in REDUCTIONS:
            raise ValueError(f"`reduce` must be one of {REDUCTIONS}, got {reduce!r}.")
        entry = self._sums.setdefault(name, _Sum(reduce))
        if entry.reduce != reduce:
            raise ValueError(
                f"The metric {name!r} is reduced by {entry.reduce!r}, and cannot be by {reduce!r} as well."
            )
        total, weight = _sum_of_tensor(values, mask) if torch.is_tensor(values) else _sum_of_number(values)
        if torch.is_tensor(entry.total) and torch.is_tensor(total):
            total = total.to(entry.total.device)
            weight = weight.to(entry.total.device)
        entry.total = entry.total + total
        entry.weight = entry.weight + weight

    def pop(self, gather: Callable[[Any], list] = gather_from_processes) -> dict[str, float]:
        """
        The metrics since the last call, over all processes. Every process must call it.

        Args:
            gather (`Callable`, *optional*): returns what every process passes to it, in a list.

        Returns:
            `dict[str, float]`: metrics without a single finite value are left out.
        """
        # Processes may have different metrics: a rollout of one may have had no pair to say something about.
        processes = gather(self.state_dict())
        self.clear()
        everything = RunningMeans()
        everything.load_state_dict(*processes)
        metrics = {}
        for name, entry in everything._sums.items():
            divisor = entry.weight
            if entry.reduce == "sum":
                divisor = 1
            elif entry.reduce == "per_process":
                divisor = len(processes)
            if divisor > 0:
                metrics[name] = entry.total / divisor
        return metrics

    def clear(self) -> None:
        """Forget all values and names."""
        self._sums.clear()

    def state_dict(self) -> dict[str, list]:
        """The sums of this process, `name -> [sum, sum of weights, reduce]`, ready for JSON. They also stay here."""
        tensors = []
        for entry in self._sums.values():
            tensors += [value for value in (entry.total, entry.weight) if torch.is_tensor(value)]
        read = iter(read_scalars(tensors))
        state = {}
        for name, entry in self._sums.items():
            total = next(read) if torch.is_tensor(entry.total) else entry.total
            weight = next(read) if torch.is_tensor(entry.weight) else entry.weight
            state[name] = [total, weight, entry.reduce]
        return state

    def load_state_dict(self, *states: dict[str, list]) -> None:
        """Continue from what [`~RunningMeans.state_dict`] returned; of several, such as those of processes, from their sum."""
        self.clear()
        for state in states:
            for name, (total, weight, reduce) in state.items():
                entry = self._sums.setdefault(name, _Sum(reduce))
                entry.total += total
                entry.weight += weight


def _sum_of_tensor(values: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the finite values and of their weights, where the values are."""
    dtype = torch.float32 if values.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    values = values.detach()
    finite = values.isfinite()
    values = torch.where(finite, values, 0.0).to(dtype)
    weights = finite.to(dtype)
    if mask is not None:
        weights = weights * mask.to(values)
        values = values * weights
    return values.sum(), weights.sum()


def _sum_of_number(value: float) -> tuple[float, float]:
    return (value, 1.0) if math.isfinite(value) else (0.0, 0.0)
