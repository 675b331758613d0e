"""A text that is read and continued in turns, as a conversation is."""

from collections.abc import Collection, Iterator, Sequence

import jax.numpy as jnp

from lechat_jax.cache import Cache
from lechat_jax.continuation import Continuation, Sample
from lechat_jax.decode import DecodeState
from lechat_jax.generator import Generator
from lechat_jax.lookup import SEEN, newest
from lechat_jax.sampling import Sampling


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

    def reset(self) -> None:
        """From here on the text is empty."""
        self.ids: list[int] = []
        self._read = 0  # tokens of `ids` that are in the cache
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
    ) -> Iterator[Sample]:
        """The next piece of the text, again and again until it stops.

        Whoever stops asking leaves the text with all pieces that were handed out.

        Args:
            max_tokens: most new tokens.
            sampling: how tokens are chosen; a token depends on its seed and position, so
                the same seed will do for all turns.
            eos_ids: tokens that end the turn; by default the tokenizer's EOS.

        Raises:
            BadInput: nothing was fed yet, or `max_tokens` is negative.
        """
        made = self._generator
        made.check([self.ids], max_tokens)
        eos_ids = made.eos_ids if eos_ids is None else eos_ids
        row = Continuation(self.ids, max_tokens, self.room, eos_ids, made.tokenizer)
        if row.stopped:
            yield row.take([], [])
            return
        assert self._cache is not None
        cache = made.read([self.ids[self._read :]], self._cache, self._read)
        self._keep(cache)
        state = DecodeState(
            cache=cache,
            token=jnp.asarray(self.ids[-1:], jnp.int32),
            position=jnp.asarray([len(self.ids) - 1], jnp.int32),
            left=jnp.asarray([row.limit], jnp.int32),
            seen=jnp.asarray(newest([self.ids], SEEN if self._draft else 0)),
        )
        request = made.request(sampling, eos_ids, batch=1)
        for after, (piece,) in made.rounds(state, [row], request, self._draft):
            self.ids += piece.ids
            self._keep(after.cache)
            yield piece

    def _keep(self, cache: Cache) -> None:
        self._cache, self._read = cache, len(self.ids) - 1
