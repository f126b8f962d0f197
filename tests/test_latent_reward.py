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
Necessity: a latent reward judges what the denoiser sees. Wrong features, a forgotten half of the guidance or latents of
another space give scores that look like any others.
"""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tests.flow_testing import (
    tiny_flux2_klein_pipeline,
    tiny_flux_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_z_image_pipeline,
)
from tests.testing_utils import (
    PROMPTS,
    assert_is_gradient,
    changed,
    state_of,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
    tiny_spo_config,
)
from trl_spo import (
    LatentRewardModel,
    LatentRewardModelConfig,
    SPOStableDiffusion3Pipeline,
    SPOTrainer,
    stepwise_rollout,
    wrap_pipeline,
    wrap_reward,
)
from trl_spo.evaluation.evaluate import EvaluationProtocol, evaluate_pipeline
from trl_spo.rewards.latent_text import load_diffusers_pipeline
from trl_spo.sampling import generate_images, score_images
from trl_spo.scripts.arguments import RewardModelArguments


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_sd_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def pipe_xl(tmp_path_factory):
    return tiny_sdxl_pipeline(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def model(pipe):
    torch.manual_seed(0)
    return LatentRewardModel.from_pipeline(pipe)


def latents_like(pipe, count=2, seed=0):
    unet = pipe.unet.config
    shape = (count, unet.in_channels, unet.sample_size, unet.sample_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs_by_hooks(pipe, call):
    """What the whole UNet computes at the places that are read: the last resnet of each down level, and the middle."""
    found, handles = {}, []
    unet = pipe.unet
    for i, block in enumerate(unet.down_blocks):
        attentions = getattr(block, "attentions", None)
        last = (attentions or block.resnets)[-1]
        handles.append(last.register_forward_hook(lambda m, a, out, i=i: found.__setitem__(i, out)))
    handles.append(unet.mid_block.register_forward_hook(lambda m, a, out: found.__setitem__("mid", out)))
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    values = [found[i] for i in range(len(unet.down_blocks))] + [found["mid"]]
    return [value[0] if isinstance(value, tuple) else value for value in values]


class TestScores:
    @torch.no_grad()
    def test_equal_a_hand_computation(self, pipe, model):
        """Pooling, guidance of the middle alone, projection, cosine; from hooks on the pipeline's own, whole UNet."""
        latents, t, prompts = latents_like(pipe), torch.tensor([700, 20]), PROMPTS[:2]
        ids = pipe.tokenizer(
            [*prompts, ""], padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        text = pipe.text_encoder(ids)
        cond, uncond = text.last_hidden_state[:2], text.last_hidden_state[2:].expand(2, -1, -1)
        with_text = outputs_by_hooks(pipe, lambda: pipe.unet(latents, t, cond))
        without = outputs_by_hooks(pipe, lambda: pipe.unet(latents, t, uncond))
        *levels, middle = [value.mean((2, 3)) for value in with_text]
        empty = without[-1].mean((2, 3))
        features = torch.cat([*levels, empty + 7.5 * (middle - empty)], dim=1)
        visual = features @ model.visual_projection.weight.T
        pooled = text.pooler_output[:2] @ model.text_projection.weight.T
        expected = torch.tensor(2.6592).exp() * F.cosine_similarity(visual, pooled)
        assert torch.allclose(model.score(latents, prompts, t), expected, atol=1e-4)

    @torch.no_grad()
    def test_sdxl_takes_the_projected_text_and_the_size(self, pipe_xl):
        torch.manual_seed(0)
        model = LatentRewardModel.from_pipeline(pipe_xl, guidance_scale=1.0)
        latents, t = latents_like(pipe_xl), torch.tensor([700, 20])
        embeds, _, pooled, _ = pipe_xl.encode_prompt(PROMPTS[:2], do_classifier_free_guidance=False)
        side = 8.0 * pipe_xl.unet.config.sample_size
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[side, side, 0, 0, side, side]]).expand(2, -1)}
        read = outputs_by_hooks(pipe_xl, lambda: pipe_xl.unet(latents, t, embeds, added_cond_kwargs=added))
        features = torch.cat([value.mean((2, 3)) for value in read], dim=1)
        cosine = F.cosine_similarity(features @ model.visual_projection.weight.T, pooled)
        expected = torch.tensor(2.6592).exp() * cosine
        assert model.text_projection is None
        assert torch.allclose(model.score(latents, PROMPTS[:2], t), expected, atol=1e-4)

    @torch.no_grad()
    def test_sdxl_guides_the_middle_with_the_encoded_empty_prompt(self, pipe_xl):
        """The released model was trained so, though the pipeline itself takes zeros for no prompt."""
        torch.manual_seed(0)
        model = LatentRewardModel.from_pipeline(pipe_xl)
        latents, t = latents_like(pipe_xl), torch.tensor([700, 20])
        side = 8.0 * pipe_xl.unet.config.sample_size
        read = {}
        for name, prompts in (("text", PROMPTS[:2]), ("empty", ["", ""])):
            embeds, _, pooled, _ = pipe_xl.encode_prompt(prompts, do_classifier_free_guidance=False)
            added = {"text_embeds": pooled, "time_ids": torch.tensor([[side, side, 0, 0, side, side]]).expand(2, -1)}
            outputs = outputs_by_hooks(
                pipe_xl, lambda e=embeds, a=added: pipe_xl.unet(latents, t, e, added_cond_kwargs=a)
            )
            read[name] = [value.mean((2, 3)) for value in outputs], pooled
        (*levels, middle), pooled = read["text"]
        empty = read["empty"][0][-1]
        features = torch.cat([*levels, empty + 7.5 * (middle - empty)], dim=1)
        cosine = F.cosine_similarity(features @ model.visual_projection.weight.T, pooled)
        expected = torch.tensor(2.6592).exp() * cosine
        assert torch.allclose(model.score(latents, PROMPTS[:2], t), expected, atol=1e-4)

    @torch.no_grad()
    def test_text_features_and_rows(self, pipe, model):
        """A prompt's score does not depend on its neighbours; repeats are encoded once."""
        latents, t = latents_like(pipe, 3), torch.tensor([1, 500, 999])
        prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
        text = model.encode_prompts(prompts)
        scores = model.score(latents, timesteps=t, text_features=text)
        order = torch.tensor([2, 0, 1])
        permuted = model.score(latents[order], timesteps=t[order], text_features=text[order])
        assert torch.allclose(permuted, scores[order], atol=1e-5)
        assert torch.allclose(model.score(latents[1:2], prompts[1:2], 500), scores[1:2], atol=1e-5)

    def test_it_is_differentiable_in_the_latents(self, pipe, model):
        assert_is_gradient(lambda latents: model.score(latents, PROMPTS[:2], 300).sum(), latents_like(pipe))

    def test_bad_input(self, pipe, model):
        latents = latents_like(pipe)
        with pytest.raises(ValueError, match=r"shape \(batch_size, 4, height, width\), got \(2, 3"):
            model.score(latents[:, :3], PROMPTS[:2], 1)
        with pytest.raises(ValueError, match="either `prompts` or `text_features`"):
            model.score(latents)
        with pytest.raises(ValueError, match="Got 2 latents and 1 prompts"):
            model.score(latents, PROMPTS[:1], 1)
        with pytest.raises(ValueError, match=r"must lie in \[0, 1000\), got \[5, 1000\]"):
            model.score(latents, PROMPTS[:2], torch.tensor([5, 1000]))


class TestFiles:
    @torch.no_grad()
    def test_what_is_saved_is_loaded(self, pipe, model, tmp_path):
        model.save_pretrained(tmp_path)
        latents = latents_like(pipe)
        expected = model.score(latents, PROMPTS[:2], 400)
        for loaded in (LatentRewardModel.from_pretrained(tmp_path), wrap_reward(str(tmp_path)).module):
            assert torch.equal(loaded.eval().score(latents, PROMPTS[:2], 400), expected)
        assert not [name for name in loaded.state_dict() if "up_blocks" in name]

    @torch.no_grad()
    @pytest.mark.parametrize("family", [tiny_sd_pipeline, tiny_sdxl_pipeline])
    def test_files_of_another_transformers(self, tmp_path, family):
        """Regression: version 5 left `text_model.` out of the names in a text encoder, and no other version's file loaded."""
        pipe = family(tmp_path / "files")
        model = LatentRewardModel.from_pipeline(pipe)
        model.save_pretrained(tmp_path / "saved")
        weights = load_file(tmp_path / "saved" / "model.safetensors")
        first = "text_encoders.0."
        old = any(name.startswith(f"{first}text_model.") for name in weights)
        before, after = (f"{first}text_model.", first) if old else (first, f"{first}text_model.")
        renamed = {name.replace(before, after): value for name, value in weights.items()}
        assert renamed.keys() != weights.keys()
        save_file(renamed, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
        loaded = LatentRewardModel.from_pretrained(tmp_path / "saved")
        loaded.save_pretrained(tmp_path / "again")
        # Checkpoints are read by the names of the parameters, so these are what is written.
        assert load_file(tmp_path / "again" / "model.safetensors").keys() == weights.keys()
        latents = latents_like(pipe)
        expected = model.score(latents, PROMPTS[:2], 400)
        for reward in (loaded, LatentRewardModel.from_pretrained(tmp_path / "again")):
            assert torch.equal(reward.score(latents, PROMPTS[:2], 400), expected)

    @torch.no_grad()
    def test_a_folder_in_a_folder(self, pipe, model, tmp_path):
        """Regression: what reads prompts was looked for beside the subfolder, and not found."""
        model.save_pretrained(tmp_path / "unet")
        loaded = LatentRewardModel.from_pretrained(tmp_path, subfolder="unet")
        latents = latents_like(pipe)
        assert torch.equal(loaded.score(latents, PROMPTS[:2], 400), model.score(latents, PROMPTS[:2], 400))

        sd3 = tiny_sd3_pipeline(tmp_path / "files")
        latents = torch.randn(2, *wrap_pipeline(sd3).latent_shape(), generator=torch.Generator().manual_seed(0))
        flow = LatentRewardModel.from_pipeline(sd3, projection_dim=12)
        flow.save_pretrained(tmp_path / "flow")
        loaded = LatentRewardModel.from_pretrained(tmp_path, subfolder="flow")
        assert torch.equal(loaded.score(latents, PROMPTS[:2], 400), flow.score(latents, PROMPTS[:2], 400))
        shared = LatentRewardModel.from_pipeline(sd3, projection_dim=12, shared=True)
        shared.save_pretrained(tmp_path / "shared")
        again = tiny_sd3_pipeline(tmp_path / "again")
        loaded = LatentRewardModel.from_pretrained(tmp_path, subfolder="shared", pipeline=again)
        assert torch.equal(loaded.score(latents, PROMPTS[:2], 400), shared.score(latents, PROMPTS[:2], 400))

    def test_broken_weights_are_an_error(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["visual_projection.weight"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="do not fit the latent reward model: .*visual_projection.weight"):
            LatentRewardModel.from_pretrained(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"cut off")
        with pytest.raises(ValueError, match="were refused: they cannot be read"):
            LatentRewardModel.from_pretrained(tmp_path)

    @torch.no_grad()
    def test_the_command_line_takes_it(self, pipe, model, tmp_path):
        """Regression: `--reward_model_name_or_path` knew the step-aware reward model alone."""
        model.save_pretrained(tmp_path)
        loaded = RewardModelArguments(reward_model_name_or_path=str(tmp_path)).load()
        latents = latents_like(pipe)
        assert torch.equal(loaded.score(latents, PROMPTS[:2], 400), model.score(latents, PROMPTS[:2], 400))

    @torch.no_grad()
    @pytest.mark.parametrize("scale", [2.0, torch.tensor(2.0)])
    def test_released_layout(self, pipe, tmp_path, scale):
        """`unet/`, `text_encoder/` and heads in `state_dict.pt`, in a subfolder; the logarithm of the scale."""
        folder = tmp_path / "lrm_sd15"
        pipe.unet.save_pretrained(folder / "unet")
        pipe.text_encoder.save_pretrained(folder / "text_encoder")
        torch.manual_seed(3)
        width = sum(pipe.unet.config.block_out_channels) + pipe.unet.config.block_out_channels[-1]
        visual, text = torch.randn(6, width), torch.randn(6, pipe.text_encoder.config.hidden_size)
        heads = {"visual_projection": {"weight": visual}, "text_projection": {"weight": text}, "logit_scale": scale}
        torch.save(heads, folder / "state_dict.pt")
        model = LatentRewardModel.from_original_checkpoint(
            tmp_path, "lrm_sd15", scaling_factor=pipe.vae.config.scaling_factor
        )
        assert model.logit_scale.item() == 2.0
        assert torch.equal(model.visual_projection.weight, visual) and torch.equal(model.text_projection.weight, text)
        with pytest.raises(ValueError, match="has no tokenizer"):
            model.score(latents_like(pipe), PROMPTS[:2], 1)
        model.check_pipeline(pipe)  # brings the tokenizer
        twin = LatentRewardModel.from_pipeline(pipe, projection_dim=6)
        for name, weight in (("visual_projection", visual), ("text_projection", text)):
            getattr(twin, name).weight.data = weight
        twin.logit_scale.data.fill_(2.0)
        with torch.no_grad():
            expected = twin.score(latents_like(pipe), PROMPTS[:2], 1)
        torch.testing.assert_close(model.score(latents_like(pipe), PROMPTS[:2], 1), expected)

        del heads["text_projection"]
        torch.save({**heads, "other": {"weight": text}}, folder / "state_dict.pt")
        with pytest.raises(ValueError, match="missing: text_projection.weight; unexpected: other.weight"):
            LatentRewardModel.from_original_checkpoint(tmp_path, "lrm_sd15")
        torch.save({"visual_projection": print}, folder / "state_dict.pt")
        with pytest.raises(ValueError, match="was refused"):
            LatentRewardModel.from_original_checkpoint(tmp_path, "lrm_sd15")

    def test_no_unet_no_latent_reward(self):
        with pytest.raises(TypeError, match="`UNet2DConditionModel`.* got `object`"):
            LatentRewardModel.from_pipeline(object())
        with pytest.raises(ValueError, match="must be of CLIPTextModel or CLIPTextModelWithProjection, got"):
            LatentRewardModelConfig({}, [{"architecture": "T5EncoderModel"}])


# Two steps of LPO: branches from the first step on, a threshold that changes with the timestep.
LPO = {
    "branch_start_step": 0,
    "beta": 500.0,
    "preference_threshold": [0.0, 0.001],
    "memory_budget": 1.0,
    "max_steps": 2,
}


class TestInTheLoop:
    def test_another_latent_space_is_refused(self, pipe, pipe_xl, model, tmp_path):
        other = model.config.scaling_factor
        model.config.scaling_factor = 0.9
        try:
            with pytest.raises(ValueError, match="judges latents with .* it would judge noise"):
                SPOTrainer(tiny_spo_config(tmp_path), tiny_sd_pipeline(tmp_path / "p"), model, train_dataset=PROMPTS)
        finally:
            model.config.scaling_factor = other

    def test_a_rollout_neither_predicts_nor_decodes_for_it(self, pipe, model):
        evaluations = []
        wrapped = wrap_pipeline(pipe)
        handle = wrapped.unet.register_forward_hook(lambda m, args, out: evaluations.append(len(args[0])))
        backbone = model.backbone.register_forward_hook(lambda m, args, out: evaluations.append(-len(args[0])))
        try:
            pairs = stepwise_rollout(
                wrapped, PROMPTS[:2], model, num_inference_steps=5, branch_start_step=0, num_candidates=3,
                guidance_scale=3.0, preference_threshold=0.0,
            )  # fmt: skip
        finally:
            handle.remove()
            backbone.remove()
        assert sum(count for count in evaluations if count > 0) == 2 * 2 * 5  # guided, prompts, steps
        assert sum(count for count in evaluations if count < 0) == -2 * 2 * 3 * 5  # the guided half UNet, K candidates
        assert len(pairs) == 2 * 5

    def test_lpo_trains(self, tmp_path, pipe, model):
        """LPO's settings: all steps branch, beta 500, a threshold that grows with sigma; memory is estimated, too."""
        before = {name: value.clone() for name, value in model.state_dict().items()}
        config = tiny_spo_config(tmp_path, **LPO)
        trainer = SPOTrainer(config, tiny_sd_pipeline(tmp_path / "p"), model, train_dataset=PROMPTS)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert logs[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_evaluation_judges_what_the_vae_makes_of_the_images(self, tmp_path, pipe, model):
        """`eval_reward` is there for a latent reward too, and may choose the best checkpoint."""
        config = tiny_spo_config(
            tmp_path,
            branch_start_step=0,
            preference_threshold=0.0,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            max_steps=2,
        )
        trainer = SPOTrainer(
            config, tiny_sd_pipeline(tmp_path / "p"), model, train_dataset=PROMPTS, eval_dataset=PROMPTS[:3]
        )
        images = trainer.generate(PROMPTS[:3], [0, 1, 2])
        mean, _ = trainer.pipeline.image_posterior(images * 2 - 1)
        with torch.no_grad():
            expected = model.score(mean, PROMPTS[:3], 0)
        torch.testing.assert_close(trainer.score(images, PROMPTS[:3])["reward"], expected, rtol=1e-4, atol=1e-4)
        trainer.train()
        assert trainer.state.best_metric is not None
        with pytest.raises(ValueError, match="pass the `pipeline` whose VAE is to encode"):
            score_images(images, PROMPTS[:3], model)


class TestTransformers:
    """Rewards on the first blocks of a transformer, whose pipeline reads the prompts."""

    FAMILIES = [tiny_sd3_pipeline, tiny_flux_pipeline, tiny_flux2_klein_pipeline, tiny_qwen_image_pipeline]

    @staticmethod
    def made(family, folder, **settings):
        pipeline = wrap_pipeline(family(folder))
        torch.manual_seed(0)
        model = LatentRewardModel.from_pipeline(pipeline, projection_dim=12, **settings)
        latents = torch.randn(2, *pipeline.latent_shape(), generator=torch.Generator().manual_seed(1))
        return pipeline, model, latents

    @torch.no_grad()
    def test_sd3_equals_a_hand_computation(self, tmp_path):
        """Mean image tokens behind both blocks of the pipeline's own, whole transformer; cosine with the pooled text."""
        pipeline, model, latents = self.made(tiny_sd3_pipeline, tmp_path, blocks=[1, 2])
        t, pipe = torch.tensor([700, 20]), pipeline.sd_pipeline
        tokens, _, pooled, _ = pipe.encode_prompt(PROMPTS[:2], None, None, do_classifier_free_guidance=False)
        found = []
        for block in pipe.transformer.transformer_blocks:
            block.register_forward_hook(lambda m, args, output: found.append(output[1].mean(1)))
        pipe.transformer(latents, tokens, pooled, t.float())
        visual = torch.cat(found, dim=1) @ model.visual_projection.weight.T
        expected = torch.tensor(2.6592).exp() * F.cosine_similarity(visual, pooled @ model.text_projection.weight.T)
        assert torch.allclose(model.score(latents, PROMPTS[:2], t), expected, atol=1e-4)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_saved_alone_and_without_neighbours(self, tmp_path, family):
        _, model, latents = self.made(family, tmp_path)
        t = torch.tensor([500, 20])
        prompts = [PROMPTS[0], " ".join(PROMPTS)]  # of different lengths
        with torch.no_grad():
            scores = model.score(latents, prompts, t)
            torch.testing.assert_close(model.score(latents[:1], prompts[:1], 500), scores[:1], atol=1e-4, rtol=1e-4)
            model.save_pretrained(tmp_path / "saved")
            loaded = LatentRewardModel.from_pretrained(tmp_path / "saved")
            assert torch.equal(loaded.score(latents, prompts, t), scores)
        last = max(model.config.blocks)
        assert not [name for name in load_file(tmp_path / "saved" / "model.safetensors") if f"blocks.{last}." in name]

    @torch.no_grad()
    def test_without_its_reader_it_asks_for_a_pipeline(self, tmp_path):
        pipeline, model, latents = self.made(tiny_sd3_pipeline, tmp_path)
        model.save_pretrained(tmp_path / "saved", save_reader=False)
        assert not (tmp_path / "saved" / "pipeline").exists()
        loaded = LatentRewardModel.from_pretrained(tmp_path / "saved")
        with pytest.raises(
            ValueError, match="encodes prompts with a StableDiffusion3Pipeline, and its folder holds none"
        ):
            loaded.score(latents, PROMPTS[:2], 500)
        loaded.check_pipeline(pipeline)
        assert torch.equal(loaded.score(latents, PROMPTS[:2], 500), model.score(latents, PROMPTS[:2], 500))

    @torch.no_grad()
    def test_a_pipeline_without_t5_and_with_short_texts(self, tmp_path):
        """Regression: SD3 may lack its T5, and a saved reward then did not load; the length of texts was forgotten."""
        pipeline = SPOStableDiffusion3Pipeline(tiny_sd3_pipeline(tmp_path, with_t5=False), max_sequence_length=3)
        model = LatentRewardModel.from_pipeline(pipeline, projection_dim=12)
        latents = torch.randn(2, *pipeline.latent_shape(), generator=torch.Generator().manual_seed(1))
        model.save_pretrained(tmp_path / "saved")
        loaded = LatentRewardModel.from_pretrained(tmp_path / "saved")
        assert torch.equal(loaded.score(latents, PROMPTS[:2], 500), model.score(latents, PROMPTS[:2], 500))

    def test_lora_weights_in_the_pipeline_are_left_out(self, tmp_path):
        pipeline, model, latents = self.made(tiny_sd3_pipeline, tmp_path)
        pipeline.prepare_for_training()
        torch.manual_seed(0)
        again = LatentRewardModel.from_pipeline(pipeline, projection_dim=12)
        with torch.no_grad():
            assert torch.equal(again.score(latents, PROMPTS[:2], 500), model.score(latents, PROMPTS[:2], 500))

    def test_gradients_also_with_checkpointing(self, tmp_path):
        _, model, latents = self.made(tiny_sd3_pipeline, tmp_path)
        gradients = []
        for checkpointed in (False, True):
            model.train()
            if checkpointed:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            given = latents.clone().requires_grad_(True)
            model.score(given, PROMPTS[:2], 300).sum().backward()
            weights = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            gradients.append([given.grad, *weights])
        assert len(gradients[0]) > 10
        assert_is_gradient(lambda given: model.score(given, PROMPTS[:2], 300).sum(), latents)
        for plain, recomputed in zip(*gradients, strict=True):
            torch.testing.assert_close(plain, recomputed)

    def test_text_encoders_beside_the_weights_wait_until_they_are_needed(self, tmp_path, monkeypatch):
        """A trainer gives the reward its own pipeline: a second set of text encoders must not be loaded first."""
        pipeline, model, latents = self.made(tiny_sd3_pipeline, tmp_path)
        with torch.no_grad():
            expected = model.score(latents, PROMPTS[:2], 500)
        model.save_pretrained(tmp_path / "saved")
        loads = []
        load = load_diffusers_pipeline
        monkeypatch.setattr(
            "trl_spo.rewards.latent_text.load_diffusers_pipeline", lambda *a, **k: loads.append(1) or load(*a, **k)
        )
        given = LatentRewardModel.from_pretrained(tmp_path / "saved")
        given.check_pipeline(pipeline)
        alone = LatentRewardModel.from_pretrained(tmp_path / "saved")
        for loaded, count in ((given, 0), (alone, 1), (alone, 1)):
            with torch.no_grad():
                assert torch.equal(loaded.score(latents, PROMPTS[:2], 500), expected)
            assert len(loads) == count

    def test_the_empty_prompt_is_not_read(self, tmp_path):
        """Nothing is guided here, and large text encoders are slow."""
        pipeline, model, _ = self.made(tiny_sd3_pipeline, tmp_path)
        lengths = []
        encoder = pipeline.sd_pipeline.text_encoder_3
        encoder.register_forward_hook(lambda m, args, output: lengths.append(len(args[0])))
        model.encode_prompts([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
        assert lengths == [2]

    def test_it_is_a_metric(self, tmp_path):
        """`evaluate_pipeline` shows it what the VAE makes of the images, and refuses another pipeline before sampling."""
        pipeline, model, _ = self.made(tiny_sd3_pipeline, tmp_path)
        protocol = EvaluationProtocol("p", scheduler="FlowMatchEuler", num_inference_steps=2, guidance_scale=1.0)
        result = evaluate_pipeline(pipeline, PROMPTS[:2], {"latent": model}, protocol=protocol)
        images = generate_images(pipeline, PROMPTS[:2], seeds=[0, 1], **protocol.sampler())
        mean, _ = pipeline.image_posterior(images * 2 - 1)
        with torch.no_grad():
            expected = model.score(mean, PROMPTS[:2], 0)
        torch.testing.assert_close(result.scores["latent"], expected, atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="made for a StableDiffusion3Pipeline"):
            evaluate_pipeline(tiny_sd_pipeline(tmp_path / "sd"), PROMPTS[:2], {"latent": model})

    def test_lpo_trains_a_flow_model(self, tmp_path):
        pipeline, model, _ = self.made(tiny_sd3_pipeline, tmp_path)
        before = state_of(model)
        evaluations = []
        model.backbone.register_forward_hook(lambda m, args, output: evaluations.append(len(args[1])))
        config = tiny_spo_config(tmp_path, **LPO)
        trainer = SPOTrainer(config, pipeline, model, train_dataset=PROMPTS, eval_dataset=PROMPTS[:2])
        trainer.train()
        first = next(log for log in trainer.state.log_history if "loss" in log)
        assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert not changed(before, model) and sum(evaluations) > 0
        assert trainer.evaluate()["eval_reward_std"] > 0

    @pytest.mark.parametrize("blocks", [[], [0], [3], [1, 1]])
    def test_blocks_that_are_not_there(self, tmp_path, blocks):
        with pytest.raises(ValueError, match="must be different numbers from 1 to 2"):
            LatentRewardModel.from_pipeline(tiny_sd3_pipeline(tmp_path), blocks=blocks)

    def test_other_pipelines_are_refused(self, tmp_path, pipe, model):
        with pytest.raises(ValueError, match="`ZImageTransformer2DModel` has one stream for text and image"):
            LatentRewardModel.from_pipeline(tiny_z_image_pipeline(tmp_path / "z"))
        with pytest.raises(ValueError, match="`ZImageTransformer2DModel` has one stream for text and image"):
            LatentRewardModel.from_pipeline(tiny_z_image_pipeline(tmp_path / "z2"), shared=True)
        sd3 = tiny_sd3_pipeline(tmp_path / "sd3")
        flow_reward = LatentRewardModel.from_pipeline(sd3)
        with pytest.raises(
            ValueError, match="made for a StableDiffusion3Pipeline, and the pipeline is a FluxPipeline"
        ):
            flow_reward.check_pipeline(tiny_flux_pipeline(tmp_path / "flux"))
        other = tiny_sd3_pipeline(tmp_path / "other", scaling_factor=0.9)
        with pytest.raises(ValueError, match="scaling_factor = .*, and the pipeline's have 0.9: it would judge noise"):
            flow_reward.check_pipeline(other)
        with pytest.raises(ValueError, match="latents of a UNet's noise schedule, and a StableDiffusion3Pipeline has"):
            model.check_pipeline(sd3)


def lora(**settings) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], **settings)


def moved_reward(pipeline, **settings):
    """A shared reward whose adapter is not the zero it starts as, and latents for it."""
    torch.manual_seed(0)
    model = LatentRewardModel.from_pipeline(pipeline, shared=True, peft_config=lora(), projection_dim=12, **settings)
    with torch.no_grad():
        for parameter in model.backbone.adapter.values():
            parameter.normal_(std=0.3)
    shape = wrap_pipeline(pipeline).latent_shape()
    return model, torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", [tiny_sd_pipeline, tiny_sdxl_pipeline, tiny_sd3_pipeline, tiny_flux_pipeline])
class TestShared:
    """A reward on the policy's own denoiser, under a second adapter."""

    def predict(self, pipeline, latents, denoiser=None):
        wrapped = wrap_pipeline(pipeline)
        embeds = wrapped.encode_prompt(PROMPTS[:2])
        with torch.no_grad():
            return wrapped.predict(latents, torch.tensor([500, 20]), embeds, wrapped.unguided_scale, denoiser=denoiser)

    def test_no_weights_exist_twice(self, tmp_path, family):
        pipeline = wrap_pipeline(family(tmp_path))
        weights = {id(p): p.data_ptr() for p in pipeline.denoiser.parameters()}
        model, _ = moved_reward(pipeline)
        base = [p for name, p in pipeline.denoiser.named_parameters() if ".lora_" not in name]
        assert {id(p): p.data_ptr() for p in base} == weights
        own = sum(p.numel() for p in model.parameters())
        assert own < sum(p.numel() for p in base) / 2

    def test_the_pipeline_is_as_it_was(self, tmp_path, family):
        """Predictions, gradients, modes: before, beside and after scores, with and without the adapter of a policy."""
        pipeline = wrap_pipeline(family(tmp_path))
        latents = torch.randn(2, *pipeline.latent_shape(), generator=torch.Generator().manual_seed(2))
        base = self.predict(pipeline, latents)
        model, _ = moved_reward(pipeline)
        assert torch.equal(self.predict(pipeline, latents), base)
        with torch.no_grad():
            scores = model.score(latents, PROMPTS[:2], torch.tensor([500, 20]))
        assert torch.equal(self.predict(pipeline, latents), base)

        pipeline.prepare_for_training(lora(init_lora_weights=False), use_lora=True)
        pipeline.denoiser.train()
        flags = {name: p.requires_grad for name, p in pipeline.denoiser.named_parameters()}
        policy = self.predict(pipeline, latents)
        assert not torch.equal(policy, base)
        with torch.no_grad():
            torch.testing.assert_close(model.score(latents, PROMPTS[:2], torch.tensor([500, 20])), scores)
        assert torch.equal(self.predict(pipeline, latents), policy)
        with pipeline.reference() as reference:
            assert torch.equal(self.predict(pipeline, latents, reference), base)
        assert {name: p.requires_grad for name, p in pipeline.denoiser.named_parameters()} == flags
        assert all(module.training for module in pipeline.denoiser.modules())
        assert {name for name, flag in flags.items() if flag} == {n for n in flags if ".default." in n}

    def test_only_what_is_read_runs(self, tmp_path, family):
        """Half a denoiser: no up block of a UNet, and no block of a transformer behind the last that is read."""
        pipeline = wrap_pipeline(family(tmp_path))
        is_unet = pipeline.denoiser_name == "unet"
        model, latents = moved_reward(pipeline, **({} if is_unet else {"blocks": [1]}))
        denoiser, ran = pipeline.denoiser, []
        parts = dict(enumerate(denoiser.up_blocks if is_unet else denoiser.transformer_blocks[1:]))
        parts["out"] = denoiser.conv_out if is_unet else denoiser.proj_out
        parts |= {f"single {i}": block for i, block in enumerate(getattr(denoiser, "single_transformer_blocks", ()))}
        handles = [
            part.register_forward_hook(lambda *args, name=name: ran.append(name)) for name, part in parts.items()
        ]
        with torch.no_grad():
            model.score(latents, PROMPTS[:2], 500)
        assert len(parts) > 1 and not ran
        self.predict(pipeline, latents)
        assert set(ran) == set(parts)  # the hooks see them where they do run
        for handle in handles:
            handle.remove()

    def test_a_score_that_fails_leaves_the_pipeline_as_it_was(self, tmp_path, family):
        pipeline = wrap_pipeline(family(tmp_path))
        model, latents = moved_reward(pipeline)
        pipeline.prepare_for_training(lora(init_lora_weights=False), use_lora=True)
        pipeline.denoiser.train()
        flags = {name: p.requires_grad for name, p in pipeline.denoiser.named_parameters()}
        policy = self.predict(pipeline, latents)

        def fail(module, args):
            raise RuntimeError("out of memory")

        blocks = "down_blocks" if pipeline.denoiser_name == "unet" else "transformer_blocks"
        handle = getattr(pipeline.denoiser, blocks)[0].register_forward_pre_hook(fail)
        with torch.no_grad(), pytest.raises(RuntimeError, match="out of memory"):
            model.score(latents, PROMPTS[:2], 500)
        handle.remove()
        assert {name: p.requires_grad for name, p in pipeline.denoiser.named_parameters()} == flags
        assert all(module.training for module in pipeline.denoiser.modules())
        assert torch.equal(self.predict(pipeline, latents), policy)

    def test_spo_trains_the_policy_alone(self, tmp_path, family):
        """Loss ln 2 at first; the reward's adapter stays, and the published LoRA knows nothing of it."""
        pipeline = wrap_pipeline(family(tmp_path / "pipeline"))
        model, _ = moved_reward(pipeline)
        before = state_of(model)
        config = tiny_spo_config(tmp_path / "run", branch_start_step=0, preference_threshold=0.0, max_steps=2)
        trainer = SPOTrainer(config, pipeline, model, train_dataset=PROMPTS, peft_config=lora())
        trainer.train()
        first = next(log for log in trainer.state.log_history if "loss" in log)
        assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert not changed(before, model)
        trainer.save_model(str(tmp_path / "saved"))
        names = load_file(tmp_path / "saved" / "pytorch_lora_weights.safetensors")
        assert len(names) == sum(".default." in name for name, _ in pipeline.denoiser.named_parameters())
        assert not any("reward" in name for name in names)

    def test_compiled_blocks_serve_both_adapters(self, tmp_path, family):
        """The policy's blocks are compiled on a GPU by default; the reward runs them under its own adapter."""
        pipeline = wrap_pipeline(family(tmp_path / "pipeline"))
        model, latents = moved_reward(pipeline)
        with torch.no_grad():
            expected = model.score(latents, PROMPTS[:2], 500)
        config = tiny_spo_config(
            tmp_path / "run",
            branch_start_step=0,
            preference_threshold=0.0,
            torch_compile=True,
            torch_compile_backend="eager",
            max_steps=2,
        )
        trainer = SPOTrainer(config, pipeline, model, train_dataset=PROMPTS, peft_config=lora())
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert losses[0] == pytest.approx(0.693147, abs=1e-5) and losses[1] != losses[0]
        with torch.no_grad():
            torch.testing.assert_close(model.score(latents, PROMPTS[:2], 500), expected)

    def test_what_is_saved_is_loaded_onto_a_pipeline(self, tmp_path, family):
        model, latents = moved_reward(family(tmp_path / "a"))
        model.save_pretrained(tmp_path / "saved")
        with pytest.raises(ValueError, match="shares the denoiser of a pipeline: load it with"):
            LatentRewardModel.from_pretrained(tmp_path / "saved")
        again = family(tmp_path / "b")
        loaded = LatentRewardModel.from_pretrained(tmp_path / "saved", pipeline=again)
        with torch.no_grad():
            expected = model.score(latents, PROMPTS[:2], 500)
            assert torch.equal(loaded.score(latents, PROMPTS[:2], 500), expected)
        plain = family(tmp_path / "c")
        plain.load_lora_weights(tmp_path / "saved", adapter_name="judge")  # an ordinary LoRA of diffusers
        denoiser = wrap_pipeline(plain).denoiser
        assert "judge" in denoiser.peft_config

    def test_bad_input(self, tmp_path, family):
        pipeline = wrap_pipeline(family(tmp_path / "pipeline"))
        model, _ = moved_reward(pipeline)
        with pytest.raises(ValueError, match="already carries the adapter of a latent reward"):
            LatentRewardModel.from_pipeline(pipeline, shared=True)
        with pytest.raises(ValueError, match="shares the denoiser of another pipeline"):
            model.check_pipeline(family(tmp_path / "other"))
        with pytest.raises(ValueError, match="cannot use `gradient_checkpointing`"):
            model.gradient_checkpointing_enable()
        for settings, message in (
            ({"use_peft": False}, "which `use_peft=False` trains: it would change while it judges"),
            ({"reward_dtype": "bfloat16"}, "leave `reward_dtype` out"),
        ):
            with pytest.raises(ValueError, match=message):
                SPOTrainer(tiny_spo_config(tmp_path / "run", **settings), pipeline, model, train_dataset=PROMPTS)
