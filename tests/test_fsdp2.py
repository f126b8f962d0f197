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
Why this file exists: a denoiser that is spread over processes hangs as soon as one of them calls it once less often, and a
process that trains on its part of the wrong thing looks well. Two processes with half of the denoiser each are compared with
one that has all of it, on what the two found together.

`run_fsdp2.py` is the program.
"""

import json
import math
import re
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image, ImageChops
from safetensors import safe_open
from safetensors.torch import load_file

from trl_spo import LatentRewardModel, SPOTrainer
from trl_spo.training.checkpointing import check_optimizer_file, checkpoint_problems
from trl_spo.training.sharded_optimizer import SHARDS_NAME
from trl_spo.training.sharding import check_denoiser_for_sharding, check_sharding

from . import run_fsdp2
from .test_distributed import (
    CONFIGS,
    ROUNDING,
    adjusted,
    assert_close,
    assert_logs_close,
    assert_same_bits,
    launch,
    results,
)
from .testing_utils import PROMPTS, brightness_reward, tiny_sd_pipeline, tiny_spo_config


BOUND = (
    600  # seconds of a launch with several scenarios, each of which trains; half a minute per process on free cores
)
LORA = "pytorch_lora_weights.safetensors"
WHOLE = "unet/diffusion_pytorch_model.safetensors"


def launch_sharded(folder: Path, *scenarios: str) -> Path:
    """The scenarios in two processes with `fsdp2.yaml`, on the CPU."""
    config = adjusted("fsdp2.yaml", folder, use_cpu=True)
    run = launch(folder, *scenarios, config=config, program=("run_fsdp2.py",), bound=BOUND)
    assert run.status == 0, run.output[-5000:]
    return folder


def assert_tensors_close(ours: dict, theirs: dict):
    assert ours.keys() == theirs.keys() != set()
    for name, value in theirs.items():
        tolerance = ROUNDING["rtol"] * max(value.abs().max().item(), 1e-6)
        torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    scenarios = ("compared_unet", "compared_whole_unet", "compared_transformer", "half_precision", "families")
    return launch_sharded(tmp_path_factory.mktemp("compared"), *scenarios)


UNITS = {
    "unet": {"BasicTransformerBlock", "ResnetBlock2D", "UNet2DConditionModel"},
    "whole_unet": {"BasicTransformerBlock", "ResnetBlock2D", "UNet2DConditionModel"},
    "transformer": {"JointTransformerBlock", "SD3Transformer2DModel"},
}


@pytest.mark.parametrize("recipe", UNITS)
class TestOneProcessOnThePooledPairs:
    """
    Accumulation, clipping, a last round with a prompt for one rank alone, branches in random places, sample images and uneven
    evaluations: all of it at once, so that everything that could call the denoiser unequally often is there.
    """

    @pytest.fixture
    def both(self, compared, tmp_path, recipe):
        first, second = results(compared, f"compared_{recipe}")
        alone = run_fsdp2.replay(tmp_path, getattr(run_fsdp2, recipe), [first["rollouts"], second["rollouts"]])
        return first, second, alone, tmp_path / "out", compared / f"compared_{recipe}" / "out"

    def test_equals_it(self, both, recipe):
        first, second, alone, own_folder, their_folder = both
        for rank in (first, second):
            assert {name.removeprefix("FSDP") for name in rank["units"]} >= UNITS[recipe]
            assert rank["frozen_is_sharded"] == (recipe == "whole_unet")
        # The last round has a prompt for rank 0 only; the padding of rank 1 is nowhere.
        assert [len(prompts) for prompts, _ in second["rollouts"].values()] == [2, 2, 0]
        found = first["own_pairs"] + second["own_pairs"]
        assert sum(alone["batches"]) == 2 * sum(first["batches"]) == 2 * sum(second["batches"]) == found
        places = [{b.step for b in rank["rollouts"][0][1].branches} for rank in (first, second)]
        assert places[0] == places[1] and len(places[0]) == 2

        # Gradients, after clipping, and weights: those of all processes, and those of one.
        for a, b in zip(first["gradients"], second["gradients"], strict=True):
            assert_same_bits(a, b)
        norms = [torch.nn.utils.get_total_norm(step) for step in alone["gradients"]]
        assert all(norm == pytest.approx(run_fsdp2.COMPARED["max_grad_norm"], rel=1e-3) for norm in norms)
        assert_close(first["gradients"], alone["gradients"])
        assert_close(first["steps"], alone["steps"])

        assert_same_logs(first, second, alone)
        assert_same_output(their_folder, own_folder, WHOLE if recipe == "whole_unet" else LORA)
        # Plain SGD has no tensors, so no shard.
        assert_same_checkpoint(
            their_folder / "checkpoint-2", own_folder / "checkpoint-2", {f"{SHARDS_NAME}/settings.json"}
        )


def assert_same_logs(first: dict, second: dict, alone: dict):
    """Every logged number, and evaluations."""
    assert first["logs"] == second["logs"]
    assert_logs_close(first["logs"], alone["logs"])
    for name, value in alone["evaluation"].items():
        if "runtime" not in name:
            assert first["evaluation"][name] == second["evaluation"][name]
            assert first["evaluation"][name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def assert_same_output(theirs: Path, ours: Path, file: str):
    """What is published, and the sample images."""
    assert_tensors_close(load_file(theirs / file), load_file(ours / file))
    assert "FSDP" not in (theirs / "README.md").read_text()
    names = sorted(path.name for path in (ours / "images").glob("*.png"))
    assert names == sorted(path.name for path in (theirs / "images").glob("*.png")) != []
    for name in names:
        pair = [Image.open(folder / "images" / name) for folder in (ours, theirs)]
        assert max(high for _, high in ImageChops.difference(*pair).getextrema()) <= 1, name


def assert_same_checkpoint(theirs: Path, ours: Path, own_files: set[str]):
    """
    Weights to rounding, waiting pairs to the bit; whole tensors, of what is trained only. `own_files`: the state of the
    optimizer as the shards write it.
    """
    files = [path for path in ours.rglob("*.safetensors") if path.name != "spo_pairs.safetensors"]
    for path in files:
        assert_tensors_close(load_file(theirs / path.relative_to(ours)), load_file(path))
    assert len(files) == 1
    for path in ours.rglob("config.json"):
        assert path.read_text() == (theirs / path.relative_to(ours)).read_text()
    pools = [load_file(folder / "spo_pairs.safetensors") for folder in (theirs, ours)]
    assert pools[0].keys() == pools[1].keys()
    assert all(torch.equal(value, pools[1][name]) for name, value in pools[0].items())
    states = [json.loads((folder / "spo_state.json").read_text()) for folder in (theirs, ours)]
    for name in ("num_prompts_seen", "num_pairs_seen", "pool_prompts", "transitions", "base_weights"):
        assert states[0][name] == states[1][name] != {}, name
    expected = {p.relative_to(ours).as_posix() for p in ours.rglob("*") if p.is_file()}
    expected -= {"optimizer.pt", "rng_state.pth"}
    names = {p.relative_to(theirs).as_posix() for p in theirs.rglob("*") if p.is_file()}
    assert names == expected | own_files | {"rng_state_0.pth", "rng_state_1.pth"}


def test_the_bytes_that_travel(compared):
    """
    A pair of the tiny model has four latents of 4 x 8 x 8 float32, whether a byte, timestep and row of 8 each, and two scores of
    4: 4,121 bytes. It stays where it was found, unless another process has too few: of the others it knows the prompts alone. A
    call of the denoiser gathers every weight once, in equal parts, the last ones padded.
    """
    ranks = results(compared, "compared_unet")
    sent = sum(pairs for rank in ranks for pairs, _ in rank["rows"])
    found = [rank["own_pairs"] for rank in ranks]
    assert abs(found[0] - found[1]) / 2 <= sent < sum(found) / 2 and sent > 0
    for rank in ranks:
        assert len(rank["described"]) == 3 and sum(pairs for pairs, _ in rank["described"]) == rank["own_pairs"]
        for pairs, size in rank["described"]:
            assert size <= 1000 + 50 * pairs
        assert all(size == 4121 * pairs for pairs, size in rank["rows"])
        calls, gathered = rank["sampling"]
        assert calls == 5  # steps of the sampler, with two prompts and guidance in one call
        once = 0
        for shape, itemsize in rank["parameters"]:
            rows = math.ceil(shape[0] / 2) * 2
            once += rows * math.prod(shape[1:]) * itemsize
        assert gathered == calls * once


@pytest.mark.parametrize("family", run_fsdp2.FAMILIES)
def test_a_step_of_every_other_family(compared, tmp_path, family):
    assert_same_step_of_a_family(compared, tmp_path, family)


def assert_same_step_of_a_family(compared: Path, folder: Path, family: str):
    first, second = (rank[family] for rank in results(compared, "families"))
    alone = run_fsdp2.family_alone(folder, family, [first["rollouts"], second["rollouts"]])
    assert first["is_sharded"] and sum(alone["batches"]) == 2 * sum(first["batches"])
    assert_same_bits(first["weights"], second["weights"])
    assert_close([first["weights"]] * 2, [alone["weights"]] * 2)
    # The second matrices begin at zero, and move.
    moved = [weight for weight in alone["weights"] if 0 < weight.abs().max() < 0.1]
    assert len(moved) >= 3


def test_half_precision_starts_from_the_reference(compared, tmp_path):
    """The first loss is ln 2 and the first ratios are 1, exactly; the gradient is that of one process as far as bfloat16 goes."""
    ranks = results(compared, "half_precision")
    alone = run_fsdp2.half_precision_alone(tmp_path, [rank["rollouts"] for rank in ranks])
    for run in (*ranks, alone):
        assert_starts_from_the_reference(run)
    ours = torch.cat([gradient.flatten() for gradient in ranks[0]["gradients"][0]])
    theirs = torch.cat([gradient.flatten() for gradient in alone["gradients"][0]])
    assert theirs.norm() > 0 and (ours - theirs).norm() < 0.05 * theirs.norm()


def assert_starts_from_the_reference(run: dict):
    log = run["logs"][0]
    assert log["ratio/chosen"] == log["ratio/rejected"] == 1 and log["kl"] == 0
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-6)


GOOD = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


class TestRefusals:
    """What does not work is said before anything is loaded. `accelerate launch` tells it through the environment alone."""

    @pytest.fixture(autouse=True)
    def good(self, monkeypatch):
        for name, value in GOOD.items():
            monkeypatch.setenv(name, value)

    def test_the_configuration_of_the_package_is_accepted(self, tmp_path):
        check_sharding(tiny_spo_config(tmp_path))
        settings = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())["fsdp_config"]
        for name, value in GOOD.items():
            if name.startswith("FSDP_"):
                assert str(settings[name.lower()]).lower() == value.lower()

    @pytest.mark.parametrize(
        ("variable", "value", "message"),
        [
            ("FSDP_VERSION", "1", "FSDP 1 is refused"),
            ("FSDP_AUTO_WRAP_POLICY", "NO_WRAP", "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"),
            ("FSDP_TRANSFORMER_CLS_TO_WRAP", "ResnetBlock2D", "name no classes"),
            ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: false"),
            ("FSDP_RESHARD_AFTER_FORWARD", "false", "fsdp_reshard_after_forward: true"),
            ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading: false"),
            ("FSDP_ACTIVATION_CHECKPOINTING", "true", "use `gradient_checkpointing=True`"),
            ("FSDP_IGNORED_MODULES", "norm", "leave out `fsdp_ignored_modules`"),
        ],
    )
    def test_of_fsdp(self, tmp_path, monkeypatch, variable, value, message):
        monkeypatch.setenv(variable, value)
        with pytest.raises(ValueError, match=re.escape(message)):
            check_sharding(tiny_spo_config(tmp_path))

    @pytest.mark.parametrize(
        "settings",
        [{"compile_regions": True}, {"channels_last": True}, {"memory_budget": 8.0}, {"optim": "adafactor"}],
    )
    def test_of_the_run(self, tmp_path, settings):
        with pytest.raises(ValueError, match=f"SPO under FSDP 2: .*{next(iter(settings))}"):
            check_sharding(tiny_spo_config(tmp_path, **settings))

    def test_half_precision_with_a_scaler(self, tmp_path):
        config = tiny_spo_config(tmp_path)
        config.fp16 = True  # a config refuses it on a CPU
        with pytest.raises(ValueError, match="`fp16` is refused"):
            check_sharding(config)

    def test_shards_of_optimizers_by_an_old_torch(self, tmp_path, monkeypatch):
        """Its storage writes no safetensors, so there is no class to import."""
        monkeypatch.setattr("torch.distributed.checkpoint.HuggingFaceStorageWriter", None)
        check_sharding(tiny_spo_config(tmp_path))
        monkeypatch.delattr("torch.distributed.checkpoint.HuggingFaceStorageWriter")
        with pytest.raises(ValueError, match="SHARDED_STATE_DICT` needs torch 2.8.*set FULL_STATE_DICT"):
            check_sharding(tiny_spo_config(tmp_path))
        monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
        check_sharding(tiny_spo_config(tmp_path))

    def test_one_process_has_nothing_to_shard(self, tmp_path):
        with pytest.raises(ValueError, match="accelerate does not shard here"):
            SPOTrainer(tiny_spo_config(tmp_path), tiny_sd_pipeline(tmp_path), brightness_reward, PROMPTS)

    def test_a_reward_that_stops_inside_the_denoiser(self, tmp_path):
        pipeline = tiny_sd_pipeline(tmp_path)
        reward = LatentRewardModel.from_pipeline(pipeline, shared=True, projection_dim=12)
        with pytest.raises(ValueError, match="shares the denoiser and stops in the middle of it"):
            SPOTrainer(tiny_spo_config(tmp_path), pipeline, reward, PROMPTS)

    def test_weights_in_eight_bits(self):
        network = torch.nn.Linear(2, 2)
        network.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match="A quantised denoiser, or one under layerwise casting, cannot be spread"):
            check_denoiser_for_sharding(network)

    @pytest.mark.parametrize(
        ("name", "own", "other", "message"),
        [
            ("optimizer.bin", "FSDP", None, "was written with FSDP and this run trains without FSDP"),
            (SHARDS_NAME, "FSDP", None, "was written with FSDP and this run trains without FSDP"),
            ("optimizer.pt", None, "FSDP", "was written without FSDP and DeepSpeed and this run trains with FSDP"),
        ],
    )
    def test_a_checkpoint_of_the_other_kind(self, tmp_path, name, own, other, message):
        (tmp_path / name).touch()
        check_optimizer_file(tmp_path, own)
        with pytest.raises(ValueError, match=message):
            check_optimizer_file(tmp_path, other)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    scenarios = ("resumed_transformer", "resumed_whole_unet", "rolled_out_apart")
    return launch_sharded(tmp_path_factory.mktemp("resumed"), *scenarios)


def assert_resumed_run_is_the_same(resumed: Path, recipe: str):
    for number, rank in enumerate(results(resumed, f"resumed_{recipe}")):
        first, second = rank["uninterrupted"], rank["resumed"]
        assert_same_bits(first["weights"], second["weights"])
        assert first["batches"][1:] == second["batches"] and len(second["batches"]) == 1
        assert first["logs"][:-1] == second["logs"][:-1]  # the last has the mean loss of this call of `train`
        assert first["moments"].keys() == second["moments"].keys() != set()
        assert_same_bits(list(first["moments"].values()), list(second["moments"].values()))
        pools = [part["waiting"].pop("pool") for part in (first, second)]
        assert (len(pools[0]) > 0) == (number == 0)  # the first rank has the pairs of all, for the checkpoint
        assert first["waiting"] == second["waiting"] and first["waiting"]["pool_prompts"]
        assert_same_bits(list(pools[0].values()), list(pools[1].values()))
    # The last checkpoints of both have the same tensors and metadata; in which order the header names them is not fixed.
    file = WHOLE if recipe == "whole_unet" else LORA
    files = [resumed / f"resumed_{recipe}" / name / "checkpoint-2" / file for name in ("out", "again")]
    first, second = (load_file(file) for file in files)
    assert first.keys() == second.keys() != set()
    assert_same_bits([first[name] for name in first], [second[name] for name in first])
    with safe_open(files[0], "pt") as first, safe_open(files[1], "pt") as second:
        assert first.metadata() == second.metadata()


@pytest.mark.parametrize("recipe", ["transformer", "whole_unet"])
def test_a_resumed_run_is_the_same_run(resumed, recipe):
    assert_resumed_run_is_the_same(resumed, recipe)
    # Of the transformer each process wrote its part of the optimizer's state, of the UNet the first one all of it; a run that
    # writes it the other way has read it.
    shards = {f"{SHARDS_NAME}/shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)}
    kinds = [{"optimizer.bin"}, shards] if recipe == "whole_unet" else [shards, {"optimizer.bin"}]
    for run, kind in zip(("out", "again"), kinds, strict=True):
        folder = resumed / f"resumed_{recipe}" / run / "checkpoint-2"
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        assert names & {"optimizer.bin", *shards} == kind


def test_the_parts_of_the_optimizer_state(resumed, tmp_path):
    """Each file has half of the moments, and says which; a checkpoint that lacks one is not complete."""
    checkpoint = resumed / "resumed_transformer" / "out" / "checkpoint-1"
    sizes = [sum(value.numel() for value in load_file(file).values()) for file in shard_files(checkpoint)]
    whole = sum(value.numel() for value in load_file(checkpoint / LORA).values())
    assert sum(sizes) == 2 * whole and max(sizes) < 1.2 * whole
    settings = json.loads((checkpoint / SHARDS_NAME / "settings.json").read_text())
    assert settings["files"] == [file.name for file in shard_files(checkpoint)]
    assert {v for n, v in settings["numbers"].items() if n.endswith("/step")} == {1.0}
    assert checkpoint_problems(checkpoint, SPOTrainer.checkpoint_files) == []
    copy = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoint, copy)
    shard_files(copy)[1].unlink()
    problem = f"{SHARDS_NAME}/{shard_files(checkpoint)[1].name} is missing"
    assert checkpoint_problems(copy, SPOTrainer.checkpoint_files) == [problem]
    (copy / SHARDS_NAME / "settings.json").write_text("{")
    assert any("settings.json" in problem for problem in checkpoint_problems(copy, SPOTrainer.checkpoint_files))


def test_the_state_of_another_optimizer_is_refused(resumed):
    """By every rank, before a tensor is read: names of steps and of settings differ."""
    for rank in results(resumed, "resumed_transformer"):
        assert re.search("is that of another optimizer or of other parameters.*Resume with `optim`", rank["refusal"])


def shard_files(checkpoint: Path) -> list[Path]:
    return sorted((checkpoint / SHARDS_NAME).glob("*.safetensors"))


def test_workers_with_the_whole_denoiser_find_the_pairs_of_the_shards(resumed):
    assert_workers_find_the_pairs_of_the_shards(resumed)


def assert_workers_find_the_pairs_of_the_shards(resumed: Path):
    """Weights travel from shards to whole denoisers before each rollout; the run is the one that rolls out by its shards."""
    for rank in results(resumed, "rolled_out_apart"):
        shards, apart = rank["shards"], rank["apart"]
        assert len(shards["losses"]) == len(apart["losses"]) >= 2
        assert apart["losses"] == pytest.approx(shards["losses"], rel=1e-5)
        assert_tensors_close(dict(enumerate(apart["weights"])), dict(enumerate(shards["weights"])))


def test_three_processes_go_on_where_two_had_been(resumed):
    """The weights, moments and pairs of the checkpoint, spread over three: the warning, and no pair is lost."""
    config = adjusted("fsdp2.yaml", resumed, use_cpu=True, num_processes=3)
    run = launch(resumed, "resumed_by_others", config=config, program=("run_fsdp2.py",), bound=BOUND)
    assert run.status == 0, run.output[-5000:]
    assert "was written by 2 process(es) and this run has 3" in run.output
    checkpoint = resumed / "resumed_transformer" / "out" / "checkpoint-1"
    state = json.loads((checkpoint / "spo_state.json").read_text())
    ranks = [torch.load(resumed / f"resumed_by_others_{rank}.pt", weights_only=False) for rank in range(3)]
    saved = sorted(float(value.double().norm()) for value in load_file(checkpoint / LORA).values())
    moments = defaultdict(float)
    for file in shard_files(checkpoint):
        for name, value in load_file(file).items():
            if name.endswith("/exp_avg"):
                moments[name] += float(value.double().square().sum())
    for rank in ranks:
        assert_same_bits(rank["moments"], ranks[0]["moments"])
        squares = sorted(float(value.double().square().sum()) for value in rank["moments"])
        assert squares == pytest.approx(sorted(moments.values()), rel=1e-6) and squares[-1] > 0
        assert_same_bits(rank["beginning"], ranks[0]["beginning"])
        assert_same_bits(rank["weights"], ranks[0]["weights"])
        assert sorted(float(value.double().norm()) for value in rank["beginning"]) == pytest.approx(saved, rel=1e-6)
        assert not all(torch.equal(a, b) for a, b in zip(rank["beginning"], rank["weights"], strict=True))
        assert set(rank["steps"]) == {2.0} and len(rank["logs"]) == 2
        # Three pairs for each of three processes; what waits are those of the checkpoint and of new rollouts, less these.
        assert rank["pairs"] == state["num_pairs_seen"] + 9
        assert rank["waiting"] == ranks[0]["waiting"]
