"""A small tokenizer for tests."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def letters(template: str | None) -> PreTrainedTokenizerFast:
    """One token a character, its id the code point."""
    vocabulary = {chr(code): code for code in range(32, 127)} | {"<unk>": 0}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="!")
    fast.chat_template = template
    return fast
