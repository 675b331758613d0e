"""The file that keeps the tokens of a corpus: written whole or not at all, checked when read."""

import hashlib
import json
import operator
import os
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Integer

HEADER = 256  # bytes of JSON and spaces before the tokens, so that these are aligned

Streams = tuple[Integer[np.ndarray, " train"], Integer[np.ndarray, " val"]]


class DamagedCache(Exception):
    """The file is not as it was written; the message names it and says what is wrong."""


def write_streams(path: Path, streams: Streams) -> None:
    """One file with a header, the training stream and the validation stream.

    Readers see the old file or the new one, whoever else writes at the same time.

    Raises:
        OSError: the folder cannot be made or written.
    """
    train, val = streams
    header = {"train": len(train), "val": len(val), "sha256": _sha256(train, val)}
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=".tokens-")
    try:
        with open(handle, "wb") as file:
            file.write(json.dumps(header).encode().ljust(HEADER))
            file.write(train.data)
            file.write(val.data)
        os.replace(beside, path)
    finally:
        Path(beside).unlink(missing_ok=True)


def read_streams(path: Path, dtype: np.dtype) -> Streams | None:
    """The streams in the file, memory-mapped; `None` when there is no such file.

    Raises:
        OSError: the file cannot be read.
        DamagedCache: it is not as it was written.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(HEADER)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return None
    try:
        header = json.loads(raw)
        n_train, n_val = operator.index(header["train"]), operator.index(header["val"])
        sha256 = header["sha256"]
        expected = HEADER + (n_train + n_val) * dtype.itemsize
    except (ValueError, LookupError, TypeError) as error:
        raise DamagedCache(f"{path}: unreadable header") from error
    if size != expected:
        raise DamagedCache(f"{path}: {size} bytes instead of {expected}")
    tokens = np.memmap(path, dtype, mode="r", offset=HEADER)
    train, val = tokens[:n_train], tokens[n_train:]
    if _sha256(train, val) != sha256:
        raise DamagedCache(f"{path}: wrong checksum")
    return train, val


def _sha256(train: Integer[np.ndarray, " train"], val: Integer[np.ndarray, " val"]) -> str:
    """The digest of both streams and of where one ends and the other begins."""
    digest = hashlib.sha256(f"{len(train)} {len(val)} {train.dtype}\n".encode())
    digest.update(train.data)
    digest.update(val.data)
    return digest.hexdigest()
