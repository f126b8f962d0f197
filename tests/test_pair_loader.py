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
Necessity: which prompts a process gets, which pairs a step sees, and what a checkpoint remembers decide whether two
processes train on the same thing and a resumed run is the uninterrupted one. Here without any model: a rollout is a
function of prompts and a number.
"""

import math
import threading

import pytest
import torch

from trl_spo import StepPairs
from trl_spo.pair_loader import LoaderSizes, PairLoader


PROMPTS = ["0 none", "1 fox", "3 cats", "2 dogs", "5 birds", "4 fish"]  # so many pairs each: 15 in all


def rollout(prompts: list[str], seed: int) -> StepPairs:
    """As many pairs as a prompt says, each with latents that nothing else has: prompt, number of the rollout, number."""
    rows = [(int(p[0]), seed, i) for p in prompts for i in range(int(p[0]))]
    latents = torch.tensor(rows, dtype=torch.float32).view(-1, 3)
    names = [p for p in prompts for _ in range(int(p[0]))]
    filled = {name: torch.zeros(len(rows)) for name in StepPairs.tensor_names()}
    return StepPairs(**{**filled, "latents": latents}, prompts=names)


def make_loader(prompts=PROMPTS, rollout=rollout, gather=None, seed=0, why_no_pairs=lambda: "", **sizes) -> PairLoader:
    defaults = {
        "prompts_per_rollout": 2, "pairs_per_micro_batch": 2, "micro_batches_per_step": 2, "max_pairs_per_prompt": 5,
        "num_epochs": 1,
    }  # fmt: skip
    return PairLoader(prompts, rollout, LoaderSizes(**{**defaults, **sizes}), gather, seed, why_no_pairs)


def rows_of(batches: list[dict]) -> list[tuple]:
    return [tuple(row) for batch in batches for row in batch["pairs"].latents.tolist()]


def test_every_pair_is_dealt_out_once():
    """15 pairs: three steps of four, and the last of three, whose micro-batches are not equal."""
    loader = make_loader()
    batches = list(loader)
    assert [len(b["pairs"]) for b in batches] == [2, 2, 2, 2, 2, 2, 2, 1]
    assert [b["num_pairs"] for b in batches] == [4] * 6 + [3] * 2
    assert all(b["num_micro_batches"] == 2 for b in batches)
    rows = rows_of(batches)
    assert len(set(rows)) == len(rows) == 15
    assert {(row[0], row[2]) for row in rows} == {(n, i) for n in range(6) for i in range(n)}
    assert loader.exhausted and loader.num_pairs_seen == 15 and loader.num_prompts_seen == 6 and loader.epoch == 1


def test_several_iterations_deal_every_pair_out_so_often():
    """Of one rollout every pair is seen once before any is seen again, in another order; its first order is that of one."""
    sizes = {"prompts_per_rollout": 6, "pairs_per_micro_batch": 3, "micro_batches_per_step": 1}
    loader = make_loader(**sizes, num_iterations=3)
    batches = list(loader)
    rows = rows_of(batches)
    rounds = [rows[:15], rows[15:30], rows[30:]]
    assert rounds[0] == rows_of(list(make_loader(**sizes)))
    assert [sorted(seen) for seen in rounds] == [sorted(rounds[0])] * 3
    assert rounds[0] != rounds[1] != rounds[2]
    assert (loader.num_pairs_seen, loader.num_prompts_seen) == (45, 6)
    assert sum((batch["is_fresh"] for batch in batches), []) == [True] * 15 + [False] * 30
    assert len(make_loader(**sizes, num_iterations=3)) == 6 * 5 * 3 / 3  # if every branch of every prompt gave a pair


def test_pairs_know_their_prompts():
    for batch in make_loader():
        assert [float(p[0]) for p in batch["pairs"].prompts] == batch["pairs"].latents[:, 0].tolist()


def test_the_seed_fixes_the_order_and_nothing_else():
    first, again, other = (rows_of(list(make_loader(seed=seed))) for seed in (0, 0, 1))
    assert first == again != other
    assert {(row[0], row[2]) for row in first} == {(row[0], row[2]) for row in other}


def test_prompts_are_rolled_out_when_they_are_needed():
    """The number of a rollout is the position in the prompts; the second epoch has another order."""
    asked = []

    def counting(prompts, seed):
        asked.append((seed, prompts))
        return rollout(prompts, seed)

    loader = make_loader(rollout=counting, num_epochs=2)
    steps = iter(loader)
    next(steps)
    assert loader.waiting + loader.num_pairs_seen == sum(int(p[0]) for _, prompts in asked for p in prompts)
    assert loader.num_prompts_seen < 12
    list(steps)
    assert [seed for seed, _ in asked] == [0, 2, 4, 6, 8, 10]
    epochs = [[p for _, prompts in part for p in prompts] for part in (asked[:3], asked[3:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(PROMPTS) and epochs[0] != epochs[1]


def test_what_an_epoch_leaves_carries_over():
    """15 pairs in steps of four leave three, with which the second epoch begins; one and a half epochs are nine prompts."""
    loader = make_loader(num_epochs=2)
    batches = []
    for batch in loader:
        batches.append(batch)
        if loader.epoch_finished:
            break
    assert len(batches) == 6 - 1 and loader.waiting == 3 and loader.epoch == 1 and not loader.exhausted
    assert make_loader(num_epochs=1.5).total_prompts == 9
    assert make_loader(num_epochs=math.inf).total_prompts == math.inf


def test_its_length_is_the_most_it_can_be():
    """Six prompts of five pairs are 30; an epoch after another may begin with three pairs. Steps have four."""
    assert len(make_loader()) == math.ceil(30 / 4) * 2
    assert len(make_loader(num_epochs=2)) == math.ceil(33 / 4) * 2
    most = make_loader(prompts=["5 birds"] * 6)
    assert len(list(most)) == len(most)


def in_processes(world_size: int, job) -> list:
    """Run `job(rank, gather)` for every rank at once, in threads that wait for each other in `gather`."""
    barrier, shared, results = threading.Barrier(world_size, timeout=20), [None] * world_size, [None] * world_size

    def run(rank):
        def gather(parts):
            shared[rank] = parts
            barrier.wait()
            joined = [part for parts in shared for part in parts]
            barrier.wait()
            return joined

        results[rank] = job(rank, gather)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_processes_share_prompts_and_pairs_evenly():
    """Each rolls out prompts of its own and trains on as many pairs as the other, wherever they came from."""
    asked = [[], []]

    def job(rank, gather):
        def counting(prompts, seed):
            asked[rank].extend(prompts)
            return rollout(prompts, seed)

        sizes = {"rank": rank, "world_size": 2, "prompts_per_rollout": 1, "pairs_per_micro_batch": 1}
        return list(make_loader(rollout=counting, gather=gather, **sizes))

    batches = in_processes(2, job)
    assert sorted(asked[0] + asked[1]) == sorted(PROMPTS) and len(asked[0]) == len(asked[1]) == 3
    assert [len(b["pairs"]) for b in batches[0]] == [len(b["pairs"]) for b in batches[1]]
    rows = rows_of(batches[0]) + rows_of(batches[1])
    assert len(set(rows)) == len(rows) == 12  # the last three are too few for two micro-batches in two processes


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("after", [1, 2, 4, 7])
def test_a_resumed_loader_continues(after, iterations):
    """After any number of micro-batches of whole steps: the rest is what the uninterrupted loader deals out."""
    sizes = {"num_epochs": 2, "micro_batches_per_step": 1, "num_iterations": iterations}
    whole = list(make_loader(**sizes))
    first, second = (make_loader(**sizes) for _ in range(2))
    steps = iter(first)
    before = [next(steps) for _ in range(after)]
    second.load_state_dict(first.state_dict())
    after = list(second)
    assert rows_of(before) + rows_of(after) == rows_of(whole)
    parts = [sum((batch["is_fresh"] for batch in batches), []) for batches in ([*before, *after], whole)]
    assert parts[0] == parts[1] and sum(parts[0]) == 30
    assert (second.num_pairs_seen, second.num_prompts_seen) == (30 * iterations, 12)


def test_pairs_of_a_checkpoint_from_before_there_were_iterations_are_fresh():
    first, second = make_loader(), make_loader()
    next(iter(first))
    state = first.state_dict()
    assert state.pop("pool_is_fresh") == [True] * first.waiting
    second.load_state_dict(state)
    assert all(all(batch["is_fresh"]) for batch in second)


def test_a_fresh_loader_has_a_state():
    fresh = make_loader()
    assert fresh.state_dict()["pool"] == {} and fresh.state_dict()["pool_prompts"] == []
    again = make_loader()
    again.load_state_dict(fresh.state_dict())
    assert rows_of(list(again)) == rows_of(list(make_loader()))


def test_a_state_belongs_to_its_prompts():
    state = make_loader().state_dict()
    for prompts in (PROMPTS[:-1], PROMPTS[::-1], ["01 fox", *PROMPTS[1:]]):
        with pytest.raises(ValueError, match="6 other prompts than the . of this run"):
            make_loader(prompts=prompts).load_state_dict(state)


def test_no_pairs_at_all_is_an_error_with_a_reason():
    with pytest.raises(RuntimeError, match="No valid pair in 4 prompts. The reward is flat."):
        list(make_loader(prompts=["0 none"] * 4, why_no_pairs=lambda: "The reward is flat."))
    with pytest.raises(RuntimeError, match="No valid pair in 100 prompts"):
        list(make_loader(prompts=["0 none"] * 4, num_epochs=math.inf))


def test_several_processes_need_a_way_to_meet():
    with pytest.raises(ValueError, match="`gather` is needed to join the pairs of 2 processes"):
        make_loader(world_size=2)


class TestWherePairsWait:
    """On the device of the rollout while they are few: the meta device stands for it, which must not be left by accident."""

    def loader(self, max_device_bytes: int, pairs_per_micro_batch: int = 2) -> PairLoader:
        sizes = LoaderSizes(
            prompts_per_rollout=2, pairs_per_micro_batch=pairs_per_micro_batch, micro_batches_per_step=1,
            max_pairs_per_prompt=5, num_epochs=1,
        )  # fmt: skip
        return PairLoader(
            PROMPTS[1:3], lambda *args: rollout(*args).to("meta"), sizes, max_device_bytes=max_device_bytes
        )

    def test_few_pairs_stay(self):
        """Four pairs make two batches; what decides about forward passes is on the CPU all the same."""
        batches = list(self.loader(max_device_bytes=2**20))
        assert [len(batch["pairs"]) for batch in batches] == [2, 2]
        assert {batch["pairs"].latents.device.type for batch in batches} == {"meta"}
        assert {batch["pairs"].shared.device.type for batch in batches} == {"cpu"}

    def test_many_pairs_go_to_the_cpu(self):
        """The bound is the memory of all that wait: one byte less than the four pairs take, and they move."""
        needed = rollout(PROMPTS[1:3], 0).nbytes
        assert list(self.loader(needed))[0]["pairs"].latents.device.type == "meta"
        with pytest.raises(NotImplementedError, match="meta"):  # which is what moving from there to the CPU ends with
            list(self.loader(needed - 1))

    def test_pairs_from_a_checkpoint_join_those_of_the_device(self):
        loader = self.loader(max_device_bytes=2**20, pairs_per_micro_batch=3)
        waiting = rollout(PROMPTS[1:3], 0)[:1]
        loader.load_state_dict(
            {
                **loader.state_dict(),
                "pool": waiting.tensors(),
                "pool_prompts": waiting.prompts,
                "pool_is_fresh": [True],
            }
        )
        batches = list(loader)
        assert sum(len(batch["pairs"]) for batch in batches) == 5
        assert {batch["pairs"].latents.device.type for batch in batches} == {"meta"}

    def test_a_slice_shares_memory_and_an_index_copies(self):
        pairs = rollout(PROMPTS[1:3], 0)
        part = pairs[1:3]
        assert part.latents.data_ptr() == pairs.latents[1].data_ptr() and part.prompts == pairs.prompts[1:3]
        picked = pairs[torch.tensor([2, 0])]
        assert torch.equal(picked.latents, pairs.latents[[2, 0]]) and picked.prompts == [
            pairs.prompts[i] for i in (2, 0)
        ]
