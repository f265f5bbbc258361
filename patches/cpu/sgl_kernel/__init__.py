"""Stand-in for SGLang's kernel library in plain torch: what sglang 0.5.23 needs of it on a CPU without AMX.

It has none of the AMX operators, so SGLang finds no AMX support and every layer takes its native torch path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch

__version__ = "0.0.0"

_MASK_32 = 0xFFFFFFFF


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write each request's new cache locations, consecutive in out_cache_loc, to its row of req_to_token."""
    lengths = (end_offset - start_offset).tolist()
    rows = zip(req_pool_indices.tolist(), start_offset.tolist(), out_cache_loc.split(lengths), strict=True)
    for row, start, locations in rows:
        req_to_token[row, start : start + len(locations)] = locations.to(req_to_token.dtype)


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """SGLang imports some kernels by name without calling them: those fail when called."""
    if not name.endswith("_cpu"):
        raise AttributeError(f"module 'sgl_kernel' has no attribute {name!r}")

    def unavailable(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} has no stand-in in plain torch")

    return unavailable


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (32 bit, seed 0) of the 16 bytes (seed: 8, position: 4, column: 4), all little-endian.

    seed and positions [N], col_indices [M]; returns uint32 [N, M]. Sampling with a seed draws from it.
    """
    seed = seed.view(torch.int64) if seed.dtype == torch.uint64 else seed.long()
    words = (seed, seed >> 32, positions.long())
    state = torch.zeros_like(seed)
    for word in words:
        state = _mix(state, word & _MASK_32)
    state = _mix(state[:, None], col_indices.long()[None, :] & _MASK_32) ^ 16
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & _MASK_32
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & _MASK_32
    return (state ^ (state >> 16)).to(torch.uint32)


def _mix(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    # int64 products wrap, but their low 32 bits, all that is kept, are right.
    word = _rotate_left((word * 0xCC9E2D51) & _MASK_32, 15)
    state = _rotate_left(state ^ ((word * 0x1B873593) & _MASK_32), 13)
    return (state * 5 + 0xE6546B64) & _MASK_32


def _rotate_left(value: torch.Tensor, bits: int) -> torch.Tensor:
    return ((value << bits) | (value >> (32 - bits))) & _MASK_32


_library = torch.library.Library("sgl_kernel", "FRAGMENT")
_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
_library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
