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
SPO with a denoiser that is spread over the processes, by FSDP 2 (`fully_shard` of torch) or DeepSpeed ZeRO-3, by way of accelerate.

A sharded network gathers the weights of each block from all processes whenever it is called. So a rollout runs unchanged, as
long as one rule is kept: every process calls the denoiser equally often. This module says which settings keep it, and reads
and writes weights of which each process has a part.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils import fsdp2_prepare_model, gather_object
from huggingface_hub import save_torch_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import TrainingArguments

from ..pipelines.denoiser import DenoiserForTraining, layerwise_casting
from ..pipelines.shards import is_partitioned, is_sharded, plain_class, whole
from ..spo_config import SPOConfig
from .sharded_optimizer import LOWEST_TORCH, can_shard_optimizers


OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")  # that were run on shards
COMPARED_NUMBERS = 4  # of each parameter
ADVICE_ZERO3 = (
    "The configuration `deepspeed_zero3` of the package has all that is needed: `--accelerate_config deepspeed_zero3`."
)
ADVICE = "The configuration `fsdp2` of the package has all that is needed: `--accelerate_config fsdp2`."


def asks_for_fsdp(config: SPOConfig) -> bool:
    """Whether the config, or `accelerate launch` through the environment, wants FSDP."""
    return bool(config.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _settings_of(config: SPOConfig) -> dict:
    """What the config says about FSDP; the rest is in the environment."""
    return getattr(config, "fsdp_plugin_args", None) or {}


def asks_for_zero3(config: TrainingArguments) -> bool:
    """Whether the config, or `accelerate launch` through the environment, wants DeepSpeed ZeRO-3."""
    plugin = getattr(config, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def check_sharding(config: SPOConfig) -> None:
    """
    Check that SPO can train with the way in which parameters would be spread over processes, if they would be.

    Raises:
        ValueError: for FSDP 1, and for settings that do not work with FSDP 2 or DeepSpeed ZeRO-3.
    """
    if asks_for_zero3(config):
        for problem in (*_of_zero3(config.deepspeed_plugin), *problems_of_settings(config)):
            raise ValueError(f"SPO under DeepSpeed ZeRO-3: {problem} {ADVICE_ZERO3}")
    if not asks_for_fsdp(config):
        return
    settings = _settings_of(config)
    # Asked first: accelerate's plugin for version 1 cannot even be built on a machine without accelerators.
    if int(settings.get("fsdp_version") or os.environ.get("FSDP_VERSION", 1)) != 2:
        raise ValueError(
            "FSDP 1 is refused: it flattens parameters inside wrappers, which the rollouts of SPO call past. Use FSDP 2 "
            f"(`fsdp_version: 2`). {ADVICE}"
        )
    plugin = FullyShardedDataParallelPlugin(**settings)
    for problem in (*_of_the_plugin(plugin), *problems_of_settings(config)):
        raise ValueError(f"SPO under FSDP 2: {problem} {ADVICE}")


def check_zero3_of_a_reward(config: TrainingArguments) -> None:
    """
    Check that a reward model can be saved with the way in which DeepSpeed would spread its parameters, if it would.

    Raises:
        ValueError: for settings of ZeRO-3 under which a reward model would be saved without its weights.
    """
    if not asks_for_zero3(config):
        return
    zero = config.deepspeed_plugin.deepspeed_config["zero_optimization"]
    if not zero.get("stage3_gather_16bit_weights_on_model_save", False):
        raise ValueError(
            "Under DeepSpeed ZeRO-3 set `zero3_save_16bit_model: true`, otherwise the reward model would be saved without its weights. "
            f"{ADVICE_ZERO3}"
        )


def _of_zero3(plugin: DeepSpeedPlugin) -> list[str]:
    """What is wrong with the settings of ZeRO-3 itself, one sentence each."""
    problems = []
    zero = plugin.deepspeed_config["zero_optimization"]
    if plugin.zero3_init_flag:
        problems.append(
            "set `zero3_init_flag: false`. Networks are loaded whole, and the denoiser is spread when training begins."
        )
    for key, name in (("offload_param", "offload_param_device"), ("offload_optimizer", "offload_optimizer_device")):
        if (zero.get(key) or {}).get("device", "none") != "none":
            problems.append(f"set `{name}: none`. Offloading was never run with rollouts.")
    return problems


def _of_the_plugin(plugin: FullyShardedDataParallelPlugin) -> list[str]:
    """What is wrong with the settings of FSDP itself, one sentence each."""
    problems = []
    if plugin.auto_wrap_policy is not transformer_auto_wrap_policy or plugin.transformer_cls_names_to_wrap:
        problems.append(
            "set `fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP` and name no classes: the blocks of the denoiser and the "
            "denoiser itself are the units, as rollouts call the denoiser by itself."
        )
    if plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT and not can_shard_optimizers():
        problems.append(
            f"`fsdp_state_dict_type: SHARDED_STATE_DICT` needs torch {LOWEST_TORCH}, whose shards are safetensors, and this is "
            f"torch {torch.__version__}: set FULL_STATE_DICT."
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        problems.append("set `fsdp_offload_params: false`. Latents are made on the device where the weights are.")
    if not plugin.reshard_after_forward:
        problems.append(
            "set `fsdp_reshard_after_forward: true`. Otherwise every process has the whole denoiser after its first rollout."
        )
    if plugin.cpu_ram_efficient_loading:
        problems.append(
            "set `fsdp_cpu_ram_efficient_loading: false`. Otherwise text encoders may be loaded in the first process only."
        )
    if plugin.activation_checkpointing:
        problems.append("leave out `fsdp_activation_checkpointing` and use `gradient_checkpointing=True`.")
    if plugin.ignored_modules is not None:
        problems.append("leave out `fsdp_ignored_modules`: it was never run.")
    return problems


def problems_of_settings(config: SPOConfig) -> list[str]:
    """What is wrong with the settings of a run whose denoiser is spread over the processes, one sentence each."""
    problems = []
    if config.fp16:
        problems.append("`fp16` is refused, as its gradient scaler was never run on shards: use `bf16`.")
    if config.torch_compile or config.compile_regions:
        problems.append("`torch_compile` and `compile_regions` are refused: compiled blocks were never run sharded.")
    if config.channels_last:
        problems.append("`channels_last=True` is refused: shards are stored in the usual order.")
    if config.memory_budget is not None:
        problems.append(
            "`memory_budget` is refused, as memory is estimated for whole networks: set `rollout_micro_batch_size`, "
            "`vae_decode_batch_size` and `reward_batch_size`."
        )
    if getattr(config.optim, "value", config.optim) not in OPTIMIZERS:
        problems.append(f"`optim` must be one of {', '.join(OPTIMIZERS)}: others were never run on shards.")
    return problems


def check_denoiser_for_sharding(denoiser: torch.nn.Module) -> None:
    """
    Raises:
        ValueError: for a denoiser whose weights are not plain numbers of 16 bits or more.
    """
    plain = all(w.is_floating_point() and not is_traceable_wrapper_subclass(w) for w in denoiser.parameters())
    if not plain or layerwise_casting(denoiser) is not None:
        raise ValueError(
            "A quantised denoiser, or one under layerwise casting, cannot be spread over the processes. Load it in bfloat16 or "
            "float32, or train without FSDP and ZeRO-3."
        )


def require_sharding(accelerator: Accelerator) -> None:
    """
    Check that accelerate does what was asked for, and leave precision to autocast.

    Raises:
        ValueError: if it would train without shards, or with a precision that is refused.
    """
    if not accelerator.is_fsdp2:
        raise ValueError(
            "FSDP 2 was asked for, and accelerate does not shard here: it needs GPUs and a launcher, such as `accelerate "
            "launch` or `torchrun`. Start it so, or leave FSDP out."
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"SPO under FSDP 2: use `bf16` or no mixed precision, got {accelerator.mixed_precision!r}.")
    # Forward passes run under autocast as without FSDP. A policy of FSDP would round timesteps and gradients as well.
    accelerator.state.fsdp_plugin.mixed_precision_policy = None


def shards_optimizer(config: SPOConfig, accelerator: Accelerator) -> bool:
    """
    Whether each process shall write its own part of the optimizer's state. accelerate is told that it shall be whole: its own
    way of writing parts has an index that is unpickled, which may run code.
    """
    asked = FullyShardedDataParallelPlugin(**_settings_of(config)).state_dict_type
    plugin = accelerator.state.fsdp_plugin
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # which it keeps from the other type otherwise
    plugin.set_state_dict_type("FULL_STATE_DICT")
    return asked == StateDictType.SHARDED_STATE_DICT


def check_equal_weights(network: torch.nn.Module) -> None:
    """
    Check that all processes begin with the same weights: each will keep its own part of its own copy. A few numbers of every
    parameter are looked at. Every process must call it.

    Raises:
        ValueError: if two processes have different ones.
    """
    digest = hashlib.sha256()
    for name, value in network.named_parameters():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(str(value.detach().flatten()[:COMPARED_NUMBERS].float().tolist()).encode())
    if len(set(gather_object([digest.hexdigest()]))) > 1:
        raise ValueError(
            "The processes have denoisers with different weights, of which their parts would be a mixture. Load the same weights "
            "in every process; where they are drawn at random, set the same seed before."
        )


def trained_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """
    The whole tensors of all parameters that are trained, on the CPU of the first process; the others get none. Every process
    must call it.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if is_partitioned(next(iter(trained.values()))):
        state = {name: whole(parameter).cpu() for name, parameter in trained.items()}
        return state if torch.distributed.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)


def prepare_frozen(network: torch.nn.Module, trained: torch.nn.Module, accelerator: Accelerator) -> None:
    """
    Do to the frozen copy of full fine-tuning what FSDP or DeepSpeed has done to the trained network: spread it over the processes,
    or store it in half precision. What has been done is not done again.

    Args:
        network (`torch.nn.Module`): the frozen copy.
        trained (`torch.nn.Module`): the denoiser, once training has begun.
        accelerator (`Accelerator`): of the trainer.
    """
    if not is_sharded(trained):
        dtype = next(trained.parameters()).dtype
        if next(network.parameters()).dtype != dtype:  # DeepSpeed's ZeRO-1 and 2 in bf16, which know no autocast
            network.to(dtype)
        return
    if is_sharded(network):
        return
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        fsdp2_prepare_model(accelerator, DenoiserForTraining(network))
        return
    import deepspeed

    zero = {k: v for k, v in plugin.deepspeed_config["zero_optimization"].items() if v != "auto"}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    config["bf16"] = {"enabled": accelerator.mixed_precision == "bf16"}
    deepspeed.initialize(model=DenoiserForTraining(network), config=config)


def write_denoiser(denoiser: torch.nn.Module, state: dict[str, torch.Tensor], folder: Path) -> None:
    """
    What `save_pretrained` of diffusers writes, of a sharded denoiser.

    Args:
        denoiser (`torch.nn.Module`): a diffusers network, for its configuration.
        state (`dict[str, torch.Tensor]`): its whole tensors, by their names in the denoiser.
        folder (`Path`): where to.
    """
    config = json.loads(denoiser.to_json_string())
    config["_class_name"] = plain_class(denoiser).__name__
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    save_torch_state_dict(state, folder, filename_pattern=pattern, max_shard_size="10GB")
