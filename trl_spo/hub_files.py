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

"""Find, read and refuse files, local ones and those of the Hub: weights, configurations, tokenizers, pipelines."""

import json
import os
import pickle
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import cached_file


def load_diffusers_pipeline(path: str | Path, **kwargs):
    """Load a diffusers pipeline from a folder or the Hub; see [`wrap_pipeline`] for `kwargs`."""
    from diffusers import AutoencoderKL, DiffusionPipeline

    dtype = kwargs.get("torch_dtype")
    if isinstance(dtype, str):
        kwargs["torch_dtype"] = getattr(torch, dtype, None)
        if not isinstance(kwargs["torch_dtype"], torch.dtype):
            raise ValueError(f"`torch_dtype` must name a dtype such as 'float16' or 'bfloat16', got {dtype!r}.")
    local = Path(path)
    if local.is_dir() and not (local / "model_index.json").is_file():
        raise ValueError(
            f"{str(path)!r} is a folder without `model_index.json`, so it is not a diffusers pipeline. Pass the folder "
            "that `pipeline.save_pretrained(...)` wrote."
        )
    if not local.exists() and (local.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") > 1):
        raise ValueError(
            f"The pipeline path {str(path)!r} does not exist. Pass an existing folder or a Hub id such as "
            "'stable-diffusion-v1-5/stable-diffusion-v1-5'."
        )
    try:
        if isinstance(kwargs.get("vae"), (str, Path)):
            kwargs["vae"] = AutoencoderKL.from_pretrained(kwargs["vae"], torch_dtype=kwargs.get("torch_dtype"))
        return DiffusionPipeline.from_pretrained(path, **kwargs)
    except (ImportError, torch.OutOfMemoryError):  # these say what to do, and the folder is not at fault
        raise
    except Exception as error:  # diffusers says of a broken folder what happens to break first
        found = "the folder is incomplete or broken"
        if not local.exists():
            found = "it is neither an existing folder nor a Hub id that can be reached"
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"Could not load a diffusers pipeline from {str(path)!r}: {found} ({type(error).__name__}: {reason})."
        ) from error


def require_existing(path: str, what: str):
    """Refuses what is plainly a local path and does not exist, before anything asks the Hub for it."""
    looks_local = os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1
    if looks_local and not os.path.exists(path):
        raise FileNotFoundError(f"There is no {what} at {path!r}: the path does not exist.")


def load_pretrained(loader, path: str, what: str):
    path = str(path)
    require_existing(path, what.removeprefix("a "))
    try:
        return loader.from_pretrained(path)
    except OSError as error:
        raise FileNotFoundError(f"{path!r} holds no {what.removeprefix('a ')}: {error}") from error
    except (SafetensorError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"The weights in {path!r} were refused: they are no plain tensors: {error}") from error


def read_model_type(path: str, hub_kwargs: dict) -> str | None:
    require_existing(path, "reward model")
    try:
        config_file = cached_file(path, "config.json", **hub_kwargs)
    except OSError as error:
        raise FileNotFoundError(f"{path!r} holds no step-aware reward model, and no other: {error}") from error
    if config_file is None:
        raise FileNotFoundError(f"{path!r} holds no step-aware reward model, and no other: there is no config.json.")
    return read_json(config_file).get("model_type")


def read_json(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:  # of JSON, or of the encoding
        raise ValueError(f"{str(path)!r} is not valid JSON, it may be incomplete: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got a {type(content).__name__}.")
    return content


def load_tokenizer(path: str):
    """The tokenizer of a folder or Hub id, `None` if it holds none."""
    path = str(path)
    require_existing(path, "processor")
    names = ("tokenizer_config.json", "tokenizer.json", "vocab.json")
    if all(optional_file(path, name) is None for name in names):
        return None
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # the default asks on the terminal


def image_settings(path: str) -> dict:
    """`image_mean` and `image_std` of a processor. Read from its JSON: image processor classes may need torchvision."""
    path = str(path)
    require_existing(path, "processor")
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = optional_file(path, name)
        if file is not None:
            settings = read_json(file)
            settings = settings.get("image_processor", settings)
            return {key: settings[key] for key in ("image_mean", "image_std") if settings.get(key) is not None}
    return {}


def optional_file(path: str, name: str) -> str | None:
    return cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )


def locate_checkpoint(checkpoint: str, filename: str | None, **hub_kwargs) -> str:
    """The path of a checkpoint file that is given as a file, or as folder or Hub id and file name."""
    checkpoint = os.fspath(checkpoint)
    path = checkpoint if filename is None else os.path.join(checkpoint, filename)
    if os.path.isfile(path):
        return path
    if filename is None:
        raise FileNotFoundError(
            f"There is no checkpoint file at {checkpoint!r}. For a file on the Hub pass `filename` beside its "
            "repository, such as 'SPO-Diffusion-Models/Step-Aware_Preference_Models' and "
            "'sd-v1-5_step-aware_preference_model.bin'."
        )
    if os.path.isdir(checkpoint):
        raise FileNotFoundError(
            f"The folder {checkpoint!r} holds no {filename!r}, but {sorted(os.listdir(checkpoint))}."
        )
    require_existing(checkpoint, "folder or repository")
    try:
        return hf_hub_download(checkpoint, filename, **hub_kwargs)
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{filename!r} of the Hub repository {checkpoint!r} is neither cached nor can it be downloaded: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def read_state_dict(path: str, key: str | None = None) -> dict[str, torch.Tensor]:
    """The state dict in a `.safetensors` or torch file, under `key` where it has one. Runs no code from the file."""
    try:
        if path.endswith(".safetensors"):
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError) as error:
        raise ValueError(
            f"{path!r} was refused: it is no file of plain tensors (it holds other objects, or is not a checkpoint at "
            f"all): {error}"
        ) from error
    except Exception as error:  # what a reader raises depends on where the bytes break off
        raise ValueError(f"{path!r} cannot be read, the download may be incomplete: {error}") from error
    if key is not None:
        if not isinstance(content, dict) or key not in content:
            found = sorted(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path!r} has no entry {key!r}; it holds {found}.")
        content = content[key]
    named = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    if not named or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path!r} is not a flat state dict of tensors.")
    return content


def canonical_name(name: str) -> str:
    """Undoes the doubled (`model.text_model.text_model.`) tower prefixes that some transformers versions write."""
    for tower in ("text_model", "vision_model"):
        name = name.replace(f"{tower}.{tower}.", f"{tower}.")
    return name


def load_strictly(model: nn.Module, weights: dict[str, torch.Tensor], source: str, what: str):
    """
    `load_state_dict` that names the missing, unexpected and misshapen keys in one error, the first ten of each.
    Position ids, which some versions of transformers save, are left out: they are constants.
    """
    expected = {name: weight for name, weight in model.state_dict().items() if not name.endswith(".position_ids")}
    weights = {name: weight for name, weight in weights.items() if not name.endswith(".position_ids")}
    shapes = [
        f"{name} {tuple(weights[name].shape)} for {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & weights.keys())
        if weights[name].shape != expected[name].shape
    ]
    dtypes = [
        f"{name} {weights[name].dtype}"
        for name in sorted(expected.keys() & weights.keys())
        if expected[name].is_floating_point() and not weights[name].is_floating_point()
    ]
    problems = [
        f"{kind}: {', '.join(names[:10])}{f' and {len(names) - 10} more' if len(names) > 10 else ''}"
        for kind, names in (
            ("missing", sorted(expected.keys() - weights.keys())),
            ("unexpected", sorted(weights.keys() - expected.keys())),
            ("wrong shape", shapes),
            ("not floating point", dtypes),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{str(source)!r} does not fit {what}. " + "; ".join(problems) + ".")
    model.load_state_dict(weights, strict=False)
