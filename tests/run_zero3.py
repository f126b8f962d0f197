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
The program that `test_zero3.py` starts in two processes: `run_fsdp2.py` under DeepSpeed ZeRO-3, which has to part with every
weight, also with small ones, that it keeps by default.
"""

import sys
from pathlib import Path

from accelerate.utils import DeepSpeedPlugin
from transformers import TrainerCallback

from tests import run_fsdp2
from tests.run_distributed import (
    MORE_PROMPTS,
    RecordingTrainer,
    resumed_reward,
    spo_config,
    spo_result,
    step_reward,
    trained,
)
from tests.testing_utils import PROMPTS


def part_with_every_weight():
    original = DeepSpeedPlugin.__post_init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = init


def compared(folder: Path, recipe) -> dict:
    """`run_fsdp2.compared`, and how many numbers of the denoiser are in this process when nobody calls it."""
    trainer = run_fsdp2.build(folder, recipe)
    result = run_fsdp2.finish(trainer)
    networks = [
        network for network in (trainer.pipeline.denoiser, trainer.pipeline._frozen_copy) if network is not None
    ]
    parameters = [parameter for network in networks for parameter in network.parameters()]
    return {
        **result,
        "present": sum(parameter.numel() for parameter in parameters),
        "partitioned": sum(hasattr(parameter, "ds_id") for parameter in parameters),
        "frozen_is_sharded": len(networks) == 2 and run_fsdp2.is_sharded(networks[1]),
    }


def half_precision_of_all(folder: Path) -> dict:
    """A step of a whole float32 denoiser in bf16, which DeepSpeed stores in bfloat16."""
    pipeline, reward, settings = run_fsdp2.whole_unet(folder)
    config = spo_config(folder, **{**run_fsdp2.COMPARED, **settings, **run_fsdp2.ONE_STEP, "bf16": True})
    trainer = RecordingTrainer(config, pipeline, reward, MORE_PROMPTS[:4])
    trainer.train()
    images = trainer.generate(PROMPTS[:1])
    return {**spo_result(trainer), "dtypes": {p.dtype for p in pipeline.unet.parameters()}, "images": images}


class LoadsAgain(TrainerCallback):
    """Loads other weights after the first step, and keeps the weights before, then, and after the second step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.before = trained(self.trainer)
            self.trainer.load_model(self.source)
            self.loaded = trained(self.trainer)
        else:
            self.after = trained(self.trainer)


def loaded_again(folder: Path) -> dict:
    settings = {"max_steps": 2, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0, "eval_strategy": "no"}
    settings |= {"save_strategy": "no", "log_images_steps": 0}
    found = {}
    for name in ("unet", "whole_unet"):
        recipe, place = getattr(run_fsdp2, name), folder / name
        source = run_fsdp2.build(place, recipe, name="source", **settings, learning_rate=10.0)
        source.train()
        source.save_model()
        trainer = run_fsdp2.build(place, recipe, name="target", **settings, learning_rate=1e-8)
        callback = LoadsAgain()
        callback.trainer, callback.source = trainer, place / "source"
        trainer.add_callback(callback)
        trainer.train()
        found[name] = {
            "saved": trained(source),
            "before": callback.before,
            "loaded": callback.loaded,
            "after": callback.after,
        }
    return found


def main(folder: Path, scenarios: list[str]):
    run_fsdp2.compared = compared
    run_fsdp2.loaded_again = loaded_again
    run_fsdp2.half_precision_of_all = half_precision_of_all
    run_fsdp2.step_reward, run_fsdp2.resumed_reward = step_reward, resumed_reward
    run_fsdp2.main(folder, scenarios)


if __name__ == "__main__":
    part_with_every_weight()
    main(Path(sys.argv[1]), sys.argv[2:])
