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
Necessity: the console command is the first thing a user tries. It must answer at once, say what is wrong in one sentence,
and run the code of the scripts, in this process or through `accelerate launch` (`test_scripts.py` runs that one).
"""

import configparser
import importlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers, numpy_to_pil
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

import trl_spo
from trl_spo.prompts import load_prompts
from trl_spo.scripts import cli
from trl_spo.scripts.errors import run
from trl_spo.scripts.evaluate import make_parser as evaluate_parser
from trl_spo.scripts.evaluate import make_protocol
from trl_spo.scripts.spo import make_parser as spo_parser

from .testing_utils import PROMPTS, tiny_sd_pipeline


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A pipeline on disk, and beside it a LoRA that shows."""
    folder = tmp_path_factory.mktemp("model")
    pipeline = tiny_sd_pipeline(folder)
    pipeline.save_pretrained(folder / "pipe")
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    type(pipeline).save_lora_weights(folder / "lora", unet_lora_layers=layers)
    return folder


def test_entry_point():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    name, target = config["options.entry_points"]["console_scripts"].strip().split(" = ")
    module, function = target.split(":")
    assert name == "trl-spo"
    assert getattr(importlib.import_module(module), function) is cli.main
    packages = {package.strip() for package in config["options"]["packages"].split(",")}
    folders = {path.parent.name for path in (ROOT / "trl_spo").glob("*/__init__.py")}
    carried = {"trl_spo.configs", "trl_spo_shapes"}  # from `examples`, see tests/test_package.py
    assert packages == {"trl_spo", *(f"trl_spo.{folder}" for folder in folders)} | carried
    assert config["options.package_data"]["trl_spo"] == "accelerate_configs/*.yaml, label_page/*"


class TestHelp:
    def test_answers_at_once(self):
        code = (
            "import sys; from trl_spo.scripts.cli import main; assert main(['--help']) == 0; "
            "print([name for name in ('torch', 'diffusers', 'trl') if name in sys.modules], file=sys.stderr)"
        )
        if importlib.metadata.version("transformers").startswith("4."):
            pytest.skip("transformers 4 imports torch by itself")
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert (result.returncode, result.stderr.strip()) == (0, "[]")
        for word in (*cli.COMMANDS, "--accelerate_config", "multi_gpu"):
            assert word in result.stdout

    def test_nothing_is_help(self, capsys):
        assert cli.main([]) == 0
        assert capsys.readouterr().out.startswith("usage: trl-spo COMMAND")

    def test_version(self, capsys):
        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out.strip() == trl_spo.__version__

    @pytest.mark.parametrize("command", cli.COMMANDS)
    def test_of_each_command(self, command, capsys):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: trl-spo {command} ")
        own = {"demo": "--output_dir", "data": "build"}
        assert own.get(command, "--model_name_or_path") in text

    def test_unknown_commands(self, capsys):
        assert cli.main(["train"]) == 2
        assert "there is no command 'train'; it must be one of spo, step-reward," in capsys.readouterr().err


class TestLaunchOptions:
    def test_options_of_the_script_and_of_accelerate(self):
        arguments = ["--num_processes", "2", "--learning_rate=1e-3", "--multi_gpu", "--lora_target_modules", "to_q"]
        arguments += ["to_v", "--config", "x.yaml", "--mixed_precision=bf16", "--use_peft", "false"]
        launch, script = cli.split_launch_arguments(spo_parser(), arguments)
        assert launch == ["--num_processes", "2", "--multi_gpu", "--mixed_precision=bf16"]
        assert script == [argument for argument in arguments if argument not in launch]

    def test_misspelt_options_stay_with_the_script(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["spo", "--learning_ratee", "1", "--output_dir", "unused", "--report_to", "none"])
        assert "there is no option --learning_ratee; did you mean --learning_rate?" in capsys.readouterr().err

    def test_named_configs(self, tmp_path):
        assert cli.resolve_accelerate_config("multi_gpu").is_file()
        (tmp_path / "own.yaml").write_text("num_processes: 2\n")
        assert cli.resolve_accelerate_config(str(tmp_path / "own.yaml")) == tmp_path / "own.yaml"
        with pytest.raises(SystemExit, match="must be a file, or one of .*multi_gpu.*; got 'many_gpus'"):
            cli.main(["spo", "--accelerate_config", "many_gpus"])
        with pytest.raises(SystemExit, match="needs a value"):
            cli.main(["step-reward", "--accelerate_config"])


def failing(error: Exception):
    def main(*arguments):
        raise error

    return main


class TestErrors:
    """A mistake is one line and status 2: a traceback hides the sentence from everybody who does not know the code."""

    def message(self, capsys, *arguments) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main(list(arguments))
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        lines = [line for line in error.splitlines() if line.startswith(f"trl-spo {arguments[0]}: error: ")]
        assert len(lines) == 1
        return lines[0].partition(": error: ")[2]

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--learning_rte", "1"], "there is no option --learning_rte; did you mean --learning_rate?"),
            (["--learning_rte=1"], "there is no option --learning_rte; did you mean --learning_rate?"),
            (["--xyzzy"], "there is no option --xyzzy. "),
            (["--learning_rate", "abc"], "argument --learning_rate/--learning-rate: invalid float value: 'abc'. "),
            (["--config", "nix.yaml"], "there is no config 'nix.yaml'. "),
            (["--config=nix.yaml"], "there is no config 'nix.yaml'. "),
            (["--config"], "--config needs a file. "),
            (["--kl_coef", "-1"], "`kl_coef` must be 0 or more; got -1.0."),
            (["--dataset_name", "nix.txt"], "There is no file 'nix.txt'. Name a file of prompts"),
            (["--dataset_name", __file__], f"{__file__!r} is not a file of prompts"),
            (
                ["--dataset_name", "nix.txt", "--report_to", "nix"],
                "`report_to` names 'nix', which is not a tracker; there are",
            ),
            (["--dataset_name", "nix.txt", "--output_dir", __file__], "Nothing can be written to `output_dir`"),
            (["--dataset_name", "nix.txt", "--model_init_kwargs", "{"], "--model_init_kwargs must be JSON, got '{'"),
        ],
    )
    def test_before_anything_is_loaded(self, arguments, message, tmp_path, capsys):
        if "--output_dir" not in arguments:
            arguments = [*arguments, "--output_dir", str(tmp_path / "out")]
        arguments = [*arguments, "--model_name_or_path", "does/not-exist", "--use_cpu", "true"]
        if arguments[0] == "--config" and arguments[1].startswith("--"):  # the last word is the option itself
            arguments = [*arguments[1:], "--config"]
        assert self.message(capsys, "spo", *arguments).startswith(message)

    @pytest.mark.parametrize(
        "content, message",
        [
            ("learning_rte: 1\n", "has 'learning_rte', which is not an argument; did you mean learning_rate?"),
            ("learning_rate: [1\n", "is not YAML: while parsing a flow sequence"),
            ("- 1\n", "must hold one `name: value` per line, and holds a list."),
            (b"# \xff\n", "is not YAML: 'utf-8' codec can't decode byte 0xff"),
        ],
    )
    def test_configs(self, content, message, tmp_path, capsys):
        path = tmp_path / "run.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert f"{str(path)!r} {message}" in self.message(capsys, "spo", "--config", str(path))

    def test_a_config_by_an_equals_sign(self, tmp_path):
        (tmp_path / "run.yaml").write_text("output_dir: a\nreport_to: none\n")
        *_, config = spo_parser().parse_args_and_config([f"--config={tmp_path / 'run.yaml'}", "--seed=3"])
        assert (config.output_dir, config.seed) == ("a", 3)

    def test_a_reward_model_needs_preferences(self, tmp_path, capsys):
        message = self.message(capsys, "step-reward", "--output_dir", str(tmp_path), "--use_cpu", "true")
        assert message.startswith("A reward model learns from preferences: name a dataset")

    def test_commands_that_are_nearly_right(self, capsys):
        assert cli.main(["sampel"]) == 2
        assert "did you mean sample?" in capsys.readouterr().err

    def test_debug_prints_the_traceback(self, tmp_path):
        with pytest.raises(ValueError, match="`kl_coef` must be 0 or more"):
            cli.main(["spo", "--kl_coef", "-1", "--output_dir", str(tmp_path), "--use_cpu", "true", "--debug"])

    def test_debug_of_the_trainer_is_still_its_own(self, tmp_path, capsys):
        arguments = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--report_to", "none"]
        *_, config = spo_parser().parse_args_and_config([*arguments, "--debug", "underflow_overflow"])
        assert [str(option.value) for option in config.debug] == ["underflow_overflow"]
        message = self.message(capsys, "spo", *arguments, "--debug", "underflow_overflow", "--kl_coef", "-1")
        assert message.startswith("`kl_coef` must be 0 or more")

    def test_the_traceback_of_an_error_from_elsewhere_is_kept(self, capsys, monkeypatch, tmp_path):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        parser = evaluate_parser(prog="trl-spo evaluate")
        with pytest.raises(SystemExit, match="out of memory on the device"):
            run(failing(RuntimeError("out of memory on the device")), parser, [])
        first, second = capsys.readouterr().err.splitlines()
        assert first == "trl-spo evaluate: error: out of memory on the device"
        (log,) = tmp_path.glob("spo-error-*.log")
        assert second == f"The traceback is in {log}; --debug prints it."
        assert "Traceback" in log.read_text() and "in failing" not in first
        with pytest.raises(RuntimeError):
            run(failing(RuntimeError("out of memory on the device")), parser, ["--debug"])

    def test_errors_that_say_too_little_name_their_kind(self, capsys, monkeypatch, tmp_path):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        with pytest.raises(SystemExit, match="KeyError: 'unet'"):
            run(failing(KeyError("unet")), evaluate_parser(prog="p"), [])

    def test_an_error_of_the_package_needs_no_traceback(self, capsys, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        with pytest.raises(SystemExit, match="There is no file"):
            run(lambda *arguments: load_prompts("nix.txt"), evaluate_parser(prog="p"), [])
        assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())


class TestSpo:
    def test_the_command_line_goes_before_the_file(self, tmp_path):
        (tmp_path / "run.yaml").write_text("output_dir: a\nlearning_rate: 0.5\nnum_candidates: 8\n")
        arguments = ["--config", str(tmp_path / "run.yaml"), "--learning_rate", "0.25", "--report_to", "none"]
        *_, config = spo_parser().parse_args_and_config(arguments)
        assert (config.output_dir, config.learning_rate, config.num_candidates) == ("a", 0.25, 8)

    def test_missing_prompts_are_one_sentence(self, tmp_path):
        with pytest.raises(SystemExit, match="SPO needs prompts: name a dataset"):
            cli.main(["spo", "--output_dir", str(tmp_path), "--report_to", "none", "--use_cpu", "true"])


class TestSample:
    def sample(self, model, folder, *arguments) -> list[Path]:
        arguments = ["--model_name_or_path", model / "pipe", "--num_inference_steps", 3, *arguments]
        assert cli.main(["sample", *map(str, arguments), "--output_dir", str(folder), "--device", "cpu"]) == 0
        return sorted(folder.glob("0*.png"))  # without the grid

    def test_images_are_those_of_plain_diffusers(self, model, tmp_path, capsys):
        files = self.sample(
            model, tmp_path, "--lora", model / "lora", "--prompt", *PROMPTS[:2], "--images_per_prompt", 2, "--seed", 5
        )
        assert [file.name for file in files] == [f"0000{i}_seed{5 + i}.png" for i in range(4)]
        plain = tiny_sd_pipeline(tmp_path / "plain")
        settings = {"num_inference_steps": 3, "guidance_scale": 5.0, "eta": 1.0, "output_type": "np"}

        def expected():
            images = plain(PROMPTS[1], generator=torch.Generator().manual_seed(7), **settings).images
            return np.asarray(numpy_to_pil(images)[0]).astype(int)

        found = np.asarray(Image.open(files[2])).astype(int)
        assert np.abs(found - expected()).max() > 3
        plain.load_lora_weights(model / "lora")
        assert np.abs(found - expected()).max() <= 1
        record = json.loads((tmp_path / "samples.json").read_text())
        assert record["sampler"] == {
            "scheduler": "DDIMScheduler",
            "num_inference_steps": 3,
            "guidance_scale": 5.0,
            "eta": 1.0,
            "negative_prompt": "",
        }
        assert record["images"][2] == {"file": files[2].name, "prompt": PROMPTS[1], "seed": 7}
        assert "4 images in" in capsys.readouterr().out

    def test_scale_zero_is_the_base_model(self, model, tmp_path):
        (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
        arguments = ["--prompts", tmp_path / "prompts.txt", "--num_prompts", 2, "--height", 8, "--width", 24]
        base = self.sample(model, tmp_path / "base", *arguments)
        zero = self.sample(model, tmp_path / "zero", *arguments, "--lora", model / "lora", "--lora_scale", 0.0)
        assert len(base) == len(zero) == 2
        for one, other in zip(base, zero, strict=True):
            assert Image.open(one).size == (24, 8)
            assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))

    def test_bad_input(self, model, tmp_path):
        with pytest.raises(SystemExit, match="There are no prompts"):
            self.sample(model, tmp_path)
        with pytest.raises(SystemExit, match="no .safetensors file"):
            self.sample(model, tmp_path, "--prompt", "a cat", "--lora", model)
        with pytest.raises(SystemExit, match="`batch_size` must be at least 1"):
            self.sample(model, tmp_path, "--prompt", "a cat", "--batch_size", 0)
        with pytest.raises(SystemExit, match="`model_init_kwargs` must be JSON, got '{x'"):
            self.sample(model, tmp_path, "--prompt", "a cat", "--model_init_kwargs", "{x")
        with pytest.raises(SystemExit, match="There is no LoRA at .*nothing"):
            self.sample(model, tmp_path, "--prompt", "a cat", "--lora", model / "deep" / "nothing")

    @pytest.mark.parametrize("how", [["--variant", "fp16"], ["--model_init_kwargs", '{"variant": "fp16"}']])
    def test_a_repository_with_half_precision_files_only(self, tmp_path, how):
        """Regression: it could be trained and neither sampled nor evaluated."""
        tiny_sd_pipeline(tmp_path).to(torch.float16).save_pretrained(tmp_path / "model", variant="fp16")
        arguments = ["--model_name_or_path", tmp_path / "model", "--prompt", "a cat", "--num_inference_steps", 2]
        with pytest.raises(SystemExit, match="Could not load a diffusers pipeline"):
            self.sample(tmp_path, tmp_path / "none", *arguments)
        assert len(self.sample(tmp_path, tmp_path / "images", *arguments, *how)) == 1

    @pytest.mark.parametrize("command", ["spo", "step_reward", "evaluate", "sample"])
    def test_every_command_says_how_a_pipeline_is_loaded(self, command):
        parser = importlib.import_module(f"trl_spo.scripts.{command}").make_parser()
        assert {"--variant", "--revision", "--dtype", "--model_init_kwargs"} <= set(parser._option_string_actions)
        options = ["--variant", "fp16", "--revision", "main", "--model_init_kwargs", '{"use_safetensors": true}']
        options += ["--output_dir", "unused"]
        parsed = parser.parse_args_and_config(options)
        assert parsed[0].variant == "fp16" and parsed[0].revision == "main"
        (kwargs,) = [part.model_init_kwargs for part in parsed if hasattr(part, "model_init_kwargs")]
        assert kwargs == {"use_safetensors": True}


class TestEvaluate:
    """What needs no model; `test_scripts.py` runs an evaluation."""

    def parse(self, *arguments):
        return evaluate_parser().parse_args_and_config(list(arguments))

    def test_changes_of_a_protocol_are_named(self):
        model, sampler, _, _ = self.parse("--num_inference_steps", "20", "--guidance_scale", "7.5", "--seed", "3")
        protocol = make_protocol("spo-paper", sampler, model)
        assert (protocol.guidance_scale, protocol.seed, protocol.num_inference_steps) == (7.5, 3, 20)
        assert protocol.name == "spo-paper with guidance_scale=7.5, seed=3"
        model, sampler, _, _ = self.parse()
        assert make_protocol("spo-rollout", sampler, model).name == "spo-rollout"
        with pytest.raises(SystemExit, match="no protocol 'other'; there are spo-paper"):
            make_protocol("other", sampler, model)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--base"], "there is no --lora"),
            (["--base", "--lora", "x", "--base_model_name_or_path", "y"], "name two things to compare with"),
            ([], "There are no prompts"),
        ],
    )
    def test_contradictions_are_found_before_anything_is_loaded(self, arguments, message):
        with pytest.raises(SystemExit, match=message):
            cli.main(["evaluate", "--model_name_or_path", "does/not-exist", *arguments])

    def test_unknown_metrics(self, model, tmp_path):
        (tmp_path / "prompts.txt").write_text("a cat\n")
        arguments = ["--model_name_or_path", str(model / "pipe"), "--prompts", str(tmp_path / "prompts.txt")]
        with pytest.raises(SystemExit, match="no metric 'beauty'. There are pickscore, .*, step_reward; one"):
            cli.main(["evaluate", *arguments, "--metrics", "beauty"])
        with pytest.raises(ValueError, match=r"`metric_options` names \['aesthetic'\]"):
            self.parse("--metrics", "pickscore", "--metric_options", '{"aesthetic": {}}')
