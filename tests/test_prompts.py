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
Necessity: prompts come in files of every origin, and a reader that cuts or changes one says nothing: a run trains on other
prompts than the user wrote. The same prompts must come out of every kind of file, by every way in.
"""

import csv
import io
import json

import pytest
from datasets import Dataset, DatasetDict

from trl_spo import SPOTrainer
from trl_spo.prompts import load_prompts, read_prompts
from trl_spo.scripts import sample
from trl_spo.scripts.arguments import SamplerArguments

from .testing_utils import brightness_reward, tiny_sd_pipeline, tiny_spo_config


# What other readers cut or turn into something else.
HARD = [
    "a cat\u2028lying",
    "a dog\x85here",
    "a bird\x0bthere\x1cnow",
    "a cat, sitting",
    'a sign that says "None"',
    "None",
    "null",
    "NA",
    "1.50",
    "café \U0001f98a",
]


def table(prompts: list[str], delimiter: str) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(["number", "prompt"])
    writer.writerows(enumerate(prompts))
    return text.getvalue()


FORMS = {
    "lines.txt": lambda prompts: "\n".join(prompts) + "\n",
    "windows.txt": lambda prompts: "\r\n".join(prompts) + "\r\n",
    "old_mac.txt": lambda prompts: "\r".join(prompts),
    "LINES.TXT": lambda prompts: "\n".join([*prompts, "", "  "]),
    "list.json": json.dumps,
    "indented.json": lambda prompts: json.dumps(prompts, indent=2, ensure_ascii=False),
    "rows.json": lambda prompts: json.dumps([{"prompt": prompt} for prompt in prompts]),
    "columns.json": lambda prompts: json.dumps({"prompt": prompts}),
    "lines.json": lambda prompts: "\n".join(json.dumps({"caption": prompt}, ensure_ascii=False) for prompt in prompts),
    "rows.jsonl": lambda prompts: "\n".join(json.dumps({"prompt": prompt, "n": 1}) for prompt in prompts) + "\n",
    "strings.jsonl": lambda prompts: "\n".join(map(json.dumps, prompts)),
    "table.csv": lambda prompts: table(prompts, ","),
    "table.tsv": lambda prompts: table(prompts, "\t"),
}


def read(path) -> list[str]:
    return list(read_prompts(load_prompts(str(path))))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_the_same_prompts_come_out_of_every_file(name, encoding, tmp_path):
    path = tmp_path / name
    path.write_bytes(FORMS[name](HARD).encode(encoding))
    assert read(path) == HARD


def test_lines_inside_a_prompt_survive_where_a_file_can_hold_them(tmp_path):
    prompts = ["a cat\non two lines", "a dog\r\non two"]
    for name in ("list.json", "rows.jsonl", "table.csv", "table.tsv"):
        (tmp_path / name).write_bytes(FORMS[name](prompts).encode())
        assert read(tmp_path / name) == prompts, name


def test_datasets_from_disk(tmp_path):
    train, test = Dataset.from_dict({"prompt": ["a cat", "a dog"]}), Dataset.from_dict({"prompt": ["a bird"]})
    train.save_to_disk(str(tmp_path / "one"))
    DatasetDict(train=train, test=test).save_to_disk(str(tmp_path / "several"))
    train.to_parquet(tmp_path / "rows.parquet")
    assert (
        read(tmp_path / "one") == read(tmp_path / "several") == read(tmp_path / "rows.parquet") == ["a cat", "a dog"]
    )
    assert list(read_prompts(load_prompts(str(tmp_path / "several"), "test"))) == ["a bird"]
    with pytest.raises(ValueError, match=r"has no split 'validation'; it has \['test', 'train'\]"):
        load_prompts(str(tmp_path / "several"), "validation")
    assert read_prompts(train["prompt"]) == ["a cat", "a dog"]


def test_columns_may_begin_with_a_capital_letter(tmp_path):
    """PartiPrompts' table."""
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\na cat\tAnimals\n")
    assert read(tmp_path / "p.tsv") == ["a cat"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("l.txt", "a dog\na café\n".encode("latin-1"), r"l.txt' is not text in UTF-8 \(line 2\). Convert it"),
        ("u.txt", "a red cat\n".encode("utf-16-le"), "u.txt' holds characters of value 0, as UTF-16 without"),
        ("c.csv", b"prompt\na dog\na cat, sitting\n", r"c.csv' has 2 cells in line 3 and 1 columns, \['prompt'\]. Put quotes"),
        ("q.csv", b'prompt,n\n"a cat" sitting,1\n', r"q.csv' is not a table \(line 2"),
        ("t.csv", b"prompt,n\na cat,1,2\n", "t.csv' has 3 cells in line 2 and 2 columns"),
        ("b.json", b'["a cat",', r"b.json' is neither JSON nor has one JSON value per line \(line 1"),
        ("n.json", b"[1, 2]", "n.json' must hold strings, or objects"),
        ("m.jsonl", b'{"prompt": "a"}\n["b"]\n', "m.jsonl' must hold strings, or objects"),
        ("x.parquet", b"PAR1 and no more", "x.parquet' is not a whole parquet file"),
        ("p.md", b"a cat\n", "p.md' is not a file of prompts: these end in .txt, .json"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_with_its_cure(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(str(tmp_path / name))


def test_every_way_in_gives_the_same_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff" + "\n".join(HARD), encoding="utf-8")
    config = tiny_spo_config(tmp_path / "out", dataset_name=str(path))
    trainer = SPOTrainer(config, tiny_sd_pipeline(tmp_path), brightness_reward)
    assert list(trainer.pair_loader.prompts) == SamplerArguments(prompts=str(path)).read_prompts() == HARD


def test_prompts_of_the_command_line_are_checked_like_those_of_files(tmp_path):
    """Regression: `--prompt ""` sampled the empty prompt, and what it was missing came to light in the images."""
    for prompt, message in (("", "`prompt` has an empty prompt at position 1"), ("a\ud83d", "not valid Unicode")):
        arguments = sample.SampleArguments(prompt=["a cat", prompt])
        with pytest.raises(ValueError, match=message):
            sample.main(sample.LoadedPipelineArguments("no/pipeline/here"), SamplerArguments(), arguments)
