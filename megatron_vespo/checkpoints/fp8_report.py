"""What of a model is FP8 in an engine with block-FP8 weights: parameters and bytes, per layer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from megatron_vespo.checkpoints.block_fp8 import BLOCK, is_quantised

Shapes = Mapping[str, tuple[int, ...]]
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_REST = 2  # bytes of an element that stays bf16
_ENGINE_SCALE, _SENT_SCALE = 4, 2  # SGLang keeps fp32 scales, and gets bf16


def engine_bytes(hf_tensors: Shapes) -> int:
    """Of all ranks of an engine with FP8 weights."""
    return sum(_bytes(name, shape, _ENGINE_SCALE, _REST) for name, shape in hf_tensors.items())


def sent_bytes(hf_tensors: Shapes, item: int) -> int:
    """What a weight sync sends; weights that are not quantised have `item` bytes an element."""
    return sum(_bytes(name, shape, _SENT_SCALE, item) for name, shape in hf_tensors.items())


def fp8_lines(hf_tensors: Shapes) -> Iterator[str]:
    """For people: the whole model, and layers that are alike."""
    in_bf16 = _REST * sum(map(math.prod, hf_tensors.values()))
    in_fp8 = engine_bytes(hf_tensors)
    yield f"engine weights: block FP8, {in_fp8 / 1e9:.3g} GB; in bf16 {in_bf16 / 1e9:.3g} GB"
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    outside = {}
    for name, shape in hf_tensors.items():
        if match := _LAYER.match(name):
            layers.setdefault(int(match[1]), {})[name[match.end() :]] = shape
        else:
            outside[name.removeprefix("model.")] = shape
    alike: dict[tuple, list[int]] = {}
    for number, tensors in sorted(layers.items()):
        alike.setdefault(tuple(sorted(tensors.items())), []).append(number)
    for tensors, numbers in alike.items():
        which = f"layers {numbers[0]}-{numbers[-1]}, each" if len(numbers) > 1 else f"layer {numbers[0]}"
        yield f"  {which}: {_described(dict(tensors))}"
    yield f"  outside of layers: {_described(outside)}"


def _described(tensors: Shapes) -> str:
    parts = []
    for kind, quantised in (("FP8", True), ("bf16", False)):
        of_kind = {name: shape for name, shape in tensors.items() if is_quantised(name) == quantised}
        if of_kind:
            size = engine_bytes(of_kind)
            names = sorted({re.sub(r"\.\d+\.", ".*.", name).removesuffix(".weight") for name in of_kind})
            parts.append(f"{size / 1e6:,.3f} MB {kind} ({', '.join(names)})")
    return "; ".join(parts)


def _bytes(name: str, shape: tuple[int, ...], scale: int, item: int) -> int:
    if not is_quantised(name):
        return item * math.prod(shape)
    return math.prod(shape) + scale * math.prod(-(-size // BLOCK) for size in shape)
