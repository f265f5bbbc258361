"""linear_log_probs with this rank's rows of the vocabulary."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from common import hand_back, join_ranks

from megatron_vespo.algorithms.linear_log_probs import linear_log_probs
from tests.support.linear_log_probs import supports_of


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--chunk-size", type=int, required=True)
    parser.add_argument("--bf16", action="store_true", help="hidden states and weight")
    options = parser.parse_args()

    rank, num_ranks = join_ranks(), int(os.environ["WORLD_SIZE"])
    inputs = {name: torch.from_numpy(array) for name, array in np.load(options.inputs).items()}
    dtype = torch.bfloat16 if options.bf16 else inputs["hidden"].dtype
    hidden_TH = inputs["hidden"].to(dtype).requires_grad_()
    weight_VH = inputs["weight"].chunk(num_ranks)[rank].to(dtype, copy=True).requires_grad_()
    log_probs_T, entropy_T = linear_log_probs(
        hidden_TH,
        weight_VH,
        inputs["labels"],
        inputs["temperature"],
        vocab_size=options.vocab_size,
        group=torch.distributed.group.WORLD,
        chunk_size=options.chunk_size,
        supports=supports_of(inputs["allowed"]) if "allowed" in inputs else None,
        entropy_gradient=True,
    )
    torch.autograd.backward((log_probs_T, entropy_T), (inputs["grad_log_probs"], inputs["grad_entropy"]))
    hand_back(
        log_probs=log_probs_T.detach().numpy(),
        entropy=entropy_T.detach().numpy(),
        grad_hidden=hidden_TH.grad.to(inputs["hidden"].dtype).numpy(),
        grad_weight=weight_VH.grad.to(inputs["hidden"].dtype).numpy(),
    )


if __name__ == "__main__":
    main()
