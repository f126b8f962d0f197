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

"""How the processes of a run share their pairs: descriptions as objects, what has to travel as rows of bytes."""

import torch
import torch.distributed as dist
from accelerate.utils import gather_object


class PairExchange:
    """
    The [`Processes`] of a [`PairQueue`], by torch.distributed. Here one that has finished its rollout waits for the others.

    Args:
        device (`torch.device`): of this process.
        timeout (`int`): seconds after which processes give each other up, for the message.

    Both methods raise a `RuntimeError` that says what to look for when another process has died or is silent for too long.
    """

    def __init__(self, device: torch.device, timeout: int):
        self.device = device
        self.timeout = timeout

    def gather(self, own) -> list:
        """What every process has, in the order of their ranks."""
        try:
            return gather_object([own])
        except RuntimeError as error:  # of gloo; with NCCL its watchdog ends the process and says so
            raise self._alone(error) from error

    def exchange(self, rows: torch.Tensor, num_sent: list[int], num_received: list[int]) -> torch.Tensor:
        """Rows of bytes, by who gets them, for rows by who sent them; see [`Processes`]. They arrive where they are sent from."""
        # Gloo sends from the CPU; the libraries of accelerators send from the device alone.
        place = "cpu" if dist.get_backend() == dist.Backend.GLOO else self.device
        rows = rows.to(place).contiguous()
        received = rows.new_empty(sum(num_received), rows.shape[1])
        try:
            dist.all_to_all_single(received, rows, num_received, num_sent)
        except RuntimeError as error:
            raise self._alone(error) from error
        return received

    def _alone(self, error: RuntimeError) -> RuntimeError:
        return RuntimeError(
            f"Rank {dist.get_rank()} waited for the rollouts of the other ranks and got none: a rank has died, and its own error "
            f"is the cause, or was silent for `ddp_timeout={self.timeout}` seconds ({error}). If a rollout may take that long, "
            "raise `ddp_timeout`."
        )
