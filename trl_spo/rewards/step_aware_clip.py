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
The step-aware reward model of SPO (https://huggingface.co/papers/2406.04314, section 3.2, there "step-aware preference
model"): a CLIP whose vision tower knows the timestep of the image it judges.

    score(x, c, t) = exp(logit_scale) * cos(f_image(x, t), f_text(c))

The timestep enters by adaLN-Zero modulation, as in DiT (https://huggingface.co/papers/2212.09748). With `c_t` the
embedded timestep and `m = Linear(SiLU(c_t))`, each vision block computes

    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = m        # 6 parts, in this order
    h = h + gate_a * attn(LN1(h) * (1 + scale_a) + shift_a)
    h = h + gate_m * mlp(LN2(h) * (1 + scale_m) + shift_m)

and the class token after the last layer norm becomes `pooled * (1 + scale) + shift`. A fresh model has every weight of
`m` at 0, gates at 1 and the rest at 0, so it *is* the CLIP it was made from, for every timestep.

What differs from the public code (https://github.com/RockeyCoss/SPO):
- its inference class fills the bias of the blocks' modulation with ones, which is not CLIP; here only gates are 1;
- one image preparation, [`prepare_images`], serves training and scoring; there they differ;
- the model can be cast to half precision, except for `logit_scale`, and missing weights are an error rather than
  uninitialised memory.

Attention, MLP, embeddings and the text tower are those of transformers' `CLIPModel`; only the loop over the vision
blocks is ours. It calls `vision_model.{embeddings,pre_layrnorm,encoder.layers,post_layernorm}` one by one, because the
classes around them changed between transformers 4.57 (`CLIPVisionTransformer`, feature getters return tensors) and 5
(`CLIPVisionModel` itself holds the layers, feature getters return records) while these submodules, their names and
the names of their parameters did not. So the names below `model.` are those of the released checkpoints with either.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel, PreTrainedModel

from ..hub_files import (
    canonical_name,
    check_vocabulary,
    image_settings,
    load_pretrained,
    load_strictly,
    load_tokenizer,
    load_whole,
    locate_checkpoint,
    read_model_type,
    read_state_dict,
)
from ..model_cards import hub_id
from .inputs import StepRewardOutput, check_texts, checked_timesteps
from .publishing import PushesWholeFolder, RewardDescription, published, step_aware_description
from .step_aware_config import CLIP_MEAN, CLIP_STD, StepAwareRewardModelConfig
from .step_conditioning import AdaLNModulation, StepAwareCLIPEncoderLayer, TimestepEmbedder


def prepare_images(
    images: torch.Tensor,
    size: int,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
) -> torch.Tensor:
    r"""
    Turns decoded images into CLIP pixel values, differentiably. The one preparation for training and scoring.

    Bicubic resize (no antialiasing, as the released reward models were queried) until the short side is `size`,
    centre crop if the image is not square, [-1, 1] to [0, 1], clamp *after* the resize since bicubic overshoots, then
    normalisation. In float32, whatever comes in.

    Args:
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
            Floating point images in [-1, 1]; a VAE's small excursions beyond are clamped.
        size (`int`):
            Side of the square that the vision tower expects.
        mean (`tuple[float, float, float]`):
            Channel means, for images in [0, 1].
        std (`tuple[float, float, float]`):
            Channel standard deviations, for images in [0, 1].

    Returns:
        `torch.Tensor` of shape `(batch_size, 3, size, size)`: float32 pixel values.

    Raises:
        `ValueError`: If `images` is not a floating point tensor of that shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"`images` must have shape (batch_size, 3, height, width), got {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise ValueError(f"`images` must be floating point in [-1, 1], got {images.dtype}; use `x / 127.5 - 1`.")
    images = images.float()
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    new_height = int(height * scale + 0.5)
    new_width = int(width * scale + 0.5)
    if (new_height, new_width) != (height, width):
        images = F.interpolate(images, (new_height, new_width), mode="bicubic", align_corners=False, antialias=False)
    if new_height != new_width:
        top = round((new_height - size) / 2)  # Python's rounding: half to even
        left = round((new_width - size) / 2)
        images = images[..., top : top + size, left : left + size]
    images = (images / 2 + 0.5).clamp(0, 1)
    # Channel by channel with numbers: as tensors they would be copied to the device, and a copy waits for it.
    return torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)


class StepAwareRewardModel(PushesWholeFolder, PreTrainedModel):
    r"""
    Scores how well an image, predicted at a timestep of the denoising, fits its prompt and human preference. The reward
    model of [SPO](https://huggingface.co/papers/2406.04314).

    Args:
        config ([`StepAwareRewardModelConfig`]):
            Configuration. The model built from it has random CLIP weights; see [`~StepAwareRewardModel.from_clip`],
            [`~StepAwareRewardModel.from_original_checkpoint`] and [`~StepAwareRewardModel.from_pretrained`] for
            trained ones.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer of the text tower, kept next to the weights by `save_pretrained`. Without it prompts must come as
            `input_ids` or `text_features`.

    Example:

    ```python
    >>> from trl_spo import StepAwareRewardModel

    >>> reward_model = StepAwareRewardModel.from_clip(
    ...     "yuvalkirstain/PickScore_v1", processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    ... )
    >>> scores = reward_model.score(images, ["a red fox"] * len(images), timesteps=501)
    ```
    """

    config_class = StepAwareRewardModelConfig
    base_model_prefix = ""
    main_input_name = "images"
    supports_gradient_checkpointing = True
    _repeated_blocks = ["StepAwareCLIPEncoderLayer"]  # what a compiler should look at, as in diffusers
    _no_split_modules = ["CLIPEncoderLayer", "StepAwareCLIPEncoderLayer", "CLIPTextEmbeddings", "CLIPVisionEmbeddings"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["logit_scale"]  # where `from_pretrained` casts; see `cast`
    scores = "images"
    """What this reward model scores; the rollout decodes latents for it."""

    def __init__(self, config: StepAwareRewardModelConfig, tokenizer=None):
        super().__init__(config)
        self.model = CLIPModel(config.clip_config)
        vision_model = self.model.vision_model
        vision_config = vision_model.config
        hidden_size = vision_config.hidden_size
        vision_model.encoder.layers = nn.ModuleList(
            StepAwareCLIPEncoderLayer(vision_config) for _ in range(vision_config.num_hidden_layers)
        )
        vision_model.adaLN_modulation = AdaLNModulation(hidden_size, num_parts=2)
        self.model.t_embedder = TimestepEmbedder(hidden_size, config.frequency_embedding_size, config.max_period)
        self.tokenizer = tokenizer
        self.post_init()
        # After `post_init`, which hands these layers to CLIP's own initialisation.
        self._reset_step_conditioning()
        self._freeze_unused_step_parameters()

    def _reset_step_conditioning(self):
        """Makes the model equal to its CLIP for every timestep."""
        for module in self.model.modules():
            if isinstance(module, AdaLNModulation):
                module.reset_to_identity()
        for linear in (self.model.t_embedder.mlp[0], self.model.t_embedder.mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def _freeze_unused_step_parameters(self):
        """Without step conditioning these take no part in the forward pass, which distributed training refuses."""
        for name, parameter in self.named_parameters():
            if _is_step_parameter(name) and not self.config.step_conditioning:
                parameter.requires_grad_(False)

    def freeze_text_tower(self):
        """Stops training the text encoder and its projection; the vision tower goes on alone."""
        self.model.text_model.requires_grad_(False)
        self.model.text_projection.requires_grad_(False)

    # ---- precision ----

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the networks. `logit_scale`, the first parameter, may be in float32 beside them."""
        return self.model.visual_projection.weight.dtype

    def cast(self, dtype: torch.dtype) -> "StepAwareRewardModel":
        r"""
        Casts the networks, in place, and leaves `logit_scale` in float32.

        `exp(logit_scale)` multiplies every score, so rounding it scales all of them: in bfloat16 the ln 100 = 4.605 of
        a trained CLIP becomes 4.594, and scores 1.1% smaller. That is what `.to(dtype)` does.

        Args:
            dtype (`torch.dtype`):
                A floating point type, such as `torch.bfloat16`.

        Returns:
            [`StepAwareRewardModel`]: the model itself.

        Raises:
            `TypeError`: If `dtype` is not a floating point type.
        """
        logit_scale = self.model.logit_scale.detach().float().clone()
        self.to(dtype)
        self.model.logit_scale.data = logit_scale
        return self

    # ---- features and scores ----

    def tokenize(self, prompts: list[str]) -> torch.Tensor:
        r"""
        Token ids of prompts, padded (or cut) to the text tower's length with the tokenizer's pad token.

        Args:
            prompts (`list[str]`):
                Prompts.

        Returns:
            `torch.Tensor` of shape `(len(prompts), max_length)`: int64 ids on the model's device.
        """
        if self.tokenizer is None:
            raise ValueError(
                "This reward model has no tokenizer, so it cannot read prompts. Load it with "
                "`from_clip(..., processor=...)`, set `reward_model.tokenizer`, or pass `input_ids`."
            )
        check_texts(prompts)
        max_length = min(self.tokenizer.model_max_length, self.config.clip_config.text_config.max_position_embeddings)
        encoded = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=max_length, return_tensors="pt"
        )
        return encoded["input_ids"].to(self.device)

    def get_text_features(self, input_ids: torch.Tensor) -> torch.Tensor:
        r"""
        Text features, not normalised.

        Args:
            input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`):
                Token ids, padded; no attention mask is used, the causal mask hides the padding.

        Returns:
            `torch.Tensor` of shape `(batch_size, projection_dim)`.
        """
        if input_ids.ndim != 2:
            raise ValueError(f"`input_ids` must have shape (batch_size, length), got {tuple(input_ids.shape)}.")
        pooled = self.model.text_model(input_ids=input_ids.to(self.device)).pooler_output
        return self.model.text_projection(pooled)

    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        r"""
        Text features of prompts, not normalised. Each distinct prompt passes through the text tower once.

        Args:
            prompts (`list[str]`):
                Prompts, repeats allowed.

        Returns:
            `torch.Tensor` of shape `(len(prompts), projection_dim)`.
        """
        unique = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        features = self.get_text_features(self.tokenize(list(unique)))
        if len(unique) == len(prompts):
            return features
        return features[torch.tensor([unique[prompt] for prompt in prompts], device=features.device)]

    def get_image_features(
        self, pixel_values: torch.Tensor, timesteps: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        r"""
        Image features at their timesteps, not normalised.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`):
                Images as [`prepare_images`] returns them.
            timesteps (`torch.Tensor` of shape `(batch_size,)` or `()`, or `int`, *optional*):
                Integer timesteps in `[0, num_train_timesteps)`. `None` stands for clean images, timestep 0.

        Returns:
            `torch.Tensor` of shape `(batch_size, projection_dim)`.

        Raises:
            `ValueError`: If shapes do not fit or a timestep is out of range. The range is checked where timesteps are
            given as numbers or on the CPU; those on an accelerator are trusted, as reading them would wait for it.
        """
        size = self.config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"`pixel_values` must have shape (batch_size, 3, {size}, {size}), got {tuple(pixel_values.shape)}; "
                "`prepare_images` makes them from images of any size."
            )
        step_embedding = None
        if self.config.step_conditioning:
            step_embedding = self.model.t_embedder(
                checked_timesteps(timesteps, len(pixel_values), self.config.num_train_timesteps, self.device)
            )
        vision_model = self.model.vision_model
        hidden_states = vision_model.embeddings(pixel_values.to(self.device, self.dtype))
        hidden_states = vision_model.pre_layrnorm(hidden_states)  # (B, N, d)
        for layer in vision_model.encoder.layers:
            hidden_states = layer(hidden_states, step_embedding)
        pooled = vision_model.post_layernorm(hidden_states[:, 0])  # (B, d)
        if step_embedding is not None:
            shift, scale = vision_model.adaLN_modulation(step_embedding)
            pooled = pooled * (1 + scale) + shift
        return self.model.visual_projection(pooled)

    def forward(
        self,
        images: torch.Tensor,
        prompts: list[str] | None = None,
        timesteps: torch.Tensor | int | None = None,
        input_ids: torch.Tensor | None = None,
        text_features: torch.Tensor | None = None,
    ) -> StepRewardOutput:
        r"""
        Scores images and returns the normalised features with the scores. Arguments as in
        [`~StepAwareRewardModel.score`].

        Returns:
            [`StepRewardOutput`].
        """
        # Check the text first: encoding images is the larger part of the work.
        texts = [text for text in (prompts, input_ids, text_features) if text is not None]
        if len(texts) != 1:
            raise ValueError("Give the text as exactly one of `prompts`, `input_ids` and `text_features`.")
        text = texts[0]
        pixel_values = prepare_images(
            images.to(self.device), self.config.image_size, self.config.image_mean, self.config.image_std
        )
        if isinstance(text, str) or len(text) != len(images):
            raise ValueError(
                f"There must be one text per image, got {1 if isinstance(text, str) else len(text)} texts for "
                f"{len(images)} images."
            )

        # Features of both sides.
        if prompts is not None:
            text_features = self.encode_prompts(prompts)
        elif input_ids is not None:
            text_features = self.get_text_features(input_ids)
        expected = (len(images), self.config.clip_config.projection_dim)
        if tuple(text_features.shape) != expected:
            raise ValueError(f"`text_features` must have shape {expected}, got {tuple(text_features.shape)}.")
        image_features = self.get_image_features(pixel_values, timesteps)

        # Normalisation and product in float32: in half precision a score near 20 has steps of 1/64.
        image_embeds = F.normalize(image_features.float(), dim=-1)
        text_embeds = F.normalize(text_features.to(self.device).float(), dim=-1)
        logit_scale = self.model.logit_scale.float().exp()
        scores = logit_scale * (image_embeds * text_embeds).sum(dim=-1)
        return StepRewardOutput(scores, image_embeds, text_embeds, logit_scale)

    def score(
        self,
        images: torch.Tensor,
        prompts: list[str] | None = None,
        timesteps: torch.Tensor | int | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        text_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        Scores images against their prompts at their timesteps. Differentiable in the images.

        Args:
            images (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
                Images in [-1, 1], of any size: predictions of the clean image, as the VAE decodes them.
            prompts (`list[str]`, *optional*):
                One prompt per image. Repeats are encoded once.
            timesteps (`torch.Tensor` of shape `(batch_size,)` or `()`, or `int`, *optional*):
                Integer timesteps in `[0, num_train_timesteps)` at which the images were predicted. `None` stands for
                clean images, timestep 0.
            input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids instead of `prompts`.
            text_features (`torch.Tensor` of shape `(batch_size, projection_dim)`, *optional*):
                Features from [`~StepAwareRewardModel.encode_prompts`] instead of `prompts`, so that a rollout encodes
                each prompt once.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`: scores, float32. The probability that humans prefer one of two
            images is the softmax over their scores.

        Raises:
            `ValueError`: If shapes or lengths do not fit, a timestep is out of range, or the text is not given once.
            The range is checked where timesteps are given as numbers or on the CPU; those on an accelerator are
            trusted, as reading them would wait for it. Without step conditioning timesteps are not looked at.
        """
        return self.forward(images, prompts, timesteps, input_ids=input_ids, text_features=text_features).scores

    # ---- loading and saving ----

    @classmethod
    def from_clip(cls, path_or_id: str, processor: str | None = None, **config_kwargs) -> "StepAwareRewardModel":
        r"""
        A fresh reward model that equals a CLIP (PickScore, for example) for every timestep, ready to be trained.

        The embedding of the timestep is drawn from torch's global generator, which has another seed in every process: call
        `set_seed` first, so that a training can be repeated.

        Args:
            path_or_id (`str`):
                Folder or Hub id of a [`~transformers.CLIPModel`].
            processor (`str`, *optional*, defaults to `path_or_id`):
                Folder or Hub id of its tokenizer and image settings.
            config_kwargs:
                Passed to [`StepAwareRewardModelConfig`], e.g. `step_conditioning=False`.

        Returns:
            [`StepAwareRewardModel`] in evaluation mode.
        """
        clip = load_pretrained(CLIPModel, path_or_id, "CLIP model")
        processor = path_or_id if processor is None else processor
        settings = {"base_model": hub_id(path_or_id), **image_settings(processor), **config_kwargs}
        config = cls.config_class(clip.config, **settings)
        model = cls(config, tokenizer=_load_own_tokenizer(processor, config)).cast(clip.visual_projection.weight.dtype)
        weights = {f"model.{name}": weight for name, weight in clip.state_dict().items()}
        weights |= {name: value for name, value in model.state_dict().items() if _is_step_parameter(name)}
        load_strictly(model, weights, path_or_id, "the step-aware reward model")
        return model.eval()

    @classmethod
    def from_original_checkpoint(
        cls,
        checkpoint: str,
        clip: str,
        processor: str | None = None,
        filename: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | bool | None = None,
        **config_kwargs,
    ) -> "StepAwareRewardModel":
        r"""
        A reward model from a checkpoint in the format of the SPO authors. Released are
        `sd-v1-5_step-aware_preference_model.bin` and `sdxl_step-aware_preference_model.bin` of
        https://huggingface.co/SPO-Diffusion-Models/Step-Aware_Preference_Models.

        Only tensors are read (`weights_only`): a file that wants to run code is refused. Old CLIP buffers and the
        doubled tower prefixes of some transformers versions are put right; any other name that does not fit is an
        error.

        Args:
            checkpoint (`str`):
                The `.bin`, `.pt` or `.safetensors` file, a flat state dict. With `filename`, the Hub id of its
                repository, or a folder.
            clip (`str`):
                Folder or Hub id whose `config.json` tells the architecture, `"yuvalkirstain/PickScore_v1"` for the
                released files. Its weights are not needed.
            processor (`str`, *optional*, defaults to `clip`):
                Folder or Hub id of tokenizer and image settings, `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"` for the
                released files.
            filename (`str`, *optional*):
                Name of the file in the repository or folder `checkpoint`.
            revision (`str`, *optional*):
                Branch, tag or commit of the repository.
            cache_dir (`str`, *optional*):
                Where downloads are kept, if not in the Hub's usual cache.
            token (`str` or `bool`, *optional*):
                Access token of the Hub.
            config_kwargs:
                Passed to [`StepAwareRewardModelConfig`].

        Returns:
            [`StepAwareRewardModel`] in evaluation mode.

        Example:

        ```python
        >>> reward_model = StepAwareRewardModel.from_original_checkpoint(
        ...     "SPO-Diffusion-Models/Step-Aware_Preference_Models",
        ...     filename="sd-v1-5_step-aware_preference_model.bin",
        ...     clip="yuvalkirstain/PickScore_v1",
        ...     processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        ... )
        ```

        Raises:
            `FileNotFoundError`: If there is no such file, or the Hub cannot be reached.
            `ValueError`: If the file is unsafe, or its keys or shapes are not those of the architecture; they are
            named at once, the first ten of each kind.
        """
        base_model = hub_id(checkpoint)
        checkpoint = locate_checkpoint(checkpoint, filename, revision=revision, cache_dir=cache_dir, token=token)
        weights = {canonical_name(name): weight for name, weight in read_state_dict(checkpoint).items()}
        processor = clip if processor is None else processor
        clip_config = load_pretrained(CLIPConfig, clip, "CLIP configuration")
        settings = {"base_model": base_model, **image_settings(processor), **config_kwargs}
        config = cls.config_class(clip_config, **settings)
        model = cls(config, tokenizer=_load_own_tokenizer(processor, config))
        load_strictly(model, weights, checkpoint, f"the CLIP architecture of {str(clip)!r}")
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        r"""
        Loads what [`~StepAwareRewardModel.save_pretrained`] wrote: weights, configuration and tokenizer. Arguments as
        in [`~transformers.PreTrainedModel.from_pretrained`]; missing or unexpected weights are an error.
        """
        path = str(pretrained_model_name_or_path)
        where = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in kwargs}
        if kwargs.get("config") is None:
            model_type = read_model_type(path, where)
            if model_type != cls.config_class.model_type:
                raise ValueError(
                    f"{path!r} holds a {model_type!r} model, not a step-aware reward model. Make one from a CLIP with "
                    "`StepAwareRewardModel.from_clip`."
                )
        return_info = kwargs.pop("output_loading_info", False)
        model, info = load_whole(super().from_pretrained, path, "step-aware reward model", *model_args, **kwargs)
        model._freeze_unused_step_parameters()  # loading in transformers 5 switches gradients on again
        if model.tokenizer is None:
            model.tokenizer = _load_own_tokenizer(path, model.config, **where)
        return (model, info) if return_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        r"""
        Writes weights, configuration (with the image settings), tokenizer and model card to a folder that
        [`~StepAwareRewardModel.from_pretrained`] loads on its own. A card that is there stays. Arguments as in
        [`~transformers.PreTrainedModel.save_pretrained`].
        """
        with published(self, self.describe(), save_directory, kwargs):
            if self.tokenizer is not None and kwargs.get("is_main_process", True):
                self.tokenizer.save_pretrained(save_directory)
            super().save_pretrained(save_directory, *args, **kwargs)

    def describe(self) -> RewardDescription:
        """What its model card says about it."""
        return step_aware_description(self.config)


def _load_own_tokenizer(path: str, config: StepAwareRewardModelConfig, **where):
    """The tokenizer in a folder or Hub id, if there is one; it must fit the text tower."""
    tokenizer = load_tokenizer(path, **where)
    check_vocabulary(tokenizer, config.clip_config.text_config.vocab_size, "reward model")
    return tokenizer


def _is_step_parameter(name: str) -> bool:
    return "adaLN_modulation." in name or "t_embedder." in name


AutoConfig.register(StepAwareRewardModelConfig.model_type, StepAwareRewardModelConfig, exist_ok=True)
AutoModel.register(StepAwareRewardModelConfig, StepAwareRewardModel, exist_ok=True)
