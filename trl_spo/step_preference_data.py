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
From preference images to what the step-aware reward model is trained on (https://huggingface.co/papers/2406.04314,
section 3.2).

A pair of finished images with a human preference becomes a pair of *predictions at timestep t*:

    1. encode both images with the VAE;
    2. add the same noise at the same timestep t to both;
    3. predict both clean latents in one guided step of the diffusion model;
    4. decode.

The preference is taken to survive this, as the pair shares everything but the images. Differences from the public code
(https://github.com/RockeyCoss/SPO): both images of a pair pass the denoiser in one batch, and rows without a label are
dropped instead of counting as ties.
"""

import io
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image


logger = logging.getLogger(__name__)

MIN_PAIRS_TO_JUDGE_BAD_IMAGES = 100


class PreferenceColumns(NamedTuple):
    r"""
    Where a dataset keeps its pairs.

    Attributes:
        prompt (`str`): column of the prompts.
        image_0 (`str`): column of the first images; in TRL's format the chosen ones.
        image_1 (`str`): column of the second images; in TRL's format the rejected ones.
        labelled (`bool`): whether `label_0` and `label_1` tell the preference (Pick-a-Pic) or the first image is
            always the preferred one (TRL).
    """

    prompt: str
    image_0: str
    image_1: str
    labelled: bool


def find_preference_columns(column_names: list[str], prompt_column: str | None = None) -> PreferenceColumns:
    r"""
    Recognises Pick-a-Pic's and TRL's preference format by their columns.

    Args:
        column_names (`list[str]`):
            Columns of the dataset, in any order, others allowed.
        prompt_column (`str`, *optional*):
            Column of the prompts, if it is neither `"caption"` nor `"prompt"`.

    Returns:
        [`PreferenceColumns`].

    Raises:
        `ValueError`: If the columns belong to neither format.
    """
    names = set(column_names)
    if {"jpg_0", "jpg_1", "label_0", "label_1"} <= names:
        image_0, image_1, labelled = "jpg_0", "jpg_1", True
    elif {"chosen", "rejected"} <= names:
        image_0, image_1, labelled = "chosen", "rejected", False
    else:
        raise ValueError(
            "A preference dataset needs the columns `caption`, `jpg_0`, `jpg_1`, `label_0`, `label_1` (Pick-a-Pic) or "
            f"`prompt`, `chosen`, `rejected` (TRL), got {sorted(names)}."
        )
    candidates = [prompt_column] if prompt_column is not None else ["caption", "prompt"]
    prompt = next((name for name in candidates if name in names), None)
    if prompt is None:
        raise ValueError(
            f"The dataset has no prompt column {' or '.join(map(repr, candidates))}, got {sorted(names)}; name it "
            "with `dataset_prompt_column`."
        )
    return PreferenceColumns(prompt, image_0, image_1, labelled)


def is_labelled(row: dict[str, Any]) -> bool:
    """Whether a row tells a preference. Pick-a-Pic marks rows without one by `has_label` or by two zeros."""
    if "label_0" not in row:
        return True
    if not row.get("has_label", True):
        return False
    label_0, label_1 = row["label_0"], row["label_1"]
    return label_0 is not None and label_1 is not None and (label_0 != 0 or label_1 != 0)


def read_image(image: Any) -> Image.Image:
    r"""
    An RGB image from whatever a dataset row may hold.

    Args:
        image (`PIL.Image.Image`, `bytes` or `dict`):
            A decoded image, an encoded one, or the record `{"bytes": ..., "path": ...}` of an undecoded
            `datasets.Image` feature.

    Returns:
        `PIL.Image.Image`, fully decoded.

    Raises:
        `OSError`: If there is no image, or its bytes cannot be decoded.
        `ValueError`: If it is none of the kinds above.
    """
    if isinstance(image, dict):
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
        image = Path(image).read_bytes() if isinstance(image, str) else image
    if image is None:
        raise OSError("there is no image")
    if not isinstance(image, (bytes, bytearray, memoryview, Image.Image)):
        raise ValueError(f"An image must be a PIL image, bytes or a `datasets` image, got {type(image).__name__}.")
    try:
        image = image if isinstance(image, Image.Image) else Image.open(io.BytesIO(image))
        return image.convert("RGB")
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, EOFError, struct.error, ...
        raise OSError(f"{type(error).__name__}: {error}") from error


def image_to_tensor(image: Image.Image, resolution: int) -> torch.Tensor:
    r"""
    Brings an RGB image to a square tensor: bicubic resize of the short side to `resolution`, then centre crop.

    Args:
        image (`PIL.Image.Image`):
            RGB image.
        resolution (`int`):
            Side of the result in pixels.

    Returns:
        `torch.Tensor` of shape `(3, resolution, resolution)`: float32 in [-1, 1].
    """
    scale = resolution / min(image.size)
    size = tuple(max(resolution, round(side * scale)) for side in image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = ((side - resolution) // 2 for side in size)
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)
    return pixels / 127.5 - 1


def prepare_preference_dataset(dataset: Any, prompt_column: str | None = None) -> Any:
    r"""
    Checks a preference dataset before any long work begins, and drops the rows without a label.

    Columns, labels and the first pair are checked. Image columns are left undecoded, so that a broken image reaches
    [`StepPreferenceCollator`], which can skip it.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or `list[dict]`):
            Dataset in Pick-a-Pic's or TRL's preference format.
        prompt_column (`str`, *optional*):
            Column of the prompts.

    Returns:
        The same kind of dataset.

    Raises:
        `ValueError`: If it is empty, columns are missing, labels are no preference, or the first row is unusable.
    """
    dataset = _leave_undecoded(dataset)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("The preference dataset is empty.")
    columns = find_preference_columns(list(first), prompt_column)
    if columns.labelled:
        dataset = _drop_unlabelled(dataset)
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError("No row of the preference dataset has a label (`has_label` false, or both labels 0).")
    if not isinstance(first[columns.prompt], str):
        raise ValueError(
            f"Column `{columns.prompt}` must hold strings, the first row has a {type(first[columns.prompt]).__name__}."
        )
    for name in (columns.image_0, columns.image_1):
        try:
            read_image(first[name])
        except OSError:
            pass  # one broken image is the collator's business
        except ValueError as error:
            raise ValueError(f"Column `{name}` does not hold images. {error}") from error
    return dataset


def _leave_undecoded(dataset):
    for name, feature in (getattr(dataset, "features", None) or {}).items():
        if type(feature).__name__ == "Image" and getattr(feature, "decode", False):
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    return dataset


def _drop_unlabelled(dataset):
    if isinstance(dataset, (list, tuple)):
        keep = [row for row in dataset if is_labelled(row)]
        _check_labels(*(np.array([row[name] for row in keep], dtype=float) for name in ("label_0", "label_1")))
    elif hasattr(dataset, "select"):  # a map-style `datasets.Dataset`: read the label columns only
        names = [name for name in ("has_label", "label_0", "label_1") if name in dataset.column_names]
        labels = dataset.select_columns(names)
        mask = np.array([is_labelled(row) for row in labels], dtype=bool)
        keep = dataset if mask.all() else dataset.select(np.flatnonzero(mask))
        _check_labels(*(np.array(labels[name], dtype=float)[mask] for name in ("label_0", "label_1")))
    else:  # a stream can be neither counted nor checked in advance
        return dataset.filter(is_labelled)
    if len(keep) < len(dataset):
        logger.info("Dropped %d of %d pairs that have no label.", len(dataset) - len(keep), len(dataset))
    return keep


def _check_labels(label_0: np.ndarray, label_1: np.ndarray):
    bad = np.flatnonzero(~((label_0 >= 0) & (label_1 >= 0) & (np.abs(label_0 + label_1 - 1) < 1e-6)))
    if len(bad):
        raise ValueError(
            "`label_0` and `label_1` must be probabilities that sum to 1 (1 and 0 for a preference, 0.5 each for a "
            f"tie), labelled row {bad[0]} has {label_0[bad[0]]} and {label_1[bad[0]]}."
        )


class StepPreferenceCollator:
    r"""
    Makes batches of image pairs from rows in Pick-a-Pic's or TRL's preference format.

    A row whose image cannot be decoded is skipped and counted in `num_bad`, a row without a label in
    `num_unlabelled`. A batch of which nothing is left becomes one blank pair of weight 0, so that no rank of a
    distributed run waits for another.

    Args:
        resolution (`int`):
            Side in pixels of the square images.
        prompt_column (`str`, *optional*):
            Column of the prompts. Defaults to `"caption"` or `"prompt"`.
        max_bad_image_fraction (`float`, *optional*, defaults to `0.01`):
            Largest tolerable share of undecodable rows, judged from the hundredth row on. Counted per data loading
            process.

    Example:

    ```python
    >>> from PIL import Image
    >>> from trl_spo.step_preference_data import StepPreferenceCollator

    >>> red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    >>> batch = StepPreferenceCollator(resolution=8)([{"prompt": "red", "chosen": red, "rejected": blue}])
    >>> batch["prompts"], batch["images_0"].shape, batch["label_0"], batch["weights"]
    (['red'], torch.Size([1, 3, 8, 8]), tensor([1.]), tensor([1.]))
    ```
    """

    def __init__(self, resolution: int, prompt_column: str | None = None, max_bad_image_fraction: float = 0.01):
        self.resolution = resolution
        self.prompt_column = prompt_column
        self.max_bad_image_fraction = max_bad_image_fraction
        self.num_seen = self.num_bad = self.num_unlabelled = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        r"""
        Args:
            rows (`list[dict]`):
                Dataset rows.

        Returns:
            `dict` with `prompts` (`list[str]`), `images_0` and `images_1` (float32, shape
            `(batch_size, 3, resolution, resolution)`, in [-1, 1]), `label_0`, `label_1` and `weights` (float32, shape
            `(batch_size,)`). `weights` is `1 / num_example_per_prompt`, not yet normalised.
        """
        columns = find_preference_columns(list(rows[0]), self.prompt_column)
        pairs = [pair for row in rows if (pair := self._read_row(row, columns)) is not None]
        limit = self.max_bad_image_fraction * max(self.num_seen, MIN_PAIRS_TO_JUDGE_BAD_IMAGES)
        if self.num_bad > limit:
            raise ValueError(
                f"{self.num_bad} of {self.num_seen} pairs have an unreadable image, more than the share of "
                f"`max_bad_image_fraction={self.max_bad_image_fraction}`; look at the columns `{columns.image_0}` and "
                f"`{columns.image_1}`."
            )
        if not pairs:
            blank = torch.zeros(3, self.resolution, self.resolution)
            pairs = [("", blank, blank, 0.5, 0.5, 0.0)]
        prompts, images_0, images_1, label_0, label_1, weights = zip(*pairs, strict=True)
        return {
            "prompts": list(prompts),
            "images_0": torch.stack(images_0),
            "images_1": torch.stack(images_1),
            "label_0": torch.tensor(label_0, dtype=torch.float32),
            "label_1": torch.tensor(label_1, dtype=torch.float32),
            "weights": torch.tensor(weights, dtype=torch.float32),
        }

    def _read_row(self, row: dict[str, Any], columns: PreferenceColumns) -> tuple | None:
        """`(prompt, image_0, image_1, label_0, label_1, weight)`, or `None` for a row that is skipped."""
        if not is_labelled(row):
            self.num_unlabelled += 1
            return None
        self.num_seen += 1
        try:
            images = [
                image_to_tensor(read_image(row[name]), self.resolution) for name in (columns.image_0, columns.image_1)
            ]
        except OSError as error:
            self.num_bad += 1
            logger.warning("Skipped a pair with an unreadable image (prompt %r): %s", row[columns.prompt], error)
            return None
        labels = (float(row["label_0"]), float(row["label_1"])) if columns.labelled else (1.0, 0.0)
        num_examples = row.get("num_example_per_prompt")
        num_examples = 1 if num_examples is None else num_examples
        if num_examples < 1:
            raise ValueError(f"`num_example_per_prompt` must be at least 1, got {num_examples}.")
        return row[columns.prompt], *images, *labels, 1.0 / num_examples


@torch.no_grad()
def noised_pair_images(
    pipeline: Any,
    batch: dict[str, Any],
    timesteps: torch.Tensor,
    guidance_scale: float = 5.0,
    generator: torch.Generator | None = None,
    negative_prompt: str = "",
    prediction_batch_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Predictions of both images of each pair from the same timestep and the same noise.

    At timestep 0 the images are returned as they are: this is how the paper evaluates t = 0, and what SPO asks the
    reward model about at its last step.

    Args:
        pipeline:
            An SPO pipeline, see `wrap_pipeline`. Runs without gradients.
        batch (`dict`):
            A batch of [`StepPreferenceCollator`].
        timesteps (`torch.Tensor` of shape `(batch_size,)`):
            Integer timestep of each pair, in `[0, pipeline.num_train_timesteps)`.
        guidance_scale (`float`, *optional*, defaults to `5.0`):
            Classifier-free guidance of the prediction.
        generator (`torch.Generator`, *optional*):
            Source of all randomness: first the VAE's sampling, then the noise.
        negative_prompt (`str`, *optional*, defaults to `""`):
            Prompt of the unconditional half of the guidance.
        prediction_batch_size (`int`, *optional*):
            Pairs per call of denoiser and VAE decoder. Defaults to all.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(batch_size, 3, height, width)`: images in [-1, 1] on the pipeline's
        device.

    Raises:
        `ValueError`: If the timesteps do not fit the batch.
    """
    batch_size, prompts = len(batch["prompts"]), batch["prompts"]
    if timesteps.shape != (batch_size,) or timesteps.is_floating_point():
        raise ValueError(
            f"`timesteps` must be {batch_size} integers, one per pair, got shape {tuple(timesteps.shape)} and dtype "
            f"{timesteps.dtype}."
        )
    if batch_size and not 0 <= int(timesteps.min()) <= int(timesteps.max()) < pipeline.num_train_timesteps:
        raise ValueError(f"`timesteps` must lie in [0, {pipeline.num_train_timesteps}), got {timesteps.tolist()}.")
    timesteps = timesteps.to(pipeline.device)
    images = torch.stack([batch["images_0"], batch["images_1"]], dim=1).to(pipeline.device)  # (B, 2, 3, H, W)
    noisy = (timesteps > 0).nonzero().flatten()
    if len(noisy) == 0:
        return images[:, 0], images[:, 1]
    chunk = batch_size if prediction_batch_size is None else prediction_batch_size
    latents = torch.cat([pipeline.encode_images(x.flatten(0, 1), generator=generator) for x in images.split(chunk)])
    latents = latents.unflatten(0, (batch_size, 2))  # (B, 2, C, h, w)
    noise = randn_tensor(
        (batch_size, 1, *latents.shape[2:]), generator=generator, device=latents.device, dtype=latents.dtype
    ).expand_as(latents)  # one noise per pair
    images = images.clone()
    for rows in noisy.split(chunk):
        prompt_embeds = pipeline.encode_prompt(
            [prompts[row] for row in rows.tolist()], negative_prompt, height=images.shape[-2], width=images.shape[-1]
        ).repeat_interleave(2)
        pair_timesteps = timesteps[rows].repeat_interleave(2)
        noised = pipeline.add_noise(latents[rows].flatten(0, 1), noise[rows].flatten(0, 1), pair_timesteps)
        predicted = pipeline.predict_original_sample(noised, pair_timesteps, prompt_embeds, guidance_scale)
        images[rows] = pipeline.decode_latents(predicted).unflatten(0, (len(rows), 2)).to(images.dtype)
    return images[:, 0], images[:, 1]
