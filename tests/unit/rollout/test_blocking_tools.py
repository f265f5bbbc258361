"""Tools that block: they cost their own episode, and keep no program from ending."""

import subprocess
import sys
import textwrap
import time

PROGRAM = """
import asyncio, time
from megatron_vespo.rollout.tool_environment import ToolEnvironment

def hang():
    '''Never return.'''
    time.sleep(1000)

def work():
    '''Return after a while.'''
    time.sleep(0.3)
    return 7

class Tools(ToolEnvironment):
    functions = (hang, work)

async def main():
    call = '<tool_call>{"name": "%s"}</tool_call>'
    began = time.monotonic()
    steps = await asyncio.gather(*(Tools().step(call % "work") for _ in range(40)))
    assert {step.observation[0]["content"] for step in steps} == {"7"}
    assert time.monotonic() - began < 2  # side by side
    try:
        await asyncio.wait_for(Tools().step(call % "hang"), 0.2)
    except TimeoutError:
        print("late")

asyncio.run(main())
"""


def test_a_tool_that_never_returns_keeps_nothing_running():
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "late\n"), done.stderr
    assert time.monotonic() - began < 30
