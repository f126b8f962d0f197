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
Why this file exists: a preset is read once, by someone who then spends 80 GPU hours on it. Each must parse as the
scripts parse it, hold the published numbers (written out below once more, from the paper's table), and be what the
configs do by default.
"""

import inspect
import subprocess
from pathlib import Path

import pytest
import yaml
from diffusers import BitsAndBytesConfig
from trl import TrlParser

from tests.flow_testing import (
    tiny_flux2_klein_pipeline,
    tiny_flux_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_z_image_pipeline,
)
from tests.testing_utils import PROMPTS, tiny_clip, tiny_sd_pipeline
from trl_spo import (
    SPOConfig,
    SPOFlux2KleinPipeline,
    SPOFluxPipeline,
    SPOQwenImagePipeline,
    SPOStableDiffusion3Pipeline,
    SPOZImagePipeline,
    StepAwareRewardModel,
    StepRewardConfig,
    wrap_pipeline,
)
from trl_spo.pipelines.denoiser import default_lora_config
from trl_spo.scripts import spo
from trl_spo.scripts.arguments import DiffusionModelArguments, RewardModelArguments


EXAMPLES = Path(__file__).parent.parent / "examples"


SPO = {  # published for both models
    "num_train_epochs": 10,
    "num_inference_steps": 20,
    "guidance_scale": 5.0,
    "eta": 1.0,
    "branch_start_step": 4,
    "resample": "random",
    "pair": "best_worst",
    "epsilon": 0.1,
    "beta": 10.0,
    "train_cfg": True,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 1e-4,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "constant",
    "fp16": True,
    "lora_target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
    "lora_init": "gaussian",
}
STEP_REWARD = {
    "clip_name_or_path": "yuvalkirstain/PickScore_v1",
    "processor_name_or_path": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "dataset_name": "yuvalkirstain/pickapic_v1",
    "guidance_scale": 5.0,
    "min_timestep": 0,
    "max_timestep": 999,
    "weight_decay": 0.3,
    "warmup_steps": 500,
    "max_grad_norm": 1.0,
    "bf16": True,
    "eval_timesteps": [0, 251, 501, 701, 951],
}
LPO = {  # https://huggingface.co/papers/2502.01051 and its code
    **{name: SPO[name] for name in SPO if name not in ("num_train_epochs", "branch_start_step", "beta")},
    "num_train_epochs": 5,
    "branch_start_step": 0,
    "beta": 500.0,
    "num_candidates": 4,
    "num_inner_steps": 1,
    "reward_type": "latent",
    "reward_checkpoint": "casiatao/LRM",
}
LATENT_REWARD = {
    "reward_type": "latent",
    "timesteps": [1, *range(51, 1000, 50)],
    "independent_noise": True,
    "learning_rate": 1e-5,
    "weight_decay": 0.3,
    "max_grad_norm": 1.0,
    "bf16": True,
}
TABLE = {
    "lpo_sd15": LPO
    | {
        "lora_r": 4,
        "lora_alpha": 4,
        "learning_rate": 6e-5,
        "per_device_train_batch_size": 10,
        "per_device_rollout_batch_size": 5,
        "preference_threshold": [0.35, 0.5],
        "reward_checkpoint_subfolder": "lrm_sd15",
    },
    "lpo_sdxl": LPO
    | {
        "lora_r": 64,
        "lora_alpha": 64,
        "learning_rate": 1e-5,
        "per_device_train_batch_size": 4,
        "per_device_rollout_batch_size": 4,
        "preference_threshold": [0.45, 0.6],
        "reward_checkpoint_subfolder": "lrm_sdxl",
        "gradient_checkpointing": True,
    },
    "latent_reward_sd15": LATENT_REWARD | {"max_steps": 4000, "warmup_steps": 500, "resolution": 512},
    "latent_reward_sd3": LATENT_REWARD
    | {"timesteps": None, "max_timestep": 999, "max_steps": 4000, "gradient_checkpointing": True, "dtype": "bfloat16"},
    "latent_reward_sdxl": LATENT_REWARD | {"max_steps": 8000, "warmup_steps": 1000, "resolution": 1024},
    "spo_sd15": SPO
    | {
        "lora_r": 4,
        "lora_alpha": 4,
        "learning_rate": 6e-5,
        "per_device_train_batch_size": 10,
        "gradient_accumulation_steps": 1,
        "per_device_rollout_batch_size": 10,
        "num_candidates": 4,
        "num_inner_steps": 1,
        "preference_threshold": 0.3,
        "reward_checkpoint_filename": "sd-v1-5_step-aware_preference_model.bin",
    },
    "spo_sdxl": SPO
    | {
        "lora_r": 64,
        "lora_alpha": 64,
        "learning_rate": 1e-5,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "per_device_rollout_batch_size": 2,
        "num_candidates": 2,
        "num_inner_steps": 4,
        "preference_threshold": 0.4,
        "reward_checkpoint_filename": "sdxl_step-aware_preference_model.bin",
        "vae_name_or_path": "madebyollin/sdxl-vae-fp16-fix",
    },
    **{
        name: SPO
        | {
            "bf16": True,
            "fp16": False,
            "branch_start_step": 4,  # not used: a noise level is given
            "branch_start_timestep": 751,
            "timestep_weighting": "even",
            "sampler": "ddim",
            "gradient_checkpointing": True,
            "offload_text_encoders": True,
            "lora_r": rank,
            "lora_alpha": rank,
            # FLUX.2's depend on its number of blocks, so its preset leaves them to the family.
            "lora_target_modules": None if family is SPOFlux2KleinPipeline else list(family.lora_target_modules),
            "guidance_scale": guidance,
            "height": 512,
            "width": 512,
        }
        for name, family, rank, guidance in (
            ("spo_sd3", SPOStableDiffusion3Pipeline, 32, 4.5),
            ("spo_flux", SPOFluxPipeline, 64, 3.5),
            ("spo_flux2_klein", SPOFlux2KleinPipeline, 32, 4.0),
            ("spo_z_image", SPOZImagePipeline, 32, 5.0),
            ("spo_qwen_image", SPOQwenImagePipeline, 64, 4.0),
        )
    },
    "lpo_sd3": LPO
    | {
        "reward_type": "step_aware",  # not used: a saved reward model is named
        "reward_checkpoint": None,
        "reward_model_name_or_path": "latent-reward-sd3",
        "preference_threshold": [0.35, 0.5],
        "bf16": True,
        "fp16": False,
        "timestep_weighting": "even",
        "sampler": "ddim",
        "guidance_scale": 4.5,
        "lora_r": 32,
        "lora_target_modules": list(SPOStableDiffusion3Pipeline.lora_target_modules),
    },
    "step_reward_sd15": STEP_REWARD
    | {"learning_rate": 3e-6, "max_steps": 8000, "resolution": 512, "relabel_preferences": False},
    "step_reward_sdxl": STEP_REWARD
    | {
        "learning_rate": 1e-6,
        "max_steps": 7000,
        "resolution": 1024,
        "relabel_preferences": True,
        "relabel_tie_band": 0.1,
    },
}


def parse(name, *arguments):
    config_class = SPOConfig if name.startswith(("spo", "lpo")) else StepRewardConfig
    parser = TrlParser((DiffusionModelArguments, RewardModelArguments, config_class))
    path = EXAMPLES / "configs" / f"{name}.yaml"
    return parser.parse_args_and_config(["--config", str(path), "--use_cpu", "--report_to", "none", *arguments])


@pytest.mark.parametrize("name", TABLE)
def test_published_values(name):
    model, reward, config = parse(name)
    values = vars(model) | vars(reward) | vars(config)
    assert {key: values[key] for key in TABLE[name]} == TABLE[name]
    published = name in ("spo_sd15", "spo_sdxl", "lpo_sd15", "lpo_sdxl")
    pairs_per_step = {
        "spo_sdxl": 16,
        "lpo_sdxl": 16,
        "latent_reward_sd15": 128,
        "latent_reward_sd3": 128,
        "latent_reward_sdxl": 32,
    }
    expected = pairs_per_step.get(name, 40 if name.startswith(("spo", "lpo")) else 64)
    assert expected == (
        config.per_device_train_batch_size
        * config.gradient_accumulation_steps
        * (4 if published else 1)  # devices, as the comments in the files say
    )


@pytest.mark.parametrize("name", TABLE)
def test_every_value_says_where_it_comes_from(name):
    """Each line of a preset ends in a comment, but those that name no published value."""
    free = {"output_dir", "model_init_kwargs", "per_device_train_batch_size", "gradient_accumulation_steps"}
    lines = (EXAMPLES / "configs" / f"{name}.yaml").read_text().splitlines()
    bare = {line.split(":")[0].strip() for line in lines if line.strip() and "#" not in line}
    assert bare <= free
    assert all(len(line) <= 119 for line in lines)


@pytest.mark.parametrize("name", ["spo_sd15", "step_reward_sd15"])
def test_defaults_are_the_preset(name, tmp_path):
    """
    But for the precision (the defaults run on a CPU too), the names of data and output, and half precision weights.
    """
    own = {"output_dir", "fp16", "bf16", "dataset_name", "model_init_kwargs"}
    config_class = SPOConfig if name.startswith("spo") else StepRewardConfig
    default = config_class(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    *_, config = parse(name)
    preset = yaml.safe_load((EXAMPLES / "configs" / f"{name}.yaml").read_text())
    compared = [key for key in preset if hasattr(default, key) and key not in own]
    assert len(compared) >= 15
    assert {key: getattr(default, key) for key in compared} == {key: getattr(config, key) for key in compared}


def test_default_adapter_is_that_of_the_preset(tmp_path):
    """What the command line does not name is the family's; alpha is the rank, so that every tool reads one strength."""
    pipeline = wrap_pipeline(tiny_sd_pipeline(tmp_path))
    model, *_ = parse("spo_sd15")
    bare = DiffusionModelArguments()
    for arguments in (model, bare):
        assert arguments.peft_config(pipeline).to_dict() == default_lora_config().to_dict()
    sdxl = parse("spo_sdxl")[0].peft_config(pipeline)
    assert (sdxl.r, sdxl.lora_alpha) == (64, 64)
    flow = wrap_pipeline(tiny_flux_pipeline(tmp_path))
    assert bare.peft_config(flow).to_dict() == flow.default_lora().to_dict() != default_lora_config().to_dict()
    small = DiffusionModelArguments(lora_r=2).peft_config(flow)
    assert (small.r, small.lora_alpha, small.target_modules) == (2, 2, flow.default_lora().target_modules)


def test_the_command_line_goes_before_the_file():
    model, _, config = parse("spo_sdxl", "--lora_r", "8", "--learning_rate", "2e-5", "--lora_target_modules", "to_q")
    assert (model.lora_r, model.lora_target_modules, config.learning_rate) == (8, ["to_q"], 2e-5)


def test_the_page_asks_for_nf4_in_words_that_diffusers_knows():
    """The shell variables of docs/flow_models.md, through shell and parser; bitsandbytes itself needs a GPU."""
    page = (EXAMPLES.parent / "docs" / "flow_models.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith(("BASE=", "NF4="))]
    words = subprocess.run(
        ["sh", "-c", "\n".join([*lines, 'printf %s "$NF4"'])], capture_output=True, text=True
    ).stdout
    _, _, config = parse("spo_flux", "--model_init_kwargs", words)
    assert config.model_init_kwargs["dtype"] == "bfloat16"
    (settings,) = config.model_init_kwargs["quantization_config"].values()
    known = inspect.signature(BitsAndBytesConfig.__init__).parameters
    assert set(settings) <= set(known) and settings["load_in_4bit"] and settings["bnb_4bit_quant_type"] == "nf4"


def test_misspelt_keys_are_refused(tmp_path):
    text = (EXAMPLES / "configs" / "spo_sd15.yaml").read_text().replace("num_candidates", "num_candidate")
    (tmp_path / "wrong.yaml").write_text(text)
    parser = TrlParser((DiffusionModelArguments, RewardModelArguments, SPOConfig))
    with pytest.raises(ValueError, match="num_candidate"):
        parser.parse_args_and_config(["--config", str(tmp_path / "wrong.yaml"), "--use_cpu"])


@pytest.mark.parametrize(
    "name, maker",
    {
        "sd3": tiny_sd3_pipeline,
        "flux": tiny_flux_pipeline,
        "flux2_klein": tiny_flux2_klein_pipeline,
        "z_image": tiny_z_image_pipeline,
        "qwen_image": tiny_qwen_image_pipeline,
    }.items(),
)
def test_a_preset_trains_by_one_command(name, maker, tmp_path):
    """All that the preset says, by path and command line, but for the sizes: of the model, the images and the batches."""
    maker(tmp_path).save_pretrained(tmp_path / "pipe")
    StepAwareRewardModel.from_clip(tiny_clip(tmp_path)).save_pretrained(tmp_path / "reward")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options = {
        "config": EXAMPLES / "configs" / f"spo_{name}.yaml",
        "model_name_or_path": tmp_path / "pipe",
        "reward_model_name_or_path": tmp_path / "reward",
        "dataset_name": tmp_path / "prompts.txt",
        "output_dir": tmp_path / "out",
        "height": 32, "width": 32, "num_inference_steps": 8, "max_steps": 1, "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 1, "preference_threshold": 0, "lora_r": 2, "lora_alpha": 2,
        "use_cpu": True, "report_to": "none",
    }  # fmt: skip
    words = []
    for option, value in options.items():
        words += [f"--{option}", str(value)]
    spo.main(*spo.make_parser().parse_args_and_config(words))
    plain = maker(tmp_path)
    plain.load_lora_weights(str(tmp_path / "out"))
    adapted = [name for name, _ in plain.transformer.named_parameters() if ".lora_B." in name]
    assert any(plain.transformer.get_parameter(name).any() for name in adapted)  # zeros before they are trained
    wanted = wrap_pipeline(plain).lora_target_modules
    assert {target for name in adapted for target in wanted if f"{target}.lora_B" in name} == set(wanted)
