# /// script
# dependencies = ["trl-spo"]
# ///
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
Train a LoRA with SPO. Stable Diffusion and SDXL run through the same script.

```shell
accelerate launch examples/scripts/spo.py --config examples/configs/spo_sd15.yaml --dataset_name my/prompts
accelerate launch examples/scripts/spo.py --config examples/configs/spo_sdxl.yaml --dataset_name my/prompts
```

Without the published reward model, name your own with `--reward_model_name_or_path`. `--dataset_name` is a dataset with a
`prompt` or `caption` column: a Hub id, or a `.txt` file with one prompt per line.
"""

from pathlib import Path

from datasets import load_dataset
from script_arguments import DiffusionModelArguments, EvaluationDataArguments, RewardModelArguments
from trl import TrlParser

from trl_spo import SPOConfig, SPOTrainer


def load_prompts(name: str, split: str):
    """Prompts of a text file, one per line, or of a dataset."""
    if Path(name).suffix == ".txt":
        return [line for line in Path(name).read_text(encoding="utf-8").splitlines() if line.strip()]
    return load_dataset(name, split=split)


def main(
    model_args: DiffusionModelArguments,
    reward_args: RewardModelArguments,
    data_args: EvaluationDataArguments,
    config: SPOConfig,
):
    if config.dataset_name is None:
        raise SystemExit("SPO needs prompts: name a dataset or a .txt file of prompts with --dataset_name.")
    evaluation = data_args.eval_dataset_name
    trainer = SPOTrainer(
        config,
        model_args.load_pipeline(**(config.model_init_kwargs or {})),
        reward_args.load(),
        train_dataset=load_prompts(config.dataset_name, "train"),
        eval_dataset=None if evaluation is None else load_prompts(evaluation, data_args.eval_split),
        peft_config=model_args.peft_config() if config.use_peft else None,
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    if config.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main(
        *TrlParser(
            (DiffusionModelArguments, RewardModelArguments, EvaluationDataArguments, SPOConfig)
        ).parse_args_and_config()
    )
