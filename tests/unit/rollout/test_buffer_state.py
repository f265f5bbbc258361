"""A rollout buffer's state as bytes: everything comes back, and other prompts are refused."""

import io

import numpy as np
import pytest

from megatron_vespo.rollout.buffer import PendingGroup
from megatron_vespo.rollout.buffer_state import pack_pending, unpack_pending
from megatron_vespo.types import Completion, Prompt
from tests.support.earlier_arrays import as_before

PROMPTS = {number: Prompt(number, [number, 1, 2], "42", "six by seven") for number in (3, 5, 8)}
LAYERS, EXPERTS = 2, 2


def partial(prompt: Prompt, length: int, reason: str, reward: float | None, moe: bool) -> Completion:
    rng = np.random.default_rng(length)
    routes = rng.integers(0, 256, (len(prompt.token_ids) + length - 1, LAYERS, EXPERTS)).astype(np.uint8)
    return Completion(
        prompt, rng.integers(0, 99, length).tolist(), -rng.random(length, np.float32),
        rng.integers(0, 9, length), routes if moe else None, reason, 0.7, reward, "timeout", -0.25,
    )  # fmt: skip


@pytest.mark.parametrize("moe", [False, True])
def test_drafts_come_back_bit_by_bit_in_their_places(moe):
    finished = [partial(PROMPTS[3], 4, "stop", 1.0, moe), partial(PROMPTS[3], 2, "length", 0.0, moe)]
    finished[0].routed_experts, finished[0].num_retractions = None, 2
    begun = [None, partial(PROMPTS[8], 3, "abort", None, moe)]
    state = [
        PendingGroup(17, PROMPTS[3], 0, finished),
        PendingGroup(18, PROMPTS[5], 2, []),
        PendingGroup(20, PROMPTS[8], 1, begun),
        PendingGroup(21, PROMPTS[8], 0, [None, None]),
    ]
    packed = pack_pending(state)
    for stored in (packed, of_earlier_version(packed)):
        compare(state, unpack_pending(stored, PROMPTS))


def of_earlier_version(packed: bytes) -> bytes:
    with np.load(io.BytesIO(packed)) as stored:
        arrays = as_before(dict(stored))
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def compare(state: list[PendingGroup], back: list[PendingGroup]) -> None:
    assert [(p.serial, p.prompt, p.attempts, len(p.partials), p.is_finished) for p in back] == [
        (17, PROMPTS[3], 0, 2, True), (18, PROMPTS[5], 2, 0, False), (20, PROMPTS[8], 1, 2, False),
        (21, PROMPTS[8], 0, 2, False),
    ]  # fmt: skip
    for before, after in zip(state, back, strict=True):
        for one, other in zip(before.partials, after.partials, strict=True):
            assert (one is None) == (other is None)
            for name, value in vars(one).items() if one else ():
                found = getattr(other, name)
                if isinstance(value, np.ndarray):
                    assert found.dtype == value.dtype and found.tobytes() == value.tobytes(), name
                else:
                    assert found == value, name


def test_nothing_pending_is_a_state_too():
    assert unpack_pending(pack_pending([]), PROMPTS) == []


def test_other_prompts_and_broken_bytes_are_refused():
    packed = pack_pending([PendingGroup(0, PROMPTS[5], 0, [])])
    for prompts in ({}, {5: Prompt(5, [9], "", "")}):
        with pytest.raises(ValueError, match="^prompt 5 was in flight .* --prompt-data, the tokenizer"):
            unpack_pending(packed, prompts)
    with pytest.raises(ValueError, match="^the checkpoint's rollout buffer cannot be read"):
        unpack_pending(packed[:-30], PROMPTS)


def test_an_episode_that_ends_with_an_observation_keeps_its_routes():
    """The observation has entered no pass yet, and the next response's routes follow in the file."""
    observed = partial(PROMPTS[3], 4, "abort", None, True).with_given(np.array([7, 8], np.int32), "tool")
    pending = [PendingGroup(17, PROMPTS[3], 0, [observed, partial(PROMPTS[3], 2, "stop", None, True)])]
    [back] = unpack_pending(pack_pending(pending), PROMPTS)
    for before, after in zip(pending[0].partials, back.partials, strict=True):
        assert before is not None and after is not None and before.segments == after.segments
        np.testing.assert_array_equal(before.routed_experts, after.routed_experts)
        np.testing.assert_array_equal(before.token_ids, after.token_ids)
        np.testing.assert_array_equal(before.log_probs, after.log_probs)
