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

"""What all model cards share: Hub ids, and Markdown with the header that the Hub reads."""

import importlib.metadata
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData


FOLDER = "path/to/this/folder"  # where the card's examples load from if the model has no Hub id
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)  # so no markup, and no "user:password@host/"


def hub_id(value: Any) -> str | None:
    """`value` if it is a Hub id such as "user/model", `None` if it is a local path or empty."""
    value = str(value or "")
    return value if HUB_ID.fullmatch(value) and not Path(value).exists() else None


def link(name: str) -> str:
    """Markdown of a Hub id, with its address; of anything else, the text as it is."""
    return f"[{name}](https://huggingface.co/{name})" if hub_id(name) else name


def cell(value: Any) -> str:
    """Markdown of a value in a table."""
    return str(getattr(value, "value", value)).replace("|", "\\|").replace("\n", " ")


def join(header: ModelCardData, parts: list[str]) -> str:
    """The card: the header as YAML, then its parts."""
    return f"---\n{header.to_yaml().strip()}\n---\n\n" + "\n\n".join(parts) + "\n"


def versions(*packages: str) -> str:
    """Versions of this package and of those that are named, as far as they are installed."""
    found = []
    for package in ("trl_spo", *packages):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found) + "."
