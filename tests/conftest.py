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

import os

import pytest


# pytest-xdist gives out files in this order. The longest come first, so that at the end no process waits for another; those that
# start several processes take turns with others.
LONGEST_FILES = (
    "test_fsdp2 test_benchmarks test_doctor test_elastic test_upstream test_distributed test_two_devices test_scripts test_faults "
    "test_latent_reward test_rollouts_apart test_label_browser test_hub test_memory test_pipelines test_checkpointing"
).split()


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(autouse=True)
def own_precision():
    """`TrainingArguments` of transformers 4 leave `bf16`, `torch_compile` and `fsdp` in the environment, and later ones obey."""
    yield
    for name in ("MIXED_PRECISION", "DYNAMO_BACKEND", "DYNAMO_MODE", "USE_FSDP"):
        os.environ.pop(f"ACCELERATE_{name}", None)
