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
Necessity: `make house` compares versions of the code, so a count that is wrong praises or blames the wrong change. A small
file, counted by hand, holds what each number means.
"""

from reliability.house import measure_module, named, what_the_trainer_reaches


SOURCE = '''# a licence header
# of two lines

"""A docstring
of two lines."""

import os


# why the limit is three
LIMIT = 3  # not on a line of its own


class Room:
    def walk(self, a, b=1, *rest, c, **others):
        """Five parameters; five lines without this one."""
        # a phase
        a, b = b, a
        x, y = rest
        return [[i for i in range(n)] for n in rest]

    def stay(self):
        def inner():
            return LIMIT

        return inner
'''


def test_a_file_counted_by_hand(tmp_path):
    """
    Code: import, LIMIT, class, and 4 + 5 lines of methods. Own-line comments after the header: 2. Statements: LIMIT, two
    assignments and a return in `walk`, two returns in `stay`. Two comprehensions, one inside the other. `x, y = rest` is
    no pair of tuples.
    """
    (tmp_path / "room.py").write_text(SOURCE)
    module = measure_module(tmp_path / "room.py", tmp_path)
    assert (module.name, module.lines) == ("room", 26)
    assert (module.code, module.comments) == (11, 2)
    assert (module.statements, module.comprehensions, module.nested_comprehensions) == (6, 2, 1)
    assert module.tuple_assignments == 1
    found = {function.name: (function.lines, function.parameters) for function in module.functions}
    assert found == {"Room.walk": (5, 5), "Room.stay": (5, 0), "Room.stay.inner": (2, 0)}


def test_the_trainer_reaches_what_is_imported_inside_functions_too(tmp_path):
    (tmp_path / "rooms").mkdir()
    (tmp_path / "spo_trainer.py").write_text("from .rooms.one import a\n\n\ndef f():\n    from . import two\n")
    (tmp_path / "rooms" / "one.py").write_text("from ..three import b\nimport os\n")
    (tmp_path / "two.py").write_text("x = 1\n")
    (tmp_path / "three.py").write_text("y = 1\nz = 2\n")
    (tmp_path / "four.py").write_text("not = reached\n")
    assert what_the_trainer_reaches(tmp_path) == 5 + 2 + 1 + 2


def test_the_largest_comes_first():
    assert named({"a": 60, "b": 70}).split() == ["2", "70", "b", "60", "a"]
