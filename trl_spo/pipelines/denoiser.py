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

"""Helpers for the denoiser of any family: find its dtypes, wrap it for training, and the default LoRA."""

import functools
from typing import Any

import torch
from diffusers.utils import BaseOutput
from peft import LoraConfig

from .adapters import adapter_parameters


CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def default_lora_config() -> LoraConfig:
    """The paper's SD1.5 adapter: rank 4 on the attention projections (SPO, appendix; DDPO uses the same)."""
    return LoraConfig(
        r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]
    )


def layerwise_casting(network: torch.nn.Module) -> Any | None:
    """
    The hook of diffusers' `enable_layerwise_casting` in a network, or `None`. With it, layers store their weights in few bits
    and cast them for the time of each call. So the network does not compute in the dtype of its weights, and the weights are
    new tensors after every call.
    """
    hooks = (_casting_hook(module) for module in network.modules())
    return next((hook for hook in hooks if hook is not None), None)


def _casting_hook(module: torch.nn.Module) -> Any | None:
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook("layerwise_casting")


def keep_weights_of_convolutions(network: torch.nn.Module) -> None:
    """
    Make frozen convolutions under layerwise casting trainable through. Autograd keeps the parameter of a convolution for the
    backward pass, and by then the hook has put it back to few bits, which all but oneDNN refuse ("expected scalar type
    BFloat16 but found Float8_e4m3fn"). An alias keeps the weight that was computed with; linear layers keep one anyway.
    """
    for module in network.modules():
        if isinstance(module, CONVOLUTIONS) and _casting_hook(module) is not None:
            module._conv_forward = functools.partial(_convolve_with_alias, module)


def _convolve_with_alias(
    module: torch.nn.Module, inputs: torch.Tensor, weight: torch.Tensor, bias: Any
) -> torch.Tensor:
    weight = weight if weight.requires_grad else weight.detach()
    return type(module)._conv_forward(module, inputs, weight, bias)


def compute_dtype_of(network: torch.nn.Module) -> torch.dtype:
    """
    The dtype in which a diffusers network takes its inputs. The dtype of the first parameter may be another one: weights may
    be stored in 8 or 4 bits, and adapters are float32 in a network of half precision.
    """
    hook = layerwise_casting(network)
    if hook is not None:
        return hook.compute_dtype

    # Otherwise it is the dtype of the first weight that is not quantised, not an adapter's and not always kept in float32.
    adapters = set(map(id, adapter_parameters(network)))
    kept = tuple(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, parameter in network.named_parameters():
        if not parameter.is_floating_point() or torch.finfo(parameter.dtype).bits < 16:
            continue
        if id(parameter) not in adapters and not any(part in name for part in kept):
            return parameter.dtype

    # A network that is quantised as a whole says in which dtype it computes.
    quantization = getattr(getattr(network, "config", None), "quantization_config", None)
    for name in ("compute_dtype", "bnb_4bit_compute_dtype"):
        if isinstance(getattr(quantization, name, None), torch.dtype):
            return getattr(quantization, name)
    return torch.float32


def takes_any_precision(network: torch.nn.Module) -> None:
    """
    Make a network accept inputs of any dtype, and return outputs in the dtype of its inputs. A denoiser that is trained as a
    whole becomes float32, while its user's pipeline goes on calling it in half precision.
    """

    # Inputs and outputs may be nested: SDXL's conditions come in a dictionary, and outputs are records of diffusers.
    def cast(value, dtype):
        return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value

    def cast_nested(value, dtype):
        if isinstance(value, dict):
            return {key: cast_nested(item, dtype) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(cast_nested(item, dtype) for item in value)
        return cast(value, dtype)

    def first_dtype(args, kwargs):
        values = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
        return next((value.dtype for value in values if value.is_floating_point()), torch.float32)

    # One hook casts the inputs to the dtype of the weights, the other casts the output back. Calls may be nested, so the
    # dtypes that were asked for are kept on a stack.
    asked = []

    def before(module, args, kwargs):
        asked.append(first_dtype(args, kwargs))
        own = next(module.parameters()).dtype
        return (args, kwargs) if asked[-1] == own else (cast_nested(args, own), cast_nested(kwargs, own))

    def after(module, args, kwargs, output):
        dtype = asked.pop()
        if dtype == next(module.parameters()).dtype:
            return output
        if isinstance(output, BaseOutput):
            return type(output)(*(cast_nested(value, dtype) for value in output.to_tuple()))
        return cast_nested(output, dtype)

    network.register_forward_pre_hook(before, with_kwargs=True)
    network.register_forward_hook(after, with_kwargs=True)


class DenoiserForTraining(torch.nn.Module):
    """
    The module a `transformers.Trainer` sees. It forwards to the denoiser and has no `config`: callbacks of trackers
    expect the one of a transformers model there, which a diffusers network does not have.
    """

    accepts_loss_kwargs = False

    def __init__(self, denoiser: torch.nn.Module):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, *args, **kwargs):
        return self.denoiser(*args, **kwargs)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """
        A state with all that is trained is complete: what is frozen comes from the base model, and checkpoints of DeepSpeed
        leave it out.
        """
        keys = super().load_state_dict(state_dict, strict=False, assign=assign)
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        missing = sorted(trained & set(keys.missing_keys))
        if strict and (missing or keys.unexpected_keys):
            raise RuntimeError(
                f"The state lacks {missing} and has {keys.unexpected_keys}, which the denoiser has not."
            )
        return keys

    @property
    def _no_split_modules(self) -> list[str]:
        """
        Classes that accelerate makes units of FSDP: the blocks that diffusers names, and the denoiser, since rollouts call it
        without this wrapper.
        """
        present = {type(module).__name__ for module in self.denoiser.modules()}
        blocks = getattr(self.denoiser, "_no_split_modules", None) or []
        return [*(name for name in blocks if name in present), type(self.denoiser).__name__]

    def activation_checkpointing_enable(self, **kwargs):
        """What `transformers.Trainer` (5.x) calls for `gradient_checkpointing=True`; diffusers has no options for it."""
        self.denoiser.enable_gradient_checkpointing()

    gradient_checkpointing_enable = activation_checkpointing_enable  # transformers 4.x
