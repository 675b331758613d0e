"""Tokenised text as two token streams, found in the cache or made from shards."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from lechat_jax.data.parallel_encoding import dtype_of
from lechat_jax.data.sources import in_words, notes_of, open_texts
from lechat_jax.data.token_cache import look_up, not_kept
from lechat_jax.data.token_shards import (
    ALONE,
    Processes,
    Progress,
    ShardedTokens,
    Streams,
    cache_key,
    types_of,
)
from lechat_jax.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A tokenised text as two token streams: BOS, ids, and EOS where a document ends.

    Of ten documents or more, every tenth is held out, and with it all duplicates: a scored text is
    never trained on. Of much text fewer are held out, see `held_out_every`, and documents longer
    than `sources.LONGEST` count in pieces. Fewer documents are split by `split_few`.

    Attributes:
        train: training stream, in the smallest dtype that holds the vocabulary, memory-mapped.
        val: held-out stream. All its tokens are scored except BOS, which is given. EOS costs
            nats but stands for no byte, so bits per byte err on the high side.
        val_bytes: UTF-8 bytes of the text of `val`.
        name: name of the text.
        size: size of the text, in words.
        n_bytes: UTF-8 bytes of the text, both parts.
        sha256: digest of all of the text in order, without separators: that of `sha256sum` for a
            text file, or for the sorted text files of a folder through `cat`. Of several files
            in more than one group of 64 MiB, as stored, the digest of the digest of each, in
            hexadecimal, a line each.
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
    data: str | None,
    tokenizer: Tokenizer,
    cache_dir: Path | None = None,
    on_progress: Progress = lambda done, of: None,
    on_first: Callable[[], None] = lambda: None,
    processes: Processes = ALONE,
) -> Tokens:
    """Tokenises the text that `data` names (see `open_texts`), or reads its tokens from the cache.

    The cache is one file in `cache_dir` (else in `tokens` below `cache_home()`), named by the
    SHA-256 of all that the tokens depend on, of a text file its path, size and times of change,
    and verified whenever it is read. If it cannot be written, the tokens are in a temporary file
    and `note` says so.

    Processes that share the cache folder each tokenise a part of the files; where they do not share
    it, each of them tokenises them all.

    Args:
        on_progress: called with the stored bytes of the text done and to do, while tokenising.
        on_first: called once the tokens are found or the first documents were read.
        processes: those of a multi-host run.

    Raises:
        BadInput: there is no such text, it is unreadable or empty, or too short for a held-out
            part; or the disk is full.
    """
    source, types = open_texts(data), types_of(dtype_of(tokenizer))
    path, arrays, notes = look_up(cache_key(source, tokenizer), types, cache_dir)
    folder = path and path.parent
    found = Streams.of(arrays) if arrays else None
    cached = found is not None
    if cached:
        on_first()
    if processes.anywhere(not cached):
        with contextlib.ExitStack() as stack:
            if folder is None or not (cached or _can_write(folder, notes)):
                temporary = tempfile.TemporaryDirectory(prefix="lechat-")
                folder = Path(stack.enter_context(temporary))
            shards = ShardedTokens(source, tokenizer, folder, on_progress)
            if not cached:
                on_first()
            found = shards.streams_together(found, processes)
    assert found
    facts = found.facts
    return Tokens(
        train=found.train,
        val=found.val,
        val_bytes=facts["val_bytes"],
        name=source.name,
        size=in_words(facts["n_files"], facts["n_documents"], "document", facts["n_bytes"]),
        n_bytes=facts["n_bytes"],
        sha256=facts["sha256"],
        cached=cached,
        note="; ".join([*notes_of(source, map(tuple, facts["skipped"])), *notes]),
    )


def _can_write(folder: Path, notes: list[str]) -> bool:
    """Whether the cache folder can be written; else the reason is noted."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        notes.append(not_kept(error))
        return False
