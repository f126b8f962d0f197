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

r"""
The distribution of one stochastic step of a flow-matching model (rectified flow).

Notation: sigma = t in [0, 1], x_t = (1 - t) x_0 + t e, velocity v = e - x_0, so x_0 = x_t - t v and e = x_t + (1 - t) v. A
step goes from t to t' < t. Every sampler in use is a Gaussian

    x_{t'} ~ N((1 - t') x_0 + k e, s^2)

and differs in the two numbers k and s alone:

| sampler | k | s | `eta` | source |
|---|---|---|---|---|
| `"ddim"` | sqrt(t'^2 - s^2) | eta t'/t sqrt(t^2 - ((1 - t)/(1 - t'))^2 t'^2) | in [0, 1]; 1 is the DDPM posterior | DDIM eq. 16 with sqrt(alpha) = 1 - t; LPO, appendix B |
| `"precise"` | t' rho | t' sqrt(1 - rho^2), rho = (t'(1 - t) / (t(1 - t')))^(eta^2) | in [0, 1.5], a = sqrt(2) eta | https://huggingface.co/papers/2605.23522 |
| `"flow_sde"` | t' - g^2 h/(2t), h = t - t' | g sqrt(h), g = a sqrt(t / (1 - t)) | is a | https://huggingface.co/papers/2505.05470 |
| `"dance_sde"` | as above | g sqrt(h), g = eta | above 0 | https://huggingface.co/papers/2505.07818 |
| `"cps"` | sqrt(t'^2 - s^2) | t' sin(eta pi / 2) | in [0, 1] | https://huggingface.co/papers/2509.05952 |
| `"ode"` | t' | 0 | not used | Euler, as `FlowMatchEulerDiscreteScheduler` |

A network at t' expects noise of level t' in its input. `"ddim"`, `"precise"` and `"cps"` have k^2 + s^2 = t'^2 and put exactly
that there. The Euler forms `"flow_sde"` and `"dance_sde"` put more, [`noise_excess`] says how much. As steps get
smaller all of them but `"cps"` keep the marginals of the model.
"""

import math

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging
from torch._subclasses.fake_tensor import FakeTensor

from .step_distribution import SamplingCode, StepDistribution, StepRule, broadcast_over, scheduler_code


logger = logging.get_logger(__name__)

# Largest eta of each sampler; beyond it there is no such step, or nothing of the sample is left.
LARGEST_ETA = {"ddim": 1.0, "precise": 1.5, "flow_sde": 2.0, "dance_sde": 2.0, "cps": 1.0, "ode": math.inf}
SAMPLERS = tuple(LARGEST_ETA)
# A step that ends this close to the image carries none of it, and would weigh 40 times as much as the others in the loss.
LAST_BRANCHING_SIGMA = 0.02
TOLERATED_EXCESS = 1.05  # of the noise level


def check_sampler(sampler: str) -> None:
    """
    Raises:
        ValueError: for a sampler that is not known.
    """
    if sampler not in LARGEST_ETA:
        raise ValueError(f"`sampler` must be one of {SAMPLERS}, got {sampler!r}.")


def check_flow_eta(eta: float, sampler: str) -> None:
    """
    Raises:
        ValueError: for an unknown sampler, or an `eta` outside of its range.
    """
    check_sampler(sampler)
    if not 0 <= eta <= LARGEST_ETA[sampler]:
        raise ValueError(f"`eta` must be in [0, {LARGEST_ETA[sampler]:g}] for the sampler {sampler!r}, got {eta}.")


def flow_step_coefficients(
    sigma: torch.Tensor, next_sigma: torch.Tensor, eta: float = 1.0, sampler: str = "ddim"
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The factor k of the predicted noise in the mean of a step, and its standard deviation s.

    Args:
        sigma, next_sigma (`torch.Tensor` of the same shape): t and t' in [0, 1], t > t'.
        eta (`float`, *optional*, defaults to `1.0`): amount of noise, see the table of this module.
        sampler (`str`, *optional*, defaults to `"ddim"`): one of `SAMPLERS`.

    Returns:
        `tuple` of two `torch.Tensor` of the shape of `sigma`, float64. Both are 0 where `next_sigma` is 0.

    Raises:
        ValueError: for an unknown sampler, or an `eta` outside of its range.
    """
    check_flow_eta(eta, sampler)
    t = sigma.double()
    following = next_sigma.double()
    zero = torch.zeros_like(t)
    if sampler == "ode" or eta == 0:
        return following, zero

    # The formulas of the table at the top of this module.
    if sampler == "cps":
        std = following * math.sin(eta * math.pi / 2)
        factor = following * math.cos(eta * math.pi / 2)
    elif sampler == "ddim":
        kept = (1 - t) / (1 - following) * following  # of the noise that is there; 0 at t = 1
        std = eta * following / t * (t**2 - kept**2).clamp(min=0).sqrt()
        factor = (following**2 - std**2).clamp(min=0).sqrt()
    elif sampler == "precise":
        rho = (following * (1 - t) / (t * (1 - following))) ** (eta**2)
        factor = following * rho
        std = following * (1 - rho**2).clamp(min=0).sqrt()
    else:
        diffusion = torch.full_like(t, eta)
        if sampler == "flow_sde":
            # The pole at t = 1 is left out as in the public code: 1 - t is taken from the next sigma, t stays.
            distance = torch.where(t >= 1, 1 - following, 1 - t)
            diffusion = eta * (t / distance).sqrt()
        size = t - following
        factor = following - diffusion**2 * size / (2 * t)
        std = diffusion * size.sqrt()

    # A step to t' = 0 ends at the image, which has no noise.
    last = following <= 0
    return torch.where(last, zero, factor), torch.where(last, zero, std)


def _as_sigmas(value: float | torch.Tensor, sample: torch.Tensor, name: str) -> torch.Tensor:
    value = torch.as_tensor(value, dtype=None if torch.is_tensor(value) else torch.float64)
    if value.ndim > 1 or (value.ndim == 1 and len(value) not in (1, len(sample))):
        raise ValueError(f"`{name}` must be a number or have shape ({len(sample)},), got {tuple(value.shape)}.")
    if value.device.type == "cpu" and not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(f"`{name}` must lie in [0, 1], got {value.tolist()}.")
    return value


def flow_step_stats(
    model_output: torch.Tensor,
    sigma: float | torch.Tensor,
    next_sigma: float | torch.Tensor,
    sample: torch.Tensor,
    eta: float = 1.0,
    sampler: str = "ddim",
) -> StepDistribution:
    r"""
    Mean and standard deviation of the step from x_t to x_{t'}.

    Args:
        model_output (`torch.Tensor` of the shape of `sample`): the (guided) velocity.
        sigma (`float` or `torch.Tensor` of shape `(batch_size,)`): t in [0, 1].
        next_sigma (`float` or `torch.Tensor` of shape `(batch_size,)`): t' in [0, 1], below `sigma`.
        sample (`torch.Tensor` of shape `(batch_size, ...)`): x_t.
        eta (`float`, *optional*, defaults to `1.0`): amount of noise; its range and meaning are the sampler's. At 0 every
            sampler is the Euler step of the ODE.
        sampler (`str`, *optional*, defaults to `"ddim"`): `"ddim"`, `"precise"`, `"flow_sde"`, `"dance_sde"`, `"cps"` or
            `"ode"`, see the table of this module.

    Returns:
        [`StepDistribution`] in float32 (float64 if `sample` is). Its standard deviation is 0 at `next_sigma` = 0.

    Raises:
        ValueError: for an unknown sampler, an `eta` or sigmas outside of their range, or shapes that do not fit.
            Sigmas on an accelerator are trusted, as reading them would wait for it.
    """
    sigma = _as_sigmas(sigma, sample, "sigma")
    next_sigma = _as_sigmas(next_sigma, sample, "next_sigma").to(sigma.device)
    if sigma.device.type == "cpu" and not bool((sigma > next_sigma).all()):
        raise ValueError(
            f"A step goes from `sigma` down to `next_sigma`, got {sigma.tolist()} and {next_sigma.tolist()}."
        )
    factor, std = flow_step_coefficients(*torch.broadcast_tensors(sigma, next_sigma), eta, sampler)
    return _gaussian_step(model_output, sample, sigma, next_sigma, factor, std)


def _gaussian_step(model_output, sample, sigma, next_sigma, factor, std) -> StepDistribution:
    """N((1 - t') x_0 + k e, s^2), in the dtype of `sample` or float32. The numbers have one value, or one per row."""
    dtype = torch.promote_types(torch.float32, sample.dtype)
    model_output = model_output.to(dtype)
    sample = sample.to(dtype)
    level, following, factor, std = (
        broadcast_over(values.to(dtype), sample) for values in (sigma, next_sigma, factor, std)
    )
    pred_original_sample = sample - level * model_output
    noise = sample + (1 - level) * model_output
    return StepDistribution((1 - following) * pred_original_sample + factor * noise, std, pred_original_sample)


def flow_add_noise(sample: torch.Tensor, noise: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t) x_0 + t e, for `sample` and `noise` of shape `(batch_size, ...)` and t of shape `(batch_size,)`."""
    level = broadcast_over(_as_sigmas(sigma, sample, "sigma").to(sample.dtype), sample)
    return (1 - level) * sample + level * noise


def noise_excess(sigmas: list[float] | torch.Tensor, eta: float = 1.0, sampler: str = "ddim") -> list[float]:
    """
    Noise that each step leaves, divided by what the network expects there: sqrt(k^2 + s^2) / t', from a state of exactly
    the right level. 1 is exact. The step to 0 is left out.

    Args:
        sigmas (`list[float]` or `torch.Tensor` of shape `(num_steps + 1,)`): the schedule, decreasing, to 0 or above.
        eta (`float`, *optional*, defaults to `1.0`), sampler (`str`, *optional*, defaults to `"ddim"`): of the steps.
    """
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
    current = sigmas[:-1]
    following = sigmas[1:]
    kept = following > 0
    factor, std = flow_step_coefficients(current[kept], following[kept], eta, sampler)
    return ((factor**2 + std**2).sqrt() / following[kept]).tolist()


# What a `FlowMatchEulerDiscreteScheduler` may be told about its schedule.
SCHEDULE_SETTINGS = (
    "shift use_dynamic_shifting base_shift max_shift base_image_seq_len max_image_seq_len shift_terminal time_shift_type"
).split()


class FlowStepRule(StepRule):
    """
    What a flow-matching pipeline answers about its steps: timesteps, step distribution, x_0, forward noise.

    Timesteps are integers round(1000 sigma) in pairs, logs and rewards; a table behind them has the exact sigma. Steps that
    end at or below `LAST_BRANCHING_SIGMA` are taken without noise and never branch: Stable Diffusion 3's schedule has one
    from about 0.2 to 0.009 before the last.

    Args:
        scheduler ([`~diffusers.FlowMatchEulerDiscreteScheduler`]): makes the sigmas; it belongs to the rule.
        sampler (`str`, *optional*, defaults to `"ddim"`): one of `SAMPLERS`.
    """

    sampler_name = "FlowMatchEuler"

    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler, sampler: str = "ddim"):
        self.scheduler = scheduler
        self.set_sampler(sampler)
        self.sigmas: list[float] = []
        # Timestep -> its sigma, and the sigma that follows in the schedule. Other timesteps are t / 1000.
        self._sigma = torch.arange(self.num_train_timesteps + 1, dtype=torch.float64) / self.num_train_timesteps
        self._current = self._sigma.clone()
        self._next = torch.full_like(self._sigma, math.nan)
        self._tables: dict[tuple, torch.Tensor] = {}  # what steps are made of, see `_look_up`
        self._values: dict[int, float] = {}  # the same for single timesteps, without a tensor
        self._warned: set[tuple] = set()

    @property
    def num_train_timesteps(self) -> int:
        return self.scheduler.config.num_train_timesteps

    def set_timesteps(self, num_inference_steps: int, **schedule) -> list[int]:
        """
        Args:
            num_inference_steps (`int`): S.
            schedule: further arguments of the scheduler's `set_timesteps`, such as `sigmas` and `mu`.

        Returns:
            `list[int]`: t_0 > t_1 > ..., S of them.

        Raises:
            ValueError: if two steps would have the same integer timestep.
        """
        if "sigmas" in schedule:
            self.scheduler.set_timesteps(**schedule)
        else:
            self.scheduler.set_timesteps(num_inference_steps, **schedule)
        sigmas = self.scheduler.sigmas.double().tolist()
        if sigmas == self.sigmas:  # asked for at every step of a training: its tables stay
            return list(self._values)
        self.sigmas = sigmas
        current = torch.tensor(self.sigmas[:-1]).double()
        following = torch.tensor(self.sigmas[1:]).double()
        timesteps = (current * self.num_train_timesteps).round().long()
        if len(set(timesteps.tolist())) < len(timesteps):
            raise ValueError(
                f"{num_inference_steps} steps of this schedule are so close that some have the same integer timestep. Use "
                "fewer steps, or a scheduler with a smaller shift."
            )
        self._current = self._sigma.clone()
        self._current[timesteps] = current
        self._next = torch.full_like(self._sigma, math.nan)
        self._next[timesteps] = following
        self._tables.clear()
        self._values = dict(zip(timesteps.tolist(), self.sigmas[:-1], strict=True))
        return timesteps.tolist()

    def set_sampler(self, sampler: str) -> None:
        check_sampler(sampler)
        self.sampler = sampler

    def snr(self, timestep: int) -> float:
        sigma = self.sigma(timestep).item()
        return ((1 - sigma) / sigma) ** 2 if sigma > 0 else math.inf

    def check_eta(self, eta: float) -> None:
        """
        Raises:
            ValueError: if the sampler has no steps with this much noise. 0 is legal: the steps of the ODE.
        """
        check_flow_eta(eta, self.sampler)
        self.warn_about_noise(eta)

    def warn_about_noise(self, eta: float) -> None:
        """Say once if the sampler leaves more noise in some step than the network expects there."""
        key = (len(self.sigmas), eta, self.sampler)
        if not self.sigmas or key in self._warned:
            return
        self._warned.add(key)
        excess = noise_excess(self.sigmas, eta, self.sampler)
        worst = max(range(len(excess)), key=excess.__getitem__, default=None)
        if worst is None or excess[worst] <= TOLERATED_EXCESS:
            return
        remedy = "Use the sampler 'ddim' or 'precise', whose steps are exact, or a smaller `eta`."
        if self.sigmas[worst + 1] <= LAST_BRANCHING_SIGMA:
            remedy = f"This step is taken without noise, the others may still be too noisy. {remedy}"
        logger.warning(
            f"The sampler {self.sampler!r} with eta {eta:g} leaves {excess[worst]:.1f} times the noise that the network "
            f"expects after step {worst} (sigma {self.sigmas[worst]:.3f} to {self.sigmas[worst + 1]:.3f}). {remedy}"
        )

    def is_stochastic(self, step: int, eta: float) -> bool:
        """Whether step number `step` of the schedule has noise, so that candidates differ."""
        return self.sampler != "ode" and eta > 0 and self.sigmas[step + 1] > LAST_BRANCHING_SIGMA

    def sigma(self, timesteps: int | torch.Tensor) -> torch.Tensor:
        """Exact sigma of integer timesteps, float32, where the timesteps are."""
        return self._look_up("sigma", torch.float32, timesteps)[0]

    def sigma_value(self, timestep: int) -> float:
        """The same as a number."""
        return self._values.get(timestep, timestep / self.num_train_timesteps)

    def _table(self, eta: float) -> torch.Tensor:
        """Timestep -> sigma, next sigma, factor of the noise and standard deviation: `(4, T + 1)`, float64, on the CPU."""
        known = ~self._next.isnan()
        current = self._current[known]
        following = self._next[known]
        noisy_factor, noisy_std = flow_step_coefficients(current, following, eta, self.sampler)
        # Close to the image a step is Euler's: no noise, whatever the sampler is.
        branches = following > LAST_BRANCHING_SIGMA
        factor = torch.full_like(self._next, math.nan)
        std = torch.full_like(self._next, math.nan)
        factor[known] = torch.where(branches, noisy_factor, following)
        std[known] = torch.where(branches, noisy_std, torch.zeros_like(noisy_std))
        return torch.stack([self._current, self._next, factor, std])

    def _look_up(self, key: str | float, dtype: torch.dtype, timesteps: int | torch.Tensor) -> torch.Tensor:
        """
        Columns of a table: of "sigma", or of the steps with an eta. It is made once per schedule and device and sent there
        without a wait; a timestep that is a number is looked up on the CPU.
        """
        timesteps = torch.as_tensor(timesteps).long()
        place = (key, self.sampler, dtype, timesteps.device)
        if place not in self._tables:
            table = self._current[None] if key == "sigma" else self._table(key)
            table = table.to(dtype).to(timesteps.device, non_blocking=timesteps.device.type != "cpu")
            if isinstance(table, FakeTensor):  # of an estimate of memory: it has no values to be kept
                return table[:, timesteps]
            self._tables[place] = table
        return self._tables[place][:, timesteps]

    def distribution(
        self, model_output: torch.Tensor, timesteps: int | torch.Tensor, latents: torch.Tensor, eta: float
    ) -> StepDistribution:
        """
        Distribution of x_{t'} given x_t under a velocity; arguments as of `SPOPipeline.step_distribution`.

        Raises:
            ValueError: for a timestep that the schedule does not have.
        """
        row = self._look_up(eta, torch.promote_types(torch.float32, latents.dtype), timesteps)
        if row.device.type == "cpu" and bool(row.isnan().any()):
            raise ValueError(f"The schedule has no step at timestep {timesteps}; call `set_timesteps` first.")
        return _gaussian_step(model_output, latents, *row)

    def predict_original_sample(
        self, model_output: torch.Tensor, timesteps: int | torch.Tensor, latents: torch.Tensor
    ) -> torch.Tensor:
        """x_0 = x_t - t v at any training timestep, float32."""
        dtype = torch.promote_types(torch.float32, latents.dtype)
        level = broadcast_over(self._look_up("sigma", dtype, timesteps)[0], latents)
        return latents.to(dtype) - level * model_output.to(dtype)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t of the forward process."""
        return flow_add_noise(latents, noise, self.sigma(timesteps).to(latents.device))

    def description(self, eta: float) -> str:
        if self.sampler == "ode" or eta == 0:
            return self.sampler_name
        return f"{self.sampler_name} sigmas with stochastic steps ({self.sampler}, eta {eta:g})"

    def sampling_code(self, eta: float) -> SamplingCode:
        """diffusers takes the steps of the ODE, which have the same marginals: only the schedule has to be the same."""
        setup = [scheduler_code(self.scheduler, SCHEDULE_SETTINGS)]
        return SamplingCode(imports=[type(self.scheduler).__name__], setup=setup, arguments=[])
