"""Runs the sandbox as a process (``python -m cluster.dodo_sandbox.server``) or in a thread, for tests and notebooks.

It listens on 127.0.0.1 unless ``--host`` says otherwise, and logs no request, header or key.
"""

import argparse
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from billing.clock import Clock, now_ms
from cluster.dodo_sandbox.app import create_app
from cluster.dodo_sandbox.faults import ABORT_EXTENSION

DEFAULT_PORT = 8010
START_TIMEOUT_S = 10.0
BACKLOG = 512


class AbortableProtocol(H11Protocol):
    """Adds the extension with which the application closes a connection without an answer."""

    def handle_events(self) -> None:
        super().handle_events()
        if self.scope is not None:
            self.scope["extensions"] = {ABORT_EXTENSION: {"abort": self.transport.abort}}


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises OSError if the port is taken."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host, port))
    bound.listen(BACKLOG)
    return bound


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def make_server(
    bound: socket.socket, state_dir: Path, api_key: str, webhook_secret: str | None, clock: Clock = now_ms
) -> uvicorn.Server:
    app = create_app(state_dir, api_key=api_key, clock=clock, webhook_secret=webhook_secret, public_url=url_of(bound))
    config = uvicorn.Config(
        app, http=AbortableProtocol, ws="none", lifespan="on", log_level="warning", access_log=False,
        timeout_graceful_shutdown=1, server_header=False,
    )  # fmt: skip
    return uvicorn.Server(config)


class SandboxServer:
    """A sandbox in a thread of this process: ``with SandboxServer(folder, "key") as sandbox: sandbox.url``."""

    def __init__(
        self, state_dir: Path, api_key: str, *, webhook_secret: str | None = None, port: int = 0, clock: Clock = now_ms
    ) -> None:
        self._socket = listen("127.0.0.1", port)
        self.url = url_of(self._socket)
        self.api_key = api_key
        self._server = make_server(self._socket, state_dir, api_key, webhook_secret, clock)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> "SandboxServer":
        self._thread.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the Dodo sandbox did not start")
            time.sleep(0.005)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(START_TIMEOUT_S)
        self._socket.close()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dodo-sandbox", description="A sandbox that imitates Dodo Payments. No money is real."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="port to listen on, 0 for any free one (default: %(default)s)"
    )
    parser.add_argument("--state", type=Path, required=True, help="folder for its state")
    parser.add_argument(
        "--api-key",
        default=os.environ.get("DODO_PAYMENTS_API_KEY"),
        help="the API key that it accepts (default: $DODO_PAYMENTS_API_KEY)",
    )
    parser.add_argument(
        "--webhook-secret",
        default=os.environ.get("DODO_PAYMENTS_WEBHOOK_KEY"),
        help="signs all webhooks, whsec_… (default: $DODO_PAYMENTS_WEBHOOK_KEY, else one for each endpoint)",
    )
    arguments = parser.parse_args(argv)
    if not arguments.api_key:
        parser.error("the API key is missing: give --api-key or set DODO_PAYMENTS_API_KEY")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGINT or SIGTERM. Exits with a message if the port is taken or the secret is invalid."""
    arguments = parse(argv)
    try:
        bound = listen(arguments.host, arguments.port)
    except OSError as error:
        raise SystemExit(f"cannot listen on {arguments.host}:{arguments.port}: {error.strerror}") from None
    try:
        server = make_server(bound, arguments.state, arguments.api_key, arguments.webhook_secret)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(f"Dodo sandbox (no real money) on {url_of(bound)}", flush=True)
    server.run(sockets=[bound])


if __name__ == "__main__":
    main()
