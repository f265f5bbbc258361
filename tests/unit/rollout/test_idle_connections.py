"""Connections between the turns of an episode: the client drops an idle one before SGLang closes it."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web
from sglang.srt.environ import envs

from megatron_vespo.rollout import engine_client


async def num_connections(pause_s: float) -> int:
    """Return how many connections two requests use that are `pause_s` apart."""
    peers = set()

    async def answer(request: web.Request) -> web.Response:
        peers.add(request.transport.get_extra_info("peername"))
        return web.Response()

    app = web.Application()
    app.router.add_post("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        async with engine_client.engine_session(10.0) as session:
            for _ in range(2):
                async with session.post(url) as response:
                    await response.read()
                await asyncio.sleep(pause_s)
    finally:
        await runner.cleanup()
    return len(peers)


def test_the_client_is_the_first_to_give_up_an_idle_connection(monkeypatch):
    assert 2 * engine_client.KEEP_ALIVE_S < envs.SGLANG_TIMEOUT_KEEP_ALIVE.get()
    monkeypatch.setattr(engine_client, "KEEP_ALIVE_S", 0.2)
    assert asyncio.run(num_connections(0.5)) == 2


@pytest.mark.parametrize("pause_s", [0.0, 0.1])
def test_a_connection_is_used_again(pause_s):
    assert asyncio.run(num_connections(pause_s)) == 1
