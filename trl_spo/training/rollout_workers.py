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
Processes that roll out and do not train ([`RolloutWorkers`]), each with a whole denoiser and the reward on a device of its own.
"""

import contextlib
import copy
import io
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch.serialization import safe_globals

from ..pair_selection import PairSelection
from ..pipelines.base import SPOPipeline
from ..pipelines.shards import whole
from ..rewards.base import Reward
from ..spo_config import SPOConfig
from ..step_pairs import BranchRecord, NonFinite, StepPairs
from .compilation import compile_blocks
from .rollouts import RolloutMixin
from .running_means import gather_from_processes


STATE_NAME = "rollout.pt"
# By these a library would take a worker for another process of the training.
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def own_rollout_devices(config: SPOConfig) -> list[str]:
    """
    Those of `config.rollout_devices` that this process rolls out on: processes of one machine share them evenly.

    Raises:
        ValueError: if they cannot be shared, or are none.
    """
    if not config.rollout_devices:
        return []
    for name in config.rollout_devices:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"`rollout_devices` names {name!r}, which is not a device ({error}).") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"`rollout_devices` names {name!r}, and this machine has {torch.cuda.device_count()} devices of that kind."
            )
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if len(config.rollout_devices) % num_processes:
        raise ValueError(
            f"`rollout_devices` has {len(config.rollout_devices)} devices for {num_processes} processes that train on this machine: "
            "equally many are needed for each."
        )
    return config.rollout_devices[config.local_process_index :: num_processes]


class RolloutWorkers:
    """
    One process per device, started by a process that trains, which sends prompts and the weights that it trains, and is sent
    pairs. Everything travels through the pipes of `concurrent.futures`, so all devices are of one machine.

    Args:
        devices (`list[str]`): of this process, one worker each.
        args ([`SPOConfig`]): settings of the run.
        pipeline ([`SPOPipeline`]), reward ([`Reward`]): as they are when training has not begun, the same in all processes.
        compiles (`bool`): whether blocks are compiled.

    Raises:
        ValueError: if the reward or the pipeline cannot be sent to another process.
    """

    def __init__(self, devices: list[str], args: SPOConfig, pipeline: SPOPipeline, reward: Reward, compiles: bool):
        self.devices = devices
        self.first_place = args.process_index * len(devices)  # among all that roll out
        self._pipeline = pipeline
        self._first_of_machine = args.process_index - args.local_process_index
        self._executors: list[ProcessPoolExecutor] = []
        self._version: int | None = None
        self._weights: bytes | None = None  # of that version, until all workers have them
        self._unsent: set[int] = set()
        # Written before training changes anything: what has been prepared for training cannot be sent. A file, once for each
        # machine, as what processes share in memory is limited to a few megabytes in many containers. It is unpickled, as
        # everything is that a process is started with, so nobody else may read or write the folder.
        self._folder = tempfile.TemporaryDirectory(prefix="spo-rollout-")
        if args.local_process_index == 0:
            self._write(args, reward, compiles)

    @property
    def _path(self) -> Path:
        return Path(self._folder.name) / STATE_NAME

    def _write(self, args: SPOConfig, reward: Reward, compiles: bool) -> None:
        own = copy.copy(args)
        own.distributed_state = None
        frozen, self._pipeline._frozen_copy = self._pipeline._frozen_copy, None  # only training compares with it
        try:
            torch.save((own, self._pipeline, reward, compiles), self._path)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"`rollout_devices` sends pipeline and reward to other processes, and one of them cannot be sent ({error}). A "
                "reward must be a class or function of a module that can be imported, no lambda and no function inside another."
            ) from error
        finally:
            self._pipeline._frozen_copy = frozen

    def begin(self) -> None:
        """Start the workers, which load; returns when all are ready. Every process that trains must call it."""
        path = gather_from_processes(self._path)[self._first_of_machine]
        context = multiprocessing.get_context("spawn")
        self._executors = [ProcessPoolExecutor(1, mp_context=context) for _ in self.devices]
        self._version = None
        number_of_threads = torch.get_num_threads()
        ready = [
            executor.submit(_begin, path, device, number_of_threads)
            for executor, device in zip(self._executors, self.devices, strict=True)
        ]
        for device, future in zip(self.devices, ready, strict=True):
            _result_of(future, device)

    def start(self, prompts: list[str], seed: int, version: int) -> Callable[[], tuple[list[StepPairs], float]]:
        """
        Start rollouts of prompts, in shares of nearly the same size, under the weights as they are. With a spread denoiser every process
        that trains must call it.

        Args:
            prompts (`list[str]`): of all workers.
            seed (`int`): number of the rollout.
            version (`int`): number of the weights, by which a worker is not sent them twice.

        Returns:
            `Callable`: waits for the pairs, a [`StepPairs`] of each worker that had prompts, on the CPU, and the seconds that the
            slowest of them took.
        """
        if version != self._version:
            trained = {name: p for name, p in self._pipeline.denoiser.named_parameters() if p.requires_grad}
            weights = {name: whole(p).cpu().contiguous() for name, p in trained.items()}
            self._weights, self._version, self._unsent = save(weights), version, set(range(len(self.devices)))
        futures = []
        for i, executor in enumerate(self._executors):
            share = prompts[i :: len(self.devices)]
            if not share:
                continue
            weights = self._weights if i in self._unsent else None
            self._unsent.discard(i)
            futures.append((self.devices[i], executor.submit(_roll_out, share, seed, self.first_place + i, weights)))
        if not self._unsent:
            self._weights = None

        def wait() -> tuple[list[StepPairs], float]:
            results = [_result_of(future, device) for device, future in futures]
            with safe_globals([StepPairs, BranchRecord, PairSelection, NonFinite]):
                pairs = [
                    torch.load(io.BytesIO(content), map_location="cpu", weights_only=True) for content, _ in results
                ]
            return pairs, max((seconds for _, seconds in results), default=0.0)

        return wait

    def end(self) -> None:
        """End the processes; [`~RolloutWorkers.begin`] starts new ones."""
        for executor in self._executors:
            executor.shutdown(wait=False, cancel_futures=True)
        self._executors = []


def _result_of(future: Future, device: str):
    """
    Raises:
        RuntimeError: if the process of the device has died; an error of its own is raised as it is.
    """
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"The process that rolls out on {device!r} has died without a word. It may have run out of memory: `dmesg` tells, or "
            "its last lines above."
        ) from error


# --- in the process that rolls out -----------------------------------------------------------------------------------


class RolloutWorker(RolloutMixin):
    """What a process has that rolls out and does not train."""

    def __init__(self, args: SPOConfig, pipeline: SPOPipeline, reward: Reward, compiles: bool, device: str):
        self.args = args
        self.pipeline = pipeline
        self.reward = reward
        device = torch.device(device)
        pipeline.to(device)
        reward.prepare(device, None)
        pipeline.denoiser.eval()
        if compiles:
            networks = [*pipeline.running_networks(), reward.module]
            compile_blocks(networks, backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode)
        self._begin_rollouts(device)

    def _autocast(self) -> contextlib.AbstractContextManager:
        """As accelerate has it in the process that trains."""
        if not self.args.bf16 and not self.args.fp16:
            return contextlib.nullcontext()
        return torch.autocast(self._rollout_device.type, torch.bfloat16 if self.args.bf16 else torch.float16)

    def load(self, weights: bytes) -> None:
        with torch.no_grad():
            for name, value in load(weights).items():
                self.pipeline.denoiser.get_parameter(name).copy_(value)


_worker: RolloutWorker | None = None


def _begin(path: Path, device: str, number_of_threads: int) -> None:
    global _worker
    # The process that trains ends this one, or its death does; it asks for the pairs when it is told to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for name in OF_A_RANK:
        os.environ.pop(name, None)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(number_of_threads)  # sums in another order have other last digits
    # On the CPU first: another process may not see the device of the one that trains.
    args, pipeline, reward, compiles = torch.load(path, map_location="cpu", weights_only=False)
    _worker = RolloutWorker(args, pipeline, reward, compiles, device)


def _end_with_parent() -> None:
    """A process that trains and is killed tells nobody."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _roll_out(prompts: list[str], seed: int, place: int, weights: bytes | None) -> tuple[bytes, float]:
    """The pairs of a rollout as `torch.save` writes them, and the seconds it took."""
    start = time.perf_counter()
    if weights is not None:
        _worker.load(weights)
    pairs = replace(_worker._roll_out(prompts, seed, place).to("cpu"), final_latents=None)
    content = io.BytesIO()
    torch.save(pairs, content)
    return content.getvalue(), time.perf_counter() - start
