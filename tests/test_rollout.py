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
Necessity: the rollout decides what the model is trained on. Its promises (the scored tensor is the trained tensor, one
seed is one rollout, memory is bounded, a prompt is read once) are invisible in any loss curve.
"""

import pytest
import torch

from trl_spo import StepAwareRewardModel, StepPairs, stepwise_rollout, wrap_pipeline

from .testing_utils import PROMPTS, brightness_reward, ddim_scheduler, tiny_clip, tiny_sd_pipeline, tiny_sdxl_pipeline


SETTINGS = {"num_inference_steps": 6, "branch_start_step": 1, "guidance_scale": 3.0, "preference_threshold": 0.0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipeline(tmp_path):
    return wrap_pipeline(tiny_sd_pipeline(tmp_path))


@pytest.fixture
def reward_model(tmp_path):
    folder = tiny_clip(tmp_path)
    return StepAwareRewardModel.from_clip(folder, processor=folder)


def equal(a: StepPairs, b: StepPairs) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True)
    )


class TestPairs:
    def test_the_trained_tensor_is_the_scored_tensor(self, pipeline):
        """Bit for bit, for every branch; the images the reward saw are decoded from these very tensors."""
        seen = []

        def reward(images, prompts, timesteps):
            seen.append((images, timesteps))
            return brightness_reward(images, prompts, timesteps)

        pairs = stepwise_rollout(
            pipeline, PROMPTS[:3], reward, generator=generator(), return_trajectory=True, **SETTINGS
        )
        assert len(pairs.branches) == 5 and len(pairs) == 15
        timesteps = pipeline.scheduler.timesteps.tolist()
        for i, branch in enumerate(pairs.branches):
            rows = slice(3 * i, 3 * i + 3)
            b = torch.arange(3)
            assert torch.equal(pairs.chosen_prev_latents[rows], branch.candidates[branch.selection.chosen, b])
            assert torch.equal(pairs.rejected_prev_latents[rows], branch.candidates[branch.selection.rejected, b])
            assert torch.equal(pairs.latents[rows], branch.latents)
            assert torch.equal(pairs.rejected_latents[rows], branch.latents)
            assert pairs.timesteps[rows].tolist() == [timesteps[i + 1]] * 3
            assert torch.equal(pairs.chosen_scores[rows], branch.scores.max(0).values)
            images, scored_at = seen[i]
            expected = pipeline.decode_latents(branch.pred_original_samples.flatten(0, 1)) / 2 + 0.5
            assert torch.equal(images, expected.clamp(0, 1))
            assert set(scored_at.tolist()) == {(timesteps + [0])[i + 2]}
        assert pairs.shared.all()
        assert pairs.prompts == PROMPTS[:3] * 5
        assert pairs.prompt_index.tolist() == [0, 1, 2] * 5

    def test_candidates_follow_the_step_and_predictions_the_scheduler(self, pipeline):
        """Independent path: diffusers' own `step` from each candidate gives the x_0 prediction that was scored."""
        pairs = stepwise_rollout(
            pipeline, PROMPTS[:2], brightness_reward, generator=generator(), return_trajectory=True, **SETTINGS
        )
        embeds = pipeline.encode_prompt(PROMPTS[:2])
        branch = pairs.branches[1]
        for k in range(4):
            candidate = branch.candidates[k]
            both = torch.cat([embeds.negative_prompt_embeds, embeds.prompt_embeds])
            output = pipeline.unet(candidate.repeat(2, 1, 1, 1), branch.scored_timestep, both).sample
            uncond, cond = output.chunk(2)
            step = pipeline.scheduler.step(uncond + 3.0 * (cond - uncond), branch.scored_timestep, candidate)
            torch.testing.assert_close(
                branch.pred_original_samples[k], step.pred_original_sample, atol=1e-4, rtol=1e-4
            )
        mean, std, _ = pipeline.step_distribution(
            pipeline.predict(branch.latents, branch.timestep, embeds, 3.0), branch.timestep, branch.latents, 1.0
        )
        noise = (branch.candidates - mean) / std
        assert abs(noise.mean().item()) < 5 / noise.numel() ** 0.5
        assert noise.std().item() == pytest.approx(1, abs=5 / (2 * noise.numel()) ** 0.5)

    def test_final_candidates_are_scored_as_they_are(self, pipeline):
        pairs = stepwise_rollout(
            pipeline, PROMPTS[:2], brightness_reward, generator=generator(), return_trajectory=True, **SETTINGS
        )
        last = pairs.branches[-1]
        assert (last.timestep, last.scored_timestep) == (1, 0)
        assert torch.equal(last.pred_original_samples, last.candidates)
        assert torch.equal(pairs.final_latents, last.candidates[last.next_index, torch.arange(2)])
        images = (pipeline.decode_latents(pairs.final_latents) / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(pairs.final_scores, brightness_reward(images, PROMPTS[:2], torch.zeros(2)))

    def test_threshold_drops_pairs_and_nothing_else(self, pipeline):
        loose = stepwise_rollout(pipeline, PROMPTS[:4], brightness_reward, generator=generator(), **SETTINGS)
        gaps = loose.chosen_scores - loose.rejected_scores
        threshold = torch.tanh(gaps.median() / 2).item()
        strict = stepwise_rollout(
            pipeline,
            PROMPTS[:4],
            brightness_reward,
            generator=generator(),
            **{**SETTINGS, "preference_threshold": threshold},
        )
        assert 0 < len(strict) < len(loose)
        assert equal(strict, loose[(torch.tanh(gaps / 2) > threshold).nonzero()[:, 0]])

    @pytest.mark.parametrize("resample", ["chosen", "rejected"])
    def test_next_step_starts_from_the_named_candidate(self, pipeline, resample):
        pairs = stepwise_rollout(
            pipeline,
            PROMPTS[:2],
            brightness_reward,
            generator=generator(),
            return_trajectory=True,
            resample=resample,
            **SETTINGS,
        )
        for branch, following in zip(pairs.branches, pairs.branches[1:], strict=False):
            index = getattr(branch.selection, resample)
            assert torch.equal(following.latents, branch.candidates[index, torch.arange(2)])

    def test_next_step_starts_from_the_recorded_random_candidate(self, pipeline):
        pairs = stepwise_rollout(
            pipeline, PROMPTS[:3], brightness_reward, generator=generator(), return_trajectory=True, **SETTINGS
        )
        for branch, following in zip(pairs.branches, pairs.branches[1:], strict=False):
            assert torch.equal(following.latents, branch.candidates[branch.next_index, torch.arange(3)])
        picks = torch.cat([branch.next_index for branch in pairs.branches])
        assert len(set(picks.tolist())) > 1

    def test_random_pairs_option(self, pipeline):
        pairs = stepwise_rollout(
            pipeline, PROMPTS[:4], brightness_reward, generator=generator(), pair="random", **SETTINGS
        )
        assert (pairs.chosen_scores > pairs.rejected_scores).all()
        best = torch.stack([b.scores.max(0).values for b in pairs.branches]).flatten()
        assert (pairs.chosen_scores < best).any()


class TestRandomness:
    def test_a_seed_is_a_rollout(self, pipeline):
        first = stepwise_rollout(pipeline, PROMPTS[:3], brightness_reward, generator=generator(5), **SETTINGS)
        torch.rand(7)  # the global generator plays no part
        again = stepwise_rollout(pipeline, PROMPTS[:3], brightness_reward, generator=generator(5), **SETTINGS)
        other = stepwise_rollout(pipeline, PROMPTS[:3], brightness_reward, generator=generator(6), **SETTINGS)
        assert equal(first, again)
        assert not equal(first, other)

    def test_chunks_change_nothing_but_rounding(self, pipeline):
        whole = stepwise_rollout(pipeline, PROMPTS[:3], brightness_reward, generator=generator(), **SETTINGS)
        chunked = stepwise_rollout(
            pipeline,
            PROMPTS[:3],
            brightness_reward,
            generator=generator(),
            rollout_micro_batch_size=5,
            vae_decode_batch_size=2,
            **SETTINGS,
        )
        for a, b in zip(whole.tensors().values(), chunked.tensors().values(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


class TestCost:
    def test_batches_are_bounded_and_counts_are_minimal(self, pipeline, reward_model):
        """
        6 steps, 5 of them branching with K = 4, B = 3 prompts, no guidance. UNet: 2 single predictions (steps 0 and 1)
        and 4 x K candidate predictions per prompt (the last candidates need none) = 18. VAE and vision tower: 5 x K =
        20 per prompt. Text tower: each prompt once.
        """
        sizes = {"unet": [], "vae": [], "vision": [], "text": []}

        def count(name):
            return lambda module, args, kwargs, output: sizes[name].append(
                len(args[0] if args else next(iter(kwargs.values())))
            )

        pipeline.unet.register_forward_hook(count("unet"), with_kwargs=True)
        pipeline.vae.decoder.register_forward_hook(count("vae"), with_kwargs=True)
        reward_model.model.visual_projection.register_forward_hook(count("vision"), with_kwargs=True)
        reward_model.model.text_model.register_forward_hook(count("text"), with_kwargs=True)
        stepwise_rollout(
            pipeline,
            PROMPTS[:3],
            reward_model,
            rollout_micro_batch_size=5,
            vae_decode_batch_size=4,
            generator=generator(),
            **{**SETTINGS, "guidance_scale": 1.0},
        )
        assert sum(sizes["unet"]) == 18 * 3 and set(sizes["unet"]) == {3, 4}  # 12 candidates in chunks of at most 5
        assert sum(sizes["vae"]) == sum(sizes["vision"]) == 20 * 3 and max(sizes["vae"]) == max(sizes["vision"]) == 4
        assert sum(sizes["text"]) == 3

    def test_rollout_stops_where_branching_ends(self, pipeline):
        """Steps 1 and 2 branch: 2 single predictions, then K at steps 2 and 3, and nothing after."""
        calls = []
        pipeline.unet.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
        pairs = stepwise_rollout(
            pipeline, PROMPTS[:1], brightness_reward, branch_end_step=3, **{**SETTINGS, "guidance_scale": 1.0}
        )
        assert calls == [1, 1, 4, 4]
        assert [branch.step for branch in pairs.branches] == [1, 2]
        assert pairs.final_latents is None and pairs.final_scores is None


class TestReward:
    def test_step_aware_model_and_its_callable_form_agree(self, pipeline, reward_model):
        """A callable gets images in [0, 1] and the prompts; the model gets cached text features: same pairs."""

        def as_callable(images, prompts, timesteps):
            return reward_model.score(images * 2 - 1, prompts, timesteps)

        pipeline.decode_latents = lambda latents, decode=pipeline.decode_latents: decode(latents).clamp(-1, 1)
        settings = {"generator": generator(), **SETTINGS}
        direct = stepwise_rollout(pipeline, PROMPTS[:2], reward_model, **settings)
        settings["generator"] = generator()
        called = stepwise_rollout(pipeline, PROMPTS[:2], as_callable, **settings)
        assert torch.equal(direct.chosen_prev_latents, called.chosen_prev_latents)
        torch.testing.assert_close(direct.chosen_scores, called.chosen_scores, atol=1e-4, rtol=1e-4)

    def test_latent_rewards_need_no_decoder(self, pipeline):
        class LatentReward:
            scores = "latents"

            def __call__(self, latents, prompts, timesteps):
                assert latents.shape[1:] == (4, 8, 8)
                return latents.mean(dim=(1, 2, 3))

        decoded = []
        pipeline.vae.decoder.register_forward_hook(lambda *args: decoded.append(1))
        assert len(stepwise_rollout(pipeline, PROMPTS[:2], LatentReward(), **SETTINGS)) == 10
        assert not decoded

    def test_wrong_shape_and_nan_are_named(self, pipeline):
        with pytest.raises(ValueError, match=r"one score per sample, shape \(8,\), got \(8, 1\)"):
            stepwise_rollout(pipeline, PROMPTS[:2], lambda i, p, t: torch.zeros(len(i), 1), **SETTINGS)

        def nan_for_dogs(images, prompts, timesteps):
            return torch.tensor([float("nan") if "dog" in prompt else 0.0 for prompt in prompts])

        with pytest.raises(ValueError, match=r"score at step 1, timestep \d+, prompt 'a blue dog'"):
            stepwise_rollout(pipeline, PROMPTS[:2], nan_for_dogs, **SETTINGS)


class TestInnerSteps:
    def test_each_side_keeps_its_own_chain(self, pipeline):
        """j = 2 over steps 1..5: groups of 2, 2 and, cut short by the last step, 1."""
        pairs = stepwise_rollout(
            pipeline, PROMPTS[:2], brightness_reward, num_inner_steps=2, generator=generator(), **SETTINGS
        )
        timesteps = pipeline.scheduler.timesteps.tolist()
        assert pairs.timesteps.tolist() == [t for t in timesteps[1:] for _ in range(2)]
        assert pairs.shared.tolist() == [True, True, False, False] * 2 + [True, True]
        assert [branch.step for branch in pairs.branches] == [1, 3, 5]
        for start in (0, 4):
            first, second = pairs[slice(start, start + 2)], pairs[slice(start + 2, start + 4)]
            assert torch.equal(first.latents, first.rejected_latents)
            assert torch.equal(first.chosen_prev_latents, second.latents)
            assert torch.equal(first.rejected_prev_latents, second.rejected_latents)
            assert not torch.equal(second.latents, second.rejected_latents)

    def test_inner_transitions_follow_the_step_distribution(self, pipeline):
        pairs = stepwise_rollout(
            pipeline, PROMPTS[:4], brightness_reward, num_inner_steps=3, generator=generator(), **SETTINGS
        )
        inner = pairs[(~pairs.shared).nonzero()[:, 0]]
        for latents, prev in (
            (inner.latents, inner.chosen_prev_latents),
            (inner.rejected_latents, inner.rejected_prev_latents),
        ):
            embeds = pipeline.encode_prompt(inner.prompts)
            output = pipeline.predict(latents, inner.timesteps, embeds, 3.0)
            mean, std, _ = pipeline.step_distribution(output, inner.timesteps, latents, 1.0)
            noise = (prev - mean) / std
            assert noise.std().item() == pytest.approx(1, abs=0.05)


class TestSchedules:
    def test_deterministic_last_step_is_taken_but_not_branched(self, tmp_path):
        pipe = tiny_sd_pipeline(tmp_path, scheduler=ddim_scheduler(set_alpha_to_one=True))
        pairs = stepwise_rollout(wrap_pipeline(pipe), PROMPTS[:2], brightness_reward, **SETTINGS)
        assert [branch.step for branch in pairs.branches] == [1, 2, 3, 4]
        assert pairs.final_scores is not None and torch.isfinite(pairs.final_latents).all()

    def test_sdxl_is_the_same_algorithm(self, tmp_path):
        pairs = stepwise_rollout(
            wrap_pipeline(tiny_sdxl_pipeline(tmp_path)), PROMPTS[:2], brightness_reward, num_inner_steps=4, **SETTINGS
        )
        assert len(pairs) == 10 and pairs.shared.sum() == 4


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"eta": 0.0}, "`eta` must be above 0"),
        ({"num_candidates": 1}, "at least 2"),
        ({"branch_start_step": 6}, "`branch_start_step` must be in .0, 6., before branching ends; got 6"),
        ({"branch_end_step": 7}, "`branch_end_step` must be at most 6 steps; got 7"),
        ({"num_inner_steps": 0}, "num_inner_steps"),
        ({"pair": "best"}, "got 'best'"),
        ({"resample": "best"}, "got 'best'"),
        ({"preference_threshold": 1.0}, "in \\[0, 1\\)"),
        ({"prompts": ["one"]}, "1 prompts for 2"),
    ],
)
def test_settings_that_cannot_work(pipeline, settings, message):
    embeds = pipeline.encode_prompt(PROMPTS[:2])
    with pytest.raises(ValueError, match=message):
        stepwise_rollout(pipeline, embeds, brightness_reward, **{"prompts": PROMPTS[:2], **SETTINGS, **settings})


def test_plain_tensors_as_conditioning(pipeline):
    embeds = pipeline.encode_prompt(PROMPTS[:2])
    record = stepwise_rollout(
        pipeline, embeds, brightness_reward, prompts=PROMPTS[:2], generator=generator(), **SETTINGS
    )
    tensors = stepwise_rollout(
        pipeline,
        embeds.prompt_embeds,
        brightness_reward,
        negative_prompt_embeds=embeds.negative_prompt_embeds,
        prompts=PROMPTS[:2],
        generator=generator(),
        **SETTINGS,
    )
    assert equal(record, tensors)
