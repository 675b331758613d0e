"""Atomic file writes (a temporary file, then a rename), and checks that a write will succeed."""

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from lechat_jax.errors import BadInput

PROBE = 1 << 16  # bytes that a full disk has no room for
STREAMS = ("/dev/std", "/dev/fd/", "/proc/")  # files of a process, whatever they are called


def write_atomic(path: Path, content: str | bytes, remedy: str = "name another file") -> None:
    """Writes a file atomically: it has all of the content, or is what it was.

    A pipe or a device, such as /dev/stdout, is written to and stays one.

    Raises:
        BadInput: the file cannot be written; `remedy` ends the message.
    """
    raw = content.encode() if isinstance(content, str) else content
    if _is_device(path):
        with disk_errors(path, remedy), path.open("ab") as file:
            file.write(raw)
        return
    target = path.resolve()  # what a symbolic link names, which stays one
    beside = _beside(target)
    with disk_errors(path, remedy):
        try:
            beside.write_bytes(raw)
            os.replace(beside, target)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise


@contextlib.contextmanager
def disk_errors(path: Path, remedy: str = "name another file") -> Iterator[None]:
    """Context manager that turns an `OSError` of a write, such as a full disk, into `BadInput`."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"cannot write {path} ({error.strerror}); {remedy}") from error


def check_writable(*paths: Path | None) -> None:
    """Raises `BadInput` for output files that are not writable, before the work and not after it.

    Their folder must exist and have room for a few bytes. `None` stands for a file not requested.
    """
    wanted = [path for path in paths if path is not None]
    for path in wanted:
        if wanted.count(path) > 1:
            raise BadInput(f"{path} is to hold two things; name another file for one of them")
        folder = path.absolute().parent
        if os.path.isdir(path):
            raise BadInput(f"{path} is a folder; name a file in it")
        if not os.path.isdir(folder):
            raise BadInput(f"there is no folder {folder} to write {path.name} to")
        with disk_errors(path):
            if _is_device(path):
                _probe_device(path)
            else:
                _probe(_beside(path.resolve()))


def check_new_folder(folder: Path, n_bytes: int = 0) -> None:
    """Raises `BadInput` if a folder cannot be written to or has less than `n_bytes` free.

    A missing folder is created for the check and removed again.
    """
    folder = folder.absolute()
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _probe(folder / f".{os.getpid()}.writable")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise BadInput(
            f"cannot write to {folder}: {error.strerror}; name another folder"
        ) from error
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
    if free < n_bytes:
        raise BadInput(
            f"{folder} needs {n_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB of the disk are free; "
            "make room, or name a folder elsewhere"
        )


def _probe(path: Path) -> None:
    """Writes a file and deletes it."""
    try:
        path.write_bytes(bytes(PROBE))
    finally:
        path.unlink(missing_ok=True)


def _probe_device(path: Path) -> None:
    """Writes a line to a character device; one such as /dev/full then raises `OSError`."""
    if stat.S_ISCHR(path.stat().st_mode):
        with path.open("ab", buffering=0) as file:
            if not file.isatty():
                file.write(b"\n")


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _is_device(path: Path) -> bool:
    """Whether the path is a device, a pipe or a stream, which a rename cannot replace."""
    is_stream = str(path.absolute()).startswith(STREAMS)
    return is_stream or (os.path.exists(path) and not os.path.isfile(path))
