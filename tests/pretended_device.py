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
A pretended GPU for machines without one: what mixes the devices of two tensors fails here as it fails on CUDA.

Inside `with PretendedGPU() as gpu:` torch, accelerate and transformers believe in one device, `cuda:0`. A tensor on it is
a [`DeviceTensor`]: real numbers, kept in a CPU tensor that only this module sees. All operators run, gradients flow, and a
trainer trains; the operators of the CPU compute.

Refused, with CUDA's words where it has some:

- an operation on tensors of both devices. As on CUDA, a CPU tensor without dimensions may take part in element-wise
  operations, CPU indices may pick rows, and `copy_` and `to` go between devices;
- random numbers on one device from a generator of the other;
- `numpy()` and everything else that reads memory, for a tensor on the device;
- pinned memory for what is not on the CPU.

Counted in `gpu.waits`, a list of [`Wait`], is what stops the host until the device has caught up: reading a value
(`item`, `tolist`, `bool`, a copy to the CPU), operations whose result has a size that depends on values (`nonzero`, a
boolean index, `unique`), copies to the device without `non_blocking=True`, and `torch.cuda.synchronize`.

The device has random numbers of its own. It knows no streams, no memory limit and no kernels, so it says nothing about
speed and rounding; autocast reaches the matrix products and convolutions only. `torch.compile` cannot see through it.

How: in C++ the tensors have the device `meta`, the one that autograd lets pass without a driver; in Python they say
`cuda:0`. The dispatch mode below sees every operator and runs it on the tensors inside.
"""

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode


aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
PLAIN_TO = torch.Tensor.to
COPIES = {aten._to_copy, aten.copy_, aten._foreach_copy_, aten.copy, aten._copy_from}
INDEXING = {aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_, aten._unsafe_index}
# The sizes of their results, or their results themselves, are values that the host has to know.
READING = {aten._local_scalar_dense, aten.equal, aten.is_nonzero}
SEARCHING = {aten.nonzero, aten.masked_select, aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive}
MATRIX_PRODUCTS = {
    torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.baddbmm,
    torch.addmm, torch.conv1d, torch.conv2d, torch.nn.functional.scaled_dot_product_attention,
}  # fmt: skip


class Wait(NamedTuple):
    """The host waits for the device: how, and the innermost line of a package that asked for it."""

    kind: str  # "read", "search", "upload" or "synchronize"
    where: str  # "trl_spo/rollout.py:120 stepwise_rollout"


def _is_pretended(device) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


class DeviceTensor(torch.Tensor):
    """A tensor that says it is on `cuda:0`; `inner` holds its numbers on the CPU."""

    calls = 0  # of functions on such tensors that are running: what they make on `meta` belongs to the device

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "DeviceTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device="meta",
        )  # fmt: skip
        tensor.inner = inner
        return tensor

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor):
        if isinstance(value, DeviceTensor) and (value.shape, value.dtype) == (self.shape, self.dtype):
            self.inner = value.inner
        else:
            new = torch.nn.Parameter(value.detach(), requires_grad=self.requires_grad)
            torch.utils.swap_tensors(self, new)

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def is_pinned(self, device=None) -> bool:
        return False

    def pin_memory(self, device=None):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def __array__(self, *args, **kwargs):
        return self.numpy()

    def __deepcopy__(self, memo):
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol):
        """Saved as a tensor of the CPU, where transformers loads optimizers and random states to."""
        return self.inner.__reduce_ex__(protocol)

    def __repr__(self):
        return f"DeviceTensor({self.inner!r})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        cls.calls += 1
        try:
            with torch._C.DisableTorchFunctionSubclass():
                if function in MATRIX_PRODUCTS and torch.is_autocast_enabled("cuda"):
                    dtype = torch.get_autocast_dtype("cuda")
                    args, kwargs = _cast(args, dtype), dict(zip(kwargs, _cast(kwargs.values(), dtype), strict=True))
                return function(*args, **kwargs)
        finally:
            cls.calls -= 1

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} was called on a tensor of a pretended device outside of its context.")


def _cast(values, dtype) -> tuple:
    floats = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(v.to(dtype) if torch.is_tensor(v) and v.dtype in floats else v for v in values)


def _to(tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """`Tensor.to` that knows the one device, with or without its index, and that a tensor may be there already."""
    if args and torch.is_tensor(args[0]):
        args = (args[0].device, args[0].dtype, *args[1:])
    if "other" in kwargs:
        other = kwargs.pop("other")
        args = (other.device, other.dtype, *args)
    copy = kwargs.pop("copy", False)
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    options = {"non_blocking": non_blocking, "copy": copy, "memory_format": memory_format}
    if device is None or (_is_pretended(device) and isinstance(tensor, DeviceTensor)):
        return PLAIN_TO(tensor, dtype or tensor.dtype, **options)
    return PLAIN_TO(tensor, CUDA if device.type == "cuda" else device, dtype or tensor.dtype, **options)


class PretendedGenerator(torch.Generator):
    """A generator that may be on the pretended device."""

    pretended: set[int] = set()  # operators see the generator of C++ only, which this number names

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, device="cpu")
        if torch.device(device).type == "cuda":
            cls.pretended.add(generator._cdata)
            generator.on_device = True
        else:
            cls.pretended.discard(generator._cdata)
            generator.on_device = False
        return generator

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self) -> torch.device:
        return CUDA if self.on_device else torch.device("cpu")


class PretendedGPU(TorchDispatchMode):
    """
    A context in which `cuda:0` exists.

    Attributes:
        waits (list of [`Wait`]): every time that the host had to wait for the device so far.
        num_pinned (`int`): how often a CPU tensor was put into pinned memory.
    """

    def __init__(self):
        super().__init__()
        self.waits: list[Wait] = []
        self.num_pinned = 0
        self._random_state = torch.Generator().manual_seed(0).get_state()
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(torch, "Generator", PretendedGenerator)
        patch.setattr(torch.Tensor, "to", _to)
        patch.setattr(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: _to(tensor, CUDA))
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: self._pin(tensor))
        for module, functions in self._functions().items():
            for name, function in functions.items():
                patch.setattr(module, name, function)
        # `torch.tensor(..., device="cuda:0")` makes its tensor on the CPU and copies it, where the mode sees it.
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        # accelerate remembers the device of the process.
        AcceleratorState._reset_state(reset_partial_state=True)
        self._stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
        # Gradients are computed in this thread, where the mode is.
        self._stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        return super().__enter__()

    def __exit__(self, *error):
        result = super().__exit__(*error)
        self._stack.close()
        return result

    def _functions(self) -> dict:
        """What asks `torch.cuda` gets the answers of a machine with one GPU."""
        random = {
            "manual_seed": self._manual_seed,
            "manual_seed_all": self._manual_seed,
            "get_rng_state": lambda device=0: self._random_state.clone(),
            "get_rng_state_all": lambda: [self._random_state.clone()],
            "set_rng_state": lambda state, device=0: self._set_random_state(state),
            "set_rng_state_all": lambda states: self._set_random_state(states[0]),
        }
        properties = types.SimpleNamespace(
            name="pretended", major=9, minor=0, total_memory=2**34, multi_processor_count=1
        )
        device = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "_lazy_init": lambda: None,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "get_device_name": lambda device=None: properties.name,
            "get_device_capability": lambda device=None: (properties.major, properties.minor),
            "get_device_properties": lambda device=None: properties,
            "is_bf16_supported": lambda including_emulation=True: True,
            "synchronize": lambda device=None: self._wait("synchronize"),
            "empty_cache": lambda: None,
            "mem_get_info": lambda device=None: (2**33, 2**34),
            "memory_allocated": lambda device=None: 0,
            "memory_reserved": lambda device=None: 0,
            "max_memory_allocated": lambda device=None: 0,
            "max_memory_reserved": lambda device=None: 0,
            "reset_peak_memory_stats": lambda device=None: None,
        }
        return {torch.cuda: device | random, torch.cuda.random: random}

    # --- random numbers ----------------------------------------------------------------------------------------------

    def _manual_seed(self, seed: int):
        self._random_state = torch._C.Generator().manual_seed(int(seed)).get_state()

    def _set_random_state(self, state: torch.Tensor):
        self._random_state = state.clone()

    @contextlib.contextmanager
    def _device_random_numbers(self) -> Iterator[None]:
        """The operators of the CPU draw from the state of the device."""
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(self._random_state)
        try:
            yield
        finally:
            self._random_state = torch.default_generator.get_state()
            torch.default_generator.set_state(before)

    # --- waits -------------------------------------------------------------------------------------------------------

    def _wait(self, kind: str):
        self.waits.append(Wait(kind, _caller()))

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_pinned += 1
        return tensor.clone()

    # --- operators ---------------------------------------------------------------------------------------------------

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what skips compilers takes as long as the operators here, and nothing is compiled

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = _leaves((*args, *kwargs.values()))
        on_device = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
        wanted = kwargs.get("device")
        from_inside = wanted is not None and wanted.type == "meta" and DeviceTensor.calls > 0
        if not on_device and not from_inside and (wanted is None or wanted.type != "cuda"):
            _check_generators(function, leaves, on_device=False)
            return function(*args, **kwargs)  # another device altogether

        packet = function.overloadpacket
        result_on_device = _is_pretended(wanted) if wanted is not None else bool(on_device)
        if packet not in COPIES:
            _check_devices(function, leaves, args)
        _check_generators(function, leaves, result_on_device)
        self._count(packet, args, kwargs, result_on_device)

        # The same operator on the tensors inside; what comes back in place is the tensor that went in.
        known = {id(tensor.inner): tensor for tensor in on_device}
        inner_args = _inside(args)
        inner_kwargs = {name: _inside(value) for name, value in kwargs.items()}
        if wanted is not None and result_on_device:
            inner_kwargs["device"] = torch.device("cpu")
        if packet is aten._to_copy and not result_on_device and args[0].dtype == kwargs.get("dtype", args[0].dtype):
            inner_args = (inner_args[0].clone(), *inner_args[1:])
        draws = result_on_device and torch.Tag.nondeterministic_seeded in function.tags
        own_generator = any(isinstance(leaf, torch._C.Generator) for leaf in leaves)
        with self._device_random_numbers() if draws and not own_generator else contextlib.nullcontext():
            result = function(*inner_args, **inner_kwargs)
        return _wrap(result, known, result_on_device or not isinstance(result, torch.Tensor))

    def _count(self, packet, args, kwargs, result_on_device: bool):
        if packet in READING:
            self._wait("read")
        elif packet in SEARCHING or (packet is aten.repeat_interleave and kwargs.get("output_size") is None):
            self._wait("search")
        elif packet is aten._to_copy:
            if not result_on_device:
                self._wait("read")
            elif not isinstance(args[0], DeviceTensor) and not kwargs.get("non_blocking"):
                self._wait("upload")
        elif packet is aten.copy_:
            here, there = (isinstance(value, DeviceTensor) for value in args[:2])
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            if there and not here:
                self._wait("read")
            elif here and not there and not non_blocking and args[1].ndim:
                self._wait("upload")
        elif packet in INDEXING:
            self._count_indices(packet, args)

    def _count_indices(self, packet, args):
        indices = [index for index in args[1] if index is not None]
        masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
        # `x[mask] = number` is `masked_fill`, which nobody waits for.
        fills = packet is not aten.index and len(masks) == len(indices) == 1 and args[2].numel() == 1
        if masks and not fills:
            self._wait("search")
        if any(not isinstance(index, DeviceTensor) for index in indices):
            self._wait("upload")


def _leaves(values) -> list:
    """Arguments of an operator, those in lists one by one."""
    found = []
    for value in values:
        if isinstance(value, (list, tuple)):
            found += _leaves(value)
        else:
            found.append(value)
    return found


def _inside(value):
    """An argument of an operator with the tensors that hold the numbers."""
    if isinstance(value, DeviceTensor):
        return value.inner
    if isinstance(value, (list, tuple)):
        return type(value)(map(_inside, value))
    return value


def _wrap(result, known: dict[int, DeviceTensor], on_device: bool):
    if isinstance(result, torch.Tensor):
        if id(result) in known:
            return known[id(result)]
        return DeviceTensor(result) if on_device else result
    if isinstance(result, (tuple, list)):
        return type(result)(_wrap(value, known, on_device) for value in result)
    return result


def _check_devices(function, leaves: list, args: tuple):
    """
    Raises:
        RuntimeError: if tensors of both devices take part, and CUDA would not let them.
    """
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    on_device = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    packet = function.overloadpacket
    element_wise = torch.Tag.pointwise in function.tags or packet.__name__.startswith("_foreach_")
    for tensor in tensors:
        if not on_device or isinstance(tensor, DeviceTensor) or (tensor.ndim == 0 and element_wise):
            continue
        if packet in INDEXING and isinstance(args[0], DeviceTensor):
            if any(tensor is index for index in args[1]) or tensor.ndim == 0:
                continue
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
            f"{tensor.device}! (when calling {function})"
        )
    if packet in INDEXING or torch.Tag.pointwise not in function.tags:
        return
    # Only the result of an in-place operation can be without dimensions and on the CPU, with the others on the device.
    if packet.__name__.endswith("_") and on_device and not isinstance(args[0], (DeviceTensor, list, tuple)):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {function} would write to the CPU.")


def _check_generators(function, leaves: list, on_device: bool):
    for leaf in leaves:
        if isinstance(leaf, torch._C.Generator) and (leaf._cdata in PretendedGenerator.pretended) != on_device:
            expected, found = ("cuda", "cpu") if on_device else ("cpu", "cuda")
            raise RuntimeError(f"Expected a '{expected}' device type for generator but found '{found}' ({function})")


def _caller() -> str:
    """The innermost line outside of torch and this module."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and path != __file__ and not path.startswith("<"):
            break
        frame = frame.f_back
    if frame is None:
        return "?"
    return f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
