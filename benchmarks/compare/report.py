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
Tables and figures of the comparison from the JSON files that `run.py` left; trains and samples nothing.

```shell
python benchmarks/compare/report.py --output compare_output
python benchmarks/compare/report.py --output compare_output --report benchmarks/results/compare --page docs/ablations.md
python benchmarks/compare/report.py --figures benchmarks/results/compare/report.json --page docs/ablations.md
```

Writes `report.md`, `report.json` (every number of it) and the figures. What is missing is left out and named. With `--page`
the tables replace those between `<!-- table NAME -->` and `<!-- end -->` of a page, the figures go to `images/compare`
beside it, and `report.md` is not kept. With `--figures` the figures are drawn again from a `report.json` alone, all but
the sheet of samples, and no table is changed.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # not this folder: its modules would hide others

import torch

from benchmarks.compare import figures
from benchmarks.compare import run as study
from benchmarks.compare.evaluate import EXACT, compute_to_reach, interpolate, two_way
from benchmarks.compare.tasks import read_json


NAN = float("nan")
REFERENCE = "spo"
RIVAL = "dpo"
GAINS = (0.02, 0.04, 0.06, 0.08)


class Results:
    """
    Everything in an output folder.

    Attributes:
        plan (`dict`), base (`dict`): of the study.
        runs (`dict[str, dict[int, dict]]`): by arm and seed.
        missing (`list[str]`): arms of the study without a run.
    """

    def __init__(self, output: Path):
        self.output = output
        if not (output / "base.json").is_file():
            raise FileNotFoundError(f"{output} has no base.json: run benchmarks/compare/run.py first.")
        self.base = read_json(output / "base.json")
        self.plan = self.base["plan"]
        self.runs = {}
        self.missing = []
        for arm in study.ARMS:
            found = sorted((output / "run" / arm).glob("*.json"), key=lambda path: int(path.stem))
            if found:
                self.runs[arm] = {int(path.stem): read_json(path) for path in found}
            else:
                self.missing.append(arm)
        self.rewards = {}
        for kind in study.LEARNED_REWARDS:
            for path in sorted((output / "reward" / kind).glob("*.json")):
                self.rewards.setdefault(kind, {})[int(path.stem)] = read_json(path)
        self.guidance = {}
        for path in sorted((output / "guidance").glob("*/*.json")):
            self.guidance.setdefault(path.parent.name, {})[int(path.stem)] = read_json(path)

    def heldout(self, arm: str, seed: int, pick: str, metric: str) -> torch.Tensor:
        """`(C, R)` scores of a run."""
        return torch.tensor(self.runs[arm][seed]["heldout"][pick][metric], dtype=torch.float64)

    def base_heldout(self, arm: str, seed: int, metric: str) -> torch.Tensor:
        if metric == "reward":
            return torch.tensor(self.runs[arm][seed]["heldout"]["base_reward"], dtype=torch.float64)
        return torch.tensor(self.base["scores"]["heldout"][metric], dtype=torch.float64)

    def seeds(self, arm: str, pick: str) -> list[int]:
        return [seed for seed, result in self.runs[arm].items() if pick in result["heldout"]]

    def change(self, arm: str, pick: str, metric: str) -> dict:
        """Paired change against the base model, with its error over captions and seeds."""
        rows = [
            (self.heldout(arm, seed, pick, metric) - self.base_heldout(arm, seed, metric)).mean(1)
            for seed in self.seeds(arm, pick)
        ]
        return two_way(torch.stack(rows))

    def wins(self, arm: str, pick: str, metric: str) -> dict:
        """Share of samples that beat the base model's of the same noise; a draw counts one half."""
        seeds = self.seeds(arm, pick)
        return two_way(
            torch.stack(
                [_wins(self.heldout(arm, seed, pick, metric), self.base_heldout(arm, seed, metric)) for seed in seeds]
            )
        )

    def wins_against(self, arm: str, other: str, pick: str, metric: str) -> dict:
        """Share of samples that beat those of another arm's run with the same seed."""
        both = [seed for seed in self.seeds(arm, pick) if seed in self.seeds(other, pick)]
        return two_way(
            torch.stack(
                [_wins(self.heldout(arm, s, pick, metric), self.heldout(other, s, pick, metric)) for s in both]
            )
        )

    def diversity(self, arm: str, pick: str, metric: str) -> dict | None:
        """Change of the mean pairwise distance of one caption's samples against the base model's, as a share of it."""
        base = self.base["scores"]["heldout"].get(metric)
        if base is None:
            return None
        base = torch.tensor(base, dtype=torch.float64)
        rows = [
            (torch.tensor(self.runs[arm][seed]["heldout"][pick][metric], dtype=torch.float64) - base) / base.mean()
            for seed in self.seeds(arm, pick)
        ]
        return two_way(torch.stack(rows))

    def against(self, arm: str, other: str, pick: str, metric: str) -> dict | None:
        """Difference of two arms, paired by seed, caption and noise."""
        both = [seed for seed in self.seeds(arm, pick) if seed in self.seeds(other, pick)]
        if not both:
            return None
        rows = [(self.heldout(arm, s, pick, metric) - self.heldout(other, s, pick, metric)).mean(1) for s in both]
        return two_way(torch.stack(rows))

    def curves(self, arm: str, score: str, compute: str = "evaluations") -> list[tuple[list[float], list[float]]]:
        """Validation curves of all seeds, from the base model on."""
        result = []
        for run in self.runs[arm].values():
            points = [run["base"], *run["points"]]
            result.append(([p[compute] for p in points], [p[score] for p in points]))
        return result

    def own_cost(self, arm: str, name: str) -> float:
        """What the reward model of an arm cost (mean over seeds); 0 without one, or with the exact scorer."""
        kind = {"mixed": "step"}.get(study.ARMS[arm].reward, study.ARMS[arm].reward)
        costs = [reward[name] for reward in self.rewards.get(kind, {}).values()]
        return sum(costs) / len(costs) if costs else 0.0

    def final_cost(self, arm: str, name: str) -> float:
        """Mean over seeds of what a run had spent at the common budget."""
        values = []
        for run in self.runs[arm].values():
            values += [point[name] for point in run["points"] if point["mark"] == run["picks"]["final"]]
        return sum(values) / len(values)


def _wins(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:  # (C, R) twice -> (C,)
    return ((own > other).double() + 0.5 * (own == other).double()).mean(1)


# ------------------------------------------------------------------------------------------------------------- tables


def cell(value: dict | None, sign: str = "+", digits: int = 3) -> str:
    if value is None:
        return ""
    mark = "*" if value["seeds"] == 1 else ""  # error over captions only
    return f"{value['mean']:{sign}.{digits}f} ± {value['se']:.{digits}f}{mark}"


def number(value: float, digits: int = 0) -> str:
    return "never" if math.isinf(value) else "" if math.isnan(value) else f"{value:,.{digits}f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def main_table(results: Results, pick: str) -> tuple[str, dict]:
    data = {}
    rows = []
    for arm in results.runs:
        if not results.seeds(arm, pick):
            continue
        values = {metric: results.change(arm, pick, metric) for metric in (*EXACT, "reward")}
        values["wins"] = results.wins(arm, pick, "utility")
        values["diversity"] = results.diversity(arm, pick, "diversity")
        values["latent_diversity"] = results.diversity(arm, pick, "latent_diversity")
        data[arm] = values
        rows.append(
            [
                study.ARMS[arm].title,
                str(values["utility"]["seeds"]),
                *(cell(values[metric]) for metric in EXACT),
                cell(values["wins"], sign="", digits=2),
                cell(values["reward"], digits=2),
                cell(values["diversity"], digits=2),
                cell(values["latent_diversity"], digits=2),
            ]
        )
    head = ["method", "seeds", *EXACT, "win rate", "learned reward", "diversity of images", "of latents"]
    return markdown(head, rows), data


def cost_table(results: Results) -> tuple[str, dict]:
    data = {}
    rows = []
    for arm in results.runs:
        values = {name: results.final_cost(arm, name) for name in ("evaluations", "cpu_seconds", "updates")}
        values["reward_evaluations"] = results.own_cost(arm, "evaluations")
        values["reward_cpu_seconds"] = results.own_cost(arm, "cpu_seconds")
        settings = next(iter(results.runs[arm].values()))["settings"]
        values["settings"] = settings
        totals = [run["total_seconds"] for run in results.runs[arm].values()]
        values["total_cpu_seconds"], values["total_wall_seconds"] = (
            sum(t) / len(t) for t in zip(*totals, strict=True)
        )
        data[arm] = values
        names = ("evaluations", "reward_evaluations", "cpu_seconds", "reward_cpu_seconds", "updates")
        rows.append([study.ARMS[arm].title, *(number(values[name]) for name in names)])
    head = ["method", "UNet evaluations", "reward model: evaluations", "CPU s", "reward model: CPU s", "updates"]
    return markdown(head, rows), data


def against_table(results: Results, other: str, pick: str) -> tuple[str, dict]:
    data = {}
    rows = []
    for arm in results.runs:
        if arm == other or other not in results.runs:
            continue
        values = {metric: results.against(arm, other, pick, metric) for metric in EXACT}
        if values["utility"] is None:
            continue
        data[arm] = values
        values["wins"] = results.wins_against(arm, other, pick, "utility")
        interval = "[{low:+.3f}, {high:+.3f}]".format(**values["utility"])
        cells = [*(cell(values[metric]) for metric in EXACT), interval, cell(values["wins"], sign="", digits=2)]
        rows.append([study.ARMS[arm].title, *cells])
    return markdown(["method", *EXACT, "95% interval of utility", "win rate (utility)"], rows), data


def reach_table(results: Results) -> tuple[str, dict]:
    """The "20x" question."""
    if RIVAL not in results.runs:
        return "", {}
    data = {}
    rows = []
    budgets = {name: results.final_cost(RIVAL, name) for name in ("evaluations", "cpu_seconds")}
    for arm in results.runs:
        if arm == RIVAL:
            continue
        row = [study.ARMS[arm].title]
        for score in ("utility", "aesthetics"):
            for compute, budget in budgets.items():
                curves, rivals = (results.curves(name, score, compute) for name in (arm, RIVAL))
                value = compute_to_reach(curves, rivals, budget)
                extra = results.own_cost(arm, compute)
                value["ratio_with_reward"] = budget / (value["compute"] + extra)
                data.setdefault(arm, {})[f"{score}/{compute}"] = value
                text = number(value["compute"])
                if math.isfinite(value["compute"]):
                    low = value["ratio_low"]
                    high = value["ratio_high"]
                    ratio = value["ratio"]
                    text += f": {ratio:.1f}x ({low:.1f} to {high:.1f}; {value['ratio_with_reward']:.1f}x)"
                row.append(text)
        rows.append(row)
    head = ["method"]
    head += [f"{s}, {c}" for s in ("utility", "aesthetics") for c in ("UNet evaluations", "CPU seconds")]
    return markdown(head, rows), data


def equal_time_table(results: Results) -> tuple[str, dict]:
    """
    Validation scores at one CPU time: the shortest that a run of SPO took for the budget, and that with the training of a
    step-aware reward model. In the second, runs with a learned reward have so much less for themselves.
    """
    if REFERENCE not in results.runs:
        return "", {}
    # The two limits: a run of SPO alone, and with the training of its reward model.
    alone = min(
        point["cpu_seconds"]
        for arm, runs in results.runs.items()
        for run in runs.values()
        for point in run["points"]
        if study.ARMS[arm].method == "spo" and point["mark"] == run["picks"]["final"]
    )
    limits = {"alone": alone, "with the reward model": alone + results.own_cost(REFERENCE, "cpu_seconds")}

    # Read every run's curve at both limits.
    data = {"cpu_seconds": limits}
    rows = []
    for arm in results.runs:
        row = [study.ARMS[arm].title]
        data[arm] = {}
        for name, limit in limits.items():
            own = limit - results.own_cost(arm, "cpu_seconds") if name != "alone" else limit
            for score in EXACT:
                values = [interpolate(x, y, own) - y[0] for x, y in results.curves(arm, score, "cpu_seconds")]
                values = torch.tensor([value for value in values if not math.isnan(value)], dtype=torch.float64)
                if len(values) < len(results.runs[arm]):  # some seed was not trained for so long
                    row.append("")
                    continue
                error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else NAN
                found = {"mean": values.mean().item(), "se_seeds": error, "seeds": len(values)}
                data[arm].setdefault(name, {})[score] = found
                row.append(f"{values.mean():+.3f}" + (f" ± {error:.3f}" if len(values) > 1 else ""))
        rows.append(row)
    head = ["method", *(f"{score}, {limit:.0f} s" for limit in limits.values() for score in EXACT)]
    text = (
        "Change on validation captions; standard error over seeds. First the CPU time of SPO alone, then with the training of "
        "its reward model. Empty: not trained for so long."
    )
    return f"{text}\n\n{markdown(head, rows)}", data


def front_table(results: Results) -> tuple[str, dict]:
    """What each arm pays in alignment for the same gain of aesthetics, along its checkpoints."""
    data = {}
    rows = []
    for arm in results.runs:
        row = [study.ARMS[arm].title]
        for gain in GAINS:
            paid = [alignment_at(*curves, gain) for curves in zip(*changes(results, arm), strict=True)]
            paid = torch.tensor([value for value in paid if not math.isnan(value)], dtype=torch.float64)
            count = len(paid)
            total = len(results.runs[arm])
            if not count:
                row.append("not reached")
                continue
            error = paid.std().item() / math.sqrt(count) if count > 1 else NAN
            data.setdefault(arm, {})[str(gain)] = {"mean": paid.mean().item(), "se_seeds": error, "seeds": count}
            text = f"{paid.mean():+.3f}" + (f" ± {error:.3f}" if count > 1 else "")
            row.append(text if count == total else f"{text} ({count} of {total})")
        rows.append(row)
    return markdown(["alignment at aesthetics of", *(f"+{gain:.2f}" for gain in GAINS)], rows), data


def changes(results: Results, arm: str) -> tuple[list[list[float]], list[list[float]]]:
    """Changes of aesthetics and of alignment at the checkpoints of each seed, from the base model on."""
    curves = [[y for _, y in results.curves(arm, score)] for score in ("aesthetics", "alignment")]
    return tuple([[value - y[0] for value in y] for y in found] for found in curves)


def alignment_at(aesthetics: list[float], alignment: list[float], gain: float) -> float:
    """Alignment where the path of checkpoints first reaches a gain of aesthetics; `nan` if it never does."""
    points = list(zip(aesthetics, alignment, strict=True))
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 < gain <= x1:
            return y0 + (y1 - y0) * (gain - x0) / (x1 - x0)
    return NAN


def hacking_table(results: Results) -> tuple[str, dict]:
    """From the best checkpoint on: does the learned reward still rise while the exact scores fall?"""
    data = {}
    rows = []
    for arm, runs in results.runs.items():
        values = {"peak": [], "reward": [], **{metric: [] for metric in EXACT}, "hacked": []}
        for run in runs.values():
            points = [run["base"], *run["points"]]
            peak = max(points, key=lambda point: point["utility"])
            last = points[-1]
            values["peak"].append(peak["evaluations"] / last["evaluations"])
            for name in ("reward", *EXACT):
                values[name].append(last[name] - peak[name])
            values["hacked"].append(float(last["reward"] > peak["reward"] and last["utility"] < peak["utility"]))
        means = {name: sum(found) / len(found) for name, found in values.items()}
        data[arm] = means
        judge = "own" if study.ARMS[arm].reward in study.LEARNED_REWARDS else "step-aware"
        rows.append(
            [study.ARMS[arm].title, judge, f"{means['peak']:.2f}", f"{means['reward']:+.2f}"]
            + [f"{means[metric]:+.3f}" for metric in EXACT]
            + [f"{sum(values['hacked']):.0f} of {len(runs)}"]
        )
    head = ["method", "judge", "best at share of the run", "learned reward since", *(f"{m} since" for m in EXACT)]
    return markdown([*head, "reward up, utility down"], rows), data


def accuracy_table(results: Results) -> tuple[str, dict]:
    data = {}
    rows = []
    for kind, found in results.rewards.items():
        for against in ("utility", "labels"):
            by_step = {}
            for step in next(iter(found.values()))["accuracy"]:
                values = torch.tensor([r["accuracy"][step][against] for r in found.values()], dtype=torch.float64)
                pairs = next(iter(found.values()))["accuracy"][step]["pairs"]
                mean = values.mean().item()
                over_seeds = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else NAN
                over_pairs = math.sqrt(mean * (1 - mean) / pairs)
                by_step[step] = {"mean": mean, "se_seeds": over_seeds, "se_pairs": over_pairs, "seeds": len(values)}
            data.setdefault(kind, {})[against] = by_step
            rows.append([kind, against, *(f"{value['mean']:.3f}" for value in by_step.values())])
    if not rows:
        return "", {}
    steps = list(next(iter(data.values()))["utility"])
    return markdown(["reward", "against", *(f"t = {step}" for step in steps)], rows), data


def order_table(results: Results) -> tuple[str, dict]:
    """What the reward models see in predictions of x_0."""
    found = [read_json(path)["order"] for path in sorted((results.output / "order").glob("*.json"))]
    if not found:
        return "", {}
    data = {}
    rows = []
    for name, by_step in found[0].items():
        for metric in ("aesthetics", "alignment"):
            row = [name, metric]
            for step in by_step:
                values = torch.tensor([seed[name][step][metric] for seed in found], dtype=torch.float64)
                data.setdefault(name, {}).setdefault(metric, {})[step] = values.tolist()
                row.append(f"{values.mean():.3f}")
            rows.append(row)
    return markdown(["reward", "exact score", *(f"t = {step}" for step in next(iter(found[0].values())))], rows), data


def sweep_table(results: Results) -> tuple[str, dict]:
    data = {}
    rows = []
    for method, candidates in study.SWEEPS.items():
        scores = study.sweep_scores(results.output, method)
        if not scores:
            continue
        best = study.chosen_settings(results.output, method)
        for index, settings in enumerate(candidates):
            if index in scores:
                mean = sum(scores[index]) / len(scores[index])
                data.setdefault(method, []).append({"settings": settings, "utility": scores[index], "mean": mean})
                text = ", ".join(f"{key} {value:g}" for key, value in settings.items())
                each = ", ".join(f"{value:.3f}" for value in scores[index])
                rows.append([method, text, f"{mean:.4f}", each, "chosen" if settings == best else ""])
    return (markdown(["method", "settings", "best utility, mean", "each seed", ""], rows) if rows else ""), data


def guidance_table(results: Results) -> tuple[str, dict]:
    if "base" not in results.guidance:
        return "", {}
    data = {}
    rows = []
    base = results.guidance["base"][0]["scales"]
    for arm, found in results.guidance.items():
        title = "base model" if arm == "base" else study.ARMS[arm].title
        for metric in EXACT:
            row = [title, metric]
            for scale in base:
                own = torch.tensor([run["scales"][scale][metric] for run in found.values()], dtype=torch.float64).mean(
                    2
                )
                value = two_way(own)
                data.setdefault(arm, {}).setdefault(metric, {})[scale] = value
                row.append(cell(value, sign=""))
            rows.append(row)
    return markdown(["model", "score", *(f"guidance {scale}" for scale in base)], rows), data


def for_json(value):
    """Six digits after the point; no infinity and no nan, which JSON does not have."""
    if isinstance(value, dict):
        return {key: for_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_json(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def write_report(output: Path, folder: Path) -> str:
    """
    Args:
        output (`Path`): what `run.py` wrote.
        folder (`Path`): where the report goes.

    Returns:
        `str`: the main table in Markdown.
    """
    # The head of the report: how everything was measured, and the base model.
    results = Results(output)
    folder.mkdir(parents=True, exist_ok=True)
    plan = results.plan
    base = {m: two_way(torch.tensor(results.base["scores"]["heldout"][m]).mean(1)[None]) for m in EXACT}
    count = sum(len(row) for row in results.base["scores"]["heldout"]["utility"])
    data = {"plan": plan, "base": base, "missing": results.missing, "heldout_samples": count}
    protocol = (
        f"{count} held-out samples ({base['utility']['captions']} captions, {plan['heldout_repeats']} fixed seeds each), "
        "DDIM, 10 steps, eta 1, guidance 1. Changes against the base model with the same noise, mean ± standard error "
        "over captions and training seeds (* one seed: over captions only, too small)."
    )
    base_text = ", ".join(f"{metric} {cell(value, sign='')}" for metric, value in base.items())
    parts = [f"# Comparison in the shapes world\n\n{protocol} Base model: {base_text}."]

    # The sections, each with a table; one without data is left out.
    sections = [
        ("final", f"At {plan['budget']:,} UNet evaluations", lambda: main_table(results, "final")),
        ("chosen", "Best checkpoint on validation captions", lambda: main_table(results, "chosen")),
        ("long", "Methods that went on", lambda: main_table(results, "long")),
        ("cost", "Cost", lambda: cost_table(results)),
        ("against_spo", "Against SPO, at the budget", lambda: against_table(results, REFERENCE, "final")),
        ("against_dpo", "Against Diffusion-DPO, at the budget", lambda: against_table(results, RIVAL, "final")),
        ("equal_time", "At equal CPU time", lambda: equal_time_table(results)),
        (
            "reach",
            "Compute to reach Diffusion-DPO's score at the budget (validation; ratio, 90% interval over seeds, ratio with "
            "the reward model's training)",
            lambda: reach_table(results),
        ),
        (
            "front",
            "Alignment paid for aesthetics (validation; mean ± standard error over the seeds that get there)",
            lambda: front_table(results),
        ),
        ("hacking", "After the best checkpoint (validation)", lambda: hacking_table(results)),
        ("accuracy", "Order of held-out pairs by the reward models", lambda: accuracy_table(results)),
        ("order", "Order of two predictions by the reward models (held-out)", lambda: order_table(results)),
        ("guidance", "Guidance scales (held-out)", lambda: guidance_table(results)),
        ("sweep", "Sweeps (validation)", lambda: sweep_table(results)),
    ]
    tables = {}
    for name, title, make in sections:
        tables[name], data[name] = make()
        if data[name]:
            parts.append(f"## {title}\n\n{tables[name]}")
    data["tables"] = tables
    data["curves"] = {}
    for arm, runs in results.runs.items():
        data["curves"][arm] = {str(seed): [run["base"], *run["points"]] for seed, run in runs.items()}

    # Figures, what is missing, and the same numbers as JSON.
    data = json.loads(json.dumps(for_json(data), allow_nan=False))
    parts += [f"![{name}]({name})" for name in figures.draw_all(data, folder, output)]
    if results.missing:
        parts.append("Not run: " + ", ".join(results.missing) + ".")
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")
    (folder / "report.json").write_text(json.dumps(data, indent=1))
    return f"{protocol}\n\n{tables['final']}"


TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill_page(page: str, tables: dict[str, str]) -> str:
    """
    A page with its tables replaced.

    Raises:
        KeyError: if the page names a table that there is not.
    """
    missing = [name for _, name, _ in TABLE.findall(page) if not tables.get(name)]
    if missing:
        raise KeyError(f"The page asks for {missing}, and the report has {[n for n, text in tables.items() if text]}.")
    return TABLE.sub(lambda found: f"{found[1]}\n{tables[found[2]]}\n\n{found[3]}", page)


def images_of(page: Path) -> Path:
    """The folder of a page's figures, made if it is not there."""
    images = page.parent / "images" / "compare"
    images.mkdir(parents=True, exist_ok=True)
    return images


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("compare_output"), help="What run.py wrote.")
    parser.add_argument("--report", type=Path, help="Where the report goes. Default: OUTPUT/report.")
    parser.add_argument("--page", type=Path, help="A Markdown page whose tables and figures are replaced.")
    parser.add_argument("--figures", type=Path, metavar="REPORT.json", help="Draw the figures of this report again.")
    args = parser.parse_args()
    if args.figures:
        data = json.loads(args.figures.read_text())
        folder = images_of(args.page) if args.page else args.figures.parent
        print(*figures.draw_all(data, folder, args.output), sep="\n")
        return
    folder = args.report or args.output / "report"
    print(write_report(args.output, folder))
    if args.page:
        tables = json.loads((folder / "report.json").read_text())["tables"]
        args.page.write_text(fill_page(args.page.read_text(), tables))
        for path in folder.glob("*.png"):
            path.replace(images_of(args.page) / path.name)
        (folder / "report.md").unlink()  # the page is the report now


if __name__ == "__main__":
    main()
