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
The work of a run: steps, pairs, evaluations of each network, their arithmetic, and the hours that follow from measured rates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..branch_plan import BranchPlan, plan_branches
from ..pipelines.base import SPOPipeline
from ..rollout_settings import RolloutSettings
from ..training.memory import without_values
from ..training.memory_plan import autocast_of
from .forecast import Networks, autocast_dtype
from .rates import MEASURED, rate_of


SHARES = (1.0, 0.5, 0.25)  # of the branches whose pair passes the threshold; what it will be is not known beforehand


def count_tflop(function: Callable) -> float:
    """TFLOP of `function()`, a multiply-add counted as two; attention as its matrix products."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return counter.get_total_flops() / 1e12


def rollout_samples(plan: BranchPlan, num_candidates: int, num_inference_steps: int) -> dict[str, int]:
    """
    Evaluations of one prompt's rollout, where guidance counts as part of a prediction.

    Each branch takes K samples j steps on, which needs a prediction at each, and a prediction of x_0 at its end, except at the
    last step. The prediction of the candidate that goes on is that of the step that follows.

    Args:
        plan ([`BranchPlan`]): where the rollout branches.
        num_candidates (`int`): K.
        num_inference_steps (`int`): of the schedule.

    Returns:
        `dict[str, int]`: `predictions`, `decodes`, `branches`, and `pairs`, the largest number of them.
    """
    starts = list(plan.lengths)
    predictions = starts[0] + 1  # up to and including the first branching latent
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        length = plan.lengths[start]
        end = start + length
        predictions += num_candidates * (length - 1)  # inner steps go on from each candidate
        predictions += num_candidates if end < num_inference_steps else 0
        predictions += 0 if following is None else following - end  # plain steps between two branches
    branches = len(starts)
    pairs = sum(plan.lengths.values())
    return {"predictions": predictions, "decodes": branches * num_candidates, "branches": branches, "pairs": pairs}


@dataclass(frozen=True)
class Work:
    """
    What an SPO run does, over all processes, if a share of its pairs passes the threshold.

    Attributes:
        share (`float`): of the pairs that pass.
        prompts (`int`): prompts that are rolled out, repetitions included.
        pairs (`int`): pairs that are trained.
        steps (`int`): optimizer steps.
        predictions (`int`), decodes (`int`): guided predictions of the denoiser and decoded images, in rollouts.
        forwards (`int`): rows that pass the policy, its backward pass and the reference.
    """

    share: float
    prompts: int
    pairs: int
    steps: int
    predictions: int
    decodes: int
    forwards: int


def plan_work(
    config, settings: RolloutSettings, pipeline: SPOPipeline, num_prompts: int, world_size: int = 1
) -> list[Work]:
    """
    The work of a run for each of `SHARES`.

    Args:
        config ([`SPOConfig`]), settings ([`RolloutSettings`]): of the run; the settings resolved on the schedule.
        pipeline ([`SPOPipeline`]): with its schedule set.
        num_prompts (`int`): of the dataset.
        world_size (`int`, *optional*, defaults to `1`): processes.
    """
    plan = plan_branches(pipeline, settings, torch.Generator().manual_seed(0))
    samples = rollout_samples(plan, settings.num_candidates, settings.num_inference_steps)
    inner = max(plan.lengths.values())
    # Both sides of a pair share x_t in the first step of a branch only.
    rows = samples["pairs"] if inner == 1 else 2 * samples["pairs"] - samples["branches"]
    pairs_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size
    found = []
    for share in SHARES:
        pairs_per_prompt = samples["pairs"] * share
        if config.max_steps > 0:
            steps = config.max_steps
            pairs = steps * pairs_per_step
            prompts = math.ceil(pairs / pairs_per_prompt)
        else:
            prompts = math.ceil(num_prompts * config.num_train_epochs)
            pairs = int(prompts * pairs_per_prompt)
            steps = math.ceil(pairs / pairs_per_step)
        forwards = int(pairs * rows / samples["pairs"])
        found.append(
            Work(
                share, prompts, pairs, steps, prompts * samples["predictions"], prompts * samples["decodes"], forwards
            )
        )
    return found


def network_tflop(networks: Networks, config) -> dict[str, float]:
    """
    Arithmetic of one sample through each network.

    Args:
        networks ([`Networks`]): on fake tensors.
        config ([`SPOConfig`]): size of the images and guidance.

    Returns:
        `dict[str, float]`: TFLOP of `unet` (a guided prediction), `training` (reference forward, policy forward and backward
        of one), `decode`, and, where the reward judges images, `reward_image`.
    """
    pipeline, reward = networks.pipeline, networks.reward
    shape = pipeline.latent_shape(config.height, config.width)
    schedule = pipeline.set_timesteps(config.num_inference_steps, shape)
    timestep = schedule[len(schedule) // 2]
    policy_scale = config.guidance_scale if config.train_cfg else pipeline.unguided_scale
    with without_values(networks.fake_mode):
        embeds = networks.embeds(1)
        latents = torch.zeros(1, *shape, dtype=pipeline.latent_dtype)

        def training():
            with torch.no_grad(), pipeline.reference() as reference:
                pipeline.predict(latents, timestep, embeds, policy_scale, reference)
            pipeline.predict(latents, timestep, embeds, policy_scale, networks.trained).sum().backward()

        with torch.no_grad():
            costs = {
                "unet": count_tflop(lambda: pipeline.predict(latents, timestep, embeds, config.guidance_scale)),
                "decode": count_tflop(lambda: pipeline.decode_for_scoring(latents, config.scoring_image_size)),
            }
            if getattr(reward, "scores", None) == "images":
                size = reward.config.clip_config.vision_config.image_size
                pixels = torch.zeros(1, 3, size, size, dtype=reward.dtype)
                zero = torch.zeros(1, dtype=torch.long)
                costs["reward_image"] = count_tflop(lambda: reward.get_image_features(pixels, zero))
        with autocast_of(autocast_dtype(config), like_cuda=False):
            costs["training"] = count_tflop(training)
    return costs


def seconds(work: Work, costs: dict[str, float], speed: float = 1.0) -> float:
    """
    Seconds of one device, on a card `speed` times as fast as the one that was measured.
    """
    counts = {
        "unet": work.predictions,
        "decode": work.decodes,
        "reward_image": work.decodes,
        "training": work.forwards,
    }
    total = sum(counts[name] * cost / rate_of(name) for name, cost in costs.items())
    return (total + MEASURED["other_seconds_per_prompt"] * work.prompts) / speed
