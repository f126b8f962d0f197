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
Necessity: an example that nobody runs ages. Each script runs as its user would start it, at toy size, and what it wrote
is loaded and sampled from by plain diffusers. The runs follow one another as a user's do: the reward model that
`step_reward.py` leaves scores the rollouts of `spo.py`, whose LoRA `evaluate.py` measures.
"""

import io
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from trl_spo import LatentRewardModel, StepAwareRewardModel
from trl_spo.prompts import load_prompts
from trl_spo.scripts import cli
from trl_spo.scripts.arguments import RewardModelArguments, leave_process_group
from trl_spo.training.checkpointing import resume_from

from .testing_utils import PROMPTS, changed, state_of, tiny_clip, tiny_sd_pipeline, tiny_sdxl_pipeline


EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = EXAMPLES / "scripts"
CONFIGS = EXAMPLES / "accelerate_configs"
LAUNCHERS = sorted(SCRIPTS.glob("*.py"))
TRAINING = ["--report_to", "none", "--use_cpu", "true", "--logging_steps", 1, "--save_strategy", "no"]


def run(*command) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def image_bytes(color) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), color).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A folder with what the scripts are given: pipelines, a CLIP, prompts and preference pairs."""
    folder = tmp_path_factory.mktemp("toy")
    tiny_sd_pipeline(folder).save_pretrained(folder / "sd")
    tiny_sdxl_pipeline(folder).save_pretrained(folder / "sdxl")
    tiny_clip(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    rows = {
        "caption": PROMPTS,
        "jpg_0": [image_bytes("red")] * 6,
        "jpg_1": [image_bytes("blue")] * 6,
        "label_0": [1.0] * 6,
        "label_1": [0.0] * 6,
    }
    Dataset.from_dict(rows).to_parquet(folder / "pairs.parquet")
    return folder


def clip_arguments(toy: Path) -> list:
    return ["--clip_name_or_path", toy / "clip", "--processor_name_or_path", toy / "clip"]


def step_reward_arguments(toy: Path) -> list:
    arguments = ["--model_name_or_path", toy / "sd", *clip_arguments(toy), "--dataset_name", toy / "pairs.parquet"]
    arguments += ["--resolution", 16, "--max_steps", 2, "--learning_rate", 0.01, "--warmup_steps", 0]
    arguments += ["--per_device_train_batch_size", 3, "--gradient_accumulation_steps", 1]
    return arguments + TRAINING


def spo_arguments(toy: Path) -> list:
    arguments = ["--dataset_name", toy / "prompts.txt", "--num_inference_steps", 4, "--branch_start_step", 1]
    arguments += ["--preference_threshold", 0.0, "--max_steps", 2, "--per_device_train_batch_size", 4]
    arguments += ["--lora_r", 2, "--lora_alpha", 4, "--learning_rate", 0.05, "--per_device_rollout_batch_size", 2]
    return arguments + TRAINING


@pytest.fixture(scope="module")
def reward_model(toy) -> Path:
    run(SCRIPTS / "step_reward.py", *step_reward_arguments(toy), "--output_dir", toy / "reward")
    return toy / "reward"


@pytest.fixture(scope="module")
def lora(toy, reward_model) -> Path:
    arguments = ["--model_name_or_path", toy / "sd", "--reward_model_name_or_path", reward_model]
    run(SCRIPTS / "spo.py", *arguments, *spo_arguments(toy), "--output_dir", toy / "lora")
    return toy / "lora"


def check_lora(pipeline, folder: Path):
    """Plain diffusers loads it, with its alpha, and its images are not those of the base model."""

    def sample():
        generator = torch.Generator().manual_seed(0)
        return pipeline(PROMPTS[:1], generator=generator, num_inference_steps=3, output_type="np").images

    base = sample()
    pipeline.load_lora_weights(folder)
    assert pipeline.unet.peft_config["default_0"].lora_alpha == 2  # the rank: the strength of 4 / 2 is in the weights
    with safe_open(folder / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["folded_strength"])["lora_alpha"] == 4
    assert np.abs(sample() - base).max() > 1e-3


class TestTraining:
    def test_spo(self, toy, lora, tmp_path):
        check_lora(tiny_sd_pipeline(tmp_path), lora)

    def test_spo_sdxl_starts_from_its_preset(self, toy, reward_model, tmp_path):
        """Two candidates and four inner steps come from the file; what is of no use at toy size is overridden."""
        arguments = ["--model_name_or_path", toy / "sdxl", "--vae_name_or_path", toy / "sdxl" / "vae"]
        arguments += ["--model_init_kwargs", '{"torch_dtype": "float32"}', "--fp16", "false"]
        arguments += ["--reward_model_name_or_path", reward_model, "--gradient_accumulation_steps", 1]
        run(SCRIPTS / "spo_sdxl.py", *arguments, *spo_arguments(toy), "--output_dir", tmp_path)
        check_lora(tiny_sdxl_pipeline(tmp_path / "fresh"), tmp_path)
        card = (tmp_path / "README.md").read_text()
        assert "| `num_candidates` | 2 |" in card and "| `num_inner_steps` | 4 |" in card

    def test_step_reward_from_a_parquet_file(self, toy, reward_model):
        trained = StepAwareRewardModel.from_pretrained(reward_model)
        start = StepAwareRewardModel.from_clip(toy / "clip", processor=toy / "clip")
        image = torch.rand(1, 3, 16, 16)
        assert not torch.equal(trained.score(image, PROMPTS[:1], 501), start.score(image, PROMPTS[:1], 501))

    def test_a_latent_reward_is_trained_and_used(self, toy, tmp_path):
        """Fresh from the pipeline, trained on the pairs of a file, and then the reward of a run of SPO."""
        run(
            SCRIPTS / "step_reward.py",
            *step_reward_arguments(toy),
            *["--reward_type", "latent", "--output_dir", tmp_path / "reward"],
        )
        fresh = LatentRewardModel.from_pipeline(tiny_sd_pipeline(tmp_path / "fresh"))
        trained = LatentRewardModel.from_pretrained(tmp_path / "reward")
        assert changed(state_of(fresh.backbone), trained.backbone)
        arguments = ["--model_name_or_path", toy / "sd", "--reward_model_name_or_path", tmp_path / "reward"]
        run(SCRIPTS / "spo.py", *arguments, *spo_arguments(toy), "--output_dir", tmp_path / "spo")
        check_lora(tiny_sd_pipeline(tmp_path / "again"), tmp_path / "spo")

    def test_a_fresh_latent_reward_is_no_reward(self):
        with pytest.raises(SystemExit, match="heads of a fresh latent reward model are random: name a trained one"):
            RewardModelArguments(reward_type="latent").load()
        with pytest.raises(ValueError, match="must be 'step_aware' or 'latent', got 'lrm'"):
            RewardModelArguments(reward_type="lrm")

    def test_two_processes_started_by_the_console_command(self, toy, reward_model, tmp_path):
        """
        The same run, split over two processes by the config file: three pairs each make one epoch of a step, where one
        process needs two steps for it.
        """
        command = ["-m", "trl_spo.scripts.cli", "step-reward", "--accelerate_config", "cpu_2proc"]
        arguments = [*step_reward_arguments(toy), "--output_dir", tmp_path / "two", "--save_strategy", "steps"]
        output = run(*command, *arguments)
        state = json.loads((tmp_path / "two" / "checkpoint-2" / "trainer_state.json").read_text())
        assert state["epoch"] == 2 and output.count("Saved the reward model") == output.count("Next: ") == 1
        one, two = (load_file(folder / "model.safetensors") for folder in (reward_model, tmp_path / "two"))
        assert one.keys() == two.keys()
        assert not all(torch.equal(one[name], two[name]) for name in one)

    def test_the_seed_fixes_a_fresh_reward_model(self, toy, reward_model, tmp_path):
        """Regression: its timestep embedding was drawn before any seed was set, so no two runs were equal."""
        from trl_spo.scripts import step_reward

        torch.manual_seed(12345)
        arguments = [str(argument) for argument in step_reward_arguments(toy)]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the other run: Adam makes a difference in rounding a difference in sign
        try:
            step_reward.main(
                *step_reward.make_parser().parse_args_and_config([*arguments, "--output_dir", str(tmp_path)])
            )
        finally:
            torch.set_num_threads(threads)
        first, again = (load_file(folder / "model.safetensors") for folder in (reward_model, tmp_path))
        for name in first:
            torch.testing.assert_close(first[name], again[name], atol=1e-5, rtol=1e-4)


class TestEvaluate:
    def test_lora_against_its_base(self, toy, reward_model, lora, tmp_path):
        options = {"clip_score": {"model": str(toy / "clip"), "processor": str(toy / "clip")}}
        arguments = ["--model_name_or_path", toy / "sd", "--lora", lora, "--base", "--prompts", toy / "prompts.txt"]
        arguments += ["--metrics", "clip_score", "step_reward", "--metric_options", json.dumps(options)]
        arguments += ["--reward_model_name_or_path", reward_model, "--num_inference_steps", 3, "--num_prompts", 5]
        output = run(SCRIPTS / "evaluate.py", *arguments, "--protocol", "spo-paper", "--output_dir", tmp_path)
        table = [line for line in output.splitlines() if line.startswith("|")]
        assert [row.split("|")[1].strip() for row in table[2:]] == ["clip_score", "step_reward"]
        assert "spo-paper with num_inference_steps=3" in output
        assert "\n".join(table) in (tmp_path / "metrics.md").read_text()
        assert Image.open(tmp_path / "contact_sheet.png").size[0] > 16
        report = json.loads((tmp_path / "metrics.json").read_text())
        assert [row["prompt"] for row in report["images"]] == PROMPTS[:5]
        # One base image by plain diffusers, scored by hand; `eta=0` is the protocol's.
        plain = tiny_sd_pipeline(tmp_path / "plain")
        generator = torch.Generator().manual_seed(2)
        settings = {"num_inference_steps": 3, "guidance_scale": 5.0, "eta": 0.0, "output_type": "pt"}
        image = plain(PROMPTS[2], generator=generator, **settings).images
        model = StepAwareRewardModel.from_pretrained(reward_model)
        expected = model.score(image * 2 - 1, PROMPTS[2:3], torch.tensor([0])).item()
        assert report["images"][2]["base_scores"]["step_reward"] == pytest.approx(expected, abs=1e-3)
        assert report["images"][2]["scores"]["step_reward"] != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_headers_are_read_by_tools(path):
    """PEP 723: a block of comments that holds TOML, with what the script needs; and the docstring says how to start it."""
    text = path.read_text()
    head = text.split("# /// script\n")[1].split("# ///\n")[0]
    assert (
        "trl-spo"
        in tomllib.loads("".join(line.removeprefix("# ") for line in head.splitlines(keepends=True)))["dependencies"]
    )
    assert f"examples/scripts/{path.name}" in text.split('"""')[1]


class TestNothingIsSampledInVain:
    """Images of a base model take hours: what keeps the result from being written or compared is found before the first."""

    def arguments(self, toy, *more) -> list[str]:
        options = {"clip_score": {"model": str(toy / "clip"), "processor": str(toy / "clip")}}
        arguments = ["--model_name_or_path", toy / "sd", "--base", "--prompts", toy / "prompts.txt", "--device", "cpu"]
        return [*map(str, [*arguments, "--metrics", "clip_score", "--metric_options", json.dumps(options), *more])]

    @pytest.mark.parametrize("command", ["evaluate", "sample"])
    def test_a_folder_that_cannot_be_written(self, toy, command, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setattr(
            "trl_spo.pipelines.base.SPOPipeline.sample", None
        )  # to call it would be an error of its own
        target = str(tmp_path / "file" / "out")
        own = self.arguments(toy, "--lora", toy) if command == "evaluate" else ["--prompt", "a cat"]
        with pytest.raises(SystemExit, match="Nothing can be written"):
            cli.main([command, *own, "--output_dir", target])

    def test_a_lora_that_cannot_be_loaded(self, toy, tmp_path, monkeypatch):
        monkeypatch.setattr("trl_spo.pipelines.base.SPOPipeline.sample", None)
        (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"broken")
        with pytest.raises(SystemExit, match="(?i)header|safetensors|incomplete|read"):
            cli.main(["evaluate", *self.arguments(toy, "--lora", tmp_path), "--output_dir", str(tmp_path / "out")])


class TestAccelerateConfigs:
    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
    def test_accelerate_reads_it(self, path):
        config = load_config_from_file(str(path))
        assert config.mixed_precision == "no"  # it is the script's to say
        assert (config.num_processes == 1) == (path.stem == "single_gpu")

    def test_those_named_in_the_scripts_exist(self):
        assert {path.stem for path in CONFIGS.glob("*.yaml")} == {
            "cpu_2proc",
            "deepspeed_zero2",
            "deepspeed_zero3",
            "fsdp",
            "fsdp2",
            "multi_gpu",
            "single_gpu",
        }
        for stage in (2, 3):
            config = load_config_from_file(str(CONFIGS / f"deepspeed_zero{stage}.yaml"))
            assert config.deepspeed_config["zero_stage"] == stage


class TestPrompts:
    def test_files(self, tmp_path):
        (tmp_path / "list.json").write_text(json.dumps(PROMPTS))
        (tmp_path / "lines.txt").write_text("a red cat\n\n  \na blue dog\n")
        (tmp_path / "rows.jsonl").write_text('{"prompt": "a red cat"}\n{"prompt": "a blue dog"}\n')
        (tmp_path / "table.csv").write_text("caption,number\na red cat,1\na blue dog,2\n")
        assert load_prompts(str(tmp_path / "list.json")) == PROMPTS
        assert load_prompts(str(tmp_path / "lines.txt")) == ["a red cat", "a blue dog"]
        assert list(load_prompts(str(tmp_path / "rows.jsonl"))["prompt"]) == ["a red cat", "a blue dog"]
        assert list(load_prompts(str(tmp_path / "table.csv"))["caption"]) == ["a red cat", "a blue dog"]

    def test_a_missing_file_is_not_looked_for_on_the_hub(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no file .*prompts.txt"):
            load_prompts(str(tmp_path / "prompts.txt"))


def test_words_for_the_last_checkpoint():
    class Config:
        resume_from_checkpoint = None

    for given, expected in ((None, None), ("true", True), ("last", True), ("false", None), ("run/checkpoint-2",) * 2):
        Config.resume_from_checkpoint = given
        assert resume_from(Config) == expected


def test_programs_leave_the_group_of_their_processes(tmp_path):
    leave_process_group()  # one process alone has none, which is no error
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    leave_process_group()
    assert not torch.distributed.is_initialized()
