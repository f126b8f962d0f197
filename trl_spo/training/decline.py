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
A watch over a score that nothing is trained on: when it falls, the run stops, or goes on more slowly.

A policy finds what its reward overrates (reward hacking). A score of another kind, such as how well images keep their captions,
shows it while the reward still rises.
"""

from transformers import TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)


class StopOnDecline(TrainerCallback):
    """
    Stops a run, or lowers its learning rate, once a metric of its evaluations has fallen below where it began.

    The metric is compared with its first evaluation, which `eval_on_start=True` makes that of the model before training.
    Evaluations use the same prompts and seeds each time, so they differ by what was learnt and by little else.

    Args:
        metric (`str`):
            Name of a metric as the trainer was given it, such as `"clip_score"`, or its full log key.
        tolerance (`float`, *optional*, defaults to `0.1`):
            How far it may fall, in standard deviations of the metric over images at the first evaluation. With 100 prompts a
            mean of unrelated images has a standard error of 0.1 of them; with the same prompts and seeds it has less.
        patience (`int`, *optional*, defaults to `1`):
            Evaluations in a row that must be below before anything is done.
        lower_rate_to (`float`, *optional*):
            Instead of stopping, multiply the learning rate by this each time, a number between 0 and 1.

    Raises:
        ValueError: for a value out of range; at the start of a run that never evaluates; at the first evaluation if it has no
            such metric.

    Example:

    ```python
    trainer = SPOTrainer(
        SPOConfig(output_dir="spo", eval_strategy="steps", eval_steps=25, eval_on_start=True),
        pipeline,
        reward_model,
        train_dataset=prompts,
        eval_dataset=held_out,
        metrics={"clip_score": load_metric("clip_score")},
        callbacks=[StopOnDecline("clip_score")],
    )
    ```
    """

    def __init__(self, metric: str, tolerance: float = 0.1, patience: int = 1, lower_rate_to: float | None = None):
        if not tolerance >= 0:
            raise ValueError(f"`tolerance` must be at least 0 standard deviations, got {tolerance}.")
        if patience < 1:
            raise ValueError(f"`patience` must be at least 1 evaluation, got {patience}.")
        if lower_rate_to is not None and not 0 < lower_rate_to < 1:
            raise ValueError(f"`lower_rate_to` must be between 0 and 1, got {lower_rate_to}.")
        name = metric.removeprefix("eval_").removesuffix("_mean")
        self.mean_key = f"eval_{name}_mean"
        self.deviation_key = f"eval_{name}_std"
        self.tolerance = tolerance
        self.patience = patience
        self.lower_rate_to = lower_rate_to

    def on_train_begin(self, args, state, control, **kwargs):
        if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
            raise ValueError(
                f"`StopOnDecline` watches {self.mean_key!r}, and this run never evaluates: set `eval_strategy` and "
                "`eval_steps`, and pass `eval_dataset` and `metrics` to the trainer."
            )

    def on_evaluate(self, args, state, control, metrics=None, lr_scheduler=None, **kwargs):
        if self.mean_key not in (metrics or {}):
            known = sorted(name for name in metrics or {} if name.endswith("_mean"))
            raise ValueError(
                f"`StopOnDecline` watches {self.mean_key!r}, and the evaluation has {known}: name one of them, or pass the "
                "metric to the trainer with `metrics`."
            )

        # All evaluations of the run are in its history, which checkpoints keep: a resumed run remembers where it began.
        history = [log for log in state.log_history if self.mean_key in log]
        start = history[0]
        floor = start[self.mean_key] - self.tolerance * start[self.deviation_key]
        latest = [log[self.mean_key] for log in history[-self.patience :]]
        if len(history) <= self.patience or max(latest) >= floor:
            return

        # Act on it.
        fallen = f"{self.mean_key} fell from {start[self.mean_key]:.4g} to {latest[-1]:.4g}, below {floor:.4g}"
        if self.lower_rate_to is None:
            logger.warning(f"{fallen}: the run stops at step {state.global_step}.")
            control.should_training_stop = True
        else:
            rate = self._lower_rate(lr_scheduler)
            logger.warning(f"{fallen}: the learning rate is {rate:.3g} from step {state.global_step} on.")

    def _lower_rate(self, lr_scheduler) -> float:
        """The new learning rate. A scheduler computes rates from its base rates, which its checkpoints keep."""
        lr_scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)  # without accelerate's wrapper
        lr_scheduler.base_lrs = [rate * self.lower_rate_to for rate in lr_scheduler.base_lrs]
        for group in lr_scheduler.optimizer.param_groups:
            group["lr"] *= self.lower_rate_to
        lr_scheduler._last_lr = [group["lr"] for group in lr_scheduler.optimizer.param_groups]  # what is logged
        return lr_scheduler.get_last_lr()[0]
