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
Why this file exists: `trl-spo doctor` is believed before money is spent. Each thing that it says must be provoked by a real
input: a file that is missing, a card that is too small, a Hub that does not answer. What it says about memory must be what the
training would take, and a change of settings that it suggests must be enough.
"""

import contextlib
import json
import math
import shlex
import shutil
import socket
import threading
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from datasets import Dataset

from benchmarks.memory import measured_peak_bytes
from tests.testing_utils import image_pairs, tiny_spo_config
from trl_spo import SPOConfig, SPOTrainer, StepAwareRewardModel
from trl_spo.branch_plan import BranchPlan
from trl_spo.checkup import environment, networks, work
from trl_spo.checkup.environment import check_disk
from trl_spo.checkup.forecast import Card, SPOForecaster, Variant, gathered_bytes
from trl_spo.checkup.hub import Hub, Named
from trl_spo.checkup.names import of_data
from trl_spo.checkup.published import PUBLISHED
from trl_spo.checkup.remedies import find_remedies
from trl_spo.scripts.cli import main, resolve_accelerate_config
from trl_spo.scripts.doctor import processes_of
from trl_spo.training.memory import GIB


WEIGHTS = Path(__file__).parent.parent / "examples" / "shapes" / "weights"
MODEL = ["--model_name_or_path", str(WEIGHTS / "pipeline")]
CLIP = ["--clip_name_or_path", str(WEIGHTS / "clip"), "--processor_name_or_path", str(WEIGHTS / "clip")]
RUN = [*MODEL, *CLIP, "--num_inference_steps", "10", "--branch_start_step", "2", "--report_to", "none"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\na blue square\na green triangle\n")
    return path


@pytest.fixture
def examine(tmp_path, capsys):
    """Runs `trl-spo doctor COMMAND ...`; returns the exit status, the findings and all of the report."""

    def run(*arguments, command="spo"):
        report = tmp_path / "report.json"
        output = [] if command == "sample" or "--output_dir" in arguments else ["--output_dir", str(tmp_path / "run")]
        status = main(["doctor", command, *map(str, arguments), *output, "--json", str(report)])
        capsys.readouterr()
        content = json.loads(report.read_text())
        return status, content["findings"], content

    return run


def texts(findings, mark=None, name=None) -> str:
    """The texts of all findings with a mark or a name."""
    chosen = [one for one in findings if mark in (None, one["mark"]) and name in (None, one["name"])]
    return "\n".join(one["text"] for one in chosen)


@contextlib.contextmanager
def silent_server():
    """A server that takes connections and never says a word; yields its address."""
    server = socket.create_server(("127.0.0.1", 0))
    held = []

    def take():
        with contextlib.suppress(OSError):
            while True:
                held.append(server.accept()[0])

    threading.Thread(target=take, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.close()
    for connection in held:
        connection.close()


@pytest.fixture
def closed_port(monkeypatch):
    """The Hub is where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")


class TestARunThatWorks:
    def test_status_lines_and_numbers(self, prompts, tmp_path, capsys):
        report = tmp_path / "report.json"
        arguments = [
            *RUN,
            "--dataset_name",
            str(prompts),
            "--output_dir",
            str(tmp_path / "run"),
            "--json",
            str(report),
        ]
        assert main(["doctor", "spo", *arguments]) == 0
        shown = capsys.readouterr().out
        assert "Nothing stands in the way" in shown
        assert max(len(line) for line in shown.splitlines()) <= 120
        assert not (tmp_path / "run").exists(), "a check-up leaves nothing behind"
        content = json.loads(report.read_text())
        assert content["exit_status"] == 0 and content["memory"]["fits"]
        # Steps 2 to 9 branch: eight pairs for each of 3 prompts and 10 epochs, in steps of 10.
        assert content["work"][0]["pairs"] == 3 * 10 * 8 and content["work"][0]["steps"] == 24
        assert 0 < content["time"]["tflop"]["unet"] < content["time"]["tflop"]["training"]

    def test_dry_run_is_the_same(self, prompts, tmp_path, capsys):
        arguments = [*RUN, "--dataset_name", str(prompts), "--output_dir", str(tmp_path / "run")]
        assert main(["spo", *arguments, "--dry_run"]) == 0
        assert "check-up of `trl-spo spo`" in capsys.readouterr().out
        assert not (tmp_path / "run").exists()

    def test_wrong_arguments_are_status_2(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["doctor", "spo", "--learning_rte", "1"])
        assert stop.value.code == 2 and "--learning_rate" in capsys.readouterr().err
        assert main(["doctor", "spoo"]) == 2
        assert main(["doctor"]) == 0


class TestFiles:
    def test_missing_prompts_model_and_decoder(self, examine, tmp_path):
        status, findings, _ = examine(
            "--model_name_or_path", "./nowhere", *CLIP, "--dataset_name", "trian.txt", "--scoring_vae", str(tmp_path)
        )
        problems = texts(findings, "problem")
        assert status == 1
        assert "'./nowhere': the path does not exist" in problems and "'trian.txt'" in problems
        assert "has no config.json" in problems

    def test_a_hub_that_is_not_there(self, examine, prompts, closed_port):
        """It is asked once, and the run cannot work: nothing is in the cache. For a card elsewhere it may."""
        arguments = [*RUN, "--dataset_name", prompts, "--model_name_or_path", "nobody/no-such-model"]
        start = time.monotonic()
        status, findings, _ = examine(*arguments)
        assert status == 1 and "the Hub is not reachable" in texts(findings, "problem", "model_name_or_path")
        assert "nothing is predicted" in texts(findings, "warning")
        status, findings, _ = examine(*arguments, "--card_memory", "24")
        assert status == 0 and "the Hub is not reachable" in texts(findings, "warning", "model_name_or_path")
        assert time.monotonic() - start < 60

    def test_a_hub_that_never_answers(self, monkeypatch):
        with silent_server() as address:
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
            start = time.monotonic()
            names = [Named("a", f"nobody/{number}", "model") for number in range(5)]
            findings = Hub(timeout=0.5).look(names)
        assert time.monotonic() - start < 10
        assert [finding.mark for finding in findings] == ["problem"] * 5


class TestData:
    def test_prompts(self, examine, tmp_path):
        path = tmp_path / "prompts.txt"
        path.write_text("a cat\na cat\n# a comment\n(big:1.2) dog\n" + "very " * 100 + "long\n")
        status, findings, _ = examine(*RUN, "--dataset_name", path)
        warnings = texts(findings, "warning", "dataset_name")
        assert status == 0
        for expected in (
            "1 prompts are there more than once",
            "1 prompts hold a comment of other programs, which is text here, such as '# a comment'",
            "1 prompts hold a weight of other programs, which is text here, such as '(big:1.2) dog'",
            "longer than the 12 tokens",
        ):
            assert expected in warnings

    def test_suites_by_name_are_their_repositories(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (named,) = of_data("dataset_name", "parti")
        assert (named.value, named.file, named.is_dataset) == ("nateraw/parti-prompts", "PartiPrompts.tsv", True)
        assert named.revision.startswith("944b156") and not named.is_local
        assert of_data("dataset_name", "geneval") == []  # from GitHub
        (tmp_path / "parti").mkdir()  # what is here goes first
        assert of_data("dataset_name", "parti")[0].value == "parti"

    def test_wrong_column(self, examine, tmp_path):
        path = tmp_path / "prompts.jsonl"
        path.write_text('{"text": "a cat"}\n')
        status, findings, _ = examine(*RUN, "--dataset_name", path)
        assert status == 1 and "['text']" in texts(findings, "problem", "dataset_name")

    def test_preferences_with_ties_and_without_labels(self, examine, tmp_path):
        rows = []
        for index, row in enumerate(image_pairs()):
            label = (0.5, 1.0, 0.0)[index % 3]
            images = {"jpg_0": row["chosen"], "jpg_1": row["rejected"]}
            rows.append({"caption": row["prompt"], **images, "label_0": label, "label_1": 1 - label})
        Dataset.from_list([*rows, {**rows[0], "label_0": 0.0, "label_1": 0.0}]).save_to_disk(tmp_path / "pairs")
        arguments = [*MODEL, *CLIP, "--resolution", "32", "--max_steps", "3", "--report_to", "none"]
        status, findings, content = examine(*arguments, "--dataset_name", tmp_path / "pairs", command="step-reward")
        said = texts(findings, name="dataset_name")
        assert status == 0, findings
        assert "first image 2, second image 2, without a label 1" in said.replace("ties 2, ", "")
        assert content["work"]["pairs"] == 6 and content["memory"]["fits"]

    def test_preferences_of_another_format(self, examine, prompts, tmp_path):
        Dataset.from_list([{"prompt": "a", "picture": 1}]).save_to_disk(tmp_path / "pairs")
        arguments = [*MODEL, *CLIP, "--resolution", "32", "--report_to", "none"]
        status, findings, _ = examine(*arguments, "--dataset_name", tmp_path / "pairs", command="step-reward")
        assert status == 1 and "`chosen`, `rejected`" in texts(findings, "problem", "dataset_name")


class TestOutput:
    def test_a_file_where_the_folder_should_be(self, examine, prompts, tmp_path):
        (tmp_path / "taken").write_text("")
        status, findings, _ = examine(*RUN, "--dataset_name", prompts, "--output_dir", tmp_path / "taken")
        assert status == 1 and "Nothing can be written" in texts(findings, "problem", "output folder")

    def test_a_full_disk(self, tmp_path):
        """A run that writes more than the disk has."""
        free = shutil.disk_usage(tmp_path).free
        (finding,) = check_disk(tmp_path / "run", 2 * free, "checkpoints")
        assert finding.mark == environment.PROBLEM and "save_total_limit" in finding.text
        assert check_disk(tmp_path / "run", 1, "checkpoints")[0].mark == environment.OK

    def test_an_earlier_run_and_nothing_to_resume(self, examine, prompts, tmp_path):
        (tmp_path / "old" / "checkpoint-7").mkdir(parents=True)
        arguments = [*RUN, "--dataset_name", prompts, "--output_dir", tmp_path / "old"]
        status, findings, _ = examine(*arguments)  # the command refuses it, too
        assert status == 1 and "checkpoint-7" in texts(findings, "problem", "output_dir")
        status, findings, _ = examine(*arguments, "--overwrite_output_dir")
        assert status == 0 and "checkpoint-7" in texts(findings, "warning", "output_dir")
        status, findings, _ = examine(*arguments, "--resume_from_checkpoint", "last")
        assert status == 1 and "no complete checkpoint" in texts(findings, "problem", "resume")


class TestSettings:
    def test_target_modules_sizes_and_trackers(self, examine, prompts):
        data = ["--dataset_name", prompts]
        status, findings, _ = examine(*RUN, *data, "--lora_target_modules", "to_nowhere")
        assert status == 1 and "to_nowhere" in texts(findings, "problem", "model")
        status, findings, _ = examine(*RUN, *data, "--height", "33")
        assert status == 1 and "multiple" in texts(findings, "problem", "model")
        status, findings, _ = examine(*RUN[:-1], "no_such_tracker", *data)
        assert status == 1 and "no_such_tracker" in texts(findings, "problem", "tracker")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_rewards_by_name(self, examine, prompts):
        arguments = [*MODEL, "--num_inference_steps", "10", "--branch_start_step", "2", "--report_to", "none"]
        status, findings, _ = examine(
            *arguments, "--dataset_name", prompts, "--reward", "clip_score=0.5", "aesthetic=0.5"
        )
        assert status == 0 and "is not counted" in texts(findings, "-", "reward")
        status, findings, _ = examine(*arguments, "--dataset_name", prompts, "--reward", "clip_scor")
        assert status == 1 and "did you mean clip_score?" in texts(findings, "problem", "reward")

    def test_half_precision_without_a_gpu(self, examine, prompts):
        arguments = [*RUN, "--dataset_name", prompts, "--bf16", "true"]
        status, findings, _ = examine(*arguments)
        assert status == 1 and "needs a GPU" in texts(findings, "problem", "precision")
        assert examine(*arguments, "--card_memory", "8")[0] == 0, "elsewhere there is one"


class TestMemory:
    def test_what_does_not_fit_and_what_does(self, examine, prompts):
        """The first suggestion is tried: with it the same check-up finds that the run fits."""
        arguments = [*RUN, "--dataset_name", prompts, "--card_memory"]
        peak = examine(*arguments, "24")[2]["memory"]["peak_gib"]
        small = f"{0.85 * peak:.6f}"
        status, findings, content = examine(*arguments, small)
        assert status == 1 and "does not fit" in texts(findings, "problem", "peak")
        remedy = content["memory"]["remedies"][0]
        status, _, again = examine(*arguments, small, *shlex.split(remedy["options"]))
        assert status == 0 and again["memory"]["fits"]
        assert again["memory"]["peak_gib"] == pytest.approx(remedy["peak_gib"])

    def test_a_training_step_is_what_the_trainer_allocates(self, tmp_path):
        """The prediction from configurations, against the allocations of a real `compute_loss` on the loaded models."""
        config = tiny_spo_config(tmp_path, use_cpu=True, height=32, width=32, per_device_rollout_batch_size=2)
        clip = str(WEIGHTS / "clip")
        reward = StepAwareRewardModel.from_clip(clip, processor=clip)
        trainer = SPOTrainer(
            config, str(WEIGHTS / "pipeline"), reward, train_dataset=["a red circle", "a blue square"]
        )
        inputs = next(iter(trainer.get_train_dataloader()))

        def step():
            trainer.compute_loss(trainer.model, inputs).backward()

        step()  # makes the gradients, which count as resident
        expected = measured_peak_bytes(step)

        model, _ = networks.read_model(str(WEIGHTS / "pipeline"))
        forecaster = SPOForecaster(model, lambda pipeline: networks.clip_on_paper(clip)[0], lambda pipeline: None)
        found = forecaster.networks(Variant(config)).step_bytes(config, len(inputs["pairs"].prompts))
        assert found == pytest.approx(expected, rel=0.25)

    def test_weights_are_those_of_the_files(self):
        """Networks from configurations have the weights that are saved beside them."""
        model, _ = networks.read_model(str(WEIGHTS / "pipeline"))
        pipeline = networks.pipeline_on_paper(model, torch.float32)
        for name, module in {"unet": pipeline.denoiser, **pipeline.frozen_modules()}.items():
            files = sum(file.stat().st_size for file in (WEIGHTS / "pipeline" / name).glob("*.safetensors"))
            held = sum(p.nbytes for p in module.parameters())
            assert held / files == pytest.approx(1, abs=0.05) or 2 * files / held == pytest.approx(1, abs=0.05), name
        assert all(p.device.type == "meta" for p in pipeline.denoiser.parameters())

    def test_published_shapes(self):
        """Numbers of parameters, in billions, as the cards of the models state them."""
        expected = {
            "stable-diffusion-v1-5/stable-diffusion-v1-5": ("unet", 0.86),
            "stabilityai/stable-diffusion-xl-base-1.0": ("unet", 2.57),
            "black-forest-labs/flux.1-dev": ("transformer", 11.9),
        }
        for name, (part, billions) in expected.items():
            with torch.device("meta"):
                network = networks.build(PUBLISHED[name].components[part])
            assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)

    def test_shards(self):
        """Each of eight processes has an eighth of what belongs to the denoiser, and two blocks of it whole while it runs."""
        model = PUBLISHED["stable-diffusion-v1-5/stable-diffusion-v1-5"]
        config = SPOConfig(output_dir="out", use_cpu=True, per_device_rollout_batch_size=2)
        forecasts = {}
        forecaster = SPOForecaster(model, lambda pipeline: None, lambda pipeline: None, 8)
        for sharding in (None, "FSDP 2", "DeepSpeed ZeRO-3"):
            forecaster.sharding = sharding  # the networks are the same
            forecasts[sharding] = forecaster.forecast(Variant(config, torch.float16))
        whole, shards = (forecasts[key].resident for key in (None, "FSDP 2"))
        assert shards["unet"] == math.ceil(whole["unet"] / 8)
        assert shards["adapter"] == math.ceil(whole["adapter"] / 8)
        assert shards["gradients"] == math.ceil(
            whole["gradients"] / 2 / 8
        )  # without the buckets of several whole ones
        assert shards["VAE"] == whole["VAE"]
        phases = {phase.name: phase.bytes for phase in forecasts[None].phases}
        more = {phase.name: phase.bytes - phases[phase.name] for phase in forecasts["FSDP 2"].phases}
        gathered = more["rollout, unet"]
        assert (
            gathered == more["training step"] > 0 == more["optimizer step"] == more["rollout, decode and reward model"]
        )
        assert gathered < whole["unet"] / 4

        # DeepSpeed steps from copies of its own, and takes the denoiser apart on the device.
        by_deepspeed = forecasts["DeepSpeed ZeRO-3"]
        copy = by_deepspeed.resident.pop("DeepSpeed's copy of what is trained")
        assert by_deepspeed.resident == shards and copy == shards["adapter"]
        assert by_deepspeed.phases[:-1] == forecasts["FSDP 2"].phases
        apart = by_deepspeed.phases[-1].bytes + shards["unet"] + shards["adapter"]
        assert apart == pytest.approx(whole["unet"] + whole["adapter"], rel=1e-6)

    def test_what_a_process_has_whole(self):
        """Blocks of 3 and 5 weights inside one of 20 of its own, another of 4, and 7 weights in none: 7 + 20 + 5 + 4 floats."""

        class Inner(torch.nn.Module):
            def __init__(self, size):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(size))

        class Outer(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(20))
                self.blocks = torch.nn.ModuleList([Inner(3), Inner(5)])

        class Denoiser(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(7))
                self.parts = torch.nn.ModuleList([Outer(), Inner(4)])

        trained = torch.nn.Module()
        trained.denoiser = Denoiser()
        trained._no_split_modules = ["Inner", "Outer", "Denoiser"]
        assert gathered_bytes(trained) == (7 + 20 + 5 + 4) * 4

    @pytest.mark.parametrize(
        ("launch", "expected"),
        [
            ([], (1, None)),
            (["--num_processes", "4"], (4, None)),
            (["--accelerate_config", "fsdp2", "--num_processes", "8"], (8, "FSDP 2")),
            (["--accelerate_config", "multi_gpu"], (4, None)),
            (["--use_fsdp", "--num_processes=2"], (2, "FSDP 2")),
            (["--accelerate_config", "fsdp2", "--num_processes", "1"], (1, None)),
            (["--accelerate_config", "deepspeed_zero2"], (4, None)),
            (["--accelerate_config", "deepspeed_zero3"], (4, "DeepSpeed ZeRO-3")),
        ],
    )
    def test_it_reads_how_a_run_is_launched(self, launch, expected):
        assert processes_of(launch, resolve_accelerate_config) == expected

    def test_streams_and_devices_that_roll_out(self, examine, prompts):
        options = ["--dataset_name", prompts, "--dataset_streaming", "true", "--max_steps", "5"]
        _, findings, _ = examine(*RUN, *options, "--rollout_devices", "cpu", "cpu")
        assert "a stream of 3 shards" in texts(findings, name="dataset_name")
        assert texts(findings, name="rollout_devices").startswith("cpu, cpu roll out")
        status, findings, _ = examine(*RUN, *options, "--rollout_devices", "cuda:99")
        assert status == 1 and "names 'cuda:99', and this machine has" in texts(findings, "problem", "rollout_devices")

    def test_shards_of_a_command(self, examine, prompts):
        options = [
            "--dataset_name",
            prompts,
            "--accelerate_config",
            "fsdp2",
            "--num_processes",
            "8",
            "--card_memory",
            "80",
        ]
        _, findings, _ = examine(*RUN, *options)
        assert "spread over 8 processes (FSDP 2)" in texts(findings, name="shards")

        # What such a run refuses, which it would say when the processes have started.
        options[options.index("fsdp2")] = "deepspeed_zero3"
        status, findings, _ = examine(*RUN, *options, "--compile_regions", "true", "--optim", "adafactor")
        assert "spread over 8 processes (DeepSpeed ZeRO-3)" in texts(findings, name="shards")
        problems = texts(findings, "problem", "shards")
        assert status == 1 and "with DeepSpeed ZeRO-3: `torch_compile` and `compile_regions` are refused" in problems
        assert "`optim` must be one of" in problems

    def test_a_chain_of_changes(self):
        """Where no change is enough alone, those that are together, without any that is not needed."""
        from trl_spo.checkup.forecast import Forecast, Phase

        def forecast(run):
            config = run.config
            text = 0 if config.offload_text_encoders else 4
            step = 1 if config.gradient_checkpointing or getattr(config, "activation_checkpointing", False) else 6
            phases = [Phase("training step", step * GIB), Phase("text", 4 * GIB if not text else 0)]
            return Forecast({"denoiser": 10 * GIB, "text encoders": text * GIB}, phases)

        config = tiny_spo_config("out", use_cpu=True, per_device_train_batch_size=1)
        card = Card("a card", 14 * GIB, 16 * GIB)
        (remedy,) = find_remedies(forecast, Variant(config), card, "unet")
        assert remedy.forecast.fits(card)
        options = [word for word in remedy.options.split() if word.startswith("--")]
        assert len(options) == 2 and options[0] == "--offload_text_encoders" and "checkpointing" in options[1]
        assert find_remedies(forecast, Variant(config), Card("a card", 9 * GIB, 10 * GIB), "unet") == []


def test_evaluations_of_a_rollout():
    """The paper's SD1.5: 65 guided predictions, 64 images; and a plan with a plain step between two branches."""
    paper = work.rollout_samples(BranchPlan(dict.fromkeys(range(4, 20), 1), 20), 4, 20)
    assert paper == {"predictions": 65, "decodes": 64, "branches": 16, "pairs": 16}
    # Steps 0, 1 and 2; two candidates at step 3; step 4 and, from it, two at step 5.
    assert work.rollout_samples(BranchPlan({2: 1, 4: 1}, 5), 2, 10)["predictions"] == 3 + 2 + 1 + 2


class TestSampling:
    def test_sample(self, examine, tmp_path):
        arguments = [
            *MODEL,
            "--prompt",
            "a red circle",
            "--images_per_prompt",
            "3",
            "--output_dir",
            tmp_path / "images",
        ]
        status, findings, content = examine(*arguments, command="sample")
        assert status == 0 and "3 images" in texts(findings, "ok", "disk") and content["memory"]["fits"]
        status, findings, _ = examine(*arguments, "--lora", "./spo-shape", command="sample")
        assert status == 1 and "there is no LoRA './spo-shape'" in texts(findings, "problem", "lora")

    def test_evaluate(self, examine, prompts):
        arguments = [*MODEL, "--prompts", prompts, "--metrics", "step_reward", *CLIP]
        assert examine(*arguments, command="evaluate")[0] == 0
        status, findings, _ = examine(*arguments, "--protocol", "none-such", "--base", command="evaluate")
        problems = texts(findings, "problem")
        assert status == 1 and "none-such" in problems and "--lora" in problems
