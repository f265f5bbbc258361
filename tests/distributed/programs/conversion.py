"""Loads a Megatron checkpoint at this layout, compares it with the HF folder it should be, and saves it."""

from __future__ import annotations

import sys

import numpy as np
import torch
from common import hand_back, make_policy, start_megatron


def main() -> None:
    args = start_megatron(sys.argv[1:])
    from megatron_vespo.checkpoints.hf_checkpoint import HFCheckpointReader

    policy = make_policy(args)
    with HFCheckpointReader(args.hf_checkpoint) as reader, torch.no_grad():
        held = {name: (tensor, reader.get(name)) for name, tensor in policy.named_hf_weights()}
    wrong = [
        name for name, (ours, theirs) in held.items() if ours.dtype != theirs.dtype or not ours.equal(theirs)
    ]
    policy.save({})
    hand_back(names=np.array(list(held)), wrong=np.array(wrong), stage=policy.groups.pp.rank())


if __name__ == "__main__":
    main()
