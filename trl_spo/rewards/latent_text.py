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
Read the prompts of latent rewards: with text encoders of their own, trained with them, or with the frozen ones of the
pipeline whose latents they judge.
"""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from ..hub_files import load_diffusers_pipeline, load_tokenizer
from ..pipelines.adapters import save_lora
from ..pipelines.auto import wrap_pipeline
from ..pipelines.base import SPOPipeline
from ..pipelines.conditioning import PromptEmbeds
from ..pipelines.reward_adapter import REWARD_ADAPTER
from .inputs import check_texts
from .latent_config import LatentRewardModelConfig, check_made_for


PIPELINE_FOLDER = "pipeline"  # beside saved weights: whose text encoders a transformer's reward reads with


class PipelineReader:
    """
    Encodes prompts with the frozen text encoders of a pipeline.

    Args:
        config ([`LatentRewardModelConfig`]):
            Configuration of the reward model. Pipelines that it was not made for are refused.
        denoiser (`torch.nn.Module`):
            The part of a transformer that the reward model carries.
    """

    def __init__(self, config: LatentRewardModelConfig, denoiser: nn.Module):
        self.config = config
        self.denoiser = denoiser
        self.pipeline: SPOPipeline | None = None
        self.find: Callable[[], Path] | None = None
        """Says where a pipeline was saved beside the weights, after fetching it from the Hub if need be. It is loaded when
        prompts are read and no other one is there."""

    def take(self, pipeline: SPOPipeline) -> None:
        """
        Read with this pipeline from now on.

        Raises:
            ValueError: if the reward model was made for another one.
        """
        check_made_for(self.config, pipeline)
        self.pipeline = pipeline

    def require(self) -> SPOPipeline:
        """
        The pipeline that was taken, or else the one that was saved beside the weights.

        Raises:
            ValueError: if there is neither.
        """
        if self.pipeline is None and self.find is not None:
            folder = self.find()
            index = json.loads((folder / "model_index.json").read_text())
            # A part that the pipeline did without, such as SD3's T5, has to be left out by name.
            missing = {name: None for name, entry in index.items() if isinstance(entry, list) and entry[-1] is None}
            parts = {**missing, "transformer": self.denoiser}
            self.take(wrap_pipeline(load_diffusers_pipeline(folder, **parts)))
            self.pipeline.max_sequence_length = self.config.max_sequence_length
        if self.pipeline is None:
            raise ValueError(
                f"This latent reward model encodes prompts with a {self.config.pipeline_class}, and its folder holds none. "
                "Call `check_pipeline(pipeline)` first, as the trainers do."
            )
        return self.pipeline

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> PromptEmbeds:
        """Features of prompts by the frozen text encoders of the pipeline; of the empty prompt if the middle is guided."""
        reader = self.require()
        check_texts(prompts)
        unique = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        guided = self.config.transformer_config is None and self.config.guidance_scale > 1
        with reader.encoders_on_device():
            if guided or not reader.negative_is_optional:
                text = reader.encode_prompt(list(unique))
            else:
                text = reader.encode_prompt(list(unique), None)
        if not guided:
            text = text.without_negative()
        return text[torch.tensor([unique[prompt] for prompt in prompts], device=text.prompt_embeds.device)]


def encode_with_clips(encoders: nn.ModuleList, ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token features `(B, L, dim)` as the diffusion model attends to them, and pooled features `(B, dim)`."""
    if len(encoders) == 1:
        output = encoders[0](ids[0])
        return output.last_hidden_state, output.pooler_output
    outputs = [encoder(part, output_hidden_states=True) for encoder, part in zip(encoders, ids, strict=True)]
    tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return tokens, outputs[-1].text_embeds


def make_text_encoder(config: dict) -> PreTrainedModel:
    """A text encoder of the class that its configuration names, with random weights."""
    config = copy.deepcopy(config)
    architecture = getattr(transformers, config.pop("architecture"))
    for name in ("dtype", "torch_dtype"):  # one model has one dtype, said by its weights
        config.pop(name, None)
    return architecture(architecture.config_class(**config))


def names_of_other_versions(text_configs: list[dict]) -> dict[str, str]:
    """
    transformers 5 left `text_model.` out of the names in a `CLIPTextModel`. Patterns of the names that the other version
    saved, and what they are called here, as `from_pretrained(key_mapping=...)` takes them.
    """
    mapping = {}
    for index, config in enumerate(text_configs):
        if config["architecture"] != "CLIPTextModel":
            continue
        with torch.device("meta"):
            names = list(make_text_encoder(config).state_dict())
        prefix = rf"^text_encoders\.{index}\."
        if names[0].startswith("text_model."):
            mapping[prefix + r"(?!text_model\.)"] = f"text_encoders.{index}.text_model."
        else:
            mapping[prefix + r"text_model\."] = f"text_encoders.{index}."
    return mapping


def tokenizers_of(pipeline, count: int) -> list | None:
    """The tokenizers of a pipeline's first `count` text encoders, `None` if one is missing."""
    found = [getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2")][:count]
    return None if any(tokenizer is None for tokenizer in found) else found


def load_tokenizers(path: str, folder: str | None, count: int, **hub_kwargs) -> list | None:
    """
    `tokenizer/` and `tokenizer_2/` of a folder or Hub id, or of `folder` in it, `None` if they are not there. `hub_kwargs` are
    `revision`, `token` and `cache_dir`.
    """
    found = []
    for name in ("tokenizer", "tokenizer_2")[:count]:
        tokenizer = load_tokenizer(path, f"{folder}/{name}" if folder else name, **hub_kwargs)
        if tokenizer is None:
            return None
        found.append(tokenizer)
    return found


def save_what_reads(model: nn.Module, folder: Path, save_reader: bool) -> None:
    """
    Beside the weights of a [`LatentRewardModel`]: tokenizers, a transformer's pipeline, and of a shared model its part of the
    denoiser as a LoRA of diffusers.
    """
    for name, tokenizer in zip(("tokenizer", "tokenizer_2"), model.tokenizers or (), strict=False):
        tokenizer.save_pretrained(folder / name)
    if not save_reader or model.reader is None:
        return
    reader = model.reader.require()
    if model.config.shared:
        save_lora(reader.sd_pipeline, reader.denoiser_name, folder, adapter_name=REWARD_ADAPTER)
    else:
        save_without_denoiser(reader, folder / PIPELINE_FOLDER)


def save_without_denoiser(pipeline, folder: Path) -> None:
    """Save a diffusers pipeline without its denoiser."""
    components = dict(pipeline.sd_pipeline.components)
    components[pipeline.denoiser_name] = None
    # diffusers would warn that the missing part cannot be saved.
    noisy_logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    level = noisy_logger.level
    noisy_logger.setLevel(logging.ERROR)
    try:
        type(pipeline.sd_pipeline)(**components).save_pretrained(folder)
    finally:
        noisy_logger.setLevel(level)
