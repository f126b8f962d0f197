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
Texts under and above images, with Pillow: fonts for any script, lines that fit their place, and grids of images with a
caption under each.
"""

import bisect
import functools
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


INK = "#222222"
PAPER = "#ffffff"
MUTED = "#777777"
FONT_FOLDERS = {
    "linux": ("~/.local/share/fonts", "~/.fonts", "/usr/local/share/fonts", "/usr/share/fonts"),
    "darwin": ("~/Library/Fonts", "/Library/Fonts", "/System/Library/Fonts"),
    "win32": ("C:/Windows/Fonts",),
}
CELL_WIDTH = 192  # pixels of an image on a sheet: texts of a few words fit below it
MARGIN = 12
LINE = 15  # pixels from one line of a caption to the next


# --- fonts and texts -------------------------------------------------------------------------------------------------


@functools.cache
def font_files() -> tuple[str, ...]:
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
def can_draw(file: str | None, character: str) -> bool:
    """Whether a font has a glyph for the character, and not only the box that stands for missing ones."""
    loaded = _load(file, 16)
    if loaded is None:
        return False
    missing = loaded.getmask("\uffff")  # in no font
    glyph = loaded.getmask(character)
    return glyph.size != missing.size or bytes(glyph) != bytes(missing)


@functools.lru_cache(maxsize=256)
def font_file(text: str) -> str | None:
    """The first font, or the one that has most of the text's characters: DejaVu has no Chinese, for example."""
    characters = {character for character in text if not character.isspace()}
    best = None
    fewest = len(characters) + 1
    for file in (*font_files(), None):
        missing = sum(not can_draw(file, character) for character in characters)
        if missing < fewest and _load(file, 16) is not None:
            best = file
            fewest = missing
        if not fewest:
            break
    return best


def font(size: int, text: str = "") -> ImageFont.FreeTypeFont:
    """A font of `size` pixels for this text."""
    return _load(font_file(text), size)


def printable(text: str) -> str:
    """One line without what no font can draw: control characters and halves of surrogate pairs."""
    text = " ".join(text.split())
    return "".join(c if c.isprintable() and not 0xD800 <= ord(c) < 0xE000 else "\ufffd" for c in text)


def fit_lines(text: str, written_in, width: int, max_lines: int) -> list[str]:
    """
    Break text into at most `max_lines` lines of `width` pixels, between words where there are any; an ellipsis marks
    what is cut.
    """
    lines = []
    rest = text.strip()[: int(4 * width * max_lines)]  # far more than fits; a prompt may have a million characters
    while rest and len(lines) < max_lines:
        if written_in.getlength(rest) <= width:
            return [*lines, rest]
        ellipsis = "…" if len(lines) == max_lines - 1 else ""
        ends = range(2, len(rest) + 1)
        fitting = bisect.bisect_right(ends, width, key=lambda end: written_in.getlength(rest[:end] + ellipsis))
        end = fitting + 1
        space = -1 if ellipsis else rest.rfind(" ", 0, end + 1)
        cut = space if space > 0 else end
        lines.append(rest[:cut].rstrip() + ellipsis)
        rest = rest[cut:].lstrip()
    return lines


def write_title(draw: ImageDraw.ImageDraw, title: str, top: int, size: int, width: int) -> None:
    """One line at the top of a sheet that is `width` pixels wide."""
    title = printable(title)
    face = font(size, title)
    draw.text((MARGIN, top), *fit_lines(title, face, width - 2 * MARGIN, 1), font=face, fill=INK)


# --- grids with captions ---------------------------------------------------------------------------------------------


def cell_picture(picture: Image.Image, width: int = CELL_WIDTH) -> Image.Image:
    """
    An image at the size in which a sheet shows it.

    Args:
        picture (`PIL.Image.Image`): of any size.
        width (`int`, *optional*, defaults to `192`): pixels. A smaller image grows to about this, by a whole factor and
            without smoothing, so that every pixel of it stays a square.

    Returns:
        `PIL.Image.Image`: at most a third wider or narrower than `width`, and exactly `width` if it was larger.
    """
    if picture.width >= width:
        size = (width, max(1, round(width * picture.height / picture.width)))
        return picture if picture.width == width else picture.resize(size, Image.Resampling.LANCZOS)
    factor = max(1, round(width / picture.width))
    return picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)


def side_by_side(pictures: Sequence[Image.Image], gap: int = 4) -> Image.Image:
    """Images of one height in one picture, from left to right with `gap` pixels between them."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    joined = Image.new("RGB", (width, max(picture.height for picture in pictures)), PAPER)
    left = 0
    for picture in pictures:
        joined.paste(picture, (left, 0))
        left += picture.width + gap
    return joined


def captioned_grid(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    columns: int = 4,
    title: str | None = None,
    width: int = CELL_WIDTH,
    lines: int = 3,
) -> Image.Image:
    """
    Images in reading order, each with its caption below it.

    Args:
        pictures (sequence of `PIL.Image.Image`): N of them, at least 1.
        captions (sequence of `str`): N texts. A line break begins a new line; long lines are wrapped, and cut with an
            ellipsis.
        columns (`int`, *optional*, defaults to `4`): images per row.
        title (`str`, *optional*): heading; what follows a line break is written small.
        width (`int`, *optional*, defaults to `192`): see [`cell_picture`].
        lines (`int`, *optional*, defaults to `3`): of each caption.

    Returns:
        `PIL.Image.Image`.

    Raises:
        ValueError: if there is no image, or not one caption for each.
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"A grid needs one caption per image, got {len(captions)} for {len(pictures)} images.")

    # Lay out the sheet: all cells have the size of the largest image.
    cells = [cell_picture(picture, width) for picture in pictures]
    cell_width = max(cell.width for cell in cells)
    image_height = max(cell.height for cell in cells)
    wrapped = [caption_lines(caption, cell_width, lines) for caption in captions]
    cell_height = image_height + 4 + LINE * max(len(texts) for texts in wrapped) + 10
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    top = heading_height(title)
    size = (columns * (cell_width + MARGIN) + MARGIN, top + rows * cell_height)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    write_heading(draw, title, sheet.width)

    # Draw the cells.
    for index, (cell, texts) in enumerate(zip(cells, wrapped, strict=True)):
        left = MARGIN + index % columns * (cell_width + MARGIN)
        upper = top + index // columns * cell_height
        sheet.paste(cell, (left, upper))
        write_lines(draw, texts, (left, upper + image_height + 4))
    return sheet


def heading_height(title: str | None) -> int:
    """Pixels above the images of a grid: one line of the title, and what a line break separates from it in small letters."""
    return 40 + LINE * (len(title.splitlines()) - 1) if title else MARGIN


def write_heading(draw: ImageDraw.ImageDraw, title: str | None, width: int) -> None:
    """The title of a grid that is `width` pixels wide."""
    if not title:
        return
    first, *others = title.splitlines()
    write_title(draw, first, top=10, size=16, width=width)
    for line, text in enumerate(others):
        write_lines(draw, caption_lines(text, width - 2 * MARGIN, 1, size=11), (MARGIN, 34 + LINE * line), 11, MUTED)


def caption_lines(caption: str, width: int, max_lines: int, size: int = 12) -> list[str]:
    """The lines of a caption, as many as there may be, that fit into `width` pixels."""
    found = []
    for part in caption.splitlines():
        text = printable(part)
        found += fit_lines(text, font(size, text), width, max_lines - len(found))
    return found


def write_lines(draw: ImageDraw.ImageDraw, texts: Sequence[str], corner: tuple[int, int], size: int = 12, fill=INK):
    """Write lines of text below each other."""
    for line, text in enumerate(texts):
        draw.text((corner[0], corner[1] + LINE * line), text, font=font(size, text), fill=fill)
