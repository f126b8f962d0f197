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

"""Scores a pipeline on held-out captions at several guidance scales and prints a Markdown table.

```bash
python -m examples.shapes.base_scores
```
"""

import argparse
import hashlib
import time
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from trl_spo import SPOStableDiffusion3Pipeline

from . import world
from .preferences import sample_images
from .train_flow import FLOW_PIPELINE, NUM_T5_TOKENS


PIPELINE = Path(__file__).parent / "weights" / "pipeline"
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)


def load_pipeline(path=PIPELINE) -> StableDiffusionPipeline:
    """The base model of the shapes world in float32, ready for inference, without its progress bar."""
    pipeline = StableDiffusionPipeline.from_pretrained(path)
    pipeline.text_encoder.float()  # transformers 5 keeps the half precision of the file, diffusers does not
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_flow_pipeline(path=FLOW_PIPELINE) -> SPOStableDiffusion3Pipeline:
    """
    The flow-matching model of the shapes world in float32, wrapped for training. In plain diffusers call it with
    `max_sequence_length=1`: its text has one token of T5, which is zero, where published models have 256.
    """
    pipeline = StableDiffusion3Pipeline.from_pretrained(str(path), text_encoder_3=None, tokenizer_3=None)
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        encoder.float()  # transformers 5 keeps the half precision of the file, diffusers does not
    pipeline.set_progress_bar_config(disable=True)
    return SPOStableDiffusion3Pipeline(pipeline, max_sequence_length=NUM_T5_TOKENS)


def evaluation_set(split: str = "heldout", repeats: int = 3) -> tuple[list[str], list[int]]:
    """
    Captions of a split, each `repeats` times, with a seed that depends on the caption and the repeat only.

    Returns:
        `tuple[list[str], list[int]]`: prompts and seeds, all of the first repeat first.
    """
    prompts = list(world.captions(split)) * repeats
    labels = [f"{caption}/{repeat}" for repeat in range(repeats) for caption in world.captions(split)]
    seeds = [int.from_bytes(hashlib.sha256(label.encode()).digest()[:4], "big") for label in labels]
    return prompts, seeds


def evaluate(pipeline, prompts, seeds, guidance_scale: float = 1.0, **sampling) -> dict[str, torch.Tensor]:
    """
    Samples one image per prompt and scores it.

    Returns:
        `dict[str, torch.Tensor]`: `images` (B, 3, 32, 32) in [0, 1], `aesthetics` (B,) and `alignment` (B,).
    """
    images = sample_images(pipeline, prompts, seeds, guidance_scale=guidance_scale, **sampling)
    aesthetics, alignment = world.aesthetics_score(images), world.alignment_score(images, prompts)
    return {"images": images, "aesthetics": aesthetics, "alignment": alignment}


def mean_and_error(values: torch.Tensor) -> str:
    """Mean and standard error over samples, as text."""
    return f"{values.mean():.3f} ± {values.std() / len(values) ** 0.5:.3f}"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Score a pipeline of the shapes world.")
    parser.add_argument("--model", choices=["unet", "flow"], default="unet")
    parser.add_argument("--pipeline", type=Path, help="Folder with other weights than those in the repository.")
    parser.add_argument("--split", default="heldout", choices=["train", "validation", "heldout"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=list(GUIDANCE_SCALES))
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument(
        "--full_precision", action="store_true", help="Sample in float32, also where bfloat16 is faster."
    )
    args = parser.parse_args(argv)
    load, default = (load_flow_pipeline, FLOW_PIPELINE) if args.model == "flow" else (load_pipeline, PIPELINE)
    pipeline = load(args.pipeline or default)
    prompts, seeds = evaluation_set(args.split, args.repeats)
    sampling = {"num_inference_steps": args.num_inference_steps, "eta": args.eta}
    sampling["dtype"] = None if args.full_precision else "auto"
    sampler = "ddim steps of the flow" if args.model == "flow" else "DDIM"
    print(
        f"{len(prompts)} samples, {sampler}, {args.num_inference_steps} steps, eta {args.eta:g}, mean ± standard error\n"
    )
    print("| guidance | aesthetics | deciles 1 and 9 | alignment | seconds |\n|---|---|---|---|---|")
    for scale in args.guidance_scales:
        start = time.time()
        scores = evaluate(pipeline, prompts, seeds, guidance_scale=scale, **sampling)
        low, high = scores["aesthetics"].quantile(torch.tensor([0.1, 0.9])).tolist()
        cells = [mean_and_error(scores["aesthetics"]), f"{low:.2f}, {high:.2f}", mean_and_error(scores["alignment"])]
        print(f"| {scale:g} | {' | '.join(cells)} | {time.time() - start:.1f} |", flush=True)


if __name__ == "__main__":
    main()
