"""Checks the weights of engines by SGLang's own checksum of every tensor (/weights_checker).

A checksum covers a tensor as the engine stores it: q, k and v fused, experts stacked, one rank's part. All
parameters and buffers have one, except the tables of the rotary embedding. GPUs and CPUs compute different
checksums. Therefore an engine is compared with another engine, or with itself after it has loaded a
checkpoint. In between its weights are made random, so that a tensor which an update leaves out is found.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_vespo.weight_sync.engine_admin import EngineAdmin, WeightSyncError

Sums = Mapping[str, str]  # name of a tensor, with its rank where the engine has several -> checksum


class WeightMismatchError(WeightSyncError):
    """An engine has wrong weights; the message names engine, tensor and both checksums."""


def weight_sums(admin: EngineAdmin) -> list[Sums]:
    """Every engine's checksums. No weight update may be running."""
    return [_sums(answer["ranks"]) for answer in admin.call("/weights_checker", {"action": "checksum"})]


def forget_weights(admin: EngineAdmin) -> list[Sums]:
    """Every engine's checksums; afterwards the weights are random and have to be sent again."""
    all_sums = weight_sums(admin)
    admin.call("/weights_checker", {"action": "reset_tensors"})
    return all_sums


def check_engines_agree(admin: EngineAdmin, policy_version: int) -> list[Sums]:
    """Every engine's checksums; WeightMismatchError unless all are the same."""
    all_sums = weight_sums(admin)
    for url, sums in zip(admin.urls, all_sums, strict=True):
        compare_sums(url, sums, f"engine {admin.urls[0]}", all_sums[0], policy_version)
    return all_sums


def check_against_checkpoint(
    admin: EngineAdmin, sums: Sums, folder: Path, policy_version: int, load_timeout_s: float
) -> None:
    """Check that the first engine, which has the checksums `sums`, has the same after it loaded `folder`.

    It may take `load_timeout_s` seconds to load it. Running requests are paused in the meantime: none may use
    the random weights. The caches stay, because they belong to equal weights.
    """
    engine = admin.of(admin.urls[:1])
    engine.stop_generation()
    forget_weights(engine)
    payload = {
        "model_path": str(folder),
        "load_format": "auto",
        "flush_cache": False,
        "weight_version": str(policy_version),
    }
    engine.call("/update_weights_from_disk", payload, load_timeout_s)
    [loaded] = weight_sums(engine)
    engine.go_on()
    compare_sums(engine.urls[0], sums, f"the checkpoint {folder}", loaded, policy_version)


def compare_sums(url: str, sums: Sums, whose: str, expected: Sums, policy_version: int) -> None:
    """WeightMismatchError unless the engine at `url` has the `expected` checksums, which are of `whose`."""
    differing = sorted(name for name in sums.keys() | expected.keys() if sums.get(name) != expected.get(name))
    if differing:
        name = differing[0]
        raise WeightMismatchError(
            f"weights differ after the sync of version {policy_version}: engine {url} has checksum "
            f"{sums.get(name, 'none')} of {name}, {whose} has {expected.get(name, 'none')} "
            f"({len(differing)} of {len(expected)} tensors differ)"
        )


def _sums(ranks: list[dict]) -> Sums:
    """One engine's checksums from the answer, which has an entry for each of its ranks."""
    if len(ranks) == 1:
        return ranks[0]["checksums"]
    return {
        f"{name} on rank {rank['parallelism_info'][0]['rank']}": checksum
        for rank in ranks
        for name, checksum in rank["checksums"].items()
    }
