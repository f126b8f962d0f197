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
Necessity: examples show that a function is right where somebody thought of looking. These tests state what must hold for
every input, and let hypothesis look for one where it does not. References are written in numpy or float64, or are
diffusers and torch; where a law says "exactly", the numbers drawn are small multiples of 1/8, which float32 adds exactly.
"""

import io
import math
import os
import unicodedata
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from packaging import version
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import t as student_t

from trl_spo import StepRewardTrainer, stepwise_rollout, wrap_pipeline
from trl_spo.evaluation.statistics import (
    mean_and_se,
    mean_interval,
    paired_statistics,
    prompt_means,
    wilson_interval,
)
from trl_spo.images import image_to_tensor, read_image
from trl_spo.kohya import export_kohya, read_lora
from trl_spo.losses import spo_loss, step_preference_loss
from trl_spo.pair_selection import (
    draw_two_candidates,
    gather_candidates,
    resample_index,
    select_pairs,
    select_random_pairs,
)
from trl_spo.preference_collator import StepPreferenceCollator
from trl_spo.preference_dataset import find_preference_columns, is_labelled, prepare_preference_dataset
from trl_spo.preference_labels import preference_labels
from trl_spo.prompts import PromptColumn, read_prompts
from trl_spo.rewards.step_aware_clip import StepAwareRewardModel
from trl_spo.scheduling_ddim import ddim_step_stats
from trl_spo.step_distribution import gaussian_kl, gaussian_log_prob, sample_candidates
from trl_spo.step_pairs import StepPairs

from .test_export import sdxl_unet
from .testing_utils import PROMPTS, brightness_reward, tiny_clip, tiny_sd_pipeline, tiny_step_reward_config


settings.register_profile(
    "trl_spo",
    deadline=None,
    max_examples=60,
    database=None,
    derandomize="HYPOTHESIS_EXPLORE" not in os.environ,  # a suite is the same suite on every run; set it to search on
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("trl_spo")

few = settings(max_examples=12)
eighths = st.one_of(st.integers(-12, 12), st.integers(-400, 400)).map(lambda n: n / 8)
thresholds = st.one_of(st.just(0.0), st.floats(0, 0.99))
seeds = st.integers(0, 2**32)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def score_tables(draw, elements=eighths, dtype=np.float32):
    """`(K, B)` scores with K >= 2."""
    shape = draw(st.tuples(st.integers(2, 6), st.integers(1, 5)))
    return torch.from_numpy(draw(hnp.arrays(dtype, shape, elements=elements)))


moderate = st.floats(-30, 30)


def columns(count: int, elements=moderate):
    """`count` float64 vectors of one length."""
    return st.integers(1, 6).flatmap(
        lambda n: st.tuples(*[hnp.arrays(np.float64, n, elements=elements).map(torch.from_numpy)] * count)
    )


# --- pairs -----------------------------------------------------------------------------------------------------------


class TestSelectPairs:
    @given(score_tables(), thresholds, st.data())
    def test_a_shift_of_a_prompts_scores_changes_nothing(self, scores, threshold, data):
        shift = data.draw(hnp.arrays(np.float32, scores.shape[1], elements=eighths))
        shifted = select_pairs(scores + torch.from_numpy(shift), threshold)
        for found, expected in zip(shifted, select_pairs(scores, threshold), strict=True):
            assert torch.equal(found, expected)

    @given(score_tables(), thresholds, st.randoms(use_true_random=False))
    def test_prompts_are_independent_and_candidates_have_no_order(self, scores, threshold, random):
        selection = select_pairs(scores, threshold)
        prompts, candidates = list(range(scores.shape[1])), list(range(scores.shape[0]))
        random.shuffle(prompts)
        random.shuffle(candidates)
        for found, expected in zip(select_pairs(scores[:, prompts], threshold), selection, strict=True):
            assert torch.equal(found, expected[prompts])
        mixed = select_pairs(scores[candidates], threshold)
        assert torch.equal(mixed.valid, selection.valid)
        for found, expected in ((mixed.chosen, selection.chosen), (mixed.rejected, selection.rejected)):
            assert torch.equal(
                gather_candidates(scores[candidates], found), gather_candidates(scores, expected)
            )  # of equal scores either may be taken

    @given(score_tables(), thresholds)
    def test_best_worst_and_the_meaning_of_the_threshold(self, scores, threshold):
        chosen, rejected, valid = select_pairs(scores, threshold)
        best, worst = scores.max(0).values, scores.min(0).values
        assert torch.equal(gather_candidates(scores, chosen), best)
        assert torch.equal(gather_candidates(scores, rejected), worst)
        difference = torch.softmax(torch.stack([best, worst]).double(), 0)
        difference = difference[0] - difference[1]
        clear = (difference - threshold).abs() > 1e-6
        assert torch.equal(valid[clear], (difference > threshold)[clear])
        assert not valid[best == worst].any()

    @given(score_tables(st.floats(-20, 20, width=32)), thresholds, thresholds)
    def test_a_higher_threshold_keeps_fewer(self, scores, one, other):
        low, high = sorted([one, other])
        kept, of_these = select_pairs(scores, high).valid, select_pairs(scores, low).valid
        assert (of_these | ~kept).all()

    @given(score_tables(st.floats(width=32)), thresholds, seeds)
    def test_what_is_not_finite_is_never_valid(self, scores, threshold, seed):
        finite = scores.isfinite().all(0)
        assert not select_pairs(scores, threshold).valid[~finite].any()
        chosen, rejected, valid = select_random_pairs(scores, threshold, generator(seed))
        drawn = torch.stack([gather_candidates(scores, chosen), gather_candidates(scores, rejected)])
        assert drawn[:, valid].isfinite().all()

    @given(score_tables(), thresholds, seeds)
    def test_random_pairs_are_the_two_that_were_drawn(self, scores, threshold, seed):
        drawn = draw_two_candidates(*scores.shape, generator(seed))
        selection = select_random_pairs(scores, threshold, generator(seed))
        given_two = select_random_pairs(scores, threshold, candidates=drawn)
        assert all(torch.equal(a, b) for a, b in zip(selection, given_two, strict=True))
        pair = torch.stack([selection.chosen, selection.rejected])
        assert torch.equal(pair.sort(0).values, drawn.sort(0).values)
        assert (selection.chosen != selection.rejected).all()
        assert (gather_candidates(scores, selection.chosen) >= gather_candidates(scores, selection.rejected)).all()
        best = select_pairs(scores, threshold).valid
        assert (best | ~selection.valid).all()  # a random pair is never clearer than best against worst

    @given(score_tables(), seeds)
    def test_resampling(self, scores, seed):
        selection = select_pairs(scores, 0.0)
        assert torch.equal(resample_index(selection, len(scores), "chosen"), selection.chosen)
        assert torch.equal(resample_index(selection, len(scores), "rejected"), selection.rejected)
        index = resample_index(selection, len(scores), "random", generator(seed))
        assert index.shape == selection.chosen.shape and 0 <= index.min() <= index.max() < len(scores)
        other = resample_index(select_pairs(-scores, 0.5), len(scores), "random", generator(seed))
        assert torch.equal(index, other)  # it depends on the seed alone

    @given(st.integers(2, 8), seeds)
    @few
    def test_resampling_is_uniform(self, num_candidates, seed):
        selection = select_pairs(torch.zeros(num_candidates, 4000), 0.0)
        counts = torch.bincount(resample_index(selection, num_candidates, "random", generator(seed)))
        expected = 4000 / num_candidates
        assert (counts - expected).abs().max() < 6 * math.sqrt(expected)


# --- losses ----------------------------------------------------------------------------------------------------------


class TestSPOLoss:
    @given(columns(4), st.floats(0.01, 100), st.floats(0.001, 0.999))
    def test_is_the_formula(self, logps, beta, epsilon):
        chosen, rejected, ref_chosen, ref_rejected = logps
        output = spo_loss(*logps, beta=beta, epsilon=epsilon)
        ratios = [
            np.clip(np.exp((new - old).numpy()), 1 - epsilon, 1 + epsilon)
            for new, old in ((chosen, ref_chosen), (rejected, ref_rejected))
        ]
        expected = np.log1p((ratios[1] / ratios[0]) ** beta)  # -log sigmoid(beta (log r_w - log r_l))
        np.testing.assert_allclose(output.losses.numpy(), expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(output.chosen_ratio.numpy(), ratios[0], rtol=1e-12)
        np.testing.assert_allclose(output.rejected_ratio.numpy(), ratios[1], rtol=1e-12)

    @given(columns(4, st.floats(-1e30, 1e30)), st.floats(0.01, 100), st.floats(0.001, 0.999))
    def test_is_bounded_whatever_the_log_probabilities(self, logps, beta, epsilon):
        losses, *ratios = spo_loss(*logps, beta=beta, epsilon=epsilon)
        largest = beta * (math.log1p(epsilon) - math.log1p(-epsilon))
        low, high = np.logaddexp(0, -largest), np.logaddexp(0, largest)
        assert losses.min() >= low * (1 - 1e-9) and losses.max() <= high * (1 + 1e-9)
        for ratio in ratios:
            assert ratio.min() >= 1 - epsilon - 1e-12 and ratio.max() <= 1 + epsilon + 1e-12

    @given(columns(4, st.floats(-1, 1)), st.floats(0.01, 50), st.floats(0.01, 0.9))
    def test_swapping_winner_and_loser_flips_the_margin(self, logps, beta, epsilon):
        chosen, rejected, ref_chosen, ref_rejected = logps
        losses, chosen_ratio, rejected_ratio = spo_loss(*logps, beta=beta, epsilon=epsilon)
        swapped = spo_loss(rejected, chosen, ref_rejected, ref_chosen, beta=beta, epsilon=epsilon)
        assert torch.equal(swapped.chosen_ratio, rejected_ratio)
        margin = beta * (chosen_ratio.log() - rejected_ratio.log())
        torch.testing.assert_close(swapped.losses - losses, margin, rtol=1e-9, atol=1e-9)  # L(-z) - L(z) = z

    @given(columns(2), st.floats(0.01, 100), st.floats(0.01, 0.99))
    def test_starts_at_ln_two(self, logps, beta, epsilon):
        output = spo_loss(*logps, *logps, beta=beta, epsilon=epsilon)
        torch.testing.assert_close(output.losses, torch.full_like(logps[0], math.log(2)))
        assert (output.chosen_ratio == 1).all() and (output.rejected_ratio == 1).all()

    @given(columns(4, st.floats(-0.3, 0.3)), st.floats(0.1, 20), st.floats(0.01, 0.5))
    def test_gradients_raise_the_winner_unless_clipped(self, logps, beta, epsilon):
        chosen, rejected, ref_chosen, ref_rejected = logps
        chosen, rejected = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
        spo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, epsilon).losses.sum().backward()
        low, high = math.log1p(-epsilon), math.log1p(epsilon)
        for value, reference, sign in ((chosen, ref_chosen, -1), (rejected, ref_rejected, 1)):
            ratio = (value - reference).detach()
            inside = (ratio > low) & (ratio < high)
            outside = (ratio < low) | (ratio > high)
            assert (sign * value.grad[inside] > 0).all()
            assert (value.grad[outside] == 0).all()


@st.composite
def labelled_scores(draw):
    """Scores of two images and labels, among them ties and certain ones."""
    scores_0, scores_1 = draw(columns(2))
    label = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
    label_0 = torch.from_numpy(draw(hnp.arrays(np.float64, len(scores_0), elements=label)))
    return scores_0, scores_1, label_0, 1 - label_0


class TestStepPreferenceLoss:
    @given(labelled_scores())
    def test_is_the_divergence_from_the_labels(self, values):
        scores_0, scores_1, label_0, label_1 = (value.numpy() for value in values)
        losses = step_preference_loss(*values)
        expected = np.zeros(len(scores_0))
        for label, own, other in ((label_0, scores_0, scores_1), (label_1, scores_1, scores_0)):
            log_p = -np.logaddexp(0, other - own)
            expected += np.where(label > 0, label * (np.log(np.maximum(label, 1e-300)) - log_p), 0)
        np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5, atol=1e-5)
        assert losses.min() >= -1e-6

    @given(labelled_scores(), st.floats(-50, 50))
    def test_swap_and_shift(self, values, shift):
        scores_0, scores_1, label_0, label_1 = values
        losses = step_preference_loss(*values)
        torch.testing.assert_close(step_preference_loss(scores_1, scores_0, label_1, label_0), losses)
        shifted = step_preference_loss(scores_0 + shift, scores_1 + shift, label_0, label_1)
        torch.testing.assert_close(shifted, losses, rtol=1e-4, atol=1e-4)

    @given(hnp.arrays(np.float64, 4, elements=st.floats(0.01, 0.99)), st.floats(0.05, 3))
    def test_is_zero_at_the_labels_and_nowhere_else(self, label_0, away):
        label_0 = torch.from_numpy(label_0)
        gap = torch.logit(label_0)
        zero = torch.zeros_like(gap)
        assert step_preference_loss(gap, zero, label_0, 1 - label_0).abs().max() < 1e-6
        for moved in (gap + away, gap - away):
            assert step_preference_loss(moved, zero, label_0, 1 - label_0).min() > 0

    @given(labelled_scores(), st.data())
    def test_weights(self, values, data):
        size = len(values[0])
        weights = torch.from_numpy(data.draw(hnp.arrays(np.float64, size, elements=st.floats(0.01, 10))))
        losses = step_preference_loss(*values).double()
        weighted = step_preference_loss(*values, weights=weights).double()
        torch.testing.assert_close(weighted, (weights * losses).sum() / weights.sum(), rtol=1e-4, atol=1e-5)
        scaled = step_preference_loss(*values, weights=7 * weights).double()
        torch.testing.assert_close(scaled, weighted, rtol=1e-4, atol=1e-5)

    @given(columns(2, st.floats(-30, 30)), st.floats(0, 0.99))
    def test_labels_of_a_preference_model(self, scores, tie_band):
        label_0, label_1 = preference_labels(*scores, tie_band)
        assert torch.equal(label_0 + label_1, torch.ones_like(label_0))
        assert set(label_0.tolist()) <= {0.0, 0.5, 1.0}
        gap = (scores[0].float() - scores[1].float()).double()
        difference, clear = torch.tanh(gap / 2), (torch.tanh(gap / 2).abs() - tie_band).abs() > 1e-6
        tie = (difference.abs() < tie_band) | (gap == 0)
        assert torch.equal((label_0 == 0.5)[clear], tie[clear])
        assert (torch.sign(label_0 - 0.5)[~tie & clear] == torch.sign(gap)[~tie & clear]).all()


# --- step distributions ----------------------------------------------------------------------------------------------


@st.composite
def ddim_steps(draw):
    """A scheduler after `set_timesteps`, latents, a model output and an eta."""
    scheduler = DDIMScheduler(
        num_train_timesteps=draw(st.sampled_from([50, 1000])),
        beta_start=draw(st.floats(1e-4, 1e-3)),
        beta_end=draw(st.floats(5e-3, 2e-2)),
        beta_schedule=draw(st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"])),
        clip_sample=draw(st.booleans()),
        set_alpha_to_one=draw(st.booleans()),
        steps_offset=draw(st.sampled_from([0, 1])),
        prediction_type=draw(st.sampled_from(["epsilon", "sample", "v_prediction"])),
        timestep_spacing=draw(st.sampled_from(["leading", "trailing"])),
    )
    scheduler.set_timesteps(draw(st.integers(1, 20)))
    shape = (draw(st.integers(1, 4)), 2, 3)
    values = st.floats(-3, 3, width=32)
    sample, output = (torch.from_numpy(draw(hnp.arrays(np.float32, shape, elements=values))) for _ in range(2))
    return scheduler, sample, output, draw(st.floats(0, 1))


class TestDDIM:
    @given(ddim_steps(), st.data())
    def test_agrees_with_diffusers_at_every_step(self, step, data):
        scheduler, sample, output, eta = step
        timestep = data.draw(st.sampled_from(scheduler.timesteps.tolist()))
        noise = torch.randn(sample.shape, generator=generator(0))
        mean, std, original = ddim_step_stats(scheduler, output, timestep, sample, eta)
        expected = scheduler.step(output, timestep, sample, eta=eta, variance_noise=noise if eta > 0 else None)
        torch.testing.assert_close(mean + std * noise, expected.prev_sample, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(original, expected.pred_original_sample, rtol=1e-4, atol=1e-5)

    @given(ddim_steps(), st.data())
    def test_rows_of_different_timesteps_do_not_meet(self, step, data):
        scheduler, sample, output, eta = step
        choose = st.sampled_from(scheduler.timesteps.tolist())
        timesteps = data.draw(st.lists(choose, min_size=len(sample), max_size=len(sample)))
        before = scheduler.timesteps.clone(), scheduler.alphas_cumprod.clone(), dict(scheduler.config)
        mixed = ddim_step_stats(scheduler, output, torch.tensor(timesteps), sample, eta)
        for row, timestep in enumerate(timesteps):
            alone = ddim_step_stats(scheduler, output[row : row + 1], timestep, sample[row : row + 1], eta)
            torch.testing.assert_close(mixed.prev_sample_mean[row : row + 1], alone.prev_sample_mean)
            torch.testing.assert_close(mixed.std_dev_t[row].flatten(), alone.std_dev_t.reshape(-1))
        assert torch.equal(scheduler.timesteps, before[0]) and torch.equal(scheduler.alphas_cumprod, before[1])
        assert dict(scheduler.config) == before[2]

    @given(ddim_steps(), st.data())
    def test_sigma_is_proportional_to_eta(self, step, data):
        scheduler, sample, output, eta = step
        timestep = data.draw(st.sampled_from(scheduler.timesteps.tolist()))
        full = ddim_step_stats(scheduler, output, timestep, sample, 1.0).std_dev_t
        part = ddim_step_stats(scheduler, output, timestep, sample, eta).std_dev_t
        torch.testing.assert_close(part, eta * full)
        assert (full >= 0).all() and (full < 1).all()


@st.composite
def gaussians(draw):
    """`x`, two means and a standard deviation per row."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    values = hnp.arrays(np.float64, shape, elements=st.floats(-5, 5)).map(torch.from_numpy)
    stds = hnp.arrays(np.float64, (shape[0], 1, 1), elements=st.floats(0.05, 3)).map(torch.from_numpy)
    return draw(values), draw(values), draw(values), draw(stds)


class TestStepDistribution:
    @given(gaussians())
    def test_log_prob_is_torchs(self, values):
        x, mean, _, std = values
        expected = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x).flatten(1).mean(1)
        torch.testing.assert_close(gaussian_log_prob(x, mean, std), expected)
        assert (gaussian_log_prob(mean, mean, std) >= gaussian_log_prob(x, mean, std)).all()
        torch.testing.assert_close(gaussian_log_prob(2 * mean - x, mean, std), expected)

    @given(gaussians())
    def test_gradient_of_the_log_prob(self, values):
        x, mean, _, std = values
        mean, x = mean.clone().requires_grad_(), x.clone().requires_grad_()
        gaussian_log_prob(x, mean, std).sum().backward()
        torch.testing.assert_close(mean.grad, ((x - mean) / std**2 / x[0].numel()).detach())
        assert x.grad is None  # a candidate is a constant

    @given(gaussians())
    def test_no_density_without_noise(self, values):
        x, mean, _, std = values
        std = std.clone()
        std[-1] = 0
        with pytest.raises(ValueError, match="sigma = 0"):
            gaussian_log_prob(x, mean, std)

    @given(gaussians())
    def test_divergence_is_torchs(self, values):
        _, mean, other, std = values
        normal = torch.distributions.Normal
        expected = torch.distributions.kl_divergence(normal(mean, std), normal(other, std)).flatten(1).mean(1)
        found = gaussian_kl(mean, other, std)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
        assert (found >= 0).all() and (gaussian_kl(mean, mean, std) == 0).all()
        torch.testing.assert_close(gaussian_kl(other, mean, std), found)

    @given(gaussians(), st.integers(1, 5), seeds, st.sampled_from([torch.float32, torch.float16, None]))
    def test_candidates_are_mean_plus_sigma_noise(self, values, count, seed, dtype):
        _, mean, _, std = values
        mean, std = mean.float(), std.float()
        drawn = sample_candidates(mean, std, count, generator(seed), dtype)
        assert drawn.shape == (count, *mean.shape) and drawn.dtype == (dtype or torch.float32)
        noise = sample_candidates(torch.zeros_like(mean), torch.ones_like(std), count, generator(seed))
        torch.testing.assert_close(drawn, (mean + std * noise).to(drawn.dtype))
        still = sample_candidates(mean, torch.zeros_like(std), count, generator(seed))
        assert torch.equal(still, mean.expand_as(still))
        assert torch.equal(drawn, sample_candidates(mean, std, count, generator(seed), dtype))


# --- collections of pairs --------------------------------------------------------------------------------------------


@st.composite
def step_pairs(draw, least=0):
    size = draw(st.integers(least, 6))
    source = generator(draw(seeds))
    latents = {
        name: torch.randn(size, 2, 3, generator=source)
        for name in ("latents", "chosen_prev_latents", "rejected_latents", "rejected_prev_latents")
    }
    return StepPairs(
        **latents,
        shared=torch.rand(size, generator=source) < 0.5,
        timesteps=torch.randint(1000, (size,), generator=source),
        prompt_index=torch.randint(9, (size,), generator=source),
        chosen_scores=torch.randn(size, generator=source),
        rejected_scores=torch.randn(size, generator=source),
        prompts=draw(st.lists(st.text(max_size=4), min_size=size, max_size=size)),
    )


def same_pairs(found: StepPairs, expected: StepPairs):
    assert found.prompts == expected.prompts and len(found) == len(expected)
    assert found.tensors().keys() == expected.tensors().keys()
    for name, value in expected.tensors().items():
        assert torch.equal(found.tensors()[name], value) and found.tensors()[name].dtype == value.dtype, name


class TestStepPairs:
    @given(step_pairs(least=1), st.data())
    def test_indexing_takes_whole_rows(self, pairs, data):
        index = data.draw(st.lists(st.integers(-len(pairs), len(pairs) - 1)))
        taken = pairs[torch.tensor(index, dtype=torch.long)]
        assert taken.prompts == [pairs.prompts[i] for i in index]
        for name, value in pairs.tensors().items():
            assert torch.equal(taken.tensors()[name], value[index]), name
        start, stop = data.draw(st.integers(-7, 7)), data.draw(st.integers(-7, 7))
        assert pairs[start:stop].prompts == pairs.prompts[start:stop]

    @given(step_pairs(), st.integers(0, 6))
    def test_parts_put_together_are_the_whole(self, pairs, cut):
        same_pairs(StepPairs.cat([pairs[:cut], pairs[cut:]]), pairs)
        same_pairs(StepPairs.cat([pairs[:0], pairs, pairs[:0]]), pairs)

    @given(step_pairs(least=1))
    @few
    def test_files_keep_every_bit(self, tmp_path, pairs):
        save_file(pairs.tensors(), tmp_path / "pairs.safetensors")
        same_pairs(StepPairs(**load_file(tmp_path / "pairs.safetensors"), prompts=list(pairs.prompts)), pairs)


class TestRollout:
    @pytest.fixture(scope="class")
    def pipeline(self, tmp_path_factory):
        return wrap_pipeline(tiny_sd_pipeline(tmp_path_factory.mktemp("pipeline")))

    @given(
        st.integers(1, 7),
        st.integers(1, 7),
        st.integers(1, 7),
        st.booleans(),
        st.integers(1, 2),
        st.sampled_from([1, 2]),
    )
    @settings(max_examples=8)
    def test_chunks_of_any_size_give_the_same_pairs(self, pipeline, denoiser, decoder, reward, defer, inner, batch):
        arguments = {"num_inference_steps": 3, "branch_start_step": 0, "num_candidates": 3, "num_inner_steps": inner}
        arguments |= {"preference_threshold": 0.0, "guidance_scale": 2.0}
        whole = stepwise_rollout(pipeline, PROMPTS[:batch], brightness_reward, generator=generator(1), **arguments)
        parts = stepwise_rollout(
            pipeline,
            PROMPTS[:batch],
            brightness_reward,
            generator=generator(1),
            rollout_micro_batch_size=denoiser,
            vae_decode_batch_size=decoder,
            reward_batch_size=reward,
            defer_scoring=defer,
            **arguments,
        )
        assert len(whole) > 0 and parts.prompts == whole.prompts
        for name, value in whole.tensors().items():
            torch.testing.assert_close(parts.tensors()[name], value, rtol=1e-3, atol=1e-3, msg=name)


# --- prompts ---------------------------------------------------------------------------------------------------------


def visible(text: str) -> bool:
    return any(unicodedata.category(c)[0] != "Z" and unicodedata.category(c) not in ("Cc", "Cf") for c in text)


class TestPrompts:
    @given(st.lists(st.text(max_size=6), max_size=6))
    @example(["\u200b"])
    @example(["a", " \t"])
    def test_a_list_is_read_as_it_is_or_refused(self, prompts):
        if prompts and all(visible(prompt) for prompt in prompts):
            assert read_prompts(prompts) == prompts
            assert list(read_prompts(Dataset.from_dict({"prompt": prompts}))) == prompts
        else:
            bad = next((i for i, prompt in enumerate(prompts) if not visible(prompt)), None)
            message = "has no prompts" if bad is None else f"empty prompt at position {bad}"
            with pytest.raises(ValueError, match=message):
                read_prompts(prompts)
            if prompts:
                with pytest.raises(ValueError, match=message):
                    read_prompts(Dataset.from_dict({"prompt": prompts}))

    @given(st.lists(st.one_of(st.text(min_size=1), st.none(), st.integers(), st.binary(), st.floats()), min_size=1))
    def test_what_is_no_string_is_named(self, prompts):
        assume(any(not isinstance(prompt, str) for prompt in prompts))
        bad = next(i for i, p in enumerate(prompts) if not isinstance(p, str) or not visible(p))
        with pytest.raises(ValueError, match=rf"(item|position) {bad}\b"):
            read_prompts(prompts)

    @given(st.text(st.characters(categories=["Cs", "L"]), min_size=1, max_size=5))
    def test_half_a_surrogate_pair_is_refused(self, prompt):
        if any(unicodedata.category(c) == "Cs" for c in prompt):
            with pytest.raises(ValueError, match="not valid Unicode"):
                read_prompts([prompt])
        else:
            assert read_prompts([prompt]) == [prompt]

    @given(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=8), st.data())
    @settings(max_examples=30)
    def test_a_column_is_a_sequence_as_a_list_is(self, prompts, data):
        column = PromptColumn(Dataset.from_dict({"other": [0] * len(prompts), "caption": prompts}), "caption")
        assert len(column) == len(prompts) and list(column) == prompts
        index = data.draw(st.integers(-len(prompts), len(prompts) - 1))
        assert column[index] == prompts[index]
        start, stop = data.draw(st.integers(0, 8)), data.draw(st.integers(0, 8))
        assert list(column[start:stop]) == prompts[start:stop]
        assert (prompts[0] in column) and column.index(prompts[-1]) == prompts.index(prompts[-1])


# --- preference data -------------------------------------------------------------------------------------------------

MODES = [
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = png(Image.new("RGB", (4, 4), "red"))
NAMES = ["caption", "prompt", "jpg_0", "jpg_1", "label_0", "label_1", "chosen", "rejected", "has_label", "url"]


class TestImages:
    @given(st.sampled_from(MODES), st.integers(1, 40), st.integers(1, 40), st.integers(1, 24))
    @example("RGB", 3000, 1, 24)
    @example("L", 1, 3000, 7)
    def test_any_mode_and_size_becomes_a_square_in_range(self, mode, width, height, resolution):
        image = read_image(Image.new(mode, (width, height)))
        assert (image.mode, image.size) == ("RGB", (width, height))
        tensor = image_to_tensor(image, resolution)
        assert tensor.shape == (3, resolution, resolution) and tensor.dtype == torch.float32
        assert tensor.min() >= -1 and tensor.max() <= 1

    @given(st.integers(1, 30), st.integers(1, 30), st.tuples(*[st.integers(0, 255)] * 3), st.integers(1, 20))
    def test_one_colour_stays_that_colour(self, width, height, colour, resolution):
        tensor = image_to_tensor(read_image(png(Image.new("RGB", (width, height), colour))), resolution)
        expected = torch.tensor(colour).view(3, 1, 1) / 127.5 - 1
        torch.testing.assert_close(tensor, expected.expand_as(tensor).float())

    @given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
    @example(np.arange(27, dtype=np.uint8).reshape(9, 1, 3))  # longer than what is resized, by an odd number
    def test_a_lossless_file_gives_the_same_pixels(self, pixels):
        image = Image.fromarray(pixels)
        for given_as in (image, png(image), {"bytes": png(image), "path": None}):
            assert np.array_equal(np.asarray(read_image(given_as)), pixels)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = torch.from_numpy(pixels[top : top + side, left : left + side].astype(np.float32))
        torch.testing.assert_close(image_to_tensor(image, side), square.permute(2, 0, 1) / 127.5 - 1)

    @given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9))))
    def test_more_bits_per_pixel_give_the_same_image(self, pixels):
        expected = np.asarray(Image.fromarray(pixels).convert("RGB"))
        sixteen = Image.fromarray(pixels.astype(np.uint16) * 257)
        for image in (sixteen, png(sixteen), Image.fromarray(pixels.astype(np.int32))):
            assert np.array_equal(np.asarray(read_image(image)), expected)

    @given(st.binary(max_size=80))
    @example(PICTURE[:-20])
    @example(PICTURE[:40])
    def test_other_bytes_raise_one_kind_of_error(self, content):
        try:
            image = read_image(content)
        except OSError:
            return
        assert image.mode == "RGB"

    @given(st.integers(8, len(PICTURE) - 1), st.integers(0, 255))
    def test_a_flipped_byte_is_an_image_or_an_oserror(self, position, value):
        content = PICTURE[:position] + bytes([value]) + PICTURE[position + 1 :]
        try:
            assert read_image(content).mode == "RGB"
        except OSError:
            pass


@st.composite
def preference_rows(draw):
    """Rows of Pick-a-Pic with what became of each: kept, without a label, or with a broken image."""
    kinds = draw(
        st.lists(st.sampled_from(["good", "tie", "unlabelled", "marked", "none", "broken"]), min_size=1, max_size=8)
    )
    rows = []
    for number, kind in enumerate(kinds):
        examples = draw(st.one_of(st.none(), st.integers(1, 9)))
        row = {"caption": f"prompt {number}", "jpg_0": PICTURE, "jpg_1": PICTURE, "label_0": 1.0, "label_1": 0.0}
        row |= {"has_label": True, "num_example_per_prompt": examples}
        row |= {
            "tie": {"label_0": 0.5, "label_1": 0.5},
            "unlabelled": {"label_0": 0.0, "label_1": 0.0},
            "marked": {"has_label": False},
            "none": {"label_0": None},
            "broken": {draw(st.sampled_from(["jpg_0", "jpg_1"])): PICTURE[:30]},
        }.get(kind, {})
        rows.append(row)
    return kinds, rows


class TestPreferenceData:
    @given(st.sets(st.sampled_from(NAMES)), st.sampled_from([None, "caption", "prompt", "url"]))
    def test_columns_are_recognised_or_refused(self, names, prompt_column):
        pickapic, trl = {"jpg_0", "jpg_1", "label_0", "label_1"} <= names, {"chosen", "rejected"} <= names
        wanted = ["caption", "prompt"] if prompt_column is None else [prompt_column]
        prompts = [name for name in wanted if name in names]
        if (pickapic or trl) and prompts:
            expected = ("jpg_0", "jpg_1") if pickapic else ("chosen", "rejected")
            found = find_preference_columns(sorted(names), prompt_column)
            assert (found.prompt, found.image_0, found.image_1, found.labelled) == (prompts[0], *expected, pickapic)
        else:
            with pytest.raises(ValueError, match="needs the columns|has no prompt column"):
                find_preference_columns(sorted(names), prompt_column)

    @given(preference_rows(), st.sampled_from(["list", "dataset", "stream"]))
    @settings(max_examples=40)
    def test_filters_never_lose_a_good_row(self, table, container):
        kinds, rows = table
        labelled = [row["caption"] for kind, row in zip(kinds, rows, strict=True) if kind in ("good", "tie", "broken")]
        assert [row["caption"] for row in rows if is_labelled(row)] == labelled
        dataset = rows if container == "list" else Dataset.from_list(rows)
        dataset = dataset.to_iterable_dataset() if container == "stream" else dataset
        if not labelled:
            with pytest.raises(ValueError, match="No row of the preference dataset has a label"):
                prepare_preference_dataset(dataset)
            return
        assert [row["caption"] for row in prepare_preference_dataset(dataset)] == labelled

    @given(preference_rows())
    def test_a_batch_has_every_good_row_with_its_weight(self, table):
        kinds, rows = table
        collator = StepPreferenceCollator(resolution=4, max_bad_image_fraction=1.0)
        batch = collator(rows)
        kept = [row for kind, row in zip(kinds, rows, strict=True) if kind in ("good", "tie")]
        assert collator.num_bad == kinds.count("broken")
        assert collator.num_unlabelled == sum(kinds.count(kind) for kind in ("unlabelled", "marked", "none"))
        assert collator.num_seen + collator.num_unlabelled == len(rows)
        if not kept:
            assert (batch["prompts"], batch["weights"].tolist()) == ([""], [0.0])
            return
        assert batch["prompts"] == [row["caption"] for row in kept]
        weights = [1 / (row["num_example_per_prompt"] or 1) for row in kept]
        torch.testing.assert_close(batch["weights"], torch.tensor(weights))
        torch.testing.assert_close(batch["label_0"], torch.tensor([row["label_0"] for row in kept]))
        assert torch.equal(batch["label_0"] + batch["label_1"], torch.ones(len(kept)))
        assert batch["images_0"].shape == batch["images_1"].shape == (len(kept), 3, 4, 4)

    @given(st.lists(st.sampled_from("abc"), min_size=1, max_size=10), st.integers(1, 4))
    @settings(max_examples=30)
    def test_a_limit_keeps_the_first_of_each_prompt(self, prompts, limit):
        rows = [{"prompt": prompt, "chosen": PICTURE, "rejected": PICTURE, "n": i} for i, prompt in enumerate(prompts)]
        kept = prepare_preference_dataset(rows, max_pairs_per_prompt=limit)
        expected = [i for i, prompt in enumerate(prompts) if prompts[:i].count(prompt) < limit]
        assert [row["n"] for row in kept] == expected

    @given(st.floats(), st.floats())
    @example(0.5, 0.5)
    @example(1.0, 0.0)
    def test_labels_are_probabilities_or_refused(self, label_0, label_1):
        row = {"caption": "a", "jpg_0": PICTURE, "jpg_1": PICTURE, "label_0": label_0, "label_1": label_1}
        good = label_0 >= 0 and label_1 >= 0 and abs(label_0 + label_1 - 1) < 1e-6
        for read in (StepPreferenceCollator(resolution=4), lambda rows: prepare_preference_dataset(list(rows))):
            if good or not is_labelled(row):
                continue
            with pytest.raises(ValueError, match="probabilities that sum to 1"):
                read([row])
        if good:
            batch = StepPreferenceCollator(resolution=4)([row])
            torch.testing.assert_close(batch["label_0"], torch.tensor([label_0]))


class TestTimestepBins:
    @pytest.fixture(scope="class")
    def trainer(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("trainer")
        config = tiny_step_reward_config(folder / "run")
        model = StepAwareRewardModel.from_clip(str(tiny_clip(folder)))
        rows = [{"prompt": "a", "chosen": PICTURE, "rejected": PICTURE}]
        return StepRewardTrainer(config, tiny_sd_pipeline(folder), model, train_dataset=rows)

    @given(st.integers(1, 60))
    @settings(max_examples=30)
    def test_every_timestep_is_in_one_bin(self, trainer, count):
        trainer.args.accuracy_timestep_bins = count
        trainer._prepare_metrics()
        bins = list(trainer._bins.values())
        assert len(bins) == count and bins[0][0] == 0 and bins[-1][1] == trainer.pipeline.num_train_timesteps
        assert all(left[1] == right[0] and left[0] < left[1] for left, right in pairwise(bins))
        widths = [high - low for low, high in bins]
        assert max(widths) - min(widths) <= 1


# --- statistics ------------------------------------------------------------------------------------------------------


@st.composite
def scored_prompts(draw):
    prompts = draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=12))
    values = hnp.arrays(np.float64, len(prompts), elements=st.one_of(eighths, st.floats(-100, 100)))
    return prompts, torch.from_numpy(draw(values)), torch.from_numpy(draw(values))


def numpy_means(values, prompts):
    names = np.array(prompts)
    return np.array([np.mean(np.asarray(values)[names == name]) for name in dict.fromkeys(prompts)])


class TestStatistics:
    @given(scored_prompts())
    def test_against_numpy(self, table):
        prompts, scores, base = table
        found = paired_statistics(scores, prompts, base)
        means, base_means = numpy_means(scores, prompts), numpy_means(base, prompts)
        difference = numpy_means(scores - base, prompts)
        wins = numpy_means((scores > base).double() + 0.5 * (scores == base).double(), prompts)
        expected = {"mean": means.mean(), "base_mean": base_means.mean(), "difference": difference.mean()}
        expected |= {"win_rate": wins.mean(), "num_images": len(prompts), "num_prompts": len(means)}
        if len(means) > 1:
            root = math.sqrt(len(means))
            expected |= {"se": means.std(ddof=1) / root, "base_se": base_means.std(ddof=1) / root}
            expected |= {"difference_se": difference.std(ddof=1) / root}
            centre = (found["difference_low"] + found["difference_high"]) / 2
            assert centre == pytest.approx(difference.mean(), rel=1e-6, abs=1e-9)
        else:
            assert math.isnan(found["se"]) and math.isnan(found["difference_low"])
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name
        assert 0 <= found["win_rate_low"] <= found["win_rate"] <= found["win_rate_high"] <= 1
        assert list(prompt_means(scores, prompts).numpy()) == pytest.approx(list(means), rel=1e-9, abs=1e-9)

    @given(scored_prompts(), st.randoms(use_true_random=False))
    def test_the_order_of_images_does_not_matter(self, table, random):
        prompts, scores, base = table
        order = list(range(len(prompts)))
        random.shuffle(order)
        found = paired_statistics(scores[order], [prompts[i] for i in order], base[order])
        for name, value in paired_statistics(scores, prompts, base).items():
            assert found[name] == pytest.approx(value, rel=1e-7, abs=1e-7, nan_ok=True), name

    @given(columns(2, eighths))
    def test_wins_of_both_sides_add_up(self, scores):
        after, before = scores
        prompts = [str(i) for i in range(len(after))]
        found, mirrored = paired_statistics(after, prompts, before), paired_statistics(before, prompts, after)
        assert found["win_rate"] + mirrored["win_rate"] == pytest.approx(1)
        assert found["difference"] == pytest.approx(found["mean"] - found["base_mean"], abs=1e-9)
        assert found["difference"] == pytest.approx(-mirrored["difference"], abs=1e-9)
        assert found["difference_low"] == pytest.approx(-mirrored["difference_high"], abs=1e-9, nan_ok=True)

    @given(columns(1), st.floats(0.5, 0.99), st.floats(0.5, 0.99))
    def test_more_confidence_is_a_wider_interval(self, values, one, other):
        assume(len(values[0]) > 1)
        narrow, wide = (mean_interval(values[0], confidence) for confidence in sorted([one, other]))
        reach = student_t.ppf((1 + max(one, other)) / 2, len(values[0]) - 1)  # the mean took one degree of freedom
        assert wide[1] - wide[0] == pytest.approx(2 * reach * mean_and_se(values[0])["se"], abs=1e-9)
        assert wide[0] <= narrow[0] <= mean_and_se(values[0])["mean"] + 1e-9
        assert mean_and_se(values[0])["mean"] - 1e-9 <= narrow[1] <= wide[1]

    @given(st.integers(1, 500), st.floats(0, 1), st.floats(0.5, 0.99))
    def test_wilsons_interval(self, count, share, confidence):
        low, high = wilson_interval(share, count, confidence)
        assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
        mirrored = wilson_interval(1 - share, count, confidence)
        assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)
        assert (
            high - low
            >= wilson_interval(share, 4 * count, confidence)[1] - wilson_interval(share, 4 * count, confidence)[0]
        )


# --- LoRA files ------------------------------------------------------------------------------------------------------

UNET = sdxl_unet()
LAYERS = {
    name: module.weight.shape
    for name, module in UNET.named_modules()
    if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
}


class TestExport:
    @pytest.mark.skipif(version.parse(diffusers.__version__) < version.parse("0.42"), reason="reads attention only")
    @given(st.dictionaries(st.sampled_from(sorted(LAYERS)), st.integers(1, 3), min_size=1, max_size=12), seeds)
    @settings(max_examples=15)
    def test_diffusers_reads_kohyas_names_back_into_the_same_layers(self, tmp_path, ranks, seed):
        """Any layers of the SDXL UNet, to the original UNet's names and, by diffusers' own reader, back."""
        source, tensors = generator(seed), {}
        for layer, rank in ranks.items():
            outputs, inputs, *kernel = LAYERS[layer]
            tensors[f"unet.{layer}.lora_A.weight"] = torch.randn(rank, inputs, *kernel, generator=source)
            tensors[f"unet.{layer}.lora_B.weight"] = torch.randn(outputs, rank, *[1] * len(kernel), generator=source)
        save_file(tensors, tmp_path / "lora.safetensors")
        layers, _ = read_lora(tmp_path / "lora.safetensors")
        assert set(layers) == set(ranks)
        file = export_kohya(tmp_path / "lora.safetensors", tmp_path / "kohya.safetensors", base="sdxl")
        exported = load_file(file)
        assert len(exported) == 3 * len(ranks)  # no two layers share a name
        found, alphas = StableDiffusionXLPipeline.lora_state_dict(str(file), unet_config=UNET.config)[:2]
        (alpha,) = set(alphas.values())  # what else a layer needs is in its weights
        found = convert_unet_state_dict_to_peft({key.removeprefix("unet."): value for key, value in found.items()})
        assert {key.split(".lora_")[0] for key in found} == set(ranks)
        for layer, rank in ranks.items():
            down, up = (found[f"{layer}.lora_{part}.weight"].flatten(1) for part in "AB")
            old_down, old_up = (tensors[f"unet.{layer}.lora_{part}.weight"].flatten(1) for part in "AB")
            torch.testing.assert_close(alpha / rank * up @ down, old_up @ old_down, rtol=1e-4, atol=1e-5)
