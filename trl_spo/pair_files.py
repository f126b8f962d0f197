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
Preference pairs from image files of one's own: a table with paths ([`read_pair_table`]) or a folder in which the names say what
belongs together ([`read_image_folder`]).

Paths are those of files, relative to the table. Nothing is downloaded.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Image

from .images import is_address
from .prompts import LINE_END, read_text


TABLES = (".jsonl", ".json", ".csv", ".tsv")
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif", ".tga")
IMAGE_COLUMNS = (("chosen", "rejected"), ("image_0", "image_1"), ("jpg_0", "jpg_1"))
SAMPLES = "samples.json"  # of `trl-spo sample`
ROLES = re.compile(r"(?P<name>.+)[ _.-](?P<role>chosen|rejected|0|1)", flags=re.IGNORECASE)
PARTNERS = {"chosen": "rejected", "rejected": "chosen", "0": "1", "1": "0"}
LABELS = {"0": 1.0, "1": 0.0, "tie": 0.5, "0.5": 0.5}  # which image is the better one -> label of the first one


# --- tables with paths -----------------------------------------------------------------------------------------------


def read_pair_table(path: str | Path) -> list[dict[str, Any]]:
    r"""
    The pairs of a `.jsonl`, `.json`, `.csv` or `.tsv` file that names image files.

    Args:
        path (`str` or `Path`):
            The file. Its columns are `prompt` or `caption`; `chosen` and `rejected`, or `image_0` and `image_1` (or `jpg_0` and
            `jpg_1`) with the paths of images, relative to the file; and of the latter `label_0` and `label_1` (1 and 0, or 0.5
            each for a tie), or one column `label` that says which image is the better one: `0`, `1` or `tie`. A row whose
            label is empty has none. Other columns are kept.

    Returns:
        `list[dict]`: rows in Pick-a-Pic's schema, with `jpg_0` and `jpg_1` as paths, and `has_label`.

    Raises:
        ValueError: for a file that breaks the rules of its kind, a missing column, an address, or a label that is none; says in
            which line.
        FileNotFoundError: if an image is not there; says in which line.
    """
    path = Path(path)
    rows = []
    for where, row in _records(path):
        images = next((names for names in IMAGE_COLUMNS if set(names) <= set(row)), None)
        if images is None:
            raise ValueError(
                f"{where} needs the columns `chosen` and `rejected`, or `image_0` and `image_1`, with paths of images; it has "
                f"{sorted(row)}."
            )
        labels = (1.0, 0.0) if images == IMAGE_COLUMNS[0] else _labels(row, where)
        files = [str(_image_path(row.pop(name), path.parent, name, where)) for name in images]
        if "prompt" in row:
            row["prompt"] = _prompt_text(row["prompt"])
        row |= {"jpg_0": files[0], "jpg_1": files[1]}
        row["label_0"], row["label_1"] = labels or (None, None)
        row["has_label"] = labels is not None and row.get("has_label", True) not in (False, "False", "false", "0", 0)
        rows.append(row)
    if not rows:
        raise ValueError(f"{str(path)!r} has no rows.")
    return rows


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a table, each with the place where it stands."""
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        yield from _table_records(path, "," if suffix == ".csv" else "\t")
        return
    text = read_text(path)
    content = None
    if suffix == ".json":
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{str(path)!r} is not JSON: {error}.") from error
    if isinstance(content, list):
        found = [(f"{str(path)!r}, row {index}", row) for index, row in enumerate(content, start=1)]
    elif content is not None:
        raise ValueError(f"{str(path)!r} must hold a list of rows, got a {type(content).__name__}.")
    else:
        found = list(_json_lines(path, text))
    for where, row in found:
        if not isinstance(row, dict):
            raise ValueError(f'{where} must be an object such as {{"prompt": ...}}, got a {type(row).__name__}.')
        yield where, row


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(LINE_END.split(text), start=1):
        where = f"{str(path)!r}, line {number}"
        if line.strip():
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error}.") from error


def _table_records(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, restval="", strict=True)
    try:
        for row in reader:
            where = f"{str(path)!r}, line {reader.line_num}"
            if None in row:
                raise ValueError(
                    f"{where} has more cells than there are columns, {reader.fieldnames}. Put quotes around prompts that hold "
                    f"{delimiter!r}."
                )
            if "num_example_per_prompt" in row:
                row["num_example_per_prompt"] = _number(row["num_example_per_prompt"], "num_example_per_prompt", where)
            yield where, row
    except csv.Error as error:
        raise ValueError(f"{str(path)!r}, line {reader.reader.line_num} is not a row of a table: {error}.") from error


def _image_path(value: Any, folder: Path, column: str, where: str) -> Path:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} needs the path of an image in `{column}`, got {value!r}.")
    if is_address(value):
        raise ValueError(f"{where} has the address {value!r} in `{column}`. Nothing is downloaded: name a file.")
    path = folder / Path(value).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{where}: there is no image {str(path)!r} (column `{column}`).")
    return path


def _prompt_text(prompt: Any) -> Any:
    """The text of a prompt in TRL's conversational form, a list of messages. Anything else is returned as it is."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict) and "content" in prompt[-1]:
        return prompt[-1]["content"]
    return prompt


def _number(value: Any, column: str, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where} needs a number in `{column}`, got {value!r}.") from None


def _labels(row: dict, where: str) -> tuple[float, float] | None:
    """Labels of both images; `None` if the row has none."""
    if "label_0" in row and "label_1" in row:
        values = (row["label_0"], row["label_1"])
        if values in (("", ""), (None, None)):
            return None
        labels = tuple(_number(value, name, where) for name, value in zip(("label_0", "label_1"), values, strict=True))
        if labels == (0.0, 0.0):
            return None
        if min(labels) < 0 or abs(sum(labels) - 1) > 1e-6:
            raise ValueError(f"{where}: `label_0` and `label_1` must be 1 and 0, 0 and 1, or 0.5 each; got {values}.")
        return labels
    label = row.pop("label", None)
    if label is None or str(label).strip() == "":
        return None
    first = LABELS.get(str(label).strip().lower())
    if first is None:
        raise ValueError(
            f"{where}: `label` must say which image is the better one, 0, 1 or tie, or be empty; got {label!r}."
        )
    return first, 1 - first


# --- folders of images -----------------------------------------------------------------------------------------------


def read_image_folder(folder: str | Path) -> list[dict[str, Any]]:
    r"""
    The pairs of a folder of images, by their names.

    `NAME_chosen.png` and `NAME_rejected.png` are a pair with a label, `NAME_0.png` and `NAME_1.png` one without. So are
    `chosen/NAME.png` and `rejected/NAME.png`, `0/NAME.png` and `1/NAME.png`. The prompt is the text of `NAME.txt`, which stands
    beside the first image; or what the `samples.json` of `trl-spo sample` says there; or else `NAME` itself, with spaces for `_`
    and without a number at its end.

    Args:
        folder (`str` or `Path`): looked through with the folders in it.

    Returns:
        `list[dict]`: rows as those of [`read_pair_table`], sorted by name.

    Raises:
        ValueError: if there is no pair, or an image has no partner; says which.
    """
    folder = Path(folder)
    found: dict[tuple[str, str], Path] = {}
    sheets = set()  # files in which `trl-spo sample` shows several images at once
    for record in folder.rglob(SAMPLES):
        for run in _sample_runs(record.parent):
            sheets |= {record.parent / name for name in run.get("grids", [])}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGE_FILES or not path.is_file() or path in sheets:
            continue
        name, role = _name_and_role(path.relative_to(folder))
        if role is None:
            raise ValueError(
                f"{str(path)!r} belongs to no pair. The images of a pair are called NAME_chosen and NAME_rejected, or NAME_0 and "
                "NAME_1 if they have no label yet."
            )
        if (name, role) in found:
            raise ValueError(f"{str(path)!r} and {str(found[name, role])!r} are the same side of one pair.")
        found[name, role] = path
    if not found:
        raise ValueError(f"{str(folder)!r} holds no images.")
    for (name, role), path in found.items():
        if (name, PARTNERS[role]) not in found:
            raise ValueError(f"{str(path)!r} has no partner: there is no {name}_{PARTNERS[role]}.")
    return [_folder_row(name, role, found) for name, role in found if role in ("chosen", "0")]


def _sample_runs(folder: Path) -> list[dict[str, Any]]:
    """What calls of `trl-spo sample` wrote about the images that they made in this folder; empty if it made none."""
    record = folder / SAMPLES
    if not record.is_file():
        return []
    last = json.loads(read_text(record))
    return [last, *last.get("earlier", [])]


def _name_and_role(path: Path) -> tuple[str, str | None]:
    """`fox_chosen.png` and `chosen/fox.png` are `("fox", "chosen")`; `path` is relative to the folder."""
    role = path.parent.name.lower()
    if role in PARTNERS:
        return (path.parent.parent / path.stem).as_posix(), role
    match = ROLES.fullmatch(path.stem)
    if match is None:
        return path.stem, None
    return (path.parent / match["name"]).as_posix(), match["role"].lower()


def _folder_row(name: str, role: str, found: dict[tuple[str, str], Path]) -> dict[str, Any]:
    images = (found[name, role], found[name, PARTNERS[role]])
    prompt = _prompt_beside(images[0], Path(name).name)
    labelled = role == "chosen"
    row = {"caption": prompt, "jpg_0": str(images[0]), "jpg_1": str(images[1]), "has_label": labelled}
    return row | {"label_0": 1.0 if labelled else None, "label_1": 0.0 if labelled else None}


def _prompt_beside(image: Path, stem: str) -> str:
    texts = [image.parent / f"{stem}.txt", image.with_suffix(".txt"), image.parent.parent / f"{stem}.txt"]
    text = next((path for path in texts if path.is_file()), None)
    if text is not None:
        return " ".join(read_text(text).split())
    for run in _sample_runs(image.parent):
        for entry in run["images"]:
            if entry["file"] == image.name:
                return entry["prompt"]
    return " ".join(re.sub(r"[ _-]+\d+$", "", stem).replace("_", " ").split())


# --- datasets --------------------------------------------------------------------------------------------------------


def pair_dataset(rows: list[dict[str, Any]], source: str | Path) -> Dataset:
    """
    A dataset of rows whose images are paths. It holds the paths; images are read when they are needed.

    Raises:
        ValueError: if a column has values of several kinds.
    """
    try:
        dataset = Dataset.from_list(rows)
    except Exception as error:  # of pyarrow
        raise ValueError(f"The rows of {str(source)!r} do not form a table: {error}.") from error
    for name in ("jpg_0", "jpg_1"):
        dataset = dataset.cast_column(name, Image(decode=False))
    return dataset
