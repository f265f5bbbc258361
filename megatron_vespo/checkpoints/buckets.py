"""Groups a stream of named tensors into buckets of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor


def buckets(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Cut the stream, in order, into dicts of at most `max_bytes`; a larger tensor gets its own."""
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > max_bytes:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor
        size += tensor.nbytes
    if bucket:
        yield bucket
