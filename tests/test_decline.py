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
Why: a policy that hacks its reward looks fine to the reward. `StopOnDecline` watches another score, and these tests give it
scores whose fall is known: it must act at the evaluation at which the rule says so, and at no other.
"""

import pytest
import torch

from trl_spo import SPOTrainer, StopOnDecline

from .testing_utils import PROMPTS, brightness_reward, tiny_sd_pipeline, tiny_spo_config


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "logging_steps": 1}


class Scores:
    """A metric with the given mean at each evaluation, and deviations of +-1 (a standard deviation of 2 ** 0.5) over two images."""

    def __init__(self, means):
        self.means = list(means)

    def __call__(self, images, prompts):
        mean = self.means.pop(0) if len(self.means) > 1 else self.means[0]
        return torch.tensor([mean - 1.0, mean + 1.0])


def run(tmp_path, means, watch, output="out", resume=None, max_steps=5, **settings):
    settings = {"num_inference_steps": 4, "learning_rate": 1e-3, **EVALUATED, **settings}
    trainer = SPOTrainer(
        tiny_spo_config(tmp_path / output, per_device_train_batch_size=3, max_steps=max_steps, **settings),
        tiny_sd_pipeline(tmp_path),
        brightness_reward,
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS[:2],
        metrics={"caption": Scores(means)},
        callbacks=[watch],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("means", "watch", "last_step"),
    [
        # 0.1 standard deviations are 0.141: 9.9 is within, 9.8 is below.
        ([10.0, 9.9, 9.8, 0.0], {}, 2),
        ([10.0, 9.9, 9.8, 9.9, 9.8, 9.8], {"patience": 2}, 5),
        ([10.0, 12.0, 9.9, 10.0, 9.9, 9.9], {}, 5),  # a fall from its highest value is none from its start
        ([10.0, 9.0, 8.7, 8.5, 8.5, 8.5], {"tolerance": 1.0}, 3),
    ],
)
def test_the_run_stops_at_the_evaluation_that_is_too_low(tmp_path, means, watch, last_step):
    trainer = run(tmp_path, means, StopOnDecline("caption", **watch))
    assert trainer.state.global_step == last_step
    seen = [log["eval_caption_mean"] for log in trainer.state.log_history if "eval_caption_mean" in log]
    assert seen == pytest.approx(means[: last_step + 1])


def test_names_as_they_are_logged_are_taken(tmp_path):
    trainer = run(tmp_path, [10.0, 9.0], StopOnDecline("eval_caption_mean"))
    assert trainer.state.global_step == 1


def test_the_rate_is_lowered_at_each_evaluation_that_is_too_low(tmp_path):
    """Rates of the steps after evaluations 0 to 4: halved from the second and the fourth on."""
    means = [10.0, 9.0, 10.0, 9.0, 10.0, 10.0]
    trainer = run(tmp_path, means, StopOnDecline("caption", lower_rate_to=0.5), lr_scheduler_type="constant")
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert trainer.state.global_step == 5
    assert rates == pytest.approx([1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4])


def test_a_resumed_run_remembers_its_start_and_its_rate(tmp_path):
    checkpoints = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    run(tmp_path, [10.0, 9.0, 10.0], StopOnDecline("caption", lower_rate_to=0.5), max_steps=2, **checkpoints)
    trainer = run(
        tmp_path, [9.0], StopOnDecline("caption", lower_rate_to=0.5), resume=True, max_steps=4, **checkpoints
    )
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == pytest.approx([1e-3, 5e-4, 5e-4, 2.5e-4])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tolerance": -0.1}, "`tolerance` must be at least 0 standard deviations, got -0.1"),
        ({"tolerance": float("nan")}, "`tolerance` must be at least 0"),
        ({"patience": 0}, "`patience` must be at least 1 evaluation, got 0"),
        ({"lower_rate_to": 1.0}, "`lower_rate_to` must be between 0 and 1, got 1.0"),
    ],
)
def test_values_out_of_range(arguments, words):
    with pytest.raises(ValueError, match=words):
        StopOnDecline("caption", **arguments)


def test_a_run_that_never_evaluates_is_refused_before_any_rollout(tmp_path):
    with pytest.raises(ValueError, match="this run never evaluates"):
        run(tmp_path, [1.0], StopOnDecline("caption"), eval_strategy="no", eval_on_start=False)


def test_a_metric_that_is_not_there_is_named_with_those_that_are(tmp_path):
    with pytest.raises(ValueError, match=r"watches 'eval_captoin_mean'.*\['eval_caption_mean', 'eval_reward_mean'\]"):
        run(tmp_path, [1.0], StopOnDecline("captoin"))
