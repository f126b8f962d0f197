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
Seconds per pair by phase, one stacked bar per arm, from the JSON files of `throughput.py`.

```shell
python benchmarks/plot_throughput.py sd15.json --output docs/images/throughput.png
```

On top of a bar stand the seconds per pair of the whole loop. On a GPU they come from the run without hooks, and the bar,
whose phases wait for each other, is a little higher. Below a bar stands the peak of memory. Files of another
preset, device, precision or number of threads get a panel of their own, and speeds are relative to its first bar.
"""

import argparse
import json
import textwrap
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt


PHASES = {  # in the order of the loop, from the bottom up: the rollout in cold colours, training in warm ones
    "unet_rollout": ("rollout: UNet", "#332288"),
    "vae_decode": ("rollout: VAE decoder", "#4477aa"),
    "reward": ("rollout: reward, images", "#66ccee"),
    "reward_text": ("rollout: reward, text", "#117733"),
    "policy_forward": ("training: policy forward", "#ddaa33"),
    "policy_backward": ("training: policy backward", "#cc6644"),
    "reference_forward": ("training: reference forward", "#882255"),
    "other": ("other", "#bbbbbb"),
}


PRESETS = {  # of `models.py`, in words
    "tiny": "tiny networks",
    "mid": "mid-sized networks of 41M parameters in the UNet",
    "sd15": "Stable Diffusion 1.5",
    "sdxl": "Stable Diffusion XL",
}


def conditions(result: dict) -> tuple:
    """What files must share for their bars to stand side by side: preset, hardware, precision, threads."""
    hardware = result.get("versions", {}).get("gpu", result.get("device"))
    hardware = "on the CPU" if hardware == "cpu" else hardware
    threads = result.get("threads") if result.get("device") == "cpu" else None
    threads = f"{threads} thread{'s' if threads > 1 else ''}" if threads else None
    return PRESETS.get(result.get("preset"), result.get("preset")), hardware, result.get("dtype"), threads


def read_arms(paths: list[Path]) -> list[dict]:
    """All arms of the files, with the conditions of their file; one without a label is named after its file."""
    arms = []
    for path in paths:
        result = json.loads(path.read_text())
        if "seconds" not in result or "num_pairs" not in result:
            raise SystemExit(f"{path} is no result of throughput.py: it has no `seconds` and `num_pairs`.")
        found = result.get("arms") or [{"label": path.stem, **result}]
        several = len(paths) > 1 and "arms" in result
        for arm in found:
            label = f"{path.stem}: {arm['label']}" if several else arm["label"]
            arms.append({**arm, "label": label, "conditions": conditions(result)})
    return arms


def plot(arms: list[dict], output: Path) -> None:
    """Draw the bars, those under other conditions in a panel of their own, and write them to `output`."""
    panels = {}
    for arm in arms:
        panels.setdefault(arm["conditions"], []).append(arm)
    widths = [max(2, len(group)) for group in panels.values()]
    figure, all_axes = plt.subplots(
        1,
        len(panels),
        figsize=(max(6.5, 3.2 + 1.5 * sum(widths) + 0.5 * len(panels)), 5),
        layout="constrained",
        squeeze=False,
        width_ratios=widths,
    )
    for axes, (key, group) in zip(all_axes[0], panels.items(), strict=True):
        draw_panel(axes, group)
        axes.set_title(
            textwrap.fill(", ".join(str(part) for part in key if part), 13 * max(2, len(group))), fontsize=10
        )
    all_axes[0][0].set_ylabel("seconds per pair")
    figure.suptitle("Time to make one pair and train on it, by phase; compared with the first bar")
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    plt.close(figure)


def draw_panel(axes, arms: list[dict]) -> None:
    """Bars of one preset and machine; speeds are relative to the first."""
    totals = [1 / arm["pairs_per_second"] for arm in arms]
    bottoms = [0.0] * len(arms)
    for phase, (label, colour) in PHASES.items():
        heights = [arm["seconds"].get(phase, 0.0) / arm["num_pairs"] for arm in arms]
        axes.bar(range(len(arms)), heights, 0.62, bottoms, color=colour, label=label, edgecolor="white", linewidth=0.4)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for i, (total, top) in enumerate(zip(totals, bottoms, strict=True)):
        text = f"{total:.3g} s" if i == 0 else f"{total:.3g} s\n{in_words(totals[0] / total)}"
        axes.annotate(text, (i, top), (0, 4), textcoords="offset points", ha="center", va="bottom")
    names = [textwrap.fill(arm["label"], 18) + f"\npeak {arm['peak_memory_mib']:,.0f} MiB" for arm in arms]
    axes.set_xticks(range(len(arms)), names)
    axes.set_xlim(-0.6, len(arms) - 0.4)
    axes.set_ylim(0, 1.15 * max(*bottoms, *totals))
    axes.spines[["top", "right"]].set_visible(False)


def in_words(ratio: float) -> str:
    """How the speed compares with that of the first bar."""
    if ratio < 1:
        return f"{1 / ratio:.2g} times as long"
    return f"{ratio:.2g} times as fast"


def main():
    parser = argparse.ArgumentParser(description="Seconds per pair by phase, one stacked bar per arm.")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json", help="files of throughput.py")
    parser.add_argument("--output", type=Path, default=Path("docs/images/throughput.png"))
    arguments = parser.parse_args()
    plot(read_arms(arguments.results), arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
