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

"""Look at a preference dataset before a model learns from it: its numbers as text, and a sheet of its pairs."""

import io
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, UnidentifiedImageError

from ..captions import INK, MUTED, PAPER, fit_lines, font, printable, write_title
from ..images import read_image
from ..preference_dataset import PreferenceColumns, find_preference_columns, is_labelled, leave_undecoded, read_labels
from .agreement import Agreement, Preference, agreement_between, second_preferred, self_agreement, side_bias
from .sheets import BETTER


NUM_SIZES = 256  # images whose sizes are looked up, spread over the dataset


def preview_text(dataset: Any, title: str = "") -> str:
    r"""
    Counts, prompts, image sizes, annotators and their agreement.

    Args:
        dataset (`datasets.Dataset`): in Pick-a-Pic's or TRL's format.
        title (`str`, *optional*): the first line.

    Returns:
        `str`: lines of text.

    Raises:
        ValueError: if columns are missing, or labels are not preferences.
    """
    dataset = leave_undecoded(dataset)
    columns = find_preference_columns(dataset.column_names)
    rows = list(dataset.remove_columns(list(columns.images)))
    labels = [first_label(row, columns, f"row {index}") for index, row in enumerate(rows)]
    known = [label for label in labels if label is not None]
    ties = sum(label == 0.5 for label in known)
    per_prompt = sorted(Counter(row[columns.prompt] for row in rows).values())
    unlabelled = len(labels) - len(known)
    lines = [title] if title else []
    lines += [
        f"pairs          {len(rows)}" + (f", {unlabelled} of them without a label" if unlabelled else ""),
        f"ties           {ties}" + (f" ({ties / len(known):.0%} of the labels{_tie_note(dataset)})" if known else ""),
        f"prompts        {len(per_prompt)}",
    ]
    if per_prompt:
        middle = per_prompt[len(per_prompt) // 2]
        lines.append(f"pairs/prompt   {per_prompt[0]} to {per_prompt[-1]}, median {middle}")
        lines.append(f"image sizes    {_sizes(dataset, columns)}")
    if "votes" in dataset.column_names:
        lines += vote_lines([row["votes"] or [] for row in rows])
    return "\n".join(lines)


def _tie_note(dataset) -> str:
    return ", pairs on which annotators cancel out included" if "votes" in dataset.column_names else ""


def first_label(row: dict, columns: PreferenceColumns, where: str) -> float | None:
    """The label of a row's first image, `None` without one."""
    if not is_labelled(row):
        return None
    return read_labels(row["label_0"], row["label_1"], where)[0] if columns.labelled else 1.0


def _sizes(dataset, columns: PreferenceColumns) -> str:
    """The most frequent sizes; only headers are read."""
    counts: Counter[str] = Counter()
    count = min(NUM_SIZES, len(dataset))
    for i in range(count):
        row = dataset[i * len(dataset) // count]
        for name in columns.images:
            counts[_size(row[name])] += 1
    shown = [f"{size} ({number / counts.total():.0%})" for size, number in counts.most_common(4)]
    more = f" and {len(counts) - 4} others" if len(counts) > 4 else ""
    return ", ".join(shown) + more


def _size(image: Any) -> str:
    content = image
    if isinstance(image, dict):
        content = image["path"] if image.get("bytes") is None else image["bytes"]
    try:
        with Image.open(content if isinstance(content, str) else io.BytesIO(content)) as opened:
            return f"{opened.width} x {opened.height}"
    except (OSError, TypeError, UnidentifiedImageError):
        return "unreadable"


def vote_lines(votes: Sequence[Sequence[dict]]) -> list[str]:
    """Lines about annotators, from the `votes` of every pair."""
    counts = Counter(vote["annotator"] for row in votes for vote in row)
    if not counts:
        return []
    lines = ["annotators     " + ", ".join(f"{name} ({number} votes)" for name, number in sorted(counts.items()))]
    for name, agreement in self_agreement(votes).items():
        if agreement.n:
            lines.append(f"self-agreement {name}: {agreement_words(agreement)}")
    for (name, other), agreement in agreement_between(votes).items():
        if agreement.n:
            lines.append(f"agreement      {name} and {other}: {agreement_words(agreement)}")
    lines.append(f"left           {preference_words(side_bias(votes))}")
    lines.append(f"second image   {preference_words(second_preferred(votes))}")
    return lines


def preference_words(preference: Preference) -> str:
    """`preferred in 44% of 115 votes; if it does not matter, 41% to 59% are expected`."""
    if preference.n == 0:
        return "no vote for either"
    low, high = 0.5 - preference.half_width, 0.5 + preference.half_width
    expected = f"if it does not matter, {max(low, 0):.0%} to {min(high, 1):.0%} are expected"
    return f"preferred in {preference.share:.0%} of {preference.n} votes; {expected}"


def agreement_words(agreement: Agreement) -> str:
    """`90% of 20 pairs, Cohen's kappa 0.81`."""
    kappa = "undefined" if math.isnan(agreement.kappa) else f"{agreement.kappa:.2f}"
    return f"{agreement.share:.0%} of {agreement.n} pairs, Cohen's kappa {kappa}"


# --- the sheet -------------------------------------------------------------------------------------------------------


def preference_sheet(dataset: Any, num_pairs: int = 16, columns: int = 4, size: int = 150, title: str | None = None):
    r"""
    Pairs of a dataset, spread evenly over it, with the preferred image framed green.

    Args:
        dataset (`datasets.Dataset`): in Pick-a-Pic's or TRL's format.
        num_pairs (`int`, *optional*, defaults to `16`): pairs on the sheet.
        columns (`int`, *optional*, defaults to `4`): pairs per row.
        size (`int`, *optional*, defaults to `150`): side in pixels of the square that an image is fitted into.
        title (`str`, *optional*): heading.

    Returns:
        `PIL.Image.Image`.
    """
    dataset = leave_undecoded(dataset)
    names = find_preference_columns(dataset.column_names)
    count = min(num_pairs, len(dataset))
    columns = max(1, min(columns, count))
    top = 44 if title else 12
    cell = (2 * size + 34, size + 62)
    rows = max(1, math.ceil(count / columns))
    sheet = Image.new("RGB", (columns * cell[0] + 12, top + rows * cell[1]), PAPER)
    if title:
        write_title(ImageDraw.Draw(sheet), title, top=12, size=16, width=sheet.width)
    for position in range(count):
        index = position * len(dataset) // count
        corner = (16 + position % columns * cell[0], top + position // columns * cell[1])
        _draw_pair(sheet, dataset[index], names, corner, size, f"row {index}")
    return sheet


def _draw_pair(sheet: Image.Image, row: dict, names: PreferenceColumns, corner, size: int, where: str) -> None:
    """One cell: both images, the frame of the preferred one, the label and the prompt."""
    draw = ImageDraw.Draw(sheet)
    label = first_label(row, names, where)
    for side, name in enumerate(names.images):
        left = corner[0] + side * (size + 10)
        box = (left - 4, corner[1] - 4, left + size + 3, corner[1] + size + 3)
        if label is not None and label != 0.5 and (label > 0.5) == (side == 0):
            draw.rectangle(box, outline=BETTER, width=3)
        try:
            picture = fitted(read_image(row[name]), size)
        except OSError:
            draw.text((left + 8, corner[1] + size // 2), "unreadable", font=font(12), fill=MUTED)
            continue
        place = (left + (size - picture.width) // 2, corner[1] + (size - picture.height) // 2)
        sheet.paste(picture, place)
    y = corner[1] + size + 8
    draw.text((corner[0], y), label_words(label), font=font(11), fill=MUTED)
    prompt = printable(row[names.prompt])
    face = font(12, prompt)
    for line, text in enumerate(fit_lines(prompt, face, 2 * size + 10, 2)):
        draw.text((corner[0], y + 14 + 15 * line), text, font=face, fill=INK)


def label_words(label: float | None) -> str:
    """What the label of the first image says."""
    if label is None:
        return "no label"
    if label == 0.5:
        return "tie"
    side = "left" if label > 0.5 else "right"
    share = max(label, 1 - label)
    return f"{side} preferred" if share == 1 else f"{side} preferred by {share:.0%}"


def fitted(picture: Image.Image, size: int) -> Image.Image:
    """The picture in a square of `size` pixels, whole; small ones are enlarged without smoothing."""
    scale = size / max(picture.size)
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return picture.resize(tuple(max(1, round(side * scale)) for side in picture.size), resample)
