"""Filters, order, pages, and search of recorded responses, against plain Python over all rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.commands.view import query
from megatron_vespo.commands.view.index import STEP_BITS, RunIndex
from megatron_vespo.commands.view.index import rows_of as index_rows
from megatron_vespo.commands.view.query import COLUMNS, PAGE_SIZE, Filters
from megatron_vespo.data.step_records import FOLDER_NAME, read_step, record_path, write_step
from tests.support.step_records import StepShape, random_step, write_steps


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    write_steps(run / FOLDER_NAME, 6, groups=4, group_size=4)
    index = RunIndex(run, run / "cache")
    index.refresh()
    return index


def rows_of(index, sort="step", **filters) -> list[dict]:
    """All pages."""
    chosen, rows = Filters.of({name: str(value) for name, value in filters.items()}), []
    with index.reading() as connection:
        total = query.total(connection, chosen)
        for number in range(total // PAGE_SIZE + 1):
            rows += query.page(connection, chosen, sort, number)
    assert len(rows) == total
    return rows


FILTERS = [
    ({"step_min": 2, "step_max": 3}, lambda row: 2 <= row["step"] <= 3),
    ({"reward_min": 0.5}, lambda row: row["reward"] >= 0.5),
    ({"reward_max": 0}, lambda row: row["reward"] <= 0),
    ({"sign": "positive"}, lambda row: row["advantage"] > 0),
    ({"sign": "negative"}, lambda row: row["advantage"] < 0),
    ({"sign": "zero"}, lambda row: row["advantage"] == 0),
    ({"length_min": 20, "length_max": 60}, lambda row: 20 <= row["length"] <= 60),
    ({"staleness_min": 1}, lambda row: row["lag"] >= 1),
    ({"staleness_max": 0}, lambda row: row["lag"] == 0),
    ({"log_w_min": -0.05, "log_w_max": 0.05}, lambda row: -0.05 <= row["log_w"] <= 0.05),
    ({"finish": "stop"}, lambda row: row["finish"] == "stop"),
    ({"source": "sums"}, lambda row: row["source"] == "sums"),
    ({"group": 2}, lambda row: row["group"] == 2),
    (
        {"status": "ok", "sign": "negative", "step_max": 2},
        lambda row: row["advantage"] < 0 and row["step"] <= 2,
    ),
]


@pytest.mark.parametrize("filters, holds", FILTERS, ids=[" ".join(one) for one, _ in FILTERS])
def test_a_filter_chooses_what_it_says(index, filters, holds):
    every = rows_of(index)
    expected = [row for row in every if holds(row)]
    assert len(every) == 96 and 0 < len(expected)
    assert rows_of(index, **filters) == expected


@pytest.mark.parametrize("column", [query.API_NAMES.get(name, name) for name in COLUMNS])
def test_every_column_sorts_in_both_directions(index, column):
    upwards = [row[column] for row in rows_of(index, column)]
    assert upwards == sorted(upwards)
    assert [row[column] for row in rows_of(index, f"-{column}")] == sorted(upwards, reverse=True)


def test_unknown_numbers_come_last(tmp_path):
    record = random_step(1)
    record.log_w[3] = np.nan
    write_step(record_path(tmp_path / FOLDER_NAME, 1), record)
    index = RunIndex(tmp_path, tmp_path / "cache")
    index.refresh()
    for sort in ("log_w", "-log_w"):
        assert rows_of(index, sort)[-1]["index"] == 3 and rows_of(index, sort)[-1]["log_w"] is None


def test_pages_do_not_overlap(index):
    with index.reading() as connection:
        pages = [query.page(connection, Filters(), "finish", number) for number in range(3)]
    places = [(row["step"], row["index"]) for page in pages for row in page]
    assert [len(page) for page in pages] == [50, 46, 0] and len(set(places)) == 96


def test_facets_count_the_chosen_rows(index):
    chosen = Filters(step_max=3)
    rows = rows_of(index, step_max=3)
    with index.reading() as connection:
        found = query.facets(connection, chosen)
    assert found["source"] == {
        name: sum(row["source"] == name for row in rows) for name in {row["source"] for row in rows}
    }
    assert sum(found["sign"].values()) == len(rows) and found["status"] == {"ok": len(rows)}
    assert found["step"] == [1, 3] and found["total"] == len(rows)
    assert found["length"] == [min(row["length"] for row in rows), max(row["length"] for row in rows)]


def test_search_finds_words_beginnings_and_phrases(tmp_path):
    texts = [
        "so we add seven",
        "we so addition",
        "Add, we",
        "nothing (here) AND there",
        "add-on: \\boxed{42}",
    ]
    index = RunIndex(tmp_path, tmp_path / "cache")
    record = random_step(1, StepShape(groups=1, group_size=5))
    with index._writing() as connection:
        connection.executemany(f"INSERT INTO responses VALUES ({', '.join('?' * 20)})", index_rows(record, 1))
        rows = [(1 << STEP_BITS | i, text) for i, text in enumerate(texts)]
        connection.executemany("INSERT INTO texts (rowid, text) VALUES (?, ?)", rows)

    def found(text: str) -> list[int]:
        return [row["index"] for row in rows_of(index, "index", text=text)]

    assert found("add") == [0, 1, 2, 4]
    assert found('"add"') == [0, 2, 4]
    assert found("so we") == [0, 1]
    assert found('"so we"') == [0]
    assert found("\\boxed{42}") == [4] and found("boxed{41}") == []
    assert found("AND") == [3] and found("we AND so") == []
    assert found("sevens") == []
    assert [row["text"] for row in rows_of(index, "index", text='"so we"')] == [texts[0]]


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(
        st.one_of(st.sampled_from("\"'*^:+-(){}[]~ANDORNET\\%_;\0 \n"), st.characters()), max_size=24
    )
)
def test_no_search_text_is_syntax(index, text):
    with index.reading() as connection:
        chosen = Filters.of({"text": text})
        assert query.total(connection, chosen) == len(query.page(connection, chosen, "step", 0)) or (
            query.total(connection, chosen) > PAGE_SIZE
        )
        query.facets(connection, chosen)


def test_text_of_punctuation_alone_finds_nothing(index):
    assert rows_of(index, text='" ( * "') == []


@pytest.mark.parametrize("name, value", [
    ("step_min", "three"), ("reward_min", "x"), ("sign", "up"), ("group", "1.5"), ("length_max", "1e3"),
    ("reward_max", "nan"), ("log_w_min", "inf"), ("step_max", "9" * 30),
])  # fmt: skip
def test_a_wrong_filter_is_named(name, value):
    with pytest.raises(ValueError, match=name) as error:
        Filters.of({name: value})
    assert value in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("sort", ["text", "id", "step; DROP TABLE responses", "--step", ""])
def test_a_wrong_order_is_named(sort):
    with pytest.raises(ValueError, match="sort is"):
        query.order(sort)


def test_a_group_is_whole_and_has_longer_texts(index):
    with index.reading() as connection:
        rows = query.group_rows(connection, 3, 1)
    assert [row["index"] for row in rows] == [4, 5, 6, 7] and {row["group"] for row in rows} == {1}
    record = read_step(record_path(index._folder, 3))
    assert [row["text"] for row in rows] == [record.text(one.token_ids) for one in record.completions[4:8]]


@pytest.mark.parametrize("search, shown", [
    ("seven", "seven is the answer"), ("SEV", "seven is the answer"), ('"the answer"', "the answer"),
    ("the.answer", "the answer"), ("absent", "seven"), ("(", "seven"),
])  # fmt: skip
def test_a_row_shows_its_text_around_the_first_match(search, shown):
    text = f"{'so ' * 100}seven is the answer, {'or ' * 100}"
    found = query.pattern(search)
    part = text[: query.PREVIEW] if found is None else query.around(text, found)
    assert (shown in part) == (search not in ("absent", "(")) and len(part) <= query.PREVIEW + 1
    assert part.startswith("…") == (shown in part)
