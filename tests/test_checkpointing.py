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
Necessity: a checkpoint is needed when a run has just died, often while it was saving, and nobody notices before that it
was not whole. `reliability/kill_matrix.py` kills runs at about a hundred points; six of them run here.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from trl_spo import (
    EMACallback,
    LatentRewardModel,
    SPOTrainer,
    StepAwareRewardModel,
    StepRewardTrainer,
    wrap_pipeline,
)
from trl_spo.training.checkpointing import (
    STAGING_NAME,
    checkpoint_problems,
    checkpoint_to_resume,
    clear_staging,
    last_checkpoint,
    move_files,
    publish,
    repair,
    rotate,
    write_text,
)
from trl_spo.training.ema import EMA_NAME
from trl_spo.training.pair_metrics import PairMetrics
from trl_spo.training.waiting_pairs import check_base, sample_base_weights

from .testing_utils import (
    PROMPTS,
    brightness_reward,
    changed,
    state_of,
    tiny_clip,
    tiny_sd_pipeline,
    tiny_spo_config,
    tiny_step_reward_config,
)


LORA = "pytorch_lora_weights.safetensors"
SPO_FILES = {
    LORA, "README.md", "sampler.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    "spo_state.json", "spo_pairs.safetensors",
}  # fmt: skip
FOR_READERS = {"README.md", "sampler.json"}  # a run goes on without them


def spo_trainer(folder, name="out", callbacks=None, **settings):
    defaults = {
        "num_inference_steps": 3, "guidance_scale": 1.0, "per_device_train_batch_size": 3, "max_steps": 4,
        "per_device_rollout_batch_size": 2, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    return SPOTrainer(
        tiny_spo_config(folder / name, **{**defaults, **settings}),
        tiny_sd_pipeline(folder),
        brightness_reward,
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS[:1],
        callbacks=callbacks,
    )


def reward_trainer(folder, name="out", callbacks=None, **settings):
    colors = ["red", "green", "blue", "white"]
    pairs = [
        {"prompt": prompt, "chosen": Image.new("RGB", (16, 16), colors[i % 4]), "rejected": Image.new("RGB", (16, 16))}
        for i, prompt in enumerate(PROMPTS)
    ]
    defaults = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 4, "save_strategy": "steps",
        "save_steps": 2, "logging_steps": 3, "warmup_steps": 500,
    }  # fmt: skip
    model = StepAwareRewardModel.from_clip(tiny_clip(folder))
    config = tiny_step_reward_config(folder / name, **{**defaults, **settings})
    return StepRewardTrainer(config, tiny_sd_pipeline(folder), model, train_dataset=pairs, callbacks=callbacks)


FILES = SPOTrainer.checkpoint_files
FILES_OF = {spo_trainer: FILES, reward_trainer: StepRewardTrainer.checkpoint_files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the checkpoints 2 and 4 of a run, not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    spo_trainer(folder).train()
    return folder / "out"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def fake_checkpoint(folder: Path, step: int, mark: str = "") -> Path:
    folder = folder / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "mark": mark}))
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestFiles:
    def test_publish_gives_the_name_and_replaces_an_older_one(self, tmp_path):
        old = fake_checkpoint(tmp_path, 4, "old")
        staged = fake_checkpoint(tmp_path / STAGING_NAME, 4, "new")
        publish(staged, old)
        assert json.loads((old / "trainer_state.json").read_text())["mark"] == "new"
        assert names(tmp_path) == {"checkpoint-4"}
        publish(staged, old)  # the second process of a shared disk finds it done

    def test_a_replacement_that_was_cut_short_is_finished(self, tmp_path):
        staging = tmp_path / STAGING_NAME
        fake_checkpoint(staging, 4, "old").rename(staging / "replaced-checkpoint-4")
        fake_checkpoint(staging, 4, "new")
        repair(tmp_path)
        assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["mark"] == "new"
        clear_staging(tmp_path)
        assert names(tmp_path) == {"checkpoint-4"}

    def test_the_old_one_comes_back_where_the_new_one_is_gone(self, tmp_path):
        staging = tmp_path / STAGING_NAME
        fake_checkpoint(staging, 4, "old").rename(staging / "replaced-checkpoint-4")
        clear_staging(tmp_path)
        assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["mark"] == "old"

    def test_unfinished_checkpoints_are_cleared(self, tmp_path):
        fake_checkpoint(tmp_path / STAGING_NAME, 4)
        kept = fake_checkpoint(tmp_path, 2)
        clear_staging(tmp_path)
        assert names(tmp_path) == {kept.name}

    @pytest.mark.parametrize(
        "limit, best, left",
        [(None, None, {2, 4, 6, 8}), (0, None, {2, 4, 6, 8}), (1, None, {8}), (2, None, {6, 8}), (1, 2, {2, 8}),
         (2, 2, {2, 8}), (3, 2, {2, 6, 8}), (1, 8, {8}), (9, None, {2, 4, 6, 8})],
    )  # fmt: skip
    def test_rotation(self, tmp_path, limit, best, left):
        for i, step in enumerate((2, 4, 6, 8)):
            os.utime(fake_checkpoint(tmp_path, step) / "trainer_state.json", (i, i))
        rotate(tmp_path, limit, tmp_path / "checkpoint-8", best and tmp_path / f"checkpoint-{best}")
        assert names(tmp_path) == {f"checkpoint-{step}" for step in left}

    def test_rotation_knows_a_folder_that_is_used_again(self, tmp_path):
        """Higher numbers of an earlier run are older than what was just written."""
        for time, step in ((1, 10), (2, 12), (3, 2)):
            os.utime(fake_checkpoint(tmp_path, step) / "trainer_state.json", (time, time))
        rotate(tmp_path, 2, tmp_path / "checkpoint-2")
        assert names(tmp_path) == {"checkpoint-12", "checkpoint-2"}

    def test_files_are_moved_over_those_that_are_there(self, tmp_path):
        (tmp_path / "new" / "unet").mkdir(parents=True)
        (tmp_path / "new" / "unet" / "config.json").write_text("2")
        (tmp_path / "out" / "unet").mkdir(parents=True)
        (tmp_path / "out" / "unet" / "config.json").write_text("1")
        (tmp_path / "out" / "other").write_text("stays")
        move_files(tmp_path / "new", tmp_path / "out")
        assert (tmp_path / "out" / "unet" / "config.json").read_text() == "2"
        assert names(tmp_path / "out") == {"unet", "other"} and not (tmp_path / "new").exists()

    def test_text_is_whole_or_as_it_was(self, tmp_path):
        write_text(tmp_path / "README.md", "one")
        with pytest.raises(UnicodeEncodeError):
            write_text(tmp_path / "README.md", "two \ud800")
        assert (tmp_path / "README.md").read_text() == "one"


class TestChoice:
    def test_a_finished_run_is_complete(self, finished):
        assert names(finished) >= {"checkpoint-2", "checkpoint-4"} and STAGING_NAME not in names(finished)
        for step in (2, 4):
            assert names(finished / f"checkpoint-{step}") == SPO_FILES
            assert checkpoint_problems(finished / f"checkpoint-{step}", FILES) == []
        assert last_checkpoint(finished, FILES) == str(finished / "checkpoint-4")

    @pytest.mark.parametrize("how", ["missing", "empty", "half", "two bytes less", "overwritten"])
    @pytest.mark.parametrize("file", sorted(SPO_FILES - FOR_READERS))
    def test_a_damaged_checkpoint_is_passed_over(self, run, file, how):
        path = run / "checkpoint-4" / file
        size = path.stat().st_size
        if how == "missing":
            path.unlink()
        elif how == "overwritten":
            path.write_bytes(b"\0" * size)
        else:
            os.truncate(path, {"empty": 0, "half": size // 2, "two bytes less": size - 2}[how])
        assert last_checkpoint(run, FILES) == str(run / "checkpoint-2")
        with pytest.raises(ValueError, match="not a complete checkpoint: .*. Resume from '.*checkpoint-2'") as error:
            checkpoint_to_resume(run / "checkpoint-4", run, files=FILES)
        assert file in str(error.value) or (file == LORA and "weights are missing" in str(error.value))

    def test_an_empty_file_of_a_callback_is_no_damage(self, run):
        """Many mark what is finished like this."""
        (run / "checkpoint-4" / "_SUCCESS").touch()
        assert last_checkpoint(run, FILES) == str(run / "checkpoint-4")

    def test_what_was_passed_over_is_logged(self, run, monkeypatch):
        warnings = []
        monkeypatch.setattr("trl_spo.training.checkpointing.logger.warning", warnings.append)
        (run / "checkpoint-4" / "optimizer.pt").unlink()
        last_checkpoint(run, FILES)
        assert len(warnings) == 1 and "checkpoint-4 is passed over: optimizer.pt is missing" in warnings[0]

    def test_none_is_complete(self, run):
        for step in (2, 4):
            (run / f"checkpoint-{step}" / "scheduler.pt").unlink()
        assert last_checkpoint(run, FILES) is None
        with pytest.raises(ValueError, match="no checkpoint in .* to resume from.*scheduler.pt is missing"):
            checkpoint_to_resume(True, run, files=FILES)
        with pytest.raises(ValueError, match="There is no complete one beside it"):
            checkpoint_to_resume(run / "checkpoint-2", run, files=FILES)

    def test_there_is_none(self, tmp_path):
        assert last_checkpoint(tmp_path / "nothing") is None
        assert checkpoint_to_resume(None, tmp_path) is None and checkpoint_to_resume(False, tmp_path) is None
        with pytest.raises(ValueError, match="no checkpoint in .* to resume from"):
            checkpoint_to_resume(True, tmp_path)
        with pytest.raises(ValueError, match="there is no such folder"):
            checkpoint_to_resume(tmp_path / "checkpoint-9", tmp_path)

    def test_other_folders_are_no_checkpoints(self, run):
        for name in ("checkpoint-best", "checkpoint-9-old", "my-checkpoint-9"):
            shutil.copytree(run / "checkpoint-2", run / name)
        (run / "checkpoint-99").write_text("a file")
        assert last_checkpoint(run, FILES) == str(run / "checkpoint-4")

    def test_numbers_count_not_letters(self, run):
        (run / "checkpoint-4").rename(run / "checkpoint-10")
        (run / "checkpoint-2").rename(run / "checkpoint-9")
        assert last_checkpoint(run, FILES) == str(run / "checkpoint-10")

    def test_processes(self, run, monkeypatch):
        warnings = []
        monkeypatch.setattr("trl_spo.training.checkpointing.logger.warning", warnings.append)
        assert checkpoint_to_resume(True, run, world_size=2, files=FILES) == str(run / "checkpoint-4")
        assert len(warnings) == 1 and "was written by 1 process(es) and this run has 2" in warnings.pop()
        folder = run / "checkpoint-4"
        (folder / "rng_state.pth").rename(folder / "rng_state_1.pth")
        assert checkpoint_problems(folder, FILES) == ["it has random states of processes [1] only"]
        shutil.copy(folder / "rng_state_1.pth", folder / "rng_state_0.pth")
        assert checkpoint_to_resume(True, run, world_size=2, files=FILES) == str(folder) and not warnings
        assert checkpoint_to_resume(folder, run, files=FILES) == str(folder)
        assert "was written by 2 process(es) and this run has 1" in warnings.pop()

    @pytest.mark.parametrize("world", [1, 2, 3])
    def test_what_waits_to_be_logged_is_divided_among_other_processes(self, world):
        """
        Two processes have seen losses of 1, 2 and 3, 4, 5 and trained for 6 and 8 seconds: whoever reads them back, the
        losses sum to 15 of 5 pairs. Checkpoints of old versions do not say how a metric is reduced.
        """
        saved = [
            {"loss": [3.0, 2], "time/train": [6.0, 1], "skipped_steps": [1, 0]},
            {"loss": [12.0, 3], "time/train": [8.0, 2], "skipped_steps": [0, 0]},
        ]
        parts = []
        for rank in range(world):
            metrics = PairMetrics()
            metrics.restore(saved, {}, rank, world)
            parts.append(metrics.state_dict())
        assert [sum(part["loss"][i] for part in parts if part) for i in (0, 1)] == [15.0, 5.0]
        metrics.clear()
        logged = metrics.pop(gather=lambda own: parts)
        assert logged == {"loss": 3.0, "time/train": 14.0 / world, "skipped_steps": 1.0}

    def test_other_forms_of_weights(self, run):
        """A whole denoiser in its folder, a sharded reward model, and what DeepSpeed and FSDP leave."""
        folder = run / "checkpoint-4"
        (folder / LORA).unlink()
        assert checkpoint_problems(folder, FILES)[0].startswith(
            "the weights are missing (pytorch_lora_weights.safetensors or "
        )
        (folder / "unet").mkdir()
        save_file({"a": torch.ones(2)}, folder / "unet" / "diffusion_pytorch_model.safetensors")
        assert checkpoint_problems(folder, FILES) == ["unet/config.json is missing"]
        (folder / "unet" / "config.json").write_text("{}")
        assert checkpoint_problems(folder, FILES) == []
        shutil.rmtree(folder / "unet")
        for name in ("spo_state.json", "spo_pairs.safetensors"):
            (folder / name).unlink()
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
        assert checkpoint_problems(folder) == ["model-00002-of-00002.safetensors is missing"]
        save_file({"b": torch.ones(2)}, folder / "model-00002-of-00002.safetensors")
        assert checkpoint_problems(folder) == []
        for path in folder.glob("model*"):
            path.unlink()
        for name in ("optimizer.pt", "scheduler.pt"):
            (folder / name).unlink()
        (folder / "global_step4").mkdir()
        assert checkpoint_problems(folder) == []

    def test_each_trainer_refuses_checkpoints_of_the_other(self, run, tmp_path):
        """What a checkpoint has is declared by the trainer, so another one's is refused before anything is read."""
        reward_trainer(tmp_path, "reward").train()
        other = tmp_path / "reward" / "checkpoint-4"
        assert checkpoint_problems(other, FILES_OF[reward_trainer]) == []
        with pytest.raises(ValueError, match="a checkpoint of another trainer, which wrote step_reward_state.json"):
            spo_trainer(tmp_path).train(resume_from_checkpoint=other)
        assert checkpoint_problems(other, FILES_OF[spo_trainer])
        with pytest.raises(ValueError, match="a checkpoint of another trainer, which wrote spo_state.json"):
            reward_trainer(tmp_path, "reward").train(resume_from_checkpoint=run / "checkpoint-4")

    def test_nothing_is_unpickled(self, run, tmp_path):
        """What looks for a checkpoint must not run what is in it."""

        class Payload:
            def __reduce__(self):
                return Path.touch, (tmp_path / "touched",)

        torch.save(Payload(), run / "checkpoint-4" / "training_args.bin")
        (run / "checkpoint-4" / "extra.pt").write_bytes(pickle.dumps(Payload()))
        assert last_checkpoint(run, FILES) == str(run / "checkpoint-4")  # what is not ours is not read
        (run / "checkpoint-4" / "optimizer.pt").write_bytes(pickle.dumps(Payload()))
        assert last_checkpoint(run, FILES) == str(run / "checkpoint-2")  # a bare pickle is none of ours
        shutil.copy(run / "checkpoint-2" / "optimizer.pt", run / "checkpoint-4")
        torch.save(Payload(), run / "checkpoint-4" / "rng_state.pth")
        with pytest.raises(ValueError, match="rng_state.pth was refused"):
            spo_trainer(tmp_path, max_steps=5).train(resume_from_checkpoint=run / "checkpoint-4")
        assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("make", [spo_trainer, reward_trainer])
class TestTrainers:
    def test_the_only_checkpoint_is_never_lost(self, make, tmp_path):
        """Regression: with one checkpoint allowed, the old one was deleted before our files were in the new one."""
        seen = []

        class Look(TrainerCallback):
            def on_save(self, args, state, control, **kwargs):
                seen.append(
                    (names(Path(args.output_dir)) & {"checkpoint-2", "checkpoint-4", STAGING_NAME}, state.global_step)
                )

        make(tmp_path, callbacks=[Look()], save_total_limit=1).train()
        assert seen == [({"checkpoint-2"}, 2), ({"checkpoint-4"}, 4)]
        assert last_checkpoint(tmp_path / "out", FILES_OF[make]) == str(tmp_path / "out" / "checkpoint-4")

    def test_a_save_that_fails_leaves_the_checkpoint_before(self, make, tmp_path, monkeypatch):
        trainer = make(tmp_path, save_total_limit=1)
        write = trainer._write_state

        def full_disk(folder):
            if folder.name == "checkpoint-4":
                raise OSError(28, "No space left on device")
            write(folder)

        monkeypatch.setattr(trainer, "_write_state", full_disk)
        with pytest.raises(OSError, match="No space left"):
            trainer.train()
        assert last_checkpoint(tmp_path / "out", FILES_OF[make]) == str(tmp_path / "out" / "checkpoint-2")
        trainer.save_model()  # goes to its own place again
        assert not names(tmp_path / "out") & {STAGING_NAME, "checkpoint-4"}
        assert names(tmp_path / "out") & {LORA, "model.safetensors"}
        make(tmp_path, save_total_limit=1).train(resume_from_checkpoint=True)
        assert STAGING_NAME not in names(tmp_path / "out")
        assert last_checkpoint(tmp_path / "out", FILES_OF[make]) == str(tmp_path / "out" / "checkpoint-4")

    def test_again_in_the_same_folder(self, make, tmp_path):
        for _ in range(2):
            fake_checkpoint(tmp_path / "out" / STAGING_NAME, 7)
            trainer = make(tmp_path)
            trainer.train()
        assert {n for n in names(tmp_path / "out") if n != "runs"} == {"checkpoint-2", "checkpoint-4"}
        assert checkpoint_problems(tmp_path / "out" / "checkpoint-4", FILES_OF[make]) == []

    def test_a_finished_run_does_nothing_more(self, make, tmp_path):
        """Regression: it trained one more step, as epochs of unknown length have no end that the Trainer knows."""
        whole = make(tmp_path)
        whole.train()
        before = state_of(whole.model)
        again = make(tmp_path)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 4 and not changed(before, again.model)
        logs = [[e for e in t.state.log_history if "loss" in e] for t in (whole, again)]
        assert len(logs[0]) == len(logs[1])

    def test_weights_alone_cannot_be_resumed(self, make, tmp_path):
        make(tmp_path, save_only_model=True).train()
        with pytest.raises(ValueError, match="no checkpoint .*`save_only_model=True`"):
            make(tmp_path).train(resume_from_checkpoint=True)
        with pytest.raises(ValueError, match="`save_only_model=True`, so it has weights and no state of training"):
            make(tmp_path).train(resume_from_checkpoint=tmp_path / "out" / "checkpoint-2")

    def test_a_final_save_replaces_whole_files(self, make, tmp_path, monkeypatch):
        trainer = make(tmp_path, max_steps=1, save_strategy="no")
        trainer.train()
        trainer.save_model()
        (weights,) = (tmp_path / "out").glob("*.safetensors")
        before = weights.read_bytes()

        def killed(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr("trl_spo.training.checkpointing.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.save_model()
        assert weights.read_bytes() == before
        monkeypatch.undo()
        trainer.save_model()
        assert STAGING_NAME not in names(tmp_path / "out") and "README.md" in names(tmp_path / "out")
        assert "out" in (tmp_path / "out" / "README.md").read_text().split("# ")[1].splitlines()[0]

    def test_the_start_is_not_evaluated_twice(self, make, tmp_path):
        if make is reward_trainer:
            pytest.skip("the same code")
        make(tmp_path, max_steps=2, eval_on_start=True).train()
        resumed = make(tmp_path, max_steps=4, eval_on_start=True)
        resumed.train(resume_from_checkpoint=True)
        assert sum("eval_reward_mean" in entry for entry in resumed.state.log_history) == 1
        assert resumed.args.eval_on_start


def test_the_best_checkpoint_has_its_final_name(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    trainer = spo_trainer(tmp_path, max_steps=6, **best)
    trainer.train()
    path = trainer.state.best_model_checkpoint
    assert Path(path).parent == tmp_path / "out" and Path(path).is_dir()
    state = json.loads((Path(path) / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == path
    assert STAGING_NAME not in (Path(path) / "trainer_state.json").read_text()


def test_the_average_is_in_the_checkpoint_when_it_gets_its_name(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr("trl_spo.training.checkpointing.sync_folder", lambda folder: found.append(names(folder)))
    trainer = spo_trainer(tmp_path, max_steps=2)
    EMACallback(trainer, decay=0.5)
    trainer.train()
    assert found == [SPO_FILES | {EMA_NAME}]


def test_a_push_sees_the_checkpoint_by_its_name(tmp_path, monkeypatch):
    """It uploads in the background: the folder it is given must stay."""
    pushed = []

    def upload(self, folder):
        there = {name for name in names(tmp_path / "out") if name.startswith(("checkpoint-", "_"))}
        pushed.append((folder, there, checkpoint_problems(folder, FILES)))

    monkeypatch.setattr("transformers.Trainer._push_from_checkpoint", upload)
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda *args, **kwargs: None)
    settings = {"save_total_limit": 1, "hub_model_id": "someone/tiny", "push_to_hub": True, "hub_token": "hf_x"}
    trainer = spo_trainer(tmp_path, **settings)
    trainer.train()
    paths = [str(tmp_path / "out" / f"checkpoint-{step}") for step in (2, 4)]
    assert pushed == [(paths[0], {"checkpoint-2"}, []), (paths[1], {"checkpoint-4"}, [])]
    assert LORA in names(tmp_path / "out")  # what the push of the model uploads


def test_metrics_between_two_logs_survive(tmp_path):
    """Saved after step 2, logged after step 3: loss and metrics of steps 1 and 2 are part of that log."""
    whole = reward_trainer(tmp_path, "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    resumed = reward_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    logs = [[e for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert logs[0] == logs[1] and logs[0][0]["step"] == 3


def test_older_checkpoints_of_reward_trainers_load(tmp_path):
    """They have names, sums and counts apart; those before them have no state at all."""
    whole = reward_trainer(tmp_path, "whole")
    whole.train()
    file = tmp_path / "out" / "checkpoint-2" / "step_reward_state.json"
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", file.parent)
    state = json.loads(file.read_text())
    (process,) = state["processes"]
    metrics = process.pop("metrics")
    process["counts"] = [int(metrics.pop(name)[0]) for name in ("nonfinite_pairs", "skipped_steps")]
    process["averages"] = [sums for *sums, _ in metrics.values()]
    file.write_text(json.dumps({**state, "averages": list(metrics)}))
    older = reward_trainer(tmp_path)
    older.train(resume_from_checkpoint=True)
    logs = [[e for e in t.state.log_history if "loss" in e] for t in (whole, older)]
    assert logs[0] == logs[1] and logs[0][0]["step"] == 3
    file.unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    older = reward_trainer(tmp_path)
    older.train(resume_from_checkpoint=True)
    assert not changed(state_of(whole.model), older.model)


def test_older_checkpoints_of_spo_load(run, tmp_path):
    """They have the metrics as one record for all processes, and do not say how a metric is reduced."""
    file = run / "checkpoint-2" / "spo_state.json"
    state = json.loads(file.read_text())
    state["metrics"] = {name: sums for name, (*sums, _) in state["metrics"][0].items()}
    file.write_text(json.dumps(state))
    shutil.rmtree(run / "checkpoint-4")
    expected = load_file(run / "checkpoint-2" / LORA)
    trainer = spo_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert expected.keys() == load_file(run / "checkpoint-4" / LORA).keys()


WAITING = {"per_device_rollout_batch_size": 6, "num_inference_steps": 5, "branch_start_step": 1, "guidance_scale": 2.0}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_inference_steps": 8}, r"drawn with `num_inference_steps=5` \(now 8\), `timesteps=\[801, 601, .* \(now \[876"),
        ({"eta": 0.5}, r"drawn with `eta=1.0` \(now 0.5\)"),
        ({"guidance_scale": 3.0}, r"drawn with `guidance_scale=2.0` \(now 3.0\)"),
        ({"negative_prompt": "blurry"}, r"drawn with `negative_prompt=''` \(now 'blurry'\)"),
        ({"height": 32, "width": 32}, r"drawn with `height=None` \(now 32\), `width=None`"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
class TestPairsThatWait:
    """Regression: the prompts were compared and nothing else; t -> t - 200 was trained as t -> t - 125."""

    @pytest.fixture(scope="class")
    def waiting(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("waiting")
        trainer = spo_trainer(folder, max_steps=2, **WAITING)
        trainer.train()
        assert trainer.pair_loader.waiting
        return folder / "out" / "checkpoint-2"

    def test_are_not_trained_with_other_settings(self, waiting, change, message, tmp_path):
        trainer = spo_trainer(tmp_path, **{**WAITING, **change})
        before = state_of(trainer.model)
        with pytest.raises(ValueError, match=rf"pairs wait in .*checkpoint-2' that were {message}"):
            trainer.train(resume_from_checkpoint=waiting)
        assert not changed(before, trainer.model)

    def test_of_old_versions_tell_by_themselves(self, waiting, change, message, tmp_path):
        folder = shutil.copytree(waiting, tmp_path / "checkpoint-2")
        state = json.loads((folder / "spo_state.json").read_text())
        del state["transitions"]
        (folder / "spo_state.json").write_text(json.dumps(state))
        trainer = spo_trainer(tmp_path, **{**WAITING, **change})
        if not {"num_inference_steps", "height"} & set(change):
            trainer._read_state(str(folder))
            assert trainer.pair_loader.waiting
            return
        with pytest.raises(ValueError, match=r"drawn with (timesteps \[201, 401, 601\]|latents of shape \(4, 8, 8\))"):
            trainer.train(resume_from_checkpoint=folder)

    def test_are_no_hindrance_when_there_are_none(self, waiting, change, message, tmp_path):
        folder = shutil.copytree(waiting, tmp_path / "checkpoint-2")
        state = json.loads((folder / "spo_state.json").read_text())
        (folder / "spo_state.json").write_text(json.dumps({**state, "pool_prompts": []}))
        save_file({}, folder / "spo_pairs.safetensors")
        trainer = spo_trainer(tmp_path, **{**WAITING, **change})
        trainer._read_state(str(folder))
        assert trainer.pair_loader.waiting == 0


def test_another_seed_is_said(finished, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("trl_spo.training.waiting_pairs.logger.warning", warnings.append)
    spo_trainer(tmp_path, seed=7)._read_state(str(finished / "checkpoint-2"))
    assert any("was written with `seed=42` and this run has 7" in warning for warning in warnings)


class TestBase:
    """
    Regression: a LoRA of one model was trained on another of the same shapes. Whoever wants that starts a new run.
    """

    @pytest.mark.parametrize("network", ["unet", "text_encoder"])
    def test_another_one_is_refused(self, finished, tmp_path, network):
        trainer = spo_trainer(tmp_path)
        weight = next(w for w in getattr(trainer.pipeline.sd_pipeline, network).parameters() if w.ndim > 1)
        with torch.no_grad():
            weight.mul_(1.05)
        before = state_of(trainer.model)
        with pytest.raises(
            ValueError, match=f"another base model: the weights of its {network} are not those of this run"
        ):
            trainer.train(resume_from_checkpoint=str(finished / "checkpoint-2"))
        assert not changed(before, trainer.model)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_in_another_precision_it_is_the_same(self, finished, dtype):
        written = json.loads((finished / "checkpoint-2" / "spo_state.json").read_text())["base_weights"]
        assert set(written) == {"unet", "text_encoder"} and len(written["unet"]) == 256
        rounded = {name: torch.tensor(numbers).to(dtype).tolist() for name, numbers in written.items()}
        assert rounded != written
        check_base("checkpoint", written, rounded)
        check_base("checkpoint", rounded, written)

    def test_adapters_are_no_part_of_it(self, finished, tmp_path):
        """The policy's, and the frozen one of a latent reward on the same denoiser, which another run may not have."""
        expected = json.loads((finished / "checkpoint-2" / "spo_state.json").read_text())["base_weights"]
        pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path))
        LatentRewardModel.from_pipeline(pipeline, shared=True)
        pipeline.prepare_for_training()
        assert sample_base_weights(pipeline) == expected

    def test_weights_in_8_bits_have_no_numbers_to_compare(self, tmp_path):
        pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path))
        pipeline.prepare_for_training()
        assert len(sample_base_weights(pipeline)["unet"]) == 256
        for weight in pipeline.denoiser.parameters():
            if not weight.requires_grad:
                weight.data = weight.data.to(torch.float8_e4m3fn)
        assert set(sample_base_weights(pipeline)) == {"text_encoder"}

    def test_networks_that_are_trained_are_not_the_base(self, tmp_path):
        trainer = spo_trainer(tmp_path, use_peft=False)
        assert set(sample_base_weights(trainer.pipeline)) == {"text_encoder"}

    def test_old_checkpoints_do_not_say(self, finished, tmp_path):
        folder = shutil.copytree(finished / "checkpoint-2", tmp_path / "checkpoint-2")
        state = json.loads((folder / "spo_state.json").read_text())
        del state["base_weights"]
        (folder / "spo_state.json").write_text(json.dumps(state))
        spo_trainer(tmp_path)._read_state(str(folder))


def test_a_reward_run_resumes_with_its_pairs_only(tmp_path):
    reward_trainer(tmp_path, max_steps=2).train()
    other = reward_trainer(tmp_path)
    other.train_dataset = other.train_dataset[:3]
    with pytest.raises(ValueError, match="was written with 6 other pairs than the 3 of this run"):
        other.train(resume_from_checkpoint=True)


KILL_MATRIX = Path(__file__).parents[1] / "reliability" / "kill_matrix.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.skipif(not KILL_MATRIX.is_file(), reason="the kill matrix is not part of a port into TRL")
def test_six_points_of_the_kill_matrix(tmp_path):
    command = [
        sys.executable,
        str(KILL_MATRIX),
        "--quick",
        "--json",
        str(tmp_path / "m.json"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    table = json.loads((tmp_path / "m.json").read_text())
    assert len(table["points"]) == 6 and all(row["equal"] for row in table["points"])
    assert {row["resumed"] for row in table["points"]} == {2, 4}
    assert min(table["compared"].values()) >= 20  # values of a run that were compared
