"""Loads the tokenizer of an HF folder and converts chat messages to tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_vespo.data.located import located

ARGUMENTS_FLAG = "--chat-template-arguments"
_OURS = {"messages", "add_generation_prompt", "strftime_now"}  # variables that every template gets
_PROBE = "Two  words,\n\n\t12345 = don't; é 你好 🙂 "
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")  # transformers' tag, not in Jinja


def load_tokenizer(folder: Path, flag: str) -> Any:
    """Load the Hugging Face tokenizer of `folder`, which `flag` names; ValueError if there is none."""
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    missing = f"{flag} {folder}: there is no tokenizer in the folder (tokenizer.json and its like)"
    with located(f"{flag} {folder}: its tokenizer cannot be loaded" if _has_vocabulary(folder) else missing):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    if not set(tokenizer.get_vocab()) - special:  # what transformers returns if it finds no file
        raise ValueError(missing)
    return tokenizer if _follows_file(tokenizer, folder) else _of_file(folder)


def _follows_file(tokenizer: Any, folder: Path) -> bool:
    """Tell whether the tokenizer cuts text as the folder's tokenizer.json does, if there is one.

    transformers makes some classes, LlamaTokenizer for one, without the file's rules of cutting. Folders may
    name such a class over rules of their own, as DeepSeek's distilled models do. Prompts would lose blanks.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        return True
    expected = Tokenizer.from_file(str(file)).encode(_PROBE, add_special_tokens=False).ids
    return tokenizer.encode(_PROBE, add_special_tokens=False) == expected


def _of_file(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def _has_vocabulary(folder: Path) -> bool:
    names = {path.name for pattern in ("tokenizer*", "vocab*", "*.model") for path in folder.glob(pattern)}
    return bool(names - {"tokenizer_config.json"})


@dataclass(frozen=True)
class ChatFormat:
    """How prompts become tokens; the constructor checks it.

    The chat template gets `arguments` by name. `date` is the time that a template reads with strftime_now.
    It stays the same for a whole run or evaluation, even over several days.
    """

    tokenizer: Any
    apply_template: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)
    date: datetime = field(default_factory=datetime.now)

    def __post_init__(self) -> None:
        """ValueError if there is no template, or if it does not read the arguments."""
        if not self.apply_template:
            if self.arguments:
                raise ValueError(f"{ARGUMENTS_FLAG} is for a chat template, --no-chat-template uses none")
            return
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "the tokenizer has no chat template: --no-chat-template takes prompts as they are"
            )
        if self.arguments:
            self._check_arguments()

    def _check_arguments(self) -> None:
        read = _variables(self.tokenizer.get_chat_template()) - _OURS - {*self.tokenizer.special_tokens_map}
        for name in self.arguments:
            if name not in read:
                raise ValueError(
                    f"{ARGUMENTS_FLAG}: the chat template reads no argument {name!r}; "
                    f"those that it reads are {', '.join(sorted(read)) or 'none'}"
                )

    def tokens(self, messages: list[dict]) -> list[int]:
        """Tokenise the messages; ValueError, without a place, if there are none or the template fails."""
        if self.apply_template:
            token_ids = self._templated(messages)
        elif len(messages) == 1:
            token_ids = self.tokenizer.encode(messages[0]["content"])
        else:
            raise ValueError(f"--no-chat-template takes one message, this prompt has {len(messages)}")
        if not token_ids:
            raise ValueError("the tokenizer makes no tokens of the prompt")
        return list(token_ids)

    def text(self, messages: list[dict]) -> str:
        """Return what the chat template makes of the messages; ValueError if it refuses them."""
        return self._templated(messages, tokenize=False)

    def _templated(self, messages: list[dict], *, tokenize: bool = True) -> Any:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=tokenize, return_dict=False,
                strftime_now=self.date.strftime, **self.arguments,
            )  # fmt: skip
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error


def _variables(template: str) -> set[str]:
    """Return the variables that a chat template reads from its caller."""
    from jinja2 import Environment, TemplateError, meta

    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        syntax = environment.parse(_GENERATION_TAG.sub("", template))
    except TemplateError as error:
        raise ValueError(f"the chat template cannot be read: {error}") from error
    return meta.find_undeclared_variables(syntax) - {*environment.globals, "raise_exception"}
