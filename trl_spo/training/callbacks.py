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

"""Callbacks of the trainers: where epochs of pairs end, and sample images while training."""

import json
import math
from pathlib import Path

from PIL import Image
from transformers import TrainerCallback
from transformers.utils import logging

from ..captions import captioned_grid
from ..images import to_pil
from ..pipelines.shards import is_sharded
from .checkpointing import write_text
from .model_card import SAMPLES_NAME


logger = logging.get_logger(__name__)


class PairEpochCallback(TrainerCallback):
    """Tells the Trainer where epochs and the run really end: the number of valid pairs is not known beforehand."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        loader = self.trainer.pair_loader
        state.epoch = loader.epoch
        if loader.exhausted:
            if loader.waiting:
                logger.warning(f"{loader.waiting} pairs are left at the end, too few for a step; they are not used.")
            control.should_training_stop = True
            if args.save_strategy == "steps":
                control.should_save = True
        elif loader.epoch_finished:
            control.should_epoch_stop = True
        if args.max_steps <= 0:
            self._update_progress_bar(state, loader)
        return control

    def _update_progress_bar(self, state, loader):
        per_prompt = (loader.num_pairs_seen + loader.waiting) / loader.num_prompts_seen
        total = math.ceil(per_prompt * loader.total_prompts / loader.pairs_per_step)
        for callback in self.trainer.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None)
            if bar is not None:
                bar.total = state.global_step if loader.exhausted else max(total, state.global_step + 1)


class ImageLoggingCallback(TrainerCallback):
    """
    Samples the same prompts with the same seeds before the first step, every `every` optimizer steps and at the end.

    Under `output_dir/images` it leaves a sheet of all images with their prompts per time (`step_000100.png`) and the latest
    images one by one (`sample_0.png`, with their prompts in `samples.json`), which the model card shows. The trackers of the
    run get them as well: TensorBoard, Weights & Biases and Trackio, those that `report_to` names. TensorBoard has no captions;
    it shows the prompts under the same tags among its texts.

    Args:
        trainer ([`SPOTrainer`]): the trainer; its pipeline is sampled with the settings of its config.
        prompts (`list[str]`): a few prompts.
        every (`int`): optimizer steps between two times.
    """

    def __init__(self, trainer, prompts: list[str], every: int):
        self.trainer = trainer
        self.prompts = prompts
        self.every = every
        self._last = None
        self._prompts_are_logged = False

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._log(args, state)

    def on_step_end(self, args, state, control, **kwargs):
        # The last step counts here, as trackers close their files when training ends; not one at which a signal ends it.
        is_last = control.should_training_stop and self.trainer.stopped_by is None
        if state.global_step % self.every == 0 or is_last:
            self._log(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        if self._last != state.global_step and self.trainer.stopped_by is None:
            self._log(args, state)

    def _log(self, args, state):
        writes = state.is_world_process_zero
        if not writes and not is_sharded(
            self.trainer.pipeline.denoiser
        ):  # all processes call one that is spread over them
            return
        self._last = state.global_step
        # Sample, and save what the model card shows.
        images = self.trainer.generate(self.prompts)
        if not writes:
            return
        pictures = [to_pil(image) for image in images]
        self._save(Path(args.output_dir) / "images", pictures, state.global_step)

        # Send the images to the trackers of the run, each in its own way.
        for callback in self.trainer.callback_handler.callbacks:
            if getattr(callback, "tb_writer", None) is not None:
                for i, (image, prompt) in enumerate(zip(images, self.prompts, strict=True)):
                    callback.tb_writer.add_image(f"samples/{i}", image, state.global_step)
                    if not self._prompts_are_logged:
                        callback.tb_writer.add_text(f"samples/{i}", prompt, state.global_step)
                self._prompts_are_logged = True
        # Neither gets a step of its own: both would drop images of a step below their own count of log calls. The
        # callbacks of transformers log the optimizer step beside every value, and so do we.
        values = {"train/global_step": state.global_step}
        if "wandb" in args.report_to:
            import wandb

            if wandb.run is not None:
                samples = [wandb.Image(p, caption=c) for p, c in zip(pictures, self.prompts, strict=True)]
                wandb.log({"samples": samples, **values})
        if "trackio" in args.report_to:
            import trackio

            if trackio.context_vars.current_run.get() is not None:
                samples = [trackio.Image(p, caption=c) for p, c in zip(pictures, self.prompts, strict=True)]
                trackio.log({**{f"samples/{i}": sample for i, sample in enumerate(samples)}, **values})

    def _save(self, folder: Path, pictures: list[Image.Image], step: int):
        folder.mkdir(parents=True, exist_ok=True)
        title = f"Step {step}" if step else "Step 0, before training"
        captioned_grid(pictures, self.prompts, title=title).save(folder / f"step_{step:06d}.png")
        names = [f"sample_{i}.png" for i in range(len(pictures))]
        for name, picture in zip(names, pictures, strict=True):
            picture.save(folder / name)
        record = {"step": step, "prompts": list(self.prompts), "images": names}
        write_text(folder / SAMPLES_NAME, json.dumps(record, ensure_ascii=False))
