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
Copy this project into a checkout of TRL as `trl.experimental.spo`, with tests, documentation and examples, in the places
and forms that TRL's experimental trainers have. See `README.md` beside this file.

```bash
python upstream/port_to_trl.py path/to/trl
```

Running it again brings the copy up to date and changes nothing else. Folders are flattened by one rule, imports are
rewritten and siblings stay relative; if ruff
is there, it sorts and formats the result by the settings of the checkout.
"""

import argparse
import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "trl.experimental.spo"
LICENSE = "# Copyright 2026 The trl_spo authors.\n"
TRL_LICENSE = "# Copyright 2020-2026 The HuggingFace Team. All rights reserved.\n"
PACKAGE_PATH = "trl/experimental/spo"
# TRL's experimental methods are flat: `pipelines/flux.py` here is `pipeline_flux.py` there. Programs keep their folder.
FOLDERS = {"pipelines": "pipeline", "rewards": "reward", "training": "training", "evaluation": "evaluation"}
# TRL has no DDPO any more, and its own command line, without which there is no doctor; the shapes world stays here.
LEFT_OUT = re.compile(r"ddpo_interop\.py|scripts/(cli|demo|doctor)\.py|checkup/.*|training/memory_plan\.py")
# A test that reads the rest of this repository, or asks about what is left out, stays here.
STAYS = re.compile(
    r"ddpo_interop|DDPOTrainer|scripts import (cli|doctor)|scripts\.(cli|doctor)|\bcheckup\b|memory_plan|setup\.cfg|constraints\.txt|Makefile|test_imports"
    r"|[\"']examples[\"']|[\"']docs[\"']|[\"']benchmarks[\"']|(from|import) (benchmarks|examples|reliability)\b|[\"']upstream[\"']"
)
EXAMPLES = {  # here -> there
    "spo.py": "spo.py",
    "spo_sdxl.py": "spo_sdxl.py",
    "step_reward.py": "spo_step_reward.py",
    "evaluate.py": "spo_evaluate.py",
}
PAGES = {  # page -> title in the table of contents, and the classes it documents
    "spo_trainer": ("SPO", ("SPOTrainer", "SPOConfig")),
    "step_reward_trainer": (
        "SPO Step-aware Reward Model",
        ("StepRewardTrainer", "StepRewardConfig", "StepAwareRewardModel"),
    ),
}
# Dependencies of ours that TRL does not have already, for an extra of its own.
EXTRA = ("diffusers", "matplotlib", "peft", "pillow", "scipy")


def check_checkout(checkout: Path) -> None:
    """
    Raises:
        SystemExit: if this is no checkout of TRL; says what is missing.
    """
    expected = ["pyproject.toml", "trl/__init__.py", "trl/experimental/__init__.py", "tests/experimental/__init__.py"]
    expected += ["docs/source/_toctree.yml", "docs/source/paper_index.md", "examples/scripts"]
    missing = [name for name in expected if not (checkout / name).exists()]
    if missing:
        raise SystemExit(
            f"{str(checkout)!r} is no checkout of TRL: it has no {', '.join(missing)}. Clone the repository "
            "(`git clone https://github.com/huggingface/trl`) and pass its folder; an installed package has no "
            "documentation and no tests."
        )


# --- text ------------------------------------------------------------------------------------------------------------


def flat_name(path: str) -> str:
    """`pipelines/flux.py` -> `pipeline_flux.py`: the folder in the singular, before the name. Others stay as they are."""
    folder, _, name = path.partition("/")
    return f"{FOLDERS[folder]}_{name}" if folder in FOLDERS else path


def flatten_imports(text: str, folder: str = "") -> str:
    """
    Relative imports of a module in `folder` ("" for the package itself), and dotted names such as
    `trl_spo.pipelines.flux`, as they read where the folders are gone.
    """
    names = "|".join(FOLDERS)
    if folder in FOLDERS:  # `.base` is a neighbour in the folder, `..losses` one of the package
        text = re.sub(r"(?m)^(\s*from )\.(\w+) import", rf"\1.{FOLDERS[folder]}_\2 import", text)
        text = re.sub(r"(?m)^(\s*from )\.\.", r"\1.", text)
    text = re.sub(rf"(?m)^(\s*from \.+)({names})\.(\w+) import", _flat_dotted, text)
    return re.sub(rf"\b(trl_spo\.)({names})\.(\w+)", _flat_dotted, text)


def _flat_dotted(match: re.Match) -> str:
    rest = match[0][match.end(3) - match.start(0) :]
    return f"{match[1]}{FOLDERS[match[2]]}_{match[3]}{rest}"


def rewrite(text: str) -> str:
    """Names, commands and paths of this project, as they are called in TRL."""
    text = flatten_imports(text.replace(LICENSE, TRL_LICENSE))
    text = re.sub(r"\bfrom tests\.", "from tests.experimental.spo.", text)
    text = re.sub(r"\btrl-spo (spo|step-reward|evaluate|sample|label|data)\b", _command, text)
    text = text.replace("trl-spo[", "trl[").replace('"trl-spo"', '"trl"')
    # A path stays a path: `trl_spo/...`, and "trl_spo" beside a slash that joins paths.
    text = re.sub(rf"\btrl_spo/({'|'.join(FOLDERS)})/(\w+)", lambda m: f"{PACKAGE_PATH}/{FOLDERS[m[1]]}_{m[2]}", text)
    text = re.sub(r"\btrl_spo/", f"{PACKAGE_PATH}/", text)
    text = re.sub(r"(?<=/ \")trl_spo(?=\")", PACKAGE_PATH, text)
    text = re.sub(r"\btrl_spo\b", PACKAGE, text)
    for name, other in EXAMPLES.items():
        text = text.replace(f"examples/scripts/{name}", f"examples/scripts/{other}")
    text = text.replace("examples/configs/", "examples/cli_configs/")
    text = text.replace('parents[1] / "configs"', 'parents[1] / "cli_configs"')
    # From a test up to the root: tests/test_x.py here, tests/experimental/spo/test_x.py there.
    text = text.replace("Path(__file__).parents[1]", "Path(__file__).parents[3]")
    return text.replace("script.parent.parent", "script.parents[3]")


def _command(match: re.Match) -> str:
    return f"python -m {PACKAGE}.scripts.{match[1].replace('-', '_')}"


def page(name: str) -> str:
    """A documentation page with TRL's API section; pictures and links into this repository are left out."""
    text = rewrite((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")).split("\n## API\n")[0].rstrip()
    text = re.sub(r"^!\[[^\]]*\]\((?!https?:)[^)]*\)\n?", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\((?!https?:|#)([^)]*)\)", _link, text)
    sections = []
    for documented in PAGES[name][1]:
        entry = f"## {documented}\n\n[[autodoc]] experimental.spo.{documented}\n"
        if documented.endswith("Trainer"):
            entry += "    - train\n    - save_model\n    - push_to_hub\n"
        sections.append(entry)
    return text + "\n\n" + "\n".join(sections)


def _link(match: re.Match) -> str:
    name = Path(match[2].split("#")[0]).stem
    return f"[{match[1]}]({name})" if name in PAGES else match[1]


def add_to_toctree(text: str) -> str:
    """`_toctree.yml` with our pages in the experimental section, in the order of the titles."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if "local: experimental_overview" in line), None)
    if start is None:
        raise SystemExit("`_toctree.yml` has no `experimental_overview`; add the pages by hand: " + ", ".join(PAGES))
    for name, (title, _) in PAGES.items():
        if any(re.search(rf"local: {name}\b", line) for line in lines):
            continue
        row = start + 2
        while row < len(lines) and (match := re.match(r"  - local: (\S+)", lines[row])):
            other = re.match(r"    title: (.*)", lines[row + 1])
            if match and other and other[1].casefold() > title.casefold():
                break
            row += 2
        lines[row:row] = [f"  - local: {name}", f"    title: {title}"]
    return "\n".join(lines) + "\n"


def paper_section() -> str:
    """The entry of `paper_index.md`; its settings are read from the preset, with their sources."""
    settings = []
    for line in (ROOT / "examples" / "configs" / "spo_sd15.yaml").read_text(encoding="utf-8").splitlines():
        match = re.match(r"(\w+): ([^#]*?)\s*#\s*(.*)$", line)
        named = match and not match[1].startswith("lora_") and not match[1].endswith("_name_or_path")
        if named and "[paper]" in match[3]:
            value = match[2] if re.fullmatch(r"[\d.e+-]+", match[2]) else f'"{match[2]}"'
            comment = _from_the_paper(match[3])
            settings.append(f"    {match[1]}={value}," + (f"  # {comment}" if comment else ""))
    listing = "\n".join(settings)
    return f"""## Step-aware Preference Optimization

Papers relating to the [`experimental.spo.SPOTrainer`]

### Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step Preference Optimization

**📜 Paper**: https://huggingface.co/papers/2406.04314

Introduces Step-aware Preference Optimization (SPO), a preference learning method for diffusion models. At each denoising step a set of candidates is drawn from the same latent, a step-aware reward model picks the best and the worst, and the pair is trained on with a clipped preference loss; a random candidate goes on to the next step. Used in TRL via [`experimental.spo.SPOTrainer`]; its reward model is trained with [`experimental.spo.StepRewardTrainer`]. To reproduce the paper's setting (Stable Diffusion 1.5), use this configuration:

```python
from trl.experimental.spo import SPOConfig

training_args = SPOConfig(
{listing}
)
```
"""


def _from_the_paper(comment: str) -> str:
    """What a comment of the preset says about the paper: the words beside `[paper]`, up to the next source."""
    before, after = (part.strip() for part in comment.split("[paper]", 1))
    return re.split(r",? *\[code|\. |;", after)[0].strip(" .,") or re.split(r"[;:]|\[code", before)[-1].strip(" .,")


def add_to_paper_index(text: str) -> str:
    """`paper_index.md` with our section after the other preference methods, or at the end; an older one is replaced."""
    section = paper_section()
    own = re.compile(r"^## Step-aware Preference Optimization\n.*?(?=^## |\Z)", flags=re.MULTILINE | re.DOTALL)
    if own.search(text):
        last = own.search(text).end() == len(text)
        return own.sub(lambda _: section if last else section + "\n", text)
    for title in ("Triple Preference Optimization", "Contrastive Preference Optimization"):
        before = re.search(rf"^## {title}\n.*?(?=^## )", text, flags=re.MULTILINE | re.DOTALL)
        if before:
            return text[: before.end()] + section + "\n" + text[before.end() :]
    return text.rstrip() + "\n\n" + section


def add_extra(text: str) -> str:
    """`pyproject.toml` with an extra `diffusers`, at our lower bounds."""
    if re.search(r"^diffusers = \[", text, flags=re.MULTILINE):
        return text
    heading = "[project.optional-dependencies]\n"
    if heading not in text:
        raise SystemExit(
            "`pyproject.toml` has no optional dependencies; the extra for diffusers must be added by hand."
        )
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    requirements = config["options"]["install_requires"].split() + config["options.extras_require"]["eval"].split()
    bounds = [line for line in requirements if re.split(r"[<>=!~]", line)[0] in EXTRA]
    extra = "diffusers = [\n" + "".join(f'    "{bound}",\n' for bound in bounds) + "]\n"
    return text.replace(heading, heading + extra, 1)


# --- files -----------------------------------------------------------------------------------------------------------


def package_files() -> dict[str, str]:
    """Path in the checkout -> text, for the package."""
    source, files = ROOT / "trl_spo", {}
    for path in sorted(source.glob("**/*.py")):
        name = path.relative_to(source).as_posix()
        if LEFT_OUT.fullmatch(name):
            continue
        folder = name.rpartition("/")[0]
        if folder in FOLDERS and path.name == "__init__.py":  # of a folder that is gone there
            continue
        text = flatten_imports(path.read_text(encoding="utf-8"), folder)
        if name == "__init__.py":
            text = "".join(line for line in text.splitlines(keepends=True) if "ddpo_interop" not in line)
            text = re.sub(rf'"({"|".join(FOLDERS)})\.(\w+)":', lambda m: f'"{FOLDERS[m[1]]}_{m[2]}":', text)
        if name == "scripts/__init__.py":
            text = re.sub(r",? and the console command.*?starts\s+them", "", text, flags=re.DOTALL)
        files[f"{PACKAGE_PATH}/{flat_name(name)}"] = rewrite(text)
    # Configurations of accelerate, and the page for labelling.
    for path in sorted([*source.glob("**/*.yaml"), *source.glob("label_page/*")]):
        files[f"{PACKAGE_PATH}/{path.relative_to(source).as_posix()}"] = path.read_text(encoding="utf-8")
    return files


def test_files() -> tuple[dict[str, str], list[str]]:
    """Path in the checkout -> text, for the tests; and the names of those that stay here."""
    files, stay = {}, []
    for path in sorted((ROOT / "tests").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name.startswith("test_") and STAYS.search(text):
            stay.append(path.name)
        else:
            files[f"tests/experimental/spo/{path.name}"] = rewrite(text)
    for path in sorted((ROOT / "tests" / "references").glob("*.json")):
        files[f"tests/experimental/spo/references/{path.name}"] = path.read_text(encoding="utf-8")
    return files, stay


def example_files() -> dict[str, str]:
    """Path in the checkout -> text, for scripts and their configurations."""
    files = {}
    for name, other in EXAMPLES.items():
        text = (ROOT / "examples" / "scripts" / name).read_text(encoding="utf-8")
        text = text.replace('"trl-spo"', '"trl[diffusers]"')
        files[f"examples/scripts/{other}"] = rewrite(text)
    for path in sorted((ROOT / "examples" / "configs").glob("*.yaml")):
        files[f"examples/cli_configs/{path.name}"] = rewrite(path.read_text(encoding="utf-8"))
    return files


def tidy(checkout: Path, paths: list[Path]) -> bool:
    """Sort imports and format with ruff, by the settings of the checkout; `False` if there is no ruff."""
    beside = Path(sys.executable).with_name("ruff")
    ruff = str(beside) if beside.is_file() else shutil.which("ruff")
    if ruff is None:
        return False
    names = [str(path) for path in paths if path.suffix == ".py"]
    subprocess.run(
        [ruff, "check", "--quiet", "--no-cache", "--select", "I", "--fix", *names], cwd=checkout, check=True
    )
    subprocess.run([ruff, "format", "--quiet", "--no-cache", *names], cwd=checkout, check=True)
    return True


def port(checkout: Path) -> list[str]:
    """
    Write everything into a checkout of TRL.

    Args:
        checkout (`Path`): its root.

    Returns:
        `list[str]`: the names of the tests that stay here.

    Raises:
        SystemExit: if it is no checkout of TRL; nothing is written then.
    """
    check_checkout(checkout)
    docs = checkout / "docs" / "source"
    tests, stay = test_files()
    changed = {  # made before anything is written: each may refuse
        docs / "_toctree.yml": add_to_toctree((docs / "_toctree.yml").read_text(encoding="utf-8")),
        docs / "paper_index.md": add_to_paper_index((docs / "paper_index.md").read_text(encoding="utf-8")),
        checkout / "pyproject.toml": add_extra((checkout / "pyproject.toml").read_text(encoding="utf-8")),
    }
    files = {checkout / name: text for name, text in (package_files() | tests | example_files()).items()}
    files |= {docs / f"{name}.md": page(name) for name in PAGES}
    for folder in (PACKAGE_PATH, "tests/experimental/spo"):  # what was ported before and is no more
        shutil.rmtree(checkout / folder, ignore_errors=True)
    for path, text in (files | changed).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if not tidy(checkout, list(files)):
        print("ruff is not installed: run `make precommit` in the checkout.")
    return stay


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="root of a checkout of TRL")
    checkout = parser.parse_args().checkout.resolve()
    stay = port(checkout)
    print(f"Written to {checkout}: trl/experimental/spo, tests/experimental/spo, docs/source, examples.")
    print(f"Tests that stay here: {', '.join(stay)}.")
    print(f"To check: cd {checkout} && python -m pytest tests/experimental/spo && git status")


if __name__ == "__main__":
    main()
