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
Necessity: users bring habits of transformers, peft and diffusers, and expect them to work because the trainers are
`transformers.Trainer`s. Each habit is tried here, unless `test_spo_trainer.py` has it (resume, best model, TensorBoard,
full fine-tuning, gradient checkpointing) or `test_pipelines.py` (DoRA on disk).
"""

import huggingface_hub
import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import is_bitsandbytes_available

from trl_spo import SPOTrainer, StepAwareRewardModel, StepRewardTrainer
from trl_spo.training.ema import EMA_NAME, AveragedWeightsMixin, EMACallback

from .testing_utils import (
    PROMPTS,
    brightness_reward,
    changed,
    state_of,
    tiny_clip,
    tiny_sd_pipeline,
    tiny_spo_config,
    tiny_step_reward_config,
)


SETTINGS = {"num_inference_steps": 4, "per_device_train_batch_size": 3, "learning_rate": 1e-2, "max_steps": 2}
LORA = "pytorch_lora_weights.safetensors"


def make_trainer(tmp_path, output="out", **settings):
    names = ("eval_dataset", "metrics", "peft_config", "callbacks")
    arguments = {name: settings.pop(name) for name in names if name in settings}
    config = tiny_spo_config(tmp_path / output, **{**SETTINGS, **settings})
    return SPOTrainer(config, tiny_sd_pipeline(tmp_path), brightness_reward, train_dataset=PROMPTS, **arguments)


def trained_parameters(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def plain_images(pipeline, prompts=PROMPTS[:2], **settings):
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "eta": 1.0, "output_type": "pt", **settings}
    return pipeline(prompts, generator=generators, **settings).images


class TestTrainingArguments:
    def test_strategies_and_limits(self, tmp_path):
        trainer = make_trainer(
            tmp_path,
            max_steps=4,
            logging_steps=2,
            eval_dataset=PROMPTS[:2],
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            save_total_limit=1,
            report_to="tensorboard",
        )
        trainer.train()
        history = trainer.state.log_history
        assert [log["step"] for log in history if "loss" in log] == [2, 4]
        assert [log["step"] for log in history if "eval_reward_mean" in log] == [2, 4]
        assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-4"]
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(next((tmp_path / "out").rglob("events*")).parent))
        events.Reload()
        written = {scalar.step: scalar.value for scalar in events.Scalars("eval/reward_mean")}
        logged = {log["step"]: log["eval_reward_mean"] for log in history if "eval_reward_mean" in log}
        assert written == pytest.approx(logged)

    @pytest.mark.skipif(is_bitsandbytes_available(), reason="asks what happens without bitsandbytes")
    def test_a_missing_bitsandbytes_is_said_before_any_rollout(self, tmp_path):
        with pytest.raises((ImportError, ValueError), match="bitsandbytes"):
            trainer = make_trainer(tmp_path, optim="adamw_bnb_8bit")
            try:
                trainer.train()
            finally:
                assert trainer.pair_loader.num_prompts_seen == 0

    @pytest.mark.parametrize("optim", ["adafactor", "sgd"])
    def test_other_optimizers(self, tmp_path, optim):
        trainer = make_trainer(tmp_path, optim=optim)
        before = trained_parameters(trainer)
        trainer.train()
        assert any(not torch.equal(value, before[name]) for name, value in trained_parameters(trainer).items())
        assert type(trainer.optimizer.optimizer).__name__.lower() == optim

    def test_push_to_hub_uploads_the_folder_that_save_model_wrote(self, tmp_path, monkeypatch):
        """Only the two calls that leave this machine are replaced."""
        import transformers.trainer

        uploads = []

        class Url(str):
            repo_id = "me/spo-run"

        # transformers 4 calls functions of its own module, transformers 5 methods of an `HfApi`
        old = hasattr(transformers.trainer, "create_repo")
        place = transformers.trainer if old else huggingface_hub.HfApi
        monkeypatch.setattr(place, "create_repo", lambda *args, **kwargs: Url("https://hub/me/spo-run"))
        monkeypatch.setattr(place, "upload_folder", lambda *args, **kwargs: uploads.append(kwargs))
        trainer = make_trainer(
            tmp_path, push_to_hub=True, hub_model_id="me/spo-run", hub_strategy="end", hub_token="x", max_steps=1
        )
        trainer.train()
        trainer.push_to_hub()
        assert uploads and {upload["repo_id"] for upload in uploads} == {"me/spo-run"}
        folder = tmp_path / "out"
        assert str(uploads[-1]["folder_path"]) == str(folder)
        assert (folder / LORA).is_file()
        card = (folder / "README.md").read_text()
        assert "library_name: diffusers" in card and "- spo" in card


class TestCallbacks:
    def test_early_stopping(self, tmp_path):
        """A metric that falls from the second evaluation on, with a patience of two."""
        calls = []

        def fading(images, prompts):
            calls.append(len(prompts))
            return torch.full((len(prompts),), {1: 1.0, 2: 3.0}.get(len(calls), 0.0))

        trainer = make_trainer(
            tmp_path,
            max_steps=10,
            eval_dataset=PROMPTS[:2],
            metrics={"fading": fading},
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="fading_mean",
            greater_is_better=True,
            callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        )
        trainer.train()
        assert trainer.state.global_step == 4
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
        best = load_file(tmp_path / "out" / "checkpoint-2" / LORA)
        trainer.save_model()
        assert_equal(load_file(tmp_path / "out" / LORA), best)

    def test_a_callback_can_stop_the_run(self, tmp_path):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == 1

        trainer = make_trainer(tmp_path, max_steps=5, callbacks=[Stop()])
        trainer.train()
        assert trainer.state.global_step == 1


def assert_equal(first: dict, second: dict):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


class WeightsPerStep(TrainerCallback):
    """Remembers the trained parameters after each optimizer step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})


class TestEMA:
    CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2}

    def train(self, tmp_path, output="out", decay=0.5, resume=None, **settings):
        recorder = WeightsPerStep()
        trainer = make_trainer(tmp_path, output, callbacks=[recorder], **{"max_steps": 4, **settings})
        callback = EMACallback(trainer, decay=decay)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, callback, recorder.weights

    def test_average_by_hand(self, tmp_path):
        """Decays of 0, 2/11, 3/12, 4/13 at most: below 0.5, and `decay=0.2` cuts the last two."""
        trainer, _, weights = self.train(tmp_path, decay=0.2)
        average = weights[0]
        for step, decay in ((1, 2 / 11), (2, 0.2), (3, 0.2)):
            average = {n: decay * average[n] + (1 - decay) * weights[step][n] for n in average}
        found = trained_parameters(trainer)
        for name, expected in average.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7)
        assert any(not torch.equal(found[name], weights[-1][name]) for name in found)

    def test_training_does_not_notice(self, tmp_path):
        _, _, weights = self.train(tmp_path, eval_dataset=PROMPTS[:2], eval_strategy="steps", eval_steps=1)
        recorder = WeightsPerStep()
        make_trainer(tmp_path, "plain", max_steps=4, callbacks=[recorder]).train()
        for own, other in zip(weights, recorder.weights, strict=True):
            assert_equal(own, other)

    def test_evaluation_saving_and_the_model_after_training_are_the_average(self, tmp_path):
        trainer, callback, _ = self.train(
            tmp_path, eval_dataset=PROMPTS[:2], eval_strategy="steps", eval_steps=4, **self.CHECKPOINTS
        )
        trainer.save_model()
        saved = load_file(tmp_path / "out" / LORA)
        assert_equal(saved, load_file(tmp_path / "out" / "checkpoint-4" / LORA))
        for shadow, parameter in zip(callback.ema.shadow_params, trained_parameters(trainer).values(), strict=True):
            assert torch.equal(shadow, parameter)
        logged = next(log["eval_reward_mean"] for log in trainer.state.log_history if "eval_reward_mean" in log)
        assert trainer.evaluate()["eval_reward_mean"] == pytest.approx(logged, rel=1e-6)
        # and plain diffusers makes the images of the average
        fresh = tiny_sd_pipeline(tmp_path / "fresh")
        fresh.load_lora_weights(tmp_path / "out")
        torch.testing.assert_close(plain_images(fresh), trainer.generate(PROMPTS[:2]), atol=1e-5, rtol=1e-5)

    def test_what_other_callbacks_see(self, tmp_path):
        """`on_evaluate` sees the average that was evaluated, `on_save` and `on_step_end` the weights of training."""
        seen = {}

        class Looks(TrainerCallback):
            def look(self, event, model):
                weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
                seen.setdefault(event, []).append(weights)

            def on_step_end(self, args, state, control, model=None, **kwargs):
                self.look("step", model)

            def on_evaluate(self, args, state, control, model=None, **kwargs):
                self.look("evaluate", trainer.model)

            def on_save(self, args, state, control, model=None, **kwargs):
                self.look("save", model)

        settings = {
            "max_steps": 3,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_strategy": "steps",
            "save_steps": 3,
        }
        trainer = make_trainer(tmp_path, callbacks=[Looks()], eval_dataset=PROMPTS[:1], **settings)
        methods = set(vars(trainer))
        callback = EMACallback(trainer, decay=0.5)
        assert set(vars(trainer)) - methods <= {"ema", "_checkpoint_writers"}  # no method is replaced
        trainer.train()
        names = list(seen["step"][-1])
        assert_equal(seen["save"][-1], seen["step"][-1])
        assert_equal(seen["evaluate"][-1], dict(zip(names, callback.ema.shadow_params, strict=True)))
        assert any(not torch.equal(seen["evaluate"][-1][name], seen["save"][-1][name]) for name in names)

    def test_a_rollout_in_the_midst_of_training_uses_the_weights_and_generate_the_average(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=2)
        callback = EMACallback(trainer, decay=0.5)
        before = trainer.generate(PROMPTS[:1])
        latents = trainer.rollout(PROMPTS[:1]).chosen_prev_latents
        for parameter in trainer.model.parameters():
            parameter.data.add_(0.3 * parameter.requires_grad)
        assert torch.equal(trainer.generate(PROMPTS[:1]), before)
        assert not torch.equal(trainer.rollout(PROMPTS[:1]).chosen_prev_latents, latents)
        with trainer.weights_for_evaluation():
            assert torch.equal(trainer.rollout(PROMPTS[:1]).chosen_prev_latents, latents)
        callback.adopt()
        assert not torch.equal(trainer.generate(PROMPTS[:1]), before)

    def test_of_another_trainer(self, tmp_path):
        """Evaluation, prediction and saving of any `Trainer`; its checkpoints resume with both kinds of weights."""

        class Regression(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(1, 1)

            def forward(self, x, labels):
                output = self.layer(x)
                return {"loss": ((output - labels) ** 2).mean(), "logits": output}

        class AveragedTrainer(AveragedWeightsMixin, Trainer):
            pass

        def train(folder, resume=None):
            torch.manual_seed(0)
            settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 0.3, "report_to": "none"}
            args = TrainingArguments(str(tmp_path / folder), use_cpu=True, disable_tqdm=True, **settings)
            rows = [{"x": torch.tensor([i / 4]), "labels": torch.tensor([i / 2])} for i in range(8)]
            recorder = WeightsPerStep()
            trainer = AveragedTrainer(Regression(), args, train_dataset=rows, eval_dataset=rows, callbacks=[recorder])
            callback = EMACallback(trainer, decay=0.5)
            trainer.train(resume_from_checkpoint=resume)
            return trainer, callback, recorder.weights

        whole, callback, weights = train("whole")
        saved = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
        assert_equal(saved, dict(zip(weights[0], callback.ema.shadow_params, strict=True)))
        again, _, later = train("again", resume=str(tmp_path / "whole" / "checkpoint-2"))
        assert_equal(later[-1], weights[-1])
        average = again.predict(again.eval_dataset).predictions
        for parameter in again.model.parameters():
            parameter.data.zero_()
        assert (again.predict(again.eval_dataset).predictions == average).all()
        assert again.evaluate()["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"])

    def test_resuming_takes_up_weights_and_average(self, tmp_path):
        whole, _, weights = self.train(tmp_path, **self.CHECKPOINTS)
        assert (tmp_path / "out" / "checkpoint-2" / EMA_NAME).is_file()
        again, callback, later = self.train(tmp_path, "again", resume=str(tmp_path / "out" / "checkpoint-2"))
        assert_equal(later[-1], weights[-1])
        assert_equal(trained_parameters(again), trained_parameters(whole))
        assert callback.ema.optimization_step == 4

    def test_the_best_model_is_an_average(self, tmp_path):
        values = iter([1.0, 5.0, 2.0, 0.0])
        trainer, _, _ = self.train(
            tmp_path,
            eval_dataset=PROMPTS[:1],
            metrics={"score": lambda images, prompts: torch.full((len(prompts),), next(values))},
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="score_mean",
        )
        trainer.save_model()
        assert_equal(load_file(tmp_path / "out" / LORA), load_file(tmp_path / "out" / "checkpoint-2" / LORA))

    def test_of_the_reward_model(self, tmp_path):
        folder = tiny_clip(tmp_path)
        images = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
        rows = {"caption": PROMPTS, "jpg_0": [images[0]] * 6, "jpg_1": [images[1]] * 6}
        rows |= {"label_0": [1.0] * 6, "label_1": [0.0] * 6}
        config = tiny_step_reward_config(
            tmp_path / "reward", max_steps=3, per_device_train_batch_size=3, learning_rate=1e-2
        )
        recorder = WeightsPerStep()
        trainer = StepRewardTrainer(
            config,
            tiny_sd_pipeline(tmp_path),
            StepAwareRewardModel.from_clip(folder, processor=folder),
            train_dataset=Dataset.from_dict(rows),
            callbacks=[recorder],
        )
        callback = EMACallback(trainer, decay=0.9)
        trainer.train()
        trainer.save_model()
        saved = StepAwareRewardModel.from_pretrained(tmp_path / "reward")
        names = [name for name, value in trainer.model.named_parameters() if value.requires_grad]
        for name, shadow in zip(names, callback.ema.shadow_params, strict=True):
            assert torch.equal(saved.get_parameter(name), shadow), name
        assert any(not torch.equal(saved.get_parameter(name), recorder.weights[-1][name]) for name in names)

    def test_bad_input(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=1)
        with pytest.raises(ValueError, match=r"`decay` must be in \[0, 1\), got 1.0"):
            EMACallback(trainer, decay=1.0)
        with pytest.raises(TypeError, match="or a `Trainer` with `AveragedWeightsMixin`, got `Trainer`"):
            EMACallback(Trainer(torch.nn.Linear(1, 1), trainer.args))
        trainer.is_fsdp_enabled = True  # what a sharded reward trainer says of itself
        with pytest.raises(ValueError, match="does not work with FSDP"):
            EMACallback(trainer)
        trainer.is_fsdp_enabled = False
        assert trainer.ema is None
        EMACallback(trainer)
        with pytest.raises(ValueError, match="has an `EMACallback` already"):
            EMACallback(trainer)
        trainer.ema = None
        trainer.train()
        with pytest.raises(ValueError, match="must be added before training"):
            EMACallback(trainer)


ADAPTERS = {
    "dora": {"r": 2, "use_dora": True, "target_modules": ["to_q", "to_v"]},
    "rank_pattern": {"r": 2, "rank_pattern": {"attn2.to_k": 3}, "alpha_pattern": {"attn2.to_k": 6}},
    "rslora": {"r": 2, "lora_alpha": 4, "use_rslora": True},
    "convolutions": {"r": 2, "target_modules": ["to_q", "conv1"]},
}


class TestAdapters:
    @pytest.mark.parametrize("name", ADAPTERS)
    def test_variants_train_and_load_in_plain_diffusers(self, tmp_path, name):
        settings = {"target_modules": ["to_q", "to_k"], "lora_alpha": 2, **ADAPTERS[name]}
        trainer = make_trainer(tmp_path, peft_config=LoraConfig(**settings), learning_rate=5e-2)
        frozen = {part: state_of(module) for part, module in trainer.pipeline.frozen_modules().items()}
        trainer.train()
        assert trainer.state.log_history[0]["ratio/chosen"] == 1.0
        for part, before in frozen.items():
            assert not changed(before, trainer.pipeline.frozen_modules()[part]), part
        trainer.save_model()
        # No layer of the text encoder is in the file, though `to_q`-like names could be.
        keys = load_file(tmp_path / "out" / LORA)
        assert keys and all(key.startswith("unet.") for key in keys)
        trained = trainer.generate(PROMPTS[:2])
        fresh = tiny_sd_pipeline(tmp_path / "fresh")
        base = plain_images(fresh)
        fresh.load_lora_weights(tmp_path / "out")
        assert (trained - base).abs().max() > 1e-3
        torch.testing.assert_close(plain_images(fresh), trained, atol=1e-4, rtol=1e-4)

    def test_full_fine_tuning_in_a_plain_pipeline(self, tmp_path):
        trainer = make_trainer(tmp_path, use_peft=False)
        trainer.train()
        trainer.save_model()
        fresh = tiny_sd_pipeline(tmp_path / "fresh")
        base = plain_images(fresh)
        fresh.unet = type(fresh.unet).from_pretrained(tmp_path / "out", subfolder="unet")
        assert (plain_images(fresh) - base).abs().max() > 1e-3
        torch.testing.assert_close(plain_images(fresh), trainer.generate(PROMPTS[:2]), atol=1e-5, rtol=1e-5)


class TestSampling:
    def test_negative_prompts_reach_rollout_loss_and_evaluation(self, tmp_path):
        plain = make_trainer(tmp_path, "plain", max_steps=1)
        negative = make_trainer(tmp_path, "negative", max_steps=1, negative_prompt="a blue dog")
        pairs = [trainer.rollout(PROMPTS[:1]) for trainer in (plain, negative)]
        assert not torch.equal(pairs[0].chosen_prev_latents, pairs[1].chosen_prev_latents)
        inputs = {"pairs": pairs[0], "num_pairs": len(pairs[0]), "num_micro_batches": 1}
        for trainer in (plain, negative):
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.data.add_(0.05)
        assert not torch.equal(*(trainer.compute_loss(trainer.model, inputs) for trainer in (plain, negative)))
        expected = plain_images(negative.pipeline.sd_pipeline, negative_prompt=["a blue dog"] * 2)
        torch.testing.assert_close(negative.generate(PROMPTS[:2]), expected, atol=1e-5, rtol=1e-5)

    def test_images_that_are_not_square(self, tmp_path):
        seen = []

        def reward(images, prompts, timesteps):
            seen.append(tuple(images.shape[-2:]))
            return brightness_reward(images, prompts, timesteps)

        config = tiny_spo_config(tmp_path / "out", height=8, width=24, **SETTINGS)
        trainer = SPOTrainer(config, tiny_sd_pipeline(tmp_path), reward, train_dataset=PROMPTS)
        trainer.train()
        assert set(seen) == {(8, 24)}
        images = trainer.generate(PROMPTS[:2])
        assert images.shape == (2, 3, 8, 24)
        expected = plain_images(trainer.pipeline.sd_pipeline, height=8, width=24)
        np.testing.assert_allclose(images, expected, atol=1e-5)
