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
Tensors of which each process has a part: make them whole, and spread whole ones. FSDP 2 gives a process part of each tensor;
DeepSpeed ZeRO-3 takes the tensors away and has the parts itself.
"""

import contextlib
from collections.abc import Iterable

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(network: torch.nn.Module) -> bool:
    """Whether FSDP 2 or DeepSpeed ZeRO-3 has spread this network over the processes."""
    return isinstance(network, FSDPModule) or is_partitioned(next(network.parameters(), None))


def is_partitioned(parameter: torch.Tensor | None) -> bool:
    """Whether DeepSpeed ZeRO-3 has the parts of this parameter."""
    return hasattr(parameter, "ds_id")


def plain_class(network: torch.nn.Module) -> type:
    """The class of a network, which FSDP 2 replaces by one of its own, `FSDP...`, where it is sharded."""
    return type(network).__mro__[2] if isinstance(network, FSDPModule) else type(network)


def whole(value: torch.Tensor) -> torch.Tensor:
    """
    A tensor of which this process may have a part, whole and without a graph. Every process must call it. Give it the parameter
    itself: a view of one that DeepSpeed has is empty.
    """
    if is_partitioned(value):
        with gathered([value]):
            return value.detach().clone()
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


@contextlib.contextmanager
def gathered(parameters: Iterable[torch.nn.Parameter], writable: bool = False):
    """
    Those parameters that DeepSpeed ZeRO-3 has are whole inside of this context. Every process must enter it.

    Args:
        parameters (`Iterable[torch.nn.Parameter]`): others stay as they are.
        writable (`bool`, *optional*, defaults to `False`): keep what the first process writes into them.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if writable else None):
        yield


def load_whole_state(network: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    """
    Load a state of whole tensors into a network that may be spread. Every process must call it, and have the same.

    Args:
        network (`torch.nn.Module`): the network.
        values (`dict[str, torch.Tensor]`): its whole state.
    """
    if not is_partitioned(next(network.parameters())):
        network.load_state_dict(spread_like(values, network.state_dict()))
        return
    own = dict(network.named_parameters())
    for name, parameter in own.items():  # one by one, as all of them may not fit
        with gathered([parameter], writable=True), torch.no_grad():
            parameter.copy_(values[name])
    network.load_state_dict({name: value for name, value in values.items() if name not in own}, strict=False)


def spread_like(values: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Whole tensors, spread over the processes where those of a network are. Every process must call it, and have the same.

    Args:
        values (`dict[str, torch.Tensor]`): whole tensors.
        own (`dict[str, torch.Tensor]`): those of the network, under the same names.

    Returns:
        `dict[str, torch.Tensor]`: `values`, with a `DTensor` for every name under which `own` has one.
    """
    spread = {}
    for name in sorted(values):  # in the same order everywhere
        value = values[name]
        shard = own.get(name)
        if isinstance(shard, DTensor):
            value = distribute_tensor(value.to(shard.device), shard.device_mesh, shard.placements)
        spread[name] = value
    return spread
