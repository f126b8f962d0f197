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

"""Which files, folders and repositories the arguments of each command name."""

from typing import Any

from ..prompt_suites import find_suite
from .hub import Named


def of_pipeline(arguments: Any, further: dict | None) -> list[Named]:
    """
    The pipeline and its parts.

    Args:
        arguments (`PipelineArguments`)
        further (`dict`, *optional*): `model_init_kwargs`, which go before the arguments.
    """
    further = further or {}
    revision = further.get("revision", arguments.revision)
    found = [
        Named(
            "model_name_or_path",
            arguments.model_name_or_path,
            "diffusers pipeline",
            "model_index.json",
            revision=revision,
        )
    ]
    vae = further.get("vae", arguments.vae_name_or_path)
    if isinstance(vae, str):
        found.append(Named("vae_name_or_path", vae, "VAE", "config.json"))
    return found


def of_reward(arguments: Any) -> list[Named]:
    """The files of the reward model that `RewardModelArguments` name: those of the form that is used."""
    if getattr(arguments, "reward", None):  # functions by name
        return []
    if arguments.reward_model_name_or_path is not None:
        return [Named("reward_model_name_or_path", arguments.reward_model_name_or_path, "reward model", "config.json")]
    found = []
    if arguments.reward_checkpoint is not None:
        file = arguments.reward_checkpoint_filename
        found.append(Named("reward_checkpoint", arguments.reward_checkpoint, "reward checkpoint", file=file))
    if arguments.reward_type == "step_aware":
        found.append(Named("clip_name_or_path", arguments.clip_name_or_path, "CLIP", "config.json"))
        found.append(Named("processor_name_or_path", arguments.processor_name_or_path, "tokenizer of the CLIP"))
    return found


def of_data(option: str, name: str | None, kind: str = "prompts") -> list[Named]:
    """A data set, if one is named. Of a suite of prompts this is its repository; GitHub's are not asked for."""
    if name is None:
        return []
    suite, folder = find_suite(name)
    if suite is None or folder is not None:
        return [Named(option, name, kind, is_dataset=True)]
    if suite.is_on_github:
        return []
    return [
        Named(option, suite.repository, kind, is_dataset=True, revision=suite.revision, file=next(iter(suite.files)))
    ]


def of_decoder(name: str | None) -> list[Named]:
    """The small decoder for scoring, if one is named."""
    return [] if name is None else [Named("scoring_vae", name, "AutoencoderTiny", "config.json")]


def of_lora(name: str | None) -> list[Named]:
    """A LoRA, if one is named; a folder of it may have any file."""
    return [] if name is None else [Named("lora", name, "LoRA")]
