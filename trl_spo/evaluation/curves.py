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
Draw curves of a run with matplotlib: six panels that say how it goes, or everything that was logged, and the accuracy of reward
models over the timesteps.

An axis is never so narrow that noise looks like an event, legends stand beside the data, and a colour means the same as on the
sheets of images.
"""

import dataclasses
import io
import math
import numbers
import re

from .sheets import BETTER, MUTED, NEXT, WORSE
from .statistics import wilson_interval


try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("Curves need matplotlib: `pip install trl-spo[eval]`.") from error


NOT_CURVES = {"epoch", "step", "total_flos"}
ALL = "all"
NUM_PANELS = 6
# For curves whose name means no colour. None of them is the green of chosen or the red of rejected.
PALETTE = (NEXT, "#e08214", "#7b3294", "#01665e", "#8c510a", "#c51b7d", "#4d4d4d", "#6baed6")
MEANINGS = {"chosen": BETTER, "rejected": WORSE}


@dataclasses.dataclass(frozen=True)
class Panel:
    """
    How a metric is drawn.

    Attributes:
        says (`str`): what it is, along the vertical axis.
        keys (`tuple[str]`): the metrics; the first is the one of the training, a second one that of the evaluation.
        level (`float`, *optional*): a dotted line to compare with.
        limits (`tuple[float, float]`, *optional*): range of the axis.
        span (`float`): height of the axis, at least.
    """

    says: str
    keys: tuple[str, ...]
    level: float | None = None
    limits: tuple[float, float] | None = None
    span: float = 0.0


# What is drawn if nothing else is asked for, the first six of which anything was logged; means of evaluations go before them.
PANELS = (
    Panel("beta (log-ratio chosen - rejected)", ("rewards/margins",), level=0.0, span=0.02),
    Panel("share of pairs in the right order", ("rewards/accuracies",), level=0.5, limits=(0, 1)),
    Panel("share of pairs in the right order", ("accuracy", "eval_accuracy"), level=0.5, limits=(0, 1)),
    Panel("score of chosen - rejected", ("margin", "eval_margin"), level=0.0, span=0.1),
    Panel("distance from the base model", ("kl",), level=0.0, span=0.001),
    Panel("loss (dotted: ln 2, no preference)", ("loss", "eval_loss"), level=math.log(2), span=0.1),
    Panel("share of prompts that gave a pair", ("pairs/valid_fraction",), limits=(0, 1)),
    Panel("share of clipped ratios", ("clip_ratio",), limits=(0, 1)),
)
OF_KEY = {key: panel for panel in PANELS for key in panel.keys}


class NotebookFigure(Figure):
    """A figure that a notebook shows without pyplot, and without `%matplotlib inline`."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def plot_curves(
    log_history: list[dict],
    keys: list[str] | str | None = None,
    title: str | None = None,
    x: str = "step",
    num_eval_prompts: int | None = None,
) -> Figure:
    """
    Curves of logged metrics.

    Args:
        log_history (list of `dict`): `trainer.state.log_history`.
        keys (`list[str]` or `str`, *optional*): metrics to draw, one panel each; those that were never logged are left out.
            `"all"` draws whatever was logged, with one panel for all that share what is before the slash
            (`rewards/chosen`, `rewards/rejected`). By default six panels that say how the run goes: means of the
            evaluation, margin, accuracy, distance from the base model, loss and pairs.
        title (`str`, *optional*): heading.
        x (`str`, *optional*, defaults to `"step"`): key of the horizontal axis.
        num_eval_prompts (`int`, *optional*): images of an evaluation. With it, means of evaluations get bars of two
            standard errors, from the deviation that is logged beside them.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        ValueError: if none of the keys was logged.
    """
    # Find the metrics that have numbers, and which of them share a panel.
    logged = _logged_metrics(log_history, x)
    panels = _chosen_panels(logged, keys)
    series = {key: _points(log_history, x, key) for members in panels.values() for key in members}
    panels = {name: [key for key in members if series[key]] for name, members in panels.items()}
    panels = {name: members for name, members in panels.items() if members}
    if not panels:
        raise ValueError(
            ("There is no metric" if not isinstance(keys, list) else f"None of {keys} is") + " in the log history."
        )

    # Draw them, three panels to a row.
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = NotebookFigure(figsize=(4 * columns, 2.7 * rows), layout="constrained")
    for index, (name, members) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        deviation = _points(log_history, x, members[0].removesuffix("_mean") + "_std")
        _draw_panel(axes, {key: series[key] for key in members}, deviation, num_eval_prompts)
        axes.set_title(members[0] if len(members) == 1 else name, fontsize=10)
        axes.set_xlabel(x, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _chosen_panels(logged: list[str], keys: list[str] | str | None) -> dict[str, list[str]]:
    """Metrics by the name of the panel that they share."""
    panels: dict[str, list[str]] = {}
    if keys == ALL:
        for key in logged:
            panels.setdefault(key.partition("/")[0], []).append(key)
        return panels
    if keys is not None:
        return {key: [key] for key in keys}
    means = sorted(key for key in logged if key.startswith("eval_") and key.endswith("_mean"))
    means.sort(key=lambda key: key != "eval_reward_mean")  # the reward first
    panels = {key: [key] for key in means[:2]}
    for panel in PANELS:
        members = [key for key in panel.keys if key in logged]
        if members:
            panels[members[0]] = members
    if not panels:
        return _chosen_panels(logged, ALL)
    return dict(list(panels.items())[:NUM_PANELS])


def _logged_metrics(log_history: list[dict], x: str) -> list[str]:
    """All metrics that were logged together with `x`, in the order of their first appearance."""
    logged = {}  # in this order
    for log in log_history:
        if x in log:
            logged |= dict.fromkeys(log)
    return [key for key in logged if key not in NOT_CURVES and key != x and not key.startswith("train_")]


def _points(log_history: list[dict], x: str, key: str) -> list[tuple[float, float]]:
    """The curve of one metric; empty if it was never logged or is not a number."""
    points = [(log[x], log[key]) for log in log_history if key in log and x in log]
    return points if all(isinstance(y, numbers.Real) for _, y in points) else []


def _draw_panel(axes, series: dict, deviation: list[tuple[float, float]], num_eval_prompts: int | None) -> None:
    """The curves of one panel, their errors and the level to compare with; more than one curve get a legend beside them."""
    panel = OF_KEY.get(next(iter(series)), Panel("", ()))
    for number, (key, points) in enumerate(series.items()):
        axes.plot(
            *zip(*points, strict=True),
            color=_color_of(key, number),
            linestyle="-" if number < len(PALETTE) else "--",
            marker="." if len(points) < 40 else None,
            label=key.partition("/")[2] or key,
        )
    points = next(iter(series.values()))
    deviations = dict(deviation)
    has_errors = bool(num_eval_prompts) and all(step in deviations for step, _ in points)
    if has_errors:
        errors = [2 * deviations[step] / math.sqrt(num_eval_prompts) for step, _ in points]
        axes.errorbar(
            *zip(*points, strict=True), yerr=errors, color=_color_of(next(iter(series)), 0), fmt="none", capsize=2
        )
    if panel.level is not None:
        axes.axhline(panel.level, color=MUTED, linestyle=":", linewidth=1)
    _set_range(axes, panel, max((value for _, value in deviation if math.isfinite(value)), default=0.0))
    says = "mean of the evaluation" if next(iter(series)).startswith("eval_") and not panel.says else panel.says
    axes.set_ylabel(says + (", ± 2 standard errors" if has_errors else ""), fontsize=7)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _color_of(key: str, number: int) -> str:
    return MEANINGS.get(key.partition("/")[2], PALETTE[number % len(PALETTE)])


def _set_range(axes, panel: Panel, deviation: float) -> None:
    """The range of the vertical axis: that of the panel, or one that is no narrower than its span or half of a deviation."""
    if panel.limits is not None:
        low, high = panel.limits
        axes.set_ylim(low - 0.02 * (high - low), high + 0.02 * (high - low))
        return
    low, high = axes.get_ylim()
    missing = max(panel.span, deviation / 2, 0.01 * max(abs(low), abs(high))) - (high - low)
    if missing > 0:
        low -= missing / 2
        high += missing / 2
    if panel.level == 0 and min(axes.lines[0].get_ydata()) >= 0:
        low = -0.05 * high  # what is never negative needs no half of a panel for it
    axes.set_ylim(low, high)


def _by_timestep(values: dict) -> dict[int, float]:
    """`{timestep: accuracy}`, given as it is or picked from metrics such as `eval_accuracy/t_501`."""
    picked = {}
    for key, value in values.items():
        match = re.fullmatch(r"(?:.*accuracy/t_)?(\d+)", str(key))
        if match:
            picked[int(match[1])] = value
    if not picked:
        raise ValueError(f"There is no accuracy by timestep, such as `eval_accuracy/t_501`, among {list(values)}.")
    return picked


def plot_accuracy_by_timestep(
    accuracy: dict[str, dict[int, float]], title: str | None = None, num_pairs: int | None = None
) -> Figure:
    """
    Accuracy of reward models over the timestep at which they judge.

    Args:
        accuracy (`dict[str, dict[int, float]]`): per model, accuracy by timestep; what
            [`StepRewardTrainer.evaluate`] returns will do, too.
        title (`str`, *optional*): heading.
        num_pairs (`int`, *optional*): pairs that were judged at each timestep. With it there are bars of 95% (Wilson).

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        ValueError: if a model has no accuracy.
    """
    figure = NotebookFigure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    lowest = 0.5
    for number, (name, values) in enumerate(accuracy.items()):
        values = _by_timestep(values)
        timesteps = sorted(values)
        shares = [values[t] for t in timesteps]
        lowest = min(lowest, *shares)
        color = PALETTE[number % len(PALETTE)]
        axes.plot(timesteps, shares, marker="o", label=name, color=color)
        if num_pairs is not None:
            bounds = [wilson_interval(share, num_pairs) for share in shares]
            below = [share - low for share, (low, _) in zip(shares, bounds, strict=True)]
            above = [high - share for share, (_, high) in zip(shares, bounds, strict=True)]
            axes.errorbar(timesteps, shares, yerr=[below, above], color=color, fmt="none", capsize=3)
            lowest = min(lowest, *(low for low, _ in bounds))
    axes.axhline(0.5, color=MUTED, linestyle=":", label="chance")
    axes.set_xlabel("timestep (0: clean image)")
    axes.set_ylabel("accuracy" + (" (bars: 95%)" if num_pairs is not None else ""))
    axes.set_ylim(max(0.0, min(0.4, lowest - 0.05)), 1.0)
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    if title:
        axes.set_title(title, fontsize=11)
    return figure
