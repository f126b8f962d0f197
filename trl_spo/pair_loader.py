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

"""The dataloader of [`SPOTrainer`]: it rolls out prompts whenever an optimizer step needs more pairs, and deals pairs out."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers.utils import logging

from .pair_queue import PairQueue, Processes
from .prompt_source import ListedPrompts, PromptSource, StreamedPrompts
from .prompts import PromptStream
from .step_pairs import StepPairs


logger = logging.get_logger(__name__)

MAX_DEVICE_BYTES = 2**30  # of pairs that wait on the device of the rollout; 160 of SD1.5 in half precision take 20 MiB
MOST_ROUNDS_AHEAD = 16
MIN_PROMPTS_TO_GIVE_UP = 100  # without a single valid pair; in small datasets they are seen several times


@dataclass(frozen=True)
class LoaderSizes:
    r"""
    The sizes of rollouts, micro-batches and steps.

    Args:
        prompts_per_rollout (`int`): prompts that one process rolls out together.
        pairs_per_micro_batch (`int`): pairs of one process in a micro-batch, where there are enough of them.
        micro_batches_per_step (`int`): micro-batches of one process between two optimizer steps.
        max_pairs_per_prompt (`int`): pairs that one prompt gives if every branch gives a valid one per transition.
        num_epochs (`float`): passes over the prompts; `math.inf` where steps end the run.
        num_iterations (`int`, *optional*, defaults to `1`): times that each pair is trained on.
        rank (`int`, *optional*, defaults to `0`): number of this process.
        world_size (`int`, *optional*, defaults to `1`): number of processes.
        looks_ahead (`bool`, *optional*, defaults to `False`): start the rollouts of the next optimizer step before this one
            changes the weights, so that both can run at once. Its pairs are then those of a policy one step older.
        every_rank_rolls_out (`bool`, *optional*, defaults to `False`): call the rollout in every round, for no prompts where
            none is left for this process: the processes share a denoiser that all of them must call.
    """

    prompts_per_rollout: int
    pairs_per_micro_batch: int
    micro_batches_per_step: int
    max_pairs_per_prompt: int
    num_epochs: float
    num_iterations: int = 1
    rank: int = 0
    world_size: int = 1
    looks_ahead: bool = False
    every_rank_rolls_out: bool = False

    @property
    def pairs_per_step(self) -> int:
        """Pairs of one optimizer step, over all processes."""
        return self.pairs_per_micro_batch * self.micro_batches_per_step * self.world_size


class PairLoader:
    r"""
    The train dataloader of SPO. It rolls out prompts whenever fewer pairs are waiting than an optimizer step needs, queues
    the pairs of all processes, and deals them out evenly.

    All processes know the queue, and each holds the pairs that it has found ([`PairQueue`]). An optimizer step takes the same
    number of pairs everywhere: a process that has found more of them than others sends what is too much. What a step does not
    use stays in the queue, across epochs and, through `state_dict`, across checkpoints. Prompt order and rollout noise are
    functions of the seed and the position in the prompts, so the position is all the random state there is.

    Args:
        prompts (sequence of `str`, or [`PromptStream`]): of all processes. With a stream the loader has no length and no
            epochs, and each process reads files of its own.
        rollout (`Callable[[list[str], int], StepPairs]`):
            Makes pairs of prompts, with the randomness of a number. Processes call it at the same time with the same
            number and prompts of their own. It may start the work elsewhere and return a function that waits for the
            pairs, and returns `None` if there were no prompts.
        sizes ([`LoaderSizes`]): of rollouts and micro-batches.
        processes ([`Processes`], *optional*): how the processes meet; needed for several.
        seed (`int`, *optional*, defaults to `0`): of the order of prompts and pairs.
        why_no_pairs (`Callable[[], str]`, *optional*): what to say when prompts give no valid pair.
        pin_memory (`bool`, *optional*, defaults to `False`): hand out micro-batches that can be copied to a GPU without waiting.
        max_device_bytes (`int`, *optional*, defaults to 1 GiB): pairs wait where the rollout made them while those of this
            process take no more than this; otherwise on the CPU.
        goes_on (`Callable[[], bool]`, *optional*): whether another step follows the one that is dealt out; asked before the
            loader looks ahead.

    Yields:
        `dict`: `pairs` ([`StepPairs`]) of one micro-batch and `is_fresh` (`list[bool]`), which of them are trained on for the
        first time, with `num_pairs` of the optimizer step in this process, and `num_micro_batches` of the step.
    """

    def __init__(
        self,
        prompts: Sequence[str] | PromptStream,
        rollout: Callable[[list[str], int], StepPairs | Callable[[], StepPairs | None]],
        sizes: LoaderSizes,
        processes: Processes | None = None,
        seed: int = 0,
        why_no_pairs: Callable[[], str] = lambda: "",
        pin_memory: bool = False,
        max_device_bytes: int = MAX_DEVICE_BYTES,
        goes_on: Callable[[], bool] = lambda: True,
    ):
        if sizes.world_size > 1 and processes is None:
            raise ValueError(f"`processes` is needed to share the pairs of {sizes.world_size} processes, got None.")
        source = StreamedPrompts if isinstance(prompts, PromptStream) else ListedPrompts
        self.prompts = prompts
        self.source: PromptSource = source(prompts, sizes.rank, sizes.world_size, seed)
        self.rollout = rollout
        self.sizes = sizes
        self.seed = seed
        self.why_no_pairs = why_no_pairs
        self.pin_memory = pin_memory
        self.goes_on = goes_on
        self.processes = processes
        self.queue = PairQueue(sizes.rank, sizes.world_size, processes, max_device_bytes)
        self.dataset = prompts  # the name under which `Trainer` asks for the number of examples
        self.num_prompts_seen = 0
        self.num_pairs_seen = 0
        # Started and not joined: what the rollout returned, and the position of the round.
        self._rounds: list[tuple] = []
        self._pairs_of_last_round = 0

    # --- sizes -------------------------------------------------------------------------------------------------------

    @property
    def pairs_per_step(self) -> int:
        """Pairs of one optimizer step, over all processes."""
        return self.sizes.pairs_per_step

    @property
    def total_prompts(self) -> float:
        """Prompts of the whole run."""
        total = self.sizes.num_epochs * self.source.size
        return total if math.isinf(total) else math.ceil(total)

    def __len__(self) -> int:
        """
        Upper bound on the micro-batches of one epoch: every branch gives a valid pair, and the queue starts as full as it
        can be. Real epochs are shorter.

        Raises:
            TypeError: of a stream, as of everything that has no length.
        """
        if math.isinf(self.source.size):
            raise TypeError("A stream of prompts has no length.")
        pairs = self.source.size * self.sizes.max_pairs_per_prompt * self.sizes.num_iterations
        left = self.pairs_per_step - 1 if self.total_prompts > self.source.size else 0
        return math.ceil((pairs + left) / self.pairs_per_step) * self.sizes.micro_batches_per_step

    @property
    def waiting(self) -> int:
        """Pairs in the queue, of all processes."""
        return len(self.queue)

    @property
    def epoch(self) -> float:
        """Passes over the prompts so far; of a stream, those of this process to a file."""
        return self.source.passes(self.num_prompts_seen)

    @property
    def epoch_finished(self) -> bool:
        """
        True if every prompt of this epoch has been rolled out, another epoch follows, and too few pairs are left for a
        step; they carry over.
        """
        if self._rounds or self.waiting >= self.pairs_per_step:
            return False
        return self.num_prompts_seen < self.total_prompts and self._is_between_epochs

    @property
    def _is_between_epochs(self) -> bool:
        """Whether all prompts of this epoch have been handed out, or none; a stream has no epochs."""
        return not math.isinf(self.source.size) and self.num_prompts_seen % self.source.size == 0

    @property
    def exhausted(self) -> bool:
        """There is nothing left to train on."""
        smallest = self.sizes.micro_batches_per_step * self.sizes.world_size
        return self.num_prompts_seen >= self.total_prompts and self.waiting < smallest and not self._rounds

    # --- iteration ---------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[dict]:
        while (micro_batches := self._next_step()) is not None:
            yield from micro_batches

    def _next_step(self) -> list[dict] | None:
        """This process's micro-batches of one optimizer step, or `None` at the end of training."""
        self._join_rounds()
        self._fill_queue()

        # The last step of a run takes what is left, as long as every micro-batch of every process gets a pair.
        accumulation = self.sizes.micro_batches_per_step
        world_size = self.sizes.world_size
        total = min(self.waiting, self.pairs_per_step)
        total -= total % world_size
        if total < accumulation * world_size:
            return None
        own, is_fresh = self.queue.take(total)
        self.num_pairs_seen += total
        self._look_ahead()

        # Each process has its own share, in micro-batches of nearly the same size.
        parts = []
        first = 0
        for rows in torch.arange(len(own)).tensor_split(accumulation):
            parts.append(own[first : first + len(rows)])
            first += len(rows)
        if self.pin_memory:
            parts = [part.pin_memory() for part in parts]
        fresh_parts = is_fresh.split([len(part) for part in parts])
        sizes = {"num_pairs": len(own), "num_micro_batches": accumulation}
        # As a list: transformers moves tensors of a batch to the device, and the host would wait for that.
        return [
            {"pairs": part, "is_fresh": fresh.tolist(), **sizes}
            for part, fresh in zip(parts, fresh_parts, strict=True)
        ]

    def _fill_queue(self):
        """
        Roll out prompts until the queue has the pairs of a step, or the prompts of the run are used up.

        Raises:
            RuntimeError: if prompt after prompt gives no valid pair.
        """
        without_pair = 0  # prompts in a row
        patience = MIN_PROMPTS_TO_GIVE_UP
        if not math.isinf(self.source.size):
            patience = max(patience, self.source.size)
        while self.waiting < self.pairs_per_step and self.num_prompts_seen < self.total_prompts:
            seen = self.num_prompts_seen
            waiting = self.waiting
            self._rollout_round()
            without_pair = 0 if self.waiting > waiting else without_pair + self.num_prompts_seen - seen
            if not without_pair:
                continue
            never_any = self.num_prompts_seen >= self.total_prompts and not self.num_pairs_seen and not self.waiting
            if never_any or without_pair >= patience:
                raise RuntimeError(f"No valid pair in {without_pair} prompts. {self.why_no_pairs()}")
            if seen == 0:
                logger.warning(f"The first {without_pair} prompts gave no valid pair. {self.why_no_pairs()}")

    def _rollout_round(self):
        """One rollout per process, on prompts that no other process has; its pairs join the queue of all."""
        self._start_round()
        self._join_rounds()

    def _start_round(self):
        """Hand the next prompts to the rollout, under the weights as they are."""
        prompts, start, size = self._next_prompts()
        result = None
        if prompts or self.sizes.every_rank_rolls_out:
            result = self.rollout(prompts, start)
        self._rounds.append((result, start))
        self.num_prompts_seen += size

    def _join_rounds(self):
        """Wait for the rollouts that were started; their pairs join the queue of all, in the order of the rounds."""
        while self._rounds:
            result, start = self._rounds.pop(0)
            if callable(result):
                result = result()
            own = None if result is None else StepPairs.cat([result])  # `cat` leaves the record of the rollout behind
            waiting = self.waiting
            self.queue.add(own, self.sizes.num_iterations, seed=self.seed + 1 + start)
            self._pairs_of_last_round = self.waiting - waiting

    def _look_ahead(self):
        """
        Start the rollouts that the next step will need, as many as the last round says, before this step changes the weights.
        None across the end of an epoch, which would not be noticed.
        """
        missing = self.pairs_per_step - self.waiting
        if not self.sizes.looks_ahead or missing <= 0 or not self.goes_on():
            return
        for _ in range(min(math.ceil(missing / max(self._pairs_of_last_round, 1)), MOST_ROUNDS_AHEAD)):
            if self.num_prompts_seen >= self.total_prompts or self._is_between_epochs:
                return
            self._start_round()

    def _next_prompts(self) -> tuple[list[str], int, int]:
        """This process's prompts of the next round, the position where the round starts, and its size over all processes."""
        start = self.num_prompts_seen
        size = self.sizes.prompts_per_rollout * self.sizes.world_size
        left = self.total_prompts - start
        if not math.isinf(self.source.size):
            left = min(left, self.source.size - start % self.source.size)  # a round lies in one epoch
        size = int(min(size, left))
        return self.source.take(start, size), start, size

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """
        The position in the prompts and the pairs that were not trained on yet: numbers and strings for JSON, and under
        `pool` the tensors of the pairs, which the first process gets and no other. Every process must call it.
        """
        self._join_rounds()  # their pairs are in the checkpoint, and would join the queue before the next step anyway
        own = self.source.state_dict()
        states = [own] if self.processes is None else self.processes.gather(own)
        return {
            "prompt_sources": states,
            "num_prompts_seen": self.num_prompts_seen,
            "num_pairs_seen": self.num_pairs_seen,
            "pairs_of_last_round": self._pairs_of_last_round,
            **self.queue.state_dict(),
        }

    def load_state_dict(self, state: dict):
        """
        Continue from what [`~PairLoader.state_dict`] returned in the first process, which every process is given. Other entries
        are not looked at.

        Raises:
            ValueError: if it belongs to another prompt dataset.
        """
        self.source.load_state_dicts(state.get("prompt_sources", [state]))  # old checkpoints: of one source
        self.num_prompts_seen = state["num_prompts_seen"]
        self.num_pairs_seen = state["num_pairs_seen"]
        self._pairs_of_last_round = state.get("pairs_of_last_round", 0)
        self.queue.load_state_dict(state)
