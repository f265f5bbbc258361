"""What reaches Transformer Engine's attention, and what it hands to cuDNN, for packs in 16 bits."""

from __future__ import annotations

from unittest import mock

import numpy as np

from tests.distributed.programs.common import hand_back, start_policy


def main() -> None:
    policy, samples = start_policy("--bf16")
    results = {}
    if policy.args.transformer_impl == "transformer_engine":
        results = recorded(policy, samples)
    log_probs = np.concatenate(policy.log_probs(samples))
    mini_batch = policy.pack(samples)
    policy.compute_old_log_probs(mini_batch)
    step = policy.train_step(mini_batch)
    hand_back(log_probs=log_probs, loss=step.loss, grad_norm=step.grad_norm, **results)


def recorded(policy, samples) -> dict[str, np.ndarray]:
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.attention import DotProductAttention

    given, kernels = [], []
    forward, kernel = DotProductAttention.forward, tex.fused_attn_fwd

    def recording_forward(self, query, key, value, attention_mask, **named):
        given.append({"query": query, "mask": attention_mask, **named})
        return forward(self, query, key, value, attention_mask, **named)

    def recording_kernel(*arguments):
        kernels.append(arguments)
        return kernel(*arguments)

    with (
        mock.patch.object(DotProductAttention, "forward", recording_forward),
        mock.patch.object(tex, "fused_attn_fwd", recording_kernel),
    ):
        policy.log_probs(samples[:5])
    attention, cudnn = given[0], kernels[0]
    cu_seqlens, query = attention["cu_seqlens_q"], cudnn[16]
    return {
        "calls": [len(given), len(kernels)],
        "format": attention["qkv_format"],
        "mask_type": attention["attn_mask_type"],
        "no_mask": attention["mask"] is None,
        "cu_seqlens": cu_seqlens.numpy(),
        "cu_seqlens_dtype": str(cu_seqlens.dtype),
        "the_padded_ones_are_the_same_object": attention["cu_seqlens_q_padded"] is cu_seqlens,
        "max_seqlen": attention["max_seqlen_q"],
        "max_seqlen_type": type(attention["max_seqlen_q"]).__name__,
        "num_tokens": len(attention["query"]),
        "cudnn_dtype": str(query.dtype),
        "cudnn_cu_seqlens": cudnn[14].numpy(),
        "cudnn_layout_is_thd": int(cudnn[6]) == int(tex.NVTE_QKV_Layout.NVTE_THD_THD_THD),
        "cudnn_mask_is_padding_causal": int(cudnn[10]) == int(tex.NVTE_Mask_Type.NVTE_PADDING_CAUSAL_MASK),
    }


if __name__ == "__main__":
    main()
