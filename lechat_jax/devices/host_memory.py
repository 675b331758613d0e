"""Memory of the host: what JAX on a CPU takes as it is and reads at full speed, and its return."""

import ctypes
import math

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Shaped

ALIGNMENT = 64  # bytes; JAX copies host memory that does not start at a multiple


def host_empty(shape: tuple[int, ...], dtype: DTypeLike) -> Shaped[np.ndarray, "..."]:
    """An array for somebody to fill, which `jax.device_put` on a CPU will adopt without a copy.

    It lies in huge pages, for which numpy asks the system and XLA does not: decoding from them
    is a tenth faster, since a page of 4 kB ends what the processor reads ahead.
    """
    dtype = np.dtype(dtype)
    n = math.prod(shape) * dtype.itemsize
    room = np.empty(n + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + n].view(dtype).reshape(shape)


def give_back_memory() -> None:
    """Hands memory that was freed back to the system, which the allocator of glibc would keep."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
