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
Necessity: a LoRA that other programs load with the wrong strength or on the wrong layer gives wrong images without an
error, so every export is judged by the images it gives, not by its keys alone.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import AutoPipelineForText2Image, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trl_spo import SPOTrainer, wrap_pipeline
from trl_spo.export import locate_lora, merge_lora
from trl_spo.kohya import export_comfyui, export_kohya, read_lora
from trl_spo.pipelines.adapters import LORA_NAME
from trl_spo.scripts.arguments import SamplerArguments

from .flow_testing import (
    tiny_flux2_klein_pipeline,
    tiny_flux_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_z_image_pipeline,
)
from .testing_utils import PROMPTS, brightness_reward, state_of, tiny_sd_pipeline, tiny_sdxl_pipeline, tiny_spo_config


FLOW_FAMILIES = [
    tiny_sd3_pipeline,
    tiny_flux_pipeline,
    tiny_flux2_klein_pipeline,
    tiny_z_image_pipeline,
    tiny_qwen_image_pipeline,
]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
# Every kind of layer a UNet has, with a rank and an alpha of its own for some of them.
EVERYTHING = {
    "target_modules": [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
    + ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"],
    "rank_pattern": {"attn2.to_k": 3, "conv1": 1},
    "alpha_pattern": {"attn2.to_k": 5, "mid_block.attentions.0.proj_in": 0.5},
}


def draw_adapter(pipeline) -> None:
    """An adapter that shows: both matrices of every layer are random."""
    generator = torch.Generator().manual_seed(1)
    for name, value in pipeline.denoiser.named_parameters():
        if ".lora_" in name:
            value.data = 0.3 * torch.randn(value.shape, generator=generator)


def sdxl_unet(**kwargs) -> UNet2DConditionModel:
    """SDXL's topology, tiny: three levels of two layers, attention in the inner two."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(4, 8, 8),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 6 * 8,
        use_linear_projection=True,
        **kwargs,
    )


def pipeline_of(base, folder):
    if base != "sdxl":
        return tiny_sd_pipeline(folder)
    pipeline = tiny_sdxl_pipeline(folder)
    pipeline.register_modules(unet=sdxl_unet())
    return pipeline


def image(pipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(
        pipeline(PROMPTS[0], num_inference_steps=2, generator=generator, output_type="np", height=16, width=16).images
    )


def random_lora(base, folder, **config):
    """A LoRA with effect, saved as the trainer saves it; returns its folder and the image it gives."""
    pipeline = wrap_pipeline(pipeline_of(base, folder))
    pipeline.add_lora(LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ATTENTION, **config}))
    draw_adapter(pipeline)
    pipeline.save_lora(folder / "lora")
    return folder / "lora", image(pipeline.sd_pipeline)


def test_what_the_trainer_saves_is_exported(tmp_path):
    trainer = SPOTrainer(
        tiny_spo_config(tmp_path / "run", num_inference_steps=3, max_steps=2, learning_rate=0.05),
        tiny_sd_pipeline(tmp_path),
        brightness_reward,
        train_dataset=PROMPTS,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION),
    )
    trainer.train()
    trainer.save_model()
    pipeline = tiny_sd_pipeline(tmp_path)
    base = image(pipeline)
    pipeline.load_lora_weights(tmp_path / "run")
    expected = image(pipeline)
    pipeline.unload_lora_weights()
    assert (expected - base).abs().max() > 0.01

    file = export_kohya(tmp_path / "run", tmp_path / "exports" / "spo.safetensors")
    # The strength of 8 / 4 is in the weights of the trainer's file, which has alpha = rank.
    assert {tensor.item() for key, tensor in load_file(file).items() if key.endswith(".alpha")} == {4.0}
    pipeline.load_lora_weights(file)
    torch.testing.assert_close(image(pipeline), expected, atol=1e-5, rtol=0)

    merged = AutoPipelineForText2Image.from_pretrained(
        merge_lora(trainer.pipeline, tmp_path / "run", tmp_path / "merged")
    )
    merged.set_progress_bar_config(disable=True)
    torch.testing.assert_close(image(merged), expected, atol=1e-4, rtol=0)


def test_an_adapter_on_more_than_attention_loads_in_plain_diffusers(tmp_path):
    """Regression: saved in a mixture of diffusers' and peft's naming, of which diffusers reads what the first key is in."""
    folder, expected = random_lora("sd15", tmp_path, **EVERYTHING)
    pipeline = tiny_sd_pipeline(tmp_path)
    pipeline.load_lora_weights(folder)
    torch.testing.assert_close(image(pipeline), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
@pytest.mark.parametrize("config", [{"use_rslora": True}, EVERYTHING], ids=["rslora", "patterns"])
def test_the_export_gives_the_same_images_in_diffusers(base, config, tmp_path):
    folder, expected = random_lora(base, tmp_path, **config)
    file = export_kohya(folder, tmp_path / "kohya.safetensors", base)
    pipeline = pipeline_of(base, tmp_path)
    assert (image(pipeline) - expected).abs().max() > 0.05
    pipeline.load_lora_weights(file)
    torch.testing.assert_close(image(pipeline), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("config", [{"use_rslora": True}, EVERYTHING], ids=["rslora", "patterns"])
def test_the_export_follows_the_rule_its_readers_apply(config, tmp_path):
    """W += alpha / rank * up @ down on the layer whose path, with underscores, is in the key: no diffusers involved."""
    folder, expected = random_lora("sd15", tmp_path, **config)
    tensors = load_file(export_kohya(folder, tmp_path / "kohya.safetensors"))
    pipeline = tiny_sd_pipeline(tmp_path)
    for name, module in pipeline.unet.named_modules():
        key = "lora_unet_" + name.replace(".", "_")
        if f"{key}.alpha" in tensors:
            down, up = (tensors.pop(f"{key}.lora_{part}.weight") for part in ("down", "up"))
            scale = tensors.pop(f"{key}.alpha") / len(down)
            product = torch.einsum("or,r...->o...", up.flatten(1), down)
            module.weight.data += scale * product.reshape(module.weight.shape)
    assert not tensors
    torch.testing.assert_close(image(pipeline), expected, atol=2e-5, rtol=0)


def test_sdxl_layers_carry_the_names_of_the_original_unet(tmp_path):
    """Names from the files sd-scripts writes; the numbering counts residual and sampling blocks through."""
    folder, _ = random_lora("sdxl", tmp_path, **EVERYTHING)
    names = {key.split(".")[0] for key in load_file(export_kohya(folder, tmp_path / "k.safetensors", "sdxl"))}
    for name in (
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q",  # down_blocks.1.attentions.0
        "input_blocks_8_1_transformer_blocks_1_attn2_to_out_0",  # down_blocks.2.attentions.1
        "input_blocks_3_0_op",
        "middle_block_1_proj_in",
        "middle_block_2_emb_layers_1",
        "output_blocks_0_1_transformer_blocks_1_ff_net_0_proj",
        "output_blocks_5_2_conv",
        "output_blocks_8_0_skip_connection",
        "input_blocks_1_0_in_layers_2",
    ):
        assert f"lora_unet_{name}" in names
    assert not any("down_blocks" in name or "up_blocks" in name or "mid_block_" in name for name in names)
    assert len(names) == len(read_lora(folder / LORA_NAME)[0])


def test_alpha_is_why_diffusers_own_converter_is_not_used(tmp_path):
    """It writes the rank for alpha: here 2 for 6. Should that change, this module can become shorter."""
    folder, _ = random_lora("sd15", tmp_path)
    layers, config = read_lora(folder / LORA_NAME)
    peft = {
        f"unet.{k}.lora_{part}.weight": v for k, pair in layers.items() for part, v in zip("AB", pair, strict=True)
    }
    theirs = {float(v) for k, v in convert_state_dict_to_kohya(peft).items() if k.endswith("alpha")}
    ours = load_file(export_kohya(folder, tmp_path / "k.safetensors"))
    assert theirs == {2.0} and config["lora_alpha"] == 6
    assert {float(v) for k, v in ours.items() if k.endswith("alpha")} == {6.0}


def test_header_and_files_without_configuration(tmp_path):
    folder, _ = random_lora("sd15", tmp_path)
    with safe_open(export_kohya(folder, tmp_path / "a.safetensors"), framework="pt") as handle:
        header = handle.metadata()
    assert header["ss_base_model_version"] == "sd_v1" and header["ss_network_module"] == "networks.lora"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("2", "6")
    save_file(load_file(folder / LORA_NAME), tmp_path / "bare.safetensors")
    pipeline = tiny_sd_pipeline(tmp_path)
    pipeline.load_lora_weights(tmp_path / "bare.safetensors")
    expected = image(pipeline)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(export_kohya(tmp_path / "bare.safetensors", tmp_path / "b.safetensors", "sd2"))
    torch.testing.assert_close(image(pipeline), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "adapter",
    [
        {"r": 2, "lora_alpha": 6},
        {"r": 2, "lora_alpha": 2, "rank_pattern": {"to_q": 4}, "alpha_pattern": {"to_k": 5}},
        {"r": 4, "lora_alpha": 3, "use_rslora": True},
        {"r": 2, "lora_alpha": 6, "lora_bias": True, "target_modules": ["conv1"]},
        {"r": 2, "lora_alpha": 6, "use_dora": True},
        {"r": 2, "lora_alpha": 2},
    ],
    ids=str,
)
def test_readers_without_the_header_agree(adapter, tmp_path):
    """
    A reader that knows no header takes alpha = rank (ComfyUI, older versions of diffusers). By hand: what each layer adds is
    B A of the file.
    """
    config = LoraConfig(**{"target_modules": ["to_q", "to_k"], "init_lora_weights": False, **adapter})
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make = {"train_dataset": PROMPTS, "peft_config": config}
    trainer = SPOTrainer(tiny_spo_config(tmp_path, **settings), tiny_sd_pipeline(tmp_path), brightness_reward, **make)
    trainer.train()
    trainer.save_model()
    own = get_peft_model_state_dict(trainer.pipeline.unet)
    tensors = load_file(tmp_path / LORA_NAME)
    for layer, module in trainer.pipeline.unet.named_modules():
        if isinstance(module, BaseTunerLayer):
            down, up = (tensors[f"unet.{layer}.lora_{part}.weight"].flatten(1) for part in "AB")
            trained = own[f"{layer}.lora_B.weight"].flatten(1) @ own[f"{layer}.lora_A.weight"].flatten(1)
            torch.testing.assert_close(up @ down, trained * module.scaling["default"])

    # With its header and without it, diffusers makes the same model of the file.
    outputs = []
    headless = "use_dora" not in adapter and "lora_bias" not in adapter  # these have tensors that need it
    for reader in ("with", "without") if headless else ("with",):
        folder = tmp_path / reader
        folder.mkdir()
        shutil.copy(tmp_path / LORA_NAME, folder)
        if reader == "without":
            save_file(tensors, folder / LORA_NAME, metadata={"format": "pt"})
        plain = tiny_sd_pipeline(tmp_path)
        plain.load_lora_weights(folder)
        outputs.append(image(plain))
    expected = image(trainer.pipeline.sd_pipeline)
    for output in outputs:
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)

    # Training goes on from it, and from a checkpoint bit for bit.
    again = SPOTrainer(tiny_spo_config(tmp_path / "b"), tiny_sd_pipeline(tmp_path), brightness_reward, **make)
    again.load_model(tmp_path)
    for name, value in get_peft_model_state_dict(again.pipeline.unet).items():
        torch.testing.assert_close(value, own[name], atol=1e-7, rtol=1e-6)
    again.load_model(tmp_path / "checkpoint-1")
    assert all(torch.equal(v, own[n]) for n, v in get_peft_model_state_dict(again.pipeline.unet).items())


def test_errors_of_the_export(tmp_path):
    folder, _ = random_lora("sd15", tmp_path)
    sdxl, _ = random_lora("sdxl", tmp_path / "xl")
    output = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="'sd15', 'sd2', 'sdxl'; got 'flux'"):
        export_kohya(folder, output, "flux")
    with pytest.raises(FileNotFoundError, match=f"has no {LORA_NAME}"):
        export_kohya(tmp_path, output)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        export_kohya(tmp_path / "nothing", output)
    with pytest.raises(ValueError, match="end in .safetensors"):
        export_kohya(folder, tmp_path / "out.ckpt")
    with pytest.raises(ValueError, match="the LoRA itself"):
        export_kohya(folder, folder / LORA_NAME)
    with pytest.raises(ValueError, match="base='sdxl'"):
        export_kohya(sdxl, output, "sd15")
    four_levels = {k.replace("down_blocks.1", "down_blocks.3"): v for k, v in load_file(folder / LORA_NAME).items()}
    save_file(four_levels, tmp_path / "sd.safetensors")
    with pytest.raises(ValueError, match="base='sd15' or 'sd2'"):
        export_kohya(tmp_path / "sd.safetensors", output, "sdxl")
    kohya = export_kohya(folder, tmp_path / "kohya.safetensors")
    with pytest.raises(ValueError, match="already is in kohya's format"):
        export_kohya(kohya, output)
    for name, tensors, message in (
        ("model", {"conv.weight": torch.zeros(1)}, "not a LoRA of a UNet"),
        ("unet", {"unet.conv_in.weight": torch.zeros(1)}, "not a LoRA of a UNet"),
        ("text", {"text_encoder.q.lora_A.weight": torch.zeros(1)}, "text encoders"),
        ("half", {"unet.a.to_q.lora_A.weight": torch.zeros(1, 1)}, "half of layer"),
        ("empty", {}, "empty"),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=message):
            export_kohya(tmp_path / f"{name}.safetensors", output)
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        export_kohya(tmp_path / "text.safetensors", output)
    assert not output.exists()


def test_adapters_that_kohya_cannot_hold_are_refused(tmp_path):
    for config, message in (({"use_dora": True}, "Use `merge_lora`"), ({"lora_bias": True}, "without `lora_bias`")):
        folder, expected = random_lora("sd15", tmp_path, **config)
        with pytest.raises(ValueError, match=message):
            export_kohya(folder, tmp_path / "out.safetensors")
        if "use_dora" in config:
            merge_lora(tiny_sd_pipeline(tmp_path), folder, tmp_path / "merged")
            merged = AutoPipelineForText2Image.from_pretrained(tmp_path / "merged")
            merged.set_progress_bar_config(disable=True)
            torch.testing.assert_close(image(merged), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("base", "kohya"), [("sd15", False), ("sdxl", True)], ids=["diffusers", "kohya"])
def test_a_merged_pipeline_loads_without_peft_and_equals_base_and_lora(base, kohya, tmp_path):
    folder, expected = random_lora(base, tmp_path, **EVERYTHING)
    lora = export_kohya(folder, tmp_path / "k.safetensors", base) if kohya else folder
    pipeline_of(base, tmp_path).save_pretrained(tmp_path / "base")
    assert merge_lora(tmp_path / "base", lora, tmp_path / "merged") == tmp_path / "merged"
    assert list((tmp_path / "merged" / "unet").glob("*.safetensors"))
    code = (
        "import sys, torch; sys.modules['peft'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        "from diffusers.utils import is_peft_available\n"
        "assert not is_peft_available()\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(tmp_path / 'merged')!r})\n"
        "out = pipe('a red cat', num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type='np',"
        " height=16, width=16).images\n"
        f"torch.save(torch.tensor(out), {str(tmp_path / 'image.pt')!r})\n"
    )
    assert PROMPTS[0] == "a red cat"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    torch.testing.assert_close(torch.load(tmp_path / "image.pt"), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("family", FLOW_FAMILIES, ids=lambda make: make.__name__)
def test_a_lora_of_a_transformer_is_merged_too(family, tmp_path):
    """Every weight becomes W + 0.5 alpha / rank B A, alpha 6 and rank 2; nothing else changes, in the file or the object."""
    pipeline = wrap_pipeline(family(tmp_path))
    pipeline.add_lora(LoraConfig(r=2, lora_alpha=6, target_modules=list(pipeline.lora_target_modules)))
    draw_adapter(pipeline)
    pipeline.save_lora(tmp_path / "lora")
    plain = family(tmp_path)
    before = state_of(plain.transformer)
    merge_lora(plain, tmp_path / "lora", tmp_path / "merged", lora_scale=0.5)
    assert not getattr(plain.transformer, "peft_config", None)
    assert all(torch.equal(value, before[name]) for name, value in plain.transformer.state_dict().items())
    merged = type(plain.transformer).from_pretrained(tmp_path / "merged" / "transformer").state_dict()
    lora = load_file(tmp_path / "lora" / LORA_NAME)
    layers = {key.split(".lora_")[0].removeprefix("transformer.") for key in lora}
    assert merged.keys() == before.keys() and layers
    for name, value in before.items():
        layer = name.removesuffix(".weight")
        if layer in layers:
            a, b = (lora[f"transformer.{layer}.lora_{part}.weight"] for part in "AB")
            value = value + 1.5 * b @ a
        torch.testing.assert_close(merged[name], value, msg=name)


def test_merge_leaves_the_pipeline_alone_and_scales(tmp_path):
    folder, _ = random_lora("sd15", tmp_path)
    pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path))
    pipeline.add_lora()
    unet, before = pipeline.unet, state_of(pipeline.unet)
    merge_lora(pipeline, folder, tmp_path / "merged", lora_scale=0.5)
    assert pipeline.unet is unet and list(unet.peft_config) == ["default"]
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    plain = tiny_sd_pipeline(tmp_path).unet.state_dict()
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged" / "unet").state_dict()
    layers, _ = read_lora(folder / LORA_NAME)
    for layer, (down, up) in layers.items():  # scale 0.5 * alpha / rank = 0.5 * 6 / 2
        torch.testing.assert_close(merged[f"{layer}.weight"], plain[f"{layer}.weight"] + 1.5 * up @ down)
    assert all(torch.equal(merged[k], plain[k]) for k in plain if k.removesuffix(".weight") not in layers)
    assert "float16" not in json.dumps(json.loads((tmp_path / "merged" / "model_index.json").read_text()))


def test_errors_of_the_merge(tmp_path):
    folder, _ = random_lora("sd15", tmp_path)
    sdxl, _ = random_lora("sdxl", tmp_path / "xl")
    pipeline = tiny_sd_pipeline(tmp_path)
    pipeline.save_pretrained(tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="There is no LoRA"):
        merge_lora(pipeline, tmp_path, tmp_path / "merged")
    with pytest.raises(ValueError, match="does not fit this unet"):
        merge_lora(pipeline, sdxl, tmp_path / "merged")
    with pytest.raises(OSError, match="Nothing can be written to `output_dir`"):  # before the pipeline is looked for
        merge_lora("no/such/pipeline", folder, tmp_path / "base" / "model_index.json" / "merged")
    with pytest.raises(ValueError, match="base model itself"):
        merge_lora(tmp_path / "base", folder, tmp_path / "base")
    with pytest.raises(ValueError, match="need a path"):
        merge_lora(pipeline, folder, tmp_path / "merged", torch_dtype="float16")
    with pytest.raises(ValueError, match="with a `unet` or `transformer`"):
        merge_lora(object(), folder, tmp_path / "merged")
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a LoRA of a unet"):
        merge_lora(pipeline, tmp_path / "model.safetensors", tmp_path / "merged")
    lora = load_file(folder / LORA_NAME)
    save_file({**lora, "text_encoder.q.lora_A.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match="more than a LoRA of the unet"):
        merge_lora(pipeline, tmp_path / "more.safetensors", tmp_path / "merged")
    renamed = {key.replace("attn1.to_q", "attn1.to_z"): value for key, value in lora.items()}
    save_file(renamed, tmp_path / "renamed.safetensors")
    with pytest.raises(ValueError, match=r"attn1.to_z' is not a layer of it"):
        merge_lora(pipeline, tmp_path / "renamed.safetensors", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def spoilt(tensors: dict, how: str) -> dict:
    key = next(iter(tensors))
    if how == "a layer too many":
        return tensors | {key.replace("attn1", "attn3"): tensors[key].clone()}
    if how == "another width":
        return {name: torch.zeros(value.shape[0], 3) if "lora_A" in name else value for name, value in tensors.items()}
    if how == "no number":
        return tensors | {key: torch.full_like(tensors[key], torch.nan)}
    return {"conv.weight": torch.zeros(2)}


@pytest.mark.parametrize(
    "how, message",
    [
        ("a layer too many", "does not fit this unet: '.*attn3.* is not a layer of it"),
        ("another width", r"does not fit this unet: .* has weights of shape \(16, "),
        ("no number", "holds numbers that are NaN or infinite, in 'unet"),
        ("something else", "is not a LoRA of a unet"),
    ],
)
def test_what_is_not_merged_is_not_sampled_with_either(how, message, tmp_path):
    """Regression: `sample` and `evaluate` took what diffusers made of a file: a layer too many was passed over."""
    folder, _ = random_lora("sd15", tmp_path)
    tensors = load_file(folder / LORA_NAME)
    file = tmp_path / "spoilt.safetensors"
    save_file(
        spoilt(
            {name.replace("lora.down", "lora_A").replace("lora.up", "lora_B"): v for name, v in tensors.items()}, how
        ),
        file,
    )
    pipeline = tiny_sd_pipeline(tmp_path)
    with pytest.raises(ValueError, match=message):
        merge_lora(pipeline, file, tmp_path / "merged")
    with pytest.raises(ValueError, match=message):
        SamplerArguments(lora=str(file), device="cpu").place(wrap_pipeline(pipeline))
    assert not getattr(pipeline.unet, "peft_config", {})  # nothing was loaded


def test_a_folder_with_one_lora_by_another_name(tmp_path):
    folder, _ = random_lora("sd15", tmp_path)
    (folder / LORA_NAME).rename(folder / "style.safetensors")
    assert locate_lora(folder) == folder / "style.safetensors"
    (folder / "other.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"several .safetensors files \(other.safetensors, style"):
        locate_lora(folder)


def test_samples_may_have_a_lora_of_the_text_encoder(tmp_path):
    pipe = tiny_sd_pipeline(tmp_path)
    layers = {}
    for name, targets in (("unet", ["to_q"]), ("text_encoder", ["q_proj"])):
        network = getattr(pipe, name)
        network.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=targets))
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(network)
    type(pipe).save_lora_weights(tmp_path / "lora", **layers)
    pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path))
    SamplerArguments(lora=str(tmp_path / "lora"), device="cpu").place(pipeline)
    assert all("spo" in network.peft_config for network in (pipeline.unet, pipeline.text_encoder))
    with pytest.raises(ValueError, match="more than a LoRA of the unet"):
        merge_lora(tiny_sd_pipeline(tmp_path), tmp_path / "lora", tmp_path / "merged")


@pytest.mark.parametrize("config", [
    {"lora_alpha": 6}, {"lora_alpha": 4, "use_rslora": True}, {"lora_alpha": 2, "alpha_pattern": {"attn.to_k": 5}},
], ids=["alpha", "rslora", "pattern"])  # fmt: skip
def test_a_transformer_as_comfyui_reads_it(config, tmp_path):
    """W + alpha / rank * B A of every key it maps, added to the weights by hand, predicts what the adapter does."""
    pipeline = wrap_pipeline(tiny_sd3_pipeline(tmp_path))
    pipeline.add_lora(LoraConfig(r=2, target_modules=["attn.to_q", "attn.to_k", "attn.add_q_proj"], **config))
    draw_adapter(pipeline)
    pipeline.save_lora(tmp_path / "lora")
    tensors = load_file(export_comfyui(tmp_path / "lora", tmp_path / "comfyui.safetensors"))

    plain = wrap_pipeline(tiny_sd3_pipeline(tmp_path))
    layers = {key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")}
    assert len(tensors) == 3 * len(layers) == 3 * 6
    for layer in layers:
        down, up = (tensors[f"{layer}.lora_{part}.weight"] for part in "AB")
        weight = plain.denoiser.get_submodule(layer.removeprefix("transformer.")).weight
        weight.data += tensors[f"{layer}.alpha"] / len(down) * up @ down
    latents, embeds = torch.randn(1, *plain.latent_shape(16, 16)), plain.encode_prompt(PROMPTS[:1])
    with torch.no_grad():
        expected = pipeline.predict(latents, 500, embeds, 3.0)
        torch.testing.assert_close(plain.predict(latents, 500, embeds, 3.0), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FLOW_FAMILIES, ids=lambda make: make.__name__)
def test_every_family_has_such_an_export_of_its_own_layers(family, tmp_path):
    """`alpha` stands beside every layer of the family's adapter, under the names that diffusers gives its weights."""
    pipeline = wrap_pipeline(family(tmp_path))
    pipeline.add_lora(LoraConfig(r=2, lora_alpha=6, target_modules=list(pipeline.lora_target_modules)))
    draw_adapter(pipeline)
    pipeline.save_lora(tmp_path / "lora")
    tensors = load_file(export_comfyui(tmp_path / "lora", tmp_path / "comfy.safetensors"))
    plain = wrap_pipeline(family(tmp_path))
    layers = {key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")}
    adapted = {n for n, m in pipeline.denoiser.named_modules() if isinstance(m, BaseTunerLayer)}
    assert layers == {f"transformer.{name}" for name in adapted} and len(tensors) == 3 * len(layers)
    for layer in layers:
        down, up = (tensors[f"{layer}.lora_{part}.weight"] for part in "AB")
        weight = plain.denoiser.get_submodule(layer.removeprefix("transformer.")).weight
        weight.data += tensors[f"{layer}.alpha"] / len(down) * up @ down
    latents, embeds = torch.randn(1, *plain.latent_shape(32, 32)), plain.encode_prompt(PROMPTS[:1])
    with torch.no_grad():
        expected = pipeline.predict(latents, 500, embeds, 3.0)
        torch.testing.assert_close(plain.predict(latents, 500, embeds, 3.0), expected, atol=1e-4, rtol=1e-4)


def test_exports_refuse_each_other_s_families(tmp_path):
    pipeline = wrap_pipeline(tiny_sd3_pipeline(tmp_path))
    pipeline.add_lora()
    pipeline.save_lora(tmp_path / "sd3")
    folder, _ = random_lora("sd15", tmp_path)
    with pytest.raises(ValueError, match="not a LoRA of a transformer .found 'unet"):
        export_comfyui(folder, tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="not a LoRA of a UNet .found 'transformer"):
        export_kohya(tmp_path / "sd3", tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="is the LoRA itself"):
        export_comfyui(tmp_path / "sd3", tmp_path / "sd3" / LORA_NAME)
