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
Evaluate a pipeline under a stated protocol: one fixed seed per prompt, one sampler, and statistics with their uncertainty.

[`evaluate_pipeline`] samples under an [`EvaluationProtocol`], scores with any metrics, compares with a base model on the
same prompts and seeds, and writes numbers, a table and pictures. The unit of every statistic is the *prompt*, see
`trl_spo.evaluation.statistics`.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..captions import captioned_grid
from ..images import eight_bits, to_pil
from ..pipelines.auto import wrap_pipeline
from ..pipelines.base import SPOPipeline
from ..rewards.base import is_reward_model, wrap_reward
from ..sampling import generate_images, score_images
from ..training.checkpointing import check_output_dir
from .protocols import PROTOCOLS as PROTOCOLS  # also found here
from .protocols import EvaluationProtocol, find_protocol, is_named, protocol_of_pipeline
from .provenance import describe_pipeline, describe_prompts, describe_versions, weights_of
from .sheets import before_after_sheet, evenly_spaced
from .statistics import paired_statistics, statistics_table


# --- the whole evaluation --------------------------------------------------------------------------------------------


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
            row = {"prompt": prompt, "seed": seed, "scores": _scores_of_image(self.scores, i)}
            if self.base_scores is not None:
                row["base_scores"] = _scores_of_image(self.base_scores, i)
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
            weights = self.metric_weights.get(name)
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
            text.append(
                "The sampler is that of the training or the default one. For numbers that are compared with those of others, "
                "name a protocol."
            )
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
            return captioned_grid(pictures, captions, title=title, lines=2 + len(scores))
        base_scores = {name: values[rows] for name, values in self.base_scores.items()}
        sides = ("base model", "model")
        return before_after_sheet(
            self.base_images, self.images, prompts, base_scores, scores, title=title, sides=sides
        )


def _scores_of_image(scores: dict[str, torch.Tensor], i: int) -> dict[str, float]:
    return {name: values[i].item() for name, values in scores.items()}


def _in_words(value: Any) -> str:
    """A value for people: of a dictionary, first what it is about, and then the other entries by name."""
    if not isinstance(value, dict):
        return f"`{value}`"
    subject, *others = value.items()
    return ", ".join([f"`{subject[1]}`", *(f"{name} `{entry}`" for name, entry in others)])


def _without_nan(values: dict[str, float]) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else value for key, value in values.items()}


def _apply_metric(
    name: str, metric: Callable, images: torch.Tensor, prompts: list[str], whose: str, pipeline: SPOPipeline
) -> torch.Tensor:
    """`(n,)` finite scores, or an error that names the metric and the prompt."""
    if is_reward_model(metric):  # at timestep 0
        scores = score_images(images, prompts, metric, pipeline=pipeline)
    else:
        scores = torch.as_tensor(metric(images, prompts)).detach().float().cpu()
    if scores.shape != (len(prompts),):
        raise ValueError(
            f"Metric {name!r} must return one score per image, shape ({len(prompts)},), got {tuple(scores.shape)}."
        )
    for prompt, score in zip(prompts, scores.tolist(), strict=True):
        if not math.isfinite(score):
            raise ValueError(
                f"Metric {name!r} is {score} on the {whose}'s image of the prompt {prompt!r}. A mean without it would "
                "say something else; look at that image, or try float32 (`dtype=torch.float32`)."
            )
    return scores


def _describe_metric(metric: Any) -> str:
    described = getattr(metric, "description", "") or getattr(metric, "__name__", "")
    return described if isinstance(described, str) and described else type(metric).__name__


def evaluate_pipeline(
    pipeline: Any,
    prompts: list[str],
    metrics: dict[str, Callable] | list[str],
    protocol: EvaluationProtocol | str = "spo-paper",
    base: Any | None = None,
    output_dir: str | Path | None = None,
    batch_size: int = 8,
    *,
    seeds: Iterable[int] | None = None,
    num_sheet_images: int = 16,
    progress: str | None = None,
    subject: dict[str, Any] | None = None,
) -> EvaluationResult:
    r"""
    Sample images, score them, compare them with a base model, and report.

    Under `accelerate launch` each process takes its share of the prompts (with its own copy of pipeline and metrics on
    its own device), every process returns the whole result, and the main process alone writes. An image depends on its
    prompt and seed only, so batch size and number of processes change nothing beyond rounding.

    Args:
        pipeline: an [`SPOPipeline`], or whatever [`wrap_pipeline`] accepts.
        prompts (`list[str]`): one per image; repeat a prompt for several images of it. Statistics are over distinct
            prompts.
        metrics (`dict[str, Callable]` or `list[str]`): by name, callables `(images (n, 3, H, W) in [0, 1], prompts) ->
            (n,)` such as those of `trl_spo.evaluation.metrics`, or reward models, which judge at timestep 0; a latent one
            judges what the pipeline's VAE makes of the images.
            A list of names loads them with `metrics.load_metric`.
        protocol ([`EvaluationProtocol`] or `str`, *optional*, defaults to `"spo-paper"`): or the name of one in
            `PROTOCOLS`.
        base (*optional*): what to compare with on the same prompts and seeds: another pipeline, or its images, a
            `torch.Tensor` of shape `(N, 3, H, W)` in [0, 1].
        output_dir (`str` or `Path`, *optional*): where to write `metrics.json`, `metrics.md` and `contact_sheet.png`.
        batch_size (`int`, *optional*, defaults to `8`): images sampled together.
        seeds (iterable of `int`, *optional*): N seeds; `protocol.seed + i` by default.
        num_sheet_images (`int`, *optional*, defaults to `16`): so many images, spread evenly over the prompts, are kept for the
            contact sheet.
        progress (`str`, *optional*): show a progress bar with this title on the main process.
        subject (`dict`, *optional*): what the report says about `model`, `base` and `prompts`, instead of what pipelines and
            prompts say about themselves; such as where a LoRA came from.

    Returns:
        [`EvaluationResult`].

    Raises:
        OSError: before sampling, if nothing can be written to `output_dir`.
        ValueError: before sampling, if arguments do not fit together; later, if a metric returns something else than
            one finite number per image, with the names of metric and prompt.

    Example:

    ```python
    >>> from trl_spo.evaluation.evaluate import evaluate_pipeline

    >>> tuned, base = load("my-model"), load("stable-diffusion-v1-5/stable-diffusion-v1-5")
    >>> result = evaluate_pipeline(tuned, prompts, ["pickscore", "hps_v2.1"], base=base, output_dir="evaluation")
    >>> print(result.table())
    ```
    """
    # Check everything before the first image is sampled.
    if isinstance(protocol, str):
        protocol = find_protocol(protocol)
    prompts, seeds = _check_prompts(prompts, seeds, protocol)
    _check_the_rest(metrics, base, batch_size, len(prompts))
    if output_dir is not None and int(os.environ.get("RANK", "0")) == 0:
        check_output_dir(output_dir)
    pipeline = wrap_pipeline(pipeline)
    protocol = protocol_of_pipeline(protocol, pipeline)
    if base is not None and not torch.is_tensor(base):
        base = wrap_pipeline(base)
        protocol_of_pipeline(protocol, base)
    if not isinstance(metrics, dict):
        from .metrics import load_metric

        metrics = {name: load_metric(name, device=pipeline.device) for name in metrics}

    # A reward model refuses latents of another space before any image is made.
    for metric in filter(is_reward_model, metrics.values()):
        wrap_reward(metric).check_pipeline(pipeline)

    # Each process evaluates its share of the images, and gets the records of all.
    sheet_rows = evenly_spaced(len(prompts), max(0, num_sheet_images))
    task = _Task(
        pipeline, base, prompts, seeds, metrics, protocol, sheet_rows, _subject(pipeline, base, prompts, subject)
    )
    rank, num_ranks = _rank_and_world_size(pipeline.device)
    records = _evaluate_shares(task, batch_size, progress, rank, num_ranks)
    result = _result(task, records)
    if output_dir is not None and rank == 0:
        result.save(output_dir)
    return result


def _check_prompts(prompts, seeds, protocol: EvaluationProtocol) -> tuple[list[str], list[int]]:
    """Prompts and seeds as lists of one length; image i has the protocol's seed + i if no seeds are given."""
    if isinstance(prompts, str) or not len(prompts) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("`prompts` must be a list of at least one string.")
    prompts = list(prompts)
    seeds = range(protocol.seed, protocol.seed + len(prompts)) if seeds is None else seeds
    seeds = [int(seed) for seed in seeds]
    if len(seeds) != len(prompts):
        raise ValueError(f"There must be one seed per prompt, got {len(seeds)} seeds for {len(prompts)} prompts.")
    return prompts, seeds


def _check_the_rest(metrics, base, batch_size: int, num_prompts: int) -> None:
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if isinstance(metrics, str) or not len(metrics):
        raise ValueError(
            "`metrics` must be a dictionary from names to callables, or a list of names; it may not be empty."
        )
    if torch.is_tensor(base) and (base.ndim != 4 or base.shape[:2] != (num_prompts, 3)):
        raise ValueError(
            f"Images of the base model must have shape ({num_prompts}, 3, height, width), one per prompt, got "
            f"{tuple(base.shape)}."
        )


def _subject(pipeline: SPOPipeline, base, prompts: list[str], given: dict[str, Any] | None) -> dict[str, Any]:
    """What is evaluated: what the caller says, and of the rest what is known."""
    known = {"model": describe_pipeline(pipeline)}
    if base is not None:
        known["base"] = "images that were given" if torch.is_tensor(base) else describe_pipeline(base)
    return known | {"prompts": describe_prompts(prompts)} | (given or {})


def _rank_and_world_size(device: torch.device) -> tuple[int, int]:
    """Rank of this process and number of processes; joins the process group that a launcher asked for."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1  # nothing is initialised, since it would decide the device of a later training
    # `cpu` is given, because on a machine without an accelerator accelerate would take each rank for a single process.
    state = PartialState(cpu=device.type == "cpu")
    return state.process_index, state.num_processes


@dataclasses.dataclass(frozen=True)
class _Task:
    """What is evaluated: the checked arguments of [`evaluate_pipeline`]."""

    pipeline: SPOPipeline
    base: SPOPipeline | torch.Tensor | None
    prompts: list[str]
    seeds: list[int]
    metrics: dict[str, Callable]
    protocol: EvaluationProtocol
    sheet_rows: list[int]
    subject: dict[str, Any]


def _evaluate_shares(task: _Task, batch_size: int, progress: str | None, rank: int, num_ranks: int) -> list[dict]:
    """The records of all images, in order. Each process makes every `num_ranks`-th and receives the others."""
    # Evaluate the share of this process. An error is kept until the shares are joined, or the other processes would wait.
    own = list(range(rank, len(task.prompts), num_ranks))
    records: list[dict] = []
    failure = None
    bar = tqdm(total=len(own), desc=progress, unit="image", disable=progress is None or rank != 0)
    try:
        for start in range(0, len(own), batch_size):
            rows = own[start : start + batch_size]
            records += _evaluate_batch(task, rows)
            bar.update(len(rows))
    except Exception as error:
        failure = error
    bar.close()

    # Join the shares; an error in one process is an error in all.
    if num_ranks > 1:
        failures = gather_object([f"rank {rank}: {failure}"] if failure is not None else [])
        if failure is None and failures:
            raise RuntimeError("The evaluation failed elsewhere: " + "; ".join(failures))
        if failure is None:
            records = gather_object(records)
    if failure is not None:
        raise failure
    return sorted(records, key=lambda record: record["row"])


def _evaluate_batch(task: _Task, rows: list[int]) -> list[dict]:
    """One record per row: its scores, and its images if they belong on the sheet. Small enough to be gathered."""
    prompts = [task.prompts[row] for row in rows]
    seeds = [task.seeds[row] for row in rows]

    # Sample both sides, from the same seeds.
    def sample(model):
        return generate_images(model, prompts, seeds=seeds, batch_size=len(prompts), **task.protocol.sampler())

    sides = {"model": sample(task.pipeline)}
    if torch.is_tensor(task.base):
        sides["base model"] = task.base[rows].float().cpu()
    elif task.base is not None:
        sides["base model"] = sample(task.base)

    # Score them; a record per row holds both sides.
    records = [{"row": row, "scores": {}, "images": {}} for row in rows]
    for side, images in sides.items():
        scores = {}
        for name, metric in task.metrics.items():
            scores[name] = _apply_metric(name, metric, images, prompts, side, task.pipeline)
        for i, record in enumerate(records):
            record["scores"][side] = _scores_of_image(scores, i)
            if record["row"] in task.sheet_rows:
                record["images"][side] = eight_bits(images[i])
    return records


def _result(task: _Task, records: list[dict]) -> EvaluationResult:
    """The records of all rows, in order, with their statistics."""

    def scores_of(side: str) -> dict[str, torch.Tensor]:
        scores = {}
        for name in task.metrics:
            scores[name] = torch.tensor([record["scores"][side][name] for record in records])
        return scores

    def images_of(side: str) -> torch.Tensor:
        images = [record["images"][side] for record in records if side in record["images"]]
        return torch.stack(images).float() / 255 if images else torch.empty(0, 3, 0, 0)

    has_base = task.base is not None
    scores = scores_of("model")
    base_scores = scores_of("base model") if has_base else None
    metric_weights = {}
    for name, metric in task.metrics.items():
        if weights := weights_of(metric):
            metric_weights[name] = weights
    statistics = {}
    for name, values in scores.items():
        statistics[name] = paired_statistics(values, task.prompts, base_scores[name] if has_base else None)
    return EvaluationResult(
        protocol=task.protocol,
        prompts=task.prompts,
        seeds=task.seeds,
        scores=scores,
        base_scores=base_scores,
        statistics=statistics,
        metric_descriptions={name: _describe_metric(metric) for name, metric in task.metrics.items()},
        versions=describe_versions(),
        images=images_of("model"),
        base_images=images_of("base model") if has_base else None,
        sheet_rows=task.sheet_rows,
        subject=task.subject,
        metric_weights=metric_weights,
    )
