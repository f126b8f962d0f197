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
Necessity: a filter that reads a gap the wrong way round keeps the pairs that it should drop, and training goes on without
a word.
"""

import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from PIL import Image

from trl_spo.preference_filters import CONSISTENCY_STRATEGIES, GapRule, filter_consistent_pairs


def rows() -> list[dict]:
    """
    Seven pairs in Pick-a-Pic's format. Columns: the published gaps (chosen minus rejected) and the scores they come from
    (0.5 lies in front, so that nothing but the difference counts).
    """
    # label_0, aesthetic gap, clip gap
    table = [
        (1.0, 0.3, 0.02),  # both agree
        (0.0, 0.3, 0.02),  # the same with the second image chosen
        (1.0, -0.3, 0.02),  # a little less aesthetic: strategies 2 and 3
        (1.0, -0.7, 0.02),  # much less: strategy 3 alone
        (0.0, 0.3, -0.01),  # CLIP disagrees
        (0.5, -0.1, 0.01),  # a tie in which nothing differs
        (0.5, -0.9, 0.01),  # a tie with a large negative gap
    ]
    result = []
    for number, (label_0, aesthetic, clip) in enumerate(table):
        sign = -1 if label_0 == 0 else 1
        row = {
            "caption": f"pair {number}",
            "jpg_0": Image.new("RGB", (8, 8), (100, 0, 0)),
            "jpg_1": Image.new("RGB", (8, 8), (0, 0, 100)),
            "label_0": label_0,
            "label_1": 1 - label_0,
            "gap_aesthetic": aesthetic,
            "gap_clip": clip,
            "clip_0": 0.5 + sign * clip,
            "clip_1": 0.5,
        }
        result.append(row)
    return result


def kept(filtered) -> list[int]:
    return [int(row["caption"].split()[1]) for row in filtered.dataset]


COLUMNS = {"aesthetic": "gap_aesthetic", "clip": ("clip_0", "clip_1")}


class TestStrategies:
    @pytest.mark.parametrize(("strategy", "expected"), [(1, [0, 1, 5]), (2, [0, 1, 2, 5]), (3, [0, 1, 2, 3, 5])])
    def test_published(self, strategy, expected):
        filtered = filter_consistent_pairs(rows(), COLUMNS, strategy)
        assert kept(filtered) == expected

    def test_thresholds_are_the_published_ones(self):
        """https://huggingface.co/papers/2502.01051: strategy 2 is the one that was used."""
        assert {number: rules["aesthetic"].min_gap for number, rules in CONSISTENCY_STRATEGIES.items()} == {
            1: 0.0,
            2: -0.5,
            3: -1.0,
        }
        for rules in CONSISTENCY_STRATEGIES.values():
            assert rules["clip"] == GapRule(0.0, 0.03) and rules["vqa"] == GapRule(0.0, 0.07)
            assert rules["aesthetic"].max_tie_gap == 0.2

    def test_all_three_metrics_of_the_paper(self):
        """A pair that the VQA score contradicts goes, whatever the others say; and a tie in which it sees a difference."""
        data = rows()
        for row, gap in zip(data, (0.1, -0.1, 0.1, 0.1, 0.1, 0.06, 0.06), strict=True):
            row["gap_vqa"] = gap
        filtered = filter_consistent_pairs(data, {**COLUMNS, "vqa": "gap_vqa"}, 2)
        assert kept(filtered) == [0, 2, 5] and filtered.counts["dropped/vqa"] == 1
        data[5]["gap_vqa"] = 0.08
        filtered = filter_consistent_pairs(data, {**COLUMNS, "vqa": "gap_vqa"}, 2)
        assert kept(filtered) == [0, 2] and filtered.counts["dropped/vqa"] == 2

    def test_counts(self):
        counts = filter_consistent_pairs(rows(), COLUMNS, 2).counts
        assert counts == {
            "pairs": 5,
            "ties": 2,
            "kept_pairs": 3,
            "kept_ties": 1,
            "dropped/aesthetic": 2,  # row 3 and the tie with the large negative gap
            "dropped/clip": 1,
            "dropped/unlabelled": 0,
            "dropped/no_score": 0,
        }

    def test_rules_of_ones_own(self):
        filtered = filter_consistent_pairs(rows(), {"aesthetic": "gap_aesthetic"}, {"aesthetic": (-10.0, 0.0)})
        assert kept(filtered) == [0, 1, 2, 3, 4]  # no tie is below a gap of 0


class TestSources:
    def test_a_function_is_shown_both_images(self):
        """Redness prefers the first image everywhere: pairs in which the second was chosen go, and ties."""
        shown = []

        def redness(images, prompts):
            shown.append((tuple(images.shape), list(prompts), images.min().item(), images.max().item()))
            return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))

        filtered = filter_consistent_pairs(
            rows(), {"redness": redness}, {"redness": GapRule(0.0, 0.1)}, batch_size=3, resolution=8
        )
        assert kept(filtered) == [0, 2, 3]
        assert [shape for shape, *_ in shown] == [(6, 3, 8, 8), (6, 3, 8, 8), (2, 3, 8, 8)]
        assert shown[0][1] == ["pair 0", "pair 1", "pair 2"] * 2
        assert shown[0][2] == 0.0 and shown[0][3] == pytest.approx(100 / 255)

    def test_a_dataset_stays_one_and_images_stay_undecoded(self):
        dataset = Dataset.from_list(rows())
        filtered = filter_consistent_pairs(dataset, COLUMNS, 2)
        assert isinstance(filtered.dataset, Dataset) and kept(filtered) == [0, 1, 2, 5]
        assert "bytes" in filtered.dataset[0]["jpg_0"]

    def test_rows_without_label_or_score(self):
        data = rows()
        data[0].update(label_0=0.0, label_1=0.0)  # no label
        data[1]["gap_aesthetic"] = None
        data[2]["clip_0"] = math.nan
        filtered = filter_consistent_pairs(data, COLUMNS, 2)
        assert kept(filtered) == [5]
        assert filtered.counts["dropped/unlabelled"] == 1 and filtered.counts["dropped/no_score"] == 2

    def test_an_unreadable_image_has_no_score(self):
        data = rows()
        data[6]["jpg_0"] = b"broken"
        rule = {"any": GapRule(-math.inf, math.inf)}
        filtered = filter_consistent_pairs(data, {"any": lambda images, prompts: torch.zeros(len(images))}, rule)
        assert kept(filtered) == [0, 1, 2, 3, 4, 5] and filtered.counts["dropped/no_score"] == 1

    def test_trl_format_is_always_decided(self):
        data = [
            {"prompt": r["caption"], "chosen": r["jpg_0"], "rejected": r["jpg_1"], "a": r["clip_0"], "b": 0.5}
            for r in rows()
        ]
        filtered = filter_consistent_pairs(data, {"clip": ("a", "b")}, 2)
        assert [row["prompt"] for row in filtered.dataset] == [f"pair {i}" for i in (0, 2, 3, 4, 5, 6)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gaps": {}}, "names no metric; there are rules for"),
        ({"gaps": {"beauty": "gap_aesthetic"}}, r"no rule for \['beauty'\], only for"),
        ({"gaps": {"clip": "gap_vqa"}}, r"no column \['gap_vqa'\] for the metric 'clip'"),
        ({"gaps": {"clip": ("a", "b", "c")}}, "must be a column, two columns or a function"),
        ({"gaps": {"clip": "gap_clip"}, "rules": 4}, r"one of the strategies \[1, 2, 3\]"),
        ({"gaps": {"clip": lambda images, prompts: [0.0]}}, r"one score per image, shape \(14,\), got \(1,\)"),
        ({"gaps": {"clip": "gap_clip"}, "rules": {"clip": (9.0, 0.0)}}, "No pair is consistent with all metrics"),
        ({"gaps": {"clip": "gap_clip"}, "dataset": []}, "is empty"),
        ({"gaps": {"clip": "gap_clip"}, "dataset": IterableDataset.from_generator(lambda: iter(rows()))}, "A stream"),
    ],
)  # fmt: skip
def test_bad_input(arguments, message):
    arguments = {"dataset": rows(), **arguments}
    with pytest.raises(ValueError, match=message):
        filter_consistent_pairs(**arguments)
