"""Free memory, checks that an allocation fits, and out-of-memory errors as one sentence.

The system kills a process that takes too much memory, without a message and often after
minutes. So large allocations are checked first.
"""

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path

import psutil

from lechat_jax.errors import BadInput

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

# What XLA, CUDA, numpy and PyTorch say. A kernel whose own fast memory is too small for it
# (`shared memory`, `vmem`) is a mistake of ours, and says so in a traceback.
EXHAUSTED = r"out.of.memory|(can ?not|can't|unable to|failed to) allocate"
OTHER_MEMORY = r"shared memory|vmem"


def available_bytes() -> int:
    """Host memory available to this process, in bytes: the system's, within the cgroup limits.

    A container, a Slurm job and a service are killed at the limit of their control group, however
    much the machine has.
    """
    return max(0, min([psutil.virtual_memory().available, *_left_in_groups()]))


def check_fits(what: str, needed: int, free: int | None, remedy: str) -> None:
    """Raises `BadInput` if `needed` bytes exceed `free` ones; `None` is unknown and passes.

    >>> check_fits("the cache takes", 3 * 10**9, 2 * 10**9, "ask for less")
    Traceback (most recent call last):
    lechat_jax.errors.BadInput: the cache takes 3.00 GB and 2.00 GB are free; ask for less
    """
    if free is not None and needed > free:
        raise BadInput(f"{what} {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; {remedy}")


class OutOfMemory(BadInput):
    """Out of memory, on the host or on a device."""


@contextlib.contextmanager
def running_out(remedy: str) -> Iterator[None]:
    """Context manager that turns out-of-memory errors into `OutOfMemory`; see `exhausted`."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if why := exhausted(error):
            raise OutOfMemory(f"{why}; {remedy}") from error
        raise


def exhausted(error: BaseException) -> str | None:
    """The message for an out-of-memory error of the host or a device; `None` for any other error.

    >>> exhausted(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3000000000 bytes."))
    'out of memory: there was no room for another 3.00 GB'
    >>> exhausted(MemoryError()), exhausted(RuntimeError("shapes do not agree"))
    ('out of memory', None)
    """
    said = str(error)
    ran_out = re.search(EXHAUSTED, said, re.IGNORECASE) and not re.search(OTHER_MEMORY, said)
    if not (ran_out or isinstance(error, MemoryError) or _is_nomem(error)):
        return None
    asked = re.search(r"allocat\w+ (?:of )?(\d+) bytes", said)
    more = f": there was no room for another {int(asked[1]) / 1e9:.2f} GB" if asked else ""
    return f"out of memory{more}"


def _is_nomem(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.ENOMEM


def _left_in_groups(groups: Path = GROUPS, own: Path = OWN) -> Iterator[int]:
    """Bytes left below the memory limit of each enclosing cgroup, reclaimable file cache included.

    A container often sees its own group as the root, whatever its name in `own`.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, taken, prefix = groups, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            root, prefix = groups / "memory", "total_"
            limit, taken = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            with contextlib.suppress(OSError, ValueError):  # no limit there, or "max"
                most = int((group / limit).read_text())
                used = int((group / taken).read_text())
                stat = dict(map(str.split, (group / "memory.stat").read_text().splitlines()))
                files = (
                    int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active")
                )
                yield most - used + sum(files)
