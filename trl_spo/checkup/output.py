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

"""The output folder of a run: what is in it already, where the run would go on, and what it will write."""

import math
from pathlib import Path
from typing import Any

from ..pipelines.adapters import LORA_NAME
from ..training.checkpointing import (
    EARLIER_RUN_ADVICE,
    CheckpointFiles,
    check_for_earlier_run,
    checkpoint_problems,
    checkpoints_of_last_run,
    global_step_of,
)
from .report import NOTE, OK, PROBLEM, WARNING, Finding


SECTION = "output"
STATE_SHARE = 3  # a checkpoint holds the trained weights and two moments of each
OTHER_BYTES = 2**20  # random states, schedule, log, card


def check_output(config: Any, resume: Any, files: CheckpointFiles) -> list[Finding]:
    """
    Earlier runs in the output folder, and the checkpoint from which this one would go on.

    Args:
        config: of a trainer.
        resume (`bool`, `str` or `None`): as `Trainer.train` takes it.
        files ([`CheckpointFiles`]): of the trainer.
    """
    folder = Path(config.output_dir)
    if resume not in (None, False):
        return [_resumed(folder, resume, files)]
    try:
        check_for_earlier_run(folder, EARLIER_RUN_ADVICE)
    except ValueError as error:  # the command refuses it, unless it is told not to
        mark = WARNING if config.overwrite_output_dir else PROBLEM
        return [Finding(SECTION, mark, "output_dir", str(error))]
    if (folder / LORA_NAME).is_file() or (folder / "model.safetensors").is_file():
        text = f"{str(folder)!r} holds a saved model, which would be overwritten. Choose another folder to keep it."
        return [Finding(SECTION, WARNING, "output_dir", text)]
    state = "is empty" if folder.is_dir() else "will be made"
    return [Finding(SECTION, OK, "output_dir", f"{str(folder)!r} {state}")]


def _resumed(folder: Path, resume: Any, files: CheckpointFiles) -> Finding:
    if resume is True:
        own, _ = checkpoints_of_last_run(folder, files)
        whole = [path for path in own if not checkpoint_problems(path, files)]
        if not whole:
            text = f"there is no complete checkpoint in {str(folder)!r} to resume from. Leave the option out to begin anew."
            return Finding(SECTION, PROBLEM, "resume", text)
        checkpoint = max(whole, key=global_step_of)
    else:
        checkpoint = Path(resume)
        problems = checkpoint_problems(checkpoint, files)
        if problems:
            text = f"{str(checkpoint)!r} is not a complete checkpoint: {'; '.join(problems)}."
            return Finding(SECTION, PROBLEM, "resume", text)
    return Finding(
        SECTION, NOTE, "resume", f"goes on from {str(checkpoint)!r}, after step {global_step_of(checkpoint):,}"
    )


def bytes_to_write(config: Any, trained: int, steps: float) -> tuple[int, str]:
    """
    What a training writes.

    Args:
        config: of a trainer.
        trained (`int`): bytes of the trained weights.
        steps (`float`): optimizer steps, at most.

    Returns:
        `tuple[int, str]`: bytes, and of what they are made.
    """
    checkpoint = STATE_SHARE * trained + OTHER_BYTES
    count = _checkpoints(config, steps)
    if config.save_total_limit:
        count = min(count, config.save_total_limit + 1)  # a new one is written before an old one goes
    size = count * checkpoint + trained + OTHER_BYTES
    return size, f"{count} checkpoint{'' if count == 1 else 's'} of {checkpoint / 2**20:,.1f} MiB and the model"


def _checkpoints(config: Any, steps: float) -> int:
    strategy = str(getattr(config.save_strategy, "value", config.save_strategy))
    if strategy == "no" or math.isinf(steps):
        return 0 if strategy == "no" else 1
    if strategy == "epoch":
        return math.ceil(config.num_train_epochs)
    if strategy == "best":
        return 1
    every = config.save_steps if config.save_steps >= 1 else max(1, math.ceil(config.save_steps * steps))
    return max(1, math.ceil(steps / every))
