"""Finds ports of this machine for SGLang servers, their rendezvous, and the trainer's rendezvous."""

from __future__ import annotations

import random
import socket

# below Linux's ephemeral range (32768), which outgoing connections draw from
PORT_RANGE = range(30000, 31000)
PORT_LANES = 40
# By default each SGLang server draws its rendezvous port at random and binds it much later. Two engines that
# start together could draw the same one. With this offset, distinct HTTP ports make these ports distinct.
RENDEZVOUS_PORT_OFFSET = 1000


class PortError(RuntimeError):
    """This port cannot be used, and a retry does not help."""


def require_free_ports(host: str, port: int) -> None:
    """Raise PortError if an engine cannot listen on `host:port`, or on the port of its rendezvous."""
    _require_free_port(host, port, "the rollout engine")
    rendezvous = f"the rollout engine on port {port} (its rendezvous)"
    _require_free_port(host, port + RENDEZVOUS_PORT_OFFSET, rendezvous)


def _require_free_port(host: str, port: int, owner: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            raise PortError(
                f"{owner} cannot listen on {host}:{port} ({error}); choose another port with --rollout-port"
            ) from error


def find_free_port(host: str, number: int | None = None) -> int:
    """A random port that is free now; its rendezvous port is free, too.

    An engine listens on it minutes later, so two engines could draw the same port. With `number`, a run's
    engines draw from disjoint sets of ports, for up to PORT_LANES engines per node.
    """
    ports = PORT_RANGE if number is None else PORT_RANGE[number % PORT_LANES :: PORT_LANES]
    for port in random.SystemRandom().sample(ports, len(ports)):
        try:
            require_free_ports(host, port)
        except PortError:
            continue
        return port
    raise PortError(f"no free port on {host} in {PORT_RANGE.start}..{PORT_RANGE.stop - 1}")
