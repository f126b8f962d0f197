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
The methods of the comparison: SPO, Diffusion-DPO, supervised fine-tuning and DDPO, all from one base pipeline, with one
adapter, one optimizer and one way of counting.

**Counting.** A unit is one sample through the UNet, forward. A backward pass counts as two forward passes. Guidance
counts twice, the reference model counts like the policy. [`Meter`] reads all of it from a forward hook; what it does not
see (VAE, reward model, text encoder) shows in CPU seconds, which are counted beside it. Evaluation is not counted.

**Diffusion-DPO** (https://huggingface.co/papers/2311.12908, eq. 14): with one timestep t and one noise e for both images
of a pair,

    L = -log sigmoid(-beta T w(t) (|e - e_theta(x_t^w)|^2 - |e - e_ref(x_t^w)|^2 - (|e - e_theta(x_t^l)|^2 - |e - e_ref(x_t^l)|^2)))

w is constant, as there, t is uniform over all training timesteps. As in its public code, `beta` here stands for
2 beta T w D, D being the number of latent dimensions, and squares are averaged over them:
`-log sigmoid(-beta / 2 * difference of mean squared errors)`. Pairs without a decision are left out. On a flow-matching model the
errors are those of the velocity, as in Flow-DPO (https://huggingface.co/papers/2501.13918) with a constant weight.

**Supervised fine-tuning**: the denoising loss on the preferred images of the same pairs.

**DDPO** (https://huggingface.co/papers/2305.13301) is TRL's own trainer (TRL 0.23.1), on our pipeline.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.data import DataLoader, RandomSampler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from examples.shapes import world
from examples.shapes.preferences import ANNOTATOR_TEMPERATURE
from examples.shapes.settings import CLIP, REWARD_SETTINGS, SAMPLER, SPO_SETTINGS, lora_config
from trl_spo import (
    SPOConfig,
    SPOStableDiffusionPipeline,
    SPOTrainer,
    StepAwareRewardModel,
    StepRewardConfig,
    StepRewardTrainer,
)
from trl_spo.pipelines.base import SPOPipeline
from trl_spo.pipelines.flow import SPOFlowPipeline
from trl_spo.preference_collator import StepPreferenceCollator


ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}  # `SPOConfig`'s
MAX_GRAD_NORM = 1.0

# What each method runs with without a sweep: what the sweeps of `run.py` chose (for DDPO they chose `samples_per_prompt` 8,
# too).
DEFAULTS = {
    "spo": {**SPO_SETTINGS, "learning_rate": 1e-3, "kl_coef": 1.5},
    "dpo": {"beta": 300.0, "learning_rate": 4e-3, "batch_size": 128},
    "sft": {"learning_rate": 2e-3, "batch_size": 128},
    "ddpo": {"learning_rate": 2e-3, "samples_per_epoch": 64, "updates_per_epoch": 1},
}


class SPOShapesPipeline(SPOStableDiffusionPipeline):
    """TRL's DDPO asks the pipeline for its adapter: give it that of the other methods."""

    def get_trainable_layers(self):
        self.freeze()
        return self.add_lora(lora_config())


# ------------------------------------------------------------------------------------------------------- accounting


class Meter:
    """
    Counts samples through a UNet and the time between its construction and now, pauses left out.

    Attributes:
        forward (`int`): samples that went through, forward.
        backward (`int`): those of them whose output has a graph, which is what is trained on here.
    """

    def __init__(self, unet: torch.nn.Module):
        self.forward = self.backward = 0
        self._paused = False
        self._away = [0.0, 0.0]
        self._start = self._now()
        self._handle = unet.register_forward_hook(self._count)

    @staticmethod
    def _now() -> list[float]:
        return [time.process_time(), time.perf_counter()]

    def _count(self, module, inputs, output):
        if self._paused:
            return
        output = output[0] if isinstance(output, tuple) else output.sample
        self.forward += len(output)
        self.backward += len(output) if output.requires_grad else 0

    @property
    def evaluations(self) -> int:
        """Forward passes, with a backward pass as two."""
        return self.forward + 2 * self.backward

    @property
    def seconds(self) -> tuple[float, float]:
        """CPU and wall seconds."""
        return tuple(now - start - away for now, start, away in zip(self._now(), self._start, self._away, strict=True))

    @contextlib.contextmanager
    def paused(self):
        before = self._now()
        self._paused = True
        try:
            yield
        finally:
            self._paused = False
            self._away = [away + now - b for away, now, b in zip(self._away, self._now(), before, strict=True)]

    def close(self):
        self._handle.remove()


def adapter_state(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights that are trained."""
    return {name: p.detach().clone() for name, p in unet.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore_adapter(unet: torch.nn.Module, state: dict[str, torch.Tensor]):
    parameters = dict(unet.named_parameters())
    for name, value in state.items():
        parameters[name].copy_(value)


class Recorder:
    """
    Evaluates and keeps the adapter whenever the meter passes one of `marks`; methods call it after every update and stop
    when it says so.

    Args:
        unet (`torch.nn.Module`): what is trained.
        marks (`list[int]`): rising numbers of UNet evaluations; the last one ends the run.
        evaluate (`Callable[[], dict]`, *optional*): scores of the current model; not counted.
        meter ([`Meter`], *optional*): what counts; by default a meter of the UNet.

    Attributes:
        points (`list[dict]`): `mark`, `evaluations`, `cpu_seconds`, `wall_seconds`, `updates`, the scores, and what
            the method passed.
        states (`list[dict]`): the adapter at each point.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        marks: list[int],
        evaluate: Callable[[], dict] | None = None,
        meter: Meter | None = None,
    ):
        self.unet, self.marks, self.evaluate = unet, list(marks), evaluate
        self.meter = Meter(unet) if meter is None else meter
        self.points = []
        self.states = []
        self.updates = 0
        self._next = 0

    def __call__(self, **extra) -> bool:
        """Returns whether the budget is spent."""
        self.updates += 1
        spent = self.meter.evaluations
        if self._next < len(self.marks) and spent >= self.marks[self._next]:
            while self._next < len(self.marks) and spent >= self.marks[self._next]:
                self._next += 1
            cpu, wall = self.meter.seconds
            with self.meter.paused():
                training = self.unet.training
                self.unet.eval()
                scores = self.evaluate() if self.evaluate else {}
                self.unet.train(training)
                self.states.append(adapter_state(self.unet))
            point = {"mark": self.marks[self._next - 1], "evaluations": spent, "updates": self.updates}
            self.points.append({**point, "cpu_seconds": cpu, "wall_seconds": wall, **extra, **scores})
            text = "  ".join(f"{k} {v:.4g}" for k, v in self.points[-1].items())
            print(text, flush=True)
        return self._next == len(self.marks)


# ----------------------------------------------------------------------------------------------------------- rewards

REWARDS = {
    "step": {"step_conditioning": True, "timesteps": REWARD_SETTINGS["timesteps"]},
    "plain": {"step_conditioning": False, "timesteps": REWARD_SETTINGS["timesteps"]},
    "clean": {"step_conditioning": False, "timesteps": [0]},
    "all": {"step_conditioning": True, "timesteps": [*REWARD_SETTINGS["timesteps"], 801]},
}
"""Learned rewards: step-aware; the same without step conditioning; of finished images only; for branching at all steps."""


def reward_config(settings: dict, steps: int, seed: int, output_dir: Path) -> StepRewardConfig:
    """A quiet run of `steps` optimizer steps with `settings`, which are fields of [`StepRewardConfig`]."""
    return StepRewardConfig(
        output_dir=str(output_dir),
        **{**settings, "cache_latents": True},
        eval_timesteps=[0],
        max_steps=steps,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )


def train_reward_model(
    kind: str, pipeline, preferences, seed: int, steps: int, output_dir: Path
) -> tuple[StepAwareRewardModel, dict[str, float]]:
    """
    One of `REWARDS` from noisy preferences, starting from the world's CLIP.

    Returns:
        `tuple`: the model, and what its training cost: UNet `evaluations` and `cpu_seconds`.
    """
    recipe = REWARDS[kind]
    config = reward_config({**REWARD_SETTINGS, "timesteps": recipe["timesteps"]}, steps, seed, output_dir)
    torch.manual_seed(seed)  # the embedding of timesteps is random, and every process has a seed of its own
    model = StepAwareRewardModel.from_clip(CLIP, processor=CLIP, step_conditioning=recipe["step_conditioning"])
    meter = Meter(pipeline.unet)
    trainer = StepRewardTrainer(config, pipeline, model, train_dataset=preferences)
    trainer.train()
    meter.close()
    return trainer.model.eval(), {"evaluations": meter.evaluations, "cpu_seconds": meter.seconds[0]}


def exact_reward(images: torch.Tensor, prompts: list[str], timesteps: torch.Tensor) -> torch.Tensor:
    """The annotator's utility in units of his noise: what a perfect reward model would say of an image."""
    return world.utility(images, prompts) / ANNOTATOR_TEMPERATURE


CLIP_WEIGHT = 0.5  # the only value that was tried, on validation captions


def with_clip(reward_model: StepAwareRewardModel, weight: float = CLIP_WEIGHT) -> Callable:
    """A reward that has the score of the CLIP it was trained from mixed back in: that one still reads captions."""
    clip = StepAwareRewardModel.from_clip(CLIP, processor=CLIP).eval().requires_grad_(False)

    def reward(images: torch.Tensor, prompts: list[str], timesteps: torch.Tensor) -> torch.Tensor:
        images = images * 2 - 1
        return reward_model.score(images, prompts, timesteps) + weight * clip.score(images, prompts, timesteps)

    return reward


# -------------------------------------------------------------------------------------------------------------- SPO


class _Budget(TrainerCallback):
    """Ends a run of `transformers.Trainer` when the recorder says so."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder

    def on_step_end(self, args, state, control, **kwargs):
        if self.recorder():
            control.should_training_stop = True


def train_spo(
    pipeline, recorder: Recorder, reward: Any, seed: int, settings: dict, output_dir: Path, split: str = "train"
):
    """SPO with the package's trainer on the captions of a split; `settings` are fields of [`SPOConfig`]."""
    config = SPOConfig(
        output_dir=str(output_dir),
        **{**SAMPLER, **settings},
        max_steps=100_000,  # the budget ends the run
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    trainer = SPOTrainer(
        config, pipeline, reward, train_dataset=list(world.captions(split)), peft_config=lora_config()
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_Budget(recorder))
    trainer.train()

    # Add the logged metrics to each point of the curve: means over the steps since the point before.
    names = {
        "fresh_accuracy": "pairs/fresh_accuracy",
        "valid_fraction": "pairs/valid_fraction",
        "kl": "kl",
        "margin": "rewards/margins",
        "clip_ratio": "clip_ratio",
    }
    for before, point in zip([{"updates": 0}, *recorder.points], recorder.points, strict=False):
        steps = range(before["updates"] + 1, point["updates"] + 1)
        logs = [log for log in trainer.state.log_history if log.get("step") in steps]
        for name, key in names.items():
            values = [log[key] for log in logs if key in log]
            if values:
                point[name] = sum(values) / len(values)
    return trainer.pipeline


# ------------------------------------------------------------------------------------------- offline: DPO and SFT


@torch.no_grad()
def decided_pairs(pipeline: SPOPipeline, preferences, batch_size: int = 64) -> dict[str, Any]:
    """
    The pairs of a dataset of preferences that are no ties, encoded, as [`load_pairs`] describes them.

    Args:
        preferences (`datasets.Dataset`): pairs of `examples.shapes.preferences`.
    """
    collator = StepPreferenceCollator(world.IMAGE_SIZE)
    parts: dict[str, list] = {name: [] for name in ("chosen_mean", "chosen_std", "rejected_mean", "rejected_std")}
    prompts = []
    for start in range(0, len(preferences), batch_size):
        batch = collator([preferences[i] for i in range(start, min(start + batch_size, len(preferences)))])
        decided = (batch["label_0"] != batch["label_1"]).nonzero().flatten()
        first = (batch["label_0"] > batch["label_1"])[decided].view(-1, 1, 1, 1)
        images = [batch[f"images_{i}"][decided] for i in (0, 1)]
        for name, pixels in (("chosen", torch.where(first, *images)), ("rejected", torch.where(first, *images[::-1]))):
            mean, std = pipeline.image_posterior(pixels)
            parts[f"{name}_mean"].append(mean)
            parts[f"{name}_std"].append(std)
        prompts += [batch["prompts"][i] for i in decided.tolist()]
    return {"prompts": prompts, **{name: torch.cat(tensors) for name, tensors in parts.items()}}


def load_pairs(folder: Path) -> dict[str, Any]:
    """
    The decided pairs as `run.py` prepared them.

    Returns:
        `dict`: `prompts` (list of N texts) and the VAE's posteriors `chosen_mean`, `chosen_std`, `rejected_mean`,
        `rejected_std` of shape `(N, 4, 8, 8)`, in the scale of the denoiser.
    """
    pairs = load_file(folder / "pairs.safetensors")
    return {**pairs, "prompts": json.loads((folder / "pairs.json").read_text())}


def batches(count: int, batch_size: int, generator: torch.Generator):
    """Indices of `(batch_size,)`, epoch after epoch in a new order, without end; the rest of an epoch is left out."""
    if batch_size > count:
        raise ValueError(f"A batch of {batch_size} needs as many pairs, and there are {count}.")
    sampler = RandomSampler(range(count), generator=generator)
    loader = DataLoader(range(count), batch_size=batch_size, sampler=sampler, drop_last=True)
    while True:
        yield from loader


class _Offline:
    """What DPO and SFT share: the adapter, the optimizer, cached texts, and an update of summed micro-batches."""

    micro_batch_size = 64

    def __init__(self, pipeline, pairs: dict, seed: int, settings: dict):
        self.pairs = pairs
        self.settings = settings
        self.pipeline = pipeline if isinstance(pipeline, SPOPipeline) else SPOShapesPipeline(pipeline)
        torch.manual_seed(seed)  # the adapter is drawn here
        self.pipeline.prepare_for_training(lora_config())
        unique = sorted(set(pairs["prompts"]))
        self.texts = self.pipeline.encode_prompt(unique)
        self.text_of = torch.tensor([unique.index(prompt) for prompt in pairs["prompts"]])
        self.generator = torch.Generator().manual_seed(seed)
        self.order = batches(len(pairs["prompts"]), settings["batch_size"], self.generator)
        self.parameters = [p for p in self.pipeline.denoiser.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings["learning_rate"], **ADAM)

    def latents(self, which: str, rows: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.pairs[f"{which}_mean"][rows] + self.pairs[f"{which}_std"][rows] * noise

    def draw(self, count: int) -> tuple[torch.Tensor, ...]:
        """Noise of the posterior, noise of the forward process `(count, 4, 8, 8)` and timesteps `(count,)`."""
        shape = (2, count, *self.pairs["chosen_mean"].shape[1:])
        steps = self.pipeline.num_train_timesteps
        first = 1 if self.is_flow else 0  # a flow has no noise at 0, and all of it at the last
        return (
            *torch.randn(shape, generator=self.generator),
            first + torch.randint(steps, (count,), generator=self.generator),
        )

    @property
    def is_flow(self) -> bool:
        """Whether the network predicts velocities, noise less image, instead of noise."""
        return isinstance(self.pipeline, SPOFlowPipeline)

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x_t, and what the network is to predict there."""
        return self.pipeline.add_noise(clean, noise, timesteps), noise - clean if self.is_flow else noise

    def losses(self, rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Losses `(B,)` of some pairs, and per-pair metrics."""
        raise NotImplementedError

    def update(self) -> dict[str, float]:
        rows = next(self.order)
        self.pipeline.denoiser.train()
        self.optimizer.zero_grad()
        totals: dict[str, float] = {}
        for part in rows.split(self.micro_batch_size):
            losses, metrics = self.losses(part)
            (losses.sum() / len(rows)).backward()
            for name, values in {"loss": losses.detach(), **metrics}.items():
                totals[name] = totals.get(name, 0.0) + values.double().sum().item() / len(rows)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        if not math.isfinite(totals["loss"]):
            raise RuntimeError(f"The loss is {totals['loss']}. Lower the learning rate.")
        return {**totals, "grad_norm": norm.item()}

    def train(self, recorder: Recorder):
        while not recorder(**self.update()):
            pass
        return self.pipeline


def diffusion_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta: float) -> torch.Tensor:
    """
    Args:
        chosen, rejected, ref_chosen, ref_rejected (`torch.Tensor` of shape `(B,)`): squared errors of the noise
            prediction, averaged over latent dimensions, of policy and reference.
        beta (`float`): 2 beta T w D of the paper.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    return -F.logsigmoid(-0.5 * beta * ((chosen - rejected) - (ref_chosen - ref_rejected)))


class DiffusionDPO(_Offline):
    """Diffusion-DPO; `settings`: `beta`, `learning_rate`, `batch_size` (pairs)."""

    def losses(self, rows):
        posterior_noise, noise, timesteps = self.draw(len(rows))
        both = torch.cat([self.latents(which, rows, posterior_noise) for which in ("chosen", "rejected")])
        noisy, target = self.noised(both, noise.repeat(2, 1, 1, 1), timesteps.repeat(2))
        embeds = self.texts[self.text_of[rows].repeat(2)]

        def errors(denoiser):
            prediction = self.pipeline.predict(noisy, timesteps.repeat(2), embeds, 1.0, denoiser)
            return (prediction - target).square().mean((1, 2, 3)).chunk(2)

        with torch.no_grad(), self.pipeline.reference() as reference:
            ref_chosen, ref_rejected = errors(reference)
        chosen, rejected = errors(self.pipeline.denoiser)
        losses = diffusion_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, self.settings["beta"])
        margin = (ref_chosen - ref_rejected - chosen + rejected).detach() * 0.5 * self.settings["beta"]
        drift = (chosen - ref_chosen).detach()  # above 0: the preferred images have become less likely, too
        return losses, {"margin": margin, "accuracy": (margin > 0).float(), "chosen_drift": drift}


class SupervisedFineTuning(_Offline):
    """The denoising loss on preferred images; `settings`: `learning_rate`, `batch_size` (images)."""

    def losses(self, rows):
        posterior_noise, noise, timesteps = self.draw(len(rows))
        noisy, target = self.noised(self.latents("chosen", rows, posterior_noise), noise, timesteps)
        prediction = self.pipeline.predict(noisy, timesteps, self.texts[self.text_of[rows]], 1.0)
        return (prediction - target).square().mean((1, 2, 3)), {}


# ------------------------------------------------------------------------------------------------------------- DDPO


def train_ddpo(
    pipeline, recorder: Recorder, reward: Any, seed: int, settings: dict, output_dir: Path, split: str = "train"
):
    """
    TRL's own `DDPOTrainer` with a reward on finished images and the captions of a split.

    Args:
        reward ([`StepAwareRewardModel`]): the clean-image reward.
        settings (`dict`): `learning_rate`, `samples_per_epoch` (trajectories, a multiple of 32), `updates_per_epoch`,
            `samples_per_prompt` (1 unless given; more: each caption so often in a row, and TRL's per-prompt advantages).

    Raises:
        ImportError: if this TRL has no DDPO (the last one that has is 0.23.1).
    """
    from accelerate import PartialState
    from trl import DDPOConfig, DDPOTrainer

    # The settings of DDPO that match those of the other methods.
    PartialState()  # TRL's trainer logs before it has an accelerator, and accelerate refuses that
    samples = settings["samples_per_epoch"]
    updates = settings["updates_per_epoch"]
    repeats = settings.get("samples_per_prompt", 1)
    config = DDPOConfig(
        num_epochs=1,
        seed=seed,
        sample_num_steps=SAMPLER["num_inference_steps"],
        sample_eta=1.0,
        sample_guidance_scale=SAMPLER["guidance_scale"],
        sample_batch_size=32,
        sample_num_batches_per_epoch=samples // 32,
        train_batch_size=32,
        train_gradient_accumulation_steps=samples // 32 // updates,
        train_learning_rate=settings["learning_rate"],
        train_adam_beta1=ADAM["betas"][0],
        train_adam_beta2=ADAM["betas"][1],
        train_adam_epsilon=ADAM["eps"],
        train_adam_weight_decay=ADAM["weight_decay"],
        train_max_grad_norm=MAX_GRAD_NORM,
        train_clip_range=settings.get("clip_range", 1e-4),
        train_cfg=False,
        per_prompt_stat_tracking=repeats > 1,
        per_prompt_stat_tracking_buffer_size=4 * repeats,
        per_prompt_stat_tracking_min_count=repeats,
        mixed_precision="no",
        save_freq=10**9,
        project_kwargs={"project_dir": str(output_dir / "ddpo")},
    )

    # DDPO draws prompts and asks for rewards through functions.
    prompts = world.captions(split)
    chooser = torch.Generator().manual_seed(seed)
    seen = []
    waiting = []

    def prompt_function():
        if not waiting:
            waiting.extend([prompts[int(torch.randint(len(prompts), (), generator=chooser))]] * repeats)
        return waiting.pop(), {}

    def reward_function(images, texts, metadata):
        rewards = reward.score(images.float() * 2 - 1, list(texts), torch.zeros(len(images), dtype=torch.long))
        seen.append(rewards.mean().item())
        return rewards, {}

    # Train until the budget is spent.
    wrapped = SPOShapesPipeline(pipeline)
    with recorder.meter.paused():
        trainer = DDPOTrainer(config, reward_function, prompt_function, wrapped)
    epoch = step = 0
    while True:  # what `DDPOTrainer.train` does, with a budget instead of a number of epochs
        step = trainer.step(epoch, step)
        epoch += 1
        if recorder(train_reward=sum(seen[-samples // 32 :]) / (samples // 32)):
            return wrapped


# -------------------------------------------------------------------------------------------------------- all of it


def train(method: str, pipeline, recorder: Recorder, seed: int, settings: dict, reward, pairs, output_dir: Path):
    """
    Trains until the recorder's budget is spent.

    Args:
        method (`str`): `"spo"`, `"dpo"`, `"sft"` or `"ddpo"`.
        pipeline (`StableDiffusionPipeline`): the base model; its UNet gets an adapter.
        recorder ([`Recorder`]): of that UNet.
        seed (`int`): of adapter, order and noise.
        settings (`dict`): of the method, all of them; see `DEFAULTS`.
        reward: for `"spo"` and `"ddpo"`.
        pairs (`dict`): of [`load_pairs`], for `"dpo"` and `"sft"`.
        output_dir (`Path`): for what the trainers write.

    Returns:
        [`SPOStableDiffusionPipeline`]: the pipeline with its trained adapter.
    """
    if method == "spo":
        return train_spo(pipeline, recorder, reward, seed, settings, output_dir)
    if method == "ddpo":
        return train_ddpo(pipeline, recorder, reward, seed, settings, output_dir)
    return {"dpo": DiffusionDPO, "sft": SupervisedFineTuning}[method](pipeline, pairs, seed, settings).train(recorder)
