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
The Stable Diffusion XL family: two text encoders, size conditioning and the precision of the VAE. Everything else is shared
with [`SPOStableDiffusionPipeline`].
"""

import copy

import torch

from .conditioning import PromptEmbeds
from .stable_diffusion import SPOStableDiffusionPipeline


class SPOStableDiffusionXLPipeline(SPOStableDiffusionPipeline):
    """
    A Stable Diffusion XL pipeline for `SPOTrainer`: two text encoders, pooled embeddings and size conditioning.

    Args:
        pipeline (`StableDiffusionXLPipeline`): a diffusers pipeline; its components are used, not copied. For half
            precision load it with a VAE that survives it, such as `madebyollin/sdxl-vae-fp16-fix`; otherwise the VAE
            is copied in float32 (`vae.config.force_upcast`).
        use_lora (`bool`, *optional*, defaults to `True`): train adapters (True) or the whole UNet.
    """

    required_components = ("unet", "vae", "text_encoder_2", "tokenizer_2", "scheduler")
    vae_statistics = ("latents_mean", "latents_std")
    accepted_embeddings = {"addition_embed_type": ("text_time",)}

    def __init__(self, pipeline, use_lora: bool = True):
        super().__init__(pipeline, use_lora=use_lora)
        # diffusers casts the VAE for every image and back again; ours decodes all the time, and the user's stays as it is.
        self._float32_vae = None
        own = self.sd_pipeline.vae
        if own.config.force_upcast and own.dtype == torch.float16:
            self._float32_vae = copy.deepcopy(own).float()

    @property
    def vae(self) -> torch.nn.Module:
        """The VAE that encodes and decodes: a copy in float32 of one that does not survive float16."""
        return self.sd_pipeline.vae if self._float32_vae is None else self._float32_vae

    def frozen_modules(self) -> dict[str, torch.nn.Module]:
        copied = {} if self._float32_vae is None else {"vae_float32": self._float32_vae}
        return super().frozen_modules() | copied

    def _check_networks(self) -> None:
        super()._check_networks()
        unet = self.unet.config
        pooled = self.sd_pipeline.text_encoder_2.config.projection_dim
        expected = unet.projection_class_embeddings_input_dim
        if 6 * unet.addition_time_embed_dim + pooled != expected:
            refiner = getattr(self.sd_pipeline.config, "requires_aesthetics_score", False) or (
                5 * unet.addition_time_embed_dim + pooled == expected
            )
            raise ValueError(
                f"The UNet takes {expected} numbers of conditioning beside the text; SDXL's base model has six for the "
                f"size of the image ({6 * unet.addition_time_embed_dim}) and the pooled text ({pooled})."
                + (" This looks like the SDXL refiner, which takes images; train the base model." if refiner else "")
            )

    def _text_width(self) -> int:
        encoders = (self.sd_pipeline.text_encoder, self.sd_pipeline.text_encoder_2)
        return sum(encoder.config.hidden_size for encoder in encoders if encoder is not None)

    @torch.no_grad()
    def encode_prompt(
        self, prompts: list[str], negative_prompt: str | None = "", height: int | None = None, width: int | None = None
    ) -> PromptEmbeds:
        """
        Args:
            prompts (`list[str]`): B prompts, given to both text encoders.
            negative_prompt (`str`, *optional*, defaults to `""`): as in diffusers, the empty prompt is a zero
                embedding where the pipeline says so (`force_zeros_for_empty_prompt`). `None` leaves the negative half out.
            height, width (`int`, *optional*): image size in pixels, for the size conditioning.

        Returns:
            [`PromptEmbeds`] with all fields set.
        """
        positive, _, pooled, _ = self._encode_both(list(prompts), None, self.clip_skip)
        _, latent_height, latent_width = self.latent_shape(height, width)
        factor = self.spatial_factor
        size = (latent_height * factor, latent_width * factor)
        time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=positive.dtype, device=positive.device)
        time_ids = time_ids.expand(len(positive), -1)
        if negative_prompt is None:
            return PromptEmbeds(positive, pooled_prompt_embeds=pooled, add_time_ids=time_ids)
        _, negative, _, negative_pooled = self._encode_both([""], negative_prompt or None)
        return PromptEmbeds(
            positive,
            negative.expand_as(positive),
            pooled,
            negative_pooled.expand_as(pooled),
            time_ids,
        )

    def _encode_both(self, prompts: list[str], negative_prompt: str | None, clip_skip: int = 0):
        """diffusers' own encoding: (prompt, negative, pooled, negative pooled) embeddings."""
        with self.long_prompts.announced([*prompts, negative_prompt or ""], self.sd_pipeline):
            return self.sd_pipeline.encode_prompt(
                prompts,
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
                negative_prompt=None if negative_prompt is None else [negative_prompt] * len(prompts),
                clip_skip=clip_skip or None,
            )

    def _conditioning(self, embeds: PromptEmbeds, negative: bool) -> dict:
        pooled = embeds.negative_pooled_prompt_embeds if negative else embeds.pooled_prompt_embeds
        return {
            **super()._conditioning(embeds, negative),
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": embeds.add_time_ids},
        }
