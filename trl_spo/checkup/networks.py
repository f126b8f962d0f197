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
The networks of a run without their weights: built from configurations on the meta device, where they have shapes and take no
memory. Configurations come from a folder or the Hub; those of well-known models are in `checkup.published`, too.
"""

import copy
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer, models
from transformers import CLIPConfig, PreTrainedTokenizerFast

from ..pipelines.auto import wrap_pipeline
from ..pipelines.base import SPOPipeline
from ..pipelines.conditioning import PromptEmbeds
from ..rewards.latent import LatentRewardModel, LatentRewardModelConfig
from ..rewards.step_aware_clip import StepAwareRewardModel
from ..rewards.step_aware_config import StepAwareRewardModelConfig
from .published import CLIP_VIT_H, PUBLISHED, PUBLISHED_CLIPS, PUBLISHED_VAES, Component, PublishedModel


HUB_TIMEOUT = 5  # seconds for one small file


class NoConfiguration(Exception):
    """The configuration of a model can be had neither from a folder, nor from the Hub, nor from `checkup.published`."""


@dataclass
class Paper:
    """
    The networks of a run on paper.

    Attributes:
        pipeline ([`SPOPipeline`]): its networks are on the meta device.
        reward (`torch.nn.Module`, *optional*): reward model on the meta device; `None` for none, or one that is not known.
        notes (`list[str]`): where shapes come from, as far as that is worth saying.
    """

    pipeline: SPOPipeline
    reward: torch.nn.Module | None = None
    notes: tuple[str, ...] = ()


# --- files -----------------------------------------------------------------------------------------------------------


def read_config(source: str, name: str, online: bool = True, revision: str | None = None) -> dict | None:
    """
    A JSON file of a folder or a Hub repository.

    Args:
        source (`str`): folder or Hub id.
        name (`str`): of the file, with its folder, such as `"unet/config.json"`.
        online (`bool`, *optional*, defaults to `True`): `False` looks into the cache of the Hub alone.
        revision (`str`, *optional*): branch, tag or commit.

    Returns:
        `dict`, or `None` if there is no such file within reach.
    """
    path = Path(source) / name
    if not path.is_file():
        if os.path.isdir(source):
            return None
        try:
            options = {"revision": revision, "local_files_only": not online, "etag_timeout": HUB_TIMEOUT}
            path = Path(hf_hub_download(source, name, **options))
        except Exception:  # of any layer: no such repository or file, no access, no network
            return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


# --- a pipeline ------------------------------------------------------------------------------------------------------


def one_word_tokenizer(max_length: int = 77) -> PreTrainedTokenizerFast:
    """A tokenizer that knows one word: pipelines want one, and shapes depend on its length alone."""
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words = {"pad_token": "a", "bos_token": "a", "eos_token": "a", "unk_token": "a"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=max_length, **words)


def class_named(name: str) -> type:
    """
    A class of diffusers or transformers.

    Raises:
        NoConfiguration: if neither has it.
    """
    if name == "StableDiffusionSafetyChecker":
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

        return StableDiffusionSafetyChecker
    found = getattr(diffusers, name, None) or getattr(transformers, name, None)
    if found is None:
        raise NoConfiguration(f"neither diffusers nor transformers has the class {name}")
    return found


def build(component: Component) -> Any:
    """A network, without values under `torch.device("meta")`, or a scheduler."""
    name, settings = component
    cls = class_named(name)
    if hasattr(cls, "from_config") and hasattr(cls, "load_config"):  # of diffusers
        return cls.from_config(settings)
    return cls(cls.config_class(**copy.deepcopy(settings)))  # transformers writes into nested settings


def read_model(source: str, online: bool = True, revision: str | None = None) -> tuple[PublishedModel, str]:
    """
    The classes and settings of a pipeline's networks, and where they are from.

    Raises:
        NoConfiguration: if they cannot be had.
    """
    index = read_config(source, "model_index.json", online, revision)
    if index is None:
        known = PUBLISHED.get(str(source).lower())
        if known is None:
            raise NoConfiguration(
                f"the configuration of {source!r} is neither in a folder nor within reach on the Hub"
            )
        return known, f"shapes of {source} as published, as its configuration is not within reach"
    components, settings = {}, {}
    for name, value in index.items():
        if not isinstance(value, list):
            settings |= {} if name.startswith("_") else {name: value}
            continue
        if value[1] is None or name in ("feature_extractor", "image_encoder"):
            settings[name] = None
            continue
        if "tokenizer" in name:
            continue
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        config = read_config(source, f"{name}/{file}", online, revision)
        if config is None:
            raise NoConfiguration(f"{source!r} has no {name}/{file} within reach")
        components[name] = (value[1], config)
    return PublishedModel(index["_class_name"], components, settings), ""


def read_vae(source: str, like: Component, online: bool = True) -> Component:
    """
    Another VAE, of the class of the pipeline's own.

    Raises:
        NoConfiguration: if its configuration cannot be had.
    """
    config = read_config(source, "config.json", online)
    if config is not None:
        return (config.get("_class_name", like[0]), config)
    if source.lower() in PUBLISHED_VAES:
        return PUBLISHED_VAES[source.lower()]
    raise NoConfiguration(f"the configuration of the VAE {source!r} is not within reach")


def pipeline_on_paper(model: PublishedModel, dtype: torch.dtype) -> SPOPipeline:
    """
    The pipeline that SPO would train, with networks on the meta device.

    Raises:
        TypeError, ValueError: if SPO does not take the pipeline; with the reason.
    """
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    try:
        with torch.device("meta"), _quiet_diffusers():
            components = {}
            for name, component in model.components.items():
                part = build(component)
                components[name] = part.to(dtype).eval() if isinstance(part, torch.nn.Module) else part
            for name in list(components):
                if name.startswith("text_encoder"):
                    places = getattr(components[name].config, "max_position_embeddings", 512)
                    tokenizer = one_word_tokenizer(min(places, 512))
                    components.setdefault(name.replace("text_encoder", "tokenizer"), tokenizer)
            # diffusers wants a feature extractor beside a safety checker, which is of no use here: it comes afterwards.
            checker = components.pop("safety_checker", None)
            pipeline = class_named(model.pipeline)(**{**model.settings, **components, **_without_checker(checker)})
            if checker is not None:
                pipeline.register_modules(safety_checker=checker)
            wrapped = wrap_pipeline(pipeline)
        # A schedule has values, also where networks have none.
        rule = wrapped.step_rule
        wrapped.step_rule = type(rule)(type(rule.scheduler).from_config(rule.scheduler.config))
        return wrapped
    finally:
        transformers.utils.logging.set_verbosity(level)


def _without_checker(checker: torch.nn.Module | None) -> dict:
    return {} if checker is None else {"safety_checker": None}


class _quiet_diffusers:
    """No advice of diffusers about casting networks that have no values."""

    def __enter__(self):
        self.level = diffusers.utils.logging.get_verbosity()
        diffusers.utils.logging.set_verbosity(logging.ERROR)

    def __exit__(self, *error):
        diffusers.utils.logging.set_verbosity(self.level)


# --- a reward model --------------------------------------------------------------------------------------------------


def clip_on_paper(source: str, online: bool = True) -> tuple[torch.nn.Module, str]:
    """
    A [`StepAwareRewardModel`] around a CLIP, on the meta device, and where its shapes are from.

    Raises:
        NoConfiguration: if the configuration of the CLIP cannot be had.
    """
    config = read_config(source, "config.json", online)
    note = ""
    if config is None:
        config = PUBLISHED_CLIPS.get(str(source).lower())
        note = f"shapes of {source} as published"
    if config is None:
        raise NoConfiguration(f"the configuration of {source!r} is not within reach")
    settings = {name: copy.deepcopy(config[name]) for name in CLIP_VIT_H if config.get(name) is not None}
    return _step_aware(StepAwareRewardModelConfig(CLIPConfig(**settings))), note


def reward_on_paper(arguments, pipeline: SPOPipeline, online: bool = True) -> tuple[torch.nn.Module | None, str]:
    """
    The reward model that `RewardModelArguments` name, on the meta device, and where its shapes are from.

    Raises:
        NoConfiguration: if its configuration cannot be had.
    """
    saved = arguments.reward_model_name_or_path
    if saved is not None:
        config = read_config(saved, "config.json", online)
        if config is None:
            raise NoConfiguration(f"the configuration of the reward model {saved!r} is not within reach")
        if config.get("model_type") == LatentRewardModelConfig.model_type:
            return _latent(LatentRewardModelConfig.from_dict(config), pipeline), ""
        return _step_aware(StepAwareRewardModelConfig.from_dict(config)), ""
    if arguments.reward_type == "latent":
        with torch.device("meta"):
            return LatentRewardModel.from_pipeline(pipeline), "a fresh latent reward model of this pipeline"
    return clip_on_paper(arguments.clip_name_or_path, online)


def _step_aware(config: StepAwareRewardModelConfig) -> torch.nn.Module:
    tokenizer = one_word_tokenizer(config.clip_config.text_config.max_position_embeddings)
    with torch.device("meta"):
        return StepAwareRewardModel(config, tokenizer=tokenizer).eval()


def _latent(config: LatentRewardModelConfig, pipeline: SPOPipeline) -> torch.nn.Module:
    if config.shared:
        raise NoConfiguration(
            "a latent reward that shares the denoiser has few weights of its own; they are not counted"
        )
    tokenizers = [one_word_tokenizer(text["max_position_embeddings"]) for text in config.text_configs or ()]
    with torch.device("meta"):
        model = LatentRewardModel(config, tokenizers=tokenizers or None).eval()
    if model.reader is not None:
        model.reader.take(pipeline)
    return model


# --- text ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextShape:
    """
    Shapes of the embeddings of one prompt.

    Attributes:
        tokens (`int`), width (`int`): of the token features; the longest that the family reads.
        pooled (`int`, *optional*): width of the pooled features.
        sizes (`bool`): whether the size of the image is given beside them, as SDXL wants it.
    """

    tokens: int
    width: int
    pooled: int | None = None
    sizes: bool = False


def text_shape(pipeline: SPOPipeline) -> TextShape:
    """The embeddings that the denoiser of a pipeline takes."""
    config = pipeline.denoiser.config
    width = next(
        config[name] for name in ("cross_attention_dim", "joint_attention_dim", "cap_feat_dim") if config.get(name)
    )
    if pipeline.denoiser_name == "unet":
        encoders = pipeline.clip_text_encoders()
        tokens = min(encoder.config.max_position_embeddings for encoder in encoders)
        if config.get("addition_embed_type") == "text_time":
            return TextShape(tokens, width, encoders[-1].config.projection_dim, sizes=True)
        return TextShape(tokens, width)
    pooled = config.get("pooled_projection_dim")
    clip_tokens = (
        77
        if pipeline.sd_pipeline.components.get("text_encoder_3") is not None
        or "SD3" in type(pipeline.denoiser).__name__
        else 0
    )
    return TextShape(clip_tokens + pipeline.max_sequence_length, width, pooled)


def embeds_of(shape: TextShape, dtype: torch.dtype, device: str = "cpu") -> Callable[[int], PromptEmbeds]:
    """A function that makes embeddings of so many prompts: zeros of the right shape."""

    def embeds(count: int) -> PromptEmbeds:
        options = {"dtype": dtype, "device": device}
        tokens = torch.zeros(count, shape.tokens, shape.width, **options)
        if shape.pooled is None:
            return PromptEmbeds(tokens, tokens)
        pooled = torch.zeros(count, shape.pooled, **options)
        sizes = torch.zeros(count, 6, **options) if shape.sizes else None
        return PromptEmbeds(tokens, tokens, pooled, pooled, sizes)

    return embeds
