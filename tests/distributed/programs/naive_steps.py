"""Losses and gradient norms of steps by transformers and the naive formulas; no Megatron in this process.

Which token was sampled is read from the segments one token after the other. The steps are those of
programs/losses.py, and the first one of programs/train.py.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from common import FLAGS, hand_back, read_samples
from losses import (
    CLIP_RANGES,
    PAIR_GAP,
    PER_TOKEN,
    TARGETS,
    cases,
    old_noise,
    pair_draws,
    token_advantages,
)
from reference import COEFFICIENT, KL_CASES, name_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_vespo.algorithms.losses.table import METHODS
from megatron_vespo.algorithms.vespo import GammaKernel
from megatron_vespo.types import TrainingSample
from tests.support.naive_losses import naive_kl, naive_pairs, naive_terms, naive_total, phi, score
from tests.support.random_task import random_supports

MINI_BATCH = 24
LONGEST = int(FLAGS[FLAGS.index("--max-completion-tokens") + 1])
KERNEL = GammaKernel()


def places_sampled(sample: TrainingSample) -> list[int]:
    """Indices of the sampled tokens in `token_ids`."""
    if sample.segments is None:
        return list(range(sample.prompt_length, sample.num_tokens))
    places, place = [], sample.prompt_length
    for writer, length in zip(sample.segments.writers, sample.segments.lengths, strict=True):
        for _ in range(length):
            if writer == "policy":
                places.append(place)
            place += 1
    return places


def distributions(model: torch.nn.Module, sample: TrainingSample) -> list[tuple[list[int], Tensor]]:
    """The tokens that the sampler could choose from and their log-probs with gradient, per sampled token."""
    tokens = torch.from_numpy(sample.token_ids).long()
    logits = model(tokens[None]).logits[0].double() / sample.temperature
    found, used = [], 0
    for n, place in enumerate(places_sampled(sample)):
        if sample.supports is None:
            ids = list(range(logits.shape[1]))
        else:
            ids = sample.supports.token_ids[used : used + sample.supports.counts[n]].tolist()
            used += len(ids)
        chosen = logits[place - 1, ids]
        found.append((ids, chosen - chosen.exp().sum().log()))
    return found


def log_probs(model: torch.nn.Module, sample: TrainingSample) -> list[Tensor]:
    """Of the sampled tokens, with gradient."""
    places = places_sampled(sample)
    by_token = distributions(model, sample)
    return [
        values[ids.index(int(sample.token_ids[place]))]
        for (ids, values), place in zip(by_token, places, strict=True)
    ]


def mean_entropy(model: torch.nn.Module, samples: list[TrainingSample]) -> float:
    """Per sampled token, in nats."""
    with torch.no_grad():
        entropies = [
            -sum(math.exp(p) * p for p in values.tolist())
            for sample in samples
            for _, values in distributions(model, sample)
        ]
    return sum(entropies) / len(entropies)


def terms_of(name: str, responses: list[tuple]) -> list[list[Tensor]]:
    thresholds = {"thresholds": CLIP_RANGES[name]} if name in CLIP_RANGES else {}
    return naive_terms(name, responses, KERNEL, TARGETS.get(name), **thresholds)


class Reference:
    """Loss, gradient norm over all parameters, and the loss if no terms cancelled."""

    def __init__(self, model: torch.nn.Module, samples: list[TrainingSample]):
        self.samples = samples
        self.pi = [log_probs(model, sample) for sample in samples]
        self._flat = [value for of_sample in self.pi for value in of_sample]
        self._parameters = list(model.parameters())

    def of(self, terms: list[list[Tensor]], aggregation: str, *more: list[list[Tensor]]) -> np.ndarray:
        """The sum of `terms` and of each of `more`, aggregated."""
        all_terms = [terms, *more]
        loss = sum(naive_total(some, aggregation, LONGEST) for some in all_terms)
        sizes = [[[abs(term.item()) for term in response] for response in some] for some in all_terms]
        size = sum(naive_total(some, aggregation, LONGEST) for some in sizes)
        by_pi = torch.autograd.grad(loss, self._flat, retain_graph=True, allow_unused=True)
        used = [
            (pi, gradient) for pi, gradient in zip(self._flat, by_pi, strict=True) if gradient is not None
        ]
        gradients = torch.autograd.grad(
            [pi for pi, _ in used], self._parameters, [gradient for _, gradient in used],
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        square = sum(g.double().square().sum().item() for g in gradients if g is not None)
        return np.array([loss.item(), math.sqrt(square), size])

    def _advantages(self) -> list[list[float]]:
        """Of the tokens, which are those of their response."""
        return [[sample.advantage] * len(pi) for sample, pi in zip(self.samples, self.pi, strict=True)]

    def losses(self) -> dict[str, np.ndarray]:
        noise = old_noise(self.samples)
        old = [
            [p.item() + n for p, n in zip(*pair, strict=True)] for pair in zip(self.pi, noise, strict=True)
        ]
        responses = list(zip(self.pi, old, self._advantages(), strict=True))
        steps = {}
        for name, aggregation in cases():
            steps[f"{name} {aggregation}"] = self.of(terms_of(name, responses), aggregation)
        own = [
            (pi, of_old, a if more is None else [x + y for x, y in zip(a, more.tolist(), strict=True)])
            for (pi, of_old, a), more in zip(responses, token_advantages(self.samples), strict=True)
        ]
        assert sum(min(a) < 0 < max(a) for _, _, a in own) > len(own) / 4, "signs within a response"
        for name, method in METHODS.items():
            steps[f"{name} {PER_TOKEN}"] = self.of(terms_of(name, own), method.aggregation)
        pairs = [
            a
            for rewards, lengths in zip(*(draws.tolist() for draws in pair_draws(self.samples)), strict=True)
            for a in naive_pairs(rewards, lengths, PAIR_GAP)
        ]
        assert 0.3 < np.count_nonzero(pairs) / len(pairs) < 1.0
        paired = [(pi, of_old, [a] * len(pi)) for (pi, of_old, _), a in zip(responses, pairs, strict=True)]
        steps["pairs"] = self.of(naive_terms("grpo", paired, KERNEL, None), "token-mean")
        return steps | {"log_w": np.array([-values.sum() for values in noise])}

    def with_supports(self, entropy: float) -> dict[str, np.ndarray]:
        """VESPO by pi_old of `old_noise`."""
        noise = [values.tolist() for values in old_noise(self.samples)]
        old = [
            [p.item() + n for p, n in zip(*pair, strict=True)] for pair in zip(self.pi, noise, strict=True)
        ]
        responses = list(zip(self.pi, old, self._advantages(), strict=True))
        return {
            "supports": self.of(naive_terms("vespo", responses, KERNEL, None), "token-mean"),
            "supports log_probs": np.array([p.item() for p in self._flat]),
            "supports entropy": np.array(entropy),
        }

    def first_step(self) -> dict[str, np.ndarray]:
        """VESPO, `decoupled`, pi_old = pi."""
        behavior = [sample.behavior_log_probs.tolist() for sample in self.samples]
        log_w = [
            min(sum(p.item() - b for p, b in zip(pi, mu, strict=True)), math.log(2.0))
            for pi, mu in zip(self.pi, behavior, strict=True)
        ]
        terms = [
            score(pi, [sample.advantage] * len(pi), [phi(math.exp(w), sample.advantage, KERNEL)] * len(pi))
            for pi, sample, w in zip(self.pi, self.samples, log_w, strict=True)
        ]
        return {"first step": self.of(terms, "token-mean"), "first log_w": np.array(log_w)}

    def kl_losses(self, other: torch.nn.Module) -> dict[str, np.ndarray]:
        """`reinforce` and the KL of `other`."""
        with torch.no_grad():
            ref = [[p.item() for p in log_probs(other, sample)] for sample in self.samples]
        steps = {}
        for kind, bound, aggregation in KL_CASES:
            loss = [
                score(pi, [s.advantage] * len(pi), [1.0] * len(pi))
                for pi, s in zip(self.pi, self.samples, strict=True)
            ]
            kl = [
                [COEFFICIENT * k for k in naive_kl(pi, of_ref, s.behavior_log_probs.tolist(), kind, bound)]
                for pi, of_ref, s in zip(self.pi, ref, self.samples, strict=True)
            ]
            steps[name_of(kind, bound, aggregation)] = self.of(loss, aggregation, kl)
            total = naive_total(kl, aggregation, LONGEST).item()
            steps["kl_loss " + name_of(kind, bound, aggregation)] = np.array(total)
        return steps | {"reference": np.array([r for of_ref in ref for r in of_ref])}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--reference", type=Path, help="a model: only the losses with its KL")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    samples = read_samples(options.samples)[:MINI_BATCH]
    reference = Reference(model, samples)
    if options.reference:
        other = AutoModelForCausalLM.from_pretrained(options.reference, dtype=torch.float32).eval()
        hand_back(**reference.kl_losses(other))
        return
    steps = reference.losses() | reference.first_step()
    samples = random_supports(samples)
    steps |= Reference(model, samples).with_supports(mean_entropy(model, samples))
    hand_back(**steps)


if __name__ == "__main__":
    main()
