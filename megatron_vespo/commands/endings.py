"""Turns whatever a command raised into an exit code and one line.

ValueError and RuntimeError of this package have messages for users. Errors of files and memory name what they
are about. For every other error the line says which file has the traceback, for a bug report.
"""

from __future__ import annotations

import errno
import os
import platform
import select
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from megatron_vespo.system.preemption import EndedBySignal

EXIT_USER_ERROR, EXIT_FAILURE, EXIT_INTERRUPTED = 2, 1, 130
EXIT_BROKEN_PIPE = 141  # the code of a program that SIGPIPE ended
_SHOWN = 100  # characters shown on both sides of one that cannot be written
_PACKAGE = __name__.partition(".")[0]
_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
# The path is not what the flags say. Errors that may go away (disk full, too many open files) are not here.
_WRONG_PATH = {
    errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL,
}  # fmt: skip


def ending(error: BaseException, argv: Sequence[str]) -> tuple[int, str]:
    """The exit code and the line ("" for none); `argv` is the command that raised `error`."""
    match error:
        case EndedBySignal():
            return error.exit_code, str(error)
        case KeyboardInterrupt():
            return EXIT_INTERRUPTED, str(error) or "interrupted"
        case BrokenPipeError() if not _is_read():
            return EXIT_BROKEN_PIPE, ""
        case ModuleNotFoundError() if not (error.name or "").startswith(_PACKAGE):
            return EXIT_USER_ERROR, f"the Python package {error.name} is needed here and is not installed"
        case OSError():
            return _of_files(error, argv)
        case UnicodeEncodeError():
            part = error.object[max(0, error.start - _SHOWN) : error.end + _SHOWN]
            return EXIT_USER_ERROR, f"{_plain(part)}: cannot be written as {error.encoding}"
        case MemoryError():
            return EXIT_FAILURE, f"out of memory{f': {_plain(error)}' if str(error) else ''}"
        case RuntimeError() if str(error).startswith("Symlink loop"):  # raised by pathlib; it names the path
            return EXIT_USER_ERROR, _plain(error)
        case RecursionError() | NotImplementedError():
            return EXIT_FAILURE, _internal(error, argv)
        case ValueError() | RuntimeError():
            code = EXIT_USER_ERROR if isinstance(error, ValueError) else EXIT_FAILURE
            if _is_from_library(error):
                return code, f"{_plain(error)}; {_where_the_traceback_is(error, argv)}"
            return code, str(error)
    return EXIT_FAILURE, _internal(error, argv)


def _of_files(error: OSError, argv: Sequence[str]) -> tuple[int, str]:
    code = EXIT_USER_ERROR if error.errno in _WRONG_PATH else EXIT_FAILURE
    if error.strerror is None:  # raised by a library with its own text
        return code, f"{_plain(error)}; {_where_the_traceback_is(error, argv)}"
    if error.filename is None:
        return code, f"{error.strerror}; {_where_the_traceback_is(error, argv)}"
    name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
    return code, f"{name}: {error.strerror}"


def _internal(error: BaseException, argv: Sequence[str]) -> str:
    what = f"{type(error).__name__}: {_plain(error)}"
    return f"internal error: {what}; please report it, {_where_the_traceback_is(error, argv)}"


def _where_the_traceback_is(error: BaseException, argv: Sequence[str]) -> str:
    """The end of the line. Where no file can be written, the traceback goes to stderr."""
    text = "".join(traceback.format_exception(error))
    about = [f"{_PACKAGE} {' '.join(argv)}", f"Python {platform.python_version()}, {platform.platform()}"]
    try:
        descriptor, name = tempfile.mkstemp(prefix="megatron-vespo-error-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join([*about, "", text]))
    except OSError:
        sys.stderr.write(text)
        return "with the traceback above"
    return f"the traceback is in {name}"


def _is_from_library(error: BaseException) -> bool:
    """Whether a module outside this package raised it: then its text names no flag and no file."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not frames or frames[-1].f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        return False
    file = frames[-1].f_code.co_filename
    return file.startswith("<frozen") or any(Path(file).is_relative_to(folder) for folder in _LIBRARIES)


def _is_read() -> bool:
    """Whether anyone still reads this program's output."""
    poll = select.poll()
    poll.register(1, 0)  # stdout; errors are always reported
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def _plain(value: object) -> str:
    """`value` as one line that any terminal can show."""
    return " ".join(str(value).split()).encode("utf-8", "backslashreplace").decode()
