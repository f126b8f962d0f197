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
From preference images to what the step-aware reward model is trained on (https://huggingface.co/papers/2406.04314,
section 3.2).

A pair of finished images with a human preference becomes a pair of *predictions at timestep t*:

    1. encode both images with the VAE;
    2. add the same noise at the same timestep t to both;
    3. predict both clean latents in one guided step of the diffusion model;
    4. decode.

The preference is taken to survive this, as the pair shares everything but the images. Differences from the public code
(https://github.com/RockeyCoss/SPO): both images of a pair pass the denoiser in one batch, and rows without a label are
dropped instead of counting as ties.

[`load_preference_dataset`] finds the pairs (a Hub id, a parquet file, a folder), [`check_images`] looks at a sample of
them before hours are spent, [`prepare_preference_dataset`] filters, [`relabel_preferences`] replaces the labels by those
of a preference model, and an [`EncodingCache`] spares the second encoding of what a run has seen.
"""

import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import DatasetDict, load_dataset, load_from_disk

from .hub_files import require_existing
from .images import image_to_tensor, read_image
from .prompts import is_unicode
from .rewards.base import is_reward_model, wrap_reward


logger = logging.getLogger(__name__)

MIN_PAIRS_TO_JUDGE_BAD_IMAGES = 100
SHARD_NAME = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}")  # how the Hub names the parquet files of a split


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
        image_0, image_1, labelled = "jpg_0", "jpg_1", True
    elif {"chosen", "rejected"} <= names:
        image_0, image_1, labelled = "chosen", "rejected", False
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
    return PreferenceColumns(prompt, image_0, image_1, labelled)


def load_preference_dataset(name: str | Path, split: str = "train", streaming: bool = False) -> Any:
    r"""
    Loads preference pairs from wherever they are.

    Args:
        name (`str` or `Path`):
            A `.parquet` file; a folder of parquet files, searched deeply (of files named as on the Hub,
            `train-00000-of-00645.parquet`, those of `split` are taken); a folder that `save_to_disk` wrote; or
            anything else that `datasets.load_dataset` knows, such as the Hub id `"yuvalkirstain/pickapic_v1"`.
        split (`str`, *optional*, defaults to `"train"`):
            Split to load.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows as they are needed. Otherwise parquet files are first copied to the cache of `datasets`, which
            takes as much disk again (hundreds of gigabytes for Pick-a-Pic v1).

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` with `streaming=True`.

    Raises:
        `FileNotFoundError`: If `name` is plainly a path and does not exist.
        `ValueError`: If a folder has parquet files, but none of the split.
    """
    path = Path(name)
    if path.is_file() and path.suffix == ".parquet":
        return load_dataset("parquet", data_files={split: str(path)}, split=split, streaming=streaming)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            dataset = load_from_disk(str(path))
            dataset = dataset[split] if isinstance(dataset, DatasetDict) else dataset
            return dataset.to_iterable_dataset() if streaming else dataset
        files = sorted(path.rglob("*.parquet"))
        if files:
            files = [str(file) for file in _files_of_split(files, split, path)]
            return load_dataset("parquet", data_files={split: files}, split=split, streaming=streaming)
    hint = "Pass a `.parquet` file, a folder of them, or a Hub id such as 'yuvalkirstain/pickapic_v1'."
    require_existing(name, "preference dataset", hint)
    return load_dataset(str(name), split=split, streaming=streaming)


def _files_of_split(files: list[Path], split: str, folder: Path) -> list[Path]:
    """Those files whose Hub-style name, or whose folder, says `split`; all of them if no name says anything."""
    splits = [match["split"] if (match := SHARD_NAME.match(file.name)) else file.parent.name for file in files]
    mine = [file for file, name in zip(files, splits, strict=True) if name == split or file.stem == split]
    if mine or not any(SHARD_NAME.match(file.name) for file in files):
        return mine or files
    raise ValueError(f"{str(folder)!r} has no parquet file of the split {split!r}, only of {sorted(set(splits))}.")


def is_labelled(row: dict[str, Any]) -> bool:
    """Whether a row tells a preference. Pick-a-Pic marks rows without one by `has_label` or by two zeros."""
    if "label_0" not in row:
        return True
    if not row.get("has_label", True):
        return False
    label_0, label_1 = row["label_0"], row["label_1"]
    return label_0 is not None and label_1 is not None and (label_0 != 0 or label_1 != 0)


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
    dataset = _leave_undecoded(dataset)
    if hasattr(dataset, "__len__"):
        size = len(dataset)
        count = min(num_rows, size)
        sample: Iterable = ((i * size // count, dataset[i * size // count]) for i in range(count))
        where = f"spread over {size}"
    else:
        sample, where = enumerate(islice(dataset, num_rows)), "from the beginning of the stream"
    bad, num_checked = [], 0
    for index, row in sample:
        columns = find_preference_columns(list(row), prompt_column)
        num_checked += 1
        for name in (columns.image_0, columns.image_1):
            try:
                read_image(row[name])
            except OSError as error:
                bad.append(BadRow(index, name, str(error)))
    if not bad:
        return bad
    num_bad = len({entry.index for entry in bad})
    by_column = ", ".join(f"{n} in `{name}`" for name, n in sorted(Counter(entry.column for entry in bad).items()))
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
        `TypeError`: If it is no such dataset, or a row is no dictionary.
        `ValueError`: If it is empty, columns are missing, labels are no preference, weights are no numbers, prompts no
            strings, the first row is unusable, or nothing passes the filters. Of a stream only the first rows are seen
            here; [`StepPreferenceCollator`] looks at the others.
    """
    _check_kind(dataset)
    dataset = _leave_undecoded(dataset)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("The preference dataset is empty.")
    columns = find_preference_columns(list(first), prompt_column)
    _check_keys(dataset, columns)
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
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("No row of the preference dataset passes the filter `only_different`.")
    _check_prompt(first[columns.prompt], columns.prompt, "the first row")
    if isinstance(dataset, (list, tuple)) or hasattr(dataset, "select"):
        for index, prompt in enumerate(_column(dataset, columns.prompt)):
            _check_prompt(prompt, columns.prompt, f"row {index}")
        for num_examples in _column(dataset, "num_example_per_prompt"):
            _weight(num_examples)
    for name in (columns.image_0, columns.image_1):
        try:
            read_image(first[name])
        except OSError:
            pass  # one broken image is the collator's business
        except ValueError as error:
            raise ValueError(f"Column `{name}` does not hold images. {error}") from error
    return dataset


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
    """Rows of a list may differ in what they have; those of a dataset do not."""
    needed = [columns.prompt, columns.image_0, columns.image_1, *(["label_0", "label_1"] if columns.labelled else [])]
    for index, row in enumerate(dataset if isinstance(dataset, (list, tuple)) else []):
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


def _check_prompt(prompt: Any, column: str, where: str):
    if not isinstance(prompt, str):
        raise ValueError(f"Column `{column}` must hold strings, {where} has a {type(prompt).__name__}.")
    if not is_unicode(prompt):
        raise ValueError(
            f"Column `{column}` must hold text, but {where} has {prompt[:60]!r}, which is no valid Unicode (half of a "
            "surrogate pair). Repair it with `prompt.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')`."
        )


def _weight(num_examples: Any) -> float:
    """Weight of a pair, given the number of pairs of its prompt."""
    if num_examples is None:
        return 1.0
    if isinstance(num_examples, torch.Tensor) and num_examples.numel() == 1:  # of `dataset.with_format("torch")`
        num_examples = num_examples.item()
    if not isinstance(num_examples, Real) or not 1 <= num_examples < math.inf:
        raise ValueError(f"`num_example_per_prompt` must be at least 1, got {num_examples!r}.")
    return 1.0 / num_examples


def _labels(label_0: Any, label_1: Any, where: str) -> tuple[float, float]:
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


def _leave_undecoded(dataset):
    for name, feature in (getattr(dataset, "features", None) or {}).items():
        if type(feature).__name__ == "Image" and getattr(feature, "decode", False):
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    return dataset


def _keep(dataset, columns: list[str], condition: Callable[[dict], bool], what: str):
    """The rows that fulfil `condition`, which sees `columns` only: images are neither read nor copied."""
    if isinstance(dataset, (list, tuple)):
        kept = [row for row in dataset if condition(row)]
    elif hasattr(dataset, "select"):  # a map-style `datasets.Dataset`
        columns = [name for name in columns if name in dataset.column_names]
        mask = np.array([condition(row) for row in _rows(dataset, columns)], dtype=bool)
        kept = dataset if mask.all() else dataset.select(np.flatnonzero(mask))
    else:  # a stream cannot be counted in advance
        return dataset.filter(condition)
    if len(kept) < len(dataset):
        logger.info("Dropped %d of %d pairs %s.", len(dataset) - len(kept), len(dataset), what)
    return kept


def _drop_unlabelled(dataset):
    dataset = _keep(dataset, ["has_label", "label_0", "label_1"], is_labelled, "that have no label")
    if isinstance(dataset, (list, tuple)) or hasattr(dataset, "select"):
        pairs = zip(_column(dataset, "label_0"), _column(dataset, "label_1"), strict=True)
        for index, (label_0, label_1) in enumerate(pairs):
            _labels(label_0, label_1, f"labelled row {index}")
    return dataset


def _limit_pairs_per_prompt(dataset, prompt_column: str, limit: int):
    if not isinstance(dataset, (list, tuple)) and not hasattr(dataset, "select"):
        raise ValueError(
            "`max_pairs_per_prompt` has to see all prompts at once and cannot filter a stream; load the dataset without "
            "streaming."
        )
    counts = Counter()

    def is_early(row):
        counts[row[prompt_column]] += 1
        return counts[row[prompt_column]] <= limit

    return _keep(dataset, [prompt_column], is_early, f"beyond {limit} per prompt")


def preference_labels(
    scores_0: torch.Tensor, scores_1: torch.Tensor, tie_band: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Labels from the scores of a preference model, as the paper's SDXL reward model is trained on those of PickScore.

    With p = softmax over the two scores, the pair is a tie (0.5 / 0.5) if |p_0 - p_1| < `tie_band`, else the higher
    score wins (1 / 0). As p_0 - p_1 = tanh(gap / 2), a band of 0.1 is a gap of 0.2007.

    Args:
        scores_0 (`torch.Tensor` of shape `(batch_size,)`):
            Scores of the first images.
        scores_1 (`torch.Tensor` of shape `(batch_size,)`):
            Scores of the second images.
        tie_band (`float`, *optional*, defaults to `0.1`):
            In [0, 1). Equal scores are a tie even with 0.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(batch_size,)`: `label_0` and `label_1`, float32.

    Raises:
        `ValueError`: If `tie_band` is out of range, or a score is not finite.
    """
    if not 0 <= tie_band < 1:
        raise ValueError(f"`tie_band` is a difference of probabilities and must lie in [0, 1), got {tie_band}.")
    gap = scores_0.float() - scores_1.float()
    if not bool(gap.isfinite().all()):
        raise ValueError("The preference model returned a score that is not finite, so there is no label.")
    difference = torch.tanh(gap / 2)  # p_0 - p_1
    label_0 = torch.where(difference.abs() < tie_band, torch.zeros_like(gap), gap.sign()) / 2 + 0.5
    return label_0, 1 - label_0


def score_clean_images(preference_model: Any, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    r"""
    Scores of finished images, for labels.

    Args:
        preference_model ([`StepAwareRewardModel`] or `Callable`):
            A reward model, asked at timestep 0 (one fresh from PickScore is PickScore), or a callable `(images
            (B, 3, H, W) in [0, 1], prompts) -> scores (B,)`.
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
            In [-1, 1].
        prompts (`list[str]`):
            One per image.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: float32.

    Raises:
        `ValueError`: If there is not one score per image.
    """
    with torch.no_grad():
        if is_reward_model(preference_model):
            reward = wrap_reward(preference_model)
            timesteps = torch.zeros(len(images), dtype=torch.long, device=images.device)
            scores = reward.score(images, reward.encode_prompts(prompts), timesteps)
        else:
            scores = preference_model((images / 2 + 0.5).clamp(0, 1), prompts)
    scores = torch.as_tensor(scores).float()
    if scores.shape != (len(prompts),):
        raise ValueError(
            f"The preference model must return one score per image, shape ({len(prompts)},), got "
            f"{tuple(scores.shape)}."
        )
    return scores


def relabel_preferences(
    dataset: Any,
    preference_model: Any,
    tie_band: float = 0.1,
    batch_size: int = 16,
    resolution: int = 512,
    prompt_column: str | None = None,
) -> Any:
    r"""
    Replaces human labels by the preferences of a model, once and for all. `StepRewardConfig(relabel_preferences=True)`
    does the same batch by batch during training; this is for looking at the labels, saving them, or using them twice.

    A row whose image cannot be read gets no label (`has_label` false) and is dropped by
    [`prepare_preference_dataset`].

    Args:
        dataset (`datasets.Dataset` or `list[dict]`):
            Pairs in Pick-a-Pic's format. Relabel before filtering: adding a column to a filtered dataset copies it.
        preference_model ([`StepAwareRewardModel`] or `Callable`):
            See [`score_clean_images`].
        tie_band (`float`, *optional*, defaults to `0.1`):
            See [`preference_labels`].
        batch_size (`int`, *optional*, defaults to `16`):
            Pairs per call of the model.
        resolution (`int`, *optional*, defaults to `512`):
            Side in pixels of the square images that the model is shown, as in [`StepRewardConfig`].
        prompt_column (`str`, *optional*):
            Column of the prompts.

    Returns:
        The same kind of dataset, with new `label_0`, `label_1` and `has_label`; the one passed in is left alone.

    Raises:
        `ValueError`: If the dataset is a stream or not in Pick-a-Pic's format.

    Example:

    ```python
    >>> pairs = load_preference_dataset("yuvalkirstain/pickapic_v1")
    >>> pickscore = StepAwareRewardModel.from_clip(
    ...     "yuvalkirstain/PickScore_v1", processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    ... )
    >>> relabel_preferences(pairs, pickscore.to("cuda"), resolution=1024).to_parquet("relabelled.parquet")
    ```
    """
    dataset = _leave_undecoded(dataset)
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            "A stream cannot be relabelled in advance; set `relabel_preferences=True` in the StepRewardConfig instead."
        )
    if len(dataset) == 0:
        raise ValueError("The preference dataset is empty.")
    columns = find_preference_columns(list(dataset[0]), prompt_column)
    if not columns.labelled:
        raise ValueError(
            "Labels can be replaced in Pick-a-Pic's format only (`jpg_0`, `jpg_1`, `label_0`, `label_1`): TRL's "
            "`chosen` and `rejected` cannot express a tie."
        )
    labels = torch.zeros(len(dataset), 2)  # two zeros: no label
    pairs = _read_pairs(dataset, columns, resolution)
    while batch := list(islice(pairs, batch_size)):
        indices, prompts, images_0, images_1 = zip(*batch, strict=True)
        images = torch.cat([torch.stack(images_0), torch.stack(images_1)])
        scores = score_clean_images(preference_model, images, list(prompts) * 2).cpu()
        labels[list(indices)] = torch.stack(preference_labels(*scores.chunk(2), tie_band), dim=-1)
    has_label = labels.sum(1) > 0
    if not bool(has_label.all()):
        logger.warning("%d of %d pairs have an unreadable image and no label.", int((~has_label).sum()), len(dataset))
    values = {"label_0": labels[:, 0].tolist(), "label_1": labels[:, 1].tolist(), "has_label": has_label.tolist()}
    if isinstance(dataset, (list, tuple)):
        return [{**row, **{name: values[name][i] for name in values}} for i, row in enumerate(dataset)]
    dataset = dataset.remove_columns([name for name in values if name in dataset.column_names])
    for name, column in values.items():
        dataset = dataset.add_column(name, column)
    return dataset


def _read_pairs(dataset, columns: PreferenceColumns, resolution: int) -> Iterator[tuple]:
    """`(index, prompt, image_0, image_1)` of the readable pairs."""
    for index, row in enumerate(dataset):
        try:
            images = [
                image_to_tensor(read_image(row[name]), resolution) for name in (columns.image_0, columns.image_1)
            ]
        except OSError:
            continue
        yield index, row[columns.prompt], *images


class StepPreferenceCollator:
    r"""
    Makes batches of image pairs from rows in Pick-a-Pic's or TRL's preference format.

    A row whose image cannot be decoded is skipped and counted in `num_bad`, a row without a label in
    `num_unlabelled`. A batch of which nothing is left becomes one blank pair of weight 0, so that no rank of a
    distributed run waits for another.

    Args:
        resolution (`int`):
            Side in pixels of the square images.
        prompt_column (`str`, *optional*):
            Column of the prompts. Defaults to `"caption"` or `"prompt"`.
        max_bad_image_fraction (`float`, *optional*, defaults to `0.01`):
            Largest tolerable share of undecodable rows, judged from the hundredth row on. Counted per data loading
            process.
        keep_unlabelled (`bool`, *optional*, defaults to `False`):
            Keep rows without a label, as ties, for a training that computes labels of its own.
        image_keys (`bool`, *optional*, defaults to `False`):
            Add `keys_0` and `keys_1`, what an [`EncodingCache`] knows the images by: a hash of their pixels, so that an
            image that occurs in several pairs, as Pick-a-Pic's do, is encoded once.

    Example:

    ```python
    >>> from PIL import Image
    >>> from trl_spo.preference_dataset import StepPreferenceCollator

    >>> red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    >>> batch = StepPreferenceCollator(resolution=8)([{"prompt": "red", "chosen": red, "rejected": blue}])
    >>> batch["prompts"], batch["images_0"].shape, batch["label_0"], batch["weights"]
    (['red'], torch.Size([1, 3, 8, 8]), tensor([1.]), tensor([1.]))
    ```
    """

    def __init__(
        self,
        resolution: int,
        prompt_column: str | None = None,
        max_bad_image_fraction: float = 0.01,
        keep_unlabelled: bool = False,
        image_keys: bool = False,
    ):
        self.resolution = resolution
        self.prompt_column = prompt_column
        self.max_bad_image_fraction = max_bad_image_fraction
        self.keep_unlabelled = keep_unlabelled
        self.image_keys = image_keys
        self.num_seen = self.num_bad = self.num_unlabelled = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        r"""
        Args:
            rows (`list[dict]`):
                Dataset rows.

        Returns:
            `dict` with `prompts` (`list[str]`), `images_0` and `images_1` (float32, shape
            `(batch_size, 3, resolution, resolution)`, in [-1, 1]), `label_0`, `label_1` and `weights` (float32, shape
            `(batch_size,)`). `weights` is `1 / num_example_per_prompt`, not yet normalised. With `image_keys` also
            `keys_0` and `keys_1` (`list[str]`).
        """
        columns = find_preference_columns(list(rows[0]), self.prompt_column)
        pairs = [pair for row in rows if (pair := self._read_row(row, columns)) is not None]
        limit = self.max_bad_image_fraction * max(self.num_seen, MIN_PAIRS_TO_JUDGE_BAD_IMAGES)
        if self.num_bad > limit:
            raise ValueError(
                f"{self.num_bad} of {self.num_seen} pairs have an unreadable image, more than the share of "
                f"`max_bad_image_fraction={self.max_bad_image_fraction}`; look at the columns `{columns.image_0}` and "
                f"`{columns.image_1}`."
            )
        if not pairs:
            blank = torch.zeros(3, self.resolution, self.resolution)
            pairs = [("", blank, blank, 0.5, 0.5, 0.0, "blank", "blank")]
        prompts, images_0, images_1, label_0, label_1, weights, keys_0, keys_1 = zip(*pairs, strict=True)
        batch = {
            "prompts": list(prompts),
            "images_0": torch.stack(images_0),
            "images_1": torch.stack(images_1),
            "label_0": torch.tensor(label_0, dtype=torch.float32),
            "label_1": torch.tensor(label_1, dtype=torch.float32),
            "weights": torch.tensor(weights, dtype=torch.float32),
        }
        return {**batch, "keys_0": list(keys_0), "keys_1": list(keys_1)} if self.image_keys else batch

    def _read_row(self, row: dict[str, Any], columns: PreferenceColumns) -> tuple | None:
        """`(prompt, image_0, image_1, label_0, label_1, weight, key_0, key_1)`, or `None` for a row that is skipped."""
        labelled = is_labelled(row)
        if not labelled and not self.keep_unlabelled:
            self.num_unlabelled += 1
            return None
        self.num_seen += 1
        try:
            pictures = [read_image(row[name]) for name in (columns.image_0, columns.image_1)]
        except OSError as error:
            self.num_bad += 1
            logger.warning("Skipped a pair with an unreadable image (prompt %r): %s", row[columns.prompt], error)
            return None
        images = [image_to_tensor(picture, self.resolution) for picture in pictures]
        keys = [_image_key(image) for image in images] if self.image_keys else ["", ""]
        if not labelled:
            labels = (0.5, 0.5)
        elif columns.labelled:
            labels = _labels(row["label_0"], row["label_1"], f"the pair of the prompt {row[columns.prompt]!r}")
        else:
            labels = (1.0, 0.0)
        _check_prompt(row[columns.prompt], columns.prompt, "a row")
        return row[columns.prompt], *images, *labels, _weight(row.get("num_example_per_prompt")), *keys


def _image_key(image: torch.Tensor) -> str:
    """The same for equal pixels, whatever file they come from."""
    return hashlib.blake2b(image.numpy().tobytes(), digest_size=16).hexdigest()
