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

"""
Handle numbers that are not finite, in the same way in both trainers.

- A pair with a NaN or an infinity is left out, counted, and named with its timestep and prompt.
- An optimizer step whose gradients are not finite changes nothing: no weight, no moment of the optimizer.
- When such pairs are more than a share of all, or steps are skipped one after the other, training stops and says what
  it saw.

Nothing is read from the device for this but one small tensor per optimizer step.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)

MIN_PAIRS_TO_JUDGE_NONFINITE = 1000
MAX_SKIPPED_STEPS = 20  # one after the other; a gradient scaler needs a few at the start, while its scale comes down
NUM_NAMED = 3  # in one message


def is_finite(values: torch.Tensor) -> torch.Tensor:
    """Whether all numbers of a row are finite: `(N, ...)` -> `(N,)` bool."""
    return values.isfinite().flatten(1).all(1)


class NonFiniteGuard:
    r"""
    Counts what is not finite in a run, names it in warnings, and stops the run when it is too much.

    Args:
        max_fraction (`float`):
            Largest tolerable share of pairs that are not finite. The first thousand pairs are judged together.
        hint (`str`, *optional*):
            What to check, for the messages.

    Attributes:
        num_seen, num_nonfinite, num_skipped_steps (`int`): since the start of this process.
    """

    def __init__(self, max_fraction: float, hint: str = ""):
        self.max_fraction = max_fraction
        self.hint = hint
        self.num_seen = self.num_nonfinite = self.num_skipped_steps = self.num_skipped_in_a_row = 0
        self._watched: list[tuple[str, torch.Tensor, torch.Tensor, Sequence[str]]] = []
        self._num_watched = 0

    def record(self, num_seen: int, found: Sequence[str]):
        """
        Account for `num_seen` pairs, of which those named in `found` are not finite.

        Raises:
            ValueError: if there were too many.
        """
        self.num_seen += num_seen
        self.num_nonfinite += len(found)
        if not found:
            return
        named = "; ".join(found[:NUM_NAMED]) + (f"; and {len(found) - NUM_NAMED} more" * (len(found) > NUM_NAMED))
        logger.warning(f"Left out {len(found)} of {num_seen} pairs, not finite: {named}.")
        limit = self.max_fraction * max(self.num_seen, MIN_PAIRS_TO_JUDGE_NONFINITE)
        if self.num_nonfinite > limit:
            raise ValueError(
                f"{self.num_nonfinite} of {self.num_seen} pairs were not finite, more than `max_nonfinite_fraction="
                f"{self.max_fraction}` allows (the first {MIN_PAIRS_TO_JUDGE_NONFINITE} are judged together). The last: "
                f"{named}. {self.hint}"
            )

    def watch(
        self, what: str, finite: torch.Tensor, timesteps: torch.Tensor, prompts: Sequence[str], again: bool = False
    ):
        """
        Queue the mask of finite pairs of a micro-batch. No value is copied to the host here: `check_step` reads the masks
        of all micro-batches at once.

        Args:
            what (`str`): what was computed of them, for the message.
            finite (`torch.Tensor` of shape `(batch_size,)`, bool): on any device.
            timesteps (`torch.Tensor` of shape `(batch_size,)`): t of the pairs.
            prompts (list of `str`): of the pairs.
            again (`bool`, *optional*, defaults to `False`): the same pairs as before, which count once.
        """
        self._watched.append((what, finite.detach(), timesteps, prompts))
        self._num_watched += 0 if again else len(finite)

    def check_step(
        self,
        step: int,
        parameters: Iterable[torch.nn.Parameter],
        over_processes: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[int, bool]:
        """
        Look at the micro-batches and the gradients of an optimizer step.

        Args:
            step (`int`): the number of the step, for the messages.
            parameters (iterable of `torch.nn.Parameter`): those with the gradients.
            over_processes (callable, *optional*): sums a tensor over processes that hold a shard of each gradient. All
                of them must skip a step if one does.

        Returns:
            The number of pairs that were not finite, and whether all gradients are.

        Raises:
            ValueError: if there were too many of either.
        """
        # Gradients of this process. The largest entry is NaN or infinite if any entry is.
        parameters = list(parameters)
        gradients = _local_gradients(parameters)
        broken = None
        if gradients:
            broken = ~get_total_norm(gradients, norm_type=float("inf")).isfinite()
        if over_processes is not None:  # a process may have no shard, and must be there all the same
            here = torch.zeros((), device=parameters[0].device) if broken is None else broken.float()
            broken = over_processes(here) > 0

        # One flag per micro-batch, and one of the gradients. The host waits for the device once, here.
        finite = [mask.all() for _, mask, _, _ in self._watched]
        if broken is not None:
            finite.append(~broken)
        flags = torch.stack([flag.to(finite[-1].device) for flag in finite]).tolist() if finite else []
        watched = self._watched
        num_watched = self._num_watched
        self._watched = []
        self._num_watched = 0
        gradients_finite = bool(flags[len(watched)]) if broken is not None else True

        # Only micro-batches with a broken pair are read, to name it.
        found = []
        for (what, mask, timesteps, prompts), good in zip(watched, flags, strict=False):
            rows = [] if good else (~mask).nonzero().flatten().tolist()
            found += [f"{what} at timestep {int(timesteps[row])}, prompt {prompts[row]!r}" for row in rows]

        # Count, and stop a run that learns nothing.
        if not gradients_finite:
            self.num_skipped_steps += 1
            self.num_skipped_in_a_row += 1
            logger.warning(f"Skipped optimizer step {step}: its gradients are not finite.")
        else:
            self.num_skipped_in_a_row = 0
        self.record(num_watched, found)
        if self.num_skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise ValueError(
                f"The gradients of {MAX_SKIPPED_STEPS} optimizer steps in a row, up to step {step}, were not finite. "
                f"Nothing is learnt like this. Lower the learning rate, or train in bfloat16 or float32. {self.hint}"
            )
        return len(found), gradients_finite


def _local_gradients(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The gradients, or what this process has of them: FSDP 2 gives each process a shard, which may be empty."""
    local = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if hasattr(gradient, "to_local"):
            gradient = gradient.to_local()
        if gradient.numel():
            local.append(gradient)
    return local


class SkipNonFiniteSteps(TrainerCallback):
    r"""
    Looks at the pairs and gradients of each optimizer step before it is taken. Without gradients an optimizer leaves
    weights and moments alone, so a step is skipped by taking them away. Where a gradient scaler (fp16) or DeepSpeed
    holds the gradients, skipping is theirs, and this only counts.

    Args:
        trainer (`transformers.Trainer`):
            With the attributes `guard` ([`NonFiniteGuard`]) and `record_step(num_nonfinite, skipped)`.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        parameters = list(model.parameters())
        over_processes = self.trainer.accelerator.reduce if self.trainer.is_fsdp_enabled else None  # by default a sum
        num_nonfinite, finite = self.trainer.guard.check_step(state.global_step + 1, parameters, over_processes)
        if not finite and self.trainer.accelerator.scaler is None:
            for parameter in parameters:
                parameter.grad = None
        self.trainer.record_step(num_nonfinite, not finite)
