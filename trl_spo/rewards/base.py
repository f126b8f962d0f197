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
The contract of a reward, [`Reward`], and [`wrap_reward`], which brings whatever users have into that form.

Rollout, memory estimates, evaluation, relabelling and both trainers use only the members of [`Reward`], never a subclass. A
reward declares what it wants to see:

| `sees` | samples | when |
|---|---|---|
| `"images"` | decoded x_0 predictions, in [-1, 1] | step-aware CLIP, any function of images |
| `"latents"` | x_0 predictions as latents | models on clean latents |
| `"noisy_latents"` | the candidates x_{t-1} themselves | latent reward models: nothing is predicted or decoded for scoring |
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..hub_files import read_model_type
from ..pipelines.components import unwrapped
from .inputs import freeze


SEES = ("images", "latents", "noisy_latents")


class Reward:
    """
    Scores samples in rollouts and evaluation. Subclasses implement `encode_prompts` and `score`.

    Attributes:
        sees (`str`): what `score` gets: `"images"` `(B, 3, height, width)` in [-1, 1], `"latents"` (x_0 predictions), or
            `"noisy_latents"` (the candidates), both `(B, C, h, w)` in the scale of the denoiser.
        num_train_timesteps (`int`, *optional*): timesteps must lie in `[0, num_train_timesteps)`. `None`: any will do.
        module (`torch.nn.Module`, *optional*): its network, which [`~Reward.prepare`] freezes, moves and casts.
        can_be_traced (`bool`): whether `encode_prompts` and `score` run on tensors without values, so that their memory
            can be estimated.
        shares_denoiser (`bool`): whether its network is the policy's, under an adapter of its own.
        name (`str`): what a model card calls it.
        parts (`Mapping[str, Reward]`): the rewards that it combines, by name; empty for a single one. See
            [`WeightedReward`].
    """

    sees: str = "images"
    num_train_timesteps: int | None = None
    module: torch.nn.Module | None = None
    can_be_traced: bool = False
    shares_denoiser: bool = False
    name: str = "reward"
    parts: Mapping[str, "Reward"] = MappingProxyType({})

    def encode_prompts(self, prompts: list[str]) -> Any:
        """Text features of `prompts`, once per rollout: anything of which an index tensor picks rows."""
        raise NotImplementedError

    def score(self, samples: torch.Tensor, text: Any, timesteps: torch.Tensor) -> torch.Tensor:
        """
        Args:
            samples (`torch.Tensor` of shape `(B, ...)`): what `sees` says.
            text: B rows of what `encode_prompts` returned.
            timesteps (`torch.Tensor` of shape `(B,)`, int64): of the samples; 0 for finished images.

        Returns:
            `torch.Tensor` of shape `(B,)`: float32, on the device of the samples. Higher is better.
        """
        raise NotImplementedError

    def score_parts(self, samples: torch.Tensor, text: Any, timesteps: torch.Tensor) -> dict[str, torch.Tensor]:
        """The scores `(B,)` of each of its `parts`. Arguments as in [`~Reward.score`], which is the total of these."""
        raise NotImplementedError

    def combine(self, scores: dict[str, torch.Tensor]) -> torch.Tensor:
        """What pairs are selected by, `(K, B)`, from the scores `(K, B)` of each part at one step."""
        raise NotImplementedError

    def total(self, scores: dict[str, torch.Tensor]) -> torch.Tensor:
        """What finished images are compared by, from the scores of each part, of any one shape."""
        raise NotImplementedError

    def check_prompts(self, prompts: list[str]) -> None:
        """Raises an error if the reward cannot read prompts, before any work is done."""

    def check_pipeline(self, pipeline) -> None:
        """Raises an error if the reward cannot judge what this pipeline makes, such as latents of another space."""

    def check_dtype(self, dtype: torch.dtype | str | None) -> None:
        """
        Raises:
            ValueError: if a `dtype` is asked for and there is no network to cast.
        """
        if dtype is not None and self.module is None:
            raise ValueError("`reward_dtype` casts a reward model; a reward function takes care of its own precision.")

    def prepare(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Reward":
        """
        Freeze the network, put it into evaluation mode, and move and cast it.

        Raises:
            ValueError: see [`~Reward.check_dtype`].
        """
        self.check_dtype(dtype)
        if self.module is not None:
            freeze(self.module).eval().to(device)
            if dtype is not None:
                cast = getattr(self.module, "cast", self.module.to)  # a model's own cast spares what must stay float32
                cast(dtype)
        return self

    @property
    def device(self) -> torch.device | None:
        """Where its network is; `None` without one."""
        parameter = None if self.module is None else next(self.module.parameters(), None)
        return None if parameter is None else parameter.device


class TextRows(list):
    """A list of prompts of which an index tensor picks rows, like text features."""

    def __getitem__(self, index):
        if torch.is_tensor(index):
            return TextRows(list.__getitem__(self, i) for i in index.tolist())
        return super().__getitem__(index)


class FunctionReward(Reward):
    """
    A function `(images (B, 3, H, W) in [0, 1], prompts, timesteps (B,)) -> scores (B,)`. If it has an attribute `scores`
    of "latents" or "noisy_latents", it gets those instead of images.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self.module = function if isinstance(function, torch.nn.Module) else None
        self.sees = check_sees(getattr(function, "scores", "images"))

    def encode_prompts(self, prompts: list[str]) -> TextRows:
        return TextRows(prompts)

    def score(self, samples: torch.Tensor, text: TextRows, timesteps: torch.Tensor) -> torch.Tensor:
        if self.sees == "images":
            samples = (samples / 2 + 0.5).clamp(0, 1)
        return checked_scores(self.function(samples, list(text), timesteps), len(samples), samples.device)


class MetricReward(FunctionReward):
    """
    A metric `(images (B, 3, H, W) in [0, 1], prompts) -> scores (B,)`, such as those of `trl_spo.evaluation.metrics`, which
    is asked about images of any timestep.
    """

    def score(self, samples: torch.Tensor, text: TextRows, timesteps: torch.Tensor) -> torch.Tensor:
        images = (samples.float() / 2 + 0.5).clamp(0, 1)
        return checked_scores(self.function(images, list(text)), len(samples), samples.device)

    def prepare(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "MetricReward":
        super().prepare(device, dtype)
        if self.module is None and hasattr(self.function, "to"):
            self.function.to(device)
        return self


class ModelReward(Reward):
    """A model with `encode_prompts(prompts)` and `score(samples, timesteps=..., text_features=...)`."""

    def __init__(self, model):
        self.model = model
        self.name = type(model).__name__
        self.module = model if isinstance(model, torch.nn.Module) else None
        self.can_be_traced = self.module is not None
        self.shares_denoiser = getattr(model, "shares_denoiser", False)
        self.sees = check_sees(getattr(model, "scores", "images"))
        config = getattr(model, "config", None)
        if getattr(config, "step_conditioning", True):  # a model that ignores timesteps takes any
            self.num_train_timesteps = getattr(config, "num_train_timesteps", None)

    def check_prompts(self, prompts: list[str]) -> None:
        if hasattr(self.model, "tokenize"):
            self.model.tokenize(prompts[:1])  # says so if there is no tokenizer

    def check_pipeline(self, pipeline) -> None:
        if hasattr(self.model, "check_pipeline"):
            self.model.check_pipeline(pipeline)

    def encode_prompts(self, prompts: list[str]) -> Any:
        return self.model.encode_prompts(prompts)

    def score(self, samples: torch.Tensor, text: Any, timesteps: torch.Tensor) -> torch.Tensor:
        scores = self.model.score(samples, timesteps=timesteps, text_features=text)
        return checked_scores(scores, len(samples), samples.device)


def check_sees(sees: str) -> str:
    """
    Raises:
        ValueError: for a reward whose attribute `scores` names nothing that a rollout can show it.
    """
    if sees not in SEES:
        raise ValueError(f"The attribute `scores` of a reward must be one of {SEES}, got {sees!r}.")
    return sees


def checked_scores(scores: Any, num_samples: int, device: torch.device) -> torch.Tensor:
    """
    What a reward returned, as `(num_samples,)` float32 on `device`.

    Raises:
        TypeError: if these are not real numbers.
        ValueError: if their shape is another.
    """
    try:
        scores = torch.as_tensor(scores, device=device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"The reward must return a tensor or a list of {num_samples} numbers, one per sample, got "
            f"`{type(scores).__name__}` ({error})."
        ) from error
    if scores.shape != (num_samples,):
        raise ValueError(
            f"The reward must return one score per sample, shape ({num_samples},), got {tuple(scores.shape)}."
        )
    if scores.is_complex():
        raise TypeError(f"The reward must return real numbers, got dtype {scores.dtype}.")
    return scores.float()


def accepts(function: Any, *args, **kwargs) -> bool:
    """Whether a callable can be called with these arguments; yes where it does not say what it takes."""
    try:
        signature = inspect.signature(function.forward if isinstance(function, torch.nn.Module) else function)
    except (TypeError, ValueError):  # of callables that are written in C
        return True
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def takes_timesteps(function: Callable) -> bool:
    """Whether a callable is a reward, `(images, prompts, timesteps)`, as opposed to a metric, `(images, prompts)`."""
    return accepts(function, 0, 0, 0) or not accepts(function, 0, 0)


def wrap_reward(reward: Any) -> Reward:
    """
    Turn what users have into a [`Reward`].

    Args:
        reward: a [`Reward`] (returned as it is), a model with `encode_prompts` and `score` such as
            [`StepAwareRewardModel`], the path or Hub id of a saved one, or a callable `(images (B, 3, H, W) in [0, 1],
            prompts: list[str], timesteps (B,)) -> scores (B,)`. One that takes no timesteps is a metric, see
            [`MetricReward`].

    Raises:
        TypeError: for any other object.
        ValueError: for an unknown value of the attribute `scores`.

    Example:

    ```python
    >>> reward = wrap_reward(lambda images, prompts, timesteps: images.mean((1, 2, 3)))
    >>> reward.score(torch.zeros(2, 3, 8, 8), reward.encode_prompts(["a cat", "a dog"]), torch.tensor([0, 0]))
    tensor([0.5000, 0.5000])
    ```
    """
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, (str, Path)):
        reward = load_reward_model(reward)
    if isinstance(reward, torch.nn.Module) and is_reward_model(unwrapped(reward)):
        reward = unwrapped(reward)  # whoever wraps it: a wrapper hides methods and changes names
    if is_reward_model(reward):
        return ModelReward(reward)
    if callable(reward):
        return FunctionReward(reward) if takes_timesteps(reward) else MetricReward(reward)
    raise TypeError(
        "`reward_model` must be a `StepAwareRewardModel` or another reward model, a path or Hub id of one, or a callable "
        f"`(images, prompts, timesteps) -> scores`, got `{type(reward).__name__}`."
    )


def is_reward_model(reward: Any) -> bool:
    """Whether this judges by itself, as opposed to a function that is called."""
    return isinstance(reward, Reward) or (hasattr(reward, "encode_prompts") and hasattr(reward, "score"))


def load_reward_model(path: str | Path) -> torch.nn.Module:
    """The reward model in a folder or Hub repository, of the class that its configuration names."""
    # Imported here, as a function needs no reward model.
    from .latent import LatentRewardModel, LatentRewardModelConfig
    from .step_aware_clip import StepAwareRewardModel

    if read_model_type(str(path), {}) == LatentRewardModelConfig.model_type:
        return LatentRewardModel.from_pretrained(path)
    return StepAwareRewardModel.from_pretrained(path)
