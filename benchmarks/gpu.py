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
What SPO does on the GPU of this machine, in one command of at most eight minutes: pairs per second, peak memory and the share
of the card's matrix rate, by setting, beside the public research code and the targets.

```shell
python benchmarks/gpu.py --json gpu.json
python benchmarks/gpu.py --public public_spo --public_python public_env/bin/python --json gpu.json
python benchmarks/gpu.py --device cpu --preset tiny    # does it run at all?
```

It needs PyTorch, the libraries of `trl_spo` and a copy of this repository, no environment and no network. `--public` is a
checkout of the public code, `--public_python` the Python of its environment (see `public_code.py`). Where only wheels can be
carried, unpack those of the public code into a folder and give it as `--public_path`; it comes first on `PYTHONPATH`.

Every arm is a process of `throughput.py` (or of `public_code.py`): random networks of the preset's shapes, drawn on the card, a
warm-up in which blocks are compiled, then one rollout and training on all its pairs. The public code runs first and, if time is
left, once more at the end, so that a card that slows down is noticed. An arm that would not fit into the time that is left is
skipped and named. What is exact changes no pair beyond rounding; the others decode smaller images for scoring, and two
candidates instead of four are half the pool.

The share of the matrix rate is the counted arithmetic of the loop (`benchmarks/results/full_size.json`) per second, over the
rate of a large bfloat16 matrix product on the same card.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path


HERE = Path(__file__).resolve().parent
PUBLIC = "public code, fp16"
EXACT = "exact"
SMALL = "224 px, K = 2"
SDXL = "SDXL preset"


@dataclass(frozen=True)
class Arm:
    """
    A setting of our loop.

    Attributes:
        options (`dict`): fields of `SPOConfig`.
        seconds (`int`): what the process takes on an H100, as an upper estimate.
        dtype (`str`): of the weights.
        preset (`str`): of `models.py`.
        profiled (`bool`): whether a second, synchronised run tells the phases.
    """

    options: dict = field(default_factory=dict)
    seconds: int = 60
    dtype: str = "bfloat16"
    preset: str = "sd15"
    profiled: bool = False


ARMS = {  # the most important first, since time may run out
    EXACT: Arm(seconds=110, profiled=True),
    "exact, eager": Arm({"compile_regions": False}, seconds=85, profiled=True),
    SMALL: Arm({"scoring_image_size": 224, "num_candidates": 2}, seconds=75),
    SDXL: Arm({"gradient_checkpointing": True}, seconds=120, preset="sdxl"),
    "224 px": Arm({"scoring_image_size": 224}, seconds=60),
    "exact, fp16": Arm(seconds=90, dtype="float16"),
    "LPO": Arm({"reward": "latent", "branch_start_step": 0, "beta": 500.0}, seconds=60),
}
PUBLIC_SECONDS = 90


TARGETS = (  # what is aimed at on one H100, the arm it is read from, and its number there
    ("exact, pairs/s", ">= 12, then 15", EXACT, "pairs_per_second"),
    ("share of the matrix rate, exact", ">= 40%", EXACT, "share"),
    ("224 px scoring, K = 2, pairs/s", ">= 30", SMALL, "pairs_per_second"),
    ("peak memory, exact, GB", "<= 20", EXACT, "peak_gb"),
    ("SDXL preset, pairs/s", ">= 2.3", SDXL, "pairs_per_second"),
)


def tflop_per_pair(preset: str, options: dict) -> float | None:
    """Arithmetic of the exact loop per pair, as `full_size.py` counted it; `None` for other shapes or settings."""
    counted = json.loads((HERE / "results" / "full_size.json").read_text()).get(preset)
    if counted is None or set(options) - {"compile_regions", "gradient_checkpointing"}:
        return None
    work = counted["stages_exaflop"]
    exaflop = work["rollout"]["ours"] + work["training of all pairs"]["ours"]
    pairs = 4000 * 10 * 16  # prompts, epochs and branching steps of the paper's run, which is what was counted
    return exaflop * 1e6 / pairs


class Clock:
    """How much of the allowed time is left."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def run_process(command: list[str], environment: dict, seconds: float, path: Path) -> dict:
    """What the command wrote to `path`, or, under `error`, why it wrote nothing."""
    path.unlink(missing_ok=True)
    process = subprocess.Popen(
        [*command, "--json", str(path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        # With the processes it started: one that goes on would slow the next arm.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"error": f"not finished after {seconds:.0f} s"}
    if process.returncode or not path.is_file():
        return {"error": f"status {process.returncode}: " + "\n".join(output.strip().splitlines()[-15:])}
    result = json.loads(path.read_text())
    return {**result, "peak_gb": result["peak_memory_mib"] * 2**20 / 1e9}


def our_environment() -> dict:
    """That of this process, with the sources on the import path, since nothing need be installed."""
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def run_arm(name: str, arguments: argparse.Namespace, seconds: float, path: Path) -> dict:
    arm = ARMS[name]
    tiny = arguments.preset == "tiny"
    preset = "tiny" if tiny else arm.preset
    options = dict(arm.options)
    if arguments.device == "cpu":  # where no block is compiled unasked, and the compiler takes minutes
        options.setdefault("torch_compile_backend", "eager")
        if options.get("compile_regions") is False:
            del options["torch_compile_backend"]
    if tiny and "scoring_image_size" in options:
        options["scoring_image_size"] = 8
    command = [sys.executable, str(HERE / "throughput.py"), "--worker", "--preset", preset]
    command += ["--device", arguments.device, "--dtype", "float32" if arguments.device == "cpu" else arm.dtype]
    command += [] if arm.profiled else ["--no_phases"]
    for option, value in options.items():
        command += ["--set", f"{option}={value}"]
    result = run_process(command, our_environment(), seconds, path)
    work = tflop_per_pair(preset, arm.options)
    if work and "error" not in result:
        result["tflops"] = work * result["pairs_per_second"]
        result["share"] = result["tflops"] / result["hardware"]["matrix_tflops"]
    return result


def run_public(arguments: argparse.Namespace, seconds: float, path: Path) -> dict:
    command = [arguments.public_python, str(HERE / "public_code.py"), "--checkout", str(arguments.public)]
    command += ["--preset", arguments.preset, "--device", arguments.device]
    environment = dict(os.environ)
    if arguments.public_path:
        path_entries = [str(arguments.public_path.resolve()), os.environ.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path_entries))
    return run_process(command, environment, seconds, path)


def table(results: dict[str, dict]) -> str:
    """Markdown: one row per arm that ran, then the targets."""
    public = [results[PUBLIC]["pairs_per_second"]] if "pairs_per_second" in results.get(PUBLIC, {}) else []
    lines = [
        "| | pairs / s | against public | peak GB | of the matrix rate | warm-up s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, result in results.items():
        if "error" in result:
            lines.append(f"| {name} | {result['error'].splitlines()[-1]} | | | | |")
            continue
        ratio = f"{result['pairs_per_second'] / public[0]:.2f}" if public else "-"
        share = f"{result['share']:.0%}" if "share" in result else "-"
        warm_up = f"{result['warm_up_seconds']:.0f}" if "warm_up_seconds" in result else "-"
        speed = f"{result['pairs_per_second']:.2f}"
        lines.append(f"| {name} | {speed} | {ratio} | {result['peak_gb']:.1f} | {share} | {warm_up} |")
    lines += ["", "| target for one H100 | | reached |", "|---|---|---:|"]
    for what, goal, arm, key in TARGETS:
        value = results.get(arm, {}).get(key)
        shown = "-" if value is None else f"{value:.0%}" if key == "share" else f"{value:.2f}"
        lines.append(f"| {what} | {goal} | {shown} |")
    return "\n".join(lines)


def phase_table(results: dict[str, dict]) -> str:
    """Markdown: milliseconds per pair by phase, of the arms that were profiled."""
    profiled = {
        name: result for name, result in results.items() if result.get("seconds") and len(result["seconds"]) > 2
    }
    lines = ["| ms per pair | " + " | ".join(profiled) + " |", "|---" + "|---:" * len(profiled) + "|"]
    for phase in next(iter(profiled.values()), {}).get("seconds", ()):
        cells = [f"{1000 * r['seconds'].get(phase, 0) / r['num_pairs']:.1f}" for r in profiled.values()]
        lines.append(f"| {phase} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(arguments: argparse.Namespace) -> dict[str, dict]:
    """All arms, as far as the time goes; each is printed when it is done."""
    clock = Clock(arguments.minutes)
    results = {}
    on_cpu = arguments.device == "cpu"
    plan = [(name, ARMS[name].seconds, run_arm) for name in ARMS if arguments.arms is None or name in arguments.arms]
    if arguments.public:
        again = f"{PUBLIC}, again"
        plan = [(PUBLIC, PUBLIC_SECONDS, run_public), *plan, (again, PUBLIC_SECONDS, run_public)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        for name, needed, run in plan:
            if clock.left < (1 if on_cpu else needed):
                results[name] = {"error": f"skipped: {clock.left:.0f} s were left"}
            elif run is run_public:
                results[name] = run_public(arguments, clock.left, path)
            else:
                results[name] = run_arm(name, arguments, clock.left, path)
            found = results[name]
            shown = (
                found.get("error") or f"{found['pairs_per_second']:.2f} pairs/s, {found['peak_memory_mib']:.0f} MiB"
            )
            print(f"{name}: {shown} ({60 * arguments.minutes - clock.left:.0f} s)", flush=True)
            if arguments.json:  # what is measured is kept, whatever happens to the rest
                write(arguments, results)
    return results


def write(arguments: argparse.Namespace, results: dict[str, dict]):
    report = {"preset": arguments.preset, "device": arguments.device, "arms": results, "table": table(results)}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--preset", choices=["sd15", "tiny"], default="sd15", help="tiny: to see whether it runs")
    parser.add_argument("--minutes", type=float, default=8, help="an arm that does not fit into the rest is skipped")
    parser.add_argument(
        "--arms", type=lambda text: [name.strip() for name in text.split(";")], help="names, with `;` between"
    )
    parser.add_argument("--public", type=Path, help="a checkout of the public code")
    parser.add_argument("--public_python", default=sys.executable, help="Python of its environment")
    parser.add_argument("--public_path", type=Path, help="a folder of its unpacked wheels")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.arms or ()) - set(ARMS))
    if unknown:
        parser.error(f"`--arms` must be of {'; '.join(ARMS)}, got {'; '.join(unknown)}.")
    if arguments.minutes <= 0:
        parser.error(f"`--minutes` must be positive, got {arguments.minutes:g}.")
    if arguments.device == "cuda":
        import torch  # slow to import, and only asked here

        if not torch.cuda.is_available():
            parser.error(
                "there is no GPU that PyTorch can use; `--device cpu --preset tiny` shows whether the script runs."
            )
    return arguments


def main():
    arguments = parse_arguments()
    results = measure(arguments)
    if arguments.json:
        write(arguments, results)
    finished = [result for result in results.values() if "hardware" in result]
    if finished:
        hardware = finished[0]["hardware"]
        versions = ", ".join(f"{name} {version}" for name, version in finished[0]["versions"].items())
        print(f"\n{hardware['name']}, {hardware['matrix_tflops']:.0f} TFLOP/s for a large matrix product; {versions}")
    print("\n" + table(results) + "\n\n" + phase_table(results))


if __name__ == "__main__":
    main()
