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
Why this file exists: the paper's ablations are settings here, and a setting that is read but not obeyed looks like a
result. Each one trains two steps on a real tiny pipeline, and its rollout is checked against what its name says.
"""

import math

import pytest
import torch

from trl_spo import SPOTrainer, StepAwareRewardModel

from .testing_utils import PROMPTS, brightness_reward, tiny_clip, tiny_sd_pipeline, tiny_spo_config


def make_trainer(tmp_path, reward=brightness_reward, **settings):
    config = tiny_spo_config(tmp_path / "out", **{"max_steps": 2, **settings})
    return SPOTrainer(config, tiny_sd_pipeline(tmp_path), reward, train_dataset=PROMPTS)


def branches(trainer):
    """The branching steps of a rollout of all prompts, with latents."""
    return trainer.rollout(PROMPTS, seed=7, return_trajectory=True).branches


def train(trainer):
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert trainer.state.global_step == 2 and losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert all(math.isfinite(loss) for loss in losses)
    assert any(not torch.equal(before[name], p) for name, p in trainer.model.named_parameters() if name in before)


@pytest.mark.parametrize("mode", ["random", "chosen", "rejected"])
def test_which_candidate_starts_the_next_step(tmp_path, mode):
    trainer = make_trainer(tmp_path, resample=mode)
    steps = branches(trainer)
    for before, after in zip(steps, steps[1:], strict=False):
        went_on = before.candidates[before.next_index, torch.arange(len(PROMPTS))]
        assert torch.equal(after.latents, went_on)
    indices = torch.stack([step.next_index for step in steps])
    extremes = {
        "chosen": torch.stack([step.scores.argmax(0) for step in steps]),
        "rejected": torch.stack([step.scores.argmin(0) for step in steps]),
    }
    if mode != "random":
        assert torch.equal(indices, extremes[mode])
    else:  # neither of the two, and the same candidates whatever the scores are
        assert not torch.equal(indices, extremes["chosen"]) and not torch.equal(indices, extremes["rejected"])
        trainer.reward_model = lambda *inputs: -brightness_reward(*inputs)
        assert torch.equal(indices, torch.stack([step.next_index for step in branches(trainer)]))
    train(trainer)


@pytest.mark.parametrize("pair", ["best_worst", "random"])
def test_which_candidates_form_the_pair(tmp_path, pair):
    trainer = make_trainer(tmp_path, pair=pair)
    steps = branches(trainer)
    columns = torch.arange(len(PROMPTS))
    extreme = 0
    for step in steps:
        chosen, rejected = step.selection.chosen, step.selection.rejected
        assert (step.scores[chosen, columns] > step.scores[rejected, columns]).all()
        extreme += int(((chosen == step.scores.argmax(0)) & (rejected == step.scores.argmin(0))).sum())
    count = len(steps) * len(PROMPTS)
    # of 6 pairs of 4 candidates, one is best and worst: 4 of 24 are expected by chance
    assert extreme == count if pair == "best_worst" else extreme < count / 2
    train(trainer)


@pytest.mark.parametrize(("start", "end", "steps"), [(0, None, [0, 1, 2, 3, 4]), (3, None, [3, 4]), (1, 3, [1, 2])])
def test_which_steps_branch(tmp_path, start, end, steps):
    """5 steps of 1000 are t = 801, 601, 401, 201 and 1."""
    trainer = make_trainer(tmp_path, branch_start_step=start, branch_end_step=end)
    pairs = trainer.rollout(PROMPTS, seed=7)
    timesteps = [[801, 601, 401, 201, 1][step] for step in steps]
    assert [branch.timestep for branch in pairs.branches] == timesteps
    assert set(pairs.timesteps.tolist()) == set(timesteps)
    assert (pairs.final_latents is None) == (end is not None)  # what cannot give pairs is not rolled out
    train(trainer)


@pytest.mark.parametrize("number", [2, 8])
def test_how_many_candidates(tmp_path, number):
    trainer = make_trainer(tmp_path, num_candidates=number)
    steps = branches(trainer)
    for step in steps:
        assert step.scores.shape == (number, len(PROMPTS))
        distinct = step.candidates.flatten(2)
        assert all(len(distinct[:, i].unique(dim=0)) == number for i in range(len(PROMPTS)))
    if number == 2:  # then the pair is all there is
        assert all((step.selection.chosen + step.selection.rejected == 1).all() for step in steps)
    train(trainer)


def test_more_candidates_have_a_wider_margin(tmp_path):
    """Range of normal samples: 1.13 standard deviations for 2, 2.06 for 4, 2.85 for 8."""
    margins = []
    for number in (2, 4, 8):
        steps = branches(make_trainer(tmp_path, num_candidates=number))
        margins.append(torch.stack([step.scores.max(0).values - step.scores.min(0).values for step in steps]).mean())
    assert margins[0] < margins[1] < margins[2]


def reward_model(tmp_path, seen=True, **config):
    """A reward model that has learnt to look at the timestep (`seen`), or is fresh. Scaled to tell candidates apart."""
    model = StepAwareRewardModel.from_clip(tiny_clip(tmp_path), **config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if seen and ("adaLN" in name or "t_embedder" in name):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def clean_scores(trainer, model, step):
    """Scores (K, B) of the predictions of a branch, as if they were clean images."""
    flat = step.pred_original_samples.flatten(0, 1)
    with torch.no_grad():
        scores = model.score(trainer.pipeline.decode_latents(flat), PROMPTS * len(step.scores), 0)
    return scores.view(step.scores.shape)


@pytest.mark.parametrize("conditioned", [True, False])
def test_step_awareness_can_be_left_out(tmp_path, conditioned):
    """The same weights: with the condition a prediction is not scored as a clean image is, without it it is."""
    model = reward_model(tmp_path, step_conditioning=conditioned)
    trainer = make_trainer(tmp_path, model)
    for step in branches(trainer):
        as_clean = torch.allclose(step.scores, clean_scores(trainer, model, step), rtol=1e-4, atol=1e-5)
        assert as_clean == (not conditioned or step.scored_timestep == 0)
    train(trainer)


def test_plain_rewards_are_one(tmp_path):
    """
    PickScore on the predictions (in the paper 20.28, below the base model) comes in two forms, a callable that ignores
    the timestep and a fresh reward model, and both choose the same pairs.
    """
    model = reward_model(tmp_path, seen=False)
    callable_trainer = make_trainer(tmp_path, lambda images, prompts, timesteps: model.score(images * 2 - 1, prompts))
    model_trainer = make_trainer(tmp_path, model)
    found = [branches(trainer) for trainer in (callable_trainer, model_trainer)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)
        assert torch.equal(one.selection.chosen, other.selection.chosen)
        assert torch.equal(one.selection.rejected, other.selection.rejected)
        torch.testing.assert_close(other.scores, clean_scores(model_trainer, model, other), rtol=1e-4, atol=1e-5)
    train(callable_trainer)
    train(model_trainer)
