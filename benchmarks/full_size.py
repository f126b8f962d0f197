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
What the paper's runs would cost: the arithmetic of each network at its real size, counted, times the evaluations of each
stage, over a rate.

```
python benchmarks/full_size.py --json benchmarks/results/full_size.json
python benchmarks/full_size.py --tflops 210    # with a rate that you measured
```

Networks are built on the meta device, and PyTorch's own counter reads their matrix products and convolutions; nothing is
computed. Without `--tflops` the rate is the one at which the *released* code, with its duplicated evaluations, takes the
GPU hours that the paper reports for the same stage: so an hour here means an hour of their A100s, as well used as theirs
were. Samples that a rollout needs do not depend on the results; pairs do, and hours are given for several shares of valid
pairs.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.memory import GUIDANCE_SCALE, Models


PAPER_HOURS = {"sd15": {"reward": 32, "spo": 48, "dpo": 384}, "sdxl": {"reward": 116, "spo": 118, "dpo": 4800}}
"""A100 hours: https://huggingface.co/papers/2406.04314, the table of training cost."""

A100_PEAK = 312.0  # TFLOP/s, dense half precision, NVIDIA's data sheet
STEPS, START, PROMPTS, EPOCHS = 20, 4, 4000, 10
REWARD_PAIRS = {"sd15": 8000 * 64, "sdxl": 7000 * 64}
EVALUATION_PROMPTS = 500
SHARES = (1.0, 0.5, 0.25)  # of the branches whose pair passes the threshold
DEVICES = (1, 4, 8)


def count(function: Callable) -> float:
    """TFLOP of `function()`, a multiply-add counted as two; attention as its matrix products."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return counter.get_total_flops() / 1e12


def network_costs(name: str) -> dict[str, float]:
    """
    Arithmetic of one sample through each network of a preset.

    Returns:
        `dict[str, float]`: TFLOP of `unet` (one sample; guidance needs two), `training` (policy forward and backward and
        reference forward of one guided sample), `decode`, `encode`, `reward_image`, `reward_text`, and `reward_training`
        (forward and backward of one image).
    """
    models = Models(name, torch.bfloat16, device="meta")
    pipeline, reward, shape = models.pipeline, models.reward_model, models.pipeline.latent_shape()
    vae, embeds = pipeline.frozen_modules()["vae"], models.embeds(1)

    def zeros(*dimensions, dtype=models.dtype):
        return torch.zeros(dimensions, dtype=dtype, device="meta")

    latents, steps = zeros(1, *shape), zeros(1, dtype=torch.long)
    images = zeros(1, 3, 8 * shape[-2], 8 * shape[-1])
    pixels = zeros(1, 3, *[models.preset.reward_vision["image_size"]] * 2)
    tokens = zeros(1, models.preset.reward_text["max_position_embeddings"], dtype=torch.long)

    def training():
        with torch.no_grad(), pipeline.reference() as reference:
            pipeline.predict(latents, steps, embeds, GUIDANCE_SCALE, reference)
        pipeline.predict(latents, steps, embeds, GUIDANCE_SCALE, models.model).sum().backward()

    with torch.no_grad():
        costs = {
            "unet": count(lambda: pipeline.predict(latents, steps, embeds, 1.0)),
            "decode": count(lambda: vae.decode(latents)),
            "encode": count(lambda: vae.encode(images)),
            "reward_image": count(lambda: reward.get_image_features(pixels, steps)),
            "reward_text": count(lambda: reward.get_text_features(tokens)),
        }
    models.model.train()
    with torch.autocast("cpu", torch.bfloat16):
        costs["training"] = count(training)
    reward.requires_grad_(True)
    costs["reward_training"] = count(lambda: reward.get_image_features(pixels, steps).sum().backward())
    return costs


def rollout_samples(num_candidates: int, num_inner_steps: int) -> dict[str, int]:
    """
    Evaluations of one prompt's rollout: UNet predictions (guidance not yet counted), decodes, and branches.

    Each branch takes K samples j steps on, which needs a prediction at each, and a prediction of x_0 at its end, except at
    the last step. The prediction of the candidate that goes on is the next branch's own first.
    """
    branches = -(-(STEPS - START) // num_inner_steps)
    predictions = START + 1  # up to and including the first branching latent
    for branch in range(branches):
        first = START + branch * num_inner_steps
        last = min(first + num_inner_steps, STEPS)
        predictions += num_candidates * (last - first - 1)  # inner steps go on from each candidate
        predictions += num_candidates if last < STEPS else 0
    return {"predictions": predictions, "decodes": branches * num_candidates, "branches": branches}


def stages(name: str, costs: dict[str, float]) -> dict[str, dict]:
    """
    Exaflop of each stage of the paper's runs, by our loop and by the released code's.

    The released code runs two policy and two reference forward passes of a pair that shares x_t, and reads the prompt once
    for each image it scores; otherwise its samples are the same.
    """
    candidates, inner = (4, 1) if name == "sd15" else (2, 4)
    samples = rollout_samples(candidates, inner)
    prompts = PROMPTS * EPOCHS
    scored = samples["decodes"]
    rollout = 2 * samples["predictions"] * costs["unet"] + scored * (costs["decode"] + costs["reward_image"])
    # Both sides of a pair share x_t in the first of j steps only.
    transitions = STEPS - START
    passes = transitions if inner == 1 else 2 * transitions - samples["branches"]
    training = passes * costs["training"]
    theirs = 2 * transitions * costs["training"]
    pair = 2 * (costs["encode"] + 2 * costs["unet"] + costs["decode"] + costs["reward_training"])
    pair += 3 * costs["reward_text"]
    reward = REWARD_PAIRS[name] * pair
    evaluation = EVALUATION_PROMPTS * (2 * STEPS * costs["unet"] + costs["decode"])
    exa = 1e-6
    return {
        "rollout": {
            "ours": prompts * (rollout + costs["reward_text"]) * exa,
            "public": prompts * (rollout + scored * costs["reward_text"]) * exa,
        },
        "training of all pairs": {"ours": prompts * training * exa, "public": prompts * theirs * exa},
        "reward model": {"ours": reward * exa, "public": reward * exa},
        "evaluation of one model": {"ours": evaluation * exa, "public": evaluation * exa},
    }


def hours(exaflop: float, tflops: float) -> float:
    return exaflop * 1e6 / tflops / 3600


def plan(name: str, tflops: float | None = None) -> dict:
    """Costs, rates and hours of a preset; `tflops` replaces the calibrated rates."""
    costs = network_costs(name)
    work, paper = stages(name, costs), PAPER_HOURS[name]
    public = {share: work["rollout"]["public"] + share * work["training of all pairs"]["public"] for share in SHARES}
    rates = {share: tflops or exaflop * 1e6 / (paper["spo"] * 3600) for share, exaflop in public.items()}
    reward_rate = tflops or work["reward model"]["public"] * 1e6 / (paper["reward"] * 3600)
    found = {}
    for share in SHARES:
        exaflop = work["rollout"]["ours"] + share * work["training of all pairs"]["ours"]
        found[share] = {"exaflop": exaflop, "public_exaflop": public[share], "tflops": rates[share]}
        found[share]["hours"] = hours(exaflop, rates[share])
    reward_hours = hours(work["reward model"]["ours"], reward_rate)
    evaluation = hours(work["evaluation of one model"]["ours"], rates[0.5])
    return {
        "network_tflop": costs,
        "stages_exaflop": work,
        "spo": found,
        "reward": {"tflops": reward_rate, "hours": reward_hours},
        "evaluation": {"tflops": rates[0.5], "hours": evaluation},
        "paper_hours": paper,
    }


def describe(name: str, result: dict) -> str:
    lines = [f"## {name}", "", "| TFLOP of one sample | " + " | ".join(result["network_tflop"]) + " |"]
    lines.append("|---|" + "---|" * len(result["network_tflop"]))
    lines.append("| | " + " | ".join(f"{value:.3f}" for value in result["network_tflop"].values()) + " |")
    lines += ["", "| stage | exaflop | released code | rate, TFLOP/s (of the A100's peak) | GPU hours | on 4 | on 8 |"]
    lines.append("|---|---|---|---|---|---|---|")

    def row(title, ours, public, rate, total):
        each = " | ".join(f"{total / devices:.1f}" for devices in DEVICES)
        lines.append(f"| {title} | {ours:.2f} | {public:.2f} | {rate:.0f} ({rate / A100_PEAK:.0%}) | {each} |")

    work = result["stages_exaflop"]
    row("reward model", *work["reward model"].values(), result["reward"]["tflops"], result["reward"]["hours"])
    for share, value in result["spo"].items():
        title = f"SPO, {float(share):.0%} of the pairs valid"
        row(title, value["exaflop"], value["public_exaflop"], value["tflops"], value["hours"])
    row(
        "evaluation of one model",
        *work["evaluation of one model"].values(),
        result["evaluation"]["tflops"],
        result["evaluation"]["hours"],
    )
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--presets", nargs="+", choices=list(PAPER_HOURS), default=list(PAPER_HOURS))
    parser.add_argument("--tflops", type=float, help="Sustained TFLOP/s of one device, instead of the paper's.")
    parser.add_argument("--json", type=Path, help="Where all numbers go.")
    args = parser.parse_args(argv)
    if args.tflops is not None and args.tflops <= 0:
        parser.error(f"--tflops must be above 0, got {args.tflops:g}")
    results = {name: plan(name, args.tflops) for name in args.presets}
    print("\n\n".join(describe(name, result) for name, result in results.items()))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
