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
Necessity: `make docs` fails for a broken link, and passes for a page that is listed twice, an option that a page of the
command line leaves out, a formula that a browser shows as dollars, a container file that copies what is not there, or a
notebook that a reader cannot start. These are read here.
"""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trl_spo.scripts import cli, presets


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def listed(page: Path) -> list[str]:
    """The entries of a page's tables of contents, patterns written out."""
    names = []
    for body in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), flags=re.DOTALL):
        entries = [line for line in body.splitlines() if line and not line.startswith(":")]
        for entry in entries:
            pattern = entry if "*" in entry else f"{entry}"
            found = sorted(path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.glob(f"{pattern}.md"))
            names += found if "*" in entry else [entry]
    return names


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_pages_link_to_no_markdown_outside(path):
    """Regression: Sphinx takes such a link for a page of its own, finds none, and the build ends."""
    assert re.findall(r"\]\((\.\./[^)#]*\.md)", path.read_text(encoding="utf-8")) == []


def test_every_page_is_in_the_navigation_once():
    names = listed(DOCS / "index.md")
    assert len(names) == len(set(names)), "a page is listed twice"
    pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    assert set(names) == pages | {"api/index"}


def test_the_start_page_names_every_page():
    linked = re.findall(r"\]\((\w+)\.md\)", (DOCS / "index.md").read_text())
    assert set(linked) == {path.stem for path in DOCS.glob("*.md")} - {"index"}


@pytest.fixture(scope="module")
def pages():
    """The modules beside the pages that write others."""
    sys.path.insert(0, str(DOCS))
    try:
        yield importlib.import_module("command_pages"), importlib.import_module("api_pages")
    finally:
        sys.path.remove(str(DOCS))


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_page_of_a_command_has_its_options_once(command, pages):
    command_pages, _ = pages
    text = command_pages.page(command)
    shown = re.findall(r"^\| `--(\w+)` \|", text, flags=re.MULTILINE)
    parser = importlib.import_module(f"trl_spo.scripts.{cli.COMMANDS[command][0]}").make_parser()
    known = {
        action.dest
        for part in command_pages.parts_of(parser).values()
        for action in part._actions
        if action.option_strings
    }
    assert set(shown) == known
    assert command == "data" or len(shown) == len(known)  # its parts share some
    assert all(line.count(" | ") >= 2 for line in text.splitlines() if line.startswith("| `"))


def test_options_of_transformers_come_last(pages):
    command_pages, _ = pages
    text = command_pages.page("spo")
    assert text.index("`--num_candidates`") < text.index(f"## {command_pages.FURTHER}") < text.index("`--run_name`")
    assert command_pages.FURTHER not in command_pages.page("sample")


def test_pages_of_commands_that_are_gone_are_removed(pages, tmp_path):
    command_pages, _ = pages
    (tmp_path / "command_gone.md").write_text("# gone\n")
    command_pages.write(tmp_path)
    names = {f"command_{command.replace('-', '_')}.md" for command in cli.COMMANDS}
    assert {path.name for path in tmp_path.glob("*.md")} == names


def test_the_page_of_the_command_line_names_commands_and_presets():
    text = (DOCS / "cli.md").read_text()
    assert set(re.findall(r"^\| `trl-spo ([\w-]+)` \| [a-z]", text, flags=re.MULTILINE)) == {*cli.COMMANDS, "doctor"}
    for command, kinds in (("spo", ("spo", "lpo")), ("step-reward", ("step_reward", "latent_reward"))):
        row = re.search(rf"^\| `trl-spo {command}` \| `(.*)$", text, flags=re.MULTILINE)[0]
        named = re.findall(r"`(\w+)`", row)
        found = {presets.find_preset(name, kinds) for name in named}
        assert found == set(presets.named_presets(kinds).values())


# --- the API reference -----------------------------------------------------------------------------------------------


def test_the_index_says_what_every_module_is(pages):
    _, api_pages = pages
    modules = api_pages.read_modules()
    text = api_pages.index_page(modules, lambda name: f"`{name}`")
    for module in modules:
        row = re.search(rf"^\| \[([\w.]+)\]\({re.escape(module.name)}\.md\) \| (.*) \|$", text, flags=re.MULTILINE)
        assert row is not None and row[1] == module.name.removeprefix("trl_spo.")
        assert len(row[2].split()) > 2, f"{module.name} says nothing about itself"


def test_the_first_sentence_ends_where_it_ends(pages):
    _, api_pages = pages
    assert api_pages.first_sentence("What it is, of `a.b`:\nNext. More") == "What it is, of `a.b`."
    assert api_pages.first_sentence("One (see x.y\nand z). Two") == "One (see x.y and z)."
    assert api_pages.first_sentence("A | B\n\nmore") == "A \\| B."


# --- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["spo_trainer", "step_reward_trainer", "flow_models"])
def test_formulas_are_formulas(name):
    """Dollars and braces in pairs; nothing that GitHub takes for Markdown inside of a formula."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (DOCS / f"{name}.md").read_text(), flags=re.DOTALL)
    blocks = re.findall(r"^\$\$\n(.*?)\n\$\$$", text, flags=re.MULTILINE | re.DOTALL)
    assert blocks
    inline = re.findall(r"\$([^$\n]+)\$", re.sub(r"^\$\$\n.*?\n\$\$$", "", text, flags=re.MULTILINE | re.DOTALL))
    assert text.count("$") == 4 * len(blocks) + 2 * len(inline)
    for formula in (*blocks, *inline):
        assert formula.count("{") == formula.count("}") and formula.count("\\left") == formula.count("\\right")
        assert not re.search(r"\*|\\_|^\s*$", formula, flags=re.MULTILINE), formula


# --- make, containers, notebooks -------------------------------------------------------------------------------------


def test_make_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)[1].split())
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in shown.splitlines() if line.startswith("  ")} == phony


def test_torch_comes_from_the_index_that_is_named():
    command = ["make", "--dry-run", "--always-make", "demo", "TORCH_INDEX=here"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line for line in shown.splitlines() if "pip install" in line]
    assert "--index-url here" in lines[0] and "torch==" in lines[0]
    assert "--index-url" not in lines[1] and "-c constraints.txt" in lines[1]


def test_the_container_copies_what_is_there():
    text = (ROOT / "Dockerfile").read_text()
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [word for line in re.findall(r"^COPY (.*)$", text, flags=re.MULTILINE) for word in line.split()[:-1]]
    assert {"trl_spo", "examples/configs", "examples/shapes", "setup.cfg", "constraints.txt"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name.split('/')[0]}" in ignored and name not in ignored
    assert re.search(r"^FROM \S+:\d\S+$", text, flags=re.MULTILINE), "the base image has no tag"
    last_user = re.findall(r"^USER (\w+)$", text, flags=re.MULTILINE)[-1]
    assert last_user != "root" and text.index("USER") < text.index('ENTRYPOINT ["trl-spo"]')


def test_the_notebook_starts_anywhere_and_is_what_its_maker_writes():
    notebook = json.loads((ROOT / "examples" / "notebooks" / "spo_shapes.ipynb").read_text())
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    tree = ast.parse((ROOT / "examples" / "notebooks" / "make_spo_shapes.py").read_text())
    cells = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "CELLS")
    assert sources == [tuple(cell) for cell in ast.literal_eval(cells)]

    code = [text for kind, text in sources if kind == "code"]
    assert "%pip install" in code[0] and '"trl-spo"' in code[0]
    assert not any("sys.path" in text or "examples." in text for text in code)
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert outputs and not any(output["output_type"] == "error" for output in outputs)
