"""The API key of a run's engines: drawn at random for every run and known to its processes only.

Without a key, anyone who reaches an engine could replace its weights or make it load any folder. The key is
in no command line, environment, file or log. The processes of the run get it through pipes and Ray calls.
Only /health and /metrics answer without it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from typing import IO, TextIO

from megatron_vespo.rollout.server_arguments import flag_value

API_KEY_CHOICES = ("auto", "always", "never")
KEY_BYTES = 32
REPLACEMENT = "<API key>"


def new_api_key(choice: str, loopback: bool) -> str | None:
    """A new key; None if engines answer everyone. `loopback`: only this machine can reach them."""
    if choice == "never" or (choice == "auto" and loopback):
        return None
    return secrets.token_urlsafe(KEY_BYTES)


def check_flags_with_key(sglang_flags: Sequence[str]) -> None:
    """ValueError for flags with which SGLang does not check the key."""
    flag = "--tokenizer-worker-num"
    if flag_value(sglang_flags, flag) not in (None, "1"):
        raise ValueError(
            f"--sglang{flag[1:]}: with several workers SGLang does not ask for the API key; use 1, or "
            "--engine-api-key never"
        )


def hand_over(api_key: str | None, server_input: IO[bytes]) -> None:
    """Writes the key, or an empty line, into the pipe from which the server's process reads it."""
    try:
        with server_input:
            server_input.write(f"{api_key or ''}\n".encode())
    except BrokenPipeError:
        pass  # the server has ended already; whoever waits for it reports that


def receive(server_input: TextIO) -> str | None:
    """The key that `hand_over` sent, or None."""
    return server_input.readline().strip() or None


def keep_out_of_logs(api_key: str) -> None:
    """Removes the key from the logs of this process: at --log-level info SGLang logs all arguments."""
    make_record = logging.getLogRecordFactory()

    def without_key(*arguments, **options) -> logging.LogRecord:
        record = make_record(*arguments, **options)
        try:
            message = record.getMessage()
        except Exception:  # a broken logging call; logging itself reports it
            return record
        if api_key in message:
            record.msg, record.args = message.replace(api_key, REPLACEMENT), ()
        return record

    logging.setLogRecordFactory(without_key)
