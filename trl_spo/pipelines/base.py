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
The contract of a pipeline, [`SPOPipeline`]: what SPO asks of every model family.

Rollout, loss and trainers know no scheduler, no UNet and no noise parametrisation. They ask a pipeline for the *step
distribution* of x_{t-1} given x_t (mean, standard deviation, predicted x_0), and the pipeline asks its step rule. A new
model family is one module with a subclass of [`SPOPipeline`] and one line in the table of `pipelines.auto`.
"""

import contextlib
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig, PeftConfig

from ..hub_files import load_diffusers_pipeline
from ..step_distribution import StepDistribution, StepRule
from .adapters import (
    add_lora,
    load_lora,
    require_no_adapters,
    save_lora,
    takes_channels_last,
)
from .autoencoder import decode, encode, shrink_latents
from .components import check_network, plain_pipeline
from .conditioning import PromptEmbeds
from .denoiser import (
    DenoiserForTraining,
    compute_dtype_of,
    default_lora_config,
    keep_weights_of_convolutions,
    takes_any_precision,
)


class SPOPipeline:
    """
    A diffusion pipeline that can be rolled out and trained step by step.

    A family implements the methods that raise below: the text it is conditioned on, the shape of its latents, and its
    guided prediction. Adapters, VAE and sampler are shared. Shapes: latents `(batch_size, channels, height, width)` in
    the scale the denoiser sees, whatever the denoiser makes of them inside `predict`; images
    `(batch_size, 3, height, width)` in [-1, 1]; timesteps int64.

    Args:
        pipeline: a diffusers pipeline; its components are used, not copied.
        use_lora (`bool`, *optional*, defaults to `True`): train adapters (True) or the whole denoiser.

    Attributes:
        sd_pipeline: the diffusers pipeline, without wrappers such as `torch.compile` around its networks.
        step_rule ([`StepRule`]): what the sampler does in a step; set by subclasses.
        use_lora (`bool`): whether an adapter is trained.
        scoring_vae (`torch.nn.Module`, *optional*): decodes for the reward instead of the pipeline's VAE.
        offload_text_encoders (`bool`): whether text encoders are on the device only while they encode.
        guidance_rescale (`float`), clip_skip (`int`): arguments of the same names of the family's diffusers pipeline; see
            [`SPOPipeline.configure`].

    Raises:
        ValueError: if a component is missing, or a network is one that [`plain_pipeline`] refuses.
    """

    denoiser_name: str = None  # attribute of the diffusers pipeline that is trained, such as "unet"
    required_components: tuple[str, ...] = ()
    unguided_scale = 1.0  # the guidance scale that switches guidance off
    patch_size = 1  # latent pixels per side that become one token: sizes must be multiples of it
    options: tuple[str, ...] = ()  # of `configure`: those that the diffusers pipeline of the family has, too
    negative_is_optional = False  # whether `encode_prompt` takes None for the negative prompt and leaves its half out
    step_rule: StepRule = None

    def __init__(self, pipeline, use_lora: bool = True):
        pipeline = plain_pipeline(pipeline)
        missing = [name for name in self.required_components if getattr(pipeline, name, None) is None]
        if missing:
            raise ValueError(
                f"The pipeline has no {', '.join(missing)}. SPO rolls out images and scores them, so it needs "
                f"{', '.join(self.required_components)}; load the complete pipeline."
            )
        self.sd_pipeline = pipeline
        self.check_tokenizers()
        self.use_lora = use_lora
        self.scoring_vae = None
        self.offload_text_encoders = False
        self.guidance_rescale = 0.0
        self.clip_skip = 0
        self._frozen_copy = None
        self._compute_dtype = None

    @classmethod
    def from_pretrained(cls, path: str | Path, use_lora: bool = True, **kwargs) -> "SPOPipeline":
        """Load from a folder or Hub id; `kwargs` go to the diffusers `from_pretrained`."""
        return cls(load_diffusers_pipeline(path, **kwargs), use_lora=use_lora)

    def configure(self, guidance_rescale: float | None = None, clip_skip: int | None = None) -> None:
        """
        How prompts are encoded and predictions are guided, wherever the pipeline is used from now on.

        Args:
            guidance_rescale (`float`, *optional*): phi in [0, 1], how far the standard deviation of a guided prediction is
                brought back to that of the prediction with the prompt (https://huggingface.co/papers/2305.08891, section
                3.4). For models with zero terminal SNR, which guidance overexposes. 0 is off.
            clip_skip (`int`, *optional*): layers of the CLIP text encoders that are left out at the end, as diffusers
                counts: 1 is what others call "CLIP skip 2". It concerns prompts, not the negative one. 0 is off.

            `None` leaves a value as it is.

        Raises:
            ValueError: for a value out of range, or one that is not off in a family without the option.
        """
        # Refuse values out of range, options that the family does not have, and more layers than the encoders have.
        if guidance_rescale is not None and not 0 <= guidance_rescale <= 1:
            raise ValueError(f"`guidance_rescale` must be in [0, 1], where 0 is off; got {guidance_rescale}.")
        if clip_skip is not None and clip_skip < 0:
            raise ValueError(f"`clip_skip` must be 0 or more layers; got {clip_skip}.")
        for name, value in (("guidance_rescale", guidance_rescale), ("clip_skip", clip_skip)):
            if value and name not in self.options:
                raise ValueError(
                    f"A `{type(self.sd_pipeline).__name__}` has no `{name}`, so images would be made unlike in training; leave "
                    "it at 0."
                )
        if clip_skip:
            fewest = min(encoder.config.num_hidden_layers for encoder in self.clip_text_encoders())
            if clip_skip >= fewest:
                raise ValueError(
                    f"`clip_skip` must be below {fewest}, the layers of the text encoder; got {clip_skip}."
                )

        # Set them only now, so that an error changes nothing.
        for name, value in (("guidance_rescale", guidance_rescale), ("clip_skip", clip_skip)):
            if value is not None:
                setattr(self, name, value)

    def clip_text_encoders(self) -> list[torch.nn.Module]:
        """The text encoders whose last layers `clip_skip` leaves out."""
        found = [getattr(self.sd_pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
        return [encoder for encoder in found if encoder is not None]

    @contextlib.contextmanager
    def configured(self, **options) -> Iterator[None]:
        """A context with the settings of [`SPOPipeline.configure`]; afterwards they are as they were before."""
        before = {name: getattr(self, name) for name in options}
        self.configure(**options)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    # --- the trained network -----------------------------------------------------------------------------------------

    @property
    def denoiser(self) -> torch.nn.Module:
        """The network that SPO trains."""
        return getattr(self.sd_pipeline, self.denoiser_name)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype in which the denoiser takes its inputs: see [`compute_dtype_of`]."""
        # Asked for at every step, and answered by a walk over all modules: kept until the denoiser is replaced or cast.
        key = (self.denoiser, next(self.denoiser.parameters()).dtype)
        if self._compute_dtype is None or self._compute_dtype[0] != key:
            self._compute_dtype = (key, compute_dtype_of(self.denoiser))
        return self._compute_dtype[1]

    @property
    def latent_dtype(self) -> torch.dtype:
        """Dtype in which latents are stored between steps. Rollout and loss round to it alike."""
        return self.compute_dtype

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model, as diffusers means it: `compute_dtype`."""
        return self.compute_dtype

    @contextlib.contextmanager
    def reference(self) -> Iterator[torch.nn.Module]:
        """The untouched model: the same network with its adapters off, or the frozen copy of full fine-tuning."""
        if self._frozen_copy is not None:
            yield self._frozen_copy
            return
        self.denoiser.disable_adapters()
        try:
            yield self.denoiser
        finally:
            self.denoiser.enable_adapters()

    def prepare_for_training(self, peft_config=None, use_lora: bool | None = None) -> torch.nn.Module:
        """
        Freeze everything and make the denoiser trainable: through an adapter, or whole, against a frozen copy.

        Args:
            peft_config (`peft.PeftConfig`, *optional*): the adapter; by default that of the family.
            use_lora (`bool`, *optional*): `False` trains all weights of the denoiser. By default what the pipeline was
                made with.

        Returns:
            `torch.nn.Module`: the module to hand to an optimizer.
        """
        if use_lora is not None:
            self.use_lora = use_lora
        self.freeze()
        # Forget what an earlier run left on this object: its reference was the model as that run found it.
        self._frozen_copy = None
        self._compute_dtype = None
        if self.use_lora:
            self.add_lora(peft_config)
            keep_weights_of_convolutions(self.denoiser)
        else:
            # Full fine-tuning: the weights must be real numbers that an optimizer can change.
            require_no_adapters(self.denoiser, self.denoiser_name)
            before = self.compute_dtype
            weights = self.denoiser.parameters()
            # Quantised weights of some libraries report float32, the dtype of what they stand for.
            quantised = getattr(self.denoiser, "hf_quantizer", None) is not None
            if quantised or any(not w.is_floating_point() or torch.finfo(w.dtype).bits < 16 for w in weights):
                raise ValueError(
                    f"The {self.denoiser_name} stores weights in 8 bits or less, so it cannot be trained as a whole. Train an adapter "
                    "(`use_peft=True`), or load it without quantisation and layerwise casting."
                )

            # The reference is a copy, since the weights themselves change. Training is in float32, as steps of 1e-5 vanish
            # in half precision; callers may go on in the dtype they had.
            self.denoiser.to(torch.float32)
            self._frozen_copy = copy.deepcopy(self.denoiser).requires_grad_(False).eval()
            self.denoiser.requires_grad_(True)
            if before != torch.float32:
                takes_any_precision(self.denoiser)
        return DenoiserForTraining(self.denoiser)

    def freeze(self) -> None:
        """Freeze every network but the denoiser."""
        for module in self.frozen_modules().values():
            module.requires_grad_(False).eval()

    def frozen_modules(self) -> dict[str, torch.nn.Module]:
        """Networks that are used but never trained, by component name."""
        frozen = {}
        for name, module in self.sd_pipeline.components.items():
            if isinstance(module, torch.nn.Module) and name != self.denoiser_name:
                frozen[name] = module
        return frozen

    def check_weights(self) -> None:
        """
        Raises:
            ValueError: if weights are on the meta device by now, so that they have shapes but no values; see
                [`check_network`].
        """
        for name, module in {self.denoiser_name: self.denoiser, **self.frozen_modules()}.items():
            check_network(module, name)

    def to(self, device, with_denoiser: bool = True) -> "SPOPipeline":
        """
        Move all networks; with `offload_text_encoders` the text encoders stay where they are, without `with_denoiser` what is
        trained and its frozen copy.
        """
        frozen = self.frozen_modules()
        encoders = self.text_encoders() if self.offload_text_encoders else {}
        kept = [module for name, module in frozen.items() if name not in encoders]
        trained = (self.denoiser, self._frozen_copy) if with_denoiser else ()
        for module in (*trained, self.scoring_vae, *kept):
            if module is not None:
                module.to(device)
        return self

    def text_encoders(self) -> dict[str, torch.nn.Module]:
        """The networks that only `encode_prompt` needs, by component name."""
        return {name: module for name, module in self.frozen_modules().items() if name.startswith("text_encoder")}

    @contextlib.contextmanager
    def encoders_on_device(self) -> Iterator[None]:
        """A context in which to encode prompts: with `offload_text_encoders` the encoders are on the device only inside it."""
        if not self.offload_text_encoders:
            yield
            return
        encoders = self.text_encoders().values()
        for module in encoders:
            module.to(self.device)
        try:
            yield
        finally:
            for module in encoders:
                module.to("cpu")

    # --- adapters ----------------------------------------------------------------------------------------------------

    def default_lora(self) -> LoraConfig:
        """
        The adapter that is trained if the caller names none: rank 4 on the attention projections, as the paper does on
        Stable Diffusion 1.5 (SPO, appendix; DDPO uses the same). A family whose layers have other names overrides this.
        """
        return default_lora_config()

    def add_lora(self, peft_config: PeftConfig | None = None) -> torch.nn.Module:
        """Freeze the denoiser and add a trainable adapter in float32: see `pipelines.adapters`."""
        return add_lora(self.denoiser, peft_config or self.default_lora(), self.denoiser_name)

    def save_lora(self, save_directory: str | Path, state_dict: dict | None = None, fold_alpha: bool = False) -> None:
        """Write `pytorch_lora_weights.safetensors` in the format diffusers' `load_lora_weights` reads."""
        save_lora(self.sd_pipeline, self.denoiser_name, save_directory, state_dict, fold_alpha=fold_alpha)

    def load_lora(self, directory: str | Path) -> None:
        """Read such a file back into the adapter that is being trained: see `pipelines.adapters`."""
        load_lora(self.sd_pipeline, self.denoiser_name, directory)

    # --- to be implemented by a model family -------------------------------------------------------------------------

    def encode_prompt(self, prompts: list[str], negative_prompt: str | None = "", **size) -> PromptEmbeds:
        """
        Args:
            prompts (`list[str]`): B prompts.
            negative_prompt (`str`, *optional*, defaults to `""`): prompt of the unconditional half of the guidance. `None`
                leaves that half out, in families with `negative_is_optional`: a run encodes its negative prompt once.
            size: `height` and `width` of the images in pixels, for models that are conditioned on them.

        Returns:
            [`PromptEmbeds`] of B rows.
        """
        raise NotImplementedError

    def predict(self, latents, timesteps, prompt_embeds: PromptEmbeds, guidance_scale: float, denoiser=None):
        """
        Guided prediction of the denoiser.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`): x_t.
            timesteps (`int` or `torch.Tensor` of shape `(batch_size,)`)
            prompt_embeds ([`PromptEmbeds`]): one row per sample.
            guidance_scale (`float`): as the diffusers pipeline of the family defines it.
            denoiser (`torch.nn.Module`, *optional*): call this instead of the denoiser, such as its DDP wrapper.

        Returns:
            `torch.Tensor` of the shape of `latents`, float32.
        """
        raise NotImplementedError

    def check_negative(self, embeds: PromptEmbeds) -> None:
        """
        Raises:
            ValueError: if there is guidance and nothing to guide away from.
        """
        if embeds.negative_prompt_embeds is None:
            raise ValueError("Guidance needs negative prompt embeddings; encode prompts with `encode_prompt`.")

    def check_negative_prompt(self, negative_prompt: str) -> None:
        """
        Whether the family has a use for this negative prompt. Asked before any long work.

        Raises:
            ValueError: if it has none. By default every family has.
        """

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """
        Shape of one latent, without the batch dimension, of an image of this size (by default the model's own).

        Raises:
            ValueError: for a size that the model cannot make; see [`SPOPipeline.check_size`].
        """
        raise NotImplementedError

    def call_arguments(self, guidance_scale: float, negative_prompt: str = "") -> dict[str, Any]:
        """Arguments that give the family's diffusers pipeline the guidance of SPO; for the code of a model card."""
        arguments = {"guidance_scale": guidance_scale}
        if negative_prompt:
            arguments["negative_prompt"] = negative_prompt
        arguments.update({name: getattr(self, name) for name in self.options if getattr(self, name)})
        return arguments

    # --- the VAE -----------------------------------------------------------------------------------------------------

    @property
    def vae(self) -> torch.nn.Module:
        return self.sd_pipeline.vae

    def vae_encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of latents by the pipeline's VAE. A family with an unusual VAE overrides it."""
        return encode(self.vae, images)

    def vae_decode(self, vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
        """Images by `vae`, the pipeline's own or `scoring_vae`. A family with an unusual VAE overrides it."""
        return decode(vae, latents)

    @torch.no_grad()
    def image_posterior(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Mean and standard deviation of the latents of images `(B, 3, H, W)` in [-1, 1], in the scale the denoiser sees.
        """
        return self.vae_encode(images)

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents -> images `(B, 3, H, W)`, float32, nominally in [-1, 1] (the decoder may overshoot a little)."""
        return self.vae_decode(self.vae, latents)

    @torch.no_grad()
    def decode_for_scoring(self, latents: torch.Tensor, image_size: int | None = None) -> torch.Tensor:
        """
        Images of x_0 predictions for the reward model, in [-1, 1]: by `scoring_vae` if there is one, and, where
        `image_size` is given, at that size (pixels of the short side; see [`shrink_latents`]).
        """
        latents = shrink_latents(latents, image_size, self.spatial_factor)
        if self.scoring_vae is None:
            return self.decode_latents(latents)
        return self.vae_decode(self.scoring_vae, latents)

    def running_networks(self) -> list[torch.nn.Module]:
        """What a rollout and a loss run on samples: denoiser, its frozen copy, and what decodes for scoring."""
        networks = [self.denoiser, self._frozen_copy, self.scoring_vae or self._decoding_network()]
        return [network for network in networks if network is not None]

    def optimize(self, channels_last: bool = False) -> None:
        """
        Make the networks faster without changing what they compute.

        Args:
            channels_last (`bool`, *optional*, defaults to `False`): store convolutions in channels-last order.
        """
        if channels_last:
            for network in self.running_networks():
                if takes_channels_last(network):
                    network.to(memory_format=torch.channels_last)

    def _decoding_network(self) -> torch.nn.Module | None:
        """The network that turns latents into images."""
        return getattr(self, "vae", None)

    # --- the sampler: answers of the step rule -----------------------------------------------------------------------

    @property
    def scheduler(self):
        """The diffusers scheduler of the step rule, independent of `sd_pipeline.scheduler`."""
        return self.step_rule.scheduler

    @property
    def num_train_timesteps(self) -> int:
        return self.step_rule.num_train_timesteps

    def set_timesteps(self, num_inference_steps: int, latent_shape: tuple[int, ...] | None = None) -> list[int]:
        """
        Fix the schedule; returns t_0 > t_1 > ... as a list. `latent_shape`, the shape of one latent, matters to families
        whose schedule depends on the size of the image.
        """
        return self.step_rule.set_timesteps(num_inference_steps)

    def check_eta(self, eta: float) -> None:
        """
        Raises:
            ValueError: if the sampler has no steps with this much noise.
        """
        self.step_rule.check_eta(eta)

    def step_is_stochastic(self, step: int, eta: float) -> bool:
        """Whether step number `step` of the schedule may branch."""
        return self.step_rule.is_stochastic(step, eta)

    def step_distribution(self, model_output, timesteps, latents, eta: float) -> StepDistribution:
        """Distribution of x_{t-1} given x_t under a prediction."""
        return self.step_rule.distribution(model_output, timesteps, latents, eta)

    @torch.no_grad()
    def predict_original_sample(self, latents, timesteps, prompt_embeds, guidance_scale: float) -> torch.Tensor:
        """Predicted x_0 from x_t at any training timestep (not only those of the schedule)."""
        model_output = self.predict(latents, timesteps, prompt_embeds, guidance_scale)
        return self.step_rule.predict_original_sample(model_output, timesteps, latents)

    def add_noise(self, latents, noise, timesteps) -> torch.Tensor:
        """x_t of the forward process."""
        return self.step_rule.add_noise(latents, noise, timesteps)

    # --- shared by all families --------------------------------------------------------------------------------------

    @property
    def spatial_factor(self) -> int:
        """Pixels of an image per side of one latent pixel."""
        return self.sd_pipeline.vae_scale_factor

    def check_size(self, height: int | None, width: int | None) -> None:
        """
        Raises:
            ValueError: if height or width is not a positive multiple of what one patch of latent pixels stands for.
        """
        step = self.spatial_factor * self.patch_size
        for name, value in (("height", height), ("width", width)):
            if value is not None and (value <= 0 or value % step):
                raise ValueError(f"`{name}` must be a positive multiple of {step} pixels, got {value}.")

    def check_default_size(self, sample_size: Any, *given: int | None) -> None:
        """
        Raises:
            ValueError: if a size is left to the model and its configuration has none.
        """
        if sample_size is None and not all(given):
            raise ValueError(
                f"The configuration of the {self.denoiser_name} has no `sample_size`, so the model has no image size of its own: "
                "give `height` and `width`."
            )

    def check_tokenizers(self) -> None:
        """
        Raises:
            ValueError: if the tokenizer of a CLIP text encoder allows more tokens than the encoder has positions for.
        """
        for number in ("", "_2"):
            encoder = getattr(self.sd_pipeline, f"text_encoder{number}", None)
            tokenizer = getattr(self.sd_pipeline, f"tokenizer{number}", None)
            if encoder is None or tokenizer is None or not type(encoder).__name__.startswith("CLIPText"):
                continue
            places = encoder.config.max_position_embeddings
            if tokenizer.model_max_length > places:
                raise ValueError(
                    f"`tokenizer{number}` does not say how many tokens the text encoder reads (its `model_max_length` is "
                    f"{tokenizer.model_max_length:.4g}, and there are {places} places). Set "
                    f"`pipeline.tokenizer{number}.model_max_length = {places}`."
                )

    def num_pixels(self, height: int | None = None, width: int | None = None) -> int:
        """Number of pixels of an image of this size, by default of the model's own."""
        _, *latent_size = self.latent_shape(height, width)
        return math.prod(latent_size) * self.spatial_factor**2

    def encode_images(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Images `(B, 3, H, W)` in [-1, 1] -> latents drawn from their posterior."""
        return self.draw_latents(*self.image_posterior(images), generator)

    def draw_latents(self, mean: torch.Tensor, std: torch.Tensor, generator=None) -> torch.Tensor:
        """A sample of the posterior `N(mean, std^2)`, in the dtype of latents."""
        noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return (mean + std * noise).to(self.latent_dtype)

    def prepare_latents(self, batch_size: int, generator=None, height=None, width=None) -> torch.Tensor:
        """
        x_T for `batch_size` prompts. `generator` may be one generator or a list with one per prompt.
        """
        shape = (batch_size, *self.latent_shape(height, width))
        latents = randn_tensor(shape, generator=generator, device=self.device, dtype=torch.float32)
        return latents.to(self.latent_dtype)

    @torch.no_grad()
    def sample(
        self,
        prompt_embeds: PromptEmbeds,
        generators: list[torch.Generator] | torch.Generator | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 5.0,
        eta: float = 1.0,
        height: int | None = None,
        width: int | None = None,
    ) -> torch.Tensor:
        """
        Sample images with the step distributions that the rollout uses.

        With one generator per prompt, an image depends on its own seed alone, not on the batch it is in.

        Args:
            prompt_embeds ([`PromptEmbeds`]): B rows.
            generators (`torch.Generator` or list of B of them, *optional*): source of all noise.
            num_inference_steps (`int`, *optional*, defaults to `20`), guidance_scale (`float`, *optional*, defaults to
                `5.0`), eta (`float`, *optional*, defaults to `1.0`): the sampler.
            height, width (`int`, *optional*): pixels; the model's own size by default.

        Returns:
            `torch.Tensor` of shape `(batch_size, 3, height, width)` in [-1, 1].
        """
        timesteps = self.set_timesteps(num_inference_steps, self.latent_shape(height, width))
        latents = self.prepare_latents(len(prompt_embeds), generators, height, width)
        for step, timestep in enumerate(timesteps):
            output = self.predict(latents, timestep, prompt_embeds, guidance_scale)
            mean, std, _ = self.step_distribution(output, timestep, latents, eta)
            if self.step_is_stochastic(step, eta):
                mean = mean + std * randn_tensor(mean.shape, generator=generators, device=mean.device)
            latents = mean.to(self.latent_dtype)
        return self.decode_latents(latents)
