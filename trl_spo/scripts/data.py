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
Make a preference dataset of images of your own, or look at one.

```bash
trl-spo data build my-images --output my-pairs       # a folder of images, a table with paths, what `trl-spo label` wrote
trl-spo data preview my-pairs                        # counts, agreement of annotators, a sheet of pairs
trl-spo step-reward --dataset_name my-pairs ...
```
"""

import argparse
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from .errors import run


DATASET_FILES = ("*.parquet", "*.arrow", "metadata.csv", "metadata.jsonl")  # what `load_dataset` understands


class DataParser(argparse.ArgumentParser):
    """A parser of `trl-spo data` or of one of its commands, whose errors are one line."""

    def parse_args_and_config(self, arguments: list[str]) -> tuple[argparse.Namespace]:
        """The arguments, in the form in which the other parsers return theirs."""
        return (self.parse_args([argument for argument in arguments if argument != "--debug"]),)

    def error(self, message: str) -> NoReturn:
        """One line."""
        self.exit(2, f"{self.prog}: error: {message}. `{self.prog} --help` lists the arguments.\n")


def make_parser(prog: str | None = None) -> DataParser:
    """The parser whose results [`main`] takes."""
    parser = DataParser(
        prog=prog, description="Preference data of your own. --debug prints the traceback of an error."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="build|preview")
    build = commands.add_parser("build", help="write a dataset that step-reward takes, with the images in it")
    build.add_argument("source", help="folder of images, table with paths, folder of `trl-spo label`, or any dataset")
    build.add_argument("--output", required=True, help="folder, or .parquet file, to write")
    build.add_argument("--split", default="train", help="split of a dataset that has splits")
    build.add_argument(
        "--validation_fraction",
        type=float,
        default=0.0,
        help="share of the prompts whose pairs are kept apart, as the split `validation`",
    )
    build.add_argument("--seed", type=int, default=0, help="of the choice of these prompts")
    preview = commands.add_parser("preview", help="counts, agreement and a sheet of pairs")
    preview.add_argument("source", metavar="dataset", help="the same")
    preview.add_argument("--split", default="train", help="split of a dataset that has splits")
    preview.add_argument("--output", default="preview.png", help="PNG file of the sheet")
    preview.add_argument("--num_pairs", type=int, default=16, help="pairs on the sheet")
    return parser


def main(arguments: argparse.Namespace) -> Path:
    """Does what the arguments say, and returns what it wrote."""
    return build(arguments) if arguments.command == "build" else preview(arguments)


def load_pairs(source: str, split: str = "train"):
    """
    Pairs, with or without labels, from images, tables or datasets.

    Raises:
        FileNotFoundError, ValueError: if there is nothing of the kind; says where.
    """
    from ..label_folder import is_label_folder
    from ..pair_files import pair_dataset, read_image_folder
    from ..preference_dataset import load_preference_dataset
    from ..prompts import SAVED_MARKS

    path = Path(source)
    marks = (*DATASET_FILES, *SAVED_MARKS)
    is_dataset = is_label_folder(path) or any(next(path.rglob(mark), None) is not None for mark in marks)
    if path.is_dir() and not is_dataset:
        return pair_dataset(read_image_folder(path), path)
    return load_preference_dataset(source, split=split)


# --- build -----------------------------------------------------------------------------------------------------------


def build(arguments: argparse.Namespace) -> Path:
    """Writes the labelled pairs of a source to parquet files that need no other file."""
    from ..preference_dataset import find_preference_columns, leave_undecoded, prepare_preference_dataset

    # Check the request and the rows before anything is written.
    output = Path(arguments.output)
    if not 0 <= arguments.validation_fraction < 1:
        raise ValueError(f"--validation_fraction must be in [0, 1), got {arguments.validation_fraction}.")
    if output.suffix == ".parquet" and arguments.validation_fraction:
        raise ValueError("Two splits need a folder: name one with --output.")
    check_output(output)
    everything = leave_undecoded(load_pairs(arguments.source, arguments.split))
    columns = find_preference_columns(everything.column_names)
    try:
        dataset = prepare_preference_dataset(everything)
    except ValueError as error:
        if "has a label" not in str(error):
            raise
        raise ValueError(
            f"No pair of {arguments.source!r} has a label. Label them: trl-spo label --dataset_name {arguments.source}"
        ) from error

    check_rows(dataset, columns)

    # Write one file per split.
    validation = validation_prompts(dataset[columns.prompt], arguments.validation_fraction, arguments.seed)
    is_held_out = [prompt in validation for prompt in dataset[columns.prompt]]
    written = []
    for split, wanted in (("train", False), ("validation", True)):
        rows = [index for index, held_out in enumerate(is_held_out) if held_out == wanted]
        if rows:
            file = output if output.suffix == ".parquet" else output / f"{split}.parquet"
            write_parquet(dataset.select(rows), columns, file)
            written.append(f"{len(rows)} pairs in {file}")
    left_out = len(everything) - len(dataset)
    print("; ".join(written) + (f"; {left_out} pairs without a label were left out" if left_out else ""))
    print(f"Look: trl-spo data preview {output}\nLearn: trl-spo step-reward --dataset_name {output}")
    return output


def check_output(output: Path) -> None:
    """
    Raises:
        ValueError: if a folder holds data that this program did not write there, which would be mixed with the new.
    """
    others = [
        path.name for path in output.rglob("*.parquet") if path.name not in ("train.parquet", "validation.parquet")
    ]
    if output.is_dir() and (others or (output / "clicks.jsonl").exists()):
        found = others[0] if others else "the clicks of a labelling"
        raise ValueError(f"{str(output)!r} already holds {found}. Choose another folder with --output.")


def validation_prompts(prompts: list[str], fraction: float, seed: int) -> set[str]:
    """The prompts that are kept apart: all pairs of a prompt are on one side."""
    unique = sorted(set(prompts))
    random.Random(seed).shuffle(unique)
    return set(unique[: round(fraction * len(unique))])


def check_rows(dataset, columns) -> None:
    """
    Raises:
        ValueError: if an image cannot be read, or a prompt is empty; says of which pair.
    """
    from ..images import read_image

    for index, row in enumerate(dataset):
        if not row[columns.prompt].strip():
            raise ValueError(f"Pair {index} has no prompt.")
        for name in columns.images:
            try:
                read_image(row[name])
            except OSError as error:
                file = row[name].get("path") if isinstance(row[name], dict) else None
                raise ValueError(f"An image of pair {index} cannot be read ({file or name}): {error}.") from error


def embedded_rows(dataset, columns) -> Iterator[dict]:
    """The rows, with the bytes of their image files in them."""
    for row in dataset:
        for name in columns.images:
            image = row[name]
            if isinstance(image, str):
                image = {"bytes": None, "path": image}
            elif not isinstance(image, dict):
                image = {"bytes": image, "path": None}
            path = image.get("path")
            content = Path(path).read_bytes() if image.get("bytes") is None else image["bytes"]
            row[name] = {"bytes": content, "path": Path(path).name if path else None}
        yield row


def write_parquet(dataset, columns, file: Path) -> None:
    """A file that exists whole or not at all. Rows go through it one after the other, so that they need no memory."""
    from datasets import Dataset, Image

    features = dataset.features.copy()
    for name in columns.images:
        features[name] = Image(decode=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        embedded = Dataset.from_generator(
            embedded_rows, features=features, cache_dir=folder, gen_kwargs={"dataset": dataset, "columns": columns}
        )
        for name in columns.images:
            embedded = embedded.cast_column(name, Image())
        part = Path(folder) / "part.parquet"
        embedded.to_parquet(str(part))
        os.replace(part, file)


# --- preview ---------------------------------------------------------------------------------------------------------


def preview(arguments: argparse.Namespace) -> Path:
    """Prints what a dataset holds, and draws some of its pairs."""
    from ..evaluation.preference_preview import preference_sheet, preview_text

    if arguments.num_pairs < 1:
        raise ValueError(f"--num_pairs must be at least 1, got {arguments.num_pairs}.")
    dataset = load_pairs(arguments.source, arguments.split)
    print(preview_text(dataset, title=f"{arguments.source}, split {arguments.split}"))
    title = f"{len(dataset)} pairs in {arguments.source}; the preferred image is framed"
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    preference_sheet(dataset, arguments.num_pairs, title=title).save(output)
    print(f"sheet          {output}")
    return output


if __name__ == "__main__":
    run(main, make_parser())
