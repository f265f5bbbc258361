"""Which tokens end a completion."""

from __future__ import annotations

import json
from pathlib import Path


def stop_token_ids(checkpoint: Path, tokenizer_eos: int | None) -> tuple[int, ...]:
    """The tokenizer's end token and those of generation_config.json, ascending: chat models often have both.

    ValueError when the HF folder `checkpoint` names none, as completions would all run to the length limit.
    """
    path = checkpoint / "generation_config.json"
    stops = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    found = {tokenizer_eos, *(stops if isinstance(stops, list) else [stops])} - {None}
    if not found:
        raise ValueError(
            f"--hf-checkpoint {checkpoint}: neither tokenizer nor generation_config.json has an end token"
        )
    return tuple(sorted(found))
