"""Isolated process: a measurement in a Python process of its own, by `run`.

What it takes of the memory, of a device's above all, is known and is free for the next one, and
what goes wrong in it ends no other. `python -m parity.bench.isolated` is that process.
"""

import contextlib
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from lechat_jax.errors import BadInput

Item = TypeVar("Item")


def run(
    failure: str, job: Callable[..., Iterator[Item]], *args: object, until: float = math.inf
) -> Iterator[Item]:
    """What `job(*args)` yields in a process of its own, each item as soon as it is there.

    Job, arguments and items are pickled: the job is a function of a module. What it prints is
    shown to nobody, but for the last line if it fails.

    Args:
        failure: how the sentence begins that tells a failure.
        job: a generator function.
        args: of it.
        until: when the process is killed, in seconds since the epoch; it is given at least one.

    Raises:
        BadInput: the job failed, the process died or was killed; after all items that it yielded.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", "parity.bench.isolated"],
            # JAX would take most of a GPU's memory at its first use.
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        is_late = threading.Event()

        def stop() -> None:
            is_late.set()  # before the end of its output can be seen
            process.kill()

        clock = threading.Timer(min(max(1.0, until - time.time()), threading.TIMEOUT_MAX), stop)
        clock.daemon = True
        clock.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it has died, for a reason that it printed
                pickle.dump((job, args), process.stdin)
                process.stdin.close()
            # A process that dies may leave half an item.
            with contextlib.suppress(EOFError, pickle.UnpicklingError):
                while True:
                    yield pickle.load(process.stdout)
            process.wait()
        finally:
            clock.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
        if is_late.is_set():
            raise BadInput(f"{failure}: there was no time left")
        if process.returncode:
            printed.seek(0)
            raise BadInput(f"{failure}: {reason(process.returncode, printed.read())}")


def reason(code: int, printed: str) -> str:
    r"""Why a process failed: the signal that ended it, or the last line that it printed.

    >>> reason(-9, ""), reason(1, "Traceback ...\nValueError: too wide")
    ('it was ended by SIGKILL', 'ValueError: too wide')
    """
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    lines = printed.strip().splitlines() or [f"it said nothing and ended with exit code {code}"]
    return lines[-1][:200]


def main() -> None:
    """Runs the job on stdin, and writes what it yields to stdout."""
    items = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what else is printed must not come between them
    job, args = pickle.load(sys.stdin.buffer)
    try:
        for item in job(*args):
            pickle.dump(item, items)
            items.flush()
    except BadInput as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
