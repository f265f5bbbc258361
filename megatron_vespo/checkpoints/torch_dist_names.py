"""Locates parameters in Megatron's torch_dist format: one tensor per kind, layers and experts stacked.

`decoder.layers.7.mlp.router.weight` is row 7 of `decoder.layers.mlp.router.weight` [layers, experts, hidden].
Norms are filed under the names that Transformer Engine's fused layers have, also by layers that are not
fused (megatron.core.models.gpt.gpt_layer_specs). In an MoE layer the two implementations disagree about the
second norm, so there a parameter has two addresses.

A model whose first layers have no experts is not stacked: layer 7's router is all of
`decoder.layers.7.mlp.router.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vespo.models.family import ModelShape

REFERENCE = "reference."  # begins the names of a moved reference policy, which is no part of the model
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
_FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_LAYER_MODULES = (  # with what Megatron calls extra state; the norms and the attention under TE only
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "input_layernorm",
    "pre_mlp_layernorm",
)
_LINEAR = ("linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class Address:
    """A parameter in the stacked tensor `key`: at `index`, of `stack` [layers] or [layers, experts] or []."""

    key: str
    index: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()

    def unstacked(self) -> Address:
        """The address in a checkpoint of unlike layers (--non-homogeneous-layers)."""
        if not self.stack:
            return self
        key = self.key.replace("decoder.layers.", f"decoder.layers.{self.index[0]}.", 1)
        return Address(key, self.index[1:], self.stack[1:])


def addresses(megatron_name: str, shape: ModelShape) -> list[Address]:
    """Where the parameter (local spec's name, global numbers) is; more than one: any of them, same values."""
    match = _LAYER.fullmatch(megatron_name)
    if not match:
        return [Address(megatron_name)]
    layer, rest = int(match[1]), match[2]
    stacked = _stacked_addresses(layer, rest, shape)
    return [address.unstacked() for address in stacked] if shape.dense_layers else stacked


def _stacked_addresses(layer: int, rest: str, shape: ModelShape) -> list[Address]:
    expert = _EXPERT.fullmatch(rest)
    if expert:
        stack = (shape.num_layers, shape.num_experts)
        return [Address(f"decoder.layers.mlp.experts.experts.{expert[2]}", (layer, int(expert[1])), stack)]
    rests = [_FUSED_NORMS.get(rest, rest)]
    if rest == "pre_mlp_layernorm.weight" and _has_experts(layer, shape):
        rests.append(rest)
    return [Address(f"decoder.layers.{rest}", (layer,), (shape.num_layers,)) for rest in rests]


def extra_states(shape: ModelShape) -> Iterator[str]:
    """Names under which Megatron looks for its layers' extra state, which is None outside of fp8 training.

    A superset of what either implementation requests: a missing name would make a load fail.
    """
    yield _object("decoder.final_layernorm", (0,), (1,))
    for layer in range(shape.num_layers):
        experts = range(shape.num_experts) if _has_experts(layer, shape) else range(0)
        mlp = "mlp.shared_experts" if experts else "mlp"
        modules = list(_LAYER_MODULES)
        if not experts or shape.shared_ffn_hidden_size:
            modules += [f"{mlp}.{linear}" for linear in _LINEAR]
        stack, index, prefix = (shape.num_layers,), (layer,), "decoder.layers."
        if shape.dense_layers:
            stack, index, prefix = (), (), f"decoder.layers.{layer}."
        for module in modules:
            yield _object(prefix + module, index or (0,), stack or (1,))
        for expert in experts:
            for linear in _LINEAR:
                name = f"{prefix}mlp.experts.experts.{linear}"
                yield _object(name, (*index, expert), (*stack, shape.num_experts))


def _has_experts(layer: int, shape: ModelShape) -> bool:
    return bool(shape.num_experts) and layer >= shape.dense_layers


def _object(module: str, index: tuple[int, ...], stack: tuple[int, ...]) -> str:
    """megatron.core.dist_checkpointing.mapping.ShardedObject.unique_key"""
    return f"{module}._extra_state/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, stack))}"
