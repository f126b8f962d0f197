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
SPO and LPO against today's ways to align: Diffusion-DPO, Flow-GRPO, DiffusionNFT, DDPO and fine-tuning, on both models of the
shapes world.

```shell
python benchmarks/rivals.py --model flow --output compare_output/rivals
python benchmarks/rivals.py --model unet --output compare_output/rivals --jobs 2
python benchmarks/rivals_report.py --output compare_output/rivals
```

All start from one base model with one adapter and one optimizer, and learn from the same 2,400 noisy preferences:
Diffusion-DPO and fine-tuning from the pairs themselves, the others from rewards that are trained on them. Every method tries the
same number of settings (`SWEEPS`), judged by the utility of its best checkpoint on validation captions, with a training seed
of its own. Then each is trained with the settings that were best, over training seeds. A unit of compute is one sample forward
through the denoiser; a backward pass counts as two, the backbone of a latent reward as its share of the arithmetic.

A run ends at `BUDGET` evaluations; with the first training seeds, methods whose evaluations are cheap go on for the CPU time that
SPO needs for the budget, so that all can also be compared at equal CPU time. Of each run two checkpoints are measured, both chosen on validation captions: the
best within the budget, and the best of all. They are measured on held-out captions, and on captions that neither an earlier study
nor a choice of this one has looked at.

Each piece of work is a process with one thread that leaves a file; what is there is not done again.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait stall a shared machine

import torch
from datasets import load_from_disk
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from anywhere

from benchmarks.compare.evaluate import exact_scores, pairwise_distance
from benchmarks.compare.methods import (
    DEFAULTS,
    DiffusionDPO,
    Meter,
    Recorder,
    SupervisedFineTuning,
    decided_pairs,
    exact_reward,
    restore_adapter,
    reward_config,
    train_ddpo,
    train_spo,
    with_clip,
)
from benchmarks.compare.online import ONLINE, ONLINE_DEFAULTS
from benchmarks.compare.tasks import execute, read_json, write_json
from benchmarks.latent_rewards import (
    EquivalentMeter,
    arithmetic_share,
    consistent,
    load,
    pipeline_of,
    untrained_reward,
)
from examples.shapes import world
from examples.shapes.base_scores import evaluation_set
from examples.shapes.preferences import make_preferences
from examples.shapes.settings import (
    FLOW_SPO_SETTINGS,
    SAMPLER,
    SPO_SETTINGS,
    latent_spo_settings,
)
from trl_spo import LatentRewardModel, StepRewardTrainer, wrap_reward
from trl_spo.rewards.base import load_reward_model
from trl_spo.sampling import generate_images, score_images


ROOT = Path(__file__).resolve().parents[1]
BUDGET = 18_000
NUM_MARKS = 6
NUM_PAIRS = 2_400
SWEEP_SEED = 100
IS_QUICK = False
REPEATS = {"validation": 2, "heldout": 3, "untouched": 3}  # samples of a caption
METHODS = {  # title, and the reward that is asked where the settings name no other
    "spo": ("SPO", "clean"),
    "lpo": ("LPO", "latent"),
    "dpo": ("Diffusion-DPO", None),
    "nft": ("DiffusionNFT", "clean"),
    "grpo": ("Flow-GRPO", "clean"),
    "ddpo": ("DDPO (TRL)", "clean"),
    "sft": ("fine-tuning", None),
}
# As many trials for each method, judged on validation captions. What is not named is the default of `full_settings`.
SWEEPS = {
    "spo": [
        {"learning_rate": 2e-3, "kl_coef": 1.5},
        {"learning_rate": 4e-3, "kl_coef": 1.5},
        {"learning_rate": 2e-3, "kl_coef": 1.5, "num_iterations": 3},
        {"learning_rate": 8e-3, "kl_coef": 1.5},
        {"learning_rate": 4e-3, "kl_coef": 6.0},
    ],
    "lpo": [
        {"learning_rate": 1e-3, "kl_coef": 1.5},
        {"learning_rate": 2e-3, "kl_coef": 1.5},
        {"learning_rate": 4e-3, "kl_coef": 1.5},
        {"learning_rate": 2e-3, "kl_coef": 6.0},
        {"learning_rate": 2e-3, "kl_coef": 1.5, "branch_end_step": 8},
    ],
    "dpo": [
        {"learning_rate": 4e-3, "beta": 300.0},
        {"learning_rate": 2e-3, "beta": 300.0},
        {"learning_rate": 1e-3, "beta": 300.0},
        {"learning_rate": 2e-3, "beta": 1000.0},
        {"learning_rate": 2e-3, "beta": 100.0},
    ],
    "nft": [
        {"learning_rate": 2e-3},
        {"learning_rate": 4e-3},
        {"learning_rate": 1e-3},
        {"learning_rate": 5e-4},
        {"learning_rate": 1e-3, "timesteps_per_image": 2},
    ],
    "grpo": [
        {"learning_rate": 2e-3, "window": 2},
        {"learning_rate": 4e-3, "window": 2},
        {"learning_rate": 1e-3, "window": 2},
        {"learning_rate": 2e-3, "window": 4},
        {"learning_rate": 2e-3},
    ],
    "ddpo": [
        {"learning_rate": 1e-3, "samples_per_prompt": 8},
        {"learning_rate": 2e-3, "samples_per_prompt": 8},
        {"learning_rate": 4e-3, "samples_per_prompt": 8},
        {"learning_rate": 5e-4, "samples_per_prompt": 8},
        {"learning_rate": 2e-3},
    ],
    "sft": [
        {"learning_rate": 1e-3},
        {"learning_rate": 2e-3},
        {"learning_rate": 4e-3},
        {"learning_rate": 5e-4},
        {"learning_rate": 2e-3, "batch_size": 64},
    ],
}
# What the sweeps chose, by model; what `--quick` runs without a sweep.
CHOSEN = {
    "flow": {"spo": 1, "lpo": 2, "dpo": 4, "nft": 4, "grpo": 1, "sft": 4},
    "unet": {"spo": 2, "lpo": 0, "dpo": 4, "nft": 0, "grpo": 0, "ddpo": 2, "sft": 1},
}
QUICK_METHODS = ("spo", "lpo", "dpo", "nft", "grpo")
ON_UNET_ONLY = ("ddpo",)  # TRL's trainer knows no other model


def make_small() -> None:
    """A study of minutes: less of everything, and the settings of `CHOSEN` instead of a sweep."""
    global BUDGET, NUM_MARKS, NUM_PAIRS, IS_QUICK
    BUDGET, NUM_MARKS, NUM_PAIRS, IS_QUICK = 9_000, 3, 1_000, True


@dataclasses.dataclass(frozen=True)
class Arm:
    """
    What is run over training seeds: a method with the settings that its sweep chose.

    Attributes:
        title (`str`): its name in tables.
        method (`str`): one of `METHODS`.
        settings (`dict`): what differs from the chosen settings.
    """

    title: str
    method: str
    settings: dict = dataclasses.field(default_factory=dict)


# SPO with the settings of `CHECK_SETTINGS` and one training seed asks each of these rewards: does alignment hold at that rate?
REWARD_CHECKS = {
    "step": "step-aware",
    "step+clip": "step-aware, with CLIP's score",
    "latent": "latent",
    "clean": "of finished images",
    "clean+clip": "of finished images, with CLIP's score",
    "clean_filtered": "of finished images, pairs filtered by CLIP",
    "clean_early": "of finished images, half the rate and half the steps",
    "ensemble": "of finished images, the lower score of two seeds",
    "exact": "exact",
}
CHECK_SETTINGS = {"learning_rate": 4e-3, "kl_coef": 1.5}
ARMS = {name: Arm(title, name) for name, (title, _) in METHODS.items()}
# Only run where they are named with `--arms`: what one change costs.
FURTHER_ARMS = {
    "spo_ahead": Arm("SPO, rolling out one update ahead", "spo", {"rollout_ahead": True}),
    "spo_exact": Arm("SPO with the exact reward", "spo", {"reward": "exact"}),
    "grpo_exact": Arm("Flow-GRPO with the exact reward", "grpo", {"reward": "exact"}),
}
MOST_STRETCH = 3.0  # budgets that a run with cheap evaluations may take at most
STRETCHED_SEEDS = (0, 1)  # runs of the other seeds end at the budget


def full_settings(model: str, method: str, changes: dict) -> dict:
    """All settings of a method, with what differs from its defaults. `reward` names the reward that is asked."""
    defaults = {
        "spo": FLOW_SPO_SETTINGS if model == "flow" else SPO_SETTINGS,
        "lpo": latent_spo_settings(model),
        "dpo": {"batch_size": 128},
        "sft": {"batch_size": 128},
        "ddpo": DEFAULTS["ddpo"],
        **ONLINE_DEFAULTS,
    }
    if model == "unet":
        defaults["grpo"] = {**defaults["grpo"], "sampler": "ddim", "eta": 1.0}
    return {"reward": METHODS[method][1], **defaults[method], **changes}


# --- what all learn from ---------------------------------------------------------------------------------------------


def work_pairs(model: str, output: Path) -> dict:
    """Samples of the base model and their noisy labels, the same for all methods and seeds."""
    dataset = make_preferences(pipeline_of(load(model), model), NUM_PAIRS, split="study", seed=SWEEP_SEED)
    dataset.save_to_disk(str(output / model / "pairs"))
    return {"ties": sum(label == 0.5 for label in dataset["label_0"])}


def preferences(model: str, output: Path):
    return load_from_disk(str(output / model / "pairs"))


def work_reward(model: str, output: Path, kind: str, seed: int) -> dict:
    """
    Trains and saves a reward: `step`, step-aware; `latent`, of noisy latents; `clean`, of finished images. Of the last there are
    `clean_2`, the other one of an ensemble, `clean_filtered`, from pairs with which the CLIP of the world agrees, and `clean_early`,
    with half the learning rate and half the steps. Returns what it cost.
    """
    base, _, variant = kind.partition("_")
    pipeline = load(model)
    pairs = preferences(model, output)
    seed_of_training = seed + 1_000 * (variant == "2")
    torch.manual_seed(seed_of_training)  # new layers are random
    reward_model, settings, steps = untrained_reward(base, model, pipeline)
    if variant == "filtered":
        pairs, _ = consistent(pairs)
    if variant == "early":
        settings = {**settings, "learning_rate": settings["learning_rate"] / 2}
        steps = steps // 2
    folder = reward_folder(model, output, kind, seed)
    config = reward_config(settings, steps, seed_of_training, folder)
    meter = Meter(pipeline.denoiser)
    trainer = StepRewardTrainer(config, pipeline, reward_model, train_dataset=pairs)
    trainer.train()
    trainer.save_model()
    meter.close()
    return {"evaluations": meter.evaluations, "cpu_seconds": meter.seconds[0]}


def reward_folder(model: str, output: Path, kind: str, seed: int) -> Path:
    return output / model / "reward" / kind / str(seed)


def trained_kinds(reward: str | None) -> list[str]:
    """Rewards that have to be trained for a reward of the settings."""
    if reward in (None, "exact"):
        return []
    if reward == "ensemble":
        return ["clean", "clean_2"]
    return [reward.split("+")[0]]


def reward_named(reward: str | None, model: str, output: Path, seed: int):
    """
    The reward of a name: one that [`work_reward`] trains; `+clip` behind it mixes the score of the CLIP that it was trained from
    back in; `ensemble`, the lower score of two; `exact`, what the annotator follows.
    """
    if reward is None:
        return None
    if reward == "exact":
        return exact_reward
    folders = [reward_folder(model, output, kind, seed) for kind in trained_kinds(reward)]
    networks = [load_reward_model(folder).eval().requires_grad_(False) for folder in folders]
    if reward.endswith("+clip"):
        return with_clip(networks[0])
    return networks[0] if len(networks) == 1 else lower_score(networks)


def lower_score(networks: list) -> Callable:
    """Where two rewards disagree, one of them is wrong: count what both grant."""

    def reward(images: torch.Tensor, prompts: list[str], timesteps: torch.Tensor) -> torch.Tensor:
        return torch.stack([network.score(images * 2 - 1, prompts, timesteps) for network in networks]).amin(0)

    return reward


# --- one run ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(pipeline, split: str, reward=None) -> dict[str, list[float]]:
    """
    By caption: exact scores, mean over its samples; `diversity`, how much its samples differ; with a reward its score, `reward`.
    """
    repeats = REPEATS[split]
    prompts, seeds = evaluation_set(split, repeats)
    images = generate_images(pipeline, prompts, seeds=seeds, **SAMPLER, batch_size=106)
    scores = exact_scores(images, prompts)
    if reward is not None:
        scores["reward"] = score_images(images, prompts, reward, batch_size=106, pipeline=pipeline)
    means = {name: values.view(repeats, -1).double().mean(0).tolist() for name, values in scores.items()}
    return {**means, "diversity": pairwise_distance(images, prompts).tolist()}


def validate(pipeline, reward=None) -> dict[str, float]:
    found = measure(pipeline, "validation", reward)
    return {name: sum(values) / len(values) for name, values in found.items()}


def work_base(model: str, output: Path) -> dict:
    """Scores of the base model."""
    return {split: measure(load(model), split) for split in REPEATS}


@torch.no_grad()
def ceiling(model: str) -> dict[str, float]:
    """Exact scores of faultless renderings of the untouched captions that have passed the VAE: no sample can be much better."""
    prompts, _ = evaluation_set("untouched", REPEATS["untouched"])
    vae = load(model).vae
    images = world.render(prompts, torch.Generator().manual_seed(0)) * 2 - 1
    decoded = vae.decode(vae.encode(images).latent_dist.mean).sample / 2 + 0.5
    return {name: values.mean().item() for name, values in exact_scores(decoded.clamp(0, 1), prompts).items()}


def meter_of(pipeline, reward) -> Meter:
    if not isinstance(reward, LatentRewardModel):
        return Meter(pipeline.denoiser)
    wrapped = wrap_reward(reward)
    wrapped.check_pipeline(pipeline)  # from here on it reads the prompts as the pipeline has them, which costs nothing
    return EquivalentMeter(pipeline.denoiser, reward.backbone, arithmetic_share(pipeline, wrapped))


def marks_to(evaluations: int) -> list[int]:
    """Evaluations at which a run is looked at, the last of them its end."""
    step = BUDGET // NUM_MARKS
    return [*range(step, evaluations - step // 2 + 1, step), evaluations]


def run(model: str, output: Path, method: str, changes: dict, seed: int, stretch: float = 1.0) -> tuple:
    """Trains one method with the settings; returns the pipeline, the recorder and the settings."""
    pipeline = load(model)
    settings = full_settings(model, method, changes)
    own = {name: value for name, value in settings.items() if name != "reward"}
    reward = reward_named(settings["reward"], model, output, seed)
    pairs = decided_pairs(pipeline, preferences(model, output)) if method in ("dpo", "sft") else None
    meter = meter_of(pipeline, reward)
    learned = None if settings["reward"] == "exact" else reward
    recorder = Recorder(
        pipeline.denoiser, marks_to(round(BUDGET * stretch)), lambda: validate(pipeline, learned), meter
    )
    if method in ONLINE:
        ONLINE[method](pipeline, reward, seed, own, "study").train(recorder)
    elif method in ("dpo", "sft"):
        {"dpo": DiffusionDPO, "sft": SupervisedFineTuning}[method](pipeline, pairs, seed, own).train(recorder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            if method == "ddpo":
                train_ddpo(pipeline.sd_pipeline, recorder, reward, seed, own, Path(folder), "study")
            else:
                train_spo(pipeline, recorder, reward, seed, own, Path(folder), "study")
    meter.close()
    return pipeline, recorder, settings


def best_point(points: list[dict], unit: str, most: float) -> int:
    """The checkpoint with the best utility on validation captions among those that spent no more; else the first."""
    within = [i for i, point in enumerate(points) if point[unit] <= most] or [0]
    return max(within, key=lambda i: points[i]["utility"])


def work_run(
    model: str, output: Path, method: str, changes: dict, seed: int, is_sweep: bool, arm: str | None = None
) -> dict:
    """One run; of those that are not of a sweep the two checkpoints are measured, and the adapter of the first is kept."""
    stretch = 1.0 if is_sweep or seed not in STRETCHED_SEEDS else stretch_of(output, model, method)
    pipeline, recorder, settings = run(model, output, method, changes, seed, stretch)
    points = recorder.points
    result = {"method": method, "settings": settings, "seed": seed, "points": points}
    result["best"] = best_point(points, "mark", BUDGET)
    if is_sweep:
        return result
    result["best_of_time"] = best_point(points, "mark", BUDGET * stretch)
    pipeline.denoiser.eval()
    for split in ("heldout", "untouched"):
        measured = {}
        for name in ("best", "best_of_time"):
            if result[name] not in measured:
                restore_adapter(pipeline.denoiser, recorder.states[result[name]])
                measured[result[name]] = measure(pipeline, split)
            result.setdefault(split, {})[name] = measured[result[name]]
    restore_adapter(pipeline.denoiser, recorder.states[result["best"]])
    if pipeline.use_lora:
        pipeline.save_lora(output / model / "run" / (arm or method) / str(seed))
    return result


# --- the study -------------------------------------------------------------------------------------------------------


def chosen_settings(output: Path, model: str, method: str) -> dict:
    """The settings of the sweep whose best checkpoint has the highest utility on validation captions."""
    if IS_QUICK:
        return SWEEPS[method][CHOSEN[model][method]]
    trials = [read_json(output / model / "sweep" / method / f"{i}.json") for i in range(len(SWEEPS[method]))]
    for trial, changes in zip(trials, SWEEPS[method], strict=True):
        if trial["settings"] != full_settings(model, method, changes):
            raise SystemExit(f"{output} holds a trial of {trial['settings']}, which is not in the sweep: delete it.")
    best = max(range(len(trials)), key=lambda i: trials[i]["points"][trials[i]["best"]]["utility"])
    return SWEEPS[method][best]


def stretch_of(output: Path, model: str, method: str) -> float:
    """
    Budgets that a method can spend in the CPU time that SPO needs for one, at least 1. CPU time per evaluation is that of the
    chosen trials, which all ran in turns on one machine.
    """

    if IS_QUICK:
        return 1.0

    def seconds_per_evaluation(method: str) -> float:
        chosen = SWEEPS[method].index(chosen_settings(output, model, method))
        point = read_json(output / model / "sweep" / method / f"{chosen}.json")["points"][-1]
        return point["cpu_seconds"] / point["evaluations"]

    ratio = seconds_per_evaluation("spo") / seconds_per_evaluation(method)
    return min(max(ratio, 1.0), MOST_STRETCH)


def settings_of(output: Path, model: str, task: str) -> tuple[str, dict, int]:
    """Method, settings and seed of a task of a sweep, of an arm or of a check of rewards."""
    kind, name, number = task.split("/")
    if kind == "sweep":
        return name, SWEEPS[name][int(number)], SWEEP_SEED
    if kind == "check":
        return "lpo" if name == "latent" else "spo", {**CHECK_SETTINGS, "reward": name}, SWEEP_SEED
    arm = {**ARMS, **FURTHER_ARMS}[name]
    tuned = chosen_settings(output, model, arm.method)
    return arm.method, {**tuned, **arm.settings}, int(number)


def rewards_needed(output: Path, model: str, tasks: list[str]) -> list[str]:
    found = []
    for task in tasks:
        method, changes, seed = settings_of(output, model, task)
        found += [f"reward/{kind}/{seed}" for kind in trained_kinds(full_settings(model, method, changes)["reward"])]
    return list(dict.fromkeys(found))


def work(model: str, output: Path, task: str) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    kind, *rest = task.split("/")
    if kind == "base":
        result = work_base(model, output)
    elif kind == "pairs":
        result = work_pairs(model, output)
    elif kind == "reward":
        result = work_reward(model, output, rest[0], int(rest[1]))
    else:
        result = work_run(model, output, *settings_of(output, model, task), is_sweep=kind != "run", arm=rest[0])
    write_json(output / model / f"{task}.json", result)


def study(args: argparse.Namespace) -> int:
    """Everything that has no result yet, two stages of rewards and runs. Returns how many tasks failed."""

    def command_of(task: str) -> list[str]:
        python = args.ddpo_python if "/ddpo/" in task and not task.startswith("reward") else sys.executable
        command = [str(python), str(Path(__file__).resolve()), "--model", args.model, *["--quick"] * args.quick]
        return [*command, "--output", str(args.output), "--work", task]

    def do(tasks: list[str]) -> int:
        return len(execute(tasks, args.output / args.model, command_of, args.jobs))

    methods = [name for name in args.methods if args.model == "unet" or name not in ON_UNET_ONLY]
    sweeps = [f"sweep/{method}/{i}" for method in methods for i in range(len(SWEEPS[method]))]
    if args.quick:
        sweeps = []
    sweeps.sort(key=lambda task: int(task.rsplit("/", 1)[1]))  # all methods get on alike
    checks = [f"check/{name}/0" for name in REWARD_CHECKS]
    trials = sweeps + (checks if "spo" in methods and not args.quick else [])
    failed = do(["base", "pairs"]) + do(rewards_needed(args.output, args.model, trials)) + do(trials)
    if failed or not args.seeds:
        return failed
    arms = args.arms or [name for name, arm in ARMS.items() if arm.method in methods]
    runs = [f"run/{name}/{seed}" for seed in args.seeds for name in arms]
    return do(rewards_needed(args.output, args.model, runs)) + do(runs)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--model", choices=["unet", "flow"], default="flow")
    parser.add_argument(
        "--output", type=Path, help="Folder of the results. Default: compare_output/rivals, or compare_quick."
    )
    parser.add_argument("--quick", action="store_true", help="One seed, a small budget, no sweep, and the table last.")
    parser.add_argument("--seeds", type=int, nargs="*", help="Training seeds. Default: 0 1 2 3 4; quick: 0.")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="Default: all; quick: five of them.")
    parser.add_argument(
        "--arms", nargs="+", choices=[*ARMS, *FURTHER_ARMS], help="What is run over seeds. Default: all methods."
    )
    parser.add_argument("--jobs", type=int, default=2, help="Processes at a time, with one thread each.")
    parser.add_argument("--ddpo_python", type=Path, default=ROOT / ".venv-ddpo" / "bin" / "python")
    parser.add_argument("--ceiling", action="store_true", help="Only print the scores of faultless images.")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.output = args.output or Path("compare_quick" if args.quick else "compare_output/rivals")
    args.seeds = args.seeds if args.seeds is not None else [0] if args.quick else [0, 1, 2, 3, 4]
    args.methods = args.methods or list(QUICK_METHODS if args.quick else METHODS)
    if args.quick:
        make_small()
    if args.ceiling:
        print(", ".join(f"{name} {value:.3f}" for name, value in ceiling(args.model).items()))
        return 0
    if args.work:
        work(args.model, args.output, args.work)
        return 0
    failed = study(args)
    if args.quick:
        from benchmarks.rivals_report import Study, main_table

        print(f"\n{main_table(Study(args.output, args.model), 'heldout', 'best')}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
