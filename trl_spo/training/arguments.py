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
The base of both configs: `transformers.TrainingArguments` that never show the Hub token, and that check the type of each of
our settings before its value.
"""

import copy
import functools
import math
import os
import re
import types
import typing
from dataclasses import dataclass, field
from datetime import timedelta
from numbers import Integral, Real
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .trainer_options import REFUSED, check_options


_KINDS = {  # annotation -> what is accepted for it, in words, and a test
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("an integer", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
    float: ("a number", lambda value: isinstance(value, Real) and not isinstance(value, bool)),
    str: ("a string", lambda value: isinstance(value, str)),
    dict: ("a dictionary", lambda value: isinstance(value, dict)),
    list[int]: (
        "a list of integers",
        lambda value: isinstance(value, (list, tuple)) and all(_KINDS[int][1](item) for item in value),
    ),
    type(None): ("None", lambda value: value is None),
}
SECRET_NAME = re.compile(r"(^|_)(token|password|secret|api_key)$")
URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


def without_secrets(value: Any, name: str = "") -> Any:
    """
    A setting as it may be shown: strings under names such as "token" and the user and password of URLs are replaced, in
    nested dictionaries and lists as well. Other values stay what they are.
    """
    if isinstance(value, dict):
        return {key: without_secrets(item, str(key)) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_secrets(item, name) for item in value)
    if not isinstance(value, str):
        return value
    return f"<{name.upper()}>" if value and SECRET_NAME.search(name) else URL_CREDENTIALS.sub("<CREDENTIALS>@", value)


def check_kind(name: str, value: Any, annotation: Any) -> None:
    """
    Check that a value has the type that the annotation of its field says.

    Raises:
        TypeError: if it is of another kind: text for a number, True for an integer, a number for a switch.
        ValueError: for a number that is NaN or infinite, and for text that no file can hold.
    """
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = typing.get_args(annotation) if union else (annotation,)
    if not all(kind in _KINDS for kind in kinds):  # of a subclass, with a kind of its own
        return
    if not any(_KINDS[kind][1](value) for kind in kinds):
        expected = " or ".join(_KINDS[kind][0] for kind in kinds)
        raise TypeError(f"`{name}` must be {expected}, got {value!r} of type `{type(value).__name__}`.")
    if isinstance(value, Real) and not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}.")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"`{name}` is not valid Unicode, {value[:60]!r}: half of a surrogate pair, which no file can hold."
            ) from error


@dataclass(repr=False)  # a generated repr would show the Hub token
class StepTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] that show no secret: neither in their pickle, `training_args.bin` beside every
    saved model, nor in what trackers and `repr` get. The type of each of our settings is checked, and processes on the CPU
    wait for each other no longer than `ddp_timeout`.

    Two of its fields are in one of the versions 4 and 5 of transformers only, and work with both.
    """

    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Begin a new run in a folder with checkpoints of an earlier one, which stay beside its own."
        },
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Recompute activations in the backward pass: much less memory, somewhat slower."},
    )

    _refused = REFUSED  # fields of transformers that say nothing here

    def __post_init__(self):
        if self.activation_checkpointing and not hasattr(TrainingArguments, "activation_checkpointing"):
            self.gradient_checkpointing = True  # its name in transformers 4
        super().__post_init__()
        # Under DeepSpeed ZeRO-3 transformers would load all networks in parts, also those that are not trained.
        unset_hf_deepspeed_config()

    def check_kinds(self) -> None:
        """
        [`check_kind`] of every field that a subclass declares, and of those of transformers that it compares; what has no
        effect here is refused.
        """
        check_options(self, self._refused)
        for name in ("max_steps", "gradient_accumulation_steps", "seed"):
            check_kind(name, getattr(self, name), int)
        for cls in type(self).__mro__[: type(self).__mro__.index(StepTrainingArguments)]:
            try:
                annotations = typing.get_type_hints(cls)
            except NameError:  # a subclass may name types that it imports for type checkers only
                annotations = {}
            for name, annotation in annotations.items():
                if name in cls.__dict__.get("__annotations__", {}) and name in self.__dataclass_fields__:
                    if isinstance(getattr(self, name), os.PathLike):  # a folder, where a path or Hub id belongs
                        setattr(self, name, os.fspath(getattr(self, name)))
                    check_kind(name, getattr(self, name), annotation)

    @functools.cached_property
    def _setup_devices(self) -> torch.device:
        """Processes on the CPU wait for each other for `ddp_timeout`, too; the parent says so to those on GPUs only."""
        on_cpu = self.use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        if on_cpu and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
            PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))
        return super()._setup_devices

    def __getstate__(self) -> dict:
        """The Trainer pickles its arguments beside the model and uploads the file: a pickle must not hold the token."""
        shown = {k: without_secrets(v, k) for k, v in self.__dict__.items() if type(v) in (str, dict)}
        return {**self.__dict__, **shown, "hub_token": None}

    def to_dict(self) -> dict[str, Any]:
        """What trackers get."""
        return without_secrets(super().to_dict())

    def __str__(self) -> str:
        settings = "".join(f"{name}={value!r},\n" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{settings})"

    __repr__ = __str__

    def __copy__(self):  # copies in memory keep it
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo):
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied
