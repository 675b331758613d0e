"""Continuous batching: rows of one decode state are admitted, advanced and freed one by one.

A row is a text with its own ring buffer of keys and values, sampling and EOS ids. Prefill takes one
chunk of one row at a time, so that the other rows can be decoded in between; all rows are decoded
together. No token depends on the other rows: each is computed by the same compiled programs from
its own prompt, stream and position alone.
"""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt32

from lechat_jax.config import MistralConfig
from lechat_jax.devices.mesh import by_rows, create_sharded, on_mesh
from lechat_jax.generate.continuation import Continuation, Sample
from lechat_jax.generate.decode import (
    IDLE,
    MOST,
    Produced,
    PromptScores,
    Request,
    break_even,
    clear,
    decode,
    idle_rows,
    prefill,
    prefill_scored,
    row_of,
    with_row,
)
from lechat_jax.generate.logits_processors import LogitsProcessing, Top, all_allowed
from lechat_jax.generate.prefill import cache_size, chunk_of
from lechat_jax.generate.prompt_lookup import SEEN, Repeats, newest
from lechat_jax.generate.sampling import Sampling
from lechat_jax.generate.vision import PromptImages
from lechat_jax.model.binding import Weights
from lechat_jax.model.cache import EMPTY, Cache
from lechat_jax.tokenizer.images import Image

# Is told how many tokens of the prompts are read, and of how many; at first of none.
OnRead = Callable[[int, int], None]
PATIENCE = 0.1  # seconds of decoding until a stream shows something


class TopTokens(NamedTuple):
    """The likeliest tokens at one place of a text, likeliest first: ids and log-probs in nats."""

    ids: list[int]
    logprobs: list[float]


class RowTokens(NamedTuple):
    """Tokens that one row produced in a call: ids, and log-probabilities in nats.

    Attributes:
        ids: the ids.
        logprobs: of each.
        top: the likeliest tokens at the place of each, if the row wants them.
    """

    ids: list[int]
    logprobs: list[float]
    top: Sequence[TopTokens] = ()


@dataclasses.dataclass
class Prefill:
    """An admitted prompt whose prefill has come to position `at`.

    Attributes:
        row: its row.
        prompt: ids, BOS included.
        at: tokens in the row's cache.
        scores: log-probs of the prompt's tokens from the second on, if they are wanted.
        limit: maximum new tokens.
        sampling: sampling parameters.
        processing: logits processors.
        request: both, as arrays.
        images: images of the prompt, if it has any.
    """

    row: int
    prompt: Sequence[int]
    at: int
    scores: list[PromptScores] | None
    limit: int
    sampling: Sampling
    processing: LogitsProcessing
    request: Request
    images: PromptImages | None = None

    @property
    def is_done(self) -> bool:
        """Whether all but the last token are read, which is left to decoding."""
        return self.at == len(self.prompt) - 1

    def prompt_scores(self) -> RowTokens:
        """The prompt's tokens from the second on, their log-probs and the likeliest at each."""
        nats, likeliest = [], []
        for chunk in jax.device_get(self.scores or []):
            nats += chunk.logprobs.tolist()
            likeliest += top_tokens(chunk.top)
        ids = [*self.prompt[1:]]
        return RowTokens(ids, nats[: len(ids)], likeliest[: len(ids)])  # without padding


def top_tokens(top: Top) -> list[TopTokens]:
    """The likeliest tokens at each of some places in a text."""
    return [*map(TopTokens, top.ids.tolist(), top.logprobs.tolist())]


class Advance(NamedTuple):
    """A call of `decode` that is under way: what it produces, who was in each row, since when."""

    out: Produced
    tenants: list[int]
    began: float


def next_chunk(chunks: tuple[int, ...], left: int) -> int:
    """Size of the next prefill chunk, of so many tokens left: the longest that they fill.

    So where chunks begin depends on the chunks before and on what the prompt still has.
    """
    return max((T for T in chunks if T <= left), default=chunks[0])


def next_steps(n: int, is_quick: bool, most: int) -> int:
    """Steps of the next call of the decode loop: twice as many while a call is quick, else half."""
    return min(most, 2 * n) if is_quick else max(1, n // 2)


class ContinuousBatch:
    """Continuous batching engine: rows of a decode state that are admitted, advanced and freed.

    Three functions are compiled for a number of rows, and those that copy a row; no request
    compiles anything else.

    Attributes:
        n_rows: rows B, free ones included.
        lengths: tokens of the text in each row, prompt and produced; 0 is free.
        unread: prompt tokens that are admitted and await prefill.

    Args:
        config: the model's config.
        weights_for: gives the weights in the form for matmuls of so many positions.
        n_rows: rows B.
        chunks: tokens T of a prefill chunk: of the end of a prompt, and before that of longer ones.
        context: positions that a layer without a window can hold.
        draft: tokens drafted per step by prompt lookup, while the acceptance rate pays.
        with_processors: whether requests may have logits processors, see `LogitsProcessing`.
        mesh: of the devices that share the work: heads over `tp`, rows over `fsdp`.
    """

    def __init__(
        self,
        config: MistralConfig,
        weights_for: Callable[[int], Weights],
        n_rows: int,
        *,
        chunks: tuple[int, ...],
        context: int,
        draft: int = 0,
        with_processors: bool = False,
        mesh: Mesh | None = None,
    ) -> None:
        self.n_rows, self.lengths, self.unread = n_rows, [0] * n_rows, 0
        self._config, self._weights_for = config, weights_for
        self._chunks, self._draft, self._mesh = chunks, draft, mesh
        size = cache_size(config, weights_for(2), n_rows, chunks[-1], context, draft)
        make = functools.partial(idle_rows, size, with_processors=with_processors)
        self._state, self._request = create_sharded(mesh, make, places=by_rows)
        self._waiting: deque[Prefill] = deque()
        self._is_for_shortest = False  # whether the next chunk is, or for the first admitted
        self._left = np.zeros(n_rows, np.int32)  # as of the last call that was fetched
        self._tenants = [0] * n_rows  # texts that each row has had
        self._decodes = [False] * n_rows  # rows of which decoding makes a step, or repeats it
        self._used = [False] * n_rows  # rows whose ring holds somebody's tokens
        self._drawn = [False] * n_rows
        self._repeats: list[Repeats | None] = [None] * n_rows
        self._wants_top = [False] * n_rows
        self._allowed = all_allowed(n_rows, config.vocab_size) if with_processors else None
        self._is_allowing = False  # whether it was changed since the last call

    def admit(
        self,
        row: int,
        prompt: Sequence[int],
        limit: int,
        sampling: Sampling,
        eos_ids: Collection[int] = (),
        stream: int = 0,
        start: int = 0,
        snapshot: Cache | None = None,
        processing: LogitsProcessing | None = None,
        is_scored: bool = False,
        images: Sequence[Image] = (),
    ) -> Prefill:
        """Admits a prompt to a row; `read` then does its prefill chunk by chunk.

        Args:
            row: from 0 to n_rows - 1; its former text is dropped.
            prompt: ids, BOS included; at least one.
            limit: maximum new tokens.
            sampling: sampling parameters.
            eos_ids: ids that end the row.
            stream: number of the random stream, which distinguishes rows of one seed.
            start: tokens of the prompt that are in the row's cache or in the snapshot already, or
                are skipped.
            snapshot: KV cache of the first `start` tokens, see `snapshot`.
            processing: logits processors, if the batch was made with them.
            is_scored: whether log-probs of the prompt's own tokens are computed.
            images: images whose ids are in the prompt, in their order.

        Raises:
            BadInput: the prompt has the ids of other images.
        """
        seen = PromptImages(self._config, prompt, images) if images else None
        self.free(row)
        cache = self._state.cache
        with on_mesh(self._mesh):
            if snapshot is not None:
                cache = with_row(cache, np.int32(row), snapshot)
            elif not start and self._used[row]:
                cache = clear(cache, np.int32(row))
        self._state = self._state._replace(cache=cache)
        self._used[row] = True
        processing = processing or LogitsProcessing()
        request = self._request_of(sampling, eos_ids, stream, processing)
        scores = [] if is_scored else None
        admitted = Prefill(row, prompt, start, scores, limit, sampling, processing, request, seen)
        self.lengths[row] = len(prompt)
        self.unread += len(prompt) - 1 - start
        self._waiting.append(admitted)
        return admitted

    def read(self) -> Prefill | None:
        """Prefill of one chunk of a prompt; `None` if all are read.

        Chunks go in turn to the prompt that was admitted first and to the one that has the fewest
        tokens left, so that a short one need not wait for a long one to end, and none for ever.
        The last token of a prompt is left to `advance`, which samples after it.
        """
        if not self._waiting:
            return None
        chosen = self._waiting[0]
        if self._is_for_shortest:
            chosen = min(self._waiting, key=lambda one: len(one.prompt) - one.at)
        self._is_for_shortest = not self._is_for_shortest
        left = len(chosen.prompt) - 1 - chosen.at
        if left:
            chunk = next_chunk(self._chunks if chosen.scores is None else self._chunks[:1], left)
            tokens, positions = chunk_of(chosen.prompt, chosen.at, chunk)
            weights = self._weights_for(chunk)
            row, cache = np.int32(chosen.row), self._state.cache
            with on_mesh(self._mesh):
                images = chosen.images
                features = images and images.chunk(self._weights_for, chosen.at, chunk)
                seen = () if features is None else (features,)  # as of a prompt without images
                if chosen.scores is None:
                    cache = prefill(self._config, weights, cache, row, tokens, positions, *seen)
                else:
                    targets = np.zeros(chunk, np.int32)
                    following = chosen.prompt[chosen.at + 1 : chosen.at + 1 + chunk]
                    targets[: len(following)] = following
                    cache, scores = prefill_scored(
                        self._config, weights, cache, row, tokens, positions, targets, *seen
                    )
                    chosen.scores.append(scores)
            self._state = self._state._replace(cache=cache)
            self.unread -= min(chunk, left)
            chosen.at += min(chunk, left)
        if chosen.is_done:
            self._waiting.remove(chosen)
            self._begin(chosen)
        return chosen

    def read_all(self, on_read: OnRead | None = None) -> None:
        """Prefill of all admitted prompts; with `on_read` it waits for every chunk."""
        total = self.unread
        if on_read:
            on_read(0, total)
        while self._waiting:
            before = self.unread
            self.read()
            if on_read and self.unread < before:
                jax.block_until_ready(self._state.cache)
                on_read(total - self.unread, total)

    def wait(self) -> None:
        """Waits until all that was started is done."""
        jax.block_until_ready(self._state)

    def snapshot(self, row: int) -> Cache:
        """A copy of one row's KV cache, with which a prompt that begins so can be admitted."""
        with on_mesh(self._mesh):
            return row_of(self._state.cache, np.int32(row))

    def allow(self, row: int, mask: UInt32[np.ndarray, "words"]) -> None:
        """Sets which ids may come next in a row, see `Processors.allowed`, until it is freed."""
        assert self._allowed is not None
        self._allowed[row] = mask
        self._is_allowing = True

    def advance(self, n: int) -> list[RowTokens]:
        """Decodes up to `n` steps, at most `MOST`, of all rows that are ready; their new tokens.

        Fewer steps if all rows are done, or drafts do not pay any more.
        """
        return self.fetch(self.start(n))

    def start(self, n: int) -> Advance:
        """Starts `advance`, without waiting for it; several can be under way without a draft."""
        guessing = self._guessing()
        weights = self._weights_for(self.n_rows * (1 + guessing))
        if self._is_allowing and self._allowed is not None and self._request.processors:
            places = by_rows(self._mesh, self._allowed) if self._mesh else None
            # A copy, since a CPU device reads the array itself, which `allow` changes.
            allowed = jax.device_put(self._allowed.copy(), places)
            processors = self._request.processors._replace(allowed=allowed)
            self._request, self._is_allowing = self._request._replace(processors=processors), False
        with on_mesh(self._mesh):
            self._state, out = decode(
                self._config, weights, self._state, self._request, np.int32(n), guessing
            )
        return Advance(out, [*self._tenants], time.perf_counter())

    def fetch(self, advance: Advance) -> list[RowTokens]:
        """Waits for a call of `start`; the new tokens of the rows that were not freed since."""
        out = advance.out
        ids, logprobs, lengths, left = jax.device_get(out[:4])
        top = jax.device_get(out.top) if any(self._wants_top) else None
        produced = []
        for row in range(self.n_rows):
            is_same = advance.tenants[row] == self._tenants[row]
            mine = row, slice(lengths[row] if is_same else 0)
            likeliest = top_tokens(Top(*(of[mine] for of in top))) if top else []
            likeliest = likeliest if self._wants_top[row] else []
            produced.append(RowTokens(ids[mine].tolist(), logprobs[mine].tolist(), likeliest))
            if is_same:
                self._left[row] = left[row]
                self.lengths[row] += int(lengths[row])
            if repeats := self._repeats[row]:
                repeats.add(produced[row].ids)
        return produced

    def free(self, row: int) -> None:
        """Frees a row: it produces nothing more until another prompt is admitted."""
        for reading in [reading for reading in self._waiting if reading.row == row]:
            self._waiting.remove(reading)
            self.unread -= len(reading.prompt) - 1 - reading.at
        if self._decodes[row]:  # also when it is done: it would go on writing its last key
            self._seat(row, 0, EMPTY, 0, self._request_of(IDLE, (), 0, LogitsProcessing()))
        self.lengths[row], self._repeats[row] = 0, None
        self._drawn[row] = self._wants_top[row] = False

    def spare(self) -> int | None:
        """Tokens that can be cut off a text while its ring holds the window before them."""
        return self._state.cache.spare(self._config)

    def _begin(self, read: Prefill) -> None:
        """Starts the decoding of a row whose prefill is complete."""
        row, last = read.row, len(read.prompt) - 1
        self._seat(row, int(read.prompt[last]), last, read.limit, read.request)
        self._drawn[row] = read.sampling.temperature > 0
        self._wants_top[row] = read.processing.n_top > 0
        if self._draft:
            self._repeats[row] = Repeats(read.prompt, self._draft)
            self._look_at(newest([[]] * self.n_rows, 0))

    def _seat(self, row: int, token: int, position: int, left: int, request: Request) -> None:
        state = self._state
        numbers = [np.full(1, number, np.int32) for number in (token, position, left)]
        counts = None if state.counts is None else np.zeros((1, state.counts.shape[1]), np.int32)
        kept = (state.token, state.position, state.left), state.counts, self._request
        with on_mesh(self._mesh):
            kept = with_row(kept, np.int32(row), (tuple(numbers), counts, request))
        fields = dict(zip(("token", "position", "left"), kept[0], strict=True))
        self._state = state._replace(**fields, counts=kept[1])
        self._request = kept[2]
        self._left[row], self._decodes[row] = left, position != EMPTY
        self._tenants[row] += 1
        if self._allowed is not None:
            self.allow(row, all_allowed(1, self._config.vocab_size)[0])

    def _request_of(
        self,
        sampling: Sampling,
        eos_ids: Collection[int],
        stream: int,
        processing: LogitsProcessing,
    ) -> Request:
        V = self._config.vocab_size
        ends = jnp.asarray(np.isin(np.arange(V), list(eos_ids))[None])
        processors = None if self._allowed is None else processing.processors(V)
        return Request(sampling.controls(1), sampling.streams(1, stream), ends, processors)

    def _guessing(self) -> int:
        """Tokens to draft in the next call; prepares the state for prompt lookup."""
        live = [row for row in range(self.n_rows) if self._left[row]]
        rates = [repeats.rate for row in live if (repeats := self._repeats[row])]
        enough = break_even(self._draft, self.n_rows, any(self._drawn[row] for row in live))
        guessing = self._draft if rates and sum(rates) / len(rates) >= enough else 0
        if self._draft and self._state.seen.shape[1] != (SEEN if guessing else 0):
            texts = [repeats.text if repeats else [] for repeats in self._repeats]
            self._look_at(newest(texts, SEEN if guessing else 0))
        return guessing

    def _look_at(self, seen: Int[np.ndarray, "B S"]) -> None:
        """Sets the tokens in which prompt lookup searches."""
        places = by_rows(self._mesh, seen) if self._mesh else None
        self._state = self._state._replace(seen=jax.device_put(seen, places))


def rounds(batch: ContinuousBatch, rows: Sequence[Continuation]) -> Iterator[list[Sample]]:
    """Streams all rows until they have stopped: the pieces after each call of `advance`.

    The first call makes one token, for a short time to first token; later ones make more.
    """
    n = 1
    while not all(row.stopped for row in rows):
        began = time.perf_counter()
        made = batch.advance(n)
        # A clock must not make processes differ that take the same steps together.
        is_quick = time.perf_counter() - began < PATIENCE or jax.process_count() > 1
        n = next_steps(n, is_quick, MOST)
        yield [row.take(*tokens[:2]) for row, tokens in zip(rows, made, strict=True)]
        for number, row in enumerate(rows):
            if row.stopped == "stop" and len(rows) > 1:  # of which the batch knows nothing
                batch.free(number)
