"""Translates an HF config.json to the Megatron arguments that describe the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_vespo.models.config_fields import arguments_of
from megatron_vespo.models.family import family_of

_NAME = "config.json"


def read_hf_config(checkpoint: Path) -> dict[str, Any]:
    """Read and check config.json of an HF checkpoint; ValueError, with the path, if it is not supported."""
    config = read_unchecked(checkpoint)
    try:
        megatron_arguments(config)
    except ValueError as error:
        raise ValueError(f"{checkpoint / _NAME}: {error}") from error
    return config


def read_unchecked(checkpoint: Path) -> dict[str, Any]:
    """Read config.json of any model; ValueError if there is none."""
    path = checkpoint / _NAME
    if not path.is_file():
        raise ValueError(f"{checkpoint}: no config.json there; it must be an HF checkpoint folder")
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a JSON object was expected, not a {type(config).__name__}")
    return config


def megatron_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Return the Megatron arguments (argparse destinations) and values that the HF config determines.

    ValueError if these arguments cannot express the config's mathematics, or if a number is missing.
    """
    return arguments_of(config, family_of(config))
