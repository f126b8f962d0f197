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

"""The train dataloader of SPO: prompts to pairs, and pairs to even micro-batches."""

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from .step_pairs import StepPairs


logger = logging.get_logger(__name__)

PAIRS_NAME = "spo_pairs.safetensors"
STATE_NAME = "spo_state.json"


class PairLoader:
    """
    The train dataloader: rolls out prompts whenever fewer pairs are waiting than an optimizer step needs, pools the
    pairs of all processes, and deals them out evenly.

    Every process holds the same pool and takes its own slice, so an optimizer step sees the same number of pairs
    everywhere, and a process whose prompts gave no pair waits for nobody. What a step does not use stays in the pool,
    across epochs and, through `save` and `load`, across checkpoints. Prompt order and rollout noise are functions of the seed
    and the position in the prompts, so the position is all the random state there is.
    """

    def __init__(self, trainer, prompts: Sequence[str]):
        self.trainer = trainer
        self.prompts = prompts
        self._order: tuple[int, torch.Tensor] | None = None  # of the epoch it was drawn for
        self.dataset = prompts  # the name under which `Trainer` asks for the number of examples
        self.num_prompts_seen = 0
        self.num_pairs_seen = 0
        self.pool: StepPairs | None = None

    # --- sizes -------------------------------------------------------------------------------------------------------

    @property
    def pairs_per_step(self) -> int:
        """Pairs of one optimizer step, over all processes."""
        args = self.trainer.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

    @property
    def total_prompts(self) -> float:
        """Prompts of the whole run."""
        args = self.trainer.args
        return math.inf if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(self.prompts))

    def __len__(self) -> int:
        """
        Most micro-batches of an epoch: as if every pair were valid, after an epoch that left as many pairs as it can.
        Fewer are the rule.
        """
        args = self.trainer.args
        end = args.num_inference_steps if args.branch_end_step is None else args.branch_end_step
        per_prompt = end - args.branch_start_step
        if args.num_branches is not None:
            per_prompt = min(per_prompt, args.num_branches * args.num_inner_steps)
        pairs = len(self.prompts) * per_prompt
        left = self.pairs_per_step - 1 if self.total_prompts > len(self.prompts) else 0
        return math.ceil((pairs + left) / self.pairs_per_step) * args.gradient_accumulation_steps

    @property
    def waiting(self) -> int:
        return 0 if self.pool is None else len(self.pool)

    @property
    def epoch(self) -> float:
        return self.num_prompts_seen / len(self.prompts)

    @property
    def epoch_finished(self) -> bool:
        """All prompts of the epoch were rolled out, another one follows, and the pool's rest waits for it."""
        more = self.num_prompts_seen < self.total_prompts
        return more and self.num_prompts_seen % len(self.prompts) == 0 and self.waiting < self.pairs_per_step

    @property
    def exhausted(self) -> bool:
        """There is nothing left to train on."""
        args = self.trainer.args
        smallest = args.gradient_accumulation_steps * args.world_size
        return self.num_prompts_seen >= self.total_prompts and self.waiting < smallest

    # --- iteration ---------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[dict]:
        while (micro_batches := self._next_step()) is not None:
            yield from micro_batches

    def _next_step(self) -> list[dict] | None:
        """This process's micro-batches of one optimizer step, or `None` at the end of training."""
        args = self.trainer.args
        unfruitful = 0
        while self.waiting < self.pairs_per_step and self.num_prompts_seen < self.total_prompts:
            seen, waiting = self.num_prompts_seen, self.waiting
            self._rollout_round()
            unfruitful = 0 if self.waiting > waiting else unfruitful + self.num_prompts_seen - seen
            finished = self.num_prompts_seen >= self.total_prompts and self.num_pairs_seen == 0
            if unfruitful >= max(len(self.prompts), 100) or (unfruitful and finished and not self.waiting):
                raise RuntimeError(f"No valid pair in {unfruitful} prompts. {self.trainer.why_no_pairs()}")
            if unfruitful and seen == 0:
                logger.warning(f"The first {unfruitful} prompts gave no valid pair. {self.trainer.why_no_pairs()}")
        accumulation, world = args.gradient_accumulation_steps, args.world_size
        total = min(self.waiting, self.pairs_per_step)
        total -= total % world
        if total < accumulation * world:
            return None
        step, self.pool = self.pool[:total], self.pool[total:]
        self.num_pairs_seen += total
        own = step[args.process_index * (total // world) : (args.process_index + 1) * (total // world)]
        parts = [own[index] for index in torch.tensor_split(torch.arange(len(own)), accumulation)]
        if args.device.type == "cuda":
            parts = [part.pin_memory() for part in parts]
        return [{"pairs": part, "num_pairs": len(own), "num_micro_batches": accumulation} for part in parts]

    def _gather(self, parts: list[StepPairs]) -> list[StepPairs]:
        """The parts of all processes. This is where one that has finished its rollout waits for the others."""
        args = self.trainer.args
        try:
            return gather_object(parts)
        except RuntimeError as error:  # of gloo; with NCCL its watchdog ends the process and says so
            raise RuntimeError(
                f"Rank {args.process_index} waited for the rollouts of the other ranks and got none: a rank has died, and "
                f"its own error is the cause, or was silent for `ddp_timeout={args.ddp_timeout}` seconds ({error}). If a "
                "rollout may take that long, raise `ddp_timeout`."
            ) from error

    def _rollout_round(self):
        """One rollout per process, on prompts that no other process has; its pairs go to the pool of all."""
        args, start = self.trainer.args, self.num_prompts_seen
        epoch, position = divmod(start, len(self.prompts))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(args.seed + epoch)
            self._order = (epoch, torch.randperm(len(self.prompts), generator=generator))
        size = args.per_device_rollout_batch_size * args.world_size
        size = int(min(size, len(self.prompts) - position, self.total_prompts - start))
        indices = self._order[1][position : position + size].tolist()
        own = indices[args.process_index :: args.world_size]
        parts = []
        if own:  # `cat` leaves the record of the rollout behind; objects of another device would not come back here
            parts = [StepPairs.cat([self.trainer.rollout([self.prompts[i] for i in own], seed=start)]).to("cpu")]
        # Pairs are few and small beside the rollout that made them: move them as objects, of any number per process.
        parts = self._gather(parts) if args.world_size > 1 else parts
        fresh = StepPairs.cat(parts)
        shuffle = torch.Generator().manual_seed(args.seed + 1 + start)
        fresh = fresh[torch.randperm(len(fresh), generator=shuffle)]
        self.pool = fresh if self.pool is None else StepPairs.cat([self.pool, fresh])
        self.num_prompts_seen += size

    # --- checkpoints -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _prompts_hash(self) -> str:
        digest = hashlib.sha256()
        for i, prompt in enumerate(self.prompts):
            digest.update(("\0" * (i > 0) + prompt).encode())
        return digest.hexdigest()

    def save(self, directory: str | Path, metrics: list[dict[str, list]]):
        """
        Write the position in the prompts, the pairs that were not trained on yet, and the metrics that no process has
        logged yet.
        """
        directory = Path(directory)
        tensors = {} if self.pool is None else {k: v.contiguous() for k, v in self.pool.tensors().items()}
        save_file({name: value.clone() for name, value in tensors.items()}, directory / PAIRS_NAME)
        state = {
            "num_prompts": len(self.prompts),
            "prompts_hash": self._prompts_hash,
            "num_prompts_seen": self.num_prompts_seen,
            "num_pairs_seen": self.num_pairs_seen,
            "pool_prompts": [] if self.pool is None else self.pool.prompts,
            "metrics": metrics,
            "last_rollout_metrics": self.trainer._last_rollout_metrics,
        }
        (directory / STATE_NAME).write_text(json.dumps(state))

    def load(self, directory: str | Path):
        """
        Raises:
            ValueError: if the files belong to another prompt dataset.
        """
        directory = Path(directory)
        state = json.loads((directory / STATE_NAME).read_text())
        if state["num_prompts"] != len(self.prompts) or state["prompts_hash"] != self._prompts_hash:
            raise ValueError(
                f"The checkpoint was written with {state['num_prompts']} other prompts than the {len(self.prompts)} of "
                "this run. Resume with the same `train_dataset`."
            )
        self.num_prompts_seen, self.num_pairs_seen = state["num_prompts_seen"], state["num_pairs_seen"]
        tensors = load_file(directory / PAIRS_NAME)
        self.pool = StepPairs(**tensors, prompts=state["pool_prompts"]) if tensors else None
        self.trainer._load_metrics(state["metrics"], state["last_rollout_metrics"])
