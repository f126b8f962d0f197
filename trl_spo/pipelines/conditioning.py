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

"""What a denoiser is conditioned on: text features, one row per prompt."""

from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True)
class PromptEmbeds:
    """
    Everything a denoiser is conditioned on, one row per prompt. Fields a model family does not use stay `None`.

    Attributes:
        prompt_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, dim)`): text features.
        negative_prompt_embeds (`torch.Tensor` of the same shape, *optional*): of the negative (or empty) prompt.
        pooled_prompt_embeds, negative_pooled_prompt_embeds (`torch.Tensor` of shape `(batch_size, dim)`, *optional*)
        add_time_ids (`torch.Tensor` of shape `(batch_size, 6)`, *optional*): SDXL's size conditioning.
    """

    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None = None
    pooled_prompt_embeds: torch.Tensor | None = None
    negative_pooled_prompt_embeds: torch.Tensor | None = None
    add_time_ids: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def _map(self, function) -> "PromptEmbeds":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if value is not None})

    def __getitem__(self, index) -> "PromptEmbeds":
        """Rows by slice or index tensor."""
        return self._map(lambda value: value[index.to(value.device) if torch.is_tensor(index) else index])

    def to(self, *args, **kwargs) -> "PromptEmbeds":
        return self._map(lambda value: value.to(*args, **kwargs))

    def repeat(self, repeats: int) -> "PromptEmbeds":
        """All rows, then all rows again: matches `candidates (K, B, ...).flatten(0, 1)`."""
        return self._map(lambda value: value.repeat(repeats, *(1,) * (value.ndim - 1)))

    def repeat_interleave(self, repeats: int) -> "PromptEmbeds":
        return self._map(lambda value: value.repeat_interleave(repeats, dim=0))

    @classmethod
    def cat(cls, parts: list["PromptEmbeds"]) -> "PromptEmbeds":
        names = [f.name for f in fields(cls) if getattr(parts[0], f.name) is not None]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
