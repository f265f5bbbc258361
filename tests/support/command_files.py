"""The files that commands read, and ways to damage one.

A way to damage says what the file then is, and its new content: bytes, a function of the old ones, None for a
folder.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.support.tiny_checkpoints import MOE, random_tensors, tiny_config, write_hf

CONFIG = tiny_config(MOE, vocab_size=40, max_position_embeddings=256, num_experts=4, num_experts_per_tok=2)


def write_files(folder: Path, recipe: str) -> None:
    """What the commands of RIGHT read, but for the folder `megatron`, which is converted from `model`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = write_hf(folder / "model", CONFIG, random_tensors(CONFIG, torch.float32))
    words = ["<unk>", "<eos>", "<pad>", "user", *"0123456789+-*/=?.", "what", "is", "the", "sum"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    )
    fast.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    fast.save_pretrained(model)
    (model / "generation_config.json").write_text('{"eos_token_id": [1]}')
    rows = [{"question": f"what is {n} + {n} ?", "answer": str(2 * n)} for n in range(16)]
    for name in ("train", "held"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    graded = [{"question": f"what sum is {n} * {n} ?", "answer": f"so #### {n * n}"} for n in range(8)]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in graded))
    samples = [{"token_ids": [5, 9, 2, 11, 1], "prompt_length": 3, "advantage": n - 1.5} for n in range(4)]
    (folder / "batch.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (folder / "recipe.flags").write_text(recipe.replace(" --", "\n--") + "\n")
    (folder / "other.bin").write_bytes(bytes(range(256)) * 4)
    save_file({"x": torch.zeros(2)}, folder / "other.safetensors")


def copy_files(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True, copy_function=os.link)


def always(what: str, content: bytes | None):
    return lambda draw, name: (what, content)


empty = always("is empty", b"")
binary = always("is binary", bytes(range(256)) * 4)
folder = always("is a folder", None)
nulls = always("is all zeros", b"\0" * 512)
deep = always("is nested", b'{"a":' * 100_000 + b"\n")
digits = always("has a long number", b'{"question": "x", "answer": ' + b"7" * 5000 + b"}\n")
surrogate = always(
    "has half a surrogate pair", b'{"question": "\\ud800", "answer": "1", "token_ids": "\\ud800"}\n'
)


def cut(draw: random.Random, name: str):
    share = draw.choice((0.3, 0.5, 0.9))
    return f"is cut at {share}", lambda before: before[: int(len(before) * share)].rstrip()[:-1] + b"'\""


def wrong_json(draw: random.Random, name: str):
    text = draw.choice((b"[1, 2]", b"3", b'"words"', b"null", b"{'a': 1}", b"\xff\xfe{}"))
    return f"is {text!r}", text + b"\n"


def cell(draw: random.Random, name: str):
    cell = draw.choice((b"null", b"[]", b"{}", b"[3]", b'[{"role": 1}]', b"true", b"1e999", b'""'))
    return (
        f"has {cell!r}",
        b'{"question": ' + cell + b', "answer": ' + cell + b', "token_ids": ' + cell + b"}\n",
    )


def wrong_field(draw: random.Random, name: str):
    key = draw.choice(("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                       "head_dim", "vocab_size", "rms_norm_eps", "num_experts", "max_position_embeddings",
                       "architectures", "num_experts_per_tok", "moe_intermediate_size"))  # fmt: skip
    value = draw.choice(
        ("x", [], {}, -1, float("inf"), float("nan"), [[1]], 1.5 if key != "rms_norm_eps" else "1")
    )
    return f"has {key} {value}", json.dumps(CONFIG | {key: value}).encode()


def wrong_stop(draw: random.Random, name: str):
    value = draw.choice(("x", ["x"], [[1]], {"a": 1}, -5, 1.5, True, 10**30))
    return f"has eos_token_id {value}", json.dumps({"eos_token_id": value}).encode()


ANY = [empty, cut, binary, folder, nulls]
JSON = [deep, wrong_json]
JSON_LINES = [digits, surrogate, cell, cell]
