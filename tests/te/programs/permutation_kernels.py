"""The permutations in torch and by TE's own Triton kernels, in Triton's interpreter, on the same inputs."""

from __future__ import annotations

import numpy as np
import on_cpu
import permutation
import torch

from tests.distributed.programs.common import hand_back

T, E, H, TOP = 7, 5, 70, 2


def main() -> None:
    torch.manual_seed(0)
    results: dict[str, list[np.ndarray]] = {}

    def compare(name: str, *arguments, **named):
        ours = getattr(permutation, name)(*arguments, **named)
        theirs = on_cpu.TRITON_KERNELS[name](*arguments, **named)
        for which, output in (("torch", ours), ("triton", theirs)):
            outputs = output if isinstance(output, tuple) else (output,)
            tensors = [tensor for tensor in outputs if tensor is not None]
            results[f"{which} {name} {len(results) // 2}"] = np.concatenate(
                [tensor.double().flatten().numpy() for tensor in tensors]
            )
        return ours

    probs = torch.rand(T, E)
    routing_map = probs >= probs.topk(TOP, 1).values[:, -1:]
    routing_map[3] = False  # a token that no expert here has
    probs = probs * routing_map
    rows = int(routing_map.sum())
    x, y = torch.randn(T, H), torch.randn(rows, H)
    row_map = permutation.make_row_id_map(routing_map, T, E)
    theirs = on_cpu.TRITON_KERNELS["make_row_id_map"](routing_map, T, E)
    used = torch.cat(
        [(torch.arange(E) < row_map[:, -1:]).repeat(1, 2), torch.ones(T, 1, dtype=torch.bool)], 1
    )
    results |= {"torch rows": row_map[used].numpy(), "triton rows": theirs[used].numpy()}
    compare("permute_with_mask_map", x, row_map, probs, None, None, T, E, rows, H, None)
    compare("permute_with_mask_map", x, row_map, None, None, None, T, E, rows, H, None)
    compare("unpermute_with_mask_map", y, row_map, None, torch.rand(rows), None, T, E, H)
    compare("unpermute_with_mask_map", y, row_map, probs, None, None, T, E, H)
    compare("unpermute_with_mask_map_bwd_with_merging_probs", x, row_map, y, probs, None, T, E, rows, H)
    chunks = compare("make_chunk_sort_map", torch.tensor([2, 0, 3, 2]), torch.tensor([2, 3, 0, 1]), T, 4)
    for forward in (True, False):
        compare("sort_chunks_by_map", x, chunks, torch.rand(T), T, H, is_forward=forward)
    hand_back(**results)


if __name__ == "__main__":
    main()
