"""A text that is read and continued in turns, as a conversation is."""

from collections.abc import Collection, Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from lechat_jax.generate.continuation import Continuation, Sample
from lechat_jax.generate.decode import DecodeState
from lechat_jax.generate.generator import Generator, stop_texts
from lechat_jax.generate.prompt_lookup import newest
from lechat_jax.generate.sampling import Sampling
from lechat_jax.model.cache import Cache


class Session:
    """One text, whose keys and values stay in the ring from turn to turn.

    So a turn costs its own tokens, however long the text is.

    Attributes:
        ids: all tokens so far, those that were fed and those that were produced.
    """

    def __init__(self, generator: Generator, draft: int = 0) -> None:
        generator.check([[0]], draft=draft)
        generator.check_memory(1, draft)
        self._generator = generator
        self._draft = draft
        self._cache: Cache | None = None
        self.reset()

    def reset(self, length: int = 0) -> None:
        """From here on the text is its first `length` tokens, of which the cache keeps what it can.

        The next `stream` reads the rest.
        """
        if length:
            del self.ids[length:]
            self._read = min(self._read, len(self.ids) - 1)
            return
        self.ids: list[int] = []
        self._read = 0  # tokens of `ids` that are in the cache
        self._written = 0  # positions that the cache holds, those that were taken back among them
        self._cache = None  # so that there are never two
        self._cache = self._generator.empty_cache(1, self._draft)

    @property
    def room(self) -> int | None:
        """Tokens that still fit; `None` is without end."""
        return self._generator.room(len(self.ids))

    def feed(self, ids: Sequence[int]) -> None:
        """Appends tokens, which the next `stream` reads first.

        Raises:
            BadInput: they are not of this vocabulary, or do not fit into the context.
        """
        if ids:
            self._generator.check([[*self.ids, *ids]])
        self.ids += ids

    def stream(
        self,
        max_tokens: int = 200,
        sampling: Sampling | None = None,
        eos_ids: Collection[int] | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[Sample]:
        """The next piece of the text, again and again until it stops.

        Whoever stops asking leaves the text with all pieces that were handed out. A stop text is
        not part of it, but for what a token that begins before has of it.

        Args:
            max_tokens: most new tokens.
            sampling: how tokens are chosen; a token depends on its seed and position, so
                the same seed will do for all turns.
            eos_ids: tokens that end the turn; by default those of the model.
            stop: texts that end it, as for `Generator.stream`.

        Raises:
            BadInput: nothing was fed yet, `max_tokens` is negative, or a stop text is empty.
        """
        made = self._generator
        made.check([self.ids], max_tokens)
        eos_ids = made.eos_ids if eos_ids is None else eos_ids
        row = Continuation(
            self.ids, max_tokens, self.room, eos_ids, made.tokenizer, stop_texts(stop)
        )
        if row.stopped:
            yield row.take([], [])
            return
        cache = self._kept()
        cache = made.read([self.ids[self._read :]], cache, self._read)
        self._keep(cache, len(self.ids) - 1)
        state = DecodeState(
            cache=cache,
            token=jnp.asarray(self.ids[-1:], jnp.int32),
            position=jnp.asarray([len(self.ids) - 1], jnp.int32),
            left=jnp.asarray([row.limit], jnp.int32),
            seen=jnp.asarray(newest([self.ids], 0)),
        )
        request = made.request(sampling, eos_ids, batch=1)
        for after, (piece,) in made.rounds(state, [row], request, self._draft, [[*self.ids]]):
            self.ids += piece.ids
            self._keep(after.cache, int(np.asarray(after.position)[0]) + self._draft)
            yield piece

    def _keep(self, cache: Cache, written: int) -> None:
        self._cache, self._read, self._written = cache, len(self.ids) - 1, written

    def _kept(self) -> Cache:
        """The cache, ready to read on; an empty one if too much of it was taken back."""
        assert self._cache is not None
        spare = self._cache.spare(self._generator.config)
        if spare is not None and self._written - self._read > spare:
            self._cache = None  # so that there are never two
            self._cache, self._read = self._generator.empty_cache(1, self._draft), 0
        return self._cache
