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
Prepare images as the published scorers do, each in its own way.

An image is first rounded to 8 bits, because the published scorers read image files. [`ImagePreparation`] then resizes
with Pillow's antialiasing and crops the centre; [`prepare_hps_images`] resizes the float tensor by its longer side and
pads with black. The step-aware reward model prepares images differently again: `prepare_images` does not antialias.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..hub_files import read_image_processor
from ..images import eight_bits
from ..rewards.step_aware_config import CLIP_MEAN, CLIP_STD


@dataclass(frozen=True)
class ImagePreparation:
    """
    Resize, centre crop, normalise: what CLIP-like scorers do to an image file.

    Attributes:
        size (`int` or `tuple[int, int]`): length of the short side after the resize, or (height, width) to squash to.
        crop (`int`, *optional*): side of the centre crop; `None` for no crop.
        mean, std (`tuple[float, float, float]`): channel statistics, for images in [0, 1].
        resample (`int`, *optional*, defaults to `3`): Pillow's filter, 3 is bicubic.
        half (`str`, *optional*, defaults to `"floor"`): which pixel an odd margin goes to: `"floor"` as transformers'
            image processors crop, `"round"` (half to even) as torchvision's `CenterCrop` does.
    """

    size: int | tuple[int, int] = 224
    crop: int | None = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resample: int = int(Image.Resampling.BICUBIC)
    half: str = "floor"

    @classmethod
    def from_processor(cls, path: str, image_size: int = 224, half: str = "floor") -> "ImagePreparation":
        """
        The settings in the `preprocessor_config.json` of a folder or Hub id, or CLIP's at `image_size` if it has none.
        """
        settings = read_image_processor(path)
        size = settings.get("size", image_size)
        crop = settings.get("crop_size", image_size)
        if isinstance(size, dict):
            size = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
        if isinstance(crop, dict):
            if crop["height"] != crop["width"]:
                raise ValueError(f"The image processor of {str(path)!r} crops to {crop}; only squares are supported.")
            crop = crop["height"]
        if not settings.get("do_center_crop", True):
            crop = None
        return cls(
            size=size,
            crop=crop,
            mean=tuple(settings.get("image_mean") or CLIP_MEAN),
            std=tuple(settings.get("image_std") or CLIP_STD),
            resample=settings.get("resample", int(Image.Resampling.BICUBIC)),
            half=half,
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """`(N, 3, H, W)` in [0, 1] -> pixel values `(N, 3, height, width)`, float32, on the CPU."""
        pixels = torch.stack([self._one(image) for image in eight_bits(images).permute(0, 2, 3, 1)])
        return _normalise(pixels.permute(0, 3, 1, 2).float() / 255, self.mean, self.std)

    def _one(self, image: torch.Tensor) -> torch.Tensor:  # (H, W, 3) uint8 -> (h, w, 3) uint8
        # Resize: the short side to a length, or both sides.
        height, width = image.shape[:2]
        if isinstance(self.size, int):
            new_long = int(self.size * max(height, width) / min(height, width))
            new = (self.size, new_long) if height <= width else (new_long, self.size)
        else:
            new = tuple(self.size)
        if new != (height, width):
            picture = Image.fromarray(image.numpy()).resize((new[1], new[0]), self.resample)
            image = torch.from_numpy(np.array(picture))

        # Crop the middle.
        if self.crop is None:
            return image
        if min(new) < self.crop:
            raise ValueError(f"The image preparation resizes to {new}, too small for its crop of {self.crop}.")
        margins = [side - self.crop for side in new]
        # An odd margin goes to the pixel that the scorer's own library gives it to; `round` is half to even.
        top, left = (margin // 2 if self.half == "floor" else round(margin / 2) for margin in margins)
        return image[top : top + self.crop, left : left + self.crop]


def prepare_hps_images(
    images: torch.Tensor,
    size: int = 224,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
    antialias: bool = True,
) -> torch.Tensor:
    r"""
    HPS v2's own preparation: the *longer* side to `size` by a bicubic resize of the float tensor (not clamped, so that it
    may overshoot [0, 1]), then black bars to a square. Images that already have that length are left as they are.

    Args:
        images (`torch.Tensor` of shape `(N, 3, H, W)`): in [0, 1].
        size (`int`, *optional*, defaults to `224`): side of the square.
        mean, std (`tuple[float, float, float]`): channel statistics, for images in [0, 1].
        antialias (`bool`, *optional*, defaults to `True`): what the `hpsv2` package does with torchvision >= 0.17.
            Before, torchvision did not antialias tensors by default: pass `False` to compare with numbers of 2023.

    Returns:
        `torch.Tensor` of shape `(N, 3, size, size)`: float32 pixel values, on the CPU.
    """
    pixels = eight_bits(images).float() / 255
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    if scale != 1:
        new_height = round(height * scale)
        new_width = round(width * scale)
        pixels = F.interpolate(
            pixels, (new_height, new_width), mode="bicubic", align_corners=False, antialias=antialias
        )
        bars_h = size - new_height
        bars_w = size - new_width
        pixels = F.pad(pixels, (bars_w // 2, bars_w - bars_w // 2, bars_h // 2, bars_h - bars_h // 2))
    if pixels.shape[-2:] != (size, size):
        raise ValueError(
            f"HPS v2 leaves an image whose longer side is already {size} unpadded, and its model takes squares: got "
            f"{height} x {width}. Sample at another size."
        )
    return _normalise(pixels, mean, std)


def _normalise(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    return (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
