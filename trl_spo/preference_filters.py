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
Multi-preference consistent filtering (https://huggingface.co/papers/2502.01051, section 4.2): keep the preference pairs
with which other metrics agree.

People prefer an image for many reasons, and a reward model learns the easiest ones. LPO's latent reward models fall for
aesthetics. So a pair is kept only if the chosen image is also the better one by text-to-image metrics (CLIP score, VQA
score), while its aesthetic score may be a little lower. A tie is kept if no metric sees a clear difference.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from .images import WHITE, image_to_tensor, parse_colour, read_image
from .preference_dataset import PreferenceColumns, find_preference_columns, is_labelled, leave_undecoded, read_labels


logger = logging.getLogger(__name__)

GapSource = str | tuple[str, str] | Callable[[torch.Tensor, list[str]], torch.Tensor]


class GapRule(NamedTuple):
    """
    When a metric agrees with a preference.

    Attributes:
        min_gap (`float`): score of the chosen minus score of the rejected image must be above this.
        max_tie_gap (`float`): of a tie, the absolute gap must be below this.
    """

    min_gap: float
    max_tie_gap: float


CONSISTENCY_STRATEGIES = {
    # The thresholds of the paper, appendix; they belong to the aesthetic predictor (1 to 10), the CLIP score and the VQA
    # score (both 0 to 1) that it names. Strategy 2 is the one behind the released models.
    1: {"aesthetic": GapRule(0.0, 0.2), "clip": GapRule(0.0, 0.03), "vqa": GapRule(0.0, 0.07)},
    2: {"aesthetic": GapRule(-0.5, 0.2), "clip": GapRule(0.0, 0.03), "vqa": GapRule(0.0, 0.07)},
    3: {"aesthetic": GapRule(-1.0, 0.2), "clip": GapRule(0.0, 0.03), "vqa": GapRule(0.0, 0.07)},
}


class FilteredPairs(NamedTuple):
    """
    Attributes:
        dataset: the pairs that were kept, in the kind of dataset that was given.
        counts (`dict[str, int]`): `pairs` and `ties` that were looked at, `kept_pairs` and `kept_ties`, `dropped/{metric}`
            for every metric (a pair that several contradict counts for each), `dropped/unlabelled`, and
            `dropped/no_score` for rows without a finite gap, such as those with an unreadable image.
    """

    dataset: Any
    counts: dict[str, int]


def filter_consistent_pairs(
    dataset: Any,
    gaps: Mapping[str, GapSource],
    rules: int | Mapping[str, GapRule | tuple[float, float]] = 2,
    prompt_column: str | None = None,
    batch_size: int = 16,
    resolution: int = 512,
    background: str = WHITE,
) -> FilteredPairs:
    r"""
    Keeps the preference pairs with which other metrics agree, and says how many were dropped and why.

    Args:
        dataset (`datasets.Dataset` or `list[dict]`):
            Pairs in Pick-a-Pic's or TRL's format; not a stream.
        gaps (`dict[str, str | tuple[str, str] | Callable]`):
            Where the scores of each metric are: a column with the gap, chosen minus rejected (of a tie, either way round),
            as the authors publish them; two columns with the scores of the first and the second image; or a function
            `(images (B, 3, resolution, resolution) in [0, 1], prompts) -> scores (B,)`.
        rules (`int` or `dict[str, GapRule]`, *optional*, defaults to `2`):
            A published strategy for the metrics `aesthetic`, `clip` and `vqa` (see `CONSISTENCY_STRATEGIES`), or the rule
            of each metric in `gaps`. Of a strategy, only the rules of the metrics in `gaps` are applied.
        prompt_column (`str`, *optional*):
            Column of the prompts.
        batch_size (`int`, *optional*, defaults to `16`):
            Pairs per call of a function.
        resolution (`int`, *optional*, defaults to `512`):
            Side in pixels of the square images that functions are shown.
        background (`str`, *optional*, defaults to `"white"`):
            Colour that shows through transparent images, for functions.

    Returns:
        [`FilteredPairs`].

    Raises:
        `ValueError`: If the dataset is empty or a stream, a column is missing, a metric has no rule, the background
            is not an opaque colour, or nothing is kept.

    Example:

    ```python
    >>> pairs = load_preference_dataset("yuvalkirstain/pickapic_v1")
    >>> kept, counts = filter_consistent_pairs(pairs, {"aesthetic": aesthetic_scorer, "clip": clip_scorer})
    >>> kept.to_parquet("consistent.parquet")
    ```
    """
    # Check the request before any image is scored.
    parse_colour(background)
    dataset = leave_undecoded(dataset)
    if not hasattr(dataset, "__len__"):
        raise ValueError("A stream cannot be filtered in advance: load the dataset without `streaming`.")
    if len(dataset) == 0:
        raise ValueError("The preference dataset is empty.")
    names = list(dataset[0])
    columns = find_preference_columns(names, prompt_column)
    rules = _rules_of(rules, gaps)
    _check_sources(gaps, names)

    # Collect the preferences, 0 for ties, and the scores of those metrics that are functions.
    rows = _without_images(dataset, columns)
    preferences = [_preference(row, columns) for row in rows]
    scored = _scores(dataset, gaps, columns, batch_size, resolution, background)
    counts = {"pairs": 0, "ties": 0, "kept_pairs": 0, "kept_ties": 0}
    counts |= {f"dropped/{name}": 0 for name in (*gaps, "unlabelled", "no_score")}

    # Judge row by row, and count why pairs are dropped.
    kept = []
    for index, (row, preference) in enumerate(zip(rows, preferences, strict=True)):
        if preference is None:
            counts["dropped/unlabelled"] += 1
            continue
        kind = "ties" if preference == 0 else "pairs"
        counts[kind] += 1
        values = {name: _gap(source, row, preference, scored.get(name), index) for name, source in gaps.items()}
        if not all(map(math.isfinite, values.values())):
            counts["dropped/no_score"] += 1
            continue
        against = [name for name, gap in values.items() if not _agrees(rules[name], gap, preference)]
        for name in against:
            counts[f"dropped/{name}"] += 1
        if not against:
            counts[f"kept_{kind}"] += 1
            kept.append(index)
    logger.info("Consistent pairs: %s", counts)
    if not kept:
        raise ValueError(f"No pair is consistent with all metrics: {counts}. Look at the direction of the gaps.")
    if isinstance(dataset, (list, tuple)):
        return FilteredPairs([dataset[index] for index in kept], counts)
    return FilteredPairs(dataset.select(kept), counts)


def _rules_of(rules, gaps: Mapping[str, GapSource]) -> dict[str, GapRule]:
    if isinstance(rules, int):
        if rules not in CONSISTENCY_STRATEGIES:
            raise ValueError(
                f"`rules` must be one of the strategies {list(CONSISTENCY_STRATEGIES)} or a dict, got {rules}."
            )
        rules = CONSISTENCY_STRATEGIES[rules]
    if not gaps:
        raise ValueError(f"`gaps` names no metric; there are rules for {list(rules)}.")
    missing = [name for name in gaps if name not in rules]
    if missing:
        raise ValueError(
            f"There is no rule for {missing}, only for {list(rules)}. Pass `rules={{name: GapRule(...)}}`."
        )
    return {name: GapRule(*rules[name]) for name in gaps}


def _check_sources(gaps: Mapping[str, GapSource], names: list[str]) -> None:
    for metric, source in gaps.items():
        if callable(source):
            continue
        wanted = [source] if isinstance(source, str) else list(source)
        if len(wanted) > 2 or not all(isinstance(name, str) for name in wanted):
            raise ValueError(f"`gaps[{metric!r}]` must be a column, two columns or a function, got {source!r}.")
        missing = [name for name in wanted if name not in names]
        if missing:
            raise ValueError(f"The dataset has no column {missing} for the metric {metric!r}, only {sorted(names)}.")


def _without_images(dataset, columns: PreferenceColumns) -> list[dict]:
    """The rows without their images, which are large and not needed here."""
    if isinstance(dataset, (list, tuple)):
        rows = []
        for row in dataset:
            rows.append({name: value for name, value in row.items() if name not in columns.images})
        return rows
    return list(dataset.remove_columns(list(columns.images)))


def _preference(row: dict, columns: PreferenceColumns) -> int | None:
    """1 if the first image is chosen, -1 if the second is, 0 for a tie, `None` without a label."""
    if not is_labelled(row):
        return None
    if not columns.labelled:
        return 1
    first, second = read_labels(row["label_0"], row["label_1"], f"the pair of the prompt {row[columns.prompt]!r}")
    return (first > second) - (first < second)


def _scores(
    dataset,
    gaps: Mapping[str, GapSource],
    columns: PreferenceColumns,
    batch_size: int,
    resolution: int,
    background: str,
) -> dict[str, list[float]]:
    """Per metric that is a function: score of the first minus that of the second image; NaN where one is unreadable."""
    functions = {name: source for name, source in gaps.items() if callable(source)}
    gaps_of = {name: [math.nan] * len(dataset) for name in functions}
    if not functions:
        return gaps_of
    waiting = []
    for index in range(len(dataset)):
        row = dataset[index]
        try:
            images = [image_to_tensor(read_image(row[name], background), resolution) for name in columns.images]
        except OSError:
            images = None
        if images is not None:
            waiting.append((index, row[columns.prompt], images))
        if len(waiting) == batch_size or (waiting and index == len(dataset) - 1):
            for name, function in functions.items():
                for (position, _, _), gap in zip(waiting, _score_batch(name, function, waiting), strict=True):
                    gaps_of[name][position] = gap
            waiting = []
    return gaps_of


@torch.no_grad()
def _score_batch(name: str, function: Callable, batch: list[tuple]) -> list[float]:
    """First minus second score of every pair of the batch, from one call on all its images."""
    first = torch.stack([images[0] for _, _, images in batch])
    second = torch.stack([images[1] for _, _, images in batch])
    prompts = [prompt for _, prompt, _ in batch]
    images = (torch.cat([first, second]) / 2 + 0.5).clamp(0, 1)
    scores = torch.as_tensor(function(images, prompts * 2)).float().cpu()
    if scores.shape != (len(images),):
        raise ValueError(
            f"The metric {name!r} must return one score per image, shape ({len(images)},), got {tuple(scores.shape)}."
        )
    scores_0, scores_1 = scores.chunk(2)
    return (scores_0 - scores_1).tolist()


def _gap(source: GapSource, row: dict, preference: int, scored: list[float] | None, index: int) -> float:
    """Chosen minus rejected; of a tie, first minus second."""
    if isinstance(source, str):
        gap = row[source]
        return math.nan if gap is None else float(gap)
    if callable(source):
        difference = scored[index]
    else:
        scores = [row[name] for name in source]
        difference = math.nan if None in scores else float(scores[0]) - float(scores[1])
    return difference * (preference or 1)


def _agrees(rule: GapRule, gap: float, preference: int) -> bool:
    return abs(gap) < rule.max_tie_gap if preference == 0 else gap > rule.min_gap
