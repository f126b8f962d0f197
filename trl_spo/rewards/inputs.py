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

"""Check the inputs of reward models (texts and timesteps), and define their output; freeze and thaw networks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput


@dataclass
class StepRewardOutput(ModelOutput):
    r"""
    Output of the reward models that compare a sample with its text, which are those that [`StepRewardTrainer`] trains.

    Args:
        scores (`torch.Tensor` of shape `(batch_size,)`):
            `exp(logit_scale) * cos(image, text)`, float32, or what the query-attention head of a [`LatentRewardModel`]
            answers. That head has no features to compare: the other three are `None`.
        image_embeds (`torch.Tensor` of shape `(batch_size, projection_dim)`):
            Normalised features of the samples, float32.
        text_embeds (`torch.Tensor` of shape `(batch_size, projection_dim)`):
            Normalised features of the texts, float32.
        logit_scale (`torch.Tensor` of shape `()`):
            `exp(logit_scale)`, the factor in front of the cosine, float32.
    """

    scores: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None


def check_texts(prompts: Any) -> None:
    """
    Raises:
        ValueError: if `prompts` is not a list of strings. A single string would count as a list of its letters.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("`prompts` must be a list of strings.")


def checked_timesteps(
    timesteps: torch.Tensor | int | None, batch_size: int, num_train_timesteps: int, device: torch.device
) -> torch.Tensor:
    """
    One timestep per sample, on the device of the model.

    Args:
        timesteps (`torch.Tensor` of shape `(batch_size,)` or `()`, or `int`, *optional*): integers in
            `[0, num_train_timesteps)`; `None` stands for finished samples, timestep 0.
        batch_size (`int`): B.
        num_train_timesteps (`int`): number of timesteps that the model was made for.
        device (`torch.device`): device of the model.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: int64.

    Raises:
        ValueError: if they are not integers, not one per sample, or out of range. The range is checked where timesteps are
            numbers or on the CPU; those on an accelerator are trusted, as reading them would wait for it.
    """
    timesteps = torch.as_tensor(0 if timesteps is None else timesteps)
    if timesteps.is_floating_point() or timesteps.dtype == torch.bool:
        raise ValueError(f"`timesteps` must be integers, got {timesteps.dtype}.")
    if timesteps.shape not in ((), (batch_size,)):
        raise ValueError(
            f"`timesteps` must be one integer or have shape ({batch_size},), one per sample, got shape "
            f"{tuple(timesteps.shape)}."
        )
    on_host = timesteps.device.type == "cpu"
    if on_host and batch_size > 0 and not bool(((timesteps >= 0) & (timesteps < num_train_timesteps)).all()):
        raise ValueError(f"`timesteps` must lie in [0, {num_train_timesteps}), got {timesteps.tolist()}.")
    return timesteps.long().to(device, non_blocking=on_host).expand(batch_size)


def freeze(module: nn.Module, stop: Callable[[], Any] | None = None) -> nn.Module:
    """Stop training a module, or the part of it that `stop` freezes; [`thaw`] brings back what was trained before."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if stop is None:
        module.requires_grad_(False)
    else:
        stop()
    for parameter in trained:
        parameter.frozen_for_a_run = not parameter.requires_grad
    return module


def thaw(module: nn.Module) -> nn.Module:
    """Train again what [`freeze`] has stopped, for a run that ended: a model may judge first and be trained later."""
    for parameter in module.parameters():
        if getattr(parameter, "frozen_for_a_run", False):
            parameter.requires_grad_(True)
            parameter.frozen_for_a_run = False
    return module
