"""Block-FP8: against a loop over blocks, at any rows, and as a folder that an engine can load."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_vespo.checkpoints import block_fp8
from megatron_vespo.checkpoints.block_fp8 import BlockFP8Reader, quantise, quantised
from megatron_vespo.checkpoints.spans import Span, SpanBuffer
from megatron_vespo.commands import main as cli
from megatron_vespo.models.family import family_of, shape_of
from tests.support.stored_tensors import StoredTensors
from tests.support.tiny_checkpoints import MOE, QWEN3, convert, tiny_config, write_hf

B = 128
# e4m3fn by its definition: sign, 4 bits of exponent with bias 7, 3 of mantissa; code 127 is NaN
E4M3 = [
    math.ldexp(code & 7, -9) if code < 8 else math.ldexp(8 + (code & 7), (code >> 3) - 10)
    for code in range(127)
]
# no width but head_dim's multiples is one of 128
SIZES = {
    "hidden_size": 160, "intermediate_size": 200, "head_dim": 64, "vocab_size": 131,
    "max_position_embeddings": 128,
}  # fmt: skip
CONFIGS = {
    "moe": tiny_config(MOE, **SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=72),
    "dense": tiny_config(QWEN3, **SIZES),
}


def nearest_code(value: float) -> int:
    """The e4m3 code nearest to a float of at most 448 in magnitude; of two equally near ones the even one."""
    distances = [abs(abs(value) - other) for other in E4M3]
    least = min(distances)
    nearest = [code for code, distance in enumerate(distances) if distance == least]
    code = nearest[0] if len(nearest) == 1 or nearest[0] % 2 == 0 else nearest[1]
    return code | (0x80 if math.copysign(1, value) < 0 else 0)


def bf16_bits(value: np.float32) -> int:
    """The upper half of a float32, rounded to nearest even."""
    bits = int(np.float32(value).view(np.uint32))
    upper, lower = bits >> 16, bits & 0xFFFF
    return upper + (lower > 0x8000 or (lower == 0x8000 and upper % 2 == 1))


def naive(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and bf16 bits of the scales of float32 [rows, columns], one block and value after another."""
    rows, columns = weights.shape
    codes = np.zeros((rows, columns), np.uint8)
    scales = np.zeros((math.ceil(rows / B), math.ceil(columns / B)), np.uint16)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = weights[i * B : (i + 1) * B, j * B : (j + 1) * B]
            bits = bf16_bits(np.float32(np.abs(block).max()) / np.float32(448))
            if bits == 0:
                bits = 0x3F80  # 1.0
            scales[i, j] = bits
            scale = np.array(bits << 16, np.uint32).view(np.float32)
            for r in range(block.shape[0]):
                for c in range(block.shape[1]):
                    quotient = float(np.float32(block[r, c] / scale))
                    codes[i * B + r, j * B + c] = nearest_code(max(-448.0, min(448.0, quotient)))
    return codes, scales


def random_weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Blocks of several magnitudes, so that a scale taken from a neighbour would show."""
    draw = torch.Generator().manual_seed(seed)
    magnitudes = torch.logspace(-3, 1, 4)[torch.randint(4, (rows, columns // 8 + 1), generator=draw)]
    return torch.randn(rows, columns, generator=draw) * magnitudes.repeat_interleave(8, dim=1)[:, :columns]


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 130), (129, 5), (128, 128), (131, 140)])
def test_like_a_loop_over_blocks(rows, columns):
    weights = random_weights(rows, columns, seed=rows)
    weights[0, 0] = -0.0
    values, scales = quantise(weights)
    assert (values.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.bfloat16)
    codes, bits = naive(weights.numpy())
    assert np.array_equal(scales.view(torch.int16).numpy().view(np.uint16), bits)
    assert np.array_equal(values.contiguous().view(torch.uint8).numpy(), codes)


def test_every_code_and_every_tie():
    """At scale 1 the codes come back, and what lies half-way between two goes to the even one."""
    halves = [(one + two) / 2 for one, two in zip(E4M3, E4M3[1:], strict=False)]
    points = sorted([*E4M3, *halves])
    weights = torch.tensor([points, [-point for point in points]])
    blocks = weights[:, -B:]  # they hold 448, so the scale is 1
    values, scales = quantise(blocks)
    assert scales.tolist() == [[1.0]]
    wanted = [[nearest_code(value) for value in row] for row in blocks.tolist()]
    assert values.view(torch.uint8).tolist() == wanted
    small = torch.tensor([[448.0, *points[: B - 1]]])
    assert quantise(small)[0].view(torch.uint8)[0, 1:].tolist() == [nearest_code(p) for p in points[: B - 1]]


def test_a_block_of_zeros_is_zeros_at_scale_one():
    weights = random_weights(2 * B, 2 * B)
    weights[:B, B:] = 0
    values, scales = quantise(weights)
    assert scales[0, 1] == 1 and values[:B, B:].view(torch.uint8).eq(0).all()
    assert scales.float().isfinite().all() and scales.gt(0).all()


def test_a_scale_that_was_rounded_down_gives_no_nan():
    for numerator in range(256, 512):  # all of bf16's roundings
        weights = torch.full((1, 1), numerator + 0.7)
        values, scales = quantise(weights)
        assert values.float().abs().item() <= 448, numerator
        assert (values.float() * scales.float()).item() == pytest.approx(weights.item(), rel=2**-8)
    smallest = 2.0**-133  # of bf16: rounding to it can be off by half
    values, scales = quantise(torch.full((1, 1), 448 * smallest * 1.4))
    assert (values.item(), scales.item()) == (448, smallest)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(value):
    weights = random_weights(200, 200)
    weights[199, 130] = value
    with pytest.raises(ValueError, match="^holds NaN or infinity$"):
        quantise(weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("step", [1, 37, 128, 129, 1000])
def test_rows_at_any_boundaries_are_those_of_the_whole(step, dtype):
    weights = random_weights(300, 140).to(dtype)
    plain = StoredTensors({"a.up_proj.weight": weights, "norm.weight": torch.ones(7)})
    reader = BlockFP8Reader(plain, plain.tensors)
    values, scales = quantise(weights)
    whole = {
        "a.up_proj.weight": values,
        "a.up_proj.weight_scale_inv": scales,
        "norm.weight": plain.values["norm.weight"],
    }
    assert {name: (info.dtype, info.shape) for name, info in reader.tensors.items()} == {
        name: (value.dtype, tuple(value.shape)) for name, value in whole.items()
    }
    for name, wanted in whole.items():
        for start in range(0, len(wanted), step):
            stop = min(start + step, len(wanted))
            found = SpanBuffer().read(reader, Span(name, start, stop))
            assert bits(found).equal(bits(wanted[start:stop])), (name, start)


@pytest.mark.parametrize("strip_blocks", [1, 2, 100])
def test_rows_that_start_anywhere(strip_blocks, monkeypatch):
    """Whatever the height of the strips in which they are quantised, which bounds what is read at a time."""
    monkeypatch.setattr(block_fp8, "_STRIP_BYTES", strip_blocks * B * 140 * 4)
    plain = StoredTensors({"a.up_proj.weight": random_weights(300, 140)})
    reader = BlockFP8Reader(plain, plain.tensors)
    values, scales = quantise(plain.values["a.up_proj.weight"])
    for start, stop in ((5, 6), (127, 129), (130, 250), (255, 257), (1, 300), (299, 300)):
        found = SpanBuffer().read(reader, Span("a.up_proj.weight", start, stop))
        assert bits(found).equal(bits(values[start:stop])), (start, stop)
    found = SpanBuffer().read(reader, Span("a.up_proj.weight_scale_inv", 0, 3))
    assert found.equal(scales)
    assert plain.most_rows <= strip_blocks * B


def test_a_tensor_with_nan_is_named():
    plain = StoredTensors({"a.up_proj.weight": torch.full((200, 3), math.nan)})
    with pytest.raises(ValueError, match=r"^memory: a.up_proj.weight\[128:200\] holds NaN or infinity$"):
        SpanBuffer().read(BlockFP8Reader(plain, plain.tensors), Span("a.up_proj.weight", 130, 140))


@pytest.mark.parametrize("strip_bytes", [1, 2 * B * 72 * 4, 2**28])
def test_a_stream_of_whole_tensors_is_what_is_read(strip_bytes, monkeypatch):
    monkeypatch.setattr(block_fp8, "_STREAM_BYTES", strip_bytes)
    plain = StoredTensors({
        "model.embed_tokens.weight": random_weights(131, 160).bfloat16(),
        "a.mlp.gate.weight": random_weights(3, 160).bfloat16(),
        "a.down_proj.weight": random_weights(300, 72).bfloat16(),
        "a.q_proj.bias": torch.ones(7),
    })  # fmt: skip
    reader = BlockFP8Reader(plain, plain.tensors)
    found = dict(quantised(plain.values.items()))
    assert list(found) == [*list(plain.values)[:3], "a.down_proj.weight_scale_inv", "a.q_proj.bias"]
    assert found.keys() == reader.tensors.keys()
    for name, tensor in found.items():
        read = SpanBuffer().read(reader, Span(name, 0, len(tensor)))
        assert tensor.dtype == read.dtype and bits(tensor).equal(bits(read)), name


def test_a_stream_with_nan_names_the_tensor():
    tensors = {"norm.weight": torch.ones(3), "a.up_proj.weight": torch.full((2, 3), math.nan)}
    stream = quantised(tensors.items())
    assert next(stream)[0] == "norm.weight"
    with pytest.raises(ValueError, match="^a.up_proj.weight holds NaN or infinity: it has no FP8 weights$"):
        next(stream)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def make_source(folder: Path, config: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """An HF folder of random weights, one block of which is zeros."""
    shapes = family_of(config).hf_tensors(shape_of(config))
    tensors = {
        name: random_weights(*shape, seed=seed) if len(shape) == 2 else torch.linspace(0.5, 2, *shape)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    tensors["model.layers.1.self_attn.q_proj.weight"][:B, :B] = 0
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    write_hf(folder, config, tensors)
    return tensors


def converted(folder: Path, kind: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], Path]:
    """The source's tensors, and the folder that they were converted to."""
    tensors = make_source(folder / "hf", CONFIGS[kind], dtype)
    assert convert("hf-to-megatron", folder / "hf", folder / "megatron") == 0
    assert convert("megatron-to-hf", folder / "megatron", folder / "fp8", "--dtype", "fp8") == 0
    return tensors, folder / "fp8"


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_written_folder(tmp_path, kind, dtype):
    source, folder = converted(tmp_path, kind, dtype)
    found = load_file(folder / "model.safetensors")
    linear = {name for name in source if name.endswith("_proj.weight")}
    kinds = {name.split(".")[-2] for name in linear}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert found.keys() == source.keys() | {f"{name}_scale_inv" for name in linear}
    for name in source.keys() - linear:
        assert found[name].dtype == dtype and found[name].equal(source[name]), name
    for name in linear:
        check_rounding(source[name].float(), found[name], found[f"{name}_scale_inv"])

    config = json.loads((folder / "config.json").read_text())
    quantisation = config.pop("quantization_config")
    assert config.pop("dtype") == str(dtype).removeprefix("torch.")
    assert config == CONFIGS[kind]
    kept = {name.removesuffix(".weight") for name in source.keys() - linear} - {"model.embed_tokens"}
    assert set(quantisation.pop("modules_to_not_convert")) == kept
    assert "lm_head" in kept and ("model.layers.1.mlp.gate" in kept) == (kind == "moe")
    assert quantisation == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }


def check_rounding(weights: Tensor, values: Tensor, scales: Tensor) -> None:
    """|q s - w| <= max(2^-4 |w|, 2^-10 s).

    Half a unit in the last place of a value with three bits of mantissa is at most 2^-4 of it; subnormals
    are 2^-9 apart. That s is rounded to bf16 costs nothing, as w is divided by the rounded s; only the
    largest w of a block may be clamped, by less than 2^-8 of it. 2^-20 is for fp32's own rounding.
    """
    rows, columns = weights.shape
    assert values.dtype == torch.float8_e4m3fn and values.shape == weights.shape
    assert scales.dtype == torch.bfloat16
    assert scales.shape == (math.ceil(rows / B), math.ceil(columns / B))
    s = scales.float().repeat_interleave(B, 0)[:rows].repeat_interleave(B, 1)[:, :columns]
    bound = torch.maximum(weights.abs() * 2**-4, s * 2**-10) * (1 + 2**-20)
    error = (values.float() * s - weights).abs()
    assert (error <= bound).all()
    assert error.max() > 0  # it is not the original


def test_the_folder_is_verified_and_inspected_but_not_converted(tmp_path, capsys):
    _, folder = converted(tmp_path, "moe", torch.bfloat16)
    assert convert("verify", folder) == 0
    assert "same: 65 tensors" in capsys.readouterr().out
    assert convert("inspect", folder) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["format"] == f"HF, quantised, {folder}"
    assert lines["model"] == "Qwen3MoeForCausalLM"
    assert lines["quantised"] == "fp8 e4m3 in blocks of [128, 128]"
    assert lines["tensors"] == "65" and lines["manifest"] == "there"
    assert lines["size"].endswith("as bfloat16, float8_e4m3fn")
    for command in (("hf-to-megatron", folder, tmp_path / "back"), ("verify", folder, tmp_path / "hf")):
        assert convert(*command) == cli.EXIT_USER_ERROR
        assert "config.json: quantization_config is there: it is a quantised" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()

    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # of the last tensor
    file.write_bytes(data)
    assert convert("verify", folder) == 1
    assert "its xxh3_128 is not the manifest's" in capsys.readouterr().out

    (folder / "manifest.json").unlink()
    assert convert("verify", folder) == cli.EXIT_USER_ERROR
    assert f"{folder} has no manifest.json" in capsys.readouterr().err
