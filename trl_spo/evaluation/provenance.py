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
What was evaluated, in plain values that go beside the numbers: the model with its precision and adapters, the prompts, and
the packages. Two reports that say the same here were made of the same things.
"""

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..pipelines.base import SPOPipeline
from ..pipelines.components import commit_of_the_base, parts_from_elsewhere


PACKAGES = ("trl-spo", "torch", "diffusers", "transformers", "accelerate", "peft", "pillow")


def describe_pipeline(pipeline: SPOPipeline) -> dict[str, Any]:
    """
    The model of a pipeline.

    Returns:
        `dict[str, Any]`: `model` (Hub id or folder), `class` of the diffusers pipeline, `dtype`, and where there are such
        things `revision` (the commit), `vae` (if it comes from elsewhere) and `adapters` (those that are active, with their
        weights).
    """
    inner = pipeline.sd_pipeline
    described = {
        "model": getattr(inner, "name_or_path", None) or "built in memory",
        "class": type(inner).__name__,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
    }
    more = {
        "revision": commit_of_the_base(inner),
        "vae": parts_from_elsewhere(inner).get("vae"),
        "adapters": _active_adapters(pipeline),
    }
    return described | {name: value for name, value in more.items() if value}


def _active_adapters(pipeline: SPOPipeline) -> list[str]:
    """Names of the adapters of the denoiser that are on."""
    if not getattr(pipeline.denoiser, "peft_config", None) or not hasattr(pipeline.denoiser, "active_adapters"):
        return []
    return list(pipeline.denoiser.active_adapters())


def describe_lora(source: str, file: Path, scale: float = 1.0) -> dict[str, Any]:
    """
    A LoRA: where it came from (`source`), the hash of its weights (`sha256` of the file) and its `scale`.

    Args:
        source (`str`): folder, file or Hub id, as it was named.
        file (`Path`): the file that was loaded.
        scale (`float`, *optional*, defaults to `1.0`): its weight.
    """
    name = file.name if Path(source).is_dir() and file.parent == Path(source) else f"{file.parent.name}/{file.name}"
    return {"source": source, "file": name, "sha256": sha256_of_file(file), "scale": scale}


def describe_prompts(prompts: list[str], source: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """
    A list of prompts: how many, how many distinct ones, and their `sha256`.

    The hash is that of the prompts in their order, each followed by a line break, in UTF-8. Of a text file with one prompt per
    line that ends in a line break, `sha256sum` says the same.

    Args:
        prompts (`list[str]`): one per image.
        source (mapping, *optional*): where they came from, such as `{"file": "validation.txt"}`; `None` values are left out.
    """
    text = "".join(f"{prompt}\n" for prompt in prompts)
    found = {name: value for name, value in (source or {}).items() if value is not None}
    found |= {"count": len(prompts), "distinct": len(set(prompts))}
    return found | {"sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()}


def weights_of(metric: Any) -> dict[str, str]:
    """
    Where the weights of a metric are from: what `load_metric` noted, or the Hub id or folder of a reward model.

    Returns:
        `dict[str, str]`: folders, files or Hub ids by what they are, and the `commit` where one is known. Empty for a plain
        function.
    """
    weights = dict(getattr(metric, "weights", None) or {})
    config = getattr(metric, "config", None) or getattr(getattr(metric, "model", None), "config", None)
    if not weights and getattr(config, "_name_or_path", None):
        weights["model"] = config._name_or_path
    if weights and getattr(config, "_commit_hash", None):
        weights["commit"] = config._commit_hash
    return weights


def sha256_of_file(path: str | Path) -> str:
    """The hash of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the packages that make images and numbers."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a checkout on the path, not installed
            versions[name] = "not installed"
    return versions
