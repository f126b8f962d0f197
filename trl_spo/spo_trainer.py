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
SPO training (https://huggingface.co/papers/2406.04314) on `transformers.Trainer`: rollouts make pairs, pairs make
batches, and everything around them (optimizer, schedules, accumulation, precision, logging, checkpoints, distributed
training) is the Trainer's.
"""

import contextlib
import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend, save_fsdp_optimizer
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, set_seed
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import logging

from .branch_plan import branch_lengths
from .hub_files import load_denoiser
from .losses import spo_loss
from .pair_loader import LoaderSizes, PairLoader
from .pipelines.adapters import LORA_NAME, require_no_adapters, switch_dropout, takes_channels_last
from .pipelines.auto import wrap_pipeline
from .pipelines.autoencoder import load_scoring_vae
from .pipelines.components import changes_of_the_base, commit_of_the_base, parts_from_elsewhere
from .pipelines.conditioning import PromptEmbeds
from .pipelines.shards import is_sharded, load_whole_state, plain_class
from .prompts import PromptStream, load_prompts, read_prompts
from .rewards.base import Reward, wrap_reward
from .rollout_settings import RolloutSettings
from .sampler_file import SAMPLER_NAME, sampler_settings
from .sampling import generate_images, score_images
from .spo_config import SPOConfig
from .step_distribution import gaussian_kl, stochastic_log_prob
from .step_pairs import StepPairs
from .training.base import StepTrainer
from .training.callbacks import ImageLoggingCallback, PairEpochCallback
from .training.checkpointing import CheckpointFiles, global_step_of, write_text
from .training.compilation import compile_blocks, reference_on_same_code, release_blocks
from .training.model_card import describe_reward, read_samples, spo_model_card
from .training.numerics import NonFiniteGuard, SkipNonFiniteSteps
from .training.pair_exchange import PairExchange
from .training.pair_metrics import PairMetrics
from .training.rollout_workers import RolloutWorkers, own_rollout_devices
from .training.rollouts import RolloutMixin
from .training.running_means import gather_from_processes
from .training.sharded_optimizer import SHARDS_NAME, load_optimizer_shards, save_optimizer_shards
from .training.sharding import (
    asks_for_fsdp,
    asks_for_zero3,
    check_denoiser_for_sharding,
    check_equal_weights,
    check_sharding,
    prepare_frozen,
    require_sharding,
    shards_optimizer,
    trained_state,
    write_denoiser,
)
from .training.spo_checks import check_reward_timesteps, check_shared_reward, choose_best_metric
from .training.waiting_pairs import check_base, check_waiting_pairs, sample_base_weights, transition_settings


logger = logging.get_logger(__name__)

PAIRS_NAME = "spo_pairs.safetensors"
STATE_NAME = "spo_state.json"
# Median of c / sigma (see `timestep_weights`) over the branching steps of the paper's run: Stable Diffusion 1, 20 steps, from
# the fifth on, eta 1.
REFERENCE_SENSITIVITY = 0.68


class SPOTrainer(RolloutMixin, StepTrainer):
    r"""
    Trainer for Step-aware Preference Optimization (SPO) of diffusion models.

    Args:
        config ([`SPOConfig`]):
            Configuration. It is copied, not changed.
        pipeline ([`SPOPipeline`], a diffusers pipeline of one of the families, path or Hub id):
            What is trained; everything [`wrap_pipeline`] accepts. Its denoiser gets an adapter, the rest is frozen.
        reward_model ([`Reward`], [`StepAwareRewardModel`], path, Hub id or callable):
            Scores candidates; everything [`wrap_reward`] accepts: a step-aware or latent reward model, or any
            `(images (B, 3, H, W) in [0, 1], prompts: list[str], timesteps (B,)) -> scores (B,)`.
        train_dataset (`datasets.Dataset`, `datasets.IterableDataset` or `list[str]`, *optional*):
            Prompts: a list, or a dataset with a `prompt` or `caption` column. Otherwise `config.dataset_name`. A stream is read
            as [`RowStream`] says, by each process from files of its own, and needs `max_steps`.
        eval_dataset (`datasets.Dataset` or `list[str]`, *optional*):
            Held-out prompts for [`~SPOTrainer.evaluate`].
        metrics (`dict[str, Callable]`, *optional*):
            Further scores for evaluation, each `(images (B, 3, H, W) in [0, 1], prompts) -> (B,)`; logged as
            `eval_{name}_mean` and `eval_{name}_std`.
        peft_config (`peft.PeftConfig`, *optional*):
            The adapter. Defaults to that of the family: LoRA on the attention projections, with rank 4 for Stable
            Diffusion and 32 for flow-matching models.
        scoring_vae (`AutoencoderTiny`, path or Hub id, *optional*):
            A small decoder for scoring, of the same latent space as the pipeline's VAE; instead of
            `config.scoring_vae`. Images that are evaluated or kept still come from the pipeline's VAE.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Callbacks to customize the training loop.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            An optimizer and a learning rate schedule to use instead of the config's.

    Example:

    ```python
    >>> from trl_spo import SPOConfig, SPOTrainer, StepAwareRewardModel

    >>> reward_model = StepAwareRewardModel.from_pretrained("path/to/reward_model")
    >>> trainer = SPOTrainer(
    ...     SPOConfig(output_dir="spo-sd15"),
    ...     "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ...     reward_model,
    ...     train_dataset=["a watercolor of a fox", "a red bicycle in the rain"],
    ... )
    >>> trainer.train()
    >>> trainer.save_model()  # pipe.load_lora_weights(output_dir) loads it
    ```

    Raises:
        TypeError, ValueError: for input that cannot be trained on, before any work is done.
    """

    _tag_names = ["trl", "spo", "diffusers", "text-to-image"]
    _name = "SPO"
    _nonfinite_metric = "pairs/nonfinite"
    _shards_optimizer = False  # under FSDP 2, whether each process writes its part of the optimizer's state
    checkpoint_files = CheckpointFiles(
        weights=(LORA_NAME, "*/diffusion_pytorch_model*.safetensors*"),
        state=(STATE_NAME, PAIRS_NAME),
        foreign=("step_reward_state.json",),
        record=STATE_NAME,
    )

    def __init__(
        self,
        config: SPOConfig,
        pipeline: Any,
        reward_model: Reward | torch.nn.Module | str | Path | Callable,
        train_dataset: Dataset | list[str] | None = None,
        eval_dataset: Dataset | list[str] | None = None,
        metrics: dict[str, Callable] | None = None,
        peft_config: Any | None = None,
        scoring_vae: torch.nn.Module | str | Path | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        config = self.own_config(config, SPOConfig)
        config.ignore_data_skip = True  # the pair loader resumes by its own position; nothing is rolled out twice
        self.metrics = metrics or {}
        prompts, eval_prompts = self._check(config, reward_model, train_dataset, eval_dataset)
        self._load(config, pipeline, reward_model, scoring_vae, prompts)
        model = self._prepare(config, peft_config)
        self._start(config, prompts)
        super().__init__(
            model=model,
            args=config,
            train_dataset=prompts,
            eval_dataset=eval_prompts,
            data_collator=list,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if asks_for_fsdp(config):
            require_sharding(self.accelerator)
            self._shards_optimizer = shards_optimizer(config, self.accelerator)
        self._compile(config)
        self.pair_loader = self._new_pair_loader()
        self._add_callbacks(config, eval_prompts or prompts)

    # --- the stages of setting up ------------------------------------------------------------------------------------

    def _check(self, config: SPOConfig, reward_model, train_dataset, eval_dataset) -> tuple:
        """What can be said before anything is loaded. Returns the prompts to train on and to evaluate with."""
        check_sharding(config)
        own_rollout_devices(config)
        # The denoiser will be spread over the processes.
        self._shards = asks_for_fsdp(config) or asks_for_zero3(config)
        choose_best_metric(config, self.metrics)
        self.check_output(config)
        if train_dataset is None:
            if config.dataset_name is None:
                raise ValueError(
                    "SPO needs prompts: pass `train_dataset` (a list of strings, or a dataset with a 'prompt' or "
                    "'caption' column) or set `config.dataset_name`."
                )
            train_dataset = load_prompts(config.dataset_name, streaming=config.dataset_streaming)
        prompts = read_prompts(train_dataset, config.dataset_prompt_column)
        if isinstance(prompts, PromptStream) and config.max_steps <= 0:
            raise ValueError("A stream of prompts needs `max_steps`: it does not tell how long an epoch is.")
        if eval_dataset is not None:
            eval_dataset = _evaluation_prompts(eval_dataset, config)
        elif config.eval_strategy != "no":
            raise ValueError(f"`eval_strategy={str(config.eval_strategy)!r}` needs prompts: pass `eval_dataset`.")
        if not isinstance(reward_model, (str, Path)):
            wrap_reward(reward_model).check_dtype(config.reward_dtype)
        return prompts, eval_dataset

    def _load(
        self, config: SPOConfig, pipeline, reward_model, scoring_vae, prompts: Sequence[str] | PromptStream
    ) -> None:
        """Pipeline, reward and the decoder for scoring, and whether they fit the settings and each other."""
        self.reward = wrap_reward(reward_model)
        self._reward_is_the_users = not isinstance(reward_model, (str, Path))
        self.reward.check_prompts(_first(prompts, 1))
        self.pipeline = wrap_pipeline(pipeline, **(config.model_init_kwargs or {}))
        self.pipeline.check_weights()
        for name, encoder in self.pipeline.text_encoders().items():
            require_no_adapters(encoder, name)
        self._base_changes = changes_of_the_base(self.pipeline.sd_pipeline)
        if self._base_changes:
            logger.warning(
                f"The pipeline is not the model that its name says: {self._base_changes}. What is trained belongs to the pipeline "
                "as it is; publish that, too (`pipe.save_pretrained`). The model card names no base model."
            )
        self.pipeline.configure(guidance_rescale=config.guidance_rescale, clip_skip=config.clip_skip)
        self.pipeline.check_negative_prompt(config.negative_prompt)
        self.pipeline.latent_shape(config.height, config.width)
        self._check_branches(config)
        check_shared_reward(config, self.reward, self._shards)
        self.reward.check_pipeline(self.pipeline)
        check_reward_timesteps(config, self.reward, self._set_timesteps(config))
        vae = config.scoring_vae if scoring_vae is None else scoring_vae
        self.pipeline.scoring_vae = load_scoring_vae(vae, self.pipeline)  # `None` also ends that of an earlier run
        self.reward_model = reward_model if self.reward.module is None else self._network_of_the_reward()

    def _network_of_the_reward(self) -> torch.nn.Module | Reward:
        """Of several rewards, none of the networks is the reward model."""
        return self.reward if self.reward.parts else self.reward.module

    def _prepare(self, config: SPOConfig, peft_config) -> torch.nn.Module:
        """Freeze what is not trained, make the denoiser trainable, move everything. Returns what is trained."""
        if config.reward_dtype is not None and self._reward_is_the_users:
            self.reward = copy.deepcopy(self.reward)  # it is cast
            self.reward_model = self._network_of_the_reward()
        self.reward.prepare(config.device, config.reward_dtype and getattr(torch, config.reward_dtype))
        self.pipeline.offload_text_encoders = config.offload_text_encoders
        set_seed(config.seed)  # the adapter is drawn here
        model = self.pipeline.prepare_for_training(peft_config, config.use_peft)
        if config.channels_last and not takes_channels_last(self.pipeline.denoiser):
            raise ValueError(
                "`channels_last=True` cannot be had with this adapter or denoiser: DoRA on convolutions looks at their weights as "
                "rows. Leave `channels_last` at None."
            )
        if self._shards:  # the denoiser comes to the device in shards: as a whole it may be too large
            check_denoiser_for_sharding(self.pipeline.denoiser)
            check_equal_weights(model)
        self.pipeline.to(config.device, with_denoiser=not self._shards)
        # DeepSpeed sends weights to the other ranks as plain bytes, which weights in another memory order are not; FSDP
        # takes no such weights.
        with_deepspeed = config.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        self.pipeline.optimize(self._stores_channels_last(config) and not with_deepspeed and not self._shards)
        switch_dropout(model, on=not config.disable_dropout)
        return model

    def _start(self, config: SPOConfig, prompts: Sequence[str] | PromptStream) -> None:
        """The state of a run that has not begun. The parent's constructor asks for some of it."""
        self.pair_loader: PairLoader | None = None
        self._prompts = prompts
        self._filling_prompt = _first(prompts, 1)
        self._begin_rollouts(config.device)
        self._metrics = PairMetrics()
        self._seen_before = (0, 0)  # pairs and steps when this call of `train` began
        self._step_weights: torch.Tensor | None = None
        self.guard = NonFiniteGuard(
            config.max_nonfinite_fraction,
            "Check the model that is named there and its dtype: float16 overflows where bfloat16 or float32 do not.",
        )
        self.model_tags = self._tag_names
        devices = own_rollout_devices(config)
        self._workers = None
        if devices:
            self._workers = RolloutWorkers(devices, config, self.pipeline, self.reward, self._compiles(config))

    def _compile(self, config: SPOConfig) -> None:
        """Compile the blocks that repeat, where it pays."""
        # Blocks are compiled, so the Trainer must not compile the whole network around them; and a config of another run
        # with `torch_compile` may have left transformers 4's environment variable behind.
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        self._compiles_blocks = self._compiles(config) and not self._shards
        networks = [*self.pipeline.running_networks(), self.reward.module]
        release_blocks(networks)
        if self._compiles_blocks:
            compile_blocks(
                networks,
                required=config.torch_compile or bool(config.compile_regions),
                backend=config.torch_compile_backend or "inductor",
                mode=config.torch_compile_mode,
            )

    def _add_callbacks(self, config: SPOConfig, shown_prompts: Sequence[str] | PromptStream) -> None:
        self.add_callback(PairEpochCallback(self))
        self.add_callback(SkipNonFiniteSteps(self))
        if config.log_images_steps > 0:
            shown = _first(shown_prompts, config.num_eval_images)
            self.add_callback(ImageLoggingCallback(self, shown, config.log_images_steps))
        if config.max_steps <= 0 and config.lr_scheduler_type not in ("constant", "constant_with_warmup"):
            logger.warning(
                "The number of valid pairs is not known beforehand, so the learning rate schedule spans the largest "
                f"possible number of steps ({len(self.pair_loader)} per epoch). Set `max_steps` to make it exact."
            )

    @staticmethod
    def _compiles(config: SPOConfig) -> bool:
        """Compiling pays on a GPU, where it takes part of a minute and all later steps are faster."""
        if config.compile_regions is None:
            return config.torch_compile or config.device.type == "cuda"
        return config.compile_regions

    @staticmethod
    def _stores_channels_last(config: SPOConfig) -> bool:
        """A CPU decodes faster in this order; CUDA's group norm takes twice as long in it."""
        return config.device.type != "cuda" if config.channels_last is None else config.channels_last

    def _set_timesteps(self, config: SPOConfig) -> list[int]:
        """The schedule of the config's number of steps and image size."""
        latent_shape = self.pipeline.latent_shape(config.height, config.width)
        return self.pipeline.set_timesteps(config.num_inference_steps, latent_shape)

    def _check_branches(self, config: SPOConfig):
        """At least one branching step must have candidates that differ."""
        self.pipeline.step_rule.set_sampler(config.sampler)
        self.pipeline.check_eta(config.eta)
        settings = self._resolved_settings(config)
        branch_lengths(self.pipeline, settings.branch_start_step, settings.end, settings.num_inner_steps, settings.eta)

    def _resolved_settings(self, config: SPOConfig) -> RolloutSettings:
        """The settings of a rollout, with branch ranges as steps of the schedule."""
        return config.rollout_settings().resolve(self.pipeline.step_rule, self._set_timesteps(config))

    # --- prompts to pairs --------------------------------------------------------------------------------------------

    def _new_pair_loader(self) -> PairLoader:
        """A loader at the first prompt of the run."""
        args, settings = self.args, self._resolved_settings(self.args)
        most_pairs = settings.end - settings.branch_start_step
        if settings.num_branches is not None:
            most_pairs = min(most_pairs, settings.num_branches * settings.num_inner_steps)
        num_devices = 1 if self._workers is None else len(self._workers.devices)
        sizes = LoaderSizes(
            prompts_per_rollout=args.per_device_rollout_batch_size * num_devices,
            pairs_per_micro_batch=args.per_device_train_batch_size,
            micro_batches_per_step=args.gradient_accumulation_steps,
            max_pairs_per_prompt=most_pairs,
            num_epochs=math.inf if args.max_steps > 0 else args.num_train_epochs,
            num_iterations=args.num_iterations,
            rank=args.process_index,
            world_size=args.world_size,
            looks_ahead=args.rollout_ahead,
            every_rank_rolls_out=self._shards,
        )
        return PairLoader(
            self._prompts,
            self._start_rollout,
            sizes,
            processes=PairExchange(args.device, args.ddp_timeout) if args.world_size > 1 else None,
            seed=args.seed if args.data_seed is None else args.data_seed,
            why_no_pairs=self.why_no_pairs,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            goes_on=lambda: args.max_steps <= 0 or self.state.global_step + 1 < args.max_steps,
        )

    # --- rollouts ----------------------------------------------------------------------------------------------------

    def _autocast(self) -> contextlib.AbstractContextManager:
        return self.accelerator.autocast()

    def _require_denoiser(self) -> None:
        """
        Raises:
            RuntimeError: under FSDP 2 and ZeRO-3 before training, when the denoiser is neither whole on the device nor sharded.
        """
        if self._shards and not is_sharded(self.pipeline.denoiser):
            engine = "ZeRO-3" if self.is_deepspeed_enabled else "FSDP 2"
            raise RuntimeError(
                f"Under {engine} the denoiser is spread over the processes when `train` begins: call `train` first. "
                "`eval_on_start=True` evaluates before the first step."
            )

    def rollout(self, prompts: list[str], seed: int = 0, return_trajectory: bool = False) -> StepPairs:
        """
        One stepwise rollout under the current policy, with the settings of the config. Under FSDP 2 and ZeRO-3 every process must
        call it; those with fewer than `per_device_rollout_batch_size` prompts, or none, roll out others besides, which are
        forgotten.

        Args:
            prompts (`list[str]`): prompts of the batch.
            seed (`int`, *optional*, defaults to `0`): with the config's seed and the process, fixes the randomness.
            return_trajectory (`bool`, *optional*, defaults to `False`): keep latents per branch.

        Side effects: adds to the metrics of the next log.
        """
        self._require_denoiser()
        args, start = self.args, time.perf_counter()
        if args.device.type == "cuda":  # work of the training before that is still queued is not the rollout's
            torch.cuda.synchronize(args.device)
            waited = time.perf_counter() - start
            self._metrics.add("time/train", waited, reduce="per_process")
            start += waited
        num_own = len(prompts)
        if self._shards:  # as many calls of the denoiser in every process
            prompts = [*prompts, *self._filling(args.per_device_rollout_batch_size - num_own)]
        self.model.eval()
        padding = len(prompts) - max(num_own, 1)
        pairs = self._roll_out(prompts, seed, args.process_index, padding, return_trajectory)
        if num_own:
            self._check_scores(pairs)
            self._metrics.add_rollout(pairs)
        self._metrics.add("time/rollout", time.perf_counter() - start, reduce="per_process")
        return pairs if num_own else pairs[:0]

    def _start_rollout(self, prompts: list[str], seed: int) -> StepPairs | Callable[[], StepPairs | None]:
        """The pairs of prompts, or a function that waits for them where other processes roll out."""
        if self._workers is None:
            return self.rollout(prompts, seed=seed)
        wait = self._workers.start(prompts, seed, version=self.state.global_step)

        def join() -> StepPairs | None:
            start = time.perf_counter()
            parts, seconds = wait()
            self._metrics.add("time/rollout", time.perf_counter() - start, reduce="per_process")
            self._metrics.add("time/rollout_workers", seconds, reduce="per_process")
            for pairs in parts:
                self._check_scores(pairs)
                self._metrics.add_rollout(pairs)
            return StepPairs.cat(parts) if parts else None

        return join

    def _filling(self, count: int) -> list[str]:
        """`count` prompts, or none if it is negative, that only keep the denoiser busy where other processes need it."""
        return self._filling_prompt * count

    def why_no_pairs(self) -> str:
        """What kept candidates from forming pairs, and what to change."""
        return self._metrics.why_no_pairs(self.args.preference_threshold)

    def _check_scores(self, pairs: StepPairs) -> None:
        """
        Count the scores of a rollout that are not finite.

        Raises:
            ValueError: if no score of a rollout is finite, or too many of all rollouts are not.
        """
        scores = torch.cat([branch.scores for branch in pairs.branches])
        if not scores.isfinite().any():
            raise ValueError(f"A rollout has no finite score: {pairs.nonfinite[0]}. {self.guard.hint}")
        self.guard.record(sum(branch.scores.shape[1] for branch in pairs.branches), [str(n) for n in pairs.nonfinite])

    # --- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """
        SPO loss of a micro-batch of pairs. Both transitions of a pair that shares x_t come from one forward pass of the
        policy and one of the reference; only transitions inside a multi-step branch have an x_t each.
        """
        args = self.args
        self._set_timesteps(args)  # a callback may have sampled with other steps

        # Each pair has a row in the batch; a rejected transition with an x_t of its own has another, behind them.
        pairs: StepPairs = inputs["pairs"]
        rows = _rows_of_pairs(pairs)
        own_rows = rows[2]  # stays on the CPU, where lengths of prompts are indexed
        chosen_row, rejected_row, own_forward = (index.to(args.device, non_blocking=True) for index in rows)
        pairs = pairs.to(args.device, non_blocking=True)
        latents, timesteps, embeds = pairs.latents, pairs.timesteps, self._encode(pairs.prompts)
        if len(own_forward):
            latents = torch.cat([latents, pairs.rejected_latents[own_forward]])
            timesteps = torch.cat([timesteps, timesteps[own_forward]])
            embeds = PromptEmbeds.cat([embeds, embeds[own_rows]])

        # Step distributions of reference and policy.
        guidance_scale = args.guidance_scale if args.train_cfg else self.pipeline.unguided_scale

        def distribution(denoiser):
            output = self.pipeline.predict(latents, timesteps, embeds, guidance_scale, denoiser)
            return self.pipeline.step_distribution(output, timesteps, latents, args.eta)

        with self.accelerator.autocast():
            with self._reference() as reference:
                ref_mean, std, _ = distribution(reference)
            ref_mean, std = ref_mean.detach(), std.detach()
            # With FSDP the denoiser itself, as in rollouts: whatever is called first is the root of all units. DeepSpeed has to
            # be called, as it counts the passes whose gradients it adds.
            fsdp = self._shards and not self.is_deepspeed_enabled
            mean = distribution(self.pipeline.denoiser if fsdp else model).prev_sample_mean

        # Log-probabilities of both transitions under both; only stochastic steps branch.
        def log_probs(mean):
            chosen = stochastic_log_prob(pairs.chosen_prev_latents, mean[chosen_row], std[chosen_row])
            rejected = stochastic_log_prob(pairs.rejected_prev_latents, mean[rejected_row], std[rejected_row])
            return chosen, rejected

        chosen_logps, rejected_logps = log_probs(mean)
        ref_chosen_logps, ref_rejected_logps = log_probs(ref_mean)
        logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
        if args.timestep_weighting == "even":
            weights = self.timestep_weights(pairs.timesteps)
            logps = tuple(weights * values for values in logps)
        output = spo_loss(*logps, beta=args.beta, epsilon=args.epsilon)
        kl = gaussian_kl(mean, ref_mean, std)
        kl = (kl[chosen_row] + kl[rejected_row]) / 2
        # A mean over the pairs of the whole optimizer step, however they fall into micro-batches.
        scale = inputs["num_micro_batches"] / inputs["num_pairs"]
        losses = output.losses + args.kl_coef * kl
        loss = losses.sum() * scale
        if model.training:
            self.guard.watch("log-probabilities", losses.isfinite(), inputs["pairs"].timesteps, pairs.prompts)
        log_ratios = (logps[0] - logps[2], logps[1] - logps[3])
        policy_logps = (chosen_logps, rejected_logps)
        is_fresh = inputs.get("is_fresh")
        if is_fresh is not None:
            is_fresh = None if all(is_fresh) else torch.tensor(is_fresh).to(args.device, non_blocking=True)
        self._metrics.add_loss(output, losses, kl, policy_logps, log_ratios, args.beta, args.epsilon, is_fresh)
        return (loss, output) if return_outputs else loss

    @contextlib.contextmanager
    def _reference(self) -> Iterator[torch.nn.Module]:
        """The untouched model. What it predicts may carry a graph; detach it."""
        frozen = self.pipeline._frozen_copy
        if frozen is not None and (self._shards or self.is_deepspeed_enabled):
            prepare_frozen(frozen, self.pipeline.denoiser, self.accelerator)
        if self._compiles_blocks:
            with reference_on_same_code(self.pipeline) as reference:
                yield reference
        else:
            with torch.no_grad(), self.pipeline.reference() as reference:
                yield reference

    def timestep_weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        r"""
        Factors that make all branching steps weigh the same in the loss (`timestep_weighting="even"`).

        A change d of the prediction changes the log-ratio of a candidate with noise z by (c / sigma) z d to first
        order, where c = d mean / d prediction. The weight of a step is `REFERENCE_SENSITIVITY` divided by its own c / sigma:
        all steps then weigh as the middle one of Stable Diffusion 1 does without weights, so `beta` means the same in
        every family.

        Args:
            timesteps (`torch.Tensor` of shape `(batch_size,)`): timesteps of branching steps.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`, float32.
        """
        if self._step_weights is None:
            schedule, eta = self._set_timesteps(self.args), self.args.eta
            settings = self._resolved_settings(self.args)
            steps = range(settings.branch_start_step, settings.end)
            steps = [step for step in steps if self.pipeline.step_is_stochastic(step, eta)]
            branching = torch.tensor([schedule[step] for step in steps])
            origin = torch.zeros(len(steps), 1, 1, 1)
            at_zero = self.pipeline.step_distribution(origin, branching, origin, eta)
            at_one = self.pipeline.step_distribution(torch.ones_like(origin), branching, origin, eta)
            change = (at_one.prev_sample_mean - at_zero.prev_sample_mean).abs()
            sensitivity = (change / at_zero.std_dev_t).flatten()
            weights = torch.zeros(max(schedule) + 1)
            weights[branching] = REFERENCE_SENSITIVITY / sensitivity
            self._step_weights = weights.to(self.args.device)
        return self._step_weights[timesteps]

    def training_step(self, *args, **kwargs):
        start = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self._metrics.add("time/train", time.perf_counter() - start, reduce="per_process")
        return loss

    # --- logging -----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._metrics.pop_logs()}
            logs["num_prompts_seen"] = self.pair_loader.num_prompts_seen
            logs["num_pairs_seen"] = self.pair_loader.num_pairs_seen
        elif "train_samples_per_second" in logs:
            # Of the pairs and steps of this call: what transformers counts is the largest number that there could have been.
            seconds = max(logs["train_runtime"], 1e-9)
            pairs, steps = self._seen_before
            logs["train_samples_per_second"] = round((self.pair_loader.num_pairs_seen - pairs) / seconds, 3)
            logs["train_steps_per_second"] = round((self.state.global_step - steps) / seconds, 3)
        super().log(logs, start_time)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        if self._workers is None:
            return super().train(*args, **kwargs)
        try:
            self._workers.begin()
            return super().train(*args, **kwargs)
        finally:
            self._workers.end()

    def get_train_dataloader(self) -> PairLoader:
        return self.pair_loader

    def set_initial_training_values(self, *args, **kwargs):
        values = super().set_initial_training_values(*args, **kwargs)
        if self.args.max_steps > 0 and not self._resumed_at_end:
            # Epochs have fewer steps than the loader's length says: let steps end the run.
            values = (2**31 - 1, *values[1:])
        return values

    # --- evaluation --------------------------------------------------------------------------------------------------

    def generate(self, prompts: list[str], seeds: list[int] | None = None, progress: str | None = None):
        """
        Images of the current policy with the sampler of the config, one fixed seed per prompt. Under FSDP 2 and ZeRO-3 every process
        must call it, with as many prompts.

        Returns:
            `torch.Tensor` of shape `(len(prompts), 3, height, width)` in [0, 1], on the CPU.
        """
        self._require_denoiser()
        args = self.args
        self.model.eval()
        with self.weights_for_evaluation(), self.accelerator.autocast():
            return generate_images(
                self.pipeline,
                prompts,
                seeds=range(args.eval_seed, args.eval_seed + len(prompts)) if seeds is None else seeds,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                eta=args.eta,
                negative_prompt=args.negative_prompt,
                height=args.height,
                width=args.width,
                batch_size=args.per_device_eval_batch_size,
                progress=progress,
            )

    def score(self, images: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        """
        Scores `(N,)` of clean images under the reward (`reward`, and of several rewards `reward/{name}` of each) and the
        trainer's metrics.
        """
        rewards = {f"reward/{name}": part for name, part in self.reward.parts.items()} or {"reward": self.reward}
        if not prompts:  # a process without a share of the prompts
            return {name: torch.empty(0) for name in ("reward", *rewards, *self.metrics)}
        size, device = self.args.per_device_eval_batch_size, self.args.device
        scores = {"reward": torch.empty(0)}
        for name, reward in rewards.items():
            scores[name] = score_images(
                images, prompts, reward, batch_size=size, device=device, pipeline=self.pipeline
            )
        if self.reward.parts:
            scores["reward"] = self.reward.total({name: scores[f"reward/{name}"] for name in self.reward.parts})
        for name, metric in self.metrics.items():
            scores[name] = torch.as_tensor(metric(images, prompts)).float().cpu()
        return scores

    def evaluate(
        self, eval_dataset=None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Sample the evaluation prompts with fixed seeds and score the images.

        Args:
            eval_dataset (`datasets.Dataset` or `list[str]`, *optional*): prompts instead of the trainer's own.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): prefix of the metrics.

        Returns:
            `dict[str, float]`: `{prefix}_reward_mean`, `{prefix}_reward_std`, and the same for every metric.
        """
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if given is None:
            raise ValueError("There are no prompts to evaluate: pass `eval_dataset` here or to the trainer.")
        prompts = _evaluation_prompts(given, self.args)
        start = time.perf_counter()
        # Callbacks of `on_evaluate` see the weights that were evaluated.
        with self.weights_for_evaluation():
            scores = self._score_prompts(prompts)
            logs = {}
            for name, values in scores.items():
                logs[f"{metric_key_prefix}_{name}_mean"] = values.mean().item()
                logs[f"{metric_key_prefix}_{name}_std"] = values.std().item() if len(values) > 1 else 0.0
            logs[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
            self.log(logs)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def _score_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Scores of one image per prompt, by metric, float64; every process has those of all. What is not finite is left out."""
        # Each process samples and scores every `world`-th prompt.
        rank, world = self.args.process_index, self.args.world_size
        rows = range(rank, len(prompts), world)
        own = [prompts[i] for i in rows]
        seeds = [self.args.eval_seed + i for i in rows]
        # With FSDP as many images in every process, as all of them must call the denoiser.
        num_padding = math.ceil(len(prompts) / world) - len(own) if self._shards else 0
        images = self.generate(own + self._filling(num_padding), seeds + [0] * num_padding)[: len(own)]
        parts = gather_from_processes(self.score(images, own))

        # The parts follow each other by process, and so do the prompts here.
        in_order = [prompt for rank in range(world) for prompt in prompts[rank::world]]
        scores = {}
        for name in parts[0]:
            values = torch.cat([part[name] for part in parts]).double()
            finite = values.isfinite()
            if not finite.all():
                left_out = [prompt for prompt, good in zip(in_order, finite.tolist(), strict=True) if not good]
                logger.warning(
                    f"{len(left_out)} of {len(values)} images have no finite `{name}` and are left out of its mean: "
                    f"{left_out[:3]}."
                )
                values = values[finite] if finite.any() else values
            scores[name] = values
        return scores

    # --- saving and loading ------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not is_sharded(self.pipeline.denoiser):
            super().save_model(output_dir, _internal_call)
            return
        # The parent would gather the frozen base as well. Every process takes part, one writes.
        self._save(output_dir, state_dict=trained_state(self.model))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._shards:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # The parent would write the frozen base beside the optimizer.
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        elif self._shards_optimizer:
            save_optimizer_shards(self.model, self.optimizer, output_dir)
        else:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / SHARDS_NAME).is_dir():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer_shards(self.model, self.optimizer, checkpoint)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _write_model(self, folder: Path, output_dir: Path, state_dict: dict | None = None) -> None:
        """The adapter in diffusers' format, or the whole denoiser in its folder, its sampler, and a model card."""
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if state_dict is not None:
            state_dict = {k.removeprefix("denoiser."): v for k, v in state_dict.items()}
        if self.pipeline.use_lora:
            self.pipeline.save_lora(folder, state_dict, fold_alpha=not self._staging)
        elif is_sharded(self.pipeline.denoiser):
            write_denoiser(self.pipeline.denoiser, state_dict, folder / self.pipeline.denoiser_name)
        else:
            self.pipeline.denoiser.save_pretrained(folder / self.pipeline.denoiser_name)
        write_text(folder / SAMPLER_NAME, json.dumps(sampler_settings(self.args, self.pipeline), indent=2) + "\n")
        self._write_model_card(folder, output_dir)

    def _write_state(self, folder: Path) -> None:
        metrics = self._metrics.checkpoint()
        metrics["metrics"] = gather_from_processes(metrics["metrics"])
        base_weights = sample_base_weights(self.pipeline)
        state = self.pair_loader.state_dict()
        if not self.args.should_save:
            return
        pool = {name: value.contiguous().clone() for name, value in state.pop("pool").items()}
        save_file(pool, folder / PAIRS_NAME)
        state.update(metrics, transitions=transition_settings(self.args, self._set_timesteps(self.args)))
        state["base_weights"] = base_weights
        (folder / STATE_NAME).write_text(json.dumps(state))

    def _read_state(self, folder: str | None) -> bool:
        self.pair_loader = self._new_pair_loader()
        if folder is not None:
            state = json.loads((Path(folder) / STATE_NAME).read_text())
            pool = load_file(Path(folder) / PAIRS_NAME)
            self.pair_loader.load_state_dict({**state, "pool": pool})
            check_base(folder, state.get("base_weights"), sample_base_weights(self.pipeline))
            now = transition_settings(self.args, self._set_timesteps(self.args))
            latent_shape = self.pipeline.latent_shape(self.args.height, self.args.width)
            # All of them, in every process: one that refused them alone would leave the others waiting.
            waiting = StepPairs(**pool, prompts=state["pool_prompts"]) if pool else None
            check_waiting_pairs(folder, state.get("transitions"), now, waiting, latent_shape)
            rank, world = self.args.process_index, self.args.world_size
            self._metrics.restore(state["metrics"], state["last_rollout_metrics"], rank, world)
        self._seen_before = (self.pair_loader.num_pairs_seen, 0 if folder is None else global_step_of(folder))
        return self.pair_loader.exhausted

    def load_model(self, directory: str | Path) -> None:
        """
        Read back what [`~SPOTrainer.save_model`] or a checkpoint wrote, into the model that is being trained. Under FSDP 2
        and ZeRO-3 every process must call it.

        Args:
            directory (`str` or `Path`): `output_dir`, or one of its `checkpoint-*` folders.

        Raises:
            ValueError: if there are no weights, or they do not fit the adapter.
        """
        directory = Path(directory)
        has_lora = (directory / LORA_NAME).is_file()
        has_denoiser = (directory / self.pipeline.denoiser_name / "config.json").is_file()
        if has_lora != self.pipeline.use_lora and (has_lora or has_denoiser):
            found = "a LoRA" if has_lora else f"a whole {self.pipeline.denoiser_name}"
            raise ValueError(
                f"{str(directory)!r} holds {found}, and this run has `use_peft={self.pipeline.use_lora}`. Set it to "
                f"{not self.pipeline.use_lora}, as in the run that wrote it."
            )
        if self.pipeline.use_lora:
            if not has_lora:
                raise ValueError(f"{str(directory)!r} has no {LORA_NAME}, so it is no SPO checkpoint.")
            self.pipeline.load_lora(directory)
        else:
            saved = load_denoiser(plain_class(self.pipeline.denoiser), directory, self.pipeline.denoiser_name)
            load_whole_state(self.pipeline.denoiser, saved.state_dict())
        # DeepSpeed steps from copies of its own, in float32.
        refresh = getattr(getattr(self.optimizer, "optimizer", None), "refresh_fp32_params", None)
        if refresh is not None:
            refresh()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.load_model(resume_from_checkpoint)
        self.average_from_checkpoint(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        logger.info(f"Loading the best model, {self.state.best_model_checkpoint} ({self.state.best_metric}).")
        self.load_model(self.state.best_model_checkpoint)
        self.average_from_weights()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """The parent copies files of transformers models to `output_dir` and uploads that; our files are put there first."""
        if self.args.hub_strategy != "end" and not self._staging:
            self._save(self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _model_card(self, name: str, output_dir: Path) -> str:
        pipeline = self.pipeline
        return spo_model_card(
            self.args,
            name=name,
            base_model=None if self._base_changes else getattr(pipeline.sd_pipeline, "name_or_path", None),
            step_rule=pipeline.step_rule,
            guidance=pipeline.call_arguments(self.args.guidance_scale, self.args.negative_prompt),
            denoiser_name=pipeline.denoiser_name,
            denoiser_class=plain_class(pipeline.denoiser).__name__,
            use_lora=pipeline.use_lora,
            reward_model=describe_reward(self.reward_model),
            scoring_vae=pipeline.scoring_vae,
            commit=commit_of_the_base(pipeline.sd_pipeline),
            vae=parts_from_elsewhere(pipeline.sd_pipeline).get("vae"),
            global_step=self.state.global_step,
            num_pairs=self.pair_loader.num_pairs_seen,
            log_history=self.state.log_history,
            parts=self.run_record.parts if self.run_record is not None else (),
            samples=read_samples(output_dir),
            tags=self._tag_names,
        )


def _first(prompts: Sequence[str] | PromptStream, count: int) -> list[str]:
    """The first prompts; a stream has a hundred at hand."""
    return list((prompts.first if isinstance(prompts, PromptStream) else prompts)[:count])


def _evaluation_prompts(dataset: Any, config: SPOConfig) -> Sequence[str]:
    """
    Prompts to evaluate with, all of which are sampled.

    Raises:
        TypeError, ValueError: see [`read_prompts`]; a stream does not end.
    """
    prompts = read_prompts(dataset, config.dataset_prompt_column, "eval_dataset")
    if isinstance(prompts, PromptStream):
        raise TypeError(
            "`eval_dataset` must be a list of prompts or a `datasets.Dataset`, got a stream: every evaluation samples all of its "
            "prompts. Take some of them: `[row['prompt'] for row in stream.take(64)]`."
        )
    return prompts


def _rows_of_pairs(pairs: StepPairs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Rows of a batch in which N pairs are trained, on the CPU, where `pairs.shared` is: nothing waits for the device.

    Returns:
        Rows `(N,)` of the chosen transitions, rows `(N,)` of the rejected ones, and the pairs whose rejected transition
        needs a forward pass of its own, whose rows begin at N.
    """
    chosen_row = torch.arange(len(pairs))
    own_forward = chosen_row[~pairs.shared.cpu()]
    rejected_row = chosen_row.clone()
    rejected_row[own_forward] = torch.arange(len(pairs), len(pairs) + len(own_forward))
    return chosen_row, rejected_row, own_forward
