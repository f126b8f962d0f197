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
Models of the benchmarks: real diffusers and transformers classes with random weights, at four sizes.

| preset | UNet | latents | VAE decodes to | reward model |
|---|---|---|---|---|
| `tiny` | 8/16 | 8x8 | 16 px | two layers of width 16 at 16 px |
| `mid` | 96/192/384, 41M | 32x32 | 256 px, 32/64/128/128 | ViT-B/16 at 224 px, text 12 layers of width 512 |
| `sd15` | Stable Diffusion 1.5 | 64x64 | 512 px | ViT-H/14 at 224 px, text 24 layers of width 1024 |
| `sdxl` | Stable Diffusion XL | 128x128 | 1024 px | the same |

Time and memory do not depend on the values of weights. The module runs beside diffusers 0.26 and transformers 4.40 too,
so that other code can be timed on the same shapes; it imports nothing of `trl_spo`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)


@dataclass(frozen=True)
class Preset:
    """Shapes of one size. `unet`, `vae`, `text`, `vision`, ... are keyword arguments of the classes."""

    latent_size: int
    unet: dict
    vae: dict
    text: dict
    reward_text: dict
    reward_vision: dict
    projection_dim: int
    prompts: int = 2
    pairs_per_batch: int = 8
    text_2: dict | None = None
    rollout: dict = field(default_factory=lambda: {"num_candidates": 4, "num_inner_steps": 1})
    lora_rank: int = 4


def _down_up(levels: int, attention: tuple[bool, ...]) -> dict:
    down = tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention)
    up = tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention))
    assert len(down) == levels
    return {"down_block_types": down, "up_block_types": up}


def _text(width: int, layers: int, heads: int, length: int = 77, **kwargs) -> dict:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "max_position_embeddings": length, **kwargs}


def _vision(width: int, layers: int, heads: int, image_size: int, patch_size: int, **kwargs) -> dict:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "image_size": image_size, "patch_size": patch_size, **kwargs}


_VIT_H = _vision(1280, 32, 16, 224, 14, hidden_act="gelu")
_VIT_H_TEXT = _text(1024, 24, 16, hidden_act="gelu")

PRESETS = {
    "tiny": Preset(
        latent_size=8,
        unet={
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "cross_attention_dim": 16,
            **_down_up(2, (False, True)),
        },
        vae={"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4},
        text=_text(16, 2, 2, length=8),
        reward_text=_text(16, 2, 2, length=8),
        reward_vision=_vision(16, 2, 2, 16, 8),
        projection_dim=12,
    ),
    "mid": Preset(
        latent_size=32,
        unet={
            "block_out_channels": (96, 192, 384),
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 512,
            **_down_up(3, (True, True, False)),
        },
        vae={"block_out_channels": (32, 64, 128, 128), "layers_per_block": 2},
        text=_text(512, 12, 8),
        reward_text=_text(512, 12, 8),
        reward_vision=_vision(768, 12, 12, 224, 16),
        projection_dim=512,
    ),
    "sd15": Preset(
        latent_size=64,
        unet={
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
            **_down_up(4, (True, True, True, False)),
        },
        vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
        text=_text(768, 12, 12),
        reward_text=_VIT_H_TEXT,
        reward_vision=_VIT_H,
        projection_dim=1024,
        prompts=10,
        pairs_per_batch=10,
    ),
    "sdxl": Preset(
        latent_size=128,
        unet={
            "block_out_channels": (320, 640, 1280),
            "layers_per_block": 2,
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            **_down_up(3, (False, True, True)),
        },
        vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "scaling_factor": 0.13025},
        text=_text(768, 12, 12),
        text_2=_text(1280, 32, 20, hidden_act="gelu", projection_dim=1280),
        reward_text=_VIT_H_TEXT,
        reward_vision=_VIT_H,
        projection_dim=1024,
        prompts=2,
        pairs_per_batch=2,
        rollout={"num_candidates": 2, "num_inner_steps": 4},
        lora_rank=64,
    ),
}


def write_tokenizer(folder: str | Path, max_length: int) -> CLIPTokenizer:
    """A `CLIPTokenizer` that knows letters and digits: enough for timing, where only the padded length counts."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789")
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=max_length)


def _text_config(tokenizer, kwargs: dict) -> CLIPTextConfig:
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPTextConfig(vocab_size=len(tokenizer), **special, **kwargs)


def build_pipeline(name: str, folder: str | Path, seed: int = 0):
    """
    A diffusers pipeline of preset `name` with random weights, float32, on the CPU.

    Args:
        name (`str`): one of `PRESETS`.
        folder (`str` or `Path`): where tokenizer files may be written.
        seed (`int`, *optional*, defaults to `0`): of the weights.
    """
    # The parts that all families have.
    preset = PRESETS[name]
    torch.manual_seed(seed)
    tokenizer = write_tokenizer(Path(folder) / "tokenizer", preset.text["max_position_embeddings"])
    levels = len(preset.vae["block_out_channels"])
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        sample_size=preset.latent_size * 2 ** (levels - 1),
        **preset.vae,
    )
    components = {
        "vae": vae.eval(),
        "unet": UNet2DConditionModel(sample_size=preset.latent_size, in_channels=4, out_channels=4, **preset.unet),
        "text_encoder": CLIPTextModel(_text_config(tokenizer, preset.text)).eval(),
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
    }

    # A second text encoder makes it SDXL.
    if preset.text_2 is not None:
        second = CLIPTextModelWithProjection(_text_config(tokenizer, preset.text_2)).eval()
        pipeline = StableDiffusionXLPipeline(**components, text_encoder_2=second, tokenizer_2=tokenizer)
    else:
        pipeline = StableDiffusionPipeline(
            **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def clip_config(name: str, folder: str | Path) -> tuple[CLIPConfig, CLIPTokenizer]:
    """Configuration of the reward model's CLIP, and a tokenizer for it written to `folder`."""
    preset = PRESETS[name]
    tokenizer = write_tokenizer(folder, preset.reward_text["max_position_embeddings"])
    text = _text_config(tokenizer, preset.reward_text).to_dict()
    vision = dict(preset.reward_vision)
    text["projection_dim"] = vision["projection_dim"] = preset.projection_dim
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=preset.projection_dim)
    return config, tokenizer
