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
Arguments that the scripts read beside a config, for `trl.TrlParser`.

TRL's own `ModelConfig` and `ScriptArguments` cannot be used: `use_peft` and `dataset_name` are also fields of our configs, and
a parser takes each name once. All other names are the same as in TRL.
"""

import argparse
import json
import os
from dataclasses import dataclass, field
from pathlib import Path


STEP_REWARD = "step_reward"  # among names: the model of [`RewardModelArguments`]


def leave_process_group():
    """
    Called last by programs that may run in several processes: threads of an open group can abort a process that ends, and
    the launcher then reports a run as failed that has written everything.
    """
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def json_option(name: str, text: str):
    """The value of an option that is JSON on the command line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` must be JSON, got {text!r} ({error}).") from error


@dataclass
class PipelineArguments:
    r"""
    Which diffusion model.

    Args:
        model_name_or_path (`str`, *optional*, defaults to `"stable-diffusion-v1-5/stable-diffusion-v1-5"`):
            Folder or Hub id of the diffusers pipeline.
        vae_name_or_path (`str`, *optional*):
            Folder or Hub id of another VAE for it. SDXL's own does not survive half precision.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision in which the pipeline is loaded. Adapters are float32 in any case.
        variant (`str`, *optional*):
            Kind of files to load, such as `"fp16"` where a repository has no others.
        revision (`str`, *optional*):
            Branch, tag or commit of the pipeline's repository.
    """

    model_name_or_path: str = field(
        default="stable-diffusion-v1-5/stable-diffusion-v1-5",
        metadata={"help": "Folder or Hub id of the diffusers pipeline."},
    )
    vae_name_or_path: str | None = field(default=None, metadata={"help": "Folder or Hub id of another VAE for it."})
    dtype: str = field(
        default="float32",
        metadata={
            "choices": ["float32", "bfloat16", "float16"],
            "help": "Precision in which the pipeline is loaded.",
        },
    )
    variant: str | None = field(default=None, metadata={"help": "Kind of files to load, such as fp16."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the pipeline."})

    def load_pipeline(self, **kwargs):
        """The pipeline that the arguments name; `kwargs` go to `from_pretrained` and come first."""
        from ..pipelines.auto import wrap_pipeline

        if self.vae_name_or_path is not None:
            kwargs.setdefault("vae", self.vae_name_or_path)
        if "torch_dtype" not in kwargs:  # its old name
            kwargs.setdefault("dtype", self.dtype)
        for name, value in (("variant", self.variant), ("revision", self.revision)):
            if value is not None:
                kwargs.setdefault(name, value)
        return wrap_pipeline(self.model_name_or_path, **kwargs)


@dataclass
class LoadedPipelineArguments(PipelineArguments):
    r"""
    Which diffusion model, by the arguments of [`PipelineArguments`], for programs whose config does not say how it is loaded.

    Args:
        model_init_kwargs (`dict`, *optional*):
            Further keyword arguments of `from_pretrained`, which go before the others. JSON on the command line.
    """

    model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further keyword arguments of from_pretrained, as JSON."}
    )

    def __post_init__(self):
        if isinstance(self.model_init_kwargs, str):
            self.model_init_kwargs = json_option("model_init_kwargs", self.model_init_kwargs)
        if not isinstance(self.model_init_kwargs or {}, dict):
            raise ValueError(f"`model_init_kwargs` must be a dictionary, got {self.model_init_kwargs!r}.")

    def load_pipeline(self, **kwargs):
        return super().load_pipeline(**{**(self.model_init_kwargs or {}), **kwargs})


@dataclass
class DiffusionModelArguments(PipelineArguments):
    r"""
    Which diffusion model, by the arguments of [`PipelineArguments`], and which adapter on it.

    Args:
        lora_r (`int`, *optional*):
            Rank of the adapter. `None`: that of the model family, such as 4 for Stable Diffusion and 32 for flow models.
        lora_alpha (`int`, *optional*):
            The adapter is scaled by `lora_alpha / lora_r`. `None`: the rank.
        lora_target_modules (`list[str]`, *optional*):
            Layers that get it. `None`: those of the model family.
        lora_init (`str`, *optional*, defaults to `"gaussian"`):
            `init_lora_weights` of the adapter.
    """

    lora_r: int | None = field(default=None, metadata={"help": "Rank of the adapter; by default the family's."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "The adapter is scaled by lora_alpha / lora_r; by default the rank."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers that get it; by default the family's."}
    )
    lora_init: str = field(default="gaussian", metadata={"help": "`init_lora_weights` of the adapter."})

    def check_lora(self) -> None:
        """
        Try the settings of the adapter on one small layer, before a model is loaded.

        Raises:
            ValueError: if peft refuses them.
        """
        from peft import LoraConfig, inject_adapter_in_model
        from torch import nn

        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise ValueError(
                f"`lora_alpha` must be at least 1, got {self.lora_alpha}: the adapter would have no effect."
            )
        rank = 2 if self.lora_r is None else self.lora_r
        try:
            config = LoraConfig(r=rank, init_lora_weights=self.lora_init, target_modules=["0"])
            inject_adapter_in_model(config, nn.Sequential(nn.Linear(2, 2)))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"peft refuses an adapter with `lora_r={rank}` and `lora_init={self.lora_init!r}`: {error}"
            ) from error

    def peft_config(self, pipeline):
        """The `peft.LoraConfig` for `SPOTrainer(pipeline=pipeline, peft_config=...)`."""
        from peft import LoraConfig

        own = pipeline.default_lora()
        rank = own.r if self.lora_r is None else self.lora_r
        return LoraConfig(
            r=rank,
            lora_alpha=rank if self.lora_alpha is None else self.lora_alpha,
            init_lora_weights=self.lora_init,
            target_modules=list(self.lora_target_modules or own.target_modules),
        )


@dataclass
class EvaluationDataArguments:
    r"""
    What to evaluate on.

    Args:
        eval_dataset_name (`str`, *optional*):
            In the form of `dataset_name`.
        eval_split (`str`, *optional*, defaults to `"validation"`):
            Its split, if it has splits.
    """

    eval_dataset_name: str | None = field(default=None, metadata={"help": "In the form of `dataset_name`."})
    eval_split: str = field(default="validation", metadata={"help": "Split of the evaluation dataset."})


@dataclass
class RewardModelArguments:
    r"""
    Which reward model, in one of three forms: a saved one, a checkpoint of its authors, or a fresh one.

    Args:
        reward_model_name_or_path (`str`, *optional*):
            Folder or Hub id of a saved `StepAwareRewardModel` or `LatentRewardModel`. Goes before the other forms.
        reward_type (`str`, *optional*, defaults to `"step_aware"`):
            What checkpoint or fresh model the other arguments mean: `"step_aware"` (a CLIP, judges predicted images) or
            `"latent"` (the diffusion model's own backbone, judges noisy latents).
        reward_checkpoint (`str`, *optional*):
            File in the format of the SPO authors, or the Hub id of a repository of such files; of a latent reward, folder
            or Hub id in the format of the LPO authors.
        reward_checkpoint_filename (`str`, *optional*):
            Name of the file in that repository.
        reward_checkpoint_subfolder (`str`, *optional*):
            Folder of a latent reward in its repository, such as `"lrm_sd15"`.
        clip_name_or_path (`str`, *optional*, defaults to `"yuvalkirstain/PickScore_v1"`):
            Folder or Hub id of the CLIP that a fresh reward model starts from, and that tells a checkpoint's
            architecture.
        processor_name_or_path (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            Folder or Hub id of its tokenizer and image settings.
    """

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a saved reward model."}
    )
    reward_type: str = field(
        default="step_aware", metadata={"help": "What checkpoint or fresh model is meant: step_aware or latent."}
    )
    reward_checkpoint: str | None = field(
        default=None,
        metadata={"help": "File of the SPO authors, folder of the LPO authors, or the Hub id of its repository."},
    )
    reward_checkpoint_filename: str | None = field(
        default=None, metadata={"help": "Name of the file in that repository."}
    )
    reward_checkpoint_subfolder: str | None = field(
        default=None, metadata={"help": "Folder of a latent reward in that repository."}
    )
    clip_name_or_path: str = field(
        default="yuvalkirstain/PickScore_v1", metadata={"help": "CLIP that a fresh reward model starts from."}
    )
    processor_name_or_path: str = field(
        default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", metadata={"help": "Its tokenizer and image settings."}
    )

    def __post_init__(self):
        if self.reward_type not in ("step_aware", "latent"):
            raise ValueError(f"`reward_type` must be 'step_aware' or 'latent', got {self.reward_type!r}.")

    def load(self, pipeline=None):
        """
        The reward model that the arguments name.

        Args:
            pipeline ([`SPOPipeline`], *optional*): where a fresh latent reward, which is to be trained, takes its weights
                from.
        """
        from ..rewards.base import load_reward_model
        from ..rewards.latent import LatentRewardModel
        from ..rewards.step_aware_clip import StepAwareRewardModel

        if self.reward_model_name_or_path is not None:
            return load_reward_model(self.reward_model_name_or_path)
        if self.reward_type == "latent":
            if self.reward_checkpoint is not None:
                return LatentRewardModel.from_original_checkpoint(
                    self.reward_checkpoint, self.reward_checkpoint_subfolder
                )
            if pipeline is None:
                raise SystemExit(
                    "The heads of a fresh latent reward model are random: name a trained one with "
                    "--reward_model_name_or_path or --reward_checkpoint."
                )
            return LatentRewardModel.from_pipeline(pipeline)
        if self.reward_checkpoint is not None:
            return StepAwareRewardModel.from_original_checkpoint(
                self.reward_checkpoint,
                clip=self.clip_name_or_path,
                processor=self.processor_name_or_path,
                filename=self.reward_checkpoint_filename,
            )
        return StepAwareRewardModel.from_clip(self.clip_name_or_path, processor=self.processor_name_or_path)


class Repeatable(argparse.Action):
    """Collects the values of an option that is given several times; those of a config are replaced, not extended."""

    def __call__(self, parser, namespace, values, option_string=None):
        collected = getattr(namespace, self.dest)
        collected = [] if collected is self.default else collected
        setattr(namespace, self.dest, [*collected, *values])


@dataclass
class RewardArguments(RewardModelArguments):
    r"""
    What SPO is to prefer: rewards by name, or the reward model of the arguments of [`RewardModelArguments`].

    Args:
        reward (`list[str]`, *optional*):
            One or several rewards, each by name, with `=weight` or without: a published metric such as `pickscore`, one of
            your own as `module:attribute`, or the folder or Hub id of a saved reward model. `step_reward` is the reward model
            of the other arguments, which are used for nothing else then. In YAML a list, or weights by name.
        reward_options (`dict`, *optional*):
            Per reward, arguments of its `from_pretrained`, class or factory. JSON on the command line.
    """

    reward: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward by name, such as pickscore=0.7 or my_module:function=0.3; may be repeated.",
            "action": Repeatable,
        },
    )
    reward_options: dict | str | None = field(
        default=None, metadata={"help": "Per reward, arguments of its from_pretrained, class or factory, as JSON."}
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.reward, dict):
            self.reward = [f"{name}={weight}" for name, weight in self.reward.items()]
        elif isinstance(self.reward, str):
            self.reward = [self.reward]
        if isinstance(self.reward_options, str):
            self.reward_options = json_option("reward_options", self.reward_options)

    def check(self) -> None:
        """
        What can be said before anything is loaded.

        Raises:
            ValueError, TypeError: for a name that is no reward, with the one that was probably meant.
            FileNotFoundError: for a saved reward model that is not there.
        """
        if self.reward is not None:
            from ..evaluation.named import check_rewards

            check_rewards(self.reward, self.reward_options, own=[STEP_REWARD])
        elif self.reward_options:
            raise ValueError("`reward_options` are for the rewards of `reward`, and there are none.")
        elif self.reward_model_name_or_path is not None:
            from ..hub_files import require_existing

            require_existing(self.reward_model_name_or_path, "reward model")

    def load(self, pipeline=None):
        """The reward that the arguments name; see [`RewardModelArguments`]."""
        if self.reward is None:
            return super().load(pipeline)
        from ..evaluation.named import load_reward

        return load_reward(self.reward, self.reward_options, own={STEP_REWARD: super().load})


@dataclass
class SamplerArguments:
    r"""
    From which prompts, with which adapter, sampler and seeds images are made.

    Args:
        prompts (`str`, *optional*):
            File, dataset folder, Hub id or suite of prompts, as [`load_prompts`] takes it.
        prompts_split (`str`, *optional*, defaults to `"train"`):
            Split of a prompt dataset, or category of a suite.
        prompts_column (`str`, *optional*):
            Its column. Defaults to `"prompt"` or `"caption"`, whichever exists.
        num_prompts (`int`, *optional*):
            Use the first of them only.
        lora (`str`, *optional*):
            Folder, file or Hub id of a LoRA that `load_lora_weights` of diffusers reads.
        lora_scale (`float`, *optional*, defaults to `1.0`):
            Weight of the LoRA; 0 is the base model.
        protocol (`str`, *optional*, defaults to `"trained"`):
            The sampler, by name. `"trained"` is the one that the LoRA was trained for (`sampler.json` beside it), and the
            default one where there is no LoRA or it does not say: 20 steps, guidance 5, eta 1 with the scheduler of the
            model. The others are those of `trl_spo.evaluation.protocols.PROTOCOLS`. Options of the sampler go before it.
        num_inference_steps (`int`, *optional*):
            Denoising steps. `None`: those of the protocol.
        guidance_scale (`float`, *optional*):
            Classifier-free guidance. `None`: that of the protocol.
        eta (`float`, *optional*):
            Noise of the steps. `None`: that of the protocol.
        guidance_rescale (`float`, *optional*), clip_skip (`int`, *optional*):
            As in diffusers, for Stable Diffusion. `None`: those of the protocol, or off.
        negative_prompt (`str`, *optional*):
            Prompt of the unconditional half of the guidance. `None`: that of the protocol.
        height (`int`, *optional*), width (`int`, *optional*):
            Image size in pixels. Default to the protocol's, or the model's own.
        seed (`list[int]`, *optional*):
            Seed of the first image; image i has `seed + i`. `None`: that of the protocol, which is 0. `sample` also takes
            -1, a random seed that it writes down, and several seeds, from each of which it makes an image of every prompt.
        batch_size (`int`, *optional*, defaults to `8`):
            Images sampled together. It does not change them, beyond rounding.
        device (`str`, *optional*):
            Where to run. Defaults to a GPU if there is one.
        output_dir (`str`, *optional*, defaults to `"outputs"`):
            Where results go.
    """

    prompts: str | None = field(
        default=None, metadata={"help": "File, dataset, Hub id or suite of prompts, such as parti."}
    )
    prompts_split: str = field(default="train", metadata={"help": "Split of a prompt dataset."})
    prompts_column: str | None = field(default=None, metadata={"help": "Its column with the prompts."})
    num_prompts: int | None = field(default=None, metadata={"help": "Use the first of them only."})
    lora: str | None = field(default=None, metadata={"help": "Folder, file or Hub id of a LoRA."})
    lora_scale: float = field(default=1.0, metadata={"help": "Weight of the LoRA; 0 is the base model."})
    protocol: str = field(
        default="trained",
        metadata={
            "help": "Name of a sampler: trained (that of the LoRA, or the default one), spo-paper, spo-rollout, sd3, flux, "
            "flux2-klein, z-image, qwen-image."
        },
    )
    num_inference_steps: int | None = field(default=None, metadata={"help": "Denoising steps."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Classifier-free guidance."})
    eta: float | None = field(default=None, metadata={"help": "Noise of the steps."})
    guidance_rescale: float | None = field(default=None, metadata={"help": "As in diffusers; off by default."})
    clip_skip: int | None = field(default=None, metadata={"help": "As in diffusers; off by default."})
    negative_prompt: str | None = field(default=None, metadata={"help": "Prompt of the unconditional half."})
    height: int | None = field(default=None, metadata={"help": "Image height in pixels."})
    width: int | None = field(default=None, metadata={"help": "Image width in pixels."})
    seed: list[int] | None = field(
        default=None,
        metadata={
            "help": "Seed of the first image; image i has seed + i. sample takes several, and -1 for a random one."
        },
    )
    batch_size: int = field(default=8, metadata={"help": "Images sampled together."})
    device: str | None = field(default=None, metadata={"help": "Where to run; a GPU if there is one."})
    output_dir: str = field(default="outputs", metadata={"help": "Where results go."})

    def __post_init__(self):
        for name in ("num_prompts", "num_inference_steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if isinstance(self.seed, int):  # from a YAML file or Python
            self.seed = [self.seed]
        if self.seed is not None and (not self.seed or min(self.seed) < -1 or max(self.seed) >= 2**63):
            raise ValueError(f"`seed` must be 0 or more, or -1 for a random one, got {self.seed}.")

    @property
    def has_one_seed(self) -> bool:
        """Whether there is one seed that is no random one, given or by default."""
        return self.seed is None or (len(self.seed) == 1 and self.seed[0] >= 0)

    def overrides(self) -> dict:
        """The settings of the sampler that were given, by name."""
        names = ("num_inference_steps", "guidance_scale", "eta", "negative_prompt", "height", "width")
        names += ("guidance_rescale", "clip_skip")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def read_prompts(self) -> list[str]:
        """The prompts that the arguments name."""
        from ..prompts import load_prompts, read_prompts

        if self.prompts is None:
            raise SystemExit("There are no prompts: name a .txt file with one per line, or a dataset, with --prompts.")
        prompts = read_prompts(load_prompts(self.prompts, self.prompts_split), self.prompts_column, "prompts")
        return prompts[: self.num_prompts]

    def source_of_prompts(self) -> dict:
        """Where they come from, for records: a split is that of a dataset, and a file has none."""
        is_file = self.prompts is None or Path(self.prompts).is_file()
        split = None if is_file else self.prompts_split
        return {"source": self.prompts, "split": split, "column": self.prompts_column}

    def target_device(self) -> str:
        """The device that was named, or a GPU if there is one: that of this process, if there are several."""
        import torch

        local_rank = os.environ.get("LOCAL_RANK", "0")
        return self.device or (f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")

    def locate_lora(self) -> Path | None:
        """
        The local file of the LoRA, `None` if none was named. Asked for before anything else is loaded.

        Raises:
            FileNotFoundError: if there is no such LoRA.
        """
        from ..export import locate_lora

        return None if self.lora is None else locate_lora(self.lora)

    def place(self, pipeline):
        """Moves an [`SPOPipeline`] to the device, with the LoRA in it."""
        from ..export import load_lora_whole

        source = self.locate_lora()
        if source is not None:
            load_lora_whole(pipeline.sd_pipeline, source, with_text_encoders=True, adapter_name="spo")
            pipeline.sd_pipeline.set_adapters("spo", self.lora_scale)
        return pipeline.to(self.target_device())
