"""A tiny random model with a published tokenizer, which ends its turns and writes control tokens."""

from __future__ import annotations

from pathlib import Path

from tests.support.real_tokenizers import Model
from tests.support.servers import make_tiny_model

VOCABULARY = 151_936  # of the largest; one engine can have the weights of any
# Logits, in nats: the exponentials of all ordinary tokens' add up to e^13.
STOP, OTHER_STOP, CONTROL, NO_TOKEN = 11.0, 9.0, 7.0, -60.0
# Every embedding has it in dimension 0, to which no layer adds. The last norm makes a nearly constant of it.
_SHARED, _NORMALISED = 2.0, 0.46


def make_talkative_model(folder: Path, seed: int, model: Model) -> Path:
    """Its turns have about eight tokens, one in twenty of them a control token, and none is unknown."""
    import torch
    from safetensors.torch import load_file, save_file

    make_tiny_model(folder, seed, vocab_size=VOCABULARY)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0
    weights["model.embed_tokens.weight"][:, 0] = _SHARED
    added = torch.zeros(VOCABULARY)
    added[len(model.tokenizer) :] = NO_TOKEN
    controls = [token_id for token_id in model.tokenizer.added_tokens_decoder if token_id < VOCABULARY]
    main, *others = stops(model)
    for token_ids, logit in ((controls[:30], CONTROL), (others, OTHER_STOP), ([main], STOP)):
        weights["lm_head.weight"][token_ids] = 0
        added[token_ids] = logit
    weights["lm_head.weight"][:, 0] += added / _NORMALISED
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def stops(model: Model) -> list[int]:
    """Return the stop tokens, first the one that the chat template writes after an answer."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    text = model.tokenizer.apply_chat_template(messages, tokenize=False)
    written = model.tokenizer.encode(text, add_special_tokens=False)
    return sorted(model.stop_token_ids, key=lambda stop: stop not in written)
