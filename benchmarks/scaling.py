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
Does a run cost more when it has more prompts? And how long does `import trl_spo` take beside `import trl`?

```shell
python benchmarks/scaling.py --json benchmarks/results/scaling.json
```

Trains the `tiny` preset on 1,000, 10,000 and 100,000 prompts of a memory-mapped dataset, the sizes interleaved, each
in a process of its own: seconds to make the trainer (every prompt is checked once), CPU milliseconds per pair, and
resident memory that the run adds. A reward without a model leaves the loop itself to be seen.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
SIZES = (1_000, 10_000, 100_000)


def worker(num_prompts: int, folder: Path):
    sys.path.insert(0, str(ROOT))
    import torch
    from datasets import Dataset, load_from_disk
    from transformers import PrinterCallback, ProgressCallback
    from transformers.utils import logging

    from benchmarks.models import build_pipeline
    from trl_spo import SPOConfig, SPOTrainer

    # A tiny model and a dataset of the asked size on the disk.
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    Dataset.from_dict({"prompt": [f"prompt {i} of many" for i in range(num_prompts)]}).save_to_disk(folder / "prompts")
    prompts = load_from_disk(str(folder / "prompts"))

    def reward(images, prompts, timesteps):
        return 100 * (images[:, 0] - images[:, 1]).mean(dim=(1, 2))

    config = SPOConfig(
        output_dir=str(folder / "out"), max_steps=4, per_device_rollout_batch_size=4, per_device_train_batch_size=16,
        preference_threshold=0.0, save_strategy="no", logging_steps=1000, report_to="none", use_cpu=True,
    )  # fmt: skip
    pipeline = build_pipeline("tiny", folder)
    start = time.perf_counter()
    trainer = SPOTrainer(config, pipeline, reward, train_dataset=prompts)
    setup = time.perf_counter() - start
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)

    # Measure after a warm-up.
    trainer.train()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer.args.max_steps = 40
    start = time.process_time()
    trainer.train()
    milliseconds = 1e3 * (time.process_time() - start) / trainer.pair_loader.num_pairs_seen
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"setup_seconds": setup, "cpu_ms_per_pair": milliseconds, "added_mib": added / 1024}))


def import_seconds(name: str) -> float:
    code = f"import time; start = time.perf_counter(); import {name}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.folder)

    # Each size in a process of its own, in turns, so that a change of the machine's speed concerns all of them.
    runs = {size: [] for size in SIZES}
    imports = {name: [] for name in ("trl", "trl_spo")}
    for _ in range(args.repeats):
        for name, seconds in imports.items():
            seconds.append(import_seconds(name))
        for size in SIZES:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, __file__, "--worker", str(size), "--folder", folder]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
            runs[size].append(json.loads(output.strip().splitlines()[-1]))

    # Medians over the repeats.
    medians = {}
    for size, values in runs.items():
        columns = {key: [run[key] for run in values] for key in values[0]}
        medians[size] = {key: statistics.median(column) for key, column in columns.items()}
    imports = {name: statistics.median(seconds) for name, seconds in imports.items()}
    print("| prompts | seconds to make the trainer | CPU ms per pair | MiB added by the run |\n|---|---|---|---|")
    for size, values in medians.items():
        print(f"| {size:,} | " + " | ".join(f"{values[key]:.2f}" for key in values) + " |")
    print(f"\nimport trl: {imports['trl']:.2f} s, import trl_spo: {imports['trl_spo']:.2f} s (medians)")
    if args.json:
        args.json.write_text(json.dumps({"prompts": medians, "import_seconds": imports, "repeats": runs}, indent=1))


if __name__ == "__main__":
    main()
