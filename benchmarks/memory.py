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
Memory of an SPO run: weights, optimizer and the peak of every phase, predicted, and the chunk sizes that fit a budget.

```
python benchmarks/memory.py --preset sd15 --dtype bfloat16 --budget 12
python benchmarks/memory.py --preset sdxl --dtype bfloat16 --budget 24
python benchmarks/memory.py --preset mid --dtype float32 --budget 4 --measure
```

The models are built without memory (fake tensors), so any preset runs on a laptop. `--measure` builds them for real, runs
every phase at the chosen sizes and compares: on the CPU with the allocations that the profiler records, on a GPU with
`torch.cuda.max_memory_allocated`. Predictions leave out workspaces of kernels and the fragments of an allocator, which
`--reserve` takes from the budget, and the CUDA context.
"""

import argparse
import contextlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import PRESETS, Preset, build_pipeline, clip_config
from trl_spo import StepAwareRewardModel, StepAwareRewardModelConfig, wrap_pipeline
from trl_spo.pipelines.base import SPOPipeline
from trl_spo.pipelines.conditioning import PromptEmbeds
from trl_spo.training.memory import (
    GIB,
    denoiser_bytes,
    module_bytes,
    peak_activation_bytes,
    rollout_chunk_sizes,
    samples_within,
    scoring_bytes,
)
from trl_spo.training.memory_plan import (
    autocast_of,
    frozen_bytes,
    give_gradients,
    make_fake,
    set_checkpointing,
    spo_training_step,
    trained_bytes,
)


GUIDANCE_SCALE = 5.0


def measured_peak_bytes(function: Callable, device: str = "cpu") -> int:
    """
    Peak bytes that `function()` really allocates: the largest sum of the allocations that torch's profiler records on
    the CPU, or torch's own count on a GPU.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = function()
        del result
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text(errors="replace"))["traceEvents"]
    events = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    total = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        total += event["args"]["Bytes"]
        peak = max(peak, total)
    return peak


class Models:
    """
    Pipeline with adapter, reward model and embeddings of a preset: real, on fake tensors, or (`device="meta"`) shapes only.
    """

    def __init__(self, name: str, dtype: torch.dtype, real: bool = False, device: str = "cpu"):
        self.preset: Preset = PRESETS[name]
        self.device = device
        self.dtype = dtype
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        with tempfile.TemporaryDirectory() as folder, contextlib.nullcontext() if real else torch.device("meta"):
            self.pipeline: SPOPipeline = wrap_pipeline(build_pipeline(name, folder))
            config, tokenizer = clip_config(name, folder)
            self.reward_model = StepAwareRewardModel(StepAwareRewardModelConfig(config), tokenizer=tokenizer)
            self.reward_model.cast(dtype).requires_grad_(False).eval()
            for module in (self.pipeline.denoiser, *self.pipeline.frozen_modules().values()):
                module.to(dtype)
            adapter = LoraConfig(
                r=self.preset.lora_rank,
                lora_alpha=self.preset.lora_rank,
                init_lora_weights="gaussian",
                target_modules=["to_q", "to_k", "to_v", "to_out.0"],
            )
            self.model = self.pipeline.prepare_for_training(adapter)
        for module in self.modules():
            if real:
                module.to(device)
            elif device != "meta":
                make_fake(self.fake_mode, module, device=device)
        self.pipeline.set_timesteps(20)

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return (self.pipeline.denoiser, *self.pipeline.frozen_modules().values(), self.reward_model)

    def embeds(self, num_prompts: int) -> PromptEmbeds:
        text = self.preset.text
        width = self.preset.unet["cross_attention_dim"]
        options = {"dtype": self.dtype, "device": self.device}
        prompt = torch.zeros(num_prompts, text["max_position_embeddings"], width, **options)
        if self.preset.text_2 is None:
            return PromptEmbeds(prompt, prompt)
        pooled = torch.zeros(num_prompts, self.preset.text_2["projection_dim"], **options)
        return PromptEmbeds(prompt, prompt, pooled, pooled, torch.zeros(num_prompts, 6, **options))

    def autocast(self, like_cuda: bool):
        """The context of a trainer with `bf16=True` or `fp16=True`; none for float32."""
        return autocast_of(self.dtype, self.device, like_cuda)

    def training_step(self, num_pairs: int) -> Callable:
        """Pairs of a multi-step branch may have an x_t each, so they count as two samples."""
        return spo_training_step(
            self.pipeline,
            self.model,
            self.embeds,
            num_pairs,
            num_samples=num_pairs * (2 if self.preset.rollout["num_inner_steps"] > 1 else 1),
            guidance_scale=GUIDANCE_SCALE,
            latent_shape=self.pipeline.latent_shape(),
            latent_dtype=self.dtype,
            timestep=501,
            device=self.device,
        )


def weight_table(models: Models) -> dict[str, int]:
    """Bytes that are there all the time."""
    trained = trained_bytes(models.pipeline.denoiser)
    return {
        "UNet": module_bytes(models.pipeline.denoiser) - trained,
        "LoRA, float32": trained,
        "LoRA gradients": trained,
        "AdamW states": 2 * trained,
        **frozen_bytes(models.pipeline),
        "reward model": module_bytes(models.reward_model),
    }


def phases(models: Models, budget: float, like_cuda: bool) -> dict[str, tuple[int, int]]:
    """Name -> (samples or pairs at a time, predicted peak bytes), every phase at the largest size that fits."""
    preset = models.preset
    pipeline = models.pipeline
    shape = pipeline.latent_shape()
    fake_mode = models.fake_mode
    device = models.device
    candidates = preset.prompts * preset.rollout["num_candidates"]
    embeds = models.embeds(1)
    start = time.process_time()
    give_gradients(models.model, fake_mode)
    with models.autocast(like_cuda):
        denoiser, scoring = rollout_chunk_sizes(
            pipeline, models.reward_model, embeds, shape, GUIDANCE_SCALE, budget / GIB, candidates, device
        )
        seconds = time.process_time() - start
        options = {"device": device, "fake_mode": fake_mode}
        found = {
            "rollout, UNet": (
                denoiser,
                denoiser_bytes(pipeline, embeds, shape, GUIDANCE_SCALE, denoiser, **options),
            ),
            "rollout, VAE decode": (scoring, scoring_bytes(pipeline, None, shape, scoring, **options)),
            "rollout, decode and reward": (
                scoring,
                scoring_bytes(pipeline, models.reward_model, shape, scoring, **options),
            ),
        }
        for name, checkpointing in (("training step", False), ("training step, checkpointing", True)):
            set_checkpointing(pipeline, models.model, checkpointing)

            def step_bytes(num_pairs):
                return peak_activation_bytes(models.training_step(num_pairs), fake_mode=fake_mode)

            pairs = samples_within(step_bytes, budget, preset.pairs_per_batch)
            found[name] = (pairs, step_bytes(pairs))
    print(f"Chunk sizes of the rollout took {seconds:.1f} s of one core.")
    return found


def measure(models: Models, found: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Peak bytes that the phases really take."""
    pipeline = models.pipeline
    reward = models.reward_model
    device = models.device
    shape = pipeline.latent_shape()

    def latents(name, dtype):
        return torch.randn(found[name][0], *shape, device=device).to(dtype)

    def score(x):
        timesteps = torch.full((len(x),), 501, device=device)
        features = torch.randn(len(x), models.preset.projection_dim, device=device).to(models.dtype)
        return reward.score(pipeline.decode_latents(x), timesteps=timesteps, text_features=features)

    measured = {}
    with models.autocast(like_cuda=False):
        with torch.no_grad():
            name = "rollout, UNet"
            x = latents(name, models.dtype)
            rows = models.embeds(found[name][0])
            measured[name] = measured_peak_bytes(lambda: pipeline.predict(x, 501, rows, GUIDANCE_SCALE), device)
            for name, function in (
                ("rollout, VAE decode", pipeline.decode_latents),
                ("rollout, decode and reward", score),
            ):
                x = latents(name, torch.float32)
                measured[name] = measured_peak_bytes(lambda function=function, x=x: function(x), device)
        for name in ("training step", "training step, checkpointing"):
            set_checkpointing(pipeline, models.model, name.endswith("checkpointing"))
            step = models.training_step(found[name][0])
            step()  # makes the gradients
            measured[name] = measured_peak_bytes(step, device)
    return measured


def report(arguments: argparse.Namespace) -> dict:
    """Build, predict, print and, if asked to, measure."""
    # The weights, and what they leave of the budget.
    dtype = getattr(torch, arguments.dtype)
    models = Models(arguments.preset, dtype, device="cpu")
    weights = weight_table(models)
    total = sum(weights.values())
    budget = (arguments.budget * (1 - arguments.reserve)) * GIB - total
    print(
        f"{arguments.preset}, {arguments.dtype}, {arguments.budget:g} GiB of which {arguments.reserve:.0%} in reserve"
    )
    for name, value in weights.items():
        print(f"  {name:32s} {value / GIB:8.3f} GiB")
    print(f"  {'all weights':32s} {total / GIB:8.3f} GiB")
    result = {
        "arguments": {**vars(arguments), "json": str(arguments.json)},
        "weights": weights,
        "phases": {},
        "torch": torch.__version__,
    }
    if budget <= 0:
        print(f"Does not fit: the weights alone leave {budget / GIB:.2f} GiB.")
        return {**result, "fits": False}

    # Every phase, predicted and, if asked to, measured.
    found = phases(models, budget, like_cuda=not arguments.measure or arguments.device != "cpu")
    measured = {}
    if arguments.measure:
        measured = measure(Models(arguments.preset, dtype, real=True, device=arguments.device), found)
    for name, (size, value) in found.items():
        entry = {"size": size, "predicted": value, "total": total + value, "fits": value <= budget}
        line = f"  {name:32s} {value / GIB:8.3f} GiB at {size:3d}, total {(total + value) / GIB:7.3f} GiB"
        if name in measured:
            entry["measured"] = measured[name]
            line += f", measured {measured[name] / GIB:7.3f} GiB ({value / measured[name] - 1:+.1%})"
        print(line + ("" if entry["fits"] else ", does not fit"))
        result["phases"][name] = entry

    # The peak of the whole run: rollout and training step take turns.
    rollout = max(value for name, (_, value) in found.items() if name.startswith("rollout"))
    for name in ("training step", "training step, checkpointing"):
        peak = total + max(rollout, found[name][1])
        fits = peak <= total + budget
        print(f"With the {name}: peak {peak / GIB:.2f} GiB, " + ("fits." if fits else "does not fit."))
        result[f"peak, {name}"] = peak
        result[f"fits, {name}"] = fits
    result["fits"] = any(result[f"fits, {name}"] for name in ("training step", "training step, checkpointing"))
    return result


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="sd15")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--budget", type=float, default=12, help="GiB of the device")
    parser.add_argument("--reserve", type=float, default=0.1, help="part of the budget for workspaces and fragments")
    parser.add_argument("--measure", action="store_true", help="run every phase and compare")
    parser.add_argument("--device", default="cpu", help="where --measure runs: cpu or cuda")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    arguments = parser.parse_args(argv)
    if not math.isfinite(arguments.budget) or arguments.budget <= 0:
        parser.error(f"--budget must be above 0 GiB, got {arguments.budget}")
    result = report(arguments)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
