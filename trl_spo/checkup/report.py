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

"""What a check-up found: lines with marks for people, JSON for programs, an exit status for scripts."""

import json
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


OK = "ok"
NOTE = "-"  # a number or a fact, neither good nor bad
WARNING = "warning"
PROBLEM = "problem"  # the run certainly cannot work
WIDTH = 118
NAME_WIDTH = 22


@dataclass(frozen=True)
class Finding:
    """
    One thing that was looked at.

    Attributes:
        section (`str`): heading under which it stands.
        mark (`str`): `"ok"`, `"-"`, `"warning"` or `"problem"`.
        name (`str`): what was looked at.
        text (`str`): what was found, and what to do.
    """

    section: str
    mark: str
    name: str
    text: str


@dataclass
class Report:
    """
    The findings of a check-up, in order.

    Attributes:
        command (`str`): what would be run.
        findings (`list[Finding]`)
        numbers (`dict`): what was computed, for programs.
    """

    command: str
    findings: list[Finding] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def add(self, section: str, mark: str, name: str, text: str) -> None:
        """Append a finding."""
        self.findings.append(Finding(section, mark, name, text))

    def extend(self, findings: Iterable[Finding]) -> None:
        """Append findings."""
        self.findings.extend(findings)

    def marked(self, mark: str) -> list[Finding]:
        """The findings with a mark."""
        return [finding for finding in self.findings if finding.mark == mark]

    @property
    def exit_status(self) -> int:
        """1 if something certainly cannot work, otherwise 0."""
        return 1 if self.marked(PROBLEM) else 0

    def text(self) -> str:
        """Lines for people: a heading per section, a line per finding, a verdict."""
        lines = [f"check-up of `{self.command}`"]
        section = None
        for finding in self.findings:
            if finding.section != section:
                section = finding.section
                lines += ["", section]
            lines += _lines(finding)
        return "\n".join([*lines, "", self.verdict()])

    def verdict(self) -> str:
        """One sentence."""
        problems, warnings = len(self.marked(PROBLEM)), len(self.marked(WARNING))
        if problems:
            return f"This run cannot work: {_count(problems, 'problem')}, {_count(warnings, 'warning')}."
        return f"Nothing stands in the way of this run: no problem, {_count(warnings, 'warning')}."

    def write(self, path: str | Path) -> None:
        """All of it as JSON."""
        content = {
            "command": self.command,
            "exit_status": self.exit_status,
            "verdict": self.verdict(),
            "findings": [asdict(finding) for finding in self.findings],
            **self.numbers,
        }
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _lines(finding: Finding) -> list[str]:
    head = f"  {finding.mark:8}{finding.name:{NAME_WIDTH}}"
    if len(finding.name) >= NAME_WIDTH:
        head += " "
    indent = " " * (10 + NAME_WIDTH)
    return textwrap.wrap(
        finding.text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"
