"""Per-channel int8 quantization: symmetric, one scale per output channel (a quarter of float32).

A kernel [*writes, *reads] becomes q = round(w / scale) in -127 .. 127, and scale = max |w| / 127
over the axes that it reads (absmax); w is about q * scale.

Computed by numpy, a few rows of a kernel at a time, since the source may be a memory map of a
file larger than memory.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int8, Shaped
from numpy.typing import DTypeLike

from lechat_jax.config.layout import n_reads
from lechat_jax.errors import BadInput

LARGEST = 127  # so that the range is symmetric; -128 is left out
# Of a channel below this largest weight, 1e-36, the scale would be no normal number; XLA takes
# such for zero. The whole channel is zero then.
LEAST = np.float32(LARGEST * np.finfo(np.float32).tiny)
PIECE = 1 << 20  # weights in float32 at once; one core does 1e9 a second


class Quantized(NamedTuple):
    """A per-channel int8 kernel and the scale of each output channel."""

    kernel: Int8[np.ndarray, "..."]
    scale: Float32[np.ndarray, "..."]


def scale_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a kernel's int8 scales: its output axes.

    >>> scale_shape("blocks.0.attn.q.kernel", (6, 8, 40))
    (6, 8)
    >>> scale_shape("blocks.0.attn.o.kernel", (40, 6, 8))
    (40,)
    """
    return shape[: -n_reads(name)]


def quantized(
    name: str,
    kernel: Shaped[np.ndarray, "..."],
    where: object = "",
    release: Callable[[], None] = lambda: None,
) -> Quantized:
    """Quantizes a kernel to per-channel int8; `release` is called after each piece that was read.

    >>> quantized("head.kernel", np.array([[-254.0, 100.0], [0, 0]]))
    Quantized(kernel=array([[-127,   50], [   0,    0]], dtype=int8),
        scale=array([2., 1.], dtype=float32))

    Raises:
        BadInput: a weight is not finite; `where`, the name by default, is named.
    """
    shape = scale_shape(name, kernel.shape)
    matrix = kernel.reshape(math.prod(shape), -1)
    q, scale = np.empty(matrix.shape, np.int8), np.empty(len(matrix), np.float32)
    for rows in pieces(matrix):
        piece = wide_piece(matrix[rows])
        top = np.maximum(piece.max(axis=1), -piece.min(axis=1))
        check_finite(top, where or name, "int8")
        is_zero = top < LEAST
        scale[rows] = np.where(is_zero, 1, top / LARGEST)
        piece /= scale[rows, None]
        np.rint(piece, out=piece)
        np.copyto(q[rows], piece, casting="unsafe")
        release()
    return Quantized(q.reshape(kernel.shape), scale.reshape(shape))


def dequantize(
    kernel: Int8[np.ndarray, "..."],
    scale: Float32[np.ndarray, "..."],
    dtype: DTypeLike = np.float32,
) -> Shaped[np.ndarray, "..."]:
    """Dequantizes an int8 kernel, rounded once to `dtype`.

    >>> dequantize(np.array([[-127, 50]], np.int8), np.array([2], np.float32))
    array([[-254.,  100.]], dtype=float32)
    """
    matrix, factors = kernel.reshape(scale.size, -1), scale.reshape(-1, 1)
    out = np.empty(matrix.shape, np.dtype(dtype))
    for rows in pieces(matrix):
        out[rows] = matrix[rows] * factors[rows]
    return out.reshape(kernel.shape)


def pieces(matrix: Shaped[np.ndarray, "F D"]) -> Iterator[slice]:
    """Slices of rows, each of about `PIECE` numbers."""
    n = max(1, PIECE // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), n):
        yield slice(start, start + n)


def wide_piece(piece: Shaped[np.ndarray, "F D"]) -> Float32[np.ndarray, "F D"]:
    """A float32 copy; a number out of range becomes infinite."""
    with np.errstate(over="ignore"):
        return piece.astype(np.float32)


def check_finite(extremes: Shaped[np.ndarray, "..."], where: object, form: str) -> None:
    """Raises `BadInput` if the extremes of a kernel show a weight that is not finite."""
    if not np.isfinite(extremes).all():
        raise BadInput(
            f"{where} is not finite, so it has no {form} form; its file is damaged or "
            "the training diverged, start from another"
        )
