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
Necessity: the promises of `SPOTrainer` (ratio 1 and ln 2 before the first update, one seed is one run, resume, fixed
evaluation images, memory within its estimate, no waits) are proven on CPUs by the rest of the suite, and users run on GPUs,
where kernels, dtypes, generators and the driver are others.
"""

import contextlib
import math
import shutil
import warnings

import pytest
import torch

from trl_spo import EMACallback, SPOTrainer, StepAwareRewardModel
from trl_spo.training.memory import denoiser_bytes, scoring_bytes

from ..testing_utils import (
    PROMPTS,
    brightness_reward,
    device_settings,
    tiny_clip,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
    tiny_spo_config,
    train_logs,
)


MIB = 2**20
# Weights of the pipeline, and what the config says about autocast.
PRECISIONS = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "float16": (torch.float16, {}),
    "bf16-autocast": (torch.float32, {"bf16": True}),
    "fp16-autocast": (torch.float32, {"fp16": True}),
}


def make_trainer(
    folder, device, reward=None, precision="float32", make_pipeline=tiny_sd_pipeline, output="out", **settings
):
    """A trainer on the device, by default with a real reward model, and without compilation, which has its own test."""
    dtype, autocast = PRECISIONS[precision]
    if "fp16" in autocast and device == "cpu":
        pytest.skip("transformers refuses fp16 on a CPU.")
    if reward is None:
        clip = tiny_clip(folder)
        reward = StepAwareRewardModel.from_clip(clip, processor=clip)
    compiles = None if settings.get("torch_compile") else False
    defaults = {"num_inference_steps": 4, "max_steps": 3, "compile_regions": compiles, **device_settings(device)}
    config = tiny_spo_config(folder / output, **{**defaults, **autocast, **settings})
    pipeline = make_pipeline(folder).to(dtype=dtype)
    return SPOTrainer(config, pipeline, reward, train_dataset=PROMPTS, eval_dataset=PROMPTS[:3])


def skip_if_pretended(device: str):
    if device == "pretended":
        pytest.skip("Memory is estimated with fake tensors, which cannot stand for those of the pretended GPU.")


def weights(trainer) -> torch.Tensor:
    """All trained weights as one vector on the CPU."""
    trained = [p.detach().float().cpu().flatten() for p in trainer.model.parameters() if p.requires_grad]
    return torch.cat(trained)


@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_first_step_has_ratio_one_and_loss_ln_two(device, tmp_path, precision, use_peft):
    """Rollout, reference and policy see batches of other sizes, and still compute the same log-probabilities."""
    trainer = make_trainer(
        tmp_path, device, precision=precision, use_peft=use_peft, gradient_accumulation_steps=2,
        rollout_micro_batch_size=5, learning_rate=1e-4,
    )  # fmt: skip
    before = weights(trainer)
    trainer.train()
    first, *_, last = train_logs(trainer)
    assert first["ratio/chosen"] == first["ratio/rejected"] == 1.0
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert first["kl"] == first["approx_kl"] == first["clip_ratio"] == 0.0
    assert math.isfinite(last["loss"]) and first["step_reward/std"] > 0
    if not sum(log["skipped_steps"] for log in train_logs(trainer)):  # a gradient scaler may begin too high
        assert not torch.equal(weights(trainer), before)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.save_model()
    trainer.load_model(tmp_path / "out")


def test_sdxl_with_gradient_checkpointing(device, tmp_path):
    trainer = make_trainer(
        tmp_path, device, precision="bfloat16", make_pipeline=tiny_sdxl_pipeline, gradient_checkpointing=True,
        num_inner_steps=2, max_steps=2,
    )  # fmt: skip
    trainer.train()
    first, second = train_logs(trainer)
    assert first["ratio/chosen"] == 1.0 and math.isfinite(second["loss"])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_seed_repeats_a_rollout(device, tmp_path, precision):
    """Noise comes from a generator on the device, which nothing else draws from."""
    trainer = make_trainer(tmp_path, device, precision=precision)
    rollouts = []
    for seed in (7, 7, 8):
        torch.randn(3, device=trainer.args.device)
        rollouts.append(trainer.rollout(PROMPTS[:3], seed=seed))
    first, second, other = rollouts
    for name, value in first.tensors().items():
        assert torch.equal(value, getattr(second, name)), name
    assert not torch.equal(first.latents, other.latents)


def test_a_resumed_run_is_the_uninterrupted_one(device, tmp_path):
    """Up to what the sums of a GPU leave open; forgetting the optimizer alone would move the weights ten times as far."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "output": "whole"}
    whole = make_trainer(tmp_path, device, brightness_reward, **settings)
    EMACallback(whole, decay=0.5)
    start = weights(whole)
    whole.train()
    resumed = make_trainer(tmp_path, device, brightness_reward, **settings)
    EMACallback(resumed, decay=0.5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    ends = [train_logs(trainer)[-1] for trainer in (whole, resumed)]
    for name in ("loss", "reward_mean", "logps/chosen", "num_pairs_seen"):
        assert ends[1][name] == pytest.approx(ends[0][name], rel=1e-3), name
    way = (weights(whole) - start).norm()
    assert way > 0 and (weights(resumed) - weights(whole)).norm() < 0.05 * way


def test_evaluation_images_have_fixed_seeds(device, tmp_path):
    """The same images for every batch size, and on every device, as their noise is drawn on the CPU."""
    trainer = make_trainer(tmp_path, device, brightness_reward)
    images = trainer.generate(PROMPTS[:3])
    other_seeds = trainer.generate(PROMPTS[:3], seeds=[10, 11, 12])
    difference = (images - other_seeds).abs().mean()
    assert images.device.type == "cpu" and torch.equal(images, trainer.generate(PROMPTS[:3]))
    trainer.args.per_device_eval_batch_size = 1
    assert (images - trainer.generate(PROMPTS[:3])).abs().mean() < 0.05 * difference
    assert trainer.evaluate()["eval_reward_mean"] == trainer.evaluate()["eval_reward_mean"]
    if device != "cpu":
        on_cpu = make_trainer(tmp_path, "cpu", brightness_reward).generate(PROMPTS[:3])
        assert (images - on_cpu).abs().mean() < 0.05 * difference


class TestMemory:
    """
    Peaks as the allocator counts them; libraries take workspaces besides, so small batches would say nothing. On a CPU,
    where nothing is counted, this only runs.
    """

    @staticmethod
    def measured(function, device: str) -> int:
        """Bytes that `function` takes at its peak, its result included."""
        if device != "cuda":
            function()
            return 0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = function()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def test_phases_stay_within_their_estimates(self, device, tmp_path):
        skip_if_pretended(device)
        trainer = make_trainer(tmp_path, device)
        pipeline, shape, number = trainer.pipeline, (4, 64, 64), 64 if device == "cuda" else 1
        embeds = pipeline.encode_prompt(PROMPTS[:1])
        rows, latents = embeds.repeat(number), torch.randn(number, *shape, device=device)
        with torch.no_grad():
            phases = {
                "denoiser": (
                    denoiser_bytes(pipeline, embeds, shape, 3.0, number),
                    lambda: pipeline.predict(latents, 501, rows, 3.0),
                ),
                "decoder": (
                    scoring_bytes(pipeline, trainer.reward_model, shape, number),
                    lambda: pipeline.decode_latents(latents),
                ),
            }
            for name, (estimate, run) in phases.items():
                run()  # kernels are chosen, workspaces are taken
                found = self.measured(run, device)
                assert 0 < estimate and found <= 1.25 * estimate + 32 * MIB, (name, found / MIB, estimate / MIB)

    def test_a_budget_holds(self, device, tmp_path):
        """The chunks that a budget allows are run; a rollout adds its pool of latents, which is small here."""
        skip_if_pretended(device)
        budget, size = (0.05, 64) if device == "cuda" else (0.002, 16)
        trainer = make_trainer(
            tmp_path, device, memory_budget=budget, height=size, width=size, per_device_rollout_batch_size=6
        )
        trainer.rollout(PROMPTS)
        found = self.measured(lambda: trainer.rollout(PROMPTS), device)
        assert found < 1.25 * budget * 1024 * MIB + 32 * MIB, found / MIB


class TestWaits:
    """As the driver sees them. On a CPU this only runs; `tests/test_two_devices.py` counts on the pretended GPU."""

    @staticmethod
    @contextlib.contextmanager
    def sync_debug_mode(mode: str, device: str):
        if device == "cuda":
            torch.cuda.set_sync_debug_mode(mode)
        try:
            yield
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    def test_forward_and_backward_wait_for_nothing(self, device, tmp_path):
        """The driver raises an error for the first wait inside a micro-batch."""
        trainer = make_trainer(tmp_path, device, gradient_accumulation_steps=2)
        take_step, steps = trainer.training_step, []

        def watched(*args, **kwargs):
            # The first optimizer step may still load kernels and prepare the model.
            watch = len(steps) >= trainer.args.gradient_accumulation_steps
            with self.sync_debug_mode("error", device) if watch else contextlib.nullcontext():
                loss = take_step(*args, **kwargs)
            steps.append(watch)
            return loss

        trainer.training_step = watched
        trainer.train()
        assert steps == [False, False, True, True, True, True]

    def test_a_rollout_waits_no_more_for_more_steps(self, device, tmp_path):
        found = []
        for num_inference_steps in (4, 8):
            trainer = make_trainer(tmp_path, device, num_inference_steps=num_inference_steps)
            trainer.rollout(PROMPTS)
            with warnings.catch_warnings(record=True) as caught, self.sync_debug_mode("warn", device):
                warnings.simplefilter("always")
                trainer.rollout(PROMPTS)
            found.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))
        assert found[1] <= found[0], found
        assert found[0] >= 1 or device != "cuda"  # the scores


def test_compiled_networks_make_the_same_pairs(device, tmp_path):
    """And train from ratio 1; later steps and other batch sizes compile nothing new."""
    import torch._dynamo

    if device != "cuda":
        pytest.skip("The CPU has its own tests of this in tests/test_compilation.py.")
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("torch.compile needs a C compiler.")
    plain = make_trainer(tmp_path, "cuda").rollout(PROMPTS[:3], seed=3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer = make_trainer(tmp_path, "cuda", torch_compile=True, max_steps=2)
    compiled = trainer.rollout(PROMPTS[:3], seed=3)
    torch.testing.assert_close(compiled.latents, plain.latents, atol=2e-2, rtol=2e-2)
    same = [
        (a.selection.chosen == b.selection.chosen).float().mean()
        for a, b in zip(compiled.branches, plain.branches, strict=True)
    ]
    assert torch.stack(same).mean() > 0.9
    trainer.train()
    first, second = train_logs(trainer)
    assert first["ratio/chosen"] == first["ratio/rejected"] == 1.0 and math.isfinite(second["loss"])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    trainer.rollout(PROMPTS[:2])
    trainer.rollout(PROMPTS[:3], seed=5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= graphs + 1
