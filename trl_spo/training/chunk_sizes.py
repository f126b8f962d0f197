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
from dataclasses import dataclass

import torch

from ..pipelines.base import SPOPipeline
from ..pipelines.conditioning import PromptEmbeds
from ..rewards.base import Reward
from ..spo_config import SPOConfig
from .memory import busy_chunk_sizes, free_bytes, power_of_two_below, rollout_budget_gib, rollout_chunk_sizes


CHUNK_SIZES = ("rollout_micro_batch_size", "vae_decode_batch_size", "reward_batch_size")  # fields of the config


@dataclass(frozen=True)
class ChunkLimits:
    """
    What the sizes of a run are chosen by.

    Attributes:
        busy (`dict[str, int]`): sizes that keep the device busy, by the names in `CHUNK_SIZES`.
        budget_gib (`float`, *optional*): GiB that activations of one call may take. `None`: memory is not a concern.
        largest (`int`): upper end of the sizes that are looked for in the budget.
        rounds (`bool`): whether sizes are rounded, and no larger than what keeps the device busy.
    """

    busy: dict[str, int]
    budget_gib: float | None
    largest: int
    rounds: bool

    def sizes(self, denoiser: int, scoring: int) -> dict[str, int]:
        """The sizes of a run, from the largest that fit the budget."""
        if self.rounds:
            busy_denoiser, busy_decoder, _ = self.busy.values()
            denoiser = min(busy_denoiser, power_of_two_below(denoiser))
            scoring = min(busy_decoder, power_of_two_below(scoring))
        return dict(zip(CHUNK_SIZES, (denoiser, scoring, scoring), strict=True))


def chunk_limits(args: SPOConfig, pipeline: SPOPipeline, device_type: str, free: int | None) -> ChunkLimits:
    """
    Args:
        args ([`SPOConfig`]), pipeline ([`SPOPipeline`]): of the run.
        device_type (`str`): such as `"cpu"` or `"cuda"`.
        free (`int`, *optional*): free bytes on the device, if that is known.
    """
    latent_shape = pipeline.latent_shape(args.height, args.width)
    pixels = scored_pixels(args, pipeline, latent_shape)
    denoiser, decoder = busy_chunk_sizes(device_type, math.prod(latent_shape[1:]), pixels)
    reward = 16 if device_type == "cpu" else 32
    busy = dict(zip(CHUNK_SIZES, (denoiser, decoder, reward), strict=True))
    if args.memory_budget is not None:
        largest = args.num_candidates * args.per_device_rollout_batch_size
        return ChunkLimits(busy, args.memory_budget, largest, rounds=False)
    budget = None if free is None else max(rollout_budget_gib(free, pipeline.denoiser), 1e-9)
    return ChunkLimits(busy, budget, max(denoiser, decoder), rounds=True)


def choose_chunk_sizes(
    args: SPOConfig,
    pipeline: SPOPipeline,
    reward: Reward,
    embeds: PromptEmbeds,
    device: torch.device,
    free: int | None = None,
) -> dict[str, int]:
    """
    The sizes that fit `memory_budget`; without one, about as many pixels as keep the device busy, and on CUDA no more than fit
    its free memory. Memory does not grow with the number of candidates.

    Args:
        args ([`SPOConfig`]): settings of the run.
        pipeline ([`SPOPipeline`]), reward ([`Reward`]): what runs in a rollout.
        embeds ([`PromptEmbeds`]): embeddings of the first prompts.
        device (`torch.device`): where the rollout runs.
        free (`int`, *optional*): free bytes on the device; by default they are asked for.

    Returns:
        `dict[str, int]`: by the names in `CHUNK_SIZES`.
    """
    free = free_bytes(device) if free is None else free
    limits = chunk_limits(args, pipeline, device.type, free)
    if limits.budget_gib is None:
        return limits.busy
    denoiser, scoring = rollout_chunk_sizes(
        pipeline,
        reward,
        embeds,
        pipeline.latent_shape(args.height, args.width),
        args.guidance_scale,
        limits.budget_gib,
        largest=limits.largest,
        image_size=args.scoring_image_size,
    )
    return limits.sizes(denoiser, scoring)


def scored_pixels(args: SPOConfig, pipeline: SPOPipeline, latent_shape: tuple[int, ...]) -> float:
    """Pixels of an image as it is decoded for scoring."""
    pixels = pipeline.num_pixels(args.height, args.width)
    if args.scoring_image_size is None:
        return pixels
    short_side = min(latent_shape[1:]) * math.sqrt(pixels / math.prod(latent_shape[1:]))
    return pixels * min(1.0, args.scoring_image_size / short_side) ** 2
