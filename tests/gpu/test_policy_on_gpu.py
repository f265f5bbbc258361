"""The policy on one GPU over NCCL; with Megatron's local layer spec where Transformer Engine is missing."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_vespo.data.context_parallel import TokenLayout, gathered_order
from tests.distributed.launch import PROGRAMS, TIMEOUT_S, launch
from tests.distributed.random_task import random_samples

# a model, a start of CUDA and the compilation of the kernels
GPU_TIMEOUT_S = 3 * TIMEOUT_S


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A random model, samples, and transformers' log-probs of them, in fp32 on the CPU."""
    folder = tmp_path_factory.mktemp("gpu_task")
    samples = random_samples()
    file = folder / "samples.pkl"
    file.write_bytes(pickle.dumps(samples))
    arguments = ["--model", str(folder / "model"), "--samples", str(file), "--make-model"]
    program = PROGRAMS / "transformers_log_probs.py"
    [result] = launch(program, 1, arguments, TIMEOUT_S, folder / "transformers", preloaded=False)
    return SimpleNamespace(model=folder / "model", samples=file, log_probs=result["log_probs"])


def train(task, folder, *flags: str) -> dict[str, np.ndarray]:
    arguments = ["--hf-checkpoint", str(task.model), "--samples", str(task.samples), "--lr", "3e-5"]
    return launch(PROGRAMS / "train.py", 1, [*arguments, *flags], GPU_TIMEOUT_S, folder)[0]


def test_fp32(task, tmp_path):
    result = train(task, tmp_path)
    difference = np.abs(result["log_probs"] - task.log_probs).max()
    print(f"\nfp32 log-probs: {difference:.1e} from transformers on the CPU")
    assert difference < 1e-4
    assert np.isfinite(result["loss"]).all() and (result["grad_norm"] > 0).all()


def test_bf16_and_recomputation(task, tmp_path):
    flags = ["--bf16", "--transformer-impl", "local", "--no-gradient-accumulation-fusion"]
    flags += ["--no-rope-fusion", "--no-persist-layer-norm"]
    result = train(task, tmp_path / "plain", *flags)
    difference = np.abs(result["log_probs"] - task.log_probs).max()
    print(f"\nbf16 log-probs: {difference:.1e} from transformers in fp32 on the CPU")
    assert difference < 0.3
    recompute = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers"]
    again = train(task, tmp_path / "recompute", *flags, *recompute, "1")
    np.testing.assert_allclose(again["loss"], result["loss"], rtol=1e-2)
    np.testing.assert_allclose(again["grad_norm"], result["grad_norm"], rtol=2e-2)


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_the_attention_kernel_against_the_padded_batch(cp_size):
    from megatron_vespo.trainer.attention import PackedAttention, PackedSequences

    torch.manual_seed(0)
    lengths = [4096, 1024, 64, 8]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    total, heads, groups, head_dim = int(bounds[-1]), 8, 2, 128
    query, key, value = (
        torch.randn(total, n, head_dim, device="cuda", requires_grad=True) for n in (heads, groups, groups)
    )
    upstream = torch.randn(total, heads, head_dim, device="cuda")
    results = {}
    for use_kernel, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        parts = []
        for rank in range(cp_size):
            layout = TokenLayout(cp_size, rank)
            cu_seqlens = torch.from_numpy(bounds.astype(np.int32)).cuda()
            pack = PackedSequences.of(cu_seqlens, max(lengths), layout, use_kernel=use_kernel)
            cp = SimpleNamespace(size=lambda: cp_size, rank=lambda rank=rank: rank)
            attention = PackedAttention(
                SimpleNamespace(kv_channels=head_dim), pg_collection=SimpleNamespace(cp=cp)
            )
            held = torch.from_numpy(layout.local_indices(bounds)).cuda()
            attend = attention._kernel if use_kernel else attention._padded
            parts.append(attend(query[held].to(dtype), key.to(dtype), value.to(dtype), pack))
        order = torch.from_numpy(gathered_order(bounds, cp_size)).cuda()
        whole = torch.cat(parts)[order].float()
        results[use_kernel] = (whole, *torch.autograd.grad(whole, (query, key, value), upstream))
    for ours, reference in zip(results[True], results[False], strict=True):
        assert (ours - reference).norm() <= 2e-2 * reference.norm()
