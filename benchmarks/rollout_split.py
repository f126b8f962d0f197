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
How many of the cards should only roll out? A calculation, nothing is trained: what a pair costs in each phase, from the arithmetic
of the networks as published and the rates that were measured on one H100, and what follows for 8 and 64 cards.

```shell
python benchmarks/rollout_split.py
```

Of each preset of `examples/configs` the phases are those of `trl-spo doctor`: rollout, decoding and scoring on one side, reference,
policy and backward pass on the other, with half of the branches giving a pair. Five ways to use N cards:

- together: every card does both, one after the other.
- apart: m cards roll out, then the others train.
- apart, ahead: both at once, with pairs that are one update older; a step takes as long as the slower side.
- sharded: together, and each call of the denoiser gathers its weights (FSDP 2), each backward pass once more.
- sharded trainers: apart and ahead, where the cards that roll out have the whole denoiser and only trainers gather.

Gathering is counted in full, as if nothing of it were hidden behind arithmetic, over `--gather_gb` gigabytes per second and card,
which is assumed: 300 inside a machine of eight cards and 40 between machines are typical of H100s.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere

from benchmarks.hardware import planned
from trl_spo.checkup.forecast import Card, SPOForecaster, Variant
from trl_spo.checkup.rates import MEASURED, rate_of
from trl_spo.checkup.work import network_tflop, plan_work
from trl_spo.training.memory import GIB


PRESETS = ("sd15", "sdxl", "sd3", "flux")
SHARE = 0.5  # of the branches that give a pair
CARDS = (8, 64)


@dataclass(frozen=True)
class Costs:
    """
    Of one pair on one card.

    Attributes:
        rollout (`float`), scoring (`float`), training (`float`): seconds of the phases; the first with what no network takes.
        rollout_gathers (`float`), training_gathers (`float`): gigabytes of weights that a sharded denoiser gathers.
        rollout_gib (`float`), training_gib (`float`): peak of memory of a card that does only that.
    """

    rollout: float
    scoring: float
    training: float
    rollout_gathers: float
    training_gathers: float
    rollout_gib: float
    training_gib: float


def costs_of(preset: str) -> Costs:
    """Those of a preset, from shapes alone."""
    forecaster, variant = planned(preset)
    config = variant.config
    networks = forecaster.networks(variant)
    pipeline = networks.pipeline

    # Seconds of a pair, from the arithmetic of a sample through each network and how many samples a pair takes.
    tflop = network_tflop(networks, config)
    settings = config.rollout_settings()
    shape = pipeline.latent_shape(config.height, config.width)
    settings = settings.resolve(pipeline.step_rule, pipeline.set_timesteps(config.num_inference_steps, shape))
    (work,) = [work for work in plan_work(config, settings, pipeline, num_prompts=1000) if work.share == SHARE]
    per_pair = {
        "unet": work.predictions / work.pairs,
        "decode": work.decodes / work.pairs,
        "reward_image": work.decodes / work.pairs,
        "training": work.forwards / work.pairs,
    }
    took = {name: per_pair[name] * cost / rate_of(name) for name, cost in tflop.items()}
    other = MEASURED["other_seconds_per_prompt"] * work.prompts / work.pairs

    # Gigabytes of weights per pair: a call of the denoiser serves all prompts of a rollout, or all pairs of a micro-batch. Each
    # candidate step is one call more than the plain step, as all candidates go through together.
    gigabytes = sum(p.numel() for p in pipeline.denoiser.parameters()) * variant.dtype.itemsize / 1e9
    pairs_per_rollout = work.pairs / work.prompts * config.per_device_rollout_batch_size
    calls_per_rollout = 2 * config.num_inference_steps
    training_calls = 3  # reference, policy, backward
    return Costs(
        rollout=took["unet"] + other,
        scoring=took["decode"] + took.get("reward_image", 0.0),
        training=took["training"],
        rollout_gathers=calls_per_rollout * gigabytes / pairs_per_rollout,
        training_gathers=training_calls * gigabytes / config.per_device_train_batch_size,
        **memory_of(forecaster, variant),
    )


def memory_of(forecaster: SPOForecaster, variant: Variant) -> dict[str, float]:
    """Peaks of a card that rolls out only, and of one that trains only, which holds neither the VAE nor the reward then."""
    forecast = forecaster.forecast(variant, Card.planned(80))
    rollout = max(phase.bytes for phase in forecast.phases if phase.name.startswith("rollout"))
    training = max(phase.bytes for phase in forecast.phases if not phase.name.startswith("rollout"))
    only_training = [name for name in forecast.resident if "gradient" in name or "optimizer" in name]
    only_rollout = [name for name in forecast.resident if "VAE" in name or "reward" in name or "decoder" in name]
    rollout += forecast.weights - sum(forecast.resident[name] for name in only_training)
    training += forecast.weights - sum(forecast.resident[name] for name in only_rollout)
    return {"rollout_gib": rollout / GIB, "training_gib": training / GIB}


def seconds_per_pair(costs: Costs, cards: int, gather_gb: float) -> dict[str, tuple[float, int | None]]:
    """Way to use the cards -> seconds per pair of all cards together, and the cards that only roll out, where that is best."""
    found = costs.rollout + costs.scoring
    gathered = found + costs.rollout_gathers / gather_gb
    trained = costs.training + costs.training_gathers / gather_gb
    splits = range(1, cards)

    def best(seconds) -> tuple[float, int]:
        return min((seconds(m), m) for m in splits)

    return {
        "together": ((found + costs.training) / cards, None),
        "apart": best(lambda m: found / m + costs.training / (cards - m)),
        "apart, ahead": best(lambda m: max(found / m, costs.training / (cards - m))),
        "sharded": ((gathered + trained) / cards, None),
        "sharded trainers, ahead": best(lambda m: max(found / m, trained / (cards - m))),
    }


def report(all_costs: dict[str, Costs], gather_gb: dict[int, float]) -> str:
    lines = [
        "Seconds of a pair on one card, and memory of a card that does only one of both:\n",
        "| preset | denoiser of the rollout | decode and score | training | weights gathered per pair, rollout, training | GiB, rollout only | GiB, training only |",
        "|---|---|---|---|---|---|---|",
    ]
    for preset, costs in all_costs.items():
        lines.append(
            f"| {preset} | {costs.rollout:.3f} | {costs.scoring:.3f} | {costs.training:.3f} | "
            f"{costs.rollout_gathers:.1f} GB, {costs.training_gathers:.1f} GB | {costs.rollout_gib:.0f} | {costs.training_gib:.0f} |"
        )
    for cards, rate in gather_gb.items():
        ways = list(seconds_per_pair(next(iter(all_costs.values())), cards, rate))
        lines += [
            f"\nPairs per second of {cards} cards, and how many of them only roll out; {rate:g} GB/s:\n",
            "| preset | " + " | ".join(ways) + " |",
            "|---" * (len(ways) + 1) + "|",
        ]
        for preset, costs in all_costs.items():
            cells = [preset]
            for seconds, split in seconds_per_pair(costs, cards, rate).values():
                cells.append(f"{1 / seconds:.1f}" + (f" ({split})" if split else ""))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), help="Of examples/configs.")
    parser.add_argument("--gather_gb", type=float, nargs=2, default=[300.0, 40.0], help="For 8 and for 64 cards.")
    parser.add_argument("--json", type=Path, help="Where to leave the costs.")
    args = parser.parse_args(argv)
    all_costs = {preset: costs_of(preset) for preset in args.presets}
    if args.json:
        args.json.write_text(json.dumps({name: vars(costs) for name, costs in all_costs.items()}, indent=2) + "\n")
    print(report(all_costs, dict(zip(CARDS, args.gather_gb, strict=True))))


if __name__ == "__main__":
    main()
