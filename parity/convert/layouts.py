"""The same weight in the shape and row order of each format; bytes move, none changes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from lechat_jax.config import MistralConfig
from parity.convert.names import Format, Tensor, parts, rows, shape


def to_format(
    array: Shaped[np.ndarray, "..."], config: MistralConfig, fmt: Format, row: Tensor
) -> Shaped[np.ndarray, "..."]:
    """A weight of lechat's as a format has it: a view, but for rows that change their order."""
    if fmt == "mistral" and row.rotary:
        array = _neighbours(array)
    return array.reshape(shape(config, fmt, row.axes))


def from_format(
    array: Shaped[np.ndarray, "..."], config: MistralConfig, fmt: Format, row: Tensor
) -> Shaped[np.ndarray, "..."]:
    """A weight of a format's as lechat has it: a view, but for rows that change their order."""
    array = array.reshape(shape(config, "lechat", row.axes))
    return _halves(array) if fmt == "mistral" and row.rotary else array


def taken_apart(config: MistralConfig, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of lechat's weights: of those of experts, each expert's own, which is a view."""
    return {
        part: weights[row.lechat] if row.expert is None else weights[row.lechat][row.expert]
        for part, row in rows(config).items()
    }


def put_together(
    config: MistralConfig, found: Mapping[str, Shaped[np.ndarray, "..."]]
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Lechat's weights of parts in its shapes; those of experts are copied."""
    return {
        name: found[name] if of == [name] else np.stack([found[part] for part in of])
        for name, of in parts(config).items()
    }


def _halves(array: Shaped[np.ndarray, "N H D"]) -> Shaped[np.ndarray, "N H D"]:
    """The two lanes of each rotated pair half a head apart, that were neighbours.

    >>> _halves(np.arange(6).reshape(1, 6, 1)).ravel().tolist()
    [0, 2, 4, 1, 3, 5]
    """
    N, H, D = array.shape
    return array.reshape(N, H // 2, 2, D).swapaxes(1, 2).reshape(N, H, D)


def _neighbours(array: Shaped[np.ndarray, "N H D"]) -> Shaped[np.ndarray, "N H D"]:
    """The two lanes of each rotated pair side by side, that were half a head apart.

    >>> _neighbours(np.array([0, 2, 4, 1, 3, 5]).reshape(1, 6, 1)).ravel().tolist()
    [0, 1, 2, 3, 4, 5]
    """
    N, H, D = array.shape
    return array.reshape(N, 2, H // 2, D).swapaxes(1, 2).reshape(N, H, D)
