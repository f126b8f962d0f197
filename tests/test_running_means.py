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
Necessity: what both trainers log goes through here, and a wrong mean looks like any other number. On a GPU the metrics of
the rollout are on the CPU and those of the loss are not; adding up both at once ended every run at its first log.
"""

import json
import math

import pytest
import torch

from trl_spo.training.running_means import RunningMeans, positions_by_device, read_scalars


NAN, INF = float("nan"), float("inf")


class TestMeans:
    def test_a_mean_is_of_all_values_and_not_of_means(self):
        means = RunningMeans()
        means.add("loss", torch.tensor([1.0, 2.0, 3.0]))
        means.add("loss", torch.tensor([[10.0]]))
        means.add("loss", 4)
        assert means.pop() == {"loss": 20 / 5}
        assert means.pop() == {}

    def test_the_three_reductions(self):
        """Two processes: 3 pairs and 1, which took 2 and 4 seconds at the same time."""
        processes = []
        for losses, skipped, seconds in (([1.0, 2.0, 3.0], 1, 2.0), ([6.0], 0, 4.0)):
            means = RunningMeans()
            means.add("loss", torch.tensor(losses))
            means.add("skipped", skipped, reduce="sum")
            means.add("skipped", torch.tensor([skipped, skipped]), reduce="sum")
            means.add("seconds", seconds, reduce="per_process")
            processes.append(means)
        parts = [means.state_dict() for means in processes]
        logged = [means.pop(gather=lambda own: parts) for means in processes]
        assert logged[0] == logged[1] == {"loss": 12 / 4, "skipped": 3.0, "seconds": 6 / 2}

    def test_a_metric_that_only_another_process_has(self):
        means = RunningMeans()
        means.add("loss", 1.0)
        logged = means.pop(gather=lambda own: [own, {"loss": [5.0, 1.0, "mean"], "reward": [8.0, 2.0, "mean"]}])
        assert logged == {"loss": 3.0, "reward": 4.0}

    def test_what_is_not_finite_is_left_out(self):
        means = RunningMeans()
        means.add("some", torch.tensor([1.0, NAN, INF, -INF, 3.0]))
        means.add("some", NAN)
        means.add("none", torch.tensor([NAN]))
        means.add("masked", torch.tensor([NAN, 2.0]), torch.tensor([True, False]))
        means.add("count", torch.tensor(NAN), reduce="sum")
        assert means.pop() == {"some": 2.0, "count": 0.0}

    def test_masks_choose_and_weigh(self):
        """(1 * 0.5 + 4 * 1) / 1.5; a column weighs the rows of a matrix; booleans are values, too."""
        means = RunningMeans()
        means.add("weighted", torch.tensor([1.0, 4.0, NAN]), torch.tensor([0.5, 1.0, 1.0]))
        means.add("rows", torch.tensor([[1.0, 2.0], [30.0, 40.0]]), torch.tensor([[True], [False]]))
        means.add("accuracy", torch.tensor([True, False, True]), torch.tensor([True, True, False]))
        assert means.pop() == {"weighted": 3.0, "rows": 1.5, "accuracy": 0.5}

    def test_small_values_do_not_vanish_beside_a_large_sum(self):
        """2^24 + 1 is not a float32; sums are in float64."""
        means = RunningMeans()
        means.add("count", torch.tensor(2.0**24), reduce="sum")
        for _ in range(4):
            means.add("count", torch.tensor(1.0), reduce="sum")
        assert means.pop() == {"count": 2.0**24 + 4}

    def test_no_graph_is_kept(self):
        weight = torch.ones(3, requires_grad=True)
        means = RunningMeans()
        means.add("loss", weight * 2)
        assert not means._sums["loss"].total.requires_grad

    def test_one_metric_has_one_reduction(self):
        means = RunningMeans()
        means.add("loss", 1.0)
        with pytest.raises(ValueError, match="'loss' is reduced by 'mean', and cannot be by 'sum'"):
            means.add("loss", 1.0, reduce="sum")
        with pytest.raises(ValueError, match="must be one of .*got 'max'"):
            means.add("largest", 1.0, reduce="max")


class TestDevices:
    def test_positions_by_device(self):
        """Tensors of the meta device have no values, so nothing can have been read."""
        tensors = [torch.zeros((), device=device) for device in ("cpu", "meta", "cpu", "meta", "meta")]
        assert positions_by_device(tensors) == {torch.device("cpu"): [0, 2], torch.device("meta"): [1, 3, 4]}

    def test_one_copy_per_device(self, monkeypatch):
        """Twenty metrics are read at once, in the order in which they were asked for."""
        reads = []
        tolist = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor.shape) or tolist(tensor))
        assert read_scalars([torch.tensor(float(i)) for i in range(20)]) == [float(i) for i in range(20)]
        assert reads == [(20,)]

    def test_adding_reads_nothing(self):
        """On the meta device a read is an error: only `pop` and `state_dict` may look at values."""
        means = RunningMeans()
        for _ in range(2):
            means.add("loss", torch.ones(3, device="meta"), torch.ones(3, device="meta", dtype=torch.bool))
        assert means._sums["loss"].total.device.type == "meta"
        with pytest.raises((NotImplementedError, RuntimeError)):
            means.pop()


class TestState:
    def test_resuming_continues_bit_for_bit(self):
        """Sums of floats depend on their order, which is the same whether a checkpoint was in between or not."""
        torch.manual_seed(0)
        values = [torch.rand(3) for _ in range(50)]
        whole, first, second = RunningMeans(), RunningMeans(), RunningMeans()
        for value in values:
            whole.add("loss", value)
        for value in values[:20]:
            first.add("loss", value)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        first.add("loss", 1.0)  # a state is a copy
        for value in values[20:]:
            second.add("loss", value)
        assert second.pop() == whole.pop()

    def test_reading_the_state_changes_nothing(self):
        means = RunningMeans()
        means.add("loss", torch.tensor([1.0, 2.0]))
        assert means.state_dict() == means.state_dict() == {"loss": [3.0, 2.0, "mean"]}
        means.add("loss", torch.tensor(6.0))
        assert means.pop() == {"loss": 3.0}

    def test_loading_replaces_and_adds_up(self):
        means = RunningMeans()
        means.add("old", math.pi)
        means.load_state_dict({"loss": [1.0, 1.0, "mean"]}, {"loss": [5.0, 2.0, "mean"], "n": [2, 0, "sum"]})
        assert means.pop() == {"loss": 2.0, "n": 2.0}
        means.load_state_dict()
        assert means.state_dict() == {}
