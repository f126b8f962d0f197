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

"""Collect the metrics of SPO's rollouts and of its loss, under TRL's names: [`PairMetrics`]."""

import math
from typing import Any

import torch

from ..losses import SPOLossOutput
from ..step_pairs import StepPairs
from .running_means import RunningMeans


TIMESTEP_BIN = 200  # width of the timestep ranges in `pairs/valid_fraction_t_{lo}_{hi}`
ROLLOUT_NAMES = ("step_reward/", "pairs/valid", "reward_")  # how the metrics of a rollout begin


class PairMetrics(RunningMeans):
    """[`RunningMeans`] with the metrics of a rollout and of a loss. Logs without a rollout repeat those of the last one."""

    def __init__(self):
        super().__init__()
        self.largest_gap = 0.0
        """The largest difference of two scores of one prompt and step, in this process."""
        self._last_rollout: dict[str, float] = {}

    def add_rollout(self, pairs: StepPairs) -> None:
        """Scores, the share of prompts that gave a pair, and the rewards of finished images."""
        self.add("pairs/nonfinite", len(pairs.nonfinite), reduce="sum")
        for branch in pairs.branches:
            scores = branch.scores
            valid = branch.selection.valid
            # In float32 the difference of two finite scores may be infinite.
            margin = scores.double().max(0).values - scores.double().min(0).values
            self.largest_gap = max(self.largest_gap, margin.nan_to_num(0.0, 0.0, 0.0).max().item())
            low = branch.timestep // TIMESTEP_BIN * TIMESTEP_BIN
            self.add("step_reward/mean", scores.mean(0))
            self.add("step_reward/std", scores.double().std(0))
            self.add("step_reward/margin", margin)
            for name, values in branch.parts.items():
                self.add(f"step_reward/{name}/mean", values.mean(0))
                self.add(f"step_reward/{name}/std", values.double().std(0))
            self.add("pairs/valid_fraction", valid.float())
            self.add(f"pairs/valid_fraction_t_{low}_{low + TIMESTEP_BIN - 1}", valid.float())
        if pairs.final_scores is not None:
            self.add("reward_mean", pairs.final_scores)
            # In float64: the standard deviation is a difference of squares, which are much larger than it.
            self.add("reward_square", pairs.final_scores.double() ** 2)
        for name, values in pairs.final_parts.items():
            self.add(f"reward_mean/{name}", values)

    @torch.no_grad()
    def add_loss(
        self,
        output: SPOLossOutput,
        losses: torch.Tensor,
        kl: torch.Tensor,
        policy_logps: tuple[torch.Tensor, torch.Tensor],
        log_ratios: tuple[torch.Tensor, torch.Tensor],
        beta: float,
        epsilon: float,
        is_fresh: torch.Tensor | None = None,
    ) -> None:
        """
        Losses and log-probabilities of a micro-batch of pairs. All tensors have shape `(B,)`.

        Args:
            output ([`SPOLossOutput`]): of [`spo_loss`].
            losses (`torch.Tensor`): with the penalty on the KL divergence.
            kl (`torch.Tensor`): divergence from the reference.
            policy_logps (`tuple` of `torch.Tensor`): log-probabilities of the chosen and the rejected transitions.
            log_ratios (`tuple` of `torch.Tensor`): their log-ratios as the loss saw them, weighted by timestep.
            beta (`float`), epsilon (`float`): of the loss.
            is_fresh (`torch.Tensor`, *optional*): which pairs are trained on for the first time; by default all.
        """
        chosen, rejected = log_ratios
        ratios = torch.cat(log_ratios)
        clipped = (ratios < math.log1p(-epsilon)) | (ratios > math.log1p(epsilon))
        self.add("loss", losses)  # logged instead of the Trainer's own, of which transformers 4 keeps four digits
        self.add("rewards/chosen", beta * chosen)
        self.add("rewards/rejected", beta * rejected)
        self.add("rewards/margins", beta * (chosen - rejected))
        self.add("rewards/accuracies", (chosen > rejected).float())
        # The policy's order of pairs that it was not trained on yet; a draw counts one half.
        in_order = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
        self.add("pairs/fresh_accuracy", in_order, is_fresh)
        self.add("logps/chosen", policy_logps[0])
        self.add("logps/rejected", policy_logps[1])
        self.add("ratio/chosen", output.chosen_ratio)
        self.add("ratio/rejected", output.rejected_ratio)
        self.add("clip_ratio", clipped.float())
        self.add("kl", kl)
        self.add("approx_kl", 0.5 * ratios**2)

    def pop_logs(self) -> dict[str, float]:
        """Metrics since the last log, over all processes. Every process must call it."""
        logs = self.pop()
        if "reward_square" in logs:
            logs["reward_std"] = math.sqrt(max(logs.pop("reward_square") - logs["reward_mean"] ** 2, 0.0))

        # One rollout feeds several steps: a log without a rollout of its own repeats the metrics of the last one.
        self._last_rollout.update({name: value for name, value in logs.items() if name.startswith(ROLLOUT_NAMES)})
        logs = {**self._last_rollout, **logs}
        for name in ("time/rollout", "pairs/nonfinite", "skipped_steps"):
            logs.setdefault(name, 0)
        return logs

    def why_no_pairs(self, threshold: float | list[float]) -> str:
        """What kept candidates from forming pairs, and what to change."""
        if self.largest_gap == 0:
            return (
                "All candidates of a prompt got the same score: the reward does not tell images of one prompt apart. "
                "Check what it returns for two different images."
            )
        return (
            f"The largest difference of two scores was {self.largest_gap:.3g}, p_chosen - p_rejected = "
            f"{math.tanh(self.largest_gap / 2):.3g}; none exceeds `preference_threshold={threshold}`. Lower the "
            "threshold, raise the scale of the reward, or branch at other steps."
        )

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def checkpoint(self) -> dict[str, Any]:
        """What was not logged yet, in this process, and the metrics of the last rollout, ready for JSON."""
        return {"metrics": self.state_dict(), "last_rollout_metrics": self._last_rollout}

    def restore(self, processes: list[dict] | dict, last_rollout: dict[str, float], rank: int, world: int) -> None:
        """
        Continue from a checkpoint.

        Args:
            processes (`list[dict]`): sums of each process that wrote it. A checkpoint of an old version has one `dict`.
            last_rollout (`dict[str, float]`): metrics of the last rollout.
            rank (`int`), world (`int`): of this process. Where there are fewer than wrote it, it takes several shares.
        """
        if isinstance(processes, dict):
            processes = [processes]
        self.load_state_dict(*map(_with_reductions, processes[rank::world]))
        self._last_rollout = last_rollout


def _with_reductions(metrics: dict[str, list]) -> dict[str, list]:
    """Metrics of a checkpoint as [`RunningMeans`] takes them; those of old versions do not say how they are reduced."""

    def reduction(name: str) -> str:
        if name in ("pairs/nonfinite", "skipped_steps"):
            return "sum"
        return "per_process" if name.startswith("time/") else "mean"

    complete = {}
    for name, (total, weight, *known) in metrics.items():
        complete[name] = [total, weight, *(known or [reduction(name)])]
    return complete
