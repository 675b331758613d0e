"""The layout of the weights: the name of each, its axes, and which of them it reads.

One letter, one size: V token ids, D model width, N query heads, K key-value heads, H head width,
F feed-forward width, E experts, L layers. A kernel has the axes that it writes first and those that
it reads last, so y[writes] = sum over [reads] of kernel[writes, reads] * x[reads]. What other
files have to know of a weight follows from this table: how it is split over devices, which of
its axes the optimiser and the scales of int8 reduce over, and how many weights a model has.
"""

import functools
import re
from typing import NamedTuple


class Axes(NamedTuple):
    """The axes of a weight, a letter each.

    Attributes:
        writes: of what it makes; experts are counted by their first letter.
        reads: of what it is multiplied with; none of what only scales.
    """

    writes: str
    reads: str = ""

    @property
    def letters(self) -> str:
        """All of them, in the order of the array."""
        return self.writes + self.reads


TABLES = {"embed.kernel": Axes("V", "D"), "norm.scale": Axes("D"), "head.kernel": Axes("V", "D")}
ATTENTION = {
    "q": Axes("NH", "D"),
    "k": Axes("KH", "D"),
    "v": Axes("KH", "D"),
    "o": Axes("D", "NH"),
}
FEED_FORWARD = {"gate": Axes("F", "D"), "up": Axes("F", "D"), "down": Axes("D", "F")}
MAPS = tuple(ATTENTION | FEED_FORWARD)  # of a layer, in the order in which they are used
BLOCK = {
    "attn_norm.scale": Axes("D"),
    "mlp_norm.scale": Axes("D"),
    **{f"attn.{name}.kernel": axes for name, axes in ATTENTION.items()},
    **{f"mlp.{name}.kernel": axes for name, axes in FEED_FORWARD.items()},
    "mlp.router.kernel": Axes("E", "D"),
    **{
        f"mlp.experts.{name}.kernel": Axes("E" + axes.writes, axes.reads)
        for name, axes in FEED_FORWARD.items()
    },
}

# Behind the name of a kernel: the parts of a quantised one; behind that of a map: its adapter's.
SCALE, ZERO, ORDER = ".scale", ".zero", ".order"
LORA_A, LORA_B, LORA_SCALE = ".lora.a", ".lora.b", ".lora.scale"


def axes_of(name: str) -> Axes | None:
    """The axes of a weight, or of the same weight of all layers in a stack; `None` of no weight.

    >>> axes_of("blocks.0.attn.o.kernel")
    Axes(writes='D', reads='NH')
    >>> axes_of("blocks.mlp.experts.up.kernel").letters
    'LEFD'
    """
    if name in TABLES:
        return TABLES[name]
    match = re.fullmatch(r"blocks\.(\d+\.)?(.+)", name)
    axes = BLOCK.get(match[2]) if match else None
    if match is None or axes is None:
        return None
    return axes if match[1] else Axes("L" + axes.writes, axes.reads)


def letters(name: str) -> str:
    """All axes of a weight; of what is none of the model's own, none.

    >>> letters("blocks.0.attn.q.kernel"), letters("blocks.attn.q.kernel"), letters("norm.scale")
    ('NHD', 'LNHD', 'D')
    """
    axes = axes_of(name)
    return axes.letters if axes else ""


def n_reads(name: str) -> int:
    """How many of the last axes of a kernel are read.

    >>> n_reads("blocks.0.attn.q.kernel"), n_reads("blocks.0.attn.o.kernel")
    (1, 2)
    """
    axes = axes_of(name)
    return len(axes.reads) if axes else 1


@functools.lru_cache(maxsize=8)
def weights(n_layers: int, is_mixture: bool, tied_embeddings: bool) -> dict[str, Axes]:
    """Every weight of such a model, by name; shared, and not to be changed.

    >>> list(weights(1, is_mixture=False, tied_embeddings=True))[:3]
    ['embed.kernel', 'blocks.0.attn_norm.scale', 'blocks.0.mlp_norm.scale']
    """
    block = {name: axes for name, axes in BLOCK.items() if _is_there(name, is_mixture)}
    found = {"embed.kernel": TABLES["embed.kernel"]}
    for i in range(n_layers):
        found |= {f"blocks.{i}.{name}": axes for name, axes in block.items()}
    found["norm.scale"] = TABLES["norm.scale"]
    return found if tied_embeddings else found | {"head.kernel": TABLES["head.kernel"]}


def _is_there(name: str, is_mixture: bool) -> bool:
    if not name.startswith("mlp."):
        return True
    return is_mixture == name.startswith(("mlp.router", "mlp.experts"))


def is_expert(name: str) -> bool:
    """Whether a weight is of the experts of a layer, each of which is a map of its own."""
    return ".experts." in name


def is_kernel(name: str) -> bool:
    """Whether a weight is one that is quantised: a kernel, and not a router's.

    >>> is_kernel("blocks.0.attn.q.kernel"), is_kernel("embed.kernel")
    (True, True)
    >>> is_kernel("norm.scale"), is_kernel("blocks.0.mlp.router.kernel")
    (False, False)
    """
    return name.endswith(".kernel") and not name.endswith("router.kernel")


def is_norm(name: str) -> bool:
    """Whether a weight is the scale of a norm, and not that of a quantised kernel or an adapter.

    >>> is_norm("norm.scale"), is_norm("blocks.3.attn_norm.scale"), is_norm("embed.kernel.scale")
    (True, True, False)
    """
    return name.endswith("norm.scale")


def is_scale(name: str) -> bool:
    """Whether this is the name of the scale of a quantised kernel; a norm has another scale.

    >>> is_scale("embed.kernel.scale"), is_scale("norm.scale")
    (True, False)
    """
    return name.endswith(f".kernel{SCALE}")


def is_part(name: str) -> bool:
    """Whether this is the name of what belongs to a quantised kernel, beside its numbers.

    >>> is_part("embed.kernel.scale"), is_part("norm.scale"), is_part("head.kernel")
    (True, False, False)
    """
    return name.endswith(tuple(f".kernel{part}" for part in (SCALE, ZERO, ORDER)))


def is_adapter(name: str) -> bool:
    """Whether this is the name of a part of an adapter.

    >>> is_adapter("blocks.0.attn.q.lora.scale"), is_adapter("norm.scale")
    (True, False)
    """
    return name.endswith((LORA_A, LORA_B, LORA_SCALE))
