"""How a fault is planted in lechat_jax, for as long as a context lasts."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal
from unittest import mock

import jax
import numpy as np

from lechat_jax.config import MistralConfig
from parity.check.probes import Model

Weights = dict[str, np.ndarray]
Change = Callable[[MistralConfig, Weights, int], Weights]
Needs = Callable[[MistralConfig], object]
Plant = Callable[[Model, int], contextlib.AbstractContextManager[Model]]


@dataclasses.dataclass(frozen=True)
class Planted:
    """A fault that can be planted.

    Attributes:
        name: what is wrong, in words that complete "as if ...".
        where: what it changes.
        expected: the stage at which it first shows, such as `attn.0`.
        plant: a context in which a model is faulty; the number is the layer that gets it,
            where the fault is one layer's.
        layer: which layer that is when nobody says.
        base: what the model must be changed to, right, for the fault to be possible.
        dtype: the arithmetic in which it shows.
        needs: whether a model of that shape can have it.
    """

    name: str
    where: Literal["weights", "config", "code"]
    expected: str
    plant: Plant
    layer: int = 0
    base: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: Literal["float64", "bfloat16"] = "float64"
    needs: Needs = lambda _: True

    def is_possible(self, config: MistralConfig) -> bool:
        """Whether a model of that shape has a place for it."""
        return self.layer < config.n_layers and bool(self.needs(config))


def in_weights(
    name: str,
    expected: str,
    change: Change,
    *,
    layer: int = 0,
    base: dict[str, Any] | None = None,
    needs: Needs = lambda _: True,
) -> Planted:
    """A fault of conversion: `change` gives the weights that are wrong."""

    @contextlib.contextmanager
    def plant(right: Model, layer: int) -> Iterator[Model]:
        wrong = change(right.config, dict(right.weights), layer)
        yield Model(right.config, {**right.weights, **wrong})

    return Planted(name, "weights", expected, plant, layer, base or {}, needs=needs)


def in_config(
    name: str,
    change: Callable[[MistralConfig], dict[str, Any]],
    *,
    base: dict[str, Any] | None = None,
    needs: Needs = lambda _: True,
) -> Planted:
    """A fault of reading the config; it shows in the first attention."""

    @contextlib.contextmanager
    def plant(right: Model, _: int) -> Iterator[Model]:
        config = dataclasses.replace(right.config, **change(right.config))
        yield Model(config, right.weights)

    return Planted(name, "config", "attn.0", plant, base=base or {}, needs=needs)


def in_code(
    name: str,
    expected: str,
    *wrong: tuple[object, str, Callable[[Any], Any]],
    base: dict[str, Any] | None = None,
    needs: Needs = lambda _: True,
    dtype: Literal["float64", "bfloat16"] = "float64",
) -> Planted:
    """A fault of the code: each named function is replaced by what its right one is made into."""

    @contextlib.contextmanager
    def plant(right: Model, _: int) -> Iterator[Model]:
        with contextlib.ExitStack() as stack:
            for owner, attribute, spoil in wrong:
                replacement = spoil(getattr(owner, attribute))
                stack.enter_context(mock.patch.object(owner, attribute, replacement))
            # What was traced before is the right code, and what is traced now is not.
            jax.clear_caches()
            stack.callback(jax.clear_caches)
            yield right

    return Planted(name, "code", expected, plant, base=base or {}, needs=needs, dtype=dtype)
