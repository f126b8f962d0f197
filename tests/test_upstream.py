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
Necessity: a port by hand is out of date the day after. The kit is run on a checkout made of the installed TRL (its
package, and the few files of a checkout that the kit edits, in TRL's form), and tests of ours pass there.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trl
import yaml

from upstream import port_to_trl as kit


ROOT = Path(__file__).parents[1]
TOCTREE = """- sections:
  - local: index
    title: TRL
  title: Getting started
- sections:
  - local: experimental_overview
    title: Experimental Overview
  - local: a2po_trainer # Sorted alphabetically
    title: A2PO
  - local: sdpo_trainer
    title: SDPO
  - local: ssd_trainer
    title: SSD
  - local: tpo_trainer
    title: TPO
  title: Experimental
  isExpanded: false
"""
PAPER_INDEX = """# Paper Index

## Triple Preference Optimization

Papers relating to the [`experimental.tpo.TPOTrainer`]

## Distributed Training

The end.
"""
PYPROJECT = """[project]
name = "trl"

[project.optional-dependencies]
bco = [
    "scikit-learn",
]

[tool.ruff]
target-version = "py310"
line-length = 119
src = ["trl"]

[tool.ruff.lint.isort]
lines-after-imports = 2
known-first-party = ["trl"]
"""

pytestmark = pytest.mark.skipif(
    not (Path(trl.__file__).parent / "experimental").is_dir(), reason="this TRL has no experimental trainers"
)


def contents(folder: Path) -> dict[str, str]:
    """Digest by path; what running Python leaves is not counted."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("**/*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory) -> Path:
    """What the kit needs of a checkout."""
    folder = tmp_path_factory.mktemp("trl")
    shutil.copytree(Path(trl.__file__).parent, folder / "trl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests/__init__.py", "tests/experimental/__init__.py", "examples/scripts/sft.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "docs" / "source").mkdir(parents=True)
    (folder / "docs" / "source" / "_toctree.yml").write_text(TOCTREE)
    (folder / "docs" / "source" / "paper_index.md").write_text(PAPER_INDEX)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    return folder


@pytest.fixture(scope="module")
def checkout(skeleton) -> Path:
    before = contents(skeleton)
    kit.port(skeleton)
    after = contents(skeleton)
    edited = {name for name in before if after.get(name) != before[name]}
    assert edited == {"docs/source/_toctree.yml", "docs/source/paper_index.md", "pyproject.toml"}
    return skeleton


def test_a_second_time_changes_nothing(checkout):
    before = contents(checkout)
    (checkout / "trl" / "experimental" / "spo" / "no_longer_ours.py").write_text("")
    kit.port(checkout)
    assert contents(checkout) == before


def test_every_module_is_there_under_its_new_name(checkout):
    there = checkout / "trl" / "experimental" / "spo"
    ours = {path.relative_to(ROOT / "trl_spo").as_posix() for path in (ROOT / "trl_spo").glob("**/*.py")}
    flat = set()  # as in TRL's experimental methods; only programs have a folder
    for name in ours:
        if kit.LEFT_OUT.fullmatch(name):
            continue
        folder, _, stem = name.rpartition("/")
        if folder in ("", "scripts"):
            flat.add(name)
        elif stem != "__init__.py":
            flat.add(f"{folder.removesuffix('s')}_{stem}")
    found = {path.relative_to(there).as_posix() for path in there.glob("**/*.py")}
    assert found == flat
    assert {path.name for path in (there / "accelerate_configs").iterdir()} == {
        path.name for path in (ROOT / "trl_spo" / "accelerate_configs").glob("*.yaml")
    }
    written = [*there.glob("**/*.py"), *(checkout / "tests" / "experimental" / "spo").glob("*.py")]
    written += [*(checkout / "examples").glob("**/*.*"), *(checkout / "docs").glob("**/*.*")]
    for path in written:
        assert not re.search(r"trl_spo|trl-spo|ddpo_interop", path.read_text()), path
        folders = r"experimental\.spo\.(pipelines|rewards|training|evaluation)\b|trl\.experimental\.spo/"
        assert not re.search(folders, path.read_text()), path  # neither a folder that is gone nor a path with dots
    for path in there.glob("**/*.py"):
        assert path.read_text().startswith("# Copyright 2020-2026 The HuggingFace Team."), path


def test_table_of_contents_and_paper_index(checkout):
    sections = yaml.safe_load((checkout / "docs" / "source" / "_toctree.yml").read_text())
    titles = [entry["title"] for entry in sections[-1]["sections"]]
    assert titles == [
        "Experimental Overview",
        "A2PO",
        "SDPO",
        "SPO",
        "SPO Step-aware Reward Model",
        "SSD",
        "TPO",
    ]
    assert (sections[-1]["title"], len(sections[0]["sections"])) == ("Experimental", 1)
    for entry in sections[-1]["sections"]:
        if entry["title"].startswith("SPO"):
            assert "[[autodoc]] experimental.spo." in (checkout / "docs/source" / f"{entry['local']}.md").read_text()
    index = (checkout / "docs" / "source" / "paper_index.md").read_text()
    assert re.findall(r"^## (.*)", index, flags=re.MULTILINE) == [
        "Triple Preference Optimization",
        "Step-aware Preference Optimization",
        "Distributed Training",
    ]
    listing = index.split("training_args = SPOConfig(")[1].split("\n)")[0]
    settings = dict(re.findall(r"(\w+)=([^,]+),", listing))
    assert (settings["beta"], settings["num_candidates"], settings["resample"]) == ("10.0", "4", '"random"')


def test_pages_of_the_documentation_have_no_dead_links(checkout):
    docs = checkout / "docs" / "source"
    for name in kit.PAGES:
        links = re.findall(r"\]\(([^)]*)\)", (docs / f"{name}.md").read_text())
        assert all(link.startswith(("http", "#")) or (docs / f"{link}.md").is_file() for link in links)


def test_paths_of_tests_lead_to_files_of_the_checkout(checkout):
    """
    Regression: helpers that tests start as programs were looked for in `tests/`, modules under the name `tests.x`, and
    other folders of this repository do not come along. A path or a name that is not there is found without running.
    """
    there = checkout / "tests" / "experimental" / "spo"
    for path in there.glob("*.py"):
        text = path.read_text()
        assert not re.search(
            r"""/ ["']tests["']|["']tests\.\w+["']|(from|import) (reliability|benchmarks|docs)\b""", text
        ), path
        for name in re.findall(r"""(?:with_name\(|parent / )["'](\w+\.py)["']""", text):
            assert (there / name).is_file(), (path, name)
        for name in re.findall(r"^from (tests\.[\w.]+) import", text, flags=re.MULTILINE):
            assert (checkout / name.replace(".", "/")).with_suffix(".py").is_file(), (path, name)
        for parts in re.findall(r"""(?:ROOT|root|parents\[3\])((?: / ["'][\w./]+["'])+)""", text):
            name = "/".join(re.findall(r"""["']([^"']+)["']""", parts))
            guarded = f"{name.split('/')[-1].split('.')[0].upper()}.is_file()" in text  # skipped where it is missing
            assert (checkout / name).exists() or guarded, (path, name)


def test_the_package_works_there(checkout):
    """Imports, the exact losses, a first optimizer step, and a run that saves: with the TRL that is installed."""
    tests = "tests/experimental/spo"
    names = ["test_losses.py", "test_pair_selection.py", "test_step_distribution.py"]
    names += ["test_spo_trainer.py::TestInvariants::test_first_step_has_ratio_one_and_loss_ln_two"]
    names += ["test_spo_trainer.py::TestSaving::test_full_model_loads_in_plain_diffusers"]
    # Each starts itself or a helper as a program, from the root of the checkout.
    names += [
        "test_evaluation.py::test_two_processes_share_the_prompts",
        "test_hub.py::test_a_pushed_lora_is_what_was_trained",
    ]
    names += ["test_faults.py::test_a_folder_that_belongs_to_somebody_else"]
    arguments = ["-q", "-p", "no:cacheprovider", *(f"{tests}/{name}" for name in names)]
    code = (
        f"import sys, pytest; status = pytest.main({arguments!r}); import trl, trl.experimental.spo as spo; "
        "print('PLACE', trl.__file__, spo.SPOTrainer.__module__, 'trl_spo' in sys.modules); sys.exit(status)"
    )
    environment = {**os.environ, "PYTHONPATH": str(checkout), "TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    place = next(line.split() for line in result.stdout.splitlines() if line.startswith("PLACE"))
    assert place[1:] == [str(checkout / "trl" / "__init__.py"), "trl.experimental.spo.spo_trainer", "False"]


class TestCommand:
    def test_what_is_no_checkout_is_refused(self, tmp_path, checkout):
        with pytest.raises(SystemExit, match="is no checkout of TRL: it has no pyproject.toml, trl/__init__.py"):
            kit.port(tmp_path)
        with pytest.raises(SystemExit, match="an installed package has no documentation and no tests"):
            kit.port(Path(trl.__file__).parents[1])
        assert not list(tmp_path.iterdir())

    def test_through_make(self, tmp_path):
        if shutil.which("make") is None:
            pytest.skip("there is no make")
        command = ["make", "-n", "upstream", f"TRL={tmp_path}"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert f"upstream/port_to_trl.py {tmp_path}" in result.stdout
