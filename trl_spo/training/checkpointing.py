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
Write checkpoints that are complete or do not exist at all, and choose the one to resume from.

`transformers.Trainer` writes a checkpoint into its final folder, deletes older ones, and only then tells callbacks. A
process that dies meanwhile leaves a folder that looks like the newest checkpoint, with `save_total_limit=1` the only
one. Here a checkpoint is written aside, flushed to the disk, and renamed, before anything older is touched.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers.trainer import safe_globals
from transformers.utils import logging

from .run_record import (
    FOLDER_RECORD_NAME,
    RECORD_KEY,
    RunRecord,
    describe_changes,
    read_record,
    settings_of,
)
from .sharded_optimizer import SHARDS_NAME, missing_shards
from .stopping import StopOnSignalCallback, stop_signal


logger = logging.get_logger(__name__)

STAGING_NAME = "_saving"  # pushes to the Hub leave out what begins with an underscore
TRAINER_STATE_NAME = "trainer_state.json"
# Files that are unpickled when a run resumes.
STATE_NAME = re.compile(r"(optimizer|scheduler|scaler|rng_state|pytorch_model)[\w-]*\.(pt|pth|bin)")
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
TORCH_WRITERS = ("inline_container", "PytorchStreamWriter", "basic_ios")  # what torch's errors of writing name
# Prefixes of checkpoints that are being replaced or deleted.
REPLACED = "replaced-"
DELETED = "deleted-"


@dataclass(frozen=True)
class CheckpointFiles:
    """
    What checkpoints of a trainer have, besides what `transformers.Trainer` writes in every checkpoint.

    Attributes:
        weights (`tuple[str]`): glob patterns of files that its `_write_model` writes; one of them must match.
        state (`tuple[str]`): names of files that its `_write_state` writes and its `_read_state` cannot do without.
        foreign (`tuple[str]`): names of files that tell the checkpoint of another trainer.
        record (`str`): name of the JSON file that its `_write_state` writes; it also gets the [`RunRecord`].
    """

    weights: tuple[str, ...] = ("model.safetensors", "model.safetensors.index.json", "pytorch_model*")
    state: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    record: str = ""


def check_output_dir(output_dir: str | Path, create: bool = True):
    """
    Check that the folder of a run can be written to, before any work is done.

    Args:
        output_dir (`str` or `Path`): the folder.
        create (`bool`, *optional*, defaults to `True`): make the folder; otherwise check the one in which it would be made.

    Raises:
        OSError: if it cannot, with the reason; it may be a subclass such as `PermissionError` or `NotADirectoryError`.
    """
    output_dir = Path(output_dir)
    asked = output_dir
    while not create and not asked.exists() and asked != asked.parent:
        asked = asked.parent
    try:
        asked.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=asked) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        raise type(error)(
            error.errno,
            f"Nothing can be written to `output_dir` ({error.strerror or error}). Choose another folder, or give this "
            "process the right to write and some free space",
            str(output_dir),
        ) from error


# --- whole or not at all ---------------------------------------------------------------------------------------------


def _sync(path: Path):
    """Wait until a file, or the entries of a folder, are on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # Windows opens no folders
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot flush a folder by itself
            raise
    finally:
        os.close(descriptor)


def resume_from(config: Any) -> str | bool | None:
    """`config.resume_from_checkpoint` as `Trainer.train` takes it: on the command line `true`, `last` and `false` are words."""
    value = config.resume_from_checkpoint
    word = str(value).lower()
    if word in ("true", "last"):
        return True
    return None if word in ("false", "none") else value


def restarts() -> int:
    """
    How often the launcher has started the processes of this run anew, after one of them had died (`--max_restarts`). Every process
    must call it: of several launchers only that of the process that died counts.
    """
    own = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return max(gather_object([own]))


def sync_folder(folder: str | Path):
    """Wait until everything in a folder is on the disk."""
    folder = Path(folder)
    for path in sorted(folder.rglob("*"), reverse=True):  # a file before the folder it is in
        _sync(path)
    _sync(folder)


def write_text(path: str | Path, text: str):
    """Write a text file that a reader, or a process that dies, sees whole or not at all."""
    path = Path(path)
    aside = path.with_name(f"_{path.name}")
    aside.write_text(text, encoding="utf-8")
    _sync(aside)
    os.replace(aside, path)


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG file that a reader, or a process that dies, sees whole or not at all."""
    aside = path.with_name(f"_{path.name}")
    picture.save(aside, format="PNG")
    _sync(aside)
    os.replace(aside, path)


def move_files(source: str | Path, target: str | Path):
    """Move the files of a folder, one by one, over those of the same name in another; `source` is removed."""
    source = Path(source)
    target = Path(target)
    sync_folder(source)
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    _sync(target)
    shutil.rmtree(source)


def repair(output_dir: str | Path):
    """Bring back a checkpoint that was being replaced by one of the same step when the process died."""
    output_dir = Path(output_dir)
    for old in sorted((output_dir / STAGING_NAME).glob(f"{REPLACED}checkpoint-*")):
        name = old.name.removeprefix(REPLACED)
        if not (output_dir / name).exists():
            new = old.with_name(name)  # it was complete before the old one was moved
            with contextlib.suppress(FileNotFoundError):  # another process did it
                os.rename(new if new.is_dir() else old, output_dir / name)


def clear_staging(output_dir: str | Path):
    """Remove what processes that died have left behind, after [`repair`]."""
    repair(output_dir)
    shutil.rmtree(Path(output_dir) / STAGING_NAME, ignore_errors=True)


def publish(staged: str | Path, final: str | Path):
    """Give a finished checkpoint its name. One that has the name already is moved aside and then deleted."""
    staged = Path(staged)
    final = Path(final)
    if final.is_dir() and not staged.is_dir():  # `save_on_each_node` on a disk that the nodes share
        return
    sync_folder(staged)
    if final.exists():
        os.rename(final, staged.with_name(f"{REPLACED}{final.name}"))
    os.rename(staged, final)
    _sync(final.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)


def rotate(output_dir: str | Path, limit: int | None, newest: str | Path, best: str | Path | None = None):
    """
    Delete the oldest checkpoints until `limit` are left; never `newest`, the one just written, and never `best`.

    A checkpoint loses its name before its files, so that half of one is never found under it.
    """
    if not limit or limit < 0:
        return
    output_dir = Path(output_dir)
    always_kept = {Path(newest).resolve()}
    if best:
        always_kept.add(Path(best).resolve())
    folders = _checkpoints(output_dir)

    # By time: in a folder that is used again, higher numbers may be older. Equal times fall back to the number.
    old = [folder for folder in folders if folder.resolve() not in always_kept]
    old.sort(key=lambda folder: (_time_of(folder), _step_of(folder)))
    num_kept = len(folders) - len(old)
    for folder in old[: max(0, len(folders) - max(limit, num_kept))]:
        logger.info(f"Deleting {folder}: `save_total_limit` is {limit}.")
        nameless = output_dir / STAGING_NAME / f"{DELETED}{folder.name}"
        nameless.parent.mkdir(exist_ok=True)
        os.rename(folder, nameless)
    shutil.rmtree(output_dir / STAGING_NAME, ignore_errors=True)


def _checkpoints(output_dir: Path) -> list[Path]:
    folders = output_dir.iterdir() if output_dir.is_dir() else ()
    return [folder for folder in folders if CHECKPOINT_NAME.fullmatch(folder.name) and folder.is_dir()]


def _step_of(folder: Path) -> int:
    return int(CHECKPOINT_NAME.fullmatch(folder.name)[1])


def global_step_of(folder: str | Path) -> int:
    """Number of optimizer steps after which a checkpoint was written."""
    return json.loads((Path(folder) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]


def _time_of(folder: Path) -> float:
    state = folder / TRAINER_STATE_NAME
    return (state if state.is_file() else folder).stat().st_mtime


# --- which one to resume from ----------------------------------------------------------------------------------------


def _damage(path: Path) -> str | None:
    """What is wrong with a file, found without reading its tensors; nothing is unpickled."""
    size = path.stat().st_size
    if size == 0 and path.suffix in (".json", ".safetensors", ".pt", ".pth", ".bin"):  # others may be marks of users
        return "is empty"
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return "is cut off or not JSON"
    elif path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):  # reads the header, and compares it with the length of the file
                pass
        except SafetensorError as error:
            return f"is cut off or not a safetensors file ({error})"
    # Pickles of torch; other files with these endings belong to callbacks and are not read here.
    elif STATE_NAME.fullmatch(path.name) or path.name == "training_args.bin":
        if not zipfile.is_zipfile(path):  # its index is at the end
            return "is cut off or was not written by `torch.save`"
        if path.name != "training_args.bin":
            with safe_globals():  # what the Trainer allows besides tensors: numpy's part of the random state
                foreign = get_unsafe_globals_in_checkpoint(path)
            if foreign:
                return f"was refused: it wants more than tensors, {', '.join(sorted(foreign))}"
    return None


def _missing_shards(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        return []  # reported as damage
    return [f"{name} is missing" for name in sorted(names) if not (index.parent / name).is_file()]


def _rng_files(folder: Path) -> list[int | None]:
    """Processes with a file of random states; `[None]` for a run of one."""
    if (folder / "rng_state.pth").is_file():
        return [None]
    return sorted(int(path.stem.rsplit("_", 1)[1]) for path in folder.glob("rng_state_[0-9]*.pth"))


def checkpoint_problems(folder: str | Path, files: CheckpointFiles = CheckpointFiles()) -> list[str]:
    """
    The reasons why training cannot resume from a folder; empty if it can.

    The weights, the states of optimizer, scheduler, random numbers and trainer, and the trainer's own files must be there,
    and no file may be cut off. Tensors are not read and nothing is unpickled, so it takes no time.

    Args:
        folder (`str` or `Path`): a `checkpoint-*` folder.
        files ([`CheckpointFiles`], *optional*): `checkpoint_files` of the trainer that wrote it, by default those of a
            `transformers.Trainer`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return ["there is no such folder"]
    problems = _damaged_files(folder)
    names = {path.name for path in folder.iterdir()}
    sharded_by_deepspeed = any(name.startswith("global_step") for name in names)

    # Look for the model, and for what the trainer itself writes.
    if not _has_weights(folder, files.weights) and not sharded_by_deepspeed:
        problems.append(f"the weights are missing ({' or '.join(files.weights)})")
    for name in (TRAINER_STATE_NAME, *files.state):
        if name not in names:
            problems.append(f"{name} is missing")

    # Look for the state of training. A checkpoint with no part of it was saved without it on purpose.
    has_optimizer = sharded_by_deepspeed or any(name.startswith("optimizer") for name in names)
    has_scheduler = "scheduler.pt" in names
    ranks = _rng_files(folder)
    if not (has_optimizer or has_scheduler or ranks) and not problems:
        return ["it was saved with `save_only_model=True`, so it has weights and no state of training"]
    if not has_optimizer:
        problems.append("optimizer.pt is missing")
    if not has_scheduler and not sharded_by_deepspeed:
        problems.append("scheduler.pt is missing")
    if not ranks:
        problems.append("rng_state.pth is missing")
    elif ranks != [None] and (ranks != list(range(len(ranks))) or len(ranks) < 2):
        problems.append(f"it has random states of processes {ranks} only")
    return problems


def _has_weights(folder: Path, patterns: tuple[str, ...]) -> bool:
    """Whether a file or folder matches one of the patterns."""
    for pattern in patterns:
        if any(path.is_file() or path.is_dir() for path in folder.glob(pattern)):
            return True
    return False


def _damaged_files(folder: Path) -> list[str]:
    """Files that are cut off or refused, parts of sharded weights that are missing, networks without a configuration."""
    problems = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        damage = _damage(path)
        if damage:
            problems.append(f"{path.relative_to(folder).as_posix()} {damage}")
        if path.name.endswith(".safetensors.index.json"):
            problems += _missing_shards(path)
    problems += missing_shards(folder)
    networks = {path.parent for path in folder.glob("*/diffusion_pytorch_model*.safetensors*")}
    for network in networks:
        if not (network / "config.json").is_file():
            problems.append(f"{network.name}/config.json is missing")
    return problems


def last_checkpoint(output_dir: str | Path, files: CheckpointFiles = CheckpointFiles()) -> str | None:
    """
    The complete checkpoint with the highest step of the run that trained last in `output_dir`, or `None`. Incomplete ones
    and those of earlier runs are skipped, with a warning that says why. `files` are the `checkpoint_files` of the trainer.
    """
    repair(output_dir)
    folders, of_other_runs = checkpoints_of_last_run(output_dir, files)
    if of_other_runs:
        names = _names(of_other_runs)
        logger.warning(
            f"{str(output_dir)!r} also holds checkpoints of an earlier run, which are passed over: {names}."
        )
    for folder in sorted(folders, key=_step_of, reverse=True):
        problems = checkpoint_problems(folder, files)
        if not problems:
            return str(folder)
        logger.warning(f"{folder} is passed over: {'; '.join(problems)}.")
    return None


def checkpoints_of_last_run(output_dir: str | Path, files: CheckpointFiles) -> tuple[list[Path], list[Path]]:
    """
    The checkpoints of the run that trained last in a folder, and those of other runs. Where the folder itself does not say
    which that is, it is the run that wrote the newest checkpoint.
    """
    folders = _checkpoints(Path(output_dir))
    run_of = {folder: run_of_checkpoint(folder, files) for folder in folders}
    note = read_record(Path(output_dir) / FOLDER_RECORD_NAME)
    known = [folder for folder in folders if run_of[folder] is not None]
    if note is not None:
        last = note.run_id
    else:
        last = run_of[max(known, key=_time_of)] if known else None
    of_others = [folder for folder in known if run_of[folder] != last]
    return [folder for folder in folders if folder not in of_others], of_others


def run_of_checkpoint(folder: Path, files: CheckpointFiles) -> str | None:
    """What tells the run of a checkpoint from others; `None` if its state cannot be read."""
    record = read_record(folder / files.record) if files.record else None
    return None if record is None else record.run_id


EARLIER_RUN_ADVICE = (  # in the words of the commands
    "Go on with it by --resume_from_checkpoint last, or choose another --output_dir. A new run beside them, which replaces the "
    "model in the folder: --overwrite_output_dir."
)


def check_for_earlier_run(output_dir: str | Path, advice: str) -> None:
    """
    Args:
        output_dir (`str` or `Path`): the folder of a run that begins.
        advice (`str`): what to do instead, in a whole sentence.

    Raises:
        ValueError: if it holds checkpoints, which are of another run then.
    """
    folders = _checkpoints(Path(output_dir))
    if folders:
        raise ValueError(f"{str(output_dir)!r} holds checkpoints of an earlier run: {_names(folders)}. {advice}")


def _names(folders: list[Path]) -> str:
    """`checkpoint-2, checkpoint-4`, or the first and the last of many."""
    names = [folder.name for folder in sorted(folders, key=_step_of)]
    return ", ".join(names) if len(names) < 4 else f"{names[0]} to {names[-1]}"


def checkpoint_to_resume(
    resume_from_checkpoint, output_dir: str | Path, world_size: int = 1, files: CheckpointFiles = CheckpointFiles()
) -> str | None:
    """
    Resolve the argument `resume_from_checkpoint` of `train` to a folder.

    Args:
        resume_from_checkpoint (`str`, `Path`, `bool` or `None`): a folder, or `True` for the last complete one.
        output_dir (`str` or `Path`): where `True` looks.
        world_size (`int`, *optional*, defaults to `1`): processes of this run.
        files ([`CheckpointFiles`], *optional*): `checkpoint_files` of the trainer.

    Returns:
        `str`, or `None` for a run from the start.

    Raises:
        ValueError: if there is none, or it is incomplete.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint is False:
        return None

    # Find the last complete checkpoint of the run, and name the incomplete ones if there is none.
    if resume_from_checkpoint is True:
        folder = last_checkpoint(output_dir, files)
        if folder is None:
            own, of_other_runs = checkpoints_of_last_run(output_dir, files)
            broken = [f"{f.name}: {'; '.join(checkpoint_problems(f, files))}" for f in own]
            found = f" What is there is incomplete ({' | '.join(broken)})." if broken else ""
            if of_other_runs:
                found += f" {_names(of_other_runs)} belong to an earlier run; name one of them to go on with that."
            raise ValueError(
                f"There is no checkpoint in {str(output_dir)!r} to resume from.{found} Train from the start, without "
                "`resume_from_checkpoint`."
            )
    # Or check the one that is given, and name a better one beside it.
    else:
        folder = str(resume_from_checkpoint)
        other = [name for name in files.foreign if (Path(folder) / name).is_file()]
        if other:
            raise ValueError(
                f"{folder!r} is a checkpoint of another trainer, which wrote {other[0]}. Name one of this trainer's."
            )
        problems = checkpoint_problems(folder, files)
        if problems:
            other = last_checkpoint(Path(folder).absolute().parent, files)
            advice = f"Resume from {other!r}" if other else "There is no complete one beside it: train from the start"
            raise ValueError(f"{folder!r} is not a complete checkpoint: {'; '.join(problems)}. {advice}.")

    # Another number of processes can go on from here, but does not repeat the run exactly.
    written_by = len(_rng_files(Path(folder)))
    if written_by != world_size and any(Path(folder).glob("global_step*")):
        raise ValueError(
            f"{folder!r} was written by {written_by} process(es) with DeepSpeed and this run has {world_size}. DeepSpeed reads its "
            f"own checkpoints with as many processes only: start {written_by}, or begin a new run from its weights."
        )
    if written_by != world_size:
        logger.warning(
            f"{folder!r} was written by {written_by} process(es) and this run has {world_size}. It goes on from there, "
            f"but batches and random numbers belong to processes: only {written_by} would repeat the run bit for bit."
        )
    return folder


def check_optimizer_file(folder: str | Path, written_by: str | None) -> None:
    """
    Check that the optimizer state of a checkpoint was written as this run reads it: with FSDP by the names of parameters, with
    DeepSpeed by itself, otherwise by the order of parameters.

    Args:
        folder (`str` or `Path`): of the checkpoint.
        written_by (`str`, *optional*): "FSDP" or "DeepSpeed", as this run would write it.

    Raises:
        ValueError: if it is of another kind.
    """
    kinds = {
        "FSDP": ("optimizer.bin", SHARDS_NAME, "optimizer_0"),
        "DeepSpeed": ("global_step*",),
        None: ("optimizer.pt",),
    }
    found = [kind for kind, names in kinds.items() if any(any(Path(folder).glob(name)) for name in names)]
    if found and written_by not in found:
        written = f"with {found[0]}" if found[0] else "without FSDP and DeepSpeed"
        now = f"with {written_by}" if written_by else f"without {found[0]}"
        raise ValueError(
            f"{str(folder)!r} was written {written} and this run trains {now}, which reads another optimizer state. "
            f"Resume {written}, or begin a new run from its weights."
        )


# --- the trainers ----------------------------------------------------------------------------------------------------


class CheckpointingMixin:
    """
    Mixin that gives a `transformers.Trainer` the checkpoints that are described above. List it before `Trainer` in the
    bases.

    A subclass declares its files in `checkpoint_files`. It writes the model in `_write_model(folder, output_dir,
    state_dict)` and its own state in `_write_state(folder)`, and reads that back in `_read_state(folder)`, which returns
    whether no data is left; `_read_state(None)` starts a new run. Every process calls these three.

    Callbacks that have files of their own in a checkpoint add a function to `checkpoint_writers`. It is called with the
    folder of a checkpoint while it is being written, on the process that saves.
    """

    checkpoint_files = CheckpointFiles()
    run_record: RunRecord | None = None  # of the training that has begun
    _staging = False  # a checkpoint is being written
    _has_begun = False  # `train` has been called in this process
    _resumed_at_end = False  # the run that is resumed has taken its last step already

    @property
    def stopped_by(self) -> int | None:
        """The signal that has ended the last training, with a [`StopOnSignalCallback`]; `None` if it came to its end."""
        return stop_signal(self.callback_handler.callbacks)

    @property
    def nothing_to_train(self) -> bool:
        """Whether the last training went on from a checkpoint that had taken all steps already."""
        return self._resumed_at_end

    @property
    def _optimizer_engine(self) -> str | None:
        """Who writes and reads the state of the optimizer; `None` for torch itself."""
        if self.is_deepspeed_enabled:
            return "DeepSpeed"
        return "FSDP" if self.is_fsdp_enabled else None

    @property
    def checkpoint_writers(self) -> list[Callable[[Path], None]]:
        return self.__dict__.setdefault("_checkpoint_writers", [])

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING_NAME) if self._staging else folder

    def _save_checkpoint(self, model, trial) -> None:
        # Write into a staging folder, whose name no reader takes for a checkpoint.
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staged = run_dir / STAGING_NAME / name
        final = run_dir / name
        if self.args.should_save:
            clear_staging(run_dir)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
            self._write_state(staged)
            if self.args.should_save:
                self._write_record(staged / self.checkpoint_files.record)
                for write in self.checkpoint_writers:
                    write(staged)
                self._name_best_checkpoint(staged, final)
        except (OSError, RuntimeError, SafetensorError) as error:  # of Python, of torch and of safetensors
            if isinstance(error, RuntimeError) and not any(name in str(error) for name in TORCH_WRITERS):
                raise
            free = shutil.disk_usage(run_dir).free / 2**20
            shutil.rmtree(staged, ignore_errors=True)
            raise OSError(
                f"{name} could not be written to {str(run_dir)!r}, which has {free:,.0f} MiB left: {error}. Earlier "
                "checkpoints are whole: make room and train again with `resume_from_checkpoint=True`."
            ) from error
        finally:
            self._staging = False

        # Every process has written: give the checkpoint its name, and only then delete older ones.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish(staged, final)
            rotate(run_dir, self.args.save_total_limit, final, self.state.best_model_checkpoint)
            self._say_which_run_is_last()
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            self._name_best_checkpoint(staged, final)
        if self.args.push_to_hub:  # it uploads in the background, from a folder that stays
            self._push_from_checkpoint(str(final))

    def _name_best_checkpoint(self, staged: Path, final: Path):
        """Correct the path of the best checkpoint, here and in the file: it must be the final one, not the staging folder."""
        best_step = getattr(self.state, "best_global_step", None)
        best = final.with_name(f"checkpoint-{best_step}") if best_step else None
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(final)
        elif best is not None and best != final and best.is_dir() and self.args.save_strategy != "no":
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the model aside and move it in, file by file: what was there is whole until it is replaced."""
        output_dir = Path(output_dir or self.args.output_dir)
        if self._staging:
            self._write_model(output_dir, output_dir, state_dict)
            return
        staged = output_dir / STAGING_NAME / "model"
        if self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
        self._write_model(staged, output_dir, state_dict)
        if self.args.should_save:
            move_files(staged, output_dir)
            with contextlib.suppress(OSError):
                staged.parent.rmdir()

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        Train, from the start or from a checkpoint, after which everything is as if the run had never stopped.

        Args:
            resume_from_checkpoint (`str`, `Path` or `bool`, *optional*): a `checkpoint-*` folder, or `True` for the last
                complete one in `output_dir`. Where `torchrun --max-restarts` or `accelerate launch --max_restarts` has
                started the processes anew, the last one goes before what is given here.

        Returns:
            `TrainOutput`.

        Raises:
            ValueError: if there is no such checkpoint, or it is incomplete.
        """
        if self.args.should_save:
            clear_staging(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        resume_from_checkpoint = self._after_restart(resume_from_checkpoint)
        folder = checkpoint_to_resume(
            resume_from_checkpoint, self.args.output_dir, self.args.world_size, self.checkpoint_files
        )
        if folder is not None:
            check_optimizer_file(folder, self._optimizer_engine)
        exhausted = self._read_state(folder)
        self._begin_or_go_on(folder)
        self._resumed_at_end = folder is not None and (exhausted or 0 < self.args.max_steps <= global_step_of(folder))
        if self._resumed_at_end:
            self._notice(
                f"{folder!r} has taken all of its steps ({global_step_of(folder)}, and `max_steps={self.args.max_steps}`): "
                "there is nothing to train. Raise `max_steps` or `num_train_epochs` to go on."
            )
        eval_on_start = self.args.eval_on_start
        self.args.eval_on_start = eval_on_start and folder is None  # the run has had it
        if self._resumed_at_end:  # there is no epoch any more, at whose beginning the Trainer would load them
            self._load_rng_state(folder)
        try:
            return super().train(folder, *args, **kwargs)
        finally:
            self.args.eval_on_start = eval_on_start
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, StopOnSignalCallback):
                    callback.release()

    def _after_restart(self, given):
        """
        What `train` was told to resume from; or, in processes that the launcher has started anew, the last checkpoint that the ones
        before them wrote.
        """
        is_first_call, self._has_begun = not self._has_begun, True
        count = restarts()
        if count == 0 or not is_first_call:
            return given
        found = last_checkpoint(self.args.output_dir, self.checkpoint_files)
        if found is None:
            return given
        self._notice(f"The launcher has started the processes anew ({count}). The run goes on from {found!r}.")
        return found

    def _begin_or_go_on(self, folder: str | None) -> None:
        """The record of the run that begins, or goes on from `folder`, with what there is to say about it."""
        settings = settings_of(self.args)
        if folder is None:
            self.run_record = RunRecord.new(settings)
            if not self.args.overwrite_output_dir:
                self._warn_of_earlier_run()
        else:
            step = global_step_of(folder)
            written = read_record(Path(folder) / self.checkpoint_files.record)
            self.run_record = written or RunRecord.without_history()
            changes = describe_changes(self.run_record.go_on(step, settings))
            if changes:
                self._notice(f"The run goes on from step {step}. {changes}")
        self.accelerator.wait_for_everyone()  # every process has found its checkpoint
        if self.args.should_save:
            self._say_which_run_is_last()

    def _say_which_run_is_last(self) -> None:
        """Write it into the output folder, while that holds checkpoints of several runs."""
        if self.run_record is None:
            return
        note = Path(self.args.output_dir) / FOLDER_RECORD_NAME
        runs = {run_of_checkpoint(f, self.checkpoint_files) for f in _checkpoints(Path(self.args.output_dir))}
        if runs - {self.run_record.run_id, None}:
            write_text(note, json.dumps({RECORD_KEY: self.run_record.to_dict()}))
        else:
            note.unlink(missing_ok=True)

    def _write_record(self, path: Path) -> None:
        """Put the record of the run into the state file of a checkpoint."""
        if self.run_record is not None and path.is_file():
            state = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps({**state, RECORD_KEY: self.run_record.to_dict()}), encoding="utf-8")

    def _warn_of_earlier_run(self) -> None:
        advice = (
            "They stay beside those of this run, which replaces the model in the folder. Go on with the earlier run by "
            "`resume_from_checkpoint=True`, or choose another `output_dir`."
        )
        try:
            check_for_earlier_run(self.args.output_dir, advice)
        except ValueError as error:
            self._notice(str(error))

    def _notice(self, text: str) -> None:
        """A warning that one process gives for all."""
        if self.is_world_process_zero():
            logger.warning(text)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optim = getattr(self.args.optim, "value", self.args.optim)
        own = [set(group) for group in self._param_groups()]
        what = f"The optimizer state in {checkpoint!r} does not belong to `optim={optim!r}`"
        advice = "Resume with the `optim` of the run that wrote it."
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{what}: {error}. {advice}") from error
        # torch takes the settings of any optimizer, and the step would miss its own.
        missing = set()
        for keys, group in zip(own, self._param_groups(), strict=False):
            missing |= keys - set(group)
        if checkpoint is not None and missing:
            raise ValueError(f"{what}: it has no {sorted(missing)}. {advice}")

    def _param_groups(self) -> list[dict]:
        return getattr(self.optimizer, "param_groups", [])

    def set_initial_training_values(self, *args, **kwargs):
        values = super().set_initial_training_values(*args, **kwargs)
        return (0, *values[1:]) if self._resumed_at_end else values  # epochs
