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
Train the step-aware reward model of SPO on preference images.

```shell
accelerate launch examples/scripts/step_reward.py --config examples/configs/step_reward_sd15.yaml
accelerate launch examples/scripts/step_reward.py --config examples/configs/step_reward_sdxl.yaml
```

`--dataset_name` is a Hub id, a parquet file or a folder of them, in Pick-a-Pic's or TRL's preference format.
"""

from script_arguments import DiffusionModelArguments, EvaluationDataArguments, RewardModelArguments
from trl import TrlParser

from trl_spo import StepRewardConfig, StepRewardTrainer
from trl_spo.step_preference_data import load_preference_dataset


def main(
    model_args: DiffusionModelArguments,
    reward_args: RewardModelArguments,
    data_args: EvaluationDataArguments,
    config: StepRewardConfig,
):
    evaluation = None
    if data_args.eval_dataset_name is not None:
        evaluation = load_preference_dataset(data_args.eval_dataset_name, split=data_args.eval_split)
    trainer = StepRewardTrainer(config, model_args.load_pipeline(), reward_args.load(), eval_dataset=evaluation)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    if config.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main(
        *TrlParser(
            (DiffusionModelArguments, RewardModelArguments, EvaluationDataArguments, StepRewardConfig)
        ).parse_args_and_config()
    )
