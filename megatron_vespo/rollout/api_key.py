"""The key without which a run's engines answer nobody: drawn for the run, seen by no one else.

Whoever reaches an engine may replace its weights and have it load any folder. The key is in no command line,
environment, file or log: processes of the run get it through pipes and Ray's calls. Only /health and /metrics
answer without it.
"""

from __future__ import annotations

import logging
import secrets
from typing import IO, TextIO

from megatron_vespo.rollout.server_arguments import flag_value

API_KEY_CHOICES = ("auto", "always", "never")
KEY_BYTES = 32
REPLACEMENT = "<API key>"


def new_api_key(choice: str, loopback: bool) -> str | None:
    """None where engines shall answer everybody. `loopback`: only this machine can reach them."""
    if choice == "never" or (choice == "auto" and loopback):
        return None
    return secrets.token_urlsafe(KEY_BYTES)


def check_flags_with_key(sglang_flags: list[str]) -> None:
    """ValueError for what SGLang cannot do while it asks for a key."""
    flag = "--tokenizer-worker-num"
    if flag_value(sglang_flags, flag) not in (None, "1"):
        raise ValueError(
            f"--sglang{flag[1:]}: with several workers SGLang asks nobody for a key; use 1, or "
            "--engine-api-key never"
        )


def hand_over(api_key: str | None, server_input: IO[bytes]) -> None:
    """To the server's process, which waits for it at the other end of the pipe."""
    try:
        with server_input:
            server_input.write(f"{api_key or ''}\n".encode())
    except BrokenPipeError:
        pass  # it has ended already, which is found out elsewhere


def receive(server_input: TextIO) -> str | None:
    """What `hand_over` has sent."""
    return server_input.readline().strip() or None


def keep_out_of_logs(api_key: str) -> None:
    """For this process, whatever logs: SGLang writes all of its arguments at --log-level info."""
    make_record = logging.getLogRecordFactory()

    def without_key(*arguments, **options) -> logging.LogRecord:
        record = make_record(*arguments, **options)
        try:
            message = record.getMessage()
        except Exception:  # a broken call; logging says so where it does no harm
            return record
        if api_key in message:
            record.msg, record.args = message.replace(api_key, REPLACEMENT), ()
        return record

    logging.setLogRecordFactory(without_key)
