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
Stable Diffusion (1.x, 2.x) as SPO trains it: a UNet on VAE latents, stochastic DDIM steps, classifier-free guidance.

[`SPOStableDiffusionPipeline`] wraps a diffusers pipeline and never changes the user's scheduler: it keeps a
`DDIMScheduler` of its own, built from the pipeline's configuration. It also offers the interface of TRL's
`DDPOStableDiffusionPipeline`, so that the same object trains with TRL's `DDPOTrainer` (TRL <= 0.23.1).
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_unet_state_dict_to_peft, logging
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig, PeftConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from ..hub_files import load_diffusers_pipeline
from ..scheduling_ddim import DDIMStepRule
from ..step_distribution import gaussian_log_prob
from .adapters import LORA_NAME
from .base import SPOPipeline
from .conditioning import PromptEmbeds
from .ddpo import DDPOPipelineOutput, DDPOSchedulerOutput


logger = logging.get_logger(__name__)


def default_lora_config() -> LoraConfig:
    """The paper's SD1.5 adapter: rank 4 on the attention projections (SPO, appendix; DDPO uses the same)."""
    return LoraConfig(
        r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]
    )


class SPOStableDiffusionPipeline(SPOPipeline):
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
    required_components = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    accepted_embeddings = {"addition_embed_type": (None, "text"), "encoder_hid_dim_type": (None, "text_proj")}

    def __init__(self, pipeline, use_lora: bool = True):
        missing = [name for name in self.required_components if getattr(pipeline, name, None) is None]
        if missing:
            raise ValueError(
                f"The pipeline has no {', '.join(missing)}. SPO rolls out images and scores them, so it needs "
                f"{', '.join(self.required_components)}; load the complete pipeline."
            )
        super().__init__(pipeline)
        self.use_lora = use_lora
        self.step_rule = DDIMStepRule(pipeline.scheduler)
        in_channels, latent_channels = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
        if in_channels != latent_channels:
            raise ValueError(
                f"The UNet takes {in_channels} input channels and the VAE has {latent_channels} latent channels. SPO "
                "trains text-to-image UNets; inpainting and image-conditioned ones are not supported."
            )
        self._check_networks()
        self._told_of_truncation = False

    def _check_networks(self) -> None:
        """Whether the components fit each other and the UNet needs nothing that SPO does not give it."""
        config = self.unet.config
        if config.out_channels != config.in_channels:
            raise ValueError(
                f"The UNet makes {config.out_channels} channels of {config.in_channels}. SPO needs a prediction in the "
                "shape of the latents; models that also learn the variance are not supported."
            )
        extra = {
            "class_embed_type": config.class_embed_type,
            "num_class_embeds": config.num_class_embeds,
            "addition_embed_type": config.addition_embed_type,
            "encoder_hid_dim_type": config.encoder_hid_dim_type,
        }
        for name, value in extra.items():
            accepted = self.accepted_embeddings.get(name, (None,))
            if value not in accepted:
                raise ValueError(
                    f"The UNet has `{name}={value!r}`, but SPO conditions it on "
                    f"{' or '.join(map(repr, accepted))} there: on the prompt"
                    + (" and the size of the image" if "text_time" in accepted else "")
                    + ", not on classes or images. Pass a plain text-to-image UNet"
                    + ("; one of SDXL belongs into a `StableDiffusionXLPipeline`." if value == "text_time" else ".")
                )
        width, expected = self._text_width(), config.cross_attention_dim
        if config.encoder_hid_dim is None and isinstance(expected, int) and width != expected:
            raise ValueError(
                f"The text encoder gives features of size {width} and the UNet takes {expected} "
                "(`cross_attention_dim`). Take both from the same model."
            )

    def _text_width(self) -> int:
        """Size of the text features that the UNet attends to."""
        return self.text_encoder.config.hidden_size

    @classmethod
    def from_pretrained(cls, path: str | Path, use_lora: bool = True, **kwargs) -> "SPOStableDiffusionPipeline":
        """Load from a folder or Hub id; `kwargs` go to the diffusers `from_pretrained`."""
        return cls(load_diffusers_pipeline(path, **kwargs), use_lora=use_lora)

    # --- components, as TRL's interface names them -------------------------------------------------------------------

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
    def autocast(self):
        return contextlib.nullcontext if self.use_lora else None

    def set_progress_bar_config(self, *args, **kwargs):
        self.sd_pipeline.set_progress_bar_config(*args, **kwargs)

    # --- conditioning ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str], negative_prompt: str = "", **size) -> PromptEmbeds:
        """
        Args:
            prompts (`list[str]`): B prompts.
            negative_prompt (`str`, *optional*, defaults to `""`): encoded once and shared by all prompts.

        Returns:
            [`PromptEmbeds`] with `prompt_embeds` and `negative_prompt_embeds` of shape `(B, sequence_length, dim)`.
        """
        positive = self._encode_text(list(prompts))
        negative = self._encode_text([negative_prompt])
        return PromptEmbeds(positive, negative.expand_as(positive))

    def _encode_text(self, texts: list[str]) -> torch.Tensor:
        with self._truncation_told_once(texts):
            return self.sd_pipeline.encode_prompt(texts, self.device, 1, do_classifier_free_guidance=False)[0]

    @contextlib.contextmanager
    def _truncation_told_once(self, texts: list[str]) -> Iterator[None]:
        """
        One warning for the first text that is longer than the text encoder reads. diffusers prints the rest of each text
        in each call, and transformers says that it cannot work.
        """
        tokenizer = self.sd_pipeline.tokenizer or self.sd_pipeline.tokenizer_2
        limit = tokenizer.model_max_length
        loggers = [
            logging.get_logger(name)
            for name in (self.sd_pipeline.encode_prompt.__module__, "transformers.tokenization_utils_base")
        ]
        for other in loggers:
            other.addFilter(_is_not_about_length)
        try:
            for text in texts:
                if self._told_of_truncation or len(text.encode()) < limit:  # a token has at least one byte
                    continue
                num_tokens = len(tokenizer(text).input_ids)
                if num_tokens > limit:
                    logger.warning(
                        f"A prompt has {num_tokens} tokens and the text encoder reads {limit}: the end of it, and of "
                        f"other long prompts, has no effect ({text[:60]!r}...)."
                    )
                    self._told_of_truncation = True
            yield
        finally:
            for other in loggers:
                other.removeFilter(_is_not_about_length)

    def _conditioning(self, embeds: PromptEmbeds, negative: bool) -> dict:
        """Keyword arguments of the UNet for the negative or the positive half of guidance."""
        return {"encoder_hidden_states": embeds.negative_prompt_embeds if negative else embeds.prompt_embeds}

    # --- the denoiser ------------------------------------------------------------------------------------------------

    def predict(self, latents, timesteps, prompt_embeds, guidance_scale: float, denoiser=None) -> torch.Tensor:
        r"""
        Guided noise (or x_0, or v) prediction: uncond + w (cond - uncond). With w <= 1 there is no guidance and only
        the conditional half is evaluated, as in diffusers.

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
        if prompt_embeds.negative_prompt_embeds is None:
            raise ValueError("Guidance needs negative prompt embeddings; encode prompts with `encode_prompt`.")
        conditioning = _cat_conditioning(self._conditioning(prompt_embeds, negative=True), conditioning)
        output = denoiser(torch.cat([latents, latents]), timesteps.repeat(2), **conditioning, return_dict=False)[0]
        uncond, cond = output.float().chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    # --- the VAE -----------------------------------------------------------------------------------------------------

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        unet, factor = self.unet.config, self.sd_pipeline.vae_scale_factor
        sample_size = unet.sample_size
        default = sample_size if isinstance(sample_size, (list, tuple)) else (sample_size, sample_size)
        for name, value in (("height", height), ("width", width)):
            if value is not None and (value <= 0 or value % factor):
                raise ValueError(f"`{name}` must be a positive multiple of {factor} (the VAE's factor), got {value}.")
        return (
            unet.in_channels,
            height // factor if height else default[0],
            width // factor if width else default[1],
        )

    @torch.no_grad()
    def image_posterior(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): in [-1, 1].

        Returns:
            `tuple` of mean and standard deviation, each `(B, channels, H / factor, W / factor)`.
        """
        with self._vae_precision():
            posterior = self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist
        return posterior.mean * self.vae.config.scaling_factor, posterior.std * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents -> images `(B, 3, H, W)`, float32, nominally in [-1, 1] (the decoder may overshoot a little)."""
        return self._decode(self.vae, latents)

    @torch.no_grad()
    def decode_for_scoring(self, latents: torch.Tensor, image_size: int | None = None) -> torch.Tensor:
        """
        See [`SPOPipeline.decode_for_scoring`]. Latents are resized (bilinear, antialiased) to the size that decodes to
        `image_size` pixels. That is an approximation: at 24 of the 32 pixels of the shapes world it changes 22% of the
        labels (`benchmarks/approximations.py`, results in `docs/performance.md`). Measure before you train with it.
        """
        factor, short = self.sd_pipeline.vae_scale_factor, min(latents.shape[-2:])
        if image_size is not None and image_size < short * factor:
            scale = image_size / (short * factor)
            size = [max(1, round(side * scale)) for side in latents.shape[-2:]]
            latents = F.interpolate(latents.float(), size, mode="bilinear", antialias=True, align_corners=False)
        if self.scoring_vae is None:
            return self.decode_latents(latents)
        return self._decode(self.scoring_vae, latents)

    def _decode(self, vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
        latents = (latents / vae.config.scaling_factor).to(vae.dtype)
        with self._vae_precision():
            return vae.decode(latents, return_dict=False)[0].float()

    def _vae_precision(self):
        """The VAE runs in the dtype of its weights, also inside a trainer's autocast: SDXL's overflows in float16."""
        return torch.autocast(self.device.type, enabled=False)

    # --- adapters ----------------------------------------------------------------------------------------------------

    def add_lora(self, peft_config: PeftConfig | None = None) -> torch.nn.Module:
        """
        Freeze the UNet and add the adapter that is trained. Its parameters are float32 whatever the dtype of the UNet
        is: bfloat16 loses updates of 6e-5, and float16 gradients cannot be unscaled.

        Raises:
            ValueError: if the UNet already carries other adapters. The reference is the UNet with adapters off, so
                they would not be part of it.
        """
        peft_config = peft_config or default_lora_config()
        existing = getattr(self.denoiser, "peft_config", {})
        if existing:
            same = list(existing) == ["default"] and existing["default"].to_dict() == peft_config.to_dict()
            if not same:
                raise ValueError(
                    f"The pipeline already has adapters ({', '.join(existing)}). Merge them into the base model first: "
                    "`pipe.fuse_lora(); pipe.unload_lora_weights()`."
                )
            logger.warning("The pipeline already carries this adapter: training continues from it.")
        else:
            self.denoiser.requires_grad_(False)
            try:
                self.denoiser.add_adapter(peft_config)
            except ValueError as error:
                raise ValueError(f"`peft_config` does not fit the {self.denoiser_name}: {error}") from error
        cast_training_params(self.denoiser, dtype=torch.float32)
        return self.denoiser

    def get_trainable_layers(self) -> torch.nn.Module:
        """TRL's DDPO calls this to get the module it trains, with the adapter added and everything else frozen."""
        self.freeze()
        return self.add_lora() if self.use_lora else self.denoiser.requires_grad_(True)

    def save_lora(self, save_directory: str | Path, state_dict: dict | None = None) -> None:
        """
        Write the adapter as `pytorch_lora_weights.safetensors`, its configuration (rank, alpha) inside: plain diffusers
        reads it with `pipe.load_lora_weights(save_directory)`.
        """
        layers = get_peft_model_state_dict(self.denoiser, state_dict=state_dict)
        self.sd_pipeline.save_lora_weights(
            save_directory,
            unet_lora_layers={name: value.contiguous() for name, value in layers.items()},
            unet_lora_adapter_metadata=self.denoiser.peft_config["default"].to_dict(),
            safe_serialization=True,
        )

    def load_lora(self, directory: str | Path) -> None:
        """
        Raises:
            ValueError: if there is no such file, it cannot be read, or its tensors are not exactly those of the adapter
                being trained.
        """
        try:
            layers = self.sd_pipeline.lora_state_dict(str(directory), weight_name=LORA_NAME)[0]
        except Exception as error:  # what a reader raises depends on where the bytes break off
            raise ValueError(
                f"{str(directory)!r} has no {LORA_NAME} that can be read, it may be incomplete "
                f"({type(error).__name__}: {error})."
            ) from error
        unusable = sorted(k for k, v in layers.items() if not torch.is_tensor(v) or not v.is_floating_point())
        if unusable:
            raise ValueError(f"{str(directory)!r} holds {unusable[0]!r}, which is no tensor of real numbers.")
        broken = sorted(k for k, v in layers.items() if not v.isfinite().all())
        if broken:
            raise ValueError(
                f"{str(directory)!r} holds numbers that are NaN or infinite, in {broken[0]!r}. Use an earlier checkpoint."
            )
        layers = {k.removeprefix("unet."): v for k, v in layers.items() if k.startswith("unet.")}
        layers = convert_unet_state_dict_to_peft(layers)
        expected = get_peft_model_state_dict(self.denoiser)
        differing = sorted(set(layers) ^ set(expected)) or sorted(
            key for key in expected if layers[key].shape != expected[key].shape
        )
        if differing:
            raise ValueError(
                f"The LoRA in {str(directory)!r} does not fit the adapter being trained (first difference: "
                f"{differing[0]!r}). Use the `peft_config` of the run that wrote it."
            )
        set_peft_model_state_dict(self.denoiser, layers)

    # --- the rest of TRL's DDPO interface ----------------------------------------------------------------------------

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
        if prompt is None and prompt_embeds is None:
            raise ValueError("Pass either `prompt` or `prompt_embeds`.")
        if prompt_embeds is None:
            embeds = self.encode_prompt([prompt] if isinstance(prompt, str) else prompt, negative_prompt)
        else:
            embeds = PromptEmbeds(prompt_embeds, negative_prompt_embeds)
        timesteps = self.set_timesteps(num_inference_steps)
        latents, log_probs = [self.prepare_latents(len(embeds), generator, height, width)], []
        for timestep in timesteps:
            model_output = self.predict(latents[-1], timestep, embeds, guidance_scale)
            step = self.scheduler_step(model_output, timestep, latents[-1], eta, generator=generator)
            latents.append(step.latents)
            log_probs.append(step.log_probs)
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
            loaded = UNet2DConditionModel.from_pretrained(input_dir, subfolder=self.denoiser_name)
            models[0].load_state_dict(loaded.state_dict())


def _is_not_about_length(record) -> bool:
    text = record.getMessage()
    return not text.startswith(("The following part of your input was truncated", "Token indices sequence length"))


def _cat_conditioning(first: dict, second: dict) -> dict:
    """Concatenate two (possibly nested) dictionaries of tensors along the batch dimension."""
    return {
        key: _cat_conditioning(value, second[key]) if isinstance(value, dict) else torch.cat([value, second[key]])
        for key, value in first.items()
    }
