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
Run the demo of the shapes world: preferences, reward model, SPO, scores and pictures, in about five minutes on two CPU
cores.

```bash
trl-spo demo
trl-spo demo --model flow
```

The world is no part of this package. It lies beside it: as `trl_spo_shapes` in a wheel, as `examples/shapes` in a checkout.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from .errors import run, without_debug


ROOT = Path(__file__).parents[2]


class DemoParser(argparse.ArgumentParser):
    """The options of the demo, parsed as those of the other commands are."""

    def parse_args_and_config(self, args: Sequence[str] | None = None) -> tuple[argparse.Namespace]:
        """The options, as the only argument of [`main`]."""
        arguments = list(sys.argv[1:] if args is None else args)
        return (self.parse_args(without_debug(arguments)),)


def demo_module() -> ModuleType:
    """
    The module of the demo.

    Raises:
        SystemExit: if the world is not there, because only the folder `trl_spo` was copied.
    """
    if (ROOT / "examples" / "shapes" / "demo.py").is_file():
        if str(ROOT) not in sys.path:
            sys.path.insert(0, str(ROOT))
        name = "examples.shapes.demo"
    elif (ROOT / "trl_spo_shapes" / "demo.py").is_file():
        name = "trl_spo_shapes.demo"
    else:
        raise SystemExit(
            f"The shapes world is not beside {ROOT / 'trl_spo'}: install the wheel, or run in a checkout."
        )
    return importlib.import_module(name)


def make_parser(prog: str | None = None) -> DemoParser:
    """The parser whose results [`main`] takes."""
    options = demo_module().make_parser(add_help=False)
    parser = DemoParser(prog=prog, description=options.description, parents=[options])
    parser.add_argument("--debug", action="store_true", help="Print the traceback of an error.")
    return parser


def main(args: argparse.Namespace) -> None:
    """Runs the demo."""
    demo_module().main(args)


if __name__ == "__main__":
    run(main, make_parser())
