"""Reshapes weights between formats: heads split or joined, RoPE's rows reordered, experts stacked.

Bytes move, and none changes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from lechat_jax.config import MistralConfig
from lechat_jax.formats.names import INTERLEAVED, Format, Tensor, parts, rows, shape


def to_format(
    array: Shaped[np.ndarray, "..."], config: MistralConfig, fmt: Format, row: Tensor
) -> Shaped[np.ndarray, "..."]:
    """Lechat's weight in the shape and row order of a format; a view, unless rows are reordered."""
    if fmt in INTERLEAVED and row.rotary:
        array = _neighbours(array)
    return array.reshape(shape(config, fmt, row))


def from_format(
    array: Shaped[np.ndarray, "..."], config: MistralConfig, fmt: Format, row: Tensor
) -> Shaped[np.ndarray, "..."]:
    """A format's weight in lechat's shape and row order; a view, unless rows are reordered."""
    array = array.reshape(shape(config, "lechat", row))
    return _halves(array) if fmt in INTERLEAVED and row.rotary else array


def unstacked(config: MistralConfig, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Unstacks the experts: every part of lechat's weights by its name, all of them views."""
    return {
        part: weights[row.lechat] if row.expert is None else weights[row.lechat][row.expert]
        for part, row in rows(config).items()
    }


def stacked_experts(
    config: MistralConfig, found: Mapping[str, Shaped[np.ndarray, "..."]]
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Stacks the experts, which copies them: the inverse of `unstacked`."""
    return {
        name: found[name] if of == (name,) else np.stack([found[part] for part in of])
        for name, of in parts(config).items()
    }


def _halves(array: Shaped[np.ndarray, "N H D"]) -> Shaped[np.ndarray, "N H D"]:
    """RoPE's pairs from interleaved rows (2h, 2h + 1) to half-split ones (h, h + H/2).

    >>> _halves(np.arange(6).reshape(1, 6, 1)).ravel().tolist()
    [0, 2, 4, 1, 3, 5]
    """
    N, H, D = array.shape
    return array.reshape(N, H // 2, 2, D).swapaxes(1, 2).reshape(N, H, D)


def _neighbours(array: Shaped[np.ndarray, "N H D"]) -> Shaped[np.ndarray, "N H D"]:
    """RoPE's pairs from half-split rows (h, h + H/2) to interleaved ones (2h, 2h + 1).

    >>> _neighbours(np.array([0, 2, 4, 1, 3, 5]).reshape(1, 6, 1)).ravel().tolist()
    [0, 1, 2, 3, 4, 5]
    """
    N, H, D = array.shape
    return array.reshape(N, 2, H // 2, D).swapaxes(1, 2).reshape(N, H, D)
