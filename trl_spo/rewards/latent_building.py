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
Build latent rewards from the denoiser of a pipeline: on copies of the blocks that are read, or on the denoiser itself under a
second adapter, fresh or as it was saved.
"""

from typing import Any

from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftConfig
from torch import nn

from ..hub_files import load_strictly, read_state_dict
from ..model_cards import hub_id
from ..pipelines.auto import wrap_pipeline
from ..pipelines.base import SPOPipeline
from ..pipelines.components import changes_of_the_base
from ..pipelines.reward_adapter import add_reward_adapter
from .latent_config import LatentRewardModelConfig, check_made_for, latent_space_of
from .latent_features import (
    SharedFeatures,
    check_blocks,
    default_blocks,
    plain_config,
    pooled_text,
    without_adapters,
)


# What makes a model that shares its denoiser, beside the pipeline and the adapter.
SHARED_SETTINGS = (
    "blocks guidance_scale projection_dim head num_queries num_heads score_shift score_scale logit_scale_init base_model"
).split()


def share_denoiser(model_class: type, pipeline, peft_config: PeftConfig | None, config_kwargs: dict) -> nn.Module:
    """A model on the pipeline's own denoiser."""
    reader = wrap_pipeline(pipeline)
    denoiser = reader.denoiser
    peft_config = peft_config or reader.default_lora()
    if isinstance(denoiser, UNet2DConditionModel):
        settings = {"unet_config": denoiser.config, **config_kwargs}
    else:
        settings = transformer_settings(denoiser, config_kwargs)
    described = {**reader_settings(reader), **settings}
    config = model_class.config_class(shared=True, peft_config=plain_lora(peft_config), **described)
    adapter = add_reward_adapter(denoiser, peft_config)
    model = model_class(config, shared=SharedFeatures(denoiser, adapter, config.blocks))
    model.reader.take(reader)
    return model.to(reader.device).eval()


def load_onto_pipeline(model_class: type, pipeline, file: str, config: LatentRewardModelConfig) -> nn.Module:
    """A saved model that shares its denoiser, on the denoiser of a pipeline; `file` has its weights."""
    reader = wrap_pipeline(pipeline)
    check_made_for(config, reader)
    settings = {name: getattr(config, name) for name in SHARED_SETTINGS}
    model = share_denoiser(model_class, reader, LoraConfig(**config.peft_config), settings)
    load_strictly(model, read_state_dict(file), file, "the latent reward model")
    return model.eval()


def copy_transformer(model_class: type, pipeline, config_kwargs: dict) -> nn.Module:
    """A model around copies of a transformer's first blocks."""
    reader = wrap_pipeline(pipeline)
    transformer = reader.denoiser
    settings = transformer_settings(transformer, config_kwargs)
    model = model_class(model_class.config_class(**{**reader_settings(reader), **settings}))
    model.backbone.load_network(without_adapters(transformer), "the pipeline's transformer")
    model.reader.take(reader)
    return model.cast(transformer.dtype).eval()


def copy_unet(model_class: type, unet: UNet2DConditionModel, encoders: list, settings: dict) -> nn.Module:
    """A model around the weights of a UNet and its text encoders; heads as they are initialised."""
    texts = [{**encoder.config.to_dict(), "architecture": type(encoder).__name__} for encoder in encoders]
    last = encoders[-1].config
    settings = {"projection_dim": getattr(last, "projection_dim", last.hidden_size), **settings}
    model = model_class(model_class.config_class(plain_config(unet.config), texts, **settings))
    model.backbone.load_network(without_adapters(unet), "the pipeline's UNet")
    for own, given in zip(model.text_encoders, encoders, strict=True):
        own.load_state_dict(given.state_dict())
    return model.cast(unet.dtype)


def transformer_settings(transformer: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    """
    `settings` of a [`LatentRewardModelConfig`] with the architecture of a transformer, and the blocks that are read.

    Raises:
        ValueError: for a transformer with one stream, or blocks that do not exist.
    """
    blocks = settings.get("blocks")
    check_blocks(transformer, [1] if blocks is None else blocks)
    architecture = {**plain_config(transformer.config), "_class_name": type(transformer).__name__}
    return {
        **settings,
        "transformer_config": architecture,
        "blocks": default_blocks(transformer) if blocks is None else list(blocks),
    }


def reader_settings(reader: SPOPipeline) -> dict[str, Any]:
    """The entries of a [`LatentRewardModelConfig`] about the pipeline that reads prompts and whose latents are judged."""
    with reader.encoders_on_device():
        text_width = pooled_text(reader.encode_prompt([""])).shape[-1]
    return {
        "text_width": text_width,
        "pipeline_class": type(reader.sd_pipeline).__name__,
        "max_sequence_length": getattr(reader, "max_sequence_length", None),
        "latent_space": latent_space_of(reader),
        "num_train_timesteps": reader.num_train_timesteps,
        "base_model": named_base(reader.sd_pipeline),
    }


def named_base(pipeline) -> str | None:
    """The Hub id of a diffusers pipeline that is what its name says."""
    return None if changes_of_the_base(pipeline) else hub_id(getattr(pipeline, "name_or_path", None))


def plain_lora(peft_config: LoraConfig) -> dict[str, Any]:
    """The settings of a LoRA that differ from peft's defaults, as values that JSON has."""
    defaults = LoraConfig().to_dict()
    settings = {}
    for name, value in peft_config.to_dict().items():
        if value != defaults.get(name):
            settings[name] = sorted(value) if isinstance(value, set) else value
    return settings
