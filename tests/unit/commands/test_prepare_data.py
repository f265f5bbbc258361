"""Public prompt sets into ours: what is left out, what is said, and the real thing where it is at hand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_vespo.commands.main import run
from megatron_vespo.commands.prepare_data.known_sets import KNOWN_SETS
from megatron_vespo.commands.prepare_data.same_question import HeldOut, normalised
from tests.support.hub_stub import HubStub

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
DAPO_START = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_END = '\n\nRemember to put your answer on its own line after "Answer:".'
LONG = (
    "A baker has {n} trays and puts twelve rolls on each of them every morning before the shop opens its "
    "doors to the street; how many rolls does she bake in a week of seven days?"
)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(tmp_path: Path, name: str, source: Path, *flags: str) -> list[dict]:
    out = tmp_path / "out.jsonl"
    assert run(["prepare-data", name, str(out), "--source", str(source), "--force", *flags]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def said(output: str, label: str) -> int:
    [number] = re.findall(rf"^{re.escape(label)} +([\d,]+)$", output, re.MULTILINE)
    return int(number.replace(",", ""))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is $x^2$?", "what is  x^2 ?"),
        (r"Find $\dfrac{1}{2}$.", r"Find $\frac{1}{2}$"),
        (r"$\left( a, b \right)$", "$(a,b)$"),
        (r"Is $n\,$ \text{even}?", "Is $n$ even?"),
    ],
)
def test_the_same_question(one, other):
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(("one", "other"), [("1 + 2", "1 - 2"), ("x^2", "x^3"), ("2.5", "25"), ("a/b", "ab")])
def test_not_the_same_question(one, other):
    assert normalised(one) != normalised(other)


def test_near_questions():
    held_out = HeldOut([LONG.format(n=9), "What is one and one?"])
    assert held_out.same(LONG.format(n="$9$").upper()) == LONG.format(n=9)
    assert held_out.near(LONG.format(n=30)) == LONG.format(n=9)
    assert held_out.near("Now then. " + LONG.format(n=9) + " And in a year?") == LONG.format(n=9)
    assert held_out.near("A baker has 9 trays and puts twelve rolls on each of them; how many rolls?") is None
    # too short to be told from a phrase
    assert held_out.near("What is one and one and then one more of the same kind, all in all?") is None


def test_every_problem_is_written_once(tmp_path, capsys):
    rows = [
        {"problem": "What is 1 + 1?", "answer": "2", "id": "a"},
        {"problem": "What is 1 + 1?", "answer": "2", "id": "b"},  # to the letter
        {"problem": "what is  $1 + 1$", "answer": "2", "id": "c"},  # in another spelling
        {"problem": "Half of one?", "answer": r"\frac{1}{2}", "id": "d"},
        {"problem": "half of one", "answer": "0.5", "id": "e"},  # the same answer, written differently
        {"problem": "A root of x^2 = 4?", "answer": "2", "id": "f"},
        {"problem": "a root of x^2=4", "answer": "-2", "id": "g"},  # nobody knows which
        {"problem": "Three?", "answer": 3.0, "id": "h"},
    ]
    found = prepared(tmp_path, "aime25", write_jsonl(tmp_path / "in.jsonl", rows))
    assert found == [
        {"question": "What is 1 + 1?", "answer": "2", "source": "aime25/a"},
        {"question": "Half of one?", "answer": r"\frac{1}{2}", "source": "aime25/d"},
        {"question": "Three?", "answer": "3", "source": "aime25/h"},
    ]
    output = capsys.readouterr().out
    assert said(output, "rows read") == 8
    assert said(output, "repeated to the letter") == 1
    assert said(output, "repeated in another spelling") == 2
    assert said(output, "same question, different answers") == 2
    assert said(output, "written") == 3
    assert "WARNING: aime25 is known to have 30 problems" in output


def test_rows_without_an_answer(tmp_path, capsys):
    rows = [{"problem": f"{i}?", "answer": str(i)} for i in range(8)]
    rows += [{"problem": "x?", "answer": None}, {"problem": "y?", "answer": " "}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    assert len(prepared(tmp_path, "deepscaler", source, "--max-unusable", "0.2")) == 8
    first = f"{source} line 9: none of the columns answer, Answer there, it has problem, answer"
    output = capsys.readouterr().out
    assert said(output, "without a usable question or answer") == 2
    assert f"the first unusable row: {first}" in output
    out = tmp_path / "other.jsonl"
    assert run(["prepare-data", "deepscaler", str(out), "--source", str(source)]) == 2
    assert capsys.readouterr().err == (
        f"megatron-vespo: {source}: 2 of 10 rows have no usable question or answer, more than --max-unusable "
        f"0.01; the first one: {first}\n"
    )
    assert not out.exists()


def test_what_is_held_out_is_not_trained_on(tmp_path, capsys):
    rows = [{"problem": LONG.format(n=n), "answer": str(84 * n)} for n in (9, 30)]
    rows.append({"problem": "What is 6 x 7?", "answer": "42"})
    instruction = r"Put the answer in \boxed{}."
    held_out = write_jsonl(
        tmp_path / "test.jsonl", [{"question": LONG.format(n=9) + "\n" + instruction, "answer": "756"}]
    )
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    found = prepared(tmp_path, "deepscaler", source, "--exclude", str(held_out), "--instruction", instruction)
    assert [row["question"] for row in found] == ["What is 6 x 7?\n" + instruction]
    output = capsys.readouterr().out
    assert said(output, "same as one of 1 held-out questions") == 1
    assert said(output, "nearly the same") == 1
    assert "nearly the same: A baker has 30 trays" in output


def test_dapo_has_every_problem_many_times_between_two_sentences(tmp_path, capsys):
    rows = [
        {
            "prompt": [{"role": "user", "content": DAPO_START + f"Count to {n}.\n\nThen stop." + DAPO_END}],
            "reward_model": {"ground_truth": str(n), "style": "rule"},
            "extra_info": {"index": f"id-{n}"},
        }
        for n in (3, 5)
    ] * 100
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data/dapo-math-17k.parquet")
    assert prepared(tmp_path, "dapo-math-17k", folder) == [
        {"question": f"Count to {n}.\n\nThen stop.", "answer": str(n), "source": f"dapo-math-17k/id-{n}"}
        for n in (3, 5)
    ]
    assert said(capsys.readouterr().out, "repeated to the letter") == 198


def test_a_json_list(tmp_path):
    source = tmp_path / "deepscaler.json"
    source.write_text(json.dumps([{"problem": "1?", "answer": "1", "solution": "clear"}]))
    assert prepared(tmp_path, "deepscaler", source) == [
        {"question": "1?", "answer": "1", "source": "deepscaler/0"}
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["aime26", "out.jsonl"], "no set 'aime26'; there are " + ", ".join(KNOWN_SETS)),
        (["aime24", "out.json"], "out.json: must end in .jsonl"),
        (["aime24", "out.jsonl", "--source", "none"], "--source none: no such file or folder"),
        (["aime24", "out.jsonl", "--exclude", "none.jsonl"], "--exclude none.jsonl: no such file"),
        (["aime24", "out.jsonl", "--max-unusable", "2"], "--max-unusable 2: must be between 0 and 1"),
    ],
)
def test_mistakes(flags, message, capsys):
    assert run(["prepare-data", *flags]) == 2
    assert capsys.readouterr().err == f"megatron-vespo: {message}\n"


def test_which_file_of_a_folder(tmp_path, capsys):
    for name in ("test.jsonl", "train.jsonl"):
        write_jsonl(tmp_path / name, [{"problem": name, "answer": "1"}])
    assert [row["question"] for row in prepared(tmp_path, "amc23", tmp_path)] == ["test.jsonl"]
    assert run(["prepare-data", "aime24", str(tmp_path / "o.jsonl"), "--source", str(tmp_path)]) == 2
    assert (
        "nothing there is data/train*, the train split of HuggingFaceH4/aime_2024" in capsys.readouterr().err
    )


def from_hub(folder: Path, url: str, name: str) -> subprocess.CompletedProcess:
    program = "import sys; from megatron_vespo.commands.main import run; sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "prepare-data", name, str(folder / "out.jsonl")]
    environment = os.environ | {
        "HF_ENDPOINT": url, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_from_a_hub(tmp_path):
    """Of the repository's files only those of the split."""
    rows = [{"problem": f"{i} + 1 = ?", "answer": str(i + 1), "id": i} for i in range(30)]
    files = {
        "README.md": b"about",
        "test.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "train.jsonl": b"no JSON",
    }
    with HubStub("math-ai/aime25", files) as hub:
        done = from_hub(tmp_path, hub.url, "aime25")
    assert done.returncode == 0, done.stderr
    assert said(done.stdout, "written") == 30 and "WARNING" not in done.stdout
    assert not [path for path in hub.asked if path.endswith(("README.md", "train.jsonl"))]


def test_a_hub_that_does_not_answer_is_one_line(tmp_path):
    done = from_hub(tmp_path, "http://127.0.0.1:9", "aime24")
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("megatron-vespo:")]
    assert line.startswith("megatron-vespo: HuggingFaceH4/aime_2024 cannot be downloaded (")
    assert line.endswith("); --source takes a local copy")


@pytest.mark.skipif(not DATA.is_dir(), reason="needs real data in shared/data")
@pytest.mark.parametrize(
    ("name", "file", "number"),
    [
        ("aime24", "math_eval/aime24.jsonl", 30),
        ("amc23", "math_eval/amc23.jsonl", 40),
        ("gsm8k-test", "gsm8k/test.jsonl", 1319),
    ],
)
def test_real_sets(tmp_path, capsys, name, file, number):
    rows = prepared(tmp_path, name, DATA / file)
    assert len(rows) == number == KNOWN_SETS[name].num_problems
    assert all(re.fullmatch(r"-?[\d,]+(\.\d+)?", row["answer"]) for row in rows)
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.skipif(not DATA.is_dir(), reason="needs real data in shared/data")
def test_real_contamination(tmp_path, capsys):
    """Five test problems are put among the training problems, two of them respelled; all are found."""
    held_out = [json.loads(line) for line in (DATA / "gsm8k/test.jsonl").read_text().splitlines()]
    training = (DATA / "gsm8k/train.jsonl").read_text().splitlines()
    for row in held_out[10:13]:
        training.append(json.dumps(row))
    for row in held_out[20:22]:
        training.append(json.dumps(row | {"question": row["question"].upper().replace(" ", "  ")}))
    source = tmp_path / "train.jsonl"
    source.write_text("\n".join(training) + "\n")
    prepared(tmp_path, "gsm8k", source, "--exclude", str(DATA / "gsm8k/test.jsonl"))
    output = capsys.readouterr().out
    assert said(output, "same as one of 1319 held-out questions") == 5
    # "A train travels 270 miles in 3 hours. At the same rate, ..." is there with a plane and other numbers
    assert said(output, "nearly the same") == 2
