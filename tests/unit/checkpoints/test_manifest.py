"""manifest.json, and the proof that fills it."""

import json
import threading
from threading import Event

import pytest
import torch

from megatron_vespo.checkpoints.copying import Budget, in_threads, progress_bar, prove
from megatron_vespo.checkpoints.manifest import read_manifest, write_manifest
from megatron_vespo.checkpoints.names import MANIFEST_NAME
from megatron_vespo.checkpoints.ranks import Ranks
from megatron_vespo.checkpoints.spans import HASH, Span, digest, row_ranges
from tests.support.stored_tensors import StoredTensors

ENTRY = {"dtype": "float32", "shape": [2], "hash": "ab"}


def test_it_is_read_as_it_was_written(tmp_path):
    write_manifest(tmp_path, tmp_path / "some" / "source", {"b": ENTRY, "a": ENTRY})
    assert read_manifest(tmp_path) == {"a": ENTRY, "b": ENTRY}
    content = json.loads((tmp_path / MANIFEST_NAME).read_text())
    assert content["source"] == "source", "folders move"
    assert list(content["tensors"]) == ["a", "b"]


def test_there_is_none(tmp_path):
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", "{}", '{"tensors": {}}', '{"tensors": {}, "hash": "md5"}',
        json.dumps({"tensors": {"a": {}}, "hash": HASH}), json.dumps({"tensors": {"a": None}, "hash": HASH}),
        json.dumps({"tensors": [], "hash": HASH}), "[" * 99_999, "\x00",
    ],
)  # fmt: skip
def test_broken(tmp_path, content):
    (tmp_path / MANIFEST_NAME).write_text(content)
    with pytest.raises(ValueError, match=f"^{tmp_path / MANIFEST_NAME} is no manifest: "):
        read_manifest(tmp_path)


def digests_of(values: torch.Tensor, rows: int, name: str = "t") -> dict[Span, bytes]:
    spans = row_ranges(len(values), values[0].nbytes, rows * values[0].nbytes)
    return {Span(name, start, stop): digest(values[start:stop]) for start, stop in spans}


def proven(reader, digests):
    with progress_bar("", 0, True, Ranks()) as bar:
        return prove(reader, digests, Budget(workers=2), Ranks(), bar)


def test_the_hash_does_not_depend_on_the_spans():
    values = torch.rand(7, 3)
    entries = [proven(StoredTensors({"t": values}), digests_of(values, rows))["t"] for rows in (1, 2, 3, 7)]
    assert entries == [{"dtype": "float32", "shape": [7, 3], "hash": entries[0]["hash"]}] * 4
    changed = values.clone()
    changed[6, 2] += 1
    assert proven(StoredTensors({"t": changed}), digests_of(changed, 2))["t"]["hash"] != entries[0]["hash"]


def test_the_proof_fails():
    values = torch.rand(7, 3)
    good = digests_of(values, 2)
    changed = values.clone()
    changed[3, 1] = -changed[3, 1]

    def without(first_row: int) -> dict[Span, bytes]:
        return {span: found for span, found in good.items() if span.start != first_row}

    for stored, digests, expected in [
        ({"t": changed}, good, "t[2:4] does not read back as it was written"),
        ({"t": values}, without(0), "rows 0 to 2 of t were never or twice written"),
        ({"t": values}, without(2), "rows 2 to 4 of t were never or twice"),
        ({"t": values}, without(6), "t has 7 rows, 6 were written"),
        ({"t": values}, good | digests_of(values, 3), "of t were never or twice written"),
        ({"t": values, "u": values}, good, "u is on one side only (1 in all)"),
        ({"t": values}, good | digests_of(values, 3, "u"), "u is on one side only (1 in all)"),
        ({"t": values[[1, 0, 2, 3, 4, 5, 6]]}, good, "t[0:2] does not read back"),
    ]:
        with pytest.raises(ValueError) as error:
            proven(StoredTensors(stored), digests)
        assert str(error.value).startswith("the proof fails: ") and expected in str(error.value)


def test_the_first_failure_stops_the_other_threads():
    stopped, started = [], threading.Barrier(3)

    def work(number: int, run: str, stop: Event) -> None:
        started.wait(10)
        if run == "bad":
            raise ValueError("it broke")
        stopped.append(stop.wait(10))

    with pytest.raises(ValueError, match="it broke"):
        in_threads(["good", "bad", "good"], work)
    assert stopped == [True, True]
    assert in_threads([1, 2, 3], lambda number, run, stop: (number, run)) == [(0, 1), (1, 2), (2, 3)]
    assert in_threads([], lambda *_: None) == []


def test_budgets():
    assert Budget(2 * 2**30, 4).span_bytes == 64 * 2**20
    small = Budget(2**30, 8)
    assert 2**20 <= small.span_bytes < 64 * 2**20
    with pytest.raises(ValueError, match=r"^0\.70 GiB of memory are too few: at least 0\.71$"):
        Budget(int(0.7 * 2**30), 8)
    least = Budget(700 * 2**20 + 8 * 4 * 2**20, 8)
    assert least.span_bytes == 2**20
