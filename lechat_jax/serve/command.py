"""OpenAI-compatible server for a model: requests are answered together, and stream.

Any folder that `generate` takes. The page at / is for people, /v1 for programs, and /metrics for
Prometheus. A model with a vision tower is shown images there. Needs the extra `serve`:
pip install 'lechat-jax[serve]'.
"""

import asyncio
import contextlib
import dataclasses
import os
import re
import socket
import time
from collections.abc import Sequence

import tyro

import lechat_jax
from lechat_jax.cli import flags
from lechat_jax.cli.display import note
from lechat_jax.devices.compile_cache import enable_compilation_cache
from lechat_jax.errors import BadInput
from lechat_jax.generate.options import ModelOptions
from lechat_jax.tokenizer.vocabulary import no_tokenizer

LOOPBACK = ("127.0.0.1", "localhost", "::1")  # names under which only this machine is reached


@dataclasses.dataclass(frozen=True)
class ServeConfig(ModelOptions):
    """The flags of `python -m lechat_jax.serve`.

    Attributes:
        rows: Requests that are decoded together; others wait. Each row has a KV cache.
        context: Maximum tokens of a request, prompt and answer; a longer one is refused.
        speculate: Speculative decoding by prompt lookup. Answers are then the same up to rounding,
            which depends on who else is there. By default off.
        api_key: Key that clients must send, Authorization: Bearer KEY; by default the environment
            variable LECHAT_API_KEY, and without it none is asked for.
        max_queue: Requests that wait for a row; beyond them the answer is 429.
        prefix_mb: Size in MB of the prefix cache, which keeps the KV caches of prompts that others
            may begin with; 0 is off.
        grace: Seconds that SIGTERM gives to requests that are being answered.
        host: Address to listen on; 0.0.0.0 is all of this machine's, for others to reach.
        port: Port to listen on; 0 takes any that is free.
        allow_origin: Origin of web pages that may use the server, such as https://example.com;
            repeatable, * is all. By default only its own page.
        name: Name of the model in answers. By default that of the folder.
    """

    rows: int = 4
    api_key: str = ""
    max_queue: int = 64
    prefix_mb: int = 256
    grace: float = 30.0
    host: str = "127.0.0.1"
    port: int = 8000
    allow_origin: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    name: str = ""

    def check(self) -> None:
        """Validates the flags before anything is loaded; raises `BadInput`."""
        super().check()
        least = {"rows": 1, "context": 2, "max_queue": 0, "prefix_mb": 0, "grace": 0}
        for field, smallest in least.items():
            if not getattr(self, field) >= smallest:
                name, value = field.replace("_", "-"), getattr(self, field)
                raise BadInput(f"--{name} must be at least {smallest}, not {value}")
        if not 0 <= self.port < 65536:
            raise BadInput(f"--port must be from 0 to 65535, not {self.port}")
        if not re.fullmatch("[!-~]*", self.key):
            raise BadInput(
                "the API key must be of ASCII characters without blanks, since others do not "
                "reach a server in the same form from every client"
            )
        if not self.saved.has_tokenizer:
            raise BadInput(no_tokenizer(self.folder, "nothing can be served"))
        if self.host not in LOOPBACK and not self.key:
            note(f"warning: whoever reaches {self.host} can use it, since there is no --api-key")

    @property
    def key(self) -> str:
        """The key that clients must have; empty for none."""
        return self.api_key or os.environ.get("LECHAT_API_KEY", "")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command `serve`: loads, compiles, listens; returns the exit code."""
    options = flags.parse(ServeConfig, "lechat_jax.serve", __doc__ or "", argv)
    options.check()
    try:
        from lechat_jax.serve.api import Access, Api
        from lechat_jax.serve.engine import Engine
        from lechat_jax.serve.requests import Requests, fingerprint
        from lechat_jax.serve.server import serve
    except ModuleNotFoundError as error:
        raise BadInput(f"{error.name} is not installed: pip install 'lechat-jax[serve]'") from error
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(listen(options.host, options.port))
        note(f"loading {options.folder}")
        began = time.perf_counter()
        enable_compilation_cache()
        model = options.load()
        name = options.name or options.folder.resolve().name
        requests = Requests(model, name, fingerprint(name, lechat_jax.__version__, model.weights))
        engine = Engine(
            model,
            options.rows,
            max_queue=options.max_queue,
            prefix_bytes=options.prefix_mb * 10**6,
            draft=options.n_drafted,
        )
        stack.enter_context(engine)
        hosts = LOOPBACK if options.host in LOOPBACK else ()
        access = Access(options.key, frozenset(hosts), options.allow_origin)
        app = Api(engine, requests).app(access)
        listening.listen()  # now, so that whoever reads the address can connect
        where = f"http://{options.host}:{listening.getsockname()[1]}"
        note(f"{name} at {where} after {time.perf_counter() - began:.1f} s; Ctrl-C ends it")
        return asyncio.run(serve(app, engine, listening, options.grace))


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address, before anything is loaded.

    Raises:
        BadInput: the address is in use, or not this machine's.
    """
    with contextlib.ExitStack() as stack:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            bound = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError as error:
            raise BadInput(
                f"cannot listen on {host}, port {port}: {error.strerror}; choose others with "
                "--host and --port"
            ) from error
        stack.pop_all()
    return bound
