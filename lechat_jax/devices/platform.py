"""Platform that programs are traced for: that of JAX's default backend, or another to compile for.

What is fastest differs by platform, so the choice is made while a program is traced, and asks here.
Ahead-of-time compilation for a TPU or a GPU on a machine without one says so with `compiling_for`.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal

import jax

Platform = Literal["cpu", "gpu", "tpu"]
_OTHER: contextvars.ContextVar[Platform | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
    """The platform that a program traced now will run on: cpu, gpu or tpu."""
    return _OTHER.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(other: Platform) -> Iterator[None]:
    """A context in which programs are traced for another platform than that of this machine.

    JAX's caches of traced functions do not know of it, so they are emptied before and after.

    >>> with compiling_for("tpu"):
    ...     platform()
    'tpu'
    """
    jax.clear_caches()
    token = _OTHER.set(other)
    try:
        yield
    finally:
        _OTHER.reset(token)
        jax.clear_caches()
