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
Rollouts that run ahead of the training, or apart from it: the pairs are those of the policy that is stated, and nothing is lost when
a run is stopped.
"""

import math
import os
import signal
import stat

import pytest
import torch

from trl_spo import SPOTrainer
from trl_spo.training.rollout_workers import own_rollout_devices

from .test_pair_loader import PROMPTS as PROMPTS_OF_LOADER
from .test_pair_loader import in_processes, make_loader, rollout, rows_of
from .testing_utils import PROMPTS, brightness_reward, state_of, tiny_sd_pipeline, tiny_spo_config, train_logs


class TestAhead:
    """The loader by itself."""

    def test_the_next_rollout_starts_before_a_step_is_dealt_out(self):
        started = []

        def start(prompts, seed):
            started.append(seed)
            return lambda: rollout(prompts, seed)

        sizes = {"prompts_per_rollout": 1, "pairs_per_micro_batch": 4, "micro_batches_per_step": 1, "num_epochs": 2}
        plain = list(make_loader(["5 birds"] * 6, **sizes))
        loader = make_loader(["5 birds"] * 6, start, looks_ahead=True, **sizes)
        batches, known = [], []
        for batch in loader:
            batches.append(batch)
            known.append((loader.waiting, len(started)))
        assert rows_of(batches) == rows_of(plain)  # the same pairs in the same order
        # Five pairs a round, four a step: after a step with fewer than four left another round has been started.
        assert known[0] == (1, 2) and known[1] == (2, 3)

    def test_epochs_end_where_they_end_without_it(self):
        ends = []
        for ahead in (False, True):
            loader = make_loader(looks_ahead=ahead, num_epochs=3)
            ends.append([(loader.num_pairs_seen, loader.num_prompts_seen) for _ in loader if loader.epoch_finished])
            assert loader.exhausted
        assert ends[0] == ends[1] and len({prompts for _, prompts in ends[0]}) == 2

    def test_no_rollout_is_started_for_a_step_that_will_not_be(self):
        started = []

        def counting(prompts, seed):
            started.append(seed)
            return rollout(prompts, seed)

        steps = iter([True, False])
        sizes = {
            "prompts_per_rollout": 1,
            "pairs_per_micro_batch": 4,
            "micro_batches_per_step": 1,
            "looks_ahead": True,
        }
        loader = make_loader(["5 birds"] * 9, counting, num_epochs=math.inf, **sizes)
        loader.goes_on = lambda: next(steps)
        batches = iter(loader)
        next(batches), next(batches)
        assert len(started) == 2

    @pytest.mark.parametrize("world_size", [1, 2])
    def test_a_checkpoint_has_what_was_started(self, world_size):
        sizes = {"prompts_per_rollout": 1, "pairs_per_micro_batch": 2, "micro_batches_per_step": 1, "num_epochs": 4}
        names = PROMPTS_OF_LOADER

        def new(rank, processes):
            own = processes if world_size > 1 else None
            return make_loader(
                names,
                lambda *args: lambda: rollout(*args),
                own,
                rank=rank,
                world_size=world_size,
                looks_ahead=True,
                **sizes,
            )

        def whole(rank, processes):
            loader = new(rank, processes)
            batches = iter(loader)
            first = [next(batches) for _ in range(5)]
            return rows_of(first), rows_of(list(batches)), processes.gather(loader.state_dict())[0]

        def stopped(rank, processes):
            loader = new(rank, processes)
            batches = iter(loader)
            first = [next(batches) for _ in range(5)]
            state = processes.gather(loader.state_dict())[0]
            loader = new(rank, processes)
            loader.load_state_dict(state)
            return rows_of(first), rows_of(list(loader))

        expected = [parts[:2] for parts in in_processes(world_size, whole)]
        assert in_processes(world_size, stopped) == expected


def spo_trainer(tmp_path, name="out", reward=brightness_reward, **settings):
    defaults = {
        "num_inference_steps": 3, "guidance_scale": 1.0, "per_device_train_batch_size": 3, "max_steps": 5,
        "per_device_rollout_batch_size": 2, "logging_steps": 1, "save_strategy": "no",
    }  # fmt: skip
    config = tiny_spo_config(tmp_path / name, **{**defaults, **settings})
    return SPOTrainer(config, tiny_sd_pipeline(tmp_path), reward, train_dataset=PROMPTS)


def same(one: SPOTrainer, other: SPOTrainer) -> bool:
    expected = state_of(one.model)
    return all(torch.equal(value, expected[name]) for name, value in state_of(other.model).items())


class TestTrainer:
    def test_pairs_are_one_step_older(self, tmp_path):
        """What each rollout saw: the weights before the step that goes on while it runs."""
        seen = []

        class Recording(SPOTrainer):
            def rollout(self, prompts, seed=0, **kwargs):
                weights = torch.cat([p.detach().flatten() for p in self.model.parameters() if p.requires_grad])
                seen.append((self.state.global_step, weights.clone()))
                return super().rollout(prompts, seed, **kwargs)

        config = {"num_inference_steps": 3, "guidance_scale": 1.0, "per_device_train_batch_size": 6, "max_steps": 3}
        for ahead in (False, True):
            run = tiny_spo_config(
                tmp_path / str(ahead), rollout_ahead=ahead, per_device_rollout_batch_size=3, **config
            )
            Recording(run, tiny_sd_pipeline(tmp_path), brightness_reward, train_dataset=PROMPTS * 2).train()
        # Each round gives six pairs, which is a step. Ahead, the second step's are found before the first one.
        assert [step for step, _ in seen] == [0, 1, 2] + [0, 0, 1]
        weights = [weights for _, weights in seen]
        assert torch.equal(weights[3], weights[0]) and torch.equal(weights[4], weights[0])
        assert not torch.equal(weights[5], weights[4])

    def test_a_stopped_run_goes_on_as_if_it_had_not_been(self, tmp_path):
        settings = {"rollout_ahead": True, "save_strategy": "steps", "save_steps": 2}
        whole = spo_trainer(tmp_path, **settings)
        whole.train()
        second = spo_trainer(tmp_path, **settings)
        second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert same(whole, second)
        keys = ("loss", "num_prompts_seen", "num_pairs_seen", "step_reward/mean")
        expected = [[log[key] for key in keys] for log in train_logs(whole)[-3:]]
        assert [[log[key] for key in keys] for log in train_logs(second)[-3:]] == expected

    @pytest.mark.parametrize("ahead", [False, True])
    def test_a_process_that_only_rolls_out_finds_the_same_pairs(self, tmp_path, ahead):
        """Bit for bit the weights of the run that rolls out itself; a second call of `train` goes on with new processes."""
        alone = spo_trainer(tmp_path, "alone", rollout_ahead=ahead)
        apart = spo_trainer(tmp_path, "apart", rollout_ahead=ahead, rollout_devices=["cpu"])
        for trainer in (alone, apart):
            trainer.train()
        assert same(alone, apart)
        assert [log["loss"] for log in train_logs(alone)] == [log["loss"] for log in train_logs(apart)]
        assert all(log["time/rollout_workers"] > 0 for log in train_logs(apart) if log["time/rollout"] > 0)
        if ahead:
            return
        for trainer in (alone, apart):
            trainer.train()
        assert same(alone, apart)

    def test_two_of_them_share_the_prompts_and_a_dead_one_is_named(self, tmp_path):
        trainer = spo_trainer(tmp_path, rollout_devices=["cpu", "cpu"])
        assert trainer.pair_loader.sizes.prompts_per_rollout == 4
        workers = trainer._workers
        workers.begin()
        try:
            parts, seconds = workers.start(PROMPTS[:4], 7, version=0)()
            assert seconds > 0 and [part.prompts[0] for part in parts] == PROMPTS[:2]
            for place, part in enumerate(parts):
                expected = trainer._roll_out(PROMPTS[place:4:2], 7, place)
                for name, value in expected.tensors().items():
                    assert torch.equal(getattr(part, name), value), name
                assert len(part.branches) == len(expected.branches)

            # Changed weights arrive, and only where the number of the weights changes.
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1)
            (stale,), _ = workers.start(PROMPTS[:1], 7, version=0)()
            (fresh,), _ = workers.start(PROMPTS[:1], 7, version=1)()
            expected = trainer._roll_out(PROMPTS[:1], 7, 0)
            assert torch.equal(fresh.latents, expected.latents) and not torch.equal(stale.latents, fresh.latents)

            os.kill(workers._executors[1].submit(os.getpid).result(), signal.SIGKILL)
            wait = workers.start(PROMPTS[:2], 8, version=1)
            with pytest.raises(RuntimeError, match="rolls out on 'cpu' has died without a word"):
                wait()
        finally:
            workers.end()

    def test_an_error_in_it_is_raised_as_it_is(self, tmp_path):
        trainer = spo_trainer(tmp_path, reward=reward_that_fails, rollout_devices=["cpu"])
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        assert trainer._workers._executors == []


def reward_that_fails(images, prompts, timesteps):
    return torch.full((len(images),), 1 / 0)


class TestRefused:
    def test_what_cannot_be_sent(self, tmp_path):
        with pytest.raises(ValueError, match="cannot be sent.*no lambda"):
            spo_trainer(
                tmp_path, reward=lambda images, prompts, timesteps: images.mean((1, 2, 3)), rollout_devices=["cpu"]
            )

    @pytest.mark.parametrize(
        ("devices", "message"),
        [(["gpu:0"], "'gpu:0', which is not a device"), (["cuda:99"], "names 'cuda:99', and this machine has")],
    )
    def test_devices_that_are_none(self, tmp_path, devices, message):
        with pytest.raises(ValueError, match=message):
            spo_trainer(tmp_path, rollout_devices=devices)

    def test_shares(self, tmp_path, monkeypatch):
        config = tiny_spo_config(tmp_path, rollout_devices=["cpu", "cpu", "cpu"])
        assert own_rollout_devices(config) == ["cpu"] * 3
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="has 3 devices for 2 processes"):
            own_rollout_devices(config)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        assert own_rollout_devices(config) == ["cpu"]

    def test_the_file_goes_with_the_trainer(self, tmp_path):
        trainer = spo_trainer(tmp_path, rollout_devices=["cpu"])
        folder = trainer._workers._folder.name
        assert os.path.isdir(folder) and stat.S_IMODE(os.stat(folder).st_mode) == 0o700  # it is unpickled
        trainer._workers = None
        assert not os.path.isdir(folder)
