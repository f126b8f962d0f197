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
Why this file exists: a number of the benchmark is quoted as a property of the method. The counts are therefore checked
against what SPO asks for on paper, ratios against their definition, and a run with wrong options must end before the
models are built. Everything runs as users run it, through the command line.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PHASES = {
    "unet_rollout",
    "vae_decode",
    "reward",
    "reward_text",
    "policy_forward",
    "policy_backward",
    "reference_forward",
    "other",
}
KEYS = {
    "preset",
    "device",
    "dtype",
    "threads",
    "num_prompts",
    "num_pairs",
    "pairs_per_second",
    "pairs_per_cpu_second",
    "seconds",
    "peak_memory_mib",
    "peak_memory_above_models_mib",
    "evals_per_prompt",
    "evals_per_pair",
    "warm_up_seconds",
    "hardware",
    "versions",
    "options",
    "repeats",
}
OTHER_PROGRAM = """
import json, sys
assert sys.argv[-2] == "--json"
result = {"pairs_per_second": 1.0, "seconds": {"other": 2.0, "total": 2.0}, "num_pairs": 2}
result |= {"peak_memory_mib": 4096.0, "peak_memory_above_models_mib": 0.0, "name": "other", "repeats": []}
json.dump(result, open(sys.argv[-1], "w"))
"""


def run(program, *arguments):
    command = [sys.executable, str(BENCHMARKS / program), *map(str, arguments)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """One run for all tests: the default options, K = 2 with accumulation in bfloat16 and without guidance, and a foreign program."""
    folder = tmp_path_factory.mktemp("throughput")
    program = folder / "other.py"
    program.write_text(OTHER_PROGRAM)
    process = run(
        *("throughput.py", "--preset", "tiny", "--repeats", 1, "--threads", 1, "--json", folder / "result.json"),
        *("--against", "two: num_candidates=2,gradient_accumulation_steps=4,guidance_scale=1.0,bf16=true"),
        *("--against_command", f"other: {sys.executable} {program}"),
    )
    assert process.returncode == 0, process.stderr
    return json.loads((folder / "result.json").read_text()), process.stdout, folder


def test_keys_and_counts(result):
    """
    K = 4, 20 steps, branches from step 4 (the fifth). One prompt: 5 plain predictions, then 4 candidates at each of the
    steps 5 to 19, all guided, 2 (5 + 4 * 15) = 130; 16 branches score 4 images each. One pair: one x_t, guided.
    """
    report, _, _ = result
    assert set(report) == KEYS | {"arms", "ratios"}
    base, two, other = report["arms"]
    assert set(base) == set(two) == KEYS | {"label"}
    assert {key: report[key] for key in KEYS} == {key: base[key] for key in KEYS}
    assert (base["preset"], base["device"], base["dtype"], base["threads"]) == ("tiny", "cpu", "float32", 1)
    assert (base["num_prompts"], base["num_pairs"]) == (2, 2 * 16)
    assert base["evals_per_prompt"] == {"unet": 130, "vae_decode": 64, "reward_vision": 64, "reward_text": 1}
    assert base["evals_per_pair"] == {"policy_forward": 2, "policy_backward": 2, "reference_forward": 2}
    assert two["num_pairs"] == base["num_pairs"]  # also in half precision, where random weights make equal scores
    assert two["options"] == {
        "num_candidates": 2,
        "gradient_accumulation_steps": 4,
        "guidance_scale": 1.0,
        "bf16": True,
    }
    assert two["evals_per_prompt"] == {"unet": 5 + 2 * 15, "vae_decode": 32, "reward_vision": 32, "reward_text": 1}
    assert two["evals_per_pair"] == {"policy_forward": 1, "policy_backward": 1, "reference_forward": 1}


def test_time_and_memory_add_up(result):
    report, _, _ = result
    for arm in report["arms"][:2]:
        seconds = arm["seconds"]
        assert set(seconds) == PHASES | {"total"}
        assert all(value > 0 for value in seconds.values())
        assert sum(seconds[phase] for phase in PHASES) == pytest.approx(seconds["total"])
        assert arm["pairs_per_second"] == pytest.approx(arm["num_pairs"] / seconds["total"], rel=0.01)
        assert 0 < arm["peak_memory_above_models_mib"] < arm["peak_memory_mib"]
        # One thread, which waits for nobody: its CPU time is the time of the loop, or less where others run beside.
        cpu_seconds = arm["num_pairs"] / arm["pairs_per_cpu_second"]
        assert 0.3 * seconds["total"] < cpu_seconds < 1.5 * seconds["total"]
        assert [set(repeat) for repeat in arm["repeats"]] == [
            KEYS - {"preset", "device", "dtype", "threads", "hardware", "versions", "options", "repeats"}
        ]


def test_ratios_and_table(result):
    report, output, _ = result
    base, two, other = report["arms"]
    ratios = report["ratios"]
    assert set(ratios) == {"two", "other"}
    speed = two["pairs_per_second"] / base["pairs_per_second"]
    assert ratios["two"]["pairs_per_second"] == {"median": speed, "min": speed, "max": speed, "values": [speed]}
    assert ratios["other"]["pairs_per_second"]["median"] == pytest.approx(1 / base["pairs_per_second"])
    assert ratios["other"]["peak_memory_mib"]["median"] == pytest.approx(4096 / base["peak_memory_mib"])
    assert not {"peak_memory_above_models_mib", "pairs_per_cpu_second"} & set(ratios["other"])  # it has none
    per_cpu_second = two["pairs_per_cpu_second"] / base["pairs_per_cpu_second"]
    assert ratios["two"]["pairs_per_cpu_second"]["values"] == [per_cpu_second]
    rows = [line.split("|")[1].strip() for line in output.strip().splitlines()[-3:]]
    assert rows == ["base", "two", "other"]


def test_plot(result):
    import matplotlib.image

    _, _, folder = result
    process = run("plot_throughput.py", folder / "result.json", "--output", folder / "images" / "throughput.png")
    assert process.returncode == 0, process.stderr
    image = matplotlib.image.imread(folder / "images" / "throughput.png")
    colours = {tuple(round(255 * value) for value in pixel[:3]) for row in image for pixel in row}
    assert {(0x33, 0x22, 0x88), (0xDD, 0xAA, 0x33), (0xBB, 0xBB, 0xBB)} <= colours  # UNet, policy, other


def script(name: str):
    """The module itself, for what needs no run; the scripts find each other beside them."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def throughput():
    return script("throughput")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "num_candidate=2"], "no field 'num_candidate'. Did you mean num_candidates?"),
        (["--set", "num_candidates=two"], "`num_candidates=two` cannot be used"),
        (
            ["--set", "num_candidates=1"],
            "base: `num_candidates=1` cannot be used: `num_candidates` must be at least 2",
        ),
        (["--set", "num_candidates"], "must look like `name=value`"),
        (["--set", "max_steps=3"], "`max_steps` belongs to the benchmark"),
        (
            ["--against", "third: gradient_accumulation_steps=3"],
            "third: `gradient_accumulation_steps=3` does not divide",
        ),
        (["--against", "eta=0.5", "--against", "eta=0.5"], "needs a label of its own"),
        (["--repeats", "0"], "must be at least 1"),
    ],
)
def test_wrong_options_end_before_any_work(throughput, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["throughput.py", *arguments])
    with pytest.raises(SystemExit) as error:
        throughput.main()
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_failing_command_is_named(throughput, tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('out of paint')"]
    with pytest.raises(SystemExit, match="(?s)painter: .* ended with status 1:.*out of paint"):
        throughput.run_process("painter", command, None, tmp_path / "result.json")


def test_medians_and_paired_ratios(throughput):
    """Speeds 1, 2, 4 against 2, 2, 2: pairs of runs give 2, 1 and 0.5, whatever the medians are."""
    base, other = (
        [{**dict.fromkeys(throughput.MEASURES, value), "seconds": {"other": value}} for value in values]
        for values in ((1.0, 2.0, 4.0), (2.0, 2.0, 2.0))
    )
    ratio = throughput.compare(base, other)["pairs_per_second"]
    assert ratio == {"median": 1.0, "min": 0.5, "max": 2.0, "values": [2.0, 1.0, 0.5]}
    assert throughput.summarize(base)["seconds"] == {"other": 2.0}


def test_options_are_read_in_the_types_of_the_config(throughput):
    options = throughput.parse_options(
        ["eta=0.5", "train_cfg=false", "rollout_micro_batch_size=none", "resample=chosen"]
    )
    assert options == {"eta": 0.5, "train_cfg": False, "rollout_micro_batch_size": None, "resample": "chosen"}
    config = throughput.build_config("tiny", "cpu", {"gradient_accumulation_steps": 4}, "unused")
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (2, 4)


@pytest.fixture(scope="module")
def gpu_report(tmp_path_factory):
    """Three arms of the benchmark for GPUs, on the CPU: one that is profiled, the approximate one, and a latent reward."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    arguments = ("--device", "cpu", "--preset", "tiny", "--arms", "exact, eager; 224 px, K = 2; LPO", "--json", path)
    process = run("gpu.py", *arguments)
    assert process.returncode == 0, process.stderr
    return json.loads(path.read_text()), process.stdout


def test_a_latent_reward_costs_half_a_unet_per_candidate(throughput):
    """One guided prediction per step, both halves of the guidance for each of four candidates, and no decoding."""
    options = throughput.parse_options(["reward=latent", "branch_start_step=0", "num_inference_steps=5"])
    assert throughput.build_config("tiny", "cpu", options, "unused").branch_start_step == 0
    result = throughput.measure("tiny", "cpu", "float32", options)
    assert result["evals_per_prompt"]["unet"] == 2 * 5
    assert result["evals_per_prompt"]["vae_decode"] == 0
    assert result["evals_per_prompt"]["reward_vision"] == 2 * 4 * 5
    assert result["num_pairs"] == 2 * 5  # two prompts, every step


def test_the_gpu_benchmark_runs(gpu_report):
    report, output = gpu_report
    eager, small, lpo = report["arms"].values()
    assert lpo["num_pairs"] == 2 * 20 and lpo["options"]["reward"] == "latent"  # every step branches
    assert (eager["num_pairs"], small["num_pairs"]) == (2 * 16, 2 * 16)
    assert eager["evals_per_prompt"]["vae_decode"] == 64 and eager["options"] == {"compile_regions": False}
    assert small["options"]["num_candidates"] == 2 and set(small["seconds"]) == {"total"}
    assert small["options"]["torch_compile_backend"] == "eager"  # the compiled path, without its compiler
    assert eager["hardware"]["matrix_tflops"] > 0 and eager["warm_up_seconds"] > 0
    assert f"| exact, eager | {eager['pairs_per_second']:.2f} | - |" in output and "| unet_rollout |" in output
    assert f"| 224 px scoring, K = 2, pairs/s | >= 30 | {small['pairs_per_second']:.2f} |" in output
    assert "| SDXL preset, pairs/s | >= 2.3 | - |" in output  # an arm that did not run has no number


@pytest.fixture(scope="module")
def gpu():
    return script("gpu")


def test_arithmetic_per_pair(gpu):
    """Of SD1.5: per prompt 130 UNet samples, 64 decodes and scores, one text, and the training of 16 pairs."""
    counted = json.loads((BENCHMARKS / "results" / "full_size.json").read_text())["sd15"]["network_tflop"]
    rollout = 130 * counted["unet"] + 64 * (counted["decode"] + counted["reward_image"]) + counted["reward_text"]
    assert gpu.tflop_per_pair("sd15", {}) == pytest.approx(rollout / 16 + counted["training"])
    assert gpu.tflop_per_pair("sd15", {"num_candidates": 2}) is None and gpu.tflop_per_pair("tiny", {}) is None


def test_arms_without_time_or_with_an_error_are_named(gpu, tmp_path, monkeypatch):
    arguments = gpu.parse_arguments(["--device", "cpu", "--preset", "tiny", "--minutes", "0.001"])
    results = gpu.measure(arguments)
    assert all(result["error"].startswith("skipped") for result in results.values())
    assert "| exact | skipped: " in gpu.table(results)
    failed = gpu.run_process([sys.executable, "-c", "raise SystemExit('out of paint')"], None, 60, tmp_path / "x.json")
    assert failed["error"].startswith("status 1") and failed["error"].endswith("out of paint")
    hanging = gpu.run_process([sys.executable, "-c", "import time; time.sleep(60)"], None, 1, tmp_path / "x.json")
    assert hanging == {"error": "not finished after 1 s"}


@pytest.mark.parametrize("arguments", [["--arms", "fast"], ["--minutes", "0"], ["--device", "cuda"]])
def test_the_gpu_benchmark_refuses(gpu, arguments, capsys):
    if arguments[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("There is a GPU.")
    with pytest.raises(SystemExit):
        gpu.parse_arguments(["--device", "cpu", *arguments])
    message = capsys.readouterr().err
    assert any(words in message for words in ("must be of exact", "must be positive", "there is no GPU"))


def test_pair_traffic(capsys, monkeypatch):
    """
    Nothing travels in one process. Of two pairs for two processes both are of one of them half of the time, and then one leaves:
    a quarter of all pairs. A row is four latents, two numbers of eight bytes, two of four, and a byte.
    """
    monkeypatch.syspath_prepend(BENCHMARKS.parent)
    traffic = importlib.import_module("benchmarks.pair_traffic")
    sizes = traffic.Sizes(prompts=10, branches=16, pairs_per_step=1)
    assert traffic.simulate(1, sizes, rounds=3)["travelled"] == 0
    two = traffic.simulate(2, sizes, rounds=20)
    assert two["travelled"] == pytest.approx(0.25, abs=0.03) and two["found"] == pytest.approx(160 * 2 / 3, rel=0.05)
    assert traffic.bytes_of_a_pair((4, 64, 64), torch.float16) == 4 * 4 * 64 * 64 * 2 + 2 * 8 + 2 * 4 + 1
    assert traffic.bytes_of_a_pair((4, 8, 8), torch.float32) == 4121  # which two processes sent in `test_fsdp2.py`
    monkeypatch.setattr(sys, "argv", ["pair_traffic.py", "--rounds", "2"])
    traffic.main()
    assert "| 512 |" in capsys.readouterr().out


def test_streaming(capsys, tmp_path, monkeypatch):
    """All prompts that are written are different, all jobs run, and the place that is saved is found again."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(BENCHMARKS.parent)
    streaming = importlib.import_module("benchmarks.streaming")
    streaming.write_prompts(tmp_path, 300)
    prompts = pyarrow.parquet.read_table(tmp_path / "train-00000.parquet")["prompt"].to_pylist()
    assert len(prompts) == len(set(prompts)) == 300
    streaming.main(["--num_prompts", "2000", "--folder", str(tmp_path / "prompts")])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith(("| streamed", "| listed"))]
    assert len(rows) == 2 and "2,000 prompts" in printed
    place = json.loads((tmp_path / "prompts" / "streamed.json").read_text())[0]["place"]
    assert (place["number"], place["row"]) == (0, 1800)


class TestRolloutSplit:
    """Numbers that can be computed by hand."""

    def costs(self, **changes):
        split = importlib.import_module("benchmarks.rollout_split")
        known = {"rollout": 2.0, "scoring": 1.0, "training": 1.0, "rollout_gathers": 60.0, "training_gathers": 30.0}
        return split, split.Costs(**{**known, "rollout_gib": 1.0, "training_gib": 1.0, **changes})

    def test_an_even_split_is_as_fast_as_none_and_never_faster(self):
        split, costs = self.costs()
        found = split.seconds_per_pair(costs, 8, gather_gb=30.0)
        assert found["together"] == (0.5, None)
        assert found["apart, ahead"] == (0.5, 6)
        assert found["apart"] == (pytest.approx(3 / 5 + 1 / 3), 5)
        assert found["sharded"] == ((3 + 2 + 1 + 1) / 8, None)
        assert found["sharded trainers, ahead"] == (pytest.approx(2 / 3), 5)
        for cards in (8, 64):
            for rollout in (0.1, 1.0, 10.0):
                _, other = self.costs(rollout=rollout)
                found = split.seconds_per_pair(other, cards, gather_gb=30.0)
                assert found["together"][0] <= found["apart, ahead"][0] + 1e-12

    def test_costs_of_a_preset(self):
        """SD1.5: 16 branches of four candidates give eight pairs if half of them do; a step calls three times."""
        split, _ = self.costs()
        costs = split.costs_of("sd15")
        assert costs.scoring > costs.rollout > costs.training > 0
        gigabytes = costs.training_gathers / 3 * 10  # ten pairs per micro-batch
        assert gigabytes == pytest.approx(1.72, rel=0.05)  # 860 million weights of two bytes
        assert costs.rollout_gathers == pytest.approx(40 * gigabytes / 80)
        report = split.report({"sd15": costs}, {8: 300.0})
        assert report.count("| sd15 |") == 2 and "Pairs per second of 8 cards" in report
