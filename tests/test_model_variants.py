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
Necessity: one diffusers class holds many models: some take an image, a guidance scale or a further time beside latents and
text, and some VAEs scale their latents in other ways. What diffusers' own pipeline would give them and SPO would not is refused
when the pipeline is wrapped, in one sentence; otherwise the model runs on inputs it was not made for, and nobody says so.
"""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from trl_spo import wrap_pipeline
from trl_spo.pipelines.auto import FAMILIES

from .flow_testing import (
    tiny_flux2_klein_pipeline,
    tiny_flux_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_z_image_pipeline,
)
from .testing_utils import _unet, tiny_sd_pipeline, tiny_sdxl_pipeline


MAKERS = {
    "StableDiffusionPipeline": tiny_sd_pipeline,
    "StableDiffusionXLPipeline": tiny_sdxl_pipeline,
    "StableDiffusion3Pipeline": tiny_sd3_pipeline,
    "FluxPipeline": tiny_flux_pipeline,
    "Flux2KleinPipeline": tiny_flux2_klein_pipeline,
    "ZImagePipeline": tiny_z_image_pipeline,
    "QwenImagePipeline": tiny_qwen_image_pipeline,
}
READ = {  # statistics that the family's diffusers pipeline reads beside `scaling_factor`
    "StableDiffusionXLPipeline": {"latents_mean", "latents_std"},
    "StableDiffusion3Pipeline": {"shift_factor"},
    "FluxPipeline": {"shift_factor"},
    "ZImagePipeline": {"shift_factor"},
    "QwenImagePipeline": {"latents_mean", "latents_std"},
    "Flux2KleinPipeline": {"shift_factor"},  # its own are those of a batch norm; an `AutoencoderKL`'s is not looked at
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "name, value", [("shift_factor", 0.1), ("latents_mean", [0.1] * 4), ("latents_std", [2.0] * 4)]
)
def test_statistics_of_another_family_are_refused(family, name, value, tmp_path):
    """diffusers would sample without them, and SPO trained with them."""
    pipe = MAKERS[family](tmp_path)
    pipe.vae.register_to_config(**{name: value})
    if name in READ.get(family, ()):
        wrap_pipeline(pipe)
        return
    with pytest.raises(ValueError, match=f"The VAE has `{name}=.* diffusers' pipeline of this family does not read"):
        wrap_pipeline(pipe)


def test_a_unet_that_is_told_the_guidance(tmp_path):
    """LCM's. Regression: the embedding was left out, and classifier-free guidance used instead."""
    pipe = tiny_sd_pipeline(tmp_path)
    pipe.register_modules(unet=_unet(cross_attention_dim=16, time_cond_proj_dim=32))
    with pytest.raises(ValueError, match="The UNet has `time_cond_proj_dim=32`"):
        wrap_pipeline(pipe)


def test_a_transformer_that_takes_an_image(tmp_path):
    """FLUX.1 Fill, Depth and Canny have the pipeline's components and wider inputs."""
    pipe = tiny_flux_pipeline(tmp_path)
    config = {**pipe.transformer.config, "in_channels": 32, "out_channels": 16}
    pipe.register_modules(transformer=FluxTransformer2DModel.from_config(config))
    with pytest.raises(ValueError, match="takes latents with 8 channels and the VAE makes 4.*Fill, Depth, Canny"):
        wrap_pipeline(pipe)


@pytest.mark.parametrize("make", [tiny_qwen_image_pipeline, tiny_flux2_klein_pipeline])
def test_a_transformer_that_is_told_the_guidance(make, tmp_path):
    pipe = make(tmp_path)
    pipe.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(ValueError, match=r"is told the guidance \(`guidance_embeds=True`\)"):
        wrap_pipeline(pipe)
    assert wrap_pipeline(tiny_flux_pipeline(tmp_path)).takes_guidance


@pytest.mark.parametrize("name", ["zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"])
def test_a_transformer_with_a_further_input(name, tmp_path):
    pipe = tiny_qwen_image_pipeline(tmp_path)
    pipe.transformer.register_to_config(**{name: True})
    with pytest.raises(ValueError, match=f"The transformer has `{name}=True`: it takes an input"):
        wrap_pipeline(pipe)


@pytest.mark.parametrize("make, name", [(tiny_flux_pipeline, "encoder_hid_proj"), (tiny_sd3_pipeline, "image_proj")])
def test_an_ip_adapter(make, name, tmp_path):
    pipe = make(tmp_path)
    setattr(pipe.transformer, name, torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="carries an IP-Adapter.* `pipe.unload_ip_adapter"):
        wrap_pipeline(pipe)


def test_fused_attention_has_no_place_for_an_adapter(tmp_path):
    """Regression: `to_q` is there and takes no part, so its LoRA had no gradient and the run learnt nothing."""
    pipe = tiny_sd_pipeline(tmp_path)
    pipe.fuse_qkv_projections()
    with pytest.raises(ValueError, match="The attention of the unet is fused"):
        wrap_pipeline(pipe).prepare_for_training()
    pipe.unfuse_qkv_projections()
    wrap_pipeline(pipe).prepare_for_training()
