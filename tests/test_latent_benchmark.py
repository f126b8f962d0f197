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
Why this file exists: the study of latent rewards compares at equal UNet evaluations. A half UNet that is not counted, or a
table with a lost sign, decides such a comparison.
"""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import latent_rewards
from trl_spo import LatentRewardModel, SPOStableDiffusionPipeline, wrap_reward


@pytest.fixture(scope="module", params=["unet", "flow"])
def loaded(request):
    pipeline = latent_rewards.load(request.param)
    model = LatentRewardModel.from_pipeline(pipeline, guidance_scale=1.0)
    model.check_pipeline(pipeline)
    return pipeline, model


@torch.no_grad()
def test_the_share_is_that_of_what_runs(loaded):
    """PyTorch's counts of the modules that a reward runs, against those of one whole prediction."""
    pipeline, model = loaded
    embeds = pipeline.encode_prompt([""])
    latents = torch.randn(1, *pipeline.latent_shape())
    with FlopCounterMode(display=False, depth=None) as counter:
        pipeline.predict(latents, torch.tensor([501]), embeds, 1.0)
    counts = {name: sum(entry.values()) for name, entry in counter.get_flop_counts().items()}
    root = type(pipeline.denoiser).__name__

    def of(prefix: str) -> int:
        return counts.get(f"{root}.{prefix}", 0)

    if isinstance(pipeline, SPOStableDiffusionPipeline):
        skipped = sum(of(f"up_blocks.{i}") for i in range(len(pipeline.denoiser.up_blocks))) + of("conv_out")
    else:
        blocks = range(max(model.config.blocks), len(pipeline.denoiser.transformer_blocks))
        skipped = sum(of(f"transformer_blocks.{i}") for i in blocks)
    assert 0 < skipped < counts["Global"]
    share = latent_rewards.arithmetic_share(pipeline, wrap_reward(model))
    heads = 2 * sum(layer.weight.numel() for layer in (model.visual_projection, model.text_projection))
    assert share == pytest.approx((counts["Global"] - skipped + heads) / counts["Global"], rel=1e-3)


@torch.no_grad()
def test_both_networks_are_counted(loaded):
    pipeline, model = loaded
    meter = latent_rewards.EquivalentMeter(pipeline.denoiser, model.backbone, weight=0.25)
    latents = torch.randn(3, *pipeline.latent_shape())
    pipeline.predict(latents, torch.tensor([501] * 3), pipeline.encode_prompt(["a"] * 3), 1.0)
    assert meter.evaluations == 3
    model.score(latents[:2], ["a", "b"], 501)
    assert meter.evaluations == 3 + 0.25 * 2
    with meter.paused():
        model.score(latents[:2], ["a", "b"], 501)
    meter.close()
    model.score(latents[:2], ["a", "b"], 501)
    assert meter.evaluations == 3.5


def test_tables(tmp_path):
    """Two seeds that gain 0.1 and 0.3 over the base on both captions."""
    folder = tmp_path / "unet"
    folder.mkdir()
    names = ("utility", "aesthetics", "alignment")
    (folder / "base.json").write_text(json.dumps({name: [0.5, 0.7] for name in names}))
    arm = next(iter(latent_rewards.ARMS))
    for seed, gain in enumerate((0.1, 0.3)):
        points = [
            {"mark": mark, "evaluations": mark + 1, "utility": 0.5 + gain, "cpu_seconds": mark / 1000}
            for mark in latent_rewards.MARKS
        ]
        heldout = {name: [0.5 + gain, 0.7 + gain] for name in names}
        run = {"points": points, "best": 1, "weight": 0.0, "heldout": heldout}
        (folder / f"run_{latent_rewards.file_name(arm)}_{seed}.json").write_text(json.dumps(run))
    row = latent_rewards.training_table(folder)[2]
    assert row.startswith(f"| {arm} | +0.200 ± 0.100 |")
    assert row.endswith("| 8,001 | 8 | 24 |")
    assert f"| {arm} |" + " 0.700 |" * 6 == latent_rewards.curve_table(folder)[2]
    assert row in latent_rewards.tables(tmp_path).splitlines(), "before the rewards were measured"


def test_a_piece_is_made_once(tmp_path):
    path = tmp_path / "folder" / "piece.json"
    made = []

    def make(value):
        made.append(value)
        return {"value": value}

    assert latent_rewards.piece(path, make, 1) == {"value": 1}
    assert latent_rewards.piece(path, make, 2) == {"value": 1}
    assert made == [1]
