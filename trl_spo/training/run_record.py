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
Which run a checkpoint belongs to, and with which settings each part of it was trained.

A run begins with `train()` and goes on when it is resumed. Its record stands in every checkpoint, in the JSON file of the
trainer's own state, so that `last` never means a checkpoint of another run, changed settings are noticed, and the model card
tells what happened. A folder with checkpoints of several runs says in a file of its own which of them trained last.
"""

import dataclasses
import json
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from .arguments import StepTrainingArguments, without_secrets


RECORD_KEY = "run"  # in the state file of a checkpoint
UNKNOWN_RUN = "unknown"  # of checkpoints of old versions
FOLDER_RECORD_NAME = "_last_run.json"  # the underscore keeps it from the Hub
# Of `TrainingArguments`: what changes what is learnt. All fields that a config adds count, but for those below.
SETTINGS_OF_TRAINING = (
    "learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm per_device_train_batch_size "
    "gradient_accumulation_steps world_size bf16 fp16 seed"
).split()
# These say how long, how fast, where, or what is shown.
SETTINGS_WITHOUT_EFFECT = frozenset(
    "num_train_epochs max_steps logging_steps remove_unused_columns logging_nan_inf_filter rollout_micro_batch_size "
    "vae_decode_batch_size reward_batch_size memory_budget defer_scoring compile_regions channels_last "
    "offload_text_encoders model_init_kwargs num_eval_images log_images_steps eval_seed prediction_batch_size "
    "dataset_prompt_column dataset_streaming num_checked_rows max_bad_image_fraction max_nonfinite_fraction "
    "cache_latents cache_latents_gb accuracy_timestep_bins eval_timesteps overwrite_output_dir activation_checkpointing".split()
)
# The state of optimizer and schedule brings them along, so another value in the config changes nothing.
SETTINGS_OF_OPTIMIZER = ("learning_rate", "weight_decay")


@dataclass
class RunRecord:
    """
    The identity of a run and its history.

    Attributes:
        run_id (`str`): what tells the run from others.
        started (`str`): local time, to the second.
        parts (`list[dict]`): `{"first_step": int, "settings": dict}` for each part with settings of its own; steps count
            from 1. What an old checkpoint does not tell is an empty dictionary.
    """

    run_id: str
    started: str
    parts: list[dict] = field(default_factory=list)

    @classmethod
    def new(cls, settings: dict[str, Any]) -> "RunRecord":
        """The record of a run that begins."""
        started = datetime.now().isoformat(sep=" ", timespec="seconds")
        return cls(uuid.uuid4().hex, started, [{"first_step": 1, "settings": settings}])

    @classmethod
    def without_history(cls) -> "RunRecord":
        """The record of a run whose checkpoints are of an old version and tell nothing."""
        return cls(UNKNOWN_RUN, "unknown", [{"first_step": 1, "settings": {}}])

    def go_on(self, step: int, settings: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """
        The run goes on after `step` steps with `settings`.

        Returns:
            `dict[str, tuple]`: the settings that changed, with old and new value.
        """
        self.parts = [part for part in self.parts if part["first_step"] <= step] or self.parts[:1]
        before = self.parts[-1]["settings"]
        changed = {}
        for name, value in settings.items():
            if name in before and before[name] != value:
                changed[name] = (before[name], value)
        now = {**settings, **{name: before[name] for name in SETTINGS_OF_OPTIMIZER if name in before}}
        if now != before:
            self.parts.append({"first_step": step + 1, "settings": now})
        return changed

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_record(path: str | Path) -> RunRecord | None:
    """The record in a JSON file, one without history if it is of an old version, or `None` if the file cannot be read."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return RunRecord(**content[RECORD_KEY]) if RECORD_KEY in content else RunRecord.without_history()
    except (OSError, ValueError, TypeError):
        return None


def settings_of(config: StepTrainingArguments) -> dict[str, Any]:
    """The settings that change what is learnt, as JSON keeps them and without secrets."""
    inherited = {f.name for f in dataclasses.fields(StepTrainingArguments)}
    own = [f.name for f in dataclasses.fields(config) if f.name not in inherited]
    names = [name for name in (*SETTINGS_OF_TRAINING, *own) if name not in SETTINGS_WITHOUT_EFFECT]
    settings = {name: without_secrets(getattr(config, name), name) for name in names}
    return json.loads(json.dumps(settings, default=str))


def describe_changes(changed: dict[str, tuple[Any, Any]]) -> str:
    """One or two sentences about settings that differ from those of the checkpoint."""
    taken = [
        f"{name}: {old!r} -> {new!r}" for name, (old, new) in changed.items() if name not in SETTINGS_OF_OPTIMIZER
    ]
    kept = [f"{name} {old!r}" for name, (old, _) in changed.items() if name in SETTINGS_OF_OPTIMIZER]
    text = ""
    if taken:
        text += f" Other settings from here on, as the model card will say: {'; '.join(taken)}."
    if kept:
        text += f" The optimizer of the checkpoint keeps its {' and '.join(kept)}, whatever the config says."
    return text.strip()
