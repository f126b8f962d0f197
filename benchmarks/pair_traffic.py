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
How many pairs travel between the processes of a run, and how many bytes that is. Nothing is trained: rounds of rollouts are drawn,
and shared out by the code that does it in a run.

```shell
python benchmarks/pair_traffic.py
```

In each round every process rolls out its prompts. Of the branches of a prompt a fraction gives valid pairs, which differs between
prompts (a Beta(2, 1), two thirds on average). All pairs are shuffled together; each optimizer step takes the next ones, in equal
shares. A pair travels if its process has more of a step than its share. Beside it stands what every process receives when all
pairs are sent to all, as TRL's trainers gather their rewards and the public code of SPO its latents.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere

from trl_spo.pair_queue import RowLayout, share_out


LATENTS = {  # shape and precision of one
    "SD1.5, 512 px, float16": ((4, 64, 64), torch.float16),
    "SDXL, 1024 px, float16": ((4, 128, 128), torch.float16),
    "SD3.5, FLUX.1, Qwen-Image, 1024 px, bfloat16": ((16, 128, 128), torch.bfloat16),
    "FLUX.2, 1024 px, bfloat16": ((128, 64, 64), torch.bfloat16),
}
WORLDS = (2, 8, 64, 512)


@dataclass(frozen=True)
class Sizes:
    """Of one process: what it rolls out in a round, and what it trains on between two optimizer steps."""

    prompts: int
    branches: int
    pairs_per_step: int


def bytes_of_a_pair(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Of the row that travels."""
    latents = ("latents", "chosen_prev_latents", "rejected_latents", "rejected_prev_latents")
    dtypes = dict.fromkeys(latents, dtype)
    dtypes |= {"shared": torch.bool, "timesteps": torch.int64, "prompt_index": torch.int64}
    dtypes |= {"chosen_scores": torch.float32, "rejected_scores": torch.float32}
    shapes = {name: shape if name in latents else () for name in dtypes}
    return sum(RowLayout(dtypes, shapes).widths)


def simulate(world: int, sizes: Sizes, rounds: int, seed: int = 0) -> dict[str, float]:
    """
    Rounds of rollouts of `world` processes.

    Returns:
        `dict[str, float]`: `found`, pairs per process and round; `travelled`, the fraction of all pairs that left their process;
        `most_received`, the pairs that the busiest process received in a round.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    found = 0
    travelled = 0
    most_received = 0
    for _ in range(rounds):
        # The larger of two uniform numbers is a Beta(2, 1).
        fractions = torch.rand(2, world, sizes.prompts, generator=generator).amax(0)
        valid = torch.rand(world, sizes.prompts, sizes.branches, generator=generator) < fractions[..., None]
        counts = valid.sum((1, 2))
        owners = torch.arange(world).repeat_interleave(counts)
        waiting = torch.cat([waiting, owners[torch.randperm(len(owners), generator=generator)]])
        found += len(owners)
        received = torch.zeros(world, dtype=torch.int64)
        step = sizes.pairs_per_step * world
        while len(waiting) >= step:
            trainers = share_out(waiting[:step], world)
            received += trainers[trainers != waiting[:step]].bincount(minlength=world)
            waiting = waiting[step:]
        travelled += int(received.sum())
        most_received = max(most_received, int(received.max()))
    return {"found": found / rounds / world, "travelled": travelled / found, "most_received": most_received}


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=10, help="prompts of a process in a round (default: 10)")
    parser.add_argument("--branches", type=int, default=16, help="branches of a prompt (default: 16)")
    parser.add_argument("--pairs_per_step", type=int, default=10, help="pairs of a process in a step (default: 10)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    sizes = Sizes(args.prompts, args.branches, args.pairs_per_step)
    results = {world: simulate(world, sizes, args.rounds) for world in WORLDS}
    print(
        "| processes | pairs found by each | of these travel | the busiest receives | if all got all, each would receive |"
    )
    print("|---|---|---|---|---|")
    for world, result in results.items():
        everything = result["found"] * (world - 1)
        print(
            f"| {world} | {result['found']:.0f} | {result['travelled']:.1%} | {result['most_received']} | {everything:,.0f} |"
        )
    print(
        "\n| latents | bytes of a pair | "
        + " | ".join(f"{world} processes, if all got all" for world in WORLDS)
        + " |"
    )
    print("|---|---|" + "---|" * len(WORLDS))
    for name, latents in LATENTS.items():
        size = bytes_of_a_pair(*latents)
        cells = []
        for world, result in results.items():
            mean = result["found"] * result["travelled"] * size / 1e6
            everything = result["found"] * (world - 1) * size / 1e6
            cells.append(f"{mean:,.1f} MB, {everything:,.0f} MB")
        print(f"| {name} | {size:,} | " + " | ".join(cells) + " |")
    if args.json:
        args.json.write_text(json.dumps({"sizes": vars(sizes), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
