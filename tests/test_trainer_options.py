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
Necessity: a config of ours has the hundred fields of transformers' as well, and a field that is accepted and does nothing costs
whoever sets it a run. So each is in a table: it works, or it is refused. A version of transformers with a new field fails here
until somebody has decided.
"""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from trl_spo import SPOConfig, SPOTrainer, StepAwareRewardModel, StepRewardConfig, StepRewardTrainer
from trl_spo.training.trainer_options import REFUSED, SPO_REFUSED, WORKS

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


FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}
PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"


def spo(tmp_path, output="out", **settings) -> SPOTrainer:
    folder = tmp_path / output
    return SPOTrainer(
        tiny_spo_config(folder, **settings), tiny_sd_pipeline(tmp_path), brightness_reward, train_dataset=PROMPTS
    )


def step_reward(tmp_path, output="out", **settings) -> StepRewardTrainer:
    torch.manual_seed(0)
    model = StepAwareRewardModel.from_clip(tiny_clip(tmp_path))
    config = tiny_step_reward_config(tmp_path / output, **settings)
    return StepRewardTrainer(config, tiny_sd_pipeline(tmp_path), model, train_dataset=image_pairs())


# --- the tables ------------------------------------------------------------------------------------------------------


def test_somebody_has_decided_about_every_field_of_transformers():
    undecided = FIELDS.keys() - WORKS - REFUSED.keys()
    assert not undecided, f"decide in trl_spo/training/trainer_options.py: {sorted(undecided)}"
    assert not WORKS & REFUSED.keys() and SPO_REFUSED.keys() <= WORKS


def test_the_page_has_the_table():
    rows = re.findall(r"^\| (`.+`) \| (both|SPO) \|", PAGE.read_text(), flags=re.MULTILINE)
    told = {
        scope: {name for names, where in rows if where == scope for name in re.findall(r"`(\w+)`", names)}
        for scope in ("both", "SPO")
    }
    assert told == {"both": set(REFUSED), "SPO": set(SPO_REFUSED)}


def another_value(name: str, config=TrainingArguments):
    """Some value that is not the default of the field."""
    default = config.__dataclass_fields__[name].default
    if isinstance(default, bool):
        return not default
    return {"train_sampling_strategy": "sequential", "label_smoothing_factor": 0.1, "past_index": 0}.get(name, 2)


@pytest.mark.parametrize("name", sorted(FIELDS.keys() & REFUSED.keys()))
@pytest.mark.parametrize("config", [SPOConfig, StepRewardConfig])
def test_refused_in_one_sentence(config, name, tmp_path):
    with pytest.raises(ValueError, match=f"^`{name}=.*has no effect in a {config.__name__}: .*Leave it at "):
        config(output_dir=str(tmp_path), use_cpu=True, **{name: another_value(name)})


@pytest.mark.parametrize("name", sorted(FIELDS.keys() & SPO_REFUSED.keys()))
def test_refused_where_there_is_no_data_loader(name, tmp_path):
    with pytest.raises(ValueError, match=f"^`{name}=.*has no effect in a SPOConfig"):
        tiny_spo_config(tmp_path, **{name: another_value(name, SPOConfig)})


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"accelerator_config": {"split_batches": True}},
        {"accelerator_config": {"dispatch_batches": True}},
    ],
)
def test_what_would_be_handed_on_to_nobody(settings, tmp_path):
    with pytest.raises(ValueError, match="has no effect"):
        tiny_spo_config(tmp_path, **settings)


def test_defaults_and_copies_pass(tmp_path):
    for config in (tiny_spo_config(tmp_path), tiny_step_reward_config(tmp_path)):
        dataclasses.replace(config, seed=1)  # transformers has completed some values by then
    tiny_spo_config(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})


# --- what works, where our loops could have lost it ------------------------------------------------------------------


def order_of_prompts(trainer) -> list[str]:
    return [prompt for _ in range(2) for prompt in trainer.pair_loader._next_prompts()[0]]


def test_data_seed_is_the_order_of_prompts_and_nothing_else(tmp_path):
    plain, other = spo(tmp_path), spo(tmp_path, data_seed=7)
    same = spo(tmp_path, seed=42, data_seed=42)
    assert order_of_prompts(plain) == order_of_prompts(same) != order_of_prompts(other)
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), other.model.parameters(), strict=True))
    pairs = [trainer.rollout(PROMPTS[:2], seed=0).latents for trainer in (plain, other)]
    assert torch.equal(*pairs)


def first_prompts(trainer) -> list[list[str]]:
    return [batch["prompts"] for batch in trainer.get_train_dataloader()]


def test_data_seed_and_sampling_of_the_reward_trainer(tmp_path):
    orders = [
        first_prompts(step_reward(tmp_path, **settings))
        for settings in ({}, {"data_seed": 7}, {"seed": 3, "data_seed": 7})
    ]
    assert orders[0] != orders[1] == orders[2]
    if "train_sampling_strategy" in FIELDS:
        trainer = step_reward(tmp_path, train_sampling_strategy="sequential")
        assert [name for batch in first_prompts(trainer) for name in batch] == [row["prompt"] for row in image_pairs()]
    assert [len(batch) for batch in first_prompts(step_reward(tmp_path, dataloader_drop_last=True))] == [4]


def test_workers_of_the_reward_trainer_change_nothing(tmp_path):
    weights = []
    for output, workers in (("none", 0), ("one", 1)):
        trainer = step_reward(tmp_path, output, dataloader_num_workers=workers)
        trainer.train()
        weights.append(state_of(trainer.model))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("make", [spo, step_reward])
@pytest.mark.parametrize(
    "settings",
    [
        {"debug": "underflow_overflow"},
        {"skip_memory_metrics": False},
        {"torch_empty_cache_steps": 1},
        {"full_determinism": True},
        {"optim": "adafactor"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}},
    ],
    ids=str,
)
def test_trains_with(make, settings, tmp_path):
    trainer = make(tmp_path, max_steps=2, **settings)
    before = state_of(trainer.model)
    trainer.train()
    torch.use_deterministic_algorithms(False)
    assert trainer.state.global_step == 2
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    if "lr_scheduler_kwargs" in settings:
        assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(1e-4)


@pytest.mark.parametrize("make", [spo, step_reward])
def test_logging_and_saving_strategies(make, tmp_path):
    settings = {"logging_steps": 100, "logging_first_step": True, "save_strategy": "steps", "save_steps": 2}
    trainer = make(tmp_path, max_steps=3, save_only_model=True, **settings)
    trainer.train()
    assert [log["step"] for log in train_logs(trainer)][0] == 1
    folders = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert folders[0] == "checkpoint-2"
    assert not (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").exists()


def test_a_plateau_is_seen_in_the_reward(tmp_path):
    """There is no evaluation loss, which transformers would look for."""

    def falling(images, prompts, timesteps):
        falling.calls += 1
        return brightness_reward(images, prompts, timesteps) - 1000 * falling.calls

    falling.calls = 0
    config = tiny_spo_config(
        tmp_path,
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 0, "factor": 0.5},
        eval_strategy="steps",
        eval_steps=1,
        max_steps=4,
    )
    trainer = SPOTrainer(config, tiny_sd_pipeline(tmp_path), falling, train_dataset=PROMPTS, eval_dataset=PROMPTS[:1])
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == config.learning_rate * 0.5**3  # the first evaluation is the best
    assert config.lr_scheduler_kwargs == {"patience": 0, "factor": 0.5}  # the user's stays


# --- speed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"num_train_epochs": 1}, {"max_steps": 3}], ids=str)
def test_samples_per_second_counts_the_pairs_of_this_call(settings, tmp_path):
    """Regression: transformers divides the largest possible number of pairs, or whole batches, by the time."""
    settings = {**settings, "preference_threshold": 0.1, "save_strategy": "steps", "save_steps": 2}
    trainer = spo(tmp_path, **settings)
    result = trainer.train()
    pairs, steps = trainer.pair_loader.num_pairs_seen, trainer.state.global_step
    assert 0 < pairs < len(trainer.pair_loader) * 4 * 2
    seconds = result.metrics["train_runtime"]
    assert result.metrics["train_samples_per_second"] == pytest.approx(pairs / seconds, rel=1e-2)
    assert result.metrics["train_steps_per_second"] == pytest.approx(steps / seconds, rel=1e-2)
    assert trainer.state.log_history[-1]["train_samples_per_second"] == result.metrics["train_samples_per_second"]

    state = json.loads((tmp_path / "out" / "checkpoint-2" / "spo_state.json").read_text())
    resumed = spo(tmp_path, **settings)
    result = resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    rate = (pairs - state["num_pairs_seen"]) / result.metrics["train_runtime"]
    assert result.metrics["train_samples_per_second"] == pytest.approx(rate, rel=1e-2)
