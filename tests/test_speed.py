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
Necessity: options that promise the same result at less cost must not change a single pair, and an option that is only
slow when it is broken (a wait for the device, a recompilation per batch, work that grows with the dataset) fails silently.
Nothing here is timed.
"""

import pytest
import torch
from datasets import Dataset
from diffusers import AutoencoderTiny
from torch.utils._python_dispatch import TorchDispatchMode

from trl_spo import SPOTrainer, StepAwareRewardModel, stepwise_rollout, wrap_pipeline
from trl_spo.prompt_source import ListedPrompts
from trl_spo.prompts import PromptColumn, read_prompts

from .testing_utils import PROMPTS, brightness_reward, ddim_scheduler, tiny_clip, tiny_sd_pipeline, tiny_spo_config


SETTINGS = {"num_inference_steps": 6, "branch_start_step": 1, "guidance_scale": 3.0, "preference_threshold": 0.0}
EXACT = {
    "chunks of one": {"rollout_micro_batch_size": 1, "vae_decode_batch_size": 1, "reward_batch_size": 1},
    "uneven chunks": {"rollout_micro_batch_size": 5, "vae_decode_batch_size": 3, "reward_batch_size": 7},
    "memory budget": {"memory_budget": 0.002},
    "scored step by step": {"defer_scoring": False},
    "channels first": {"channels_last": False},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "compiled": {"compile_regions": True, "torch_compile_backend": "eager"},
}


@pytest.fixture
def reward_model(tmp_path):
    folder = tiny_clip(tmp_path)
    return StepAwareRewardModel.from_clip(folder, processor=folder)


def tiny_vae(latent_channels=4, seed=0):
    torch.manual_seed(seed)
    return AutoencoderTiny(
        latent_channels=latent_channels,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )


def make_trainer(tmp_path, reward, prompts=PROMPTS, scoring_vae=None, **settings):
    config = tiny_spo_config(tmp_path / "out", **{"max_steps": 2, **SETTINGS, **settings})
    return SPOTrainer(config, tiny_sd_pipeline(tmp_path), reward, train_dataset=prompts, scoring_vae=scoring_vae)


def same_pairs(a, b) -> bool:
    """The same prompts, steps, winners and losers from the same latents, up to the rounding of another batch size."""
    exact = all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("timesteps", "prompt_index", "shared"))
    near = ("latents", "chosen_prev_latents", "rejected_prev_latents", "rejected_latents")
    return (
        a.prompts == b.prompts
        and exact
        and all(torch.allclose(getattr(a, n), getattr(b, n), atol=1e-4) for n in near)
        and all(
            torch.equal(getattr(x.selection, n), getattr(y.selection, n))
            for x, y in zip(a.branches, b.branches, strict=True)
            for n in ("chosen", "rejected", "valid")
        )
    )


class TestExactOptions:
    @pytest.mark.parametrize("name", EXACT)
    def test_no_pair_changes(self, tmp_path, reward_model, name):
        """Both with all pairs and with a threshold that half of them pass."""
        plain = make_trainer(tmp_path, reward_model).rollout(PROMPTS, seed=3)
        gaps = torch.cat([b.scores.max(0).values - b.scores.min(0).values for b in plain.branches]).sort().values
        third = len(gaps) // 3
        widest = third + int((gaps[third + 1 : -third] - gaps[third : -third - 1]).argmax())
        threshold = float(torch.tanh(gaps[widest : widest + 2].mean() / 2))  # no gap is near it: rounding is no change
        expected = make_trainer(tmp_path, reward_model, preference_threshold=threshold).rollout(PROMPTS, seed=3)
        assert 0.3 * len(plain) < len(expected) < 0.7 * len(plain)
        optimized = make_trainer(tmp_path, reward_model, preference_threshold=threshold, **EXACT[name])
        assert same_pairs(optimized.rollout(PROMPTS, seed=3), expected)

    @pytest.mark.parametrize("settings", [{"pair": "random"}, {"branch_end_step": 4}, {"num_inner_steps": 2}])
    def test_deferred_scoring_is_bit_equal(self, tmp_path, settings):
        """The generator is used in the same order, and every candidate keeps its timestep."""
        pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path, scheduler=ddim_scheduler(set_alpha_to_one=True)))

        def reward(images, prompts, timesteps):
            return brightness_reward(images, prompts, timesteps) * (1 + timesteps / 1000)

        rollouts = [
            stepwise_rollout(
                pipeline,
                PROMPTS[:3],
                reward,
                defer_scoring=deferred,
                vae_decode_batch_size=1,
                generator=torch.Generator().manual_seed(1),
                **SETTINGS,
                **settings,
            )
            for deferred in (False, True)
        ]
        for name, value in rollouts[0].tensors().items():
            assert torch.equal(value, getattr(rollouts[1], name)), name
        for a, b in zip(rollouts[0].branches, rollouts[1].branches, strict=True):
            assert torch.equal(a.scores, b.scores) and a.scored_timestep == b.scored_timestep
        if "branch_end_step" not in settings:
            assert torch.equal(rollouts[0].final_scores, rollouts[1].final_scores)

    @pytest.mark.parametrize("name", ["compiled", "gradient checkpointing", "channels first"])
    def test_training_is_the_same(self, tmp_path, name):
        states = []
        for changes in ({}, EXACT[name]):
            trainer = make_trainer(tmp_path, brightness_reward, learning_rate=1e-3, **changes)
            trainer.train()
            states.append(trainer.model.state_dict())
        lora = [key for key in states[0] if "lora" in key]
        assert lora and states[0].keys() == states[1].keys()
        for key in lora:
            torch.testing.assert_close(states[0][key], states[1][key], atol=2e-5, rtol=1e-3)


class Reads(TorchDispatchMode):
    """Counts the operations that make a host wait for its device to read a value."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")
        self.count += any(function.overloadpacket.__name__ == name for name in names)
        return function(*args, **(kwargs or {}))


class TestHostReads:
    def test_a_rollout_reads_no_more_for_more_steps(self, tmp_path, reward_model):
        """What remains is read once per rollout, from tensors that are on the CPU by then."""

        def reads(**settings):
            trainer = make_trainer(tmp_path, reward_model, **settings)
            trainer.rollout(PROMPTS[:2])
            plain = {name: getattr(trainer.args, name) for name in ("num_inference_steps", "branch_start_step")}
            with Reads() as mode:
                stepwise_rollout(
                    trainer.pipeline, trainer._encode(PROMPTS[:2]), reward_model, prompts=PROMPTS[:2],
                    defer_scoring=True, guidance_scale=3.0, branch_end_step=plain["num_inference_steps"] - 1, **plain,
                )  # fmt: skip
            return mode.count, plain["num_inference_steps"] - 1 - plain["branch_start_step"]

        (few, branches), (many, more_branches) = reads(), reads(num_inference_steps=20)
        assert more_branches == branches + 14
        # Per branch one `nonzero` and six checks of the selection, all of tensors that are on the CPU by then.
        assert many - few == 14 * 7, (few, many)

    def test_a_loss_reads_nothing(self, tmp_path):
        trainer = make_trainer(tmp_path, brightness_reward)
        pairs = trainer.rollout(PROMPTS[:3])
        inputs = {"pairs": pairs, "num_pairs": len(pairs), "num_micro_batches": 1}
        trainer.compute_loss(trainer.model, inputs)
        with Reads() as mode:
            trainer.compute_loss(trainer.model, inputs)
        assert mode.count == 0

    def test_a_read_is_seen(self):
        with Reads() as mode:
            bool(torch.ones(1).sum() > 0)
            torch.ones(3).nonzero()
        assert mode.count == 2


class TestApproximations:
    def test_a_small_decoder_scores_and_the_vae_draws(self, tmp_path):
        seen, vae = [], tiny_vae()

        def reward(images, prompts, timesteps):
            seen.append(images)
            return brightness_reward(images, prompts, timesteps)

        trainer = make_trainer(tmp_path, reward, scoring_vae=vae)
        pairs = trainer.rollout(PROMPTS[:2], return_trajectory=True)
        latents = pairs.branches[0].pred_original_samples.flatten(0, 1)
        expected = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(seen[0][: len(latents)], expected, atol=1e-5, rtol=1e-5)
        full = trainer.pipeline.decode_latents(latents) / 2 + 0.5
        assert (full.clamp(0, 1) - expected).abs().max() > 0.01
        assert not any(parameter.requires_grad for parameter in vae.parameters())

    def test_a_small_decoder_from_a_folder(self, tmp_path):
        tiny_vae().save_pretrained(tmp_path / "vae")
        trainer = make_trainer(tmp_path, brightness_reward, scoring_vae=str(tmp_path / "vae"))
        assert isinstance(trainer.pipeline.scoring_vae, AutoencoderTiny)

    @pytest.mark.parametrize(
        ("vae", "error", "message"),
        [
            (lambda: tiny_vae(latent_channels=8), ValueError, "8 channels"),
            (lambda: "/nowhere/vae", ValueError, "Could not load"),
            (lambda: torch.nn.Linear(2, 2), TypeError, "`scoring_vae` must be"),
        ],
    )
    def test_a_decoder_that_does_not_fit(self, tmp_path, vae, error, message):
        with pytest.raises(error, match=message):
            make_trainer(tmp_path, brightness_reward, scoring_vae=vae())

    @pytest.mark.parametrize(("size", "expected"), [(8, 8), (12, 12), (64, 16), (None, 16)])
    def test_scoring_image_size(self, tmp_path, size, expected):
        """Smaller images are decoded from smaller latents; none is ever enlarged."""
        seen = []

        def reward(images, prompts, timesteps):
            seen.append(tuple(images.shape[-2:]))
            return brightness_reward(images, prompts, timesteps)

        make_trainer(tmp_path, reward, scoring_image_size=size).rollout(PROMPTS[:2])
        assert set(seen) == {(expected, expected)}

    @pytest.mark.parametrize("inner", [1, 2])
    def test_a_random_subset_of_branches(self, tmp_path, inner):
        trainer = make_trainer(tmp_path, brightness_reward, num_branches=2, num_inner_steps=inner)
        chosen = set()
        for seed in range(6):
            pairs = trainer.rollout(PROMPTS[:3], seed=seed)
            steps = tuple(branch.step for branch in pairs.branches)
            assert len(steps) == 2 and len(pairs) == sum(3 * (inner if s + inner <= 6 else 1) for s in steps)
            assert all((step - 1) % inner == 0 for step in steps)
            chosen.add(steps)
        assert len(chosen) > 1
        trainer.train()
        assert trainer.state.global_step == 2

    def test_reward_dtype(self, tmp_path, reward_model):
        trainer = make_trainer(tmp_path, reward_model, reward_dtype="bfloat16")
        assert trainer.reward_model.dtype == torch.bfloat16
        assert trainer.rollout(PROMPTS[:2]).branches[0].scores.dtype == torch.float32
        with pytest.raises(ValueError, match="reward_dtype"):
            make_trainer(tmp_path, brightness_reward, reward_dtype="bfloat16")


class TestTimestepWeighting:
    def test_even_weights_undo_the_sensitivity(self, tmp_path):
        """Measured by the log-ratios themselves: the same change of the prediction at every step, the same noise."""
        trainer = make_trainer(tmp_path, brightness_reward, num_inference_steps=20, timestep_weighting="even")
        pipeline, schedule = trainer.pipeline, trainer.pipeline.set_timesteps(20)
        timesteps = torch.tensor(schedule[1:])
        torch.manual_seed(0)
        x, output, noise = (torch.randn(1, 4, 8, 8).expand(len(timesteps), -1, -1, -1) for _ in range(3))
        before = pipeline.step_distribution(output, timesteps, x, 1.0)
        after = pipeline.step_distribution(output + 1e-3 * noise, timesteps, x, 1.0)
        ratio = (
            ((after.prev_sample_mean - before.prev_sample_mean) * noise / before.std_dev_t).flatten(1).mean(1).abs()
        )
        assert ratio.max() > 5 * ratio.median()  # the step before the last
        even = trainer.timestep_weights(timesteps) * ratio
        torch.testing.assert_close(even, ratio.median().expand_as(even), rtol=2e-2, atol=0)

    def test_loss_and_metrics_use_them(self, tmp_path):
        """The logged margin is the one the loss saw: -log sigmoid of it is the loss, pair by pair."""
        trainer = make_trainer(
            tmp_path, brightness_reward, timestep_weighting="even", learning_rate=1e-2, max_steps=4, epsilon=0.9
        )
        trainer.train()
        found = {}
        pairs = trainer.rollout(PROMPTS[:3])
        pair = pairs[(trainer.timestep_weights(pairs.timesteps) != 1).nonzero()[:1, 0]]
        for weighting in ("none", "even"):
            trainer.args.timestep_weighting = weighting
            trainer._metrics.clear()
            loss = trainer.compute_loss(trainer.model, {"pairs": pair, "num_pairs": 1, "num_micro_batches": 1})
            margin = trainer._metrics.pop()["rewards/margins"]
            expected = torch.nn.functional.softplus(torch.tensor(-margin))
            torch.testing.assert_close(loss.detach(), expected, atol=1e-5, rtol=1e-5)
            found[weighting] = margin
        weight = trainer.timestep_weights(pair.timesteps).item()
        assert weight != 1 and found["none"] != 0
        assert found["even"] == pytest.approx(weight * found["none"], rel=1e-3)


class TestManyPrompts:
    def test_a_dataset_to_evaluate_on(self, tmp_path):
        """Regression: what the trainer had made of the dataset was not accepted when its turn came."""
        dataset = Dataset.from_dict({"prompt": PROMPTS[:3]})
        trainer = SPOTrainer(
            tiny_spo_config(tmp_path / "out", eval_strategy="steps", eval_steps=1, max_steps=1),
            tiny_sd_pipeline(tmp_path), brightness_reward, train_dataset=dataset, eval_dataset=dataset,
        )  # fmt: skip
        trainer.train()
        assert any("eval_reward_mean" in log for log in trainer.state.log_history)
        assert read_prompts(read_prompts(dataset)) is not None

    def test_branches_count_in_the_length(self, tmp_path):
        settings = {"per_device_train_batch_size": 2, "max_steps": -1, "num_train_epochs": 1}
        trainer = make_trainer(tmp_path, brightness_reward, num_branches=2, **settings)
        assert len(trainer.pair_loader) == 6  # 6 prompts, 2 pairs each, 2 pairs per step
        assert len(make_trainer(tmp_path, brightness_reward, **settings).pair_loader) == 15  # 5 pairs each

    def test_a_dataset_is_read_lazily(self):
        dataset = Dataset.from_dict({"caption": [f"prompt {i}" for i in range(3000)], "extra": [0] * 3000})
        prompts = read_prompts(dataset)
        assert isinstance(prompts, PromptColumn)
        assert len(prompts) == 3000 and prompts[2] == "prompt 2" and prompts[1:3] == ["prompt 1", "prompt 2"]
        assert list(prompts) == dataset["caption"][:]

    def test_a_round_does_not_walk_the_dataset(self, tmp_path):
        """The prompts of a round are the only ones that are read."""

        class Counting(list):
            reads = 0

            def __getitem__(self, index):
                Counting.reads += 1
                return super().__getitem__(index)

            def __iter__(self):
                raise AssertionError("something walks over all prompts")

        trainer = make_trainer(tmp_path, brightness_reward)
        trainer.train()
        loader = trainer.pair_loader
        loader.source = ListedPrompts(Counting([PROMPTS[i % len(PROMPTS)] for i in range(100_000)]), 0, 1, seed=0)
        loader.num_prompts_seen = 0
        loader._rollout_round()
        order = loader.source._order
        loader._rollout_round()
        assert Counting.reads == 6 and loader.source._order is order

    def test_checkpoints_agree_with_those_of_a_list(self, tmp_path):
        """The same prompts as a list and as a dataset are the same run."""
        trainers = [
            make_trainer(tmp_path, brightness_reward, prompts=prompts)
            for prompts in (PROMPTS, Dataset.from_dict({"prompt": PROMPTS}))
        ]
        assert trainers[0].pair_loader.source.state_dict() == trainers[1].pair_loader.source.state_dict()
