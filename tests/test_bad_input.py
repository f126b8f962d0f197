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
Necessity: what people hand over by mistake, or find in real data sets, must end in one error that says what was expected,
what came and what to do, before hours are spent; or it must be handled. It must never touch what an earlier run wrote.

A table of cases: an id, what is done in a [`World`], and what has to follow. A refused input raises exactly one of four
types (not a subclass such as `UnicodeEncodeError` or `JSONDecodeError`, which come from somewhere deep), with a message,
before the denoiser or the VAE ran once; where a reward function is at fault, at its first answer. Either way the output
directory keeps every file and every bit.
"""

import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import logging
import math
import pickle
import re
import struct
import types
import typing
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import Decoder, Encoder
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_pre_hook

from trl_spo import SPOConfig, SPOTrainer, StepAwareRewardModel, StepRewardConfig, StepRewardTrainer, wrap_pipeline
from trl_spo.images import read_image
from trl_spo.pipelines.autoencoder import load_scoring_vae
from trl_spo.preference_collator import StepPreferenceCollator
from trl_spo.preference_dataset import check_images, load_preference_dataset, prepare_preference_dataset
from trl_spo.prompts import read_prompts
from trl_spo.rollout import stepwise_rollout

from .flow_testing import tiny_sd3_pipeline
from .testing_utils import (
    PROMPTS,
    brightness_reward,
    changed,
    ddim_scheduler,
    device_settings,
    state_of,
    tiny_clip,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
    tiny_spo_config,
    tiny_step_reward_config,
)


NAN, INF = math.nan, math.inf
SETTINGS = {"num_inference_steps": 3, "branch_start_step": 0, "num_candidates": 2, "preference_threshold": 0.0}
LORA = "pytorch_lora_weights.safetensors"


class World:
    """A folder with the output of an earlier run, and what is needed for the next one, built when it is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.output_dir = folder / "run"
        checkpoint = self.output_dir / "checkpoint-7"
        checkpoint.mkdir(parents=True)
        (checkpoint / LORA).write_bytes(bytes(range(256)))
        (checkpoint / "spo_state.json").write_text('{"num_prompts": 1}')
        (self.output_dir / "README.md").write_text("An earlier run.")

    def snapshot(self) -> dict[str, str]:
        """All files of the output directory with their hashes, and its folders."""
        return {
            str(path.relative_to(self.output_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file()
            else "folder"
            for path in sorted(self.output_dir.rglob("*"))
        }

    def file(self, name: str, content: bytes | str = b"") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def pipeline(self, **components) -> StableDiffusionPipeline:
        pipeline = tiny_sd_pipeline(self.folder)
        pipeline.register_modules(**components)
        return pipeline

    def sdxl(self, **components) -> StableDiffusionXLPipeline:
        pipeline = tiny_sdxl_pipeline(self.folder)
        pipeline.register_modules(**components)
        return pipeline

    def saved_pipeline(self) -> Path:
        self.pipeline().save_pretrained(self.folder / "pipeline")
        return self.folder / "pipeline"

    def spo_config(self, **settings) -> SPOConfig:
        return tiny_spo_config(self.output_dir, **{**SETTINGS, "save_strategy": "steps", **settings})

    def trainer(self, pipeline=None, reward=brightness_reward, prompts=PROMPTS, peft_config=None, **settings):
        pipeline = self.pipeline() if pipeline is None else pipeline
        return SPOTrainer(
            self.spo_config(**settings), pipeline, reward, train_dataset=prompts, peft_config=peft_config
        )

    def reward_trainer(self, dataset, **settings):
        config = tiny_step_reward_config(self.output_dir, **{"save_strategy": "steps", **settings})
        return StepRewardTrainer(config, self.pipeline(), self.reward_model(), train_dataset=dataset)

    def rollout(self, reward, pipeline=None, **settings):
        pipeline = wrap_pipeline(self.pipeline() if pipeline is None else pipeline)
        generator = torch.Generator().manual_seed(0)
        arguments = {**SETTINGS, "guidance_scale": 1.0, "generator": generator, **settings}
        return stepwise_rollout(pipeline, PROMPTS[:2], reward, **arguments)

    def clip(self) -> str:
        return str(tiny_clip(self.folder))

    def reward_model(self) -> StepAwareRewardModel:
        return StepAwareRewardModel.from_clip(self.clip())

    def original(self, change: Callable[[dict], Any] | None = None, suffix: str = "bin") -> StepAwareRewardModel:
        """Loads a checkpoint in the format of the SPO authors, whose weights `change` has changed or replaced."""
        weights = self.reward_model().state_dict()
        other = None if change is None else change(weights)
        weights = weights if other is None else other
        path = self.folder / f"reward.{suffix}"
        save_file(weights, path) if suffix == "safetensors" else torch.save(weights, path)
        return StepAwareRewardModel.from_original_checkpoint(str(path), clip=self.clip())

    def saved_reward_model(self) -> Path:
        self.reward_model().save_pretrained(self.folder / "reward")
        return self.folder / "reward"

    def lora(self, **config) -> Path:
        """A folder with a saved adapter."""
        pipeline = wrap_pipeline(self.pipeline())
        pipeline.add_lora(LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_k"], **config}))
        pipeline.save_lora(self.folder / "lora")
        return self.folder / "lora"


@dataclasses.dataclass
class Case:
    """One row of the table. `act` is done; either `error` follows, or `check` looks at what `act` returned."""

    name: str
    act: Callable[[World], Any]
    error: type[Exception] | None = None
    message: str = ""
    check: Callable[[World, Any], None] | None = None
    most_forwards: int = 0  # calls of denoiser, encoder and decoder before the error


def refused(name, error, message, act, most_forwards=0) -> Case:
    return Case(name, act, error, message, most_forwards=most_forwards)


def handled(name, act, check) -> Case:
    return Case(name, act, check=check)


@contextlib.contextmanager
def counted_forwards():
    """Counts calls of every UNet and every half of a VAE, whoever built it."""
    calls = []

    def note(module, arguments):
        if isinstance(module, (UNet2DConditionModel, Encoder, Decoder)):
            calls.append(type(module).__name__)

    handle = register_module_forward_pre_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


# --- configs ---------------------------------------------------------------------------------------------------------

SPO = [
    ("eta-zero", {"eta": 0.0}, ValueError, "`eta` must be above 0; without noise the steps are deterministic.* got 0.0"),
    ("one-candidate", {"num_candidates": 1}, ValueError, "`num_candidates` must be at least 2, or there is no pair"),
    ("half-a-candidate", {"num_candidates": 2.5}, TypeError, "`num_candidates` must be an integer, got 2.5"),
    ("no-steps", {"num_inference_steps": 0}, ValueError, "`num_inference_steps` must be at least 1"),
    ("no-inner-steps", {"num_inner_steps": 0}, ValueError, "`num_inner_steps` must be at least 1"),
    ("branch-after-the-end", {"branch_start_step": 20}, ValueError, r"`branch_start_step` must be in \[0, 20\)"),
    ("branch-before-the-start", {"branch_start_step": -1}, ValueError, r"`branch_start_step` must be in \[0, 20\)"),
    ("branch-ends-too-late", {"branch_end_step": 21}, ValueError, "`branch_end_step` must be at most 20"),
    ("branch-of-no-steps", {"branch_end_step": 4}, ValueError, r"`branch_start_step` must be in \[0, 4\)"),
    ("no-branches", {"num_branches": 0}, ValueError, "`num_branches` must be at least 1, or None"),
    ("threshold-one", {"preference_threshold": 1.0}, ValueError, r"`preference_threshold` must be in \[0, 1\)"),
    ("threshold-negative", {"preference_threshold": -0.1}, ValueError, r"`preference_threshold` must be in \[0, 1\)"),
    ("epsilon-zero", {"epsilon": 0.0}, ValueError, r"`epsilon` must be in \(0, 1\)"),
    ("epsilon-one", {"epsilon": 1.0}, ValueError, r"`epsilon` must be in \(0, 1\)"),
    ("beta-zero", {"beta": 0.0}, ValueError, "`beta` must be positive"),
    ("kl-negative", {"kl_coef": -1.0}, ValueError, "`kl_coef` must be 0 or more"),
    ("resample", {"resample": "best"}, ValueError, "`resample` must be 'random', 'chosen' or 'rejected'; got 'best'"),
    ("resample-none", {"resample": None}, TypeError, "`resample` must be a string, got None"),
    ("pair", {"pair": "all"}, ValueError, "`pair` must be 'best_worst' or 'random'; got 'all'"),
    ("weighting", {"timestep_weighting": "snr"}, ValueError, "`timestep_weighting` must be 'none' or 'even'"),
    ("reward-dtype", {"reward_dtype": "half"}, ValueError, "`reward_dtype` must be one of .*'bfloat16'.* got 'half'"),
    ("reward-dtype-object", {"reward_dtype": torch.half}, TypeError, "`reward_dtype` must be a string or None"),
    ("height-zero", {"height": 0}, ValueError, "`height` must be at least 1 pixel, or None"),
    ("width-negative", {"width": -512}, ValueError, "`width` must be at least 1 pixel, or None"),
    ("rollout-batch", {"per_device_rollout_batch_size": 0}, ValueError, "`per_device_rollout_batch_size` must be at"),
    ("train-batch", {"per_device_train_batch_size": 0}, ValueError, "`per_device_train_batch_size` must be at least 1"),
    ("accumulation", {"gradient_accumulation_steps": 0}, ValueError, "`gradient_accumulation_steps` must be at least"),
    ("accumulation-text", {"gradient_accumulation_steps": "4"}, TypeError, "`gradient_accumulation_steps` must be an"),
    ("micro-batch", {"rollout_micro_batch_size": 0}, ValueError, "`rollout_micro_batch_size` must be at least 1"),
    ("decode-batch", {"vae_decode_batch_size": -1}, ValueError, "`vae_decode_batch_size` must be at least 1"),
    ("reward-batch", {"reward_batch_size": 0}, ValueError, "`reward_batch_size` must be at least 1"),
    ("memory-budget", {"memory_budget": 0.0}, ValueError, "`memory_budget` must be a positive number of GiB"),
    ("scoring-size", {"scoring_image_size": 0}, ValueError, "`scoring_image_size` must be at least 1 pixel"),
    ("eval-images", {"num_eval_images": 0}, ValueError, "`num_eval_images` must be at least 1"),
    ("eval-seed", {"eval_seed": -1}, ValueError, "`eval_seed` must be in"),
    ("eval-seed-huge", {"eval_seed": 2**64}, ValueError, "`eval_seed` must be in"),
    ("log-images", {"log_images_steps": -1}, ValueError, "`log_images_steps` must be 0 or more"),
    ("learning-rate", {"learning_rate": -1e-4}, ValueError, "`learning_rate` must be 0 or more"),
    ("weight-decay", {"weight_decay": -0.1}, ValueError, "`weight_decay` must be 0 or more"),
    ("no-epochs", {"num_train_epochs": 0}, ValueError, "`num_train_epochs` must be positive, or `max_steps` set"),
    ("switch-as-text", {"train_cfg": "False"}, TypeError, "`train_cfg` must be True or False, got 'False' of type `str`"),
    ("switch-as-number", {"use_peft": 0}, TypeError, "`use_peft` must be True or False, got 0 of type `int`"),
    ("negative-prompt-surrogate", {"negative_prompt": "a \ud83d"}, ValueError, "`negative_prompt` is not valid Unicode, 'a "),
    ("negative-prompt-none", {"negative_prompt": None}, TypeError, "`negative_prompt` must be a string, got None"),
    ("model-kwargs-list", {"model_init_kwargs": ["variant"]}, TypeError, "`model_init_kwargs` must be a dictionary"),
]  # fmt: skip
REWARD = [
    ("resolution-zero", {"resolution": 0}, ValueError, "`resolution` must be at least 1, got 0"),
    ("negative-prompt-surrogate", {"negative_prompt": "a \ud83d"}, ValueError, "`negative_prompt` is not valid Unicode, 'a "),
    ("background-unknown", {"image_background": "whitish"}, ValueError, "`image_background`: An opaque colour .*'whitish'"),
    ("background-transparent", {"image_background": "#ffffff80"}, ValueError, "`image_background`: An opaque colour"),
    ("background-none", {"image_background": None}, TypeError, "`image_background` must be a string, got None"),
    ("timesteps-crossed", {"min_timestep": 9, "max_timestep": 3}, ValueError, "0 <= min_timestep <= max_timestep.* 9"),
    ("timestep-negative", {"min_timestep": -1}, ValueError, "0 <= min_timestep"),
    ("timesteps-empty", {"timesteps": []}, ValueError, "`timesteps` must hold at least one timestep"),
    ("timesteps-negative", {"timesteps": [1, -1]}, ValueError, "`timesteps` must hold .* none below 0"),
    ("timesteps-number", {"timesteps": 5}, TypeError, "`timesteps` must be a list of integers or None, got 5"),
    ("timesteps-floats", {"timesteps": [1.5]}, TypeError, "`timesteps` must be a list of integers"),
    ("eval-timesteps-none", {"eval_timesteps": None}, TypeError, "`eval_timesteps` must be a list of integers, got None"),
    ("eval-timesteps-empty", {"eval_timesteps": []}, ValueError, "`eval_timesteps` must hold at least one"),
    ("bins", {"accuracy_timestep_bins": 0}, ValueError, "`accuracy_timestep_bins` must be at least 1"),
    ("prediction-batch", {"prediction_batch_size": 0}, ValueError, "`prediction_batch_size` must be at least 1"),
    ("pairs-per-prompt", {"max_pairs_per_prompt": -1}, ValueError, "`max_pairs_per_prompt` must be at least 1"),
    ("caption-loss", {"caption_loss_coef": -0.5}, ValueError, "`caption_loss_coef` must not be negative"),
    ("checked-rows", {"num_checked_rows": -1}, ValueError, "`num_checked_rows` must not be negative"),
    ("cache", {"cache_latents_gb": -1.0}, ValueError, "`cache_latents_gb` must not be negative"),
    ("tie-band", {"relabel_tie_band": 1.0}, ValueError, r"`relabel_tie_band` must lie in \[0, 1\)"),
    ("bad-images", {"max_bad_image_fraction": 1.5}, ValueError, r"`max_bad_image_fraction` must lie in \[0, 1\]"),
    ("stream-without-end", {"dataset_streaming": True, "max_steps": -1}, ValueError, "`dataset_streaming` needs `max_s"),
    ("columns-removed", {"remove_unused_columns": True}, ValueError, "`remove_unused_columns` must stay False"),
    ("accumulation", {"gradient_accumulation_steps": 0}, ValueError, "`gradient_accumulation_steps` must be at least 1"),
    ("train-batch", {"per_device_train_batch_size": 0}, ValueError, "`per_device_train_batch_size` must be at least 1"),
    ("learning-rate", {"learning_rate": -1.0}, ValueError, "`learning_rate` must not be negative"),
]  # fmt: skip


def build(config_class, settings) -> Callable[[World], Any]:
    return lambda world: config_class(str(world.output_dir), report_to="none", **device_settings(), **settings)


def numbers_of(config_class):
    """`(field, bad value, error)` for every number that a config declares: no number, no finite number, the wrong kind."""
    hints = typing.get_type_hints(config_class)
    for name in config_class.__annotations__:
        kinds = typing.get_args(hints[name]) if isinstance(hints[name], types.UnionType) else (hints[name],)
        if int not in kinds and float not in kinds:
            continue
        bad = [("1", TypeError), (True, TypeError), ([1], TypeError), (1j, TypeError)]
        bad += [(value, ValueError if float in kinds else TypeError) for value in (NAN, INF, -INF)]
        bad += [] if type(None) in kinds else [(None, TypeError)]
        yield from ((name, value, error) for value, error in bad)


CONFIGS = [
    *(refused(f"spo-{n}", error, message, build(SPOConfig, s)) for n, s, error, message in SPO),
    *(refused(f"step-reward-{n}", error, message, build(StepRewardConfig, s)) for n, s, error, message in REWARD),
    handled(
        "spo-numpy-numbers",
        build(SPOConfig, {"num_candidates": np.int64(3), "beta": np.float32(2.0), "seed": np.int64(1)}),
        lambda world, config: _same((config.num_candidates, config.beta), (3, 2.0)),
    ),
    *(
        refused(f"{short}-{name}-{value!r}", error, f"`{name}` must be", build(config_class, {name: value}))
        for short, config_class in (("spo", SPOConfig), ("step-reward", StepRewardConfig))
        for name, value, error in numbers_of(config_class)
    ),
]


def _same(found, expected):
    assert found == expected


# --- prompts ---------------------------------------------------------------------------------------------------------

LONG = "a red cat on a green dog " * 400  # 10,000 characters
STRANGE = {
    "ten-thousand-characters": LONG,
    "ten-thousand-letters-without-a-space": "a" * 10_000,
    "emoji": "a 🦊 in 🇫🇷 with 👩‍👩‍👧‍👦 and 👍🏽",
    "right-to-left": "שועל אדום ליד אגם",
    "right-to-left-override": "a ‮red‬ cat",
    "combining-characters": "a c̷̢̛̗̭̞̦͓͂a̶̧̢̻̟͓̓͗t",
    "nul": "a red\x00cat",
    "control-characters": "a\x07 red\x1b[31m cat\x7f",
    "newlines-and-tabs": "a\tred\r\ncat\u2028on a dog",
    "chinese": "一只红色的狐狸",
    "a-single-letter": "a",
    "markup": "<script>alert('{{x}}')</script> %s %n ${HOME} `ls` \\",
    "tokens-of-the-tokenizer": "<|startoftext|> a cat <|endoftext|>",
    "not-a-character": "a \ufffe cat",
    "private-use": "\ue000",
}


def prompts_and_pairs(prompt):
    """Prompts are read as they are, encoded, and rolled out, twice with the same result."""

    def act(world):
        assert read_prompts([prompt, "a cat"]) == [prompt, "a cat"]
        assert list(read_prompts(Dataset.from_dict({"caption": [prompt]}))) == [prompt]
        pipeline = wrap_pipeline(world.pipeline())
        settings = {**SETTINGS, "guidance_scale": 2.0}
        return [
            stepwise_rollout(
                pipeline, [prompt, "a cat"], brightness_reward, generator=torch.Generator().manual_seed(0), **settings
            )
            for _ in range(2)
        ]

    return act


def same_rollouts(world, rollouts):
    first, second = rollouts
    assert len(first) > 0 and set(first.prompts) <= {*STRANGE.values(), "a cat"}
    for name, value in first.tensors().items():
        assert value.isfinite().all(), name
        assert torch.equal(value, second.tensors()[name]), name


def train_on(prompts):
    return lambda world: world.trainer(
        pipeline="a/pipeline/never/loaded", prompts=prompts() if callable(prompts) else prompts
    )


PROMPT_CASES = [
    *(handled(f"prompt-{name}", prompts_and_pairs(prompt), same_rollouts) for name, prompt in STRANGE.items()),
    handled(
        "prompts-repeated",
        lambda world: world.trainer(prompts=["a cat"] * 5).rollout(["a cat"] * 3),
        lambda world, pairs: _same(set(pairs.prompt_index.tolist()) <= {0, 1, 2} and len(pairs) > 0, True),
    ),
    handled("prompts-tuple", lambda world: read_prompts(("a", "b")), lambda world, found: _same(found, ["a", "b"])),
    refused("prompts-none", ValueError, "SPO needs prompts: pass `train_dataset`", train_on(None)),
    refused("prompts-empty-list", ValueError, "`train_dataset` has no prompts", train_on([])),
    refused("prompts-zero-rows", ValueError, "`train_dataset` has no prompts", train_on(lambda: Dataset.from_dict({"prompt": []}))),
    refused("prompts-no-columns", ValueError, r"needs a column 'prompt' or 'caption'.* it has \[\]", train_on(lambda: Dataset.from_list([]))),
    refused("prompts-missing-column", ValueError, r"needs a column 'prompt' or 'caption'.* it has \['text'\]. Rename", train_on(lambda: Dataset.from_dict({"text": ["a"]}))),
    refused("prompts-missing-named-column", ValueError, "needs a column 'words'", lambda world: world.trainer("x/y/z", prompts=Dataset.from_dict({"prompt": ["a"]}), dataset_prompt_column="words")),
    refused("prompts-none-inside", ValueError, "must hold strings, but item 1 is a `NoneType`", train_on(["a", None])),
    refused("prompts-none-in-column", ValueError, "must hold strings, but item 1 is a `NoneType`", train_on(lambda: Dataset.from_dict({"prompt": ["a", None]}))),
    refused("prompts-integers", ValueError, "must hold strings, but item 0 is a `int`", train_on([1, 2])),
    refused("prompts-nan", ValueError, "must hold strings, but item 1 is a `float`", train_on(["a", NAN])),
    refused("prompts-bytes", ValueError, "must hold strings, but item 0 is a `bytes`", train_on([b"a cat"])),
    refused("prompts-mixed", ValueError, "must hold strings, but item 2 is a `list`", train_on(["a", "b", ["c"]])),
    refused("prompts-lists-in-column", ValueError, "must hold strings, but item 0 is a `list`", train_on(lambda: Dataset.from_dict({"prompt": [["a"], ["b"]]}))),
    refused("prompts-empty-string", ValueError, "empty prompt at position 1. Remove it", train_on(["a", ""])),
    refused("prompts-whitespace", ValueError, "empty prompt at position 0", train_on([" \t\n\u3000\u00a0"])),
    refused("prompts-invisible", ValueError, "empty prompt at position 0", train_on(["\u200b\u200d\ufeff\x00\x07"])),
    refused("prompts-lone-surrogate", ValueError, "position 1 that is not valid Unicode, .*surrogate", train_on(["a", "a \ud83d cat"])),
    refused("prompts-string", TypeError, "must be a list of prompts or a `datasets.Dataset`.* got `str`", train_on("a red cat")),
    refused("prompts-number", TypeError, "must be a list of prompts .* got `int`", train_on(3)),
    refused("prompts-dict", TypeError, r"got `dict` with the entries \['prompt'\]. Pass one of them", train_on({"prompt": ["a"]})),
    refused("prompts-dataset-dict", TypeError, r"got `DatasetDict` with the entries \['train'\]. Pass one of them, such as `dataset\['train'\]`", train_on(lambda: DatasetDict({"train": Dataset.from_dict({"prompt": ["a"]})}))),
    refused("prompts-generator", TypeError, r"got `generator`. Collect the prompts first, with `list\(...\)`", train_on(lambda: (p for p in PROMPTS))),
    refused("prompts-stream", ValueError, "A stream of prompts needs `max_steps`", train_on(lambda: Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset())),
    refused("prompts-set", TypeError, "got `set`. Collect the prompts first", train_on({"a", "b"})),
    refused("prompts-for-evaluation", ValueError, "`eval_dataset` has an empty prompt at position 0", lambda world: SPOTrainer(world.spo_config(), "x/y/z", brightness_reward, train_dataset=["a"], eval_dataset=[""])),
    refused("dataset-name-missing", FileNotFoundError, "nowhere", lambda world: _exactly(FileNotFoundError, lambda: world.trainer("x/y/z", prompts=None, dataset_name=str(world.folder / "nowhere")))),
]  # fmt: skip


def _exactly(error, act):
    """A library's own subclass of an expected error, which is public and says enough."""
    try:
        return act()
    except error as found:
        raise error(str(found)) from found


# --- images of preference pairs --------------------------------------------------------------------------------------


def picture(mode="RGB", size=(12, 10)) -> Image.Image:
    """A gradient, so that turning or flipping it is seen."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)).convert(mode)


def encoded(image=None, format="PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    (picture() if image is None else image).save(buffer, format, **kwargs)
    return buffer.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def animation() -> bytes:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=10)


def turned() -> bytes:
    """Stored on its side, with the EXIF tag that tells viewers to turn it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture().transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


def pair(image, **row) -> dict:
    row = {"caption": "a cat", "jpg_0": image, "jpg_1": picture(), "label_0": 1.0, "label_1": 0.0, **row}
    return {name: value for name, value in row.items() if value is not ...}


def collate(image):
    """One batch of a good pair and the pair with `image`."""

    def act(world):
        given = image(world) if callable(image) else image
        collator = StepPreferenceCollator(resolution=16, max_bad_image_fraction=1.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Image, "MAX_IMAGE_PIXELS", 89_478_485)
            return collator, collator([pair(picture(), caption="good"), pair(given, caption="strange")])

    return act


def kept(world, result):
    collator, batch = result
    assert (collator.num_bad, batch["prompts"]) == (0, ["good", "strange"])
    images = batch["images_0"]
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all() and images.abs().max() <= 1


def looks_like(expected: Callable[[], Image.Image], tolerance=0.02):
    def check(world, result):
        kept(world, result)
        images = StepPreferenceCollator(16)([pair(expected())])["images_0"]
        assert (result[1]["images_0"][1] - images[0]).abs().max() <= tolerance

    return check


def skipped(world, result):
    collator, batch = result
    assert (collator.num_bad, batch["prompts"]) == (1, ["good"])


def on_white() -> Image.Image:
    """The palette of eight colours whose first is transparent, whose second is half so, by PIL's own paste."""
    paletted = picture().quantize(8)
    alpha = paletted.point([0, 0x7F] + [255] * 254, "L")
    white = Image.new("RGB", paletted.size, "white")
    white.paste(paletted.convert("RGB"), mask=alpha)
    return white


def grey_with(dtype, factor):
    return Image.fromarray((np.asarray(picture("L")).astype(dtype) * factor).astype(dtype))


IMAGES = [
    handled("image-1x1", collate(picture(size=(1, 1))), kept),
    handled("image-10000x1", collate(picture(size=(10_000, 1))), kept),
    handled("image-1x65000", collate(picture(size=(1, 65_000))), kept),
    handled("image-65000x1-encoded", collate(encoded(picture(size=(65_000, 1)))), kept),
    handled("image-cmyk", collate(encoded(picture("CMYK"), "TIFF")), looks_like(picture)),
    handled("image-grey", collate(encoded(picture("L"))), looks_like(lambda: picture("L"))),
    handled("image-grey-and-alpha", collate(encoded(picture("LA"))), looks_like(lambda: picture("L"))),
    handled("image-rgba", collate(encoded(picture("RGBA"))), looks_like(picture)),
    handled("image-palette-and-transparency", collate(encoded(picture().quantize(8), transparency=b"\0\x7f")), looks_like(on_white)),
    handled("image-premultiplied-alpha", collate(picture("RGBA").convert("RGBa")), looks_like(picture)),
    handled("image-16-bit", collate(encoded(grey_with(np.uint16, 257))), looks_like(lambda: picture("L"))),
    handled("image-32-bit", collate(grey_with(np.int32, 257)), looks_like(lambda: picture("L"))),
    handled("image-fractions", collate(grey_with(np.float32, 1 / 255)), looks_like(lambda: picture("L"))),
    handled("image-nan-pixels", collate(Image.fromarray(np.full((4, 4), NAN, np.float32))), kept),
    handled("image-1-bit", collate(encoded(picture("1"))), looks_like(lambda: picture("1").convert("RGB"))),
    handled("image-ycbcr", collate(encoded(picture(), "JPEG", quality=100, subsampling=0)), looks_like(picture, 0.1)),
    handled("image-webp", collate(encoded(picture(), "WEBP", lossless=True)), looks_like(picture)),
    handled("image-animated", collate(animation()), looks_like(lambda: Image.new("RGB", (8, 8), "red"))),
    handled("image-on-its-side", collate(turned()), looks_like(picture)),
    handled("image-broken-exif", collate(encoded(picture(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")), looks_like(picture)),
    handled("image-path", collate(lambda world: {"bytes": None, "path": str(world.file("a.png", encoded()))}), looks_like(picture)),
    handled("image-memoryview", collate(memoryview(encoded())), looks_like(picture)),
    handled("images-identical", collate(picture()), looks_like(picture)),
    handled("image-truncated-jpeg", collate(encoded(picture(size=(64, 64)), "JPEG")[:600]), skipped),
    handled("image-truncated-png", collate(encoded(picture(size=(99, 99)))[:-120]), skipped),
    handled("image-header-only", collate(encoded()[:20]), skipped),
    handled("image-zero-bytes", collate(b""), skipped),
    handled("image-text-named-png", collate(lambda world: {"path": str(world.file("a.png", "no image"))}), skipped),
    handled("image-svg", collate(b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"), skipped),
    handled("image-html", collate(b"<!DOCTYPE html><html>404</html>"), skipped),
    handled("image-bomb", collate(png_that_claims(50_000, 50_000)), skipped),
    handled("image-bomb-below-pils-error", collate(png_that_claims(12_000, 12_000)), skipped),
    handled("image-claims-no-width", collate(png_that_claims(0, 10)), skipped),
    handled("image-path-of-a-folder", collate(lambda world: {"path": str(world.folder)}), skipped),
    handled("image-path-missing", collate({"bytes": None, "path": "/nowhere/a.png"}), skipped),
    handled("image-none", collate(None), skipped),
    handled("image-empty-record", collate({}), skipped),
    refused("image-array", ValueError, "Column `jpg_0` does not hold images. .* got ndarray", lambda world: world.reward_trainer([pair(np.zeros((8, 8, 3)))])),
    refused("image-text", ValueError, "Column `jpg_0` does not hold images, or their paths: 'a.png' is not a file", lambda world: world.reward_trainer([pair("a.png")])),
    refused("image-number", ValueError, "An image must be a PIL image, bytes, a path or a `datasets` image, got int", lambda world: read_image(3)),
    refused("images-all-broken", ValueError, "3 of the 3 rows checked .* have an unreadable image", lambda world: world.reward_trainer([pair(b"no image")] * 3)),
]  # fmt: skip


# --- rows and datasets of preference pairs ---------------------------------------------------------------------------


def reward_training(rows):
    """Image pairs, or a function that makes them, are handed to the trainer of the reward model."""
    return lambda world: world.reward_trainer(rows() if callable(rows) else rows)


def streamed(*rows):
    """What only shows later in a stream is refused by the collator, naming the row."""

    def act(world):
        StepPreferenceCollator(resolution=16)(list(rows))

    return act


def as_dataset(*rows):
    return lambda: Dataset.from_list([{**row, "jpg_0": encoded(), "jpg_1": encoded()} for row in rows])


GOOD = pair(picture())
LABELS = "`label_0` and `label_1` must be probabilities that sum to 1"
WEIGHT = "`num_example_per_prompt` must be at least 1, got "
PAIRS = [
    refused("pairs-none", ValueError, "There are no image pairs: pass `train_dataset` or set `dataset_name`", reward_training(None)),
    refused("pairs-empty", ValueError, "The preference dataset is empty", reward_training([])),
    refused("pairs-dict", TypeError, r"got a `dict` with the entries \['train'\]; pass one of them", reward_training({"train": [GOOD]})),
    refused("pairs-dataset-dict", TypeError, r"got a `DatasetDict` with the entries .*`dataset\['train'\]`", reward_training(lambda: DatasetDict({"train": as_dataset(GOOD)()}))),
    refused("pairs-generator", TypeError, "must be a `datasets.Dataset`.* got `generator`", reward_training(lambda: (row for row in [GOOD]))),
    refused("pairs-string", TypeError, "must be a `datasets.Dataset`.* got `str`", reward_training("pickapic")),
    refused("pairs-of-tuples", TypeError, "Rows must be dictionaries, row 1 is a `tuple`", reward_training([GOOD, (1, 2)])),
    refused("pairs-of-text", ValueError, "A preference dataset needs the columns", reward_training(lambda: Dataset.from_dict({"prompt": ["a"], "text": ["b"]}))),
    refused("pairs-without-prompts", ValueError, "no prompt column 'caption' or 'prompt'.*`dataset_prompt_column`", reward_training([pair(picture(), caption=...)])),
    refused("pairs-with-other-columns-later", ValueError, "Row 1 has no jpg_0, label_1; the first row has", reward_training([GOOD, pair(..., label_1=...)])),
    refused("pairs-of-messages", ValueError, "Column `chosen` does not hold images. .* got list", reward_training([{"prompt": "a", "chosen": [{"role": "user"}], "rejected": [{}]}])),
    refused("prompt-none-later", ValueError, "Column `caption` must hold strings, row 1 has a NoneType", reward_training([GOOD, pair(picture(), caption=None)])),
    refused("prompt-none-in-a-dataset", ValueError, "Column `caption` must hold strings, row 1 has a NoneType", reward_training(as_dataset(GOOD, pair(0, caption=None)))),
    refused("prompt-none-in-a-stream", ValueError, "Column `caption` must hold strings, a row has a NoneType", streamed(GOOD, pair(picture(), caption=None))),
    refused("prompt-surrogate", ValueError, "not valid Unicode", reward_training([GOOD, pair(picture(), caption="a \udcff")])),
    refused("labels-nan", ValueError, f"{LABELS}.*labelled row 1 has nan and 0.0", reward_training([GOOD, pair(picture(), label_0=NAN)])),
    refused("labels-nan-in-a-dataset", ValueError, f"{LABELS}.*labelled row 1 has nan", reward_training(as_dataset(GOOD, pair(0, label_0=NAN)))),
    refused("labels-nan-in-a-stream", ValueError, f"{LABELS}.*'a cat' has nan and 0.0", streamed(GOOD, pair(picture(), label_0=NAN))),
    refused("labels-that-sum-to-two", ValueError, f"{LABELS}.*has 1.0 and 1.0", reward_training([pair(picture(), label_1=1.0)])),
    refused("labels-negative", ValueError, f"{LABELS}.*has 2.0 and -1.0", reward_training([pair(picture(), label_0=2.0, label_1=-1.0)])),
    refused("labels-negative-in-a-stream", ValueError, f"{LABELS}.*has 2.0 and -1.0", streamed(pair(picture(), label_0=2.0, label_1=-1.0))),
    refused("labels-as-words", ValueError, f"{LABELS}.*has 'left' and 'right'", reward_training([pair(picture(), label_0="left", label_1="right")])),
    refused("labels-as-words-in-a-stream", ValueError, f"{LABELS}.*has 'left' and 'right'", streamed(pair(picture(), label_0="left", label_1="right"))),
    refused("labels-infinite", ValueError, f"{LABELS}.*has inf and -inf", reward_training([pair(picture(), label_0=INF, label_1=-INF)])),
    refused("labels-missing-everywhere", ValueError, "No row of the preference dataset has a label", reward_training([pair(picture(), label_0=None, label_1=None)])),
    refused("weight-zero", ValueError, f"{WEIGHT}0", reward_training([GOOD, pair(picture(), num_example_per_prompt=0)])),
    refused("weight-negative", ValueError, f"{WEIGHT}-3", reward_training(as_dataset(pair(0, num_example_per_prompt=-3)))),
    refused("weight-nan", ValueError, f"{WEIGHT}nan", reward_training([pair(picture(), num_example_per_prompt=NAN)])),
    refused("weight-nan-in-a-stream", ValueError, f"{WEIGHT}nan", streamed(GOOD, pair(picture(), num_example_per_prompt=NAN))),
    refused("weight-infinite", ValueError, f"{WEIGHT}inf", reward_training([pair(picture(), num_example_per_prompt=INF)])),
    refused("weight-text", ValueError, f"{WEIGHT}'3'", reward_training([pair(picture(), num_example_per_prompt="3")])),
    handled("weight-none", lambda world: StepPreferenceCollator(16)([pair(picture(), num_example_per_prompt=None)]), lambda world, batch: _same(batch["weights"].tolist(), [1.0])),
    handled("labels-none-are-dropped", lambda world: prepare_preference_dataset([GOOD, pair(picture(), label_0=None)]), lambda world, rows: _same(len(rows), 1)),
    handled("labels-as-numbers-in-text", lambda world: StepPreferenceCollator(16)([pair(picture(), label_0="0.5", label_1="0.5")]), lambda world, batch: _same(batch["label_0"].tolist(), [0.5])),
    handled("nothing-to-check", lambda world: check_images([GOOD], num_rows=0), lambda world, bad: _same(bad, [])),
    refused("resolution-that-the-vae-cannot", ValueError, "`resolution=17` does not suit the pipeline: .* multiple of 2", lambda world: world.reward_trainer([GOOD], resolution=17)),
    refused("timestep-unknown-to-the-pipeline", ValueError, "Timestep 1000 is out of range.* up to 999. Lower", lambda world: world.reward_trainer([GOOD], max_timestep=1000)),
    refused("file-missing", FileNotFoundError, "There is no preference dataset at .*nowhere.parquet.*does not exist", lambda world: load_preference_dataset(world.folder / "nowhere.parquet")),
]  # fmt: skip


# --- pipelines -------------------------------------------------------------------------------------------------------


def other_unet(pipeline, **config) -> UNet2DConditionModel:
    """The UNet of a pipeline with another configuration."""
    torch.manual_seed(0)
    given = {name: value for name, value in pipeline.unet.config.items() if not name.startswith("_")}
    return UNet2DConditionModel.from_config({**given, **config})


def spo_on(make):
    return lambda world: world.trainer(make(world))


def unet_with(**config):
    return spo_on(lambda world: world.pipeline(unet=other_unet(world.pipeline(), **config)))


def as_class(pipeline_class, make=World.pipeline):
    def act(world):
        pipeline = make(world)
        names = set(pipeline_class._get_signature_types()) & set(pipeline.components)
        components = {name: pipeline.components[name] for name in names}
        if "safety_checker" in components:
            components["requires_safety_checker"] = False
        return pipeline_class(**components)

    return act


def small_vae(**config) -> AutoencoderKL:
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 16}
    blocks |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**{**blocks, **config})


def on_meta(world, name):
    pipeline = world.pipeline()
    getattr(pipeline, name).to("meta")
    return pipeline


def broken_folder(change):
    def act(world):
        folder = world.saved_pipeline()
        change(folder)
        return str(folder)

    return act


def rewrite_index(**entries):
    def change(folder):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, **entries}))

    return change


def truncate(pattern, size=100):
    def change(folder):
        (file,) = folder.glob(pattern)
        file.write_bytes(file.read_bytes()[:size])

    return change


def rolls_out(make):
    """Is wrapped, leaves the scheduler alone, and gives finite pairs."""

    def act(world):
        pipeline = make(world)
        before = copy.deepcopy(dict(pipeline.scheduler.config)), type(pipeline.scheduler)
        pairs = world.rollout(brightness_reward, pipeline)
        assert (dict(pipeline.scheduler.config), type(pipeline.scheduler)) == before
        return pairs

    return act


def finite_pairs(world, pairs):
    assert len(pairs) > 0 and all(value.isfinite().all() for value in pairs.tensors().values())


def scheduler_of(scheduler_class, **config):
    return lambda world: world.pipeline(
        scheduler=scheduler_class.from_config(world.pipeline().scheduler.config, **config)
    )


def lone_second_encoder(**unet):
    def make(world):
        pipeline = world.sdxl(text_encoder=None, tokenizer=None)
        pipeline.register_modules(unet=other_unet(pipeline, cross_attention_dim=16, **unet))
        return pipeline

    return make


MISSING = "The pipeline has no {}. SPO rolls out images and scores them.* load the complete pipeline"


def registered(pipeline, name: str, **config):
    """The pipeline, with another configuration of one of its networks."""
    getattr(pipeline, name).register_to_config(**config)
    return pipeline


def endless(pipeline, name: str):
    """The pipeline, with a tokenizer that was saved without its length, as transformers loads it."""
    tokenizer = copy.deepcopy(getattr(pipeline, name))
    tokenizer.model_max_length = int(1e30)
    pipeline.register_modules(**{name: tokenizer})
    return pipeline


PIPELINES = [
    *(refused(f"pipeline-without-{name}", ValueError, MISSING.format(name), spo_on(lambda world, name=name: world.pipeline(**{name: None}))) for name in ("vae", "text_encoder", "tokenizer", "scheduler", "unet")),
    refused("sdxl-without-text-encoder-2", ValueError, MISSING.format("text_encoder_2"), spo_on(lambda world: world.sdxl(text_encoder_2=None))),
    handled("scheduler-euler", rolls_out(scheduler_of(EulerDiscreteScheduler)), finite_pairs),
    handled("scheduler-dpm++", rolls_out(scheduler_of(DPMSolverMultistepScheduler, algorithm_type="dpmsolver++", use_karras_sigmas=True)), finite_pairs),
    handled("scheduler-v-prediction", rolls_out(lambda world: world.pipeline(scheduler=ddim_scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=False))), finite_pairs),
    refused("scheduler-flow-matching", ValueError, "stochastic denoising steps.*`FlowMatchEulerDiscreteScheduler` cannot", spo_on(lambda world: world.pipeline(scheduler=FlowMatchEulerDiscreteScheduler()))),
    refused("scheduler-of-another-kind", ValueError, "stochastic denoising steps.*`Anything` cannot", spo_on(lambda world: _with(world.pipeline(), "scheduler", Anything()))),
    refused("only-deterministic-steps", ValueError, r"Steps 2 to 2 of the scheduler are deterministic \(sigma = 0\).*Branch earlier steps", lambda world: world.trainer(world.pipeline(scheduler=ddim_scheduler(set_alpha_to_one=True)), branch_start_step=2)),
    refused("height-that-the-vae-cannot", ValueError, "`height` must be a positive multiple of 2.* got 15", lambda world: world.trainer(height=15)),
    refused("inpainting-unet", ValueError, "The UNet takes 9 input channels and the VAE has 4.* inpainting", unet_with(in_channels=9)),
    refused("inpainting-pipeline", TypeError, "must be an SPO pipeline.*`StableDiffusionInpaintPipeline`", spo_on(as_class(StableDiffusionInpaintPipeline))),
    refused("img2img-pipeline", TypeError, "must be an SPO pipeline.*`StableDiffusionImg2ImgPipeline`", spo_on(as_class(StableDiffusionImg2ImgPipeline))),
    refused("sdxl-img2img-pipeline", TypeError, "must be an SPO pipeline.*`StableDiffusionXLImg2ImgPipeline`", spo_on(as_class(StableDiffusionXLImg2ImgPipeline, World.sdxl))),
    refused("pixel-pipeline", TypeError, "must be an SPO pipeline.*`DDPMPipeline`", spo_on(lambda world: DDPMPipeline(world.pipeline().unet, world.pipeline().scheduler))),
    refused("vae-of-other-channels", ValueError, "The UNet takes 4 input channels and the VAE has 16 latent channels", spo_on(lambda world: world.pipeline(vae=small_vae(latent_channels=16)))),
    refused("unet-that-learns-variance", ValueError, "The UNet makes 8 channels of 4. SPO needs a prediction in the shape", unet_with(out_channels=8)),
    refused("unet-with-classes", ValueError, "The UNet has `num_class_embeds=10`, but SPO conditions it on None there.*plain text-to-image", unet_with(num_class_embeds=10)),
    refused("unet-with-class-labels", ValueError, "The UNet has `class_embed_type='timestep'`", unet_with(class_embed_type="timestep")),
    refused("unet-with-image-embeddings", ValueError, "The UNet has `encoder_hid_dim_type='image_proj'`", unet_with(encoder_hid_dim_type="image_proj", encoder_hid_dim=16)),
    refused("unet-of-sdxl-without-sdxl", ValueError, "`addition_embed_type='text_time'`.* belongs into a `StableDiffusionXLPipeline`", spo_on(lambda world: world.pipeline(unet=world.sdxl().unet))),
    refused("unet-of-sd15-in-sdxl", ValueError, "`addition_embed_type=None`, but SPO conditions it on 'text_time'", spo_on(lambda world: world.sdxl(unet=world.pipeline().unet))),
    refused("text-encoder-of-another-width", ValueError, r"features of size 16 and the UNet takes 24 \(`cross_attention_dim`\)", unet_with(cross_attention_dim=24)),
    refused("sdxl-refiner", ValueError, "six for the size of the image.*looks like the SDXL refiner", spo_on(lone_second_encoder(projection_class_embeddings_input_dim=12 + 5 * 8))),
    refused("sdxl-size-of-nothing", ValueError, r"The UNet takes 77 numbers of conditioning.* \(48\) and the pooled text \(12\)\.$", spo_on(lambda world: world.sdxl(unet=other_unet(world.sdxl(), projection_class_embeddings_input_dim=77)))),
    handled("sdxl-with-the-second-encoder-only", rolls_out(lone_second_encoder()), finite_pairs),
    refused("pipeline-path-missing", ValueError, "The pipeline path .*nowhere' does not exist. Pass an existing folder", spo_on(lambda world: world.folder / "nowhere")),
    refused("pipeline-single-file", ValueError, "is a checkpoint in a single file.*from_single_file", spo_on(lambda world: world.file("sdxl.safetensors"))),
    refused("pipeline-is-a-file", ValueError, "is a file, and a diffusers pipeline is a folder", spo_on(lambda world: world.file("model.bin"))),
    refused("pipeline-unet-without-size", ValueError, "configuration of the unet has no `sample_size`.*give `height` and `width`", spo_on(lambda world: registered(world.pipeline(), "unet", sample_size=None))),
    refused("pipeline-tokenizer-without-length", ValueError, r"`tokenizer` does not say how many tokens.*1e\+30, and there are 8 places.*model_max_length = 8", spo_on(lambda world: endless(world.pipeline(), "tokenizer"))),
    refused("pipeline-second-tokenizer-without-length", ValueError, "`tokenizer_2` does not say how many tokens", spo_on(lambda world: endless(world.sdxl(), "tokenizer_2"))),
    refused("pipeline-transformer-without-size", ValueError, "configuration of the transformer has no `sample_size`", spo_on(lambda world: registered(tiny_sd3_pipeline(world.folder), "transformer", sample_size=None))),
    refused("pipeline-empty-folder", ValueError, "is a folder without `model_index.json`", spo_on(lambda world: world.file("empty/nothing").parent)),
    refused("pipeline-empty-string", ValueError, "is a folder without `model_index.json`", spo_on(lambda world: "")),
    refused("pipeline-index-no-json", ValueError, "Could not load a diffusers pipeline from .*JSON", spo_on(broken_folder(lambda folder: (folder / "model_index.json").write_text("{broken")))),
    refused("pipeline-index-of-a-list", ValueError, "Could not load a diffusers pipeline from", spo_on(broken_folder(lambda folder: (folder / "model_index.json").write_text("[1]")))),
    refused("pipeline-index-of-an-unknown-class", ValueError, "Could not load a diffusers pipeline from", spo_on(broken_folder(rewrite_index(_class_name="NoSuchPipeline")))),
    refused("pipeline-index-with-unknown-part", ValueError, "Could not load a diffusers pipeline from", spo_on(broken_folder(rewrite_index(unet=["diffusers", "NoSuchModel"])))),
    refused("pipeline-weights-missing", ValueError, "Could not load a diffusers pipeline from", spo_on(broken_folder(lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()))),
    refused("pipeline-weights-truncated", ValueError, "Could not load a diffusers pipeline from", spo_on(broken_folder(truncate("unet/*.safetensors")))),
    refused("pipeline-weights-empty", ValueError, "Could not load a diffusers pipeline from", spo_on(broken_folder(truncate("vae/*.safetensors", 0)))),
    refused("pipeline-config-broken", ValueError, "Could not load a diffusers pipeline from", spo_on(broken_folder(truncate("unet/config.json")))),
    refused("pipeline-dtype", ValueError, "`torch_dtype` must name a dtype such as 'float16' or 'bfloat16', got 'half precision'", lambda world: world.trainer(world.saved_pipeline(), model_init_kwargs={"torch_dtype": "half precision"})),
    refused("pipeline-none", TypeError, "`pipeline` must be an SPO pipeline.*got an object of type `NoneType`", lambda world: SPOTrainer(world.spo_config(), None, brightness_reward, train_dataset=PROMPTS)),
    refused("pipeline-number", TypeError, "`pipeline` must be an SPO pipeline.*got an object of type `int`", spo_on(lambda world: 3)),
    refused("pipeline-is-a-unet", TypeError, "`pipeline` must be .* got an object of type `UNet2DConditionModel`", spo_on(lambda world: world.pipeline().unet)),
    refused("pipeline-is-a-class", TypeError, "`pipeline` must be an SPO pipeline", spo_on(lambda world: StableDiffusionPipeline)),
    *(refused(f"pipeline-with-{name}-on-meta", ValueError, f"The {name} has weights on the meta device", spo_on(lambda world, name=name: on_meta(world, name))) for name in ("unet", "vae", "text_encoder")),
    refused("adapter-for-no-layer", ValueError, "`peft_config` does not fit the unet", lambda world: world.trainer(peft_config=LoraConfig(target_modules=["nothing"]))),
    refused("scoring-vae-number", TypeError, "`scoring_vae` must be a diffusers autoencoder.* got `int`", lambda world: load_scoring_vae(3, wrap_pipeline(world.pipeline()))),
    refused("scoring-vae-of-other-channels", ValueError, "`scoring_vae` decodes latents with 16 channels.* have 4", lambda world: load_scoring_vae(small_vae(latent_channels=16), wrap_pipeline(world.pipeline()))),
    refused("scoring-vae-missing", ValueError, "Could not load an `AutoencoderTiny` for scoring", lambda world: world.trainer(scoring_vae=str(world.folder))),
]  # fmt: skip


def _with(pipeline, name, value):
    setattr(pipeline, name, value)
    return pipeline


# --- reward functions and models -------------------------------------------------------------------------------------

FIRST_SCORES = 4  # of a rollout that branches at once: two steps of the denoiser, one decoded batch, and one to spare


def reward_of(function):
    """A reward with the right answer passed through `function`."""
    return lambda images, prompts, timesteps: function(brightness_reward(images, prompts, timesteps))


def asks(function):
    return lambda world: world.rollout(reward_of(function))


def same_pairs_as(function=lambda scores: scores, **settings):
    def check(world, pairs):
        expected = world.rollout(reward_of(function), **settings)
        assert len(pairs) > 0
        for name, value in expected.tensors().items():
            assert torch.equal(pairs.tensors()[name], value), name
        assert not pairs.chosen_scores.requires_grad and pairs.chosen_scores.dtype == torch.float32

    return check


def vandal(images, prompts, timesteps):
    """Scores, then destroys all that it was given."""
    scores = brightness_reward(images, prompts, timesteps)
    images.fill_(NAN)
    timesteps.fill_(-1)
    prompts.clear()
    return scores


class LatentReward:
    scores = "latents"

    def __init__(self, vandalises):
        self.vandalises = vandalises

    def __call__(self, latents, prompts, timesteps):
        scores = 100 * latents.mean(dim=(1, 2, 3))
        if self.vandalises:
            latents.fill_(NAN)
        return scores


def latent_vandal(world, pairs):
    expected = world.rollout(LatentReward(False))
    assert len(pairs) > 0 and all(torch.equal(pairs.tensors()[k], v) for k, v in expected.tensors().items())


class Recycler:
    """Returns the same tensor at each call, with other numbers in it."""

    def __init__(self):
        self.buffer = torch.empty(1)

    def __call__(self, images, prompts, timesteps):
        self.buffer.copy_(brightness_reward(images, prompts, timesteps))
        return self.buffer


def with_gradients(scores):
    with torch.enable_grad():
        return scores * torch.ones(1, requires_grad=True)


def without_tokenizer(world):
    model = world.reward_model()
    model.tokenizer = None
    return model


REWARDS = [
    refused("reward-column", ValueError, r"one score per sample, shape \(4,\), got \(4, 1\)", asks(lambda scores: scores[:, None]), FIRST_SCORES),
    refused("reward-scalar", ValueError, r"one score per sample, shape \(4,\), got \(\)", asks(torch.mean), FIRST_SCORES),
    refused("reward-number", ValueError, r"one score per sample, shape \(4,\), got \(\)", asks(lambda scores: 0.5), FIRST_SCORES),
    refused("reward-too-few", ValueError, r"one score per sample, shape \(4,\), got \(3,\)", asks(lambda scores: scores[:3]), FIRST_SCORES),
    refused("reward-none", TypeError, "must return a tensor or a list of 4 numbers, one per sample, got `NoneType`", asks(lambda scores: None), FIRST_SCORES),
    refused("reward-strings", TypeError, "must return a tensor or a list of 4 numbers, one per sample, got `list`", asks(lambda scores: ["good"] * 4), FIRST_SCORES),
    refused("reward-dict", TypeError, "must return a tensor or a list of 4 numbers, one per sample, got `dict`", asks(lambda scores: {"scores": scores}), FIRST_SCORES),
    refused("reward-pair-as-of-ddpo", (TypeError, ValueError), "The reward must return", asks(lambda scores: (scores, {})), FIRST_SCORES),
    refused("reward-complex", TypeError, "must return real numbers, got dtype torch.complex64", asks(lambda scores: scores.to(torch.complex64)), FIRST_SCORES),
    refused("reward-on-meta", TypeError, "must return a tensor or a list of 4 numbers.* got `Tensor`", asks(lambda scores: scores.to("meta")), FIRST_SCORES),
    refused("reward-nan", ValueError, "[Nn]ot finite.* score .*'a (red cat|blue dog)'", asks(lambda scores: scores * NAN), 30),
    refused("reward-infinite", ValueError, "[Nn]ot finite.* score ", asks(lambda scores: scores + INF), 30),
    refused("reward-overflow-in-half", ValueError, "[Nn]ot finite.* score ", asks(lambda scores: ((scores + 1) * 1e8).half()), 30),
    handled("reward-list", asks(lambda scores: scores.tolist()), same_pairs_as()),
    handled("reward-numpy", asks(lambda scores: scores.double().numpy()), same_pairs_as()),
    handled("reward-integers", asks(lambda scores: (10 * scores).round().long()), same_pairs_as(lambda scores: (10 * scores).round())),
    handled("reward-half", asks(lambda scores: scores.half()), same_pairs_as(lambda scores: scores.half().float())),
    handled("reward-bool", asks(lambda scores: torch.arange(4) < 2), same_pairs_as(lambda scores: torch.tensor([1.0, 1.0, 0.0, 0.0]))),
    handled("reward-with-gradients", asks(with_gradients), same_pairs_as()),
    handled("reward-destroys-its-input", lambda world: world.rollout(vandal), same_pairs_as()),
    handled("reward-destroys-latents", lambda world: world.rollout(LatentReward(True)), latent_vandal),
    handled("reward-recycles-its-answer", lambda world: world.rollout(Recycler(), reward_batch_size=1), same_pairs_as(reward_batch_size=1)),
    refused("reward-not-callable", TypeError, r"`reward_model` must be a `StepAwareRewardModel`.* got `int`", lambda world: world.trainer(reward=3)),
    refused("reward-absent", TypeError, "`reward_model` must be .* got `NoneType`", lambda world: world.trainer(reward=None)),
    refused("reward-not-callable-in-a-rollout", TypeError, "[Rr]eward.* callable.* got `int`", lambda world: world.rollout(3)),
    refused("reward-path-missing", FileNotFoundError, "no reward model at .*nowhere': the path does not exist", lambda world: world.trainer(reward=str(world.folder / "nowhere"))),
    refused("reward-model-without-tokenizer", ValueError, "has no tokenizer, so it cannot read prompts", lambda world: world.trainer(reward=without_tokenizer(world))),
    refused("reward-model-without-tokenizer-in-a-rollout", ValueError, "has no tokenizer", lambda world: world.rollout(without_tokenizer(world))),
    refused("reward-features-of-another-size", ValueError, r"`text_features` must have shape \(2, 12\), got \(2, 7\)", lambda world: world.reward_model().score(torch.zeros(2, 3, 16, 16), text_features=torch.zeros(2, 7))),
    refused("reward-images-of-bytes", ValueError, "`images` must be floating point", lambda world: world.reward_model().score(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"])),
    refused("reward-one-image-without-batch", ValueError, r"`images` must have shape \(batch_size, 3, height, width\)", lambda world: world.reward_model().score(torch.zeros(3, 8, 8), ["a"])),
    refused("reward-one-text-for-two-images", ValueError, "one text per image, got 1 texts for 2 images", lambda world: world.reward_model().score(torch.zeros(2, 3, 8, 8), ["a"])),
    refused("reward-timestep-out-of-range", ValueError, r"`timesteps` must lie in \[0, 1000\)", lambda world: world.reward_model().score(torch.zeros(1, 3, 8, 8), ["a"], 1000)),
    refused("reward-timestep-fraction", ValueError, "`timesteps` must be integers", lambda world: world.reward_model().score(torch.zeros(1, 3, 8, 8), ["a"], 1.5)),
    refused("reward-dtype-of-a-function", ValueError, "`reward_dtype` casts a reward model", lambda world: world.trainer(reward_dtype="bfloat16")),
]  # fmt: skip


# --- checkpoints -----------------------------------------------------------------------------------------------------

SCALE, PROJECTION = "model.logit_scale", "model.visual_projection.weight"


class Anything:
    """What a pickle may hold beside tensors."""


def saved(content):
    """A reward checkpoint of any bytes."""
    return lambda world: StepAwareRewardModel.from_original_checkpoint(
        str(world.file("reward.bin", content)), clip=world.clip()
    )


def truncated_reward(world, size):
    path = world.folder / "reward.safetensors"
    save_file(world.reward_model().state_dict(), path)
    path.write_bytes(path.read_bytes()[:size])
    return StepAwareRewardModel.from_original_checkpoint(str(path), clip=world.clip())


def reloaded(change):
    """A saved reward model, of whose folder something was changed."""

    def act(world):
        folder = world.saved_reward_model()
        change(folder)
        return StepAwareRewardModel.from_pretrained(folder)

    return act


def rewrite_weights(change):
    def act(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return act


def config_of(content):
    return reloaded(lambda folder: (folder / "config.json").write_text(content))


def load_lora(change=None, **config):
    """A trainer reads a changed adapter back; whatever happens, its own weights stay as they were."""

    def act(world):
        folder = world.lora(**config)
        if change is not None:
            change(folder)
        trainer = world.trainer(peft_config=LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k"]))
        before = state_of(trainer.pipeline.denoiser)
        try:
            trainer.load_model(folder)
        except Exception:
            assert not changed(before, trainer.pipeline.denoiser)
            raise
        return trainer, before

    return act


def rewrite_lora(change):
    def act(folder):
        weights = load_file(folder / LORA)
        change(weights)
        save_file(weights, folder / LORA)

    return act


def first_of(weights) -> str:
    return sorted(weights)[0]


def replace_first(function):
    return lambda weights: weights.update({first_of(weights): function(weights[first_of(weights)])})


def other_scale(world, model):
    assert model.model.logit_scale.dtype == torch.float32
    assert model.model.visual_projection.weight.dtype == torch.float32


FITS = "does not fit"
CHECKPOINTS = [
    refused("reward-weights-missing-key", ValueError, f"{FITS} .*missing: {SCALE}", lambda world: world.original(lambda w: w.pop(SCALE) and None)),
    refused("reward-weights-extra-key", ValueError, f"{FITS} .*unexpected: model.extra", lambda world: world.original(lambda w: w.update({"model.extra": torch.ones(1)}))),
    refused("reward-weights-wrong-shape", ValueError, rf"{FITS} .*wrong shape: {PROJECTION} \(3, 16\) for \(12, 16\)", lambda world: world.original(lambda w: w.update({PROJECTION: torch.ones(3, 16)}))),
    refused("reward-weights-of-integers", ValueError, f"{PROJECTION}.*(int64|floating)", lambda world: world.original(lambda w: w.update({PROJECTION: w[PROJECTION].long()}))),
    refused("reward-weights-complex", ValueError, f"{PROJECTION}.*(complex64|floating)", lambda world: world.original(lambda w: w.update({PROJECTION: w[PROJECTION].to(torch.complex64)}))),
    handled("reward-weights-half", lambda world: world.original(lambda w: {k: v.half() for k, v in w.items()}), other_scale),
    refused("reward-weights-nested", ValueError, "is not a flat state dict of tensors", lambda world: world.original(lambda w: {"state_dict": dict(w)})),
    refused("reward-weights-numbered", ValueError, "is not a flat state dict of tensors", lambda world: world.original(lambda w: dict(enumerate(w.values())))),
    refused("reward-weights-a-list", ValueError, "is not a flat state dict of tensors", lambda world: world.original(lambda w: list(w.values()))),
    refused("reward-weights-a-tensor", ValueError, "is not a flat state dict of tensors", lambda world: world.original(lambda w: torch.ones(3))),
    refused("reward-weights-an-empty-dict", ValueError, f"{FITS} .*missing: ", lambda world: world.original(lambda w: {"position_ids": torch.ones(1)})),
    refused("reward-pickle-of-an-object", ValueError, "was refused: it is not a file of plain tensors", saved(pickle.dumps(Anything()))),
    refused("reward-pickle-of-a-number", ValueError, "not a flat state dict|was refused|cannot be read", saved(pickle.dumps(3))),
    refused("reward-file-empty", ValueError, "cannot be read, the download may be incomplete|was refused", saved(b"")),
    refused("reward-file-text", ValueError, "cannot be read|was refused", saved(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")),
    refused("reward-file-zeros", ValueError, "cannot be read|was refused", saved(bytes(1000))),
    refused("reward-file-missing", FileNotFoundError, "There is no checkpoint file at .*nowhere.bin", lambda world: StepAwareRewardModel.from_original_checkpoint(str(world.folder / "nowhere.bin"), clip=world.clip())),
    refused("reward-file-is-a-folder", FileNotFoundError, "There is no checkpoint file at", lambda world: StepAwareRewardModel.from_original_checkpoint(str(world.folder), clip=world.clip())),
    *(refused(f"reward-safetensors-cut-at-{size}", ValueError, "cannot be read, the download may be incomplete|was refused", lambda world, size=size: truncated_reward(world, size)) for size in (0, 4, 50, 9_000)),
    refused("reward-config-no-json", ValueError, "config.json.* (JSON|json)", config_of("{broken")),
    refused("reward-config-empty", ValueError, "config.json.* (JSON|json)", config_of("")),
    refused("reward-config-a-list", ValueError, "config.json", config_of("[1, 2]")),
    refused("reward-config-of-another-model", ValueError, "holds a 'clip' model, not a step-aware reward model", config_of('{"model_type": "clip"}')),
    refused("reward-config-without-a-type", ValueError, "holds a None model, not a step-aware reward model", config_of("{}")),
    refused("reward-folder-without-config", FileNotFoundError, "holds no step-aware reward model", reloaded(lambda folder: (folder / "config.json").unlink())),
    refused("reward-folder-without-weights", (FileNotFoundError, OSError, ValueError), "model.safetensors|weights", reloaded(lambda folder: (folder / "model.safetensors").unlink())),
    refused("reward-folder-with-cut-weights", (OSError, ValueError), "reward", reloaded(truncate("model.safetensors", 500))),
    refused("reward-folder-missing-key", ValueError, f"do not fit .*{re.escape(PROJECTION)}", reloaded(rewrite_weights(lambda w: w.pop(PROJECTION)))),
    refused("reward-folder-extra-key", ValueError, "do not fit .*model.extra", reloaded(rewrite_weights(lambda w: w.update({"model.extra": torch.ones(1)})))),
    refused("reward-folder-wrong-shape", (ValueError, TypeError), "reward", reloaded(rewrite_weights(lambda w: w.update({PROJECTION: torch.ones(3, 16)})))),
    refused("clip-folder-missing", FileNotFoundError, "There is no CLIP model at .*nowhere", lambda world: StepAwareRewardModel.from_clip(str(world.folder / "nowhere"))),
    refused("clip-folder-empty", FileNotFoundError, "holds no CLIP model", lambda world: StepAwareRewardModel.from_clip(str(world.folder))),
    handled("lora-as-saved", load_lora(), lambda world, result: _same(bool(changed(result[1], result[0].pipeline.denoiser)), True)),
    refused("lora-of-another-rank", ValueError, "does not fit the adapter being trained .*Use the `peft_config` of the run", load_lora(r=2)),
    refused("lora-of-other-layers", ValueError, "does not fit the adapter being trained", load_lora(target_modules=["to_v"])),
    refused("lora-missing-key", ValueError, "does not fit the adapter being trained", load_lora(rewrite_lora(lambda w: w.pop(first_of(w))))),
    refused("lora-extra-key", ValueError, "does not fit the adapter being trained", load_lora(rewrite_lora(lambda w: w.update({"unet.more.lora.up.weight": torch.ones(2, 4)})))),
    refused("lora-wrong-shape", ValueError, "does not fit the adapter being trained", load_lora(rewrite_lora(replace_first(lambda w: w.T.contiguous())))),
    refused("lora-of-integers", ValueError, "which is not a tensor of real numbers", load_lora(rewrite_lora(replace_first(lambda w: w.long())))),
    refused("lora-of-nan", ValueError, "NaN or infinite", load_lora(rewrite_lora(replace_first(lambda w: w * NAN)))),
    refused("lora-truncated", ValueError, "that can be read, it may be incomplete", load_lora(truncate(LORA, 300))),
    refused("lora-empty", ValueError, "that can be read, it may be incomplete", load_lora(truncate(LORA, 0))),
    refused("lora-absent", ValueError, f"has no {LORA}, so it is no SPO checkpoint", load_lora(lambda folder: (folder / LORA).unlink())),
    refused("lora-of-an-earlier-broken-run", ValueError, "that can be read, it may be incomplete", lambda world: world.trainer().load_model(world.output_dir / "checkpoint-7")),
]  # fmt: skip


CASES = [*CONFIGS, *PROMPT_CASES, *IMAGES, *PAIRS, *PIPELINES, *REWARDS, *CHECKPOINTS]
ALLOWED = (ValueError, TypeError, FileNotFoundError, OSError)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_input(case, world):
    before = world.snapshot()
    with counted_forwards() as calls:
        if case.error is None:
            case.check(world, case.act(world))
        else:
            with pytest.raises(case.error, match=re.compile(case.message, re.DOTALL)) as caught:
                case.act(world)
            assert type(caught.value) in ALLOWED, "an error from somewhere deep"
            assert len(calls) <= case.most_forwards, calls
    assert world.snapshot() == before


def test_the_table_is_large_and_names_are_unique():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    by_hand = [case for case in CASES if case not in CONFIGS] + CONFIGS[: len(SPO) + len(REWARD)]
    assert len(by_hand) >= 80
    assert all(case.message for case in CASES if case.error)


def test_what_the_table_relies_on(world):
    """Forward passes are counted and a changed output directory is seen: otherwise nothing above could fail."""
    before = world.snapshot()
    with counted_forwards() as calls:
        world.rollout(brightness_reward)
        assert {calls.count("UNet2DConditionModel"), calls.count("Decoder")} == {1 + 2, 3}
        wrap_pipeline(world.pipeline()).encode_images(torch.zeros(1, 3, 16, 16))
        assert calls.count("Encoder") == 1
    world.trainer(max_steps=1).save_model()
    after = world.snapshot()
    assert LORA in after and after["README.md"] != before["README.md"]


def messages_of(*names):
    """A handler that keeps what these loggers, which may not pass it on, say."""
    handler = logging.Handler()
    handler.records = []
    handler.emit = handler.records.append
    for name in names:
        logging.getLogger(name).addHandler(handler)
    return handler


@pytest.mark.parametrize("make", [tiny_sd_pipeline, tiny_sdxl_pipeline])
def test_a_long_prompt_is_cut_with_one_warning(tmp_path, make):
    """diffusers prints all of the rest at every call, which is a page for each prompt of each rollout."""
    pipeline = wrap_pipeline(make(tmp_path))
    handler = messages_of("diffusers", "transformers", "trl_spo")
    try:
        first = pipeline.encode_prompt([LONG, "a cat"], LONG)
        pipeline.encode_prompt([LONG, LONG])
        second = pipeline.encode_prompt([LONG, "a cat"], LONG)
    finally:
        for name in ("diffusers", "transformers", "trl_spo"):
            logging.getLogger(name).removeHandler(handler)
    (record,) = handler.records
    message = record.getMessage()
    assert re.search(r"A prompt has 4002 tokens and the text encoder reads 8", message), message
    assert len(message) < 300
    assert torch.equal(first.prompt_embeds, second.prompt_embeds)
    cut = pipeline.encode_prompt(["a red cat on a green"])  # all that is left between the two tokens around it
    torch.testing.assert_close(first.prompt_embeds[:1], cut.prompt_embeds)


def test_folders_of_a_config_may_be_paths(tmp_path):
    config = SPOConfig(tmp_path, scoring_vae=tmp_path / "vae", dataset_name=tmp_path / "prompts")
    assert (config.scoring_vae, config.dataset_name) == (str(tmp_path / "vae"), str(tmp_path / "prompts"))
    with pytest.raises(TypeError, match="`beta` must be a number"):
        SPOConfig(tmp_path, beta=tmp_path)


def test_a_config_of_a_user_may_name_types_for_type_checkers_only(tmp_path):
    """Its own fields are not looked at then; ours are."""

    @dataclasses.dataclass
    class Config(SPOConfig):
        mine: "OnlyForTypeCheckers | None" = None  # noqa: F821

    assert Config(tmp_path, beta=3).beta == 3
    with pytest.raises(TypeError, match="`beta` must be a number"):
        Config(tmp_path, beta="3")


def test_strange_prompts_train_are_saved_and_resumed(tmp_path):
    """They pass through model cards, states, hashes and image logs, where encodings can fail."""
    prompts = [*STRANGE.values(), *PROMPTS]

    def trainer(**settings):
        config = tiny_spo_config(
            tmp_path / "run", **SETTINGS, save_strategy="steps", save_steps=1, log_images_steps=1,
            per_device_rollout_batch_size=len(prompts), **settings,
        )  # fmt: skip
        return SPOTrainer(config, tiny_sd_pipeline(tmp_path), brightness_reward, train_dataset=prompts)

    trainer(max_steps=1).train()
    resumed = trainer(max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    assert resumed.state.global_step == 2
    assert (tmp_path / "run" / LORA).is_file() and (tmp_path / "run" / "README.md").is_file()
