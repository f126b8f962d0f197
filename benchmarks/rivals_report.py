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
Tables and figures of the study of `rivals.py`, from the files that it left.

```shell
python benchmarks/rivals_report.py --output compare_output/rivals                             # tables, on the terminal
python benchmarks/rivals_report.py --output compare_output/rivals --page docs/results.md      # into the page, with its figures
```

With `--keep FOLDER` the numbers are copied there, five digits each, without weights; tables and curves can be made again from them.
With `--page` the tables between `<!-- table NAME -->` and `<!-- end -->` are replaced, and the figures go to `images/rivals`
beside the page. Scores are differences to the base model on the same captions and noise, with standard errors over captions
and training seeds as crossed random effects.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere

from benchmarks.compare.evaluate import compute_to_reach, interpolate, two_way
from benchmarks.compare.figures import in_lines
from benchmarks.compare.report import fill_page, markdown
from benchmarks.compare.tasks import read_json, write_json
from benchmarks.latent_rewards import load
from benchmarks.rivals import ARMS, FURTHER_ARMS, METHODS, REWARD_CHECKS, STRETCHED_SEEDS, SWEEPS
from examples.shapes.base_scores import evaluation_set
from examples.shapes.settings import SAMPLER
from trl_spo.images import to_pil
from trl_spo.sampling import generate_images


matplotlib.use("Agg")
import matplotlib.pyplot as plt


MODELS = {"flow": "flow-matching model", "unet": "UNet"}
METRICS = ("utility", "aesthetics", "alignment")
COLOURS = {
    "spo": "#1f77b4",
    "lpo": "#17becf",
    "dpo": "#d62728",
    "nft": "#ff7f0e",
    "grpo": "#9467bd",
    "ddpo": "#7f7f7f",
    "sft": "#8c564b",
}
OURS = ("spo", "lpo")
LOWEST = -0.06  # change that figures show; a method that collapses leaves them
SHOWN = 10  # samples in a row of the sheet


class Study:
    """
    What a folder holds of one model.

    Attributes:
        base (`dict`): scores of the base model, by split and metric, a list over captions.
        runs (`dict[str, list[dict]]`): by arm, in the order of seeds.
        further (`dict[str, list[dict]]`): the same of those that differ from an arm in one setting.
        sweeps (`dict[str, list[dict | None]]`): by method, the trials.
        checks (`dict[str, dict]`): what each reward came to.
    """

    def __init__(self, output: Path, model: str):
        self.folder = output / model
        self.model = model
        self.base = read_json(self.folder / "base.json")
        self.runs, self.further = {}, {}
        for arm in (*ARMS, *FURTHER_ARMS):
            paths = sorted((self.folder / "run" / arm).glob("*.json"), key=lambda path: int(path.stem))
            if paths:
                (self.runs if arm in ARMS else self.further)[arm] = [read_json(path) for path in paths]
        self.sweeps = {
            method: [self._read(f"sweep/{method}/{i}") for i in range(len(t))] for method, t in SWEEPS.items()
        }
        checks = {name: self._read(f"check/{name}/0") for name in REWARD_CHECKS}
        self.checks = {name: result for name, result in checks.items() if result}

    def _read(self, task: str) -> dict | None:
        path = self.folder / f"{task}.json"
        return read_json(path) if path.is_file() else None

    def base_mean(self, metric: str, split: str = "validation") -> float:
        return sum(self.base[split][metric]) / len(self.base[split][metric])

    def runs_of(self, arm: str, checkpoint: str) -> list[dict]:
        """The runs that a table is about: for equal CPU time those of seeds that went on for so long."""
        runs = {**self.runs, **self.further}[arm]
        if checkpoint == "best":
            return runs
        return [run for run in runs if run["seed"] in STRETCHED_SEEDS]

    def change(self, arm: str, split: str, checkpoint: str, metric: str) -> torch.Tensor:
        """Differences to the base model `(seeds, captions)`, float64."""
        values = [run[split][checkpoint][metric] for run in self.runs_of(arm, checkpoint)]
        return torch.tensor(values, dtype=torch.float64) - torch.tensor(self.base[split][metric], dtype=torch.float64)

    def against(self, arm: str, other: str, split: str, checkpoint: str, metric: str) -> dict:
        """Difference of two arms, paired by training seed, caption and noise; seeds that both have."""
        own, their = (self.by_seed(name, split, checkpoint, metric) for name in (arm, other))
        return two_way(torch.stack([own[seed] - their[seed] for seed in sorted(own.keys() & their.keys())]))

    def by_seed(self, arm: str, split: str, checkpoint: str, metric: str) -> dict[int, torch.Tensor]:
        """Differences to the base model over captions, by training seed."""
        seeds = [run["seed"] for run in self.runs_of(arm, checkpoint)]
        return dict(zip(seeds, self.change(arm, split, checkpoint, metric), strict=True))


def cell(found: dict) -> str:
    return f"{found['mean']:+.3f} ± {found['se']:.3f}"


def settings_text(settings: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


# --- tables ----------------------------------------------------------------------------------------------------------


def main_table(study: Study, split: str, checkpoint: str) -> str:
    """Changes of all arms, how much the samples of a caption differ, and what it cost."""
    rows = []
    for arm in study.runs:
        runs = study.runs_of(arm, checkpoint)
        cells = [ARMS[arm].title, str(len(runs))]
        cells += [cell(two_way(study.change(arm, split, checkpoint, metric))) for metric in METRICS]
        change = study.change(arm, split, checkpoint, "diversity") / study.base_mean("diversity", split)
        cells.append(f"{change.mean().item():+.0%}")
        points = [run["points"][run[checkpoint]] for run in runs]
        cells += [
            f"{sum(point[unit] for point in points) / len(points):,.0f}" for unit in ("evaluations", "cpu_seconds")
        ]
        rows.append(cells)
    return markdown(["", "seeds", *METRICS, "diversity", "evaluations", "CPU seconds"], rows)


def against_table(study: Study, split: str, checkpoint: str) -> str:
    """Our methods against every rival, paired, also in standard errors."""
    rows = []
    for arm, rival in itertools.product(OURS, study.runs):
        if arm not in study.runs or ARMS[rival].method in OURS:
            continue
        found = study.against(arm, rival, split, checkpoint, "utility")
        cells = [f"{ARMS[arm].title}, less {ARMS[rival].title}", str(found["seeds"])]
        cells += [cell(study.against(arm, rival, split, checkpoint, metric)) for metric in METRICS]
        rows.append([*cells, f"{found['low']:+.3f} to {found['high']:+.3f}", f"{found['mean'] / found['se']:+.1f}"])
    return markdown(["", "seeds", *METRICS, "95% interval of utility", "standard errors"], rows)


def further_table(study: Study) -> str:
    """Arms against the one that they differ from in one setting, on both sets of captions, paired."""
    rows = []
    for arm in study.further:
        method = FURTHER_ARMS[arm].method
        for split in ("untouched", "heldout"):
            found = study.against(arm, method, split, "best", "utility")
            cells = [f"{FURTHER_ARMS[arm].title}, less {ARMS[method].title}", split, str(found["seeds"])]
            cells += [cell(study.against(arm, method, split, "best", metric)) for metric in METRICS]
            rows.append([*cells, f"{found['low']:+.3f} to {found['high']:+.3f}"])
    return markdown(["", "captions", "seeds", *METRICS, "95% interval of utility"], rows)


def reach_table(study: Study) -> str:
    """
    What SPO needs for the best that each rival has on validation captions, where the mean over its seeds is highest. A rival that
    never leaves the base model has no row.
    """
    rows = []
    for rival in study.runs:
        if rival in OURS or "spo" not in study.runs:
            continue
        cells = [ARMS[rival].title]
        for unit, form in (("evaluations", ",.0f"), ("cpu_seconds", ".0f")):
            own, theirs = (curves_of(study, arm, unit) for arm in ("spo", rival))
            where, best = highest_mean(theirs)
            found = compute_to_reach(own, theirs, where)
            needed = []
            for name in ("compute", "low", "high"):
                needed.append(format(found[name], form) if math.isfinite(found[name]) else "never")
            cells += [f"{best:+.3f}"] if unit == "evaluations" else []
            cells += [format(where, form), f"{needed[0]} ({needed[1]} to {needed[2]})"]
        if best > 0:
            rows.append(cells)
    columns = ["evaluations it takes", "evaluations SPO takes", "its CPU seconds", "SPO's CPU seconds"]
    return markdown(["rival", "its best utility", *columns], rows)


def highest_mean(curves: list[tuple[list[float], list[float]]]) -> tuple[float, float]:
    """Where the mean of curves is highest, as far as all go, and how high."""
    longest = min(x[-1] for x, _ in curves)
    places = [longest * k / 60 for k in range(61)]
    means = [sum(interpolate(x, y, at) for x, y in curves) / len(curves) for at in places]
    best = max(range(len(places)), key=means.__getitem__)
    return places[best], means[best]


def sweep_table(study: Study) -> str:
    """Validation scores of the best checkpoint of every trial."""
    rows = []
    for method, trials in SWEEPS.items():
        found = [trial["points"][trial["best"]]["utility"] if trial else -math.inf for trial in study.sweeps[method]]
        for changes, trial, utility in zip(trials, study.sweeps[method], found, strict=True):
            if trial is None:
                continue
            point = trial["points"][trial["best"]]
            cells = [METHODS[method][0], settings_text(changes)]
            cells += [f"{point[name] - study.base_mean(name):+.3f}" for name in METRICS]
            rows.append([*cells, f"{point['evaluations']:,.0f}", "chosen" if utility == max(found) else ""])
    return markdown(["method", "settings", *METRICS, "evaluations", ""], rows)


def check_table(study: Study) -> str:
    """SPO with one setting and different rewards: its best checkpoint, and its last."""
    rows = []
    for name, result in study.checks.items():
        cells = [REWARD_CHECKS[name]]
        for index in (result["best"], len(result["points"]) - 1):
            point = result["points"][index]
            cells += [f"{point[metric] - study.base_mean(metric):+.3f}" for metric in METRICS]
        rows.append(cells)
    return markdown(["reward", *METRICS, *(f"{metric}, last" for metric in METRICS)], rows)


def tables_of(study: Study) -> dict[str, str]:
    """All tables for which there are results, by their names on the page."""
    found = {f"sweep_{study.model}": sweep_table(study)}
    if study.checks:
        found[f"rewards_{study.model}"] = check_table(study)
    if study.runs:
        for split in ("untouched", "heldout"):
            found[f"{split}_{study.model}"] = main_table(study, split, "best")
        found[f"time_{study.model}"] = main_table(study, "untouched", "best_of_time")
        found[f"against_{study.model}"] = against_table(study, "untouched", "best")
        found[f"reach_{study.model}"] = reach_table(study)
        if study.further:
            found[f"further_{study.model}"] = further_table(study)
        found[f"against_time_{study.model}"] = against_table(study, "untouched", "best_of_time")
    return found


# --- figures ---------------------------------------------------------------------------------------------------------


def curves_of(study: Study, arm: str, unit: str, metric: str = "utility") -> list[tuple[list[float], list[float]]]:
    """Changes on validation captions over compute, from the base model on; one curve per seed."""
    base = study.base_mean(metric)
    curves = []
    for run in study.runs[arm]:
        x = [0.0, *(point[unit] for point in run["points"])]
        curves.append((x, [0.0, *(point[metric] - base for point in run["points"])]))
    return curves


def draw_band(axis, curves, colour: str, label: str) -> None:
    """Mean over seeds and its standard error, as far as all curves go."""
    longest = min(x[-1] for x, _ in curves)
    grid = [longest * k / 60 for k in range(61)]
    table = torch.tensor([[interpolate(x, y, at) for at in grid] for x, y in curves], dtype=torch.float64)
    axis.plot(grid, table.mean(0), color=colour, label=label)
    if len(curves) > 1:
        error = table.std(0) / math.sqrt(len(curves))
        axis.fill_between(grid, table.mean(0) - error, table.mean(0) + error, color=colour, alpha=0.2, linewidth=0)


def shared_legend(figure, axes) -> None:
    """One legend for all panels, below them, each method once."""
    entries = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries, loc="outside lower center", ncol=4, fontsize=9, frameon=False)


def draw_curves(studies: list[Study]):
    """Utility over evaluations and over CPU time, a row per model."""
    units = {"evaluations": "evaluations of the denoiser (backward: 2)", "cpu_seconds": "CPU seconds of one core"}
    figure, axes = plt.subplots(len(studies), 2, figsize=(11, 4.2 * len(studies)), squeeze=False, layout="constrained")
    for row, study in zip(axes, studies, strict=True):
        for axis, (unit, label) in zip(row, units.items(), strict=True):
            for arm in study.runs:
                draw_band(axis, curves_of(study, arm, unit), COLOURS[arm], ARMS[arm].title)
            axis.axhline(0, color="#444444", linewidth=0.8)
            axis.set(title=MODELS[study.model], xlabel=label, ylabel="utility, change (validation captions)")
            axis.set_ylim(bottom=LOWEST)
            axis.grid(alpha=0.3)
    shared_legend(figure, axes.flat)
    return figure


def draw_fronts(studies: list[Study]):
    """Aesthetics against alignment on the way, mean over seeds, and where the measured checkpoints of each seed lie."""
    figure, axes = plt.subplots(1, len(studies), figsize=(6 * len(studies), 5.2), squeeze=False, layout="constrained")
    for axis, study in zip(axes[0], studies, strict=True):
        for arm in study.runs:
            path = []
            for metric in ("aesthetics", "alignment"):
                columns = zip(*(y for _, y in curves_of(study, arm, "evaluations", metric)), strict=False)
                path.append([sum(column) / len(column) for column in columns])
            axis.plot(*path, "-", color=COLOURS[arm], linewidth=1, alpha=0.7)
            points = [study.change(arm, "untouched", "best", metric).mean(1) for metric in ("aesthetics", "alignment")]
            axis.plot(*points, "o", markersize=5, color=COLOURS[arm], label=ARMS[arm].title)
        axis.axhline(0, color="#444444", linewidth=0.8)
        axis.set(title=MODELS[study.model], xlabel="aesthetics, change", ylabel="alignment, change")
        axis.set_ylim(2 * LOWEST, -LOWEST)
        axis.grid(alpha=0.3)
    shared_legend(figure, axes.flat)
    title = "Lines: validation captions, from the base model on.\nDots: untouched captions, one per seed."
    figure.suptitle(title, fontsize=10)
    return figure


def draw_samples(study: Study) -> Image.Image:
    """The same captions and noise under the base model and every arm's first seed, a row each, captions on top."""
    prompts, seeds = (values[:SHOWN] for values in evaluation_set("untouched", 1))
    rows = {"base": generate_images(load(study.model), prompts, seeds=seeds, **SAMPLER)}
    for arm, runs in study.runs.items():
        pipeline = load(study.model)
        pipeline.sd_pipeline.load_lora_weights(str(study.folder / "run" / arm / str(runs[0]["seed"])))
        rows[arm] = generate_images(pipeline, prompts, seeds=seeds, **SAMPLER)

    # Names stand at the left, captions on top.
    font = ImageFont.truetype(
        matplotlib.font_manager.findfont("DejaVu Sans"), 12, layout_engine=ImageFont.Layout.BASIC
    )
    side, left, top, gap = 96, 150, 66, 4
    sheet = Image.new("RGB", (left + side * SHOWN, top + (side + gap) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        draw.multiline_text((left + column * side + 3, 4), in_lines(prompt), font=font, fill="black", spacing=2)
    for row, (arm, images) in enumerate(rows.items()):
        y = top + row * (side + gap)
        draw.rectangle((8, y + side // 2 - 7, 22, y + side // 2 + 7), fill=COLOURS.get(arm, "#444444"))
        name = "base model" if arm == "base" else ARMS[arm].title
        draw.text((30, y + side // 2 - 8), name, font=font, fill="black")
        strip = to_pil(torch.cat(list(images), 2))
        sheet.paste(strip.resize((side * SHOWN, side), Image.NEAREST), (left, y))
    return sheet


def rounded(value):
    """The same JSON with five digits after the point."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return value


def keep(output: Path, folder: Path) -> None:
    """Copies the results of all tasks, rounded; nothing of the weights and pairs beside them."""
    for model in MODELS:
        for pattern in ("base.json", *(f"{kind}/*/*.json" for kind in ("sweep", "check", "run", "reward"))):
            for path in (output / model).glob(pattern):
                write_json(folder / path.relative_to(output), rounded(read_json(path)))


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("compare_output/rivals"), help="What rivals.py wrote.")
    parser.add_argument("--page", type=Path, help="A Markdown page whose tables and figures are replaced.")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="Copy the numbers to this folder.")
    args = parser.parse_args(argv)
    if args.keep is not None:
        keep(args.output, args.keep)
    studies = [Study(args.output, model) for model in MODELS if (args.output / model / "base.json").is_file()]
    if not studies:
        raise SystemExit(f"{args.output} has no base.json of a model: run benchmarks/rivals.py first.")
    tables = {}
    for study in studies:
        tables |= tables_of(study)
    if args.page is None:
        print("\n\n".join(f"{name}\n\n{table}" for name, table in tables.items()))
        return
    args.page.write_text(fill_page(args.page.read_text(), tables))
    folder = args.page.parent / "images" / "rivals"
    folder.mkdir(parents=True, exist_ok=True)
    measured = [study for study in studies if study.runs]
    for name, draw in {"curves.png": draw_curves, "front.png": draw_fronts}.items():
        if measured:
            figure = draw(measured)
            figure.savefig(folder / name, dpi=110)
            plt.close(figure)
    for study in measured:
        if (study.folder / "run" / "spo").is_dir() and list((study.folder / "run").glob("*/*/*.safetensors")):
            draw_samples(study).save(folder / f"samples_{study.model}.png")


if __name__ == "__main__":
    main()
