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
The presets that come with the package, by name: what `--config sd15` means.

In a checkout they are `examples/configs/*.yaml`; a wheel carries the same files as `trl_spo/configs`.
"""

from collections.abc import Sequence
from pathlib import Path

from ..suggestions import did_you_mean


PACKAGE = Path(__file__).parents[1]


def presets_folder() -> Path:
    """Where the presets are: in the installed package, or in the checkout around it."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "examples" / "configs"


def named_presets(kinds: Sequence[str]) -> dict[str, Path]:
    """
    Presets by name.

    Args:
        kinds (`Sequence[str]`): how their names begin, such as `("spo", "lpo")`.

    Returns:
        `dict[str, Path]`: `spo_sd15` and the like, those of the first kind first.
    """
    found = {}
    for kind in kinds:
        for path in sorted(presets_folder().glob(f"{kind}_*.yaml")):
            found[path.stem] = path
    return found


def find_preset(name: str, kinds: Sequence[str]) -> Path | None:
    """
    The file of a preset.

    Args:
        name (`str`): `spo_sd15`, or what remains without its kind: `sd15`.
        kinds (`Sequence[str]`): the kinds that the command can use; where `sd15` fits several, the first one counts.

    Returns:
        `Path`, or `None` if there is no such preset.
    """
    known = named_presets(kinds)
    for candidate in (name, *(f"{kind}_{name}" for kind in kinds)):
        if candidate in known:
            return known[candidate]
    return None


def no_such_config(value: str, kinds: Sequence[str]) -> str:
    """The sentence for a `--config` that is neither a file nor a preset."""
    known = named_presets(kinds)
    is_path = Path(value).suffix in (".yaml", ".yml") or len(Path(value).parts) > 1
    if is_path or not known:
        return f"there is no config {value!r}"
    short = [name.removeprefix(f"{kinds[0]}_") for name in known]
    return (
        f"there is no config {value!r}; it must be a YAML file or one of the presets {', '.join(short)}"
        f"{did_you_mean(value, [*short, *known])}"
    )
