"""Bitwise comparison of two checkpoints' weights.

What a forward pass can show of one wrong bit in seven billion weights drowns in its
rounding, so the weights themselves are compared as well.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Shaped

from lechat_jax.config.layout import (
    is_tower,
    is_vision,
    layer_of,
    module_of,
    stacked,
    vision_layer_of,
)
from lechat_jax.errors import BadInput
from lechat_jax.formats.source import Source
from lechat_jax.formats.stores import Stored
from parity.check.tolerances import relative
from parity.check.verdict import Stage

Say = Callable[[str, int, int], None]
SLAB = 16 << 20  # bytes of a weight that are compared at once


def rounded_as(theirs: Source, ours: Source) -> Source:
    """`theirs` with each weight rounded to the type that `ours` stores it in.

    That is what a conversion to another type does on purpose; all else is a difference.

    Raises:
        BadInput: the models have other weights.
    """
    if different := set(ours.names) ^ set(theirs.names):
        raise BadInput(
            f"{ours.path} and {theirs.path} are of different models: only one has "
            f"{', '.join(sorted(different)[:4])}"
        )

    def rounded(name: str, tensor: Stored) -> Stored:
        dtype = ours.stored_of(name).dtype
        if tensor.dtype == dtype:
            return tensor
        return dataclasses.replace(tensor, dtype=dtype, read=lambda: tensor.read().astype(dtype))

    stored = {name: rounded(name, tensor) for name, tensor in theirs.stored.items()}
    return dataclasses.replace(theirs, stored=stored)


def same_weights(ours: Source, theirs: Source, say: Say) -> Iterator[Stage]:
    """Compares every weight of `ours` with that of `theirs`, bit for bit.

    Raises:
        BadInput: a weight has another shape.
    """
    for done, name in enumerate(ours.names):
        say("weights", done, len(ours.names))
        a, b = ours.read(name), theirs.read(name)
        if a.shape != b.shape:
            raise BadInput(f"{ours.where(name)} is {a.shape} and {theirs.where(name)} {b.shape}")
        stage, layer = _place(name)
        pair, error, note = ("jax", "torch"), 0.0, _difference(a, b)
        if note:
            error = relative(a.astype(np.float64), b.astype(np.float64))
            error = error if error > 0 else float("inf")  # differs in a bit that is no number's
        yield Stage(
            stage, layer, a.dtype.name, pair, error, 0.0, note=f"{name}: {note}" if note else name
        )
        ours.release()
        theirs.release()
    say("weights", len(ours.names), len(ours.names))


def _difference(a: Shaped[np.ndarray, "..."], b: Shaped[np.ndarray, "..."]) -> str:
    """Number of weights that differ in a bit and the first of them; empty if none does."""
    n, first = 0, None
    bits = f"u{a.dtype.itemsize}"
    rows = max(1, SLAB * len(a) // max(1, a.nbytes))
    for start in range(0, len(a), rows):
        x, y = (np.ascontiguousarray(leaf[start : start + rows]).view(bits) for leaf in (a, b))
        if np.array_equal(x, y):
            continue
        unequal = x != y
        n += int(np.count_nonzero(unequal))
        if first is None:
            row, *rest = map(int, np.argwhere(unequal)[0])
            first = [start + row, *rest]
    return "" if first is None else f"{n:,} of {a.size:,} differ, the first at {first}"


def _place(name: str) -> tuple[str, int | None]:
    """Stage and layer in which a weight is first used.

    >>> _place("blocks.3.mlp_norm.scale"), _place("head.kernel")
    (('mlp', 3), ('logits', None))
    >>> _place("vision.blocks.3.attn.q.kernel"), _place("vision.norm.scale")
    (('vision', 3), ('patches', None))
    """
    if (layer := vision_layer_of(name)) is not None:
        return "vision", layer
    if is_vision(name):
        return "patches" if is_tower(name) else "projector", None
    stage = module_of(stacked(name)).split(".")[:2][-1]
    stages = {"head": "logits", "attn_norm": "attn", "mlp_norm": "mlp"}
    return stages.get(stage, stage), layer_of(name)
