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
The result of an evaluation: its numbers and what they are of, as JSON, as a report in Markdown, and as a sheet of images.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from ..captions import captioned_grid
from ..images import to_pil
from .protocols import EvaluationProtocol, is_named
from .sheets import before_after_sheet
from .statistics import statistics_table


NOT_FOR_OTHERS = "The sampler is that of the training or the default one. For numbers that are compared with those of others, name a protocol."


@dataclasses.dataclass
class EvaluationResult:
    """
    What [`evaluate_pipeline`] found.

    Attributes:
        protocol ([`EvaluationProtocol`]): how the images were sampled.
        prompts (`list[str]`), seeds (`list[int]`): what each of the N images was made from.
        scores (`dict[str, torch.Tensor]`): per metric, `(N,)` scores.
        base_scores (`dict[str, torch.Tensor]`, *optional*): the same for the base model's images.
        statistics (`dict[str, dict[str, float]]`): per metric, what [`paired_statistics`] returns.
        metric_descriptions (`dict[str, str]`): per metric, what it is.
        versions (`dict[str, str]`): versions of the packages that made the numbers.
        images, base_images (`torch.Tensor` of shape `(K, 3, H, W)`, *optional*): K images, for pictures.
        sheet_rows (`list[int]`): which of the N images these are: K positions spread evenly over the prompts.
        subject (`dict[str, Any]`): what was evaluated: `model`, `prompts`, and `base` if there was one.
        metric_weights (`dict[str, dict]`): per metric that says so, where its weights are from.
    """

    protocol: EvaluationProtocol
    prompts: list[str]
    seeds: list[int]
    scores: dict[str, torch.Tensor]
    base_scores: dict[str, torch.Tensor] | None
    statistics: dict[str, dict[str, float]]
    metric_descriptions: dict[str, str]
    versions: dict[str, str]
    images: torch.Tensor
    base_images: torch.Tensor | None = None
    sheet_rows: list[int] = dataclasses.field(default_factory=list)
    subject: dict[str, Any] = dataclasses.field(default_factory=dict)
    metric_weights: dict[str, dict] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the images, ready for JSON; an undefined number (a standard error of one prompt) is `None`."""
        rows = []
        for i, (prompt, seed) in enumerate(zip(self.prompts, self.seeds, strict=True)):
            row = {"prompt": prompt, "seed": seed, "scores": scores_of_image(self.scores, i)}
            if self.base_scores is not None:
                row["base_scores"] = scores_of_image(self.base_scores, i)
            rows.append(row)
        return {
            **self.subject,
            "protocol": dataclasses.asdict(self.protocol),
            "metrics": self.metric_descriptions,
            "metric_weights": self.metric_weights,
            "statistics": {name: _without_nan(values) for name, values in self.statistics.items()},
            "versions": self.versions,
            "images": rows,
        }

    def table(self) -> str:
        """The statistics as a Markdown table."""
        return statistics_table(self.statistics)

    def subject_in_words(self) -> str:
        """What was evaluated, a line per thing, as a Markdown list."""
        names = sorted(self.subject, key=lambda name: ("model", "lora", "base", "prompts", name).index(name))
        lines = [f"- {name}: {_in_words(self.subject[name])}" for name in names]
        for name, what in self.metric_descriptions.items():
            weights = {key: value for key, value in self.metric_weights.get(name, {}).items() if value not in what}
            lines.append(f"- metric `{name}`: {what}" + (f" ({_in_words(weights)})" if weights else ""))
        return "\n".join(lines)

    def report(self) -> str:
        """What was evaluated, protocol, table and what its columns mean, in Markdown."""
        first = next(iter(self.statistics.values()))
        text = [
            "# Evaluation",
            self.subject_in_words(),
            self.protocol.in_words(),
            f"{first['num_images']} images of {first['num_prompts']} prompts. Higher is better.",
            self.table(),
            "± is the standard error over prompts.",
        ]
        if self.base_scores is not None:
            text[-1] += (
                " The base model had the same prompts and seeds; the difference is paired, with Student's t interval "
                "over prompts. Win rate: share of images above the base model's, ties one half, Wilson's interval."
            )
        if not is_named(self.protocol):
            text.append(NOT_FOR_OTHERS)
        text.append("Made with " + ", ".join(f"{name} {version}" for name, version in self.versions.items()) + ".")
        return "\n\n".join(text) + "\n"

    def save(self, output_dir: str | Path) -> None:
        """
        Write `metrics.json`, `metrics.md` and `contact_sheet.png`.

        The sheet shows images spread evenly over the prompts, with prompts and scores, and with a base model its images
        beside the model's.

        Args:
            output_dir (`str` or `Path`): made if it does not exist.
        """
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")
        (folder / "metrics.md").write_text(self.report())
        if len(self.images):
            self.contact_sheet().save(folder / "contact_sheet.png")

    def contact_sheet(self):
        """The images that were kept for it, as a `PIL.Image.Image`."""
        rows = self.sheet_rows
        prompts = [self.prompts[row] for row in rows]
        scores = {name: values[rows] for name, values in self.scores.items()}
        title = self.protocol.in_short()  # a heading has no room for `in_words`
        if self.base_images is None:
            captions = []
            for i, prompt in enumerate(prompts):
                captions.append("\n".join([*(f"{values[i]:.2f} {name}" for name, values in scores.items()), prompt]))
            pictures = [to_pil(image) for image in self.images]
            return captioned_grid(pictures, captions, title=title, lines=3 + len(scores))
        base_scores = {name: values[rows] for name, values in self.base_scores.items()}
        sides = ("base model", "model")
        return before_after_sheet(
            self.base_images, self.images, prompts, base_scores, scores, title=title, sides=sides
        )


def scores_of_image(scores: dict[str, torch.Tensor], i: int) -> dict[str, float]:
    return {name: values[i].item() for name, values in scores.items()}


def _in_words(value: Any) -> str:
    """A value for people: of a dictionary, first what it is about, and then the other entries by name."""
    if not isinstance(value, dict):
        return f"`{value}`"
    subject, *others = value.items()
    return ", ".join([f"`{subject[1]}`", *(f"{name} `{entry}`" for name, entry in others)])


def _without_nan(values: dict[str, float]) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else value for key, value in values.items()}
