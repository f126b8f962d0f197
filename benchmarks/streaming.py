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
Millions of prompts: how long until the first ones are at hand, how much memory they take, and how long a run that was stopped needs
to go on; streamed, and listed.

```shell
python benchmarks/streaming.py --num_prompts 10000000
```

The prompts are written as parquet files of 100,000 rows. What is measured runs in processes of their own, whose peak of memory is
read from the system, less that of a process that has imported the same and read one file. "Listed" is a dataset that `datasets` has
copied to its cache before, which is not counted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere

import psutil
import pyarrow as pa
import pyarrow.parquet as pq


ROWS_PER_FILE = 100_000
ROLLOUT = 10  # prompts
WORDS = (
    "a the red blue tall old quiet fox tower river garden lamp market storm painting photo of in on under near".split()
)
JOBS = ("none", "streamed", "streamed, a tenth", "streamed, resumed", "listed", "listed, resumed")


def write_prompts(folder: Path, count: int) -> None:
    for file in range(-(-count // ROWS_PER_FILE)):
        rows = range(file * ROWS_PER_FILE, min((file + 1) * ROWS_PER_FILE, count))
        # Words by the digits of the number, so that no two prompts are equal and files are not all zeros when they are compressed.
        prompts = [f"{row}: " + " ".join(WORDS[row // 7**k % len(WORDS)] for k in range(8)) for row in rows]
        pq.write_table(pa.table({"prompt": prompts}), folder / f"train-{file:05d}.parquet", row_group_size=10_000)


def work(job: str, folder: Path, count: int) -> dict[str, float]:
    """One job, in this process. Returns seconds and MiB."""
    import datasets

    from trl_spo.prompt_source import ListedPrompts, StreamedPrompts
    from trl_spo.prompts import load_prompts, read_prompts

    datasets.disable_progress_bars()
    if job == "none":  # what both ways load as well
        prompts = read_prompts(load_prompts(str(folder / "train-00000.parquet"), streaming=True))
        StreamedPrompts(prompts, 0, 1, seed=0).take(0, 1)
        return {"seconds": 0.0, "peak": peak_memory()}

    start = time.perf_counter()
    name = folder
    if job.startswith("streamed"):
        source = StreamedPrompts(read_prompts(load_prompts(str(name), streaming=True)), 0, 1, seed=0)
    else:
        source = ListedPrompts(read_prompts(load_prompts(str(name))), 0, 1, seed=0)
    if job.endswith("resumed"):
        states = json.loads((folder / f"{job.split(',')[0]}.json").read_text())
        source.load_state_dicts(states)
    position = count * 9 // 10 if job == "listed, resumed" else 0
    source.take(position, ROLLOUT)
    seconds = time.perf_counter() - start

    if job == "listed":
        (folder / "listed.json").write_text(json.dumps([source.state_dict()]))
    if job in ("streamed", "streamed, a tenth"):
        taken = ROLLOUT
        most = count // 10 if job.endswith("tenth") else count * 9 // 10
        while taken < most:
            size = min(1_000, most - taken)
            source.take(taken, size)
            taken += size
    if job == "streamed":
        (folder / "streamed.json").write_text(json.dumps([source.state_dict()]))
    return {"seconds": seconds, "peak": peak_memory()}


def peak_memory() -> float:
    """Of this process, in MiB, without the pages of files that the system could drop at any time."""
    memory = psutil.Process().memory_info()
    return (memory.rss - memory.shared) / 2**20


def measure(job: str, folder: Path, count: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--num_prompts", str(count), "--folder", str(folder), "--job", job]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(results: dict[str, list[dict]], count: int) -> str:
    base = median(run["peak"] for run in results["none"])
    lines = [
        f"{count:,} prompts:\n",
        "| prompts | first ones at hand | goes on after nine tenths | memory |",
        "|---|---|---|---|",
    ]
    for kind in ("streamed", "listed"):
        first = median(run["seconds"] for run in results[kind])
        resumed = median(run["seconds"] for run in results[f"{kind}, resumed"])
        memory = median(run["peak"] for run in results[kind]) - base
        lines.append(f"| {kind} | {first:.1f} s | {resumed:.1f} s | {memory:+.0f} MiB |")
    tenth = median(run["peak"] for run in results["streamed, a tenth"]) - base
    lines.append(f"\nStreamed, after a tenth of them: {tenth:+.0f} MiB.")
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--num_prompts", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=1, help="Runs of each job, in turns; medians are told.")
    parser.add_argument("--folder", type=Path, help="Where the prompts are, or will be. Default: a temporary one.")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.job:
        print(json.dumps(work(args.job, args.folder, args.num_prompts)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.glob("*.parquet")):
            write_prompts(folder, args.num_prompts)
        results = {job: [] for job in JOBS}
        measure("listed", folder, args.num_prompts)  # fills the cache of datasets
        for _ in range(args.repeats):
            for job in JOBS:
                results[job].append(measure(job, folder, args.num_prompts))
        print(report(results, args.num_prompts))


if __name__ == "__main__":
    main()
