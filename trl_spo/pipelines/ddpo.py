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
Implement TRL's DDPO interface for the families that TRL's `DDPOTrainer` can train (TRL <= 0.23.1): those with a UNet.

The classes are TRL's own where TRL has them. Elsewhere the definitions below, with the same names and members, take
their place, so that code which was written for the interface keeps working.
"""

import contextlib
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..hub_files import load_denoiser
from ..step_distribution import gaussian_log_prob
from .adapters import require_no_adapters
from .conditioning import PromptEmbeds


try:  # TRL <= 0.23.1
    from trl.models.modeling_sd_base import DDPOPipelineOutput, DDPOSchedulerOutput, DDPOStableDiffusionPipeline
except ImportError:

    @dataclass
    class DDPOPipelineOutput:
        """
        Output of a DDPO pipeline call.

        Attributes:
            images (`torch.Tensor`, `np.ndarray` or list of `PIL.Image.Image`): generated images.
            latents (list of `torch.Tensor`): x_T, ..., x_0, each `(batch_size, channels, height, width)`.
            log_probs (list of `torch.Tensor`): one `(batch_size,)` tensor per step.
        """

        images: Any
        latents: list
        log_probs: list

    @dataclass
    class DDPOSchedulerOutput:
        """
        Output of one DDPO scheduler step.

        Attributes:
            latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`): x_{t-1}.
            log_probs (`torch.Tensor` of shape `(batch_size,)`): its log-probability, mean over dimensions.
        """

        latents: torch.Tensor
        log_probs: torch.Tensor

    class DDPOStableDiffusionPipeline:
        """The interface TRL's `DDPOTrainer` trains against (TRL <= 0.23.1): read-only components, and methods."""

        def _missing(self, *args, **kwargs):
            raise NotImplementedError(f"`{type(self).__name__}` does not offer this member of the DDPO interface.")

        unet = vae = tokenizer = text_encoder = scheduler = autocast = property(_missing)
        __call__ = scheduler_step = set_progress_bar_config = save_pretrained = _missing
        get_trainable_layers = save_checkpoint = load_checkpoint = _missing


class DDPOMembers(DDPOStableDiffusionPipeline):
    """
    The members of TRL's DDPO interface for an [`SPOPipeline`]. List it before [`SPOPipeline`] in the bases:
    `class SPOStableDiffusionPipeline(DDPOMembers, SPOPipeline)`.
    """

    # --- components, as the interface names them ---------------------------------------------------------------------

    @property
    def unet(self):
        return self.sd_pipeline.unet

    @property
    def vae(self):
        return self.sd_pipeline.vae

    @property
    def tokenizer(self):
        return self.sd_pipeline.tokenizer

    @property
    def text_encoder(self):
        return self.sd_pipeline.text_encoder

    @property
    def scheduler(self):
        return self.step_rule.scheduler

    @property
    def autocast(self):
        return contextlib.nullcontext if self.use_lora else None

    # --- what the trainer calls --------------------------------------------------------------------------------------

    def set_progress_bar_config(self, *args, **kwargs):
        self.sd_pipeline.set_progress_bar_config(*args, **kwargs)

    def get_trainable_layers(self) -> torch.nn.Module:
        """The module that is trained, with the adapter added and everything else frozen."""
        self.freeze()
        if self.use_lora:
            return self.add_lora()
        require_no_adapters(self.denoiser, self.denoiser_name)
        return self.denoiser.requires_grad_(True)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str = "",
        eta: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        height: int | None = None,
        width: int | None = None,
    ) -> DDPOPipelineOutput:
        """
        Sample and keep what policy-gradient trainers need: every latent and its log-probability.

        Returns:
            [`DDPOPipelineOutput`]: images in `output_type` ("pil", "np", "pt" in [0, 1], or "latent"), S + 1 latents
            and S log-probabilities.

        Raises:
            ValueError: without a prompt or embeddings, or for a deterministic step, which has no log-probability.
        """
        # The text comes as prompts or as embeddings.
        if prompt is None and prompt_embeds is None:
            raise ValueError("Pass either `prompt` or `prompt_embeds`.")
        if prompt_embeds is None:
            embeds = self.encode_prompt([prompt] if isinstance(prompt, str) else prompt, negative_prompt)
        else:
            embeds = PromptEmbeds(prompt_embeds, negative_prompt_embeds)

        # Sample, and keep every latent with its log-probability for the policy gradient.
        timesteps = self.set_timesteps(num_inference_steps)
        latents = [self.prepare_latents(len(embeds), generator, height, width)]
        log_probs = []
        for timestep in timesteps:
            model_output = self.predict(latents[-1], timestep, embeds, guidance_scale)
            step = self.scheduler_step(model_output, timestep, latents[-1], eta, generator=generator)
            latents.append(step.latents)
            log_probs.append(step.log_probs)

        # Decode the last latent, unless the caller wants it as it is.
        if output_type == "latent":
            return DDPOPipelineOutput(latents[-1], latents, log_probs)
        images = self.sd_pipeline.image_processor.postprocess(
            self.decode_latents(latents[-1]), output_type=output_type
        )
        return DDPOPipelineOutput(images, latents, log_probs)

    def scheduler_step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prev_sample: torch.Tensor | None = None,
    ) -> DDPOSchedulerOutput:
        """Sample x_{t-1} (or take `prev_sample`) and its log-probability `(batch_size,)`."""
        if prev_sample is not None and generator is not None:
            raise ValueError("Pass either `generator` (to sample) or `prev_sample` (to score it), not both.")
        mean, std, _ = self.step_distribution(model_output, timestep, sample, eta)
        if prev_sample is None:
            noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            prev_sample = (mean + std * noise).to(sample.dtype)
        return DDPOSchedulerOutput(prev_sample, gaussian_log_prob(prev_sample, mean, std))

    def save_pretrained(self, output_dir: str | Path) -> None:
        """The base pipeline and, if there is an adapter, its file beside it; both load in plain diffusers."""
        trained = self.denoiser
        if not getattr(trained, "peft_config", None):
            self.sd_pipeline.save_pretrained(output_dir)
            return
        self.save_lora(output_dir)
        base = copy.deepcopy(trained)  # weights under an adapter carry other names; save them without it
        base.unload_lora()
        self.sd_pipeline.register_modules(**{self.denoiser_name: base})
        try:
            self.sd_pipeline.save_pretrained(output_dir)
        finally:
            self.sd_pipeline.register_modules(**{self.denoiser_name: trained})

    def save_checkpoint(self, models: list, weights: list, output_dir: str | Path) -> None:
        """Hook of accelerate's `save_state`, in DDPO."""
        if self.use_lora:
            self.save_lora(output_dir)
        else:
            models[0].save_pretrained(Path(output_dir) / self.denoiser_name)

    def load_checkpoint(self, models: list, input_dir: str | Path) -> None:
        """Hook of accelerate's `load_state`, in DDPO."""
        if self.use_lora:
            self.load_lora(input_dir)
        else:
            loaded = load_denoiser(type(self.denoiser), input_dir, self.denoiser_name)
            models[0].load_state_dict(loaded.state_dict())
