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
An exponential moving average of what is trained, as a callback, which transformers and TRL do not have. The average itself
is `diffusers.training_utils.EMAModel`.
"""

import contextlib
import functools
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from .checkpointing import CheckpointingMixin


logger = logging.get_logger(__name__)

EMA_NAME = "ema_training_weights.safetensors"


class EMACallback(TrainerCallback):
    r"""
    Keeps an exponential moving average of the trained parameters. Evaluation, checkpoints and `save_model` see the
    average, rollouts and optimizer steps the weights themselves; after training the model holds the average.

    The average after step n is `decay_n * average + (1 - decay_n) * weights` with `decay_n = min(decay, n / (n + 9))`,
    and `decay_1 = 0` (`diffusers.training_utils.EMAModel` without its warmup): it follows at first, and holds on later.

    A checkpoint has the average where its weights are looked for, and the weights of training beside it in
    `ema_training_weights.safetensors`; resuming takes up both.

    Args:
        trainer ([`SPOTrainer`], [`StepRewardTrainer`] or another `transformers.Trainer`):
            Whose `evaluate`, saving and loading are to know the average. `add_callback` is called with this callback.
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
        ValueError: if `decay` is out of range, training has begun, or DeepSpeed trains.
    """

    def __init__(self, trainer: Trainer, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be in [0, 1), got {decay!r}.")
        if trainer.state.global_step > 0:
            raise ValueError("`EMACallback` must be added before training: the average starts at the first weights.")
        if trainer.is_deepspeed_enabled:
            raise ValueError(
                "`EMACallback` does not work with DeepSpeed, which copies the weights before they are saved and restores "
                "them past the callback. Train without DeepSpeed, or without the average."
            )
        self.trainer = trainer
        self.ema = EMAModel(self._parameters().values(), decay=decay)
        self._swapped = False
        for name in ("evaluate", "_save", *(("generate",) if hasattr(trainer, "generate") else ())):
            setattr(trainer, name, self._under_the_average(getattr(trainer, name)))
        trainer._load_from_checkpoint = self._then(trainer._load_from_checkpoint, self._resume)
        trainer._load_best_model = self._then(trainer._load_best_model, self._adopt)
        if isinstance(trainer, CheckpointingMixin):  # its checkpoints are written before they get their name
            trainer.checkpoint_writers.append(self._write)
        trainer.add_callback(self)

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: value for name, value in self.trainer.model.named_parameters() if value.requires_grad}

    @contextlib.contextmanager
    def average(self):
        """A context in which the model holds the average."""
        if self._swapped:
            yield
            return
        parameters = list(self._parameters().values())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        self._swapped = True
        try:
            yield
        finally:
            self.ema.restore(parameters)
            self._swapped = False

    def _under_the_average(self, function):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            with self.average():
                return function(*args, **kwargs)

        return wrapped

    def _then(self, function, after):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            after(*args, **kwargs)
            return result

        return wrapped

    def _adopt(self, *args, **kwargs):
        """What was loaded into the model is the average from now on."""
        for shadow, parameter in zip(self.ema.shadow_params, self._parameters().values(), strict=True):
            shadow.data.copy_(parameter.data)

    def _resume(self, resume_from_checkpoint, *args, **kwargs):
        self._adopt()
        file = Path(resume_from_checkpoint) / EMA_NAME
        if not file.is_file():
            logger.warning(f"{resume_from_checkpoint!r} has no {EMA_NAME}: the average starts at its weights.")
            return
        tensors = load_file(file)
        self.ema.optimization_step = int(tensors.pop("optimization_step"))
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                parameter.copy_(tensors[name])

    def on_train_begin(self, args, state, control, **kwargs):
        self.ema.to(args.device)

    def on_step_end(self, args, state, control, **kwargs):
        self.ema.step(self._parameters().values())

    def on_save(self, args, state, control, **kwargs):
        if args.should_save and not isinstance(self.trainer, CheckpointingMixin):
            self._write(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _write(self, folder: Path):
        tensors = {name: value.detach().cpu().contiguous() for name, value in self._parameters().items()}
        save_file({**tensors, "optimization_step": torch.tensor(self.ema.optimization_step)}, folder / EMA_NAME)

    def on_train_end(self, args, state, control, **kwargs):
        self.ema.copy_to(self._parameters().values())
