"""The pieces of tokens, joined, are the text: with real tokenizers, parts of letters and special tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_vespo.data.token_pieces import TokenPieces
from tests.support.letter_tokenizer import letters
from tests.support.real_tokenizers import real_model

EXAMPLES = Path(__file__).parents[3] / "examples/tiny"
TEXTS = [
    "Let x = 3.\n\n\\boxed{42}   \t done",
    "naïve café — 你好,世界 🙂👩‍👩‍👧‍👦 \U00010348 \u0301e ﷽",
    "def f(a):\n    return a['é'] \u2581 \u00a0 \u0120 Ġ <0x0A>",
    "",
]
REAL = ["qwen3", "qwen3_instruct_2507", "qwen3_6", "deepseek_v3", "llama3_1"]


def text_of(pieces: TokenPieces, token_ids) -> str:
    found = pieces.of(np.array(token_ids, np.int64))
    return b"".join(found[i] for i in token_ids).decode("utf-8", "replace")


def decoded(tokenizer, token_ids) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(name):
    tokenizer = real_model(name).tokenizer
    pieces = TokenPieces(tokenizer)
    for text in TEXTS:
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        assert text_of(pieces, token_ids) == decoded(tokenizer, token_ids)
    special = sorted(tokenizer.added_tokens_decoder)[:40]
    assert text_of(pieces, special) == "".join(tokenizer.added_tokens_decoder[i].content for i in special)


@pytest.mark.parametrize("name", REAL)
def test_random_tokens_of_real_tokenizers(name):
    """A policy may sample any tokens: parts of letters in any order."""
    tokenizer, draw = real_model(name).tokenizer, np.random.default_rng(0)
    pieces = TokenPieces(tokenizer)
    for _ in range(50):
        token_ids = draw.integers(0, len(tokenizer), 40).tolist()
        assert text_of(pieces, token_ids) == decoded(tokenizer, token_ids)


def test_every_token_of_a_real_vocabulary():
    tokenizer = real_model("qwen3").tokenizer
    found = TokenPieces(tokenizer).of(np.arange(len(tokenizer)))
    assert all(found.values())
    # each byte is a token of its own, and no two tokens are the same
    assert {bytes([byte]) for byte in range(256)} <= set(found.values())
    assert len(set(found.values())) == len(found)


def sentence_piece() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the form of Llama 2's: blanks are U+2581, unknown letters are bytes."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for letter in "\u2581abcdefghijklmnopqrstuvwxyz.,=0123456789":
        vocabulary[letter] = len(vocabulary)
    merges = [("\u2581", "x"), ("o", "n"), ("d", "on"), ("\u2581", "\u2581")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def test_sentence_piece_with_byte_fallback():
    tokenizer = sentence_piece()
    pieces = TokenPieces(tokenizer)
    for text in TEXTS[:2]:
        token_ids = [*tokenizer.encode(text, add_special_tokens=False), 2]
        # decode leaves out the blank before the first word; after a prompt it is there
        assert text_of(pieces, token_ids) == " " + decoded(tokenizer, token_ids)
    smile = tokenizer.encode("🙂", add_special_tokens=False)[-4:]
    assert [pieces[i] for i in smile] == [bytes([byte]) for byte in "🙂".encode()]


def test_metaspace():
    tokenizer = sentence_piece()
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    pieces = TokenPieces(tokenizer)
    token_ids = tokenizer.encode("x done. x", add_special_tokens=False)
    assert text_of(pieces, token_ids) == " " + decoded(tokenizer, token_ids)


def test_a_decoder_that_is_not_known_is_asked():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "so": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    assert text_of(TokenPieces(fast), fast.encode("so playing playing so")) == " so playing playing so"


def test_tokenizers_of_the_examples(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    from make_base_model import make_tokenizer
    from pair_tokenizer import train_tokenizer

    tiny = make_tokenizer()
    pairs = train_tokenizer(["12 * 7 = 84\n", "what is 12?"] * 9, ["<tool_call>"], "{{ messages }}")
    text = "12 * 7 = 84\n<tool_call> \\boxed{84}"
    for tokenizer in (tiny, pairs):
        token_ids = tokenizer.encode(text)
        assert text_of(TokenPieces(tokenizer), token_ids) == decoded(tokenizer, token_ids) == text


def test_words_without_a_decoder():
    tokenizer = letters(None)
    assert text_of(TokenPieces(tokenizer), tokenizer.encode("so")) == " s o"
    assert decoded(tokenizer, tokenizer.encode("so")) == "s o"


def test_an_added_token_is_its_text():
    """Its letters stand for themselves, also those that stand for bytes in the vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(["a"], trainer)
    backend.add_tokens([AddedToken("éé", normalized=False), AddedToken("ĠĠ", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert text_of(TokenPieces(tokenizer), tokenizer.encode("aééĠĠ à")) == "aééĠĠ à"


def test_ids_without_a_token():
    tokenizer = real_model("qwen3").tokenizer
    assert TokenPieces(tokenizer)[len(tokenizer) + 5] == b""


def test_each_token_is_looked_up_once(monkeypatch):
    tokenizer = real_model("qwen3").tokenizer
    pieces = TokenPieces(tokenizer)
    first = pieces.of(np.array([[9, 8], [8, 9]]))
    assert list(first) == [8, 9]
    monkeypatch.setattr(type(tokenizer), "convert_ids_to_tokens", None)
    assert pieces.of(np.array([9, 8])) == first
