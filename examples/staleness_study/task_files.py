"""The study's model and task as the files that `megatron-vespo train` and SGLang read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import running_sum
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from megatron_vespo.types import Prompt


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a digit; ids that no prompt uses have names that cannot pass for an answer."""
    names = [*map(str, range(10)), "=", "<eos>"]
    names += [f"<{i}>" for i in range(len(names), running_sum.VOCAB_SIZE)]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[-1]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def write_model(base: Path, folder: Path) -> None:
    """The base model with what SGLang and `megatron-vespo train` want beside the weights."""
    shutil.copytree(base, folder)
    tokenizer().save_pretrained(folder)
    GenerationConfig(do_sample=True, eos_token_id=running_sum.EOS).save_pretrained(folder)


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    lines = [json.dumps({"question": prompt.text, "answer": prompt.answer}) for prompt in prompts]
    path.write_text("\n".join(lines) + "\n")
