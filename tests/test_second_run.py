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
Necessity: pipelines and reward models are objects of the user, who trains with them more than once in one process. A second
run that finds something of the first, such as its reference, trains on wrong numbers and says nothing.
"""

import pytest
import torch
from diffusers import AutoencoderTiny
from peft import LoraConfig

from trl_spo import SPOTrainer, StepAwareRewardModel, StepRewardTrainer, wrap_pipeline
from trl_spo.training.compilation import CompiledBlock

from .testing_utils import (
    PROMPTS,
    brightness_reward,
    changed,
    image_pairs,
    state_of,
    tiny_clip,
    tiny_sd_pipeline,
    tiny_spo_config,
    tiny_step_reward_config,
)


@pytest.fixture
def pipeline(tmp_path):
    return wrap_pipeline(tiny_sd_pipeline(tmp_path))


def make_trainer(folder, pipeline, reward=brightness_reward, scoring_vae=None, peft_config=None, **settings):
    config = tiny_spo_config(folder / "out", **{"max_steps": 1, **settings})
    return SPOTrainer(
        config, pipeline, reward, train_dataset=PROMPTS, scoring_vae=scoring_vae, peft_config=peft_config
    )


def weights_under_adapters(module) -> dict[str, torch.Tensor]:
    state = {name: value for name, value in state_of(module).items() if "lora_" not in name}
    return {name.replace(".base_layer.", "."): value for name, value in state.items()}


def test_the_reference_is_the_model_as_this_run_found_it(pipeline, tmp_path):
    """Regression: after full fine-tuning a LoRA was compared with the copy that the first run had frozen."""
    make_trainer(tmp_path, pipeline, use_peft=False, learning_rate=1e-2).train()
    found = state_of(pipeline.denoiser)
    second = make_trainer(tmp_path, pipeline)
    with pipeline.reference() as reference:
        now = weights_under_adapters(reference)
    assert now.keys() == found.keys() and all(torch.equal(now[name], found[name]) for name in found)
    second.train()
    log = second.state.log_history[0]
    assert log["kl"] == log["clip_ratio"] == 0.0
    assert log["grad_norm"] > 0


def test_a_second_full_fine_tuning_starts_from_the_first(pipeline, tmp_path):
    make_trainer(tmp_path, pipeline, use_peft=False, learning_rate=1e-2).train()
    second = make_trainer(tmp_path, pipeline, use_peft=False)
    second.train()
    assert second.state.log_history[0]["kl"] == 0.0


def test_the_decoder_for_scoring_belongs_to_its_run(pipeline, tmp_path):
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip
    make_trainer(tmp_path, pipeline, scoring_vae=tiny)
    assert pipeline.scoring_vae is tiny
    make_trainer(tmp_path, pipeline)
    assert pipeline.scoring_vae is None


def test_dropout_is_switched_by_each_run(pipeline, tmp_path):
    adapter = LoraConfig(r=2, lora_alpha=2, lora_dropout=0.25, target_modules=["to_q"])

    def rates(trainer):
        layers = trainer.model.named_modules()
        return {module.p for name, module in layers if "lora_dropout" in name and hasattr(module, "p")}

    assert rates(make_trainer(tmp_path, pipeline, peft_config=adapter)) == {0.0}
    assert rates(make_trainer(tmp_path, pipeline, peft_config=adapter, disable_dropout=False)) == {0.25}
    assert rates(make_trainer(tmp_path, pipeline, peft_config=adapter)) == {0.0}


def test_blocks_run_as_they_are_again(pipeline, tmp_path):
    def compiled(network):
        return [m for m in network.modules() if isinstance(m._compiled_call_impl, CompiledBlock)]

    make_trainer(tmp_path, pipeline, compile_regions=True, torch_compile_backend="eager")
    assert compiled(pipeline.denoiser) and compiled(pipeline.vae)
    make_trainer(tmp_path, pipeline, compile_regions=False)
    assert not compiled(pipeline.denoiser) and not compiled(pipeline.vae)


class TestRewardModels:
    def train(self, model, pipeline, folder, **settings):
        config = tiny_step_reward_config(folder / "reward", max_steps=1, learning_rate=1e-2, **settings)
        StepRewardTrainer(config, pipeline, model, train_dataset=image_pairs()).train()

    def test_a_text_tower_that_stood_still_moves_in_the_next_run(self, pipeline, tmp_path):
        model = StepAwareRewardModel.from_clip(tiny_clip(tmp_path))
        before = state_of(model.model.text_model)
        self.train(model, pipeline, tmp_path, freeze_text_tower=True)
        assert not changed(before, model.model.text_model)
        self.train(model, pipeline, tmp_path)
        assert changed(before, model.model.text_model)

    def test_a_judge_can_be_trained_afterwards(self, pipeline, tmp_path):
        """Regression: SPO freezes its reward, and the trainer of rewards found no parameter to train."""
        model = StepAwareRewardModel.from_clip(tiny_clip(tmp_path))
        make_trainer(tmp_path, pipeline, reward=model, preference_threshold=0.0)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        before = state_of(model)
        self.train(model, pipeline, tmp_path)
        assert changed(before, model)

    def test_what_the_user_froze_stays_frozen(self, pipeline, tmp_path):
        model = StepAwareRewardModel.from_clip(tiny_clip(tmp_path))
        model.freeze_text_tower()
        before = state_of(model.model.text_model)
        self.train(model, pipeline, tmp_path)
        assert not changed(before, model.model.text_model)
