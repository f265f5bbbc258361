"""Finds the tokens that end a completion."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_vespo.data.jsonl import kind
from megatron_vespo.data.located import located


def stop_token_ids(checkpoint: Path, tokenizer_eos: int | None) -> tuple[int, ...]:
    """Return the end tokens of tokenizer and generation_config.json, ascending; chat models often have both.

    ValueError if the HF folder `checkpoint` has no end token, because every completion would run to the
    length limit, or if its generation_config.json has one that is not a token id.
    """
    path = checkpoint / "generation_config.json"
    found = {tokenizer_eos, *(_stops_of(path) if path.exists() else ())} - {None}
    if not found:
        raise ValueError(
            f"--hf-checkpoint {checkpoint}: neither tokenizer nor generation_config.json has an end token"
        )
    return tuple(sorted(found))


def _stops_of(path: Path) -> list[int]:
    with located(str(path)):
        config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must be a JSON object, it is {kind(config)}")
    stops = config.get("eos_token_id")
    if stops is None:
        return []
    stops = stops if isinstance(stops, list) else [stops]
    for stop in stops:
        if type(stop) is not int or not 0 <= stop < 2**31:
            raise ValueError(
                f"{path}: eos_token_id must be a token id or a list of them, "
                f"{json.dumps(stop)} is {kind(stop)}, not an id"
            )
    return stops
