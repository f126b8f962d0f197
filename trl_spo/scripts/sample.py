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
trl-spo sample --lora spo-sd15 --prompts prompts.txt
```

`--output_dir` gets one PNG per image and `samples.json` with prompt, seed and sampler of each. The sampler is the one of
training and evaluation, so a seed gives the same image in all of them.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from .arguments import LoadedPipelineArguments, SamplerArguments
from .errors import run
from .parser import ScriptParser


SAMPLER = {"num_inference_steps": 20, "guidance_scale": 5.0, "eta": 1.0, "negative_prompt": ""}


@dataclass
class SampleArguments:
    r"""
    What to sample.

    Args:
        prompt (`list[str]`, *optional*):
            Prompts on the command line, instead of `prompts`.
        images_per_prompt (`int`, *optional*, defaults to `1`):
            Images of each prompt, from consecutive seeds.
    """

    prompt: list[str] | None = field(default=None, metadata={"help": "Prompts, instead of --prompts."})
    images_per_prompt: int = field(default=1, metadata={"help": "Images of each prompt, from consecutive seeds."})

    def __post_init__(self):
        if self.images_per_prompt < 1:
            raise ValueError(f"`images_per_prompt` must be at least 1, got {self.images_per_prompt}.")


def make_parser(prog: str | None = None) -> ScriptParser:
    """The parser whose results [`main`] takes."""
    return ScriptParser((LoadedPipelineArguments, SamplerArguments, SampleArguments), prog=prog)


def main(
    model_args: LoadedPipelineArguments, sampler_args: SamplerArguments, sample_args: SampleArguments
) -> list[Path]:
    """Samples, writes the images and `samples.json`, and returns the paths of the images."""
    from diffusers.utils import numpy_to_pil

    from ..prompts import read_prompts
    from ..sampling import generate_images
    from ..training.checkpointing import check_output_dir

    # Read prompts and seeds before anything is loaded.
    check_output_dir(sampler_args.output_dir)
    if sample_args.prompt:
        prompts = read_prompts(list(sample_args.prompt), name="prompt")
    else:
        prompts = sampler_args.read_prompts()
    prompts = [prompt for prompt in prompts for _ in range(sample_args.images_per_prompt)]
    first = sampler_args.seed or 0
    seeds = list(range(first, first + len(prompts)))

    # Sample.
    pipeline = sampler_args.place(model_args.load_pipeline())
    sampler = SAMPLER | sampler_args.overrides()
    images = generate_images(
        pipeline, prompts, seeds=seeds, batch_size=sampler_args.batch_size, progress="sampling", **sampler
    )

    # Write the images, and how they were made.
    folder = Path(sampler_args.output_dir)
    paths = [folder / f"{index:05d}_seed{seed}.png" for index, seed in enumerate(seeds)]
    for path, image in zip(paths, numpy_to_pil(images.permute(0, 2, 3, 1).numpy()), strict=True):
        image.save(path)
    files = []
    for path, prompt, seed in zip(paths, prompts, seeds, strict=True):
        files.append({"file": path.name, "prompt": prompt, "seed": seed})
    record = {
        "model": model_args.model_name_or_path,
        "lora": sampler_args.lora,
        "lora_scale": sampler_args.lora_scale if sampler_args.lora is not None else None,
        "sampler": {"scheduler": type(pipeline.scheduler).__name__, **sampler},
        "images": files,
    }
    (folder / "samples.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    settings = ", ".join(f"{name} {value}" for name, value in record["sampler"].items() if value != "")
    print(f"{len(paths)} images in {folder}, from {settings}")
    return paths


if __name__ == "__main__":
    run(main, make_parser())
