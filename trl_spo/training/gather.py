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

"""Gather rows of tensors from all processes, so that gradients flow back to the process they came from."""

import torch
import torch.distributed as dist

from .running_means import gather_from_processes


def gather_rows(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """
    The rows that all processes have, in the order of their ranks. Every process must call it, and call backward on what
    it makes of them, if any does.

    Args:
        rows (`torch.Tensor` of shape `(B, ...)`): of this process. B may differ between processes.

    Returns:
        `tuple` of a `torch.Tensor` of shape `(sum of B, ...)`, and the position of this process's first row in it.
    """
    counts = gather_from_processes(len(rows))
    rank = dist.get_rank() if len(counts) > 1 else 0
    if len(counts) == 1:
        return rows, 0
    return _GatherRows.apply(rows, counts, rank), sum(counts[:rank])


class _GatherRows(torch.autograd.Function):
    """All-gather of padded rows; backwards, the sum over processes of what each says about every row."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, counts: list[int], rank: int) -> torch.Tensor:
        ctx.counts = counts
        ctx.rank = rank
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.split(ctx.counts)[ctx.rank], None, None
