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
import importlib.metadata
import json
import math
import os
import platform
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
from .sheets import before_after_sheet, image_grid
from .statistics import paired_statistics, statistics_table


OPTIONS = ("guidance_rescale", "clip_skip")  # settings of some families only; 0 is off


# --- a stated protocol -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EvaluationProtocol:
    """
    Everything a number depends on besides the model, the prompts and the metric.

    Attributes:
        name (`str`): what to call it in reports.
        scheduler (`str`, *optional*, defaults to `"DDIM"`): name of the sampler; must be the `sampler_name` of the
            pipeline's step rule.
        num_inference_steps (`int`, *optional*, defaults to `20`): sampling steps, at least 1.
        guidance_scale (`float`, *optional*, defaults to `5.0`): classifier-free guidance; values up to 1 disable it.
        eta (`float`, *optional*, defaults to `0.0`): noise of each step; 0 is deterministic.
        guidance_rescale (`float`, *optional*, defaults to `0.0`), clip_skip (`int`, *optional*, defaults to `0`): as in
            diffusers, see [`SPOPipeline.configure`]; 0 is off.
        negative_prompt (`str`, *optional*, defaults to `""`): the same for every prompt.
        height, width (`int`, *optional*): pixels; the model's own size by default.
        seed (`int`, *optional*, defaults to `0`): image number i is drawn from seed `seed + i`.
    """

    name: str
    scheduler: str = "DDIM"
    num_inference_steps: int = 20
    guidance_scale: float = 5.0
    eta: float = 0.0
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    seed: int = 0
    guidance_rescale: float = 0.0
    clip_skip: int = 0

    def __post_init__(self):
        if self.num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, got {self.num_inference_steps}.")
        if not self.eta >= 0:
            raise ValueError(f"`eta` must not be negative, got {self.eta}.")
        if self.seed < 0:
            raise ValueError(f"`seed` must not be negative, got {self.seed}.")

    def sampler(self) -> dict[str, Any]:
        """The arguments of [`generate_images`] that this protocol fixes."""
        names = ("num_inference_steps", "guidance_scale", "eta", "negative_prompt", "height", "width")
        return {name: getattr(self, name) for name in (*names, *OPTIONS)}

    def in_words(self) -> str:
        """One sentence for reports."""
        size = "the model's own size"
        if self.height or self.width:
            size = f"{self.height or 'default'} x {self.width or 'default'} pixels (height x width)"
        negative = f"negative prompt {self.negative_prompt!r}" if self.negative_prompt else "empty negative prompt"
        options = "".join(f"{name} {getattr(self, name):g}, " for name in OPTIONS if getattr(self, name))
        return (
            f"Protocol `{self.name}`: {self.scheduler}, {self.num_inference_steps} steps, guidance scale "
            f"{self.guidance_scale:g}, {options}eta {self.eta:g}, {negative}, {size}, image i from seed {self.seed} + i."
        )


def _flow_protocol(name: str, num_inference_steps: int, guidance_scale: float) -> EvaluationProtocol:
    return EvaluationProtocol(
        name,
        scheduler="FlowMatchEuler",
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        eta=0.0,
    )


# Protocols by name. For another, make an [`EvaluationProtocol`] and give it a name of its own.
PROTOCOLS = {
    # Steps and guidance of the paper's tables. It does not state eta, and no evaluation code is public; wherever the
    # public code makes finished images (its validation, its inference scripts) it leaves diffusers' default of 0.
    "spo-paper": EvaluationProtocol("spo-paper"),
    # The sampler of the rollouts, which `generate_images` and the trainers' evaluation use by default.
    "spo-rollout": EvaluationProtocol("spo-rollout", eta=1.0),
    # The ODE of flow-matching models, as they are used: SD3 with the 40 steps of the reinforcement-learning papers and of the
    # model's card (Flow-GRPO, DiffusionNFT), the others with the defaults of their diffusers pipelines.
    "sd3": _flow_protocol("sd3", 40, 4.5),
    "flux": _flow_protocol("flux", 28, 3.5),
    "flux2-klein": _flow_protocol("flux2-klein", 50, 4.0),
    "z-image": _flow_protocol("z-image", 50, 5.0),
    "qwen-image": _flow_protocol("qwen-image", 50, 4.0),
}


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
        images, base_images (`torch.Tensor` of shape `(K, 3, H, W)`, *optional*): the first K images, for pictures.
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

    def to_dict(self) -> dict[str, Any]:
        """Everything but the images, ready for JSON; an undefined number (a standard error of one prompt) is `None`."""
        rows = []
        for i, (prompt, seed) in enumerate(zip(self.prompts, self.seeds, strict=True)):
            row = {"prompt": prompt, "seed": seed, "scores": _scores_of_image(self.scores, i)}
            if self.base_scores is not None:
                row["base_scores"] = _scores_of_image(self.base_scores, i)
            rows.append(row)
        return {
            "protocol": dataclasses.asdict(self.protocol),
            "metrics": self.metric_descriptions,
            "statistics": {name: _without_nan(values) for name, values in self.statistics.items()},
            "versions": self.versions,
            "images": rows,
        }

    def table(self) -> str:
        """The statistics as a Markdown table."""
        return statistics_table(self.statistics)

    def report(self) -> str:
        """Protocol, table and what its columns mean, in Markdown."""
        first = next(iter(self.statistics.values()))
        text = [
            "# Evaluation",
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
        text.append("\n".join(f"- `{name}`: {what}" for name, what in self.metric_descriptions.items()))
        text.append("Made with " + ", ".join(f"{name} {version}" for name, version in self.versions.items()) + ".")
        return "\n\n".join(text) + "\n"

    def save(self, output_dir: str | Path) -> None:
        """
        Write `metrics.json`, `metrics.md` and `contact_sheet.png`.

        With a base model the sheet shows its images beside the model's, with prompts and scores; without one it is a
        plain grid.

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
        if self.base_images is None:
            return image_grid(self.images)
        shown = len(self.images)
        p = self.protocol  # a heading has no room for `in_words`
        return before_after_sheet(
            self.base_images,
            self.images,
            self.prompts[:shown],
            {name: values[:shown] for name, values in self.base_scores.items()},
            {name: values[:shown] for name, values in self.scores.items()},
            title=f"{p.name}: {p.scheduler}, {p.num_inference_steps} steps, guidance {p.guidance_scale:g}, eta {p.eta:g}",
        )


def _scores_of_image(scores: dict[str, torch.Tensor], i: int) -> dict[str, float]:
    return {name: values[i].item() for name, values in scores.items()}


def _without_nan(values: dict[str, float]) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else value for key, value in values.items()}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("trl-spo", "torch", "diffusers", "transformers", "accelerate", "peft", "pillow"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a checkout on the path, not installed
            versions[name] = "not installed"
    return versions


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


def _check_sampler(pipeline: SPOPipeline, protocol: EvaluationProtocol) -> None:
    sampler = pipeline.step_rule.sampler_name
    if sampler != protocol.scheduler:
        raise ValueError(
            f"Protocol {protocol.name!r} asks for {protocol.scheduler}, but this pipeline samples with {sampler}. Give "
            f"a protocol with scheduler={sampler!r} and a name of its own."
        )
    pipeline.step_rule.check_eta(protocol.eta)
    pipeline.check_negative_prompt(protocol.negative_prompt)
    with pipeline.configured(**{name: getattr(protocol, name) for name in OPTIONS}):
        pass  # refused before the first image is sampled


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
            `torch.Tensor` of shape `(N, 3, H, W)` in [0, 1].
        output_dir (`str` or `Path`, *optional*): where to write `metrics.json`, `metrics.md` and `contact_sheet.png`.
        batch_size (`int`, *optional*, defaults to `8`): images sampled together.
        seeds (iterable of `int`, *optional*): N seeds; `protocol.seed + i` by default.
        num_sheet_images (`int`, *optional*, defaults to `16`): the first images are kept for the contact sheet.
        progress (`str`, *optional*): show a progress bar with this title on the main process.

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
        protocol = _find_protocol(protocol)
    prompts, seeds = _check_prompts(prompts, seeds, protocol)
    _check_the_rest(metrics, base, batch_size, len(prompts))
    if output_dir is not None and int(os.environ.get("RANK", "0")) == 0:
        check_output_dir(output_dir)
    pipeline = wrap_pipeline(pipeline)
    _check_sampler(pipeline, protocol)
    if base is not None and not torch.is_tensor(base):
        base = wrap_pipeline(base)
        _check_sampler(base, protocol)
    if not isinstance(metrics, dict):
        from .named import load_metrics

        metrics = load_metrics(metrics, device=pipeline.device)

    # A reward model refuses latents of another space before any image is made.
    for metric in filter(is_reward_model, metrics.values()):
        wrap_reward(metric).check_pipeline(pipeline)

    # Each process evaluates its share of the images, and gets the records of all.
    task = _Task(pipeline, base, prompts, seeds, metrics, protocol, num_sheet_images)
    rank, num_ranks = _rank_and_world_size(pipeline.device)
    records = _evaluate_shares(task, batch_size, progress, rank, num_ranks)
    result = _result(task, records)
    if output_dir is not None and rank == 0:
        result.save(output_dir)
    return result


def _find_protocol(name: str) -> EvaluationProtocol:
    if name not in PROTOCOLS:
        raise ValueError(
            f"There is no protocol {name!r}; there are {', '.join(PROTOCOLS)}, or make an `EvaluationProtocol`."
        )
    return PROTOCOLS[name]


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
    num_sheet_images: int


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
            if record["row"] < task.num_sheet_images:
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
        versions=_versions(),
        images=images_of("model"),
        base_images=images_of("base model") if has_base else None,
    )
