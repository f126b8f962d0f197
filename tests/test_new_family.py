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
Necessity: the contract of a model family is a promise to people outside of the package. A family that the package does not
know, written here in one class, must train, save, load in plain diffusers and be evaluated, with a reward written here too.
"""

import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import UMT5Config, UMT5EncoderModel

from tests.testing_utils import PROMPTS, changed, device_settings, state_of, tiny_spo_config, tiny_tokenizer
from trl_spo import SPOTrainer, wrap_pipeline
from trl_spo.evaluation.evaluate import EvaluationProtocol, evaluate_pipeline
from trl_spo.pipelines import auto
from trl_spo.pipelines.base import SPOPipeline
from trl_spo.pipelines.conditioning import PromptEmbeds
from trl_spo.pipelines.ddpo import DDPOStableDiffusionPipeline
from trl_spo.rewards.base import Reward
from trl_spo.sampling import generate_images
from trl_spo.scheduling_flow import FlowStepRule


# --- the family, as docs/new_model_family.md shows it ----------------------------------------------------------------


class AuraFlowFamily(SPOPipeline):
    """AuraFlow (https://huggingface.co/fal/AuraFlow) as SPO trains it."""

    denoiser_name = "transformer"
    required_components = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    latent_dtype = torch.float32

    def __init__(self, pipeline, use_lora: bool = True):
        super().__init__(pipeline, use_lora)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
        self.step_rule = FlowStepRule(scheduler)

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str], negative_prompt: str = "", **size) -> PromptEmbeds:
        prompts = list(prompts)
        negative_prompts = [negative_prompt] * len(prompts)
        positive, _, negative, _ = self.sd_pipeline.encode_prompt(prompts, negative_prompts, device=self.device)
        return PromptEmbeds(positive, negative)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        self.check_size(height, width)
        config, factor = self.denoiser.config, self.spatial_factor
        height = height or config.sample_size * factor
        width = width or config.sample_size * factor
        return config.in_channels, height // factor, width // factor

    def predict(self, latents, timesteps, prompt_embeds, guidance_scale: float, denoiser=None) -> torch.Tensor:
        denoiser = self.denoiser if denoiser is None else denoiser
        latents = latents.to(self.compute_dtype)
        text = prompt_embeds.to(self.compute_dtype)
        sigma = self.step_rule.sigma(torch.as_tensor(timesteps, device=latents.device))
        sigma = sigma.to(latents.dtype).expand(len(latents))
        if guidance_scale <= 1:
            return denoiser(latents, text.prompt_embeds, sigma, return_dict=False)[0].float()
        both = torch.cat([text.negative_prompt_embeds, text.prompt_embeds])
        output = denoiser(latents.repeat(2, 1, 1, 1), both, sigma.repeat(2), return_dict=False)[0]
        uncond, cond = output.float().chunk(2)
        return uncond + guidance_scale * (cond - uncond)


# --- a reward, and a tiny model --------------------------------------------------------------------------------------


class FirstChannel(Reward):
    """A reward that is none of the package's kinds: it reads x_0 predictions as latents, and the length of the prompt."""

    sees = "latents"
    name = "first channel"

    def encode_prompts(self, prompts):
        return torch.tensor([len(prompt) for prompt in prompts])

    def score(self, samples, text, timesteps):
        assert len(samples) == len(text) == len(timesteps) and int(timesteps.max()) < 1000
        return samples[:, 0].float().mean(dim=(1, 2)) * 10 + text.to(samples.device) * 0.1


def tiny_pipeline(folder, seed: int = 0) -> AuraFlowPipeline:
    """A real `AuraFlowPipeline`: 4x8x8 latents, 16x16 images, random weights."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    text_config = UMT5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16,
        pos_embed_max_size=16,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.pos_embed.pos_embed, std=0.1)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, sample_size=16, scaling_factor=0.13,
    )  # fmt: skip
    pipeline = AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text_config).eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampled(pipeline: AuraFlowPipeline) -> np.ndarray:
    """What plain diffusers makes of a prompt."""
    generator = torch.Generator().manual_seed(3)
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "np"}
    return pipeline(PROMPTS[:1], generator=generator, **settings).images


# --- what must hold --------------------------------------------------------------------------------------------------


def test_without_noise_it_samples_what_diffusers_samples(tmp_path):
    pipe = tiny_pipeline(tmp_path)
    expected = sampled(pipe)
    family = AuraFlowFamily(pipe)
    images = family.sample(family.encode_prompt(PROMPTS[:1]), torch.Generator().manual_seed(3), 3, 3.0, eta=0.0)
    images = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(images, expected, atol=2e-5)


def test_it_trains_saves_and_loads_in_plain_diffusers(tmp_path):
    pipe = tiny_pipeline(tmp_path)
    scheduler, untrained = pipe.scheduler, sampled(pipe)
    frozen = {"vae": state_of(pipe.vae), "text_encoder": state_of(pipe.text_encoder)}
    config = tiny_spo_config(tmp_path / "run", max_steps=2, learning_rate=0.5, timestep_weighting="even")
    trainer = SPOTrainer(config, AuraFlowFamily(pipe), FirstChannel(), train_dataset=PROMPTS)
    trainer.train()

    # Before the first update the policy is the reference: the loss is ln 2, the ratios are 1, exactly.
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["ratio/chosen"] == first["ratio/rejected"] == 1.0
    # What belongs to the user is as it was.
    assert pipe.scheduler is scheduler
    assert not any(changed(state, getattr(pipe, name)) for name, state in frozen.items())

    trainer.save_model()
    trained = sampled(pipe.to("cpu"))
    plain = tiny_pipeline(tmp_path)
    np.testing.assert_array_equal(sampled(plain), untrained)
    plain.load_lora_weights(tmp_path / "run")
    np.testing.assert_allclose(sampled(plain), trained, atol=2e-6)
    assert np.abs(trained - untrained).max() > 1e-4
    card = (tmp_path / "run" / "README.md").read_text()
    assert "FlowMatchEuler sigmas with stochastic steps (ddim, eta 1), 5 steps" in card
    assert "DDIM" not in card and "Reward: `first channel`" in card


def test_it_is_found_by_path_and_evaluated(tmp_path, monkeypatch):
    """One line in the table, and every program takes the family."""
    tiny_pipeline(tmp_path).save_pretrained(tmp_path / "saved")
    monkeypatch.setitem(auto.FAMILIES, "AuraFlowPipeline", AuraFlowFamily)
    family = wrap_pipeline(str(tmp_path / "saved")).to(device_settings().get("device", "cpu"))
    assert type(family) is AuraFlowFamily
    protocol = EvaluationProtocol("mine", scheduler=family.step_rule.sampler_name, num_inference_steps=2)
    result = evaluate_pipeline(family, PROMPTS[:2], {"red": lambda images, _: images[:, 0].mean((1, 2))}, protocol)
    images = generate_images(family, PROMPTS[:2], num_inference_steps=2, eta=0.0)
    torch.testing.assert_close(result.scores["red"], images[:, 0].mean((1, 2)))
    assert result.scores["red"][0] != result.scores["red"][1]


def test_only_families_with_a_unet_are_ddpos(tmp_path):
    """TRL's `DDPOTrainer` would ask it for a UNet."""
    assert not isinstance(AuraFlowFamily(tiny_pipeline(tmp_path)), DDPOStableDiffusionPipeline)


def test_the_page_shows_this_family():
    page = Path(__file__).parents[1] / "docs" / "new_model_family.md"
    assert inspect.getsource(AuraFlowFamily) in page.read_text(encoding="utf-8")
