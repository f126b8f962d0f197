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

"""What a run finds on this machine: versions, devices, disk, optional libraries."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ..training.checkpointing import check_output_dir
from ..training.memory import GIB
from .forecast import RESERVE, Card
from .report import NOTE, OK, PROBLEM, WARNING, Finding


SECTION = "this machine"
PACKAGES = ("torch", "diffusers", "transformers", "trl", "peft", "accelerate", "datasets")
DISTRIBUTION = "trl-spo"


def check_versions() -> list[Finding]:
    """Versions of the libraries, and whether they are in the ranges that this package asks for."""
    ranges = _ranges()
    shown = [f"python {platform.python_version()}"]
    findings = []
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(SECTION, PROBLEM, name, f"is not installed: `pip install {name}`."))
            continue
        shown.append(f"{name} {version}")
        wanted = ranges.get(name)
        if wanted is not None and not wanted.contains(version.split("+")[0], prereleases=True):
            text = f"{version} is outside of the range {wanted} that was tried: `pip install '{name}{wanted}'`."
            findings.append(Finding(SECTION, WARNING, name, text))
    mark = OK if not findings else NOTE
    return [Finding(SECTION, mark, "versions", ", ".join(shown)), *findings]


def _ranges() -> dict:
    """Name of a library -> the versions of it that this package asks for."""
    try:
        wanted = importlib.metadata.requires(DISTRIBUTION) or ()
    except importlib.metadata.PackageNotFoundError:  # used from a folder, without installation
        return {}
    requirements = [Requirement(text) for text in wanted]
    return {requirement.name: requirement.specifier for requirement in requirements if requirement.marker is None}


def card_here(device: torch.device) -> Card:
    """The memory of the device on which a run would be, as much as is free now."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Card(torch.cuda.get_device_name(device), min(free, int(total * (1 - RESERVE))), total)
    memory = psutil.virtual_memory()
    return Card("the memory of this machine", memory.available, memory.total, device_type="cpu")


def check_devices(config: Any, planned: bool, on_cpu: bool) -> list[Finding]:
    """
    The devices of this machine.

    Args:
        config (*optional*): of a training, if it is one; its precision must suit the device.
        planned (`bool`): whether the run is planned for a card elsewhere, so that this machine need not be able to run it.
        on_cpu (`bool`): whether it would be on the CPU because there is nothing else.
    """
    findings = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        text = f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        findings.append(Finding(SECTION, OK, f"GPU {index}", text))
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{cores} cores, {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    findings.append(Finding(SECTION, NOTE, "CPU", text))
    return findings if planned or not on_cpu else [*findings, *_on_the_cpu(config)]


def _on_the_cpu(config: Any) -> list[Finding]:
    """What it means that there is no GPU."""
    for name in ("fp16", "bf16"):
        if getattr(config, name, False):
            text = f"`{name}` needs a GPU, and PyTorch finds none here. For a run on the CPU: `--{name} false`"
            text += " or `--use_cpu`." if name == "bf16" else "."
            return [Finding(SECTION, PROBLEM, "precision", f"{text} To plan for a card elsewhere: --card_memory.")]
    text = (
        "there is none that PyTorch can use: the run would be on the CPU. To plan for a card elsewhere: --card_memory."
    )
    return [Finding(SECTION, WARNING, "GPU", text)]


def check_disk(output_dir: str | Path, will_write: int, what: str) -> list[Finding]:
    """
    Whether the output folder can be written and has room.

    Args:
        output_dir (`str` or `Path`): it need not exist.
        will_write (`int`): bytes that the run will write.
        what (`str`): of which these bytes are made, in words.
    """
    try:
        check_output_dir(output_dir, create=False)
    except OSError as error:
        text = f"{str(output_dir)!r}: {error.strerror or error}."
        return [Finding(SECTION, PROBLEM, "output folder", text)]
    existing = Path(output_dir).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    text = f"{in_units(free)} free at {str(output_dir)!r}; the run writes about {in_units(will_write)}: {what}"
    if free < will_write:
        advice = "Choose another folder, or keep fewer checkpoints with `save_total_limit`."
        return [Finding(SECTION, PROBLEM, "disk", f"{text}. {advice}")]
    return [Finding(SECTION, OK, "disk", text)]


def in_units(size: float) -> str:
    """Bytes in a unit that suits them."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def check_trackers(config: Any) -> list[Finding]:
    """Whether the trackers that `report_to` names are installed."""
    installed = get_available_reporting_integrations()
    findings = []
    for name in config.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            text = f"`report_to` names {name!r}, which is not a tracker; there are {known}."
            findings.append(Finding(SECTION, PROBLEM, "tracker", text))
        elif name not in installed:
            text = f"`report_to` names {name!r}, which is not installed: install it, or set `report_to='none'`."
            findings.append(Finding(SECTION, PROBLEM, "tracker", text))
        else:
            findings.append(Finding(SECTION, OK, "tracker", f"{name} is installed"))
    return findings


def check_libraries(wanted: dict[str, str]) -> list[Finding]:
    """
    Optional libraries.

    Args:
        wanted (`dict[str, str]`): name of a module -> what the arguments need it for.
    """
    findings = []
    for name, purpose in wanted.items():
        if importlib.util.find_spec(name) is None:
            text = f"is not installed, and {purpose}: `pip install 'trl-spo[eval]'` or `pip install {name}`."
            findings.append(Finding(SECTION, PROBLEM, name, text))
        else:
            findings.append(Finding(SECTION, OK, name, "is installed"))
    return findings
