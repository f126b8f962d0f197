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
Train the reward model of SPO, or the latent one of LPO, on preference images.

```bash
trl-spo step-reward --config sd15
accelerate launch -m trl_spo.scripts.step_reward --config examples/configs/step_reward_sd15.yaml
```
"""

from ..step_reward_config import StepRewardConfig
from .arguments import EvaluationDataArguments, PipelineArguments, RewardModelArguments
from .errors import run
from .parser import ScriptParser
from .training import (
    check_evaluation_data,
    check_run,
    measured,
    next_command,
    pipeline_options,
    size_of,
    train_and_save,
    work_done,
)


def make_parser(prog: str | None = None) -> ScriptParser:
    """The parser whose results [`main`] takes."""
    types = (PipelineArguments, RewardModelArguments, EvaluationDataArguments, StepRewardConfig)
    return ScriptParser(types, prog=prog, presets=("step_reward", "latent_reward"))


def main(
    model_args: PipelineArguments,
    reward_args: RewardModelArguments,
    data_args: EvaluationDataArguments,
    config: StepRewardConfig,
):
    """Loads what the arguments name, trains, and saves the reward model to `config.output_dir`."""
    from transformers import set_seed

    from ..preference_dataset import load_preference_dataset
    from ..step_reward_trainer import StepRewardTrainer
    from ..training.log_lines import STEP_REWARD_COLUMNS

    # What costs nothing, before anything is loaded.
    if config.dataset_name is None:
        raise SystemExit("A reward model learns from preferences: name a dataset of image pairs with --dataset_name.")
    check_run(config, StepRewardTrainer)
    check_evaluation_data(config, data_args.eval_dataset_name)
    preferences = None  # the trainer shuffles what it streams
    if not config.dataset_streaming:
        preferences = load_preference_dataset(config.dataset_name)
    evaluation = None
    if data_args.eval_dataset_name is not None:
        evaluation = load_preference_dataset(data_args.eval_dataset_name, split=data_args.eval_split)

    set_seed(config.seed)  # a fresh reward model draws its timestep embedding, or its heads
    pipeline = model_args.load_pipeline(**(config.model_init_kwargs or {}))
    trainer = StepRewardTrainer(
        config, pipeline, reward_args.load(pipeline), train_dataset=preferences, eval_dataset=evaluation
    )
    train_and_save(
        trainer, config, STEP_REWARD_COLUMNS, "reward model", lambda seconds: ending(trainer, seconds, model_args)
    )


def ending(trainer, duration: str, model_args: PipelineArguments) -> str:
    """Where the result is, what came of it, and the command that uses it."""
    folder = trainer.args.output_dir
    size = size_of(folder, "*.safetensors")
    saved = f"Saved the reward model to {folder} ({size}; {work_done(trainer, duration)}).\n"
    options = pipeline_options(model_args)
    for name, default in (("guidance_scale", 5.0), ("guidance_rescale", 0.0), ("clip_skip", 0)):
        value = getattr(trainer.args, name)  # it judges predictions that were made with these
        if trainer.sees == "images" and value != default:
            options += [f"--{name}", f"{value:g}"]
    options += ["--reward_model_name_or_path", folder, "--dataset_name", "PROMPTS.txt"]
    return saved + measured(trainer) + next_command("trl-spo spo", *options)


if __name__ == "__main__":
    run(main, make_parser())
