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

"""Turn any pipeline that users have into the one that SPO trains: [`wrap_pipeline`] and its table of model families."""

from pathlib import Path
from typing import Any

from ..hub_files import load_diffusers_pipeline
from .base import SPOPipeline
from .flux import SPOFluxPipeline
from .flux2 import SPOFlux2KleinPipeline
from .qwen_image import SPOQwenImagePipeline
from .stable_diffusion import SPOStableDiffusionPipeline
from .stable_diffusion_3 import SPOStableDiffusion3Pipeline
from .stable_diffusion_xl import SPOStableDiffusionXLPipeline
from .z_image import SPOZImagePipeline


# Class name of a diffusers pipeline (or of one of its bases) -> the class that SPO trains it with.
FAMILIES: dict[str, type[SPOPipeline]] = {
    "StableDiffusionPipeline": SPOStableDiffusionPipeline,
    "StableDiffusionXLPipeline": SPOStableDiffusionXLPipeline,
    "StableDiffusion3Pipeline": SPOStableDiffusion3Pipeline,
    "FluxPipeline": SPOFluxPipeline,
    "Flux2KleinPipeline": SPOFlux2KleinPipeline,
    "ZImagePipeline": SPOZImagePipeline,
    "QwenImagePipeline": SPOQwenImagePipeline,
}


def wrap_pipeline(pipeline: Any, **from_pretrained_kwargs) -> SPOPipeline:
    """
    Turn what users have into an [`SPOPipeline`].

    Args:
        pipeline: an [`SPOPipeline`] (returned as it is), a diffusers pipeline of one of the `FAMILIES`, such as
            `StableDiffusionPipeline`, TRL's `DefaultDDPOStableDiffusionPipeline` (TRL <= 0.23.1), or the path or Hub id
            of a diffusers pipeline.
        from_pretrained_kwargs: passed to `DiffusionPipeline.from_pretrained` for a path or Hub id, such as
            `dtype` (also by name, as in "float16"), `variant` or `revision`. `vae` may be the path or Hub id of
            another VAE, such as `madebyollin/sdxl-vae-fp16-fix`: SDXL's own does not survive half precision.

    Raises:
        TypeError: for any other object; the message lists what is accepted.
        ValueError: if a path cannot be loaded, or a component that SPO needs is missing or of the wrong kind.
    """
    if isinstance(pipeline, SPOPipeline):
        return pipeline
    given = pipeline
    if isinstance(pipeline, (str, Path)):
        pipeline = load_diffusers_pipeline(pipeline, **from_pretrained_kwargs)
    elif hasattr(pipeline, "sd_pipeline"):  # TRL's DDPO wrapper
        pipeline = pipeline.sd_pipeline
    for base in type(pipeline).__mro__:
        if base.__name__ in FAMILIES:
            return FAMILIES[base.__name__](pipeline)
    *others, last = (f"`{name}`" for name in FAMILIES)
    raise TypeError(
        f"`pipeline` must be an SPO pipeline, a diffusers {', '.join(others)} or {last}, TRL's "
        "`DefaultDDPOStableDiffusionPipeline`, or a path or Hub id of one of these; got "
        f"{_describe(given)}" + ("." if given is pipeline else f", which holds a `{type(pipeline).__name__}`.")
    )


def _describe(value: Any) -> str:
    return repr(value) if isinstance(value, (str, Path)) else f"an object of type `{type(value).__name__}`"
