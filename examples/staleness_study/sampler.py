"""An engine in this process: samples Completions from HF-named weights, exact or noisy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import qwen3_moe
import running_sum
import torch
from torch import Tensor
from transformers import Qwen3MoeConfig

from megatron_vespo.types import Completion, Prompt, VersionSpans

CHUNK = 512  # sequences sampled at a time
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Sampler:
    """Policy `version`'s weights, and how unlike the trainer's its arithmetic is."""

    weights: qwen3_moe.Weights
    config: Qwen3MoeConfig
    version: int = 0
    router_noise: float = 0.0  # standard deviation added to the routers' logits

    def with_fp8_weights(self) -> Sampler:
        """Matrices rounded to e4m3 with one scale a matrix (an expert's is its own)."""
        return replace(self, weights={name: _fp8(tensor) for name, tensor in self.weights.items()})


def _fp8(tensor: Tensor) -> Tensor:
    if tensor.dim() < 2:
        return tensor
    scale = tensor.abs().amax(dim=(-2, -1), keepdim=True) / FP8_MAX
    return (tensor / scale).to(torch.float8_e4m3fn).float() * scale


@torch.no_grad()
def sample_responses(sampler: Sampler, prompts: Sequence[Prompt], seed: int) -> list[Completion]:
    """One scored completion a prompt, at temperature 1; prompts are of one length."""
    generator = torch.Generator().manual_seed(seed)
    completions = []
    for start in range(0, len(prompts), CHUNK):
        completions += _sample(sampler, prompts[start : start + CHUNK], generator)
    return completions


def _sample(sampler: Sampler, prompts: Sequence[Prompt], generator: torch.Generator) -> list[Completion]:
    tokens = torch.from_numpy(np.stack([prompt.token_ids for prompt in prompts])).long()
    num_positions = tokens.shape[1] + running_sum.MAX_RESPONSE
    cache = qwen3_moe.Cache.empty(sampler.config, len(prompts), num_positions)
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    drawn, log_probs, routes = [], [], []
    for _ in range(running_sum.MAX_RESPONSE):
        layers: list[Tensor] = []
        scores = qwen3_moe.logits(
            sampler.weights, sampler.config, tokens, cache, sampler.router_noise, layers
        )
        routes.append(torch.stack(layers, dim=2).byte())  # [B, T, L, K]
        log_softmax = scores[:, -1].log_softmax(dim=-1)
        tokens = torch.multinomial(log_softmax.exp(), 1, generator=generator)
        drawn.append(tokens)
        log_probs.append(log_softmax.gather(1, tokens))
        ended |= tokens[:, 0] == running_sum.EOS
        if ended.all():
            break
    arrays = (torch.cat(parts, dim=1).numpy() for parts in (drawn, log_probs, routes))
    return [_completion(sampler, *row) for row in zip(prompts, *arrays, strict=True)]


def _completion(
    sampler: Sampler, prompt: Prompt, drawn: np.ndarray, log_probs: np.ndarray, routes: np.ndarray
) -> Completion:
    ends = np.flatnonzero(drawn == running_sum.EOS)
    length = int(ends[0]) + 1 if len(ends) else len(drawn)
    token_ids = drawn[:length].astype(np.int32)
    return Completion(
        prompt=prompt,
        token_ids=token_ids,
        log_probs=log_probs[:length],
        policy_versions=VersionSpans.single(sampler.version, length),
        routed_experts=routes[: len(prompt.token_ids) + length - 1],
        finish_reason="stop" if len(ends) else "length",
        temperature=1.0,
        reward=running_sum.reward(prompt, token_ids.tolist()),
    )
