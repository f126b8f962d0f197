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
Numbers about how the package is written: long functions and files, many parameters, comments, dense statements, and how
much code `import trl_spo.spo_trainer` loads.

    python reliability/house.py                  # the working tree
    python reliability/house.py --rev 2ef76ab    # a commit, in a temporary folder
    python reliability/house.py --modules        # and a line per module

The numbers are a look at taste, not gates. How they are counted:

- The length of a function is the number of its lines without decorators and docstring. Functions inside functions count
  for themselves and for what surrounds them.
- The parameters of a function include keyword-only ones and `*args`, and leave out `self` and `cls`.
- Code lines are neither blank, nor comments, nor inside a docstring, and follow the licence header. An own-line comment
  stands alone on its line.
- Statements are those that do something by themselves: assignments, calls, `return`, `raise`, `del`; neither docstrings
  nor imports nor what only holds other statements. A comprehension is a list, set or dictionary comprehension or a
  generator expression. A tuple assignment has tuples on both sides: `a, b = x, y`.
- What the trainer loads is measured: a fresh interpreter imports it, and the lines of the package's files that it then
  holds are counted. What it can reach is read from all import statements, those inside functions included, since they
  are loaded once a run needs them.
"""

import argparse
import ast
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "trl_spo"
LONG_FUNCTIONS = (50, 60)  # lines
LONG_FILE = 600  # lines
MANY_PARAMETERS = 8
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
STATEMENTS = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.Return, ast.Raise, ast.Delete)
IMPORT_AND_LIST = (
    "import json, sys, trl_spo.spo_trainer\n"
    "files = [m.__file__ for n, m in sys.modules.items() if n.partition('.')[0] == 'trl_spo' and m.__file__]\n"
    "print(json.dumps({'files': files, 'matplotlib': 'matplotlib' in sys.modules}))\n"
)


@dataclass
class Function:
    """One function: where it is, how long, and how many parameters it takes."""

    name: str
    lines: int
    parameters: int


@dataclass
class Module:
    """The counts of one file."""

    name: str
    lines: int
    code: int = 0
    comments: int = 0
    statements: int = 0
    comprehensions: int = 0
    nested_comprehensions: int = 0
    tuple_assignments: int = 0
    functions: list[Function] = field(default_factory=list)


def docstring_of(node: ast.AST) -> ast.Expr | None:
    """The statement that is the docstring of a module, class or function, if it has one."""
    body = getattr(node, "body", None)
    if not isinstance(body, list) or not body or not isinstance(body[0], ast.Expr):
        return None
    value = body[0].value
    return body[0] if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def measure_function(node: ast.FunctionDef, scope: str) -> Function:
    """Length without docstring, and the parameters a caller may give."""
    docstring = docstring_of(node)
    lines = node.end_lineno - node.lineno + 1
    if docstring is not None:
        lines -= docstring.end_lineno - docstring.lineno + 1
    arguments = node.args
    parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    parameters += [extra for extra in (arguments.vararg, arguments.kwarg) if extra is not None]
    count = sum(parameter.arg not in ("self", "cls") for parameter in parameters)
    return Function(f"{scope}{node.name}", lines, count)


def count_lines(source: str, tree: ast.Module) -> tuple[int, int]:
    """(code lines, own-line comments) of a file, without its licence header."""
    in_docstrings: set[int] = set()
    for node in ast.walk(tree):
        docstring = docstring_of(node)
        if docstring is not None:
            in_docstrings.update(range(docstring.lineno, docstring.end_lineno + 1))

    # Lines with a token on them; a comment alone on its line starts after nothing but blanks.
    code = set()
    comments = set()
    ignored = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if not token.line[: token.start[1]].strip():
                comments.add(token.start[0])
        elif token.type not in ignored:
            code.update(range(token.start[0], token.end[0] + 1))

    # The licence header is the block of comments before the first statement.
    first_statement = tree.body[0].lineno if tree.body else 1
    return len(code - in_docstrings), sum(line > first_statement for line in comments)


def measure_module(path: Path, package: Path) -> Module:
    """Everything that is counted in one file."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    module = Module(path.relative_to(package).with_suffix("").as_posix(), len(source.splitlines()))
    module.code, module.comments = count_lines(source, tree)

    def visit(node: ast.AST, scope: str) -> None:
        for child in ast.iter_child_nodes(node):
            module.statements += isinstance(child, STATEMENTS) and child is not docstring_of(node)
            module.comprehensions += isinstance(child, COMPREHENSIONS)
            if isinstance(child, ast.Assign) and isinstance(child.value, ast.Tuple):
                module.tuple_assignments += isinstance(child.targets[0], ast.Tuple)
            if isinstance(child, COMPREHENSIONS):
                inside = [other for other in ast.walk(child) if isinstance(other, COMPREHENSIONS)]
                module.nested_comprehensions += len(inside) - 1
            if isinstance(child, DEFINITIONS):
                module.functions.append(measure_function(child, scope))
            named = isinstance(child, (*DEFINITIONS, ast.ClassDef))
            visit(child, f"{scope}{child.name}." if named else scope)

    visit(tree, "")
    return module


def what_the_trainer_loads(root: Path) -> dict:
    """Lines of the package that importing the trainer loads, and whether matplotlib comes with it."""
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", IMPORT_AND_LIST]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if result.returncode:
        return {"lines": None, "files": None, "matplotlib": None}
    loaded = json.loads(result.stdout.splitlines()[-1])
    files = [Path(file) for file in loaded["files"]]
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    return {"lines": lines, "files": len(files), "matplotlib": loaded["matplotlib"]}


def what_the_trainer_reaches(package: Path) -> int:
    """Lines of the package that any import statement below the trainer's module names, and of the module itself."""
    reached: set[Path] = set()
    waiting = [package / "spo_trainer.py"]
    while waiting:
        file = waiting.pop()
        if file in reached:
            continue
        reached.add(file)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                # One dot is the file's own folder, each further dot the folder above.
                folder = file.parents[node.level - 1]
                names = [node.module] if node.module else [alias.name for alias in node.names]
                candidates = [folder / f"{name.replace('.', '/')}.py" for name in names]
                waiting += [candidate for candidate in candidates if candidate.is_file()]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in reached)


def measure(root: Path) -> dict:
    """The numbers of a tree, ready for JSON; `modules` holds the counts of each file."""
    package = root / PACKAGE
    modules = [measure_module(path, package) for path in sorted(package.rglob("*.py"))]
    functions = [(f"{module.name}: {function.name}", function) for module in modules for function in module.functions]
    lengths = sorted(function.lines for _, function in functions)
    code = sum(module.code for module in modules)
    statements = sum(module.statements for module in modules)
    report = {
        "files": len(modules),
        "lines": sum(module.lines for module in modules),
        "functions": len(functions),
        "function_median": median(lengths),
        "function_p90": lengths[int(0.9 * len(lengths))],
    }
    for limit in LONG_FUNCTIONS:
        report[f"functions_over_{limit}"] = {n: f.lines for n, f in functions if f.lines > limit}
    report["files_over_600"] = {module.name: module.lines for module in modules if module.lines > LONG_FILE}
    report["over_8_parameters"] = {n: f.parameters for n, f in functions if f.parameters > MANY_PARAMETERS}
    report["comments_per_code"] = sum(module.comments for module in modules) / code
    for name in ("comprehensions", "nested_comprehensions", "tuple_assignments"):
        report[f"{name}_per_100"] = 100 * sum(getattr(module, name) for module in modules) / statements
    report["trainer_loads"] = what_the_trainer_loads(root)
    report["trainer_reaches"] = what_the_trainer_reaches(package)
    report["modules"] = {module.name: module for module in modules}
    return report


def named(found: dict[str, int]) -> str:
    """The number of entries, and each of them, the largest first."""
    entries = sorted(found.items(), key=lambda entry: -entry[1])
    return f"{len(entries)}" + "".join(f"\n    {value:5d}  {name}" for name, value in entries)


def in_words(report: dict, per_module: bool) -> str:
    """The report as text, the aims of taste beside the numbers."""
    loads = report["trainer_loads"]
    lines = [
        f"{report['files']} files, {report['lines']} lines; {report['functions']} functions, median "
        f"{report['function_median']:g} lines, 90th percentile {report['function_p90']}",
        f"functions over 50 lines: {named(report['functions_over_50'])}",
        f"functions over 60 lines (aim: none): {named(report['functions_over_60'])}",
        f"files over 600 lines (aim: 2): {named(report['files_over_600'])}",
        f"functions with more than 8 parameters: {named(report['over_8_parameters'])}",
        f"own-line comments per code line (aim: 4 to 6%): {report['comments_per_code']:.1%}",
        f"comprehensions per 100 statements (aim: below 6): {report['comprehensions_per_100']:.1f}",
        f"comprehensions inside comprehensions per 100 statements: {report['nested_comprehensions_per_100']:.2f}",
        f"tuple assignments per 100 statements: {report['tuple_assignments_per_100']:.1f}",
        f"importing the trainer loads (aim: below 5500): {loads['lines']} lines in {loads['files']} files; matplotlib "
        f"loaded (aim: False): {loads['matplotlib']}",
        f"with imports inside functions the trainer reaches {report['trainer_reaches']} lines",
    ]
    if per_module:
        lines.append(f"{'module':36} lines  code  comments  comprehensions and tuple assignments per 100")
        for name, module in report["modules"].items():
            share = module.comments / max(module.code, 1)
            per_100 = 100 / max(module.statements, 1)
            lines.append(
                f"{name:36} {module.lines:5d} {module.code:5d} {share:9.1%} "
                f"{module.comprehensions * per_100:7.1f} {module.tuple_assignments * per_100:7.1f}"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description="Numbers about how the package is written.")
    parser.add_argument("--rev", help="a git revision to measure instead of the working tree")
    parser.add_argument("--modules", action="store_true", help="also print a line per module")
    options = parser.parse_args(arguments)
    if options.rev is None:
        report = measure(ROOT)
    else:
        with tempfile.TemporaryDirectory() as folder:
            command = ["git", "-C", str(ROOT), "archive", options.rev, PACKAGE]
            archive = subprocess.run(command, capture_output=True, check=True).stdout
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                tar.extractall(folder, filter="data")
            report = measure(Path(folder))
    print(in_words(report, options.modules))
    return report


if __name__ == "__main__":
    main()
