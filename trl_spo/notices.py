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
Notices of other libraries that are about nothing: each is left out by its own words, at the logger that gives it, so that
whatever else these say is still heard.
"""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator


# (logger, words): of programs of this package.
OF_PROGRAMS = (
    # Image processors take Pillow instead, which this package never asks for anything that torchvision does better.
    ("transformers.utils.import_utils", "requires torchvision (not installed)"),
    # Processes on the CPU are distributed, too: accelerate has started them.
    ("transformers.training_args", "but parallel_mode != ParallelMode.DISTRIBUTED"),
)
# A LoRA of the denoiser has no keys for text encoders; whether it was read as a whole is checked by `load_lora_whole`.
OF_LORAS = (
    ("diffusers.loaders.lora_base", "No LoRA keys associated to"),
    ("diffusers.loaders.peft", "No LoRA keys associated to"),
)


# Of Python's `warnings`: loaders pin memory by default, which does nothing where there is no GPU.
WARNINGS_OF_PROGRAMS = ("'pin_memory' argument is set as true but no accelerator is found",)


def _without(words: str):
    """A filter of `logging` that drops messages with these words."""
    return lambda record: words not in record.getMessage()


def leave_out_notices() -> None:
    """Leave out `OF_PROGRAMS` and `WARNINGS_OF_PROGRAMS` in this process. Called by programs, before they import what is heavy."""
    for words in WARNINGS_OF_PROGRAMS:
        warnings.filterwarnings("ignore", message=re.escape(words))
    for name, words in OF_PROGRAMS:
        logger = logging.getLogger(name)
        if not any(getattr(known, "words", None) == words for known in logger.filters):
            own = _without(words)
            own.words = words
            logger.addFilter(own)


@contextlib.contextmanager
def without_lora_notices() -> Iterator[None]:
    """Leave out `OF_LORAS` inside."""
    added = [(logging.getLogger(name), _without(words)) for name, words in OF_LORAS]
    for logger, own in added:
        logger.addFilter(own)
    try:
        yield
    finally:
        for logger, own in added:
            logger.removeFilter(own)
