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

"""The layers that condition a CLIP on the timestep: an embedding of it, and blocks that it scales and shifts."""

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer


class TimestepEmbedder(nn.Module):
    r"""
    Sinusoidal embedding of the timestep (cosines, then sines) followed by a two-layer MLP.

    Angles are computed in float32 and only then cast: in half precision neighbouring timesteps would coincide.
    """

    def __init__(self, hidden_size: int, frequency_embedding_size: int, max_period: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.frequency_embedding_size = frequency_embedding_size
        self.max_period = max_period

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:  # (B,) -> (B, hidden_size)
        half = self.frequency_embedding_size // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
        angles = timesteps.float()[:, None] * self.max_period**-exponents
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, frequency_embedding_size)
        return self.mlp(embedding.to(self.mlp[0].weight.dtype))


class AdaLNModulation(nn.Sequential):
    r"""
    `Linear(SiLU(c))`, split into `num_parts` parts of the hidden width. Starts as the identity modulation: zero, except
    for the parts listed in `gates`, which start at one.
    """

    def __init__(self, hidden_size: int, num_parts: int, gates: tuple[int, ...] = ()):
        super().__init__(nn.SiLU(), nn.Linear(hidden_size, num_parts * hidden_size))
        self.num_parts = num_parts
        self.gates = gates

    @torch.no_grad()
    def reset_to_identity(self):
        nn.init.zeros_(self[1].weight)
        nn.init.zeros_(self[1].bias)
        for gate in self.gates:
            nn.init.ones_(self[1].bias.view(self.num_parts, -1)[gate])

    def forward(self, step_embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:  # (B, d) -> num_parts times (B, d)
        return super().forward(step_embedding).chunk(self.num_parts, dim=-1)


class StepAwareCLIPEncoderLayer(CLIPEncoderLayer):
    """A CLIP vision block with adaLN modulation. `step_embedding=None` leaves the modulation out."""

    def __init__(self, config):
        super().__init__(config)
        self.adaLN_modulation = AdaLNModulation(config.hidden_size, num_parts=6, gates=(2, 5))

    def forward(self, hidden_states: torch.Tensor, step_embedding: torch.Tensor | None = None) -> torch.Tensor:
        # hidden_states (B, N, d), step_embedding (B, d)
        if step_embedding is None:
            shift_a = scale_a = shift_m = scale_m = 0.0
            gate_a = gate_m = 1.0
        else:
            parts = (part[:, None] for part in self.adaLN_modulation(step_embedding))  # each (B, 1, d)
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        attention_input = self.layer_norm1(hidden_states) * (1 + scale_a) + shift_a
        # Positional arguments after the first differ between transformers 4.57 and 5; `None` is their shared default.
        attention_output = self.self_attn(hidden_states=attention_input, attention_mask=None)[0]
        hidden_states = hidden_states + gate_a * attention_output
        mlp_input = self.layer_norm2(hidden_states) * (1 + scale_m) + shift_m
        return hidden_states + gate_m * self.mlp(mlp_input)
