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
Make batches of preference pairs: read the rows of a preference dataset, skip those that cannot be used, stack the rest.
"""

import hashlib
import logging
from typing import Any, NamedTuple

import torch

from .images import WHITE, image_to_tensor, parse_colour, read_image
from .preference_dataset import (
    PreferenceColumns,
    check_prompt,
    find_preference_columns,
    is_labelled,
    read_labels,
    read_weight,
)


logger = logging.getLogger(__name__)

MIN_PAIRS_TO_JUDGE_BAD_IMAGES = 100


class _Pair(NamedTuple):
    """One row as the collator reads it; images are `(3, resolution, resolution)` in [-1, 1]."""

    prompt: str
    image_0: torch.Tensor
    image_1: torch.Tensor
    label_0: float
    label_1: float
    weight: float


class StepPreferenceCollator:
    r"""
    Makes batches of image pairs from rows in Pick-a-Pic's or TRL's preference format.

    A row whose image cannot be decoded is skipped and counted in `num_bad`, a row without a label in
    `num_unlabelled`. If nothing is left of a batch, it becomes one blank pair of weight 0, so that no
    rank of a distributed run waits for another.

    Args:
        resolution (`int`):
            Side in pixels of the square images.
        prompt_column (`str`, *optional*):
            Column of the prompts. Defaults to `"caption"` or `"prompt"`.
        max_bad_image_fraction (`float`, *optional*, defaults to `0.01`):
            Largest tolerable share of undecodable rows, judged from the hundredth row on. Counted per data loading
            process.
        keep_unlabelled (`bool`, *optional*, defaults to `False`):
            Keep rows without a label, as ties, for a training that computes labels of its own.
        image_keys (`bool`, *optional*, defaults to `False`):
            Add `keys_0` and `keys_1`, hashes of the pixels under which an [`EncodingCache`] keeps the encodings, so that an
            image that occurs in several pairs, as Pick-a-Pic's do, is encoded once.
        background (`str`, *optional*, defaults to `"white"`):
            Colour that shows through transparent images.

    Example:

    ```python
    >>> from PIL import Image
    >>> from trl_spo.preference_collator import StepPreferenceCollator

    >>> red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    >>> batch = StepPreferenceCollator(resolution=8)([{"prompt": "red", "chosen": red, "rejected": blue}])
    >>> batch["prompts"], batch["images_0"].shape, batch["label_0"], batch["weights"]
    (['red'], torch.Size([1, 3, 8, 8]), tensor([1.]), tensor([1.]))
    ```
    """

    def __init__(
        self,
        resolution: int,
        prompt_column: str | None = None,
        max_bad_image_fraction: float = 0.01,
        keep_unlabelled: bool = False,
        image_keys: bool = False,
        background: str = WHITE,
    ):
        parse_colour(background)
        self.resolution = resolution
        self.prompt_column = prompt_column
        self.max_bad_image_fraction = max_bad_image_fraction
        self.keep_unlabelled = keep_unlabelled
        self.image_keys = image_keys
        self.background = background
        self.num_seen = self.num_bad = self.num_unlabelled = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        r"""
        Args:
            rows (`list[dict]`):
                Dataset rows.

        Returns:
            `dict` with `prompts` (`list[str]`), `images_0` and `images_1` (float32, shape
            `(batch_size, 3, resolution, resolution)`, in [-1, 1]), `label_0`, `label_1` and `weights` (float32, shape
            `(batch_size,)`). `weights` is `1 / num_example_per_prompt`, not yet normalised. With `image_keys` also
            `keys_0` and `keys_1` (`list[str]`).
        """
        # Read the rows. A few unusable ones are skipped and counted; too many are an error.
        columns = find_preference_columns(list(rows[0]), self.prompt_column)
        pairs = [self._read_row(row, columns) for row in rows]
        pairs = [pair for pair in pairs if pair is not None]
        limit = self.max_bad_image_fraction * max(self.num_seen, MIN_PAIRS_TO_JUDGE_BAD_IMAGES)
        if self.num_bad > limit:
            raise ValueError(
                f"{self.num_bad} of {self.num_seen} pairs have an unreadable image, more than the share of "
                f"`max_bad_image_fraction={self.max_bad_image_fraction}`; look at the columns `{columns.image_0}` and "
                f"`{columns.image_1}`."
            )
        if not pairs:
            blank = torch.zeros(3, self.resolution, self.resolution)
            pairs = [_Pair("", blank, blank, 0.5, 0.5, 0.0)]

        # Turn rows into columns.
        columns_of = _Pair(*zip(*pairs, strict=True))
        batch = {
            "prompts": list(columns_of.prompt),
            "images_0": torch.stack(columns_of.image_0),
            "images_1": torch.stack(columns_of.image_1),
            "label_0": torch.tensor(columns_of.label_0, dtype=torch.float32),
            "label_1": torch.tensor(columns_of.label_1, dtype=torch.float32),
            "weights": torch.tensor(columns_of.weight, dtype=torch.float32),
        }
        if self.image_keys:
            batch["keys_0"] = [_image_key(image) for image in batch["images_0"]]
            batch["keys_1"] = [_image_key(image) for image in batch["images_1"]]
        return batch

    def _read_row(self, row: dict[str, Any], columns: PreferenceColumns) -> _Pair | None:
        """The pair in a row, or `None` for a row that is skipped."""
        # Skip a row without a label, or without two readable images.
        labelled = is_labelled(row)
        if not labelled and not self.keep_unlabelled:
            self.num_unlabelled += 1
            return None
        self.num_seen += 1
        try:
            pictures = [read_image(row[name], self.background) for name in columns.images]
        except OSError as error:
            self.num_bad += 1
            logger.warning("Skipped a pair with an unreadable image (prompt %r): %s", row[columns.prompt], error)
            return None

        # Where the label is depends on the format: TRL's has the chosen image first.
        if not labelled:
            labels = (0.5, 0.5)
        elif columns.labelled:
            labels = read_labels(row["label_0"], row["label_1"], f"the pair of the prompt {row[columns.prompt]!r}")
        else:
            labels = (1.0, 0.0)
        check_prompt(row[columns.prompt], columns.prompt, "a row")
        images = [image_to_tensor(picture, self.resolution) for picture in pictures]
        return _Pair(row[columns.prompt], *images, *labels, read_weight(row.get("num_example_per_prompt")))


def _image_key(image: torch.Tensor) -> str:
    """A hash of the pixels: equal for equal images, whatever file they come from."""
    return hashlib.blake2b(image.numpy().tobytes(), digest_size=16).hexdigest()
