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

r"""
Pairs per second of SPO, where the time goes, how often each network runs, and peak memory.

```shell
python benchmarks/throughput.py --preset mid --threads 2 --json mid.json
python benchmarks/throughput.py --preset mid --threads 2 --json accumulation.json \
    --against "accumulation 4: gradient_accumulation_steps=4" --against "bf16=true"
python benchmarks/throughput.py --preset sd15 --device cuda --dtype bfloat16 --json sd15.json \
    --against_command "another trainer: python other_benchmark.py --preset sd15 --device cuda"
python benchmarks/throughput.py --preset mid --threads 2 --json lpo.json \
    --against "LPO: reward=latent,branch_start_step=0,beta=500" --against_command "public code: python benchmarks/public_code.py ..."
python benchmarks/plot_throughput.py accumulation.json --output docs/images/throughput.png
```

An arm's options are fields of `SPOConfig`, and `reward`: `pixel`, a step-aware reward model on decoded predictions, or
`latent`, a latent reward model of the preset's own UNet, which judges candidates as they are.

What is timed is `SPOTrainer.train()`: one rollout of the preset's prompts, then optimizer steps on all its pairs. Every
pair is valid: `preference_threshold` is 0, and scores that are equal are set apart. Networks are those of `models.py`, with random weights: time and memory do not
depend on their values. They are drawn on the device, and building them is not timed. Neither is a run before the timed one, of as many branches as
fill the first optimizer step; where blocks are compiled, that is when.

Every repeat is a process of its own, so that a peak of memory belongs to one configuration, and the processes of
several configurations take turns (A B A B ...), so that a machine that slows down slows all of them. Ratios are taken
between neighbours, and their median is reported with minimum and maximum. A command that has repeats of its own
should be told to make one. `pairs_per_cpu_second` counts the time of all threads of the process alone: on a CPU it can be
compared where other programs run beside, with `OMP_WAIT_POLICY=PASSIVE` (threads that spin while they wait count as busy).

Phases exclude each other. A UNet call belongs to the policy if it records gradients, to the reference inside
reference of the loss, to the rollout otherwise; `other` is the rest of the loop, the optimizer and the prompts' text
encoder among it. Evaluations are counted in samples: a prompt that is guided counts twice, a batch of 8 eight times.
Hooks on networks and wrapped public methods measure both, so nothing here knows how the trainer works. On a GPU, where
waiting for the end of each phase would slow the loop down, `pairs_per_second` and memory come from a run without
hooks, `seconds` and the counts from a second one.

`hardware` names the device and the rate of a large matrix product on it (bfloat16 on a GPU, float32 on a CPU), against which
the rate of a loop can be judged.

Memory is the largest resident set of the process since the models were built (CPU, Linux), or the largest amount that
PyTorch had allocated (GPU), in MiB.
"""

import argparse
import contextlib
import gc
import json
import logging
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from models import PRESETS, build_pipeline, clip_config
from transformers import HfArgumentParser, PrinterCallback, TrainerCallback

from trl_spo import (
    LatentRewardModel,
    SPOConfig,
    SPOTrainer,
    StepAwareRewardModel,
    StepAwareRewardModelConfig,
)
from trl_spo.pipelines.denoiser import default_lora_config


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PHASES = (
    "unet_rollout",
    "vae_decode",
    "reward",
    "reward_text",
    "policy_forward",
    "policy_backward",
    "reference_forward",
    "other",
)
PER_PROMPT = {
    "unet": "unet_rollout",
    "vae_decode": "vae_decode",
    "reward_vision": "reward",
    "reward_text": "reward_text",
}
PER_PAIR = ("policy_forward", "policy_backward", "reference_forward")
MEASURES = ("pairs_per_second", "peak_memory_mib", "peak_memory_above_models_mib")
CPU_MEASURE = "pairs_per_cpu_second"  # another program need not have it
REWARDS = ("pixel", "latent")
DESCRIPTION = ("preset", "device", "dtype", "threads", "hardware", "versions", "options")
NUM_PROMPTS = 4096  # of the whole data set; a run sees a few of them, another run others
FIELDS = {  # parsers simplify the types of fields, whoever uses one first, and leave the annotations alone
    f.name: next(
        str(c.__annotations__[f.name]) for c in SPOConfig.__mro__ if f.name in c.__dict__.get("__annotations__", {})
    )
    for f in fields(SPOConfig)
    if f.init
}
RESERVED = {  # what the benchmark itself sets
    "output_dir": "a temporary folder",
    "num_train_epochs": "one rollout",
    "max_steps": "all pairs of one rollout",
    "seed": "the number of the run",
    "save_strategy": "nothing is saved",
    "use_cpu": "give `--device`",
}


# --- options ---------------------------------------------------------------------------------------------------------


class _OptionParser(HfArgumentParser):
    """Reads values as the scripts read them; raises instead of printing every option there is."""

    def error(self, message):
        raise ValueError(message)


def parse_options(settings: list[str]) -> dict:
    """
    `["num_candidates=2", "bf16=true"]` -> `{"num_candidates": 2, "bf16": True}`, in the types of [`SPOConfig`].

    Raises:
        ValueError: for a text without `=`, an unknown name, a value of another type, or one the benchmark sets.
    """
    options = {}
    for setting in settings:
        name, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or not name:
            raise ValueError(f"An option must look like `name=value`, got {setting!r}.")
        if name == "reward":
            if value not in REWARDS:
                raise ValueError(f"`reward` must be one of {REWARDS}, got {value!r}.")
            options[name] = value
            continue
        if name in RESERVED:
            raise ValueError(f"`{name}` belongs to the benchmark ({RESERVED[name]}) and cannot be set.")
        if name not in FIELDS:
            near = [known for known in FIELDS if name in known or known in name]
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"`SPOConfig` has no field {name!r}.{hint}")
        if value.lower() == "none" and "None" in FIELDS[name]:
            options[name] = None
            continue
        try:
            (parsed,) = _OptionParser(SPOConfig).parse_args_into_dataclasses(
                ["--output_dir", ".", "--use_cpu", "--report_to", "none", f"--{name}", value]
            )
        except ValueError as error:
            raise ValueError(f"`{name}={value}` cannot be used: {error}") from error
        options[name] = getattr(parsed, name)
    return options


def build_config(preset: str, device: str, options: dict, output_dir: str) -> SPOConfig:
    """
    The configuration of one run. The pairs of an optimizer step stay those of the preset when `options` asks for
    gradient accumulation; batches that `options` names are taken as they are.
    """
    sizes = PRESETS[preset]
    options = {name: value for name, value in options.items() if name != "reward"}
    accumulation = options.get("gradient_accumulation_steps", 1)
    if "per_device_train_batch_size" not in options and sizes.pairs_per_batch % accumulation:
        raise ValueError(
            f"`gradient_accumulation_steps={accumulation}` does not divide the {sizes.pairs_per_batch} pairs of an "
            f"optimizer step of the preset {preset!r}. Choose a divisor, or set `per_device_train_batch_size` as well."
        )
    values = {
        "preference_threshold": 0.0,
        "per_device_rollout_batch_size": sizes.prompts,
        "per_device_train_batch_size": sizes.pairs_per_batch // accumulation,
        "report_to": "none",
        "disable_tqdm": True,
        **sizes.rollout,
        **options,
    }
    own = {"output_dir": output_dir, "save_strategy": "no", "use_cpu": device == "cpu"}
    return SPOConfig(num_train_epochs=values["per_device_rollout_batch_size"] / NUM_PROMPTS, **own, **values)


# --- measuring -------------------------------------------------------------------------------------------------------


class Profiler:
    """
    Time by phase and samples through each network, between `start` and `stop`.

    Phases nest: the time of an inner one does not count for the outer one. With `synchronize`, every change of phase
    waits for the GPU.

    Args:
        trainer (`SPOTrainer`): whose networks and public methods are watched until `remove`.
        synchronize (`bool`): whether work is queued on a GPU.
    """

    def __init__(self, trainer: SPOTrainer, synchronize: bool):
        self.synchronize = synchronize
        self.seconds = defaultdict(float)
        self.samples = Counter()
        self._stack = ["other"]
        self._mark = None
        self._undo = []
        self._in_reference = False
        self._denoisers = set()
        pipeline = trainer.pipeline
        reward = trainer.reward_model
        self._watch_denoiser(pipeline.denoiser)
        self._watch_reference(trainer)
        # Around the decoder, which may be compiled: a hook inside would be compiled with it.
        self._time(pipeline.running_networks()[-1], "decode", "vae_decode", counted=True)
        self._time(trainer.accelerator, "backward", "policy_backward")
        for method in ("score", "forward"):
            self._time(reward, method, "reward")
        self._time(reward, "encode_prompts", "reward_text")
        if isinstance(reward, LatentRewardModel):
            self._count(reward.backbone, "reward")
            self._count(reward.text_encoders[0], "reward_text")
            return
        self._time(reward, "get_image_features", "reward")
        self._time(reward, "get_text_features", "reward_text")
        self._count(reward.model.vision_model.embeddings, "reward")
        self._count(reward.model.text_model.embeddings, "reward_text")

    def start(self):
        self.seconds.clear()
        self.samples.clear()
        self._mark = self._now()

    def stop(self) -> dict[str, float]:
        """Seconds by phase, and their sum as `total`."""
        self._charge()
        self._mark = None
        return {**{phase: self.seconds[phase] for phase in PHASES}, "total": sum(self.seconds.values())}

    def remove(self):
        for undo in reversed(self._undo):
            undo()

    def _now(self) -> float:
        if self.synchronize:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _charge(self):
        """The time since the last change belongs to the phase that was on top."""
        if self._mark is not None:
            now = self._now()
            self.seconds[self._stack[-1]] += now - self._mark
            self._mark = now

    def _enter(self, phase: str):
        self._charge()
        self._stack.append(phase)

    def _leave(self):
        self._charge()
        self._stack.pop()

    def _replace(self, owner, name: str, function):
        """Hide the method of the class behind an attribute of the object."""
        hidden = vars(owner).get(name)
        setattr(owner, name, function)
        self._undo.append(lambda: delattr(owner, name) if hidden is None else setattr(owner, name, hidden))

    def _time(self, owner, name: str, phase: str, counted: bool = False):
        method = getattr(owner, name)

        def timed(*args, **kwargs):
            self._enter(phase)
            self.samples[phase] += len(args[0]) if counted else 0
            try:
                return method(*args, **kwargs)
            finally:
                self._leave()

        self._replace(owner, name, timed)

    def _count(self, module: torch.nn.Module, phase: str):
        def hook(module, args, kwargs):
            self.samples[phase] += len(args[0] if args else next(iter(kwargs.values())))

        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _watch_denoiser(self, module: torch.nn.Module):
        if module in self._denoisers:
            return
        self._denoisers.add(module)

        def before(module, args, kwargs):
            phase = "unet_rollout"
            if self._in_reference:  # it may record gradients, too, where it runs on the code of the policy
                phase = "reference_forward"
            elif torch.is_grad_enabled():
                phase = "policy_forward"
            self.samples[phase] += len(args[0] if args else kwargs["sample"])
            self._enter(phase)

        def after(module, args, output):
            self._leave()
            output = output[0] if isinstance(output, tuple) else output.sample
            if output.requires_grad and not self._in_reference:
                output.register_hook(lambda gradient: self.samples.update(policy_backward=len(gradient)))

        self._undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        self._undo.append(module.register_forward_hook(after, always_call=True).remove)

    def _watch_reference(self, trainer):
        method = trainer._reference

        @contextlib.contextmanager
        def reference(*args, **kwargs):
            with method(*args, **kwargs) as denoiser:
                self._watch_denoiser(denoiser)  # a network of its own in full fine-tuning
                outer = self._in_reference
                self._in_reference = True
                try:
                    yield denoiser
                finally:
                    self._in_reference = outer

        self._replace(trainer, "_reference", reference)


class Memory:
    """Peak memory since its construction, in MiB, and how much of it was there by then."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.models = torch.cuda.memory_allocated() / 2**20
        else:
            with contextlib.suppress(OSError):  # where Linux allows it, forget the peak of building the models
                Path("/proc/self/clear_refs").write_text("5")
            self.models = self._resident("VmRSS")

    @property
    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**20 if self.cuda else self._resident("VmHWM")

    @staticmethod
    def _resident(name: str) -> float:
        status = Path("/proc/self/status")
        if status.exists():
            return int(re.search(rf"^{name}:\s+(\d+)", status.read_text(), re.MULTILINE).group(1)) / 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the only one elsewhere; bytes on macOS
        return peak / (2**20 if sys.platform == "darwin" else 1024)


class _Window(TrainerCallback):
    """Marks the loop itself: what comes before and after it is done once per training run."""

    def __init__(self):
        self.profiler: Profiler | None = None
        self.seconds: dict[str, float] = {}
        self.total = self.cpu_seconds = 0.0

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        if self.profiler is not None:
            self.profiler.start()
        self.cpu_seconds = -time.process_time()
        self.total = -self._now()

    def on_train_end(self, args, state, control, **kwargs):
        self.total += self._now()
        self.cpu_seconds += time.process_time()
        if self.profiler is not None:
            self.seconds = self.profiler.stop()


class Decisive:
    """
    Its scores get noise, so that no two candidates are equal. A reward model with random weights tells images apart so
    little that half precision often makes them equal, and pairs would be lost that a trained model has.
    """

    def score(self, *args, **kwargs) -> torch.Tensor:
        scores = super().score(*args, **kwargs)
        return scores + torch.randn_like(scores)


class DecisiveRewardModel(Decisive, StepAwareRewardModel):
    """A step-aware reward model whose scores get noise."""


class DecisiveLatentRewardModel(Decisive, LatentRewardModel):
    """A latent reward model whose scores get noise."""


def build_reward_model(preset: str, pipeline, dtype: str, options: dict, folder: str) -> torch.nn.Module:
    """The reward model of an arm, with random weights of the preset's shapes."""
    if options.get("reward") == "latent":
        reward_model = DecisiveLatentRewardModel.from_pipeline(pipeline)
    else:
        clip, tokenizer = clip_config(preset, Path(folder) / "reward_tokenizer")
        reward_model = DecisiveRewardModel(StepAwareRewardModelConfig(clip_config=clip.to_dict()), tokenizer=tokenizer)
    return reward_model.eval().to(DTYPES[dtype])


def build_trainer(preset: str, device: str, dtype: str, options: dict, folder: str) -> tuple[SPOTrainer, Memory]:
    """The trainer of a preset, and its memory from the moment when all networks were built and nothing else was."""
    sizes = PRESETS[preset]
    config = build_config(preset, device, options, folder)
    with torch.device(device):  # random numbers of a GPU take a second, those of a CPU a minute
        pipeline = build_pipeline(preset, folder).to(DTYPES[dtype])
        reward_model = build_reward_model(preset, pipeline, dtype, options, folder)
    memory = Memory(device)
    lora = default_lora_config()
    lora.r = lora.lora_alpha = sizes.lora_rank
    prompts = [f"prompt number {i} of the benchmark" for i in range(NUM_PROMPTS)]
    trainer = SPOTrainer(config, pipeline, reward_model, train_dataset=prompts, peft_config=lora)
    trainer.remove_callback(PrinterCallback)
    return trainer, memory


def run(trainer: SPOTrainer, seed: int):
    """One rollout and training on all its pairs; the seed decides which prompts these are."""
    trainer.args.seed = seed
    trainer.train()


def warm_up(trainer: SPOTrainer):
    """A run that is not counted, on other prompts, with enough branches for one full step."""
    args = trainer.args
    end = args.branch_end_step
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps
    branches = max(-(-pairs // args.per_device_rollout_batch_size), args.num_inner_steps)
    last = args.num_inference_steps if end is None else end
    args.branch_end_step = min(args.branch_start_step + branches, last)
    run(trainer, seed=1)
    args.branch_end_step = end


def measure(preset: str, device: str, dtype: str, options: dict, phases: bool = True) -> dict:
    """One repeat, in this process; without `phases` only speed and memory."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, memory = build_trainer(preset, device, dtype, options, folder)
        window = _Window()
        trainer.add_callback(window)
        start = time.perf_counter()
        warm_up(trainer)
        warm_up_seconds = time.perf_counter() - start
        cuda = device == "cuda"
        loader = trainer.pair_loader
        if cuda or not phases:
            run(trainer, seed=2)
            loader = trainer.pair_loader
            total = window.total
            cpu_seconds = window.cpu_seconds
            num_pairs = loader.num_pairs_seen
            peak = memory.peak
        if phases:
            window.profiler = profiler = Profiler(trainer, synchronize=cuda)
            run(trainer, seed=3)
            profiler.remove()
            loader = trainer.pair_loader
        if not cuda and phases:
            total = window.total
            cpu_seconds = window.cpu_seconds
            num_pairs = loader.num_pairs_seen
            peak = memory.peak
    result = {
        "num_prompts": loader.num_prompts_seen,
        "num_pairs": num_pairs,
        "pairs_per_second": num_pairs / total,
        CPU_MEASURE: num_pairs / cpu_seconds,
        "seconds": window.seconds if phases else {"total": total},
        "warm_up_seconds": warm_up_seconds,
        "peak_memory_mib": peak,
        "peak_memory_above_models_mib": peak - memory.models,
    }
    if phases:
        prompts = loader.num_prompts_seen
        pairs = loader.num_pairs_seen
        result["evals_per_prompt"] = {name: profiler.samples[phase] / prompts for name, phase in PER_PROMPT.items()}
        result["evals_per_pair"] = {name: profiler.samples[name] / pairs for name in PER_PAIR}
    return result


def versions() -> dict[str, str]:
    packages = ("torch", "diffusers", "transformers", "trl", "peft", "accelerate", "trl-spo")
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a copy of the sources on the import path
            found[name] = "not installed"
    return found


def hardware(device: str) -> dict:
    """Name of the device, and TFLOP/s of a large matrix product: the best of five."""
    cuda = device == "cuda"
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    size, dtype = (8192, torch.bfloat16) if cuda else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(6):  # the first chooses a kernel
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"name": name, "matrix_tflops": 2 * size**3 / min(seconds[1:]) / 1e12}


# --- arms ------------------------------------------------------------------------------------------------------------


def median(values: list):
    """Median of numbers, or of every entry of dictionaries of numbers; of anything else, the first."""
    if isinstance(values[0], dict):
        return {key: median([value[key] for value in values if key in value]) for key in values[0]}
    return statistics.median(values) if isinstance(values[0], (int, float)) else values[0]


def parse_arm(text: str) -> tuple[str, str]:
    """`"label: rest"` -> `(label, rest)`; without a label the text is its own."""
    labelled = re.fullmatch(r"([^=:]+):\s+(.*)", text.strip())
    return labelled.groups() if labelled else (text.strip(), text.strip())


def environment(threads: int | None) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    return {**os.environ, **({name: str(threads) for name in names} if threads else {})}


def run_process(label: str, command: list[str], threads: int | None, path: Path) -> dict:
    """
    What `command` wrote to `path`.

    Raises:
        SystemExit: if it failed, with the end of what it printed, or if its file lacks what is compared.
    """
    path.unlink(missing_ok=True)
    try:
        process = subprocess.run(
            [*command, "--json", str(path)], env=environment(threads), capture_output=True, text=True
        )
    except FileNotFoundError as error:
        raise SystemExit(f"{label}: there is no program {command[0]!r}.") from error
    if process.returncode or not path.is_file():
        tail = "\n".join((process.stdout + process.stderr).strip().splitlines()[-30:])
        reason = f"ended with status {process.returncode}" if process.returncode else "wrote no JSON file"
        raise SystemExit(f"{label}: `{shlex.join(command)}` {reason}:\n{tail}")
    result = json.loads(path.read_text())
    missing = [name for name in (*MEASURES, "seconds", "num_pairs") if result.get(name) is None]
    if missing:
        raise SystemExit(f"{label}: the JSON of `{shlex.join(command)}` has no {', '.join(missing)}.")
    return result


def summarize(repeats: list[dict]) -> dict:
    """Medians over repeats; what describes the run is that of the first."""
    first = repeats[0]
    return {
        key: value if key in DESCRIPTION else median([repeat[key] for repeat in repeats])
        for key, value in first.items()
    }


def compare(base: list[dict], other: list[dict]) -> dict:
    """
    Ratios of `other` to `base`, repeat by repeat: median, smallest, largest, and all of them. A measure that one of the
    two does not have (0, when nothing was above the models) has no ratio.
    """
    ratios = {}
    for name in (*MEASURES, CPU_MEASURE):
        if all(repeat.get(name, 0) > 0 for repeat in (*base, *other)):
            values = [b[name] / a[name] for a, b in zip(base, other, strict=True)]
            ratios[name] = {"median": median(values), "min": min(values), "max": max(values), "values": values}
    return ratios


def table(arms: list[dict], ratios: dict) -> str:
    """Markdown: one row per arm; ratios are to the first."""
    measures = ("pairs_per_second", CPU_MEASURE, *MEASURES[1:])
    header = ["", "pairs / s", "speed", "pairs / CPU s", "ratio", "peak MiB", "ratio", "MiB above models", "ratio"]
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for i, arm in enumerate(arms):
        cells = [arm["label"]]
        for name in measures:
            ratio = ratios.get(arm["label"], {}).get(name)
            digits = ".3g" if name.startswith("pairs_per") else ".0f"
            spread = "{median:.2f} ({min:.2f} to {max:.2f})".format(**ratio) if ratio else "-" if i else "1"
            cells += [format(arm[name], digits) if name in arm else "-", spread]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def phase_table(arms: list[dict]) -> str:
    """Markdown: milliseconds per pair by phase, one column per arm."""
    lines = ["| ms per pair | " + " | ".join(arm["label"] for arm in arms) + " |", "|---" + "|---:" * len(arms) + "|"]
    for phase in (*PHASES, "total"):
        cells = (format(1000 * arm["seconds"].get(phase, 0) / arm["num_pairs"], ".1f") for arm in arms)
        lines.append(f"| {phase} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes of the networks, see models.py")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the weights; autocast is `--set bf16=true`"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs per arm, each in a process of its own")
    parser.add_argument("--threads", type=int, help="CPU threads; as many as PyTorch takes by default")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of SPOConfig")
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="[LABEL:] NAME=VALUE,...",
        help="another arm, with these options on top of `--set`",
    )
    parser.add_argument(
        "--against_command",
        action="append",
        default=[],
        metavar="LABEL: COMMAND",
        help="another arm: a command that takes `--json FILE` and writes the same keys",
    )
    parser.add_argument("--label", default="base", help="name of the first arm")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--no_phases", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("`--device cuda` needs a GPU that PyTorch can use; there is none.")
    if arguments.repeats < 1 or (arguments.threads or 1) < 1:
        parser.error("`--repeats` and `--threads` must be at least 1.")
    try:
        arguments.arms = read_arms(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def read_arms(arguments: argparse.Namespace) -> list[tuple[str, list[str] | None, list[str] | None]]:
    """`(label, settings, command)` of every arm; settings are tried out, so that nothing fails after the first hour."""
    arms = [(arguments.label, arguments.set, None)]
    for text in arguments.against:
        label, settings = parse_arm(text)
        arms.append((label, [*arguments.set, *settings.split(",")], None))
    for text in arguments.against_command:
        label, command = parse_arm(text)
        if not shlex.split(command):
            raise ValueError(f"`--against_command` needs a command, got {text!r}.")
        arms.append((label, None, shlex.split(command)))
    labels = [label for label, *_ in arms]
    if len(set(labels)) < len(labels):
        raise ValueError(f"Every arm needs a label of its own, got {', '.join(labels)}. Write `label: name=value`.")
    for label, settings, _ in arms:
        if settings is None:
            continue
        try:
            build_config(arguments.preset, arguments.device, parse_options(settings), "unused")
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
    return arms


def work(arguments: argparse.Namespace) -> dict:
    """One repeat of one arm, as the process of `--worker` runs it."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    options = parse_options(arguments.set)
    head = {"preset": arguments.preset, "device": arguments.device, "dtype": arguments.dtype}
    head |= {"threads": torch.get_num_threads(), "hardware": hardware(arguments.device)}
    result = measure(arguments.preset, arguments.device, arguments.dtype, options, not arguments.no_phases)
    return {**head, **result, "versions": versions(), "options": options}


def main():
    arguments = parse_arguments()
    if arguments.worker:
        arguments.json.write_text(json.dumps(work(arguments)))
        return
    common = ["--worker", "--preset", arguments.preset, "--device", arguments.device, "--dtype", arguments.dtype]
    common += ["--threads", str(arguments.threads)] if arguments.threads else []
    runs = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(arguments.repeats):
            for label, settings, command in arguments.arms:
                if command is None:
                    command = [sys.executable, str(Path(__file__).resolve()), *common]
                    command += [part for setting in settings for part in ("--set", setting)]
                result = run_process(label, command, arguments.threads, Path(folder) / "result.json")
                runs[label].append({k: v for k, v in result.items() if k not in ("repeats", "arms", "ratios")})
                speed, memory = result["pairs_per_second"], result["peak_memory_mib"]
                print(
                    f"{label}, {repeat + 1} of {arguments.repeats}: {speed:.3g} pairs/s, {memory:.0f} MiB", flush=True
                )
    arms = []
    for label, repeats in runs.items():
        numbers = [{k: v for k, v in repeat.items() if k not in DESCRIPTION} for repeat in repeats]
        arms.append({"label": label, **summarize(repeats), "repeats": numbers})
    base = arms[0]["label"]
    ratios = {arm["label"]: compare(runs[base], runs[arm["label"]]) for arm in arms[1:]}
    report = {key: value for key, value in arms[0].items() if key != "label"}
    if ratios:
        report.update(arms=arms, ratios=ratios)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print("\n" + phase_table(arms) + "\n\n" + table(arms, ratios))


if __name__ == "__main__":
    main()
