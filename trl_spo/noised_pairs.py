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
What a step-aware reward model sees of preference images: noised, predicted and decoded again
(https://huggingface.co/papers/2406.04314, section 3.2).

A pair of finished images with a preference becomes a pair of *predictions at timestep t*:

    1. encode both images with the VAE;
    2. add the same noise at the same timestep t to both;
    3. predict both clean latents in one guided step of the diffusion model;
    4. decode.

We assume that the preference between the images also holds between their predictions, since both share prompt, timestep
and noise. Difference from the public code (https://github.com/RockeyCoss/SPO): both images of a pair pass the denoiser in
one batch.
"""

from functools import partial
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from .pipelines.encoding_cache import EncodingCache


@torch.no_grad()
def noised_pair_images(
    pipeline: Any,
    batch: dict[str, Any],
    timesteps: torch.Tensor,
    guidance_scale: float = 5.0,
    generator: torch.Generator | None = None,
    negative_prompt: str = "",
    prediction_batch_size: int | None = None,
    cache: EncodingCache | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Predictions of both images of each pair from the same timestep and the same noise.

    At timestep 0 the images are returned as they are: this is how the paper evaluates t = 0, and what SPO asks the
    reward model about at its last step.

    Args:
        pipeline:
            An SPO pipeline, see `wrap_pipeline`. Runs without gradients.
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
            Pairs per call of denoiser and VAE decoder. Defaults to all.
        cache ([`EncodingCache`], *optional*):
            Takes over the encoding of images and prompts; `batch` then needs `keys_0` and `keys_1`.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(batch_size, 3, height, width)`: images in [-1, 1] on the pipeline's
        device.

    Raises:
        `ValueError`: If the timesteps do not fit the batch.
    """
    batch_size, prompts = len(batch["prompts"]), batch["prompts"]
    if timesteps.shape != (batch_size,) or timesteps.is_floating_point():
        raise ValueError(
            f"`timesteps` must be {batch_size} integers, one per pair, got shape {tuple(timesteps.shape)} and dtype "
            f"{timesteps.dtype}."
        )
    if batch_size and not 0 <= int(timesteps.min()) <= int(timesteps.max()) < pipeline.num_train_timesteps:
        raise ValueError(f"`timesteps` must lie in [0, {pipeline.num_train_timesteps}), got {timesteps.tolist()}.")
    noisy = (timesteps > 0).nonzero().flatten()  # where they were drawn, on the CPU: nothing waits for the device
    timesteps = timesteps.to(pipeline.device, non_blocking=True)
    images = torch.stack([batch["images_0"], batch["images_1"]], dim=1).to(pipeline.device)  # (B, 2, 3, H, W)
    if len(noisy) == 0:
        return images[:, 0], images[:, 1]
    chunk = batch_size if prediction_batch_size is None else prediction_batch_size
    if cache is None:
        encode_prompts = pipeline.encode_prompt
        parts = [pipeline.encode_images(x.flatten(0, 1), generator=generator) for x in images.split(chunk)]
    else:
        encode_prompts = partial(cache.encode_prompts, pipeline)
        keys = [key for pair in zip(batch["keys_0"], batch["keys_1"], strict=True) for key in pair]
        parts = [
            cache.encode_images(pipeline, part.flatten(0, 1), keys[2 * i * chunk :][: 2 * len(part)], generator)
            for i, part in enumerate(images.split(chunk))
        ]
    latents = torch.cat(parts)
    latents = latents.unflatten(0, (batch_size, 2))  # (B, 2, C, h, w)
    noise = randn_tensor(
        (batch_size, 1, *latents.shape[2:]), generator=generator, device=latents.device, dtype=latents.dtype
    ).expand_as(latents)  # one noise per pair
    images = images.clone()
    for rows in noisy.split(chunk):
        prompt_embeds = encode_prompts(
            [prompts[row] for row in rows.tolist()], negative_prompt, height=images.shape[-2], width=images.shape[-1]
        ).repeat_interleave(2)
        rows = rows.to(pipeline.device, non_blocking=True)
        pair_timesteps = timesteps[rows].repeat_interleave(2)
        noised = pipeline.add_noise(latents[rows].flatten(0, 1), noise[rows].flatten(0, 1), pair_timesteps)
        predicted = pipeline.predict_original_sample(noised, pair_timesteps, prompt_embeds, guidance_scale)
        images[rows] = pipeline.decode_latents(predicted).unflatten(0, (len(rows), 2)).to(images.dtype)
    return images[:, 0], images[:, 1]
