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
Necessity: with several rewards a mistake in the common scale hands the choice of pairs to one of them, and the run looks
like any other. Scales are derived by hand here, and a single reward must give the pairs that it gave before.
"""

import math
from collections import Counter

import pytest
import torch

from trl_spo import (
    SPOTrainer,
    StepAwareRewardModel,
    WeightedReward,
    select_pairs,
    stepwise_rollout,
    wrap_pipeline,
    wrap_reward,
)
from trl_spo.rewards.base import MetricReward, Reward
from trl_spo.rewards.weighted import standardised
from trl_spo.training.compilation import repeated_blocks
from trl_spo.training.memory import scoring_bytes

from .pretended_device import CUDA, PretendedGPU
from .testing_utils import (
    PROMPTS,
    brightness_reward,
    tiny_clip,
    tiny_sd_pipeline,
    tiny_spo_config,
    train_logs,
)


SETTINGS = {"num_inference_steps": 4, "branch_start_step": 1, "num_candidates": 3, "preference_threshold": 0.3}
SETTINGS |= {"guidance_scale": 1.0}


def contrast(images, prompts, timesteps):
    """On another scale than brightness, and it knows the prompt and the timestep."""
    lengths = torch.tensor([float(len(prompt)) for prompt in prompts], device=images.device)
    return 1000 + images.std(dim=(1, 2, 3)) * (1 + lengths) - timesteps / 1000


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return wrap_pipeline(tiny_sd_pipeline(tmp_path_factory.mktemp("pipeline")))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = str(tiny_clip(tmp_path_factory.mktemp("clip")))
    return StepAwareRewardModel.from_clip(folder, processor=folder).eval()


def rollout(pipeline, reward, **settings):
    generator = torch.Generator().manual_seed(3)
    return stepwise_rollout(pipeline, PROMPTS[:3], reward, generator=generator, **{**SETTINGS, **settings})


class TestTheCommonScale:
    def test_by_hand(self):
        """
        Two candidates (rows) of two prompts. `a`: deviations -1, +1 of the first prompt and none of the second; variances 2
        and 0, their mean 1. `b`: none, and +5, -5; variances 0 and 50, their mean 25.
        """
        a = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
        b = torch.tensor([[10.0, 30.0], [10.0, 20.0]])
        assert standardised(a).tolist() == [[-1, 0], [1, 0]]
        assert standardised(b).tolist() == [[0, 1], [0, -1]]
        reward = WeightedReward({"a": brightness_reward, "b": contrast}, {"a": 0.75, "b": -0.25})
        assert reward.combine({"a": a, "b": b}).tolist() == [[-0.75, -0.25], [0.75, 0.25]]
        assert reward.total({"a": a, "b": b}).tolist() == [[0.75 - 2.5, 3.75 - 7.5], [2.25 - 2.5, 3.75 - 5.0]]

    def test_the_unit_is_the_deviation_between_candidates(self):
        """Whatever the scale of a reward is, and whatever a prompt adds to it."""
        scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
        moved = 20 + 0.01 * scores + torch.arange(50.0)
        for values in (standardised(scores), standardised(moved)):
            assert (values.square().sum(0) / 3).mean().item() == pytest.approx(1)
            assert values.mean(0).abs().max() < 1e-12
        torch.testing.assert_close(standardised(scores), standardised(moved), atol=2e-3, rtol=0)

    def test_a_reward_that_is_indifferent_adds_nothing(self):
        """Scores that are equal up to rounding must not be blown up to a unit of noise."""
        equal = torch.full((3, 2), 20.0)
        rounded = equal + torch.tensor([[0.0, 2e-6], [2e-6, 0.0], [0.0, 0.0]])
        assert not torch.equal(equal, rounded)
        for scores in (equal, rounded, torch.zeros(3, 2)):
            assert standardised(scores).eq(0).all()

    def test_what_is_not_finite_stays_with_its_prompt(self):
        good = torch.tensor([[1.0, 4.0], [2.0, 8.0]])
        bad = torch.tensor([[1.0, math.nan, 4.0], [2.0, 7.0, 8.0]])
        values = standardised(bad)
        assert torch.equal(values[:, [0, 2]], standardised(good))
        assert not select_pairs(values, 0.0).valid[1]
        assert standardised(torch.full((2, 2), math.nan)).isnan().all()

    def test_one_image_per_prompt_has_no_deviation(self):
        assert standardised(torch.tensor([[1.0, 2.0]])).eq(0).all()


class TestRollouts:
    @pytest.mark.parametrize(
        ("reward", "settings"),
        [("model", {}), (brightness_reward, {"defer_scoring": False}), (brightness_reward, {"branch_end_step": 3})],
    )
    def test_one_reward_of_weight_1_changes_no_bit(self, pipeline, model, reward, settings):
        reward = model if reward == "model" else reward
        settings = {"preference_threshold": 0.02, **settings}
        before = rollout(pipeline, reward, **settings)
        after = rollout(pipeline, WeightedReward({"only": reward}), **settings)
        assert 0 < len(before)
        for name, value in before.tensors().items():
            assert torch.equal(value, after.tensors()[name]), name
        assert before.prompts == after.prompts
        for one, other in zip(before.branches, after.branches, strict=True):
            assert torch.equal(one.scores, other.scores) and torch.equal(one.scores, other.parts["only"])
        assert (before.final_scores is None) == (after.final_scores is None)
        if before.final_scores is not None:
            assert torch.equal(before.final_scores, after.final_scores)

    def test_the_weight_of_a_single_reward_multiplies_its_scores(self, pipeline):
        one = rollout(pipeline, brightness_reward, preference_threshold=0.0)
        half = rollout(pipeline, WeightedReward({"red": brightness_reward}, {"red": 0.5}), preference_threshold=0.0)
        assert torch.equal(0.5 * one.chosen_scores, half.chosen_scores)

    @pytest.mark.parametrize("settings", [{"reward_batch_size": 4}, {"branch_end_step": 3}])
    def test_several_rewards_see_what_each_sees_alone(self, pipeline, model, settings):
        """The parts are the scores of each alone; the pairs are those of the sum that is written out here."""
        alone = {
            name: rollout(pipeline, reward, **settings)
            for name, reward in (("red", brightness_reward), ("clip", model))
        }
        weights = {"red": 0.7, "clip": 0.3}
        both = rollout(pipeline, WeightedReward({"red": brightness_reward, "clip": model}, weights), **settings)
        valid = 0
        for i, branch in enumerate(both.branches):
            expected = torch.zeros(3, 3, dtype=torch.float64)
            for name, pairs in alone.items():
                scores = pairs.branches[i].scores
                assert torch.equal(branch.parts[name], scores)
                deviations = scores.double() - scores.double().mean(0)
                expected += weights[name] * deviations / (deviations.square().sum(0) / 2).mean().sqrt()
            torch.testing.assert_close(branch.scores.double(), expected, atol=1e-6, rtol=1e-6)
            selection = select_pairs(expected, 0.3)
            assert all(torch.equal(x, y) for x, y in zip(branch.selection, selection, strict=True))
            valid += int(selection.valid.sum())
        assert 0 < len(both) == valid
        if "branch_end_step" not in settings:
            total = 0.7 * alone["red"].final_scores + 0.3 * alone["clip"].final_scores
            torch.testing.assert_close(both.final_scores, total)
            assert torch.equal(both.final_parts["clip"], alone["clip"].final_scores)

    def test_finished_images_without_a_branch_of_their_own(self, pipeline, monkeypatch):
        """Where the last step does not branch, the images are scored apart from all candidates."""
        monkeypatch.setattr(type(pipeline), "step_is_stochastic", lambda self, step, eta: step < 3)
        reward = WeightedReward({"red": brightness_reward, "contrast": contrast})
        pairs = rollout(pipeline, reward)
        assert [branch.step for branch in pairs.branches] == [1, 2]
        assert set(pairs.final_parts) == {"red", "contrast"} and pairs.final_parts["red"].shape == (3,)
        assert torch.equal(pairs.final_scores, reward.total(pairs.final_parts))

    def test_a_score_that_is_not_finite_costs_its_pair(self, pipeline):
        def broken(images, prompts, timesteps):
            return torch.where(
                torch.tensor([prompt == PROMPTS[1] for prompt in prompts]), math.nan, images.mean((1, 2, 3))
            )

        pairs = rollout(pipeline, WeightedReward({"red": brightness_reward, "broken": broken}), on_nonfinite="skip")
        assert {entry.prompt for entry in pairs.nonfinite} == {PROMPTS[1]}
        assert len(pairs) > 0 and PROMPTS[1] not in pairs.prompts


class TestTheContract:
    def test_score_is_the_weighted_sum(self, model):
        reward = wrap_reward(WeightedReward({"clip": model, "contrast": contrast}, {"clip": 2, "contrast": -1}))
        images, timesteps = torch.rand(3, 3, 16, 16) * 2 - 1, torch.tensor([0, 500, 7])
        with torch.no_grad():
            text = reward.encode_prompts(PROMPTS[:2])[torch.tensor([1, 0, 1])]
            prompts = [PROMPTS[i] for i in (1, 0, 1)]
            expected = 2 * model.score(images, prompts, timesteps) - contrast(images / 2 + 0.5, prompts, timesteps)
            torch.testing.assert_close(reward.score(images, text, timesteps), expected)

    def test_what_does_not_go_together_is_refused(self):
        class OfLatents(Reward):
            sees = "noisy_latents"

        with pytest.raises(
            ValueError, match="'red' judges images, 'lrm' judges noisy latents. Combine rewards of one"
        ):
            WeightedReward({"red": brightness_reward, "lrm": OfLatents()})
        with pytest.raises(ValueError, match="name at least one"):
            WeightedReward({})
        for weight in (0, math.nan, math.inf, "much"):
            with pytest.raises(ValueError, match="weight of 'red' must be a finite number other than 0"):
                WeightedReward({"red": brightness_reward}, {"red": weight})
        with pytest.raises(ValueError, match=r"one weight per reward, got weights for \['blue'\]"):
            WeightedReward({"red": brightness_reward}, {"blue": 1.0})

    def test_a_metric_is_a_reward(self):
        """A function that takes no timesteps, such as the metrics of the package, is asked without them."""
        metric = wrap_reward(lambda images, prompts: images.mean(dim=(1, 2, 3)))
        assert isinstance(metric, MetricReward)
        samples = torch.tensor([-3.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
        scores = metric.score(samples, metric.encode_prompts(PROMPTS[:3]), torch.tensor([1, 2, 3]))
        assert scores.tolist() == [0, 0.5, 1]

    def test_networks_are_frozen_cast_and_compiled_and_functions_are_not(self, model, tmp_path):
        folder = tiny_clip(tmp_path, seed=1)
        other = StepAwareRewardModel.from_clip(folder, processor=folder)
        reward = WeightedReward({"one": model, "red": brightness_reward, "two": other})
        reward.prepare("cpu", torch.bfloat16)
        assert {p.dtype for p in other.model.vision_model.parameters()} == {torch.bfloat16}
        assert not any(parameter.requires_grad for parameter in reward.module.parameters())
        assert len(repeated_blocks(reward.module)) == len(repeated_blocks(model)) + len(repeated_blocks(other)) > 0
        model.float()
        with pytest.raises(ValueError, match="`reward_dtype` casts a reward model"):
            WeightedReward({"red": brightness_reward}).prepare("cpu", torch.bfloat16)

    def test_memory_is_that_of_the_larger_network(self, pipeline, model, tmp_path):
        """They run one after the other; with a function among them the decoder alone counts, as for a single one."""
        shape = pipeline.latent_shape()
        folder = tiny_clip(tmp_path, seed=1)
        other = StepAwareRewardModel.from_clip(folder, processor=folder).eval()
        one = scoring_bytes(pipeline, model, shape, 4)
        both = scoring_bytes(pipeline, WeightedReward({"one": model, "two": other}), shape, 4)
        assert one <= both < 1.1 * one
        mixed = WeightedReward({"one": model, "red": brightness_reward})
        assert scoring_bytes(pipeline, mixed, shape, 4) == scoring_bytes(pipeline, brightness_reward, shape, 4)


class TestTraining:
    def test_each_reward_is_logged_and_evaluated(self, model, tmp_path):
        reward = WeightedReward({"clip": model, "contrast": contrast}, {"clip": 0.5, "contrast": 0.5})
        config = tiny_spo_config(tmp_path / "out", max_steps=1, reward_dtype="bfloat16")
        trainer = SPOTrainer(
            config, tiny_sd_pipeline(tmp_path), reward, train_dataset=PROMPTS, eval_dataset=PROMPTS[:2]
        )
        trainer.train()
        (log,) = train_logs(trainer)
        for name in ("clip", "contrast"):
            assert {f"step_reward/{name}/mean", f"step_reward/{name}/std", f"reward_mean/{name}"} <= log.keys()
        assert log["step_reward/contrast/mean"] > 900 and abs(log["step_reward/mean"]) < 1e-6
        expected = 0.5 * log["reward_mean/clip"] + 0.5 * log["reward_mean/contrast"]
        assert log["reward_mean"] == pytest.approx(expected, rel=1e-5)
        evaluated = trainer.evaluate()
        expected = (evaluated["eval_reward/clip_mean"] + evaluated["eval_reward/contrast_mean"]) / 2
        assert evaluated["eval_reward_mean"] == pytest.approx(expected, rel=1e-5)
        trainer.save_model()
        assert "Reward: `0.5 x clip + 0.5 x contrast`" in (tmp_path / "out" / "README.md").read_text()
        assert model.model.vision_model.post_layernorm.weight.dtype == torch.float32  # the user's model is not cast

    def test_on_a_gpu_prompts_stay_and_features_do_not(self, tmp_path):
        """Rows of a list are picked on the CPU, rows of features where the features are, and all scores come in one read."""

        def redness(images, prompts, timesteps):
            return 100 * images[:, 0].mean(dim=(1, 2))

        folder = tiny_clip(tmp_path)
        with PretendedGPU() as gpu:
            model = StepAwareRewardModel.from_clip(folder, processor=folder)
            settings = {"num_inference_steps": 3, "branch_start_step": 2, "guidance_scale": 1.0}
            config = tiny_spo_config(tmp_path, use_cpu=False, torch_compile=False, **settings)
            reward = WeightedReward({"clip": model, "red": redness})
            trainer = SPOTrainer(config, tiny_sd_pipeline(tmp_path), reward, train_dataset=PROMPTS)
            assert trainer.reward.device == CUDA
            trainer.rollout(PROMPTS[:2])
            start = len(gpu.waits)
            trainer.rollout(PROMPTS[:2])
            waits = Counter(wait.kind for wait in gpu.waits[start:])
            # The upload is the tokens of the prompts, the reads are the scores and the choices of the rollout.
            assert waits == {"synchronize": 1, "upload": 1, "read": 2}
