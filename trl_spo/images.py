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
Convert images: from bytes and files to PIL and tensors, and from tensors back to bytes and PIL.

This is the one place that decodes image files and that rounds to 8 bits, so that what is scored, shown and saved is
rounded alike.
"""

import functools
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps


# Formats that PIL decodes by itself. For others it may start a program (EPS: Ghostscript).
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")
WHITE = "white"  # what web pages and most viewers show behind a transparent image
LARGEST_ASPECT_RATIO = 8  # longer images lose their ends before they are resized
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|data:", flags=re.IGNORECASE)


@functools.cache
def _image_formats() -> list[str]:
    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]  # older versions of PIL know fewer


def is_address(path: str) -> bool:
    """Whether a text is an address such as `https://...` or `s3://...`, and not the path of a file."""
    return ADDRESS.match(path) is not None


def parse_colour(colour: str) -> tuple[int, int, int]:
    """
    Red, green and blue of a colour, each in [0, 255].

    Args:
        colour (`str`): as `PIL.ImageColor` knows it: a name, `"#ffffff"`, `"rgb(255, 255, 255)"`, ...

    Raises:
        `ValueError`: If it is not a colour, or a transparent one.
    """
    try:
        red, green, blue, alpha = ImageColor.getcolor(colour, "RGBA")
    except (ValueError, AttributeError, TypeError):
        alpha = None
    if alpha != 255:
        raise ValueError(f"An opaque colour is needed, such as 'white' or '#ffffff', got {colour!r}.")
    return red, green, blue


def read_image(image: Any, background: str = WHITE) -> Image.Image:
    r"""
    An RGB image from whatever a dataset row may hold.

    It is turned upright if its EXIF data says that it lies on its side (as `datasets` does). Of an animation the first
    frame is taken, and 16 bits per channel are scaled to 8. A transparent image is laid on a background: under fully transparent
    pixels files hold any colour, which nobody sees.

    Args:
        image (`PIL.Image.Image`, `bytes`, `str`, `Path` or `dict`):
            A decoded image, an encoded one, the path of a file, or the record `{"bytes": ..., "path": ...}` of an undecoded
            `datasets.Image` feature.
        background (`str`, *optional*, defaults to `"white"`):
            Colour that shows through transparent images.

    Returns:
        `PIL.Image.Image`, fully decoded.

    Raises:
        `OSError`: If there is no image, its bytes cannot be decoded, or it has more than PIL's `MAX_IMAGE_PIXELS`
            pixels: a small file may unpack to gigabytes.
        `ValueError`: If it is of another type or an address, or the background is not an opaque colour.
    """
    background = parse_colour(background)
    if isinstance(image, str) and is_address(image):
        raise ValueError(
            f"An image must be here, got the address {image[:200]!r}. Nothing is downloaded: name a file."
        )
    if isinstance(image, dict):
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if isinstance(image, (str, Path)):
        if not Path(image).is_file():  # devices and pipes have no end
            raise OSError(f"{str(image)!r} is not a file")
        image = Path(image).read_bytes()
    if image is None:
        raise OSError("there is no image")
    if not isinstance(image, (bytes, bytearray, memoryview, Image.Image)):
        raise ValueError(
            f"An image must be a PIL image, bytes, a path or a `datasets` image, got {type(image).__name__}."
        )
    try:
        if not isinstance(image, Image.Image):  # reads the header only; beyond twice the limit PIL itself refuses
            image = Image.open(io.BytesIO(image), formats=_image_formats())
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:  # an image that was given may be opened, not read
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are more than {limit}")
        image.load()  # before the EXIF data: broken pixels are an error, broken EXIF data is ignored
        return _to_rgb(_upright(image), background)
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, EOFError, struct.error, ...
        raise OSError(f"{type(error).__name__}: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # PIL's readers of EXIF data raise as many kinds of errors as its decoders
        return image


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """
    PIL's `convert("RGB")`, but transparent images are laid on a background, and those of more than 8 bits or of fractions are
    scaled instead of clipped.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = _scaled(image)
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """One channel of 8 bits from one of more bits or of fractions; with alpha if one value stands for transparency."""
    pixels = np.nan_to_num(np.asarray(image, dtype=np.float32))
    opaque = pixels != image.info.get("transparency", np.inf)
    largest = pixels.max(initial=0)
    if image.mode.startswith("I;16") or (image.mode == "I" and largest > 255):
        pixels = pixels / 257
    elif image.mode == "F" and largest <= 1:
        pixels = pixels * 255
    scaled = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
    if not opaque.all():
        scaled.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
    return scaled


def image_to_tensor(image: Image.Image, resolution: int) -> torch.Tensor:
    r"""
    Brings an RGB image to a square tensor: bicubic resize of the short side to `resolution`, then centre crop.

    If an image is more than eight times as long as wide, its middle is cut out before the resize, which would otherwise
    turn a thin line into gigabytes.

    Args:
        image (`PIL.Image.Image`):
            RGB image.
        resolution (`int`):
            Side of the result in pixels.

    Returns:
        `torch.Tensor` of shape `(3, resolution, resolution)`: float32 in [-1, 1].
    """
    longest = LARGEST_ASPECT_RATIO * min(image.size)
    if max(image.size) > longest:
        # An even number of pixels goes, so that the middle stays the middle.
        kept = [min(side, longest + (side - longest) % 2) for side in image.size]
        left = (image.width - kept[0]) // 2
        top = (image.height - kept[1]) // 2
        image = image.crop((left, top, left + kept[0], top + kept[1]))
    scale = resolution / min(image.size)
    size = tuple(max(resolution, round(side * scale)) for side in image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left = (size[0] - resolution) // 2
    top = (size[1] - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)
    return pixels / 127.5 - 1


def eight_bits(images: torch.Tensor) -> torch.Tensor:
    """
    Images as an image file would hold them.

    Args:
        images (`torch.Tensor` of any shape): floating point; values outside [0, 1] are clipped.

    Returns:
        `torch.Tensor` of the same shape: uint8 in [0, 255], rounded, on the CPU.
    """
    return images.detach().float().clamp(0, 1).mul(255).round().byte().cpu()


def to_pil(image: torch.Tensor, size: int | None = None) -> Image.Image:
    """
    A PIL image of a tensor.

    Args:
        image (`torch.Tensor` of shape `(3, H, W)`): in [0, 1].
        size (`int`, *optional*): width of the result in pixels. Small images are enlarged without smoothing.

    Returns:
        `PIL.Image.Image`: RGB.
    """
    picture = Image.fromarray(eight_bits(image).permute(1, 2, 0).numpy())
    if size is None or picture.width == size:
        return picture
    resample = Image.Resampling.NEAREST if picture.width < size else Image.Resampling.LANCZOS
    return picture.resize((size, round(size * picture.height / picture.width)), resample)
