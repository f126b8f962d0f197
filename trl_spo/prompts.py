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

"""Load prompts from files, datasets and the Hub ([`load_prompts`]), and check and read them ([`read_prompts`])."""

import codecs
import csv
import functools
import io
import json
import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk

from .prompt_suites import SUITES, PromptSuite, find_suite, locate_suite
from .suggestions import did_you_mean


try:
    from datasets import Column
except ImportError:  # before version 4 a column was a list
    Column = ()


logger = logging.getLogger(__name__)

SAVED_MARKS = ("dataset_info.json", "dataset_dict.json")  # files of `save_to_disk`
LINE_END = re.compile(r"\r\n|\n|\r")
BYTE_ORDER_MARKS = {  # the longer ones first: UTF-32's begins like UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
INVISIBLE = ("Zs", "Zl", "Zp", "Cc", "Cf")  # Unicode's spaces, control and format characters
OF_OTHER_PROGRAMS = {  # what other programs read as more than text
    "a comment": re.compile(r"^# "),
    "a LoRA": re.compile(r"<(lora|lyco|hypernet):[^<>]*>"),
    "a weight": re.compile(r"\([^()]*:\s*\d+(\.\d+)?\s*\)"),
}
MOST_SHARDS = 64  # of a table here that is read as a stream
NUM_FIRST_PROMPTS = 100  # of a stream, checked before anything is loaded
WHOLE_SUITE = ("train", "validation", "test")  # a suite has no such splits: each means all of its prompts


def is_unicode(text: str) -> bool:
    """Whether text can be written to a file: a Python string may hold halves of surrogate pairs, a file may not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def load_prompts(name: str, split: str = "train", streaming: bool = False):
    """
    Prompts from where users keep them.

    A file is UTF-8, unless a byte order mark says otherwise; the mark is not part of the first prompt. Lines end with a
    line feed, a carriage return, or both; other separators of Unicode stay in the prompt, as JSON and tables keep them.

    Args:
        name (`str`):
            A `.txt` file with one prompt per line, a `.json` file that holds a list of strings, a `.csv`, `.tsv`, `.json`,
            `.jsonl` or `.parquet` file with a `prompt` or `caption` column, a folder that `Dataset.save_to_disk` wrote, the
            folder or Hub id of a dataset, or the name of a suite in `SUITES`, which is downloaded. What exists under that
            name in the working directory goes first.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a dataset; files have none. Of a suite a category, such as `"anime"` of `hpdv2`; `"train"`,
            `"validation"` and `"test"` are all of it.
        streaming (`bool`, *optional*, defaults to `False`):
            Read prompts when they are needed: of a parquet file, or of a dataset by folder or Hub id, whose files may be
            parquet or WebDataset's `.tar`. Other files are read whole.

    Returns:
        `list[str]` or `datasets.Dataset`: as `SPOTrainer(train_dataset=...)` takes it. Of a suite, a dataset with the
        columns `prompt` and `category`. With `streaming=True` a `datasets.IterableDataset`.

    Raises:
        FileNotFoundError: if the name ends like a file and there is none, or a suite cannot be downloaded.
        ValueError: if a file is in another encoding or of another kind, or breaks the rules of its kind; says where.
    """
    if streaming:
        return _stream(Path(name), split)
    path = Path(name)
    suffix = path.suffix.lower()
    suite, folder = find_suite(str(name))
    if suite is not None:
        return _read_suite(path.name, suite, locate_suite(path.name, suite, folder), split)
    if path.is_dir() and any((path / mark).is_file() for mark in SAVED_MARKS):
        return _saved_dataset(path, split)
    if suffix not in READERS and not path.is_file():
        return _dataset_by_name(str(name), split)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {str(name)!r}. Name a file of prompts, or a dataset by folder or Hub id."
        )
    if suffix not in READERS:
        raise ValueError(f"{str(name)!r} is not a file of prompts: these end in {', '.join(READERS)}.")
    return READERS[suffix](path)


def _stream(path: Path, split: str) -> IterableDataset:
    """Prompts that are read when they are needed; what has to be read whole all the same becomes a stream as well."""
    if path.is_dir() and not any((path / mark).is_file() for mark in SAVED_MARKS):
        return load_dataset(str(path), split=split, streaming=True)
    if path.is_file() and path.suffix.lower() == ".parquet":
        check_parquet(path)
        return load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    is_elsewhere = not path.exists() and path.suffix.lower() not in READERS and find_suite(str(path))[0] is None
    if is_elsewhere:
        return _dataset_by_name(str(path), split, streaming=True)
    loaded = load_prompts(str(path), split)
    if isinstance(loaded, list):
        loaded = Dataset.from_dict({"prompt": loaded})
    if not len(loaded):
        raise ValueError(f"{str(path)!r} has no prompts.")
    return loaded.to_iterable_dataset(num_shards=min(len(loaded), MOST_SHARDS))


def _dataset_by_name(name: str, split: str, **kwargs) -> Dataset | IterableDataset:
    """A dataset by its folder or Hub id."""
    if Path(name).is_dir():
        return load_dataset(name, split=split, **kwargs)
    try:
        return load_from_hub(name, split, **kwargs)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"There are no prompts under the name {name!r}: it is no file or folder here, no suite ({', '.join(SUITES)}), and no "
            f"dataset of the Hub that can be reached{did_you_mean(name, SUITES, cutoff=0.6) or '.'}"
        ) from error


def _read_suite(name: str, suite: PromptSuite, files: dict[Path, str | None], split: str) -> Dataset:
    """Prompts and categories of all files of a suite, or of one category."""
    prompts = []
    categories = []
    for path, category in files.items():
        content = READERS[path.suffix](path)
        if isinstance(content, list):
            prompts += content
            categories += [category] * len(content)
        else:
            prompts += content[suite.prompt_column]
            categories += content[suite.category_column]
    if split not in WHOLE_SUITE:
        if split not in categories:
            raise ValueError(f"The suite {name!r} has no category {split!r}; it has {sorted(set(categories))}.")
        prompts = [prompt for prompt, category in zip(prompts, categories, strict=True) if category == split]
        categories = [split] * len(prompts)
    return Dataset.from_dict({"prompt": prompts, "category": categories})


def load_from_hub(name: str, split: str, **kwargs):
    """
    A dataset of the Hub.

    Raises:
        FileNotFoundError: if there is none, or the Hub cannot be reached; says that there is no such file or folder, either.
    """
    try:
        return load_dataset(name, split=split, **kwargs)
    except (ConnectionError, FileNotFoundError) as error:  # of datasets, which derives its own from these
        raise FileNotFoundError(
            f"There is no file or folder {name!r}, and no dataset of that name came from the Hub ({error})."
        ) from error


def _saved_dataset(path: Path, split: str) -> Dataset:
    """What `save_to_disk` wrote: a dataset, or one of its splits."""
    found = load_from_disk(str(path))
    if not isinstance(found, DatasetDict):
        return found
    if split not in found:
        raise ValueError(f"{str(path)!r} has no split {split!r}; it has {sorted(found)}.")
    return found[split]


def read_text(path: Path) -> str:
    """
    The text of a file, without its byte order mark. Line ends are as they are in the file.

    Raises:
        ValueError: if it is neither UTF-8 nor begins with a mark.
    """
    content = path.read_bytes()
    encoding = next((encoding for mark, encoding in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{str(path)!r} is not text in UTF-8 (line {line}). Convert it, for example with "
            f"`iconv -f latin1 -t utf-8 {path.name}` if it was written in Latin-1."
        ) from error
    if "\0" in text:
        raise ValueError(
            f"{str(path)!r} holds characters of value 0, as UTF-16 without a byte order mark does when it is read as UTF-8. "
            "Save it as UTF-8."
        )
    return text


def _read_lines(path: Path) -> list[str]:
    return [line for line in LINE_END.split(read_text(path)) if line.strip()]


def _read_json(path: Path):
    """A list of strings; or rows, as a list or one per line; or columns."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        return _read_json_lines(path)
    if isinstance(content, list) and all(isinstance(prompt, str) for prompt in content):
        return content
    if isinstance(content, dict):
        content = _rows_of(content)
    return _dataset(path, content)


def _rows_of(content: dict) -> list[dict]:
    """`{"prompt": ["a", "b"]}` as rows; another object is one row."""
    columns = list(content.values())
    if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return [dict(zip(content, values, strict=True)) for values in zip(*columns, strict=True)]
    return [content]


def _read_json_lines(path: Path):
    rows = []
    for number, line in enumerate(LINE_END.split(read_text(path)), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{str(path)!r} is neither JSON nor has one JSON value per line (line {number}: {error})."
            ) from error
    if rows and all(isinstance(row, str) for row in rows):
        return rows
    return _dataset(path, rows)


def _dataset(path: Path, rows: Any) -> Dataset:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"{str(path)!r} must hold strings, or objects with a 'prompt' or 'caption'; it holds something else."
        )
    try:
        return Dataset.from_list(rows)
    except Exception:  # of pyarrow, for columns whose values have no common kind, such as the objects of GenEval
        texts = [{key: value for key, value in row.items() if isinstance(value, str)} for row in rows]
    if not any(texts):
        raise ValueError(f"The rows of {str(path)!r} do not form a table, and none of them holds a text.")
    return Dataset.from_list(texts)


def _read_tab_separated(path: Path) -> Dataset:
    """Cells with quotes around them, as spreadsheets write them, or quotes that are part of the text, as in PartiPrompts."""
    try:
        return _read_table(path, "\t")
    except ValueError:
        return _read_table(path, "\t", quoting=csv.QUOTE_NONE)


def _read_table(path: Path, delimiter: str, **dialect) -> Dataset:
    """Every cell is text: nothing such as "null" or "1" is taken for more. A row that is too long has a comma too many."""
    file = io.StringIO(read_text(path), newline="")
    reader = csv.DictReader(file, delimiter=delimiter, restval="", strict=True, **dialect)
    rows = []
    try:
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{str(path)!r} has {len(row) - 1 + len(row[None])} cells in line {reader.line_num} and "
                    f"{len(row) - 1} columns, {reader.fieldnames}. Put quotes around prompts that hold {delimiter!r}, or "
                    "use a .txt file with one prompt per line."
                )
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"{str(path)!r} is not a table (line {reader.reader.line_num}: {error}).") from error
    return Dataset.from_list(rows)


def check_parquet(path: Path) -> None:
    """
    Check that a parquet file can be read, by its footer alone.

    Raises:
        ValueError: if a file is not what its name says, or was cut off.
    """
    try:
        pq.read_schema(path)
    except Exception as error:  # of pyarrow
        raise ValueError(
            f"{str(path)!r} is not a whole parquet file ({error}). Download or write it again."
        ) from error


def _read_parquet(path: Path) -> Dataset:
    check_parquet(path)
    return load_dataset("parquet", data_files=str(path), split="train")


READERS = {  # ending of a file, in small letters -> how it is read
    ".txt": _read_lines,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": functools.partial(_read_table, delimiter=","),
    ".tsv": _read_tab_separated,
    ".parquet": _read_parquet,
}


def read_prompts(
    dataset: Any, column: str | None = None, name: str = "train_dataset"
) -> "Sequence[str] | PromptStream":
    """
    Prompts of a list, or of the `prompt` or `caption` column of a dataset, which is checked and then read lazily. Of a stream
    the first hundred are checked.

    A prompt may hold any characters of any length, as long as there is something to see and a file can hold it.

    Raises:
        TypeError: if it is neither.
        ValueError: if the column is missing, there are no prompts, or one is empty, invisible, not a string or not valid
            Unicode; says which.
    """
    # Find the texts: a column of a dataset, which stays lazy, or a list.
    if isinstance(dataset, (PromptColumn, PromptStream)):  # what this function returned before
        return dataset
    if isinstance(dataset, IterableDataset):
        return _read_stream(dataset, column, name)
    if isinstance(dataset, Column):  # `dataset["prompt"]`, whose rows are strings
        dataset = list(dataset)
    if isinstance(dataset, Dataset):
        prompts = PromptColumn(dataset, _column_of_prompts(dataset.column_names, column, name))
    elif isinstance(dataset, str) or not isinstance(dataset, (list, tuple)):
        hint = ""
        if isinstance(dataset, dict):
            hint = f" with the entries {sorted(map(str, dataset))}. Pass one of them, such as `dataset['train']`"
        elif hasattr(dataset, "__iter__") and not isinstance(dataset, str):
            hint = ". Collect the prompts first, with `list(...)` or `[row['prompt'] for row in ...]`"
        raise TypeError(
            f"`{name}` must be a list of prompts or a `datasets.Dataset` with a 'prompt' or 'caption' column, got "
            f"`{type(dataset).__name__}`{hint}."
        )
    else:
        prompts = list(dataset)

    check_prompts(prompts, name)
    return prompts


def _column_of_prompts(columns: list[str], column: str | None, name: str) -> str:
    """The column that is asked for, or else `prompt` or `caption`."""
    candidates = [column] if column else ["prompt", "caption"]
    found = [c for c in candidates if c in columns]
    if not found and not column:  # PartiPrompts has "Prompt"
        found = [c for c in columns if c.lower() in candidates]
    if not found:
        raise ValueError(
            f"`{name}` needs a column {' or '.join(map(repr, candidates))} with the prompts; it has "
            f"{columns}. Rename the column or set `dataset_prompt_column`."
        )
    return found[0]


def _read_stream(dataset: IterableDataset, column: str | None, name: str) -> "PromptStream":
    dataset = fields_as_columns(dataset)
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"`{name}` has no prompts.")
    prompts = PromptStream(dataset, _column_of_prompts(list(row), column, name))
    check_prompts(prompts.first, name)
    return prompts


def fields_as_columns(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """
    What was read from WebDataset's `.tar` files, with the columns that other formats have: the entries of a sample's `.json`, and its
    `.txt` as `caption` if there is no other. Other datasets are returned as they are.
    """
    row = set(dataset.column_names or next(iter(dataset), {}))
    if "__key__" not in row or not {"json", "txt"} & row:
        return dataset
    return dataset.map(_fields_of, remove_columns=[name for name in ("json", "txt") if name in row])


def _fields_of(row: dict[str, Any]) -> dict[str, Any]:
    fields = dict(row.get("json") or {})
    if "txt" in row:
        fields.setdefault("caption", row["txt"])
    return fields


def check_prompt(prompt: Any, position: int, name: str) -> None:
    """
    Check one prompt.

    Raises:
        ValueError: if it cannot be used; says what it is and where.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"`{name}` must hold strings, but item {position} is a `{type(prompt).__name__}`.")
    if all(unicodedata.category(character) in INVISIBLE for character in prompt):
        raise ValueError(
            f"`{name}` has an empty prompt at position {position}. Remove it: it names nothing to prefer."
        )
    if not is_unicode(prompt):
        raise ValueError(
            f"`{name}` has a prompt at position {position} that is not valid Unicode, {prompt[:60]!r}: half of a surrogate "
            "pair, which no file can hold. Read the prompts with the encoding they were written in."
        )


def check_prompts(prompts: Sequence[str], name: str) -> None:
    """
    Check every prompt now: a bad one would otherwise stop the run when its turn comes. Warn of what other programs read as
    more than text.

    Raises:
        ValueError: see [`read_prompts`].
    """
    if not len(prompts):
        raise ValueError(f"`{name}` has no prompts.")
    special: dict[str, list[str]] = {}
    for i, prompt in enumerate(prompts):
        check_prompt(prompt, i, name)
        for what, pattern in OF_OTHER_PROGRAMS.items():
            if pattern.search(prompt):
                special.setdefault(what, []).append(prompt)
    for what, found in special.items():
        warn_once(
            f"{len(found)} of {len(prompts)} prompts of `{name}` hold what other programs read as {what}, such as "
            f"{found[0][:60]!r}. Here every character is part of the prompt, and the text encoder reads it."
        )


@functools.cache
def warn_once(message: str) -> None:
    """Prompts are read whenever they are evaluated."""
    logger.warning(message)


class PromptColumn(Sequence):
    """The prompts of a `datasets.Dataset`, read when they are needed: nothing of the dataset stays in memory."""

    def __init__(self, dataset: Dataset, column: str):
        self.dataset = dataset.select_columns([column])
        self.column = column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | slice):
        return self.dataset[index][self.column]

    def __iter__(self) -> Iterator[str]:
        for batch in self.dataset.iter(batch_size=1000):
            yield from batch[self.column]


class PromptStream:
    """
    The prompts of a `datasets.IterableDataset`, whose number is not known. It has no length; [`StreamedPrompts`] reads it.

    Args:
        dataset (`datasets.IterableDataset`): with the column.
        column (`str`): of the prompts.

    Attributes:
        first (`list[str]`): the first hundred.
    """

    def __init__(self, dataset: IterableDataset, column: str):
        self.dataset = dataset.select_columns([column])
        self.column = column
        self.first = [row[column] for row in islice(self.dataset, NUM_FIRST_PROMPTS)]
