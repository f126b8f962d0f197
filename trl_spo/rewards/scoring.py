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

"""Score candidates in full batches: decode where the reward wants images, ask it in chunks, wait for the device once."""

import math
from typing import NamedTuple

import torch

from ..pipelines.base import SPOPipeline
from ..training.numerics import is_finite
from .base import Reward


def even_slices(total: int, size: int | None) -> list[slice]:
    """
    The fewest slices of `total` samples with at most `size` each, all of nearly the same length. A short last slice would
    leave a GPU idle, and a single sample would be compiled anew.
    """
    count = max(1, math.ceil(total / size)) if size else 1
    ends = [total * i // count for i in range(count + 1)]
    return [slice(start, end) for start, end in zip(ends[:-1], ends[1:], strict=True)]


class CandidateScores(NamedTuple):
    """
    Scores of the K candidates of B prompts at one step. On the CPU, float32; NaN for what is not finite.

    Attributes:
        selection (`torch.Tensor` of shape `(K, B)`): what pairs are selected by.
        total (`torch.Tensor` of shape `(K, B)`): on one scale at all steps. The same, but for several rewards, which
            [`WeightedReward`] brings to a common scale step by step.
        parts (`dict[str, torch.Tensor]`): of several rewards the scores `(K, B)` of each.
    """

    selection: torch.Tensor
    total: torch.Tensor
    parts: dict[str, torch.Tensor]


class Scorer:
    """
    Asks the reward about candidates of one rollout. Prompts are encoded once.

    Args:
        pipeline ([`SPOPipeline`]): decodes the candidates.
        reward ([`Reward`]): scores them.
        prompts (`list[str]`): the B prompts of the rollout.
        decode_batch_size (`int`, *optional*): maximum number of images in one call of the decoder.
        batch_size (`int`, *optional*): maximum number of samples in one call of the reward; `decode_batch_size` by
            default.
        image_size (`int`, *optional*): decode at this size, in pixels of the short side.
    """

    def __init__(
        self,
        pipeline: SPOPipeline,
        reward: Reward,
        prompts: list[str],
        decode_batch_size: int | None = None,
        batch_size: int | None = None,
        image_size: int | None = None,
    ):
        self.pipeline = pipeline
        self.reward = reward
        self.prompts = prompts
        self.decode_batch_size = decode_batch_size
        self.batch_size = batch_size or decode_batch_size
        self.image_size = image_size
        self.text = reward.encode_prompts(prompts)
        self.rows_on_cpu = isinstance(self.text, list) or getattr(self.text, "rows_on_cpu", False)

    def __call__(self, candidates: list[tuple[torch.Tensor, int]]) -> list[CandidateScores]:
        """
        Args:
            candidates: pairs of what is judged, as latents `(K, B, ...)`, and its timestep. What is scored together may
                come from different steps.

        Returns:
            list of [`CandidateScores`]: NaN for latents and images that are not finite, instead of which the reward sees
            zeros.
        """
        # Join the candidates of all steps, with the row of the prompt and the timestep of each.
        shapes = []
        rows = []
        timesteps = []
        for latents, timestep in candidates:
            num_candidates, batch_size = latents.shape[:2]
            shapes.append((num_candidates, batch_size))
            rows.append(torch.arange(batch_size).repeat(num_candidates))
            timesteps.append(torch.full((num_candidates * batch_size,), timestep))
        latents = torch.cat([latents.flatten(0, 1).float() for latents, _ in candidates])
        timesteps = torch.cat(timesteps).to(latents.device, non_blocking=True)
        rows = torch.cat(rows)
        if not self.rows_on_cpu:  # features are on the device, a list of prompts is not: neither has to wait
            rows = rows.to(latents.device, non_blocking=True)

        # Score them in chunks, and split the scores again.
        scores = []
        for chunk in even_slices(len(latents), self.batch_size):
            scores.append(self._score(latents[chunk], rows[chunk], timesteps[chunk]))
        scores = torch.cat(scores, dim=-1).cpu()  # the one wait for the device
        steps = scores.split([math.prod(shape) for shape in shapes], dim=-1)
        return [self._of_one_step(step.unflatten(-1, shape)) for step, shape in zip(steps, shapes, strict=True)]

    def _of_one_step(self, scores: torch.Tensor) -> CandidateScores:
        """`(K, B)`, or `(M, K, B)` of M rewards, as what pairs are selected by."""
        names = self.reward.parts
        if not names:
            return CandidateScores(scores, scores, {})
        parts = dict(zip(names, scores, strict=True))
        return CandidateScores(self.reward.combine(parts), self.reward.total(parts), parts)

    def _score(self, latents: torch.Tensor, rows: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`(N,)` scores, or `(M, N)` of M rewards."""
        finite = is_finite(latents)
        samples = _blank(latents, finite)
        if self.reward.sees == "images":
            samples = self._decode(samples)
            finite = finite & is_finite(samples)
            samples = _blank(samples, finite)
        if self.reward.parts:
            parts = self.reward.score_parts(samples, self.text[rows], timesteps)
            scores = torch.stack([parts[name] for name in self.reward.parts])
        else:
            scores = self.reward.score(samples, self.text[rows], timesteps)
        return scores.masked_fill(~finite, math.nan)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        chunks = [latents[chunk] for chunk in even_slices(len(latents), self.decode_batch_size)]
        return torch.cat([self.pipeline.decode_for_scoring(chunk, self.image_size) for chunk in chunks])

    def image_is_finite(self, latents: torch.Tensor) -> bool:
        """Whether one x_0 prediction decodes to numbers; half-precision decoders may overflow."""
        return self.reward.sees != "images" or bool(self._decode(latents[None].float()).isfinite().all())


def _blank(values: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    """`values (N, ...)` with zeros instead of the rows that are not finite."""
    return torch.where(finite.view(-1, *[1] * (values.ndim - 1)), values, 0.0)
