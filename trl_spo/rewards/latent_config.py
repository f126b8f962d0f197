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

"""Configuration of a latent reward model, and checks that a pipeline has the latent space it was made for."""

from typing import Any

import torch
from transformers import PretrainedConfig

from .latent_features import plain_config


HEADS = ("cosine", "query_attention")
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")


class LatentRewardModelConfig(PretrainedConfig):
    r"""
    Configuration of a [`LatentRewardModel`].

    Args:
        unet_config (`dict`, *optional*):
            Configuration of the [`~diffusers.UNet2DConditionModel`] whose down and mid blocks are the backbone.
        text_configs (`list[dict]`, *optional*):
            Configurations of one or two CLIP text encoders, each with its class name under `architecture`.
        transformer_config (`dict`, *optional*):
            Configuration of a diffusion transformer instead of a UNet, with its class under `_class_name`.
        shared (`bool`, *optional*, defaults to `False`), peft_config (`dict`, *optional*):
            Whether the backbone is the policy's own denoiser, and the adapter that the reward has on it.
        blocks (`list[int]`, *optional*):
            Blocks of the transformer behind which image tokens are read, counted from 1.
        text_width (`int`, *optional*):
            Width of the pooled text features of the transformer's pipeline.
        pipeline_class (`str`, *optional*), max_sequence_length (`int`, *optional*):
            Class of that diffusers pipeline, and the tokens that its text encoder reads.
        latent_space (`dict`, *optional*):
            What [`latent_space_of`] says of that pipeline.
        projection_dim (`int`, *optional*, defaults to `768`):
            Width in which visual and text features are compared (SDXL: 1280).
        guidance_scale (`float`, *optional*, defaults to `7.5`):
            w of the guided mid feature of a UNet. Values of 1 and less switch it off, and with it the unconditional half.
        num_train_timesteps (`int`, *optional*, defaults to `1000`):
            Timesteps must lie in `[0, num_train_timesteps)`.
        scaling_factor (`float`, *optional*, defaults to `0.18215`), shift_factor (`float`, *optional*):
            Of the autoencoder whose latents are judged.
        logit_scale_init (`float`, *optional*, defaults to `2.6592`):
            Logarithm of the factor of the cosine in a fresh model, ln(1 / 0.07).
        head (`str`, *optional*, defaults to `"cosine"`):
            `"cosine"` compares projected means with the projected text. `"query_attention"`, of a transformer alone, lets
            learned queries read the tokens of image and text ([`QueryAttentionHead`]).
        num_queries (`int`, *optional*, defaults to `4`), num_heads (`int`, *optional*, defaults to `8`):
            Of the query-attention head.
        score_shift (`float`, *optional*, defaults to `0.0`), score_scale (`float`, *optional*, defaults to `1.0`):
            The score of that head is `(raw + score_shift) / score_scale`.
        base_model (`str`, *optional*):
            Hub id of the model whose weights it started from, for the model card.
    """

    model_type = "latent_reward_model"

    def __init__(
        self,
        unet_config=None,
        text_configs=None,
        transformer_config=None,
        shared=False,
        peft_config=None,
        blocks=None,
        text_width=None,
        pipeline_class=None,
        max_sequence_length=None,
        latent_space=None,
        projection_dim=768,
        guidance_scale=7.5,
        num_train_timesteps=1000,
        scaling_factor=0.18215,
        shift_factor=None,
        logit_scale_init=2.6592,
        head="cosine",
        num_queries=4,
        num_heads=8,
        score_shift=0.0,
        score_scale=1.0,
        base_model=None,
        **kwargs,
    ):
        # Where features are read: the networks, and the part of them that is used.
        self.unet_config = {} if unet_config is None else plain_config(unet_config)
        self.text_configs = [] if text_configs is None else list(text_configs)
        _check_text_encoders(self.text_configs)
        self.transformer_config = transformer_config
        self.shared = shared
        self.peft_config = peft_config
        self.blocks = blocks
        self.text_width = text_width
        self.pipeline_class = pipeline_class
        self.max_sequence_length = max_sequence_length
        self.latent_space = latent_space

        # What the scores are made of: latents with their timesteps, and texts.
        self.projection_dim = projection_dim
        self.guidance_scale = guidance_scale
        self.num_train_timesteps = num_train_timesteps
        self.scaling_factor = scaling_factor
        self.shift_factor = shift_factor
        self.logit_scale_init = logit_scale_init

        # How features become a score.
        _check_head(head, self.unet_config)
        self.head = head
        self.num_queries = num_queries
        self.num_heads = num_heads
        self.score_shift = score_shift
        self.score_scale = score_scale
        self.base_model = base_model
        super().__init__(**kwargs)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that are judged."""
        if self.latent_space is not None:
            return self.latent_space["channels"]
        return self.unet_config.get("in_channels", 4)


def _check_text_encoders(text_configs: list[dict]) -> None:
    unknown = sorted({text.get("architecture") for text in text_configs} - set(TEXT_ENCODERS), key=str)
    if unknown:
        raise ValueError(f"`text_configs` must be of {' or '.join(TEXT_ENCODERS)}, got {unknown}.")


def _check_head(head: str, unet_config: dict) -> None:
    if head not in HEADS:
        raise ValueError(f"`head` must be one of {HEADS}, got {head!r}.")
    if head == "query_attention" and unet_config:
        raise ValueError("`head='query_attention'` reads tokens of a transformer, and a UNet has none.")


def latent_space_of(pipeline) -> dict[str, Any]:
    """
    What distinguishes the latents of an [`SPOPipeline`] from those of others, as plain values: channels, and the numbers
    that scale between its VAE and its denoiser.
    """
    config = pipeline.vae.config
    space = {"channels": pipeline.latent_shape()[0]}
    for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        value = getattr(config, name, None)
        if value is not None:
            space[name] = list(value) if isinstance(value, (list, tuple)) else value
    if hasattr(pipeline.vae, "bn"):  # FLUX.2 keeps the statistics of its latents as those of a batch norm
        space["mean"] = pipeline.vae.bn.running_mean.float().tolist()
        space["variance"] = pipeline.vae.bn.running_var.float().tolist()
    return space


def check_made_for(config: LatentRewardModelConfig, pipeline) -> None:
    """
    Check that a model was made for this kind of [`SPOPipeline`].

    Raises:
        ValueError: for a pipeline of another class, or with latents of another space.
    """
    theirs = type(pipeline.sd_pipeline).__name__
    if theirs != config.pipeline_class:
        raise ValueError(
            f"The latent reward model was made for a {config.pipeline_class}, and the pipeline is a {theirs}: it would judge "
            "noise. Take a reward model that was made for this pipeline."
        )
    check_latent_space(config.latent_space, latent_space_of(pipeline))


def check_latent_space(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: if latents of one space mean something else in the other.
    """
    for name in sorted({*ours, *theirs}):
        own = torch.as_tensor(ours.get(name, float("nan"))).double()
        other = torch.as_tensor(theirs.get(name, float("nan"))).double()
        if own.shape != other.shape or not torch.allclose(own, other, rtol=1e-3, atol=1e-6):
            raise ValueError(
                f"The latent reward model judges latents with {name} = {ours.get(name)}, and the pipeline's have "
                f"{theirs.get(name)}: it would judge noise. Take a reward model that was made for this pipeline."
            )
