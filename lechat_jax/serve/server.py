"""The running server: uvicorn on a socket, and how signals end it."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from lechat_jax.serve.engine import Engine

LAST = 5  # seconds for connections to close when nothing is answered any more


class Server(uvicorn.Server):
    """uvicorn without its own handling of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone."""
        yield


def configuration(app: ASGIApp) -> uvicorn.Config:
    """Uvicorn's settings: HTTP/1.1 by h11, no log of requests, bounded headers."""
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=LAST,
        h11_max_incomplete_event_size=64 * 1024,
    )


async def serve(app: ASGIApp, engine: Engine, listening: socket.socket, grace: float) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code, 1 if the engine has failed.

    At the first signal new requests are refused, and those that have a row get `grace` seconds to
    end; at a second one they fail at once.
    """
    server, loop = Server(configuration(app)), asyncio.get_running_loop()
    first, second = asyncio.Event(), asyncio.Event()

    def note() -> None:
        (second if first.is_set() else first).set()

    old = {
        number: signal.signal(number, lambda *_: loop.call_soon_threadsafe(note))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    running = asyncio.ensure_future(server.serve(sockets=[listening]))
    told = asyncio.ensure_future(first.wait())
    try:
        await asyncio.wait([running, told], return_when=asyncio.FIRST_COMPLETED)
        engine.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while engine.n_running and not second.is_set():
                    await asyncio.sleep(0.05)
        has_failed = engine.state == "failed"
        await asyncio.to_thread(engine.close)
        server.should_exit = True
        await running
        return int(has_failed)
    finally:
        told.cancel()
        for number, handler in old.items():
            signal.signal(number, handler)
