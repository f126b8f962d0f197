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
The distribution of one stochastic DDIM step, as functions and as the [`StepRule`] of a pipeline.

Source: DDIM (https://huggingface.co/papers/2010.02502), equations 12 and 16, as `diffusers.DDIMScheduler.step`
computes them. Differences from that method:

- it returns the mean and the standard deviation of x_{t-1} instead of one sample;
- `timestep` may differ from sample to sample, because a training batch mixes timesteps;
- the arithmetic is float32 whatever the dtype of the latents is: a log-probability divides by sigma_t^2.
- the schedule is read where the timesteps are: timesteps on a GPU are not copied to the host.

The scheduler is only read. `final_alpha_cumprod` is used at the last step exactly as diffusers does; DDPO's and the
public SPO code's own step clamp the previous timestep first and so never reach it.
"""

import math

import torch
from diffusers import DDIMScheduler
from diffusers.utils import logging

from .step_distribution import SamplingCode, StepDistribution, StepRule, broadcast_over, scheduler_code


logger = logging.get_logger(__name__)


def _check_timestep(timestep: int | torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    timestep = torch.as_tensor(timestep).long()
    if timestep.ndim > 1 or (timestep.ndim == 1 and len(timestep) not in (1, len(sample))):
        raise ValueError(
            f"`timestep` must be an int, a 0-d tensor or have shape ({len(sample)},), got {tuple(timestep.shape)}."
        )
    return timestep


def _schedule(values: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A tensor of the scheduler on the device of the timesteps. Moving a table there does not stop the device."""
    return values.to(timestep.device, non_blocking=timestep.device.type != "cpu")


def ddim_predict(
    scheduler, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Predicted x_0 (clipped or thresholded if the scheduler says so) and predicted noise, at any training timestep.

    Args and errors as [`ddim_step_stats`]. Returns two float32 tensors of the shape of `sample`.
    """
    dtype = torch.promote_types(torch.float32, sample.dtype)
    model_output = model_output.to(dtype)
    sample = sample.to(dtype)
    timestep = _check_timestep(timestep, sample)
    alpha_prod_t = broadcast_over(_schedule(scheduler.alphas_cumprod, timestep)[timestep], sample)
    beta_prod_t = 1 - alpha_prod_t

    config = scheduler.config
    if config.prediction_type == "epsilon":
        pred_original_sample = (sample - beta_prod_t**0.5 * model_output) / alpha_prod_t**0.5
        pred_epsilon = model_output
    elif config.prediction_type == "sample":
        pred_original_sample = model_output
        pred_epsilon = (sample - alpha_prod_t**0.5 * model_output) / beta_prod_t**0.5
    elif config.prediction_type == "v_prediction":
        pred_original_sample = alpha_prod_t**0.5 * sample - beta_prod_t**0.5 * model_output
        pred_epsilon = alpha_prod_t**0.5 * model_output + beta_prod_t**0.5 * sample
    else:
        raise ValueError(
            "`scheduler.config.prediction_type` must be 'epsilon', 'sample' or 'v_prediction', got "
            f"{config.prediction_type!r}."
        )
    if config.thresholding:
        pred_original_sample = scheduler._threshold_sample(pred_original_sample)
    elif config.clip_sample:
        pred_original_sample = pred_original_sample.clamp(-config.clip_sample_range, config.clip_sample_range)
    return pred_original_sample, pred_epsilon


def ddim_step_stats(
    scheduler, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor, eta: float
) -> StepDistribution:
    r"""
    Mean and standard deviation of the DDIM step from x_t to x_{t-1}.

    | here | DDIM paper |
    |---|---|
    | `model_output` | e_theta(x_t, t), or what `prediction_type` says |
    | `pred_original_sample` | f_theta(x_t, t), eq. 9 |
    | `std_dev_t` | sigma_t, eq. 16 |
    | `prev_sample_mean` | x_{t-1} of eq. 12 without the random term |

    Args:
        scheduler ([`~diffusers.DDIMScheduler`]): after `set_timesteps`; it is not modified.
        model_output (`torch.Tensor` of the shape of `sample`): the (guided) prediction of the denoiser.
        timestep (`int` or `torch.Tensor`): t, a single value or one per sample `(batch_size,)`.
        sample (`torch.Tensor` of shape `(batch_size, ...)`): x_t.
        eta (`float`): 0 is deterministic DDIM, 1 has the variance of DDPM.

    Returns:
        [`StepDistribution`] in float32 (float64 if `sample` is).

    Raises:
        ValueError: before `set_timesteps`, for an unknown prediction type, or a timestep of the wrong shape.
    """
    if scheduler.num_inference_steps is None:
        raise ValueError("The scheduler has no inference steps yet: call `scheduler.set_timesteps(n)` first.")
    timestep = _check_timestep(timestep, sample)
    prev_timestep = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alphas_cumprod = _schedule(scheduler.alphas_cumprod, timestep)
    alpha_prod_t = broadcast_over(alphas_cumprod[timestep], sample)
    alpha_prod_t_prev = torch.where(
        prev_timestep >= 0,
        alphas_cumprod[prev_timestep.clamp(min=0)],
        _schedule(scheduler.final_alpha_cumprod, timestep),
    )
    alpha_prod_t_prev = broadcast_over(alpha_prod_t_prev, sample)

    pred_original_sample, pred_epsilon = ddim_predict(scheduler, model_output, timestep, sample)
    variance = (1 - alpha_prod_t_prev) / (1 - alpha_prod_t) * (1 - alpha_prod_t / alpha_prod_t_prev)
    std_dev_t = eta * variance**0.5
    # Where x_t has no signal (zero terminal SNR) and eta is 1 this difference is 0 up to rounding, on either side of it.
    direction = (1 - alpha_prod_t_prev - std_dev_t**2).clamp(min=0)
    pred_sample_direction = direction**0.5 * pred_epsilon
    prev_sample_mean = alpha_prod_t_prev**0.5 * pred_original_sample + pred_sample_direction
    return StepDistribution(prev_sample_mean, std_dev_t, pred_original_sample)


def stochastic_ddim_scheduler(scheduler) -> DDIMScheduler:
    """
    A `DDIMScheduler` with the noise schedule of `scheduler`, which is left alone.

    Latents must not be clipped: where the source configuration does not mention `clip_sample`, it is set to False
    (`DDIMScheduler`'s own default is True).

    Raises:
        ValueError: if the scheduler has no variance-preserving schedule that DDIM could use.
    """
    name = type(scheduler).__name__
    config = dict(getattr(scheduler, "config", {}))
    compatible = name in DDIMScheduler._compatibles and "beta_schedule" in config
    if not compatible or config.get("prediction_type", "epsilon") not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(
            f"SPO needs stochastic denoising steps, and the pipeline's scheduler `{name}` cannot be turned into a "
            "DDIMScheduler. Set `pipeline.scheduler` to a DDIMScheduler (or PNDM, DDPM, Euler, DPM-Solver with an "
            "epsilon, sample or v prediction)."
        )
    if not isinstance(scheduler, DDIMScheduler):
        logger.info(f"SPO samples with DDIMScheduler, built from the configuration of the pipeline's {name}.")
    return DDIMScheduler.from_config(config, clip_sample=config.get("clip_sample", False))


def stable_diffusion_snr(timestep: int) -> float:
    """
    Signal-to-noise ratio of x_t at a timestep of Stable Diffusion 1, the scale on which branch ranges can be given for every
    family: betas from 0.00085 to 0.012, linear in their root, 1000 of them.

    Raises:
        ValueError: for a timestep outside of [0, 1000).
    """
    if not 0 <= timestep < 1000:
        raise ValueError(f"A timestep of Stable Diffusion 1 lies in [0, 1000), got {timestep}.")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = (1 - betas).cumprod(0)[timestep].item()
    return alpha / (1 - alpha)


# What a `DDIMScheduler` may be told about its schedule.
SCHEDULE_SETTINGS = (
    "beta_start beta_end beta_schedule prediction_type timestep_spacing steps_offset rescale_betas_zero_snr set_alpha_to_one "
    "clip_sample"
).split()


class DDIMStepRule(StepRule):
    """
    The steps of stochastic DDIM, for models with a variance-preserving schedule of betas.

    Args:
        scheduler: of the user's pipeline; a [`~diffusers.DDIMScheduler`] of our own is built from its configuration.

    Raises:
        ValueError: see [`stochastic_ddim_scheduler`].
    """

    sampler_name = "DDIM"

    def __init__(self, scheduler):
        self.scheduler = stochastic_ddim_scheduler(scheduler)
        self._stochastic: dict[tuple[int, float], list[bool]] = {}
        signal = self.scheduler.alphas_cumprod
        self._pure_noise = set()
        if signal.device.type != "meta":  # estimates of memory work on shapes, which have no values
            self._pure_noise = set((signal <= 0).nonzero().flatten().tolist())

    @property
    def num_train_timesteps(self) -> int:
        return self.scheduler.config.num_train_timesteps

    def set_timesteps(self, num_inference_steps: int) -> list[int]:
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps.tolist()
        self.check_predictable(timesteps)
        return timesteps

    def check_predictable(self, timesteps: list[int]) -> None:
        hopeless = sorted(self._pure_noise.intersection(timesteps))
        if hopeless and self.scheduler.config.prediction_type == "epsilon":
            raise ValueError(
                f"At timestep {hopeless[-1]} the latents are noise alone (zero terminal SNR), from which a predicted noise "
                "says nothing about the image. Models of this kind predict v: set `prediction_type='v_prediction'` in the "
                "scheduler, or `rescale_betas_zero_snr=False` if the model was trained without it."
            )

    def snr(self, timestep: int) -> float:
        alpha = self.scheduler.alphas_cumprod[timestep].item()
        return alpha / (1 - alpha) if alpha < 1 else math.inf

    def check_eta(self, eta: float) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(
                f"`eta` of DDIM must lie in [0, 1], got {eta}: 0 is deterministic and 1 has the variance of DDPM."
            )

    def is_stochastic(self, step: int, eta: float) -> bool:
        # Asked for at every step, and reading a number may wait for the device: the answers of a schedule are kept.
        key = (self.scheduler.num_inference_steps, eta)
        if key not in self._stochastic:
            timesteps = self.scheduler.timesteps.to(self.scheduler.alphas_cumprod.device)
            origin = torch.zeros(len(timesteps), device=timesteps.device)
            std = ddim_step_stats(self.scheduler, origin, timesteps, origin, eta).std_dev_t
            self._stochastic[key] = (std > 0).tolist()
        return self._stochastic[key][step]

    def distribution(self, model_output, timesteps, latents, eta: float) -> StepDistribution:
        return ddim_step_stats(self.scheduler, model_output, timesteps, latents, eta)

    def predict_original_sample(self, model_output, timesteps, latents) -> torch.Tensor:
        return ddim_predict(self.scheduler, model_output, timesteps, latents)[0]

    def add_noise(self, latents, noise, timesteps) -> torch.Tensor:
        return self.scheduler.add_noise(latents, noise, timesteps)

    def sampling_code(self, eta: float) -> SamplingCode:
        setup = [scheduler_code(self.scheduler, SCHEDULE_SETTINGS)]
        if self._pure_noise and eta > 0.999:
            eta = 0.999
            setup.append(
                "# With zero terminal SNR the first step of this scheduler is NaN at eta=1 for many step counts."
            )
        return SamplingCode(imports=["DDIMScheduler"], setup=setup, arguments=[f"eta={eta:g}"])
