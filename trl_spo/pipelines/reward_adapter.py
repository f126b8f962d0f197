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
Add the adapter of a latent reward to the denoiser of a policy: a second adapter, which is active only while the reward
scores.
"""

import contextlib
import copy
from collections.abc import Iterator

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer


REWARD_ADAPTER = "reward"


def reward_parameters(denoiser: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters of the reward's adapter by name; empty if the denoiser has none."""
    return {name: value for name, value in denoiser.named_parameters() if f".{REWARD_ADAPTER}." in name}


def add_reward_adapter(denoiser: torch.nn.Module, peft_config: PeftConfig) -> dict[str, torch.nn.Parameter]:
    """
    Add the adapter of a latent reward that shares the denoiser. Outside of [`reward_adapter`] the denoiser computes what it
    computed before.

    Args:
        denoiser (`torch.nn.Module`): a diffusers network, with or without the adapter of a policy.
        peft_config (`peft.PeftConfig`): the adapter.

    Returns:
        `dict[str, torch.nn.Parameter]`: its parameters by name, float32.

    Raises:
        ValueError: if the denoiser already has the adapter of a reward, or the configuration fits no layer.
    """
    if REWARD_ADAPTER in getattr(denoiser, "peft_config", {}):
        raise ValueError(
            "The denoiser already carries the adapter of a latent reward. Use that one, or `denoiser.delete_adapters"
            f"({REWARD_ADAPTER!r})` first."
        )
    alone = not getattr(denoiser, "peft_config", {})
    state = _AdapterState(denoiser)
    try:
        denoiser.add_adapter(copy.deepcopy(peft_config), adapter_name=REWARD_ADAPTER)
    except ValueError as error:
        raise ValueError(f"`peft_config` does not fit the denoiser: {error}") from error
    state.restore()
    if alone:
        denoiser.disable_adapters()
    parameters = reward_parameters(denoiser)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return parameters


class _AdapterState:
    """Which adapters of a network are active, whether they are on, what has gradients, and the modes of all modules."""

    def __init__(self, network: torch.nn.Module):
        self.network = network
        self.flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
        self.modes = [(module, module.training) for module in network.modules()]
        layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
        self.layers = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in layers]

    def restore(self) -> None:
        known = {id(layer) for layer, *_ in self.layers}
        for layer, active, off in self.layers:
            layer.set_adapter(active)
            layer.enable_adapters(not off)
        names = [name for _, active, _ in self.layers for name in active]
        for module in self.network.modules():  # layers that have become adapted since then
            if isinstance(module, BaseTunerLayer) and id(module) not in known:
                module.set_adapter(names[:1])
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)
        for module, training in self.modes:
            module.training = training


@contextlib.contextmanager
def reward_adapter(denoiser: torch.nn.Module) -> Iterator[None]:
    """
    A context in which the adapter of the reward is the only active one, and the only one with gradients if it is being
    trained, and dropout is off. Afterwards adapters, `requires_grad` and modes are as they were.
    """
    state = _AdapterState(denoiser)
    try:
        denoiser.eval()
        for layer, *_ in state.layers:
            layer.enable_adapters(True)
            layer.set_adapter(REWARD_ADAPTER)
        own = set(map(id, reward_parameters(denoiser).values()))
        for parameter, flag in state.flags:
            parameter.requires_grad_(flag and id(parameter) in own)
        yield
    finally:
        state.restore()
