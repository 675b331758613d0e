"""Weights of one byte with scales, FP8 or int8, as others store them: w = byte * scale.

A scale is for a whole tensor, for a row, or for a block of rows and columns, and lies beside the
weight: `weight_scale_inv` or `weight_scale` in Hugging Face's files (also the former multiplies),
`qscale_weight` in Mistral's own.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Shaped

from lechat_jax.errors import BadInput
from lechat_jax.formats.stores import Store, Stored

WEIGHT = ".weight"
SCALES = (".weight_scale_inv", ".weight_scale", ".qscale_weight")
# Of activations, keys and values among them, for programs that compute with those in FP8.
ACTIVATIONS = (".activation_scale", ".input_scale", ".qscale_act", ".k_scale", ".v_scale")
ACTIVATIONS += (".input_global_scale",)
LEFT_OUT = "its scales of activations are left out: activations are floats here"
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
NUMBERS = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)  # five times a cast's speed
PIECE = 1 << 20  # weights that are made at once


class Block(NamedTuple):
    """The rows and columns that share a scale; `None` is all there are."""

    rows: int | None
    columns: int | None


def scaled_store(store: Store, block: Block | None) -> Store:
    """Dequantises FP8 and int8 weights as they are read, into float32.

    They count as of the type of the tensors that are no bytes, bfloat16 in every release, so
    that is what they are written as.

    Args:
        store: of the files.
        block: that has a scale, where there is more than one for a tensor or a row.

    Raises:
        BadInput: a weight has no scale beside it, or one of a shape that does not fit.
    """
    coded = {
        key: one
        for key, one in store.tensors.items()
        if key.endswith(WEIGHT) and one.dtype in (FP8, np.int8)
    }
    dtype = float_type(store)
    used = {key: _scale(store, key) for key in coded}
    left_out = set(used.values())

    def whole(key: str, one: Stored) -> Stored:
        scale = store.tensors[used[key]]
        fitting = _block(one, scale, block)

        def read() -> Float32[np.ndarray, "F D"]:
            return scaled(one.read(), scale.read(), fitting)

        return dataclasses.replace(one, dtype=dtype, read=read)

    tensors = {
        key: whole(key, one) if key in coded else one
        for key, one in store.tensors.items()
        if key not in left_out and not key.endswith(ACTIVATIONS)
    }
    notes = store.notes
    if any(key.endswith(ACTIVATIONS) for key in store.tensors):
        notes += (LEFT_OUT,)
    return dataclasses.replace(store, tensors=tensors, notes=notes)


def scaled(
    weight: Shaped[np.ndarray, "F D"], scale: Shaped[np.ndarray, "..."], block: Block
) -> Float32[np.ndarray, "F D"]:
    """Each byte's number times the scale of its block, in float32.

    >>> weight = np.array([[1.5, -2.0, 448.0]], FP8)
    >>> scaled(weight, np.array([[2.0, 0.5]], np.float32), Block(128, 2))
    array([[  3.,  -4., 224.]], dtype=float32)
    """
    F, D = weight.shape
    rows, columns = block.rows or F, block.columns or D
    factors = scale.astype(np.float32).reshape(-(-F // rows), -(-D // columns))
    out = np.empty((F, D), np.float32)
    for part in _parts(F, D):
        of_rows = factors[np.arange(part.start, part.stop) // rows]
        piece = weight[part]
        numbers = NUMBERS[piece.view(np.uint8)] if weight.dtype == FP8 else piece
        np.multiply(numbers, np.repeat(of_rows, columns, axis=1)[:, :D], out=out[part])
    return out


def float_type(store: Store) -> np.dtype:
    """The type of the tensors that are not quantised: norms and, mostly, the embedding."""
    floats = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32))
    plain = (
        one.dtype
        for key, one in store.tensors.items()
        if key.endswith(WEIGHT) and one.dtype in floats
    )
    return next(plain, floats[0])


def _parts(F: int, D: int) -> Iterator[slice]:
    n = max(1, PIECE // max(1, D))
    for start in range(0, F, n):
        yield slice(start, min(F, start + n))


def _scale(store: Store, key: str) -> str:
    """The key of the scale of a weight."""
    stem = key.removesuffix(WEIGHT)
    if found := [stem + suffix for suffix in SCALES if stem + suffix in store.tensors]:
        return found[0]
    one = store.tensors[key]
    raise BadInput(
        f"{one.where} is {one.dtype} and none of {', '.join(stem + s for s in SCALES)} is there; "
        "download the model again"
    )


def _block(weight: Stored, scale: Stored, block: Block | None) -> Block:
    """What of the weight each of its scales is for."""
    F, D = weight.shape
    choices = [Block(None, None), Block(1, None), *([block] if block else [])]
    for rows, columns in choices:
        wanted = (-(-F // (rows or F)), -(-D // (columns or D)))
        # The column of a row's scales may go unsaid, and both axes of a single one.
        short = (wanted[:1], ()) if wanted == (1, 1) else (wanted[:1],) if columns is None else ()
        if scale.shape == wanted or scale.shape in short:
            return Block(rows, columns)
    raise BadInput(
        f"{scale.where} has the shape {list(scale.shape)}, which is neither one scale nor one "
        f"for each row {f'nor one for each block of {list(block)} ' if block else ''}"
        f"of {list(weight.shape)}; download the model again"
    )
