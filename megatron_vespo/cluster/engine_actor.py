"""A Ray actor that runs and supervises one SGLang server on its node."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_vespo.arguments.engines import EngineSettings
from megatron_vespo.cluster.logs import redirect_output
from megatron_vespo.cluster.placement import host_address
from megatron_vespo.rollout.sglang_server import EngineError, EnginePortError, SGLangServer
from megatron_vespo.system.plugins import load_runtime_plugins
from megatron_vespo.system.ports import PortError, find_free_port, require_free_ports
from megatron_vespo.system.preemption import shield_process


class EngineActor:
    """Runs and supervises one server, which dies with the actor."""

    def __init__(
        self,
        settings: EngineSettings,
        number: int,
        server_args: list[str],
        log_dir: Path,
        loopback: bool,
        api_key: str | None,
        exported: Mapping[str, str],
        devices: str | None = None,
    ):
        """`devices` are the GPUs that the server sees; None: those of the actor.

        `exported` are the variables of `process_environment.TABLE` that the user has set.
        """
        shield_process()
        redirect_output(log_dir / f"engine-{number}-supervisor.log")
        # otherwise Ray is the driver's child and has the environment that the plugins set
        if settings.ray_address:
            load_runtime_plugins()
        self._host = host_address(loopback)
        self._settings, self._number, self._server_args = settings, number, server_args
        self._api_key, self._exported, self._devices = api_key, exported, devices
        self._log_path = log_dir / f"engine-{number}.log"
        self._server: SGLangServer | None = None

    def start(self) -> str:
        """Stop the old server, if any, and start a new one. Blocks until it is healthy; returns its url."""
        self.stop()
        port = self._port()
        self._server = SGLangServer(
            str(self._settings.hf_checkpoint), self._host, port, self._server_args, self._log_path,
            self._settings.engine_start_timeout, self._api_key, self._devices, self._exported,
        )  # fmt: skip
        self._server.start()
        return self._server.url

    def _port(self) -> int:
        chosen = self._settings.rollout_port
        try:
            if not chosen:
                return find_free_port(self._host, self._number)
            port = chosen + self._number
            require_free_ports(self._host, port)
        except PortError as error:
            raise (EnginePortError if chosen else EngineError)(str(error)) from error
        return port

    def check(self) -> None:
        """Raises EngineError if the server's process has ended."""
        assert self._server is not None, "start comes first"
        self._server.check()

    def stop(self) -> None:
        """Kill the server's whole process group."""
        if self._server is not None:
            self._server.stop(timeout_s=0)
