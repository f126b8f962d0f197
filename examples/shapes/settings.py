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
The settings of the shapes world that the demo and the comparison of methods share, so that both train the same thing.
"""

from pathlib import Path

from peft import LoraConfig

from . import world


CLIP = Path(__file__).parent / "weights" / "clip"
SAMPLER = {"num_inference_steps": 10, "guidance_scale": 1.0}

# Fields of `StepRewardConfig`.
REWARD_SETTINGS = {
    "resolution": world.IMAGE_SIZE,
    "guidance_scale": SAMPLER["guidance_scale"],
    "timesteps": [0, 1, 101, 201, 301, 401, 501, 601, 701],  # those that SPO asks for
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "warmup_steps": 10,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "caption_loss_coef": 0.5,  # preferences alone would let it forget the captions
}

REWARD_STEPS = 150  # optimizer steps

# Fields of `SPOConfig`.
SPO_SETTINGS = {
    "branch_start_step": 2,  # before that, a reward model of this size can hardly tell predictions apart
    "branch_end_step": 8,  # the step before the last has 50 times the loss weight and nothing to learn
    "num_candidates": 4,
    "per_device_rollout_batch_size": 32,
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-4,
    "kl_coef": 12.0,  # holds alignment: of the drift, the part that no preference asks for dies out
    "preference_threshold": 0.1,
}


# What differs for the flow-matching model.
FLOW_REWARD_SETTINGS = {**REWARD_SETTINGS, "timesteps": [0, 1, 112, 223, 334, 445, 556, 667, 778]}
FLOW_SPO_SETTINGS = {
    **SPO_SETTINGS,
    "branch_start_step": 2,
    "branch_end_step": 8,
    "timestep_weighting": "even",  # sensitivities of the steps differ much more than those of DDIM
}


# What differs for a latent reward model, which judges noisy latents at every step.
LATENT_REWARD_STEPS = 200  # less CPU time than the steps of the other one, which predicts and decodes
LATENT_TIMESTEPS = {
    "unet": [0, 1, 101, 201, 301, 401, 501, 601, 701, 801],
    "flow": [0, 112, 223, 334, 445, 556, 667, 778, 889],
}


def latent_reward_settings(model: str) -> dict:
    """Fields of `StepRewardConfig` for a latent reward model of the `"unet"` or of the `"flow"` model."""
    return {
        **REWARD_SETTINGS,
        "timesteps": LATENT_TIMESTEPS[model],
        "caption_loss_coef": 2.0,  # its backbone has never seen a caption and a picture that do not belong together
        "cache_latents": True,
    }


def latent_spo_settings(model: str) -> dict:
    """Fields of `SPOConfig` with such a reward: the steps with most noise branch, which a pixel reward cannot judge."""
    settings = FLOW_SPO_SETTINGS if model == "flow" else SPO_SETTINGS
    return {**settings, "branch_start_step": 0, "branch_end_step": 4}


def lora_config() -> LoraConfig:
    """The adapter: rank 8 on every attention projection."""
    return LoraConfig(
        r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]
    )
