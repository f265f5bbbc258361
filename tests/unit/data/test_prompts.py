from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo.data.prompts import Columns, PromptCursor, PromptSet, load_prompts
from megatron_vespo.data.rows import file_rows
from megatron_vespo.data.tokenizer import ChatFormat
from megatron_vespo.types import Prompt
from tests.support.builders import make_prompt
from tests.support.letter_tokenizer import letters

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.tool_calls is defined %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = ChatFormat(letters(CHAT_TEMPLATE))
PLAIN = ChatFormat(letters(None), apply_template=False)
COLUMNS = ("prompt_key", "answer_key", "answer_pattern")


def load(path: Path, chat_format: ChatFormat = CHAT, **overrides) -> PromptSet:
    options = {"max_prompt_tokens": 1000, "overlong": "error", "flag": "--prompt-data"} | overrides
    keys = {"prompt_key": "prompt", "answer_key": "answer", "answer_pattern": None} | options
    options = {name: value for name, value in options.items() if name not in COLUMNS}
    return load_prompts(path, chat_format, Columns(*(keys[name] for name in COLUMNS)), **options)


def write_lines(tmp_path: Path, *lines: str | dict) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
    return path


def write_table(path: Path, **columns) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=1000)


def fails_with(path: Path, message: str, *chat_format: ChatFormat, **overrides) -> None:
    """The error is exactly this one line."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load(path, *chat_format, **overrides)


def text_of(prompt: Prompt) -> str:
    return "".join(map(chr, prompt.token_ids))


def test_jsonl_string_prompt_becomes_a_user_message(tmp_path):
    path = write_lines(
        tmp_path, {"prompt": "6*7=?", "answer": 42, "level": 3}, "", "  ", {"prompt": "b", "answer": " y "}
    )
    loaded = load(path)
    assert loaded.path == path and loaded.num_overlong == 0
    first, second = loaded.prompts
    assert text_of(first) == "<user>6*7=?<assistant>"
    assert first.token_ids.dtype == "int32"
    assert (first.prompt_id, first.answer, first.text, first.metadata) == (0, "42", "6*7=?", {"level": 3})
    assert (second.prompt_id, second.answer, second.metadata) == (1, "y", {})


def test_message_list_keeps_every_message_and_shows_the_users(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    (prompt,) = load(write_lines(tmp_path, {"prompt": messages, "answer": "1"})).prompts
    assert text_of(prompt) == "<system>s<user>q<assistant>"
    assert prompt.text == "q"


def test_without_chat_template_tokenises_the_text_itself(tmp_path):
    path = write_lines(
        tmp_path,
        {"prompt": "ab", "answer": "1"},
        {"prompt": [{"role": "user", "content": "c"}], "answer": "2"},
    )
    loaded = load(path, PLAIN)
    assert [prompt.token_ids.tolist() for prompt in loaded.prompts] == [[97, 98], [99]]


@pytest.mark.parametrize(
    ("cell", "answer"),
    [(42, "42"), (14.0, "14"), (0.875, "0.875"), (-3, "-3"), (1e16, "10000000000000000"), ("1,234", "1,234")],
)
def test_number_answers_become_text(tmp_path, cell, answer):
    assert load(write_lines(tmp_path, {"prompt": "p", "answer": cell})).prompts[0].answer == answer


def test_answer_pattern_cuts_the_reference_out(tmp_path):
    path = write_lines(tmp_path, {"prompt": "p", "answer": "2+2=4\n#### 4 "})
    assert load(path, answer_pattern=r"####\s*(.+)").prompts[0].answer == "4"


def test_parquet_columns_of_32_bit_floats_are_the_decimals_that_were_written(tmp_path):
    path = tmp_path / "floats.parquet"
    answers = pyarrow.array([0.1, 1234.56, 14.0, None], pyarrow.float32())
    write_table(path, q=["a", "b", "c", "d"], answer=answers)
    assert [row["answer"] for _, row in file_rows(path, "--prompt-data")] == [0.1, 1234.56, 14.0, None]


def test_parquet_with_nested_columns_like_dapo(tmp_path):
    path = tmp_path / "dapo.parquet"
    prompts = [[{"role": "user", "content": f"q{i}", "tool_calls": None}] for i in range(3)]
    scoring = [{"style": "rule", "ground_truth": str(i)} for i in range(3)]
    write_table(path, prompt=prompts, reward_model=scoring, source=["aops"] * 3)
    loaded = load(path, answer_key="reward_model.ground_truth")
    found = [(prompt.prompt_id, prompt.answer, prompt.text) for prompt in loaded.prompts]
    assert found == [(0, "0", "q0"), (1, "1", "q1"), (2, "2", "q2")]
    assert text_of(loaded.prompts[1]) == "<user>q1<assistant>"
    assert loaded.prompts[2].metadata["source"] == "aops"
    wrong = "reward_model.ground_thruth"
    keys = f"no key 'ground_thruth' (--answer-key {wrong}); the keys are style, ground_truth"
    fails_with(path, f"{path} row 1: {keys}; did you mean 'ground_truth'?", answer_key=wrong)
    no_object = f"{path} row 1: --answer-key source.x: source is a string, not an object"
    fails_with(path, no_object, answer_key="source.x")


def test_column_name_with_a_dot_wins_over_a_path(tmp_path):
    path = write_lines(tmp_path, {"prompt": "p", "a.b": "flat", "a": {"b": "nested"}})
    prompt = load(path, answer_key="a.b").prompts[0]
    assert (prompt.answer, prompt.metadata) == ("flat", {"a": {"b": "nested"}})


def test_overlong_prompts_are_left_out_and_counted(tmp_path):
    rows = [{"prompt": "x" * n, "answer": str(n)} for n in (1, 9, 2, 8)]
    path = write_lines(tmp_path, *rows)
    loaded = load(path, PLAIN, max_prompt_tokens=8, overlong="skip")
    # Row numbers stay those of the file, so that a resumed run sees the same ids.
    assert [(p.prompt_id, p.answer) for p in loaded.prompts] == [(0, "1"), (2, "2"), (3, "8")]
    assert loaded.num_overlong == 1
    too_long = f"{path} line 2: the prompt has 9 tokens, more than --max-prompt-tokens 8"
    fails_with(path, f"{too_long}; --overlong-prompts skip would leave it out", PLAIN, max_prompt_tokens=8)
    all_of_them = f"{path}: all 4 prompts are longer than --max-prompt-tokens 0"
    fails_with(path, all_of_them, PLAIN, max_prompt_tokens=0, overlong="skip")


def test_file_errors(tmp_path):
    missing, csv, broken, empty = (
        tmp_path / name for name in ("no.jsonl", "a.csv", "b.parquet", "e.parquet")
    )
    fails_with(missing, f"--prompt-data {missing}: no such file")
    fails_with(tmp_path, f"--prompt-data {tmp_path}: is a folder; name one .jsonl or .parquet file in it")
    csv.write_text("a,b")
    fails_with(csv, f"--prompt-data {csv}: must be a .jsonl or .parquet file")
    write_table(empty, prompt=pyarrow.array([], pyarrow.string()))
    for path in (write_lines(tmp_path, "", " "), empty):
        fails_with(path, f"{path}: the file is empty; --prompt-data needs one prompt a row")
    broken.write_bytes(b"no parquet here")
    with pytest.raises(ValueError, match=f"^{re.escape(str(broken))}: not a parquet file: .+$"):
        load(broken)


def test_bytes_that_are_not_utf8_and_byte_order_mark(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "p", "answer": "1"}\n')
    assert load(path).prompts[0].answer == "1"
    path.write_bytes(b'{"prompt": "p", "answer": "1"}\n{"prompt": "caf\xe9", "answer": "1"}\n')
    fails_with(path, f"{path} line 2: byte 16 is not UTF-8")


NO_MESSAGES = "each message of prompt must be an object of strings 'role' and 'content'"
NO_PROMPT = "prompt must be a string or a list of chat messages, it is"
NO_ANSWER = "answer must be a string or a number, it is"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p", "answer": }', "not JSON: Expecting value at column 27"),
        ('["p"]', "a row must be a JSON object, this one is a list"),
        ("7", "a row must be a JSON object, this one is the number 7"),
        ("{}", "no key 'prompt' (--prompt-key prompt); the keys are none"),
        ('{"prompt": "p", "x": "1"}', "no key 'answer' (--answer-key answer); the keys are prompt, x"),
        ('{"prompt": 5, "answer": "1"}', f"{NO_PROMPT} the number 5"),
        ('{"prompt": null, "answer": "1"}', f"{NO_PROMPT} null"),
        ('{"prompt": ["hi"], "answer": "1"}', NO_MESSAGES),
        ('{"prompt": [{"role": "user"}], "answer": "1"}', NO_MESSAGES),
        ('{"prompt": " ", "answer": "1"}', "prompt is an empty prompt"),
        ('{"prompt": [], "answer": "1"}', "prompt is an empty prompt"),
        ('{"prompt": "p", "answer": ["1"]}', f"{NO_ANSWER} a list"),
        ('{"prompt": "p", "answer": true}', f"{NO_ANSWER} a bool"),
        ('{"prompt": "p", "answer": NaN}', f"{NO_ANSWER} the number nan"),
        ('{"prompt": "p", "answer": " "}', "answer is an empty answer"),
        (
            '{"prompt": "a \\ud83d", "answer": "1"}',
            "prompt: character 3, '\\ud83d', is half of a surrogate pair, which is no text",
        ),
        (f'{{"prompt": "p", "answer": "1", "x": {"[" * 10**5}{"]" * 10**5}}}', "nested too deep to be read"),
    ],
)
def test_row_errors_name_file_and_line(tmp_path, line, message):
    path = write_lines(tmp_path, {"prompt": "fine", "answer": "1"}, "", line)
    fails_with(path, f"{path} line 3: {message}")


def test_whatever_goes_wrong_names_file_and_line(tmp_path):
    """Of libraries that raise no ValueError, or one without a place."""
    fine = {"prompt": "fine", "answer": "1"}
    # in a field that only the template reads
    named_only = ChatFormat(letters("{% for m in messages %}{{ m['name'] }}{% endfor %}"))
    named = [{"role": "user", "content": "a", "name": "\ud83d"}]
    path = write_lines(tmp_path, fine | {"prompt": named})
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} line 1: TypeError: "):
        load(path, named_only)
    number = write_lines(tmp_path, fine, f'{{"prompt": "p", "answer": {"1" * 5000}}}')
    with pytest.raises(ValueError, match=f"^{re.escape(str(number))} line 2: Exceeds .* has 5000 digits"):
        load(number)


def test_damaged_pages_of_parquet_name_the_file_and_the_row(tmp_path):
    path = tmp_path / "train.parquet"
    write_table(path, prompt=[f"question {i}" for i in range(2000)], answer=[str(i) for i in range(2000)])
    assert len(load(path).prompts) == 2000
    content = bytearray(path.read_bytes())
    start = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0).dictionary_page_offset
    content[start + 40 : start + 400] = b"\xff" * 360
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: cannot be read after row 0: OSError: "):
        load(path)


def test_an_answer_in_the_prompt_is_refused(tmp_path):
    messages = [{"role": "user", "content": "2 + 2 = ?"}, {"role": "assistant", "content": "4"}]
    path = write_lines(tmp_path, {"prompt": messages, "answer": "4"})
    away = "prompt ends with a message of the assistant, which would give the answer away"
    fails_with(path, f"{path} line 1: {away}: leave that message out")
    path = write_lines(tmp_path, {"prompt": [*messages, messages[0]], "answer": "4"})
    assert text_of(load(path).prompts[0]) == "<user>2 + 2 = ?<assistant>4<user>2 + 2 = ?<assistant>"


def test_a_column_of_tools_is_said(tmp_path):
    row = {"prompt": "p", "answer": "1"}
    assert load(write_lines(tmp_path, row, row | {"tools": None})).remarks(9) == []
    path = write_lines(tmp_path, row, row | {"tools": [{"name": "calculator"}]})
    (remark,) = load(path).remarks(9)
    assert remark.startswith(f"{path}: the column 'tools' reaches the reward function, not the chat template")
    skipped = load(path, max_prompt_tokens=len("<user>p<assistant>"), overlong="skip").remarks(18)
    assert skipped == [remark]
    path = write_lines(tmp_path, row, row | {"prompt": "x" * 99})
    remarks = load(path, max_prompt_tokens=18, overlong="skip").remarks(18)
    assert remarks == [f"{path}: 1 prompts over --max-prompt-tokens 18 skipped"]


def test_messages_name_the_flags_of_their_columns(tmp_path):
    path = write_lines(tmp_path, {"q": "p", "a": "1"})
    options = {"max_prompt_tokens": 99, "overlong": "error", "flag": "--eval-data"}
    assert load_prompts(path, CHAT, Columns("q", "a", flags="--eval-"), **options).prompts[0].answer == "1"
    for columns, flag in (
        (Columns("x", "a", None, "--eval-"), "--eval-prompt-key x"),
        (Columns("q", "x", None, "--eval-"), "--eval-answer-key x"),
        (Columns("q", "a", "(x)", "--eval-"), "--eval-answer-pattern '(x)' finds nothing"),
        (Columns("q", "a", "(", "--eval-"), "--eval-answer-pattern '(' is no regular expression"),
    ):
        with pytest.raises(ValueError, match=re.escape(flag)):
            load_prompts(path, CHAT, columns, **options)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("#### (.+)", "finds nothing in answer 'no mark'"),
        ("####", "must have one group, it has 0"),
        ("(", "is no regular expression: missing ), unterminated subpattern at position 0"),
    ],
)
def test_answer_pattern_errors(tmp_path, pattern, message):
    path = write_lines(tmp_path, {"prompt": "p", "answer": "no mark"})
    place = f"{path} line 1: " if "finds nothing" in message else ""
    fails_with(path, f"{place}--answer-pattern {pattern!r} {message}", answer_pattern=pattern)


def test_chat_template_errors(tmp_path):
    path = write_lines(tmp_path, {"prompt": "p", "answer": "1"})
    with pytest.raises(ValueError, match="^the tokenizer has no chat template: --no-chat-template takes"):
        ChatFormat(letters(None))
    picky = ChatFormat(letters("{{ raise_exception('roles must alternate') }}"))
    fails_with(path, f"{path} line 1: the chat template refuses the messages: roles must alternate", picky)
    two = write_lines(tmp_path, {"prompt": [{"role": "user", "content": "a"}] * 2, "answer": "1"})
    fails_with(two, f"{two} line 1: --no-chat-template takes one message, this prompt has 2", PLAIN)


@pytest.mark.skipif(not DATA.is_dir(), reason="real problems not here: ../shared/data")
def test_gsm8k_train_loads_whole():
    columns = {"prompt_key": "question", "answer_pattern": r"####\s*(.+)"}
    loaded = load(DATA / "gsm8k" / "train.jsonl", **columns, max_prompt_tokens=600, overlong="skip")
    assert len(loaded.prompts) + loaded.num_overlong == 7473
    assert 0 < loaded.num_overlong < 100
    assert loaded.prompts[0].answer == "72"
    assert all(re.fullmatch(r"-?[\d,.]+", prompt.answer) for prompt in loaded.prompts)


def make_prompts(count: int) -> list[Prompt]:
    return [make_prompt(i) for i in range(count)]


def ids(prompts: list[Prompt]) -> list[int]:
    return [prompt.prompt_id for prompt in prompts]


@given(
    size=st.integers(1, 12),
    seed=st.integers(-3, 2**70),
    takes=st.lists(st.integers(0, 30), max_size=6),
    more=st.integers(0, 30),
)
def test_cursor_resumes_exactly_where_it_stood(size, seed, takes, more):
    prompts = make_prompts(size)
    cursor = PromptCursor(prompts, seed)
    for n in takes:
        assert len(cursor.take(n)) == n
    assert cursor.consumed == sum(takes)
    assert cursor.epoch == sum(takes) / size
    resumed = PromptCursor(prompts, seed, consumed=cursor.consumed)
    stream = ids(PromptCursor(prompts, seed).take(sum(takes) + more))
    assert ids(cursor.take(more)) == ids(resumed.take(more)) == stream[sum(takes) :]


@given(size=st.integers(1, 20), seed=st.integers(0, 1000), epochs=st.integers(1, 4))
def test_every_epoch_visits_every_prompt_once(size, seed, epochs):
    stream = ids(PromptCursor(make_prompts(size), seed).take(size * epochs))
    for epoch in range(epochs):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_order_changes_with_epoch_and_seed_and_never_with_machine():
    prompts = make_prompts(10)
    stream = ids(PromptCursor(prompts, seed=1).take(20))
    assert stream[:10] != stream[10:]
    assert stream[:10] != ids(PromptCursor(prompts, seed=2).take(10))
    # Golden: a resumed run on another machine or numpy must see these.
    assert stream == [3, 5, 2, 9, 7, 0, 8, 6, 1, 4, 0, 6, 5, 3, 4, 9, 7, 8, 2, 1]
