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
Necessity: a latent reward that was trained on other latents than a rollout makes, or that quietly learnt from the wrong
half of a pair, gives scores that look like any others.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.flow_testing import tiny_sd3_pipeline
from tests.testing_utils import (
    PROMPTS,
    changed,
    image_pairs,
    state_of,
    tiny_clip,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
    tiny_step_reward_config,
    train_logs,
)
from trl_spo import LatentRewardModel, StepAwareRewardModel, StepRewardTrainer, wrap_pipeline
from trl_spo.noised_pairs import noised_pairs
from trl_spo.pipelines.encoding_cache import EncodingCache
from trl_spo.preference_collator import StepPreferenceCollator


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return wrap_pipeline(sharpened(tiny_sd_pipeline(tmp_path_factory.mktemp("sd"))))


def sharpened(pipe):
    """A random VAE draws latents with 100 times more noise than content; here its posterior is sharp, as a trained one's."""
    vae = pipe.vae
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -30
        vae.encoder.conv_out.weight.mul_(10)
    return pipe


@pytest.fixture
def make_trainer(pipeline, tmp_path):
    def make(reward_model=None, rows=None, trained_on=pipeline, preference_model=None, callbacks=None, **settings):
        if reward_model is None:
            torch.manual_seed(0)
            reward_model = LatentRewardModel.from_pipeline(trained_on, guidance_scale=7.5)
        return StepRewardTrainer(
            tiny_step_reward_config(tmp_path / "run", **settings),
            trained_on,
            reward_model,
            train_dataset=image_pairs() if rows is None else rows,
            eval_dataset=image_pairs(),
            preference_model=preference_model,
            callbacks=callbacks,
        )

    return make


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class TestNoisedPairs:
    @pytest.mark.parametrize("independent", [False, True])
    def test_noisy_latents_by_hand(self, pipeline, independent):
        """Both images are encoded, then noised: with one noise, or with one each."""
        batch, t = StepPreferenceCollator(16)(image_pairs()[:3]), torch.tensor([700, 0, 30])
        first, second = noised_pairs(
            pipeline, batch, t, generator=seeded(), sees="noisy_latents", independent_noise=independent
        )
        generator = seeded()
        images = torch.stack([batch["images_0"], batch["images_1"]], dim=1).flatten(0, 1)
        latents = pipeline.encode_images(images, generator).unflatten(0, (3, 2))
        noise = torch.randn(3, 2 if independent else 1, *latents.shape[2:], generator=generator).expand_as(latents)
        abar = pipeline.scheduler.alphas_cumprod[t].view(3, 1, 1, 1, 1)
        expected = abar.sqrt() * latents + (1 - abar).sqrt() * noise
        expected[1] = latents[1]  # timestep 0 is the finished image
        torch.testing.assert_close(torch.stack([first, second], dim=1), expected, atol=1e-5, rtol=1e-5)

    def test_noisy_latents_of_a_flow_model(self, tmp_path):
        pipe = wrap_pipeline(tiny_sd3_pipeline(tmp_path))
        side = pipe.spatial_factor * pipe.latent_shape()[1]
        batch, t = StepPreferenceCollator(side)(image_pairs()[:2]), torch.tensor([700, 30])
        first, _ = noised_pairs(pipe, batch, t, generator=seeded(), sees="noisy_latents")
        generator = seeded()
        images = torch.stack([batch["images_0"], batch["images_1"]], dim=1).flatten(0, 1)
        latents = pipe.encode_images(images, generator).unflatten(0, (2, 2))[:, 0]
        noise = torch.randn(2, 1, *latents.shape[1:], generator=generator)[:, 0]
        sigma = torch.tensor([0.7, 0.03]).view(2, 1, 1, 1)
        torch.testing.assert_close(first, (1 - sigma) * latents + sigma * noise, atol=1e-5, rtol=1e-5)

    def test_predicted_latents_are_what_is_decoded(self, pipeline):
        batch, t = StepPreferenceCollator(16)(image_pairs()[:2]), torch.tensor([700, 30])
        latents = noised_pairs(pipeline, batch, t, 3.0, seeded(), sees="latents")
        images = noised_pairs(pipeline, batch, t, 3.0, seeded())
        for part, image in zip(latents, images, strict=True):
            torch.testing.assert_close(pipeline.decode_latents(part), image)

    def test_an_unknown_view_is_an_error(self, pipeline):
        batch = StepPreferenceCollator(16)(image_pairs()[:2])
        with pytest.raises(ValueError, match="must be one of"):
            noised_pairs(pipeline, batch, torch.tensor([1, 2]), sees="noise")


class TestLoss:
    def test_against_the_formula(self, make_trainer, pipeline):
        """The first loss, from scores of latents that are noised here: the chosen image is the first."""
        trainer = make_trainer()
        batch = StepPreferenceCollator(16)(image_pairs())
        loss = trainer.compute_loss(trainer.model, batch).item()
        generator = trainer._generator(0, 0, 0)
        timesteps = torch.randint(0, 1000, (6,), generator=generator)
        chosen, rejected = noised_pairs(pipeline, batch, timesteps, generator=generator, sees="noisy_latents")
        with torch.no_grad():
            margin = trainer.model.score(chosen, PROMPTS, timesteps) - trainer.model.score(
                rejected, PROMPTS, timesteps
            )
        assert loss == pytest.approx(-F.logsigmoid(margin).mean().item(), rel=1e-4)

    def test_nothing_is_predicted_or_decoded(self, make_trainer, pipeline):
        called = []
        parts = {"unet": pipeline.unet, "decoder": pipeline.vae.decoder, "text": pipeline.text_encoder}
        handles = [
            part.register_forward_hook(lambda *a, name=name: called.append(name)) for name, part in parts.items()
        ]
        try:
            trainer = make_trainer()
            trainer.train()
            trainer.evaluate()
        finally:
            for handle in handles:
                handle.remove()
        assert not called

    def test_independent_noise_is_a_setting_of_the_trainer(self, make_trainer, pipeline):
        """As LPO's rewards were trained: the loss is that of latents with a noise each, drawn here."""
        trainer = make_trainer(independent_noise=True)
        batch = StepPreferenceCollator(16)(image_pairs())
        loss = trainer.compute_loss(trainer.model, batch).item()
        losses = {}
        for independent in (False, True):
            generator = trainer._generator(0, 0, 0)
            timesteps = torch.randint(0, 1000, (6,), generator=generator)
            chosen, rejected = noised_pairs(
                pipeline, batch, timesteps, generator=generator, sees="noisy_latents", independent_noise=independent
            )
            with torch.no_grad():
                scores = [trainer.model.score(part, PROMPTS, timesteps) for part in (chosen, rejected)]
            losses[independent] = -F.logsigmoid(scores[0] - scores[1]).mean().item()
        assert loss == pytest.approx(losses[True], rel=1e-4) and loss != pytest.approx(losses[False], rel=1e-4)

    def test_accuracy_is_logged_by_timestep(self, make_trainer):
        """In training by ranges of timesteps, in an evaluation at each of `eval_timesteps`."""
        trainer = make_trainer(max_steps=1, per_device_train_batch_size=6, min_timestep=0, max_timestep=399)
        trainer.train()
        log = train_logs(trainer)[0]
        ranges = {name: log[name] for name in log if name.startswith("accuracy/")}
        assert set(ranges) <= {"accuracy/t_0_199", "accuracy/t_200_399"} and ranges
        seen = trainer.evaluate()
        at = {name: value for name, value in seen.items() if name.startswith("eval_accuracy/t_")}
        assert [int(name.rsplit("_", 1)[1]) for name in at] == trainer.args.eval_timesteps
        assert seen["eval_accuracy"] == pytest.approx(sum(at.values()) / len(at))

    def test_captions_are_told_apart(self, make_trainer):
        """The contrastive loss on the features of the latent reward, added and logged."""
        trainer = make_trainer(caption_loss_coef=0.5, max_steps=1, per_device_train_batch_size=6)
        trainer.train()
        log = train_logs(trainer)[0]
        assert log["caption_loss"] > 0
        assert log["loss"] == pytest.approx(log["preference_loss"] + 0.5 * log["caption_loss"], abs=2e-4)


class TestTraining:
    def test_moves_the_reward_model_and_nothing_else(self, make_trainer, pipeline):
        modules = {"denoiser": pipeline.denoiser, **pipeline.frozen_modules()}
        before = {name: state_of(module) for name, module in modules.items()}
        trainer = make_trainer()
        start = state_of(trainer.model)
        trainer.train()
        moved = changed(start, trainer.model)
        for part in (
            "conv_in",
            "time_embedding",
            "down_blocks.0",
            "mid_block",
            "text_encoders.0",
            "visual_projection",
        ):
            assert any(part in name for name in moved), part
        assert {"text_projection.weight", "logit_scale"} <= moved
        for name, module in modules.items():
            assert not changed(before[name], module)

    def test_learns_six_pairs(self, make_trainer):
        trainer = make_trainer(
            max_steps=12,
            per_device_train_batch_size=6,
            min_timestep=0,
            max_timestep=300,
            eval_timesteps=[1, 300],
            learning_rate=3e-3,
        )
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
        assert after["eval_accuracy"] == 1.0
        assert after["eval_loss"] < before["eval_loss"] / 2

    def test_sdxl(self, make_trainer, tmp_path):
        pipe = wrap_pipeline(tiny_sdxl_pipeline(tmp_path / "xl"))
        trainer = make_trainer(trained_on=pipe)
        start = state_of(trainer.model)
        trainer.train()
        moved = changed(start, trainer.model)
        assert any("text_encoders.1" in name for name in moved)

    def test_a_transformer_reads_with_its_pipeline(self, make_trainer, tmp_path):
        """Blocks and heads move, text encoders do not; each prompt is encoded once, and checkpoints hold no text encoder."""
        pipe = wrap_pipeline(tiny_sd3_pipeline(tmp_path / "sd3"))
        resolution = pipe.spatial_factor * pipe.latent_shape()[1]
        encoder = state_of(pipe.sd_pipeline.text_encoder)
        trainer = make_trainer(
            trained_on=pipe,
            cache_latents=True,
            resolution=resolution,
            save_strategy="steps",
            save_steps=1,
            max_steps=3,
        )
        start = state_of(trainer.model)
        trainer.train()
        moved = changed(start, trainer.model)
        assert any("transformer_blocks.0" in name for name in moved) and "text_projection.weight" in moved
        assert not changed(encoder, pipe.sd_pipeline.text_encoder)
        assert trainer.encoding_cache.num_prompts_encoded == len(PROMPTS)
        assert not (tmp_path / "run" / "checkpoint-1" / "pipeline").exists()
        trainer.save_model(str(tmp_path / "saved"))
        loaded = LatentRewardModel.from_pretrained(tmp_path / "saved")
        latents = torch.randn(2, *pipe.latent_shape(), generator=seeded())
        with torch.no_grad():
            expected = trainer.model.eval().score(latents, PROMPTS[:2], 500)
            assert torch.equal(loaded.score(latents, PROMPTS[:2], 500), expected)

    @pytest.mark.parametrize("family", [tiny_sd_pipeline, tiny_sd3_pipeline])
    def test_a_shared_reward_trains_its_adapter_and_heads(self, make_trainer, tmp_path, family):
        pipe = wrap_pipeline(family(tmp_path / "shared"))
        resolution = pipe.spatial_factor * pipe.latent_shape()[1]
        base = state_of(pipe.denoiser)
        torch.manual_seed(0)
        model = LatentRewardModel.from_pipeline(pipe, shared=True, projection_dim=12)
        trainer = make_trainer(model, trained_on=pipe, resolution=resolution, max_steps=3)
        start = state_of(model)
        trainer.train()
        moved = changed(start, model)
        assert {"visual_projection.weight", "text_projection.weight", "logit_scale"} <= moved
        assert sum(name.startswith("backbone.adapter") for name in moved) > 4
        after = {name.replace(".base_layer.", "."): value for name, value in pipe.denoiser.state_dict().items()}
        assert all(torch.equal(value, after[name]) for name, value in base.items())
        trainer.save_model(str(tmp_path / "saved"))
        again = LatentRewardModel.from_pretrained(tmp_path / "saved", pipeline=family(tmp_path / "again"))
        latents = torch.randn(2, *pipe.latent_shape(), generator=seeded())
        with torch.no_grad():
            expected = model.eval().score(latents, PROMPTS[:2], 500)
            torch.testing.assert_close(again.score(latents, PROMPTS[:2], 500), expected)

    def test_a_shared_reward_is_resumed(self, make_trainer, tmp_path):
        """Regression: a LoRA in its checkpoints made them look like those of SPO, and none of them could be resumed."""
        settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        ends = []
        for checkpoint in (None, str(tmp_path / "run" / "checkpoint-1")):
            pipe = wrap_pipeline(tiny_sd3_pipeline(tmp_path / "p"))
            torch.manual_seed(0)
            model = LatentRewardModel.from_pipeline(pipe, shared=True, projection_dim=12)
            resolution = pipe.spatial_factor * pipe.latent_shape()[1]
            make_trainer(model, trained_on=pipe, resolution=resolution, **settings).train(
                resume_from_checkpoint=checkpoint
            )
            ends.append(state_of(model))
        assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())

    def test_resuming_is_the_same_run(self, make_trainer, tmp_path):
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        whole = make_trainer(**settings)
        whole.train()
        torch.manual_seed(0)
        again = make_trainer(**settings)
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        assert not changed(state_of(whole.model), again.model)

    def test_what_is_saved_is_a_reward(self, make_trainer, tmp_path):
        trainer = make_trainer()
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        loaded = LatentRewardModel.from_pretrained(tmp_path / "saved")
        latents = torch.randn(2, 4, 8, 8, generator=seeded())
        with torch.no_grad():
            expected = trainer.model.eval().score(latents, PROMPTS[:2], 500)
            assert torch.equal(loaded.score(latents, PROMPTS[:2], 500), expected)
        card = (tmp_path / "saved" / "README.md").read_text()
        assert "LatentRewardModel.from_pretrained" in card and "torch.randn(2, 4, 8, 8)" in card
        assert "latent-reward-model" in card
        code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path / "saved"))
        scope = {}
        exec(compile(code.replace("a red cat", PROMPTS[0]), "card", "exec"), scope)
        assert scope["scores"].shape == (2,)

    def test_a_frozen_text_tower_is_read_once(self, make_trainer):
        """With the cache, each prompt passes through the text encoders once in the run, and nothing else changes."""
        settings = {"freeze_text_tower": True, "max_steps": 4, "per_device_train_batch_size": 6}
        plain, cached = make_trainer(**settings), make_trainer(**settings, cache_latents=True)
        start = state_of(cached.model)
        lengths = []
        cached.model.text_encoders[0].register_forward_hook(lambda m, args, output: lengths.append(1))
        plain.train()
        cached.train()
        assert not any("text" in name for name in changed(start, cached.model))
        assert len(lengths) == len(PROMPTS)
        assert cached.encoding_cache.num_images_encoded == 2 * len(PROMPTS)
        for name, value in state_of(plain.model).items():
            torch.testing.assert_close(value, cached.model.state_dict()[name], rtol=1e-3, atol=1e-4)

    def test_broken_latents_are_called_so(self, make_trainer, pipeline):
        trainer = make_trainer(max_steps=200)
        handle = trainer.pipeline.vae.encoder.register_forward_hook(lambda module, args, output: output * math.nan)
        try:
            with pytest.raises(ValueError, match=r"pairs were not finite.*noisy latents at timestep "):
                trainer.train()
        finally:
            handle.remove()
        assert all(p.isfinite().all() for p in trainer.model.parameters())

    def test_bfloat16(self, make_trainer):
        """
        Autocast rounds, and nothing more: the weights stay float32, and the first loss is nearly that of float32. It is a mean over
        96 pairs, since scores of a single one differ by up to 0.14 of 3, on every processor in its own way.
        """
        losses = {}
        rows = image_pairs() * 16
        for bf16 in (False, True):
            trainer = make_trainer(rows=rows, bf16=bf16, per_device_train_batch_size=len(rows), max_steps=1)
            trainer.train()
            losses[bf16] = train_logs(trainer)[0]["loss"]
        assert trainer.model.dtype == torch.float32
        assert losses[True] == pytest.approx(losses[False], rel=0.05) and losses[True] != losses[False]


class TestBadInput:
    def test_another_latent_space(self, make_trainer, pipeline):
        model = LatentRewardModel.from_pipeline(pipeline, scaling_factor=0.9)
        with pytest.raises(ValueError, match="it would judge noise"):
            make_trainer(model)

    def test_labels_come_from_a_judge_of_images(self, make_trainer, pipeline):
        with pytest.raises(ValueError, match="judges latents, not finished images. Pass a `preference_model`"):
            make_trainer(relabel_preferences=True)

        # The judge's labels are trained on: pairs that are given the wrong way round have the loss of the right ones.
        def redness(images, prompts):
            return 100 * images[:, 0].mean((1, 2))

        swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in image_pairs()]
        losses = []
        for rows in (image_pairs(), swapped):
            trainer = make_trainer(rows=rows, relabel_preferences=True, preference_model=redness)
            batch = StepPreferenceCollator(16, keep_unlabelled=True)(rows)
            losses.append(trainer.compute_loss(trainer.model, batch).item())
        plain = make_trainer(rows=swapped)
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)
        assert plain.compute_loss(plain.model, StepPreferenceCollator(16)(swapped)).item() > losses[1] + 0.01
        with pytest.raises(ValueError, match="must judge images, got `LatentRewardModel`"):
            judge = LatentRewardModel.from_pipeline(pipeline)
            make_trainer(relabel_preferences=True, preference_model=judge).train()

    def test_what_cannot_be_trained(self, make_trainer):
        with pytest.raises(ValueError, match="StepAwareRewardModel, a LatentRewardModel or a path, got function"):
            make_trainer(lambda images, prompts, timesteps: images.mean((1, 2, 3)))


def test_the_text_cache_serves_both_kinds_of_reward_model(tmp_path):

    model = StepAwareRewardModel.from_clip(tiny_clip(tmp_path))
    cache = EncodingCache()
    features = cache.encode_texts(model, [PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    with torch.no_grad():
        torch.testing.assert_close(features, model.encode_prompts([PROMPTS[0], PROMPTS[1], PROMPTS[0]]))
    assert cache.num_prompts_encoded == 2
