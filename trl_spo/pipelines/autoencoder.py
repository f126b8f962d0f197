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

"""The autoencoders that turn latents into images."""

from pathlib import Path

import torch

from .base import SPOPipeline


def load_scoring_vae(vae: torch.nn.Module | str | Path | None, pipeline: SPOPipeline) -> torch.nn.Module | None:
    """
    A small decoder that stands in for the pipeline's VAE when candidates are scored.

    Weights are published as [madebyollin/taesd](https://huggingface.co/madebyollin/taesd) for Stable Diffusion 1 and 2
    and [madebyollin/taesdxl](https://huggingface.co/madebyollin/taesdxl) for SDXL, from
    https://github.com/madebyollin/taesd.

    Args:
        vae (`AutoencoderTiny` or other diffusers autoencoder, path or Hub id, *optional*): `None` is none. What a path
            or Hub id names is loaded as an `AutoencoderTiny`, in the dtype of the pipeline.
        pipeline ([`SPOPipeline`]): whose latents it decodes.

    Returns:
        `torch.nn.Module`: the decoder, frozen and in evaluation mode, on the device it was given or loaded on; `None`
        for `None`.

    Raises:
        TypeError: if it does not decode.
        ValueError: if it cannot be loaded, or takes other latents than the pipeline's.
    """
    if vae is None:
        return None
    if isinstance(vae, (str, Path)):
        from diffusers import AutoencoderTiny

        try:
            vae = AutoencoderTiny.from_pretrained(vae, torch_dtype=pipeline.dtype)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"Could not load an `AutoencoderTiny` for scoring from {str(vae)!r} ({error})."
            ) from error
    if not isinstance(vae, torch.nn.Module) or not hasattr(vae, "decode") or not hasattr(vae, "config"):
        raise TypeError(
            "`scoring_vae` must be a diffusers autoencoder such as `AutoencoderTiny`, or the path or Hub id of one, got "
            f"`{type(vae).__name__}`."
        )
    channels, expected = vae.config.latent_channels, pipeline.latent_shape()[0]
    if channels != expected:
        raise ValueError(
            f"`scoring_vae` decodes latents with {channels} channels, but the pipeline's have {expected}."
        )
    return vae.requires_grad_(False).eval()
