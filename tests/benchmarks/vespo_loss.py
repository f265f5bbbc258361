"""The VESPO loss on packed tokens against the same loss on padded [sequences, longest] tensors.

    python tests/benchmarks/vespo_loss.py

Forward and backward with respect to the log-probs, on one CPU thread. The padded formulas are those of TRL
(`loss_type="vespo"`) and of the paper's authors, written anew. Every measurement is a process of its own.

Shape suffixes: S sequences, N the longest sequence, T packed tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_vespo.algorithms.losses.aggregation import summed_loss
from megatron_vespo.algorithms.losses.inputs import LossInputs
from megatron_vespo.algorithms.losses.table import METHODS
from megatron_vespo.algorithms.vespo import GammaKernel, sequence_log_ratio

KERNEL = GammaKernel()
LOSS = METHODS["vespo"].bind(KERNEL)
TIMEOUT_S = 120  # of one measurement
TOKEN_NOISE = 0.03  # of log pi - log mu: log W of 8k tokens has a standard deviation of 2.7


def packed(log_probs_T: Tensor, old_T: Tensor, mask_T: Tensor, ids_T: Tensor, advantages_S: Tensor):
    """This package: the loss in slices as a step computes it, phi [S]."""
    ratio = sequence_log_ratio(
        log_probs_T, old_T, None, mask_T, ids_T, len(advantages_S), "rollout", mismatch_truncation=2.0
    )
    num_tokens_S = torch.ones_like(advantages_S)  # neither VESPO nor a token mean looks at it
    log_ratio_T = log_probs_T.detach() - old_T
    inputs = LossInputs(log_probs_T, log_ratio_T, ratio.log_w_S, advantages_S, num_tokens_S, mask_T, ids_T)
    loss_sum = summed_loss(LOSS, inputs, "token-mean", longest=1)
    return loss_sum / mask_T.sum(), KERNEL.phi(ratio.log_w_S, advantages_S)


def trl(log_probs_SN: Tensor, old_SN: Tensor, mask_SN: Tensor, advantages_S: Tensor):
    """TRL: tokens and log W clamped, the weight without gradient, divided by the tokens of the step."""
    with torch.no_grad():
        ratio_SN = (log_probs_SN - old_SN).clamp(-20, 20)
        log_w_S = (ratio_SN * mask_SN).sum(-1).clamp(math.log(1e-8), 20)
        positive_S = advantages_S >= 0
        k_S = torch.where(positive_S, KERNEL.positive[0], KERNEL.negative[0])
        lambda_S = torch.where(positive_S, KERNEL.positive[1], KERNEL.negative[1]).clamp(min=1e-4)
        phi_S = (lambda_S + k_S * log_w_S - lambda_S * log_w_S.exp()).exp().nan_to_num(0.0, 0.0, 0.0)
    loss_SN = -phi_S[:, None] * advantages_S[:, None] * log_probs_SN
    return (loss_SN * mask_SN).sum() / mask_SN.sum(), phi_S


def authors(log_probs_SN: Tensor, old_SN: Tensor, mask_SN: Tensor, advantages_S: Tensor):
    """The authors: advantages of every token, the ratio in the graph until it is detached, token mean."""
    advantages_SN = advantages_S[:, None].expand_as(mask_SN) * mask_SN
    ratio_SN = (log_probs_SN - old_SN).clamp(-20, 20)
    log_w_S = (ratio_SN * mask_SN).sum(-1).clamp(-20, 20)
    w_S = log_w_S.detach().exp()
    positive_S = (advantages_SN[:, 0] >= 0).float()
    k_S = positive_S * KERNEL.positive[0] + (1 - positive_S) * KERNEL.negative[0]
    lambda_S = (positive_S * KERNEL.positive[1] + (1 - positive_S) * KERNEL.negative[1]).clamp(min=1e-4)
    phi_S = (lambda_S + k_S * w_S.clamp(min=1e-8).log() - lambda_S * w_S).exp().nan_to_num(0.0, 0.0, 0.0)
    loss_SN = -phi_S[:, None] * advantages_SN * log_probs_SN
    return (loss_SN * mask_SN).sum() / mask_SN.sum(), phi_S


VARIANTS: dict[str, Callable] = {"packed": packed, "trl": trl, "authors": authors}


def sequence_lengths(num_sequences: int, longest: int, padding_share: float) -> Tensor:
    """Evenly spread up to `longest`, so that `padding_share` of the cells of [S, longest] is padding."""
    lengths_S = torch.linspace(max(1.0, (1 - 2 * padding_share) * longest), longest, num_sequences).long()
    return lengths_S[torch.randperm(num_sequences)]


def inputs(variant: str, lengths_S: Tensor) -> list[Tensor]:
    """Arguments of a variant, the log-probs first; the same numbers for all variants."""
    num_tokens = int(lengths_S.sum())
    log_probs_T = -torch.rand(num_tokens) * 2
    old_T = log_probs_T + TOKEN_NOISE * torch.randn(num_tokens)
    advantages_S = torch.randn(len(lengths_S))
    mask_T = torch.ones(num_tokens)
    if variant == "packed":
        ids_T = torch.repeat_interleave(torch.arange(len(lengths_S)), lengths_S)
        return [log_probs_T.requires_grad_(), old_T, mask_T, ids_T, advantages_S]
    log_probs_SN, old_SN, mask_SN = (
        pad_sequence(values_T.split(lengths_S.tolist()), batch_first=True)
        for values_T in (log_probs_T, old_T, mask_T)
    )
    return [log_probs_SN.requires_grad_(), old_SN, mask_SN, advantages_S]


def status_bytes(field: str) -> int:
    """VmRSS, the resident memory of this process, or VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure(variant: str, padding_share: float, options: argparse.Namespace) -> dict[str, float]:
    """Median processor seconds of forward and backward; bytes of the inputs, and of the peak beyond them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    arguments = inputs(variant, sequence_lengths(options.sequences, options.longest, padding_share))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status_bytes("VmRSS")
    seconds = []
    for _ in range(options.repeats + 1):
        arguments[0].grad = None
        started = time.process_time()
        loss, _ = VARIANTS[variant](*arguments)
        loss.backward()
        seconds.append(time.process_time() - started)
        del loss
    return {
        "seconds": statistics.median(seconds[1:]),  # the first one warms up
        "inputs": sum(argument.nbytes for argument in arguments),
        "beyond": status_bytes("VmHWM") - before,
    }


def measure_in_process(variant: str, padding_share: float, **environment: str) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--measure", variant, "--padding", str(padding_share)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{variant} ended with code {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def print_differences(options: argparse.Namespace) -> None:
    """Where the definitions agree: |token ratio| < 20, -18.4 < log W < 20."""
    torch.manual_seed(0)
    lengths_S = sequence_lengths(options.sequences, options.longest, 0.5)
    results = {}
    for variant, function in VARIANTS.items():
        torch.manual_seed(0)
        arguments = inputs(variant, lengths_S)
        loss, phi_S = function(*arguments)
        loss.backward()
        gradient = arguments[0].grad
        if variant != "packed":
            gradient = torch.cat([row[:n] for row, n in zip(gradient, lengths_S.tolist(), strict=True)])
        results[variant] = loss.detach(), phi_S, gradient
    ours = results.pop("packed")
    print(f"loss {ours[0]:.6f}, phi from {ours[1].min():.1e} to {ours[1].max():.3f}")
    for variant, theirs in results.items():
        loss, phi, gradient = (float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
        relative = gradient / float(ours[2].abs().max())
        print(f"{variant:8s} differs: loss {loss:.1e}, phi {phi:.1e}, gradient {relative:.1e} of its largest")


def print_disagreements() -> None:
    """phi of one sequence of three tokens, A = 1, by its token log-ratios."""
    cases = {
        "log W = -25": [-15.0, -5.0, -5.0],
        "log W = -1, a token of -25": [-25.0, 12.0, 12.0],
        "NaN behaviour log-prob": [0.0, 0.0, math.nan],
    }
    for case, log_ratios in cases.items():
        log_probs_T, mask_T = -torch.ones(3), torch.ones(3)
        old_T, advantages_S = log_probs_T - torch.tensor(log_ratios), torch.ones(1)
        ids_T = torch.zeros(3, dtype=torch.long)
        phi = {"packed": packed(log_probs_T, old_T, mask_T, ids_T, advantages_S)[1]}
        for name in ("trl", "authors"):
            phi[name] = VARIANTS[name](log_probs_T[None], old_T[None], mask_T[None], advantages_S)[1]
        print(f"{case:28s} phi:", ", ".join(f"{name} {float(value):.2g}" for name, value in phi.items()))


def print_table(options: argparse.Namespace) -> None:
    print("\n| padding | variant | ms | x packed | inputs MB | peak beyond MB | sum MB | x packed |")
    print("|---|---|---|---|---|---|---|---|")
    for padding_share in (0.1, 0.5):
        # in turn, as other work on the machine slows all variants; the fastest round counts
        rounds = [
            {variant: measure_in_process(variant, padding_share)["seconds"] for variant in VARIANTS}
            for _ in range(options.rounds)
        ]
        seconds = {variant: min(a_round[variant] for a_round in rounds) for variant in VARIANTS}
        # a process of its own, as it is slower: freed tensors go back to the system at once
        memory = {v: measure_in_process(v, padding_share, MALLOC_MMAP_THRESHOLD_="100000") for v in VARIANTS}
        peaks = {variant: m["inputs"] + m["beyond"] for variant, m in memory.items()}
        for v in VARIANTS:
            print(
                f"| {padding_share:.0%} | {v} | {seconds[v] * 1e3:.1f} | "
                f"{seconds[v] / seconds['packed']:.2f} | {memory[v]['inputs'] / 1e6:.1f} | "
                f"{memory[v]['beyond'] / 1e6:.1f} | {peaks[v] / 1e6:.1f} | {peaks[v] / peaks['packed']:.2f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--longest", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--padding", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.padding, options)))
        return
    print(f"{options.sequences} sequences of up to {options.longest} tokens, torch {torch.__version__}")
    print_differences(options)
    print_disagreements()
    print_table(options)


if __name__ == "__main__":
    main()
