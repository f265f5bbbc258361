"""The policy as FP8 engines get it: an HF folder, and the bytes of this rank's stage."""

from __future__ import annotations

from pathlib import Path

from common import hand_back, start_program


def main() -> None:
    options, policy, _ = start_program(export=Path)
    from megatron_vespo.trainer.export import export_hf

    export_hf(policy, options.export, bucket_bytes=100_000, fp8=True)
    hand_back(
        fp8=sum(tensor.nbytes for _, tensor in policy.named_hf_weights(fp8=True)),
        elements=sum(tensor.numel() for _, tensor in policy.named_hf_weights()),
        stage=policy.groups.pp.rank(),
    )


if __name__ == "__main__":
    main()
