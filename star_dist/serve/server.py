"""Loads a model and serves it until it is interrupted."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from dataclasses import replace

import uvicorn

from star_dist.errors import UserError
from star_dist.inference import memory
from star_dist.inference.pipeline import StarPipeline
from star_dist.serve.app import create_app
from star_dist.serve.limits import Limits

LOOPBACK_HOSTS = ["127.0.0.1", "localhost", "::1"]
MAX_CONNECTIONS = 256
STOP_S = 5


class Server(uvicorn.Server):
    """Ends the drawings before the connections, which streams of their states would hold open for `STOP_S`."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.worker.end()
        await super().shutdown(sockets)


def serve(load: Callable[[], StarPipeline], host: str, port: int, limits: Limits, loopback: bool) -> None:
    """Serves what `load` gives until Ctrl-C. loopback: `host` is this machine alone, so requests must address it by its
    own names.

    Raises:
        UserError: no such model or device, the address is taken, or there is no memory to draw with.
    """
    # Before the model is loaded: a port that is taken is found at once.
    listener = _listen(host, port)
    pipeline = load()
    limits = fitting_limits(pipeline, limits)
    name = pipeline.origin.run_name if pipeline.origin else "star"
    if not loopback:
        print(f"warning: {host} can be reached from other machines, and this page has no password", file=sys.stderr)
    app = create_app(pipeline, name, limits, [*LOOPBACK_HOSTS, host] if loopback else None)
    config = uvicorn.Config(
        app, log_level="warning", limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=STOP_S
    )
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {name} at http://{shown}:{listener.getsockname()[1]}  (Ctrl-C ends it)", flush=True)
    Server(config).run(sockets=[listener])


def fitting_limits(pipeline: StarPipeline, limits: Limits) -> Limits:
    """The limits with no more pictures in one drawing than the free memory holds; says so where that is fewer.

    Raises:
        UserError: not even one fits.
    """
    fit = memory.most_pictures(pipeline)
    if fit < 1:
        needed, free = (count / 1e9 for count in (memory.drawing_bytes(pipeline), memory.free_bytes(pipeline.device)))
        raise UserError(
            f"one picture takes about {needed:.3g} GB to draw, and {free:.3g} GB are free on {pipeline.device}; free "
            f"some, or choose another --device"
        )
    if fit >= limits.pictures:
        return limits
    print(f"warning: {fit} pictures fit the memory, so --max-pictures {limits.pictures} is {fit} here", file=sys.stderr)
    return replace(limits, pictures=fit)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
        return listener
    except (OSError, UnicodeError) as error:  # UnicodeError: two dots in a row, or more letters than a name may have
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host} port {port}: {reason}; change --host or --port") from None
