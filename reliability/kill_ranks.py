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
Kills a rank of two at every one of `PLACES` in `tests/test_elastic.py`, with whole denoisers and with shards, under one launcher and
under two that stand for two machines, also where processes of their own roll out. The launcher starts the processes anew; pairs and
weights must be those of a run in which nobody died.

    python reliability/kill_ranks.py          # about ten minutes on two cores
"""

import itertools
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere

from _pytest.outcomes import Failed

from tests.test_elastic import PLACES, kill_and_compare


CONFIGS = {"cpu_2proc.yaml": "whole denoisers", "fsdp2.yaml": "shards"}


def main() -> int:
    failed = 0
    print("| where a rank dies | processes | launchers | rollouts | seconds | |\n|---|---|---|---|---|---|")
    cases = [(*case, False) for case in itertools.product(PLACES, CONFIGS, (1, 2))]
    cases += [(*case, True) for case in itertools.product(("step", "checkpoint"), CONFIGS, (2,))]
    for place, name, launchers, apart in cases:
        start = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                kill_and_compare(Path(folder), name, launchers, place, apart)
            outcome = "the same run"
        except (AssertionError, Failed) as error:
            failed += 1
            outcome = "DIFFERS"
            print(error, file=sys.stderr)
        rollouts = "apart" if apart else "by the ranks"
        print(
            f"| {place} | {CONFIGS[name]} | {launchers} | {rollouts} | {time.monotonic() - start:.0f} | {outcome} |",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
