"""Trainers and engines of any layout, with weights in which every element has a number of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vespo.models.part import ModelPart
from megatron_vespo.models.table import Family, ModelShape
from megatron_vespo.weight_sync.engine_layout import EngineLayout, experts_of, padded_vocabulary
from megatron_vespo.weight_sync.places import Place
from megatron_vespo.weight_sync.trainer_layout import TrainerShard


def model_shape(groups: int = 2, tied: bool = False, experts: int = 4, **sizes: int) -> ModelShape:
    values = {
        "num_layers": 4,
        "hidden_size": 6,
        "ffn_hidden_size": 8,
        "num_attention_heads": 4,
        "head_dim": 2,
    }
    return ModelShape(
        num_query_groups=groups, num_experts=experts, vocab_size=70, padded_vocab_size=72,
        tied_embeddings=tied, **values | sizes,
    )  # fmt: skip


def shape_for(family: Family, groups: int, tied: bool) -> ModelShape:
    """With all that the family's models have: experts, first layers without them, shared ones, biases."""
    if "moe_ffn_hidden_size" not in family.sizes.values():
        return model_shape(groups, tied, experts=0)
    if family.architecture == "Glm4MoeForCausalLM":
        return model_shape(
            groups, tied, dense_layers=1, dense_ffn_hidden_size=12, shared_ffn_hidden_size=4, qkv_bias=True,
            qk_norm=True,
        )  # fmt: skip
    return model_shape(groups, tied)


def trainer(shape: ModelShape, tp=1, pp=1, vpp=1, ep=1, etp=1, replicas=1) -> list[TrainerShard]:
    """Stages of a pipeline as Megatron cuts it: with virtual ones, rank p has chunks p, p + pp, ..."""
    per_chunk = shape.num_layers // (pp * vpp)
    number = math.lcm(tp, ep * etp) * replicas
    each = max(shape.num_experts, 1) // ep
    shards = []
    for stage in range(pp):
        chunks = [stage + pp * virtual for virtual in range(vpp)]
        layers = frozenset(chunk * per_chunk + layer for chunk in chunks for layer in range(per_chunk))
        for rank in range(number):
            expert_rank = rank // etp % ep
            part = ModelPart(
                layers=layers, first=stage == 0, last=stage == pp - 1,
                experts=range(expert_rank * each, (expert_rank + 1) * each),
                tp=(rank % tp, tp), expert_tp=(rank % etp, etp),
            )  # fmt: skip
            shards.append(TrainerShard(len(shards), Place("h", "h"), part))
    return shards


def held_by(part: ModelPart, family: Family, shape: ModelShape, hf: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of one trainer rank by the first HF tensor of each."""
    held = {}
    for row, numbers in family.rows(shape):
        if part.holds(row, numbers["layer"], numbers["expert"]):
            names = [name.format(**numbers) for name in row.tensors]
            rank, size = part.group_of(row)
            held[names[0]] = row.build(tuple(names), shape).shard([hf[name] for name in names], size)[rank]
    return held


def weights(family: Family, shape: ModelShape) -> dict[str, Tensor]:
    """HF tensors in which every element has a number of its own."""
    found, start = {}, 1
    for name, size in family.hf_tensors(shape).items():
        count = math.prod(size)
        found[name] = torch.arange(start, start + count, dtype=torch.int64).view(size)
        start += count
    return found


_FUSED = ("up_proj.weight", "k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias")


def engine_weights(
    hf: dict[str, Tensor], shape: ModelShape, rank: int, tp: int, ep: int
) -> dict[str, Tensor]:
    """A rank's parameters, in the words of SGLang's layers: chunks of fused and stacked tensors."""
    found = {}
    moe_tp = tp // ep
    kv_rank, kv_size = (rank, tp) if tp <= shape.num_query_groups else (
        rank * shape.num_query_groups // tp, shape.num_query_groups)  # fmt: skip
    for name, tensor in hf.items():
        module = name.rpartition(".")[0].rpartition(".")[0]
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            padded = torch.zeros(padded_vocabulary(len(tensor), tp), tensor.shape[1], dtype=tensor.dtype)
            padded[: len(tensor)] = tensor
            found[name] = padded.chunk(tp)[rank]
        elif name.endswith(("q_proj.weight", "q_proj.bias")):
            kind = name.rpartition(".")[2]
            k, v = (hf[f"{module}.{x}_proj.{kind}"].chunk(kv_size)[kv_rank] for x in "kv")
            found[f"{module}.qkv_proj.{kind}"] = torch.cat([tensor.chunk(tp)[rank], k, v])
        elif name.endswith("o_proj.weight"):
            found[name] = tensor.chunk(tp, dim=1)[rank]
        elif ".experts.0.gate" in name:
            experts = [
                f"{module.removesuffix('.0')}.{e}"
                for e in experts_of(rank, EngineLayout(tp, ep), shape.num_experts)
            ]
            inner = rank % moe_tp
            stacked = module.removesuffix(".0")
            found[f"{stacked}.w13_weight"] = torch.cat(
                [hf[f"{e}.{x}_proj.weight"].chunk(moe_tp)[inner] for e in experts for x in ("gate", "up")]
            )
            found[f"{stacked}.w2_weight"] = torch.cat(
                [hf[f"{e}.down_proj.weight"].chunk(moe_tp, dim=1)[inner] for e in experts]
            )
        elif ".experts." in name:
            continue
        elif name.endswith(("mlp.down_proj.weight", "shared_experts.down_proj.weight")):
            found[name] = tensor.chunk(tp, dim=1)[rank]
        elif name.endswith(("mlp.gate_proj.weight", "shared_experts.gate_proj.weight")):
            up = hf[f"{module}.up_proj.weight"]
            found[f"{module}.gate_up_proj.weight"] = torch.cat([tensor.chunk(tp)[rank], up.chunk(tp)[rank]])
        elif not name.endswith(_FUSED):
            found[name] = tensor
    return found


def changed_weights(family: Family, shape: ModelShape, steps: Sequence[float]) -> dict[str, Tensor]:
    """The same in fp32 after some steps, of which each has changed its share of the elements."""
    found = {name: tensor.float() for name, tensor in weights(family, shape).items()}
    for number, share in enumerate(steps):
        draw = torch.Generator().manual_seed(number)
        for tensor in found.values():
            tensor[torch.rand(tensor.shape, generator=draw) < share] += 0.5
    return found
