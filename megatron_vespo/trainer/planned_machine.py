"""Lets a machine without CUDA, such as the driver's, answer Megatron's queries about the run's GPUs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import NamedTuple
from unittest.mock import patch

import torch
from megatron.core import utils
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.moe import moe_utils
from packaging.version import Version


class Capability(NamedTuple):
    """A GPU's compute capability: torch.cuda returns it as a tuple and as attributes of its properties."""

    major: int
    minor: int


# the version that Megatron sees where Transformer Engine is not installed on this machine
ASSUMED_TRANSFORMER_ENGINE = Version("2.20.2")
ASSUMED_CAPABILITY = Capability(9, 0)
# what Megatron looks for when fused kernels are requested
ASSUMED_KERNELS = (
    (rope_utils, "fused_apply_rotary_pos_emb"),
    (rope_utils, "fused_apply_rotary_pos_emb_thd"),
    (moe_utils, "fused_permute"),
    (moe_utils, "fused_permute_with_probs"),
    (moe_utils, "fused_sort_chunks_by_index"),
    (moe_utils, "fused_sort_chunks_by_index_with_probs"),
    (moe_utils, "fused_unpermute"),
)


@contextlib.contextmanager
def planned_machine() -> Iterator[None]:
    """Inside, Megatron's queries about GPU and Transformer Engine get the answers of the run's machine."""
    answers = {
        "get_device_capability": lambda *_: ASSUMED_CAPABILITY,
        "get_device_properties": lambda *_: ASSUMED_CAPABILITY,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        if not torch.cuda.is_available():
            for name, answer in answers.items():
                stack.enter_context(patch.object(torch.cuda, name, answer))
        if utils.get_te_version() == Version("0.0.0"):
            stack.enter_context(patch.object(utils, "_te_version", ASSUMED_TRANSFORMER_ENGINE))
            for module, name in ASSUMED_KERNELS:
                stack.enter_context(patch.object(module, name, object()))
        yield
