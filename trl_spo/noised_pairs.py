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
Turn preference images into what a reward model sees in training: noised latents, predictions or decoded predictions.

A pair of finished images with a preference becomes a pair *at timestep t*:

    1. encode both images with the VAE;
    2. add the same noise at the same timestep t to both: what a latent reward model sees (`"noisy_latents"`);
    3. predict both clean latents in one guided step of the diffusion model (`"latents"`);
    4. decode (`"images"`: the step-aware reward model, https://huggingface.co/papers/2406.04314, section 3.2).

We assume that the preference between the images also holds between what became of them, since both share prompt, timestep
and noise. The latent reward models of LPO (https://huggingface.co/papers/2502.01051) were trained with a noise of its own
for each image, which `independent_noise` does. Difference from the public code of SPO (https://github.com/RockeyCoss/SPO):
both images of a pair pass the denoiser in one batch.
"""

from functools import partial
from itertools import chain
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from .pipelines.encoding_cache import EncodingCache
from .rewards.base import check_sees


@torch.no_grad()
def noised_pairs(
    pipeline: Any,
    batch: dict[str, Any],
    timesteps: torch.Tensor,
    guidance_scale: float = 5.0,
    generator: torch.Generator | None = None,
    negative_prompt: str = "",
    prediction_batch_size: int | None = None,
    cache: EncodingCache | None = None,
    sees: str = "images",
    independent_noise: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Both images of each pair at the same timestep, as a reward model sees them.

    At timestep 0 nothing is noised or predicted: images are returned as they are, latents as the VAE encodes them. This is
    how the paper evaluates t = 0, and what SPO asks the reward model about at its last step.

    Args:
        pipeline:
            An SPO pipeline, see `wrap_pipeline`. Runs without gradients. Noisy latents need its VAE and its schedule
            alone.
        batch (`dict`):
            A batch of [`StepPreferenceCollator`].
        timesteps (`torch.Tensor` of shape `(batch_size,)`):
            Integer timestep of each pair, in `[0, pipeline.num_train_timesteps)`.
        guidance_scale (`float`, *optional*, defaults to `5.0`):
            Classifier-free guidance of the prediction.
        generator (`torch.Generator`, *optional*):
            Source of all randomness: first the VAE's sampling, then the noise.
        negative_prompt (`str`, *optional*, defaults to `""`):
            Prompt of the unconditional half of the guidance.
        prediction_batch_size (`int`, *optional*):
            Pairs per call of VAE and denoiser. Defaults to all.
        cache ([`EncodingCache`], *optional*):
            Takes over the encoding of images and prompts; `batch` then needs `keys_0` and `keys_1`.
        sees (`str`, *optional*, defaults to `"images"`):
            What is wanted, as a [`Reward`] says it: `"images"` in [-1, 1], `"latents"` (predictions of the clean latents)
            or `"noisy_latents"`, both in the scale of the denoiser.
        independent_noise (`bool`, *optional*, defaults to `False`):
            Draw a noise for each image, instead of one for both.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(batch_size, 3, height, width)`, or of latents `(batch_size, C, h, w)`: on
        the pipeline's device.

    Raises:
        `ValueError`: If the timesteps do not fit the batch, or `sees` is unknown.
    """
    # Check what came, and return early where nothing has to be noised.
    prompts = batch["prompts"]
    batch_size = len(prompts)
    check_sees(sees)
    _check_timesteps(timesteps, batch_size, pipeline.num_train_timesteps)
    noisy = (timesteps > 0).nonzero().flatten()  # where they were drawn, on the CPU: nothing waits for the device
    # Noisy latents need no denoiser, which may then have stayed elsewhere.
    device = next(pipeline.vae.parameters()).device if sees == "noisy_latents" else pipeline.device
    timesteps = timesteps.to(device, non_blocking=True)
    images = torch.stack([batch["images_0"], batch["images_1"]], dim=1).to(device)  # (B, 2, 3, H, W)
    if len(noisy) == 0 and sees == "images":
        return images[:, 0], images[:, 1]

    # Encode the images, and draw the noise: one for both images of a pair, or one each.
    chunk = batch_size if prediction_batch_size is None else prediction_batch_size
    latents = _encode_pairs(pipeline, batch, images, chunk, generator, cache)  # (B, 2, C, h, w)
    shape = latents.shape if independent_noise else (batch_size, 1, *latents.shape[2:])
    noise = randn_tensor(shape, generator=generator, device=latents.device, dtype=latents.dtype).expand_as(latents)

    # Noise what is not at timestep 0, and go on as far as the reward model needs it.
    result = (images if sees == "images" else latents).clone()
    encode_prompts = pipeline.encode_prompt if cache is None else partial(cache.encode_prompts, pipeline)
    for rows in noisy.split(chunk):
        texts = [prompts[row] for row in rows.tolist()]
        rows = rows.to(device, non_blocking=True)
        pair_timesteps = timesteps[rows].repeat_interleave(2)
        samples = pipeline.add_noise(latents[rows].flatten(0, 1), noise[rows].flatten(0, 1), pair_timesteps)
        if sees != "noisy_latents":
            size = {"height": images.shape[-2], "width": images.shape[-1]}
            prompt_embeds = encode_prompts(texts, negative_prompt, **size).repeat_interleave(2)
            samples = pipeline.predict_original_sample(samples, pair_timesteps, prompt_embeds, guidance_scale)
        if sees == "images":
            samples = pipeline.decode_latents(samples)
        result[rows] = samples.unflatten(0, (len(rows), 2)).to(result.dtype)
    return result[:, 0], result[:, 1]


def _check_timesteps(timesteps: torch.Tensor, batch_size: int, num_train_timesteps: int) -> None:
    if timesteps.shape != (batch_size,) or timesteps.is_floating_point():
        raise ValueError(
            f"`timesteps` must be {batch_size} integers, one per pair, got shape {tuple(timesteps.shape)} and dtype "
            f"{timesteps.dtype}."
        )
    if batch_size and not 0 <= int(timesteps.min()) <= int(timesteps.max()) < num_train_timesteps:
        raise ValueError(f"`timesteps` must lie in [0, {num_train_timesteps}), got {timesteps.tolist()}.")


def _encode_pairs(
    pipeline: Any,
    batch: dict[str, Any],
    images: torch.Tensor,
    chunk: int,
    generator: torch.Generator | None,
    cache: EncodingCache | None,
) -> torch.Tensor:
    """Latents `(B, 2, C, h, w)` of pairs of images `(B, 2, 3, H, W)`, `chunk` pairs per call of the VAE."""
    if cache is None:
        parts = [pipeline.encode_images(part.flatten(0, 1), generator=generator) for part in images.split(chunk)]
        return torch.cat(parts).unflatten(0, (-1, 2))
    keys = list(chain.from_iterable(zip(batch["keys_0"], batch["keys_1"], strict=True)))
    parts = []
    for i, part in enumerate(images.split(chunk)):
        keys_of_part = keys[2 * i * chunk :][: 2 * len(part)]
        parts.append(cache.encode_images(pipeline, part.flatten(0, 1), keys_of_part, generator))
    return torch.cat(parts).unflatten(0, (-1, 2))
