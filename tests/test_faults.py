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
Necessity: disks fill up in the night. Real writes fail here, in a program of its own: at a limit that the operating
system sets, on a file system that is full, in a folder that belongs to somebody else.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trl_spo import SPOTrainer
from trl_spo.training.checkpointing import checkpoint_problems

from .testing_utils import PROMPTS, brightness_reward, tiny_sd_pipeline, tiny_spo_config


ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).with_name("run_with_fault.py")


def run(folder: Path, fault: str, prefix: tuple = ()) -> subprocess.CompletedProcess:
    command = [*prefix, sys.executable, str(PROGRAM), str(folder), fault]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def weights(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr[-3000:]
    return re.search(r"WEIGHTS (.*)", done.stdout)[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return weights(run(tmp_path_factory.mktemp("undisturbed"), "none"))


def test_a_checkpoint_that_cannot_be_written_costs_nothing_else(tmp_path, undisturbed):
    """The write fails at step 4; the checkpoint of step 2 is still there, whole, and leads to the same weights."""
    failed = run(tmp_path, "limit:3")
    assert failed.returncode != 0
    message = failed.stderr.replace("\n", " ")
    assert re.search(r"OSError: checkpoint-4 could not be written to .*MiB left: .*make room and train again", message)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["checkpoint-2"] or left == ["_saving", "checkpoint-2"], left
    assert checkpoint_problems(tmp_path / "out" / "checkpoint-2", SPOTrainer.checkpoint_files) == []
    assert weights(run(tmp_path, "resume")) == undisturbed


def can_mount() -> bool:
    probe = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"]
    try:
        return subprocess.run(probe, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_mount(), reason="mounting a small file system needs rights that this process has not")
def test_a_full_disk(tmp_path, undisturbed):
    """
    `out` is a file system of 3 MB that is filled after step 3, but for 32 KiB. Failure, more room and resumption happen
    inside one shell: the file system is gone with it.
    """
    program = f"{sys.executable} {PROGRAM} {tmp_path}"
    script = (
        f"mkdir -p {tmp_path}/out && mount -t tmpfs -o size=3m none {tmp_path} && mkdir {tmp_path}/out || exit 99; "
        f"{program} fill:3; echo STATUS $?; ls -A {tmp_path}/out; rm {tmp_path}/filler; {program} resume"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "STATUS 1" in done.stdout, done.stdout + done.stderr[-2000:]
    assert re.search(r"checkpoint-4 could not be written to .*, which has 0 MiB left", done.stderr), done.stderr[
        -2000:
    ]
    assert weights(done) == undisturbed


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_belongs_to_somebody_else(tmp_path):
    """Refused before the first forward pass."""
    for folder in [tmp_path, *list(tmp_path.parents)[:2]]:
        folder.chmod(0o755)
    done = run(tmp_path, "nobody")
    assert done.returncode != 0 and "FORWARDS 0" in done.stdout
    assert re.search(r"PermissionError: .*Nothing can be written to `output_dir`.*Choose another", done.stderr), (
        done.stderr
    )


@pytest.mark.parametrize("where", ["out", "out/deeper"])
def test_a_file_in_the_place_of_the_folder(tmp_path, where):
    (tmp_path / "out").write_text("mine")
    config = tiny_spo_config(tmp_path / where)
    with pytest.raises(OSError, match="Nothing can be written to `output_dir`"):
        SPOTrainer(config, tiny_sd_pipeline(tmp_path), brightness_reward, train_dataset=PROMPTS)
    assert (tmp_path / "out").read_text() == "mine"
