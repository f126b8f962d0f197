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

"""Sphinx configuration. `make docs` builds the pages of this folder and the API reference; warnings are errors."""

import re
import sys
from pathlib import Path


DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import api_pages  # noqa: E402
import command_pages  # noqa: E402

import trl_spo  # noqa: E402


project = "trl_spo"
author = "The trl_spo authors"
copyright = author
version = release = trl_spo.__version__

extensions = ["myst_parser", "sphinx.ext.mathjax", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"trl_spo {version}"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
add_module_names = False
toc_object_entries = False

CODE_SPAN = re.compile(r"(?<![\[`])`([A-Za-z_][\w.]*)`(?![\]`])")


def write_api_pages(app):
    app.api_index = api_pages.write(DOCS / "api")
    command_pages.write(DOCS / "api")


def link_code_spans(app, docname, source):
    """Names in backticks that the API reference has become links to it; the pages stay plain Markdown elsewhere."""
    if docname.startswith("api/") and docname != "api/index":
        return

    def link(match):
        name = match[1]
        full = app.api_index.get(name)
        if full is None or not (name[0].isupper() or "_" in name):
            return match[0]
        return f"{{py:obj}}`{name} <{full}>`"

    lines, in_code = source[0].split("\n"), False
    for number, line in enumerate(lines):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code and not line.startswith("#"):
            lines[number] = CODE_SPAN.sub(link, line)
    source[0] = "\n".join(lines)


def setup(app):
    app.connect("builder-inited", write_api_pages)
    app.connect("source-read", link_code_spans)
