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
Check that a checkpoint belongs to a run. Pairs that still wait in it for their optimizer step were drawn with one schedule
and guidance, and its weights are changes of one base model: a run with others must not go on as if they were its own.
"""

import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.utils import logging

from ..pipelines.adapters import adapter_parameters
from ..pipelines.base import SPOPipeline
from ..pipelines.shards import whole
from ..spo_config import SPOConfig
from ..step_pairs import StepPairs


logger = logging.get_logger(__name__)

# These settings decide how a transition is drawn. All others may change from one part of a run to the next.
TRANSITION_SETTINGS = (
    "num_inference_steps", "sampler", "eta", "guidance_scale", "guidance_rescale", "negative_prompt", "clip_skip", "height",
    "width", "seed",
)  # fmt: skip
SAMPLED_WEIGHTS = 16  # tensors of a network that are looked at, and numbers of each
ROUNDING = 0.01  # relative; bfloat16 rounds by at most 0.004


def transition_settings(args: SPOConfig, timesteps: list[int]) -> dict[str, Any]:
    """How a transition from x_t to x_{t-1} is drawn, and the seed of the order of prompts, as JSON keeps it."""
    settings = {name: getattr(args, name) for name in TRANSITION_SETTINGS}
    return {**settings, "timesteps": timesteps}


def check_waiting_pairs(
    folder: str,
    written: dict[str, Any] | None,
    now: dict[str, Any],
    pool: StepPairs | None,
    latent_shape: tuple[int, ...],
) -> None:
    """
    Check that the pairs of a checkpoint were drawn with the settings of this run. Another seed is only a warning.

    Args:
        folder (`str`): the checkpoint.
        written (`dict`, *optional*): its [`transition_settings`]; an old checkpoint has none.
        now (`dict`): those of this run.
        pool ([`StepPairs`], *optional*): the pairs that wait.
        latent_shape (`tuple[int, ...]`): `(C, h, w)` of this run.

    Raises:
        ValueError: if this run would take them for its own, and they are not.
    """
    changed = [name for name in now if written is not None and name in written and written[name] != now[name]]
    if "seed" in changed:
        logger.warning(
            f"{folder!r} was written with `seed={written['seed']}` and this run has {now['seed']}: prompts come in "
            "another order from here on, so some are seen twice in this epoch and others not at all."
        )
        changed.remove("seed")
    if pool is None or len(pool) == 0:
        return

    if changed:
        what = ", ".join(f"`{name}={written[name]!r}` (now {now[name]!r})" for name in changed)
    else:
        what = _other_transitions(pool, now["timesteps"], latent_shape)
    if what is None:
        return
    raise ValueError(
        f"{len(pool)} pairs wait in {folder!r} that were drawn with {what}: this run would train on them as if they were "
        "its own. Resume with the settings of the checkpoint; or start a new run from its weights, with "
        "`trainer.load_model(...)` and `trainer.train()`."
    )


def sample_base_weights(pipeline: SPOPipeline) -> dict[str, list[float]]:
    """
    A few numbers of the weights of the base model, by which it is known again in any precision of 16 bits or more.

    Returns:
        `dict[str, list[float]]`: name of the denoiser and of each text encoder -> numbers. Networks that are trained as a
        whole, or whose weights are quantised, have none. If the denoiser is spread over processes, each must call it.
    """
    numbers = {}
    for name, network in {pipeline.denoiser_name: pipeline.denoiser, **pipeline.text_encoders()}.items():
        # Adapters are no part of it: neither the policy's nor that of a reward on the same denoiser.
        adapters = set(map(id, adapter_parameters(network)))
        base = [weight for weight in network.parameters() if id(weight) not in adapters and _is_comparable(weight)]
        # Spread over the network, since a fine-tuned model may keep its first layers.
        chosen = base[:: max(len(base) // SAMPLED_WEIGHTS, 1)][:SAMPLED_WEIGHTS]
        values = []
        for weight in chosen:
            values += whole(weight).flatten()[:SAMPLED_WEIGHTS].float().tolist()
        if values:
            numbers[name] = values
    return numbers


def _is_comparable(weight: torch.nn.Parameter) -> bool:
    """Whether a weight is frozen and has plain numbers. Rounded to 8 bits or less, those of two models may look alike."""
    shape = getattr(weight, "ds_shape", weight.shape)  # DeepSpeed takes the tensor away
    if weight.requires_grad or len(shape) < 2 or math.prod(shape) == 0:
        return False
    if is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor):  # a shard of FSDP is plain
        return False
    return weight.is_floating_point() and torch.finfo(weight.dtype).bits >= 16


def check_base(folder: str, written: dict[str, list[float]] | None, now: dict[str, list[float]]) -> None:
    """
    Check that a checkpoint was trained on the base model of this run.

    Args:
        folder (`str`): the checkpoint.
        written (`dict`, *optional*): its [`sample_base_weights`]; an old checkpoint has none.
        now (`dict`): those of this run.

    Raises:
        ValueError: if they are of another model, whose weights differ by more than rounding.
    """
    for name, numbers in (written or {}).items():
        before = torch.tensor(numbers)
        here = torch.tensor(now.get(name, numbers))
        if len(here) != len(before) or ((here - before).abs() > ROUNDING * before.abs() + 1e-6).any():
            raise ValueError(
                f"{folder!r} was trained on another base model: the weights of its {name} are not those of this run. Resume "
                "with the base model of the checkpoint; or start a new run from its weights, with `trainer.load_model(...)` and "
                "`trainer.train()`."
            )


def _other_transitions(pool: StepPairs, timesteps: list[int], latent_shape: tuple[int, ...]) -> str | None:
    """What the pairs themselves show to be different. An old checkpoint does not name its settings."""
    other = set(pool.timesteps.tolist()) - set(timesteps)
    if other:
        return f"timesteps {sorted(other)}"
    shape = tuple(pool.latents.shape[1:])
    if shape != tuple(latent_shape):
        return f"latents of shape {shape}"
    return None
