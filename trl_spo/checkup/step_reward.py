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

"""The check-up of `trl-spo step-reward`."""

import math

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..step_reward_trainer import StepRewardTrainer
from ..training.checkpointing import resume_from
from ..training.memory import denoiser_bytes, module_bytes, peak_activation_bytes
from ..training.memory_plan import autocast_of, frozen_bytes, give_gradients, make_fake, trained_bytes
from .circumstances import Circumstances, precision_of, read_shapes
from .data import SECTION, check_preferences
from .environment import check_devices, check_disk, check_trackers, check_versions
from .forecast import Card, Forecast, Networks, Phase, Variant, autocast_dtype, optimizer_share, uses_checkpointing
from .memory_report import MEMORY, report_memory
from .names import of_data, of_pipeline, of_reward
from .networks import NoConfiguration, PublishedModel, pipeline_on_paper, reward_on_paper
from .output import bytes_to_write, check_output
from .report import NOTE, PROBLEM, WARNING, Report


def check_step_reward(model_args, reward_args, data_args, config, where: Circumstances) -> Report:
    """
    Everything that can be said about the training of a reward model before it loads weights.

    Args:
        model_args (`DiffusionModelArguments`), reward_args (`RewardModelArguments`), data_args
            (`EvaluationDataArguments`), config ([`StepRewardConfig`]): as `trl-spo step-reward` has them.
        where ([`Circumstances`]): where it is planned.
    """
    report = Report("trl-spo step-reward")
    report.extend(check_versions())
    report.extend(check_devices(config, where.planned, where.on_cpu))
    report.extend(check_trackers(config))
    named = of_pipeline(model_args, config.model_init_kwargs) + of_reward(reward_args)
    named += of_data("dataset_name", config.dataset_name, "preference pairs")
    named += of_data("eval_dataset_name", data_args.eval_dataset_name, "preference pairs")
    report.extend(where.hub.look(named, where.planned))

    # The pairs.
    pairs = None
    if config.dataset_name is None:
        report.add(SECTION, PROBLEM, "dataset_name", "is missing: a reward model learns from pairs of images.")
    else:
        findings, pairs = check_preferences("dataset_name", config.dataset_name, config)
        report.extend(findings)
    if data_args.eval_dataset_name is not None:
        findings, _ = check_preferences("eval_dataset_name", data_args.eval_dataset_name, config, data_args.eval_split)
        report.extend(findings)

    # The networks, without weights.
    report.extend(check_output(config, resume_from(config), StepRewardTrainer.checkpoint_files))
    try:
        dtype, _ = precision_of(model_args, config.model_init_kwargs)
        model, note = read_shapes(model_args, config.model_init_kwargs, where.hub)
        forecaster = RewardForecaster(
            model, lambda pipeline: reward_on_paper(reward_args, pipeline, where.hub.online)[0], where.world_size
        )
        networks = forecaster.networks(Variant(config, dtype))
    except NoConfiguration as reason:
        report.add(MEMORY, WARNING, "networks", f"nothing is predicted: {reason}.")
        return report
    except (ImportError, TypeError, ValueError) as error:
        report.add("settings", PROBLEM, "model", str(error).strip().splitlines()[0])
        return report
    _report_steps(report, networks, pairs, config, where)
    if note:
        report.add(MEMORY, NOTE, "networks", note)
    name = networks.pipeline.denoiser_name
    report_memory(report, forecaster.forecast, Variant(config, dtype), where.card(config.device), name)
    return report


def _report_steps(report: Report, networks: Networks, pairs: int | None, config, where: Circumstances) -> None:
    """Steps, pairs, and what is written."""
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * where.world_size
    steps = config.max_steps if config.max_steps > 0 else math.ceil((pairs or 0) * config.num_train_epochs / per_step)
    text = f"{steps:,}, {per_step} pairs each, {steps * per_step:,} pairs in all"
    if pairs:
        text += f"; the data has {pairs:,}, so each is seen {steps * per_step / pairs:.1f} times"
    report.add("work", NOTE, "optimizer steps", text)
    report.numbers["work"] = {"steps": steps, "pairs_per_step": per_step, "pairs": pairs}
    size, what = bytes_to_write(config, trained_bytes(networks.trained), steps)
    report.extend(check_disk(config.output_dir, size, what))


class RewardForecaster:
    """
    Predicts the memory of training a reward model.

    Args:
        model ([`PublishedModel`]): classes and settings of the pipeline.
        make_reward (`Callable[[SPOPipeline], torch.nn.Module]`): makes the reward model on the meta device.
        world_size (`int`, *optional*, defaults to `1`): processes of the run.
    """

    def __init__(self, model: PublishedModel, make_reward, world_size: int = 1):
        self.model = model
        self.make_reward = make_reward
        self.world_size = world_size
        self._networks: dict[torch.dtype, Networks] = {}

    def networks(self, variant: Variant) -> Networks:
        """The networks as the run prepares them: the pipeline frozen, the reward model in float32."""
        if variant.dtype not in self._networks:
            pipeline = pipeline_on_paper(self.model, variant.dtype)
            pipeline.freeze()
            pipeline.denoiser.requires_grad_(False)
            reward = self.make_reward(pipeline).float()
            if variant.config.freeze_text_tower:
                reward.freeze_text_tower()
            networks = Networks(pipeline, reward, reward, FakeTensorMode(allow_non_fake_inputs=True))
            make_fake(networks.fake_mode, *networks.modules())
            give_gradients(reward, networks.fake_mode)
            self._networks[variant.dtype] = networks
        return self._networks[variant.dtype]

    def forecast(self, variant: Variant, card: Card | None = None) -> Forecast:
        """
        The memory of a run: predictions of both images of each pair, then a step of the reward model. What judges latents is
        counted by its weights alone.
        """
        networks, config = self.networks(variant), variant.config
        pipeline, reward = networks.pipeline, networks.reward
        trained = trained_bytes(reward)
        resident = {"reward model": module_bytes(reward)}
        resident["gradients"] = trained * (2 if self.world_size > 1 else 1)
        resident["optimizer states"] = int(optimizer_share(config) * trained)
        if config.relabel_preferences:
            resident["frozen copy of the reward model"] = module_bytes(reward)
        if reward.scores != "images":
            resident["VAE"] = module_bytes(pipeline.vae)
            notes = ("a training step of a reward that judges latents",)
            return Forecast(resident, [Phase("training step, weights alone", 0)], notes)
        resident |= {pipeline.denoiser_name: module_bytes(pipeline.denoiser), **frozen_bytes(pipeline)}
        phases = self._predictions(networks, config)
        with autocast_of(autocast_dtype(config), like_cuda=card is not None and card.device_type == "cuda"):
            phases.append(self._step(networks, config))
        return Forecast(resident, phases)

    def _predictions(self, networks: Networks, config) -> list[Phase]:
        """Noised images become predictions, in the precision of the pipeline."""
        pipeline, fake_mode = networks.pipeline, networks.fake_mode
        size = config.resolution
        pairs = min(config.prediction_batch_size or math.inf, config.per_device_train_batch_size)
        count = 2 * pairs
        shape = pipeline.latent_shape(size, size)
        pipeline.set_timesteps(20, shape)
        with fake_mode:
            embeds = networks.embeds(1)
            images = torch.zeros(count, 3, size, size)
            latents = torch.zeros(count, *shape)
        options = {"device": torch.device("cpu"), "fake_mode": fake_mode}
        guided = denoiser_bytes(pipeline, embeds, shape, config.guidance_scale, count, **options)
        encoded = peak_activation_bytes(pipeline.image_posterior, images, fake_mode=fake_mode)
        decoded = peak_activation_bytes(pipeline.decode_latents, latents, fake_mode=fake_mode)
        return [
            Phase("encode images", encoded, count, "images"),
            Phase(f"predict, {pipeline.denoiser_name}", guided, count, "latents"),
            Phase("decode predictions", decoded, count, "images"),
        ]

    def _step(self, networks: Networks, config) -> Phase:
        """Forward and backward of the reward model on both images of each pair."""
        reward = networks.reward
        pairs = config.per_device_train_batch_size
        if uses_checkpointing(config):
            reward.gradient_checkpointing_enable()
        else:
            reward.gradient_checkpointing_disable()
        reward.train()
        places = reward.config.clip_config.text_config.max_position_embeddings

        def step():
            images = torch.zeros(2 * pairs, 3, config.resolution, config.resolution)
            ids = torch.zeros(2 * pairs, places, dtype=torch.long)
            timesteps = torch.zeros(2 * pairs, dtype=torch.long)
            reward(images, timesteps=timesteps, input_ids=ids).scores.float().sum().backward()

        size = peak_activation_bytes(step, fake_mode=networks.fake_mode)
        return Phase("training step" + (", checkpointing" if uses_checkpointing(config) else ""), size, pairs, "pairs")
