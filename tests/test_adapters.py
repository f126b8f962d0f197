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
Necessity: adapters and the VAE are shared by all families, and diffusers' readers and writers differ from family to
family. What is saved must load in plain diffusers, and what comes out of a VAE must be what its own pipeline makes of it.
"""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig
from peft.utils import get_peft_model_state_dict

from trl_spo import SPOTrainer, wrap_pipeline
from trl_spo.pipelines.adapters import adapter_parameters, add_lora, load_lora, save_lora
from trl_spo.pipelines.autoencoder import decode, encode, scale_and_shift
from trl_spo.sampling import generate_images
from trl_spo.scripts.arguments import SamplerArguments

from .flow_testing import (
    tiny_flux2_klein_pipeline,
    tiny_flux_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_z_image_pipeline,
)
from .testing_utils import (
    PROMPTS,
    brightness_reward,
    changed,
    state_of,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
    tiny_spo_config,
)


FAMILIES = {
    "sd3": tiny_sd3_pipeline,
    "flux": tiny_flux_pipeline,
    "flux2": tiny_flux2_klein_pipeline,
    "z_image": tiny_z_image_pipeline,
    "qwen_image": tiny_qwen_image_pipeline,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_any_family_loads_in_plain_diffusers_and_in_training(family, tmp_path):
    """alpha != rank is lost by files that hold weights only: the configuration has to travel with them."""
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_k"])
    pipeline = FAMILIES[family](tmp_path)
    add_lora(pipeline.transformer.bfloat16(), config)
    for parameter in pipeline.transformer.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            parameter.data.normal_()
    trained = get_peft_model_state_dict(pipeline.transformer)
    assert trained
    save_lora(pipeline, "transformer", tmp_path)

    plain = FAMILIES[family](tmp_path)
    plain.load_lora_weights(tmp_path)
    loaded = get_peft_model_state_dict(plain.transformer, adapter_name="default_0")
    assert {name: value.tolist() for name, value in loaded.items()} == {k: v.tolist() for k, v in trained.items()}
    found = plain.transformer.peft_config["default_0"]
    assert (found.r, found.lora_alpha) == (2, 6)

    resumed = FAMILIES[family](tmp_path)
    add_lora(resumed.transformer, config)
    load_lora(resumed, "transformer", tmp_path)
    for name, value in get_peft_model_state_dict(resumed.transformer).items():
        assert torch.equal(value, trained[name]), name
    other = FAMILIES[family](tmp_path)
    add_lora(other.transformer, LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="does not fit the adapter being trained"):
        load_lora(other, "transformer", tmp_path)


TARGETS = ["to_q", "to_k", "to_v"]


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, alpha=2, target_modules=TARGETS),
        LoKrConfig(r=2, alpha=2, target_modules=TARGETS),
        OFTConfig(oft_block_size=2, r=0, target_modules=TARGETS),
        IA3Config(target_modules=TARGETS, feedforward_modules=[]),
        AdaLoraConfig(init_r=2, target_r=1, total_step=4, target_modules=TARGETS),
    ],
    ids=lambda config: type(config).__name__,
)
@pytest.mark.parametrize("maker", [tiny_sd_pipeline, tiny_flux_pipeline])
def test_methods_whose_file_nobody_reads_are_not_trained(maker, config, tmp_path):
    """Regression: they were trained and saved, and `load_lora_weights` refused the result."""
    pipeline = maker(tmp_path)
    denoiser = wrap_pipeline(pipeline).denoiser
    before = state_of(denoiser)
    with pytest.raises(ValueError, match=f"must be a `peft.LoraConfig`, got `{type(config).__name__}`"):
        SPOTrainer(tiny_spo_config(tmp_path), pipeline, brightness_reward, train_dataset=PROMPTS, peft_config=config)
    assert before.keys() == denoiser.state_dict().keys() and not changed(before, denoiser)


@pytest.mark.parametrize("family", [*FAMILIES, "sd", "sdxl"])
def test_an_adapter_on_every_layer_can_be_delivered(family, tmp_path):
    """Whatever layer a user names, diffusers reads it back under its name in every family."""
    make = {**FAMILIES, "sd": tiny_sd_pipeline, "sdxl": tiny_sdxl_pipeline}[family]
    wrapped, plain = wrap_pipeline(make(tmp_path)), make(tmp_path)
    layers = [n for n, m in wrapped.denoiser.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    wrapped.add_lora(LoraConfig(r=2, lora_alpha=4, target_modules=layers, init_lora_weights=False))
    wrapped.save_lora(tmp_path)
    plain.load_lora_weights(tmp_path)
    trained = get_peft_model_state_dict(wrapped.denoiser)
    read = get_peft_model_state_dict(getattr(plain, wrapped.denoiser_name), adapter_name="default_0")
    assert len(trained) == 2 * len(layers) and trained.keys() == read.keys()
    assert all(torch.equal(trained[name], read[name]) for name in trained)


@torch.no_grad()
def answer_of(pipeline) -> torch.Tensor:
    """What the denoiser of an SPO pipeline predicts for fixed inputs."""
    latents = torch.randn(2, *pipeline.latent_shape(), generator=torch.Generator().manual_seed(1))
    return pipeline.predict(latents, 501, pipeline.encode_prompt(PROMPTS[:2]), 3.0)


@pytest.mark.parametrize("family", ["sd", "flux", "sd3"])
def test_a_file_says_nothing_that_was_true_only_while_training(family, tmp_path):
    """Regression: diffusers switches the dropout of the header on, and one seed gave two images."""
    make = {**FAMILIES, "sd": tiny_sd_pipeline}[family]
    wrapped, plain = wrap_pipeline(make(tmp_path)), make(tmp_path)
    wrapped.add_lora(
        LoraConfig(r=2, lora_alpha=6, lora_dropout=0.5, target_modules=["to_q"], init_lora_weights="gaussian")
    )
    for parameter in adapter_parameters(wrapped.denoiser):
        parameter.data.normal_()
    wrapped.save_lora(tmp_path)
    plain.load_lora_weights(tmp_path)
    denoiser = getattr(plain, wrapped.denoiser_name).train()
    assert not [m for m in denoiser.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    assert not any(p.requires_grad for p in adapter_parameters(denoiser))
    torch.testing.assert_close(answer_of(wrap_pipeline(plain)), answer_of(with_eval(wrapped)))


def with_eval(pipeline):
    pipeline.denoiser.eval()
    return pipeline


def test_dropout_in_a_file_of_another_program_does_not_reach_images(tmp_path):
    unet = tiny_sd_pipeline(tmp_path).unet
    unet.add_adapter(LoraConfig(r=2, lora_dropout=0.5, target_modules=["to_q"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    pipeline = SamplerArguments(lora=str(tmp_path), device="cpu").place(wrap_pipeline(tiny_sd_pipeline(tmp_path)))
    first, second = (generate_images(pipeline, PROMPTS[:1], num_inference_steps=2) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bias": "lora_only"}, "also trains weights of the unet itself, such as '.*bias'"),
        ({"bias": "all"}, "also trains weights of the unet itself, such as '.*bias'"),
        ({"modules_to_save": ["conv_out"]}, "also trains weights of the unet itself, such as 'conv_out"),
        ({"alora_invocation_tokens": [1]}, "would learn nothing: `alora_invocation_tokens` switches it on"),
        ({"lora_alpha": 0}, "would learn nothing: its strength is 0 on '.*attn1.to_q'"),
        ({"alpha_pattern": {"attn2.to_q": 0}}, "would learn nothing: its strength is 0 on '.*attn2.to_q'"),
        ({"target_modules": None, "target_parameters": ["to_q.weight"]}, "`target_parameters` adapts single weights"),
        ({"init_lora_weights": "pissa"}, "changes weights of the unet, such as '.*to_q.weight'"),
        ({"init_lora_weights": "olora"}, "changes weights of the unet, such as '.*to_q.weight'"),
    ],
    ids=["bias-lora", "bias-all", "modules_to_save", "alora", "alpha-0", "alpha-pattern-0", "parameters", "pissa", "olora"],
)  # fmt: skip
def test_an_adapter_that_is_more_than_an_adapter_is_refused(settings, message, tmp_path):
    """Regression: the reference moved with the policy, and diffusers could not read the file."""
    pipeline = tiny_sd_pipeline(tmp_path)
    before = state_of(pipeline.unet)
    config = LoraConfig(**{"r": 2, "target_modules": ["to_q", "to_out.0"], **settings})
    with pytest.raises(ValueError, match=message):
        SPOTrainer(tiny_spo_config(tmp_path), pipeline, brightness_reward, train_dataset=PROMPTS, peft_config=config)
    assert before.keys() == pipeline.unet.state_dict().keys()
    if "init_lora_weights" not in settings:
        assert not changed(before, pipeline.unet)
        SPOTrainer(tiny_spo_config(tmp_path), pipeline, brightness_reward, train_dataset=PROMPTS)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": False},
     {"rank_pattern": {"attn2.to_q": 3}, "alpha_pattern": {"attn2.to_q": 9}}],
    ids=lambda settings: "-".join(settings) or "plain",
)  # fmt: skip
@pytest.mark.parametrize("make", [tiny_sd_pipeline, tiny_sd3_pipeline])
def test_off_it_is_the_base_and_the_file_rebuilds_it(make, settings, tmp_path):
    wrapped, plain = wrap_pipeline(make(tmp_path)), make(tmp_path)
    base = answer_of(wrapped)
    wrapped.add_lora(LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["to_q", "to_out.0"], **settings}))
    for parameter in wrapped.denoiser.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape), alpha=0.3)
    with wrapped.reference() as reference:
        assert reference is wrapped.denoiser
        assert torch.equal(answer_of(wrapped), base)
    trained = answer_of(wrapped)
    assert not torch.allclose(trained, base, atol=1e-3)
    wrapped.save_lora(tmp_path)
    plain.load_lora_weights(tmp_path)
    torch.testing.assert_close(answer_of(wrap_pipeline(plain)), trained)


@pytest.mark.parametrize("settings", [{"lora_alpha": 8}, {"use_rslora": True}, {"alpha_pattern": {"to_q": 1}}])
def test_equal_weights_of_another_strength_are_not_read(settings, tmp_path):
    """Regression: a run that resumed with another `lora_alpha` went on from another model, and said nothing."""
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["to_q"]}
    written, read = (wrap_pipeline(tiny_sd_pipeline(tmp_path)) for _ in range(2))
    written.add_lora(LoraConfig(**config))
    written.save_lora(tmp_path)
    read.add_lora(LoraConfig(**{**config, **settings}))
    with pytest.raises(
        ValueError, match=f"was trained with `{next(iter(settings))}=.* the same weights would be another model"
    ):
        read.load_lora(tmp_path)


def test_training_continues_from_a_published_adapter(tmp_path):
    """Only the adapter moves, which diffusers loads frozen, beside a base that it loads trainable."""
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], init_lora_weights="gaussian")
    first = wrap_pipeline(tiny_sd_pipeline(tmp_path))
    first.add_lora(config)
    first.save_lora(tmp_path / "first")
    pipe = tiny_sd_pipeline(tmp_path)
    pipe.load_lora_weights(tmp_path / "first", adapter_name="default")
    settings = tiny_spo_config(tmp_path, max_steps=1)
    trainer = SPOTrainer(settings, pipe, brightness_reward, train_dataset=PROMPTS, peft_config=config)
    before = state_of(pipe.unet)
    trainer.train()
    moved = changed(before, pipe.unet)
    assert moved and all("lora_" in name for name in moved)


@pytest.mark.parametrize("make", [tiny_sd_pipeline, tiny_flux_pipeline])
def test_a_whole_denoiser_is_not_trained_with_adapters_in_it(make, tmp_path):
    """Regression: base and adapter were trained together, and saved under names that nobody reads."""
    wrapped = wrap_pipeline(make(tmp_path))
    wrapped.add_lora(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"already has adapters \(default\)"):
        wrapped.prepare_for_training(use_lora=False)
    if hasattr(wrapped, "get_trainable_layers"):  # TRL's DDPO
        wrapped.use_lora = False
        with pytest.raises(ValueError, match=r"already has adapters \(default\)"):
            wrapped.get_trainable_layers()


def shifted_vae(**config) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=8, **config,
    ).eval()  # fmt: skip


MEAN, STD = [0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    "config, scale, shift",
    [
        ({"scaling_factor": 0.5}, [0.5] * 4, [0.0] * 4),
        ({"scaling_factor": 1.5, "shift_factor": 0.06}, [1.5] * 4, [0.06] * 4),
        ({"scaling_factor": 2.0, "latents_mean": MEAN, "latents_std": STD}, [4.0, 2.0, 1.0, 0.5], MEAN),
    ],
    ids=["scale", "scale-and-shift", "per-channel"],
)
@torch.no_grad()
def test_latents_of_a_vae_have_its_scale_and_its_shift(config, scale, shift):
    """Regression: only `scaling_factor` was known, so latents of SD3, FLUX and some SDXL models would have been off."""
    vae = shifted_vae(**config)
    scale, shift = torch.tensor(scale).view(4, 1, 1), torch.tensor(shift).view(4, 1, 1)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    posterior = vae.encode(images).latent_dist
    mean, std = encode(vae, images)
    torch.testing.assert_close(mean, (posterior.mean - shift) * scale)
    torch.testing.assert_close(std, posterior.std * scale)
    torch.testing.assert_close(decode(vae, mean), vae.decode(posterior.mean).sample, atol=1e-5, rtol=1e-5)
    found = scale_and_shift(vae)
    torch.testing.assert_close(torch.as_tensor(found[0]).expand(4, 1, 1), scale)


def test_another_vae_is_of_the_class_of_the_pipelines_own(tmp_path):
    """Regression: whatever replaced a pipeline's VAE was loaded as an `AutoencoderKL`."""
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip
    pipe = tiny_sd_pipeline(tmp_path)
    pipe.register_modules(vae=tiny)
    pipe.save_pretrained(tmp_path / "pipe")
    for parameter in tiny.parameters():
        parameter.data.add_(1)
    tiny.save_pretrained(tmp_path / "other")
    wrapped = wrap_pipeline(str(tmp_path / "pipe"), vae=str(tmp_path / "other"))
    assert isinstance(wrapped.vae, AutoencoderTiny)
    assert not changed(state_of(tiny), wrapped.vae)
