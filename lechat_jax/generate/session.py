"""Generation session: a text that grows by input and output, with its KV cache kept in between."""

from collections.abc import Collection, Iterator, Sequence

from lechat_jax.generate.continuation import Continuation, Sample, stop_texts
from lechat_jax.generate.continuous_batch import ContinuousBatch, rounds
from lechat_jax.generate.loaded_model import LoadedModel
from lechat_jax.generate.sampling import Sampling
from lechat_jax.generate.vision import starts
from lechat_jax.tokenizer.images import Image


class Session:
    """One text whose KV cache is reused: each continuation needs prefill of its new tokens only.

    The cost does not grow with the text's length.

    Attributes:
        ids: all tokens so far, fed and generated.
        images: images whose ids are among them.
    """

    def __init__(self, model: LoadedModel, draft: int = 0) -> None:
        model.check([[0]], draft=draft)
        model.check_memory(1, draft)
        self._model, self._draft = model, draft
        self._batch: ContinuousBatch | None = None
        self.reset()

    def reset(self, length: int = 0) -> None:
        """Truncates the text to its first `length` tokens, keeping what it can of the KV cache.

        The next `stream` does the missing prefill.
        """
        if length:
            del self.ids[length:]
            whole = starts(self.ids, self.images, self._model.config, is_cut=True)
            del self.images[len(whole) :]
            self._read = min(self._read, len(self.ids) - 1)
            return
        self.ids: list[int] = []
        self.images: list[Image] = []
        self._read = 0  # tokens of `ids` that are in the cache
        self._written = 0  # positions that the cache holds, those that were taken back among them
        self._batch = None  # so that there are never two
        self._batch = self._model.continuous_batch(1, self._draft)

    @property
    def room(self) -> int | None:
        """Tokens that still fit into the context; `None` is no limit."""
        return self._model.room(len(self.ids))

    def feed(self, ids: Sequence[int], images: Sequence[Image] = ()) -> None:
        """Appends tokens to the text; the next `stream` does their prefill.

        Raises:
            BadInput: they are not of this vocabulary, do not fit into the context, or have not the
                ids of these images in them.
        """
        if ids:
            self._model.check([[*self.ids, *ids]], images=[[*self.images, *images]])
        self.ids += ids
        self.images += images

    def stream(
        self,
        max_tokens: int = 200,
        sampling: Sampling | None = None,
        eos_ids: Collection[int] | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[Sample]:
        """Generates the continuation of the text, piece by piece.

        If the iterator is closed early, the text keeps all pieces that were output. A stop text is
        not part of it, except for what the token before reaches into it.

        Args:
            max_tokens: maximum new tokens.
            sampling: sampling parameters; randomness depends on seed and position, so the same
                seed serves for the complete session.
            eos_ids: ids that end the continuation; by default the model's.
            stop: stop texts, as for `Generator.stream`.

        Raises:
            BadInput: the text is empty, `max_tokens` is negative, or a stop text is empty.
        """
        model, sampling = self._model, sampling or Sampling()
        model.check([self.ids], max_tokens)
        eos_ids = model.eos_ids if eos_ids is None else eos_ids
        stop = stop_texts(stop)
        row = Continuation(self.ids, max_tokens, self.room, eos_ids, model.tokenizer, stop)
        if row.stopped:
            yield row.take([], [])
            return
        batch = self._batch
        assert batch is not None
        spare = batch.spare()
        is_lost = spare is not None and self._written - self._read > spare  # taken back too far
        start = 0 if is_lost else self._read
        batch.admit(0, self.ids, row.limit, sampling, eos_ids, start=start, images=[*self.images])
        batch.read_all(model.on_read)
        self._read = self._written = len(self.ids) - 1
        for (piece,) in rounds(batch, [row]):
            self.ids += piece.ids
            self._read, self._written = len(self.ids) - 1, batch.lengths[0] - 1 + self._draft
            yield piece
