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
What options that change pairs or weights do in the shapes world, where the score is exact: how many pair labels they keep,
and what the model has learnt after the same number of trained pairs.

```shell
make demo  # leaves the reward model in demo_output/reward_model
python benchmarks/approximations.py --json benchmarks/results/approximations.json
```

Label agreement is measured on the same candidates: of the pairs that are valid under the exact scorer, the share whose
order the approximate scorer keeps. The training runs have the settings of the demo, fewer updates, no choice of a
checkpoint, and are scored on validation captions (fixed seeds, DDIM, 10 steps, eta 1, guidance 1); differences to the
run with the same seed and no option are paired by seed. Results are kept as they come: a second call goes on.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from diffusers import AutoencoderTiny
from peft import LoraConfig
from transformers import PrinterCallback, ProgressCallback
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.shapes import world
from examples.shapes.base_scores import evaluation_set, load_pipeline
from examples.shapes.demo import METRICS, SAMPLER
from trl_spo import SPOConfig, SPOTrainer, StepAwareRewardModel
from trl_spo.rewards.scoring import Scorer


OPTIONS = {
    "exact": {},
    "tiny decoder": {"scoring_vae": True},
    "decoded at 24 of 32 px": {"scoring_image_size": 24},
    "bf16 reward": {"reward_dtype": "bfloat16"},
    "3 of 6 branching steps": {"num_branches": 3},
    "K = 2": {"num_candidates": 2},
    "steps 2 to 6": {"branch_end_step": 6},
    "steps 2 to 10": {"branch_end_step": 10},
    "steps 2 to 10, even weights": {"branch_end_step": 10, "timestep_weighting": "even"},
    "even weights": {"timestep_weighting": "even"},
}
SCORERS = ("tiny decoder", "decoded at 24 of 32 px", "bf16 reward")


def make_trainer(reward_folder: Path, seed: int, updates: int, scoring_vae=None, **settings) -> SPOTrainer:
    config = SPOConfig(
        output_dir=tempfile.mkdtemp(),
        **{
            **SAMPLER,
            "branch_start_step": 2,
            "branch_end_step": 8,
            "num_candidates": 4,
            "per_device_rollout_batch_size": 32,
            "per_device_train_batch_size": 64,
            "gradient_accumulation_steps": 2,
            "per_device_eval_batch_size": 106,
            "learning_rate": 5e-4,
            "kl_coef": 12.0,
            "preference_threshold": 0.1,
            **settings,
        },
        max_steps=updates,
        logging_steps=updates,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=seed,
    )
    trainer = SPOTrainer(
        config,
        load_pipeline(),
        StepAwareRewardModel.from_pretrained(reward_folder),
        train_dataset=list(world.captions("train")),
        metrics=METRICS,
        scoring_vae=scoring_vae,
        peft_config=LoraConfig(
            r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]
        ),
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def train_tiny_decoder(trainer: SPOTrainer, steps: int = 1200) -> AutoencoderTiny:
    """An `AutoencoderTiny` whose decoder imitates the VAE's on what is scored: predictions of x_0 at all steps."""
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        latent_channels=trainer.pipeline.latent_shape()[0],
        encoder_block_out_channels=(24, 24, 24),
        decoder_block_out_channels=(24, 24, 24),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(2, 2, 1),
    )
    prompts = list(world.captions("train"))
    latents = []
    for seed in range(6):
        pairs = trainer.rollout(prompts[seed * 32 : seed * 32 + 32], seed=9000 + seed, return_trajectory=True)
        latents += [branch.pred_original_samples.flatten(0, 1) for branch in pairs.branches]
    latents = torch.cat(latents)
    images = torch.cat([trainer.pipeline.decode_latents(chunk) for chunk in latents.split(64)])
    optimizer = torch.optim.Adam(vae.decoder.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(latents), (48,))
        loss = (vae.decode(latents[rows] / vae.config.scaling_factor).sample - images[rows]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"tiny decoder: mean absolute error {loss.item():.4f} of a range of 2", flush=True)
    return vae.eval()


@torch.no_grad()
def label_agreement(reward_folder: Path, name: str, vae, num_prompts: int) -> dict[str, float]:
    """Share of the exact scorer's valid pairs that keep their order, with its standard error over prompts."""
    exact = make_trainer(reward_folder, 0, 1)
    settings = {key: value for key, value in OPTIONS[name].items() if key != "scoring_vae"}
    other = make_trainer(reward_folder, 0, 1, scoring_vae=vae if name == "tiny decoder" else None, **settings)
    prompts = list(world.captions("train"))
    kept = []
    same = []
    for start in range(0, num_prompts, 32):
        batch = prompts[start : start + 32]
        pairs = exact.rollout(batch, seed=5000 + start, return_trajectory=True)
        scorer = Scorer(other.pipeline, other.reward, batch, 64, 64, image_size=settings.get("scoring_image_size"))
        judged = scorer([(branch.pred_original_samples, branch.scored_timestep) for branch in pairs.branches])
        scores = [step.selection for step in judged]
        rows = torch.arange(len(batch))
        orders = []
        equal = []
        for branch, values in zip(pairs.branches, scores, strict=True):
            chosen, rejected, valid = branch.selection
            orders.append(torch.where(valid, (values[chosen, rows] > values[rejected, rows]).double(), torch.nan))
            both = (values.argmax(0) == chosen) & (values.argmin(0) == rejected)
            equal.append(torch.where(valid, both.double(), torch.nan))
        kept.append(torch.stack(orders).nanmean(0))
        same.append(torch.stack(equal).nanmean(0))
    kept = torch.cat(kept)
    same = torch.cat(same)
    kept = kept[~kept.isnan()]
    same = same[~same.isnan()]
    error = kept.std().item() / math.sqrt(len(kept))
    return {"labels_kept": kept.mean().item(), "se": error, "same_pair": same.mean().item(), "prompts": len(kept)}


def run(reward_folder: Path, name: str, seed: int, updates: int, vae) -> dict[str, float]:
    """One training run and its exact scores on the validation captions."""
    settings = {key: value for key, value in OPTIONS[name].items() if key != "scoring_vae"}
    trainer = make_trainer(
        reward_folder, seed, updates, scoring_vae=vae if "scoring_vae" in OPTIONS[name] else None, **settings
    )
    calls = {"unet": 0, "scored": 0}
    trainer.pipeline.denoiser.register_forward_hook(
        lambda module, inputs, output: calls.__setitem__("unet", calls["unet"] + len(inputs[0]))
    )
    trainer.reward_model.model.visual_projection.register_forward_hook(
        lambda module, inputs, output: calls.__setitem__("scored", calls["scored"] + len(inputs[0]))
    )
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    pairs = trainer.pair_loader.num_pairs_seen
    rolled_out = pairs + trainer.pair_loader.waiting
    log = next(log for log in reversed(trainer.state.log_history) if "pairs/valid_fraction" in log)
    prompts, seeds = evaluation_set("validation", repeats=4)
    scores = trainer.score(trainer.generate(prompts, seeds), prompts)
    return {
        **{metric: scores[metric].double().mean().item() for metric in METRICS},
        "cpu_seconds_per_pair": seconds / pairs,
        "unet_per_pair": (calls["unet"] - 2 * pairs) / rolled_out,
        "scored_per_pair": calls["scored"] / rolled_out,
        "valid_fraction": log["pairs/valid_fraction"],
        "fresh_accuracy": log["pairs/fresh_accuracy"],
    }


def base_scores(reward_folder: Path) -> dict[str, float]:
    trainer = make_trainer(reward_folder, 0, 1)
    prompts, seeds = evaluation_set("validation", repeats=4)
    scores = trainer.score(trainer.generate(prompts, seeds), prompts)
    return {metric: scores[metric].double().mean().item() for metric in METRICS}


def table(results: dict) -> str:
    base = results["base"]
    lines = [
        "| option | labels kept | same pair | UNet / pair | scored / pair | valid | aesthetics | alignment | "
        "aesthetics against exact |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def spread(values):
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
        return f"{statistics.mean(values):+.3f} ± {error:.3f}"

    exact = results["runs"].get("exact", {})
    for name in OPTIONS:
        runs = results["runs"].get(name, {})
        if not runs:
            continue
        agreement = results["agreement"].get(name)
        kept = "" if agreement is None else f"{agreement['labels_kept']:.3f} ± {agreement['se']:.3f}"
        same = "" if agreement is None else f"{agreement['same_pair']:.3f}"
        mean = {key: statistics.mean(values[key] for values in runs.values()) for key in next(iter(runs.values()))}
        gains = {m: spread([values[m] - base[m] for values in runs.values()]) for m in METRICS}
        both = [seed for seed in runs if seed in exact and name != "exact"]
        paired = spread([runs[s]["aesthetics"] - exact[s]["aesthetics"] for s in both]) if both else ""
        lines.append(
            f"| {name} | {kept} | {same} | {mean['unet_per_pair']:.2f} | {mean['scored_per_pair']:.2f} | "
            f"{mean['valid_fraction']:.2f} | {gains['aesthetics']} | {gains['alignment']} | {paired} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--reward_model", type=Path, default=Path("demo_output/reward_model"))
    parser.add_argument("--updates", type=int, default=12, help="Updates of 128 pairs per run.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/approximations.json"))
    args = parser.parse_args()
    if not args.reward_model.is_dir():
        raise SystemExit(f"There is no reward model in {args.reward_model}: run `make demo` first.")

    # Continue an earlier run of this script, if its file is there.
    logging.set_verbosity_error()
    results = {"agreement": {}, "runs": {}, "updates": args.updates, "sampler": SAMPLER}
    if args.json.is_file():
        results = json.loads(args.json.read_text())
        if results["updates"] != args.updates:
            raise SystemExit(f"{args.json} holds runs of {results['updates']} updates; name another file.")

    def save():
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1))

    # First how often the labels agree, then what is learnt with them; every result is saved at once.
    if "base" not in results:
        results["base"] = base_scores(args.reward_model)
    vae = train_tiny_decoder(make_trainer(args.reward_model, 0, 1)) if "tiny decoder" in args.only else None
    for name in SCORERS:
        if name in args.only and name not in results["agreement"]:
            results["agreement"][name] = label_agreement(args.reward_model, name, vae, num_prompts=320)
            print(name, results["agreement"][name], flush=True)
            save()
    for seed in args.seeds:
        for name in args.only:
            runs = results["runs"].setdefault(name, {})
            if str(seed) not in runs:
                start = time.perf_counter()
                runs[str(seed)] = run(args.reward_model, name, seed, args.updates, vae)
                print(f"{name}, seed {seed}: {runs[str(seed)]} ({time.perf_counter() - start:.0f} s)", flush=True)
                save()
    print("\n" + table(results))


if __name__ == "__main__":
    main()
