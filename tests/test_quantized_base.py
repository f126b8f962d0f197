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
Necessity: large transformers fit a card with their base weights in 8 or 4 bits under a LoRA, and each quantization library
has tensors of its own: they answer no bitwise question, their dtype is not that of latents. diffusers' backends that run
on a CPU are tried here if they are installed; bitsandbytes, which diffusers refuses without a GPU, in
`tests/gpu/test_quantized_base.py`.
"""

import importlib.util
import math

import pytest
import torch
from diffusers import QuantoConfig, SD3Transformer2DModel, StableDiffusion3Pipeline, TorchAoConfig

from trl_spo import SPOTrainer, wrap_pipeline

from .flow_testing import tiny_sd3_pipeline
from .testing_utils import PROMPTS, brightness_reward, tiny_spo_config


def quanto_int8():
    pytest.importorskip("optimum.quanto", reason="`pip install optimum-quanto` for a base in quanto's int8")
    return QuantoConfig(weights_dtype="int8")


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization", reason="`pip install torchao` for a base in its int8")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def load(folder, quantization_config) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel.from_pretrained(
        folder, subfolder="transformer", quantization_config=quantization_config, torch_dtype=torch.float32
    )
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def values(tensor: torch.Tensor) -> torch.Tensor:
    """Of a quantised tensor what it stands for."""
    tensor = tensor.detach()
    return tensor.dequantize() if type(tensor) not in (torch.Tensor, torch.nn.Parameter) else tensor


@pytest.mark.parametrize("make_config", [quanto_int8, torchao_int8])
def test_a_lora_is_trained_on_it_saved_and_loaded(make_config, tmp_path):
    quantization_config = make_config()
    tiny_sd3_pipeline(tmp_path).save_pretrained(tmp_path / "pipe")
    settings = {"num_inference_steps": 4, "guidance_scale": 4.5, "height": 32, "width": 32, "learning_rate": 1e-2}
    config = tiny_spo_config(tmp_path / "out", max_steps=1, per_device_train_batch_size=2, **settings)
    pipe = load(tmp_path / "pipe", quantization_config)
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert type(layer.weight.data) is not torch.Tensor  # it is quantised

    trainer = SPOTrainer(config, pipe, brightness_reward, train_dataset=PROMPTS)
    assert trainer.pipeline.compute_dtype == torch.float32
    assert trainer.rollout(PROMPTS[:1]).latents.dtype == torch.float32
    before = {name: values(p).clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log["ratio/chosen"] == log["ratio/rejected"] == 1
    assert log["grad_norm"] > 0
    for name, parameter in trainer.model.named_parameters():
        moved = not torch.equal(values(parameter), before[name])
        assert moved <= parameter.requires_grad, name
    assert any(p.requires_grad for p in trainer.model.parameters())

    # The LoRA loads on a fresh base and predicts what was trained.
    trainer.save_model()
    again = load(tmp_path / "pipe", quantization_config)
    again.load_lora_weights(tmp_path / "out")
    fresh = SPOTrainer(config, load(tmp_path / "pipe", quantization_config), brightness_reward, train_dataset=PROMPTS)
    fresh.load_model(tmp_path / "out")
    trained = trainer.generate(PROMPTS[:1])
    torch.testing.assert_close(fresh.generate(PROMPTS[:1]), trained, atol=1e-5, rtol=0)
    plain = again.transformer.transformer_blocks[0].attn.to_q
    own = trainer.pipeline.denoiser.transformer_blocks[0].attn.to_q
    inputs = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain(inputs), own(inputs), atol=1e-5, rtol=0)
    assert not torch.equal(own(inputs), own.base_layer(inputs))


def test_a_command_may_ask_for_it(tmp_path):
    """By path and in words of JSON, as `--model_init_kwargs` has them: only the network that is named is quantised."""
    quanto_int8()
    tiny_sd3_pipeline(tmp_path).save_pretrained(tmp_path / "pipe")
    int8 = {"transformer": {"quant_method": "quanto", "weights_dtype": "int8"}}
    kwargs = {"torch_dtype": "float32", "quantization_config": int8}
    pipeline = wrap_pipeline(tmp_path / "pipe", **kwargs)
    layer = pipeline.denoiser.transformer_blocks[0].attn.to_q
    assert type(layer.weight.data) is not torch.Tensor
    assert {type(p.data) for p in pipeline.vae.parameters()} == {torch.Tensor}
    settings = {"num_inference_steps": 4, "guidance_scale": 4.5, "height": 32, "width": 32}
    config = tiny_spo_config(tmp_path / "out", max_steps=1, model_init_kwargs=kwargs, **settings)
    trainer = SPOTrainer(config, tmp_path / "pipe", brightness_reward, train_dataset=PROMPTS)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["ratio/chosen"] == log["ratio/rejected"] == 1 and log["grad_norm"] > 0


@pytest.mark.parametrize("wrong, message", [
    ({"transfomer": {"quant_method": "quanto"}}, "which are transformer, vae; got transfomer"),
    ({"text_encoder": {"quant_method": "quanto"}}, "names networks of the pipeline.* got text_encoder"),
    ({}, "names networks of the pipeline.* got none"),
    ({"transformer": {"quant_method": "nf3"}}, "Unknown quantization type, got nf3"),
    ({"transformer": {"load_in_2bit": True}}, "of the transformer must be what diffusers writes into a `config.json`"),
    ({"transformer": "nf4"}, "of the transformer must be what diffusers writes.* got 'nf4'"),
])  # fmt: skip
def test_wrong_words_are_refused_before_weights_are_read(wrong, message, tmp_path):
    tiny_sd3_pipeline(tmp_path).save_pretrained(tmp_path / "pipe")
    for weights in (tmp_path / "pipe").rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ValueError, match=message):
        wrap_pipeline(tmp_path / "pipe", quantization_config=wrong)


def test_a_pipeline_that_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model_index.json").write_text("{")
    with pytest.raises(
        ValueError, match="Could not load a diffusers pipeline from .*empty': the folder is incomplete"
    ):
        wrap_pipeline(tmp_path / "empty", quantization_config={"transformer": {"load_in_4bit": True}})


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="it is installed")
def test_a_missing_library_is_named(tmp_path):
    tiny_sd3_pipeline(tmp_path).save_pretrained(tmp_path / "pipe")
    with pytest.raises(ImportError, match="of the transformer asks for a library that is not there: .*bitsandbytes"):
        wrap_pipeline(tmp_path / "pipe", quantization_config={"transformer": {"load_in_4bit": True}})


@pytest.mark.parametrize("make_config", [quanto_int8, torchao_int8])
def test_training_all_of_it_is_refused_before_any_work(make_config, tmp_path):
    quantization_config = make_config()
    tiny_sd3_pipeline(tmp_path).save_pretrained(tmp_path / "pipe")
    config = tiny_spo_config(tmp_path / "out", use_peft=False, height=32, width=32)
    with pytest.raises(ValueError, match="cannot be trained as a whole. Train an adapter"):
        SPOTrainer(config, load(tmp_path / "pipe", quantization_config), brightness_reward, train_dataset=PROMPTS)
