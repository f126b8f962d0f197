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
The Stable Diffusion 1 and 2 family: a UNet on VAE latents, stochastic DDIM steps, classifier-free guidance.

[`SPOStableDiffusionPipeline`] wraps a diffusers pipeline and never changes the user's scheduler: its step rule keeps a
`DDIMScheduler` of its own, built from the pipeline's configuration. It also offers the interface of TRL's
`DDPOStableDiffusionPipeline`, so that the same object trains with TRL's `DDPOTrainer` (TRL <= 0.23.1).
"""

import contextlib
from collections.abc import Iterator

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from ..scheduling_ddim import DDIMStepRule
from .base import SPOPipeline
from .components import check_vae_statistics
from .conditioning import LongPrompts, PromptEmbeds
from .ddpo import DDPOMembers


@contextlib.contextmanager
def without_last_layers(text_encoder: torch.nn.Module, count: int) -> Iterator[None]:
    """
    A CLIP text encoder that ends `count` layers earlier, with its final norm: what `clip_skip` of diffusers' pipeline means.
    That looks for the norm where transformers 5 does not have it any more (diffusers 0.42).
    """
    if not count:
        yield
        return
    body = getattr(text_encoder, "text_model", text_encoder).encoder
    layers = body.layers
    body.layers = layers[: len(layers) - count]
    try:
        yield
    finally:
        body.layers = layers


class SPOStableDiffusionPipeline(DDPOMembers, SPOPipeline):
    """
    A Stable Diffusion pipeline for `SPOTrainer` and for TRL's `DDPOTrainer`.

    Args:
        pipeline (`StableDiffusionPipeline`): a diffusers pipeline; its components are used, not copied.
        use_lora (`bool`, *optional*, defaults to `True`): train adapters (True) or the whole UNet.

    Attributes:
        sd_pipeline: the wrapped diffusers pipeline.
        step_rule ([`DDIMStepRule`]): the sampler of rollouts.
        scheduler ([`~diffusers.DDIMScheduler`]): that of the step rule; independent of `sd_pipeline.scheduler`.

    Raises:
        ValueError: if a component is missing or does not fit the others, the scheduler cannot be stochastic, the UNet
            takes other inputs than latents and text (inpainting models, class labels), or weights are not loaded.
    """

    denoiser_name = "unet"
    options = ("guidance_rescale", "clip_skip")
    vae_statistics: tuple[str, ...] = ()  # of the VAE's configuration, read beside `scaling_factor`
    negative_is_optional = True
    required_components = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    accepted_embeddings = {"addition_embed_type": (None, "text"), "encoder_hid_dim_type": (None, "text_proj")}

    def __init__(self, pipeline, use_lora: bool = True):
        super().__init__(pipeline, use_lora)
        self.step_rule = DDIMStepRule(pipeline.scheduler)
        self.long_prompts = LongPrompts()
        in_channels = self.unet.config.in_channels
        latent_channels = self.sd_pipeline.vae.config.latent_channels
        if in_channels != latent_channels:
            raise ValueError(
                f"The UNet takes {in_channels} input channels and the VAE has {latent_channels} latent channels. SPO "
                "trains text-to-image UNets; inpainting and image-conditioned ones are not supported."
            )
        self._check_networks()
        check_vae_statistics(self.sd_pipeline.vae, self.vae_statistics)

    def _check_networks(self) -> None:
        """Check that the components fit each other, and that latents and text are all that the UNet takes."""
        config = self.unet.config
        if config.out_channels != config.in_channels:
            raise ValueError(
                f"The UNet makes {config.out_channels} channels of {config.in_channels}. SPO needs a prediction in the "
                "shape of the latents; models that also learn the variance are not supported."
            )

        # Each of these settings is a further input of the UNet, which SPO would not give it.
        extra = {
            "class_embed_type": config.class_embed_type,
            "num_class_embeds": config.num_class_embeds,
            "addition_embed_type": config.addition_embed_type,
            "encoder_hid_dim_type": config.encoder_hid_dim_type,
            "time_cond_proj_dim": config.time_cond_proj_dim,  # LCM's: the guidance scale is an input of the UNet
        }
        for name, value in extra.items():
            accepted = self.accepted_embeddings.get(name, (None,))
            if value not in accepted:
                raise ValueError(
                    f"The UNet has `{name}={value!r}`, but SPO conditions it on "
                    f"{' or '.join(map(repr, accepted))} there: on the prompt"
                    + (" and the size of the image" if "text_time" in accepted else "")
                    + ", not on classes, images or guidance. Pass a plain text-to-image UNet"
                    + ("; one of SDXL belongs into a `StableDiffusionXLPipeline`." if value == "text_time" else ".")
                )

        # A text encoder of another model would be refused by the UNet only when it runs.
        width = self._text_width()
        expected = config.cross_attention_dim
        if config.encoder_hid_dim is None and isinstance(expected, int) and width != expected:
            raise ValueError(
                f"The text encoder gives features of size {width} and the UNet takes {expected} "
                "(`cross_attention_dim`). Take both from the same model."
            )

    def _text_width(self) -> int:
        """Size of the text features that the UNet attends to."""
        return self.text_encoder.config.hidden_size

    # --- conditioning ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str], negative_prompt: str | None = "", **size) -> PromptEmbeds:
        """
        Args:
            prompts (`list[str]`): B prompts.
            negative_prompt (`str`, *optional*, defaults to `""`): encoded once and shared by all prompts; `None`
                leaves the negative half out.

        Returns:
            [`PromptEmbeds`] with `prompt_embeds` and `negative_prompt_embeds` of shape `(B, sequence_length, dim)`.
        """
        positive = self._encode_text(list(prompts), self.clip_skip)
        if negative_prompt is None:
            return PromptEmbeds(positive)
        negative = self._encode_text([negative_prompt])  # diffusers skips layers of the prompt alone
        return PromptEmbeds(positive, negative.expand_as(positive))

    def _encode_text(self, texts: list[str], clip_skip: int = 0) -> torch.Tensor:
        with self.long_prompts.announced(texts, self.sd_pipeline), without_last_layers(self.text_encoder, clip_skip):
            return self.sd_pipeline.encode_prompt(texts, self.device, 1, do_classifier_free_guidance=False)[0]

    def _conditioning(self, embeds: PromptEmbeds, negative: bool) -> dict:
        """Keyword arguments of the UNet for the negative or the positive half of guidance."""
        return {"encoder_hidden_states": embeds.negative_prompt_embeds if negative else embeds.prompt_embeds}

    # --- the denoiser ------------------------------------------------------------------------------------------------

    def predict(self, latents, timesteps, prompt_embeds, guidance_scale: float, denoiser=None) -> torch.Tensor:
        r"""
        Guided noise (or x_0, or v) prediction: uncond + w (cond - uncond). With w <= 1 there is no guidance and only
        the conditional half is evaluated, as in diffusers; so is `guidance_rescale`, see [`SPOPipeline.configure`].

        Args:
            latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`): x_t.
            timesteps (`int` or `torch.Tensor` of shape `(batch_size,)`)
            prompt_embeds ([`PromptEmbeds`]): one row per sample.
            guidance_scale (`float`): w.
            denoiser (`torch.nn.Module`, *optional*): call this instead of the UNet, such as its DDP wrapper.

        Returns:
            `torch.Tensor` of the shape of `latents`, float32.
        """
        denoiser = self.denoiser if denoiser is None else denoiser
        latents = latents.to(self.compute_dtype)
        if not torch.is_tensor(timesteps):  # filled on the device: copying a number there would wait for it
            timesteps = torch.full((len(latents),), timesteps, device=latents.device)
        timesteps = timesteps.to(latents.device).expand(len(latents))
        prompt_embeds = prompt_embeds.to(self.compute_dtype)
        conditioning = self._conditioning(prompt_embeds, negative=False)
        if guidance_scale <= 1:
            return denoiser(latents, timesteps, **conditioning, return_dict=False)[0].float()
        self.check_negative(prompt_embeds)
        conditioning = _cat_conditioning(self._conditioning(prompt_embeds, negative=True), conditioning)
        output = denoiser(torch.cat([latents, latents]), timesteps.repeat(2), **conditioning, return_dict=False)[0]
        uncond, cond = output.float().chunk(2)
        guided = uncond + guidance_scale * (cond - uncond)
        return rescale_noise_cfg(guided, cond, self.guidance_rescale) if self.guidance_rescale else guided

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        unet = self.unet.config
        factor = self.spatial_factor
        sample_size = unet.sample_size
        self.check_default_size(sample_size, height, width)
        default = sample_size if isinstance(sample_size, (list, tuple)) else (sample_size, sample_size)
        self.check_size(height, width)
        return (
            unet.in_channels,
            height // factor if height else default[0],
            width // factor if width else default[1],
        )


def _cat_conditioning(first: dict, second: dict) -> dict:
    """Concatenate two (possibly nested) dictionaries of tensors along the batch dimension."""
    joined = {}
    for key, value in first.items():
        if isinstance(value, dict):
            joined[key] = _cat_conditioning(value, second[key])
        else:
            joined[key] = torch.cat([value, second[key]])
    return joined
