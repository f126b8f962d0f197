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
Where the pairs of a labelling come from: sampled by a pipeline while people label, or copied from images that are there.

Both fill the folder of `trl_spo.label_folder` in order, and go on where they were if they were stopped.
"""

import json
import logging
import random
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

from ..hub_files import read_json
from ..images import read_image, to_pil
from ..label_folder import CLICKS, IMAGES, PAIRS, SETTINGS, Pair, cut_torn_line, read_pairs, write_pair
from ..label_session import pair_name
from ..training.checkpointing import write_picture, write_text


logger = logging.getLogger(__name__)

RETRY_SECONDS = 5  # after a full disk
STOP_SECONDS = 10  # for the pairs that are being sampled; a thread that torch works in should not be torn off


def open_folder(folder: Path, settings: dict) -> dict:
    """
    Makes the folder of a labelling, or goes on with it; returns the settings that it was made with.

    Args:
        folder (`Path`): where.
        settings (`dict`): where the pairs come from; empty to go on with whatever is there.

    Raises:
        ValueError: if the folder holds pairs from elsewhere, or none and no settings say where to get them.
    """
    file = folder / SETTINGS
    stored = settings
    if file.is_file():
        stored = read_json(file)
        changed = [name for name in {**stored, **settings} if stored.get(name) != settings.get(name)]
        if settings and changed:
            listed = "; ".join(
                f"{name} was {stored.get(name)!r} and is {settings.get(name)!r}" for name in sorted(changed)
            )
            raise ValueError(
                f"{str(folder)!r} holds pairs from other settings: {listed}. Go on with those, or choose another --output_dir."
            )
    elif not settings:
        raise ValueError(
            "There are no pairs to label: name prompts for the pipeline with --prompts, or images that are there with "
            "--dataset_name."
        )
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    for name in (PAIRS, CLICKS):
        (folder / name).touch()
        cut = cut_torn_line(folder / name)
        if cut:
            logger.warning("Cut off %d bytes at the end of %s: a line that was never finished.", cut, folder / name)
    if not file.is_file():
        write_text(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return stored


def save_pair(folder: Path, index: int, prompt: str, images: Iterable[Image.Image], seeds=None) -> Pair:
    """Writes both images, and then the line that makes them a pair."""
    name = pair_name(index)
    files = (f"{IMAGES}/{name}_0.png", f"{IMAGES}/{name}_1.png")
    for image, file in zip(images, files, strict=True):
        write_picture(image, folder / file)
    pair = Pair(name, prompt, files, seeds)
    write_pair(folder, pair)
    return pair


def copy_pairs(folder: Path, dataset, columns) -> None:
    """
    Copies the pairs of a dataset that are not in the folder yet. Labels that it may have are left behind.

    Args:
        folder (`Path`): of the labelling.
        dataset (`datasets.Dataset`): of pairs, with undecoded images.
        columns ([`PreferenceColumns`]): where it has them.

    Raises:
        ValueError: if an image cannot be read; says in which row.
    """
    from tqdm.auto import tqdm

    done = len(read_pairs(folder))
    for index in tqdm(range(done, len(dataset)), desc="copying pairs", unit="pair", disable=done == len(dataset)):
        row = dataset[index]
        try:
            images = [read_image(row[name]) for name in columns.images]
        except OSError as error:
            raise ValueError(f"An image of row {index} cannot be read: {error}.") from error
        save_pair(folder, index, row[columns.prompt], images)


def prompt_order(prompts: list[str], num_pairs: int, seed: int) -> list[str]:
    """A prompt for each pair: all of them, in an order that was drawn, before one comes again."""
    drawn: list[str] = []
    while len(drawn) < num_pairs:
        again = list(prompts)
        random.Random(f"{seed}/{len(drawn)}").shuffle(again)
        drawn += again
    return drawn[:num_pairs]


class PairSampler(threading.Thread):
    r"""
    Samples the pairs of a folder, one after the other, beside those who label them.

    Args:
        folder (`Path`):
            Of the labelling.
        pipeline ([`SPOPipeline`]):
            On its device.
        prompts (`list[str]`):
            One per pair.
        seed (`int`):
            Of the first image; pair i has `seed + 2 i` and `seed + 2 i + 1`.
        batch_size (`int`):
            Images sampled together.
        sampler (`dict`):
            Of [`generate_images`].
        add_pair (`Callable`):
            Called with each new [`Pair`].
    """

    def __init__(self, folder, pipeline, prompts, seed, batch_size, sampler, add_pair: Callable[[Pair], None]):
        super().__init__(name="pair-sampler", daemon=True)  # a stopped program leaves whole pairs behind
        self.folder = Path(folder)
        self.pipeline = pipeline
        self.prompts = prompts
        self.seed = seed
        self.batch_size = batch_size
        self.sampler = sampler
        self.add_pair = add_pair
        self.trouble: str | None = None
        self._stop_asked = threading.Event()

    def stop(self) -> None:
        """Lets the thread end after the pairs that it is at."""
        self._stop_asked.set()
        self.join(STOP_SECONDS)

    def run(self) -> None:
        done = len(read_pairs(self.folder))
        count = 1  # the first pair is there as soon as it can be
        while done < len(self.prompts) and not self._stop_asked.is_set():
            chosen = range(done, min(done + count, len(self.prompts)))
            try:
                images = self._sample(chosen)
            except Exception as error:  # of torch, in a thread: nobody else would say it
                logger.exception("No more pairs can be sampled.")
                self.trouble = f"No more pairs can be made: {type(error).__name__}: {error}"
                return
            for index in chosen:
                self._save(index, images[2 * (index - done) : 2 * (index - done) + 2])
            done += len(chosen)
            count = max(1, self.batch_size // 2)

    def _seeds(self, index: int) -> tuple[int, int]:
        return self.seed + 2 * index, self.seed + 2 * index + 1

    def _sample(self, indices: range):
        """Images `(2 * len(indices), 3, H, W)` in [0, 1]: both of a pair follow each other."""
        from ..sampling import generate_images

        prompts = [self.prompts[index] for index in indices for _ in range(2)]
        seeds = [seed for index in indices for seed in self._seeds(index)]
        return generate_images(self.pipeline, prompts, seeds=seeds, batch_size=self.batch_size, **self.sampler)

    def _save(self, index: int, images) -> None:
        """Writes a pair, and waits for room if the disk is full."""
        while not self._stop_asked.is_set():
            try:
                pair = save_pair(self.folder, index, self.prompts[index], map(to_pil, images), self._seeds(index))
            except OSError as error:
                self.trouble = f"The next pair could not be stored: {error.strerror or error}. Make room on the disk."
                self._stop_asked.wait(RETRY_SECONDS)
            else:
                self.trouble = None
                self.add_pair(pair)
                return
