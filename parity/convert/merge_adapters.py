"""Merges LoRA adapters into their kernels as these are read: W + scale * B A.

Without JAX, which takes a second to load.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from lechat_jax.formats.layouts import from_format, to_format
from lechat_jax.formats.names import rows
from lechat_jax.formats.source import Source, format_of
from lechat_jax.formats.stores import Stored
from lechat_jax.quantize.scheme import Form, in_parts, numbers_of


class Product(NamedTuple):
    """What an adapter adds to a kernel: scale * b a.

    Attributes:
        a: [r, *reads], in lechat's shapes.
        b: [*writes, r].
        scale: alpha / r.
    """

    a: Float[np.ndarray, "..."]
    b: Float[np.ndarray, "..."]
    scale: float


def merged(kernel: Shaped[np.ndarray, "..."], added: Product) -> Float[np.ndarray, "..."]:
    """The merged kernel, W + scale * B A, in at least float32.

    >>> a, b = np.array([[1.0, 0.0]]), np.array([[1.0], [3.0]])
    >>> merged(np.ones((2, 2)), Product(a, b, scale=2.0)).tolist()
    [[3.0, 1.0], [7.0, 1.0]]
    """
    rank = len(added.a)
    wide = np.promote_types(np.float32, added.a.dtype)
    a, b = added.a.reshape(rank, -1).astype(wide), added.b.reshape(-1, rank).astype(wide)
    whole = b @ (wide.type(added.scale) * a)
    whole += kernel.reshape(math.prod(added.b.shape[:-1]), -1)
    return whole.reshape(kernel.shape)


def with_adapters(
    source: Source,
    products: Mapping[str, Product | Shaped[np.ndarray, "..."]],
    dtype: np.dtype | None = None,
) -> Source:
    """A checkpoint with adapters merged into its kernels, and the projector that they learned with.

    A kernel is merged when it is read, in float32, rounded once, and is the only one in memory.

    Args:
        source: the checkpoint, whose format the tensors keep.
        products: by the kernel's name; or by that of a weight what stands in its place.
        dtype: of the merged kernels; by default what they had.
    """
    config, fmt = source.config, format_of(source.format)
    table = rows(config)

    def whole(name: str, one: Stored) -> Stored:
        if name not in products:
            return one
        target, row = one.dtype if dtype is None else dtype, table[name]

        def read() -> Shaped[np.ndarray, "..."]:
            kernel = products[name]
            if isinstance(kernel, Product):
                kernel = merged(from_format(one.read(), config, fmt, row), kernel)
            with np.errstate(over="ignore"):  # it becomes infinite, which the caller may refuse
                return to_format(kernel.astype(target), config, fmt, row)

        where = f"{one.where}, merged with its adapter,"
        return dataclasses.replace(one, dtype=target, where=where, read=read, parts=None)

    stored = {name: whole(name, one) for name, one in source.stored.items()}
    store = dataclasses.replace(source.store, form=None)
    return dataclasses.replace(source, stored=stored, store=store)


def rounded(stored: Mapping[str, Stored], form: Form) -> dict[str, Stored]:
    """Kernels, by lechat's names, that are quantised and dequantised again when they are read."""

    def whole(name: str, one: Stored) -> Stored:
        def read() -> Shaped[np.ndarray, "..."]:
            parts = in_parts(form, name, one.read(), one.where)
            return numbers_of(name, parts, one.shape).astype(one.dtype)

        return dataclasses.replace(one, read=read) if form.format_of(name) else one

    return {name: whole(name, one) for name, one in stored.items()}
