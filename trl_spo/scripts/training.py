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
How the commands that train begin and end: in a folder of their own, from a checkpoint if they are told to, with one line per
log, and with a sentence about where the result is and what comes next.
"""

import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .arguments import PipelineArguments, leave_process_group


def check_run(config, trainer_class: type) -> None:
    """
    What can be said about a run before anything is loaded: output folder, trackers, evaluation data, earlier runs.

    Raises:
        ValueError, OSError: for what cannot work, or would mix two runs in one folder.
    """
    from ..training.checkpointing import EARLIER_RUN_ADVICE, check_for_earlier_run, restarts, resume_from

    trainer_class.check_output(config)
    if resume_from(config) is None and not config.overwrite_output_dir and restarts() == 0:
        check_for_earlier_run(config.output_dir, EARLIER_RUN_ADVICE)


def check_evaluation_data(config, eval_dataset_name: str | None) -> None:
    """
    Raises:
        SystemExit: if an evaluation is asked for and there is nothing to evaluate on.
    """
    strategy = getattr(config.eval_strategy, "value", config.eval_strategy)
    if strategy != "no" and eval_dataset_name is None:
        raise SystemExit(
            f"--eval_strategy {strategy} needs data that is not trained on: name it with --eval_dataset_name."
        )


def train_and_save(trainer, config, columns, title: str, ending: Callable[[str], str]) -> None:
    """
    Trains from where `config` says, saves to `config.output_dir`, pushes to the Hub if `config` asks for it, and says so.

    Args:
        trainer ([`SPOTrainer`] or [`StepRewardTrainer`]): what trains.
        config: its configuration, as the user gave it.
        columns (`Sequence[Column]`): what a line per log shows.
        title (`str`): what stands before the progress bar.
        ending (`Callable`): the duration, in words -> what is said at the end.

    Raises:
        SystemExit: with status 130 or 143, if a signal has ended the training.
    """
    from ..training.checkpointing import resume_from
    from ..training.log_lines import log_in_lines
    from ..training.stopping import StopOnSignalCallback

    log_in_lines(trainer, columns, title)
    trainer.add_callback(StopOnSignalCallback())
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=resume_from(config))
    speaks = trainer.is_world_process_zero()
    if trainer.stopped_by is not None:
        if speaks:
            print(stopped(trainer), file=sys.stderr)
        leave_process_group()
        raise SystemExit(128 + trainer.stopped_by)
    trainer.save_model()
    if config.push_to_hub:
        trainer.push_to_hub()
    if speaks:
        print(ending(duration(time.monotonic() - start)))
    leave_process_group()


def stopped(trainer) -> str:
    """What is said when a signal has ended the training."""
    step = trainer.state.global_step
    name = "Ctrl-C" if trainer.stopped_by == signal.SIGINT else signal.Signals(trainer.stopped_by).name
    of = f" of {trainer.args.max_steps}" if trainer.args.max_steps > 0 else ""
    text = f"Stopped by {name} after step {step}{of}. checkpoint-{step} is in {trainer.args.output_dir}"
    if trainer.args.save_only_model:
        return f"{text}; it has weights only, as save_only_model says, so that a run cannot go on from it."
    return f"{text}: the same command with --resume_from_checkpoint last goes on from there."


def duration(seconds: float) -> str:
    """`43 s`, `12 min 5 s` or `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"


def work_done(trainer, duration: str, on: str = "") -> str:
    """How much was trained, such as `22 steps on 440 pairs in 1 min 3 s`."""
    steps = f"{trainer.state.global_step} steps{on}"
    return f"{steps} before, nothing was left to train" if trainer.nothing_to_train else f"{steps} in {duration}"


def size_of(folder: str | Path, pattern: str) -> str:
    """Size of the files of a folder that match a pattern, such as `118 KiB`."""
    size = sum(path.stat().st_size for path in Path(folder).glob(pattern))
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def pipeline_options(arguments: PipelineArguments) -> list[str]:
    """The options with which another command loads the same pipeline."""
    options = ["--model_name_or_path", arguments.model_name_or_path]
    for name in ("vae_name_or_path", "dtype", "variant", "revision"):
        value = getattr(arguments, name)
        if value != type(arguments).__dataclass_fields__[name].default:
            options += [f"--{name}", value]
    return options


def next_command(command: str, *options: str) -> str:
    """A command as it can be pasted into a shell. What the user has to fill in is in capitals."""
    return f"Next: {command} {shlex.join(map(str, options))}"


def measured(trainer) -> str:
    """The first and the last evaluation of the run in a sentence, or nothing."""
    logs = [log for log in trainer.state.log_history if any(name.startswith("eval_") for name in log)]
    if len(logs) < 2:
        return ""
    changes = []
    for name, value in logs[-1].items():
        shown = name.removeprefix("eval_").removesuffix("_mean")
        if name in logs[0] and (name.endswith("_mean") or shown == "accuracy"):
            changes.append(f"{shown} {logs[0][name]:.4g} -> {value:.4g}")
    return f"Evaluation, first and last: {', '.join(changes)}.\n" if changes else ""
