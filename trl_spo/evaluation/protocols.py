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
Protocols of evaluations: everything a picture depends on besides the model, the prompt and the seed, under a name.

`PROTOCOLS` holds those of the literature. [`trained_protocol`] is the sampler that a LoRA was trained for, which is what
`trl-spo sample` and `trl-spo evaluate` start from where no protocol is named.
"""

import dataclasses
from pathlib import Path
from typing import Any

from ..pipelines.base import SPOPipeline
from ..sampler_file import read_sampler
from ..sampling import stochastic_steps


OPTIONS = ("guidance_rescale", "clip_skip")  # settings of some families only; 0 is off
TRAINED = "trained"  # stands for the sampler that the LoRA was trained for, or the default one where there is none


# --- a stated protocol -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EvaluationProtocol:
    """
    Everything a number depends on besides the model, the prompts and the metric.

    Attributes:
        name (`str`): what to call it in reports.
        scheduler (`str`, *optional*, defaults to `"DDIM"`): name of the sampler; must be the `sampler_name` of the
            pipeline's step rule. `None`: whichever the pipeline has, which [`protocol_of_pipeline`] fills in.
        num_inference_steps (`int`, *optional*, defaults to `20`): sampling steps, at least 1.
        guidance_scale (`float`, *optional*, defaults to `5.0`): classifier-free guidance; values up to 1 disable it.
        eta (`float`, *optional*, defaults to `0.0`): noise of each step; 0 is deterministic.
        guidance_rescale (`float`, *optional*, defaults to `0.0`), clip_skip (`int`, *optional*, defaults to `0`): as in
            diffusers, see [`SPOPipeline.configure`]; 0 is off.
        negative_prompt (`str`, *optional*, defaults to `""`): the same for every prompt.
        height, width (`int`, *optional*): pixels; the model's own size by default.
        seed (`int`, *optional*, defaults to `0`): image number i is drawn from seed `seed + i`.
        step_sampler (`str`, *optional*): kind of stochastic steps, the `sampler` of [`SPOConfig`]; what the pipeline is set
            to by default, which is `"ddim"` for a new one.
    """

    name: str
    scheduler: str | None = "DDIM"
    num_inference_steps: int = 20
    guidance_scale: float = 5.0
    eta: float = 0.0
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    seed: int = 0
    guidance_rescale: float = 0.0
    clip_skip: int = 0
    step_sampler: str | None = None

    def __post_init__(self):
        if self.num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, got {self.num_inference_steps}.")
        if not self.eta >= 0:
            raise ValueError(f"`eta` must not be negative, got {self.eta}.")
        if self.seed < 0:
            raise ValueError(f"`seed` must not be negative, got {self.seed}.")

    def sampler(self) -> dict[str, Any]:
        """The arguments of [`generate_images`] that this protocol fixes."""
        names = ("num_inference_steps", "guidance_scale", "eta", "negative_prompt", "height", "width")
        return {name: getattr(self, name) for name in (*names, *OPTIONS)} | {"sampler": self.step_sampler}

    def settings(self) -> dict[str, Any]:
        """The same without what is off or left to the model, for records that people read."""
        always = ("num_inference_steps", "guidance_scale", "eta", "negative_prompt")
        return {name: value for name, value in self.sampler().items() if name in always or value}

    def in_words(self) -> str:
        """One sentence for reports."""
        size = "the model's own size"
        if self.height or self.width:
            size = f"{self.height or 'default'} x {self.width or 'default'} pixels (height x width)"
        negative = f"negative prompt {self.negative_prompt!r}" if self.negative_prompt else "empty negative prompt"
        options = "".join(f"{name} {getattr(self, name):g}, " for name in OPTIONS if getattr(self, name))
        scheduler = self.scheduler or "the model's own scheduler"
        return (
            f"Protocol `{self.name}`: {scheduler}, {self.num_inference_steps} steps, guidance scale "
            f"{self.guidance_scale:g}, {options}eta {self.eta:g}{self._kind_of_steps()}, {negative}, {size}, image i from seed "
            f"{self.seed} + i."
        )

    def in_short(self) -> str:
        """For a heading."""
        return (
            f"{self.name}: {self.scheduler}, {self.num_inference_steps} steps, guidance {self.guidance_scale:g}, eta "
            f"{self.eta:g}{self._kind_of_steps()}"
        )

    def _kind_of_steps(self) -> str:
        return f" ({self.step_sampler})" if self.step_sampler not in (None, "ddim") and self.eta > 0 else ""


def _flow_protocol(name: str, num_inference_steps: int, guidance_scale: float) -> EvaluationProtocol:
    return EvaluationProtocol(
        name,
        scheduler="FlowMatchEuler",
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        eta=0.0,
    )


# Protocols by name. For another, make an [`EvaluationProtocol`] and give it a name of its own.
PROTOCOLS = {
    # Steps and guidance of the paper's tables. It does not state eta, and no evaluation code is public; wherever the
    # public code makes finished images (its validation, its inference scripts) it leaves diffusers' default of 0.
    "spo-paper": EvaluationProtocol("spo-paper"),
    # The sampler of the rollouts, which `generate_images` and the trainers' evaluation use by default.
    "spo-rollout": EvaluationProtocol("spo-rollout", eta=1.0),
    # The ODE of flow-matching models, as they are used: SD3 with the 40 steps of the reinforcement-learning papers and of the
    # model's card (Flow-GRPO, DiffusionNFT), the others with the defaults of their diffusers pipelines.
    "sd3": _flow_protocol("sd3", 40, 4.5),
    "flux": _flow_protocol("flux", 28, 3.5),
    "flux2-klein": _flow_protocol("flux2-klein", 50, 4.0),
    "z-image": _flow_protocol("z-image", 50, 5.0),
    "qwen-image": _flow_protocol("qwen-image", 50, 4.0),
}

# Where a LoRA does not say what it was trained for, and where there is none: the settings of [`SPOConfig`] and of
# [`generate_images`], with the scheduler of the model.
DEFAULT_PROTOCOL = dataclasses.replace(PROTOCOLS["spo-rollout"], name="default", scheduler=None)


def is_named(protocol: EvaluationProtocol) -> bool:
    """Whether it is a protocol that somebody named, and not the sampler of a training or the default one."""
    return protocol.name.partition(" with ")[0] not in (TRAINED, DEFAULT_PROTOCOL.name)


def find_protocol(name: str, lora: str | Path | None = None) -> EvaluationProtocol:
    """
    A protocol by name.

    Args:
        name (`str`): one of `PROTOCOLS`, or `"trained"` for [`trained_protocol`].
        lora (`str` or `Path`, *optional*): the LoRA, or the folder of a merged pipeline, that `"trained"` asks for its sampler.

    Raises:
        ValueError: for another name, or a LoRA whose file of the sampler is broken.
    """
    if name == TRAINED:
        return trained_protocol(lora)
    if name not in PROTOCOLS:
        raise ValueError(
            f"There is no protocol {name!r}; there are {', '.join([*PROTOCOLS, TRAINED])}. In Python, make an "
            "`EvaluationProtocol`."
        )
    return PROTOCOLS[name]


def trained_protocol(lora: str | Path | None) -> EvaluationProtocol:
    """
    The sampler that a LoRA was trained for, as [`SPOTrainer.save_model`] left it beside the weights.

    Args:
        lora (`str` or `Path`, *optional*): the file of the LoRA, its folder, or the Hub id of its repository.

    Returns:
        [`EvaluationProtocol`]: named `"trained"`; `DEFAULT_PROTOCOL` without a LoRA, or if it does not say.

    Raises:
        ValueError: if the file beside the LoRA is broken.
    """
    settings = read_sampler(lora) if lora is not None else None
    if settings is None:
        return DEFAULT_PROTOCOL
    if "sampler" in settings:
        settings["step_sampler"] = settings.pop("sampler")
    return dataclasses.replace(DEFAULT_PROTOCOL, name=TRAINED, **settings)


def protocol_of_pipeline(protocol: EvaluationProtocol, pipeline: SPOPipeline) -> EvaluationProtocol:
    """
    The protocol with the scheduler of the pipeline where it names none.

    Raises:
        ValueError: if the pipeline cannot sample under it: another scheduler, an eta outside of its range, a negative prompt
            or an option that the family does not have.
    """
    sampler = pipeline.step_rule.sampler_name
    if protocol.scheduler is None:
        protocol = dataclasses.replace(protocol, scheduler=sampler)
    if sampler != protocol.scheduler:
        raise ValueError(
            f"Protocol {protocol.name!r} asks for {protocol.scheduler}, but this pipeline samples with {sampler}. Give "
            f"a protocol with scheduler={sampler!r} and a name of its own."
        )
    pipeline.check_negative_prompt(protocol.negative_prompt)
    with stochastic_steps(pipeline, protocol.step_sampler):
        pipeline.step_rule.check_eta(protocol.eta)
    with pipeline.configured(**{name: getattr(protocol, name) for name in OPTIONS}):
        pass  # refused before the first image is sampled
    return protocol
