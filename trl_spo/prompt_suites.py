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
The prompt suites of the literature by name, from their public homes at a fixed revision: `SUITES`, [`locate_suite`].

| name | prompts | source | licence |
|---|---|---|---|
| `parti` | 1,632, P2 | https://huggingface.co/datasets/nateraw/parti-prompts, of https://github.com/google-research/parti | Apache 2.0 |
| `hpdv2` | 3,200, four styles of 800 | https://huggingface.co/datasets/zhwang/HPDv2, of https://github.com/tgxs002/HPSv2 | Apache 2.0 |
| `drawbench` | 200 | https://huggingface.co/datasets/sayakpaul/drawbench, of https://huggingface.co/papers/2205.11487 | not stated |
| `geneval` | 553 | https://github.com/djghosh13/geneval | MIT |
"""

import urllib.error
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import cached_assets_path, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError


GITHUB = "https://raw.githubusercontent.com"


class PromptSuite(NamedTuple):
    """
    Where a suite is and how its files are read.

    Attributes:
        repository (`str`): dataset of the Hub, or repository of GitHub.
        revision (`str`): commit.
        files (`dict[str, str | None]`): file in the repository -> category of all of its prompts, if they have one.
        prompt_column (`str`), category_column (`str`): of files that are tables.
        sha256 (`str`, *optional*): of the one file of a suite on GitHub.
    """

    repository: str
    revision: str
    files: dict[str, str | None]
    prompt_column: str = "prompt"
    category_column: str = "category"
    sha256: str | None = None

    @property
    def is_on_github(self) -> bool:
        return self.sha256 is not None


SUITES = {
    "parti": PromptSuite(
        "nateraw/parti-prompts",
        "944b156abfdad7627c3221b5ec4f6a6fb060a197",
        {"PartiPrompts.tsv": None},
        prompt_column="Prompt",
        category_column="Category",
    ),
    "hpdv2": PromptSuite(
        "zhwang/HPDv2",
        "b9517430f34b1080d4f741118d2a440155a165cd",
        {f"benchmark/{style}.json": style for style in ("anime", "concept-art", "paintings", "photo")},
    ),
    "drawbench": PromptSuite(
        "sayakpaul/drawbench",
        "ad794cba698c253ffdb6d18eff3fc87b004c1135",
        {"DrawBench Prompts - Sheet1.csv": None},
        prompt_column="Prompts",
        category_column="Category",
    ),
    "geneval": PromptSuite(
        "djghosh13/geneval",
        "af4902f24d3ca90ebbb446dd9891a59e0f82725f",
        {"prompts/evaluation_metadata.jsonl": None},
        category_column="tag",
        sha256="5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
    ),
}


def find_suite(name: str) -> tuple[PromptSuite | None, Path | None]:
    """
    The suite that a name means, if it means one, and the folder of its files if that is not to be downloaded.

    What lies in the working directory goes first: a file or folder of that name is no suite, unless the folder is a copy of
    the suite's repository.

    Args:
        name (`str`): of a suite, or the path of a copy that is called like one.
    """
    path = Path(name)
    suite = SUITES.get(path.name)
    if suite is None:
        return None, None
    if path.is_dir() and all((path / file).is_file() for file in suite.files):
        return suite, path
    if path.exists() or path.name != name:
        return None, None
    return suite, None


def locate_suite(name: str, suite: PromptSuite, folder: Path | None = None) -> dict[Path, str | None]:
    """
    The files of a suite, downloaded if they are not cached.

    Args:
        name (`str`): of the suite, for errors.
        suite ([`PromptSuite`]): the suite.
        folder (`Path`, *optional*): a copy of its repository, instead of a download.

    Returns:
        `dict[Path, str | None]`: local file -> category of all of its prompts, if they have one.

    Raises:
        FileNotFoundError: if a file is neither cached nor can be downloaded.
    """
    found = {}
    for file, category in suite.files.items():
        if folder is not None:
            found[folder / file] = category
            continue
        try:
            found[_from_github(suite, file) if suite.is_on_github else _from_hub(suite, file)] = category
        except (OSError, EntryNotFoundError, RuntimeError) as error:
            home = "GitHub" if suite.is_on_github else "the Hub"
            raise FileNotFoundError(
                f"The prompts of {name!r} are neither cached nor can they be downloaded: {file!r} of {suite.repository!r} on "
                f"{home} ({str(error).strip().splitlines()[0]}). Without a network, put a copy of that repository into a folder "
                f"{name!r}."
            ) from error
    return found


def _from_hub(suite: PromptSuite, file: str) -> Path:
    return Path(hf_hub_download(suite.repository, file, repo_type="dataset", revision=suite.revision))


def _from_github(suite: PromptSuite, file: str) -> Path:
    """The file in the Hub's cache of other downloads, whose content is compared with what is expected."""
    from torch.hub import download_url_to_file

    names = ("trl_spo", suite.repository.replace("/", "--"), suite.revision)
    folder = cached_assets_path(*names, assets_dir=constants.HF_ASSETS_CACHE)
    path = folder / Path(file).name
    if not path.is_file():
        if constants.HF_HUB_OFFLINE:
            raise urllib.error.URLError("HF_HUB_OFFLINE is set")
        url = f"{GITHUB}/{suite.repository}/{suite.revision}/{file}"
        download_url_to_file(url, str(path), hash_prefix=suite.sha256, progress=False)
    return path
