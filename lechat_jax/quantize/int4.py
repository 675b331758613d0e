"""Group-wise int4 quantization: 4-bit weights with a scale and zero point per group (an eighth).

A kernel [*writes, *reads] becomes q in 0 .. 15, in groups of input features, and w is about
(q - zero) * scale. Two neighbours share a byte, the first in its low nibble. GPTQ's integers fit
this format unchanged. With GPTQ's activation order (`desc_act`) the features of a group are not
neighbours; then the kernel has its features in that order, and `order` gives the index of each
in the model.

Computed by numpy, without JAX; see `int8`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Shaped, UInt8

from lechat_jax.quantize.int8 import check_finite, pieces, scale_shape, wide_piece

TOP = 15  # the largest number of four bits
LEAST = np.float32(TOP * np.finfo(np.float32).tiny)  # see int8


class Packed(NamedTuple):
    """A group-wise int4 kernel of F outputs and D input features.

    Attributes:
        kernel: two features a byte, [F, D / 2] or in the axes of the kernel.
        scale: scale of each output and group.
        zero: zero point (the q that stands for 0) of each output and group; 0 .. 16.
        order: the model's index of each of the kernel's features, per expert in a stack of E;
            `None` if the order is the same.
    """

    kernel: UInt8[np.ndarray, "..."]
    scale: Float32[np.ndarray, "..."]
    zero: UInt8[np.ndarray, "..."]
    order: Int32[np.ndarray, " D"] | Int32[np.ndarray, "E D"] | None = None


def pack(q: UInt8[np.ndarray, "F D"]) -> UInt8[np.ndarray, "F D/2"]:
    """Packs 4-bit numbers two a byte, the first in the low nibble.

    >>> [hex(byte) for byte in pack(np.array([[1, 2, 15, 0]], np.uint8))[0]]
    ['0x21', '0xf']
    """
    return q[:, 0::2] | (q[:, 1::2] << 4)


def unpack(kernel: UInt8[np.ndarray, "F half"]) -> UInt8[np.ndarray, "F D"]:
    """Unpacks 4-bit numbers, two a byte, to one a byte.

    >>> unpack(np.array([[0x21, 0x0f]], np.uint8)).tolist()
    [[1, 2, 15, 0]]
    """
    return np.stack([kernel & TOP, kernel >> 4], axis=-1).reshape(len(kernel), -1)


def packed(
    name: str,
    kernel: Shaped[np.ndarray, "..."],
    group: int,
    where: object = "",
    release: Callable[[], None] = lambda: None,
) -> Packed:
    """Quantizes a kernel to int4: round to nearest between each group's extremes (16 levels).

    Zero is one of the levels, so a pruned weight stays pruned.

    >>> found = packed("head.kernel", np.array([[-1.0, 2.0, 0.0, 0.0]]), group=2)
    >>> found.scale.tolist(), found.zero.tolist(), unpack(found.kernel).tolist()
    ([[0.20000000298023224, 1.0]], [[5, 0]], [[0, 15, 0, 0]])

    Raises:
        BadInput: a weight is not finite; `where`, the name by default, is named.
    """
    writes = scale_shape(name, kernel.shape)
    matrix = kernel.reshape(math.prod(writes), -1)
    F, D = matrix.shape
    bytes_ = np.empty((F, D // 2), np.uint8)
    scale, zero = np.empty((F, D // group), np.float32), np.empty((F, D // group), np.uint8)
    for rows in pieces(matrix):
        piece = wide_piece(matrix[rows]).reshape(-1, D // group, group)
        low, high = np.minimum(piece.min(axis=-1), 0), np.maximum(piece.max(axis=-1), 0)
        check_finite(high - low, where or name, "int4")
        is_zero = high - low < LEAST
        scale[rows] = np.where(is_zero, 1, (high - low) / TOP)
        zero[rows] = np.where(is_zero, 0, np.rint(-low / scale[rows]))
        piece /= scale[rows, :, None]
        np.rint(piece, out=piece)
        piece += zero[rows, :, None]
        q = np.clip(piece, 0, TOP).astype(np.uint8)
        bytes_[rows] = pack(q.reshape(-1, D))
        release()
    return Packed(
        bytes_.reshape(*kernel.shape[:-1], -1),
        scale.reshape(*writes, -1),
        zero.reshape(*writes, -1),
    )


def unpacked(form: Packed) -> Float32[np.ndarray, "F D"]:
    """Dequantizes an int4 kernel to float32, its features in the model's order.

    >>> scale, zero = np.array([[0.5]], np.float32), np.array([[8]], np.uint8)
    >>> unpacked(Packed(np.array([[0x10]], np.uint8), scale, zero, np.array([1, 0], np.int32)))
    array([[-3.5, -4. ]], dtype=float32)
    """
    groups = form.scale.shape[-1]
    scale, zero = form.scale.reshape(-1, groups, 1), form.zero.reshape(-1, groups, 1)
    matrix = form.kernel.reshape(len(scale), -1)
    out = np.empty((len(matrix), 2 * matrix.shape[1]), np.float32)
    D = out.shape[1]
    orders = [slice(None)] if form.order is None else form.order.reshape(-1, D)
    of_each = (np.split(part, len(orders)) for part in (out, matrix, scale, zero))
    for out_of_it, pairs, scale, zero, order in zip(*of_each, orders, strict=True):
        for rows in pieces(out_of_it):
            q = unpack(pairs[rows]).reshape(-1, groups, D // groups).astype(np.float32)
            out_of_it[rows, order] = ((q - zero[rows]) * scale[rows]).reshape(-1, D)
    return out
