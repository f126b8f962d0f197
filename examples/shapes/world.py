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

"""A small world of coloured shapes in which captions, images and quality are exact.

Captions read "a {small|large} {colour} {shape} on a {colour} background" with two different colours: 560 in all. A
renderer draws any of them, clean or degraded ("dull"), and three scorers measure an image without any learned weight:

- `aesthetics_score`: how vivid, sharp and free of noise an image is, whatever it shows;
- `alignment_score`: whether it shows its caption, whatever its quality;
- `utility`: what the simulated annotator of `preferences.py` cares about, `.5 * aesthetics + .5 * alignment`.

Images are float32 tensors of shape (B, 3, 32, 32) with values in [0, 1]; scores are float32 tensors of shape (B,) with
values in [0, 1]. Every image is scored on its own, so a score does not depend on the rest of the batch.
"""

import functools
import hashlib
import itertools

import torch
import torch.nn.functional as F


IMAGE_SIZE = 32
SIZES = {"small": 6.5, "large": 10.5}  # half of the extent, in pixels
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PALETTE = {
    "red": (0.88, 0.08, 0.10),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (1.00, 0.92, 0.15),
    "green": (0.08, 0.68, 0.22),
    "blue": (0.10, 0.25, 0.92),
    "purple": (0.58, 0.12, 0.75),
    "white": (0.97, 0.97, 0.97),
    "black": (0.04, 0.04, 0.04),
}
COLOURS = tuple(PALETTE)
LUMA = (0.299, 0.587, 0.114)

# How a dull image is made; `render` draws uniformly from these ranges for every image on its own.
DULL_DESATURATION = (0.3, 0.8)  # share of the way from a colour to the grey of equal luma
DULL_CONTRAST_LOSS = (0.15, 0.45)  # share of the way from a colour to mid-grey
DULL_BLUR_PROBABILITY = 0.6
DULL_BLUR_SD = (0.4, 0.9)  # pixels
DULL_NOISE_SD = (0.015, 0.05)

COLOUR_TOLERANCE = 0.15  # RGB distance at which a pixel counts half as the named colour
UTILITY_WEIGHTS = {"aesthetics": 0.5, "alignment": 0.5}


def make_caption(size: str, colour: str, shape: str, background: str) -> str:
    """The caption of one scene, for example `"a small red circle on a yellow background"`."""
    return f"a {size} {colour} {shape} on a {background} background"


SCENES = {
    make_caption(size, colour, shape, background): (size, colour, shape, background)
    for size, shape in itertools.product(SIZES, SHAPES)
    for colour, background in itertools.permutations(COLOURS, 2)
}
CAPTIONS = tuple(SCENES)


# --------------------------------------------------------------------------------------------------------- splits


def split_of(caption: str) -> str:
    """
    The split a caption belongs to, decided by the SHA-256 of its text alone.

    Args:
        caption (`str`): Any caption of the world.

    Returns:
        `str`: `"heldout"` for about 12 captions in 60, `"validation"` for about 6, else `"train"`.
    """
    bucket = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "big") % 60
    if bucket < 12:
        return "heldout"
    return "validation" if bucket < 18 else "train"


@functools.cache
def captions(split: str | None = None) -> tuple[str, ...]:
    """
    The captions of one split, in a fixed order.

    Args:
        split (`str`, *optional*): `"train"`, `"validation"` or `"heldout"`. All 560 captions when left out. `"study"` and
            `"untouched"` divide the training captions about three to one: a study that trains on the first alone has, in
            the second, captions that no earlier study has looked at.
    """
    if split in ("study", "untouched"):
        return tuple(caption for caption in captions("train") if is_untouched(caption) == (split == "untouched"))
    if split not in (None, "train", "validation", "heldout"):
        raise ValueError(f"`split` must be 'train', 'validation' or 'heldout', got {split!r}.")
    return tuple(caption for caption in CAPTIONS if split is None or split_of(caption) == split)


def is_untouched(caption: str) -> bool:
    """About one caption in four, decided by other bits of the SHA-256 than those of `split_of`."""
    return hashlib.sha256(caption.encode()).digest()[31] % 4 == 0


def parse(prompts) -> torch.Tensor:
    """
    Captions as indices.

    Args:
        prompts (`list[str]`): Captions of the world.

    Returns:
        `torch.Tensor` of shape `(B, 4)`, int64: index of the size, object colour, shape and background colour in
        `SIZES`, `COLOURS`, `SHAPES` and `COLOURS`.

    Raises:
        `ValueError`: if a text is not a caption of this world.
    """
    table = _scene_table()
    unknown = [prompt for prompt in prompts if prompt not in SCENES]
    if unknown:
        raise ValueError(f"Not a caption of the shapes world: {unknown[0]!r}; expected, for example, {CAPTIONS[0]!r}.")
    return torch.tensor([table[prompt] for prompt in prompts], dtype=torch.long).view(-1, 4)


@functools.cache
def _scene_table() -> dict[str, tuple[int, int, int, int]]:
    sizes = tuple(SIZES)
    return {
        caption: (sizes.index(size), COLOURS.index(colour), SHAPES.index(shape), COLOURS.index(background))
        for caption, (size, colour, shape, background) in SCENES.items()
    }


# ------------------------------------------------------------------------------------------------------- renderer


def _inside(shape: str, x: torch.Tensor, y: torch.Tensor, r: float) -> torch.Tensor:
    """Whether points at `x` (right), `y` (down) from the centre lie in a shape of half extent `r`."""
    if shape == "circle":
        return x**2 + y**2 <= r**2
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) <= 0.9 * r
    if shape == "triangle":  # apex up, base 2r wide, 1.8r high
        return (y <= 0.9 * r) & (x.abs() <= (y + 0.9 * r) / 1.8)
    if shape == "cross":
        return (torch.minimum(x.abs(), y.abs()) <= 0.34 * r) & (torch.maximum(x.abs(), y.abs()) <= r)
    return (x**2 + y**2 <= r**2) & (x**2 + y**2 >= (0.5 * r) ** 2)  # ring


@functools.cache
def templates() -> torch.Tensor:
    """
    Coverage of each pixel by each shape, centred at pixel corner (16, 16), from 8 x 8 samples a pixel.

    Returns:
        `torch.Tensor` of shape `(2, 5, 32, 32)` (size, shape, row, column), values in [0, 1].
    """
    factor = 8
    axis = (torch.arange(IMAGE_SIZE * factor) + 0.5) / factor - IMAGE_SIZE / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    masks = [[_inside(shape, x, y, r).float() for shape in SHAPES] for r in SIZES.values()]
    return F.avg_pool2d(torch.stack([torch.stack(row) for row in masks]), factor)


def max_shift(size_index: torch.Tensor) -> torch.Tensor:
    """Largest whole-pixel shift from the centre, either way, that leaves a margin of one pixel around the object."""
    extents = torch.tensor([int(IMAGE_SIZE / 2 - r - 0.5) - 1 for r in SIZES.values()])
    return extents[size_index]


def _shift(masks: torch.Tensor, dy: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
    """Moves each mask of (B, 32, 32) down by `dy` and right by `dx` pixels, both (B,) int64; wraps around."""
    axis = torch.arange(IMAGE_SIZE)
    rows = (axis - dy[:, None]) % IMAGE_SIZE
    columns = (axis - dx[:, None]) % IMAGE_SIZE
    return masks[torch.arange(len(masks))[:, None, None], rows[:, :, None], columns[:, None, :]]


def _uniform(low_high, count: int, generator) -> torch.Tensor:
    low, high = low_high
    return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)


def degrade(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    Dull versions of images: less colour, less contrast, often some blur, some noise.

    Args:
        images (`torch.Tensor` of shape `(B, 3, 32, 32)`): Values in [0, 1].
        generator (`torch.Generator`, *optional*): Source of all randomness.

    Returns:
        `torch.Tensor` of shape `(B, 3, 32, 32)`, values in [0, 1].
    """
    count = len(images)
    grey = torch.einsum("bchw,c->bhw", images, torch.tensor(LUMA))[:, None]
    images = torch.lerp(images, grey.expand_as(images), _uniform(DULL_DESATURATION, count, generator))
    images = 0.5 + (images - 0.5) * (1 - _uniform(DULL_CONTRAST_LOSS, count, generator))
    sd = _uniform(DULL_BLUR_SD, count, generator)
    blurred = torch.rand(count, 1, 1, 1, generator=generator) < DULL_BLUR_PROBABILITY
    images = torch.where(blurred, _gaussian_blur(images, sd), images)
    noise = torch.randn(images.shape, generator=generator)
    return (images + _uniform(DULL_NOISE_SD, count, generator) * noise).clamp(0, 1)


def _gaussian_blur(images: torch.Tensor, sd: torch.Tensor) -> torch.Tensor:
    """Blurs each image of (B, 3, 32, 32) with its own standard deviation, `sd` of shape (B, 1, 1, 1), in pixels."""
    count, channels = images.shape[:2]
    taps = torch.exp(-0.5 * (torch.arange(-3, 4) / sd.view(-1, 1)) ** 2)
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]  # (3B, 1, 7)
    padded = F.pad(images, (3, 3, 3, 3), mode="replicate").flatten(0, 1)[None]  # (1, 3B, 38, 38)
    rows = F.conv2d(padded, taps[:, :, None, :], groups=count * channels)
    return F.conv2d(rows, taps[:, :, :, None], groups=count * channels).view(images.shape)


def render(prompts, generator: torch.Generator | None = None, dull=False) -> torch.Tensor:
    """
    Draws one image for each caption, the object at a random whole-pixel position.

    Args:
        prompts (`list[str]`): B captions of the world.
        generator (`torch.Generator`, *optional*): Source of all randomness, on the CPU.
        dull (`bool`, `float` or `torch.Tensor` of shape `(B,)`, *optional*, defaults to `False`): Which images to
            degrade: none, all, each with a probability, or those where a bool tensor says so. The base model is
            trained with `.5`.

    Returns:
        `torch.Tensor` of shape `(B, 3, 32, 32)`, float32, values in [0, 1].
    """
    size, colour, shape, background = parse(prompts).unbind(1)
    palette = torch.tensor(list(PALETTE.values()))
    reach = max_shift(size)
    shifts = (torch.rand(2, len(size), generator=generator) * (2 * reach + 1)).long() - reach
    masks = _shift(templates()[size, shape], *shifts)[:, None]  # (B, 1, 32, 32)
    low, high = palette[background][:, :, None, None], palette[colour][:, :, None, None]
    images = torch.lerp(low, high, masks)
    if not torch.is_tensor(dull):
        dull = torch.rand(len(size), generator=generator) < float(dull)
    if dull.any():
        images[dull] = degrade(images[dull], generator)
    return images


# -------------------------------------------------------------------------------------------------------- scorers


def _check(images: torch.Tensor) -> torch.Tensor:
    if images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"`images` must have shape (B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), got {tuple(images.shape)}.")
    return images.detach().float().cpu().clamp(0, 1)


def _by_chunks(function, size: int, *arguments):
    """Applies `function` to slices of `size` items, to keep the working memory small."""
    pieces = [function(*(a[i : i + size] for a in arguments)) for i in range(0, len(arguments[0]), size)]
    return torch.cat(pieces) if pieces else torch.zeros(0)


def _local_range(images: torch.Tensor, window: int) -> torch.Tensor:
    """Largest minus smallest value in a square window around each pixel, the largest channel: (B, 32, 32)."""
    stacked = torch.cat([images, -images], 1)
    for kernel, padding in (((1, window), (0, window // 2)), ((window, 1), (window // 2, 0))):
        stacked = F.max_pool2d(stacked, kernel, stride=1, padding=padding)
    return (stacked[:, :3] + stacked[:, 3:]).amax(1)


def aesthetics_terms(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    The three parts of `aesthetics_score`, each of shape (B,) with values in [0, 1].

    - `vividness`: 1 minus the RGB distance of a pixel to the nearest palette colour in units of 0.4, not below 0,
      averaged over the pixels.
    - `sharpness`: how much of the contrast found in a 7 x 7 window is already there in some 3 x 3 window nearby; 0 at
      half of it or less, 1 at all of it. Averaged over the pixels with the squared 7 x 7 contrast as weight, so that
      edges decide; an image whose strongest contrast is below 0.1 loses the term in proportion (no object, no edge).
    - `flatness`: 1 minus the mean 3 x 3 contrast of the calmest 60% of the pixels in units of 0.2, not below 0. Noise
      and ripples lower it, edges do not.
    """
    images = _check(images)
    palette = torch.tensor(list(PALETTE.values()))
    pixels = images.flatten(2).transpose(1, 2)  # (B, 1024, 3)
    nearest = _squared_distances(pixels, palette.expand(len(images), -1, -1)).amin(2).sqrt()
    vividness = 1 - (nearest / 0.4).clamp(max=1).mean(1)
    near, far = _local_range(images, 3), _local_range(images, 7)
    attained = F.max_pool2d(near[:, None], 5, stride=1, padding=2)[:, 0] / far.clamp(min=1e-6)
    weights = far**2
    attained = (attained.clamp(max=1) * weights).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1e-6)
    sharpness = ((attained - 0.5) / 0.5).clamp(min=0) * (far.amax((1, 2)) / 0.1).clamp(max=1)
    calm = near.flatten(1).sort(1).values[:, : int(0.6 * IMAGE_SIZE**2)].mean(1)
    flatness = 1 - (calm / 0.2).clamp(max=1)
    return {"vividness": vividness, "sharpness": sharpness, "flatness": flatness}


def _aesthetics(images: torch.Tensor) -> torch.Tensor:
    terms = aesthetics_terms(images)
    return 0.6 * terms["vividness"] + 0.2 * terms["sharpness"] + 0.2 * terms["flatness"]


def aesthetics_score(images: torch.Tensor) -> torch.Tensor:
    """
    How vivid, sharp and clean images are: `.6 * vividness + .2 * sharpness + .2 * flatness`, see `aesthetics_terms`.

    Args:
        images (`torch.Tensor` of shape `(B, 3, 32, 32)`): Values in [0, 1].

    Returns:
        `torch.Tensor` of shape `(B,)`, float32, values in [0, 1].
    """
    return _by_chunks(_aesthetics, 256, _check(images))


def _squared_distances(pixels: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Squared RGB distance of each pixel of (B, N, 3) to each of its image's colours (B, M, 3): (B, N, M)."""
    squared = torch.baddbmm((colours**2).sum(2)[:, None], pixels, colours.transpose(1, 2), alpha=-2)
    return (squared + (pixels**2).sum(2, keepdim=True)).clamp(min=0)


@functools.cache
def _colour_versions() -> torch.Tensor:
    """Each palette colour, clean and over the range of desaturation and contrast loss of dull images: (8, 13, 3)."""
    palette = torch.tensor(list(PALETTE.values()))
    grey = (palette @ torch.tensor(LUMA))[:, None].expand_as(palette)
    versions = [palette]
    for desaturation, loss in itertools.product(torch.linspace(*DULL_DESATURATION, 4), (0.15, 0.3, 0.45)):
        versions.append(0.5 + (torch.lerp(palette, grey, desaturation) - 0.5) * (1 - loss))
    return torch.stack(versions, 1)


def _steepen(values: torch.Tensor) -> torch.Tensor:
    """Flattens the outer quarters of [0, 1], so that noise on either side of an outline weighs nothing."""
    return ((values - 0.25) / 0.5).clamp(0, 1)


def _best_position(where: torch.Tensor, masks: torch.Tensor, size: torch.Tensor):
    """
    Where each centred mask (B, 32, 32) overlaps a map (B, 32, 32) most, among the positions the renderer uses.

    Returns the soft intersection over union (Tanimoto: ab / (aa + bb - ab), 1 for equal maps) of shape (B,), and the
    mask moved there (B, 32, 32).
    """
    steep = _steepen(masks)
    overlap = torch.fft.irfft2(torch.fft.rfft2(where) * torch.fft.rfft2(steep).conj(), s=masks.shape[1:])
    axis = (torch.arange(IMAGE_SIZE) + IMAGE_SIZE // 2) % IMAGE_SIZE - IMAGE_SIZE // 2  # 0 1 ... 15 -16 ... -1
    allowed = axis.abs() <= max_shift(size)[:, None]
    overlap = overlap.masked_fill(~(allowed[:, :, None] & allowed[:, None, :]), -1.0)
    best, index = overlap.flatten(1).max(1)
    union = (steep**2).sum((1, 2)) + (where**2).sum((1, 2)) - best
    return best / union, _shift(masks, axis[index // IMAGE_SIZE], axis[index % IMAGE_SIZE])


def alignment_terms(images: torch.Tensor, prompts) -> dict[str, torch.Tensor]:
    """
    The three parts of `alignment_score`, each of shape (B,) with values in [0, 1].

    A named colour stands for 13 versions of itself: the clean one and 12 that span the colours of dull images. A
    deviation of d in RGB counts with `1 / (1 + (d / .15) ** 4)`.

    - `shape`: each pixel's place between the background's and the object's colour (0 to 1, see `_object_map`) makes a
      map; its best soft intersection over union with the caption's shape, over all positions the renderer uses; 0 at
      .5 or less, 1 at .95 or more.
    - `object`: mean count of the pixels under the shape at that position as the object's colour, any version.
    - `background`: mean count of the pixels outside of it as the background's colour, any version. Pixels on the
      outline belong to neither.
    """
    return _alignment_terms(_check(images), parse(prompts))


def _count(squared_distance: torch.Tensor) -> torch.Tensor:
    """How far a pixel counts as a colour at this squared distance: 1 at 0, one half at the tolerance."""
    return 1 / (1 + (squared_distance / COLOUR_TOLERANCE**2) ** 2)


def _object_map(pixels, objects, backgrounds, to_objects, to_backgrounds) -> torch.Tensor:
    """
    Where the object is, from its colour and the background's.

    Of the 13 joint versions of the two colours (same desaturation and contrast), the one that explains the image best
    is taken. A pixel's place on the line from background (0) to object (1), with the outer quarters flattened against
    noise, is multiplied by `_count` of its distance to that line, so that third colours are no object.

    Args: pixels (B, N, 3); objects, backgrounds (B, 13, 3); to_objects, to_backgrounds (B, N, 13), squared distances.
    Returns: (B, 32, 32), values in [0, 1].
    """
    misfit = torch.minimum(to_objects, to_backgrounds).clamp(max=4 * COLOUR_TOLERANCE**2).sum(1)  # (B, 13)
    rows = torch.arange(len(pixels))
    version = misfit.argmin(1)
    low = backgrounds[rows, version][:, None]
    line = objects[rows, version][:, None] - low  # (B, 1, 3)
    place = (((pixels - low) * line).sum(2) / (line**2).sum(2)).clamp(0, 1)
    off_line = ((pixels - low - place[..., None] * line) ** 2).sum(2)
    return (_steepen(place) * _count(off_line)).view(-1, IMAGE_SIZE, IMAGE_SIZE)


def _alignment_terms(images: torch.Tensor, scenes: torch.Tensor) -> dict[str, torch.Tensor]:
    size, colour, shape, background = scenes.unbind(1)
    pixels = images.flatten(2).transpose(1, 2)
    versions = _colour_versions()
    to_objects = _squared_distances(pixels, versions[colour])  # (B, 1024, 13)
    to_backgrounds = _squared_distances(pixels, versions[background])
    where = _object_map(pixels, versions[colour], versions[background], to_objects, to_backgrounds)
    overlap, masks = _best_position(where, templates()[size, shape], size)
    inside = (masks > 0.999).flatten(1).float()
    outside = (masks < 0.001).flatten(1).float()
    return {
        "shape": ((overlap - 0.5) / 0.45).clamp(0, 1),
        "object": (_count(to_objects.amin(2)) * inside).sum(1) / inside.sum(1),
        "background": (_count(to_backgrounds.amin(2)) * outside).sum(1) / outside.sum(1),
    }


def _alignment(images: torch.Tensor, scenes: torch.Tensor) -> torch.Tensor:
    terms = _alignment_terms(images, scenes)
    return 0.5 * terms["shape"] + 0.25 * terms["background"] + 0.25 * terms["object"]


def alignment_score(images: torch.Tensor, prompts) -> torch.Tensor:
    """
    Whether images show their captions: `.5 * shape + .25 * background + .25 * object`, see `alignment_terms`.

    Args:
        images (`torch.Tensor` of shape `(B, 3, 32, 32)`): Values in [0, 1].
        prompts (`list[str]`): B captions of the world.

    Returns:
        `torch.Tensor` of shape `(B,)`, float32, values in [0, 1].
    """
    images = _check(images)
    scenes = parse(prompts)
    if len(images) != len(scenes):
        raise ValueError(f"Expected one caption per image, got {len(images)} images and {len(scenes)} captions.")
    return _by_chunks(_alignment, 128, images, scenes)


def utility(images: torch.Tensor, prompts) -> torch.Tensor:
    """
    What the annotator cares about: `.5 * aesthetics_score + .5 * alignment_score`.

    Args:
        images (`torch.Tensor` of shape `(B, 3, 32, 32)`): Values in [0, 1].
        prompts (`list[str]`): B captions of the world.

    Returns:
        `torch.Tensor` of shape `(B,)`, float32, values in [0, 1].
    """
    weights = UTILITY_WEIGHTS
    return weights["aesthetics"] * aesthetics_score(images) + weights["alignment"] * alignment_score(images, prompts)
