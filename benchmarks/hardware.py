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
Which preset fits which card: the prediction of `trl-spo doctor` for every pair of them, as a table.

```
python benchmarks/hardware.py --json benchmarks/results/hardware.json
python benchmarks/hardware.py --fsdp2 2 4 8 --json benchmarks/results/hardware_fsdp2.json
python benchmarks/hardware.py --zero3 2 4 8 --presets sd3 flux qwen_image --json benchmarks/results/hardware_zero3.json
python benchmarks/hardware.py --fsdp2 8 16 64 --all_weights --presets sd3 flux qwen_image --cards 24 40 80 141 \
    --json benchmarks/results/hardware_fsdp2_all_weights.json
```

A cell is the predicted peak in GiB where the preset fits as it is (a tenth of the card is left for workspaces and fragments);
otherwise the change of settings that costs the least time and is enough, with its peak. Nothing is measured. With `--fsdp2` or `--zero3` the
table is about a denoiser that is spread over so many cards: the peak of each, and the smallest of the cards on which that fits.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trl_spo.checkup.circumstances import Circumstances, precision_of, read_shapes
from trl_spo.checkup.forecast import FSDP2, ZERO3, Card, SPOForecaster, Variant
from trl_spo.checkup.networks import reward_on_paper
from trl_spo.checkup.remedies import find_remedies
from trl_spo.scripts import spo
from trl_spo.training.memory import GIB


ROOT = Path(__file__).resolve().parents[1]
PRESETS = ("sd15", "sdxl", "sd3", "flux2_klein", "z_image", "flux", "qwen_image")
CARDS = (12, 16, 24, 40, 80)


def predict(preset: str, cards: tuple[int, ...]) -> dict[str, dict]:
    """Card -> peak, whether it fits, and what makes it fit."""
    forecaster, variant = planned(preset)
    name = forecaster.networks(variant).pipeline.denoiser_name
    found = {}
    for gib in cards:
        card = Card.planned(gib)
        forecast = forecaster.forecast(variant, card)
        entry = {"peak_gib": forecast.peak / GIB, "phase": forecast.highest.name, "fits": forecast.fits(card)}
        if not entry["fits"]:
            remedies = find_remedies(lambda run, card=card: forecaster.forecast(run, card), variant, card, name)
            entry["remedies"] = [{"options": each.options, "peak_gib": each.peak_gib} for each in remedies]
        found[str(gib)] = entry
        print(preset, gib, json.dumps(entry), file=sys.stderr, flush=True)
    return found


def predict_sharded(
    preset: str, processes: list[int], cards: tuple[int, ...], sharding: str, options: list[str]
) -> dict[str, dict]:
    """Processes -> peak of each with a denoiser that is spread over them, its phase, and the smallest card on which it fits."""
    found = {}
    for count in processes:
        forecaster, variant = planned(preset, count, sharding, options)
        for gib in sorted(cards):
            card = Card.planned(gib)
            forecast = forecaster.forecast(variant, card)
            if forecast.fits(card):
                break
        entry = {"peak_gib": forecast.peak / GIB, "phase": forecast.highest.name}
        found[str(count)] = {**entry, "card": gib if forecast.fits(card) else None}
        print(preset, count, json.dumps(found[str(count)]), file=sys.stderr, flush=True)
    return found


def planned(
    preset: str, shards: int = 1, sharding: str = FSDP2, options: Sequence[str] = ()
) -> tuple[SPOForecaster, Variant]:
    """The run of a preset on paper, with further options, its denoiser whole or spread over so many processes."""
    config_file = ROOT / "examples" / "configs" / f"spo_{preset}.yaml"
    arguments = ["--config", str(config_file), "--dataset_name", "prompts.txt", "--use_cpu", *options]
    model_args, reward_args, _, config = spo.make_parser().parse_args_and_config(arguments)
    where = Circumstances(card_memory=24)
    where.hub.why_not = "shapes as published are what is wanted"
    dtype, quantised = precision_of(model_args, config.model_init_kwargs)
    model, _ = read_shapes(model_args, config.model_init_kwargs, where.hub)
    forecaster = SPOForecaster(
        model,
        lambda pipeline: reward_on_paper(reward_args, pipeline, online=False)[0],
        model_args.peft_config,
        world_size=shards,
        sharding=sharding if shards > 1 else None,
    )
    return forecaster, Variant(config, dtype, quantised)


def cell(entry: dict) -> str:
    """One field of the table. A base in nf4 is written as the page on flow-matching models has it."""
    if entry["fits"]:
        return f"**{entry['peak_gib']:.1f}**"
    if not entry["remedies"]:
        return "-"
    best = entry["remedies"][0]
    options = re.sub(r"'\{.*\}'", '"$NF4"', best["options"])
    return f"`{options}`: {best['peak_gib']:.1f}"


def table(results: dict[str, dict]) -> str:
    cards = list(next(iter(results.values())))
    lines = ["| preset | " + " | ".join(f"{card} GiB" for card in cards) + " |", "|---|" + "---|" * len(cards)]
    for preset, found in results.items():
        lines.append(
            f"| [spo_{preset}](../examples/configs/spo_{preset}.yaml) | "
            + " | ".join(cell(found[card]) for card in cards)
            + " |"
        )
    return "\n".join(lines)


def sharded_table(results: dict[str, dict]) -> str:
    counts = list(next(iter(results.values())))
    lines = ["| preset | " + " | ".join(f"{count} cards" for count in counts) + " |", "|---|" + "---|" * len(counts)]
    for preset, found in results.items():
        cells = []
        for entry in found.values():
            card = "on none" if entry["card"] is None else f"on {entry['card']} GiB"
            cells.append(f"{entry['peak_gib']:.1f} {card}")
        lines.append(f"| spo_{preset} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--cards", nargs="+", type=int, default=list(CARDS), help="GiB of each card")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--fsdp2", nargs="+", type=int, help="processes that share a denoiser, instead of whole ones")
    parser.add_argument("--zero3", nargs="+", type=int, help="the same by DeepSpeed ZeRO-3")
    parser.add_argument("--all_weights", action="store_true", help="with these two: train the whole denoiser, no LoRA")
    arguments = parser.parse_args(argv)
    cards = tuple(arguments.cards)
    if arguments.fsdp2 or arguments.zero3:
        counts, sharding = (arguments.fsdp2, FSDP2) if arguments.fsdp2 else (arguments.zero3, ZERO3)
        options = ["--use_peft", "false"] if arguments.all_weights else []
        results = {}
        for preset in arguments.presets:
            results[preset] = predict_sharded(preset, counts, cards, sharding, options)
        print(sharded_table(results))
    else:
        results = {preset: predict(preset, cards) for preset in arguments.presets}
        print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
