"""A model's weights into a running server."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from megatron_vespo.checkpoints.buckets import buckets
from megatron_vespo.weight_sync.bucket_sender import BucketSender


def send_weights(sender: BucketSender, model: Path, version: int) -> None:
    """All of a model, in several buckets."""
    pieces = list(buckets(load_file(model / "model.safetensors").items(), max_bytes=100_000))
    assert len(pieces) > 3
    sender.admin.begin()
    for piece in pieces[:-1]:
        sender.send(piece, None)
    sender.send(pieces[-1], version)
    sender.admin.finish(version)
