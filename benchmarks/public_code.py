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
The public research code of SPO on the networks of `models.py`: pairs per second, phases, evaluations, peak memory.

The code is https://github.com/RockeyCoss/SPO, commit 27a8642. It needs the libraries it was written for, so it runs in
an environment of its own, in which `trl_spo` is neither needed nor imported (Python 3.11):

```shell
git clone https://github.com/RockeyCoss/SPO public_spo && git -C public_spo checkout 27a8642
python3 -m venv public_env
public_env/bin/pip install torch==2.13.0 torchvision==0.28.0 transformers==4.40.1 diffusers==0.26.1 \
    accelerate==0.24.1 peft==0.10.0 huggingface_hub==0.23.4 tokenizers==0.19.1 numpy==1.26.4 mmengine==0.9.1 \
    yapf==0.40.2 "opencv-python<4.12" "matplotlib<3.10" ml_collections==1.1.0 absl-py==2.5.1 wandb==0.16.0 \
    "protobuf<5" "setuptools<81"
public_env/bin/python benchmarks/public_code.py --checkout public_spo --preset mid --threads 2 --json public.json
python benchmarks/throughput.py --preset mid --threads 2 --json both.json --against_command \
    "public code: public_env/bin/python benchmarks/public_code.py --checkout public_spo --preset mid --threads 2"
```

On a GPU (`--device cuda`) the script runs as it was released, with fp16, and its networks are drawn on the card. `wandb` may
be missing there, since nothing is logged to it. Where an environment cannot be made, a folder of unpacked wheels on
`PYTHONPATH` will do.

The versions of transformers, diffusers, accelerate and peft are those of the public code's own environment; PyTorch is
the one that `trl_spo` is measured with, so that both sides use the same kernels.

What runs is `main` of `train_scripts/train_spo.py`, unchanged, with its configuration for Stable Diffusion 1.5 (K = 4,
20 steps, branches from step 4, guidance 5, LoRA of rank 4), on the CPU in float32 or on a GPU in fp16, and the preset's numbers of prompts
in a rollout and of pairs in a batch. It loads its models from folders that this script writes: a pipeline, and a
step-aware preference model with a processor. One epoch has two rollouts. The first warms up: it has just as many steps
as give the pairs of one optimizer step. The second is measured, from the encoding of its prompts to the end of its last
optimizer step. Around it stand hooks on networks and timers around `Accelerator.backward` and the preference function;
each repeat is a process of its own.

Differences from a training run of the public code:

- networks are small and have random weights; the conditioning of the preference model, which without a checkpoint has no
  defined values, gets small random weights, and gates of one;
- the threshold is 0, so that every pair is valid and both sides train on the same number; on a GPU scores get noise, since
  in half precision random weights often make two of them equal;
- no logging to W&B, no checkpoint, no validation images, no worker processes for the prompts;
- where torchvision's compiled operators do not fit the PyTorch build (a CPU wheel beside torchvision from PyPI), the
  two names its Python part needs to be imported are declared; only `Normalize` and, were images not square,
  `CenterCrop` are used from it.

A UNet call belongs to the rollout while the pipeline function runs, else to the policy or the reference by which network
it is. Evaluations are counted in samples: a prompt that is guided counts twice, a batch of 8 eight times. Phases exclude
each other (`reward` leaves out `reward_text`); `other` is what is left of `total`, the optimizer and the prompts' text
encoder among it. On a GPU phases would have to wait for its end, which slows the loop down: speed and memory come from one
process, phases (`--phases`) from another, and without the second all time is `other`. Memory is the largest resident set
since the models were built (CPU), or the largest amount that PyTorch had allocated (GPU), in MiB; the public code's second
UNet, the reference, is one of the models, so it counts in `peak_memory_mib` and not in `peak_memory_above_models_mib`.
"""

import argparse
import contextlib
import functools
import gc
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter, defaultdict
from pathlib import Path


# Only the child processes import PyTorch: the peak of a child starts at the size of the process that starts it.
COMMIT = "27a8642"
PROJECT = "spo_training_and_inference"
CONFIG = "configs/spo_sd-v1-5_4k-prompts_num-sam-4_10ep_bs10.py"
NEEDED = {"transformers": "4.40.1", "diffusers": "0.26.1", "accelerate": "0.24.1", "peft": "0.10.0"}
NEEDED_ANY = ("torch", "torchvision", "mmengine", "ml_collections", "absl-py", "wandb", "numpy")
PHASES = ("unet_rollout", "vae_decode", "reward", "policy_forward", "policy_backward", "reference_forward")
PER_PROMPT = {"unet": "unet_rollout", "vae_decode": "vae_decode", "reward_vision": "vision", "reward_text": "text"}
PER_PAIR = ("policy_forward", "policy_backward", "reference_forward")
SEED = 0


# --- what is needed --------------------------------------------------------------------------------------------------


def check_checkout(checkout: Path) -> Path:
    """
    The folder of the training code.

    Raises:
        SystemExit: if `checkout` is no copy of the public repository.
    """
    project = checkout.expanduser().resolve() / PROJECT
    missing = [name for name in ("train_scripts/train_spo.py", CONFIG) if not (project / name).is_file()]
    if missing:
        raise SystemExit(
            f"`--checkout {checkout}` must be a copy of the public SPO repository, but it has no "
            f"{' and no '.join(f'{PROJECT}/{name}' for name in missing)}. Get it with `git clone "
            f"https://github.com/RockeyCoss/SPO` and check out {COMMIT}."
        )
    return project


def find_versions(checkout: Path) -> dict[str, str]:
    """
    Versions of the libraries, of Python, and the commit of the checkout if it is a git repository.

    Raises:
        SystemExit: if a library is missing, or is not of the version that the public code was written for.
    """
    found = {"python": platform.python_version()}
    wrong = []
    for name in (*NEEDED, *NEEDED_ANY):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            importable = importlib.util.find_spec(name.removesuffix("-py")) is not None
            found[name] = "unknown" if importable or name == "wandb" else "none"
        if found[name] == "none" or found[name] != NEEDED.get(name, found[name]):
            wrong.append(f"{name}=={NEEDED[name]}" if name in NEEDED else name)
    if wrong:
        have = ", ".join(f"{name} {version}" for name, version in found.items())
        raise SystemExit(
            f"The public code needs {', '.join(wrong)}; {sys.executable} has {have}. Make the environment that the "
            f"docstring of {Path(__file__).name} describes and start this script with its Python."
        )
    git = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        process = subprocess.run(git, capture_output=True, text=True)
        if process.returncode == 0:
            found["public_code"] = process.stdout.strip()
    return found


class NothingIsLogged(types.ModuleType):
    """Stands in for `wandb`, which the script imports and, as it is configured here, does not call."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def load_script(project: Path):
    """
    `train_scripts/train_spo.py` as a module; it puts its own project into the import path.

    It imports torchvision, whose compiled operators may not fit the build of PyTorch. Then importing fails for want of
    operators that the script never calls: they are declared, and the script is imported again.
    """
    import torch

    if importlib.util.find_spec("wandb") is None:
        sys.modules["wandb"] = NothingIsLogged("wandb")
    spec = importlib.util.spec_from_file_location("train_spo", project / "train_scripts" / "train_spo.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    before = set(sys.modules)
    path = list(sys.path)
    try:
        spec.loader.exec_module(script)
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        forget(set(sys.modules) - before, project)
        sys.path[:] = path
        load_script.library = torch.library.Library("torchvision", "DEF")  # declarations live as long as the object
        for name in ("nms", "qnms"):
            load_script.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        spec.loader.exec_module(script)
    return script


def forget(names: set[str], project: Path):
    """Take modules out of `sys.modules` that did not load: torchvision's and the project's own."""
    for name in names:
        file = getattr(sys.modules[name], "__file__", None)
        if name.split(".")[0] == "torchvision" or (file and Path(file).is_relative_to(project)):
            del sys.modules[name]


# --- models ----------------------------------------------------------------------------------------------------------


def write_models(project: Path, preset: str, folder: Path, device: str = "cpu"):
    """
    Write the pipeline, the preference model, its processor and prompts for two rollouts to `folder`. Random numbers are
    drawn on `device`: those of a GPU take seconds, those of a CPU a minute.
    """
    import torch
    from models import PRESETS, build_pipeline, clip_config
    from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizerFast

    load_script(project)
    torch.set_default_device(device)
    from spo.preference_models.models.time_conditioned_clip import HFTimeConditionedCLIPModel

    build_pipeline(preset, folder / "scratch", seed=SEED).save_pretrained(folder / "pipeline")
    config, tokenizer = clip_config(preset, folder / "scratch" / "reward")
    torch.manual_seed(SEED)
    model = HFTimeConditionedCLIPModel(config)
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name:
            torch.nn.init.normal_(parameter, std=0.02)
            if name.endswith("bias") and "layers" in name:  # shift, scale, gate of the attention, then of the MLP
                width = len(parameter) // 6
                parameter.data[2 * width : 3 * width] += 1
                parameter.data[5 * width :] += 1
    model.save_pretrained(folder / "reward")
    size = config.vision_config.image_size
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    tokenizer.save_pretrained(folder / "scratch" / "fast")
    fast = CLIPTokenizerFast.from_pretrained(folder / "scratch" / "fast")
    CLIPProcessor(image_processor=images, tokenizer=fast).save_pretrained(folder / "reward")
    prompts = [{"caption": f"prompt number {i} of the benchmark"} for i in range(2 * PRESETS[preset].prompts)]
    (folder / "prompts.json").write_text(json.dumps(prompts))


# --- measuring -------------------------------------------------------------------------------------------------------


def resident(name: str) -> float:
    """`VmRSS` (now) or the peak, in MiB."""
    if name == "VmRSS" and Path("/proc/self/status").exists():
        return int(re.search(r"^VmRSS:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE).group(1)) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / (2**20 if sys.platform == "darwin" else 1024)


class Meter:
    """
    Seconds and samples by phase, of the second rollout and of the training on its pairs.

    Args:
        device (`str`, *optional*, defaults to `"cpu"`): where the networks run.
        phases (`bool`, *optional*, defaults to `True`): whether to time phases, which on a GPU waits at each end of one.
    """

    def __init__(self, device: str = "cpu", phases: bool = True):
        self.cuda = device == "cuda"
        self.phases = phases
        self.seconds = defaultdict(float)
        self.samples = Counter()
        self.num_pairs = 0
        self.losses = []
        self.rollouts = 0
        self.in_rollout = False
        self.models_mib = 0.0
        self.peak_mib = 0.0
        self.reference = None
        self._start = self._end = None
        self.cpu_seconds = self._cpu_start = 0.0

    @property
    def total(self) -> float:
        return self._end - self._start

    def now(self) -> float:
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def phase_now(self) -> float:
        """The time at an end of a phase."""
        return self.now() if self.phases else 0.0

    def memory(self, name: str) -> float:
        """MiB that are taken now (`VmRSS`), or were at the peak."""
        if not self.cuda:
            return resident(name)
        import torch

        taken = torch.cuda.memory_allocated() if name == "VmRSS" else torch.cuda.max_memory_allocated()
        return taken / 2**20

    def start(self):
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        self._cpu_start = time.process_time()
        self._start = self.now()

    def step(self, loss: float):
        """An optimizer step is over; the last one ends the measurement."""
        if self._start is not None:
            self._end, self.peak_mib = self.now(), self.memory("peak")
            self.cpu_seconds = time.process_time() - self._cpu_start
            self.losses.append(loss)

    def add(self, phase: str, seconds: float):
        if self._start is not None:
            self.seconds[phase] += seconds

    def count(self, phase: str, samples: int):
        if self._start is not None:
            self.samples[phase] += samples

    def timed(self, phase: str, function):
        """`function`, with its time charged to `phase`."""

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            start = self.phase_now()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(phase, self.phase_now() - start)

        return wrapper

    def watch(self, module, phase, counter: str | None = None, backward: str | None = None):
        """
        Time and count the calls of a network.

        Args:
            module (`torch.nn.Module`): the network.
            phase (`str`, `Callable` or `None`): what its time is charged to, and its samples without `counter`.
            counter (`str`, *optional*): what its samples are counted as.
            backward (`str`, *optional*): what samples are counted as whose output receives a gradient.
        """
        starts = []

        def before(module, args):
            starts.append(self.phase_now())

        def after(module, args, output):
            seconds = self.phase_now() - starts.pop()
            name = phase() if callable(phase) else phase
            if name is not None:
                self.add(name, seconds)
            output = output if hasattr(output, "requires_grad") else output[0]
            self.count(counter or name, len(output))
            if backward and output.requires_grad:
                output.register_hook(lambda gradient: self.count(backward, len(gradient)))

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


class _CopyModule:
    """Stands in for the module `copy` in the script, whose one deep copy is the reference UNet."""

    def __init__(self, meter: Meter):
        self.meter = meter

    def deepcopy(self, unet):
        import copy

        self.meter.reference = copy.deepcopy(unet)
        return self.meter.reference


def instrument(script, meter: Meter, warm_up_steps: int):
    """Hang timers into the names through which the script reaches its functions; what they compute stays as it is."""
    from spo.preference_models import preference_model_fns

    # The originals, and subclasses of them that tell the meter what runs.
    rollout = script.multi_sample_pipeline
    build_preference = script.get_preference_model_func
    Model = preference_model_fns.StepAwarePreferenceModel
    Accelerator = script.Accelerator

    class WatchedModel(Model):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            meter.watch(self.model.vision_model, None, counter="vision")
            meter.watch(self.model.text_model, "reward_text", counter="text")
            meter.watch(self.model.text_projection, "reward_text", counter="text_projection")

    class WatchedAccelerator(Accelerator):
        def backward(self, *args, **kwargs):
            return meter.timed("policy_backward", super().backward)(*args, **kwargs)

        def log(self, values, *args, **kwargs):
            super().log(values, *args, **kwargs)
            if "train_loss" in values:
                meter.step(values["train_loss"])

    # The first rollout is the warm-up: all models exist then, so they are hooked there.
    def watched_rollout(pipeline, **kwargs):
        if meter.rollouts == 0:  # all models are built, nothing has run
            gc.collect()
            with contextlib.suppress(OSError):  # where Linux allows it, forget the peak of loading the models
                Path("/proc/self/clear_refs").write_text("5")
            meter.models_mib = meter.memory("VmRSS")
            policy = {True: "unet_rollout", False: "policy_forward"}
            meter.watch(pipeline.unet, lambda: policy[meter.in_rollout], backward="policy_backward")
            meter.watch(meter.reference, "reference_forward")
            meter.watch(pipeline.vae.decoder, "vae_decode")
            meter.watch(pipeline.vae.post_quant_conv, "vae_decode", counter="post_quant_conv")
            pipeline.text_encoder.register_forward_pre_hook(lambda *_: meter.start())
            kwargs.update(num_inference_steps=warm_up_steps, divert_start_step=0)
        meter.rollouts += 1
        meter.in_rollout = True
        output = rollout(pipeline, **kwargs)
        meter.in_rollout = False
        meter.num_pairs = len(output[0])
        return output

    # Put them in the place of the originals.
    preference_model_fns.StepAwarePreferenceModel = WatchedModel
    script.Accelerator = WatchedAccelerator
    script.copy = _CopyModule(meter)
    script.multi_sample_pipeline = watched_rollout
    script.get_preference_model_func = lambda *args: meter.timed(
        "reward", decisive(build_preference(*args), meter.cuda)
    )


def decisive(score, noisy: bool):
    """The preference function, with noise where half precision would make two scores equal."""
    import torch

    def scored(*args, **kwargs):
        scores = score(*args, **kwargs)
        return scores + torch.randn_like(scores)

    return scored if noisy else score


def configure(script, project: Path, preset: str, folder: Path):
    """Give the script its own configuration file, with the sizes of the preset and the folders of the models."""
    from models import PRESETS

    sizes = PRESETS[preset]
    os.chdir(project)
    script.FLAGS([script.__name__, f"--config={CONFIG}"])
    config = script.FLAGS.config
    with config.unlocked():
        config.debug = True  # no W&B
        config.num_epochs = 1
        config.save_interval = config.eval_interval = 2
        config.validation_prompts = None
        config.logdir = str(folder / "output")
        config.pretrained.model = str(folder / "pipeline")
        config.lora_rank = sizes.lora_rank
        config.preference_model_func_cfg.model_pretrained_model_name_or_path = str(folder / "reward")
        config.preference_model_func_cfg.processor_pretrained_model_name_or_path = str(folder / "reward")
        config.preference_model_func_cfg.ckpt_path = None
        config.compare_func_cfg.threshold = 0.0
        config.dataset_cfg.meta_json_path = str(folder / "prompts.json")
        config.dataset_cfg.pretrained_tokenzier_path = str(folder / "reward")
        config.dataloader_num_workers = 0
        config.dataloader_pin_memory = False
        config.sample.sample_batch_size = sizes.prompts
        config.train.train_batch_size = sizes.pairs_per_batch
        config.sample.num_sample_each_step = sizes.rollout["num_candidates"]
    return config


def measure(
    project: Path, preset: str, threads: int | None, folder: Path, device: str = "cpu", phases: bool = True
) -> dict:
    """
    One repeat, in this process.

    Raises:
        RuntimeError: if not every pair was valid, or a loss is not finite: nothing could be compared then.
    """
    import torch

    # Run the script with the timers in it.
    if threads:
        torch.set_num_threads(threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    script = load_script(project)
    config = configure(script, project, preset, folder)
    meter = Meter(device, phases)
    prompts = config.sample.sample_batch_size
    batch = config.train.train_batch_size
    instrument(script, meter, warm_up_steps=max(-(-batch // prompts), 2))
    script.main([])

    # A run with fewer pairs, or losses that are not finite, cannot be compared.
    expected = prompts * (config.sample.num_steps - config.train.divert_start_step)
    if meter.rollouts != 2 or meter.num_pairs != expected:
        raise RuntimeError(
            f"The public code should have found {expected} pairs in the second of 2 rollouts, but found "
            f"{meter.num_pairs} in number {meter.rollouts}. Two scores of the random preference model may be equal."
        )
    if len(meter.losses) != -(-expected // batch) or not all(torch.isfinite(torch.tensor(meter.losses))):
        raise RuntimeError(f"Expected {-(-expected // batch)} finite losses, got {meter.losses}.")
    seconds = {phase: meter.seconds[phase] for phase in PHASES}
    seconds = {**seconds, "other": meter.total - sum(seconds.values()), "total": meter.total}
    return {
        "threads": torch.get_num_threads(),
        "num_prompts": prompts,
        "num_pairs": meter.num_pairs,
        "pairs_per_second": meter.num_pairs / meter.total,
        "pairs_per_cpu_second": meter.num_pairs / meter.cpu_seconds,
        "seconds": {
            **seconds,
            "reward": seconds["reward"] - meter.seconds["reward_text"],
            "reward_text": meter.seconds["reward_text"],
        },
        "peak_memory_mib": meter.peak_mib,
        "peak_memory_above_models_mib": meter.peak_mib - meter.models_mib,
        "evals_per_prompt": {name: meter.samples[phase] / prompts for name, phase in PER_PROMPT.items()},
        "evals_per_pair": {name: meter.samples[name] / meter.num_pairs for name in PER_PAIR},
    }


# --- processes -------------------------------------------------------------------------------------------------------


def median(values: list):
    """Median of numbers, or of every entry of dictionaries of numbers."""
    if isinstance(values[0], dict):
        return {key: median([value[key] for value in values]) for key in values[0]}
    return statistics.median(values)


def run_child(arguments: argparse.Namespace, task: str, folder: Path):
    """
    Run this script again for one task.

    Raises:
        SystemExit: if it failed, with the end of what it printed.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--task", task, "--folder", str(folder)]
    command += ["--checkout", str(arguments.checkout), "--preset", arguments.preset]
    command += ["--threads", str(arguments.threads)] if arguments.threads else []
    command += ["--device", arguments.device] + ["--phases"] * arguments.phases
    on_cpu = arguments.device == "cpu"
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no" if on_cpu else "fp16"}
    environment |= {"ACCELERATE_USE_CPU": "true"} if on_cpu else {}
    environment |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
    if arguments.threads:
        environment |= {name: str(arguments.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if process.returncode:
        tail = "\n".join(process.stdout.strip().splitlines()[-30:])
        raise SystemExit(f"The public code ended with status {process.returncode} ({task}):\n{tail}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkout", type=Path, required=True, help="a clone of https://github.com/RockeyCoss/SPO")
    parser.add_argument("--preset", choices=["tiny", "mid", "sd15"], default="tiny", help="sizes, see models.py")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="float32 on a CPU, fp16 on a GPU")
    parser.add_argument("--phases", action="store_true", help="time phases on a GPU, too, which slows it down")
    parser.add_argument("--repeats", type=int, default=1, help="measured runs, each in a process of its own")
    parser.add_argument("--threads", type=int, help="CPU threads; as many as PyTorch takes by default")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--task", choices=["models", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.repeats < 1 or (arguments.threads or 1) < 1:
        parser.error("`--repeats` and `--threads` must be at least 1.")
    return arguments


def main():
    arguments = parse_arguments()
    project = check_checkout(arguments.checkout)
    if arguments.task == "models":
        write_models(project, arguments.preset, arguments.folder, arguments.device)
        return
    if arguments.task == "measure":
        phases = arguments.phases or arguments.device == "cpu"
        result = measure(project, arguments.preset, arguments.threads, arguments.folder, arguments.device, phases)
        (arguments.folder / "result.json").write_text(json.dumps(result))
        return
    versions = find_versions(arguments.checkout)
    repeats = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_child(arguments, "models", folder)
        for repeat in range(arguments.repeats):
            run_child(arguments, "measure", folder)
            repeats.append(json.loads((folder / "result.json").read_text()))
            speed, memory = repeats[-1]["pairs_per_second"], repeats[-1]["peak_memory_mib"]
            print(f"{repeat + 1} of {arguments.repeats}: {speed:.3g} pairs/s, {memory:.0f} MiB", flush=True)
    threads = [repeat.pop("threads") for repeat in repeats]
    dtype = "float32" if arguments.device == "cpu" else "float16"
    head = {"preset": arguments.preset, "device": arguments.device, "dtype": dtype, "threads": threads[0]}
    report = {**head, **median(repeats), "versions": versions, "repeats": repeats}
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "repeats"}, indent=2))


if __name__ == "__main__":
    main()
