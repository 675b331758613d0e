"""An existing conversion on trial: are these the same numbers?

What a forward pass can show of one wrong bit in seven billion weights drowns in its
rounding, so the weights themselves are compared as well.
"""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Shaped

from lechat_jax.errors import BadInput
from parity.compare import relative
from parity.sources import Source
from parity.verdict import Stage

Say = Callable[[str, int, int], None]


def same_weights(ours: Source, theirs: Source, say: Say) -> Iterator[Stage]:
    """A stage for every weight of `ours` that is another number than in `theirs`.

    Where they are stored in different types, `theirs` is rounded to that of `ours` first, as
    a conversion would have done. Budgets are 0; a weight that is the same makes no stage.

    Raises:
        BadInput: the models have other weights or other shapes.
    """
    if different := set(ours.names) ^ set(theirs.names):
        raise BadInput(
            f"{ours.path} and {theirs.path} are of different models: only one has "
            f"{', '.join(sorted(different)[:4])}"
        )
    names = ours.names
    for done, name in enumerate(names):
        say("weights", done, len(names))
        a, b = ours.read(name), theirs.read(name)
        if a.shape != b.shape:
            raise BadInput(f"{ours.where(name)} is {a.shape} and {theirs.where(name)} {b.shape}")
        if (note := _difference(a, b)) is not None:
            error = relative(a.astype(np.float64), b.astype(np.float64))
            stage, layer = _place(name)
            yield Stage(
                stage,
                layer,
                a.dtype.name,
                ("jax", "torch"),
                error if error > 0 else float("inf"),  # differs in a bit that is no number's
                0.0,
                note=f"{name}: {note}",
            )
        ours.release()
        theirs.release()
    say("weights", len(names), len(names))


def _difference(a: Shaped[np.ndarray, "..."], b: Shaped[np.ndarray, "..."]) -> str | None:
    """How many weights differ and where the first is, or None; a row at a time."""
    n, first = 0, None
    for row in range(len(a)):
        x, y = a[row], b[row].astype(a.dtype)
        bits = f"u{a.dtype.itemsize}"
        unequal = np.ascontiguousarray(x).view(bits) != np.ascontiguousarray(y).view(bits)
        if unequal.any():
            n += int(np.count_nonzero(unequal))
            if first is None:
                first = [row, *map(int, np.argwhere(unequal)[0])]
    return None if first is None else f"{n:,} of {a.size:,} differ, the first at {first}"


def _place(name: str) -> tuple[str, int | None]:
    """The stage in which a weight is first used.

    >>> _place("blocks.3.mlp_norm.scale"), _place("head.kernel")
    (('mlp', 3), ('logits', None))
    """
    parts = name.split(".")
    if parts[0] == "blocks":
        return parts[2].removesuffix("_norm"), int(parts[1])
    return {"embed": "embed", "norm": "norm", "head": "logits"}[parts[0]], None
