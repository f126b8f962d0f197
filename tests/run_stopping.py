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

"""Two processes, of which one gets a signal: run by `test_stopping.py` through `accelerate launch`."""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback


sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.testing_utils import PROMPTS, brightness_reward, tiny_sd_pipeline, tiny_spo_config
from trl_spo import SPOTrainer, StopOnSignalCallback


RANK = int(os.environ["RANK"])


class PressOnRank1(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def make(folder: Path, name: str, *callbacks) -> SPOTrainer:
    config = tiny_spo_config(folder / name, max_steps=4, per_device_rollout_batch_size=1, use_cpu=True)
    return SPOTrainer(
        config,
        tiny_sd_pipeline(folder / f"tokenizer_{RANK}"),
        brightness_reward,
        train_dataset=PROMPTS,
        callbacks=[*callbacks, StopOnSignalCallback()],
    )


def weights(trainer: SPOTrainer) -> str:
    digest = hashlib.sha256()
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def main(folder: Path):
    whole, stopped, resumed = make(folder, "whole"), make(folder, "out", PressOnRank1()), make(folder, "out")
    whole.train()
    stopped.train()
    checkpoints = sorted(path.name for path in (folder / "out").glob("checkpoint-*"))
    resumed.train(resume_from_checkpoint=True)
    result = {
        "stopped_by": stopped.stopped_by,
        "stopped_at": stopped.state.global_step,
        "checkpoints": checkpoints,
        "weights": {"whole": weights(whole), "stopped": weights(stopped), "resumed": weights(resumed)},
    }
    (folder / f"rank_{RANK}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
