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
Necessity: an example that nobody runs ages. Each script runs as its user would start it, at toy size, and what it wrote
is loaded and sampled from by plain diffusers.
"""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from trl_spo import StepAwareRewardModel

from .testing_utils import PROMPTS, tiny_clip, tiny_sd_pipeline, tiny_sdxl_pipeline


SCRIPTS = Path(__file__).parents[1] / "examples" / "scripts"
COMMON = ["--report_to", "none", "--use_cpu", "true", "--logging_steps", "1", "--save_strategy", "no"]


def run(script: str, *arguments, code: int = 0) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS.parents[1])}
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments), *COMMON]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == code, result.stderr[-3000:]
    return result.stdout + result.stderr


def image_bytes(color) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), color).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("maker", [tiny_sd_pipeline, tiny_sdxl_pipeline])
def test_spo(tmp_path, maker):
    maker(tmp_path).save_pretrained(tmp_path / "pipe")
    folder = tiny_clip(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    arguments = ["--model_name_or_path", tmp_path / "pipe", "--clip_name_or_path", folder]
    arguments += ["--processor_name_or_path", folder, "--dataset_name", tmp_path / "prompts.txt"]
    arguments += ["--output_dir", tmp_path / "out", "--num_inference_steps", 4, "--branch_start_step", 1]
    arguments += ["--preference_threshold", 0.0, "--max_steps", 2, "--per_device_train_batch_size", 4]
    arguments += ["--lora_r", 2, "--lora_alpha", 4, "--learning_rate", 0.05, "--per_device_rollout_batch_size", 2]
    run("spo.py", *arguments)
    fresh = maker(tmp_path)

    def sample():
        generator = torch.Generator().manual_seed(0)
        return fresh(PROMPTS[:1], generator=generator, num_inference_steps=3, output_type="np").images

    base = sample()
    fresh.load_lora_weights(tmp_path / "out")
    assert fresh.unet.peft_config["default_0"].lora_alpha == 4
    assert np.abs(sample() - base).max() > 1e-3


def test_step_reward_from_a_parquet_file(tmp_path):
    tiny_sd_pipeline(tmp_path).save_pretrained(tmp_path / "pipe")
    folder = tiny_clip(tmp_path)
    rows = {
        "caption": PROMPTS,
        "jpg_0": [image_bytes("red")] * 6,
        "jpg_1": [image_bytes("blue")] * 6,
        "label_0": [1.0] * 6,
        "label_1": [0.0] * 6,
    }
    Dataset.from_dict(rows).to_parquet(tmp_path / "pairs.parquet")
    arguments = ["--model_name_or_path", tmp_path / "pipe", "--clip_name_or_path", folder, "--resolution", 16]
    arguments += ["--processor_name_or_path", folder, "--dataset_name", tmp_path / "pairs.parquet", "--max_steps", 3]
    arguments += ["--output_dir", tmp_path / "out", "--per_device_train_batch_size", 3, "--learning_rate", 0.01]
    run("step_reward.py", *arguments, "--gradient_accumulation_steps", 1, "--warmup_steps", 0)
    trained = StepAwareRewardModel.from_pretrained(tmp_path / "out")
    start = StepAwareRewardModel.from_clip(folder, processor=folder)
    image = torch.rand(1, 3, 16, 16)
    assert not torch.equal(trained.score(image, PROMPTS[:1], 501), start.score(image, PROMPTS[:1], 501))


def test_missing_prompts_are_one_sentence(tmp_path):
    output = run("spo.py", "--output_dir", tmp_path, code=1)
    assert output.strip().splitlines()[-1].startswith("SPO needs prompts: name a dataset")
