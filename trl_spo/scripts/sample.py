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
Sample images from prompts, with or without a LoRA, and write down how.

```bash
trl-spo sample --lora spo-sd15 --prompt "a red fox in the snow" --images_per_prompt 4 --output_dir samples
trl-spo sample --lora spo-sd15 --prompts prompts.txt --base
trl-spo sample --lora spo-sd15 --prompt "a red fox" --x lora_scale=0,0.5,1 --y checkpoint=100,200,300
```

`--output_dir` gets one PNG per image as soon as it is made, `samples.json` with prompt, seed and settings of each, and
`grid.png` with all of them. The sampler is the one that the LoRA was trained for, which `trl-spo evaluate` starts from as well:
one seed is one image in both.
"""

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .arguments import LoadedPipelineArguments, SamplerArguments
from .errors import run
from .parser import ScriptParser
from .sample_folder import SampleFolder
from .sample_plan import Plan, Variant, make_plan
from .sampler import LoraSlot, describe_model, draw_random_seed, make_protocol


MOST_SHOWN = 64  # images on a sheet without axes
MOST_PAIRS = 24  # prompts on a sheet of base model and LoRA
MOST_ROWS = 10  # prompts on a sheet with one axis


@dataclass
class SampleArguments:
    r"""
    What to sample.

    Args:
        prompt (`list[str]`, *optional*):
            Prompts on the command line, instead of `prompts`.
        images_per_prompt (`int`, *optional*, defaults to `1`):
            Images of each prompt, from consecutive seeds.
        base (`bool`, *optional*, defaults to `False`):
            Also make each image without the LoRA, side by side on the grid.
        x (`str`, *optional*), y (`str`, *optional*):
            Axes of a grid, such as `lora_scale=0,0.5,1`: one of `lora_scale`, `guidance_scale`, `eta`,
            `num_inference_steps` and `checkpoint`, and up to ten values. A checkpoint is the number of a folder
            `checkpoint-*` in `lora`, which is then the folder of a run, and `last` what that run saved at its end.
        grid (`bool`, *optional*, defaults to `True`):
            Write `grid.png`, unless there is one image only.
    """

    prompt: list[str] | None = field(default=None, metadata={"help": "Prompts, instead of --prompts."})
    images_per_prompt: int = field(default=1, metadata={"help": "Images of each prompt, from consecutive seeds."})
    base: bool = field(default=False, metadata={"help": "Also make each image without the LoRA, side by side."})
    x: str | None = field(default=None, metadata={"help": "Columns of a grid, such as lora_scale=0,0.5,1."})
    y: str | None = field(default=None, metadata={"help": "Rows of a grid, such as checkpoint=100,200,last."})
    grid: bool = field(default=True, metadata={"help": "Write grid.png, all images with their prompts."})

    def __post_init__(self):
        if self.images_per_prompt < 1:
            raise ValueError(f"`images_per_prompt` must be at least 1, got {self.images_per_prompt}.")


def make_parser(prog: str | None = None) -> ScriptParser:
    """The parser whose results [`main`] takes."""
    return ScriptParser((LoadedPipelineArguments, SamplerArguments, SampleArguments), prog=prog)


def main(
    model_args: LoadedPipelineArguments, sampler_args: SamplerArguments, sample_args: SampleArguments
) -> list[Path]:
    """Samples, writes images, grid and `samples.json`, and returns the paths of the images."""
    from ..evaluation.protocols import protocol_of_pipeline
    from ..export import check_lora
    from ..prompts import read_prompts
    from ..training.checkpointing import check_output_dir

    # Read prompts, seeds and axes, and find the LoRAs, before anything is loaded.
    check_output_dir(sampler_args.output_dir)
    folder = SampleFolder(sampler_args.output_dir)
    if sample_args.prompt:
        prompts = read_prompts(list(sample_args.prompt), name="prompt")
    else:
        prompts = sampler_args.read_prompts()
    draw_random_seed(sampler_args)
    plan = make_plan(sampler_args, sample_args, prompts)
    no_seed = dataclasses.replace(sampler_args, seed=None)  # it belongs to the images
    protocol = make_protocol(sampler_args.protocol, no_seed, model_args, next(iter(plan.loras()), None))

    # Load the model, and see that every LoRA fits it and every setting exists before the first image is made.
    pipeline = model_args.load_pipeline()
    for source in plan.loras():
        check_lora(pipeline.sd_pipeline, source, with_text_encoders=True)
    protocol = protocol_of_pipeline(protocol, pipeline)
    for variant in plan.variants:
        protocol_of_pipeline(dataclasses.replace(protocol, **variant.changes), pipeline)
    pipeline = pipeline.to(sampler_args.target_device())

    # Sample. Images are written batch by batch; small copies of some are kept for the grid.
    folder.start(_record(model_args, sampler_args, pipeline, protocol, plan))
    sheet = GridSheet(plan, title=protocol.in_short())
    try:
        for variant, index, picture in sample_variants(pipeline, plan, protocol, sampler_args.batch_size, folder):
            if sample_args.grid:
                sheet.add(variant, index, picture)
    except KeyboardInterrupt:
        done = len(folder.images)
        print(
            f"Stopped: {done} of {plan.num_images()} images are in {folder.path}; samples.json lists them.",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    grids = [folder.add_grid(drawn) for drawn in sheet.draw()] if plan.num_images() > 1 else []
    folder.save()
    _print_ending(folder, grids, protocol, sampler_args)
    return [folder.path / image["file"] for image in folder.images]


def sample_variants(pipeline, plan: Plan, protocol, batch_size: int, folder: SampleFolder) -> Iterator[tuple]:
    """
    Makes and writes all images of a plan.

    Yields:
        `tuple[Variant, int, PIL.Image.Image]`: setting, position in `plan.jobs`, and image.
    """
    from tqdm.auto import tqdm

    from ..images import to_pil
    from ..sampling import generate_images

    slot = LoraSlot(pipeline)
    bar = tqdm(total=plan.num_images(), desc="sampling", unit="image")
    for variant in plan.variants:
        slot.set(variant.lora, variant.lora_scale)
        settings = dataclasses.replace(protocol, **variant.changes).sampler()
        for start in range(0, len(plan.jobs), batch_size):
            jobs = plan.jobs[start : start + batch_size]
            prompts = [prompt for prompt, _ in jobs]
            seeds = [seed for _, seed in jobs]
            images = generate_images(pipeline, prompts, seeds=seeds, batch_size=batch_size, **settings)
            for index, (image, (prompt, seed)) in enumerate(zip(images, jobs, strict=True), start=start):
                picture = to_pil(image)
                folder.add(picture, prompt, seed, variant.values, variant.slug())
                yield variant, index, picture
            folder.save()
            bar.update(len(jobs))
    bar.close()


class GridSheet:
    """
    Collects small copies of images and draws them: a caption under each without axes, and under each pair with the base model;
    a row per prompt with one axis, and a picture per prompt and seed with two.

    Args:
        plan ([`Plan`]): what is made.
        title (`str`): heading.
    """

    def __init__(self, plan: Plan, title: str):
        from ..evaluation.sheets import evenly_spaced

        self.plan = plan
        self.title = title
        self.is_comparison = plan.x is not None and plan.x.name == "model"
        most = MOST_PAIRS if self.is_comparison else MOST_ROWS
        self.shown = evenly_spaced(len(plan.jobs), MOST_SHOWN if plan.x is None else most)
        self.cells: dict[tuple[int, int, int], Any] = {}  # (position in the jobs, row, column) -> image

    def add(self, variant: Variant, index: int, picture) -> None:
        """Keeps the image if it belongs on a sheet."""
        from ..captions import cell_picture

        if index in self.shown:
            self.cells[index, variant.row, variant.column] = cell_picture(picture)

    def draw(self) -> Iterator:
        """The sheets, as `PIL.Image.Image`; none if no image was added."""
        from ..captions import captioned_grid, side_by_side
        from ..evaluation.sheets import labelled_grid

        if not self.cells:
            return
        if self.plan.x is None:
            pictures = [self.cells[index, 0, 0] for index in self.shown]
            yield captioned_grid(pictures, [self._caption(index) for index in self.shown], title=self.title)
            return
        columns = self.plan.x.labels()
        if self.is_comparison:
            pictures = [side_by_side(self._row(index, 0, 2)) for index in self.shown]
            title = f"{self.title}\nleft: {columns[0]}, right: {columns[1]}"
            captions = [self._caption(index) for index in self.shown]
            yield captioned_grid(pictures, captions, columns=3, title=title, width=pictures[0].width)
        elif self.plan.y is None:
            rows = [self._row(index, 0, len(columns)) for index in self.shown]
            yield labelled_grid(rows, [self._caption(index) for index in self.shown], columns, title=self.title)
        else:
            row_labels = self.plan.y.labels()
            for index in self.shown:
                rows = [self._row(index, row, len(columns)) for row in range(len(row_labels))]
                yield labelled_grid(rows, row_labels, columns, title=f"{self._caption(index)}\n{self.title}")

    def _row(self, index: int, row: int, length: int) -> list:
        return [self.cells[index, row, column] for column in range(length)]

    def _caption(self, index: int) -> str:
        prompt, seed = self.plan.jobs[index]
        return f"{prompt} (seed {seed})"


def _record(model_args, sampler_args: SamplerArguments, pipeline, protocol, plan: Plan) -> dict[str, Any]:
    """What `samples.json` says about all images of this call."""
    from ..evaluation.provenance import describe_lora, describe_versions

    loras = [describe_lora(sampler_args.lora, source, sampler_args.lora_scale) for source in plan.loras()]
    axes = {name: [axis.name, *axis.values] for name, axis in (("x", plan.x), ("y", plan.y)) if axis is not None}
    return {
        **describe_model(model_args, pipeline),
        "lora": loras[0] if len(loras) == 1 else loras or None,
        "protocol": protocol.name,
        "sampler": {"scheduler": type(pipeline.scheduler).__name__, **protocol.settings()},
        **axes,
        "versions": describe_versions(),
    }


def _print_ending(folder: SampleFolder, grids: list[Path], protocol, sampler_args: SamplerArguments) -> None:
    settings = ", ".join(f"{name} {value}" for name, value in protocol.settings().items() if value != "")
    print(f"{len(folder.images)} images in {folder.path}, from {protocol.scheduler} ({protocol.name}), {settings}.")
    if grids:
        print(f"Look at {grids[0]}" + (f" and {len(grids) - 1} more." if len(grids) > 1 else "."))
    if sampler_args.lora is not None and folder.record["protocol"].startswith("default"):
        print("The LoRA does not say what sampler it was trained for, so this is the default one.")


if __name__ == "__main__":
    run(main, make_parser())
