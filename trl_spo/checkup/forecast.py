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
Predicted peak memory of a run, by phase. Networks are on paper (`checkup.networks`); what runs in each phase is followed on
tensors without values (`training.memory`), at the sizes that the run would choose on the card.
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..pipelines.base import SPOPipeline
from ..pipelines.conditioning import PromptEmbeds
from ..rewards.base import wrap_reward
from ..spo_config import SPOConfig
from ..training.chunk_sizes import CHUNK_SIZES, ChunkLimits, chunk_limits
from ..training.memory import (
    GIB,
    denoiser_bytes,
    module_bytes,
    peak_activation_bytes,
    power_of_two_below,
    samples_within,
    scoring_bytes,
)
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


FSDP2, ZERO3 = "FSDP 2", "DeepSpeed ZeRO-3"  # what spreads a denoiser over processes
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
class Networks:
    """
    The networks of one precision on fake tensors, and what is known of their memory by now.

    Attributes:
        pipeline ([`SPOPipeline`]), trained (`torch.nn.Module`), reward (`torch.nn.Module`, *optional*): as the run prepares
            them.
        fake_mode (`FakeTensorMode`): of their weights.
    """

    pipeline: SPOPipeline
    trained: torch.nn.Module
    reward: torch.nn.Module | None
    fake_mode: FakeTensorMode
    known: dict[tuple, int] = field(default_factory=dict)

    def modules(self) -> list[torch.nn.Module]:
        """All networks, also those that the pipeline holds."""
        pipeline = self.pipeline
        found = [pipeline.denoiser, pipeline._frozen_copy, *pipeline.frozen_modules().values(), self.reward]
        return [module for module in found if module is not None]

    def _once(self, key: tuple, predict: Callable[[], int]) -> int:
        """A prediction takes a second of a large model: each is made once."""
        key = (*key, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
        if key not in self.known:
            self.known[key] = predict()
        return self.known[key]

    def embeds(self, count: int) -> PromptEmbeds:
        """Embeddings of so many prompts."""
        return embeds_of(text_shape(self.pipeline), self.pipeline.compute_dtype)(count)

    def denoiser_bytes(self, config: SPOConfig, samples: int) -> int:
        """Bytes of one call of the denoiser in a rollout."""

        def predict():
            pipeline = self.pipeline
            shape = pipeline.latent_shape(config.height, config.width)
            pipeline.set_timesteps(config.num_inference_steps, shape)
            with self.fake_mode:
                embeds = self.embeds(1)
            options = {"device": torch.device("cpu"), "fake_mode": self.fake_mode}
            return denoiser_bytes(pipeline, embeds, shape, config.guidance_scale, samples, **options)

        return self._once(("denoiser", config.height, config.width, config.guidance_scale, samples), predict)

    def scoring_bytes(self, config: SPOConfig, samples: int) -> int:
        """Bytes of decoding and judging so many samples at once."""

        def predict():
            reward = None if self.reward is None else wrap_reward(self.reward)
            shape = self.pipeline.latent_shape(config.height, config.width)
            options = {"device": torch.device("cpu"), "fake_mode": self.fake_mode}
            return scoring_bytes(
                self.pipeline, reward, shape, samples, image_size=config.scoring_image_size, **options
            )

        return self._once(("scoring", config.height, config.width, config.scoring_image_size, samples), predict)

    def _warm_up(self, timestep: int) -> None:
        """Step rules keep tables of their schedule, which need values: they are made here, before there are none."""
        origin = torch.zeros(1, 1, 1, 1)
        self.pipeline.step_distribution(origin, torch.tensor([timestep]), origin, 1.0)

    def step_bytes(self, config: SPOConfig, pairs: int) -> int:
        """Bytes of a training step of so many pairs."""
        checkpointing = uses_checkpointing(config)

        def predict():
            pipeline = self.pipeline
            shape = pipeline.latent_shape(config.height, config.width)
            schedule = pipeline.set_timesteps(config.num_inference_steps, shape)
            timestep = schedule[len(schedule) // 2]
            self._warm_up(timestep)
            set_checkpointing(pipeline, self.trained, checkpointing)
            step = spo_training_step(
                pipeline,
                self.trained,
                self.embeds,
                pairs,
                num_samples=pairs * (2 if config.num_inner_steps > 1 else 1),  # an x_t for each transition, at worst
                guidance_scale=config.guidance_scale if config.train_cfg else pipeline.unguided_scale,
                latent_shape=shape,
                latent_dtype=pipeline.latent_dtype,
                timestep=timestep,
            )
            return peak_activation_bytes(step, fake_mode=self.fake_mode)

        return self._once(("step", config.height, config.width, checkpointing, pairs), predict)


def _largest(bytes_of_batch: Callable[[int], int], limits: ChunkLimits) -> int:
    """The largest size within limits; where the run rounds it to a power of two, these alone are tried."""
    budget = limits.budget_gib * GIB
    if not limits.rounds:
        return samples_within(bytes_of_batch, budget, limits.largest)
    size = power_of_two_below(limits.largest)
    while size > 1 and bytes_of_batch(size) > budget:
        size //= 2
    return size


def gathered_bytes(trained: torch.nn.Module) -> int:
    """
    Weights of a sharded denoiser that a process has whole at one time: what is in no block; of two blocks, as the next one is
    gathered while one computes; and of one block around these, if blocks hold others.
    """
    denoiser = trained.denoiser
    names = set(trained._no_split_modules) - {type(denoiser).__name__}
    blocks = [module for module in denoiser.modules() if type(module).__name__ in names]
    own, around = [], [0]  # bytes of each block without those of blocks inside it
    for block in blocks:
        inside = [module for module in block.modules() if module is not block and type(module).__name__ in names]
        held = {id(p): p.nbytes for p in block.parameters()}
        for module in inside:
            for parameter in module.parameters():
                held.pop(id(parameter), None)
        (around if inside else own).append(sum(held.values()))
    rest = module_bytes(denoiser) - sum(own) - sum(around)
    return rest + sum(sorted(own)[-2:]) + max(around)


class SPOForecaster:
    """
    Predicts the memory of SPO runs that differ in settings, and builds the networks of each precision once.

    Args:
        model ([`PublishedModel`]): classes and settings of the pipeline.
        make_reward (`Callable[[SPOPipeline], torch.nn.Module | None]`): makes the reward model on the meta device; `None`
            for a reward that is not known.
        peft_config (`Callable[[SPOPipeline], PeftConfig | None]`): the adapter of the run.
        world_size (`int`, *optional*, defaults to `1`): processes of the run.
        sharding (`str`, *optional*): "FSDP 2" or "DeepSpeed ZeRO-3", which spread the denoiser over them.
    """

    def __init__(
        self,
        model: PublishedModel,
        make_reward: Callable[[SPOPipeline], torch.nn.Module | None],
        peft_config: Callable[[SPOPipeline], Any],
        world_size: int = 1,
        sharding: str | None = None,
    ):
        self.model = model
        self.make_reward = make_reward
        self.peft_config = peft_config
        self.world_size = world_size
        self.sharding = sharding
        self._networks: dict[tuple, Networks] = {}

    def networks(self, variant: Variant) -> Networks:
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
            pipeline.configure(guidance_rescale=config.guidance_rescale, clip_skip=config.clip_skip)
            pipeline.step_rule.set_sampler(config.sampler)
            networks = Networks(pipeline, trained, reward, FakeTensorMode(allow_non_fake_inputs=True))
            make_fake(networks.fake_mode, *networks.modules())
            give_gradients(trained, networks.fake_mode)
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
        exchanges_buckets = self.world_size > 1 and not self.sharding
        found["gradients"] = trained * (2 if exchanges_buckets else 1)
        found["optimizer states"] = int(optimizer_share(config) * trained)
        if self.sharding == ZERO3:
            found["DeepSpeed's copy of what is trained"] = trained
        if self.sharding:  # so far everything is of the denoiser, of which each process has a part
            found = {name: math.ceil(size / self.world_size) for name, size in found.items()}
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
        if self.sharding:
            whole = gathered_bytes(networks.trained)
            uses_denoiser = [not phase.name.startswith(("text", "rollout, decode")) for phase in phases]
            phases = [
                replace(phase, bytes=phase.bytes + whole * uses)
                for phase, uses in zip(phases, uses_denoiser, strict=True)
            ]
        phases.append(Phase("optimizer step", 0))
        if self.sharding == ZERO3:  # it takes the denoiser apart on the device
            denoiser = module_bytes(networks.pipeline.denoiser)
            phases.append(Phase("before training, the whole denoiser", denoiser - denoiser // self.world_size))
        return Forecast(resident, phases)

    def _free(self, variant: Variant, card: Card | None, resident: dict[str, int]) -> int | None:
        """What the run will find free before its first rollout, when gradients and states are not there yet."""
        if card is None or card.device_type != "cuda":
            return None
        later = ("gradients", "optimizer states")
        loaded = sum(size for name, size in resident.items() if name not in later)
        return max(0, min(card.total - CONTEXT_BYTES, int(card.usable / (1 - RESERVE))) - loaded)

    def _rollout(self, config: SPOConfig, networks: Networks, free: int | None, card: Card | None) -> list[Phase]:
        """Both phases of a rollout, at the sizes that the run would choose."""
        pipeline = networks.pipeline
        shape = pipeline.latent_shape(config.height, config.width)
        most = config.num_candidates * config.per_device_rollout_batch_size
        denoiser_of = functools.partial(networks.denoiser_bytes, config)
        scoring_of = functools.partial(networks.scoring_bytes, config)
        sizes = {name: getattr(config, name) for name in CHUNK_SIZES}
        if not all(sizes.values()):
            limits = chunk_limits(config, pipeline, "cpu" if card is None else card.device_type, free)
            chosen = limits.busy
            if limits.budget_gib is not None and not self.sharding:  # shards go by no memory, which may differ
                chosen = limits.sizes(*(_largest(phase, limits) for phase in (denoiser_of, scoring_of)))
            sizes = {name: size or chosen[name] for name, size in sizes.items()}
        denoiser, decoder, _ = (min(size, most) for size in sizes.values())
        kept = self._candidates(config, pipeline, shape)
        return [
            Phase(f"rollout, {pipeline.denoiser_name}", denoiser_of(denoiser) + kept, denoiser, "latents"),
            Phase("rollout, decode and reward model", scoring_of(decoder) + kept, decoder, "images"),
        ]

    @staticmethod
    def _candidates(config: SPOConfig, pipeline: SPOPipeline, shape: tuple[int, ...]) -> int:
        """Bytes of the candidates of all steps, which wait for their scores: x_{t-1} and the prediction of x_0, float32."""
        branching = config.num_inference_steps - (config.branch_start_step or 0)
        count = config.per_device_rollout_batch_size * config.num_candidates * branching
        return 2 * 4 * count * functools.reduce(lambda a, b: a * b, shape)

    def _training_step(self, config: SPOConfig, networks: Networks) -> Phase:
        pairs = config.per_device_train_batch_size
        name = "training step" + (", checkpointing" if uses_checkpointing(config) else "")
        return Phase(name, networks.step_bytes(config, pairs), pairs, "pairs")
