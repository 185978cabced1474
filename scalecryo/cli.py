"""The command line: parse, run the verb, report errors in one line.

Exit codes: 0 done; 1 failed, with one line that says what, where and what to do; 2 wrong usage, settings included.
Nothing here imports torch; the verbs and their help are `commands.verbs`.
"""

import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import NoReturn

from cyclopts import CycloptsError

from scalecryo.commands.verbs import app
from scalecryo.config import refuse_renamed
from scalecryo.errors import ConfigError, ScalecryoError, UsageError

_GO_ON = {"train": "; the same command with --resume goes on"} | dict.fromkeys(
    ("convert", "assign"), "; the same command goes on where it stopped"
)


def words_of(tokens: Sequence[str]) -> tuple[list[str], bool]:
    """What cyclopts parses, and whether `--debug` was among it.

    `--section.key value` becomes `--section.key=value`: in cyclopts a flag takes no value after a space, and no value
    begins with a hyphen. A TOML file after a flag is none.
    """
    words: list[str] = []
    for token in tokens:
        setting = words and words[-1].startswith("--") and "." in words[-1] and "=" not in words[-1]
        if setting and not token.startswith("--") and not token.endswith(".toml"):
            words[-1] += f"={token}"
        elif token != "--debug":
            words.append(token)
    return words, "--debug" in tokens


def _one_line(kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    """Report an error that nobody foresaw (a full disk, a bug) in one line as well."""
    text = " ".join(str(error).split()) or "no message"
    sys.stderr.write(f"scalecryo: {kind.__name__}: {text} (--debug shows where)\n")


class _Terminated(KeyboardInterrupt):
    """SIGTERM: a spot node's notice, a time limit, a pod that is moved."""


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    raise _Terminated


def main(tokens: Sequence[str] | None = None) -> None:
    """Entry point of the `scalecryo` command: runs a verb and exits with its code."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    words, debug = words_of(sys.argv[1:] if tokens is None else tokens)
    if not debug:
        sys.excepthook = _one_line
    try:
        for option in (word[2:] for word in words if word.startswith("--")):
            refuse_renamed(option.partition("=")[0].replace("-", "_"))
        app(words, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        _fail(f"{error} (see scalecryo {' '.join((*(error.command_chain or ()), '--help'))})", 2)
    except ScalecryoError as error:
        if debug:
            traceback.print_exc()
        _fail(str(error), 2 if isinstance(error, UsageError | ConfigError) else 1)
    except KeyboardInterrupt as stop:
        by = "SIGTERM" if isinstance(stop, _Terminated) else "the keyboard"
        _fail(f"stopped by {by}{_GO_ON.get(words[0], '')}", 1)


def _fail(text: str, code: int) -> NoReturn:
    sys.stderr.write(f"scalecryo: {' '.join(text.split())}\n")
    sys.exit(code)
