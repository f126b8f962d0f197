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
Necessity: runs are stopped, by people with Ctrl-C and by clusters with SIGTERM, and what is lost then is hours. A stopped run
must leave a checkpoint from which it goes on as if it had never stopped, on every process; `last` must mean a checkpoint of
the run that stopped, not of one before it; and a model card must not tell a recipe that only the last steps had.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

import trl_spo.training.stopping as stopping
from trl_spo import SPOTrainer, StepAwareRewardModel, StepRewardTrainer, StopOnSignalCallback
from trl_spo.training.checkpointing import CheckpointFiles, last_checkpoint
from trl_spo.training.model_card import history
from trl_spo.training.run_record import FOLDER_RECORD_NAME, RunRecord, describe_changes, settings_of

from .testing_utils import (
    PROMPTS,
    brightness_reward,
    image_pairs,
    state_of,
    tiny_clip,
    tiny_sd_pipeline,
    tiny_spo_config,
    tiny_step_reward_config,
    train_logs,
)


ROOT = Path(__file__).parents[1]
STEPS = 5


class Press(TrainerCallback):
    """Sends this process signals in the middle of a step."""

    def __init__(self, *signals: int, step: int = 3):
        self.signals = signals
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for number in self.signals:
                os.kill(os.getpid(), number)


def spo(folder: Path, *callbacks, **settings) -> SPOTrainer:
    defaults = {"max_steps": STEPS, "save_strategy": "no", "num_inference_steps": 3, "guidance_scale": 1.0}
    config = tiny_spo_config(folder / "out", per_device_rollout_batch_size=2, **{**defaults, **settings})
    return SPOTrainer(
        config,
        tiny_sd_pipeline(folder),
        brightness_reward,
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS[:2],
        callbacks=[*callbacks, StopOnSignalCallback()],
    )


def step_reward(folder: Path, *callbacks, **settings) -> StepRewardTrainer:
    config = tiny_step_reward_config(folder / "out", **{"max_steps": STEPS, **settings})
    clip = tiny_clip(folder)
    torch.manual_seed(0)
    return StepRewardTrainer(
        config,
        tiny_sd_pipeline(folder),
        StepAwareRewardModel.from_clip(clip, processor=clip),
        train_dataset=image_pairs(),
        callbacks=[*callbacks, StopOnSignalCallback()],
    )


def numbers_of(trainer) -> list[dict]:
    """The logs of the training without seconds."""
    return [{k: v for k, v in log.items() if not k.startswith("time/")} for log in train_logs(trainer)]


@pytest.fixture
def handlers():
    """Whether the signals are those of the caller again afterwards."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.usefixtures("handlers")
class TestStopping:
    @pytest.mark.parametrize("make, number", [(spo, signal.SIGINT), (step_reward, signal.SIGTERM)])
    def test_the_run_that_goes_on_is_the_run_that_never_stopped(self, make, number, tmp_path, capfd):
        whole = make(tmp_path / "whole", logging_steps=2)
        whole.train()
        stopped = make(tmp_path, Press(number), logging_steps=2)
        stopped.train()
        assert (stopped.stopped_by, stopped.state.global_step) == (number, 3)
        assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
        assert capfd.readouterr().err.count("Stopping after this step, with a checkpoint.") == 1
        resumed = make(tmp_path, logging_steps=2)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.stopped_by is None and resumed.state.global_step == STEPS
        for name, value in state_of(whole.model).items():
            assert torch.equal(value, resumed.model.state_dict()[name]), name
        assert numbers_of(resumed) == numbers_of(whole)

    def test_it_takes_no_time_for_images_and_for_the_best_checkpoint(self, tmp_path):
        """transformers deletes all checkpoints but the best at the end: also the one that was just written."""
        images = {"log_images_steps": 100, "num_eval_images": 1}
        best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        trainer = spo(
            tmp_path, Press(signal.SIGINT), load_best_model_at_end=True, save_total_limit=1, **best, **images
        )
        trainer.train()
        assert trainer.state.global_step == 3 and (tmp_path / "out" / "checkpoint-3" / "optimizer.pt").is_file()
        assert trainer.state.best_model_checkpoint is not None
        assert [path.name for path in (tmp_path / "out" / "images").glob("step_*")] == ["step_000000.png"]

    def test_a_launcher_that_repeats_the_signal_is_one_press(self, tmp_path):
        trainer = spo(tmp_path, Press(signal.SIGINT, signal.SIGINT, signal.SIGTERM))
        trainer.train()
        assert trainer.stopped_by == signal.SIGINT and (tmp_path / "out" / "checkpoint-3").is_dir()

    def test_a_second_press_ends_at_once(self, tmp_path, monkeypatch):
        monkeypatch.setattr(stopping, "SAME_PRESS", 0.0)
        trainer = spo(tmp_path, Press(signal.SIGINT, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert trainer.state.global_step == 2 and not list((tmp_path / "out").glob("checkpoint-*"))

    def test_a_press_during_the_last_step_is_too_late(self, tmp_path):
        trainer = spo(tmp_path, Press(signal.SIGINT, step=STEPS))
        trainer.train()
        assert trainer.stopped_by is None and trainer.state.global_step == STEPS

    def test_an_error_gives_the_signals_back(self, tmp_path):
        class Failing(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                raise RuntimeError("of a callback")

        with pytest.raises(RuntimeError, match="of a callback"):
            spo(tmp_path, Failing()).train()

    def test_another_thread_trains_without_it(self, tmp_path):
        trainer = spo(tmp_path, max_steps=1)
        thread = threading.Thread(target=trainer.train)
        thread.start()
        thread.join()
        assert trainer.state.global_step == 1


def test_two_processes_stop_after_the_same_step_and_go_on_exactly(tmp_path):
    """Only rank 1 gets the signal. `run_stopping.py` is the program of both."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    config = ROOT / "trl_spo" / "accelerate_configs" / "cpu_2proc.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", 0]
    command += [Path(__file__).with_name("run_stopping.py"), tmp_path]
    run = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2)]
    for rank in ranks:
        assert (rank["stopped_by"], rank["stopped_at"], rank["checkpoints"]) == (signal.SIGTERM, 2, ["checkpoint-2"])
        assert rank["weights"]["resumed"] == rank["weights"]["whole"] != rank["weights"]["stopped"]
    assert ranks[0]["weights"] == ranks[1]["weights"]


class TestFolders:
    def test_last_is_of_the_run_that_trained_last(self, tmp_path, caplog):
        """Regression: the highest number won, which an earlier run had written."""
        spo(tmp_path, save_strategy="steps", save_steps=2, kl_coef=12.0).train()
        assert caplog.text.count("holds checkpoints of an earlier run") == 0
        caplog.clear()
        spo(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
        (notice,) = [line for line in caplog.messages if "holds checkpoints of an earlier run" in line]
        assert "checkpoint-2, checkpoint-4, checkpoint-5. They stay beside those of this run" in notice
        caplog.clear()
        resumed = spo(tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
        resumed.train(resume_from_checkpoint=True)
        (notice,) = [line for line in caplog.messages if "also holds" in line]
        assert notice.endswith("which are passed over: checkpoint-2, checkpoint-4, checkpoint-5.")
        assert len(train_logs(resumed)) == 2 and "->" not in caplog.text

        # An earlier checkpoint that is named is meant; from then on that run is the last one.
        older = spo(tmp_path, save_strategy="no", max_steps=5, kl_coef=12.0)
        older.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
        assert last_checkpoint(tmp_path / "out", SPOTrainer.checkpoint_files).endswith("checkpoint-5")

    def test_a_run_without_a_checkpoint_does_not_take_one_of_another_run(self, tmp_path):
        spo(tmp_path, save_strategy="steps", save_steps=4, max_steps=4).train()
        spo(tmp_path, max_steps=1, overwrite_output_dir=True).train()
        with pytest.raises(ValueError, match="no checkpoint in .* checkpoint-4 belong.? to an earlier run; name"):
            spo(tmp_path).train(resume_from_checkpoint=True)

    def test_a_folder_of_one_run_has_no_file_more(self, tmp_path):
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
        for _ in range(2):
            spo(tmp_path, **settings).train()
            assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-1"}

    def test_checkpoints_of_old_versions_are_one_run(self, tmp_path):
        files = CheckpointFiles(weights=("weights",), record="state.json")
        for step in (2, 10):
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir()
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
                torch.save({}, folder / name)
            (folder / "weights").touch()
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
            (folder / "state.json").write_text("{}")
        assert last_checkpoint(tmp_path, files) == str(tmp_path / "checkpoint-10")

    def test_a_finished_run_says_that_nothing_is_left(self, tmp_path, caplog):
        spo(tmp_path, save_strategy="steps", max_steps=1).train()
        again = spo(tmp_path, max_steps=1)
        again.train(resume_from_checkpoint=True)
        assert again.nothing_to_train
        assert "has taken all of its steps (1, and `max_steps=1`): there is nothing to train." in caplog.text


class TestHistory:
    def test_changed_settings_are_said_once_and_stand_in_the_card(self, tmp_path, caplog):
        """Regression: the card of a run of two parts told the settings of the second for all steps."""
        first = {"kl_coef": 12.0, "num_candidates": 4, "learning_rate": 1e-3}
        spo(tmp_path, save_strategy="steps", save_steps=2, max_steps=2, **first).train()
        second = {"kl_coef": 0.0, "num_candidates": 2, "learning_rate": 5e-4, "memory_budget": 1.0}
        trainer = spo(tmp_path, max_steps=3, **second)
        trainer.train(resume_from_checkpoint=True)
        (notice,) = [line for line in caplog.messages if "goes on from step" in line]
        assert "from step 2. Other settings from here on" in notice
        assert "num_candidates: 4 -> 2; kl_coef: 12.0 -> 0.0." in notice and "memory_budget" not in notice
        assert "keeps its learning_rate 0.001, whatever the config says" in notice
        assert trainer.optimizer.param_groups[0]["lr"] == 1e-3  # it is true
        trainer.save_model()
        card = (tmp_path / "out" / "README.md").read_text()
        assert "| `kl_coef` | 12.0 (steps 1 to 2), 0.0 (steps 3 to 3) |" in card
        assert "| `num_candidates` | 4 (steps 1 to 2), 2 (steps 3 to 3) |" in card
        assert "| `learning_rate` | 0.001 |" in card and "| `beta` | 10.0 |" in card

    def test_a_second_change_and_a_way_back(self):
        record = RunRecord.new({"beta": 10.0, "pair": "random", "learning_rate": 1.0})
        assert record.go_on(4, {"beta": 10.0, "pair": "random", "learning_rate": 1.0}) == {}
        assert record.go_on(6, {"beta": 5.0, "pair": "random", "learning_rate": 2.0}) == {
            "beta": (10.0, 5.0),
            "learning_rate": (1.0, 2.0),
        }
        assert record.go_on(8, {"beta": 10.0, "pair": "random", "learning_rate": 2.0})["beta"] == (5.0, 10.0)
        assert history(record.parts, 9) == {
            "learning_rate": 1.0,
            "beta": "10.0 (steps 1 to 6), 5.0 (steps 7 to 8), 10.0 (steps 9 to 9)",
        }
        # From a checkpoint before the second change, that change has not happened.
        record.go_on(7, {"beta": 5.0, "pair": "random", "learning_rate": 2.0})
        assert history(record.parts, 9)["beta"] == "10.0 (steps 1 to 6), 5.0 (steps 7 to 9)"

    def test_what_an_old_checkpoint_does_not_tell_is_not_invented(self):
        record = RunRecord.without_history()
        assert record.go_on(5, {"beta": 1.0}) == {}
        assert history(record.parts, 7) == {"beta": "not recorded (steps 1 to 5), 1.0 (steps 6 to 7)"}

    def test_local_paths_stay_private(self):
        record = RunRecord.new({"dataset_name": "/home/me/prompts.txt"})
        record.go_on(1, {"dataset_name": "someone/prompts"})
        assert history(record.parts, 2) == {
            "dataset_name": "a local one (steps 1 to 1), someone/prompts (steps 2 to 2)"
        }

    def test_settings_that_count(self, tmp_path):
        settings = settings_of(tiny_spo_config(tmp_path, hub_token="hf_secret", memory_budget=3.0))
        assert settings["kl_coef"] == 0.0 and settings["learning_rate"] == 1e-3
        assert not {"hub_token", "memory_budget", "output_dir", "max_steps"} & set(settings)
        assert describe_changes({}) == ""
        reward = settings_of(tiny_step_reward_config(tmp_path))
        assert reward["caption_loss_coef"] == 0.0 and "cache_latents" not in reward


def test_the_note_of_a_mixed_folder_is_not_pushed():
    assert FOLDER_RECORD_NAME.startswith("_")  # as `push_to_hub` of transformers leaves such files out
