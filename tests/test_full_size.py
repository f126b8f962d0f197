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
Why this file exists: the plan for a full-size run tells people what to pay. Its samples are held against a rollout that is
counted while it runs, its arithmetic against layers whose cost is known, its hours against the run that was timed.
"""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import full_size
from trl_spo import stepwise_rollout, wrap_pipeline

from .testing_utils import brightness_reward, tiny_sd_pipeline


@pytest.mark.parametrize("num_candidates, num_inner_steps, known", [(4, 1, (65, 64, 16)), (2, 4, None), (3, 5, None)])
def test_samples_of_a_rollout(tmp_path, num_candidates, num_inner_steps, known):
    pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path))
    predicted, decoded = [], []
    pipeline.unet.register_forward_hook(lambda module, args, output: predicted.append(len(args[0])))
    pipeline.vae.decoder.register_forward_hook(lambda module, args, output: decoded.append(len(args[0])))
    pairs = stepwise_rollout(
        pipeline,
        ["a", "b"],
        brightness_reward,
        num_candidates=num_candidates,
        num_inner_steps=num_inner_steps,
        num_inference_steps=full_size.STEPS,
        branch_start_step=full_size.START,
        guidance_scale=2.0,
        preference_threshold=0.0,
        generator=torch.Generator().manual_seed(0),
        return_trajectory=True,
    )
    expected = full_size.rollout_samples(num_candidates, num_inner_steps)
    assert sum(predicted) == 2 * 2 * expected["predictions"]  # two prompts, two passes of guidance
    assert sum(decoded) == 2 * expected["decodes"]
    assert len(pairs.branches) == expected["branches"]
    if known:  # of the paper's SD1.5 run
        assert tuple(expected.values()) == known


def test_arithmetic_of_known_layers():
    linear, convolution = torch.nn.Linear(5, 7, bias=False), torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
    assert full_size.count_tflop(lambda: linear(torch.ones(2, 5))) == pytest.approx(2 * 2 * 5 * 7 / 1e12)
    assert full_size.count_tflop(lambda: convolution(torch.ones(1, 3, 8, 8))) == pytest.approx(2 * 64 * 27 * 4 / 1e12)
    queries = torch.ones(1, 2, 6, 4)
    attention = full_size.count_tflop(
        lambda: torch.nn.functional.scaled_dot_product_attention(queries, queries, queries)
    )
    assert attention == pytest.approx(2 * 2 * 2 * 6 * 6 * 4 / 1e12)


def test_networks_at_small_size():
    """Training is a policy and a reference forward of both sides of guidance, and a backward about as dear as a forward."""
    costs = full_size.network_costs("tiny")
    assert all(value > 0 for value in costs.values())
    assert 2 * 2.5 * costs["unet"] < costs["training"] < 2 * 4.2 * costs["unet"]
    assert 2.5 * costs["reward_image"] < costs["reward_training"] <= 3 * costs["reward_image"]


COSTS = {"unet": 0.8, "decode": 2.5, "encode": 1.1, "reward_image": 0.3, "reward_text": 0.05}
COSTS |= {"training": 5.0, "reward_training": 1.0}


def test_arithmetic_of_the_stages():
    """SD1.5: 130 UNet samples and 64 images per prompt, 16 pairs, of which the released code trains each twice."""
    sd15 = full_size.stages("sd15", COSTS)
    assert sd15["rollout"]["ours"] == pytest.approx(40_000 * (130 * 0.8 + 64 * 2.8 + 0.05) / 1e6)
    assert sd15["rollout"]["public"] == pytest.approx(40_000 * (130 * 0.8 + 64 * 2.85) / 1e6)
    assert sd15["training of all pairs"] == {
        "ours": pytest.approx(40_000 * 16 * 5 / 1e6),
        "public": pytest.approx(40_000 * 32 * 5 / 1e6),
    }
    pair = 2 * (1.1 + 2 * 0.8 + 2.5 + 1.0) + 3 * 0.05
    assert sd15["reward model"]["ours"] == pytest.approx(512_000 * pair / 1e6)


def test_hours_are_those_of_the_measured_loop(monkeypatch):
    """
    All pairs of SD1.5 take what the profiled run of 160 pairs took, 25.5 s, 4,000 times over; and SDXL makes as many pairs a
    second as it did.
    """
    results = json.loads((Path(full_size.__file__).parent / "results" / "full_size.json").read_text())
    monkeypatch.setattr(full_size, "network_costs", lambda name: results[name]["network_tflop"])
    assert full_size.plan("sd15")["spo"][1.0]["hours"] * 3600 == pytest.approx(4000 * 25.5, rel=0.01)
    assert full_size.plan("sdxl")["spo"][1.0]["hours"] * 3600 == pytest.approx(640_000 / 1.16, rel=1e-6)
    one_rate = full_size.plan("sd15", tflops=200.0)
    assert one_rate["reward"]["tflops"] == pytest.approx(200)
    assert one_rate["spo"][0.5]["hours"] == pytest.approx(one_rate["spo"][0.5]["exaflop"] * 1e6 / 200 / 3600)


def test_the_page_has_the_tables_of_the_results():
    root = Path(__file__).parent.parent
    page = (root / "docs" / "reproducing_the_paper.md").read_text()
    results = json.loads((root / "benchmarks" / "results" / "full_size.json").read_text())
    for name, result in results.items():
        table = full_size.describe(name, result).split("\n", 2)[2]
        assert table in page, f"run benchmarks/full_size.py --json ... and put the table of {name} into the page"
