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
Find, load, check and filter preference pairs, whatever they are stored in.

[`load_preference_dataset`] finds the pairs (a Hub id, a parquet file, a folder), [`check_images`] looks at a sample of
them before hours are spent, and [`prepare_preference_dataset`] checks and filters. [`StepPreferenceCollator`] makes
batches of the rows, and [`relabel_preferences`] replaces their labels by those of a preference model.

Difference from the public code (https://github.com/RockeyCoss/SPO): rows without a label are dropped instead of counting
as ties.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk

from .hub_files import require_existing
from .images import is_address, read_image
from .label_folder import is_label_folder, label_rows
from .pair_files import TABLES, pair_dataset, read_pair_table
from .prompts import MOST_SHARDS, check_parquet, fields_as_columns, is_unicode, load_from_hub


logger = logging.getLogger(__name__)


# --- find and load ---------------------------------------------------------------------------------------------------


class PreferenceColumns(NamedTuple):
    r"""
    Where a dataset keeps its pairs.

    Attributes:
        prompt (`str`): column of the prompts.
        image_0 (`str`): column of the first images; in TRL's format the chosen ones.
        image_1 (`str`): column of the second images; in TRL's format the rejected ones.
        labelled (`bool`): whether `label_0` and `label_1` tell the preference (Pick-a-Pic) or the first image is
            always the preferred one (TRL).
    """

    prompt: str
    image_0: str
    image_1: str
    labelled: bool

    @property
    def images(self) -> tuple[str, str]:
        """Columns of both images."""
        return self.image_0, self.image_1


def find_preference_columns(column_names: list[str], prompt_column: str | None = None) -> PreferenceColumns:
    r"""
    Recognises Pick-a-Pic's and TRL's preference format by their columns.

    Args:
        column_names (`list[str]`):
            Columns of the dataset, in any order, others allowed.
        prompt_column (`str`, *optional*):
            Column of the prompts, if it is neither `"caption"` nor `"prompt"`.

    Returns:
        [`PreferenceColumns`].

    Raises:
        `ValueError`: If the columns belong to neither format.
    """
    names = set(column_names)
    if {"jpg_0", "jpg_1", "label_0", "label_1"} <= names:
        images = ("jpg_0", "jpg_1")
        labelled = True
    elif {"chosen", "rejected"} <= names:
        images = ("chosen", "rejected")
        labelled = False
    else:
        raise ValueError(
            "A preference dataset needs the columns `caption`, `jpg_0`, `jpg_1`, `label_0`, `label_1` (Pick-a-Pic) or "
            f"`prompt`, `chosen`, `rejected` (TRL), got {sorted(names)}."
        )
    candidates = [prompt_column] if prompt_column is not None else ["caption", "prompt"]
    prompt = next((name for name in candidates if name in names), None)
    if prompt is None:
        raise ValueError(
            f"The dataset has no prompt column {' or '.join(map(repr, candidates))}, got {sorted(names)}; name it "
            "with `dataset_prompt_column`."
        )
    return PreferenceColumns(prompt, *images, labelled)


def load_preference_dataset(name: str | Path, split: str = "train", streaming: bool = False) -> Any:
    r"""
    Loads preference pairs from wherever they are.

    Args:
        name (`str` or `Path`):
            A `.parquet` file; a `.jsonl`, `.json`, `.csv` or `.tsv` file with paths of images ([`read_pair_table`]); a folder that
            `trl-spo label` wrote ([`label_rows`]); a folder of parquet files, in which `datasets.load_dataset` finds the splits (such as
            `data/train-00000-of-00645.parquet`, as the Hub names them; files whose names say nothing are `"train"`);
            a folder of WebDataset's `.tar` files, whose samples have the images as `jpg_0` and `jpg_1` and the other columns
            in a `json`; a folder that `save_to_disk` wrote; or anything else that `load_dataset` knows, such as the Hub id
            `"yuvalkirstain/pickapic_v1"`.
        split (`str`, *optional*, defaults to `"train"`):
            Split to load.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows as they are needed. Otherwise parquet files are first copied to the cache of `datasets`, which
            takes as much disk again (hundreds of gigabytes for Pick-a-Pic v1).

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` with `streaming=True`.

    Raises:
        `FileNotFoundError`: If `name` is plainly a path and does not exist, or the Hub has no such dataset.
        `ValueError`: If there is no such split, a file is of another kind or broken, or a label folder has no labels yet.
    """
    path = Path(name)
    if path.is_file():
        return _load_file(path, split, streaming)
    if is_label_folder(path):
        return _as_asked(_load_labels(path), streaming)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        dataset = load_from_disk(str(path))
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise ValueError(f"{str(path)!r} has no split {split!r}; it has {sorted(dataset)}.")
            dataset = dataset[split]
        return _as_asked(dataset, streaming)
    if path.is_dir():
        # Without the checks, a few shards of a large dataset load as well: its README.md counts the rows of all.
        dataset = load_dataset(str(path), split=split, streaming=streaming, verification_mode="no_checks")
        return fields_as_columns(dataset)
    hint = "Pass a `.parquet` file, a folder of them, or a Hub id such as 'yuvalkirstain/pickapic_v1'."
    if path.suffix.lower() in TABLES:
        raise FileNotFoundError(f"There is no file {str(path)!r}. {hint}")
    require_existing(name, "preference dataset", hint)
    return fields_as_columns(load_from_hub(str(name), split, streaming=streaming))


def _load_file(path: Path, split: str, streaming: bool) -> Any:
    """The pairs of a file. One that exists is never looked up on the Hub."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        check_parquet(path)
        return load_dataset("parquet", data_files={split: str(path)}, split=split, streaming=streaming)
    if suffix not in TABLES:
        raise ValueError(
            f"{str(path)!r} is not a file of preference pairs: these end in .parquet, {', '.join(TABLES)}."
        )
    return _as_asked(pair_dataset(read_pair_table(path), path), streaming)


def _load_labels(folder: Path) -> Dataset:
    rows = label_rows(folder)
    if not rows:
        raise ValueError(f"{str(folder)!r} has no labels yet. `trl-spo label --output_dir {folder}` goes on with it.")
    return pair_dataset(rows, folder)


def _as_asked(dataset: Dataset, streaming: bool) -> Dataset | IterableDataset:
    if not streaming or not len(dataset):  # an empty one cannot be a stream; whoever checks it says that it is empty
        return dataset
    return dataset.to_iterable_dataset(num_shards=min(len(dataset), MOST_SHARDS))


# --- check a sample of the images ------------------------------------------------------------------------------------


class BadRow(NamedTuple):
    """A row with an unreadable image: its position in the dataset, the column and what went wrong."""

    index: int
    column: str
    error: str


def check_images(
    dataset: Any,
    num_rows: int = 256,
    max_bad_image_fraction: float = 0.01,
    prompt_column: str | None = None,
) -> list[BadRow]:
    r"""
    Decodes the images of a sample of rows before a run spends hours on them.

    The sample is spread evenly over a dataset with random access, and is the beginning of a stream; it is the same
    rows each time and in every process.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or `list[dict]`):
            Dataset in Pick-a-Pic's or TRL's preference format.
        num_rows (`int`, *optional*, defaults to `256`):
            Rows to look at. All, if there are fewer.
        max_bad_image_fraction (`float`, *optional*, defaults to `0.01`):
            Largest tolerable share of rows with an unreadable image.
        prompt_column (`str`, *optional*):
            Column of the prompts.

    Returns:
        `list[BadRow]`: what was found, at most one entry per image.

    Raises:
        `ValueError`: If more than `max_bad_image_fraction` of the sample is bad.
    """
    # Choose the rows: spread over the dataset, as bad files often come in blocks.
    dataset = leave_undecoded(dataset)
    if hasattr(dataset, "__len__"):
        size = len(dataset)
        count = min(num_rows, size)
        sample: Iterable = ((i * size // count, dataset[i * size // count]) for i in range(count))
        where = f"spread over {size}"
    else:
        sample = enumerate(islice(dataset, num_rows))
        where = "from the beginning of the stream"

    # Decode their images.
    bad = []
    num_checked = 0
    for index, row in sample:
        num_checked += 1
        for name in find_preference_columns(list(row), prompt_column).images:
            try:
                read_image(row[name])
            except OSError as error:
                bad.append(BadRow(index, name, str(error)))
    if not bad:
        return bad

    # Judge: too many are an error, a few are a warning.
    num_bad = len({entry.index for entry in bad})
    counts = Counter(entry.column for entry in bad)
    by_column = ", ".join(f"{count} in `{name}`" for name, count in sorted(counts.items()))
    found = (
        f"{num_bad} of the {num_checked} rows checked ({where}) have an unreadable image ({by_column}; first: row "
        f"{bad[0].index}, {bad[0].error})"
    )
    if num_bad > max_bad_image_fraction * num_checked:
        raise ValueError(
            f"{found}, more than `max_bad_image_fraction={max_bad_image_fraction}`. Download these files again or drop "
            "the rows; to train on the readable ones, raise `max_bad_image_fraction`."
        )
    logger.warning("%s. They will be skipped.", found)
    return bad


# --- check and filter the rows ---------------------------------------------------------------------------------------


def prepare_preference_dataset(
    dataset: Any,
    prompt_column: str | None = None,
    only_different: bool = False,
    max_pairs_per_prompt: int | None = None,
    drop_unlabelled: bool = True,
) -> Any:
    r"""
    Checks a preference dataset before any long work begins, and drops the rows without a label.

    Columns, labels and the first pair are checked. Image columns are left undecoded, so that a broken image reaches
    [`StepPreferenceCollator`], which can skip it.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or `list[dict]`):
            Dataset in Pick-a-Pic's or TRL's preference format.
        prompt_column (`str`, *optional*):
            Column of the prompts.
        only_different (`bool`, *optional*, defaults to `False`):
            Drop pairs of equal images (`are_different` false).
        max_pairs_per_prompt (`int`, *optional*):
            Keep this many pairs of each prompt, the first ones. Weights stay `1 / num_example_per_prompt` of the
            whole dataset, as in the public code, so that a prompt that lost pairs counts less. Not for streams.
        drop_unlabelled (`bool`, *optional*, defaults to `True`):
            `False` keeps rows without a label, for a training that computes labels of its own.

    Returns:
        The same kind of dataset.

    Raises:
        `TypeError`: If it is not such a dataset, or a row is not a dictionary.
        `ValueError`: If it is empty, columns are missing, labels are not preferences, weights are not numbers, prompts
            are not strings, the first row is unusable, or nothing passes the filters. Of a stream only the first rows
            are seen here; [`StepPreferenceCollator`] looks at the others.
    """
    # Refuse what is not a dataset of pairs.
    _check_kind(dataset)
    dataset = leave_undecoded(dataset)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("The preference dataset is empty.")
    columns = find_preference_columns(list(first), prompt_column)
    _check_keys(dataset, columns)

    # Filter; labels are checked as soon as the rows without one are gone.
    if columns.labelled and drop_unlabelled:
        dataset = _drop_unlabelled(dataset)
        if next(iter(dataset), None) is None:
            raise ValueError("No row of the preference dataset has a label (`has_label` false, or both labels 0).")
    if only_different:
        if "are_different" not in first:
            raise ValueError(
                f"`only_different` needs the column `are_different`, got {sorted(first)}; leave the option off."
            )
        dataset = _keep(dataset, ["are_different"], lambda row: bool(row["are_different"]), "of equal images")
    if max_pairs_per_prompt is not None:
        dataset = _limit_pairs_per_prompt(dataset, columns.prompt, max_pairs_per_prompt)

    # Check the rows that are left: prompts and weights of all, and the images of the first.
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("No row of the preference dataset passes the filter `only_different`.")
    check_prompt(first[columns.prompt], columns.prompt, "the first row")
    if _has_random_access(dataset):
        for index, prompt in enumerate(_column(dataset, columns.prompt)):
            check_prompt(prompt, columns.prompt, f"row {index}")
        for num_examples in _column(dataset, "num_example_per_prompt"):
            read_weight(num_examples)
    for name in columns.images:
        if isinstance(first[name], str) and not is_address(first[name]) and not Path(first[name]).is_file():
            raise ValueError(
                f"Column `{name}` does not hold images, or their paths: {first[name][:80]!r} is not a file."
            )
        try:
            read_image(first[name])
        except OSError:
            pass  # the collator skips and counts broken images
        except ValueError as error:
            raise ValueError(f"Column `{name}` does not hold images. {error}") from error
    return dataset


def is_labelled(row: dict[str, Any]) -> bool:
    """Whether a row tells a preference. Pick-a-Pic marks rows without one by `has_label` or by two zeros."""
    if "label_0" not in row:
        return True
    if not row.get("has_label", True):
        return False
    label_0, label_1 = row["label_0"], row["label_1"]
    return label_0 is not None and label_1 is not None and (label_0 != 0 or label_1 != 0)


def leave_undecoded(dataset):
    """The dataset with image columns as bytes and paths, so that reading a row does not decode its images."""
    for name, feature in (getattr(dataset, "features", None) or {}).items():
        if type(feature).__name__ == "Image" and getattr(feature, "decode", False):
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    return dataset


def _has_random_access(dataset) -> bool:
    """Whether all rows can be looked at in advance: a list or a map-style dataset, not a stream."""
    return isinstance(dataset, (list, tuple)) or hasattr(dataset, "select")


def _check_kind(dataset):
    if isinstance(dataset, dict):
        raise TypeError(
            f"A dataset of image pairs is needed, got a `{type(dataset).__name__}` with the entries {sorted(dataset)}; "
            "pass one of them, such as `dataset['train']`."
        )
    if not isinstance(dataset, (list, tuple)) and not hasattr(dataset, "features"):
        raise TypeError(
            "A dataset of image pairs must be a `datasets.Dataset`, a `datasets.IterableDataset` or a list of "
            f"dictionaries, got `{type(dataset).__name__}`."
        )


def _check_keys(dataset, columns: PreferenceColumns):
    """Every row of a list has the columns of the first. The rows of a dataset always have the same."""
    if not isinstance(dataset, (list, tuple)):
        return
    needed = [columns.prompt, *columns.images]
    if columns.labelled:
        needed += ["label_0", "label_1"]
    for index, row in enumerate(dataset):
        if not isinstance(row, dict):
            raise TypeError(f"Rows must be dictionaries, row {index} is a `{type(row).__name__}`.")
        missing = [name for name in needed if name not in row]
        if missing:
            raise ValueError(f"Row {index} has no {', '.join(missing)}; the first row has {sorted(dataset[0])}.")


def _column(dataset, name: str) -> Iterable:
    """The values of a column that may be missing, of a list or a `datasets.Dataset`."""
    if isinstance(dataset, (list, tuple)):
        return (row.get(name) for row in dataset)
    return (row[name] for row in _rows(dataset, [name])) if name in dataset.column_names else ()


def _rows(dataset, columns: list[str]) -> Iterator[dict]:
    """Rows of a `datasets.Dataset` with some of its columns, read in batches: one by one takes ten times as long."""
    for batch in dataset.select_columns(columns).iter(batch_size=1000):
        for values in zip(*(batch[name] for name in columns), strict=True):
            yield dict(zip(columns, values, strict=True))


def _keep(dataset, columns: list[str], condition: Callable[[dict], bool], what: str):
    """The rows that fulfil `condition`, which sees `columns` only: images are neither read nor copied."""
    if not _has_random_access(dataset):
        return dataset.filter(condition)  # a stream cannot be counted in advance
    if isinstance(dataset, (list, tuple)):
        kept = [row for row in dataset if condition(row)]
    else:
        columns = [name for name in columns if name in dataset.column_names]
        mask = np.array([condition(row) for row in _rows(dataset, columns)], dtype=bool)
        kept = dataset if mask.all() else dataset.select(np.flatnonzero(mask))
    if len(kept) < len(dataset):
        logger.info("Dropped %d of %d pairs %s.", len(dataset) - len(kept), len(dataset), what)
    return kept


def _drop_unlabelled(dataset):
    dataset = _keep(dataset, ["has_label", "label_0", "label_1"], is_labelled, "that have no label")
    if _has_random_access(dataset):
        pairs = zip(_column(dataset, "label_0"), _column(dataset, "label_1"), strict=True)
        for index, (label_0, label_1) in enumerate(pairs):
            read_labels(label_0, label_1, f"labelled row {index}")
    return dataset


def _limit_pairs_per_prompt(dataset, prompt_column: str, limit: int):
    if not _has_random_access(dataset):
        raise ValueError(
            "`max_pairs_per_prompt` has to see all prompts at once and cannot filter a stream; load the dataset without "
            "streaming."
        )
    counts = Counter()

    def is_early(row):
        counts[row[prompt_column]] += 1
        return counts[row[prompt_column]] <= limit

    return _keep(dataset, [prompt_column], is_early, f"beyond {limit} per prompt")


# --- read one row ----------------------------------------------------------------------------------------------------


def check_prompt(prompt: Any, column: str, where: str) -> None:
    """Refuses a prompt that is not a string of valid Unicode; `column` and `where` say which one it is."""
    if not isinstance(prompt, str):
        raise ValueError(f"Column `{column}` must hold strings, {where} has a {type(prompt).__name__}.")
    if not is_unicode(prompt):
        raise ValueError(
            f"Column `{column}` must hold text, but {where} has {prompt[:60]!r}, which is not valid Unicode (half of a "
            "surrogate pair). Repair it with `prompt.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')`."
        )


def read_weight(num_examples: Any) -> float:
    """Weight of a pair, given the number of pairs of its prompt."""
    if num_examples is None:
        return 1.0
    if isinstance(num_examples, torch.Tensor) and num_examples.numel() == 1:  # of `dataset.with_format("torch")`
        num_examples = num_examples.item()
    if not isinstance(num_examples, Real) or not 1 <= num_examples < math.inf:
        raise ValueError(f"`num_example_per_prompt` must be at least 1, got {num_examples!r}.")
    return 1.0 / num_examples


def read_labels(label_0: Any, label_1: Any, where: str) -> tuple[float, float]:
    """Two probabilities that sum to 1, or an error that says where they are not."""
    try:
        labels = float(label_0), float(label_1)
    except (TypeError, ValueError):
        labels = math.nan, math.nan
    if not (labels[0] >= 0 and labels[1] >= 0 and abs(sum(labels) - 1) < 1e-6):
        raise ValueError(
            "`label_0` and `label_1` must be probabilities that sum to 1 (1 and 0 for a preference, 0.5 each for a "
            f"tie), {where} has {label_0!r} and {label_1!r}."
        )
    return labels
