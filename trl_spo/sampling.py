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

"""Sample images with one fixed seed per prompt, and score clean images."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from tqdm.auto import tqdm

from .pipelines.base import SPOPipeline
from .prompts import is_unicode
from .rewards.base import wrap_reward


def generate_images(
    pipeline: SPOPipeline,
    prompts: list[str],
    *,
    seeds: Iterable[int] | None = None,
    num_inference_steps: int = 20,
    guidance_scale: float = 5.0,
    eta: float = 1.0,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    guidance_rescale: float | None = None,
    clip_skip: int | None = None,
    sampler: str | None = None,
    batch_size: int = 8,
    progress: str | None = None,
) -> torch.Tensor:
    r"""
    Sample one image per prompt, from one seed per prompt. Initial latents and step noise of an image come from its own
    generator on the CPU, so it does not depend on batch size, order or number of devices (beyond rounding).

    Args:
        pipeline ([`SPOPipeline`]): from `wrap_pipeline`.
        prompts (`list[str]`): N prompts; repeat a prompt with another seed for more images of it.
        seeds (iterable of `int`, *optional*): N seeds; 0, 1, 2, ... by default.
        num_inference_steps, guidance_scale, eta, negative_prompt, height, width: the sampler; state them with every
            number you report.
        guidance_rescale (`float`, *optional*), clip_skip (`int`, *optional*): see [`SPOPipeline.configure`]; what the
            pipeline is set to by default.
        sampler (`str`, *optional*): kind of stochastic steps, see `sampler` of [`SPOConfig`]; what the pipeline is set to
            by default.
        batch_size (`int`, *optional*, defaults to `8`): images sampled together.
        progress (`str`, *optional*): show a progress bar with this title.

    Returns:
        `torch.Tensor` of shape `(N, 3, height, width)` in [0, 1], float32, on the CPU.
    """
    # Every image has a seed of its own, so that it depends on nothing but its prompt and that seed.
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    if len(seeds) != len(prompts):
        raise ValueError(f"There must be one seed per prompt, got {len(seeds)} seeds for {len(prompts)} prompts.")
    if not is_unicode(negative_prompt):
        raise ValueError(
            f"`negative_prompt` is not valid Unicode, {negative_prompt[:60]!r}: half of a surrogate pair."
        )
    options = {"guidance_rescale": guidance_rescale, "clip_skip": clip_skip}

    # Sample in batches; images go to the CPU one batch at a time, so that the device holds one batch only.
    pipeline.denoiser.eval()  # an adapter that was just loaded is in training mode, with the dropout of its file
    images = []
    bar = tqdm(total=len(prompts), desc=progress, unit="image", disable=progress is None)
    with pipeline.configured(**options), stochastic_steps(pipeline, sampler):
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
            with pipeline.encoders_on_device():
                embeds = pipeline.encode_prompt(batch, negative_prompt, **given_size(height, width))
            sampled = pipeline.sample(embeds, generators, num_inference_steps, guidance_scale, eta, height, width)
            images.append(sampled.div(2).add(0.5).clamp(0, 1).cpu())
            bar.update(len(batch))
    bar.close()
    return torch.cat(images) if images else torch.empty(0, 3, 0, 0)


@contextlib.contextmanager
def stochastic_steps(pipeline: SPOPipeline, sampler: str | None) -> Iterator[None]:
    """
    A context in which the pipeline takes the steps of `sampler`; `None` changes nothing.

    Raises:
        ValueError: if the pipeline's step rule does not know the sampler.
    """
    if sampler is None:
        yield
        return
    before = getattr(pipeline.step_rule, "sampler", "ddim")  # the rule of models with betas has one kind only
    pipeline.step_rule.set_sampler(sampler)
    try:
        yield
    finally:
        pipeline.step_rule.set_sampler(before)


def given_size(height: int | None, width: int | None) -> dict[str, int]:
    """`height` and `width` as arguments of `encode_prompt`. One that is `None` is left out: the model's own is used."""
    sizes = {"height": height, "width": width}
    return {name: value for name, value in sizes.items() if value is not None}


@torch.no_grad()
def score_images(
    images: torch.Tensor,
    prompts: list[str],
    reward: Callable,
    timestep: int = 0,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    pipeline: SPOPipeline | None = None,
) -> torch.Tensor:
    """
    Scores of clean images under a reward model or reward function. A reward that judges latents gets the mean of the
    VAE's encoding of each image.

    Args:
        images (`torch.Tensor` of shape `(N, 3, height, width)`): in [0, 1].
        prompts (`list[str]`): N prompts.
        reward: everything that [`wrap_reward`] takes, such as a [`StepAwareRewardModel`] or a callable `(images in [0,
            1], prompts, timesteps) -> (N,)`.
        timestep (`int`, *optional*, defaults to `0`): 0 is the clean image.
        batch_size (`int`, *optional*, defaults to `32`): images scored together.
        device (`torch.device` or `str`, *optional*): where a callable gets its images, as in rollouts. A reward model
            gets them on its own device.
        pipeline ([`SPOPipeline`], *optional*): its VAE encodes the images for a reward that judges latents.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32, on the CPU.

    Raises:
        ValueError: for a reward that scores latents, without a pipeline to encode images.
    """
    reward = wrap_reward(reward)
    if reward.sees != "images" and pipeline is None:
        raise ValueError(
            "This reward scores latents: pass the `pipeline` whose VAE is to encode the images, or use a reward of images."
        )
    device = reward.device or device
    scores = [torch.empty(0)]
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].to(device) * 2 - 1
        if reward.sees != "images":
            batch, _ = pipeline.image_posterior(batch)
        text = reward.encode_prompts(prompts[start : start + batch_size])
        timesteps = torch.full((len(batch),), timestep, dtype=torch.long, device=device)
        scores.append(reward.score(batch, text, timesteps).cpu())
    return torch.cat(scores)
