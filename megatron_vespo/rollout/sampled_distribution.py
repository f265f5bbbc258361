"""Refuses settings with which engines sample from a distribution that their log-probs do not describe.

Training assumes that an engine's log-prob of a token belongs to the distribution that the token was drawn
from. SGLang's log-probs are those of softmax(logits / temperature). Truncated sampling, penalties, biases and
grammars draw from another distribution, and nothing in the reply shows it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_vespo.rollout.server_arguments import PREFIX, flag_value
from megatron_vespo.system.process_environment import OTHER_LOG_PROBS
from megatron_vespo.types import SamplingParams

PREFERRED = "--preferred-sampling-params"
# below 1, speculative decoding accepts tokens that the model would not have drawn
_THRESHOLDS = ("--speculative-accept-threshold-single", "--speculative-accept-threshold-acc")
_WHY = "engines' log-probs do not describe what is sampled with {}, and training needs them to"
_OFF = {"", "0", "false", "no", "n"}
# Allowed values, besides null, of fields of SGLang's SamplingParams. Others, such as grammars, must be empty.
_NEUTRAL: dict[str, Any] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "n": 1, "repetition_penalty": 1.0,
}  # fmt: skip
_ABOUT_TEXT = {"skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim", "stream_interval"}


def wrong_log_probs(env: Mapping[str, str]) -> str | None:
    """A message if the variable that makes SGLang return other log-probs is set; None if it is off."""
    value = env.get(OTHER_LOG_PROBS, "")
    if value.lower() in _OFF:
        return None
    return f"{OTHER_LOG_PROBS}={value}: engines would not return the log-probs of what they sample"


def check_environment(env: Mapping[str, str]) -> None:
    """ValueError if `wrong_log_probs` has a message."""
    if wrong := wrong_log_probs(env):
        raise ValueError(f"{wrong}: unset it")


def check_flags(sglang_flags: list[str]) -> None:
    """ValueError for a flag or field of SGLang that changes the sampled distribution."""
    for flag in _THRESHOLDS:
        given = flag_value(sglang_flags, flag)
        if given is not None and given not in ("1", "1.0"):
            raise ValueError(f"{_ours(flag)} {given}: {_WHY.format(f'{flag} below 1')}; leave it out")
    given = flag_value(sglang_flags, PREFERRED)
    if given is None:
        return
    try:
        preferred = json.loads(given)
    except ValueError as error:
        raise ValueError(f"{_ours(PREFERRED)} {given!r} is not JSON: {error}") from error
    if not isinstance(preferred, dict):
        raise ValueError(f"{_ours(PREFERRED)} {given!r}: a JSON object is expected")
    for field, value in preferred.items():
        if field not in _ABOUT_TEXT and value and value != _NEUTRAL.get(field):
            said = f"{field} {json.dumps(value)}"
            raise ValueError(f"{_ours(PREFERRED)} has {said}: {_WHY.format(said)}; leave it out")


def _ours(flag: str) -> str:
    return PREFIX + flag.removeprefix("--")


def other_distribution(asked: SamplingParams, given: SamplingParams) -> str | None:
    """How the distribution of `asked` differs from that of `given`, in words; None if it does not."""
    for field in ("temperature", "top_p", "top_k"):
        wanted, usual = getattr(asked, field), getattr(given, field)
        if wanted != usual:
            return f"{field} {wanted:g} and not the run's {usual:g}"
    return None
