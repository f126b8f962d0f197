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
The step distribution p(x_{t-1} | x_t) of a stochastic sampler, whatever the sampler is: draw candidates from it, and take
log-probabilities and the divergence to a reference under it. [`StepRule`] is what a scheduler module (`scheduling_ddim` and
its siblings) implements: it says what mean and standard deviation are.
"""

import math
import textwrap
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor


class StepDistribution(NamedTuple):
    """
    Parameters of p(x_{t-1} | x_t) = N(prev_sample_mean, std_dev_t^2 I).

    Attributes:
        prev_sample_mean (`torch.Tensor` of shape `(batch_size, ...)`): mean of x_{t-1}, float32.
        std_dev_t (`torch.Tensor`): sigma_t, float32; one value per sample with trailing ones, or a single value, so
            that it broadcasts against the mean. 0 where the step is deterministic.
        pred_original_sample (`torch.Tensor` of shape `(batch_size, ...)`): predicted x_0, float32.
    """

    prev_sample_mean: torch.Tensor
    std_dev_t: torch.Tensor
    pred_original_sample: torch.Tensor


def broadcast_over(values: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """
    Numbers of a schedule, `()` or `(batch_size,)`, shaped to broadcast against `sample` `(batch_size, ...)` and where it is.
    One number does so from any device, and moving the others waits for none.
    """
    if values.ndim == 0:
        return values
    values = values.to(sample.device, non_blocking=sample.device.type != "cpu")
    return values.reshape(-1, *(1,) * (sample.ndim - 1))


class SamplingCode(NamedTuple):
    """
    How to sample in plain diffusers what was trained, in the words of a model card's example.

    Attributes:
        imports (`list[str]`): names to import from diffusers.
        setup (`list[str]`): lines that prepare the pipeline `pipe`.
        arguments (`list[str]`): keyword arguments of the call of `pipe`, such as `"eta=1"`.
    """

    imports: list[str]
    setup: list[str]
    arguments: list[str]


class StepRule:
    """
    What a sampler does in one step. One per kind of sampler; no other module knows its formulas or its name.

    A pipeline holds one as `pipeline.step_rule`. Timesteps are integers in `[0, num_train_timesteps)`, or one value above
    for the start of a flow. They come as an `int`, a 0-d tensor, or one per row `(batch_size,)`. Latents have shape
    `(batch_size, ...)`, and so have model outputs.

    Attributes:
        sampler_name (`str`): how people call the sampler, such as "DDIM".
        scheduler: the diffusers scheduler behind it. It belongs to the rule, the user's own is never changed.
    """

    sampler_name: str = None
    scheduler: Any = None

    @property
    def num_train_timesteps(self) -> int:
        raise NotImplementedError

    def set_timesteps(self, num_inference_steps: int) -> list[int]:
        """Fix the schedule; returns t_0 > t_1 > ... as a list."""
        raise NotImplementedError

    def set_sampler(self, sampler: str) -> None:
        """
        Choose among the kinds of steps that the rule knows.

        Raises:
            ValueError: if it does not know this one.
        """
        if sampler != "ddim":
            raise ValueError(f"The steps of {self.sampler_name} come with the sampler 'ddim' only, got {sampler!r}.")

    def check_predictable(self, timesteps: list[int]) -> None:
        """
        Raises:
            ValueError: if the prediction of the denoiser at one of these timesteps says nothing about x_0.
        """

    def snr(self, timestep: int) -> float:
        """Signal-to-noise ratio of x_t, the ratio of the variances: what a timestep means, whatever the family is."""
        raise NotImplementedError

    def check_eta(self, eta: float) -> None:
        """
        Raises:
            ValueError: if the sampler has no steps with this much noise. 0 is legal: deterministic steps.
        """
        raise NotImplementedError

    def is_stochastic(self, step: int, eta: float) -> bool:
        """Whether step number `step` of the schedule may branch: whether its candidates differ enough to be compared."""
        raise NotImplementedError

    def distribution(self, model_output, timesteps, latents, eta: float) -> StepDistribution:
        """Distribution of x_{t-1} given x_t and the (guided) prediction of the denoiser there."""
        raise NotImplementedError

    def predict_original_sample(self, model_output, timesteps, latents) -> torch.Tensor:
        """Predicted x_0, float32, at any training timestep (not only those of the schedule)."""
        raise NotImplementedError

    def add_noise(self, latents, noise, timesteps) -> torch.Tensor:
        """x_t of the forward process, for timesteps of shape `(batch_size,)`."""
        raise NotImplementedError

    def description(self, eta: float) -> str:
        """The sampler in a few words, such as "DDIM, eta 1"."""
        return f"{self.sampler_name}, eta {eta:g}"

    def sampling_code(self, eta: float) -> SamplingCode:
        """How to sample like this in plain diffusers."""
        raise NotImplementedError


def scheduler_code(scheduler: Any, settings: list[str]) -> str:
    """
    Code that gives `pipe` a scheduler like `scheduler`, whatever the one of the base model is: a pipeline may have been trained
    with another. Settings that `scheduler` does not have are left out.
    """
    known = {name: scheduler.config[name] for name in settings if name in scheduler.config}
    arguments = ", ".join(["pipe.scheduler.config", *(f"{name}={value!r}" for name, value in known.items())])
    lines = textwrap.wrap(arguments, 100, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join([f"pipe.scheduler = {type(scheduler).__name__}.from_config(", *lines, ")"])


def sample_candidates(
    mean: torch.Tensor,
    std: torch.Tensor,
    num_candidates: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """
    Draw `num_candidates` independent x_{t-1} from one step distribution.

    Args:
        mean (`torch.Tensor` of shape `(batch_size, ...)`): step mean.
        std (`torch.Tensor`): step standard deviation, broadcastable against `mean`.
        num_candidates (`int`): K.
        generator (`torch.Generator`, *optional*): source of the noise.
        dtype (`torch.dtype`, *optional*): storage dtype of the latents. Rounding happens here, before anything is
            scored, so that the reward model and the loss see the same numbers.

    Returns:
        `torch.Tensor` of shape `(num_candidates, batch_size, ...)`.
    """
    noise = randn_tensor((num_candidates, *mean.shape), generator=generator, device=mean.device, dtype=mean.dtype)
    return (mean + std * noise).to(dtype or mean.dtype)


def gaussian_log_prob(prev_sample: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    r"""
    log N(prev_sample; mean, std^2 I), **averaged** over all dimensions but the first, in float32.

    The mean (DDPO's and SPO's convention) sets the scale of `beta`: `beta=10` on the mean over 4x64x64 latents is
    6.1e-4 on the summed log-probability.

    Args:
        prev_sample (`torch.Tensor` of shape `(batch_size, ...)`): x_{t-1}, treated as a constant.
        mean (`torch.Tensor` of shape `(batch_size, ...)`): step mean; gradients flow into it.
        std (`torch.Tensor`): step standard deviation, broadcastable against `mean`, > 0.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.

    Raises:
        ValueError: if any `std` is not positive. A deterministic step (eta = 0, or the last step of a scheduler with
            `set_alpha_to_one=True`) has no density.
    """
    std = torch.as_tensor(std, device=mean.device)
    if not bool((std > 0).all()):
        raise ValueError(
            "A step with sigma = 0 has no density, so its log-probability does not exist. Use `eta` > 0 and leave out "
            "deterministic steps (the last one, if the scheduler has `set_alpha_to_one=True`)."
        )
    return stochastic_log_prob(prev_sample, mean, std)


def stochastic_log_prob(prev_sample: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """[`gaussian_log_prob`] for steps that are known to be stochastic: the check would wait for the device."""
    dtype = torch.promote_types(torch.float32, mean.dtype)
    prev_sample = prev_sample.detach().to(dtype)
    mean = mean.to(dtype)
    std = std.to(dtype)
    log_prob = -((prev_sample - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return log_prob.flatten(1).mean(1)


def gaussian_kl(mean: torch.Tensor, ref_mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    r"""
    Exact KL divergence of two step distributions of the same sigma_t, averaged over dimensions like the log-probs:
    |mean - ref_mean|^2 / (2 sigma_t^2).

    Args:
        mean, ref_mean (`torch.Tensor` of shape `(batch_size, ...)`): means of policy and reference.
        std (`torch.Tensor`): their common standard deviation, > 0.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.
    """
    return ((mean - ref_mean) ** 2 / (2 * std**2)).flatten(1).mean(1)
