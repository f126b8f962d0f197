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

"""The FLUX.2 klein family: patches normalised by the VAE's batch norm, guidance by two calls."""

import torch
import torch.nn.functional as F

from .autoencoder import own_precision, shrink_latents
from .conditioning import PromptEmbeds
from .flow import TWO_STREAM_ATTENTION, SPOFlowPipeline


def position_ids(height: int, width: int, length: int, batch_size: int, device: torch.device) -> torch.Tensor:
    """Positions of tokens on the axes (time, row, column, place in the text): `(batch_size, tokens, 4)`."""
    sizes = (1, height, width, length)
    axes = [torch.arange(size, device=device) for size in sizes]  # made on the device: there is no copy to wait for
    ids = torch.cartesian_prod(*axes)
    return ids.expand(batch_size, -1, -1)


class SPOFlux2KleinPipeline(SPOFlowPipeline):
    """
    A FLUX.2 klein pipeline for `SPOTrainer`. Base checkpoints are guided by the empty prompt in a second call; distilled
    ones have no guidance.

    Latents are `(B, 4 C, h/2, w/2)` for a VAE of C channels: its patches of 2 x 2, normalised by the running statistics of
    the VAE's batch norm, which is the scale of the denoiser.

    Args:
        pipeline (`Flux2KleinPipeline`): a diffusers pipeline; its components are used, not copied.
        use_lora (`bool`, *optional*, defaults to `True`): train adapters (True) or the whole transformer.
        sampler (`str`, *optional*, defaults to `"ddim"`): steps of rollouts, see `scheduling_flow`.
        max_sequence_length (`int`, *optional*, defaults to `512`): tokens of the text.
        text_encoder_out_layers (`tuple[int, ...]`, *optional*): layers of the text encoder whose outputs are stacked. By
            default those at one, two and three quarters, which are (9, 18, 27) of the published encoders with 36 layers.
    """

    negative_is_optional = True
    required_components = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    # Attention of both kinds of blocks; in single blocks one projection makes queries, keys, values and the MLP's input, and
    # `__init__` adds the one behind it, as diffusers' training script and Flow-Factory have it.
    lora_target_modules = (*TWO_STREAM_ATTENTION, "to_qkv_mlp_proj")
    channels_per_patch = 4
    patch_size = 1  # patches are pixels of the latents already

    def __init__(
        self,
        pipeline,
        use_lora: bool = True,
        sampler: str = "ddim",
        max_sequence_length: int | None = None,
        text_encoder_out_layers: tuple[int, ...] | None = None,
    ):
        super().__init__(pipeline, use_lora, sampler, max_sequence_length)
        num_layers = self.sd_pipeline.text_encoder.config.num_hidden_layers
        quarters = tuple(num_layers * quarter // 4 for quarter in (1, 2, 3))
        self.text_encoder_out_layers = tuple(text_encoder_out_layers or quarters)
        # By their full names: "attn.to_out" would mean the double blocks, too, where it is a list of layers.
        blocks = range(len(self.denoiser.single_transformer_blocks))
        outputs = (f"single_transformer_blocks.{block}.attn.to_out" for block in blocks)
        self.lora_target_modules = (*self.lora_target_modules, *outputs)

    @property
    def is_distilled(self) -> bool:
        return bool(self.sd_pipeline.config.is_distilled)

    def _check_networks(self) -> None:
        if not hasattr(self.vae, "bn"):
            raise ValueError(
                "FLUX.2 normalises latents by the batch norm of its VAE, and this one has none. Load the VAE of the "
                f"checkpoint (`AutoencoderKLFlux2`), got `{type(self.vae).__name__}`."
            )

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str], negative_prompt: str | None = "", **size) -> PromptEmbeds:
        """
        Args:
            prompts (`list[str]`): B prompts.
            negative_prompt (`str`, *optional*, defaults to `""`): of the unconditional call; the published models know the
                empty one. `None` leaves that half out.

        Returns:
            [`PromptEmbeds`] with token features `(B, L, dim)` of both.
        """
        positive = self._encode_texts(list(prompts))
        if negative_prompt is None:
            return PromptEmbeds(positive)
        negative = self._encode_texts([negative_prompt])
        return PromptEmbeds(positive, negative.expand_as(positive))

    def _encode_texts(self, texts: list[str]) -> torch.Tensor:
        pipeline = self.sd_pipeline
        with self.long_prompts.announced(texts, pipeline, limit=self.max_sequence_length):
            return pipeline.encode_prompt(
                prompt=texts,
                device=self.device,
                max_sequence_length=self.max_sequence_length,
                text_encoder_out_layers=self.text_encoder_out_layers,
            )[0]

    def velocity(self, denoiser, latents, sigma, embeds, guidance_scale):
        cond = self._call(denoiser, latents, sigma, embeds.prompt_embeds)
        if guidance_scale <= 1 or self.is_distilled:
            return cond
        self.check_negative(embeds)
        uncond = self._call(denoiser, latents, sigma, embeds.negative_prompt_embeds).float()
        return uncond + guidance_scale * (cond.float() - uncond)

    def _call(self, denoiser, latents: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        batch_size, _, height, width = latents.shape
        output = denoiser(
            hidden_states=latents.flatten(2).transpose(1, 2),
            timestep=sigma,
            guidance=None,
            encoder_hidden_states=tokens,
            txt_ids=position_ids(1, 1, tokens.shape[1], batch_size, latents.device),
            img_ids=position_ids(height, width, 1, batch_size, latents.device),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).unflatten(2, (height, width))

    def schedule(self, num_inference_steps: int, latent_shape: tuple[int, ...]) -> dict:
        """The shift that was fitted for FLUX.2, in the number of tokens and of steps."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        settings = super().schedule(num_inference_steps, latent_shape)
        return {**settings, "mu": compute_empirical_mu(self.num_tokens(latent_shape), num_inference_steps)}

    # --- latents and images ------------------------------------------------------------------------------------------

    @property
    def spatial_factor(self) -> int:
        return 2 * self.sd_pipeline.vae_scale_factor

    def latent_channels(self) -> int:
        return self.denoiser.config.in_channels

    def default_latent_size(self) -> int:
        return self.sd_pipeline.default_sample_size // 2

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's patches, `(1, 4 C, 1, 1)`."""
        mean = self.vae.bn.running_mean.view(1, -1, 1, 1).to(like)
        std = (self.vae.bn.running_var.view(1, -1, 1, 1) + self.vae.config.batch_norm_eps).sqrt().to(like)
        return mean, std

    def vae_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The scale of the denoiser `(B, 4 C, h/2, w/2)` -> what the VAE decodes, `(B, C, h, w)`."""
        mean, std = self._statistics(latents)
        return F.pixel_shuffle(latents * std + mean, 2)

    def vae_encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """diffusers encodes images to the mode of the posterior here, and so do we: the standard deviation is 0."""
        with own_precision(self.vae):
            mode = self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist.mode()
        patches = F.pixel_unshuffle(mode.float(), 2)
        mean, std = self._statistics(patches)
        normalised = (patches - mean) / std
        return normalised, torch.zeros_like(normalised)

    def vae_decode(self, vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
        return _decode(vae, self.vae_latents(latents.float()))

    @torch.no_grad()
    def decode_for_scoring(self, latents: torch.Tensor, image_size: int | None = None) -> torch.Tensor:
        """See [`SPOPipeline.decode_for_scoring`]. Patches cannot be interpolated; the latents of the VAE can."""
        vae = self.vae if self.scoring_vae is None else self.scoring_vae
        small = shrink_latents(self.vae_latents(latents.float()), image_size, self.sd_pipeline.vae_scale_factor)
        return _decode(vae, small)


def _decode(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Images `(B, 3, H, W)` of what the VAE itself makes, `(B, C, h, w)`."""
    with own_precision(vae):
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
