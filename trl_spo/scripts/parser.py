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
The parser of all commands: TRL's, with a sentence for every mistake that can be seen before anything is loaded, and the
name that was probably meant.
"""

import json
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from ..suggestions import did_you_mean
from .errors import split_values, without_debug
from .help import format_help
from .presets import find_preset, no_such_config


class ScriptParser(TrlParser):
    """
    A [`~trl.TrlParser`] that also takes `--config=FILE` and `--debug`, and whose errors are one line.

    Args:
        dataclass_types (`Iterable` of dataclasses): whose fields are the arguments.
        presets (`Sequence[str]`, *optional*, defaults to `()`): kinds of presets of the package that `--config` takes by
            name, such as `("spo", "lpo")`: see [`~scripts.presets.find_preset`].
        kwargs: of `argparse.ArgumentParser`.

    Attributes:
        accelerate_configs (`Collection[str]`): names that `--accelerate_config` takes, if the command has that option.
    """

    accelerate_configs: Collection[str] = ()

    def __init__(self, dataclass_types: Iterable[type], presets: Sequence[str] = (), **kwargs):
        super().__init__(dataclass_types, **kwargs)
        self.presets = presets
        self.add_argument(
            "--config",
            metavar="FILE",
            help="YAML file with arguments, or the name of a preset. The command line goes before it.",
        )
        if "--debug" not in self._option_string_actions:  # a field of `TrainingArguments`, which takes a value
            self.add_argument("--debug", action="store_true", help="Print the traceback of an error.")

    def parse_args_and_config(self, args: Iterable[str] | None = None) -> tuple[Any, ...]:
        """
        See [`~trl.TrlParser`].

        Raises:
            SystemExit: with status 2, after one line: for an option or a key that does not exist, a value of another
                type, or a config that cannot be read.
        """
        arguments = without_debug(split_values(sys.argv[1:] if args is None else args))
        if "--help" in arguments or "-h" in arguments:
            print(self.format_help(everything="all" in arguments), end="")
            self.exit()
        self._check_options(arguments)
        self._check_json(arguments)
        if "--config" in arguments:
            self._check_config(arguments)
        output = super().parse_args_and_config(arguments)
        return output[: len(self.dataclass_types)]  # without `config` and `debug`, which are not fields

    def format_help(self, everything: bool = False) -> str:
        """The options in groups, see [`format_help`]; `everything` includes those that few runs need."""
        return format_help(self, everything, self.accelerate_configs)

    def error(self, message: str) -> NoReturn:
        """One line, without the usage, which for these parsers has hundreds of lines."""
        message = message if message.endswith("?") else f"{message}."
        self.exit(2, f"{self.prog}: error: {message} `{self.prog} --help` lists the arguments.\n")

    def _check_options(self, arguments: Sequence[str]) -> None:
        known = self._option_string_actions
        for word in arguments:
            if not word.startswith("--") or word in known:
                continue
            begun = [option for option in known if option.startswith(word)]  # argparse takes what is unambiguous
            if len(begun) != 1:
                self.error(f"there is no option {word}{did_you_mean(word, begun or known)}")

    def _check_json(self, arguments: Sequence[str]) -> None:
        """The fields of `TrainingArguments` that are dictionaries, whose own error does not name the option."""
        names = set()
        for dataclass_type in self.dataclass_types:
            names.update(getattr(dataclass_type, "_VALID_DICT_FIELDS", ()))
        for word, value in zip(arguments, arguments[1:], strict=False):
            name = word.removeprefix("--").replace("-", "_")
            if name in names and value.startswith("{"):
                try:
                    json.loads(value)
                except json.JSONDecodeError as error:
                    self.error(f"--{name} must be JSON, got {value!r} ({error})")

    def _check_config(self, arguments: list[str]) -> None:
        index = arguments.index("--config") + 1
        if index == len(arguments):
            self.error("--config needs a file")
        path = Path(arguments[index])
        if not path.is_file():
            preset = find_preset(arguments[index], self.presets)
            if preset is None:
                self.error(no_such_config(arguments[index], self.presets))
            path = preset
            arguments[index] = str(preset)  # for TRL's parser, which opens it
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}")
        if not isinstance(content, dict):
            self.error(f"{str(path)!r} must hold one `name: value` per line, and holds a {type(content).__name__}")
        known = {action.dest for action in self._actions} | {"env"}
        for name in content:
            if name not in known:
                self.error(f"{str(path)!r} has {name!r}, which is not an argument{did_you_mean(str(name), known)}")
