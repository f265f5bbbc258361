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


def test_no_end_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither tokenizer nor generation_config.json has an end token"):
        stop_token_ids(tmp_path, None)
