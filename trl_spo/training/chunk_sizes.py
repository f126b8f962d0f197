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

"""Choose how many samples denoiser, decoder and reward model get per call in a rollout, where the config leaves it open."""

import math

from ..pipelines.base import SPOPipeline
from ..pipelines.conditioning import PromptEmbeds
from ..rewards.base import Reward
from ..spo_config import SPOConfig
from .memory import busy_chunk_sizes, free_bytes, power_of_two_below, rollout_budget_gib, rollout_chunk_sizes


CHUNK_SIZES = ("rollout_micro_batch_size", "vae_decode_batch_size", "reward_batch_size")  # fields of the config


def choose_chunk_sizes(
    args: SPOConfig,
    pipeline: SPOPipeline,
    reward: Reward | None,
    embeds: PromptEmbeds,
    free: int | None = None,
    device_type: str | None = None,
) -> dict[str, int]:
    """
    The sizes that fit `memory_budget`; without one, about as many pixels as keep the device busy, and on CUDA no more than fit
    its free memory. Memory does not grow with the number of candidates.

    Args:
        args ([`SPOConfig`]): settings of the run.
        pipeline ([`SPOPipeline`]), reward ([`Reward`], *optional*): what runs in a rollout; of a reward that is not known the
            decoder alone counts.
        embeds ([`PromptEmbeds`]): embeddings of the first prompts.
        free (`int`, *optional*): free bytes on the device; by default they are asked for.
        device_type (`str`, *optional*): where the run would be, `"cpu"` or `"cuda"`; by default where it is.

    Returns:
        `dict[str, int]`: by the names in `CHUNK_SIZES`.
    """
    # Where memory is not a concern, use the sizes that keep the device busy.
    latent_shape = pipeline.latent_shape(args.height, args.width)
    pixels = scored_pixels(args, pipeline, latent_shape)
    device_type = device_type or args.device.type
    busy_denoiser, busy_decoder = busy_chunk_sizes(device_type, math.prod(latent_shape[1:]), pixels)
    free = free_bytes(args.device) if free is None else free
    if args.memory_budget is None and free is None:
        reward_size = 16 if device_type == "cpu" else 32
        return dict(zip(CHUNK_SIZES, (busy_denoiser, busy_decoder, reward_size), strict=True))

    # Otherwise as many samples as fit the memory. Without a budget from the user, no more than are useful.
    budget = args.memory_budget
    largest = args.num_candidates * args.per_device_rollout_batch_size
    if budget is None:
        budget = max(rollout_budget_gib(free, pipeline.denoiser), 1e-9)
        largest = max(busy_denoiser, busy_decoder)
    denoiser, scoring = rollout_chunk_sizes(
        pipeline,
        reward,
        embeds,
        latent_shape,
        args.guidance_scale,
        budget,
        largest=largest,
        image_size=args.scoring_image_size,
    )
    if args.memory_budget is None:
        denoiser = min(busy_denoiser, power_of_two_below(denoiser))
        scoring = min(busy_decoder, power_of_two_below(scoring))
    return dict(zip(CHUNK_SIZES, (denoiser, scoring, scoring), strict=True))


def scored_pixels(args: SPOConfig, pipeline: SPOPipeline, latent_shape: tuple[int, ...]) -> float:
    """Pixels of an image as it is decoded for scoring."""
    pixels = pipeline.num_pixels(args.height, args.width)
    if args.scoring_image_size is None:
        return pixels
    short_side = min(latent_shape[1:]) * math.sqrt(pixels / math.prod(latent_shape[1:]))
    return pixels * min(1.0, args.scoring_image_size / short_side) ** 2
