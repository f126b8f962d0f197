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
The memory of a whole run on networks that have shapes and no values: what is on the device all the time, and what a training
step adds. `training.memory` predicts the peak of a function; this module has the functions, and the precision that a trainer
runs them in.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..losses import spo_loss
from ..pipelines.base import SPOPipeline
from ..pipelines.conditioning import PromptEmbeds
from ..step_distribution import gaussian_log_prob
from .memory import module_bytes


NF4_BYTES = 0.5 + 4 / 64  # per weight: 4 bits, and a float32 number for every 64 of them (bitsandbytes, not nested)


# --- precision -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def normalisation_as_on_cuda() -> Iterator[None]:
    """
    Normalisation layers as autocast runs them on CUDA, in float32; on the CPU it leaves them in half precision. Their
    outputs are among the largest tensors of a training step. For predicting the memory of a GPU on fake CPU tensors.
    """
    classes = {torch.nn.LayerNorm: torch.nn.LayerNorm.forward, torch.nn.GroupNorm: torch.nn.GroupNorm.forward}

    def forward(self, hidden_states):
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled("cpu"):
            hidden_states = hidden_states.float()
            weight, bias = (None if value is None else value.float() for value in (weight, bias))
        if isinstance(self, torch.nn.LayerNorm):
            return torch.nn.functional.layer_norm(hidden_states, self.normalized_shape, weight, bias, self.eps)
        return torch.nn.functional.group_norm(hidden_states, self.num_groups, weight, bias, self.eps)

    try:
        for layer in classes:
            layer.forward = forward
        yield
    finally:
        for layer, original in classes.items():
            layer.forward = original


@contextlib.contextmanager
def autocast_of(dtype: torch.dtype | None, device: str = "cpu", like_cuda: bool = True) -> Iterator[None]:
    """
    The context of a trainer with `bf16=True` or `fp16=True`.

    Args:
        dtype (`torch.dtype`, *optional*): `torch.bfloat16` or `torch.float16`; `None` and float32 change nothing.
        device (`str`, *optional*, defaults to `"cpu"`): type of the device that the tensors say they are on.
        like_cuda (`bool`, *optional*, defaults to `True`): on CPU tensors, normalise as CUDA does.
    """
    if dtype in (None, torch.float32):
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device, dtype=dtype))
        if like_cuda and device == "cpu":
            stack.enter_context(normalisation_as_on_cuda())
        yield


# --- networks without values -----------------------------------------------------------------------------------------


def make_fake(fake_mode: FakeTensorMode, *modules: torch.nn.Module, device: str = "cpu") -> None:
    """Networks of the meta device as if they were on `device`: of the fake mode, so that they take no memory there."""
    with fake_mode:
        for module in modules:
            module.to_empty(device=device)


def give_gradients(model: torch.nn.Module, fake_mode: FakeTensorMode) -> None:
    """As they are from the first micro-batch of an accumulation on; so they count among the weights, not the step."""
    with fake_mode:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)


def trained_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters that are trained."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def linear_weights(model: torch.nn.Module) -> int:
    """Number of weights of the plain linear layers, which are what a library quantises."""
    return sum(layer.weight.numel() for layer in model.modules() if type(layer) is torch.nn.Linear)


def frozen_bytes(pipeline: SPOPipeline) -> dict[str, int]:
    """
    Bytes of the networks of a pipeline that are never trained.

    Returns:
        `dict[str, int]`: of `"VAE"`, `"text encoders"` and, where there are any (a safety checker, for example), `"others"`.
    """
    frozen = pipeline.frozen_modules()
    encoders = pipeline.text_encoders()
    others = [module for name, module in frozen.items() if name != "vae" and name not in encoders]
    found = {"VAE": module_bytes(pipeline.vae), "text encoders": module_bytes(*encoders.values())}
    if others:
        found["others"] = module_bytes(*others)
    return found


# --- a training step -------------------------------------------------------------------------------------------------


def spo_training_step(
    pipeline: SPOPipeline,
    model: torch.nn.Module,
    embeds_of: Callable[[int], PromptEmbeds],
    num_pairs: int,
    num_samples: int,
    guidance_scale: float,
    latent_shape: tuple[int, ...],
    latent_dtype: torch.dtype,
    timestep: int,
    device: str = "cpu",
) -> Callable[[], None]:
    """
    Reference forward, policy forward and backward, as [`SPOTrainer.compute_loss`] does them.

    Args:
        pipeline ([`SPOPipeline`]), model (`torch.nn.Module`): with its adapter; what `prepare_for_training` returned.
        embeds_of (`Callable[[int], PromptEmbeds]`): embeddings of so many prompts.
        num_pairs (`int`): of a micro-batch.
        num_samples (`int`): rows of the batch, at least `num_pairs`: a pair of a branch with several steps may have an x_t
            for each of its two transitions.
        guidance_scale (`float`), latent_shape (`tuple[int, ...]`), latent_dtype (`torch.dtype`), timestep (`int`): what the
            policy is asked. The timestep must be one of the schedule.
        device (`str`, *optional*, defaults to `"cpu"`): of the tensors.

    Returns:
        `Callable[[], None]`: one step, for [`peak_activation_bytes`].
    """
    shape = (num_samples, *latent_shape)

    def step():
        latents, previous = (torch.zeros(shape, dtype=latent_dtype, device=device) for _ in range(2))
        timesteps = torch.full((num_samples,), timestep, device=device)
        embeds = embeds_of(num_samples)

        def distribution(denoiser):
            output = pipeline.predict(latents, timesteps, embeds, guidance_scale, denoiser)
            return pipeline.step_distribution(output, timesteps, latents, 1.0)

        with torch.no_grad(), pipeline.reference() as reference:
            ref_mean, std, _ = distribution(reference)
        mean = distribution(model).prev_sample_mean
        log_probs = gaussian_log_prob(previous, mean, std)
        ref_log_probs = gaussian_log_prob(previous, ref_mean, std)
        rejected = slice(num_samples // 2, None) if num_samples > num_pairs else slice(None)
        chosen = slice(num_pairs)
        losses = spo_loss(log_probs[chosen], log_probs[rejected], ref_log_probs[chosen], ref_log_probs[rejected])
        losses.losses.mean().backward()

    return step


def set_checkpointing(pipeline: SPOPipeline, model: torch.nn.Module, enabled: bool) -> None:
    """Checkpointing of activations on or off; diffusers checkpoints in training mode only."""
    denoiser = pipeline.denoiser
    (denoiser.enable_gradient_checkpointing if enabled else denoiser.disable_gradient_checkpointing)()
    model.train(enabled)
