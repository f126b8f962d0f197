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
Load the released weights of DiNa-LRM (https://huggingface.co/papers/2602.11146): `config.json`, an adapter of peft in
`checkpoint/backbone_lora`, and the head in `checkpoint/rm_head.pt`.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from ..hub_files import (
    check_fit,
    load_diffusers_pipeline,
    load_strictly,
    locate_checkpoint,
    read_json,
    read_state_dict,
    require_existing,
)
from ..pipelines.adapters import PROVENANCE, add_lora
from ..pipelines.reward_adapter import REWARD_ADAPTER


LORA_FOLDER = "checkpoint/backbone_lora"
HEAD_NAME = "checkpoint/rm_head.pt"
LORA_PREFIX = "base_model.model."  # of a `PeftModel`
PUBLISHED_SCORE = {"score_shift": 10.0, "score_scale": 10.0}  # (raw + 10) / 10


def dina_settings(config: dict, path: str) -> dict:
    """
    The architecture in a `config.json`, as settings of [`LatentRewardModelConfig`].

    Raises:
        ValueError: for one that this head does not have; the entry is named.
    """
    model = config.get("model", {})
    head = model.get("reward_head", {})
    blocks = model.get("visual_head_idx")
    built = {
        "model.text_head_idx": (model.get("text_head_idx"), [blocks]),
        "model.use_logistic": (model.get("use_logistic", False), [False]),
        "model.use_lora": (model.get("use_lora", False), [True]),
        "model.reward_head.use_proj_in": (head.get("use_proj_in", False), [False]),
        "model.reward_head.width": (head.get("width", -1), [-1]),
        "model.reward_head.out_dim": (head.get("out_dim", 1), [1]),
    }
    for name, (value, possible) in built.items():
        if value not in possible:
            raise ValueError(f"{path!r} has `{name}` = {value!r}, and only {possible[0]!r} can be loaded.")
    if not blocks or 0 in blocks:
        raise ValueError(f"{path!r} must list blocks from 1 on in `model.visual_head_idx`, got {blocks!r}.")
    return {
        "head": "query_attention",
        "blocks": list(blocks),
        "num_queries": head.get("num_queries", 4),
        "num_heads": head.get("num_attn_heads", 8),
        **PUBLISHED_SCORE,
    }


def adapter_config(described: dict, transformer: nn.Module, depth: int) -> LoraConfig:
    """The adapter in an `adapter_config.json`, which was made for the first blocks alone, on a whole transformer."""

    def fits(name: str, layers: str | list[str]) -> bool:
        if isinstance(layers, str):
            return re.fullmatch(layers, name) is not None
        return any(name == layer or name.endswith(f".{layer}") for layer in layers)

    found = []
    for number, block in enumerate(transformer.transformer_blocks[:depth]):
        names = [f"transformer_blocks.{number}.{part}" for part, _ in block.named_modules() if part]
        found += [name for name in names if fits(name, described.get("target_modules") or [])]
    excluded = described.get("exclude_modules") or []
    known = set(LoraConfig.__dataclass_fields__) - set(PROVENANCE)
    settings = {name: value for name, value in described.items() if name in known and value is not None}
    settings["target_modules"] = [name for name in found if not fits(name, excluded)]
    settings["exclude_modules"] = None
    return LoraConfig(**{**settings, "init_lora_weights": "gaussian", "inference_mode": False})


def load_dina(model_class: type, folder_or_id: str | Path, pipeline: Any, shared: bool) -> nn.Module:
    """See [`LatentRewardModel.from_dina_checkpoint`]."""
    # Read the configuration, and check that the pipeline is the one it belongs to.
    source = os.fspath(folder_or_id)
    require_existing(source, "DiNa-LRM")
    file = locate_checkpoint(source, "config.json")
    settings = dina_settings(read_json(file), file)
    described = read_json(locate_checkpoint(source, f"{LORA_FOLDER}/adapter_config.json"))
    if isinstance(pipeline, (str, Path)):
        pipeline = load_diffusers_pipeline(pipeline)
    plain = getattr(pipeline, "sd_pipeline", pipeline)
    if not isinstance(plain, StableDiffusion3Pipeline):
        raise ValueError(
            f"DiNa-LRM is an adapter on Stable Diffusion 3.5 Medium, and the pipeline is a `{type(plain).__name__}`."
        )
    peft_config = adapter_config(described, plain.transformer, max(settings["blocks"]))

    # Build the model with the adapter: on the pipeline's own weights if it is shared, else on a copy of them.
    if shared:
        model = model_class.from_pipeline(pipeline, shared=True, peft_config=peft_config, **settings)
    else:
        model = model_class.from_pipeline(pipeline, **settings)
    network = model.backbone.network
    dtype = model.dtype
    if not shared:
        network.float()  # merging in half precision would round the sum
        add_lora(network, peft_config, "transformer")

    # Load the adapter. Where the weights are not shared it is merged, so that the model is one plain network.
    file = locate_checkpoint(source, f"{LORA_FOLDER}/adapter_model.safetensors")
    weights = {name.removeprefix(LORA_PREFIX): value for name, value in read_state_dict(file).items()}
    name = REWARD_ADAPTER if shared else "default"
    expected = get_peft_model_state_dict(network, adapter_name=name)
    check_fit(expected, weights, file, "the adapter of DiNa-LRM on this pipeline")
    set_peft_model_state_dict(network, weights, adapter_name=name)
    if not shared:
        with torch.no_grad():
            network.fuse_lora()
        network.unload_lora()
        network.requires_grad_(True)
        model.cast(dtype)

    # The head was trained with the adapter and comes in a file of its own.
    file = locate_checkpoint(source, HEAD_NAME)
    load_strictly(model.head, read_state_dict(file), file, "the query-attention head of DiNa-LRM")
    return model.eval()
