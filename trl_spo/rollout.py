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
The rollout of SPO: at each denoising step draw K candidates from one latent, let the reward model find winner and loser,
and go on from one candidate (https://huggingface.co/papers/2406.04314, algorithm 1).

Differences from the public implementation:

- one algorithm for every `num_inner_steps`: a branch may run several steps before it is scored (the paper's multi-step
  variant), and a group that the last step cuts short is shorter, not skipped;
- the random continuation is drawn from the same generator as the noise, so a seed repeats a rollout;
- the denoiser, the decoder and the reward model see chunks of bounded size whatever K and the batch are;
- prompts are encoded once for the reward model, not once per image;
- the random continuation does not depend on scores, so the candidates of all steps can be scored together at the end,
  and the host then waits for the device once per rollout;
- a NaN or an infinity in latents, decoded images or scores costs its pair, is named and counted, and never trained on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

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
from .step_distribution import sample_candidates
from .step_pairs import BranchRecord, NonFinite, StepPairs
from .training.numerics import is_finite


class _Scorer:
    """Decodes latents and asks the reward model, both in chunks; encodes the prompts of the rollout once."""

    def __init__(
        self,
        pipeline: SPOPipeline,
        reward,
        prompts: list[str],
        decode_batch_size: int | None = None,
        batch_size: int | None = None,
        image_size: int | None = None,
    ):
        if not callable(reward) and not hasattr(reward, "encode_prompts"):
            raise TypeError(
                "The reward must be a `StepAwareRewardModel` or a callable `(images, prompts, timesteps) -> scores`, got "
                f"`{type(reward).__name__}`."
            )
        self.pipeline = pipeline
        self.reward = reward
        self.prompts = prompts
        self.decode_batch_size = decode_batch_size
        self.batch_size = batch_size or decode_batch_size
        self.image_size = image_size
        self.scores_latents = getattr(reward, "scores", "images") == "latents"
        self.text_features = reward.encode_prompts(prompts) if hasattr(reward, "encode_prompts") else None

    def __call__(self, candidates: list[tuple[torch.Tensor, int]]) -> list[torch.Tensor]:
        """
        Scores of x_0 predictions, given as latents `(K, B, ...)` with the timestep they were predicted at. What is
        scored together may come from different steps.

        Returns:
            list of `torch.Tensor` of shape `(K, B)`, float32, on the CPU; NaN for latents and images that are not
            finite, instead of which the reward sees zeros.
        """
        shapes = [latents.shape[:2] for latents, _ in candidates]
        rows = torch.cat([torch.arange(batch_size).repeat(num_candidates) for num_candidates, batch_size in shapes])
        timesteps = torch.cat(
            [torch.full((shape.numel(),), t) for shape, (_, t) in zip(shapes, candidates, strict=True)]
        )
        latents = torch.cat([latents.flatten(0, 1).float() for latents, _ in candidates])
        on_device = [index.to(latents.device, non_blocking=True) for index in (rows, timesteps)]
        size = self.batch_size or len(latents)
        chunks = [slice(start, start + size) for start in range(0, len(latents), size)]
        scores = torch.cat([self._score(latents[c], *(index[c] for index in on_device), rows[c]) for c in chunks])
        parts = scores.cpu().split([shape.numel() for shape in shapes])  # the one wait for the device
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _score(self, latents: torch.Tensor, rows: torch.Tensor, timesteps: torch.Tensor, cpu_rows) -> torch.Tensor:
        finite = is_finite(latents)
        images = _blank(latents, finite)
        if not self.scores_latents:
            images = self._decode(images)
            finite = finite & is_finite(images)
            images = _blank(images, finite)
        if self.text_features is not None:
            scores = self.reward.score(images, timesteps=timesteps, text_features=self.text_features[rows])
        else:
            images = images if self.scores_latents else (images / 2 + 0.5).clamp(0, 1)
            scores = self.reward(images, [self.prompts[i] for i in cpu_rows.tolist()], timesteps)
        try:
            scores = torch.as_tensor(scores, device=latents.device).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"The reward must return a tensor or a list of {len(rows)} numbers, one per image, got "
                f"`{type(scores).__name__}` ({error})."
            ) from error
        if scores.shape != rows.shape:
            raise ValueError(
                f"The reward must return one score per image, shape ({len(rows)},), got {tuple(scores.shape)}."
            )
        if scores.is_complex():
            raise TypeError(f"The reward must return real numbers, got dtype {scores.dtype}.")
        return scores.float().masked_fill(~finite, math.nan)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        size = self.decode_batch_size or len(latents)
        chunks = [latents[start : start + size] for start in range(0, len(latents), size)]
        return torch.cat([self.pipeline.decode_for_scoring(chunk, self.image_size) for chunk in chunks])

    def image_is_finite(self, latents: torch.Tensor) -> bool:
        """Whether one x_0 prediction decodes to numbers; half-precision decoders may overflow."""
        return self.scores_latents or bool(self._decode(latents[None].float()).isfinite().all())


def _blank(values: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    """`values (N, ...)` with zeros instead of the rows that are not finite."""
    return torch.where(finite.view(-1, *[1] * (values.ndim - 1)), values, 0.0)


@dataclass
class _Branch:
    """A branch that was drawn and waits for its scores."""

    step: int
    timesteps: list[int]
    scored_timestep: int
    chain: list[torch.Tensor]  # latents (K, B, ...) before each transition and after the last
    predicted: torch.Tensor  # (K, B, ...)
    two: torch.Tensor | None  # the two candidates of `pair="random"`
    index: torch.Tensor | None = None  # the candidate that went on
    scores: torch.Tensor | None = None  # NaN where something is not finite

    def select(self, pair: str, threshold: float) -> PairSelection:
        if pair == "best_worst":
            selection = select_pairs(self.scores, threshold)
        else:
            selection = select_random_pairs(self.scores, threshold, candidates=self.two)
        return selection._replace(valid=selection.valid & self.scores.isfinite().all(0))


def _find_nonfinite(
    scorer: _Scorer, branches: list[_Branch], plain_steps: dict[int, torch.Tensor], timesteps: list[int]
) -> list[NonFinite]:
    """
    What became of pairs without a finite score, and where it began. Latents are still at hand, so nothing has to be
    looked at while all goes well. `plain_steps` tells which rows were finite after each step that did not branch.
    """
    found, first_broken = [], {}  # row -> first step whose latents are not finite
    for branch in branches:
        for row in (~branch.scores.isfinite()).any(0).nonzero().flatten().tolist():
            prompt, candidate = scorer.prompts[row], int((~branch.scores[:, row].isfinite()).nonzero()[0])
            broken = [step for step, finite in plain_steps.items() if step < branch.step and not finite[row]]
            chain = enumerate(branch.chain[1:], start=branch.step)
            broken += [step for step, latents in chain if not latents[candidate, row].isfinite().all()]
            if broken:
                first_broken.setdefault(row, broken[0])
            predicted = branch.predicted[candidate, row]
            if row in first_broken:
                what, step, timestep = "latents", first_broken[row], timesteps[first_broken[row]]
            else:
                what, step, timestep = "score", branch.step, branch.scored_timestep
                if not predicted.isfinite().all():
                    what = "x_0 prediction"
                elif not scorer.image_is_finite(predicted):
                    what = "decoded image"
            found.append(NonFinite(what, step, timestep, prompt))
    return found


def _check_arguments(
    num_candidates, num_inference_steps, branch_start_step, branch_end_step, num_branches, num_inner_steps, eta
):
    if num_candidates < 2:
        raise ValueError(f"`num_candidates` must be at least 2 to form a pair, got {num_candidates}.")
    if not 0 < eta <= 1:
        raise ValueError(
            f"`eta` must be in (0, 1], got {eta}. With eta = 0 DDIM is deterministic: all candidates would be equal."
        )
    if not 0 <= branch_start_step < branch_end_step <= num_inference_steps:
        raise ValueError(
            "Branching needs 0 <= branch_start_step < branch_end_step <= num_inference_steps, got "
            f"{branch_start_step}, {branch_end_step} and {num_inference_steps}."
        )
    if num_inner_steps < 1:
        raise ValueError(f"`num_inner_steps` must be at least 1, got {num_inner_steps}.")
    if num_branches is not None and num_branches < 1:
        raise ValueError(f"`num_branches` must be at least 1, or None for all, got {num_branches}.")


def branch_lengths(pipeline: SPOPipeline, start: int, end: int, num_inner_steps: int, eta: float) -> dict[int, int]:
    """
    First step of each branch -> its steps: fewer than j where branching ends or a deterministic step follows.

    Raises:
        ValueError: if all steps from `start` to `end` are deterministic, so that no candidates would differ.
    """
    lengths, step = {}, start
    while step < end:
        length = 0
        while length < num_inner_steps and step + length < end and pipeline.step_is_stochastic(step + length, eta):
            length += 1
        if length:
            lengths[step] = length
        step += max(length, 1)
    if not lengths:
        raise ValueError(
            f"Steps {start} to {end - 1} of the scheduler are deterministic (sigma = 0), so their candidates would be "
            "equal. Branch earlier steps, or set `set_alpha_to_one=False` in the scheduler."
        )
    return lengths


def _conditioning(pipeline, prompt_embeds, negative_prompt_embeds, prompts) -> tuple[PromptEmbeds, list[str]]:
    """Accept a record, a plain tensor, or the prompts themselves."""
    if isinstance(prompt_embeds, (list, tuple)) and all(isinstance(prompt, str) for prompt in prompt_embeds):
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
    reward: Callable,
    *,
    prompts: list[str] | None = None,
    negative_prompt_embeds: torch.Tensor | None = None,
    num_candidates: int = 4,
    num_inference_steps: int = 20,
    branch_start_step: int = 4,
    branch_end_step: int | None = None,
    num_inner_steps: int = 1,
    eta: float = 1.0,
    guidance_scale: float = 5.0,
    preference_threshold: float = 0.3,
    resample: str = "random",
    pair: str = "best_worst",
    height: int | None = None,
    width: int | None = None,
    rollout_micro_batch_size: int | None = None,
    vae_decode_batch_size: int | None = None,
    reward_batch_size: int | None = None,
    num_branches: int | None = None,
    scoring_image_size: int | None = None,
    defer_scoring: bool = False,
    on_nonfinite: str = "raise",
    generator: torch.Generator | None = None,
    return_trajectory: bool = False,
) -> StepPairs:
    r"""
    Roll out a batch of prompts and collect win-lose pairs of denoising steps.

    1. Plain stochastic steps up to `branch_start_step`.
    2. From one x_t draw K candidates x_{t-1} = mean + sigma_t z; with `num_inner_steps` > 1 each goes on alone for the
       further steps of its branch.
    3. Predict x_0 of each candidate at the next timestep and score it there; final latents are scored as they are, at
       timestep 0.
    4. Best and worst form the pair if their scores differ enough ([`select_pairs`]); all transitions of the two
       branches become training pairs.
    5. One candidate, by default a random one, is the x_t of the next step; its prediction is already known.

    A deterministic step (sigma = 0) is taken, but never branched.

    Args:
        pipeline ([`SPOPipeline`]): from `wrap_pipeline`.
        prompt_embeds ([`PromptEmbeds`], `torch.Tensor` of shape `(B, L, D)`, or `list[str]`): the B prompts, from
            `pipeline.encode_prompt(prompts)`, or the prompts themselves.
        reward: a [`StepAwareRewardModel`], or a callable `(images (B, 3, H, W) in [0, 1], prompts, timesteps (B,)) ->
            scores (B,)`. One with `scores == "latents"` gets x_0 predictions as latents.
        prompts (`list[str]`, *optional*): the texts, for the reward; not needed if `prompt_embeds` are texts.
        negative_prompt_embeds (`torch.Tensor`, *optional*): if `prompt_embeds` is a tensor and guidance is used.
        num_candidates (`int`, *optional*, defaults to `4`): K, at least 2.
        num_inference_steps (`int`, *optional*, defaults to `20`): S.
        branch_start_step (`int`, *optional*, defaults to `4`): first step that branches.
        branch_end_step (`int`, *optional*): first step that does not branch any more. The rollout stops there: what
            comes later cannot give pairs. `None` branches to the end.
        num_inner_steps (`int`, *optional*, defaults to `1`): j, steps of a branch before it is scored.
        eta (`float`, *optional*, defaults to `1.0`): noise of the DDIM steps, in (0, 1].
        guidance_scale (`float`, *optional*, defaults to `5.0`): w; 1 or less is no guidance.
        preference_threshold (`float`, *optional*, defaults to `0.3`): see [`select_pairs`].
        resample (`str`, *optional*, defaults to `"random"`): candidate that goes on: "random", "chosen", "rejected".
        pair (`str`, *optional*, defaults to `"best_worst"`): "best_worst", or "random" for two random candidates.
        height, width (`int`, *optional*): image size in pixels; default of the model.
        rollout_micro_batch_size (`int`, *optional*): most latents in one denoiser call (guidance doubles them).
        vae_decode_batch_size (`int`, *optional*): most images in one decoder call.
        reward_batch_size (`int`, *optional*): most images in one reward call; `vae_decode_batch_size` by default.
        num_branches (`int`, *optional*): branch only at this many random places of those that may branch, and stop
            after the last of them. `None` branches at all.
        scoring_image_size (`int`, *optional*): decode for scoring at this size (pixels of the short side) instead of
            full size. Changes scores.
        defer_scoring (`bool`, *optional*, defaults to `False`): score the candidates of all steps together after the
            rollout, in full batches, instead of step by step. The same scores, and the host waits for the device once;
            it needs `resample="random"` and is ignored otherwise. [`SPOTrainer`] does so.
        on_nonfinite (`str`, *optional*, defaults to `"raise"`): what follows a NaN or an infinity in latents, decoded
            images or scores. `"raise"` is an error; `"skip"` gives up the pairs it touches and lists them in
            `nonfinite`, as [`SPOTrainer`] does, which stops when they are too many.
        generator (`torch.Generator`, *optional*): source of all randomness of the rollout.
        return_trajectory (`bool`, *optional*, defaults to `False`): keep latents and x_0 predictions per branch.

    Returns:
        [`StepPairs`].

    Raises:
        ValueError: for settings that cannot give pairs, for a reward that returns another shape, and for numbers that
            are not finite with `on_nonfinite="raise"`.
        TypeError: for a reward that returns no real numbers.
    """
    end = num_inference_steps if branch_end_step is None else branch_end_step
    _check_arguments(num_candidates, num_inference_steps, branch_start_step, end, num_branches, num_inner_steps, eta)
    if pair not in ("best_worst", "random"):
        raise ValueError(f"`pair` must be 'best_worst' or 'random', got {pair!r}.")
    if resample not in ("random", "chosen", "rejected"):
        raise ValueError(f"`resample` must be 'random', 'chosen' or 'rejected', got {resample!r}.")
    if on_nonfinite not in ("raise", "skip"):
        raise ValueError(f"`on_nonfinite` must be 'raise' or 'skip', got {on_nonfinite!r}.")
    embeds, prompts = _conditioning(pipeline, prompt_embeds, negative_prompt_embeds, prompts)
    scorer = _Scorer(pipeline, reward, prompts, vae_decode_batch_size, reward_batch_size, scoring_image_size)
    timesteps = pipeline.set_timesteps(num_inference_steps)
    branch_embeds = embeds.repeat(num_candidates)
    deferred = defer_scoring and resample == "random"

    lengths = branch_lengths(pipeline, branch_start_step, end, num_inner_steps, eta)
    last = num_inference_steps if branch_end_step is None else end
    if num_branches is not None and num_branches < len(lengths):
        drawn = torch.randperm(len(lengths), generator=generator, device=generator and generator.device)
        kept = sorted(list(lengths)[i] for i in drawn[:num_branches].tolist())
        lengths = {step: lengths[step] for step in kept}
        last = max(step + length for step, length in lengths.items())

    def predict(latents, step):
        rows = embeds if len(latents) == len(embeds) else branch_embeds
        size = rollout_micro_batch_size or len(latents)
        chunks = [slice(start, start + size) for start in range(0, len(latents), size)]
        return torch.cat([pipeline.predict(latents[c], timesteps[step], rows[c], guidance_scale) for c in chunks])

    def advance(latents, model_output, step, num_samples=1):
        """`num_samples` draws of x_{t-1} -> (num_samples, len(latents), ...), in storage dtype."""
        mean, std, _ = pipeline.step_distribution(model_output, timesteps[step], latents, eta)
        if not pipeline.step_is_stochastic(step, eta):
            return mean.to(pipeline.dtype).expand(num_samples, *mean.shape)
        return sample_candidates(mean, std, num_samples, generator, pipeline.dtype)

    latents = pipeline.prepare_latents(len(embeds), generator, height, width)
    model_output = predict(latents, 0)
    branches, plain_steps, step = [], {}, 0
    while step < last:
        if step not in lengths:
            latents = advance(latents, model_output, step)[0]
            plain_steps[step] = is_finite(latents)
            step += 1
            model_output = predict(latents, step) if step < last else None
            continue

        chain, length = [latents.expand(num_candidates, *latents.shape)], lengths[step]
        for inner in range(length):
            if inner == 0:
                candidates = advance(latents, model_output, step, num_candidates)
            else:
                flat = chain[-1].flatten(0, 1)
                candidates = advance(flat, predict(flat, step + inner), step + inner)[0].view_as(chain[-1])
            chain.append(candidates)
        step += length

        if step < num_inference_steps:
            flat, scored_timestep = candidates.flatten(0, 1), timesteps[step]
            outputs = predict(flat, step)
            predicted = pipeline.step_distribution(outputs, scored_timestep, flat, eta).pred_original_sample
            predicted, outputs = predicted.view(candidates.shape), outputs.view(candidates.shape)
        else:
            predicted, outputs, scored_timestep = candidates, None, 0
        two = draw_two_candidates(num_candidates, len(embeds), generator) if pair == "random" else None
        branch = _Branch(step - length, timesteps[step - length : step], scored_timestep, chain, predicted, two)
        if deferred:
            branch.index = random_index(num_candidates, len(embeds), generator)
        else:
            branch.scores = scorer([(predicted, scored_timestep)])[0]
            selection = branch.select(pair, preference_threshold)
            branch.index = resample_index(selection, num_candidates, resample, generator)
        branches.append(branch)
        index = branch.index.to(latents.device, non_blocking=True)
        latents = gather_candidates(candidates, index)
        model_output = None if outputs is None else gather_candidates(outputs, index)

    waiting = branches if deferred else []
    to_score = [(branch.predicted, branch.scored_timestep) for branch in waiting]
    finished, final_scores = last == num_inference_steps, None
    if finished and branches[-1].scored_timestep != 0:  # the last step was not a branch: its images have no score yet
        to_score.append((latents[None], 0))
    scores = scorer(to_score) if to_score else []
    for branch, values in zip(waiting, scores, strict=False):
        branch.scores = values
    if finished:
        extra = len(scores) > len(waiting)
        final_scores = scores[-1][0] if extra else gather_candidates(branches[-1].scores, branches[-1].index.cpu())

    nonfinite = []
    all_scores = [*(branch.scores for branch in branches), *([final_scores[None]] if finished else [])]
    if not torch.cat(all_scores).isfinite().all():
        nonfinite = _find_nonfinite(scorer, branches, plain_steps, timesteps)
        named = {entry.prompt for entry in nonfinite}
        for prompt, score in zip(prompts, final_scores if finished else [], strict=False):
            if not score.isfinite() and prompt not in named:  # all pairs are whole, the finished image is not
                nonfinite.append(NonFinite("score", last - 1, 0, prompt))
        if on_nonfinite == "raise":
            raise ValueError(
                f"Not finite: {nonfinite[0]}"
                + (f", and {len(nonfinite) - 1} more" if len(nonfinite) > 1 else "")
                + ". "
                "Check the model named there and its dtype: half precision overflows where bfloat16 or float32 do not."
            )

    parts, records = [], []
    for branch in branches:
        selection = branch.select(pair, preference_threshold)
        parts += _collect_pairs(branch, selection, prompts)
        kept = (branch.chain[0][0], branch.chain[-1], branch.predicted) if return_trajectory else (None, None, None)
        timestep, index = branch.timesteps[0], branch.index.cpu()
        records.append(
            BranchRecord(branch.step, timestep, branch.scored_timestep, branch.scores, selection, index, *kept)
        )
    pairs = StepPairs.cat(parts)
    pairs.branches, pairs.nonfinite = records, nonfinite
    if finished:
        pairs.final_latents, pairs.final_scores = latents, final_scores
    return pairs


def _collect_pairs(branch: _Branch, selection: PairSelection, prompts: list[str]) -> list[StepPairs]:
    """The valid pairs of one branch, one [`StepPairs`] per transition. `selection` is on the CPU."""
    device = branch.chain[0].device
    rows = selection.valid.nonzero(as_tuple=True)[0]
    names = [prompts[i] for i in rows.tolist()]
    chosen_scores = branch.scores[selection.chosen[rows], rows].to(device, non_blocking=True)
    rejected_scores = branch.scores[selection.rejected[rows], rows].to(device, non_blocking=True)
    chosen, rejected, rows = (
        index.to(device, non_blocking=True) for index in (selection.chosen[rows], selection.rejected[rows], rows)
    )
    return [
        StepPairs(
            latents=before[chosen, rows],
            chosen_prev_latents=after[chosen, rows],
            rejected_latents=before[rejected, rows],
            rejected_prev_latents=after[rejected, rows],
            shared=torch.full_like(rows, inner == 0, dtype=torch.bool),
            timesteps=torch.full_like(rows, timestep),
            prompt_index=rows,
            chosen_scores=chosen_scores,
            rejected_scores=rejected_scores,
            prompts=names,
        )
        for inner, (before, after, timestep) in enumerate(
            zip(branch.chain, branch.chain[1:], branch.timesteps, strict=False)
        )
    ]
