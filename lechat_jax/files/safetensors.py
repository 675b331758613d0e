"""Safetensors files: memory-mapped reading, streamed writing, shards and index.

A 7B model is 14.5 GB, so nothing here holds one in memory: a tensor is read as a view into the
memory-mapped file, and written in pieces of a few megabytes.

A checkpoint is `<stem>.safetensors`, or shards and their index. Other files are ignored: a
repository often holds the same weights twice, in two formats.
"""

import collections
import contextlib
import hashlib
import io
import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Shaped
from safetensors import safe_open

from lechat_jax.errors import BadInput
from lechat_jax.files.checksums import sync
from lechat_jax.files.safetensors_header import DTYPES, TensorInfo, read_header, read_index

PIECE = 1 << 23  # bytes of a tensor at once: what is cast, and what another thread hashes
SLAB = (
    1 << 17
)  # bytes checked and then written, within the cache: 1 << 20 took twice the system time
AHEAD = 4  # pieces that may be written before they are hashed
SYNC = 1 << 28  # bytes between two requests to bring the file to the disk, while more is written

Wanted = tuple[str, np.dtype, tuple[int, ...]]
Read = Callable[[str], Shaped[np.ndarray, "..."]]
Piece = tuple[str, Shaped[np.ndarray, "..."]]
OnSlab = Callable[[str, Shaped[np.ndarray, "..."]], None]


class TensorFiles(Mapping[str, TensorInfo]):
    """The tensors of one safetensors checkpoint by name, in their order on the disk."""

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        self._infos = dict(sorted(infos.items(), key=lambda item: (item[1].path, item[1].start)))
        self._maps: dict[Path, mmap.mmap] = {}

    @classmethod
    def open(cls, folder: Path, stem: str = "model") -> "TensorFiles":
        """Opens `<stem>.safetensors` of a folder, or the shards of its index.

        Raises:
            BadInput: there is none, a file is missing, damaged or not safetensors, the index and
                the shards disagree, or a shard lies outside the folder.
        """
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.is_file():
            return cls(read_header(folder, single.name))
        if not index.is_file():
            raise BadInput(f"{folder} has neither {single.name} nor {index.name}")
        weight_map = read_index(index)
        infos: dict[str, TensorInfo] = {}
        for shard in sorted(set(weight_map.values())):
            for name, info in read_header(folder, shard).items():
                if name in infos:
                    raise BadInput(
                        f"{name} is in two shards, {infos[name].path.name} and {shard}; "
                        f"download {folder} again"
                    )
                infos[name] = info
        for name in sorted(weight_map.keys() | infos.keys()):
            listed, found = weight_map.get(name), infos.get(name)
            if listed is None and found is not None:
                raise BadInput(f"{found.path} has {name}, which {index.name} does not list")
            if found is None or found.path.name != listed:
                raise BadInput(f"{folder / str(listed)} lacks {name}, which {index.name} lists")
        return cls(infos)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The shards' paths, in order."""
        return tuple(dict.fromkeys(info.path for info in self._infos.values()))

    @property
    def metadata(self) -> dict[str, str]:
        """The `__metadata__` of the first file."""
        with safe_open(self.paths[0], framework="numpy") as file:
            return file.metadata() or {}

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """A tensor as a read-only view into the memory-mapped file (zero-copy, read when used).

        The file stays mapped while a view of it exists.
        """
        info = self._infos[name]
        if info.path not in self._maps:
            with info.path.open("rb") as file:
                self._maps[info.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.ndarray(info.shape, info.dtype, self._maps[info.path], info.start)

    def release(self) -> None:
        """Releases the pages that were read so far; views stay valid and read them again."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)


def write_tensors(
    folder: Path,
    stem: str,
    infos: Sequence[Wanted],
    read: Read,
    *,
    shard_bytes: int | None,
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None] | None = None,
    on_slab: OnSlab | None = None,
    on_file: Callable[[Path, str], None] | None = None,
) -> list[Path]:
    """Writes a safetensors checkpoint, synced to disk, the index (if any) last.

    At most one tensor is in memory, and none if `read` gives views of a file. The caller makes
    the folder visible when all is done; a failure leaves partial files there.

    Args:
        folder: an existing folder that is not visible yet.
        stem: gives `<stem>.safetensors`, or `<stem>-00001-of-00002.safetensors` and an index.
        infos: name, dtype and shape of each tensor, in the order in which they are written.
        read: gives a tensor by name. One of another dtype is cast, a piece at a time.
        shard_bytes: most bytes of tensors in a file, unless one alone has more; `None` for
            a single file.
        metadata: goes into each file; Hugging Face's libraries want `{"format": "pt"}`.
        on_bytes: called with the number of bytes just written.
        on_slab: called with each slab of each tensor, flat, before it is written; may raise.
        on_file: called with each finished file and its SHA-256 in hexadecimal.

    Raises:
        BadInput: a tensor has an unexpected shape, or the folder cannot be written.
    """
    paths = []
    shards = _shards(infos, shard_bytes)

    def pieces(shard: Sequence[Wanted]) -> Iterator[Piece]:
        yield "", np.frombuffer(_header(shard, metadata), np.uint8)
        for name, dtype, shape in shard:
            for piece in in_pieces(name, read(name), dtype, shape):
                yield name, piece

    with ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as syncer:
        synced = []
        for i, shard in enumerate(shards, 1):
            part = f"-{i:05}-of-{len(shards):05}" if len(shards) > 1 else ""
            path = folder / f"{stem}{part}.safetensors"
            digest = _write(
                path, pieces(shard), hasher if on_file else None, syncer, on_bytes, on_slab
            )
            if on_file:
                on_file(path, digest)
            synced.append(syncer.submit(_sync, path))  # while the next one is written
            paths.append(path)
        for done in synced:
            done.result()
    if len(shards) > 1:
        index = folder / f"{stem}.safetensors.index.json"
        text = _index(shards, paths)
        with _writing(index):
            index.write_bytes(text)
        if on_file:
            on_file(index, hashlib.sha256(text).hexdigest())
        _sync(index)
        paths.append(index)
    return paths


def in_pieces(
    name: str, array: Shaped[np.ndarray, "..."], dtype: np.dtype, shape: tuple[int, ...]
) -> Iterator[Shaped[np.ndarray, "..."]]:
    """Splits an array into flat pieces of `PIECE` bytes, cast to `dtype`.

    Raises:
        BadInput: it has an unexpected shape; `name` is named.
    """
    if array.shape != shape:
        raise BadInput(f"{name} has the shape {list(array.shape)} instead of {list(shape)}")
    flat = np.ascontiguousarray(array).reshape(-1)
    n = PIECE // max(array.itemsize, dtype.itemsize)
    for start in range(0, flat.size, n):
        with np.errstate(over="ignore"):  # it becomes infinite, which the caller may refuse
            piece = flat[start : start + n].astype(dtype, copy=False)
        yield piece


def write_piece(
    file: io.RawIOBase, name: str, piece: Shaped[np.ndarray, "..."], on_slab: OnSlab | None
) -> None:
    """Appends a piece to the file; `on_slab` is called with each slab before it is written."""
    n = SLAB // piece.itemsize
    for start in range(0, piece.size, n):
        slab = piece[start : start + n]
        if on_slab and name:
            on_slab(name, slab)
        rest = slab.view(np.uint8).data
        while rest:  # a write may take less than it is given
            rest = rest[file.write(rest) or 0 :]


def _write(
    path: Path,
    pieces: Iterator[Piece],
    hasher: ThreadPoolExecutor | None,
    syncer: ThreadPoolExecutor,
    on_bytes: Callable[[int], None] | None,
    on_slab: OnSlab | None,
) -> str:
    """Writes a file and returns its SHA-256; two threads hash and sync it meanwhile."""
    sha = hashlib.sha256()
    hashing: collections.deque[Future[None]] = collections.deque()
    n_written = n_synced = 0
    with _writing(path), path.open("wb", buffering=0) as file:
        for name, piece in pieces:
            if hasher:
                hashing.append(hasher.submit(sha.update, piece.view(np.uint8).data))
            write_piece(file, name, piece, on_slab)
            n_written += piece.nbytes
            if n_written - n_synced > SYNC:
                n_synced = n_written
                syncer.submit(_sync, path)
            if len(hashing) > AHEAD:
                hashing.popleft().result()
            if on_bytes:
                on_bytes(piece.nbytes)
    for done in hashing:
        done.result()
    return sha.hexdigest()


def _sync(path: Path) -> None:
    with _writing(path):
        sync(path)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Context manager that turns an `OSError` of a write, such as a full disk, into `BadInput`."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"cannot write {error.filename or path}: {error.strerror}") from error


def _shards(infos: Sequence[Wanted], shard_bytes: int | None) -> list[list[Wanted]]:
    """Distributes tensors over shards, in order, each as full as the limit allows."""
    shards: list[list[Wanted]] = [[]]
    size = 0
    for info in infos:
        if shards[-1] and shard_bytes is not None and size + _nbytes(info) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += _nbytes(info)
    return shards


def _header(infos: Sequence[Wanted], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a safetensors file, padded to 8 bytes, for an aligned memory map."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for info in infos:
        name, dtype, shape = info
        start, end = end, end + _nbytes(info)
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(shards: Sequence[Sequence[Wanted]], paths: Sequence[Path]) -> bytes:
    """The JSON of the shard index."""
    weight_map = {
        name: path.name for shard, path in zip(shards, paths, strict=True) for name, _, _ in shard
    }
    total = sum(_nbytes(info) for shard in shards for info in shard)
    found = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(found, indent=2) + "\n").encode()


def _nbytes(info: Wanted) -> int:
    return math.prod(info[2]) * info[1].itemsize
