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
Necessity: `StepRewardTrainer` noises, predicts and decodes with one set of networks and trains another, in two precisions;
on a GPU all of it runs on other kernels than the CPU tests have seen.
"""

import contextlib
import math
import warnings

import pytest
import torch

from trl_spo import EMACallback, StepAwareRewardModel, StepRewardTrainer

from ..testing_utils import (
    PROMPTS,
    device_settings,
    image_pairs,
    tiny_clip,
    tiny_sd_pipeline,
    tiny_step_reward_config,
    train_logs,
)


def make_trainer(folder, device, dtype=torch.float32, output="out", **settings) -> StepRewardTrainer:
    if settings.get("fp16") and device == "cpu":
        pytest.skip("transformers refuses fp16 on a CPU.")
    torch.manual_seed(0)
    clip = tiny_clip(folder)
    defaults = {"eval_timesteps": [0, 501], "torch_compile": False, **device_settings(device)}
    config = tiny_step_reward_config(folder / output, **{**defaults, **settings})
    pipeline = tiny_sd_pipeline(folder).to(dtype=dtype)
    pairs = image_pairs()
    model = StepAwareRewardModel.from_clip(clip, processor=clip)
    return StepRewardTrainer(config, pipeline, model, train_dataset=pairs, eval_dataset=pairs[:3])


def weights(trainer) -> torch.Tensor:
    """All trained weights as one vector on the CPU."""
    return torch.cat([p.detach().cpu().flatten() for p in trainer.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("autocast", [{}, {"bf16": True}, {"fp16": True}], ids=["float32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {"gradient_accumulation_steps": 2, "caption_loss_coef": 0.5}),
        (torch.bfloat16, {"freeze_text_tower": True, "cache_latents": True, "prediction_batch_size": 3}),
    ],
    ids=["whole", "text-frozen"],
)
def test_trains_evaluates_and_loads(device, tmp_path, autocast, dtype, settings):
    trainer = make_trainer(tmp_path, device, dtype, eval_strategy="steps", eval_steps=2, **autocast, **settings)
    before = weights(trainer)
    trainer.train()
    assert [math.isfinite(log["loss"]) for log in train_logs(trainer)] == [True, True]
    if not train_logs(trainer)[-1]["skipped_steps"]:  # a gradient scaler may begin too high
        assert not torch.equal(weights(trainer), before)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    trainer.save_model()
    loaded = StepAwareRewardModel.from_pretrained(tmp_path / "out")
    images, timesteps = torch.zeros(1, 3, 16, 16), torch.tensor([501])
    expected = trainer.model.eval().score(images.to(trainer.args.device), PROMPTS[:1], timesteps).cpu()
    torch.testing.assert_close(loaded.score(images, PROMPTS[:1], timesteps), expected, atol=2e-2, rtol=1e-2)


def test_evaluations_of_one_model_agree(device, tmp_path):
    """Noise and timesteps come from generators on the CPU: the same on every device."""
    trainer = make_trainer(tmp_path, device)
    first, second = trainer.evaluate(), trainer.evaluate()
    names = ("eval_loss", "eval_accuracy", "eval_margin", "eval_accuracy/t_501")
    assert [first[name] for name in names] == [second[name] for name in names]
    if device != "cpu":
        on_cpu = make_trainer(tmp_path, "cpu").evaluate()
        assert first["eval_margin"] == pytest.approx(on_cpu["eval_margin"], rel=0.05, abs=1e-3)


def test_a_resumed_run_is_the_uninterrupted_one(device, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    runs = []
    for checkpoint in (None, str(tmp_path / "out" / "checkpoint-2")):
        trainer = make_trainer(tmp_path, device, **settings)
        EMACallback(trainer, decay=0.5)
        start = weights(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(trainer)
    whole, resumed = runs
    ends = [train_logs(trainer)[-1] for trainer in runs]
    for name in ("loss", "mean_reward"):
        assert ends[1][name] == pytest.approx(ends[0][name], rel=1e-3, abs=1e-5), name
    way = (weights(whole) - start).norm()
    assert way > 0 and (weights(resumed) - weights(whole)).norm() < 0.05 * way


def test_a_micro_batch_waits_for_its_uploads_only(device, tmp_path):
    """Noise, tokens and labels go up, about ten tensors; a wait per pair, or values read back, would be more each time."""
    trainer = make_trainer(tmp_path, device, gradient_accumulation_steps=2, max_steps=3)
    take_step, found = trainer.training_step, []

    def watched(*args, **kwargs):
        with warnings.catch_warnings(record=True) as caught, sync_warnings(device):
            warnings.simplefilter("always")
            loss = take_step(*args, **kwargs)
        found.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))
        return loss

    trainer.training_step = watched
    trainer.train()
    assert len(found) == 6 and max(found[2:]) <= 12, found


@contextlib.contextmanager
def sync_warnings(device: str):
    """The driver warns of each wait; on a CPU there is none."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
