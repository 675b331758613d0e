"""What ports get wrong about long texts: YaRN, queries that grow, layers with windows of their own.

A text that is shorter than the lengths in the config shows none of them; see
`parity.architectures`, where those lengths are short.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from lechat_jax.config import Llama4Scaling, MistralConfig, Yarn
from lechat_jax.model import mistral, rope
from parity.architectures import ARCHITECTURES
from parity.check.faults.plant import Planted, in_code, in_config


def _base(kind: str) -> dict[str, Any]:
    """What makes the model of the other faults one of that kind."""
    config = ARCHITECTURES[kind]
    names = ("n_layers", "rope_theta", "sliding_window", "tied_embeddings")
    parts = {"yarn": config.yarn, "llama_4_scaling": config.llama_4_scaling}
    found = {name: getattr(config, name) for name in names} | parts
    return {name: value for name, value in found.items() if value != getattr(_SMALL, name)}


_SMALL = ARCHITECTURES["mistral"]
_MINISTRAL, _MINISTRAL_3, _DEVSTRAL = (
    _base(kind) for kind in ("ministral", "ministral-3", "devstral-2")
)


def _has_yarn(config: MistralConfig) -> bool:
    return config.yarn is not None


def _grows(config: MistralConfig) -> bool:
    return config.llama_4_scaling is not None


def _yarn(name: str, base: dict[str, Any], change: Callable[[Yarn], dict[str, Any]]) -> Planted:
    def changed(config: MistralConfig) -> dict[str, Any]:
        assert config.yarn
        return {"yarn": dataclasses.replace(config.yarn, **change(config.yarn))}

    return in_config(name, changed, base=base, needs=_has_yarn)


def _growth(name: str, change: Callable[[Llama4Scaling], dict[str, Any]]) -> Planted:
    def changed(config: MistralConfig) -> dict[str, Any]:
        growth = config.llama_4_scaling
        assert growth
        return {"llama_4_scaling": dataclasses.replace(growth, **change(growth))}

    return in_config(name, changed, base=_MINISTRAL_3, needs=_grows)


def _shifted(config: MistralConfig) -> dict[str, Any]:
    return {"sliding_window": (*config.windows[1:], config.windows[0])}


def _everywhere(config: MistralConfig) -> dict[str, Any]:
    return {"sliding_window": next(window for window in config.windows if window)}


def _between_pairs(_: Callable) -> Callable:
    """The ramp of YaRN begins and ends between pairs, not at whole ones."""

    def slowed(head_dim: int, theta: float, yarn: Yarn, dtype: Any) -> Array:
        length = yarn.original_max_position_embeddings / (2 * math.pi)
        first, last = (
            head_dim / 2 * math.log(length / turns, theta) for turns in (yarn.beta, yarn.alpha)
        )
        pairs = jnp.arange(head_dim // 2, dtype=dtype)
        return jnp.clip((pairs - max(first, 0)) / (last - max(first, 0)), 0, 1)

    return slowed


def _smooth(_: Callable) -> Callable:
    """Queries grow with every token instead of in steps."""

    def query_scale(positions: Array, scaling: Llama4Scaling, dtype: Any) -> Array:
        share = jnp.maximum(positions, 0).astype(dtype) / scaling.original_max_position_embeddings
        return 1 + scaling.beta * jnp.log1p(share)

    return query_scale


def _keys_too(right: Callable) -> Callable:
    def rotations(*args: Any) -> rope.Rotations:
        return rope.Rotations(right(*args).q, right(*args).q)

    return rotations


def from_the_first(right: Callable) -> Callable:
    """Positions of a chunk are counted from its beginning, for the growth alone."""

    def query_scale(positions: Array, *rest: Any) -> Array:
        return right(jnp.broadcast_to(jnp.arange(positions.shape[1]), positions.shape), *rest)

    return query_scale


POSITIONS = (
    in_config(
        "the windows of the layers are one layer off",
        _shifted,
        base=_MINISTRAL,
        needs=lambda c: c.windows[0] != c.windows[1 % c.n_layers],
    ),
    in_config(
        "every layer has the window of some",
        _everywhere,
        base=_MINISTRAL,
        needs=lambda c: c.windows[0] is None and any(c.windows),
    ),
    in_config("there is no YaRN", lambda c: {"yarn": None}, base=_MINISTRAL_3, needs=_has_yarn),
    _yarn("YaRN's factor is halved", _MINISTRAL_3, lambda y: {"factor": y.factor / 2}),
    _yarn(
        "YaRN's original length is the stretched one",
        _MINISTRAL_3,
        lambda y: {
            "original_max_position_embeddings": int(y.factor * y.original_max_position_embeddings)
        },
    ),
    _yarn("YaRN's beta is that of another model", _DEVSTRAL, lambda y: {"beta": y.beta * 8}),
    _yarn("YaRN's scale is applied", _MINISTRAL_3, lambda y: {"apply_scale": True}),
    _yarn("YaRN's scale is not applied", _DEVSTRAL, lambda y: {"apply_scale": False}),
    in_config(
        "queries do not grow", lambda c: {"llama_4_scaling": None}, base=_MINISTRAL_3, needs=_grows
    ),
    _growth(
        "queries grow one token late",
        lambda g: {"original_max_position_embeddings": g.original_max_position_embeddings + 1},
    ),
    _growth("queries grow twice as fast", lambda g: {"beta": 2 * g.beta}),
    in_code(
        "YaRN's ramp ends between pairs",
        "attn.0",
        (rope, "_slowed", _between_pairs),
        base=_DEVSTRAL,
        needs=_has_yarn,
    ),
    in_code(
        "queries grow with every token",
        "attn.0",
        (rope, "query_scale", _smooth),
        base=_MINISTRAL_3,
        needs=_grows,
    ),
    in_code(
        "keys grow like queries",
        "attn.0",
        (mistral, "rotations", _keys_too),
        base=_MINISTRAL_3,
        needs=_grows,
    ),
    in_code(
        "the growth of queries starts anew with each chunk",
        "prefill",
        (rope, "query_scale", from_the_first),
        base=_MINISTRAL_3,
        needs=_grows,
    ),
)
