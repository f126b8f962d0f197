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

from dataclasses import dataclass, field

from .images import WHITE, parse_colour
from .training.arguments import StepTrainingArguments


@dataclass(repr=False)  # a generated repr would show the Hub token
class StepRewardConfig(StepTrainingArguments):
    r"""
    Configuration class for the [`StepRewardTrainer`].

    This class includes only the parameters that are specific to training a reward model for denoising steps. For a full list of
    training arguments, please refer to the [`~transformers.TrainingArguments`] documentation. Defaults are those of
    the [SPO paper](https://huggingface.co/papers/2406.04314) for Stable Diffusion 1.5, on one device.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the noised pairs

        guidance_scale (`float`, *optional*, defaults to `5.0`):
            Classifier-free guidance of the one-step prediction of the clean images. The reward model learns to judge
            predictions of this strength: use the same value in [`SPOConfig`]. Without effect on a latent reward model,
            which judges noised latents.
        guidance_rescale (`float`, *optional*, defaults to `0.0`):
            In [0, 1]: how far the standard deviation of guided predictions is brought back to that without guidance, as in
            diffusers; for models with zero terminal SNR. Stable Diffusion 1, 2 and XL only. Use the value of
            [`SPOConfig`].
        clip_skip (`int`, *optional*, defaults to `0`):
            Last layers of the CLIP text encoders that prompts do not pass, counted as in diffusers. Stable Diffusion only,
            3 included.
        negative_prompt (`str`, *optional*, defaults to `""`):
            Prompt of the unconditional half of the guidance.
        min_timestep (`int`, *optional*, defaults to `0`):
            Smallest timestep drawn in training.
        max_timestep (`int`, *optional*, defaults to `999`):
            Largest timestep drawn in training, inclusive.
        timesteps (`list[int]`, *optional*):
            Draw from these timesteps instead of from the whole range. SPO asks the reward model only about the
            timesteps of its schedule; with 20 steps these are 951, 901, ..., 1, and 0.
        independent_noise (`bool`, *optional*, defaults to `False`):
            Draw a noise for each image of a pair, as the published latent reward models were trained, instead of one for
            both.
        resolution (`int`, *optional*, defaults to `512`):
            Side in pixels to which the images of a pair are brought (short side, then centre crop) before the VAE.
            512 suits Stable Diffusion 1.5, 1024 SDXL.
        image_background (`str`, *optional*, defaults to `"white"`):
            Colour that shows through transparent images: a name, `"#808080"` or another form of `PIL.ImageColor`. Under
            transparent pixels files hold any colour, mostly black, which nobody sees.
        prediction_batch_size (`int`, *optional*):
            Pairs that go through the denoiser and the VAE in one call. Smaller needs less memory and gives the same
            images up to rounding. Defaults to the whole batch.

        > Parameters that control the data

        dataset_name (`str`, *optional*):
            Training dataset (split `"train"`), used when the trainer is given none: a `.parquet` file, a folder of
            them, or a Hub id. Either Pick-a-Pic's columns (`caption`, `jpg_0`, `jpg_1`, `label_0`, `label_1`,
            optionally `has_label`, `are_different` and `num_example_per_prompt`) or TRL's (`prompt`, `chosen`,
            `rejected`).
        dataset_streaming (`bool`, *optional*, defaults to `False`):
            Read the rows of `dataset_name` as they are needed, instead of copying all of them to the local disk first, and mix
            them as [`RowStream`] says, in blocks of 1,000 pairs; the same for a `datasets.IterableDataset` that is passed
            as `train_dataset`, which is otherwise read in its own order. A run that was stopped goes on without reading what came
            before, except with `dataloader_num_workers > 0`, where a buffer of 1,000 pairs mixes the rows and all are read
            again. It needs `max_steps`.
        dataset_prompt_column (`str`, *optional*):
            Column with the prompts. Defaults to `"caption"` or `"prompt"`, whichever exists.
        max_bad_image_fraction (`float`, *optional*, defaults to `0.01`):
            Pairs with an unreadable image are skipped and counted; training stops once they exceed this share of the
            pairs seen (judged from the hundredth pair on), and does not start if they exceed it in a sample.
        num_checked_rows (`int`, *optional*, defaults to `256`):
            Rows whose images are decoded before training starts. `0` leaves the check out.
        only_different (`bool`, *optional*, defaults to `False`):
            Drop pairs of equal images (`are_different` false).
        max_pairs_per_prompt (`int`, *optional*):
            Keep this many pairs of each prompt, the first ones. Not for streams.
        relabel_preferences (`bool`, *optional*, defaults to `False`):
            Replace the labels of training and evaluation pairs by the preference between the clean images of the
            trainer's `preference_model`: PickScore, in the paper's SDXL recipe.
        relabel_tie_band (`float`, *optional*, defaults to `0.1`):
            With `relabel_preferences`: pairs whose two probabilities differ by less are ties.
        cache_latents (`bool`, *optional*, defaults to `False`):
            Keep the VAE's posterior of each image and the embeddings of recent prompts, so that later epochs, and
            other pairs of the same image, do not encode them again. Latents are still drawn anew each time.
        cache_latents_gb (`float`, *optional*, defaults to `8.0`):
            Most memory that the cache takes per process, in GiB. What does not fit is encoded each time.

        > Parameters that control the model

        model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained` when the pipeline is given as a path or Hub id, such as
            `{"dtype": "float16", "variant": "fp16"}`.

        > Parameters that control the training

        caption_loss_coef (`float`, *optional*, defaults to `0.0`):
            Weight of CLIP's contrastive loss between the preferred images and the captions of a batch. It keeps the
            reward model from forgetting the caption, which preference labels alone reward only weakly. `0.0` is the
            paper's loss. It needs several pairs per device and batch, as the other captions are the negatives.
        freeze_text_tower (`bool`, *optional*, defaults to `False`):
            Whether to train the vision tower only.
        max_nonfinite_fraction (`float`, *optional*, defaults to `0.05`):
            Pairs with a NaN or an infinity in the samples or the scores are left out, named and counted;
            training stops once they exceed this share of all (the first 1,000 are judged together). An optimizer step
            whose gradients are not finite is skipped; 20 in a row stop the training.

        > Parameters that control the metrics

        accuracy_timestep_bins (`int`, *optional*, defaults to `5`):
            Number of equal ranges of timesteps for which training logs `accuracy/t_{lo}_{hi}`.
        eval_timesteps (`list[int]`, *optional*, defaults to `[0, 251, 501, 701, 951]`):
            Timesteps at which evaluation measures `eval_accuracy/t_{t}`. At 0 the clean images are judged as they are.

        > Parameters that control the output

        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Begin a new run in a folder with checkpoints of an earlier one, which stay beside its own. Otherwise the commands
            refuse that, and the trainer warns.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `learning_rate`: Defaults to `3e-6` instead of `5e-5` (SDXL: `1e-6`).
    > - `weight_decay`: Defaults to `0.3` instead of `0.0`.
    > - `lr_scheduler_type`: Defaults to `"constant_with_warmup"` instead of `"linear"`; the paper names the warm-up
    >   only.
    > - `warmup_steps`: Defaults to `500` instead of `0`.
    > - `max_steps`: Defaults to `8000` instead of `-1` (SDXL: `7000`).
    > - `per_device_train_batch_size` and `gradient_accumulation_steps`: Default to `16` and `4` instead of `8` and `1`,
    >   64 pairs per step on one device; lower the accumulation when there are more devices.
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `remove_unused_columns`: Defaults to `False` instead of `True`; the collator chooses the columns.
    >
    > `bf16` stays `False`, so that the defaults run on a CPU. The paper trains in bf16: switch it on where the hardware
    > has it.
    """

    learning_rate: float = field(default=3e-6, metadata={"help": "The initial learning rate for AdamW."})
    weight_decay: float = field(default=0.3, metadata={"help": "Weight decay for AdamW."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "The learning rate schedule to use."}
    )
    warmup_steps: float = field(default=500, metadata={"help": "Number of steps of linear warm-up."})
    max_steps: int = field(
        default=8000, metadata={"help": "Number of optimizer steps; `-1` leaves it to `num_train_epochs`."}
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Pairs per device and forward pass."})
    gradient_accumulation_steps: int = field(
        default=4, metadata={"help": "Number of forward passes to accumulate before an optimizer step."}
    )
    logging_steps: float = field(
        default=10,
        metadata={
            "help": "Log every X updates steps. Should be an integer or a float in range `[0,1)`. If smaller than 1, "
            "will be interpreted as ratio of total training steps."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep `False`: the collator chooses the columns it needs."}
    )

    # Parameters that control the noised pairs
    guidance_scale: float = field(
        default=5.0, metadata={"help": "Classifier-free guidance of the one-step prediction of the clean images."}
    )
    guidance_rescale: float = field(
        default=0.0, metadata={"help": "Bring the deviation of guided predictions back, as in diffusers."}
    )
    clip_skip: int = field(
        default=0, metadata={"help": "Last layers of the CLIP text encoders that prompts do not pass."}
    )
    negative_prompt: str = field(default="", metadata={"help": "Prompt of the unconditional half of the guidance."})
    min_timestep: int = field(default=0, metadata={"help": "Smallest timestep drawn in training."})
    max_timestep: int = field(default=999, metadata={"help": "Largest timestep drawn in training, inclusive."})
    timesteps: list[int] | None = field(
        default=None, metadata={"help": "Draw from these timesteps instead of from the whole range."}
    )
    independent_noise: bool = field(
        default=False, metadata={"help": "Draw a noise for each image of a pair instead of one for both."}
    )
    resolution: int = field(
        default=512, metadata={"help": "Side in pixels to which the images are brought before the VAE."}
    )
    image_background: str = field(
        default=WHITE, metadata={"help": "Colour that shows through transparent images, by name or as `#808080`."}
    )
    prediction_batch_size: int | None = field(
        default=None,
        metadata={"help": "Pairs per call of the denoiser and the VAE. Defaults to the whole batch."},
    )

    # Parameters that control the data
    dataset_name: str | None = field(
        default=None, metadata={"help": "Path or Hub name of the training dataset, when the trainer is given none."}
    )
    dataset_prompt_column: str | None = field(
        default=None, metadata={"help": "Column with the prompts. Defaults to `caption` or `prompt`."}
    )
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read the rows of `dataset_name` as they are needed. Needs `max_steps`."}
    )
    max_bad_image_fraction: float = field(
        default=0.01,
        metadata={"help": "Largest share of pairs with an unreadable image that is skipped before training stops."},
    )
    num_checked_rows: int = field(
        default=256, metadata={"help": "Rows whose images are decoded before training starts; 0 for none."}
    )
    only_different: bool = field(default=False, metadata={"help": "Drop pairs of equal images."})
    max_pairs_per_prompt: int | None = field(
        default=None, metadata={"help": "Keep this many pairs of each prompt. Not for streams."}
    )
    relabel_preferences: bool = field(
        default=False, metadata={"help": "Replace the labels by the preferences of the trainer's `preference_model`."}
    )
    relabel_tie_band: float = field(
        default=0.1, metadata={"help": "Relabelled pairs whose two probabilities differ by less are ties."}
    )
    cache_latents: bool = field(
        default=False, metadata={"help": "Keep posteriors of images and embeddings of prompts for later epochs."}
    )
    cache_latents_gb: float = field(default=8.0, metadata={"help": "Most memory of that cache, in GiB per process."})

    # Parameters that control the model
    model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of `from_pretrained` when the pipeline is given as a path or Hub id."},
    )

    # Parameters that control the training
    caption_loss_coef: float = field(
        default=0.0,
        metadata={"help": "Weight of the contrastive loss between the preferred images and the batch's captions."},
    )
    freeze_text_tower: bool = field(default=False, metadata={"help": "Whether to train the vision tower only."})
    max_nonfinite_fraction: float = field(
        default=0.05, metadata={"help": "Largest tolerable share of pairs with a NaN or an infinity."}
    )

    # Parameters that control the metrics
    accuracy_timestep_bins: int = field(
        default=5, metadata={"help": "Number of equal ranges of timesteps for which accuracy is logged."}
    )
    eval_timesteps: list[int] = field(
        default_factory=lambda: [0, 251, 501, 701, 951],
        metadata={"help": "Timesteps at which evaluation measures accuracy."},
    )

    _VALID_DICT_FIELDS = [*StepTrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # JSON on the command line

    def __post_init__(self):
        # Types first, as comparing a text with a number would only raise Python's own error.
        self.check_kinds()
        super().__post_init__()

        # Then the ranges: of timesteps, and of settings with a lowest value.
        if not 0 <= self.min_timestep <= self.max_timestep:
            raise ValueError(
                "`min_timestep` and `max_timestep` must satisfy 0 <= min_timestep <= max_timestep, got "
                f"{self.min_timestep} and {self.max_timestep}."
            )
        for name in ("timesteps", "eval_timesteps"):
            values = getattr(self, name)
            if values is not None and (len(values) == 0 or min(values) < 0):
                raise ValueError(f"`{name}` must hold at least one timestep, none below 0, got {values}.")
        at_least_one = ("resolution", "accuracy_timestep_bins", "prediction_batch_size", "max_pairs_per_prompt")
        for name in (*at_least_one, "per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.guidance_rescale > 1:
            raise ValueError(f"`guidance_rescale` must be in [0, 1], where 0 is off; got {self.guidance_rescale}.")
        not_negative = ("guidance_rescale", "clip_skip", "caption_loss_coef", "num_checked_rows", "cache_latents_gb")
        for name in (*not_negative, "learning_rate", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if not 0 <= self.relabel_tie_band < 1:
            raise ValueError(f"`relabel_tie_band` must lie in [0, 1), got {self.relabel_tie_band}.")

        # Settings that only work together.
        if self.dataset_streaming and self.max_steps <= 0:
            raise ValueError("`dataset_streaming` needs `max_steps`: a stream does not tell how long an epoch is.")
        for name in ("max_bad_image_fraction", "max_nonfinite_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}.")
        try:
            parse_colour(self.image_background)
        except ValueError as error:
            raise ValueError(f"`image_background`: {error}") from error
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must stay False: the collator reads the preference columns.")
