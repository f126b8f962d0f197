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
Memory of an SPO run on the published flow-matching models, predicted without a GPU and without their weights.

```
python benchmarks/flow_memory.py
python benchmarks/flow_memory.py --models sd3.5-medium --height 1024 --width 1024 --pairs 1
```

The networks are built from the published shapes (`trl_spo.checkup.published`) on fake tensors, as `benchmarks/memory.py` does;
text encoders count by their parameters. Phases never overlap: with `offload_text_encoders` the encoders are on the device while
they encode, and only then. "nf4" stores the transformer's linear layers in 4 bits and one float32 number per 64 of them
(bitsandbytes without double quantisation).
"""

import argparse
import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trl_spo.checkup.networks import embeds_of, pipeline_on_paper, text_shape
from trl_spo.checkup.published import PUBLISHED
from trl_spo.training.memory import GIB, module_bytes, peak_activation_bytes
from trl_spo.training.memory_plan import NF4_BYTES, autocast_of, linear_weights, make_fake, trained_bytes


REWARD_BYTES = 2 * 986_109_441  # PickScore, a CLIP ViT-H/14, in bfloat16


@dataclass(frozen=True)
class Model:
    """A published model, and how its preset trains it."""

    name: str  # on the Hub
    rank: int
    guidance_scale: float


MODELS = {
    "sd3.5-medium": Model("stabilityai/stable-diffusion-3.5-medium", rank=32, guidance_scale=4.5),
    "flux2-klein-4b": Model("black-forest-labs/FLUX.2-klein-base-4B", rank=32, guidance_scale=4.0),
    "flux.1-dev": Model("black-forest-labs/FLUX.1-dev", rank=64, guidance_scale=3.5),
    "z-image": Model("Tongyi-MAI/Z-Image", rank=32, guidance_scale=5.0),
    "qwen-image": Model("Qwen/Qwen-Image", rank=64, guidance_scale=4.0),
}


def build(model: Model, fake_mode: FakeTensorMode):
    """The wrapped pipeline with an adapter, bfloat16, on fake tensors, and the bytes of its text encoders."""
    pipeline = pipeline_on_paper(PUBLISHED[model.name.lower()], torch.bfloat16)
    text = module_bytes(*pipeline.text_encoders().values())
    with torch.device("meta"):
        targets = list(pipeline.lora_target_modules)
        adapter = LoraConfig(r=model.rank, lora_alpha=model.rank, target_modules=targets)
        trained = pipeline.prepare_for_training(adapter)
    make_fake(fake_mode, pipeline.denoiser, pipeline.vae)
    pipeline.set_timesteps(20)
    return pipeline, trained, text


@contextlib.contextmanager
def trainers_context():
    with autocast_of(torch.bfloat16):
        yield


def predict(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """GiB of weights and of the peak of every phase."""
    # Build the model with weights that have shapes but no values, and count what is always there.
    model = MODELS[name]
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    pipeline, trained, text = build(model, fake_mode)
    prompts = embeds_of(text_shape(pipeline), torch.bfloat16)
    shape = pipeline.latent_shape(arguments.height, arguments.width)
    scale = model.guidance_scale
    adapter = trained_bytes(pipeline.denoiser)
    transformer = module_bytes(pipeline.denoiser) - adapter
    linear = linear_weights(pipeline.denoiser)

    # What runs in each phase, with samples as the argument.
    def latents(count):
        with fake_mode:
            return torch.empty(count, *shape)

    def forward(samples, denoiser=None):
        return pipeline.predict(samples, 500, prompts(len(samples)), scale, denoiser)

    def training_step(samples):
        with torch.no_grad(), pipeline.reference() as reference:
            kept = forward(samples, reference)
        (forward(samples, trained) - kept).square().mean().backward()

    # Estimate the peak of every phase.
    pipeline.denoiser.enable_gradient_checkpointing()
    trained.train()
    with trainers_context():
        step = peak_activation_bytes(training_step, latents(arguments.pairs), fake_mode=fake_mode)
        with torch.no_grad():
            rollout = peak_activation_bytes(forward, latents(arguments.samples), fake_mode=fake_mode)
            decode = peak_activation_bytes(pipeline.decode_latents, latents(arguments.images), fake_mode=fake_mode)

    # Add up what is on the device at once, with the text encoders on it or not, and with quantised weights.
    base = transformer + module_bytes(pipeline.vae) + REWARD_BYTES + 4 * adapter  # weights, gradients, two Adam states
    quantised = base - linear * (2 - NF4_BYTES)
    phases = max(step, rollout, decode)
    found = {
        "transformer": transformer,
        "adapter, gradients, Adam": 4 * adapter,
        "text encoders": text,
        "training step": step,
        "rollout": rollout,
        "decode": decode,
        "encoders stay": base + text + phases,
        "encoders offloaded": max(base + phases, base + text),
        "nf4, encoders offloaded": max(quantised + phases, quantised + text),
    }
    return {key: value / GIB for key, value in found.items()}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=2, help="pairs of a training step, with gradient checkpointing")
    parser.add_argument("--samples", type=int, default=8, help="latents per call of the denoiser in rollouts")
    parser.add_argument("--images", type=int, default=4, help="images per call of the decoder")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args(argv)
    result = {name: predict(name, arguments) for name in arguments.models}
    names = list(next(iter(result.values())))
    print(f"GiB, bfloat16, {arguments.height} x {arguments.width} px, {arguments.pairs} pairs a step\n")
    print(f"| | {' | '.join(result)} |\n|---|{'---|' * len(result)}")
    for name in names:
        print(f"| {name} | " + " | ".join(f"{values[name]:.1f}" for values in result.values()) + " |")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"arguments": vars(arguments) | {"json": None}, **result}, indent=1) + "\n"
        )
    return result


if __name__ == "__main__":
    main()
