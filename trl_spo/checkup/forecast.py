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
Predicted peak memory of a run, by phase. Networks are on paper ([`checkup.networks`]); what runs in each phase is followed on
tensors without values (`training.memory`), at the sizes that the run would choose on the card.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..pipelines.base import SPOPipeline
from ..rewards.base import wrap_reward
from ..spo_config import SPOConfig
from ..training.chunk_sizes import CHUNK_SIZES, choose_chunk_sizes
from ..training.memory import GIB, denoiser_bytes, module_bytes, peak_activation_bytes, scoring_bytes
from ..training.memory_plan import (
    autocast_of,
    frozen_bytes,
    give_gradients,
    linear_weights,
    make_fake,
    set_checkpointing,
    spo_training_step,
    trained_bytes,
)
from .networks import PublishedModel, embeds_of, pipeline_on_paper, text_shape


RESERVE = 0.1  # of a card, for its context, workspaces of kernels and fragments of the allocator
CONTEXT_BYTES = GIB // 2  # what CUDA takes before anything is loaded
OPTIMIZER_STATES = {  # part of an optimizer's name -> bytes of its states per byte of trained float32 weights; Adam's are 2
    "8bit": 0.5,
    "4bit": 0.25,
    "adafactor": 0.01,
    "sgd": 1.0,
    "lion": 1.0,
}


@dataclass(frozen=True)
class Card:
    """
    Memory of a device, here or elsewhere.

    Attributes:
        name (`str`): for messages.
        usable (`int`): bytes that a run may take.
        total (`int`): bytes it has.
        device_type (`str`): `"cuda"` or `"cpu"`, which choose the sizes of their calls differently.
    """

    name: str
    usable: int
    total: int
    device_type: str = "cuda"

    @classmethod
    def planned(cls, gib: float) -> "Card":
        """A card of so many GiB that is somewhere else."""
        return cls(f"a card of {gib:g} GiB", int(gib * (1 - RESERVE) * GIB), int(gib * GIB))


@dataclass(frozen=True)
class Phase:
    """What a phase adds to the weights: `bytes` for `size` samples, pairs or images at a time."""

    name: str
    bytes: int
    size: int | None = None
    unit: str = ""


@dataclass(frozen=True)
class Forecast:
    """
    Predicted memory of a run.

    Attributes:
        resident (`dict[str, int]`): bytes that are on the device all the time.
        phases (`list[Phase]`): what takes turns beside them.
        notes (`tuple[str, ...]`): what could not be counted.
    """

    resident: dict[str, int]
    phases: list[Phase]
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        return sum(self.resident.values())

    @property
    def highest(self) -> Phase:
        """The phase that decides."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def peak(self) -> int:
        return self.weights + self.highest.bytes

    def fits(self, card: Card) -> bool:
        return self.peak <= card.usable


@dataclass(frozen=True)
class Variant:
    """
    A run, or the same run with some settings changed.

    Attributes:
        config: its config; a copy where something was changed.
        dtype (`torch.dtype`): of the frozen weights.
        weight_bytes (`float`, *optional*): bytes of each weight of the denoiser's linear layers, if these are quantised.
    """

    config: Any
    dtype: torch.dtype = torch.float32
    weight_bytes: float | None = None

    def changed(self, dtype: torch.dtype | None = None, weight_bytes: float | None = None, **settings) -> "Variant":
        """The same with other settings."""
        config = copy.copy(self.config)
        for name, value in settings.items():
            setattr(config, name, value)
        return Variant(config, dtype or self.dtype, self.weight_bytes if weight_bytes is None else weight_bytes)


def uses_checkpointing(config: Any) -> bool:
    """Whether activations are recomputed; transformers 5 has a new name for it."""
    return bool(getattr(config, "activation_checkpointing", None) or getattr(config, "gradient_checkpointing", None))


def autocast_dtype(config: Any) -> torch.dtype | None:
    """The precision of a trainer's autocast."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None


def optimizer_share(config: Any) -> float:
    """Bytes of the optimizer's states per byte of trained weights."""
    name = str(getattr(config.optim, "value", config.optim))
    return next((share for part, share in OPTIMIZER_STATES.items() if part in name), 2.0)


@dataclass
class _Networks:
    """The networks of one precision, on fake tensors."""

    pipeline: SPOPipeline
    trained: torch.nn.Module
    reward: torch.nn.Module | None
    fake_mode: FakeTensorMode
    steps: dict = field(default_factory=dict)  # (checkpointing, pairs) -> bytes of a training step

    def modules(self) -> list[torch.nn.Module]:
        pipeline = self.pipeline
        found = [pipeline.denoiser, pipeline._frozen_copy, *pipeline.frozen_modules().values(), self.reward]
        return [module for module in found if module is not None]


class SPOForecaster:
    """
    Predicts the memory of SPO runs that differ in settings, and builds the networks of each precision once.

    Args:
        model ([`PublishedModel`]): classes and settings of the pipeline.
        make_reward (`Callable[[SPOPipeline], torch.nn.Module | None]`): makes the reward model on the meta device; `None`
            for a reward that is not known.
        peft_config (`Callable[[SPOPipeline], PeftConfig | None]`): the adapter of the run.
        world_size (`int`, *optional*, defaults to `1`): processes of the run.
    """

    def __init__(
        self,
        model: PublishedModel,
        make_reward: Callable[[SPOPipeline], torch.nn.Module | None],
        peft_config: Callable[[SPOPipeline], Any],
        world_size: int = 1,
    ):
        self.model = model
        self.make_reward = make_reward
        self.peft_config = peft_config
        self.world_size = world_size
        self._networks: dict[tuple, _Networks] = {}

    def networks(self, variant: Variant) -> _Networks:
        """The networks as the run prepares them."""
        config = variant.config
        key = (variant.dtype, config.reward_dtype, config.use_peft)
        if key not in self._networks:
            pipeline = pipeline_on_paper(self.model, variant.dtype)
            reward = self.make_reward(pipeline)
            if reward is not None:
                wrap_reward(reward).prepare("meta", config.reward_dtype and getattr(torch, config.reward_dtype))
            with torch.device("meta"):
                trained = pipeline.prepare_for_training(self.peft_config(pipeline), config.use_peft)
            networks = _Networks(pipeline, trained, reward, FakeTensorMode(allow_non_fake_inputs=True))
            make_fake(networks.fake_mode, *networks.modules())
            give_gradients(trained, networks.fake_mode)
            pipeline.configure(guidance_rescale=config.guidance_rescale, clip_skip=config.clip_skip)
            pipeline.step_rule.set_sampler(config.sampler)
            self._networks[key] = networks
        return self._networks[key]

    def resident(self, variant: Variant) -> dict[str, int]:
        """Bytes of all that stays on the device, by what it is."""
        networks = self.networks(variant)
        pipeline, config = networks.pipeline, variant.config
        trained = trained_bytes(pipeline.denoiser)
        denoiser = module_bytes(pipeline.denoiser) - trained
        if variant.weight_bytes is not None:
            denoiser -= int(linear_weights(pipeline.denoiser) * (variant.dtype.itemsize - variant.weight_bytes))
        found = {pipeline.denoiser_name: denoiser} if denoiser else {}
        found["adapter" if config.use_peft else f"{pipeline.denoiser_name}, trained in float32"] = trained
        if pipeline._frozen_copy is not None:
            found["frozen copy of it"] = module_bytes(pipeline._frozen_copy)
        found["gradients"] = trained * (2 if self.world_size > 1 else 1)  # several processes exchange them in buckets
        found["optimizer states"] = int(optimizer_share(config) * trained)
        found |= frozen_bytes(pipeline)
        if networks.reward is not None:
            found["reward model"] = module_bytes(networks.reward)
        return {name: size for name, size in found.items() if size}

    def forecast(self, variant: Variant, card: Card | None = None) -> Forecast:
        """
        The memory of a run on a card.

        Args:
            variant ([`Variant`]): the run.
            card ([`Card`], *optional*): the rollout chooses its sizes by it; without one, those that keep a CPU busy.
        """
        config, networks = variant.config, self.networks(variant)
        resident = self.resident(variant)
        phases = []
        if config.offload_text_encoders:
            phases.append(Phase("text encoders, while they encode", resident.pop("text encoders", 0)))
        with autocast_of(autocast_dtype(config), like_cuda=card is not None and card.device_type == "cuda"):
            phases += self._rollout(config, networks, self._free(variant, card, resident), card)
            phases.append(self._training_step(config, networks))
        phases.append(Phase("optimizer step", 0))
        return Forecast(resident, phases)

    def _free(self, variant: Variant, card: Card | None, resident: dict[str, int]) -> int | None:
        """What the run will find free before its first rollout, when gradients and states are not there yet."""
        if card is None or card.device_type != "cuda":
            return None
        later = ("gradients", "optimizer states")
        loaded = sum(size for name, size in resident.items() if name not in later)
        return max(0, min(card.total - CONTEXT_BYTES, int(card.usable / (1 - RESERVE))) - loaded)

    def _rollout(self, config: SPOConfig, networks: _Networks, free: int | None, card: Card | None) -> list[Phase]:
        pipeline, fake_mode = networks.pipeline, networks.fake_mode
        reward = None if networks.reward is None else wrap_reward(networks.reward)
        shape = pipeline.latent_shape(config.height, config.width)
        pipeline.set_timesteps(config.num_inference_steps, shape)
        with fake_mode:
            embeds = embeds_of(text_shape(pipeline), pipeline.compute_dtype)(1)
        sizes = {name: getattr(config, name) for name in CHUNK_SIZES}
        if not all(sizes.values()):
            kind = "cpu" if card is None else card.device_type
            chosen = choose_chunk_sizes(config, pipeline, reward, embeds, free, kind)
            sizes = {name: size or chosen[name] for name, size in sizes.items()}
        largest = config.num_candidates * config.per_device_rollout_batch_size
        denoiser, decoder, _ = (min(size, largest) for size in sizes.values())
        options = {"device": torch.device("cpu"), "fake_mode": fake_mode}
        predicted = denoiser_bytes(pipeline, embeds, shape, config.guidance_scale, denoiser, **options)
        options["image_size"] = config.scoring_image_size
        scored = scoring_bytes(pipeline, reward, shape, decoder, **options)
        kept = self._candidates(config, pipeline, shape)
        return [
            Phase(f"rollout, {pipeline.denoiser_name}", predicted + kept, denoiser, "latents"),
            Phase("rollout, decode and reward", scored + kept, decoder, "images"),
        ]

    @staticmethod
    def _candidates(config: SPOConfig, pipeline: SPOPipeline, shape: tuple[int, ...]) -> int:
        """Bytes of the candidates of all steps, which wait for their scores: x_{t-1} and the prediction of x_0, float32."""
        branching = config.num_inference_steps - (config.branch_start_step or 0)
        count = config.per_device_rollout_batch_size * config.num_candidates * branching
        return 2 * 4 * count * functools.reduce(lambda a, b: a * b, shape)

    def _training_step(self, config: SPOConfig, networks: _Networks) -> Phase:
        pairs = config.per_device_train_batch_size
        key = (uses_checkpointing(config), pairs)
        if key not in networks.steps:
            networks.steps[key] = self._step_bytes(config, networks, pairs)
        name = "training step" + (", checkpointing" if key[0] else "")
        return Phase(name, networks.steps[key], pairs, "pairs")

    def _step_bytes(self, config: SPOConfig, networks: _Networks, pairs: int) -> int:
        pipeline = networks.pipeline
        shape = pipeline.latent_shape(config.height, config.width)
        schedule = pipeline.set_timesteps(config.num_inference_steps, shape)
        set_checkpointing(pipeline, networks.trained, uses_checkpointing(config))
        step = spo_training_step(
            pipeline,
            networks.trained,
            embeds_of(text_shape(pipeline), pipeline.compute_dtype),
            pairs,
            num_samples=pairs * (2 if config.num_inner_steps > 1 else 1),  # an x_t for each transition, at worst
            guidance_scale=config.guidance_scale if config.train_cfg else pipeline.unguided_scale,
            latent_shape=shape,
            latent_dtype=pipeline.latent_dtype,
            timestep=schedule[len(schedule) // 2],
        )
        return peak_activation_bytes(step, fake_mode=networks.fake_mode)
