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

"""The Qwen-Image family: masked text, guidance that keeps the norm, a video autoencoder with one frame."""

from typing import Any

import torch

from .autoencoder import own_precision, scale_and_shift
from .conditioning import PromptEmbeds
from .flow import TWO_STREAM_ATTENTION, SPOFlowPipeline, pack, text_lengths, unpack, with_lengths


class SPOQwenImagePipeline(SPOFlowPipeline):
    """
    A Qwen-Image pipeline for `SPOTrainer`. `guidance_scale` is what diffusers calls `true_cfg_scale`; the guided
    prediction is scaled back to the norm of the conditional one, token by token.

    Args:
        pipeline (`QwenImagePipeline`): a diffusers pipeline; its components are used, not copied.
        use_lora (`bool`, *optional*, defaults to `True`): train adapters (True) or the whole transformer.
        sampler (`str`, *optional*, defaults to `"ddim"`): steps of rollouts, see `scheduling_flow`.
        max_sequence_length (`int`, *optional*, defaults to `512`): tokens of the text.
    """

    negative_is_optional = True
    required_components = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    lora_target_modules = TWO_STREAM_ATTENTION
    vae_statistics = ("latents_mean", "latents_std")

    def _check_networks(self) -> None:
        for name in ("latents_mean", "latents_std"):
            if getattr(self.vae.config, name, None) is None:
                raise ValueError(
                    f"The VAE has no `{name}` in its configuration, and Qwen-Image scales latents with it. Load the VAE of "
                    "the checkpoint."
                )

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str], negative_prompt: str | None = " ", **size) -> PromptEmbeds:
        """
        Args:
            prompts (`list[str]`): B prompts.
            negative_prompt (`str`, *optional*, defaults to `" "`): of the unconditional call; the published model is used
                with a space, which stands for the empty prompt, too. `None` leaves that half out.

        Returns:
            [`PromptEmbeds`] with token features `(B, L, dim)`, masks `(B, L)` and lengths: prompts differ in length.
        """
        positive, lengths = self._encode_texts(list(prompts))
        if negative_prompt is None:
            return with_lengths(positive, lengths)
        negative, (length,) = self._encode_texts([negative_prompt or " "])
        return with_lengths(positive, lengths, negative, length)

    def _encode_texts(self, texts: list[str]) -> tuple[torch.Tensor, list[int]]:
        pipeline = self.sd_pipeline
        with self.long_prompts.announced(texts, pipeline, limit=self.max_sequence_length):
            tokens, mask = pipeline.encode_prompt(
                texts, device=self.device, max_sequence_length=self.max_sequence_length
            )
        return tokens, text_lengths(tokens, mask)  # without a mask all rows have the same length

    def call_arguments(self, guidance_scale: float, negative_prompt: str = "") -> dict[str, Any]:
        """diffusers' `guidance_scale` is for distilled models here, and without a negative prompt there is no guidance."""
        return {"true_cfg_scale": guidance_scale, "negative_prompt": negative_prompt or " "}

    def velocity(self, denoiser, latents, sigma, embeds, guidance_scale):
        height, width = latents.shape[-2:]
        tokens = pack(latents)
        text = _cut(embeds.prompt_embeds, embeds.prompt_mask, embeds.prompt_lengths)
        cond = self._call(denoiser, tokens, sigma, *text, height, width)
        if guidance_scale > 1:
            self.check_negative(embeds)
            text = _cut(embeds.negative_prompt_embeds, embeds.negative_prompt_mask, embeds.negative_prompt_lengths)
            uncond = self._call(denoiser, tokens, sigma, *text, height, width).float()
            cond = cond.float()
            guided = uncond + guidance_scale * (cond - uncond)
            # Guidance may turn a token's prediction but not lengthen it. Where the guided one is 0 it stays 0.
            length = guided.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            cond = guided * (cond.norm(dim=-1, keepdim=True) / length)
        return unpack(cond, height, width)

    def _call(self, denoiser, tokens, sigma, text, mask, height: int, width: int) -> torch.Tensor:
        return denoiser(
            hidden_states=tokens,
            timestep=sigma,
            guidance=None,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(tokens),
            return_dict=False,
        )[0]

    # --- latents and images: the VAE is one of videos, an image is its only frame -----------------------------------

    def vae_encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with own_precision(self.vae):
            posterior = self.vae.encode(images.to(self.device, self.vae.dtype).unsqueeze(2)).latent_dist
        scale, shift = scale_and_shift(self.vae, self.device)
        return (posterior.mean.squeeze(2).float() - shift) * scale, posterior.std.squeeze(2).float() * scale

    def vae_decode(self, vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
        scale, shift = scale_and_shift(vae, latents.device)
        with own_precision(vae):
            frames = (latents.float() / scale + shift).to(vae.dtype).unsqueeze(2)
            return vae.decode(frames, return_dict=False)[0][:, :, 0].float()


def _cut(
    text: torch.Tensor, mask: torch.Tensor | None, lengths: tuple[int, ...] | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Text as long as the longest row, and its mask only where lengths differ, as diffusers' pipeline gives them: attention
    without a mask is faster, and with one diffusers' transformer copies a number to the device, for which the host waits.
    """
    if lengths is None or mask is None:
        return text, mask
    longest = max(lengths)
    return text[:, :longest], None if min(lengths) == longest else mask[:, :longest]
