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
Rivals of today that train on the model's own samples with a reward of finished images: Flow-GRPO and DiffusionNFT. Both run on
every family of the package, count what the other methods of the comparison count, and stop when the recorder says so.

**Flow-GRPO** (https://huggingface.co/papers/2505.05470). Groups of G samples of one prompt are drawn with stochastic steps. The
advantage of a sample is its reward less the mean of its group, divided by a standard deviation. With the ratio
r = p_theta(x_{t-1} | x_t) / p_old(x_{t-1} | x_t) of a step, log-probabilities averaged over dimensions,

    L = -min(r A, clip(r, 1 - epsilon, 1 + epsilon) A) + beta |mu_theta - mu_ref|^2 / (2 sigma^2),

averaged over samples and over the steps that are trained. With a `window`, as in the variant "Fast" of the public code, only
some steps in a row, at a random place in the first half, are stochastic and trained; all samples of a group then share their
first latent.

**DiffusionNFT** (https://huggingface.co/papers/2509.16117). Samples are drawn without noise by an old policy. Each is noised
again to a random timestep of the schedule, and with r in [0, 1], how good it is within its group,

    L = r |x_0 - ((1 - beta) x_old + beta x_theta)|^2 / w_+ + (1 - r) |x_0 - ((1 + beta) x_old - beta x_theta)|^2 / w_-,

divided by beta, where x_theta and x_old are predictions of the clean latents and w is the mean absolute error of the term it
divides, as in the public code (NVlabs/DiffusionNFT). r = 1/2 + clip(A, -c, c) / (2 c), c = 5. After every update the old policy
moves to the new one: theta_old = eta_i theta_old + (1 - eta_i) theta, eta_i = min(0.001 i, 0.5) with update number i.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.compare.methods import ADAM, MAX_GRAD_NORM, Recorder, adapter_state, restore_adapter
from examples.shapes import world
from examples.shapes.settings import SAMPLER, lora_config
from trl_spo.pipelines.base import SPOPipeline
from trl_spo.pipelines.conditioning import PromptEmbeds
from trl_spo.sampling import score_images, stochastic_steps
from trl_spo.step_distribution import gaussian_kl, gaussian_log_prob


ONLINE_DEFAULTS = {
    "grpo": {
        "learning_rate": 2e-3,
        "groups": 8,
        "group_size": 8,
        "window": None,  # stochastic steps of a trajectory; `None`: all
        "sampler": "flow_sde",
        "eta": 0.7,
        "epsilon": 1e-4,
        "beta": 0.0,
    },
    "nft": {
        "learning_rate": 2e-3,
        "groups": 8,
        "group_size": 8,
        "timesteps_per_image": 4,
        "beta": 1.0,
        "advantage_clip": 5.0,
    },
}


class Samples(NamedTuple):
    """
    Finished samples of some prompts and how good they are.

    Attributes:
        latents (`torch.Tensor` of shape `(N, C, h, w)`): x_0.
        advantages (`torch.Tensor` of shape `(N,)`): rewards less the mean of their group, in standard deviations.
        embeds ([`PromptEmbeds`]): N rows.
        steps (`list`): of stochastic trajectories, `(timestep, x_t, x_{t-1}, log-probabilities (N,))` of each trained step.
        mean_reward (`float`): over all of them.
    """

    latents: torch.Tensor
    advantages: torch.Tensor
    embeds: PromptEmbeds
    steps: list
    mean_reward: float


def group_advantages(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """
    Rewards less the mean of their group, divided by the standard deviation of these differences over all groups, which is
    the `global_std` of the public code.

    Args:
        rewards (`torch.Tensor` of shape `(num_groups * group_size,)`): group after group.
    """
    deviations = rewards.view(-1, group_size) - rewards.view(-1, group_size).mean(1, keepdim=True)
    return (deviations / (deviations.square().mean().sqrt() + 1e-4)).flatten()


class _Online:
    """What both share: adapter, optimizer, prompts in random order, rewards, and an update of summed micro-batches."""

    micro_batch_size = 64

    def __init__(self, pipeline: SPOPipeline, reward: Any, seed: int, settings: dict, split: str = "train"):
        self.pipeline = pipeline
        self.reward = reward
        self.settings = settings
        torch.manual_seed(seed)  # the adapter is drawn here
        pipeline.prepare_for_training(lora_config())
        self.generator = torch.Generator().manual_seed(seed)
        self.random = random.Random(seed)
        self.prompts = list(world.captions(split))
        self.texts = pipeline.encode_prompt(self.prompts)
        self.parameters = [p for p in pipeline.denoiser.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings["learning_rate"], **ADAM)

    @contextlib.contextmanager
    def sampler(self, name: str) -> Iterator[list[int]]:
        """The timesteps of a schedule with this kind of steps; others find the pipeline as it was."""
        with stochastic_steps(self.pipeline, name):
            yield self.pipeline.set_timesteps(SAMPLER["num_inference_steps"], self.pipeline.latent_shape())

    def draw_prompts(self) -> torch.Tensor:
        """Rows of `self.prompts`, each `group_size` times in a row."""
        rows = self.random.sample(range(len(self.prompts)), self.settings["groups"])
        return torch.tensor(rows).repeat_interleave(self.settings["group_size"])

    def rewards(self, latents: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        images = (self.pipeline.decode_latents(latents) / 2 + 0.5).clamp(0, 1)
        prompts = [self.prompts[row] for row in rows.tolist()]
        return score_images(images, prompts, self.reward, batch_size=128, pipeline=self.pipeline)

    def optimize(self, losses_of: Callable[[torch.Tensor], torch.Tensor], count: int) -> float:
        """One step on the mean of `count` losses, which `losses_of(rows)` gives for some of the rows."""
        self.optimizer.zero_grad()
        total = 0.0
        for rows in torch.arange(count).split(self.micro_batch_size):
            losses = losses_of(rows)
            (losses.sum() / count).backward()
            total += losses.detach().double().sum().item() / count
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        return total

    def update(self) -> dict[str, float]:
        """Samples, scores, and takes one optimizer step; returns what is worth a look."""
        raise NotImplementedError

    def train(self, recorder: Recorder) -> SPOPipeline:
        while not recorder(**self.update()):
            pass
        return self.pipeline


class FlowGRPO(_Online):
    """Flow-GRPO; `settings` are those of `ONLINE_DEFAULTS["grpo"]`."""

    def update(self):
        with self.sampler(self.settings["sampler"]) as timesteps:
            self.pipeline.denoiser.eval()
            samples = self.collect(timesteps)
            loss = self.optimize(lambda rows: self.losses(samples, rows), len(samples.latents))
        return {"loss": loss, "train_reward": samples.mean_reward}

    def trained_steps(self, timesteps: list[int]) -> list[int]:
        """Numbers of the steps that are stochastic in this update."""
        stochastic = [i for i in range(len(timesteps)) if self.pipeline.step_is_stochastic(i, self.settings["eta"])]
        window = self.settings["window"]
        if window is None:
            return stochastic
        start = self.random.randrange(max(1, len(timesteps) // 2 - window + 1))
        return stochastic[start : start + window]

    @torch.no_grad()
    def collect(self, timesteps: list[int]) -> Samples:
        rows = self.draw_prompts()
        embeds = self.texts[rows]
        trained = self.trained_steps(timesteps)
        latents = self.pipeline.prepare_latents(len(rows), self.generator)
        if self.settings["window"] is not None:  # candidates of one latent
            latents = latents[:: self.settings["group_size"]].repeat_interleave(self.settings["group_size"], 0)
        steps = []
        for i, timestep in enumerate(timesteps):
            output = self.pipeline.predict(latents, timestep, embeds, SAMPLER["guidance_scale"])
            eta = self.settings["eta"] if i in trained else 0.0
            mean, std, _ = self.pipeline.step_distribution(output, timestep, latents, eta)
            following = mean
            if i in trained:
                following = mean + std * torch.randn(mean.shape, generator=self.generator)
                steps.append((timestep, latents, following, gaussian_log_prob(following, mean, std)))
            latents = following
        rewards = self.rewards(latents, rows)
        advantages = group_advantages(rewards, self.settings["group_size"]).clamp(-5, 5)
        return Samples(latents, advantages, embeds, steps, rewards.mean().item())

    def losses(self, samples: Samples, rows: torch.Tensor) -> torch.Tensor:
        """`(B,)`: the clipped objective of the rows, mean over the trained steps."""
        epsilon = self.settings["epsilon"]
        embeds = samples.embeds[rows]
        advantages = samples.advantages[rows]
        total = torch.zeros(len(rows))
        for timestep, latents, following, old_log_prob in samples.steps:
            output = self.pipeline.predict(latents[rows], timestep, embeds, SAMPLER["guidance_scale"])
            mean, std, _ = self.pipeline.step_distribution(output, timestep, latents[rows], self.settings["eta"])
            ratio = (gaussian_log_prob(following[rows], mean, std) - old_log_prob[rows]).exp()
            clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
            total = total - torch.minimum(ratio * advantages, clipped * advantages)
            if self.settings["beta"] > 0:
                reference = self.reference_mean(latents[rows], timestep, embeds)
                total = total + self.settings["beta"] * gaussian_kl(mean, reference, std)
        return total / len(samples.steps)

    @torch.no_grad()
    def reference_mean(self, latents: torch.Tensor, timestep: int, embeds: PromptEmbeds) -> torch.Tensor:
        with self.pipeline.reference() as reference:
            output = self.pipeline.predict(latents, timestep, embeds, SAMPLER["guidance_scale"], reference)
        return self.pipeline.step_distribution(output, timestep, latents, self.settings["eta"])[0]


class DiffusionNFT(_Online):
    """DiffusionNFT; `settings` are those of `ONLINE_DEFAULTS["nft"]`."""

    def __init__(self, pipeline: SPOPipeline, reward: Any, seed: int, settings: dict, split: str = "train"):
        super().__init__(pipeline, reward, seed, settings, split)
        self.old = adapter_state(pipeline.denoiser)
        self.updates = 0

    def update(self):
        with self.sampler("ddim") as timesteps:
            self.pipeline.denoiser.eval()
            with self.old_policy():
                samples = self.collect(timesteps)
                targets = self.old_predictions(samples, timesteps)
            loss = self.optimize(lambda rows: self.losses(samples, targets, rows), len(targets[0]))
        self.updates += 1
        self.move_old_policy()
        return {"loss": loss, "train_reward": samples.mean_reward}

    @contextlib.contextmanager
    def old_policy(self) -> Iterator[None]:
        """The old policy's adapter in the network."""
        denoiser = self.pipeline.denoiser
        current = adapter_state(denoiser)
        restore_adapter(denoiser, self.old)
        try:
            yield
        finally:
            restore_adapter(denoiser, current)

    @torch.no_grad()
    def collect(self, timesteps: list[int]) -> Samples:
        rows = self.draw_prompts()
        embeds = self.texts[rows]
        latents = self.pipeline.prepare_latents(len(rows), self.generator)
        for timestep in timesteps:
            output = self.pipeline.predict(latents, timestep, embeds, SAMPLER["guidance_scale"])
            latents, _, _ = self.pipeline.step_distribution(output, timestep, latents, 0.0)
        rewards = self.rewards(latents, rows)
        advantages = group_advantages(rewards, self.settings["group_size"])
        return Samples(latents, advantages, embeds, [], rewards.mean().item())

    @torch.no_grad()
    def old_predictions(self, samples: Samples, timesteps: list[int]) -> tuple[torch.Tensor, ...]:
        """For every image `timesteps_per_image` times: its row, a timestep, x_t and the old policy's x_0 there."""
        rows = torch.arange(len(samples.latents)).repeat_interleave(self.settings["timesteps_per_image"])
        steps = torch.tensor(timesteps)[torch.randint(len(timesteps), (len(rows),), generator=self.generator)]
        noise = torch.randn((len(rows), *samples.latents.shape[1:]), generator=self.generator)
        noisy = self.pipeline.add_noise(samples.latents[rows], noise, steps)
        parts = torch.arange(len(rows)).split(128)
        old = torch.cat([self.original(noisy[part], steps[part], samples.embeds[rows[part]]) for part in parts])
        return rows, steps, noisy, old

    def original(self, noisy: torch.Tensor, steps: torch.Tensor, embeds: PromptEmbeds) -> torch.Tensor:
        """Predicted x_0, with gradients."""
        output = self.pipeline.predict(noisy, steps, embeds, SAMPLER["guidance_scale"])
        return self.pipeline.step_rule.predict_original_sample(output, steps, noisy)

    def losses(self, samples: Samples, targets: tuple[torch.Tensor, ...], part: torch.Tensor) -> torch.Tensor:
        """`(B,)`: the loss of noised images."""
        rows, steps, noisy, old = (values[part] for values in targets)
        clip = self.settings["advantage_clip"]
        good = 0.5 + samples.advantages[rows].clamp(-clip, clip) / (2 * clip)
        current = self.original(noisy, steps, samples.embeds[rows])
        return clip * nft_loss(samples.latents[rows], current, old, good, self.settings["beta"])

    def move_old_policy(self) -> None:
        decay = min(0.001 * self.updates, 0.5)
        current = adapter_state(self.pipeline.denoiser)
        self.old = {name: decay * value + (1 - decay) * current[name] for name, value in self.old.items()}


def nft_loss(clean, current, old, good, beta: float) -> torch.Tensor:
    """
    Args:
        clean, current, old (`torch.Tensor` of shape `(B, C, h, w)`): x_0, and what the policy and the old policy predict.
        good (`torch.Tensor` of shape `(B,)`): in [0, 1].
        beta (`float`): how far the two implicit policies are from the old one.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    positive = weighted_error((1 - beta) * old + beta * current, clean)
    negative = weighted_error((1 + beta) * old - beta * current, clean)
    return (good * positive + (1 - good) * negative) / beta


def weighted_error(predicted: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Mean squared errors `(B,)`, each divided by its own mean absolute error, which is a constant."""
    difference = predicted - clean
    weight = difference.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return difference.square().flatten(1).mean(1) / weight


ONLINE = {"grpo": FlowGRPO, "nft": DiffusionNFT}
