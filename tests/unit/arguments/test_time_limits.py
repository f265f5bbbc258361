"""Limits that a slow disk reaches: what waits for how long, and who waits for whom."""

import asyncio
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from megatron_vespo.arguments.time_limits import (
    TIME_LIMITS,
    check_timeout_s,
    collective_timeout_minutes,
    longest_engine_step_s,
    sync_timeout_s,
)
from megatron_vespo.arguments.training_flags import add_vespo_arguments
from megatron_vespo.weight_sync.engine_admin import EngineAdmin, EnginesLostError
from megatron_vespo.weight_sync.verify import check_against_checkpoint
from tests.support.engine_stub import EngineStub

PAGE = Path(__file__).parents[3] / "docs/guides/fault-tolerance.md"
GB_OF_30B = 61.0
SUMS = {"embed": "0a"}


def limits(*argv: str) -> Namespace:
    parser = add_vespo_arguments(ArgumentParser())
    return parser.parse_args(argv)


class SlowEngine(EngineStub):
    """Loads a checkpoint for `seconds`, as from a slow disk; everything else is done at once."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds

    async def respond(self, path, body):
        if "model_path" in body:
            await asyncio.sleep(self.seconds)
        return {"success": True, "ranks": [{"checksums": SUMS, "parallelism_info": [{"rank": 0}]}]}


def test_an_engine_that_loads_slowly_is_not_lost(tmp_path):
    """A three-hundredth of the seconds: the load takes longer than any other call may."""
    args = limits()
    sync, load = args.weight_sync_timeout / 300, args.weight_check_timeout / 300
    with SlowEngine(1.5 * sync) as engine:
        admin = EngineAdmin([engine.url], sync)
        check_against_checkpoint(admin, SUMS, tmp_path, 3, load)
        with pytest.raises(EnginesLostError, match="nothing within 0.1 s"):  # the limit is one
            check_against_checkpoint(admin, SUMS, tmp_path, 3, 0.1)


def test_defaults_are_enough_for_61_gb_from_a_slow_disk():
    args, seconds = limits(), GB_OF_30B / 0.0525
    assert args.engine_start_timeout > seconds + 600 and args.worker_start_timeout > seconds + 600
    assert args.weight_check_timeout > seconds
    assert longest_engine_step_s(args.engine_start_timeout, args.weight_check_timeout) == 1800


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--weight-check-timeout 7200",
        "--weight-sync-timeout 1200",
        "--worker-start-timeout 10000",
        "--weight-check-timeout 1 --weight-sync-timeout 1 --worker-start-timeout 1",
    ],
)
def test_ranks_in_a_collective_outlive_the_one_that_they_wait_for(argv):
    args = limits(*argv.split())
    longest = max(args.worker_start_timeout, sync_timeout_s(args), check_timeout_s(args))
    minutes = collective_timeout_minutes(args, None)
    assert minutes >= 60 and minutes * 60 > longest
    least = int(longest // 60) + 1
    assert collective_timeout_minutes(args, least) == least
    for given in (least - 1, 0):
        with pytest.raises(ValueError) as error:
            collective_timeout_minutes(args, given)
        said = str(error.value)
        assert said.startswith(f"--distributed-timeout-minutes {given}: ") and f"at least {least}," in said
        assert "\n" not in said


def test_the_page_has_every_limit_with_its_default():
    rows = re.findall(r"^\| `(--[a-z-]+)` \| ([\d,]+) s \| (.*) \| (.*) \|$", PAGE.read_text(), re.M)
    assert [(flag, float(seconds.replace(",", "")), until, why) for flag, seconds, until, why in rows] == [
        (limit.flag, limit.default, limit.until, limit.why) for limit in TIME_LIMITS
    ]
