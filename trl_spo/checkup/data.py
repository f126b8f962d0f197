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

"""The data of a run: prompts and preference pairs, read where they are, without a model."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..preference_dataset import (
    check_images,
    find_preference_columns,
    is_labelled,
    load_preference_dataset,
    prepare_preference_dataset,
    read_labels,
)
from ..prompts import OF_OTHER_PROGRAMS, load_prompts, read_prompts
from .report import OK, PROBLEM, WARNING, Finding


SECTION = "data"
CHECKED_IMAGES = 64  # rows whose images are decoded
CHECKED_LABELS = 20_000  # rows whose labels are counted


def is_readable_here(name: str) -> bool:
    """Whether data can be read without downloading anything."""
    return Path(name).exists()


def check_prompts(
    option: str,
    name: str,
    split: str = "train",
    column: str | None = None,
    pipeline: str | None = None,
    streaming: bool = False,
) -> tuple[list[Finding], int | None]:
    """
    The prompts of a local file or dataset; of a stream the first hundred.

    Args:
        option (`str`): argument that names them.
        name (`str`), split (`str`), column (`str`, *optional*): as [`load_prompts`] and [`read_prompts`] take them.
        pipeline (`str`, *optional*): folder or Hub id of the pipeline, whose tokenizers tell how much of a prompt is read.
        streaming (`bool`, *optional*, defaults to `False`): they will be read when they are needed.

    Returns:
        `tuple`: findings, and the number of prompts, or `None` if it is not known.
    """
    if not is_readable_here(name):
        return [], None
    try:
        loaded = load_prompts(name, split, streaming)
        read = read_prompts(loaded, column, option)
        prompts = read.first if streaming else list(read)
    except Exception as error:  # each kind of file breaks in its own way, and says so
        return [Finding(SECTION, PROBLEM, option, str(error).strip())], None
    where = f" in column {read.column!r}" if hasattr(read, "column") else ""
    text = f"{len(prompts):,} prompts{where} of {name!r}"
    if streaming:
        text = f"a stream of {loaded.num_shards:,} shards with prompts{where} of {name!r}; the first {len(prompts)} can be used"
    findings = [Finding(SECTION, OK, option, text), *check_texts(option, prompts)]
    if pipeline is not None:
        findings += check_lengths(option, prompts, pipeline)
    return findings, None if streaming else len(prompts)


def check_texts(option: str, prompts: Sequence[str]) -> list[Finding]:
    """Duplicates, and marks of other programs."""
    findings = []
    duplicates = len(prompts) - len(set(prompts))
    if duplicates:
        most, count = Counter(prompts).most_common(1)[0]
        text = f"{duplicates:,} prompts are there more than once; most often, {count} times, {shown(most)}"
        findings.append(Finding(SECTION, WARNING, option, text))
    for what, pattern in OF_OTHER_PROGRAMS.items():
        found = [prompt for prompt in prompts if pattern.search(prompt)]
        if found:
            text = (
                f"{len(found):,} prompts hold {what} of other programs, which is text here, such as {shown(found[0])}"
            )
            findings.append(Finding(SECTION, WARNING, option, text))
    return findings


def shown(prompt: str) -> str:
    """A prompt for a message."""
    return repr(prompt if len(prompt) <= 60 else f"{prompt[:57]}...")


def check_lengths(option: str, prompts: Sequence[str], pipeline: str) -> list[Finding]:
    """How many prompts are longer than the first text encoder reads, if its tokenizer is within reach."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(pipeline, subfolder="tokenizer", local_files_only=True)
    except Exception:  # not here
        return []
    limit = tokenizer.model_max_length
    lengths = [len(ids) for ids in tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]]
    too_long = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length > limit]
    if not too_long:
        return [Finding(SECTION, OK, option, f"the longest has {max(lengths)} of {limit} tokens")]
    text = f"{len(too_long):,} prompts are longer than the {limit} tokens that the text encoder reads; their ends are "
    text += f"left out, such as of {shown(too_long[0])}"
    return [Finding(SECTION, WARNING, option, text)]


def check_preferences(option: str, name: str, config: Any, split: str = "train") -> tuple[list[Finding], int | None]:
    """
    The preference pairs of a local dataset.

    Args:
        option (`str`): argument that names them.
        name (`str`), split (`str`): as [`load_preference_dataset`] takes them.
        config ([`StepRewardConfig`]): how pairs are filtered.

    Returns:
        `tuple`: findings, and the number of pairs that remain, or `None` if it is not known.
    """
    if not is_readable_here(name):
        return [], None
    try:
        loaded = load_preference_dataset(name, split=split)
        columns = find_preference_columns(loaded.column_names, config.dataset_prompt_column)
        text = f"{len(loaded):,} rows: prompts in {columns.prompt!r}, images in {columns.image_0!r} and {columns.image_1!r}"
        findings = [Finding(SECTION, OK, option, text)]
        findings += check_labels(option, loaded, columns)
        kept = prepare_preference_dataset(
            loaded,
            config.dataset_prompt_column,
            only_different=config.only_different,
            max_pairs_per_prompt=config.max_pairs_per_prompt,
            drop_unlabelled=not config.relabel_preferences,
        )
        findings += check_pictures(option, kept, config)
    except Exception as error:  # each kind of data breaks in its own way, and says so
        return [Finding(SECTION, PROBLEM, option, str(error).strip())], None
    return findings, len(kept)


def check_labels(option: str, dataset: Any, columns: Any) -> list[Finding]:
    """How often the first image, the second or neither is preferred."""
    if not columns.labelled:
        return [Finding(SECTION, OK, option, "each pair is a chosen and a rejected image: there are no ties")]
    names = [name for name in ("label_0", "label_1", "has_label") if name in dataset.column_names]
    counts = Counter()
    for index, row in enumerate(dataset.select_columns(names).take(CHECKED_LABELS)):
        if not is_labelled(row):
            counts["without a label"] += 1
            continue
        first, second = read_labels(row["label_0"], row["label_1"], f"row {index}")
        counts["first image"] += first > second
        counts["second image"] += second > first
        counts["ties"] += first == second
    rows = sum(counts.values())
    text = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count) + f" of {rows:,} rows"
    unlabelled = counts["without a label"]
    decided = counts["first image"] + counts["second image"]
    mark = WARNING if unlabelled > rows / 2 or not decided else OK
    return [Finding(SECTION, mark, option, f"preferred: {text}")]


def check_pictures(option: str, dataset: Any, config: Any) -> list[Finding]:
    """
    Whether a sample of the images can be read.

    Raises:
        ValueError: if too many cannot.
    """
    bad = check_images(dataset, CHECKED_IMAGES, config.max_bad_image_fraction, config.dataset_prompt_column)
    if bad:
        text = f"{len(bad)} images of a sample cannot be read and will be skipped; the first: row {bad[0].index}, {bad[0].error}"
        return [Finding(SECTION, WARNING, option, text)]
    return [
        Finding(SECTION, OK, option, f"a sample of {min(CHECKED_IMAGES, len(dataset))} pairs of images can be read")
    ]
