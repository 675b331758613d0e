"""Serving engine: requests join and leave a continuous batch, on the one thread that owns JAX.

Whoever submits a request, from any thread, gets updates until it stops. An answer depends on its
request alone: not on who else is there, on its row, or on the order in which requests came.
"""

import dataclasses
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from typing import Literal, NamedTuple

from lechat_jax.devices.platform import platform
from lechat_jax.errors import BadInput
from lechat_jax.generate.continuation import Continuation, Sample, stop_texts
from lechat_jax.generate.continuous_batch import (
    Advance,
    ContinuousBatch,
    Prefill,
    RowTokens,
    TopTokens,
    next_steps,
)
from lechat_jax.generate.loaded_model import LoadedModel, Prompt
from lechat_jax.generate.logits_processors import LogitsProcessing, all_allowed
from lechat_jax.generate.prefill import CHUNKS
from lechat_jax.generate.sampling import Sampling
from lechat_jax.generate.vision import blank_images, starts
from lechat_jax.model.cache import Cache
from lechat_jax.serve.grammar import Matcher
from lechat_jax.serve.metrics import Metrics
from lechat_jax.serve.prefix_cache import PrefixCache
from lechat_jax.tokenizer.images import Image

log = logging.getLogger("lechat.serve")

# Tokens of a prefill chunk. It takes about as long as a step of all rows, so that a stream
# waits little longer than usual while another prompt is read. On a CPU, 16 positions at once are
# read as fast per position as 64.
CHUNK = {"cpu": 16, "gpu": CHUNKS["gpu"][0], "tpu": CHUNKS["tpu"][0]}
MOST_STEPS = 16  # of a call of the decode loop
PATIENCE = 0.05  # seconds of such a call
RECOVERY = 60.0  # seconds after which another failure is not the same one
STALLED = 120.0  # seconds without the end of a round after which something is wrong


class Busy(Exception):
    """The queue is full; ask again later."""


class Unavailable(Exception):
    """The engine takes no requests: it is draining, or has failed."""


class ContextExceeded(BadInput):
    """Prompt and answer together are longer than the context."""


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """A prompt and all on which its continuation depends.

    Attributes:
        prompt: ids, BOS included; at least one.
        max_tokens: maximum new tokens; 0 only reads the prompt.
        sampling: sampling parameters.
        stream: number of the random stream, such as of a choice among several.
        eos_ids: ids that end the text.
        stop: stop texts.
        processing: logits processors.
        matcher: grammar of the text, if any.
        is_scored: whether log-probs of the prompt's own tokens are wanted.
        is_answer: whether the text begins anew after the prompt, as a chat's answer does, and
            does not continue its last word.
        images: images whose ids are in the prompt, in their order.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stream: int = 0
    eos_ids: Collection[int] = ()
    stop: tuple[str, ...] = ()
    processing: LogitsProcessing = dataclasses.field(default_factory=LogitsProcessing)
    matcher: Matcher | None = None
    is_scored: bool = False
    is_answer: bool = False
    images: Sequence[Image] = ()


class Failure(NamedTuple):
    """Why a request ended without an answer."""

    message: str
    kind: Literal["unavailable", "internal"]


SHUTTING_DOWN = Failure("the server is shutting down", "unavailable")
BROKEN = Failure("the server failed while it answered; try again", "internal")


class Update(NamedTuple):
    """What is new of a request.

    Attributes:
        sample: the next piece of the text; its `stopped` says that it was the last.
        top: the likeliest tokens at the place of each of its ids, if they are wanted.
        scores: the prompt's own log-probs, once, if they are wanted.
        failure: why there is no more.
    """

    sample: Sample | None = None
    top: Sequence[TopTokens] = ()
    scores: RowTokens | None = None
    failure: Failure | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing follows."""
        return self.failure is not None or (self.sample is not None and bool(self.sample.stopped))


@dataclasses.dataclass
class SharedPrompt:
    """A prompt that several requests have in common, such as choices: it is read once.

    Attributes:
        reader: who reads it, if anybody does.
        snapshot: the KV cache of all but its last token, once it has been read.
        n_waiting: requests that have not begun.
    """

    reader: "Ticket | None" = None
    snapshot: Cache | None = None
    n_waiting: int = 0


class Ticket:
    """A submitted request, and how far it has come; its attributes are the engine thread's.

    Attributes:
        request: the request.
        n_cached: tokens of the prompt that the prefix cache had.
    """

    def __init__(
        self,
        request: GenerationRequest,
        continuation: Continuation,
        deliver: Callable[[Update], None],
        wake: Callable[[], None],
        shared: SharedPrompt | None = None,
    ) -> None:
        self.request, self.n_cached = request, 0
        self.continuation, self.deliver, self.shared = continuation, deliver, shared
        self.row: int | None = None
        self.prefill: Prefill | None = None
        self.borders: set[int] = set()  # positions of the prompt at which to take a snapshot
        self.held: deque[TopTokens] = deque()  # of tokens that a stop text holds back
        self.submitted = self.latest = time.perf_counter()
        self.has_begun = self.is_over = self.is_cancelled = False
        self._wake = wake

    def cancel(self) -> None:
        """Frees its row within a round, and nothing more is delivered; from any thread."""
        self.is_cancelled = True
        if not self.is_over:
            self._wake()

    @property
    def is_decoding(self) -> bool:
        """Whether its prompt has been read."""
        return self.prefill is not None and self.prefill.is_done

    @property
    def needs_mask(self) -> bool:
        """Whether each of its tokens decides which may come next."""
        return self.is_decoding and self.request.matcher is not None


class Engine:
    """Serving engine: a queue of requests, rows of a continuous batch, and a prefix cache.

    In a round, one chunk of one prompt is read and one call of the decode loop made for all rows
    that are ready. The next call is sent before the last one is fetched, so that detokenising
    takes no time of the device; what a row makes after its stop text is dropped.

    Attributes:
        model: the loaded model.
        metrics: counters and times of requests.
        state: "ready"; "draining" takes no new requests; "failed" none ever again.

    Args:
        n_rows: requests that are decoded together.
        max_queue: requests that wait for a row before others are refused.
        prefix_bytes: size of the prefix cache; 0 is none.
        draft: tokens drafted per step by prompt lookup; 0 is off. With drafts, the rounding of an
            answer may depend on who else is there.

    Raises:
        BadInput: there are no rows, or their KV cache does not fit into memory.
    """

    def __init__(
        self,
        model: LoadedModel,
        n_rows: int = 4,
        *,
        max_queue: int = 64,
        prefix_bytes: int = 0,
        draft: int = 0,
    ) -> None:
        if n_rows < 1 or max_queue < 0 or prefix_bytes < 0:
            raise BadInput(
                f"there must be at least 1 row, and not {n_rows}; a queue ({max_queue}) and a "
                f"prefix cache ({prefix_bytes} bytes) of at least 0"
            )
        model.check_memory(n_rows, draft)
        self.model, self.state, self.metrics = model, "ready", Metrics()
        self.n_rows, self._max_queue, self._draft = n_rows, max_queue, draft
        self._chunks = (min(CHUNK[platform()], *model.chunks),)
        self.prefixes = PrefixCache(prefix_bytes, self._chunks)
        self._queue: deque[Ticket] = deque()
        self._rows: list[Ticket | None] = [None] * n_rows
        self._changed = threading.Condition()
        self._is_closing = False
        self._failed = -RECOVERY  # when it last did, in seconds of the clock
        self._heartbeat = time.perf_counter()
        self._gauges()
        self._new_batch()
        self._warm_up()
        self._thread = threading.Thread(target=self._run, name="lechat engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: Prompt,
        max_tokens: int = 200,
        sampling: Sampling | None = None,
        *,
        eos_ids: Collection[int] | None = None,
        stop: str | Sequence[str] = (),
        processing: LogitsProcessing | None = None,
        matcher: Matcher | None = None,
        stream: int = 0,
    ) -> Generator[Sample, None, None]:
        """Generates the continuation of a prompt beside others, piece by piece.

        Closing the iterator cancels the request. Arguments as for `Generator.stream` and
        `GenerationRequest`.

        Raises:
            BadInput: the prompt or a parameter is refused.
            Busy: the queue is full.
            Unavailable: the engine takes no requests, or fails meanwhile.
        """
        request = GenerationRequest(
            self.model.ids_of(prompt),
            max_tokens,
            sampling or Sampling(),
            stream=stream,
            eos_ids=self.model.eos_ids if eos_ids is None else eos_ids,
            stop=stop_texts(stop),
            processing=processing or LogitsProcessing(),
            matcher=matcher,
        )
        updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
        (ticket,) = self.enqueue([request], [updates.put])
        return _pieces(ticket, updates)

    def enqueue(
        self,
        requests: Sequence[GenerationRequest],
        deliver: Sequence[Callable[[Update], None]],
    ) -> list[Ticket]:
        """Submits requests together, all or none; each `deliver` is called with its updates.

        That is done on the engine's thread and must not wait. A prompt that several have in
        common is read once.

        Raises:
            BadInput, Busy, Unavailable: as `submit`.
        """
        shared: dict[tuple[object, ...], SharedPrompt] = {}
        tickets = []
        for request, tell in zip(requests, deliver, strict=True):
            digests = (image.digest for image in request.images)
            prompt = shared.setdefault((*request.prompt, *digests), SharedPrompt())
            prompt.n_waiting += 1
            continuation = self._continuation(request)
            own = None if request.is_scored else prompt
            tickets.append(Ticket(request, continuation, tell, self._wake, own))
        with self._changed:
            if self.state != "ready":
                raise Unavailable(f"the server is {self.state}")
            room = self._max_queue + self.n_rows
            if len(tickets) > room:
                raise BadInput(
                    f"{len(tickets)} answers are asked for at once, and the server takes {room}: "
                    f"{self.n_rows} together, while {self._max_queue} wait"
                )
            room -= self.n_running + self.n_waiting
            if len(tickets) > max(room, 0):
                self.metrics.refused.inc()
                raise Busy(
                    f"{self.n_waiting} requests wait already, and the queue holds "
                    f"{self._max_queue}; try again later"
                )
            self._queue.extend(tickets)
            self._changed.notify()
        return tickets

    @property
    def n_running(self) -> int:
        """Requests that have a row."""
        return sum(ticket is not None for ticket in self._rows)

    @property
    def n_waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._queue)

    @property
    def is_stalled(self) -> bool:
        """Whether there is work, and no round has ended for long."""
        return self._has_work() and time.perf_counter() - self._heartbeat > STALLED

    def drain(self) -> None:
        """Refuses new requests and those that wait; those that have a row go on."""
        with self._changed:
            self.state = "draining" if self.state == "ready" else self.state
            waiting = [*self._queue]
            self._queue.clear()
        for ticket in waiting:
            self._end(ticket, SHUTTING_DOWN)

    def close(self) -> None:
        """Ends the engine's thread; requests that are under way fail."""
        self.drain()
        self._is_closing = True
        self._wake()
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _continuation(self, request: GenerationRequest) -> Continuation:
        """Validates a request; its text to come."""
        model, prompt = self.model, request.prompt
        model.check([prompt[: model.context]], request.max_tokens)
        request.processing.check(model.config.vocab_size)
        check_room(len(prompt), request.max_tokens, model.context)
        starts(prompt, request.images, model.config)
        before = () if request.is_answer else prompt
        return Continuation(
            before, request.max_tokens, None, request.eos_ids, model.tokenizer, request.stop
        )

    def _gauges(self) -> None:
        gauge = self.metrics.gauge
        gauge("num_requests_running", "Requests that have a row.", lambda: self.n_running)
        gauge("num_requests_waiting", "Requests that wait.", lambda: self.n_waiting)
        gauge("kv_cache_usage_perc", "Rows in use.", lambda: self.n_running / self.n_rows)
        gauge("prefix_cache_bytes", "Snapshots kept.", lambda: self.prefixes.bytes_held)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _new_batch(self) -> None:
        self._batch: ContinuousBatch = self.model.continuous_batch(
            self.n_rows, self._draft, chunks=self._chunks, with_processors=True
        )
        self._pending: Advance | None = None
        self._steps = 1  # of the next call
        self._fetched = 0.0  # when the last call was

    def _warm_up(self) -> None:
        """Compiles all that a request may need, by answering some of each kind."""
        batch, vocab_size = self._batch, self.model.config.vocab_size
        length = max(1, min(self._chunks[0] + 2, self.model.context - 1))
        varied = [id_ % vocab_size for id_ in range(length)]
        repeated = [0] * min(64, self.model.context - 1)  # of which prompt lookup finds a draft
        for prompt in (varied, repeated) if self._draft else (varied,):
            for is_scored in (True, False):
                batch.admit(0, prompt, 1, Sampling(temperature=0), is_scored=is_scored)
                batch.read_all()
                batch.advance(1)
            snapshot = batch.snapshot(0)
            batch.admit(0, prompt, 2, Sampling(), start=len(prompt) - 1, snapshot=snapshot)
            batch.read_all()
            batch.allow(0, all_allowed(1, vocab_size)[0])
            batch.advance(1)
            batch.free(0)
        for image in blank_images(vision) if (vision := self.model.config.vision) else ():
            if len(image.ids) < self.model.context:
                prompt = [*image.ids, 0]
                batch.admit(0, prompt, 1, Sampling(temperature=0), images=[image])
                batch.read_all()
                batch.free(0)

    def _run(self) -> None:
        while not self._is_closing:
            with self._changed:
                while not (self._is_closing or self._has_work()):
                    self._heartbeat = time.perf_counter()
                    self._changed.wait()
            try:
                self._round()
                has_failed = False
            except Exception:  # whatever it is, those who wait must be told
                log.exception("the engine failed")
                has_failed = True
            if has_failed:  # outside, since the exception holds on to the old batch
                self._recover()
            self._heartbeat = time.perf_counter()
        self._end_all(SHUTTING_DOWN)

    def _has_work(self) -> bool:
        return bool(self._queue or self._pending or self.n_running)

    def _round(self) -> None:
        self._drop_cancelled()
        self._admit_waiting()
        has_read = self._read_chunk()
        if self._draft or any(ticket.needs_mask for ticket in self._seated()):
            self._deliver_pending()  # since it says what may be drafted, or may come next
            self._allow()
        ready = [ticket for ticket in self._seated() if ticket.is_decoding]
        advance = self._start(ready) if ready else None
        self._deliver_pending()
        self._pending = advance
        if has_read and advance is None:
            self._batch.wait()  # or all of a prompt would be under way, whoever leaves or comes

    def _seated(self) -> list[Ticket]:
        return [ticket for ticket in self._rows if ticket]

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [ticket for ticket in self._queue if ticket.is_cancelled]
            for ticket in gone:
                self._leave_queue(ticket)
        for ticket in [*gone, *(ticket for ticket in self._seated() if ticket.is_cancelled)]:
            self._end(ticket)

    def _admit_waiting(self) -> None:
        """Gives free rows to those that wait, first come, first served."""
        for row in range(self.n_rows):
            if self._rows[row] is None and (ticket := self._next_waiting()):
                self._rows[row], ticket.row = ticket, row
                self._admit(ticket, row)

    def _next_waiting(self) -> Ticket | None:
        """The first in the queue, but for those whose prompt another one is just reading."""
        with self._changed:
            for ticket in self._queue:
                if ticket.shared is None or ticket.shared.reader is None:
                    self._leave_queue(ticket)
                    return ticket
        return None

    def _leave_queue(self, ticket: Ticket) -> None:
        self._queue.remove(ticket)
        if ticket.shared:
            ticket.shared.n_waiting -= 1

    def _admit(self, ticket: Ticket, row: int) -> None:
        request, shared = ticket.request, ticket.shared
        start, snapshot = 0, None
        if shared:
            start, snapshot = len(request.prompt) - 1, shared.snapshot
        if snapshot is None and not request.is_scored:
            known = self._digests(request)
            (start, snapshot), ticket.borders = self.prefixes.look_up(request.prompt, known)
            ticket.n_cached = start
            self.metrics.note_prefix(len(request.prompt), start)
        if shared and shared.snapshot is None:
            shared.reader = ticket
        if shared and not shared.n_waiting:
            shared.snapshot = None
        ticket.prefill = self._batch.admit(
            row,
            request.prompt,
            request.max_tokens,
            request.sampling,
            request.eos_ids,
            request.stream,
            start if snapshot is not None else 0,
            snapshot,
            dataclasses.replace(request.processing, has_grammar=request.matcher is not None),
            request.is_scored,
            request.images,
        )
        self.metrics.note_admitted(len(request.prompt), time.perf_counter() - ticket.submitted)

    def _digests(self, request: GenerationRequest) -> dict[int, bytes]:
        """Which image begins at each position of a prompt at which one does."""
        places = starts(request.prompt, request.images, self.model.config)
        return {at: image.digest for at, image in zip(places, request.images, strict=True)}

    def _read_chunk(self) -> bool:
        """Reads a chunk of a prompt; returns whether there was any.

        At the borders that `PrefixCache` has chosen it takes snapshots.
        """
        prefill = self._batch.read()
        ticket = self._rows[prefill.row] if prefill else None
        if prefill is None or ticket is None:
            return False
        if prefill.at in ticket.borders:
            snapshot, known = self._batch.snapshot(prefill.row), self._digests(ticket.request)
            self.prefixes.add(prefill.prompt, prefill.at, snapshot, known)
        if not prefill.is_done:
            return True
        if (shared := ticket.shared) and shared.reader is ticket:
            shared.reader = None
            if shared.n_waiting:
                shared.snapshot = self._batch.snapshot(prefill.row)
        if prefill.scores is not None:
            self._tell(ticket, Update(scores=prefill.prompt_scores()))
        if ticket.continuation.stopped:  # it may produce nothing
            self._take(ticket, RowTokens([], []))
        return True

    def _allow(self) -> None:
        """Sets what may come next in rows with a grammar; one that leads nowhere is an error."""
        for ticket in self._seated():
            if ticket.needs_mask and ticket.row is not None and ticket.request.matcher:
                try:
                    self._batch.allow(ticket.row, ticket.request.matcher.mask())
                except BadInput as error:
                    self._end(ticket, Failure(str(error), "internal"))

    def _start(self, ready: list[Ticket]) -> Advance:
        """Sends a call of the decode loop; of one step, if anybody waits for its end."""
        is_waited_for = self.n_waiting > 0 or len(ready) < self.n_running
        is_waited_for |= any(ticket.needs_mask or not ticket.has_begun for ticket in ready)
        return self._batch.start(1 if is_waited_for else self._steps)

    def _deliver_pending(self) -> None:
        """Fetches the call that is under way, and delivers what each row has made."""
        if self._pending is None:
            return
        began = self._pending.began
        rows = self._batch.fetch(self._pending)
        self._pending = None
        now = time.perf_counter()
        is_quick, self._fetched = now - max(self._fetched, began) < PATIENCE, now
        self._steps = next_steps(self._steps, is_quick, MOST_STEPS)
        for ticket, tokens in zip([*self._rows], rows, strict=True):
            if ticket and tokens.ids:
                self._take(ticket, tokens)

    def _take(self, ticket: Ticket, tokens: RowTokens) -> None:
        """Delivers a row's new tokens, and frees the row if they are the last."""
        ticket.held.extend(tokens.top)
        try:
            sample = ticket.continuation.take(tokens.ids, tokens.logprobs)
        except BadInput as error:  # the logits are not finite
            self.prefixes.clear()  # which may have what made them so
            self._end(ticket, Failure(str(error), "internal"))
            return
        if ticket.request.matcher:
            ticket.request.matcher.consume(tokens.ids)
        top = [ticket.held.popleft() for _ in sample.ids if ticket.held]
        now = time.perf_counter()
        self.metrics.note_tokens(len(tokens.ids), now - ticket.latest, not ticket.has_begun)
        ticket.latest, ticket.has_begun = now, ticket.has_begun or bool(tokens.ids)
        if sample.ids or sample.text or sample.stopped:
            self._tell(ticket, Update(sample, top))
        if sample.stopped:
            self._end(ticket, why=sample.stopped)

    def _tell(self, ticket: Ticket, update: Update) -> None:
        if ticket.is_cancelled or ticket.is_over:
            return
        try:
            ticket.deliver(update)
        except Exception:  # whoever asked is gone, and the others must not notice
            log.debug("an update could not be delivered", exc_info=True)
            ticket.is_cancelled = True

    def _end(self, ticket: Ticket, failure: Failure | None = None, why: str = "abort") -> None:
        """Frees a request's row, after a last update if it failed."""
        if failure:
            self._tell(ticket, Update(failure=failure))
        why = "error" if failure else why
        self.metrics.note_finished(why, time.perf_counter() - ticket.submitted)
        ticket.is_over = True
        if (shared := ticket.shared) and shared.reader is ticket:
            shared.reader = None  # another one reads the prompt
        if ticket.row is not None:
            self._batch.free(ticket.row)
            self._rows[ticket.row], ticket.row = None, None

    def _end_all(self, failure: Failure) -> None:
        for ticket in self._seated():
            self._rows[ticket.row or 0], ticket.row = None, None
            self._end(ticket, failure)

    def _recover(self) -> None:
        """Fails what is under way, and begins with empty rows; not twice within a minute."""
        now = time.perf_counter()
        is_again, self._failed = now - self._failed < RECOVERY, now
        self._end_all(BROKEN)
        self.prefixes.clear()
        try:
            if not is_again:
                self._pending = None
                del self._batch  # there may not be memory for two
                self._new_batch()
        except Exception:  # of the device, such as too little memory
            log.exception("the engine cannot begin anew")
            is_again = True
        if is_again:
            self.drain()
            self.state, self._is_closing = "failed", True


def check_room(n_prompt: int, max_tokens: int, context: int) -> None:
    """Raises `ContextExceeded` if a prompt and its answer are longer than the context."""
    if n_prompt + max_tokens > context:
        raise ContextExceeded(
            f"the prompt has {n_prompt} tokens and the answer may have {max_tokens}, and the "
            f"context holds {context} in all; ask for less, or start the server with a longer "
            "--context"
        )


def _pieces(ticket: Ticket, updates: "queue.SimpleQueue[Update]") -> Generator[Sample, None, None]:
    """The samples of a request as they come; it is cancelled when nobody takes them any more."""
    try:
        while True:
            update = updates.get()
            if update.failure:
                error = Unavailable if update.failure.kind == "unavailable" else BadInput
                raise error(update.failure.message)
            if update.sample:
                yield update.sample
            if update.is_last:
                return
    finally:
        ticket.cancel()
