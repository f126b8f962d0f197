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
Why this file exists: DeepSpeed ZeRO-3 takes the weights of a network away and brings them back while it is called, through hooks
of its own, also where it is called past its engine, as rollouts do. Two processes with half of the denoiser each are compared with
one that has all of it, on what the two found together, as `test_fsdp2.py` does with FSDP 2.

`run_zero3.py` is the program. Where DeepSpeed is not installed, only what is refused is tested: `make test-deepspeed` has it.
"""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trl_spo import SPOTrainer
from trl_spo.training.checkpointing import check_optimizer_file, checkpoint_problems, checkpoint_to_resume
from trl_spo.training.sharding import check_sharding, check_zero3_of_a_reward

from . import run_fsdp2
from .test_distributed import adjusted, assert_close, assert_same_bits, launch, results
from .test_fsdp2 import (
    BOUND,
    LORA,
    WHOLE,
    assert_resumed_run_is_the_same,
    assert_same_checkpoint,
    assert_same_logs,
    assert_same_output,
    assert_same_step_of_a_family,
    assert_starts_from_the_reference,
    assert_workers_find_the_pairs_of_the_shards,
)
from .testing_utils import tiny_spo_config


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: `make test-deepspeed`"
)


def launch_zero3(folder: Path, *scenarios: str) -> Path:
    """The scenarios in two processes with `deepspeed_zero3.yaml`, on the CPU."""
    config = adjusted("deepspeed_zero3.yaml", folder, use_cpu=True)
    run = launch(folder, *scenarios, config=config, program=("run_zero3.py",), bound=BOUND)
    assert run.status == 0, run.output[-5000:]
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    scenarios = (
        "compared_unet",
        "compared_whole_unet",
        "compared_transformer",
        "half_precision",
        "half_precision_of_all",
        "families",
    )
    return launch_zero3(tmp_path_factory.mktemp("compared"), *scenarios)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    scenarios = ("resumed_transformer", "resumed_whole_unet", "rolled_out_apart", "loaded_again")
    return launch_zero3(tmp_path_factory.mktemp("resumed"), *scenarios)


def files_of_deepspeed(step: int) -> set[str]:
    parts = {f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt" for rank in (0, 1) for kind in ("model", "optim")}
    return {f"global_step{step}/{name}" for name in parts} | {"latest", "zero_to_fp32.py", "zero_to_torch.py"}


@needs_deepspeed
@pytest.mark.parametrize("recipe", ["unet", "whole_unet", "transformer"])
def test_zero_3_equals_one_process_on_the_pooled_pairs(compared, tmp_path, recipe):
    first, second = results(compared, f"compared_{recipe}")
    alone = run_fsdp2.replay(tmp_path, getattr(run_fsdp2, recipe), [first["rollouts"], second["rollouts"]])
    own_folder, their_folder = tmp_path / "out", compared / f"compared_{recipe}" / "out"
    for rank in (first, second):
        # No weight is there while the denoiser is not called, of the frozen copy neither.
        assert rank["present"] == 0 < rank["partitioned"]
        assert rank["frozen_is_sharded"] == (recipe == "whole_unet")
    assert [len(prompts) for prompts, _ in second["rollouts"].values()] == [2, 2, 0]
    assert sum(alone["batches"]) == 2 * sum(first["batches"]) == first["own_pairs"] + second["own_pairs"]
    norms = [log["grad_norm"] for log in alone["logs"] if "grad_norm" in log]
    assert all(norm > run_fsdp2.COMPARED["max_grad_norm"] for norm in norms)  # all steps were clipped
    for a, b in zip(first["steps"], second["steps"], strict=True):
        assert_same_bits(a, b)
    assert_close(first["steps"], alone["steps"])
    assert_same_logs(first, second, alone)
    assert_same_output(their_folder, own_folder, WHOLE if recipe == "whole_unet" else LORA)
    assert_same_checkpoint(their_folder / "checkpoint-2", own_folder / "checkpoint-2", files_of_deepspeed(2))


@needs_deepspeed
@pytest.mark.parametrize("family", run_fsdp2.FAMILIES)
def test_a_step_of_every_other_family_under_zero_3(compared, tmp_path, family):
    assert_same_step_of_a_family(compared, tmp_path, family)


@needs_deepspeed
def test_zero_3_in_half_precision_starts_from_the_reference(compared):
    for rank in results(compared, "half_precision"):
        assert_starts_from_the_reference(rank)
    assert_all_weights_in_bfloat16(compared)


def assert_all_weights_in_bfloat16(folder: Path):
    """Both ranks sample the same image with what they have trained."""
    ranks = results(folder, "half_precision_of_all")
    for rank in ranks:
        assert rank["dtypes"] == {torch.bfloat16}
        assert_starts_from_the_reference(rank)
    assert_same_bits(ranks[0]["images"], ranks[1]["images"])


@needs_deepspeed
@pytest.mark.parametrize("recipe", ["transformer", "whole_unet"])
def test_a_resumed_run_of_zero_3_is_the_same_run(resumed, recipe):
    assert_resumed_run_is_the_same(resumed, recipe)
    # Of a LoRA, the frozen base is not in the checkpoint.
    checkpoint = resumed / f"resumed_{recipe}" / "out" / "checkpoint-1"
    assert checkpoint_problems(checkpoint, SPOTrainer.checkpoint_files) == []
    state = torch.load(checkpoint / "global_step1" / "zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)
    trained = load_file(checkpoint / (WHOLE if recipe == "whole_unet" else LORA))
    assert len([name for name in state["module"] if "pos_embed" not in name]) == len(trained)  # that one is a buffer


@needs_deepspeed
def test_a_whole_denoiser_under_zero_2(tmp_path):
    """Gradients and states are spread, weights are not. A LoRA's run that is resumed is the same run."""
    config = adjusted("deepspeed_zero2.yaml", tmp_path, use_cpu=True)
    scenarios = ("compared_whole_unet", "half_precision_of_all", "resumed_transformer")
    run = launch(tmp_path, *scenarios, config=config, program=("run_zero3.py",), bound=BOUND)
    assert run.status == 0, run.output[-5000:]
    first, second = results(tmp_path, "compared_whole_unet")
    own_folder = tmp_path / "alone"
    own_folder.mkdir()
    alone = run_fsdp2.replay(own_folder, run_fsdp2.whole_unet, [first["rollouts"], second["rollouts"]])
    assert first["partitioned"] == 0 < first["present"]
    assert_close(first["steps"], alone["steps"])
    assert_same_logs(first, second, alone)
    assert_same_output(tmp_path / "compared_whole_unet" / "out", own_folder / "out", WHOLE)
    assert_resumed_run_is_the_same(tmp_path, "transformer")
    assert_all_weights_in_bfloat16(tmp_path)


@needs_deepspeed
def test_workers_find_the_pairs_of_zero_3(resumed):
    assert_workers_find_the_pairs_of_the_shards(resumed)


@needs_deepspeed
@pytest.mark.parametrize("recipe", ["unet", "whole_unet"])
def test_weights_are_loaded_into_the_parts_of_zero_3(resumed, recipe):
    """`load_model` while training: the weights are those of the file, and the next step starts from them."""
    for rank in results(resumed, "loaded_again"):
        found = rank[recipe]
        assert_same_bits(found["loaded"], found["saved"])
        assert not all(torch.equal(a, b) for a, b in zip(found["before"], found["saved"], strict=True))
        # SGD with a tiny learning rate: the next step begins where the file is, not where the run was.
        for loaded, after, before in zip(found["saved"], found["after"], found["before"], strict=True):
            assert (after - loaded).norm() <= 1e-3 * max((before - loaded).norm(), 1e-6)


class TestRefusals:
    """What does not work is said before anything is loaded, by the names of accelerate's configuration."""

    @pytest.fixture
    def config(self, tmp_path, monkeypatch):
        """A config as `accelerate launch` with `deepspeed_zero3.yaml` makes it; the plugin itself needs DeepSpeed."""

        class Plugin:
            zero_stage, zero3_init_flag = 3, False
            deepspeed_config = {"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}}

        config = tiny_spo_config(tmp_path)
        config.deepspeed_plugin = Plugin()
        check_sharding(config)
        return config

    @pytest.mark.parametrize(
        ("name", "problem"),
        [("offload_param", "offload_param_device: none"), ("offload_optimizer", "offload_optimizer_device: none")],
    )
    def test_offloading(self, config, name, problem):
        config.deepspeed_plugin.deepspeed_config = {"zero_optimization": {name: {"device": "cpu"}}}
        with pytest.raises(ValueError, match=f"SPO under DeepSpeed ZeRO-3: set `{problem}"):
            check_sharding(config)

    def test_networks_in_parts(self, config):
        config.deepspeed_plugin.zero3_init_flag = True
        with pytest.raises(ValueError, match="SPO under DeepSpeed ZeRO-3: set `zero3_init_flag: false`"):
            check_sharding(config)

    def test_settings_of_the_run(self, config):
        config.compile_regions = True
        with pytest.raises(ValueError, match="SPO under DeepSpeed ZeRO-3: .*compile_regions"):
            check_sharding(config)

    def test_a_reward_model_that_would_be_saved_without_weights(self, config):
        zero = config.deepspeed_plugin.deepspeed_config["zero_optimization"]
        with pytest.raises(ValueError, match="zero3_save_16bit_model: true"):
            check_zero3_of_a_reward(config)
        config.deepspeed_plugin.deepspeed_config = {
            "zero_optimization": {**zero, "stage3_gather_16bit_weights_on_model_save": True}
        }
        check_zero3_of_a_reward(config)

    def test_the_lower_stages_have_no_such_limits(self, config):
        config.compile_regions, config.deepspeed_plugin.zero_stage = True, 2
        check_sharding(config)

    @pytest.mark.parametrize(
        ("name", "reader", "message"),
        [
            ("global_step1", None, "was written with DeepSpeed and this run trains without DeepSpeed"),
            ("global_step1", "FSDP", "was written with DeepSpeed and this run trains with FSDP"),
            ("optimizer.pt", "DeepSpeed", "was written without FSDP and DeepSpeed and this run trains with DeepSpeed"),
        ],
    )
    def test_a_checkpoint_of_another_kind(self, tmp_path, name, reader, message):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=message):
            check_optimizer_file(tmp_path, reader)

    def test_another_number_of_processes(self, tmp_path):
        folder = tmp_path / "checkpoint-1"
        (folder / "global_step1").mkdir(parents=True)
        (folder / "trainer_state.json").write_text("{}")
        for rank in range(2):
            torch.save({}, folder / f"rng_state_{rank}.pth")
        assert checkpoint_to_resume(folder, tmp_path, world_size=2) == str(folder)
        with pytest.raises(ValueError, match=re.escape("2 process(es) with DeepSpeed and this run has 3")):
            checkpoint_to_resume(folder, tmp_path, world_size=3)
