"""Loads a model and serves it until it is interrupted."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import uvicorn

from star_dist.errors import UserError
from star_dist.inference.pipeline import StarPipeline
from star_dist.serve.app import create_app
from star_dist.serve.limits import Limits

LOOPBACK_HOSTS = ["127.0.0.1", "localhost", "[::1]"]
MAX_CONNECTIONS = 256
STOP_S = 5


def serve(model: str, host: str, port: int, device: str | None, limits: Limits, loopback: bool) -> None:
    """Serves until Ctrl-C. loopback: `host` is this machine alone, so requests must address it by its own names.

    Raises:
        UserError: no such model or device, or the address is taken.
    """
    # Before the model is loaded: a port that is taken is found at once.
    listener = _listen(host, port)
    try:
        pipeline = StarPipeline.from_pretrained(model, device)
    except RuntimeError as error:  # what torch raises for a device that is not there
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None
    name = pipeline.origin.run_name if pipeline.origin else Path(model).name
    if not loopback:
        print(f"warning: {host} can be reached from other machines, and this page has no password", file=sys.stderr)
    app = create_app(pipeline, name, limits, LOOPBACK_HOSTS if loopback else None)
    config = uvicorn.Config(
        app, log_level="warning", limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=STOP_S
    )
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {name} at http://{shown}:{listener.getsockname()[1]}  (Ctrl-C ends it)", flush=True)
    uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
        return listener
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; change --host or --port"
        ) from None
