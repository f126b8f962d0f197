# /// script
# dependencies = [
#     "trl-spo",
#     "tensorboard",
# ]
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

```bash
python examples/scripts/step_reward.py \
    --config examples/configs/step_reward_sd15.yaml \
    --output_dir step-reward-sd15

# several devices: devices x batch x accumulation must stay 64 to be the published run
accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml --num_processes 4 \
    examples/scripts/step_reward.py --config examples/configs/step_reward_sdxl.yaml --gradient_accumulation_steps 4
```

`--dataset_name` is a Hub id, a parquet file or a folder of them, in Pick-a-Pic's or TRL's preference format. The result
is a folder for `StepAwareRewardModel.from_pretrained`, and for `--reward_model_name_or_path` of the other scripts.
`trl-spo step-reward` is the same program.
"""

from trl_spo.scripts.step_reward import main, make_parser


if __name__ == "__main__":
    model_args, reward_args, data_args, config = make_parser().parse_args_and_config()
    main(model_args, reward_args, data_args, config)
