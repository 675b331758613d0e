"""OpenAI-compatible HTTP API over the serving engine: routes, streams (SSE), errors, limits."""

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lechat_jax.errors import BadInput
from lechat_jax.serve.engine import (
    Busy,
    ContextExceeded,
    Engine,
    Failure,
    Ticket,
    Unavailable,
    Update,
)
from lechat_jax.serve.requests import Prepared, Requests, context_error
from lechat_jax.serve.wire import (
    Body,
    Chat,
    Completion,
    Detokenize,
    Refused,
    Tokenize,
    parse,
)

log = logging.getLogger("lechat.serve")

MOST_BYTES = 16 * 2**20  # of a body
BODY_SECONDS = 30.0  # that a body may take to arrive
SEND_SECONDS = 30.0  # that a client may take to read a piece before it counts as gone
PING_SECONDS = 5.0  # without a piece after which a comment says that all is well
PUBLIC = {"/", "/health", "/ready", "/v1/models"}  # without a key, as of other servers

Json = dict[str, Any]


class Access(NamedTuple):
    """Who may use the server.

    Attributes:
        api_key: the key that requests must have; empty for none.
        hosts: names that the Host header may have; empty for any.
        origins: web pages of other hosts that may use it.
    """

    api_key: str = ""
    hosts: frozenset[str] = frozenset()
    origins: tuple[str, ...] = ()


class Api:
    """The routes of the server, over one engine and one model."""

    def __init__(self, engine: Engine, requests: Requests) -> None:
        self._engine, self._requests = engine, requests
        self._created = int(time.time())
        page = files("lechat_jax.serve").joinpath("page.html").read_text(encoding="utf-8")
        self._page = page, {"Content-Security-Policy": content_security_policy(page)}

    def app(self, access: Access) -> Starlette:
        """The ASGI application."""
        get, post = ["GET"], ["POST"]
        return Starlette(
            routes=[
                Route("/", self.page, methods=get),
                Route("/v1/chat/completions", self.chat, methods=post),
                Route("/v1/completions", self.completions, methods=post),
                Route("/v1/models", self.models, methods=get),
                Route("/v1/models/{name:path}", self.model, methods=get),
                Route("/tokenize", self.tokenize, methods=post),
                Route("/detokenize", self.detokenize, methods=post),
                Route("/tokenizer_info", self.tokenizer_info, methods=get),
                Route("/health", self.health, methods=get),
                Route("/ready", self.ready, methods=get),
                Route("/metrics", self.metrics, methods=get),
            ],
            middleware=[
                Middleware(
                    CORSMiddleware,
                    allow_origins=access.origins,
                    allow_methods=["GET", "POST"],
                    allow_headers=["*"],
                ),
                Middleware(Gate, access=access),
            ],
            exception_handlers={
                Refused: refused,
                HTTPException: not_found,
                ClientDisconnect: gone,
                Exception: broken,
            },
        )

    async def page(self, request: Request) -> Response:
        """The chat page."""
        text, headers = self._page
        return Response(text, headers=headers, media_type="text/html")

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        body = await read(request, Chat)
        return await self._respond(request, await run_in_threadpool(self._requests.chat, body))

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        body = await read(request, Completion)
        prepared = await run_in_threadpool(self._requests.completion, body)
        return await self._respond(request, prepared)

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/NAME`."""
        if (name := request.path_params["name"]) != self._requests.name:
            raise Refused(f"the model {name!r} is not here", 404, code="model_not_found")
        return JSONResponse(self._model())

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`: the ids of a text or a conversation, as of vLLM."""
        body = await read(request, Tokenize)
        tokenizer = self._requests.tokenizer

        def encoded() -> list[int]:
            if body.messages is not None:
                return self._requests.chat_prompt(body.messages, body.tools or None).ids
            if (text := body.prompt) is None:
                raise Refused("there is neither a prompt nor messages", param="prompt")
            if (id_ := tokenizer.control_id(text)) is not None:  # what a client asks for by name
                return [id_]
            try:
                ids = tokenizer.encode(text)
            except BadInput as error:
                raise Refused(str(error), param="prompt") from error
            return ids if body.add_special_tokens is False else [tokenizer.bos_id, *ids]

        ids = await run_in_threadpool(encoded)
        most = self._engine.model.context
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": most})

    async def detokenize(self, request: Request) -> Response:
        """`POST /detokenize`: the text of ids, as of vLLM."""
        body = await read(request, Detokenize)
        try:
            text = await run_in_threadpool(self._requests.tokenizer.decode, body.tokens)
        except BadInput as error:
            raise Refused(str(error), param="tokens") from error
        return JSONResponse({"prompt": text})

    async def tokenizer_info(self, request: Request) -> Response:
        """`GET /tokenizer_info`: names of the control tokens, as of vLLM."""
        tokenizer = self._requests.tokenizer
        names = {"bos_token": "<s>", "eos_token": "</s>"}
        known = {key: name for key, name in names.items() if tokenizer.control_id(name) is not None}
        version = {"tokenizer_class": "MistralCommon", "tokenizer_version": tokenizer.version}
        return JSONResponse(known | version | {"chat_template": None})

    async def health(self, request: Request) -> Response:
        """`GET /health`: whether the engine works, whatever it has to do."""
        if self._engine.state == "failed" or self._engine.is_stalled:
            raise Refused("the engine does not answer", 503, kind="unavailable_error")
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """`GET /ready`: whether requests are taken."""
        if self._engine.state != "ready":
            raise Refused(f"the server is {self._engine.state}", 503, kind="unavailable_error")
        return await self.health(request)

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`: Prometheus's text."""
        return Response(self._engine.metrics.text(), media_type="text/plain; version=0.0.4")

    def _model(self) -> Json:
        model = self._engine.model
        return {
            "id": self._requests.name,
            "object": "model",
            "created": self._created,
            "owned_by": "lechat",
            "max_model_len": model.context,
            # As of Mistral's own API.
            "capabilities": {"completion_chat": True, "vision": model.config.vision is not None},
        }

    async def _respond(self, request: Request, prepared: Prepared) -> Response:
        updates = Updates(len(prepared.requests))
        try:
            sinks = [updates.sink(i) for i in range(len(prepared.requests))]
            tickets = await run_in_threadpool(self._engine.enqueue, prepared.requests, sinks)
        except Busy as error:
            raise Refused(str(error), 429, kind="rate_limit_error", code="queue_full") from error
        except Unavailable as error:
            raise Refused(str(error), 503, kind="unavailable_error") from error
        except ContextExceeded as error:
            raise context_error(error, "messages") from error  # a prompt is checked before
        except BadInput as error:
            raise Refused(str(error)) from error
        answering = Answering(prepared, tickets, updates)
        if prepared.body.stream:
            return EventStream(answering)
        return await answering.complete(request)


class Updates:
    """Carries updates of several choices from the engine's thread to the event loop."""

    def __init__(self, n_choices: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._left = n_choices

    def sink(self, index: int) -> Callable[[Update], None]:
        """What the engine calls with the updates of one choice."""

        def put(update: Update) -> None:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, update))

        return put

    async def next(self) -> tuple[int, Update] | None:
        """The next update of any choice; `None` when all have ended."""
        if not self._left:
            return None
        index, update = await self._queue.get()
        self._left -= update.is_last
        return index, update


class Answering:
    """An answer that is being made: its choices and what the engine tells of them."""

    def __init__(self, prepared: Prepared, tickets: Sequence[Ticket], updates: Updates) -> None:
        self._prepared, self._tickets, self._updates = prepared, tickets, updates

    async def complete(self, request: Request) -> Response:
        """The answer in one piece; nothing is made any more once the client has gone."""
        answer, choices = self._prepared.answer, self._prepared.choices

        async def collect() -> Response:
            for choice in choices:
                choice.begin()
            async for _ in self._chunks():
                pass
            self._count()
            return JSONResponse(answer.complete([choice.complete() for choice in choices]))

        try:
            return await unless_gone(request.receive, collect())
        finally:
            self.cancel()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events; a comment now and then while there is none."""
        answer, with_usage = self._prepared.answer, self._prepared.body.wants_usage
        try:
            for choice in self._prepared.choices:
                if first := choice.begin():
                    yield event(answer.chunk(first, with_usage))
            async for chunk in self._chunks(PING_SECONDS):
                yield event(answer.chunk(chunk, with_usage)) if chunk else b": ping\n\n"
            if with_usage:
                self._count()
                yield event(answer.last())
            yield b"data: [DONE]\n\n"
        except Refused as error:
            yield event(error.body())
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Frees the rows of all choices."""
        for ticket in self._tickets:
            ticket.cancel()

    async def _chunks(self, patience: float | None = None) -> AsyncIterator[Json | None]:
        """The chunks of all choices as they come; `None` after so many seconds without one."""
        waiting: asyncio.Task[tuple[int, Update] | None] | None = None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(self._updates.next())
                done, _ = await asyncio.wait([waiting], timeout=patience)
                if not done:
                    yield None
                    continue
                update, waiting = waiting.result(), None
                if update is None:
                    return
                index, news = update
                if news.failure:
                    raise of_failure(news.failure)
                for chunk in self._prepared.choices[index].take(news):
                    yield chunk
        finally:
            if waiting:
                waiting.cancel()

    def _count(self) -> None:
        """Counts tokens: each prompt once, and the answers of all choices."""
        usage, n = self._prepared.answer.usage, self._prepared.body.n or 1
        for ticket in self._tickets[::n]:
            usage.prompt += len(ticket.request.prompt)
            usage.cached += ticket.n_cached
        usage.completion = sum(choice.n_tokens for choice in self._prepared.choices)


class EventStream(Response):
    """A stream of server-sent events that ends as soon as its client has gone, or stalls."""

    def __init__(self, answering: Answering) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""

        async def put(message: Json) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)

        async def stream() -> None:
            start = {"status": self.status_code, "headers": self.raw_headers}
            await put({"type": "http.response.start"} | start)
            async with contextlib.aclosing(self._answering.events()) as events:
                async for text in events:
                    await put({"type": "http.response.body", "body": text, "more_body": True})
            await put({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_gone(receive, stream())
        except (ClientDisconnect, TimeoutError, OSError):
            log.debug("a client left, or stopped reading")
        finally:
            self._answering.cancel()


class Gate:
    """ASGI middleware: Host header and API key.

    A page of another host can make a browser send requests here by DNS rebinding; they have its
    name in their Host header, which a server on localhost therefore does not accept.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        # A base URL may end with a slash, and so may the path of a probe.
        scope["path"] = re.sub("//+", "/", scope["path"]).rstrip("/") or "/"
        try:
            self._check(request, scope["path"])
        except Refused as error:
            await (await refused(request, error))(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, request: Request, path: str) -> None:
        host = re.sub(r":\d+$", "", request.headers.get("host", "")).strip("[]").lower()
        if self._access.hosts and host not in self._access.hosts:
            raise Refused(f"this server is not reached as {host!r}", 403, code="host_not_allowed")
        if self._access.api_key and path not in PUBLIC and not path.startswith("/v1/models/"):
            given = request.headers.get("authorization", "").encode()
            right = f"Bearer {self._access.api_key}".encode()
            if hashlib.sha256(given).digest() != hashlib.sha256(right).digest():
                raise Refused(
                    "the API key is missing or wrong",
                    401,
                    kind="authentication_error",
                    code="invalid_api_key",
                )


async def read(request: Request, form: type[Body]) -> Body:
    """Reads and validates a JSON body; raises `Refused`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(f"the body must be application/json, and is {kind or 'untyped'}", 415)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BYTES:
                    raise Refused(f"the body is larger than {MOST_BYTES} bytes", 413)
    except TimeoutError as error:
        raise Refused("the body did not arrive in time", 408) from error
    return await run_in_threadpool(parse, bytes(body), form)


async def unless_gone(receive: Receive, work: Any) -> Any:
    """The result of `work`, which is cancelled once the client has gone.

    Raises:
        ClientDisconnect: it has.
    """

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def event(message: Json) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(message, ensure_ascii=False).encode() + b"\n\n"


def of_failure(failure: Failure) -> Refused:
    """The error of OpenAI's API for a request that failed on the way."""
    if failure.kind == "unavailable":
        return Refused(failure.message, 503, kind="unavailable_error")
    return Refused(failure.message, 500, kind="server_error")


def content_security_policy(page: str) -> str:
    """A policy under which the page's own script and style run, and nothing else does."""

    def hashed(tag: str) -> str:
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()

    return (
        f"default-src 'none'; connect-src 'self'; script-src 'sha256-{hashed('script')}'; "
        f"style-src 'sha256-{hashed('style')}'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )


async def refused(request: Request, error: Exception) -> Response:
    """An error in OpenAI's shape."""
    assert isinstance(error, Refused)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error.body(), error.status, headers)


async def not_found(request: Request, error: Exception) -> Response:
    """No such route or method, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    why = {404: f"there is no {request.url.path}", 405: f"{request.method} is not possible here"}
    shaped = Refused(why.get(error.status_code, error.detail), error.status_code)
    return JSONResponse(shaped.body(), error.status_code, error.headers)


async def gone(request: Request, error: Exception) -> Response:
    """What nobody reads any more."""
    return Response(status_code=499)


async def broken(request: Request, error: Exception) -> Response:
    """A mistake of the server's own: its traceback is for the log and not for the client."""
    return JSONResponse(Refused("the server failed", kind="server_error").body(), 500)
