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

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from diffusers.utils import logging


logger = logging.get_logger(__name__)


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


class LongPrompts:
    """
    One warning for the first prompt that is longer than the text encoder reads. diffusers prints the rest of each text in
    each call, and transformers says that such a text cannot work.

    Attributes:
        warned (`bool`): whether there was such a prompt.
    """

    def __init__(self):
        self.warned = False

    @contextlib.contextmanager
    def announced(self, texts: list[str], pipeline: Any, tokenizer: Any = None) -> Iterator[None]:
        """
        Encode `texts` inside of this context.

        Args:
            texts (`list[str]`): prompts.
            pipeline: the diffusers pipeline that encodes them.
            tokenizer (*optional*): whose limit counts; by default the pipeline's first.
        """
        tokenizer = tokenizer or pipeline.tokenizer or pipeline.tokenizer_2
        limit = tokenizer.model_max_length
        names = (pipeline.encode_prompt.__module__, "transformers.tokenization_utils_base")
        others = [logging.get_logger(name) for name in names]
        for other in others:
            other.addFilter(_is_not_about_length)
        try:
            for text in texts:
                if self.warned or len(text.encode()) < limit:  # a token has at least one byte
                    continue
                num_tokens = len(tokenizer(text).input_ids)
                if num_tokens > limit:
                    logger.warning(
                        f"A prompt has {num_tokens} tokens and the text encoder reads {limit}: the end of it, and of "
                        f"other long prompts, has no effect ({text[:60]!r}...)."
                    )
                    self.warned = True
            yield
        finally:
            for other in others:
                other.removeFilter(_is_not_about_length)


def _is_not_about_length(record) -> bool:
    text = record.getMessage()
    return not text.startswith(("The following part of your input was truncated", "Token indices sequence length"))
