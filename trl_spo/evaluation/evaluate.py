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
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..images import eight_bits
from ..pipelines.auto import wrap_pipeline
from ..pipelines.base import SPOPipeline
from ..rewards.base import is_reward_model, wrap_reward
from ..sampling import generate_images, score_images
from ..training.checkpointing import check_output_dir
from .protocols import PROTOCOLS as PROTOCOLS  # also found here
from .protocols import EvaluationProtocol, find_protocol, protocol_of_pipeline
from .provenance import describe_pipeline, describe_prompts, describe_versions, weights_of
from .result import EvaluationResult, scores_of_image
from .sheets import evenly_spaced
from .statistics import paired_statistics


NO_LORA = "no_lora"


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
            A list of names loads them with `named.load_metrics`.
        protocol ([`EvaluationProtocol`] or `str`, *optional*, defaults to `"spo-paper"`): or the name of one in
            `PROTOCOLS`.
        base (*optional*): what to compare with on the same prompts and seeds: another pipeline, or its images, a
            `torch.Tensor` of shape `(N, 3, H, W)` in [0, 1]; or `"no_lora"`, the pipeline itself with its LoRA off.
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
    base = _prepared_base(base, pipeline, protocol)
    if not isinstance(metrics, dict):
        from .named import load_metrics

        metrics = load_metrics(metrics, device=pipeline.device)

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


def _prepared_base(base, pipeline: SPOPipeline, protocol: EvaluationProtocol):
    """What is compared with: images, a pipeline that can sample under the protocol, or `NO_LORA`."""
    if base is None or torch.is_tensor(base):
        return base
    if isinstance(base, str) and base == NO_LORA:
        if not getattr(pipeline.denoiser, "peft_config", None):
            raise ValueError(f"`base={NO_LORA!r}` compares with the pipeline without its LoRA, and it has none.")
        return base
    base = wrap_pipeline(base)
    protocol_of_pipeline(protocol, base)
    return base


def _subject(pipeline: SPOPipeline, base, prompts: list[str], given: dict[str, Any] | None) -> dict[str, Any]:
    """What is evaluated: what the caller says, and of the rest what is known."""
    known = {"model": describe_pipeline(pipeline)}
    if isinstance(base, str):
        known["base"] = "the same model without the LoRA"
    elif base is not None:
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
    base: SPOPipeline | torch.Tensor | str | None
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
    elif isinstance(task.base, str):
        task.pipeline.sd_pipeline.disable_lora()
        try:
            sides["base model"] = sample(task.pipeline)
        finally:
            task.pipeline.sd_pipeline.enable_lora()
    elif task.base is not None:
        sides["base model"] = sample(task.base)

    # Score them; a record per row holds both sides.
    records = [{"row": row, "scores": {}, "images": {}} for row in rows]
    for side, images in sides.items():
        scores = {}
        for name, metric in task.metrics.items():
            scores[name] = _apply_metric(name, metric, images, prompts, side, task.pipeline)
        for i, record in enumerate(records):
            record["scores"][side] = scores_of_image(scores, i)
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
