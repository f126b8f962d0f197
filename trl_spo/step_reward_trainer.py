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
Training of the reward models that judge single denoising steps: the step-aware reward model of SPO
(https://huggingface.co/papers/2406.04314, section 3.2) and the latent reward model of LPO
(https://huggingface.co/papers/2502.01051, section 4).
"""

import copy
import json
import os
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.utils import logging

from .losses import caption_contrastive_loss, step_preference_loss
from .model_cards import hub_id
from .noised_pairs import noised_pairs
from .pipelines.auto import wrap_pipeline
from .pipelines.components import changes_of_the_base, unwrapped
from .pipelines.encoding_cache import EncodingCache
from .pipelines.reward_adapter import REWARD_ADAPTER
from .preference_collator import StepPreferenceCollator
from .preference_dataset import check_images, load_preference_dataset, prepare_preference_dataset
from .preference_labels import preference_labels, score_clean_images
from .rewards.base import is_reward_model, load_reward_model, wrap_reward
from .rewards.inputs import StepRewardOutput, freeze, thaw
from .step_reward_config import StepRewardConfig
from .streamed_pairs import StreamedPairs, WithPlace
from .training.base import StepTrainer
from .training.checkpointing import CheckpointFiles
from .training.gather import gather_rows
from .training.model_card import step_reward_model_card
from .training.numerics import NonFiniteGuard, SkipNonFiniteSteps, is_finite
from .training.running_means import RunningMeans, gather_from_processes
from .training.sharding import check_zero3_of_a_reward


logger = logging.get_logger(__name__)

STATE_NAME = "step_reward_state.json"
# These keep the random numbers of training and evaluation apart.
TRAIN = 0
EVAL = 1


class _PositionCallback(TrainerCallback):
    """Keeps what the Trainer does not store in a checkpoint: the pass over a stream, and the loss since the last log."""

    def __init__(self, trainer: "StepRewardTrainer"):
        self.trainer = trainer
        self.start()

    def start(self, epoch: int = -1, first_step: int = 0, last_logged_step: int | None = None, loss: float = 0.0):
        self.epoch = epoch
        self.first_step = first_step
        self.last_logged_step = last_logged_step
        self.loss = self.carried_loss = loss  # since the last log; the part of it from before the checkpoint
        self.inside_epoch = epoch >= 0

    def on_train_begin(self, args, state, control, **kwargs):
        if self.last_logged_step is not None:
            self.trainer._globalstep_last_logged = self.last_logged_step

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer._is_streamed and not self.inside_epoch:  # the one that is resumed has begun already
            self.epoch += 1
            self.first_step = state.global_step
        self.inside_epoch = False

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer._stream is not None:  # a stream that resumes at its place: the Trainer has skipped nothing
            state.epoch = state.global_step / state.max_steps

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.loss = 0.0


class StepRewardTrainer(StepTrainer):
    r"""
    Trainer of reward models for single denoising steps: preferences between finished images, learnt on what these look
    like at a random timestep.

    For each pair one timestep and one noise are drawn. A [`LatentRewardModel`] scores the two noised latents. For a
    [`StepAwareRewardModel`], the reward model of [SPO](https://huggingface.co/papers/2406.04314), both pass the frozen
    diffusion model in one batch and become predictions of the clean image. The loss is the cross entropy of the two
    scores against the label ([`step_preference_loss`]), each pair weighted by `1 / num_example_per_prompt`. Weights
    are normalised over the whole optimizer step, accumulation and processes included, so that splitting a batch
    differently does not change the gradient.

    The random numbers of a step come from the seed, the number of the step and the process, so a resumed run draws
    what the uninterrupted one would have drawn.

    Args:
        config ([`StepRewardConfig`]):
            Configuration of the training.
        pipeline:
            The diffusion model whose predictions, or latents, are to be judged; anything [`wrap_pipeline`] accepts. It is
            not changed.
        reward_model ([`StepAwareRewardModel`], [`LatentRewardModel`] or `str`):
            The model to train, or the folder or Hub id of one. Start from [`StepAwareRewardModel.from_clip`] or
            [`LatentRewardModel.from_pipeline`]. Trained in float32 (under autocast with `bf16` or `fp16`), since steps of
            3e-6 vanish in half precision weights.
        train_dataset (`datasets.Dataset`, `datasets.IterableDataset` or `list[dict]`, *optional*):
            Image pairs in Pick-a-Pic's or TRL's preference format. Defaults to `config.dataset_name`.
        eval_dataset (the same or a `dict` of them, *optional*):
            Pairs to evaluate on. Ties do not count in the accuracy.
        data_collator (`Callable`, *optional*):
            Defaults to [`StepPreferenceCollator`].
        callbacks (`list[TrainerCallback]`, *optional*):
            Callbacks of the training loop.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning rate scheduler.
        preference_model ([`StepAwareRewardModel`] or `Callable`, *optional*):
            With `config.relabel_preferences`, whose preferences become the labels: a reward model of images, asked at
            timestep 0, or a callable `(images (B, 3, H, W) in [0, 1], prompts) -> scores (B,)`. Defaults to a frozen copy
            of `reward_model` as it is given; one fresh from PickScore labels as PickScore does. It is not trained.

    Example:

    ```python
    from datasets import load_dataset

    from trl_spo import StepAwareRewardModel, StepRewardConfig, StepRewardTrainer

    trainer = StepRewardTrainer(
        StepRewardConfig(output_dir="step-reward", bf16=True),
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        StepAwareRewardModel.from_clip(
            "yuvalkirstain/PickScore_v1", processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        ),
        train_dataset=load_dataset("yuvalkirstain/pickapic_v1", split="train"),
    )
    trainer.train()
    trainer.save_model()  # a folder for `StepAwareRewardModel.from_pretrained`
    ```
    """

    _tag_names = ["trl", "spo", "step-aware-reward-model"]
    _name = "SPO step-aware reward model"
    checkpoint_files = CheckpointFiles(foreign=("spo_state.json",), record=STATE_NAME)
    _nonfinite_metric = "nonfinite_pairs"

    def __init__(
        self,
        config: StepRewardConfig,
        pipeline: Any,
        reward_model: PreTrainedModel | str,
        train_dataset: Any | None = None,
        eval_dataset: Any | None = None,
        data_collator: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        preference_model: Any | None = None,
    ):
        config = self.own_config(config, StepRewardConfig)
        reward_model = unwrapped(reward_model) if isinstance(reward_model, torch.nn.Module) else reward_model
        self._check(config, reward_model, train_dataset, eval_dataset, preference_model)
        train_dataset = self._training_data(config, train_dataset)
        self._stream = self._stream_of(config, train_dataset)
        config.ignore_data_skip = config.ignore_data_skip or self._stream is not None
        reward_model = self._load(config, pipeline, reward_model)
        self._prepare(config, reward_model, preference_model)
        super().__init__(
            model=reward_model,
            args=config,
            data_collator=data_collator or self._collator(config),
            train_dataset=train_dataset,
            eval_dataset=_prepare(eval_dataset, config),
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._start(config)
        self._add_callbacks()

    # --- the stages of setting up ------------------------------------------------------------------------------------

    def _check(self, config: StepRewardConfig, reward_model, train_dataset, eval_dataset, preference_model) -> None:
        """Check what can be checked before anything is loaded."""
        on = ("1", "true", "yes")
        switches = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
        if config.world_size > 1 and all(os.environ.get(name, "").lower() in on for name in switches):
            raise ValueError(
                "With `fsdp_cpu_ram_efficient_loading: true`, which is accelerate's default, transformers may load models "
                "in the first process only (version 4 does): text encoders in the other processes would have no weights. "
                "Set it to false, as in the configuration 'fsdp' of `trl-spo step-reward --accelerate_config`."
            )
        check_zero3_of_a_reward(config)
        self.check_output(config)
        trainable = isinstance(reward_model, PreTrainedModel) and is_reward_model(reward_model)
        if not isinstance(reward_model, (str, Path)) and not trainable:
            raise ValueError(
                "`reward_model` must be a StepAwareRewardModel, a LatentRewardModel or a path, got "
                f"{type(reward_model).__name__}."
            )
        if train_dataset is None and eval_dataset is None and config.dataset_name is None:
            raise ValueError("There are no image pairs: pass `train_dataset` or set `dataset_name` in the config.")
        if preference_model is not None and not config.relabel_preferences:
            raise ValueError("`preference_model` is used with `relabel_preferences=True` only; set it in the config.")
        if preference_model is not None and not callable(preference_model):
            raise ValueError(
                "`preference_model` must be a StepAwareRewardModel or a callable `(images, prompts) -> scores`, got "
                f"{type(preference_model).__name__}."
            )

    def _load(self, config: StepRewardConfig, pipeline, reward_model) -> PreTrainedModel:
        """Reward model and pipeline, and whether they fit the settings and each other."""
        if isinstance(reward_model, (str, Path)):
            reward_model = load_reward_model(reward_model)
        self.pipeline = wrap_pipeline(pipeline, **(config.model_init_kwargs or {}))
        self.pipeline.check_weights()
        self.pipeline.configure(guidance_rescale=config.guidance_rescale, clip_skip=config.clip_skip)
        reward = wrap_reward(reward_model)
        reward.check_pipeline(self.pipeline)
        if config.caption_loss_coef > 0 and not getattr(reward_model, "compares_embeddings", True):
            raise ValueError(
                "`caption_loss_coef` compares embeddings of images and captions, and the head of this "
                f"{type(reward_model).__name__} makes none. Leave it at 0."
            )
        self.sees = reward.sees
        self._reads_with_pipeline = getattr(reward_model, "reads_with_pipeline", False)
        if self.sees != "images":
            self._tag_names = ["trl", "spo", "latent-reward-model"]
            self._name = "LPO latent reward model"
        self._check_timesteps(config, reward_model)
        self.pipeline.check_negative_prompt(config.negative_prompt)
        try:
            self.pipeline.latent_shape(config.resolution, config.resolution)
        except ValueError as error:
            raise ValueError(f"`resolution={config.resolution}` does not suit the pipeline: {error}") from error
        return reward_model

    def _prepare(self, config: StepRewardConfig, reward_model: PreTrainedModel, preference_model) -> None:
        """Precision and frozen parts of the reward model, and the model whose preferences become labels."""
        if config.relabel_preferences and preference_model is None and self.sees != "images":
            raise ValueError(
                "`relabel_preferences` asks the model that is trained for labels unless another is given, and this "
                f"{type(reward_model).__name__} judges latents, not finished images. Pass a `preference_model` of images."
            )
        thaw(reward_model.float())  # it may have judged another run, or trained without its text tower
        if config.relabel_preferences and (preference_model is None or preference_model is reward_model):
            preference_model = copy.deepcopy(reward_model)
        if isinstance(preference_model, torch.nn.Module):
            freeze(preference_model).eval().to(config.device)
        self.preference_model = preference_model
        self.encoding_cache = EncodingCache(int(config.cache_latents_gb * 2**30)) if config.cache_latents else None
        if config.freeze_text_tower:
            freeze(reward_model, reward_model.freeze_text_tower)
        if config.accelerator_config.dispatch_batches is None:
            # Every process reads a stream for itself: accelerate's default sends batches of tensors from one process
            # to the others, and ours hold prompts.
            config.accelerator_config.dispatch_batches = False

    @staticmethod
    def _training_data(config: StepRewardConfig, train_dataset):
        """The pairs to train on, checked; those of the config if none are given."""
        if train_dataset is None and config.dataset_name is not None:
            train_dataset = load_preference_dataset(config.dataset_name, streaming=config.dataset_streaming)
        return _prepare(train_dataset, config, training=True)

    @staticmethod
    def _stream_of(config: StepRewardConfig, train_dataset) -> StreamedPairs | None:
        """The pairs of `dataset_streaming`; other streams are read as the Trainer does, in their own order."""
        if not config.dataset_streaming or not isinstance(train_dataset, datasets.IterableDataset):
            return None
        workers = config.dataloader_num_workers
        return StreamedPairs(train_dataset, config.process_index, config.world_size, workers, config.seed)

    @staticmethod
    def _collator(config: StepRewardConfig) -> StepPreferenceCollator:
        return StepPreferenceCollator(
            config.resolution,
            config.dataset_prompt_column,
            config.max_bad_image_fraction,
            keep_unlabelled=config.relabel_preferences,
            image_keys=config.cache_latents,
            background=config.image_background,
        )

    def _start(self, config: StepRewardConfig) -> None:
        """The state of a run that has not begun, and what needs to know how the Trainer runs."""
        # FSDP and DeepSpeed cannot shard parameters without dimensions, so `logit_scale` has shape (1,) in training and is
        # saved as ().
        self._scalars_are_1d = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self._scalars = [name for name, value in self.model.named_parameters() if value.ndim == 0]
        if self._scalars_are_1d:
            for name in self._scalars:
                scale = self.model.get_parameter(name)
                scale.data = scale.data.reshape(1)
        # `compute_loss` divides by `num_items_in_batch` itself, see `_get_num_items_in_batch`.
        self.model_accepts_loss_kwargs = True
        self.model.add_model_tags(self._tag_names)
        # Noised latents need the VAE alone, unless prompts are read with the pipeline; the rest would take memory for nothing.
        only_encodes = self.sees == "noisy_latents" and not self._reads_with_pipeline
        needed = self.pipeline.vae if only_encodes else self.pipeline
        needed.to(self.accelerator.device)
        for module in (self.pipeline.denoiser, *self.pipeline.frozen_modules().values()):
            module.eval()
        self.guard = NonFiniteGuard(
            config.max_nonfinite_fraction,
            "Check the VAE and the denoiser of the pipeline: in float16 they may overflow where bfloat16 or float32 do "
            "not (SDXL's VAE does).",
        )
        self._last_step = self._micro_step = -1
        self._eval_batch = 0
        self._prepare_metrics()

    def _add_callbacks(self) -> None:
        self.add_callback(SkipNonFiniteSteps(self))
        self._position = _PositionCallback(self)
        self.add_callback(self._position)

    def _check_timesteps(self, config: StepRewardConfig, reward_model: PreTrainedModel):
        limit = min(self.pipeline.num_train_timesteps, reward_model.config.num_train_timesteps)
        drawn = [config.max_timestep] if config.timesteps is None else config.timesteps
        largest = max(*drawn, *config.eval_timesteps)
        if largest >= limit:
            raise ValueError(
                f"Timestep {largest} is out of range: pipeline and reward model know timesteps up to {limit - 1}. "
                "Lower `max_timestep`, `timesteps` or `eval_timesteps`."
            )
        if self.sees == "images":  # of predictions
            self.pipeline.step_rule.check_predictable([*drawn, *config.eval_timesteps])

    def _prepare_metrics(self):
        self._metrics = RunningMeans()
        self._eval_means = RunningMeans()
        # Accuracy is logged for ranges of timesteps of equal width, each with the first one after it.
        count = self.args.accuracy_timestep_bins
        edges = [round(i * self.pipeline.num_train_timesteps / count) for i in range(count + 1)]
        self._bins = {}
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            self._bins[f"accuracy/t_{low}_{high - 1}"] = (low, high)

    # ---- randomness ----

    def _generator(self, *numbers: int) -> torch.Generator:
        """A generator that depends on the seed, the process and `numbers` only. On the CPU: the same on every device."""
        entropy = [self.args.seed, self.args.process_index, *numbers]
        seed = np.random.SeedSequence(entropy).generate_state(1, dtype=np.uint64)[0] >> np.uint64(1)
        return torch.Generator().manual_seed(int(seed))

    def _next_train_generator(self) -> torch.Generator:
        step = self.state.global_step
        self._micro_step = self._micro_step + 1 if step == self._last_step else 0
        self._last_step = step
        return self._generator(TRAIN, step, self._micro_step)

    def _draw_timesteps(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:  # (B,) int64
        if self.args.timesteps is None:
            return torch.randint(
                self.args.min_timestep, self.args.max_timestep + 1, (batch_size,), generator=generator
            )
        choices = torch.tensor(self.args.timesteps)
        return choices[torch.randint(len(choices), (batch_size,), generator=generator)]

    # ---- training ----

    def get_train_dataloader(self) -> DataLoader:
        """That of the Trainer; of a stream, one that tells the place behind each batch."""
        if self._stream is None:
            return super().get_train_dataloader()
        args = self.args
        return DataLoader(
            self._stream,
            batch_size=self._train_batch_size,
            collate_fn=WithPlace(self.data_collator),
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
        )

    def _score_pairs(
        self, model, inputs: dict[str, Any], timesteps: torch.Tensor, generator: torch.Generator
    ) -> tuple[StepRewardOutput, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Noises and scores both images of each pair, and predicts them where the reward model judges predictions. Returns
        the output on (2B) samples, two (B,) scores, and whether both samples of each pair are finite (B,); the reward
        model sees blank ones instead of those that are not.
        """
        # The pipeline computes in its own precision, as it does in SPO's rollout.
        with torch.autocast(self.accelerator.device.type, enabled=False):
            samples = noised_pairs(
                self.pipeline,
                inputs,
                timesteps,
                guidance_scale=self.args.guidance_scale,
                generator=generator,
                negative_prompt=self.args.negative_prompt,
                prediction_batch_size=self.args.prediction_batch_size,
                cache=self.encoding_cache,
                sees=self.sees,
                independent_noise=self.args.independent_noise,
            )
        samples = torch.cat(samples)
        finite = is_finite(samples)
        samples = torch.where(finite[:, None, None, None], samples, 0.0)
        output = model(samples, timesteps=timesteps.repeat(2), **self._texts(inputs["prompts"]))
        return output, *output.scores.chunk(2), finite.view(2, -1).all(0)

    def _texts(self, prompts: list[str]) -> dict[str, Any]:
        """What the reward model is given to read, twice: the prompts, or their features if these never change."""
        frozen = self.args.freeze_text_tower or self._reads_with_pipeline
        if self.encoding_cache is None or not frozen:
            return {"prompts": prompts * 2}
        model = self.accelerator.unwrap_model(self.model)
        with torch.no_grad(), torch.autocast(self.accelerator.device.type, enabled=False):
            features = self.encoding_cache.encode_texts(model, prompts)
        rows = torch.arange(len(prompts), device=model.device).repeat(2)
        return {"text_features": features[rows]}

    def _relabel(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with the labels of the preference model, if the config asks for them."""
        if not self.args.relabel_preferences:
            return inputs
        images = torch.cat([inputs["images_0"], inputs["images_1"]])
        with torch.autocast(self.accelerator.device.type, enabled=False):
            scores = score_clean_images(self.preference_model, images, inputs["prompts"] * 2)
        labels = preference_labels(*scores.to(images.device).chunk(2), self.args.relabel_tie_band)
        return {**inputs, "label_0": labels[0], "label_1": labels[1]}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = self._relabel(inputs)
        generator = self._next_train_generator()
        timesteps = self._draw_timesteps(len(inputs["prompts"]), generator)
        output, scores_0, scores_1, finite = self._score_pairs(model, inputs, timesteps, generator)
        label_0, label_1 = inputs["label_0"], inputs["label_1"]

        # The sum over the step still counts those that are not finite, so the rest keeps the weight it has.
        weights = torch.where(finite, inputs["weights"], 0.0)
        losses = step_preference_loss(scores_0, scores_1, label_0, label_1)  # (B,)
        if model.training:
            samples = "predicted images" if self.sees == "images" else self.sees.replace("_", " ")
            self.guard.watch(samples, finite, timesteps, inputs["prompts"])
            self.guard.watch("scores", losses.isfinite(), timesteps, inputs["prompts"], again=True)
        if self.args.caption_loss_coef > 0:
            caption_losses = self._caption_losses(output, inputs, weights > 0)
            self._metrics.add("preference_loss", losses, weights)
            self._metrics.add("caption_loss", caption_losses, weights)
            losses = losses + self.args.caption_loss_coef * caption_losses
        total_weight = weights.sum() if num_items_in_batch is None else num_items_in_batch
        loss = (weights * losses).sum() / total_weight.clamp(min=torch.finfo(torch.float32).tiny)

        # Metrics of the pairs, over all timesteps and by range of timesteps.
        pairs = torch.stack([scores_0, scores_1, label_0, label_1, weights], dim=-1).detach()
        correct, untied = self._record(self._metrics, pairs)
        timesteps = timesteps.to(correct.device)
        for name, (low, high) in self._bins.items():
            self._metrics.add(name, correct, untied & (timesteps >= low) & (timesteps < high))
        return (loss, output) if return_outputs else loss

    def _caption_losses(self, output: StepRewardOutput, inputs: dict[str, Any], present: torch.Tensor) -> torch.Tensor:
        """
        Contrastive loss of the preferred image of each pair (image 0 of a tie), shape (B,). The pairs of all processes
        are each other's negatives, so that the loss does not depend on the number of processes.
        """
        embeds_0, embeds_1 = output.image_embeds.chunk(2)
        preferred = torch.where((inputs["label_1"] > inputs["label_0"])[:, None], embeds_1, embeds_0)
        text_embeds = output.text_embeds.chunk(2)[0]
        prompts = inputs["prompts"]
        if self.args.world_size == 1:
            return caption_contrastive_loss(preferred, text_embeds, output.logit_scale, prompts, present)

        own = torch.stack([preferred, text_embeds], dim=1)
        everything, first = gather_rows(own)
        present, _ = gather_rows(present)
        prompts = list(chain.from_iterable(gather_from_processes(prompts)))
        losses = caption_contrastive_loss(*everything.unbind(1), output.logit_scale, prompts, present)
        return losses[first : first + len(own)]

    def _record(self, means: RunningMeans, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Adds pairs to the metrics. `pairs (B, 5)` holds scores_0, scores_1, label_0, label_1, weight. Returns whether
        each pair is ordered as labelled, and whether it is not a tie, both (B,).
        """
        scores = pairs[:, :2]
        preference = pairs[:, 2] - pairs[:, 3]
        present = pairs[:, 4] > 0
        untied = (preference != 0) & present
        margins = (scores[:, 0] - scores[:, 1]) * preference.sign()
        correct = margins > 0
        means.add("accuracy", correct, untied)
        means.add("margin", margins, untied)
        means.add("mean_reward", scores, present[:, None].expand_as(scores))
        means.add("min_reward", scores.min(), present.any())
        means.add("max_reward", scores.max(), present.any())
        return correct, untied

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device) -> torch.Tensor:
        """Weight of all pairs of an optimizer step, per process because gradients are averaged over processes."""
        if not batch_samples:  # a stream has come to its end
            return None
        total = torch.stack([batch["weights"].sum() for batch in batch_samples]).sum().to(device)
        if self.args.world_size > 1:
            total = self.accelerator.gather(total).sum() / self.args.world_size
        return total

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:  # a logging step of the training loop, not its summary and not an evaluation
            logs.update({"nonfinite_pairs": 0, "skipped_steps": 0, **self._metrics.pop()})
        super().log(logs, *args, **kwargs)

    # ---- saving and loading ----

    def training_step(self, model, inputs: dict[str, Any], *args, **kwargs) -> torch.Tensor:
        if "place" in inputs:
            self._stream.has_been_trained_on(inputs.pop("place"))
        loss = super().training_step(model, inputs, *args, **kwargs)
        position = self._position
        position.loss = position.loss + torch.where(loss.isfinite(), loss, 0.0)
        if position.carried_loss:  # the next log is about the steps before the checkpoint, too
            loss = loss + position.carried_loss
            position.carried_loss = 0.0
        return loss

    def _write_model(self, folder: Path, output_dir: Path, state_dict: dict | None = None) -> None:
        """What the parent saves, and a model card. Text encoders of the pipeline, which never change, are in no checkpoint."""
        self.model.save_reader = not self._staging
        if self._scalars_are_1d and self.args.should_save:
            state_dict = dict(self.model.state_dict() if state_dict is None else state_dict)
            state_dict |= {name: state_dict[name].reshape(()) for name in self._scalars}
        Trainer._save(self, str(folder), state_dict)
        if self.args.should_save:
            self._write_model_card(folder, output_dir)

    def _write_state(self, folder: Path) -> None:
        own = {"loss": float(self._position.loss), "metrics": self._metrics.state_dict()}
        if self._stream is not None:
            own["stream"] = self._stream.state_dict()
        processes = gather_from_processes(own)
        if not self.args.should_save:
            return
        state = {
            "epoch": self._position.epoch,
            "first_step_of_epoch": self._position.first_step,
            "last_logged_step": self._globalstep_last_logged,
            "num_pairs": None if self._is_streamed else len(self.train_dataset),
            "processes": processes,
        }
        (folder / STATE_NAME).write_text(json.dumps(state))

    def _read_state(self, folder: str | None) -> bool:
        self._last_step = self._micro_step = -1
        self._position.start()
        self._metrics.clear()
        if self._stream is not None:
            self._stream.restart()
        if folder is None:
            return False
        if not (Path(folder) / STATE_NAME).is_file():
            logger.warning(f"{folder!r} has no {STATE_NAME}: the next log is about the steps from here on only.")
            return False
        state = json.loads((Path(folder) / STATE_NAME).read_text())
        if not self._is_streamed and state.get("num_pairs") not in (None, len(self.train_dataset)):
            raise ValueError(
                f"{folder!r} was written with {state['num_pairs']} other pairs than the {len(self.train_dataset)} of this run, so "
                "its position means nothing here. Resume with the same `train_dataset` and filters."
            )
        processes = state["processes"]
        mine = processes[self.args.process_index :: self.args.world_size]  # of several, if there are fewer now
        loss = sum(process["loss"] for process in mine or processes) / len(mine or processes)
        self._position.start(state["epoch"], state["first_step_of_epoch"], state["last_logged_step"], loss)
        self._metrics.load_state_dict(*[_metrics_of(process, state) for process in mine])
        if self._stream is not None:
            self._stream.load_state_dicts([_stream_state(process, state) for process in processes])
        elif self._is_streamed and state["epoch"] > 0 and not hasattr(Trainer, "_init_training_state"):
            raise ValueError(
                f"{folder!r} is in pass {state['epoch'] + 1} over a stream, and this version of transformers resumes in "
                "the first one only. Upgrade transformers to version 5."
            )
        return False

    @property
    def _is_streamed(self) -> bool:
        return not hasattr(self.train_dataset, "__len__")

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        """Passes over the data, and batches of the current one, before a checkpoint; counted here, as streams have no length."""
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        has_place = not self._is_streamed or self._stream is not None
        if resume_from_checkpoint is None or has_place or self._position.epoch < 0:
            return position
        steps = self.state.global_step - self._position.first_step
        return self._position.epoch, steps * self.args.gradient_accumulation_steps

    def _model_card(self, name: str, output_dir: Path) -> str:
        model = self.accelerator.unwrap_model(self.model)
        diffusion = self.pipeline.sd_pipeline
        return step_reward_model_card(
            self.args,
            name=name,
            base_model=hub_id(model.config.name_or_path) or model.config.base_model,
            description=model.describe(),
            pipeline=None if self._base_is_changed() else getattr(diffusion, "name_or_path", None),
            global_step=self.state.global_step,
            log_history=self.state.log_history,
            parts=self.run_record.parts if self.run_record is not None else (),
            tags=self._tag_names,
        )

    def _base_is_changed(self) -> bool:
        """Whether the predictions or latents that were judged are those of another model than the pipeline's name says."""
        networks = (self.pipeline.denoiser, *self.pipeline.text_encoders().values())
        adapters = set()
        for network in networks:
            adapters |= set(getattr(network, "peft_config", {}))
        adapted = bool(adapters - {REWARD_ADAPTER})  # a reward's own adapter is off when latents are made
        return adapted or changes_of_the_base(self.pipeline.sd_pipeline) != ""

    # ---- evaluation ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        r"""
        Measures how often the reward model orders pairs as labelled, at each of `config.eval_timesteps`. The noise is
        seeded, so that evaluations of one run are comparable.

        Returns:
            `dict` with `eval_loss`, `eval_accuracy` (mean over the timesteps), `eval_accuracy/t_{t}`, `eval_margin`,
            `eval_mean_reward`, `eval_min_reward`, `eval_max_reward`.
        """
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = _prepare(eval_dataset, self.args)
        return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._eval_batch = 0
        self._eval_means.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._eval_means.pop()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._relabel(self._prepare_inputs(inputs))
        label_0, label_1 = inputs["label_0"], inputs["label_1"]
        losses = []
        pairs = []
        eval_timesteps = list(dict.fromkeys(self.args.eval_timesteps))
        for timestep in eval_timesteps:
            timesteps = torch.full((len(inputs["prompts"]),), timestep)
            generator = self._generator(EVAL, self._eval_batch, timestep)
            with self.compute_loss_context_manager():
                _, scores_0, scores_1, finite = self._score_pairs(model, inputs, timesteps, generator)
            loss = step_preference_loss(scores_0, scores_1, label_0, label_1)
            finite = finite & loss.isfinite()
            left_out = [prompt for prompt, good in zip(inputs["prompts"], finite.tolist(), strict=True) if not good]
            if left_out:
                logger.warning(f"Left out of the evaluation at timestep {timestep}, not finite: {left_out[:3]}.")
            losses.append(torch.where(finite, loss, 0.0).sum() / finite.sum().clamp(min=1))
            kept = torch.where(finite, inputs["weights"], 0.0)
            pairs.append(torch.stack([scores_0, scores_1, label_0, label_1, kept], dim=-1))
        self._eval_batch += 1
        for timestep, of_timestep in zip(eval_timesteps, self._gather_pairs(torch.stack(pairs)), strict=True):
            correct, untied = self._record(self._eval_means, of_timestep)
            self._eval_means.add(f"accuracy/t_{timestep}", correct, untied)
        return torch.stack(losses).mean(), None, None

    def _gather_pairs(self, pairs: torch.Tensor) -> torch.Tensor:
        """
        The pairs `(T, B, 5)` of all processes, without those that only fill up the last batch. Gathered as objects,
        since processes that skipped broken images have fewer.
        """
        if self.args.world_size == 1:
            return pairs
        rows = self.accelerator.gather_for_metrics(list(pairs.cpu().unbind(1)), use_gather_object=True)
        return torch.stack([row.to(pairs.device) for row in rows], dim=1)


def _metrics_of(process: dict, state: dict) -> dict[str, list]:
    """What a process had not logged when a checkpoint was written. Old versions kept names and counts apart."""
    if "metrics" in process:
        return process["metrics"]
    means = {name: [*sums, "mean"] for name, sums in zip(state["averages"], process["averages"], strict=True)}
    nonfinite, skipped = process["counts"]
    return {**means, "nonfinite_pairs": [nonfinite, 0, "sum"], "skipped_steps": [skipped, 0, "sum"]}


def _stream_state(process: dict[str, Any], state: dict[str, Any]) -> dict[str, Any] | None:
    """Where a process was in a stream; older checkpoints have one place for each process."""
    if process.get("place") is not None:
        return {"num_shards": state["num_shards"], "places": [process["place"]], "next": 0}
    return process.get("stream")


def _prepare(dataset: Any, config: StepRewardConfig, training: bool = False) -> Any:
    """Checked and filtered pairs. The sample of images is looked at, and pairs are limited, for training only."""
    if dataset is None:
        return None
    if isinstance(dataset, dict) and not training:
        return {name: _prepare(part, config, training) for name, part in dataset.items()}
    dataset = prepare_preference_dataset(
        dataset,
        config.dataset_prompt_column,
        only_different=config.only_different and training,
        max_pairs_per_prompt=config.max_pairs_per_prompt if training else None,
        drop_unlabelled=not config.relabel_preferences,
    )
    if training and config.num_checked_rows > 0:
        check_images(dataset, config.num_checked_rows, config.max_bad_image_fraction, config.dataset_prompt_column)
    return dataset
