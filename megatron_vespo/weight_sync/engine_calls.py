"""Messages to `engine_loader` in all engines, each in one call of SGLang's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from megatron_vespo.system.plugins import WEIGHT_LOADER
from megatron_vespo.weight_sync.engine_admin import EngineAdmin
from megatron_vespo.weight_sync.messages import Message, pack


def post_messages(
    admin: EngineAdmin, size: int, message: Callable[[int], Message], policy_version: int | None
) -> list[Future]:
    """One call to each engine, whose `size` ranks get a message each, by slot.

    With `policy_version` it is the last one of a sync: engines label later tokens with it.
    """
    payload: dict = {"load_format": WEIGHT_LOADER, "selector": "target"}
    # what requests paused in place have in the cache is theirs; it cannot be flushed
    payload["flush_cache"] = policy_version is not None and admin.pause != "in_place"
    if policy_version is not None:
        payload["weight_version"] = str(policy_version)
    return [
        admin.submit(
            url,
            "/update_weights_from_tensor",
            payload
            | {"serialized_named_tensors": [pack(message(number * size + rank)) for rank in range(size)]},
        )
        for number, url in enumerate(admin.urls)
    ]
