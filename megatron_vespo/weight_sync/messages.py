"""What a trainer tells `engine_loader` in an engine, as JSON in the place of a tensor's name.

SGLang's /update_weights_from_tensor takes, for each rank of an engine, a pickled list of names and tensors.
Ours has one pair: the message and an empty tensor. The weights are in shared memory.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing  # noqa: F401 - teaches ForkingPickler tensors

BOARD_SLOT_BYTES = 4096  # what one engine rank may write about a failure


@dataclass(frozen=True)
class Introduction:
    """Comes once in a connection: where the buffers are, and what of them goes where.

    `sources` are paths of two buffers of `buffer_bytes` each; `matrices` are the rank's parameters with rows
    and columns. `pieces` are [group, source, offset, parameter, to_row, to_col, rows, cols], where source and
    parameter are positions in the lists, `padding` is [parameter, to_row, rows]. Errors go into slot `slot`
    of the shared memory `board`.
    """

    board: str
    slot: int
    sources: Sequence[str]
    buffer_bytes: int
    dtype: str
    matrices: Sequence[tuple[str, int, int]]
    pieces: Sequence[Sequence[int]]
    padding: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Load:
    """Copy what belongs to the engine out of the buffers of `group`: the first ones for even numbers."""

    group: int


def pack(message: Introduction | Load) -> str:
    """For `serialized_named_tensors`."""
    text = json.dumps({type(message).__name__: asdict(message)})
    stream = io.BytesIO()
    # as SGLang does it; a plain pickle of a tensor names Megatron's reader, which SGLang refuses to call
    ForkingPickler(stream).dump([(text, torch.empty(0))])
    return base64.b64encode(stream.getvalue()).decode()


def unpack(text: str) -> Introduction | Load:
    [(kind, fields)] = json.loads(text).items()
    kinds: dict[str, Any] = {"Introduction": Introduction, "Load": Load}
    return kinds[kind](**fields)


def write_slot(board: torch.Tensor, slot: int, text: str) -> None:
    """Text of one slot, cut to its size; zero bytes behind it."""
    content = text.encode()[: BOARD_SLOT_BYTES - 1].ljust(BOARD_SLOT_BYTES, b"\0")
    start = slot * BOARD_SLOT_BYTES
    board[start : start + BOARD_SLOT_BYTES] = torch.frombuffer(bytearray(content), dtype=torch.uint8)


def read_slot(board: torch.Tensor, slot: int) -> str:
    content = bytes(board[slot * BOARD_SLOT_BYTES : (slot + 1) * BOARD_SLOT_BYTES].numpy())
    return content.partition(b"\0")[0].decode(errors="replace")
