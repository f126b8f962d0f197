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
Train a LoRA with SPO. All model families run through the same code.

```bash
trl-spo spo --config sd15 --dataset_name my/prompts
accelerate launch -m trl_spo.scripts.spo --config examples/configs/spo_sd15.yaml --dataset_name my/prompts
```
"""

from ..spo_config import SPOConfig
from .arguments import DiffusionModelArguments, EvaluationDataArguments, RewardArguments
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
    types = (DiffusionModelArguments, RewardArguments, EvaluationDataArguments, SPOConfig)
    return ScriptParser(types, prog=prog, presets=("spo", "lpo"))


def main(
    model_args: DiffusionModelArguments,
    reward_args: RewardArguments,
    data_args: EvaluationDataArguments,
    config: SPOConfig,
):
    """Loads what the arguments name, trains, and saves the adapter to `config.output_dir`."""
    from ..prompts import load_prompts, read_prompts
    from ..spo_trainer import SPOTrainer
    from ..training.log_lines import SPO_COLUMNS

    # What costs nothing, before anything is loaded.
    if config.dataset_name is None:
        raise SystemExit("SPO needs prompts: name a dataset or a .txt file of prompts with --dataset_name.")
    check_run(config, SPOTrainer)
    check_evaluation_data(config, data_args.eval_dataset_name)
    if config.use_peft:
        model_args.check_lora()
    reward_args.check()
    prompts = load_prompts(config.dataset_name, "train", streaming=config.dataset_streaming)
    prompts = read_prompts(prompts, config.dataset_prompt_column)
    evaluation = None
    if data_args.eval_dataset_name is not None:
        evaluation = load_prompts(data_args.eval_dataset_name, data_args.eval_split)
        evaluation = read_prompts(evaluation, config.dataset_prompt_column, "eval_dataset_name")

    pipeline = model_args.load_pipeline(**(config.model_init_kwargs or {}))
    trainer = SPOTrainer(
        config,
        pipeline,
        reward_args.load(),
        train_dataset=prompts,
        eval_dataset=evaluation,
        peft_config=model_args.peft_config(pipeline) if config.use_peft else None,
    )
    train_and_save(
        trainer, config, SPO_COLUMNS, "SPO", lambda seconds: ending(trainer, seconds, model_args, data_args)
    )


def ending(trainer, duration: str, model_args: DiffusionModelArguments, data_args: EvaluationDataArguments) -> str:
    """Where the result is, what came of it, and the command that measures it."""
    folder = trainer.args.output_dir
    is_lora = trainer.pipeline.use_lora
    what = "LoRA" if is_lora else trainer.pipeline.denoiser_name
    size = size_of(folder if is_lora else f"{folder}/{what}", "*.safetensors")
    pairs = f" on {trainer.pair_loader.num_pairs_seen} pairs"
    saved = f"Saved the {what} to {folder} ({size}; {work_done(trainer, duration, pairs)}).\n{measured(trainer)}"
    if not is_lora:
        return f"{saved}Next: {folder}/README.md says how to load it."
    prompts = data_args.eval_dataset_name or "HELD_OUT_PROMPTS.txt"
    options = pipeline_options(model_args)
    return saved + next_command("trl-spo evaluate", "--lora", folder, "--base", *options, "--prompts", prompts)


if __name__ == "__main__":
    run(main, make_parser())
