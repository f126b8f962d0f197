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
The program that `test_distributed.py` starts in two processes: `run_distributed.py FOLDER SCENARIO [SCENARIO ...]`. What
rank r saw of a scenario is left in `FOLDER/SCENARIO_r.pt`. The test imports the trainers of this module to compute the
same in one process.
"""

import functools
import io
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset
from PIL import Image
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import CLIPTextModel, TrainerCallback

from tests.testing_utils import PROMPTS, tiny_sd_pipeline, tiny_spo_config, tiny_step_reward_config
from trl_spo import LatentRewardModel, SPOConfig, SPOTrainer, StepAwareRewardModel, StepRewardTrainer
from trl_spo.pipelines.shards import whole
from trl_spo.rewards.inputs import StepRewardOutput
from trl_spo.step_pairs import StepPairs


RANK = int(os.environ.get("RANK", 0))
MORE_PROMPTS = [*PROMPTS, "a red bird", "the small dog", "a photo", "a large painting of a bird"]


def redness(images, prompts, timesteps=None):
    return 100 * (images[:, 0] - images[:, 1]).mean(dim=(1, 2))


class Constant:
    """Gives equal scores, so no pairs, on some ranks as long as it is `on`; otherwise `redness`."""

    def __init__(self, ranks=(0, 1)):
        self.ranks, self.on = ranks, True

    def __call__(self, images, prompts, timesteps):
        scores = redness(images, prompts)
        return scores * 0 if RANK in self.ranks and self.on else scores


def no_cats(images, prompts, timesteps):
    """Prompts with a cat get equal scores: how many pairs a rank finds depends on its prompts."""
    wanted = torch.tensor([float("cat" not in prompt) for prompt in prompts])
    return redness(images, prompts) * wanted


class Gradients(TrainerCallback):
    """Keeps gradients, as the optimizer gets them, and weights of every step."""

    def __init__(self):
        self.gradients, self.weights = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        if all(gradient is not None for gradient in gradients):  # DeepSpeed and FSDP keep theirs in shards
            self.gradients.append([whole(gradient).clone() for gradient in gradients])

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.weights.append([whole(p).clone() for p in model.parameters() if p.requires_grad])


def logs_of(trainer) -> list[dict]:
    """What was logged, without durations."""
    timing = ("time/", "train_runtime", "train_samples", "train_steps", "eval_runtime", "eval_samples", "eval_steps")
    return [{k: v for k, v in log.items() if not k.startswith(timing)} for log in trainer.state.log_history]


def trained(trainer) -> list[torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return [whole(p).clone() for p in model.parameters() if p.requires_grad]


# --- SPO -------------------------------------------------------------------------------------------------------------


class RecordingTrainer(SPOTrainer):
    """Remembers its rollouts and the number of pairs in every micro-batch."""

    def train(self, *args, **kwargs):
        self.rollouts, self.batches = {}, []
        self.add_callback(gradients := Gradients())
        self.kept = gradients
        return super().train(*args, **kwargs)

    def rollout(self, prompts, seed=0, **kwargs):
        pairs = super().rollout(prompts, seed=seed, **kwargs)
        self.rollouts[seed] = (list(prompts), pairs)
        return pairs

    def compute_loss(self, model, inputs, **kwargs):
        self.batches.append(len(inputs["pairs"]))
        return super().compute_loss(model, inputs, **kwargs)


class LateTrainer(RecordingTrainer):
    """Its reward tells images apart after the first eight prompts only."""

    def rollout(self, prompts, seed=0, **kwargs):
        self.reward_model.on = seed < 8
        return super().rollout(prompts, seed=seed, **kwargs)


class ReplayingTrainer(RecordingTrainer):
    """One process whose rollouts are those that two processes recorded, one after the other."""

    recorded: list[dict]  # one per rank

    def rollout(self, prompts, seed=0, **kwargs):
        parts = [rank[seed] for rank in self.recorded if seed in rank and rank[seed][0]]
        assert sorted(prompts) == sorted(prompt for own, _ in parts for prompt in own)
        for _, pairs in parts:
            self._check_scores(pairs)
            self._metrics.add_rollout(pairs)
        return StepPairs.cat([pairs for _, pairs in parts])


def spo_config(folder: Path, **settings) -> SPOConfig:
    defaults = {
        "per_device_rollout_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "max_grad_norm": 0.0,
        "use_cpu": True,
    }
    return tiny_spo_config(folder / "out", **{**defaults, **settings})


def spo_trainer(folder: Path, reward=no_cats, trainer_class=RecordingTrainer, prompts=MORE_PROMPTS, **settings):
    config = spo_config(folder, **settings)
    pipeline = tiny_sd_pipeline(folder / f"tokenizer_{RANK}")
    return trainer_class(config, pipeline, reward, train_dataset=prompts, eval_dataset=PROMPTS[:5])


def spo_result(trainer) -> dict:
    return {
        "world_size": trainer.args.world_size,
        "weights": trained(trainer),
        "batches": trainer.batches,
        "own_pairs": sum(len(pairs) for _, pairs in trainer.rollouts.values()),
        "rollouts": trainer.rollouts,
        "gradients": trainer.kept.gradients,
        "steps": trainer.kept.weights,
        "logs": logs_of(trainer),
        "left": trainer.pair_loader.waiting,
    }


# SGD: the weights after a step are a linear function of the gradients, so rounding stays rounding. Adam would divide a
# gradient that is nothing but rounding by itself.
POOLED = {"optim": "sgd", "learning_rate": 1.0, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
POOLED |= {"log_images_steps": 2, "num_eval_images": 3}
# 64 pairs in steps of 12, the last of 4; and 42 pairs in steps of 12, the last of 6: on each of two processes a
# micro-batch of two and one of one.
ACCUMULATION = {
    1: {"per_device_train_batch_size": 6},
    2: {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "prompts": MORE_PROMPTS[:9],
        "branch_start_step": 2,
        "num_inner_steps": 2,
        "kl_coef": 0.5,
    },
}


def accumulation(folder: Path, steps: int) -> dict:
    trainer = spo_trainer(folder, **{**POOLED, **ACCUMULATION[steps]})
    trainer.train()
    return {**spo_result(trainer), "evaluation": trainer.evaluate(), "one_prompt": trainer.evaluate(PROMPTS[:1])}


def accumulation_1(folder: Path) -> dict:
    return accumulation(folder, 1)


def accumulation_2(folder: Path) -> dict:
    return accumulation(folder, 2)


def replay(folder: Path, steps: int, recorded: list[dict]) -> dict:
    """`accumulation` in one process, on the pooled rollouts of two."""
    settings = {**POOLED, **ACCUMULATION[steps]}
    for size in ("per_device_train_batch_size", "per_device_rollout_batch_size"):
        settings[size] = 2 * settings.get(size, 2)
    trainer = spo_trainer(folder, trainer_class=ReplayingTrainer, **settings)
    trainer.recorded = recorded
    trainer.train()
    return {**spo_result(trainer), "evaluation": trainer.evaluate(), "one_prompt": trainer.evaluate(PROMPTS[:1])}


def one_rank_without_pairs(folder: Path) -> dict:
    trainer = spo_trainer(folder, Constant(ranks=(1,)))
    trainer.train()
    return spo_result(trainer)


def late_pairs(folder: Path) -> dict:
    """No rank finds a pair in the first two rounds."""
    trainer = spo_trainer(folder, Constant(), LateTrainer, num_train_epochs=1)
    trainer.train()
    return spo_result(trainer)


def uneven_prompts(folder: Path) -> dict:
    """Nine prompts: the last round has one, for rank 0 alone."""
    trainer = spo_trainer(folder, redness, prompts=MORE_PROMPTS[:9], num_train_epochs=1)
    trainer.train()
    return spo_result(trainer)


class Written:
    """Everything this process opens for writing, makes, moves or deletes below a folder, as paths relative to it."""

    def __init__(self, folder: Path):
        self.folder, self.paths, self.folders, self.active = str(folder.resolve()), set(), set(), True
        # These write in Rust and in C++, which no audit hook sees.
        safetensors.torch.serialize_file = self.noting(safetensors.torch.serialize_file)
        torch.save = self.noting(torch.save)
        sys.addaudithook(self.hook)

    def noting(self, write):
        """`write(content, file, ...)`, with the file noted."""

        @functools.wraps(write)
        def wrapped(content, file, *args, **kwargs):
            if self.active and isinstance(file, (str, os.PathLike)):
                self.add(file)
            return write(content, file, *args, **kwargs)

        return wrapped

    def hook(self, event, args):
        if not self.active:
            return
        if event == "open":
            path, mode, flags = args
            if isinstance(path, (str, bytes, os.PathLike)) and (
                (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            ):
                self.add(path)
        elif event in ("os.rename", "os.link", "os.symlink"):
            self.add(args[0]), self.add(args[1])
        elif event == "os.mkdir":
            self.add(args[0], self.folders)
        elif event in ("os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
            self.add(args[0])

    def add(self, path, to=None):
        path = os.path.abspath(os.fsdecode(path))
        if path.startswith(self.folder + os.sep):
            (self.paths if to is None else to).add(os.path.relpath(path, self.folder))


def writing(folder: Path) -> dict:
    """Checkpoints, sample images, TensorBoard, best model: then resumed from the first checkpoint."""
    written = Written(folder / "out")
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "log_images_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "report_to": "tensorboard",
        "learning_rate": 1e-2,
    }
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "out" / "runs")
    trainer = spo_trainer(folder, **settings)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    trainer.accelerator.wait_for_everyone()
    written.active = False
    whole = spo_result(trainer)
    again = spo_trainer(folder, **settings | {"output_dir": str(folder / "again"), "report_to": "none"})
    again.train(resume_from_checkpoint=folder / "out" / "checkpoint-1")
    return {
        "written": written.paths,
        "made": written.folders,
        "whole": whole,
        "resumed": spo_result(again),
        "optimizers": [t.optimizer.state_dict()["state"] for t in (trainer, again)],
        "pools": [t.pair_loader.state_dict() for t in (trainer, again)],
    }


# --- the reward model ------------------------------------------------------------------------------------------------


def preference_pairs(folder: Path, broken=()) -> Dataset:
    """Twelve pairs as a parquet file holds them; those of `broken` have no image that can be decoded."""

    def encoded(color) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), color).save(buffer, format="PNG")
        return buffer.getvalue()

    colors = torch.randint(60, 256, (12, 2), generator=torch.Generator().manual_seed(1)).tolist()
    return Dataset.from_dict(
        {
            "caption": [PROMPTS[i % 6] for i in range(12)],
            "jpg_0": [b"broken" if i in broken else encoded((red, 40, 0)) for i, (red, _) in enumerate(colors)],
            "jpg_1": [encoded((0, 40, blue)) for _, blue in colors],
            "label_0": [1.0, 0.0, 0.5] * 4,
            "label_1": [0.0, 1.0, 0.5] * 4,
            "num_example_per_prompt": [1 + i % 3 for i in range(12)],
        }
    )


class OneProcessOfTwo(StepRewardTrainer):
    """Two micro-batches of one process draw what two processes draw for a micro-batch each."""

    num_ranks = 1

    def _generator(self, *numbers):
        if self.num_ranks > 1 and numbers[0] == 0:  # of a training step: (0, step, micro-batch)
            *rest, micro = numbers
            entropy = [self.args.seed, micro % self.num_ranks, *rest, micro // self.num_ranks]
            seed = np.random.SeedSequence(entropy).generate_state(1, dtype=np.uint64)[0] >> np.uint64(1)
            return torch.Generator().manual_seed(int(seed))
        return super()._generator(*numbers)


def reward_trainer(folder: Path, dataset, num_ranks=1, reward_model=None, **settings) -> StepRewardTrainer:
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": num_ranks,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "max_bad_image_fraction": 1.0,
        "use_cpu": True,
    }
    if reward_model is None:
        torch.manual_seed(0)  # for the timestep embedder, the one part of a fresh model that is random
        # `save_pretrained` is silent on rank 1: made by the test
        reward_model = StepAwareRewardModel.from_clip(folder.parent / "clip")
    output_dir = settings.pop("output_dir", folder / "reward_out")
    trainer = OneProcessOfTwo(
        tiny_step_reward_config(output_dir, **{**defaults, **settings}),
        tiny_sd_pipeline(folder / f"tokenizer_{RANK}"),
        reward_model,
        train_dataset=dataset,
        eval_dataset=preference_pairs(folder),
    )
    trainer.num_ranks = num_ranks
    trainer.kept = Gradients()
    trainer.add_callback(trainer.kept)
    return trainer


def reward_result(trainer) -> dict:
    return {
        "gradients": trainer.kept.gradients,
        "steps": trainer.kept.weights,
        "weights": trained(trainer),
        "logs": logs_of(trainer),
        "bad": trainer.data_collator.num_bad,
    }


def step_reward(folder: Path, num_ranks: int = 1) -> dict:
    trainer = reward_trainer(folder, preference_pairs(folder), num_ranks)
    trainer.train()
    trainer.save_model()
    return {**reward_result(trainer), "evaluation": trainer.evaluate()}


def resumed_reward(folder: Path) -> dict:
    """Three steps, and the last two once more, from a checkpoint."""
    settings = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    uninterrupted = reward_trainer(folder, preference_pairs(folder), **settings)
    uninterrupted.train()
    settings["output_dir"] = str(folder / "again")
    resumed = reward_trainer(folder, preference_pairs(folder), **settings)
    resumed.train(resume_from_checkpoint=folder / "reward_out" / "checkpoint-1")
    return {"uninterrupted": reward_result(uninterrupted), "resumed": reward_result(resumed)}


class InOrder(OneProcessOfTwo):
    """Reads the dataset as it stands, so that a test knows who gets which rows."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def step_reward_broken_images(folder: Path, num_ranks: int = 1) -> dict:
    """Rows 2 and 3, the first batch of rank 1, and rows 8 to 11, the last of both, are broken."""
    dataset = preference_pairs(folder, broken=(2, 3, 8, 9, 10, 11))
    trainer = reward_trainer(folder, dataset, num_ranks, num_checked_rows=0)
    trainer.__class__ = InOrder
    trainer.train()
    return reward_result(trainer)


def caption_loss(folder: Path, num_ranks: int = 1) -> dict:
    """
    The contrastive loss of five pairs, of which rank 0 has two and rank 1 three, one of them without an image. Gradients
    of what the features are made of, averaged over processes as DDP does.
    """
    trainer = reward_trainer(folder, preference_pairs(folder), num_ranks, caption_loss_coef=1.0)
    features = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(3))  # pairs, two images and a text
    weight = torch.eye(6).requires_grad_(True)
    prompts, present = [*PROMPTS[:3], PROMPTS[0], ""], torch.tensor([1, 1, 1, 1, 0])
    own = slice(0, 5) if trainer.args.world_size == 1 else (slice(0, 2), slice(2, 5))[RANK]
    first, second, text = torch.nn.functional.normalize(features[own] @ weight, dim=-1).unbind(1)
    output = StepRewardOutput(None, torch.cat([first, second]), torch.cat([text, text]), torch.tensor(3.0))
    labels = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.5])[own]
    inputs = {"label_0": labels, "label_1": 1 - labels, "prompts": prompts[own]}
    losses = trainer._caption_losses(output, inputs, present[own] > 0)
    (losses * present[own]).sum().backward()
    gradient = trainer.accelerator.reduce(weight.grad, reduction="sum")
    return {"losses": losses.detach(), "gradient": gradient}


def latent_reward(folder: Path, num_ranks: int = 1) -> dict:
    """A latent reward model with the contrastive loss, and a batch of rank 1 without a readable image."""
    torch.manual_seed(0)
    model = LatentRewardModel.from_pipeline(tiny_sd_pipeline(folder / f"tokenizer_of_reward_{RANK}"))
    trainer = reward_trainer(
        folder,
        preference_pairs(folder, broken=(2, 3)),
        num_ranks,
        reward_model=model,
        caption_loss_coef=0.5,
        num_checked_rows=0,
    )
    trainer.__class__ = InOrder
    trainer.train()
    trainer.save_model()
    return {**reward_result(trainer), "evaluation": trainer.evaluate()}


# --- a rank that dies ------------------------------------------------------------------------------------------------


class Misfortune:
    """A reward to which something happens on rank 1, at the second rollout."""

    def __init__(self, what: str):
        self.what, self.called = what, 0

    def __call__(self, images, prompts, timesteps):
        self.called += 1
        if RANK == 1 and self.called > 2:
            if self.what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "exception":
                raise RuntimeError("the reward model of rank 1 fell over")
            time.sleep(3600)
        return redness(images, prompts)


def killed(folder: Path):
    spo_trainer(folder, Misfortune("killed")).train()


def exception(folder: Path):
    spo_trainer(folder, Misfortune("exception")).train()


def hanging(folder: Path):
    spo_trainer(folder, Misfortune("hanging"), ddp_timeout=5).train()


def no_pairs(folder: Path):
    spo_trainer(folder, Constant(), num_train_epochs=1).train()


# --- sharded ---------------------------------------------------------------------------------------------------------


def shard_on_cpu():
    """accelerate reads an FSDP configuration on the CPU, too, and then trains without shards. Here it makes them."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            changes = {"distributed_type": DistributedType.FSDP, "device": torch.device("cpu")}  # not "cpu:0"
            PartialState._shared_state.update(changes)
            self.__dict__.update(changes, fsdp_plugin=fsdp_plugin)

    AcceleratorState.__init__ = init


def fsdp_step_reward(folder: Path) -> dict:
    shard_on_cpu()
    PartialState(cpu=True)  # whoever loads a model now does so as in a sharded run
    loaded = CLIPTextModel.from_pretrained(folder.parent / "text_encoder")
    trainer = reward_trainer(folder, preference_pairs(folder))
    trainer.train()
    units = FullyShardedDataParallel.fsdp_modules(trainer.model_wrapped)
    # Not saved: on the CPU, torch's state dict of shards reads memory that it has given back.
    with FullyShardedDataParallel.summon_full_params(trainer.model_wrapped, writeback=False):
        weights = [p.detach().clone() for p in trainer.model.parameters()]
    refusals = []
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    for build in (spo_trainer, lambda place: reward_trainer(place, preference_pairs(place))):
        try:
            build(folder)
            refusals.append("")
        except ValueError as error:
            refusals.append(str(error))
    return {
        "logs": logs_of(trainer),
        "units": len(units),
        "weights": weights,
        "text_encoder": loaded.state_dict(),
        "refusals": refusals,
    }


def main(folder: Path, scenarios: list[str]):
    for name in scenarios:
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        result = globals()[name](place)
        torch.save(result, folder / f"{name}_{RANK}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
