"""Weights of NVFP4 as compressed-tensors stores them: w = code * scale / global scale.

A code is an E2M1 number, a sign, two bits of exponent and one of mantissa, and two are in a byte of
`weight_packed`, that of the even column in its low half. `weight_scale` is E4M3, one for 16 columns
of a row, and `weight_global_scale` is float32, one for the tensor, which divides.
"""

import dataclasses

import numpy as np
from jaxtyping import Float32, Shaped

from lechat_jax.errors import BadInput
from lechat_jax.formats.quantized.fp8 import ACTIVATIONS, FP8, LEFT_OUT, float_type
from lechat_jax.formats.stores import Store, Stored

PACKED, SCALE, GLOBAL = ".weight_packed", ".weight_scale", ".weight_global_scale"
GROUP = 16  # columns that share a scale
HALF = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
NUMBERS = np.concatenate([HALF, -HALF])
BYTES = np.arange(256)
BOTH = np.stack([NUMBERS[BYTES % 16], NUMBERS[BYTES // 16]], axis=1)  # of a byte


def nvfp4_store(store: Store) -> Store:
    """Dequantises NVFP4 weights as they are read, into float32.

    As of FP8 ones, their type counts as that of the tensors which are not quantised.

    Raises:
        BadInput: a weight lacks a scale, or has one of another type or shape.
    """
    dtype, used = float_type(store), set[str]()
    tensors: dict[str, Stored] = {}
    for key, one in store.tensors.items():
        if key.endswith(PACKED):
            stem = key.removesuffix(PACKED)
            used |= {stem + SCALE, stem + GLOBAL}
            tensors[f"{stem}.weight"] = _whole(store, stem, one, dtype)
        elif not key.endswith(ACTIVATIONS):
            tensors[key] = one
    notes = store.notes
    if any(key.endswith(ACTIVATIONS) for key in store.tensors):
        notes += (LEFT_OUT,)
    tensors = {key: one for key, one in tensors.items() if key not in used}
    return dataclasses.replace(store, tensors=tensors, notes=notes)


def numbers(
    packed: Shaped[np.ndarray, "F _bytes"],
    scale: Shaped[np.ndarray, "F _groups"],
    global_scale: Shaped[np.ndarray, "..."],
) -> Float32[np.ndarray, "F D"]:
    """The numbers that bytes and scales stand for, in float32.

    >>> packed, scale = np.array([[0x21, 0xF0, *[0] * 6]], np.uint8), np.array([[8.0]], FP8)
    >>> numbers(packed, scale, np.array([2.0], np.float32))[:, :5]
    array([[  2.,   4.,   0., -24.,   0.]], dtype=float32)
    """
    F, D = packed.shape[0], 2 * packed.shape[1]
    out = BOTH[packed].reshape(F, D // GROUP, GROUP)
    out *= (scale.astype(np.float32) / global_scale.astype(np.float32).reshape(()))[..., None]
    return out.reshape(F, D)


def _whole(store: Store, stem: str, packed: Stored, dtype: np.dtype) -> Stored:
    """The weight that these bytes and the scales beside them stand for."""
    if packed.dtype != np.uint8 or len(packed.shape) != 2 or 2 * packed.shape[1] % GROUP:
        raise BadInput(
            f"{packed.where} is {packed.dtype} {list(packed.shape)}, and not two codes in a byte, "
            f"in whole groups of {GROUP}"
        )
    F, D = packed.shape[0], 2 * packed.shape[1]
    wanted = {SCALE: (FP8, [(F, D // GROUP)]), GLOBAL: (np.dtype(np.float32), [(1,), ()])}
    for suffix, (its_dtype, shapes) in wanted.items():
        part = store.tensors.get(stem + suffix)
        if part is None or part.dtype != its_dtype or part.shape not in shapes:
            found = f"{part.dtype} {list(part.shape)}" if part else "not there"
            raise BadInput(
                f"{packed.where} has a {suffix[1:]} that is {found} instead of {its_dtype} "
                f"{list(shapes[0])}; download the model again"
            )
    scale, whole = store.tensors[stem + SCALE], store.tensors[stem + GLOBAL]
    return dataclasses.replace(
        packed,
        dtype=dtype,
        shape=(F, D),
        read=lambda: numbers(packed.read(), scale.read(), whole.read()),
    )
