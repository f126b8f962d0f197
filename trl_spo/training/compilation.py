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
Regional compilation: the blocks that a network repeats are compiled, not the network around them.

A compiler needs minutes for a whole UNet and seconds for one block of it, and nearly all time is spent in blocks
([the recipe](https://docs.pytorch.org/tutorials/recipes/regional_compilation.html), and diffusers'
`compile_repeated_blocks`). What is compiled: the repeated blocks of the denoiser and of the reward model, and the decoder.

A graph is shared by all blocks of one class and one shape, and compiled once for:

- **every batch size**: the batch dimension is marked as dynamic before the first call, so that a last, smaller chunk or
  another number of pairs finds its graph (a single sample is a case of its own, which torch compiles separately);
- **policy and reference**: `reference_on_same_code` asks the untouched model with the code that the policy runs, so no
  rounding differs between them, and the ratio of both is exactly 1 before the first update.

Blocks keep their names: only how they are called changes, so nothing that is saved knows about it.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch._dynamo
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder, DecoderTiny
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers.utils import logging

from ..pipelines.base import SPOPipeline
from ..pipelines.denoiser import layerwise_casting


logger = logging.get_logger(__name__)

REPEATED_BLOCKS = {"SD3Transformer2DModel": ("JointTransformerBlock",)}
"""Blocks of networks that do not name any in `_repeated_blocks`."""

DECODERS = (Decoder, DecoderTiny)
"""Decoders that are compiled whole. Video decoders (Qwen-Image) keep a cache of frames and got slower where it was tried."""

GRAPHS_PER_BLOCK = 64
"""Graphs that one class of blocks may have; torch's own limit of 8 is too small for a UNet, with a shape per level."""


class CompiledBlock:
    """
    What is called instead of a block: its compiled code, for any batch size.

    Args:
        block (`torch.nn.Module`): the block to compile.
        fixed_sizes (`bool`): whether no dimension but the batch ever changes, as in a UNet.
        required (`bool`): whether a block that cannot be compiled is an error; otherwise it runs as it is, after a warning.
        compile_kwargs (`dict`): arguments of `torch.compile`.
    """

    def __init__(self, block: torch.nn.Module, fixed_sizes: bool, required: bool, compile_kwargs: dict):
        self.plain = block._call_impl
        self.compiled = torch.compile(self.plain, **compile_kwargs)
        self.fixed_sizes = fixed_sizes
        self.required = required

    def __call__(self, *args, **kwargs):
        # Whoever watches single operators, such as the estimate of memory, sees those of the block.
        if self.compiled is None or _get_current_dispatch_mode() is not None:
            return self.plain(*args, **kwargs)
        mark_batch(args, kwargs, self.fixed_sizes)
        if self.required:
            return self.compiled(*args, **kwargs)
        try:
            return self.compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.compiled = None
            reason = (str(error).strip().splitlines() or [""])[0]
            logger.warning_once(
                f"Blocks run as they are, since they cannot be compiled here ({type(error).__name__}: {reason}). Set "
                "`compile_regions=False` to leave them alone, or True to see the whole error."
            )
            return self.plain(*args, **kwargs)


def mark_batch(args: tuple, kwargs: dict, fixed_sizes: bool) -> None:
    """Tell the compiler that the first dimension, of all tensors that share it with the first one, changes."""
    tensors = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value) and value.ndim > 0]
    for tensor in tensors:
        if len(tensor) != len(tensors[0]):
            continue
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
        if fixed_sizes:
            torch._dynamo.mark_static(tensor, list(range(1, tensor.ndim)))


def repeated_blocks(network: torch.nn.Module) -> list[torch.nn.Module]:
    """
    The blocks that a network, or a part of it, names as repeated: diffusers' `_repeated_blocks` (names of classes), which
    any other network may have, or `REPEATED_BLOCKS`.
    """
    found = {}
    for part in network.modules():
        names = getattr(part, "_repeated_blocks", None) or REPEATED_BLOCKS.get(type(part).__name__, ())
        if not names:
            continue
        for block in part.modules():
            if type(block).__name__ in names:
                found[id(block)] = block
    return list(found.values())


def compile_blocks(networks: Iterable[torch.nn.Module | None], required: bool = False, **compile_kwargs) -> int:
    r"""
    Compile what repeats in some networks, in place. It happens when a block is first called.

    Args:
        networks: denoisers, reward models, autoencoders (of which the decoder is compiled); `None` is left out.
        required (`bool`, *optional*, defaults to `False`): whether a compiler that fails is an error. Otherwise blocks run
            as they are, after one warning.
        compile_kwargs: arguments of `torch.compile`, such as `backend` and `mode`.

    Raises:
        ValueError: if compiling is required, and a network casts its weights whenever a layer is called.

    Returns:
        `int`: number of blocks, 0 for networks that are not known to repeat any.
    """
    # Let torch keep one graph per shape: a UNet has several.
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, max(getattr(config, name), GRAPHS_PER_BLOCK))

    # Replace how each block is called; compiling happens on its first call.
    count = 0
    for network in networks:
        if network is None:
            continue
        if layerwise_casting(network):  # code that was compiled for weights in one dtype would meet them in the other
            if required:
                raise ValueError(
                    f"The layers of the {type(network).__name__} cast their weights when they are called "
                    "(`enable_layerwise_casting`), so its blocks cannot be compiled. Leave `compile_regions` at None."
                )
            continue
        decoder = getattr(network, "decoder", None)
        blocks = [decoder] if isinstance(decoder, DECODERS) else repeated_blocks(network)
        # A decoder sees one size or two (scoring may have its own), and each deserves code of its own.
        fixed_sizes = any(isinstance(part, (UNet2DConditionModel, *DECODERS)) for part in network.modules())
        for block in blocks:
            block._compiled_call_impl = CompiledBlock(block, fixed_sizes, required, compile_kwargs)
        count += len(blocks)
    return count


def release_blocks(networks: Iterable[torch.nn.Module | None]) -> None:
    """Let blocks that an earlier run has compiled run as they are again."""
    for network in networks:
        for block in () if network is None else network.modules():
            if isinstance(getattr(block, "_compiled_call_impl", None), CompiledBlock):
                block._compiled_call_impl = None


# --- the reference ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reference_on_same_code(pipeline: SPOPipeline) -> Iterator[torch.nn.Module]:
    r"""
    A context with the untouched model, computed by the code that was compiled for the policy.

    Code that is compiled for another case (adapter off, no gradients) fuses and therefore rounds differently, and the first
    ratios of policy and reference would not be 1. So the case stays the same: gradients as they are outside, and a LoRA
    whose up projections are zero for the moment, which adds exact zeros; or the frozen copy of full fine-tuning, in the
    mode of the policy. Detach what it predicts.

    Adapters that zero projections do not switch off (DoRA, other methods than LoRA), and dropout, which would differ between
    the two, get the plain `reference` of the pipeline, which is compiled separately.

    Args:
        pipeline ([`SPOPipeline`]): prepared for training.
    """
    denoiser = pipeline.denoiser
    with contextlib.ExitStack() as stack:
        if _has_dropout(denoiser):
            stack.enter_context(torch.no_grad())
            yield stack.enter_context(pipeline.reference())
        elif pipeline._frozen_copy is not None:
            yield stack.enter_context(_in_the_mode_of(pipeline._frozen_copy, denoiser))
        elif (projections := _up_projections(denoiser)) is not None:
            stack.enter_context(_zeroed(projections))
            yield denoiser
        else:
            stack.enter_context(torch.no_grad())
            yield stack.enter_context(pipeline.reference())


def _has_dropout(network: torch.nn.Module) -> bool:
    return any(isinstance(m, torch.nn.Dropout) and m.p > 0 and m.training for m in network.modules())


def _up_projections(network: torch.nn.Module) -> list[torch.nn.Parameter] | None:
    """The matrices of a LoRA that come last, if zeros there switch off all that is trained; else `None`."""
    up = []
    known = set()
    for layer in network.modules():
        if not isinstance(layer, LoraLayer):
            continue
        if any(getattr(layer, "use_dora", {}).values()) or getattr(layer, "lora_variant", None):
            return None
        up += layer.lora_B.parameters()
        known.update(map(id, layer.lora_A.parameters()))
        known.update(map(id, layer.lora_B.parameters()))
    trained = {id(p) for p in network.parameters() if p.requires_grad}
    return up if trained and trained <= known else None


@contextlib.contextmanager
def _zeroed(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Zeros in the place of the values; one tensor for all of one shape."""
    values = [parameter.data for parameter in parameters]
    zeros = {}
    for parameter in parameters:
        key = (parameter.shape, parameter.dtype, parameter.device)
        if key not in zeros:
            zeros[key] = torch.zeros_like(parameter.data)
        parameter.data = zeros[key]
    try:
        yield
    finally:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value


@contextlib.contextmanager
def _in_the_mode_of(frozen: torch.nn.Module, policy: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The frozen copy, as if it were trained; no gradient reaches it once what it predicts is detached."""
    frozen.requires_grad_(True).train(policy.training)
    if getattr(policy, "is_gradient_checkpointing", False):
        frozen.enable_gradient_checkpointing()
    try:
        yield frozen
    finally:
        frozen.requires_grad_(False).eval()
