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

r"""
Latent rewards against pixel rewards in the shapes world, on its UNet and on its flow-matching model: what they know, by
timestep, and what SPO's loop makes of them.

```shell
python benchmarks/latent_rewards.py --model unet --output latent_output
python benchmarks/latent_rewards.py --model flow --output latent_output
python benchmarks/latent_rewards.py --table latent_output > table.md
```

All rewards are taught by the same 2,400 noisy preferences. What is measured:

- **labels**: fresh pairs, both images noised to a timestep with one noise: how often a reward prefers the image that the
  annotator preferred. His labels agree with the truth about three times in four, which bounds this.
- **candidates**: two candidates x_{t-1} of one latent, as a rollout draws them. Both are finished without further noise, and
  the exact utility of the finished images says which is the better one. How often a reward agrees.
- **training**: SPO's loop with each reward up to the same number of UNet evaluations. A unit is one sample forward through
  the whole denoiser; a backward pass counts as two, and half a UNet of a latent reward as the share of its arithmetic. What a
  pixel reward adds (decoder, CLIP) is not in this number; CPU seconds count everything, and one more run with the pixel
  reward ends at about the CPU seconds of the latent one. The checkpoint with the best utility on validation captions is
  measured on held-out captions.

The work is cut into pieces, each with a file of its own; what is there is not done again.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait stall a shared machine

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere

from benchmarks.compare.evaluate import exact_scores, two_way
from benchmarks.compare.methods import Meter, Recorder, restore_adapter, reward_config, train_spo
from examples.shapes import world
from examples.shapes.base_scores import evaluation_set, load_flow_pipeline, load_pipeline
from examples.shapes.preferences import make_preferences
from examples.shapes.settings import (
    CLIP,
    FLOW_REWARD_SETTINGS,
    FLOW_SPO_SETTINGS,
    LATENT_REWARD_STEPS,
    REWARD_SETTINGS,
    REWARD_STEPS,
    SAMPLER,
    SPO_SETTINGS,
    latent_reward_settings,
    latent_spo_settings,
)
from trl_spo import (
    LatentRewardModel,
    StepAwareRewardModel,
    StepRewardTrainer,
    wrap_pipeline,
    wrap_reward,
)
from trl_spo.noised_pairs import noised_pairs
from trl_spo.preference_collator import StepPreferenceCollator
from trl_spo.preference_filters import GapRule, filter_consistent_pairs
from trl_spo.rewards.base import load_reward_model
from trl_spo.sampling import generate_images


SEEDS = (0, 1, 2)
BUDGET = 24_000  # UNet evaluations of one run
MARKS = [BUDGET * i // 6 for i in range(1, 7)]
REWARDS = ("pixel", "latent", "latent_filtered")
EQUAL_TIME = "SPO, pixel reward, about the CPU time of LPO"
MARKS_OF_EQUAL_TIME = {"unet": 4, "flow": 3}  # after which that time has passed
ARMS = {  # name: reward, fields of SPOConfig that differ
    "SPO, pixel reward": ("pixel", {}),
    EQUAL_TIME: ("pixel", {}),
    "LPO, steps 0 to 3": ("latent", {"branch_end_step": 4}),
    "LPO, steps 0 to 7": ("latent", {"branch_end_step": 8}),
    "LPO, steps 0 to 3, filtered pairs": ("latent_filtered", {"branch_end_step": 4}),
}
NUM_CANDIDATE_PROMPTS = 256


def load(model: str):
    """The base model, wrapped."""
    return wrap_pipeline(load_flow_pipeline() if model == "flow" else load_pipeline())


def piece(path: Path, make: Callable, *args) -> dict:
    """What is in the file, or what `make(*args)` returns, written there."""
    if path.exists():
        return json.loads(path.read_text())
    start = time.time()
    result = make(*args)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(result, indent=1))
    aside.rename(path)
    print(f"{path.name}: {time.time() - start:.0f} s", flush=True)
    return result


# --- rewards ---------------------------------------------------------------------------------------------------------


def consistent(pairs):
    """The pairs with which the world's CLIP agrees, and how many these are."""
    clip = StepAwareRewardModel.from_clip(CLIP, processor=CLIP).eval()

    def clip_score(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return clip.score(images * 2 - 1, prompts)

    return filter_consistent_pairs(
        pairs, {"clip": clip_score}, {"clip": GapRule(0.0, 0.5)}, batch_size=128, resolution=world.IMAGE_SIZE
    )


def untrained_reward(kind: str, model: str, pipeline) -> tuple:
    """
    A reward before its training, and how it is trained.

    Args:
        kind (`str`): `"step"`, step-aware; `"clean"`, of finished images; `"latent"`, of noisy latents.
        model (`str`): `"unet"` or `"flow"`.

    Returns:
        `tuple`: the reward model, fields of [`StepRewardConfig`], and the number of optimizer steps.
    """
    if kind == "latent":
        reward_model = LatentRewardModel.from_pipeline(pipeline, guidance_scale=1.0)
        return reward_model, latent_reward_settings(model), LATENT_REWARD_STEPS
    settings = FLOW_REWARD_SETTINGS if model == "flow" else REWARD_SETTINGS
    reward_model = StepAwareRewardModel.from_clip(CLIP, processor=CLIP, step_conditioning=kind == "step")
    return reward_model, {**settings, "timesteps": [0]} if kind == "clean" else settings, REWARD_STEPS


def train_reward(kind: str, model: str, pipeline, pairs, seed: int, folder: Path) -> dict:
    """Trains and saves one of `REWARDS`; returns what it cost."""
    torch.manual_seed(seed)  # new layers are random, and every process has a seed of its own
    counts = {}
    if kind == "latent_filtered":
        pairs, counts = consistent(pairs)
    reward_model, settings, steps = untrained_reward("step" if kind == "pixel" else "latent", model, pipeline)
    config = reward_config(settings, steps, seed, folder)
    trainer = StepRewardTrainer(config, pipeline, reward_model, train_dataset=pairs)
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    trainer.save_model()
    return {"cpu_seconds": seconds, "counts": counts}


@torch.no_grad()
def label_accuracy(pipeline, reward_model, dataset, timesteps: list[int]) -> dict[str, dict]:
    """Share of decided pairs that a reward orders as the annotator did, by timestep."""
    reward = wrap_reward(reward_model)
    collator = StepPreferenceCollator(world.IMAGE_SIZE)
    agree = {timestep: [] for timestep in timesteps}
    for start in range(0, len(dataset), 64):
        batch = collator([dataset[i] for i in range(start, min(start + 64, len(dataset)))])
        decided = batch["label_0"] != batch["label_1"]
        preferred = (batch["label_0"] > batch["label_1"])[decided]
        text = reward.encode_prompts(batch["prompts"])
        for timestep in timesteps:
            steps = torch.full((len(decided),), timestep, dtype=torch.long)
            generator = torch.Generator().manual_seed(start)
            samples = noised_pairs(
                pipeline, batch, steps, SAMPLER["guidance_scale"], generator=generator, sees=reward.sees
            )
            first, second = (reward.score(part, text, steps) for part in samples)
            agree[timestep].append((first > second)[decided] == preferred)
    return {str(timestep): share(torch.cat(found)) for timestep, found in agree.items()}


def share(hits: torch.Tensor) -> dict:
    mean = hits.double().mean().item()
    return {"share": mean, "se": math.sqrt(mean * (1 - mean) / len(hits)), "count": len(hits)}


@torch.no_grad()
def candidate_accuracy(pipeline, rewards: dict, seed: int) -> dict[str, dict]:
    """
    Share of candidate pairs that rewards order as the exact scores of the finished images do: by reward, own timestep of
    the candidates, and score (utility, aesthetics, alignment).
    """
    steps = SAMPLER["num_inference_steps"]
    scale = SAMPLER["guidance_scale"]
    prompts = list(world.captions("validation"))
    prompts = [prompts[i % len(prompts)] for i in range(NUM_CANDIDATE_PROMPTS)]
    generator = torch.Generator().manual_seed(seed)
    rewards = {name: wrap_reward(reward) for name, reward in rewards.items()}
    timesteps = [*pipeline.set_timesteps(steps, pipeline.latent_shape()), 0]
    embeds = pipeline.encode_prompt(prompts)
    texts = {name: reward.encode_prompts(prompts) for name, reward in rewards.items()}
    latents = pipeline.prepare_latents(len(prompts), generator)
    result = {name: {} for name in rewards}
    for i in range(steps - 2):  # the last steps decide nothing
        output = pipeline.predict(latents, timesteps[i], embeds, scale)
        mean, std, _ = pipeline.step_distribution(output, timesteps[i], latents, 1.0)
        candidates = [mean + std * torch.randn(mean.shape, generator=generator) for _ in range(2)]
        exact = [exact_scores(finished(pipeline, c, timesteps, i + 1, embeds, scale), prompts) for c in candidates]
        for name, reward in rewards.items():
            scores = [
                seen_score(pipeline, reward, c, texts[name], timesteps[i + 1], embeds, scale) for c in candidates
            ]
            first = scores[0] > scores[1]
            result[name][str(timesteps[i + 1])] = {
                metric: share(first == (exact[0][metric] > exact[1][metric])) for metric in exact[0]
            }
        latents = candidates[0]
    return result


def finished(pipeline, latents, timesteps: list[int], step: int, embeds, scale: float) -> torch.Tensor:
    """Images in [0, 1] of latents that are taken to the end without noise."""
    for timestep in timesteps[step:-1]:
        output = pipeline.predict(latents, timestep, embeds, scale)
        latents = pipeline.step_distribution(output, timestep, latents, 0.0)[0]
    return (pipeline.decode_latents(latents) / 2 + 0.5).clamp(0, 1)


def seen_score(pipeline, reward, latents, text, timestep: int, embeds, scale: float) -> torch.Tensor:
    """What a reward says of candidates at their own timestep."""
    steps = torch.full((len(latents),), timestep, dtype=torch.long)
    if reward.sees == "noisy_latents":
        return reward.score(latents, text, steps)
    predicted = pipeline.predict_original_sample(latents, steps, embeds, scale)
    return reward.score(pipeline.decode_latents(predicted), text, steps)


# --- training --------------------------------------------------------------------------------------------------------


class EquivalentMeter(Meter):
    """A [`Meter`] that also counts the backbone of a latent reward, by its share of the arithmetic of the denoiser."""

    def __init__(self, denoiser: torch.nn.Module, backbone: torch.nn.Module | None = None, weight: float = 0.0):
        super().__init__(denoiser)
        self.weight = weight
        self._extra = None if backbone is None else backbone.register_forward_hook(self._count_backbone)

    def _count_backbone(self, module, inputs, output):
        if not self._paused:
            features = output if isinstance(output, list) else output.image  # of a UNet, of a transformer
            self.forward += self.weight * len(features[0])

    def close(self):
        super().close()
        if self._extra is not None:
            self._extra.remove()


@torch.no_grad()
def arithmetic_share(pipeline, reward) -> float:
    """Arithmetic of a latent reward per sample, in denoiser calls."""
    embeds = pipeline.encode_prompt([""])
    pipeline.set_timesteps(SAMPLER["num_inference_steps"], pipeline.latent_shape())
    latents = pipeline.prepare_latents(1, torch.Generator().manual_seed(0))
    text = reward.encode_prompts([""])
    timestep = torch.tensor([501])
    counts = []
    for call in (
        lambda: pipeline.predict(latents, timestep, embeds, pipeline.unguided_scale),
        lambda: reward.score(latents, text, timestep),
    ):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops())
    return counts[1] / counts[0]


def scores_of(pipeline, split: str, repeats: int) -> dict[str, torch.Tensor]:
    prompts, seeds = evaluation_set(split, repeats)
    images = generate_images(pipeline, prompts, seeds=seeds, **SAMPLER, batch_size=106)
    return exact_scores(images, prompts)


def settings_of(model: str, reward: str, changes: dict) -> dict:
    base = FLOW_SPO_SETTINGS if model == "flow" else SPO_SETTINGS
    base = base if reward == "pixel" else latent_spo_settings(model)
    return {**base, **changes}


def train(model: str, arm: str, seed: int, reward_model, tuned: dict) -> dict:
    """One run: validation scores at every mark, and the held-out scores of the best of them."""
    kind, changes = ARMS[arm]
    marks = MARKS[: MARKS_OF_EQUAL_TIME[model]] if arm == EQUAL_TIME else MARKS
    pipeline = load(model)
    reward = wrap_reward(reward_model)
    reward.check_pipeline(pipeline)
    weight = arithmetic_share(pipeline, reward) if kind != "pixel" else 0.0

    def validate() -> dict:
        scores = scores_of(pipeline, "validation", 2)
        return {name: values.mean().item() for name, values in scores.items()}

    backbone = reward_model.backbone if kind != "pixel" else None
    meter = EquivalentMeter(pipeline.denoiser, backbone, weight)
    recorder = Recorder(pipeline.denoiser, marks, validate, meter)
    with tempfile.TemporaryDirectory() as folder:
        train_spo(pipeline, recorder, reward_model, seed, {**settings_of(model, kind, changes), **tuned}, Path(folder))
    recorder.meter.close()
    best = max(range(len(recorder.points)), key=lambda i: recorder.points[i]["utility"])
    restore_adapter(pipeline.denoiser, recorder.states[best])
    heldout = scores_of(pipeline, "heldout", 3)
    values = {name: by_caption(values) for name, values in heldout.items()}
    return {"points": recorder.points, "best": best, "weight": weight, "heldout": values}


def by_caption(values: torch.Tensor) -> list[float]:
    """Means over the repeats of a caption."""
    return values.view(3, -1).double().mean(0).tolist()


def study(model: str, output: Path, tuned: dict) -> None:
    """All pieces of one model."""
    pipeline = load(model)
    folder = output / model
    piece(folder / "base.json", base_scores, pipeline)
    for seed in SEEDS:
        rewards = study_rewards(model, pipeline, seed, folder)
        piece(folder / f"candidates_{seed}.json", candidate_accuracy, pipeline, rewards, seed)
        for arm, (kind, _) in ARMS.items():
            settings = tuned.get(kind.split("_")[0], {})
            piece(folder / f"run_{file_name(arm)}_{seed}.json", train, model, arm, seed, rewards[kind], settings)


def study_rewards(model: str, pipeline, seed: int, folder: Path) -> dict:
    """The rewards of one seed, trained or loaded, and what they know of labels."""
    fresh = make_preferences(pipeline_of(pipeline, model), 512, split="validation", seed=100)
    places = {kind: folder / f"reward_{kind}_{seed}" for kind in REWARDS}
    if not all(place.with_suffix(".json").exists() for place in places.values()):
        pairs = make_preferences(pipeline_of(pipeline, model), 2400, split="train", seed=seed)
        for kind, place in places.items():
            piece(place.with_suffix(".json"), train_reward, kind, model, pipeline, pairs, seed, place)
    rewards = {}
    timesteps = latent_reward_settings(model)["timesteps"]
    for kind, place in places.items():
        rewards[kind] = load_reward_model(place).eval().requires_grad_(False)
        wrap_reward(rewards[kind]).check_pipeline(pipeline)
        piece(folder / f"labels_{kind}_{seed}.json", label_accuracy, pipeline, rewards[kind], fresh, timesteps)
    return rewards


def base_scores(pipeline) -> dict[str, list[float]]:
    """Held-out scores of the base model, by caption."""
    return {name: by_caption(values) for name, values in scores_of(pipeline, "heldout", 3).items()}


def file_name(arm: str) -> str:
    return arm.lower().replace(",", "").replace(" ", "_")


def pipeline_of(pipeline, model: str):
    """What the preferences of the world are drawn from: the diffusers pipeline, or the wrapped flow model."""
    return pipeline if model == "flow" else pipeline.sd_pipeline


# --- tables ----------------------------------------------------------------------------------------------------------


def read(folder: Path, name: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}_[0-9].json"))]


def cell(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f}" if values else "-"


def reward_table(folder: Path) -> list[str]:
    """Shares by timestep, means over seeds."""
    lines = []
    labels = {kind: read(folder, f"labels_{kind}") for kind in REWARDS}
    candidates = read(folder, "candidates")
    timesteps = list(labels["latent"][0])
    lines += ["| " + " | ".join(["labels", *timesteps]) + " |", "|---" * (1 + len(timesteps)) + "|"]
    for kind, runs in labels.items():
        lines.append("| " + " | ".join([kind, *(cell([run[t]["share"] for run in runs]) for t in timesteps)]) + " |")
    for metric in ("utility", "aesthetics", "alignment"):
        steps = list(candidates[0]["latent"])
        lines += ["", "| " + " | ".join([f"candidates by {metric}", *steps]) + " |", "|---" * (1 + len(steps)) + "|"]
        for kind in REWARDS:
            cells = (cell([run[kind][t][metric]["share"] for run in candidates]) for t in steps)
            lines.append("| " + " | ".join([kind, *cells]) + " |")
    return lines


def training_table(folder: Path) -> list[str]:
    """Held-out differences to the base model, standard errors over captions and seeds; CPU seconds to the best mark."""
    base = json.loads((folder / "base.json").read_text())
    lines = [
        "| | utility | aesthetics | alignment | UNet evaluations | CPU seconds | CPU seconds to the whole budget |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        runs = read(folder, f"run_{file_name(arm)}")
        if not runs:
            continue
        cells = [arm]
        for metric in ("utility", "aesthetics", "alignment"):
            change = torch.tensor([run["heldout"][metric] for run in runs]) - torch.tensor(base[metric])
            found = two_way(change)
            cells.append(f"{found['mean']:+.3f} ± {found['se']:.3f}")
        best = [run["points"][run["best"]] for run in runs]
        cells.append(f"{sum(point['evaluations'] for point in best) / len(best):,.0f}")
        cells.append(f"{sum(point['cpu_seconds'] for point in best) / len(best):.0f}")
        cells.append(f"{sum(run['points'][-1]['cpu_seconds'] for run in runs) / len(runs):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def curve_table(folder: Path) -> list[str]:
    """Validation utility at every mark, means over seeds."""
    lines = [
        "| UNet evaluations | " + " | ".join(f"{mark:,}" for mark in MARKS) + " |",
        "|---" * (1 + len(MARKS)) + "|",
    ]
    for arm in ARMS:
        runs = read(folder, f"run_{file_name(arm)}")
        cells = []
        for mark in MARKS:
            values = [point["utility"] for run in runs for point in run["points"] if point["mark"] == mark]
            cells.append(cell(values))
        lines.append("| " + " | ".join([arm, *cells]) + " |")
    return lines


def tables(output: Path) -> str:
    parts = []
    for model in ("unet", "flow"):
        folder = output / model
        if not (folder / "base.json").exists():
            continue
        parts.append(f"## {model}")
        if (folder / "candidates_0.json").exists():  # a study that goes on may not have come so far
            parts += [*reward_table(folder), ""]
        parts += [*training_table(folder), "", *curve_table(folder), ""]
    return "\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=["unet", "flow"], default="unet")
    parser.add_argument("--output", type=Path, default=Path("latent_output"))
    parser.add_argument(
        "--tuned", type=json.loads, default={}, help="JSON: fields of SPOConfig by reward, pixel or latent."
    )
    parser.add_argument("--table", type=Path, help="Print the tables of this folder, and do nothing else.")
    args = parser.parse_args()
    if args.table is not None:
        print(tables(args.table))
        return
    logging.set_verbosity_error()
    study(args.model, args.output, args.tuned)


if __name__ == "__main__":
    main()
