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
Mutation testing of the pure modules and of `evaluation.statistics`: change one thing in a function, run the tests
that reach the function, and expect one of them to fail. A change that no test notices is a survivor; a survivor is a
missing test, or a change that cannot be noticed, and then `surviving_mutants.json` says why.

    make mutation

runs it on a copy of the tree in a temporary folder. The mutants come from [mutmut](https://mutmut.readthedocs.io) 3,
which writes all mutants of a function beside it and forks a process per mutant after torch has been imported, so that a
mutant costs a tenth of a second (a tool that starts Python for each mutant needs three seconds for the import alone).
Its operators: another arithmetic, comparison or boolean operator, numbers + 1, strings (but not those of an error
message), arguments removed or replaced by None, a name bound to None, one branch of a conditional expression. To these
this script adds numbers - 1, neighbouring arguments swapped, a method call removed (`x.detach()` to `x`), a reduction
replaced by its sibling (`argmax` to `argmin`), the condition of an `if` made constant, a raise or a call for its effect
deleted, and a return value dropped.

The exit status is 0 only if every survivor has an explanation and every explanation still belongs to a survivor.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
EXPLANATIONS = Path(__file__).resolve().parent / "surviving_mutants.json"
STATISTICS_TESTS = (  # those that sample no images
    "mean_and_standard_error_by_hand images_of_one_prompt_are_one_observation mean_interval_has_students_quantiles "
    "mean_interval_by_hand_and_by_counting wilson_interval_by_hand paired_statistics_by_hand"
).split()
MODULES = {  # module -> its test files, and the functions to mutate if not all of them
    "losses": (["tests/test_losses.py"], None),
    "pair_selection": (["tests/test_pair_selection.py"], None),
    "step_distribution": (["tests/test_step_distribution.py"], None),
    "scheduling_ddim": (["tests/test_scheduling_ddim.py"], None),
    "evaluation.statistics": (
        [*(f"tests/test_evaluation.py::test_{name}" for name in STATISTICS_TESTS), "tests/test_statistics.py"],
        "mean_and_se prompt_means mean_interval wilson_interval _check_confidence paired_statistics".split(),
    ),
}
KILLED = ("killed", "timeout", "segfault")
SIBLINGS = {
    "argmax": "argmin",
    "argmin": "argmax",
    "maximum": "minimum",
    "minimum": "maximum",
    "max": "min",
    "min": "max",
    "mean": "sum",
    "sum": "mean",
    "log1p": "log",
    "any": "all",
    "all": "any",
}
SYMMETRIC = ("maximum", "minimum", "max", "min", "promote_types")  # swapping their arguments is no change
LIBRARIES = ("torch", "math", "F")  # `torch.clamp(x)` is a function: there is no call to leave out


def add_operators() -> None:
    """Extend mutmut's list of operators, and keep it away from the text of error messages."""
    import libcst as cst
    from mutmut.mutation import file_mutation, mutators

    # Operators that mutmut does not have.
    def smaller_number(node):
        if isinstance(node, cst.Integer) and node.evaluated_value > 0:
            yield node.with_changes(value=repr(node.evaluated_value - 1))

    def swapped_arguments(node):
        for i in range(len(node.args) - 1):
            first, second = node.args[i : i + 2]
            name = getattr(getattr(node.func, "attr", node.func), "value", "")
            if name in SYMMETRIC or first.value.deep_equals(second.value):
                continue
            if not (first.keyword or second.keyword or first.star or second.star):
                swapped = [first.with_changes(value=second.value), second.with_changes(value=first.value)]
                yield node.with_changes(args=[*node.args[:i], *swapped, *node.args[i + 2 :]])

    def removed_method_call(node):
        function = node.func
        if isinstance(function, cst.Attribute):
            if not (isinstance(function.value, cst.Name) and function.value.value in LIBRARIES):
                yield function.value

    def sibling_reduction(node):
        name = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
        if isinstance(name, cst.Name) and name.value in SIBLINGS:
            yield node.with_deep_changes(name, value=SIBLINGS[name.value])

    def constant_condition(node):
        for value in ("True", "False"):
            yield node.with_changes(test=cst.Name(value))

    def deleted(node):
        if isinstance(node, cst.Raise) or isinstance(node.value, cst.Call):
            yield cst.Pass()

    def dropped_return(node):
        if node.value is not None:
            yield node.with_changes(value=cst.Name("None"))

    mutators.mutation_operators += [
        (cst.Integer, smaller_number),
        (cst.Call, swapped_arguments),
        (cst.Call, removed_method_call),
        (cst.Call, sibling_reduction),
        (cst.If, constant_condition),
        (cst.Raise, deleted),
        (cst.Expr, deleted),
        (cst.Return, dropped_return),
    ]

    # Error messages are not mutated.
    visit = file_mutation.MutationVisitor._skip_node_and_children

    def skip(self, node):
        if isinstance(node, cst.Raise):  # whether it is raised matters, its wording does not
            self._create_mutations(node)
            return True
        return visit(self, node)

    file_mutation.MutationVisitor._skip_node_and_children = skip


def run_mutmut(names: list[str], jobs: int) -> None:
    """In the copied tree: create and try the mutants whose names match, and write `results.json`."""
    import mutmut.__main__ as mutmut
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code

    add_operators()
    mutmut._run(names, jobs)
    results = []
    tried, _ = mutmut.collect_source_file_mutation_data(mutant_names=names)
    for data, name, exit_code in tried:
        diff = get_diff_for_mutant(name, path=data.path).splitlines()[3:]
        results.append(
            {
                "module": ".".join(Path(data.path).with_suffix("").parts[1:]),  # below `trl_spo`
                "function": mutmut.mangled_name_from_mutant_name(name).rpartition(".")[2].removeprefix("x_"),
                "original": " ".join(line[1:].strip() for line in diff if line[0] == "-"),
                "mutant": " ".join(line[1:].strip() for line in diff if line[0] == "+"),
                "status": status_by_exit_code[exit_code],
            }
        )
    Path("results.json").write_text(json.dumps(results))


def make_tree(folder: Path, modules: list[str], extra_tests: list[str]) -> list[str]:
    """Copy package and tests to `folder`, configure mutmut there, and return the patterns of the mutants' names."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "trl_spo", folder / "trl_spo", ignore=ignore)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignore)
    tests = sorted({test for module in modules for test in MODULES[module][0]}) + extra_tests
    quoted = {
        "source_paths": ["trl_spo"],
        "only_mutate": [f"trl_spo/{module.replace('.', '/')}.py" for module in modules],
        "pytest_add_cli_args": ["-p", "no:cacheprovider"],
        "pytest_add_cli_args_test_selection": tests,
    }
    settings = "".join(f"{name} = {json.dumps(value)}\n" for name, value in quoted.items())
    (folder / "pyproject.toml").write_text(f"[tool.mutmut]\n{settings}use_git_change_detection = false\n")
    names = []
    for module in modules:
        functions = MODULES[module][1] or ["*"]
        names += [f"trl_spo.{module}.x_{function}__mutmut_*" for function in functions]
    return names


def mutate(modules: list[str], extra_tests: list[str], jobs: int) -> list[dict[str, str]]:
    """The mutants of `modules` with their fate, tried in a temporary copy of the tree."""
    with tempfile.TemporaryDirectory(prefix="trl_spo_mutation_") as folder:
        names = make_tree(Path(folder), modules, extra_tests)
        command = [sys.executable, str(Path(__file__).resolve()), "--inside", "--jobs", str(jobs), *names]
        settings = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # a pool of threads does not survive a fork
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        results = Path(folder) / "results.json"
        if done.returncode or not results.exists():
            lines = done.stdout.replace("\r", "\n").splitlines()
            raise SystemExit("\n".join([*lines[-60:], "mutmut did not finish: do the tests pass without mutants?"]))
        return json.loads(results.read_text())


def key(mutant: dict[str, str]) -> tuple[str, ...]:
    """What identifies a mutant as long as its line stays the same."""
    return tuple(mutant[name] for name in ("module", "function", "original", "mutant"))


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutation testing of the pure modules.")
    parser.add_argument("--modules", nargs="+", default=list(MODULES), choices=list(MODULES), metavar="MODULE")
    parser.add_argument("--tests", nargs="+", default=[], help="more test files, beside those of the modules")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants tried at the same time")
    parser.add_argument("--output", help="write all mutants with their fate to this JSON file")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    if "--inside" in sys.argv:
        parser.add_argument("names", nargs="+")
        args = parser.parse_args()
        run_mutmut(args.names, args.jobs)
        return 0
    args = parser.parse_args()
    if importlib.util.find_spec("mutmut") is None:
        parser.error("mutmut is not installed here: `make mutation` installs it into an environment of its own")

    # Try all mutants, and compare the survivors with those that are explained.
    start = time.perf_counter()
    results = mutate(args.modules, args.tests, args.jobs)
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n")
    explained = [mutant for mutant in json.loads(EXPLANATIONS.read_text()) if mutant["module"] in args.modules]
    known = {key(mutant) for mutant in explained if mutant.get("reason", "").strip()}
    survivors = {key(mutant) for mutant in results if mutant["status"] not in KILLED}
    missing = sorted(survivors - known)
    stale = sorted({key(mutant) for mutant in explained} - survivors)
    for title, mutants in (("survived without an explanation", missing), ("explained, but no survivor", stale)):
        for module, function, original, mutant in mutants:
            print(f"{title}: {module}.{function}\n  - {original}\n  + {mutant}")

    # The table, a line per module.
    print(f"{'module':<20}{'mutants':>9}{'killed':>9}{'survived':>10}{'explained':>11}")
    for module in [*args.modules, "all"]:
        mutants = [mutant for mutant in results if module in (mutant["module"], "all")]
        alive = [key(mutant) for mutant in mutants if mutant["status"] not in KILLED]
        counts = len(mutants), len(mutants) - len(alive), len(alive), sum(mutant in known for mutant in alive)
        print(f"{module:<20}{counts[0]:>9}{counts[1]:>9}{counts[2]:>10}{counts[3]:>11}")
    print(f"{time.perf_counter() - start:.0f} s, {args.jobs} at a time")
    return int(bool(missing or stale))


if __name__ == "__main__":
    raise SystemExit(main())
