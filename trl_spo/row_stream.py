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
Rows of a dataset that is streamed ([`RowStream`]): each process reads shards of its own, in an order that a seed draws, and a
checkpoint knows the place in them.
"""

import weakref
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from datasets import IterableDataset
from torch.utils.data import get_worker_info


MOST_EMPTY_PASSES = 10  # shards are in another order in each pass, so one reader may miss the few that have rows


class RowStream:
    r"""
    Endless rows of a `datasets.IterableDataset` for one of several readers.

    The shards of a dataset are its files. Those of pass after pass over the dataset, each pass in an order of its own, form one
    sequence, and of W readers each takes every W-th shard of it. So a reader never waits for another, and all shards are read
    equally often, to one pass. Within a shard rows are read in blocks, and a block is given out in random order; with one
    block in memory, that of a reader does not grow with the dataset. Rows that are far apart in a shard, or in different shards, are
    not mixed: files that hold one kind of row each should be mixed when they are written.

    `place` says where the next row is. A reader that is given it opens that shard alone and reads no more than the rows
    between the last group of rows of the file and the place.

    Args:
        dataset (`datasets.IterableDataset`): with at least `num_readers` shards. Fewer shards are split into the groups of rows
            of their files where datasets can do that, as with parquet.
        reader (`int`, *optional*, defaults to `0`): number of this reader.
        num_readers (`int`, *optional*, defaults to `1`): how many there are.
        seed (`int`, *optional*, defaults to `0`): of both orders, the same for all readers.
        block_size (`int`, *optional*, defaults to `10_000`): rows that are mixed.

    Yields:
        `dict`: a row.

    Raises:
        ValueError: if there are fewer shards than readers, or shard after shard has no row.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        reader: int = 0,
        num_readers: int = 1,
        seed: int = 0,
        block_size: int = 10_000,
    ):
        if dataset.num_shards < num_readers and hasattr(dataset, "reshard"):
            dataset = dataset.reshard()
        if dataset.num_shards < num_readers:
            raise ValueError(
                f"The stream has {dataset.num_shards} shards for {num_readers} processes that read, each of which has files of its own. "
                f"Write it as {num_readers} files or more, or load the dataset without streaming."
            )
        self.dataset = dataset
        self.reader = reader
        self.num_readers = num_readers
        self.seed = seed
        self.block_size = block_size
        # The iterator over a shard. At exit it goes while datasets can still close its file.
        self._reading: list = []
        weakref.finalize(self, self._reading.clear)
        self._open(number=reader)

    @property
    def num_shards(self) -> int:
        """Shards of one pass."""
        return self.dataset.num_shards

    @property
    def passes(self) -> float:
        """Passes over the dataset that this reader has begun or finished, to a shard."""
        return self._number / self.num_shards

    @property
    def place(self) -> dict[str, Any]:
        """Where the next row is: numbers and names that JSON can keep."""
        return {
            "number": self._number,
            "block": self._block_number,
            "state": self._block_state,
            "row": self._row,
        }

    def restart(self) -> None:
        """Continue at the first row of the first pass."""
        self._open(self.reader)

    def go_to(self, place: dict[str, Any]) -> None:
        """
        Continue at a place of a reader with this number, of as many readers of this dataset, with this seed.

        Raises:
            ValueError: if the dataset is read through other operations than it was then.
        """
        self._open(place["number"], place["block"], place["state"])
        if place["row"] == 0:
            return
        try:
            self._read_block()
        except (KeyError, TypeError) as error:  # of datasets, which keeps a state for each operation
            raise ValueError(
                "The place of the checkpoint does not suit this stream: the dataset was read through other operations then, such "
                "as a filter or a map. Resume with the same."
            ) from error
        self._row = place["row"]

    def own_place(self, places: list[dict[str, Any]]) -> dict[str, Any]:
        """
        This reader's place among those of all readers. If there were more or fewer readers then, the shards that none of them has
        opened come next; what they had not read of theirs is left out in this pass.
        """
        if len(places) == self.num_readers:
            return places[self.reader]
        unopened = max(place["number"] for place in places) + 1
        number = unopened + (self.reader - unopened) % self.num_readers
        return {"number": number, "block": 0, "state": None, "row": 0}

    def __iter__(self) -> "RowStream":
        return self

    def __next__(self) -> dict[str, Any]:
        empty_shards = 0
        while self._block is None or self._row == len(self._block):
            if self._read_block():
                continue
            empty_shards += 1
            if empty_shards > MOST_EMPTY_PASSES * self.num_shards:
                raise ValueError(f"{empty_shards} shards of the stream in a row have no row that can be used.")
            self._open(self._number + self.num_readers)
        self._row += 1
        return self._block[self._row - 1]

    def _open(self, number: int, block: int = 0, state: dict | None = None) -> None:
        """Shard `number` of the sequence, from a block on, of which datasets has told the state; `None` is its beginning."""
        one_pass, index = divmod(number, self.num_shards)
        order = np.random.default_rng([self.seed, one_pass]).permutation(self.num_shards)
        self._shard = self.dataset.shard(num_shards=self.num_shards, index=int(order[index]))
        if state is not None:
            self._shard.load_state_dict(state)
        self._reading[:] = [_rows_of(self._shard)]
        self._number = number
        self._block_number = block
        self._block_state = state
        self._block: list[dict] | None = None
        self._row = 0

    def _read_block(self) -> bool:
        """The next rows of the shard, mixed. `False` if there are none."""
        if self._block is not None:
            self._block_number += 1
            self._block_state = self._shard.state_dict()
        rows = list(islice(self._reading[0], self.block_size))
        order = np.random.default_rng([self.seed, self._number, self._block_number]).permutation(len(rows))
        self._block = [rows[i] for i in order]
        self._row = 0
        return bool(rows)


def _rows_of(shard: IterableDataset) -> Iterator[dict[str, Any]]:
    """All rows of a shard. In a process that loads data, datasets would take its rows for those of all such processes; not so batches."""
    if get_worker_info() is None:
        return iter(shard)
    return ({name: values[0] for name, values in batch.items()} for batch in shard.iter(batch_size=1))
