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

"""The Z-Image family: lists of images and captions of different length, and a time that runs from 0 (noise) to 1."""

import torch
from torch.nn.utils.rnn import pad_sequence

from .conditioning import PromptEmbeds
from .flow import SPOFlowPipeline, text_lengths, with_lengths


class SPOZImagePipeline(SPOFlowPipeline):
    """
    A Z-Image pipeline for `SPOTrainer`. As in diffusers, `guidance_scale` g means cond + g (cond - uncond): 0 switches
    guidance off, and 1 does not.

    Args:
        pipeline (`ZImagePipeline`): a diffusers pipeline; its components are used, not copied.
        use_lora (`bool`, *optional*, defaults to `True`): train adapters (True) or the whole transformer.
        sampler (`str`, *optional*, defaults to `"ddim"`): steps of rollouts, see `scheduling_flow`.
        max_sequence_length (`int`, *optional*, defaults to `512`): tokens of the text.
    """

    negative_is_optional = True
    required_components = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    unguided_scale = 0.0
    lora_target_modules = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str], negative_prompt: str | None = "", **size) -> PromptEmbeds:
        """
        Args:
            prompts (`list[str]`): B prompts.
            negative_prompt (`str`, *optional*, defaults to `""`): of the unconditional half of the guidance; `None` leaves
                it out.

        Returns:
            [`PromptEmbeds`] with token features `(B, L, dim)`, masks `(B, L)` and lengths: captions differ in length.
        """
        rows = self._encode_texts(list(prompts))
        positive = pad_sequence(rows, batch_first=True)
        lengths = [len(row) for row in rows]
        if negative_prompt is None:
            return with_lengths(positive, lengths)
        (negative,) = self._encode_texts([negative_prompt])
        return with_lengths(positive, lengths, negative[None], len(negative))

    def _encode_texts(self, texts: list[str]) -> list[torch.Tensor]:
        pipeline = self.sd_pipeline
        with self.long_prompts.announced(texts, pipeline, limit=self.max_sequence_length):
            return pipeline.encode_prompt(
                list(texts),  # diffusers writes the chat template into the list that it is given
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )[0]

    def velocity(self, denoiser, latents, sigma, embeds, guidance_scale):
        rows = _rows(embeds.prompt_embeds, embeds.prompt_mask, embeds.prompt_lengths)
        clock = 1 - sigma
        if guidance_scale <= 0:
            return self._call(denoiser, latents, clock, rows)
        self.check_negative(embeds)
        rows = rows + _rows(embeds.negative_prompt_embeds, embeds.negative_prompt_mask, embeds.negative_prompt_lengths)
        output = self._call(denoiser, torch.cat([latents, latents]), torch.cat([clock, clock]), rows)
        cond, uncond = output.chunk(2)
        return cond + guidance_scale * (cond - uncond)

    def _call(self, denoiser, latents: torch.Tensor, clock: torch.Tensor, rows: list[torch.Tensor]) -> torch.Tensor:
        images = list(latents.unsqueeze(2).unbind(0))
        outputs = denoiser(images, clock, rows, return_dict=False)[0]
        return -torch.stack([output.float() for output in outputs]).squeeze(2)  # it predicts x_0 - e

    def latent_channels(self) -> int:
        return self.denoiser.in_channels

    def default_latent_size(self) -> int:
        return 1024 // self.spatial_factor  # the pipeline's own default


def _rows(embeds: torch.Tensor, mask: torch.Tensor | None, lengths: tuple[int, ...] | None) -> list[torch.Tensor]:
    """The features that are there, row by row: the transformer takes lists."""
    return [row[:length] for row, length in zip(embeds, text_lengths(embeds, mask, lengths), strict=True)]
