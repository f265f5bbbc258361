"""The API of the tab Curves."""

from __future__ import annotations

from aiohttp import web

from megatron_vespo.commands.view.runs import Runs


def routes(runs: Runs) -> list[web.RouteDef]:
    return []
