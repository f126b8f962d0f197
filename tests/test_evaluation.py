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

"""Necessity: a number without the right error bar, or an image that depends on its batch, is how results fail to repeat."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from trl_spo import StepAwareRewardModel, wrap_pipeline
from trl_spo.evaluation.evaluate import PROTOCOLS, EvaluationProtocol, evaluate_pipeline
from trl_spo.evaluation.metrics import PickScore
from trl_spo.evaluation.sheets import before_after_sheet, image_grid
from trl_spo.evaluation.statistics import (
    mean_and_se,
    mean_interval,
    paired_statistics,
    prompt_means,
    statistics_table,
    wilson_interval,
)
from trl_spo.sampling import generate_images, score_images

from .testing_utils import PROMPTS, brightness_reward, tiny_clip, tiny_sd_pipeline, tiny_sdxl_pipeline


@pytest.fixture
def pipeline(tmp_path):
    return wrap_pipeline(tiny_sd_pipeline(tmp_path))


def test_images_depend_on_prompt_and_seed_alone(pipeline):
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0}
    whole = generate_images(pipeline, PROMPTS[:5], batch_size=5, **settings)
    assert whole.min() >= 0 and whole.max() <= 1
    torch.testing.assert_close(
        whole, generate_images(pipeline, PROMPTS[:5], batch_size=2, **settings), atol=1e-5, rtol=0
    )
    order = [3, 0, 4]
    some = generate_images(pipeline, [PROMPTS[i] for i in order], seeds=order, **settings)
    torch.testing.assert_close(whole[order], some, atol=1e-5, rtol=0)
    other = generate_images(pipeline, PROMPTS[:1], seeds=[99], **settings)
    assert (other - whole[:1]).abs().max() > 1e-3


def test_seeds_must_match_prompts(pipeline):
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        generate_images(pipeline, PROMPTS[:2], seeds=[1])
    with pytest.raises(ValueError, match="`negative_prompt` is not valid Unicode"):
        generate_images(pipeline, PROMPTS[:1], negative_prompt="\udcff")  # a byte of a command line that is no UTF-8


def test_models_and_callables_are_scored_alike(tmp_path):
    folder = tiny_clip(tmp_path)
    model = StepAwareRewardModel.from_clip(folder, processor=folder)
    images = torch.rand(5, 3, 16, 16)
    expected = model.score(images * 2 - 1, PROMPTS[:5], torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(score_images(images, PROMPTS[:5], model, batch_size=2), expected, atol=1e-5, rtol=1e-5)
    as_callable = score_images(images, PROMPTS[:5], brightness_reward, batch_size=2)
    torch.testing.assert_close(as_callable, brightness_reward(images, PROMPTS[:5], torch.zeros(5)))


def test_mean_and_standard_error_by_hand():
    """1, 2, 3, 4: mean 2.5, sample deviation sqrt(5 / 3), standard error half of it."""
    result = mean_and_se(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert result["mean"] == 2.5
    assert result["se"] == pytest.approx(math.sqrt(5 / 3) / 2)
    assert math.isnan(mean_and_se(torch.tensor([1.0]))["se"])


# --- statistics ------------------------------------------------------------------------------------------------------


def test_images_of_one_prompt_are_one_observation():
    """a: (1 + 3) / 2, b: 5, in order of appearance. Three copies of every image leave the standard error as it is."""
    values, prompts = torch.tensor([1.0, 5.0, 3.0]), ["a", "b", "a"]
    assert prompt_means(values, prompts).tolist() == [2.0, 5.0]
    once = paired_statistics(torch.tensor([1.0, 2.0, 6.0]), ["a", "b", "c"], torch.tensor([0.0, 2.0, 3.0]))
    thrice = paired_statistics(
        torch.tensor([1.0, 2.0, 6.0]).repeat(3), ["a", "b", "c"] * 3, torch.tensor([0.0, 2.0, 3.0]).repeat(3)
    )
    assert thrice.pop("num_images") == 9 and once.pop("num_images") == 3
    assert thrice == pytest.approx(once)
    with pytest.raises(ValueError, match="3 values for 2 prompts"):
        prompt_means(values, ["a", "b"])


@pytest.mark.parametrize(
    "confidence, degrees, expected",  # two in closed form, the rest from printed tables
    [
        (0.95, 1, math.tan(math.pi * 0.475)),
        (0.95, 2, 0.95 * math.sqrt(2 / (1 - 0.95**2))),
        (0.95, 3, 3.182446),
        (0.9, 5, 2.015048),
        (0.99, 10, 3.169273),
        (0.95, 499, 1.964729),
    ],
)
def test_mean_interval_has_students_quantiles(confidence, degrees, expected):
    values = torch.linspace(-1, 3, degrees + 1, dtype=torch.float64)
    low, high = mean_interval(values, confidence)
    assert ((high + low) / 2, (high - low) / 2 / mean_and_se(values)["se"]) == pytest.approx((1, expected), abs=1e-6)
    for impossible in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            mean_interval(values, impossible)


def test_mean_interval_by_hand_and_by_counting():
    """1, 2, 3, 4: 2.5 ± 3.182446 sqrt(5 / 3) / 2. And of 2,000 samples of five, 95% cover the true mean."""
    low, high = mean_interval(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (low, high) == pytest.approx((2.5 - 2.054260, 2.5 + 2.054260), abs=1e-5)
    assert all(math.isnan(bound) for bound in mean_interval(torch.tensor([1.0])))
    samples = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 7
    intervals = [mean_interval(sample) for sample in samples]
    covered = sum(low < 7 < high for low, high in intervals) / len(intervals)
    assert covered == pytest.approx(0.95, abs=0.015)  # 3 standard errors of a share of 2,000


def test_wilson_interval_by_hand():
    """
    Its ends are the p with (share - p)^2 = z^2 p (1 - p) / n. All of n won: from n / (n + z^2) to 1.
    """
    z = 1.959964
    for share, count in ((0.5, 10), (0.8, 25), (0.875, 4)):
        for bound in wilson_interval(share, count):
            assert (share - bound) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / count, rel=1e-5)
    assert wilson_interval(1.0, 10) == pytest.approx((10 / (10 + z**2), 1.0))
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, z**2 / (10 + z**2)))
    assert wilson_interval(0.5, 100, confidence=0.5)[0] > wilson_interval(0.5, 100)[0]
    for wins, count in ((0, 3), (5, 7), (40, 41)):
        scipys = binomtest(wins, count).proportion_ci(0.9, method="wilson")
        assert wilson_interval(wins / count, count, 0.9) == pytest.approx((scipys.low, scipys.high))
    with pytest.raises(ValueError, match="at least one prompt"):
        wilson_interval(0.5, 0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson_interval(0.5, 3, 0.0)


def test_paired_statistics_by_hand():
    """
    Prompt a has two images, differences 1 and 3 (mean 2, two wins), b 0 (a draw), c -1 (a loss): mean 1 / 3 with
    deviation sqrt(7 / 3), win rate (1 + 1/2 + 0) / 3.
    """
    base = torch.tensor([10.0, 20.0, 30.0, 40.0])
    scores, prompts = base + torch.tensor([1.0, 3.0, 0.0, -1.0]), ["a", "a", "b", "c"]
    result = paired_statistics(scores, prompts, base)
    assert (result["num_images"], result["num_prompts"]) == (4, 3)
    assert result["base_mean"] == pytest.approx((15 + 30 + 40) / 3)
    assert result["mean"] == pytest.approx((17 + 30 + 39) / 3)
    assert result["difference"] == pytest.approx(1 / 3)
    assert result["difference_se"] == pytest.approx(math.sqrt(7 / 9))
    reach = 0.95 * math.sqrt(2 / (1 - 0.95**2)) * math.sqrt(7 / 9)  # t with two degrees of freedom
    assert result["difference_high"] - result["difference_low"] == pytest.approx(2 * reach)
    assert result["win_rate"] == 0.5
    assert (result["win_rate_low"], result["win_rate_high"]) == pytest.approx(wilson_interval(0.5, 3))
    assert set(paired_statistics(scores, prompts)) == {"num_images", "num_prompts", "mean", "se"}


def test_the_table_of_statistics():
    """Differences 1, 1, 0, 1: mean 0.75, error 0.25; t with 3 degrees is 3.1824; three wins and a tie are 3.5 of 4."""
    base, scores = torch.tensor([0.0, 5.0, 2.0, 9.0]), torch.tensor([1.0, 6.0, 2.0, 10.0])
    prompts = list("abcd")
    low, high = wilson_interval(3.5 / 4, 4)
    row = "| score | 4.7500 ± 2.0565 | 4.0000 ± 1.9579 | +0.7500 (-0.0456 to +1.5456) |"
    table = statistics_table({"score": paired_statistics(scores, prompts, base)}).splitlines()
    assert table[0].count("|") == table[1].count("|") == table[2].count("|") == 6
    assert table[2] == f"{row} 87.5% ({low:.1%} to {high:.1%}) |"
    assert statistics_table({"score": paired_statistics(scores, prompts)}).splitlines()[2] == row[:27].rstrip()


# --- the whole evaluation --------------------------------------------------------------------------------------------


SHORT = EvaluationProtocol("short", num_inference_steps=3, guidance_scale=2.0, seed=5)


def redness(images, prompts):
    return 100 * (images[:, 0] - images[:, 1]).mean(dim=(1, 2))


def test_the_papers_protocol():
    protocol = PROTOCOLS["spo-paper"]
    assert (protocol.scheduler, protocol.num_inference_steps, protocol.guidance_scale) == ("DDIM", 20, 5.0)
    assert protocol.eta == 0 and PROTOCOLS["spo-rollout"].eta == 1
    assert all(name == protocol.name for name, protocol in PROTOCOLS.items())
    words = EvaluationProtocol("mine", eta=0.5, negative_prompt="blurry", height=512, seed=3).in_words()
    for part in ("`mine`", "DDIM", "20 steps", "scale 5", "eta 0.5", "'blurry'", "512 x default", "seed 3 + i"):
        assert part in words


@pytest.mark.parametrize("setting", [{"num_inference_steps": 0}, {"eta": -0.5}, {"seed": -1}])
def test_protocol_refuses_nonsense(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        EvaluationProtocol("bad", **setting)


def test_scores_are_those_of_the_images_under_the_protocol(pipeline, tmp_path):
    images = generate_images(pipeline, PROMPTS, seeds=range(5, 11), num_inference_steps=3, guidance_scale=2.0, eta=0.0)
    clip = PickScore.from_pretrained(tiny_clip(tmp_path), None, device="cpu")
    result = evaluate_pipeline(pipeline, PROMPTS, {"redness": redness, "pick": clip}, SHORT, batch_size=4)
    assert result.seeds == [5, 6, 7, 8, 9, 10]
    torch.testing.assert_close(result.scores["redness"], redness(images, PROMPTS), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(result.scores["pick"], clip(images, PROMPTS), atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(result.images, images, atol=0.5 / 255 + 1e-4, rtol=0)
    assert result.statistics["redness"]["mean"] == pytest.approx(result.scores["redness"].mean().item(), rel=1e-5)
    again = evaluate_pipeline(pipeline, PROMPTS, {"redness": redness}, SHORT, batch_size=1)
    torch.testing.assert_close(again.scores["redness"], result.scores["redness"], atol=1e-3, rtol=1e-4)
    assert result.base_scores is None and result.base_images is None


def test_base_as_pipeline_and_as_images(tmp_path):
    tuned, base = tiny_sd_pipeline(tmp_path, seed=0), tiny_sd_pipeline(tmp_path, seed=1)  # plain diffusers pipelines
    by_pipeline = evaluate_pipeline(tuned, PROMPTS, {"redness": redness}, SHORT, base=base)
    sampler = {"num_inference_steps": 3, "guidance_scale": 2.0, "eta": 0.0}
    images = generate_images(wrap_pipeline(base), PROMPTS, seeds=range(5, 11), **sampler)
    by_images = evaluate_pipeline(tuned, PROMPTS, {"redness": redness}, SHORT, base=images)
    torch.testing.assert_close(
        by_images.base_scores["redness"], by_pipeline.base_scores["redness"], atol=1e-3, rtol=1e-4
    )
    torch.testing.assert_close(by_images.base_scores["redness"], redness(images, PROMPTS), atol=1e-4, rtol=1e-4)
    difference = by_images.scores["redness"] - by_images.base_scores["redness"]
    assert by_images.statistics["redness"]["difference"] == pytest.approx(difference.mean().item(), rel=1e-4)
    same = evaluate_pipeline(tuned, PROMPTS, {"redness": redness}, SHORT, base=tuned).statistics["redness"]
    assert same["difference"] == same["difference_se"] == 0 and same["win_rate"] == 0.5


def test_reward_models_are_metrics_at_timestep_zero(pipeline, tmp_path):
    folder = tiny_clip(tmp_path)
    model = StepAwareRewardModel.from_clip(folder, processor=folder)
    result = evaluate_pipeline(pipeline, PROMPTS[:3], {"reward": model}, SHORT)
    images = generate_images(pipeline, PROMPTS[:3], seeds=range(5, 8), **SHORT.sampler())
    expected = score_images(images, PROMPTS[:3], model)
    torch.testing.assert_close(result.scores["reward"], expected, atol=1e-3, rtol=1e-4)


def test_sdxl(tmp_path):
    result = evaluate_pipeline(tiny_sdxl_pipeline(tmp_path), PROMPTS[:2], {"redness": redness}, SHORT)
    assert result.scores["redness"].isfinite().all() and result.images.shape[0] == 2


def test_what_is_written(tmp_path):
    tuned, base = tiny_sd_pipeline(tmp_path, seed=0), tiny_sd_pipeline(tmp_path, seed=1)
    prompts, folder = PROMPTS[:3] + PROMPTS[:1], tmp_path / "new" / "evaluation"
    result = evaluate_pipeline(
        tuned,
        prompts,
        {"redness": redness},
        SHORT,
        base=base,
        output_dir=folder,
        num_sheet_images=3,
    )
    written = json.loads((folder / "metrics.json").read_text())
    assert EvaluationProtocol(**written["protocol"]) == SHORT
    assert torch.__version__.startswith(written["versions"]["torch"])
    assert written["metrics"] == {"redness": "redness"}
    assert [row["prompt"] for row in written["images"]] == prompts
    assert [row["seed"] for row in written["images"]] == [5, 6, 7, 8]
    base_scores = torch.tensor([row["base_scores"]["redness"] for row in written["images"]])
    torch.testing.assert_close(base_scores, result.base_scores["redness"])
    assert written["statistics"]["redness"] == pytest.approx(result.statistics["redness"])
    assert written["statistics"]["redness"]["num_prompts"] == 3
    report = (folder / "metrics.md").read_text()
    assert SHORT.in_words() in report and result.table() in report and "4 images of 3 prompts" in report
    s = result.statistics["redness"]
    assert f"| {s['difference']:+.4f} ({s['difference_low']:+.4f} to {s['difference_high']:+.4f}) |" in report
    rows = [0, 1, 2]  # three of four, spread evenly
    assert result.sheet_rows == rows
    expected = before_after_sheet(
        result.base_images,
        result.images,
        [prompts[row] for row in rows],
        {"redness": result.base_scores["redness"][rows]},
        {"redness": result.scores["redness"][rows]},
        title="short: DDIM, 3 steps, guidance 2, eta 0",
        sides=("base model", "model"),
    )
    assert np.array_equal(np.asarray(Image.open(folder / "contact_sheet.png")), np.asarray(expected))


def test_without_a_base_the_sheet_has_captions_and_large_cells(tmp_path, pipeline):
    """Regression: a bare grid in native size, 40 pixels wide for one image of 32."""
    result = evaluate_pipeline(pipeline, PROMPTS[:2], {"redness": redness}, SHORT, output_dir=tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "contact_sheet.png"))
    side = 16 * 12  # pixels become squares of 12
    for i, left in enumerate((12, 12 + side + 12)):
        cell = torch.from_numpy(sheet[40 : 40 + side, left : left + side].copy()).permute(2, 0, 1) / 255
        torch.testing.assert_close(cell[:, ::12, ::12], result.images[i])
        below = sheet[40 + side + 4 :, left : left + side]
        assert (below != 255).any(), "no caption"
    nine = image_grid(torch.zeros(9, 3, 16, 16))  # eight in a row, the ninth below
    assert nine.size == (8 * 20 + 4, 2 * 20 + 4) and np.asarray(nine)[24:40, 4:20].max() == 0


def test_one_prompt_has_no_standard_error_and_valid_json(tmp_path, pipeline):
    result = evaluate_pipeline(
        pipeline, PROMPTS[:1], {"redness": redness}, SHORT, base=torch.rand(1, 3, 16, 16), output_dir=tmp_path
    )
    assert math.isnan(result.statistics["redness"]["se"])
    statistics = json.loads((tmp_path / "metrics.json").read_text())["statistics"]["redness"]
    assert statistics["se"] is None and statistics["difference_low"] is None
    assert 0 <= statistics["win_rate_low"] < statistics["win_rate_high"] <= 1


def test_a_score_that_is_no_number_is_an_error_with_names(pipeline):
    def breaks_on_dogs(images, prompts):
        return torch.tensor([float("nan") if "dog" in prompt else 1.0 for prompt in prompts])

    with pytest.raises(ValueError, match="Metric 'sharpness' is nan on the model's image of the prompt 'a blue dog'"):
        evaluate_pipeline(pipeline, PROMPTS[:3], {"redness": redness, "sharpness": breaks_on_dogs}, SHORT)
    with pytest.raises(ValueError, match=r"one score per image, shape \(3,\), got \(3, 1\)"):
        evaluate_pipeline(pipeline, PROMPTS[:3], {"column": lambda images, prompts: torch.zeros(3, 1)}, SHORT)


def test_arguments_are_checked_before_sampling(pipeline, tmp_path):
    def run(prompts=PROMPTS[:2], metrics=None, protocol=SHORT, **kwargs):
        evaluate_pipeline(pipeline, prompts, metrics or {"redness": redness}, protocol, **kwargs)

    def no_sampling(*args, **kwargs):
        raise AssertionError("sampled before the arguments were checked")

    pipeline.sample = no_sampling
    with pytest.raises(ValueError, match="no protocol 'spo'; there are spo-paper"):
        run(protocol="spo")
    with pytest.raises(ValueError, match="list of at least one string"):
        run(prompts=[])
    with pytest.raises(ValueError, match="list of at least one string"):
        run(prompts="a red cat")
    with pytest.raises(ValueError, match="may not be empty"):
        evaluate_pipeline(pipeline, PROMPTS, {}, SHORT)
    with pytest.raises(ValueError, match="no metric 'fid'"):
        run(metrics=["fid"])
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        run(seeds=[1])
    with pytest.raises(ValueError, match=r"shape \(2, 3, height, width\), one per prompt, got \(3, 3, 8, 8\)"):
        run(base=torch.rand(3, 3, 8, 8))
    with pytest.raises(ValueError, match="asks for PNDM, but this pipeline samples with DDIM"):
        run(protocol=EvaluationProtocol("other", scheduler="PNDM"))
    with pytest.raises(ValueError, match=r"`eta` of DDIM must lie in \[0, 1\], got 1.5"):
        run(protocol=EvaluationProtocol("noisy", eta=1.5))
    with pytest.raises(ValueError, match="batch_size"):
        run(batch_size=0)
    with pytest.raises(ValueError, match="`clip_skip` must be below 2"):
        run(protocol=EvaluationProtocol("skips", clip_skip=2))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Nothing can be written to `output_dir`"):
        run(output_dir=tmp_path / "file" / "evaluation")


def test_two_processes_share_the_prompts(tmp_path):
    """Same scores as one process, every rank has them all, one rank writes; an error on one rank ends both."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command += [str(Path(__file__).with_name("run_evaluation_in_two_processes.py")), str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    alone = evaluate_pipeline(
        tiny_sd_pipeline(tmp_path, seed=0),
        PROMPTS[:5],
        {"redness": redness},
        SHORT,
        base=tiny_sd_pipeline(tmp_path, seed=1),
    )
    ranks = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["sampled"] for rank in ranks] == [
        ["a red cat", "a green bird", "a painting"],
        ["a blue dog", PROMPTS[3]],
    ]
    for rank in ranks:
        assert rank["world_size"] == 2
        for side, expected in (("scores", alone.scores), ("base_scores", alone.base_scores)):
            torch.testing.assert_close(torch.tensor(rank[side]), expected["redness"], atol=1e-3, rtol=1e-4)
        assert rank["sheet"] == pytest.approx(alone.images.mean().item(), abs=1e-3)
        assert rank["one_prompt"] == pytest.approx(rank["scores"][0], abs=1e-3)
    assert "Metric 'no cats' is nan" in ranks[0]["error"] and "a red cat" in ranks[0]["error"]
    assert "failed elsewhere: rank 0: Metric 'no cats' is nan" in ranks[1]["error"]
    assert {path.name for path in (tmp_path / "written_0").iterdir()} == {
        "metrics.json",
        "metrics.md",
        "contact_sheet.png",
    }
    assert not (tmp_path / "written_1").exists()
