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
trl-spo spo --config examples/configs/spo_sd15.yaml --dataset_name my/prompts
accelerate launch -m trl_spo.scripts.spo --config examples/configs/spo_sd15.yaml --dataset_name my/prompts
```
"""

from ..spo_config import SPOConfig
from .arguments import (
    DiffusionModelArguments,
    EvaluationDataArguments,
    RewardArguments,
    train_and_save,
)
from .errors import run
from .parser import ScriptParser


def make_parser(prog: str | None = None) -> ScriptParser:
    """The parser whose results [`main`] takes."""
    return ScriptParser((DiffusionModelArguments, RewardArguments, EvaluationDataArguments, SPOConfig), prog=prog)


def main(
    model_args: DiffusionModelArguments,
    reward_args: RewardArguments,
    data_args: EvaluationDataArguments,
    config: SPOConfig,
):
    """Loads what the arguments name, trains, and saves the adapter to `config.output_dir`."""
    from ..prompts import load_prompts
    from ..spo_trainer import SPOTrainer

    # What costs nothing, before anything is loaded.
    if config.dataset_name is None:
        raise SystemExit("SPO needs prompts: name a dataset or a .txt file of prompts with --dataset_name.")
    SPOTrainer.check_output(config)
    reward_args.check()
    prompts = load_prompts(config.dataset_name, "train")
    evaluation = None
    if data_args.eval_dataset_name is not None:
        evaluation = load_prompts(data_args.eval_dataset_name, data_args.eval_split)

    pipeline = model_args.load_pipeline(**(config.model_init_kwargs or {}))
    trainer = SPOTrainer(
        config,
        pipeline,
        reward_args.load(),
        train_dataset=prompts,
        eval_dataset=evaluation,
        peft_config=model_args.peft_config(pipeline) if config.use_peft else None,
    )
    train_and_save(trainer, config)


if __name__ == "__main__":
    run(main, make_parser())
