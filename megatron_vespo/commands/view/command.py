"""`megatron-vespo view`: serves the page until Ctrl-C."""

from __future__ import annotations

import asyncio
import errno
import secrets
import signal
from typing import NoReturn

from aiohttp import web

from megatron_vespo.commands.view.options import ViewOptions, parse
from megatron_vespo.commands.view.runs import Runs
from megatron_vespo.commands.view.server import make_app

SHUTDOWN_S = 0.5  # that open requests have to end


def main(argv: list[str]) -> NoReturn:
    options = parse(argv)
    asyncio.run(serve(options, Runs(options.runs)))
    raise KeyboardInterrupt  # which has ended it


async def serve(options: ViewOptions, runs: Runs) -> None:
    """Prints the address, and serves until SIGINT or SIGTERM.

    Raises:
        ValueError: the port cannot be used.
    """
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):  # an exception would hit whatever task runs just then
        loop.add_signal_handler(number, ended.set)
    token = secrets.token_urlsafe(24)
    runner = web.AppRunner(make_app(runs, token, options.host), access_log=None, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    try:
        site = web.TCPSite(runner, options.host, options.port)
        try:
            await site.start()
        except OSError as error:
            raise ValueError(_port_message(options, error)) from error
        port = runner.addresses[0][1]
        host = f"[{options.host}]" if ":" in options.host else options.host
        number = len(runs.refresh())
        print(f"{number} {'run' if number == 1 else 'runs'}: http://{host}:{port}/?token={token}", flush=True)
        print("Ctrl-C ends.", flush=True)
        await ended.wait()
    finally:
        await runner.cleanup()


def _port_message(options: ViewOptions, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"--port {options.port}: another program listens there; --port 0 takes a free one"
    return f"--host {options.host} --port {options.port}: {error.strerror}"
