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

"""Trains the models of the shapes world from scratch, in about half an hour on two CPU cores.

Three stages, each of which reads what the earlier ones wrote, so that any of them can be repeated on its own:

- `vae`: an `AutoencoderKL` that maps 32 x 32 images to latents of 4 x 8 x 8;
- `unet`: a `UNet2DConditionModel` and its `CLIPTextModel`, trained jointly on the latents of a fixed set of renders,
  half of them clean and half dull while the caption says nothing about it;
- `clip`: a `CLIPModel` trained contrastively on clean and dull renders, where a step-aware reward model can start.

VAE and CLIP see captions of the train split only; the base model is pre-trained on all captions, as base models are.
Everything is written in half precision to `weights/`.

```bash
python -m examples.shapes.train_base --stages vae unet clip
```
"""

import argparse
import copy
import itertools
import json
import math
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from . import world


try:
    from transformers.models.clip import CLIPImageProcessorPil
except ImportError:  # transformers 4
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil


WEIGHTS = Path(__file__).parent / "weights"
MAX_TOKENS = 12  # the longest caption has eight words, plus the start and the end token


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Train the models of the shapes world.")
    parser.add_argument("--stages", nargs="+", default=["vae", "unet", "clip"], choices=["vae", "unet", "clip"])
    parser.add_argument("--output_dir", type=Path, default=WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--num_renders", type=int, default=24_000, help="Images that the VAE and the UNet see.")
    parser.add_argument("--vae_steps", type=int, default=4_000)
    parser.add_argument("--vae_batch_size", type=int, default=32)
    parser.add_argument("--unet_steps", type=int, default=3_000)
    parser.add_argument("--unet_batch_size", type=int, default=64)
    parser.add_argument("--unet_lr", type=float, default=2e-3)
    parser.add_argument("--continue_unet", action="store_true", help="Start from the UNet saved in the output folder.")
    parser.add_argument("--clip_steps", type=int, default=800)
    parser.add_argument("--clip_batch_size", type=int, default=128)
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------- common parts


def make_renders(
    count: int, seed: int, dull: float = 0.5, split: str | None = "train"
) -> tuple[torch.Tensor, list[str]]:
    """Images (count, 3, 32, 32) in [0, 1] of captions drawn uniformly from a split (`None`: all), and the captions."""
    generator = torch.Generator().manual_seed(seed)
    pool = world.captions(split)
    prompts = [pool[i] for i in torch.randint(len(pool), (count,), generator=generator).tolist()]
    pieces = [world.render(prompts[i : i + 1000], generator, dull=dull) for i in range(0, count, 1000)]
    return torch.cat(pieces), prompts


def make_tokenizer() -> CLIPTokenizer:
    """
    A `CLIPTokenizer` to which every word of the world is one token.

    Byte pair encoding is run on the words until nothing is left to merge, so the merges are consistent by
    construction; ties go to the alphabetically last pair, so the vocabulary is always the same (that of the
    tokenizers library changes from run to run). As in Stable Diffusion, the end token also pads.
    """
    words = sorted({word for caption in world.CAPTIONS for word in caption.split()})
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    tokens = sorted({symbol for symbols in split for symbol in symbols})
    merges = []
    while any(len(symbols) > 1 for symbols in split):
        counts = Counter(pair for symbols in split for pair in itertools.pairwise(symbols))
        pair = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(pair)
        split = [_merge(symbols, pair) for symbols in split]
    tokens += dict.fromkeys("".join(pair) for pair in merges)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    with tempfile.TemporaryDirectory() as folder:  # the form that every transformers version reads
        vocab_file, merges_file = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab_file.write_text(json.dumps(vocab))
        merges_file.write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]))
        return CLIPTokenizer(str(vocab_file), str(merges_file), model_max_length=MAX_TOKENS)


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Saves the tokenizer, and beside it `vocab.json` and `merges.txt`, which transformers 4 reads instead."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def name_as_transformers_4(path: Path) -> None:
    """Gives a saved text encoder the parameter names of transformers 4, which 5 reads too; 4 would skip those of 5."""
    state = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Joins each occurrence of a pair of neighbours."""
    merged = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def tokenize(tokenizer, prompts) -> torch.Tensor:
    """Token ids (B, 12), padded to the model's length."""
    kwargs = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
    return tokenizer(list(prompts), **kwargs).input_ids


def warmup_cosine(optimizer, steps: int, warmup: int = 100):
    """Learning rate factor: linear over `warmup` steps, then half a cosine down to zero."""

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_loop(name, steps, parameters, learning_rate, loss_function, after_step=None, weight_decay=1e-2):
    """Minimises `loss_function(step) -> (loss, figures)` with AdamW; returns the seconds it took."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99))
    scheduler = warmup_cosine(optimizer, steps)
    start = time.time()
    progress = tqdm(range(steps), desc=name, mininterval=5)
    for step in progress:
        loss, figures = loss_function(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        if after_step is not None:
            after_step(step)
        if step % 50 == 0:
            progress.set_postfix({key: f"{value:.4f}" for key, value in figures.items()})
    return time.time() - start


def save(model, path: Path):
    """Writes a copy of a model in half precision."""
    copy.deepcopy(model).half().save_pretrained(path)


# ------------------------------------------------------------------------------------------------------------ vae


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.IMAGE_SIZE,
    )


def outline_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the differences between neighbouring pixels: what keeps outlines sharp."""
    rows = (output.diff(dim=2) - target.diff(dim=2)).abs().mean()
    return rows + (output.diff(dim=3) - target.diff(dim=3)).abs().mean()


def train_vae(args):
    torch.manual_seed(args.seed)
    images, _ = make_renders(args.num_renders, args.seed + 1)
    images = (2 * images - 1).bfloat16()
    vae = make_vae()
    generator = torch.Generator().manual_seed(args.seed + 2)

    def loss_function(step):
        batch = images[torch.randint(len(images), (args.vae_batch_size,), generator=generator)].float()
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            output = vae.decode(posterior.sample()).sample
        output = output.float()
        pixel = F.l1_loss(output, batch)
        outline = outline_loss(output, batch)
        kl = posterior.kl().float().mean() / 256
        return pixel + 0.5 * outline + 1e-4 * kl, {"pixel": pixel, "outline": outline, "kl": kl}

    seconds = train_loop("vae", args.vae_steps, vae.parameters(), 2e-3, loss_function)
    vae.eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(b.float()).latent_dist.mean for b in images[:4096].split(256)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    save(vae, args.output_dir / "pipeline" / "vae")
    return {"vae seconds": seconds, **vae_figures(args)}


@torch.no_grad()
def vae_figures(args) -> dict[str, float]:
    """How well the saved VAE reconstructs clean renders: aesthetics and PSNR."""
    vae = load(AutoencoderKL, args.output_dir / "pipeline" / "vae")
    images, prompts = make_renders(512, args.seed + 3, dull=0.0)
    output = (vae.decode(vae.encode(2 * images - 1).latent_dist.mode()).sample / 2 + 0.5).clamp(0, 1)
    figures = {key: value.mean().item() for key, value in world.aesthetics_terms(output).items()}
    figures["aesthetics of reconstructions"] = world.aesthetics_score(output).mean().item()
    figures["alignment of reconstructions"] = world.alignment_score(output, prompts).mean().item()
    figures["psnr"] = (-10 * torch.log10(((output - images) ** 2).mean((1, 2, 3)))).mean().item()
    return figures


def load(model_class, path: Path):
    """Loads a saved model in float32, ready for inference."""
    return model_class.from_pretrained(path).float().eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------- unet and text encoder


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.018,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def make_text_config(tokenizer, **overrides) -> CLIPTextConfig:
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": 64,
    }
    return CLIPTextConfig(**{**settings, **overrides})


def make_unet(text_width: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


class Average:
    """Exponential moving average of parameters; the decay grows from .1 to .999 as `(1 + step) / (10 + step)`."""

    def __init__(self, modules):
        self.modules = modules
        self.shadow = [[p.detach().clone() for p in module.parameters()] for module in modules]

    @torch.no_grad()
    def update(self, step: int):
        decay = min(0.999, (1 + step) / (10 + step))
        for module, shadow in zip(self.modules, self.shadow, strict=True):
            torch._foreach_lerp_(shadow, [p.detach() for p in module.parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to_modules(self):
        for module, shadow in zip(self.modules, self.shadow, strict=True):
            torch._foreach_copy_(list(module.parameters()), shadow)


@torch.no_grad()
def encode_renders(args, vae) -> tuple[torch.Tensor, list[str]]:
    """Scaled latents (N, 4, 8, 8) of the fixed training renders of all captions, and those captions."""
    images, prompts = make_renders(args.num_renders, args.seed + 1, split=None)
    batches = tqdm((2 * images - 1).split(256), desc="latents", mininterval=5)
    return torch.cat([vae.encode(b).latent_dist.mean for b in batches]) * vae.config.scaling_factor, prompts


def train_unet(args):
    # Latents of rendered scenes, and networks that are fresh or continue.
    torch.manual_seed(args.seed + 10)
    folder = args.output_dir / "pipeline"
    vae = load(AutoencoderKL, folder / "vae")
    tokenizer = make_tokenizer()
    scheduler = make_scheduler()
    latents, prompts = encode_renders(args, vae)
    ids, null = tokenize(tokenizer, prompts), tokenize(tokenizer, [""])
    text_encoder = CLIPTextModel(make_text_config(tokenizer))
    unet = make_unet(text_encoder.config.hidden_size)
    if args.continue_unet:
        text_encoder = load(CLIPTextModel, folder / "text_encoder").train().requires_grad_(True)
        unet = load(UNet2DConditionModel, folder / "unet").train().requires_grad_(True)
    average = Average([unet, text_encoder])
    generator = torch.Generator().manual_seed(args.seed + 11)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    min_snr_weight = snr.clamp(max=5.0) / snr  # for epsilon prediction; arXiv 2303.09556, section 3.4

    # The usual denoising loss, weighted by timestep, with a tenth of the prompts empty.
    def loss_function(step):
        count = args.unet_batch_size
        index = torch.randint(len(latents), (count,), generator=generator)
        noise = torch.randn(count, *latents.shape[1:], generator=generator)
        t = torch.randint(1000, (count,), generator=generator)
        unconditional = torch.rand(count, 1, generator=generator) < 0.1  # so that guidance works
        states = text_encoder(torch.where(unconditional, null, ids[index])).last_hidden_state
        output = unet(scheduler.add_noise(latents[index], noise, t), t, states).sample
        errors = (output - noise).pow(2).mean((1, 2, 3))
        return (min_snr_weight[t] * errors).mean(), {"error": errors.mean()}

    parameters = [*unet.parameters(), *text_encoder.parameters()]
    seconds = train_loop("unet", args.unet_steps, parameters, args.unet_lr, loss_function, average.update)

    # Save the average of the weights as a pipeline, in half precision.
    average.copy_to_modules()
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    copy.deepcopy(pipeline).to(dtype=torch.float16).save_pretrained(folder)
    save_tokenizer(tokenizer, folder / "tokenizer")
    name_as_transformers_4(folder / "text_encoder" / "model.safetensors")
    return {"unet seconds": seconds, "parameters": sum(p.numel() for p in parameters)}


# ----------------------------------------------------------------------------------------------------------- clip


def make_clip(tokenizer) -> CLIPModel:
    text = make_text_config(tokenizer)
    vision = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": world.IMAGE_SIZE,
        "patch_size": 4,
        "projection_dim": 64,
    }
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=64))


def make_image_processor() -> CLIPImageProcessorPil:
    size = world.IMAGE_SIZE
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, 32, 32) in [0, 1] as CLIP's vision tower wants them."""
    processor = make_image_processor()
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    return (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def contrastive_loss(clip, pixel_values, input_ids, keys):
    """CLIP's symmetric loss (arXiv 2103.00020), except that images of one caption, by its key, share the target."""
    logits = clip(pixel_values=pixel_values, input_ids=input_ids).logits_per_image
    same = (keys[:, None] == keys[None]).float()
    target = same / same.sum(1, keepdim=True)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    hit = same.gather(1, logits.argmax(1, keepdim=True)).mean()
    return loss, hit


def train_clip(args):
    torch.manual_seed(args.seed + 20)
    tokenizer = make_tokenizer()
    clip = make_clip(tokenizer)
    generator = torch.Generator().manual_seed(args.seed + 21)
    images, prompts = make_renders(args.num_renders, args.seed + 22)
    images = normalise(images)
    ids = tokenize(tokenizer, prompts)
    keys = torch.tensor([world.CAPTIONS.index(prompt) for prompt in prompts])

    def loss_function(step):
        index = torch.randint(len(images), (args.clip_batch_size,), generator=generator)
        loss, hit = contrastive_loss(clip, images[index], ids[index], keys[index])
        return loss, {"hit": hit}

    def keep_scale(step):  # CLIP's own cap on the logit scale
        clip.logit_scale.data.clamp_(max=math.log(100))

    seconds = train_loop("clip", args.clip_steps, clip.parameters(), 1e-3, loss_function, keep_scale)
    folder = args.output_dir / "clip"
    save(clip.eval(), folder)
    save_tokenizer(tokenizer, folder)
    make_image_processor().save_pretrained(folder)
    return {"clip seconds": seconds, "parameters": sum(p.numel() for p in clip.parameters()), **clip_figures(args)}


@torch.no_grad()
def clip_figures(args) -> dict[str, float]:
    """Share of held-out renders whose own caption scores highest among all 103 held-out captions, clean and dull."""
    folder = args.output_dir / "clip"
    clip = load(CLIPModel, folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    pool = world.captions("heldout")
    figures = {}
    for name, dull in (("clean", False), ("dull", True)):
        images = world.render(pool * 4, torch.Generator().manual_seed(args.seed + 23), dull=dull)
        logits = clip(pixel_values=normalise(images), input_ids=tokenize(tokenizer, pool)).logits_per_image
        figures[f"top-1 {name}"] = (logits.argmax(1) == torch.arange(len(pool)).repeat(4)).float().mean().item()
    return figures


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    stages = {"vae": train_vae, "unet": train_unet, "clip": train_clip}
    for stage in args.stages:
        figures = stages[stage](args)
        print(stage, {key: round(value, 3) for key, value in figures.items()}, flush=True)


if __name__ == "__main__":
    main()
