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
The sampler that a model was trained for, as a small file beside its weights, so that whoever samples it later starts from
the same settings.

[`SPOTrainer.save_model`] writes `sampler.json`; `trl-spo sample` and `trl-spo evaluate` read it. The names are those of
[`SPOConfig`], and `scheduler` is the `sampler_name` of the pipeline's step rule.
"""

import json
import math
from pathlib import Path
from typing import Any

from .hub_files import optional_file
from .pipelines.base import SPOPipeline


SAMPLER_NAME = "sampler.json"
# Name -> what a value is, and how to tell. A file may come from anywhere, so nothing in it is believed.
FIELDS = {
    "scheduler": ("the name of a scheduler", lambda value: isinstance(value, str)),
    "sampler": ("the name of a sampler", lambda value: isinstance(value, str)),
    "num_inference_steps": ("a whole number from 1 to 1000", lambda value: _is_whole(value, 1, 1000)),
    "guidance_scale": ("a finite number", lambda value: _is_number(value)),
    "eta": ("a number of at least 0", lambda value: _is_number(value) and value >= 0),
    "negative_prompt": ("a text", lambda value: isinstance(value, str)),
    "height": ("a number of pixels or null", lambda value: value is None or _is_whole(value, 1, 16384)),
    "width": ("a number of pixels or null", lambda value: value is None or _is_whole(value, 1, 16384)),
    "guidance_rescale": ("a number in [0, 1]", lambda value: _is_number(value) and 0 <= value <= 1),
    "clip_skip": ("a number of layers", lambda value: _is_whole(value, 0, 1000)),
}


def sampler_settings(args, pipeline: SPOPipeline) -> dict[str, Any]:
    """
    What `sampler.json` holds.

    Args:
        args ([`SPOConfig`]): the settings of the run.
        pipeline ([`SPOPipeline`]): the pipeline that is trained.

    Returns:
        `dict[str, Any]`: a value for each of `FIELDS`.
    """
    settings = {name: getattr(args, name) for name in FIELDS if name != "scheduler"}
    return {"scheduler": pipeline.step_rule.sampler_name, **settings}


def read_sampler(source: str | Path) -> dict[str, Any] | None:
    """
    The sampler that a model was trained for.

    Args:
        source (`str` or `Path`): a LoRA file, its folder, or the Hub id of its repository.

    Returns:
        `dict[str, Any]`: settings by the names of `FIELDS`, as many as the file has; `None` if there is no file.

    Raises:
        ValueError: if there is a file, and it does not hold what [`SPOTrainer.save_model`] writes.
    """
    path = Path(source)
    if path.is_file():
        found = path.parent / SAMPLER_NAME
    elif path.is_dir():
        found = path / SAMPLER_NAME
    else:
        found = optional_file(str(source), SAMPLER_NAME)
    if found is None or not Path(found).is_file():
        return None
    return _checked(Path(found))


def _checked(file: Path) -> dict[str, Any]:
    """The settings in a file, each of which is what its name says."""
    hint = "Remove the file to sample with the default settings, or name a protocol."
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also bytes that are not UTF-8
        raise ValueError(f"{str(file)!r} is not JSON ({error}). {hint}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{str(file)!r} must hold the settings of a sampler by name. {hint}")
    for name, (expected, fits) in FIELDS.items():
        if name in settings and not fits(settings[name]):
            raise ValueError(f"`{name}` in {str(file)!r} must be {expected}, got {settings[name]!r}. {hint}")
    return {name: settings[name] for name in FIELDS if name in settings}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
