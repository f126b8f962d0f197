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
A launcher starts the processes of a run anew when one of them has died: the run goes on from its last checkpoint, and every pair is
trained on once. With whole denoisers and with shards, under one launcher and under two, which stand for two machines.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from trl_spo import SPOTrainer
from trl_spo.scripts.training import check_run
from trl_spo.training.checkpointing import restarts

from .test_checkpointing import spo_trainer
from .test_distributed import CONFIGS, ROOT, adjusted, assert_same_bits, processes_of


BOUND = 300  # seconds
# Where a rank dies -> which one, and after how many steps.
PLACES = {"rollout": (1, 2), "backward": (0, 2), "step": (1, 3), "checkpoint": (0, 4)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_taken(port: int) -> None:
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"nobody listens on port {port}")


def launch_all(folder: Path, config: Path, launchers: int, *words: str) -> list[str]:
    """Two processes under one launcher or two, which may start them anew once. Returns what each launcher printed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # In a store that outlives them, processes that are started anew find the addresses of dead ones. The command line sets it, too.
    environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    program = [str(Path(__file__).parent / "run_elastic.py"), str(folder), *words]
    options = ["--max_restarts", "1", "--monitor_interval", "0.5", "--rdzv_backend", "c10d"]
    options += ["--main_process_ip", "127.0.0.1", "--num_machines", str(launchers)]
    port = free_port()
    running = []
    for machine in range(launchers):
        if machine == 1:  # on one machine it would take the port of the first
            wait_until_taken(port)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *options]
        command += ["--main_process_port", str(port), "--machine_rank", str(machine), *program]
        running.append(
            subprocess.Popen(
                command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    outputs = []
    try:
        for process in running:
            outputs.append(process.communicate(timeout=BOUND)[0])
    except subprocess.TimeoutExpired:
        for number in processes_of(folder):
            os.kill(number, signal.SIGKILL)
        outputs += [process.communicate()[0] for process in running[len(outputs) :]]
        pytest.fail(f"had not ended after {BOUND} seconds:\n" + "\n".join(output[-4000:] for output in outputs))
    assert [process.returncode for process in running] == [0] * launchers, "\n".join(o[-4000:] for o in outputs)
    return outputs


def steps_of(folder: Path) -> list[list[dict]]:
    return [
        [json.loads(line) for line in (folder / f"steps_{rank}.txt").read_text().splitlines()] for rank in range(2)
    ]


def kill_and_compare(folder: Path, name: str, launchers: int, place: str, apart: bool = False) -> None:
    """
    A run in which a rank dies at one of `PLACES`, against one under one launcher in which nobody does. `apart`: a process of each
    rank rolls out, on the machine of that rank.
    """
    whole, restarted = folder / "whole", folder / "restarted"
    for each in (whole, restarted):
        each.mkdir(parents=True)
    config = adjusted(name, folder, use_cpu=True) if name == "fsdp2.yaml" else CONFIGS / name
    options = ["--apart"] if apart else []
    launch_all(whole, config, 1, *options)
    outputs = launch_all(restarted, config, launchers, place, *options)
    assert sum("The launcher has started the processes anew (1)" in output for output in outputs) >= 1

    for rank, (steps, expected) in enumerate(zip(steps_of(restarted), steps_of(whole), strict=True)):
        # The second life goes on from the checkpoint that has two steps; what the first one did beyond these is done again.
        second = [entry for entry in steps if entry["life"] == 1]
        assert [entry["step"] for entry in second] == [2, 3, 4]
        kept = [entry for entry in steps if entry["life"] == 0 and entry["step"] < 2]
        trained = [(entry["step"], entry["prompts"], entry["latents"]) for entry in [*kept, *second]]
        assert trained == [(entry["step"], entry["prompts"], entry["latents"]) for entry in expected]
        ends = [torch.load(each / f"end_{rank}.pt") for each in (whole, restarted)]
        assert [end["life"] for end in ends] == [0, 1]
        assert [end["devices"] for end in ends] == ([["cpu"] * 2, ["cpu"] * (2 // launchers)] if apart else [None] * 2)
        assert ends[0]["shards"] == ends[1]["shards"] == (name == "fsdp2.yaml")
        assert_same_bits(ends[0]["weights"], ends[1]["weights"])


@pytest.mark.parametrize(
    ("name", "launchers", "place"), [("cpu_2proc.yaml", 1, "step"), ("fsdp2.yaml", 2, "checkpoint")]
)
def test_a_rank_that_dies_costs_the_steps_since_the_last_checkpoint(tmp_path, name, launchers, place):
    """All places with all ways to launch, and with rollouts apart: `reliability/kill_ranks.py`."""
    kill_and_compare(tmp_path, name, launchers, place)


class TestOneProcess:
    """The same decision without a launcher, which is an environment variable."""

    def test_the_last_checkpoint_goes_before_the_one_that_is_named(self, tmp_path, monkeypatch):
        spo_trainer(tmp_path).train()
        assert restarts() == 0
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        again = spo_trainer(tmp_path, max_steps=5)
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert [log["step"] for log in again.state.log_history if "loss" in log][-1] == 5
        assert again._seen_before[1] == 4  # it went on from checkpoint-4
        again.train()  # a second training in the same process begins anew
        assert again._seen_before[1] == 0

    def test_the_command_is_not_refused_for_its_own_checkpoints(self, tmp_path, monkeypatch):
        trainer = spo_trainer(tmp_path)
        trainer.train()
        with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
            check_run(trainer.args, SPOTrainer)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        check_run(trainer.args, SPOTrainer)

    def test_without_a_checkpoint_it_begins_as_it_was_told(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
        trainer = spo_trainer(tmp_path, max_steps=1)
        trainer.train()
        assert trainer._seen_before[1] == 0 and trainer.state.global_step == 1
