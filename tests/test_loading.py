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
Necessity: diffusers and transformers load a file that lacks weights, or is of another model, and draw the rest at random; they
say it in a log. Every loader of every network that this package reads must name what is missing, unexpected or misshapen.
"""

import shutil

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from transformers import ChineseCLIPConfig, ChineseCLIPModel

from trl_spo import LatentRewardModel, SPOTrainer, StepAwareRewardModel, wrap_pipeline
from trl_spo.evaluation.metrics import load_metric
from trl_spo.export import merge_lora
from trl_spo.hub_files import load_diffusers_pipeline, whole_networks

from .flow_testing import tiny_flux2_klein_pipeline, tiny_sd3_pipeline
from .testing_utils import (
    PROMPTS,
    brightness_reward,
    changed,
    state_of,
    tiny_clip,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
    tiny_spo_config,
    tiny_tokenizer,
)


def edit(file, drop: str = "", add: bool = False, reshape: str = ""):
    """Take weights with `drop` in their name out of a file, put one more in, or give one another shape."""
    weights = {name: value for name, value in load_file(file).items() if not drop or drop not in name}
    if add:
        weights["surplus.weight"] = torch.zeros(2)
    if reshape:
        name = next(name for name in weights if reshape in name)
        weights[name] = torch.zeros(3, 5)
    save_file(weights, file, metadata={"format": "pt"})


CLIP_LOADERS = {
    "from_clip": lambda path, processor: StepAwareRewardModel.from_clip(path, processor=processor),
    "pickscore": lambda path, processor: load_metric("pickscore", model=path, processor=processor, device="cpu"),
    "clip_score": lambda path, processor: load_metric("clip_score", model=path, processor=processor, device="cpu"),
}


class TestCLIP:
    @pytest.fixture
    def whole(self, tmp_path):
        return str(tiny_clip(tmp_path / "whole"))

    @pytest.fixture
    def broken(self, whole, tmp_path):
        return shutil.copytree(whole, tmp_path / "broken")

    @pytest.mark.parametrize("load", CLIP_LOADERS.values(), ids=CLIP_LOADERS)
    @pytest.mark.parametrize(
        "change, message",
        [
            ({"drop": "text_model.encoder"}, "missing: text_model.encoder.layers.0.layer_norm1.bias, .* and 22 more"),
            ({"add": True}, "unexpected: surplus.weight"),
            ({"reshape": "visual_projection"}, r"wrong shape: visual_projection.weight .*\(12, 16\)"),
        ],
        ids=["missing", "unexpected", "misshapen"],
    )
    def test_weights_are_named(self, load, change, message, whole, broken):
        edit(broken / "model.safetensors", **change)
        with pytest.raises(ValueError, match=f"do not fit the CLIP model: {message}"):
            load(str(broken), whole)

    def test_position_ids_of_old_files_are_no_weights(self, broken, whole):
        weights = load_file(broken / "model.safetensors")
        weights["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
        loaded = StepAwareRewardModel.from_clip(str(broken))
        assert not changed(state_of(loaded), StepAwareRewardModel.from_clip(whole)) - {
            name for name in loaded.state_dict() if "t_embedder" in name
        }

    @pytest.mark.parametrize("load", CLIP_LOADERS.values(), ids=CLIP_LOADERS)
    def test_another_kind_of_model_is_no_clip(self, load, whole, tmp_path):
        tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = {"vocab_size": 92, "max_position_embeddings": 8, **tower}
        vision = {"image_size": 16, "patch_size": 8, "projection_dim": 12, **tower}
        config = ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        ChineseCLIPModel(config).save_pretrained(tmp_path / "chinese")
        tiny_sd_pipeline(tmp_path).text_encoder.save_pretrained(tmp_path / "text")
        for name, kind in (("chinese", "chinese_clip"), ("text", "clip_text_model")):
            with pytest.raises(ValueError, match=f"holds a '{kind}' model, not a CLIP model, which is 'clip'"):
                load(str(tmp_path / name), whole)

    def test_the_configuration_of_another_model_is_no_clip(self, whole, tmp_path):
        """Its sizes would be those of transformers' default CLIP."""
        tiny_sd_pipeline(tmp_path).text_encoder.save_pretrained(tmp_path / "text")
        save_file(load_file(f"{whole}/model.safetensors"), tmp_path / "checkpoint.safetensors")
        with pytest.raises(ValueError, match="holds a 'clip_text_model' model, not a CLIP configuration"):
            StepAwareRewardModel.from_original_checkpoint(
                str(tmp_path / "checkpoint.safetensors"), clip=str(tmp_path / "text"), processor=whole
            )

    @pytest.mark.parametrize("load", CLIP_LOADERS.values(), ids=CLIP_LOADERS)
    def test_a_tokenizer_with_more_words_than_the_model(self, load, whole, tmp_path):
        """On a GPU it would be a device assertion in the middle of a run."""
        tokenizer = tiny_tokenizer(tmp_path / "made")
        tokenizer.add_tokens(["newword"])
        tokenizer.save_pretrained(tmp_path / "larger")
        with pytest.raises(
            ValueError, match=r"has \d+ tokens and its text encoder knows \d+: they belong to different"
        ):
            load(whole, str(tmp_path / "larger"))

    def test_a_saved_reward_model(self, whole, tmp_path):
        StepAwareRewardModel.from_clip(whole).save_pretrained(tmp_path / "reward")
        edit(tmp_path / "reward" / "model.safetensors", reshape="visual_projection")
        with pytest.raises(ValueError, match=r"wrong shape: model.visual_projection.weight \(3, 5\) \(12, 16\)"):
            StepAwareRewardModel.from_pretrained(tmp_path / "reward")


PARTS = [
    (tiny_sd_pipeline, "unet", "mid_block"),
    (tiny_sd_pipeline, "vae", "decoder.mid_block"),
    (tiny_sd_pipeline, "text_encoder", "layers.1."),
    (tiny_sdxl_pipeline, "text_encoder_2", "text_projection"),
    (tiny_sd3_pipeline, "transformer", "norm_out"),
    (tiny_sd3_pipeline, "text_encoder_3", "wo.weight"),
    (tiny_flux2_klein_pipeline, "vae", "bn.running_mean"),
    (tiny_flux2_klein_pipeline, "text_encoder", "layers.2."),
]


class TestPipelines:
    @pytest.mark.parametrize("make, part, drop", PARTS, ids=[f"{make.__name__}-{part}" for make, part, _ in PARTS])
    def test_missing_weights_of_any_part_are_named(self, make, part, drop, tmp_path):
        make(tmp_path).save_pretrained(tmp_path / "pipe")
        file = next((tmp_path / "pipe" / part).glob("*.safetensors"))
        edit(file, drop=drop)
        with pytest.raises(
            ValueError, match=rf"Could not load .*the weights in .* do not fit the \w+: missing: .*{drop}"
        ):
            wrap_pipeline(str(tmp_path / "pipe"))

    @pytest.mark.parametrize("use", ["wrap", "merge", "latent reward"])
    def test_by_every_way_in(self, use, tmp_path):
        tiny_sd_pipeline(tmp_path).save_pretrained(tmp_path / "pipe")
        edit(tmp_path / "pipe/text_encoder/model.safetensors", drop="final_layer_norm")
        save_file({}, tmp_path / "lora.safetensors")
        path = str(tmp_path / "pipe")
        with pytest.raises(ValueError, match="do not fit the CLIPTextModel: missing: .*final_layer_norm"):
            if use == "wrap":
                wrap_pipeline(path)
            elif use == "merge":
                merge_lora(path, tmp_path / "lora.safetensors", tmp_path / "merged")
            else:
                LatentRewardModel.from_pipeline(path)

    @pytest.mark.parametrize("part", ["unet", "vae"])
    def test_weights_that_nothing_reads_are_named(self, part, tmp_path):
        """A network with more weights is another network, as with conditioning that its configuration does not name."""
        tiny_sd_pipeline(tmp_path).save_pretrained(tmp_path / "pipe")
        edit(tmp_path / "pipe" / part / "diffusion_pytorch_model.safetensors", add=True)
        with pytest.raises(ValueError, match="unexpected: surplus.weight"):
            load_diffusers_pipeline(str(tmp_path / "pipe"))

    def test_a_text_encoder_may_come_from_a_larger_file(self, tmp_path):
        """Such as that of the whole CLIP it belongs to."""
        tiny_sd_pipeline(tmp_path).save_pretrained(tmp_path / "pipe")
        edit(tmp_path / "pipe/text_encoder/model.safetensors", add=True)
        load_diffusers_pipeline(str(tmp_path / "pipe"))

    def test_another_vae_is_whole_as_well(self, tmp_path):
        pipe = tiny_sd_pipeline(tmp_path)
        pipe.save_pretrained(tmp_path / "pipe")
        pipe.vae.save_pretrained(tmp_path / "vae")
        edit(tmp_path / "vae/diffusion_pytorch_model.safetensors", drop="encoder.conv_in")
        with pytest.raises(ValueError, match="do not fit the AutoencoderKL: missing: encoder.conv_in"):
            wrap_pipeline(str(tmp_path / "pipe"), vae=str(tmp_path / "vae"))

    def test_the_decoder_for_scoring(self, tmp_path):
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1), latent_channels=4,
        )  # fmt: skip
        tiny.save_pretrained(tmp_path / "tiny")
        edit(tmp_path / "tiny/diffusion_pytorch_model.safetensors", drop="decoder.layers.0")
        config = tiny_spo_config(tmp_path / "out", scoring_vae=str(tmp_path / "tiny"))
        with pytest.raises(ValueError, match="do not fit the AutoencoderTiny: missing: decoder.layers.0"):
            SPOTrainer(config, tiny_sd_pipeline(tmp_path), brightness_reward, train_dataset=PROMPTS)

    def test_tokens_that_the_text_encoder_does_not_know(self, tmp_path):
        pipe = tiny_sdxl_pipeline(tmp_path)
        pipe.tokenizer_2 = tiny_tokenizer(tmp_path / "other")
        pipe.tokenizer_2.add_tokens(["<style>"])
        with pytest.raises(ValueError, match=r"The tokenizer of the pipeline \(tokenizer_2\) has"):
            wrap_pipeline(pipe)


class TestWholeDenoisers:
    @pytest.fixture
    def saved(self, tmp_path):
        config = tiny_spo_config(tmp_path / "out", use_peft=False)
        trainer = SPOTrainer(config, tiny_sd_pipeline(tmp_path), brightness_reward, train_dataset=PROMPTS)
        trainer.save_model()
        return trainer, tmp_path / "out"

    @pytest.mark.parametrize(
        "change, message",
        [({"drop": "conv_out"}, "missing: conv_out.bias, conv_out.weight"), ({"add": True}, "unexpected: surplus.weight")],
    )  # fmt: skip
    def test_are_read_whole_or_not_at_all(self, saved, change, message):
        trainer, folder = saved
        before = state_of(trainer.pipeline.denoiser)
        edit(folder / "unet/diffusion_pytorch_model.safetensors", **change)
        for read in (
            trainer.load_model,
            lambda folder: trainer.pipeline.load_checkpoint([trainer.model.denoiser], folder),
        ):
            with pytest.raises(ValueError, match=f"has no unet that can be read .*{message}"):
                read(folder)
        assert not changed(before, trainer.pipeline.denoiser)

    def test_have_numbers_like_a_lora(self, saved):
        trainer, folder = saved
        file = folder / "unet/diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        weights["conv_out.bias"][1] = torch.nan
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="NaN or infinite, in 'conv_out.bias'"):
            trainer.load_model(folder)


def test_loading_elsewhere_is_as_it_was(tmp_path):
    """The check holds inside of the context alone."""
    pipe = tiny_sd_pipeline(tmp_path)
    pipe.text_encoder.save_pretrained(tmp_path / "text")
    edit(tmp_path / "text/model.safetensors", drop="layers.1")
    with whole_networks(), pytest.raises(ValueError, match="missing"):
        type(pipe.text_encoder).from_pretrained(tmp_path / "text")
    assert type(pipe.text_encoder).from_pretrained(tmp_path / "text") is not None
