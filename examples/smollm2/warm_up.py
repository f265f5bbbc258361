"""Teach the model the form of an answer, and nothing about which answer is right.

    python warm_up.py --model DIR --data FILE --output DIR [--seed 0]

The supervised steps show calculations like `70 / 27` for training problems: two numbers of the problem, the
larger one first, with each of + - * / as often. The answers are not read: reinforcement learning finds out
which calculation is wanted. The chat template loses its default system prompt, 22 tokens of every prompt.
A second call with the same inputs only says that the output is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import word_problems
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS = 15
RAMP_STEPS = 3  # of the learning rate, which then falls to zero: the operators end up equally likely
PROBLEMS_PER_STEP = 8
LEARNING_RATE = 1e-4
GRADIENT_CLIP = 1.0
STAMP = "warm_up.json"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def calculation_of(problem: str, operator: str, rng: random.Random) -> str | None:
    """Two of the problem's numbers, drawn at random; None if it has fewer."""
    numbers = word_problems.NUMBER.findall(problem)
    if len(numbers) < 2:
        return None
    first, second = sorted(rng.sample(numbers, 2), key=float, reverse=True)
    return f"{first} {operator} {second}"


def demonstrations(path: Path, tokenizer: Any, rng: random.Random) -> Iterator[tuple[list[int], list[int]]]:
    """Endless token ids of prompt and response, over the problems of `path` in a random order."""
    problems = [json.loads(line)["question"] for line in path.read_text(encoding="utf-8").splitlines()]
    operators = itertools.cycle("+-*/")  # so every batch has each as often
    while True:
        for problem in rng.sample(problems, len(problems)):
            if calculation := calculation_of(problem, next(operators), rng):
                chat = [{"role": "user", "content": problem}]
                prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
                response = tokenizer.encode(calculation + tokenizer.eos_token, add_special_tokens=False)
                yield prompt, response


def loss_of(model: Any, batch: list[tuple[list[int], list[int]]]) -> Tensor:
    """Mean cross entropy per token of the responses."""
    token_ids = pad_sequence([torch.tensor(prompt + response) for prompt, response in batch], True)
    trained = torch.zeros_like(token_ids, dtype=torch.bool)
    for row, (prompt, response) in enumerate(batch):
        trained[row, len(prompt) : len(prompt) + len(response)] = True
    hidden = model.model(input_ids=token_ids, use_cache=False).last_hidden_state[:, :-1]
    # 49,152 logits per token are needed for the responses only
    return cross_entropy(model.lm_head(hidden[trained[:, 1:]]), token_ids[:, 1:][trained[:, 1:]])


def warm_up(model: Any, batches: Iterator[tuple[list[int], list[int]]]) -> None:
    """Supervised steps in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    start = time.monotonic()
    for step in range(1, STEPS + 1):
        decay = (STEPS - step + 1) / (STEPS - RAMP_STEPS + 1)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(step / RAMP_STEPS, decay)
        loss = loss_of(model, [next(batches) for _ in range(PROBLEMS_PER_STEP)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimizer.step()
        seconds = time.monotonic() - start
        print(f"warm-up: step {step}/{STEPS}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)


def make(model_folder: Path, data: Path, output: Path, seed: int) -> None:
    """Write `output` beside its place, then give it its name."""
    sources = (Path(__file__), data, model_folder / "config.json")
    stamp = {"seed": seed} | {str(path): sha256(path.read_bytes()).hexdigest() for path in sources}
    if (output / STAMP).is_file() and json.loads((output / STAMP).read_text()) == stamp:
        print(f"{output} is there already", flush=True)
        return
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    warm_up(model, demonstrations(data, tokenizer, random.Random(seed)))
    partial = output.parent / f".partial-{output.name}"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / STAMP).write_text(json.dumps(stamp) + "\n")
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    print(f"wrote {output}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder to start from")
    parser.add_argument("--data", type=Path, required=True, help="train.jsonl of word_problems.py")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    make(arguments.model, arguments.data, arguments.output, arguments.seed)


if __name__ == "__main__":
    main()
