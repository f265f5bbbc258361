"""Make the tiny example's base model and data: a Qwen3-MoE that knows its task but answers too hastily.

    python make_base_model.py --output DIR [--seed 0]

writes DIR/base (a Hugging Face checkpoint folder), DIR/train.jsonl and DIR/heldout.jsonl. Supervised steps
teach the model to show its work well but seldom, which makes about three sampled answers of ten right.
A second call with the same recipe finds the result and trains nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import string
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import task
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils.logging import disable_progress_bar

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
BOX = "\\boxed{"
VOCAB_SIZE = 128
MAX_LENGTH = 2048  # tokens, room for a word problem spelled out character by character
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
RECIPE_FILE = "recipe.json"  # inside base/: one rename publishes the model and the proof that it is complete
SOURCES = (Path(__file__), Path(task.__file__))


@dataclass(frozen=True)
class ModelRecipe:
    """What the base models of several examples depend on."""

    seed: int = 0
    num_train: int = 4096
    num_held_out: int = 512
    num_layers: int = 4
    hidden_size: int = 64
    num_experts: int = 8
    moe_intermediate_size: int = 64
    steps: int = 250
    warmup_steps: int = 20
    learning_rate: float = 3e-3  # peak; linear decay to zero lets the shares of answers settle
    gradient_clip: float = 1.0


@dataclass(frozen=True)
class Recipe(ModelRecipe):
    """Everything the result depends on besides the source."""

    worked_per_step: int = 64  # demonstrations
    direct_per_step: int = 16
    direct_share: float = 0.83  # of the answers that the model learns to give
    max_new_tokens: int = 32
    max_accuracy: float = 0.35  # a better start leaves reinforcement learning little to show


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character or newline, one for `\\boxed{`, <unk> for everything else."""
    tokens = [PAD, EOS, UNK, *ROLES, BOX, "\n", *(c for c in string.printable if c.isprintable())]
    tokens += [f"<extra_{i}>" for i in range(VOCAB_SIZE - len(tokens))]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([PAD, EOS, UNK, *ROLES])
    backend.add_tokens([AddedToken(BOX, normalized=False)])  # not special: decoding must keep it
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )


def make_model(recipe: ModelRecipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Randomly initialised, fp32, on the CPU."""
    special_ids = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=4 * recipe.hidden_size,  # of dense layers, of which there are none
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=recipe.num_experts,
        num_experts_per_tok=2,
        moe_intermediate_size=recipe.moe_intermediate_size,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        initializer_range=0.05,
        **special_ids,
    )
    model = Qwen3MoeForCausalLM(config).float()
    model.set_experts_implementation("grouped_mm")  # the fastest one at this size on two cores
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, **special_ids)
    return model


def encode_prompts(tokenizer: PreTrainedTokenizerFast, problems: Iterable[task.Problem]) -> torch.Tensor:
    """[problems, P] int64: this task's prompts are all of one length."""
    chats = [[{"role": "user", "content": problem.question}] for problem in problems]
    encoded = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    return encoded["input_ids"]


def demonstrations(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step's batch: int64 token ids [B, T] and fp32 loss weights [B, T], zero on prompt and padding.

    The first response token alone decides between the styles, so it alone carries their shares. The other
    tokens weigh the same: most demonstrations can then be worked ones, from which there is more to learn.
    """
    styles = ["worked"] * recipe.worked_per_step + ["direct"] * recipe.direct_per_step
    problems = [task.draw(rng, held_out=False) for _ in styles]
    prompts = encode_prompts(tokenizer, problems)
    responses = [
        torch.tensor(tokenizer.encode(getattr(problem, style) + EOS, add_special_tokens=False))
        for problem, style in zip(problems, styles, strict=True)
    ]
    padded = pad_sequence(responses, batch_first=True, padding_value=tokenizer.pad_token_id)
    weights = (padded != tokenizer.pad_token_id) / len(styles)
    weights[: recipe.worked_per_step, 0] = (1 - recipe.direct_share) / recipe.worked_per_step
    weights[recipe.worked_per_step :, 0] = recipe.direct_share / recipe.direct_per_step
    return torch.cat([prompts, padded], 1), torch.cat([torch.zeros(prompts.shape), weights], 1)


@torch.no_grad()
def sampled_accuracy(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[task.Problem],
    max_new_tokens: int,
) -> tuple[float, float]:
    """(share of right answers, share of answers that show work), one sample a problem at temperature 1."""
    prompts = encode_prompts(tokenizer, problems)
    output = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), top_k=0, max_new_tokens=max_new_tokens
    )
    completions = output[:, prompts.shape[1] :]
    ended = (completions == tokenizer.eos_token_id).any(1).tolist()
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    right = [
        end and task.is_correct(text, problem.answer)
        for end, text, problem in zip(ended, texts, problems, strict=True)
    ]
    return sum(right) / len(right), sum(";" in text for text in texts) / len(texts)


def supervise(
    model: Qwen3MoeForCausalLM,
    recipe: ModelRecipe,
    draw_batch: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    report: Callable[[], str],
) -> None:
    """Supervised steps in place, on batches as `demonstrations` returns them; prints a report every 50."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, foreach=True
    )
    start = time.monotonic()
    for step in range(1, recipe.steps + 1):
        decay = (recipe.steps - step + 1) / (recipe.steps - recipe.warmup_steps + 1)
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * min(step / recipe.warmup_steps, decay)
        token_ids, weights = draw_batch()
        logits = model(input_ids=token_ids[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.transpose(1, 2), token_ids[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        optimizer.step()
        if step % 50 == 0 or step == recipe.steps:
            print(
                f"warm start: step {step}/{recipe.steps}  loss {loss.item():.3f}  {report()}"
                f"  {time.monotonic() - start:.0f} s",
                flush=True,
            )


def warm_start(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    rng: random.Random,
    held_out: list[task.Problem],
) -> float:
    """Supervised steps in place; returns the sampled held-out accuracy at the end."""
    accuracy = 0.0

    def report() -> str:
        nonlocal accuracy
        accuracy, showing_work = sampled_accuracy(model, tokenizer, held_out, recipe.max_new_tokens)
        return f"sampled accuracy {accuracy:.3f}  showing work {showing_work:.3f}"

    supervise(model, recipe, lambda: demonstrations(recipe, tokenizer, rng), report)
    return accuracy


def fingerprint(recipe: ModelRecipe, sources: Sequence[Path] = SOURCES) -> str:
    """Changes with the recipe and with the sources of the example."""
    digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()


def is_complete(output: Path, recipe: ModelRecipe, sources: Sequence[Path] = SOURCES) -> bool:
    """Whether `output` holds exactly what this recipe makes."""
    stamp = output / "base" / RECIPE_FILE
    if not all(path.is_file() for path in (stamp, output / "train.jsonl", output / "heldout.jsonl")):
        return False
    return json.loads(stamp.read_text())["fingerprint"] == fingerprint(recipe, sources)


def write_problems(path: Path, problems: Iterable[task.Problem]) -> None:
    with path.open("w") as file:
        for problem in problems:
            file.write(json.dumps({"question": problem.question, "answer": problem.answer}) + "\n")


def build(directory: Path, recipe: Recipe) -> None:
    """Writes base/, train.jsonl and heldout.jsonl into an empty directory."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    train = task.draw_distinct(rng, recipe.num_train, held_out=False)
    held_out = task.draw_distinct(rng, recipe.num_held_out, held_out=True)
    tokenizer = make_tokenizer()
    model = make_model(recipe, tokenizer)
    accuracy = warm_start(model, tokenizer, recipe, rng, held_out)
    if accuracy > recipe.max_accuracy:
        raise ValueError(
            f"the warm start ended at a sampled accuracy of {accuracy:.3f}, above {recipe.max_accuracy}:"
            " try another --seed"
        )
    write_problems(directory / "train.jsonl", train)
    write_problems(directory / "heldout.jsonl", held_out)
    save_base(directory, model, tokenizer, recipe, SOURCES, {"sampled_accuracy": accuracy})


def save_base(
    directory: Path,
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: ModelRecipe,
    sources: Sequence[Path],
    figures: dict[str, float],
) -> None:
    """Writes base/ with what proves that it is complete."""
    base = directory / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    stamp = {"fingerprint": fingerprint(recipe, sources), **figures, "recipe": asdict(recipe)}
    (base / RECIPE_FILE).write_text(json.dumps(stamp, indent=2) + "\n")


def make(
    output: Path,
    recipe: ModelRecipe,
    build: Callable[[Path, Any], None] = build,
    sources: Sequence[Path] = SOURCES,
) -> None:
    """Builds in a temporary folder beside the result and publishes base/, which marks completion, last."""
    if is_complete(output, recipe, sources):
        print(f"{output}/base is up to date", flush=True)
        return
    base = output / "base"
    if base.exists() and not (base / RECIPE_FILE).is_file():
        raise ValueError(f"{base} exists and was not made here: choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".partial-") as partial_name:
        partial = Path(partial_name)
        build(partial, recipe)
        if base.exists():
            shutil.rmtree(base)
        for name in ("train.jsonl", "heldout.jsonl", "base"):
            (partial / name).rename(output / name)
    print(f"wrote {base}, {output}/train.jsonl and {output}/heldout.jsonl", flush=True)


def main(
    description: str = __doc__ or "",
    recipe: type[ModelRecipe] = Recipe,
    build: Callable[[Path, Any], None] = build,
    sources: Sequence[Path] = SOURCES,
) -> None:
    """The command, also that of examples with another recipe and task."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for base/, train.jsonl and heldout.jsonl"
    )
    parser.add_argument(
        "--seed", type=int, default=recipe.seed, help="of the weights, the data and the steps"
    )
    arguments = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(min(2, os.cpu_count() or 1))  # more threads only wait for each other at this size
    make(arguments.output, recipe(seed=arguments.seed), build, sources)


if __name__ == "__main__":
    main()
