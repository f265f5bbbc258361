"""Time and peak memory of log-probs and their backward: linear_log_probs against all logits at once.

Float32 on the CPU with every core. Each measurement is a process of its own; its peak is how far the resident
memory grew, at most, over what it was before the call. Two references: log-probs only, and with the entropy,
which linear_log_probs always returns. The fastest of --repeats rounds: other work on the machine only adds.
With --supports: the processor time with supports of truncated sampling, of 10 and 200 ids per token on
average, and without, in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

REPOSITORY = Path(__file__).parents[2]
TARGET_TIME, TARGET_MEMORY = 1.3, 0.15
TIMEOUT_S = 900


def all_logits(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, temperature_T: Tensor) -> Tensor:
    log_probs_TV = torch.log_softmax(hidden_TH @ weight_VH.t() / temperature_T[:, None], dim=-1)
    return log_probs_TV.gather(1, labels_T[:, None])[:, 0]


def all_logits_with_entropy(
    hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, temperature_T: Tensor
) -> tuple[Tensor, Tensor]:
    log_probs_TV = torch.log_softmax(hidden_TH @ weight_VH.t() / temperature_T[:, None], dim=-1)
    with torch.no_grad():
        entropy_T = -(log_probs_TV.exp() * log_probs_TV).sum(-1)
    return log_probs_TV.gather(1, labels_T[:, None])[:, 0], entropy_T


VARIANTS = ("linear_log_probs", "all_logits", "all_logits_with_entropy")
MEAN_SUPPORTS = (0, 10, 200)  # ids; 0: none


def inputs(options: argparse.Namespace) -> tuple[Tensor, ...]:
    """Hidden states, weight, labels, temperatures and the upstream gradient."""
    torch.manual_seed(0)
    hidden_TH = torch.randn(options.tokens, options.hidden).requires_grad_()
    weight_VH = torch.randn(options.vocab, options.hidden).mul_(options.hidden**-0.5).requires_grad_()
    labels_T = torch.randint(0, options.vocab, (options.tokens,))
    temperature_T = torch.rand(options.tokens) + 0.5
    return hidden_TH, weight_VH, labels_T, temperature_T, torch.randn(options.tokens)


def compare_supports(options: argparse.Namespace) -> None:
    from megatron_vespo.algorithms.linear_log_probs import linear_log_probs
    from megatron_vespo.algorithms.supports import Supports

    *fields, upstream_T = inputs(options)
    best = dict.fromkeys(MEAN_SUPPORTS, float("inf"))
    for mean in MEAN_SUPPORTS * options.repeats:
        supports = None
        if mean:
            counts_T = torch.randint(1, 2 * mean, upstream_T.shape)
            ids_M = torch.randint(0, options.vocab, (int(counts_T.sum()),))
            ids_M[counts_T.cumsum(0) - counts_T] = fields[2]  # the order does not matter
            supports = Supports.of(counts_T, ids_M)
        start = time.process_time()
        log_probs_T, _ = linear_log_probs(
            *fields, vocab_size=options.vocab, group=None, chunk_size=options.chunk_size, supports=supports
        )
        log_probs_T.backward(upstream_T)
        best[mean] = min(best[mean], time.process_time() - start)
    for mean, seconds in best.items():
        print(f"supports of {mean or 'no'} ids: {seconds:.2f} processor s, x{seconds / best[0]:.2f}")


def measure(variant: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the forward and of both passes, and the growth of the peak in GB."""
    from megatron_vespo.algorithms.linear_log_probs import linear_log_probs

    *fields, upstream_T = inputs(options)
    torch.randn(512, 512) @ torch.randn(512, 512)  # starts the threads of the matmuls

    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if variant == "linear_log_probs":
        log_probs_T, _ = linear_log_probs(
            *fields, vocab_size=options.vocab, group=None, chunk_size=options.chunk_size
        )
    elif variant == "all_logits":
        log_probs_T = all_logits(*fields)
    else:
        log_probs_T, _ = all_logits_with_entropy(*fields)
    forward = time.perf_counter() - start
    log_probs_T.backward(upstream_T)
    seconds = time.perf_counter() - start
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before
    return {"seconds": seconds, "forward": forward, "gigabytes": kilobytes * 1024 / 1e9}


def measure_in_a_process(variant: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--variant", variant],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": str(os.cpu_count())},
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--chunk-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--variant", choices=VARIANTS, help="measure this one, here, and print JSON")
    parser.add_argument("--supports", action="store_true", help="measure these instead")
    options = parser.parse_args()
    if options.supports:
        compare_supports(options)
        return
    if options.variant:
        print(json.dumps(measure(options.variant, options)))
        return

    rounds = [{name: measure_in_a_process(name) for name in VARIANTS} for _ in range(options.repeats)]
    best = {
        name: {key: min(a_round[name][key] for a_round in rounds) for key in rounds[0][name]}
        for name in VARIANTS
    }
    for name, result in best.items():
        print(
            f"{name:24} {result['seconds']:6.1f} s (forward {result['forward']:.1f} s), "
            f"peak {result['gigabytes']:.2f} GB"
        )
    weight_gradient = options.vocab * options.hidden * 4 / 1e9
    print(f"of every peak, {weight_gradient:.2f} GB are the gradient of the weight")
    for reference in VARIANTS[1:]:
        time_ratio, memory_ratio = (
            best["linear_log_probs"][key] / best[reference][key] for key in ("seconds", "gigabytes")
        )
        print(
            f"to {reference}: time x{time_ratio:.2f} (target {TARGET_TIME}), "
            f"peak memory x{memory_ratio:.3f} (target {TARGET_MEMORY})"
        )


if __name__ == "__main__":
    main()
