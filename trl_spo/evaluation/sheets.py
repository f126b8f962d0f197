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
Draw sheets of images with Pillow: before and after training, the candidate tree of a rollout, grids with labelled axes, a
plain grid.

Each function returns a `PIL.Image.Image`, for a notebook or for `.save(...)`. A colour has one meaning on all of them and on
the curves: green is chosen or better, red rejected or worse, blue the model or what goes on, grey what they are compared with.
"""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw

from ..captions import (
    CELL_WIDTH,
    INK,
    LINE,
    MARGIN,
    MUTED,
    PAPER,
    caption_lines,
    cell_picture,
    fit_lines,
    font,
    heading_height,
    printable,
    write_heading,
    write_lines,
    write_title,
)
from ..images import to_pil
from ..step_pairs import BranchRecord, StepPairs


LEGEND_WIDTH = 360  # pixels that the legend of a candidate tree needs
BETTER = "#1a9850"
WORSE = "#d73027"
NEXT = "#2166ac"
NOTICEABLE = 0.25  # a change below this share of a metric's standard deviation gets no colour
TREE_CAPTION = (
    "A column per step at which the rollout branches, from noise to image. Its images are predictions of the finished image "
    "(x_0) from candidates that left one and the same latent, the best score first. The chosen and the rejected one are the "
    "pair that is trained; the bar marks the one from which the next step goes on."
)


def evenly_spaced(count: int, num_shown: int) -> list[int]:
    """
    Positions spread evenly over a list, the first one included: what is shown of many images, so that nobody picks.

    Args:
        count (`int`): length of the list.
        num_shown (`int`): how many positions are wanted.

    Returns:
        `list[int]`: `min(count, num_shown)` positions, ascending.
    """
    num_shown = min(count, num_shown)
    return [index * count // num_shown for index in range(num_shown)]


# --- grids of images -------------------------------------------------------------------------------------------------


def image_grid(images: torch.Tensor, columns: int = 8, gap: int = 4) -> Image.Image:
    """
    Images in reading order.

    Args:
        images (`torch.Tensor` of shape `(N, 3, H, W)`): in [0, 1], N at least 1.
        columns (`int`, *optional*, defaults to `8`): images per row.
        gap (`int`, *optional*, defaults to `4`): pixels between them.

    Returns:
        `PIL.Image.Image`.
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height = images.shape[-2] + gap
    width = images.shape[-1] + gap
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), PAPER)
    for i, image in enumerate(images):
        sheet.paste(to_pil(image), (gap + i % columns * width, gap + i // columns * height))
    return sheet


def before_after_sheet(
    before: torch.Tensor,
    after: torch.Tensor,
    prompts: list[str],
    before_scores: dict[str, torch.Tensor] | None = None,
    after_scores: dict[str, torch.Tensor] | None = None,
    columns: int = 4,
    size: int = 128,
    title: str | None = None,
    sides: tuple[str, str] = ("before", "after"),
) -> Image.Image:
    """
    Pairs of images from the same prompt and seed, left before and right after training, with their scores.

    A score that rose is green, one that fell is red, if it moved by at least a quarter of the metric's standard deviation on
    this sheet: a smaller difference cannot be told from that of another seed.

    Args:
        before, after (`torch.Tensor` of shape `(N, 3, H, W)`): in [0, 1].
        prompts (`list[str]`): N prompts.
        before_scores, after_scores (`dict[str, torch.Tensor]`, *optional*): per metric, `(N,)` scores.
        columns (`int`, *optional*, defaults to `4`): pairs per row.
        size (`int`, *optional*, defaults to `128`): pixels of one image's side.
        title (`str`, *optional*): heading; state the sampler in it.
        sides (`tuple[str, str]`, *optional*, defaults to `("before", "after")`): what is written above the images.

    Texts of any length and script are wrapped and cut to their place; a font of the system is used for characters
    DejaVu Sans does not have.

    Returns:
        `PIL.Image.Image`.

    Raises:
        ValueError: if the numbers of images, prompts and scores differ.
    """
    before_scores = before_scores or {}
    after_scores = after_scores or {}
    _check_lengths(before, after, prompts, before_scores, after_scores)

    # Lay out the sheet: a cell per prompt, and a heading.
    metrics = list(dict.fromkeys([*before_scores, *after_scores]))
    columns = max(1, min(columns, len(prompts)))
    rows = -(-len(prompts) // columns)
    height = round(size * before.shape[-2] / before.shape[-1])
    cell_width = 2 * size + 24
    cell_height = 18 + height + 34 + 15 * len(metrics) + 14
    top = 40 if title else 10
    width = columns * cell_width + 12
    note = caption_lines(_note_on_scores(before_scores, after_scores), width - 2 * MARGIN, 3, size=11)
    bottom = top + rows * cell_height
    sheet = Image.new("RGB", (width, bottom + 8 + LINE * len(note)), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        write_title(draw, title, top=10, size=16, width=sheet.width)
    write_lines(draw, note, (MARGIN, bottom), size=11, fill=MUTED)
    noticeable = {name: _noticeable_change(before_scores.get(name), after_scores.get(name)) for name in metrics}

    # Draw the cells: image, prompt and scores of both sides.
    small = font(11)
    for i, prompt in enumerate(prompts):
        x = 12 + (i % columns) * cell_width
        y = top + (i // columns) * cell_height
        scores_before = {name: values[i].item() for name, values in before_scores.items()}
        scores_after = {name: values[i].item() for name, values in after_scores.items()}
        cells = ((sides[0], before[i], scores_before), (sides[1], after[i], scores_after))
        for side, (name, image, scores) in enumerate(cells):
            left = x + side * (size + 4)
            draw.text((left, y), name, font=small, fill=MUTED)
            sheet.paste(to_pil(image, size), (left, y + 16))
            for line, metric in enumerate(metrics):
                if metric in scores:
                    text = fit_lines(f"{scores[metric]:.2f} {metric}", small, size, 1)[0]
                    color = _color_of_change(scores_before.get(metric), scores[metric], noticeable[metric])
                    draw.text((left, y + 18 + height + 34 + 15 * line), text, font=small, fill=color)
        write_lines(draw, caption_lines(prompt, 2 * size, 2), (x, y + 19 + height))
    return sheet


def _check_lengths(before, after, prompts, before_scores, after_scores) -> None:
    lengths = {"before": len(before), "after": len(after), "prompts": len(prompts)}
    for scores in (before_scores, after_scores):
        lengths |= {f"scores of {name!r}": len(values) for name, values in scores.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"A sheet needs as many images before and after, prompts and scores; got {lengths}.")


def _note_on_scores(before_scores: dict[str, torch.Tensor], after_scores: dict[str, torch.Tensor]) -> str:
    """What numbers and colours of a sheet mean; nothing where there are no numbers."""
    if not before_scores and not after_scores:
        return ""
    note = "Same prompt and seed on both sides. Scores: higher is better."
    if before_scores and after_scores:
        note += " Green and red: moved by at least a quarter of the standard deviation of the metric on this sheet."
    return note


def _noticeable_change(before: torch.Tensor | None, after: torch.Tensor | None) -> float:
    """The smallest change of a metric that gets a colour; its printed digits show none below 0.01."""
    if before is None or after is None:
        return 0.01
    values = torch.cat([torch.as_tensor(before).double(), torch.as_tensor(after).double()])
    return max(0.01, NOTICEABLE * values.std().item())


def _color_of_change(before: float | None, after: float, noticeable: float) -> str:
    """Green or red for a score that rose or fell noticeably, as far as its two printed digits show it."""
    change = 0 if before is None else round(after, 2) - round(before, 2)
    if abs(change) < noticeable - 1e-9:
        return INK
    return BETTER if change > 0 else WORSE


# --- grids with labelled axes ----------------------------------------------------------------------------------------


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str | None = None,
    width: int = CELL_WIDTH,
) -> Image.Image:
    """
    A table of images: what changes from column to column is written above, what changes from row to row on the left.

    Args:
        rows (sequence of sequences of `PIL.Image.Image`): R rows of C images.
        row_labels (sequence of `str`): R texts, such as prompts or `"checkpoint 100"`.
        column_labels (sequence of `str`): C texts.
        title (`str`, *optional*): heading; what follows a line break is written small.
        width (`int`, *optional*, defaults to `192`): see [`cell_picture`].

    Returns:
        `PIL.Image.Image`.

    Raises:
        ValueError: if images and labels do not fit together, or there are none.
    """
    if not rows or len(rows) != len(row_labels) or any(len(row) != len(column_labels) or not row for row in rows):
        raise ValueError(
            f"A grid needs a label per row and per column, got {len(row_labels)} and {len(column_labels)} labels for rows of "
            f"{[len(row) for row in rows]} images."
        )

    # Lay out the sheet: labels of rows are as wide as the longest needs, up to an image.
    cells = [[cell_picture(picture, width) for picture in row] for row in rows]
    cell_width = max(cell.width for row in cells for cell in row)
    cell_height = max(cell.height for row in cells for cell in row)
    longest = max(font(12, label).getlength(printable(label)) for label in row_labels)
    label_width = round(min(longest, cell_width)) + MARGIN
    heads = [caption_lines(label, cell_width, 2) for label in column_labels]
    top = heading_height(title) + LINE * max(len(head) for head in heads) + 4
    left = MARGIN + label_width
    size = (left + len(column_labels) * (cell_width + 4) + MARGIN, top + len(rows) * (cell_height + 4) + MARGIN)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    write_heading(draw, title, sheet.width)

    # Draw the labels, and then the images row by row.
    for column, head in enumerate(heads):
        write_lines(draw, head, (left + column * (cell_width + 4), top - 4 - LINE * len(head)))
    for index, (row, label) in enumerate(zip(cells, row_labels, strict=True)):
        upper = top + index * (cell_height + 4)
        write_lines(draw, caption_lines(label, label_width - MARGIN // 2, cell_height // LINE), (MARGIN, upper))
        for column, cell in enumerate(row):
            sheet.paste(cell, (left + column * (cell_width + 4), upper))
    return sheet


# --- the candidate tree ----------------------------------------------------------------------------------------------


@torch.no_grad()
def candidate_tree(
    pipeline, pairs: StepPairs, prompt_row: int = 0, size: int = 96, title: str | None = None
) -> Image.Image:
    """
    The branches of one prompt's rollout: a column per branching step, its K candidates as predicted clean images.

    The chosen candidate is framed green, the rejected one red (both grey where the scores are too close to form a
    pair), and a blue bar marks the candidate that starts the next step. Scores are printed below, and a caption says what is
    seen.

    Args:
        pipeline ([`SPOPipeline`]): decodes the predictions.
        pairs ([`StepPairs`]): from `stepwise_rollout(..., return_trajectory=True)`.
        prompt_row (`int`, *optional*, defaults to `0`): which prompt of the rollout.
        size (`int`, *optional*, defaults to `96`): pixels of one image's side.
        title (`str`, *optional*): heading, such as the prompt.

    Returns:
        `PIL.Image.Image`.

    Raises:
        ValueError: if the rollout kept no trajectory.
        IndexError: if there is no such prompt.
    """
    if not pairs.branches or pairs.branches[0].pred_original_samples is None:
        raise ValueError("The rollout kept no trajectory; call `stepwise_rollout(..., return_trajectory=True)`.")
    num_candidates, num_prompts = pairs.branches[0].scores.shape
    if not -num_prompts <= prompt_row < num_prompts:
        raise IndexError(
            f"`prompt_row` must be in [0, {num_prompts}), one of the rollout's prompts; got {prompt_row}."
        )

    # Lay out the sheet: a column per branch, a heading and a legend.
    latents = pairs.branches[0].pred_original_samples
    column_width = size + 26
    cell_height = round(size * latents.shape[-2] / latents.shape[-1]) + 34
    top = 26 if title else 0
    caption_top = top + 58 + num_candidates * cell_height
    width = max(12 + len(pairs.branches) * column_width, LEGEND_WIDTH)
    caption = caption_lines(TREE_CAPTION, width - 2 * MARGIN, 12, size=11)
    legend = caption_top + LINE * len(caption) + 6
    sheet = Image.new("RGB", (width, legend + 24), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        write_title(draw, title, top=8, size=14, width=width)

    write_lines(draw, caption, (MARGIN, caption_top), size=11, fill=MUTED)

    # Draw the branches, and the meaning of their colours.
    for column, branch in enumerate(pairs.branches):
        images = pipeline.decode_latents(branch.pred_original_samples[:, prompt_row]) / 2 + 0.5
        _draw_branch(sheet, branch, prompt_row, images, (12 + column * column_width, top), size, cell_height)
    for x, color, text in ((12, BETTER, "chosen"), (112, WORSE, "rejected"), (202, NEXT, "starts the next step")):
        draw.rectangle((x, legend + 2, x + 12, legend + 14), fill=color)
        draw.text((x + 18, legend), text, font=font(12), fill=INK)
    return sheet


def _draw_branch(
    sheet: Image.Image,
    branch: BranchRecord,
    prompt_row: int,
    images: torch.Tensor,
    corner: tuple[int, int],
    size: int,
    cell_height: int,
) -> None:
    """One column of the tree: the candidates of a branch, the highest score first."""
    draw = ImageDraw.Draw(sheet)
    small = font(11)
    x, top = corner
    scores = branch.scores[:, prompt_row]
    chosen, rejected, valid = (int(part[prompt_row]) for part in branch.selection)
    frames = {chosen: BETTER, rejected: WORSE} if valid else {chosen: MUTED, rejected: MUTED}
    draw.text((x, top + 10), f"t = {branch.timestep}", font=font(12), fill=INK)
    draw.text((x, top + 28), "pair" if valid else "no pair", font=small, fill=INK if valid else MUTED)
    for row, candidate in enumerate(scores.argsort(descending=True).tolist()):
        y = top + 52 + row * cell_height
        if candidate in frames:
            box = (x - 4, y - 4, x + size + 3, y + cell_height - 31)
            draw.rectangle(box, outline=frames[candidate], width=4)
        sheet.paste(to_pil(images[candidate], size), (x, y))
        if candidate == int(branch.next_index[prompt_row]):
            draw.rectangle((x + size + 6, y, x + size + 11, y + cell_height - 35), fill=NEXT)
        draw.text((x, y + cell_height - 28), f"{scores[candidate]:.2f}", font=small, fill=INK)
