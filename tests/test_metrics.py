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
Necessity: a metric with another image preparation, a transposed projection or a missing factor still prints plausible
numbers, and nobody can compare them with anyone else's.
"""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, CLIPConfig, CLIPModel

from trl_spo.evaluation.metric_images import ImagePreparation, prepare_hps_images
from trl_spo.evaluation.metric_weights import convert_image_reward, convert_open_clip
from trl_spo.evaluation.metrics import (
    METRICS,
    AestheticScore,
    CLIPScore,
    HPSv2,
    ImageReward,
    ImageRewardModel,
    PickScore,
    PredictorMLP,
    load_metric,
)

from .testing_utils import PROMPTS, tiny_clip, tiny_tokenizer


try:  # transformers 5, where the plain name needs torchvision
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
except ImportError:
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil


CPU = {"device": "cpu"}


@pytest.fixture
def images():
    """Images as files hold them: multiples of 1 / 255, not square, larger than the model's."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 3, 37, 50), generator=generator) / 255


@pytest.fixture
def clip_folder(tmp_path):
    return tiny_clip(tmp_path)


def reference_weights(shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Weights that are the same on every machine and differ from name to name."""
    weights = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        noise = torch.sin(12.9898 * torch.arange(shape.numel(), dtype=torch.float64) + 78.233 * i) * 43758.5453
        weights[name] = (0.6 * (noise - noise.floor() - 0.5)).float().view(shape)
    return weights


def wave(size: int) -> torch.Tensor:
    """Three images of deterministic pixel values."""
    return torch.sin(0.1 * torch.arange(3 * 3 * size * size, dtype=torch.float64)).float().view(3, 3, size, size)


def to_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `convert_open_clip`, written from open_clip's side."""
    names = {
        "logit_scale": "logit_scale",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    }
    for kind in ("weight", "bias"):
        names[f"ln_final.{kind}"] = f"text_model.final_layer_norm.{kind}"
        names[f"visual.ln_pre.{kind}"] = f"vision_model.pre_layrnorm.{kind}"
        names[f"visual.ln_post.{kind}"] = f"vision_model.post_layernorm.{kind}"
    converted = {target: state[source] for target, source in names.items()}
    converted["text_projection"] = state["text_projection.weight"].T
    converted["visual.proj"] = state["visual_projection.weight"].T
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        layer = 0
        while f"{tower}.encoder.layers.{layer}.layer_norm1.weight" in state:
            ours, theirs = f"{tower}.encoder.layers.{layer}", f"{prefix}transformer.resblocks.{layer}"
            for kind in ("weight", "bias"):
                qkv = [state[f"{ours}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                converted[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(qkv)
                converted[f"{theirs}.attn.out_proj.{kind}"] = state[f"{ours}.self_attn.out_proj.{kind}"]
                converted[f"{theirs}.ln_1.{kind}"] = state[f"{ours}.layer_norm1.{kind}"]
                converted[f"{theirs}.ln_2.{kind}"] = state[f"{ours}.layer_norm2.{kind}"]
                converted[f"{theirs}.mlp.c_fc.{kind}"] = state[f"{ours}.mlp.fc1.{kind}"]
                converted[f"{theirs}.mlp.c_proj.{kind}"] = state[f"{ours}.mlp.fc2.{kind}"]
            layer += 1
    return converted


def clip_state(folder) -> dict[str, torch.Tensor]:
    state = CLIPModel.from_pretrained(folder).state_dict()
    return {name: weight for name, weight in state.items() if not name.endswith("position_ids")}


# --- image preparation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(64, 64), (37, 50), (50, 37), (21, 16), (16, 16), (9, 13), (101, 32)])
def test_preparation_is_that_of_the_image_processor(tmp_path, height, width):
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(height)
    images = torch.randint(0, 256, (2, 3, height, width), generator=generator) / 255
    pictures = [Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()) for x in images]
    expected = torch.as_tensor(np.stack(processor(pictures, return_tensors="np")["pixel_values"]))
    torch.testing.assert_close(ImagePreparation.from_processor(tmp_path)(images), expected, atol=1e-6, rtol=1e-6)


def test_preparation_antialiases():
    """A checkerboard of single pixels is grey from afar; without antialiasing it is not."""
    board = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).float().expand(1, 3, 64, 64)
    prepared = ImagePreparation(16, 16, mean=(0, 0, 0), std=(1, 1, 1))(board)
    assert (prepared[:, :, 2:-2, 2:-2] - 0.5).abs().max() < 0.03


def test_crop_halves_odd_margins_as_asked():
    """16 x 19 cut to 16: a margin of 3 starts at 1 (floor) or, half to even, at 2."""
    columns = (torch.arange(19) / 255).expand(1, 3, 16, 19)
    for half, first in (("floor", 1), ("round", 2)):
        prepared = ImagePreparation(16, 16, (0, 0, 0), (1, 1, 1), half=half)(columns)
        assert (prepared[0, 0, 0] * 255).round().tolist() == list(range(first, first + 16))


@pytest.mark.parametrize(
    "settings, size, crop",
    [
        ('{"size": 24, "crop_size": 20}', 24, 20),
        ('{"size": {"height": 24, "width": 28}, "do_center_crop": false}', (24, 28), None),
        ('{"image_processor": {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}}', 24, 24),
        (None, 16, 16),
    ],
)
def test_settings_are_read_from_every_form_of_the_file(tmp_path, settings, size, crop):
    if settings is not None:
        (tmp_path / "preprocessor_config.json").write_text(settings)
    preparation = ImagePreparation.from_processor(tmp_path, image_size=16)
    assert (preparation.size, preparation.crop) == (size, crop)
    side = (size, size) if isinstance(size, int) else size
    assert preparation(torch.rand(1, 3, 30, 30)).shape[-2:] == ((crop, crop) if crop else side)


def test_hps_preparation_fits_the_longer_side_and_pads_with_black():
    """40 x 80 to 16: 8 rows of image, 4 black bars above and below, black being -mean / std."""
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    prepared = prepare_hps_images(torch.ones(2, 3, 40, 80), 16, mean, std)
    black, white = (torch.tensor([(x - m) / s for m, s in zip(mean, std, strict=True)]).view(3, 1, 1) for x in (0, 1))
    torch.testing.assert_close(prepared[:, :, [0, 3, 12, 15]], black.expand(2, 3, 4, 16))
    torch.testing.assert_close(prepared[:, :, 4:12], white.expand(2, 3, 8, 16))


def test_hps_preparation_keeps_the_overshoot_of_the_float_resize():
    """Bicubic rings at an edge; the original resizes a float tensor and does not clamp it. Antialiasing is a choice."""
    step = (torch.arange(64) >= 32).float().expand(1, 3, 64, 64)
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    smooth, sharp = (prepare_hps_images(step, 24, **plain, antialias=flag) for flag in (True, False))
    assert smooth.max() > 1.01 and smooth.min() < -0.01
    assert (smooth - sharp).abs().max() > 0.01
    same = torch.randint(0, 256, (1, 3, 24, 24)) / 255
    torch.testing.assert_close(prepare_hps_images(same, 24, **plain), same)
    with pytest.raises(ValueError, match="squares: got 20 x 24"):
        prepare_hps_images(torch.rand(1, 3, 20, 24), 24)


# --- CLIP metrics ----------------------------------------------------------------------------------------------------


def direct_logits(folder, images) -> tuple[torch.Tensor, float]:
    """`exp(logit_scale) * cos` as `CLIPModel.forward` computes it, and the factor."""
    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pictures = [Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()) for x in images]
    pixel_values = torch.as_tensor(np.stack(processor(pictures, return_tensors="np")["pixel_values"]))
    text = tiny_tokenizer(folder)(PROMPTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=pixel_values, **text)
    return output.logits_per_image.diagonal(), model.logit_scale.exp().item()


def test_pickscore_and_clip_score_are_the_models_own_logits(clip_folder, images):
    logits, scale = direct_logits(clip_folder, images)
    pickscore = PickScore.from_pretrained(clip_folder, processor=None, **CPU)
    torch.testing.assert_close(pickscore(images, PROMPTS), logits, atol=1e-4, rtol=1e-4)
    clip_score = CLIPScore.from_pretrained(clip_folder, **CPU)
    cosines = logits / scale
    upright = clip_score(images, PROMPTS)
    torch.testing.assert_close(upright, 100 * cosines.clamp(min=0), atol=1e-3, rtol=1e-4)
    clip_score.model.visual_projection.weight.neg_()  # turns every image embedding round
    turned = clip_score(images, PROMPTS)
    torch.testing.assert_close(turned, 100 * (-cosines).clamp(min=0), atol=1e-3, rtol=1e-4)
    assert ((upright == 0) ^ (turned == 0)).all()  # each image is clamped one way


def test_scores_do_not_depend_on_the_batch(clip_folder, images):
    whole = PickScore.from_pretrained(clip_folder, None, batch_size=6, **CPU)(images, PROMPTS)
    parts = PickScore.from_pretrained(clip_folder, None, batch_size=4, **CPU)
    torch.testing.assert_close(parts(images, PROMPTS), whole, atol=1e-4, rtol=1e-4)
    assert whole.dtype == torch.float32 and whole.device.type == "cpu"
    assert parts(images[:0], []).shape == (0,)


def test_half_precision_networks_give_nearly_the_same_scores(clip_folder, images):
    full = PickScore.from_pretrained(clip_folder, None, **CPU)(images, PROMPTS)
    half = PickScore.from_pretrained(clip_folder, None, dtype=torch.bfloat16, **CPU)(images, PROMPTS)
    assert half.dtype == torch.float32
    # The factor is not rounded: 2.6592 is 2.65625 in bfloat16.
    half_scale = PickScore.from_pretrained(clip_folder, None, dtype=torch.bfloat16, **CPU).logit_scale
    assert half_scale.item() == pytest.approx(
        CLIPModel.from_pretrained(clip_folder).logit_scale.exp().item(), rel=1e-6
    )
    torch.testing.assert_close(half, full, atol=0.5, rtol=0)
    assert len(half.unique()) == 6 and not torch.equal(half, half.bfloat16().float())  # float32 after the towers


def test_what_a_metric_refuses(clip_folder, images):
    metric = PickScore.from_pretrained(clip_folder, None, **CPU)
    with pytest.raises(ValueError, match=re.escape("images (N, 3, H, W) in [0, 1], got (3, 37, 50)")):
        metric(images[0], PROMPTS)
    with pytest.raises(ValueError, match="uint8"):
        metric((images * 255).byte(), PROMPTS)
    with pytest.raises(ValueError, match="2 prompts for 6 images"):
        metric(images, PROMPTS[:2])
    with pytest.raises(ValueError, match="a single string"):
        metric(images, "abcdef")
    with pytest.raises(ValueError, match=re.escape("got [-1, 1]")):
        metric(images.round() * 2 - 1, PROMPTS)
    broken = images.clone()
    broken[2, 0, 5, 5] = float("nan")  # 8 bits would turn it black
    with pytest.raises(ValueError, match=f"{PROMPTS[2]!r} has NaN"):
        metric(broken, PROMPTS)


def test_missing_models_are_named(tmp_path, clip_folder):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        PickScore.from_pretrained(str(tmp_path / "nowhere"), None)
    CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match="no tokenizer; pass"):
        PickScore.from_pretrained(tmp_path / "bare", None)
    with pytest.raises(FileNotFoundError, match="HPS_v2.1_compressed.pt"):
        HPSv2.from_pretrained(str(tmp_path), clip=clip_folder)


# --- HPS v2 ----------------------------------------------------------------------------------------------------------


def test_open_clip_weights_survive_the_round_trip(tmp_path, clip_folder):
    """A CLIP in open_clip's names, read as the HPS v2 file is, scores as the CLIP it was made from."""
    state = clip_state(clip_folder)
    back = convert_open_clip(to_open_clip(state))
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    torch.save({"epoch": 1, "state_dict": to_open_clip(state)}, tmp_path / "HPS_v2.1_compressed.pt")
    metric = load_metric("hps_v2.1", checkpoint=str(tmp_path), clip=clip_folder, **CPU)
    square = torch.randint(0, 256, (6, 3, 16, 16)) / 255  # no resize: both preparations agree
    pickscore = PickScore.from_pretrained(clip_folder, None, **CPU)
    cosines = pickscore(square, PROMPTS) / pickscore.model.logit_scale.exp()
    torch.testing.assert_close(metric(square, PROMPTS), 100 * cosines, atol=1e-3, rtol=1e-4)
    wide = torch.rand(6, 3, 20, 40)
    assert (
        metric(wide, PROMPTS) - HPSv2.from_pretrained(tmp_path, clip=clip_folder, **CPU)(wide, PROMPTS)
    ).abs().max() == 0
    path = str(tmp_path / "HPS_v2.1_compressed.pt")
    aliased = HPSv2.from_pretrained(path, clip=clip_folder, antialias=False, **CPU)
    assert (aliased(wide, PROMPTS) - metric(wide, PROMPTS)).abs().max() > 1e-3


def test_open_clip_text_tower_under_a_prefix_and_old_buffers(clip_folder):
    state = clip_state(clip_folder)
    moved = {
        name if name.startswith(("visual.", "logit_scale")) else f"text.{name}": weight
        for name, weight in to_open_clip(state).items()
    }
    assert convert_open_clip({**moved, "text.attn_mask": torch.zeros(8, 8)}).keys() == state.keys()
    with pytest.raises(ValueError, match=r"unknown names: visual\.trunk\.blocks\.0\.weight"):
        convert_open_clip({**moved, "visual.trunk.blocks.0.weight": torch.zeros(1)})


def test_scores_of_open_clips_own_network():
    """
    Regression against the `CLIP` of https://github.com/tgxs002/HPSv2 (commit 866735e): on these weights, pixels and
    tokens it gives the numbers below.
    """
    text = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2}
    text |= {"max_position_embeddings": 8, "bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 49}
    vision = {"hidden_size": 24, "intermediate_size": 96, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    shared = {"num_hidden_layers": 2, "hidden_act": "gelu", "projection_dim": 16}
    config = CLIPConfig(text_config={**text, **shared}, vision_config={**vision, **shared}, projection_dim=16)
    model = CLIPModel(config).eval()
    state = {name: weight for name, weight in model.state_dict().items() if not name.endswith("position_ids")}
    shapes = {name: weight.shape for name, weight in to_open_clip(state).items()}
    assert len(shapes) == 62
    model.load_state_dict(convert_open_clip(reference_weights(shapes)), strict=False)
    ids = torch.tensor(
        [[48, 3, 4, 49, 49, 49, 49, 49], [48, 7, 1, 2, 9, 49, 49, 49], [48, 30, 31, 32, 33, 34, 35, 49]]
    )
    with torch.no_grad():
        image = model.visual_projection(model.vision_model(pixel_values=wave(16)).pooler_output)
        text = model.text_projection(model.text_model(input_ids=ids).pooler_output)
    expected = torch.tensor([-17.199190, -29.169050, -17.585966])
    torch.testing.assert_close(100 * F.cosine_similarity(image, text), expected, atol=1e-3, rtol=0)
    assert model.logit_scale.exp().item() == pytest.approx(0.7529646, abs=1e-5)


def test_files_that_do_not_fit_are_refused_with_names(tmp_path, clip_folder):
    weights = to_open_clip(clip_state(clip_folder))
    path = tmp_path / "weights.pt"

    def load():
        return HPSv2.from_pretrained(str(path), clip=clip_folder, **CPU)

    torch.save(weights, path)
    with pytest.raises(ValueError, match="no entry 'state_dict'"):
        load()
    torch.save({"state_dict": {k: v for k, v in weights.items() if k != "visual.proj"}}, path)
    with pytest.raises(ValueError, match="missing: visual_projection.weight"):
        load()
    torch.save({"state_dict": {**weights, "visual.proj": torch.zeros(16, 5)}}, path)
    with pytest.raises(ValueError, match=r"wrong shape: visual_projection.weight \(5, 16\) for \(12, 16\)"):
        load()
    torch.save({"state_dict": {"visual.proj": test_files_that_do_not_fit_are_refused_with_names}}, path)
    with pytest.raises(ValueError, match="was refused"):
        load()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="refused|cannot be read"):
        load()


# --- aesthetic predictor ---------------------------------------------------------------------------------------------


def test_aesthetic_score_is_the_stack_on_the_unit_embedding(tmp_path, clip_folder, images):
    torch.manual_seed(0)
    weights = PredictorMLP(12).state_dict()
    assert [n for n in weights if n.endswith("weight")] == [f"layers.{i}.weight" for i in (0, 2, 4, 6, 7)]  # published
    torch.save(weights, tmp_path / "aesthetic-model.pth")
    metric = load_metric("aesthetic", predictor=str(tmp_path), clip=clip_folder, **CPU)
    expected = metric.image_embeds(images)
    torch.testing.assert_close(expected.norm(dim=-1), torch.ones(6))
    for i in (0, 2, 4, 6, 7):  # dropouts between them are off
        expected = expected @ weights[f"layers.{i}.weight"].T + weights[f"layers.{i}.bias"]
    torch.testing.assert_close(metric(images, PROMPTS), expected[:, 0], atol=1e-5, rtol=1e-5)
    assert torch.equal(metric(images, PROMPTS), metric(images, PROMPTS[::-1]))
    torch.save(PredictorMLP(768).state_dict(), tmp_path / "large.pth")
    with pytest.raises(ValueError, match=r"layers.0.weight \(1024, 768\) for \(1024, 12\)"):
        AestheticScore.from_pretrained(str(tmp_path / "large.pth"), clip=clip_folder, **CPU)


# --- ImageReward -----------------------------------------------------------------------------------------------------

VISION = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3}
VISION |= {"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6}
TEXT = {"vocab_size": 60, "hidden_size": 32, "encoder_hidden_size": 24, "intermediate_size": 48}
TEXT |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40, "hidden_act": "gelu"}
TEXT |= {"layer_norm_eps": 1e-12, "is_decoder": True}


def to_image_reward(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `convert_image_reward`, with the published file's unused projections."""
    converted = {"blip.vision_proj.weight": torch.zeros(4, 24), "blip.text_proj.bias": torch.zeros(4)}
    for name, weight in state.items():
        if name.endswith("position_ids"):
            continue
        if name.startswith("vision."):
            name = name.removeprefix("vision.").replace("embeddings.class_embedding", "cls_token")
            name = name.replace("embeddings.position_embedding", "pos_embed")
            name = name.replace("embeddings.patch_embedding", "patch_embed.proj").replace("post_layernorm", "norm")
            name = name.replace("encoder.layers", "blocks").replace("layer_norm", "norm")
            name = name.replace("self_attn.projection", "attn.proj").replace("self_attn.qkv", "attn.qkv")
            name = f"blip.visual_encoder.{name}"
        elif name.startswith("text."):
            name = f"blip.text_encoder.{name.removeprefix('text.')}"
        converted[name] = weight
    return converted


def tiny_image_reward(seed: int = 0) -> ImageRewardModel:
    torch.manual_seed(seed)
    model = ImageRewardModel(BlipVisionConfig(**VISION), BlipTextConfig(**TEXT)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def bert_tokenizer(folder):
    words = (
        "[PAD] [UNK] [CLS] [SEP] [MASK] a the red green blue cat dog bird on in of photo painting small large".split()
    )
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_image_reward_reads_the_published_names(tmp_path, images):
    model = tiny_image_reward()
    published = to_image_reward(model.state_dict())
    assert {"blip.visual_encoder.blocks.0.norm1.weight", "blip.visual_encoder.pos_embed"} <= published.keys()
    assert "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight" in published
    torch.save(published, tmp_path / "ImageReward.pt")
    folder = bert_tokenizer(tmp_path / "bert")
    metric = load_metric(
        "image_reward",
        checkpoint=str(tmp_path),
        tokenizer=str(folder),
        vision_config=BlipVisionConfig(**VISION),
        text_config=BlipTextConfig(**TEXT),
        batch_size=4,
        **CPU,
    )
    pixel_values = ImagePreparation(32, 32, half="round")(images)
    expected = []
    for image, prompt in zip(pixel_values, PROMPTS, strict=True):  # one by one, without padding
        text = metric.tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            expected.append(model(image[None], text["input_ids"], text["attention_mask"]))
    scores = metric(images, PROMPTS)
    torch.testing.assert_close(scores, torch.cat(expected), atol=1e-3, rtol=1e-4)
    assert (scores - metric(images, PROMPTS[1:] + PROMPTS[:1])).abs().min() > 1e-4  # the prompt matters
    long = ["a red cat " * 30] * 6  # longer than 35 tokens, and than the positions there are
    assert torch.equal(metric(images, long), metric(images, [prompt + "dog" for prompt in long]))
    del published["blip.visual_encoder.norm.bias"]
    torch.save(published, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match="missing: vision.post_layernorm.bias"):
        ImageReward.from_pretrained(
            str(tmp_path), tokenizer=str(folder), vision_config=BlipVisionConfig(**VISION),
            text_config=BlipTextConfig(**TEXT),
        )  # fmt: skip


def test_rewards_of_the_reference_implementation():
    """
    Regression against the BLIP of https://github.com/THUDM/ImageReward (commit c1392c6): on these weights, pixels and
    tokens it gives the numbers below.
    """
    model = tiny_image_reward()
    shapes = {
        name: weight.shape
        for name, weight in to_image_reward(model.state_dict()).items()
        if not name.startswith(("blip.vision_proj", "blip.text_proj"))
    }
    assert len(shapes) == 108
    model.load_state_dict(convert_image_reward(reference_weights(shapes)), strict=False)
    ids = torch.tensor([[1, 3, 4, 2, 0, 0, 0, 0], [1, 7, 11, 29, 9, 2, 0, 0], [1, 30, 31, 32, 33, 34, 35, 2]])
    with torch.no_grad():
        rewards = model(wave(32), ids, (ids > 0).long())
    torch.testing.assert_close(rewards, torch.tensor([2.1755123, 2.0840793, 1.9861207]), atol=1e-4, rtol=0)


def test_metrics_by_name():
    assert set(METRICS) >= {"pickscore", "hps_v2.1", "image_reward", "aesthetic", "clip_score"}
    with pytest.raises(ValueError, match="no metric 'fid'; the metrics are pickscore, hps_v2.1"):
        load_metric("fid")
