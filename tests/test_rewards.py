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
Necessity: every reward comes through one door. If rollout, memory and trainers disagree about what a reward is, a user's
model is scored on the wrong input, in the wrong range, or twice.
"""

import pytest
import torch

from tests.testing_utils import PROMPTS, brightness_reward, ddim_scheduler, tiny_clip, tiny_sd_pipeline
from trl_spo import (
    RolloutSettings,
    SPOConfig,
    SPOTrainer,
    StepAwareRewardModel,
    select_pairs,
    stepwise_rollout,
    wrap_pipeline,
    wrap_reward,
)
from trl_spo.branch_plan import step_stds, thresholds_by_step
from trl_spo.rewards.base import FunctionReward, Reward


SETTINGS = {"num_inference_steps": 6, "branch_start_step": 1, "num_candidates": 3, "preference_threshold": 0.0}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return wrap_pipeline(tiny_sd_pipeline(tmp_path_factory.mktemp("pipeline")))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = str(tiny_clip(tmp_path_factory.mktemp("clip")))
    return StepAwareRewardModel.from_clip(folder, processor=folder).eval()


class LatentMean(Reward):
    """Prefers large latents; remembers what it was shown."""

    sees = "noisy_latents"
    num_train_timesteps = 1000

    def __init__(self):
        self.seen = []

    def encode_prompts(self, prompts):
        return torch.arange(float(len(prompts)))

    def score(self, samples, text, timesteps):
        self.seen.append((samples.clone(), text.clone(), timesteps.clone()))
        return 50 * samples.flatten(1).mean(1) + text


class TestTheDoor:
    def test_a_reward_passes_as_it_is(self):
        reward = LatentMean()
        assert wrap_reward(reward) is reward

    def test_a_function_gets_images_in_0_1_and_its_own_prompts(self):
        seen = []

        def reward(images, prompts, timesteps):
            seen.append((images, prompts, timesteps))
            return [float(len(prompt)) for prompt in prompts]

        wrapped = wrap_reward(reward)
        text = wrapped.encode_prompts(["a", "bb", "ccc"])
        samples = torch.tensor([-1.0, 0.0, 3.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
        scores = wrapped.score(samples, text[torch.tensor([2, 0, 1])], torch.tensor([5, 6, 7]))
        assert torch.equal(scores, torch.tensor([3.0, 1.0, 2.0]))
        images, prompts, timesteps = seen[0]
        assert images[:, 0, 0, 0].tolist() == [0.0, 0.5, 1.0]  # of [-1, 1], clamped
        assert prompts == ["ccc", "a", "bb"] and timesteps.tolist() == [5, 6, 7]

    def test_a_model_gets_images_in_minus_1_1_and_features(self, model):
        wrapped = wrap_reward(model)
        images, timesteps = torch.rand(2, 3, 16, 16) * 2 - 1, torch.tensor([0, 500])
        with torch.no_grad():
            text = wrapped.encode_prompts(PROMPTS[:2])
            assert torch.equal(wrapped.score(images, text, timesteps), model.score(images, PROMPTS[:2], timesteps))
        assert wrapped.sees == "images" and wrapped.num_train_timesteps == model.config.num_train_timesteps

    def test_a_path_is_loaded(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        wrapped = wrap_reward(str(tmp_path))
        images = torch.rand(1, 3, 16, 16)
        with torch.no_grad():
            assert torch.equal(wrapped.module.score(images, PROMPTS[:1], 0), model.score(images, PROMPTS[:1], 0))

    def test_what_is_neither_is_refused(self):
        with pytest.raises(TypeError, match="`reward_model` must be a `StepAwareRewardModel` .* got `int`"):
            wrap_reward(3)
        with pytest.raises(ValueError, match="must be one of .*'noisy_latents'.* got 'pixels'"):
            function = lambda images, prompts, timesteps: images  # noqa: E731
            function.scores = "pixels"
            wrap_reward(function)

    def test_a_module_is_frozen_moved_and_cast(self):
        class Judge(torch.nn.Linear):
            def forward(self, images, prompts, timesteps):
                return super().forward(images.flatten(1))[:, 0]

        judge = Judge(12, 1)
        wrapped = wrap_reward(judge).prepare("cpu", torch.bfloat16)
        assert isinstance(wrapped, FunctionReward) and wrapped.device.type == "cpu"
        assert judge.weight.dtype == torch.bfloat16 and not judge.weight.requires_grad and not judge.training
        with pytest.raises(ValueError, match="`reward_dtype` casts a reward model"):
            wrap_reward(brightness_reward).prepare("cpu", torch.bfloat16)


class TestNoisyLatents:
    """A reward of the noisy candidates: nothing is predicted or decoded for scoring."""

    def counted(self, pipeline, monkeypatch, reward, **settings):
        counts = {"unet": 0, "decode": 0}

        def hook(module, args, kwargs, output):
            counts["unet"] += len(args[0])

        handle = pipeline.unet.register_forward_hook(hook, with_kwargs=True)
        decode = type(pipeline).decode_for_scoring
        monkeypatch.setattr(
            type(pipeline),
            "decode_for_scoring",
            lambda self, latents, *args: (
                counts.__setitem__("decode", counts["decode"] + len(latents)) or decode(self, latents, *args)
            ),
        )
        try:
            generator = torch.Generator().manual_seed(0)
            settings = {**SETTINGS, "guidance_scale": 3.0, **settings}
            pairs = stepwise_rollout(pipeline, PROMPTS[:2], reward, generator=generator, **settings)
        finally:
            handle.remove()
        return pairs, counts

    def test_unet_evaluations_are_those_of_one_trajectory(self, pipeline, monkeypatch):
        pairs, counts = self.counted(pipeline, monkeypatch, LatentMean())
        assert counts == {"unet": 2 * 2 * 6, "decode": 0}  # guidance, prompts, steps
        assert len(pairs) == 2 * 5
        _, with_images = self.counted(pipeline, monkeypatch, brightness_reward)
        # One prediction at each of the first two steps, then K candidates after each branch but the last.
        assert with_images["unet"] == 2 * 2 * (2 + 3 * 4) and with_images["decode"] == 2 * 3 * 5

    @pytest.mark.parametrize("defer", [False, True])
    def test_the_candidate_is_what_is_scored_at_its_own_timestep(self, pipeline, defer):
        reward = LatentMean()
        pairs = stepwise_rollout(
            pipeline, PROMPTS[:2], reward, generator=torch.Generator().manual_seed(0), return_trajectory=True,
            defer_scoring=defer, **SETTINGS,
        )  # fmt: skip
        timesteps = pipeline.set_timesteps(6)
        assert [branch.scored_timestep for branch in pairs.branches] == [*timesteps[2:], 0]
        samples = torch.cat([samples for samples, _, _ in reward.seen])
        expected = torch.cat([branch.candidates.flatten(0, 1) for branch in pairs.branches])
        assert torch.equal(samples[: len(expected)], expected)
        for branch in pairs.branches:
            by_hand = 50 * branch.candidates.flatten(2).mean(2) + torch.tensor([0.0, 1.0])
            assert torch.allclose(branch.scores, by_hand, atol=1e-5)

    def test_the_timestep_of_the_branch(self, pipeline):
        pairs = stepwise_rollout(pipeline, PROMPTS[:2], LatentMean(), reward_timestep="branch", **SETTINGS)
        assert all(branch.scored_timestep == branch.timestep for branch in pairs.branches)

    def test_the_same_noise_gives_the_same_trajectory(self, pipeline):
        """Candidates do not depend on how they are judged, as the random continuation does not look at scores."""
        rollouts = [
            stepwise_rollout(
                pipeline, PROMPTS[:2], reward, generator=torch.Generator().manual_seed(0), return_trajectory=True,
                **SETTINGS,
            )
            for reward in (LatentMean(), brightness_reward)
        ]  # fmt: skip
        for noisy, images in zip(rollouts[0].branches, rollouts[1].branches, strict=True):
            assert torch.allclose(noisy.candidates, images.candidates, atol=1e-4)

    def test_it_trains(self, tmp_path):
        config = SPOConfig(
            output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, use_cpu=True,
            per_device_rollout_batch_size=2, report_to="none", logging_steps=1, memory_budget=1.0, **SETTINGS,
        )  # fmt: skip
        trainer = SPOTrainer(config, tiny_sd_pipeline(tmp_path), LatentMean(), train_dataset=PROMPTS)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert logs[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and logs[0]["ratio/chosen"] == 1.0


class TestMemory:
    def test_a_model_whose_features_only_index(self, pipeline, model):
        """Regression: features were repeated, which only tensors can; anything an index tensor picks from is enough."""
        from trl_spo.training.memory import rollout_chunk_sizes

        class Rows:
            def __init__(self, values):
                self.values = values

            def __getitem__(self, index):
                return Rows(self.values[index])

        class Judge(torch.nn.Linear):
            scores = "latents"

            def encode_prompts(self, prompts):
                return Rows(self.weight.new_zeros(len(prompts), 1))

            def score(self, samples, timesteps=None, text_features=None):
                return self(samples.flatten(1))[:, 0] + text_features.values[:, 0]

        shape = pipeline.latent_shape()
        judge = Judge(shape[0] * shape[1] * shape[2], 1)
        embeds = pipeline.encode_prompt(PROMPTS[:1])
        _, scoring = rollout_chunk_sizes(pipeline, judge, embeds, shape, 1.0, 1.0, largest=40)
        assert scoring == 40  # not the 8 of a model that cannot be estimated


class TestThresholds:
    def test_one_per_prompt(self):
        """Gaps of 1 and 1: tanh(1/2) = 0.462 lies between the two thresholds."""
        scores = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
        assert select_pairs(scores, torch.tensor([0.46, 0.47])).valid.tolist() == [True, False]
        with pytest.raises(ValueError, match=r"one value per prompt, shape \(2,\)"):
            select_pairs(scores, torch.tensor([0.1, 0.2, 0.3]))

    def test_interpolated_in_the_standard_deviation(self, tmp_path):
        """LPO on SD1.5: 0.35 at the smallest sigma of the 20 steps, .0206, and 0.5 at the largest, .6444."""
        scheduler = ddim_scheduler(beta_start=0.00085, beta_end=0.012, steps_offset=1, set_alpha_to_one=False)
        pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path, scheduler=scheduler))
        settings = RolloutSettings(preference_threshold=(0.35, 0.5), branch_start_step=0)
        timesteps = pipeline.set_timesteps(20)
        stds = step_stds(pipeline, 20, 1.0, timesteps)
        assert min(stds) == pytest.approx(0.0206, abs=1e-4) and max(stds) == pytest.approx(0.6444, abs=1e-4)
        thresholds = thresholds_by_step(pipeline, settings, timesteps)
        assert min(thresholds) == pytest.approx(0.35) and max(thresholds) == pytest.approx(0.5)
        for std, threshold in zip(stds, thresholds, strict=True):
            assert threshold == pytest.approx(0.35 + (std - min(stds)) / (max(stds) - min(stds)) * 0.15)

    def test_settings_take_a_number_or_two(self, tmp_path):
        output = str(tmp_path)
        assert SPOConfig(output_dir=output, preference_threshold=[0.4]).preference_threshold == 0.4
        config = SPOConfig(output_dir=output, preference_threshold=(0.35, 0.5))
        assert config.rollout_settings().preference_threshold == (0.35, 0.5)
        with pytest.raises(ValueError, match=r"two of them \(low, high\) with low <= high"):
            SPOConfig(output_dir=output, preference_threshold=[0.5, 0.35])
