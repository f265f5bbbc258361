"""Replies of /generate become Completions, or are refused by name."""

import base64
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.rollout.generate_reply import (
    GenerateReplyError,
    NonFiniteLogProbsError,
    RouteShape,
    parse_generate_reply,
)
from megatron_vespo.types import Completion, Prompt, VersionSpans

PROMPT = Prompt(prompt_id=17, token_ids=[5, 9, 2], answer="42", text="6 * 7 = ?")
ROUTES = RouteShape(num_layers=2, topk=1)
WHERE = r"^request r1 \(prompt 17\): "


def encoded(experts) -> str:
    return base64.b64encode(np.asarray(experts, dtype=np.int32).tobytes()).decode()


def reply(**meta) -> dict:
    """Two tokens after three, 2 layers, top-1: routed experts of 4 tokens."""
    return {
        "output_ids": [11, 1],
        "meta_info": {
            "id": "r1",
            "finish_reason": {"type": "stop", "matched": 1},
            "output_token_logprobs": [[-0.5, 11, None], [-1.25, 1, None]],
            "weight_versions": [{"version": "3", "start": 0, "end": 2}],
            "num_retractions": 0,
            "routed_experts": encoded([[[0], [7]], [[1], [6]], [[2], [5]], [[3], [255]]]),
            **meta,
        },
    }


def parse(answer: dict, routes: RouteShape | None = ROUTES) -> Completion:
    completion = parse_generate_reply(json.dumps(answer).encode(), PROMPT, 0.7, routes)
    assert completion is not None
    return completion


def test_reply_becomes_a_completion():
    completion = parse(reply())
    assert completion.prompt is PROMPT
    assert completion.token_ids.dtype == np.int32 and completion.token_ids.tolist() == [11, 1]
    assert completion.log_probs.dtype == np.float32 and completion.log_probs.tolist() == [-0.5, -1.25]
    assert completion.policy_versions == VersionSpans((3,), (2,))
    assert completion.routed_experts.dtype == np.uint8 and completion.routed_experts.shape == (4, 2, 1)
    assert completion.routed_experts[:, :, 0].tolist() == [[0, 7], [1, 6], [2, 5], [3, 255]]
    assert (completion.finish_reason, completion.temperature, completion.reward) == ("stop", 0.7, None)


def test_routes_that_nobody_asked_for_are_not_looked_at():
    assert parse(reply(routed_experts=None), None).routed_experts is None


def test_routes_of_a_retracted_request_are_not_kept():
    """They would be those of the pass that has computed keys and values anew, and of the right shape."""
    kept, lost = parse(reply()), parse(reply(num_retractions=2))
    assert (kept.num_retractions, kept.routed_experts.shape) == (0, (4, 2, 1))
    assert (lost.num_retractions, lost.routed_experts) == (2, None)
    assert (lost.token_ids == kept.token_ids).all() and (lost.log_probs == kept.log_probs).all()
    assert parse(reply(num_retractions=2), None).num_retractions == 2


def test_versions_of_a_completion_that_saw_an_update():
    spans = [span("3", 0, 1), span("4", 1, 2)]
    assert parse(reply(weight_versions=spans)).policy_versions == VersionSpans((3, 4), (1, 1))


def test_soft_max_rounding_is_kept_as_it_came():
    completion = parse(reply(output_token_logprobs=[[1.1920928955078125e-07, 11, None], [0.0, 1, None]]))
    assert completion.log_probs.tolist() == [1.1920928955078125e-07, 0.0]


def span(version: str, start: int, end: int) -> dict:
    return {"version": version, "start": start, "end": end}


SPANS = r"weight versions \[.*\] do not cover the 2 completion tokens$"
MAGIC, ABORT = {"type": "magic"}, {"type": "abort"}
NO_TOKENS = {"finish_reason": {"type": "length"}, "output_ids": [], "output_token_logprobs": []}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # versions cover every token once, and are ours
        *(({"weight_versions": spans}, SPANS) for spans in (
            [], [span("3", 0, 1)], [span("3", 1, 2)], [span("3", 0, 3)], [span("3", 0, 2), span("4", 1, 2)],
        )),
        ({"weight_versions": [span("default", 0, 2)]},
         "weight version 'default' is not one of ours, a number$"),
        ({"output_token_logprobs": [[-0.5, 11, None], [0.01, 1, None]]},
         r"log-prob 0.01 of completion token 1 \(1 bad of 2\)$"),
        *(({"output_token_logprobs": scored}, f"2 output ids do not match {len(scored)} scored tokens$")
          for scored in ([[-0.5, 11, None]], [[-0.5, 11, None], [-1.0, 2, None]])),
        ({"finish_reason": MAGIC}, "unknown finish reason {'type': 'magic'}$"),
        (NO_TOKENS, "no tokens, finish reason {'type': 'length'}$"),
        ({"routed_experts": encoded([0] * 6)}, "6 routed experts, expected 4 tokens x 2 layers x 1$"),
        *(({"routed_experts": encoded([0] * 7 + [bad])},
           rf"routed experts {low}\.\.{high} are not within 0\.\.255$")
          for bad, low, high in ((256, 0, 256), (-1, -1, 0))),
        ({"routed_experts": "AAA"}, "routed experts are not base64 int32"),
    ],
)  # fmt: skip
def test_a_reply_that_cannot_be_used_is_refused_by_name(changes, message):
    answer = reply(**changes)
    answer["output_ids"] = changes.get("output_ids", answer["output_ids"])
    with pytest.raises(GenerateReplyError, match=WHERE + message):
        parse(answer)


def test_a_log_prob_that_is_not_finite_is_refused_as_such():
    """SGLang writes null for NaN and infinity; a number may also be too large for float32."""
    for value, shown in ((None, "None"), (-1e300, r"-1e\+300")):
        message = WHERE + rf"log-prob {shown} of completion token 1 \(1 bad of 2\)$"
        with pytest.raises(NonFiniteLogProbsError, match=message):
            parse(reply(output_token_logprobs=[[-0.5, 11, None], [value, 1, None]]))


def test_replaced_nan_token_is_refused():
    with pytest.raises(
        NonFiniteLogProbsError, match=WHERE + "the engine sampled a token outside the vocabulary"
    ):
        parse(reply(finish_reason={"type": "stop", "matched": "NaN happened"}))


@pytest.mark.parametrize(
    "field", ["weight_versions", "routed_experts", "output_token_logprobs", "num_retractions"]
)
def test_missing_field_is_named(field):
    answer = reply()
    del answer["meta_info"][field]
    with pytest.raises(GenerateReplyError, match=f"^prompt 17: the reply has no '{field}'$"):
        parse(answer)


def naive(answer: dict, routes: RouteShape | None) -> dict | str:
    """What a reply says, token by token, or the name of the error that it deserves."""
    meta, tokens = answer["meta_info"], answer["output_ids"]
    versions: list[int] = []
    for part in meta["weight_versions"]:
        if part["start"] != len(versions) or part["end"] < part["start"]:
            return "GenerateReplyError"
        versions += [int(part["version"])] * (part["end"] - part["start"])
    if not tokens or [entry[1] for entry in meta["output_token_logprobs"]] != tokens:
        return "GenerateReplyError"
    values = [entry[0] for entry in meta["output_token_logprobs"]]
    if None in values:
        return "NonFiniteLogProbsError"
    if max(values) > 1e-5 or len(versions) != len(tokens):
        return "GenerateReplyError"
    experts = None
    if routes is not None and not meta["num_retractions"]:
        flat = np.frombuffer(base64.b64decode(meta["routed_experts"]), np.int32)
        entered = len(PROMPT.token_ids) + len(tokens) - 1
        if flat.size != entered * routes.num_layers * routes.topk or not 0 <= flat.min() <= flat.max() < 256:
            return "GenerateReplyError"
        experts = flat.reshape(entered, routes.num_layers, routes.topk).tolist()
    return {"tokens": tokens, "log_probs": values, "versions": versions, "experts": experts}


@st.composite
def replies(draw) -> tuple[dict, RouteShape | None]:
    """Replies that are mostly sound; now and then one part of one is not."""
    length = draw(st.integers(1, 12))
    tokens = draw(st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length))
    floats = st.floats(-1024.0, 0.0, width=32)
    values: list = draw(st.lists(floats, min_size=length, max_size=length))
    cuts = sorted(draw(st.sets(st.integers(1, length), max_size=3)) | {length})
    spans = [
        span(str(draw(st.integers(0, 10**6))), start, end)
        for start, end in zip([0, *cuts], cuts, strict=False)
    ]
    shape = RouteShape(draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    size = (len(PROMPT.token_ids) + length - 1) * shape.num_layers * shape.topk
    experts = draw(st.lists(st.integers(0, 255), min_size=size, max_size=size))
    scored = [[value, token, None] for value, token in zip(values, tokens, strict=True)]
    place = draw(st.integers(0, length - 1))
    damage = draw(
        st.sampled_from(["", "", "", "null", "positive", "id", "short", "span", "expert", "routes"])
    )
    match damage:
        case "null":
            scored[place][0] = None
        case "positive":
            scored[place][0] = 0.5
        case "id":
            scored[place][1] ^= 1
        case "short":
            scored.pop()
        case "span":
            spans[-1]["end"] += draw(st.sampled_from([-1, 1]))
        case "expert":
            experts[0] = draw(st.sampled_from([-1, 256, 2**31 - 1, -(2**31)]))
        case "routes":
            experts.pop()
    answer = reply(
        output_token_logprobs=scored,
        weight_versions=spans,
        routed_experts=encoded(experts),
        num_retractions=draw(st.sampled_from([0, 0, 2])),
    )
    return answer | {"output_ids": tokens}, draw(st.sampled_from([shape, None]))


@settings(max_examples=400, deadline=None)
@given(replies())
def test_every_reply_means_what_it_says_token_by_token(case):
    answer, routes = case
    expected = naive(answer, routes)
    try:
        completion = parse(answer, routes)
    except GenerateReplyError as error:
        assert type(error).__name__ == expected
        return
    assert isinstance(expected, dict)
    assert list(completion.token_ids) == expected["tokens"]
    np.testing.assert_array_equal(completion.log_probs, np.array(expected["log_probs"], np.float32))
    assert completion.policy_versions.array().tolist() == expected["versions"]
    experts = completion.routed_experts
    assert (experts if experts is None else experts.tolist()) == expected["experts"]


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"meta_info": 3}', b'{"output_ids": ["x"]}', b"\xff"])
def test_what_is_no_reply_is_refused_by_the_prompts_name(body):
    with pytest.raises(GenerateReplyError, match="^prompt 17: not a reply of /generate: "):
        parse_generate_reply(body, PROMPT, 0.7, None)


def test_a_token_id_of_more_than_32_bits_is_refused():
    answer = reply(output_token_logprobs=[[-0.5, 2**31, None], [-1.25, 1, None]])
    with pytest.raises(GenerateReplyError, match=WHERE + "token id 2147483648 is too large"):
        parse(answer | {"output_ids": [2**31, 1]})


def test_entries_that_are_no_triples_are_refused():
    with pytest.raises(GenerateReplyError, match=WHERE + "output_token_logprobs are not triples"):
        parse(reply(output_token_logprobs=[[-0.5, 11, "a"], [-1.25, 1, "b"]]))
    with pytest.raises(GenerateReplyError, match="2 output ids do not match"):
        parse(reply(output_token_logprobs=[[-0.5, 11], [-1.25, 1]]))


@pytest.mark.parametrize(
    "changes",
    [
        {"output_ids": [], "output_token_logprobs": []},
        {"output_token_logprobs": None},
        {"routed_experts": "absent"},
    ],
)
def test_a_request_that_was_aborted_in_the_queue_is_none(changes):
    """It has no new tokens, or tokens of before a retraction, without log-probs and routes."""
    answer = reply(finish_reason=ABORT)
    for name, value in changes.items():
        place = answer if name == "output_ids" else answer["meta_info"]
        place[name] = value
        if value == "absent":
            del place[name]
    assert parse_generate_reply(json.dumps(answer).encode(), PROMPT, 0.7, ROUTES) is None
