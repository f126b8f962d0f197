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
The base of the flow-matching families, [`SPOFlowPipeline`]: sigmas behind integer timesteps, latents in float32, and the
way from a velocity to a step. A family says how its transformer is called ([`SPOFlowPipeline.velocity`]), how prompts are
encoded, how large latents are, and how its schedule is shifted.

Latents are `(B, C, h, w)` everywhere. A transformer that wants them packed into tokens gets them so inside `velocity`.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging
from peft import LoraConfig

from ..scheduling_flow import FlowStepRule
from .autoencoder import latent_channels
from .base import SPOPipeline
from .components import check_inputs, check_vae_statistics
from .conditioning import LongPrompts, PromptEmbeds


logger = logging.get_logger(__name__)

# Attention of transformers that see image and text as two streams: of the image, then of the text. These layers are what
# diffusers' training scripts and Flow-GRPO adapt.
TWO_STREAM_ATTENTION = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip


def flow_scheduler(scheduler) -> FlowMatchEulerDiscreteScheduler:
    """
    A `FlowMatchEulerDiscreteScheduler` with the sigmas of `scheduler`, which is left alone. Its own noise
    (`stochastic_sampling`) is switched off: the step rule adds it.

    Raises:
        ValueError: for a scheduler that has no flow-matching sigmas.
    """
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            "SPO takes the noise levels of a flow-matching model from a `FlowMatchEulerDiscreteScheduler`, and the "
            f"pipeline has a `{type(scheduler).__name__}`. Set `pipeline.scheduler` to the one of its checkpoint."
        )
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, stochastic_sampling=False)


def linear_mu(num_tokens: int, config) -> float:
    """
    The shift of FLUX-like schedules (`use_dynamic_shifting`): linear in the number of image tokens, between the two
    points of the scheduler's configuration (https://github.com/black-forest-labs/flux, `sampling.py`).
    """
    first = config.get("base_image_seq_len", 256)
    last = config.get("max_image_seq_len", 4096)
    low = config.get("base_shift", 0.5)
    high = config.get("max_shift", 1.15)
    return low + (num_tokens - first) * (high - low) / (last - first)


def with_lengths(
    positive: torch.Tensor,
    lengths: list[int],
    negative: torch.Tensor | None = None,
    negative_length: int | None = None,
) -> PromptEmbeds:
    """
    Prompts of different lengths, and one negative prompt for all of them. The lengths are kept beside the masks that follow
    from them: both are made here, once, so that no call of the denoiser has to ask the device.

    Args:
        positive (`torch.Tensor` of shape `(B, L, dim)`), lengths (`list[int]` of B): of the prompts; the text of a row comes
            first.
        negative (`torch.Tensor` of shape `(1, M, dim)`, *optional*), negative_length (`int`, *optional*): of the negative
            prompt; `None` leaves that half out.
    """
    embeds = PromptEmbeds(positive, prompt_mask=_mask(positive, lengths), prompt_lengths=tuple(lengths))
    if negative is None:
        return embeds
    count = len(positive)
    return replace(
        embeds,
        negative_prompt_embeds=negative.expand(count, -1, -1),
        negative_prompt_mask=_mask(negative, [negative_length]).expand(count, -1),
        negative_prompt_lengths=(negative_length,) * count,
    )


def _mask(rows: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """`(B, L)`, True where a row has text."""
    places = torch.arange(rows.shape[1], device=rows.device)
    return places < torch.tensor(lengths, device=rows.device)[:, None]


def text_lengths(rows: torch.Tensor, mask: torch.Tensor | None, lengths: tuple[int, ...] | None = None) -> list[int]:
    """
    How many tokens of each row are text. Embeddings from elsewhere may have a mask alone, and reading it waits for the
    device.

    Args:
        rows (`torch.Tensor` of shape `(B, L, dim)`), mask (`torch.Tensor` of shape `(B, L)`, *optional*), lengths
            (`tuple[int, ...]`, *optional*): of one half of [`PromptEmbeds`].
    """
    if lengths is not None:
        return list(lengths)
    return [rows.shape[1]] * len(rows) if mask is None else mask.sum(1).tolist()


def pack(latents: torch.Tensor) -> torch.Tensor:
    """`(B, C, h, w)` -> one token per 2 x 2 latent pixels, `(B, h/2 * w/2, 4 C)`."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The way back from [`pack`] to latents of `height` x `width`."""
    grid = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return F.pixel_shuffle(grid, 2)


class SPOFlowPipeline(SPOPipeline):
    """
    A flow-matching text-to-image pipeline for `SPOTrainer`.

    Args:
        pipeline: a diffusers pipeline; its components are used, not copied.
        use_lora (`bool`, *optional*, defaults to `True`): train adapters (True) or the whole transformer.
        sampler (`str`, *optional*, defaults to `"ddim"`): steps of rollouts, see `scheduling_flow`.
        max_sequence_length (`int`, *optional*): tokens that the text encoder reads (the T5 encoder, where there are
            several); by default what the family's diffusers pipeline takes.

    Attributes:
        sd_pipeline: the wrapped diffusers pipeline.
        step_rule ([`FlowStepRule`]): the sampler of rollouts.

    Raises:
        ValueError: if a component is missing, the scheduler has no flow-matching sigmas, or the autoencoder lacks a
            number that its latents are scaled with.
    """

    denoiser_name = "transformer"
    required_components: tuple[str, ...] = ("transformer", "vae", "scheduler")
    lora_target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    patch_size = 2
    channels_per_patch = 1  # of the latents, for each channel of the VAE
    takes_guidance = False  # whether the transformer may be told the guidance scale
    vae_statistics: tuple[str, ...] = ("shift_factor",)  # of the VAE's configuration, read beside `scaling_factor`
    max_sequence_length = 512

    def __init__(self, pipeline, use_lora: bool = True, sampler: str = "ddim", max_sequence_length: int | None = None):
        super().__init__(pipeline, use_lora)
        self.max_sequence_length = max_sequence_length or self.max_sequence_length
        self.step_rule = FlowStepRule(flow_scheduler(pipeline.scheduler), sampler)
        self.long_prompts = LongPrompts()
        self._check_networks()
        vae_channels = latent_channels(self.vae)
        check_inputs(self.denoiser, self.latent_channels(), vae_channels and vae_channels * self.channels_per_patch)
        if self.denoiser.config.get("guidance_embeds") and not self.takes_guidance:
            raise ValueError(
                "The transformer is told the guidance (`guidance_embeds=True`), and SPO guides this family by a second call "
                "instead. Pass a checkpoint without it."
            )
        check_vae_statistics(self.vae, self.vae_statistics)

    def _check_networks(self) -> None:
        """Whether the autoencoder says how its latents are scaled."""
        for name in ("scaling_factor", "shift_factor"):
            if getattr(self.vae.config, name, None) is None:
                raise ValueError(
                    f"The VAE has no `{name}` in its configuration, and this family scales latents with it. Load the VAE of "
                    "the checkpoint, or set the value with `vae.register_to_config`."
                )

    def default_lora(self) -> LoraConfig:
        """The adapter by default: rank 32 on `lora_target_modules`; alpha = rank, so that every tool agrees."""
        return LoraConfig(
            r=32, lora_alpha=32, init_lora_weights="gaussian", target_modules=list(self.lora_target_modules)
        )

    @property
    def is_distilled(self) -> bool:
        """Whether the model was distilled to a few steps, as far as the name of its checkpoint says so."""
        name = str(getattr(self.sd_pipeline, "name_or_path", "")).rstrip("/").rsplit("/", 1)[-1].lower()
        return any(word in name for word in ("turbo", "schnell", "lightning", "distilled"))

    def prepare_for_training(self, peft_config=None, use_lora: bool | None = None) -> torch.nn.Module:
        if self.is_distilled:  # only training is a problem: such a model is made for sampling
            logger.warning(
                f"This {type(self.sd_pipeline).__name__} is distilled to a few steps: its velocities are made for those alone, "
                "and training wears the distillation off. Base models are the better start."
            )
        return super().prepare_for_training(peft_config, use_lora)

    @property
    def latent_dtype(self) -> torch.dtype:
        """float32: bfloat16 cannot represent the differences of the last steps."""
        return torch.float32

    # --- the schedule ------------------------------------------------------------------------------------------------

    def set_timesteps(self, num_inference_steps: int, latent_shape: tuple[int, ...] | None = None) -> list[int]:
        """
        Fix the schedule; returns t_0 > t_1 > ... as a list.

        Args:
            num_inference_steps (`int`): S.
            latent_shape (`tuple[int, ...]`, *optional*): of one latent; the model's own size by default. Schedules with a
                dynamic shift depend on it.
        """
        latent_shape = self.latent_shape() if latent_shape is None else latent_shape
        return self.step_rule.set_timesteps(num_inference_steps, **self.schedule(num_inference_steps, latent_shape))

    def schedule(self, num_inference_steps: int, latent_shape: tuple[int, ...]) -> dict:
        """Arguments of the scheduler's `set_timesteps` beside the number of steps, as the diffusers pipeline gives them."""
        sigmas = torch.linspace(1.0, 1 / num_inference_steps, num_inference_steps, dtype=torch.float64).tolist()
        return {"sigmas": sigmas, "mu": linear_mu(self.num_tokens(latent_shape), self.scheduler.config)}

    def num_tokens(self, latent_shape: tuple[int, ...]) -> int:
        """Number of image tokens the transformer sees."""
        return (latent_shape[1] // self.patch_size) * (latent_shape[2] // self.patch_size)

    # --- the denoiser ------------------------------------------------------------------------------------------------

    def predict(self, latents, timesteps, prompt_embeds: PromptEmbeds, guidance_scale: float, denoiser=None):
        """
        Guided velocity e - x_0.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`): x_t.
            timesteps (`int` or `torch.Tensor` of shape `(batch_size,)`)
            prompt_embeds ([`PromptEmbeds`]): one row per sample.
            guidance_scale (`float`): as the diffusers pipeline of the family defines it.
            denoiser (`torch.nn.Module`, *optional*): call this instead of the transformer, such as its DDP wrapper.

        Returns:
            `torch.Tensor` of the shape of `latents`, float32.
        """
        denoiser = self.denoiser if denoiser is None else denoiser
        if torch.is_tensor(timesteps):
            sigma = self.step_rule.sigma(timesteps).to(latents.device, torch.float32).expand(len(latents))
        else:  # filled on the device: copying a number there would wait for it
            sigma = torch.full((len(latents),), self.step_rule.sigma_value(timesteps), device=latents.device)
        latents = latents.to(self.compute_dtype)
        prompt_embeds = prompt_embeds.to(self.compute_dtype)
        return self.velocity(denoiser, latents, sigma, prompt_embeds, guidance_scale).float()

    def velocity(
        self, denoiser, latents: torch.Tensor, sigma: torch.Tensor, embeds: PromptEmbeds, guidance_scale: float
    ) -> torch.Tensor:
        """
        The family's call of its transformer, guidance included.

        Args:
            denoiser (`torch.nn.Module`): the transformer, or its wrapper.
            latents (`torch.Tensor` of shape `(B, C, h, w)`): x_t in the dtype of the transformer.
            sigma (`torch.Tensor` of shape `(B,)`): float32, in [0, 1].
            embeds ([`PromptEmbeds`]): B rows.
            guidance_scale (`float`): w.

        Returns:
            `torch.Tensor` of the shape of `latents`: e - x_0.
        """
        raise NotImplementedError

    # --- latents -----------------------------------------------------------------------------------------------------

    def latent_channels(self) -> int:
        """Channels of the latents; a transformer of tokens sees four of each."""
        return self.denoiser.config.in_channels // 4

    def default_latent_size(self) -> int:
        """Latent pixels per side of the model's own image size."""
        return self.sd_pipeline.default_sample_size

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        self.check_size(height, width)
        factor = self.spatial_factor
        default = self.default_latent_size()
        self.check_default_size(default, height, width)
        return (
            self.latent_channels(),
            height // factor if height else default,
            width // factor if width else default,
        )
