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
Tiny real pipelines of every flow-matching family, built from the classes of the published ones, without the Hub.
"""

from pathlib import Path

import tokenizers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.testing_utils import WORDS, tiny_tokenizer


TEXT_LENGTH = 12  # tokens of T5 and of Qwen in tests


def _t5_tokenizer() -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\u2581{word}", -1.0) for word in WORDS]
    pieces += [(character, -5.0) for character in "\u2581abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


def _t5(tokenizer, width: int) -> T5EncoderModel:
    config = T5Config(vocab_size=len(tokenizer) + 8, d_model=width, d_ff=2 * width, d_kv=8, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the three special tokens of the chat template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()) + special
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=1024,
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def _qwen3_config(tokenizer, num_layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )


def _clip(tokenizer, width: int, cls=CLIPTextModelWithProjection):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return cls(config).eval()


def _vae(**settings) -> AutoencoderKL:
    settings = {"shift_factor": 0.0609, "scaling_factor": 1.5035, **settings}
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **settings,
    ).eval()


def tiny_sd3_pipeline(folder: str | Path, seed: int = 0, with_t5: bool = True, **vae) -> StableDiffusion3Pipeline:
    torch.manual_seed(seed)
    tokenizer, t5_tokenizer = tiny_tokenizer(Path(folder) / "tokenizer", 77), _t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(**vae),
        text_encoder=_clip(tokenizer, 16),
        tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer, 16),
        tokenizer_2=tokenizer,
        text_encoder_3=_t5(t5_tokenizer, 32) if with_t5 else None,
        tokenizer_3=t5_tokenizer if with_t5 else None,
    )


def tiny_flux_pipeline(folder: str | Path, seed: int = 0, guidance: bool = True, **vae) -> FluxPipeline:
    torch.manual_seed(seed)
    tokenizer, t5_tokenizer = tiny_tokenizer(Path(folder) / "tokenizer", 77), _t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance,
    )
    shifts = {"shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
    return FluxPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **shifts),
        vae=_vae(**vae),
        text_encoder=_clip(tokenizer, 32, CLIPTextModel),
        tokenizer=tokenizer,
        text_encoder_2=_t5(t5_tokenizer, 32),
        tokenizer_2=t5_tokenizer,
    )


def tiny_flux2_klein_pipeline(folder: str | Path, seed: int = 0, is_distilled: bool = False) -> Flux2KleinPipeline:
    torch.manual_seed(seed)
    tokenizer = _qwen_tokenizer()
    text = _qwen3_config(tokenizer, num_layers=3)
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,  # three stacked layers of the text encoder
        timestep_guidance_channels=256,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    with torch.no_grad():  # as training leaves them: not 0 and 1
        vae.bn.running_mean.normal_(std=0.1)
        vae.bn.running_var.uniform_(0.5, 1.5)
    return Flux2KleinPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(text).eval(),
        tokenizer=tokenizer,
        is_distilled=is_distilled,
    )


def tiny_z_image_pipeline(folder: str | Path, seed: int = 0) -> ZImagePipeline:
    torch.manual_seed(seed)
    tokenizer = _qwen_tokenizer()
    text = _qwen3_config(tokenizer, num_layers=2)
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():  # made empty by diffusers, to be loaded
        transformer.x_pad_token.normal_(std=0.02)
        transformer.cap_pad_token.normal_(std=0.02)
    return ZImagePipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=_vae(),
        text_encoder=Qwen3Model(text).eval(),
        tokenizer=tokenizer,
    )


def tiny_qwen_image_pipeline(folder: str | Path, seed: int = 0) -> QwenImagePipeline:
    torch.manual_seed(seed)
    tokenizer = _qwen_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6}
    text = {"num_hidden_layers": 2, "num_key_value_heads": 2, "rope_parameters": rope, "vocab_size": len(tokenizer)}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    tokens = {"vision_start_token_id": 1, "vision_end_token_id": 2, "vision_token_id": 3, "image_token_id": 4}
    config = Qwen2_5_VLConfig(text_config={**sizes, **text}, vision_config=vision, **tokens)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.0, 1.5, 0.5, 2.0],
    ).eval()
    shifts = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    return QwenImagePipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **shifts),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=tokenizer,
    )
