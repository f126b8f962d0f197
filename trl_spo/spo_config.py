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

from dataclasses import dataclass, field, fields

from .rollout_settings import RolloutSettings
from .training.arguments import StepTrainingArguments, check_kind
from .training.trainer_options import REFUSED, SPO_REFUSED


_DTYPES = (None, "float32", "float16", "bfloat16")


def _field(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(repr=False)  # a generated repr would show the Hub token
class SPOConfig(StepTrainingArguments):
    r"""
    Configuration class for the [`SPOTrainer`].

    This class includes only the parameters that are specific to SPO training. For a full list of training arguments,
    please refer to the [`~transformers.TrainingArguments`] documentation. Defaults are those of the
    [SPO paper](https://huggingface.co/papers/2406.04314) for Stable Diffusion 1.5; the SDXL value stands beside them
    where it differs. An epoch is one pass over the prompts.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the rollout

        num_inference_steps (`int`, *optional*, defaults to `20`):
            Number of denoising steps S.
        guidance_scale (`float`, *optional*, defaults to `5.0`):
            Classifier-free guidance in rollouts, scoring and evaluation; values of 1 and less disable it. Sample with the
            same value later: guidance changes what preference training still has to find.
        guidance_rescale (`float`, *optional*, defaults to `0.0`):
            In [0, 1]: how far the standard deviation of guided predictions is brought back to that without guidance, as in
            diffusers; for models with zero terminal SNR. Stable Diffusion 1, 2 and XL only. Sample with the same value.
        clip_skip (`int`, *optional*, defaults to `0`):
            Last layers of the CLIP text encoders that prompts do not pass, counted as in diffusers. Stable Diffusion only,
            3 included.
        eta (`float`, *optional*, defaults to `1.0`):
            Noise of the steps, above 0, where all candidates would be equal; 1 is the variance of DDPM. The pipeline's
            sampler says how far it goes.
        num_candidates (`int`, *optional*, defaults to `4`):
            K, candidates drawn from one latent (SDXL: 2). Cost grows with K, the margin of best over worst slowly.
        num_inner_steps (`int`, *optional*, defaults to `1`):
            j, steps that a candidate goes on alone before it is scored (SDXL: 4).
        branch_start_step (`int`, *optional*, defaults to `4`):
            First step that branches; earlier ones are plain. With 20 steps, 4 starts at t = 751 (the paper's kappa).
        branch_end_step (`int`, *optional*):
            First step that does not branch any more; the rollout stops there. `None` branches to the last step.
        branch_start_timestep (`int`, *optional*), branch_end_timestep (`int`, *optional*):
            The same as noise levels: those of these timesteps of Stable Diffusion 1, by signal-to-noise ratio. Step 4 of 20
            means another noise level in every family; 751 means that of SPO's first branching step everywhere. They go
            before `branch_start_step` and `branch_end_step`.
        sampler (`str`, *optional*, defaults to `"ddim"`):
            Kind of stochastic steps. Diffusion models have `"ddim"`; flow-matching models also `"precise"`, `"flow_sde"`,
            `"dance_sde"` and `"cps"`, see `trl_spo.scheduling_flow`.
        resample (`str`, *optional*, defaults to `"random"`):
            Which candidate starts the next step: `"random"`, `"chosen"` or `"rejected"`.
        negative_prompt (`str`, *optional*, defaults to `""`):
            Prompt of the unconditional half of the guidance.
        height (`int`, *optional*), width (`int`, *optional*):
            Image size in pixels. Default to the model's own.
        per_device_rollout_batch_size (`int`, *optional*, defaults to `10`):
            Prompts per rollout and device (SDXL: 2).
        num_branches (`int`, *optional*):
            Branch only at this many random places per rollout, of those that may branch, and stop after the last. Fewer
            pairs per prompt, so more prompts per update. `None`: branch at every eligible step.

        > Parameters that control speed and memory of the rollout

        rollout_micro_batch_size (`int`, *optional*):
            Maximum number of latents in one denoiser call of the rollout (guidance doubles them).
        vae_decode_batch_size (`int`, *optional*):
            Maximum number of images in one call of the decoder.
        reward_batch_size (`int`, *optional*):
            Maximum number of images in one call of the reward model.
        memory_budget (`float`, *optional*):
            GiB that activations of rollout and scoring may take, beside the weights; it does not bound the training step, which
            `per_device_train_batch_size` and `gradient_checkpointing` do. The three sizes above that are `None` are then
            computed from the networks. Without a budget they depend on the image size and, on CUDA, on
            the memory that is free before the first rollout. Either way activations do not grow with K or the number of
            prompts; what is kept of each candidate (two latents) does.
        defer_scoring (`bool`, *optional*, defaults to `True`):
            Score the candidates of all steps together after the rollout, in full batches. The same scores; with
            `resample` other than `"random"` the next step needs them and they are scored step by step.
        rollout_ahead (`bool`, *optional*, defaults to `False`):
            Roll out for the next optimizer step before this one changes the weights, so that both can run at once: its pairs
            are those of a policy one step older. Useful with `rollout_devices`.
        rollout_devices (`list[str]`, *optional*):
            Devices of this machine that only roll out, such as `["cuda:4", "cuda:5"]`, each in a process of its own with the whole
            denoiser and the reward. Processes that train share them evenly, and each of the devices rolls out
            `per_device_rollout_batch_size` prompts. `None`: every process rolls out for itself.
        compile_regions (`bool`, *optional*):
            Compile the blocks that denoiser and reward model repeat, and the decoder. `None`: on CUDA only; blocks that
            cannot be compiled there run as they are. `torch_compile=True` means this, too, on any device.
        channels_last (`bool`, *optional*):
            Store convolution weights in channels-last order. `None`: everywhere but on CUDA, whose group norm is slower
            in that order, and under DoRA on convolutions, which cannot read them so.
        scoring_vae (`str`, *optional*):
            Path or Hub id of an `AutoencoderTiny` that decodes for scoring, such as `madebyollin/taesd`. Approximate.
        scoring_image_size (`int`, *optional*):
            Decode for scoring at this size (pixels of the short side), such as the 224 of the reward model, instead of
            full size. Approximate.
        offload_text_encoders (`bool`, *optional*, defaults to `False`):
            Text encoders are on the device only while they encode prompts, and embeddings wait on the CPU. For large ones
            (T5-XXL 9 GiB, Qwen3-4B 7.5 GiB in half precision) it is the difference between two sizes of cards; each
            rollout with prompts that are not in the cache pays for the way there and back.
        reward_dtype (`str`, *optional*):
            Cast the reward model to this dtype, such as `"bfloat16"`. Approximate.

        > Parameters that control the pair selection

        preference_threshold (`float` or `list[float]`, *optional*, defaults to `0.3`):
            A pair counts if p_chosen - p_rejected exceeds it (SDXL: 0.4). It is a score gap of 2 atanh(threshold). Two
            numbers `[low, high]` are interpolated in the standard deviation of the step (LPO: 0.35 to 0.5).
        reward_timestep (`str`, *optional*, defaults to `"next"`):
            `"next"`: a candidate is scored at its own timestep. `"branch"`: at the timestep of the latent it was drawn
            from, as the public code of LPO does.
        pair (`str`, *optional*, defaults to `"best_worst"`):
            `"best_worst"`, or `"random"` for two random candidates, ordered by score.

        > Parameters that control the loss

        beta (`float`, *optional*, defaults to `10.0`):
            Strength of the preference, per log-probability averaged over latent dimensions.
        num_iterations (`int`, *optional*, defaults to `1`):
            Times that each pair is trained on, in a new order each time (GRPO of TRL calls it the same). Rollouts are most of the
            cost, and the loss compares with the reference and not with the policy that drew the pairs, so they stay valid. What
            three iterations gave is in docs/results.md.
        epsilon (`float`, *optional*, defaults to `0.1`):
            Clipping range of the probability ratios.
        kl_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the exact per-step KL divergence to the reference, added to the loss. Chosen and rejected share x_t,
            so nothing else limits how far the step mean drifts. `0.0` is the paper's loss.
        timestep_weighting (`str`, *optional*, defaults to `"none"`):
            `"none"` is the paper's loss, in which the step before the last weighs many times as much as any other: a
            log-ratio is proportional to c / sigma, the change of the step mean by the prediction over the noise.
            `"even"` scales log-ratios by the inverse, so that all steps weigh the same: as much as the middle one of
            Stable Diffusion 1 does without weights, whatever the family is.
        train_cfg (`bool`, *optional*, defaults to `True`):
            Whether the log-probabilities of the loss use the guidance of the rollout.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Switch dropout off, in the model and its adapter: with it, the ratios would not start at 1.
        max_nonfinite_fraction (`float`, *optional*, defaults to `0.05`):
            Pairs with a NaN or an infinity in latents, decoded images, scores or log-probabilities are left out, named
            and counted; training stops once they exceed this share of all (the first 1,000 are judged together), or if
            a rollout has nothing else. An optimizer step whose gradients are not finite is skipped; 20 in a row stop
            the training.

        > Parameters that control the model

        use_peft (`bool`, *optional*, defaults to `True`):
            Train an adapter (`peft_config` of the trainer; by default that of the family, rank 4 for Stable Diffusion
            and 32 for flow-matching models; the paper's SDXL: 64) or, if `False`, the whole denoiser against a frozen
            copy of it.
        model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained` when the pipeline is given as a path or Hub id, such as
            `{"dtype": "float16", "vae": "madebyollin/sdxl-vae-fp16-fix"}`. A `quantization_config` may be a
            dictionary of components, see docs/flow_models.md.

        > Parameters that control the data

        dataset_name (`str`, *optional*):
            File of prompts, or folder or Hub id of a dataset (split `"train"`), used when the trainer is given none; see
            [`load_prompts`].
        dataset_prompt_column (`str`, *optional*):
            Column with the prompts. Defaults to `"prompt"` or `"caption"`, whichever exists.
        dataset_streaming (`bool`, *optional*, defaults to `False`):
            Read the prompts of `dataset_name` when they are needed, each process from files of its own; for datasets of
            millions of prompts. It needs `max_steps`.

        > Parameters that control logging and evaluation

        num_eval_images (`int`, *optional*, defaults to `4`):
            Number of images that `log_images_steps` samples, from the first evaluation prompts and with fixed seeds.
        log_images_steps (`int`, *optional*, defaults to `0`):
            Log sample images every this many optimizer steps, to `output_dir/images` and to the trackers. 0: never.
        eval_seed (`int`, *optional*, defaults to `0`):
            The evaluation image of prompt i starts from seed `eval_seed + i`, whatever the batch or number of devices.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Begin a new run in a folder with checkpoints of an earlier one, which stay beside its own. Otherwise the commands
            refuse that, and the trainer warns.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `learning_rate`: Defaults to `6e-5` instead of `5e-5` (SDXL: `1e-5`).
    > - `lr_scheduler_type`: Defaults to `"constant"` instead of `"linear"`.
    > - `weight_decay`: Defaults to `1e-4` instead of `0.0`.
    > - `num_train_epochs`: Defaults to `10` instead of `3`.
    > - `per_device_train_batch_size`: Defaults to `10` (pairs) instead of `8`; the paper has 40 on 4 devices.
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `remove_unused_columns`: Defaults to `False` instead of `True`.
    > - `logging_nan_inf_filter`: Defaults to `False` instead of `True`: the filter waits for the device at every step,
    >   and would hide a loss that is NaN.
    >
    > `max_grad_norm` is 1.0, as the paper states. Its public code never clips, because the iterator over parameters is
    > already used up; set 0 to reproduce that.
    """

    learning_rate: float = _field(6e-5, "The initial learning rate for AdamW.")
    lr_scheduler_type: str = _field("constant", "The learning rate schedule to use.")
    weight_decay: float = _field(1e-4, "Weight decay for AdamW.")
    num_train_epochs: float = _field(10, "Passes over the prompts.")
    per_device_train_batch_size: int = _field(10, "Pairs per device and forward pass.")
    logging_steps: float = _field(
        10,
        "Log every X updates steps. Should be an integer or a float in range `[0,1)`. If smaller than 1, will be "
        "interpreted as ratio of total training steps.",
    )
    remove_unused_columns: bool = _field(False, "Keep `False`: prompts are read by name.")
    logging_nan_inf_filter: bool = _field(False, "Leave losses that are NaN or infinite out of the logged mean.")

    # Parameters that control the rollout
    num_inference_steps: int = _field(20, "Number of denoising steps.")
    guidance_scale: float = _field(5.0, "Classifier-free guidance in rollouts, scoring and evaluation.")
    guidance_rescale: float = _field(0.0, "Bring the deviation of guided predictions back, as in diffusers.")
    clip_skip: int = _field(0, "Last layers of the CLIP text encoders that prompts do not pass.")
    eta: float = _field(1.0, "Noise of the steps, above 0.")
    num_candidates: int = _field(4, "Candidates drawn from one latent.")
    num_inner_steps: int = _field(1, "Steps that a candidate goes on alone before it is scored.")
    branch_start_step: int = _field(4, "First step that branches.")
    branch_end_step: int | None = _field(None, "First step that does not branch any more; the rollout stops there.")
    branch_start_timestep: int | None = _field(
        None, "Start branching at the noise level of this timestep of Stable Diffusion 1, instead of at a step."
    )
    branch_end_timestep: int | None = _field(
        None, "End branching at the noise level of this timestep of Stable Diffusion 1, instead of at a step."
    )
    sampler: str = _field("ddim", "Kind of stochastic steps; flow-matching models have several.")
    resample: str = _field("random", "Which candidate starts the next step: 'random', 'chosen' or 'rejected'.")
    negative_prompt: str = _field("", "Prompt of the unconditional half of the guidance.")
    height: int | None = _field(None, "Image height in pixels.")
    width: int | None = _field(None, "Image width in pixels.")
    per_device_rollout_batch_size: int = _field(10, "Prompts per rollout and device.")
    num_branches: int | None = _field(None, "Random places to branch at per rollout; all by default.")

    # Parameters that control speed and memory of the rollout
    rollout_micro_batch_size: int | None = _field(
        None, "Maximum number of latents in one denoiser call of the rollout."
    )
    vae_decode_batch_size: int | None = _field(None, "Maximum number of images in one call of the decoder.")
    reward_batch_size: int | None = _field(None, "Maximum number of images in one call of the reward model.")
    memory_budget: float | None = _field(None, "GiB that activations of rollout and scoring may take.")
    defer_scoring: bool = _field(True, "Score the candidates of all steps together after the rollout.")
    rollout_ahead: bool = _field(False, "Roll out for the next step before this one changes the weights.")
    rollout_devices: list[str] | None = _field(
        None, "Devices that only roll out, each in a process of its own, such as cuda:4 cuda:5."
    )
    compile_regions: bool | None = _field(None, "Compile repeated blocks and the decoder; by default on CUDA only.")
    channels_last: bool | None = _field(None, "Store convolution weights channels-last; by default not on CUDA.")
    scoring_vae: str | None = _field(None, "Path or Hub id of an AutoencoderTiny that decodes for scoring.")
    scoring_image_size: int | None = _field(None, "Decode for scoring at this size instead of full size.")
    offload_text_encoders: bool = _field(False, "Keep text encoders on the device only while they encode prompts.")
    reward_dtype: str | None = _field(None, "Cast the reward model to this dtype, such as 'bfloat16'.")

    # Parameters that control the pair selection
    # A number, or two of them; the annotation is what the command line's parser understands.
    preference_threshold: list[float] = field(
        default_factory=lambda: 0.3,
        metadata={"help": "A pair counts if p_chosen - p_rejected exceeds it; two numbers are interpolated in sigma."},
    )
    reward_timestep: str = _field(
        "next", "Score candidates at their 'next' timestep, or at the one they 'branch' from."
    )
    pair: str = _field("best_worst", "Pairs of 'best_worst' or of two 'random' candidates.")

    # Parameters that control the loss
    beta: float = _field(10.0, "Strength of the preference, per mean log-probability.")
    num_iterations: int = _field(1, "Times that each pair is trained on.")
    epsilon: float = _field(0.1, "Clipping range of the probability ratios.")
    kl_coef: float = _field(0.0, "Weight of the exact per-step KL divergence to the reference.")
    timestep_weighting: str = _field("none", "'none' as in the paper, or 'even' weight of all timesteps.")
    train_cfg: bool = _field(True, "Whether the loss uses the guidance of the rollout.")
    disable_dropout: bool = _field(True, "Switch dropout off in the model and its adapter.")
    max_nonfinite_fraction: float = _field(0.05, "Largest tolerable share of pairs with a NaN or an infinity.")

    # Parameters that control the model
    use_peft: bool = _field(True, "Train an adapter, or the whole denoiser if False.")
    model_init_kwargs: dict | str | None = _field(
        None, "Keyword arguments of `from_pretrained` when the pipeline is given as a path or Hub id."
    )

    # Parameters that control the data
    dataset_name: str | None = _field(
        None, "File of prompts, folder or Hub id of a dataset, or a suite such as parti."
    )
    dataset_prompt_column: str | None = _field(None, "Column with the prompts.")
    dataset_streaming: bool = _field(
        False, "Read the prompts of `dataset_name` when they are needed. Needs `max_steps`."
    )

    # Parameters that control logging and evaluation
    num_eval_images: int = _field(4, "Number of images that `log_images_steps` samples.")
    log_images_steps: int = _field(0, "Log sample images every this many optimizer steps; 0 for never.")
    eval_seed: int = _field(0, "The evaluation image of prompt i starts from seed `eval_seed + i`.")

    _refused = REFUSED | SPO_REFUSED
    _VALID_DICT_FIELDS = [*StepTrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # JSON on the command line

    def __post_init__(self):
        self._check_threshold()
        self.check_kinds()
        self._check_spo_arguments()
        super().__post_init__()
        self._check_delegated()

    def rollout_settings(self, **changes) -> RolloutSettings:
        """The settings of a rollout, checked; `changes` replace some of them."""
        names = [f.name for f in fields(RolloutSettings)]
        return RolloutSettings(**{name: getattr(self, name) for name in names} | changes)

    def _check_delegated(self):
        """Refuse settings that transformers passes on to networks and data loaders that SPO does not have."""
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            value = getattr(self, name, None)
            if value and value != {"use_reentrant": False}:
                raise ValueError(
                    f"`{name}={value!r}` has no effect: networks of diffusers checkpoint every block, without re-entrance. Leave "
                    "it at None."
                )
        for name in ("split_batches", "dispatch_batches"):
            if getattr(self.accelerator_config, name):
                raise ValueError(
                    f"`{name}` of `accelerator_config` has no effect: every process rolls out its own prompts. Leave it out."
                )

    def _check_threshold(self):
        """A number stays a number: the command line gives a list of one, YAML a number or a list of two."""
        threshold = self.preference_threshold
        parts = threshold if isinstance(threshold, (list, tuple)) else [threshold]
        for part in parts:
            check_kind("preference_threshold", part, float)
        self.preference_threshold = parts[0] if len(parts) == 1 else list(parts)

    def _check_spo_arguments(self):
        # Settings that are checked together: those of the rollout check themselves.
        self.rollout_settings()
        if self.compile_regions is False and (
            self.torch_compile or self.torch_compile_backend or self.torch_compile_mode
        ):
            raise ValueError(
                "`torch_compile` compiles the repeated blocks, which `compile_regions=False` forbids; set one of them only."
            )

        if self.dataset_streaming and self.max_steps <= 0:
            raise ValueError("`dataset_streaming` needs `max_steps`: a stream does not tell how long an epoch is.")

        # Settings that are checked one by one.
        rules = {
            "learning_rate": (self.learning_rate >= 0, "0 or more"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "num_train_epochs": (self.num_train_epochs > 0 or self.max_steps > 0, "positive, or `max_steps` set"),
            "gradient_accumulation_steps": (self.gradient_accumulation_steps >= 1, "at least 1"),
            "guidance_rescale": (0 <= self.guidance_rescale <= 1, "in [0, 1], where 0 is off"),
            "clip_skip": (self.clip_skip >= 0, "0 or more layers"),
            "eval_seed": (0 <= self.eval_seed < 2**63, "in [0, 2^63)"),
            "epsilon": (0 < self.epsilon < 1, "in (0, 1)"),
            "beta": (self.beta > 0, "positive"),
            "num_iterations": (self.num_iterations >= 1, "at least 1"),
            "kl_coef": (self.kl_coef >= 0, "0 or more"),
            "per_device_rollout_batch_size": (self.per_device_rollout_batch_size >= 1, "at least 1"),
            "per_device_train_batch_size": (self.per_device_train_batch_size >= 1, "at least 1"),
            "num_eval_images": (self.num_eval_images >= 1, "at least 1"),
            "log_images_steps": (self.log_images_steps >= 0, "0 or more"),
            "memory_budget": (self.memory_budget is None or self.memory_budget > 0, "a positive number of GiB"),
            "reward_dtype": (self.reward_dtype in _DTYPES, f"one of {_DTYPES}"),
            "max_nonfinite_fraction": (0 <= self.max_nonfinite_fraction <= 1, "a share, in [0, 1]"),
            "timestep_weighting": (self.timestep_weighting in ("none", "even"), "'none' or 'even'"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise ValueError(f"`{name}` must be {expected}; got {getattr(self, name)!r}.")
