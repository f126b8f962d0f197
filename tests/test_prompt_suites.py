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
Necessity: an evaluation on a suite is compared with other people's, so its prompts must be theirs, all of them, from one
revision. The files here are laid out as those of the public repositories, and pass through the code that reads those.
"""

import csv
import hashlib
import json
import logging

import pytest
from datasets import Dataset

from trl_spo import prompt_suites
from trl_spo.prompt_suites import SUITES, find_suite, locate_suite
from trl_spo.prompts import load_prompts, read_prompts, warn_once
from trl_spo.scripts.arguments import SamplerArguments


# What the public files hold at these places: quotes that are text, commas in quotes, objects of mixed kinds.
PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBiology-inspired concepts\n"
    '"G I G G L E" painted on a wall.\tIllustrations\tWriting & Symbols\t\n'
    'A robot. The words "Fly an airplane" are written\tOutdoor Scenes\tComplex\t\n'
)
GENEVAL = [
    {"tag": "counting", "include": [{"class": "cow", "count": 3}], "exclude": [], "prompt": "a photo of three cows"},
    {"tag": "position", "include": [{"class": "cow", "position": ["left of", 0]}], "prompt": "a cow left of a bench"},
]
STYLES = ("anime", "concept-art", "paintings", "photo")


def write_suite(name: str, folder) -> None:
    """A copy of the suite's repository, with few prompts."""
    for file in SUITES[name].files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
    if name == "parti":
        (folder / "PartiPrompts.tsv").write_text(PARTI)
    elif name == "hpdv2":
        for style in STYLES:
            (folder / f"benchmark/{style}.json").write_text(json.dumps([f"a cat, {style}", f"a dog, {style}"]))
    elif name == "drawbench":
        with open(folder / "DrawBench Prompts - Sheet1.csv", "w", newline="") as file:
            csv.writer(file).writerows(
                [["Prompts", "Category"], ["A red car.", "Colors"], ["A pear, cut in two.", "DALL-E"]]
            )
    else:
        lines = "".join(json.dumps(row) + "\n" for row in GENEVAL)
        (folder / "prompts/evaluation_metadata.jsonl").write_text(lines)


EXPECTED = {
    "parti": (
        ["bond", '"G I G G L E" painted on a wall.', 'A robot. The words "Fly an airplane" are written'],
        ["Abstract", "Illustrations", "Outdoor Scenes"],
    ),
    "hpdv2": (
        [f"a {animal}, {style}" for style in STYLES for animal in ("cat", "dog")],
        [style for style in STYLES for _ in range(2)],
    ),
    "drawbench": (["A red car.", "A pear, cut in two."], ["Colors", "DALL-E"]),
    "geneval": (["a photo of three cows", "a cow left of a bench"], ["counting", "position"]),
}


@pytest.fixture(autouse=True)
def empty_workplace(tmp_path, monkeypatch):
    """An empty working directory, empty caches of the Hub, and no network."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(prompt_suites, "GITHUB", (tmp_path / "github").as_uri())


def check(name: str, dataset: Dataset) -> None:
    prompts, categories = EXPECTED[name]
    assert list(read_prompts(dataset)) == prompts
    assert dataset["category"][:] == categories


@pytest.mark.parametrize("name", SUITES)
def test_a_copy_of_the_repository_in_the_working_directory(name, tmp_path):
    write_suite(name, tmp_path / "work" / name)
    check(name, load_prompts(name))
    write_suite(name, tmp_path / "mirror" / name)
    check(name, load_prompts(str(tmp_path / "mirror" / name)))


@pytest.mark.parametrize("name", ["parti", "hpdv2", "drawbench"])
def test_the_cache_of_the_hub(name, tmp_path):
    """As `hf download` leaves it, at the revision that is fixed."""
    suite = SUITES[name]
    repository = tmp_path / "hub" / f"datasets--{suite.repository.replace('/', '--')}"
    write_suite(name, repository / "snapshots" / suite.revision)
    check(name, load_prompts(name))


def test_a_file_of_github_is_downloaded_once_and_compared(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    suite = SUITES["geneval"]
    write_suite("geneval", tmp_path / "github" / suite.repository / suite.revision)
    with pytest.raises(FileNotFoundError, match="'geneval' are neither cached .* on GitHub .*invalid hash value"):
        load_prompts("geneval")
    content = (
        tmp_path / "github" / suite.repository / suite.revision / "prompts/evaluation_metadata.jsonl"
    ).read_bytes()
    monkeypatch.setitem(SUITES, "geneval", suite._replace(sha256=hashlib.sha256(content).hexdigest()))
    check("geneval", load_prompts("geneval"))
    monkeypatch.setattr(prompt_suites, "GITHUB", "file:///nowhere")
    check("geneval", load_prompts("geneval"))  # of the cache


def test_without_a_network_it_says_what_to_do():
    with pytest.raises(
        FileNotFoundError, match=r"'benchmark/anime.json' of 'zhwang/HPDv2' on the Hub .* folder 'hpdv2'"
    ):
        load_prompts("hpdv2")
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set"):
        load_prompts("geneval")


def test_what_exists_goes_before_a_suite(tmp_path):
    (tmp_path / "work" / "parti").write_text("a cat\n")
    with pytest.raises(
        ValueError, match="'parti' is not a file of prompts"
    ):  # an existing file is never asked for elsewhere
        load_prompts("parti")
    Dataset.from_dict({"prompt": ["a dog"]}).save_to_disk(str(tmp_path / "work" / "drawbench"))
    assert list(read_prompts(load_prompts("drawbench"))) == ["a dog"]
    assert find_suite("somebody/parti") == (None, None)


def test_categories_are_splits(tmp_path):
    write_suite("hpdv2", tmp_path / "work" / "hpdv2")
    assert load_prompts("hpdv2", "photo")["prompt"][:] == ["a cat, photo", "a dog, photo"]
    assert len(load_prompts("hpdv2", "validation")) == 8
    arguments = SamplerArguments(prompts="hpdv2", prompts_split="anime", num_prompts=1)
    assert arguments.read_prompts() == ["a cat, anime"]
    with pytest.raises(ValueError, match=r"'hpdv2' has no category 'photos'; it has \['anime', .*'photo'\]"):
        load_prompts("hpdv2", "photos")


def test_a_name_that_is_nothing(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="under the name 'drawbnch': .*; did you mean drawbench\\?"):
        load_prompts("drawbnch")


def test_every_suite_is_fixed_to_a_commit():
    for suite in SUITES.values():
        assert len(suite.revision) == 40 and set(suite.revision) <= set("0123456789abcdef")
    assert [name for name, suite in SUITES.items() if suite.is_on_github] == ["geneval"]
    with pytest.raises(FileNotFoundError):
        locate_suite("parti", SUITES["parti"])


# --- prompts that were written for other programs --------------------------------------------------------------------


def test_comments_weights_and_loras_are_warned_about_once(tmp_path, caplog):
    warn_once.cache_clear()
    prompts = [
        "# people",
        "a (red:1.2) cat",
        "a cat <lora:fluffy:0.8>",
        "a dog (small)",
        "#1 dad mug",
        "a clock at 10:30",
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert list(read_prompts(load_prompts(str(tmp_path / "prompts.txt")))) == prompts
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3 and all(
        message.startswith("1 of 6 prompts of `train_dataset` hold") for message in messages
    )
    for what, example in (
        ("a comment", "'# people'"),
        ("a weight", "'a (red:1.2) cat'"),
        ("a LoRA", "<lora:fluffy:0.8>"),
    ):
        assert sum(what in message and example in message for message in messages) == 1


def test_quotes_in_a_table_with_tabs(tmp_path):
    """Cells in quotes are read as a spreadsheet means them; a table that has them as text keeps them."""
    (tmp_path / "spreadsheet.tsv").write_text('prompt\tn\n"a ""red"" cat"\t1\n')
    (tmp_path / "plain.tsv").write_text('prompt\tn\n"red" is the cat\t1\n')
    assert list(read_prompts(load_prompts(str(tmp_path / "spreadsheet.tsv")))) == ['a "red" cat']
    assert list(read_prompts(load_prompts(str(tmp_path / "plain.tsv")))) == ['"red" is the cat']
