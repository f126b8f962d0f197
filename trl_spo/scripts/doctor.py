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
Look at a run before it starts: what it would need, and what stands in its way. Nothing is trained, and no weights are loaded.

```bash
trl-spo doctor spo --config examples/configs/spo_sd15.yaml --dataset_name prompts.txt
trl-spo doctor spo --config examples/configs/spo_sd15.yaml --dataset_name prompts.txt --card_memory 24
trl-spo spo --config examples/configs/spo_sd15.yaml --dataset_name prompts.txt --dry_run
```

The exit status is 0 if the run can work, 1 if something certainly cannot, and 2 for arguments that do not exist.
"""

import argparse

from .errors import asks_for_tracebacks, one_line_errors, split_values


USAGE = """usage: trl-spo doctor COMMAND [--config FILE.yaml] [arguments of COMMAND]
       trl-spo COMMAND [--config FILE.yaml] [arguments] --dry_run

COMMAND is spo, step-reward, evaluate or sample. Its arguments are those of the run.

  --card_memory GIB   plan for a card with so much memory, on another machine
  --json FILE         write all that was found as JSON"""


def split_own_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the doctor, and those of the command that it looks at."""
    parser = argparse.ArgumentParser(prog="trl-spo doctor", add_help=False, allow_abbrev=False)
    parser.add_argument("--card_memory", type=float)
    parser.add_argument("--json")
    own, rest = parser.parse_known_args(arguments)
    if own.card_memory is not None and not 0 < own.card_memory < float("inf"):
        parser.error(f"--card_memory must be above 0 GiB, got {own.card_memory:g}")
    return own, rest


def processes_of(launch: list[str], resolve) -> tuple[int, str | None]:
    """
    How many processes the options of `accelerate launch` ask for, or the configuration that they name, and what spreads the denoiser
    over them.
    """
    from ..checkup.forecast import FSDP2, ZERO3

    words = split_values(launch)
    content = {}
    if "--accelerate_config" in words:
        import yaml

        file = resolve(words[words.index("--accelerate_config") + 1])
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    number = int(content.get("num_processes", 1))
    for option, value in zip(words, words[1:], strict=False):
        if option in ("--num_processes", "--num-processes"):
            number = int(value)
    uses_fsdp = content.get("distributed_type") == "FSDP" or {"--use_fsdp", "--use-fsdp"} & set(words)
    uses_zero3 = (content.get("deepspeed_config") or {}).get("zero_stage") == 3
    sharding = FSDP2 if uses_fsdp else ZERO3 if uses_zero3 else None
    return number, sharding if number > 1 else None


def main(command: str, parser, arguments: list[str], launch: list[str] = (), resolve=None) -> int:
    """
    Checks a command and prints the report.

    Args:
        command (`str`): one of `help.CHECKED`.
        parser (`ScriptParser`): of its script.
        arguments (`list[str]`): its arguments, and those of the doctor.
        launch (`list[str]`, *optional*): options of `accelerate launch`.
        resolve (`Callable`, *optional*): finds the file that `--accelerate_config` means.

    Returns:
        `int`: exit status.
    """
    own, arguments = split_own_arguments(arguments)
    with one_line_errors(parser.prog, debug=asks_for_tracebacks(arguments)):
        import torch

        # `TrainingArguments` refuse the precision of another machine, unless they are told of the CPU.
        has_option = "--use_cpu" in parser._option_string_actions
        on_cpu = not torch.cuda.is_available() and "--use_cpu" not in split_values(arguments)
        parsed = parser.parse_args_and_config([*arguments, *(["--use_cpu"] if on_cpu and has_option else [])])
        from ..checkup.run import CHECKS, Circumstances

        where = Circumstances(own.card_memory, *processes_of(list(launch), resolve), on_cpu)
        report = CHECKS[command](*parsed, where)
    print(report.text())
    if own.json:
        report.write(own.json)
    return report.exit_status
