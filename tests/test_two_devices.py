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
Necessity: users train on a GPU, where prompts, pairs, scores and metrics live on the CPU and networks on the device. The
first run on one ended at its first log, because metrics of both devices were added up, and no test on a CPU could see it.
Here the real trainers run on the pretended GPU of `pretended_device`, which refuses what CUDA refuses and counts how often
the host waits.
"""

import math
from collections import Counter

import pytest
import torch

from trl_spo import EMACallback, LatentRewardModel, SPOTrainer, StepAwareRewardModel, StepRewardTrainer

from .flow_testing import (
    tiny_flux2_klein_pipeline,
    tiny_flux_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_z_image_pipeline,
)
from .pretended_device import CUDA, DeviceTensor, PretendedGPU, Wait
from .testing_utils import (
    PROMPTS,
    brightness_reward,
    image_pairs,
    tiny_clip,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
    tiny_spo_config,
    tiny_step_reward_config,
    train_logs,
)


ON_GPU = {"use_cpu": False, "torch_compile": False}  # compilers do not see through the pretended device


@pytest.fixture
def gpu():
    with PretendedGPU() as mode:
        yield mode


def spo_trainer(folder, reward=brightness_reward, pipeline=None, output="out", callbacks=None, **settings):
    config = tiny_spo_config(folder / output, **{**ON_GPU, "max_steps": 2, "num_inference_steps": 4, **settings})
    pipeline = tiny_sd_pipeline(folder) if pipeline is None else pipeline
    return SPOTrainer(
        config, pipeline, reward, train_dataset=PROMPTS, eval_dataset=PROMPTS[:2], callbacks=callbacks,
        metrics={"mean": lambda images, prompts: images.mean(dim=(1, 2, 3))},
    )  # fmt: skip


def reward_model(folder) -> StepAwareRewardModel:
    clip = tiny_clip(folder)
    return StepAwareRewardModel.from_clip(clip, processor=clip)


def step_reward_trainer(folder, **settings) -> StepRewardTrainer:
    torch.manual_seed(0)
    config = tiny_step_reward_config(folder / "reward", **{**ON_GPU, "eval_timesteps": [0, 501], **settings})
    pairs = image_pairs()
    return StepRewardTrainer(
        config, tiny_sd_pipeline(folder), reward_model(folder), train_dataset=pairs, eval_dataset=pairs[:3]
    )


def trained_weights(trainer) -> dict[str, torch.Tensor]:
    """Copies on the CPU."""
    return {n: p.detach().cpu().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def counting(gpu: PretendedGPU, owner, name: str) -> list[list[Wait]]:
    """From now on, the waits of each call of `owner.name`."""
    function, found = getattr(owner, name), []

    def counted(*args, **kwargs):
        start = len(gpu.waits)
        result = function(*args, **kwargs)
        found.append(gpu.waits[start:])
        return result

    setattr(owner, name, counted)
    return found


class TestThePretendedDevice:
    """It must refuse what CUDA refuses and let through what CUDA lets through, or the tests below mean nothing."""

    @pytest.mark.parametrize(
        "mixed",
        [
            lambda there, here: there + here,
            lambda there, here: there.add_(here),
            lambda there, here: here.add_(there[0, 0]),
            lambda there, here: there @ here,
            lambda there, here: torch.cat([there, here]),
            lambda there, here: torch.stack([there[0, 0], here[0, 0]]),
            lambda there, here: torch.where(there > 0, there, here),
            lambda there, here: here[there[0].long()],
            lambda there, here: torch.nn.functional.linear(there, here),
            lambda there, here: torch.randn(2, device="cuda:0", generator=torch.Generator()),
            lambda there, here: torch.randn(2, generator=torch.Generator("cuda:0")),
        ],
    )
    def test_mixed_devices_are_refused(self, gpu, mixed):
        here = torch.zeros(2, 2)
        with pytest.raises(RuntimeError, match="two devices|would write to the CPU|type for generator"):
            mixed(here.to(CUDA), here)

    def test_memory_of_the_device_cannot_be_read(self, gpu):
        there = torch.zeros(2, device=CUDA)
        for read in (there.numpy, there.pin_memory, there.__array__):
            with pytest.raises((TypeError, RuntimeError), match="cuda"):
                read()

    def test_what_cuda_lets_through(self, gpu):
        there, here = torch.arange(4.0, device=CUDA), torch.arange(4.0)
        assert (there * torch.tensor(2.0) + 1).tolist() == [1, 3, 5, 7]
        assert there[torch.tensor([2, 0])].tolist() == [2, 0]
        assert there.copy_(here + 1).cpu().tolist() == [1, 2, 3, 4]
        assert here.to(there).device == CUDA and there.to(here).device.type == "cpu"
        assert there.to("cuda:0") is there and there.float() is there

    def test_numbers_and_gradients_are_those_of_the_cpu(self, gpu):
        torch.manual_seed(0)
        layer, x = torch.nn.Conv2d(2, 3, 3), torch.randn(2, 2, 5, 5)
        layer(x).square().mean().backward()
        expected = layer.weight.grad.clone()
        layer.zero_grad()
        layer.to(CUDA)
        layer(x.to(CUDA)).square().mean().backward()
        assert isinstance(layer.weight.grad, DeviceTensor)
        torch.testing.assert_close(layer.weight.grad.cpu(), expected)

    def test_it_has_random_numbers_of_its_own(self, gpu):
        torch.manual_seed(3)
        first = torch.randn(3, device=CUDA).tolist()
        expected = torch.Generator().manual_seed(3)
        torch.manual_seed(3)
        torch.randn(5)  # of the CPU: changes nothing there
        assert torch.randn(3, device=CUDA).tolist() == first == torch.randn(3, generator=expected).tolist()

    @pytest.mark.parametrize(
        ("operation", "kinds"),
        [
            (lambda x: x.sum().item(), ["read"]),
            (lambda x: bool((x > 0).any()), ["read"]),
            (lambda x: x.tolist(), ["read"]),
            (lambda x: x.cpu(), ["read"]),
            (lambda x: torch.zeros(3).copy_(x), ["read"]),
            (lambda x: torch.equal(x, x), ["read"]),
            (lambda x: x.nonzero(), ["search"]),
            (lambda x: x[x > 0], ["search"]),
            (lambda x: torch.ones(3).to(CUDA), ["upload"]),
            (lambda x: torch.tensor([1.0], device=CUDA), ["upload"]),
            (lambda x: torch.ones(3).to(CUDA, non_blocking=True), []),
            (lambda x: x.masked_fill(x > 0, 0.0).sum() + x.double().mean(), []),
            (lambda x: torch.full((3,), 2.0, device=CUDA) + x, []),
            (lambda x: torch.cuda.synchronize(), ["synchronize"]),
        ],
    )
    def test_waits_are_counted(self, gpu, operation, kinds):
        x = torch.ones(3, device=CUDA)
        gpu.waits.clear()
        operation(x)
        assert [wait.kind for wait in gpu.waits] == kinds


class TestSPO:
    @pytest.mark.parametrize(
        "settings",
        [
            {"gradient_accumulation_steps": 2},
            {"use_peft": False},
            {"bf16": True, "num_inner_steps": 2, "timestep_weighting": "even"},
            {"fp16": True, "num_branches": 2, "pair": "random"},
            {"resample": "chosen", "kl_coef": 0.1, "branch_end_step": 3, "gradient_checkpointing": True},
        ],
        ids=["lora", "full", "bf16-inner-steps", "fp16-random", "chosen-kl"],
    )
    def test_trains_evaluates_and_logs_images(self, gpu, tmp_path, settings):
        """Everything at once, with the real reward model: one run per kind of training."""
        trainer = spo_trainer(
            tmp_path, reward_model(tmp_path), eval_strategy="steps", eval_steps=2, log_images_steps=2,
            num_eval_images=1, save_strategy="steps", save_steps=2, **settings,
        )  # fmt: skip
        assert trainer.args.device == CUDA and trainer.pipeline.device == CUDA and trainer.reward_model.device == CUDA
        before = trained_weights(trainer)
        trainer.train()
        trainer.save_model()
        first, second = train_logs(trainer)
        assert first["ratio/chosen"] == first["ratio/rejected"] == 1.0
        assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
        assert math.isfinite(second["loss"]) and first["step_reward/std"] > 0
        assert any(not torch.equal(before[name], value) for name, value in trained_weights(trainer).items())
        assert sum("eval_reward_mean" in log and "eval_mean_std" in log for log in trainer.state.log_history) == 1
        assert (tmp_path / "out" / "images" / "step_000002.png").is_file()

    def test_the_run_is_that_of_the_cpu(self, tmp_path):
        """Random numbers of the rollout come from the device's generator, which is the CPU's here: the same pairs."""
        with PretendedGPU():
            there = spo_trainer(tmp_path, output="there", channels_last=False)
            there.train()
            logs, weights = train_logs(there), trained_weights(there)
        here = spo_trainer(tmp_path, output="here", channels_last=False, use_cpu=True)
        here.train()
        for log, expected in zip(logs, train_logs(here), strict=True):
            for name in ("loss", "kl", "step_reward/mean", "reward_mean", "logps/chosen", "pairs/valid_fraction"):
                assert log[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name
        for name, value in trained_weights(here).items():
            torch.testing.assert_close(weights[name], value, atol=1e-4, rtol=1e-2)

    def test_with_moving_average_a_resumed_run_is_the_uninterrupted_one(self, gpu, tmp_path):
        """Optimizer, average, pool of pairs, metrics and random numbers come back onto their devices."""
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
        whole = spo_trainer(tmp_path, output="whole", **settings)
        EMACallback(whole, decay=0.5)
        whole.train()
        resumed = spo_trainer(tmp_path, output="whole", **settings)
        EMACallback(resumed, decay=0.5)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
        names = ("loss", "kl", "ratio/chosen", "logps/rejected", "reward_mean")
        ends = [train_logs(trainer)[-1] for trainer in (whole, resumed)]
        assert [ends[0][name] for name in names] == [ends[1][name] for name in names]
        expected = trained_weights(whole)
        assert all(torch.equal(expected[name], value) for name, value in trained_weights(resumed).items())

    def test_a_pair_that_is_not_finite_is_named(self, gpu, tmp_path):
        """What went wrong is looked for on both devices."""

        def reward(images, prompts, timesteps):
            scores = brightness_reward(images, prompts, timesteps)
            blind = torch.tensor(["cat" in prompt for prompt in prompts], device=images.device)
            return scores.masked_fill(blind, math.nan)

        trainer = spo_trainer(tmp_path, reward, max_steps=1, max_nonfinite_fraction=1.0)
        trainer.train()
        assert train_logs(trainer)[0]["pairs/nonfinite"] > 0

    def test_sdxl(self, gpu, tmp_path):
        trainer = spo_trainer(tmp_path, pipeline=tiny_sdxl_pipeline(tmp_path), max_steps=1, height=16, width=16)
        trainer.train()
        assert trainer.evaluate()["eval_reward_std"] > 0  # of images of two prompts
        assert train_logs(trainer)[0]["ratio/chosen"] == 1.0

    def test_an_optimizer_step_waits_once(self, gpu, tmp_path):
        """Forward and backward passes wait for nothing; `training/numerics` reads one flag before the update."""
        trainer = spo_trainer(tmp_path, gradient_accumulation_steps=2, logging_strategy="no")
        micro_steps = counting(gpu, trainer, "training_step")
        checks = counting(gpu, trainer.guard, "check_step")
        trainer.train()
        assert micro_steps == [[], [], [], []]
        assert [[wait.kind for wait in waits] for waits in checks] == [["read"], ["read"]]

    def test_a_rollout_waits_no_more_for_more_steps(self, gpu, tmp_path):
        """docs/performance.md: the host waits for the scores of a rollout, not for its steps."""
        model, found = reward_model(tmp_path), []
        for num_inference_steps in (4, 8):
            trainer = spo_trainer(tmp_path, model, num_inference_steps=num_inference_steps)
            trainer.rollout(PROMPTS)  # prompts are encoded from here on
            rollouts = counting(gpu, trainer, "rollout")
            trainer.rollout(PROMPTS)
            found.append(Counter(wait.kind for wait in rollouts[0]))
        assert found[0] == found[1], found
        # Scores, and with the device idle the candidates that went on; `rollout` itself waits once to take the time.
        assert found[0]["read"] <= 2 and found[0]["search"] == 0 and found[0]["synchronize"] <= 1, rollouts

    @pytest.mark.parametrize(
        ("make_pipeline", "waits_per_call"),
        [
            (tiny_sd3_pipeline, 0),
            (tiny_flux_pipeline, 0),
            (tiny_flux2_klein_pipeline, 0),
            (tiny_z_image_pipeline, 0),
            (
                tiny_qwen_image_pipeline,
                1,
            ),  # where prompts differ in length: a number that diffusers' transformer copies
        ],
        ids=lambda value: getattr(value, "__name__", ""),
    )
    def test_a_flow_model_waits_as_little(self, gpu, tmp_path, make_pipeline, waits_per_call):
        """
        Regressions: whether a step branches, the positions of FLUX.2's tokens and the statistics of Qwen-Image's VAE went
        to the device from a tensor on the CPU, in every step; the lengths of Z-Image's prompts were read from their masks in
        every call. Counted is all that happens in a call, also what diffusers' own transformers do: that of Z-Image waits
        for nothing, that of Qwen-Image copies one number where it gets a mask.
        """
        model, found = reward_model(tmp_path), []
        settings = {"height": 32, "width": 32, "branch_start_step": 0, "logging_strategy": "no"}
        for num_inference_steps in (4, 8):
            trainer = spo_trainer(
                tmp_path,
                model,
                make_pipeline(tmp_path),
                num_inference_steps=num_inference_steps,
                max_steps=1,
                **settings,
            )
            trainer.rollout(PROMPTS)
            calls, predict = [], trainer.pipeline.predict
            trainer.pipeline.predict = lambda *args, calls=calls, predict=predict: calls.append(1) or predict(*args)
            rollouts = counting(gpu, trainer, "rollout")
            trainer.rollout(PROMPTS)
            found.append(len(rollouts[0]) - waits_per_call * len(calls))
            trainer.pipeline.predict = predict
        assert found[0] == found[1] <= 4, rollouts
        micro_steps = counting(gpu, trainer, "training_step")
        trainer.train()
        assert [len(waits) for waits in micro_steps] == [2 * waits_per_call]  # policy and reference

    def test_transitions_of_their_own_wait_for_nothing(self, gpu, tmp_path):
        """Inside a branch of several steps the loser has an x_t of its own, and its prompt is one row more of the batch."""
        settings = {"height": 32, "width": 32, "branch_start_step": 0, "num_inner_steps": 2, "logging_strategy": "no"}
        trainer = spo_trainer(tmp_path, pipeline=tiny_z_image_pipeline(tmp_path), max_steps=1, **settings)
        sizes, predict = [], trainer.pipeline.predict
        trainer.pipeline.predict = lambda latents, *args: sizes.append(len(latents)) or predict(latents, *args)
        micro_steps = counting(gpu, trainer, "training_step")
        trainer.train()
        assert micro_steps == [[]]
        assert sizes[-1] > trainer.args.per_device_train_batch_size

    @pytest.mark.parametrize("make_pipeline", [tiny_sd_pipeline, tiny_sdxl_pipeline], ids=["sd", "sdxl"])
    def test_a_latent_reward_waits_no_more_for_more_steps(self, gpu, tmp_path, make_pipeline):
        """Regression: the size that SDXL is told went to the device at every score."""
        model, found = LatentRewardModel.from_pipeline(make_pipeline(tmp_path)), []
        for num_inference_steps in (4, 8):
            trainer = spo_trainer(
                tmp_path, model, make_pipeline(tmp_path), num_inference_steps=num_inference_steps, height=16, width=16,
                reward_batch_size=3,
            )  # fmt: skip
            trainer.rollout(PROMPTS)
            rollouts = counting(gpu, trainer, "rollout")
            trainer.rollout(PROMPTS)
            found.append(Counter(wait.kind for wait in rollouts[0]))
        assert found[0] == found[1] and found[0]["read"] <= 2, found


class TestStepReward:
    @pytest.mark.parametrize(
        "settings",
        [
            {"gradient_accumulation_steps": 2, "caption_loss_coef": 0.5},
            {"bf16": True, "relabel_preferences": True},
            {"fp16": True, "freeze_text_tower": True, "cache_latents": True, "prediction_batch_size": 3},
        ],
        ids=["captions", "bf16-relabelled", "fp16-cached"],
    )
    def test_trains_and_evaluates(self, gpu, tmp_path, settings):
        trainer = step_reward_trainer(tmp_path, eval_strategy="steps", eval_steps=2, **settings)
        assert trainer.args.device == CUDA and trainer.pipeline.device == CUDA
        before = trained_weights(trainer)
        trainer.train()
        trainer.save_model()
        assert [math.isfinite(log["loss"]) for log in train_logs(trainer)] == [True, True]
        evaluation = [log for log in trainer.state.log_history if "eval_loss" in log][-1]
        assert {"eval_accuracy/t_0", "eval_accuracy/t_501", "eval_margin"} <= evaluation.keys()
        assert any(not torch.equal(before[name], value) for name, value in trained_weights(trainer).items())
        assert StepAwareRewardModel.from_pretrained(tmp_path / "reward").device.type == "cpu"

    def test_with_moving_average_a_resumed_run_is_the_uninterrupted_one(self, gpu, tmp_path):
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
        runs = []
        for checkpoint in (None, str(tmp_path / "reward" / "checkpoint-2")):
            trainer = step_reward_trainer(tmp_path, **settings)
            EMACallback(trainer, decay=0.5)
            trainer.train(resume_from_checkpoint=checkpoint)
            runs.append(trainer)
        names = ("loss", "accuracy", "margin", "mean_reward")
        ends = [train_logs(trainer)[-1] for trainer in runs]
        assert [ends[0][name] for name in names] == [ends[1][name] for name in names]
        expected = trained_weights(runs[0])
        assert all(torch.equal(expected[name], value) for name, value in trained_weights(runs[1]).items())

    def test_an_optimizer_step_waits_once(self, gpu, tmp_path):
        """Images and labels are uploaded; nothing is read but the flag before the update."""
        trainer = step_reward_trainer(tmp_path, gradient_accumulation_steps=2, logging_strategy="no")
        micro_steps = counting(gpu, trainer, "training_step")
        checks = counting(gpu, trainer.guard, "check_step")
        trainer.train()
        kinds = {wait.kind for waits in micro_steps for wait in waits}
        assert len(micro_steps) == 4 and kinds <= {"upload"}, micro_steps
        assert [[wait.kind for wait in waits] for waits in checks] == [["read"], ["read"]]
