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
What `make reliability` runs: every check as a program of its own, then one table. Exit status 0 only if all hold.

    python reliability/run.py                 # all, up to half an hour on two cores
    python reliability/run.py kill soak       # some
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[1]
PYTEST = ["-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]


class Check(NamedTuple):
    """A claim and the arguments of the Python program that fails if it does not hold."""

    name: str
    claim: str
    command: list[str]
    offline: bool = False  # in a network namespace of its own, where that is allowed


CHECKS = [
    Check("kill", "killed anywhere, resumed, the same run bit for bit", ["reliability/kill_matrix.py"]),
    Check("ranks", "a rank killed, the launcher starts anew, the same run", ["reliability/kill_ranks.py"]),
    Check("checkpoints", "no half-written checkpoint is picked up", [*PYTEST, "tests/test_checkpointing.py"]),
    Check("faults", "full disk, read-only folder: an error, and nothing lost", [*PYTEST, "tests/test_faults.py"]),
    Check("processes", "two processes: same numbers, no deadlock, one writer", [*PYTEST, "tests/test_distributed.py"]),
    Check("numbers", "NaN and inf are named, counted, skipped, and stop a run", [*PYTEST, "tests/test_numerics.py"]),
    Check("input", "malformed input gives one clear error", [*PYTEST, "tests/test_bad_input.py"]),
    Check("properties", "pure functions hold for generated input", [*PYTEST, "tests/test_properties.py"]),
    Check("security", "no code from files, no secret out, no path escaped", [*PYTEST, "tests/test_security.py"]),
    Check("soak", "memory and cost stay flat (three minutes of it)", ["reliability/soak.py", "--minutes", "3"]),
    Check(
        "order",
        "the whole suite in random order, in parallel, without a network",
        [*PYTEST, "-n", "2", "--dist", "loadfile", "--random-order", "tests"],
        offline=True,
    ),
]


def summary(output: str) -> str:
    """The last line that says how a program ended."""
    lines = [line.strip("= ") for line in output.splitlines() if line.strip()]
    results = [line for line in lines if re.match(r"\d+ (passed|failed|error)", line)]
    return (results or lines or [""])[-1][:100]


def without_network() -> list[str]:
    """What to put before a Python program; nothing where namespaces need rights that this process has not."""
    try:
        allowed = subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    return ["unshare", "--net", sys.executable, "reliability/offline.py"] if allowed else [sys.executable]


def run(check: Check, folder: Path) -> tuple[bool, float, str]:
    start = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [*(without_network() if check.offline else [sys.executable]), *check.command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    (folder / f"{check.name}.txt").write_text(done.stdout, encoding="utf-8")
    return done.returncode == 0, time.monotonic() - start, summary(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", choices=[[], *(check.name for check in CHECKS)], help="checks; all by default"
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "reliability_output")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for check in CHECKS:
        if args.names and check.name not in args.names:
            continue
        print(f"{check.name}: {check.claim} ...", flush=True)
        holds, seconds, last = run(check, args.output_dir)
        rows.append((check, holds, seconds, last))
        print(f"    {'holds' if holds else 'FAILED'} after {seconds:.0f} s: {last}", flush=True)
    width = max(len(check.claim) for check, *_ in rows)
    print(f"\n{'check':<12} {'claim':<{width}} {'':<6} {'s':>5}  last line")
    for check, holds, seconds, last in rows:
        print(f"{check.name:<12} {check.claim:<{width}} {'holds' if holds else 'FAILED':<6} {seconds:5.0f}  {last}")
    failed = [check.name for check, holds, *_ in rows if not holds]
    print(
        f"\n{len(rows) - len(failed)} of {len(rows)} hold"
        + (f"; look at {args.output_dir} for {failed}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
