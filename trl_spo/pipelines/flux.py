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

"""The FLUX.1 family: packed latents, guidance embedded in the transformer (dev) or none (schnell)."""

import torch

from .conditioning import PromptEmbeds
from .flow import TWO_STREAM_ATTENTION, SPOFlowPipeline, pack, unpack


def image_ids(height: int, width: int, num_axes: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Row and column of each image token in axes 1 and 2: `(height * width, num_axes)`."""
    ids = torch.zeros(height, width, num_axes, device=device, dtype=dtype)
    ids[..., 1] = torch.arange(height, device=device, dtype=dtype)[:, None]
    ids[..., 2] = torch.arange(width, device=device, dtype=dtype)[None]
    return ids.flatten(0, 1)


class SPOFluxPipeline(SPOFlowPipeline):
    """
    A FLUX.1 pipeline for `SPOTrainer`: dev and its fine-tunes, whose transformer takes the guidance scale as an input, or
    schnell, which has no guidance at all.

    Args:
        pipeline (`FluxPipeline`): a diffusers pipeline; its components are used, not copied.
        use_lora (`bool`, *optional*, defaults to `True`): train adapters (True) or the whole transformer.
        sampler (`str`, *optional*, defaults to `"ddim"`): steps of rollouts, see `scheduling_flow`.
        max_sequence_length (`int`, *optional*, defaults to `512`): tokens of the T5 encoder (schnell: at most 256).
    """

    required_components = (
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "scheduler",
    )
    # Beside attention the feed-forward layers of both streams, as diffusers' training script and Flow-GRPO have it.
    lora_target_modules = (
        *TWO_STREAM_ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"
    )  # fmt: skip
    takes_guidance = True

    @property
    def is_distilled(self) -> bool:
        return not self.denoiser.config.guidance_embeds or super().is_distilled

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str], negative_prompt: str = "", **size) -> PromptEmbeds:
        """
        Args:
            prompts (`list[str]`): B prompts, given to both text encoders.
            negative_prompt (`str`, *optional*, defaults to `""`): must be empty.

        Returns:
            [`PromptEmbeds`] with T5's token features `(B, L, dim)` and CLIP's pooled features.

        Raises:
            ValueError: for a negative prompt: the guidance of FLUX is an input of its transformer and has no
                unconditional half.
        """
        self.check_negative_prompt(negative_prompt)
        texts = list(prompts)
        pipeline = self.sd_pipeline
        with self.long_prompts.announced(texts, pipeline, pipeline.tokenizer_2, self.max_sequence_length):
            tokens, pooled, _ = pipeline.encode_prompt(
                texts, None, device=self.device, max_sequence_length=self.max_sequence_length
            )
        return PromptEmbeds(tokens, pooled_prompt_embeds=pooled)

    def check_negative_prompt(self, negative_prompt: str) -> None:
        if negative_prompt:
            raise ValueError(
                "FLUX.1 has its guidance embedded and no unconditional half, so a `negative_prompt` has no effect; leave it "
                f"empty, got {negative_prompt!r}."
            )

    def velocity(self, denoiser, latents, sigma, embeds, guidance_scale):
        height, width = latents.shape[-2:]
        tokens = embeds.prompt_embeds
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full((len(latents),), float(guidance_scale), device=latents.device)
        output = denoiser(
            hidden_states=pack(latents),
            timestep=sigma,
            guidance=guidance,
            pooled_projections=embeds.pooled_prompt_embeds,
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros(tokens.shape[1], 3, device=tokens.device, dtype=tokens.dtype),
            img_ids=image_ids(height // 2, width // 2, 3, latents.device, latents.dtype),
            return_dict=False,
        )[0]
        return unpack(output, height, width)
