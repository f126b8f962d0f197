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
Necessity: the trainer's promises are about what moves, what does not, and what a run repeats. Each test below fails if
one of them is broken; those named "Regression" stand for something the public code or a naive Trainer gets wrong.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import TrlParser

from trl_spo import SPOConfig, SPOTrainer, StepAwareRewardModel, StepRewardTrainer
from trl_spo.sampling import score_images

from .flow_testing import tiny_sd3_pipeline
from .testing_utils import (
    PROMPTS,
    brightness_reward,
    changed,
    ddim_scheduler,
    image_pairs,
    state_of,
    tiny_clip,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
    tiny_spo_config,
    tiny_step_reward_config,
    train_logs,
)


def make_trainer(tmp_path, output="out", pipeline=None, reward=brightness_reward, prompts=PROMPTS, **settings):
    arguments = {k: settings.pop(k) for k in ("eval_dataset", "metrics", "peft_config", "callbacks") if k in settings}
    config = tiny_spo_config(tmp_path / output, **{"num_train_epochs": 2, **settings})
    pipeline = pipeline or tiny_sd_pipeline(tmp_path)
    return SPOTrainer(config, pipeline, reward, train_dataset=prompts, **arguments)


def lora_state(trainer):
    return {k: v.clone() for k, v in trainer.model.state_dict().items() if "lora" in k}


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class TestInvariants:
    def test_first_step_has_ratio_one_and_loss_ln_two(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=2)
        trainer.train()
        first, second = [log for log in trainer.state.log_history if "loss" in log]
        assert first["ratio/chosen"] == first["ratio/rejected"] == 1.0
        assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
        assert first["kl"] == first["approx_kl"] == first["clip_ratio"] == first["rewards/margins"] == 0.0
        assert first["pairs/fresh_accuracy"] == 0.5
        assert second["kl"] > 0 and second["ratio/chosen"] != 1.0

    def test_pairs_that_come_again_are_not_fresh(self, tmp_path):
        """
        A rollout of three prompts gives twelve pairs, which is three steps; then they come again for three steps, whose logs
        have no accuracy of fresh pairs; and the next rollout is that of step seven.
        """
        trainer = make_trainer(tmp_path, max_steps=7, num_iterations=2)
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert ["pairs/fresh_accuracy" in log for log in logs] == [True] * 3 + [False] * 3 + [True]
        assert logs[0]["pairs/fresh_accuracy"] == 0.5
        assert [log["num_prompts_seen"] for log in logs] == [3] * 6 + [6]
        assert all("rewards/accuracies" in log for log in logs)

    @pytest.mark.parametrize("precision", ["float16", "bfloat16"])
    def test_half_precision_weights_start_at_ratio_one_too(self, tmp_path, precision):
        """Regression: policy and reference in different precisions are never equal."""
        pipeline = tiny_sd_pipeline(tmp_path).to(dtype=getattr(torch, precision))
        trainer = make_trainer(tmp_path, pipeline=pipeline, max_steps=1)
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["ratio/chosen"] == log["ratio/rejected"] == 1.0
        assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "adapter",
        [
            {"use_dora": True, "target_modules": ["to_q", "conv1"]},
            {"lora_bias": True, "target_modules": ["to_q", "conv1"]},
            {"use_rslora": True, "target_modules": ["to_q", "conv2"]},
        ],
        ids=lambda adapter: next(iter(adapter)),
    )
    def test_defaults_suit_every_kind_of_lora(self, tmp_path, adapter, dtype):
        """
        Regression: DoRA on convolutions failed in the weights' memory order, and in half precision magnitudes that peft
        had rounded changed the model before the first step.
        """
        pipeline, config = tiny_sd_pipeline(tmp_path).to(dtype), LoraConfig(r=2, lora_alpha=4, **adapter)
        config_of_run = tiny_spo_config(tmp_path, max_steps=2, memory_budget=1.0)
        trainer = SPOTrainer(config_of_run, pipeline, brightness_reward, train_dataset=PROMPTS, peft_config=config)
        trainer.train()
        first, second = train_logs(trainer)
        assert first["ratio/chosen"] == first["ratio/rejected"] == 1 and first["kl"] == 0
        assert second["kl"] > 0
        convolution = trainer.pipeline.unet.conv_in.weight
        assert convolution.is_contiguous(memory_format=torch.channels_last) == ("use_dora" not in adapter)

    def test_an_order_of_weights_that_an_adapter_cannot_have_is_refused(self, tmp_path):
        config = LoraConfig(r=2, use_dora=True, target_modules=["to_q", "conv1"])
        settings = {"train_dataset": PROMPTS, "peft_config": config}
        with pytest.raises(ValueError, match="`channels_last=True` cannot be had"):
            SPOTrainer(
                tiny_spo_config(tmp_path, channels_last=True),
                tiny_sd_pipeline(tmp_path),
                brightness_reward,
                **settings,
            )

    @pytest.mark.parametrize("maker", [tiny_sd_pipeline, tiny_sd3_pipeline])
    def test_full_fine_tuning_of_a_half_precision_pipeline(self, tmp_path, maker):
        """Regression: the denoiser goes to float32, its text features came in half precision; so does its user later."""
        pipeline = maker(tmp_path).to(dtype=torch.bfloat16)
        trainer = make_trainer(tmp_path, pipeline=pipeline, max_steps=1, use_peft=False, learning_rate=1e-5)
        trainer.train()
        assert trainer.state.log_history[0]["ratio/chosen"] == 1.0
        settings = {"num_inference_steps": 2, "output_type": "pt", "height": 16, "width": 16}
        image = pipeline("a red cat", generator=torch.Generator().manual_seed(0), **settings).images
        denoiser = trainer.pipeline.denoiser
        assert image.dtype == torch.bfloat16 and {weight.dtype for weight in denoiser.parameters()} == {torch.float32}
        whole = maker(tmp_path)
        getattr(whole, trainer.pipeline.denoiser_name).load_state_dict(denoiser.state_dict())
        expected = whole("a red cat", generator=torch.Generator().manual_seed(0), **settings).images
        assert (image.float() - expected).abs().mean() < 0.05

    def test_a_named_output_comes_back_in_the_dtype_of_the_question(self, tmp_path):
        pipeline = tiny_sd_pipeline(tmp_path).to(dtype=torch.float16)
        make_trainer(tmp_path, pipeline=pipeline, use_peft=False)
        latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 16)
        with torch.no_grad():
            half = pipeline.unet(latents.half(), 501, encoder_hidden_states=text.half()).sample
            whole = pipeline.unet(latents.half().float(), 501, encoder_hidden_states=text.half().float()).sample
        assert half.dtype == torch.float16 and whole.dtype == torch.float32
        assert torch.equal(half, whole.half())

    @pytest.mark.parametrize("maker", [tiny_sd_pipeline, tiny_sdxl_pipeline])
    def test_options_of_the_pipeline_are_part_of_the_run(self, tmp_path, maker):
        """Rollout, loss, evaluation and card alike: ratios start at 1, and the card says how to sample."""
        trainer = make_trainer(tmp_path, pipeline=maker(tmp_path), guidance_rescale=0.7, clip_skip=1, max_steps=1)
        plain = make_trainer(tmp_path, "plain", pipeline=maker(tmp_path), max_steps=1)
        assert not torch.equal(trainer.generate(PROMPTS[:1]), plain.generate(PROMPTS[:1]))
        trainer.train()
        assert train_logs(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert train_logs(trainer)[0]["ratio/chosen"] == 1
        trainer.save_model()
        card = (tmp_path / "out" / "README.md").read_text()
        assert "guidance_rescale=0.7" in card and "clip_skip=1" in card

    def test_zero_terminal_snr(self, tmp_path):
        """25 steps: one of the numbers whose first step was NaN at eta 1."""
        config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
        pipeline = tiny_sd_pipeline(tmp_path, scheduler=ddim_scheduler(**config))
        settings = {"num_inference_steps": 25, "branch_start_step": 0, "guidance_rescale": 0.7, "max_steps": 2}
        trainer = make_trainer(tmp_path, pipeline=pipeline, **settings)
        trainer.train()
        logs = train_logs(trainer)
        assert [log["pairs/nonfinite"] for log in logs] == [0, 0]
        assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert trainer.generate(PROMPTS[:1]).isfinite().all()
        config["prediction_type"] = "epsilon"
        with pytest.raises(ValueError, match="timestep 999"):
            make_trainer(tmp_path, pipeline=tiny_sd_pipeline(tmp_path, scheduler=ddim_scheduler(**config)))

    def test_other_sampling_between_steps_leaves_the_loss_alone(self, tmp_path):
        """Regression: sigma depends on the number of steps the scheduler was last set to."""
        trainer = make_trainer(tmp_path)
        inputs = {"pairs": trainer.rollout(PROMPTS[:1]), "num_pairs": 4, "num_micro_batches": 1}
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05)
        before = trainer.compute_loss(trainer.model, inputs)
        trainer.pipeline("a red cat", num_inference_steps=20)
        assert torch.equal(trainer.compute_loss(trainer.model, inputs), before)

    def test_bf16_autocast_starts_at_ratio_one(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=1, bf16=True)
        trainer.train()
        assert trainer.state.log_history[0]["ratio/chosen"] == 1.0

    def test_one_policy_and_one_reference_forward_per_pair(self, tmp_path):
        """4 pairs that share x_t, with guidance: 8 samples forward for the policy, 8 for the reference."""
        trainer = make_trainer(tmp_path, max_steps=1)
        trainer.accelerator  # noqa: B018
        pairs = trainer.rollout(PROMPTS[:2])[:4]
        calls = []
        trainer.pipeline.unet.register_forward_hook(
            lambda module, args, output: calls.append((len(args[0]), torch.is_grad_enabled()))
        )
        trainer.compute_loss(trainer.model, {"pairs": pairs, "num_pairs": 4, "num_micro_batches": 1}).backward()
        assert sorted(calls) == [(8, False), (8, True)]

    @pytest.mark.parametrize("use_peft", [True, False])
    def test_what_must_move_moves_and_nothing_else(self, tmp_path, use_peft):
        folder = tiny_clip(tmp_path)
        reward_model = StepAwareRewardModel.from_clip(folder, processor=folder)
        pipeline = tiny_sd_pipeline(tmp_path)
        frozen = {"vae": pipeline.vae, "text_encoder": pipeline.text_encoder, "reward": reward_model}
        before = {name: state_of(module) for name, module in frozen.items()}
        base = state_of(pipeline.unet)
        trainer = make_trainer(tmp_path, pipeline=pipeline, reward=reward_model, use_peft=use_peft)
        trainable = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
        start = state_of(trainer.model)
        trainer.train()
        for name, module in frozen.items():
            assert not changed(before[name], module), name
        moved = changed(start, trainer.model)
        assert moved == trainable if use_peft else moved <= trainable and len(moved) > 0.9 * len(trainable)
        if use_peft:
            after = {k.replace(".base_layer", ""): v for k, v in pipeline.unet.state_dict().items() if "lora" not in k}
            assert same(base, after)
        else:
            with trainer.pipeline.reference() as reference:
                assert not changed(base, reference)

    def test_same_seed_same_run(self, tmp_path):
        runs = [make_trainer(tmp_path, pipeline=tiny_sd_pipeline(tmp_path)) for _ in range(2)]
        other = make_trainer(tmp_path, seed=43)
        for trainer in (*runs, other):
            trainer.train()
        assert losses(runs[0]) == losses(runs[1])
        assert same(lora_state(runs[0]), lora_state(runs[1]))
        assert losses(runs[0])[1:] != losses(other)[1:]

    def test_seed_fixes_the_adapter_whatever_was_drawn_before(self, tmp_path):
        states = []
        for _ in range(2):
            torch.rand(3)
            pipeline = tiny_sd_pipeline(tmp_path)
            torch.manual_seed(len(states))
            states.append(lora_state(make_trainer(tmp_path, pipeline=pipeline)))
        assert same(*states)

    def test_config_and_prompts_of_the_user_stay(self, tmp_path):
        config = tiny_spo_config(tmp_path / "o", gradient_checkpointing=True, num_train_epochs=2)
        before, prompts = config.to_dict(), list(PROMPTS)
        SPOTrainer(config, tiny_sd_pipeline(tmp_path), brightness_reward, train_dataset=prompts).train()
        assert config.to_dict() == before
        assert prompts == PROMPTS

    def test_the_reward_and_the_adapter_of_the_user_stay(self, tmp_path):
        """Regression: the reward model was cast, and a config for all layers named those of the first model it met."""
        reward = StepAwareRewardModel.from_clip(tiny_clip(tmp_path))
        config = LoraConfig(r=2, target_modules="all-linear")
        trainers = [
            SPOTrainer(
                tiny_spo_config(tmp_path, reward_dtype="bfloat16", reward_batch_size=4),
                maker(tmp_path),
                reward,
                train_dataset=PROMPTS,
                peft_config=config,
            )
            for maker in (tiny_sd_pipeline, tiny_sdxl_pipeline)
        ]
        assert config.target_modules == "all-linear"
        assert {weight.dtype for weight in reward.parameters()} == {torch.float32}
        assert torch.bfloat16 in {weight.dtype for weight in trainers[0].reward_model.parameters()}
        adapted = [set(t.pipeline.denoiser.peft_config["default"].target_modules) for t in trainers]
        assert adapted[0] != adapted[1]
        again = SPOTrainer(tiny_spo_config(tmp_path), trainers[0].pipeline, reward, PROMPTS, peft_config=config)
        assert again.pipeline is trainers[0].pipeline  # the same adapter, trained further


class TestLearning:
    def test_loss_fits_its_own_pairs(self, tmp_path):
        """First step of the ladder: trained on the same 8 pairs again and again, the policy learns their order."""
        trainer = make_trainer(tmp_path, beta=100.0, guidance_scale=1.0)
        pairs = trainer.rollout(PROMPTS[:2])
        inputs = {"pairs": pairs, "num_pairs": len(pairs), "num_micro_batches": 1}
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            loss, output = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
            loss.backward()
            optimizer.step()
        assert loss.item() < math.log(2) - 0.05
        assert (output.chosen_ratio > output.rejected_ratio).float().mean() > 0.85

    def test_kl_coefficient_holds_the_policy(self, tmp_path):
        free, held = (make_trainer(tmp_path, kl_coef=kl, max_steps=8, learning_rate=3e-3) for kl in (0.0, 1e4))
        for trainer in (free, held):
            trainer.train()
        last = [[log["kl"] for log in t.state.log_history if "kl" in log][-1] for t in (free, held)]
        assert last[1] < 0.5 * last[0]

    def test_kl_by_hand(self, tmp_path):
        """The logged `kl` is |mean - mean_ref|^2 / (2 sigma^2), averaged over dimensions and pairs."""
        trainer = make_trainer(tmp_path)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
        pairs = trainer.rollout(PROMPTS[:1])
        trainer._metrics.clear()
        trainer.compute_loss(trainer.model, {"pairs": pairs, "num_pairs": len(pairs), "num_micro_batches": 1})
        logged = trainer._metrics.pop()["kl"]
        pipeline, embeds = trainer.pipeline, trainer.pipeline.encode_prompt(pairs.prompts)

        def step(i):
            output = pipeline.predict(pairs.latents[i : i + 1], pairs.timesteps[i], embeds[i : i + 1], 3.0)
            return pipeline.step_distribution(output, pairs.timesteps[i], pairs.latents[i : i + 1], 1.0)

        expected = []
        for i in range(len(pairs)):
            policy = step(i)
            with pipeline.reference():
                reference = step(i)
            difference = policy.prev_sample_mean - reference.prev_sample_mean
            expected.append((difference**2).mean().item() / (2 * policy.std_dev_t.item() ** 2))
        assert logged == pytest.approx(np.mean(expected), rel=1e-3)


class TestBatches:
    def test_accumulation_equals_one_large_batch(self, tmp_path):
        """Regression: accumulated micro-batches of any size must give the mean over the pairs of the step."""
        whole = make_trainer(tmp_path, per_device_train_batch_size=6)
        parts = make_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3)
        for trainer in (whole, parts):
            trainer.train()
        np.testing.assert_allclose(losses(whole), losses(parts), atol=1e-5)
        for a, b in zip(lora_state(whole).values(), lora_state(parts).values(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)

    def test_every_pair_is_used_once_and_the_last_step_is_smaller(self, tmp_path):
        """6 prompts x 4 branching steps x 2 epochs = 48 pairs; in steps of 10 that is 4 full ones and one of 8."""
        seen = []

        class Spy(SPOTrainer):
            def compute_loss(self, model, inputs, **kwargs):
                seen.append(inputs["pairs"].chosen_prev_latents.clone())
                return super().compute_loss(model, inputs, **kwargs)

        config = tiny_spo_config(tmp_path, per_device_train_batch_size=10, num_train_epochs=2)
        trainer = Spy(config, tiny_sd_pipeline(tmp_path), brightness_reward, train_dataset=PROMPTS)
        trainer.train()
        assert [len(batch) for batch in seen] == [10, 10, 10, 10, 8]
        assert len(torch.cat(seen).flatten(1).unique(dim=0)) == 48
        log = [log for log in trainer.state.log_history if "loss" in log][-1]
        assert (log["num_pairs_seen"], log["num_prompts_seen"], log["epoch"]) == (48, 12, 2.0)

    def test_each_epoch_is_a_permutation_of_the_prompts(self, tmp_path):
        trainer = make_trainer(tmp_path)
        batches = []
        rollout = trainer.rollout
        trainer.rollout = lambda prompts, **kwargs: batches.append(prompts) or rollout(prompts, **kwargs)
        trainer.train()
        order = [prompt for batch in batches for prompt in batch]
        assert len(order) == 12
        assert sorted(order[:6]) == sorted(order[6:]) == sorted(PROMPTS)
        assert order[:6] != order[6:]

    def test_epoch_strategies_follow_the_prompts(self, tmp_path):
        trainer = make_trainer(tmp_path, save_strategy="epoch", eval_strategy="epoch", eval_dataset=PROMPTS[:2])
        trainer.train()
        evaluations = [log for log in trainer.state.log_history if "eval_reward_mean" in log]
        assert [log["epoch"] for log in evaluations] == [1.0, 2.0]
        assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 2

    def test_max_steps_cycles_over_the_prompts(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=20)
        trainer.train()
        assert trainer.state.global_step == 20
        assert trainer.pair_loader.num_prompts_seen > 2 * len(PROMPTS)

    def test_gradients_are_clipped(self, tmp_path):
        """Regression: the public code hands an exhausted iterator to the clipping function."""
        norms = []

        class Spy(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())

        trainer = make_trainer(tmp_path, max_steps=3, max_grad_norm=1e-3, callbacks=[Spy()])
        trainer.train()
        assert len(norms) == 3 and max(norms) == pytest.approx(1e-3, rel=1e-2)

    def test_nothing_passes_the_threshold(self, tmp_path):
        trainer = make_trainer(tmp_path, preference_threshold=0.999999)
        with pytest.raises(RuntimeError, match="No valid pair in .*`preference_threshold=0.999999`. Lower"):
            trainer.train()

    def test_multi_step_pairs_train(self, tmp_path):
        """A pair inside a branch has two x_t, so its micro-batch runs both; with guidance 2 x (4 + apart)."""
        trainer = make_trainer(tmp_path, num_inner_steps=2, max_steps=4)
        trainer.train()
        assert losses(trainer)[0] == pytest.approx(math.log(2), rel=1e-6)
        pairs = trainer.rollout(PROMPTS[:1])
        calls = []
        trainer.pipeline.unet.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
        trainer.compute_loss(trainer.model, {"pairs": pairs, "num_pairs": 4, "num_micro_batches": 1})
        assert calls == [2 * (len(pairs) + int((~pairs.shared).sum()))] * 2


class TestResume:
    @pytest.mark.parametrize("step", [2, 5])
    def test_continues_as_if_never_stopped(self, tmp_path, step):
        settings = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 5}
        whole = make_trainer(tmp_path, "whole", **settings)
        whole.train()
        resumed = make_trainer(tmp_path, "resumed", pipeline=tiny_sd_pipeline(tmp_path), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert same(lora_state(whole), lora_state(resumed))
        assert resumed.state.global_step == whole.state.global_step
        keys = ("loss", "grad_norm", "kl", "rewards/margins", "step_reward/mean", "num_pairs_seen", "epoch")
        logs = [[{k: log[k] for k in keys} for log in t.state.log_history if "loss" in log] for t in (whole, resumed)]
        assert logs[0] == logs[1]

    def test_incomplete_or_foreign_checkpoints_are_refused(self, tmp_path):
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
        make_trainer(tmp_path, **settings).train()
        checkpoint = tmp_path / "out" / "checkpoint-1"
        with pytest.raises(ValueError, match="written with 6 other prompts than the 2"):
            make_trainer(tmp_path, "b", prompts=PROMPTS[:2], **settings).train(str(checkpoint))
        (checkpoint / "spo_state.json").unlink()
        with pytest.raises(ValueError, match="not a complete checkpoint: spo_state.json is missing"):
            make_trainer(tmp_path, "c", **settings).train(str(checkpoint))

    def test_a_checkpoint_of_another_kind_of_run_says_which(self, tmp_path):
        """Regression: a KeyError, an OSError and a FileNotFoundError of other libraries."""
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
        make_trainer(tmp_path, **settings).train()
        lora = str(tmp_path / "out" / "checkpoint-1")
        make_trainer(tmp_path, "whole", use_peft=False, **settings).train()
        whole = str(tmp_path / "whole" / "checkpoint-1")
        settings["max_steps"] = 2
        with pytest.raises(ValueError, match="does not belong to `optim='adafactor'`: it has no .*beta1"):
            make_trainer(tmp_path, "b", optim="adafactor", **settings).train(lora)
        with pytest.raises(ValueError, match="does not belong to `optim='sgd'`"):
            make_trainer(tmp_path, "b", optim="sgd", **settings).train(lora)
        with pytest.raises(ValueError, match="holds a LoRA, and this run has `use_peft=False`"):
            make_trainer(tmp_path, "b", use_peft=False, **settings).train(lora)
        with pytest.raises(ValueError, match="holds a whole unet, and this run has `use_peft=True`"):
            make_trainer(tmp_path, "b", **settings).train(whole)
        model, config = (
            StepAwareRewardModel.from_clip(tiny_clip(tmp_path)),
            {"save_strategy": "steps", "save_steps": 1},
        )
        reward = StepRewardTrainer(
            tiny_step_reward_config(tmp_path / "reward", **config), tiny_sd_pipeline(tmp_path), model, image_pairs()
        )
        with pytest.raises(ValueError, match="is a checkpoint of another trainer, which wrote spo_state.json"):
            reward.train(resume_from_checkpoint=lora)
        reward.train()
        with pytest.raises(ValueError, match="is a checkpoint of another trainer, which wrote step_reward_state.json"):
            make_trainer(tmp_path, "b", **settings).train(str(tmp_path / "reward" / "checkpoint-2"))

    def test_full_fine_tuning_resumes(self, tmp_path):
        settings = {
            "save_strategy": "steps",
            "save_steps": 1,
            "max_steps": 3,
            "use_peft": False,
            "learning_rate": 1e-4,
        }
        whole = make_trainer(tmp_path, "whole", **settings)
        whole.train()
        resumed = make_trainer(tmp_path, "resumed", **settings)
        resumed.train(str(tmp_path / "whole" / "checkpoint-1"))
        assert not changed(state_of(whole.model), resumed.model)

    def test_best_model_is_loaded_at_the_end(self, tmp_path):
        trainer = make_trainer(
            tmp_path,
            max_steps=4,
            learning_rate=3e-2,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            eval_dataset=PROMPTS[:3],
            load_best_model_at_end=True,
            metric_for_best_model="reward_mean",
            greater_is_better=True,
        )
        trainer.train()
        evaluations = [log["eval_reward_mean"] for log in trainer.state.log_history if "eval_reward_mean" in log]
        assert len(set(evaluations)) == 4
        assert trainer.evaluate()["eval_reward_mean"] == pytest.approx(max(evaluations), rel=1e-6)

    def test_the_best_model_needs_a_metric_that_exists(self, tmp_path):
        """Regression: the Trainer's default, the evaluation loss, does not exist here and failed at the first save."""
        settings = {"eval_dataset": PROMPTS[:2], "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
        settings |= {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
        trainer = make_trainer(tmp_path, **settings)
        trainer.train()
        assert trainer.state.best_metric == max(
            log["eval_reward_mean"] for log in trainer.state.log_history if "eval_reward_mean" in log
        )
        with pytest.raises(ValueError, match="`metric_for_best_model` must be one of .*got 'beauty'"):
            make_trainer(tmp_path, metric_for_best_model="beauty", **settings)

    def test_resume_without_a_checkpoint(self, tmp_path):
        (tmp_path / "out").mkdir()
        with pytest.raises(ValueError, match="no checkpoint in .* to resume from"):
            make_trainer(tmp_path).train(resume_from_checkpoint=True)


class TestSaving:
    @pytest.mark.parametrize("maker", [tiny_sd_pipeline, tiny_sdxl_pipeline])
    def test_lora_loads_in_plain_diffusers_with_the_trained_images(self, tmp_path, maker):
        trainer = make_trainer(
            tmp_path,
            pipeline=maker(tmp_path),
            learning_rate=3e-2,
            peft_config=LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"]),
        )
        trainer.train()
        trainer.save_model()
        trained = trainer.generate(PROMPTS[:2])
        fresh = maker(tmp_path)

        def sample():
            generators = [torch.Generator().manual_seed(i) for i in range(2)]
            settings = {"num_inference_steps": 5, "guidance_scale": 3.0, "eta": 1.0, "output_type": "pt"}
            return fresh(PROMPTS[:2], generator=generators, **settings).images

        base = sample()
        fresh.load_lora_weights(tmp_path / "out")
        assert (trained - base).abs().max() > 1e-3
        torch.testing.assert_close(sample(), trained, atol=1e-5, rtol=1e-5)

    def test_full_model_loads_in_plain_diffusers(self, tmp_path):
        trainer = make_trainer(tmp_path, use_peft=False, max_steps=2)
        trainer.train()
        trainer.save_model()
        loaded = type(trainer.pipeline.unet).from_pretrained(tmp_path / "out", subfolder="unet")
        assert not changed(state_of(trainer.pipeline.unet), loaded)

    def test_model_card_states_sampler_and_recipe_but_no_paths(self, tmp_path):
        trainer = make_trainer(tmp_path, eval_dataset=PROMPTS[:2], max_steps=1)
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        card = (tmp_path / "out" / "README.md").read_text()
        for expected in (
            "DDIM, eta 1, 5 steps, guidance 3",
            "`beta` | 10.0",
            "eval_reward_mean",
            "2406.04314",
        ):
            assert expected in card
        assert str(tmp_path) not in card

    def test_no_pickles_but_the_trainers_own(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
        trainer.train()
        trainer.save_model()
        assert {p.name for p in (tmp_path / "out").iterdir()} == {
            "checkpoint-1",
            "pytorch_lora_weights.safetensors",
            "README.md",
            "sampler.json",
        }
        state = json.loads((tmp_path / "out" / "checkpoint-1" / "spo_state.json").read_text())
        assert state["num_pairs_seen"] == 4


class TestLogging:
    def test_keys_of_the_contract(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=3)
        trainer.train()
        log = [log for log in trainer.state.log_history if "loss" in log][-1]
        expected = (
            "loss grad_norm learning_rate epoch rewards/chosen rewards/rejected rewards/margins rewards/accuracies "
            "logps/chosen logps/rejected ratio/chosen ratio/rejected clip_ratio kl approx_kl pairs/fresh_accuracy "
            "step_reward/mean step_reward/std step_reward/margin pairs/valid_fraction pairs/valid_fraction_t_0_199 "
            "reward_mean reward_std num_prompts_seen num_pairs_seen time/rollout time/train"
        ).split()
        assert set(expected) <= set(log)
        assert log["rewards/margins"] == pytest.approx(log["rewards/chosen"] - log["rewards/rejected"], abs=1e-9)
        assert all(math.isfinite(value) for value in log.values())

    def test_the_deviation_of_a_large_reward(self, tmp_path):
        """
        Regression: of float32 squares, the difference from the squared mean had lost a deviation of 0.01 around 1000.
        """

        def reward(images, prompts, timesteps):
            return 1000 + 0.01 * torch.arange(len(images), dtype=torch.float32)

        trainer = make_trainer(tmp_path, reward=reward, max_steps=1, reward_batch_size=3, num_candidates=3)
        pairs = trainer.rollout(PROMPTS[:3], seed=0)
        expected = pairs.final_scores.double().std(correction=0).item()
        assert 0 < expected < 0.1
        assert trainer._metrics.pop_logs()["reward_std"] == pytest.approx(expected, rel=1e-3)

    def test_step_reward_metrics_by_hand(self, tmp_path):
        trainer = make_trainer(tmp_path)
        pairs = trainer.rollout(PROMPTS)
        scores = torch.cat([branch.scores for branch in pairs.branches], dim=1)
        logged = trainer._metrics.pop()
        for name, expected in (
            ("step_reward/mean", scores.mean()),
            ("step_reward/std", scores.std(0).mean()),
            ("step_reward/margin", (scores.max(0).values - scores.min(0).values).mean()),
            ("pairs/valid_fraction", len(pairs) / scores.shape[1]),
        ):
            assert logged[name] == pytest.approx(float(expected), rel=1e-5), name

    def test_tensorboard_and_images(self, tmp_path):
        """Regression: trackers ask the model for a transformers config, which a UNet does not have."""
        trainer = make_trainer(tmp_path, report_to="tensorboard", log_images_steps=2, max_steps=3, num_eval_images=3)
        trainer.train()
        folder = tmp_path / "out" / "images"
        assert sorted(p.name for p in folder.glob("step_*")) == [
            "step_000000.png",
            "step_000002.png",
            "step_000003.png",
        ]
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(next((tmp_path / "out").rglob("events*")).parent))
        events.Reload()
        assert "samples" in " ".join(events.Tags()["images"])
        assert "train/rewards/margins" in events.Tags()["scalars"]

    def test_evaluation_repeats_and_ignores_the_batch_size(self, tmp_path):
        redness = {"redness": lambda images, prompts: images[:, 0].mean(dim=(1, 2))}
        trainer = make_trainer(tmp_path, eval_dataset=PROMPTS[:5], metrics=redness, per_device_eval_batch_size=2)
        first, again = trainer.evaluate(), trainer.evaluate()
        trainer.args.per_device_eval_batch_size = 5
        whole = trainer.evaluate()
        for name in ("reward_mean", "reward_std", "redness_mean", "redness_std"):
            assert first[f"eval_{name}"] == again[f"eval_{name}"]
            assert first[f"eval_{name}"] == pytest.approx(whole[f"eval_{name}"], rel=1e-5)
        images = trainer.generate(PROMPTS[:5])
        assert first["eval_redness_mean"] == pytest.approx(images[:, 0].mean().item(), rel=1e-4)
        expected = score_images(images, PROMPTS[:5], brightness_reward).mean().item()
        assert first["eval_reward_mean"] == pytest.approx(expected, rel=1e-4)


class TestEcosystem:
    def test_runs_with_ci_unset(self, tmp_path, monkeypatch):
        """Regression: telemetry and model cards of TRL's private base class crash on a UNet, but only outside CI."""
        monkeypatch.delenv("CI", raising=False)
        trainer = make_trainer(tmp_path, max_steps=1)
        trainer.train()
        trainer.save_model()
        trainer.create_model_card(model_name="name", dataset_name="data")

    def test_gradient_checkpointing_changes_nothing(self, tmp_path):
        plain, checkpointed = (make_trainer(tmp_path, gradient_checkpointing=c, max_steps=3) for c in (False, True))
        for trainer in (plain, checkpointed):
            trainer.train()
        assert checkpointed.pipeline.unet.is_gradient_checkpointing
        np.testing.assert_allclose(losses(plain), losses(checkpointed), rtol=1e-5)

    def test_dataset_columns_and_paths(self, tmp_path):
        tiny_sd_pipeline(tmp_path).save_pretrained(tmp_path / "pipe")
        folder = tiny_clip(tmp_path)
        StepAwareRewardModel.from_clip(folder, processor=folder).save_pretrained(tmp_path / "reward")
        prompts = Dataset.from_dict({"caption": PROMPTS, "other": PROMPTS})
        trainer = make_trainer(
            tmp_path, pipeline=str(tmp_path / "pipe"), reward=str(tmp_path / "reward"), prompts=prompts, max_steps=1
        )
        trainer.train()
        assert trainer.state.global_step == 1

    def test_dropout_of_the_adapter_is_off(self, tmp_path):
        config = LoraConfig(target_modules=["to_q"], lora_dropout=0.5)
        trainer = make_trainer(tmp_path, peft_config=config, max_steps=1)
        trainer.train()
        assert trainer.state.log_history[0]["ratio/chosen"] == 1.0

    def test_two_processes_share_the_work(self, tmp_path):
        """
        Two gloo processes, one of which finds far fewer valid pairs: both take the same number of steps on the same
        number of pairs, end with the same weights, and use every pair that one process would have used.
        """
        script = Path(__file__).parent / "run_two_processes.py"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parent.parent)}
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
        command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(script), str(tmp_path)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        ranks = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2)]
        assert ranks[0]["lora"] == ranks[1]["lora"]
        assert ranks[0]["batches"] == ranks[1]["batches"]
        assert ranks[0]["log"] == ranks[1]["log"]
        own = [rank["own_pairs"] for rank in ranks]
        assert own[0] != own[1]
        assert 2 * sum(ranks[0]["batches"]) == sum(own) - sum(own) % 2
        assert ranks[0]["log"]["num_pairs_seen"] == 2 * sum(ranks[0]["batches"])
        assert ranks[0]["evaluation"] == pytest.approx(ranks[0]["evaluation_alone"], rel=1e-5)
        assert ranks[0]["one_prompt"] == ranks[1]["one_prompt"]
        assert ranks[0]["saved"]


BAD_CONFIGS = [
    ({"eta": 0.0}, "`eta` must be above 0"),
    ({"num_candidates": 1}, "`num_candidates` must be at least 2"),
    ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1"),
    ({"branch_start_step": 5}, "`branch_start_step` must be in [0, 5)"),
    ({"branch_start_step": -1}, "`branch_start_step` must be in [0, 5)"),
    ({"branch_end_step": 6}, "`branch_end_step` must be at most 5"),
    ({"branch_end_step": 1}, "`branch_start_step` must be in [0, 1)"),
    ({"preference_threshold": 1.0}, "`preference_threshold` must be in [0, 1)"),
    ({"epsilon": 0.0}, "`epsilon` must be in (0, 1)"),
    ({"beta": -1.0}, "`beta` must be positive"),
    ({"kl_coef": -0.1}, "`kl_coef` must be 0 or more"),
    ({"resample": "best"}, "`resample` must be 'random', 'chosen' or 'rejected'"),
    ({"pair": "all"}, "`pair` must be 'best_worst' or 'random'"),
    ({"num_inner_steps": 0}, "`num_inner_steps` must be at least 1"),
    ({"per_device_rollout_batch_size": 0}, "`per_device_rollout_batch_size` must be at least 1"),
]


@pytest.mark.parametrize("settings, message", BAD_CONFIGS)
def test_bad_settings_fail_in_the_config(settings, message):
    with pytest.raises(ValueError) as error:
        tiny_spo_config("unused", **settings)
    assert message in str(error.value)


def test_dictionaries_on_the_command_line():
    """Regression: JSON stayed text, and failed when it was used."""
    arguments = ["--output_dir", "unused", "--model_init_kwargs", '{"torch_dtype": "float16"}']
    (config,) = TrlParser(SPOConfig).parse_args_and_config(arguments)
    assert config.model_init_kwargs == {"torch_dtype": "float16"}


@pytest.mark.parametrize(
    "prompts, error, message",
    [
        (None, ValueError, "SPO needs prompts"),
        ([], ValueError, "`train_dataset` has no prompts"),
        (["a cat", ""], ValueError, "empty prompt at position 1"),
        (["a cat", "  "], ValueError, "empty prompt at position 1"),
        (["a cat", 3], ValueError, "item 1 is a `int`"),
        ("a cat", TypeError, "must be a list of prompts"),
        (Dataset.from_dict({"text": ["a cat"]}), ValueError, "needs a column 'prompt' or 'caption'.*\\['text'\\]"),
    ],
)
def test_bad_prompts_fail_before_anything_is_loaded(tmp_path, prompts, error, message):
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, pipeline="a/pipeline/that/is/never/loaded", prompts=prompts)


class TestBadInput:
    def test_pipeline_and_reward(self, tmp_path):
        with pytest.raises(ValueError, match="does not exist"):
            make_trainer(tmp_path, pipeline=str(tmp_path / "nowhere"))
        with pytest.raises(TypeError, match="`reward_model` must be .* got `int`"):
            make_trainer(tmp_path, reward=3)
        with pytest.raises((ValueError, OSError), match="nowhere"):
            make_trainer(tmp_path, reward=str(tmp_path / "nowhere"))
        with pytest.raises(TypeError, match="must be an `SPOConfig`"):
            SPOTrainer({"eta": 1.0}, tiny_sd_pipeline(tmp_path), brightness_reward, train_dataset=PROMPTS)

    def test_sizes_and_deterministic_branches(self, tmp_path):
        with pytest.raises(ValueError, match="`height` must be a positive multiple of 2"):
            make_trainer(tmp_path, height=15)
        pipeline = tiny_sd_pipeline(tmp_path, scheduler=ddim_scheduler(set_alpha_to_one=True))
        with pytest.raises(ValueError, match="deterministic"):
            make_trainer(tmp_path, pipeline=pipeline, branch_start_step=4)

    def test_evaluation_without_prompts(self, tmp_path):
        with pytest.raises(ValueError, match="needs prompts: pass `eval_dataset`"):
            make_trainer(tmp_path, eval_strategy="epoch")
        with pytest.raises(ValueError, match="no prompts to evaluate"):
            make_trainer(tmp_path).evaluate()

    def test_a_reward_model_that_knows_fewer_timesteps(self, tmp_path):
        """On a GPU nothing would notice: the embedding of a larger timestep exists, and means nothing."""
        reward_model = StepAwareRewardModel.from_clip(tiny_clip(tmp_path))
        reward_model.config.num_train_timesteps = 601  # of five steps, the first is at 801 and never scored
        with pytest.raises(ValueError, match="timesteps up to 601, and the reward model knows those up to 600"):
            make_trainer(tmp_path, reward=reward_model)
        reward_model.config.num_train_timesteps = 602
        make_trainer(tmp_path, reward=reward_model)
