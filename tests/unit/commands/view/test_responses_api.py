"""The API of recorded responses over HTTP: what it answers, and how it refuses."""

import asyncio
import time

import pytest
from aiohttp.test_utils import TestClient, TestServer

from megatron_vespo.commands.view.runs import Runs
from megatron_vespo.commands.view.server import make_app
from megatron_vespo.data.step_records import FOLDER_NAME, record_path
from tests.support.step_records import write_steps

TOKEN = "a-token-of-this-test"
RESPONSES = 32


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_steps(tmp_path / "run" / FOLDER_NAME, 2)
    return tmp_path / "run"


def ask(run, *paths: str) -> list[tuple[int, dict]]:
    """(status, JSON) of each path below /api/runs/run/, after the index is complete."""

    async def all_of_them():
        async with TestClient(TestServer(make_app(Runs([run]), TOKEN))) as client:
            end = time.monotonic() + 60
            while (await one(client, "responses"))[1]["index"]["indexed"] < 2:
                assert time.monotonic() < end
                await asyncio.sleep(0.05)
            return [await one(client, path) for path in paths]

    async def one(client, path):
        separator = "&" if "?" in path else "?"
        async with client.get(f"/api/runs/run/{path}{separator}token={TOKEN}") as reply:
            return reply.status, await reply.json()

    return asyncio.run(all_of_them())


def test_every_path_answers(run):
    table, one, group, found, other = ask(
        run, "responses?sign=negative&sort=-log_w&page=0", "responses/2/3", "groups/2/1", "distributions",
        "what_if?step_min=1&step_max=1&c1_positive=1.5&mini_batches=1",
    )  # fmt: skip
    assert {status for status, _ in (table, one, group, found, other)} == {200}
    assert table[1]["total"] == len(table[1]["rows"]) == table[1]["facets"]["sign"]["negative"]
    assert table[1]["index"] == {
        "files": 2, "indexed": 2, "responses": RESPONSES, "damaged": [], "problem": ""
    }  # fmt: skip
    assert (one[1]["step"], one[1]["index"], one[1]["responses"]) == (2, 3, 16)
    assert [row["index"] for row in group[1]["rows"]] == [4, 5, 6, 7] and group[1]["prompt"]["text"]
    assert found[1]["responses"] == RESPONSES and found[1]["range"] == [1, 2]
    assert other[1]["responses"] == 16 and other[1]["kernel"]["positive"]["c1"] == 1.5
    assert other[1]["kernel"]["negative"]["c1"] == 3.0  # the run's own


@pytest.mark.parametrize("path, status, named", [
    ("responses?sort=text", 400, "sort"), ("responses?page=-1", 400, "page"),
    ("responses?page=99999999999999999", 400, "page"), ("responses?reward_min=x", 400, "reward_min"),
    ("responses/2/16", 404, "16"), ("responses/9/0", 404, "step 9"), ("responses/x/0", 400, "step"),
    ("groups/1/99", 404, "group 99"), ("what_if?c1_positive=-1", 400, "c1_positive"),
    ("what_if?c2_negative=nan", 400, "c2_negative"), ("what_if?mini_batches=two", 400, "mini_batches"),
    ("distributions?step_min=1.5", 400, "step_min"),
])  # fmt: skip
def test_a_wrong_request_is_one_line_that_names_it(run, path, status, named):
    [(found, answer)] = ask(run, path)
    assert found == status and named in answer["error"] and "\n" not in answer["error"]
    assert "internal" not in answer["error"]


def test_a_damaged_file_is_one_line(run):
    record_path(run / FOLDER_NAME, 2).write_bytes(b"PK\x03\x04")
    [(status, answer), (_, table)] = ask(run, "responses/2/0", "responses")
    assert status == 400 and "step-000002.npz" in answer["error"]
    assert table["total"] == 16 and len(table["index"]["damaged"]) == 1
