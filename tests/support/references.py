"""What HF transformers says of the tiny models' responses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megatron_vespo.types import Completion


def transformers_model(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def completion_logits(model, completion: Completion, temperature: float = 1.0) -> torch.Tensor:
    """float32 [N, V]: of the tokens that the policy sampled, after `temperature`."""
    prompt, token_ids = (
        torch.from_numpy(ids).long() for ids in (completion.prompt.token_ids, completion.token_ids)
    )
    with torch.no_grad():
        logits = model(torch.cat([prompt, token_ids])[None]).logits[0].float() / temperature
    logits = logits[len(prompt) - 1 : -1]
    return logits if completion.segments is None else logits[torch.from_numpy(completion.segments.mask())]


def sampled_ids(completion: Completion) -> torch.Tensor:
    """int64 [N]: the tokens that the policy sampled."""
    token_ids = torch.from_numpy(completion.token_ids).long()
    return token_ids if completion.segments is None else token_ids[completion.segments.mask()]


def completion_log_probs(model, completion: Completion, temperature: float = 1.0) -> np.ndarray:
    """float32 [N]: of the tokens that the policy sampled."""
    log_probs = completion_logits(model, completion, temperature).log_softmax(-1)
    return log_probs.gather(1, sampled_ids(completion)[:, None])[:, 0].numpy()


def support_masks(completion: Completion, vocab_size: int) -> np.ndarray:
    """bool [N, V]: which tokens truncated sampling left to choose from."""
    supports = completion.supports
    assert supports is not None
    kept = np.zeros((len(supports), vocab_size), bool)
    kept[np.repeat(np.arange(len(kept)), supports.counts), supports.token_ids] = True
    return kept


def truncated_log_probs(model, completion: Completion, temperature: float = 1.0) -> np.ndarray:
    """float32 [N]: among the supports."""
    logits = completion_logits(model, completion, temperature)
    kept = torch.from_numpy(support_masks(completion, logits.shape[1]))
    inside = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
    return inside.gather(1, sampled_ids(completion)[:, None])[:, 0].numpy()


def chosen_experts(model, completion: Completion, topk: int) -> np.ndarray:
    """int64 [P + C - 1, L, K], ascending: the experts of every token that enters a pass."""
    entering = np.concatenate([completion.prompt.token_ids, completion.token_ids])[:-1]
    with torch.no_grad():
        logits = model(torch.from_numpy(entering).long()[None], output_router_logits=True).router_logits
    return torch.stack([layer.topk(topk).indices.sort().values for layer in logits], 1).numpy()
