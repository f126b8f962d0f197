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
Necessity: what a command says decides whether anybody gets through the first hour. Help that buries our options among a
hundred others, runs that end without a word, logs of 35 numbers, and notices that sound like failures send people away.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import logging
import shlex
import signal
import subprocess
import sys
import warnings
from types import SimpleNamespace

import accelerate.commands.launch as accelerate_launch
import pytest
import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from trl_spo import SPOConfig, SPOTrainer, StepRewardConfig
from trl_spo.export import load_lora_whole
from trl_spo.hub_files import load_diffusers_pipeline
from trl_spo.notices import OF_PROGRAMS, leave_out_notices
from trl_spo.scripts import cli
from trl_spo.scripts.evaluate import make_parser as evaluate_parser
from trl_spo.scripts.help import COMMON, GROUPS, groups_of
from trl_spo.scripts.spo import make_parser as spo_parser
from trl_spo.scripts.training import duration, pipeline_options, size_of
from trl_spo.training.log_lines import SPO_COLUMNS, STEP_REWARD_COLUMNS, LogLineCallback, log_in_lines
from trl_spo.training.run_record import settings_of
from trl_spo.training.trainer_options import REFUSED

from .testing_utils import PROMPTS, brightness_reward, image_pairs, tiny_clip, tiny_sd_pipeline, tiny_spo_config


TRAINING = (
    "--report_to none --use_cpu true --logging_steps 1 --max_steps 2 --num_inference_steps 3 --branch_start_step 1"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A pipeline, a CLIP and prompts on disk."""
    folder = tmp_path_factory.mktemp("world")
    tiny_sd_pipeline(folder).save_pretrained(folder / "a pipe")
    tiny_clip(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def spo_command(world, folder, *more) -> list[str]:
    arguments = ["--model_name_or_path", world / "a pipe", "--clip_name_or_path", world / "clip"]
    arguments += ["--processor_name_or_path", world / "clip", "--dataset_name", world / "prompts.txt"]
    arguments += ["--output_dir", folder, "--preference_threshold", 0.0, "--per_device_train_batch_size", 4, *more]
    return ["spo", *map(str, arguments), *TRAINING.split()]


def help_of(command: str, capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help", *words])
    assert stop.value.code == 0
    return capsys.readouterr().out


def options_of(command: str) -> set[str]:
    """The options of our dataclasses."""
    parser = importlib.import_module(f"trl_spo.scripts.{command.replace('-', '_')}").make_parser()
    return {field.name for part in parser.dataclass_types for field in dataclasses.fields(part)}


class TestHelp:
    @pytest.mark.parametrize("command", ["spo", "step-reward", "evaluate", "sample"])
    def test_all_of_ours_comes_first_and_is_said_once(self, command, capsys):
        text = help_of(command, capsys)
        shown = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
        assert len(shown) == len(set(shown))
        ours = options_of(command) - set(TrainingArguments.__dataclass_fields__)
        assert {f"--{name}" for name in ours} <= set(shown)
        assert {"--help", "--config", "--debug"} <= set(shown)
        assert not [option for option in shown if option.startswith("--no_") or "-" in option[2:]]
        usage = text.splitlines()[0]
        assert usage == f"usage: trl-spo {command} [--config FILE.yaml] [options]"
        assert max(map(len, text.splitlines())) <= 100

    def test_training_options_that_few_need_come_with_all(self, capsys):
        short, whole = help_of("spo", capsys), help_of("spo", capsys, "all")
        titles = [line for line in short.splitlines() if line.endswith(":") and not line.startswith(" ")]
        assert titles.index("SPO: rollouts:") < titles.index("common training options:") == len(titles) - 1
        for option in ("--learning_rate ", "--max_steps ", "--seed ", "--report_to ", "--save_steps "):
            assert option in short[short.index("common training options") :]
        for option in ("--neftune_noise_alpha", "--label_smoothing_factor", "--deepspeed"):
            assert option not in short and option in whole
        assert "`trl-spo spo --help all`" in short and len(short.splitlines()) < 260
        assert {f"--{f.name}" for f in dataclasses.fields(SPOConfig)} <= set(whole.replace("\n", " ").split()) | {
            "--debug"
        }

    def test_it_says_what_a_user_must_know(self, capsys):
        text = " ".join(help_of("spo", capsys).split())
        assert "--resume_from_checkpoint TEXT Go on from a checkpoint: `last`" in text
        assert "--accelerate_config NAME|FILE Several devices: cpu_2proc," in text
        assert "--dtype {float32,bfloat16,float16}" in text and "(default: float32)" in text
        assert "--kl_coef FLOAT" in text and "(default: 0.0)" in text
        assert "--model_init_kwargs JSON" in text and "Deprecated" not in text
        assert "--accelerate_config" not in help_of("sample", capsys)

    def test_the_table_names_no_option_that_is_gone(self):
        known = set(TrainingArguments.__dataclass_fields__) | {"reward"}
        for command in ("spo", "step-reward", "evaluate", "sample"):
            known |= options_of(command)
        named = {name for listed in GROUPS.values() for name in listed.split()} | set(COMMON)
        assert named - known <= {"gradient_checkpointing"}  # in transformers 4 only
        assert not set(COMMON) & set(REFUSED)

    def test_options_of_others_are_shown_whatever_the_table_says(self):
        assert groups_of(["dry_run", "seed"], everything=False) == {"sampler": ["seed"], "more options": ["dry_run"]}


class TestEndings:
    def test_a_run_says_where_its_result_is_and_what_comes_next(self, world, tmp_path, capsys):
        assert cli.main(spo_command(world, tmp_path / "my lora")) == 0
        output = capsys.readouterr().out
        *_, saved, following = output.strip().splitlines()
        assert (
            saved.startswith(f"Saved the LoRA to {tmp_path / 'my lora'} (") and "KiB; 2 steps on 8 pairs in " in saved
        )
        assert following.startswith("Next: trl-spo evaluate --lora ")
        model, sampler, _, evaluation = evaluate_parser().parse_args_and_config(shlex.split(following)[3:])
        assert (model.model_name_or_path, sampler.lora) == (str(world / "a pipe"), str(tmp_path / "my lora"))
        assert evaluation.base and sampler.prompts == "HELD_OUT_PROMPTS.txt"
        assert "'loss'" not in output and output.count("loss 0.69") == 2  # one line per log

        # The same folder again: refused, resumed with nothing left, or begun anew.
        with pytest.raises(SystemExit) as stop:
            cli.main(spo_command(world, tmp_path / "my lora"))
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert (
            "holds checkpoints of an earlier run: checkpoint-2. Go on with it by --resume_from_checkpoint last"
            in error
        )
        assert cli.main(spo_command(world, tmp_path / "my lora", "--resume_from_checkpoint", "last")) == 0
        assert "2 steps on 8 pairs before, nothing was left to train)" in capsys.readouterr().out
        assert cli.main(spo_command(world, tmp_path / "my lora", "--overwrite_output_dir")) == 0

    def test_ctrl_c_says_how_to_go_on(self, world, tmp_path, capsys, monkeypatch):
        trained = SPOTrainer.training_step

        def pressed(self, *args, **kwargs):
            signal.raise_signal(signal.SIGINT)
            return trained(self, *args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(SPOTrainer, "training_step", pressed)
            cli.main(spo_command(world, tmp_path / "out"))
        assert stop.value.code == 130
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last == (
            f"Stopped by Ctrl-C after step 1 of 2. checkpoint-1 is in {tmp_path / 'out'}: the same command with "
            "--resume_from_checkpoint last goes on from there."
        )
        assert not (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
        assert cli.main(spo_command(world, tmp_path / "out", "--resume_from_checkpoint", "last")) == 0
        assert "Saved the LoRA" in capsys.readouterr().out

    def test_ctrl_c_elsewhere_is_one_line(self, monkeypatch, capsys):
        def interrupted(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr("trl_spo.scripts.sample.main", interrupted)
        with pytest.raises(SystemExit) as stop:
            cli.main(["sample"])
        assert stop.value.code == 130
        assert capsys.readouterr().err == "trl-spo sample: stopped; what had been written before is whole.\n"

    def test_a_reward_model_names_the_command_that_uses_it(self, world, tmp_path, capsys):
        rows = image_pairs()
        Dataset.from_list([{**row, **_as_bytes(row)} for row in rows]).to_parquet(tmp_path / "pairs.parquet")
        arguments = ["--model_name_or_path", world / "a pipe", "--clip_name_or_path", world / "clip"]
        arguments += ["--processor_name_or_path", world / "clip", "--dataset_name", tmp_path / "pairs.parquet"]
        arguments += ["--output_dir", tmp_path / "reward", "--resolution", 16, "--guidance_scale", 3]
        training = "--report_to none --use_cpu true --logging_steps 1 --max_steps 2 --per_device_train_batch_size 3"
        assert cli.main(["step-reward", *map(str, arguments), *training.split()]) == 0
        *_, saved, following = capsys.readouterr().out.strip().splitlines()
        assert saved.startswith(f"Saved the reward model to {tmp_path / 'reward'} (") and "; 2 steps in " in saved
        assert following.startswith("Next: trl-spo spo ")
        options = [*shlex.split(following)[3:], "--output_dir", "unused", "--report_to", "none"]
        model, reward, _, config = spo_parser().parse_args_and_config(options)
        assert (model.model_name_or_path, config.guidance_scale) == (str(world / "a pipe"), 3.0)
        assert (reward.reward_model_name_or_path, config.dataset_name) == (str(tmp_path / "reward"), "PROMPTS.txt")

    def test_words(self, tmp_path):
        assert [duration(s) for s in (4.2, 65, 7300)] == ["4 s", "1 min 5 s", "2 h 1 min"]
        (tmp_path / "a.bin").write_bytes(b"0" * 1536)
        assert (size_of(tmp_path, "*.bin"), size_of(tmp_path, "*.txt")) == ("1.5 KiB", "0 bytes")
        model, *_ = spo_parser().parse_args_and_config(
            ["--output_dir", "x", "--report_to", "none", "--dtype", "bfloat16", "--variant", "fp16"]
        )
        assert pipeline_options(model)[2:] == ["--dtype", "bfloat16", "--variant", "fp16"]


def _as_bytes(row: dict) -> dict:
    images = {}
    for name in ("chosen", "rejected"):
        buffer = io.BytesIO()
        row[name].save(buffer, format="PNG")
        images[name] = {"bytes": buffer.getvalue(), "path": None}
    return images


class TestChecks:
    """What costs nothing is said before a model is loaded: `does/not-exist` would be an error of its own."""

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (
                ["--eval_strategy", "steps"],
                "--eval_strategy steps needs data that is not trained on: name it with --eval",
            ),
            (["--lora_init", "gausian"], "peft refuses an adapter with `lora_r=2` and `lora_init='gausian'`"),
            (["--lora_r", "0"], "peft refuses an adapter with `lora_r=0`"),
            (["--lora_alpha", "0"], "`lora_alpha` must be at least 1, got 0"),
            (["--dataset_prompt_column", "text"], "text"),
        ],
    )
    def test_of_spo(self, arguments, message, tmp_path, capsys):
        (tmp_path / "prompts.csv").write_text("prompt\na cat\n")
        command = ["spo", "--model_name_or_path", "does/not-exist", "--dataset_name", str(tmp_path / "prompts.csv")]
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, "--output_dir", str(tmp_path / "out"), *TRAINING.split(), *arguments])
        assert stop.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
        assert message in line and "not-exist" not in line

    def test_of_step_reward(self, tmp_path, capsys):
        command = ["step-reward", "--model_name_or_path", "does/not-exist", "--use_cpu", "true", "--report_to", "none"]
        with pytest.raises(SystemExit):
            cli.main([*command, "--output_dir", str(tmp_path), "--dataset_name", str(tmp_path / "nix.parquet")])
        assert "nix.parquet" in capsys.readouterr().err

    def test_the_other_vae_is_named_when_it_is_missing(self, world, tmp_path):
        """Regression: the folder of the pipeline was called broken."""
        with pytest.raises(
            ValueError, match=r"Could not load the other VAE \(AutoencoderKL\) from '.*no/vae': it is neither"
        ):
            load_diffusers_pipeline(world / "a pipe", vae=str(tmp_path / "no" / "vae"))


class TestLogLines:
    LOGS = {
        "loss": 0.69314,
        "step_reward/mean": 6.93412,
        "pairs/fresh_accuracy": 0.55,
        "pairs/valid_fraction": 0.7031,
        "kl": 2.316e-06,
        "num_pairs_seen": 20,
        "learning_rate": 5e-4,
        "skipped_steps": 0,
        "pairs/nonfinite": 3,
    }

    def test_of_training(self):
        line = "  ".join(LogLineCallback(SPO_COLUMNS).parts_of(self.LOGS))
        assert (
            line
            == "loss 0.6931  step reward    6.934  accuracy 0.55  valid pairs 0.70  kl 2.3e-06  3 pairs not finite"
        )

    def test_of_an_evaluation(self):
        logs = {"eval_reward_mean": 7.1, "eval_reward_std": 2.0, "eval_alignment_mean": 0.5, "eval_runtime": 3.0}
        assert LogLineCallback(SPO_COLUMNS).parts_of(logs) == ["evaluation:", "reward 7.1", "alignment 0.5"]
        logs = {"eval_accuracy": 0.7, "eval_accuracy/t_251": 0.6, "eval_loss": 0.5, "eval_samples_per_second": 3.0}
        parts = LogLineCallback(STEP_REWARD_COLUMNS).parts_of(logs)
        assert parts == ["evaluation:", "accuracy 0.7", "loss 0.5"]

    def test_the_summary_of_a_training_is_no_line(self, capsys):
        state = TrainerState(global_step=4, max_steps=4, is_world_process_zero=True)
        callback = LogLineCallback(SPO_COLUMNS, bar=False)
        callback.on_log(None, state, TrainerControl(), logs={"train_runtime": 3.0, "train_loss": 0.69})
        assert capsys.readouterr().out == ""

    def test_a_resumed_bar_begins_where_the_run_stopped(self):
        """Regression: it jumped to the middle at once, and predicted an end from that."""
        state = TrainerState(global_step=6, max_steps=10, is_world_process_zero=True)
        callback = LogLineCallback(SPO_COLUMNS, "SPO")
        args = SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=2, world_size=1)
        stream = io.StringIO()
        with contextlib.redirect_stderr(stream):
            callback.on_train_begin(args, state, TrainerControl())
            assert (callback.training_bar.initial, callback.training_bar.total) == (6, 10)
            state.global_step = 7
            callback.on_step_end(args, state, TrainerControl())
            assert callback.training_bar.n == 7
            callback.on_train_end(args, state, TrainerControl())

    def test_a_trainer_in_python_keeps_what_transformers_prints(self, tmp_path):
        config = tiny_spo_config(tmp_path, disable_tqdm=False)
        trainer = SPOTrainer(config, tiny_sd_pipeline(tmp_path), brightness_reward, train_dataset=PROMPTS)
        kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
        assert ProgressCallback in kinds and LogLineCallback not in kinds
        log_in_lines(trainer, SPO_COLUMNS)
        kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
        assert LogLineCallback in kinds and not {ProgressCallback, PrinterCallback} & set(kinds)


class TestNotices:
    @pytest.mark.parametrize(("name", "words"), OF_PROGRAMS)
    def test_only_the_words_that_are_about_nothing_are_left_out(self, name, words):
        leave_out_notices()
        leave_out_notices()
        source = logging.getLogger(name)
        heard = []
        handler = logging.Handler()
        handler.emit = lambda record: heard.append(record.getMessage())
        source.addHandler(handler)
        try:
            source.error(f"`X` {words}; falling back")
            source.error("something else")
        finally:
            source.removeHandler(handler)
        assert heard == ["something else"] and len(source.filters) == 1

    @pytest.mark.skipif(torch.cuda.is_available(), reason="asks what is said without a GPU")
    def test_pinned_memory_is_no_topic_without_a_gpu(self):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            leave_out_notices()
            list(torch.utils.data.DataLoader(range(2), pin_memory=True))
            warnings.warn("something else")
        assert [str(warning.message) for warning in heard] == ["something else"]

    def test_a_pipeline_is_loaded_without_deprecations(self, world):
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            for name in ("dtype", "torch_dtype"):
                pipeline = load_diffusers_pipeline(world / "a pipe", **{name: "bfloat16"})
                assert str(pipeline.unet.dtype) == "torch.bfloat16"
        with pytest.raises(ValueError, match="`dtype` and `torch_dtype` are one argument"):
            load_diffusers_pipeline(world / "a pipe", dtype="float16", torch_dtype="float16")

    @pytest.mark.parametrize("config", [SPOConfig, StepRewardConfig])
    def test_checkpointing_has_one_name_in_all_versions(self, config, tmp_path, caplog):
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            made = config(str(tmp_path), activation_checkpointing=True, use_cpu=True, report_to="none")
        assert made.gradient_checkpointing and "deprecated" not in caplog.text

    def test_a_lora_of_the_denoiser_causes_no_alarm(self, world, tmp_path, capfd):
        trainer = SPOTrainer(
            tiny_spo_config(tmp_path), tiny_sd_pipeline(tmp_path), brightness_reward, train_dataset=PROMPTS
        )
        trainer.save_model()
        capfd.readouterr()
        load_lora_whole(tiny_sd_pipeline(tmp_path), tmp_path / "pytorch_lora_weights.safetensors")
        assert "No LoRA keys" not in capfd.readouterr().err


def test_the_launcher_passes_on_how_its_processes_ended(monkeypatch):
    """What a process says is enough: no traceback of the launcher, and the same status."""

    def launch(error):
        def command(parsed):
            raise error

        monkeypatch.setattr(accelerate_launch, "launch_command", command)
        return cli.launch_with_accelerate("trl_spo.scripts.spo", ["--num_processes", "1", "--cpu"], [])

    assert launch(subprocess.CalledProcessError(130, [sys.executable])) == 130
    assert launch(subprocess.CalledProcessError(-15, [sys.executable])) == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_history_is_json(tmp_path):
    """Settings that are no JSON, such as enumerations, must not break a checkpoint."""
    config = tiny_spo_config(tmp_path, lr_scheduler_type="linear", max_steps=2)
    assert json.loads(json.dumps(settings_of(config)))["lr_scheduler_type"] == "linear"
