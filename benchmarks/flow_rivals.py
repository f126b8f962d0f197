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
SPO and LPO against Flow-GRPO, DiffusionNFT and Diffusion-DPO on the flow-matching model of the shapes world.

```shell
python benchmarks/flow_rivals.py --output rivals_output
python benchmarks/flow_rivals.py --output rivals_output --table
```

All start from one base model with one adapter and one optimizer, and learn from the same 2,400 noisy preferences: Diffusion-DPO
from the pairs themselves, SPO from a step-aware reward, LPO from a latent reward, Flow-GRPO and DiffusionNFT from a reward of
finished images, which is trained for as many steps as the step-aware one. Every method has the same number of settings to try
(`SWEEPS`), judged by the utility of its best checkpoint on validation captions, with a training seed of its own. Then each is
trained with the settings that were best, over training seeds, up to the same number of UNet-equivalent evaluations: one sample
forward through the denoiser is one, a backward pass counts as two, the backbone of a latent reward as its share of the
arithmetic. The checkpoint with the best utility on validation captions is measured on held-out captions.

Each piece of work leaves a file; what is there is not done again.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait stall a shared machine

import torch
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere

from benchmarks.compare.evaluate import two_way
from benchmarks.compare.methods import DiffusionDPO, Meter, Recorder, restore_adapter, reward_config, train_spo
from benchmarks.compare.online import ONLINE, ONLINE_DEFAULTS
from benchmarks.compare.report import markdown
from benchmarks.latent_rewards import (
    EquivalentMeter,
    arithmetic_share,
    base_scores,
    by_caption,
    load,
    piece,
    scores_of,
    train_reward,
)
from examples.shapes.preferences import make_preferences
from examples.shapes.settings import CLIP, FLOW_REWARD_SETTINGS, FLOW_SPO_SETTINGS, REWARD_STEPS, latent_spo_settings
from trl_spo import StepAwareRewardModel, StepRewardTrainer, wrap_reward
from trl_spo.preference_collator import StepPreferenceCollator
from trl_spo.rewards.base import load_reward_model


BUDGET = 24_000
NUM_MARKS = 8
NUM_PAIRS = 2_400
SWEEP_SEED = 100
METRICS = ("utility", "aesthetics", "alignment")
REWARD_OF = {"spo": "pixel", "lpo": "latent", "grpo": "clean", "nft": "clean", "dpo": None}
TITLES = {
    "spo": "SPO, step-aware reward",
    "lpo": "LPO, latent reward",
    "grpo": "Flow-GRPO",
    "nft": "DiffusionNFT",
    "dpo": "Diffusion-DPO",
}
# As many trials for each method. What is not named is the method's default.
SWEEPS = {
    "spo": [
        {"learning_rate": 1e-3, "kl_coef": 1.5},
        {"learning_rate": 2e-3, "kl_coef": 1.5},
        {"learning_rate": 4e-3, "kl_coef": 1.5},
        {"learning_rate": 2e-3, "kl_coef": 6.0},
        {"learning_rate": 4e-3, "kl_coef": 6.0},
        {"learning_rate": 2e-3, "kl_coef": 1.5, "branch_start_step": 0, "branch_end_step": 6},
    ],
    "lpo": [
        {"learning_rate": 5e-4, "kl_coef": 12.0},
        {"learning_rate": 1e-3, "kl_coef": 12.0},
        {"learning_rate": 1e-3, "kl_coef": 1.5},
        {"learning_rate": 2e-3, "kl_coef": 6.0},
        {"learning_rate": 2e-3, "kl_coef": 1.5},
        {"learning_rate": 1e-3, "kl_coef": 6.0, "branch_end_step": 8},
    ],
    "grpo": [
        {"learning_rate": 1e-3},
        {"learning_rate": 4e-3},
        {"learning_rate": 2e-3, "window": 2},
        {"learning_rate": 4e-3, "window": 2},
        {"learning_rate": 4e-3, "sampler": "ddim", "eta": 1.0},
        {"learning_rate": 4e-3, "window": 2, "sampler": "ddim", "eta": 1.0},
    ],
    "nft": [
        {"learning_rate": 1e-3},
        {"learning_rate": 2e-3},
        {"learning_rate": 4e-3},
        {"learning_rate": 2e-3, "beta": 0.1},
        {"learning_rate": 4e-3, "beta": 0.1},
        {"learning_rate": 4e-3, "timesteps_per_image": 2},
    ],
    "dpo": [
        {"learning_rate": 2e-3, "beta": 300.0},
        {"learning_rate": 4e-3, "beta": 300.0},
        {"learning_rate": 4e-3, "beta": 100.0},
        {"learning_rate": 4e-3, "beta": 1000.0},
        {"learning_rate": 8e-3, "beta": 300.0},
        {"learning_rate": 2e-3, "beta": 100.0},
    ],
}


def full_settings(method: str, changes: dict) -> dict:
    """All settings of a method, with what differs from its defaults."""
    defaults = {
        "spo": FLOW_SPO_SETTINGS,
        "lpo": latent_spo_settings("flow"),
        "dpo": {"batch_size": 128},
        **ONLINE_DEFAULTS,
    }
    return {**defaults[method], **changes}


# --- what all learn from ---------------------------------------------------------------------------------------------


def train_clean_reward(pipeline, pairs, seed: int, folder: Path) -> dict:
    """A reward of finished images, which does not know about timesteps; returns what it cost."""
    torch.manual_seed(seed)
    reward_model = StepAwareRewardModel.from_clip(CLIP, processor=CLIP, step_conditioning=False)
    config = reward_config({**FLOW_REWARD_SETTINGS, "timesteps": [0]}, REWARD_STEPS, seed, folder)
    trainer = StepRewardTrainer(config, pipeline, reward_model, train_dataset=pairs)
    trainer.train()
    trainer.save_model()
    return {"counts": {}}


def rewards_of(seed: int, output: Path) -> dict:
    """The rewards of a seed, trained or loaded, by kind."""
    places = {kind: output / f"reward_{kind}_{seed}" for kind in ("pixel", "clean", "latent")}
    if not all(place.with_suffix(".json").exists() for place in places.values()):
        pipeline = load("flow")
        pairs = make_preferences(pipeline, NUM_PAIRS, split="train", seed=seed)
        for kind in ("pixel", "latent"):
            piece(places[kind].with_suffix(".json"), train_reward, kind, "flow", pipeline, pairs, seed, places[kind])
        piece(places["clean"].with_suffix(".json"), train_clean_reward, pipeline, pairs, seed, places["clean"])
    return {kind: load_reward_model(place).eval().requires_grad_(False) for kind, place in places.items()}


@torch.no_grad()
def encoded_pairs(pipeline, seed: int) -> dict:
    """The decided pairs of a seed, as `benchmarks.compare.methods.load_pairs` describes them."""
    dataset = make_preferences(pipeline, NUM_PAIRS, split="train", seed=seed)
    collator = StepPreferenceCollator(FLOW_REWARD_SETTINGS["resolution"])
    parts = {name: [] for name in ("chosen_mean", "chosen_std", "rejected_mean", "rejected_std")}
    prompts = []
    for start in range(0, len(dataset), 128):
        batch = collator([dataset[i] for i in range(start, min(start + 128, len(dataset)))])
        decided = (batch["label_0"] != batch["label_1"]).nonzero().flatten()
        first = (batch["label_0"] > batch["label_1"])[decided].view(-1, 1, 1, 1)
        images = [batch[f"images_{i}"][decided] for i in (0, 1)]
        for name, pixels in (("chosen", torch.where(first, *images)), ("rejected", torch.where(first, *images[::-1]))):
            mean, std = pipeline.image_posterior(pixels)
            parts[f"{name}_mean"].append(mean)
            parts[f"{name}_std"].append(std)
        prompts += [batch["prompts"][i] for i in decided.tolist()]
    return {"prompts": prompts, **{name: torch.cat(tensors) for name, tensors in parts.items()}}


# --- one run ---------------------------------------------------------------------------------------------------------


def validate(pipeline) -> dict[str, float]:
    return {name: values.mean().item() for name, values in scores_of(pipeline, "validation", 2).items()}


def meter_of(pipeline, method: str, reward_model) -> Meter:
    if method != "lpo":
        return Meter(pipeline.denoiser)
    reward = wrap_reward(reward_model)
    reward.check_pipeline(pipeline)  # from here on it reads the prompts as the pipeline has them, which costs nothing
    return EquivalentMeter(pipeline.denoiser, reward_model.backbone, arithmetic_share(pipeline, reward))


def run(method: str, changes: dict, seed: int, rewards: dict, with_heldout: bool) -> dict:
    """Trains one method with the settings within the budget, and measures it."""
    pipeline = load("flow")
    settings = full_settings(method, changes)
    reward_model = rewards.get(REWARD_OF[method])
    pairs = encoded_pairs(pipeline, seed) if method == "dpo" else None
    marks = [BUDGET * i // NUM_MARKS for i in range(1, NUM_MARKS + 1)]
    meter = meter_of(pipeline, method, reward_model)
    recorder = Recorder(pipeline.denoiser, marks, lambda: validate(pipeline), meter)
    if method in ONLINE:
        ONLINE[method](pipeline, reward_model, seed, settings).train(recorder)
    elif method == "dpo":
        DiffusionDPO(pipeline, pairs, seed, settings).train(recorder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            train_spo(pipeline, recorder, reward_model, seed, settings, Path(folder))
    meter.close()

    # The best checkpoint on validation captions is the one that is measured.
    best = max(range(len(recorder.points)), key=lambda i: recorder.points[i]["utility"])
    result = {"method": method, "settings": settings, "points": recorder.points, "best": best}
    if with_heldout:
        restore_adapter(pipeline.denoiser, recorder.states[best])
        pipeline.denoiser.eval()
        heldout = scores_of(pipeline, "heldout", 3)
        result["heldout"] = {name: by_caption(values) for name, values in heldout.items()}
    return result


def chosen_settings(output: Path, method: str) -> dict:
    """The settings of the sweep whose best checkpoint has the highest utility on validation captions."""
    trials = [json.loads((output / f"sweep_{method}_{i}.json").read_text()) for i in range(len(SWEEPS[method]))]
    best = max(range(len(trials)), key=lambda i: trials[i]["points"][trials[i]["best"]]["utility"])
    return SWEEPS[method][best]


def study(output: Path, seeds: list[int], methods: list[str]) -> None:
    piece(output / "base.json", lambda: base_scores(load("flow")))
    piece(output / "base_validation.json", lambda: validate(load("flow")))
    rewards = rewards_of(SWEEP_SEED, output)
    for i in range(max(map(len, SWEEPS.values()))):
        for method in methods:
            if i < len(SWEEPS[method]):
                place = output / f"sweep_{method}_{i}.json"
                piece(place, run, method, SWEEPS[method][i], SWEEP_SEED, rewards, False)
    for seed in seeds:
        rewards = rewards_of(seed, output)
        for method in methods:
            settings = chosen_settings(output, method)
            piece(output / f"run_{method}_{seed}.json", run, method, settings, seed, rewards, True)


# --- tables ----------------------------------------------------------------------------------------------------------


def read(output: Path, pattern: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(output.glob(pattern))]


def sweep_table(output: Path) -> str:
    """Validation scores of the best checkpoint of every trial, as differences to the base model."""
    base = json.loads((output / "base_validation.json").read_text())
    rows = []
    for method, trials in SWEEPS.items():
        for i, changes in enumerate(trials):
            for trial in read(output, f"sweep_{method}_{i}.json"):
                point = trial["points"][trial["best"]]
                cells = [TITLES[method], ", ".join(f"{name} {value}" for name, value in changes.items())]
                cells += [f"{point[name] - base[name]:+.3f}" for name in METRICS]
                cells += [f"{point['evaluations']:,.0f}", f"{trial['points'][-1]['cpu_seconds']:.0f}"]
                rows.append(cells)
    return markdown(["method", "settings", *METRICS, "evaluations", "CPU seconds"], rows)


def heldout_table(output: Path) -> str:
    """Held-out differences to the base model, standard errors over captions and training seeds."""
    base = json.loads((output / "base.json").read_text())
    rows = []
    for method, title in TITLES.items():
        runs = read(output, f"run_{method}_*.json")
        if not runs:
            continue
        cells = [title, str(len(runs))]
        for metric in METRICS:
            change = torch.tensor([found["heldout"][metric] for found in runs]) - torch.tensor(base[metric])
            found = two_way(change)
            cells.append(f"{found['mean']:+.3f} ± {found['se']:.3f}")
        best = [found["points"][found["best"]]["evaluations"] for found in runs]
        seconds = [found["points"][-1]["cpu_seconds"] for found in runs]
        cells += [f"{sum(best) / len(best):,.0f}", f"{sum(seconds) / len(seconds):.0f}"]
        rows.append(cells)
    return markdown(["", "seeds", *METRICS, "evaluations", "CPU seconds to the whole budget"], rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("rivals_output"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--table", action="store_true", help="Print what is there, and do nothing.")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    if not args.table:
        study(args.output, args.seeds, args.methods)
    if list(args.output.glob("sweep_*.json")):
        print(f"{sweep_table(args.output)}\n")
    if list(args.output.glob("run_*.json")):
        print(heldout_table(args.output))


if __name__ == "__main__":
    main()
