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

"""Tensors of which each process has a part (FSDP 2): make them whole, and spread whole ones."""

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(network: torch.nn.Module) -> bool:
    """Whether FSDP 2 has spread this network over the processes."""
    return isinstance(network, FSDPModule)


def plain_class(network: torch.nn.Module) -> type:
    """The class of a network, which FSDP 2 replaces by one of its own, `FSDP...`, where it is sharded."""
    return type(network).__mro__[2] if is_sharded(network) else type(network)


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor of which this process may have a part, whole. Every process must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


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
