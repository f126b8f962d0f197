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
What `sample` and `evaluate` share: the protocol that their arguments mean, and what they write down about model and prompts.
"""

import dataclasses
import secrets
from pathlib import Path
from typing import Any

from .arguments import LoadedPipelineArguments, SamplerArguments


LARGEST_RANDOM_SEED = 2**31  # so that it can be typed


def make_protocol(
    name: str, sampler_args: SamplerArguments, model_args: LoadedPipelineArguments, lora: str | Path | None = None
):
    """
    The named [`EvaluationProtocol`] with the sampler options that were given, which become part of its name.

    Args:
        name (`str`): one of `PROTOCOLS`, or `"trained"`.
        sampler_args ([`SamplerArguments`]): the options, and the LoRA that may say how it was trained.
        model_args ([`LoadedPipelineArguments`]): the model; without a LoRA, the folder of one that was merged may say so.
        lora (`str` or `Path`, *optional*): the LoRA that says so, if it is another one.

    Raises:
        SystemExit: if there is no such protocol, or the file of the LoRA's sampler is broken.
    """
    from ..evaluation.protocols import find_protocol

    try:
        trained = lora or sampler_args.lora
        if trained is None and Path(model_args.model_name_or_path).is_dir():
            trained = model_args.model_name_or_path
        protocol = find_protocol(name, trained)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    given = sampler_args.overrides()
    if sampler_args.seed is not None:
        given["seed"] = sampler_args.seed[0]
    changes = {key: value for key, value in given.items() if getattr(protocol, key) != value}
    if not changes:
        return protocol
    changed = ", ".join(f"{key}={value!r}" for key, value in changes.items())
    return dataclasses.replace(protocol, name=f"{protocol.name} with {changed}", **changes)


def draw_random_seed(sampler_args: SamplerArguments) -> None:
    """Replaces a seed of -1 by a random one, which everything that is written later names."""
    if sampler_args.seed is not None:
        sampler_args.seed = [
            secrets.randbelow(LARGEST_RANDOM_SEED) if seed < 0 else seed for seed in sampler_args.seed
        ]


class LoraSlot:
    """
    The LoRA of a pipeline, which may be exchanged, weighed and taken out from one image to the next.

    Args:
        pipeline ([`SPOPipeline`]): on its device.
    """

    def __init__(self, pipeline):
        self.pipeline = pipeline
        self.source: Path | None = None

    def set(self, source: Path | None, scale: float = 1.0) -> None:
        """
        Args:
            source (`Path`, *optional*): the file; `None` for the model without any.
            scale (`float`, *optional*, defaults to `1.0`): its weight.

        Raises:
            ValueError: if it does not fit the pipeline.
        """
        from ..export import load_lora_whole

        diffusers = self.pipeline.sd_pipeline
        if source is None:
            if self.source is not None:
                diffusers.disable_lora()
            return
        if source != self.source:
            if self.source is not None:
                diffusers.delete_adapters("spo")
            load_lora_whole(diffusers, source, with_text_encoders=True, adapter_name="spo")
            self.source = source
        diffusers.enable_lora()
        diffusers.set_adapters("spo", scale)


def describe_model(model_args: LoadedPipelineArguments, pipeline) -> dict[str, Any]:
    """
    Which weights make the images, for the records of both commands; what is said of a LoRA is for them to add.

    Args:
        model_args ([`LoadedPipelineArguments`]): the arguments.
        pipeline ([`SPOPipeline`]): what they were loaded into.
    """
    from ..evaluation.provenance import describe_pipeline

    found = describe_pipeline(pipeline) | {"model": model_args.model_name_or_path}
    found.pop("adapters", None)
    for name, value in (("revision", model_args.revision), ("vae", model_args.vae_name_or_path)):
        if value is not None:
            found.setdefault(name, value)
    if model_args.model_init_kwargs:
        found["model_init_kwargs"] = model_args.model_init_kwargs
    return found
