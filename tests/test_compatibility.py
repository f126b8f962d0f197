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
Necessity: setup.cfg promises versions, the constraints pin them, docs/compatibility.md says which were run. They are
edited at different times by different people and have to say the same.
"""

import configparser
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")


def lower_bounds() -> dict[str, str]:
    """Lower bound by package: what the package and its tests need."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    text = config["options"]["install_requires"] + config["options.extras_require"]["test"]
    requirements = [Requirement(line) for line in text.split("\n") if line.strip() and not line.startswith("#")]
    bounds = {}
    for requirement in requirements:
        (specifier,) = requirement.specifier
        assert specifier.operator == ">="
        bounds[requirement.name] = specifier.version
    return bounds


def pins(name: str) -> dict[str, str]:
    """Exact version by package, of a constraints file."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def table() -> dict[str, tuple[str, str]]:
    """(lowest, pinned) by package, from the page."""
    rows = re.findall(r"^\| `([\w-]+)` \| ([\w.]+) \| ([\w.]+) \|", PAGE, flags=re.MULTILINE)
    return {name: (lowest, pinned) for name, lowest, pinned in rows}


def test_page_has_the_bounds_of_setup_cfg_and_the_pins_of_the_constraints():
    bounds, pinned = lower_bounds(), pins("constraints.txt")
    assert table() == {name: (bounds[name], pinned[name]) for name in bounds}


def test_command_for_the_lowest_versions_installs_them():
    """All but those of which other versions were run: torch (one build), ruff (no part of the tests), and the page's."""
    command = PAGE.split("<!-- lowest -->")[1].split("```")[1]
    installed = dict(re.findall(r"([\w-]+)==([\w.]+)", command))
    bounds = lower_bounds()
    assert installed.pop("torch") == pins("constraints.txt")["torch"]
    assert installed == {
        name: bounds[name] for name in bounds if name not in ("torch", "ruff", "gradio", "playwright")
    }


def test_constraints_beside_ddpo_differ_in_trl_alone():
    ours, beside = pins("constraints.txt"), pins("constraints-ddpo.txt")
    assert {name for name in ours.keys() | beside.keys() if ours.get(name) != beside.get(name)} == {"trl"}
    assert beside["trl"] == "0.23.1"


def test_pythons_are_the_classifiers():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    versions = set(re.findall(r"Python :: (3\.\d+)", config["metadata"]["classifiers"]))
    assert versions == set(re.findall(r"^\|[^|]*\| (3\.\d+) \|", PAGE, flags=re.MULTILINE))


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="asks about the lowest Python, 3.11")
def test_sources_compile_with_the_lowest_python():
    """Syntax of a later Python would be found by importing; this also reads what no test imports."""
    for folder in ("trl_spo", "examples", "benchmarks", "tests"):
        for path in (ROOT / folder).glob("**/*.py"):
            compile(path.read_text(encoding="utf-8"), str(path), "exec")
