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
Draw sheets of images with Pillow: before and after training, the candidate tree of a rollout, a plain grid.

Each function returns a `PIL.Image.Image`, for a notebook or for `.save(...)`.
"""

import functools
import importlib.util
import os
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from ..images import to_pil
from ..step_pairs import BranchRecord, StepPairs


LEGEND_WIDTH = 360  # pixels that the legend of a candidate tree needs
BETTER = "#1a9850"
WORSE = "#d73027"
NEXT = "#2166ac"
INK = "#222222"
PAPER = "#ffffff"
MUTED = "#777777"
FONT_FOLDERS = {
    "linux": ("~/.local/share/fonts", "~/.fonts", "/usr/local/share/fonts", "/usr/share/fonts"),
    "darwin": ("~/Library/Fonts", "/Library/Fonts", "/System/Library/Fonts"),
    "win32": ("C:/Windows/Fonts",),
}


# --- fonts and texts -------------------------------------------------------------------------------------------------


@functools.cache
def _font_files() -> tuple[str, ...]:
    """DejaVu Sans, if it is somewhere, and then all other fonts of the system."""
    folders = [Path(folder).expanduser() for folder in FONT_FOLDERS.get(sys.platform, ())]
    found = []
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            # A font of last resort has one box per script, for every character there is.
            if path.suffix in (".ttf", ".otf", ".ttc") and "lastresort" not in path.name.lower():
                found.append(path)
    # matplotlib brings DejaVu Sans along. It is looked up without importing matplotlib.
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib is not None and matplotlib.origin is not None:
        found.insert(0, Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")
    dejavu = [path for path in found if path.name == "DejaVuSans.ttf" and path.is_file()]
    return tuple(map(os.fspath, dict.fromkeys([*dejavu[:1], *found])))


@functools.lru_cache(maxsize=256)
def _load(file: str | None, size: int) -> ImageFont.FreeTypeFont | None:
    """A font, Pillow's own for `None`; `None` if it has no outlines or cannot be read."""
    try:
        if file is None:
            return ImageFont.load_default(size)
        return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)
    except OSError:
        return None


@functools.lru_cache(maxsize=4096)
def _can_draw(file: str | None, character: str) -> bool:
    """Whether a font has a glyph for the character, and not only the box that stands for missing ones."""
    font = _load(file, 16)
    if font is None:
        return False
    missing = font.getmask("\uffff")  # in no font
    glyph = font.getmask(character)
    return glyph.size != missing.size or bytes(glyph) != bytes(missing)


@functools.lru_cache(maxsize=256)
def _font_file(text: str) -> str | None:
    """The first font, or the one that has most of the text's characters: DejaVu has no Chinese, for example."""
    characters = {character for character in text if not character.isspace()}
    best = None
    fewest = len(characters) + 1
    for file in (*_font_files(), None):
        missing = sum(not _can_draw(file, character) for character in characters)
        if missing < fewest and _load(file, 16) is not None:
            best = file
            fewest = missing
        if not fewest:
            break
    return best


def _font(size: int, text: str = "") -> ImageFont.FreeTypeFont:
    return _load(_font_file(text), size)


def _printable(text: str) -> str:
    """One line without what no font can draw: control characters and halves of surrogate pairs."""
    text = " ".join(text.split())
    return "".join(c if c.isprintable() and not 0xD800 <= ord(c) < 0xE000 else "\ufffd" for c in text)


def _fit_lines(text: str, font, width: int, max_lines: int) -> list[str]:
    """
    Break text into at most `max_lines` lines of `width` pixels, between words where there are any; an ellipsis marks
    what is cut.
    """
    lines = []
    rest = text.strip()
    while rest and len(lines) < max_lines:
        if font.getlength(rest) <= width:
            return [*lines, rest]
        ellipsis = "…" if len(lines) == max_lines - 1 else ""
        end = len(rest)
        while end > 1 and font.getlength(rest[:end] + ellipsis) > width:
            end -= 1
        space = -1 if ellipsis else rest.rfind(" ", 0, end + 1)
        cut = space if space > 0 else end
        lines.append(rest[:cut].rstrip() + ellipsis)
        rest = rest[cut:].lstrip()
    return lines


def _write_title(draw: ImageDraw.ImageDraw, title: str, top: int, size: int, width: int) -> None:
    title = _printable(title)
    font = _font(size, title)
    draw.text((12, top), *_fit_lines(title, font, width - 24, 1), font=font, fill=INK)


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
) -> Image.Image:
    """
    Pairs of images from the same prompt and seed, left before and right after training, with their scores.

    A score that rose is green, one that fell is red.

    Args:
        before, after (`torch.Tensor` of shape `(N, 3, H, W)`): in [0, 1].
        prompts (`list[str]`): N prompts.
        before_scores, after_scores (`dict[str, torch.Tensor]`, *optional*): per metric, `(N,)` scores.
        columns (`int`, *optional*, defaults to `4`): pairs per row.
        size (`int`, *optional*, defaults to `128`): pixels of one image's side.
        title (`str`, *optional*): heading; state the sampler in it.

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
    sheet = Image.new("RGB", (columns * cell_width + 12, top + rows * cell_height + 8), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        _write_title(draw, title, top=10, size=16, width=sheet.width)

    # Draw the cells: image, prompt and scores of both sides.
    small = _font(11)
    for i, prompt in enumerate(prompts):
        x = 12 + (i % columns) * cell_width
        y = top + (i // columns) * cell_height
        scores_before = {name: values[i].item() for name, values in before_scores.items()}
        scores_after = {name: values[i].item() for name, values in after_scores.items()}
        sides = (("before", before[i], scores_before), ("after", after[i], scores_after))
        for side, (name, image, scores) in enumerate(sides):
            left = x + side * (size + 4)
            draw.text((left, y), name, font=small, fill=MUTED)
            sheet.paste(to_pil(image, size), (left, y + 16))
            for line, metric in enumerate(metrics):
                if metric in scores:
                    text = _fit_lines(f"{scores[metric]:.2f} {metric}", small, size, 1)[0]
                    color = _color_of_change(scores_before.get(metric), scores[metric])
                    draw.text((left, y + 18 + height + 34 + 15 * line), text, font=small, fill=color)
        prompt = _printable(prompt)
        font = _font(12, prompt)
        for line, text in enumerate(_fit_lines(prompt, font, 2 * size, 2)):
            draw.text((x, y + 19 + height + 15 * line), text, font=font, fill=INK)
    return sheet


def _check_lengths(before, after, prompts, before_scores, after_scores) -> None:
    lengths = {"before": len(before), "after": len(after), "prompts": len(prompts)}
    for scores in (before_scores, after_scores):
        lengths |= {f"scores of {name!r}": len(values) for name, values in scores.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"A sheet needs as many images before and after, prompts and scores; got {lengths}.")


def _color_of_change(before: float | None, after: float) -> str:
    """Green or red for a score that rose or fell, as far as its two printed digits show it."""
    change = 0 if before is None else round(after, 2) - round(before, 2)
    if change == 0:
        return INK
    return BETTER if change > 0 else WORSE


# --- the candidate tree ----------------------------------------------------------------------------------------------


@torch.no_grad()
def candidate_tree(
    pipeline, pairs: StepPairs, prompt_row: int = 0, size: int = 96, title: str | None = None
) -> Image.Image:
    """
    The branches of one prompt's rollout: a column per branching step, its K candidates as predicted clean images.

    The chosen candidate is framed green, the rejected one red (both grey where the scores are too close to form a
    pair), and a blue bar marks the candidate that starts the next step. Scores are printed below.

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
    legend = top + 58 + num_candidates * cell_height
    width = max(12 + len(pairs.branches) * column_width, LEGEND_WIDTH)
    sheet = Image.new("RGB", (width, legend + 24), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        _write_title(draw, title, top=8, size=14, width=width)

    # Draw the branches, and the meaning of their colours.
    for column, branch in enumerate(pairs.branches):
        images = pipeline.decode_latents(branch.pred_original_samples[:, prompt_row]) / 2 + 0.5
        _draw_branch(sheet, branch, prompt_row, images, (12 + column * column_width, top), size, cell_height)
    for x, color, text in ((12, BETTER, "chosen"), (112, WORSE, "rejected"), (202, NEXT, "starts the next step")):
        draw.rectangle((x, legend + 2, x + 12, legend + 14), fill=color)
        draw.text((x + 18, legend), text, font=_font(12), fill=INK)
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
    small = _font(11)
    x, top = corner
    scores = branch.scores[:, prompt_row]
    chosen, rejected, valid = (int(part[prompt_row]) for part in branch.selection)
    frames = {chosen: BETTER, rejected: WORSE} if valid else {chosen: MUTED, rejected: MUTED}
    draw.text((x, top + 10), f"t = {branch.timestep}", font=_font(12), fill=INK)
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
