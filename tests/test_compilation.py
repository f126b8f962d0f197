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
Necessity: compiled code is on by default where no test of this machine runs, on GPUs. It must give the pairs and the loss
of plain code, compile nothing again once training is under way, leave the first ratio of policy and reference at exactly 1,
and be forgotten by what is saved. Compilers are slow, so most tests stop at the graphs; one lowers them.
"""

import contextlib

import diffusers
import pytest
import torch
import torch._dynamo
from peft import LoraConfig
from torch._dynamo.utils import counters

from trl_spo import SPOTrainer, StepAwareRewardModel, wrap_pipeline
from trl_spo.training.compilation import REPEATED_BLOCKS, compile_blocks, reference_on_same_code, repeated_blocks
from trl_spo.training.memory import denoiser_bytes

from .testing_utils import (
    PROMPTS,
    brightness_reward,
    changed,
    state_of,
    tiny_clip,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
    tiny_spo_config,
)


@pytest.fixture(autouse=True)
def no_graphs_of_others():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def make_trainer(tmp_path, reward=brightness_reward, **settings):
    settings = {"max_steps": 1, "use_cpu": True, "compile_regions": True, **settings}
    if settings["compile_regions"]:
        settings["torch_compile_backend"] = settings.get("torch_compile_backend", "eager")
    config = tiny_spo_config(tmp_path / "out", **settings)
    return SPOTrainer(config, tiny_sd_pipeline(tmp_path), reward, train_dataset=PROMPTS)


def train_a_lora(pipeline) -> None:
    """The up projections of a fresh LoRA are zero; give them values, as training does."""
    torch.manual_seed(1)
    for name, parameter in pipeline.denoiser.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)


def with_the_lora_of(trainer, other):
    """The other trainer, with this one's adapter."""
    own = trainer.model.state_dict()
    other.model.load_state_dict({name: value for name, value in own.items() if "lora_" in name}, strict=False)
    return other


def middle_of(pipeline):
    """A part of the denoiser with one block, where all of them would take too long."""
    middle = pipeline.denoiser.mid_block
    middle._repeated_blocks = ["BasicTransformerBlock"]
    return middle


def predictions(pipeline, context, num_samples: int = 3):
    torch.manual_seed(2)
    latents = torch.randn(num_samples, *pipeline.latent_shape())
    embeds = pipeline.encode_prompt(PROMPTS[:num_samples])
    with context as denoiser:
        return pipeline.predict(latents, 500, embeds, 3.0, denoiser).detach()


@contextlib.contextmanager
def plain_reference(pipeline):
    with torch.no_grad(), pipeline.reference() as reference:
        yield reference


class TestGraphs:
    @pytest.mark.parametrize("settings", [{}, {"use_peft": False}, {"gradient_checkpointing": True}], ids=str)
    def test_one_step_compiles_all_there_is(self, tmp_path, settings):
        """
        A rollout needs one graph of the UNet's block (both levels have one width), of the decoder and of the reward's
        layer. Training needs the block once more, or twice with a LoRA: the input of its first block has no gradient. The
        reference has none of its own, and no batch size, of a rollout, a chunk or a micro-batch, needs another.
        """
        expected, reward = 3 if settings.get("use_peft") is False else 4, brightness_reward
        if not settings:
            folder = tiny_clip(tmp_path)
            expected, reward = expected + 1, StepAwareRewardModel.from_clip(folder, processor=folder)
        chunks = {"rollout_micro_batch_size": 5, "vae_decode_batch_size": 7, "reward_batch_size": 9}
        trainer = make_trainer(tmp_path, reward, **chunks, **settings)
        trainer.train()
        first = num_graphs()
        assert first == expected
        for prompts in (PROMPTS[:2], PROMPTS[:5]):
            pairs = trainer.rollout(prompts)
            trainer.model.train()
            for size in (5, 3):
                trainer.compute_loss(trainer.model, {"pairs": pairs[:size], "num_pairs": size, "num_micro_batches": 1})
        assert num_graphs() == first
        assert not counters["graph_break"]

    def test_the_reference_of_other_adapters_costs_one_more(self, tmp_path):
        """DoRA has magnitudes beside its matrices, so zeros do not switch it off, and the adapter is switched off."""
        pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path))
        model = pipeline.prepare_for_training(LoraConfig(r=2, target_modules=["to_q"], use_dora=True)).train()
        compile_blocks([middle_of(pipeline)], required=True, backend="eager")
        predictions(pipeline, contextlib.nullcontext(model))
        policy = num_graphs()
        predictions(pipeline, reference_on_same_code(pipeline))
        assert num_graphs() <= policy + 1
        torch.testing.assert_close(
            predictions(pipeline, reference_on_same_code(pipeline)), predictions(pipeline, plain_reference(pipeline))
        )


class TestReference:
    @pytest.mark.parametrize("use_peft", [True, False])
    def test_it_is_the_untouched_model(self, tmp_path, use_peft):
        untouched = wrap_pipeline(tiny_sd_pipeline(tmp_path))
        expected = predictions(untouched, contextlib.nullcontext(untouched.denoiser))
        pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path))
        model = pipeline.prepare_for_training(None, use_peft).train()
        for parameter in [p for p in model.parameters() if p.requires_grad]:
            parameter.data.add_(0.1)
        before, frozen = state_of(model), pipeline._frozen_copy and state_of(pipeline._frozen_copy)
        assert not torch.equal(predictions(pipeline, contextlib.nullcontext(model)), expected)
        assert torch.equal(predictions(pipeline, reference_on_same_code(pipeline)), expected)
        assert not changed(before, model)
        if frozen:
            assert not changed(frozen, pipeline._frozen_copy)
            assert not pipeline._frozen_copy.training
            assert not any(p.requires_grad or p.grad is not None for p in pipeline._frozen_copy.parameters())

    def test_weights_come_back_after_an_error(self, tmp_path):
        pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path))
        model = pipeline.prepare_for_training()
        train_a_lora(pipeline)
        before = state_of(model)
        with pytest.raises(KeyError), reference_on_same_code(pipeline):
            assert changed(before, model)
            raise KeyError
        assert not changed(before, model)

    def test_the_first_ratio_is_one_when_code_is_lowered(self, tmp_path):
        """
        The compiler rounds as it fuses, and fuses what records gradients in another way than what does not. One attention
        is compiled, in bfloat16; policy and reference have the same bits, and so has no other pair of weights.
        """
        pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path))
        pipeline.denoiser.to(torch.bfloat16)
        model = pipeline.prepare_for_training().train()
        attention = middle_of(pipeline).attentions[0].transformer_blocks[0].attn1
        attention._repeated_blocks = ["Attention"]
        assert compile_blocks([attention], required=True, backend="inductor") == 1
        with torch.autocast("cpu", torch.bfloat16):
            reference = predictions(pipeline, reference_on_same_code(pipeline))
            assert torch.equal(predictions(pipeline, contextlib.nullcontext(model)), reference)
            train_a_lora(pipeline)
            assert torch.equal(predictions(pipeline, reference_on_same_code(pipeline)), reference)
            assert not torch.equal(predictions(pipeline, contextlib.nullcontext(model)), reference)
        assert num_graphs() == 1


class TestWhatIsCompiled:
    @pytest.mark.parametrize(
        "name",
        [
            "UNet2DConditionModel",
            "SD3Transformer2DModel",
            "FluxTransformer2DModel",
            "Flux2Transformer2DModel",
            "ZImageTransformer2DModel",
            "QwenImageTransformer2DModel",
        ],
    )
    def test_every_denoiser_names_blocks_that_exist(self, name):
        cls = getattr(diffusers, name)
        names = getattr(cls, "_repeated_blocks", None) or REPEATED_BLOCKS[name]
        module = __import__(cls.__module__, fromlist=names)
        attention = __import__("diffusers.models.attention", fromlist=names)
        assert names and all(hasattr(module, block) or hasattr(attention, block) for block in names)

    def test_blocks_are_found_in_parts(self, tmp_path):
        """SDXL has one level with attention here, of one block below and two above, beside the middle's one."""
        pipeline = wrap_pipeline(tiny_sdxl_pipeline(tmp_path))
        blocks = repeated_blocks(torch.nn.ModuleDict({"inside": pipeline.denoiser}))
        assert {type(block).__name__ for block in blocks} == {"BasicTransformerBlock"}
        assert len(blocks) == 4 and compile_blocks([pipeline.denoiser, None, pipeline.vae]) == 5
        assert compile_blocks([torch.nn.Linear(1, 1)]) == 0

    @pytest.mark.parametrize(
        ("settings", "compiled"),
        [({}, False), ({"compile_regions": True}, True), ({"torch_compile": True}, True)],
    )
    def test_default_of_this_device(self, tmp_path, settings, compiled):
        """On a CPU nothing is compiled unasked, and convolutions stay channels-last."""
        config = tiny_spo_config(tmp_path / "out", use_cpu=True, **settings)
        trainer = SPOTrainer(config, tiny_sd_pipeline(tmp_path), brightness_reward, train_dataset=PROMPTS)
        assert any(module._compiled_call_impl is not None for module in trainer.model.modules()) == compiled
        assert trainer.pipeline.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_defaults_by_device(self, device):
        """The decision itself, since a GPU is not at hand."""

        class Config:
            compile_regions = channels_last = None
            torch_compile = False

        Config.device = torch.device(device)
        assert SPOTrainer._compiles(Config) == (device == "cuda")
        assert SPOTrainer._stores_channels_last(Config) == (device == "cpu")

    def test_opposite_wishes(self, tmp_path):
        with pytest.raises(ValueError, match="`compile_regions=False` forbids"):
            tiny_spo_config(tmp_path, compile_regions=False, torch_compile=True)


class TestWhatStaysAsItWas:
    def test_names_and_copies(self, tmp_path):
        """Weights keep their names, a copy of the base is written, and both files load in plain diffusers."""
        trainer = make_trainer(tmp_path)
        plain = make_trainer(tmp_path, compile_regions=False)
        assert list(trainer.model.state_dict()) == list(plain.model.state_dict())
        train_a_lora(trainer.pipeline)
        trainer.pipeline.save_pretrained(tmp_path / "whole")
        base = tiny_sd_pipeline(tmp_path).unet
        assert not changed(state_of(base), type(base).from_pretrained(tmp_path / "whole" / "unet"))
        pipeline = tiny_sd_pipeline(tmp_path)
        pipeline.load_lora_weights(tmp_path / "whole")
        torch.testing.assert_close(
            predictions(wrap_pipeline(pipeline), contextlib.nullcontext(pipeline.unet)),
            predictions(plain.pipeline, contextlib.nullcontext(with_the_lora_of(trainer, plain).pipeline.denoiser)),
        )

    def test_memory_is_estimated_as_before(self, tmp_path):
        pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path))
        embeds = pipeline.encode_prompt(PROMPTS[:1])
        arguments = (pipeline, embeds, pipeline.latent_shape(), 3.0, 4)
        before = denoiser_bytes(*arguments)
        compile_blocks([pipeline.denoiser], backend="eager")
        assert denoiser_bytes(*arguments) == before and num_graphs() == 0

    def test_a_compiler_that_fails(self, tmp_path):
        """By default training goes on without it and says so; who asked for compiled code gets the error."""

        def broken(graph, inputs):
            raise RuntimeError("no compiler on this machine")

        pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path))
        expected = predictions(pipeline, contextlib.nullcontext(pipeline.denoiser))
        compile_blocks([middle_of(pipeline)], backend=broken)
        assert torch.equal(predictions(pipeline, contextlib.nullcontext(pipeline.denoiser)), expected)
        compile_blocks([middle_of(pipeline)], required=True, backend=broken)
        with pytest.raises(Exception, match="no compiler on this machine"):
            predictions(pipeline, contextlib.nullcontext(pipeline.denoiser))
