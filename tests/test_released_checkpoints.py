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
Why this file exists: released SPO weights come in the formats of three years of diffusers, and people want to start from
them. Each format must reach the UNet with the right numbers through plain diffusers, and a merged LoRA must be a base
model like any other: trained on, with itself as the reference. Nothing that is loaded may run code.
"""

import math
import pickle

import pytest
import torch
from safetensors.torch import save_file

from trl_spo import SPOTrainer, wrap_pipeline

from .testing_utils import (
    PROMPTS,
    brightness_reward,
    changed,
    state_of,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
    tiny_spo_config,
)


RANK, ALPHA = 2, 1.0
TARGETS = (".to_q", ".to_k", ".to_v", ".to_out.0")


def low_rank_updates(unet, seed=0):
    """Random A (r, in) and B (out, r) for every attention projection of the UNet."""
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for name, module in unet.named_modules():
        if name.endswith(TARGETS) and hasattr(module, "weight"):
            out_features, in_features = module.weight.shape
            down = torch.randn(RANK, in_features, generator=generator) * 0.2
            updates[name] = (down, torch.randn(out_features, RANK, generator=generator) * 0.2)
    assert len(updates) >= 8
    return updates


def processor_name(name, part):
    """`...attn1.to_out.0` -> `...attn1.processor.to_out_lora.down.weight`, the names of 2023."""
    parent, _, projection = name.removesuffix(".0").rpartition(".")
    return f"{parent}.processor.{projection}_lora.{part}.weight"


FORMATS = {
    "peft": lambda name: (f"unet.{name}.lora_A.weight", f"unet.{name}.lora_B.weight"),
    "diffusers": lambda name: (f"unet.{name}.lora.down.weight", f"unet.{name}.lora.up.weight"),
    "attention_processor": lambda name: tuple(f"unet.{processor_name(name, part)}" for part in ("down", "up")),
    "kohya": lambda name: tuple(f"lora_unet_{name.replace('.', '_')}.lora_{part}.weight" for part in ("down", "up")),
}


def write_lora(folder, updates, kind):
    """A LoRA file as others published it; returns the factor in front of B A."""
    tensors = {}
    for name, matrices in updates.items():
        for key, matrix in zip(FORMATS[kind](name), matrices, strict=True):
            tensors[key] = matrix.contiguous()
        if kind == "kohya":  # the one format that carries its alpha
            tensors[FORMATS[kind](name)[0].replace("lora_down.weight", "alpha")] = torch.tensor(ALPHA)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
    return ALPHA / RANK if kind == "kohya" else 1.0


def merged_weights(unet, updates, factor):
    """W + factor * B A, by hand."""
    weights = state_of(unet)
    for name, (down, up) in updates.items():
        weights[f"{name}.weight"] += factor * up @ down
    return weights


def denoise(pipeline):
    """One guided prediction of a pipeline's UNet."""
    wrapped = wrap_pipeline(pipeline)
    latents = torch.randn(2, *wrapped.latent_shape(), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return wrapped.predict(latents, 501, wrapped.encode_prompt(PROMPTS[:2]), 3.0)


def train(tmp_path, pipeline, **settings):
    config = tiny_spo_config(tmp_path / "run", num_inference_steps=4, max_steps=2, **settings)
    return SPOTrainer(config, pipeline, brightness_reward, train_dataset=PROMPTS)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (tiny_sd_pipeline, "peft"),
        (tiny_sd_pipeline, "diffusers"),
        (tiny_sd_pipeline, "attention_processor"),
        (tiny_sd_pipeline, "kohya"),
        (tiny_sdxl_pipeline, "peft"),
        (tiny_sdxl_pipeline, "diffusers"),
    ],
)
def test_a_published_lora_is_loaded_merged_and_trained_on(tmp_path, make, kind):
    pipeline = make(tmp_path)
    plain = denoise(pipeline)
    updates = low_rank_updates(pipeline.unet)
    factor = write_lora(tmp_path / "published", updates, kind)
    expected = merged_weights(pipeline.unet, updates, factor)
    by_hand = make(tmp_path)
    by_hand.unet.load_state_dict(expected)

    pipeline.load_lora_weights(str(tmp_path / "published"))
    torch.testing.assert_close(denoise(pipeline), denoise(by_hand), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(denoise(pipeline), plain, atol=1e-3)
    with pytest.raises(ValueError, match=r"fuse_lora\(\); pipe.unload_lora_weights\(\)"):
        train(tmp_path, pipeline)

    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert pipeline.unet.state_dict().keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(pipeline.unet.state_dict()[name], weight, rtol=1e-4, atol=1e-6)
    trainer = train(tmp_path, pipeline)
    base = {name: value for name, value in state_of(trainer.pipeline.denoiser).items() if "lora" not in name}
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)  # the reference is the merged model
    assert not changed(base, trainer.pipeline.denoiser)
    torch.testing.assert_close(denoise_reference(trainer), denoise(by_hand), rtol=1e-4, atol=1e-5)

    # What was learnt on top loads on top: merged base and new adapter are the trained model.
    trainer.save_model(str(tmp_path / "second"))
    by_hand.load_lora_weights(str(tmp_path / "second"))
    trained = denoise(trainer.pipeline.sd_pipeline)
    torch.testing.assert_close(denoise(by_hand), trained, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trained, denoise_reference(trainer), atol=1e-6)


def denoise_reference(trainer):
    with trainer.pipeline.reference():
        return denoise(trainer.pipeline.sd_pipeline)


def test_an_unmerged_adapter_of_any_name_is_refused(tmp_path):
    """Switched off, it would be missing from the reference; on, it would be trained along. Both are silent."""
    pipeline = tiny_sd_pipeline(tmp_path)
    write_lora(tmp_path / "published", low_rank_updates(pipeline.unet), "peft")
    pipeline.load_lora_weights(str(tmp_path / "published"), adapter_name="spo")
    with pytest.raises(ValueError, match=r"already has adapters \(spo\)"):
        train(tmp_path, pipeline)


def test_a_lora_that_wants_to_run_code_does_not(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    folder = tmp_path / "published"
    folder.mkdir()
    name = FORMATS["peft"]("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")[0]
    pipeline = tiny_sd_pipeline(tmp_path)
    for data in (pickle.dumps({name: Attack()}), None):
        if data is None:
            torch.save({name: Attack()}, folder / "pytorch_lora_weights.bin")
        else:
            (folder / "pytorch_lora_weights.bin").write_bytes(data)
        with pytest.raises((OSError, ValueError, RuntimeError, pickle.UnpicklingError)):
            pipeline.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.bin")
        with pytest.raises((OSError, ValueError)):
            wrap_pipeline(pipeline).load_lora(folder)
    assert not (tmp_path / "owned").exists()
