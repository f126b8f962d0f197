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
Kills training runs at stated points, resumes them in new processes, and compares every bit with a run that never
stopped.

Each point is a process that sends itself SIGKILL there: in the rollout, in forward and backward pass, in the optimizer
step, with half the bytes of a checkpoint file on the disk, between files, around the rename, while old checkpoints are
deleted, in the final save. A new process then resumes from the last complete checkpoint, or from the start if there is
none, runs to the end, and is compared with an uninterrupted run: weights, optimizer, scheduler, random states, waiting
pairs, position, metrics, log history (without times), and what is in the files.

    python reliability/kill_matrix.py                    # all points, a table, exit status 0 only if all are equal
    python reliability/kill_matrix.py --quick            # six of them
    python reliability/kill_matrix.py --points NAME ...  # those whose names begin so
    python reliability/kill_matrix.py --json matrix.json

Processes are forked from one that has imported the libraries and built the tiny networks.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


for _name, _value in {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}.items():
    os.environ.setdefault(_name, _value)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from datasets import Dataset  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402
from peft import LoraConfig  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainerState  # noqa: E402

from tests.testing_utils import PROMPTS, brightness_reward, tiny_clip, tiny_sd_pipeline  # noqa: E402
from trl_spo import (  # noqa: E402  # noqa: E402
    EMACallback,
    SPOConfig,
    SPOTrainer,
    StepAwareRewardModel,
    StepRewardConfig,
    StepRewardTrainer,
    rollout,
    spo_trainer,
)
from trl_spo.training import checkpointing  # noqa: E402
from trl_spo.training.checkpointing import STAGING_NAME, last_checkpoint  # noqa: E402


# Seconds and what follows from them; the summary at the end counts the steps of its own call only.
TIMES = ("time/", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "train_")
SECONDS_PER_PROCESS = 120


# --- the runs --------------------------------------------------------------------------------------------------------


class Draws(TrainerCallback):
    """Uses the three global random states once per step, as users' callbacks and data augmentation do."""

    def on_step_end(self, args, state, control, **kwargs):
        random.random(), np.random.rand(), torch.rand(())


class World:
    """The networks and images, built once; every forked process has its own copy of them."""

    def __init__(self, folder: Path):
        self.pipeline = tiny_sd_pipeline(folder)
        torch.manual_seed(0)
        self.reward_model = StepAwareRewardModel.from_clip(tiny_clip(folder))
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for i in range(7):
            red, blue = (int(x) for x in torch.randint(100, 256, (2,), generator=generator))
            images = [Image.new("RGB", (16, 16), color) for color in ((red, 40, 0), (0, 40, blue))]
            self.rows.append(
                {
                    "prompt": PROMPTS[i % len(PROMPTS)],
                    "chosen": images[i % 2],
                    "rejected": images[1 - i % 2],
                }
            )

    def stream(self):
        dataset = Dataset.from_list(self.rows).to_iterable_dataset()
        return dataset.shuffle(seed=0, buffer_size=4)

    def spo(self, **settings) -> SPOTrainer:
        """K = 4, two micro-batches a step, pairs left over; dropout and metrics over two steps, so that both matter."""
        settings = {
            "num_candidates": 4, "num_inference_steps": 4, "branch_start_step": 1, "guidance_scale": 3.0,
            "preference_threshold": 0.0, "per_device_rollout_batch_size": 2, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2, "max_steps": 6, "logging_steps": 3, "eval_strategy": "steps",
            "eval_steps": 3, "learning_rate": 1e-3, "lr_scheduler_type": "linear", "disable_dropout": False, **settings,
        }  # fmt: skip
        return SPOTrainer(
            SPOConfig(**settings),
            self.pipeline,
            lambda images, prompts, timesteps: brightness_reward(images, prompts, timesteps),
            train_dataset=PROMPTS,
            eval_dataset=PROMPTS[:2],
            peft_config=LoraConfig(r=4, lora_dropout=0.1, target_modules=["to_k", "to_q", "to_v", "to_out.0"]),
            callbacks=[Draws()],
        )

    def spo_epochs(self, **settings) -> SPOTrainer:
        """Two epochs of unknown length, a moving average, and the best checkpoint kept."""
        best = {"load_best_model_at_end": True, "metric_for_best_model": "reward_mean", "eval_steps": 2}
        settings = {"max_steps": -1, "num_train_epochs": 2, "lr_scheduler_type": "constant", **best, **settings}
        trainer = self.spo(per_device_train_batch_size=3, **settings)
        EMACallback(trainer, decay=0.9)
        return trainer

    def reward(self, dataset=None, **settings) -> StepRewardTrainer:
        """Logs every third step and saves every second: the loss and metrics in between must not be lost."""
        settings = {
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6, "warmup_steps": 0,
            "learning_rate": 1e-3, "resolution": 16, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 3,
            "cache_latents": True, "eval_timesteps": [1, 501], "lr_scheduler_type": "linear", **settings,
        }  # fmt: skip
        return StepRewardTrainer(
            StepRewardConfig(**settings),
            self.pipeline,
            self.reward_model,
            train_dataset=self.rows if dataset is None else dataset,
            eval_dataset=self.rows[:3],
            callbacks=[Draws()],
        )

    def reward_stream(self, **settings) -> StepRewardTrainer:
        """A shuffled stream that is read three times; a pass ends within an optimizer step."""
        return self.reward(self.stream(), per_device_train_batch_size=3, **settings)

    def trainer(self, run: str, output_dir: Path, **settings):
        common = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "optim": "adamw_torch"}
        common |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "output_dir": str(output_dir)}
        return getattr(self, run.replace("-", "_"))(**{**common, **settings})


# --- what is compared ------------------------------------------------------------------------------------------------


def digest(value) -> str:
    """A hash of nested containers, numbers and every bit of tensors."""
    sha = hashlib.sha256()

    def add(item):
        if torch.is_tensor(item):
            sha.update(f"{item.dtype}{tuple(item.shape)}".encode())
            sha.update(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(item, np.ndarray):
            sha.update(f"{item.dtype}{item.shape}".encode() + item.tobytes())
        elif isinstance(item, dict):
            for key in sorted(item, key=str):
                sha.update(f"key {key}".encode())
                add(item[key])
        elif isinstance(item, (list, tuple)):
            sha.update(f"list {len(item)}".encode())
            for part in item:
                add(part)
        else:
            sha.update(repr(item).encode())

    add(value)
    return sha.hexdigest()[:16]


def without_times(logs):
    """Log entries without seconds; sums of metrics in a state file alike. Two runs have two identities, too."""
    if isinstance(logs, dict):
        return {k: without_times(v) for k, v in logs.items() if not k.startswith((*TIMES, "run_id", "started"))}
    return [without_times(entry) for entry in logs] if isinstance(logs, list) else logs


def files_of(folder: Path, output_dir: Path) -> dict[str, str]:
    """What is in the files: tensors, and JSON without times. Of other files that they are there."""
    content = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(output_dir).as_posix()
        if path.suffix == ".safetensors":
            content[name] = digest(safetensors.torch.load_file(path))
        elif path.suffix in (".pt", ".pth"):
            with torch.serialization.safe_globals(_numpy_globals()):
                content[name] = digest(torch.load(path, weights_only=True))
        elif path.suffix == ".json":
            values = without_times(json.loads(path.read_text()))
            if path.name == "tokenizer.json":  # says how it was last used, and a finished run does not use it again
                values = {k: v for k, v in values.items() if k not in ("padding", "truncation")}
            content[name] = digest(json.loads(json.dumps(values).replace(str(output_dir), "")))
        else:
            content[name] = "exists"
    return content


def _numpy_globals() -> list:
    core = np._core if hasattr(np, "_core") else np.core
    return [core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


def snapshot(trainer, output_dir: Path) -> dict[str, str]:
    """All that makes a run, after its end."""
    state = trainer.state
    parts = {
        "weights": {k: v for k, v in trainer.model.named_parameters() if v.requires_grad},
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "rng: torch": torch.get_rng_state(),
        "rng: numpy": np.random.get_state(),
        "rng: python": random.getstate(),
        "log history": without_times(state.log_history),
        "trainer state": [state.global_step, state.epoch, state.total_flos, state.best_metric, state.best_global_step],
        "best checkpoint": Path(state.best_model_checkpoint or "").name,
    }
    if isinstance(trainer, SPOTrainer):
        loader = trainer.pair_loader
        parts["position"] = [loader.num_prompts_seen, loader.num_pairs_seen]
        parts["pairs"] = loader.queue.state_dict()
    else:
        parts["position"] = [trainer._position.epoch, trainer._position.first_step]
    result = {name: digest(value) for name, value in parts.items()}
    # Another run may have kept other checkpoints beside the last.
    last = Path(last_checkpoint(output_dir, trainer.checkpoint_files))
    others = {path.name for path in output_dir.glob("checkpoint-*")} - {last.name}
    for name, value in files_of(output_dir, output_dir).items():
        if name.split("/")[0] not in others:
            result[f"file {name}"] = value
    return result


# --- where a run is killed -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """The `nth` time `method` of `owner` is called: before it, after it, or with half of the file it wrote left."""

    owner: Callable
    method: str
    nth: int = 1
    when: str = "before"
    file: str | None = None  # of calls that write files or rename: only those whose path ends so
    how: str = "kill"

    def install(self):
        owner, count = self.owner(), 0
        original = getattr(owner, self.method)

        def wrapped(*args, **kwargs):
            nonlocal count
            paths = [str(a) for a in (*args, *kwargs.values()) if isinstance(a, (str, Path))]
            if self.file is not None and not any(path.endswith(self.file) for path in paths):
                return original(*args, **kwargs)
            count += 1
            if count != self.nth:
                return original(*args, **kwargs)
            if self.when == "before":
                die(self.how)
            if self.when == "half-step":
                halve_gradients(args[0])
            if self.when == "half-deleted":
                remove_half(Path(args[0]))
            result = original(*args, **kwargs) if self.when != "half-deleted" else None
            if self.when == "half":
                (path,) = (Path(p) for p in paths if self.file is not None and p.endswith(self.file))
                os.truncate(path, path.stat().st_size // 2)
            die(self.how)
            return result

        setattr(owner, self.method, wrapped)


def die(how: str):
    if how == "interrupt":
        raise KeyboardInterrupt
    os.kill(os.getpid(), signal.SIGTERM if how == "terminate" else signal.SIGKILL)
    time.sleep(10)


def halve_gradients(optimizer: torch.optim.Optimizer):
    """What an optimizer that was stopped in the middle would have updated."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters[len(parameters) // 2 :]:
        parameter.grad = None


def remove_half(folder: Path):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files[: len(files) // 2]:
        path.unlink()


def kill_in_backward(nth: int) -> Kill:
    return Kill(lambda: _ParameterHooks, "start", nth, "before")


class _ParameterHooks:
    @staticmethod
    def start():
        """Called when the gradient of the middle trained weight is computed."""


def watch_gradients(trainer):
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    parameters[len(parameters) // 2].register_hook(lambda gradient: _ParameterHooks.start())


@dataclass(frozen=True)
class Point:
    """One row of the table: processes that are killed one after the other, and the run they belong to."""

    name: str
    run: str
    kills: tuple[Kill, ...]
    settings: dict = field(default_factory=dict)
    resume: tuple = ()  # of the processes after the first: a folder's name instead of the last complete checkpoint
    damage: str | None = None  # a file of the newest checkpoint that is cut in half before the resume
    expected: int | None = None  # the step to resume from, where it is not plain


SPO, REWARD = lambda: SPOTrainer, lambda: StepRewardTrainer
MODULE, OS, SHUTIL, TORCH = lambda: checkpointing, lambda: os, lambda: shutil, lambda: torch
TENSORS, STATE, TEXT = lambda: safetensors.torch, lambda: TrainerState, lambda: Path
LOADER, BRANCH, ADAMW = lambda: spo_trainer.PairLoader, lambda: rollout, lambda: torch.optim.AdamW
SCHEDULE = lambda: torch.optim.lr_scheduler.LambdaLR  # noqa: E731
LORA, PAIRS = "pytorch_lora_weights.safetensors", "spo_pairs.safetensors"


def points() -> list[Point]:
    spo, reward = [], []

    def add(name, *kills, run="spo", **options):
        (spo if run.startswith("spo") else reward).append(Point(name, run, kills, **options))

    # the rollout: three branches each, four rollouts before step 6
    add("rollout: first branch of the first", Kill(BRANCH, "Branch", 1))
    add("rollout: middle branch of the third", Kill(BRANCH, "Branch", 8))
    add("rollout: last branch of the third", Kill(BRANCH, "Branch", 9, "after"))
    add("rollout: scoring", Kill(lambda: rollout.Scorer, "_score", 3))
    add("rollout: decoding", Kill(lambda: rollout.Scorer, "_decode", 3, "after"))
    add("rollout: pairs not yet in the pool", Kill(lambda: rollout.StepPairs, "cat", 3))
    add("between rollout and training", Kill(LOADER, "_rollout_round", 3, "after"))
    # an optimizer step
    add("forward pass", Kill(lambda: UNet2DConditionModel, "forward", 40))
    add("loss, second micro-batch of step 5", Kill(SPO, "compute_loss", 10, "after"))
    add("backward pass, step 4", kill_in_backward(8))
    add("after the backward pass, step 5", Kill(lambda: Accelerator, "backward", 10, "after"))
    add("gradient clipping, step 5", Kill(lambda: Accelerator, "clip_grad_norm_", 5, "after"))
    add("before the optimizer step 3", Kill(ADAMW, "step", 3))
    add("half the weights updated, step 3", Kill(ADAMW, "step", 3, "half-step"))
    add("after the optimizer step 5", Kill(ADAMW, "step", 5, "after"))
    add("before the scheduler step 3", Kill(SCHEDULE, "step", 4))
    add("after the scheduler step 4", Kill(SCHEDULE, "step", 5, "after"))
    add("before the log of step 3", Kill(SPO, "log", 1))
    add("after the log of step 3", Kill(SPO, "log", 1, "after"))
    add("evaluation: sampling", Kill(SPO, "generate", 1))
    add("evaluation: after scoring", Kill(SPO, "score", 1, "after"))
    # while a checkpoint is written
    add("before the first checkpoint", Kill(SPO, "_save_checkpoint", 1))
    add("checkpoint 2, half of the weights", Kill(TENSORS, "serialize_file", 1, "half", LORA))
    for name, owner, method, file in (
        ("the weights", TENSORS, "serialize_file", LORA),
        ("README.md", TEXT, "write_text", "README.md"),
        ("optimizer.pt", TORCH, "save", "optimizer.pt"),
        ("scheduler.pt", TORCH, "save", "scheduler.pt"),
        ("rng_state.pth", TORCH, "save", "rng_state.pth"),
        ("trainer_state.json", STATE, "save_to_json", "trainer_state.json"),
        ("spo_pairs", TENSORS, "serialize_file", PAIRS),
        ("spo_state.json", TEXT, "write_text", "spo_state.json"),
    ):
        # The state of the trainer is written twice into a checkpoint: the second time with the name of the best one.
        nth = 4 if file == "trainer_state.json" else 2
        add(f"checkpoint 4, half of {name}", Kill(owner, method, nth, "half", file))
        add(f"checkpoint 4, after {name}", Kill(owner, method, nth, "after", file))
    add("checkpoint 4, before fsync", Kill(MODULE, "sync_folder", 2))
    add("checkpoint 4, after fsync", Kill(MODULE, "sync_folder", 2, "after"))
    add("checkpoint 2, before the rename", Kill(OS, "rename", 1, file="checkpoint-2"))
    add("checkpoint 4, before the rename", Kill(OS, "rename", 1, file="/checkpoint-4"), expected=2)
    add("checkpoint 4, after the rename", Kill(OS, "rename", 1, "after", "/checkpoint-4"), expected=4)
    add("checkpoint 6, after the rename", Kill(OS, "rename", 1, "after", "/checkpoint-6"), expected=6)
    add("rotation: before", Kill(MODULE, "rotate", 2), expected=4)
    add("rotation: old one has no name any more", Kill(OS, "rename", 1, "after", "deleted-checkpoint-2"), expected=4)
    add("rotation: half deleted", Kill(SHUTIL, "rmtree", 7, "half-deleted"), expected=4)
    add("after the checkpoint 4", Kill(SPO, "_save_checkpoint", 2, "after"), expected=4)
    # the end
    add("final save: half of the weights", Kill(TENSORS, "serialize_file", 4, "half", LORA), expected=6)
    add("final save: before the files are moved", Kill(MODULE, "move_files", 1), expected=6)
    add("final save: between two files", Kill(OS, "replace", 1, "after", f"model/{LORA}"), expected=6)
    # more than once, and again in the same folder
    add(
        "twice: writing checkpoint 4, and again after the resume",
        Kill(TORCH, "save", 2, "half", "optimizer.pt"),
        Kill(TENSORS, "serialize_file", 1, "half", LORA),
        expected=2,
    )
    add(
        "three times: rollout, optimizer step, rename",
        Kill(BRANCH, "Branch", 8),
        Kill(ADAMW, "step", 2, "half-step"),
        Kill(OS, "rename", 1, "after", "/checkpoint-4"),
        expected=4,
    )
    replaced = {"settings": {"save_total_limit": 5}, "resume": ("checkpoint-2",), "expected": 4}
    add(
        "written again: checkpoint 4 has no name",
        Kill(SPO, "_save_checkpoint", 2, "after"),
        Kill(OS, "rename", 1, "after", "replaced-checkpoint-4"),
        **replaced,
    )
    add(
        "written again: the old checkpoint 4 not deleted",
        Kill(SPO, "_save_checkpoint", 2, "after"),
        Kill(OS, "rename", 1, "after", "/checkpoint-4"),
        **replaced,
    )
    # other ways to end
    add("SIGTERM in the loss of step 3", Kill(SPO, "compute_loss", 6, how="terminate"))
    add("SIGTERM while checkpoint 4 is written", Kill(TORCH, "save", 2, "half", "optimizer.pt", how="terminate"))
    add("KeyboardInterrupt in the rollout", Kill(BRANCH, "Branch", 8, how="interrupt"))
    add("KeyboardInterrupt in checkpoint 4", Kill(TORCH, "save", 2, "half", "optimizer.pt", how="interrupt"))
    # files that were damaged later
    for file in (LORA, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", PAIRS, "spo_state.json"):
        add(
            f"checkpoint 4 with half of {file}",
            Kill(SPO, "_save_checkpoint", 2, "after"),
            settings={"save_total_limit": 2},
            damage=file,
            expected=2,
        )
    # epochs of unknown length, a moving average, the best checkpoint
    epochs = {"run": "spo-epochs"}
    add("epochs: second rollout", Kill(LOADER, "_rollout_round", 2, "after"), **epochs)
    add("epochs: loss of step 3", Kill(SPO, "compute_loss", 6), **epochs)
    add(
        "epochs: half of the average",
        Kill(TENSORS, "serialize_file", 2, "half", "ema_training_weights.safetensors"),
        **epochs,
    )
    add(
        "epochs: after the average",
        Kill(TENSORS, "serialize_file", 2, "after", "ema_training_weights.safetensors"),
        **epochs,
    )
    add("epochs: rotation beside the best", Kill(MODULE, "rotate", 2, "after"), **epochs)
    add("epochs: loading the best", Kill(SPO, "_load_best_model", 1), **epochs)
    # the reward model
    for run in ("reward", "reward-stream"):
        options = {"run": run}
        add(f"{run}: loss of step 1", Kill(REWARD, "compute_loss", 2), **options)
        add(f"{run}: backward pass, step 3", kill_in_backward(6), **options)
        add(f"{run}: half the weights updated, step 4", Kill(ADAMW, "step", 4, "half-step"), **options)
        add(f"{run}: before the log of step 3", Kill(REWARD, "log", 1), **options)
        add(f"{run}: evaluation", Kill(REWARD, "prediction_step", 1, "after"), **options)
        add(
            f"{run}: checkpoint 4, half of the weights",
            Kill(TENSORS, "serialize_file", 2, "half", "model.safetensors"),
            **options,
        )
        add(f"{run}: checkpoint 4, half of optimizer.pt", Kill(TORCH, "save", 2, "half", "optimizer.pt"), **options)
        add(
            f"{run}: checkpoint 4, half of its state",
            Kill(TEXT, "write_text", 2, "half", "step_reward_state.json"),
            **options,
        )
        add(f"{run}: checkpoint 4, before the rename", Kill(OS, "rename", 1, file="/checkpoint-4"), **options)
        add(f"{run}: checkpoint 4, rotation half done", Kill(SHUTIL, "rmtree", 7, "half-deleted"), **options)
        # a pass over the stream is three batches: each step is followed by one that waits for the next pass
        first_of_five = 9 if run == "reward" else 13
        add(f"{run}: loss of step 5", Kill(REWARD, "compute_loss", first_of_five), expected=4, **options)
        add(
            f"{run}: final save, half of the weights",
            Kill(TENSORS, "serialize_file", 4, "half", "model.safetensors"),
            **options,
        )
    add(
        "reward: twice, loss of steps 3 and 5",
        Kill(REWARD, "compute_loss", 5),
        Kill(REWARD, "compute_loss", 6),
        run="reward",
        expected=4,
    )
    if not hasattr(Trainer, "_init_training_state"):  # transformers 4 resumes streams in their first pass only
        reward = [point for point in reward if point.run != "reward-stream"]
    return spo + reward


QUICK = (
    "rollout: middle branch of the third",
    "half the weights updated, step 3",
    "checkpoint 4, half of optimizer.pt",
    "rotation: half deleted",
    "twice: writing checkpoint 4, and again after the resume",
    "reward: loss of step 5",
)


# --- processes -------------------------------------------------------------------------------------------------------


def in_process(function: Callable, log: Path) -> int:
    """Run a function in a forked process, its output in a file; returns how it ended, as `os.waitpid` says."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            signal.alarm(SECONDS_PER_PROCESS)
            function()
            status = 0
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train(world: World, point: Point | None, run: str, output_dir: Path, kill: Kill | None, resume, result: Path):
    if kill is not None:
        kill.install()
    settings = {} if point is None else point.settings
    trainer = world.trainer(run, output_dir, **settings)
    watch_gradients(trainer)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    result.write_text(json.dumps(snapshot(trainer, output_dir)))


ENDS = {"kill": -signal.SIGKILL, "terminate": -signal.SIGTERM, "interrupt": 130}


def try_point(world: World, point: Point, reference: dict[str, str], folder: Path) -> dict:
    """Kill, resume, compare."""
    start, output_dir, log, result = time.time(), folder / "run", folder / "log.txt", folder / "result.json"
    row = {"point": point.name, "run": point.run, "killed": len(point.kills), "equal": False}

    files = (SPOTrainer if point.run.startswith("spo") else StepRewardTrainer).checkpoint_files

    def last():
        found = last_checkpoint(output_dir, files) if output_dir.is_dir() else None
        return found, int(Path(found).name.split("-")[1]) if found else None

    # Train and kill, as often as the point says; each process resumes from what the one before left.
    for number, kill in enumerate(point.kills):
        named = point.resume[number - 1] if 0 < number <= len(point.resume) else None
        found = str(output_dir / named) if named else (last()[0] is not None)
        resume = found if number > 0 else None
        code = in_process(lambda k=kill, r=resume: train(world, point, point.run, output_dir, k, r, result), log)
        if code != ENDS[kill.how]:
            return {**row, "resumed": None, "problem": f"process {number + 1} ended with {code}: {_end_of(log)}"}
    if point.damage is not None:
        file = Path(last()[0]) / point.damage
        os.truncate(file, file.stat().st_size // 2)

    # Resume to the end.
    found, step = last()
    row["resumed"] = step
    code = in_process(lambda: train(world, point, point.run, output_dir, None, found is not None, result), log)
    row["seconds"] = round(time.time() - start, 1)
    if code != 0:
        return {**row, "problem": f"the resumed process ended with {code}: {_end_of(log)}"}

    # Compare with the run that was never killed.
    got = json.loads(result.read_text())
    different = sorted(name for name in reference.keys() | got.keys() if reference.get(name) != got.get(name))
    if point.expected is not None and step != point.expected:
        different.insert(0, f"resumed from {step} instead of {point.expected}")
    if (output_dir / STAGING_NAME).exists():
        different.insert(0, f"{STAGING_NAME} is left")
    row["equal"] = not different
    if different:
        row["problem"] = "different: " + ", ".join(different[:6]) + (" ..." if len(different) > 6 else "")
    return row


def _end_of(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return " | ".join(lines[-3:])[-300:]


def work(world: World, share: list, references: dict, temporary: Path, width: int, result: Path):
    """Try a share of the points and print their rows."""
    rows = []
    for number, point in share:
        folder = temporary / f"point-{number}"
        folder.mkdir()
        row = try_point(world, point, references[point.run], folder)
        shutil.rmtree(folder)
        rows.append((number, row))
        step = "the start" if row["resumed"] is None else f"step {row['resumed']}"
        equal = "yes" if row["equal"] else "NO"
        line = f"{point.name:{width}}  {row['killed']:6}  {step:>12}  {equal:>5}  {row.get('seconds', 0):7.1f}"
        print(line + (f"\n    {row['problem']}" if "problem" in row else ""), flush=True)
    result.write_text(json.dumps(rows))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--points", nargs="+", metavar="NAME", help="points whose names begin so")
    parser.add_argument("--quick", action="store_true", help="six points")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table there as well")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="points at a time")
    parser.add_argument("--list", action="store_true", help="names of all points")
    options = parser.parse_args(arguments)

    # Choose the points.
    chosen = points()
    if options.quick:
        chosen = [point for point in chosen if point.name in QUICK]
    if options.points:
        chosen = [point for point in chosen if point.name.startswith(tuple(options.points))]
    if options.list or not chosen:
        print("\n".join(point.name for point in points()))
        return 0 if options.list else 2

    # A method that was renamed is found here, whichever points were chosen, and not after minutes.
    hooks = {(kill.owner(), kill.method) for point in points() for kill in point.kills}
    gone = sorted(f"{owner.__name__}.{method}" for owner, method in hooks if not hasattr(owner, method))
    if gone:
        print(f"Points name functions that do not exist: {', '.join(gone)}.")
        return 2

    # First the uninterrupted runs, then the points, in several processes.
    torch.set_num_threads(1)
    start = time.time()
    with tempfile.TemporaryDirectory() as temporary:
        world, references = World(Path(temporary)), {}
        for run in dict.fromkeys(point.run for point in chosen):
            folder = Path(temporary) / f"reference-{run}"
            folder.mkdir()
            result, log = folder / "result.json", folder / "log.txt"
            code = in_process(lambda f=folder, r=result, n=run: train(world, None, n, f / "run", None, None, r), log)
            if code != 0:
                print(f"The uninterrupted run {run!r} ended with {code}: {_end_of(log)}")
                return 1
            references[run] = json.loads(result.read_text())
        width = max(len(point.name) for point in chosen)
        print(f"{'point':{width}}  killed  resumed from  equal  seconds", flush=True)
        shares = [list(enumerate(chosen))[job :: options.jobs] for job in range(options.jobs)]
        workers = []
        for job, share in enumerate(shares):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    work(world, share, references, Path(temporary), width, Path(temporary) / f"rows-{job}.json")
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(status)
            workers.append(pid)
        for pid in workers:
            os.waitpid(pid, 0)
        numbered = [row for path in Path(temporary).glob("rows-*.json") for row in json.loads(path.read_text())]

    # The summary, and the table as JSON.
    rows = [row for _, row in sorted(numbered, key=lambda item: item[0])]
    compared = {run: len(values) for run, values in references.items()}
    equal = sum(row["equal"] for row in rows)
    print(f"{equal} of {len(chosen)} points: the resumed run equals the uninterrupted one bit for bit", end=" ")
    print(
        f"({', '.join(f'{count} values of {run}' for run, count in compared.items())}; {time.time() - start:.0f} s)."
    )
    if options.json:
        options.json.write_text(json.dumps({"points": rows, "compared": compared}, indent=1) + "\n")
    return 0 if equal == len(rows) == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
