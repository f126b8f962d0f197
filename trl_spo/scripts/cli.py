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
The console command `trl-spo`, which runs the scripts of this folder as subcommands.

The training commands run in this process, or, with `--accelerate_config` or another option of `accelerate launch`, in
processes that accelerate starts. What is heavy is imported once a command is known, so `trl-spo --help` answers at once.
"""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from ..suggestions import did_you_mean
from .errors import asks_for_tracebacks, one_line_errors, run


COMMANDS = {  # name -> (module, runs on several devices, what it does)
    "spo": ("spo", True, "train a LoRA of a diffusion model with SPO"),
    "step-reward": ("step_reward", True, "train the step-aware reward model on preference images"),
    "evaluate": (
        "evaluate",
        False,
        "score images of a model, alone or against its base, with stated seeds and sampler",
    ),
    "sample": ("sample", False, "make images from prompts"),
    "label": ("label", False, "say in the browser which of two images you like better"),
    "data": ("data", False, "make a preference dataset of your own images, or look at one"),
    "demo": ("demo", False, "the whole method in a world of shapes, about five minutes on a CPU"),
}
DOCTOR = "look at a run before it starts: what it needs, and what stands in its way (also: COMMAND ... --dry_run)"


def named_accelerate_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    folder = Path(str(resources.files(__package__.rpartition(".")[0]))) / "accelerate_configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def usage() -> str:
    """The text of `trl-spo --help`."""
    lines = ["usage: trl-spo COMMAND [--config FILE.yaml] [arguments]", "", "commands:"]
    lines += [f"  {name:12} {text}" for name, (_, _, text) in COMMANDS.items()]
    lines += [f"  {'doctor':12} {DOCTOR}"]
    lines += [
        "",
        "`trl-spo COMMAND --help` lists the arguments of a command. Arguments come from the YAML file of --config and",
        "from the command line, which goes first. An error is one line; --debug prints its traceback.",
        "",
        "spo and step-reward on several devices:",
        "  --accelerate_config NAME|PATH   a file of `accelerate config`, or one of",
        "                                  " + ", ".join(named_accelerate_configs()),
        "  --num_processes N, ...          or any other option of `accelerate launch`",
    ]
    return "\n".join(lines)


def resolve_accelerate_config(value: str) -> Path:
    """
    The file that `--accelerate_config` means.

    Raises:
        SystemExit: if it is neither a file nor the name of a configuration of the package.
    """
    known = named_accelerate_configs()
    if Path(value).is_file():
        return Path(value)
    if value not in known:
        raise SystemExit(
            f"--accelerate_config must be a file, or one of {', '.join(known)}; got {value!r}. "
            "`accelerate config` writes such a file."
        )
    return known[value]


def split_launch_arguments(parser, arguments: list[str]) -> tuple[list[str], list[str]]:
    """
    Tell the options of `accelerate launch` from those of a script, which go first where both have one.

    Args:
        parser (`argparse.ArgumentParser`): the script's parser.
        arguments (`list[str]`): what stands after the command.

    Returns:
        `tuple[list[str], list[str]]`: options for `accelerate launch`, and options for the script.
    """
    from accelerate.commands.launch import launch_command_parser

    own = set(parser._option_string_actions) | {"--config"}
    launchers = (set(launch_command_parser()._option_string_actions) | {"--accelerate_config"}) - own
    launch = []
    script = []
    target = script
    for argument in arguments:
        if argument.startswith("-"):  # what follows, up to the next option, is its value
            target = launch if argument.partition("=")[0] in launchers else script
        target.append(argument)
    return launch, script


def launch_with_accelerate(module: str, launch: list[str], arguments: list[str]) -> int:
    """`accelerate launch LAUNCH -m MODULE ARGUMENTS`; returns its exit status."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    launch = [part for argument in launch for part in argument.split("=", 1)]
    if "--accelerate_config" in launch:
        index = launch.index("--accelerate_config")
        if index + 1 == len(launch):
            raise SystemExit("--accelerate_config needs a value, a file or a name.")
        launch[index : index + 2] = ["--config_file", str(resolve_accelerate_config(launch[index + 1]))]
    # torch kills processes that take longer than this to stop, and a rollout may have to be finished first.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    # In a store that outlives them, processes that are started anew find the addresses of dead ones (torch 2.13).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    parsed = launch_command_parser().parse_args([*launch, "--module", module, *arguments])
    try:
        with signals_for_children():
            launch_command(parsed)
    except subprocess.CalledProcessError as error:  # the script has said why
        status = error.returncode
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
    except SignalException as stop:
        status = 128 + stop.sigval
    else:
        status = 0
    return 128 - status if status < 0 else status  # a process that a signal has ended


@contextlib.contextmanager
def signals_for_children() -> Iterator[None]:
    """Ctrl-C and SIGTERM inside are passed on to the processes that were started, which end in order; this one waits."""
    import psutil

    def pass_on(number, frame):
        for child in psutil.Process().children():
            child.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def examine(command: str, arguments: list[str]) -> int:
    """`trl-spo doctor COMMAND ...`, or `trl-spo COMMAND ... --dry_run`; returns its exit status."""
    doctor = importlib.import_module(".doctor", __package__)
    checked = importlib.import_module(".help", __package__).CHECKED
    arguments = [argument for argument in arguments if argument != "--dry_run"]
    if command == "doctor":
        command, *arguments = arguments or ["--help"]
    if command in ("-h", "--help"):
        print(doctor.USAGE)
        return 0
    if command not in checked:
        meant = did_you_mean(command, checked) or "."
        print(f"trl-spo doctor: it looks at {', '.join(checked)}, and not at {command!r}{meant}", file=sys.stderr)
        return 2
    name, distributed, _ = COMMANDS[command]
    parser = importlib.import_module(f".{name}", __package__).make_parser(prog=f"trl-spo doctor {command}")
    launch, arguments = split_launch_arguments(parser, arguments) if distributed else ([], arguments)
    return doctor.main(command, parser, arguments, launch, resolve_accelerate_config)


def main(argv: list[str] | None = None) -> int:
    """
    Runs `trl-spo`.

    Args:
        argv (`list[str]`, *optional*): the arguments; those of the process by default.

    Returns:
        `int`: exit status.
    """
    command, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command == "--version":
        print(importlib.import_module(__package__.rpartition(".")[0]).__version__)
        return 0
    if command == "doctor" or "--dry_run" in arguments:
        return examine(command, arguments)
    if command not in COMMANDS:
        meant = did_you_mean(command, [*COMMANDS, "doctor"]) or "."
        print(
            f"trl-spo: there is no command {command!r}; it must be one of {', '.join(COMMANDS)}{meant}",
            file=sys.stderr,
        )
        return 2
    name, distributed, _ = COMMANDS[command]
    script = importlib.import_module(f".{name}", __package__)
    parser = script.make_parser(prog=f"trl-spo {command}")
    if distributed:
        parser.accelerate_configs = named_accelerate_configs()
        launch, arguments = split_launch_arguments(parser, arguments)
        if launch:
            with one_line_errors(f"trl-spo {command}", debug=asks_for_tracebacks(arguments)):
                return launch_with_accelerate(script.__name__, launch, arguments)
    run(script.main, parser, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
