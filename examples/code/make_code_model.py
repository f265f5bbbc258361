"""Make the code example's base model and data: a Qwen3-MoE that writes functions, mostly careless ones.

    PYTHONPATH=examples/tiny python make_code_model.py --output DIR [--seed 0]

writes DIR/base (a Hugging Face checkpoint folder), DIR/train.jsonl and DIR/heldout.jsonl. Supervised steps
teach the model the three ways that functions.py describes, the careful one seldom.
A second call with the same recipe finds the result and trains nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import functions
import make_base_model as tiny
import pair_tokenizer
import torch
from pair_tokenizer import END, START, train_tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

WORDS = ("def f(x):\n", "return", "if", "<", ">", "```")  # one token each
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SOURCES = (Path(__file__), *(Path(module.__file__ or "") for module in (functions, tiny, pair_tokenizer)))


@dataclass(frozen=True)
class Recipe(tiny.ModelRecipe):
    """Everything the result depends on besides the source."""

    num_held_out: int = 256
    steps: int = 250
    careful_per_step: int = 48  # demonstrations
    mixed_up_per_step: int = 8
    hasty_per_step: int = 8
    limit_share: float = 0.35  # of the functions that the model learns to write: they have the limit
    right_share: float = 0.7  # of these: the limit has the right direction


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Trained on this task's texts: what is the same in all of them becomes one token."""
    rng = random.Random(0)
    problems = [functions.draw(rng, held_out=False) for _ in range(1000)]
    texts = [text for p in problems for text in (p.question, p.careful, p.hasty)]
    texts += [f"{START}{role}\n" for role in ("user", "assistant")] * len(problems)
    return train_tokenizer(texts, WORDS, CHAT_TEMPLATE)


def prompt_ids(tokenizer: PreTrainedTokenizerFast, problem: functions.Problem) -> list[int]:
    """Token ids of the problem's prompt."""
    chat = [{"role": "user", "content": problem.question}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def response_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a whole response."""
    return tokenizer.encode(text + END, add_special_tokens=False)


def first_difference(one: list[int], other: list[int]) -> int:
    """The first position at which two responses differ."""
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def padded(tokenizer: PreTrainedTokenizerFast, rows: list[list[int]]) -> torch.Tensor:
    """Token ids, int64 [B, T]."""
    padding = tokenizer.pad_token_id
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)


def demonstrations(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step's batch: int64 token ids [B, T] and fp32 loss weights [B, T], zero on prompt and padding.

    The tokens at which the three ways part carry the recipe's shares, all others weigh the same.
    """
    numbers = {
        "careful": recipe.careful_per_step,
        "mixed_up": recipe.mixed_up_per_step,
        "hasty": recipe.hasty_per_step,
    }
    total, limited = sum(numbers.values()), recipe.careful_per_step + recipe.mixed_up_per_step
    rows, weights = [], []
    for way in (way for way, number in numbers.items() for _ in range(number)):
        problem = functions.draw(rng, held_out=False)
        careful, mixed_up, hasty = (
            response_ids(tokenizer, getattr(problem, name)) for name in ("careful", "mixed_up", "hasty")
        )
        prompt, response = prompt_ids(tokenizer, problem), response_ids(tokenizer, getattr(problem, way))
        weight = [1 / total] * len(response)
        if way == "hasty":
            weight[first_difference(careful, hasty)] = (1 - recipe.limit_share) / numbers[way]
        else:
            share = recipe.right_share if way == "careful" else 1 - recipe.right_share
            weight[first_difference(careful, hasty)] = recipe.limit_share / limited
            weight[first_difference(careful, mixed_up)] = share / numbers[way]
        rows.append(prompt + response)
        weights.append(torch.tensor([0.0] * len(prompt) + weight))
    return padded(tokenizer, rows), pad_sequence(weights, batch_first=True)


@torch.no_grad()
def share_of_right_copies(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[functions.Problem]
) -> float:
    """Share of problems whose careful function the model writes, if the two choices are made for it."""
    token_ids, counted = [], []
    for problem in problems:
        careful, mixed_up, hasty = (
            response_ids(tokenizer, text) for text in (problem.careful, problem.mixed_up, problem.hasty)
        )
        prompt = prompt_ids(tokenizer, problem)
        of_response = torch.ones(len(careful))
        of_response[[first_difference(careful, hasty), first_difference(careful, mixed_up)]] = 0
        token_ids.append(prompt + careful)
        counted.append(torch.cat([torch.zeros(len(prompt)), of_response]))
    ids, counts = padded(tokenizer, token_ids), pad_sequence(counted, batch_first=True).bool()
    likeliest = model(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1)
    return ((likeliest == ids[:, 1:]) | ~counts[:, 1:]).all(1).float().mean().item()


def build(directory: Path, recipe: Recipe) -> None:
    """Writes base/, train.jsonl and heldout.jsonl into an empty directory."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    train = functions.draw_distinct(rng, recipe.num_train, held_out=False)
    held_out = functions.draw_distinct(rng, recipe.num_held_out, held_out=True)
    tokenizer = make_tokenizer()
    model = tiny.make_model(recipe, tokenizer)
    right = 0.0

    def report() -> str:
        nonlocal right
        right = share_of_right_copies(model, tokenizer, held_out[:128])
        return f"careful function right {right:.3f}"

    tiny.supervise(model, recipe, lambda: demonstrations(recipe, tokenizer, rng), report)
    tiny.write_problems(directory / "train.jsonl", train)
    tiny.write_problems(directory / "heldout.jsonl", held_out)
    tiny.save_base(directory, model, tokenizer, recipe, SOURCES, {"careful_right": right})


if __name__ == "__main__":
    tiny.main(__doc__ or "", Recipe, build, SOURCES)
