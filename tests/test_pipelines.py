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
Necessity: the pipeline is where SPO meets other people's models. It must agree with diffusers in what it computes, leave
their objects alone, and refuse with one sentence what it cannot train.
"""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, inject_adapter_in_model

from trl_spo import (
    SPOStableDiffusionPipeline,
    SPOStableDiffusionXLPipeline,
    SPOTrainer,
    merge_lora,
    wrap_pipeline,
)
from trl_spo.pipelines.conditioning import PromptEmbeds
from trl_spo.pipelines.ddpo import DDPOStableDiffusionPipeline
from trl_spo.pipelines.denoiser import compute_dtype_of
from trl_spo.pipelines.encoding_cache import EncodingCache
from trl_spo.sampling import generate_images
from trl_spo.training.compilation import compile_blocks

from .flow_testing import tiny_flux_pipeline, tiny_sd3_pipeline
from .testing_utils import (
    PROMPTS,
    brightness_reward,
    changed,
    ddim_scheduler,
    state_of,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
    tiny_spo_config,
    train_logs,
)


MAKERS = {"sd": tiny_sd_pipeline, "sdxl": tiny_sdxl_pipeline}


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request, tmp_path):
    return MAKERS[request.param](tmp_path)


def reference_call(pipe, prompts, generators, **kwargs):
    """What plain diffusers samples."""
    return pipe(prompts, generator=generators, output_type="np", **kwargs).images


def encode_but_the_last_layer(pipe, prompts, negative_prompts) -> dict:
    """The final norm on the features before the last layer; the negative prompt passes all layers."""
    ids = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    norm = dict(pipe.text_encoder.named_modules())
    norm = norm.get("final_layer_norm") or norm["text_model.final_layer_norm"]
    with torch.no_grad():
        hidden = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        negative = pipe.encode_prompt(negative_prompts, "cpu", 1, do_classifier_free_guidance=False)[0]
        return {"prompt_embeds": norm(hidden), "negative_prompt_embeds": negative}


class TestSampling:
    @pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
    @pytest.mark.parametrize("eta", [0.0, 1.0])
    def test_equals_plain_diffusers(self, pipe, guidance_scale, eta):
        prompts, settings = PROMPTS[:2], {"num_inference_steps": 4, "guidance_scale": guidance_scale, "eta": eta}
        generators = [[torch.Generator().manual_seed(i) for i in range(2)] for _ in range(2)]
        expected = reference_call(pipe, prompts, generators[0], **settings)
        spo_pipeline = wrap_pipeline(pipe)
        images = spo_pipeline.sample(spo_pipeline.encode_prompt(prompts), generators[1], **settings)
        images = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(images, expected, atol=2e-5)

    def test_negative_prompt_and_size(self, pipe):
        settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "eta": 1.0, "height": 24, "width": 8}
        generators = [[torch.Generator().manual_seed(7)] for _ in range(2)]
        expected = reference_call(pipe, [PROMPTS[0]], generators[0], negative_prompt=["a dog"], **settings)
        spo_pipeline = wrap_pipeline(pipe)
        embeds = spo_pipeline.encode_prompt([PROMPTS[0]], "a dog", height=24, width=8)
        images = spo_pipeline.sample(embeds, generators[1], **settings)
        assert images.shape == (1, 3, 24, 8)
        np.testing.assert_allclose((images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), expected, atol=2e-5)

    @pytest.mark.parametrize("options", [{"guidance_rescale": 0.7}, {"clip_skip": 1}])
    def test_options_mean_what_they_mean_in_diffusers(self, pipe, options):
        """With a negative prompt: layers are skipped for the prompt alone."""
        wrapped = wrap_pipeline(pipe)
        pipe.scheduler = wrapped.scheduler
        arguments = {"num_inference_steps": 3, "guidance_scale": 4.0, "eta": 1.0, "negative_prompt": "dog"}
        seeds, own = range(2), {**arguments, "batch_size": 2, "seeds": range(2)}
        plain = generate_images(wrapped, PROMPTS[:2], **own)
        ours = generate_images(wrapped, PROMPTS[:2], **own, **options)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        told = {**arguments, "negative_prompt": ["dog"] * 2, **options}
        prompts = PROMPTS[:2]
        if "clip_skip" in options and wrapped.denoiser.config.addition_embed_type is None:
            # By hand: diffusers 0.42 fails at the text encoders of transformers 5.
            prompts, told = None, {**arguments, **encode_but_the_last_layer(pipe, PROMPTS[:2], ["dog"] * 2)}
            del told["negative_prompt"]
        theirs = reference_call(pipe, prompts, generators, **told)
        np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), theirs, atol=1e-5)
        assert (ours - plain).abs().max() > 1e-3
        assert torch.equal(generate_images(wrapped, PROMPTS[:2], **own), plain)  # an option of one call stays there

    def test_image_depends_on_its_own_seed_only(self, pipe):
        spo_pipeline = wrap_pipeline(pipe)

        def sample(indices):
            generators = [torch.Generator().manual_seed(i) for i in indices]
            return spo_pipeline.sample(spo_pipeline.encode_prompt([PROMPTS[i] for i in indices]), generators, 3)

        together, alone = sample([0, 1, 2]), sample([1])
        torch.testing.assert_close(together[1], alone[0], atol=1e-5, rtol=1e-5)
        assert (together[0] - together[1]).abs().max() > 0.01

    def test_encode_and_decode_are_the_vaes(self, pipe):
        spo_pipeline = wrap_pipeline(pipe)
        images = torch.rand(2, 3, 16, 16) * 2 - 1
        latents = spo_pipeline.encode_images(images, torch.Generator().manual_seed(0))
        posterior = pipe.vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
        expected = (posterior.mean + posterior.std * noise) * pipe.vae.config.scaling_factor
        torch.testing.assert_close(latents, expected)
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        torch.testing.assert_close(spo_pipeline.decode_latents(latents), decoded)

    def test_the_vae_keeps_its_precision_inside_autocast(self, pipe):
        """Regression: SDXL's VAE is kept in float32 because it overflows in float16; autocast would undo that."""
        spo_pipeline = wrap_pipeline(pipe)
        latents, images = torch.randn(1, 4, 8, 8), torch.rand(1, 3, 16, 16)
        decoded, posterior = spo_pipeline.decode_latents(latents), spo_pipeline.image_posterior(images)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(spo_pipeline.decode_latents(latents), decoded)
            assert all(torch.equal(a, b) for a, b in zip(spo_pipeline.image_posterior(images), posterior, strict=True))

    def test_a_vae_that_does_not_survive_float16_is_copied(self, tmp_path):
        """Regression: the user's VAE became float32, and the pipeline did not sample any more."""
        pipe = tiny_sdxl_pipeline(tmp_path).to(torch.float16)
        pipe.vae.register_to_config(force_upcast=True)
        wrapped = wrap_pipeline(pipe)
        assert pipe.vae.dtype == torch.float16 and wrapped.vae.dtype == torch.float32
        pipe("a red cat", num_inference_steps=1, output_type="np")
        images = wrapped.decode_latents(torch.randn(1, 4, 8, 8))
        assert images.dtype == torch.float32 and wrapped.vae in wrapped.running_networks()
        assert wrapped.vae in wrapped.frozen_modules().values() and pipe.vae in wrapped.frozen_modules().values()
        wrapped.prepare_for_training()
        assert not any(weight.requires_grad for weight in wrapped.vae.parameters())

    def test_prediction_without_guidance_runs_half_the_batch(self, pipe):
        spo_pipeline = wrap_pipeline(pipe)
        embeds = spo_pipeline.encode_prompt(PROMPTS[:3])
        sizes = []
        pipe.unet.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
        for guidance_scale in (0.0, 1.0, 1.5):
            spo_pipeline.predict(torch.randn(3, 4, 8, 8), 501, embeds, guidance_scale)
        assert sizes == [3, 3, 6]


class TestWrapPipeline:
    def test_accepts_what_it_says(self, pipe, tmp_path):
        cls = SPOStableDiffusionXLPipeline if hasattr(pipe, "tokenizer_2") else SPOStableDiffusionPipeline
        wrapped = wrap_pipeline(pipe)
        assert type(wrapped) is cls
        assert wrap_pipeline(wrapped) is wrapped
        assert isinstance(wrapped, DDPOStableDiffusionPipeline)

        class LikeDDPO:  # TRL's wrapper keeps the diffusers pipeline under this name
            sd_pipeline = pipe

        assert wrap_pipeline(LikeDDPO()).sd_pipeline is pipe
        pipe.save_pretrained(tmp_path / "saved")
        loaded = wrap_pipeline(str(tmp_path / "saved"))
        assert type(loaded) is cls
        assert not changed(state_of(pipe.unet), loaded.denoiser)

    def test_another_vae_and_dtypes_by_name(self, pipe, tmp_path):
        """SDXL in half precision needs another VAE; a YAML file can name dtypes only as text."""
        pipe.save_pretrained(tmp_path / "saved")
        other = tiny_sd_pipeline(tmp_path, seed=5).vae
        other.save_pretrained(tmp_path / "vae")
        wrapped = wrap_pipeline(str(tmp_path / "saved"), vae=str(tmp_path / "vae"), torch_dtype="bfloat16")
        assert wrapped.dtype == wrapped.vae.dtype == torch.bfloat16
        expected = {name: value.bfloat16() for name, value in state_of(other).items()}
        assert not changed(expected, wrapped.vae)
        with pytest.raises(ValueError, match="`torch_dtype` must name a dtype.*'half precision'"):
            wrap_pipeline(str(tmp_path / "saved"), torch_dtype="half precision")

    @pytest.mark.parametrize("given", [None, 3, UNet2DConditionModel, {"unet": None}])
    def test_says_what_it_accepts(self, given):
        with pytest.raises(TypeError, match="StableDiffusionPipeline.*path or Hub id.*got an object of type"):
            wrap_pipeline(given)

    def test_unknown_paths(self, tmp_path):
        with pytest.raises(ValueError, match="does not exist"):
            wrap_pipeline(str(tmp_path / "nowhere"))
        with pytest.raises(ValueError, match="model_index.json"):
            wrap_pipeline(tmp_path)

    def test_missing_component(self, tmp_path):
        pipe = tiny_sd_pipeline(tmp_path)
        pipe.vae = None
        with pytest.raises(ValueError, match="has no vae"):
            wrap_pipeline(pipe)

    def test_inpainting_unet(self, tmp_path):
        pipe = tiny_sd_pipeline(tmp_path)
        pipe.unet.register_to_config(in_channels=9)
        with pytest.raises(ValueError, match="9 input channels"):
            wrap_pipeline(pipe)

    def test_a_unet_that_is_told_the_guidance(self, tmp_path):
        """LCM's. Without the embedding it predicts something else, and nothing would say so."""
        pipe = tiny_sd_pipeline(tmp_path)
        pipe.unet.register_to_config(time_cond_proj_dim=32)
        with pytest.raises(ValueError, match="`time_cond_proj_dim=32`.*not on classes, images or guidance"):
            wrap_pipeline(pipe)


def test_options_out_of_range_or_without_meaning_are_refused(tmp_path):
    wrapped = wrap_pipeline(tiny_sd_pipeline(tmp_path))
    for options, message in (
        ({"guidance_rescale": 1.1}, "in .0, 1."),
        ({"clip_skip": -1}, "0 or more layers"),
        ({"clip_skip": 2}, "below 2, the layers"),
    ):
        with pytest.raises(ValueError, match=message):
            wrapped.configure(**options)
    assert (wrapped.guidance_rescale, wrapped.clip_skip) == (0.0, 0)
    for options in ({"guidance_rescale": 0.7}, {"clip_skip": 1}):
        with pytest.raises(ValueError, match=f"FluxPipeline` has no `{next(iter(options))}`"):
            wrap_pipeline(tiny_flux_pipeline(tmp_path)).configure(**options)
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline` has no `guidance_rescale`"):
        wrap_pipeline(tiny_sd3_pipeline(tmp_path)).configure(guidance_rescale=0.7)


def test_stable_diffusion_3_skips_layers_as_diffusers_does(tmp_path):
    pipe = tiny_sd3_pipeline(tmp_path)
    wrapped = wrap_pipeline(pipe)
    wrapped.configure(clip_skip=1)
    ours = wrapped.encode_prompt(PROMPTS[:2], "dog")
    expected, negative, pooled, negative_pooled = pipe.encode_prompt(
        PROMPTS[:2], None, None, negative_prompt=["dog"] * 2, clip_skip=1, max_sequence_length=256
    )
    torch.testing.assert_close(ours.prompt_embeds, expected)
    torch.testing.assert_close(ours.negative_prompt_embeds, negative)
    torch.testing.assert_close(ours.pooled_prompt_embeds, pooled)
    wrapped.configure(clip_skip=0)
    assert not torch.equal(wrapped.encode_prompt(PROMPTS[:2], "dog").prompt_embeds, ours.prompt_embeds)


def test_the_prompt_cache_tells_options_apart(tmp_path):
    wrapped, cache = wrap_pipeline(tiny_sd_pipeline(tmp_path)), EncodingCache()
    plain = cache.encode_prompts(wrapped, ["a cat"])
    wrapped.configure(clip_skip=1)
    assert not torch.equal(cache.encode_prompts(wrapped, ["a cat"]).prompt_embeds, plain.prompt_embeds)


class TestScheduler:
    def test_others_become_ddim_and_the_users_stays(self, tmp_path):
        config = dict(ddim_scheduler().config)
        for scheduler in (PNDMScheduler.from_config(config), EulerDiscreteScheduler.from_config(config)):
            pipe = tiny_sd_pipeline(tmp_path, scheduler=scheduler)
            wrapped = wrap_pipeline(pipe)
            assert pipe.scheduler is scheduler
            assert isinstance(wrapped.scheduler, DDIMScheduler)
            torch.testing.assert_close(wrapped.scheduler.alphas_cumprod, ddim_scheduler().alphas_cumprod)

    def test_latents_are_not_clipped_where_the_config_is_silent(self, tmp_path):
        """Regression: a DDIMScheduler built from a configuration without `clip_sample` clips."""
        scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        assert wrap_pipeline(tiny_sd_pipeline(tmp_path, scheduler=scheduler)).scheduler.config.clip_sample is False

    def test_flow_matching_is_refused(self, tmp_path):
        pipe = tiny_sd_pipeline(tmp_path, scheduler=FlowMatchEulerDiscreteScheduler())
        with pytest.raises(ValueError, match="stochastic.*FlowMatchEulerDiscreteScheduler"):
            wrap_pipeline(pipe)

    def test_stochastic_steps(self, tmp_path):
        wrapped = wrap_pipeline(tiny_sd_pipeline(tmp_path))
        assert wrapped.set_timesteps(5) == [801, 601, 401, 201, 1]
        assert [wrapped.step_is_stochastic(i, 1.0) for i in range(5)] == [True] * 5
        assert not wrapped.step_is_stochastic(0, 0.0)
        wrapped = wrap_pipeline(tiny_sd_pipeline(tmp_path, scheduler=ddim_scheduler(set_alpha_to_one=True)))
        wrapped.set_timesteps(5)
        assert [wrapped.step_is_stochastic(i, 1.0) for i in range(5)] == [True] * 4 + [False]


class TestPrecision:
    """What the denoiser takes is not always the dtype of its first parameter."""

    def test_stored_in_eight_bits_and_computed_in_sixteen(self, tmp_path):
        """`enable_layerwise_casting`, diffusers' way to save memory: latents in float8 would be refused by torch."""
        pipe = tiny_sd_pipeline(tmp_path).to(torch.bfloat16)
        wrapped = wrap_pipeline(pipe)
        assert wrapped.compute_dtype == torch.bfloat16
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        assert next(pipe.unet.parameters()).dtype == torch.float8_e4m3fn
        assert wrapped.compute_dtype == wrapped.latent_dtype == wrapped.dtype == torch.bfloat16
        images = wrapped.sample(wrapped.encode_prompt(PROMPTS[:1]), torch.Generator().manual_seed(0), 2)
        assert images.isfinite().all()

    def cast_pipeline(self, tmp_path, maker=tiny_sd_pipeline):
        pipe = maker(tmp_path).to(torch.bfloat16)
        casting = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.bfloat16}
        (pipe.unet if maker is tiny_sd_pipeline else pipe.transformer).enable_layerwise_casting(**casting)
        return pipe

    @pytest.mark.parametrize("maker", [tiny_sd_pipeline, tiny_flux_pipeline])
    def test_eight_bits_are_trained_with_estimates_and_compilation_left_out(self, tmp_path, maker, caplog):
        """
        Regression: an estimate of memory, which a GPU makes by default, left the weights broken, and compiled blocks met them in
        eight bits.
        """
        pipe = self.cast_pipeline(tmp_path, maker)
        config = tiny_spo_config(tmp_path, memory_budget=1.0, max_steps=1)
        with caplog.at_level("WARNING"):
            trainer = SPOTrainer(config, pipe, brightness_reward, train_dataset=PROMPTS)
            compile_blocks(
                trainer.pipeline.running_networks()[:1], backend="aot_eager"
            )  # as on CUDA, where it is the default
            trainer.train()
        assert "memory of the denoiser cannot be estimated" in caplog.text
        log = train_logs(trainer)[0]
        assert log["ratio/chosen"] == 1 and log["loss"] == pytest.approx(np.log(2), abs=1e-6)
        with pytest.raises(ValueError, match="`enable_layerwise_casting`.*Leave `compile_regions` at None"):
            compile_blocks([trainer.pipeline.denoiser], required=True)

    @pytest.mark.parametrize("on_onednn", [True, False], ids=["oneDNN", "native"])
    def test_gradients_under_layerwise_casting_are_those_of_the_stored_weights(self, tmp_path, on_onednn):
        """
        Regression: a convolution kept its parameter for the backward pass, which was stored in few bits again by then; PyTorch's
        own convolutions refuse that. Weights that have been through float16 are the same numbers in float32, so a network that
        holds them has the same gradients, to the bit.
        """

        def gradients(cast) -> list[torch.Tensor]:
            pipe = tiny_sd_pipeline(tmp_path)
            cast(pipe.unet)
            everywhere = LoraConfig(r=2, target_modules=["conv1", "conv2", "to_q"])
            model = wrap_pipeline(pipe).prepare_for_training(everywhere)
            trained = [p for p in model.parameters() if p.requires_grad]
            drawn = torch.Generator().manual_seed(1)
            for parameter in trained:  # not as the adapter draws them, which depends on the dtype of the layer
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=drawn)
            model(latents, 501, states).sample.square().sum().backward()
            return [p.grad for p in trained]

        def layerwise(unet):
            unet.enable_layerwise_casting(torch.float16, torch.float32, skip_modules_pattern=())

        def rounded(unet):
            unet.half().float()

        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(2, 4, 8, 8, generator=generator)
        states = torch.randn(2, 8, 16, generator=generator)
        with torch.backends.mkldnn.flags(enabled=on_onednn):
            ours, theirs = gradients(layerwise), gradients(rounded)
        assert len(ours) == len(theirs) > 4 and all(value.abs().max() > 0 for value in theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    def test_eight_bits_are_neither_trained_as_a_whole_nor_merged_into(self, tmp_path):
        pipe = self.cast_pipeline(tmp_path)
        with pytest.raises(ValueError, match="The unet stores weights in 8 bits or less"):
            SPOTrainer(tiny_spo_config(tmp_path, use_peft=False), pipe, brightness_reward, train_dataset=PROMPTS)
        wrapped = wrap_pipeline(tiny_sd_pipeline(tmp_path))
        wrapped.add_lora()
        wrapped.save_lora(tmp_path)
        with pytest.raises(ValueError, match="stores its weights in 8 bits"):
            merge_lora(pipe, tmp_path, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    def test_quantised_layers_and_adapters_do_not_count(self):
        network = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4)).half()
        network = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), network)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        network[0].base_layer.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
        assert compute_dtype_of(network) == torch.float16

    def test_a_cast_denoiser_has_another_dtype(self, tmp_path):
        wrapped = wrap_pipeline(tiny_sd_pipeline(tmp_path))
        assert wrapped.latent_dtype == torch.float32
        wrapped.denoiser.to(torch.bfloat16)
        assert wrapped.latent_dtype == torch.bfloat16
        wrapped.prepare_for_training(use_lora=False)
        assert wrapped.latent_dtype == torch.float32


def test_number_of_pixels(pipe):
    wrapped = wrap_pipeline(pipe)
    assert wrapped.num_pixels() == 16 * 16
    assert wrapped.num_pixels(24, 8) == 24 * 8


class TestAdapter:
    def test_reference_is_the_untouched_model(self, pipe):
        """With the adapter off, outputs have the bits of the model before the adapter came."""
        wrapped = wrap_pipeline(pipe)
        latents, embeds = torch.randn(2, 4, 8, 8), wrapped.encode_prompt(PROMPTS[:2])
        before = wrapped.predict(latents, 501, embeds, 3.0)
        wrapped.prepare_for_training()
        assert torch.equal(wrapped.predict(latents, 501, embeds, 3.0), before)  # B = 0: ratio exactly 1
        for parameter in wrapped.denoiser.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        assert not torch.equal(wrapped.predict(latents, 501, embeds, 3.0), before)
        with wrapped.reference():
            assert torch.equal(wrapped.predict(latents, 501, embeds, 3.0), before)
        assert any(p.requires_grad for p in wrapped.denoiser.parameters())

    @pytest.mark.parametrize("config", [{"r": 2, "lora_alpha": 8}, {"r": 4, "lora_alpha": 4, "use_dora": True}])
    def test_saved_lora_gives_the_same_images_in_plain_diffusers(self, pipe, config, tmp_path):
        """alpha != rank is lost by files that hold weights only: the configuration has to travel with them."""
        wrapped = wrap_pipeline(pipe)
        wrapped.prepare_for_training(LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"], **config))
        for parameter in wrapped.denoiser.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        wrapped.save_lora(tmp_path / "lora")
        settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
        trained = pipe(PROMPTS[:1], generator=torch.Generator().manual_seed(0), **settings).images
        fresh = MAKERS["sdxl" if hasattr(pipe, "tokenizer_2") else "sd"](tmp_path)
        base = fresh(PROMPTS[:1], generator=torch.Generator().manual_seed(0), **settings).images
        fresh.load_lora_weights(tmp_path / "lora")
        loaded = fresh(PROMPTS[:1], generator=torch.Generator().manual_seed(0), **settings).images
        assert np.abs(trained - base).max() > 1e-3
        np.testing.assert_allclose(loaded, trained, atol=1e-6)

    def test_load_restores_every_bit_and_refuses_another_adapter(self, pipe, tmp_path):
        wrapped = wrap_pipeline(pipe)
        wrapped.prepare_for_training()
        for parameter in wrapped.denoiser.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        wrapped.save_lora(tmp_path / "lora")
        saved = state_of(wrapped.denoiser)
        for parameter in wrapped.denoiser.parameters():
            if parameter.requires_grad:
                parameter.data.zero_()
        wrapped.load_lora(tmp_path / "lora")
        assert not changed(saved, wrapped.denoiser)
        other = wrap_pipeline(MAKERS["sdxl" if hasattr(pipe, "tokenizer_2") else "sd"](tmp_path))
        other.prepare_for_training(LoraConfig(r=2, target_modules=["to_q"]))
        with pytest.raises(ValueError, match="does not fit the adapter"):
            other.load_lora(tmp_path / "lora")

    def test_foreign_adapters_are_refused(self, pipe):
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
        with pytest.raises(ValueError, match="already has adapters \\(style\\).*fuse_lora"):
            wrap_pipeline(pipe).prepare_for_training()

    def test_adapter_that_matches_no_module(self, pipe):
        with pytest.raises(ValueError, match="`peft_config` does not fit the unet"):
            wrap_pipeline(pipe).prepare_for_training(LoraConfig(target_modules=["no_such_module"]))

    def test_trainable_parameters_are_float32_in_a_half_model(self, tmp_path):
        pipe = tiny_sd_pipeline(tmp_path)
        pipe.unet.to(torch.bfloat16)
        wrapped = wrap_pipeline(pipe)
        wrapped.prepare_for_training()
        dtypes = {p.requires_grad: p.dtype for p in wrapped.denoiser.parameters()}
        assert dtypes == {True: torch.float32, False: torch.bfloat16}
        assert wrapped.dtype == torch.bfloat16

    def test_the_switch_of_the_pipeline_counts_where_training_does_not_say(self, tmp_path):
        """Regression: `use_lora=False` of a pipeline was forgotten by `prepare_for_training`."""
        wrapped = SPOStableDiffusionPipeline(tiny_sd_pipeline(tmp_path), use_lora=False)
        wrapped.prepare_for_training()
        assert not hasattr(wrapped.denoiser, "peft_config") and not wrapped.use_lora
        wrapped = SPOStableDiffusionPipeline(tiny_sd_pipeline(tmp_path), use_lora=False)
        wrapped.prepare_for_training(use_lora=True)
        assert wrapped.denoiser.peft_config and wrapped.use_lora

    def test_full_fine_tuning_has_a_frozen_reference(self, tmp_path):
        wrapped = wrap_pipeline(tiny_sd_pipeline(tmp_path))
        wrapped.prepare_for_training(use_lora=False)
        with wrapped.reference() as reference:
            assert not any(p.requires_grad for p in reference.parameters())
            before = state_of(reference)
        wrapped.denoiser.conv_in.weight.data.add_(1)
        with wrapped.reference() as reference:
            assert not changed(before, reference)
        assert all(p.requires_grad for p in wrapped.denoiser.parameters())


class TestDDPOInterface:
    def test_call_returns_every_latent_and_log_prob(self, tmp_path):
        """The log-probabilities of a call are those of its own latents under `scheduler_step`."""
        wrapped = wrap_pipeline(tiny_sd_pipeline(tmp_path))
        embeds = wrapped.encode_prompt(PROMPTS[:2])
        output = wrapped(
            prompt_embeds=embeds.prompt_embeds,
            negative_prompt_embeds=embeds.negative_prompt_embeds,
            num_inference_steps=4,
            guidance_scale=3.0,
            output_type="pt",
        )
        assert output.images.shape == (2, 3, 16, 16)
        assert (len(output.latents), len(output.log_probs)) == (5, 4)
        for i, timestep in enumerate(wrapped.scheduler.timesteps):
            prediction = wrapped.predict(output.latents[i], timestep, embeds, 3.0)
            step = wrapped.scheduler_step(
                prediction, timestep.repeat(2), output.latents[i], 1.0, prev_sample=output.latents[i + 1]
            )
            torch.testing.assert_close(step.log_probs, output.log_probs[i])

    def test_call_with_text(self, tmp_path):
        wrapped = wrap_pipeline(tiny_sd_pipeline(tmp_path))
        images = wrapped("a red cat", num_inference_steps=2).images
        assert images[0].size == (16, 16)
        with pytest.raises(ValueError, match="prompt"):
            wrapped()
        with pytest.raises(ValueError, match="no density"):
            wrapped("a red cat", num_inference_steps=2, eta=0.0)

    def test_checkpoint_round_trip(self, tmp_path):
        wrapped = wrap_pipeline(tiny_sd_pipeline(tmp_path))
        unet = wrapped.get_trainable_layers()
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        saved = state_of(unet)
        wrapped.save_checkpoint([unet], [], tmp_path / "state")
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data.zero_()
        wrapped.load_checkpoint([unet], tmp_path / "state")
        assert not changed(saved, unet)

    def test_save_pretrained_loads_in_diffusers(self, pipe, tmp_path):
        """Regression: a UNet saved under its adapter has parameter names that no plain UNet knows."""
        cls = StableDiffusionXLPipeline if hasattr(pipe, "tokenizer_2") else StableDiffusionPipeline
        base = state_of(pipe.unet)
        wrapped = wrap_pipeline(pipe)
        unet = wrapped.get_trainable_layers()
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        wrapped.save_pretrained(tmp_path / "whole")
        assert wrapped.unet is unet
        loaded = cls.from_pretrained(tmp_path / "whole")
        assert not changed(base, loaded.unet)
        loaded.load_lora_weights(tmp_path / "whole")
        latents, embeds = torch.randn(1, 4, 8, 8), wrapped.encode_prompt(PROMPTS[:1])
        torch.testing.assert_close(
            wrap_pipeline(loaded).predict(latents, 1, embeds, 2.0), wrapped.predict(latents, 1, embeds, 2.0)
        )


def test_prompt_embeds_rows():
    embeds = PromptEmbeds(torch.arange(6.0).view(3, 1, 2), pooled_prompt_embeds=torch.arange(3.0)[:, None])
    assert embeds.repeat(2).pooled_prompt_embeds.flatten().tolist() == [0, 1, 2, 0, 1, 2]
    assert embeds.repeat_interleave(2).pooled_prompt_embeds.flatten().tolist() == [0, 0, 1, 1, 2, 2]
    assert embeds[torch.tensor([2, 0])].pooled_prompt_embeds.flatten().tolist() == [2, 0]
    joined = PromptEmbeds.cat([embeds[:1], embeds[1:]])
    assert torch.equal(joined.prompt_embeds, embeds.prompt_embeds)
    assert joined.negative_prompt_embeds is None
