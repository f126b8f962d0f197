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
Pictures: sheets of images before and after, the candidate tree of a rollout, curves. Each function returns a
`PIL.Image.Image` or a matplotlib figure, for a notebook or for `.save` / `.savefig`.
"""

import functools
from pathlib import Path

import matplotlib
import torch
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from ..images import to_pil
from ..step_pairs import StepPairs


LEGEND_WIDTH = 360  # of a candidate tree
WIN, LOSE, NEXT, INK, PAPER, MUTED = "#1a9850", "#d73027", "#2166ac", "#222222", "#ffffff", "#777777"
DEJAVU = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")


@functools.lru_cache(maxsize=64)
def _characters(font: str) -> frozenset[int]:
    try:
        return frozenset(FT2Font(font).get_charmap())
    except (OSError, RuntimeError):  # listed, but gone or not readable
        return frozenset()


@functools.lru_cache(maxsize=256)
def _font_file(text: str) -> str:
    """DejaVu Sans, or an installed font that has more of the text's characters: DejaVu has no Chinese, for example."""
    needed = {ord(character) for character in text if not character.isspace()}
    best, missing = DEJAVU, len(needed - _characters(DEJAVU))
    for entry in font_manager.fontManager.ttflist if missing else ():
        placeholder = "Last Resort" in entry.name  # matplotlib's: one box per script, for every character there is
        if entry.style == "normal" and not placeholder and (count := len(needed - _characters(entry.fname))) < missing:
            best, missing = entry.fname, count
        if not missing:
            break
    return best


def _font(size: int, text: str = "") -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_file(text), size)


def _printable(text: str) -> str:
    """One line without what no font can draw: control characters and halves of surrogate pairs."""
    text = " ".join(text.split())
    return "".join(c if c.isprintable() and not 0xD800 <= ord(c) < 0xE000 else "\ufffd" for c in text)


def _fit_lines(text: str, font, width: int, max_lines: int) -> list[str]:
    """
    Break text into at most `max_lines` lines of `width` pixels, between words where there are any; an ellipsis marks
    what is cut.
    """
    lines, rest = [], text.strip()
    while rest and len(lines) < max_lines:
        if font.getlength(rest) <= width:
            return [*lines, rest]
        last, end = len(lines) == max_lines - 1, len(rest)
        while end > 1 and font.getlength(rest[:end] + ("…" if last else "")) > width:
            end -= 1
        space = -1 if last else rest.rfind(" ", 0, end + 1)
        cut = space if space > 0 else end
        lines.append(rest[:cut].rstrip() + ("…" if last else ""))
        rest = rest[cut:].lstrip()
    return lines


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
    before_scores, after_scores = before_scores or {}, after_scores or {}
    lengths = {"before": len(before), "after": len(after), "prompts": len(prompts)}
    lengths |= {f"scores of {name!r}": len(v) for part in (before_scores, after_scores) for name, v in part.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"A sheet needs as many images before and after, prompts and scores; got {lengths}.")
    small = _font(11)
    metrics = list(dict.fromkeys([*before_scores, *after_scores]))
    columns = max(1, min(columns, len(prompts)))
    height = round(size * before.shape[-2] / before.shape[-1])
    cell_width, cell_height = 2 * size + 24, 18 + height + 34 + 15 * len(metrics) + 14
    rows, top = -(-len(prompts) // columns), 40 if title else 10
    sheet = Image.new("RGB", (columns * cell_width + 12, top + rows * cell_height + 8), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        title = _printable(title)
        heading = _font(16, title)
        draw.text((12, 10), *_fit_lines(title, heading, sheet.width - 24, 1), font=heading, fill=INK)
    for i, prompt in enumerate(prompts):
        x, y = 12 + (i % columns) * cell_width, top + (i // columns) * cell_height
        for j, (name, images, scores) in enumerate(
            (("before", before, before_scores), ("after", after, after_scores))
        ):
            left = x + j * (size + 4)
            draw.text((left, y), name, font=small, fill=MUTED)
            sheet.paste(to_pil(images[i], size), (left, y + 16))
            for line, metric in enumerate(metrics):
                if metric not in scores:
                    continue
                value = round(scores[metric][i].item(), 2)
                text = _fit_lines(f"{value:.2f} {metric}", small, size, 1)[0]
                change = value - round(before_scores[metric][i].item(), 2) if metric in before_scores else 0
                color = WIN if change > 0 else LOSE if change < 0 else INK
                draw.text((left, y + 18 + height + 34 + 15 * line), text, font=small, fill=color)
        prompt = _printable(prompt)
        font = _font(12, prompt)
        for line, text in enumerate(_fit_lines(prompt, font, 2 * size, 2)):
            draw.text((x, y + 19 + height + 15 * line), text, font=font, fill=INK)
    return sheet


@torch.no_grad()
def candidate_tree(
    pipeline, pairs: StepPairs, prompt_row: int = 0, size: int = 96, title: str | None = None
) -> Image.Image:
    """
    The branches of one prompt's rollout: a column per branching step, its K candidates as predicted clean images.

    The winner is framed green, the loser red (grey frames where the scores are too close to form a pair), and a blue
    bar marks the candidate that starts the next step. Scores are printed below.

    Args:
        pipeline ([`SPOPipeline`]): decodes the predictions.
        pairs ([`StepPairs`]): of `stepwise_rollout(..., return_trajectory=True)`.
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
    small, font = _font(11), _font(12)
    latents = pairs.branches[0].pred_original_samples
    gap, cell = 14, round(size * latents.shape[-2] / latents.shape[-1]) + 34
    width = max(12 + len(pairs.branches) * (size + gap + 12), LEGEND_WIDTH)
    top = 26 if title else 0
    sheet = Image.new("RGB", (width, top + 58 + num_candidates * cell + 24), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        title = _printable(title)
        heading = _font(14, title)
        draw.text((12, 8), *_fit_lines(title, heading, width - 24, 1), font=heading, fill=INK)
    for column, branch in enumerate(pairs.branches):
        x = 12 + column * (size + gap + 12)
        images = pipeline.decode_latents(branch.pred_original_samples[:, prompt_row]) / 2 + 0.5
        order = branch.scores[:, prompt_row].argsort(descending=True)
        chosen, rejected, valid = (int(part[prompt_row]) for part in branch.selection)
        draw.text((x, top + 10), f"t = {branch.timestep}", font=font, fill=INK)
        draw.text((x, top + 28), "pair" if valid else "no pair", font=small, fill=INK if valid else MUTED)
        for row, k in enumerate(order.tolist()):
            y = top + 52 + row * cell
            frame = {chosen: WIN, rejected: LOSE}.get(k) if valid else MUTED if k in (chosen, rejected) else None
            if frame:
                draw.rectangle((x - 4, y - 4, x + size + 3, y + cell - 31), outline=frame, width=4)
            sheet.paste(to_pil(images[k], size), (x, y))
            if k == int(branch.next_index[prompt_row]):
                draw.rectangle((x + size + 6, y, x + size + 11, y + cell - 35), fill=NEXT)
            draw.text((x, y + cell - 28), f"{branch.scores[k, prompt_row]:.2f}", font=small, fill=INK)
    legend = top + 58 + num_candidates * cell
    for x, color, text in ((12, WIN, "winner"), (112, LOSE, "loser"), (202, NEXT, "starts the next step")):
        draw.rectangle((x, legend + 2, x + 12, legend + 14), fill=color)
        draw.text((x + 18, legend), text, font=font, fill=INK)
    return sheet
