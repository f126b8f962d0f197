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
Load the released latent rewards of LPO (https://huggingface.co/casiatao/LRM): a UNet and its text encoders in diffusers'
format, and `state_dict.pt` with the heads.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import UNet2DConditionModel
from torch import nn

from ..hub_files import (
    load_strictly,
    locate_checkpoint,
    optional_file,
    read_plain,
    read_state_dict,
    require_existing,
    whole_networks,
)
from ..model_cards import hub_id
from .latent_building import copy_unet
from .latent_text import load_tokenizers, names_of_other_versions


STATE_NAME = "state_dict.pt"  # heads of the released latent rewards
UNUSED = ("up_blocks.", "conv_norm_out.", "conv_out.")  # of a UNet: they never run
FILE_PARTS = {"unet": "backbone.unet", "text_encoder": "text_encoders.0", "text_encoder_2": "text_encoders.1"}


def read_heads(path: str) -> dict[str, torch.Tensor]:
    """
    The heads in a `state_dict.pt` of a released latent reward, flat: `visual_projection.weight`,
    `text_projection.weight` and `logit_scale`, which may be a plain number.

    Raises:
        ValueError: if the file holds anything but tensors and numbers.
    """
    content = read_plain(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path!r} must hold a dictionary, got a {type(content).__name__}.")
    flat = {}
    for name, value in content.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for key, entry in inner:
            flat[f"{name}.{key}" if key else name] = torch.as_tensor(entry)
    return flat


def load_lpo_file(model_class: type, file: str, pipeline: Any, config_kwargs: dict) -> nn.Module:
    """
    A latent reward in one file: the state dict of the public code's model, which it reads as well. The file does not tell the
    architecture, so the pipeline does that it was made from.

    Raises:
        ValueError: without a pipeline, or if a weight is missing, unexpected or misshapen; it is named.
    """
    if pipeline is None:
        raise ValueError(
            f"{file!r} is a file, and does not tell its architecture. Pass the `pipeline` whose latents it judges, or the folder "
            f"with unet/, text_encoder/ and {STATE_NAME}."
        )
    model = model_class.from_pipeline(pipeline, **config_kwargs)
    other_names = names_of_other_versions(model.config.text_configs)
    weights = {}
    for name, value in read_state_dict(file).items():
        part, _, rest = name.partition(".")
        if part == "vae" or (part == "unet" and rest.startswith(UNUSED)):
            continue
        name = f"{FILE_PARTS.get(part, part)}.{rest}" if rest else part
        for pattern, replacement in other_names.items():
            name = re.sub(pattern, replacement, name)
        weights[name] = value
    load_strictly(model, weights, file, "a latent reward of this pipeline")
    return model.eval()


def load_lpo(
    model_class: type,
    folder_or_id: str | Path,
    subfolder: str | None,
    tokenizer: str | None,
    pipeline: Any,
    config_kwargs: dict,
) -> nn.Module:
    """See [`LatentRewardModel.from_original_checkpoint`]."""
    # Load the networks: SDXL's reward has a second text encoder. The up blocks never run, so they may be missing.
    source = os.fspath(folder_or_id)
    require_existing(source, "latent reward model")
    if os.path.isfile(source):
        return load_lpo_file(model_class, source, pipeline, config_kwargs)
    parts = {name: f"{subfolder}/{name}" if subfolder else name for name in ("unet", "text_encoder", "text_encoder_2")}
    for part in (parts["unet"], parts["text_encoder"]):
        if optional_file(source, f"{part}/config.json") is None:
            raise FileNotFoundError(
                f"{source!r} has no {part}/config.json, and a released latent reward is a folder with unet/, text_encoder/ (of "
                f"SDXL also text_encoder_2/) and {STATE_NAME}. If it is one of several there, name it, as `subfolder='lrm_sd15'`."
            )
    is_xl = optional_file(source, f"{parts['text_encoder_2']}/config.json") is not None
    with whole_networks(unused=UNUSED):
        unet = UNet2DConditionModel.from_pretrained(source, subfolder=parts["unet"])
        encoders = [transformers.CLIPTextModel.from_pretrained(source, subfolder=parts["text_encoder"])]
        if is_xl:
            second = transformers.CLIPTextModelWithProjection
            encoders.append(second.from_pretrained(source, subfolder=parts["text_encoder_2"]))

    # The files do not name their latent space: the number of text encoders shows whether it is SDXL's.
    settings = {"scaling_factor": 0.13025 if is_xl else 0.18215, "base_model": hub_id(source)}
    file = locate_checkpoint(source, f"{subfolder}/{STATE_NAME}" if subfolder else STATE_NAME)
    heads = read_heads(file)
    settings["projection_dim"] = len(heads.get("visual_projection.weight", torch.empty(0)))
    model = copy_unet(model_class, unet, encoders, {**settings, **config_kwargs})

    # Load the heads. The scale is a plain number in some files, so it is not a weight of a module.
    expected = nn.ModuleDict({"visual_projection": model.visual_projection})
    if model.text_projection is not None:
        expected["text_projection"] = model.text_projection
    logit_scale = heads.pop("logit_scale", None)
    if logit_scale is None:
        raise ValueError(f"{file!r} has no 'logit_scale'; it holds {sorted(heads)}.")
    load_strictly(expected, heads, file, "the heads of a latent reward model")
    model.logit_scale.data = logit_scale.float().reshape(())

    # Tokenizers lie beside the weights, or in a pipeline that the caller names, or come with the pipeline to be trained.
    for place, folder in ((source, subfolder), (tokenizer, None)):
        if place is not None and model.tokenizers is None:
            model.tokenizers = load_tokenizers(place, folder, len(encoders))
    return model.eval()
