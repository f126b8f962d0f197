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

"""The configuration of a step-aware reward model: [`StepAwareRewardModelConfig`]."""

import copy

from transformers import CLIPConfig, PretrainedConfig


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class StepAwareRewardModelConfig(PretrainedConfig):
    r"""
    Configuration of a [`StepAwareRewardModel`].

    Args:
        clip_config (`dict` or [`~transformers.CLIPConfig`], *optional*):
            Architecture of the underlying CLIP. Defaults to transformers' default CLIP (ViT-B/32). The paper uses
            ViT-H/14.
        step_conditioning (`bool`, *optional*, defaults to `True`):
            Whether the timestep reaches the vision tower. With `False` the modulation is skipped and timesteps are
            ignored: the "no step condition" ablation of the paper (PickScore 21.19 against 21.43).
        image_mean (`list[float]`, *optional*):
            Channel means of the CLIP image preparation. Defaults to OpenAI's.
        image_std (`list[float]`, *optional*):
            Channel standard deviations of the CLIP image preparation. Defaults to OpenAI's.
        num_train_timesteps (`int`, *optional*, defaults to `1000`):
            Timesteps must lie in `[0, num_train_timesteps)`.
        frequency_embedding_size (`int`, *optional*, defaults to `256`):
            Width of the sinusoidal timestep embedding. Even.
        max_period (`int`, *optional*, defaults to `10000`):
            Longest period of the sinusoidal timestep embedding.
        base_model (`str`, *optional*):
            Hub id of the model whose weights it started from, for the model card.
    """

    model_type = "step_aware_reward_model"
    sub_configs = {"clip_config": CLIPConfig}

    def __init__(
        self,
        clip_config=None,
        step_conditioning=True,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        num_train_timesteps=1000,
        frequency_embedding_size=256,
        max_period=10000,
        base_model=None,
        **kwargs,
    ):
        if clip_config is None:
            clip_config = CLIPConfig()
        elif isinstance(clip_config, dict):
            clip_config = CLIPConfig(**clip_config)
        elif not isinstance(clip_config, CLIPConfig):
            raise ValueError(f"`clip_config` must be a dict or a CLIPConfig, got {type(clip_config).__name__}.")
        if frequency_embedding_size % 2 != 0:
            raise ValueError(f"`frequency_embedding_size` must be even, got {frequency_embedding_size}.")
        if len(image_mean) != 3 or len(image_std) != 3 or min(image_std) <= 0:
            raise ValueError(
                "`image_mean` and `image_std` need one number per RGB channel, the latter above 0, got "
                f"{list(image_mean)} and {list(image_std)}."
            )
        # The dtype of the model is kept in this configuration alone: from a CLIP that was saved in half precision,
        # transformers would build the towers in that dtype, whatever the dtype of the weights is by now.
        self.clip_config = copy.deepcopy(clip_config)
        for part in (self.clip_config, self.clip_config.text_config, self.clip_config.vision_config):
            part.dtype = None
        self.step_conditioning = step_conditioning
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.num_train_timesteps = num_train_timesteps
        self.frequency_embedding_size = frequency_embedding_size
        self.max_period = max_period
        self.base_model = base_model
        super().__init__(**kwargs)

    @property
    def image_size(self) -> int:
        """Side in pixels of the square image that the vision tower sees."""
        return self.clip_config.vision_config.image_size
