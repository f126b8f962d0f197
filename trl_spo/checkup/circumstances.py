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

"""Where a run is planned, and what its arguments say about the networks: shared by the check-ups of all commands."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..training.memory_plan import NF4_BYTES
from .environment import card_here
from .forecast import Card
from .hub import Hub
from .networks import PublishedModel, read_model, read_vae


@dataclass
class Circumstances:
    """
    Where a run is planned.

    Attributes:
        card_memory (`float`, *optional*): GiB of a card elsewhere; `None` for this machine.
        world_size (`int`): processes of the run.
        sharding (`str`, *optional*): "FSDP 2" or "DeepSpeed ZeRO-3", which spread the denoiser over them.
        on_cpu (`bool`): whether there is no GPU here and `use_cpu` was set for that reason alone.
        hub ([`Hub`]): asked about repositories.
    """

    card_memory: float | None = None
    world_size: int = 1
    sharding: str | None = None
    on_cpu: bool = False
    hub: Hub = field(default_factory=Hub)

    @property
    def planned(self) -> bool:
        return self.card_memory is not None

    def card(self, device: torch.device) -> Card:
        """The card of the run."""
        return Card.planned(self.card_memory) if self.planned else card_here(device)


def precision_of(arguments: Any, further: dict | None) -> tuple[torch.dtype, float | None]:
    """
    Dtype of the frozen weights, and bytes of a quantised one.

    Args:
        arguments (`PipelineArguments`)
        further (`dict`, *optional*): `model_init_kwargs`.
    """
    further = further or {}
    name = further.get("torch_dtype", further.get("dtype", arguments.dtype))
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"`dtype` must name a dtype such as 'float16' or 'bfloat16', got {name!r}.")
    settings = further.get("quantization_config")
    if not settings:
        return dtype, None
    text = str(settings).lower()
    return dtype, NF4_BYTES if "4bit" in text or "int4" in text else 1.0


def read_shapes(arguments: Any, further: dict | None, hub: Hub) -> tuple[PublishedModel, str]:
    """
    Classes and settings of the networks of the pipeline that arguments name, with its VAE.

    Raises:
        NoConfiguration: if they cannot be had.
    """
    revision = (further or {}).get("revision", arguments.revision)
    model, note = read_model(arguments.model_name_or_path, hub.online, revision)
    vae = (further or {}).get("vae", arguments.vae_name_or_path)
    if isinstance(vae, str):
        components = {**model.components, "vae": read_vae(vae, model.components["vae"], hub.online)}
        model = PublishedModel(model.pipeline, components, model.settings)
    return model, note
