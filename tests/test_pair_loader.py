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

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from trl_spo import StepPairs
from trl_spo.pair_loader import LoaderSizes, PairLoader
from trl_spo.pair_queue import PairQueue


PROMPTS = ["0 none", "1 fox", "3 cats", "2 dogs", "5 birds", "4 fish"]  # so many pairs each: 15 in all


def rollout(prompts: list[str], seed: int) -> StepPairs:
    """As many pairs as a prompt says, each with latents that nothing else has: prompt, number of the rollout, number."""
    rows = [(int(p[0]), seed, i) for p in prompts for i in range(int(p[0]))]
    latents = torch.tensor(rows, dtype=torch.float32).view(-1, 3)
    names = [p for p in prompts for _ in range(int(p[0]))]
    filled = {name: torch.zeros(len(rows)) for name in StepPairs.tensor_names()}
    return StepPairs(**{**filled, "latents": latents}, prompts=names)


def make_loader(
    prompts=PROMPTS, rollout=rollout, processes=None, seed=0, why_no_pairs=lambda: "", **sizes
) -> PairLoader:
    defaults = {
        "prompts_per_rollout": 2, "pairs_per_micro_batch": 2, "micro_batches_per_step": 2, "max_pairs_per_prompt": 5,
        "num_epochs": 1,
    }  # fmt: skip
    return PairLoader(prompts, rollout, LoaderSizes(**{**defaults, **sizes}), processes, seed, why_no_pairs)


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


class Threads:
    """Processes that are threads of this one; what each sends is counted."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=20)
        self.shared = [None] * world_size
        self.sent = [0] * world_size  # rows

    def of_rank(self, rank: int) -> "Threads":
        mine = copy.copy(self)
        mine.rank = rank
        return mine

    def gather(self, own) -> list:
        self.shared[self.rank] = own
        self.barrier.wait()
        joined = list(self.shared)
        self.barrier.wait()
        return joined

    def exchange(self, rows, num_sent, num_received):
        assert rows.dtype == torch.uint8 and len(rows) == sum(num_sent) and num_sent[self.rank] == 0
        self.sent[self.rank] += len(rows)
        of_all = self.gather(rows.split(num_sent))
        received = torch.cat([parts[self.rank] for parts in of_all])
        assert [len(parts[self.rank]) for parts in of_all] == num_received
        return received


def in_processes(world_size: int, job) -> list:
    """Run `job(rank, processes)` for every rank at once, in threads that wait for each other."""
    threads_together = Threads(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        jobs = [pool.submit(job, rank, threads_together.of_rank(rank)) for rank in range(world_size)]
        return [job.result() for job in jobs]


def test_two_processes_share_prompts_and_pairs_evenly():
    """Each rolls out prompts of its own and trains on as many pairs as the other, wherever they came from."""
    asked = [[], []]

    def job(rank, processes):
        def counting(prompts, seed):
            asked[rank].extend(prompts)
            return rollout(prompts, seed)

        sizes = {"rank": rank, "world_size": 2, "prompts_per_rollout": 1, "pairs_per_micro_batch": 1}
        return list(make_loader(rollout=counting, processes=processes, **sizes))

    batches = in_processes(2, job)
    assert sorted(asked[0] + asked[1]) == sorted(PROMPTS) and len(asked[0]) == len(asked[1]) == 3
    assert [len(b["pairs"]) for b in batches[0]] == [len(b["pairs"]) for b in batches[1]]
    rows = rows_of(batches[0]) + rows_of(batches[1])
    assert len(set(rows)) == len(rows) == 12  # the last three are too few for two micro-batches in two processes


UNEVEN = {"prompts_per_rollout": 1, "pairs_per_micro_batch": 2, "micro_batches_per_step": 1, "num_epochs": 3}


def steps_of(world_size: int, after: int = 0, **sizes) -> tuple[list, list, int]:
    """By step the pairs of every process, whether they are fresh, and how many pairs were sent; resumed after some steps."""

    def job(rank, processes):
        def own(prompts, seed):
            pairs = rollout(prompts, seed)
            kinds = {"prompt_index": torch.int64, "shared": torch.bool, "chosen_scores": torch.float16}
            for name, dtype in kinds.items():
                setattr(pairs, name, (pairs.latents[:, 0] * 7 + pairs.latents[:, 2]).to(dtype))
            return pairs

        options = {**UNEVEN, "rank": rank, "world_size": world_size, **sizes}
        loader = make_loader(rollout=own, processes=processes if world_size > 1 else None, **options)
        steps = iter(loader)
        batches = [next(steps) for _ in range(after)]
        if after:
            states = processes.gather(loader.state_dict()) if world_size > 1 else [loader.state_dict()]
            assert all(not state["pool"] for state in states[1:])
            assert states[0]["pool_owners"]  # pairs wait
            loader = make_loader(rollout=own, processes=processes if world_size > 1 else None, **options)
            loader.load_state_dict(states[0])
        batches += list(loader)
        return batches, processes.sent[rank]

    results = in_processes(world_size, job)
    steps = zip(*[batches for batches, _ in results], strict=True)
    return list(steps), [batches for batches, _ in results], sum(sent for _, sent in results)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("iterations", [1, 2])
def test_a_step_trains_on_the_same_pairs_wherever_they_are(world_size, iterations):
    """
    Processes whose prompts give nothing to five pairs: steps have the pairs that one process with larger batches takes, every
    number of them is intact, and as few as possible have travelled.
    """
    steps, _, sent = steps_of(world_size, num_iterations=iterations)
    larger = {"prompts_per_rollout": world_size, "pairs_per_micro_batch": 2 * world_size, "num_iterations": iterations}
    alone, _, _ = steps_of(1, **larger)
    # One process knows the last step that has too few pairs for all.
    assert 0 <= len(alone) - len(steps) <= 1
    fewest = compared = 0
    for own, (whole,) in zip(steps, alone, strict=False):
        sizes = {len(batch["pairs"]) for batch in own}
        assert len(sizes) == 1
        found = sum((rows_of([batch]) for batch in own), [])
        if len(found) == len(whole["pairs"]):  # the last one is of a multiple of the processes
            assert sorted(found) == sorted(rows_of([whole]))
            compared += 1
        for batch in own:
            pairs = batch["pairs"]
            expected = pairs.latents[:, 0] * 7 + pairs.latents[:, 2]
            assert torch.equal(pairs.prompt_index, expected.long()) and pairs.prompt_index.dtype == torch.int64
            assert torch.equal(pairs.chosen_scores, expected.half()) and pairs.chosen_scores.dtype == torch.float16
            assert torch.equal(pairs.shared, expected.bool()) and pairs.shared.dtype == torch.bool
            assert [float(prompt[0]) for prompt in pairs.prompts] == pairs.latents[:, 0].tolist()
            assert len(batch["is_fresh"]) == len(pairs)
        # The rank that found a pair: prompts of a round go to ranks in turn, and the second number is where the round began.
        owners = [owner_of(row, world_size) for row in found]
        fewest += sum(max(owners.count(rank) - len(found) // world_size, 0) for rank in range(world_size))
    assert sent == fewest > 0
    assert compared >= len(steps) - 1 > 1


def owner_of(row: tuple, world_size: int) -> int:
    """Which rank rolled out the prompt of a pair, from the order of prompts."""
    number, start = int(row[0]), int(row[1])
    epoch, position = divmod(start, len(PROMPTS))
    order = torch.randperm(len(PROMPTS), generator=torch.Generator().manual_seed(epoch)).tolist()
    names = [int(PROMPTS[i][0]) for i in order[position : position + world_size]]
    return names.index(number)


@pytest.mark.parametrize("iterations", [1, 2])
def test_several_processes_resume_to_the_same_steps(iterations):
    """What each process trains on, in which order, after a checkpoint that the first one has."""
    whole, batches, _ = steps_of(2, num_iterations=iterations)
    _, resumed, _ = steps_of(2, after=3, num_iterations=iterations)
    for ours, theirs in zip(batches, resumed, strict=True):
        assert rows_of(ours) == rows_of(theirs)
        assert [batch["is_fresh"] for batch in ours] == [batch["is_fresh"] for batch in theirs]


def test_an_old_checkpoint_knows_one_list_of_prompts():
    """Number and hash of the prompts stood beside the other numbers, and nothing was said about the last round."""
    whole = make_loader(num_epochs=2)
    batches = iter(whole)
    seen = [next(batches) for _ in range(2)]
    state = whole.state_dict()
    state.pop("pairs_of_last_round")
    old = {**state.pop("prompt_sources")[0], **state}
    loader = make_loader(num_epochs=2)
    loader.load_state_dict(old)
    assert rows_of(list(loader)) == rows_of(list(batches)) and seen
    with pytest.raises(ValueError, match="written with 6 other prompts than the 2 of this run"):
        make_loader(PROMPTS[:2]).load_state_dict(old)


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_processes_goes_on_with_all_pairs(before, now):
    """Every pair that waited is dealt out once, in shares that are equal."""
    sizes = {"prompts_per_rollout": 6, "pairs_per_micro_batch": 1, "micro_batches_per_step": 1}

    def first_part(rank, processes):
        own = processes if before > 1 else None
        loader = make_loader(processes=own, rank=rank, world_size=before, **sizes)
        batches = [next(iter(loader))]
        return batches, loader.state_dict()

    parts = in_processes(before, first_part)
    seen = sum((rows_of(batches) for batches, _ in parts), [])
    state = parts[0][1]
    assert len(state["pool_prompts"]) == 15 - before

    def second_part(rank, processes):
        loader = make_loader(processes=processes if now > 1 else None, rank=rank, world_size=now, **sizes)
        loader.load_state_dict(state)
        return list(loader)

    rest = in_processes(now, second_part)
    assert len({len(batches) for batches in rest}) == 1
    rows = seen + sum((rows_of(batches) for batches in rest), [])
    left = (15 - before) % now
    assert len(set(rows)) == len(rows) == 15 - left


def test_pairs_of_another_precision_travel_without_loss():
    """A checkpoint in float16, a rollout in bfloat16: rows have room for both, as a joined tensor has."""

    def job(rank, processes):
        queue = PairQueue(rank, 2, processes)
        half = rollout(["3 cats"], 0)
        half.latents = torch.tensor([[1.0009765625, 3, 2]] * 3).half()  # which bfloat16 would round
        state = {"pool_prompts": half.prompts, "pool": half.tensors(), "pool_owners": [0] * 3, "pool_num_processes": 2}
        queue.load_state_dict(state)
        new = rollout(["1 fox"], 1)
        new.latents = torch.full((1, 3), 1e38).bfloat16()  # which float16 would lose
        queue.add(new if rank else None)
        return queue.take(4)[0].latents.float()

    values = torch.cat(in_processes(2, job))
    assert sorted(values[:, 0].tolist()) == [1.0009765625] * 3 + [float(torch.tensor(1e38).bfloat16())]


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
    with pytest.raises(ValueError, match="`processes` is needed to share the pairs of 2 processes"):
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
                "pool_owners": [0],
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
