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
How fast networks ran on a GPU: the rates that predictions of hours rest on. They were measured once, on one card; another card
gets them times the ratio of the speeds of a large matrix product, which is an assumption.
"""

import time

import torch


MEASURED = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "date": "2026-11-28",
    "matrix_tflops": 790.0,  # of a large product in bfloat16
    "tflops": {"unet": 171.0, "decode": 146.0, "reward_image": 268.0, "reward_text": 47.0, "training": 144.0},
    "other_seconds_per_prompt": 0.2,
    "sdxl_pairs_per_second": 1.16,
}
"""
SD1.5, bfloat16, exact loop, 160 pairs of 10 prompts in 25.5 s, before blocks were compiled: TFLOP as counted here over
seconds by phase (rollout UNet 6.1, decode 11.0, reward images 0.8 and text 0.01, policy forward and backward and reference
5.6, the rest 2.0). The SDXL preset made 1.16 pairs per second.
"""
SAME_RATE = {"encode": "decode", "reward_training": "training"}  # not measured: the nearest that was
MATRIX_SIZE = 8192


def rate_of(network: str) -> float:
    """TFLOP/s of a network on the card that was measured; of one that was not, that of the nearest."""
    return MEASURED["tflops"][SAME_RATE.get(network, network)]


def matrix_tflops(device: torch.device, size: int = MATRIX_SIZE, seconds: float = 0.3) -> float:
    """TFLOP/s of a large matrix product in bfloat16 on a CUDA device, measured for a moment."""
    left = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    for _ in range(3):
        left @ left
    torch.cuda.synchronize(device)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(5):
            left @ left
        torch.cuda.synchronize(device)
        count += 5
    return 2 * size**3 * count / (time.perf_counter() - start) / 1e12
