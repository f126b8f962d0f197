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
Files for other programs: a LoRA in the naming of kohya's sd-scripts, which ComfyUI, AUTOMATIC1111 and Forge read, and a
pipeline with the LoRA merged into its weights.

A LoRA adds `scale * B A` to a weight. Both formats store A (`lora_down`) and B (`lora_up`); they differ in how they name
a layer and where they keep `scale`. diffusers keeps the adapter's configuration in the file's header (`lora_alpha`,
`alpha_pattern`, `use_rslora`); kohya has one number `alpha` per layer and computes `scale = alpha / rank`.
`diffusers.utils.convert_state_dict_to_kohya` writes the rank as alpha, whatever the adapter's alpha is, and keeps
diffusers' block names, which sd-scripts does not know for SDXL: it names the blocks of the original UNet there
(https://github.com/kohya-ss/sd-scripts, `library/sdxl_model_util.py`). So the conversion is done here.
"""

import copy
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft, logging
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .hub_files import load_diffusers_pipeline
from .pipelines.adapters import LORA_NAME
from .pipelines.base import SPOPipeline


logger = logging.get_logger(__name__)

METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps the configuration of adapters
BASES = {"sd15": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}  # -> kohya's `ss_base_model_version`


# Layers of a residual block and around the blocks, in diffusers' and in the original UNet's naming.
LDM_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
LDM_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def export_kohya(lora: str | Path, output_file: str | Path, base: str = "sd15") -> Path:
    r"""
    Write a LoRA of a UNet in the format of kohya's sd-scripts, for ComfyUI, AUTOMATIC1111 and Forge. diffusers reads it,
    too.

    Each adapted layer has `lora_unet_<layer>.lora_down.weight`, `.lora_up.weight` and `.alpha`, where `alpha` is
    `rank * scale` with the scale the adapter was trained with; patterns of ranks and alphas and rsLoRA are included.
    The file has one alpha, the most common: diffusers (0.42) loses the alphas of attention layers if they differ, so
    layers with another one carry the ratio in `lora_up`. All other weights are copied as they are. Layers have
    diffusers' names for Stable Diffusion 1 and 2 and the original UNet's for SDXL, as sd-scripts has it.

    Args:
        lora (`str` or `Path`):
            The folder [`SPOTrainer.save_model`] wrote, or a safetensors file in diffusers' format. A file without an
            adapter configuration counts as `alpha = rank`, as diffusers reads it.
        output_file (`str` or `Path`):
            The `.safetensors` file to write; its folder is created.
        base (`str`, *optional*, defaults to `"sd15"`):
            What the LoRA belongs to: `"sd15"` (any Stable Diffusion 1), `"sd2"` or `"sdxl"`.

    Returns:
        `Path`: the file.

    Raises:
        FileNotFoundError: if there is no LoRA file.
        ValueError: for an unknown `base` or one the layers contradict, a file that is no LoRA of a UNet in diffusers'
            format, and adapters that kohya's format cannot hold (DoRA, LoRA with biases).
    """
    if base not in BASES:
        raise ValueError(f"`base` must be one of {', '.join(map(repr, BASES))}; got {base!r}.")
    output_file = Path(output_file)
    if output_file.suffix != ".safetensors":
        raise ValueError(f"`output_file` must end in .safetensors, got {str(output_file)!r}.")
    source = find_lora(lora)
    layers, config = read_lora(source)
    if source.resolve() == output_file.resolve():
        raise ValueError(f"`output_file` is the LoRA itself, {str(source)!r}. Write the export to another file.")
    _check_base(layers, base, source)
    alphas = {layer: _scale(config, layer, len(down)) * len(down) for layer, (down, _) in layers.items()}
    ranks = {len(down) for down, _ in layers.values()}
    alpha = Counter(value for value in alphas.values() if value).most_common(1)
    alpha = alpha[0][0] if alpha else 1.0
    tensors = {}
    for layer, (down, up) in layers.items():
        name = "lora_unet_" + (_sdxl_ldm_name(layer) if base == "sdxl" else layer).replace(".", "_")
        up = up if alphas[layer] == alpha else (up.float() * (alphas[layer] / alpha)).to(up.dtype)
        tensors[f"{name}.lora_down.weight"] = down.contiguous()
        tensors[f"{name}.lora_up.weight"] = up.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    metadata = {
        "format": "pt",
        "ss_base_model_version": BASES[base],
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alpha:g}",
    }
    output_file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output_file, metadata=metadata)
    return output_file


@torch.no_grad()
def merge_lora(
    pipeline: Any,
    lora: str | Path,
    output_dir: str | Path,
    lora_scale: float = 1.0,
    **from_pretrained_kwargs,
) -> Path:
    r"""
    Write a complete diffusers pipeline with a LoRA merged into its UNet: `DiffusionPipeline.from_pretrained` loads it
    without this package and without peft, and it samples as fast as the base model.

    Args:
        pipeline (diffusers pipeline, [`SPOPipeline`], `str` or `Path`):
            The base model, or the folder or Hub id of it. An object is not changed; adapters it carries do not become
            part of the result.
        lora (`str` or `Path`):
            The folder [`SPOTrainer.save_model`] wrote, or a LoRA file in diffusers' or kohya's format.
        output_dir (`str` or `Path`):
            Where the merged pipeline goes, as safetensors.
        lora_scale (`float`, *optional*, defaults to `1.0`):
            Strength of the LoRA; 0 is the base model.
        from_pretrained_kwargs:
            Passed to `from_pretrained` for a path or Hub id, such as `torch_dtype` (also by name).

    Returns:
        `Path`: the folder.

    Raises:
        FileNotFoundError: if there is no LoRA file.
        ValueError: if the file is no LoRA of a UNet, or does not fit the pipeline's.
    """
    output_dir, source = Path(output_dir), find_lora(lora)
    if isinstance(pipeline, (str, Path)):
        if Path(pipeline).resolve() == output_dir.resolve():
            raise ValueError(f"`output_dir` is the base model itself, {str(pipeline)!r}. Write to another folder.")
        pipeline = load_diffusers_pipeline(pipeline, **from_pretrained_kwargs)
    elif from_pretrained_kwargs:
        raise ValueError(f"{sorted(from_pretrained_kwargs)} need a path or Hub id of the pipeline, not an object.")
    pipeline = pipeline.sd_pipeline if isinstance(pipeline, SPOPipeline) else pipeline
    original = getattr(pipeline, "unet", None)
    if original is None:
        raise ValueError(f"`pipeline` must have a UNet to merge the LoRA into, got `{type(pipeline).__name__}`.")
    merged = copy.deepcopy(original)
    if getattr(merged, "peft_config", None):
        logger.warning(f"Adapters {list(merged.peft_config)} of the pipeline are left out of the merged model.")
        merged.unload_lora()
    state_dict, alphas, metadata = _diffusers_lora(pipeline, source)
    _check_fit(merged, state_dict, source)
    merged.load_lora_adapter(state_dict, prefix="unet", network_alphas=alphas, metadata=metadata)
    merged.fuse_lora(lora_scale=lora_scale, safe_fusing=True)
    merged.unload_lora()
    pipeline.register_modules(unet=merged)
    try:
        pipeline.save_pretrained(output_dir, safe_serialization=True)
    finally:
        pipeline.register_modules(unet=original)
    return output_dir


def find_lora(path: str | Path) -> Path:
    """The safetensors file that `path` is or, for a folder, contains under diffusers' name."""
    path = Path(path)
    file = path / LORA_NAME if path.is_dir() else path
    if not file.is_file():
        hint = f"the folder has no {LORA_NAME}" if path.is_dir() else "the path does not exist"
        raise FileNotFoundError(
            f"There is no LoRA in {str(path)!r}: {hint}. Pass the folder `SPOTrainer.save_model()` wrote, or a "
            ".safetensors file."
        )
    return file


def _read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}, handle.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} is not a safetensors file ({error}).") from error


def read_lora(file: str | Path) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict | None]:
    """
    The layers of a UNet LoRA in diffusers' format.

    Args:
        file (`str` or `Path`): a safetensors file.

    Returns:
        `tuple`: per layer (such as `down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q`) its matrices A of shape
        `(rank, in, ...)` and B of shape `(out, rank, ...)`; and the adapter's configuration, or `None` if the file has
        none.

    Raises:
        ValueError: if the file holds anything else.
    """
    file = Path(file)
    tensors, header = _read_tensors(file)
    expected = "Expected a LoRA in diffusers' format, with tensors such as 'unet. ... .to_q.lora.down.weight'"
    if any(key.startswith("lora_unet_") for key in tensors):
        raise ValueError(f"{str(file)!r} already is in kohya's format. {expected}.")
    foreign = sorted(key for key in tensors if not key.startswith("unet."))
    if foreign:
        text = any(key.startswith("text_encoder") for key in foreign)
        what = "a LoRA of text encoders, which SPO does not train" if text else "no LoRA of a UNet"
        raise ValueError(f"{str(file)!r} is {what} (found {foreign[0]!r}). {expected}.")
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in convert_unet_state_dict_to_peft(
        {k.removeprefix("unet."): v for k, v in tensors.items()}
    ).items():
        match = re.fullmatch(r"(.+)\.lora_(A|B)\.weight", key)
        if match is None:
            if "lora_magnitude_vector" in key:
                raise ValueError(
                    f"{str(file)!r} is a DoRA, and readers of kohya's format disagree on it. Use `merge_lora` and pass "
                    "the merged model on."
                )
            if key.endswith("lora_B.bias"):
                raise ValueError(
                    f"{str(file)!r} has LoRA biases, which kohya's format cannot hold. Train without `lora_bias`."
                )
            raise ValueError(f"{str(file)!r} is no LoRA of a UNet (found {key!r}). {expected}.")
        layers.setdefault(match[1], {})[match[2]] = value
    incomplete = [layer for layer, parts in layers.items() if set(parts) != {"A", "B"}]
    if incomplete or not layers:
        what = f"half of layer {incomplete[0]!r} is missing" if incomplete else "it is empty"
        raise ValueError(f"{str(file)!r} is no complete LoRA: {what}.")
    config = json.loads(header[METADATA_KEY]) if METADATA_KEY in header else {}
    config = {key.removeprefix("unet."): value for key, value in config.items() if key.startswith("unet.")}
    return {layer: (parts["A"], parts["B"]) for layer, parts in layers.items()}, config or None


def _without_prefix(tensors: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("unet."): value for key, value in tensors.items()}


def _scale(config: dict | None, layer: str, rank: int) -> float:
    """Factor of B A in a layer, as peft computes it; 1 for a file without configuration, as diffusers reads it."""
    if config is None:
        return 1.0
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), layer), config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _check_base(layers: dict, base: str, source: Path) -> None:
    """SDXL has no attention in its first and last block and three levels; Stable Diffusion 1 and 2 have four."""
    not_sdxl = [name for name in layers if re.match(r"(down_blocks\.0\.attentions|down_blocks\.3|up_blocks\.3)", name)]
    # Only SDXL stacks transformer blocks, and only its text features have 2048 dimensions.
    not_sd = [
        name
        for name, (down, _) in layers.items()
        if re.search(r"transformer_blocks\.[1-9]", name)
        or (re.search(r"attn2\.to_[kv]$", name) and down.shape[1] == 2048)
    ]
    wrong, right = (not_sdxl, "'sd15' or 'sd2'") if base == "sdxl" else (not_sd, "'sdxl'")
    if wrong:
        raise ValueError(
            f"{str(source)!r} does not belong to base {base!r}, which has no such layer as {wrong[0]!r}. Pass "
            f"`base={right}`."
        )


def _sdxl_ldm_name(layer: str) -> str:
    """
    The name of a layer in the original SDXL UNet, where input and output blocks are numbered through.

    Raises:
        ValueError: for a layer SDXL does not have.
    """
    if layer in LDM_OUTSIDE:
        return LDM_OUTSIDE[layer]
    match = re.fullmatch(r"(down|up)_blocks\.([0-2])\.(resnets|attentions)\.([0-2])\.(.+)", layer)
    if match and not (match[1] == "down" and match[4] == "2"):
        number = 3 * int(match[2]) + int(match[4]) + (match[1] == "down")
        block = f"{'input' if match[1] == 'down' else 'output'}_blocks.{number}"
        return f"{block}.1.{match[5]}" if match[3] == "attentions" else f"{block}.0.{_ldm_resnet(match[5], layer)}"
    match = re.fullmatch(r"mid_block\.(resnets|attentions)\.([01])\.(.+)", layer)
    if match:
        number = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{number}." + (match[3] if number == 1 else _ldm_resnet(match[3], layer))
    match = re.fullmatch(r"down_blocks\.([01])\.downsamplers\.0\.conv", layer)
    if match:
        return f"input_blocks.{3 * int(match[1]) + 3}.0.op"
    match = re.fullmatch(r"up_blocks\.([01])\.upsamplers\.0\.conv", layer)
    if match:
        return f"output_blocks.{3 * int(match[1]) + 2}.2.conv"
    raise ValueError(f"The SDXL UNet has no layer {layer!r}. Pass the `base` this LoRA belongs to.")


def _ldm_resnet(part: str, layer: str) -> str:
    if part not in LDM_RESNET:
        raise ValueError(f"The SDXL UNet has no layer {layer!r}. Pass the `base` this LoRA belongs to.")
    return LDM_RESNET[part]


def _diffusers_lora(pipeline, source: Path) -> tuple[dict, dict | None, dict | None]:
    """Tensors, alphas and configuration of a LoRA file in either format, as diffusers understands it."""
    tensors, _ = _read_tensors(source)
    if not tensors or not any(key.startswith(("unet.", "lora_unet_")) for key in tensors):
        raise ValueError(f"{str(source)!r} is no LoRA of a UNet (found {sorted(tensors)[:1]}).")
    if any(not key.startswith(("unet.", "lora_unet_")) for key in tensors):
        raise ValueError(f"{str(source)!r} holds more than a LoRA of a UNet; only that can be merged.")
    tensors, alphas, metadata = pipeline.lora_state_dict(
        str(source.parent), weight_name=source.name, unet_config=pipeline.unet.config, return_lora_metadata=True
    )
    if alphas is None:  # one naming for all layers: diffusers ignores the others in a file that mixes two
        tensors = {f"unet.{k}": v for k, v in convert_unet_state_dict_to_peft(_without_prefix(tensors)).items()}
    return tensors, alphas, metadata


def _check_fit(unet: torch.nn.Module, state_dict: dict, source: Path) -> None:
    """diffusers ignores layers it does not find; a merged model without part of its LoRA must not come about."""
    layers = convert_unet_state_dict_to_peft(_without_prefix(state_dict))
    modules = dict(unet.named_modules())
    for key, value in layers.items():
        layer, _, part = key.partition(".lora_")
        weight = getattr(modules.get(layer), "weight", None)
        sizes = {"A.weight": (1, 1), "B.weight": (0, 0)}.get(part)
        if weight is None or (sizes and weight.shape[sizes[0]] != value.shape[sizes[1]]):
            raise ValueError(
                f"The LoRA in {str(source)!r} does not fit this UNet: {layer!r} "
                + ("is no layer of it." if weight is None else f"has weights of shape {tuple(weight.shape)}.")
                + " Pass the base model it was trained on."
            )
