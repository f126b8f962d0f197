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

from trl import TrlParser

from ..spo_config import SPOConfig
from .arguments import (
    DiffusionModelArguments,
    EvaluationDataArguments,
    RewardModelArguments,
    train_and_save,
)


def make_parser(prog: str | None = None) -> TrlParser:
    """The parser whose results [`main`] takes."""
    return TrlParser((DiffusionModelArguments, RewardModelArguments, EvaluationDataArguments, SPOConfig), prog=prog)


def main(
    model_args: DiffusionModelArguments,
    reward_args: RewardModelArguments,
    data_args: EvaluationDataArguments,
    config: SPOConfig,
):
    """Loads what the arguments name, trains, and saves the adapter to `config.output_dir`."""
    from ..prompts import load_prompts
    from ..spo_trainer import SPOTrainer

    if config.dataset_name is None:
        raise SystemExit("SPO needs prompts: name a dataset or a .txt file of prompts with --dataset_name.")
    evaluation = data_args.eval_dataset_name
    pipeline = model_args.load_pipeline(**(config.model_init_kwargs or {}))
    trainer = SPOTrainer(
        config,
        pipeline,
        reward_args.load(),
        train_dataset=load_prompts(config.dataset_name, "train"),
        eval_dataset=None if evaluation is None else load_prompts(evaluation, data_args.eval_split),
        peft_config=model_args.peft_config(pipeline) if config.use_peft else None,
    )
    train_and_save(trainer, config)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
