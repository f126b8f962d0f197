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
The backbones of [`LatentRewardModel`]: they read features from inside a denoiser.

Each keeps only the part of the network that is needed: the down and mid blocks of a UNet, or the blocks of a transformer up
to the last one that is read.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ..hub_files import load_strictly
from ..pipelines.conditioning import PromptEmbeds
from ..pipelines.reward_adapter import reward_adapter


TIME_EMBEDDINGS = ("time_text_embed", "time_guidance_embed")  # of diffusers' transformers with two streams


def plain_config(config) -> dict:
    """A diffusers configuration as plain values, without the notes of the file it was read from."""
    return {name: value for name, value in dict(config).items() if not name.startswith("_")}


class UNetFeatures(nn.Module):
    """
    The down and mid blocks of a `UNet2DConditionModel`, and what is read off them.

    Args:
        config (`dict`): of the UNet.
    """

    def __init__(self, config: dict):
        super().__init__()
        unet = UNet2DConditionModel.from_config(config)
        unet.up_blocks = nn.ModuleList()  # never run: a third of the weights is enough
        unet.conv_norm_out = None
        unet.conv_out = None
        self.unet = unet

    @property
    def network(self) -> UNet2DConditionModel:
        """The diffusers network."""
        return self.unet

    @property
    def widths(self) -> list[int]:
        """Channels of the features: one entry per down level, and that of the mid block."""
        channels = list(self.unet.config.block_out_channels)
        return [*channels, channels[-1]]

    def load_network(self, state_dict: dict[str, torch.Tensor], source: str) -> None:
        """Weights of a whole UNet; those that are not needed are left out, missing and misshapen ones are an error."""
        unused = ("up_blocks.", "conv_norm_out.", "conv_out.")
        kept = {name: value for name, value in state_dict.items() if not name.startswith(unused)}
        load_strictly(self.unet, kept, source, "the backbone of the latent reward model")

    def forward(
        self, latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, added: dict | None = None
    ) -> list[torch.Tensor]:
        """
        Args:
            latents (`torch.Tensor` of shape `(B, C, h, w)`): x_t.
            timesteps (`torch.Tensor` of shape `(B,)`): int64.
            text (`torch.Tensor` of shape `(B, L, dim)`): what the blocks attend to.
            added (`dict`, *optional*): SDXL's pooled text and size conditioning.

        Returns:
            list of `torch.Tensor` of shape `(B, width)`: means over pixels, one per down level, then the mid block.
        """
        return unet_features(self.unet, latents, timesteps, text, added)


def unet_features(
    unet: UNet2DConditionModel,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    text: torch.Tensor,
    added: dict | None = None,
) -> list[torch.Tensor]:
    """What [`UNetFeatures`] reads off a UNet."""
    embedding = unet.time_embedding(unet.get_time_embed(sample=latents, timestep=timesteps))
    further = unet.get_aug_embed(emb=embedding, encoder_hidden_states=text, added_cond_kwargs=added or {})
    if further is not None:
        embedding = embedding + further
    if unet.time_embed_act is not None:
        embedding = unet.time_embed_act(embedding)
    text = unet.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=added or {})

    sample = unet.conv_in(latents)
    features = []
    for block in unet.down_blocks:
        attends = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        sample, residuals = block(hidden_states=sample, temb=embedding, **attends)
        # The last residual before the level's downsampler, which adds one of its own behind it.
        last = residuals[-1] if block.downsamplers is None else residuals[-2]
        features.append(last.mean((-2, -1)))
    attends = {"encoder_hidden_states": text} if getattr(unet.mid_block, "has_cross_attention", False) else {}
    sample = unet.mid_block(sample, embedding, **attends)
    return [*features, sample.mean((-2, -1))]


class TransformerFeatures(nn.Module):
    """
    The first blocks of a diffusion transformer with two streams (Stable Diffusion 3, FLUX, FLUX.2, Qwen-Image), and the
    image tokens that are read behind some of them.

    Args:
        config (`dict`): of the transformer, as diffusers saves it, with its class name under `_class_name`.
        blocks (`list[int]`): after which blocks of `transformer_blocks` image tokens are read, counted from 1.

    Raises:
        ValueError: if there are no such blocks.
    """

    def __init__(self, config: dict, blocks: list[int]):
        super().__init__()
        settings = {name: value for name, value in config.items() if name != "_class_name"}
        # transformers builds models that it loads on the meta device. Some transformers have tables that are not weights, so
        # no file would fill them again.
        with torch.device("cpu"):
            transformer = getattr(diffusers, config["_class_name"]).from_config(settings)
        check_blocks(transformer, blocks)
        # Behind the last one that is read nothing has to run but the small output layers, whose result nobody needs. The
        # configuration stays that of the whole network: with fewer layers in it, diffusers would build the last block
        # without its text stream.
        transformer.transformer_blocks = transformer.transformer_blocks[: max(blocks)]
        if hasattr(transformer, "single_transformer_blocks"):
            transformer.single_transformer_blocks = nn.ModuleList()
        self.transformer = transformer
        self.blocks = list(blocks)

    @property
    def network(self) -> nn.Module:
        """The diffusers network."""
        return self.transformer

    @property
    def widths(self) -> list[int]:
        """Width of the image tokens behind each block that is read."""
        return [self.transformer.inner_dim] * len(self.blocks)

    def load_network(self, state_dict: dict[str, torch.Tensor], source: str) -> None:
        """Weights of a whole transformer; blocks that do not run are left out, other differences are an error."""
        last = max(self.blocks)
        kept = {}
        for name, value in state_dict.items():
            stack, number, *_ = [*name.split("."), ""]
            behind = stack == "transformer_blocks" and number.isdigit() and int(number) >= last
            if not behind and stack != "single_transformer_blocks":
                kept[name] = value
        load_strictly(self.transformer, kept, source, "the backbone of the latent reward model")

    def forward(self, pipeline: Any, latents: torch.Tensor, sigma: torch.Tensor, text: PromptEmbeds) -> "BlockTokens":
        """
        Args:
            pipeline ([`SPOFlowPipeline`]): of the family; its way of calling the transformer is used, not its weights.
            latents (`torch.Tensor` of shape `(B, C, h, w)`): x_t in the dtype of the backbone.
            sigma (`torch.Tensor` of shape `(B,)`): float32, in [0, 1].
            text ([`PromptEmbeds`]): B rows, in the dtype of the backbone.

        Returns:
            [`BlockTokens`]
        """
        with catching(self.transformer, self.blocks) as tokens:
            pipeline.velocity(self.transformer, latents, sigma, text, pipeline.unguided_scale)
        return tokens


@dataclass
class BlockTokens:
    """
    What is read off a transformer.

    Attributes:
        image (list of `torch.Tensor` of shape `(B, N, width)`), text (list of `torch.Tensor` of shape `(B, L, width)`): tokens
            behind each block that is read.
        time (`torch.Tensor` of shape `(B, width)`): time embedding.
    """

    image: list[torch.Tensor] = field(default_factory=list)
    text: list[torch.Tensor] = field(default_factory=list)
    time: torch.Tensor | None = None


@contextlib.contextmanager
def catching(transformer: nn.Module, blocks: list[int]) -> Iterator[BlockTokens]:
    """A context in which to call the transformer: afterwards the tokens are there, in the order of `blocks`."""
    found = {}
    tokens = BlockTokens()

    def catch(key: Any):
        return lambda module, args, output: found.__setitem__(key, output)

    read = {number: transformer.transformer_blocks[number - 1] for number in blocks}
    read["time"] = next(getattr(transformer, name) for name in TIME_EMBEDDINGS if hasattr(transformer, name))
    handles = [module.register_forward_hook(catch(key)) for key, module in read.items()]
    try:
        yield tokens
        for number in blocks:
            text, image = found[number]
            tokens.text.append(text)
            tokens.image.append(image)
        tokens.time = found["time"]
    finally:
        for handle in handles:
            handle.remove()


class _Enough(Exception):
    """Raised behind the last block that is read: what comes after it need not run."""


class SharedFeatures(nn.Module):
    """
    The denoiser of a policy as the backbone of a reward, under an adapter of its own. The weights exist once; this module
    holds the adapter's parameters alone.

    Args:
        denoiser (`torch.nn.Module`): of the policy, of a UNet or a transformer with two streams.
        adapter (`dict[str, torch.nn.Parameter]`): of the reward, see [`add_reward_adapter`].
        blocks (`list[int]`, *optional*): of a transformer, see [`TransformerFeatures`].
    """

    def __init__(self, denoiser: nn.Module, adapter: dict[str, nn.Parameter], blocks: list[int] | None = None):
        super().__init__()
        self._denoiser = [denoiser]  # in a list, so that it is no part of this module
        self.adapter = nn.ParameterDict({name.replace(".", "/"): value for name, value in adapter.items()})
        self.blocks = blocks

    @property
    def network(self) -> nn.Module:
        """The diffusers network."""
        return self._denoiser[0]

    @property
    def widths(self) -> list[int]:
        """As of the backbone that is not shared."""
        if self.blocks is not None:
            return [self.network.inner_dim] * len(self.blocks)
        channels = list(self.network.config.block_out_channels)
        return [*channels, channels[-1]]

    def forward(self, *args) -> "list[torch.Tensor] | BlockTokens":
        """Arguments and result of [`UNetFeatures`] or [`TransformerFeatures`]."""
        with reward_adapter(self.network):
            if self.blocks is None:
                return unet_features(self.network, *args)
            return self._tokens(*args)

    def _tokens(self, pipeline: Any, latents: torch.Tensor, sigma: torch.Tensor, text: PromptEmbeds):
        def stop(module, args, output):
            raise _Enough

        last = self.network.transformer_blocks[max(self.blocks) - 1]
        with catching(self.network, self.blocks) as tokens:
            handle = last.register_forward_hook(stop)
            try:
                pipeline.velocity(self.network, latents, sigma, text, pipeline.unguided_scale)
            except _Enough:
                pass
            finally:
                handle.remove()
        return tokens


def check_blocks(transformer: nn.Module, blocks: list[int]) -> None:
    """
    Raises:
        ValueError: if tokens cannot be read after these blocks.
    """
    available = getattr(transformer, "transformer_blocks", None)
    if available is None:
        raise ValueError(
            f"A latent reward model reads the image stream of two-stream blocks, and a `{type(transformer).__name__}` has one "
            "stream for text and image. Take a pipeline of Stable Diffusion 3, FLUX, FLUX.2 or Qwen-Image."
        )
    if not blocks or min(blocks) < 1 or max(blocks) > len(available) or len(set(blocks)) < len(blocks):
        raise ValueError(f"`blocks` must be different numbers from 1 to {len(available)}, got {blocks}.")


def check_text_tokens(transformer: nn.Module, blocks: list[int]) -> None:
    """
    Raises:
        ValueError: if there are no text tokens behind one of these blocks.
    """
    if any(getattr(transformer.transformer_blocks[number - 1], "context_pre_only", False) for number in blocks):
        raise ValueError(
            f"`head='query_attention'` reads text tokens, and there are none behind the last block; leave it out of `blocks`, got "
            f"{blocks}."
        )


def default_blocks(transformer: nn.Module) -> list[int]:
    """Three quarters of the depth: block 18 of the 24 of Stable Diffusion 3, as LPO reads it."""
    return [max(1, round(0.75 * len(transformer.transformer_blocks)))]


def without_adapters(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a denoiser under their own names, without those of adapters in it."""
    weights = {name: value for name, value in network.state_dict().items() if "lora_" not in name}
    return {name.replace(".base_layer.", "."): value for name, value in weights.items()}


def pooled_text(text: PromptEmbeds) -> torch.Tensor:
    """Pooled features `(B, dim)` of prompts; where the family has none, means over those of their tokens."""
    if text.pooled_prompt_embeds is not None:
        return text.pooled_prompt_embeds
    tokens = text.prompt_embeds.flatten(2)
    mask = text.prompt_mask
    if mask is None:
        return tokens.mean(1)
    mask = mask.to(tokens)[..., None]
    return (tokens * mask).sum(1) / mask.sum(1).clamp(min=1)
