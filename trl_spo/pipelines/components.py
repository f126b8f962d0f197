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
Check the components of a diffusers pipeline and remove wrappers, before it is used for training, sampling, merging or a
latent reward.

Users wrap networks (`torch.compile`, `DistributedDataParallel`, accelerate). A wrapper changes the names of weights, and
other programs cannot read files with such names, so the networks inside are used.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers.utils import logging
from peft import PeftModel

from ..hub_files import check_vocabulary


logger = logging.get_logger(__name__)


def unwrapped(network: torch.nn.Module) -> torch.nn.Module:
    """The network inside of `torch.compile`, data parallel and sharding wrappers, however many there are."""
    inside = extract_model_from_parallel(network, keep_torch_compile=False)
    while inside is not network:
        network = inside
        inside = extract_model_from_parallel(network, keep_torch_compile=False)
    return network


def plain_pipeline(pipeline: Any) -> Any:
    """
    The pipeline without wrappers around its networks, after a check that all of them have weights.

    Args:
        pipeline: a diffusers pipeline.

    Returns:
        The pipeline itself; or, if some of its networks are wrapped, a second pipeline with the networks inside, which are
        shared. The one that was given stays as it is.

    Raises:
        ValueError: if a network is a `PeftModel`, has wrapped parts, or weights that are shapes without numbers.
    """
    # Check the networks inside of all wrappers, and the tokenizers against the text encoders.
    networks = {}
    for name, value in getattr(pipeline, "components", {}).items():
        if isinstance(value, torch.nn.Module):
            networks[name] = value
    inside = {name: unwrapped(network) for name, network in networks.items()}
    for name, network in inside.items():
        check_network(network, name)
    for suffix in ("", "_2", "_3", "_4"):
        embeddings = getattr(inside.get(f"text_encoder{suffix}"), "get_input_embeddings", lambda: None)()
        if hasattr(embeddings, "num_embeddings"):
            tokenizer = getattr(pipeline, f"tokenizer{suffix}", None)
            check_vocabulary(tokenizer, embeddings.num_embeddings, f"pipeline (tokenizer{suffix})")

    # Leave the caller's pipeline alone: only a copy gets the networks without their wrappers.
    replaced = {name: network for name, network in inside.items() if network is not networks[name]}
    if not replaced:
        return pipeline
    wrappers = ", ".join(f"{name} ({type(networks[name]).__name__})" for name in replaced)
    logger.warning(
        f"These components are wrapped, and the networks inside are used: {wrappers}. To train compiled blocks, set `compile_regions`."
    )
    plain = copy.copy(pipeline)
    plain.register_modules(**replaced)
    return plain


def check_network(network: torch.nn.Module, name: str) -> None:
    """
    Args:
        network (`torch.nn.Module`): without a wrapper around it.
        name (`str`): what to call it in messages.

    Raises:
        ValueError: if it is a `PeftModel`, has wrapped parts, or weights that are shapes without numbers.
    """
    if isinstance(network, PeftModel):
        raise ValueError(
            f"The {name} is a `{type(network).__name__}`, under whose names diffusers reads no weights. Pass the network "
            "itself, as `model.unload()` or `model.merge_and_unload()` returns it; the adapter comes as `peft_config`."
        )
    wrapped = [part for part, module in network.named_modules() if part and unwrapped(module) is not module]
    if wrapped:
        raise ValueError(
            f"A part of the {name} is wrapped, {wrapped[0]!r}, so its weights would be saved under names that no program reads. "
            "Compile in place, as `module.compile()` and `compile_repeated_blocks()` do, or set `compile_regions`."
        )
    # Whoever works on shapes, as estimates of memory do, says so by `torch.device("meta")` around it.
    wants_shapes = torch.empty(0).device.type == "meta"
    if not wants_shapes and any(weight.device.type == "meta" for weight in network.parameters()):
        raise ValueError(
            f"The {name} has weights on the meta device, which are shapes without numbers. Load the pipeline with "
            "`from_pretrained`, without sequential CPU offload."
        )


def changes_of_the_base(pipeline: Any) -> str:
    """
    Why a diffusers pipeline is not the model that its name says, in words, as far as that can be known; empty if it is.

    Known are LoRAs that `pipe.fuse_lora` fused, FreeU, and denoisers, text encoders and tokenizers that were loaded from
    elsewhere ([`parts_from_elsewhere`]). Another VAE makes other images, but a LoRA means the same beside it, so it is not among
    them; the sampler is part of a card anyway. Not known are LoRAs that a network fused by itself (`unet.fuse_lora`), words that
    a textual inversion added, and weights that were overwritten in place: they leave no trace in the pipeline.
    """
    changes = []
    fused = sorted(getattr(pipeline, "fused_loras", None) or ())
    if fused:
        changes.append(f"LoRAs are fused into it ({', '.join(fused)})")
    if _free_u_is_on(_unwrapped_part(pipeline, "unet")):
        changes.append("FreeU is on, which changes what its UNet predicts")
    parts = {name: origin for name, origin in parts_from_elsewhere(pipeline).items() if name != "vae"}
    if parts:
        changes.append("parts come from elsewhere: " + ", ".join(f"{name} ({root})" for name, root in parts.items()))
    return "; ".join(changes)


def _free_u_is_on(unet: torch.nn.Module | None) -> bool:
    """Whether `pipe.enable_freeu` has set its factors in the up blocks."""
    for block in getattr(unet, "up_blocks", ()):
        for name in ("s1", "s2", "b1", "b2"):
            if getattr(block, name, None) is not None:
                return True
    return False


def _unwrapped_part(pipeline: Any, name: str) -> torch.nn.Module | None:
    network = getattr(pipeline, name, None)
    return unwrapped(network) if isinstance(network, torch.nn.Module) else None


def parts_from_elsewhere(pipeline: Any) -> dict[str, str]:
    """
    The parts of a diffusers pipeline that were loaded from another repository or folder, such as a VAE that was passed to
    `from_pretrained`.

    diffusers and transformers note in each part where they loaded it from. Parts without such a note, as those built from a
    configuration or a single file, count as the pipeline's own.

    Returns:
        `dict[str, str]`: name of the part (`"unet"` or `"transformer"`, `"vae"`, `"text_encoder"`, `"tokenizer"`, ...) and its
        Hub id or folder.
    """
    own = _root(getattr(pipeline, "name_or_path", None))
    if own is None:
        return {}
    roots = {}
    for name, part in getattr(pipeline, "components", {}).items():
        if not name.startswith(("unet", "transformer", "vae", "text_encoder", "tokenizer")):
            continue
        part = unwrapped(part) if isinstance(part, torch.nn.Module) else part
        root = _root(_origin(part), name)
        if root is not None:
            roots[name] = root
    foreign = {name: root for name, root in roots.items() if root != own}
    if foreign == roots and len(set(roots.values())) == 1 and Path(next(iter(roots.values()))).is_dir():
        return {}  # one copy on the disk, whose pipeline was given the name of its repository
    return foreign


def _origin(part: Any) -> str | None:
    """Where diffusers or transformers say that they loaded a part from."""
    config = getattr(part, "config", None)
    from_config = config.get("_name_or_path") if hasattr(config, "get") else None
    return getattr(part, "name_or_path", None) or from_config


def _root(origin: Any, part: str = "") -> str | None:
    """The Hub id or the folder of a pipeline, from where it or one of its parts was loaded; `None` if that is not known."""
    if not origin:
        return None
    path = Path(str(origin))
    cached = [name for name in path.parts if name.startswith("models--")]  # of the cache of the Hub
    if cached:
        return cached[-1].removeprefix("models--").replace("--", "/", 1)
    if path.is_absolute() or path.exists():
        path = path.resolve()
        return str(path.parent if path.name == part else path)
    return str(origin)


def commit_of_the_base(pipeline: Any) -> str | None:
    """The commit of the repository that a pipeline was loaded from, if it lies in the cache of the Hub."""
    for name in ("unet", "transformer"):
        parts = Path(_origin(_unwrapped_part(pipeline, name)) or "").parts
        if "snapshots" in parts[:-1] and any(part.startswith("models--") for part in parts):
            return parts[parts.index("snapshots") + 1]
    return None


# What a VAE's configuration may say about its latents, and the values that mean nothing.
VAE_STATISTICS = {"shift_factor": (None, 0, 0.0), "latents_mean": (None,), "latents_std": (None,)}


def check_vae_statistics(vae: torch.nn.Module, used: tuple[str, ...]) -> None:
    """
    Args:
        vae (`torch.nn.Module`): of a pipeline.
        used (`tuple` of `str`): statistics of its configuration that the family's diffusers pipeline reads.

    Raises:
        ValueError: if it has others: diffusers would leave them out when it samples, and SPO would not.
    """
    for name, nothing in VAE_STATISTICS.items():
        value = getattr(vae.config, name, None)
        if name not in used and value not in nothing:
            raise ValueError(
                f"The VAE has `{name}={value!r}` in its configuration, which diffusers' pipeline of this family does not read: it "
                "belongs to another family. Load the VAE of the checkpoint."
            )


def check_inputs(transformer: torch.nn.Module, expected_channels: int, vae_channels: int | None) -> None:
    """
    Check that a transformer takes latents and text and nothing else.

    Args:
        transformer (`torch.nn.Module`): of a flow-matching pipeline.
        expected_channels (`int`): channels of the latents that it takes.
        vae_channels (`int`, *optional*): channels of the latents that the VAE makes, in the same form.

    Raises:
        ValueError: for transformers that also take images (inpainting, depth, edges) or other conditions, which diffusers'
            pipeline would give them and SPO would leave out.
    """
    if vae_channels is not None and expected_channels != vae_channels:
        raise ValueError(
            f"The transformer takes latents with {expected_channels} channels and the VAE makes {vae_channels}. SPO trains "
            "text-to-image models; those that also take an image (Fill, Depth, Canny) are not supported."
        )
    for name in OTHER_INPUTS:
        if getattr(transformer.config, name, None):
            raise ValueError(
                f"The transformer has `{name}={getattr(transformer.config, name)!r}`: it takes an input that SPO does not give "
                "it. Pass a plain text-to-image model."
            )
    for name in ("encoder_hid_proj", "image_proj"):
        if getattr(transformer, name, None) is not None:
            raise ValueError(
                "The transformer carries an IP-Adapter and takes images beside the prompt, which SPO does not give it. Call "
                "`pipe.unload_ip_adapter()` first."
            )


# Settings of transformers (Qwen-Image and its relatives) that stand for a further input.
OTHER_INPUTS = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
