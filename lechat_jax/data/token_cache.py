"""Token cache: tokenised arrays in one file, atomic, memory-mapped and verified by SHA-256."""

import hashlib
import json
import operator
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lechat_jax.files.paths import cache_home

HEADER = 256  # bytes of JSON and spaces before the arrays, so that these are aligned

Arrays = dict[str, np.ndarray]


class DamagedCache(Exception):
    """A cache file is damaged; the message names it and the damage."""


class Kept(NamedTuple):
    """Arrays that were read from the cache or computed.

    Attributes:
        arrays: the arrays, memory-mapped when they are in the cache.
        cached: whether they came from the cache.
        note: a message on the cache (damaged, not writable), or empty.
    """

    arrays: Arrays
    cached: bool
    note: str


class Lookup(NamedTuple):
    """What the cache has of a key.

    Attributes:
        path: the key's file; `None` where there is no cache folder.
        arrays: its arrays, memory-mapped; `None` if it is not there, or damaged.
        notes: messages on the cache.
    """

    path: Path | None
    arrays: Arrays | None
    notes: list[str]


def look_up(key: str, types: Mapping[str, np.dtype], folder: Path | None = None) -> Lookup:
    """Reads the arrays of a key from the cache.

    Args:
        key: digest of all that the arrays depend on.
        types: dtype of each array, widest first.
        folder: cache folder; by default `tokens` below `cache_home()`.
    """
    path = None
    try:
        path = (folder or cache_home() / "tokens") / f"{key}.tokens"
        return Lookup(path, read_arrays(path, types), [])
    except DamagedCache as error:
        note = f"the cached tokens were damaged ({error}) and have been made again"
    except OSError as error:
        note = f"no cached tokens could be read ({error})"
    return Lookup(path, None, [note])


def not_kept(error: Exception) -> str:
    """A message on a cache that cannot be written."""
    return f"the tokens could not be kept for the next run ({error})"


def kept(
    key: str, types: Mapping[str, np.dtype], make: Callable[[], Arrays], folder: Path | None = None
) -> Kept:
    """Reads the arrays of a key from the cache, see `look_up`, or computes and stores them.

    If the cache cannot be written, the arrays stay in memory and `note` says so.
    """
    path, arrays, notes = look_up(key, types, folder)
    cached = arrays is not None
    if arrays is None:
        arrays = make()
        try:
            if path:
                write_arrays(path, {name: [array] for name, array in arrays.items()})
                arrays = read_arrays(path, types) or arrays
        except (DamagedCache, OSError) as error:
            notes.append(not_kept(error))
    return Kept(arrays, cached, "; ".join(notes))


def write_arrays(path: Path, arrays: Mapping[str, Iterable[np.ndarray]]) -> None:
    """Writes arrays, each in one or more parts, to one file, after a header, atomically.

    The parts are written as they come, so that all of an array need never be in memory. Readers
    see the old file or the new one, even with several writers.

    Raises:
        OSError: the folder cannot be created or written to.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=".tokens-")
    try:
        with open(handle, "wb") as file:
            file.write(bytes(HEADER))
            sizes, types, digest = dict[str, int](), dict[str, np.dtype](), hashlib.sha256()
            for name, parts in arrays.items():
                sizes[name] = 0
                for part in parts:
                    sizes[name] += len(part)
                    types[name] = part.dtype
                    digest.update(part.data)
                    file.write(part.data)
            digest.update(_described(sizes, types))
            header = json.dumps(sizes | {"sha256": digest.hexdigest()}).encode()
            assert len(header) <= HEADER
            file.seek(0)
            file.write(header.ljust(HEADER))
        os.replace(beside, path)
    finally:
        Path(beside).unlink(missing_ok=True)


def read_arrays(path: Path, types: Mapping[str, np.dtype]) -> Arrays | None:
    """Reads the arrays of a file, memory-mapped and verified; `None` if there is no file.

    Raises:
        OSError: the file cannot be read.
        DamagedCache: the file is damaged.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(HEADER)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return None
    try:
        header = json.loads(raw)
        lengths = {name: operator.index(header[name]) for name in types}
        sha256 = header["sha256"]
        expected = HEADER + sum(n * types[name].itemsize for name, n in lengths.items())
    except (ValueError, LookupError, TypeError) as error:
        raise DamagedCache(f"{path}: unreadable header") from error
    if size != expected or min(lengths.values()) < 0:
        raise DamagedCache(f"{path}: {size} bytes instead of {expected}")
    found, at, digest = {}, HEADER, hashlib.sha256()
    whole = np.memmap(path, np.uint8, mode="r")
    for name, n in lengths.items():
        end = at + n * types[name].itemsize
        found[name] = whole[at:end].view(types[name])
        at = end
    digest.update(whole[HEADER:].data)
    digest.update(_described(lengths, types))
    if digest.hexdigest() != sha256:
        raise DamagedCache(f"{path}: wrong checksum")
    return found


def _described(lengths: Mapping[str, int], types: Mapping[str, np.dtype]) -> bytes:
    """The lengths and dtypes of arrays, for their digest."""
    return " ".join(f"{n} {types[name]}" for name, n in lengths.items()).encode()
