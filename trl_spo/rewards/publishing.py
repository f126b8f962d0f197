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
What a reward model says about itself beside its weights, and how it gets to the Hub.

transformers saves a model without a card, writes an empty one when it pushes, and pushes folders one level deep. A reward
model is of no use to somebody who does not know which latents it judges, and keeps text encoders in folders below folders.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitInfo, HfApi, ModelCardData

from ..model_cards import FOLDER, cell, hub_id, join, link, versions


SPO_PAPER = "https://huggingface.co/papers/2406.04314"
LPO_PAPER = "https://huggingface.co/papers/2502.01051"
CARD_NAME = "README.md"
BASE = "path/to/the/base/model"
# What transformers' `save_pretrained` takes for a push, besides `token`.
PUSH_ARGUMENTS = ("push_to_hub", "repo_id", "commit_message", "commit_description", "private", "revision", "create_pr")
LIMITATIONS = (
    "It repeats the preferences of its training data, with what was in fashion there. A policy trained on it will find what "
    "it overrates; look at images, and measure with a reward that was not trained on."
)


class RewardDescription(NamedTuple):
    """
    What every card of a reward model says, whoever trained it.

    Attributes:
        title (`str`): what it is, with its paper.
        scores (`str`): what it is shown, such as "noisy latents".
        timesteps (`str`): how it knows the timestep.
        model (`str`), variable (`str`), samples (`str`): names and values of the example.
        folder (`str`): what a saved folder holds.
        facts (`dict[str, str]`): architecture, latent space, noise schedule.
        pipeline (`str`, *optional*): Hub id or path of the diffusers pipeline that loading needs, if it needs one.
    """

    title: str
    scores: str
    timesteps: str
    model: str
    variable: str
    samples: str
    folder: str
    facts: dict[str, str]
    pipeline: str | None = None

    def code(self, where: str) -> str:
        """Python that loads the model from a folder or Hub id and scores two samples."""
        lines = ["import torch"]
        argument = ""
        if self.pipeline is not None:
            lines.append("from diffusers import DiffusionPipeline")
            argument = ", pipeline=pipeline"
        lines += [f"from trl_spo import {self.model}", ""]
        if self.pipeline is not None:
            lines.append(f'pipeline = DiffusionPipeline.from_pretrained("{self.pipeline}")')
        score = f'model.score({self.variable}, ["a red cat", "a red cat"], timesteps=torch.tensor([0, 501]))'
        lines += [
            f'model = {self.model}.from_pretrained("{where}"{argument})',
            f"{self.variable} = {self.samples}",
            f"scores = {score}",
        ]
        return "\n".join(lines)

    def table(self) -> str:
        """The facts in Markdown."""
        return "\n".join(
            ["| | |", "|---|---|", *(f"| {name} | {cell(value)} |" for name, value in self.facts.items())]
        )


def step_aware_description(config: Any, image_size: int | None = None) -> RewardDescription:
    """
    Of a [`StepAwareRewardModel`].

    Args:
        config ([`StepAwareRewardModelConfig`]): of the model.
        image_size (`int`, *optional*): side in pixels of the images in the example. By default that of its CLIP.
    """
    vision = config.clip_config.vision_config
    last = config.num_train_timesteps - 1
    size = vision.image_size if image_size is None else image_size
    timesteps = "at any timestep"
    conditioning = "none: it is the CLIP it was made from at every timestep"
    if config.step_conditioning:
        timesteps = f"and takes the timestep (0 to {last}) as an input"
        conditioning = f"adaLN in every block of the vision tower; integers from 0 (the finished image) to {last}"
    return RewardDescription(
        title=f"Step-aware reward model for [Step-aware Preference Optimization]({SPO_PAPER}) (SPO)",
        scores="predictions of the finished image",
        timesteps=timesteps,
        model="StepAwareRewardModel",
        variable="images",
        samples=f"torch.rand(2, 3, {size}, {size}) * 2 - 1  # in [-1, 1]",
        folder="weights, configuration, tokenizer and image settings",
        facts={
            "architecture": (
                f"CLIP, vision tower of {vision.num_hidden_layers} layers and width {vision.hidden_size} at "
                f"{vision.image_size} pixels; score = exp(logit_scale) x cosine"
            ),
            "timestep": conditioning,
            "images": "any size, in [-1, 1]; short side to the size of the tower, centre crop",
            "noise schedule": "any: it sees predictions, not latents",
        },
    )


def latent_description(
    config: Any, sample: tuple[int, ...], has_tokenizers: bool = True, has_reader: bool = True
) -> RewardDescription:
    """
    Of a [`LatentRewardModel`].

    Args:
        config ([`LatentRewardModelConfig`]): of the model.
        sample (`tuple[int, ...]`): shape of one latent in the example.
        has_tokenizers (`bool`, *optional*, defaults to `True`): whether a UNet's tokenizers are saved.
        has_reader (`bool`, *optional*, defaults to `True`): whether a transformer's text encoders are saved.
    """
    # What it judges: the noise schedule decides what a timestep means.
    last = config.num_train_timesteps - 1
    flow = config.transformer_config is not None
    needs_pipeline = config.shared or (flow and not has_reader)
    noise = f"that of a diffusion UNet: integer timesteps from 0, the clean latent, to {last}"
    if flow:
        total = config.num_train_timesteps
        noise = f"rectified flow, x_t = (1 - t/{total}) x_0 + t/{total} noise: integer timesteps from 0 to {last}"

    # Who reads the prompts, and so what a saved folder has to hold.
    if config.text_configs:
        readers = ", ".join(text["architecture"] for text in config.text_configs)
        prompts = f"read by text encoders of its own ({readers})"
    else:
        prompts = f"read by the text encoders of a {config.pipeline_class}"
    if config.shared:
        folder = "adapter and heads, and the adapter once more as a LoRA of diffusers; the backbone is the pipeline's own denoiser"
    elif flow:
        reader = "text encoders, VAE and scheduler in `pipeline/`" if has_reader else "not the text encoders"
        folder = f"weights and configuration, {'and ' if has_reader else ''}{reader}"
    else:
        folder = f"weights and configuration, {'and ' if has_tokenizers else 'not the '}tokenizers"
    return RewardDescription(
        title=f"Latent reward model for [Latent Preference Optimization]({LPO_PAPER}) (LPO)",
        scores="noisy latents",
        timesteps=f"and takes the timestep (0 to {last}) as an input",
        model="LatentRewardModel",
        variable="latents",
        samples=f"torch.randn(2, {', '.join(map(str, sample))})  # in the scale of the denoiser",
        folder=folder,
        facts={
            "backbone": _backbone_in_words(config),
            "head": _head_in_words(config),
            "prompts": prompts,
            "latent space": _latent_space_in_words(config),
            "noise schedule": noise,
        },
        pipeline=(config.base_model or BASE) if needs_pipeline else None,
    )


def _backbone_in_words(config: Any) -> str:
    flow = config.transformer_config is not None
    network = config.transformer_config["_class_name"] if flow else "UNet2DConditionModel"
    part = "down and mid blocks"
    if flow:
        part = f"blocks 1 to {max(config.blocks)}, read behind {', '.join(map(str, config.blocks))}"
    else:
        part += f" (channels {', '.join(map(str, config.unet_config['block_out_channels']))})"
    text = f"{part} of a `{network}`"
    if config.shared:
        text += f", the policy's own under a LoRA of rank {config.peft_config.get('r', 8)}"
    return text


def _head_in_words(config: Any) -> str:
    if config.head == "query_attention":
        return (
            f"query attention, {config.num_queries} queries and {config.num_heads} heads; score = (raw + "
            f"{config.score_shift:g}) / {config.score_scale:g}"
        )
    text = f"exp(logit_scale) x cosine of projected features and text in {config.projection_dim} dimensions"
    if config.transformer_config is None:
        guided = config.guidance_scale > 1
        text += f"; the mid feature is guided with {config.guidance_scale:g}" if guided else "; nothing is guided"
    return text


def _latent_space_in_words(config: Any) -> str:
    space = config.latent_space
    if space is None:
        space = {"scaling_factor": config.scaling_factor, "shift_factor": config.shift_factor}
    numbers = [
        f"{name} {value:g}" if isinstance(value, (int, float)) else f"{name} of {len(value)} channels"
        for name, value in space.items()
        if name != "channels" and value is not None
    ]
    return ", ".join([f"{config.latent_channels} channels", *numbers]) + "; it refuses a pipeline with another"


def reward_model_card(
    description: RewardDescription,
    name: str,
    where: str | None = None,
    base_model: str | None = None,
    tags: list[str] | None = None,
) -> str:
    """
    The card of a reward model whose training is not known: what it judges, what it is made from, how to load it.

    Args:
        description ([`RewardDescription`]): of the model.
        name (`str`): heading.
        where (`str`, *optional*): Hub id that the example loads from.
        base_model (`str`, *optional*): Hub id of the model whose weights it started from; a local path is left out.
        tags (`list[str]`, *optional*): of the model.

    Returns:
        `str`: Markdown with a YAML header.
    """
    base = hub_id(base_model)
    header = ModelCardData(
        library_name="trl_spo",
        tags=list(dict.fromkeys(["trl", "spo", *(tags or [])])),
        base_model=base,
        base_model_relation="finetune" if base else None,
    )
    parts = [
        f"# {name}",
        f"{description.title}. It scores {description.scores} {description.timesteps}; a higher score is preferred, and only "
        "differences between images of one prompt mean something. How it was trained is not known here: add it.",
        *usage(description, where),
        *sections(description, base),
        "## Versions",
        versions("transformers", "diffusers", "torch"),
    ]
    return join(header, parts)


def usage(description: RewardDescription, where: str | None) -> list[str]:
    """The part of every card that says how the model is loaded."""
    return [
        "## Use",
        f"```python\n{description.code(where or FOLDER)}\n```",
        f"The folder holds {description.folder}. In training, `SPOTrainer(config, pipeline, model, ...)`.",
    ]


def sections(description: RewardDescription, base_model: str | None) -> list[str]:
    """The other parts that all cards of reward models share: what it judges, its limitations and its licence."""
    base = f"of {link(base_model)}" if base_model else "of a model that has no name on the Hub"
    return [
        "## What it judges",
        description.table(),
        "## Limitations",
        LIMITATIONS,
        "## Licence",
        f"Its weights were made from those {base}, whose licence holds for them, too; preference data have licences of their "
        "own. Name the one that results as `license` in the header before you publish.",
    ]


@contextlib.contextmanager
def published(
    model: Any, description: RewardDescription, folder: str | Path, arguments: dict[str, Any]
) -> Iterator[None]:
    """
    Around the saving of a reward model: writes its card, unless the folder has one, and pushes what was written if the
    arguments ask for it.

    Args:
        model ([`~transformers.PreTrainedModel`]): whose configuration may name a `base_model`.
        description ([`RewardDescription`]): of the model.
        folder (`str` or `Path`): where it is saved.
        arguments (`dict`): keyword arguments of `save_pretrained`; those of a push are taken out.
    """
    folder = Path(folder)
    request = {name: arguments.pop(name) for name in PUSH_ARGUMENTS if name in arguments}
    before = _times(folder)
    yield
    if not arguments.get("is_main_process", True):
        return
    pushed = request.pop("push_to_hub", False)
    token = arguments.get("token")
    repo_id = request.pop("repo_id", folder.name)
    if pushed:
        created = HfApi(token=token).create_repo(repo_id, private=request.pop("private", None), exist_ok=True)
        repo_id = created.repo_id
    card = folder / CARD_NAME
    if not card.exists():
        where = repo_id if pushed else None
        name = (where or folder.resolve().name).rsplit("/", 1)[-1]
        text = reward_model_card(description, name, where, model.config.base_model, model.model_tags)
        card.write_text(text, encoding="utf-8")
    if pushed:
        changed = [name for name, time in _times(folder).items() if before.get(name) != time]
        _push(folder, repo_id, changed, token, **request)


def _times(folder: Path) -> dict[str, int]:
    """Files of a folder and of all folders in it, and when they were written."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}


def _push(folder: Path, repo_id: str, names: list[str], token, revision: str | None = None, **arguments) -> CommitInfo:
    """One commit with these files. A card that the repository has stays, unless somebody wrote the one in the folder."""
    api = HfApi(token=token)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if CARD_NAME not in names:
        names = [*names, CARD_NAME]
    elif api.file_exists(repo_id, CARD_NAME, revision=revision):
        names = [name for name in names if name != CARD_NAME]
    message = arguments.pop("commit_message", None) or "Upload model"
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=names,
        revision=revision,
        commit_message=message,
        **arguments,
    )


class PushesWholeFolder:
    """
    Mixin before [`~transformers.PreTrainedModel`], whose pushes leave out folders in folders and replace the card by an empty
    one.
    """

    def push_to_hub(
        self, repo_id: str, *, max_shard_size: int | str = "50GB", tags: list[str] | None = None, **arguments
    ) -> None:
        r"""
        Uploads everything that `save_pretrained` writes, with a model card; one that the repository has stays.

        Args:
            repo_id (`str`):
                Name on the Hub, such as `"me/latent-reward"`. It is made if it does not exist.
            max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`):
                Largest file of weights.
            tags (`list[str]`, *optional*):
                For the card, besides those of the model.
            arguments:
                `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr` as in
                [`~transformers.PreTrainedModel.push_to_hub`].
        """
        self.add_model_tags([tags] if isinstance(tags, str) else list(tags or []))
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, max_shard_size=max_shard_size, **arguments)
