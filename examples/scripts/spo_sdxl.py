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
Train a LoRA of Stable Diffusion XL with SPO.

```bash
# as published: 4 devices
accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml --num_processes 4 \
    examples/scripts/spo_sdxl.py --dataset_name my/prompts --output_dir spo-sdxl
```

The program of `spo.py`, with `examples/configs/spo_sdxl.yaml` where `--config` names no other file: rank 64, two
candidates that go on for four steps, a threshold of 0.4, and a VAE that survives half precision. Options on the command
line go before the file. At 1024 pixels `--rollout_micro_batch_size` and `--vae_decode_batch_size` bound the memory.
"""

import sys
from pathlib import Path

from trl_spo.scripts.spo import main, make_parser


PRESET = Path(__file__).parents[1] / "configs" / "spo_sdxl.yaml"


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--config" not in arguments:
        arguments = ["--config", str(PRESET), *arguments]
    model_args, reward_args, data_args, config = make_parser().parse_args_and_config(arguments)
    main(model_args, reward_args, data_args, config)
