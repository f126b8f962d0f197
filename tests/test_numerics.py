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
Necessity: one NaN in half precision reaches every weight within a step, and nobody sees it before the samples are grey.
Each test puts a NaN or an infinity into one place of a real run and asks who noticed, what it was called, and whether
everything else stayed what it would have been.
"""

import math
import re

import pytest
import torch
from PIL import Image
from transformers import TrainerCallback

from trl_spo import (
    SPOTrainer,
    StepAwareRewardModel,
    StepRewardTrainer,
    stepwise_rollout,
    wrap_pipeline,
)
from trl_spo.training.numerics import MAX_SKIPPED_STEPS, NonFiniteGuard, is_finite

from .testing_utils import (
    PROMPTS,
    brightness_reward,
    ddim_scheduler,
    state_of,
    tiny_clip,
    tiny_sd_pipeline,
    tiny_spo_config,
    tiny_step_reward_config,
)


NAN, INF = float("nan"), float("inf")
ROLLOUT = {"num_inference_steps": 5, "branch_start_step": 2, "guidance_scale": 3.0, "preference_threshold": 0.0}
SETTINGS = {**ROLLOUT, "max_steps": 3}


def make_trainer(tmp_path, reward=brightness_reward, pipeline=None, callbacks=None, **settings):
    config = tiny_spo_config(tmp_path / "out", **{**SETTINGS, **settings})
    pipeline = pipeline or tiny_sd_pipeline(tmp_path)
    return SPOTrainer(config, pipeline, reward, train_dataset=PROMPTS, callbacks=callbacks)


def logs_of(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


def break_unet(pipeline, row, at_timestep, value=NAN):
    """The denoiser's output for one row of the batch (of the conditional half) breaks at one timestep."""

    def hook(module, args, kwargs, output):
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        if (torch.as_tensor(timestep) == at_timestep).all():
            sample = output[0].clone()
            sample[len(sample) // 2 + row] = value
            return (sample,)
        return output

    return pipeline.unet.register_forward_hook(hook, with_kwargs=True)


class TestRollout:
    @pytest.fixture
    def pipeline(self, tmp_path):
        return wrap_pipeline(tiny_sd_pipeline(tmp_path))

    def rollout(self, pipeline, reward=brightness_reward, **settings):
        generator = torch.Generator().manual_seed(0)
        return stepwise_rollout(pipeline, PROMPTS[:3], reward, generator=generator, **{**ROLLOUT, **settings})

    @pytest.mark.parametrize("defer_scoring", [False, True])
    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    def test_a_score_costs_its_pair_and_no_other(self, pipeline, value, defer_scoring):
        def broken(images, prompts, timesteps):
            scores = brightness_reward(images, prompts, timesteps)
            bad = [prompt == PROMPTS[1] and int(t) == 201 for prompt, t in zip(prompts, timesteps, strict=True)]
            scores[torch.tensor(bad).nonzero().flatten()[:1]] = value  # one of the candidates is enough
            return scores

        settings = {"defer_scoring": defer_scoring}
        good = self.rollout(pipeline, **settings)
        pairs = self.rollout(pipeline, broken, on_nonfinite="skip", **settings)
        lost = {(n.what, n.step, n.prompt) for n in pairs.nonfinite}
        assert lost == {("score", 2, PROMPTS[1])}
        assert pairs.nonfinite[0].timestep == pairs.branches[0].scored_timestep == 201
        kept = torch.tensor([prompt != PROMPTS[1] or t != good.branches[0].timestep
                             for prompt, t in zip(good.prompts, good.timesteps.tolist(), strict=True)])  # fmt: skip
        assert len(good) == 9 and len(pairs) == 8
        for name, tensor in good[kept].tensors().items():
            assert torch.equal(tensor, getattr(pairs, name)), name

    @pytest.mark.parametrize("step, plain", [(0, True), (1, True), (2, False), (3, False)])
    def test_latents_are_named_where_they_break(self, pipeline, step, plain):
        """
        A prediction that breaks at step s breaks the latents after it: those of the plain steps 0 and 1 before any
        branch, those of steps 2 and 3 in a branch. Everything of that prompt is lost from then on.
        """
        timestep = pipeline.set_timesteps(5)[step]
        handle = break_unet(pipeline, 1, timestep)  # row 1: the second prompt, and of K x 3 rows the first candidate
        try:
            pairs = self.rollout(pipeline, on_nonfinite="skip", resample="random")
        finally:
            handle.remove()
        assert {n.prompt for n in pairs.nonfinite} == {PROMPTS[1]}
        assert set(pairs.prompts) >= {PROMPTS[0], PROMPTS[2]}
        first = pairs.nonfinite[0]
        if step <= 2:  # in a batch of three rows: the prediction of x_t itself
            assert (first.what, first.step, first.timestep) == ("latents", step, timestep)
            assert len(pairs.nonfinite) == 3 and PROMPTS[1] not in pairs.prompts
        else:  # the prediction of the first candidate after the branch at step 2
            assert (first.what, first.step, first.timestep) == ("x_0 prediction", 2, timestep)
        for tensor in pairs.tensors().values():
            assert is_finite(tensor.float()[:, None]).all()

    def test_a_decoder_that_overflows(self, pipeline):
        calls = []

        def hook(module, args, output):
            calls.append(1)
            output = output.clone()
            output[0, 0, 0, 0] = NAN
            return output

        handle = pipeline.vae.decoder.register_forward_hook(hook)
        with pytest.raises(ValueError, match="Not finite: decoded image at step 2"):
            self.rollout(pipeline)
        handle.remove()
        assert calls

    def test_the_reward_never_sees_a_nan(self, pipeline):
        seen = []

        def reward(images, prompts, timesteps):
            seen.append(bool(images.isfinite().all()))
            return brightness_reward(images, prompts, timesteps)

        handle = break_unet(pipeline, 0, pipeline.set_timesteps(5)[0])
        pairs = self.rollout(pipeline, reward, on_nonfinite="skip")
        handle.remove()
        assert seen and all(seen) and PROMPTS[0] not in pairs.prompts and len(pairs) == 6

    def test_two_rows_of_the_same_prompt_are_two(self, pipeline):
        handle = break_unet(pipeline, 1, pipeline.set_timesteps(5)[1])
        pairs = stepwise_rollout(pipeline, [PROMPTS[0]] * 2, brightness_reward, on_nonfinite="skip", **ROLLOUT)
        handle.remove()
        assert len(pairs.nonfinite) == 3 and len(pairs) == 3 and set(pairs.prompt_index.tolist()) == {0}

    def test_random_pairs_leave_the_pool_out(self, pipeline):
        def first_is_nan(images, prompts, timesteps):
            scores = brightness_reward(images, prompts, timesteps)
            scores[0] = NAN  # first candidate of the first prompt
            return scores

        pairs = self.rollout(pipeline, first_is_nan, pair="random", on_nonfinite="skip")
        assert len(pairs.nonfinite) == 3 and len(pairs) == 6 and PROMPTS[0] not in pairs.prompts

    def test_a_finished_image_without_a_score_is_named(self, tmp_path):
        """Its last step is deterministic, so no pair hangs on that score; the mean that is logged does."""
        pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path, scheduler=ddim_scheduler(set_alpha_to_one=True)))

        def broken(images, prompts, timesteps):
            scores = brightness_reward(images, prompts, timesteps)
            bad = [prompt == PROMPTS[1] and int(t) == 0 for prompt, t in zip(prompts, timesteps, strict=True)]
            return torch.where(torch.tensor(bad), NAN, scores)

        good = self.rollout(pipeline)
        pairs = self.rollout(pipeline, broken, on_nonfinite="skip")
        assert [(n.what, n.step, n.timestep, n.prompt) for n in pairs.nonfinite] == [("score", 4, 0, PROMPTS[1])]
        assert pairs.final_scores.isnan().tolist() == [False, True, False]
        assert all(torch.equal(a, b) for a, b in zip(good.tensors().values(), pairs.tensors().values(), strict=True))
        with pytest.raises(ValueError, match="Not finite: score at step 4"):
            self.rollout(pipeline, broken)

    def test_deterministic_steps_only(self, tmp_path):
        pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path, scheduler=ddim_scheduler(set_alpha_to_one=True)))
        with pytest.raises(ValueError, match="Steps 4 to 4 of the scheduler are deterministic"):
            self.rollout(pipeline, branch_start_step=4)

    @pytest.mark.parametrize(
        "returned, error, match",
        [
            (lambda n: ["high"] * n, TypeError, "a list of 8 numbers.*got `list`"),
            (lambda n: None, TypeError, "got `NoneType`"),
            (lambda n: torch.zeros(n, dtype=torch.complex64), TypeError, "real numbers, got dtype torch.complex64"),
            (lambda n: torch.zeros(()), ValueError, r"shape \(8,\), got \(\)"),
        ],
    )
    def test_what_is_no_score(self, pipeline, returned, error, match):
        with pytest.raises(error, match=match):
            stepwise_rollout(pipeline, PROMPTS[:2], lambda i, p, t: returned(len(i)), **ROLLOUT)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.float64])
    def test_any_real_dtype_is_a_score(self, pipeline, dtype):
        """Whole numbers, so that every dtype holds them."""

        def reward(images, prompts, timesteps):
            return brightness_reward(images, prompts, timesteps).round().to(dtype)

        pairs = self.rollout(pipeline, reward)
        expected = self.rollout(pipeline, lambda *a: brightness_reward(*a).round())
        assert pairs.chosen_scores.dtype == torch.float32
        assert torch.equal(pairs.chosen_prev_latents, expected.chosen_prev_latents)


class TestHalfPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_all_timesteps_at_four_candidates(self, tmp_path, dtype):
        """Every step of the schedule branches, the first at t = 951 of 1000 and the last at 1, and trains."""
        pipeline = tiny_sd_pipeline(tmp_path).to(dtype=dtype)
        trainer = make_trainer(
            tmp_path, pipeline=pipeline, num_inference_steps=20, branch_start_step=0, max_steps=-1, num_train_epochs=1,
            max_nonfinite_fraction=0.0, guidance_scale=5.0,
        )  # fmt: skip
        trainer.train()
        seen = logs_of(trainer)
        assert trainer.pair_loader.num_pairs_seen >= 0.9 * 20 * len(PROMPTS)
        assert trainer.guard.num_seen >= 20 * len(PROMPTS) and trainer.guard.num_nonfinite == 0
        assert all(math.isfinite(v) for log in seen for v in log.values())
        assert all(log["pairs/nonfinite"] == log["skipped_steps"] == 0 for log in seen)
        assert all(p.isfinite().all() for p in trainer.model.parameters())


class TestTraining:
    def test_a_nan_now_and_then_is_counted_and_survived(self, tmp_path):
        calls = []

        def reward(images, prompts, timesteps):
            scores = brightness_reward(images, prompts, timesteps)
            calls.append(1)
            if len(calls) == 1:
                scores[0] = NAN  # one candidate, in the first call
            return scores

        trainer = make_trainer(tmp_path, reward, reward_batch_size=4)
        trainer.train()
        logs = logs_of(trainer)
        assert sum(log["pairs/nonfinite"] for log in logs) == 1 and trainer.guard.num_nonfinite == 1
        assert all(math.isfinite(value) for log in logs for value in log.values())
        assert all(p.isfinite().all() for p in trainer.model.parameters())

    def test_nothing_but_nan_stops_at_once(self, tmp_path):
        trainer = make_trainer(tmp_path, lambda images, prompts, timesteps: torch.full((len(images),), NAN))
        with pytest.raises(ValueError, match=r"no finite score: score at step 2, timestep \d+, prompt 'a .*float16"):
            trainer.train()

    def test_too_many_stop(self, tmp_path):
        """Three branches of one prompt in six are lost in each epoch; with the share 0.005, 5 of the first 1,000 may be."""
        bad = PROMPTS[0]

        def reward(images, prompts, timesteps):
            return brightness_reward(images, prompts, timesteps) * torch.tensor(
                [NAN if p == bad else 1 for p in prompts]
            )

        trainer = make_trainer(tmp_path, reward, max_steps=100, max_nonfinite_fraction=0.005)
        with pytest.raises(ValueError, match=r"6 of \d+ pairs were not finite.*max_nonfinite_fraction=0.005"):
            trainer.train()

    def test_a_step_with_broken_gradients_changes_nothing(self, tmp_path):
        """Neither weights nor moments; the next step goes on as if it had not been."""

        class Break(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                if state.global_step == 1:
                    self.before = state_of(model)
                    self.moments = [v["exp_avg"].clone() for v in kwargs["optimizer"].state.values()]
                    next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[3] = INF

            def on_step_end(self, args, state, control, model=None, **kwargs):
                if state.global_step == 2:
                    self.after = state_of(model)
                    self.moments_after = [v["exp_avg"].clone() for v in kwargs["optimizer"].state.values()]

        class Trainer(SPOTrainer):  # ours must look after the one that breaks it
            def add_callback(self, callback):
                super().add_callback(callback)
                self.callback_handler.callbacks.sort(key=lambda c: type(c).__name__ == "SkipNonFiniteSteps")

        callback = Break()
        config = tiny_spo_config(tmp_path / "out", **SETTINGS)
        trainer = Trainer(config, tiny_sd_pipeline(tmp_path), brightness_reward, PROMPTS, callbacks=[callback])
        trainer.train()
        assert callback.before.keys() == callback.after.keys() and callback.moments
        assert all(torch.equal(callback.before[name], callback.after[name]) for name in callback.before)
        assert all(torch.equal(a, b) for a, b in zip(callback.moments, callback.moments_after, strict=True))
        assert [log["skipped_steps"] for log in logs_of(trainer)] == [0, 1, 0]
        assert any(not torch.equal(callback.after[k], v) for k, v in state_of(trainer.model).items())

    def test_pairs_that_break_in_the_loss_are_named(self, tmp_path, caplog):
        trainer = make_trainer(tmp_path, max_steps=2)

        class BreakOnce(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 0:  # its pairs were rolled out before
                    self.handle = trainer.pipeline.unet.register_forward_hook(self.hook)

            def on_step_end(self, args, state, control, **kwargs):
                self.handle.remove()

            def hook(self, module, args, output):
                sample = output[0].clone()
                sample[1] = NAN
                return (sample,)

        trainer.add_callback(BreakOnce())
        trainer.train()
        first, second = logs_of(trainer)
        assert first["skipped_steps"] == 1 and first["pairs/nonfinite"] == 1 and second["skipped_steps"] == 0
        assert math.isfinite(first["kl"]) and re.search(
            r"Left out 1 of 4 pairs, not finite: log-probabilities at timestep \d+, prompt 'a", caplog.text
        )
        assert all(p.isfinite().all() for p in trainer.model.parameters())

    def test_steps_that_are_all_skipped_stop(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=MAX_SKIPPED_STEPS + 5, per_device_train_batch_size=1)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda grad: grad * NAN)
        before = state_of(trainer.model)
        with pytest.raises(
            ValueError, match=f"{MAX_SKIPPED_STEPS} optimizer steps in a row, up to step {MAX_SKIPPED_STEPS}"
        ):
            trainer.train()
        assert all(torch.equal(v, before[k]) for k, v in state_of(trainer.model).items())

    def test_constant_scores_say_so(self, tmp_path):
        trainer = make_trainer(tmp_path, lambda images, prompts, timesteps: torch.zeros(len(images)))
        with pytest.raises(RuntimeError, match="No valid pair in .*got the same score.*Check what it returns"):
            trainer.train()
        assert trainer.pair_loader.num_prompts_seen <= 102

    def test_a_threshold_nothing_passes_says_what_would(self, tmp_path):
        """The largest gap that was seen belongs to the message: tanh(gap / 2) is what the threshold is compared with."""
        trainer = make_trainer(
            tmp_path, lambda images, *_: torch.linspace(-1, 1, len(images)).sign() * 0.01, preference_threshold=0.5
        )
        with pytest.raises(RuntimeError) as error:
            trainer.train()
        assert "largest difference of two scores was 0.02, p_chosen - p_rejected = 0.01" in str(error.value)

    def test_the_first_round_without_a_pair_warns(self, tmp_path, monkeypatch):
        warnings = []
        monkeypatch.setattr("trl_spo.pair_loader.logger.warning", lambda text, *a: warnings.append(text))
        calls = []

        def reward(images, prompts, timesteps):
            calls.append(1)
            return brightness_reward(images, prompts, timesteps) * (len(calls) > 1)

        make_trainer(tmp_path, reward, max_steps=1, reward_batch_size=100).train()
        assert any("The first 3 prompts gave no valid pair. All candidates" in text for text in warnings)

    def test_evaluation_leaves_out_what_is_not_finite(self, tmp_path, monkeypatch):
        warnings = []
        monkeypatch.setattr("trl_spo.spo_trainer.logger.warning", lambda text, *a: warnings.append(text))

        def metric(images, prompts):
            return torch.tensor([NAN if prompt == PROMPTS[2] else float(i) for i, prompt in enumerate(prompts)])

        config = tiny_spo_config(tmp_path / "out", **SETTINGS)
        trainer = SPOTrainer(
            config,
            tiny_sd_pipeline(tmp_path),
            brightness_reward,
            PROMPTS,
            eval_dataset=PROMPTS[:4],
            metrics={"m": metric},
        )
        assert trainer.evaluate()["eval_m_mean"] == pytest.approx((0 + 1 + 3) / 3)
        assert [text for text in warnings if "1 of 4 images have no finite `m`" in text and PROMPTS[2] in text]


class TestGuard:
    def test_the_first_thousand_are_judged_together(self):
        guard = NonFiniteGuard(0.01)
        guard.record(20, ["x"] * 10)  # half of what was seen, but not more than 10 of 1,000
        with pytest.raises(ValueError, match="11 of 21 pairs"):
            guard.record(1, ["x"])
        guard = NonFiniteGuard(0.01)
        guard.record(10_000, ["x"] * 100)
        with pytest.raises(ValueError, match="101 of 10001"):
            guard.record(1, ["x"])

    def test_a_step_is_looked_at_once(self):
        """Two micro-batches, the second with a bad row; its gradients are fine."""
        guard = NonFiniteGuard(1.0)
        parameter = torch.nn.Parameter(torch.ones(2))
        parameter.grad = torch.tensor([1.0, 1e30])  # large is not infinite, though its square is in float32
        guard.watch("scores", torch.tensor([True, True]), torch.tensor([5, 6]), ["a", "b"])
        guard.watch("scores", torch.tensor([True, False]), torch.tensor([7, 8]), ["c", "d"])
        guard.watch("losses", torch.tensor([True, True]), torch.tensor([7, 8]), ["c", "d"], again=True)
        assert guard.check_step(1, [parameter]) == (1, True)
        assert (guard.num_seen, guard.num_nonfinite, guard.num_skipped_steps) == (4, 1, 0)
        assert guard.check_step(2, [parameter]) == (0, True)  # what was watched is forgotten

    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    def test_gradients(self, value):
        guard = NonFiniteGuard(1.0)
        good, bad = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
        good.grad, bad.grad = torch.ones(2), torch.tensor([1.0, value], dtype=torch.float16)
        assert guard.check_step(1, [good]) == (0, True)
        assert guard.check_step(2, [good, bad]) == (0, False)
        assert guard.num_skipped_in_a_row == 1
        assert guard.check_step(3, [good]) == (0, True) and guard.num_skipped_in_a_row == 0
        assert guard.num_skipped_steps == 1

    def test_shards_of_gradients(self):
        """All processes skip together: one whose shard is fine, one that has none, and one with an empty one."""
        good, empty = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(0))
        good.grad, empty.grad = torch.ones(2), torch.ones(0)
        for parameters in ([good], [torch.nn.Parameter(torch.ones(2))], [empty], [good, empty]):
            guard, seen = NonFiniteGuard(1.0), []

            def elsewhere(here, seen=seen):
                seen.append(here.item())
                return here + 1

            assert guard.check_step(1, parameters, elsewhere) == (0, False)
            assert guard.check_step(2, parameters, lambda here: here) == (0, True)
            assert seen == [0.0] and guard.num_skipped_steps == 1
        good.grad[0] = NAN
        assert NonFiniteGuard(1.0).check_step(1, [good, empty], lambda here: here) == (0, False)

    def test_rows(self):
        values = torch.tensor([[1.0, 2.0], [NAN, 1.0], [1.0, INF], [0.0, 0.0]])
        assert is_finite(values).tolist() == [True, False, False, True]
        assert is_finite(values[:, :, None, None]).tolist() == [True, False, False, True]


class TestStepReward:
    def make_trainer(self, tmp_path, pipeline=None, **settings):
        rows = []
        for i, prompt in enumerate(PROMPTS * 2):
            red, blue = Image.new("RGB", (16, 16), (200 + i, 40, 0)), Image.new("RGB", (16, 16), (0, 40, 200 + i))
            rows.append({"prompt": prompt, "chosen": red, "rejected": blue})
        config = tiny_step_reward_config(tmp_path / "run", **{"max_steps": 3, **settings})
        torch.manual_seed(0)
        reward_model = StepAwareRewardModel.from_clip(tiny_clip(tmp_path))
        pipeline = pipeline or tiny_sd_pipeline(tmp_path)
        return StepRewardTrainer(config, pipeline, reward_model, train_dataset=rows, eval_dataset=rows)

    def test_an_image_that_overflows_costs_its_pair(self, tmp_path):
        """
        The decoder breaks for the first image of the first batch. The gradient is that of the other three pairs, and
        their weights stay what they were: a sum over three, divided by the weight of four.
        """
        gradients = {}
        for case in ("whole", "broken", "weightless"):
            trainer = self.make_trainer(tmp_path, max_steps=1, max_grad_norm=0.0, min_timestep=1)
            calls, compute_loss = [], trainer.compute_loss

            def break_first(module, args, output, calls=calls, case=case):
                calls.append(1)
                if case == "broken" and len(calls) == 1:
                    output = output.clone()
                    output[0, 0, 0, 0] = NAN
                return output

            def without_first(model, inputs, case=case, compute_loss=compute_loss, **kwargs):
                if case == "weightless":
                    inputs = {**inputs, "weights": inputs["weights"] * torch.tensor([0.0, 1.0, 1.0, 1.0])}
                return compute_loss(model, inputs, **kwargs)

            class Record(TrainerCallback):
                def on_pre_optimizer_step(self, args, state, control, model=None, case=case, **kwargs):
                    gradients[case] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

            trainer.pipeline.vae.decoder.register_forward_hook(break_first)
            trainer.compute_loss = without_first
            trainer.add_callback(Record())
            trainer.train()
            log = logs_of(trainer)[0]
            assert log["nonfinite_pairs"] == int(case == "broken") and log["skipped_steps"] == 0
            assert all(math.isfinite(value) for value in log.values())
        assert gradients["broken"].keys() == gradients["weightless"].keys()
        for name, gradient in gradients["broken"].items():
            torch.testing.assert_close(gradient, gradients["weightless"][name], rtol=1e-5, atol=1e-8)
        assert any(not torch.allclose(gradients["whole"][name], g) for name, g in gradients["broken"].items())

    def test_a_decoder_that_always_overflows_stops_with_its_name(self, tmp_path):
        trainer = self.make_trainer(tmp_path, max_steps=200, min_timestep=1)
        trainer.pipeline.vae.decoder.register_forward_hook(lambda module, args, output: output * NAN)
        with pytest.raises(ValueError, match=r"52 of 52.*predicted images at timestep .*VAE"):
            trainer.train()
        assert trainer.guard.num_skipped_steps == 0  # a step without pairs has zeros, nothing broken
        assert all(p.isfinite().all() for p in trainer.model.parameters())

    def test_scores_that_break_skip_the_step(self, tmp_path):
        trainer = self.make_trainer(tmp_path, max_steps=2)
        calls = []

        def hook(module, args, output):
            calls.append(1)
            return output * NAN if len(calls) == 1 else output

        trainer.model.model.visual_projection.register_forward_hook(hook)
        trainer.train()
        first, second = logs_of(trainer)
        assert first["skipped_steps"] == 1 and first["nonfinite_pairs"] == 4
        assert second["skipped_steps"] == 0 and second["nonfinite_pairs"] == 0
        assert all(p.isfinite().all() for p in trainer.model.parameters())

    def test_evaluation_leaves_out_what_is_not_finite(self, tmp_path):
        trainer = self.make_trainer(tmp_path, per_device_eval_batch_size=12, eval_timesteps=[0, 251])
        clean = trainer.evaluate()
        calls = []

        def hook(module, args, output):
            calls.append(1)
            output = output.clone()
            output[0] = NAN
            return output

        trainer.pipeline.vae.decoder.register_forward_hook(hook)
        metrics = trainer.evaluate()
        assert calls and all(math.isfinite(value) for value in metrics.values())
        assert metrics["eval_accuracy/t_0"] == clean["eval_accuracy/t_0"]  # clean images pass no decoder
