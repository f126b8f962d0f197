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
What `trl-spo sample` makes: every prompt with every seed, under one setting or under all of a grid.

A grid has one axis or two, each of which changes one thing: the weight of the LoRA, guidance, noise, steps, or the checkpoint
of a run.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..suggestions import did_you_mean
from .arguments import SamplerArguments


LONGEST_AXIS = 10  # values: a sheet of 10 x 10 images is about as large as a screen shows
MOST_SHEETS = 16  # of two axes, one per prompt and seed
AXES: dict[str, Callable[[str], Any]] = {  # name -> how a value is read
    "lora_scale": float,
    "guidance_scale": float,
    "eta": float,
    "num_inference_steps": int,
    "checkpoint": str,
}


@dataclasses.dataclass(frozen=True)
class Axis:
    """
    One direction of a grid.

    Attributes:
        name (`str`): what changes along it; one of `AXES`, or `"model"` for the base model beside the LoRA.
        values (`tuple`): what it becomes.
    """

    name: str
    values: tuple

    def labels(self) -> list[str]:
        """What is written at the images."""
        if self.name == "model":
            return list(self.values)
        return [f"{self.name} {in_short(value)}" for value in self.values]


@dataclasses.dataclass(frozen=True)
class Variant:
    """
    One setting under which all prompts are sampled.

    Attributes:
        row, column (`int`): its place on the grid.
        values (`dict`): what sets it apart, by the names of the axes.
        lora (`Path`, *optional*): file of its LoRA; `None` for the base model.
        lora_scale (`float`): weight of the LoRA.
        changes (`dict`): settings of the protocol that it changes.
    """

    row: int
    column: int
    values: dict[str, Any]
    lora: Path | None
    lora_scale: float
    changes: dict[str, Any]

    def slug(self) -> str:
        """For names of files: what sets it apart, in characters that every file system takes."""
        if "model" in self.values:
            return "_base" if self.lora is None else ""
        text = "".join(f"_{name}-{in_short(value)}" for name, value in self.values.items())
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)


@dataclasses.dataclass(frozen=True)
class Plan:
    """
    All that one call makes.

    Attributes:
        jobs (`list[tuple[str, int]]`): prompt and seed of each image of a setting.
        x, y ([`Axis`], *optional*): the axes; a grid with one axis has it as `x`.
        variants (`list[Variant]`): the settings, those of one LoRA after each other.
    """

    jobs: list[tuple[str, int]]
    x: Axis | None
    y: Axis | None
    variants: list[Variant]

    def num_images(self) -> int:
        return len(self.jobs) * len(self.variants)

    def loras(self) -> list[Path]:
        """The files of all LoRAs, each once."""
        return list(dict.fromkeys(variant.lora for variant in self.variants if variant.lora is not None))


def in_short(value: Any) -> str:
    """A value of an axis as people write it: 0.5, 1, last."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_axis(option: str, text: str | None) -> Axis | None:
    """
    The axis that an option means, such as `lora_scale=0,0.5,1`.

    Raises:
        SystemExit: if it is not written like that, its name is unknown, or it has too many or equal values.
    """
    if text is None:
        return None
    name, equals, listed = text.partition("=")
    if name not in AXES or not equals:
        raise SystemExit(
            f"--{option} must be NAME=VALUE,VALUE,... with one of the names {', '.join(AXES)}, such as "
            f"lora_scale=0,0.5,1; got {text!r}{did_you_mean(name, AXES) or '.'}"
        )
    words = [word.strip() for word in listed.split(",") if word.strip()]
    try:
        values = tuple(AXES[name](word) for word in words)
    except ValueError:
        raise SystemExit(f"The values of --{option} {name} must be numbers, got {listed!r}.") from None
    if not 1 <= len(values) <= LONGEST_AXIS or len(set(values)) < len(values):
        raise SystemExit(
            f"--{option} takes 1 to {LONGEST_AXIS} different values of {name}, got {len(values)}: {listed!r}."
        )
    return Axis(name, values)


def make_plan(sampler_args: SamplerArguments, sample_args, prompts: list[str]) -> Plan:
    """
    What to make. Every LoRA that it needs has been found.

    Args:
        sampler_args ([`SamplerArguments`]), sample_args ([`SampleArguments`]): the arguments.
        prompts (`list[str]`): the prompts.

    Raises:
        FileNotFoundError: if a LoRA is missing.
        SystemExit: if the arguments contradict each other.
    """
    jobs = _jobs(sampler_args.seed, sample_args.images_per_prompt, prompts)
    x, y = _axes(sampler_args, sample_args)
    if x is not None and y is not None and len(jobs) > MOST_SHEETS:
        raise SystemExit(
            f"A grid of --x and --y is a picture per prompt and seed, at most {MOST_SHEETS} of them; these are {len(jobs)}. Take "
            "fewer with --num_prompts, or one axis, which takes all prompts on one picture."
        )

    # One setting per place on the grid.
    checkpoints = _checkpoints(sampler_args.lora, [axis for axis in (x, y) if axis is not None])
    lora = None if checkpoints else sampler_args.locate_lora()
    variants = []
    for row, y_value in enumerate(y.values if y else [None]):
        for column, x_value in enumerate(x.values if x else [None]):
            values = {axis.name: value for axis, value in ((x, x_value), (y, y_value)) if axis is not None}
            variants.append(_variant(row, column, values, checkpoints, lora, sampler_args.lora_scale))
    variants.sort(key=lambda variant: str(variant.lora or ""))  # so that each LoRA is loaded once
    return Plan(jobs, x, y, variants)


def _jobs(seeds: list[int] | None, images_per_prompt: int, prompts: list[str]) -> list[tuple[str, int]]:
    """Prompt and seed of each image. One seed: image i has seed + i. Several: each prompt gets an image from each."""
    if seeds is not None and len(seeds) > 1:
        if images_per_prompt > 1:
            raise SystemExit(
                f"--seed names {len(seeds)} seeds, so each prompt gets {len(seeds)} images; leave out --images_per_prompt, or "
                "give the first seed alone."
            )
        return [(prompt, seed) for prompt in prompts for seed in seeds]
    first = seeds[0] if seeds else 0
    repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    return [(prompt, first + index) for index, prompt in enumerate(repeated)]


def _axes(sampler_args: SamplerArguments, sample_args) -> tuple[Axis | None, Axis | None]:
    """The axes of the grid; one alone is the horizontal one."""
    x = read_axis("x", sample_args.x)
    y = read_axis("y", sample_args.y)
    if x is None:
        x = y
        y = None
    if x is not None and y is not None and x.name == y.name:
        raise SystemExit(f"--x and --y both change {x.name}; give two different ones.")
    if sample_args.base:
        if sampler_args.lora is None:
            raise SystemExit("--base shows the model without the LoRA beside it, and there is no --lora.")
        if x is not None:
            raise SystemExit(
                "--base is a grid of its own; for the base model on another one, give lora_scale the value 0."
            )
        x = Axis("model", ("base model", "LoRA"))
    for axis in (x, y):
        if axis is not None and axis.name in ("lora_scale", "checkpoint") and sampler_args.lora is None:
            raise SystemExit(f"A grid over {axis.name} needs a --lora.")
    return x, y


def _checkpoints(run: str | None, axes: list[Axis]) -> dict[str, Path]:
    """The LoRA of each checkpoint on an axis, by its number; `last` is what the run saved at its end."""
    from ..export import locate_lora

    wanted = [value for axis in axes if axis.name == "checkpoint" for value in axis.values]
    found = {}
    for value in wanted:
        number = value.removeprefix("checkpoint-")
        folder = Path(run) if value == "last" else Path(run) / f"checkpoint-{number}"
        if not folder.is_dir():
            existing = sorted(Path(run).glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
            names = ", ".join(path.name.removeprefix("checkpoint-") for path in existing) or "no checkpoints"
            raise SystemExit(
                f"There is no checkpoint {value!r} in {run!r}; there are {names}, and `last` is the run's end."
            )
        found[value] = locate_lora(folder)
    return found


def _variant(
    row: int, column: int, values: dict[str, Any], checkpoints: dict[str, Path], lora: Path | None, lora_scale: float
) -> Variant:
    """The setting at one place of the grid."""
    if values.get("model") == "base model":
        lora = None
    if "checkpoint" in values:
        lora = checkpoints[values["checkpoint"]]
    changes = {name: value for name, value in values.items() if name not in ("model", "checkpoint", "lora_scale")}
    return Variant(row, column, values, lora, values.get("lora_scale", lora_scale), changes)
