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
Image-text metrics of the text-to-image literature, each a callable `(images (N, 3, H, W) in [0, 1], prompts) -> (N,)`.

| name | score | weights |
|---|---|---|
| `pickscore` | exp(logit_scale) cos | https://huggingface.co/yuvalkirstain/PickScore_v1 |
| `hps_v2.1`, `hps_v2.0` | 100 cos | https://huggingface.co/xswu/HPSv2 |
| `image_reward` | (MLP(BLIP) - mean) / std | https://huggingface.co/THUDM/ImageReward |
| `aesthetic` | MLP(image embedding of length 1) | https://github.com/christophschuhmann/improved-aesthetic-predictor |
| `clip_score` | 100 max(cos, 0) | https://huggingface.co/openai/clip-vit-large-patch14 |

These are the columns of the SPO paper (https://huggingface.co/papers/2406.04314), and CLIPScore. All run on
transformers' `CLIPModel` and `BlipVisionModel`/`BlipTextModel`, so that none needs torchvision or the packages the
scores were published with. The weights are the published files (`metric_weights`), and images are prepared as each
scorer prepares them (`metric_images`).
"""

import copy
import inspect
import os

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel, CLIPConfig, CLIPModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from ..hub_files import check_vocabulary, load_pretrained, load_strictly, load_tokenizer, require_existing
from .metric_images import ImagePreparation, prepare_hps_images
from .metric_weights import convert_image_reward, convert_open_clip, find_file, read_weights


# --- networks --------------------------------------------------------------------------------------------------------


class PredictorMLP(nn.Module):
    """The linear stack of the LAION aesthetic predictor and of ImageReward, 768-1024-128-64-16-1; no activations."""

    def __init__(self, input_size: int = 768, widths: tuple[int, ...] = (1024, 128, 64, 16)):
        super().__init__()
        layers = []
        size = input_size
        for width, dropout in zip(widths, (0.2, 0.2, 0.1, None), strict=True):
            layers.append(nn.Linear(size, width))
            if dropout is not None:  # takes an index in the names of the weights
                layers.append(nn.Dropout(dropout))
            size = width
        self.layers = nn.Sequential(*layers, nn.Linear(size, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:  # (B, input_size) -> (B,)
        return self.layers(features).squeeze(-1)


class ImageRewardModel(nn.Module):
    """
    ImageReward's network: BLIP's vision transformer, its text encoder with cross-attention on the image, and a linear
    stack on the first token, standardised.

    Args:
        vision_config ([`~transformers.BlipVisionConfig`]), text_config ([`~transformers.BlipTextConfig`]): sizes.
    """

    # Statistics of the raw reward, from the reference implementation.
    mean = 0.16717362830052426
    std = 1.0333394966054072

    def __init__(self, vision_config: BlipVisionConfig, text_config: BlipTextConfig):
        super().__init__()
        self.vision = BlipVisionModel(vision_config)
        self.text = BlipTextModel(text_config, add_pooling_layer=False)
        self.mlp = PredictorMLP(text_config.hidden_size)

    def forward(self, pixel_values, input_ids, attention_mask) -> torch.Tensor:  # (B, 3, H, W), (B, L), (B, L) -> (B,)
        image = self.vision(pixel_values=pixel_values).last_hidden_state
        hidden = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:-1], dtype=torch.long, device=image.device),
        ).last_hidden_state
        return (self.mlp(hidden[:, 0].float()) - self.mean) / self.std


# --- metrics ---------------------------------------------------------------------------------------------------------


class ImageMetric:
    """
    Base of all metrics: checks its inputs, works in batches, returns float32 on the CPU.

    Args:
        device (`torch.device` or `str`, *optional*): by default CUDA where there is one.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): dtype of the networks. Cosines are always computed
            in float32: in half precision a score near 20 has steps of 1/64.
        batch_size (`int`, *optional*, defaults to `32`): images scored together.
    """

    description: str = ""
    """What the score is and which weights it uses, for reports."""
    weights: dict[str, str] = {}
    """Folders, files and Hub ids of the weights, by the names of the arguments; [`load_metric`] notes them."""

    def __init__(self, device=None, dtype: torch.dtype = torch.float32, batch_size: int = 32):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device == torch.device("cuda"):  # with a number: which one is current may change later
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.dtype = dtype
        self.batch_size = batch_size

    def _place(self, module: nn.Module) -> nn.Module:
        return module.to(self.device, self.dtype).eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> "ImageMetric":
        """Moves its networks; trainers do it with a metric that is their reward."""
        self.device = torch.device(device)
        for name, value in vars(self).items():
            if isinstance(value, (nn.Module, torch.Tensor)):
                setattr(self, name, value.to(self.device))
        return self

    def _score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(N, 3, H, W)`): floating point, in [0, 1].
            prompts (`list[str]`): N prompts.

        Returns:
            `torch.Tensor` of shape `(N,)`: float32, on the CPU; higher is better.

        Raises:
            ValueError: if shapes, lengths or ranges do not fit, or an image is not finite.
        """
        self._check(images, prompts)
        scores = [torch.empty(0)]
        for start in range(0, len(images), self.batch_size):
            end = start + self.batch_size
            scores.append(self._score(images[start:end], list(prompts[start:end])).float().cpu())
        return torch.cat(scores)

    def _check(self, images: torch.Tensor, prompts: list[str]) -> None:
        name = type(self).__name__
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"{name} takes floating point images (N, 3, H, W) in [0, 1], got {tuple(images.shape)} of {images.dtype}."
            )
        if isinstance(prompts, str) or len(prompts) != len(images):
            count = "a single string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise ValueError(f"{name} takes one prompt per image, got {count} for {len(images)} images.")
        for image, prompt in zip(images, prompts, strict=True):
            if not image.isfinite().all():  # would become black in 8 bits, and get a score
                raise ValueError(
                    f"The image of the prompt {prompt!r} has NaN or infinite pixels; {name} cannot judge it."
                )
        if len(images) and (images.min() < -1e-3 or images.max() > 1 + 1e-3):
            raise ValueError(
                f"{name} takes images in [0, 1], got [{images.min().item():.3g}, {images.max().item():.3g}]; "
                "turn [-1, 1] into it by `images / 2 + 0.5`."
            )


class CLIPMetric(ImageMetric):
    """
    A metric made of the cosine of a CLIP's image and text embeddings; see its subclasses.

    Args:
        model ([`~transformers.CLIPModel`]): the CLIP.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): tokenizer of its text tower; image-only metrics need none.
        preparation (callable): `(N, 3, H, W)` in [0, 1] -> pixel values.
        description (`str`, *optional*): what the score is, for reports.
        kwargs: `device`, `dtype` and `batch_size`, see [`ImageMetric`].
    """

    def __init__(self, model: CLIPModel, tokenizer, preparation, description: str = "", **kwargs):
        super().__init__(**kwargs)
        # Before the cast: bfloat16 would turn the 100 of a trained CLIP into 99.
        self.logit_scale = model.logit_scale.detach().float().exp().to(self.device)
        self.model = self._place(model)
        check_vocabulary(tokenizer, model.config.text_config.vocab_size, "metric")
        self.tokenizer = tokenizer
        self.preparation = preparation
        self.description = description

    # Towers and projections one by one, because `get_image_features` returns a tensor in transformers 4 and a record
    # in 5.
    def image_embeds(self, images: torch.Tensor) -> torch.Tensor:
        """`(B, 3, H, W)` in [0, 1] -> `(B, projection_dim)` of length 1, float32."""
        pixel_values = self.preparation(images).to(self.device, self.dtype)
        pooled = self.model.vision_model(pixel_values=pixel_values).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    def text_embeds(self, prompts: list[str]) -> torch.Tensor:
        """`B` prompts -> `(B, projection_dim)` of length 1, float32."""
        length = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)
        encoded = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        # No attention mask: the causal mask already hides the padding behind the end of the text.
        pooled = self.model.text_model(input_ids=encoded["input_ids"].to(self.device)).pooler_output
        return F.normalize(self.model.text_projection(pooled).float(), dim=-1)

    def cosines(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """`(B,)` cosines between image and text, float32."""
        return (self.image_embeds(images) * self.text_embeds(prompts)).sum(dim=-1)


def _require_tokenizer(path: str):
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise FileNotFoundError(
            f"{str(path)!r} holds no tokenizer; pass the folder or Hub id that does as `processor`."
        )
    return tokenizer


class PickScore(CLIPMetric):
    """PickScore (https://huggingface.co/papers/2305.01569): `exp(logit_scale) * cos`, near 20 for typical images."""

    @classmethod
    def from_pretrained(
        cls,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        **kwargs,
    ) -> "PickScore":
        """
        Args:
            model (`str`, *optional*): folder or Hub id of a [`~transformers.CLIPModel`].
            processor (`str`, *optional*): folder or Hub id of its tokenizer and image settings; `None` for `model`.
            kwargs: `device`, `dtype` and `batch_size`, see [`ImageMetric`].
        """
        processor = model if processor is None else processor
        clip = load_pretrained(CLIPModel, model, "CLIP model")
        preparation = ImagePreparation.from_processor(processor, clip.config.vision_config.image_size)
        description = f"{cls.__name__}, {model}"
        return cls(clip, _require_tokenizer(processor), preparation, description=description, **kwargs)

    def _score(self, images, prompts):
        return self.logit_scale * self.cosines(images, prompts)


class CLIPScore(PickScore):
    """
    CLIPScore (https://huggingface.co/papers/2104.08718) in the common form `100 * max(cos, 0)`, without the paper's
    factor 2.5 and without its "A photo depicts" before the prompt.
    """

    @classmethod
    def from_pretrained(
        cls, model: str = "openai/clip-vit-large-patch14", processor: str | None = None, **kwargs
    ) -> "CLIPScore":
        """Arguments as in [`PickScore.from_pretrained`]."""
        return super().from_pretrained(model, processor, **kwargs)

    def _score(self, images, prompts):
        return 100 * self.cosines(images, prompts).clamp(min=0)


class HPSv2(CLIPMetric):
    """
    Human Preference Score v2 (https://huggingface.co/papers/2306.09341): `100 * cos` under a fine-tuned ViT-H/14, as
    its benchmark prints it (its `score` function returns the cosine without the factor).

    Difference: prompts pass through transformers' tokenizer, which does not repair broken Unicode and HTML entities
    first, as open_clip's does.
    """

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str = "xswu/HPSv2",
        filename: str = "HPS_v2.1_compressed.pt",
        clip: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        antialias: bool = True,
        **kwargs,
    ) -> "HPSv2":
        """
        Args:
            checkpoint (`str`, *optional*): the file, or a folder or Hub id that holds `filename`. A dictionary whose
                entry `"state_dict"` has open_clip's names.
            filename (`str`, *optional*): `HPS_v2.1_compressed.pt` or `HPS_v2_compressed.pt`.
            clip (`str`, *optional*): folder or Hub id of configuration and tokenizer of the same architecture in
                transformers' format. Its weights are not needed.
            antialias (`bool`, *optional*, defaults to `True`): see [`prepare_hps_images`].
            kwargs: `device`, `dtype` and `batch_size`, see [`ImageMetric`].
        """
        # Files first: a missing one is named before a network is built.
        path = find_file(checkpoint, filename)
        config = load_pretrained(CLIPConfig, clip, "CLIP configuration")
        tokenizer = _require_tokenizer(clip)
        settings = ImagePreparation.from_processor(clip)

        model = CLIPModel(config)
        load_strictly(model, convert_open_clip(read_weights(path, "state_dict")), path, f"the CLIP of {clip!r}")
        size = config.vision_config.image_size

        def preparation(images: torch.Tensor) -> torch.Tensor:
            return prepare_hps_images(images, size, settings.mean, settings.std, antialias)

        description = f"HPS v2, {checkpoint} {'' if os.path.isfile(checkpoint) else filename}".rstrip()
        return cls(model, tokenizer, preparation, description=description, **kwargs)

    def _score(self, images, prompts):
        return 100 * self.cosines(images, prompts)


class AestheticScore(CLIPMetric):
    """
    LAION's improved aesthetic predictor: a linear stack on CLIP ViT-L/14's image embedding of length 1. About 1 to 10;
    the prompt plays no part.

    Args:
        predictor ([`PredictorMLP`]): the stack.
        args, kwargs: arguments of [`CLIPMetric`].
    """

    def __init__(self, predictor: PredictorMLP, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.predictor = predictor.float().to(self.device).eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        predictor: str = "trl-lib/ddpo-aesthetic-predictor",
        filename: str = "aesthetic-model.pth",
        clip: str = "openai/clip-vit-large-patch14",
        **kwargs,
    ) -> "AestheticScore":
        """
        Args:
            predictor (`str`, *optional*): the file (the original is `sac+logos+ava1-l14-linearMSE.pth`), or a folder
                or Hub id that holds `filename`. TRL's copy of the original by default.
            filename (`str`, *optional*): name in that folder or repository.
            clip (`str`, *optional*): folder or Hub id of the CLIP.
            kwargs: `device`, `dtype` and `batch_size`, see [`ImageMetric`].
        """
        path = find_file(predictor, filename)
        weights = read_weights(path)
        model = load_pretrained(CLIPModel, clip, "CLIP model")
        preparation = ImagePreparation.from_processor(clip, model.config.vision_config.image_size, half="round")
        mlp = PredictorMLP(model.config.projection_dim)
        load_strictly(mlp, weights, path, f"the aesthetic predictor on embeddings of {clip!r}")
        description = f"LAION aesthetic predictor, {predictor} on {clip}"
        return cls(mlp, model, None, preparation, description=description, **kwargs)

    def _score(self, images, prompts):
        return self.predictor(self.image_embeds(images))


class ImageReward(ImageMetric):
    """
    ImageReward (https://huggingface.co/papers/2304.05977), standardised: 0 is an average image, 1 one deviation better.

    The weights are those of the `image-reward` package, the network is transformers' BLIP. That package needs
    torchvision, an old transformers and OpenAI's `clip` from a URL, and so cannot live in one environment with current
    diffusers; on equal weights both give the same scores.

    Args:
        model ([`ImageRewardModel`]): the network.
        tokenizer (`PreTrainedTokenizerBase`): BERT's, uncased.
        preparation (callable): `(N, 3, H, W)` in [0, 1] -> pixel values.
        description (`str`, *optional*): what the score is, for reports.
        kwargs: `device`, `dtype` and `batch_size`, see [`ImageMetric`].
    """

    max_length = 35  # tokens; longer prompts are cut, as in the reference implementation

    def __init__(self, model: ImageRewardModel, tokenizer, preparation, description: str = "", **kwargs):
        super().__init__(**kwargs)
        mlp = copy.deepcopy(model.mlp).float()  # before the cast: rounded weights would stay rounded
        self.model = self._place(model)
        self.model.mlp = mlp.to(self.device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.preparation = preparation
        self.description = description

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str = "THUDM/ImageReward",
        filename: str = "ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
        vision_config: BlipVisionConfig | None = None,
        text_config: BlipTextConfig | None = None,
        **kwargs,
    ) -> "ImageReward":
        """
        Args:
            checkpoint (`str`, *optional*): the file, or a folder or Hub id that holds `filename`.
            filename (`str`, *optional*): name in that folder or repository.
            tokenizer (`str`, *optional*): folder or Hub id of BERT's uncased tokenizer.
            vision_config, text_config (*optional*): sizes of another BLIP; by default those of BLIP large, which the
                released weights have.
            kwargs: `device`, `dtype` and `batch_size`, see [`ImageMetric`].
        """
        # Files first: a missing one is named before a network is built.
        path = find_file(checkpoint, filename)
        require_existing(tokenizer, "tokenizer")
        try:
            bert_tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        except OSError as error:
            raise FileNotFoundError(f"{tokenizer!r} holds no tokenizer: {error}") from error

        # BLIP large, unless other sizes are given.
        vision_config = vision_config or BlipVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=224,
            patch_size=16,
            layer_norm_eps=1e-6,
        )
        text_config = text_config or BlipTextConfig(
            vocab_size=30524,
            hidden_size=768,
            encoder_hidden_size=vision_config.hidden_size,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=512,
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            is_decoder=True,  # gives its layers cross-attention; it still sees the whole text
        )

        # The weights come before the network: a bad file costs no model.
        weights = convert_image_reward(read_weights(path))
        model = ImageRewardModel(vision_config, text_config)
        load_strictly(model, weights, path, "ImageReward's BLIP")
        preparation = ImagePreparation(vision_config.image_size, vision_config.image_size, half="round")
        description = f"ImageReward, {checkpoint}"
        return cls(model, bert_tokenizer, preparation, description=description, **kwargs)

    def _score(self, images, prompts):
        encoded = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        pixel_values = self.preparation(images).to(self.device, self.dtype)
        return self.model(
            pixel_values, encoded["input_ids"].to(self.device), encoded["attention_mask"].to(self.device)
        )


# Metric names with their class and the arguments of its `from_pretrained`.
METRICS = {
    "pickscore": (PickScore, {}),
    "hps_v2.1": (HPSv2, {}),
    "hps_v2.0": (HPSv2, {"filename": "HPS_v2_compressed.pt"}),
    "image_reward": (ImageReward, {}),
    "aesthetic": (AestheticScore, {}),
    "clip_score": (CLIPScore, {}),
}


def load_metric(name: str, **kwargs) -> ImageMetric:
    """
    A metric with its published weights.

    Args:
        name (`str`): one of `METRICS`: `"pickscore"`, `"hps_v2.1"`, `"hps_v2.0"`, `"image_reward"`, `"aesthetic"`,
            `"clip_score"`.
        kwargs: arguments of the `from_pretrained` of its class: `device`, `dtype`, `batch_size`, and where the weights
            are, if not at their Hub ids.

    Returns:
        [`ImageMetric`].

    Raises:
        ValueError: for another name.

    Example:

    ```python
    >>> from trl_spo.evaluation.metrics import load_metric

    >>> pickscore = load_metric("pickscore", dtype=torch.float16)
    >>> scores = pickscore(images, prompts)  # (N,)
    ```
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; the metrics are {', '.join(METRICS)}.")
    metric, defaults = METRICS[name]
    settings = {**defaults, **kwargs}
    loaded = metric.from_pretrained(**settings)
    loaded.weights = _sources(metric, settings)
    return loaded


def _sources(metric: type[ImageMetric], settings: dict) -> dict[str, str]:
    """The folders, files and Hub ids that `from_pretrained` reads with these settings, by the name of the argument."""
    found = {}
    for name, parameter in inspect.signature(metric.from_pretrained).parameters.items():
        value = settings.get(name, parameter.default)
        if isinstance(value, (str, os.PathLike)):
            found[name] = os.fspath(value)
    return found
