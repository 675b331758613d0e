"""Layouts of quantised weights that a device multiplies as they lie, made when they are loaded."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lechat_jax.config.layout import SCALE, ZERO, is_expert
from lechat_jax.devices.platform import platform
from lechat_jax.ops.matmul_int4 import ByGroups, by_groups


def for_device(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights in the forms that a TPU multiplies as they lie; the dict passed in is emptied there.

    Int4 kernels become `by_groups`, and those of int8 matrices, since merging the last axes of a
    tiled array is a copy. So there is never more than one kernel in both forms. Weights may be
    `jax.ShapeDtypeStruct`s. Experts stay as they are stored: a grouped matmul dequantizes them.
    """
    if platform() != "tpu":
        return weights
    found: dict[str, Any] = {}
    for name in [name for name in weights if name + SCALE in weights and not is_expert(name)]:
        parts = {
            part: weights.pop(part) for part in (name, name + SCALE, name + ZERO) if part in weights
        }
        if parts[name].dtype in (jnp.uint8, jnp.int8):  # not in that form already
            is_described = isinstance(parts[name], jax.ShapeDtypeStruct)
            make = jax.eval_shape if is_described else lambda form, *of: jax.jit(form)(*of)
            made = make(_as_groups if len(parts) == 3 else _as_matrix, *parts.values())
            parts = dict(zip(parts, made, strict=True))
        found |= parts
    return found | weights


def _as_groups(kernel: Array, scale: Array, zero: Array) -> ByGroups:
    scale, zero = (part.reshape(-1, part.shape[-1]) for part in (scale, zero))
    return by_groups(kernel.reshape(len(scale), -1), scale, zero)


def _as_matrix(kernel: Array, scale: Array) -> tuple[Array, Array]:
    return kernel.reshape(scale.size, -1), scale
