"""SGLang's flags of teacher engines, made from those of the rollout engines."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vespo.rollout.server_arguments import EXPERT_FLAGS, LAYOUT_FLAGS, MEMORY_SAVER, SIZE_FLAGS

# They say how the policy's weights lie on the GPUs; a teacher is another model and shares no GPU.
_OF_THE_POLICY = {*EXPERT_FLAGS, *LAYOUT_FLAGS, MEMORY_SAVER}


def teacher_flags(sglang_flags: Sequence[str], size: int) -> list[str]:
    """Return the flags of an engine of `size` GPUs: all others but those about the policy's weights.

    Example: ["--tp-size", "2", "--ep-size", "2", "--context-length", "64"], 4
    -> ["--context-length", "64", "--tp-size", "4"]
    """
    kept: list[str] = []
    dropped = False
    for word in sglang_flags:
        if word.startswith("--"):
            dropped = word in _OF_THE_POLICY or word in SIZE_FLAGS
        if not dropped:
            kept.append(word)
    return [*kept, "--tp-size", str(size)]
