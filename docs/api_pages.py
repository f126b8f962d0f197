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
The API reference: one Markdown page per module of `trl_spo`, written from its docstrings.

Docstrings here are Markdown in the form of Hugging Face's libraries (``name (`type`, *optional*):`` under `Args:`,
``[`SPOTrainer`]`` for a reference, `> [!NOTE]`, tables, fenced code). Sphinx's own autodoc takes reStructuredText, so the
pages are written as MyST Markdown with the directives of Sphinx's Python domain, and MyST renders the docstrings as they
are. Three things are translated: sections become lists, references become links (an unknown one is an error), and notes
become boxes.
"""

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trl_spo


ITEM_SECTIONS = ("Args", "Arguments", "Attributes", "Parameters", "Raises")
SECTIONS = (*ITEM_SECTIONS, "Returns", "Example", "Examples", "Side effects")
EXTERNAL = ("transformers.", "diffusers.", "torch.", "peft.", "accelerate.", "trl.", "datasets.")
MANY_PARAMETERS = 24  # a signature with more, such as that of a `TrainingArguments`, is no help
PACKAGE = Path(trl_spo.__file__).parent
FOLDERS = {  # folder -> its heading in the index
    "": "SPO itself",
    "evaluation": "Evaluation",
    "pipelines": "Pipelines",
    "rewards": "Rewards",
    "training": "Training",
}


@dataclass
class Module:
    """A module of the package with what it defines and documents, in the order of the source."""

    name: str
    doc: str
    members: dict[str, object]


def documented(namespace: dict, module: str) -> dict[str, object]:
    """Public classes and functions that `module` defines, with a docstring."""
    found = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module
        and value.__doc__
    }
    return dict(sorted(found.items(), key=lambda item: inspect.getsourcelines(item[1])[1]))


def read_modules() -> list[Module]:
    """All modules of the package itself; the programs in `scripts` document themselves with `--help`."""
    modules = []
    for path in sorted(PACKAGE.rglob("*.py")):
        *folders, stem = path.relative_to(PACKAGE).with_suffix("").parts
        if stem == "__init__" or "scripts" in folders:
            continue
        name = ".".join((trl_spo.__name__, *folders, stem))
        module = importlib.import_module(name)
        modules.append(Module(name, module.__doc__ or "", documented(vars(module), name)))
    return modules


def public_names() -> list[str]:
    """Classes and functions that `trl_spo` itself offers."""
    values = {name: getattr(trl_spo, name) for name in trl_spo.__all__}
    return sorted(name for name, value in values.items() if inspect.isclass(value) or inspect.isfunction(value))


def methods_of(cls: type) -> dict[str, tuple[str, object]]:
    """Public methods and properties that the class itself defines and documents: name -> (directive, function)."""
    found = {}
    for name, value in vars(cls).items():
        kind = "property" if isinstance(value, property) else "method"
        function = value.fget if kind == "property" else getattr(value, "__func__", value)
        if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
            found[name] = (kind, value)
    return found


def build_index(modules: list[Module]) -> dict[str, str]:
    """Every name that has an entry in the reference -> its full name. Methods are `Class.method`."""
    index = {}
    short: dict[str, list[str]] = {}
    for module in modules:
        for name, value in module.members.items():
            members = [name]
            if inspect.isclass(value):
                members += [f"{name}.{method}" for method in methods_of(value)]
            for member in members:
                full = f"{module.name}.{member}"
                index[full] = full
                short.setdefault(member, []).append(full)
    return index | {name: fulls[0] for name, fulls in short.items() if len(fulls) == 1}


def resolver(index: dict[str, str]) -> Callable[[str], str]:
    """What replaces a reference of a docstring: a link, or plain code for names of other libraries."""

    def resolve(target: str) -> str:
        name = target.removeprefix("~")
        if name in index:
            shown = name.rpartition(".")[2] if target.startswith("~") else name
            return f"{{py:obj}}`{shown} <{index[name]}>`"
        owner, _, member = name.rpartition(".")
        if name.startswith(EXTERNAL) or (owner in index and hasattr(_load(index[owner]), member)):
            return f"`{name}`"  # of another library, or inherited from one
        if name in vars(importlib.import_module("trl_spo.pipelines.ddpo")):  # TRL's own, where TRL has it
            return f"`{name}`"
        raise ValueError(f"A docstring refers to [`{target}`], which the API reference does not have.")

    return resolve


def _load(full: str):
    module, _, name = full.rpartition(".")
    return getattr(importlib.import_module(module), name)


# --- docstrings to MyST ----------------------------------------------------------------------------------------------


def to_markdown(doc: str, resolve: Callable[[str], str]) -> list[str]:
    """Lines of MyST Markdown from a docstring."""
    lines, out, start = inspect.cleandoc(doc).split("\n"), [], 0
    while start < len(lines):
        line = lines[start]
        section = re.fullmatch(rf"({'|'.join(SECTIONS)}):", line)
        if line.lstrip().startswith("```"):
            end = start + 1
            while not lines[end].lstrip().startswith("```"):
                end += 1
            out += _code(lines[start : end + 1])
            start = end + 1
        elif section is not None:
            end = _end_of_block(lines, start + 1)
            body = inspect.cleandoc("\n".join(["", *lines[start + 1 : end]])).split("\n")
            out += ["", f"**{section[1]}**", ""]
            out += _items(body, resolve) if section[1] in ITEM_SECTIONS else to_markdown("\n".join(body), resolve)
            out.append("")
            start = end
        elif line.startswith("> [!"):
            end = start
            while end < len(lines) and lines[end].startswith(">"):
                end += 1
            body = "\n".join(part.removeprefix(">").removeprefix(" ") for part in lines[start + 1 : end])
            out += ["", f":::{{{line[4:].rstrip(']').lower()}}}", *to_markdown(body, resolve), ":::", ""]
            start = end
        else:
            out.append(_inline(line, resolve))
            start += 1
    return out


def _end_of_block(lines: list[str], start: int) -> int:
    """Index of the first line at or after `start` that is neither blank nor indented."""
    return next((i for i in range(start, len(lines)) if lines[i] and not lines[i].startswith(" ")), len(lines))


def _code(lines: list[str]) -> list[str]:
    """A fenced block; doctest prompts are left out, so that it can be copied."""
    if any(line.lstrip().startswith(">>> ") for line in lines):
        return [re.sub(r"^(\s*)(>>>|\.\.\.) ?", r"\1", line) for line in lines]
    return lines


def _items(lines: list[str], resolve: Callable[[str], str]) -> list[str]:
    """The entries of `Args:` and the like, as a list with bold names."""
    out = []
    for line in lines:
        if line.startswith(">"):  # a heading among the parameters of a config
            out += ["", f"*{line[1:].strip()}*", ""]
        elif line and not line.startswith(" "):
            name = re.match(r"`?[\w.*]+`?(, `?[\w.*]+`?)*", line)
            head, rest = ("", line) if name is None else (name[0].replace("`", ""), line[name.end() :])
            rest = re.sub(r"(?<=\)), (\w+) (?=\(`)", r", **`\1`** ", rest)  # a (`int`), b (`int`)
            out.append(f"- {f'**`{head}`**' if head else ''}{_inline(rest, resolve)}")
        else:
            out.append(_inline(line[2:], resolve) if line else "")
    return out


def _inline(line: str, resolve: Callable[[str], str]) -> str:
    return re.sub(r"\[`([~\w.]+)`\](?!\()", lambda match: resolve(match[1]), line)


# --- pages -----------------------------------------------------------------------------------------------------------


def signature(value) -> str:
    """Parameters and defaults; types stand in the docstring."""
    try:
        parameters = list(inspect.signature(value).parameters.values())
    except (TypeError, ValueError):
        return "()"
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    if len(parameters) > MANY_PARAMETERS:
        return "(...)"
    text = str(inspect.Signature([p.replace(default=_default(p.default)) for p in parameters]))
    return " ".join(text.split())


class _Shown:
    """A default value by the text that stands for it."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _default(value):
    if value is inspect.Parameter.empty or value is None or isinstance(value, (bool, int, float, str, tuple)):
        return value
    return _Shown("...")


def page(module: Module, resolve: Callable[[str], str]) -> str:
    """The page of a module."""
    lines = [f"# {short_name(module)}", "", f"```{{py:module}} {module.name}", "```", ""]
    lines += [*to_markdown(module.doc, resolve), ""]
    for name, value in module.members.items():
        is_class = inspect.isclass(value)
        lines += [f"::::::::{{py:{'class' if is_class else 'function'}}} {name}{signature(value)}", ""]
        lines += [*to_markdown(value.__doc__, resolve), ""]
        for method, (kind, function) in methods_of(value).items() if is_class else ():
            bound = getattr(value, method)
            text = "" if kind == "property" else signature(bound)
            text = text if isinstance(function, (classmethod, staticmethod)) else re.sub(r"^\(self(, )?", "(", text)
            lines += [f"::::::{{py:{kind}}} {method}{text}"]
            lines += [":classmethod:"] if isinstance(function, classmethod) else []
            lines += [":staticmethod:"] if isinstance(function, staticmethod) else []
            lines += ["", *to_markdown(bound.__doc__, resolve), "::::::", ""]
        lines += ["::::::::", ""]
    return "\n".join(lines)


def short_name(module: Module) -> str:
    """The name without that of the package, which all of them share."""
    return module.name.partition(".")[2]


def first_sentence(doc: str) -> str:
    """What a module says about itself first, on one line."""
    paragraph = " ".join(inspect.cleandoc(doc).split("\n\n")[0].split())
    sentence = re.match(r".*?[.:](?= [A-Z]|$)", paragraph)
    return (sentence[0] if sentence else paragraph).rstrip(":.").replace("|", "\\|") + "."


def index_page(modules: list[Module], resolve: Callable[[str], str]) -> str:
    """The table of contents: a section for the package itself and one for each folder, with a sentence per module."""
    public = ", ".join(f"`{name}`" for name in public_names())
    lines = ["# API reference", "", "Every public class and function, by module, from the docstrings. These can be"]
    lines += [f"imported from `trl_spo` itself: {public}."]
    folders: dict[str, list[Module]] = {}
    for module in modules:
        folders.setdefault(short_name(module).rpartition(".")[0], []).append(module)
    for folder, members in folders.items():
        lines += ["", f"## {FOLDERS.get(folder, folder)}", "", "| module | what it is |", "|---|---|"]
        for module in members:
            doc = module.doc or next(value.__doc__ for value in module.members.values())
            sentence = _inline(first_sentence(doc), resolve)
            lines.append(f"| [{short_name(module)}]({module.name}.md) | {sentence} |")
    names = "\n".join(module.name for members in folders.values() for module in members)
    lines += ["", "```{toctree}", ":hidden:", "", names, "```", ""]
    return "\n".join(lines)


def write(folder: Path) -> dict[str, str]:
    """Writes the pages to `folder`, those that changed; returns the index of names."""
    modules = read_modules()
    index = build_index(modules)
    pages = {}
    for module in modules:
        own = index | {name: f"{module.name}.{name}" for name in module.members}
        pages[f"{module.name}.md"] = page(module, resolver(own))
    pages["index.md"] = index_page(modules, resolver(index))
    write_pages(folder, pages, f"{trl_spo.__name__}.*.md")
    return index


def write_pages(folder: Path, pages: dict[str, str], pattern: str) -> None:
    """
    Write pages whose text has changed, so that Sphinx reads no other again, and remove those that are gone.

    Args:
        folder (`Path`): made if it does not exist.
        pages (`dict[str, str]`): file name -> text.
        pattern (`str`): of the files in the folder that are pages of this kind.
    """
    folder.mkdir(exist_ok=True)
    for old in folder.glob(pattern):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
