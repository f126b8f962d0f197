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
Necessity: documentation rots without a sound. Links, names, settings with their defaults, log keys, Python blocks and
shell commands of the pages are compared with the code, so that a change here or there that forgets the other fails.
"""

import argparse
import ast
import dataclasses
import importlib
import inspect
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from trl_spo import SPOConfig, SPOTrainer, StepRewardConfig, StepRewardTrainer, flow_step_stats
from trl_spo.evaluation.evaluate import PROTOCOLS
from trl_spo.evaluation.metrics import METRICS
from trl_spo.scripts import cli


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = {page: page.relative_to(ROOT).as_posix() for page in PAGES}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", read(page))


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in one of the languages."""
    return [inspect.cleandoc("\n" + code) for _, language, code in FENCE.findall(read(page)) if language in languages]


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub (and MyST) make of the headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)", prose(page), flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        repeats = sum(other == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", other) is not None for other in found)
        found.append(f"{slug}-{repeats}" if repeats else slug)
    return set(found)


every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES.values())


# --- links -----------------------------------------------------------------------------------------------------------


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{NAMES[page]} links to {target}, which does not exist"
        assert file == ROOT or ROOT in file.parents, f"{NAMES[page]} links to {target}, outside the repository"
        if anchor:
            assert anchor in anchors(file), (
                f"{NAMES[page]} links to {target}; the headings are {sorted(anchors(file))}"
            )


@every_page
def test_named_links_are_defined_and_used(page):
    text = prose(page)
    defined = set(re.findall(r"^\[([\w-]+)\]: \S+$", text, flags=re.MULTILINE))
    assert defined == set(re.findall(r"\]\[([\w-]+)\]", text))


def test_every_page_can_be_found_from_the_readme():
    linked = set(re.findall(r"\]\(docs/(\w+)\.md", read(ROOT / "README.md")))
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} <= linked


# --- names -----------------------------------------------------------------------------------------------------------


def words_of_the_code() -> set[str]:
    """Every identifier in the sources, words of strings and docstrings included."""
    folders = ("trl_spo", "examples", "benchmarks", "reliability")
    files = [path for folder in folders for path in (ROOT / folder).glob("**/*.py")]
    files += [ROOT / "tests" / "testing_utils.py", ROOT / "tests" / "test_imports.py", ROOT / "docs" / "api_pages.py"]
    configs = [*(ROOT / "examples" / "configs").glob("*.yaml"), *(ROOT / "trl_spo").glob("**/*.yaml")]
    files += configs
    names = {part for path in configs for part in (path.stem, path.stem.partition("_")[2])}
    return names | {word for path in files for word in re.findall(r"[A-Za-z_]\w*", read(path))}


WORDS = words_of_the_code()
OF_OTHERS = {  # names of other libraries that appear in the pages and nowhere in the code
    *dir(TrainingArguments),
    *"fuse_lora unload_lora_weights set_adapters convert_state_dict_to_kohya image_samples_hook".split(),
    *"gather_tensor_with_diff_shape spm_task spm_criterion compare_funcs ddim_with_logprob".split(),
    *"multi_sample_pipeline pick_a_pic_spm_dataset step_aware_preference_model time_conditioned_clip".split(),
    "validation_unique",  # a split of Pick-a-Pic
}


@every_page
def test_names_in_backticks_exist(page):
    """snake_case names, with or without a value; options; dotted names of the package."""
    missing = []
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page)):
        if match := re.fullmatch(r"trl_spo((?:\.\w+)*)", span):
            try:
                resolve(match[0])
            except (AttributeError, ImportError):
                missing.append(span)
        elif match := re.fullmatch(r"(?:--)?([a-z][a-z0-9]*(?:_[a-z0-9]+)+)(?:[=(. ].*)?", span):
            name = match[1].removeprefix("eval_")  # the prefix of what an evaluation logs
            if not {match[1], name, f"_{name}"} & (WORDS | OF_OTHERS):
                missing.append(span)
    assert not missing, f"{NAMES[page]} names {missing}, which the code does not have"


def resolve(dotted: str):
    """The object behind a dotted name of the package."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            value = getattr(value, part)
        return value
    raise ImportError(dotted)


# --- settings, log keys, names of metrics ----------------------------------------------------------------------------


def own_defaults(config: type) -> dict[str, object]:
    """Name -> default of the fields that a config adds to `TrainingArguments`."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {
        field.name: field.default_factory() if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(config)
        if field.name not in inherited and field.init
    }


def documented_settings(page: Path) -> dict[str, object]:
    """Name -> default, from the tables with the columns setting, default and meaning."""
    found = {}
    for table in re.findall(r"^\| setting \| default \| meaning \|\n\|---.*\n((?:\|.*\n)+)", read(page), flags=re.M):
        for row in table.splitlines():
            names, defaults = (re.findall(r"`([^`]+)`", cell) for cell in row.split(" | ")[:2])
            defaults = defaults * len(names) if len(defaults) == 1 else defaults
            found |= {name: ast.literal_eval(value) for name, value in zip(names, defaults, strict=True)}
    return found


@pytest.mark.parametrize("name, config", [("spo_trainer", SPOConfig), ("step_reward_trainer", StepRewardConfig)])
def test_settings_and_their_defaults(name, config):
    page = ROOT / "docs" / f"{name}.md"
    assert documented_settings(page) == own_defaults(config)
    stated = re.findall(r"`(\w+)=([^`]+)`", read(page).split("Defaults that differ from there:")[1].split("\n\n")[0])
    differing = {
        field.name: field.default
        for field in dataclasses.fields(config)
        if field.name not in own_defaults(config)
        and field.default != TrainingArguments.__dataclass_fields__[field.name].default
        and not isinstance(field.default, dataclasses._MISSING_TYPE)
    }
    assert {key: ast.literal_eval(value) for key, value in stated} == differing


def first_cells(page: Path, heading: str) -> set[str]:
    """Code spans of the first column of the tables under a heading."""
    section = re.split(r"^## ", read(page).split(f"\n## {heading}\n")[1], flags=re.MULTILINE)[0]
    return {
        span for cell in re.findall(r"^\| (.*?) \|", section, flags=re.M) for span in re.findall(r"`([^`]+)`", cell)
    }


def added_metrics(trainer: type, more: str = "") -> set[str]:
    """Names under which a trainer, and what both trainers are, add to their metrics; `more` has to follow the name."""
    sources = [
        read(ROOT / "trl_spo" / f"{name}.py") for name in (trainer.__module__.partition(".")[2], "training/base")
    ]
    if trainer is SPOTrainer:
        sources.append(read(ROOT / "trl_spo" / "training" / "pair_metrics.py").replace("self.add(", "_metrics.add("))
    found = {
        key for source in sources for key in re.findall(rf"(?:means|_metrics)\.add\(f?\"([^\"]+)\"{more}", source)
    }
    return found | {trainer._nonfinite_metric}


def test_log_keys_of_spo():
    """What the trainer adds to its metrics, what the pages define."""
    source = read(ROOT / "trl_spo" / "spo_trainer.py")
    logged = {re.sub(r"\{low\}_\{.*\}", "{lo}_{hi}", key) for key in added_metrics(SPOTrainer)}
    logged |= set(re.findall(r"logs\[\"(\w+)\"\] = self", source))
    assert {"kl", "pairs/valid_fraction_t_{lo}_{hi}", "num_pairs_seen", "time/train"} <= logged  # were found at all
    defined = first_cells(ROOT / "docs" / "spo_trainer.md", "Logged metrics")
    of_the_trainer = {"grad_norm", "learning_rate", "epoch"}
    assert defined == logged - {"reward_square"} | {"reward_std"} | of_the_trainer


def test_log_keys_of_the_reward_model():
    counts = added_metrics(StepRewardTrainer, ', .*reduce="sum"')
    logged = {name for name in added_metrics(StepRewardTrainer) if "{" not in name} - counts
    assert {"accuracy", "margin", "caption_loss"} <= logged
    defined = first_cells(ROOT / "docs" / "step_reward_trainer.md", "Logged metrics")
    evaluated = {f"eval_{name}" for name in logged - {"preference_loss", "caption_loss"}}
    ranges = {"accuracy/t_{lo}_{hi}", "eval_accuracy/t_{t}"}
    assert len(counts) == 2
    assert defined == logged | evaluated | ranges | counts | {
        "loss",
        "eval_loss",
        "grad_norm",
        "learning_rate",
        "epoch",
    }


def test_metrics_protocols_and_modules_are_listed():
    evaluation = ROOT / "docs" / "evaluation.md"
    assert first_cells(evaluation, "Protocols") == set(PROTOCOLS)
    assert set(METRICS) <= first_cells(evaluation, "Metrics")
    listed = first_cells(ROOT / "CONTRIBUTING.md", "The house")
    package = ROOT / "trl_spo"
    modules = {path.relative_to(package).with_suffix("").as_posix() for path in package.rglob("*.py")}
    assert listed == {name for name in modules if "__init__" not in name and "scripts/" not in name} | {"scripts/"}


# --- Python blocks ---------------------------------------------------------------------------------------------------


@every_page
def test_python_blocks_fit_the_package(page):
    """They compile, their imports from the package exist, and so do the arguments of what they call."""
    known = {}
    for code in blocks(page, "python"):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "trl_spo":
                module = importlib.import_module(node.module)
                known |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (function := called(node.func, known)) is not None:
                positional = [None] * len(node.args)
                inspect.signature(function).bind_partial(*positional, **{k.arg: None for k in node.keywords if k.arg})


def called(node: ast.expr, known: dict):
    """The imported object that a call names, `Name(...)` or `Name.method(...)`."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
        return getattr(known[node.value.id], node.attr)
    return None


def test_the_flow_step_of_the_page_is_the_one_of_the_package():
    """The formula of DDIM in words, at the sigmas of the page's code, and what the page says of its noise."""
    (code,) = [code for code in blocks(ROOT / "docs" / "new_model_family.md", "python") if "flow_step_stats(" in code]
    names = {}
    exec(code, names)
    t, next_t, x, v = 0.8, 0.7, names["sample"], names["velocity"]
    s = next_t / t * math.sqrt(t**2 - ((1 - t) / (1 - next_t)) ** 2 * next_t**2)
    k = math.sqrt(next_t**2 - s**2)
    torch.testing.assert_close(names["x_0"], x - t * v)
    torch.testing.assert_close(names["mean"], (1 - next_t) * (x - t * v) + k * (x + (1 - t) * v))
    assert names["std"].item() == pytest.approx(s, rel=1e-6)
    # At t = 1 it has no pole and replaces all noise; at t' = 0 it leaves none.
    assert flow_step_stats(v, 1.0, 0.9, x).std_dev_t.item() == pytest.approx(0.9)
    assert flow_step_stats(v, 0.2, 0.0, x).std_dev_t.item() == 0


# --- shell blocks ----------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[list[str]]:
    """The commands of the shell blocks, as words."""
    found = []
    for code in blocks(page, "shell", "bash", "sh"):
        for line in code.replace("\\\n", " ").splitlines():
            for command in re.split(r" && | ; ", line):
                words = shlex.split(command, comments=True)
                found += [words] if words else []
    return found


def options_of(script: Path) -> set[str] | None:
    """Options of a program with `argparse` that names them as literals."""
    found = {
        node.args[0].value
        for node in ast.walk(ast.parse(read(script)))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add_argument"
        and isinstance(node.args[0], ast.Constant)
    }
    return found or None


@pytest.fixture(scope="module")
def parsers() -> dict[str, argparse.ArgumentParser]:
    return {
        name: importlib.import_module(f"trl_spo.scripts.{module}").make_parser()
        for name, (module, _, _) in cli.COMMANDS.items()
    }


def options_of_parser(parser: argparse.ArgumentParser) -> set[str]:
    """Its options, and those of its subcommands."""
    options = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            options |= {name for command in action.choices.values() for name in command._option_string_actions}
    return options


LAUNCHER = {"--config", "--accelerate_config", "--num_processes", "--config_file"}
LAUNCHER |= {"--max_restarts", "--rdzv_backend", "--main_process_ip", "--num_machines"}
LAUNCHER |= {"--dry_run", "--card_memory", "--json"}  # of `trl-spo doctor`
MADE = {"validation.txt", "prompts.txt", "train.txt", "heldout.txt"}  # by the reader
MADE |= {"demo_output/train.txt", "demo_output/heldout.txt"}  # by the demo


@every_page
def test_shell_commands_exist(page, parsers):
    """Programs, subcommands, targets, files and options."""
    targets = re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), flags=re.MULTILINE)
    for words in commands(page):
        words = [Path(words[0]).name if ".venv" in words[0] else words[0], *words[1:]]
        options = None
        if words[0] == "make":
            assert words[1] in targets, f"{NAMES[page]}: there is no target in {words}"
        elif words[0] == "trl-spo":
            words = [words[0], *words[2:]] if words[1] == "doctor" else words  # it takes the arguments of a command
            assert words[1] in parsers, f"{NAMES[page]}: there is no command in {words}"
            options = options_of_parser(parsers[words[1]]) | LAUNCHER
        else:
            scripts = [word for word in words if word.endswith(".py")]
            for script in scripts:
                assert (ROOT / script).is_file(), f"{NAMES[page]}: {script} does not exist"
            if scripts and scripts[0].startswith("benchmarks/") or scripts and "shapes" in scripts[0]:
                options = options_of(ROOT / scripts[0])
            elif scripts and scripts[0].startswith("examples/scripts/"):
                name = {"step_reward.py": "step-reward", "evaluate.py": "evaluate"}.get(Path(scripts[0]).name, "spo")
                options = set(parsers[name]._option_string_actions) | LAUNCHER
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert options is None or given <= options, f"{NAMES[page]}: {given - options} are no options of {words}"
        for word in words:
            if word.startswith(("examples/", "trl_spo/", "docs/", "benchmarks/", "tests/")):
                assert (ROOT / word).exists() or not Path(word).suffix, f"{NAMES[page]}: {word} does not exist"
            elif word.endswith(".txt") and words[0] == "trl-spo":
                assert word in MADE, f"{NAMES[page]}: nothing says where {word} comes from"


# --- the API reference -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def api_pages():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        yield importlib.import_module("api_pages")
    finally:
        sys.path.remove(str(ROOT / "docs"))


def test_the_api_reference_has_the_public_names(api_pages, tmp_path):
    index = api_pages.write(tmp_path)
    assert {"SPOTrainer", "stepwise_rollout"} <= set(api_pages.public_names()) <= set(index)
    page = read(tmp_path / "trl_spo.spo_config.md")
    assert all(f"**`{name}`**" in page for name in own_defaults(SPOConfig))  # each setting is an entry of its own
    for path in tmp_path.glob("*.md"):
        assert not re.search(r"\[`~?[A-Za-z_.]+`\](?!\()", FENCE.sub("", read(path))), path.name


def test_docstrings_become_markdown(api_pages):
    doc = """Does [`it`].

    Args:
        x (`int`, *optional*, defaults to `1`):
            First line,
            second line.
        y, z: both.

    > [!NOTE]
    > Mind this.

    ```python
    >>> f(1)
    ... # more
    ```
    """
    lines = api_pages.to_markdown(doc, lambda name: f"<{name}>")
    text = re.sub(r"\n{2,}", "\n", "\n".join(lines)).strip()
    assert text.split("\n") == [
        "Does <it>.",
        "**Args**",
        "- **`x`** (`int`, *optional*, defaults to `1`):",
        "  First line,",
        "  second line.",
        "- **`y, z`**: both.",
        ":::{note}",
        "Mind this.",
        ":::",
        "```python",
        "f(1)",
        "# more",
        "```",
    ]


def test_a_reference_to_nothing_is_an_error(api_pages):
    resolve = api_pages.resolver(api_pages.build_index(api_pages.read_modules()))
    assert resolve("~SPOTrainer.evaluate") == "{py:obj}`evaluate <trl_spo.spo_trainer.SPOTrainer.evaluate>`"
    assert resolve("SPOTrainer.save_model") == "`SPOTrainer.save_model`"  # inherited
    with pytest.raises(ValueError, match="SPOTrainer.fly"):
        resolve("SPOTrainer.fly")
