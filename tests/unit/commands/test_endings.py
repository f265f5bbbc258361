"""What a command's end says: one line and an exit code, whatever was raised."""

import argparse
import errno
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_vespo.arguments.checks import check_folder, check_output_file
from megatron_vespo.arguments.parser import FlagParser
from megatron_vespo.commands import main as cli

MODULE = [sys.executable, "-m", "megatron_vespo"]
TRACEBACK = r"the traceback is in (\S+\.txt)$"


@pytest.fixture()
def ends_with(monkeypatch, capsys):
    """`megatron-vespo train`, raising what a function raises: the exit code and what is on stderr."""
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def end(raising) -> tuple[int, str]:
        # the real module imports Ray
        monkeypatch.setitem(
            sys.modules, "megatron_vespo.commands.train", Namespace(main=lambda argv: raising())
        )
        return cli.run(["train", "--lr", "1"]), capsys.readouterr().err

    return end


def raises(error: BaseException):
    def raising():
        raise error

    return raising


def system_error(number: int, *names: object) -> OSError:
    return OSError(number, os.strerror(number), *names)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (system_error(errno.EEXIST, "a/b"), 2, "a/b: File exists"),
        (system_error(errno.ENOTDIR, Path("a/b")), 2, "a/b: Not a directory"),
        (system_error(errno.EISDIR, b"a"), 2, "a: Is a directory"),
        (system_error(errno.EROFS, "a"), 2, "a: Read-only file system"),
        (system_error(errno.ENOSPC, "a"), 1, "a: No space left on device"),
        (ModuleNotFoundError("x", name="wandb"), 2,
         "the Python package wandb is needed here and is not installed"),
        (MemoryError("Unable to allocate 9 GiB"), 1, "out of memory: Unable to allocate 9 GiB"),
        (MemoryError(), 1, "out of memory"),
        (KeyboardInterrupt("interrupted at optimizer step 3"), 130, "interrupted at optimizer step 3"),
    ],
)  # fmt: skip
def test_errors_of_files_and_memory_are_one_line(ends_with, error, code, line):
    assert ends_with(raises(error)) == (code, f"megatron-vespo: {line}\n")


def test_a_text_that_an_encoding_lacks_is_shown(ends_with):
    code, line = ends_with(lambda: "data/\N{LATIN SMALL LETTER E WITH ACUTE}".encode("ascii"))
    assert (code, line) == (
        2,
        "megatron-vespo: data/\N{LATIN SMALL LETTER E WITH ACUTE}: cannot be written as ascii\n",
    )


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("odd"),
        KeyError("odd"),
        TypeError("odd\nlines"),
        RecursionError("odd"),
        ZeroDivisionError("odd"),
    ],
)
def test_a_fault_keeps_its_traceback_in_a_file(ends_with, error, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, line = ends_with(raises(error))
    found = re.match(
        rf"megatron-vespo: internal error: {type(error).__name__}: .*odd.*; please report it, {TRACEBACK}",
        line,
    )
    assert (code, line.count("\n")) == (1, 1) and found
    text = Path(found.group(1)).read_text()
    assert text.startswith("megatron_vespo train --lr 1\nPython ")
    assert "in raising\n" in text and f"\n{type(error).__name__}: " in text


def test_what_a_library_raises_keeps_its_traceback_too(ends_with, tmp_path, monkeypatch):
    import json

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, line = ends_with(lambda: json.loads("{"))
    assert code == 2
    found = re.match(rf"megatron-vespo: Expecting property name .* \(char 1\); {TRACEBACK}", line)
    assert "JSONDecodeError" in Path(found.group(1)).read_text()


def test_without_a_place_for_files_the_traceback_is_printed(ends_with, monkeypatch):
    monkeypatch.setattr("tempfile.mkstemp", raises_any(FileNotFoundError("no usable temporary directory")))
    code, text = ends_with(raises(KeyError("odd")))
    assert code == 1 and text.startswith("Traceback ")
    assert text.endswith(
        "\nmegatron-vespo: internal error: KeyError: 'odd'; please report it, with the traceback above\n"
    )


def raises_any(error: BaseException):
    def raising(*args, **options):
        raise error

    return raising


@pytest.mark.long
@pytest.mark.parametrize(
    "words", ["train --help", "simulate --help", "simulate --gpus 8 --rollout-batches 2"]
)
def test_a_reader_that_has_gone_is_no_error(words):
    with subprocess.Popen(
        [*MODULE, *words.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, 141)  # argparse itself ignores it


def test_a_pipe_of_a_worker_is_another_thing(ends_with):
    code, line = ends_with(raises(system_error(errno.EPIPE, "engine")))
    assert (code, line) == (1, "megatron-vespo: engine: Broken pipe\n")


def test_a_misspelt_flag_is_compared_with_all_that_there_are(capsys):
    parser = FlagParser(prog="program x")
    parser.add_argument("--reward-function")
    parser.add_subparsers(required=True).add_parser("sub").add_argument("--force", action="store_true")
    for words, says in {
        "--reward-functon=f sub":
            "unrecognized arguments: --reward-functon=f; did you mean --reward-function?",
        "sub --reward-functoin=f --forse":
            "unrecognized arguments: --reward-functoin=f --forse; did you mean --reward-function, --force?",
        "sub more": "unrecognized arguments: more",
        "sub --quite-another": "unrecognized arguments: --quite-another",
        "sub --reward-func f": "unrecognized arguments: --reward-func f; did you mean --reward-function?",
    }.items():  # fmt: skip
        with pytest.raises(SystemExit):
            parser.parse_args(words.split())
        assert capsys.readouterr().err.splitlines()[-1] == f"program x: error: {says}"


@pytest.mark.parametrize(
    ("word", "says"), [("nan", "'nan' is not a number"), ("9" * 30, f"{'9' * 30} is too large")]
)
def test_numbers_are_numbers(capsys, word, says):
    for parser in (FlagParser(), argparse.ArgumentParser()):
        FlagParser.adopt(parser)
        parser.add_argument("--x", type=float if word == "nan" else int)
        with pytest.raises(SystemExit):
            parser.parse_args(["--x", word])
        assert capsys.readouterr().err.endswith(f"error: argument --x: {says}\n")


def test_a_command_that_parses_twice_knows_both_lists(capsys):
    own = FlagParser(prog="program twice")
    own.add_argument("--nodes")
    other = FlagParser(prog="program twice")
    other.add_argument("--lr")
    with pytest.raises(SystemExit):
        other.parse_args(own.parse_known_args(["--lr", "1", "--node", "2"])[1])
    assert "unrecognized arguments: --node 2; did you mean --nodes?" in capsys.readouterr().err


def test_output_folders_are_tried_before_anything_starts(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for folder, says in {
        "file": "file is not a folder",
        "file/a/b": "file is not a folder",
        "dangling/a": "dangling is not a folder",
    }.items():
        with pytest.raises(ValueError, match=f"^--save {tmp_path}/{folder}: {tmp_path}/{says}$"):
            check_folder("--save", tmp_path / folder, writable=True)
    with pytest.raises(ValueError, match="^--save x{300}: File name too long$"):
        check_folder("--save", Path("x" * 300), writable=True)
    with pytest.raises(ValueError, match="^--save /proc/x: nothing can be written into /proc: "):
        check_folder("--save", Path("/proc/x"), writable=True)
    check_folder("--save", Path("/proc/x"))
    with pytest.raises(
        ValueError, match=f"^--save {tmp_path}/dangling: {tmp_path}/dangling is not a folder$"
    ):
        check_folder("--save", tmp_path / "dangling")
    check_folder("--save", tmp_path / "a/b/c", writable=True)
    check_folder("--save", tmp_path, writable=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


def test_output_files_are_tried_too(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=f"^--json {tmp_path}: is a folder, not a file$"):
        check_output_file("--json", tmp_path)
    with pytest.raises(ValueError, match=f"^--json {tmp_path}/file/b: {tmp_path}/file is not a folder$"):
        check_output_file("--json", tmp_path / "file/b")
    with pytest.raises(ValueError, match="^--json x{300}: File name too long$"):
        check_output_file("--json", Path("x" * 300))
    for path in (tmp_path / "new", tmp_path / "a/b/new", tmp_path / "file", None):
        check_output_file("--json", path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        ("> /dev/full", 1, "megatron-vespo: the output cannot be written: No space left on device\n"),
        (">&-", 0, ""),
    ],
)
def test_an_output_that_cannot_be_written(redirected, code, said):
    program = "from megatron_vespo.commands.main import main; main()"
    command = f"{sys.executable} -c '{program}' --help {redirected}"
    done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, said)
