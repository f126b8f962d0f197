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
The text of `--help`: the options of the command in groups, then the options of training that most runs need,
and with `--help all` the rest of transformers' `TrainingArguments`.

One table says which group an option is in. Options that it does not name, such as those of another dataclass, come
under "more options"; so nothing of ours is left out when an option is added.
"""

import argparse
from collections.abc import Collection, Iterable

from transformers import TrainingArguments


# Title -> options. A command shows those that it has, in this order.
GROUPS = {
    "model": "model_name_or_path vae_name_or_path dtype variant revision model_init_kwargs base base_model_name_or_path",
    "LoRA": "use_peft lora_r lora_alpha lora_target_modules lora_init lora lora_scale",
    "reward": "reward_model_name_or_path reward reward_type reward_checkpoint reward_checkpoint_filename "
    "reward_options reward_checkpoint_subfolder clip_name_or_path processor_name_or_path reward_timestep",
    "data": "dataset_name dataset_prompt_column dataset_streaming eval_dataset_name eval_split prompt prompts "
    "prompts_split prompts_column num_prompts max_bad_image_fraction num_checked_rows only_different "
    "max_pairs_per_prompt image_background relabel_preferences relabel_tie_band max_nonfinite_fraction",
    "metrics": "metrics metric_options",
    "SPO: rollouts": "num_candidates num_inner_steps branch_start_step branch_end_step branch_start_timestep "
    "branch_end_timestep num_branches resample per_device_rollout_batch_size",
    "SPO: pairs and loss": "preference_threshold pair beta num_iterations epsilon kl_coef "
    "timestep_weighting train_cfg disable_dropout",
    "reward training": "min_timestep max_timestep timesteps independent_noise resolution caption_loss_coef "
    "freeze_text_tower accuracy_timestep_bins eval_timesteps",
    "sampler": "protocol num_inference_steps guidance_scale eta sampler negative_prompt guidance_rescale clip_skip "
    "height width images_per_prompt seed",
    "grid": "x y grid",
    "memory and speed": "memory_budget rollout_micro_batch_size vae_decode_batch_size reward_batch_size "
    "prediction_batch_size batch_size offload_text_encoders reward_dtype scoring_vae scoring_image_size defer_scoring "
    "cache_latents cache_latents_gb compile_regions channels_last device",
    "output": "output_dir overwrite_output_dir log_images_steps num_eval_images eval_seed num_sheet_images",
}
CHECKED = ("spo", "step-reward", "evaluate", "sample")  # commands that `--dry_run`, the doctor, looks at
MORE = "more options"
COMMON_TITLE = "common training options"
REST_TITLE = "all other training options of transformers"
# Of `TrainingArguments`: what most runs need.
COMMON = (
    "learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm max_steps num_train_epochs "
    "per_device_train_batch_size gradient_accumulation_steps activation_checkpointing gradient_checkpointing bf16 fp16 "
    "logging_steps report_to run_name eval_strategy eval_steps eval_on_start per_device_eval_batch_size save_steps "
    "save_total_limit resume_from_checkpoint load_best_model_at_end metric_for_best_model push_to_hub hub_model_id seed "
    "use_cpu"
).split()
# Instead of texts of transformers that are about something else than what happens here, or long.
TEXTS = {
    "activation_checkpointing": "Recompute activations in the backward pass: much less memory, somewhat slower.",
    "bf16": "Train in bfloat16 mixed precision.",
    "eval_on_start": "Evaluate before the first step, too.",
    "eval_steps": "Evaluate every this many steps, by default as often as logging.",
    "eval_strategy": "When to evaluate.",
    "fp16": "Train in float16 mixed precision; take bf16 where the hardware has it.",
    "gradient_accumulation_steps": "Batches per device and optimizer step.",
    "hub_model_id": "Name of the repository on the Hub.",
    "load_best_model_at_end": "End with the weights of the best checkpoint; needs eval_strategy.",
    "logging_steps": "Log every this many steps; below 1 it is a share of the whole run.",
    "lr_scheduler_type": "Learning rate schedule: linear, cosine, constant, constant_with_warmup, and others",
    "max_grad_norm": "Gradients are clipped to this norm; 0 is off.",
    "max_steps": "Number of optimizer steps; -1 leaves it to num_train_epochs.",
    "metric_for_best_model": "What load_best_model_at_end compares.",
    "output_dir": "Folder of the result and of the checkpoints.",
    "per_device_eval_batch_size": "Images or pairs per device in one call of an evaluation.",
    "push_to_hub": "Upload the result to the Hugging Face Hub.",
    "report_to": "Trackers: tensorboard, wandb, trackio and others, none, or all.",
    "resume_from_checkpoint": "Go on from a checkpoint: `last` for the last one in output_dir, or its folder.",
    "run_name": "Name of the run in trackers.",
    "save_steps": "Write a checkpoint every this many steps; Ctrl-C writes one, too.",
    "save_total_limit": "Keep this many checkpoints, the newest and the best.",
    "seed": "Random seed of the run.",
    "use_cpu": "Train on the CPU even if there is a GPU.",
    "warmup_steps": "Steps in which the learning rate rises to its value; below 1 a share of the whole run.",
}
METAVARS = {"int": "INT", "float": "FLOAT", "string_to_bool": "true|false"}
JSON_OPTIONS = ("model_init_kwargs", "metric_options", "reward_options")


class ShortFormatter(argparse.HelpFormatter):
    """One name per option, the kind of its value, and its default if it has one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = next(option for option in action.option_strings if option.startswith("--"))
        if action.nargs == 0:
            return name
        return f"{name} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind = "JSON" if action.dest in JSON_OPTIONS else "TEXT"
        return METAVARS.get(getattr(action.type, "__name__", ""), kind)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        field = TrainingArguments.__dataclass_fields__.get(action.dest)
        if field is not None and text == field.metadata.get("help"):
            text = TEXTS.get(action.dest, text)
        if action.default is False or action.default in (None, "", argparse.SUPPRESS) or action.nargs == 0:
            return text
        return f"{text.removesuffix('.')} (default: {'true' if action.default is True else '%(default)s'})"


def format_help(
    parser: argparse.ArgumentParser, everything: bool = False, accelerate_configs: Iterable[str] = ()
) -> str:
    """
    The text of `--help`.

    Args:
        parser (`argparse.ArgumentParser`): of a command.
        everything (`bool`, *optional*, defaults to `False`): also the options that few runs need.
        accelerate_configs (iterable of `str`, *optional*): names that `--accelerate_config` takes, of a command that
            runs on several devices.
    """
    formatter = ShortFormatter(parser.prog)
    formatter.add_text(f"usage: {parser.prog} [--config FILE.yaml] [options]")
    formatter.add_text(parser.description)
    is_checked = parser.prog.rpartition(" ")[2] in CHECKED
    _add_section(formatter, "this command", _options_of_every_command(accelerate_configs, is_checked))
    options = {}
    for action in parser._actions:
        options.setdefault(action.dest, action)  # of `--x` and `--no_x` the first
    for title, names in groups_of(options, everything).items():
        _add_section(formatter, title, [options[name] for name in names])
    text = formatter.format_help()
    if not everything and REST_TITLE in groups_of(options, everything=True):
        text += f"\n`{parser.prog} --help all` lists {REST_TITLE}, too.\n"
    return text + "A switch that is on by default is turned off by `--no_NAME`, or by `--NAME false`.\n"


def groups_of(names: Collection[str], everything: bool) -> dict[str, list[str]]:
    """Titles of groups and what they hold, in order, of a command that has the options `names`."""
    of_transformers = set(TrainingArguments.__dataclass_fields__)
    common = [name for name in COMMON if name in names and "learning_rate" in names]  # of commands that train
    if "activation_checkpointing" in common:  # the other name is an old one then
        common.remove("gradient_checkpointing")
    placed = {"help", "config", "debug", *common}
    groups = {}
    for title, listed in GROUPS.items():
        groups[title] = [name for name in listed.split() if name in names and name not in placed]
        placed |= set(groups[title])
    rest = [name for name in names if name not in placed]
    groups[MORE] = [name for name in rest if name not in of_transformers]
    groups[COMMON_TITLE] = common
    groups[REST_TITLE] = [name for name in rest if name in of_transformers and everything]
    return {title: group for title, group in groups.items() if group}


def _add_section(formatter: argparse.HelpFormatter, title: str, actions: Iterable[argparse.Action]) -> None:
    formatter.start_section(title)
    formatter.add_arguments(actions)
    formatter.end_section()


def _options_of_every_command(accelerate_configs: Iterable[str], is_checked: bool) -> list[argparse.Action]:
    """What is no field of a dataclass; made for their texts only."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--help", nargs="?", metavar="all", help="Show this text, or with `all` every option.")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with `option: value` lines, or the name of a preset. The command line goes first.",
    )
    if accelerate_configs:
        names = ", ".join(accelerate_configs)
        parser.add_argument(
            "--accelerate_config",
            metavar="NAME|FILE",
            help=f"Several devices: {names}, or a file of `accelerate config`. Other options of `accelerate launch`, such as "
            "--num_processes, are taken, too.",
        )
    if is_checked:
        parser.add_argument(
            "--dry_run",
            action="store_true",
            help="Say what this run needs and what stands in its way, and do nothing.",
        )
    parser.add_argument("--debug", action="store_true", help="Print the traceback of an error.")
    return parser._actions
