"""Work that is killed goes on where it stopped, with the same settings only."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vespo.commands.evaluate.result_file import ResultFile

SETTINGS = {"--temperature": 1.0, "--seed": 1, "prompt sets": {"a": "a.jsonl 12"}, "--num-prompts": None}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "out" / "prompts.jsonl"


def made(path: Path, number: int) -> Path:
    with ResultFile(path, SETTINGS) as results:
        for prompt in range(number):
            results.append({"prompt": prompt})
    return path


def test_it_goes_on(path):
    made(path, 2)
    with ResultFile(path, dict(reversed(SETTINGS.items()))) as results:
        assert results.records == [{"prompt": 0}, {"prompt": 1}]
        results.append({"prompt": 2})
        assert len(results.records) == 3
    assert lines(path) == [{"settings": SETTINGS}, *({"prompt": prompt} for prompt in range(3))]


def test_a_line_is_on_the_disk_when_append_returns(path, monkeypatch):
    synced = []
    with ResultFile(path, SETTINGS) as results:
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(len(lines(path))))
        results.append({"prompt": 0})
    assert synced == [2]


def test_killed_at_any_byte(path):
    """Whatever is left of the file, what goes on has all whole lines and no other."""
    whole = made(path, 3).read_bytes()
    ends = [position + 1 for position, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        num_lines = sum(end <= size for end in ends)
        with ResultFile(path, SETTINGS) as results:
            assert results.records == [{"prompt": prompt} for prompt in range(max(0, num_lines - 1))]
            for prompt in range(len(results.records), 3):
                results.append({"prompt": prompt})
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--temperature": 0.6}, "--temperature 1.0, now it is 0.6"),
        ({"--num-prompts": 5}, "--num-prompts null, now it is 5"),
        (
            {"prompt sets": {"a": "a.jsonl 13"}},
            'prompt sets {"a": "a.jsonl 12"}, now it is {"a": "a.jsonl 13"}',
        ),
        ({"--top-p": 0.9}, "--top-p null, now it is 0.9"),
    ],
)
def test_changed_settings_are_refused(path, changed, said):
    before = made(path, 1).read_bytes()
    message = f"{path} was made with {said}: give the same again, or another folder"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ResultFile(path, SETTINGS | changed)
    assert path.read_bytes() == before


def test_a_setting_that_there_is_no_more_is_refused(path):
    made(path, 1)
    with pytest.raises(ValueError, match=r"was made with --seed 1, now it is null"):
        ResultFile(path, {name: value for name, value in SETTINGS.items() if name != "--seed"})


def test_settings_may_change_until_something_has_finished(path):
    made(path, 0)
    with ResultFile(path, SETTINGS | {"--seed": 2}) as results:
        results.append({"prompt": 0})
    assert lines(path)[0]["settings"]["--seed"] == 2


def test_damage_in_the_middle_is_not_skipped(path):
    content = made(path, 2).read_text().splitlines()
    path.write_text("\n".join([content[0], content[1][:5], content[2]]) + "\n")
    with pytest.raises(ValueError, match=r"prompts.jsonl line 2: not JSON"):
        ResultFile(path, SETTINGS)


def test_another_file_is_left_alone(path):
    path.parent.mkdir()
    path.write_text('{"question": "1 + 1 = ?"}\n')
    with pytest.raises(ValueError, match=r"line 1: no settings, it is no file of finished work"):
        ResultFile(path, SETTINGS)
    assert path.read_text() == '{"question": "1 + 1 = ?"}\n'


def test_two_processes_do_not_share_it(path):
    program = (
        "import sys; from pathlib import Path\n"
        "from megatron_vespo.commands.evaluate.result_file import ResultFile\n"
        "try: ResultFile(Path(sys.argv[1]), {})\n"
        "except ValueError as error: print(error)"
    )
    with ResultFile(path, SETTINGS):
        done = subprocess.run(
            [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60
        )
    assert done.stdout == (
        f"{path}: another process is writing it; wait for that, or give another folder\n"
    ), done.stderr


def test_closed_is_closed(path):
    with ResultFile(path, SETTINGS) as results:
        pass
    with pytest.raises(RuntimeError, match="is closed"):
        results.append({"prompt": 0})
