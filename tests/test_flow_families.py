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
Necessity: a family that packs, scales or guides a little differently from diffusers samples images that look right and
trains a model that nobody uses. Each is compared with its own diffusers pipeline, and trained end to end.
"""

import dataclasses
import inspect
import re
from collections import Counter

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from peft import LoraConfig
from PIL import Image

from tests.flow_testing import (
    tiny_flux2_klein_pipeline,
    tiny_flux_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_z_image_pipeline,
)
from tests.testing_utils import (
    brightness_reward,
    ddim_scheduler,
    tiny_clip,
    tiny_sd_pipeline,
    tiny_spo_config,
    tiny_step_reward_config,
)
from trl_spo import (
    RolloutSettings,
    SPOFlux2KleinPipeline,
    SPOFluxPipeline,
    SPOQwenImagePipeline,
    SPOStableDiffusion3Pipeline,
    SPOTrainer,
    SPOZImagePipeline,
    StepAwareRewardModel,
    StepRewardTrainer,
    stepwise_rollout,
    wrap_pipeline,
)
from trl_spo.evaluation.evaluate import PROTOCOLS, evaluate_pipeline
from trl_spo.pipelines.auto import FAMILIES
from trl_spo.pipelines.conditioning import PromptEmbeds
from trl_spo.pipelines.encoding_cache import EncodingCache
from trl_spo.pipelines.flow import pack, unpack
from trl_spo.scheduling_ddim import stable_diffusion_snr


SIZE = 32
PROMPTS = ["a red cat", "a blue dog on a hill"]
MAKERS = {
    "sd3": (tiny_sd3_pipeline, SPOStableDiffusion3Pipeline, 4.5),
    "flux": (tiny_flux_pipeline, SPOFluxPipeline, 3.5),
    "flux2": (tiny_flux2_klein_pipeline, SPOFlux2KleinPipeline, 4.0),
    "z_image": (tiny_z_image_pipeline, SPOZImagePipeline, 3.0),
    "qwen_image": (tiny_qwen_image_pipeline, SPOQwenImagePipeline, 4.0),
}
LENGTHS = {"qwen_image": 200}  # tokens that are read of a prompt; Qwen-Image's template alone takes 130, one per byte
PROTOCOL_NAMES = {
    "sd3": "sd3", "flux": "flux", "flux2": "flux2-klein", "z_image": "z-image", "qwen_image": "qwen-image"
}  # fmt: skip
every_family = pytest.mark.parametrize("family", list(MAKERS))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each tiny pipeline once, wrapped; nothing below changes their weights."""
    found = {}

    def get(family: str):
        if family not in found:
            make, cls, _ = MAKERS[family]
            pipe = make(tmp_path_factory.mktemp(family))
            pipe.set_progress_bar_config(disable=True)
            found[family] = wrap_pipeline(pipe)
            found[family].max_sequence_length = LENGTHS.get(family, 40)
            assert type(found[family]) is cls
        return found[family]

    return get


def fresh(family: str, folder):
    pipeline = wrap_pipeline(MAKERS[family][0](folder))
    pipeline.sd_pipeline.set_progress_bar_config(disable=True)
    pipeline.max_sequence_length = LENGTHS.get(family, 40)
    return pipeline


def in_diffusers(pipeline, family: str, latents: torch.Tensor, steps: int, **kwargs) -> torch.Tensor:
    """Images of the plain pipeline from the same noise, in [0, 1]."""
    scale = MAKERS[family][2]
    arguments = pipeline.call_arguments(scale)  # what a model card tells its reader
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(PROMPTS)
    arguments["max_sequence_length"] = LENGTHS.get(family, 40)
    if family == "flux2":
        arguments["text_encoder_out_layers"] = (0, 1, 2)
    given = pack(latents) if family in ("flux", "qwen_image") else latents
    return pipeline.sd_pipeline(
        prompt=list(PROMPTS),
        num_inference_steps=steps,
        height=SIZE,
        width=SIZE,
        latents=given.clone(),
        output_type="pt",
        **{**arguments, **kwargs},
    ).images


def noise_for(pipeline, seed: int = 0) -> torch.Tensor:
    shape = (len(PROMPTS), *pipeline.latent_shape(SIZE, SIZE))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sampled(pipeline, family: str, latents: torch.Tensor, steps: int, eta: float = 0.0) -> torch.Tensor:
    embeds = pipeline.encode_prompt(PROMPTS)
    for timestep in pipeline.set_timesteps(steps, latents.shape[1:]):
        output = pipeline.predict(latents, timestep, embeds, MAKERS[family][2])
        latents = pipeline.step_distribution(output, timestep, latents, eta).prev_sample_mean
    return (pipeline.decode_latents(latents) / 2 + 0.5).clamp(0, 1)


def test_packing_is_undone_and_is_diffusers_own():
    latents = torch.randn(2, 3, 6, 4)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 3, 6, 4))
    assert torch.equal(unpack(pack(latents), 6, 4), latents)


class TestAgainstDiffusers:
    @every_family
    def test_the_deterministic_limit_is_diffusers_own_sampling(self, made, family):
        """Same noise, same embeddings: schedule, call, guidance, steps and decoder agree to float error."""
        pipeline = made(family)
        latents = noise_for(pipeline)
        found = sampled(pipeline, family, latents, 4)
        assert torch.allclose(found, in_diffusers(pipeline, family, latents, 4), atol=1e-5)
        assert found.std() > 0.05

    @every_family
    def test_another_size_has_its_own_schedule_and_shape(self, made, family):
        pipeline = made(family)
        small, large = pipeline.latent_shape(SIZE, SIZE), pipeline.latent_shape(2 * SIZE, SIZE)
        assert large == (small[0], 2 * small[1], small[2])
        schedules = []
        for shape in (small, large):
            pipeline.set_timesteps(6, shape)
            schedules.append(pipeline.step_rule.sigmas)
        static = family == "sd3" or not pipeline.scheduler.config.use_dynamic_shifting
        assert (schedules[0] == schedules[1]) == static
        with pytest.raises(ValueError, match="`height` must be a positive multiple of"):
            pipeline.latent_shape(SIZE + 1, SIZE)

    @every_family
    def test_images_are_encoded_in_the_scale_of_the_denoiser(self, made, family):
        """Decoding the mean of the posterior is what the VAE itself makes of it."""
        pipeline = made(family)
        images = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
        mean, std = pipeline.image_posterior(images)
        assert mean.shape[1:] == std.shape[1:] == pipeline.latent_shape(SIZE, SIZE)
        with torch.no_grad():
            vae = pipeline.vae
            given = images.unsqueeze(2) if family == "qwen_image" else images
            expected = vae.decode(vae.encode(given).latent_dist.mode(), return_dict=False)[0]
            expected = expected[:, :, 0] if family == "qwen_image" else expected
        assert torch.allclose(pipeline.decode_latents(mean), expected, atol=1e-4)
        assert (std == 0).all() if family == "flux2" else (std > 0).all()


class TestProtocols:
    def test_they_are_the_defaults_of_diffusers_pipelines(self, made):
        """But for SD3, which the reinforcement-learning papers sample in 40 steps at 4.5, as the card of 3.5 Medium says."""
        for family, name in PROTOCOL_NAMES.items():
            pipeline, protocol = made(family), PROTOCOLS[name]
            defaults = {n: p.default for n, p in inspect.signature(pipeline.sd_pipeline.__call__).parameters.items()}
            scale = "true_cfg_scale" if family == "qwen_image" else "guidance_scale"
            expected = (defaults["num_inference_steps"], defaults[scale])
            found = (protocol.num_inference_steps, protocol.guidance_scale)
            assert found == ((40, 4.5) if family == "sd3" else expected), family
            assert protocol.scheduler == pipeline.step_rule.sampler_name and protocol.eta == 0

    @every_family
    def test_an_evaluation_samples_as_plain_diffusers_does(self, made, family):
        pipeline, protocol = made(family), PROTOCOLS[PROTOCOL_NAMES[family]]
        short = dataclasses.replace(protocol, num_inference_steps=3, height=SIZE, width=SIZE)
        generators = [torch.Generator().manual_seed(short.seed + i) for i in range(len(PROMPTS))]
        shape = pipeline.latent_shape(SIZE, SIZE)
        latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        images = in_diffusers(pipeline, family, latents, 3, **pipeline.call_arguments(short.guidance_scale))
        result = evaluate_pipeline(pipeline, PROMPTS, {"red": lambda images, _: images[:, 0].mean((1, 2))}, short)
        assert torch.allclose(result.scores["red"], images[:, 0].mean((1, 2)), atol=1e-3)


class TestConditioning:
    @every_family
    @torch.no_grad()
    def test_a_neighbour_changes_nothing(self, made, family):
        """Prompts of different length, encoded apart and concatenated, predict what each predicts alone."""
        pipeline = made(family)
        parts = [pipeline.encode_prompt([prompt]) for prompt in PROMPTS]
        together = PromptEmbeds.cat(parts)
        latents, scale = noise_for(pipeline), MAKERS[family][2]
        timestep = pipeline.set_timesteps(4, latents.shape[1:])[1]
        batch = pipeline.predict(latents, timestep, together, scale)
        for row in range(len(PROMPTS)):
            one = slice(row, row + 1)
            assert torch.allclose(pipeline.predict(latents[one], timestep, parts[row], scale), batch[one], atol=1e-5)
            assert torch.allclose(
                pipeline.predict(latents[one], timestep, together[one], scale), batch[one], atol=1e-5
            )
        order = torch.tensor([1, 0])
        swapped = pipeline.predict(latents[order], timestep, together[order], scale)
        assert torch.allclose(swapped, batch[order], atol=1e-5)

    @pytest.mark.parametrize("family", ["z_image", "qwen_image"])
    @torch.no_grad()
    def test_lengths_are_a_shorter_way_to_say_what_masks_say(self, made, family):
        """Embeddings from elsewhere may have masks alone, or, of one length, nothing."""
        pipeline, scale = made(family), MAKERS[family][2]
        embeds, latents = pipeline.encode_prompt(PROMPTS), noise_for(pipeline)
        assert list(embeds.prompt_lengths) == embeds.prompt_mask.sum(1).tolist()
        assert list(embeds.negative_prompt_lengths) == embeds.negative_prompt_mask.sum(1).tolist()
        assert len(set(embeds.prompt_lengths)) == 2
        timestep = pipeline.set_timesteps(4, latents.shape[1:])[1]
        expected = pipeline.predict(latents, timestep, embeds, scale)
        masked = dataclasses.replace(embeds, prompt_lengths=None, negative_prompt_lengths=None)
        assert torch.allclose(pipeline.predict(latents, timestep, masked, scale), expected, atol=1e-5)
        one = embeds[:1]
        length = one.prompt_lengths[0]
        bare = PromptEmbeds(one.prompt_embeds[:, :length], one.negative_prompt_embeds)
        assert torch.allclose(pipeline.predict(latents[:1], timestep, bare, scale), expected[:1], atol=1e-5)

    def test_masks_pad_and_stay_masks(self):
        parts = [
            PromptEmbeds(torch.ones(1, length, 3), prompt_mask=torch.ones(1, length, dtype=torch.bool))
            for length in (2, 4)
        ]
        merged = PromptEmbeds.cat(parts).to(torch.bfloat16)
        assert merged.prompt_embeds.shape == (2, 4, 3) and merged.prompt_embeds.dtype == torch.bfloat16
        assert merged.prompt_mask.tolist() == [[True, True, False, False], [True] * 4]
        assert merged.prompt_mask.dtype == torch.bool and (merged.prompt_embeds[0, 2:] == 0).all()

    def test_stable_diffusion_3_without_t5(self, tmp_path):
        pipeline = wrap_pipeline(tiny_sd3_pipeline(tmp_path, with_t5=False))
        pipeline.sd_pipeline.set_progress_bar_config(disable=True)
        pipeline.max_sequence_length = 40
        latents = noise_for(pipeline)
        found = sampled(pipeline, "sd3", latents, 2)
        assert torch.allclose(found, in_diffusers(pipeline, "sd3", latents, 2), atol=1e-5)


class TestGuidance:
    @pytest.mark.parametrize("family", [name for name in MAKERS if name != "flux"])  # which has no negative prompt
    def test_unguided_means_that_the_negative_prompt_has_no_say(self, made, family):
        """`train_cfg=False` trains with this scale. For Z-Image it is 0: 1 is guidance there."""
        pipeline = made(family)
        latents = noise_for(pipeline)
        timestep = pipeline.set_timesteps(4, latents.shape[1:])[1]

        def prediction(negative: str, scale: float) -> torch.Tensor:
            with torch.no_grad():
                return pipeline.predict(latents, timestep, pipeline.encode_prompt(PROMPTS, negative), scale)

        scale = pipeline.unguided_scale
        assert torch.equal(prediction("", scale), prediction("a painting", scale))
        scale = MAKERS[family][2]
        assert not torch.allclose(prediction("", scale), prediction("a painting", scale), atol=1e-5)

    def test_without_guidance_in_the_loss_ratios_are_1_too(self, tmp_path):
        config = tiny_spo_config(
            tmp_path / "out", num_inference_steps=4, branch_start_step=0, branch_end_step=1, height=SIZE, width=SIZE,
            guidance_scale=3.0, max_steps=1, train_cfg=False,
        )  # fmt: skip
        trainer = SPOTrainer(config, fresh("z_image", tmp_path), brightness_reward, train_dataset=PROMPTS)
        scales, predict = [], trainer.pipeline.predict
        trainer.pipeline.predict = lambda *args: scales.append(args[3]) or predict(*args)
        trainer.train()
        assert set(scales) == {3.0, 0.0}
        assert next(log for log in trainer.state.log_history if "loss" in log)["ratio/chosen"] == 1.0


class TestTraining:
    @every_family
    def test_a_step_from_rollout_to_plain_diffusers(self, tmp_path, family):
        """
        Ratios exactly 1 and ln 2 before the first update; what is saved predicts in plain diffusers what was trained.
        """
        pipeline = fresh(family, tmp_path / "pipe")
        config = tiny_spo_config(
            tmp_path / "out", num_inference_steps=4, branch_start_step=0, branch_end_step=3, height=SIZE, width=SIZE,
            guidance_scale=MAKERS[family][2], max_steps=2, learning_rate=0.01, timestep_weighting="even",
        )  # fmt: skip
        trainer = SPOTrainer(config, pipeline, brightness_reward, train_dataset=PROMPTS)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert logs[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert logs[0]["ratio/chosen"] == logs[0]["ratio/rejected"] == 1.0
        trainer.save_model()
        card = (tmp_path / "out" / "README.md").read_text()
        assert "FlowMatchEuler sigmas with stochastic steps (ddim, eta 1), 4 steps" in card
        calls = []
        (line,) = [line for line in card.splitlines() if line.startswith("image = pipe(")]
        exec(line.removesuffix(".images[0]"), {"pipe": lambda **kwargs: calls.append(kwargs)})
        expected = {
            "num_inference_steps": 4,
            "height": SIZE,
            "width": SIZE,
            **pipeline.call_arguments(MAKERS[family][2]),
        }
        assert calls == [{"prompt": "a photo of a cat", **expected}]

        latents = noise_for(pipeline)
        trained = sampled(pipeline, family, latents, 3)
        with pipeline.reference():
            before = sampled(pipeline, family, latents, 3)
        plain = fresh(family, tmp_path / "plain")
        assert torch.allclose(in_diffusers(plain, family, latents, 3), before, atol=1e-5)
        plain.sd_pipeline.load_lora_weights(str(tmp_path / "out"))
        assert torch.allclose(in_diffusers(plain, family, latents, 3), trained, atol=1e-4)
        assert not torch.allclose(trained, before, atol=1e-4)

    @every_family
    def test_as_the_presets_train_it(self, tmp_path, family):
        """Weights in bfloat16 under autocast, checkpoints: latents stay float32, and ratios are exactly 1 all the same."""
        pipeline = fresh(family, tmp_path / "pipe")
        pipeline.sd_pipeline.to(torch.bfloat16)
        config = tiny_spo_config(
            tmp_path / "out", num_inference_steps=4, branch_start_step=0, branch_end_step=1, height=SIZE, width=SIZE,
            guidance_scale=MAKERS[family][2], max_steps=1, gradient_checkpointing=True, bf16=True,
            timestep_weighting="even", per_device_train_batch_size=1, gradient_accumulation_steps=2, num_candidates=3,
        )  # fmt: skip
        trainer = SPOTrainer(config, pipeline, brightness_reward, train_dataset=PROMPTS)
        pairs = trainer.rollout(PROMPTS)
        assert pipeline.compute_dtype == torch.bfloat16 and pairs.chosen_prev_latents.dtype == torch.float32
        trained = {name: p.clone() for name, p in pipeline.denoiser.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {torch.float32}
        trainer.train()
        first = next(entry for entry in trainer.state.log_history if "loss" in entry)
        assert first["ratio/chosen"] == first["ratio/rejected"] == 1.0 and first["grad_norm"] > 0
        after = dict(pipeline.denoiser.named_parameters())
        assert any(not torch.equal(value, after[name]) for name, value in trained.items())

    @every_family
    def test_full_fine_tuning_checkpointing_and_bfloat16(self, tmp_path, family):
        pipeline = fresh(family, tmp_path / "pipe")
        config = tiny_spo_config(
            tmp_path / "out", num_inference_steps=4, branch_start_step=0, branch_end_step=3, height=SIZE, width=SIZE,
            guidance_scale=MAKERS[family][2], max_steps=1, use_peft=False, gradient_checkpointing=True, bf16=True,
        )  # fmt: skip
        trainer = SPOTrainer(config, pipeline, brightness_reward, train_dataset=PROMPTS)
        before = {name: value.clone() for name, value in pipeline.denoiser.named_parameters()}
        frozen = {name: value.clone() for name, value in pipeline.vae.state_dict().items()}
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert logs[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and logs[0]["ratio/chosen"] == 1.0
        assert any(not torch.equal(value, before[name]) for name, value in pipeline.denoiser.named_parameters())
        assert all(torch.equal(value, frozen[name]) for name, value in pipeline.vae.state_dict().items())

    @pytest.mark.parametrize("sampler", ["precise", "flow_sde", "dance_sde", "cps"])
    def test_every_sampler_rolls_out(self, made, sampler):
        pipeline = made("sd3")
        pipeline.step_rule.set_sampler(sampler)
        try:
            pairs = stepwise_rollout(
                pipeline, PROMPTS, brightness_reward, num_inference_steps=6, branch_start_step=0, eta=0.7,
                guidance_scale=4.5, preference_threshold=0.0, height=SIZE, width=SIZE,
            )  # fmt: skip
        finally:
            pipeline.step_rule.set_sampler("ddim")
        # SD3's last but one step ends at 0.009 and the last at 0: neither branches.
        assert [branch.step for branch in pairs.branches] == [0, 1, 2, 3]
        assert len(pairs) == 8 and pairs.final_latents.dtype == torch.float32

    @every_family
    def test_the_adapter_by_default(self, tmp_path, family):
        """
        The layers that diffusers' training scripts and the reinforcement-learning projects adapt, in every block, and no
        others. alpha = rank, so that tools that do not read the metadata load it at the same strength.
        """
        pipeline = fresh(family, tmp_path)
        pipeline.prepare_for_training()
        config: LoraConfig = pipeline.denoiser.peft_config["default"]
        assert config.r == config.lora_alpha == 32
        adapted = {
            name.partition(".lora_")[0] for name, value in pipeline.denoiser.named_parameters() if value.requires_grad
        }
        both = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
        both += [f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
        both = [f"transformer_blocks.0.{name}" for name in both]
        feed_forward = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
        single = [f"single_transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")]
        expected = {  # of the first block of each kind
            "sd3": both,
            "flux": [*both, *(f"transformer_blocks.0.{name}" for name in feed_forward), *single],
            "flux2": [*both, *(f"single_transformer_blocks.0.attn.{n}" for n in ("to_qkv_mlp_proj", "to_out"))],
            "z_image": [
                f"{part}.0.attention.{name}"
                for part in ("noise_refiner", "context_refiner", "layers")
                for name in ("to_q", "to_k", "to_v", "to_out.0")
            ],
            "qwen_image": both,
        }[family]
        assert {name for name in adapted if re.search(r"\.0\.(attn|ff|ff_context|attention)\.", name)} == set(expected)
        counts = Counter(re.sub(r"\.\d+\.", ".0.", name, count=1) for name in adapted)
        blocks = {name: len(getattr(pipeline.denoiser, name.partition(".")[0])) for name in counts}
        short = "transformer_blocks.0.attn"  # SD3's last block ends with the image: its text goes nowhere
        blocks |= {f"{short}.to_add_out": blocks[f"{short}.to_add_out"] - 1} if family == "sd3" else {}
        assert counts == blocks


class TestStepReward:
    @every_family
    def test_a_step_aware_reward_is_trained_on_its_predictions(self, made, family, tmp_path):
        """Both images get the same noise at t / 1000, and the judge sees the decoded x_0 that follows from the velocity."""
        pipeline = made(family)
        images = torch.rand(1, 2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
        embeds, timesteps = pipeline.encode_prompt(PROMPTS[:1]), torch.tensor([700])
        latents = torch.cat([pipeline.image_posterior(image[None])[0] for image in images[0]])
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
        pipeline.set_timesteps(4, latents.shape[1:])
        noisy = pipeline.add_noise(latents, noise, timesteps.expand(2))
        assert torch.allclose(noisy, 0.3 * latents + 0.7 * noise, atol=1e-5)
        found = pipeline.predict_original_sample(noisy, timesteps.expand(2), embeds.repeat(2), 1.0)
        with torch.no_grad():
            velocity = pipeline.predict(noisy, timesteps.expand(2), embeds.repeat(2), 1.0)
        assert torch.allclose(found, noisy - 0.7 * velocity, atol=1e-5)

        reward = StepAwareRewardModel.from_clip(tiny_clip(tmp_path))
        colours = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue")]
        row = {"caption": PROMPTS[0], "jpg_0": colours[0], "jpg_1": colours[1], "label_0": 1.0, "label_1": 0.0}
        config = tiny_step_reward_config(tmp_path / "run", max_steps=1, resolution=SIZE, per_device_train_batch_size=2)
        trainer = StepRewardTrainer(config, pipeline, reward, train_dataset=[row, row])
        before = {name: value.clone() for name, value in pipeline.denoiser.state_dict().items()}
        trainer.train()
        assert trainer.state.log_history[0]["loss"] > 0
        assert all(torch.equal(value, before[name]) for name, value in pipeline.denoiser.state_dict().items())


class TestOffloading:
    def test_text_encoders_are_on_the_device_only_while_they_encode(self, tmp_path, monkeypatch):
        """Where they are is seen by the moves; the run is the same, and the cache keeps what it is allowed to."""
        moves, logs = [], {}
        for offload in (False, True):
            pipeline = fresh("sd3", tmp_path / str(offload))
            encoder = pipeline.sd_pipeline.text_encoder_3
            monkeypatch.setattr(encoder, "to", lambda *args, e=encoder: moves.append(str(args[0])) or e)
            config = tiny_spo_config(
                tmp_path / f"out-{offload}", num_inference_steps=4, branch_start_step=0, branch_end_step=3, height=SIZE,
                width=SIZE, guidance_scale=4.5, max_steps=1, offload_text_encoders=offload,
            )  # fmt: skip
            trainer = SPOTrainer(config, pipeline, brightness_reward, train_dataset=PROMPTS)
            del moves[:]
            trainer.train()
            logs[offload] = next(entry for entry in trainer.state.log_history if "loss" in entry)
        assert moves == ["cpu", "cpu"]  # to the device of the run, and back: once, as both prompts come together
        assert logs[True]["step_reward/mean"] == logs[False]["step_reward/mean"]

    def test_the_cache_bounds_its_bytes(self, made):
        pipeline = made("sd3")
        one = pipeline.encode_prompt(PROMPTS[:1]).nbytes
        cache = EncodingCache(max_prompt_bytes=int(1.5 * one))
        for prompt in (*PROMPTS, PROMPTS[0]):
            cache.encode_prompts(pipeline, [prompt])
        assert cache.num_prompts_encoded == 3  # there was room for one


class TestNoiseLevels:
    def test_a_branch_range_means_the_same_noise_everywhere(self, made):
        """SD1.5's t = 751 has the signal-to-noise ratio of sigma = .805: step 8 of 20 on SD3, of which 8 lie above."""
        pipeline = made("sd3")
        assert stable_diffusion_snr(751) == pytest.approx(((1 - 0.805) / 0.805) ** 2, rel=0.01)
        timesteps = pipeline.set_timesteps(20)
        settings = RolloutSettings(branch_start_timestep=751).resolve(pipeline.step_rule, timesteps)
        assert settings.branch_start_step == 8 and settings.branch_start_timestep is None
        assert timesteps[7] > 810 > timesteps[8] == 806
        with pytest.raises(ValueError, match="No step of the schedule"):
            RolloutSettings(branch_start_timestep=100, branch_end_timestep=900).resolve(pipeline.step_rule, timesteps)

    @every_family
    def test_even_weights_bring_every_step_to_one_constant(self, family, tmp_path):
        """
        A change of the prediction moves the log-ratio of a step by |d mean / d v| / std: from the first to the last that
        branches by a factor of 40 and more. Weighted it is 0.68 in every step, the median of Stable Diffusion 1's, so `beta`
        means the same in every family.
        """
        settings = {"num_inference_steps": 20, "branch_start_step": 0, "timestep_weighting": "even"}
        config = tiny_spo_config(tmp_path / "out", height=SIZE, width=SIZE, **settings)
        trainer = SPOTrainer(config, fresh(family, tmp_path), brightness_reward, train_dataset=PROMPTS)
        rule, pipeline = trainer.pipeline.step_rule, trainer.pipeline
        schedule = pipeline.set_timesteps(20, pipeline.latent_shape(SIZE, SIZE))
        timesteps = torch.tensor([t for step, t in enumerate(schedule) if rule.is_stochastic(step, 1.0)])
        velocities = torch.tensor([0.0, 1.0])[:, None, None, None, None].expand(2, len(timesteps), 1, 1, 1)
        still, moved = (rule.distribution(v, timesteps, torch.zeros_like(v), 1.0) for v in velocities)
        sensitivity = ((moved.prev_sample_mean - still.prev_sample_mean) / still.std_dev_t).abs().flatten()
        assert sensitivity.max() > 35 * sensitivity.min()
        weighted = trainer.timestep_weights(timesteps) * sensitivity
        torch.testing.assert_close(weighted, torch.full_like(weighted, 0.68), rtol=1e-4, atol=0)

    def test_on_stable_diffusion_it_is_the_step_itself(self, tmp_path):
        scheduler = ddim_scheduler(beta_start=0.00085, beta_end=0.012, steps_offset=1, set_alpha_to_one=False)
        pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path, scheduler=scheduler))
        timesteps = pipeline.set_timesteps(20)
        settings = RolloutSettings(branch_start_timestep=751, branch_end_timestep=51)
        resolved = settings.resolve(pipeline.step_rule, timesteps)
        assert (resolved.branch_start_step, resolved.branch_end_step) == (4, timesteps.index(51))


class TestBadInput:
    def test_a_negative_prompt_for_flux(self, made, tmp_path):
        """Also when a trainer is made or an evaluation begins: its first rollout or image may be far away."""
        pipeline, message = made("flux"), "no unconditional half, so a `negative_prompt` has no effect.* got 'blurry'"
        with pytest.raises(ValueError, match=message):
            pipeline.encode_prompt(PROMPTS, "blurry")
        config = tiny_spo_config(tmp_path / "out", height=SIZE, width=SIZE, negative_prompt="blurry")
        with pytest.raises(ValueError, match=message):
            SPOTrainer(config, tiny_flux_pipeline(tmp_path), brightness_reward, train_dataset=PROMPTS)
        reward = StepAwareRewardModel.from_clip(tiny_clip(tmp_path))
        row = {"caption": "a", "jpg_0": Image.new("RGB", (8, 8)), "jpg_1": Image.new("RGB", (8, 8)), "label_0": 1.0}
        config = tiny_step_reward_config(tmp_path / "run", resolution=SIZE, negative_prompt="blurry")
        with pytest.raises(ValueError, match=message):
            StepRewardTrainer(config, pipeline, reward, train_dataset=[{**row, "label_1": 0.0}] * 2)
        protocol = dataclasses.replace(PROTOCOLS["flux"], negative_prompt="blurry")
        with pytest.raises(ValueError, match=message):
            evaluate_pipeline(pipeline, PROMPTS, {"red": brightness_reward}, protocol)

    @pytest.mark.parametrize("checkpoint", ["schnell", "klein", "turbo"])
    def test_distilled_models_train_with_a_warning_and_sample_without(self, checkpoint, tmp_path, monkeypatch):
        said = []
        monkeypatch.setattr("trl_spo.pipelines.flow.logger.warning", said.append)
        if checkpoint == "schnell":
            raw = tiny_flux_pipeline(tmp_path, guidance=False)
        elif checkpoint == "klein":
            raw = tiny_flux2_klein_pipeline(tmp_path, is_distilled=True)
        else:
            raw = tiny_sd3_pipeline(tmp_path)
            raw.register_to_config(_name_or_path="someone/stable-diffusion-3.5-large-turbo")
        pipeline = wrap_pipeline(raw)
        assert pipeline.is_distilled and not said
        pipeline.prepare_for_training()
        assert len(said) == 1 and "Base models are the better start" in said[0]

    def test_a_folder_named_turbo_makes_no_distilled_model(self, tmp_path):
        raw = tiny_sd3_pipeline(tmp_path)
        raw.register_to_config(_name_or_path="/models/turbo/stable-diffusion-3.5-medium/")
        assert not wrap_pipeline(raw).is_distilled

    def test_long_prompts_are_announced_once_and_by_what_reads_them(self, tmp_path, monkeypatch):
        """Regression: diffusers printed the end of every prompt of 78 tokens, although T5 reads it."""
        said = []
        monkeypatch.setattr("trl_spo.pipelines.conditioning.logger.warning", said.append)
        long = " ".join(["a red cat on a blue dog"] * 12)  # 84 words; the CLIPs read 77 tokens
        pipeline = wrap_pipeline(tiny_sd3_pipeline(tmp_path))
        pipeline.encode_prompt([long])
        assert not said
        pipeline.max_sequence_length = 40
        pipeline.encode_prompt([long])
        pipeline.encode_prompt([long])
        assert len(said) == 1 and "the text encoder reads 40" in said[0]
        wrap_pipeline(tiny_sd3_pipeline(tmp_path, with_t5=False)).encode_prompt([long])
        assert len(said) == 2 and "the text encoder reads 77" in said[1]

    @pytest.mark.parametrize("family, name", [
        ("sd3", "shift_factor"), ("flux", "shift_factor"), ("z_image", "shift_factor"),
        ("qwen_image", "latents_mean"), ("qwen_image", "latents_std"),
    ])  # fmt: skip
    def test_a_vae_without_shift(self, tmp_path, family, name):
        pipe = MAKERS[family][0](tmp_path)
        pipe.vae.register_to_config(**{name: None})
        with pytest.raises(ValueError, match=f"The VAE has no `{name}` in its configuration"):
            wrap_pipeline(pipe)

    def test_flux_needs_its_t5(self, tmp_path):
        """SD3 may lack it, see above."""
        pipe = tiny_flux_pipeline(tmp_path)
        pipe.register_modules(text_encoder_2=None)
        with pytest.raises(ValueError, match="text_encoder_2"):
            wrap_pipeline(pipe)

    def test_a_shift_that_is_too_large(self, tmp_path):
        """S x shift above about 1,000: first steps are closer than integers."""
        pipe = tiny_sd3_pipeline(tmp_path)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=12.0)
        config = tiny_spo_config(tmp_path / "out", num_inference_steps=100, height=SIZE, width=SIZE)
        with pytest.raises(ValueError, match="100 steps of this schedule .* or a scheduler with a smaller shift"):
            SPOTrainer(config, pipe, brightness_reward, train_dataset=PROMPTS)

    def test_a_scheduler_of_another_kind(self, tmp_path):
        pipe = tiny_sd3_pipeline(tmp_path)
        pipe.scheduler = DDIMScheduler()
        with pytest.raises(ValueError, match="from a `FlowMatchEulerDiscreteScheduler`.* has a `DDIMScheduler`"):
            wrap_pipeline(pipe)

    def test_settings_of_the_sampler(self, tmp_path):
        config = {"height": SIZE, "width": SIZE, "num_inference_steps": 4, "branch_start_step": 0}
        for settings, message in (
            ({"sampler": "euler"}, "`sampler` must be one of .*'ddim'.* got 'euler'"),
            ({"eta": 1.4}, r"`eta` must be in \[0, 1\] for the sampler 'ddim', got 1.4"),
            ({"num_inference_steps": 2000}, "2000 steps of this schedule are so close"),
        ):
            with pytest.raises(ValueError, match=message):
                SPOTrainer(
                    tiny_spo_config(tmp_path / "out", **{**config, **settings}),
                    tiny_sd3_pipeline(tmp_path / "pipe"),
                    brightness_reward,
                    train_dataset=PROMPTS,
                )

    def test_what_is_accepted_is_said(self):
        with pytest.raises(TypeError) as error:
            wrap_pipeline(3)
        assert all(f"`{name}`" in str(error.value) for name in FAMILIES)


@pytest.mark.parametrize("family", ["sd", *MAKERS])
def test_the_negative_prompt_of_a_run_is_encoded_once(family, made, tmp_path):
    """Three prompts are three texts and one negative one, and the bits are those of each prompt encoded whole."""
    pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path)) if family == "sd" else made(family)
    has_negative = family != "flux"
    encoder = pipeline.text_encoders()["text_encoder"]
    prompts = [*PROMPTS, "a tree"]
    calls = []
    hook = encoder.register_forward_hook(lambda *_: calls.append(1))
    cache = EncodingCache()
    rows = [cache.encode_prompts(pipeline, [prompt]) for prompt in prompts]
    hook.remove()
    assert len(calls) == 3 + has_negative
    for prompt, row in zip(prompts, rows, strict=True):
        expected = pipeline.encode_prompt([prompt], "")
        for field in dataclasses.fields(PromptEmbeds):
            values = getattr(row, field.name), getattr(expected, field.name)
            assert (values[0] is None) == (values[1] is None), field.name
            assert torch.equal(*values) if torch.is_tensor(values[0]) else values[0] == values[1], field.name
    if has_negative:
        other = cache.encode_prompts(pipeline, [prompts[0]], "a dog")
        assert not torch.equal(other.negative_prompt_embeds, rows[0].negative_prompt_embeds)
