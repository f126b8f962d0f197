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
Find a reward or metric of the user's own by `module:attribute`.

Only what the user names on a command line or in a config is imported, and nothing that a model or dataset names.
"""

import importlib
import inspect
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from ..suggestions import did_you_mean
from .base import accepts, is_reward_model


def import_attribute(name: str) -> Any:
    """
    What a `module:attribute` names.

    Args:
        name (`str`): a module, which may lie in the working directory, or a file that ends in `.py`; a colon; and an
            attribute of it, with dots for attributes of attributes.

    Raises:
        ValueError: if there is no such module or attribute, or the module cannot be imported, with the error it raised.
    """
    module_name, _, attribute = name.rpartition(":")
    if not module_name or not attribute:
        raise ValueError(f"{name!r} must be a module, a colon and a name in it, such as 'my_rewards:brightness'.")
    value = import_module(module_name)
    for part in attribute.split("."):
        if not hasattr(value, part):
            names = [found for found in dir(value) if not found.startswith("_")]
            raise ValueError(f"{module_name!r} has no {part!r}{did_you_mean(part, names) or '.'}")
        value = getattr(value, part)
    return value


def import_module(name: str) -> ModuleType:
    """A module by its name, with the working directory searched first, or by its file. Raises: see [`import_attribute`]."""
    folder, module_name = os.getcwd(), name
    if name.endswith(".py"):
        path = Path(name).resolve()
        if not path.is_file():
            raise ValueError(
                f"There is no file {name!r}{did_you_mean(path.name, _python_files(path.parent, '.py')) or '.'}"
            )
        folder, module_name = str(path.parent), path.stem
    if folder not in sys.path:
        sys.path.insert(0, folder)  # it stays: what is imported may import its neighbours when it is called
    importlib.invalidate_caches()  # the file may be younger than the process
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        is_missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        if is_missing:
            hint = did_you_mean(module_name, _python_files(Path(folder))) or "."
            raise ValueError(f"There is no module {name!r} in the working directory or installed{hint}") from error
        raise ValueError(f"Importing {name!r} failed{_where(error)}: {type(error).__name__}: {error}") from error
    if name.endswith(".py") and Path(module.__file__ or "").resolve() != path:
        raise ValueError(f"{name!r} has the name of another module, {module.__file__!r}. Give the file another name.")
    return module


def _python_files(folder: Path, suffix: str = "") -> list[str]:
    return [file.stem + suffix for file in folder.glob("*.py")]


def _where(error: BaseException) -> str:
    """The file and line in which the import failed."""
    if isinstance(error, SyntaxError):
        return f" in {error.filename!r}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith("<")]
    own = [
        frame for frame in frames if Path(frame.filename).name != "__init__.py" or "importlib" not in frame.filename
    ]
    return f" in {own[-1].filename!r}, line {own[-1].lineno}" if own else ""


# --- objects to rewards and metrics ----------------------------------------------------------------------------------


def is_scorer(value: Any) -> bool:
    """Whether this judges as it is: a reward, a reward model, a function of images and prompts, or an object with `score`."""
    if isinstance(value, type):
        return False
    if is_reward_model(value) or (not callable(value) and callable(getattr(value, "score", None))):
        return True
    return callable(value) and (accepts(value, 0, 0, 0) or accepts(value, 0, 0))


def check_user_object(name: str, value: Any, options: dict) -> None:
    """
    Check what a `module:attribute` named, without calling it.

    Raises:
        TypeError: if it cannot be a reward or a metric.
        ValueError: for options where nothing takes them.
    """
    if is_scorer(value):
        if options:
            raise ValueError(f"{name!r} is used as it is and takes no options; those are for a class or a factory.")
        return
    if not callable(value):
        raise TypeError(
            f"{name!r} must be a function `(images, prompts, timesteps) -> scores`, a reward model, or a class or function "
            f"that makes one, and is a `{type(value).__name__}`."
        )
    if not accepts(value, **options):
        raise TypeError(
            f"{name!r} takes {inspect.signature(value)}: it is neither a function `(images, prompts, timesteps)` of images "
            f"nor can it be called with the options that were given, {options}."
        )


def make_user_object(name: str, value: Any, options: dict) -> Any:
    """
    The reward or metric: the value itself, or what the class or factory makes.

    Raises: see [`check_user_object`], and
        TypeError: if what was made is no reward.
    """
    check_user_object(name, value, options)
    if not is_scorer(value):
        value = value(**options)
        if not is_scorer(value):
            raise TypeError(
                f"{name!r} made a `{type(value).__name__}`, which is neither a function of images nor a reward."
            )
    if not callable(value) and not is_reward_model(value):
        return value.score
    return value
