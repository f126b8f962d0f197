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
Necessity: users compile networks, train in parallel, and pass what accelerate or peft returned. A wrapper adds its own words to
the names of weights; what is saved under them is read by nobody, and nobody says so. Every network, however it is wrapped, must
be trained, saved, loaded, merged and copied under its own names.
"""

import pytest
import torch
from accelerate.utils import compile_regions
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from trl_spo import LatentRewardModel, SPOTrainer, StepAwareRewardModel, StepRewardTrainer, wrap_pipeline, wrap_reward
from trl_spo.export import merge_lora
from trl_spo.pipelines.autoencoder import load_scoring_vae
from trl_spo.pipelines.components import plain_pipeline, unwrapped

from .flow_testing import tiny_sd3_pipeline
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


def compiled(network):
    return torch.compile(network, backend="eager")


WRAPPERS = {
    "compile": compiled,
    "data_parallel": torch.nn.DataParallel,
    "compiled_data_parallel": lambda network: compiled(torch.nn.DataParallel(network)),
    "data_parallel_of_compiled": lambda network: torch.nn.DataParallel(compiled(network)),
    "regions": lambda network: compile_regions(network, backend="eager"),
}


def make_trainer(folder, pipeline, reward=brightness_reward, **settings):
    config = tiny_spo_config(folder, **{"max_steps": 2, "learning_rate": 1e-2, **settings})
    return SPOTrainer(config, pipeline, reward, train_dataset=PROMPTS)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """What an unwrapped pipeline gives: the LoRA, and the folder."""
    folder = tmp_path_factory.mktemp("plain")
    trainer = make_trainer(folder / "out", tiny_sd_pipeline(folder))
    trainer.train()
    trainer.save_model()
    return folder / "out"


def lora_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_lora_has_the_names_that_diffusers_reads(wrapper, plain_run, tmp_path):
    pipe = tiny_sd_pipeline(tmp_path)
    wrapped = WRAPPERS[wrapper](pipe.unet)
    pipe.unet = wrapped
    trainer = make_trainer(tmp_path / "out", pipe, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    expected = lora_of(plain_run)
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        found = lora_of(folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert pipe.unet is wrapped  # the user's pipeline is as it was


def test_a_wrapped_run_resumes_a_plain_one_and_the_other_way_round(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    for first, second in ((compiled, None), (None, compiled)):
        folder = tmp_path / str(first)
        for wrap, steps in ((first, 1), (second, 2)):
            pipe = tiny_sd_pipeline(tmp_path)
            pipe.unet = pipe.unet if wrap is None else wrap(pipe.unet)
            trainer = make_trainer(folder, pipe, max_steps=steps, **settings)
            trainer.train(resume_from_checkpoint=None if steps == 1 else True)
            assert trainer.state.global_step == steps


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name != "regions"])
def test_a_wrapped_decoder_for_scoring_decodes(wrapper, tmp_path):
    """Regression: a compiled one was an error about len(), one under data parallel was no autoencoder."""
    decoder = tiny_sd_pipeline(tmp_path / "decoder").vae
    pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path))
    assert load_scoring_vae(WRAPPERS[wrapper](decoder), pipeline) is decoder
    config = tiny_spo_config(tmp_path / "out", max_steps=1)
    wrapped = WRAPPERS[wrapper](decoder)
    trainer = SPOTrainer(config, pipeline, brightness_reward, train_dataset=PROMPTS, scoring_vae=wrapped)
    trainer.train()
    assert trainer.pipeline.scoring_vae is decoder


@pytest.mark.parametrize("make", [tiny_sd_pipeline, tiny_sd3_pipeline])
def test_a_whole_denoiser_has_its_own_names(make, tmp_path):
    pipe = make(tmp_path)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    before = state_of(getattr(pipe, name))
    pipe.register_modules(**{name: compiled(getattr(pipe, name))})
    trainer = make_trainer(tmp_path / "out", pipe, use_peft=False, max_steps=1)
    trainer.train()
    trainer.save_model()
    loaded = type(trainer.pipeline.denoiser).from_pretrained(tmp_path / "out", subfolder=name)
    assert loaded.state_dict().keys() == before.keys()
    assert not changed(state_of(trainer.pipeline.denoiser), loaded)
    assert changed(before, loaded)


def test_every_network_of_a_pipeline_is_unwrapped(tmp_path):
    pipe = tiny_sd_pipeline(tmp_path)
    networks = {name: getattr(pipe, name) for name in ("unet", "vae", "text_encoder")}
    for name, network in networks.items():
        setattr(pipe, name, compiled(network))
    plain = plain_pipeline(pipe)
    assert plain is not pipe and all(getattr(plain, name) is network for name, network in networks.items())
    assert plain_pipeline(plain) is plain
    plain.save_pretrained(tmp_path / "saved")
    assert not any(
        "_orig_mod" in name for path in (tmp_path / "saved").rglob("*.safetensors") for name in load_file(path)
    )


def test_a_lora_is_merged_into_a_wrapped_pipeline(plain_run, tmp_path):
    pipe = tiny_sd_pipeline(tmp_path)
    merge_lora(pipe, plain_run, tmp_path / "plain")
    pipe.unet = compiled(pipe.unet)
    merge_lora(pipe, plain_run, tmp_path / "wrapped")
    one, other = (
        load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors") for name in ("plain", "wrapped")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_latent_reward_is_made_from_a_wrapped_pipeline(tmp_path):
    pipe = tiny_sd_pipeline(tmp_path)
    expected = state_of(LatentRewardModel.from_pipeline(pipe).backbone)
    pipe.unet, pipe.text_encoder = compiled(pipe.unet), torch.nn.DataParallel(pipe.text_encoder)
    assert not changed(expected, LatentRewardModel.from_pipeline(pipe).backbone)


class TestRewardModels:
    @pytest.mark.parametrize("wrapper", ["compile", "data_parallel"])
    def test_trained_and_saved_under_its_own_names(self, wrapper, tmp_path):
        model = StepAwareRewardModel.from_clip(tiny_clip(tmp_path))
        config = tiny_step_reward_config(tmp_path / "out", max_steps=1)
        given = WRAPPERS[wrapper](model)
        trainer = StepRewardTrainer(config, tiny_sd_pipeline(tmp_path), given, train_dataset=image_pairs())
        trainer.train()
        trainer.save_model()
        assert not changed(state_of(model), StepAwareRewardModel.from_pretrained(tmp_path / "out"))

    def test_compiled_by_the_trainer(self, tmp_path):
        model = StepAwareRewardModel.from_clip(tiny_clip(tmp_path))
        config = tiny_step_reward_config(
            tmp_path / "out", max_steps=1, torch_compile=True, torch_compile_backend="eager", save_strategy="steps",
            save_steps=1,
        )  # fmt: skip
        trainer = StepRewardTrainer(config, tiny_sd_pipeline(tmp_path), model, train_dataset=image_pairs())
        trainer.train()
        trainer.save_model()
        for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
            assert not changed(state_of(model), StepAwareRewardModel.from_pretrained(folder))

    def test_a_judge_is_asked_through_any_wrapper(self, tmp_path):
        """Regression: a model in data parallel has no `encode_prompts`, and was called like a function of images."""
        model = StepAwareRewardModel.from_clip(tiny_clip(tmp_path))
        images, steps = torch.rand(2, 3, 16, 16), torch.tensor([1, 501])
        expected = wrap_reward(model)
        expected = expected.score(images, expected.encode_prompts(PROMPTS[:2]), steps)
        for wrap in WRAPPERS.values():
            reward = wrap_reward(wrap(model))
            assert reward.module is model
            assert torch.equal(reward.score(images, reward.encode_prompts(PROMPTS[:2]), steps), expected)


class TestRefused:
    def test_a_peft_model(self, tmp_path):
        pipe = tiny_sd_pipeline(tmp_path)
        pipe.unet = get_peft_model(pipe.unet, LoraConfig(r=2, target_modules=["to_q"]))
        for use in (
            wrap_pipeline,
            lambda pipe: merge_lora(pipe, tmp_path, tmp_path / "out"),
            LatentRewardModel.from_pipeline,
        ):
            (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
            with pytest.raises(
                ValueError, match="The unet is a `PeftModel`, under whose names diffusers reads no weights"
            ):
                use(pipe)

    def test_a_wrapped_part(self, tmp_path):
        pipe = tiny_sd_pipeline(tmp_path)
        pipe.unet.mid_block = compiled(pipe.unet.mid_block)
        with pytest.raises(ValueError, match="A part of the unet is wrapped, 'mid_block'.* Compile in place"):
            wrap_pipeline(pipe)

    def test_shapes_without_numbers(self, tmp_path):
        """Only trainers looked; `sample`, `merge` and latent rewards failed later, or never."""
        pipe = tiny_sd_pipeline(tmp_path)
        pipe.text_encoder.to("meta")
        (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
        for use in (
            wrap_pipeline,
            lambda pipe: merge_lora(pipe, tmp_path, tmp_path / "out"),
            LatentRewardModel.from_pipeline,
        ):
            with pytest.raises(ValueError, match="The text_encoder has weights on the meta device"):
                use(pipe)


def test_a_network_in_place_stays_what_it_is(tmp_path):
    unet = tiny_sd_pipeline(tmp_path).unet
    unet.compile(backend="eager")
    unet.compile_repeated_blocks(backend="eager")
    assert unwrapped(unet) is unet
    pipe = tiny_sd_pipeline(tmp_path)
    pipe.register_modules(unet=unet)
    assert plain_pipeline(pipe) is pipe
