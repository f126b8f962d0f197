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
How a command ends that cannot go on: one line that says what is wrong, and exit status 2.

A traceback helps those who know the code, and hides the sentence from everybody else. `--debug` prints it. An error that does
not come from this package, such as one of torch in the middle of a run, may need it later: it is kept in a file.
"""

import contextlib
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ..notices import leave_out_notices


PACKAGE = Path(__file__).parents[1]


class CommandError(SystemExit):
    """Ends the program with status 2, once `message` is on the standard error stream."""

    def __init__(self, message: str):
        super().__init__(2)
        self.message = message

    def __str__(self) -> str:
        return self.message


def run(main: Callable, parser, arguments: Sequence[str] | None = None) -> None:
    """
    Parse the arguments and call `main` with what they say.

    Args:
        main (`Callable`): of a script.
        parser ([`ScriptParser`]): of the same script.
        arguments (`list[str]`, *optional*): those of the process by default.

    Raises:
        CommandError: after one line, instead of any error; with `--debug` only for options that do not exist.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = asks_for_tracebacks(arguments)
    leave_out_notices()
    with one_line_errors(parser.prog, debug):
        parsed = parser.parse_args_and_config(arguments)
    with one_line_errors(parser.prog, debug, is_running=True):
        main(*parsed)


@contextlib.contextmanager
def one_line_errors(prog: str, debug: bool = False, is_running: bool = False) -> Iterator[None]:
    """
    Errors inside end the program with one line and status 2, Ctrl-C with one line and status 130.

    Args:
        prog (`str`): name of the command, which begins the line.
        debug (`bool`, *optional*, defaults to `False`): let errors through, with their traceback.
        is_running (`bool`, *optional*, defaults to `False`): keep the traceback of an error that this package did not
            raise.

    Raises:
        CommandError: instead of any error.
    """
    if debug:
        yield
        return
    try:
        yield
    except SystemExit as stop:
        if not isinstance(stop.code, str):
            raise
        print(f"{prog}: error: {stop.code}", file=sys.stderr)
        raise CommandError(stop.code) from None
    except KeyboardInterrupt:
        print(f"{prog}: stopped; what had been written before is whole.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        message = in_words(error)
        print(f"{prog}: error: {message}", file=sys.stderr)
        if is_running and not said_here(error):
            print(f"The traceback is in {keep_traceback(error)}; --debug prints it.", file=sys.stderr)
        raise CommandError(message) from None


def in_words(error: Exception) -> str:
    """The message, with the kind of error where it says too little by itself: `KeyError('x')` has the message `'x'`."""
    text = str(error).strip()
    if isinstance(error, OSError) and error.strerror is not None:  # without its number
        return error.strerror if error.filename is None else f"{error.strerror.removesuffix('.')}: {error.filename!r}"
    speaks = isinstance(error, (ValueError, TypeError, FileNotFoundError, RuntimeError)) and " " in text
    return text if speaks else f"{type(error).__name__}: {text}".removesuffix(": ")


def said_here(error: Exception) -> bool:
    """Whether this package raised the error to say something, so that its sentence is all there is to know."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE) and not isinstance(error, KeyError)


def keep_traceback(error: Exception) -> str:
    """The file to which the traceback was written."""
    with tempfile.NamedTemporaryFile("w", prefix="spo-error-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.writelines(traceback.format_exception(error))
    return file.name


def split_values(arguments: Iterable[str]) -> list[str]:
    """`--name=value` as two words, which is how TRL's parser looks for `--config`."""
    words = []
    for argument in arguments:
        words += argument.split("=", 1) if argument.startswith("--") else [argument]
    return words


def without_debug(words: Sequence[str]) -> list[str]:
    """The words without a `--debug` that has no value. One that has is the field of `TrainingArguments`."""
    kept = []
    for index, word in enumerate(words):
        value = words[index + 1] if index + 1 < len(words) else "--"
        if word != "--debug" or not value.startswith("-"):
            kept.append(word)
    return kept


def asks_for_tracebacks(words: Sequence[str]) -> bool:
    """Whether one of the words is a `--debug` that has no value."""
    return len(without_debug(words)) < len(words)
