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
Settings that make a run fit a card. Every suggestion is predicted before it is made. Those that train exactly the same come
first, and among them those that cost no time.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..training.memory import GIB
from ..training.memory_plan import NF4_BYTES
from .forecast import Card, Forecast, Variant, uses_checkpointing


MOST_REMEDIES = 2  # each takes seconds to predict for a large model


@dataclass(frozen=True)
class Change:
    """
    A change of settings.

    Attributes:
        options (`str`): as they are given on the command line.
        costs (`str`): what it costs, in words.
        apply (`Callable[[Variant], Variant]`): the run with it.
        frees (`str`, *optional*): what of the weights it makes smaller, if it changes nothing else.
    """

    options: str
    costs: str
    apply: Callable[[Variant], Variant]
    frees: str | None = None

    def saves_at_most(self, found: Forecast) -> int:
        """Bytes of the peak that it can save, from above."""
        if self.frees is None or self.frees in found.highest.name:
            return found.peak
        return found.resident.get(self.frees, 0)

    @property
    def name(self) -> str:
        """The option that is changed; of two that change the same, the later one counts."""
        return self.options.split()[0]


@dataclass(frozen=True)
class Remedy:
    """
    Changes that make a run fit.

    Attributes:
        options (`str`): as they are given on the command line.
        costs (`str`): what they cost, in words.
        forecast ([`Forecast`]): with them.
    """

    options: str
    costs: str
    forecast: Forecast

    @property
    def peak_gib(self) -> float:
        return self.forecast.peak / GIB


def find_remedies(
    forecast: Callable[[Variant], Forecast], variant: Variant, card: Card, denoiser_name: str
) -> list[Remedy]:
    """
    Changes after which a run fits a card: those that train the same before those that do not, the cheaper ones first.

    Args:
        forecast (`Callable[[Variant], Forecast]`): predicts a run on the card.
        variant ([`Variant`]): the run, which does not fit.
        card ([`Card`])
        denoiser_name (`str`): of the network whose weights may be quantised.

    Returns:
        `list[Remedy]`: the first two single changes that are enough; otherwise the shortest chain of them that is. Empty, if all
        together are not enough.
    """

    def predicted(changes: list[Change]) -> Forecast | None:
        try:
            return forecast(_all(changes, variant))
        except Exception:  # a combination that cannot be followed is not suggested
            return None

    # Single changes that are enough.
    alone = []
    before = forecast(variant)
    changes = list(possible_changes(variant, denoiser_name))
    for change in changes:
        if before.peak - change.saves_at_most(before) > card.usable:
            continue
        if any(remedy.options.split()[0] == change.name for remedy in alone):
            continue  # a smaller change of the same setting is enough
        if len(alone) == MOST_REMEDIES:
            break
        found = predicted([change])
        if found is not None and found.fits(card):
            alone.append(Remedy(change.options, change.costs, found))
    if alone:
        return alone

    # None is enough alone: add one after the other, then leave out what turned out not to be needed.
    chain: list[Change] = []
    found = before
    for change in changes:
        longer = [old for old in chain if old.name != change.name] + [change]
        with_it = predicted(longer)
        if with_it is not None and with_it.peak < found.peak:
            chain, found = longer, with_it
        if found.fits(card):
            break
    if not found.fits(card):
        return []
    for change in list(chain):
        shorter = [other for other in chain if other is not change]
        without = predicted(shorter)
        if without is not None and without.fits(card):
            chain, found = shorter, without
    options = " ".join(change.options for change in chain)
    return [Remedy(options, "; ".join(change.costs for change in chain), found)]


def _all(changes: list[Change], variant: Variant) -> Variant:
    for change in changes:
        variant = change.apply(variant)
    return variant


def possible_changes(variant: Variant, denoiser_name: str) -> Iterator[Change]:
    """Changes that can be made to a run: exact ones, the cheaper ones first, then half precision and fewer bits."""
    config = variant.config
    if getattr(config, "offload_text_encoders", None) is False:
        yield Change(
            "--offload_text_encoders true",
            "text encoders travel to the device for each rollout with new prompts",
            lambda run: run.changed(offload_text_encoders=True),
            frees="text encoders",
        )
    yield from _smaller_batches(config)
    if not uses_checkpointing(config):
        name = checkpointing_field(config)
        yield Change(
            f"--{name} true",
            "one more forward pass per pair",
            lambda run: run.changed(**{name: True}),
        )
    if config.per_device_train_batch_size > 1:
        yield _batch(config, 1)
    if not (config.bf16 or config.fp16):
        yield Change("--bf16 true", "half precision: faster, not exact", lambda run: run.changed(bf16=True))
    if variant.dtype == torch.float32:
        yield Change(
            "--dtype bfloat16 --bf16 true",
            "frozen weights in half precision: faster, not exact",
            lambda run: run.changed(dtype=torch.bfloat16, bf16=True, fp16=False),
        )
    if getattr(config, "reward_dtype", "") is None:
        half = "float16" if config.fp16 else "bfloat16"  # autocast refuses two kinds of half precision
        yield Change(
            f"--reward_dtype {half}",
            "rewards in half precision",
            lambda run: run.changed(reward_dtype=half),
            frees="reward model",
        )
    if variant.weight_bytes is None and getattr(config, "use_peft", False):
        yield _quantised(variant.dtype, denoiser_name)


def _quantised(dtype: torch.dtype, denoiser_name: str) -> Change:
    """The base in 4 bits, computed in the precision that the run has."""
    half = str(torch.bfloat16 if dtype == torch.float32 else dtype).removeprefix("torch.")
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": half}
    settings = {"dtype": half, "quantization_config": {denoiser_name: nf4}}
    return Change(
        f"--model_init_kwargs '{json.dumps(settings)}'",
        "needs bitsandbytes; layers are unpacked at each call",
        lambda run: run.changed(dtype=getattr(torch, half), weight_bytes=NF4_BYTES),
    )


def checkpointing_field(config: Any) -> str:
    """The name of the setting in this version of transformers."""
    names = {field.name for field in fields(config)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


def _smaller_batches(config: Any) -> Iterator[Change]:
    """Halves, down to two pairs, with as many pairs per update: the same training in more calls."""
    size = config.per_device_train_batch_size
    while size % 2 == 0 and size > 2:
        size //= 2
        yield _batch(config, size)


def _batch(config: Any, size: int) -> Change:
    accumulation = config.gradient_accumulation_steps * config.per_device_train_batch_size // size
    return Change(
        f"--per_device_train_batch_size {size} --gradient_accumulation_steps {accumulation}",
        "the same pairs per update in smaller calls",
        lambda run: run.changed(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation),
    )
