"""File lock on a folder (POSIX record lock, or Windows), released when its process ends.

The operating system holds it, so nothing is left to clean up after `kill -9` or a power cut. On
Linux and macOS it is a POSIX record lock, which NFS knows too, so that it holds between hosts,
and which no forked process inherits; on Windows the lock of one byte.
"""

import errno
import importlib
import os
import socket
from pathlib import Path

from lechat_jax.errors import BadInput

LOCK = ".lock"
PLACE = 2**30  # of the byte that is locked on Windows, where nobody could read it otherwise
TAKEN = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
UNKNOWN = {errno.ENOLCK, errno.ENOSYS, getattr(errno, "ENOTSUP", errno.ENOSYS)}


class Lock:
    """Exclusive lock on a folder between processes, until `release` or the end of the process.

    A file system without locks (some network mounts) gives none, and `is_held` is False. Threads
    of one process do not exclude each other.

    Raises:
        BadInput: another process holds it; its process id and host are named.
    """

    def __init__(self, folder: Path) -> None:
        # Never opened twice at a time: a process loses a record lock when it closes any of its
        # handles of the file. Not truncated, since it may be another's.
        self._file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        self.is_held = True
        try:
            _lock(self._file)
        except OSError as error:
            if error.errno in TAKEN:
                holder = os.read(self._file, 1000).decode(errors="replace").strip()
                os.close(self._file)
                raise BadInput(
                    f"{folder} is being trained by {holder or 'another process'}; wait for it, or "
                    "stop it first (it saves when it is sent SIGTERM)"
                ) from None
            if error.errno not in UNKNOWN:
                raise
            self.is_held = False
        os.ftruncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Releases the lock."""
        os.close(self._file)


def _lock(file: int) -> None:
    """Takes the lock without waiting; raises `OSError` if another process holds it."""
    if os.name == "nt":
        msvcrt = importlib.import_module("msvcrt")
        os.lseek(file, PLACE, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)
    else:
        fcntl = importlib.import_module("fcntl")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
