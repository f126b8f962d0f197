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
The components of a diffusers pipeline, looked at before anything is done with them: the one door for training, sampling,
merging and latent rewards.

Users wrap networks (`torch.compile`, `DistributedDataParallel`, accelerate). A wrapper changes the names of weights, and what
is saved under them nobody reads, so the networks inside are used.
"""

import copy
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
        network, inside = inside, extract_model_from_parallel(inside, keep_torch_compile=False)
    return network


def plain_pipeline(pipeline: Any) -> Any:
    """
    A pipeline whose networks carry their own names and have weights.

    Args:
        pipeline: a diffusers pipeline.

    Returns:
        The pipeline itself; or, if some of its networks are wrapped, a second pipeline with the networks inside, which are
        shared. The one that was given stays as it is.

    Raises:
        ValueError: if a network is a `PeftModel`, has wrapped parts, or weights that are shapes without numbers.
    """
    networks = {
        name: value
        for name, value in getattr(pipeline, "components", {}).items()
        if isinstance(value, torch.nn.Module)
    }
    inside = {name: unwrapped(network) for name, network in networks.items()}
    for name, network in inside.items():
        check_network(network, name)
    for suffix in ("", "_2", "_3", "_4"):
        embeddings = getattr(inside.get(f"text_encoder{suffix}"), "get_input_embeddings", lambda: None)()
        if hasattr(embeddings, "num_embeddings"):
            tokenizer = getattr(pipeline, f"tokenizer{suffix}", None)
            check_vocabulary(tokenizer, embeddings.num_embeddings, f"pipeline (tokenizer{suffix})")
    replaced = {name: network for name, network in inside.items() if network is not networks[name]}
    if not replaced:
        return pipeline
    wrappers = ", ".join(f"{name} ({type(networks[name]).__name__})" for name in replaced)
    logger.warning(
        f"The network inside is used of what is wrapped: {wrappers}. To train compiled blocks, set `compile_regions`."
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
            f"A part of the {name} is wrapped, {wrapped[0]!r}, so its weights would be saved under names that nobody reads. "
            "Compile in place, as `module.compile()` and `compile_repeated_blocks()` do, or set `compile_regions`."
        )
    if any(weight.device.type == "meta" for weight in network.parameters()):
        raise ValueError(
            f"The {name} has weights on the meta device, which are shapes without numbers. Load the pipeline with "
            "`from_pretrained`, without sequential CPU offload."
        )
