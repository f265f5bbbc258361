"""Asynchronous reward functions that wait, hang, block and fail. Workers import them by name."""

import asyncio
import os
import re
import sys
import time


async def by_command(response: str, answer: str, metadata: dict):
    """What `response` asks for, for example "wait 0.5"; the reward is the answer's."""
    command, _, argument = response.partition(" ")
    if command == "wait":
        await asyncio.sleep(float(argument))
    elif command == "work":
        time.sleep(float(argument))
    elif command == "block":  # the others have begun by then
        await asyncio.sleep(0.1)
        time.sleep(float(argument))
    elif command == "block-in-c":
        await asyncio.sleep(0.1)
        re.match(r"(a+)+$", "a" * 60 + "b")
    elif command == "swallow":
        while True:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                pass
    elif command == "cancel":
        raise asyncio.CancelledError
    elif command == "fill":
        await asyncio.sleep(0.1)
        return len(bytearray(int(argument)))
    elif command == "exit":
        await asyncio.sleep(0.1)
        sys.exit(int(argument))
    elif command == "raise":
        raise KeyError(argument)
    elif command == "raise-late":
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            raise RuntimeError(argument) from None
    elif command == "pid":
        return os.getpid()
    return float(answer)


class Judge:
    """An object whose call is a coroutine function."""

    async def __call__(self, response: str, answer: str, metadata: dict) -> float:
        return 1.0


judge = Judge()
