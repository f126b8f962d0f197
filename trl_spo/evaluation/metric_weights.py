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
Read the published weights of metrics, and rename them from open_clip's and BLIP's names to those of transformers.
"""

import os
import re

import torch

from ..hub_files import locate_checkpoint, read_state_dict


def read_weights(path: str, key: str | None = None) -> dict[str, torch.Tensor]:
    """The state dict in a file, without the prefix that `DistributedDataParallel` adds."""
    return {name.removeprefix("module."): weight for name, weight in read_state_dict(path, key).items()}


def find_file(path: str, filename: str) -> str:
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
_OPEN_CLIP_PROJECTIONS = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
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
    converted = {}
    unknown = []
    for name, weight in weights.items():
        name = name.removeprefix("text.")
        if name == "attn_mask":  # a buffer of old files, not a weight
            continue
        if name in _OPEN_CLIP_PROJECTIONS:
            converted[_OPEN_CLIP_PROJECTIONS[name]] = weight.T.contiguous()
        elif name in _OPEN_CLIP_NAMES:
            converted[_OPEN_CLIP_NAMES[name]] = weight
        elif found := _convert_block(name, weight):
            converted |= found
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            "These are not the weights of an open_clip CLIP with a vision transformer, unknown names: "
            f"{', '.join(sorted(unknown)[:10])}."
        )
    return converted


def _convert_block(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weight of a transformer block under its new name or names; empty for a name that blocks do not have."""
    block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.?(weight|bias)", name)
    if block is None:
        return {}
    visual, layer, part, ending = block.groups()
    prefix = f"{'vision' if visual else 'text'}_model.encoder.layers.{layer}"
    part = part.rstrip(".")
    if part in _OPEN_CLIP_BLOCK:
        return {f"{prefix}.{_OPEN_CLIP_BLOCK[part]}.{ending}": weight}
    if part == "attn.in_proj_":
        pieces = zip("qkv", weight.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{target}_proj.{ending}": piece.contiguous() for target, piece in pieces}
    return {}


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
    ImageReward's state dict with the names of `ImageRewardModel`. The text encoder and the MLP keep theirs; BLIP's
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
