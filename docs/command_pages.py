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
The reference of the command line: one Markdown page per command of `trl-spo`, written from its parser, so that it has
every option that the command has and no other.
"""

import argparse
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

from api_pages import write_pages
from transformers import TrainingArguments

from trl_spo.scripts import cli


OF_TRANSFORMERS = set(TrainingArguments.__dataclass_fields__)
FURTHER = "Training, from transformers"
KINDS = {"int": "number", "float": "number", "str": "text", "string_to_bool": "`true` or `false`", "Path": "path"}


def parts_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands of a command, by name, or the parser itself."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {"": parser}


def option_groups(parser: argparse.ArgumentParser) -> dict[str, tuple[str, list[argparse.Action]]]:
    """
    The options of a parser under the dataclass that has them.

    Args:
        parser (`argparse.ArgumentParser`): of a command.

    Returns:
        `dict[str, tuple[str, list[argparse.Action]]]`: title -> a sentence about the group and its options. What
        transformers' `TrainingArguments` have comes last, what no dataclass has comes first.
    """
    actions = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)  # of `--x` and `--no_x` the first
    groups = {"Options": ("", [])}
    placed = set()
    for dataclass_type in getattr(parser, "dataclass_types", ()):
        own = [field.name for field in dataclasses.fields(dataclass_type) if field.name in actions]
        own = [name for name in own if name not in OF_TRANSFORMERS and name not in placed]
        sentence = inspect.cleandoc(dataclass_type.__doc__ or "").split("\n\n")[0]
        sentence = re.sub(r"\[(`[^`]+`)\]", r"\1", " ".join(sentence.split()))  # a reference, which leads nowhere here
        groups[title_of(dataclass_type)] = (sentence, [actions[name] for name in own])
        placed |= set(own)
    rest = [action for name, action in actions.items() if name not in placed]
    trains = hasattr(parser, "dataclass_types") and "learning_rate" in actions
    of_transformers = [action for action in rest if trains and action.dest in OF_TRANSFORMERS]
    groups["Options"] = ("", [action for action in rest if action not in of_transformers])
    sentence = "Options that every `Trainer` of transformers has; the names are those of its documentation."
    groups[FURTHER] = (sentence, of_transformers)
    return {title: group for title, group in groups.items() if group[1]}


def title_of(dataclass_type: type) -> str:
    """`DiffusionModelArguments` -> `Diffusion model`."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]+", dataclass_type.__name__.removesuffix("Arguments"))
    return " ".join([words[0], *(word if word.isupper() else word.lower() for word in words[1:])])


def value_of(action: argparse.Action) -> str:
    """What may follow an option."""
    if action.nargs == 0:
        return ""
    if action.choices is not None:
        text = ", ".join(f"`{choice}`" for choice in action.choices)
    else:
        text = KINDS.get(getattr(action.type, "__name__", ""), "text")
    return f"{text}, several" if action.nargs in ("+", "*") else text


def default_of(action: argparse.Action) -> str:
    """The default as one writes it, empty if there is none."""
    value = action.default
    if value in (None, argparse.SUPPRESS, "") or value == [] or action.nargs == 0:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{getattr(value, 'value', value)}`"


def row(action: argparse.Action) -> str:
    """The line of an option in the table of its group."""
    name = next((option for option in action.option_strings if option.startswith("--")), action.dest)
    text = " ".join((action.help or "").replace("%%", "%").split()) if action.help != argparse.SUPPRESS else ""
    cells = [f"`{name}`", value_of(action), default_of(action), text]
    return "| " + " | ".join(re.sub(r"([|<*])", r"\\\1", cell) for cell in cells) + " |"


def page(command: str) -> str:
    """The page of one command."""
    module, distributed, _ = cli.COMMANDS[command]
    script = importlib.import_module(f"trl_spo.scripts.{module}")
    parser = script.make_parser(prog=f"trl-spo {command}")
    lines = [f"# trl-spo {command}", "", inspect.cleandoc(script.__doc__), ""]
    if distributed:
        lines += ["`--accelerate_config` and the other options of `accelerate launch` are taken, too.", ""]
    for name, part in parts_of(parser).items():
        for title, (about, actions) in option_groups(part).items():
            title = f"trl-spo {command} {name}" if name else title
            lines += [f"## {title}", "", about, "", "| option | value | default | meaning |", "|---|---|---|---|"]
            lines += [*(row(action) for action in actions), ""]
    return "\n".join(lines)


def write(folder: Path) -> None:
    """Writes the pages to `folder`, those that changed."""
    pages = {f"command_{command.replace('-', '_')}.md": page(command) for command in cli.COMMANDS}
    write_pages(folder, pages, "command_*.md")
