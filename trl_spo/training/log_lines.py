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
What a run shows on the terminal: a progress bar, and one line per log with the numbers that one watches. Trackers and
`trainer.state.log_history` get all of them, whoever prints.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer


@dataclass(frozen=True)
class Column:
    """
    A number of the line.

    Attributes:
        key (`str`): its name in the logs; the first that exists of several, separated by spaces.
        label (`str`): what the line calls it.
        format (`str`): of Python's format language.
    """

    key: str
    label: str
    format: str


SPO_COLUMNS = (
    Column("loss", "loss", ".4f"),
    Column("step_reward/mean", "step reward", "8.4g"),
    Column("pairs/fresh_accuracy", "accuracy", ".2f"),
    Column("pairs/valid_fraction", "valid pairs", ".2f"),
    Column("kl", "kl", ".1e"),
)
STEP_REWARD_COLUMNS = (
    Column("loss", "loss", ".4f"),
    Column("accuracy", "accuracy", ".3f"),
    Column("margin", "margin", "7.3f"),
    Column("caption_loss", "caption loss", ".3f"),
)
TROUBLES = {  # counts since the last log, which are 0 in a healthy run
    "pairs/nonfinite": "pairs not finite",
    "nonfinite_pairs": "pairs not finite",
    "skipped_steps": "steps skipped",
}


class LogLineCallback(ProgressCallback):
    """
    A progress bar, and one line per log instead of all of its numbers.

    The bar of a run that is resumed begins where the run stopped, so that its speed and the time that it predicts are those of
    this part. Without bars (`disable_tqdm`) the lines are printed alone.

    Args:
        columns (`Sequence[Column]`): what a line of the training shows, where the log has it.
        title (`str`, *optional*): what stands before the bar.
        bar (`bool`, *optional*, defaults to `True`): whether there is a bar.
    """

    def __init__(self, columns: Sequence[Column], title: str = "", bar: bool = True):
        super().__init__()
        self.columns = tuple(columns)
        self.title = title
        self.bar = bar
        self._last = (0.0, 0, 0)  # time, step and pairs of the last line

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        self._last = (time.perf_counter(), state.global_step, None)
        if state.is_world_process_zero and self.bar:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self.title or None, dynamic_ncols=True
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.bar:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        parts = self.parts_of(logs or {})
        if "loss" in (logs or {}):
            parts.append(self._speed(args, state, logs))
        if not parts:  # the summary of a training
            return
        total = state.max_steps if self.training_bar is None else self.training_bar.total
        total = f"/{total}" if 0 < total < 10**9 else ""
        line = f"step {state.global_step:>{max(len(total) - 1, 4)}}{total}  " + "  ".join(parts)
        print(line, flush=True) if self.training_bar is None else self.training_bar.write(line)

    def parts_of(self, logs: dict[str, float]) -> list[str]:
        """The labelled numbers of a log, those of an evaluation with all of its means."""
        parts = [f"{c.label} {logs[c.key]:{c.format}}" for c in self.columns if c.key in logs]
        parts += [f"{int(logs[key])} {label}" for key, label in TROUBLES.items() if logs.get(key, 0) > 0]
        evaluated = []
        for key, value in logs.items():
            name = key.removeprefix("eval_").removesuffix("_mean")
            if key.startswith("eval_") and (key.endswith("_mean") or name in ("loss", "accuracy", "margin")):
                evaluated.append(f"{name} {value:.4g}")
        return parts + (["evaluation:", *evaluated] if evaluated else [])

    def _speed(self, args, state, logs: dict[str, float]) -> str:
        """Pairs per second since the last line."""
        before, step, pairs_before = self._last
        now = time.perf_counter()
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        pairs = (state.global_step - step) * per_step
        seen = logs.get("num_pairs_seen")
        if seen is not None and pairs_before is not None:
            pairs = seen - pairs_before
        self._last = (now, state.global_step, seen)
        return f"{pairs / max(now - before, 1e-9):.3g} pairs/s"


def log_in_lines(trainer: Trainer, columns: Sequence[Column], title: str = "") -> None:
    """Replace what transformers prints per log by [`LogLineCallback`]."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(LogLineCallback(columns, title, bar=not trainer.args.disable_tqdm))
