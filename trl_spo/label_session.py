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
Which pair an annotator sees next, on which sides, and what becomes of a click.

Everybody goes through the pairs in the same order, each with sides that were drawn for that annotator and pair. Some pairs come
again later, with their sides swapped: whoever decides otherwise then was unsure, or likes a side.
"""

import math
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .label_folder import CHOICES, UNDO, Click, Pair, now, read_clicks, read_pairs, valid_clicks, write_click


REPEAT_DISTANCE = 10  # pairs between the two times that an annotator sees one, as long as there are so many
LONGEST_NAME = 60  # characters


class Task(NamedTuple):
    """
    One time that an annotator sees a pair.

    Attributes:
        index (`int`): position of the pair in the folder.
        showing (`int`): 0 for the first time, 1 for the repeat.
    """

    index: int
    showing: int


class Outcome(NamedTuple):
    """
    What became of a click.

    Attributes:
        saved (`bool`): whether it was written.
        message (`str`): a sentence for the annotator, or nothing.
    """

    saved: bool
    message: str = ""


def check_annotator(name: str) -> str:
    """
    The name without spaces around it.

    Raises:
        ValueError: if there is nothing to see of it, it is too long, or has control characters.
    """
    name = " ".join(str(name).split())
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise ValueError(
            f"The name of an annotator must have 1 to {LONGEST_NAME} visible characters, got {name[:80]!r}."
        )
    return name


def pair_name(index: int) -> str:
    """Name of the pair at a position: `"00012"`."""
    return f"{index:05d}"


class LabelSession:
    r"""
    The clicks on a folder of pairs, which may still grow, by any number of annotators at once.

    Args:
        folder (`Path`):
            Its folder, with the files of `trl_spo.label_folder`.
        num_pairs (`int`):
            Pairs that there will be.
        repeat_fraction (`float`, *optional*, defaults to `0.1`):
            Share of the pairs that each annotator sees twice.
        seed (`int`, *optional*, defaults to `0`):
            Of the sides.
    """

    def __init__(self, folder: Path, num_pairs: int, repeat_fraction: float = 0.1, seed: int = 0):
        self.folder = Path(folder)
        self.num_pairs = num_pairs
        self.repeat_fraction = repeat_fraction
        self.seed = seed
        self.pairs: list[Pair] = list(read_pairs(self.folder).values())
        self._lock = threading.Lock()
        self._clicks = {click.key: click for click in valid_clicks(read_clicks(self.folder))}

    def add_pair(self, pair: Pair) -> None:
        """Makes a pair, which is in the folder, known to the annotators."""
        self.pairs.append(pair)

    def tasks(self, annotator: str) -> Iterator[Task]:
        """What an annotator is shown, in order; repeats of pairs that were skipped are left out."""
        # Repeats are evenly spread, with another beginning for each annotator, so that together they repeat more pairs.
        counted = random.Random(f"{self.seed}/{annotator}").random()
        waiting: list[int] = []
        for index in range(self.num_pairs):
            yield Task(index, 0)
            if math.floor(counted + self.repeat_fraction) > math.floor(counted):
                waiting.append(index)
            counted += self.repeat_fraction
            if waiting and waiting[0] <= index - REPEAT_DISTANCE:
                yield from self._repeat(annotator, waiting.pop(0))
        for index in waiting:
            yield from self._repeat(annotator, index)

    def _repeat(self, annotator: str, index: int) -> Iterator[Task]:
        first = self._clicks.get((annotator, pair_name(index), 0))
        if first is None or first.choice != "skip":
            yield Task(index, 1)

    def left_image(self, annotator: str, task: Task) -> int:
        """Which image is on the left, 0 or 1: drawn for this annotator and pair, the other one in a repeat."""
        before = self._clicks.get((annotator, pair_name(task.index), 0))
        if before is not None:
            first = before.left
        else:
            first = random.Random(f"{self.seed}/{annotator}/{task.index}").randrange(2)
        return first if task.showing == 0 else 1 - first

    def decision(self, annotator: str, task: Task) -> Click | None:
        """What the annotator decided about a task, if anything."""
        return self._clicks.get((annotator, pair_name(task.index), task.showing))

    def current(self, annotator: str) -> Task | None:
        """The first task without a decision; `None` if there is none. Its pair may not be there yet."""
        return next((task for task in self.tasks(annotator) if self.decision(annotator, task) is None), None)

    def progress(self, annotator: str) -> tuple[int, int]:
        """Tasks that are decided, and all tasks."""
        tasks = list(self.tasks(annotator))
        return sum(self.decision(annotator, task) is not None for task in tasks), len(tasks)

    def decide(self, annotator: str, task: Task, choice: str) -> Outcome:
        """
        Saves what an annotator thinks of a pair. A second click on the same pair, from a finger or from another window, changes
        nothing: there is undo for that.

        Raises:
            ValueError: for a choice or a task that does not exist.
            OSError: if it could not be written; then everything is as it was.
        """
        if choice not in CHOICES:
            raise ValueError(f"A choice is one of {', '.join(CHOICES)}, got {choice!r}.")
        if not 0 <= task.index < len(self.pairs) or task.showing not in (0, 1):
            raise ValueError(f"There is no pair {task.index}.")
        with self._lock:
            if self.decision(annotator, task) is not None:
                return Outcome(False, "That pair already had its answer, and it stays. Undo it to change it.")
            left = self.left_image(annotator, task)
            click = Click(annotator, pair_name(task.index), task.showing, left, choice, now())
            write_click(self.folder, click)
            self._clicks[click.key] = click
        return Outcome(True)

    def undo(self, annotator: str, shown: Task | None) -> Outcome:
        """
        Takes back the last decision of an annotator.

        Args:
            annotator (`str`): who asks.
            shown (`Task`, *optional*): what the page of the annotator shows, `None` for its end. If that is not what comes
                next, the page is old, such as after a double click, and nothing happens.

        Raises:
            OSError: if it could not be written; then everything is as it was.
        """
        with self._lock:
            if shown != self.current(annotator):
                return Outcome(False)
            own = [click for click in self._clicks.values() if click.annotator == annotator]
            if not own:
                return Outcome(False, "There is nothing to undo.")
            write_click(self.folder, own[-1]._replace(choice=UNDO, time=now()))
            del self._clicks[own[-1].key]
        return Outcome(True)
