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
Convert the parts of a script for TRL's DDPO (reward function, prompt function, `DDPOConfig`) for [`SPOTrainer`].

DDPO is the trainer of TRL <= 0.23.1 (https://huggingface.co/papers/2305.13301). Nothing here imports it: the functions
ask only for what the objects offer, so they also serve code that was written for DDPO and runs on a newer TRL. For the
pipelines no adapter is needed: [`wrap_pipeline`] takes TRL's, and TRL's trainer takes ours.
"""

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers.utils import is_torch_tf32_available

from .spo_config import SPOConfig


logger = logging.getLogger(__name__)

# DDPOConfig -> SPOConfig, settings that mean the same and keep their value.
_SAME = {
    "seed": "seed",
    "push_to_hub": "push_to_hub",
    "sample_num_steps": "num_inference_steps",
    "sample_eta": "eta",
    "sample_guidance_scale": "guidance_scale",
    "sample_batch_size": "per_device_rollout_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "train_learning_rate": "learning_rate",
    "train_adam_beta1": "adam_beta1",
    "train_adam_beta2": "adam_beta2",
    "train_adam_epsilon": "adam_epsilon",
    "train_adam_weight_decay": "weight_decay",
    "train_gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_max_grad_norm": "max_grad_norm",
    "train_cfg": "train_cfg",
    "num_checkpoint_limit": "save_total_limit",
}


# Settings whose value is translated by `spo_config_from_ddpo`.
_TRANSLATED = {
    "run_name",
    "log_with",
    "mixed_precision",
    "allow_tf32",
    "negative_prompts",
    "train_use_8bit_adam",
    "project_kwargs",
}


def reward_from_ddpo(
    reward_function: Callable, metadata: dict[str, Any] | Callable[[str], Any] | None = None, scale: float = 1.0
) -> Callable:
    r"""
    Turn a reward function of TRL's `DDPOTrainer` into one for [`SPOTrainer`].

    Both trainers hand over images of shape `(batch_size, 3, height, width)` with values in [0, 1], so a function that
    converts to uint8 itself works unchanged. Two things differ. DDPO scores finished images; SPO scores the x_0 that is
    predicted at every branching step, blurry at first, and a DDPO reward does not know the timestep. (Let it judge later
    steps with a larger `branch_start_step`, or clearer ones with a larger `num_inner_steps`.) And DDPO standardises
    rewards, while SPO reads score differences: a pair counts if the gap exceeds `2 * atanh(preference_threshold)`,
    0.62 by default. Set `scale` to the number that makes typical differences about 1.

    Args:
        reward_function (`Callable`):
            `(images, prompts: tuple[str], prompt_metadata: tuple) -> (rewards, reward_metadata)`, with one reward per
            image as a tensor, array or list. The reward metadata is not used.
        metadata (`dict` or `Callable`, *optional*):
            Prompt metadata by prompt, for reward functions that read it: what [`prompts_from_ddpo`] returns with
            `return_metadata=True`, or a function of the prompt. Every prompt gets `{}` by default.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor on the rewards.

    Returns:
        `Callable`: `(images (B, 3, H, W) in [0, 1], prompts: list[str], timesteps (B,)) -> rewards (B,)`, float32.

    Raises:
        TypeError: if `reward_function` is not callable or, in a call, does not return a pair.
        ValueError: in a call, for a wrong number of rewards.
        KeyError: in a call, for a prompt that `metadata` does not list.

    Example:

    ```python
    >>> prompts, metadata = prompts_from_ddpo(prompt_function, num_prompts=256, return_metadata=True)
    >>> reward = reward_from_ddpo(reward_function, metadata)
    >>> trainer = SPOTrainer(SPOConfig(output_dir="out"), pipeline, reward, train_dataset=prompts)
    ```
    """
    if not callable(reward_function):
        raise TypeError(
            "`reward_function` must be a callable `(images, prompts, prompt_metadata) -> (rewards, metadata)`, got "
            f"`{type(reward_function).__name__}`."
        )

    # DDPO passes metadata along with each prompt; here they are found by the prompt's text.
    def metadata_of(prompt: str) -> Any:
        if metadata is None:
            return {}
        if callable(metadata):
            return metadata(prompt)
        if prompt not in metadata:
            raise KeyError(
                f"`metadata` has no entry for the prompt {prompt!r}; add it, or pass a function of the prompt."
            )
        return metadata[prompt]

    # The call itself: DDPO's arguments in, one checked tensor of rewards out.
    def reward(images: torch.Tensor, prompts: list[str], timesteps: torch.Tensor) -> torch.Tensor:
        result = reward_function(images, tuple(prompts), tuple(metadata_of(prompt) for prompt in prompts))
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise TypeError(
                "A DDPO reward function returns the pair `(rewards, metadata)`, this one returned a "
                f"`{type(result).__name__}`. Pass functions that return scores alone to `SPOTrainer` as they are."
            )
        rewards = torch.as_tensor(result[0]).detach().to(images.device, torch.float32)
        if rewards.numel() != len(images):
            raise ValueError(
                f"The DDPO reward function must return one reward per image, {len(images)}; got shape "
                f"{tuple(rewards.shape)}."
            )
        return scale * rewards.reshape(-1)

    return reward


def prompts_from_ddpo(
    prompt_function: Callable[[], tuple[str, Any]], num_prompts: int, seed: int = 0, return_metadata: bool = False
) -> list[str] | tuple[list[str], dict[str, Any]]:
    """
    Draw the prompts of an [`SPOTrainer`] from a prompt function of TRL's `DDPOTrainer`.

    DDPO draws new prompts all the time, [`SPOTrainer`] has a fixed list and goes through it once per epoch. Prompts
    that are drawn twice stay in the list twice, so that each has the weight the function gives it.

    Args:
        prompt_function (`Callable`): `() -> (prompt, prompt_metadata)`.
        num_prompts (`int`): number of draws.
        seed (`int`, *optional*, defaults to `0`):
            Seeds `random`, NumPy and PyTorch for the draws; their states are put back afterwards.
        return_metadata (`bool`, *optional*, defaults to `False`): also return the metadata, for [`reward_from_ddpo`].

    Returns:
        `list[str]`, and with `return_metadata` a `dict` from prompt to metadata.

    Raises:
        TypeError: if `prompt_function` does not return a pair that begins with a string.
        ValueError: if `num_prompts` is not positive, or a prompt comes with two different metadata.
    """
    if num_prompts < 1:
        raise ValueError(f"`num_prompts` must be at least 1, got {num_prompts}.")
    # Prompt functions draw from the global generators: seed them for the draws, and put their states back.
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed)
            torch.random.default_generator.manual_seed(seed)
            draws = [prompt_function() for _ in range(num_prompts)]
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)

    # Check what was drawn; SPO identifies a prompt by its text, so its metadata must be unique.
    for draw in draws:
        if not isinstance(draw, (tuple, list)) or len(draw) != 2 or not isinstance(draw[0], str):
            raise TypeError(f"A DDPO prompt function returns `(prompt, metadata)` with a string first, got {draw!r}.")
    prompts = [str(prompt) for prompt, _ in draws]  # NumPy's choice gives its own type of string
    if not return_metadata:
        return prompts
    metadata = {}
    for prompt, (_, value) in zip(prompts, draws, strict=True):
        if prompt in metadata and metadata[prompt] != value:
            raise ValueError(
                f"The prompt {prompt!r} was drawn with two different metadata, {metadata[prompt]!r} and {value!r}; SPO "
                "knows a prompt by its text. Make the texts differ."
            )
        metadata[prompt] = value
    return prompts, metadata


def spo_config_from_ddpo(ddpo_config: Any, output_dir: str, **overrides) -> SPOConfig:
    """
    Turn a `DDPOConfig` of TRL into an [`SPOConfig`].

    | DDPOConfig | SPOConfig | |
    |---|---|---|
    | `sample_num_steps`, `sample_eta`, `sample_guidance_scale` | `num_inference_steps`, `eta`, `guidance_scale` | |
    | `sample_batch_size` | `per_device_rollout_batch_size` | prompts per device |
    | `train_batch_size` | `per_device_train_batch_size` | whole trajectories there, pairs of single steps here |
    | `train_gradient_accumulation_steps` | `gradient_accumulation_steps` | DDPO multiplies it by the steps of a trajectory |
    | `train_learning_rate`, `train_adam_*`, `train_max_grad_norm` | `learning_rate`, `adam_*`, `weight_decay`, `max_grad_norm` | |
    | `train_use_8bit_adam` | `optim="adamw_bnb_8bit"` | |
    | `train_cfg` | `train_cfg` | |
    | `negative_prompts` | `negative_prompt` | DDPO reads it as one text too, commas included |
    | `mixed_precision` | `fp16`, `bf16` | DDPO also casts the frozen weights; here they keep the dtype they were loaded in |
    | `allow_tf32` | `tf32` | only where the hardware has it |
    | `log_with` | `report_to` | |
    | `seed`, `run_name`, `push_to_hub` | the same | |
    | `project_kwargs["total_limit"]`, `num_checkpoint_limit` | `save_total_limit` | the first of them that is set |

    `branch_start_step`, which DDPO does not have, keeps the paper's first branching timestep: a fifth of the steps.

    `num_epochs` is not carried over: an epoch of DDPO is `sample_num_batches_per_epoch * sample_batch_size` freshly
    drawn prompts per device, an epoch of SPO is one pass over all prompts. To see as many prompts as the DDPO run would,
    draw `num_epochs` times that number (times the devices) with [`prompts_from_ddpo`], and set `num_train_epochs=1`.

    Args:
        ddpo_config (`DDPOConfig`): or any object with some of its attributes.
        output_dir (`str`): where SPO writes; DDPO has its own ways with `project_kwargs`.
        overrides: fields of [`SPOConfig`]; they win over what `ddpo_config` says.

    Returns:
        [`SPOConfig`]. One warning lists the settings of `ddpo_config` that have no counterpart.

    Raises:
        TypeError: if `ddpo_config` has none of the settings of a `DDPOConfig`.
        ValueError: for a value that SPO cannot have, such as `sample_eta=0` or `mixed_precision="fp8"`.
    """
    given = dict(vars(ddpo_config)) if hasattr(ddpo_config, "__dict__") else {}
    if not any(name.startswith("sample_") for name in given):
        raise TypeError(
            "`ddpo_config` must have attributes of TRL's `DDPOConfig` such as `sample_num_steps`, got "
            f"`{type(ddpo_config).__name__}`."
        )

    # Copy settings that mean the same, then translate those that SPO expresses differently.
    settings = {new: given[old] for old, new in _SAME.items() if old in given}
    if "num_inference_steps" in settings:
        settings["branch_start_step"] = settings["num_inference_steps"] // 5
    if given.get("run_name"):
        settings["run_name"] = given["run_name"]
    if "log_with" in given:
        settings["report_to"] = given["log_with"] or "none"
    precision = given.get("mixed_precision") or "no"
    if precision not in ("no", "fp16", "bf16"):
        raise ValueError(f"`mixed_precision` must be 'no', 'fp16' or 'bf16', got {precision!r}.")
    settings["fp16"] = precision == "fp16"
    settings["bf16"] = precision == "bf16"
    if given.get("allow_tf32") and is_torch_tf32_available():
        settings["tf32"] = True
    settings["negative_prompt"] = _one_negative_prompt(given.get("negative_prompts"))
    if given.get("train_use_8bit_adam"):
        settings["optim"] = "adamw_bnb_8bit"
    project = dict(given.get("project_kwargs") or {})
    if project.get("total_limit") is not None:
        settings["save_total_limit"] = project["total_limit"]

    # Warn about settings without a counterpart.
    unused = [name for name in given if name not in _SAME and name not in _TRANSLATED]
    unused += [f"project_kwargs[{key!r}]" for key in project if key != "total_limit"]
    if unused:
        logger.warning(
            f"These settings of the `{type(ddpo_config).__name__}` have no counterpart in `SPOConfig` and are not used: "
            f"{', '.join(unused)}. (An epoch of SPO is one pass over the prompts, see `num_train_epochs`.)"
        )
    return SPOConfig(output_dir=output_dir, **{**settings, **overrides})


def _one_negative_prompt(negative: str | list[str] | None) -> str:
    if isinstance(negative, (list, tuple)) and len(negative) == 1:
        negative = negative[0]
    if negative is None or isinstance(negative, str):
        return negative or ""
    raise ValueError(f"`negative_prompts` must be one text for all prompts, got {negative!r}; join them into one.")
