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
A reward model that judges noisy latents: the diffusion model's own first half as the vision tower of a CLIP (the latent
reward model of LPO, https://huggingface.co/papers/2502.01051, section 4.1).

    features(x_t, c, t) = concat of mean over pixels of [last residual of every down level, mid block]       of a UNet
                          concat of mean over image tokens behind some blocks                          of a transformer
    score(x_t, c, t)    = exp(logit_scale) * cos(W_v features, W_t pooled_text(c))

The mid block of a UNet is guided like a noise prediction ("visual feature enhancement"): uncond + w (text - uncond), w = 7.5.
Down levels take the half with text alone. A UNet's text encoders are trained with it and belong to the model. Those of a
transformer are large and stay frozen: prompts are encoded by the pipeline that is judged.

Nothing is predicted and nothing decoded, so scoring a candidate costs half a denoiser call, at any noise level. Differences
from the public code (https://github.com/Kwai-Kolors/LPO):

- a candidate is scored at its own timestep, not at that of the latent it was drawn from (`reward_timestep="branch"` of
  [`SPOConfig`] does that);
- prompts are encoded once per rollout, the empty prompt once in all;
- the up blocks, which never run, are neither kept nor saved;
- the model knows the latent space it was made for and refuses another: a reward of SD1.5's latents on those of SDXL does
  harm (paper, table 5).
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..hub_files import (
    load_diffusers_pipeline,
    load_whole,
    locate_checkpoint,
    locate_folder,
    optional_file,
    require_existing,
)
from ..pipelines.auto import wrap_pipeline
from ..pipelines.components import plain_pipeline
from ..pipelines.conditioning import PromptEmbeds
from .dina import load_dina
from .inputs import StepRewardOutput, check_texts, checked_timesteps
from .latent_building import copy_transformer, copy_unet, load_onto_pipeline, named_base, share_denoiser
from .latent_config import LatentRewardModelConfig, check_latent_space, latent_space_of
from .latent_features import (
    BlockTokens,
    SharedFeatures,
    TransformerFeatures,
    UNetFeatures,
    check_text_tokens,
    pooled_text,
)
from .latent_heads import QueryAttentionHead
from .latent_text import (
    PIPELINE_FOLDER,
    PipelineReader,
    encode_with_clips,
    load_tokenizers,
    make_text_encoder,
    names_of_other_versions,
    save_what_reads,
    tokenizers_of,
)
from .lpo import load_lpo
from .publishing import PushesWholeFolder, RewardDescription, latent_description, published


class LatentRewardModel(PushesWholeFolder, PreTrainedModel):
    r"""
    Judges noisy latents with the backbone of a diffusion model. It carries its own weights, and with a UNet its text
    encoders; one with a transformer encodes prompts by the pipeline that is judged.

    Make one with [`~LatentRewardModel.from_pipeline`] (fresh, to be trained),
    [`~LatentRewardModel.from_original_checkpoint`] (the released latent rewards of LPO) or
    [`~LatentRewardModel.from_pretrained`].

    Args:
        config ([`LatentRewardModelConfig`]):
            Architecture.
        tokenizers (`list`, *optional*):
            One tokenizer per text encoder.
        shared ([`SharedFeatures`], *optional*):
            The backbone, if it is the denoiser of a pipeline.

    Example:

    ```python
    >>> reward_model = LatentRewardModel.from_original_checkpoint("casiatao/LRM", "lrm_sd15")
    >>> trainer = SPOTrainer(config, pipeline, reward_model, train_dataset=prompts)
    ```
    """

    config_class = LatentRewardModelConfig
    base_model_prefix = ""
    main_input_name = "latents"
    _keep_in_fp32_modules_strict = ["logit_scale"]
    scores = "noisy_latents"
    """What this reward model scores: the candidates of a rollout as they are."""

    def __init__(
        self, config: LatentRewardModelConfig, tokenizers: list | None = None, shared: SharedFeatures | None = None
    ):
        super().__init__(config)
        self.save_reader = True
        if config.shared:
            if shared is None:
                raise ValueError(
                    "This latent reward model shares the denoiser of a pipeline: load it with `LatentRewardModel."
                    "from_pretrained(path, pipeline=pipeline)`."
                )
            self.backbone, text_width = shared, config.text_width
        elif config.transformer_config is None:
            self.backbone = UNetFeatures(config.unet_config)
            text_width = config.text_configs[-1]["hidden_size"] if config.text_configs else config.projection_dim
        else:
            self.backbone = TransformerFeatures(config.transformer_config, config.blocks)
            text_width = config.text_width
        self.reader = PipelineReader(config, self.backbone.network) if self.reads_with_pipeline else None
        self.text_encoders = nn.ModuleList(make_text_encoder(text) for text in config.text_configs)
        self.head = self.visual_projection = self.text_projection = self.logit_scale = None
        if config.head == "query_attention":
            self.head = QueryAttentionHead(
                self.backbone.widths[0], len(config.blocks), config.num_queries, config.num_heads
            )
            check_text_tokens(self.backbone.network, config.blocks)
        else:
            self._add_projections(text_width)
        self.tokenizers = tokenizers
        self.post_init()

    def _add_projections(self, text_width: int) -> None:
        config = self.config
        self.visual_projection = nn.Linear(sum(self.backbone.widths), config.projection_dim, bias=False)
        # A text encoder that projects its pooled output itself (SDXL's second) is taken as it is.
        projects = config.text_configs and config.text_configs[-1]["architecture"] == "CLIPTextModelWithProjection"
        if not projects:
            self.text_projection = nn.Linear(text_width, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init)))

    def _init_weights(self, module):
        """Heads as in the paper's code; the backbone and the text encoders are always loaded."""
        if module in (self.visual_projection, self.text_projection):
            nn.init.normal_(module.weight, std=0.02)

    @property
    def reads_with_pipeline(self) -> bool:
        """Whether prompts are encoded by the pipeline that is judged, whose text encoders are never trained."""
        return self.config.shared or self.config.transformer_config is not None

    @property
    def shares_denoiser(self) -> bool:
        """Whether the backbone is the denoiser of the pipeline that is judged, under an adapter of its own."""
        return self.config.shared

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        """
        Recompute the blocks of the backbone in the backward pass, as `gradient_checkpointing=True` asks. Arguments that
        transformers gives are of its own models; diffusers has none.

        Raises:
            ValueError: for a shared backbone, whose blocks would be recomputed under the adapter of the policy.
        """
        if self.config.shared:
            raise ValueError(
                "A shared latent reward cannot use `gradient_checkpointing`: its blocks would be recomputed when the adapter "
                "of the policy is active again. Leave it off, or train a reward with weights of its own."
            )
        self.backbone.network.enable_gradient_checkpointing()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the networks; `logit_scale` may be in float32 beside them."""
        return self.visual_projection.weight.dtype if self.head is None else self.head.query_tokens.dtype

    @property
    def compares_embeddings(self) -> bool:
        """Whether its score is a cosine of features of latents and texts, which other losses can use, too."""
        return self.head is None

    def cast(self, dtype: torch.dtype) -> "LatentRewardModel":
        """Casts the networks in place and leaves `logit_scale`, which multiplies every score, in float32."""
        if self.logit_scale is None:
            return self.to(dtype)
        logit_scale = self.logit_scale.detach().float().clone()
        self.to(dtype)
        self.logit_scale.data = logit_scale
        return self

    # ---- text ----

    def tokenize(self, prompts: list[str]) -> list[torch.Tensor]:
        """
        Token ids `(len(prompts), length)` of each text encoder, padded or cut to its length.

        Raises:
            ValueError: if there are no tokenizers, or `prompts` is not a list of strings.
        """
        if self.reads_with_pipeline:
            check_texts(prompts)
            self.reader.require()
            return []
        if not self.tokenizers:
            raise ValueError(
                "This latent reward model has no tokenizer, so it cannot read prompts. Set `tokenizers` to those of its "
                "pipeline, as `[pipeline.tokenizer]`, or train with a pipeline that has them."
            )
        check_texts(prompts)
        found = []
        for tokenizer in self.tokenizers:
            encoded = tokenizer(
                list(prompts),
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            )
            found.append(encoded.input_ids.to(self.device))
        return found

    def encode_prompts(self, prompts: list[str]) -> PromptEmbeds:
        """
        Everything that scoring needs of the prompts, one row each: features of the tokens and of the empty prompt, and
        pooled features. Each distinct prompt passes through the text encoders once.
        """
        if self.reads_with_pipeline:
            return self.reader.encode(prompts)
        unique = {prompt: index for index, prompt in enumerate(dict.fromkeys([*prompts, ""]))}
        tokens, pooled = encode_with_clips(self.text_encoders, self.tokenize(list(unique)))
        rows = torch.tensor([unique[prompt] for prompt in prompts], device=tokens.device)
        empty = torch.full_like(rows, unique[""])
        return PromptEmbeds(tokens[rows], tokens[empty], pooled[rows], pooled[empty])

    # ---- scores ----

    def visual_features(self, latents: torch.Tensor, timesteps: torch.Tensor, text: PromptEmbeds) -> torch.Tensor:
        """
        The features that are projected, `(B, sum of widths)`: down levels under the prompt, the mid block guided.

        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`): x_t in the scale of the denoiser.
            timesteps (`torch.Tensor` of shape `(B,)`): int64.
            text ([`PromptEmbeds`]): from [`~LatentRewardModel.encode_prompts`].
        """
        if self.config.transformer_config is not None:
            return torch.cat([tokens.mean(1) for tokens in self._tokens(latents, timesteps, text).image], dim=-1)
        latents, text = latents.to(self.device, self._backbone_dtype), text.to(self._backbone_dtype)
        timesteps = timesteps.to(self.device)
        scale = self.config.guidance_scale
        if scale <= 1:
            added = self._added(text.pooled_prompt_embeds)
            return torch.cat(self.backbone(latents, timesteps, text.prompt_embeds, added), dim=-1)
        tokens = torch.cat([text.prompt_embeds, text.negative_prompt_embeds])
        pooled = None
        if text.pooled_prompt_embeds is not None:
            pooled = torch.cat([text.pooled_prompt_embeds, text.negative_pooled_prompt_embeds])
        added = self._added(pooled)
        twice = torch.cat([latents, latents])
        *levels, middle = self.backbone(twice, torch.cat([timesteps, timesteps]), tokens, added)
        cond, uncond = middle.chunk(2)
        guided = uncond + scale * (cond - uncond)
        return torch.cat([*(level[: len(latents)] for level in levels), guided], dim=-1)

    @property
    def _backbone_dtype(self) -> torch.dtype:
        return self.reader.require().compute_dtype if self.config.shared else self.dtype

    def _tokens(self, latents: torch.Tensor, timesteps: torch.Tensor, text: PromptEmbeds) -> BlockTokens:
        """What is read off a transformer."""
        reader = self.reader.require()
        sigma = reader.step_rule.sigma(timesteps.to(self.device)).to(self.device, torch.float32)
        return self.backbone(
            reader, latents.to(self.device, self._backbone_dtype), sigma, text.to(self._backbone_dtype)
        )

    def _added(self, pooled: torch.Tensor | None) -> dict | None:
        """SDXL's conditioning on the pooled text and the size, which is always the one the model was trained at."""
        if self.backbone.network.config.addition_embed_type != "text_time":
            return None
        side = 8 * self.backbone.network.config.sample_size
        time_ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=pooled.dtype)
        time_ids = time_ids.to(pooled.device, non_blocking=pooled.device.type != "cpu")  # asked at every score
        return {"text_embeds": pooled, "time_ids": time_ids.expand(len(pooled), -1)}

    def forward(
        self,
        latents: torch.Tensor,
        prompts: list[str] | None = None,
        timesteps: torch.Tensor | int | None = None,
        *,
        text_features: PromptEmbeds | None = None,
    ) -> StepRewardOutput:
        r"""
        Scores noisy latents against their prompts at their timesteps, and returns the normalised features with the
        scores. Differentiable in the latents.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, C, h, w)`):
                x_t in the scale of the denoiser.
            prompts (`list[str]`, *optional*):
                One prompt per latent.
            timesteps (`torch.Tensor` of shape `(batch_size,)` or `()`, or `int`, *optional*):
                Integer timesteps in `[0, num_train_timesteps)`. `None` stands for clean latents, timestep 0.
            text_features ([`PromptEmbeds`], *optional*):
                From [`~LatentRewardModel.encode_prompts`], instead of `prompts`.

        Returns:
            [`StepRewardOutput`].

        Raises:
            `ValueError`: If latents are of another space, lengths do not fit, a timestep is out of range, or the text is
            not given once. Timesteps on an accelerator are trusted, as reading them would wait for it.
        """
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"`latents` must have shape (batch_size, {self.config.latent_channels}, height, width), got "
                f"{tuple(latents.shape)}."
            )
        if (prompts is None) == (text_features is None):
            raise ValueError("Pass either `prompts` or `text_features`.")
        text = self.encode_prompts(prompts) if text_features is None else text_features
        if len(text) != len(latents):
            raise ValueError(f"Got {len(latents)} latents and {len(text)} prompts.")
        timesteps = checked_timesteps(timesteps, len(latents), self.config.num_train_timesteps, self.device)

        text = text.to(self.device)
        if self.head is not None:
            tokens = self._tokens(latents, timesteps, text)
            raw = self.head(tokens.image, tokens.text, tokens.time, text.prompt_mask).float()
            return StepRewardOutput((raw + self.config.score_shift) / self.config.score_scale)
        visual = self.visual_projection(self.visual_features(latents, timesteps, text).to(self.dtype))
        pooled = pooled_text(text).to(self.dtype)
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)
        image_embeds = F.normalize(visual.float(), dim=-1)
        text_embeds = F.normalize(pooled.float(), dim=-1)
        logit_scale = self.logit_scale.float().exp()
        scores = logit_scale * (image_embeds * text_embeds).sum(-1)
        return StepRewardOutput(scores, image_embeds, text_embeds, logit_scale)

    def score(
        self,
        latents: torch.Tensor,
        prompts: list[str] | None = None,
        timesteps: torch.Tensor | int | None = None,
        *,
        text_features: PromptEmbeds | None = None,
    ) -> torch.Tensor:
        r"""
        The scores alone, `torch.Tensor` of shape `(batch_size,)`, float32. Arguments and errors as in
        [`~LatentRewardModel.forward`]. The probability that humans prefer one of two latents is the softmax over their
        scores.
        """
        return self(latents, prompts, timesteps, text_features=text_features).scores

    def freeze_text_tower(self) -> None:
        """Stops training the text encoders and the projection of their output; backbone and visual head go on alone."""
        for module in (self.text_encoders, self.text_projection):
            if module is not None:
                module.requires_grad_(False)

    def check_pipeline(self, pipeline) -> None:
        """
        Whether this model can judge what the (SPO or diffusers) pipeline makes. A model that came without tokenizers
        takes those of the pipeline; one with a transformer encodes prompts with it from now on.

        Raises:
            ValueError: for latents of another space, or another noise schedule.
        """
        if self.reads_with_pipeline:
            wrapped = wrap_pipeline(pipeline)
            if self.config.shared and wrapped.denoiser is not self.backbone.network:
                raise ValueError(
                    "The latent reward model shares the denoiser of another pipeline. Save it, and load it onto this one "
                    "with `LatentRewardModel.from_pretrained(path, pipeline=pipeline)`."
                )
            self.reader.take(wrapped)
            return
        pipeline = getattr(pipeline, "sd_pipeline", pipeline)
        if not isinstance(getattr(pipeline, "unet", None), UNet2DConditionModel):
            raise ValueError(
                f"The latent reward model judges latents of a UNet's noise schedule, and a {type(pipeline).__name__} has "
                "another one. Take a reward model that was made for this pipeline."
            )
        ours = {"channels": self.config.latent_channels, "scaling_factor": self.config.scaling_factor}
        if self.config.shift_factor:
            ours["shift_factor"] = self.config.shift_factor
        check_latent_space(ours, latent_space_of(wrap_pipeline(pipeline)))
        if not self.tokenizers:
            self.tokenizers = tokenizers_of(pipeline, len(self.text_encoders))

    # ---- loading and saving ----

    @classmethod
    def from_pipeline(
        cls, pipeline: Any, shared: bool = False, peft_config: PeftConfig | None = None, **config_kwargs
    ) -> "LatentRewardModel":
        r"""
        A fresh latent reward model with a copy of the part of a pipeline's denoiser that is read, and of a UNet's text
        encoders, ready to be trained. Its heads are drawn from torch's global generator, which has another seed in every
        process: call `set_seed` first, so that a training can be repeated.

        Args:
            pipeline (SPO or diffusers pipeline, path or Hub id):
                Where the weights come from; it is left as it is. Stable Diffusion 1, 2 and XL, or a transformer with two
                streams: Stable Diffusion 3, FLUX, FLUX.2, Qwen-Image.
            shared (`bool`, *optional*, defaults to `False`):
                Take the pipeline's own denoiser as the backbone, under a second adapter named "reward", and its text
                encoders. No weights exist twice. The policy must then be a LoRA; its adapter and the reward's are never
                active together, and outside of scoring the pipeline is as it was.
            peft_config (`peft.PeftConfig`, *optional*):
                That adapter; by default the family's.
            config_kwargs:
                Passed to [`LatentRewardModelConfig`], e.g. `guidance_scale=1.0`, or `blocks=[8, 16]` of a transformer; by
                default three quarters of its depth, as block 18 of 24 in LPO's reward of Stable Diffusion 3.

        Returns:
            [`LatentRewardModel`] in evaluation mode.

        Raises:
            `TypeError`: for anything else.
            `ValueError`: for blocks that do not exist.
        """
        if isinstance(pipeline, (str, Path)):
            pipeline = load_diffusers_pipeline(pipeline)
        if shared:
            return share_denoiser(cls, pipeline, peft_config, config_kwargs)
        pipeline = plain_pipeline(getattr(pipeline, "sd_pipeline", pipeline))
        if isinstance(getattr(pipeline, "transformer", None), nn.Module):
            return copy_transformer(cls, pipeline, config_kwargs)
        if not isinstance(getattr(pipeline, "unet", None), UNet2DConditionModel):
            raise TypeError(
                "A latent reward model is made from a pipeline with a `UNet2DConditionModel` (Stable Diffusion 1, 2 or "
                f"XL) or with a transformer of two streams, got `{type(pipeline).__name__}`."
            )
        encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
        encoders = [encoder for encoder in encoders if encoder is not None]
        vae = pipeline.vae.config
        settings = {
            "scaling_factor": vae.scaling_factor,
            "shift_factor": getattr(vae, "shift_factor", None),
            "base_model": named_base(pipeline),
        }
        model = copy_unet(cls, pipeline.unet, encoders, {**settings, **config_kwargs})
        model.tokenizers = tokenizers_of(pipeline, len(encoders))
        return model.eval()

    @classmethod
    def from_original_checkpoint(
        cls,
        folder_or_id: str | Path,
        subfolder: str | None = None,
        tokenizer: str | None = None,
        pipeline: Any | None = None,
        **config_kwargs,
    ) -> "LatentRewardModel":
        r"""
        One of the released latent rewards of LPO (https://huggingface.co/casiatao/LRM): `unet/` and `text_encoder/` (of
        SDXL also `text_encoder_2/`) in diffusers' format, and `state_dict.pt` with the heads. Only tensors are read.

        Args:
            folder_or_id (`str` or `Path`):
                Folder or Hub id, or one file with the state dict of the public code's model.
            subfolder (`str`, *optional*):
                Folder inside it, such as `"lrm_sd15"`.
            tokenizer (`str`, *optional*):
                Folder or Hub id of a pipeline that has the tokenizers. Without it they are looked for beside the
                weights, and otherwise taken from the pipeline that is trained.
            pipeline (SPO or diffusers pipeline, path or Hub id, *optional*):
                Of a single file: the pipeline that it was made from.
            config_kwargs:
                Passed to [`LatentRewardModelConfig`].

        Returns:
            [`LatentRewardModel`] in evaluation mode.

        Raises:
            `FileNotFoundError`: If a part is missing.
            `ValueError`: If keys or shapes of a network or of the heads do not fit; they are named.
        """
        return load_lpo(cls, folder_or_id, subfolder, tokenizer, pipeline, config_kwargs)

    @classmethod
    def from_dina_checkpoint(
        cls, folder_or_id: str | Path, pipeline: Any, shared: bool = False
    ) -> "LatentRewardModel":
        r"""
        A released DiNa-LRM (https://huggingface.co/liuhuohuo/DiNa-LRM-SD35M-12layers): an adapter on the first blocks of
        Stable Diffusion 3.5 Medium, and a query-attention head. Only tensors are read.

        Scores are the published (raw + 10) / 10. It was trained on all noise levels. Its authors noise encoded images to
        sigma .1, which is timestep 100 here, and generated latents to .4.

        Args:
            folder_or_id (`str` or `Path`):
                Folder or Hub id with `config.json` and `checkpoint/`.
            pipeline (SPO or diffusers pipeline, path or Hub id):
                Stable Diffusion 3.5 Medium. The adapter is merged into a copy of its first blocks.
            shared (`bool`, *optional*, defaults to `False`):
                Keep the adapter on the denoiser of the pipeline itself, as [`~LatentRewardModel.from_pipeline`] does.

        Returns:
            [`LatentRewardModel`] in evaluation mode.

        Raises:
            `FileNotFoundError`: If a file is missing.
            `ValueError`: If the files describe another architecture, or their keys or shapes do not fit; they are named.
        """
        return load_dina(cls, folder_or_id, pipeline, shared)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, pipeline: Any | None = None, **kwargs):
        r"""
        Loads what [`~LatentRewardModel.save_pretrained`] wrote. Arguments as in
        [`~transformers.PreTrainedModel.from_pretrained`], and one more; missing or unexpected weights are an error.

        Args:
            pipeline (SPO or diffusers pipeline, *optional*):
                The one whose latents are to be judged. A model that shares its denoiser needs it.
        """
        path = str(pretrained_model_name_or_path)
        require_existing(path, "latent reward model")
        where = {name: kwargs[name] for name in ("revision", "token", "cache_dir") if name in kwargs}
        subfolder = kwargs.get("subfolder", "")
        config = cls.config_class.from_pretrained(path, subfolder=subfolder, **where)
        if config.shared and pipeline is not None:
            file = locate_checkpoint(path, f"{subfolder}/model.safetensors".lstrip("/"), **where)
            return load_onto_pipeline(cls, pipeline, file, config)
        return_info = kwargs.pop("output_loading_info", False)
        if config.text_configs:
            kwargs.setdefault("key_mapping", names_of_other_versions(config.text_configs))
        model, info = load_whole(super().from_pretrained, path, "latent reward model", *model_args, **kwargs)
        if model.tokenizers is None:
            model.tokenizers = load_tokenizers(path, subfolder, len(model.text_encoders), **where)
        own = f"{subfolder}/{PIPELINE_FOLDER}".lstrip("/")
        if model.reader is not None and optional_file(path, f"{own}/model_index.json", **where) is not None:
            model.reader.find = partial(locate_folder, path, own, **where)
        if pipeline is not None:
            model.check_pipeline(pipeline)
        return (model, info) if return_info else model

    def save_pretrained(self, save_directory, *args, save_reader: bool | None = None, **kwargs):
        r"""
        Writes weights, configuration, tokenizers and model card to a folder that [`~LatentRewardModel.from_pretrained`] loads
        on its own. A card that is there stays. Arguments as in [`~transformers.PreTrainedModel.save_pretrained`], and one
        more.

        Args:
            save_reader (`bool`, *optional*, defaults to the attribute of this name, which is `True`):
                Of a model with a transformer: write its pipeline's text encoders, VAE and scheduler, too. Without them the
                folder is smaller by gigabytes, and the loaded model reads prompts once it was given a pipeline. Of one that
                shares its denoiser: write the LoRA.
        """
        save_reader = self.save_reader if save_reader is None else save_reader
        with published(self, self.describe(save_reader), save_directory, kwargs):
            if kwargs.get("is_main_process", True):
                save_what_reads(self, Path(save_directory), save_reader)
            # Under the names of its parameters, also if they were loaded under others: a checkpoint is read by them.
            kwargs.setdefault("save_original_format", False)
            super().save_pretrained(save_directory, *args, **kwargs)

    def describe(self, save_reader: bool = True) -> RewardDescription:
        """
        What its model card says about it.

        Args:
            save_reader (`bool`, *optional*, defaults to `True`): as in [`~LatentRewardModel.save_pretrained`].
        """
        if self.reader is not None and self.reader.pipeline is not None:
            sample = self.reader.pipeline.latent_shape()
        else:
            side = (self.config.transformer_config or self.config.unet_config).get("sample_size", 64)
            sample = (self.config.latent_channels, side, side)
        return latent_description(self.config, sample, bool(self.tokenizers), save_reader)


AutoConfig.register(LatentRewardModelConfig.model_type, LatentRewardModelConfig, exist_ok=True)
AutoModel.register(LatentRewardModelConfig, LatentRewardModel, exist_ok=True)
