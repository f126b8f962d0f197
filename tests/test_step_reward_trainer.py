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
Why this file exists: training the reward model is a day of GPU time before anyone sees whether SPO works. These tests
run it whole, on real tiny models: the loss it takes steps on, what moves and what must not, that it learns, that a
resumed run is the same run bit for bit, and that what it saves is what `from_pretrained` loads.
"""

import io
import math
from itertools import islice

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback, TrainingArguments

from trl_spo import StepAwareRewardModel, StepRewardConfig, StepRewardTrainer, wrap_pipeline
from trl_spo.losses import caption_contrastive_loss
from trl_spo.noised_pairs import noised_pairs
from trl_spo.preference_collator import StepPreferenceCollator
from trl_spo.preference_labels import relabel_preferences

from .testing_utils import (
    PROMPTS,
    changed,
    ddim_scheduler,
    device_settings,
    image_pairs,
    state_of,
    tiny_clip,
    tiny_sd_pipeline,
    tiny_step_reward_config,
)


def rows(count, **changes):
    """Pairs whose preferred image is the redder one."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for i in range(count):
        red, blue = (int(x) for x in torch.randint(100, 256, (2,), generator=generator))
        better, worse = Image.new("RGB", (16, 16), (red, 40, 0)), Image.new("RGB", (16, 16), (0, 40, blue))
        first = i % 2 == 0
        result.append(
            {
                "caption": PROMPTS[i % len(PROMPTS)],
                "jpg_0": better if first else worse,
                "jpg_1": worse if first else better,
                "label_0": float(first),
                "label_1": float(not first),
                **changes,
            }
        )
    return result


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return wrap_pipeline(tiny_sd_pipeline(tmp_path_factory.mktemp("sd")))


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def make_trainer(pipeline, clip_path, tmp_path):
    def make(
        train_dataset=None, eval_dataset=None, reward_model=None, callbacks=None, preference_model=None, **kwargs
    ):
        torch.manual_seed(0)  # for the timestep embedder, the one part of a fresh model that is random
        return StepRewardTrainer(
            tiny_step_reward_config(tmp_path / "run", **kwargs),
            pipeline,
            StepAwareRewardModel.from_clip(clip_path) if reward_model is None else reward_model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            preference_model=preference_model,
        )

    return make


def encoded(row):
    """A row with JPEG bytes, as a parquet file holds them."""
    result = dict(row)
    for name in ("jpg_0", "jpg_1"):
        buffer = io.BytesIO()
        row[name].save(buffer, format="JPEG")
        result[name] = buffer.getvalue()
    return result


def first_loss(trainer):
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


class TestCaptionLoss:
    def test_by_hand(self):
        """
        Two orthogonal images and the captions (1, 0) and (.6, .8) at scale 2. Logits (images x captions) are
        [[2, 1.2], [0, 1.6]]. Image 0: log(1 + e^-.8); image 1: log(1 + e^-1.6); caption 0 (column 2, 0):
        log(1 + e^-2); caption 1 (column 1.2, 1.6): log(1 + e^-.4). Each pair gets the mean of its two.
        """
        texts = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        losses = caption_contrastive_loss(torch.eye(2), texts, torch.tensor(2.0), ["a", "b"])
        softplus = [math.log1p(math.exp(-x)) for x in (0.8, 1.6, 2.0, 0.4)]
        expected = [(softplus[0] + softplus[2]) / 2, (softplus[1] + softplus[3]) / 2]
        torch.testing.assert_close(losses, torch.tensor(expected))

    def test_the_same_caption_is_no_negative(self):
        images = torch.nn.functional.normalize(torch.randn(3, 4), dim=-1)
        texts = torch.eye(4)[[0, 1, 0]]
        scale = torch.tensor(3.0)
        losses = caption_contrastive_loss(images, texts, scale, ["a", "b", "a"])
        first = caption_contrastive_loss(images[:2], texts[:2], scale, ["a", "b"])
        logits = scale * images @ texts.T
        text_b = -logits[:, 1].log_softmax(0)[1]  # caption b still has both images of caption a against it
        image_b = -logits[1, :2].log_softmax(0)[1]
        assert torch.equal(caption_contrastive_loss(images, texts[[0, 0, 0]], scale, ["a"] * 3), torch.zeros(3))
        torch.testing.assert_close(losses[0], first[0])
        assert losses[1] > (text_b + image_b) / 2  # and image b has caption a against it twice


class TestLoss:
    def test_against_the_formula(self, make_trainer, pipeline):
        """A win, a loss and a tie with weights 1/4, 1 and 1/2: the loss of the first step, computed from scores."""
        data = rows(3)
        data[1].update(label_0=0.0, label_1=1.0)
        data[2].update(label_0=0.5, label_1=0.5)
        for row, n in zip(data, (4, 1, 2), strict=True):
            row["num_example_per_prompt"] = n
        trainer = make_trainer(data)
        batch = StepPreferenceCollator(16)(data)
        loss = trainer.compute_loss(trainer.model, batch).item()

        generator = trainer._generator(0, 0, 0)
        timesteps = torch.randint(0, 1000, (3,), generator=generator)
        images = noised_pairs(pipeline, batch, timesteps, 5.0, generator)
        s0, s1 = (trainer.model.score(x, batch["prompts"], timesteps).tolist() for x in images)
        win = math.log1p(math.exp(s1[0] - s0[0]))
        lose = math.log1p(math.exp(s0[1] - s1[1]))
        tie = (math.log1p(math.exp(s1[2] - s0[2])) + math.log1p(math.exp(s0[2] - s1[2]))) / 2 - math.log(2)
        assert loss == pytest.approx((0.25 * win + lose + 0.5 * tie) / 1.75, rel=1e-4)

    def test_weights_are_normalised_over_the_whole_step(self, make_trainer, monkeypatch):
        """One batch of 4 pairs with unequal weights, and the same 4 in two halves: the same update."""
        data = rows(4)
        for row, n in zip(data, (1, 8, 8, 8), strict=True):
            row["num_example_per_prompt"] = n

        def fixed_noise(self, model, inputs, timesteps, generator):
            images = torch.cat([inputs["images_0"], inputs["images_1"]])
            output = model(images, prompts=inputs["prompts"] * 2, timesteps=500)
            return output, *output.scores.chunk(2), torch.ones(len(timesteps), dtype=torch.bool)

        monkeypatch.setattr(StepRewardTrainer, "_score_pairs", fixed_noise)
        results = []
        for size, accumulation in ((4, 1), (2, 2)):
            trainer = make_trainer(
                data,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                max_steps=1,
                optim="sgd",
                max_grad_norm=0.0,
            )
            trainer.train()
            results.append((state_of(trainer.model), trainer.state.log_history[0]["loss"]))
        assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)
        for name, value in results[0][0].items():
            torch.testing.assert_close(value, results[1][0][name], rtol=1e-4, atol=1e-6)

    def test_caption_loss_is_added_and_logged(self, make_trainer):
        data = rows(4)
        plain, mixed = make_trainer(data), make_trainer(data, caption_loss_coef=0.5)
        batch = StepPreferenceCollator(16)(data)
        losses = [trainer.compute_loss(trainer.model, batch).item() for trainer in (plain, mixed)]
        logged = mixed._metrics.pop()
        assert logged["preference_loss"] == pytest.approx(losses[0], rel=1e-5)
        assert losses[1] == pytest.approx(losses[0] + 0.5 * logged["caption_loss"], rel=1e-5)
        assert logged["caption_loss"] > 0

    def test_a_blank_batch_has_loss_zero(self, make_trainer):
        trainer = make_trainer(rows(2))
        batch = StepPreferenceCollator(16)(rows(1, jpg_0=b"broken"))
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        assert loss.item() == 0
        assert "accuracy" not in trainer._metrics.pop()

    def test_timesteps_stay_in_range(self, make_trainer):
        generator = torch.Generator().manual_seed(0)
        drawn = make_trainer(rows(2), min_timestep=3, max_timestep=5)._draw_timesteps(200, generator)
        assert set(drawn.tolist()) == {3, 4, 5}
        drawn = make_trainer(rows(2), timesteps=[0, 951])._draw_timesteps(100, generator)
        assert set(drawn.tolist()) == {0, 951}

    def test_every_forward_pass_draws_anew_but_predictably(self, make_trainer):
        """Two passes of one step and one of the next: three different draws, which a second trainer repeats."""
        draws = []
        for _ in range(2):
            trainer = make_trainer(rows(2))
            for step in (0, 0, 1):
                trainer.state.global_step = step
                draws.append(trainer._draw_timesteps(6, trainer._next_train_generator()).tolist())
        assert draws[:3] == draws[3:]
        assert draws[0] != draws[1] != draws[2] != draws[0]


class TestTraining:
    def test_moves_the_reward_model_and_nothing_else(self, make_trainer, pipeline):
        modules = {"denoiser": pipeline.denoiser, **pipeline.frozen_modules()}
        before = {name: state_of(module) for name, module in modules.items()}
        trainer = make_trainer(rows(8))
        start = state_of(trainer.model)
        trainer.train()
        moved = changed(start, trainer.model)
        for part in ("encoder.layers.0.adaLN", "vision_model.adaLN", "text_model", "visual_projection", "logit_scale"):
            assert any(part in name for name in moved), part
        # the embedder sits behind weights that start at 0, so it moves from the second step on
        assert any("t_embedder" in name for name in moved)
        for name, module in modules.items():
            assert not changed(before[name], module)
            assert not module.training and all(parameter.grad is None for parameter in module.parameters())

    def test_a_frozen_text_tower_stays(self, make_trainer):
        trainer = make_trainer(rows(8), freeze_text_tower=True)
        start = state_of(trainer.model)
        trainer.train()
        moved = changed(start, trainer.model)
        assert moved and not any("text" in name for name in moved)

    def test_learns_eight_pairs(self, make_trainer, pipeline):
        """
        The random VAE of the fixture draws latents with 100 times more noise than content, and no reward model can
        learn from them. Here its posterior is sharp, as a trained one's is.
        """
        sharp = {name: value.clone() for name, value in state_of(pipeline.vae).items()}
        sharp["quant_conv.weight"][4:] = 0
        sharp["quant_conv.bias"][4:] = -30
        sharp["encoder.conv_out.weight"] *= 10
        before = state_of(pipeline.vae)
        pipeline.vae.load_state_dict(sharp)
        trainer = make_trainer(
            rows(8), rows(8), max_steps=10, per_device_train_batch_size=8, timesteps=[1, 51], eval_timesteps=[1, 51]
        )
        trainer.train()
        metrics = trainer.evaluate()
        pipeline.vae.load_state_dict(before)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[0] > 0.2 and losses[-1] < 0.02
        assert metrics["eval_accuracy/t_1"] == metrics["eval_accuracy/t_51"] == 1

    def test_logs(self, make_trainer):
        trainer = make_trainer(rows(8), max_steps=2, logging_steps=2, timesteps=[100, 950], accuracy_timestep_bins=2)
        trainer.train()
        (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert entry["min_reward"] <= entry["mean_reward"] <= entry["max_reward"]
        # 8 untied pairs in two steps: the accuracy is a multiple of 1/8, the mean of the two bins' own
        assert (entry["accuracy"] * 8) % 1 == 0
        bins = [entry["accuracy/t_0_499"], entry["accuracy/t_500_999"]]
        assert min(bins) <= entry["accuracy"] <= max(bins)
        assert {"margin", "grad_norm", "learning_rate"} <= entry.keys()

    def test_resuming_is_the_same_run(self, make_trainer, tmp_path):
        kwargs = {"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
        whole = make_trainer(rows(6), output_dir=str(tmp_path / "whole"), **kwargs)
        whole.train()

        class StopAtTwo(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_save = control.should_training_stop = state.global_step == 2

        halved = {"output_dir": str(tmp_path / "halved"), **kwargs}
        make_trainer(rows(6), callbacks=[StopAtTwo()], **halved).train()
        resumed = make_trainer(rows(6), **halved)
        resumed.train(resume_from_checkpoint=str(tmp_path / "halved" / "checkpoint-2"))
        assert resumed.state.global_step == 4
        assert not changed(state_of(whole.model), resumed.model)
        last = [[e for e in t.state.log_history if "loss" in e][-1] for t in (whole, resumed)]
        assert last[0]["loss"] == last[1]["loss"] and last[0]["mean_reward"] == last[1]["mean_reward"]

    def test_the_seed_decides(self, make_trainer):
        results = []
        for seed in (1, 1, 2):
            trainer = make_trainer(rows(4), seed=seed, max_steps=1)
            trainer.train()
            results.append([e for e in trainer.state.log_history if "loss" in e][0]["loss"])
        assert results[0] == results[1] != results[2]

    def test_saved_folder_is_a_reward_model(self, make_trainer, tmp_path):
        trainer = make_trainer(rows(4), save_strategy="steps", save_steps=2)
        trainer.train()
        trainer.save_model(tmp_path / "final")
        images = torch.rand(2, 3, 16, 16) * 2 - 1
        expected = trainer.model.eval().score(images, PROMPTS[:2], 300)
        for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-2"):
            loaded = StepAwareRewardModel.from_pretrained(folder)
            assert torch.equal(loaded.score(images, PROMPTS[:2], 300), expected)

    def test_checkpointing_and_bf16(self, make_trainer):
        trainer = make_trainer(rows(4), gradient_checkpointing=True, bf16=True)
        trainer.model.to(torch.float32)
        trainer.train()
        assert trainer.model.dtype == torch.float32
        assert all(math.isfinite(e["loss"]) for e in trainer.state.log_history if "loss" in e)

    def test_half_precision_weights_are_trained_in_float32(self, make_trainer, clip_path):
        """A step of 3e-6 changes no bfloat16 weight near 0.02."""
        model = StepAwareRewardModel.from_clip(clip_path).to(torch.bfloat16)
        assert make_trainer(rows(2), reward_model=model).model.dtype == torch.float32


class TestEvaluation:
    def test_accuracy_by_timestep_repeats_and_leaves_out_ties(self, make_trainer):
        """
        At t = 0 the score sees the clean images, so the accuracy is that of plain scoring. The labels are set such
        that three of four preferences agree with the model; the fifth pair is a tie.
        """
        data = rows(5)
        trainer = make_trainer(rows(1))
        batch = StepPreferenceCollator(16)(data)
        s0, s1 = (trainer.model.score(batch[name], batch["prompts"], 0) for name in ("images_0", "images_1"))
        for i, (row, first) in enumerate(zip(data, (s0 > s1).tolist(), strict=True)):
            first = first if i < 3 else not first
            row.update(label_0=float(first), label_1=float(not first))
        data[4].update(label_0=0.5, label_1=0.5)
        trainer = make_trainer(eval_dataset=data, per_device_eval_batch_size=3)
        first = trainer.evaluate()
        assert {f"eval_accuracy/t_{t}" for t in (0, 251, 501, 701, 951)} <= first.keys()
        assert first["eval_accuracy/t_0"] == 0.75
        by_timestep = [value for name, value in first.items() if "accuracy/t_" in name]
        assert first["eval_accuracy"] == pytest.approx(sum(by_timestep) / 5)
        again = trainer.evaluate()
        assert all(first[name] == again[name] for name in first if "runtime" not in name and "second" not in name)
        assert trainer.state.log_history[-1]["eval_accuracy/t_951"] == first["eval_accuracy/t_951"]

    def test_evaluation_does_not_disturb_training(self, make_trainer):
        models = []
        for kwargs in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
            trainer = make_trainer(rows(4), rows(2), max_steps=3, **kwargs)
            trainer.train()
            models.append(trainer.model)
            assert all("accuracy/t_0_199" not in e for e in trainer.state.log_history if "eval_loss" in e)
        assert not changed(state_of(models[0]), models[1])

    def test_other_datasets_and_prefixes(self, make_trainer):
        trainer = make_trainer(rows(2))
        metrics = trainer.evaluate(rows(2), metric_key_prefix="test")
        assert {"test_loss", "test_accuracy/t_501"} <= metrics.keys()
        trainer = make_trainer(eval_dataset={"a": rows(2), "b": rows(2)})
        assert {"eval_a_accuracy/t_0", "eval_b_margin"} <= trainer.evaluate().keys()


def red_preference(images, prompts):
    """(B, 3, H, W) in [0, 1] -> 10 times the red."""
    return 10 * images[:, 0].mean((1, 2))


def test_the_config_of_the_other_trainer():
    with pytest.raises(TypeError, match="`config` must be a `StepRewardConfig`, got `TrainingArguments`"):
        StepRewardTrainer(TrainingArguments(output_dir="unused"), "a/pipeline/never/loaded", None, rows(1))


def test_the_config_of_the_user_stays(pipeline, clip_path, tmp_path):
    config = tiny_step_reward_config(tmp_path, accelerator_config={"even_batches": False})
    before = config.accelerator_config.to_dict()
    model = StepAwareRewardModel.from_clip(clip_path)
    StepRewardTrainer(config, pipeline, model, train_dataset=image_pairs())
    assert config.accelerator_config.to_dict() == before


def test_timesteps_that_say_nothing_about_the_image_are_refused(clip_path, tmp_path):
    """Zero terminal SNR with predicted noise: x_0 at t = 999 would be a division by zero in every batch that draws it."""
    scheduler = ddim_scheduler(rescale_betas_zero_snr=True)
    reward_model = StepAwareRewardModel.from_clip(clip_path)
    for settings in ({}, {"max_timestep": 998, "eval_timesteps": [0, 999]}):
        with pytest.raises(ValueError, match="timestep 999"):
            StepRewardTrainer(
                tiny_step_reward_config(tmp_path, **settings),
                tiny_sd_pipeline(tmp_path, scheduler=scheduler),
                reward_model,
                train_dataset=image_pairs(),
            )


class TestDataOptions:
    def test_a_stream_is_read_again_until_max_steps(self, make_trainer):
        """Regression: a stream shorter than the run ended it with a stack of no tensors."""
        stream = Dataset.from_list([encoded(row) for row in rows(4)]).to_iterable_dataset()
        trainer = make_trainer(stream, max_steps=5, per_device_train_batch_size=2)
        trainer.train()
        assert trainer.state.global_step == 5

    @pytest.mark.parametrize("streaming", [False, True])
    def test_trains_from_a_parquet_file(self, make_trainer, tmp_path, streaming, monkeypatch):
        """Nine rows: one has no label, one equal images, and without a stream one is the second of its caption."""
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
        data = [{**encoded(row), "has_label": True, "are_different": True} for row in rows(9)]
        data[0]["has_label"], data[1]["are_different"] = False, False
        Dataset.from_list(data).to_parquet(tmp_path / "pairs.parquet")
        options = {"only_different": True, "max_pairs_per_prompt": None if streaming else 1}
        trainer = make_trainer(
            dataset_name=str(tmp_path / "pairs.parquet"), dataset_streaming=streaming, max_steps=2, **options
        )
        captions = [row["caption"] for row in trainer.train_dataset]
        # the captions of rows 2 to 8 are PROMPTS 2, 3, 4, 5, 0, 1 and 2 again
        assert sorted(captions) == sorted(PROMPTS + [PROMPTS[2]] * streaming)
        seen = [prompt for batch in islice(trainer.get_train_dataloader(), 4) for prompt in batch["prompts"]]
        assert sorted(seen) != seen and sorted(seen) != [row["caption"] for row in data[2:]]  # shuffled
        trainer.train()
        assert trainer.state.global_step == 2 and math.isfinite(first_loss(trainer))
        # a default of accelerate sends tensors from one process to the others, and prompts are none
        assert trainer.accelerator.dispatch_batches is False

    def test_pairs_per_prompt_are_limited_in_training_only(self, make_trainer):
        trainer = make_trainer(rows(8), rows(8), max_pairs_per_prompt=1)
        assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (6, 8)

    def test_a_sample_is_looked_at_before_training(self, make_trainer):
        data = [encoded(row) for row in rows(10)]
        data[4]["jpg_1"] = data[4]["jpg_1"][:300]
        with pytest.raises(ValueError, match="1 of the 10 rows checked .* have an unreadable image"):
            make_trainer(data)
        assert len(make_trainer(data, max_bad_image_fraction=0.1).train_dataset) == 10
        assert len(make_trainer(data, num_checked_rows=0).train_dataset) == 10
        assert len(make_trainer(data, num_checked_rows=4).train_dataset) == 10  # rows 0, 2, 5 and 7

    def test_labels_of_a_preference_model(self, make_trainer):
        """
        The rows prefer the redder image. Told the opposite, and asked to relabel by redness, training has the loss of
        the true labels, and so has evaluation; without relabelling the two differ.
        """
        wrong = rows(4)
        for row in wrong:
            row.update(label_0=row["label_1"], label_1=row["label_0"])
        kwargs = {"max_steps": 1, "eval_timesteps": [0, 501]}
        results = []
        for data, preference_model in ((rows(4), None), (wrong, red_preference), (wrong, None)):
            relabel = preference_model is not None
            trainer = make_trainer(
                data, data, preference_model=preference_model, relabel_preferences=relabel, **kwargs
            )
            metrics = trainer.evaluate()
            trainer.train()
            results.append((first_loss(trainer), metrics["eval_loss"], metrics["eval_accuracy/t_0"]))
        assert results[0] == results[1]
        assert results[0][0] != results[2][0] and results[0][1] != results[2][1]

    def test_labels_of_the_reward_model_as_it_was(self, make_trainer):
        """By default a frozen copy labels: at t = 0 the fresh model agrees with itself, and training moves one only."""
        data = rows(6, has_label=False)  # no human was asked
        trainer = make_trainer(data, data, relabel_preferences=True, relabel_tie_band=0.0, eval_timesteps=[0])
        teacher = state_of(trainer.preference_model)
        assert trainer.evaluate()["eval_accuracy/t_0"] == 1
        trainer.train()
        assert not changed(teacher, trainer.preference_model)
        assert changed(teacher, trainer.model)

    def test_the_batch_labels_are_those_of_relabel_preferences(self, make_trainer):
        data = [encoded(row) for row in rows(6)]
        trainer = make_trainer(data, relabel_preferences=True, relabel_tie_band=1e-3)
        batch = trainer._relabel(StepPreferenceCollator(16)(data))
        relabelled = relabel_preferences(data, trainer.preference_model, 1e-3, batch_size=4, resolution=16)
        assert batch["label_0"].tolist() == [row["label_0"] for row in relabelled]
        assert len(set(batch["label_0"].tolist())) > 1

    def test_a_model_that_is_trained_and_labels_is_copied(self, make_trainer, clip_path):
        model = StepAwareRewardModel.from_clip(clip_path)
        trainer = make_trainer(rows(2), reward_model=model, preference_model=model, relabel_preferences=True)
        assert trainer.preference_model is not trainer.model
        assert any(parameter.requires_grad for parameter in trainer.model.parameters())

    def test_a_cached_run_is_the_run(self, make_trainer):
        """
        Three epochs over four pairs, eight different images: each is encoded once. A cache that holds only two of them
        (2,048 bytes each) changes no bit; a run without a cache differs by rounding at most.
        """
        runs = []
        for kwargs in (
            {"cache_latents": True},
            {"cache_latents": True, "cache_latents_gb": 5000 / 2**30},
            {},
        ):
            trainer = make_trainer(rows(4), max_steps=3, min_timestep=1, **kwargs)
            trainer.train()
            runs.append((trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
        assert runs[0][0].encoding_cache.num_images_encoded == 8
        assert runs[1][0].encoding_cache.num_images_encoded == 8 + 2 * 6
        assert runs[0][0].encoding_cache.num_prompts_encoded == 4
        assert runs[0][1] == runs[1][1] and not changed(state_of(runs[0][0].model), runs[1][0].model)
        assert runs[0][1] == pytest.approx(runs[2][1], rel=1e-3)


class TestWrongUse:
    def test_preference_models_out_of_place(self, make_trainer):
        with pytest.raises(ValueError, match="`relabel_preferences=True` only"):
            make_trainer(rows(2), preference_model=red_preference)
        with pytest.raises(ValueError, match="callable"):
            make_trainer(rows(2), preference_model="pickscore", relabel_preferences=True)

    def test_no_data(self, make_trainer):
        with pytest.raises(ValueError, match="`train_dataset` or set `dataset_name`"):
            make_trainer()

    def test_data_is_checked_before_anything_runs(self, make_trainer):
        with pytest.raises(ValueError, match="needs the columns"):
            make_trainer([{"prompt": "a", "chosen": "b"}])

    def test_reward_model_of_another_kind(self, make_trainer):
        with pytest.raises(ValueError, match="must be a StepAwareRewardModel"):
            make_trainer(rows(2), reward_model=torch.nn.Linear(1, 1))

    def test_timesteps_beyond_the_models(self, make_trainer):
        with pytest.raises(ValueError, match="Timestep 1000 is out of range"):
            make_trainer(rows(2), max_timestep=1000)

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"min_timestep": 5, "max_timestep": 4},
            {"timesteps": []},
            {"caption_loss_coef": -1.0},
            {"remove_unused_columns": True},
            {"resolution": 0},
            {"max_bad_image_fraction": 1.5},
            {"max_pairs_per_prompt": 0},
            {"num_checked_rows": -1},
            {"relabel_tie_band": 1.0},
            {"cache_latents_gb": -0.1},
            {"dataset_streaming": True, "max_steps": -1},
        ],
    )
    def test_config(self, kwargs, tmp_path):
        with pytest.raises(ValueError, match=list(kwargs)[0]):
            StepRewardConfig(output_dir=str(tmp_path), **kwargs)


def test_defaults_are_those_of_the_paper(tmp_path):
    """Paper, appendix: AdamW 3e-6, weight decay 0.3, 500 warm-up steps, 8,000 steps of 64 pairs, guidance 5."""
    config = StepRewardConfig(output_dir=str(tmp_path), **device_settings())
    assert (config.learning_rate, config.weight_decay, config.warmup_steps) == (3e-6, 0.3, 500)
    assert config.max_steps == 8000 and config.guidance_scale == 5.0 and config.max_grad_norm == 1.0
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 64
    assert config.caption_loss_coef == 0.0 and not config.bf16
