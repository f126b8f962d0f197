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
- prompts are encoded once for the reward model, not once per image.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch

from .pair_selection import PairSelection, gather_candidates, resample_index, select_pairs, select_random_pairs
from .pipeline_base import PromptEmbeds, SPOPipeline
from .step_distribution import sample_candidates


@dataclass
class BranchRecord:
    """
    What happened at one branching step. B prompts, K candidates.

    Attributes:
        step (`int`): index of the (first) step of the branch in the schedule.
        timestep (`int`): t of the latents that branch.
        scored_timestep (`int`): timestep at which the candidates were scored; 0 for final images.
        scores (`torch.Tensor` of shape `(K, B)`): float32.
        selection ([`PairSelection`]): winner, loser and validity per prompt.
        next_index (`torch.Tensor` of shape `(B,)`): the candidate that went on.
        latents (`torch.Tensor` of shape `(B, ...)`, *optional*): x_t; only with `return_trajectory=True`.
        candidates (`torch.Tensor` of shape `(K, B, ...)`, *optional*): what was scored, as latents.
        pred_original_samples (`torch.Tensor` of shape `(K, B, ...)`, *optional*): their predicted x_0.
    """

    step: int
    timestep: int
    scored_timestep: int
    scores: torch.Tensor
    selection: PairSelection
    next_index: torch.Tensor
    latents: torch.Tensor | None = None
    candidates: torch.Tensor | None = None
    pred_original_samples: torch.Tensor | None = None


@dataclass
class StepPairs:
    """
    Win-lose pairs of denoising transitions, N in all, valid ones only.

    Attributes:
        latents (`torch.Tensor` of shape `(N, ...)`): x_t of the winner's transition.
        chosen_prev_latents (`torch.Tensor` of shape `(N, ...)`): its x_{t-1}, bit for bit the one that was scored (or,
            inside a multi-step branch, that led to it).
        rejected_latents (`torch.Tensor` of shape `(N, ...)`): x_t of the loser's transition.
        rejected_prev_latents (`torch.Tensor` of shape `(N, ...)`): its x_{t-1}.
        shared (`torch.Tensor` of shape `(N,)`, bool): whether both transitions start from the same x_t.
        timesteps (`torch.Tensor` of shape `(N,)`, int64): t.
        prompt_index (`torch.Tensor` of shape `(N,)`, int64): row of the prompt in the rollout batch.
        chosen_scores, rejected_scores (`torch.Tensor` of shape `(N,)`): of the reward model.
        prompts (list of `str`): the N prompts.
        branches (list of [`BranchRecord`]): every branching step of the rollout, valid or not.
        final_latents (`torch.Tensor` of shape `(B, ...)`, *optional*): x_0 of the trajectories, if they were finished.
        final_scores (`torch.Tensor` of shape `(B,)`, *optional*): their scores at timestep 0.
    """

    latents: torch.Tensor
    chosen_prev_latents: torch.Tensor
    rejected_latents: torch.Tensor
    rejected_prev_latents: torch.Tensor
    shared: torch.Tensor
    timesteps: torch.Tensor
    prompt_index: torch.Tensor
    chosen_scores: torch.Tensor
    rejected_scores: torch.Tensor
    prompts: list[str]
    branches: list[BranchRecord] = field(default_factory=list)
    final_latents: torch.Tensor | None = None
    final_scores: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    @classmethod
    def tensor_names(cls) -> list[str]:
        """Names of the per-pair tensors."""
        return [f.name for f in fields(cls) if f.name not in ("prompts", "branches", "final_latents", "final_scores")]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The per-pair tensors by name."""
        return {name: getattr(self, name) for name in self.tensor_names()}

    def __getitem__(self, index: torch.Tensor | slice) -> "StepPairs":
        """Pairs by index tensor or slice; the record of the rollout stays behind."""
        rows = torch.arange(len(self))[index.cpu() if torch.is_tensor(index) else index]
        return StepPairs(
            **{name: value[rows.to(value.device)] for name, value in self.tensors().items()},
            prompts=[self.prompts[i] for i in rows.tolist()],
        )

    def to(self, device) -> "StepPairs":
        return replace(self, **{name: value.to(device) for name, value in self.tensors().items()})

    @classmethod
    def cat(cls, parts: list["StepPairs"]) -> "StepPairs":
        """One collection from several, in order; records of rollouts stay behind."""
        return cls(
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in cls.tensor_names()},
            prompts=[prompt for part in parts for prompt in part.prompts],
        )


class _Scorer:
    """Decodes latents in chunks and asks the reward model; encodes the prompts of the rollout once."""

    def __init__(self, pipeline: SPOPipeline, reward, prompts: list[str], batch_size: int | None):
        self.pipeline = pipeline
        self.reward = reward
        self.prompts = prompts
        self.batch_size = batch_size
        self.text_features = reward.encode_prompts(prompts) if hasattr(reward, "encode_prompts") else None

    def __call__(self, latents: torch.Tensor, timestep: int) -> torch.Tensor:
        """Scores of `latents (K, B, ...)` (x_0 predictions) at `timestep` -> `(K, B)` float32."""
        num_candidates, batch_size = latents.shape[:2]
        rows = torch.arange(batch_size, device=latents.device).repeat(num_candidates)
        latents = latents.flatten(0, 1)
        size = self.batch_size or len(latents)
        scores = [
            self._score(latents[start : start + size], rows[start : start + size], timestep)
            for start in range(0, len(latents), size)
        ]
        return torch.cat(scores).view(num_candidates, batch_size)

    def _score(self, latents: torch.Tensor, rows: torch.Tensor, timestep: int) -> torch.Tensor:
        timesteps = torch.full((len(latents),), timestep, dtype=torch.long, device=latents.device)
        scores_latents = getattr(self.reward, "scores", "images") == "latents"
        images = latents if scores_latents else self.pipeline.decode_latents(latents)
        if self.text_features is not None:
            scores = self.reward.score(images, timesteps=timesteps, text_features=self.text_features[rows])
        else:
            images = images if scores_latents else (images / 2 + 0.5).clamp(0, 1)
            scores = self.reward(images, [self.prompts[i] for i in rows.tolist()], timesteps)
        return self._check(scores, rows, timestep).to(latents.device)

    def _check(self, scores, rows: torch.Tensor, timestep: int) -> torch.Tensor:
        scores = torch.as_tensor(scores).detach()
        if scores.shape != rows.shape:
            raise ValueError(
                f"The reward must return one score per image, shape ({len(rows)},), got {tuple(scores.shape)}."
            )
        if not bool(torch.isfinite(scores).all()):
            bad = int((~torch.isfinite(scores)).nonzero()[0])
            raise ValueError(
                f"The reward returned {scores[bad].item()} at timestep {timestep} for the prompt "
                f"{self.prompts[int(rows[bad])]!r}. Scores must be finite: check the reward model and its dtype."
            )
        return scores.float()


def _check_arguments(num_candidates, num_inference_steps, branch_start_step, branch_end_step, num_inner_steps, eta):
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
        vae_decode_batch_size (`int`, *optional*): most images in one decoder and reward call.
        generator (`torch.Generator`, *optional*): source of all randomness of the rollout.
        return_trajectory (`bool`, *optional*, defaults to `False`): keep latents and x_0 predictions per branch.

    Returns:
        [`StepPairs`].

    Raises:
        ValueError: for settings that cannot give pairs, and for a reward that returns a wrong shape or NaN.
    """
    end = num_inference_steps if branch_end_step is None else branch_end_step
    _check_arguments(num_candidates, num_inference_steps, branch_start_step, end, num_inner_steps, eta)
    if pair not in ("best_worst", "random"):
        raise ValueError(f"`pair` must be 'best_worst' or 'random', got {pair!r}.")
    embeds, prompts = _conditioning(pipeline, prompt_embeds, negative_prompt_embeds, prompts)
    scorer = _Scorer(pipeline, reward, prompts, vae_decode_batch_size)
    timesteps = pipeline.set_timesteps(num_inference_steps)
    branch_embeds = embeds.repeat(num_candidates)

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
    parts, branches, final_scores, step = [], [], None, 0
    last = num_inference_steps if branch_end_step is None else end
    while step < last:
        # Steps of this branch: fewer than asked for where branching ends or a deterministic step follows.
        length = 0
        while length < num_inner_steps and branch_start_step <= step + length < end:
            if not pipeline.step_is_stochastic(step + length, eta):
                break
            length += 1
        if length == 0:
            latents = advance(latents, model_output, step)[0]
            step += 1
            model_output = predict(latents, step) if step < last else None
            continue

        chain = [latents.expand(num_candidates, *latents.shape)]
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
        scores = scorer(predicted, scored_timestep)
        if pair == "best_worst":
            selection = select_pairs(scores, preference_threshold)
        else:
            selection = select_random_pairs(scores, preference_threshold, generator)
        index = resample_index(selection, num_candidates, resample, generator)

        branch_timesteps = timesteps[step - length : step]
        parts += _collect_pairs(chain, scores, selection, branch_timesteps, prompts)
        kept = (latents, candidates, predicted) if return_trajectory else (None, None, None)
        branches.append(
            BranchRecord(step - length, branch_timesteps[0], scored_timestep, scores, selection, index, *kept)
        )
        latents = gather_candidates(candidates, index)
        model_output = None if outputs is None else gather_candidates(outputs, index)
        final_scores = gather_candidates(scores, index) if outputs is None else None

    pairs = StepPairs.cat(parts)
    pairs.branches = branches
    if last == num_inference_steps:
        pairs.final_latents = latents
        pairs.final_scores = scorer(latents[None], 0)[0] if final_scores is None else final_scores
    return pairs


def _collect_pairs(
    chain, scores, selection: PairSelection, timesteps: list[int], prompts: list[str]
) -> list[StepPairs]:
    """The valid pairs of one branch, one [`StepPairs`] per transition. `chain`: latents `(K, B, ...)` per state."""
    rows = selection.valid.nonzero(as_tuple=True)[0]
    chosen, rejected = selection.chosen[rows], selection.rejected[rows]
    names = [prompts[i] for i in rows.tolist()]
    return [
        StepPairs(
            latents=before[chosen, rows],
            chosen_prev_latents=after[chosen, rows],
            rejected_latents=before[rejected, rows],
            rejected_prev_latents=after[rejected, rows],
            shared=torch.full_like(rows, inner == 0, dtype=torch.bool),
            timesteps=torch.full_like(rows, timestep),
            prompt_index=rows,
            chosen_scores=scores[chosen, rows],
            rejected_scores=scores[rejected, rows],
            prompts=names,
        )
        for inner, (before, after, timestep) in enumerate(zip(chain, chain[1:], timesteps, strict=False))
    ]
