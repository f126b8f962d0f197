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
Arguments that the example scripts read beside a config of `trl_spo`, for `trl.TrlParser`.

TRL's own `ModelConfig` and `ScriptArguments` cannot stand here: `use_peft` and `dataset_name` are fields of our configs
too, and a parser takes each name once. The names that remain are theirs.
"""

from dataclasses import dataclass, field

from peft import LoraConfig


@dataclass
class DiffusionModelArguments:
    r"""
    Which diffusion model, and which adapter on it.

    Args:
        model_name_or_path (`str`, *optional*, defaults to `"stable-diffusion-v1-5/stable-diffusion-v1-5"`):
            Folder or Hub id of the diffusers pipeline.
        vae_name_or_path (`str`, *optional*):
            Folder or Hub id of another VAE for it. SDXL's own does not survive half precision.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision in which the pipeline is loaded. Adapters are float32 in any case.
        lora_r (`int`, *optional*, defaults to `4`):
            Rank of the adapter.
        lora_alpha (`int`, *optional*, defaults to `4`):
            The adapter is scaled by `lora_alpha / lora_r`.
        lora_target_modules (`list[str]`, *optional*, defaults to `["to_q", "to_k", "to_v", "to_out.0"]`):
            Layers that get it.
        lora_init (`str`, *optional*, defaults to `"gaussian"`):
            `init_lora_weights` of the adapter.
    """

    model_name_or_path: str = field(
        default="stable-diffusion-v1-5/stable-diffusion-v1-5",
        metadata={"help": "Folder or Hub id of the diffusers pipeline."},
    )
    vae_name_or_path: str | None = field(default=None, metadata={"help": "Folder or Hub id of another VAE for it."})
    dtype: str = field(default="float32", metadata={"help": "Precision in which the pipeline is loaded."})
    lora_r: int = field(default=4, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=4, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"], metadata={"help": "Layers that get it."}
    )
    lora_init: str = field(default="gaussian", metadata={"help": "`init_lora_weights` of the adapter."})

    def load_pipeline(self, **kwargs):
        """The pipeline that the arguments name; `kwargs` go to `from_pretrained` and come first."""
        from trl_spo import wrap_pipeline

        if self.vae_name_or_path is not None:
            kwargs.setdefault("vae", self.vae_name_or_path)
        kwargs.setdefault("torch_dtype", self.dtype)
        return wrap_pipeline(self.model_name_or_path, **kwargs)

    def peft_config(self) -> LoraConfig:
        """The adapter for `SPOTrainer(peft_config=...)`."""
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            init_lora_weights=self.lora_init,
            target_modules=list(self.lora_target_modules),
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
    Which reward model, in one of three forms.

    Args:
        reward_model_name_or_path (`str`, *optional*):
            Folder or Hub id of a saved `StepAwareRewardModel`. Goes before the other forms.
        reward_checkpoint (`str`, *optional*):
            File in the format of the SPO authors, or the Hub id of a repository of such files.
        reward_checkpoint_filename (`str`, *optional*):
            Name of the file in that repository.
        clip_name_or_path (`str`, *optional*, defaults to `"yuvalkirstain/PickScore_v1"`):
            Folder or Hub id of the CLIP that a fresh reward model starts from, and that tells a checkpoint's
            architecture.
        processor_name_or_path (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            Folder or Hub id of its tokenizer and image settings.
    """

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a saved StepAwareRewardModel."}
    )
    reward_checkpoint: str | None = field(
        default=None, metadata={"help": "File in the format of the SPO authors, or the Hub id of its repository."}
    )
    reward_checkpoint_filename: str | None = field(
        default=None, metadata={"help": "Name of the file in that repository."}
    )
    clip_name_or_path: str = field(
        default="yuvalkirstain/PickScore_v1", metadata={"help": "CLIP that a fresh reward model starts from."}
    )
    processor_name_or_path: str = field(
        default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", metadata={"help": "Its tokenizer and image settings."}
    )

    def load(self):
        """The [`StepAwareRewardModel`] that the arguments name."""
        from trl_spo import StepAwareRewardModel

        if self.reward_model_name_or_path is not None:
            return StepAwareRewardModel.from_pretrained(self.reward_model_name_or_path)
        if self.reward_checkpoint is not None:
            return StepAwareRewardModel.from_original_checkpoint(
                self.reward_checkpoint,
                clip=self.clip_name_or_path,
                processor=self.processor_name_or_path,
                filename=self.reward_checkpoint_filename,
            )
        return StepAwareRewardModel.from_clip(self.clip_name_or_path, processor=self.processor_name_or_path)
