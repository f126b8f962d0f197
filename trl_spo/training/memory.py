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
Estimate the peak memory of a torch function without running it, and find the chunk sizes that fit a budget.

The function runs on fake tensors (`torch._subclasses.FakeTensorMode`): they have shapes, dtypes, devices and autograd
history, but no memory and no arithmetic. A dispatch mode sees every operator below autograd, adds the bytes of each
storage that an operator creates and subtracts them when the storage dies. Views and in-place operators share a storage
that is already known, so they add nothing; tensors that autograd saves stay alive by themselves.

What it cannot see is memory that a kernel takes inside itself (workspaces of convolutions, copies into a blocked
layout) and what an allocator loses to rounding and fragments. Leave some of the device's memory out of the budget.
"""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils import logging
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..pipelines.base import SPOPipeline
from ..pipelines.conditioning import PromptEmbeds
from ..pipelines.denoiser import layerwise_casting
from ..rewards.base import Reward, wrap_reward


logger = logging.get_logger(__name__)

GIB = 2**30
FALLBACK_CHUNK = 8  # maximum number of samples per call of a model that cannot be estimated
USED_SHARE = 0.8  # of free memory; the rest is for workspaces and fragments
# Pixels of latents per denoiser call and of images per decoder call that keep a device busy. A CPU is fastest when what it
# works on stays in its caches; a GPU gets 64 latents and 32 images of Stable Diffusion 1.5, and gains nothing from more.
BUSY_PIXELS = {"cpu": (2**15, 2**16), "gpu": (2**18, 2**23)}
_DEVICE = torch.ops.prim.device.default
_ITEM = torch.ops.aten._local_scalar_dense.default
# Fake tensors have no values. Assume that checks such as `bool(x.isfinite().all())` pass.
ASSUMED_RESULTS = {
    torch.ops.aten.all.default: True,
    torch.ops.aten.all.dim: True,
    torch.ops.aten.any.default: False,
    torch.ops.aten.any.dim: False,
}


class _PeakMemory(TorchDispatchMode):
    """
    Keeps the sum of the bytes of living storages, and its maximum. Works on top of a `FakeTensorMode`, which has to be
    entered first; real tensors are replaced by fake ones before an operator sees them.
    """

    def __init__(self, fake_mode: FakeTensorMode):
        super().__init__()
        self.fake_mode = fake_mode
        self.current = self.peak = 0
        self._living: dict[int, weakref.ref] = {}  # id of a storage -> a reference that tells when it dies
        self._real: dict[int, torch.Tensor] = {}  # tensors that were there before, such as parameters
        self._fakes: dict[int, FakeTensor] = {}  # and their stand-ins

    def external(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake stand-in of a tensor that was there before; it costs nothing."""
        if isinstance(tensor, FakeTensor):
            self._know(tensor, nbytes=0)
            return tensor
        fake = self._fakes.get(id(tensor))
        if fake is None:
            fake = self.fake_mode.from_tensor(tensor, static_shapes=True)
            self._know(fake, nbytes=0)
            self._real[id(tensor)] = tensor
            self._fakes[id(tensor)] = fake
        return fake

    def _know(self, tensor: torch.Tensor, nbytes: int | None = None):
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._living:
            return
        nbytes = storage.nbytes() if nbytes is None else nbytes

        def forget(_):
            self._living.pop(key, None)
            self.current -= nbytes

        self._living[key] = weakref.ref(storage, forget)
        self.current += nbytes
        self.peak = max(self.peak, self.current)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Answer questions about a tensor here: they create nothing.
        if func is _DEVICE:  # half of all calls
            return args[0].fake_device
        if func is _ITEM and hasattr(args[0], "_spo_assumed_result"):
            return args[0]._spo_assumed_result
        # Everything else runs in the fake mode, which is below this one, and what it creates is counted.
        args = [self._stand_in(value) for value in args]
        kwargs = {name: self._stand_in(value) for name, value in kwargs.items()} if kwargs else {}
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            self._know(result)
            if func in ASSUMED_RESULTS:
                result._spo_assumed_result = ASSUMED_RESULTS[func]
        elif isinstance(result, (tuple, list)):
            for value in result:
                if isinstance(value, torch.Tensor):
                    self._know(value)
        return result

    def _stand_in(self, value):
        """Real tensors, also in lists, become fake ones; anything else stays."""
        if isinstance(value, torch.Tensor):
            # A fake tensor that no operator made in here is a parameter of a model that was built with fake tensors.
            known = isinstance(value, FakeTensor) and id(value.untyped_storage()) in self._living
            return value if known else self.external(value)
        if isinstance(value, (list, tuple)):
            return [self._stand_in(item) for item in value]
        return value

    @contextlib.contextmanager
    def watch(self):
        """Everything inside runs on fake tensors and is counted; nothing fake stays behind."""
        torch.clear_autocast_cache()  # casts of real parameters would hide those that the function makes
        try:
            with self.fake_mode, self:
                yield self
        finally:
            torch.clear_autocast_cache()
            for tensor in self._real.values():
                if tensor.is_leaf and isinstance(tensor.grad, FakeTensor):
                    tensor.grad = None
            self._real.clear()
            self._fakes.clear()


def without_values(fake_mode: FakeTensorMode) -> contextlib.AbstractContextManager:
    """
    A context in which torch operators run on shapes alone: parameters and other tensors from outside are replaced, and
    checks of the form `bool(x.all())` pass, as [`peak_activation_bytes`] has it.

    Args:
        fake_mode (`FakeTensorMode`): the mode of parameters that are fake already.
    """
    return _PeakMemory(fake_mode).watch()


def peak_activation_bytes(function: Callable, *args, fake_mode: FakeTensorMode | None = None) -> int:
    r"""
    Peak bytes of the living tensors that `function(*args)` creates, predicted without running it: no arithmetic is done
    and no memory is taken, on any device.

    Counted are outputs, intermediate results, what autograd saves for a backward pass inside `function`, casts of
    autocast, and gradients. Not counted are tensors that exist before: `args`, parameters, gradients already there.
    Parameters, gradients and random generators keep their values. The context (autocast, `no_grad`) is that of the
    caller.

    A Python decision on values cannot be followed. Checks of the form `bool(x.all())` and `bool(x.any())` are taken to
    be True and False, as they are in code that raises an error otherwise.

    Args:
        function (`Callable`): anything made of torch operators; it may use modules with real parameters.
        args: its arguments; tensors in them, also nested in lists and dictionaries, may be real or fake.
        fake_mode (`FakeTensorMode`, *optional*): the mode a model was built under, if its parameters are fake and
            `args` do not tell.

    Returns:
        `int`: bytes.

    Raises:
        RuntimeError: from torch, where `function` needs values (its `DataDependentOutputException`), or an operator has
            no shape function.
    """
    fake_mode = fake_mode or detect_fake_mode(args) or FakeTensorMode(allow_non_fake_inputs=True)
    memory = _PeakMemory(fake_mode)
    with memory.watch():
        args = tree_map_only(torch.Tensor, memory.external, args)
        result = function(*args)
        del result
    return memory.peak


def module_bytes(*modules: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers of modules, shared ones once."""
    storages = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def samples_within(bytes_of_batch: Callable[[int], int], budget_bytes: float, largest: int) -> int:
    r"""
    The largest batch size whose memory fits a budget.

    Peak memory is a maximum of affine functions of the batch size n (each moment has a fixed part and a part per sample),
    so it is convex: it lies below the chord from 1 to `largest`, and above the ray from the origin through `largest`. The
    two bounds bracket the answer. Where they agree, two evaluations are enough (one, if the largest batch fits);
    otherwise the answer is searched between them.

    Args:
        bytes_of_batch (`Callable[[int], int]`): peak bytes of a batch of n samples.
        budget_bytes (`float`): what may be used.
        largest (`int`): upper end of the answer, at least 1.

    Returns:
        `int`: in `[1, largest]`. It is 1 if not even one sample fits: less than one sample cannot be run.
    """
    if largest < 1:
        raise ValueError(f"`largest` must be at least 1, got {largest}.")
    most = bytes_of_batch(largest)
    if most <= budget_bytes or largest == 1:
        return largest
    one = bytes_of_batch(1)
    if one >= budget_bytes:
        return 1
    from_origin = budget_bytes * largest / most
    from_one = 1 + (budget_bytes - one) * (largest - 1) / (most - one)
    low, high = sorted(max(1, min(int(estimate), largest - 1)) for estimate in (from_origin, from_one))
    # Usually `low`, which fits, is the answer. The upper end is tried first, since memory is nearly a line.
    middle = high
    while low < high:
        if bytes_of_batch(middle) <= budget_bytes:
            low = middle
        else:
            high = middle - 1
        middle = (low + high + 1) // 2
    return low


def busy_chunk_sizes(device_type: str, latent_pixels: int, image_pixels: float) -> tuple[int, int]:
    """
    Samples per denoiser call and per decoder call that keep a device busy, whatever memory it has.

    Args:
        device_type (`str`): such as `"cpu"` or `"cuda"`.
        latent_pixels (`int`): of one latent.
        image_pixels (`float`): of one image that is decoded for scoring.
    """
    denoiser, decoder = BUSY_PIXELS["cpu" if device_type == "cpu" else "gpu"]
    return max(1, denoiser // latent_pixels), max(1, int(decoder // image_pixels))


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated on a CUDA device, the cache of PyTorch included; `None` for other devices."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def rollout_budget_gib(free: int, model: torch.nn.Module) -> float:
    """
    GiB that activations of the first rollout may take: a share of what is free, less the gradients and moments that the
    first optimizer step will add.

    Args:
        free (`int`): bytes, from `free_bytes`.
        model (`torch.nn.Module`): what is trained.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    coming = 3 * sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return USED_SHARE * max(free - coming, 0) / GIB


def power_of_two_below(size: int) -> int:
    """
    The largest power of two that is not above `size`. Sizes from free memory are rounded to it, so that a little more or
    less memory does not change how a run rounds.
    """
    return 1 << (size.bit_length() - 1)


def _fake_mode_of(*modules) -> FakeTensorMode:
    networks = [getattr(module, "module", module) if isinstance(module, Reward) else module for module in modules]
    parameters = [next(module.parameters(), None) for module in networks if isinstance(module, torch.nn.Module)]
    fakes = [parameter.fake_mode for parameter in parameters if isinstance(parameter, FakeTensor)]
    return fakes[0] if fakes else FakeTensorMode(allow_non_fake_inputs=True)


def _check_weights_stay(*networks: torch.nn.Module | None) -> None:
    """
    Raises:
        RuntimeError: for a network whose layers cast their weights when they are called: on tensors without values that would
            leave them broken.
    """
    if any(network is not None and layerwise_casting(network) for network in networks):
        raise RuntimeError("its layers cast their weights when they are called, `enable_layerwise_casting`")


def denoiser_bytes(
    pipeline: SPOPipeline,
    embeds: PromptEmbeds,
    latent_shape: tuple[int, ...],
    guidance_scale: float,
    num_samples: int,
    device: torch.device | None = None,
    fake_mode: FakeTensorMode | None = None,
) -> int:
    """Peak activation bytes of one `pipeline.predict` in a rollout. Arguments as in [`rollout_chunk_sizes`]."""
    _check_weights_stay(pipeline.denoiser)
    device = pipeline.device if device is None else device
    fake_mode = fake_mode or _fake_mode_of(pipeline.denoiser)
    with fake_mode:
        latents = torch.empty(num_samples, *latent_shape, dtype=pipeline.latent_dtype, device=device)
        rows = embeds[:1].to(device).repeat(num_samples)

    @torch.no_grad()
    def predict(latents):
        return pipeline.predict(latents, 0, rows, guidance_scale)

    return peak_activation_bytes(predict, latents, fake_mode=fake_mode)


def scoring_bytes(
    pipeline: SPOPipeline,
    reward_model: Reward | Any,
    latent_shape: tuple[int, ...],
    num_samples: int,
    device: torch.device | None = None,
    fake_mode: FakeTensorMode | None = None,
    image_size: int | None = None,
) -> int:
    """
    Peak activation bytes of decoding and scoring `num_samples` x_0 predictions. Arguments as in
    [`rollout_chunk_sizes`]; `reward_model` may be `None` for the decoder alone.
    """
    # Decide what runs: the decoder, if images are judged, and the reward, if it works on tensors without values.
    device = pipeline.device if device is None else device
    reward = None if reward_model is None else wrap_reward(reward_model)
    judges_images = reward is None or reward.sees == "images"
    traced = reward is not None and reward.can_be_traced
    _check_weights_stay(*pipeline.running_networks()[1:], reward.module if traced else None)
    fake_mode = fake_mode or _fake_mode_of(*pipeline.frozen_modules().values(), reward and reward.module)

    # Every sample gets the features of one prompt: encoding prompts is not what takes memory.
    if traced:
        with _PeakMemory(fake_mode).watch(), torch.no_grad():
            text = reward.encode_prompts([""])[torch.zeros(num_samples, dtype=torch.long, device=device)]
    with fake_mode:
        latents = torch.empty(num_samples, *latent_shape, dtype=torch.float32, device=device)

    # This is what a rollout runs on a chunk of candidates.
    @torch.no_grad()
    def score(latents):
        samples = pipeline.decode_for_scoring(latents, image_size) if judges_images else latents
        if traced:
            timesteps = torch.full((num_samples,), 0, dtype=torch.long, device=device)
            return reward.score(samples, text, timesteps)
        return (samples / 2 + 0.5).clamp(0, 1) if judges_images else samples

    return peak_activation_bytes(score, latents, fake_mode=fake_mode)


def rollout_chunk_sizes(
    pipeline: SPOPipeline,
    reward_model: Reward | Any,
    embeds: PromptEmbeds,
    latent_shape: tuple[int, ...],
    guidance_scale: float,
    budget_gib: float,
    largest: int,
    device: torch.device | str | None = None,
    image_size: int | None = None,
) -> tuple[int, int]:
    r"""
    How many samples one denoiser call and one decode-and-score call of a rollout can take. Nothing is run; a model of
    the size of Stable Diffusion 1.5 takes about a second of one CPU core. Call it under the autocast of the rollout.

    Args:
        pipeline ([`SPOPipeline`]): with its adapter, if it has one.
        reward_model: everything that [`wrap_reward`] takes. The memory of a function is not known, so the decoder alone
            counts; a function that scores latents gets `largest`.
        embeds ([`PromptEmbeds`]): from `pipeline.encode_prompt`; only the shape of one row matters.
        latent_shape (`tuple[int, ...]`): of one latent, from `pipeline.latent_shape(height, width)`.
        guidance_scale (`float`): above 1 the denoiser sees every latent twice.
        budget_gib (`float`): GiB that the activations of one call may take: what is left of the device beside all
            weights, gradients and optimizer states, less a reserve for workspaces and fragments.
        largest (`int`): upper end of both answers, such as prompts times candidates.
        device (`torch.device` or `str`, *optional*): where the rollout runs; by default where the pipeline is.
        image_size (`int`, *optional*): of the images that are decoded for scoring (`scoring_image_size`).

    Returns:
        `tuple[int, int]`: samples per denoiser call (`rollout_micro_batch_size`) and per decode-and-score call
        (`vae_decode_batch_size`), each in `[1, largest]`. Where a model cannot be estimated, because it decides on
        values or uses operators without shape functions, a warning is logged and the answer is at most 8.
    """
    if not budget_gib > 0:
        raise ValueError(f"`budget_gib` must be above 0, got {budget_gib}. Weights alone may fill the device.")
    device = pipeline.device if device is None else torch.device(device)
    # One mode for all calls: it remembers the stand-ins of parameters and what it knows of operators.
    fake_mode = _fake_mode_of(pipeline.denoiser, *pipeline.frozen_modules().values(), reward_model)
    phases = {
        "denoiser": lambda n: denoiser_bytes(
            pipeline, embeds, latent_shape, guidance_scale, n, device=device, fake_mode=fake_mode
        ),
        "decoder and reward": lambda n: scoring_bytes(
            pipeline, reward_model, latent_shape, n, device=device, fake_mode=fake_mode, image_size=image_size
        ),
    }

    # Search both sizes. A model that cannot be estimated gets a small one.
    sizes = []
    for name, bytes_of_batch in phases.items():
        try:
            sizes.append(samples_within(bytes_of_batch, budget_gib * GIB, largest))
        except Exception as error:  # an estimate must never end a training run
            sizes.append(min(largest, FALLBACK_CHUNK))
            logger.warning(
                f"The memory of the {name} cannot be estimated ({type(error).__name__}: "
                f"{(str(error).splitlines() or [''])[0]}), so it gets at most {FALLBACK_CHUNK} samples at a time. Set "
                "`rollout_micro_batch_size` and `vae_decode_batch_size` yourself if that is too many or too few."
            )
    return tuple(sizes)
