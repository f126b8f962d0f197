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

"""Step-aware Preference Optimization of diffusion models, beside TRL's DDPO. Names are imported on first use."""

import importlib
from typing import TYPE_CHECKING


__version__ = "0.1.0"

_import_structure = {
    "training.decline": ["StopOnDecline"],
    "training.ema": ["EMACallback"],
    "training.log_lines": ["LogLineCallback"],
    "training.stopping": ["StopOnSignalCallback"],
    "ddpo_interop": ["prompts_from_ddpo", "reward_from_ddpo", "spo_config_from_ddpo"],
    "evaluation.evaluate": ["evaluate_pipeline"],
    "evaluation.protocols": ["PROTOCOLS", "EvaluationProtocol"],
    "export": ["merge_lora"],
    "kohya": ["export_comfyui", "export_kohya"],
    "evaluation.metrics": ["load_metric"],
    "evaluation.named": ["load_metrics", "load_reward"],
    "rewards.latent": ["LatentRewardModel"],
    "rewards.latent_config": ["LatentRewardModelConfig"],
    "rewards.base": ["Reward", "wrap_reward"],
    "rewards.weighted": ["WeightedReward"],
    "rewards.step_aware_clip": ["StepAwareRewardModel"],
    "rewards.step_aware_config": ["StepAwareRewardModelConfig"],
    "pair_selection": ["PairSelection", "select_pairs"],
    "pipelines.auto": ["wrap_pipeline"],
    "pipelines.flux": ["SPOFluxPipeline"],
    "pipelines.flux2": ["SPOFlux2KleinPipeline"],
    "pipelines.qwen_image": ["SPOQwenImagePipeline"],
    "pipelines.stable_diffusion_3": ["SPOStableDiffusion3Pipeline"],
    "pipelines.z_image": ["SPOZImagePipeline"],
    "pipelines.stable_diffusion": ["SPOStableDiffusionPipeline"],
    "pipelines.stable_diffusion_xl": ["SPOStableDiffusionXLPipeline"],
    "rollout_settings": ["RolloutSettings"],
    "rollout": ["stepwise_rollout"],
    "step_pairs": ["StepPairs"],
    "scheduling_ddim": ["ddim_step_stats"],
    "scheduling_flow": ["flow_step_stats"],
    "spo_config": ["SPOConfig"],
    "losses": ["spo_loss", "step_preference_loss"],
    "spo_trainer": ["SPOTrainer"],
    "step_distribution": ["gaussian_log_prob"],
    "step_reward_config": ["StepRewardConfig"],
    "step_reward_trainer": ["StepRewardTrainer"],
}

if TYPE_CHECKING:
    from .ddpo_interop import prompts_from_ddpo, reward_from_ddpo, spo_config_from_ddpo
    from .evaluation.evaluate import evaluate_pipeline
    from .evaluation.metrics import load_metric
    from .evaluation.named import load_metrics, load_reward
    from .evaluation.protocols import PROTOCOLS, EvaluationProtocol
    from .export import merge_lora
    from .kohya import export_comfyui, export_kohya
    from .losses import spo_loss, step_preference_loss
    from .pair_selection import PairSelection, select_pairs
    from .pipelines.auto import wrap_pipeline
    from .pipelines.flux import SPOFluxPipeline
    from .pipelines.flux2 import SPOFlux2KleinPipeline
    from .pipelines.qwen_image import SPOQwenImagePipeline
    from .pipelines.stable_diffusion import SPOStableDiffusionPipeline
    from .pipelines.stable_diffusion_3 import SPOStableDiffusion3Pipeline
    from .pipelines.stable_diffusion_xl import SPOStableDiffusionXLPipeline
    from .pipelines.z_image import SPOZImagePipeline
    from .rewards.base import Reward, wrap_reward
    from .rewards.latent import LatentRewardModel
    from .rewards.latent_config import LatentRewardModelConfig
    from .rewards.step_aware_clip import StepAwareRewardModel
    from .rewards.step_aware_config import StepAwareRewardModelConfig
    from .rewards.weighted import WeightedReward
    from .rollout import stepwise_rollout
    from .rollout_settings import RolloutSettings
    from .scheduling_ddim import ddim_step_stats
    from .scheduling_flow import flow_step_stats
    from .spo_config import SPOConfig
    from .spo_trainer import SPOTrainer
    from .step_distribution import gaussian_log_prob
    from .step_pairs import StepPairs
    from .step_reward_config import StepRewardConfig
    from .step_reward_trainer import StepRewardTrainer
    from .training.decline import StopOnDecline
    from .training.ema import EMACallback
    from .training.log_lines import LogLineCallback
    from .training.stopping import StopOnSignalCallback

_module_of = {name: module for module, names in _import_structure.items() for name in names}
__all__ = [*_module_of, "__version__"]


def __getattr__(name: str):
    """Import the module of a public name when the name is first used (PEP 562)."""
    if name not in _module_of:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_module_of[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
