"""What a trainer tells `engine_loader` in an engine, as JSON in the place of a tensor's name.

SGLang's /update_weights_from_tensor takes, for each rank of an engine, a pickled list of names and tensors.
Ours has one pair: the message and an empty tensor. What the engine's ranks have to say goes into a store that
the trainer keeps, see `reports`.
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


@dataclass(frozen=True)
class Hello:
    """Comes first: the engine rank writes into the store under its `slot` where it runs."""

    host: str
    port: int
    timeout_s: float
    slot: int


@dataclass(frozen=True)
class Introduction:
    """Where the bytes are, and what of them goes where. Each buffer holds `ring` groups of its size.

    `buffers` are handles and sizes in bytes; the last one may have the handle "": the landing buffer of the
    engine rank itself. `matrices` are the rank's parameters with rows and columns. `pieces` are [group,
    buffer, offset, parameter, to_row, to_col, rows, cols], where buffer and parameter are positions in the
    lists; `padding` is [parameter, to_row, rows]. `arrivals` are what lands in the landing buffer: [group,
    trainer rank, offset, size]. Of `num_groups` groups.
    """

    dtype: str
    num_groups: int
    ring: int
    buffers: Sequence[tuple[str, int]]
    matrices: Sequence[tuple[str, int, int]]
    pieces: Sequence[Sequence[int]]
    padding: Sequence[Sequence[int]]
    arrivals: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Join:
    """Enter the group of trainer and engine ranks as `rank`; None: this one needs no group.

    With `staging` the rank receives whenever the trainer has announced that it sends, see `reports`.
    """

    name: str
    backend: str
    rank: int | None
    world_size: int
    staging: bool


@dataclass(frozen=True)
class Load:
    """Copy what belongs to the engine out of the buffers of the groups from `start` to `stop` - 1.

    What arrives in the landing buffer is received now, unless it has been `staged`.
    """

    start: int
    stop: int
    staged: bool


@dataclass(frozen=True)
class DiskHello:
    """Comes first where weights go through files. An engine rank that sees `run_folder` with this `token`
    answers in `folder` under its `slot`, see `disk_version`.
    """

    run_folder: str
    token: str
    folder: str
    slot: int


@dataclass(frozen=True)
class DiskPlan:
    """What of the files goes where. The answer goes into `folder`.

    `matrices` and `padding` are as in Introduction. `pieces` are [trainer rank, group, parameter, to_row,
    to_col, rows, cols], in the order of their elements in the part of that rank and group.
    """

    folder: str
    engine_rank: int
    dtype: str
    matrices: Sequence[tuple[str, int, int]]
    pieces: Sequence[Sequence[int]]
    padding: Sequence[Sequence[int]]


@dataclass(frozen=True)
class DiskLoad:
    """Read the version in `folder`, whose manifest has this `checksum`, and answer there."""

    folder: str
    checksum: str


Message = Hello | Introduction | Join | Load | DiskHello | DiskPlan | DiskLoad
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in Message.__args__}


def pack(message: Message) -> str:
    """For `serialized_named_tensors`."""
    text = json.dumps({type(message).__name__: asdict(message)})
    stream = io.BytesIO()
    # as SGLang does it; a plain pickle of a tensor names Megatron's reader, which SGLang refuses to call
    ForkingPickler(stream).dump([(text, torch.empty(0))])
    return base64.b64encode(stream.getvalue()).decode()


def unpack(text: str) -> Message:
    [(kind, fields)] = json.loads(text).items()
    return _KINDS[kind](**fields)
