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
Find, read and check files, local ones and those of the Hub: weights, configurations, tokenizers, pipelines.

Every error names the file and what was expected in it. Nothing here runs code from a file: weights are safetensors or
are unpickled with `weights_only=True`, and tokenizers are loaded without remote code.
"""

import contextlib
import json
import os
import pickle
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from packaging.version import Version
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file


LOCAL_SUFFIXES = (".parquet", ".safetensors")  # no repository on the Hub is called like a file
# What `from_pretrained` of diffusers calls the dtype: the other name is unknown to old versions and deprecated in new ones.
DTYPE_ARGUMENT = "dtype" if Version(version("diffusers")) >= Version("0.42") else "torch_dtype"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


# --- paths and Hub ids -----------------------------------------------------------------------------------------------


def is_missing_path(path: str | Path) -> bool:
    """
    Whether `path` can only be a local path and does not exist, so that asking the Hub for it would be pointless.

    A Hub id is "name" or "owner/name". Whatever is absolute, starts with "." or "~", has more than one slash, or ends
    like a file of rows or weights, is a local path.
    """
    text = os.fspath(path)
    looks_local = (
        os.path.isabs(text) or text.startswith((".", "~")) or text.count("/") > 1 or text.endswith(LOCAL_SUFFIXES)
    )
    return looks_local and not os.path.exists(text)


def require_existing(path: str | Path, what: str, hint: str = "") -> None:
    """
    Refuse a local path that does not exist, before anything asks the Hub for it.

    Args:
        path (`str` or `Path`): a local path or a Hub id.
        what (`str`): what should be there, without an article, such as `"CLIP model"`.
        hint (`str`, *optional*): a sentence that says what to pass instead.

    Raises:
        FileNotFoundError: if [`is_missing_path`].
    """
    if is_missing_path(path):
        sentences = f"There is no {what} at {str(path)!r}: the path does not exist. {hint}"
        raise FileNotFoundError(sentences.strip())


def optional_file(path: str, name: str, **hub_kwargs) -> str | None:
    """
    The local path of the file `name` in a folder or Hub repository, or `None` if it has no such file. `hub_kwargs` are
    `revision`, `token` and `cache_dir`.
    """
    return cached_file(
        path,
        name,
        **hub_kwargs,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )


def locate_folder(path: str, name: str, **hub_kwargs) -> Path:
    """The local path of the folder `name` in a folder or Hub repository, of which that folder alone is downloaded."""
    if os.path.isdir(path):
        return Path(path) / name
    return Path(snapshot_download(path, allow_patterns=f"{name}/*", **hub_kwargs)) / name


def locate_checkpoint(checkpoint: str, filename: str | None, **hub_kwargs) -> str:
    """
    The local path of a checkpoint file.

    Args:
        checkpoint (`str`): the file itself, or a folder or Hub id that holds `filename`.
        filename (`str`, *optional*): the name of the file in that folder or repository.
        hub_kwargs: passed to `hf_hub_download`.

    Raises:
        FileNotFoundError: if there is no such file, here or on the Hub.
    """
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


# --- whole objects ---------------------------------------------------------------------------------------------------


def _vae_class(path: str | Path, kwargs: dict) -> type[nn.Module]:
    """The class of the VAE of a saved diffusers pipeline, which a VAE that replaces it must share."""
    import diffusers

    name = _model_index(path, kwargs).get("vae", (None, None))[1]
    return getattr(diffusers, name or "", diffusers.AutoencoderKL)


def _model_index(path: str | Path, kwargs: dict) -> dict:
    """Component -> library and class, as `model_index.json` has them."""
    from diffusers import DiffusionPipeline

    hub_kwargs = {name: kwargs[name] for name in ("revision", "cache_dir", "token") if name in kwargs}
    return DiffusionPipeline.load_config(path, **hub_kwargs)


def _quantization(settings: dict, components: dict):
    """
    The quantization of a pipeline's networks, from the words in which diffusers saves it.

    Args:
        settings (`dict`): component -> its quantization as diffusers writes it into a `config.json`, such as
            `{"transformer": {"quant_method": "bitsandbytes", "load_in_4bit": True}}`.
        components (`dict`): what the pipeline has, from its `model_index.json`.

    Returns:
        `diffusers.PipelineQuantizationConfig`

    Raises:
        ValueError: for a component that the pipeline does not have, or settings that diffusers does not know.
        ImportError: if the library of the method is not installed.
    """
    from diffusers import PipelineQuantizationConfig
    from diffusers.quantizers.auto import DiffusersAutoQuantizer

    networks = [name for name, (library, *_) in _listed(components) if library == "diffusers" and name != "scheduler"]
    unknown = [name for name in settings if name not in networks]
    if unknown or not settings:
        raise ValueError(
            f"`quantization_config` names networks of the pipeline, which are {', '.join(networks)}; got "
            f"{', '.join(unknown) or 'none'}."
        )
    mapping = {}
    for name, value in settings.items():
        try:
            mapping[name] = DiffusersAutoQuantizer.from_dict(dict(value))
        except ImportError as error:
            raise ImportError(
                f"The `quantization_config` of the {name} asks for a library that is not there: {error}"
            ) from error
        except Exception as error:  # each method refuses in its own way
            raise ValueError(
                f"The `quantization_config` of the {name} must be what diffusers writes into a `config.json`, such as "
                f'{{"quant_method": "bitsandbytes", "load_in_4bit": true}}; got {value!r} '
                f"({type(error).__name__}: {error})."
            ) from error
    return PipelineQuantizationConfig(quant_mapping=mapping)


def _listed(components: dict) -> list[tuple[str, list]]:
    """The entries of a `model_index.json` that are components, each with its library and class."""
    return [(name, value) for name, value in components.items() if isinstance(value, (list, tuple))]


def load_diffusers_pipeline(path: str | Path, **kwargs):
    """
    Load a diffusers pipeline from a folder or the Hub.

    Args:
        path (`str` or `Path`): the folder that `pipeline.save_pretrained(...)` wrote, or a Hub id.
        kwargs: passed to `DiffusionPipeline.from_pretrained`. `dtype`, which diffusers before 0.42 calls `torch_dtype`, may
            have either name and be the name of a dtype; `vae` may be a folder or Hub id of another VAE, of the class of the
            pipeline's own. `quantization_config` may be a dictionary: component -> its quantization as diffusers writes it
            into a `config.json`.

    Raises:
        ValueError: if there is no pipeline, it or the other VAE is incomplete or broken, `dtype` does not name a dtype, or
            diffusers does not know the quantization.
        ImportError: if the library of a quantization is not installed.
    """
    from diffusers import DiffusionPipeline

    # Refuse what is wrong before a weight is read.
    kwargs = _with_dtype(kwargs)
    local = Path(path)
    if local.suffix.lower() in (".safetensors", ".ckpt", ".gguf"):
        raise ValueError(
            f"{str(path)!r} is a checkpoint in a single file, and a diffusers pipeline is a folder. Load it with the class of its "
            "family, `StableDiffusionXLPipeline.from_single_file(path)` for example, and pass that, or what its "
            "`save_pretrained(folder)` wrote."
        )
    if local.is_file():
        raise ValueError(
            f"{str(path)!r} is a file, and a diffusers pipeline is a folder, with `model_index.json` in it."
        )
    if local.is_dir() and not (local / "model_index.json").is_file():
        raise ValueError(
            f"{str(path)!r} is a folder without `model_index.json`, so it is not a diffusers pipeline. Pass the folder "
            "that `pipeline.save_pretrained(...)` wrote."
        )
    if is_missing_path(path):
        raise ValueError(
            f"The pipeline path {str(path)!r} does not exist. Pass an existing folder or a Hub id such as "
            "'stable-diffusion-v1-5/stable-diffusion-v1-5'."
        )

    # Load, and see that every network is whole. diffusers' errors differ with the part that fails, so all become one.
    if isinstance(kwargs.get("quantization_config"), dict):
        try:
            components = _model_index(path, kwargs)
        except Exception as error:
            raise _not_loaded(path, error) from error
        kwargs["quantization_config"] = _quantization(kwargs["quantization_config"], components)
    loaded, what = path, "a diffusers pipeline"
    try:
        if isinstance(kwargs.get("vae"), (str, Path)):
            vae_class = _vae_class(path, kwargs)
            loaded, what = kwargs["vae"], f"the other VAE ({vae_class.__name__})"
            with whole_networks():
                kwargs["vae"] = vae_class.from_pretrained(loaded, **{DTYPE_ARGUMENT: kwargs.get(DTYPE_ARGUMENT)})
            loaded, what = path, "a diffusers pipeline"
        with whole_networks():
            return DiffusionPipeline.from_pretrained(path, **kwargs)
    except (ImportError, torch.OutOfMemoryError):  # these say what to do, and the folder is not at fault
        raise
    except Exception as error:  # diffusers reports whatever part of a broken folder fails first
        raise _not_loaded(loaded, error, what) from error


def _with_dtype(kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Arguments of `from_pretrained` with the dtype as torch's, under the name that this version of diffusers wants.

    Raises:
        ValueError: for a name that is no dtype, or two dtypes.
    """
    given = {name: value for name, value in kwargs.items() if name in ("dtype", "torch_dtype")}
    if not given:
        return kwargs
    if len(given) == 2:
        raise ValueError(f"`dtype` and `torch_dtype` are one argument; give `dtype` alone, got {given}.")
    ((name, value),) = given.items()
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if isinstance(value, str) and not isinstance(dtype, torch.dtype):
        raise ValueError(f"`{name}` must name a dtype such as 'float16' or 'bfloat16', got {value!r}.")
    return {**{key: kwargs[key] for key in kwargs if key not in given}, DTYPE_ARGUMENT: dtype}


def _not_loaded(path: str | Path, error: Exception, what: str = "a diffusers pipeline") -> ValueError:
    """What to say when diffusers cannot load a pipeline or a part of it."""
    found = "the folder is incomplete or broken"
    if not Path(path).exists():
        found = "it is neither an existing folder nor a Hub id that can be reached"
    reason = (str(error).splitlines() or [""])[0]
    return ValueError(f"Could not load {what} from {str(path)!r}: {found} ({type(error).__name__}: {reason}).")


def load_pretrained(loader, path: str | Path, what: str):
    """
    `loader.from_pretrained(path)`, where `path` holds what `loader` is for, and all of it.

    Args:
        loader (`type`): a model or a configuration of transformers.
        path (`str` or `Path`): folder or Hub id.
        what (`str`): what should be there, such as `"CLIP model"`.

    Raises:
        FileNotFoundError: if there is nothing of the kind.
        ValueError: if it is a model of another kind, of which a part would be read and the rest drawn, or weights are
            missing, unexpected, misshapen or not plain tensors.
    """
    path = str(path)
    require_existing(path, what)
    is_model = issubclass(loader, nn.Module)
    config_class = loader.config_class if is_model else loader
    try:
        found = config_class.get_config_dict(path)[0].get("model_type", config_class.model_type)
        if found != config_class.model_type:
            raise ValueError(f"{path!r} holds a {found!r} model, not a {what}, which is {config_class.model_type!r}.")
        return load_whole(loader.from_pretrained, path, what)[0] if is_model else loader.from_pretrained(path)
    except OSError as error:
        raise FileNotFoundError(f"{path!r} holds no {what}: {error}") from error


def check_vocabulary(tokenizer: Any, num_embeddings: int, what: str) -> None:
    """
    Raises:
        ValueError: if a tokenizer has words that a text encoder has no embedding for.
    """
    if tokenizer is not None and len(tokenizer) > num_embeddings:
        raise ValueError(
            f"The tokenizer of the {what} has {len(tokenizer)} tokens and its text encoder knows {num_embeddings}: they belong "
            "to different models, or tokens were added to one of them only. Take both from one model."
        )


def load_tokenizer(path: str | Path, subfolder: str = "", **hub_kwargs):
    """
    The tokenizer of a folder or Hub id, or of a folder in it; `None` if it holds none. `hub_kwargs` are `revision`, `token`
    and `cache_dir`.
    """
    path = str(path)
    require_existing(path, "processor")
    names = ("tokenizer_config.json", "tokenizer.json", "vocab.json")
    if all(optional_file(path, f"{subfolder}/{name}".lstrip("/"), **hub_kwargs) is None for name in names):
        return None
    # By default, transformers would ask on the terminal whether to run remote code.
    return AutoTokenizer.from_pretrained(path, subfolder=subfolder, trust_remote_code=False, **hub_kwargs)


def load_whole(from_pretrained: Callable, path: str | Path, what: str, *args, **kwargs) -> tuple[nn.Module, dict]:
    """
    A transformers model all of whose weights are in its files.

    Args:
        from_pretrained (`Callable`): of the model's base class.
        path (`str` or `Path`): folder or Hub id.
        what (`str`): what should be there, such as `"step-aware reward model"`.
        args, kwargs: passed to `from_pretrained`.

    Returns:
        `tuple` of the model and what transformers says about its loading.

    Raises:
        ValueError: if weights cannot be read, are not plain tensors, are missing, or belong to something else.
    """
    kwargs.setdefault("ignore_mismatched_sizes", True)  # transformers says the names in a table of its log only
    try:
        model, info = from_pretrained(str(path), *args, **kwargs, output_loading_info=True)
    except (SafetensorError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"The weights in {str(path)!r} were refused: they cannot be read, or are not plain tensors: {error}"
        ) from error
    except RuntimeError as error:
        raise ValueError(f"The weights in {str(path)!r} cannot be read, or do not fit the {what}: {error}") from error
    problems = loading_problems(info)
    if problems:
        raise ValueError(f"The weights in {str(path)!r} do not fit the {what}: {problems}.")
    return model, info


def loading_problems(info: dict, kinds: tuple[str, ...] = ("missing", "unexpected", "mismatched")) -> str:
    """
    What is wrong with the weights of a loaded network, as diffusers or transformers report it; empty if nothing is.

    Position ids, which some versions of transformers save, are left out: they are constants.

    Args:
        info (`dict`): what `from_pretrained(..., output_loading_info=True)` returned beside the network.
        kinds (`tuple` of `str`, *optional*): of "missing", "unexpected" and "mismatched", those that count.
    """
    words = {"missing": "missing", "unexpected": "unexpected", "mismatched": "wrong shape"}
    problems = []
    for kind in kinds:
        names = []
        for entry in info.get(f"{kind}_keys") or ():
            name, *shapes = entry if isinstance(entry, (tuple, list)) else (entry,)
            if not str(name).endswith("position_ids"):
                names.append(" ".join([str(name), *(str(tuple(shape)) for shape in shapes)]))
        if names:
            problems.append(f"{words[kind]}: {_first_ten(sorted(names))}")
    return "; ".join(problems)


@contextlib.contextmanager
def whole_networks(unused: tuple[str, ...] = ()) -> Iterator[None]:
    """
    A context in which every network that diffusers or transformers load must be complete. They go on with random or empty
    weights where files lack some, and `output_loading_info` cannot be requested for the parts of a pipeline.

    Args:
        unused (`tuple` of `str`, *optional*): prefixes of names that may be missing.

    Raises:
        ValueError: inside, if weights of a network are missing, misshapen, or, in diffusers, unexpected. Unexpected ones of
            transformers are allowed: text encoders are often read from files that hold more.
    """
    import diffusers

    bases = (diffusers.ModelMixin, PreTrainedModel)
    originals = [base.__dict__["from_pretrained"] for base in bases]

    def checked(original):
        def from_pretrained(cls, path, *args, output_loading_info=False, **kwargs):
            network, info = original.__func__(cls, path, *args, output_loading_info=True, **kwargs)
            missing = [name for name in info.get("missing_keys") or () if not str(name).startswith(unused or ("\0",))]
            info = {**info, "missing_keys": missing}
            of_diffusers = issubclass(cls, diffusers.ModelMixin)
            kinds = ("missing", "unexpected", "mismatched") if of_diffusers else ("missing", "mismatched")
            problems = loading_problems(info, kinds)
            if problems:
                raise ValueError(f"the weights in {str(path)!r} do not fit the {cls.__name__}: {problems}")
            return (network, info) if output_loading_info else network

        return classmethod(from_pretrained)

    for base, original in zip(bases, originals, strict=True):
        base.from_pretrained = checked(original)
    try:
        yield
    finally:
        for base, original in zip(bases, originals, strict=True):
            base.from_pretrained = original


def load_denoiser(network_class: type[nn.Module], folder: str | Path, subfolder: str) -> nn.Module:
    """
    A denoiser that was saved by itself, as full fine-tuning does.

    Raises:
        ValueError: if it cannot be read, weights are missing, unexpected or misshapen, or a number is not finite.
    """
    try:
        with whole_networks():
            network = network_class.from_pretrained(folder, subfolder=subfolder)
    except Exception as error:  # what a reader raises depends on where the bytes break off
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"{str(folder)!r} has no {subfolder} that can be read ({type(error).__name__}: {reason})."
        ) from error
    broken = [n for n, v in network.state_dict().items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        raise ValueError(
            f"{str(folder)!r} holds numbers that are NaN or infinite, in {broken[0]!r}. Use an earlier checkpoint."
        )
    return network


# --- JSON ------------------------------------------------------------------------------------------------------------


def read_json(path: str | Path) -> dict:
    """The JSON object in a file; a `ValueError` that names the file if it holds anything else."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:  # of JSON, or of the encoding
        raise ValueError(f"{str(path)!r} is not valid JSON, it may be incomplete: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got a {type(content).__name__}.")
    return content


def read_model_type(path: str, hub_kwargs: dict) -> str | None:
    """The `model_type` in the `config.json` of a reward model, `None` if the configuration does not say."""
    require_existing(path, "reward model")
    try:
        config_file = cached_file(path, "config.json", **hub_kwargs)
    except OSError as error:
        raise FileNotFoundError(f"{path!r} holds no step-aware reward model, and no other: {error}") from error
    if config_file is None:
        raise FileNotFoundError(f"{path!r} holds no step-aware reward model, and no other: there is no config.json.")
    return read_json(config_file).get("model_type")


def read_image_processor(path: str | Path) -> dict:
    """
    The settings of the image processor in a folder or Hub repository; empty if it has none.

    They are read from the JSON, because some classes of image processors need torchvision.
    """
    path = str(path)
    require_existing(path, "processor")
    for name in PROCESSOR_FILES:
        file = optional_file(path, name)
        if file is not None:
            settings = read_json(file)
            return settings.get("image_processor", settings)
    return {}


def image_settings(path: str | Path) -> dict:
    """`image_mean` and `image_std` of an image processor, those of the two that it has."""
    settings = read_image_processor(path)
    return {key: settings[key] for key in ("image_mean", "image_std") if settings.get(key) is not None}


# --- weights ---------------------------------------------------------------------------------------------------------


def read_plain(path: str) -> Any:
    """
    What a `.safetensors` or torch file holds: tensors, numbers, and lists and dictionaries of them. Runs no code from it.

    Raises:
        ValueError: if the file holds other objects, or cannot be read.
    """
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError) as error:
        raise ValueError(
            f"{path!r} was refused: it is not a file of plain tensors (it holds other objects, or is not a checkpoint "
            f"at all): {error}"
        ) from error
    except Exception as error:  # what a reader raises depends on where the bytes break off
        raise ValueError(f"{path!r} cannot be read, the download may be incomplete: {error}") from error


def read_state_dict(path: str, key: str | None = None) -> dict[str, torch.Tensor]:
    """
    The state dict in a `.safetensors` or torch file. Runs no code from the file.

    Args:
        path (`str`): the file.
        key (`str`, *optional*): the entry of the file that holds the state dict, if it is not the whole file.

    Raises:
        ValueError: if the file holds anything but named tensors, cannot be read, or has no such entry.
    """
    content = read_plain(path)
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


def load_strictly(model: nn.Module, weights: dict[str, torch.Tensor], source: str, what: str) -> None:
    """
    `load_state_dict` that names the missing, unexpected and misshapen keys in one error, the first ten of each.

    Position ids, which some versions of transformers save, are left out: they are constants.

    Args:
        model (`nn.Module`): the model to fill.
        weights (`dict[str, torch.Tensor]`): its state dict.
        source (`str`): the file they come from, for the error.
        what (`str`): what the model is, for the error.

    Raises:
        ValueError: if a weight is missing, unexpected, of another shape, or not of floating point where it should be.
    """
    weights = _without_position_ids(weights)
    check_fit(_without_position_ids(model.state_dict()), weights, source, what)
    model.load_state_dict(weights, strict=False)


def check_fit(
    expected: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], source: str | Path, what: str
) -> None:
    """
    The check of [`load_strictly`] alone: whether `weights` have the names, shapes and kinds of `expected`.

    Raises:
        ValueError: as there.
    """
    shapes = []
    dtypes = []
    for name in sorted(expected.keys() & weights.keys()):
        given = weights[name]
        wanted = expected[name]
        if given.shape != wanted.shape:
            shapes.append(f"{name} {tuple(given.shape)} for {tuple(wanted.shape)}")
        if wanted.is_floating_point() and not given.is_floating_point():
            dtypes.append(f"{name} {given.dtype}")

    found = {
        "missing": sorted(expected.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - expected.keys()),
        "wrong shape": shapes,
        "not floating point": dtypes,
    }
    problems = [f"{problem}: {_first_ten(names)}" for problem, names in found.items() if names]
    if problems:
        raise ValueError(f"{str(source)!r} does not fit {what}. " + "; ".join(problems) + ".")


def _without_position_ids(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in weights.items() if not name.endswith(".position_ids")}


def _first_ten(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
