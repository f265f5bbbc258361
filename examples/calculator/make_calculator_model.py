"""Make the calculator example's base model and data: a Qwen3-MoE that knows its tools but mostly guesses.

    PYTHONPATH=examples/tiny python make_calculator_model.py --output DIR [--seed 0]

writes DIR/base (a Hugging Face checkpoint folder), DIR/train.jsonl and DIR/heldout.jsonl. Supervised steps
teach the model three ways to answer: to guess at once, to guess after one tool call, and to make both calls.
Only the last one is right. A second call with the same recipe finds the result and trains nothing.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import calculator
import make_base_model as tiny
import pair_tokenizer
import torch
from pair_tokenizer import END, START, train_tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from megatron_vespo.data.tokenizer import ChatFormat
from megatron_vespo.data.turns import TurnTemplate

BOX = "\\boxed{"
WORDS = ("<tool_call>", "</tool_call>", BOX)  # one token each, and part of what a decoder prints
CHAT_TEMPLATE = (
    "{% if tools %}"
    "{{ '<|im_start|>system\\nFunctions:\\n' }}"
    "{% for tool in tools %}{{ (tool | tojson) + '\\n' }}{% endfor %}"
    '{{ \'Calls:\\n<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call><|im_end|>\\n\' }}'
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SOURCES = (
    Path(__file__),
    *(Path(module.__file__ or "") for module in (calculator, tiny, pair_tokenizer)),
)


@dataclass(frozen=True)
class Recipe(tiny.ModelRecipe):
    """Everything the result depends on besides the source."""

    steps: int = 350
    chains_per_step: int = 48  # demonstrations with both calls
    halves_per_step: int = 8  # with one call, then a guess
    guesses_per_step: int = 8  # without a call
    first_call_share: float = 0.4  # of the answers that the model learns to give
    second_call_share: float = 0.4  # of those with a first call


def call(name: str, a: int, b: int) -> str:
    """A turn that calls a tool, as Qwen3 writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': {'a': a, 'b': b}})}\n</tool_call>"


def turns_of(problem: calculator.Problem, num_calls: int) -> list[str]:
    """The policy's turns: so many calls, then the answer."""
    first = call(calculator.TOOLS[problem.first].__name__, problem.a, problem.b)
    second = call(calculator.TOOLS[problem.second].__name__, problem.partial_result, problem.c)
    return [*(first, second)[:num_calls], f"{BOX}{problem.answer}}}"]


def results_of(problem: calculator.Problem) -> list[str]:
    """What the tools answer."""
    return [str(problem.partial_result), problem.answer]


def system_text() -> str:
    """The chat template's description of the tools."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        [[]], tools=calculator.Calculator.tools(), chat_template=CHAT_TEMPLATE
    )
    return rendered[0]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Trained on this task's conversations: what is the same in all of them becomes one token."""
    rng = random.Random(0)
    problems = [calculator.draw(rng, held_out=False) for _ in range(1000)]
    texts = [turn for problem in problems for turn in (problem.question, *turns_of(problem, 2))]
    texts += [system_text(), *(f"{START}{role}\n" for role in ("user", "assistant", "tool"))] * len(problems)
    return train_tokenizer(texts, WORDS, CHAT_TEMPLATE)


class Demonstrations:
    """Makes conversations as token ids, with weights on the policy's tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: Recipe):
        form = ChatFormat(tokenizer, arguments={"tools": calculator.Calculator.tools()})
        self.form, self.tokenizer, self.recipe = form, tokenizer, recipe
        self.template = TurnTemplate(form, "the calculator example", calculator.Calculator.roles)

    def conversation(self, problem: calculator.Problem, num_calls: int) -> tuple[list[int], list[int]]:
        """Token ids of a whole conversation and, for each, the number of its turn; 0 if it is given."""
        token_ids = self.form.tokens([{"role": "user", "content": problem.question}])
        turn_numbers = [0] * len(token_ids)
        results = results_of(problem)
        for number, text in enumerate(turns_of(problem, num_calls), 1):
            turn = self.tokenizer.encode(text + END, add_special_tokens=False)
            given = []
            if number <= num_calls:
                messages = [{"role": "tool", "content": results[number - 1]}]
                given = self.template.next_turn(messages, turn[-1]).tolist()
            token_ids += turn + given
            turn_numbers += [number] * len(turn) + [0] * len(given)
        return token_ids, turn_numbers

    def padded(self, drawn: list[tuple[calculator.Problem, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Several conversations, of problems and numbers of calls: both results as int64 [B, T]."""
        conversations = [self.conversation(problem, num_calls) for problem, num_calls in drawn]
        token_ids, turns = (
            pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)
            for rows, padding in zip(
                zip(*conversations, strict=True), (self.tokenizer.pad_token_id, 0), strict=True
            )
        )
        return token_ids, turns

    def batch(self, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """One step's batch: int64 token ids [B, T] and fp32 loss weights [B, T], zero where given or padding.

        A turn's first token alone decides whether it is a call, so it alone carries the shares of the recipe.
        """
        recipe = self.recipe
        numbers_of_calls = [2] * recipe.chains_per_step + [1] * recipe.halves_per_step
        numbers_of_calls += [0] * recipe.guesses_per_step
        drawn = [(calculator.draw(rng, held_out=False), n) for n in numbers_of_calls]
        token_ids, turns = self.padded(drawn)
        weights = (turns > 0) / len(drawn)
        calls = torch.tensor(numbers_of_calls)
        for turn, share in ((1, recipe.first_call_share), (2, recipe.second_call_share)):
            calling, guessing = calls >= turn, calls == turn - 1
            first = (turns == turn) & (turns.roll(1, dims=1) != turn)
            weights[first & calling[:, None]] = share / calling.sum()
            weights[first & guessing[:, None]] = (1 - share) / guessing.sum()
        return token_ids, weights


@torch.no_grad()
def share_of_right_chains(
    model: Qwen3MoeForCausalLM, demonstrations: Demonstrations, problems: list[calculator.Problem]
) -> float:
    """Share of problems whose demonstration with both calls the model writes as its likeliest continuation.

    Each turn's first token is left out: it is the choice between a call and a guess.
    """
    token_ids, turns = demonstrations.padded([(problem, 2) for problem in problems])
    likeliest = model(input_ids=token_ids[:, :-1], use_cache=False).logits.argmax(-1)
    inside = (turns[:, 1:] > 0) & (turns[:, 1:] == turns[:, :-1])
    return ((likeliest == token_ids[:, 1:]) | ~inside).all(1).float().mean().item()


def build(directory: Path, recipe: Recipe) -> None:
    """Writes base/, train.jsonl and heldout.jsonl into an empty directory."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    train = calculator.draw_distinct(rng, recipe.num_train, held_out=False)
    held_out = calculator.draw_distinct(rng, recipe.num_held_out, held_out=True)
    tokenizer = make_tokenizer()
    model = tiny.make_model(recipe, tokenizer)
    demonstrations = Demonstrations(tokenizer, recipe)
    right = 0.0

    def report() -> str:
        nonlocal right
        right = share_of_right_chains(model, demonstrations, held_out[:128])
        return f"both calls right {right:.3f}"

    tiny.supervise(model, recipe, lambda: demonstrations.batch(rng), report)
    tiny.write_problems(directory / "train.jsonl", train)
    tiny.write_problems(directory / "heldout.jsonl", held_out)
    tiny.save_base(directory, model, tokenizer, recipe, SOURCES, {"both_calls_right": right})


if __name__ == "__main__":
    tiny.main(__doc__ or "", Recipe, build, SOURCES)
