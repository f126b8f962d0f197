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

"""Running means of metrics between two logs."""

import torch


class RunningAverages:
    """Averages of named values over steps and processes. Stays on the device until it is read."""

    def __init__(self, names: list[str], accelerator):
        self.names = names
        self.accelerator = accelerator
        self.reset()

    def reset(self):
        self.sums = torch.zeros(len(self.names), 2, device=self.accelerator.device)

    def add(self, name: str, values: torch.Tensor, mask: torch.Tensor | None = None):
        values = values.detach().float().flatten()
        mask = torch.ones_like(values) if mask is None else mask.to(values).flatten()
        mask = mask * values.isfinite()
        self.sums[self.names.index(name)] += torch.stack(
            [(torch.where(mask > 0, values, 0.0) * mask).sum(), mask.sum()]
        )

    def pop(self) -> dict[str, float]:
        """The averages since the last call; names without a value are left out. Every process must call it."""
        sums = self.accelerator.reduce(self.sums, "sum").tolist()
        self.reset()
        return {name: total / count for name, (total, count) in zip(self.names, sums, strict=True) if count > 0}
