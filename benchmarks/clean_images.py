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
What a step-aware reward should be taught at t = 0, measured in the shapes world: the images of a pair as they are, or what
the VAE makes of them. SPO asks it at t = 0 about decoded latents.

```shell
python benchmarks/clean_images.py --json clean_images.json
```

Two rewards start from one CLIP and see the same 1,200 noisy preferences, timesteps and noises; they differ in what they see
of the pairs that are drawn at t = 0, which is every second one. Twice: with pairs that the base model sampled, which have
been through its VAE already, as most of a dataset of generated images has, and with pairs that the world's renderer drew,
which have not, as photographs have not. Both are then asked about fresh pairs:

- **raw**: at t = 0, images as they are;
- **round trip**: at t = 0, encoded and decoded;
- **t = 1**, **t = 101**: predictions, as in a rollout;
- **samples**: at t = 0, decoded latents that the base model sampled, which is what SPO asks about.

A number is the share of pairs that a reward orders as the exact utility does, and as the annotator did, whose labels agree
with the utility about three times in four. Differences are paired by seed and pair; their standard errors are over both.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait stall a shared machine

import torch
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere

from benchmarks.compare.evaluate import two_way
from benchmarks.compare.methods import reward_config
from examples.shapes import world
from examples.shapes.base_scores import load_pipeline
from examples.shapes.preferences import make_preferences, preferences_from_images
from examples.shapes.settings import CLIP, REWARD_SETTINGS, SAMPLER
from trl_spo import StepAwareRewardModel, StepRewardTrainer, wrap_pipeline
from trl_spo.noised_pairs import noised_pairs
from trl_spo.preference_collator import StepPreferenceCollator


CLEAN = 2  # keeps the random numbers of round trips apart from those of training (0) and evaluation (1)
SMALL_TIMESTEPS = (1, 101)
# Half of the pairs are drawn at t = 0, many more than in a real run, so that an effect can be seen.
TIMESTEPS = [*[0] * 8, 1, 101, 201, 301, 401, 501, 601, 701]
KINDS = ("sampled", "rendered")


def round_trip(pipeline, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`): in [-1, 1].

    Returns:
        `torch.Tensor` of the same shape and range: what the VAE makes of them.
    """
    return pipeline.decode_latents(pipeline.encode_images(images, generator=generator)).clamp(-1, 1)


class RoundTripTrainer(StepRewardTrainer):
    """Scores pairs at t = 0 after a round trip through the VAE, as the public code trains. All else is the parent's."""

    def _score_pairs(self, model, inputs, timesteps, generator):
        rows = (timesteps == 0).nonzero().flatten()
        if len(rows) > 0:
            own = self._generator(CLEAN, self.state.global_step)
            inputs = dict(inputs)
            for name in ("images_0", "images_1"):
                inputs[name] = inputs[name].clone()
                with torch.no_grad():
                    inputs[name][rows] = round_trip(self.pipeline, inputs[name][rows], own)
        return super()._score_pairs(model, inputs, timesteps, generator)


ARMS = {"as they are": StepRewardTrainer, "round trip": RoundTripTrainer}


def rendered_preferences(num_pairs: int, split: str, seed: int):
    """Pairs of images that no VAE has seen: drawn, half of them dull, labelled by the same annotator."""
    pool, generator = world.captions(split), torch.Generator().manual_seed(seed)
    prompts = [pool[i] for i in torch.randint(len(pool), (num_pairs,), generator=generator).tolist()]
    images = [world.render(prompts, generator, dull=0.5) for _ in range(2)]
    return preferences_from_images(prompts, *images, seed=seed + 1)


def preferences(kind: str, pipeline, num_pairs: int, split: str, seed: int):
    if kind == "sampled":
        return make_preferences(pipeline.sd_pipeline, num_pairs, split=split, seed=seed)
    return rendered_preferences(num_pairs, split, seed)


def train(arm: str, pipeline, pairs, seed: int, steps: int) -> StepAwareRewardModel:
    """The reward of one arm, from the world's CLIP."""
    with tempfile.TemporaryDirectory() as folder:
        config = reward_config({**REWARD_SETTINGS, "timesteps": TIMESTEPS}, steps, seed, Path(folder))
        config.cache_latents = False  # it would keep round trips under the keys of the images they came from
        torch.manual_seed(seed)  # both arms begin with the same embedding of timesteps
        reward_model = StepAwareRewardModel.from_clip(CLIP, processor=CLIP)
        trainer = ARMS[arm](config, pipeline, reward_model, train_dataset=pairs)
        trainer.train()
    return trainer.model.eval()


class Questions(NamedTuple):
    """
    Pairs without ties as a reward is shown them, and which image of each is the better one.

    Attributes:
        prompts (`list[str]`): P texts.
        shown (`dict[str, tuple]`): by name, the timestep and two `torch.Tensor` of shape `(P, 3, 32, 32)` in [-1, 1].
        right (`dict[str, torch.Tensor]`): by `"utility"` and `"labels"`, whether the first image is the better one, `(P,)`.
    """

    prompts: list[str]
    shown: dict[str, tuple]
    right: dict[str, torch.Tensor]


@torch.no_grad()
def questions(pipeline, dataset) -> Questions:
    decided = [row for row in dataset if row["label_0"] != row["label_1"]]
    batch = StepPreferenceCollator(world.IMAGE_SIZE)(decided)
    prompts, images = batch["prompts"], (batch["images_0"], batch["images_1"])
    first, second = (world.utility(image / 2 + 0.5, prompts) for image in images)
    right = {"utility": first > second, "labels": batch["label_0"] > batch["label_1"]}
    generator = torch.Generator().manual_seed(0)
    shown = {"raw": (0, *images), "round trip": (0, *(round_trip(pipeline, image, generator) for image in images))}
    for timestep in SMALL_TIMESTEPS:
        steps = torch.full((len(prompts),), timestep)
        scale = SAMPLER["guidance_scale"]
        seen = noised_pairs(pipeline, batch, steps, scale, generator, prediction_batch_size=128)
        shown[f"t = {timestep}"] = (timestep, *seen)
    return Questions(prompts, shown, right)


@torch.no_grad()
def hits(reward_model, asked: Questions) -> dict[str, list[bool]]:
    """Whether a reward orders each pair as it should, by what it is shown and by who says so."""
    found = {}
    for name, (timestep, *pair) in asked.shown.items():
        steps = torch.full((len(asked.prompts),), timestep)
        first, second = (reward_model.score(image, asked.prompts, steps) for image in pair)
        for judge, right in asked.right.items():
            found[f"{name}, {judge}"] = ((first > second) == right).tolist()
    return found


def study(kinds: list[str], seeds: int, num_pairs: int, num_fresh: int, steps: int) -> dict:
    """Hits by kind of pairs, question and arm: one list per seed. The fresh pairs are the same for all seeds."""
    pipeline = wrap_pipeline(load_pipeline())
    asked = {kind: questions(pipeline, preferences(kind, pipeline, num_fresh, "validation", 100)) for kind in KINDS}
    samples = asked["sampled"]
    result: dict = {}
    for kind in kinds:
        for seed in range(seeds):
            pairs = preferences(kind, pipeline, num_pairs, "train", seed)
            for arm in ARMS:
                start = time.process_time()
                reward_model = train(arm, pipeline, pairs, seed, steps)
                found = hits(reward_model, asked[kind])
                if kind != "sampled":  # for those the raw images are the samples
                    only_samples = samples._replace(shown={"samples": samples.shown["raw"]})
                    found |= hits(reward_model, only_samples)
                for question, values in found.items():
                    result.setdefault(kind, {}).setdefault(question, {}).setdefault(arm, []).append(values)
                print(f"{kind}, seed {seed}, {arm}: {time.process_time() - start:.0f} CPU s", flush=True)
        print(table(summary({kind: result[kind]})), flush=True)
    return result


def summary(result: dict) -> dict:
    """Share of each arm, and the paired difference with its standard error, by kind and question."""
    rows: dict = {}
    for kind, questions in result.items():
        for question, arms in questions.items():
            values = {arm: torch.tensor(found).double() for arm, found in arms.items()}
            difference = two_way(values["round trip"] - values["as they are"])
            rows.setdefault(kind, {})[question] = {
                **{arm: found.mean().item() for arm, found in values.items()},
                "difference": difference["mean"],
                "se": difference["se"],
            }
    return rows


def table(rows: dict) -> str:
    lines = ["| taught with | asked about, against | as they are | round trip | difference |", "|---|---|---|---|---|"]
    for kind, questions in rows.items():
        for question, row in questions.items():
            shares = " | ".join(f"{row[arm]:.3f}" for arm in ARMS)
            lines.append(f"| {kind} pairs | {question} | {shares} | {row['difference']:+.3f} ± {row['se']:.3f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="Pairs to learn from.")
    parser.add_argument("--seeds", type=int, default=3, help="Trainings of each arm.")
    parser.add_argument("--num_pairs", type=int, default=1200, help="Pairs to learn from.")
    parser.add_argument("--num_fresh", type=int, default=1024, help="Pairs to be asked about.")
    parser.add_argument("--steps", type=int, default=75, help="Optimizer steps.")
    parser.add_argument("--json", type=Path, help="Where to write the numbers of the table.")
    args = parser.parse_args()
    logging.set_verbosity_error()
    rows = summary(study(args.kinds, args.seeds, args.num_pairs, args.num_fresh, args.steps))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
