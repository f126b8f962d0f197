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
Why this file exists: a mistake between processes shows as a run that hangs at three in the morning, or as one that trains
on half of its pairs and looks well. Two processes on the CPU, started as users start them (`accelerate launch`), are
compared with one process on what the two found together; and ranks are killed, broken and stopped.

`run_distributed.py` is the program; a launch costs about ten seconds, so that one launch serves many tests.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image, ImageChops

import trl_spo
from trl_spo import LatentRewardModel, StepAwareRewardModel

from . import run_distributed
from .testing_utils import tiny_clip, tiny_sd_pipeline


ROOT = Path(__file__).parents[1]
CONFIGS = Path(trl_spo.__file__).parent / "accelerate_configs"
BOUND = 180  # seconds in which every launch below must have ended; most of it is import time on a busy machine

# Sums of float32 in another order: two processes add the halves of a batch, one adds it at once. Relative to the largest
# entry of a gradient or of a weight; a lost factor of 2, or a lost pair of twelve, is 1e-1.
ROUNDING = {"rtol": 1e-4}


def processes_of(folder: Path) -> list[int]:
    """All processes that were started for `folder`: it is in their command lines."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        if str(folder) in command:
            found.append(int(entry.name))
    return found


def launch(
    folder: Path,
    *scenarios: str,
    config: Path = CONFIGS / "cpu_2proc.yaml",
    program=("run_distributed.py",),
    bound: float = BOUND,
):
    """`accelerate launch` of the scenarios in two processes, which may take `bound` seconds. Port 0: whichever is free."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", 0]
    command += [*(Path(__file__).parent / name for name in program), folder, *scenarios]
    start = time.monotonic()
    process = subprocess.Popen(
        list(map(str, command)),
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = process.communicate(timeout=bound)
    except subprocess.TimeoutExpired:
        for number in processes_of(folder):  # the ranks as well as the launcher
            os.kill(number, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{scenarios} had not ended after {bound} seconds:\n{output[-5000:]}")
    return SimpleNamespace(status=process.returncode, output=output, seconds=time.monotonic() - start)


def results(folder: Path, scenario: str) -> list[dict]:
    return [torch.load(folder / f"{scenario}_{rank}.pt", weights_only=False) for rank in range(2)]


def assert_same_bits(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def assert_close(first: list[list[torch.Tensor]], second: list[list[torch.Tensor]]):
    """Gradients or weights of several steps, up to rounding."""
    assert len(first) == len(second) > 1
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(
                x.view_as(y), y, rtol=0, atol=ROUNDING["rtol"] * max(y.abs().max().item(), 1e-6)
            )


def assert_logs_close(first: list[dict], second: list[dict]):
    assert len(first) == len(second) > 1
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            # Log-ratios are differences of log-probabilities around 1: their rounding is that of the latter.
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=2e-5), name


SCENARIOS = (
    "accumulation_1 accumulation_2 one_rank_without_pairs late_pairs uneven_prompts writing step_reward "
    "step_reward_broken_images caption_loss latent_reward"
).split()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder with what both ranks saw of every scenario that ends well."""
    folder = tmp_path_factory.mktemp("two_processes")
    tiny_clip(folder)
    run = launch(folder, *SCENARIOS)
    assert run.status == 0, run.output[-5000:]
    return folder


class TestPairs:
    @pytest.mark.parametrize("scenario", ["one_rank_without_pairs", "late_pairs", "uneven_prompts", "accumulation_1"])
    def test_both_ranks_take_the_same_steps_on_as_many_pairs(self, two_processes, scenario):
        first, second = results(two_processes, scenario)
        assert first["world_size"] == second["world_size"] == 2
        assert first["batches"] == second["batches"] and sum(first["batches"]) > 0
        assert 2 * sum(first["batches"]) + first["left"] == first["own_pairs"] + second["own_pairs"]
        assert_same_bits(first["weights"], second["weights"])
        assert first["left"] == second["left"] < 2

    def test_one_rank_may_find_nothing_at_all(self, two_processes):
        first, second = results(two_processes, "one_rank_without_pairs")
        assert first["own_pairs"] > 0 == second["own_pairs"]
        assert first["logs"][-2]["pairs/valid_fraction"] == pytest.approx(0.5, abs=0.01)  # of both ranks

    def test_rounds_without_a_pair_are_passed_over(self, two_processes):
        for rank in results(two_processes, "late_pairs"):
            empty = [len(pairs) == 0 for _, (_, pairs) in sorted(rank["rollouts"].items())]
            assert empty == [True, True, False]

    def test_the_last_prompt_is_rolled_out_by_one_rank(self, two_processes):
        first, second = results(two_processes, "uneven_prompts")
        assert [len(part["rollouts"]) for part in (first, second)] == [3, 2]
        assert first["own_pairs"] > second["own_pairs"]

    def test_no_pair_for_ever_is_an_error_on_both_ranks(self, tmp_path):
        run = launch(tmp_path, "no_pairs")
        assert run.status != 0
        assert run.output.count("RuntimeError: No valid pair in 10 prompts") >= 2  # one per rank
        assert not processes_of(tmp_path)


@pytest.mark.parametrize("steps", [1, 2])
class TestOneProcessOnThePooledPairs:
    """Two processes against one whose rollouts are what the two found, with twice their batch size."""

    @pytest.fixture
    def both(self, two_processes, tmp_path, steps):
        first, second = results(two_processes, f"accumulation_{steps}")
        alone = run_distributed.replay(tmp_path, steps, [first["rollouts"], second["rollouts"]])
        assert alone["world_size"] == 1
        return first, second, alone, tmp_path, two_processes / f"accumulation_{steps}"

    def test_gradients_logs_and_evaluation(self, both, steps):
        first, second, alone, own_folder, their_folder = both
        # The last step is smaller than the others, and falls into micro-batches of different sizes.
        assert first["batches"][-steps:] == second["batches"][-steps:] == {1: [2], 2: [2, 1]}[steps]
        assert sum(alone["batches"]) == 2 * sum(first["batches"])
        for a, b in zip(first["gradients"], second["gradients"], strict=True):
            assert_same_bits(a, b)
        assert_close(first["gradients"], alone["gradients"])
        assert_close(first["steps"], alone["steps"])
        moved = [not torch.equal(a, b) for a, b in zip(alone["steps"][0], alone["steps"][-1], strict=True)]
        assert any(moved)
        # Every logged number is that of the pool, and the same on both ranks.
        assert first["logs"] == second["logs"]
        assert_logs_close(first["logs"], alone["logs"])
        for name in ("evaluation", "one_prompt"):
            values = [{k: v for k, v in part[name].items() if "runtime" not in k} for part in (first, second, alone)]
            assert values[0] == values[1] and values[0].keys() == values[2].keys()
            for key, value in values[2].items():
                assert values[0][key] == pytest.approx(value, rel=1e-4, abs=1e-4), key
        # Sample images: those before training are equal, the last may differ by what rounding became.
        ours, theirs = (folder / "out" / "images" for folder in (own_folder, their_folder))
        names = sorted(path.name for path in theirs.iterdir())
        assert names == sorted(path.name for path in ours.iterdir()) and len(names) >= 5
        for name in names:
            if name.endswith(".png"):
                difference = ImageChops.difference(Image.open(ours / name), Image.open(theirs / name))
                largest = max(high for _, high in difference.getextrema())
                assert largest == 0 if name == "step_000000.png" else largest <= 1, name


class TestWriting:
    def test_only_rank_0_writes(self, two_processes):
        """But for the state of its own random numbers, which every rank of a `Trainer` writes."""
        first, second = results(two_processes, "writing")
        names = {Path(path).name for path in first["written"]}
        assert {"pytorch_lora_weights.safetensors", "README.md", "optimizer.pt", "rng_state_0.pth"} <= names
        assert {"spo_state.json", "spo_pairs.safetensors", "step_000000.png", "samples.json"} <= names
        assert any(name.startswith("events.out.tfevents") for name in names)
        assert {Path(path).name for path in second["written"]} == {"rng_state_1.pth"}

    def test_a_resumed_run_is_the_same_run(self, two_processes):
        for rank in results(two_processes, "writing"):
            whole, resumed = rank["whole"], rank["resumed"]
            assert_same_bits(whole["weights"], resumed["weights"])
            assert whole["batches"][1:] == resumed["batches"] and len(resumed["batches"]) == 3
            assert whole["logs"][:-1] == resumed["logs"][:-1]  # the last has the mean loss of this call of `train`
            assert whole["left"] == resumed["left"]
            first, second = rank["optimizers"]
            assert first.keys() == second.keys() != set()
            for number in first:
                assert_same_bits(list(first[number].values()), list(second[number].values()))
            first, second = (dict(pool) for pool in rank["pools"])
            assert_same_bits(list(first.pop("pool").values()), list(second.pop("pool").values()))
            assert first == second
        # The checkpoint had pairs of both to go on with, more of one, so that some travelled.
        state = json.loads((two_processes / "writing" / "out" / "checkpoint-1" / "spo_state.json").read_text())
        assert set(state["pool_owners"]) == {0, 1} and sum(state["pool_owners"]) > len(state["pool_owners"]) / 2


class TestStepReward:
    @pytest.mark.parametrize("scenario", ["step_reward", "step_reward_broken_images"])
    def test_two_processes_are_one_with_two_micro_batches(self, two_processes, tmp_path, scenario):
        first, second = results(two_processes, scenario)
        tiny_clip(tmp_path)
        alone = getattr(run_distributed, scenario)(tmp_path / "alone", num_ranks=2)
        for a, b in zip(first["gradients"], second["gradients"], strict=True):
            assert_same_bits(a, b)
        assert_close(first["gradients"], alone["gradients"])
        assert_close(first["steps"], alone["steps"])
        assert first["logs"] == second["logs"]
        assert_logs_close(first["logs"], alone["logs"])
        if scenario == "step_reward":
            keys = {k for k in first["evaluation"] if not k.endswith(("runtime", "per_second"))}
            assert "eval_accuracy" in keys and "eval_margin" in keys
            assert {k: first["evaluation"][k] for k in keys} == {k: second["evaluation"][k] for k in keys}
        else:
            assert [rank["bad"] for rank in (first, second)] == [2, 4] and alone["bad"] == 6
            zero = [all(g.abs().max() == 0 for g in step) for step in first["gradients"]]
            assert zero == [False, False, True]  # the last step has no image at all


MISFORTUNES = {
    "killed": (["Signal 9 (SIGKILL)"], 90),
    "exception": (["RuntimeError: the reward model of rank 1 fell over"], 90),
    "hanging": (["Rank 0 waited for the rollouts", "`ddp_timeout=5` seconds", "Timed out waiting 5000ms"], 90),
}


class TestARankThatDies:
    @pytest.mark.parametrize("what", MISFORTUNES)
    def test_ends_the_job_and_says_why(self, tmp_path, what):
        causes, bound = MISFORTUNES[what]
        run = launch(tmp_path, what)
        assert run.status != 0
        for cause in causes:
            assert cause in run.output, run.output[-5000:]
        assert run.seconds < bound
        assert not processes_of(tmp_path)
        assert not list(tmp_path.glob("*.pt"))


class TestLatentReward:
    def test_captions_of_all_processes_are_negatives(self, two_processes, tmp_path):
        """Two processes with two and three pairs have the losses and the gradient of one with five."""
        first, second = results(two_processes, "caption_loss")
        tiny_clip(tmp_path)
        alone = run_distributed.caption_loss(tmp_path / "alone")
        torch.testing.assert_close(torch.cat([first["losses"], second["losses"]]), alone["losses"])
        assert alone["losses"][-1] == 0 and (alone["losses"][:-1] > 0).all()
        for rank in (first, second):
            torch.testing.assert_close(rank["gradient"], alone["gradient"])

    def test_both_processes_train_the_same_model(self, two_processes):
        first, second = results(two_processes, "latent_reward")
        assert [rank["bad"] for rank in (first, second)] == [0, 2]
        for a, b in zip(first["gradients"], second["gradients"], strict=True):
            assert_same_bits(a, b)
        assert_same_bits(first["weights"], second["weights"])
        assert first["logs"] == second["logs"]
        assert first["evaluation"]["eval_accuracy"] == second["evaluation"]["eval_accuracy"]
        saved = LatentRewardModel.from_pretrained(two_processes / "latent_reward" / "reward_out")
        assert_same_bits([p.detach() for p in saved.parameters()], first["weights"])


def adjusted(name: str, folder: Path, **changes) -> Path:
    """A configuration of the package for two processes on the CPU."""
    settings = yaml.safe_load((CONFIGS / name).read_text())
    settings |= {"num_processes": 2, "gpu_ids": None, **changes}
    (folder / name).write_text(yaml.safe_dump(settings))
    return folder / name


class TestSharding:
    def test_the_reward_model_under_fsdp(self, two_processes, tmp_path):
        """
        `fsdp.yaml`, whole, but for the broadcast of the first weights, which accelerate knows for GPUs only: two shards
        log what two whole models logged and end with the same weights.
        """
        config = adjusted("fsdp.yaml", tmp_path, use_cpu=True)
        settings = yaml.safe_load(config.read_text())
        settings["fsdp_config"]["fsdp_sync_module_states"] = False
        config.write_text(yaml.safe_dump(settings))
        tiny_clip(tmp_path)
        text_encoder = tiny_sd_pipeline(tmp_path / "sd").text_encoder
        text_encoder.save_pretrained(tmp_path / "text_encoder")
        run = launch(tmp_path, "fsdp_step_reward", config=config)
        assert run.status == 0, run.output[-5000:]
        ranks = results(tmp_path, "fsdp_step_reward")
        expected = results(two_processes, "step_reward")[0]
        for rank in ranks:
            assert rank["units"] == 5  # two vision layers, two text layers, and the rest
            assert_logs_close(rank["logs"], expected["logs"])
            assert_close([rank["weights"]] * 2, [expected["weights"]] * 2)
            for name, value in text_encoder.state_dict().items():
                assert torch.equal(rank["text_encoder"][name], value), f"loaded without weights: {name}"
            assert "FSDP 1 is refused" in rank["refusals"][0]  # by SPO
            assert "fsdp_cpu_ram_efficient_loading" in rank["refusals"][1]
        assert ranks[0]["logs"] == ranks[1]["logs"]

    def test_zero_2(self, two_processes, tmp_path):
        """`deepspeed_zero2.yaml`, where DeepSpeed is installed: SPO with a LoRA and the reward model, as without it."""
        pytest.importorskip("deepspeed", reason="needs `make test-deepspeed`")
        tiny_clip(tmp_path)
        scenarios = ("accumulation_1", "accumulation_2", "step_reward")
        config = adjusted("deepspeed_zero2.yaml", tmp_path, use_cpu=True)
        run = launch(tmp_path, *scenarios, "resumed_reward", config=config)
        assert run.status == 0, run.output[-5000:]
        self.assert_as_without_deepspeed(tmp_path, two_processes, scenarios)

    def test_a_reward_model_under_zero_3(self, two_processes, tmp_path):
        """`deepspeed_zero3.yaml`, with every weight spread: the reward model as without it, and saved whole."""
        pytest.importorskip("deepspeed", reason="needs `make test-deepspeed`")
        tiny_clip(tmp_path)
        config = adjusted("deepspeed_zero3.yaml", tmp_path, use_cpu=True)
        run = launch(tmp_path, "step_reward", "resumed_reward", config=config, program=("run_zero3.py",))
        assert run.status == 0, run.output[-5000:]
        self.assert_as_without_deepspeed(tmp_path, two_processes, ("step_reward",))

    @staticmethod
    def assert_as_without_deepspeed(tmp_path, two_processes, scenarios):
        saved = StepAwareRewardModel.from_pretrained(tmp_path / "step_reward" / "reward_out")
        # The bias of the keys adds the same to all logits of a query: its gradient is nothing but rounding, and so is it.
        vanishing = [i for i, (name, _) in enumerate(saved.named_parameters()) if name.endswith("k_proj.bias")]
        assert len(vanishing) == 4  # two layers of each tower
        for scenario in scenarios:
            ranks, expected = results(tmp_path, scenario), results(two_processes, scenario)[0]
            assert not ranks[0]["gradients"]  # DeepSpeed has them
            assert_same_bits(ranks[0]["weights"], ranks[1]["weights"])
            pair = [ranks[0]["weights"], expected["weights"]]
            if scenario == "step_reward":
                assert_same_bits(
                    list(saved.parameters()), [w.view_as(p) for w, p in zip(pair[0], saved.parameters(), strict=True)]
                )
                for weights in pair:
                    assert all(weights[i].abs().max() < 1e-8 for i in vanishing)
                pair = [[w for i, w in enumerate(weights) if i not in vanishing] for weights in pair]
            assert_close([pair[0]] * 2, [pair[1]] * 2)
        for rank in results(tmp_path, "resumed_reward"):
            first, second = rank["uninterrupted"], rank["resumed"]
            assert_same_bits(first["weights"], second["weights"])
            assert first["logs"][1:-1] == second["logs"][1:-1] != []
