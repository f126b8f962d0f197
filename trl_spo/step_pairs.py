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

"""Chosen-rejected pairs of denoising transitions, and the record of the rollout that made them."""

from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch

from .pair_selection import PairSelection


@dataclass
class BranchRecord:
    """
    What happened at one branching step. B prompts, K candidates. Scores and indices are on the CPU.

    Attributes:
        step (`int`): index of the (first) step of the branch in the schedule.
        timestep (`int`): t of the latents that branch.
        scored_timestep (`int`): timestep at which the candidates were scored; 0 for final images.
        scores (`torch.Tensor` of shape `(K, B)`): float32; what the pairs were selected by.
        selection ([`PairSelection`]): chosen, rejected and validity per prompt.
        next_index (`torch.Tensor` of shape `(B,)`): the candidate that went on.
        parts (`dict[str, torch.Tensor]`): of several rewards ([`WeightedReward`]) the scores `(K, B)` of each.
        latents (`torch.Tensor` of shape `(B, ...)`, *optional*): x_t; only with `return_trajectory=True`.
        candidates (`torch.Tensor` of shape `(K, B, ...)`, *optional*): what was scored, as latents.
        pred_original_samples (`torch.Tensor` of shape `(K, B, ...)`, *optional*): their predicted x_0.
    """

    step: int
    timestep: int
    scored_timestep: int
    scores: torch.Tensor
    selection: PairSelection
    next_index: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    latents: torch.Tensor | None = None
    candidates: torch.Tensor | None = None
    pred_original_samples: torch.Tensor | None = None


class NonFinite(NamedTuple):
    """
    A pair that was given up, or a finished image without a score, because something of it is NaN or infinite.

    Attributes:
        what (`str`): where it arose: "latents", "x_0 prediction", "decoded image" or "score".
        step (`int`): index of the denoising step in the schedule.
        timestep (`int`): the timestep at which `what` was computed.
        prompt (`str`): the prompt.
    """

    what: str
    step: int
    timestep: int
    prompt: str

    def __str__(self) -> str:
        return f"{self.what} at step {self.step}, timestep {self.timestep}, prompt {self.prompt!r}"


@dataclass
class StepPairs:
    """
    Chosen-rejected pairs of denoising transitions, N in all, valid ones only.

    Attributes:
        latents (`torch.Tensor` of shape `(N, ...)`): x_t of the chosen transition.
        chosen_prev_latents (`torch.Tensor` of shape `(N, ...)`): its x_{t-1}, bit for bit the one that was scored (or,
            inside a multi-step branch, that led to it).
        rejected_latents (`torch.Tensor` of shape `(N, ...)`): x_t of the rejected transition.
        rejected_prev_latents (`torch.Tensor` of shape `(N, ...)`): its x_{t-1}.
        shared (`torch.Tensor` of shape `(N,)`, bool): whether both transitions start from the same x_t. On the CPU, where
            it is decided how many forward passes a batch takes.
        timesteps (`torch.Tensor` of shape `(N,)`, int64): t.
        prompt_index (`torch.Tensor` of shape `(N,)`, int64): row of the prompt in the rollout batch.
        chosen_scores, rejected_scores (`torch.Tensor` of shape `(N,)`): of the reward model.
        prompts (list of `str`): the N prompts.
        branches (list of [`BranchRecord`]): every branching step of the rollout, valid or not.
        final_latents (`torch.Tensor` of shape `(B, ...)`, *optional*): x_0 of the trajectories, if they were finished.
        final_scores (`torch.Tensor` of shape `(B,)`, *optional*): their scores at timestep 0.
        final_parts (`dict[str, torch.Tensor]`): of several rewards the scores `(B,)` of each.
        nonfinite (list of [`NonFinite`]): pairs that were given up, one entry per prompt and branch.
    """

    latents: torch.Tensor
    chosen_prev_latents: torch.Tensor
    rejected_latents: torch.Tensor
    rejected_prev_latents: torch.Tensor
    shared: torch.Tensor
    timesteps: torch.Tensor
    prompt_index: torch.Tensor
    chosen_scores: torch.Tensor
    rejected_scores: torch.Tensor
    prompts: list[str]
    branches: list[BranchRecord] = field(default_factory=list)
    final_latents: torch.Tensor | None = None
    final_scores: torch.Tensor | None = None
    final_parts: dict[str, torch.Tensor] = field(default_factory=dict)
    nonfinite: list[NonFinite] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.latents)

    @classmethod
    def tensor_names(cls) -> list[str]:
        """Names of the per-pair tensors."""
        of_rollout = ("prompts", "branches", "final_latents", "final_scores", "final_parts", "nonfinite")
        return [f.name for f in fields(cls) if f.name not in of_rollout]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The per-pair tensors by name."""
        return {name: getattr(self, name) for name in self.tensor_names()}

    @property
    def nbytes(self) -> int:
        """Memory of the per-pair tensors."""
        return sum(value.nbytes for value in self.tensors().values())

    def __getitem__(self, index: torch.Tensor | slice) -> "StepPairs":
        """
        Pairs by index tensor or slice; the record of the rollout stays behind. A slice shares its memory with the whole. An
        index on the CPU makes nothing wait for the device of the pairs.
        """
        if isinstance(index, slice):
            picked = {name: value[index] for name, value in self.tensors().items()}
            return StepPairs(**picked, prompts=self.prompts[index])
        rows = torch.arange(len(self))[index.cpu()]
        on = {}  # device -> the index there
        for value in self.tensors().values():
            if value.device not in on:
                on[value.device] = rows.to(value.device, non_blocking=True)
        picked = {name: value[on[value.device]] for name, value in self.tensors().items()}
        return StepPairs(**picked, prompts=[self.prompts[i] for i in rows.tolist()])

    def to(self, device, non_blocking: bool = False) -> "StepPairs":
        """The per-pair tensors on a device, all but `shared`."""
        moved = {name: value.to(device, non_blocking=non_blocking) for name, value in self.tensors().items()}
        return replace(self, **{**moved, "shared": self.shared.cpu()})

    def pin_memory(self) -> "StepPairs":
        """What is on the CPU in page-locked memory, from where copies to a GPU do not stop the host."""
        on_cpu = {name: value for name, value in self.tensors().items() if value.device.type == "cpu"}
        return replace(self, **{name: value.pin_memory() for name, value in on_cpu.items()})

    @classmethod
    def cat(cls, parts: list["StepPairs"]) -> "StepPairs":
        """One collection from several, in order; records of rollouts stay behind."""
        joined = {}
        for name in cls.tensor_names():
            joined[name] = torch.cat([getattr(part, name) for part in parts])
        prompts = []
        for part in parts:
            prompts += part.prompts
        return cls(**joined, prompts=prompts)
