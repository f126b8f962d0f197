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
Preference pairs of a stream for a data loader ([`StreamedPairs`]). Loaders read ahead of what has been trained on, also in processes
of their own, so each batch tells where its reader is behind it, and a checkpoint keeps that.
"""

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import fsspec.asyn
from torch.utils.data import IterableDataset, get_worker_info

from .row_stream import RowStream


BLOCK_SIZE = 1000  # pairs that are mixed, with their undecoded images


class StreamedPairs(IterableDataset):
    """
    Pairs of a stream, without end. Each process that loads data is a reader with files of its own ([`RowStream`]); the loader takes
    batches from them in turn. Give the loader [`WithPlace`] as `collate_fn`.

    Args:
        dataset (`datasets.IterableDataset`): the pairs.
        rank (`int`), num_processes (`int`): of the process that trains.
        num_workers (`int`): its processes that load data; with 0 it loads by itself.
        seed (`int`): of the order.

    Raises:
        ValueError: if there are fewer files than readers.
    """

    def __init__(self, dataset: datasets.IterableDataset, rank: int, num_processes: int, num_workers: int, seed: int):
        own = max(num_workers, 1)
        numbers = range(rank * own, (rank + 1) * own)
        self.readers = [
            RowStream(dataset, number, num_processes * own, seed, block_size=BLOCK_SIZE) for number in numbers
        ]
        self.restart()

    @property
    def num_shards(self) -> int:
        """Shards of one pass over the dataset."""
        return self.readers[0].num_shards

    def restart(self) -> None:
        """Begin at the first pair of the first pass."""
        for reader in self.readers:
            reader.restart()
        self._places = [reader.place for reader in self.readers]
        self._next = 0  # the reader whose turn it is

    def __iter__(self) -> Iterator[tuple[dict[str, Any], tuple[int, dict[str, Any]]]]:
        # Files are opened here, by the process that reads: one that is started with open files of another may hang.
        worker = get_worker_info()
        if worker is not None:
            fsspec.asyn.reset_lock()  # of remote files, which a process inherits from the one that started it
        number = (self._next + (0 if worker is None else worker.id)) % len(self.readers)
        reader = self.readers[number]
        reader.go_to(self._places[number])
        for row in reader:
            yield row, (number, reader.place)

    def has_been_trained_on(self, behind: tuple[int, dict[str, Any]]) -> None:
        """What [`WithPlace`] says about a batch, when it is trained on."""
        number, place = behind
        self._places[number] = place
        self._next = (number + 1) % len(self.readers)

    def state_dict(self) -> dict[str, Any]:
        """Where this process is: numbers and names that JSON can keep."""
        return {"num_shards": self.num_shards, "places": self._places, "next": self._next}

    def load_state_dicts(self, states: list[dict[str, Any] | None]) -> None:
        """
        Go on where a run was.

        Args:
            states (`list`): `state_dict()` of all its processes in order; of as many readers, otherwise what they had not read of
                their files is left out in this pass. `None`: of a process that had no stream.

        Raises:
            ValueError: if the states are those of another stream, or of none.
        """
        found = {None if state is None else state["num_shards"] for state in states}
        if found != {self.num_shards}:
            before = "without `dataset_streaming`" if None in found else f"on a stream of {found.pop()} shards"
            raise ValueError(
                f"The checkpoint was written {before}, and this run has a stream of {self.num_shards} shards. Resume with the same "
                "`train_dataset` and `dataset_streaming`."
            )
        places = [place for state in states for place in state["places"]]
        self._places = [reader.own_place(places) for reader in self.readers]
        same_readers = len(places) == self.readers[0].num_readers and len(states[0]["places"]) == len(self.readers)
        self._next = states[0]["next"] if same_readers else 0


class WithPlace:
    """
    Makes batches of what [`StreamedPairs`] yields, with the entry `place`: the reader of the batch, and where that is behind it.

    Args:
        collate (`Callable`): makes a batch, a dictionary, of rows.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, items: list[tuple[dict, tuple]]) -> dict[str, Any]:
        rows, behind = zip(*items, strict=True)
        return {**self.collate(list(rows)), "place": behind[-1]}
