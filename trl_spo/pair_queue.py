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
The pairs that wait for their optimizer step. Each process keeps those that it has found; all of them know the order in which they
will be trained on, so that a step takes the same pairs wherever they are, and few of them have to travel.
"""

from typing import NamedTuple, Protocol

import torch

from .step_pairs import StepPairs


class Processes(Protocol):
    """How the processes of a run meet. All of them call the same method at the same time."""

    def gather(self, own) -> list:
        """What every process has, in the order of their ranks."""

    def exchange(self, rows: torch.Tensor, num_sent: list[int], num_received: list[int]) -> torch.Tensor:
        """
        Send rows to other processes.

        Args:
            rows (`torch.Tensor` of shape `(sum of num_sent, W)`, uint8): those for rank 0 first, then those for rank 1, ...
            num_sent (`list[int]`): how many of them each rank gets.
            num_received (`list[int]`): how many each rank sends here.

        Returns:
            `torch.Tensor` of shape `(sum of num_received, W)`: in the order of the ranks that sent them.
        """


class RowLayout(NamedTuple):
    """
    How a pair is written into one row of bytes, so that all of it travels at once.

    Attributes:
        dtypes (`dict[str, torch.dtype]`): of the tensors of [`StepPairs`].
        shapes (`dict[str, tuple[int, ...]]`): of one pair of them.
    """

    dtypes: dict[str, torch.dtype]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, pairs: StepPairs) -> "RowLayout":
        """That of pairs as they are."""
        tensors = pairs.tensors()
        dtypes = {name: value.dtype for name, value in tensors.items()}
        return cls(dtypes, {name: tuple(value.shape[1:]) for name, value in tensors.items()})

    def joined(self, other: "RowLayout | None") -> "RowLayout":
        """One that holds the numbers of both, as `torch.cat` would: a checkpoint may have been written in another precision."""
        if other is None:
            return self
        dtypes = {name: torch.promote_types(dtype, other.dtypes[name]) for name, dtype in self.dtypes.items()}
        return RowLayout(dtypes, self.shapes)

    @property
    def widths(self) -> list[int]:
        """Bytes of each tensor of a pair."""
        return [
            torch.empty(shape, dtype=self.dtypes[name], device="meta").nbytes for name, shape in self.shapes.items()
        ]

    def pack(self, pairs: StepPairs) -> torch.Tensor:
        """Pairs, on the device of their latents, as a tensor of shape `(N, sum of widths)`, uint8."""
        columns = []
        for name, width in zip(self.shapes, self.widths, strict=True):
            values = getattr(pairs, name).to(pairs.latents.device, self.dtypes[name]).contiguous()
            columns.append(values.reshape(len(pairs), -1).view(torch.uint8).reshape(len(pairs), width))
        return torch.cat(columns, dim=1)

    def unpack(self, rows: torch.Tensor, prompts: list[str]) -> StepPairs:
        """The pairs that [`~RowLayout.pack`] wrote, with their prompts, which travelled before."""
        tensors = {}
        columns = rows.split(self.widths, dim=1)
        for (name, shape), column in zip(self.shapes.items(), columns, strict=True):
            # A copy: bytes in the middle of a row need not start where a number of that type may.
            values = column.clone(memory_format=torch.contiguous_format).view(-1).view(self.dtypes[name])
            tensors[name] = values.view(len(rows), *shape)
        return StepPairs(**{**tensors, "shared": tensors["shared"].cpu()}, prompts=prompts)


def share_out(owners: torch.Tensor, num_processes: int) -> torch.Tensor:
    """
    Who trains on the pairs of a step: equally many for every process, and as many as possible where they are.

    Args:
        owners (`torch.Tensor` of shape `(N,)`, int64): rank of the process that has each pair. N is a multiple of
            `num_processes`.
        num_processes (`int`): how many there are.

    Returns:
        `torch.Tensor` of shape `(N,)`, int64: the rank that trains on each pair.
    """
    share = len(owners) // num_processes
    counts = owners.bincount(minlength=num_processes)
    # The number of each pair among those of its owner: what exceeds the share leaves.
    by_owner = owners.argsort(stable=True)
    first_of_owner = counts.cumsum(0) - counts
    number = torch.empty_like(owners)
    number[by_owner] = torch.arange(len(owners)) - first_of_owner.repeat_interleave(counts)
    missing = (share - counts).clamp(min=0)
    trainers = owners.clone()
    trainers[number >= share] = torch.arange(num_processes).repeat_interleave(missing)
    return trainers


class PairQueue:
    """
    Pairs of all processes in the order in which they are trained on.

    What every process knows of each pair is its owner, its number, its prompt, and whether it is trained on for the first time.
    Latents are kept by the owner alone. All methods but `len` are called by all processes at the same time.

    Args:
        rank (`int`, *optional*, defaults to `0`): number of this process.
        num_processes (`int`, *optional*, defaults to `1`): how many there are.
        processes ([`Processes`], *optional*): how they meet; needed for several.
        max_device_bytes (`int`, *optional*): more than that waits on the CPU.
    """

    def __init__(
        self,
        rank: int = 0,
        num_processes: int = 1,
        processes: Processes | None = None,
        max_device_bytes: float = float("inf"),
    ):
        self.rank = rank
        self.num_processes = num_processes
        self.processes = processes
        self.max_device_bytes = max_device_bytes
        self.prompts: list[str] = []
        self.is_fresh = torch.empty(0, dtype=torch.bool)
        self._owners = torch.empty(0, dtype=torch.int64)
        self._ids = torch.empty(0, dtype=torch.int64)
        self._next_id = 0
        self._pairs: StepPairs | None = None  # own ones, also some that have been trained on
        self._own_ids = torch.empty(0, dtype=torch.int64)  # theirs, ascending
        self._layout: RowLayout | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, own: StepPairs | None, num_iterations: int = 1, seed: int = 0) -> None:
        """
        Append the pairs that all processes have found, in an order that the seed draws.

        Args:
            own ([`StepPairs`], *optional*): those of this process.
            num_iterations (`int`, *optional*, defaults to `1`): times that each will be trained on, every time in another
                order, after all of them have been seen.
            seed (`int`, *optional*, defaults to `0`): of the orders, the same everywhere.
        """
        # What is said about the pairs of a process: their prompts, and what a row of them looks like.
        said = ([], None) if own is None else (own.prompts, RowLayout.of(own))
        of_all = self._gather(said)
        prompts = []
        counts = []
        for names, layout in of_all:
            prompts += names
            counts.append(len(names))
            if names:
                self._layout = layout.joined(self._layout)
        owners = torch.arange(self.num_processes).repeat_interleave(torch.tensor(counts))
        ids = self._next_id + torch.arange(len(prompts))
        self._next_id += len(prompts)
        if own is not None:
            self._keep(own, ids[owners == self.rank])

        shuffle = torch.Generator().manual_seed(seed)
        for iteration in range(num_iterations):
            order = torch.randperm(len(prompts), generator=shuffle)
            self._owners = torch.cat([self._owners, owners[order]])
            self._ids = torch.cat([self._ids, ids[order]])
            self.is_fresh = torch.cat([self.is_fresh, torch.full_like(order, iteration == 0, dtype=torch.bool)])
            self.prompts += [prompts[i] for i in order.tolist()]

    def take(self, total: int) -> tuple[StepPairs, torch.Tensor]:
        """
        The first `total` pairs leave the queue, in equal shares for all processes.

        Args:
            total (`int`): a multiple of the number of processes, at most all that wait.

        Returns:
            `tuple` of the share of this process ([`StepPairs`]), in the order of the queue, and a `torch.Tensor` of shape
            `(total / num_processes,)`, bool: which of its pairs are trained on for the first time.
        """
        trainers = share_out(self._owners[:total], self.num_processes)
        own = self._collect(trainers)
        is_fresh = self.is_fresh[:total][trainers == self.rank]
        self.prompts = self.prompts[total:]
        self.is_fresh = self.is_fresh[total:]
        self._owners = self._owners[total:]
        self._ids = self._ids[total:]
        return own, is_fresh

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """
        All pairs in the order of the queue: numbers and strings for JSON, and under `pool` their tensors, which the first process
        gets and no other.
        """
        pairs = self._collect(torch.zeros(len(self), dtype=torch.int64)) if len(self) else None
        return {
            "pool_prompts": list(self.prompts),
            "pool_is_fresh": self.is_fresh.tolist(),
            "pool_owners": self._owners.tolist(),
            "pool_num_processes": self.num_processes,
            "pool": pairs.tensors() if pairs is not None and self.rank == 0 else {},
        }

    def load_state_dict(self, state: dict) -> None:
        """
        Go on from what [`~PairQueue.state_dict`] returned; every process is given the tensors of all pairs. With another number of
        processes they are spread evenly.
        """
        count = len(state["pool_prompts"])
        self.prompts = list(state["pool_prompts"])
        # Old checkpoints say neither: every pair was trained on once, and every process had all of them.
        self.is_fresh = torch.tensor(state.get("pool_is_fresh", [True] * count), dtype=torch.bool)
        self._owners = torch.arange(count) * self.num_processes // max(count, 1)
        if state.get("pool_num_processes") == self.num_processes:
            self._owners = torch.tensor(state["pool_owners"], dtype=torch.int64)
        self._ids = self._next_id + torch.arange(count)
        self._next_id += count
        self._pairs = None
        self._own_ids = torch.empty(0, dtype=torch.int64)
        if not count:
            return
        everything = StepPairs(**state["pool"], prompts=self.prompts)
        self._layout = RowLayout.of(everything).joined(self._layout)
        is_own = self._owners == self.rank
        self._keep(everything[is_own], self._ids[is_own])

    # --- where pairs are ---------------------------------------------------------------------------------------------

    def _gather(self, said) -> list:
        return [said] if self.processes is None else self.processes.gather(said)

    def _keep(self, own: StepPairs, ids: torch.Tensor) -> None:
        """Own pairs join those that still wait, on the device of the new ones while they are few."""
        together = [own]
        if self._pairs is not None:
            waits = torch.isin(self._own_ids, self._ids)
            together.insert(0, self._pairs[waits])
            ids = torch.cat([self._own_ids[waits], ids])
        is_small = sum(part.nbytes for part in together) <= self.max_device_bytes
        home = own.latents.device if is_small else "cpu"
        self._pairs = StepPairs.cat([part.to(home) for part in together])
        self._own_ids = ids

    def _own(self, ids: torch.Tensor) -> StepPairs | None:
        """Pairs of this process by their numbers."""
        return None if self._pairs is None else self._pairs[torch.searchsorted(self._own_ids, ids)]

    def _collect(self, trainers: torch.Tensor) -> StepPairs:
        """The first pairs of the queue that `trainers` gives to this process, wherever they are."""
        owners = self._owners[: len(trainers)]
        ids = self._ids[: len(trainers)]
        is_here = trainers == self.rank
        if torch.equal(owners, trainers):  # as always in a single process: nothing travels
            return self._own(ids[is_here])

        # Sent in the order of who gets them, received in the order of who sent them, each in the order of the queue.
        sent = ((owners == self.rank) & ~is_here).nonzero().flatten()
        sent = sent[trainers[sent].argsort(stable=True)]
        received = (is_here & (owners != self.rank)).nonzero().flatten()
        received = received[owners[received].argsort(stable=True)]
        rows = torch.empty(0, sum(self._layout.widths), dtype=torch.uint8)
        if len(sent):
            rows = self._layout.pack(self._own(ids[sent]))
        num_sent = trainers[sent].bincount(minlength=self.num_processes).tolist()
        num_received = owners[received].bincount(minlength=self.num_processes).tolist()
        rows = self.processes.exchange(rows, num_sent, num_received)

        # Own ones and those from elsewhere, back in the order of the queue.
        kept = (is_here & (owners == self.rank)).nonzero().flatten()
        home = rows.device if self._pairs is None else self._pairs.latents.device
        parts = [self._layout.unpack(rows, [self.prompts[i] for i in received.tolist()]).to(home)]
        if len(kept):
            parts.insert(0, self._own(ids[kept]))
        order = torch.cat([kept, received]).argsort()
        return StepPairs.cat(parts)[order]
