"""Refuses settings with which engines sample from a distribution that their log-probs do not describe.

Training assumes that an engine's log-prob of a token belongs to the distribution that the token was drawn
from. SGLang's log-probs are those of softmax(logits / temperature). Penalties, biases and grammars draw from
another distribution, and nothing in the reply shows it. Truncated sampling (top-p, top-k, min-p) can be
trained on: a request may ask for the support of every token, and for log-probs among its tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_vespo.rollout.server_arguments import PREFIX, SUPPORT_CAP, SUPPORT_CAP_FLAG, flag_value
from megatron_vespo.system.process_environment import OTHER_LOG_PROBS
from megatron_vespo.types import SamplingParams

PREFERRED = "--preferred-sampling-params"
# below 1, speculative decoding accepts tokens that the model would not have drawn
_THRESHOLDS = ("--speculative-accept-threshold-single", "--speculative-accept-threshold-acc")
# with these values SGLang returns no supports, or only with some kinds of speculative decoding
_NO_SUPPORTS: dict[str, Callable[[str], bool]] = {
    "--speculative-algorithm": lambda value: True,
    "--sampling-backend": lambda value: value == "ascend",
    "--disaggregation-mode": lambda value: value != "null",
}
# with these SGLang's sampler uses the seeds of the requests, and then asserts that there is no min-p
_SEEDED = ("--enable-deterministic-inference", "--rl-on-policy-target")
LEAST_SUPPORT_CAP = 4
_WHY = "engines' log-probs do not describe what is sampled with {}, and training needs them to"
_OFF = {"", "0", "false", "no", "n"}
# Allowed values, besides null, of fields of SGLang's SamplingParams. Others, such as grammars, must be empty.
_NEUTRAL: dict[str, Any] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "n": 1, "repetition_penalty": 1.0,
}  # fmt: skip
_TRUNCATES = {"top_p", "top_k", "min_p"}
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
            instead = f"use --rollout-{field.replace('_', '-')}" if field in _TRUNCATES else "leave it out"
            raise ValueError(f"{_ours(PREFERRED)} has {said}: {_WHY.format(said)}; {instead}")


def _ours(flag: str) -> str:
    return PREFIX + flag.removeprefix("--")


def other_distribution(asked: SamplingParams, given: SamplingParams) -> str | None:
    """How the distribution of `asked` differs from that of `given`, in words; None if it does not."""
    for field in ("temperature", "top_p", "top_k", "min_p"):
        wanted, usual = getattr(asked, field), getattr(given, field)
        if wanted != usual:
            return f"{field} {wanted:g} and not the run's {usual:g}"
    return None


def training_sampling(wanted: SamplingParams, sglang_flags: Sequence[str]) -> SamplingParams:
    """Return `wanted` as training needs it: truncated sampling has a top-k, and asks for the supports."""
    if not wanted.truncates:
        return wanted
    top_k = wanted.top_k if wanted.top_k != -1 else _most_top_k(sglang_flags)
    return replace(wanted, top_k=top_k, with_supports=True)


def truncation_remarks(sampling: SamplingParams, sglang_flags: Sequence[str]) -> list[str]:
    """Return log lines about a top-k that the user may not have asked for."""
    if not sampling.with_supports or sampling.top_k != _most_top_k(sglang_flags):
        return []
    return [
        f"every token is drawn from the {sampling.top_k} likeliest at most: engines return supports of "
        f"{_support_cap(sglang_flags)} tokens ({_ours(SUPPORT_CAP_FLAG)}), and half is left for equal "
        "probabilities"
    ]


def check_truncation(sampling: SamplingParams, sglang_flags: Sequence[str]) -> None:
    """ValueError if SGLang cannot say which tokens `sampling` leaves, or if it leaves one alone."""
    if not sampling.truncates:
        return
    most = _most_top_k(sglang_flags)
    if sampling.top_k != -1 and not 2 <= sampling.top_k <= most:
        raise ValueError(
            f"--rollout-top-k is {sampling.top_k}, must be -1 (all) or 2 to {most}, half of what an engine "
            f"returns ({_ours(SUPPORT_CAP_FLAG)} {_support_cap(sglang_flags)}): the rest is for equal "
            "probabilities"
        )
    if (flag := _without_supports(sglang_flags)) is not None:
        raise ValueError(
            f"{_ours(flag)}: SGLang does not say which tokens --rollout-top-p, --rollout-top-k and "
            "--rollout-min-p leave, and training needs to know; leave one of them out"
        )
    seeded = next((flag for flag in _SEEDED if flag in sglang_flags), None)
    if sampling.min_p and seeded:
        raise ValueError(
            f"--rollout-min-p {sampling.min_p:g}: SGLang has no min-p with {_ours(seeded)}: leave one out"
        )


def _without_supports(sglang_flags: Sequence[str]) -> str | None:
    """Return the flag, with its value, with which SGLang returns no supports; None without one."""
    for flag, returns_none in _NO_SUPPORTS.items():
        given = flag_value(sglang_flags, flag)
        if given is not None and returns_none(given):
            return f"{flag} {given}"
    return None


def _support_cap(sglang_flags: Sequence[str]) -> int:
    """Return the most tokens that an engine returns as one token's support; ValueError for no number."""
    given = flag_value(sglang_flags, SUPPORT_CAP_FLAG)
    if given is None:
        return SUPPORT_CAP
    if not (given.isdecimal() and int(given) >= LEAST_SUPPORT_CAP):
        raise ValueError(
            f"{_ours(SUPPORT_CAP_FLAG)} is {given!r}, must be a number from {LEAST_SUPPORT_CAP} on"
        )
    return int(given)


def _most_top_k(sglang_flags: Sequence[str]) -> int:
    # FlashInfer keeps all tokens that are as likely as the last one: in bfloat16 these may be many
    return _support_cap(sglang_flags) // 2
