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

"""The check-up of `trl-spo spo`."""

import copy
from typing import Any

import torch

from ..branch_plan import branch_lengths
from ..pipelines.base import SPOPipeline
from ..spo_trainer import SPOTrainer
from ..training.checkpointing import resume_from
from ..training.memory_plan import trained_bytes
from ..training.rollout_workers import own_rollout_devices
from ..training.sharding import check_sharding, problems_of_settings
from ..training.spo_checks import choose_best_metric
from .circumstances import Circumstances, precision_of, read_shapes
from .data import check_prompts
from .environment import check_devices, check_disk, check_trackers, check_versions
from .forecast import Networks, SPOForecaster, Variant
from .memory_report import MEMORY, report_memory
from .names import of_data, of_decoder, of_pipeline, of_reward
from .networks import NoConfiguration, PublishedModel, pipeline_on_paper, reward_on_paper
from .output import bytes_to_write, check_output
from .rates import MEASURED, matrix_tflops
from .report import NOTE, OK, PROBLEM, WARNING, Finding, Report
from .work import Work, network_tflop, plan_work, seconds


WORK = "work and time"
SETTINGS = "settings"


def check_spo(model_args, reward_args, data_args, config, where: Circumstances) -> Report:
    """
    Everything that can be said about an SPO run before it loads weights.

    Args:
        model_args (`DiffusionModelArguments`), reward_args (`RewardArguments`), data_args
            (`EvaluationDataArguments`), config ([`SPOConfig`]): as `trl-spo spo` has them.
        where ([`Circumstances`]): where it is planned.
    """
    report = Report("trl-spo spo")
    report.extend(check_versions())
    report.extend(check_devices(config, where.planned, where.on_cpu))
    report.extend(check_trackers(config))

    # What the arguments name, and the prompts that can be read here.
    named = of_pipeline(model_args, config.model_init_kwargs) + of_reward(reward_args)
    named += of_decoder(config.scoring_vae) + of_data("dataset_name", config.dataset_name)
    named += of_data("eval_dataset_name", data_args.eval_dataset_name)
    report.extend(where.hub.look(named, where.planned))
    num_prompts = _check_data(report, model_args, data_args, config)

    # The networks, without weights: settings, memory, work.
    report.extend(check_settings(config))
    _check_rollout_devices(report, config, where)
    try:
        reward_args.check()
    except (FileNotFoundError, TypeError, ValueError) as error:
        report.add(SETTINGS, PROBLEM, "reward", str(error))
    try:
        model, note = read_shapes(model_args, config.model_init_kwargs, where.hub)
    except NoConfiguration as reason:
        report.add(MEMORY, WARNING, "networks", f"nothing is predicted: {reason}.")
        report.extend(check_output(config, resume_from(config), SPOTrainer.checkpoint_files))
        return report
    _check_networks(report, model, note, (model_args, reward_args, config), num_prompts, where)
    return report


def _check_data(report: Report, model_args, data_args, config) -> int | None:
    """The prompts; returns how many there are, if that is known."""
    column = config.dataset_prompt_column
    if config.dataset_name is None:
        report.add("data", PROBLEM, "dataset_name", "is missing: SPO needs prompts, a dataset or a .txt file of them.")
        return None
    findings, count = check_prompts(
        "dataset_name",
        config.dataset_name,
        "train",
        column,
        model_args.model_name_or_path,
        streaming=config.dataset_streaming,
    )
    report.extend(findings)
    if data_args.eval_dataset_name is not None:
        name, split = data_args.eval_dataset_name, data_args.eval_split
        report.extend(check_prompts("eval_dataset_name", name, split, column)[0])
    elif config.eval_strategy != "no":
        report.add("data", PROBLEM, "eval_dataset_name", "is missing, and `eval_strategy` wants to evaluate.")
    return count


def _check_rollout_devices(report: Report, config, where: Circumstances) -> None:
    """Devices that only roll out: whether they are here, and what they hold."""
    if not config.rollout_devices:
        return
    names = ", ".join(config.rollout_devices)
    if not where.planned:
        try:
            own_rollout_devices(config)
        except ValueError as error:
            report.add(SETTINGS, PROBLEM, "rollout_devices", str(error))
            return
    text = f"{names} roll out: the phases of a rollout are theirs, beside the denoiser, the VAE and the reward; the others are of the devices that train"
    report.add(SETTINGS, NOTE, "rollout_devices", text)


def check_settings(config) -> list[Finding]:
    """Settings that the trainer refuses before any long work."""
    findings = []
    for check in (check_sharding, lambda config: choose_best_metric(config, {})):
        try:
            check(copy.copy(config))
        except ValueError as error:
            findings.append(Finding(SETTINGS, PROBLEM, "config", str(error)))
    return findings


def _check_networks(report: Report, model: PublishedModel, note: str, arguments: tuple, num_prompts, where) -> None:
    """Settings against the networks, and what follows from both."""
    model_args, reward_args, config = arguments
    try:
        dtype, quantised = precision_of(model_args, config.model_init_kwargs)
        pipeline = pipeline_on_paper(model, dtype)
        _check_pipeline(report, pipeline, config)
        with torch.device("meta"):
            adapter = model_args.peft_config(pipeline) if config.use_peft else None
            trained = pipeline.prepare_for_training(adapter, config.use_peft)
    except (ImportError, TypeError, ValueError) as error:  # what the run would say, too
        report.add(SETTINGS, PROBLEM, "model", str(error).strip().splitlines()[0])
        return
    report.add(SETTINGS, OK, "trained", describe_trained(pipeline, adapter))
    _, reward_note = _reward(report, reward_args, pipeline, where)

    # What will be written, from the number of steps.
    works = plan_work(config, _settings(pipeline, config), pipeline, num_prompts or 0, where.world_size)
    report.extend(check_output(config, resume_from(config), SPOTrainer.checkpoint_files))
    size, what = bytes_to_write(config, trained_bytes(trained), works[0].steps)
    report.extend(check_disk(config.output_dir, size, what))

    # Memory, then time.
    for text in filter(None, (note, reward_note)):
        report.add(MEMORY, NOTE, "networks", text)
    card = where.card(config.device)
    forecaster = SPOForecaster(
        model,
        lambda paper: _quiet_reward(reward_args, paper, where),
        model_args.peft_config,
        where.world_size,
        where.sharding,
    )
    variant = Variant(config, dtype, quantised)
    if where.sharding:
        text = f"the denoiser is spread over {where.world_size} processes ({where.sharding}); predicted from its shapes, never measured on GPUs"
        report.add(MEMORY, NOTE, "shards", text)
        for problem in problems_of_settings(config):
            report.add(SETTINGS, PROBLEM, "shards", f"with {where.sharding}: {problem}")
        if quantised is not None:
            report.add(SETTINGS, PROBLEM, "shards", "a quantised denoiser cannot be spread: leave out one of the two.")
    report_memory(report, forecaster.forecast, variant, card, pipeline.denoiser_name)
    if num_prompts or config.max_steps > 0:
        report_work(report, works, num_prompts, config)
        report_time(report, works, forecaster.networks(variant), config, where)


def _check_pipeline(report: Report, pipeline: SPOPipeline, config) -> None:
    """
    Raises:
        ValueError: as the trainer would, for settings that the model family does not take.
    """
    pipeline.configure(guidance_rescale=config.guidance_rescale, clip_skip=config.clip_skip)
    pipeline.check_negative_prompt(config.negative_prompt)
    pipeline.step_rule.set_sampler(config.sampler)
    pipeline.check_eta(config.eta)
    settings = _settings(pipeline, config)
    lengths = branch_lengths(
        pipeline, settings.branch_start_step, settings.end, settings.num_inner_steps, settings.eta
    )
    shape = pipeline.latent_shape(config.height, config.width)
    pixels = shape[-1] * pipeline.spatial_factor, shape[-2] * pipeline.spatial_factor
    text = f"{type(pipeline.sd_pipeline).__name__}, {pixels[0]} x {pixels[1]} pixels, {settings.num_inference_steps} steps, "
    text += f"{len(lengths)} branches from step {settings.branch_start_step} on"
    report.add(SETTINGS, OK, "rollout", text)


def _settings(pipeline: SPOPipeline, config):
    """The settings of a rollout, resolved on the schedule, which is set."""
    schedule = pipeline.set_timesteps(config.num_inference_steps, pipeline.latent_shape(config.height, config.width))
    return config.rollout_settings().resolve(pipeline.step_rule, schedule)


def describe_trained(pipeline: SPOPipeline, adapter: Any) -> str:
    """What is trained, in words."""
    count = sum(p.numel() for p in pipeline.denoiser.parameters() if p.requires_grad)
    if adapter is None:
        return f"the whole {pipeline.denoiser_name}, {count / 1e6:,.0f} million parameters"
    layers = sum(hasattr(module, "lora_A") for module in pipeline.denoiser.modules())
    return f"LoRA of rank {adapter.r} on {layers} layers, {count / 1e6:,.2f} million parameters"


def _reward(report: Report, reward_args, pipeline: SPOPipeline, where: Circumstances):
    if getattr(reward_args, "reward", None):
        report.add(
            MEMORY, NOTE, "reward", "is given by name; what such rewards take in memory and time is not counted"
        )
        return None, ""
    try:
        return reward_on_paper(reward_args, pipeline, where.hub.online)
    except Exception as reason:  # an unknown configuration, or one that does not suit the pipeline
        report.add(MEMORY, WARNING, "reward", f"its memory and time are not counted: {reason}.")
        return None, ""


def _quiet_reward(reward_args, pipeline: SPOPipeline, where: Circumstances):
    return _reward(Report(""), reward_args, pipeline, where)[0]


def report_work(report: Report, works: list[Work], num_prompts: int | None, config) -> None:
    """Steps, pairs and evaluations."""
    most, least = works[0], works[-1]
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    if config.max_steps > 0:
        text = f"{most.steps:,}, as `max_steps` says; that is {most.pairs:,} pairs from {most.prompts:,} to {least.prompts:,} prompts"
    else:
        text = f"{least.steps:,} to {most.steps:,}: {num_prompts:,} prompts x {config.num_train_epochs:g} give at most {most.pairs:,} pairs"
    report.add(WORK, NOTE, "optimizer steps", f"{text}; {per_step} pairs per step and device")
    text = f"{most.predictions:,} guided predictions and {most.decodes:,} scored images in rollouts"
    report.add(WORK, NOTE, "evaluations", text)
    report.add(
        WORK,
        NOTE,
        "pairs that count",
        f"ranges are for {least.share:.0%} to {most.share:.0%} of the pairs above the threshold; the share shows in the first log",
    )
    report.numbers["work"] = [vars(work) for work in works]


def report_time(report: Report, works: list[Work], networks: Networks, config, where: Circumstances) -> None:
    """Hours, from counted arithmetic and measured rates."""
    try:
        costs = network_tflop(networks, config)
    except Exception as error:  # a network that cannot be followed without values
        report.add(WORK, WARNING, "time", f"could not be predicted ({type(error).__name__})")
        return
    speed, source = 1.0, f"on one {MEASURED['gpu']}"
    if not where.planned and config.device.type == "cuda":
        speed = matrix_tflops(config.device) / MEASURED["matrix_tflops"]
        source = f"on this card, whose matrix products were measured now at {speed:.2f} times the speed of a {MEASURED['gpu']}"
    times = [seconds(work, costs, speed) / where.world_size for work in works]
    least, most = duration(min(times)), duration(max(times))
    text = f"{least} {source}" if least == most else f"{least} to {most} {source}"
    text += f", {where.world_size} of them" if where.world_size > 1 else ""
    report.add(WORK, NOTE, "time", text)
    how = "predicted: arithmetic of these networks, counted, over the rates that Stable Diffusion 1.5 reached on that card "
    how += "(docs/performance.md), without compilation"
    if not where.planned and config.device.type == "cpu":
        how += ". Of a CPU no rate is known"
    elif where.planned:
        how += "; another card has other rates"
    report.add(WORK, NOTE, "how it is known", how)
    report.numbers["time"] = {
        "seconds": times,
        "shares": [work.share for work in works],
        "tflop": costs,
        "source": source,
    }


def duration(value: float) -> str:
    """Seconds in a unit that suits them."""
    if value < 90:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"
