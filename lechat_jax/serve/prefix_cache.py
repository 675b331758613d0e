"""Prefix cache: KV caches of prompts' beginnings, so that what prompts share is read once.

A ring buffer has a constant size, so what is kept is a snapshot of a whole row at the border of a
prefill chunk. It is found again only by a prompt that is cut into chunks in the same way up to
there: its keys and values are then the same to the last bit as if they had been read anew.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np

from lechat_jax.generate.continuous_batch import next_chunk
from lechat_jax.model.cache import Cache

NONE: Mapping[int, bytes] = MappingProxyType({})
MOST_SEEN = 100_000  # borders that are remembered without a snapshot


class Border(NamedTuple):
    """Border between two prefill chunks of a prompt: its position, and a digest of all before."""

    at: int
    digest: bytes


class Prefix(NamedTuple):
    """The longest known beginning of a prompt: its length, and its snapshot if there is one."""

    length: int
    snapshot: Cache | None


class PrefixCache:
    """LRU cache of row snapshots, limited in bytes.

    Two snapshots are taken of a prompt: at its last border, where the next turn of a chat goes
    on, and at the last border that another prompt has had, such as a system prompt's.

    Attributes:
        bytes_held: size of all snapshots.

    Args:
        max_bytes: limit of `bytes_held`; 0 keeps nothing.
        chunks: sizes of prefill chunks.
    """

    def __init__(self, max_bytes: int, chunks: tuple[int, ...]) -> None:
        self.bytes_held = 0
        self._max_bytes, self._chunks = max_bytes, chunks
        self._snapshots: OrderedDict[bytes, Cache] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def look_up(
        self, prompt: Sequence[int], images: Mapping[int, bytes] = NONE
    ) -> tuple[Prefix, set[int]]:
        """The longest beginning with a snapshot, and the borders at which to take more.

        `images` are digests of the images that begin at some positions.
        """
        if not self._max_bytes:
            return Prefix(0, None), set()
        borders = self._borders(prompt, images)
        found, wanted = Prefix(0, None), set[int]()
        for at, digest in borders:
            if digest in self._snapshots:
                self._snapshots.move_to_end(digest)
                found = Prefix(at, self._snapshots[digest])
            elif digest in self._seen:
                wanted = {at}  # of a beginning that prompts share, the longest
            self._seen[digest] = None
            self._seen.move_to_end(digest)
        while len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)
        wanted |= {border.at for border in borders[-1:]}
        return found, {at for at in wanted if at > found.length}

    def add(
        self,
        prompt: Sequence[int],
        at: int,
        snapshot: Cache,
        images: Mapping[int, bytes] = NONE,
    ) -> None:
        """Keeps a snapshot of a prompt's first `at` tokens; the least recently used make room."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(snapshot))
        digest = next(border.digest for border in self._borders(prompt, images) if border.at == at)
        if size > self._max_bytes or digest in self._snapshots:
            return
        self._snapshots[digest] = snapshot
        self.bytes_held += size
        while self.bytes_held > self._max_bytes:
            self._snapshots.popitem(last=False)
            self.bytes_held -= size  # all are of one size

    def clear(self) -> None:
        """Forgets all snapshots."""
        self._snapshots.clear()
        self.bytes_held = 0

    def _borders(self, prompt: Sequence[int], images: Mapping[int, bytes]) -> list[Border]:
        """The borders after each full chunk of a prompt, whose last token is never read."""
        ids = np.asarray(prompt, np.int32)
        at, last, digest, borders = 0, len(prompt) - 1, b"", []
        while (chunk := next_chunk(self._chunks, last - at)) <= last - at:
            part = ids[at : at + chunk].tobytes()
            part += b"".join(images[i] for i in sorted(images) if at <= i < at + chunk)
            at, digest = at + chunk, hashlib.sha256(digest + part).digest()
            borders.append(Border(at, digest))
        return borders
