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

"""Pairs of images with noisy preferences, in the schema of Pick-a-Pic v1.

A base model draws two images for a caption, and a simulated annotator who wants high `world.utility` picks one. The
annotator errs as people do (Bradley-Terry): a pair with utilities u_0 and u_1 gets the label 1/0 with probability
`sigmoid((u_0 - u_1) / temperature)`; pairs that differ by less than `TIE_MARGIN` are ties.
"""

import copy
import functools
import io
from collections import Counter

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tqdm import tqdm

from trl_spo.pipelines.flow import SPOFlowPipeline

from . import world


ANNOTATOR_TEMPERATURE = 0.1  # labels of pairs of the base model agree with the truth about three times in four
TIE_MARGIN = 0.01


# ------------------------------------------------------------------------------------------------------- sampling


@functools.cache
def sampling_dtype() -> torch.dtype | None:
    """
    The autocast type of samples: bfloat16 on a processor that multiplies in it, which takes half the time of float32. On
    others PyTorch imitates bfloat16, sixty times slower than float32; there it is `None`, full precision.
    """
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    native = any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
    return torch.bfloat16 if native else None


def draw_noise(seeds, steps: int, shape) -> torch.Tensor:
    """Noise of each sample from its own seed, starting latents first: (steps + 1, B, *shape)."""
    noise = [torch.randn(steps + 1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noise, 1)


@torch.no_grad()
def encode_prompts(pipeline, prompts) -> torch.Tensor:
    """Hidden states (B, 12, 64) of the text encoder; each different text is encoded once."""
    unique = sorted(set(prompts))
    tokenizer = pipeline.tokenizer
    tokens = tokenizer(unique, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    states = pipeline.text_encoder(tokens.input_ids).last_hidden_state
    return states[[unique.index(prompt) for prompt in prompts]]


@torch.no_grad()
def sample_images(
    pipeline,
    prompts,
    seeds,
    num_inference_steps: int = 10,
    guidance_scale: float = 1.0,
    eta: float = 1.0,
    batch_size: int = 256,
    dtype: torch.dtype | None | str = "auto",
    progress: str | None = None,
) -> torch.Tensor:
    """
    Draws one image per prompt with the stochastic steps of the model: DDIM, or those of its flow.

    All noise of a sample comes from its own seed, so an image does not depend on its neighbours or on the batch size
    (up to rounding).

    Args:
        pipeline (`StableDiffusionPipeline` or `SPOFlowPipeline`): Its parts are called directly; it is not modified.
        prompts (`list[str]`): B texts.
        seeds (`list[int]`): B seeds.
        num_inference_steps (`int`, *optional*, defaults to `10`): DDIM steps.
        guidance_scale (`float`, *optional*, defaults to `1.0`): Classifier-free guidance; no second pass at 1.
        eta (`float`, *optional*, defaults to `1.0`): Share of the noise put back at each step; 0 is deterministic.
        batch_size (`int`, *optional*, defaults to `256`): Images sampled together.
        dtype (`torch.dtype`, *optional*, defaults to `"auto"`): Autocast type of UNet and VAE; `None` for full
            precision; `"auto"` is [`sampling_dtype`]. Latents and scheduler steps are always in float32.
        progress (`str`, *optional*): Title of a progress bar.

    Returns:
        `torch.Tensor` of shape `(B, 3, 32, 32)`, float32, values in [0, 1].
    """
    dtype = sampling_dtype() if dtype == "auto" else dtype
    if isinstance(pipeline, SPOFlowPipeline):
        settings = (num_inference_steps, guidance_scale, eta, dtype)
        return sample_flow_images(pipeline, prompts, seeds, *settings, batch_size=batch_size, progress=progress)
    states, empty = encode_prompts(pipeline, prompts), encode_prompts(pipeline, [""])
    images = []
    for i in tqdm(range(0, len(prompts), batch_size), desc=progress, unit="batch", disable=progress is None):
        rows = slice(i, i + batch_size)
        context = states[rows]
        if guidance_scale != 1:
            context = torch.cat([empty.expand_as(context), context])
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            latents = _denoise(pipeline, context, seeds[rows], num_inference_steps, guidance_scale, eta)
            decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        images.append((decoded.float() / 2 + 0.5).clamp(0, 1))
    return torch.cat(images)


def _denoise(pipeline, context, seeds, num_inference_steps, guidance_scale, eta) -> torch.Tensor:
    """Final latents (B, 4, 8, 8). `context`: text states (B, ...), or (2B, ...) with those of the empty text first."""
    config = pipeline.unet.config
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(num_inference_steps)
    shape = (config.in_channels, config.sample_size, config.sample_size)
    latents, *noise = draw_noise(seeds, num_inference_steps, shape)
    for t, step_noise in zip(scheduler.timesteps, noise, strict=True):
        copies = len(context) // len(latents)
        output = pipeline.unet(latents.repeat(copies, 1, 1, 1), t, context).sample.float()
        if copies == 2:
            unconditional, conditional = output.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(output, t, latents, eta=eta, variance_noise=step_noise).prev_sample
    return latents


@torch.no_grad()
def sample_flow_images(
    pipeline: SPOFlowPipeline,
    prompts,
    seeds,
    num_inference_steps: int,
    guidance_scale: float,
    eta: float,
    dtype: torch.dtype | None,
    batch_size: int = 256,
    progress: str | None = None,
) -> torch.Tensor:
    """[`sample_images`] of the flow-matching model: the same noise of each sample, the steps of its step rule."""
    shape = pipeline.latent_shape()
    timesteps = pipeline.set_timesteps(num_inference_steps, shape)
    unique = sorted(set(prompts))
    embeds = pipeline.encode_prompt(unique)
    row_of = {prompt: row for row, prompt in enumerate(unique)}
    images = []
    for i in tqdm(range(0, len(prompts), batch_size), desc=progress, unit="batch", disable=progress is None):
        rows = slice(i, i + batch_size)
        text = embeds[torch.tensor([row_of[prompt] for prompt in prompts[rows]])]
        latents, *noise = draw_noise(seeds[rows], num_inference_steps, shape)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            for timestep, step_noise in zip(timesteps, noise, strict=True):
                output = pipeline.predict(latents, timestep, text, guidance_scale)
                mean, std, _ = pipeline.step_distribution(output, timestep, latents, eta)
                latents = mean + std * step_noise
        images.append((pipeline.decode_latents(latents) / 2 + 0.5).clamp(0, 1))
    return torch.cat(images)


# ------------------------------------------------------------------------------------------------------ annotator


def annotate(
    utility_0: torch.Tensor,
    utility_1: torch.Tensor,
    temperature: float = ANNOTATOR_TEMPERATURE,
    tie_margin: float = TIE_MARGIN,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    Noisy labels for pairs.

    Args:
        utility_0 (`torch.Tensor` of shape `(B,)`): Utility of the first images.
        utility_1 (`torch.Tensor` of shape `(B,)`): Utility of the second images.
        temperature (`float`, *optional*): Bradley-Terry temperature in units of utility; more is noisier.
        tie_margin (`float`, *optional*): Pairs whose utilities differ by less are ties.
        generator (`torch.Generator`, *optional*): Source of the noise.

    Returns:
        `torch.Tensor` of shape `(B,)`: `label_0`, 1 where the first image is preferred, 0 where the second is, .5 for
        a tie. `label_1` is its complement.
    """
    difference = utility_0 - utility_1
    first = torch.rand(difference.shape, generator=generator) < torch.sigmoid(difference / temperature)
    return torch.where(difference.abs() < tie_margin, 0.5, first.float())


def agreement(labels_0: torch.Tensor, utility_0: torch.Tensor, utility_1: torch.Tensor) -> float:
    """Share of the labels, ties left out, that name the image of higher utility."""
    decided = labels_0 != 0.5
    return ((labels_0 > 0.5) == (utility_0 > utility_1))[decided].float().mean().item()


# -------------------------------------------------------------------------------------------------------- dataset


def encode_image(image: torch.Tensor) -> bytes:
    """An image (3, 32, 32) in [0, 1] as the bytes of a PNG file, which at this size is smaller than a JPEG file."""
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def decode_image(data: bytes) -> torch.Tensor:
    """The inverse of `encode_image`, up to rounding to 8 bits."""
    pixels = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def preferences_from_images(prompts, images_0, images_1, seed: int = 0, temperature=ANNOTATOR_TEMPERATURE) -> Dataset:
    """
    Lets the annotator label given pairs of images.

    Args:
        prompts (`list[str]`): B captions of the world.
        images_0 (`torch.Tensor` of shape `(B, 3, 32, 32)`): First images, values in [0, 1].
        images_1 (`torch.Tensor` of shape `(B, 3, 32, 32)`): Second images.
        seed (`int`, *optional*, defaults to `0`): Seed of the annotator's noise.
        temperature (`float`, *optional*): See `annotate`.

    Returns:
        `datasets.Dataset` with B rows in the schema of Pick-a-Pic v1: `caption`; `jpg_0`, `jpg_1` (bytes of an image
        file; PNG here, PIL tells formats apart by content); `label_0`, `label_1` (1/0, 0/1, or .5/.5 for a tie);
        `has_label`; `are_different`; `num_example_per_prompt` (rows with this caption).
    """
    prompts = list(prompts)
    utilities = [world.utility(images, prompts) for images in (images_0, images_1)]
    label_0 = annotate(*utilities, temperature=temperature, generator=torch.Generator().manual_seed(seed))
    files_0, files_1 = ([encode_image(image) for image in images] for images in (images_0, images_1))
    counts = Counter(prompts)
    columns = {
        "caption": prompts,
        "jpg_0": files_0,
        "jpg_1": files_1,
        "label_0": label_0.tolist(),
        "label_1": (1 - label_0).tolist(),
        "has_label": [True] * len(prompts),
        "are_different": [a != b for a, b in zip(files_0, files_1, strict=True)],
        "num_example_per_prompt": [counts[prompt] for prompt in prompts],
    }
    return Dataset.from_dict(columns)


def make_preferences(pipeline, num_pairs: int = 2_000, split: str = "train", seed: int = 0, **sampling) -> Dataset:
    """
    Samples pairs of images from a pipeline and lets the annotator label them.

    Args:
        pipeline (`StableDiffusionPipeline`): The base model, in float32 on the CPU.
        num_pairs (`int`, *optional*, defaults to `2000`): Rows to make.
        split (`str`, *optional*, defaults to `"train"`): The split from which captions are drawn, uniformly.
        seed (`int`, *optional*, defaults to `0`): Seed of captions, images and labels.
        **sampling: Passed on to [`sample_images`].

    Returns:
        `datasets.Dataset`: see [`preferences_from_images`].
    """
    pool = world.captions(split)
    generator = torch.Generator().manual_seed(seed)
    prompts = [pool[i] for i in torch.randint(len(pool), (num_pairs,), generator=generator).tolist()]
    seeds = torch.randint(2**62, (2 * num_pairs,), generator=generator).tolist()
    images = sample_images(pipeline, prompts + prompts, seeds, **sampling)
    return preferences_from_images(prompts, images[:num_pairs], images[num_pairs:], seed=seed + 1)
