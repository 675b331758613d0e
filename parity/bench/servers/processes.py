"""Servers as processes: `lechat serve` and `transformers serve`, on the same weights."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lechat_jax.errors import BadInput
from parity.bench.isolated import reason

START_SECONDS = 600.0  # that a server may take to load and compile
END_SECONDS = 60.0  # that it may take to end


@dataclasses.dataclass(frozen=True)
class Server:
    """How a server is started, and how it is asked.

    Attributes:
        impl: whose it is.
        mode: which of its ways to serve it is.
        command: the command line without the port.
        ready: path that answers 200 once requests are taken.
        fields: what requests need besides OpenAI's fields to be the same for all servers.
    """

    impl: str
    mode: str
    command: tuple[str, ...]
    ready: str
    fields: dict[str, Any]

    @contextlib.contextmanager
    def running(self) -> Iterator[int]:
        """The port of the server while it runs.

        Raises:
            BadInput: it could not be started; the message is its last line.
        """
        port = free_port()
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
            process = subprocess.Popen(
                [*self.command, "--port", str(port)],
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
            )
            try:
                self._wait(process, port)
                yield port
            except (BadInput, OSError) as error:
                if process.poll() is None and isinstance(error, BadInput):
                    raise
                process.kill()
                printed.seek(0)
                why = reason(process.wait(), printed.read())
                raise BadInput(f"{self.impl} serve has ended: {why}") from error
            finally:
                end(process)

    def _wait(self, process: subprocess.Popen[bytes], port: int) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if process.poll() is not None:
                raise BadInput("it has ended")
            with contextlib.suppress(OSError, urllib.error.HTTPError):
                url = f"http://127.0.0.1:{port}{self.ready}"
                with urllib.request.urlopen(url, timeout=5):
                    return
            time.sleep(0.2)
        raise BadInput(f"{self.impl} serve was not ready after {START_SECONDS:.0f} s")


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a server as a terminal does, and by force if that takes too long."""
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def lechat(folder: Path, rows: int, context: int, dtype: str) -> Server:
    """`lechat serve` of weights in lechat's format."""
    flags = ("--rows", str(rows), "--context", str(context), "--dtype", dtype)
    command = (sys.executable, "-m", "lechat_jax.serve", str(folder), *flags)
    return Server("lechat", "", command, "/ready", {"ignore_eos": True})


def transformers(folder: Path, dtype: str) -> list[Server]:
    """The ways of `transformers serve` to serve weights in Hugging Face's format.

    Raises:
        BadInput: a package is missing.
    """
    for package in ("torch", "transformers", "fastapi", "uvicorn", "openai"):
        if importlib.util.find_spec(package) is None:
            raise BadInput(
                f"it needs {package}, which is not installed: pip install 'transformers[serving]'"
            )
    start = (sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder))
    shared = ("--host", "127.0.0.1", "--dtype", dtype)
    # It refuses `ignore_eos`, but takes any setting of its own: no id is -1.
    settings = json.dumps({"eos_token_id": -1, "pad_token_id": 0})
    fields = {"model": str(folder), "generation_config": settings}
    return [
        Server("transformers", mode, (*start, *shared, *flags), "/health", fields)
        for mode, flags in (
            ("sequential", ()),
            ("continuous-batching", ("--continuous-batching",)),
        )
    ]
