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
Which prompts a process rolls out next: of a list, whose order a seed draws anew for every pass ([`ListedPrompts`]), or of a dataset
that is streamed ([`StreamedPrompts`]).
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers.utils import logging

from .prompts import PromptStream, check_prompt
from .row_stream import RowStream


logger = logging.get_logger(__name__)

MOST_FAULTY_IN_A_ROW = 1000  # prompts of a stream that cannot be used


class PromptSource(Protocol):
    """The prompts of a run, for one of its processes. All processes ask for the next ones at the same time."""

    size: float
    """Prompts of one pass; `math.inf` if that is not known."""

    def take(self, start: int, count: int) -> list[str]:
        """This process's part of the next `count` prompts of all processes, of which `start` have been taken before."""

    def passes(self, num_taken: int) -> float:
        """Passes over the prompts so far."""

    def state_dict(self) -> dict[str, Any]:
        """What this process adds to the number of prompts that were taken, for JSON."""

    def check(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: if the state of a checkpoint belongs to other prompts.
        """

    def load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        """Continue from the states of all processes, in the order of their ranks."""


class ListedPrompts:
    """
    Prompts that all can be looked up. The order of a pass is a function of the seed and its number, so the number of prompts that
    were taken is all the state there is.

    Args:
        prompts (sequence of `str`): of all processes.
        rank (`int`), num_processes (`int`): of this process.
        seed (`int`): of the orders.
    """

    def __init__(self, prompts: Sequence[str], rank: int, num_processes: int, seed: int):
        self.prompts = prompts
        self.rank = rank
        self.num_processes = num_processes
        self.seed = seed
        self.size = len(prompts)
        self._order: tuple[int, torch.Tensor] | None = None  # of the pass it was drawn for

    def take(self, start: int, count: int) -> list[str]:
        """This process's part of prompts `start` to `start + count`, which lie in one pass."""
        number, position = divmod(start, len(self.prompts))
        if self._order is None or self._order[0] != number:
            generator = torch.Generator().manual_seed(self.seed + number)
            self._order = (number, torch.randperm(len(self.prompts), generator=generator))
        indices = self._order[1][position : position + count].tolist()
        return [self.prompts[i] for i in indices[self.rank :: self.num_processes]]

    def passes(self, num_taken: int) -> float:
        return num_taken / len(self.prompts)

    @functools.cached_property
    def _hash(self) -> str:
        digest = hashlib.sha256()
        for i, prompt in enumerate(self.prompts):
            digest.update(("\0" * (i > 0) + prompt).encode())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        return {"num_prompts": len(self.prompts), "prompts_hash": self._hash}

    def check(self, state: dict[str, Any]) -> None:
        if state.get("num_prompts") == len(self.prompts) and state.get("prompts_hash") == self._hash:
            return
        other = "streamed prompts" if "place" in state else f"{state['num_prompts']} other prompts"
        raise ValueError(
            f"The checkpoint was written with {other} than the {len(self.prompts)} of this run. Resume with the same "
            "`train_dataset`."
        )

    def load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        self.check(states[0])


class StreamedPrompts:
    """
    The prompts of a stream, of which each process reads files of its own ([`RowStream`]). A prompt that cannot be used is left
    out with a warning.

    Args:
        prompts ([`PromptStream`]): the same in all processes.
        rank (`int`), num_processes (`int`): of this process.
        seed (`int`): of the order.
    """

    size = math.inf

    def __init__(self, prompts: PromptStream, rank: int, num_processes: int, seed: int):
        self.prompts = prompts
        self.rank = rank
        self.num_processes = num_processes
        self.num_read = 0
        self.num_left_out = 0
        self._rows = RowStream(prompts.dataset, rank, num_processes, seed)

    def take(self, start: int, count: int) -> list[str]:
        return [self._next() for _ in range(len(range(self.rank, count, self.num_processes)))]

    def _next(self) -> str:
        for _ in range(MOST_FAULTY_IN_A_ROW):
            prompt = next(self._rows)[self.prompts.column]
            try:
                check_prompt(prompt, self.num_read, "train_dataset")
                return prompt
            except ValueError as error:
                fault = error
            finally:
                self.num_read += 1
            if self.num_left_out == 0:
                logger.warning(f"{fault} It is left out, as others like it will be.")
            self.num_left_out += 1
        raise ValueError(
            f"{MOST_FAULTY_IN_A_ROW} rows of the stream in a row have no prompt that can be used. {fault} Is "
            f"{self.prompts.column!r} the column of the prompts? If not, set `dataset_prompt_column`."
        )

    def passes(self, num_taken: int) -> float:
        return self._rows.passes

    def state_dict(self) -> dict[str, Any]:
        return {"num_shards": self._rows.num_shards, "column": self.prompts.column, "place": self._rows.place}

    def check(self, state: dict[str, Any]) -> None:
        if state.get("num_shards") == self._rows.num_shards and state.get("column") == self.prompts.column:
            return
        other = "no stream of prompts"
        if "place" in state:
            other = f"a stream of {state['num_shards']} shards with the column {state['column']!r}"
        raise ValueError(
            f"The checkpoint was written with {other}, and this run has one of {self._rows.num_shards} shards with the column "
            f"{self.prompts.column!r}. Resume with the same `train_dataset`."
        )

    def load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        self.check(states[0])
        self._rows.go_to(self._rows.own_place([state["place"] for state in states]))
