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
A study is cut into tasks. Each is a process with one thread that leaves one JSON file, named after it; a task that has its file
is not done again, so a study that was stopped goes on.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def write_json(path: Path, value: dict):
    """A file that exists is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(value))
    os.replace(path.with_suffix(".tmp"), path)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def execute(tasks: list[str], output: Path, command_of: Callable[[str], list[str]], jobs: int) -> list[str]:
    """
    Runs the tasks that have no result yet, `jobs` at a time. Returns those that failed; the rest goes on.

    Args:
        tasks (`list[str]`): a task `a/b` leaves `output/a/b.json` and a log in `output/logs`.
        command_of (`Callable[[str], list[str]]`): the command that does one task.
    """
    waiting = [task for task in tasks if not (output / f"{task}.json").is_file()]
    running: dict[str, tuple[subprocess.Popen, float]] = {}
    failed = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    try:
        while waiting or running:
            # Start tasks up to the number of jobs, each with a log of its own.
            while waiting and len(running) < jobs:
                task = waiting.pop(0)
                log = output / "logs" / f"{task.replace('/', '-')}.txt"
                log.parent.mkdir(parents=True, exist_ok=True)
                with log.open("w") as stream:
                    process = subprocess.Popen(
                        command_of(task), stdout=stream, stderr=subprocess.STDOUT, env=environment
                    )
                running[task] = (process, time.perf_counter())
            time.sleep(0.2)
            # Look for tasks that have ended; of one that failed, the end of its log is shown.
            for task, (process, start) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[task]
                seconds = time.perf_counter() - start
                done = process.returncode == 0 and (output / f"{task}.json").is_file()
                print(f"{'done  ' if done else 'FAILED'} {task} ({seconds:.0f} s)", flush=True)
                if not done:
                    failed.append(task)
                    log = (output / "logs" / f"{task.replace('/', '-')}.txt").read_text()
                    print("\n".join(log.splitlines()[-15:]), flush=True)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
    return failed
