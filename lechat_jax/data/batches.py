"""Tokenised text as batches: tokenised once and cached, then a pure function of (seed, step)."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from lechat_jax.data.corpus import Corpus, Document
from lechat_jax.data.rows import Rows
from lechat_jax.data.token_cache import Streams, kept
from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.tokenizer import Tokenizer

FORMAT = 2  # of the streams and of the cache file; a new number makes every cache anew
GROUP = 1 << 20  # characters tokenised between two reports of progress

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A tokenised corpus as two token streams: BOS, ids, and EOS where a document ends.

    Attributes:
        train: training stream, in the smallest dtype that holds the vocabulary; memory-mapped
            when it is in the cache.
        val: held-out stream. All its tokens are scored except BOS, which is given. EOS costs
            nats but stands for no byte, so bits per byte err on the high side.
        val_bytes: UTF-8 bytes of the text of `val`.
        name: name of the corpus.
        size: size of the corpus, in words.
        n_bytes: UTF-8 bytes of the corpus, both parts.
        sha256: digest of the corpus.
        cached: whether the tokens came from the cache.
        note: a message to the user on the text or the cache, or empty.
    """

    train: Integer[np.ndarray, " train"]
    val: Integer[np.ndarray, " val"]
    val_bytes: int
    name: str
    size: str
    n_bytes: int
    sha256: str
    cached: bool
    note: str


def load_tokens(
    corpus: Corpus,
    tokenizer: Tokenizer,
    cache_dir: Path | None = None,
    on_progress: Progress | None = None,
) -> Tokens:
    """Tokenises a corpus, or reads its tokens from the cache.

    The cache is one file in `cache_dir` (else in `tokens` below `cache_home()`), named by the
    SHA-256 of all that the tokens depend on and verified whenever it is read. If it cannot be
    written, the tokens stay in memory and `note` says so.

    Args:
        on_progress: called with the UTF-8 bytes done and to do, while tokenising.

    Raises:
        BadInput: the corpus is too short for a held-out part.
    """
    if not corpus.val or not corpus.train:
        raise BadInput(
            f"{corpus.name} is too short or repeats itself: {len(corpus.train)} pieces to learn "
            f"from and {len(corpus.val)} to validate on; give a longer text"
        )
    dtype = dtype_of(tokenizer)

    def make() -> dict[str, np.ndarray]:
        streams = _tokenise(corpus, tokenizer, dtype, on_progress)
        return dict(zip(("train", "val"), streams, strict=True))

    found = kept(_key(corpus, tokenizer), {"train": dtype, "val": dtype}, make, cache_dir)
    return Tokens(
        train=found.arrays["train"],
        val=found.arrays["val"],
        val_bytes=sum(len(piece.text.encode()) for piece in corpus.val),
        name=corpus.name,
        size=corpus.size,
        n_bytes=corpus.n_bytes,
        sha256=corpus.sha256,
        cached=found.cached,
        note="; ".join(filter(None, [*corpus.notes, found.note])),
    )


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """The smallest unsigned dtype that holds the token ids."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def _tokenise(
    corpus: Corpus, tokenizer: Tokenizer, dtype: np.dtype, on_progress: Progress | None
) -> Streams:
    """Tokenises both streams of the corpus, in memory."""
    bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
    done = 0

    def stream(pieces: Sequence[Document]) -> Integer[np.ndarray, " stream"]:
        nonlocal done
        groups = []
        for group in _groups(pieces):
            texts = [piece.text for piece in group]
            ids = tokenizer.encode_batch(texts)
            ends = [eos if piece.ends else [] for piece in group]
            parts = [part for i, end in zip(ids, ends, strict=True) for part in (bos, i, end)]
            groups.append(np.concatenate(parts, dtype=dtype, casting="unsafe"))
            done += sum(len(text.encode()) for text in texts)
            if on_progress:
                on_progress(done, corpus.n_bytes)
        return np.concatenate(groups)

    return stream(corpus.train), stream(corpus.val)


def _groups(pieces: Sequence[Document]) -> Iterator[Sequence[Document]]:
    """The pieces in groups of about `GROUP` characters."""
    first, size = 0, 0
    for i, piece in enumerate(pieces, start=1):
        size += len(piece.text)
        if size >= GROUP or i == len(pieces):
            yield pieces[first:i]
            first, size = i, 0


def _key(corpus: Corpus, tokenizer: Tokenizer) -> str:
    """Cache key: SHA-256 of all that the streams depend on: pieces, split, tokenizer, format."""
    digest = hashlib.sha256(f"{FORMAT} {tokenizer.sha256}\n".encode())
    for pieces in (corpus.train, corpus.val):
        digest.update(f"{len(pieces)}\n".encode())
        for piece in pieces:
            raw = piece.text.encode()
            digest.update(f"{len(raw)} {piece.ends}\n".encode())
            digest.update(raw)
    return digest.hexdigest()


class Batches:
    """Batches of windows of a token stream: a stateless, pure function of (seed, step).

    A window is `block` inputs and `block` targets shifted by one: `block + 1` tokens, of which
    the last is the next window's first input, so each token is an input and a target once. An
    epoch has its own phase (start of the first window) and shuffles its `windows`; batches may
    span two epochs. There is no state, so a resumed run continues where it stopped.

    Raises:
        BadInput: the stream is shorter than a window, or an argument is out of range.
    """

    def __init__(self, n_tokens: int, block: int, batch: int, seed: int) -> None:
        if block < 1 or batch < 1 or seed < 0:
            raise BadInput(
                f"block ({block}) and batch ({batch}) must be at least 1, seed ({seed}) at least 0"
            )
        if n_tokens < block + 1:
            raise BadInput(
                f"the training text has {n_tokens} tokens, but a block of {block} needs "
                f"{block + 1}; give a longer text or a shorter block"
            )
        self.block, self.batch, self.seed = block, batch, seed
        # One window fewer than fit leaves room for more than `block` phases. The number is
        # the same in every epoch, so that row -> epoch is a division.
        self.windows = max(1, n_tokens // block - 1)
        self._phases = n_tokens - self.windows * block

    def starts(self, step: int) -> Integer[np.ndarray, " B"]:
        """Start of each row of a step's batch in the stream."""
        return self.starts_range(step, 1)[0]

    def starts_range(self, first_step: int, n_steps: int) -> Integer[np.ndarray, "n_steps B"]:
        """`starts` of consecutive steps."""
        first, last = first_step * self.batch, (first_step + n_steps) * self.batch
        starts = np.empty(last - first, np.int64)
        row = first
        while row < last:
            epoch, offset = divmod(row, self.windows)
            taken = min(self.windows - offset, last - row)
            order = _epoch(self.seed, epoch, self.windows, self._phases, self.block)
            starts[row - first : row - first + taken] = order[offset : offset + taken]
            row += taken
        return starts.reshape(n_steps, self.batch)

    def rows(
        self,
        stream: Integer[np.ndarray, " stream"],
        first_step: int,
        n_steps: int,
        part: slice = slice(None),
    ) -> Rows:
        """The batches of consecutive steps, [n_steps, B, block + 1], or a part of their rows.

        With several processes each reads only its part, and no iterator has a position to save.
        """
        starts = self.starts_range(first_step, n_steps)[:, part]
        return Rows(stream[starts[..., None] + np.arange(self.block + 1)].astype(np.int32))


@functools.lru_cache(maxsize=2)  # a step needs one epoch, or the two at a border
def _epoch(
    seed: int, epoch: int, windows: int, phases: int, block: int
) -> Integer[np.ndarray, " windows"]:
    """Starts of one epoch's windows, shuffled."""
    rng = np.random.default_rng([seed, epoch])
    return rng.integers(phases) + block * rng.permutation(windows)
