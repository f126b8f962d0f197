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
Why: the study of rivals decides what the documentation recommends. Its rules (equal trials, what is chosen on which captions, paired
differences) are checked by hand, and one small study runs from the pairs to the table.
"""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import latent_rewards, rivals, rivals_report
from benchmarks.compare.methods import decided_pairs
from benchmarks.compare.tasks import execute, read_json, write_json
from examples.shapes import world
from examples.shapes.preferences import preferences_from_images


ROOT = Path(__file__).parents[1]


def test_every_method_has_as_many_trials():
    assert len({len(trials) for trials in rivals.SWEEPS.values()}) == 1
    assert set(rivals.SWEEPS) == set(rivals.METHODS) == {arm.method for arm in rivals.ARMS.values()}


def test_a_quick_study_runs_a_trial_of_each_method_without_a_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "IS_QUICK", True)
    for model, chosen in rivals.CHOSEN.items():
        methods = set(rivals.SWEEPS) - set(rivals.ON_UNET_ONLY if model == "flow" else ())
        assert set(chosen) == methods
        for method, number in chosen.items():
            expected = (method, rivals.SWEEPS[method][number], 0)
            assert rivals.settings_of(tmp_path, model, f"run/{method}/0") == expected


def test_what_a_quick_study_runs_is_what_the_sweeps_chose():
    """By the numbers that are kept in the repository."""
    kept = ROOT / "benchmarks" / "results" / "rivals"
    for model, chosen in rivals.CHOSEN.items():
        for method, number in chosen.items():
            assert rivals.chosen_settings(kept, model, method) == rivals.SWEEPS[method][number], (model, method)


def test_a_quick_study_goes_no_further_than_its_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "IS_QUICK", True)
    assert rivals.stretch_of(tmp_path, "flow", "nft") == 1


def test_captions_that_nobody_has_looked_at():
    """They are a part of the training captions that a study does not train on."""
    study, untouched = (set(world.captions(split)) for split in ("study", "untouched"))
    assert study | untouched == set(world.captions("train")) and not study & untouched
    assert (len(study), len(untouched)) == (310, 94)


def test_faultless_images_lose_a_little_in_the_vae(capsys):
    assert rivals.main(["--model", "unet", "--ceiling"]) == 0
    scores = dict(part.split() for part in capsys.readouterr().out.strip().split(", "))
    assert 0.9 < float(scores["aesthetics"]) < 0.95 < float(scores["alignment"]) <= 1


def test_marks_end_with_the_run(monkeypatch):
    monkeypatch.setattr(rivals, "BUDGET", 18_000)
    monkeypatch.setattr(rivals, "NUM_MARKS", 3)
    assert rivals.marks_to(18_000) == [6_000, 12_000, 18_000]
    assert rivals.marks_to(27_000) == [6_000, 12_000, 18_000, 24_000, 27_000]
    assert rivals.marks_to(25_000) == [6_000, 12_000, 18_000, 25_000]  # not two that are nearly the same


def test_the_best_checkpoint_lies_within_what_may_be_spent():
    points = [{"mark": mark, "utility": utility} for mark, utility in ((1, 0.2), (2, 0.5), (3, 0.4), (4, 0.9))]
    assert [rivals.best_point(points, "mark", most) for most in (1, 3, 4)] == [0, 1, 3]
    assert rivals.best_point(points, "mark", 0.5) == 0  # of a run whose first checkpoint came late


@pytest.mark.parametrize(
    ("reward", "kinds"),
    [(None, []), ("exact", []), ("step+clip", ["step"]), ("clean", ["clean"]), ("ensemble", ["clean", "clean_2"])],
)
def test_what_has_to_be_trained_for_a_reward(reward, kinds):
    assert rivals.trained_kinds(reward) == kinds


def test_decided_pairs_are_encoded_with_the_chosen_image_first():
    """Of three pairs one is a tie; of the others the first image of one is preferred, and the second of the other."""
    pipeline = rivals.load("flow")
    prompts = [f"a small {colour} circle on a black background" for colour in ("red", "green", "blue")]
    images = [world.render(prompts, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    rows = preferences_from_images(prompts, *images)
    labels = ([1.0, 0.5, 0.0], [0.0, 0.5, 1.0])
    for i, column in enumerate(labels):
        rows = rows.remove_columns(f"label_{i}").add_column(f"label_{i}", column)
    found = decided_pairs(pipeline, rows)
    assert found["prompts"] == [prompts[0], prompts[2]]
    pixels = [(image * 255).round() / 255 * 2 - 1 for image in images]  # they were files of 8 bits
    chosen, rejected = (torch.stack([pixels[i][0], pixels[1 - i][2]]) for i in (0, 1))
    for name, expected in (("chosen", chosen), ("rejected", rejected)):
        mean, std = pipeline.image_posterior(expected)
        torch.testing.assert_close(found[f"{name}_mean"], mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(found[f"{name}_std"], std, rtol=0, atol=1e-5)


def test_an_ensemble_counts_what_both_grant():
    class Fixed:
        def __init__(self, *scores):
            self.scores = torch.tensor(scores)

        def score(self, images, prompts, timesteps):
            assert images.min() >= -1 and images.max() == 1  # the networks see [-1, 1]
            return self.scores

    reward = rivals.lower_score([Fixed(1.0, 5.0), Fixed(2.0, 3.0)])
    assert reward(torch.ones(2, 3, 4, 4), ["a", "b"], torch.zeros(2)).tolist() == [1.0, 3.0]


class TestReport:
    """Two captions, two seeds, SPO and two rivals, with scores that are easy to subtract."""

    @pytest.fixture()
    def output(self, tmp_path):
        def scores(utility):
            return {"utility": utility, "aesthetics": utility, "alignment": utility, "diversity": [0.4, 0.6]}

        flow = tmp_path / "flow"
        zero = scores([0.5, 0.7])
        write_json(flow / "base.json", dict.fromkeys(("validation", "heldout", "untouched"), zero))
        changes = {"spo": (0.2, 0.3), "dpo": (0.1, 0.1), "nft": (0.05, 0.17)}
        for arm, (first, second) in changes.items():
            for seed, change in enumerate((first, second)):
                found = scores([0.5 + change, 0.7 + change + 0.1])
                point = {"evaluations": 100, "cpu_seconds": 7.0, "mark": 100, "utility": 0.6 + change}
                point |= {"aesthetics": 0.6 + change, "alignment": 0.6}
                run = {"seed": seed, "points": [point], "best": 0, "best_of_time": 0}
                splits = {split: {"best": found, "best_of_time": found} for split in ("heldout", "untouched")}
                write_json(flow / "run" / arm / f"{seed}.json", run | splits)
        trial = {"points": [{"utility": 0.65, "aesthetics": 0.6, "alignment": 0.7, "evaluations": 90}], "best": 0}
        write_json(flow / "sweep" / "spo" / "0.json", trial)
        return tmp_path

    def test_differences_are_paired(self, output):
        study = rivals_report.Study(output, "flow")
        assert study.change("spo", "heldout", "best", "utility").flatten().tolist() == pytest.approx(
            [0.2, 0.3, 0.3, 0.4]
        )
        found = study.against("spo", "dpo", "untouched", "best", "utility")
        assert found["mean"] == pytest.approx(0.15) and found["seeds"] == 2
        table = rivals_report.against_table(study, "untouched", "best")
        assert (
            "| SPO, less Diffusion-DPO | 2 | +0.150 ± " in table
            and "| SPO, less DiffusionNFT | 2 | +0.140 ± " in table
        )

    def test_seeds_that_only_one_has_are_left_out(self, output):
        (output / "flow" / "run" / "dpo" / "0.json").unlink()
        study = rivals_report.Study(output, "flow")
        assert study.against("spo", "dpo", "untouched", "best", "utility")["mean"] == pytest.approx(0.2)

    def test_what_spo_needs_for_the_best_of_a_rival(self, output):
        """Straight lines: 0.2 and 0.3 more than 0 after 100 evaluations, a mean of 0.25; Diffusion-DPO ends at 0.1, so after 40."""
        table = rivals_report.reach_table(rivals_report.Study(output, "flow"))
        row = next(line for line in table.splitlines() if line.startswith("| Diffusion-DPO"))
        assert row.split(" | ")[1:4] == ["+0.100", "100", "40 (33 to 50)"]
        rising = [([0.0, 10.0], [0.0, 1.0]), ([0.0, 20.0], [0.0, 4.0])]
        assert rivals_report.highest_mean(rising) == pytest.approx((10.0, 1.5))

    def test_the_page_gets_tables_and_figures(self, output, tmp_path):
        page = tmp_path / "docs" / "results.md"
        page.parent.mkdir()
        page.write_text(
            "before\n<!-- table untouched_flow -->\nold\n<!-- end -->\nafter\n<!-- table sweep_flow --><!-- end -->\n".replace(
                "--><!--", "-->\n<!--"
            )
        )
        rivals_report.main(["--output", str(output), "--page", str(page)])
        text = page.read_text()
        assert "| SPO | 2 | +0.300 ± " in text and "old" not in text and text.startswith("before") and "+0.050" in text
        assert sorted(path.name for path in (page.parent / "images" / "rivals").iterdir()) == [
            "curves.png",
            "front.png",
        ]

    def test_numbers_that_are_kept_give_the_same_tables(self, output, tmp_path):
        (output / "flow" / "run" / "spo" / "0").mkdir()
        (output / "flow" / "run" / "spo" / "0" / "adapter.safetensors").write_text("weights")
        rivals_report.main(["--output", str(output), "--keep", str(tmp_path / "kept")])
        first, second = (
            rivals_report.tables_of(rivals_report.Study(folder, "flow")) for folder in (output, tmp_path / "kept")
        )
        assert first == second and len(first) >= 5
        assert not list((tmp_path / "kept").rglob("*.safetensors"))
        assert rivals_report.rounded([0.123456789, {"a": 1}]) == [0.12346, {"a": 1}]

    def test_a_folder_without_results_is_named(self, tmp_path):
        with pytest.raises(SystemExit, match="base.json"):
            rivals_report.main(["--output", str(tmp_path)])


def test_tasks_that_are_done_are_not_done_again_and_failures_are_named(tmp_path, capsys):
    write_json(tmp_path / "done.json", {})
    script = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{}'); sys.exit(sys.argv[2] == 'bad')"

    def command_of(task):
        import sys

        return [sys.executable, "-c", script, str(tmp_path / f"{task}.json"), task]

    assert execute(["done", "good", "bad"], tmp_path, command_of, 2) == ["bad"]
    assert "done   good" in capsys.readouterr().out and not (tmp_path / "logs" / "done.txt").exists()


@pytest.mark.parametrize("method", ["spo", "sft"])
def test_a_small_study_from_the_pairs_to_the_trial(method, tmp_path, monkeypatch):
    for name, value in {"BUDGET": 400, "NUM_MARKS": 1, "NUM_PAIRS": 12}.items():
        monkeypatch.setattr(rivals, name, value)
    monkeypatch.setattr(latent_rewards, "REWARD_STEPS", 1)
    monkeypatch.setattr(
        rivals, "evaluation_set", lambda split, repeats: (["a small red circle on a blue background"] * 2, [1, 2])
    )
    small = {"spo": {"learning_rate": 1e-3, "per_device_rollout_batch_size": 2, "per_device_train_batch_size": 4}}
    small["sft"] = {"learning_rate": 1e-3, "batch_size": 4}
    monkeypatch.setitem(rivals.SWEEPS, method, [small[method]])
    tasks = ["pairs", *(["reward/clean/100"] if method == "spo" else []), f"sweep/{method}/0"]
    for task in tasks:
        rivals.work("flow", tmp_path, task)
    result = read_json(tmp_path / "flow" / "sweep" / method / "0.json")
    (point,) = result["points"]
    assert point["mark"] == 400 <= point["evaluations"] and result["best"] == 0
    if method == "sft":  # a batch of four forward, and backward as two: 34 of them are the first to pass 400
        assert (point["evaluations"], point["updates"]) == (408, 34)
    assert ("reward" in point) == (method == "spo")
    assert json.loads(json.dumps(result["settings"]))["learning_rate"] == 1e-3
