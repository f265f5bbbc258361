"""End tokens of an HF folder."""

from __future__ import annotations

import json

import pytest

from megatron_vespo.data.stop_tokens import stop_token_ids


@pytest.mark.parametrize(
    ("tokenizer_eos", "generation_config", "expected"),
    [
        (5, None, (5,)),
        (5, {}, (5,)),
        (5, {"eos_token_id": 5}, (5,)),
        (5, {"eos_token_id": [7, 3]}, (3, 5, 7)),  # chat models: end of turn and end of text
        (None, {"eos_token_id": 0}, (0,)),
    ],
)
def test_both_places_count(tmp_path, tokenizer_eos, generation_config, expected):
    if generation_config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
    assert stop_token_ids(tmp_path, tokenizer_eos) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"eos_token_id":', "not JSON: Expecting value at column 17"),
        ("[1]", "must be a JSON object, it is a list"),
        ('{"eos_token_id": "<eos>"}', '"<eos>" is a string, not an id'),
        ('{"eos_token_id": [[1]]}', "[1] is a list, not an id"),
        ('{"eos_token_id": [1, true]}', "true is a bool, not an id"),
        ('{"eos_token_id": 1.5}', "1.5 is the number 1.5, not an id"),
        ('{"eos_token_id": -1}', "-1 is the number -1, not an id"),
        (f'{{"eos_token_id": {10**30}}}', f"{10**30} is the number {10**30}, not an id"),
        ("[" * 10**5, "nested too deep to be read"),
        ("\xff", "byte 1 is not UTF-8"),
    ],
)
def test_what_names_no_ids_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "generation_config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError) as refused:
        stop_token_ids(tmp_path, 5)
    text = str(refused.value)
    assert text.startswith(f"{path}: ") and text.endswith(message) and "\n" not in text


def test_no_end_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither tokenizer nor generation_config.json has an end token"):
        stop_token_ids(tmp_path, None)


def test_a_folder_in_the_files_place_is_refused(tmp_path):
    (tmp_path / "generation_config.json").mkdir()
    with pytest.raises((ValueError, IsADirectoryError), match="generation_config.json"):
        stop_token_ids(tmp_path, 5)
