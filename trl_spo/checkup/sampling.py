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

"""The check-ups of `trl-spo sample` and `trl-spo evaluate`."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..evaluation.named import check_metrics
from ..evaluation.protocols import DEFAULT_PROTOCOL, EvaluationProtocol, find_protocol
from ..export import locate_lora
from ..training.memory import GIB, module_bytes
from ..training.memory_plan import frozen_bytes, make_fake
from .circumstances import Circumstances, precision_of, read_shapes
from .data import SECTION, check_prompts, check_texts
from .environment import check_devices, check_disk, check_libraries, check_versions
from .forecast import Card, Forecast, Networks, Phase, Variant
from .memory_report import MEMORY, NOTHING
from .names import of_data, of_lora, of_pipeline, of_reward
from .networks import NoConfiguration, PublishedModel, pipeline_on_paper, reward_on_paper
from .report import NOTE, OK, PROBLEM, WARNING, Report


BYTES_PER_PIXEL = 3  # of a PNG, at most about that


@dataclass(frozen=True)
class SamplerSettings:
    """What decides the memory of sampling, under the names of [`SPOConfig`]."""

    height: int | None
    width: int | None
    guidance_scale: float
    num_inference_steps: int
    batch_size: int
    scoring_image_size: None = None


def check_sample(model_args, sampler_args, sample_args, where: Circumstances) -> Report:
    """
    Everything that can be said about `trl-spo sample` before it loads weights.

    Args:
        model_args (`LoadedPipelineArguments`), sampler_args (`SamplerArguments`), sample_args (`SampleArguments`): as the
            command has them.
        where ([`Circumstances`]): where it is planned.
    """
    report = Report("trl-spo sample")
    _check_sampler(report, model_args, sampler_args, [], where, sample_args.prompt, sample_args.images_per_prompt)
    return report


def check_evaluate(model_args, sampler_args, reward_args, evaluate_args, where: Circumstances) -> Report:
    """
    Everything that can be said about `trl-spo evaluate` before it loads weights.

    Args:
        model_args (`LoadedPipelineArguments`), sampler_args (`SamplerArguments`), reward_args (`RewardModelArguments`),
            evaluate_args (`EvaluateArguments`): as the command has them.
        where ([`Circumstances`]): where it is planned.
    """
    report = Report("trl-spo evaluate")
    try:
        check_metrics(evaluate_args.metrics, evaluate_args.metric_options, own=["step_reward"])
    except (TypeError, ValueError) as error:
        report.add("settings", PROBLEM, "metrics", str(error))
    if evaluate_args.base and sampler_args.lora is None:
        text = "compares with the model without the LoRA, and there is no --lora."
        report.add("settings", PROBLEM, "base", text)
    report.extend(check_libraries({"scipy": "intervals of a comparison need it"}))
    uses_reward = "step_reward" in evaluate_args.metrics
    named = of_reward(reward_args) if uses_reward else []
    further = [("step_reward", lambda pipeline: reward_on_paper(reward_args, pipeline, where.hub.online)[0])]
    _check_sampler(report, model_args, sampler_args, named, where, rewards=further if uses_reward else ())
    return report


def _check_sampler(
    report: Report, model_args, sampler_args, named, where, prompts=None, repeats=1, rewards=()
) -> None:
    """What both commands share: files, prompts, memory, disk."""
    report.extend(check_versions())
    report.extend(check_devices(None, where.planned, where.on_cpu and sampler_args.device is None))
    named = of_pipeline(model_args, model_args.model_init_kwargs) + list(named)
    named += of_lora(sampler_args.lora) + of_data("prompts", sampler_args.prompts)
    report.extend(where.hub.look(named, where.planned))
    _check_lora(report, sampler_args.lora)
    count = _check_prompts(report, model_args, sampler_args, prompts)
    protocol = _find_protocol(report, sampler_args)
    try:
        dtype, _ = precision_of(model_args, model_args.model_init_kwargs)
        model, note = read_shapes(model_args, model_args.model_init_kwargs, where.hub)
        forecaster = SamplingForecaster(model, rewards)
        settings = _settings(sampler_args, protocol)
        shape = forecaster.networks(dtype).pipeline.latent_shape(settings.height, settings.width)
    except NoConfiguration as reason:
        report.add(MEMORY, WARNING, "networks", f"nothing is predicted: {reason}.")
        return
    except (ImportError, TypeError, ValueError) as error:
        report.add("settings", PROBLEM, "model", str(error).strip().splitlines()[0])
        return
    factor = forecaster.networks(dtype).pipeline.spatial_factor
    images = (count or 0) * repeats
    size = images * math.prod(shape[1:]) * factor**2 * BYTES_PER_PIXEL
    report.extend(check_disk(sampler_args.output_dir, size, f"{images:,} images at most"))
    if note:
        report.add(MEMORY, NOTE, "networks", note)
    _report_memory(report, forecaster, Variant(settings, dtype), where, sampler_args)


def _find_protocol(report: Report, sampler_args) -> EvaluationProtocol:
    """The sampler by name, and that of a LoRA that is on this machine."""
    is_here = sampler_args.lora is not None and Path(sampler_args.lora).exists()
    try:
        protocol = find_protocol(sampler_args.protocol, sampler_args.lora if is_here else None)
    except ValueError as error:
        report.add("settings", PROBLEM, "protocol", str(error))
        protocol = DEFAULT_PROTOCOL
    return replace(protocol, **sampler_args.overrides())


def _settings(sampler_args, protocol: EvaluationProtocol) -> SamplerSettings:
    return SamplerSettings(
        protocol.height, protocol.width, protocol.guidance_scale, protocol.num_inference_steps, sampler_args.batch_size
    )


def _check_lora(report: Report, lora: str | None) -> None:
    if lora is None or not Path(lora).exists():
        return
    try:
        file = locate_lora(lora)
        report.add("files and repositories", OK, "lora", f"the weights are in {str(file)!r}")
    except FileNotFoundError as error:
        report.add("files and repositories", PROBLEM, "lora", str(error))


def _check_prompts(report: Report, model_args, sampler_args, prompts: list[str] | None) -> int | None:
    """The prompts of the command line or of a file; returns how many."""
    if prompts:
        report.extend(check_texts("prompt", prompts))
        return len(prompts)
    if sampler_args.prompts is None:
        report.add(SECTION, PROBLEM, "prompts", "are missing: a .txt file with one per line, or a dataset.")
        return None
    column, split = sampler_args.prompts_column, sampler_args.prompts_split
    findings, count = check_prompts("prompts", sampler_args.prompts, split, column, model_args.model_name_or_path)
    report.extend(findings)
    if count is None or sampler_args.num_prompts is None:
        return count
    return min(count, sampler_args.num_prompts)


class SamplingForecaster:
    """
    Predicts the memory of sampling.

    Args:
        model ([`PublishedModel`]): classes and settings of the pipeline.
        rewards (`list` of names and functions): models that judge images, each made for the pipeline on the meta device.
    """

    def __init__(self, model: PublishedModel, rewards=()):
        self.model = model
        self.rewards = rewards
        self._networks: dict[torch.dtype, Networks] = {}
        self.judges: dict[str, int] = {}

    def networks(self, dtype: torch.dtype) -> Networks:
        """The networks in a precision."""
        if dtype not in self._networks:
            pipeline = pipeline_on_paper(self.model, dtype)
            for name, make in self.rewards:
                self.judges[name] = module_bytes(make(pipeline))
            networks = Networks(pipeline, pipeline.denoiser, None, FakeTensorMode(allow_non_fake_inputs=True))
            make_fake(networks.fake_mode, *networks.modules())
            self._networks[dtype] = networks
        return self._networks[dtype]

    def forecast(self, variant: Variant, card: Card | None = None) -> Forecast:
        """The memory of sampling one batch."""
        networks, settings = self.networks(variant.dtype), variant.config
        pipeline = networks.pipeline
        resident = {pipeline.denoiser_name: module_bytes(pipeline.denoiser), **frozen_bytes(pipeline), **self.judges}
        size = settings.batch_size
        phases = [
            Phase(pipeline.denoiser_name, networks.denoiser_bytes(settings, size), size, "images"),
            Phase("decode", networks.scoring_bytes(settings, size), size, "images"),
        ]
        return Forecast(resident, phases)


def _report_memory(report: Report, forecaster: SamplingForecaster, variant: Variant, where, sampler_args) -> None:
    """Peak memory; and where it does not fit, the largest batch that does."""
    device = torch.device(sampler_args.target_device())
    card = where.card(device)
    predicted = forecaster.forecast(variant, card)
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in predicted.resident.items())
    report.add(MEMORY, NOTE, "weights", f"{predicted.weights / GIB:.2f} GiB: {parts}")
    for phase in predicted.phases:
        text = f"{(predicted.weights + phase.bytes) / GIB:.2f} GiB at {phase.size} {phase.unit}"
        report.add(MEMORY, NOTE, phase.name, text)
    text = f"{predicted.peak / GIB:.1f} GiB. Of {card.name}, {card.usable / GIB:.1f} of {card.total / GIB:.1f} GiB can be used"
    report.numbers["memory"] = {"peak_gib": predicted.peak / GIB, "fits": predicted.fits(card)}
    if predicted.fits(card):
        report.add(MEMORY, OK, "peak", f"{text}: fits.")
        return
    report.add(MEMORY, PROBLEM if predicted.peak > card.total else WARNING, "peak", f"{text}: does not fit.")
    size = variant.config.batch_size
    while size > 1 and not predicted.fits(card):
        size //= 2
        predicted = forecaster.forecast(Variant(replace(variant.config, batch_size=size), variant.dtype), card)
    remedy = f"--batch_size {size}  ({predicted.peak / GIB:.1f} GiB)" if predicted.fits(card) else NOTHING
    report.add(MEMORY, NOTE, "fits with", remedy)
