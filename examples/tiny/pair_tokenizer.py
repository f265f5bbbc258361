"""A tokenizer for the other examples that make a model: byte-pair encoding of one task's texts."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, UNK, START, END = "<pad>", "<unk>", "<|im_start|>", "<|im_end|>"
MAX_VOCAB_SIZE = 512
MAX_LENGTH = 2048  # tokens


def train_tokenizer(
    texts: Iterable[str], words: Sequence[str], chat_template: str
) -> PreTrainedTokenizerFast:
    """Make a tokenizer of printable ASCII characters and the most frequent pairs in `texts`.

    Each of `words` is one token, which a decoder prints. Digits stay alone, so that a model can copy numbers.
    """
    backend = Tokenizer(models.BPE(unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE - len(words),
        special_tokens=[PAD, UNK, START, END],
        initial_alphabet=["\n", *(c for c in string.printable if c.isprintable())],
        show_progress=False,
    )
    between = re.compile("|".join(map(re.escape, (START, END, *words))))
    backend.train_from_iterator((piece for text in texts for piece in between.split(text)), trainer)
    # not special: decoding must keep them
    backend.add_tokens([AddedToken(word, normalized=False) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNK,
        additional_special_tokens=[START],
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )
