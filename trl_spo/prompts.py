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

"""Prompts from anywhere: found by [`load_prompts`], checked and read by [`read_prompts`]."""

import json
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset


LOADERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
INVISIBLE = ("Zs", "Zl", "Zp", "Cc", "Cf")  # Unicode's spaces, control and format characters


def is_unicode(text: str) -> bool:
    """Whether text can be written to a file: a Python string may hold halves of surrogate pairs, a file may not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def load_prompts(name: str, split: str = "train"):
    """
    Prompts from where users keep them.

    Args:
        name (`str`):
            A `.txt` file with one prompt per line, a `.json` file that holds a list of strings, a `.csv`, `.json`,
            `.jsonl` or `.parquet` file with a `prompt` or `caption` column, or the folder or Hub id of a dataset.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a dataset; files have none.

    Returns:
        `list[str]` or `datasets.Dataset`: as `SPOTrainer(train_dataset=...)` takes it.

    Raises:
        FileNotFoundError: if the name ends like a file and there is none.
    """
    path = Path(name)
    if path.suffix not in (".txt", *LOADERS):
        return load_dataset(name, split=split)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {name!r}. Name a file of prompts, or a dataset by folder or Hub id."
        )
    if path.suffix == ".txt":
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix == ".json":
        try:
            prompts = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:  # one object per line
            prompts = None
        if isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts):
            return prompts
    return load_dataset(LOADERS[path.suffix], data_files=str(path), split="train")


def read_prompts(dataset: Any, column: str | None = None, name: str = "train_dataset") -> Sequence[str]:
    """
    Prompts of a list, or of the `prompt` or `caption` column of a dataset, which is checked and then read lazily.

    A prompt may hold any characters of any length, as long as there is something to see and a file can hold it.

    Raises:
        TypeError: if it is neither.
        ValueError: if the column is missing, there are no prompts, or one is empty, invisible, not a string or no valid
            Unicode; says which.
    """
    if isinstance(dataset, PromptColumn):  # what this function returned before
        return dataset
    if isinstance(dataset, Dataset):
        candidates = [column] if column else ["prompt", "caption"]
        found = [c for c in candidates if c in dataset.column_names]
        if not found:
            raise ValueError(
                f"`{name}` needs a column {' or '.join(map(repr, candidates))} with the prompts; it has "
                f"{dataset.column_names}. Rename the column or set `dataset_prompt_column`."
            )
        prompts = PromptColumn(dataset, found[0])
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
    if not len(prompts):
        raise ValueError(f"`{name}` has no prompts.")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"`{name}` must hold strings, but item {i} is a `{type(prompt).__name__}`.")
        if all(unicodedata.category(character) in INVISIBLE for character in prompt):
            raise ValueError(f"`{name}` has an empty prompt at position {i}. Remove it: it names nothing to prefer.")
        if not is_unicode(prompt):
            raise ValueError(
                f"`{name}` has a prompt at position {i} that is not valid Unicode, {prompt[:60]!r}: half of a surrogate "
                "pair, which no file can hold. Read the prompts with the encoding they were written in."
            )
    return prompts


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
