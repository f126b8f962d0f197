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
The figures of the comparison, drawn from what `report.json` holds. A method has one colour in all of them; legends stand
beside the data, never on it.
"""

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.compare import run as study
from benchmarks.compare.evaluate import EXACT, interpolate
from examples.shapes import world


matplotlib.use("Agg")
import matplotlib.pyplot as plt


COLOURS = {
    "base": "#444444",
    "spo": "#1f77b4",
    "spo_mended": "#ff7f0e",
    "spo_published": "#e377c2",
    "spo_plain": "#bcbd22",
    "spo_clean": "#17becf",
    "spo_mixed": "#7f3b08",
    "spo_exact": "#2ca02c",
    "dpo": "#d62728",
    "ddpo": "#9467bd",
    "sft": "#8c564b",
    "spo_winner": "#6a3d9a",
    "spo_loser": "#006d2c",
    "spo_random_pair": "#fb8072",
    "spo_k2": "#74a9cf",
    "spo_k8": "#08306b",
    "spo_0_10": "#c51b8a",
    "spo_2_10": "#41ab5d",
    "spo_2_10_even": "#fe9929",
    "spo_4_8": "#800026",
    "spo_kl0": "#e6ab02",
    "spo_demo": "#999999",
}
REWARDS = {  # learned reward -> what it is, and the method whose colour it has
    "step": ("step-aware", "spo"),
    "plain": ("without step conditioning", "spo_plain"),
    "clean": ("trained on finished images", "spo_clean"),
    "all": ("step-aware, also at t = 801", "spo_0_10"),
}
CURVES = ("spo", "spo_clean", "spo_mended", "spo_exact", "dpo", "ddpo", "sft")
SHEET = ("spo", "spo_published", "spo_mended", "spo_exact", "dpo", "ddpo", "sft")
GROUPS = {
    "methods": ["spo", "spo_mended", "spo_published", "dpo", "ddpo", "sft"],
    "reward": ["spo", "spo_plain", "spo_clean", "spo_mixed", "spo_exact"],
    "what the next step starts from, which pair": ["spo", "spo_winner", "spo_loser", "spo_random_pair"],
    "number of candidates (K = 4 unless named)": ["spo_k2", "spo", "spo_k8"],
    "steps that branch": ["spo", "spo_0_10", "spo_2_10", "spo_4_8"],
    "timestep weights": ["spo", "spo_2_10", "spo_2_10_even"],
    "weight of the KL term": ["spo", "spo_kl0", "spo_demo"],
}
"""Arms that differ in one thing, for the figures with a panel each."""
SMALL = 8
LEGEND = {"fontsize": SMALL, "frameon": False}


def title_of(arm: str) -> str:
    """The name of a method in legends."""
    return "base model" if arm == "base" else study.ARMS[arm].title


def draw_all(data: dict, folder: Path, output: Path) -> list[str]:
    """
    Draw every figure for which there are numbers.

    Args:
        data (`dict`): what `report.json` holds.
        folder (`Path`): where the figures go.
        output (`Path`): what `run.py` wrote; its sample images are needed for `samples.png` only.

    Returns:
        `list[str]`: names of the files.
    """
    drawn = {
        "curves.png": draw_curves(data),
        "ablations.png": draw_ablations(data),
        "front.png": draw_fronts(data),
        "hacking.png": draw_hacking(data),
        "reward_accuracy.png": draw_accuracy(data["accuracy"]) if data["accuracy"] else None,
        "guidance.png": draw_guidance(data["guidance"]) if data["guidance"] else None,
    }
    names = []
    for name, figure in drawn.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=110)
            plt.close(figure)
            names.append(name)
    sheet = draw_sheet(output, data["curves"])
    if sheet is not None:
        sheet.save(folder / "samples.png")
        names.append("samples.png")
    return names


# --- curves ----------------------------------------------------------------------------------------------------------


def curves_of(data: dict, arm: str, score: str, compute: str = "evaluations") -> list[tuple[list[float], list[float]]]:
    """Validation curves of all seeds, from the base model on."""
    seeds = data["curves"][arm].values()
    return [([point[compute] for point in points], [point[score] for point in points]) for points in seeds]


def as_changes(curves: list[tuple[list[float], list[float]]]) -> list[tuple[list[float], list[float]]]:
    """The same curves as differences from their first value."""
    return [(x, [value - y[0] for value in y]) for x, y in curves]


def band(axis, curves: list[tuple[list[float], list[float]]], arm: str) -> None:
    """Mean over seeds and its standard error, as far as the curves of all seeds go."""
    longest = max(max(x) for x, _ in curves)
    shortest = min(max(x) for x, _ in curves)
    grid = [longest * k / 60 for k in range(61) if longest * k / 60 <= shortest]
    table = torch.tensor([[interpolate(x, y, at) for at in grid] for x, y in curves], dtype=torch.float64)
    mean = table.mean(0)
    axis.plot(grid, mean, color=COLOURS[arm], label=title_of(arm))
    if len(curves) > 1:
        error = table.std(0) / math.sqrt(len(curves))
        axis.fill_between(grid, mean - error, mean + error, color=COLOURS[arm], alpha=0.2, linewidth=0)


def in_thousands(axis) -> None:
    axis.xaxis.set_major_locator(plt.MaxNLocator(5))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")


def shared_legend(figure, axis, columns: int) -> None:
    """One legend for all panels, below them."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncol=columns, **LEGEND)


def draw_curves(data: dict):
    """Scores over compute, in both currencies: UNet evaluations and CPU time."""
    figure, axes = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
    for row, (compute, label) in enumerate((("evaluations", "UNet evaluations"), ("cpu_seconds", "CPU seconds"))):
        for axis, score in zip(axes[row], EXACT, strict=True):
            for arm in CURVES:
                if arm in data["curves"]:
                    band(axis, curves_of(data, arm, score, compute), arm)
            axis.set(xlabel=label, ylabel=f"{score}, validation captions")
            axis.grid(alpha=0.3)
            if compute == "evaluations":
                in_thousands(axis)
    shared_legend(figure, axes[0, 0], 4)
    figure.suptitle("Scores over compute, mean over training seeds ± standard error", fontsize=11)
    return figure


def panels(data: dict, draw: Callable, xlabel: str, ylabel: str, title: str):
    """A panel per group of methods that differ in one thing, each with its legend below it."""
    groups = {name: [arm for arm in arms if arm in data["curves"]] for name, arms in GROUPS.items()}
    groups = {name: arms for name, arms in groups.items() if arms}
    rows = math.ceil(len(groups) / 4)
    figure, axes = plt.subplots(rows, 4, figsize=(17, 5.6 * rows), squeeze=False, layout="constrained")
    used = axes.flat[: len(groups)]
    for axis, (name, arms) in zip(used, groups.items(), strict=True):
        for arm in arms:
            draw(axis, arm)
        axis.set(title=name, xlabel=xlabel, ylabel=ylabel)
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), **LEGEND)
    share_limits(used)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure


def share_limits(axes) -> None:
    """The same scales in all panels, each with its own numbers at them."""
    x = [limit for axis in axes for limit in axis.get_xlim()]
    y = [limit for axis in axes for limit in axis.get_ylim()]
    for axis in axes:
        axis.set(xlim=(min(x), max(x)), ylim=(min(y), max(y)))


def draw_ablations(data: dict):
    """Utility over compute, up to the common budget."""
    limit = 1.1 * data["plan"]["budget"]

    def draw(axis, arm):
        curves = []
        for x, y in as_changes(curves_of(data, arm, "utility")):
            count = sum(at <= limit for at in x)
            curves.append((x[:count], y[:count]))
        band(axis, curves, arm)
        in_thousands(axis)

    title = "Utility over compute: methods that differ in one thing, mean over training seeds ± standard error"
    return panels(data, draw, "UNet evaluations", "utility, change (validation captions)", title)


def draw_fronts(data: dict):
    """Alignment against aesthetics along the checkpoints."""

    def draw(axis, arm):
        path = []
        for score in ("aesthetics", "alignment"):
            changes = [y for _, y in as_changes(curves_of(data, arm, score))]
            path.append([sum(column) / len(column) for column in zip(*changes, strict=False)])
        axis.plot(*path, "o-", markersize=3, color=COLOURS[arm], label=title_of(arm))

    title = (
        "What a gain of aesthetics costs in alignment: checkpoints from the base model at (0, 0) on, mean over seeds"
    )
    return panels(data, draw, "aesthetics, change", "alignment, change (validation captions)", title)


def draw_hacking(data: dict):
    """Does the learned reward still rise while the exact utility falls?"""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    for axis, score in zip(axes, ("reward", "utility"), strict=True):
        for arm in CURVES:
            if arm in data["curves"]:
                band(axis, as_changes(curves_of(data, arm, score)), arm)
        name = "learned reward" if score == "reward" else "exact utility"
        axis.set(title=name, xlabel="UNet evaluations", ylabel=f"{name}, change (validation captions)")
        axis.grid(alpha=0.3)
        in_thousands(axis)
    shared_legend(figure, axes[0], 3)
    return figure


# --- rewards and guidance --------------------------------------------------------------------------------------------


def draw_accuracy(accuracy: dict):
    """How often the learned rewards order pairs correctly, by timestep."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), sharey=True, layout="constrained")
    titles = {"utility": "with the exact utility", "labels": "with the annotator's noisy labels"}
    for axis, (against, title) in zip(axes, titles.items(), strict=True):
        for shift, (kind, by_reference) in enumerate(accuracy.items()):
            label, arm = REWARDS[kind]
            values = by_reference[against]
            timesteps = [int(step) + 6 * shift for step in values]  # bars beside each other
            means = [value["mean"] for value in values.values()]
            errors = [value["se_pairs"] for value in values.values()]
            axis.errorbar(
                timesteps, means, errors, marker="o", markersize=3, capsize=2, color=COLOURS[arm], label=label
            )
        axis.axhline(0.5, color="#777777", linestyle=":", label="chance")
        axis.set(title=f"agreement {title}", xlabel="timestep (0: the finished image)")
        axis.set_ylabel("share of held-out pairs ordered alike")
        axis.tick_params(labelleft=True)
        axis.grid(alpha=0.3)
    shared_legend(figure, axes[0], 5)
    figure.suptitle(
        "Learned rewards on pairs of finished images, noised to each timestep; bars: standard error", fontsize=11
    )
    return figure


def draw_guidance(guidance: dict):
    """Scores over the guidance scale of sampling, with the base model for comparison."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 5), layout="constrained")
    for axis, metric in zip(axes, EXACT, strict=True):
        for arm, values in guidance.items():
            scales = [float(scale) for scale in values[metric]]
            means = [value["mean"] for value in values[metric].values()]
            errors = [value["se"] for value in values[metric].values()]
            axis.errorbar(
                scales, means, errors, marker="o", markersize=3, capsize=2, color=COLOURS[arm], label=title_of(arm)
            )
        axis.set(xlabel="guidance scale of sampling", ylabel=f"{metric}, held-out captions")
        axis.grid(alpha=0.3)
    shared_legend(figure, axes[0], 3)
    figure.suptitle("Scores over guidance; bars: standard error", fontsize=11)
    return figure


# --- samples ---------------------------------------------------------------------------------------------------------


def draw_sheet(output: Path, arms) -> Image.Image | None:
    """
    The same captions and noise under the methods of `SHEET`, a row each: the lowest seed at the common budget. `None`
    without the samples.
    """
    rows = [("base", output / "samples.png")]
    for arm in SHEET:
        seeds = sorted((output / "run" / arm).glob("*/final/samples.png"), key=lambda path: int(path.parts[-3]))
        rows += [(arm, seeds[0])] if arm in arms and seeds else []
    rows = [(arm, Image.open(path).convert("RGB")) for arm, path in rows if path.is_file()]
    if not rows:
        return None

    # Lay out the sheet: names at the left, captions on top.
    font = ImageFont.truetype(
        matplotlib.font_manager.findfont("DejaVu Sans"), 12, layout_engine=ImageFont.Layout.BASIC
    )
    scale = 3
    left, top, gap = 345, 66, 4
    width, height = rows[0][1].width * scale, rows[0][1].height * scale
    side = height  # of one image
    sheet = Image.new("RGB", (left + width, top + (height + gap) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(world.captions("heldout")[: width // side]):
        draw.multiline_text((left + column * side + 3, 4), in_lines(caption), font=font, fill="black", spacing=2)
    for row, (arm, strip) in enumerate(rows):
        y = top + row * (height + gap)
        draw.rectangle((8, y + height // 2 - 7, 22, y + height // 2 + 7), fill=COLOURS[arm])
        draw.text((30, y + height // 2 - 8), title_of(arm), font=font, fill="black")
        sheet.paste(strip.resize((width, height), Image.NEAREST), (left, y))
    return sheet


def in_lines(caption: str) -> str:
    """`a small red circle on a green background` -> `small red`, `circle on`, `green`, a word or two a line."""
    _, size, colour, shape, _, _, background, _ = caption.split()
    return f"{size}\n{colour} {shape}\non {background}"
