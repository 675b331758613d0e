"""Sharded tokenisation: in parallel and resumably, so that memory does not grow with the text.

Documents are read, tokenised by several processes and written in shards of some 64 MB of text; a
start that was interrupted goes on from the last shard. Then the shards become the two streams, in
one file that is memory-mapped.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Integer

from lechat_jax.data.parallel_encoding import (
    MOST,
    Encoded,
    WorkEach,
    cores,
    dtype_of,
    encode_texts,
    workers,
)
from lechat_jax.data.sources import (
    Document,
    TextFile,
    TextSource,
    TextStream,
    joined,
    notes_of,
)
from lechat_jax.data.split import EVERY, held_out_every, split_few
from lechat_jax.data.token_cache import Arrays, DamagedCache, read_arrays, write_arrays
from lechat_jax.errors import BadInput
from lechat_jax.files.atomic import disk_errors
from lechat_jax.tokenizer.tokenizer import Tokenizer

FORMAT = 3  # of the streams and of the cache file; a new number makes every cache anew
GROUP = 1 << 20  # characters that a process tokenises at a time
SHARD = 1 << 26  # characters of a shard, and stored bytes of files that are tokenised together
FEW_BYTES = 1 << 24  # stored, which one process has tokenised before others have started
ATTEMPTS = 5
REMEDY = "the next start goes on from what is kept there (LECHAT_CACHE names another folder)"
WEEK = 7 * 24 * 3600  # seconds for which what an interrupted start has left is kept
BYTES = np.dtype(np.uint8)
# What the disk says where another process that is done deletes the folder that this one writes to;
# of `mkdir`, which found the folder and then did not, that there is a file.
DELETED = FileNotFoundError, FileExistsError

Item = TypeVar("Item")
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a multi-host run, each of which tokenises its part of the files.

    Attributes:
        index: number of this process, from 0.
        count: number of processes.
        anywhere: logical or of a flag over all processes, which must all call it.
    """

    index: int
    count: int
    anywhere: Callable[[bool], bool]


ALONE = Processes(0, 1, lambda flag: flag)


class Streams(NamedTuple):
    """The two streams of a cache file, and what is known of their text, as JSON types."""

    train: Integer[np.ndarray, " train"]
    val: Integer[np.ndarray, " val"]
    facts: dict[str, Any]

    @classmethod
    def of(cls, arrays: Arrays) -> "Streams":
        """The streams in the arrays of a cache file."""
        return cls(arrays["train"], arrays["val"], _facts_in(arrays))


def types_of(dtype: np.dtype) -> dict[str, np.dtype]:
    """The dtypes of the arrays of a cache file whose ids have this one."""
    return {"train": dtype, "val": dtype, "facts": BYTES}


def cache_key(source: TextSource, tokenizer: Tokenizer) -> str:
    """The key of a text's cache file."""
    return _key(source.files, tokenizer, f"{source.in_folder}")


def _key(files: Iterable[TextFile], tokenizer: Tokenizer, more: str = "") -> str:
    """Cache key: SHA-256 of all that tokens depend on: files, tokenizer, format."""
    lines = [f"{FORMAT} {tokenizer.sha256} {more}", *(file.identity for file in files)]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


class _Unit(NamedTuple):
    """Files that are tokenised together, and the folder of their shards.

    The shards are `00000` and so on, and once all are there `text` says what the text was.
    """

    files: Sequence[TextFile]
    folder: Path

    @property
    def size(self) -> int:
        """Stored bytes."""
        return sum(file.size for file in self.files)

    @property
    def text(self) -> Path:
        """The file that is there when all shards are."""
        return self.folder / "text"

    def shard(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{number:05}"

    def read(self, path: Path, types: Mapping[str, np.dtype]) -> Arrays:
        """Reads a file of the unit, which is no longer done where it is missing or damaged.

        Raises:
            FileNotFoundError: it is missing, or was damaged and is deleted.
        """
        with contextlib.suppress(DamagedCache):
            if found := read_arrays(path, types):
                return found
        for each in (self.text, path):
            each.unlink(missing_ok=True)
        raise FileNotFoundError(path)


class ShardedTokens:
    """The token streams of a text, made from shards of its ids in folders beside the cache file.

    Attributes:
        few: the documents of a text of fewer than ten, with the reading of them; else `None`.
    """

    def __init__(
        self, source: TextSource, tokenizer: Tokenizer, folder: Path, on_progress: Progress
    ) -> None:
        self._source, self._tokenizer, self._on_progress = source, tokenizer, on_progress
        self._dtype = dtype_of(tokenizer)
        self._path = folder / f"{cache_key(source, tokenizer)}.tokens"
        more = f"shard {source.in_folder}"
        self._units = [
            _Unit(files, folder / f"{_key(files, tokenizer, more)}.shards")
            for files in _grouped(source.files, lambda file: file.size, SHARD)
        ]
        reading = TextStream(source)
        first = [*itertools.islice(reading.documents(source.files), EVERY)]
        self.few = (first, reading) if len(first) < EVERY else None
        pipes = (file.path for file in source.files if file.path and not file.path.is_file())
        if not self.few and (pipe := next(pipes, None)):
            raise BadInput(
                f"{pipe} is no file; a text of that size is read twice, so write it to one"
            )

    def streams_together(self, found: Streams | None, processes: Processes) -> Streams:
        """The streams: this process's part of the shards is made first, then what is missing here.

        Args:
            found: the streams, if this process has them already.
            processes: those of the run, which must all call this.
        """
        if processes.count > 1 and not found and not self.few:
            deleted = contextlib.suppress(*DELETED)
            with disk_errors(self._path.parent, REMEDY), deleted:
                self._make(self._units[processes.index :: processes.count])
        processes.anywhere(False)  # waits until all have made their parts
        is_shared = all(unit.text.exists() for unit in self._units)
        if not found and (processes.index == 0 or not is_shared):
            found = self.streams()
        processes.anywhere(False)  # waits until the first has joined the shards
        return found or self.streams()

    def streams(self) -> Streams:
        """The streams, for which what is not there yet is made.

        Another process may do the same at the same time, and delete the shards when it is done.
        """
        for _ in range(ATTEMPTS):
            with contextlib.suppress(DamagedCache, OSError):
                if arrays := read_arrays(self._path, types_of(self._dtype)):
                    for unit in self._units:
                        shutil.rmtree(unit.folder, ignore_errors=True)
                    return Streams.of(arrays)
            deleted = contextlib.suppress(*DELETED)
            with disk_errors(self._path.parent, REMEDY), deleted:
                if self.few:
                    self._write_few(*self.few)
                else:
                    self._make(self._units)
                    self._join()
        raise BadInput(f"what is written below {self._path.parent} does not stay as it is")

    def _write_few(self, documents: Sequence[Document], reading: TextStream) -> None:
        """Writes the streams of a few documents, cut into blocks."""
        texts = joined(documents)
        facts = _facts_of(self._source, [_facts_of_unit(reading, n_shards=0)])
        pieces = split_few(texts)
        parts = [[piece for piece, is_held in pieces if is_held == held] for held in (False, True)]
        self._check(*map(len, parts))
        done, streams = 0, list[list[np.ndarray]]()
        for part in parts:
            streams.append([np.zeros(0, self._dtype)])
            for group in _grouped(part, _n_characters, GROUP):
                encoded = encode_texts(self._tokenizer, group)
                streams[-1].append(encoded.ids)
                done += int(encoded.n_bytes.sum())
                self._on_progress(done, reading.n_bytes)
        facts["val_bytes"] = sum(len(piece.text.encode()) for piece in parts[1])
        self._write(streams[0], streams[1], facts)

    def _make(self, units: Sequence[_Unit]) -> None:
        """Makes what is missing of the shards of some units."""
        _sweep(self._path.parent)
        missing = [unit for unit in units if not unit.text.exists()]
        size, done, told, finished = sum(unit.size for unit in missing), 0, 0, 0

        def on_read(n_bytes: int) -> None:
            nonlocal done
            done += n_bytes

        def tell() -> None:
            nonlocal told
            if done > told:
                told = done
                self._on_progress(done, size)

        n = min(MOST, cores()) if size > FEW_BYTES else 1
        with workers("text", self._tokenizer, n) as work_each:
            for unit in missing:
                reading = TextStream(self._source, on_read)
                groups = _grouped(reading.documents(unit.files), _n_characters, GROUP)
                n_shards = self._make_shards(unit, groups, work_each, tell)
                done = finished = finished + unit.size  # those of skipped files among it
                tell()
                facts = _facts_of_unit(reading, n_shards)
                write_arrays(unit.text, {"facts": [_as_bytes(facts)]})

    def _make_shards(
        self,
        unit: _Unit,
        groups: Iterator[list[Document]],
        work_each: WorkEach,
        on_progress: Callable[[], None],
    ) -> int:
        """Tokenises groups of documents, but for those of shards that are there; counts shards."""
        number = 0
        while (first := next(groups, None)) is not None:
            shard, path = _up_to_a_shard(itertools.chain([first], groups)), unit.shard(number)
            number += 1
            if path.exists():
                for _ in shard:
                    on_progress()
                continue
            parts = list[Encoded]()
            for encoded in work_each(shard):
                parts.append(encoded)
                on_progress()
            columns = zip(*parts, strict=True)
            write_arrays(path, dict(zip(Encoded._fields, columns, strict=True)))
        return number

    def _join(self) -> None:
        """Writes the streams from all shards, without their text ever being in memory."""
        units = [_facts_in(unit.read(unit.text, {"facts": BYTES})) for unit in self._units]
        facts = _facts_of(self._source, units)
        types = {"hashes": np.dtype(np.uint64), "lengths": np.dtype(np.uint32)}
        types |= {"n_bytes": np.dtype(np.uint32), "ids": self._dtype}
        shards = [
            Encoded(**unit.read(unit.shard(number), types))
            for unit, known in zip(self._units, units, strict=True)
            for number in range(known["n_shards"])
        ]
        begins = np.cumsum([0, *(len(shard.lengths) for shard in shards)])
        every = held_out_every(int(begins[-1]), facts["n_bytes"])
        hashes = [
            shard.hashes[(-1 - begin) % every :: every]
            for shard, begin in zip(shards, begins.tolist(), strict=False)
        ]
        is_held = [np.isin(shard.hashes, np.concatenate(hashes)) for shard in shards]
        n_held = sum(int(held.sum()) for held in is_held)
        self._check(int(begins[-1]) - n_held, n_held)
        sizes = zip(shards, is_held, strict=True)
        facts["val_bytes"] = sum(int(shard.n_bytes[held].sum()) for shard, held in sizes)
        val = list[np.ndarray]()

        def train() -> Iterator[np.ndarray]:
            for shard, held in zip(shards, is_held, strict=True):
                of_val = np.repeat(held, shard.lengths)
                val.append(shard.ids[of_val])
                yield shard.ids[~of_val]

        self._write(train(), val, facts)

    def _write(
        self, train: Iterable[np.ndarray], val: Iterable[np.ndarray], facts: dict[str, Any]
    ) -> None:
        write_arrays(self._path, {"train": train, "val": val, "facts": [_as_bytes(facts)]})

    def _check(self, n_train: int, n_val: int) -> None:
        if not n_train or not n_val:
            raise BadInput(
                f"{self._source.name} is too short or repeats itself: {n_train} pieces to learn "
                f"from and {n_val} to validate on; give a longer text"
            )


def _facts_of_unit(reading: TextStream, n_shards: int) -> dict[str, Any]:
    """What is known of the text of a unit, as JSON types."""
    return {
        "n_shards": n_shards,
        "n_documents": reading.n_documents,
        "n_bytes": reading.n_bytes,
        "is_blank": reading.is_blank,
        "sha256": reading.sha256.hexdigest(),
        "digests": reading.digests,
        "n_read": reading.left.n_read,
        "skipped": reading.left.why,
    }


def _facts_of(source: TextSource, units: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is known of a text from its units, as JSON types.

    Raises:
        BadInput: there is nothing, or nothing but white space.
    """
    skipped = [(unit["n_read"], unit["skipped"]) for unit in units]
    notes_of(source, skipped)
    if all(unit["is_blank"] for unit in units):
        raise BadInput(f"{source.name} is empty; give --data a text to learn from")
    sha256 = units[0]["sha256"]
    if len(units) > 1:
        listed = "".join(f"{digest}\n" for unit in units for digest in unit["digests"])
        sha256 = hashlib.sha256(listed.encode()).hexdigest()
    return {
        "n_files": sum(unit["n_read"] for unit in units),
        "n_documents": sum(unit["n_documents"] for unit in units),
        "n_bytes": sum(unit["n_bytes"] for unit in units),
        "sha256": sha256,
        "skipped": skipped,
    }


def _as_bytes(facts: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(facts).encode(), BYTES)


def _facts_in(arrays: Arrays) -> dict[str, Any]:
    return json.loads(arrays["facts"].tobytes())


def _sweep(folder: Path) -> None:
    """Deletes what starts have left that were killed and never made again."""
    for path in [*folder.glob("*.shards"), *folder.glob(".tokens-*")]:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > WEEK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _n_characters(document: Document) -> int:
    return len(document.text)


def _grouped(
    items: Iterable[Item], size: Callable[[Item], int], limit: int
) -> Iterator[list[Item]]:
    """Consecutive items in groups of `limit` in size or a little more, as they are asked for."""
    group, n = list[Item](), 0
    for item in items:
        group.append(item)
        n += size(item)
        if n >= limit:
            yield group
            group, n = [], 0
    if group:
        yield group


def _up_to_a_shard(groups: Iterable[list[Document]]) -> Iterator[list[Document]]:
    """The groups from here on that are a shard."""
    n = 0
    for group in groups:
        yield group
        n += sum(map(_n_characters, group))
        if n >= SHARD:
            return
