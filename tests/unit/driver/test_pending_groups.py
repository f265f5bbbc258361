"""A resumed asynchronous run takes over the groups in flight, also if it has a teacher that is new to it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_vespo.driver.batch_sources import _pending_groups
from megatron_vespo.rollout.buffer import PendingGroup
from megatron_vespo.rollout.buffer_state import pack_pending
from megatron_vespo.types import TokenSupports
from tests.support.builders import make_completion, make_prompt

PROMPT = make_prompt(3, [1, 2])
SCORED = make_completion(PROMPT, 2, reward=1.0, teacher_log_probs=np.zeros(2, np.float32))
PLAIN = make_completion(PROMPT, 2, reward=1.0)
BEGUN = make_completion(PROMPT, 1, finish_reason="abort")
TRUNCATED = replace(PLAIN, supports=TokenSupports(np.ones(2, np.int32), PLAIN.token_ids))
WARM = replace(PLAIN, temperature=0.7)


def resumed(partials, teachers) -> PendingGroup:
    services = SimpleNamespace(
        task=SimpleNamespace(prompts=SimpleNamespace(prompts=[PROMPT])), teachers=teachers
    )
    settings = SimpleNamespace(rollout=SimpleNamespace(max_staleness=4))
    [group] = _pending_groups(settings, services, pack_pending([PendingGroup(7, PROMPT, 1, list(partials))]))
    assert (group.serial, group.attempts, len(group.partials)) == (7, 1, len(partials))
    return group


def test_what_a_teacher_has_scored_stays_finished():
    assert resumed([SCORED, SCORED], "a teacher").is_finished


@pytest.mark.parametrize("other", [SCORED, PLAIN, BEGUN])
def test_what_no_teacher_has_scored_waits_for_it(other):
    group = resumed([PLAIN, other], "a teacher")
    assert not group.is_finished
    assert [one.token_ids.tolist() for one in group.partials] == [
        one.token_ids.tolist() for one in (PLAIN, other)
    ]


@pytest.mark.parametrize("unfit", [TRUNCATED, WARM])
def test_what_a_teacher_cannot_score_is_drawn_anew(unfit):
    group = resumed([unfit, PLAIN], "a teacher")
    assert group.partials[0] is None and group.partials[1] is not None and not group.is_finished


@pytest.mark.parametrize("one", [SCORED, PLAIN, TRUNCATED, WARM])
def test_without_a_teacher_all_of_it_is_finished(one):
    assert resumed([one, PLAIN], None).is_finished
