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

"""Curves of a run, drawn with matplotlib."""

import io
import numbers
import re

from matplotlib.figure import Figure

from .sheets import MUTED, NEXT


class NotebookFigure(Figure):
    """A figure that a notebook shows without pyplot, and without `%matplotlib inline`."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


NOT_CURVES = {"epoch", "step", "total_flos"}


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
    if keys is None:
        logged = dict.fromkeys(key for log in log_history if x in log for key in log)
        wanted = [k for k in logged if k not in NOT_CURVES and k != x and not k.startswith("train_")]
    else:
        wanted = list(keys)
    series = {key: [(log[x], log[key]) for log in log_history if key in log and x in log] for key in wanted}
    series = {k: p for k, p in series.items() if p and all(isinstance(y, numbers.Real) for _, y in p)}
    if not series:
        raise ValueError("There is no metric" if keys is None else f"None of {keys} is" + " in the log history.")
    panels: dict[str, list[str]] = {}
    for key in series:
        panels.setdefault(key if keys is not None else key.partition("/")[0], []).append(key)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = NotebookFigure(figsize=(4 * columns, 2.7 * rows), layout="constrained")
    for index, (name, members) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        for number, key in enumerate(members):
            points = series[key]
            axes.plot(
                *zip(*points, strict=True),
                color=NEXT if len(members) == 1 else f"C{number % 10}",
                linestyle="-" if number < 10 else "--",
                marker="." if len(points) < 40 else None,
                label=key.partition("/")[2] or key,
            )
        axes.set_title(members[0] if len(members) == 1 else name, fontsize=10)
        axes.set_xlabel(x, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if len(members) > 1:
            axes.legend(fontsize=6)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _by_timestep(values: dict) -> dict[int, float]:
    """`{timestep: accuracy}` as it is, or picked from metrics such as `eval_accuracy/t_501`."""
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
