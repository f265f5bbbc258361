"""The data that travels between rollout, rewards and trainer. Layer 0: numpy and stdlib only.

One sample's life:

    Prompt --engine--> Completion --reward--> Completion.reward --advantages--> TrainingSample

Shapes: P prompt tokens, C completion tokens, N of them sampled by the policy, L layers, K experts per token.
N = C in a response of one turn. In a conversation, the other C - N tokens are given: an environment, a tool
or the chat template wrote them. They have no log-prob and no policy version, and nothing trains on them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal, Protocol, get_args

import numpy as np

TOKEN_ID = np.int32  # every vocabulary fits


def token_array(token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return `token_ids` as int32 [n], the same array if it is one. ValueError if an id does not fit."""
    if isinstance(token_ids, np.ndarray) and token_ids.dtype == TOKEN_ID:
        return token_ids
    ids = np.asarray(token_ids)
    if ids.size == 0:  # an empty list is float64
        return np.empty(ids.shape, TOKEN_ID)
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"token ids must be integers, not {ids.dtype}")
    limits = np.iinfo(TOKEN_ID)
    if not limits.min <= ids.min() <= ids.max() <= limits.max:
        raise ValueError(f"token ids from {ids.min()} to {ids.max()} do not fit into {limits.bits} bits")
    return ids.astype(TOKEN_ID)


@dataclass(frozen=True, slots=True)
class VersionSpans:
    """The policy version of each token of one response, stored as spans of equal versions.

    Example: VersionSpans(versions=(3, 4), lengths=(2, 1)) stands for the tokens' versions [3, 3, 4]
    """

    versions: tuple[int, ...]  # neighbours differ
    lengths: tuple[int, ...]  # tokens per span, at least 1

    @classmethod
    def of(cls, versions: VersionSpans | Sequence[int] | np.ndarray) -> VersionSpans:
        """Return the spans of one version per token."""
        if isinstance(versions, VersionSpans):
            return versions
        per_token = np.asarray(versions, np.int64)
        starts = np.concatenate([[0], np.flatnonzero(np.diff(per_token)) + 1])[: len(per_token)]
        lengths = np.diff(starts, append=len(per_token))
        return cls(tuple(per_token[starts].tolist()), tuple(lengths.tolist()))

    @classmethod
    def single(cls, version: int, length: int) -> VersionSpans:
        """Return the spans of `length` tokens of one version."""
        return cls((version,), (length,)) if length else cls((), ())

    @classmethod
    def joined(cls, parts: Iterable[VersionSpans]) -> VersionSpans:
        """Return the spans of all tokens, part after part."""
        return cls(*_merged(span for part in parts for span in zip(part.versions, part.lengths, strict=True)))

    def __len__(self) -> int:
        """Return the number of tokens."""
        return sum(self.lengths)

    @property
    def oldest(self) -> int:
        return min(self.versions)

    @property
    def newest(self) -> int:
        return max(self.versions)

    @property
    def last(self) -> int:
        """Version of the last token."""
        return self.versions[-1]

    def are_all(self, version: int) -> bool:
        """Tell whether every token is of `version`."""
        return set(self.versions) <= {version}

    def total(self) -> int:
        """Return the sum of the versions over all tokens."""
        return sum(version * length for version, length in zip(self.versions, self.lengths, strict=True))

    def array(self) -> np.ndarray:
        """Return one version per token, int64 [C]."""
        return np.repeat(np.array(self.versions, np.int64), self.lengths)


def _merged[Value: Hashable](
    spans: Iterable[tuple[Value, int]],
) -> tuple[tuple[Value, ...], tuple[int, ...]]:
    """Return values and lengths of the spans; neighbours of equal value become one, empty ones vanish."""
    runs = groupby(((value, n) for value, n in spans if n), lambda span: span[0])
    merged = [(value, sum(n for _, n in run)) for value, run in runs]
    return tuple(value for value, _ in merged), tuple(length for _, length in merged)


Writer = Literal["policy", "environment", "tool"]  # the last two include the chat template's tokens
WRITERS: tuple[Writer, ...] = get_args(Writer)


@dataclass(frozen=True, slots=True)
class Segments:
    """Who wrote each token of one response, stored as spans. Tokens of "policy" are sampled, others given.

    Example: Segments(writers=("policy", "tool", "policy"), lengths=(12, 5, 30)) has 47 tokens, 42 sampled
    """

    writers: tuple[Writer, ...]  # neighbours differ
    lengths: tuple[int, ...]  # tokens per span, at least 1

    @classmethod
    def single(cls, writer: Writer, length: int) -> Segments:
        """Return the segments of `length` tokens of one writer."""
        return cls((writer,), (length,)) if length else cls((), ())

    @classmethod
    def joined(cls, parts: Iterable[Segments]) -> Segments:
        """Return the segments of all tokens, part after part."""
        return cls(*_merged(span for part in parts for span in part.spans()))

    def __len__(self) -> int:
        """Return the number of tokens, C."""
        return sum(self.lengths)

    def spans(self) -> list[tuple[Writer, int]]:
        """Return writer and number of tokens of each span."""
        return list(zip(self.writers, self.lengths, strict=True))

    @property
    def num_sampled(self) -> int:
        """Number of tokens that the policy sampled, N."""
        return sum(n for writer, n in self.spans() if writer == "policy")

    @property
    def num_given_at_end(self) -> int:
        """Number of tokens after the last sampled one."""
        given = 0
        for writer, length in reversed(self.spans()):
            if writer == "policy":
                break
            given += length
        return given

    @property
    def num_turns(self) -> int:
        """Number of spans that the policy sampled."""
        return self.writers.count("policy")

    def mask(self) -> np.ndarray:
        """Return which tokens the policy sampled, bool [C]."""
        return np.repeat(np.array([writer == "policy" for writer in self.writers], bool), self.lengths)


@dataclass(frozen=True, eq=False, slots=True)
class TokenSupports:
    """The tokens that truncated sampling (top-p, top-k, min-p) left to choose from, for each sampled token.

    Example: TokenSupports(counts=int32 [2, 1], token_ids=int32 [5, 9, 7]): the first token was drawn from
    {5, 9}, the second from {7}
    """

    counts: np.ndarray  # int32 [N], at least 1
    token_ids: np.ndarray  # int32 [sum of counts], token after token, ascending within each

    @classmethod
    def joined(cls, parts: Sequence[TokenSupports]) -> TokenSupports:
        """Return the supports of all tokens, part after part."""
        return cls(
            np.concatenate([np.empty(0, np.int32), *(part.counts for part in parts)]),
            np.concatenate([np.empty(0, TOKEN_ID), *(part.token_ids for part in parts)]),
        )

    def __len__(self) -> int:
        """Return the number of sampled tokens, N."""
        return len(self.counts)

    def first_outside(self, sampled_ids: np.ndarray) -> int | None:
        """Return the number of the first of `sampled_ids`, int [N], that is not in its support; or None."""
        owners = np.repeat(np.arange(len(self)), self.counts)
        found = np.zeros(len(self), bool)
        found[owners[self.token_ids == np.repeat(sampled_ids, self.counts)]] = True
        outside = np.flatnonzero(~found)
        return int(outside[0]) if len(outside) else None

    @property
    def nbytes(self) -> int:
        return self.counts.nbytes + self.token_ids.nbytes


class Routes(Protocol):
    """Routes of one response that lie in another process; `fetch` brings them here."""

    def fetch(self) -> np.ndarray:
        """Return the routes, uint8 [P + C - 1, L, K]."""
        ...


def fetched(routes: np.ndarray | Routes) -> np.ndarray:
    """Return the routes as an array, uint8 [P + C - 1, L, K], from wherever they are."""
    return routes if isinstance(routes, np.ndarray) else routes.fetch()


@dataclass(frozen=True, eq=False)
class Prompt:
    """One row of the prompt file, tokenised once. `token_ids` may be given as a list.

    Example:
        Prompt(prompt_id=17, token_ids=[5, 9, 2], answer="42", text="6 * 7 = ?", metadata={})
    """

    prompt_id: int  # row number in the file, from 0: stable across epochs and resumes
    token_ids: np.ndarray  # [P] int32, chat template applied; all responses share the array
    answer: str  # reference answer, as the reward function wants it
    text: str  # the user's message before the chat template, for people to read
    metadata: dict = field(default_factory=dict)  # the row's other columns, for custom rewards

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", token_array(self.token_ids))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Prompt):
            return NotImplemented
        ours, theirs = ({**vars(one), "token_ids": one.token_ids.tolist()} for one in (self, other))
        return ours == theirs


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. Log-probs, the engine's and the trainer's, are those after `temperature`.

    `top_p`, `top_k` and `min_p` truncate the distribution. With `with_supports`, completions have supports,
    and log-probs of the truncated distribution. Without, log-probs do not know of them: for evaluation alone.
    """

    temperature: float  # 0: the likeliest token
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    top_p: float = 1.0
    top_k: int = -1  # all
    min_p: float = 0.0
    with_supports: bool = False

    @property
    def truncates(self) -> bool:
        return (self.top_p, self.top_k, self.min_p) != (1.0, -1, 0.0)

    def untruncated(self) -> SamplingParams:
        """Return the same parameters for draws from the whole vocabulary."""
        return replace(self, top_p=1.0, top_k=-1, min_p=0.0, with_supports=False)


@dataclass
class Completion:
    """One sampled response, as the engine made it; `reward` is filled in later.

    `token_ids` and `policy_versions` may be given as lists or arrays, one entry per token.

    Example, two tokens made by policy version 3 of a 4-layer model with top-2 experts:
        Completion(prompt=..., token_ids=int32[2], log_probs=float32[2],
                   policy_versions=VersionSpans((3,), (2,)), routed_experts=uint8[P + 1, 4, 2],
                   finish_reason="stop", temperature=1.0)
    """

    prompt: Prompt
    token_ids: np.ndarray  # [C] int32, the stop token included when there is one
    log_probs: np.ndarray  # [N] float32, the engine's, at `temperature`; with `supports`, among these alone
    policy_versions: VersionSpans  # of N tokens, the version of the weights that made each
    # [P + C - 1, L, K] uint8, the choices of the passes that sampled (the last token never enters); None if
    # nobody asked, or if the engine has lost them: see `num_retractions`
    routed_experts: np.ndarray | Routes | None
    finish_reason: str  # "stop", "length", or "abort": a beginning, to be continued
    temperature: float
    reward: float | None = None  # the task's
    reward_status: str = "ok"  # or "timeout", "error": then the reward is 0.0 for want of one
    overlong_penalty: float = 0.0  # of --overlong-buffer, at most 0
    rejections: tuple[str, ...] = ()  # draws in its place before that could not be trained on
    # How often the engine dropped its keys and values, for want of memory or for new weights. It computes
    # them anew from the tokens, in another kind of pass, and its routes are those of that pass.
    num_retractions: int = 0
    segments: Segments | None = None  # of C tokens; None: the policy sampled every token
    turn_rewards: tuple[float, ...] = ()  # an environment's, one per step that gave one
    environment_error: str = ""  # why the environment failed; the reward is then 0.0, its status "error"
    # JSON values that a generate function or an environment hands to the reward function
    reward_data: dict[str, Any] = field(default_factory=dict)
    reward_parts: dict[str, float] = field(
        default_factory=dict
    )  # what a reward function names beside `reward`
    reward_error: str = ""  # why there is no reward, for people to read
    supports: TokenSupports | None = None  # of N tokens; None: drawn from the whole vocabulary
    teacher_log_probs: np.ndarray | None = None  # [N] float32, a teacher's, at `temperature`

    def __post_init__(self) -> None:
        self.token_ids = token_array(self.token_ids)
        self.policy_versions = VersionSpans.of(self.policy_versions)

    @property
    def num_sampled(self) -> int:
        """Number of tokens that the policy sampled, N: the response's length in every length statistic."""
        return len(self.token_ids) if self.segments is None else self.segments.num_sampled

    @property
    def num_given_at_end(self) -> int:
        """Number of tokens after the last sampled one."""
        return self.segments.num_given_at_end if self.segments else 0

    def with_given(self, token_ids: np.ndarray, writer: Writer) -> Completion:
        """Return a beginning that ends with `token_ids`, int32 [n], which the policy did not sample."""
        old = self.segments or Segments.single("policy", len(self.token_ids))
        return replace(
            self,
            token_ids=np.concatenate([self.token_ids, token_array(token_ids)]),
            segments=Segments.joined([old, Segments.single(writer, len(token_ids))]),
            finish_reason="abort",
        )

    def last_turn(self) -> np.ndarray:
        """Return the last tokens that the policy sampled without a break, int32 [n]."""
        end = len(self.token_ids) - self.num_given_at_end
        length = end
        if self.segments is not None:
            length = next(n for writer, n in reversed(self.segments.spans()) if writer == "policy")
        return self.token_ids[end - length : end]

    @property
    def shaped_reward(self) -> float:
        """What advantages are made of."""
        assert self.reward is not None
        return self.reward + self.overlong_penalty


class PartlySampled:
    """Which tokens after the prompt the policy sampled, for classes with these two fields."""

    __slots__ = ()
    completion_length: int  # tokens after the prompt, C, given ones included
    segments: Segments | None  # of C tokens; None: the policy sampled every token

    @property
    def num_trained(self) -> int:
        """Number of tokens that the policy sampled, N: the only ones that a loss counts."""
        return self.completion_length if self.segments is None else self.segments.num_sampled

    def sampled_mask(self) -> np.ndarray:
        """Return which tokens after the prompt the policy sampled, bool [C]."""
        return np.ones(self.completion_length, bool) if self.segments is None else self.segments.mask()


@dataclass
class TrainingSample(PartlySampled):
    """One sequence to train on. Trained tokens are those of positions [P, P + C) that the policy sampled.

    `token_ids` and `policy_versions` may be given as lists or arrays, one entry per token.

    Example:
        TrainingSample(token_ids=int32[P + C], prompt_length=P, behavior_log_probs=float32[N],
                       policy_versions=VersionSpans((3,), (N,)), advantage=-0.25, reward=0.0,
                       temperature=1.0, group_id=7)
    """

    token_ids: np.ndarray  # [P + C] int32
    prompt_length: int
    behavior_log_probs: np.ndarray  # [N] float32, mu: what the engine said when it sampled
    policy_versions: VersionSpans  # of N tokens
    advantage: float
    reward: float
    temperature: float
    group_id: int  # samples of one prompt in one rollout batch share it
    old_log_probs: np.ndarray | None = None  # [N] float32, pi_old: the trainer's, before the first update
    # [P + C - 1, L, K] uint8, what the engine chose
    routed_experts: np.ndarray | Routes | None = None
    routes_version: int | None = None  # the policy version that chose them
    replays: bool = True  # False: no routes are known, and the routers choose in spite of R3
    segments: Segments | None = None  # of C tokens; None: the policy sampled every token
    token_advantages: np.ndarray | None = None  # [N] float32, added to `advantage`; None: all 0
    reference_log_probs: np.ndarray | None = None  # [N] float32, the reference policy's
    supports: TokenSupports | None = None  # of N tokens: pi, pi_old, mu and the reference are of these alone

    def __post_init__(self) -> None:
        self.token_ids = token_array(self.token_ids)
        self.policy_versions = VersionSpans.of(self.policy_versions)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def completion_length(self) -> int:
        """Number of tokens after the prompt, C, given ones included."""
        return len(self.token_ids) - self.prompt_length
