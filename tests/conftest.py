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


@pytest.fixture(autouse=True)
def own_precision():
    """`TrainingArguments` of transformers 4 leave `bf16`, `torch_compile` and `fsdp` in the environment, and later ones obey."""
    yield
    for name in ("MIXED_PRECISION", "DYNAMO_BACKEND", "DYNAMO_MODE", "USE_FSDP"):
        os.environ.pop(f"ACCELERATE_{name}", None)
