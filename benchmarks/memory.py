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
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import PRESETS, Preset, build_pipeline, clip_config
from trl_spo import StepAwareRewardModel, StepAwareRewardModelConfig, spo_loss, wrap_pipeline
from trl_spo.pipelines.base import SPOPipeline
from trl_spo.pipelines.conditioning import PromptEmbeds
from trl_spo.step_distribution import gaussian_log_prob
from trl_spo.training.memory import (
    GIB,
    denoiser_bytes,
    module_bytes,
    peak_activation_bytes,
    rollout_chunk_sizes,
    samples_within,
    scoring_bytes,
)


GUIDANCE_SCALE = 5.0


@contextlib.contextmanager
def normalisation_as_on_cuda() -> Iterator[None]:
    """
    Normalisation layers as autocast runs them on CUDA, in float32; on the CPU it leaves them in half precision. Their
    outputs are among the largest tensors of a training step. For predicting the memory of a GPU on fake CPU tensors.
    """
    classes = {torch.nn.LayerNorm: torch.nn.LayerNorm.forward, torch.nn.GroupNorm: torch.nn.GroupNorm.forward}

    def forward(self, hidden_states):
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled("cpu"):
            hidden_states = hidden_states.float()
            weight, bias = (None if value is None else value.float() for value in (weight, bias))
        if isinstance(self, torch.nn.LayerNorm):
            return torch.nn.functional.layer_norm(hidden_states, self.normalized_shape, weight, bias, self.eps)
        return torch.nn.functional.group_norm(hidden_states, self.num_groups, weight, bias, self.eps)

    try:
        for layer in classes:
            layer.forward = forward
        yield
    finally:
        for layer, original in classes.items():
            layer.forward = original


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
                with self.fake_mode:
                    module.to_empty(device=device)
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

    def autocast(self, like_cuda: bool) -> contextlib.ExitStack:
        """The context of a trainer with `bf16=True` or `fp16=True`; none for float32."""
        stack = contextlib.ExitStack()
        if self.dtype != torch.float32:
            stack.enter_context(torch.autocast(self.device, dtype=self.dtype))
            if like_cuda and self.device == "cpu":
                stack.enter_context(normalisation_as_on_cuda())
        return stack

    def training_step(self, num_pairs: int) -> Callable:
        """
        Reference forward, policy forward and backward, as `SPOTrainer.compute_loss` does them. Pairs of a multi-step
        branch may have an x_t each, so they count as two samples.
        """
        num_samples = num_pairs * (2 if self.preset.rollout["num_inner_steps"] > 1 else 1)
        shape = (num_samples, *self.pipeline.latent_shape())

        def step():
            latents, previous = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
            timesteps = torch.full((num_samples,), 501, device=self.device)
            embeds = self.embeds(num_samples)

            def distribution(denoiser):
                output = self.pipeline.predict(latents, timesteps, embeds, GUIDANCE_SCALE, denoiser)
                return self.pipeline.step_distribution(output, timesteps, latents, 1.0)

            with torch.no_grad(), self.pipeline.reference() as reference:
                ref_mean, std, _ = distribution(reference)
            mean = distribution(self.model).prev_sample_mean
            log_probs = gaussian_log_prob(previous, mean, std)
            ref_log_probs = gaussian_log_prob(previous, ref_mean, std)
            rejected = slice(num_samples // 2, None) if num_samples > num_pairs else slice(None)
            chosen = slice(num_pairs)
            losses = spo_loss(log_probs[chosen], log_probs[rejected], ref_log_probs[chosen], ref_log_probs[rejected])
            losses.losses.mean().backward()

        return step

    def make_gradients(self):
        """As they are from the first micro-batch of an accumulation on; so they count among the weights."""
        with self.fake_mode:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)


def gradient_checkpointing(models: Models, enabled: bool):
    denoiser = models.pipeline.denoiser
    (denoiser.enable_gradient_checkpointing if enabled else denoiser.disable_gradient_checkpointing)()
    models.model.train(enabled)  # diffusers checkpoints in training mode only


def weight_table(models: Models) -> dict[str, int]:
    """Bytes that are there all the time."""
    pipeline = models.pipeline
    trained = sum(p.numel() * p.element_size() for p in pipeline.denoiser.parameters() if p.requires_grad)
    frozen = pipeline.frozen_modules()
    return {
        "UNet": module_bytes(pipeline.denoiser) - trained,
        "LoRA, float32": trained,
        "LoRA gradients": trained,
        "AdamW states": 2 * trained,
        "VAE": module_bytes(frozen["vae"]),
        "text encoders": module_bytes(*(module for name, module in frozen.items() if name.startswith("text_encoder"))),
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
    models.make_gradients()
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
            gradient_checkpointing(models, checkpointing)

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
            gradient_checkpointing(models, name.endswith("checkpointing"))
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
