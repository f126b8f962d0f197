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
Merge a LoRA into its pipeline, for programs that know neither this package nor peft.

diffusers does the work, so this serves every family that SPO trains. What is added is certainty: the caller's pipeline is
not changed, and a layer of the LoRA that the model does not have is an error, where diffusers would ignore it.
"""

import contextlib
import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft, logging
from huggingface_hub import list_repo_files
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open

from .hub_files import load_diffusers_pipeline, locate_checkpoint, require_existing
from .notices import without_lora_notices
from .pipelines.adapters import LORA_NAME
from .pipelines.base import SPOPipeline
from .pipelines.components import plain_pipeline
from .pipelines.denoiser import layerwise_casting
from .sampler_file import SAMPLER_NAME
from .training.checkpointing import check_output_dir


logger = logging.get_logger(__name__)

DENOISERS = ("transformer", "unet")  # what the components of diffusers pipelines that SPO trains are called


@torch.no_grad()
def merge_lora(
    pipeline: Any,
    lora: str | Path,
    output_dir: str | Path,
    lora_scale: float = 1.0,
    **from_pretrained_kwargs,
) -> Path:
    r"""
    Write a complete diffusers pipeline with a LoRA merged into its denoiser: `DiffusionPipeline.from_pretrained` loads
    it without this package and without peft, and it samples as fast as the base model.

    Args:
        pipeline (diffusers pipeline, [`SPOPipeline`], `str` or `Path`):
            The base model, or the folder or Hub id of it. An object is not changed; adapters it carries do not become
            part of the result.
        lora (`str` or `Path`):
            The folder [`SPOTrainer.save_model`] wrote, or a LoRA file in a format that diffusers reads for this family
            (its own, and for most families kohya's).
        output_dir (`str` or `Path`):
            Where the merged pipeline goes, as safetensors, with the `sampler.json` that lies beside the LoRA.
        lora_scale (`float`, *optional*, defaults to `1.0`):
            Strength of the LoRA; 0 is the base model.
        from_pretrained_kwargs:
            Passed to `from_pretrained` for a path or Hub id, such as `dtype` (also by name).

    Returns:
        `Path`: the folder.

    Raises:
        FileNotFoundError: if there is no LoRA file.
        OSError: if nothing can be written to `output_dir`; found before anything is loaded.
        ValueError: if the file is not a LoRA of a denoiser, or does not fit the pipeline's.
    """
    # Load the base model, or take the one that was passed.
    output_dir = Path(output_dir)
    source = find_lora(lora)
    check_output_dir(output_dir, create=False)
    if isinstance(pipeline, (str, Path)):
        if Path(pipeline).resolve() == output_dir.resolve():
            raise ValueError(f"`output_dir` is the base model itself, {str(pipeline)!r}. Write to another folder.")
        pipeline = load_diffusers_pipeline(pipeline, **from_pretrained_kwargs)
    elif from_pretrained_kwargs:
        raise ValueError(f"{sorted(from_pretrained_kwargs)} need a path or Hub id of the pipeline, not an object.")
    pipeline = plain_pipeline(pipeline.sd_pipeline if isinstance(pipeline, SPOPipeline) else pipeline)
    name = denoiser_of(pipeline)
    if layerwise_casting(getattr(pipeline, name)):
        raise ValueError(
            f"The {name} of the pipeline stores its weights in 8 bits (`enable_layerwise_casting`), to which nothing can be added. "
            "Pass the folder or Hub id of the base model."
        )

    # A second pipeline with a denoiser of its own; the other components are shared and stay as they are.
    check_lora(pipeline, source)
    denoiser = copy.deepcopy(getattr(pipeline, name))
    if getattr(denoiser, "peft_config", None):
        logger.warning(f"Adapters {list(denoiser.peft_config)} of the pipeline are left out of the merged model.")
        denoiser.unload_lora()
    merged = copy.copy(pipeline)
    merged.register_modules(**{name: denoiser})

    # Load, see that nothing was left behind, add the LoRA to the weights, and write.
    load_lora_whole(merged, source)
    merged.fuse_lora(components=[name], lora_scale=lora_scale, safe_fusing=True)
    denoiser.unload_lora()
    merged.save_pretrained(output_dir, safe_serialization=True)
    if (source.parent / SAMPLER_NAME).is_file():
        shutil.copyfile(source.parent / SAMPLER_NAME, output_dir / SAMPLER_NAME)
    return output_dir


def denoiser_of(pipeline) -> str:
    """
    The name of the component of a diffusers pipeline that takes a LoRA: its denoiser.

    Raises:
        ValueError: if there is none.
    """
    name = next((name for name in DENOISERS if getattr(pipeline, name, None) is not None), None)
    if name is None or not hasattr(pipeline, "load_lora_weights"):
        raise ValueError(
            f"`pipeline` must be a diffusers pipeline with a `unet` or `transformer` that takes a LoRA, got "
            f"`{type(pipeline).__name__}`."
        )
    return name


def check_lora(pipeline, source: Path, with_text_encoders: bool = False) -> set[str]:
    """
    Check that a LoRA file is complete, finite and fits the layers of the pipeline's denoiser. Nothing is loaded into it.

    Args:
        pipeline: a diffusers pipeline.
        source (`Path`): the safetensors file.
        with_text_encoders (`bool`, *optional*, defaults to `False`): allow a part for text encoders beside it.

    Returns:
        `set[str]`: the layers of the denoiser that it changes.

    Raises:
        ValueError: if it is not.
    """
    name = denoiser_of(pipeline)
    layers = _layers_of(pipeline, name, source, with_text_encoders)
    _check_fit(getattr(pipeline, name), name, layers, source)
    return {layer for layer, _ in layers}


def load_lora_whole(pipeline, source: Path, with_text_encoders: bool = False, **kwargs) -> None:
    r"""
    `pipeline.load_lora_weights` of a local file, after [`check_lora`]; a layer that diffusers passes over is an error, too.

    Args:
        pipeline: a diffusers pipeline.
        source (`Path`): the safetensors file.
        with_text_encoders (`bool`, *optional*, defaults to `False`): allow a part for text encoders.
        kwargs: for `load_lora_weights`, such as `adapter_name`.

    Raises:
        ValueError: if the file does not fit, or is read in part.
    """
    layers = check_lora(pipeline, source, with_text_encoders)
    with without_lora_notices():
        pipeline.load_lora_weights(str(source.parent), weight_name=source.name, **kwargs)
    denoiser = getattr(pipeline, denoiser_of(pipeline))
    loaded = {layer for layer, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)}
    lost = sorted(layers - loaded)
    if lost:
        raise ValueError(
            f"diffusers read only a part of the LoRA in {str(source)!r}: it left out {lost[0]!r}. Save the LoRA again with "
            "this version."
        )


def locate_lora(lora: str | Path) -> Path:
    """
    The local path of a LoRA: a file, the only safetensors file of a folder or the one with diffusers' name, or that of a
    repository on the Hub.

    Raises:
        FileNotFoundError: if there is none, or several and none has diffusers' name.
    """
    path = Path(lora)
    if path.is_file():
        return path
    if path.is_dir():
        names = sorted(file.name for file in path.glob("*.safetensors"))
    else:
        require_existing(lora, "LoRA", "Pass the folder that `SPOTrainer.save_model()` wrote, a file, or a Hub id.")
        if "/" not in str(lora):  # a misspelt folder, most likely; there is no need to ask the Hub for it
            raise FileNotFoundError(
                f"There is no LoRA at {str(lora)!r}: no file or folder here has this name, and a repository on the Hub is named "
                "owner/name."
            )
        with contextlib.suppress(FileNotFoundError):
            return Path(locate_checkpoint(str(lora), LORA_NAME))
        names = _weights_on_the_hub(str(lora))
    if LORA_NAME not in names and len(names) != 1:
        found = f"several .safetensors files ({', '.join(names[:5])})" if names else "no .safetensors file"
        raise FileNotFoundError(f"{str(lora)!r} has {found}, so there is no LoRA to load. Name the file.")
    name = LORA_NAME if LORA_NAME in names else names[0]
    return path / name if path.is_dir() else Path(locate_checkpoint(str(lora), name))


def _weights_on_the_hub(repository: str) -> list[str]:
    """The safetensors files of a repository."""
    try:
        return [name for name in list_repo_files(repository) if name.endswith(".safetensors")]
    except Exception as error:  # of the Hub's client or of whatever it uses for the network
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(
            f"There is no LoRA at {repository!r}: it is no file or folder here, and the Hub has no such repository that can be "
            f"read ({reason[0]}). Pass the folder that `SPOTrainer.save_model()` wrote, a file, or a Hub id."
        ) from error


def find_lora(path: str | Path) -> Path:
    """The safetensors file that `path` is or, for a folder, contains under diffusers' name."""
    path = Path(path)
    file = path / LORA_NAME if path.is_dir() else path
    if not file.is_file():
        hint = f"the folder has no {LORA_NAME}" if path.is_dir() else "the path does not exist"
        raise FileNotFoundError(
            f"There is no LoRA in {str(path)!r}: {hint}. Pass the folder `SPOTrainer.save_model()` wrote, or a "
            ".safetensors file."
        )
    return file


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the header of a safetensors file."""
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}
            header = handle.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} is not a safetensors file ({error}).") from error
    broken = sorted(key for key, value in tensors.items() if not value.isfinite().all())
    if broken:
        raise ValueError(f"{str(file)!r} holds numbers that are NaN or infinite, in {broken[0]!r}.")
    return tensors, header


def _layers_of(
    pipeline, name: str, source: Path, with_text_encoders: bool = False
) -> dict[tuple[str, str], torch.Tensor]:
    """The tensors of a LoRA file as diffusers understands it, by layer and part ("A.weight", "B.weight", ...)."""
    # Refuse a file that holds anything but a LoRA of the denoiser. kohya's names begin with `lora_unet_` in all families.
    tensors, _ = read_tensors(source)
    known = (f"{name}.", "lora_unet_")
    if with_text_encoders:
        tensors = {key: value for key, value in tensors.items() if not key.startswith(("text_encoder", "lora_te"))}
    foreign = sorted(key for key in tensors if not key.startswith(known))
    if foreign and len(foreign) < len(tensors):
        raise ValueError(
            f"{str(source)!r} holds more than a LoRA of the {name}, such as {foreign[0]!r}; only that can be merged."
        )
    if foreign or not tensors:
        raise ValueError(f"{str(source)!r} is not a LoRA of a {name} (found {foreign[:1]}).")

    # Translate to diffusers' names, whatever format the file has.
    options = {"unet_config": pipeline.unet.config} if name == "unet" else {}
    state_dict = pipeline.lora_state_dict(str(source.parent), weight_name=source.name, **options)
    state_dict = state_dict[0] if isinstance(state_dict, tuple) else state_dict
    prefix = f"{name}."
    state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    layers = {}
    for key, value in convert_unet_state_dict_to_peft(state_dict).items():
        layer, found, part = key.partition(".lora_")
        if found:  # not the alphas of kohya's format
            layers[layer, part] = value
    return layers


def _check_fit(
    denoiser: torch.nn.Module, name: str, layers: dict[tuple[str, str], torch.Tensor], source: Path
) -> None:
    """Refuse a LoRA with a layer that the denoiser does not have, or has in another size."""
    modules = {layer.replace(".base_layer", ""): module for layer, module in denoiser.named_modules()}
    # A is (rank, in, ...) and B is (out, rank, ...), for a weight (out, in, ...).
    dimension = {"A.weight": 1, "B.weight": 0}
    for (layer, part), value in layers.items():
        module = modules.get(layer)
        weight = getattr(module, "weight", None)
        problem = None
        if weight is None:
            problem = "is not a layer of it"
        elif part in dimension and weight.shape[dimension[part]] != value.shape[dimension[part]]:
            problem = f"has weights of shape {tuple(weight.shape)}"
        if problem:
            raise ValueError(
                f"The LoRA in {str(source)!r} does not fit this {name}: {layer!r} {problem}. Pass the base model it was "
                "trained on."
            )
