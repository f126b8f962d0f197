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
Does a long run cost more at its end than at its beginning? Trains for a given time, with checkpoints, evaluation and
sample images as in real life, and compares memory and CPU time per pair of the second half with those of the first.

    python reliability/soak.py --minutes 30 --trainer spo --json soak.json

SPO reads 100,000 prompts from an Arrow file on disk; the reward trainer streams image pairs from a parquet file. Memory
is the resident set of the process, cost its CPU time, which other processes do not change. Exit status 0 if both are flat.
"""

import argparse
import gc
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from datasets import Dataset, load_dataset
from PIL import Image
from transformers import TrainerCallback


sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.testing_utils import PROMPTS, brightness_reward, tiny_clip, tiny_sd_pipeline
from trl_spo import SPOConfig, SPOTrainer, StepAwareRewardModel, StepRewardConfig, StepRewardTrainer


WORDS = "a the red green blue cat dog bird on in of photo painting small large".split()
MAX_GROWTH = 0.03  # of the resident set, from the second quarter of the run to the last
MAX_DRIFT = 0.15  # of the CPU time per pair, likewise


class Meter(TrainerCallback):
    """Resident set and CPU time per pair, every few seconds; ends the run when its time is over."""

    def __init__(self, seconds: float, every: float, pairs_per_step: int):
        self.seconds = seconds
        self.every = every
        self.pairs_per_step = pairs_per_step
        self.process = psutil.Process()
        self.samples: list[dict] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = self.last = time.monotonic()
        self.cpu = time.process_time()
        self.step = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        if now - self.last >= self.every:
            cpu = time.process_time()
            pairs = (state.global_step - self.step) * self.pairs_per_step
            self.samples.append(
                {
                    "seconds": round(now - self.start, 1),
                    "step": state.global_step,
                    "rss_mib": round(self.process.memory_info().rss / 2**20, 1),
                    "cpu_ms_per_pair": round(1000 * (cpu - self.cpu) / pairs, 3),
                    "files": len(self.process.open_files()),
                    "threads": self.process.num_threads(),
                }
            )
            self.last = now
            self.cpu = cpu
            self.step = state.global_step
        if now - self.start >= self.seconds:
            control.should_training_stop = True


def random_prompts(count: int) -> list[str]:
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, size=6)) for _ in range(count)]


def spo_trainer(folder: Path, num_prompts: int, meter: Meter) -> SPOTrainer:
    Dataset.from_dict({"prompt": random_prompts(num_prompts)}).save_to_disk(folder / "prompts")
    config = SPOConfig(
        output_dir=str(folder / "out"),
        num_inference_steps=6,
        branch_start_step=1,
        preference_threshold=0.0,
        per_device_rollout_batch_size=4,
        per_device_train_batch_size=meter.pairs_per_step,
        max_steps=10**9,
        learning_rate=1e-6,
        logging_steps=50,
        save_steps=500,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=500,
        log_images_steps=1000,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    pipeline = tiny_sd_pipeline(folder)
    prompts = Dataset.load_from_disk(str(folder / "prompts"))
    return SPOTrainer(
        config, pipeline, brightness_reward, train_dataset=prompts, eval_dataset=PROMPTS, callbacks=[meter]
    )


def step_reward_trainer(folder: Path, num_pairs: int, meter: Meter) -> StepRewardTrainer:
    def rows():
        generator = np.random.default_rng(0)
        for prompt in random_prompts(num_pairs):
            images = []
            for _ in range(2):
                buffer = io.BytesIO()
                Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, format="PNG")
                images.append(buffer.getvalue())
            label = float(generator.integers(2))
            yield {
                "caption": prompt, "jpg_0": images[0], "jpg_1": images[1], "label_0": label, "label_1": 1 - label,
            }  # fmt: skip

    file = folder / "pairs.parquet"
    Dataset.from_generator(rows, cache_dir=str(folder / "cache")).to_parquet(file)
    config = StepRewardConfig(
        output_dir=str(folder / "out"),
        resolution=16,
        per_device_train_batch_size=meter.pairs_per_step,
        gradient_accumulation_steps=1,
        max_steps=10**6,  # after a pass over a stream, the Trainer counts up to this before the next one
        learning_rate=1e-6,
        logging_steps=50,
        save_steps=500,
        save_total_limit=2,
        cache_latents=True,
        cache_latents_gb=0.005,  # full within a minute
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    reward_model = StepAwareRewardModel.from_clip(tiny_clip(folder))
    pairs = load_dataset("parquet", data_files=str(file), split="train", streaming=True).shuffle(buffer_size=1000)
    return StepRewardTrainer(config, tiny_sd_pipeline(folder), reward_model, train_dataset=pairs, callbacks=[meter])


def compare(samples: list[dict]) -> dict:
    """
    The second quarter, after everything that is filled once, against the last: the peak of the resident set, which moves
    with what a reader holds of a file, and the lower quartile of the cost, to which other processes can only add.
    """
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[3 * quarter :]
    result = {}
    for name, limit, quantile in (("rss_mib", MAX_GROWTH, 1.0), ("cpu_ms_per_pair", MAX_DRIFT, 0.25)):
        before, after = (float(np.quantile([sample[name] for sample in part], quantile)) for part in (early, late))
        result[name] = {
            "early": before,
            "late": after,
            "change": after / before - 1,
            "flat": after <= before * (1 + limit),
        }
    minutes = [sample["seconds"] / 60 for sample in samples[quarter:]]
    slope = np.polyfit(minutes, [sample["rss_mib"] for sample in samples[quarter:]], 1)[0]
    result["rss_slope_mib_per_hour"] = round(float(slope) * 60, 2)
    for name in ("files", "threads"):
        result[name] = {"early": max(s[name] for s in early), "late": max(s[name] for s in late)}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--trainer", choices=("spo", "step_reward"), default="spo")
    parser.add_argument("--num_rows", type=int, default=100_000, help="prompts, or image pairs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    # Train for the given time.
    torch.set_num_threads(1)
    seconds = 60 * args.minutes
    meter = Meter(seconds, every=seconds / 60, pairs_per_step=8)
    make = spo_trainer if args.trainer == "spo" else step_reward_trainer
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(Path(folder), args.num_rows, meter)
        gc.collect()
        trainer.train()

    # Compare the beginning with the end, and print the samples between.
    result = {"trainer": args.trainer, "minutes": args.minutes, "num_rows": args.num_rows, **compare(meter.samples)}
    result["samples"] = meter.samples
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'minute':>6} {'step':>7} {'RSS MiB':>8} {'CPU ms / pair':>13} {'files':>5} {'threads':>7}")
    for sample in meter.samples[:: max(1, len(meter.samples) // 15)]:
        print(
            f"{sample['seconds'] / 60:6.1f} {sample['step']:7d} {sample['rss_mib']:8.1f} "
            f"{sample['cpu_ms_per_pair']:13.3f} {sample['files']:5d} {sample['threads']:7d}"
        )
    rss = result["rss_mib"]
    cost = result["cpu_ms_per_pair"]
    print(
        f"{args.trainer}: peak resident set {rss['early']:.1f} -> {rss['late']:.1f} MiB ({rss['change']:+.2%}, "
        f"{result['rss_slope_mib_per_hour']:+.2f} MiB per hour), CPU per pair {cost['early']:.2f} -> {cost['late']:.2f} ms "
        f"({cost['change']:+.2%}), {meter.samples[-1]['step']} steps"
    )
    return 0 if rss["flat"] and cost["flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
