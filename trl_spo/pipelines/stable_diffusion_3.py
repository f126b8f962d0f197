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

"""The Stable Diffusion 3 and 3.5 family: an MMDiT on unpacked latents, guidance in one batch."""

import torch

from .conditioning import PromptEmbeds
from .flow import TWO_STREAM_ATTENTION, SPOFlowPipeline, linear_mu


class SPOStableDiffusion3Pipeline(SPOFlowPipeline):
    """
    A Stable Diffusion 3 or 3.5 pipeline for `SPOTrainer`.

    Args:
        pipeline (`StableDiffusion3Pipeline`): a diffusers pipeline; its components are used, not copied. The T5 encoder may
            be missing, as diffusers allows: its tokens are zeros then.
        use_lora (`bool`, *optional*, defaults to `True`): train adapters (True) or the whole transformer.
        sampler (`str`, *optional*, defaults to `"ddim"`): steps of rollouts, see `scheduling_flow`.
        max_sequence_length (`int`, *optional*, defaults to `256`): tokens of the T5 encoder, as diffusers' pipeline calls
            them.
    """

    negative_is_optional = True
    required_components = (
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "scheduler",
    )
    options = ("clip_skip",)
    lora_target_modules = TWO_STREAM_ATTENTION
    max_sequence_length = 256

    @property
    def patch_size(self) -> int:
        return self.denoiser.config.patch_size

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str], negative_prompt: str | None = "", **size) -> PromptEmbeds:
        """
        Args:
            prompts (`list[str]`): B prompts, given to all text encoders.
            negative_prompt (`str`, *optional*, defaults to `""`): of the unconditional half of the guidance; `None` leaves
                it out.

        Returns:
            [`PromptEmbeds`] with token features `(B, L, dim)` and pooled features, of both halves.
        """
        positive, _, pooled, _ = self._encode_texts(list(prompts), self.clip_skip)
        if negative_prompt is None:
            return PromptEmbeds(positive, pooled_prompt_embeds=pooled)
        negative, _, negative_pooled, _ = self._encode_texts([negative_prompt])  # of the prompt alone, as in diffusers
        return PromptEmbeds(positive, negative.expand_as(positive), pooled, negative_pooled.expand_as(pooled))

    def _encode_texts(self, texts: list[str], clip_skip: int = 0):
        pipeline = self.sd_pipeline
        reader = pipeline.tokenizer
        limit = None
        if pipeline.text_encoder_3 is not None:  # T5 reads on where the CLIPs stop
            reader = pipeline.tokenizer_3
            limit = self.max_sequence_length
        with self.long_prompts.announced(texts, pipeline, reader, limit):
            return pipeline.encode_prompt(
                texts,
                None,
                None,
                device=self.device,
                do_classifier_free_guidance=False,
                clip_skip=clip_skip or None,
                max_sequence_length=self.max_sequence_length,
            )

    def velocity(self, denoiser, latents, sigma, embeds, guidance_scale):
        timestep = 1000 * sigma
        tokens = embeds.prompt_embeds
        pooled = embeds.pooled_prompt_embeds
        guided = guidance_scale > 1
        if guided:
            self.check_negative(embeds)
            latents = torch.cat([latents, latents])
            timestep = torch.cat([timestep, timestep])
            tokens = torch.cat([embeds.negative_prompt_embeds, tokens])
            pooled = torch.cat([embeds.negative_pooled_prompt_embeds, pooled])
        output = denoiser(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        if not guided:
            return output
        uncond, cond = output.float().chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    def schedule(self, num_inference_steps: int, latent_shape: tuple[int, ...]) -> dict:
        """A static shift needs nothing; a dynamic one grows with the number of tokens."""
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return {}
        # diffusers' pipeline of this family has 1.16 where those of the others have 1.15.
        return {"mu": linear_mu(self.num_tokens(latent_shape), {"max_shift": 1.16, **dict(config)})}

    def latent_channels(self) -> int:
        return self.denoiser.config.in_channels

    def default_latent_size(self) -> int:
        return self.denoiser.config.sample_size
