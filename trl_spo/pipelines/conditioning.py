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

"""Text features that a denoiser is conditioned on, one row per prompt ([`PromptEmbeds`]), and a warning about long prompts."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from diffusers.utils import logging


logger = logging.get_logger(__name__)


SEQUENCES = {"prompt_embeds": "prompt_mask", "negative_prompt_embeds": "negative_prompt_mask"}  # and their masks
LENGTHS = ("prompt_lengths", "negative_prompt_lengths")  # numbers of the host, not tensors


@dataclass(frozen=True)
class PromptEmbeds:
    """
    Everything a denoiser is conditioned on, one row per prompt. Fields a model family does not use stay `None`.

    Attributes:
        prompt_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, ...)`): text features.
        negative_prompt_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, ...)`, *optional*): of the negative
            (or empty) prompt. Its sequences may have another length.
        pooled_prompt_embeds, negative_pooled_prompt_embeds (`torch.Tensor` of shape `(batch_size, dim)`, *optional*)
        add_time_ids (`torch.Tensor` of shape `(batch_size, 6)`, *optional*): SDXL's size conditioning.
        prompt_mask, negative_prompt_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): True or 1
            where a sequence has text, False or 0 where it is padded. `None`: no sequence is padded, or the denoiser
            attends to padding as to text.
        prompt_lengths, negative_prompt_lengths (`tuple[int, ...]` of `batch_size`, *optional*): how many tokens of each
            sequence are text, where that is the first ones. A denoiser that takes lists cuts its rows by them: they are
            numbers, as reading a mask on a GPU would wait for it in every call. `None`: the masks say it.
    """

    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None = None
    pooled_prompt_embeds: torch.Tensor | None = None
    negative_pooled_prompt_embeds: torch.Tensor | None = None
    add_time_ids: torch.Tensor | None = None
    prompt_mask: torch.Tensor | None = None
    negative_prompt_mask: torch.Tensor | None = None
    prompt_lengths: tuple[int, ...] | None = None
    negative_prompt_lengths: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    @property
    def nbytes(self) -> int:
        """Memory of all fields; rows that are shared by expansion count each time they occur."""
        values = [getattr(self, name) for name in _tensors()]
        return sum(value.nbytes for value in values if value is not None)

    def _map(self, function, function_of_lengths=lambda lengths: lengths) -> "PromptEmbeds":
        """Apply one function to every tensor, and the other to the lengths, which are numbers."""
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                changed[field.name] = function_of_lengths(value) if field.name in LENGTHS else function(value)
        return replace(self, **changed)

    def __getitem__(self, index) -> "PromptEmbeds":
        """Rows by slice or index tensor. An index on the CPU is sent to the device without waiting for it."""
        if not torch.is_tensor(index):
            return self._map(lambda value: value[index], lambda lengths: lengths[index])
        place = self.prompt_embeds.device
        rows = index.to(place, non_blocking=place.type != "cpu")
        return self._map(lambda value: value[rows], lambda lengths: tuple(torch.tensor(lengths)[index.cpu()].tolist()))

    def to(self, *args, **kwargs) -> "PromptEmbeds":
        """As `torch.Tensor.to`; a dtype is for floating point fields only, masks and indices keep theirs."""
        others = [arg.device if torch.is_tensor(arg) else arg for arg in args if not isinstance(arg, torch.dtype)]
        settings = {name: value for name, value in kwargs.items() if name != "dtype"}

        def move(value: torch.Tensor) -> torch.Tensor:
            if value.is_floating_point():
                return value.to(*args, **kwargs)
            return value.to(*others, **settings) if others or settings else value

        return self._map(move)

    def with_negative_of(self, other: "PromptEmbeds") -> "PromptEmbeds":
        """These prompts with the negative half of another, which has one row and is shared by all prompts."""
        names = [f.name for f in fields(self) if f.name.startswith("negative_")]
        values = {name: getattr(other, name) for name in names}
        for name, value in values.items():
            if name in LENGTHS:
                values[name] = value and value * len(self)
            elif value is not None:
                values[name] = value.expand(len(self), *value.shape[1:])
        return replace(self, **values)

    def repeat(self, repeats: int) -> "PromptEmbeds":
        """All rows, then all rows again: matches `candidates (K, B, ...).flatten(0, 1)`."""
        return self._map(
            lambda value: value.repeat(repeats, *(1,) * (value.ndim - 1)), lambda lengths: lengths * repeats
        )

    def without_negative(self) -> "PromptEmbeds":
        """The same without everything that is of the negative prompt."""
        return replace(self, **{field.name: None for field in fields(self) if field.name.startswith("negative_")})

    def repeat_interleave(self, repeats: int) -> "PromptEmbeds":
        return self._map(
            lambda value: value.repeat_interleave(repeats, dim=0),
            lambda lengths: tuple(length for length in lengths for _ in range(repeats)),
        )

    @classmethod
    def cat(cls, parts: list["PromptEmbeds"]) -> "PromptEmbeds":
        """
        All rows of all parts. Sequences of different lengths are padded with zeros at the end, and a mask says so, also
        where the parts had none: what a prompt means does not depend on the length of its neighbours.

        Raises:
            ValueError: if some parts have a field, such as the negative prompt, that others do not have.
        """
        # Collect each field from all parts, and bring sequences and masks to one length.
        values = {}
        for name in _tensors():
            values[name] = [getattr(part, name) for part in parts]
        for sequences, masks in SEQUENCES.items():
            if values[sequences][0] is not None:
                values[sequences], values[masks] = _pad(values[sequences], values[masks])

        # Join the fields that all parts have; one that only some have is an error.
        joined = {}
        for name, tensors in values.items():
            present = [tensor for tensor in tensors if tensor is not None]
            if 0 < len(present) < len(tensors):
                raise ValueError(f"Prompt embeddings can only be joined if all of them have `{name}`, or none has it.")
            if present:
                joined[name] = torch.cat(present)
        for name in LENGTHS:
            lengths = [getattr(part, name) for part in parts]
            if None not in lengths:
                joined[name] = sum(lengths, ())
        return cls(**joined)


def _tensors() -> list[str]:
    """Names of the fields that are tensors, or `None`."""
    return [field.name for field in fields(PromptEmbeds) if field.name not in LENGTHS]


def _pad(sequences: list[torch.Tensor], masks: list[torch.Tensor | None]) -> tuple[list, list]:
    """Sequences `(B_i, L_i, ...)` and their masks `(B_i, L_i)`, at the length of the longest."""
    if any(value is None for value in sequences):
        return sequences, masks
    length = max(value.shape[1] for value in sequences)
    ragged = any(value.shape[1] < length for value in sequences)
    if not ragged and all(mask is None for mask in masks):
        return sequences, masks

    padded_sequences = []
    padded_masks = []
    dtype = next((mask.dtype for mask in masks if mask is not None), torch.bool)
    for value, mask in zip(sequences, masks, strict=True):
        if mask is None:
            mask = torch.ones(value.shape[:2], dtype=dtype, device=value.device)
        missing = length - value.shape[1]
        padding = value.new_zeros(len(value), missing, *value.shape[2:])
        padded_sequences.append(torch.cat([value, padding], dim=1))
        padded_masks.append(torch.cat([mask, mask.new_zeros(len(mask), missing)], dim=1))
    return padded_sequences, padded_masks


class LongPrompts:
    """
    Warns once that long prompts are cut, and silences diffusers' and transformers' own messages about it, one per call.

    Attributes:
        warned (`bool`): whether there was such a prompt.
    """

    def __init__(self):
        self.warned = False

    @contextlib.contextmanager
    def announced(
        self, texts: list[str], pipeline: Any, tokenizer: Any = None, limit: int | None = None
    ) -> Iterator[None]:
        """
        A context in which to encode `texts`. It warns of the first one that is too long.

        Args:
            texts (`list[str]`): prompts.
            pipeline: the diffusers pipeline that encodes them.
            tokenizer (*optional*): the tokenizer whose limit counts; by default the pipeline's first.
            limit (`int`, *optional*): number of tokens that the text encoder reads; by default the tokenizer's limit.
        """
        # Silence the messages of diffusers and transformers, one per call.
        tokenizer = tokenizer or pipeline.tokenizer or pipeline.tokenizer_2
        limit = limit or tokenizer.model_max_length
        names = (pipeline.encode_prompt.__module__, "transformers.tokenization_utils_base")
        others = [logging.get_logger(name) for name in names]
        for other in others:
            other.addFilter(_is_not_about_length)

        # Warn of the first prompt that is too long; later ones do not even have to be tokenized.
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
