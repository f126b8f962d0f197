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
Replace human preference labels by those of a preference model such as PickScore.

The paper's SDXL reward model is trained on labels of this kind (https://huggingface.co/papers/2406.04314).
"""

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from .images import WHITE, image_to_tensor, read_image
from .preference_dataset import PreferenceColumns, find_preference_columns, leave_undecoded
from .rewards.base import is_reward_model, wrap_reward


logger = logging.getLogger(__name__)


def preference_labels(
    scores_0: torch.Tensor, scores_1: torch.Tensor, tie_band: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Labels from the scores of a preference model, as the paper's SDXL reward model is trained on those of PickScore.

    With p = softmax over the two scores, the pair is a tie (0.5 / 0.5) if |p_0 - p_1| < `tie_band`, else the higher
    score wins (1 / 0). As p_0 - p_1 = tanh(gap / 2), a band of 0.1 is a gap of 0.2007.

    Args:
        scores_0 (`torch.Tensor` of shape `(batch_size,)`):
            Scores of the first images.
        scores_1 (`torch.Tensor` of shape `(batch_size,)`):
            Scores of the second images.
        tie_band (`float`, *optional*, defaults to `0.1`):
            In [0, 1). Equal scores are a tie even with 0.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(batch_size,)`: `label_0` and `label_1`, float32.

    Raises:
        `ValueError`: If `tie_band` is out of range, or a score is not finite.
    """
    if not 0 <= tie_band < 1:
        raise ValueError(f"`tie_band` is a difference of probabilities and must lie in [0, 1), got {tie_band}.")
    gap = scores_0.float() - scores_1.float()
    if not bool(gap.isfinite().all()):
        raise ValueError("The preference model returned a score that is not finite, so there is no label.")
    difference = torch.tanh(gap / 2)  # p_0 - p_1
    label_0 = torch.where(difference.abs() < tie_band, torch.zeros_like(gap), gap.sign()) / 2 + 0.5
    return label_0, 1 - label_0


def score_clean_images(preference_model: Any, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    r"""
    Scores of finished images, for labels.

    Args:
        preference_model ([`StepAwareRewardModel`] or `Callable`):
            A reward model, asked at timestep 0 (one fresh from PickScore is PickScore), or a callable `(images
            (B, 3, H, W) in [0, 1], prompts) -> scores (B,)`.
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
            In [-1, 1].
        prompts (`list[str]`):
            One per image.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: float32.

    Raises:
        `ValueError`: If the model judges latents, or does not return one score per image.
    """
    with torch.no_grad():
        if is_reward_model(preference_model):
            reward = wrap_reward(preference_model)
            if reward.sees != "images":
                raise ValueError(
                    f"The preference model must judge images, got `{type(preference_model).__name__}`, which judges "
                    "latents. Pass a model of images such as a `StepAwareRewardModel`, or a function."
                )
            timesteps = torch.zeros(len(images), dtype=torch.long, device=images.device)
            scores = reward.score(images, reward.encode_prompts(prompts), timesteps)
        else:
            scores = preference_model((images / 2 + 0.5).clamp(0, 1), prompts)
    scores = torch.as_tensor(scores).float()
    if scores.shape != (len(prompts),):
        raise ValueError(
            f"The preference model must return one score per image, shape ({len(prompts)},), got "
            f"{tuple(scores.shape)}."
        )
    return scores


def relabel_preferences(
    dataset: Any,
    preference_model: Any,
    tie_band: float = 0.1,
    batch_size: int = 16,
    resolution: int = 512,
    prompt_column: str | None = None,
    background: str = WHITE,
) -> Any:
    r"""
    Replaces human labels by the preferences of a model, for a whole dataset at once.
    `StepRewardConfig(relabel_preferences=True)` does the same batch by batch during training; this is for looking at the
    labels, saving them, or using them twice.

    A row whose image cannot be read gets no label (`has_label` false) and is dropped by
    [`prepare_preference_dataset`].

    Args:
        dataset (`datasets.Dataset` or `list[dict]`):
            Pairs in Pick-a-Pic's format. Relabel before filtering: adding a column to a filtered dataset copies it.
        preference_model ([`StepAwareRewardModel`] or `Callable`):
            See [`score_clean_images`].
        tie_band (`float`, *optional*, defaults to `0.1`):
            See [`preference_labels`].
        batch_size (`int`, *optional*, defaults to `16`):
            Pairs per call of the model.
        resolution (`int`, *optional*, defaults to `512`):
            Side in pixels of the square images that the model is shown, as in [`StepRewardConfig`].
        prompt_column (`str`, *optional*):
            Column of the prompts.
        background (`str`, *optional*, defaults to `"white"`):
            Colour that shows through transparent images, as in [`StepRewardConfig`].

    Returns:
        The same kind of dataset, with new `label_0`, `label_1` and `has_label`; the one passed in is not changed.

    Raises:
        `ValueError`: If the dataset is a stream or not in Pick-a-Pic's format.

    Example:

    ```python
    >>> pairs = load_preference_dataset("yuvalkirstain/pickapic_v1")
    >>> pickscore = StepAwareRewardModel.from_clip(
    ...     "yuvalkirstain/PickScore_v1", processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    ... )
    >>> relabel_preferences(pairs, pickscore.to("cuda"), resolution=1024).to_parquet("relabelled.parquet")
    ```
    """
    # Refuse what cannot be relabelled, before anything is scored.
    dataset = leave_undecoded(dataset)
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            "A stream cannot be relabelled in advance; set `relabel_preferences=True` in the StepRewardConfig instead."
        )
    if len(dataset) == 0:
        raise ValueError("The preference dataset is empty.")
    columns = find_preference_columns(list(dataset[0]), prompt_column)
    if not columns.labelled:
        raise ValueError(
            "Labels can be replaced in Pick-a-Pic's format only (`jpg_0`, `jpg_1`, `label_0`, `label_1`): TRL's "
            "`chosen` and `rejected` cannot express a tie."
        )

    # Score the readable pairs in batches. A pair that cannot be read keeps its two zeros, which mean "no label".
    labels = torch.zeros(len(dataset), 2)
    pairs = _read_pairs(dataset, columns, resolution, background)
    while batch := list(islice(pairs, batch_size)):
        indices, prompts, images_0, images_1 = zip(*batch, strict=True)
        images = torch.stack([*images_0, *images_1])
        scores = score_clean_images(preference_model, images, [*prompts, *prompts]).cpu()
        labels[list(indices)] = torch.stack(preference_labels(*scores.chunk(2), tie_band), dim=-1)
    has_label = labels.sum(1) > 0
    if not bool(has_label.all()):
        logger.warning("%d of %d pairs have an unreadable image and no label.", int((~has_label).sum()), len(dataset))

    # Write them into a copy of the rows.
    values = {"label_0": labels[:, 0].tolist(), "label_1": labels[:, 1].tolist(), "has_label": has_label.tolist()}
    if isinstance(dataset, (list, tuple)):
        relabelled = []
        for index, row in enumerate(dataset):
            new_labels = {name: column[index] for name, column in values.items()}
            relabelled.append(row | new_labels)
        return relabelled
    dataset = dataset.remove_columns([name for name in values if name in dataset.column_names])
    for name, column in values.items():
        dataset = dataset.add_column(name, column)
    return dataset


def _read_pairs(dataset, columns: PreferenceColumns, resolution: int, background: str) -> Iterator[tuple]:
    """`(index, prompt, image_0, image_1)` of the readable pairs."""
    for index, row in enumerate(dataset):
        try:
            images = [image_to_tensor(read_image(row[name], background), resolution) for name in columns.images]
        except OSError:
            continue
        yield index, row[columns.prompt], *images
