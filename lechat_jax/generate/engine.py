"""Continuous batching: rows of one decode state are admitted, advanced and freed one by one.

A row is a text with its own ring buffer of keys and values, sampling and EOS ids. Prefill takes one
chunk of one row at a time, so that the other rows can be decoded in between; all rows are decoded
together. No token depends on the other rows: each is computed by the same compiled programs from
its own prompt, stream and position alone.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from lechat_jax.config import MistralConfig
from lechat_jax.devices.mesh import by_rows, create_sharded, on_mesh
from lechat_jax.generate.continuation import Continuation, Sample
from lechat_jax.generate.decode import (
    IDLE,
    MOST,
    Request,
    break_even,
    clear,
    decode,
    idle_rows,
    prefill,
    with_row,
)
from lechat_jax.generate.prefill import cache_size, chunk_of
from lechat_jax.generate.prompt_lookup import SEEN, Repeats, newest
from lechat_jax.generate.sampling import Sampling
from lechat_jax.model.binding import Weights
from lechat_jax.model.cache import EMPTY

# Is told how many tokens of the prompts are read, and of how many; at first of none.
OnRead = Callable[[int, int], None]
PATIENCE = 0.1  # seconds of decoding until a stream shows something


class RowTokens(NamedTuple):
    """Tokens that one row produced in a call: ids, and log-probabilities in nats."""

    ids: list[int]
    logprobs: list[float]


@dataclasses.dataclass
class _Reading:
    """An admitted prompt whose prefill has come to position `at`, and its request."""

    row: int
    prompt: Sequence[int]
    at: int
    limit: int
    sampling: Sampling
    request: Request


class Engine:
    """Continuous batching engine: rows of a decode state that are admitted, advanced and freed.

    Three functions are compiled for a number of rows, and one that writes a row; no request
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
        mesh: Mesh | None = None,
    ) -> None:
        self.n_rows, self.lengths, self.unread = n_rows, [0] * n_rows, 0
        self._config, self._weights_for = config, weights_for
        self._chunks, self._draft, self._mesh = chunks, draft, mesh
        size = cache_size(config, weights_for(2), n_rows, chunks[-1], context, draft)
        self._state, self._request = create_sharded(mesh, lambda: idle_rows(size), places=by_rows)
        self._waiting: deque[_Reading] = deque()
        self._left = np.zeros(n_rows, np.int32)
        self._used = [False] * n_rows  # rows whose ring holds somebody's tokens
        self._drawn = [False] * n_rows
        self._repeats: list[Repeats | None] = [None] * n_rows

    def admit(
        self,
        row: int,
        prompt: Sequence[int],
        limit: int,
        sampling: Sampling,
        eos_ids: Collection[int] = (),
        stream: int = 0,
        start: int = 0,
    ) -> None:
        """Admits a prompt to a row; `read` then does its prefill chunk by chunk.

        Args:
            row: from 0 to n_rows - 1; its former text is dropped.
            prompt: ids, BOS included; at least one.
            limit: maximum new tokens.
            sampling: sampling parameters.
            eos_ids: ids that end the row.
            stream: number of the random stream, which distinguishes rows of one seed.
            start: tokens of the prompt that are in the row's cache already, or are skipped.
        """
        self.free(row)
        if not start and self._used[row]:
            with on_mesh(self._mesh):
                cache = clear(self._state.cache, np.int32(row))
            self._state = self._state._replace(cache=cache)
        self._used[row] = True
        reading = _Reading(
            row, prompt, start, limit, sampling, self._asked(sampling, eos_ids, stream)
        )
        self.lengths[row] = len(prompt)
        self.unread += len(prompt) - 1 - start
        self._waiting.append(reading)

    def read(self) -> bool:
        """Prefill of one chunk of the prompt that was admitted first; returns whether more is left.

        The last token of a prompt is left to `advance`, which samples after it.
        """
        if not self._waiting:
            return False
        first = self._waiting[0]
        last = len(first.prompt) - 1
        if first.at < last:
            left = last - first.at
            chunk = max((T for T in self._chunks if T <= left), default=self._chunks[0])
            tokens, positions = chunk_of(first.prompt, first.at, chunk)
            weights = self._weights_for(chunk)
            row, cache = np.int32(first.row), self._state.cache
            with on_mesh(self._mesh):
                cache = prefill(self._config, weights, cache, row, tokens, positions)
            self._state = self._state._replace(cache=cache)
            self.unread -= min(chunk, left)
            first.at += min(chunk, left)
        if first.at == last:
            self._waiting.popleft()
            self._begin(first)
        return bool(self._waiting)

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

    def advance(self, n: int) -> list[RowTokens]:
        """Decodes up to `n` steps, at most `MOST`, of all rows that are ready; their new tokens.

        Fewer steps if all rows are done, or drafts do not pay any more.
        """
        guessing = self._guessing()
        weights = self._weights_for(self.n_rows * (1 + guessing))
        with on_mesh(self._mesh):
            self._state, out = decode(
                self._config, weights, self._state, self._request, np.int32(n), guessing
            )
        ids, logprobs, lengths, left = jax.device_get(out[:4])
        self._left = np.array(left)
        made = []
        for row, length in enumerate(lengths.tolist()):
            made.append(RowTokens(ids[row, :length].tolist(), logprobs[row, :length].tolist()))
            self.lengths[row] += length
            if repeats := self._repeats[row]:
                repeats.add(made[row].ids)
        return made

    def free(self, row: int) -> None:
        """Frees a row: it produces nothing more until another prompt is admitted."""
        for reading in [reading for reading in self._waiting if reading.row == row]:
            self._waiting.remove(reading)
            self.unread -= len(reading.prompt) - 1 - reading.at
        if self._left[row]:
            self._seat(row, 0, EMPTY, 0, self._asked(IDLE, (), 0))
        self.lengths[row], self._repeats[row], self._drawn[row] = 0, None, False

    def spare(self) -> int | None:
        """Tokens that can be cut off a text while its ring holds the window before them."""
        return self._state.cache.spare(self._config)

    def _begin(self, read: _Reading) -> None:
        """Starts the decoding of a row whose prefill is complete."""
        last = len(read.prompt) - 1
        self._seat(read.row, int(read.prompt[last]), last, read.limit, read.request)
        self._drawn[read.row] = read.sampling.temperature > 0
        if self._draft:
            self._repeats[read.row] = Repeats(read.prompt, self._draft)
            self._look_at(newest([[]] * self.n_rows, 0))

    def _seat(self, row: int, token: int, position: int, left: int, request: Request) -> None:
        state = self._state
        numbers = (np.full(1, number, np.int32) for number in (token, position, left))
        kept = state.token, state.position, state.left, self._request
        with on_mesh(self._mesh):
            *kept, self._request = with_row(kept, np.int32(row), (*numbers, request))
        self._state = state._replace(token=kept[0], position=kept[1], left=kept[2])
        self._left[row] = left

    def _asked(self, sampling: Sampling, eos_ids: Collection[int], stream: int) -> Request:
        ends = np.isin(np.arange(self._config.vocab_size), list(eos_ids))
        return Request(sampling.controls(1), sampling.streams(1, stream), jnp.asarray(ends[None]))

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


def rounds(engine: Engine, rows: Sequence[Continuation]) -> Iterator[list[Sample]]:
    """Streams all rows: the pieces after each call of `Engine.advance`, until all have stopped.

    The first call makes one token, for a short time to first token; later ones make more.
    """
    n = 1
    while not all(row.stopped for row in rows):
        began = time.perf_counter()
        made = engine.advance(n)
        # A clock must not make processes differ that take the same steps together.
        is_quick = time.perf_counter() - began < PATIENCE or jax.process_count() > 1
        n = min(MOST, 2 * n) if is_quick else max(1, n // 2)
        yield [row.take(*tokens) for row, tokens in zip(rows, made, strict=True)]
        for number, row in enumerate(rows):
            if row.stopped == "stop" and len(rows) > 1:  # of which the engine knows nothing
                engine.free(number)
