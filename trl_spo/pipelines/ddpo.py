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

"""TRL's DDPO interface: its own classes where TRL has them, the same names elsewhere."""

from dataclasses import dataclass
from typing import Any

import torch


try:  # TRL <= 0.23.1
    from trl.models.modeling_sd_base import DDPOPipelineOutput, DDPOSchedulerOutput, DDPOStableDiffusionPipeline
except ImportError:

    @dataclass
    class DDPOPipelineOutput:
        """
        Output of a DDPO pipeline call.

        Attributes:
            images (`torch.Tensor`, `np.ndarray` or list of `PIL.Image.Image`): generated images.
            latents (list of `torch.Tensor`): x_T, ..., x_0, each `(batch_size, channels, height, width)`.
            log_probs (list of `torch.Tensor`): one `(batch_size,)` tensor per step.
        """

        images: Any
        latents: list
        log_probs: list

    @dataclass
    class DDPOSchedulerOutput:
        """
        Output of one DDPO scheduler step.

        Attributes:
            latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`): x_{t-1}.
            log_probs (`torch.Tensor` of shape `(batch_size,)`): its log-probability, mean over dimensions.
        """

        latents: torch.Tensor
        log_probs: torch.Tensor

    class DDPOStableDiffusionPipeline:
        """The interface TRL's `DDPOTrainer` trains against (TRL <= 0.23.1): read-only components, and methods."""

        def _missing(self, *args, **kwargs):
            raise NotImplementedError(f"`{type(self).__name__}` does not offer this member of the DDPO interface.")

        unet = vae = tokenizer = text_encoder = scheduler = autocast = property(_missing)
        __call__ = scheduler_step = set_progress_bar_config = save_pretrained = _missing
        get_trainable_layers = save_checkpoint = load_checkpoint = _missing
