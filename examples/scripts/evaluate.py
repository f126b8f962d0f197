# /// script
# dependencies = [
#     "trl-spo",
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
Score the images of a model, alone or against its base with the same prompts and seeds, under a stated protocol.

```bash
# a LoRA against its base, with the metrics and the sampler of the paper's tables
python examples/scripts/evaluate.py --lora spo-sd15 --base --prompts validation.txt --protocol spo-paper

# under the reward model that trained it, on fewer prompts
python examples/scripts/evaluate.py --lora spo-sd15 --base --prompts validation.txt --num_prompts 100 \
    --metrics step_reward --reward_model_name_or_path step-reward-sd15

# a fully fine-tuned pipeline against the one it started from
python examples/scripts/evaluate.py --model_name_or_path my-sd15 \
    --base_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts validation.txt
```

Prints a Markdown table and writes `metrics.json`, `metrics.md` and `contact_sheet.png`. `--protocol` fixes the sampler,
which is that of the training by default; options such as `--num_inference_steps` or `--guidance_scale` change it, and the report says so. `trl-spo evaluate` is the
same program, `trl-spo sample` makes images only.
"""

from trl_spo.scripts.evaluate import main, make_parser


if __name__ == "__main__":
    model_args, sampler_args, reward_args, evaluate_args = make_parser().parse_args_and_config()
    main(model_args, sampler_args, reward_args, evaluate_args)
