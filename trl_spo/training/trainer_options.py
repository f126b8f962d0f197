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
Say for each field of `transformers.TrainingArguments` whether our trainers support it: it works as transformers documents
it, or values other than the default are refused with the reason. `tests/test_trainer_options.py` fails when transformers
has a field that is in no table.
"""

import dataclasses
from typing import Any


# Of versions 4.57 to 5; some are in one of them only.
WORKS = frozenset(
    # the run
    "output_dir overwrite_output_dir per_device_train_batch_size num_train_epochs max_steps gradient_accumulation_steps "
    "max_grad_norm seed data_seed full_determinism torch_empty_cache_steps resume_from_checkpoint ignore_data_skip "
    "restore_callback_states_from_checkpoint do_train do_eval do_predict "
    # optimizer and schedule
    "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio optim optim_args optim_target_modules "
    "adafactor weight_decay adam_beta1 adam_beta2 adam_epsilon "
    # precision, memory and speed
    "bf16 fp16 tf32 half_precision_backend fp16_backend fp16_opt_level activation_checkpointing "
    "activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile "
    "torch_compile_backend torch_compile_mode torchdynamo debug skip_memory_metrics "
    # logging
    "logging_strategy logging_steps logging_first_step logging_dir log_on_each_node logging_nan_inf_filter log_level "
    "log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id "
    "trackio_static_space_id "
    # evaluation and saving
    "eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start save_only_model save_strategy "
    "save_steps save_on_each_node save_total_limit load_best_model_at_end metric_for_best_model greater_is_better "
    "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision "
    "push_to_hub_model_id push_to_hub_organization push_to_hub_token "
    # data and devices
    "accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory "
    "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
    "remove_unused_columns train_sampling_strategy use_cpu no_cuda use_mps_device local_rank ddp_find_unused_parameters "
    "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config "
    "fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap deepspeed _n_gpu ray_scope tpu_num_cores "
    "per_gpu_train_batch_size per_gpu_eval_batch_size".split()
)

_NO_PREDICTIONS = "our trainers have no `compute_metrics`: they measure with metrics of their own"
_LANGUAGE = "it is for language models"
REFUSED = {  # field -> why another value than the default has no effect that could be meant
    "auto_find_batch_size": "a second attempt would go on with pairs and metrics of the first; halve "
    "`per_device_train_batch_size` and double `gradient_accumulation_steps`, which trains the same",
    "average_tokens_across_devices": "the loss is always the mean over the pairs of all processes",
    "enable_jit_checkpoint": "it saves in the middle of a step, which cannot be resumed exactly; a checkpoint of "
    "`save_steps` is whole whenever the process is stopped",
    "label_smoothing_factor": "pairs have no classes whose labels could be smoothed",
    "bf16_full_eval": "it would cast the model that is being trained; use `bf16`",
    "fp16_full_eval": "it would cast the model that is being trained; use `fp16`",
    "parallelism_config": "training is data parallel: neither a model nor a pair is split over devices",
    "prediction_loss_only": _NO_PREDICTIONS,
    "eval_do_concat_batches": _NO_PREDICTIONS,
    "eval_use_gather_object": _NO_PREDICTIONS,
    "eval_accumulation_steps": _NO_PREDICTIONS,
    "include_for_metrics": _NO_PREDICTIONS,
    "include_inputs_for_metrics": _NO_PREDICTIONS,
    "batch_eval_metrics": _NO_PREDICTIONS,
    "label_names": _NO_PREDICTIONS,
    "use_legacy_prediction_loop": _NO_PREDICTIONS,
    "group_by_length": "pairs have no length",
    "length_column_name": "pairs have no length",
    "include_num_input_tokens_seen": "pairs are counted, not tokens",
    "include_tokens_per_second": "pairs are counted, not tokens",
    "use_liger_kernel": _LANGUAGE,
    "liger_kernel_config": _LANGUAGE,
    "neftune_noise_alpha": _LANGUAGE,
    "use_cache": _LANGUAGE,
    "past_index": _LANGUAGE,
    "jit_mode_eval": "evaluation runs the model as it is",
    "save_safetensors": "weights are written as safetensors always",
    "mp_parameters": "SageMaker's model parallelism is not supported",
    "tpu_metrics_debug": "it is for TPUs",
}

_NO_LOADER = "rollouts make the batches, in the process that trains: there is no data loader that it could concern"
SPO_REFUSED = {  # of `SPOConfig` only
    "dataloader_drop_last": "every pair is trained on: the last step of a run may be smaller",
    "dataloader_num_workers": _NO_LOADER,
    "dataloader_persistent_workers": _NO_LOADER,
    "dataloader_prefetch_factor": _NO_LOADER,
    "dataloader_multiprocessing_context": _NO_LOADER,
    "dataloader_in_order": _NO_LOADER,
    "remove_unused_columns": "prompts are read by name, and nothing else is",
    "train_sampling_strategy": "prompts come in a new random order in every epoch",
}
_SAME = {"include_num_input_tokens_seen": ("no", False)}  # as the default


def check_options(config: Any, refused: dict[str, str]) -> None:
    """
    Args:
        config (`transformers.TrainingArguments`): before transformers completes its values.
        refused (`dict[str, str]`): field -> why it is refused.

    Raises:
        ValueError: if one of these fields has another value than its default.
    """
    for field in dataclasses.fields(config):
        if field.name not in refused:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = getattr(config, field.name)
        if value not in _SAME.get(field.name, (default,)):
            raise ValueError(
                f"`{field.name}={value!r}` has no effect in a {type(config).__name__}: {refused[field.name]}. Leave it at "
                f"{default!r}."
            )
