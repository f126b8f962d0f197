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
Draw curves of a run with matplotlib: everything that was logged, and the accuracy of reward models over the timesteps.
"""

import io
import numbers
import re

from .sheets import MUTED, NEXT


try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("Curves need matplotlib: `pip install trl-spo[eval]`.") from error


NOT_CURVES = {"epoch", "step", "total_flos"}


class NotebookFigure(Figure):
    """A figure that a notebook shows without pyplot, and without `%matplotlib inline`."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def plot_curves(
    log_history: list[dict], keys: list[str] | None = None, title: str | None = None, x: str = "step"
) -> Figure:
    """
    Curves of logged metrics.

    Args:
        log_history (list of `dict`): `trainer.state.log_history`.
        keys (`list[str]`, *optional*): metrics to draw, one panel each; those that were never logged are left out. By
            default all that were logged, with one panel for all that share what is before the slash
            (`rewards/chosen`, `rewards/rejected`).
        title (`str`, *optional*): heading.
        x (`str`, *optional*, defaults to `"step"`): key of the horizontal axis.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        ValueError: if none of the keys was logged.
    """
    # Find the metrics that have numbers, and which of them share a panel.
    wanted = _logged_metrics(log_history, x) if keys is None else list(keys)
    series = {key: _points(log_history, x, key) for key in wanted}
    series = {key: points for key, points in series.items() if points}
    if not series:
        raise ValueError("There is no metric" if keys is None else f"None of {keys} is" + " in the log history.")
    panels: dict[str, list[str]] = {}
    for key in series:
        panels.setdefault(key if keys is not None else key.partition("/")[0], []).append(key)

    # Draw them, three panels to a row.
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = NotebookFigure(figsize=(4 * columns, 2.7 * rows), layout="constrained")
    for index, (name, members) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw_panel(axes, {key: series[key] for key in members})
        axes.set_title(members[0] if len(members) == 1 else name, fontsize=10)
        axes.set_xlabel(x, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


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


def _draw_panel(axes, series: dict[str, list[tuple[float, float]]]) -> None:
    """The curves of one panel; more than one get colours of their own and a legend."""
    for number, (key, points) in enumerate(series.items()):
        axes.plot(
            *zip(*points, strict=True),
            color=NEXT if len(series) == 1 else f"C{number % 10}",
            linestyle="-" if number < 10 else "--",
            marker="." if len(points) < 40 else None,
            label=key.partition("/")[2] or key,
        )
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(fontsize=6)


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


def plot_accuracy_by_timestep(accuracy: dict[str, dict[int, float]], title: str | None = None) -> Figure:
    """
    Accuracy of reward models over the timestep at which they judge.

    Args:
        accuracy (`dict[str, dict[int, float]]`): per model, accuracy by timestep; what
            [`StepRewardTrainer.evaluate`] returns will do, too.
        title (`str`, *optional*): heading.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        ValueError: if a model has no accuracy.
    """
    figure = NotebookFigure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    lowest = 0.5
    for name, values in accuracy.items():
        values = _by_timestep(values)
        timesteps = sorted(values)
        lowest = min(lowest, *values.values())
        axes.plot(timesteps, [values[t] for t in timesteps], marker="o", label=name)
    axes.axhline(0.5, color=MUTED, linestyle=":", label="chance")
    axes.set_xlabel("timestep (0: clean image)")
    axes.set_ylabel("accuracy")
    axes.set_ylim(max(0.0, min(0.4, lowest - 0.05)), 1.0)
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    if title:
        axes.set_title(title, fontsize=11)
    return figure
