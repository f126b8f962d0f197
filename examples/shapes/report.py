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
What the demo shows at its end: pictures, a sentence about its table, and what to try next.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from trl_spo.evaluation.curves import plot_accuracy_by_timestep, plot_curves
from trl_spo.evaluation.sheets import before_after_sheet, candidate_tree
from trl_spo.evaluation.statistics import paired_statistics

from . import world
from .base_scores import PIPELINE


METRICS = ("aesthetics", "alignment", "reward")
FRESH_PAIRS = 256  # on which the reward model is tested
CURVES = [
    "eval_aesthetics_mean",
    "eval_alignment_mean",
    "eval_reward_mean",
    "pairs/fresh_accuracy",
    "rewards/margins",
    "step_reward/mean",
]


@dataclass
class Comparison:
    """
    Images of one model before and after training, from the same prompts and seeds.

    Attributes:
        prompts (`list[str]`): N prompts.
        images_before, images_after (`torch.Tensor` of shape `(N, 3, H, W)`): in [0, 1].
        before, after (`dict[str, torch.Tensor]`): `(N,)` scores by metric.
    """

    prompts: list[str]
    images_before: torch.Tensor
    before: dict[str, torch.Tensor]
    images_after: torch.Tensor
    after: dict[str, torch.Tensor]

    def statistics(self) -> dict[str, dict[str, float]]:
        """Paired statistics of every metric."""
        return {name: paired_statistics(self.after[name], self.prompts, self.before[name]) for name in METRICS}

    def utility_change(self) -> torch.Tensor:
        """`(N,)` changes of what the annotator wants."""
        parts = [weight * (self.after[name] - self.before[name]) for name, weight in world.UTILITY_WEIGHTS.items()]
        return sum(parts)


# --- pictures --------------------------------------------------------------------------------------------------------


def readable(caption: str) -> str:
    """A caption in right English; the models of the world know it with "a orange"."""
    return caption.replace("a orange", "an orange")


def spread(changes: torch.Tensor, count: int) -> list[int]:
    """Indices of the best, the worst and others at even distances in rank between them, best first."""
    ranks = torch.linspace(0, len(changes) - 1, count).round().long()
    return changes.argsort(descending=True, stable=True)[ranks].tolist()


def draw_pairs(sides: Comparison, folder: Path, sampler: str) -> None:
    """`before_after.png`, six pairs from best to worst, and `before_after_by_position.png`, whatever they show."""
    changes = sides.utility_change()
    total = len(changes)
    six = spread(changes, 6)
    rank = {index: place + 1 for place, index in enumerate(changes.argsort(descending=True, stable=True).tolist())}
    shown_changes = [f"{changes[i]:+.2f}".replace("-0.00", "+0.00") for i in six]
    prompts = [
        f"{readable(sides.prompts[i])}. Rank {rank[i]}: {change}" for i, change in zip(six, shown_changes, strict=True)
    ]
    title = f"Six of {total} held-out images, from best to worst at even steps in rank by change of utility"
    _sheet(sides, six, prompts, title, columns=3).save(folder / "before_after.png")

    distinct = len(set(sides.prompts))
    shown = torch.linspace(0, distinct - 1, 24).long().tolist()
    prompts = [readable(sides.prompts[i]) for i in shown]
    title = f"Every {distinct / 24:.0f}th held-out prompt before and after SPO, same seeds ({sampler})"
    _sheet(sides, shown, prompts, title, columns=4).save(folder / "before_after_by_position.png")


def _sheet(sides: Comparison, shown: list[int], prompts: list[str], title: str, columns: int):
    return before_after_sheet(
        sides.images_before[shown],
        sides.images_after[shown],
        prompts,
        {name: sides.before[name][shown] for name in METRICS},
        {name: sides.after[name][shown] for name in METRICS},
        columns=columns,
        title=title,
    )


def draw_tree(trainer, prompts: list[str]):
    """The candidates of one rollout, of the prompt with most pairs."""
    pairs = trainer.rollout(prompts, seed=12345, return_trajectory=True)
    row = int(torch.bincount(pairs.prompt_index, minlength=len(prompts)).argmax())
    title = f"{readable(prompts[row])}: predicted images and rewards"
    return candidate_tree(trainer.pipeline, pairs, row, title=title)


def draw_curves(log_history: list[dict]):
    """Six panels: what the validation captions gain, and how the pairs are learnt."""
    title = "SPO in the shapes world (eval: 53 validation captions, 4 seeds each)"
    figure = plot_curves(log_history, CURVES, title=title)
    # Both exact scores lie in [0, 1]: on one scale a small change looks small.
    exact = figure.axes[:2]
    limits = [limit for axes in exact for limit in axes.get_ylim()]
    margin = 0.03 * (max(limits) - min(limits))
    for axes in exact:
        axes.set_ylim(min(limits) - margin, max(limits) + margin)
    return figure


def draw_accuracy(reward: str, fresh: dict[int, float], trained: dict[int, float]):
    """Accuracy of the reward model by timestep before and after its training, with 95% intervals over the pairs."""
    labels = ("CLIP, before training", "step-aware reward model")
    if reward == "latent":
        labels = ("before training", "latent reward model")
    accuracy = dict(zip(labels, (fresh, trained), strict=True))
    title = f"Agreement with noisy labels, {FRESH_PAIRS} fresh pairs, 95% intervals"
    return plot_accuracy_by_timestep(accuracy, title=title, num_pairs=FRESH_PAIRS)


# --- words -----------------------------------------------------------------------------------------------------------


def interpret(statistics: dict[str, dict[str, float]]) -> str:
    """One sentence about the table: what rose, what fell, and where the 95% interval leaves it open."""
    groups = {"rose": [], "fell": [], "did not change clearly": []}
    for name, values in statistics.items():
        if values["difference_low"] > 0:
            verdict = "rose"
        elif values["difference_high"] < 0:
            verdict = "fell"
        else:
            verdict = "did not change clearly"
        groups[verdict].append(f"{name} ({values['difference']:+.3f})")
    parts = [f"{_listed(names)} {verdict}" for verdict, names in groups.items() if names]
    text = "In words: " + "; ".join(parts)
    if groups["did not change clearly"]:
        text += " (0 lies within the 95% interval)"
    return f"{text}. SPO was trained on the reward; the exact scores only chose its checkpoint, on other captions."


def _listed(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def next_commands(model: str, folder: Path) -> str:
    """Commands to go on with, which can be copied as they are."""
    beside = Path(sys.executable).with_name("trl-spo")
    program = "trl-spo" if shutil.which("trl-spo") or not beside.is_file() else str(beside)
    lines = ["Next:"]
    if model == "unet":
        lines += [
            f"  {program} sample --model_name_or_path {PIPELINE} --lora {folder} --base \\",
            f"      --prompts {folder}/heldout.txt --num_prompts 16 --output_dir {folder}/samples",
            f"  {program} demo --model flow      the same with a flow-matching model",
        ]
    else:
        lines.append(f"  {program} demo      the same with a UNet and DDIM")
    lines.append(f"  {program} demo --reward latent   with a reward model that judges noisy latents")
    return "\n".join(lines)
