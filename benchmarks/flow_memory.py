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
Memory of an SPO run on the published flow-matching models, predicted without a GPU and without their weights.

```
python benchmarks/flow_memory.py
python benchmarks/flow_memory.py --models sd3.5-medium --height 1024 --width 1024 --pairs 1
```

Transformers and autoencoders are built from the published shapes on fake tensors, as `benchmarks/memory.py` does; text
encoders count by their parameters. Phases never overlap: with `offload_text_encoders` the encoders are on the device while
they encode, and only then. "nf4" stores the transformer's linear layers in 4 bits and one float32 number per 64 of them
(bitsandbytes without double quantisation).
"""

import argparse
import contextlib
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.memory import normalisation_as_on_cuda
from tests import flow_testing
from trl_spo import wrap_pipeline
from trl_spo.pipelines.conditioning import PromptEmbeds
from trl_spo.training.memory import GIB, module_bytes, peak_activation_bytes


BILLION = 10**9
NF4_BYTES = 0.5 + 4 / 64  # per weight
REWARD_BYTES = 2 * 986_109_441  # PickScore, a CLIP ViT-H/14, in bfloat16

_KL = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "use_quant_conv": False,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_post_quant_conv": False,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A published model: its classes and shapes, and what its text encoders weigh."""

    make: object  # a tiny pipeline of the family, whose networks are replaced
    transformer_class: type
    transformer: dict
    vae_class: type
    vae: dict
    text_parameters: float  # of all text encoders
    text_tokens: int
    text_width: int
    pooled_width: int | None
    rank: int
    guidance_scale: float


MODELS = {
    "sd3.5-medium": Model(
        flow_testing.tiny_sd3_pipeline,
        SD3Transformer2DModel,
        {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
            "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
        },
        AutoencoderKL,
        {**_KL, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        text_parameters=4.76 * BILLION + 0.124 * BILLION + 0.695 * BILLION,  # T5-XXL's encoder, CLIP L and bigG
        text_tokens=77 + 256, text_width=4096, pooled_width=2048, rank=32, guidance_scale=4.5,
    ),
    "flux2-klein-4b": Model(
        flow_testing.tiny_flux2_klein_pipeline,
        Flux2Transformer2DModel,
        {
            "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 7680, "axes_dims_rope": (32, 32, 32, 32),
            "guidance_embeds": False,
        },
        AutoencoderKLFlux2,
        {**_KL, "latent_channels": 32},
        text_parameters=4.02 * BILLION,  # Qwen3-4B
        text_tokens=512, text_width=7680, pooled_width=None, rank=32, guidance_scale=4.0,
    ),
    "flux.1-dev": Model(
        flow_testing.tiny_flux_pipeline,
        FluxTransformer2DModel,
        {
            "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
            "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
        },
        AutoencoderKL,
        {**_KL, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        text_parameters=4.76 * BILLION + 0.123 * BILLION,
        text_tokens=512, text_width=4096, pooled_width=768, rank=64, guidance_scale=3.5,
    ),
    "z-image": Model(
        flow_testing.tiny_z_image_pipeline,
        ZImageTransformer2DModel,
        {
            "in_channels": 16, "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30,
            "cap_feat_dim": 2560,
        },
        AutoencoderKL,
        {**_KL, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        text_parameters=4.02 * BILLION,  # Qwen3-4B
        text_tokens=512, text_width=2560, pooled_width=None, rank=32, guidance_scale=5.0,
    ),
    "qwen-image": Model(
        flow_testing.tiny_qwen_image_pipeline,
        QwenImageTransformer2DModel,
        {
            "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24,
            "joint_attention_dim": 3584,
        },
        AutoencoderKLQwenImage,
        {"base_dim": 96, "z_dim": 16},
        text_parameters=8.29 * BILLION,  # Qwen2.5-VL-7B
        text_tokens=512, text_width=3584, pooled_width=None, rank=64, guidance_scale=4.0,
    ),
}  # fmt: skip


def build(model: Model, folder: str, fake_mode: FakeTensorMode):
    """The wrapped pipeline with an adapter, bfloat16, on fake tensors."""
    pipe = model.make(folder)
    with torch.device("meta"):
        transformer = model.transformer_class(**model.transformer).to(torch.bfloat16)
        vae = model.vae_class(**model.vae).to(torch.bfloat16)
    pipe.register_modules(transformer=transformer, vae=vae.eval())
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.vae_scale_factor = 8
    with torch.device("meta"):  # says that shapes are all that is wanted
        pipeline = wrap_pipeline(pipe)
        targets = list(pipeline.lora_target_modules)
        adapter = LoraConfig(r=model.rank, lora_alpha=model.rank, target_modules=targets)
        trained = pipeline.prepare_for_training(adapter)
    for module in (pipeline.denoiser, pipeline.vae):
        with fake_mode:
            module.to_empty(device="cpu")
    pipeline.set_timesteps(20)
    return pipeline, trained


def embeds_of(model: Model, count: int, fake_mode: FakeTensorMode) -> PromptEmbeds:
    with fake_mode:
        tokens = torch.empty(count, model.text_tokens, model.text_width, dtype=torch.bfloat16)
        if model.pooled_width is None:
            return PromptEmbeds(tokens, tokens)
        pooled = torch.empty(count, model.pooled_width, dtype=torch.bfloat16)
        return PromptEmbeds(tokens, tokens, pooled, pooled)


@contextlib.contextmanager
def trainers_context():
    with torch.autocast("cpu", dtype=torch.bfloat16), normalisation_as_on_cuda():
        yield


def predict(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """GiB of weights and of the peak of every phase."""
    # Build the model with weights that have shapes but no values, and count what is always there.
    model = MODELS[name]
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with tempfile.TemporaryDirectory() as folder:
        pipeline, trained = build(model, folder, fake_mode)
    shape = pipeline.latent_shape(arguments.height, arguments.width)
    scale = model.guidance_scale
    adapter = sum(p.numel() * p.element_size() for p in pipeline.denoiser.parameters() if p.requires_grad)
    transformer = module_bytes(pipeline.denoiser) - adapter
    linear = sum(layer.weight.numel() for layer in pipeline.denoiser.modules() if type(layer) is torch.nn.Linear)

    # What runs in each phase, with samples as the argument.
    def latents(count):
        with fake_mode:
            return torch.empty(count, *shape)

    def forward(samples, denoiser=None):
        embeds = embeds_of(model, len(samples), fake_mode)
        return pipeline.predict(samples, 500, embeds, scale, denoiser)

    def training_step(samples):
        with torch.no_grad(), pipeline.reference() as reference:
            kept = forward(samples, reference)
        (forward(samples, trained) - kept).square().mean().backward()

    # Estimate the peak of every phase.
    pipeline.denoiser.enable_gradient_checkpointing()
    trained.train()
    with trainers_context():
        step = peak_activation_bytes(training_step, latents(arguments.pairs), fake_mode=fake_mode)
        with torch.no_grad():
            rollout = peak_activation_bytes(forward, latents(arguments.samples), fake_mode=fake_mode)
            decode = peak_activation_bytes(pipeline.decode_latents, latents(arguments.images), fake_mode=fake_mode)

    # Add up what is on the device at once, with the text encoders on it or not, and with quantised weights.
    base = transformer + module_bytes(pipeline.vae) + REWARD_BYTES + 4 * adapter  # weights, gradients, two Adam states
    text = 2 * model.text_parameters
    quantised = base - linear * (2 - NF4_BYTES)
    phases = max(step, rollout, decode)
    found = {
        "transformer": transformer,
        "adapter, gradients, Adam": 4 * adapter,
        "text encoders": text,
        "training step": step,
        "rollout": rollout,
        "decode": decode,
        "encoders stay": base + text + phases,
        "encoders offloaded": max(base + phases, base + text),
        "nf4, encoders offloaded": max(quantised + phases, quantised + text),
    }
    return {key: value / GIB for key, value in found.items()}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=2, help="pairs of a training step, with gradient checkpointing")
    parser.add_argument("--samples", type=int, default=8, help="latents per call of the denoiser in rollouts")
    parser.add_argument("--images", type=int, default=4, help="images per call of the decoder")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args(argv)
    result = {name: predict(name, arguments) for name in arguments.models}
    names = list(next(iter(result.values())))
    print(f"GiB, bfloat16, {arguments.height} x {arguments.width} px, {arguments.pairs} pairs a step\n")
    print(f"| | {' | '.join(result)} |\n|---|{'---|' * len(result)}")
    for name in names:
        print(f"| {name} | " + " | ".join(f"{values[name]:.1f}" for values in result.values()) + " |")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"arguments": vars(arguments) | {"json": None}, **result}, indent=1) + "\n"
        )
    return result


if __name__ == "__main__":
    main()
