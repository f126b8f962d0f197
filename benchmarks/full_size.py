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
stage, over the rates that were measured on a GPU.

```
python benchmarks/full_size.py --json benchmarks/results/full_size.json
python benchmarks/full_size.py --tflops 210    # one rate for everything, such as one that you measured
```

Networks are built on the meta device, and PyTorch's own counter reads their matrix products and convolutions; nothing is
computed. The rates are those of each phase on one H100 (`MEASURED`, from a profiled run of `throughput.py --preset sd15`). SDXL
was measured as a whole, so all its rates are SD1.5's times one factor. Samples that a rollout needs do not depend on the
results; pairs do, and hours are given for several shares of valid pairs.
"""

import argparse
import json
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.memory import GUIDANCE_SCALE, Models
from trl_spo.branch_plan import BranchPlan
from trl_spo.checkup import work
from trl_spo.checkup.rates import MEASURED, rate_of
from trl_spo.checkup.work import SHARES, count_tflop


PAPER_HOURS = {"sd15": {"reward": 32, "spo": 48, "dpo": 384}, "sdxl": {"reward": 116, "spo": 118, "dpo": 4800}}
"""A100 hours: https://huggingface.co/papers/2406.04314, the table of training cost."""

STEPS = 20
START = 4
PROMPTS = 4000
EPOCHS = 10
REWARD_PAIRS = {"sd15": 8000 * 64, "sdxl": 7000 * 64}
EVALUATION_PROMPTS = 500
DEVICES = (1, 4, 8)


def network_costs(name: str) -> dict[str, float]:
    """
    Arithmetic of one sample through each network of a preset.

    Returns:
        `dict[str, float]`: TFLOP of `unet` (one sample; guidance needs two), `training` (policy forward and backward and
        reference forward of one guided sample), `decode`, `encode`, `reward_image`, `reward_text`, and `reward_training`
        (forward and backward of one image).
    """
    # Networks and inputs on the meta device: shapes are enough to count arithmetic.
    models = Models(name, torch.bfloat16, device="meta")
    pipeline = models.pipeline
    reward = models.reward_model
    shape = models.pipeline.latent_shape()
    vae = pipeline.frozen_modules()["vae"]
    embeds = models.embeds(1)

    def zeros(*dimensions, dtype=models.dtype):
        return torch.zeros(dimensions, dtype=dtype, device="meta")

    latents = zeros(1, *shape)
    steps = zeros(1, dtype=torch.long)
    images = zeros(1, 3, 8 * shape[-2], 8 * shape[-1])
    pixels = zeros(1, 3, *[models.preset.reward_vision["image_size"]] * 2)
    tokens = zeros(1, models.preset.reward_text["max_position_embeddings"], dtype=torch.long)

    def training():
        with torch.no_grad(), pipeline.reference() as reference:
            pipeline.predict(latents, steps, embeds, GUIDANCE_SCALE, reference)
        pipeline.predict(latents, steps, embeds, GUIDANCE_SCALE, models.model).sum().backward()

    # Count each network once, training with its backward pass.
    with torch.no_grad():
        costs = {
            "unet": count_tflop(lambda: pipeline.predict(latents, steps, embeds, 1.0)),
            "decode": count_tflop(lambda: vae.decode(latents)),
            "encode": count_tflop(lambda: vae.encode(images)),
            "reward_image": count_tflop(lambda: reward.get_image_features(pixels, steps)),
            "reward_text": count_tflop(lambda: reward.get_text_features(tokens)),
        }
    models.model.train()
    with torch.autocast("cpu", torch.bfloat16):
        costs["training"] = count_tflop(training)
    reward.requires_grad_(True)
    costs["reward_training"] = count_tflop(lambda: reward.get_image_features(pixels, steps).sum().backward())
    return costs


def rollout_samples(num_candidates: int, num_inner_steps: int) -> dict[str, int]:
    """Evaluations of one prompt's rollout in the paper's runs: see [`trl_spo.checkup.work.rollout_samples`]."""
    starts = range(START, STEPS, num_inner_steps)
    plan = BranchPlan({start: min(num_inner_steps, STEPS - start) for start in starts}, STEPS)
    samples = work.rollout_samples(plan, num_candidates, STEPS)
    return {name: samples[name] for name in ("predictions", "decodes", "branches")}


def samples_of_stages(name: str) -> dict[str, dict[str, dict[str, int]]]:
    """
    Samples through each network in each stage of the paper's runs, by our loop and by the released code's.

    The released code runs two policy and two reference forward passes of a pair that shares x_t, and reads the prompt once
    for each image it scores; otherwise its samples are the same.
    """
    candidates, inner = (4, 1) if name == "sd15" else (2, 4)
    samples = rollout_samples(candidates, inner)
    prompts = PROMPTS * EPOCHS
    scored = prompts * samples["decodes"]
    rollout = {"unet": 2 * prompts * samples["predictions"], "decode": scored, "reward_image": scored}
    # Both sides of a pair share x_t in the first of j steps only.
    transitions = STEPS - START
    passes = transitions if inner == 1 else 2 * transitions - samples["branches"]
    sides = 2 * REWARD_PAIRS[name]
    reward = {"encode": sides, "unet": 2 * sides, "decode": sides, "reward_training": sides}
    reward["reward_text"] = 3 * REWARD_PAIRS[name]
    evaluation = {"unet": EVALUATION_PROMPTS * 2 * STEPS, "decode": EVALUATION_PROMPTS}
    return {
        "rollout": {"ours": {**rollout, "reward_text": prompts}, "public": {**rollout, "reward_text": scored}},
        "training of all pairs": {
            "ours": {"training": prompts * passes},
            "public": {"training": prompts * 2 * transitions},
        },
        "reward model": {"ours": reward, "public": reward},
        "evaluation of one model": {"ours": evaluation, "public": evaluation},
    }


def total_exaflop(samples: dict[str, int], costs: dict[str, float]) -> float:
    return sum(number * costs[network] for network, number in samples.items()) * 1e-6


def stages(name: str, costs: dict[str, float]) -> dict[str, dict[str, float]]:
    """Exaflop of each stage, by our loop and by the released code's."""
    return {
        stage: {whose: total_exaflop(samples, costs) for whose, samples in both.items()}
        for stage, both in samples_of_stages(name).items()
    }


def rates_of(name: str, costs: dict[str, float], tflops: float | None = None) -> dict[str, float]:
    """TFLOP/s of every network: as measured, or `tflops` for all."""
    if tflops is not None:
        return dict.fromkeys(costs, tflops)
    rates = {network: rate_of(network) for network in costs}
    if name != "sdxl":
        return rates
    found = samples_of_stages(name)
    predicted = seconds(found["rollout"]["ours"], costs, rates)
    predicted += seconds(found["training of all pairs"]["ours"], costs, rates)
    measured = PROMPTS * EPOCHS * (STEPS - START) / MEASURED["sdxl_pairs_per_second"]
    return {network: rate * predicted / measured for network, rate in rates.items()}


def seconds(samples: dict[str, int], costs: dict[str, float], rates: dict[str, float]) -> float:
    return sum(number * costs[network] / rates[network] for network, number in samples.items())


def stage(exaflop: float, public: float, total_seconds: float) -> dict[str, float]:
    """A row of the table; `tflops` is the rate that follows."""
    tflops = exaflop * 1e6 / total_seconds
    return {"exaflop": exaflop, "public_exaflop": public, "tflops": tflops, "hours": total_seconds / 3600}


def plan(name: str, tflops: float | None = None) -> dict:
    """Costs, rates and hours of a preset; `tflops` replaces the measured rates."""
    costs = network_costs(name)
    rates = rates_of(name, costs, tflops)
    work = stages(name, costs)
    samples = samples_of_stages(name)
    # Optimizer, text encoder and host; of SDXL it is part of what was measured as a whole.
    other = MEASURED["other_seconds_per_prompt"] * PROMPTS * EPOCHS if name == "sd15" and tflops is None else 0.0
    duration = {key: seconds(both["ours"], costs, rates) for key, both in samples.items()}

    def row(*parts: tuple[str, float], extra: float = 0.0) -> dict[str, float]:
        ours, public = (sum(share * work[key][whose] for key, share in parts) for whose in ("ours", "public"))
        return stage(ours, public, sum(share * duration[key] for key, share in parts) + extra)

    return {
        "network_tflop": costs,
        "stages_exaflop": work,
        "network_tflops": rates,
        "spo": {share: row(("rollout", 1.0), ("training of all pairs", share), extra=other) for share in SHARES},
        "reward": row(("reward model", 1.0)),
        "evaluation": row(("evaluation of one model", 1.0)),
        "paper_hours": PAPER_HOURS[name],
    }


def describe(name: str, result: dict) -> str:
    lines = [f"## {name}", "", "| | " + " | ".join(result["network_tflop"]) + " |"]
    lines.append("|---|" + "---|" * len(result["network_tflop"]))
    lines.append("| TFLOP of one sample | " + " | ".join(f"{v:.3f}" for v in result["network_tflop"].values()) + " |")
    lines.append("| TFLOP/s | " + " | ".join(f"{v:.0f}" for v in result["network_tflops"].values()) + " |")
    lines += ["", "| stage | exaflop | released code | TFLOP/s of the whole | GPU hours | on 4 | on 8 |"]
    lines.append("|---|---|---|---|---|---|---|")
    rows = {"reward model": result["reward"]}
    rows |= {f"SPO, {float(share):.0%} of the pairs valid": value for share, value in result["spo"].items()}
    rows["evaluation of one model"] = result["evaluation"]
    for title, value in rows.items():
        each = " | ".join(f"{value['hours'] / devices:.1f}" for devices in DEVICES)
        numbers = f"{value['exaflop']:.2f} | {value['public_exaflop']:.2f} | {value['tflops']:.0f}"
        lines.append(f"| {title} | {numbers} | {each} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--presets", nargs="+", choices=list(PAPER_HOURS), default=list(PAPER_HOURS))
    parser.add_argument("--tflops", type=float, help="Sustained TFLOP/s of one device, instead of those measured.")
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
