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

"""Checks of SPO before any long work: they refuse settings that cannot be trained, and rewards that do not fit them."""

from collections.abc import Callable

from ..rewards.base import Reward
from ..spo_config import SPOConfig


def choose_best_metric(config: SPOConfig, metrics: dict[str, Callable]) -> None:
    """
    Choose the metric by which the best checkpoint is found and the learning rate is lowered: the reward, unless the config
    names another. Sets `metric_for_best_model`, `greater_is_better` and the mode of the schedule in `config`.

    Raises:
        ValueError: for a metric that evaluation does not have.
    """
    measured = config.load_best_model_at_end or config.save_strategy == "best"
    if not measured and config.lr_scheduler_type != "reduce_lr_on_plateau":
        return
    known = []
    for name in ("reward", *metrics):
        known += [f"{name}_mean", f"{name}_std"]
    if config.metric_for_best_model in (None, "loss", "eval_loss"):  # there is no evaluation loss
        config.metric_for_best_model = "reward_mean"
        config.greater_is_better = True
    elif config.metric_for_best_model.removeprefix("eval_") not in known:
        raise ValueError(
            f"`metric_for_best_model` must be one of {known}, got {config.metric_for_best_model!r}. Further metrics "
            "come with the `metrics` argument of the trainer."
        )
    if config.lr_scheduler_type == "reduce_lr_on_plateau":  # by default it waits for a number that falls
        mode = "max" if config.greater_is_better else "min"
        config.lr_scheduler_kwargs = {"mode": mode, **(config.lr_scheduler_kwargs or {})}


def check_shared_reward(config: SPOConfig, reward: Reward, sharded: bool = False) -> None:
    """
    A reward on the policy's own weights allows neither their training nor a dtype of its own, nor that they are spread over
    processes (`sharded`).

    Raises:
        ValueError: if the config asks for one of them.
    """
    if not reward.shares_denoiser:
        return
    if not config.use_peft:
        raise ValueError(
            "The latent reward shares the weights of the denoiser, which `use_peft=False` trains: it would change while it "
            "judges. Train a LoRA, or use a latent reward with weights of its own."
        )
    if config.reward_dtype is not None:
        raise ValueError("The latent reward shares the denoiser, which has its own dtype: leave `reward_dtype` out.")
    if sharded:
        raise ValueError(
            "The latent reward shares the denoiser and stops in the middle of it, which FSDP does not allow. Use a latent reward "
            "with weights of its own, or train without FSDP."
        )


def check_reward_timesteps(config: SPOConfig, reward: Reward, timesteps: list[int]) -> None:
    """
    The reward must know the timesteps it will be asked about. The first one, of pure noise, is never scored.

    Args:
        config ([`SPOConfig`]): of the run.
        reward ([`Reward`]): what judges.
        timesteps (`list[int]`): of the sampler, descending.

    Raises:
        ValueError: if it knows fewer.
    """
    if reward.num_train_timesteps is None:
        return
    scored = timesteps if config.reward_timestep == "branch" else [*timesteps[1:], 0]
    known = reward.num_train_timesteps
    if max(scored) >= known:
        raise ValueError(
            f"The sampler uses timesteps up to {max(scored)}, and the reward model knows those up to {known - 1}. Use "
            "a reward model that was trained for this pipeline."
        )
