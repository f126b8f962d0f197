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
The rollout of SPO: at each denoising step draw K candidates from one latent, let the reward model find the chosen and the
rejected one, and go on from one candidate (https://huggingface.co/papers/2406.04314, algorithm 1).

[`stepwise_rollout`] has four phases: plan where to branch, sample, score, pair.

Differences from the public implementation:

- one algorithm for every `num_inner_steps`: a branch may run several steps before it is scored (the paper's multi-step
  variant), and a group that the last step cuts short is shorter, not skipped;
- the random continuation is drawn from the same generator as the noise, so a seed repeats a rollout;
- the denoiser, the decoder and the reward model see chunks of bounded size whatever K and the batch are;
- prompts are encoded once for the reward model, not once per image;
- a reward that judges the noisy candidates themselves gets them: then no x_0 is predicted and nothing is decoded, and the
  denoiser runs once per step (the loop of LPO, https://huggingface.co/papers/2502.01051);
- the random continuation does not depend on scores, so the candidates of all steps can be scored together at the end,
  and the host then waits for the device once per rollout;
- a pair with a NaN or an infinity in its latents, decoded images or scores is reported, counted and never trained on.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .branch_plan import BranchPlan, plan_branches, thresholds_by_step
from .pair_selection import (
    PairSelection,
    draw_two_candidates,
    gather_candidates,
    random_index,
    resample_index,
    select_pairs,
    select_random_pairs,
)
from .pipelines.base import SPOPipeline
from .pipelines.conditioning import PromptEmbeds
from .rewards.base import Reward, wrap_reward
from .rewards.scoring import CandidateScores, Scorer, even_slices
from .rollout_settings import RolloutSettings
from .step_distribution import sample_candidates
from .step_pairs import BranchRecord, NonFinite, StepPairs
from .training.numerics import is_finite


# --- sample ----------------------------------------------------------------------------------------------------------


@dataclass
class Branch:
    """
    A branch that was drawn and waits for its scores. K candidates, B prompts.

    Attributes:
        step (`int`): index of its first step in the schedule.
        timesteps (`list[int]`): t of its steps.
        scored_timestep (`int`): timestep at which its candidates are scored.
        threshold (`float`): preference threshold of its first step, where the candidates diverge.
        trajectory (`list[torch.Tensor]`): latents `(K, B, ...)` before each transition and after the last.
        judged (`torch.Tensor` of shape `(K, B, ...)`): what the reward sees, as latents: x_0 predictions or candidates.
        pred_original_samples (`torch.Tensor` of shape `(K, B, ...)`, *optional*): x_0 predictions, if they were made.
        pair_candidates (`torch.Tensor`, *optional*): the two candidates of `pair="random"`.
        ends_rollout (`bool`): whether its candidates are finished images.
        next_index (`torch.Tensor` of shape `(B,)`, *optional*): the candidate that went on.
        judged_as ([`CandidateScores`], *optional*): NaN where something is not finite.
    """

    step: int
    timesteps: list[int]
    scored_timestep: int
    threshold: float
    trajectory: list[torch.Tensor]
    judged: torch.Tensor
    pred_original_samples: torch.Tensor | None
    pair_candidates: torch.Tensor | None
    ends_rollout: bool
    next_index: torch.Tensor | None = None
    judged_as: CandidateScores | None = None

    @property
    def scores(self) -> torch.Tensor:
        """What the pairs are selected by, `(K, B)`."""
        return self.judged_as.selection

    @property
    def candidates(self) -> torch.Tensor:
        """What the branch ends with, `(K, B, ...)`."""
        return self.trajectory[-1]

    def first_prompts(self, count: int) -> "Branch":
        """The branch of the first `count` prompts."""

        def rows(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values[:, :count]

        return replace(
            self,
            trajectory=[rows(latents) for latents in self.trajectory],
            judged=rows(self.judged),
            pred_original_samples=rows(self.pred_original_samples),
            pair_candidates=rows(self.pair_candidates),
            next_index=None if self.next_index is None else self.next_index[:count],
        )

    def select(self) -> PairSelection:
        if self.pair_candidates is None:
            selection = select_pairs(self.scores, self.threshold)
        else:
            selection = select_random_pairs(self.scores, self.threshold, candidates=self.pair_candidates)
        return selection._replace(valid=selection.valid & self.scores.isfinite().all(0))


class Sampler:
    """
    Runs the denoiser and draws steps for one rollout, in chunks of bounded size.

    Args:
        pipeline ([`SPOPipeline`]): the pipeline that samples.
        embeds ([`PromptEmbeds`]): embeddings of the B prompts.
        settings ([`RolloutSettings`]): settings of the rollout.
        generator (`torch.Generator`, *optional*): source of all noise.
        judges_candidates (`bool`): whether the reward judges the candidates themselves; then no x_0 is predicted for it.
        keeps_predictions (`bool`): predict x_0 of every candidate even so, for pictures.
    """

    def __init__(
        self,
        pipeline: SPOPipeline,
        embeds: PromptEmbeds,
        settings: RolloutSettings,
        generator: torch.Generator | None,
        judges_candidates: bool = False,
        keeps_predictions: bool = False,
    ):
        self.pipeline = pipeline
        self.generator = generator
        self.judges_candidates = judges_candidates
        self.predicts_candidates = keeps_predictions or not judges_candidates
        latent_shape = pipeline.latent_shape(settings.height, settings.width)
        self.timesteps = pipeline.set_timesteps(settings.num_inference_steps, latent_shape)
        self.settings = settings.resolve(pipeline.step_rule, self.timesteps)
        self.thresholds = thresholds_by_step(pipeline, settings, self.timesteps)
        self.embeds = embeds
        self.branch_embeds = embeds.repeat(settings.num_candidates)

    def predict(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """Guided predictions for B latents, or for `(K * B)` of a branch."""
        rows = self.embeds if len(latents) == len(self.embeds) else self.branch_embeds
        timestep = self.timesteps[step]
        scale = self.settings.guidance_scale
        outputs = []
        for chunk in even_slices(len(latents), self.settings.rollout_micro_batch_size):
            outputs.append(self.pipeline.predict(latents[chunk], timestep, rows[chunk], scale))
        return torch.cat(outputs)

    def draw(self, latents: torch.Tensor, output: torch.Tensor, step: int, num_samples: int = 1) -> torch.Tensor:
        """`num_samples` draws of x_{t-1}: `(num_samples, len(latents), ...)`, rounded to the dtype that is stored."""
        eta = self.settings.eta
        mean, std, _ = self.pipeline.step_distribution(output, self.timesteps[step], latents, eta)
        if not self.pipeline.step_is_stochastic(step, eta):
            return mean.to(self.pipeline.latent_dtype).expand(num_samples, *mean.shape)
        return sample_candidates(mean, std, num_samples, self.generator, self.pipeline.latent_dtype)

    def original_samples(self, latents: torch.Tensor, output: torch.Tensor, step: int) -> torch.Tensor:
        """The x_0 that a prediction stands for."""
        distribution = self.pipeline.step_distribution(output, self.timesteps[step], latents, self.settings.eta)
        return distribution.pred_original_sample


def draw_branch(
    sampler: Sampler, latents: torch.Tensor, output: torch.Tensor, step: int, length: int
) -> tuple[Branch, torch.Tensor | None]:
    """
    Draw K candidates of `length` steps from one x_t.

    Returns:
        `tuple` of the [`Branch`] and the denoiser's outputs for its candidates, `(K, B, ...)`, or `None` if it was not run
        on them.
    """
    settings = sampler.settings
    timesteps = sampler.timesteps
    end = step + length
    ends_rollout = end == settings.num_inference_steps

    # The candidates diverge at the first step of the branch; from there each continues alone.
    trajectory = [latents.expand(settings.num_candidates, *latents.shape)]
    trajectory.append(sampler.draw(latents, output, step, settings.num_candidates))
    for inner in range(step + 1, end):
        flat = trajectory[-1].flatten(0, 1)
        following = sampler.draw(flat, sampler.predict(flat, inner), inner)[0]
        trajectory.append(following.view_as(trajectory[-1]))

    # The reward needs their x_0, unless they are finished images or it judges the candidates as they are.
    candidates = trajectory[-1]
    outputs = predicted = None
    if ends_rollout:
        predicted = candidates
    elif sampler.predicts_candidates:
        flat = candidates.flatten(0, 1)
        outputs = sampler.predict(flat, end)
        predicted = sampler.original_samples(flat, outputs, end).view(candidates.shape)
        outputs = outputs.view(candidates.shape)

    # Decide how the branch will be judged: at which timestep, and between which candidates.
    scored_timestep = 0 if ends_rollout else timesteps[end]
    if settings.reward_timestep == "branch":
        scored_timestep = timesteps[step]
    pair_candidates = None
    if settings.pair == "random":
        pair_candidates = draw_two_candidates(settings.num_candidates, len(latents), sampler.generator)
    branch = Branch(
        step=step,
        timesteps=timesteps[step:end],
        scored_timestep=scored_timestep,
        threshold=sampler.thresholds[step],
        trajectory=trajectory,
        judged=candidates if sampler.judges_candidates else predicted,
        pred_original_samples=predicted,
        pair_candidates=pair_candidates,
        ends_rollout=ends_rollout,
    )
    return branch, outputs


class Trajectories(NamedTuple):
    """
    What was sampled: one trajectory per prompt, and the branches on its way.

    Attributes:
        latents (`torch.Tensor` of shape `(B, ...)`): where the trajectories stopped.
        branches (list of [`Branch`]): in the order of their steps.
        plain_steps (`dict[int, torch.Tensor]`): step that did not branch -> which rows were finite after it.
    """

    latents: torch.Tensor
    branches: list[Branch]
    plain_steps: dict[int, torch.Tensor]

    def first_prompts(self, count: int) -> "Trajectories":
        """Those of the first `count` prompts."""
        branches = [branch.first_prompts(count) for branch in self.branches]
        plain_steps = {step: finite[:count] for step, finite in self.plain_steps.items()}
        return Trajectories(self.latents[:count], branches, plain_steps)


def sample_trajectories(sampler: Sampler, plan: BranchPlan, scorer: Scorer) -> Trajectories:
    """One trajectory per prompt, with a branch of K candidates wherever the plan has one."""
    settings = sampler.settings
    latents = sampler.pipeline.prepare_latents(len(sampler.embeds), sampler.generator, settings.height, settings.width)
    output = sampler.predict(latents, 0)
    branches = []
    plain_steps = {}
    step = 0
    while step < plan.stop:
        # A branch: one of its candidates becomes the next x_t. If the denoiser already ran on it, its output is reused.
        if step in plan.lengths:
            branch, outputs = draw_branch(sampler, latents, output, step, plan.lengths[step])
            choose_next(branch, scorer, settings, sampler.generator)
            branches.append(branch)
            index = branch.next_index.to(latents.device, non_blocking=True)
            latents = gather_candidates(branch.candidates, index)
            output = None if outputs is None else gather_candidates(outputs, index)
            step += plan.lengths[step]
        else:
            latents = sampler.draw(latents, output, step)[0]
            output = None
            plain_steps[step] = is_finite(latents)
            step += 1
        if output is None and step < plan.stop:
            output = sampler.predict(latents, step)
    return Trajectories(latents, branches, plain_steps)


def choose_next(branch: Branch, scorer: Scorer, settings: RolloutSettings, generator: torch.Generator | None) -> None:
    """Choose the candidate that goes on; score the candidates first where the choice depends on them."""
    num_candidates, batch_size = branch.candidates.shape[:2]
    if settings.deferred:
        branch.next_index = random_index(num_candidates, batch_size, generator)
        return
    # The scorer knows the prompts whose pairs are wanted. Others go on from their first candidate.
    own = branch.first_prompts(len(scorer.prompts))
    branch.judged_as = own.judged_as = scorer([(own.judged, branch.scored_timestep)])[0]
    index = resample_index(own.select(), num_candidates, settings.resample, generator)
    branch.next_index = torch.nn.functional.pad(index, (0, batch_size - len(index)))


# --- score -----------------------------------------------------------------------------------------------------------


def score_the_rest(
    scorer: Scorer, branches: list[Branch], latents: torch.Tensor, finished: bool, deferred: bool
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """
    Fill in the scores of branches that were deferred, together with those of finished images.

    Returns:
        `tuple` of the scores `(B,)` of the finished images, `None` if they are not finished, and of several rewards the
        scores of each.
    """
    # Collect everything that needs a score, so that the reward sees it in one call.
    waiting = branches if deferred else []
    to_score = [(branch.judged, branch.scored_timestep) for branch in waiting]
    last = branches[-1]
    if finished and not last.ends_rollout:
        to_score.append((latents[None], 0))
    scores = scorer(to_score) if to_score else []
    for branch, values in zip(waiting, scores, strict=False):
        branch.judged_as = values

    # The device has no work left, so one copy can bring the choices of all branches to the CPU, where the scores are.
    choices = torch.stack([branch.next_index for branch in branches]).cpu()
    for branch, choice in zip(branches, choices, strict=True):
        branch.next_index = choice

    # Finished images that were the candidates of a branch have been scored with it.
    if not finished:
        return None, {}
    if last.ends_rollout:
        judged_as = last.judged_as
        index = last.next_index
    else:
        judged_as = scores[-1]  # one image per prompt
        index = torch.zeros_like(last.next_index)
    parts = {name: gather_candidates(values, index) for name, values in judged_as.parts.items()}
    return gather_candidates(judged_as.total, index), parts


def name_nonfinite(
    scorer: Scorer,
    branches: list[Branch],
    plain_steps: dict[int, torch.Tensor],
    timesteps: list[int],
    final_scores: torch.Tensor | None,
    last_step: int,
) -> list[NonFinite]:
    """
    List the pairs and finished images without a finite score, and where the first NaN or infinity arose. If all scores
    are finite, nothing else is looked at.
    """
    scores = [branch.scores for branch in branches]
    if final_scores is not None:
        scores.append(final_scores[None])
    if torch.cat(scores).isfinite().all():
        return []
    found = _nonfinite_pairs(scorer, branches, plain_steps, timesteps)
    if final_scores is not None:
        named = {entry.prompt for entry in found}
        for prompt, score in zip(scorer.prompts, final_scores, strict=True):
            if not score.isfinite() and prompt not in named:  # all its pairs are whole, the finished image is not
                found.append(NonFinite("score", last_step, 0, prompt))
    return found


def _nonfinite_pairs(
    scorer: Scorer, branches: list[Branch], plain_steps: dict[int, torch.Tensor], timesteps: list[int]
) -> list[NonFinite]:
    """
    One entry per prompt and branch without a finite score. The latents of the rollout are still in memory, so they can be
    searched afterwards for the place where it began. `plain_steps` says which rows were finite after each step that did
    not branch.
    """
    found = []
    first_broken_step = {}  # row -> first step whose latents are not finite: whatever follows is broken, too
    for branch in branches:
        rows = (~branch.scores.isfinite()).any(0).nonzero().flatten().tolist()
        for row in rows:
            candidate = int((~branch.scores[:, row].isfinite()).nonzero()[0])

            # The latents of the trajectory come first: a branch cannot be better than what it started from.
            broken = [step for step, finite in plain_steps.items() if step < branch.step and not finite[row]]
            for step, latents in enumerate(branch.trajectory[1:], start=branch.step):
                if not latents[candidate, row].isfinite().all():
                    broken.append(step)
            if broken:
                first_broken_step.setdefault(row, broken[0])
            if row in first_broken_step:
                step = first_broken_step[row]
                found.append(NonFinite("latents", step, timesteps[step], scorer.prompts[row]))
                continue

            # Then what was made of them for the reward, and last the reward itself.
            judged = branch.judged[candidate, row]
            what = "score"
            if not judged.isfinite().all():
                what = "x_0 prediction"
            elif not scorer.image_is_finite(judged):
                what = "decoded image"
            found.append(NonFinite(what, branch.step, branch.scored_timestep, scorer.prompts[row]))
    return found


def _not_finite(found: list[NonFinite]) -> ValueError:
    """The error that names the first of them."""
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return ValueError(
        f"Not finite: {found[0]}{more}. Check the model named there and its dtype: half precision overflows where "
        "bfloat16 or float32 do not."
    )


# --- pair ------------------------------------------------------------------------------------------------------------


def collect_pairs(branch: Branch, selection: PairSelection, prompts: list[str]) -> list[StepPairs]:
    """The valid pairs of one branch, one [`StepPairs`] per transition. `selection` is on the CPU."""
    # Index on the CPU, where scores and selection are, then move the results to the latents.
    device = branch.trajectory[0].device
    rows = selection.valid.nonzero(as_tuple=True)[0]
    names = [prompts[i] for i in rows.tolist()]
    chosen = selection.chosen[rows]
    rejected = selection.rejected[rows]
    chosen_scores = branch.scores[chosen, rows].to(device, non_blocking=True)
    rejected_scores = branch.scores[rejected, rows].to(device, non_blocking=True)
    chosen, rejected, rows = (index.to(device, non_blocking=True) for index in (chosen, rejected, rows))

    # Each transition of the two branches is a training pair; only those of the first step share their x_t.
    parts = []
    for inner, timestep in enumerate(branch.timesteps):
        before = branch.trajectory[inner]
        after = branch.trajectory[inner + 1]
        parts.append(
            StepPairs(
                latents=before[chosen, rows],
                chosen_prev_latents=after[chosen, rows],
                rejected_latents=before[rejected, rows],
                rejected_prev_latents=after[rejected, rows],
                shared=torch.full((len(names),), inner == 0),
                timesteps=torch.full_like(rows, timestep),
                prompt_index=rows,
                chosen_scores=chosen_scores,
                rejected_scores=rejected_scores,
                prompts=names,
            )
        )
    return parts


def record_of(branch: Branch, selection: PairSelection, with_latents: bool) -> BranchRecord:
    """What [`StepPairs`] keeps of a branch."""
    record = BranchRecord(
        step=branch.step,
        timestep=branch.timesteps[0],
        scored_timestep=branch.scored_timestep,
        scores=branch.scores,
        selection=selection,
        next_index=branch.next_index,
        parts=branch.judged_as.parts,
    )
    if with_latents:
        record.latents = branch.trajectory[0][0]
        record.candidates = branch.candidates
        record.pred_original_samples = branch.pred_original_samples
    return record


# --- the rollout -----------------------------------------------------------------------------------------------------


def _conditioning(pipeline, prompt_embeds, negative_prompt_embeds, prompts) -> tuple[PromptEmbeds, list[str]]:
    """Accept a record, a plain tensor, or the prompts themselves."""
    if isinstance(prompt_embeds, (list, tuple)) and all(isinstance(prompt, str) for prompt in prompt_embeds):
        with pipeline.encoders_on_device():
            return pipeline.encode_prompt(list(prompt_embeds)), list(prompt_embeds)
    if torch.is_tensor(prompt_embeds):
        prompt_embeds = PromptEmbeds(prompt_embeds, negative_prompt_embeds)
    prompts = [""] * len(prompt_embeds) if prompts is None else list(prompts)
    if len(prompts) != len(prompt_embeds):
        raise ValueError(f"Got {len(prompts)} prompts for {len(prompt_embeds)} prompt embeddings.")
    return prompt_embeds, prompts


@torch.no_grad()
def stepwise_rollout(
    pipeline: SPOPipeline,
    prompt_embeds: PromptEmbeds | torch.Tensor | list[str],
    reward: Reward | Callable,
    *,
    settings: RolloutSettings | None = None,
    prompts: list[str] | None = None,
    negative_prompt_embeds: torch.Tensor | None = None,
    on_nonfinite: str = "raise",
    generator: torch.Generator | None = None,
    plan_generator: torch.Generator | None = None,
    num_padding: int = 0,
    return_trajectory: bool = False,
    **kwargs,
) -> StepPairs:
    r"""
    Roll out a batch of prompts and collect chosen-rejected pairs of denoising steps.

    1. Plain stochastic steps up to `branch_start_step`.
    2. From one x_t draw K candidates x_{t-1} = mean + sigma_t z; with `num_inner_steps` > 1 each goes on alone for the
       further steps of its branch.
    3. Predict x_0 of each candidate at the next timestep and score it there; final latents are scored as they are, at
       timestep 0. A reward that judges noisy latents scores the candidates themselves, and only the one that goes on is
       predicted.
    4. Best and worst form the pair if their scores differ enough ([`select_pairs`]); all transitions of the two
       branches become training pairs.
    5. One candidate, by default a random one, is the x_t of the next step; its prediction is already known.

    A deterministic step (sigma = 0) is taken, but never branched.

    Args:
        pipeline ([`SPOPipeline`]): from `wrap_pipeline`.
        prompt_embeds ([`PromptEmbeds`], `torch.Tensor` of shape `(B, L, D)`, or `list[str]`): the B prompts, from
            `pipeline.encode_prompt(prompts)`, or the prompts themselves.
        reward: everything that [`wrap_reward`] takes: a [`StepAwareRewardModel`], or a callable `(images (B, 3, H, W) in
            [0, 1], prompts, timesteps (B,)) -> scores (B,)`. One with `scores == "latents"` gets x_0 predictions as
            latents, one with `scores == "noisy_latents"` the candidates.
        settings ([`RolloutSettings`], *optional*): all settings in one record. Or give them by keyword, such as
            `num_candidates=4`: see the attributes of [`RolloutSettings`] for their names, meaning and defaults.
        prompts (`list[str]`, *optional*): the texts, for the reward; not needed if `prompt_embeds` are texts.
        negative_prompt_embeds (`torch.Tensor`, *optional*): if `prompt_embeds` is a tensor and guidance is used.
        on_nonfinite (`str`, *optional*, defaults to `"raise"`): what follows a NaN or an infinity in latents, decoded
            images or scores. `"raise"` is an error; `"skip"` gives up the pairs it touches and lists them in
            `nonfinite`, as [`SPOTrainer`] does, which stops when they are too many.
        generator (`torch.Generator`, *optional*): source of all randomness of the rollout.
        plan_generator (`torch.Generator`, *optional*): source of the places of `num_branches`, instead of `generator`.
            Processes that share one sharded denoiser must branch in the same places, from noise of their own.
        num_padding (`int`, *optional*, defaults to `0`): so many prompts, the last ones, are there only for the denoiser to be
            called as often as in other processes. They are not scored, and nothing of theirs is returned.
        return_trajectory (`bool`, *optional*, defaults to `False`): keep latents and x_0 predictions per branch.
        kwargs: fields of [`RolloutSettings`], instead of `settings`.

    Returns:
        [`StepPairs`].

    Raises:
        ValueError: for settings that cannot give pairs, for a reward that returns another shape, and for numbers that
            are not finite with `on_nonfinite="raise"`.
        TypeError: for a reward that returns no real numbers, or an unknown setting.
    """
    if on_nonfinite not in ("raise", "skip"):
        raise ValueError(f"`on_nonfinite` must be 'raise' or 'skip', got {on_nonfinite!r}.")
    if kwargs and settings is not None:
        raise TypeError(f"Give `settings` or single settings by keyword, not both; got {sorted(kwargs)} beside them.")

    # Bring the arguments into one form: a record of settings, a wrapped reward, embeddings and their texts.
    settings = settings or RolloutSettings(**kwargs)
    reward = wrap_reward(reward)
    embeds, prompts = _conditioning(pipeline, prompt_embeds, negative_prompt_embeds, prompts)

    # 1. Plan where the rollout branches, and how clear a pair must be there.
    judges_candidates = reward.sees == "noisy_latents"
    sampler = Sampler(pipeline, embeds, settings, generator, judges_candidates, return_trajectory)
    settings = sampler.settings
    plan = plan_branches(pipeline, settings, plan_generator or generator)

    # 2. Sample one trajectory per prompt, with its branches.
    sizes = (settings.vae_decode_batch_size, settings.reward_batch_size, settings.scoring_image_size)
    prompts = prompts[: len(prompts) - num_padding]
    scorer = Scorer(pipeline, reward, prompts, *sizes)
    latents, branches, plain_steps = sample_trajectories(sampler, plan, scorer).first_prompts(len(prompts))

    # 3. Score what has no score yet, in full batches, and report what is not finite: it never becomes a pair.
    finished = plan.stop == settings.num_inference_steps
    final_scores, final_parts = score_the_rest(scorer, branches, latents, finished, settings.deferred)
    nonfinite = name_nonfinite(scorer, branches, plain_steps, sampler.timesteps, final_scores, plan.stop - 1)
    if nonfinite and on_nonfinite == "raise":
        raise _not_finite(nonfinite)

    # 4. Pair the chosen with the rejected candidate of each branch.
    parts = []
    records = []
    for branch in branches:
        selection = branch.select()
        parts += collect_pairs(branch, selection, prompts)
        records.append(record_of(branch, selection, return_trajectory))
    pairs = StepPairs.cat(parts)
    pairs.branches = records
    pairs.nonfinite = nonfinite
    if finished:
        pairs.final_latents = latents
        pairs.final_scores = final_scores
        pairs.final_parts = final_parts
    return pairs
