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

"""Started by `test_spo_trainer.py` in two processes: trains, and writes what each rank saw to `rank_{r}.json`."""

import json
import os
import sys
from pathlib import Path

import torch

from tests.testing_utils import PROMPTS, tiny_sd_pipeline, tiny_spo_config
from trl_spo import SPOTrainer


class Recorder(SPOTrainer):
    """Remembers the size of each batch and the number of pairs its own rollouts found."""

    batches: list
    own_pairs: int

    def rollout(self, prompts, **kwargs):
        pairs = super().rollout(prompts, **kwargs)
        self.own_pairs += len(pairs)
        return pairs

    def compute_loss(self, model, inputs, **kwargs):
        self.batches.append(len(inputs["pairs"]))
        return super().compute_loss(model, inputs, **kwargs)


def reward(images, prompts, timesteps):
    """Prompts with a cat get equal scores, so they never form a pair."""
    scores = 100 * (images[:, 0] - images[:, 1]).mean(dim=(1, 2))
    return torch.stack([score * ("cat" not in prompt) for score, prompt in zip(scores, prompts, strict=True)])


def main(folder: Path):
    rank = int(os.environ["RANK"])
    config = tiny_spo_config(
        folder / "out",
        per_device_rollout_batch_size=2,
        per_device_train_batch_size=3,
        num_train_epochs=2,
        use_cpu=True,
    )
    Recorder.batches, Recorder.own_pairs = [], 0
    trainer = Recorder(
        config, tiny_sd_pipeline(folder / f"tokenizer_{rank}"), reward, train_dataset=PROMPTS, eval_dataset=PROMPTS[:5]
    )
    trainer.train()
    evaluation = trainer.evaluate()["eval_reward_mean"]
    alone = trainer.score(trainer.generate(PROMPTS[:5]), PROMPTS[:5])["reward"].mean().item()
    one_prompt = trainer.evaluate(PROMPTS[:1])["eval_reward_mean"]  # the second process has no share of it
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    log = [log for log in trainer.state.log_history if "loss" in log][-1]
    result = {
        "lora": [p.sum().item() for n, p in trainer.model.named_parameters() if p.requires_grad],
        "batches": trainer.batches,
        "own_pairs": trainer.own_pairs,
        "log": {k: v for k, v in log.items() if not k.startswith("time/")},
        "evaluation": evaluation,
        "one_prompt": one_prompt,
        "evaluation_alone": alone,
        "saved": (folder / "out" / "pytorch_lora_weights.safetensors").is_file(),
    }
    (folder / f"rank_{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()  # its threads can abort a process that ends
