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
Write a LoRA for other programs: in the format of kohya's sd-scripts for Stable Diffusion 1, 2 and XL, which ComfyUI,
AUTOMATIC1111 and Forge read, and in ComfyUI's own form for models with a transformer.

A LoRA adds `scale * B A` to a weight. Both formats store A (`lora_down`) and B (`lora_up`); they differ in how they name
a layer and where they keep `scale`. diffusers keeps the adapter's configuration in the file's header (`lora_alpha`,
`alpha_pattern`, `use_rslora`); kohya has one number `alpha` per layer and computes `scale = alpha / rank`.
`diffusers.utils.convert_state_dict_to_kohya` writes the rank as alpha, whatever the adapter's alpha is, and keeps
diffusers' block names, which sd-scripts does not know for SDXL: it names the blocks of the original UNet there
(https://github.com/kohya-ss/sd-scripts, `library/sdxl_model_util.py`). So the conversion is done here.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from .export import find_lora, read_tensors
from .pipelines.adapters import METADATA_KEY


BASES = {"sd15": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}  # -> kohya's `ss_base_model_version`

# Names of layers: of diffusers, and of the original UNet. First in a residual block, then around the blocks.
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
    Write a LoRA of Stable Diffusion 1, 2 or XL in the format of kohya's sd-scripts, for ComfyUI, AUTOMATIC1111 and
    Forge. diffusers reads it, too.

    Each adapted layer has `lora_unet_<layer>.lora_down.weight`, `.lora_up.weight` and `.alpha`, where `alpha` is
    `rank * scale` with the scale the adapter was trained with; patterns of ranks and alphas and rsLoRA are included.
    All layers of the file get one alpha, the most common one: diffusers (0.42) loses the alphas of attention layers if
    they differ, so that layers with another alpha carry the ratio in `lora_up`. All other weights are copied as they are. Layers have
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
        ValueError: for an unknown `base` or one the layers contradict, a file that is not a LoRA of a UNet in
            diffusers' format, and adapters that kohya's format cannot hold (DoRA, LoRA with biases).
    """
    # Read the LoRA, and refuse what does not fit together.
    if base not in BASES:
        raise ValueError(f"`base` must be one of {', '.join(map(repr, BASES))}; got {base!r}.")
    output_file, source = _target_and_source(lora, output_file)
    layers, config = read_lora(source)
    _check_base(layers, base, source)

    # Choose one alpha for the file (diffusers loses differing ones): the most common that is not zero.
    ranks = {layer: len(down) for layer, (down, _) in layers.items()}
    alphas = {layer: _scale(config, layer, rank) * rank for layer, rank in ranks.items()}
    most_common = Counter(value for value in alphas.values() if value).most_common(1)
    alpha = most_common[0][0] if most_common else 1.0

    # Rename the layers, and write them with a header that says what they are.
    tensors = {}
    for layer, (down, up) in layers.items():
        if alphas[layer] != alpha:
            up = (up.float() * (alphas[layer] / alpha)).to(up.dtype)
        original = _sdxl_ldm_name(layer) if base == "sdxl" else layer
        name = "lora_unet_" + original.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = down.contiguous()
        tensors[f"{name}.lora_up.weight"] = up.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    one_rank = len(set(ranks.values())) == 1
    metadata = {
        "format": "pt",
        "ss_base_model_version": BASES[base],
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(next(iter(ranks.values()))) if one_rank else "Dynamic",
        "ss_network_alpha": f"{alpha:g}",
    }
    output_file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output_file, metadata=metadata)
    return output_file


def export_comfyui(lora: str | Path, output_file: str | Path) -> Path:
    """
    Write the LoRA of a transformer (Stable Diffusion 3, FLUX) with the strength of every layer beside it. ComfyUI knows
    diffusers' names of these layers, but not the header in which diffusers keeps alpha: it reads `transformer.<layer>.alpha`
    or takes alpha = rank (https://github.com/comfyanonymous/ComfyUI, `comfy/lora.py`, `comfy/weight_adapter/lora.py`).
    So an adapter whose alpha is not its rank needs this export, and others lose nothing by it.

    Args:
        lora (`str` or `Path`): the folder [`SPOTrainer.save_model`] wrote, or its file.
        output_file (`str` or `Path`): where to write, ending in `.safetensors`.

    Returns:
        `Path`: `output_file`.

    Raises:
        FileNotFoundError: if there is no LoRA file.
        ValueError: for a file that is not a LoRA of a transformer in diffusers' format, and adapters that have no such form
            (DoRA, LoRA with biases).
    """
    output_file, source = _target_and_source(lora, output_file)
    layers, config = read_lora(source, "transformer")
    tensors = {}
    for layer, (down, up) in layers.items():
        name = f"transformer.{layer}"
        rank = len(down)
        tensors[f"{name}.lora_A.weight"] = down.contiguous()
        tensors[f"{name}.lora_B.weight"] = up.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(_scale(config, layer, rank) * rank)
    output_file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output_file, metadata={"format": "pt"})
    return output_file


def _target_and_source(lora: str | Path, output_file: str | Path) -> tuple[Path, Path]:
    """Where to write and what to read, which must not be one file."""
    output_file = Path(output_file)
    if output_file.suffix != ".safetensors":
        raise ValueError(f"`output_file` must end in .safetensors, got {str(output_file)!r}.")
    source = find_lora(lora)
    if source.resolve() == output_file.resolve():
        raise ValueError(f"`output_file` is the LoRA itself, {str(source)!r}. Write the export to another file.")
    return output_file, source


def read_lora(
    file: str | Path, denoiser_name: str = "unet"
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict | None]:
    """
    The layers of a LoRA of a denoiser in diffusers' format.

    Args:
        file (`str` or `Path`): a safetensors file.
        denoiser_name (`str`, *optional*, defaults to `"unet"`): what the denoiser is called: "unet" or "transformer".

    Returns:
        `tuple`: per layer (such as `down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q`) its matrices A of shape
        `(rank, in, ...)` and B of shape `(out, rank, ...)`; and the adapter's configuration, or `None` if the file has
        none.

    Raises:
        ValueError: if the file holds anything else.
    """
    # Refuse what is not a LoRA of the denoiser in diffusers' names.
    file = Path(file)
    tensors, header = read_tensors(file)
    kind = "UNet" if denoiser_name == "unet" else denoiser_name
    prefix = f"{denoiser_name}."
    half = "lora.down" if denoiser_name == "unet" else "lora_A"
    expected = f"Expected a LoRA in diffusers' format, with tensors such as '{prefix} ... .to_q.{half}.weight'"
    if any(key.startswith("lora_unet_") for key in tensors):
        raise ValueError(f"{str(file)!r} already is in kohya's format. {expected}.")
    foreign = sorted(key for key in tensors if not key.startswith(prefix))
    if foreign:
        text = any(key.startswith("text_encoder") for key in foreign)
        what = "a LoRA of text encoders, which SPO does not train" if text else f"not a LoRA of a {kind}"
        raise ValueError(f"{str(file)!r} is {what} (found {foreign[0]!r}). {expected}.")

    # Pair up the two matrices of each layer; the formats have no place for anything else.
    layers: dict[str, dict[str, torch.Tensor]] = {}
    tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    for key, value in convert_unet_state_dict_to_peft(tensors).items():
        match = re.fullmatch(r"(.+)\.lora_(A|B)\.weight", key)
        if match is None:
            if "lora_magnitude_vector" in key:
                raise ValueError(
                    f"{str(file)!r} is a DoRA, and other programs disagree on it. Use `merge_lora` and pass "
                    "the merged model on."
                )
            if key.endswith("lora_B.bias"):
                raise ValueError(
                    f"{str(file)!r} has LoRA biases, which the format cannot hold. Train without `lora_bias`."
                )
            raise ValueError(f"{str(file)!r} is not a LoRA of a {kind} (found {key!r}). {expected}.")
        layers.setdefault(match[1], {})[match[2]] = value
    incomplete = [layer for layer, parts in layers.items() if set(parts) != {"A", "B"}]
    if incomplete or not layers:
        what = f"half of layer {incomplete[0]!r} is missing" if incomplete else "it is empty"
        raise ValueError(f"{str(file)!r} is not a complete LoRA: {what}.")

    # The adapter's configuration is in the header.
    config = json.loads(header[METADATA_KEY]) if METADATA_KEY in header else {}
    config = {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
    return {layer: (parts["A"], parts["B"]) for layer, parts in layers.items()}, config or None


def _scale(config: dict | None, layer: str, rank: int) -> float:
    """The factor of `B A` in a layer, as peft computes it; 1 for a file without configuration, as diffusers reads it."""
    if config is None:
        return 1.0
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), layer), config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _check_base(layers: dict, base: str, source: Path) -> None:
    """
    Refuse a base whose UNet has other layers: SDXL has three levels and no attention in its first and last block, Stable
    Diffusion 1 and 2 have four levels.
    """
    not_sdxl = [name for name in layers if re.match(r"(down_blocks\.0\.attentions|down_blocks\.3|up_blocks\.3)", name)]
    # Only SDXL stacks transformer blocks, and only its text features have 2048 dimensions.
    not_sd = []
    for name, (down, _) in layers.items():
        reads_sdxl_text = re.search(r"attn2\.to_[kv]$", name) and down.shape[1] == 2048
        if re.search(r"transformer_blocks\.[1-9]", name) or reads_sdxl_text:
            not_sd.append(name)
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
