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
Why this file exists: every decision of SPO is a comparison of two scores of this model, so an error here trains the
diffusion model on wrong preferences without anything else failing. The tests hold it to what it must equal (CLIP, at
the start, for every timestep), to an independent computation of the adaLN block, to numbers worked out by hand for the
image preparation, and to the names and the strictness that the released checkpoints need.
"""

import copy
import json
import math
import pickle
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from trl_spo import StepAwareRewardModel, StepAwareRewardModelConfig
from trl_spo.rewards.step_aware_clip import prepare_images
from trl_spo.rewards.step_aware_config import CLIP_MEAN, CLIP_STD

from .testing_utils import PROMPTS, tiny_clip


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def model(clip_path):
    return StepAwareRewardModel.from_clip(clip_path)


@pytest.fixture
def images():
    return torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(1)) * 2 - 1


def disturb(model, seed=0):
    """Moves the step conditioning away from the identity, so that timesteps matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "adaLN" in name or "t_embedder" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


class TestFreshModel:
    @pytest.mark.parametrize("timestep", [0, 1, 501, 999])
    def test_equals_clip_at_every_timestep(self, model, clip_path, images, timestep):
        clip = CLIPModel.from_pretrained(clip_path).eval()
        prompts = PROMPTS[:3]
        pixel_values = prepare_images(images, 16)
        expected = clip(input_ids=model.tokenize(prompts), pixel_values=pixel_values).logits_per_image.diagonal()
        torch.testing.assert_close(model.score(images, prompts, timestep), expected, rtol=1e-5, atol=1e-5)

    def test_equals_clip_when_built_from_a_config(self, clip_path, images):
        model = StepAwareRewardModel(
            StepAwareRewardModelConfig(CLIPConfig.from_pretrained(clip_path).to_dict())
        ).eval()
        assert model.score(images, input_ids=torch.ones(3, 8, dtype=torch.long), timesteps=3).isfinite().all()
        clip = CLIPModel(model.config.clip_config).eval()
        clip.load_state_dict(
            {
                k.removeprefix("model."): v
                for k, v in model.state_dict().items()
                if "adaLN" not in k and "t_emb" not in k
            }
        )
        features = clip.visual_projection(clip.vision_model(pixel_values=prepare_images(images, 16)).pooler_output)
        torch.testing.assert_close(model.get_image_features(prepare_images(images, 16), 700), features)

    def test_gates_start_at_one_and_everything_else_at_zero(self, model):
        layer = model.model.vision_model.encoder.layers[1].adaLN_modulation[1]
        assert layer.weight.count_nonzero() == 0
        assert layer.bias.view(6, 16).mean(1).tolist() == [0, 0, 1, 0, 0, 1]
        final = model.model.vision_model.adaLN_modulation[1]
        assert final.weight.count_nonzero() == final.bias.count_nonzero() == 0
        assert final.weight.shape == (32, 16)


class TestStepConditioning:
    def test_block_follows_the_published_formula(self, model):
        """One block against its formula, written with the raw parameters and torch's own attention."""
        layer = disturb(model).model.vision_model.encoder.layers[0]
        p = {name: value.detach().double() for name, value in layer.named_parameters()}
        generator = torch.Generator().manual_seed(2)
        h = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
        c = torch.randn(2, 16, generator=generator, dtype=torch.float64)

        m = (c / (1 + (-c).exp())) @ p["adaLN_modulation.1.weight"].T + p["adaLN_modulation.1.bias"]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (m[:, None, 16 * i : 16 * (i + 1)] for i in range(6))

        def norm(x, name):
            centred = x - x.mean(-1, keepdim=True)
            scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
            return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

        def linear(x, name):
            return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

        x = norm(h, "layer_norm1") * (1 + scale_a) + shift_a
        q, k, v = (linear(x, f"self_attn.{n}_proj").view(2, 5, 2, 8).transpose(1, 2) for n in "qkv")
        weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
        attention = linear((weights @ v).transpose(1, 2).reshape(2, 5, 16), "self_attn.out_proj")
        expected = h + gate_a * attention
        x = linear(norm(expected, "layer_norm2") * (1 + scale_m) + shift_m, "mlp.fc1")
        expected = expected + gate_m * linear(x * torch.sigmoid(1.702 * x), "mlp.fc2")

        torch.testing.assert_close(layer.double()(h, c), expected)

    def test_pooled_token_is_modulated_by_shift_then_scale(self, model, clip_path, images):
        """With shift 2 and scale 3 on the class token, the features are projection(pooled * 4 + 2)."""
        pixel_values = prepare_images(images, 16)
        pooled = CLIPModel.from_pretrained(clip_path).eval().vision_model(pixel_values=pixel_values).pooler_output
        model.model.vision_model.adaLN_modulation[1].bias.data = torch.cat(
            [torch.full((16,), 2.0), torch.full((16,), 3.0)]
        )
        expected = model.model.visual_projection(pooled * 4 + 2)
        torch.testing.assert_close(model.get_image_features(pixel_values, 5), expected)

    def test_timestep_embedding_is_cosines_then_sines(self, model):
        embedder = model.model.t_embedder
        embedder.mlp = torch.nn.Sequential(torch.nn.Linear(256, 256))
        embedder.mlp[0].weight.data, embedder.mlp[0].bias.data = torch.eye(256), torch.zeros(256)
        embedding = embedder(torch.tensor([0, 7]))
        torch.testing.assert_close(embedding[0], torch.cat([torch.ones(128), torch.zeros(128)]))
        # entry k holds the frequency 10000^(-k/128): 1 at k = 0 and 1/100 at k = 64
        angles = torch.tensor([7.0, 0.07])
        torch.testing.assert_close(embedding[1, [0, 64]], angles.cos())
        torch.testing.assert_close(embedding[1, [128, 192]], angles.sin())

    def test_timesteps_matter_and_belong_to_their_image(self, model, images):
        disturb(model)
        prompts = ["a cat"] * 3
        together = model.score(images, prompts, torch.tensor([0, 400, 900]))
        one_by_one = [model.score(images[i : i + 1], ["a cat"], t)[0] for i, t in enumerate([0, 400, 900])]
        torch.testing.assert_close(together, torch.stack(one_by_one), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(together, model.score(images, prompts, torch.tensor([900, 0, 400])), atol=1e-2)

    def test_timestep_forms_agree(self, model, images):
        disturb(model)
        expected = model.score(images, ["a"] * 3, torch.tensor([9, 9, 9]))
        assert torch.equal(model.score(images, ["a"] * 3, 9), expected)
        assert torch.equal(model.score(images, ["a"] * 3, torch.tensor(9)), expected)
        assert torch.equal(model.score(images, ["a"] * 3), model.score(images, ["a"] * 3, 0))

    def test_without_step_conditioning_it_is_clip_and_leaves_no_unused_parameter(self, clip_path, images, tmp_path):
        plain = StepAwareRewardModel.from_clip(clip_path)
        ablation = disturb(StepAwareRewardModel.from_clip(clip_path, step_conditioning=False))
        torch.testing.assert_close(ablation.score(images, ["a"] * 3, 1), plain.score(images, ["a"] * 3, 900))
        ablation.save_pretrained(tmp_path)
        loaded = StepAwareRewardModel.from_pretrained(tmp_path)
        loaded.score(images, ["a"] * 3, 1).sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in loaded.parameters())
        assert not loaded.model.t_embedder.mlp[0].weight.requires_grad


class TestPrecision:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.1), (torch.bfloat16, 0.6)])
    def test_half_precision_scores_stay_close(self, model, images, dtype, tolerance):
        disturb(model)
        expected = model.score(images, PROMPTS[:3], 951)
        scores = model.to(dtype).score(images, PROMPTS[:3], 951)
        assert scores.dtype == torch.float32
        assert (scores - expected).abs().max() < tolerance

    def test_casting_scales_no_score(self, model):
        """
        `.to` rounds `logit_scale`: bfloat16 has steps of 1/32 at ln 100 = 4.605, so it becomes 4.59375, and every score
        is multiplied by exp(4.59375) / 100 = 0.989. After `cast` only the networks' rounding is left. A cosine between
        features of 8 significant bits is off by about 2**-8, one way or the other.
        """
        disturb(model).model.logit_scale.data.fill_(math.log(100))
        images = torch.rand(64, 3, 20, 20, generator=torch.Generator().manual_seed(1)) * 2 - 1
        arguments = (images, [PROMPTS[i % 6] for i in range(64)], torch.arange(64) * 15)
        expected = model.score(*arguments).detach()
        rounded = copy.deepcopy(model).to(torch.bfloat16)
        before = model.model.logit_scale.detach().clone()
        assert model.cast(torch.bfloat16) is model
        assert torch.equal(model.model.logit_scale, before) and model.model.logit_scale.dtype == torch.float32
        others = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
        assert {t.dtype for t in others if t is not model.model.logit_scale} == {torch.bfloat16}

        scores = model.score(*arguments).detach()
        factor = math.exp(4.59375) / 100
        torch.testing.assert_close(rounded.score(*arguments).detach(), factor * scores, rtol=1e-5, atol=1e-5)
        noise = scores - expected
        assert 0 < noise.square().mean().sqrt() < 100 * 2**-7

    def test_dtype_is_that_of_the_networks(self, model, images):
        """Its first parameter, by which transformers would tell, is the one that `cast` leaves alone."""
        assert model.dtype == torch.float32
        assert model.cast(torch.bfloat16).dtype == torch.bfloat16
        assert model.get_image_features(prepare_images(images, 16), 5).dtype == torch.bfloat16
        output = model(images, PROMPTS[:3], 5)
        assert {value.dtype for value in output.values()} == {torch.float32}
        assert model.cast(torch.float32).dtype == torch.float32
        with pytest.raises(TypeError, match="floating point"):
            model.cast(torch.int8)

    def test_a_cast_model_survives_saving(self, model, images, tmp_path):
        """Loading in bfloat16 keeps `logit_scale` in float32 as well, whatever the file is cast to."""
        disturb(model).model.logit_scale.data.fill_(math.log(100))
        expected = model.cast(torch.bfloat16).score(images, PROMPTS[:3], 300)
        model.save_pretrained(tmp_path)
        loaded = StepAwareRewardModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert loaded.dtype == torch.bfloat16 and loaded.model.logit_scale.dtype == torch.float32
        assert torch.equal(loaded.score(images, PROMPTS[:3], 300), expected)
        weights = StepAwareRewardModel.from_pretrained(tmp_path).state_dict()  # in float32 or bfloat16, by version
        assert all(torch.equal(weights[name].float(), weight.float()) for name, weight in model.state_dict().items())

    def test_neighbouring_timesteps_differ_in_half_precision(self, model):
        """In bfloat16 the integers 998 and 999 are the same number; the embedding must not be computed there."""
        embedder = disturb(model).to(torch.bfloat16).model.t_embedder
        embedding = embedder(torch.tensor([998, 999]))
        assert embedding.dtype == torch.bfloat16
        assert (embedding[0] - embedding[1]).abs().max() > 0.05

    def test_gradients_reach_the_images_and_survive_checkpointing(self, model, images):
        disturb(model).train()
        gradients = []
        for enable in (False, True):
            if enable:
                model.gradient_checkpointing_enable()
            images.grad = None
            model.zero_grad()
            model.score(images.requires_grad_(), ["a cat"] * 3, 700).sum().backward()
            gradients.append((images.grad.clone(), model.model.t_embedder.mlp[0].weight.grad.clone()))
        assert gradients[0][0].abs().sum() > 0
        for plain, checkpointed in zip(*gradients, strict=True):
            torch.testing.assert_close(plain, checkpointed)


class TestPrepareImages:
    def test_clamps_then_normalises(self):
        images = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0, 0.5, 0.0, 0.0, 0.0]).view(1, 1, 3, 3).expand(1, 3, 3, 3)
        out = prepare_images(images, 3)
        expected = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0, 0.75, 0.5, 0.5, 0.5])
        for channel in range(3):
            torch.testing.assert_close(out[0, channel].flatten(), (expected - CLIP_MEAN[channel]) / CLIP_STD[channel])

    def test_bicubic_halving_by_hand(self):
        """
        Halving 1, -1, -1, -1 (columns): with a = -0.75 the four taps at offset 1/2 are -3/32, 19/32, 19/32, -3/32. The
        first output sits between columns 0 and 1, its left neighbour is column 0 repeated: it gets the sum of the first
        two taps, 16/32, times 1 and the rest times -1, so 0. The second sits between columns 2 and 3 with column 1 to
        its left: all -1. No antialiasing: column 0 has no part in it.
        """
        images = torch.tensor([1.0, -1.0, -1.0, -1.0]).expand(1, 3, 4, 4)
        out = prepare_images(images, 2, mean=(0, 0, 0), std=(1, 1, 1))
        torch.testing.assert_close(out, torch.tensor([0.5, 0.0]).expand(1, 3, 2, 2))

    def test_clamp_comes_after_the_resize(self):
        """Overshoot of a saturated picture is cut; clamping before would let bicubic overshoot leave [0, 1]."""
        out = prepare_images(torch.randn(1, 3, 9, 9).sign() * 2, 14, mean=(0, 0, 0), std=(1, 1, 1))
        assert out.min() == 0 and out.max() == 1

    def test_wide_images_lose_both_sides(self):
        """
        A 4 x 7 image at size 4 keeps columns 2 to 5: (7 - 4) / 2 = 1.5 rounds to the even 2. At 4 x 9 the offset is
        2.5, which rounds to 2 as well.
        """
        columns = torch.arange(9).div(10)
        for width in (7, 9):
            images = columns[:width].expand(1, 3, 4, width)
            out = prepare_images(images, 4, mean=(0, 0, 0), std=(1, 1, 1))
            torch.testing.assert_close(out[0, 0, 0] * 2 - 1, columns[2:6])

    def test_sides_round_half_up(self):
        """5 x 6 at size 3 scales to 3 x 3.6, that is 3 x 4, of which the first 3 columns stay (offset .5 -> 0)."""
        images = torch.rand(1, 3, 5, 6) * 2 - 1
        resized = F.interpolate(images, (3, 4), mode="bicubic", align_corners=False)[..., :3]
        expected = (resized / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(prepare_images(images, 3, mean=(0, 0, 0), std=(1, 1, 1)), expected)

    @pytest.mark.parametrize("bad", [torch.zeros(3, 8, 8), torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8).byte()])
    def test_other_tensors_are_refused(self, bad):
        with pytest.raises(ValueError, match="`images` must"):
            prepare_images(bad, 8)


class TestText:
    def test_each_prompt_is_encoded_once_and_in_place(self, model, images):
        seen = []
        model.model.text_model.register_forward_hook(
            lambda module, args, kwargs, output: seen.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        scores = model.score(images, ["a cat", "a dog", "a cat"], 3)
        assert seen == [2]
        alone = [model.score(images[i : i + 1], [p], 3)[0] for i, p in enumerate(["a cat", "a dog", "a cat"])]
        torch.testing.assert_close(scores, torch.stack(alone), rtol=1e-4, atol=1e-5)

    def test_three_ways_to_give_the_text(self, model, images):
        prompts = PROMPTS[:3]
        expected = model.score(images, prompts, 3)
        torch.testing.assert_close(model.score(images, timesteps=3, input_ids=model.tokenize(prompts)), expected)
        features = model.encode_prompts(prompts)
        torch.testing.assert_close(model.score(images, timesteps=3, text_features=features), expected)
        torch.testing.assert_close(model.score(images, timesteps=3, text_features=5 * features), expected)

    def test_ids_are_padded_and_cut_to_the_model_length(self, model):
        ids = model.tokenize(["a", "a " * 50])
        assert ids.shape == (2, 8)
        assert ids[0, 3:].eq(model.tokenizer.pad_token_id).all()
        assert ids[1, -1] == model.tokenizer.eos_token_id


class TestSavingAndLoading:
    def test_round_trip_needs_nothing_else(self, model, images, tmp_path):
        model.config.image_mean = [0.1, 0.2, 0.3]
        expected = disturb(model).score(images, PROMPTS[:3], 300)
        model.save_pretrained(tmp_path)
        loaded = StepAwareRewardModel.from_pretrained(tmp_path)
        assert not loaded.training
        assert torch.equal(loaded.score(images, PROMPTS[:3], 300), expected)

    def test_a_clip_in_half_precision_trained_in_full(self, images, tmp_path):
        """Regression: the towers came back in the half precision of the CLIP, the rest in float32, and nothing ran."""
        folder = tiny_clip(tmp_path)
        CLIPModel.from_pretrained(folder).half().save_pretrained(folder)
        model = StepAwareRewardModel.from_clip(folder)
        disturb(model.float()).save_pretrained(tmp_path / "trained")
        loaded = StepAwareRewardModel.from_pretrained(tmp_path / "trained")
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
        assert torch.equal(loaded.score(images, PROMPTS[:3], 300), model.score(images, PROMPTS[:3], 300))

    def test_saved_names_are_those_of_the_released_checkpoints(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        names = set(load_file(tmp_path / "model.safetensors"))
        assert {
            "model.logit_scale",
            "model.vision_model.encoder.layers.0.self_attn.k_proj.weight",
            "model.vision_model.pre_layrnorm.weight",
            "model.visual_projection.weight",
            "model.text_projection.weight",
            "model.text_model.final_layer_norm.bias",
            "model.vision_model.encoder.layers.1.adaLN_modulation.1.weight",
            "model.vision_model.adaLN_modulation.1.bias",
            "model.t_embedder.mlp.0.weight",
            "model.t_embedder.mlp.2.bias",
        } <= names
        step = {name for name in names if "adaLN" in name or "t_embedder" in name}
        assert len(step) == 2 * 2 + 2 + 4  # two blocks, the final one, two linear layers
        assert all(name.startswith("model.") for name in names)

    def test_a_folder_in_a_folder(self, model, images, tmp_path):
        """Regression: the tokenizer was looked for beside the subfolder, and not found."""
        model.save_pretrained(tmp_path / "reward")
        loaded = StepAwareRewardModel.from_pretrained(tmp_path, subfolder="reward")
        assert torch.equal(loaded.score(images, PROMPTS[:3], 300), model.score(images, PROMPTS[:3], 300))

    @pytest.mark.parametrize("suffix", ["bin", "safetensors"])
    def test_original_checkpoint(self, model, clip_path, images, tmp_path, suffix):
        expected = disturb(model).score(images, PROMPTS[:3], 300)
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        weights["model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        doubled = "model.text_model.text_model.final_layer_norm.weight"
        weights[doubled] = weights.pop("model.text_model.final_layer_norm.weight")
        path = tmp_path / f"checkpoint.{suffix}"
        (torch.save if suffix == "bin" else save_file)(weights, path)
        loaded = StepAwareRewardModel.from_original_checkpoint(path, clip=clip_path)
        assert torch.equal(loaded.score(images, PROMPTS[:3], 300), expected)

    @pytest.mark.parametrize("where", ["hub", "revision", "folder"])
    def test_original_checkpoint_by_repository_and_file_name(
        self, model, clip_path, images, tmp_path, monkeypatch, where
    ):
        """From the Hub's cache as huggingface_hub lays it out, offline: refs name a commit, snapshots hold its files."""
        expected = disturb(model).score(images, PROMPTS[:3], 300)
        name, repo = "sd-v1-5_step-aware_preference_model.bin", "SPO-Diffusion-Models/Step-Aware_Preference_Models"
        cache = tmp_path / "hub"
        repository = cache / "models--SPO-Diffusion-Models--Step-Aware_Preference_Models"
        commit = "0" * 39 + "1"
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        torch.save(model.state_dict(), snapshot / name)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        arguments = {
            "hub": {},
            "revision": {"revision": commit, "cache_dir": cache},
            "folder": {},
        }[where]
        loaded = StepAwareRewardModel.from_original_checkpoint(
            snapshot if where == "folder" else repo, clip=clip_path, filename=name, **arguments
        )
        assert torch.equal(loaded.score(images, PROMPTS[:3], 300), expected)
        with pytest.raises(
            FileNotFoundError, match=f"'missing.bin' .*{'Step-Aware' if where != 'folder' else name}|no"
        ):
            StepAwareRewardModel.from_original_checkpoint(
                snapshot if where == "folder" else repo, clip=clip_path, filename="missing.bin", **arguments
            )

    def test_file_name_and_token_reach_the_hub(self, model, clip_path, tmp_path, monkeypatch):
        torch.save(model.state_dict(), tmp_path / "file.bin")
        calls = []

        def download(*args, **kwargs):
            calls.append((args, kwargs))
            return str(tmp_path / "file.bin")

        monkeypatch.setattr("trl_spo.hub_files.hf_hub_download", download)
        StepAwareRewardModel.from_original_checkpoint(
            "owner/repo", clip=clip_path, filename="file.bin", revision="v1", token="secret"
        )
        assert calls == [(("owner/repo", "file.bin"), {"revision": "v1", "cache_dir": None, "token": "secret"})]

    def test_a_repository_without_a_file_name_is_told_what_is_missing(self, clip_path):
        with pytest.raises(FileNotFoundError, match="pass `filename`"):
            StepAwareRewardModel.from_original_checkpoint("owner/repo", clip=clip_path)

    @pytest.mark.parametrize(
        "rename",
        [
            lambda name: name.removeprefix("model."),
            lambda name: f"module.{name}",
            lambda name: name.replace("vision_model.", "vision.", 1),
        ],
    )
    def test_other_names_are_an_error_and_not_guessed(self, model, clip_path, tmp_path, rename):
        torch.save({rename(name): weight for name, weight in model.state_dict().items()}, tmp_path / "other.bin")
        with pytest.raises(ValueError, match=r"missing: .*unexpected: "):
            StepAwareRewardModel.from_original_checkpoint(tmp_path / "other.bin", clip=clip_path)

    def test_names_of_both_transformers_generations(self, model, clip_path, images, tmp_path):
        """4.x wrote position ids as buffers, and some 5.x double the prefix of a tower: all of it at once."""
        expected = disturb(model).score(images, PROMPTS[:3], 300)
        weights = {}
        for name, weight in model.state_dict().items():
            for tower in ("text_model", "vision_model"):
                name = name.replace(f"model.{tower}.", f"model.{tower}.{tower}.")
            weights[name] = weight
        weights["model.text_model.text_model.embeddings.position_ids"] = torch.arange(8)[None]
        weights["model.vision_model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        torch.save(weights, tmp_path / "doubled.bin")
        loaded = StepAwareRewardModel.from_original_checkpoint(tmp_path / "doubled.bin", clip=clip_path)
        assert torch.equal(loaded.score(images, PROMPTS[:3], 300), expected)

    def test_every_wrong_key_is_named_at_once(self, model, clip_path, tmp_path):
        weights = model.state_dict()
        del weights["model.t_embedder.mlp.2.bias"]
        weights["model.surplus"] = torch.zeros(1)
        weights["model.visual_projection.weight"] = torch.zeros(7, 16)
        torch.save(weights, tmp_path / "bad.bin")
        with pytest.raises(ValueError) as error:
            StepAwareRewardModel.from_original_checkpoint(tmp_path / "bad.bin", clip=clip_path)
        for part in (
            "missing: model.t_embedder.mlp.2.bias",
            "unexpected: model.surplus",
            "wrong shape: model.visual_projection.weight (7, 16) for (12, 16)",
        ):
            assert part in str(error.value)

    def test_code_in_a_checkpoint_is_refused(self, clip_path, tmp_path):
        class Attack:
            def __reduce__(self):
                return (open, (str(tmp_path / "owned"), "w"))

        torch.save({"model.logit_scale": Attack()}, tmp_path / "zip.bin")
        (tmp_path / "raw.bin").write_bytes(pickle.dumps({"model.logit_scale": Attack()}))
        (tmp_path / "noise.bin").write_bytes(b"no checkpoint at all")
        for name in ("zip.bin", "raw.bin", "noise.bin"):
            with pytest.raises(ValueError, match="refused"):
                StepAwareRewardModel.from_original_checkpoint(tmp_path / name, clip=clip_path)
        assert not (tmp_path / "owned").exists()

    def test_missing_weights_are_an_error(self, model, tmp_path):
        """The public inference class leaves them as uninitialised memory and scores NaN."""
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["model.t_embedder.mlp.0.weight"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"model\.t_embedder\.mlp\.0\.weight"):
            StepAwareRewardModel.from_pretrained(tmp_path)

    def test_image_settings_come_from_the_processor(self, clip_path, tmp_path):
        settings = {"image_processor": {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2]}}
        (tmp_path / "processor_config.json").write_text(json.dumps(settings))
        model = StepAwareRewardModel.from_clip(clip_path, processor=tmp_path)
        assert (model.config.image_mean, model.config.image_std) == ([0.5] * 3, [0.2] * 3)
        assert model.tokenizer is None
        with pytest.raises(ValueError, match="no tokenizer"):
            model.encode_prompts(["a cat"])

    def test_a_plain_clip_is_not_mistaken_for_a_reward_model(self, clip_path):
        with pytest.raises(ValueError, match="from_clip"):
            StepAwareRewardModel.from_pretrained(clip_path)

    def test_missing_paths_are_told_without_asking_the_hub(self, clip_path, tmp_path):
        nowhere = str(tmp_path / "nowhere")
        with patch("socket.socket", side_effect=AssertionError("went to the network")):
            for call in (
                lambda: StepAwareRewardModel.from_clip(nowhere),
                lambda: StepAwareRewardModel.from_clip(clip_path, processor=nowhere),
                lambda: StepAwareRewardModel.from_pretrained(nowhere),
                lambda: StepAwareRewardModel.from_original_checkpoint(nowhere, clip=clip_path),
            ):
                with pytest.raises(FileNotFoundError, match="nowhere"):
                    call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": 1000}, r"\[0, 1000\)"),
        ({"timesteps": torch.tensor([0, -1, 5])}, r"\[0, 1000\)"),
        ({"timesteps": torch.tensor([1, 2])}, r"\(3,\)"),
        ({"timesteps": torch.tensor([0.5, 1, 2])}, "integers"),
        ({"images": torch.zeros(3, 16, 16)}, "must have shape"),
        ({"prompts": ["a", "b"]}, "2 texts for 3 images"),
        ({"prompts": "a cat"}, "1 texts for 3 images"),
        ({"prompts": None}, "exactly one"),
        ({"text_features": torch.zeros(3, 12)}, "exactly one"),
        ({"prompts": None, "input_ids": torch.zeros(3, dtype=torch.long)}, "`input_ids` must have shape"),
    ],
)
def test_wrong_input_is_named(model, images, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.score(**{"images": images, "prompts": ["a", "b", "c"], "timesteps": 0, **arguments})
