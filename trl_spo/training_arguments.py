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

"""What both configs have in common: `transformers.TrainingArguments` that tell nobody the Hub token."""

import copy

from transformers import TrainingArguments


class StepTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] whose pickle, `training_args.bin` beside every saved model, has no token."""

    def __getstate__(self) -> dict:
        """The Trainer pickles its arguments beside the model and uploads the file: a pickle must not hold the token."""
        return {**self.__dict__, "hub_token": None}

    def __copy__(self):  # copies in memory keep it
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo):
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied
