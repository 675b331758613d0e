"""Weights as int8 with a scale for each output channel: a quarter of float32, half of bfloat16.

A kernel [*writes, *reads] becomes q = round(w / scale) in -127 .. 127, under its own name, and
scale = max |w| / 127 over the axes that it reads, under `<name>.scale`; w is about q * scale.
All kernels and both tables are quantised, norms are not: they are a ten-thousandth of a model.
Nor is the router of a mixture of experts, as small, in which rounding would send tokens astray.

Done by numpy, a few rows of a kernel at a time, since the source may be a map of a file that
is larger than the memory. JAX, which takes a second to load, is not needed to convert a model.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int8, Shaped
from numpy.typing import DTypeLike

from lechat_jax.errors import BadInput
from lechat_jax.host import host_empty

SCALE = ".scale"  # behind the name of a kernel, that of its scales
Format = Literal["int8"]
QUANTIZATION = "quantization"  # key of a config that names the format
LARGEST = 127  # so that the range is symmetric; -128 is left out
# Of a channel below this largest weight, 1e-36, the scale would be no normal number; XLA takes
# such for zero. The whole channel is zero then.
LEAST = np.float32(LARGEST * np.finfo(np.float32).tiny)
PIECE = 1 << 20  # weights in float32 at once; one core does 1e9 a second


class Quantized(NamedTuple):
    """A kernel in int8, and the scale of each of its output channels."""

    kernel: Int8[np.ndarray, "..."]
    scale: Float32[np.ndarray, "..."]


def is_kernel(name: str) -> bool:
    """Whether the weight of that name is one that is quantised.

    >>> is_kernel("blocks.0.attn.q.kernel"), is_kernel("embed.kernel")
    (True, True)
    >>> is_kernel("norm.scale"), is_kernel("blocks.0.mlp.router.kernel")
    (False, False)
    """
    return name.endswith(".kernel") and not name.endswith("router.kernel")


def is_scale(name: str) -> bool:
    """Whether this is the name of the scale of a kernel; a norm has another scale.

    >>> is_scale("embed.kernel.scale"), is_scale("norm.scale")
    (True, False)
    """
    return name.endswith(f".kernel{SCALE}")


def scale_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The output axes of a kernel; of attention's output it reads the last two, N and H.

    >>> scale_shape("blocks.0.attn.q.kernel", (6, 8, 40))
    (6, 8)
    >>> scale_shape("blocks.0.attn.o.kernel", (40, 6, 8))
    (40,)
    """
    return shape[: -2 if name.endswith("attn.o.kernel") else -1]


def is_quantized(names: Iterable[str]) -> bool:
    """Whether there are scales of kernels among the names.

    >>> is_quantized(["embed.kernel", "norm.scale"]), is_quantized(["embed.kernel.scale"])
    (False, True)
    """
    return any(map(is_scale, names))


def quantized(
    name: str,
    kernel: Shaped[np.ndarray, "..."],
    where: object = "",
    release: Callable[[], None] = lambda: None,
) -> Quantized:
    """The kernel of that name in int8; `release` is called after each piece of it was read.

    >>> quantized("head.kernel", np.array([[-254.0, 100.0], [0, 0]]))
    Quantized(kernel=array([[-127,   50], [   0,    0]], dtype=int8),
        scale=array([2., 1.], dtype=float32))

    Raises:
        BadInput: a weight is not finite; `where`, the name by default, is named.
    """
    shape = scale_shape(name, kernel.shape)
    matrix = kernel.reshape(math.prod(shape), -1)
    q, scale = host_empty(matrix.shape, np.int8), np.empty(len(matrix), np.float32)
    for rows in _pieces(matrix):
        with np.errstate(over="ignore"):  # of float64; it becomes infinite
            piece = matrix[rows].astype(np.float32)
        top = np.maximum(piece.max(axis=1), -piece.min(axis=1))
        if not np.isfinite(top).all():
            raise BadInput(
                f"{where or name} is not finite, so it has no int8 form; its file is damaged or "
                "the training diverged, start from another"
            )
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
    """The kernel that the scales make of int8, rounded once to `dtype`.

    >>> dequantize(np.array([[-127, 50]], np.int8), np.array([2], np.float32))
    array([[-254.,  100.]], dtype=float32)
    """
    matrix, factors = kernel.reshape(scale.size, -1), scale.reshape(-1, 1)
    out = np.empty(matrix.shape, np.dtype(dtype))
    for rows in _pieces(matrix):
        out[rows] = matrix[rows] * factors[rows]
    return out.reshape(kernel.shape)


def quantize_weights(weights: dict[str, Any]) -> dict[str, Any]:
    """A model's `Weights` in int8, on the default device; the dict given is emptied.

    So that there are never two models in memory: each kernel is let go as soon as it has been
    quantised, unless somebody else holds it.

    Raises:
        BadInput: a weight is not finite; it is named.
    """
    import jax

    found = {}
    for name in list(weights):
        leaf = weights.pop(name)
        if is_kernel(name):
            kernel, scale = quantized(name, np.asarray(leaf))
            found[name], found[name + SCALE] = jax.block_until_ready(
                jax.device_put((kernel, scale))
            )
        else:
            found[name] = leaf
        del leaf
    return found


def check_format(quantize: str | None) -> None:
    """Nothing, for a way to quantise that is known, or none.

    Raises:
        BadInput: it is another.
    """
    if quantize not in (None, "int8"):
        raise BadInput(
            f"weights are quantised to int8 here, not to {quantize}; leave it out or say int8"
        )


def pop_format(fields: dict[str, Any], path: Path) -> Format | None:
    """What `quantization` says in a config read from `path`, out of which it is taken.

    >>> fields = {"dim": 40, "quantization": {"format": "int8"}}
    >>> pop_format(fields, Path("config.json")), fields
    ('int8', {'dim': 40})

    Raises:
        BadInput: a format that is not known.
    """
    quantization = fields.pop(QUANTIZATION, None)
    if quantization is None:
        return None
    if quantization != {"format": "int8"}:
        raise BadInput(
            f"{path} says {QUANTIZATION} {json.dumps(quantization)}, and only "
            f'{{"format": "int8"}} is known here; convert the model from its original'
        )
    return "int8"


def _pieces(matrix: Shaped[np.ndarray, "F D"]) -> Iterator[slice]:
    """As many rows at a time as make a piece."""
    n = max(1, PIECE // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), n):
        yield slice(start, start + n)
