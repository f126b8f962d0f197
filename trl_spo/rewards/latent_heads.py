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
The head of DiNa-LRM (https://huggingface.co/papers/2602.11146, section 4): learned queries read the tokens behind some blocks of
a diffusion transformer, of the image and of the text, and answer with one number.

    tokens   = Linear(concat over blocks of FiLM(tokens behind the block; time embedding, layer embedding))
    queries += attention to image tokens + attention to text tokens, whose values pass a gate of their own
    queries += attention to image tokens
    queries += FFN(queries)
    raw score = mean over queries of Linear(queries)

Names of parameters are those of the published `rm_head.pt`.
"""

import torch
import torch.nn.functional as F
from torch import nn


class FiLMAdapter(nn.Module):
    """Tokens behind one block, scaled and shifted by the time embedding, at a quarter of their width."""

    def __init__(self, width: int):
        super().__init__()
        self.layer_embed = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.cond_mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        self.proj = nn.Linear(width, width // 4)
        nn.init.zeros_(self.cond_mlp[-1].weight)  # starts without modulation
        nn.init.zeros_(self.cond_mlp[-1].bias)

    def forward(self, tokens: torch.Tensor, time_embedding: torch.Tensor) -> torch.Tensor:
        scale, shift = self.cond_mlp(time_embedding)[:, None].chunk(2, dim=-1)
        return self.proj(tokens * (1 + scale) + shift + self.layer_embed)


def gate(width: int) -> nn.Sequential:
    """One number per token, before the sigmoid; it starts at 0."""
    layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
    nn.init.zeros_(layers[-1].weight)
    nn.init.zeros_(layers[-1].bias)
    return layers


class QueryAttention(nn.Module):
    """
    What the queries read: image tokens, and with `reads_text` text tokens as well, whose values are gated then.

    Norms have no epsilon of their own, as in the published code: it is that of the dtype (7.8e-3 in bfloat16), so scores in
    another dtype are not quite the same.
    """

    def __init__(self, width: int, num_heads: int, reads_text: bool):
        super().__init__()
        self.num_heads = num_heads
        self.norm_q = nn.RMSNorm(width)
        self.norm_v = nn.RMSNorm(width)
        self.to_q = nn.Linear(width, width)
        self.to_k_vis = nn.Linear(width, width)
        self.to_v_vis = nn.Linear(width, width)
        self.to_out = nn.Sequential(nn.Linear(width, width))
        self.reads_text = reads_text
        if reads_text:
            self.norm_t = nn.RMSNorm(width)
            self.to_k_text = nn.Linear(width, width)
            self.to_v_text = nn.Linear(width, width)
            self.gate_vis = gate(width)
            self.gate_text = gate(width)

    def _split(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _attend(self, queries, keys, values, mask=None) -> torch.Tensor:
        mask = None if mask is None else mask[:, None, None, :].bool()
        found = F.scaled_dot_product_attention(self._split(queries), self._split(keys), self._split(values), mask)
        return found.transpose(1, 2).flatten(2)

    def forward(
        self,
        queries: torch.Tensor,
        image: torch.Tensor,
        text: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        image = self.norm_v(image)
        asked = self.to_q(self.norm_q(queries))
        values = self.to_v_vis(image)
        if self.reads_text:
            values = values * self.gate_vis(image).sigmoid()
        found = self._attend(asked, self.to_k_vis(image), values)
        if self.reads_text:
            text = self.norm_t(text)
            values = self.to_v_text(text) * self.gate_text(text).sigmoid()
            found = found + self._attend(asked, self.to_k_text(text), values, text_mask)
        return queries + self.to_out(found)


class QueryAttentionHead(nn.Module):
    """
    The whole head: tokens of image and text in, one raw score per sample out. See the formulas of this module.

    Args:
        width (`int`): width of the tokens, a multiple of `num_heads` and of 4.
        num_blocks (`int`): number of blocks behind which tokens are read.
        num_queries (`int`, *optional*, defaults to `4`), num_heads (`int`, *optional*, defaults to `8`)

    Raises:
        ValueError: for a width that cannot be divided so.
    """

    def __init__(self, width: int, num_blocks: int, num_queries: int = 4, num_heads: int = 8):
        super().__init__()
        if width % num_heads or width % 4:
            raise ValueError(
                f"The width of the tokens, {width}, must be a multiple of `num_heads={num_heads}` and of 4. Set another "
                "`num_heads`."
            )
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, num_queries, width))
        self.layer_adapters_visual = nn.ModuleList(FiLMAdapter(width) for _ in range(num_blocks))
        self.layer_adapters_text = nn.ModuleList(FiLMAdapter(width) for _ in range(num_blocks))
        self.agg_visual = nn.Linear(num_blocks * (width // 4), width)
        self.agg_text = nn.Linear(num_blocks * (width // 4), width)
        self.attn1 = QueryAttention(width, num_heads, reads_text=True)
        self.attn2 = QueryAttention(width, num_heads, reads_text=False)
        self.norm_ff = nn.RMSNorm(width)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.query_tokens.dtype

    def forward(
        self,
        image: list[torch.Tensor],
        text: list[torch.Tensor],
        time_embedding: torch.Tensor,
        text_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            image (list of `torch.Tensor` of shape `(B, N, width)`), text (list of `torch.Tensor` of shape `(B, L, width)`):
                tokens behind each block.
            time_embedding (`torch.Tensor` of shape `(B, width)`): of the transformer.
            text_mask (`torch.Tensor` of shape `(B, L)`, *optional*): where text is, of families that pad it.

        Returns:
            `torch.Tensor` of shape `(B,)`: raw scores.
        """
        time_embedding = time_embedding.to(self.dtype)
        image_tokens = self.agg_visual(self._adapted(self.layer_adapters_visual, image, time_embedding))
        text_tokens = self.agg_text(self._adapted(self.layer_adapters_text, text, time_embedding))
        queries = self.query_tokens.expand(len(image_tokens), -1, -1)
        queries = self.attn1(queries, image_tokens, text_tokens, text_mask)
        queries = self.attn2(queries, image_tokens)
        queries = queries + self.ff(self.norm_ff(queries))
        return self.head(queries).mean(1).squeeze(-1)

    def _adapted(self, adapters, layers: list[torch.Tensor], time_embedding: torch.Tensor) -> torch.Tensor:
        adapted = []
        for adapter, tokens in zip(adapters, layers, strict=True):
            adapted.append(adapter(tokens.to(self.dtype), time_embedding))
        return torch.cat(adapted, dim=-1)
