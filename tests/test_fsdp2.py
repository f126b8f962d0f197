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
Why this file exists: a denoiser that is spread over processes hangs as soon as one of them calls it once less often, and a
process that trains on its part of the wrong thing looks well. Two processes with half of the denoiser each are compared with
one that has all of it, on what the two found together.

`run_fsdp2.py` is the program.
"""

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file

from . import run_fsdp2
from .test_distributed import (
    ROUNDING,
    adjusted,
    assert_close,
    assert_logs_close,
    assert_same_bits,
    launch,
    results,
)


LORA = "pytorch_lora_weights.safetensors"
WHOLE = "unet/diffusion_pytorch_model.safetensors"


def launch_sharded(folder: Path, *scenarios: str) -> Path:
    """The scenarios in two processes with `fsdp2.yaml`, on the CPU."""
    run = launch(folder, *scenarios, config=adjusted("fsdp2.yaml", folder, use_cpu=True), program=("run_fsdp2.py",))
    assert run.status == 0, run.output[-5000:]
    return folder


def assert_tensors_close(ours: dict, theirs: dict):
    assert ours.keys() == theirs.keys() != set()
    for name, value in theirs.items():
        tolerance = ROUNDING["rtol"] * max(value.abs().max().item(), 1e-6)
        torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    scenarios = ("compared_unet", "compared_whole_unet", "compared_transformer")
    return launch_sharded(tmp_path_factory.mktemp("compared"), *scenarios)


UNITS = {
    "unet": {"BasicTransformerBlock", "ResnetBlock2D", "UNet2DConditionModel"},
    "whole_unet": {"BasicTransformerBlock", "ResnetBlock2D", "UNet2DConditionModel"},
    "transformer": {"JointTransformerBlock", "SD3Transformer2DModel"},
}


@pytest.mark.parametrize("recipe", UNITS)
class TestOneProcessOnThePooledPairs:
    """
    Accumulation, clipping, a last round with a prompt for one rank alone, branches in random places, sample images and uneven
    evaluations: all of it at once, so that everything that could call the denoiser unequally often is there.
    """

    @pytest.fixture
    def both(self, compared, tmp_path, recipe):
        first, second = results(compared, f"compared_{recipe}")
        alone = run_fsdp2.replay(tmp_path, getattr(run_fsdp2, recipe), [first["rollouts"], second["rollouts"]])
        return first, second, alone, tmp_path / "out", compared / f"compared_{recipe}" / "out"

    def test_equals_it(self, both, recipe):
        first, second, alone, own_folder, their_folder = both
        for rank in (first, second):
            assert {name.removeprefix("FSDP") for name in rank["units"]} >= UNITS[recipe]
            assert rank["frozen_is_sharded"] == (recipe == "whole_unet")
        # The last round has a prompt for rank 0 only; the padding of rank 1 is nowhere.
        assert [len(prompts) for prompts, _ in second["rollouts"].values()] == [2, 2, 0]
        found = first["own_pairs"] + second["own_pairs"]
        assert sum(alone["batches"]) == 2 * sum(first["batches"]) == 2 * sum(second["batches"]) == found
        places = [{b.step for b in rank["rollouts"][0][1].branches} for rank in (first, second)]
        assert places[0] == places[1] and len(places[0]) == 2

        # Gradients, after clipping, and weights: those of all processes, and those of one.
        for a, b in zip(first["gradients"], second["gradients"], strict=True):
            assert_same_bits(a, b)
        norms = [torch.nn.utils.get_total_norm(step) for step in alone["gradients"]]
        assert all(norm == pytest.approx(run_fsdp2.COMPARED["max_grad_norm"], rel=1e-3) for norm in norms)
        assert_close(first["gradients"], alone["gradients"])
        assert_close(first["steps"], alone["steps"])

        # Every logged number, and evaluations.
        assert first["logs"] == second["logs"]
        assert_logs_close(first["logs"], alone["logs"])
        for name, value in alone["evaluation"].items():
            if "runtime" not in name:
                assert first["evaluation"][name] == second["evaluation"][name]
                assert first["evaluation"][name] == pytest.approx(value, rel=1e-4, abs=1e-4), name

        # What is published, and the sample images.
        file = WHOLE if recipe == "whole_unet" else LORA
        assert_tensors_close(load_file(their_folder / file), load_file(own_folder / file))
        assert (their_folder / "README.md").read_text() == (own_folder / "README.md").read_text()
        names = sorted(path.name for path in (own_folder / "images").glob("*.png"))
        assert names == sorted(path.name for path in (their_folder / "images").glob("*.png")) != []
        for name in names:
            pair = [Image.open(folder / "images" / name) for folder in (own_folder, their_folder)]
            assert max(high for _, high in ImageChops.difference(*pair).getextrema()) <= 1, name
