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

"""Tiny models built from the real classes, and small helpers that several test modules share."""

import json
import os
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from trl_spo import SPOConfig, StepRewardConfig


DEVICE = os.environ.get("TRL_SPO_TEST_DEVICE", "cpu")  # where the tests train that do not insist on a device
WORDS = "a the red green blue cat dog bird on in of photo painting small large".split()
PROMPTS = ["a red cat", "a blue dog", "a green bird", "a small photo of a cat", "a painting", "the large dog"]


def device_settings(device: str | None = None) -> dict:
    """What a config has to say so that training happens on `device`, by default on `DEVICE`."""
    return {"use_cpu": (device or DEVICE) == "cpu"}


def tiny_spo_config(folder: str | Path, **settings) -> SPOConfig:
    """
    A config for the tiny pipelines: four of five steps branch, every pair is valid, nothing is saved or reported.
    `settings` come last.
    """
    defaults = {
        "output_dir": str(folder),
        "num_inference_steps": 5,
        "branch_start_step": 1,
        "guidance_scale": 3.0,
        "preference_threshold": 0.0,
        "per_device_rollout_batch_size": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return SPOConfig(**{**defaults, **device_settings(), **settings})


def tiny_step_reward_config(folder: str | Path, **settings) -> StepRewardConfig:
    """A config for tiny reward models: two steps of four pairs, nothing is saved or reported. `settings` come last."""
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "resolution": 16,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return StepRewardConfig(**{**defaults, **device_settings(), **settings})


def tiny_tokenizer(folder: str | Path, max_length: int = 8) -> CLIPTokenizer:
    """A word-level CLIPTokenizer, written as the two files that every transformers version reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    tokens = letters + [letter + "</w>" for letter in letters] + [w + "</w>" for w in WORDS if len(w) > 1]
    merges = []
    for word in WORDS:  # merge a word left to right: its pieces have to exist as tokens too
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merge = f"{pieces[0]} {pieces[1]}"
            if merge not in merges:
                merges.append(merge)
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            if pieces[0] not in tokens:
                tokens.append(pieces[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=max_length)


def _text_config(tokenizer, **kwargs) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **kwargs,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def _unet(**kwargs) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        **kwargs,
    )


def ddim_scheduler(**kwargs) -> DDIMScheduler:
    """The scheduler configuration of Stable Diffusion 1.5."""
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**{**config, **kwargs})


def tiny_sd_pipeline(folder: str | Path, seed: int = 0, scheduler=None) -> StableDiffusionPipeline:
    """A real `StableDiffusionPipeline`: 4x8x8 latents, 16x16 images, random weights."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(Path(folder) / "sd_tokenizer")
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(tokenizer)).eval(),
        tokenizer=tokenizer,
        unet=_unet(cross_attention_dim=16),
        scheduler=scheduler or ddim_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sdxl_pipeline(folder: str | Path, seed: int = 0) -> StableDiffusionXLPipeline:
    """A real `StableDiffusionXLPipeline` of the same size, with two text encoders."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(Path(folder) / "sdxl_tokenizer")
    config = _text_config(tokenizer, hidden_act="gelu")
    unet = _unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 6 * 8,
        use_linear_projection=True,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(config).eval(),
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=ddim_scheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_clip(folder: str | Path, seed: int = 0, image_size: int = 16) -> Path:
    """Save a tiny real CLIP with its tokenizer; returns the folder, as `from_clip` takes it."""
    torch.manual_seed(seed)
    folder = Path(folder) / "clip"
    tokenizer = tiny_tokenizer(folder)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": 8,
        "projection_dim": 12,
    }
    config = CLIPConfig(text_config=_text_config(tokenizer).to_dict(), vision_config=vision, projection_dim=12)
    CLIPModel(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def brightness_reward(images: torch.Tensor, prompts: list[str], timesteps: torch.Tensor) -> torch.Tensor:
    """A reward that needs no model: images (B, 3, H, W) in [0, 1] -> how red they are, scaled to spread scores."""
    assert images.min() >= 0 and images.max() <= 1 and len(images) == len(prompts) == len(timesteps)
    return 100 * (images[:, 0] - images[:, 1]).mean(dim=(1, 2))


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> set[str]:
    """Names of the entries of `before` that no longer have the same bits."""
    after = module.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def image_pairs() -> list[dict]:
    """Prompts with a reddish image that is preferred to a bluish one."""
    rows = []
    for i, prompt in enumerate(PROMPTS):
        red, blue = Image.new("RGB", (16, 16), (200 + i, 40, 0)), Image.new("RGB", (16, 16), (0, 40, 200 + i))
        rows.append({"prompt": prompt, "chosen": red, "rejected": blue})
    return rows


def assert_is_gradient(function, at: torch.Tensor) -> None:
    """Whether autograd's gradient of `function(at)`, a number, is the slope along one direction by central differences."""
    at = at.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(function(at), at)
    direction = torch.randn(at.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        slope = (function(at + 0.01 * direction) - function(at - 0.01 * direction)) / 0.02
    assert slope.abs() > 1e-3
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=0.03, atol=1e-4)


def train_logs(trainer) -> list[dict]:
    return [log for log in trainer.state.log_history if "loss" in log]
