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

"""Adapters of a denoiser, whatever the denoiser is called: add one, write it in diffusers' format, read it back."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_unet_state_dict_to_peft, logging
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file


logger = logging.get_logger(__name__)

LORA_NAME = "pytorch_lora_weights.safetensors"  # as diffusers names the file of a LoRA


def add_lora(denoiser: torch.nn.Module, peft_config: PeftConfig, denoiser_name: str = "denoiser") -> torch.nn.Module:
    """
    Freeze a denoiser and add the adapter that is trained. Its parameters are float32 whatever the dtype of the denoiser
    is: bfloat16 loses updates of 6e-5, and float16 gradients cannot be unscaled.

    Args:
        denoiser (`torch.nn.Module`): a diffusers network.
        peft_config (`peft.PeftConfig`): the adapter.
        denoiser_name (`str`, *optional*): what to call the denoiser in messages.

    Returns:
        `torch.nn.Module`: the denoiser.

    Raises:
        ValueError: if the configuration is of another method than LoRA or fits no layer, or the denoiser already carries
            other adapters. The reference is the denoiser with adapters off, so they would not be part of it.
    """
    existing = getattr(denoiser, "peft_config", {})
    if existing:
        wanted = peft_config.to_dict()
        if wanted.get("target_modules") == "all-linear" and "default" in existing:
            wanted["target_modules"] = existing["default"].target_modules
        same = list(existing) == ["default"] and existing["default"].to_dict() == wanted
        if not same:
            raise ValueError(
                f"The pipeline already has adapters ({', '.join(existing)}). Merge them into the base model first: "
                "`pipe.fuse_lora(); pipe.unload_lora_weights()`."
            )
        logger.warning("The pipeline already carries this adapter: training continues from it.")
    else:
        if peft_config.peft_type != PeftType.LORA:
            raise ValueError(
                f"`peft_config` must be a `peft.LoraConfig`, got `{type(peft_config).__name__}`: the result is a file that "
                "`load_lora_weights` of diffusers reads, and it reads no other method. Or train the whole denoiser, with "
                "`use_peft=False`."
            )
        denoiser.requires_grad_(False)
        try:
            denoiser.add_adapter(copy.deepcopy(peft_config))  # peft writes the layers it found into it
        except ValueError as error:
            raise ValueError(f"`peft_config` does not fit the {denoiser_name}: {error}") from error
    cast_training_params(denoiser, dtype=torch.float32)
    if not existing:
        _measure_magnitudes(denoiser)
    return denoiser


def dora_layers(network: torch.nn.Module) -> Iterator[tuple[BaseTunerLayer, str, torch.nn.Module]]:
    """The layers with magnitudes of their own (DoRA): the layer, the name of its adapter, and what keeps the magnitudes."""
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            for name, magnitudes in getattr(module, "lora_magnitude_vector", {}).items():
                yield module, name, magnitudes


def _measure_magnitudes(denoiser: torch.nn.Module) -> None:
    """
    Magnitudes of the weights as a forward pass measures them, in float32. peft does it in the dtype of the weights when it
    adds the adapter; in half precision the new adapter would then already change the model.
    """
    for layer, name, magnitudes in dora_layers(denoiser):
        magnitudes.update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=layer.lora_A[name].weight,
            lora_B=layer.lora_B[name].weight,
            scaling=layer.scaling[name],
        )


def takes_channels_last(network: torch.nn.Module) -> bool:
    """
    Whether convolution weights can be stored in channels-last order: not with a time axis (VAEs of videos), and not under
    DoRA, which looks at them as rows.
    """
    if any(weight.ndim > 4 for weight in network.parameters()):
        return False
    return not any(isinstance(layer.get_base_layer(), torch.nn.Conv2d) for layer, _, _ in dora_layers(network))


def switch_dropout(network: torch.nn.Module, on: bool) -> None:
    """Dropout as the network and its adapter were made with, or none; each run decides for itself."""
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.own_p = getattr(module, "own_p", module.p)
            module.p = module.own_p if on else 0.0


def save_lora(pipeline: Any, denoiser_name: str, save_directory: str | Path, state_dict: dict | None = None) -> None:
    """
    Write the adapter of a denoiser as `pytorch_lora_weights.safetensors`, its configuration (rank, alpha) inside: plain
    diffusers reads it with `pipe.load_lora_weights(save_directory)`.

    Args:
        pipeline: the diffusers pipeline, of a class that can write LoRA weights.
        denoiser_name (`str`): the attribute of the pipeline that carries the adapter, such as "unet" or "transformer".
        save_directory (`str` or `Path`): folder.
        state_dict (`dict`, *optional*): of the denoiser, where the caller has gathered it from several processes.
    """
    denoiser = getattr(pipeline, denoiser_name)
    layers = get_peft_model_state_dict(denoiser, state_dict=state_dict)
    pipeline.save_lora_weights(
        save_directory,
        safe_serialization=True,
        **{
            f"{denoiser_name}_lora_layers": {name: value.contiguous() for name, value in layers.items()},
            f"{denoiser_name}_lora_adapter_metadata": denoiser.peft_config["default"].to_dict(),
        },
    )


def load_lora(pipeline: Any, denoiser_name: str, directory: str | Path) -> None:
    """
    Read what [`save_lora`] wrote into the adapter that is being trained.

    Args:
        pipeline: the diffusers pipeline, whose denoiser carries the adapter.
        denoiser_name (`str`): the attribute of the pipeline that carries the adapter.
        directory (`str` or `Path`): folder with `pytorch_lora_weights.safetensors`.

    Raises:
        ValueError: if there is no such file, it cannot be read, or its tensors are not exactly those of the adapter
            being trained.
    """
    # Read the file itself. diffusers' readers differ from family to family in what they return, and repair foreign files.
    try:
        layers = load_file(Path(directory) / LORA_NAME)
    except Exception as error:  # what a reader raises depends on where the bytes break off
        raise ValueError(
            f"{str(directory)!r} has no {LORA_NAME} that can be read, it may be incomplete "
            f"({type(error).__name__}: {error})."
        ) from error
    unusable = sorted(name for name, value in layers.items() if not value.is_floating_point())
    if unusable:
        raise ValueError(f"{str(directory)!r} holds {unusable[0]!r}, which is no tensor of real numbers.")
    broken = sorted(name for name, value in layers.items() if not value.isfinite().all())
    if broken:
        raise ValueError(
            f"{str(directory)!r} holds numbers that are NaN or infinite, in {broken[0]!r}. Use an earlier checkpoint."
        )

    # Names and shapes must be those of the adapter. Files of older versions of diffusers have other names.
    prefix = f"{denoiser_name}."
    layers = {name.removeprefix(prefix): value for name, value in layers.items() if name.startswith(prefix)}
    layers = convert_unet_state_dict_to_peft(layers)
    denoiser = getattr(pipeline, denoiser_name)
    expected = get_peft_model_state_dict(denoiser)
    differing = sorted(set(layers) ^ set(expected)) or sorted(
        name for name in expected if layers[name].shape != expected[name].shape
    )
    if differing:
        raise ValueError(
            f"The LoRA in {str(directory)!r} does not fit the adapter being trained (first difference: "
            f"{differing[0]!r}). Use the `peft_config` of the run that wrote it."
        )
    set_peft_model_state_dict(denoiser, layers)
