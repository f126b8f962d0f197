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
Keep an exponential moving average of the trained weights, which transformers and TRL do not offer. The average itself is
`diffusers.training_utils.EMAModel`; the trainers use it through one context, `weights_for_evaluation`.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.utils import logging

from .checkpointing import CheckpointingMixin


logger = logging.get_logger(__name__)

EMA_NAME = "ema_training_weights.safetensors"


class AveragedWeightsMixin:
    """
    Mixin that makes a `transformers.Trainer` evaluate and save the average of its weights, if an [`EMACallback`] keeps one.
    List it before `Trainer` in the bases.

    Evaluation, prediction and saving happen inside [`~AveragedWeightsMixin.weights_for_evaluation`], training and
    rollouts outside of it. A subclass that has an `evaluate` or a loader of its own, or another method that asks the
    model for results, enters the context itself and calls `average_from_checkpoint` and `average_from_weights` itself.

    Attributes:
        ema ([`EMACallback`] or `None`): the average; `None`: the trainer has none, and the context changes nothing.
    """

    ema: "EMACallback | None" = None

    def weights_for_evaluation(self) -> contextlib.AbstractContextManager:
        """A context in which the model holds the averaged weights. It may be entered again inside of itself."""
        return contextlib.nullcontext() if self.ema is None else self.ema.average()

    def average_from_checkpoint(self, folder: str | Path) -> None:
        """Called when the weights of a checkpoint have been loaded for resuming."""
        if self.ema is not None:
            self.ema.resume(folder)

    def average_from_weights(self) -> None:
        """Called when other weights, such as the best ones, have been loaded: they are the average from now on."""
        if self.ema is not None:
            self.ema.adopt()

    def evaluate(self, *args, **kwargs):
        with self.weights_for_evaluation():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        with self.weights_for_evaluation():
            return super().predict(*args, **kwargs)

    def _save(self, *args, **kwargs) -> None:
        with self.weights_for_evaluation():
            super()._save(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, *args, **kwargs) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        self.average_from_checkpoint(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.average_from_weights()


class EMACallback(TrainerCallback):
    r"""
    Keeps an exponential moving average of the trained parameters. Evaluation, `generate`, checkpoints and `save_model`
    use the average, rollouts and optimizer steps the weights themselves; after training the model holds the average.
    Other callbacks see the average in `on_evaluate`, and the weights of training in `on_step_end` and `on_save`.

    The average after step n is `decay_n * average + (1 - decay_n) * weights` with `decay_n = min(decay, n / (n + 9))`,
    and `decay_1 = 0` (`diffusers.training_utils.EMAModel` without its warmup): it follows at first, and holds on later.

    A checkpoint has the average where its weights are looked for, and the weights of training beside it in
    `ema_training_weights.safetensors`; resuming takes up both.

    Args:
        trainer ([`SPOTrainer`], [`StepRewardTrainer`] or another `Trainer` with [`AveragedWeightsMixin`]):
            The trainer to average. The callback adds itself to it.
        decay (`float`, *optional*, defaults to `0.999`):
            In [0, 1); 0 is the last weights. The average spans about `1 / (1 - decay)` optimizer steps.

    Example:

    ```python
    trainer = SPOTrainer(config, pipeline, reward_model, train_dataset=prompts)
    EMACallback(trainer, decay=0.99)
    trainer.train()
    trainer.save_model()  # the average
    ```

    Raises:
        TypeError: if the trainer does not use averaged weights.
        ValueError: if `decay` is out of range, training has begun, the trainer has an average already, or the weights are
            sharded or copied by FSDP or DeepSpeed.
    """

    def __init__(self, trainer: AveragedWeightsMixin, decay: float = 0.999):
        if not isinstance(trainer, AveragedWeightsMixin):
            raise TypeError(
                "`EMACallback` needs a trainer that evaluates and saves averaged weights: `SPOTrainer`, "
                f"`StepRewardTrainer`, or a `Trainer` with `AveragedWeightsMixin`, got `{type(trainer).__name__}`."
            )
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be in [0, 1), got {decay!r}.")
        if trainer.state.global_step > 0:
            raise ValueError("`EMACallback` must be added before training: the average starts at the first weights.")
        if trainer.ema is not None:
            raise ValueError("The trainer has an `EMACallback` already. Make one, with the `decay` that you want.")
        if trainer.is_deepspeed_enabled:
            raise ValueError(
                "`EMACallback` does not work with DeepSpeed, which copies the weights before they are saved and restores "
                "them past the callback. Train without DeepSpeed, or without the average."
            )
        if trainer.is_fsdp_enabled:
            raise ValueError(
                "`EMACallback` does not work with FSDP, which splits the weights after the average was made of whole "
                "ones. Train without FSDP, or without the average."
            )
        self.trainer = trainer
        self.ema = EMAModel(self._parameters().values(), decay=decay)
        self._swapped_in = False
        trainer.ema = self
        if isinstance(trainer, CheckpointingMixin):  # its checkpoints are written before they get their name
            trainer.checkpoint_writers.append(self._write)
        trainer.add_callback(self)

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: value for name, value in self.trainer.model.named_parameters() if value.requires_grad}

    @contextlib.contextmanager
    def average(self) -> Iterator[None]:
        """A context in which the model holds the average. It may be entered again inside of itself."""
        if self._swapped_in:
            yield
            return
        parameters = list(self._parameters().values())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        self._swapped_in = True
        try:
            yield
        finally:
            self.ema.restore(parameters)
            self._swapped_in = False

    def adopt(self) -> None:
        """The average is what the model holds now."""
        for shadow, parameter in zip(self.ema.shadow_params, self._parameters().values(), strict=True):
            shadow.data.copy_(parameter.data)

    def resume(self, folder: str | Path) -> None:
        """The model holds the average of a checkpoint: keep it, and give the model the weights of training."""
        self.adopt()
        file = Path(folder) / EMA_NAME
        if not file.is_file():
            logger.warning(f"{str(folder)!r} has no {EMA_NAME}: the average starts at its weights.")
            return
        tensors = load_file(file)
        self.ema.optimization_step = int(tensors.pop("optimization_step"))
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                parameter.copy_(tensors[name])

    def on_save(self, args, state, control, **kwargs):
        if args.should_save and not isinstance(self.trainer, CheckpointingMixin):
            self._write(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _write(self, folder: Path) -> None:
        """The weights of training, beside the average that is written as the model."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self._parameters().items()}
        save_file({**tensors, "optimization_step": torch.tensor(self.ema.optimization_step)}, folder / EMA_NAME)

    def on_train_begin(self, args, state, control, **kwargs):
        self.ema.to(args.device)

    def on_step_end(self, args, state, control, **kwargs):
        self.ema.step(self._parameters().values())

    def on_train_end(self, args, state, control, **kwargs):
        self.ema.copy_to(self._parameters().values())
