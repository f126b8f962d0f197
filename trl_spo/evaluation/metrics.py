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
Image-text metrics of the text-to-image literature, each a callable `(images (N, 3, H, W) in [0, 1], prompts) -> (N,)`.

| name | score | weights |
|---|---|---|
| `pickscore` | exp(logit_scale) cos | https://huggingface.co/yuvalkirstain/PickScore_v1 |
| `hps_v2.1`, `hps_v2.0` | 100 cos | https://huggingface.co/xswu/HPSv2 |
| `image_reward` | (MLP(BLIP) - mean) / std | https://huggingface.co/THUDM/ImageReward |
| `aesthetic` | MLP(image embedding of length 1) | https://github.com/christophschuhmann/improved-aesthetic-predictor |
| `clip_score` | 100 max(cos, 0) | https://huggingface.co/openai/clip-vit-large-patch14 |

These are the columns of the SPO paper (https://huggingface.co/papers/2406.04314), and CLIPScore. All run on
transformers' `CLIPModel` and `BlipVisionModel`/`BlipTextModel`, so none needs torchvision or the packages the scores
were published with; the weights are the published files, renamed while they are read.

An image is first rounded to 8 bits, because the published scorers read image files, and then prepared as *this* scorer
prepares it: Pillow's bicubic resize with antialiasing and a centre crop for all but HPS v2, which resizes the float
tensor by its longer side and pads with black. That is not [`prepare_images`] of the step-aware reward model, which does
not antialias.
"""

import copy
import os
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel, CLIPConfig, CLIPModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from ..hub_files import (
    load_pretrained,
    load_strictly,
    load_tokenizer,
    locate_checkpoint,
    read_image_processor,
    read_state_dict,
    require_existing,
)
from ..images import eight_bits
from ..rewards.step_aware_clip import CLIP_MEAN, CLIP_STD


# --- images ----------------------------------------------------------------------------------------------------------


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
        The settings in the `preprocessor_config.json` of a folder or Hub id. Read from the file, because transformers'
        image processor classes may need torchvision. Without such a file: CLIP's, at `image_size`.
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
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std

    def _one(self, image: torch.Tensor) -> torch.Tensor:  # (H, W, 3) uint8 -> (h, w, 3) uint8
        height, width = image.shape[:2]
        if isinstance(self.size, int):
            short, long = min(height, width), max(height, width)
            new_long = int(self.size * long / short)
            new = (self.size, new_long) if height <= width else (new_long, self.size)
        else:
            new = tuple(self.size)
        if new != (height, width):
            picture = Image.fromarray(image.numpy()).resize((new[1], new[0]), self.resample)
            image = torch.from_numpy(np.array(picture))
        if self.crop is None:
            return image
        if min(new) < self.crop:
            raise ValueError(f"The image preparation resizes to {new}, too small for its crop of {self.crop}.")
        margins = [side - self.crop for side in new]
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
    HPS v2's own preparation: the *longer* side to `size` by a bicubic resize of the float tensor (not clamped, so it
    may overshoot [0, 1]), then black bars to a square. Images already of that length are left as they are.

    Args:
        images (`torch.Tensor` of shape `(N, 3, H, W)`): in [0, 1].
        size (`int`, *optional*, defaults to `224`): side of the square.
        mean, std (`tuple[float, float, float]`): channel statistics, for images in [0, 1].
        antialias (`bool`, *optional*, defaults to `True`): as the `hpsv2` package computes with torchvision >= 0.17.
            Before, torchvision did not antialias tensors by default: pass `False` to compare with numbers of 2023.

    Returns:
        `torch.Tensor` of shape `(N, 3, size, size)`: float32 pixel values, on the CPU.
    """
    pixels = eight_bits(images).float() / 255
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    if scale != 1:
        new_height, new_width = round(height * scale), round(width * scale)
        pixels = F.interpolate(
            pixels, (new_height, new_width), mode="bicubic", align_corners=False, antialias=antialias
        )
        bars_h, bars_w = size - new_height, size - new_width
        pixels = F.pad(pixels, (bars_w // 2, bars_w - bars_w // 2, bars_h // 2, bars_h - bars_h // 2))
    if pixels.shape[-2:] != (size, size):
        raise ValueError(
            f"HPS v2 leaves an image whose longer side is already {size} unpadded, and its model takes squares: got "
            f"{height} x {width}. Sample at another size."
        )
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return (pixels - mean) / std


# --- weights ---------------------------------------------------------------------------------------------------------


def _read_weights(path: str, key: str | None = None) -> dict[str, torch.Tensor]:
    """The state dict in a file, without the prefix that `DistributedDataParallel` adds."""
    return {name.removeprefix("module."): weight for name, weight in read_state_dict(path, key).items()}


def _find_file(path: str, filename: str) -> str:
    """A file given directly, or by its name in a folder or Hub repository."""
    path = os.fspath(path)
    return path if os.path.isfile(path) else locate_checkpoint(path, filename)


_OPEN_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OPEN_CLIP_NAMES = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # the typo is transformers'
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "logit_scale": "logit_scale",
}


def convert_open_clip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    A state dict of open_clip's `CLIP` with a vision transformer, as one of transformers' `CLIPModel`.

    Attention's joint `in_proj` is cut into query, key and value; the two projections, which open_clip multiplies from
    the right, are transposed. Text towers of both kinds of file are read: at the top level (`transformer.resblocks`)
    or under `text.`. The activation is not in the weights: the configuration must say `gelu` for LAION's models and
    `quick_gelu` for OpenAI's.

    Args:
        weights (`dict[str, torch.Tensor]`): open_clip's names.

    Returns:
        `dict[str, torch.Tensor]`: names of `CLIPModel`.

    Raises:
        ValueError: for a name that this architecture does not have.
    """
    converted, unknown = {}, []
    for name, weight in weights.items():
        name = name.removeprefix("text.")
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.?(weight|bias)", name)
        if name in ("attn_mask", "text_projection", "visual.proj"):
            if name != "attn_mask":  # a buffer of old files, not a weight
                target = "text_projection" if name == "text_projection" else "visual_projection"
                converted[f"{target}.weight"] = weight.T.contiguous()
        elif name in _OPEN_CLIP_NAMES:
            converted[_OPEN_CLIP_NAMES[name]] = weight
        elif block is not None:
            visual, layer, part, kind = block.groups()
            prefix = f"{'vision' if visual else 'text'}_model.encoder.layers.{layer}"
            part = part.rstrip(".")
            if part in _OPEN_CLIP_BLOCK:
                converted[f"{prefix}.{_OPEN_CLIP_BLOCK[part]}.{kind}"] = weight
            elif part == "attn.in_proj_":
                for target, piece in zip("qkv", weight.chunk(3), strict=True):
                    converted[f"{prefix}.self_attn.{target}_proj.{kind}"] = piece.contiguous()
            else:
                unknown.append(name)
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            "These are not the weights of an open_clip CLIP with a vision transformer, unknown names: "
            f"{', '.join(sorted(unknown)[:10])}."
        )
    return converted


_BLIP_VISION_NAMES = (  # BLIP's vision transformer (timm's names) -> transformers' BlipVisionModel
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)


def convert_image_reward(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    ImageReward's state dict with the names of [`ImageRewardModel`]. The text encoder and the MLP keep theirs; BLIP's
    contrastive projections, which the reward does not use, are left out.
    """
    converted = {}
    for name, weight in weights.items():
        if name.startswith("blip.visual_encoder."):
            name = name.removeprefix("blip.visual_encoder.")
            for pattern, replacement in _BLIP_VISION_NAMES:
                name = re.sub(pattern, replacement, name)
            converted[f"vision.{name}"] = weight
        elif name.startswith("blip.text_encoder."):
            converted[f"text.{name.removeprefix('blip.text_encoder.')}"] = weight
        elif not name.startswith("blip."):
            converted[name] = weight
    return converted


class PredictorMLP(nn.Module):
    """The linear stack of the LAION aesthetic predictor and of ImageReward, 768-1024-128-64-16-1; no activations."""

    def __init__(self, input_size: int = 768, widths: tuple[int, ...] = (1024, 128, 64, 16)):
        super().__init__()
        layers, size = [], input_size
        for width, dropout in zip(widths, (0.2, 0.2, 0.1, None), strict=True):
            layers.append(nn.Linear(size, width))
            if dropout is not None:  # takes an index in the names of the weights
                layers.append(nn.Dropout(dropout))
            size = width
        self.layers = nn.Sequential(*layers, nn.Linear(size, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:  # (B, input_size) -> (B,)
        return self.layers(features).squeeze(-1)


# --- metrics ---------------------------------------------------------------------------------------------------------


class ImageMetric:
    """
    Base of all metrics: checks its inputs, works in batches, returns float32 on the CPU.

    Args:
        device (`torch.device` or `str`, *optional*): by default CUDA where there is one.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of the networks. Cosines are always computed in
            float32: in half precision a score near 20 has steps of 1/64.
        batch_size (`int`, *optional*, defaults to `32`): images scored together.
    """

    description: str = ""
    """What the score is and which weights it uses, for reports."""

    def __init__(self, device=None, dtype: torch.dtype = torch.float32, batch_size: int = 32):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device == torch.device("cuda"):  # with a number: which one is current may change later
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.dtype = dtype
        self.batch_size = batch_size

    def _place(self, module: nn.Module) -> nn.Module:
        return module.to(self.device, self.dtype).eval().requires_grad_(False)

    def _score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(N, 3, H, W)`): floating point, in [0, 1].
            prompts (`list[str]`): N prompts.

        Returns:
            `torch.Tensor` of shape `(N,)`: float32, on the CPU; higher is better.

        Raises:
            ValueError: if shapes, lengths or ranges do not fit, or an image is not finite.
        """
        name = type(self).__name__
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"{name} takes floating point images (N, 3, H, W) in [0, 1], got {tuple(images.shape)} of {images.dtype}."
            )
        if isinstance(prompts, str) or len(prompts) != len(images):
            count = "a single string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise ValueError(f"{name} takes one prompt per image, got {count} for {len(images)} images.")
        for image, prompt in zip(images, prompts, strict=True):
            if not image.isfinite().all():  # would become black in 8 bits, and get a score
                raise ValueError(
                    f"The image of the prompt {prompt!r} has NaN or infinite pixels; {name} cannot judge it."
                )
        if len(images) and (images.min() < -1e-3 or images.max() > 1 + 1e-3):
            raise ValueError(
                f"{name} takes images in [0, 1], got [{images.min().item():.3g}, {images.max().item():.3g}]; "
                "turn [-1, 1] into it by `images / 2 + 0.5`."
            )
        scores = [torch.empty(0)]
        for start in range(0, len(images), self.batch_size):
            end = start + self.batch_size
            scores.append(self._score(images[start:end], list(prompts[start:end])).float().cpu())
        return torch.cat(scores)


class CLIPMetric(ImageMetric):
    """
    A metric made of the cosine of a CLIP's image and text embeddings; see its subclasses.

    Args:
        model ([`~transformers.CLIPModel`]): the CLIP.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of its text tower; not needed for image-only metrics.
        preparation (callable): `(N, 3, H, W)` in [0, 1] -> pixel values.
        description (`str`, *optional*): for reports.
        kwargs: `device`, `dtype`, `batch_size` of [`ImageMetric`].
    """

    def __init__(self, model: CLIPModel, tokenizer, preparation, description: str = "", **kwargs):
        super().__init__(**kwargs)
        # Before the cast: bfloat16 would turn the 100 of a trained CLIP into 99.
        self.logit_scale = model.logit_scale.detach().float().exp().to(self.device)
        self.model = self._place(model)
        self.tokenizer = tokenizer
        self.preparation = preparation
        self.description = description

    # Towers and projections one by one, because `get_image_features` returns a tensor in transformers 4 and a record
    # in 5.
    def image_embeds(self, images: torch.Tensor) -> torch.Tensor:
        """`(B, 3, H, W)` in [0, 1] -> `(B, projection_dim)` of length 1, float32."""
        pixel_values = self.preparation(images).to(self.device, self.dtype)
        pooled = self.model.vision_model(pixel_values=pixel_values).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    def text_embeds(self, prompts: list[str]) -> torch.Tensor:
        """`B` prompts -> `(B, projection_dim)` of length 1, float32."""
        length = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)
        encoded = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        # No attention mask: the causal mask already hides the padding behind the end of the text.
        pooled = self.model.text_model(input_ids=encoded["input_ids"].to(self.device)).pooler_output
        return F.normalize(self.model.text_projection(pooled).float(), dim=-1)

    def cosines(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """`(B,)` cosines between image and text, float32."""
        return (self.image_embeds(images) * self.text_embeds(prompts)).sum(dim=-1)


def _require_tokenizer(path: str):
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise FileNotFoundError(
            f"{str(path)!r} holds no tokenizer; pass the folder or Hub id that does as `processor`."
        )
    return tokenizer


class PickScore(CLIPMetric):
    """PickScore (https://huggingface.co/papers/2305.01569): `exp(logit_scale) * cos`, near 20 for typical images."""

    @classmethod
    def from_pretrained(
        cls,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        **kwargs,
    ) -> "PickScore":
        """
        Args:
            model (`str`, *optional*): folder or Hub id of a [`~transformers.CLIPModel`].
            processor (`str`, *optional*): folder or Hub id of its tokenizer and image settings; `None` for `model`.
            kwargs: `device`, `dtype`, `batch_size` of [`ImageMetric`].
        """
        processor = model if processor is None else processor
        clip = load_pretrained(CLIPModel, model, "CLIP model")
        preparation = ImagePreparation.from_processor(processor, clip.config.vision_config.image_size)
        description = f"{cls.__name__}, {model}"
        return cls(clip, _require_tokenizer(processor), preparation, description=description, **kwargs)

    def _score(self, images, prompts):
        return self.logit_scale * self.cosines(images, prompts)


class CLIPScore(PickScore):
    """
    CLIPScore (https://huggingface.co/papers/2104.08718) in the common form `100 * max(cos, 0)`, without the paper's
    factor 2.5 and without its "A photo depicts" before the prompt.
    """

    @classmethod
    def from_pretrained(
        cls, model: str = "openai/clip-vit-large-patch14", processor: str | None = None, **kwargs
    ) -> "CLIPScore":
        """Arguments as in [`PickScore.from_pretrained`]."""
        return super().from_pretrained(model, processor, **kwargs)

    def _score(self, images, prompts):
        return 100 * self.cosines(images, prompts).clamp(min=0)


class HPSv2(CLIPMetric):
    """
    Human Preference Score v2 (https://huggingface.co/papers/2306.09341): `100 * cos` under a fine-tuned ViT-H/14, as
    its benchmark prints it (its `score` function returns the cosine without the factor).

    Difference: prompts pass through transformers' tokenizer, which does not repair broken Unicode and HTML entities
    first, as open_clip's does.
    """

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str = "xswu/HPSv2",
        filename: str = "HPS_v2.1_compressed.pt",
        clip: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        antialias: bool = True,
        **kwargs,
    ) -> "HPSv2":
        """
        Args:
            checkpoint (`str`, *optional*): the file, or a folder or Hub id that holds `filename`. A dictionary whose
                entry `"state_dict"` has open_clip's names.
            filename (`str`, *optional*): `HPS_v2.1_compressed.pt` or `HPS_v2_compressed.pt`.
            clip (`str`, *optional*): folder or Hub id of configuration and tokenizer of the same architecture in
                transformers' format. Its weights are not needed.
            antialias (`bool`, *optional*, defaults to `True`): see [`prepare_hps_images`].
            kwargs: `device`, `dtype`, `batch_size` of [`ImageMetric`].
        """
        path = _find_file(checkpoint, filename)
        config = load_pretrained(CLIPConfig, clip, "CLIP configuration")
        tokenizer, settings = _require_tokenizer(clip), ImagePreparation.from_processor(clip)
        model = CLIPModel(config)
        load_strictly(model, convert_open_clip(_read_weights(path, "state_dict")), path, f"the CLIP of {clip!r}")
        size = config.vision_config.image_size

        def preparation(images: torch.Tensor) -> torch.Tensor:
            return prepare_hps_images(images, size, settings.mean, settings.std, antialias)

        description = f"HPS v2, {checkpoint} {'' if os.path.isfile(checkpoint) else filename}".rstrip()
        return cls(model, tokenizer, preparation, description=description, **kwargs)

    def _score(self, images, prompts):
        return 100 * self.cosines(images, prompts)


class AestheticScore(CLIPMetric):
    """
    LAION's improved aesthetic predictor: a linear stack on CLIP ViT-L/14's image embedding of length 1. About 1 to 10;
    the prompt plays no part.

    Args:
        predictor ([`PredictorMLP`]): the stack.
        args, kwargs: of [`CLIPMetric`].
    """

    def __init__(self, predictor: PredictorMLP, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.predictor = predictor.float().to(self.device).eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        predictor: str = "trl-lib/ddpo-aesthetic-predictor",
        filename: str = "aesthetic-model.pth",
        clip: str = "openai/clip-vit-large-patch14",
        **kwargs,
    ) -> "AestheticScore":
        """
        Args:
            predictor (`str`, *optional*): the file (the original is `sac+logos+ava1-l14-linearMSE.pth`), or a folder
                or Hub id that holds `filename`. TRL's copy of the original by default.
            filename (`str`, *optional*): name in that folder or repository.
            clip (`str`, *optional*): folder or Hub id of the CLIP.
            kwargs: `device`, `dtype`, `batch_size` of [`ImageMetric`].
        """
        path = _find_file(predictor, filename)
        weights = _read_weights(path)
        model = load_pretrained(CLIPModel, clip, "CLIP model")
        preparation = ImagePreparation.from_processor(clip, model.config.vision_config.image_size, half="round")
        mlp = PredictorMLP(model.config.projection_dim)
        load_strictly(mlp, weights, path, f"the aesthetic predictor on embeddings of {clip!r}")
        description = f"LAION aesthetic predictor, {predictor} on {clip}"
        return cls(mlp, model, None, preparation, description=description, **kwargs)

    def _score(self, images, prompts):
        return self.predictor(self.image_embeds(images))


class ImageRewardModel(nn.Module):
    """
    ImageReward's network: BLIP's vision transformer, its text encoder with cross-attention on the image, and a linear
    stack on the first token, standardised.

    Args:
        vision_config ([`~transformers.BlipVisionConfig`]), text_config ([`~transformers.BlipTextConfig`]): sizes.
    """

    mean, std = 0.16717362830052426, 1.0333394966054072  # of the raw reward, from the reference implementation

    def __init__(self, vision_config: BlipVisionConfig, text_config: BlipTextConfig):
        super().__init__()
        self.vision = BlipVisionModel(vision_config)
        self.text = BlipTextModel(text_config, add_pooling_layer=False)
        self.mlp = PredictorMLP(text_config.hidden_size)

    def forward(self, pixel_values, input_ids, attention_mask) -> torch.Tensor:  # (B, 3, H, W), (B, L), (B, L) -> (B,)
        image = self.vision(pixel_values=pixel_values).last_hidden_state
        hidden = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:-1], dtype=torch.long, device=image.device),
        ).last_hidden_state
        return (self.mlp(hidden[:, 0].float()) - self.mean) / self.std


class ImageReward(ImageMetric):
    """
    ImageReward (https://huggingface.co/papers/2304.05977), standardised: 0 is an average image, 1 one deviation better.

    The weights are those of the `image-reward` package, the network is transformers' BLIP. That package needs
    torchvision, an old transformers and OpenAI's `clip` from a URL, and so cannot live in one environment with current
    diffusers; on equal weights both give the same scores.

    Args:
        model ([`ImageRewardModel`]): the network.
        tokenizer (`PreTrainedTokenizerBase`): BERT's, uncased.
        preparation (callable): `(N, 3, H, W)` in [0, 1] -> pixel values.
        description (`str`, *optional*): for reports.
        kwargs: `device`, `dtype`, `batch_size` of [`ImageMetric`].
    """

    max_length = 35  # tokens; longer prompts are cut, as in the reference implementation

    def __init__(self, model: ImageRewardModel, tokenizer, preparation, description: str = "", **kwargs):
        super().__init__(**kwargs)
        mlp = copy.deepcopy(model.mlp).float()  # before the cast: rounded weights would stay rounded
        self.model = self._place(model)
        self.model.mlp = mlp.to(self.device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.preparation = preparation
        self.description = description

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str = "THUDM/ImageReward",
        filename: str = "ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
        vision_config: BlipVisionConfig | None = None,
        text_config: BlipTextConfig | None = None,
        **kwargs,
    ) -> "ImageReward":
        """
        Args:
            checkpoint (`str`, *optional*): the file, or a folder or Hub id that holds `filename`.
            filename (`str`, *optional*): name in that folder or repository.
            tokenizer (`str`, *optional*): folder or Hub id of BERT's uncased tokenizer.
            vision_config, text_config (*optional*): sizes of another BLIP; by default those of BLIP large, which the
                released weights have.
            kwargs: `device`, `dtype`, `batch_size` of [`ImageMetric`].
        """
        path = _find_file(checkpoint, filename)
        require_existing(tokenizer, "tokenizer")
        try:
            bert_tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        except OSError as error:
            raise FileNotFoundError(f"{tokenizer!r} holds no tokenizer: {error}") from error
        vision_config = vision_config or BlipVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=224,
            patch_size=16,
            layer_norm_eps=1e-6,
        )
        text_config = text_config or BlipTextConfig(
            vocab_size=30524,
            hidden_size=768,
            encoder_hidden_size=vision_config.hidden_size,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=512,
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            is_decoder=True,  # gives its layers cross-attention; it still sees the whole text
        )
        weights = convert_image_reward(_read_weights(path))  # first: a bad file costs no model
        model = ImageRewardModel(vision_config, text_config)
        load_strictly(model, weights, path, "ImageReward's BLIP")
        preparation = ImagePreparation(vision_config.image_size, vision_config.image_size, half="round")
        description = f"ImageReward, {checkpoint}"
        return cls(model, bert_tokenizer, preparation, description=description, **kwargs)

    def _score(self, images, prompts):
        encoded = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        pixel_values = self.preparation(images).to(self.device, self.dtype)
        return self.model(
            pixel_values, encoded["input_ids"].to(self.device), encoded["attention_mask"].to(self.device)
        )


METRICS = {
    "pickscore": (PickScore, {}),
    "hps_v2.1": (HPSv2, {}),
    "hps_v2.0": (HPSv2, {"filename": "HPS_v2_compressed.pt"}),
    "image_reward": (ImageReward, {}),
    "aesthetic": (AestheticScore, {}),
    "clip_score": (CLIPScore, {}),
}


"""Metric names with their class and the arguments of its `from_pretrained`."""


def load_metric(name: str, **kwargs) -> ImageMetric:
    """
    A metric with its published weights.

    Args:
        name (`str`): one of `METRICS`: `"pickscore"`, `"hps_v2.1"`, `"hps_v2.0"`, `"image_reward"`, `"aesthetic"`,
            `"clip_score"`.
        kwargs: of the `from_pretrained` of its class: `device`, `dtype`, `batch_size`, and where the weights are, if
            not at their Hub ids.

    Returns:
        [`ImageMetric`].

    Raises:
        ValueError: for another name.

    Example:

    ```python
    >>> from trl_spo.evaluation.metrics import load_metric

    >>> pickscore = load_metric("pickscore", dtype=torch.float16)
    >>> scores = pickscore(images, prompts)  # (N,)
    ```
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; the metrics are {', '.join(METRICS)}.")
    metric, defaults = METRICS[name]
    return metric.from_pretrained(**{**defaults, **kwargs})
