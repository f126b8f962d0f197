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
Write model cards: the `README.md` beside a saved model, with the recipe, the sampler, the measurements and how to load it.

The functions turn plain values into Markdown and read nothing but what they are given. Settings are named one by one and
never copied as a whole, because the arguments of a run also hold tokens and paths. Local paths do not appear.
"""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..model_cards import FOLDER, cell, hub_id, join, link, versions
from ..rewards.base import Reward
from ..rewards.publishing import RewardDescription, sections, usage
from ..step_distribution import StepRule
from .run_record import SETTINGS_OF_OPTIMIZER


PAPER = "2406.04314"
SAMPLES_NAME = "samples.json"  # written by `ImageLoggingCallback`
STRIP_NAME = r"step_(\d+)\.png"
SPO_RECIPE = (
    "learning_rate lr_scheduler_type weight_decay max_grad_norm per_device_train_batch_size "
    "gradient_accumulation_steps world_size per_device_rollout_batch_size num_candidates num_inner_steps "
    "branch_start_step branch_end_step num_branches preference_threshold pair resample beta epsilon kl_coef train_cfg "
    "timestep_weighting scoring_image_size reward_dtype bf16 fp16 seed"
).split()
REWARD_RECIPE = (
    "learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm per_device_train_batch_size "
    "gradient_accumulation_steps world_size resolution image_background guidance_scale guidance_rescale clip_skip min_timestep max_timestep timesteps "
    "eval_timesteps independent_noise only_different max_pairs_per_prompt freeze_text_tower caption_loss_coef relabel_preferences "
    "bf16 fp16 seed"
).split()
PATHS = ("dataset_name", "scoring_vae")  # settings that may be folders, which are private
SPO_LIMITATIONS = (
    "The model was trained to please its reward, on the prompts it was given: what the reward does not see (facts, text in "
    "images, who is shown and how) is that of the base model or worse, and images of one prompt may have become more "
    "alike. Samplers, guidance and prompts unlike those of the training may show less of the effect."
)


def describe_reward(reward: Any) -> str:
    """The Hub id of a reward model, what a [`Reward`] calls itself, or the name of its class or function."""
    source = hub_id(getattr(getattr(reward, "config", None), "_name_or_path", None))
    name = getattr(reward, "__name__", type(reward).__name__)
    if isinstance(reward, Reward) and reward.name != Reward.name:
        name = reward.name
    return source or f"`{name}`"


def read_samples(folder: str | Path) -> dict | None:
    """
    What [`ImageLoggingCallback`] last left in `folder/images`, or `None`.

    Returns:
        `dict` with `step` (`int`), `prompts` (`list[str]`), `images` (their files, relative to `folder`) and `strips`
        (the first and the last strip of all prompts up to that step, such as `images/step_000100.png`).
    """
    images = Path(folder) / "images"
    if not (images / SAMPLES_NAME).is_file():
        return None
    samples = json.loads((images / SAMPLES_NAME).read_text(encoding="utf-8"))
    names = [path.name for path in images.glob("step_*.png") if re.fullmatch(STRIP_NAME, path.name)]
    # A longer run before this one may have left later strips in the folder.
    names = sorted((name for name in names if _strip_step(name) <= samples["step"]), key=_strip_step)
    strips = dict.fromkeys(f"images/{name}" for name in (names[:1] + names[-1:]))
    return {**samples, "images": [f"images/{name}" for name in samples["images"]], "strips": list(strips)}


def _strip_step(name: str) -> int:
    """The optimizer step in the name of a strip."""
    return int(re.fullmatch(STRIP_NAME, Path(name).name)[1])


def spo_model_card(
    args,
    *,
    name: str,
    base_model: str | None,
    step_rule: StepRule,
    guidance: dict[str, Any] | None = None,
    denoiser_name: str = "unet",
    denoiser_class: str = "UNet2DConditionModel",
    use_lora: bool = True,
    reward_model: str | None = None,
    scoring_vae: Any = None,
    commit: str | None = None,
    vae: str | None = None,
    global_step: int = 0,
    num_pairs: int = 0,
    log_history: Iterable[dict] = (),
    parts: Sequence[dict] = (),
    samples: dict | None = None,
    tags: Iterable[str] = (),
) -> str:
    r"""
    The card of a model trained with [`SPOTrainer`].

    Args:
        args ([`SPOConfig`]): the settings of the run.
        name (`str`): heading.
        base_model (`str`, *optional*): Hub id of the base model; a local path is left out.
        step_rule ([`StepRule`]): the sampler the model was trained with.
        guidance (`dict`, *optional*): arguments that tell the diffusers pipeline guidance and negative prompt, of
            [`SPOPipeline.call_arguments`]. By default `guidance_scale` and `negative_prompt` of `args`.
        denoiser_name, denoiser_class (`str`): what was trained, and its class.
        use_lora (`bool`, *optional*, defaults to `True`): whether the folder holds a LoRA or a whole denoiser.
        reward_model (`str`, *optional*): Hub id of the reward model, or what it is in a few words.
        scoring_vae (*optional*): the network that decoded what was scored, if it was not the pipeline's VAE. By
            default the one that `args.scoring_vae` names.
        commit (`str`, *optional*): of the base model, where it was loaded from the Hub.
        vae (`str`, *optional*): Hub id or folder of the pipeline's VAE, if it is not that of the base model.
        global_step, num_pairs (`int`): length of the training.
        log_history (list of `dict`): `trainer.state.log_history`.
        parts (list of `dict`): of the [`RunRecord`], if the run was resumed with other settings.
        samples (`dict`, *optional*): what [`read_samples`] found.
        tags (iterable of `str`): tags of the trainer.

    Returns:
        `str`: Markdown with a YAML header.
    """
    # The header, for the Hub.
    base = hub_id(base_model)
    other_vae = None if vae is None else hub_id(vae) or "another one than the base model's"
    where = hub_id(args.hub_model_id) or FOLDER
    relation = "adapter" if use_lora else "finetune"
    header = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*tags, *(["lora"] if use_lora else [])],
        base_model=base,
        base_model_relation=relation if base is not None else None,
        datasets=hub_id(args.dataset_name),
        widget=_widget(samples),
    )

    # The text: what it is, samples, how to use it, and how it was trained.
    what = "LoRA" if use_lora else denoiser_class
    texts = [
        f"# {name}",
        _spo_introduction(what, global_step, num_pairs, base, commit, reward_model),
        *_gallery(samples),
        "## Use",
        f"```python\n{_spo_code(args, base, where, step_rule, guidance, denoiser_name, denoiser_class, use_lora)}\n```",
        "## Sampler",
        f"{step_rule.description(args.eta)}, {args.num_inference_steps} steps, guidance {args.guidance_scale:g}. Compare "
        "with the base model under the same sampler: guidance alone moves scores. `sampler.json` holds these settings, from "
        "which `trl-spo sample` and `trl-spo evaluate` start.",
        "## Recipe",
        _settings(
            args,
            SPO_RECIPE,
            {"vae": other_vae, "scoring_vae": _describe_scoring_vae(scoring_vae, args.scoring_vae)},
            history(parts, global_step),
        ),
        *_evaluation(log_history, ("_mean", "_std")),
        "## Limitations",
        SPO_LIMITATIONS,
        "## Versions",
        versions("diffusers", "peft", "transformers", "torch"),
    ]
    return join(header, texts)


def step_reward_model_card(
    args,
    *,
    name: str,
    base_model: str | None,
    description: RewardDescription,
    pipeline: str | None = None,
    global_step: int = 0,
    log_history: Iterable[dict] = (),
    parts: Sequence[dict] = (),
    tags: Iterable[str] = (),
) -> str:
    r"""
    The card of a reward model trained with [`StepRewardTrainer`].

    Args:
        args ([`StepRewardConfig`]): the settings of the run.
        name (`str`): heading.
        base_model (`str`, *optional*): Hub id of the model training started from; a local path is left out.
        description ([`RewardDescription`]): what the reward model says about itself.
        pipeline (`str`, *optional*): Hub id of the diffusion model whose predictions or latents it judges.
        global_step, log_history, parts, tags: as in [`spo_model_card`].

    Returns:
        `str`: Markdown with a YAML header.
    """
    # The header, for the Hub.
    base = hub_id(base_model)
    header = ModelCardData(
        library_name="trl_spo",
        tags=list(tags),
        base_model=base,
        base_model_relation="finetune" if base else None,
        datasets=hub_id(args.dataset_name),
    )

    # The text: what it judges, how to use it, and how it was trained.
    diffusion = hub_id(pipeline)
    judged = link(diffusion) if diffusion else "a diffusion model"
    texts = [
        f"# {name}",
        f"{description.title}, trained for {global_step} steps. It scores {description.scores} of {judged} "
        f"{description.timesteps}; a higher score is preferred, and only differences between images of one prompt mean "
        "something.",
        *usage(description, hub_id(args.hub_model_id)),
        "## Recipe",
        _settings(args, REWARD_RECIPE, changed=history(parts, global_step)),
        *_evaluation(log_history, ("_loss", "_accuracy", "_margin"), "/t_"),
        *sections(description, base),
        "## Versions",
        versions("transformers", "diffusers", "torch"),
    ]
    return join(header, texts)


def _describe_scoring_vae(vae: Any, name: str | None) -> str | None:
    """Its Hub id, or its class if it has none: a path is private."""
    if vae is None and name is None:
        return None
    source = name if vae is None else getattr(getattr(vae, "config", None), "_name_or_path", None)
    return hub_id(source) or f"`{'AutoencoderTiny' if vae is None else type(vae).__name__}`"


def history(parts: Sequence[dict], global_step: int) -> dict[str, str]:
    """
    The settings that changed when a run was resumed, with the steps of each value, and those that its optimizer kept.

    Args:
        parts (list of `dict`): of the [`RunRecord`]; settings that an old checkpoint does not tell are missing.
        global_step (`int`): the last step.

    Returns:
        `dict[str, str]`: such as `{"kl_coef": "12.0 (steps 1 to 6), 0.0 (steps 7 to 8)"}`.
    """
    parts = [part for part in parts if part["first_step"] <= global_step]
    names = dict.fromkeys(name for part in parts for name in part["settings"])
    told = {}
    for name in SETTINGS_OF_OPTIMIZER:  # whatever the config says by now
        kept = [part["settings"][name] for part in parts if name in part["settings"]]
        if kept:
            told[name] = kept[-1]
    for name in names:
        values = [[part["settings"].get(name, "not recorded"), part["first_step"]] for part in parts]
        runs = [values[0]] + [new for old, new in pairwise(values) if new[0] != old[0]]
        if len(runs) > 1:
            ends = [first - 1 for _, first in runs[1:]] + [global_step]
            shown = [hub_id(value) or "a local one" if name in PATHS else value for value, _ in runs]
            spans = [f"steps {first} to {end}" for (_, first), end in zip(runs, ends, strict=True)]
            told[name] = ", ".join(f"{value} ({span})" for value, span in zip(shown, spans, strict=True))
    return told


def _settings(
    args, names: list[str], more: dict[str, Any] | None = None, changed: dict[str, str] | None = None
) -> str:
    """A table of the settings that `args` has, of what is not `None` in `more`, and of what [`history`] tells."""
    settings = {name: getattr(args, name) for name in names if hasattr(args, name)}
    settings |= {name: value for name, value in (more or {}).items() if value is not None}
    settings |= changed or {}
    rows = [f"| `{name}` | {cell(value)} |" for name, value in settings.items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def _evaluation(log_history: Iterable[dict], endings: tuple[str, ...], infix: str | None = None) -> list[str]:
    """First and last evaluation, side by side."""

    def is_metric(name: str) -> bool:
        return name.startswith("eval_") and (name.endswith(endings) or (infix is not None and infix in name))

    logs = [log for log in log_history if any(map(is_metric, log))]
    if not logs:
        return []
    shown = logs if len(logs) == 1 else [logs[0], logs[-1]]
    lines = ["| metric |" + "".join(f" step {log.get('step', 0)} |" for log in shown), "|---" * (1 + len(shown)) + "|"]
    for name in filter(is_metric, shown[-1]):
        cells = [f" {log[name]:.4f} |" if name in log else " |" for log in shown]
        lines.append(f"| `{name}` |" + "".join(cells))
    return ["## Evaluation", "\n".join(lines)]


def _spo_introduction(
    what: str, global_step: int, num_pairs: int, base: str | None, commit: str | None, reward: str | None
) -> str:
    text = (
        f"{what} trained with [Step-aware Preference Optimization](https://huggingface.co/papers/{PAPER}) (SPO) for "
        f"{global_step} steps on {num_pairs} pairs."
    )
    if base:
        text += f" Base model: [{base}](https://huggingface.co/{base})" + (
            f" at commit `{commit}`." if commit else "."
        )
    if reward:
        text += f" Reward: {link(reward)}."
    return text


def _gallery(samples: dict | None) -> list[str]:
    """The images of the header's widget, and the first and last strip of samples."""
    if not samples:
        return []
    parts = ["<Gallery />", f"Samples after step {samples['step']}, one fixed seed per prompt."]
    for strip in samples["strips"]:
        step = _strip_step(strip)
        label = f"After step {step}" if step else "Before training"
        parts.append(f"{label}:\n\n![{label}]({strip})")
    return parts


def _widget(samples: dict | None) -> list[dict] | None:
    if not samples:
        return None
    pairs = zip(samples["prompts"], samples["images"], strict=True)
    return [{"text": prompt, "output": {"url": image}} for prompt, image in pairs]


def _spo_code(args, base, where, step_rule, guidance, denoiser_name, denoiser_class, use_lora) -> str:
    code = step_rule.sampling_code(args.eta)
    imports = {"DiffusionPipeline", *code.imports}
    if use_lora:
        load = f'pipe.load_lora_weights("{where}")'
    else:
        load = f'pipe.{denoiser_name} = {denoiser_class}.from_pretrained("{where}", subfolder="{denoiser_name}")'
        imports.add(denoiser_class)
    if guidance is None:
        guidance = {"guidance_scale": args.guidance_scale}
        if args.negative_prompt:
            guidance["negative_prompt"] = args.negative_prompt
    size = {name: getattr(args, name, None) for name in ("height", "width")}
    arguments = [
        'prompt="a photo of a cat"',  # by name: the first argument of some pipelines is an image
        f"num_inference_steps={args.num_inference_steps}",
        *(f"{name}={_literal(value)}" for name, value in guidance.items()),
        *code.arguments,
        *(f"{name}={value}" for name, value in size.items() if value is not None),
    ]
    return "\n".join(
        [
            f"from diffusers import {', '.join(sorted(imports))}",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{base or "path/to/the/base/model"}")',
            *code.setup,
            load,
            f"image = pipe({', '.join(arguments)}).images[0]",
        ]
    )


def _literal(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else f"{value:g}"
