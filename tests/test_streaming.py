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
Prompts and preferences that are streamed: each process reads files of its own, all rows come, and a run that was stopped goes on
at its place without reading what came before.
"""

import io
import json
import math
import shutil
import tarfile
from itertools import islice

import pytest
import torch
from datasets import Dataset, load_dataset

from trl_spo import SPOTrainer, StepAwareRewardModel, StepPairs, StepRewardTrainer
from trl_spo.preference_dataset import load_preference_dataset
from trl_spo.prompt_source import MOST_FAULTY_IN_A_ROW, StreamedPrompts
from trl_spo.prompts import PromptStream, load_prompts, read_prompts
from trl_spo.row_stream import RowStream

from .test_pair_loader import in_processes, make_loader
from .testing_utils import (
    PROMPTS,
    brightness_reward,
    image_pairs,
    state_of,
    tiny_clip,
    tiny_sd_pipeline,
    tiny_spo_config,
    tiny_step_reward_config,
    train_logs,
)


ROWS_PER_FILE = 250


@pytest.fixture(autouse=True)
def no_waiting_for_threads(monkeypatch):
    """datasets sleeps whenever a parquet file is closed, for the sake of threads that remote files have."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three parquet files of prompts, in groups of 100 rows."""
    folder = tmp_path_factory.mktemp("sharded")
    for file in range(3):
        prompts = [f"file {file}, prompt {row}" for row in range(ROWS_PER_FILE)]
        rows = Dataset.from_dict({"caption": prompts, "size": [512] * len(prompts)})
        rows.to_parquet(folder / f"train-{file:05d}-of-00003.parquet", batch_size=100)
    return folder


def stream_of(folder):
    return load_dataset(str(folder), split="train", streaming=True)


def captions(rows, count: int) -> list[str]:
    return [row["caption"] for row in islice(rows, count)]


class TestRowStream:
    def test_a_pass_has_every_row_once_and_the_next_one_another_order(self, folder):
        rows = RowStream(stream_of(folder), block_size=60)
        first = captions(rows, 750)
        second = captions(rows, 750)
        assert sorted(first) == sorted(second) and len(set(first)) == 750
        assert first != second and first != sorted(first)
        assert rows.passes == pytest.approx(5 / 3)  # in the last of three shards of the second pass
        assert captions(RowStream(stream_of(folder), block_size=60), 750) == first
        assert captions(RowStream(stream_of(folder), block_size=60, seed=1), 750) != first

    def test_rows_are_mixed_within_their_block(self, folder):
        rows = captions(RowStream(stream_of(folder), block_size=60), 60)
        numbers = [int(row.rsplit(" ", 1)[1]) for row in rows]
        assert sorted(numbers) == list(range(60)) != numbers

    @pytest.mark.parametrize("stop", [0, 1, 59, 60, 61, 249, 250, 251, 749, 750, 1000])
    def test_it_goes_on_at_its_place(self, folder, stop):
        rows = RowStream(stream_of(folder), block_size=60)
        captions(rows, stop)
        place = json.loads(json.dumps(rows.place))
        rest = captions(rows, 300)
        other = RowStream(stream_of(folder), block_size=60)
        other.go_to(place)
        assert captions(other, 300) == rest

    def test_going_on_reads_what_is_near_its_place_alone(self, folder):
        read = []
        counted = stream_of(folder).map(lambda row: read.append(row["caption"]) or row)
        rows = RowStream(counted, block_size=50)
        captions(rows, 2 * ROWS_PER_FILE + 210)  # in the third file that is read, behind its second group of 100 rows
        place = rows.place
        expected = captions(rows, 1)
        read.clear()
        other = RowStream(counted, block_size=50)
        other.go_to(place)
        assert captions(other, 1) == expected
        assert len(read) == 50 and len({row.split(",")[0] for row in read}) == 1  # the block alone

    def test_a_place_of_another_way_to_read_is_refused(self, folder):
        rows = RowStream(stream_of(folder), block_size=50)
        captions(rows, 60)
        other = RowStream(stream_of(folder).map(lambda row: row), block_size=50)
        with pytest.raises(ValueError, match="read through other operations then"):
            other.go_to(rows.place)

    @pytest.mark.parametrize("num_readers", [2, 3])
    def test_readers_share_the_files_of_all_passes(self, folder, num_readers):
        """Six shards are two passes, whoever reads them."""
        readers = [RowStream(stream_of(folder), i, num_readers, block_size=60) for i in range(num_readers)]
        parts = [captions(reader, 6 * ROWS_PER_FILE // num_readers) for reader in readers]
        everything = sum(parts, [])
        assert sorted(everything) == sorted(2 * captions(RowStream(stream_of(folder)), 750))
        assert all(len({row.split(",")[0] for row in part[:ROWS_PER_FILE]}) == 1 for part in parts)

    def test_more_readers_than_files_read_groups_of_rows(self, folder):
        readers = [RowStream(stream_of(folder), i, 5) for i in range(5)]
        assert readers[0].num_shards == 9  # 100, 100 and 50 rows of three files
        firsts = [set(captions(reader, 50)) for reader in readers]
        assert len(set.union(*firsts)) == 250

    def test_too_few_shards_are_refused(self):
        stream = Dataset.from_dict({"caption": ["a", "b"]}).to_iterable_dataset()
        with pytest.raises(ValueError, match="has 1 shards for 2 processes.*Write it as 2 files or more"):
            RowStream(stream, 0, 2)

    def test_another_number_of_readers_goes_on_with_what_nobody_has_opened(self, folder):
        readers = [RowStream(stream_of(folder), i, 2) for i in range(2)]
        captions(readers[0], ROWS_PER_FILE + 1)  # has opened shards 0 and 2
        captions(readers[1], 3)  # has opened shard 1
        places = [reader.place for reader in readers]
        whole = captions(RowStream(stream_of(folder)), 6 * ROWS_PER_FILE)
        others = [RowStream(stream_of(folder), i, 3) for i in range(3)]
        for other in others:
            other.go_to(other.own_place(places))
        found = {captions(other, 1)[0].split(",")[0] for other in others}
        assert found == {
            row.split(",")[0] for row in whole[3 * ROWS_PER_FILE :]
        }  # shards 3, 4 and 5 are those of the second pass
        assert sorted(other.place["number"] for other in others) == [3, 4, 5]

    def test_a_stream_without_rows_ends_with_a_sentence(self, folder):
        nothing = stream_of(folder).filter(lambda row: False)
        with pytest.raises(ValueError, match="^31 shards of the stream in a row"):
            next(RowStream(nothing))


class TestPrompts:
    @pytest.mark.parametrize("kind", ["folder", "parquet", "txt", "csv", "saved"])
    def test_every_place_of_prompts_can_be_streamed(self, folder, tmp_path, kind):
        whole = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
        expected = sorted(whole["caption"])
        name = folder
        if kind == "parquet":
            name = folder / "train-00000-of-00003.parquet"
            expected = sorted(whole["caption"][:ROWS_PER_FILE])
        elif kind == "txt":
            name = tmp_path / "prompts.txt"
            name.write_text("\n".join(expected))
        elif kind == "csv":
            name = tmp_path / "prompts.csv"
            whole.to_csv(name)
        elif kind == "saved":
            name = tmp_path / "saved"
            whole.save_to_disk(name)
        prompts = read_prompts(load_prompts(str(name), streaming=True))
        assert isinstance(prompts, PromptStream) and len(prompts.first) == 100
        source = StreamedPrompts(prompts, 0, 1, seed=0)
        assert sorted(source.take(0, len(expected))) == expected

    def test_a_webdataset(self, tmp_path):
        write_tar(tmp_path / "00000.tar", [{"txt": b"a cat"}, {"txt": b"a dog"}])
        write_tar(tmp_path / "00001.tar", [{"txt": b"a fox"}])
        source = StreamedPrompts(read_prompts(load_prompts(str(tmp_path), streaming=True)), 0, 1, seed=0)
        assert sorted(source.take(0, 3)) == ["a cat", "a dog", "a fox"]

    def test_the_first_ones_are_checked_and_later_ones_left_out(self, tmp_path, caplog):
        prompts = [f"prompt {i}" for i in range(200)]
        prompts[150] = "  "
        prompts[151] = ""
        stream = Dataset.from_dict({"prompt": prompts}).to_iterable_dataset()
        source = StreamedPrompts(read_prompts(stream), 0, 1, seed=0)
        with caplog.at_level("WARNING", logger="trl_spo"):
            assert sorted(source.take(0, 198)) == sorted(prompts[:150] + prompts[152:])
        assert caplog.text.count("empty prompt") == 1 and source.num_left_out == 2
        stream = Dataset.from_dict({"prompt": prompts[140:]}).to_iterable_dataset()
        with pytest.raises(ValueError, match="empty prompt at position 10"):
            read_prompts(stream)

    def test_a_stream_of_faults_ends(self):
        prompts = ["a cat"] * 10_000 + [""] * (MOST_FAULTY_IN_A_ROW + 1)  # a block, and another
        stream = read_prompts(Dataset.from_dict({"prompt": prompts}).to_iterable_dataset())
        source = StreamedPrompts(stream, 0, 1, seed=0)
        assert set(source.take(0, 10_000)) == {"a cat"}
        with pytest.raises(ValueError, match="no prompt that can be used.*'prompt' the column"):
            source.take(10_000, 1)

    def test_what_cannot_be_used_is_refused(self, tmp_path):
        stream = Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()
        with pytest.raises(ValueError, match="needs a column 'prompt' or 'caption'"):
            read_prompts(stream)
        with pytest.raises(ValueError, match="`train_dataset` has no prompts"):
            read_prompts(stream.filter(lambda row: False))
        (tmp_path / "empty.txt").write_text("\n")
        with pytest.raises(ValueError, match="empty.txt' has no prompts"):
            load_prompts(str(tmp_path / "empty.txt"), streaming=True)


class TestProcesses:
    """Pairs of several processes, each with files of its own; threads stand for the processes."""

    def test_they_resume_to_the_same_prompts(self, folder):
        """All prompts of a pass come once, and a checkpoint of the first process is enough for all."""
        prompts = read_prompts(stream_of(folder))

        def loader_of(rank, processes):
            sizes = {"prompts_per_rollout": 25, "pairs_per_micro_batch": 25, "micro_batches_per_step": 1}
            return make_loader(
                prompts, one_pair_each, processes, rank=rank, world_size=3, num_epochs=math.inf, **sizes
            )

        def whole(rank, processes):
            loader = loader_of(rank, processes)
            batches = islice(iter(loader), 12)
            first = [next(batches) for _ in range(4)]
            state = loader.state_dict()
            return [batch["pairs"].prompts for batch in first], [batch["pairs"].prompts for batch in batches], state

        parts = in_processes(3, whole)
        seen = [prompt for first, _, _ in parts for batch in first for prompt in batch]
        seen += [prompt for _, rest, _ in parts for batch in rest[:6] for prompt in batch]
        assert len(seen) == 750 == len(set(seen))
        state = json.loads(json.dumps({**parts[0][2], "pool": {}}))

        def resumed(rank, processes):
            loader = loader_of(rank, processes)
            loader.load_state_dict(state)
            return [batch["pairs"].prompts for batch in islice(iter(loader), 8)]

        assert in_processes(3, resumed) == [rest for _, rest, _ in parts]


def one_pair_each(prompts: list[str], seed: int) -> StepPairs:
    latents = torch.zeros(len(prompts), 3)
    filled = {name: torch.zeros(len(prompts)) for name in StepPairs.tensor_names()}
    return StepPairs(**{**filled, "latents": latents}, prompts=list(prompts))


def write_tar(path, samples: list[dict[str, bytes]]):
    with tarfile.open(path, "w") as archive:
        for i, fields in enumerate(samples):
            for ending, content in fields.items():
                info = tarfile.TarInfo(f"{i:04d}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def spo_trainer(tmp_path, prompts, **settings):
    defaults = {
        "num_inference_steps": 3, "guidance_scale": 1.0, "per_device_train_batch_size": 3, "max_steps": 6,
        "per_device_rollout_batch_size": 2, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1,
    }  # fmt: skip
    config = tiny_spo_config(tmp_path / "out", **{**defaults, **settings})
    return SPOTrainer(config, tiny_sd_pipeline(tmp_path), brightness_reward, train_dataset=prompts)


class TestSPO:
    def test_a_stopped_run_goes_on_as_if_it_had_not_been(self, folder, tmp_path):
        whole = spo_trainer(tmp_path, stream_of(folder))
        whole.train()
        second = spo_trainer(tmp_path, stream_of(folder))
        second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
        expected = state_of(whole.model)
        assert all(torch.equal(value, expected[name]) for name, value in state_of(second.model).items())
        assert second.state.global_step == 6 and second.pair_loader.epoch == whole.pair_loader.epoch
        keys = ("loss", "num_prompts_seen", "num_pairs_seen", "epoch")
        assert [[log[key] for key in keys] for log in train_logs(second)[-3:]] == [
            [log[key] for key in keys] for log in train_logs(whole)[-3:]
        ]

    def test_by_name_with_pictures_and_evaluation(self, folder, tmp_path):
        trainer = spo_trainer(
            tmp_path, None, dataset_name=str(folder), dataset_streaming=True, max_steps=1, log_images_steps=1,
            num_eval_images=2,
        )  # fmt: skip
        trainer.train()
        shown = json.loads((tmp_path / "out" / "images" / "samples.json").read_text())
        assert shown["prompts"] == ["file 0, prompt 0", "file 0, prompt 1"]
        with pytest.raises(TypeError, match="`eval_dataset` must be a list.*stream.take"):
            trainer.evaluate(stream_of(folder))

    def test_it_needs_the_number_of_steps(self, folder, tmp_path):
        with pytest.raises(ValueError, match="needs `max_steps`"):
            spo_trainer(tmp_path, stream_of(folder), max_steps=-1)
        with pytest.raises(ValueError, match="`dataset_streaming` needs `max_steps`"):
            tiny_spo_config(tmp_path, dataset_streaming=True, max_steps=-1)

    def test_a_checkpoint_of_other_prompts_is_refused(self, folder, tmp_path):
        spo_trainer(tmp_path, stream_of(folder), max_steps=3).train()
        checkpoint = str(tmp_path / "out" / "checkpoint-3")
        with pytest.raises(ValueError, match="streamed prompts than the 6 of this run"):
            spo_trainer(tmp_path, PROMPTS).train(resume_from_checkpoint=checkpoint)
        other = Dataset.from_dict({"caption": PROMPTS}).to_iterable_dataset()
        with pytest.raises(ValueError, match="a stream of 3 shards.*has one of 1 shards"):
            spo_trainer(tmp_path, other).train(resume_from_checkpoint=checkpoint)


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def pair_rows(count: int) -> list[dict]:
    pairs = image_pairs()
    rows = []
    for i in range(count):
        pair = pairs[i % len(pairs)]
        images = {"jpg_0": png(pair["chosen"]), "jpg_1": png(pair["rejected"])}
        rows.append({"caption": f"pair {i}", **images, "label_0": 1.0, "label_1": 0.0})
    return rows


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory):
    """Two parquet files of eight pairs each."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = pair_rows(16)
    for file in range(2):
        Dataset.from_list(rows[8 * file : 8 * file + 8]).to_parquet(folder / f"train-{file:05d}-of-00002.parquet")
    return folder


def reward_trainer(tmp_path, data, **settings):
    defaults = {
        "per_device_train_batch_size": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1,
        "dataset_streaming": True,
    }  # fmt: skip
    config = tiny_step_reward_config(tmp_path / "out", **{**defaults, **settings})
    model = StepAwareRewardModel.from_clip(tiny_clip(tmp_path))
    return StepRewardTrainer(config, tiny_sd_pipeline(tmp_path), model, train_dataset=data)


class TestStepReward:
    @pytest.mark.parametrize(("accumulation", "workers"), [(1, 0), (2, 0), (1, 2), (2, 1)])
    def test_a_stopped_run_goes_on_as_if_it_had_not_been(self, pair_folder, tmp_path, accumulation, workers):
        """
        With accumulation the second pass has begun: five steps are 20 of 16 pairs. Reading ahead must not count, not in processes
        that load either; of two of these, the second one's turn comes after five batches.
        """
        settings = {"gradient_accumulation_steps": accumulation, "max_steps": 6, "save_steps": 5}
        settings["dataloader_num_workers"] = workers
        read = []
        counted = load_preference_dataset(pair_folder, streaming=True).map(
            lambda row: read.append(row["caption"]) or row
        )
        whole = reward_trainer(tmp_path, counted, **settings)
        whole.train()
        second = reward_trainer(tmp_path, counted, **settings)
        read.clear()  # the checks look at the first rows
        second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
        expected = state_of(whole.model)
        assert all(torch.equal(value, expected[name]) for name, value in state_of(second.model).items())
        keys = ("loss", "epoch", "accuracy")
        assert [train_logs(second)[-1][key] for key in keys] == [train_logs(whole)[-1][key] for key in keys]
        if workers == 0:
            assert len(read) <= 8  # one file: what was trained on before is not read again

    def test_loading_processes_share_the_files(self, pair_folder, tmp_path):
        """Two of them have a file each, and take turns: a pass has every pair once. There must be as many files as readers."""
        data = load_preference_dataset(pair_folder, streaming=True)
        trainer = reward_trainer(tmp_path, data, dataloader_num_workers=2)
        batches = list(islice(trainer.get_train_dataloader(), 8))
        assert sorted(prompt for batch in batches for prompt in batch["prompts"]) == sorted(
            f"pair {i}" for i in range(16)
        )
        assert [batch["place"][0] for batch in batches] == [0, 1] * 4
        files = [{int(prompt.split()[1]) // 8 for prompt in batch["prompts"]} for batch in batches]
        assert files in ([{0}, {1}] * 4, [{1}, {0}] * 4)
        with pytest.raises(ValueError, match="2 shards for 3 processes that read"):
            reward_trainer(tmp_path, data, dataloader_num_workers=3)

    def test_an_older_checkpoint_has_a_place_per_process(self, pair_folder, tmp_path):
        data = load_preference_dataset(pair_folder, streaming=True)
        reward_trainer(tmp_path, data).train()
        file = tmp_path / "out" / "checkpoint-3" / "step_reward_state.json"
        state = json.loads(file.read_text())
        new = state["processes"][0].pop("stream")
        state["processes"][0]["place"], state["num_shards"] = new["places"][0], new["num_shards"]
        old = tmp_path / "old" / "checkpoint-3"
        shutil.copytree(file.parent, old)
        (old / file.name).write_text(json.dumps(state))
        for folder in (file.parent, old):
            trainer = reward_trainer(tmp_path, data)
            trainer._read_state(str(folder))
            assert trainer._stream.state_dict() == new and new["places"][0]["row"] > 0

    def test_a_named_webdataset(self, tmp_path):
        (tmp_path / "tars").mkdir()
        for file in range(2):
            samples = []
            for row in pair_rows(4):
                labels = {name: row[name] for name in ("label_0", "label_1")}
                fields = {"jpg_0": row["jpg_0"], "jpg_1": row["jpg_1"], "json": json.dumps(labels).encode()}
                samples.append({**fields, "txt": row["caption"].encode()})
            write_tar(tmp_path / "tars" / f"{file:05d}.tar", samples)
        trainer = reward_trainer(tmp_path, None, dataset_name=str(tmp_path / "tars"), max_steps=3)
        batches = list(islice(trainer.get_train_dataloader(), 4))
        seen = [prompt for batch in batches for prompt in batch["prompts"]]
        assert sorted(seen) == sorted(2 * [f"pair {i}" for i in range(4)])
        trainer.train()
        assert trainer.state.global_step == 3

    def test_a_checkpoint_of_another_stream_is_refused(self, pair_folder, tmp_path):
        reward_trainer(tmp_path, load_preference_dataset(pair_folder, streaming=True), max_steps=3).train()
        checkpoint = str(tmp_path / "out" / "checkpoint-3")
        other = Dataset.from_list(pair_rows(4)).to_iterable_dataset()
        with pytest.raises(ValueError, match="on a stream of 2 shards, and this run has a stream of 1 shards"):
            reward_trainer(tmp_path, other).train(resume_from_checkpoint=checkpoint)
