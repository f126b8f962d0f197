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
Necessity: released latent rewards come in layouts that no library reads. A file that is half understood makes a reward that
scores, and whose scores mean nothing.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.testing_utils import PROMPTS, tiny_sd_pipeline, tiny_sdxl_pipeline
from trl_spo import LatentRewardModel
from trl_spo.scripts.arguments import RewardModelArguments


PIPELINES = {"sd15": tiny_sd_pipeline, "sdxl": tiny_sdxl_pipeline}


def released(kind: str, folder, dtype=torch.float32):
    """
    A latent reward in the layout of https://huggingface.co/casiatao/LRM, from the public code's own way of saving: its
    folder, the pipeline it was made from, and its heads. SDXL's text is projected by its second encoder.
    """
    pipe = PIPELINES[kind](folder / "pipeline").to(dtype)
    target = folder / f"lrm_{kind}"
    pipe.unet.save_pretrained(target / "unet")
    pipe.text_encoder.save_pretrained(target / "text_encoder")
    torch.manual_seed(3)
    channels = pipe.unet.config.block_out_channels
    width, dim = sum(channels) + channels[-1], 6
    if kind == "sdxl":
        pipe.text_encoder_2.save_pretrained(target / "text_encoder_2")
        dim = pipe.text_encoder_2.config.projection_dim
    heads = {"visual_projection": {"weight": torch.randn(dim, width, dtype=dtype)}, "logit_scale": torch.tensor(2.0)}
    if kind == "sd15":
        heads["text_projection"] = {"weight": torch.randn(dim, pipe.text_encoder.config.hidden_size, dtype=dtype)}
    torch.save(heads, target / "state_dict.pt")
    return target, pipe.to(torch.float32), heads


def latents_of(pipe):
    config = pipe.unet.config
    shape = (2, config.in_channels, config.sample_size, config.sample_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def load(target, pipe, **settings):
    model = LatentRewardModel.from_original_checkpoint(
        target, scaling_factor=pipe.vae.config.scaling_factor, **settings
    )
    model.check_pipeline(pipe)  # brings the tokenizers
    return model


@torch.no_grad()
def expected_scores(pipe, heads) -> torch.Tensor:
    """Of a fresh model of the pipeline with these heads; that one equals a hand computation in test_latent_reward.py."""
    twin = LatentRewardModel.from_pipeline(pipe, projection_dim=len(heads["visual_projection"]["weight"]))
    twin.visual_projection.weight.data = heads["visual_projection"]["weight"].float()
    if "text_projection" in heads:
        twin.text_projection.weight.data = heads["text_projection"]["weight"].float()
    twin.logit_scale.data.fill_(2.0)
    return twin.score(latents_of(pipe), PROMPTS[:2], torch.tensor([700, 20]))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("sd15", torch.float32), ("sd15", torch.float16), ("sdxl", torch.float32), ("sdxl", torch.bfloat16)],
)
def test_layouts_and_dtypes(tmp_path, kind, dtype):
    """Files in half precision become weights in float32, with the same values."""
    target, pipe, heads = released(kind, tmp_path, dtype)
    model = load(target, pipe)
    assert model.dtype == torch.float32 and (model.text_projection is None) == (kind == "sdxl")
    scores = model.score(latents_of(pipe), PROMPTS[:2], torch.tensor([700, 20]))
    torch.testing.assert_close(scores, expected_scores(pipe, heads), rtol=1e-4, atol=1e-4)


def test_the_command_line_takes_a_folder_in_a_repository(tmp_path):
    """As the presets name it: a repository, and the folder of one model inside."""
    released("sdxl", tmp_path)
    arguments = RewardModelArguments(
        reward_type="latent", reward_checkpoint=str(tmp_path), reward_checkpoint_subfolder="lrm_sdxl"
    )
    model = arguments.load()
    assert model.logit_scale == 2.0 and model.config.scaling_factor == 0.13025


def test_old_buffers_and_flat_heads(tmp_path):
    """Position ids, which old versions of transformers saved, and heads whose names are flat."""
    target, pipe, heads = released("sd15", tmp_path)
    file = target / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    prefix = "text_model." if any(name.startswith("text_model.") for name in weights) else ""
    weights[f"{prefix}embeddings.position_ids"] = torch.arange(pipe.tokenizer.model_max_length)[None]
    save_file(weights, file, metadata={"format": "pt"})
    flat = {f"{name}.weight": heads[name]["weight"] for name in ("visual_projection", "text_projection")}
    torch.save({**flat, "logit_scale": 2.0}, target / "state_dict.pt")
    scores = load(target, pipe).score(latents_of(pipe), PROMPTS[:2], torch.tensor([700, 20]))
    torch.testing.assert_close(scores, expected_scores(pipe, heads), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", PIPELINES)
def test_one_file(tmp_path, kind):
    """The state dict of the public code's model, which that code reads as well: networks and VAE under their names, and heads."""
    _, pipe, heads = released(kind, tmp_path)
    weights = {}
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        network = getattr(pipe, name, None)
        if network is not None:
            weights |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
    for name, value in heads.items():
        weights[name if name == "logit_scale" else f"{name}.weight"] = (
            value["weight"] if isinstance(value, dict) else value
        )
    file = tmp_path / "reward.pt"
    torch.save(weights, file)
    dim = len(heads["visual_projection"]["weight"])
    settings = {"pipeline": pipe, "projection_dim": dim}
    model = LatentRewardModel.from_original_checkpoint(file, **settings)
    scores = model.score(latents_of(pipe), PROMPTS[:2], torch.tensor([700, 20]))
    torch.testing.assert_close(scores, expected_scores(pipe, heads), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="does not tell its architecture. Pass the `pipeline`"):
        LatentRewardModel.from_original_checkpoint(file)
    del weights["visual_projection.weight"]
    torch.save({**weights, "unet.extra": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="missing: visual_projection.weight; unexpected: backbone.unet.extra"):
        LatentRewardModel.from_original_checkpoint(file, **settings)


class TestWhatDoesNotFit:
    def test_heads_of_another_width(self, tmp_path):
        target, pipe, heads = released("sd15", tmp_path)
        heads["text_projection"]["weight"] = torch.randn(6, 5)
        torch.save(heads, target / "state_dict.pt")
        with pytest.raises(ValueError, match=r"text_projection.weight .*\(6, 5\)"):
            load(target, pipe)

    def test_no_scale(self, tmp_path):
        target, pipe, heads = released("sdxl", tmp_path)
        del heads["logit_scale"]
        torch.save(heads, target / "state_dict.pt")
        with pytest.raises(ValueError, match=r"has no 'logit_scale'; it holds \['visual_projection.weight'\]"):
            load(target, pipe)

    @pytest.mark.parametrize(
        ("change", "message"),
        [("missing", "mid_block"), ("misshapen", "conv_in.weight"), ("unexpected", "conv_extra.weight")],
    )
    def test_a_network_with_other_weights(self, tmp_path, change, message):
        target, pipe, _ = released("sd15", tmp_path)
        file = target / "unet" / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        if change == "missing":
            weights = {name: value for name, value in weights.items() if not name.startswith("mid_block.")}
        elif change == "misshapen":
            weights["conv_in.weight"] = weights["conv_in.weight"][:, :3].contiguous()
        else:
            weights["conv_extra.weight"] = torch.zeros(2)
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load(target, pipe)

    def test_up_blocks_are_not_asked_for(self, tmp_path):
        """They never run: a release may leave them out, and a broken one does no harm."""
        target, pipe, heads = released("sd15", tmp_path)
        file = target / "unet" / "diffusion_pytorch_model.safetensors"
        weights = {name: value for name, value in load_file(file).items() if not name.startswith("up_blocks.")}
        save_file(weights, file, metadata={"format": "pt"})
        scores = load(target, pipe).score(latents_of(pipe), PROMPTS[:2], torch.tensor([700, 20]))
        torch.testing.assert_close(scores, expected_scores(pipe, heads), rtol=1e-4, atol=1e-4)

    def test_a_part_that_is_not_there(self, tmp_path):
        """Regression: without its subfolder, or with half a download, diffusers missed a file and did not say which layout."""
        target, pipe, _ = released("sd15", tmp_path)
        with pytest.raises(FileNotFoundError, match="has no unet/config.json.* name it, as `subfolder='lrm_sd15'`"):
            load(tmp_path, pipe)
        for missing in ("state_dict.pt", "text_encoder"):
            (target / missing).rename(tmp_path / f"elsewhere_{missing}")
            with pytest.raises(FileNotFoundError, match=missing):
                load(target, pipe)
