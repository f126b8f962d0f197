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

"""The check-ups of all commands, by name."""

from .circumstances import Circumstances
from .sampling import check_evaluate, check_sample
from .spo import check_spo
from .step_reward import check_step_reward


__all__ = ["CHECKS", "Circumstances"]

CHECKS = {  # command -> its check-up, which takes what the script's `main` takes, and the circumstances
    "spo": check_spo,
    "step-reward": check_step_reward,
    "evaluate": check_evaluate,
    "sample": check_sample,
}
