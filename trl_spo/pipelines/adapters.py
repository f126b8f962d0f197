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

"""Add an adapter to a denoiser, write it in diffusers' format, and read it back; the same for all families."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_unet_state_dict_to_peft, logging
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .reward_adapter import REWARD_ADAPTER, reward_parameters
from .shards import gathered, spread_like


logger = logging.get_logger(__name__)

LORA_NAME = "pytorch_lora_weights.safetensors"  # as diffusers names the file of a LoRA
METADATA_KEY = "lora_adapter_metadata"  # in the header of the file, where diffusers keeps the configuration
FOLDED_KEY = "folded_strength"  # in the header, too: the strength that is part of the weights of a file
NOT_TRAINED = {"lora_dropout": 0.0, "inference_mode": True, "init_lora_weights": True}  # once training is over
PROVENANCE = ("peft_version", "base_model_name_or_path", "revision", "task_type", "auto_mapping")
STRENGTH = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")  # how weights are scaled


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
        ValueError: if the configuration is of another method than LoRA, fits no layer, trains or changes weights of the
            denoiser itself, or the denoiser already carries other adapters. The reference is the denoiser with its adapters
            off, so that must be the complete base model.
    """
    # An adapter that is already there is trained on, if it is the one that is asked for.
    existing = {name: own for name, own in getattr(denoiser, "peft_config", {}).items() if name != REWARD_ADAPTER}
    if existing:
        wanted = peft_config.to_dict()
        if wanted.get("target_modules") == "all-linear" and "default" in existing:
            wanted["target_modules"] = existing["default"].target_modules
        same = list(existing) == ["default"] and _same_model(existing["default"].to_dict(), wanted)
        if not same:
            raise ValueError(_already_there(existing))
        logger.warning("The pipeline already carries this adapter: training continues from it.")
        denoiser.requires_grad_(False)
        for parameter in adapter_parameters(denoiser):  # diffusers freezes what it loads
            parameter.requires_grad_(parameter.is_floating_point())
        for parameter in reward_parameters(denoiser).values():
            parameter.requires_grad_(False)
    # Otherwise add a new one.
    else:
        if peft_config.peft_type != PeftType.LORA:
            raise ValueError(
                f"`peft_config` must be a `peft.LoraConfig`, got `{type(peft_config).__name__}`: the result is a file that "
                "`load_lora_weights` of diffusers reads, and it reads no other method. Or train the whole denoiser, with "
                "`use_peft=False`."
            )
        _add_new(denoiser, peft_config, denoiser_name)
        if REWARD_ADAPTER in denoiser.peft_config:  # layers that both have are off outside of the reward's own use
            denoiser.set_adapter("default")
            denoiser.enable_adapters()

    # Only now, in float32, is the magnitude of DoRA measured.
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


def require_no_adapters(network: torch.nn.Module, name: str) -> None:
    """
    Raises:
        ValueError: if a network carries adapters: its weights have other names then, and are not all of the model.
    """
    existing = getattr(network, "peft_config", {})
    if existing:
        raise ValueError(_already_there(existing, f"The {name} of the pipeline"))


def _already_there(existing: dict, what: str = "The pipeline") -> str:
    return (
        f"{what} already has adapters ({', '.join(existing)}). Merge them into the base model first: "
        "`pipe.fuse_lora(); pipe.unload_lora_weights()`."
    )


def _add_new(denoiser: torch.nn.Module, peft_config: PeftConfig, denoiser_name: str) -> None:
    """Inject an adapter. Check that the denoiser without it is still the base, and that a file can hold what is trained."""
    # Remember the base, to compare with it afterwards.
    before = {n.replace(".base_layer.", "."): _fingerprint(value) for n, value in denoiser.state_dict().items()}
    if any(map(_is_fused, denoiser.modules())):
        raise ValueError(
            f"The attention of the {denoiser_name} is fused (`fuse_qkv_projections`), so layers such as `to_q` take no part in "
            "it and an adapter on them would learn nothing. Call `pipe.unfuse_qkv_projections()` first."
        )
    if getattr(peft_config, "target_parameters", None):
        raise ValueError(
            "`target_parameters` adapts single weights, which diffusers' files and denoisers have no place for. Name layers, in "
            "`target_modules`."
        )
    denoiser.requires_grad_(False)
    try:
        denoiser.add_adapter(copy.deepcopy(peft_config))  # peft writes the layers it found into it
    except ValueError as error:
        raise ValueError(f"`peft_config` does not fit the {denoiser_name}: {error}") from error
    without_effect = _without_effect(denoiser, peft_config)
    if without_effect:
        _take_out(denoiser)
        raise ValueError(f"The adapter of this `peft_config` would learn nothing: {without_effect}.")

    # Only layers of the adapter may be trained: they alone can be switched off, and they alone are in the file.
    own = set(map(id, adapter_parameters(denoiser)))
    foreign = [n for n, p in denoiser.named_parameters() if p.requires_grad and id(p) not in own]
    if foreign:
        _take_out(denoiser)
        raise ValueError(
            f"`peft_config` also trains weights of the {denoiser_name} itself, such as {foreign[0]!r} (`bias` or "
            "`modules_to_save`). With the adapter off these would not be those of the base, to which SPO compares, and "
            "diffusers reads no file that holds them. Leave the settings out, or train the whole denoiser with "
            "`use_peft=False`."
        )

    # The weights of the base must not have changed.
    after = {name.replace(".base_layer.", "."): value for name, value in denoiser.state_dict().items()}
    changed = [n for n, mark in before.items() if n not in after or _fingerprint(after[n]) != mark]
    if changed:
        _take_out(denoiser)
        raise ValueError(
            f"`peft_config` changes weights of the {denoiser_name}, such as {changed[0]!r} (`init_lora_weights`, or layers "
            "that are repeated): neither the reference nor the published file would belong to the base. Use "
            "`init_lora_weights='gaussian'`, and load the pipeline again, as its weights are changed."
        )


def _without_effect(denoiser: torch.nn.Module, peft_config: PeftConfig) -> str | None:
    """Why a new adapter would never change an answer of the denoiser; `None` if it can."""
    if getattr(peft_config, "alora_invocation_tokens", None) is not None:
        return "`alora_invocation_tokens` switches it on behind certain tokens of a text, and a denoiser is given none"
    silent = [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, BaseTunerLayer) and getattr(module, "scaling", {}).get("default", 1.0) == 0
    ]
    return f"its strength is 0 on {silent[0]!r} (`lora_alpha`, `alpha_pattern`)" if silent else None


def _is_fused(module: torch.nn.Module) -> bool:
    """Whether attention multiplies with one joined matrix; older classes keep the flag of it when it is undone."""
    by_flag = hasattr(module, "unfuse_projections") and getattr(module, "fused_projections", False)
    return by_flag or "Fused" in type(getattr(module, "processor", None)).__name__


def adapter_parameters(network: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters of adapters, those that can be switched off."""
    found = []
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            for name in module.adapter_layer_names:
                layer = getattr(module, name, None)
                if hasattr(layer, "parameters"):
                    found += layer.parameters()
    return found


def _fingerprint(values: torch.Tensor) -> tuple:
    """Equal for tensors with equal bits, in any memory order; quantised ones consist of several plain tensors."""
    if values.device.type == "meta":  # shapes without values, which estimates of memory work on
        return values.dtype, values.shape
    if is_traceable_wrapper_subclass(values):
        parts, _ = values.__tensor_flatten__()
        return values.shape, *(_fingerprint(getattr(values, name)) for name in parts)
    bits = values if values.element_size() > 1 or not values.is_floating_point() else values.view(torch.uint8)
    return values.dtype, values.shape, torch.hash_tensor(bits).view(torch.int64).item()


def _take_out(denoiser: torch.nn.Module) -> None:
    """Remove injected adapters, and unwrap the modules that peft wrapped as a whole."""
    denoiser.unload_lora()
    for name, module in list(denoiser.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            denoiser.set_submodule(name, module.original_module)
    denoiser.requires_grad_(False)


def published_config(peft_config: PeftConfig) -> dict:
    """
    The configuration that goes into a file, without settings that belong to training only: diffusers makes the adapter from
    it, and would switch dropout on and draw initial weights anew.
    """
    return {**peft_config.to_dict(), **NOT_TRAINED}


def _same_model(one: dict, other: dict) -> bool:
    """Whether two configurations are those of one adapter, wherever they were written."""

    def plain(config: dict) -> dict:
        kept = {name: value for name, value in config.items() if name not in PROVENANCE}
        kept["target_modules"] = _sorted(kept.get("target_modules"))
        return {**kept, "inference_mode": True, "init_lora_weights": True}

    return plain(one) == plain(other)


def _sorted(names):
    return sorted(names) if isinstance(names, (list, tuple, set)) else names


def switch_dropout(network: torch.nn.Module, on: bool) -> None:
    """Set dropout to what the network and its adapter were made with, or to 0. Each run decides for itself."""
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.own_p = getattr(module, "own_p", module.p)
            module.p = module.own_p if on else 0.0


def save_lora(
    pipeline: Any,
    denoiser_name: str,
    save_directory: str | Path,
    state_dict: dict | None = None,
    adapter_name: str = "default",
    fold_alpha: bool = False,
) -> None:
    """
    Write the adapter of a denoiser as `pytorch_lora_weights.safetensors`, its configuration (rank, alpha) inside: plain
    diffusers reads it with `pipe.load_lora_weights(save_directory)`.

    Args:
        pipeline: the diffusers pipeline, of a class that can write LoRA weights.
        denoiser_name (`str`): the attribute of the pipeline that carries the adapter, such as "unet" or "transformer".
        save_directory (`str` or `Path`): folder.
        state_dict (`dict`, *optional*): of the denoiser, where the caller has gathered it from several processes.
        adapter_name (`str`, *optional*, defaults to `"default"`): which of its adapters; by default the policy's.
        fold_alpha (`bool`, *optional*, defaults to `False`): multiply the second matrix of each layer by its strength, and
            write alpha = rank. Programs that do not read the header assume just that, so all readers then agree. Checkpoints
            are written without it, so that they come back bit for bit.
    """
    # Collect weights and configuration, and fold the strength of each layer into its weights where that is wanted.
    denoiser = getattr(pipeline, denoiser_name)
    layers = get_peft_model_state_dict(denoiser, state_dict=state_dict, adapter_name=adapter_name)
    config = published_config(denoiser.peft_config[adapter_name])
    folded = [name for name in layers if ".lora_B." in name] if fold_alpha else []
    strengths = {name: _strength(denoiser, name, adapter_name) for name in folded}
    folds = any(strength != 1 for strength in strengths.values())
    if folds:
        own = {name: config[name] for name in STRENGTH}
        layers = {name: value * strengths.get(name, 1) for name, value in layers.items()}
        config |= {"lora_alpha": config["r"], "alpha_pattern": dict(config["rank_pattern"]), "use_rslora": False}

    # Write them with the family's own writer; the header also keeps what was folded, which training goes on with.
    pipeline.save_lora_weights(
        save_directory,
        safe_serialization=True,
        **{
            f"{denoiser_name}_lora_layers": {name: value.contiguous() for name, value in layers.items()},
            f"{denoiser_name}_lora_adapter_metadata": config,
        },
    )
    if folds:
        _add_to_header(Path(save_directory) / LORA_NAME, {FOLDED_KEY: json.dumps(own)})


def _strength(denoiser: torch.nn.Module, name: str, adapter_name: str = "default") -> float:
    """What a layer multiplies its two matrices with, by the name of one of them."""
    return denoiser.get_submodule(name.partition(".lora_B.")[0]).scaling[adapter_name]


def _add_to_header(file: Path, entries: dict[str, str]) -> None:
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata() or {}
    save_file(load_file(file), file, metadata={**metadata, **entries})


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
        raise ValueError(f"{str(directory)!r} holds {unusable[0]!r}, which is not a tensor of real numbers.")
    broken = sorted(name for name, value in layers.items() if not value.isfinite().all())
    if broken:
        raise ValueError(
            f"{str(directory)!r} holds numbers that are NaN or infinite, in {broken[0]!r}. Use an earlier checkpoint."
        )

    # Compare names and shapes with those of the adapter. Files of older versions of diffusers have other names.
    prefix = f"{denoiser_name}."
    layers = {name.removeprefix(prefix): value for name, value in layers.items() if name.startswith(prefix)}
    layers = convert_unet_state_dict_to_peft(layers)
    denoiser = getattr(pipeline, denoiser_name)
    with gathered(adapter_parameters(denoiser), writable=True):
        expected = get_peft_model_state_dict(denoiser)
        differing = sorted(set(layers) ^ set(expected))
        if not differing:
            differing = sorted(name for name in expected if layers[name].shape != expected[name].shape)
        if differing:
            raise ValueError(
                f"The LoRA in {str(directory)!r} does not fit the adapter being trained (first difference: "
                f"{differing[0]!r}). Use the `peft_config` of the run that wrote it."
            )

        # Undo the folding of strengths, and load.
        folded = _check_strength(Path(directory) / LORA_NAME, denoiser_name, denoiser.peft_config["default"])
        if folded:
            for name in layers:
                if ".lora_B." in name:
                    layers[name] = layers[name] / _strength(denoiser, name)
        set_peft_model_state_dict(denoiser, spread_like(layers, expected))


def _check_strength(file: Path, denoiser_name: str, peft_config: PeftConfig) -> bool:
    """
    Check the settings that say how strong the weights are, such as alpha: adapters that differ in them are different, even
    with equal names and shapes. Returns whether the strength is folded into the weights of the file.
    """
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata() or {}
    header = json.loads(metadata.get(METADATA_KEY, "{}"))
    header |= {f"{denoiser_name}.{name}": value for name, value in json.loads(metadata.get(FOLDED_KEY, "{}")).items()}
    now = peft_config.to_dict()
    for name in STRENGTH:
        key = f"{denoiser_name}.{name}"
        if key in header and header[key] != now[name]:
            raise ValueError(
                f"The LoRA in {str(file.parent)!r} was trained with `{name}={header[key]!r}` and the adapter being trained has "
                f"{now[name]!r}: the same weights would be another model. Use the `peft_config` of the run that wrote it."
            )
    return FOLDED_KEY in metadata
