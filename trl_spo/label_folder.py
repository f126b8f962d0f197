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
The folder of a labelling: pairs of images, and every click that was made on them.

```
my-taste/
  label.json     where the pairs come from; a folder holds the pairs of one source
  pairs.jsonl    one line per pair: its name, prompt, image files and seeds
  clicks.jsonl   one line per decision, undone ones included, in the order in which they were made
  images/        PNG files
```

Both `.jsonl` files only grow, and a line is on the disk before the person sees the next pair. So the clicks are all there is to
know: labels are computed from them whenever somebody asks ([`label_rows`]), and nothing else can become stale. A program that is
killed while it writes leaves half a line at most, which was never answered and is cut off at the next start.
"""

import json
import os
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple


SETTINGS = "label.json"
PAIRS = "pairs.jsonl"
CLICKS = "clicks.jsonl"
IMAGES = "images"
CHOICES = ("left", "right", "tie", "skip")
UNDO = "undo"


class Pair(NamedTuple):
    """
    Two images of one prompt.

    Attributes:
        name (`str`): unique in the folder.
        prompt (`str`): what both images were made from.
        images (`tuple[str, str]`): their files, relative to the folder.
        seeds (`tuple[int, int]`, *optional*): what they were sampled from, if this package sampled them.
    """

    name: str
    prompt: str
    images: tuple[str, str]
    seeds: tuple[int, int] | None = None


class Click(NamedTuple):
    """
    One decision.

    Attributes:
        annotator (`str`): who made it.
        pair (`str`): name of the pair.
        showing (`int`): 0 for the first time that this annotator saw the pair, 1 for the repeat with swapped sides.
        left (`int`): which image was on the left, 0 or 1.
        choice (`str`): `"left"`, `"right"`, `"tie"`, `"skip"`, or `"undo"` for what undoes the decision before.
        time (`str`): when, in UTC, as ISO 8601 writes it.
    """

    annotator: str
    pair: str
    showing: int
    left: int
    choice: str
    time: str

    @property
    def key(self) -> tuple[str, str, int]:
        """What a decision is about: there is at most one at a time."""
        return self.annotator, self.pair, self.showing

    @property
    def label_0(self) -> float | None:
        """1 if the pair's first image was preferred, 0 if the second one was, 0.5 for a tie, `None` if it was skipped."""
        if self.choice == "tie":
            return 0.5
        if self.choice not in ("left", "right"):
            return None
        return float((self.choice == "left") == (self.left == 0))


def is_label_folder(path: str | Path) -> bool:
    """Whether `trl-spo label` made this folder."""
    return (Path(path) / CLICKS).is_file() and (Path(path) / PAIRS).is_file()


def now() -> str:
    """The time of a click, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# --- files that only grow --------------------------------------------------------------------------------------------


def append_line(path: Path, record: dict[str, Any]) -> None:
    """
    Adds one JSON line to a file and waits until it is on the disk.

    Raises:
        OSError: if it could not be written; the file is then as it was.
    """
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8")
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        try:
            written = 0
            while written < len(line):  # a disk that is nearly full takes a part
                written += os.write(file, line[written:])
            os.fsync(file)
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)


def cut_torn_line(path: Path) -> int:
    """
    Removes what stands after the last line end: the part of a line that a killed program had written.

    Returns:
        `int`: the number of bytes that were removed.
    """
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    return len(content) - whole


def read_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """
    The objects of a JSONL file, each with the place where it stands. Half a line at the end is left out: whoever writes has
    not finished it.

    Raises:
        ValueError: if another line is not a JSON object; says which.
    """
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        where = f"{str(path)!r}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON ({error}). Repair or remove it.") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where} must hold a JSON object, got a {type(record).__name__}.")
        yield where, record


# --- pairs and clicks ------------------------------------------------------------------------------------------------


def write_pair(folder: Path, pair: Pair) -> None:
    """Adds a pair, whose images are there, to the list of the folder."""
    record = {"pair": pair.name, "prompt": pair.prompt, "image_0": pair.images[0], "image_1": pair.images[1]}
    if pair.seeds is not None:
        record |= {"seed_0": pair.seeds[0], "seed_1": pair.seeds[1]}
    append_line(folder / PAIRS, record)


def read_pairs(folder: str | Path) -> dict[str, Pair]:
    """
    The pairs of a folder by name, in the order in which they were added.

    Raises:
        ValueError: if a line lacks an entry, or names a file outside of the folder; says which line.
    """
    folder = Path(folder)
    pairs = {}
    for where, record in read_lines(folder / PAIRS):
        try:
            files = (str(record["image_0"]), str(record["image_1"]))
            pair = Pair(str(record["pair"]), str(record["prompt"]), files)
        except KeyError as error:
            raise ValueError(f"{where} has no {error}.") from error
        for file in files:
            if not (folder / file).resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{where} names {file!r}, which is not in the folder.")
        if "seed_0" in record:
            pair = pair._replace(seeds=(record["seed_0"], record["seed_1"]))
        pairs[pair.name] = pair
    return pairs


def write_click(folder: Path, click: Click) -> None:
    """
    Adds a decision.

    Raises:
        OSError: if it could not be written; then it was not made.
    """
    append_line(folder / CLICKS, click._asdict())


def read_clicks(folder: str | Path) -> list[Click]:
    """
    All decisions of a folder in the order in which they were made, undone ones included.

    Raises:
        ValueError: if a line is not a decision; says which.
    """
    clicks = []
    for where, record in read_lines(Path(folder) / CLICKS):
        try:
            click = Click(**{name: record[name] for name in Click._fields})
        except KeyError as error:
            raise ValueError(f"{where} has no {error}.") from error
        if click.choice not in (*CHOICES, UNDO) or click.left not in (0, 1) or click.showing not in (0, 1):
            raise ValueError(f"{where} is not a decision: {record}.")
        clicks.append(click)
    return clicks


def valid_clicks(clicks: Iterable[Click]) -> list[Click]:
    """The decisions that were not undone, in the order in which they were made."""
    valid: dict[tuple, Click] = {}
    for click in clicks:
        if click.choice == UNDO:
            valid.pop(click.key, None)
        else:
            valid.setdefault(click.key, click)
    return list(valid.values())


# --- labels ----------------------------------------------------------------------------------------------------------


def label_rows(folder: str | Path) -> list[dict[str, Any]]:
    """
    The labelled pairs of a folder in Pick-a-Pic's schema, which can express ties.

    A pair is one row, whoever and how many judged it: its label is the mean over annotators of the mean over the times that
    each of them saw it. So a pair on which two people disagree counts as a tie, and no pair counts twice. Pairs that everybody
    skipped, or nobody saw, are left out.

    Args:
        folder (`str` or `Path`): what `trl-spo label` wrote.

    Returns:
        `list[dict]`: `caption`; `jpg_0`, `jpg_1`: paths of the images; `label_0`, `label_1`; `has_label`; and `votes`, a list
        with `annotator`, `showing`, `left` (which image was on the left) and `label_0` of every decision.
    """
    folder = Path(folder)
    votes: dict[str, list[dict]] = {}
    for click in valid_clicks(read_clicks(folder)):
        if click.label_0 is not None:
            vote = {name: getattr(click, name) for name in ("annotator", "showing", "left", "label_0")}
            votes.setdefault(click.pair, []).append(vote)
    rows = []
    for pair in read_pairs(folder).values():
        if pair.name not in votes:
            continue
        label = mean_label(votes[pair.name])
        images = [str(folder / file) for file in pair.images]
        row = {"caption": pair.prompt, "jpg_0": images[0], "jpg_1": images[1], "label_0": label, "label_1": 1 - label}
        rows.append(row | {"has_label": True, "votes": votes[pair.name]})
    return rows


def mean_label(votes: list[dict]) -> float:
    """Share of the votes that prefer the first image, in which every annotator counts once."""
    by_annotator: dict[str, list[float]] = {}
    for vote in votes:
        by_annotator.setdefault(vote["annotator"], []).append(vote["label_0"])
    means = [sum(labels) / len(labels) for labels in by_annotator.values()]
    return sum(means) / len(means)
