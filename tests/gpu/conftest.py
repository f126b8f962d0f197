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
Where the tests of this folder run: on the GPU if there is one. `TRL_SPO_TEST_DEVICE=cpu` runs them on the CPU, so that it is
known that they are right, and `TRL_SPO_TEST_DEVICE=pretended` on the pretended GPU of `tests/pretended_device.py`.
"""

import contextlib
import os
from pathlib import Path

import pytest
import torch

from ..pretended_device import PretendedGPU


WANTED = os.environ.get("TRL_SPO_TEST_DEVICE") or "cuda"
NO_GPU = "There is no GPU here, so nothing of it was tested (TRL_SPO_TEST_DEVICE=cpu runs these tests on the CPU)."


def pytest_collection_modifyitems(items):
    """One sentence instead of an error per test."""
    if WANTED == "cuda" and not torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(autouse=True)
def device():
    """The name of the device: "cuda", "cpu" or "pretended"."""
    with PretendedGPU() if WANTED == "pretended" else contextlib.nullcontext():
        yield WANTED
    if WANTED == "cuda":
        torch.cuda.empty_cache()
