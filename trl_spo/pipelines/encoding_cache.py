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

"""Cache the encodings of prompts and images, so that frozen encoders see each of them once: [`EncodingCache`]."""

from collections import OrderedDict
from typing import Any

import torch

from .conditioning import PromptEmbeds


class EncodingCache:
    r"""
    Keeps the encodings of images and prompts by frozen networks, so that seeing them again costs nothing.

    Of an image it keeps mean and standard deviation of the VAE's posterior, in main memory, and not a latent: every use
    still draws its own sample, with the same random numbers as without the cache. Once `max_bytes` are taken, new
    images are not kept, and nothing is evicted: epochs are reshuffled, so evicting the oldest entry would often drop an
    image just before it is needed again. Of prompts it keeps the most recently used. The negative prompt of a run is
    encoded once, not beside every prompt, in families with `negative_is_optional`.

    Every image and every prompt is encoded alone, in a batch of one. So what is in the cache changes no bit of a run:
    one that is resumed with an empty cache is the same run. Against a run without the cache, which encodes whole
    batches, rounding may differ in the last bits, as it does for another batch size.

    Args:
        max_bytes (`int`, *optional*, defaults to `8 * 2**30`):
            Memory for images. One of 512 pixels takes 128 KiB with a float32 VAE, one of 1024 four times that; half
            precision takes half.
        max_prompts (`int`, *optional*, defaults to `1024`):
            Prompts to keep, on the pipeline's device, or on the CPU if its text encoders are offloaded.
        max_prompt_bytes (`int`, *optional*, defaults to `2**30`):
            Memory for prompts. Those of large text encoders take megabytes each; the oldest go first.

    Attributes:
        num_bytes (`int`): memory taken by images.
        num_images_encoded (`int`), num_prompts_encoded (`int`): how often a network had to run.
    """

    def __init__(self, max_bytes: int = 8 * 2**30, max_prompts: int = 1024, max_prompt_bytes: int = 2**30):
        self.max_bytes = max_bytes
        self.max_prompts = max_prompts
        self.max_prompt_bytes = max_prompt_bytes
        self._prompt_bytes = 0
        self.num_bytes = self.num_images_encoded = self.num_prompts_encoded = 0
        self._posteriors: dict[str, torch.Tensor] = {}
        self._prompts: OrderedDict[tuple, PromptEmbeds] = OrderedDict()
        self._negative: tuple[tuple, PromptEmbeds] | None = None  # the latest, which is the only one of a run

    @torch.no_grad()
    def encode_images(
        self, pipeline: Any, images: torch.Tensor, keys: list[str], generator: torch.Generator | None = None
    ) -> torch.Tensor:
        r"""
        What `pipeline.encode_images(images, generator)` returns: latents drawn from the posterior.

        Args:
            pipeline:
                An SPO pipeline.
            images (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
                In [-1, 1], on the device where latents are wanted.
            keys (`list[str]`):
                One per image: equal keys stand for equal images.
            generator (`torch.Generator`, *optional*):
                Source of the sampling noise.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, latent_height, latent_width)`.
        """
        parts = [self._posterior(pipeline, image, key) for image, key in zip(images, keys, strict=True)]
        mean, std = torch.stack(parts, dim=1).to(images.device)  # each (B, C, h, w)
        return pipeline.draw_latents(mean, std, generator)

    def _posterior(self, pipeline, image: torch.Tensor, key: str) -> torch.Tensor:
        """Mean and standard deviation, shape (2, C, h, w), on the CPU."""
        if key in self._posteriors:
            return self._posteriors[key]
        value = torch.cat(pipeline.image_posterior(image[None])).cpu()
        self.num_images_encoded += 1
        if self.num_bytes + value.nbytes <= self.max_bytes:
            self._posteriors[key] = value
            self.num_bytes += value.nbytes
        return value

    def encode_prompts(self, pipeline: Any, prompts: list[str], negative_prompt: str = "", **size) -> PromptEmbeds:
        r"""
        What `pipeline.encode_prompt(prompts, negative_prompt, **size)` returns.

        Args:
            pipeline:
                An SPO pipeline.
            prompts (`list[str]`):
                Prompts, repeats allowed.
            negative_prompt (`str`, *optional*, defaults to `""`):
                Prompt of the unconditional half of the guidance.
            size:
                `height` and `width` of the images.

        Returns:
            [`PromptEmbeds`], one row per prompt.
        """
        keys = [(prompt, negative_prompt, pipeline.clip_skip, *sorted(size.items())) for prompt in prompts]
        # Encode the prompts that are not in the cache, all while the text encoders are on the device.
        missing = {key: key[0] for key in keys if key not in self._prompts}
        home = "cpu" if pipeline.offload_text_encoders else pipeline.device
        fresh = {}
        if missing:
            with pipeline.encoders_on_device():
                for key, prompt in missing.items():
                    fresh[key] = self._encode_prompt(pipeline, prompt, negative_prompt, size, home)
            self.num_prompts_encoded += len(missing)

        # Collect all rows before any is kept: keeping one may drop another.
        rows = [fresh[key] if key in fresh else self._prompts[key] for key in keys]
        for key, row in zip(keys, rows, strict=True):
            self._keep(key, row)
        return PromptEmbeds.cat(rows).to(pipeline.device)

    def _encode_prompt(self, pipeline, prompt: str, negative_prompt: str, size: dict, home) -> PromptEmbeds:
        """One row on the device `home`. The negative half comes from an earlier row, if the family encodes it separately."""
        half = (id(pipeline), negative_prompt, pipeline.clip_skip, *sorted(size.items()))
        if (
            getattr(pipeline, "negative_is_optional", False)
            and self._negative is not None
            and self._negative[0] == half
        ):
            row = pipeline.encode_prompt([prompt], None, **size).to(home)
            return row.with_negative_of(self._negative[1].to(home))
        row = pipeline.encode_prompt([prompt], negative_prompt, **size).to(home)
        self._negative = (half, row)
        return row

    @torch.no_grad()
    def encode_texts(self, reward_model: Any, prompts: list[str]) -> Any:
        r"""
        What `reward_model.encode_prompts(prompts)` returns, for a model whose text encoders are not trained.

        Args:
            reward_model:
                A reward model; one cache serves one of them.
            prompts (`list[str]`):
                Prompts, repeats allowed.

        Returns:
            Text features, one row per prompt: a tensor or [`PromptEmbeds`].
        """
        rows = []
        for prompt in prompts:
            key = ("text of the reward model", prompt)
            if key not in self._prompts:
                self._keep(key, reward_model.encode_prompts([prompt]))
                self.num_prompts_encoded += 1
            self._prompts.move_to_end(key)
            rows.append(self._prompts[key])
        return torch.cat(rows) if torch.is_tensor(rows[0]) else PromptEmbeds.cat(rows)

    def _keep(self, key: tuple, row: PromptEmbeds) -> None:
        """Make a row the most recent one, and drop the oldest where there are too many or they are too large."""
        if key not in self._prompts:
            self._prompts[key] = row
            self._prompt_bytes += row.nbytes
        self._prompts.move_to_end(key)
        while len(self._prompts) > self.max_prompts or (
            self._prompt_bytes > self.max_prompt_bytes and len(self._prompts) > 1
        ):
            _, dropped = self._prompts.popitem(last=False)
            self._prompt_bytes -= dropped.nbytes
