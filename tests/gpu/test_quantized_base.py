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
Necessity: FLUX.1-dev fits 24 GB with its transformer in bitsandbytes' nf4 under a LoRA. diffusers loads such weights on a
GPU only, so what `tests/test_quantized_base.py` asks of other libraries is asked of this one here.
"""

import math

import pytest
import torch
from diffusers import BitsAndBytesConfig, SD3Transformer2DModel, StableDiffusion3Pipeline

from tests.flow_testing import tiny_sd3_pipeline
from tests.testing_utils import PROMPTS, brightness_reward, tiny_spo_config
from trl_spo import SPOTrainer


@pytest.mark.skipif(not torch.cuda.is_available(), reason="diffusers loads bitsandbytes' weights on a GPU only")
@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    ],
    ids=["int8", "nf4"],
)
def test_a_lora_is_trained_on_bitsandbytes_weights(settings, tmp_path):
    pytest.importorskip("bitsandbytes", reason="`pip install bitsandbytes` for a base in nf4 or int8")
    tiny_sd3_pipeline(tmp_path).save_pretrained(tmp_path / "pipe")
    transformer = SD3Transformer2DModel.from_pretrained(
        tmp_path / "pipe",
        subfolder="transformer",
        quantization_config=BitsAndBytesConfig(**settings),
        torch_dtype=torch.bfloat16,
    )
    pipe = StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "pipe", transformer=transformer, torch_dtype=torch.bfloat16
    )
    size = {"height": 32, "width": 32, "guidance_scale": 4.5}
    config = tiny_spo_config(tmp_path / "out", max_steps=1, per_device_train_batch_size=2, bf16=True, **size)
    trainer = SPOTrainer(config, pipe, brightness_reward, train_dataset=PROMPTS)
    assert trainer.pipeline.compute_dtype == torch.bfloat16
    assert trainer.rollout(PROMPTS[:1]).latents.dtype == torch.float32
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert log["ratio/chosen"] == pytest.approx(1, abs=1e-3)
    assert log["grad_norm"] > 0
    for name, parameter in trainer.model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, frozen[name]), name
    trainer.save_model()
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
