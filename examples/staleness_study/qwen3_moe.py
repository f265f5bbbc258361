"""A small Qwen3-MoE in plain PyTorch, computed from HF-named tensors: for the warm start and for sampling.

Every expert sees every token, which is the fastest way at this size. Shape suffixes: B sequences, T tokens,
D hidden, E experts, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3MoeConfig

Weights = dict[str, Tensor]


@dataclass
class Cache:
    """Keys and values of every layer, [B, heads, positions, head_dim]; `length` of them are filled."""

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0

    @staticmethod
    def empty(config: Qwen3MoeConfig, num_sequences: int, num_positions: int) -> Cache:
        shape = (num_sequences, config.num_key_value_heads, num_positions, config.head_dim)
        layers = range(config.num_hidden_layers)
        return Cache([torch.zeros(shape) for _ in layers], [torch.zeros(shape) for _ in layers])


def logits(
    weights: Weights,
    config: Qwen3MoeConfig,
    token_ids: Tensor,
    cache: Cache | None = None,
    router_noise: float = 0.0,
    routes: list[Tensor] | None = None,
) -> Tensor:
    """[B, T, V] of `token_ids` [B, T], which follow what `cache` holds.

    `router_noise` is the standard deviation of what is added to the routers' logits; the experts [B, T, K] of
    every layer are appended to `routes`.
    """
    first = 0 if cache is None else cache.length
    rotary = _rotary(config, first, token_ids.shape[1])
    hidden = weights["model.embed_tokens.weight"][token_ids]
    for layer in range(config.num_hidden_layers):
        own = _Layer(weights, f"model.layers.{layer}.", config)
        hidden = hidden + own.attention(own.norm(hidden, "input_layernorm"), rotary, cache, layer)
        mlp, experts = own.experts(own.norm(hidden, "post_attention_layernorm"), router_noise)
        hidden = hidden + mlp
        if routes is not None:
            routes.append(experts)
    if cache is not None:
        cache.length += token_ids.shape[1]
    hidden = F.rms_norm(hidden, hidden.shape[-1:], weights["model.norm.weight"], config.rms_norm_eps)
    return hidden @ weights["lm_head.weight"].T


def _rotary(config: Qwen3MoeConfig, first: int, count: int) -> tuple[Tensor, Tensor]:
    """cos and sin [count, head_dim] of positions from `first` on."""
    theta = config.rope_parameters["rope_theta"]
    frequencies = theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    angles = torch.outer(torch.arange(first, first + count).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotate(values: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    left, right = values.chunk(2, dim=-1)
    return values * rotary[0] + torch.cat([-right, left], dim=-1) * rotary[1]


@dataclass(frozen=True)
class _Layer:
    weights: Weights
    prefix: str
    config: Qwen3MoeConfig

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[self.prefix + name + ".weight"]

    def norm(self, hidden: Tensor, name: str) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], self[name], self.config.rms_norm_eps)

    def attention(self, hidden: Tensor, rotary, cache: Cache | None, layer: int) -> Tensor:
        num_sequences, num_tokens, _ = hidden.shape

        def heads(name: str) -> Tensor:
            projected = hidden @ self[f"self_attn.{name}_proj"].T
            return projected.view(num_sequences, num_tokens, -1, self.config.head_dim).transpose(1, 2)

        query = _rotate(self.norm(heads("q"), "self_attn.q_norm"), rotary)
        key, value = _rotate(self.norm(heads("k"), "self_attn.k_norm"), rotary), heads("v")
        if cache is not None:
            filled = slice(cache.length, cache.length + num_tokens)
            cache.keys[layer][:, :, filled], cache.values[layer][:, :, filled] = key, value
            key, value = (kept[layer][:, :, : filled.stop] for kept in (cache.keys, cache.values))
        if num_tokens == 1:  # several times faster than the fused kernel, whose tiles are for longer queries
            scores = query @ key.transpose(2, 3) * self.config.head_dim**-0.5
            mixed = scores.softmax(dim=-1) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).flatten(2) @ self["self_attn.o_proj"].T

    def experts(self, hidden: Tensor, router_noise: float) -> tuple[Tensor, Tensor]:
        """The mixture's output, and the experts [B, T, K] that made it."""
        scores = hidden @ self["mlp.gate"].T
        if router_noise:
            scores = scores + router_noise * torch.randn_like(scores)
        best, experts = scores.topk(self.config.num_experts_per_tok, dim=-1)
        shares = torch.zeros_like(scores).scatter(-1, experts, best.softmax(dim=-1))
        gate_up = self.weights[self.prefix + "mlp.experts.gate_up"]  # [E, 2 F, D]
        down = self.weights[self.prefix + "mlp.experts.down"]  # [E, D, F]
        projected = (hidden @ gate_up.flatten(0, 1).T).unflatten(-1, (gate_up.shape[0], 2, -1))
        inner = F.silu(projected[..., 0, :]) * projected[..., 1, :] * shares[..., None]
        return inner.flatten(-2) @ down.transpose(1, 2).flatten(0, 1), experts


def stack_experts(named: Weights, config: Qwen3MoeConfig) -> Weights:
    """HF's one tensor an expert and projection, laid together as `logits` wants them."""
    stacked = {name: tensor for name, tensor in named.items() if ".mlp.experts." not in name}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts."

        def of(projection: str, prefix: str = prefix) -> Tensor:
            return torch.stack(
                [named[f"{prefix}{e}.{projection}_proj.weight"] for e in range(config.num_experts)]
            )

        stacked[prefix + "gate_up"] = torch.cat([of("gate"), of("up")], dim=1)
        stacked[prefix + "down"] = of("down")
    return stacked


def unstack_experts(stacked: Weights) -> Weights:
    """The inverse of `stack_experts`."""
    named = {name: tensor for name, tensor in stacked.items() if ".mlp.experts." not in name}
    for name, tensor in stacked.items():
        if name.endswith(".gate_up"):
            prefix = name.removesuffix("gate_up")
            for e, (both, down) in enumerate(zip(tensor, stacked[prefix + "down"], strict=True)):
                gate, up = both.chunk(2)
                for projection, part in (("gate", gate), ("up", up), ("down", down)):
                    named[f"{prefix}{e}.{projection}_proj.weight"] = part.contiguous()
    return named
