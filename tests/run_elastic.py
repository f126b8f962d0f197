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
The program that `test_elastic.py` starts under a launcher: `run_elastic.py FOLDER [PLACE] [--apart]`. Each rank trains SPO and appends what it
trained on to `FOLDER/steps_{rank}.txt`. With a place of `test_elastic.PLACES` one rank is killed there, in its first life, when a checkpoint
has the first two of five steps. With `--apart` each rank has a process that rolls out for it.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback


sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.run_distributed import redness, shard_on_cpu
from tests.test_elastic import PLACES
from tests.testing_utils import PROMPTS, tiny_sd_pipeline, tiny_spo_config
from trl_spo import SPOTrainer
from trl_spo.pipelines.shards import whole


RANK = int(os.environ["RANK"])


def count_life(folder: Path) -> int:
    """How often this rank has begun before. Of two launchers, only that of the rank that died counts restarts."""
    with open(folder / f"lives_{RANK}.txt", "a") as file:
        file.write(".")
    return len((folder / f"lives_{RANK}.txt").read_text()) - 1


class Recording(SPOTrainer):
    """Writes down what it trains on, and dies where it is told."""

    folder: Path
    life: int
    place: str | None

    def die_in(self, place: str) -> None:
        rank, step = PLACES[place]
        if (self.place, self.life, self.state.global_step, RANK) == (place, 0, step, rank):
            os.kill(os.getpid(), signal.SIGKILL)

    def rollout(self, *args, **kwargs):
        pairs = super().rollout(*args, **kwargs)
        self.die_in("rollout")
        return pairs

    def training_step(self, model, inputs, *args, **kwargs):
        pairs = inputs["pairs"]
        entry = {"life": self.life, "step": self.state.global_step, "prompts": pairs.prompts}
        entry["latents"] = pairs.latents.double().sum().item()
        with open(self.folder / f"steps_{RANK}.txt", "a") as file:
            file.write(json.dumps(entry) + "\n")
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.die_in("backward")
        return loss

    def _write_state(self, folder: Path) -> None:
        super()._write_state(folder)
        self.die_in("checkpoint")


class Dies(TrainerCallback):
    """Between two steps."""

    def __init__(self, trainer: Recording):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.die_in("step")


def main(folder: Path, place: str | None, apart: bool):
    devices = ["cpu"] * int(os.environ["LOCAL_WORLD_SIZE"]) if apart else None  # of this machine
    config = tiny_spo_config(
        folder / "out", max_steps=5, num_inference_steps=3, guidance_scale=1.0, per_device_rollout_batch_size=1,
        per_device_train_batch_size=2, save_strategy="steps", save_steps=2, learning_rate=1e-2, ddp_timeout=60,
        rollout_devices=devices,
    )  # fmt: skip
    pipeline = tiny_sd_pipeline(folder / f"tokenizer_{RANK}")
    trainer = Recording(config, pipeline, redness, train_dataset=PROMPTS)
    trainer.folder, trainer.life, trainer.place = folder, count_life(folder), place
    trainer.add_callback(Dies(trainer))
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = [whole(p) for p in model.parameters() if p.requires_grad]
    torch.save(
        {"weights": weights, "life": trainer.life, "shards": trainer._shards, "devices": devices},
        folder / f"end_{RANK}.pt",
    )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("place", nargs="?")
    parser.add_argument("--apart", action="store_true")
    words = parser.parse_args()
    shard_on_cpu()
    main(words.folder, words.place, words.apart)
    sys.stdout.flush()
    sys.stderr.flush()
    # On a busy machine a thread of torch aborts one of many processes that end, which would count as a death.
    os._exit(0)
