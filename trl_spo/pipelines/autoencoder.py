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
Encode images to latents in the scale of the denoiser and decode them, with the VAE of a pipeline or with a small decoder
that replaces it when candidates are scored.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..hub_files import DTYPE_ARGUMENT, whole_networks
from .components import unwrapped


def latent_channels(vae: torch.nn.Module) -> int | None:
    """Channels of the latents of an autoencoder; `None` if its configuration does not say."""
    return getattr(vae.config, "latent_channels", None) or getattr(vae.config, "z_dim", None)


def scale_and_shift(
    vae: torch.nn.Module, device: torch.device | None = None
) -> tuple[float | torch.Tensor, float | torch.Tensor]:
    """
    How the latents of a VAE become those of a denoiser: `latents = (vae_latents - shift) * scale`.

    Returns:
        `tuple` of two numbers, or of two float32 tensors of shape `(channels, 1, 1)` on `device` where the VAE has a
        mean and a standard deviation per channel.
    """
    config = vae.config
    scale = getattr(config, "scaling_factor", None) or 1.0
    shift = getattr(config, "shift_factor", None) or 0.0
    mean = getattr(config, "latents_mean", None)
    std = getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        shift = _per_channel(mean, device)
        scale = scale / _per_channel(std, device)
    return scale, shift


def _per_channel(values: list[float], device: torch.device | None) -> torch.Tensor:
    """One number per channel, `(channels, 1, 1)`, on the device, without waiting for it."""
    numbers = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
    return numbers if device is None else numbers.to(device, non_blocking=True)


def own_precision(vae: torch.nn.Module):
    """A VAE runs in the dtype of its weights, also inside a trainer's autocast: SDXL's overflows in float16."""
    return torch.autocast(next(vae.parameters()).device.type, enabled=False)


def encode(vae: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        vae (`torch.nn.Module`): an `AutoencoderKL` of diffusers, or one with the same methods.
        images (`torch.Tensor` of shape `(B, 3, H, W)`): in [-1, 1], on any device.

    Returns:
        `tuple` of mean and standard deviation of the latents, each `(B, channels, H / factor, W / factor)`, in the scale
        of the denoiser.
    """
    with own_precision(vae):
        posterior = vae.encode(images.to(next(vae.parameters()).device, vae.dtype)).latent_dist
    scale, shift = scale_and_shift(vae, posterior.mean.device)
    return (posterior.mean - shift) * scale, posterior.std * scale


def decode(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """
    Args:
        vae (`torch.nn.Module`): a diffusers autoencoder.
        latents (`torch.Tensor` of shape `(B, channels, h, w)`): in the scale of the denoiser.

    Returns:
        `torch.Tensor` of shape `(B, 3, H, W)`: images, float32, nominally in [-1, 1] (the decoder may overshoot a little).
    """
    scale, shift = scale_and_shift(vae, latents.device)
    with own_precision(vae):
        return vae.decode((latents / scale + shift).to(vae.dtype), return_dict=False)[0].float()


def shrink_latents(latents: torch.Tensor, image_size: int | None, factor: int) -> torch.Tensor:
    """
    Latents `(B, channels, h, w)` at the size that decodes to `image_size` pixels on the short side, by bilinear
    interpolation with antialiasing. Those that are not larger, or all for `None`, stay as they are.

    This is an approximation and changes scores: measure it before you train with it (`benchmarks/approximations.py`, and
    `docs/performance.md` for what it does in the shapes world).
    """
    short = min(latents.shape[-2:])
    if image_size is None or image_size >= short * factor:
        return latents
    scale = image_size / (short * factor)
    size = [max(1, round(side * scale)) for side in latents.shape[-2:]]
    return F.interpolate(latents.float(), size, mode="bilinear", antialias=True, align_corners=False)


def load_scoring_vae(vae: torch.nn.Module | str | Path | None, pipeline: Any) -> torch.nn.Module | None:
    """
    A small decoder that stands in for the pipeline's VAE when candidates are scored.

    Weights are published at https://github.com/madebyollin/taesd, among them
    [madebyollin/taesd](https://huggingface.co/madebyollin/taesd) for Stable Diffusion 1 and 2, `taesdxl` for SDXL,
    `taesd3` for Stable Diffusion 3 and `taef1` for FLUX.1.

    Args:
        vae (`AutoencoderTiny` or other diffusers autoencoder, path or Hub id, *optional*): `None` keeps the pipeline's own
            VAE. What a path or Hub id names is loaded as an `AutoencoderTiny`, in the dtype of the pipeline.
        pipeline ([`SPOPipeline`]): the pipeline whose latents it decodes.

    Returns:
        `torch.nn.Module`: the decoder, frozen and in evaluation mode, on the device it was given or loaded on; `None`
        for `None`.

    Raises:
        TypeError: if it does not decode.
        ValueError: if it cannot be loaded, or takes other latents than the pipeline's.
    """
    # Load it, if it is given by name.
    if vae is None:
        return None
    if isinstance(vae, (str, Path)):
        from diffusers import AutoencoderTiny

        try:
            with whole_networks():
                vae = AutoencoderTiny.from_pretrained(vae, **{DTYPE_ARGUMENT: pipeline.compute_dtype})
        except (OSError, ValueError, TypeError) as error:  # the last one for a file
            raise ValueError(
                f"Could not load an `AutoencoderTiny` for scoring from {str(vae)!r} ({error})."
            ) from error

    # Check that it can decode these latents.
    vae = unwrapped(vae) if isinstance(vae, torch.nn.Module) else vae
    if not isinstance(vae, torch.nn.Module) or not hasattr(vae, "decode") or not hasattr(vae, "config"):
        raise TypeError(
            "`scoring_vae` must be a diffusers autoencoder such as `AutoencoderTiny`, or the path or Hub id of one, got "
            f"`{type(vae).__name__}`."
        )
    channels = latent_channels(vae)
    expected = latent_channels(pipeline.vae)
    if channels != expected:
        raise ValueError(
            f"`scoring_vae` decodes latents with {channels} channels, but the pipeline's have {expected}."
        )
    return vae.requires_grad_(False).eval()
