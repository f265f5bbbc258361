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


def completion_log_probs(model, completion: Completion, temperature: float = 1.0) -> np.ndarray:
    """float32 [N]: of the tokens that the policy sampled."""
    token_ids = torch.from_numpy(completion.token_ids).long()
    if completion.segments is not None:
        token_ids = token_ids[torch.from_numpy(completion.segments.mask())]
    logits = completion_logits(model, completion, temperature)
    return logits.log_softmax(-1).gather(1, token_ids[:, None])[:, 0].numpy()


def chosen_experts(model, completion: Completion, topk: int) -> np.ndarray:
    """int64 [P + C - 1, L, K], ascending: the experts of every token that enters a pass."""
    entering = np.concatenate([completion.prompt.token_ids, completion.token_ids])[:-1]
    with torch.no_grad():
        logits = model(torch.from_numpy(entering).long()[None], output_router_logits=True).router_logits
    return torch.stack([layer.topk(topk).indices.sort().values for layer in logits], 1).numpy()
