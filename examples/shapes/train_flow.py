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
Trains the flow-matching model of the shapes world: a tiny `StableDiffusion3Pipeline` on the captions and renders of the
UNet's world, with the same VAE. Writes `weights/flow_pipeline`; its recipe stands in `weights/README.md`.

```bash
python -m examples.shapes.train_flow
```
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection

from .train_base import (
    WEIGHTS,
    Average,
    load,
    make_renders,
    make_text_config,
    make_tokenizer,
    save_tokenizer,
    tokenize,
    train_loop,
)


FLOW_PIPELINE = WEIGHTS / "flow_pipeline"
# Stable Diffusion 3 pads its text with 256 tokens of a T5 encoder, or with as many zeros where it has none. Here there is
# one such token, so that text costs little beside the 16 tokens of an image.
NUM_T5_TOKENS = 1
TEXT_WIDTH = 32  # of each of the two text encoders


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train the flow-matching model of the shapes world.")
    parser.add_argument("--output_dir", type=Path, default=FLOW_PIPELINE)
    parser.add_argument("--seed", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--num_renders", type=int, default=30_000)
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument(
        "--continue_training", action="store_true", help="Start from the weights in the output folder."
    )
    return parser.parse_args(argv)


def make_transformer() -> SD3Transformer2DModel:
    """1.9M parameters: four latent pixels are one token, as in the published models."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=16,
        num_attention_heads=6,
        caption_projection_dim=96,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )


def make_text_encoder(tokenizer) -> CLIPTextModelWithProjection:
    sizes = {"hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH, "projection_dim": TEXT_WIDTH}
    return CLIPTextModelWithProjection(make_text_config(tokenizer, num_attention_heads=2, **sizes))


def text_features(encoders, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token features `(B, L, dim)` and pooled features `(B, dim)`, as `StableDiffusion3Pipeline` makes them."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    zeros = tokens.new_zeros(len(tokens), NUM_T5_TOKENS, tokens.shape[-1])
    return torch.cat([tokens, zeros], dim=1), torch.cat([output.text_embeds for output in outputs], dim=-1)


@torch.no_grad()
def latents_of_renders(args) -> tuple[AutoencoderKL, torch.Tensor, list[str]]:
    """The VAE with the mean and scale of latents in its configuration, latents (N, 4, 8, 8), and their captions."""
    vae = load(AutoencoderKL, WEIGHTS / "pipeline" / "vae")
    images, prompts = make_renders(args.num_renders, args.seed, split=None)
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in (2 * images - 1).split(256)])
    shift = latents.mean().item()
    scale = 1 / latents.std().item()
    vae.register_to_config(shift_factor=round(shift, 5), scaling_factor=round(scale, 5), _name_or_path="")
    return vae, (latents - vae.config.shift_factor) * vae.config.scaling_factor, prompts


def train_flow(args) -> dict[str, float]:
    # Latents of rendered scenes, and networks that are fresh or continue.
    torch.manual_seed(args.seed)
    vae, latents, prompts = latents_of_renders(args)
    tokenizer = make_tokenizer()
    ids, null = tokenize(tokenizer, prompts), tokenize(tokenizer, [""])
    transformer = make_transformer()
    encoders = [make_text_encoder(tokenizer), make_text_encoder(tokenizer)]
    if args.continue_training:
        transformer = load(SD3Transformer2DModel, args.output_dir / "transformer").train().requires_grad_(True)
        folders = [args.output_dir / name for name in ("text_encoder", "text_encoder_2")]
        encoders = [load(CLIPTextModelWithProjection, folder).train().requires_grad_(True) for folder in folders]
    average = Average([transformer, *encoders])
    generator = torch.Generator().manual_seed(args.seed + 1)

    # The flow-matching loss, with a tenth of the prompts empty.
    def loss_function(step):
        count = args.batch_size
        index = torch.randint(len(latents), (count,), generator=generator)
        noise = torch.randn(count, *latents.shape[1:], generator=generator)
        sigma = torch.sigmoid(torch.randn(count, generator=generator))  # logit-normal, as SD3 (arXiv 2403.03206)
        unconditional = torch.rand(count, 1, generator=generator) < 0.1  # so that guidance works
        tokens, pooled = text_features(encoders, torch.where(unconditional, null, ids[index]))
        level = sigma.view(-1, 1, 1, 1)
        noisy = (1 - level) * latents[index] + level * noise
        velocity = transformer(noisy, tokens, pooled, 1000 * sigma).sample
        error = (velocity - (noise - latents[index])).pow(2).mean()
        return error, {"error": error}

    parameters = [p for module in (transformer, *encoders) for p in module.parameters()]
    seconds = train_loop("flow", args.steps, parameters, args.learning_rate, loss_function, average.update)

    # Save the average of the weights as a pipeline, in half precision.
    average.copy_to_modules()
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),  # shift grows with resolution; these images are small
        vae=vae,
        text_encoder=encoders[0].eval(),
        tokenizer=tokenizer,
        text_encoder_2=encoders[1].eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    copy.deepcopy(pipeline).to(dtype=torch.float16).save_pretrained(args.output_dir)
    for name in ("tokenizer", "tokenizer_2"):
        save_tokenizer(tokenizer, args.output_dir / name)
    return {"flow seconds": seconds, "parameters": sum(p.numel() for p in parameters)}


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    start = time.time()
    figures = train_flow(args)
    print({key: round(value, 3) for key, value in figures.items()}, f"{time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
