"""Headers and index files of safetensors checkpoints, with a clear error for any other file.

The safetensors library validates each file; only the place of each tensor is read here, so
that it can be mapped, which the library does not offer for bfloat16 without a framework.
"""

import dataclasses
import json
import math
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lechat_jax.errors import BadInput

DTYPES: dict[str, np.dtype] = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "BOOL": np.dtype(np.bool_),
}
LONGEST_HEADER = 100_000_000  # bytes; the library's own limit


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file: name, dtype, shape and byte offset.

    Attributes:
        name: its key in the file.
        dtype: type of its elements; `ml_dtypes.bfloat16` for BF16.
        shape: sizes of its axes, row-major.
        path: the file that holds it.
        start: offset of its first byte from the start of the file.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    path: Path
    start: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes.

        >>> TensorInfo("norm.scale", np.dtype(np.float32), (3, 2), Path("x"), 8).nbytes
        24
        """
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(folder: Path, file_name: str) -> dict[str, TensorInfo]:
    """Reads the header of one safetensors file: its tensors by name.

    Raises:
        BadInput: the file is missing, outside the folder, damaged, not safetensors, or has a
            dtype that numpy lacks.
    """
    path = folder / file_name
    if not path.is_file():
        raise BadInput(f"{path} is missing; download it, or the whole checkpoint, again")
    check_inside(folder, path)
    _check_valid(path)
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(n_header), path)
    infos = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if (dtype := DTYPES.get(entry["dtype"])) is None:
            raise BadInput(
                f"{name} in {path} is {entry['dtype']}, which is not read here; "
                f"convert it to one of {', '.join(DTYPES)} first"
            )
        start = 8 + n_header + entry["data_offsets"][0]
        infos[name] = TensorInfo(name, dtype, tuple(entry["shape"]), path, start)
    return infos


def read_index(index: Path) -> dict[str, str]:
    """Reads a shard index (`*.safetensors.index.json`): the file name of each tensor's shard.

    Raises:
        BadInput: it is not an index, or a name leads out of the folder, as `../x` and `C:x` do.
    """
    weight_map = parse_json(index.read_bytes(), index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{index} has no weight_map of tensors")
    for name, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or not shard.endswith(".safetensors")
            or "\0" in shard
            or PurePosixPath(shard).name != shard
            or PureWindowsPath(shard).name != shard
        ):
            raise BadInput(
                f"{index} puts {name} into {shard!r}, which is no file of its folder; "
                "do not trust this checkpoint"
            )
    return weight_map


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """Parses a JSON object, refusing duplicate keys.

    Raises:
        BadInput: it is not JSON, not an object, or has a key twice; `path` is named.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise BadInput(f"{path} has the key {twice} twice")
        return found

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise BadInput(f"{path} is not valid JSON; download it again") from None
    if not isinstance(parsed, dict):
        raise BadInput(f"{path} is not a JSON object; download it again")
    return parsed


def check_inside(folder: Path, path: Path) -> None:
    """Refuses a symbolic link out of the folder, unless it leads into the Hugging Face Hub's cache.

    In that cache a snapshot is a folder of links to `../../blobs`.

    Raises:
        BadInput: the file is a link to somewhere else.
    """
    home, target = folder.resolve(), path.resolve()
    in_cache = home.parent.name == "snapshots" and target.is_relative_to(
        home.parent.parent / "blobs"
    )
    if not in_cache and not target.is_relative_to(home):
        raise BadInput(
            f"{path} is a link to {target}, outside its folder; put the file itself there"
        )


def _check_valid(path: Path) -> None:
    """Raises `BadInput` for a file that is not valid safetensors, naming what it seems to be."""
    try:
        with safe_open(path, framework="numpy"):
            return
    except (SafetensorError, OSError) as error:
        reason = str(error)
    with path.open("rb") as file:
        start = file.read(512)
        is_cut = _is_cut(start[:8], path.stat().st_size, start[8:] + file.read(LONGEST_HEADER))
    if start.startswith(b"version https://git-lfs"):
        kind = "a git-lfs pointer, not the file it points to; run: git lfs pull"
    elif start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        kind = "a web page saved under this name; download the file again, logged in if need be"
    elif start.startswith((b"{", b"[")):
        kind = "a JSON text saved under this name; download the file again"
    elif start.startswith((b"PK\x03\x04", b"\x80\x02")):
        kind = "a PyTorch file under this name; save its tensors as safetensors"
    elif not start:
        kind = "empty; download it again"
    elif is_cut:
        kind = f"cut short at {path.stat().st_size:,} bytes; download it again"
    else:
        kind = f"not a valid safetensors file ({reason}); download it again"
    raise BadInput(f"{path} is {kind}")


def _is_cut(length: bytes, size: int, rest: bytes) -> bool:
    """Whether a safetensors file of `size` bytes is truncated."""
    n_header = int.from_bytes(length, "little")
    if n_header > LONGEST_HEADER or not rest.startswith(b"{"):
        return size < 8
    ends = re.findall(rb'"data_offsets":\s*\[\s*\d+\s*,\s*(\d+)', rest[:n_header])
    return size < 8 + n_header + max(map(int, ends), default=0)
