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
How the comparison measures a model: exact scores of the shapes world, which no method trains on directly, learned rewards,
diversity, and standard errors that respect captions and training seeds.

A sample is an image of one caption from one fixed noise (a hash of caption and repeat), the same for every model. So
every difference to the base model, or between models, is paired.
"""

import itertools
import math
from typing import Any

import torch
from scipy.stats import t as student_t

from examples.shapes import world
from examples.shapes.base_scores import evaluation_set
from examples.shapes.preferences import _denoise, encode_prompts, sampling_dtype
from trl_spo.noised_pairs import noised_pairs
from trl_spo.preference_collator import StepPreferenceCollator
from trl_spo.sampling import score_images


STEPS = 10
ETA = 1.0
EXACT = ("utility", "aesthetics", "alignment")


@torch.no_grad()
def sample(
    pipeline, prompts: list[str], seeds: list[int], guidance_scale: float = 1.0, batch_size: int = 106
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Images as [`examples.shapes.preferences.sample_images`] draws them (DDIM, 10 steps, eta 1, its autocast), with
    their latents.

    Returns:
        `tuple`: images `(N, 3, 32, 32)` in [0, 1] and final latents `(N, 4, 8, 8)`, float32.
    """
    states, empty = encode_prompts(pipeline, prompts), encode_prompts(pipeline, [""])
    dtype = sampling_dtype()
    images = []
    latents = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        context = states[rows]
        if guidance_scale != 1:
            context = torch.cat([empty.expand_as(context), context])
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            final = _denoise(pipeline, context, seeds[rows], STEPS, guidance_scale, ETA)
            decoded = pipeline.vae.decode(final / pipeline.vae.config.scaling_factor).sample
        latents.append(final.float())
        images.append((decoded.float() / 2 + 0.5).clamp(0, 1))
    return torch.cat(images).contiguous(), torch.cat(latents).contiguous()


def exact_scores(images: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
    """`utility`, `aesthetics` and `alignment` of N images, each `(N,)`."""
    aesthetics, alignment = world.aesthetics_score(images), world.alignment_score(images, prompts)
    weights = world.UTILITY_WEIGHTS
    utility = weights["aesthetics"] * aesthetics + weights["alignment"] * alignment
    return {"utility": utility, "aesthetics": aesthetics, "alignment": alignment}


def pairwise_distance(values: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """
    Diversity: for each caption the mean over pairs of its samples of their root mean square difference.

    Args:
        values (`torch.Tensor` of shape `(N, ...)`): images or latents.
        prompts (`list[str]`): N captions, each at least twice.

    Returns:
        `torch.Tensor` of shape `(C,)`, in the order in which captions first appear.
    """
    values = values.flatten(1).double()
    result = []
    for caption in dict.fromkeys(prompts):
        rows = [i for i, prompt in enumerate(prompts) if prompt == caption]
        pairs = [(values[i] - values[j]).square().mean().sqrt() for i, j in itertools.combinations(rows, 2)]
        result.append(torch.stack(pairs).mean())
    return torch.stack(result)


class Evaluation:
    """
    A fixed set of samples.

    Args:
        split (`str`): `"validation"` or `"heldout"`.
        repeats (`int`): samples per caption.
    """

    def __init__(self, split: str, repeats: int):
        self.split = split
        self.repeats = repeats
        self.prompts, self.seeds = evaluation_set(split, repeats)

    def by_caption(self, values) -> list[list[float]]:
        """`(N,)` values in the order of the set, as rows of captions and columns of repeats."""
        return torch.as_tensor(values, dtype=torch.float64).view(self.repeats, -1).T.tolist()

    def __call__(self, pipeline, reward: Any = None, guidance_scale: float = 1.0) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict`: `images`, and per sample `utility`, `aesthetics`, `alignment`, and `reward` of a reward model; per
            caption `diversity` (of images) and `latent_diversity`.
        """
        images, latents = sample(pipeline, self.prompts, self.seeds, guidance_scale)
        result = {"images": images, **self.score(images, reward)}
        if self.repeats > 1:
            result["diversity"] = pairwise_distance(images, self.prompts)
            result["latent_diversity"] = pairwise_distance(latents, self.prompts)
        return result

    def score(self, images: torch.Tensor, reward: Any = None) -> dict[str, torch.Tensor]:
        scores = exact_scores(images, self.prompts)
        if reward is not None:
            scores["reward"] = score_images(images, self.prompts, reward, batch_size=106)
        return scores


@torch.no_grad()
def label_accuracy(pipeline, reward_model, dataset, timesteps: list[int], batch_size: int = 64) -> dict[str, dict]:
    """
    How often a reward model orders pairs as the annotator did, and as the exact utility does, when both images of a pair
    are predicted from one timestep and one noise, as in its training. Ties are left out.

    Args:
        pipeline ([`SPOPipeline`]): makes the predictions; the base model.
        dataset (`datasets.Dataset`): pairs of `examples.shapes.preferences`.

    Returns:
        `dict`: by timestep (as text) `labels` and `utility`, the two shares, and `pairs`, their number.
    """
    collator = StepPreferenceCollator(world.IMAGE_SIZE)
    agree, exact = ({timestep: [] for timestep in timesteps} for _ in range(2))
    for start in range(0, len(dataset), batch_size):
        batch = collator([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
        prompts = batch["prompts"]
        decided = batch["label_0"] != batch["label_1"]
        utilities = [world.utility(batch[f"images_{i}"] / 2 + 0.5, prompts) for i in (0, 1)]
        for timestep in timesteps:
            steps = torch.full((len(prompts),), timestep, dtype=torch.long)
            generator = torch.Generator().manual_seed(start)
            images = noised_pairs(pipeline, batch, steps, guidance_scale=1.0, generator=generator)
            scores = [reward_model.score(image, prompts, steps) for image in images]
            first = (scores[0] > scores[1])[decided]
            agree[timestep].append(first == (batch["label_0"] > batch["label_1"])[decided])
            exact[timestep].append(first == (utilities[0] > utilities[1])[decided])
    result = {}
    for timestep in timesteps:
        labels, utility = (torch.cat(found[timestep]).double() for found in (agree, exact))
        result[str(timestep)] = {
            "labels": labels.mean().item(),
            "utility": utility.mean().item(),
            "pairs": len(labels),
        }
    return result


@torch.no_grad()
def prediction_order(pipeline, reward_models: dict, dataset, timesteps: list[int], batch_size: int = 64) -> dict:
    """
    How often reward models order two predictions of x_0 as the exact scores *of these predictions* do; this is what a
    rollout asks them. ([`label_accuracy`] asks for the order of the finished images, which is what they are taught.)

    Args:
        pipeline ([`SPOPipeline`]): makes the predictions; the base model.
        reward_models (`dict[str, StepAwareRewardModel]`): by name.
        dataset (`datasets.Dataset`): pairs of `examples.shapes.preferences`.

    Returns:
        `dict`: by name and timestep (as text) the shares for `aesthetics` and `alignment`, and `pairs`, their number.
    """
    collator = StepPreferenceCollator(world.IMAGE_SIZE)
    agree: dict = {}
    for start in range(0, len(dataset), batch_size):
        batch = collator([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
        prompts = batch["prompts"]
        for timestep in timesteps:
            steps = torch.full((len(prompts),), timestep, dtype=torch.long)
            generator = torch.Generator().manual_seed(start)
            images = noised_pairs(pipeline, batch, steps, guidance_scale=1.0, generator=generator)
            exact = [exact_scores((image / 2 + 0.5).clamp(0, 1), prompts) for image in images]
            for name, model in reward_models.items():
                scores = [model.score(image, prompts, steps) for image in images]
                for metric in ("aesthetics", "alignment"):
                    same = (scores[0] > scores[1]) == (exact[0][metric] > exact[1][metric])
                    agree.setdefault(name, {}).setdefault(str(timestep), {}).setdefault(metric, []).append(same)
    return {
        name: {
            timestep: {
                **{metric: torch.cat(found).double().mean().item() for metric, found in shares.items()},
                "pairs": len(dataset),
            }
            for timestep, shares in by_step.items()
        }
        for name, by_step in agree.items()
    }


# ------------------------------------------------------------------------------------------------------- statistics


def two_way(values: torch.Tensor) -> dict[str, float]:
    r"""
    Mean of scores of training seeds on captions, with the standard error over both.

    The model is that of two crossed random effects: seeds and captions are drawn, `y_sc = mu + a_s + b_c + e_sc` with
    independent terms of variance A, B, E. Then, over S seeds and C captions,

        Var(mean) = A / S + B / C + E / (S C).

    The mean squares of rows, `MS_s = C sum_s (y_s. - y..)^2 / (S - 1)`, of columns, `MS_c`, and of what is left, `MS_e`,
    have the expectations E + C A, E + S B and E. So

        (MS_s + MS_c - MS_e) / (S C)

    is an unbiased estimate of Var(mean). An estimate of A or B may come out below zero; it is then set to zero (its mean
    square is replaced by MS_e), so the estimate is never below MS_e / (S C), and errs on the safe side. Degrees of
    freedom are Satterthwaite's, of the sum of mean squares that is left.

    With one seed, A cannot be seen: the error is that over captions, `seeds` says 1, and it is too small.

    Args:
        values (`torch.Tensor` of shape `(S, C)`): mean score of each training seed on each caption; or the difference
            of two models', paired by seed, caption and noise.

    Returns:
        `dict`: `mean`, `se`, `low` and `high` (95% interval of Student's t), `df`, `seeds`, `captions`, and the standard
        deviations `sd_seeds` (root of A), `sd_captions` (root of B).
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    seeds, captions = values.shape
    mean = values.mean().item()
    nan = float("nan")
    if captions < 2:
        raise ValueError(f"Need two captions at least, got {captions}.")

    # Mean squares and degrees of freedom, see above; with one seed, those over captions alone.
    columns = values.mean(0)
    if seeds == 1:
        variance = columns.var().item() / captions
        df = captions - 1
        sds = (nan, columns.std().item())
    else:
        rows = values.mean(1)
        rest = values - rows[:, None] - columns[None] + mean
        ms_s = captions * rows.var().item()
        ms_c = seeds * columns.var().item()
        ms_e = rest.square().sum().item() / ((seeds - 1) * (captions - 1))
        sds = [math.sqrt(max(ms - ms_e, 0) / n) for ms, n in ((ms_s, captions), (ms_c, seeds))]
        terms = [(ms_s, seeds - 1), (ms_c, captions - 1), (-ms_e, (seeds - 1) * (captions - 1))]
        if ms_s < ms_e:
            terms = [terms[1]]
        if ms_c < ms_e:
            terms = [terms[0]] if len(terms) == 3 else [(ms_e, (seeds - 1) * (captions - 1))]
        total = sum(ms for ms, _ in terms)
        variance = total / (seeds * captions)
        spread = sum(ms**2 / n for ms, n in terms)
        df = max(1, round(total**2 / spread)) if spread else captions - 1

    # Student's interval from the estimated variance.
    se = math.sqrt(variance)
    reach = float(student_t.ppf(0.975, df)) * se
    return {
        "mean": mean,
        "se": se,
        "low": mean - reach,
        "high": mean + reach,
        "df": df,
        "seeds": seeds,
        "captions": captions,
        "sd_seeds": sds[0],
        "sd_captions": sds[1],
    }


def interpolate(compute: list[float], scores: list[float], at: float) -> float:
    """A curve's score at some compute, linearly between its points; `nan` beyond its end."""
    if at > compute[-1] * 1.0001:
        return float("nan")
    for (x0, y0), (x1, y1) in itertools.pairwise(zip(compute, scores, strict=True)):
        if at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return scores[-1]


def compute_to_reach(
    curves: list[tuple[list[float], list[float]]],
    rivals: list[tuple[list[float], list[float]]],
    budget: float,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """
    How much compute a method needs for what a rival scores at `budget`: where its mean curve over seeds, linear between
    the points, first gets there; infinite if it never does.

    Seeds of both are resampled for the uncertainty (bootstrap over training seeds; captions are the same for both and
    are not resampled). A resample that never reaches the target counts as infinitely much.

    Args:
        curves, rivals (list of `(compute, scores)`): one curve per seed, each from compute 0 on.
        budget (`float`): compute at which the rival's score is read.

    Returns:
        `dict`: `compute`, `low`, `high` (5% and 95% of the resamples), `ratio` = budget / compute with `ratio_low`,
        `ratio_high`, `reached` (share of resamples that reach it), `target`.
    """
    # Curves on one grid, and the scores of the rival at the budget.
    shortest = min(x[-1] for x, _ in curves)
    grid = torch.linspace(0, shortest, 401, dtype=torch.float64)
    table = torch.tensor([[interpolate(x, y, at) for at in grid.tolist()] for x, y in curves], dtype=torch.float64)
    targets = torch.tensor([interpolate(x, y, min(budget, x[-1])) for x, y in rivals], dtype=torch.float64)

    # Resample the seeds of both; the first row is the estimate itself.
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(len(curves), (draws, len(curves)), generator=generator)
    other = torch.randint(len(rivals), (draws, len(rivals)), generator=generator)
    means = torch.cat([table.mean(0)[None], table[own].mean(1)])  # (1 + draws, grid); the first is not a resample
    goals = torch.cat([targets.mean()[None], targets[other].mean(1)])

    # Where each mean curve first reaches its goal, linear between points of the grid.
    above = means >= goals[:, None]
    first = above.int().argmax(1)
    rows = torch.arange(len(means))
    before = (first - 1).clamp(min=0)
    rise = means[rows, first] - means[rows, before]
    share = torch.where(rise > 0, (goals - means[rows, before]) / rise, 0.0)
    reach = torch.where(above.any(1), torch.lerp(grid[before], grid[first], share.clamp(0, 1)), torch.inf)
    point = reach[0].item()
    found = sorted(reach[1:].tolist())
    low, high = found[int(0.05 * draws)], found[min(draws - 1, int(0.95 * draws))]
    return {
        "compute": point,
        "low": low,
        "high": high,
        "ratio": budget / point if point else math.inf,
        "ratio_low": budget / high if high else math.inf,
        "ratio_high": budget / low if low else math.inf,
        "reached": sum(math.isfinite(value) for value in found) / draws,
        "target": targets.mean().item(),
    }
