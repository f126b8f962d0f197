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
Shapes of published models, for predictions where their configurations cannot be had: the classes and settings that the
`config.json` files of the repositories name. Numbers of weights that follow from them are those of the model cards.
"""

from dataclasses import dataclass
from typing import Any


Component = tuple[str, dict[str, Any]]  # name of the class in diffusers or transformers, and its settings


@dataclass(frozen=True)
class PublishedModel:
    """
    A published diffusers pipeline.

    Attributes:
        pipeline (`str`): class of the pipeline.
        components (`dict[str, Component]`): its networks, by name.
        settings (`dict`): further arguments of the class.
    """

    pipeline: str
    components: dict[str, Component]
    settings: dict[str, Any]


def _clip_text(width: int, layers: int, heads: int, **settings) -> dict:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "vocab_size": 49408, "max_position_embeddings": 77, **settings}


_CLIP_L = _clip_text(768, 12, 12, projection_dim=768)
_CLIP_BIG_G = _clip_text(1280, 32, 20, projection_dim=1280, hidden_act="gelu")
_T5_XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_QWEN3_4B = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
_QWEN25_VL_7B = {
    "text_config": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    },
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
    },
    "tie_word_embeddings": False,
}  # fmt: skip
_SAFETY_CHECKER = {
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14,
    },
    "projection_dim": 768,
}  # fmt: skip

_KL = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_KL_16 = {**_KL, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_DDIM: Component = (
    "DDIMScheduler",
    {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "set_alpha_to_one": False, "steps_offset": 1,
    },
)  # fmt: skip
_FLOW: Component = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
_DYNAMIC_FLOW: Component = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True})

STABLE_DIFFUSION_1 = PublishedModel(
    "StableDiffusionPipeline",
    {
        "unet": (
            "UNet2DConditionModel",
            {
                "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
                "attention_head_dim": 8, "cross_attention_dim": 768,
                "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
                "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            },
        ),
        "vae": ("AutoencoderKL", {**_KL, "latent_channels": 4, "sample_size": 512}),
        "text_encoder": ("CLIPTextModel", _CLIP_L),
        "safety_checker": ("StableDiffusionSafetyChecker", _SAFETY_CHECKER),
        "scheduler": _DDIM,
    },
    {"feature_extractor": None, "requires_safety_checker": False},
)  # fmt: skip

STABLE_DIFFUSION_XL = PublishedModel(
    "StableDiffusionXLPipeline",
    {
        "unet": (
            "UNet2DConditionModel",
            {
                "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
                "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10),
                "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            },
        ),
        "vae": ("AutoencoderKL", {**_KL, "latent_channels": 4, "sample_size": 1024, "scaling_factor": 0.13025}),
        "text_encoder": ("CLIPTextModel", _CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_BIG_G),
        "scheduler": _DDIM,
    },
    {},
)  # fmt: skip

STABLE_DIFFUSION_35_MEDIUM = PublishedModel(
    "StableDiffusion3Pipeline",
    {
        "transformer": (
            "SD3Transformer2DModel",
            {
                "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
                "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
                "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
                "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
            },
        ),
        "vae": ("AutoencoderKL", {**_KL_16, "scaling_factor": 1.5305, "shift_factor": 0.0609}),
        "text_encoder": ("CLIPTextModelWithProjection", _CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_BIG_G),
        "text_encoder_3": ("T5EncoderModel", _T5_XXL),
        "scheduler": _FLOW,
    },
    {},
)  # fmt: skip

FLUX_1_DEV = PublishedModel(
    "FluxPipeline",
    {
        "transformer": (
            "FluxTransformer2DModel",
            {
                "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
                "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
                "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
            },
        ),
        "vae": ("AutoencoderKL", {**_KL_16, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
        "text_encoder": ("CLIPTextModel", _CLIP_L),
        "text_encoder_2": ("T5EncoderModel", _T5_XXL),
        "scheduler": _DYNAMIC_FLOW,
    },
    {},
)  # fmt: skip

FLUX_2_KLEIN_4B = PublishedModel(
    "Flux2KleinPipeline",
    {
        "transformer": (
            "Flux2Transformer2DModel",
            {
                "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128,
                "num_attention_heads": 24, "joint_attention_dim": 7680, "axes_dims_rope": (32, 32, 32, 32),
                "guidance_embeds": False,
            },
        ),
        "vae": (
            "AutoencoderKLFlux2",
            {**_KL, "latent_channels": 32, "use_quant_conv": False, "use_post_quant_conv": False},
        ),
        "text_encoder": ("Qwen3ForCausalLM", _QWEN3_4B),
        "scheduler": _DYNAMIC_FLOW,
    },
    {"is_distilled": False},
)  # fmt: skip

Z_IMAGE = PublishedModel(
    "ZImagePipeline",
    {
        "transformer": (
            "ZImageTransformer2DModel",
            {
                "in_channels": 16, "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30,
                "n_kv_heads": 30, "cap_feat_dim": 2560,
            },
        ),
        "vae": ("AutoencoderKL", {**_KL_16, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
        "text_encoder": ("Qwen3ForCausalLM", _QWEN3_4B),
        "scheduler": _FLOW,
    },
    {},
)  # fmt: skip

QWEN_IMAGE = PublishedModel(
    "QwenImagePipeline",
    {
        "transformer": (
            "QwenImageTransformer2DModel",
            {
                "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
                "num_attention_heads": 24, "joint_attention_dim": 3584,
            },
        ),
        "vae": ("AutoencoderKLQwenImage", {"base_dim": 96, "z_dim": 16}),
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration", _QWEN25_VL_7B),
        "scheduler": _DYNAMIC_FLOW,
    },
    {},
)  # fmt: skip

PUBLISHED = {  # Hub id, in small letters -> what is there
    "stable-diffusion-v1-5/stable-diffusion-v1-5": STABLE_DIFFUSION_1,
    "runwayml/stable-diffusion-v1-5": STABLE_DIFFUSION_1,
    "compvis/stable-diffusion-v1-4": STABLE_DIFFUSION_1,
    "stabilityai/stable-diffusion-xl-base-1.0": STABLE_DIFFUSION_XL,
    "stabilityai/stable-diffusion-3.5-medium": STABLE_DIFFUSION_35_MEDIUM,
    "black-forest-labs/flux.1-dev": FLUX_1_DEV,
    "black-forest-labs/flux.2-klein-base-4b": FLUX_2_KLEIN_4B,
    "tongyi-mai/z-image": Z_IMAGE,
    "qwen/qwen-image": QWEN_IMAGE,
}

_SDXL_VAE = STABLE_DIFFUSION_XL.components["vae"][1]
PUBLISHED_VAES: dict[str, Component] = {
    "madebyollin/sdxl-vae-fp16-fix": ("AutoencoderKL", {**_SDXL_VAE, "force_upcast": False}),
}

# CLIP ViT-H/14, which PickScore and the released step-aware reward models are.
CLIP_VIT_H = {
    "text_config": {**_clip_text(1024, 24, 16, hidden_act="gelu"), "projection_dim": 1024},
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14, "hidden_act": "gelu", "projection_dim": 1024,
    },
    "projection_dim": 1024,
}  # fmt: skip
PUBLISHED_CLIPS = {
    "yuvalkirstain/pickscore_v1": CLIP_VIT_H,
    "laion/clip-vit-h-14-laion2b-s32b-b79k": CLIP_VIT_H,
}
