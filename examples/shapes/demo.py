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
The whole method in a world small enough for two CPU cores: noisy preferences -> step-aware reward model -> SPO -> scores
of held-out prompts before and after, with pictures.

```shell
trl-spo demo
python examples/shapes/demo.py --output_dir demo_output
```
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait stall a shared machine
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what is imported below has notices about nothing

import torch
from transformers import TrainerCallback
from transformers.utils import logging


if not __package__:  # run as a file, from anywhere: its neighbours are those of the checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "examples.shapes"

from trl_spo import (
    LatentRewardModel,
    SPOConfig,
    SPOTrainer,
    StepAwareRewardModel,
    StepRewardConfig,
    StepRewardTrainer,
)
from trl_spo.evaluation.statistics import statistics_table
from trl_spo.training.log_lines import SPO_COLUMNS, STEP_REWARD_COLUMNS, log_in_lines

from . import report, world
from .base_scores import evaluation_set, load_flow_pipeline, load_pipeline
from .preferences import make_preferences
from .settings import (
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
    lora_config,
)


METRICS = {
    "aesthetics": lambda images, prompts: world.aesthetics_score(images),
    "alignment": world.alignment_score,
}
EVALUATE_EVERY = 7  # steps of SPO
HOW_TO_READ = {
    "reward model": "  accuracy: share of noisy labels it agrees with; .5 is chance, and some three in four labels are right",
    "SPO": """  accuracy: share of new pairs that it orders rightly before it trains on them; .5 is chance
  kl: how far it is from the base model; evaluation: scores of the validation captions""",
}


def make_parser(**kwargs) -> argparse.ArgumentParser:
    """The options of the demo; `kwargs` are those of `argparse.ArgumentParser`."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()), **kwargs)
    parser.add_argument(
        "--model", choices=["unet", "flow"], default="unet", help="A UNet with DDIM, or an SD3 of the world."
    )
    parser.add_argument(
        "--reward",
        choices=["pixel", "latent"],
        default="pixel",
        help="A CLIP that judges predicted images, or the model's own backbone, which judges noisy latents (LPO).",
    )
    parser.add_argument("--output_dir", type=Path, help="demo_output, demo_output_flow, demo_output_latent, ...")
    parser.add_argument("--num_pairs", type=int, default=2400, help="Preference pairs for the reward model.")
    parser.add_argument("--reward_steps", type=int, help="Optimizer steps of the reward model.")
    parser.add_argument("--spo_steps", type=int, default=28, help="Optimizer steps of SPO, at least 7.")
    parser.add_argument("--spo_lr", type=float, help="Learning rate of SPO.")
    parser.add_argument("--kl_coef", type=float, help="Weight of the KL divergence.")
    parser.add_argument("--eval_repeats", type=int, default=3, help="Samples per held-out caption.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the preferences and of both trainings.")
    return parser


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """
    The options with what depends on other options filled in.

    Raises:
        SystemExit: if there are too few steps for a checkpoint.
    """
    if args.spo_steps < EVALUATE_EVERY:
        raise SystemExit(
            f"--spo_steps must be at least {EVALUATE_EVERY}, the steps between two checkpoints; got {args.spo_steps}."
        )
    if args.output_dir is None:
        parts = ["demo_output", *(part for part in (args.model, args.reward) if part not in ("unet", "pixel"))]
        args.output_dir = Path("_".join(parts))
    if args.reward_steps is None:
        args.reward_steps = LATENT_REWARD_STEPS if args.reward == "latent" else REWARD_STEPS
    return args


class Stage:
    """Announces a stage and remembers how long it took."""

    seconds: dict[str, float] = {}

    def __init__(self, title: str):
        self.title = title

    def __enter__(self):
        print(f"\n=== {self.title}", flush=True)
        self.start = time.perf_counter()

    def __exit__(self, *exc):
        self.seconds[self.title] = round(time.perf_counter() - self.start, 1)


class BestCheckpoint(TrainerCallback):
    """
    Chooses where to stop: the checkpoint with the highest utility on the validation captions. A learned reward pleases
    itself in the end; a score it was not trained on says when.
    """

    def __init__(self, output_dir: Path):
        self.output_dir = output_dir
        self.best = (float("-inf"), None)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if state.global_step > 0:
            utility = sum(weight * metrics[f"eval_{name}_mean"] for name, weight in world.UTILITY_WEIGHTS.items())
            self.best = max(self.best, (utility, str(self.output_dir / f"checkpoint-{state.global_step}")))


def fresh_reward_model(args, pipe) -> tuple[StepAwareRewardModel | LatentRewardModel, dict]:
    """The reward model to be trained, and the settings of its training."""
    # Heads and the embedding of timesteps are random, and torch gives every process a seed of its own.
    torch.manual_seed(args.seed)
    if args.reward == "latent":
        return LatentRewardModel.from_pipeline(pipe, guidance_scale=1.0), latent_reward_settings(args.model)
    settings = FLOW_REWARD_SETTINGS if args.model == "flow" else REWARD_SETTINGS
    return StepAwareRewardModel.from_clip(CLIP, processor=CLIP), settings


def train_reward_model(args, pipe) -> tuple[StepAwareRewardModel | LatentRewardModel, dict, dict]:
    """Returns the reward model, and its accuracy by timestep before and after training."""
    preferences = make_preferences(pipe, args.num_pairs, split="train", seed=args.seed, progress="train pairs")
    evaluation = make_preferences(
        pipe, report.FRESH_PAIRS, split="validation", seed=args.seed + 1, progress="fresh pairs"
    )
    reward_model, reward_settings = fresh_reward_model(args, pipe)
    config = StepRewardConfig(
        output_dir=str(args.output_dir / "reward_model"),
        **reward_settings,
        eval_timesteps=reward_settings["timesteps"][::2],
        max_steps=args.reward_steps,
        per_device_eval_batch_size=128,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=args.seed,
    )
    trainer = StepRewardTrainer(config, pipe, reward_model, train_dataset=preferences, eval_dataset=evaluation)
    log_in_lines(trainer, STEP_REWARD_COLUMNS, "reward model")
    print(HOW_TO_READ["reward model"])
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    accuracy = [{t: logs[f"eval_accuracy/t_{t}"] for t in config.eval_timesteps} for logs in (before, after)]
    return trainer.model, *accuracy


def make_spo_trainer(args, pipe, reward_model) -> tuple[SPOTrainer, BestCheckpoint]:
    # The settings of this model and reward, then those of the command line.
    settings = dict(FLOW_SPO_SETTINGS if args.model == "flow" else SPO_SETTINGS)
    if args.reward == "latent":
        settings = latent_spo_settings(args.model)
    settings |= {"learning_rate": args.spo_lr} if args.spo_lr is not None else {}
    settings |= {"kl_coef": args.kl_coef} if args.kl_coef is not None else {}
    config = SPOConfig(
        output_dir=str(args.output_dir),
        **SAMPLER,
        **settings,
        per_device_eval_batch_size=106,
        max_steps=args.spo_steps,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=EVALUATE_EVERY,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=EVALUATE_EVERY,
        report_to="none",
        use_cpu=True,
        seed=args.seed,
    )

    # The checkpoint that is best on the validation prompts is kept.
    prompts, _ = evaluation_set("validation", repeats=4)
    trainer = SPOTrainer(
        config,
        pipe,
        reward_model,
        train_dataset=list(world.captions("train")),
        eval_dataset=prompts,
        metrics=METRICS,
        peft_config=lora_config(),
    )
    chooser = BestCheckpoint(args.output_dir)
    trainer.add_callback(chooser)
    log_in_lines(trainer, SPO_COLUMNS, "SPO")
    return trainer, chooser


def main(args: argparse.Namespace):
    args = complete(args)
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of files that are written in no time
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipe = load_flow_pipeline() if args.model == "flow" else load_pipeline()
    pipe.vae.to(memory_format=torch.channels_last)
    prompts, seeds = evaluation_set("heldout", repeats=args.eval_repeats)

    kind = {"pixel": "Step-aware", "latent": "Latent"}[args.reward]
    with Stage(f"{kind} reward model from {args.num_pairs} noisy preference pairs"):
        reward_model, *accuracy = train_reward_model(args, pipe)
    trainer, chooser = make_spo_trainer(args, pipe, reward_model)
    with Stage(f"Base model on {len(prompts)} held-out prompts"):
        images_before = trainer.generate(prompts, seeds, progress="sampling")
        before = trainer.score(images_before, prompts)
    with Stage("SPO"):
        print(HOW_TO_READ["SPO"])
        trainer.train()
        print(f"  best on the validation captions: {Path(chooser.best[1]).name}")
        trainer.load_model(chooser.best[1])
        trainer.save_model()
    with Stage(f"Trained model on the same {len(prompts)} prompts and seeds"):
        images_after = trainer.generate(prompts, seeds, progress="sampling")
        after = trainer.score(images_after, prompts)
    sides = report.Comparison(prompts, images_before, before, images_after, after)
    write_results(args, trainer, sides, accuracy)


def write_results(args, trainer, sides: report.Comparison, accuracy: list[dict[int, float]]):
    """Numbers, pictures and words: the samples of one caption are averaged before anything is compared."""
    statistics = sides.statistics()
    table = statistics_table(statistics)
    sampler = trainer.pipeline.step_rule.description(trainer.args.eta)
    metrics = {"statistics": statistics, "sampler": {**SAMPLER, "scheduler": sampler}, "seconds": Stage.seconds}
    metrics["reward_accuracy"] = dict(zip(("before", "after"), accuracy, strict=True))
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2))
    (args.output_dir / "metrics.md").write_text(table + "\n")
    for split in ("train", "heldout"):
        (args.output_dir / f"{split}.txt").write_text("\n".join(world.captions(split)) + "\n")

    report.draw_pairs(sides, args.output_dir, f"{sampler}, 10 steps, guidance 1")
    report.draw_tree(trainer, sides.prompts[:16]).save(args.output_dir / "candidate_tree.png")
    report.draw_curves(trainer.state.log_history).savefig(args.output_dir / "curves.png", dpi=120)
    report.draw_accuracy(args.reward, *accuracy).savefig(args.output_dir / "reward_accuracy.png", dpi=120)

    captions = len(set(sides.prompts))
    print(
        f"\n{len(sides.prompts)} images of {captions} held-out captions, base model and SPO, ± standard error over captions\n"
    )
    print(f"{table}\n")
    print(f"{report.interpret(statistics)}\n")
    print("Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in Stage.seconds.items()))
    print(f"Pictures, metrics and the LoRA are in {args.output_dir}/; look at before_after.png first.")
    print(f"\n{report.next_commands(args.model, args.output_dir)}")


if __name__ == "__main__":
    main(make_parser().parse_args())
