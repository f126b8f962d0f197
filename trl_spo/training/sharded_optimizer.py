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
The state of an optimizer whose parameters are spread over processes (FSDP 2): each process writes its own part.

torch's distributed checkpoints write and read the parts, and fit them to another number of processes. Their usual index is a
pickle, which may run code when it is read. Here they use the storage that torch has for safetensors, where each file says
itself which part of a tensor it holds; what is no tensor is in a JSON file beside them.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict


SHARDS_NAME = "optimizer_shards"
SETTINGS_NAME = "settings.json"
LOWEST_TORCH = "2.8"  # the first whose storage writes safetensors from every process


def can_shard_optimizers() -> bool:
    """Whether this torch has the storage."""
    try:
        from torch.distributed.checkpoint import HuggingFaceStorageWriter  # noqa: F401
    except ImportError:
        return False
    return True


def save_optimizer_shards(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: str | Path) -> None:
    """
    Write the state of an optimizer into `folder/optimizer_shards`, which all processes must see. Every process must call it.

    Args:
        model (`torch.nn.Module`): the network, after `fully_shard`.
        optimizer (`torch.optim.Optimizer`): of its parameters.
        folder (`str` or `Path`): of the checkpoint.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    shards = Path(folder) / SHARDS_NAME
    state = get_optimizer_state_dict(model, optimizer)
    tensors, numbers = _split(state["state"])
    writer = HuggingFaceStorageWriter(str(shards), save_distributed=True)
    distributed_checkpoint.save(tensors, storage_writer=writer)
    if torch.distributed.get_rank() == 0:
        files = sorted(path.name for path in shards.glob("*.safetensors"))
        plain = {name: value.item() if torch.is_tensor(value) else value for name, value in numbers.items()}
        settings = {"files": files, "numbers": plain, "param_groups": state["param_groups"]}
        (shards / SETTINGS_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    torch.distributed.barrier()


def load_optimizer_shards(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: str | Path) -> None:
    """
    Read back what [`save_optimizer_shards`] wrote, with as many processes or with others. Every process must call it.

    Args:
        model (`torch.nn.Module`): the network, after `fully_shard`.
        optimizer (`torch.optim.Optimizer`): of its parameters.
        folder (`str` or `Path`): of the checkpoint.

    Raises:
        ValueError: if it is the state of another optimizer, or of other parameters.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    shards = Path(folder) / SHARDS_NAME
    saved = json.loads((shards / SETTINGS_NAME).read_text(encoding="utf-8"))
    state = get_optimizer_state_dict(model, optimizer)
    tensors, numbers = _split(state["state"])

    # Those of another optimizer, or of other parameters, have other names.
    own_keys, saved_keys = _keys(numbers, state["param_groups"]), _keys(saved["numbers"], saved["param_groups"])
    if own_keys != saved_keys:
        differing = sorted(own_keys ^ saved_keys)
        raise ValueError(
            f"The optimizer state in {str(shards)!r} is that of another optimizer or of other parameters: of {len(differing)} "
            f"entries, such as {differing[0]!r}, one of them has none. Resume with `optim` and `peft_config` of the run that "
            "wrote it."
        )

    # Read the tensors into those of this run; what came from JSON gets the types that the optimizer has.
    if tensors:
        distributed_checkpoint.load(tensors, storage_reader=HuggingFaceStorageReader(str(shards)))
    for name, value in saved["numbers"].items():
        own = numbers[name]
        numbers[name] = torch.tensor(value, dtype=own.dtype, device=own.device) if torch.is_tensor(own) else value
    for own, group in zip(state["param_groups"], saved["param_groups"], strict=True):
        own.update({k: tuple(value) if isinstance(own[k], tuple) else value for k, value in group.items()})
    read = {**tensors, **numbers}
    for parameter, entries in state["state"].items():
        entries.update({name: read[f"{parameter}/{name}"] for name in entries})
    set_optimizer_state_dict(model, optimizer, state)


def missing_shards(folder: str | Path) -> list[str]:
    """What keeps the shards in the folder of a checkpoint from being read, a sentence each; none where there are no shards."""
    shards = Path(folder) / SHARDS_NAME
    if not shards.is_dir():
        return []
    try:
        files = json.loads((shards / SETTINGS_NAME).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{SHARDS_NAME}/{SETTINGS_NAME} cannot be read"]
    return [f"{SHARDS_NAME}/{name} is missing" for name in files if not (shards / name).is_file()]


def _split(state: dict[str, dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    The state of all parameters by `parameter/name`: tensors, of which this process has a part, and numbers, which all have. Counts
    of steps are numbers, though torch has them as tensors without dimensions.
    """
    tensors, numbers = {}, {}
    for parameter, entries in state.items():
        for name, value in entries.items():
            is_number = not torch.is_tensor(value) or value.ndim == 0
            (numbers if is_number else tensors)[f"{parameter}/{name}"] = value
    return tensors, numbers


def _keys(numbers: dict[str, Any], param_groups: list[dict[str, Any]]) -> set[str]:
    """What tells the states of two optimizers apart: names of numbers, of parameters and of the settings of their groups."""
    keys = set(numbers)
    for number, group in enumerate(param_groups):
        keys |= {f"group {number}: {name}" for name in (*group, *group["params"])}
    return keys
