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
Train a LoRA of Stable Diffusion with SPO.

```bash
# one device
python examples/scripts/spo.py \
    --config examples/configs/spo_sd15.yaml \
    --dataset_name my/prompts \
    --output_dir spo-sd15

# as published: 4 devices, 40 pairs per optimizer step
accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml --num_processes 4 \
    examples/scripts/spo.py --config examples/configs/spo_sd15.yaml --dataset_name my/prompts
```

`--dataset_name` is a dataset with a `prompt` or `caption` column (a Hub id, a folder, a .csv, .jsonl or .parquet file),
a `.txt` file with one prompt per line, or a `.json` list. Without the published reward model, name your own with
`--reward_model_name_or_path`. Anything of `SPOConfig` and of `transformers.TrainingArguments` is an option, such as
`--resume_from_checkpoint last`, `--report_to tensorboard` or `--push_to_hub`.

The result loads in plain diffusers: `pipe.load_lora_weights("spo-sd15")`. `trl-spo spo` is the same program.
"""

from trl_spo.scripts.spo import main, make_parser


if __name__ == "__main__":
    model_args, reward_args, data_args, config = make_parser().parse_args_and_config()
    main(model_args, reward_args, data_args, config)
