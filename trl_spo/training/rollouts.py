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

"""From prompts to pairs under the policy as it is: what a process does that rolls out, whether it trains as well or not."""

import contextlib

import torch

from ..pipelines.base import SPOPipeline
from ..pipelines.conditioning import PromptEmbeds
from ..pipelines.encoding_cache import EncodingCache
from ..rewards.base import Reward
from ..rollout import stepwise_rollout
from ..sampling import given_size
from ..spo_config import SPOConfig
from ..step_pairs import StepPairs
from .chunk_sizes import CHUNK_SIZES, choose_chunk_sizes, chunk_limits


MOST_PROCESSES = 4096  # numbers of rollouts of different processes are apart by this


class RolloutMixin:
    """
    Rollouts with the settings of a config. A subclass has `args`, `pipeline` and `reward`, and calls `_begin_rollouts`.
    """

    args: SPOConfig
    pipeline: SPOPipeline
    reward: Reward
    _shards = False  # whether the denoiser is spread over the processes

    def _begin_rollouts(self, device: torch.device) -> None:
        self._rollout_device = device
        self._encodings = EncodingCache()
        self._chunk_sizes: dict[str, int] = {}

    def _autocast(self) -> contextlib.AbstractContextManager:
        """The precision of forward passes."""
        raise NotImplementedError

    def _encode(self, prompts: list[str]) -> PromptEmbeds:
        """Embeddings of prompts; the most recent ones are kept, so that an epoch does not encode them twice."""
        args = self.args
        size = given_size(args.height, args.width)
        with self._autocast():  # always the same, whoever asks first
            return self._encodings.encode_prompts(self.pipeline, prompts, args.negative_prompt, **size)

    def chunk_sizes(self, embeds: PromptEmbeds) -> dict[str, int]:
        """
        How many samples denoiser, decoder and reward model get at once, by the name of the config field: what the
        config says; otherwise what fits `memory_budget`; otherwise about as many pixels as keep the device busy, on CUDA
        no more than fit its free memory. Memory does not grow with the pool of candidates.
        """
        args = self.args
        sizes = {name: getattr(args, name) for name in CHUNK_SIZES}
        if all(sizes.values()):
            return sizes
        if not self._chunk_sizes:
            self._chunk_sizes = self._choose_chunk_sizes(embeds)
        return {name: size or self._chunk_sizes[name] for name, size in sizes.items()}

    def _choose_chunk_sizes(self, embeds: PromptEmbeds, free: int | None = None) -> dict[str, int]:
        if self._shards:  # not by free memory, which differs between processes
            return chunk_limits(self.args, self.pipeline, self._rollout_device.type, None).busy
        with self._autocast():
            return choose_chunk_sizes(self.args, self.pipeline, self.reward, embeds, self._rollout_device, free)

    def _roll_out(
        self, prompts: list[str], seed: int, place: int, num_padding: int = 0, return_trajectory: bool = False
    ) -> StepPairs:
        """
        One stepwise rollout.

        Args:
            prompts (`list[str]`): of the batch.
            seed (`int`), place (`int`): fix the randomness, with the config's seed: number of the rollout, and of the process among
                those that roll out at the same time.
            num_padding (`int`): how many of the prompts, from the end, are neither scored nor counted.
            return_trajectory (`bool`): keep latents per branch.
        """
        common = (self.args.seed * 1_000_003 + seed) * MOST_PROCESSES
        generator = torch.Generator(self._rollout_device).manual_seed((common + place) % 2**63)
        plan_generator = None
        if self._shards:  # as many calls of the denoiser in every process
            plan_generator = torch.Generator().manual_seed(common % 2**63)
        embeds = self._encode(prompts)
        with self._autocast():
            return stepwise_rollout(
                self.pipeline,
                embeds,
                self.reward,
                settings=self.args.rollout_settings(**self.chunk_sizes(embeds)),
                prompts=prompts,
                on_nonfinite="skip",
                generator=generator,
                plan_generator=plan_generator,
                num_padding=num_padding,
                return_trajectory=return_trajectory,
            )
