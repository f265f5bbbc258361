"""Sampling masks in a reply of /generate: read as supports, or refused by name."""

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.rollout.generate_reply import (
    GenerateReplyError,
    NonFiniteLogProbsError,
    parse_generate_reply,
)
from megatron_vespo.rollout.sampling_mask import read_supports
from megatron_vespo.types import Completion, Prompt, TokenSupports

PROMPT = Prompt(prompt_id=17, token_ids=[5, 9, 2], answer="", text="")
WHERE = r"^request r1 \(prompt 17\): "
VOCABULARY = 151_936


def reply(finish: str = "stop", **meta) -> bytes:
    """Two tokens: 11 drawn from {7, 11, 30}, then 1, which had no rival."""
    answer = {
        "output_ids": [11, 1],
        "meta_info": {
            "id": "r1",
            "finish_reason": {"type": finish},
            "output_token_logprobs": [[-2.5, 11, None], [-0.25, 1, None]],
            "weight_versions": [{"version": "3", "start": 0, "end": 2}],
            "num_retractions": 0,
            "output_token_sampling_mask": [[30, 11, 7], [1]],
            "output_token_sampling_logprobs": [-1.5, 0.0],
            **meta,
        },
    }
    return json.dumps(answer, separators=(",", ":")).encode()


def parse(body: bytes, with_supports: bool = True) -> Completion | None:
    return parse_generate_reply(body, PROMPT, 0.7, None, with_supports=with_supports)


def lists(supports: TokenSupports) -> list[list[int]]:
    ends = np.cumsum(supports.counts)
    return [part.tolist() for part in np.split(supports.token_ids, ends[:-1])]


def test_masks_become_supports_and_mu_is_that_of_the_truncated_distribution():
    completion = parse(reply())
    assert lists(completion.supports) == [[7, 11, 30], [1]]
    assert completion.supports.counts.dtype == completion.supports.token_ids.dtype == np.int32
    assert completion.log_probs.dtype == np.float32 and completion.log_probs.tolist() == [-1.5, 0.0]
    full = parse(reply(), with_supports=False)
    assert full.supports is None and full.log_probs.tolist() == [-2.5, -0.25]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_token_sampling_mask": [[30, 11, 7]]},
         "1 sampling masks and 2 log-probs among them for 2 tokens$"),
        ({"output_token_sampling_logprobs": [-1.5]},
         "2 sampling masks and 1 log-probs among them for 2 tokens$"),
        ({"output_token_sampling_mask": [[30, 11, 7], [2]]},
         "completion token 1, 1, is not in its sampling mask$"),
        ({"output_token_sampling_mask": [[1], [11]]}, "completion token 0, 11, is not in its sampling mask$"),
        ({"output_token_sampling_mask": [[30, 11, 11], [1]]},
         "output_token_sampling_mask: token 0 has an id twice$"),
        *(({"output_token_sampling_mask": mask}, "output_token_sampling_mask: ") for mask in (
            [[11], []], [[], [1]], [[11, None], [1]], [[11, 0.5], [1]], [11, 1], "x", [[-3, 11], [1]],
            [[11, 2**31], [1]], {"0": [11]},
        )),
        ({"output_token_sampling_logprobs": [-1.5, "x"]},
         "output_token_sampling_logprobs are not numbers: "),
        ({"output_token_sampling_logprobs": [-1.5, 0.1]},
         r"log-prob 0.1 of completion token 1 \(1 bad of 2\)$"),
    ],
)  # fmt: skip
def test_masks_that_cannot_be_trained_on_are_refused_by_name(changes, message):
    with pytest.raises(GenerateReplyError, match=WHERE + message):
        parse(reply(**changes))
    assert parse(reply(**changes), with_supports=False) is not None  # nobody has asked for them


def test_a_log_prob_of_null_is_one_to_draw_again():
    with pytest.raises(NonFiniteLogProbsError):
        parse(reply(output_token_sampling_logprobs=[-1.5, None]))


@pytest.mark.parametrize("field", ["output_token_sampling_mask", "output_token_sampling_logprobs"])
def test_a_missing_field_is_named(field):
    answer = json.loads(reply())
    del answer["meta_info"][field]
    with pytest.raises(GenerateReplyError, match=f"^prompt 17: the reply has no '{field}'$"):
        parse(json.dumps(answer).encode())


def test_an_aborted_request_may_lack_masks():
    assert len(parse(reply("abort")).supports) == 2
    for missing in ([], None, [[11]]):
        assert parse(reply("abort", output_token_sampling_mask=missing)) is None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 2**31 - 1), min_size=1, max_size=9).map(list), max_size=9), st.booleans()
)
def test_supports_are_those_of_a_plain_reading(masks, spaced):
    text = json.dumps(masks, separators=None if spaced else (",", ":")).encode()
    supports = read_supports(text)
    assert supports.token_ids.tolist() == [token for mask in masks for token in sorted(mask)]
    assert supports.counts.tolist() == [len(mask) for mask in masks]
    own = np.array([mask[0] for mask in masks], np.int64)
    assert supports.first_outside(own) is None
    strange = [i for i, mask in enumerate(masks) if 5 not in mask]
    assert supports.first_outside(np.full(len(masks), 5)) == (strange[0] if strange else None)


@pytest.mark.parametrize("mean", [2, 10])
def test_what_a_reply_of_4096_tokens_costs(mean):
    """Prints the figures; 4 bytes are kept per token and per id."""
    draw = np.random.default_rng(0)
    counts = 1 + draw.poisson(mean - 1, 4096)
    masks = [draw.choice(VOCABULARY, count, replace=False).tolist() for count in counts]
    tokens = [mask[0] for mask in masks]
    body = reply(
        output_token_sampling_mask=masks, output_token_sampling_logprobs=[-0.5] * 4096,
        output_token_logprobs=[[-1.0, token, None] for token in tokens],
        weight_versions=[{"version": "3", "start": 0, "end": 4096}],
    ).replace(b'"output_ids":[11,1]', b'"output_ids":' + json.dumps(tokens).encode())  # fmt: skip

    def milliseconds(with_supports: bool) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            parsed = parse(body, with_supports)
            times.append(1e3 * (time.perf_counter() - start))
        assert parsed is not None and (parsed.supports is not None) == with_supports
        return min(times)

    supports = parse(body).supports
    text = json.dumps(masks, separators=(",", ":")).encode()
    print(
        f"mean {counts.mean():.1f} ids per token: {len(text) / 4096:.1f} bytes of JSON per token, "
        f"{supports.nbytes / 4096:.1f} bytes kept; parsing takes {milliseconds(True):.1f} ms, "
        f"{milliseconds(False):.1f} ms without"
    )
    assert supports.nbytes == 4 * (4096 + counts.sum())
