"""Load generator: users in a closed loop of streamed completions, and the times of their events."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lechat_jax.errors import BadInput
from parity.bench.servers.times import Span, Stream

PATIENCE = 600.0  # seconds without a line after which a server counts as stuck
AFTER = 8  # new tokens of the long prompt, in whose time the gaps end that it has made


class Request(NamedTuple):
    """A prompt, and how many tokens are to follow it."""

    prompt: str
    new_tokens: int


class Measured(NamedTuple):
    """Usual traffic, and then the same while a long prompt is read, if there is one."""

    usual: Span
    loaded: Span | None = None
    long: Stream | None = None


async def read_stream(
    lines: AsyncIterator[bytes], clock: Callable[[], float] = time.perf_counter
) -> Stream:
    """Reads server-sent events to their end; whatever is no line of data is skipped.

    Raises:
        BadInput: the server sent an error, or the stream ended without a count of its tokens.
    """
    sent, events, usage, other = clock(), [], None, b""
    async for line in lines:
        if not line.startswith(b"data: "):
            other = line.strip() or other
            continue
        at = clock()
        if (data := line[6:].strip()) == b"[DONE]":
            break
        fields: dict[str, Any] = json.loads(data)
        if "error" in fields:
            raise BadInput(f"the server answered {fields['error']}")
        if any(choice["text"] for choice in fields["choices"]):
            events.append(at)
        usage = fields.get("usage") or usage
    if usage is None:
        raise BadInput(f"the stream ended early, with {other[:200].decode(errors='replace')!r}")
    return Stream(sent, events, usage["completion_tokens"], usage["prompt_tokens"])


async def complete(port: int, fields: dict[str, Any], request: Request) -> Stream:
    """Streams one completion over a connection of its own: greedy, of all tokens asked for.

    Raises:
        BadInput: there is no answer, it is an error, or it has fewer tokens.
    """
    asked = {"prompt": request.prompt, "max_tokens": request.new_tokens, "temperature": 0}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(asked | stream | fields).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError as error:
        raise BadInput(f"the server takes no request: {error}") from error

    async def lines() -> AsyncIterator[bytes]:
        while line := await asyncio.wait_for(reader.readline(), PATIENCE):
            yield line  # servers send an event in one chunk, so that no line is torn

    try:
        writer.write(head.encode() + body)
        answer = await read_stream(lines())
    except OSError as error:
        raise BadInput(f"the server has left a request: {error or 'no answer'}") from error
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    if answer.new_tokens != request.new_tokens or not answer.events:
        raise BadInput(f"of {request.new_tokens} tokens the server made {answer.new_tokens}")
    return answer


async def measure(
    send: Callable[[Request], Awaitable[Stream]],
    users: Sequence[Iterator[Request]],
    warm_up: float,
    seconds: float,
    long_prompt: str | None = None,
) -> Measured:
    """Times of streams while each user sends its next request as soon as one is answered.

    Once each user has had an answer, but not before `warm_up` seconds, `seconds` of them are
    measured; then the long prompt is sent, and they are until its first tokens. What is under way
    then is answered, but no more is sent.

    Args:
        send: answers a request by a `Stream`.
        users: the requests of each user.
        warm_up: seconds before it is measured.
        seconds: seconds of usual traffic.
        long_prompt: the long prompt, if any.

    Raises:
        BadInput: an answer was an error, or did not come.
    """
    is_over, streams = asyncio.Event(), []
    is_answered = [asyncio.Event() for _ in users]

    async def user(requests: Iterator[Request], is_answered: asyncio.Event) -> None:
        while not is_over.is_set():
            streams.append(await send(next(requests)))
            is_answered.set()

    async def director() -> tuple[float, float, Stream | None]:
        await asyncio.sleep(warm_up)
        for event in is_answered:
            await event.wait()
        began = time.perf_counter()
        await asyncio.sleep(seconds)
        ended = time.perf_counter()
        long = await send(Request(long_prompt, AFTER)) if long_prompt else None
        is_over.set()
        return began, ended, long

    try:
        async with asyncio.TaskGroup() as group:
            directing = group.create_task(director())
            for requests, event in zip(users, is_answered, strict=True):
                group.create_task(user(requests, event))
    except ExceptionGroup as group:  # of the tasks, the first of which says why
        raise group.exceptions[0] from None
    began, ended, long = directing.result()
    loaded = Span(long.sent, long.events[-1], streams) if long else None
    return Measured(Span(began, ended, streams), loaded, long)
