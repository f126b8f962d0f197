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

"""What the arguments name: files and folders here, repositories of the Hub. Every question to the Hub has a time limit."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from ..hub_files import is_missing_path
from ..prompts import READERS
from .environment import in_units
from .report import OK, PROBLEM, WARNING, Finding


SECTION = "files and repositories"
TIMEOUT = 5.0  # seconds for one question
MARKS_OF_A_CACHE = ("model_index.json", "config.json", "README.md", ".gitattributes")


@dataclass(frozen=True)
class Named:
    """
    Something that an argument names.

    Attributes:
        option (`str`): the argument.
        value (`str`): folder, file or Hub id.
        kind (`str`): what should be there, such as `"diffusers pipeline"`.
        must_have (`str`, *optional*): file that a folder of this kind has.
        is_dataset (`bool`): whether a Hub id means a dataset.
        revision (`str`, *optional*): branch, tag or commit.
        file (`str`, *optional*): file of it that is wanted, where it is a repository of several things.
    """

    option: str
    value: str
    kind: str
    must_have: str | None = None
    is_dataset: bool = False
    revision: str | None = None
    file: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether it exists here, or can only be meant as a path."""
        is_file = self.is_dataset and Path(self.value).suffix.lower() in READERS
        return os.path.exists(self.value) or is_missing_path(self.value) or is_file


class Hub:
    """
    Asks the Hub about repositories; once it could not be reached, it is not asked again.

    Args:
        timeout (`float`, *optional*): seconds for one question.
    """

    def __init__(self, timeout: float = TIMEOUT):
        self.timeout = timeout
        self.why_not: str | None = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None

    @property
    def online(self) -> bool:
        return self.why_not is None

    def look(self, named: Sequence[Named], planned: bool = False) -> list[Finding]:
        """
        A finding for each name.

        Args:
            named (sequence of [`Named`])
            planned (`bool`, *optional*, defaults to `False`): whether the run is planned for another machine, so that what
                cannot be reached from here may be reached from there.
        """
        on_the_hub = [name for name in named if not name.is_local]
        if on_the_hub and self.online:
            self._reach(on_the_hub[0])
        with ThreadPoolExecutor(8) as pool:
            answers = dict(zip(on_the_hub, pool.map(lambda name: self._ask(name, planned), on_the_hub), strict=True))
        return [look_here(name) if name.is_local else answers[name] for name in named]

    def _reach(self, name: Named) -> None:
        """One question, whose answer tells whether there is a connection."""
        try:
            self._info(name)
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
            return
        except Exception as error:  # of httpx or requests, or of a proxy
            self.why_not = f"the Hub is not reachable ({type(error).__name__})"

    def _info(self, name: Named):
        api = HfApi()
        ask = api.dataset_info if name.is_dataset else api.model_info
        return ask(name.value, revision=name.revision, timeout=self.timeout, files_metadata=True)

    def _ask(self, name: Named, planned: bool) -> Finding:
        what = f"{name.kind} {name.value!r}"
        cached = in_cache(name)
        if not self.online:
            if cached:
                return Finding(SECTION, OK, name.option, f"{what} is in the cache of the Hub; {self.why_not}")
            advice = "Download it where there is a connection, or name a local folder."
            mark = WARNING if planned else PROBLEM
            text = f"{what} is neither a local path nor in the cache, and {self.why_not}. {advice}"
            return Finding(SECTION, mark, name.option, text)
        try:
            info = self._info(name)
        except GatedRepoError:
            text = f"{what} asks for consent: accept its conditions at {self._page(name)} and run `hf auth login`."
            return Finding(SECTION, PROBLEM, name.option, text)
        except RevisionNotFoundError:
            return Finding(SECTION, PROBLEM, name.option, f"{what} has no revision {name.revision!r}.")
        except (RepositoryNotFoundError, HFValidationError):
            text = f"{what} is neither a local path nor a repository that you may see. For a private one: `hf auth login`."
            return Finding(SECTION, PROBLEM, name.option, text)
        except Exception as error:  # the connection broke
            mark = OK if cached else WARNING
            text = f"{what}: the Hub gave no answer ({type(error).__name__})" + (
                ", but it is cached" if cached else ""
            )
            return Finding(SECTION, mark, name.option, text)
        return self._found(name, info, cached)

    def _found(self, name: Named, info, cached: bool) -> Finding:
        files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        what = f"{name.kind} {name.value!r}"
        wanted = name.file or name.must_have
        if wanted is not None and files and wanted not in files:
            return Finding(SECTION, PROBLEM, name.option, f"{what} is on the Hub but has no {wanted}.")
        gated = f", gated ({info.gated}): accept its conditions at {self._page(name)}" if info.gated else ""
        size = files.get(name.file, 0) if name.file else sum(files.values())
        state = "cached" if cached else f"on the Hub, {in_units(size)} in all its files"
        return Finding(SECTION, OK if not gated or cached else WARNING, name.option, f"{what} is {state}{gated}")

    def _page(self, name: Named) -> str:
        return f"{constants.ENDPOINT}/{'datasets/' if name.is_dataset else ''}{name.value}"


def in_cache(name: Named) -> bool:
    """Whether something of a repository lies in the cache of the Hub."""
    marks = (name.file, name.must_have, *MARKS_OF_A_CACHE)
    kind = "dataset" if name.is_dataset else "model"
    for mark in filter(None, marks):
        try:
            found = try_to_load_from_cache(name.value, mark, revision=name.revision, repo_type=kind)
        except (HFValidationError, ValueError):
            return False
        if isinstance(found, str):
            return True
    return False


def look_here(name: Named) -> Finding:
    """A finding about a local path."""
    path = Path(name.value)
    what = f"{name.kind} {name.value!r}"
    if not path.exists():
        return Finding(SECTION, PROBLEM, name.option, f"there is no {what}: the path does not exist.")
    wanted = name.file or name.must_have
    if wanted is not None and path.is_dir() and not (path / wanted).is_file():
        return Finding(SECTION, PROBLEM, name.option, f"{name.value!r} has no {wanted}, so it is no {name.kind}.")
    if name.must_have is not None and path.is_file():
        return Finding(SECTION, PROBLEM, name.option, f"{name.value!r} is a file, and a {name.kind} is a folder.")
    return Finding(SECTION, OK, name.option, f"{what} exists")
