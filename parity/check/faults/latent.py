"""What ports of latent attention and of shared experts get wrong, as public threads tell.

Planted in a model in which no two widths agree: where a head's key and value are as wide as each
other, as in DeepSeek's models, half of these faults are no faults.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lechat_jax.config import LatentConfig, MistralConfig
from lechat_jax.config.layout import in_layer
from lechat_jax.model import attention, cache, latent, mistral, moe, rope
from parity.architectures import ARCHITECTURES
from parity.check.faults.experts import shares_of_all
from parity.check.faults.plant import Change, Planted, Weights, in_code, in_config, in_weights
from parity.check.faults.positions import from_the_first

_KIND = ARCHITECTURES["mistral-small-4"]
_SMALL = ARCHITECTURES["mistral"]
BASE: dict[str, Any] = {
    field.name: getattr(_KIND, field.name)
    for field in dataclasses.fields(MistralConfig)
    if getattr(_KIND, field.name) != getattr(_SMALL, field.name)
}
MIXED = "mlp.1"  # the first layer that has experts

# From the right function to a faulty one.
Spoil = Callable[[Callable], Callable]


def _is_latent(config: MistralConfig) -> bool:
    return config.latent_attention is not None


def _widths(config: MistralConfig) -> LatentConfig:
    assert config.latent_attention
    return config.latent_attention


def _rows(map: str, change: Callable[[np.ndarray, LatentConfig], np.ndarray]) -> Change:
    """The kernel of a map of the layer, changed."""

    def changed(config: MistralConfig, weights: Weights, layer: int) -> Weights:
        name = in_layer(f"blocks.{map}.kernel", layer)
        return {name: change(weights[name], _widths(config))}

    return changed


def _rolled(map: str, axis: int, lanes: str) -> Change:
    """The last `lanes` of what a map makes come first."""
    return _rows(map, lambda kernel, widths: np.roll(kernel, getattr(widths, lanes), axis))


def _values_at_their_width(kernel: np.ndarray, widths: LatentConfig) -> np.ndarray:
    """A head's key begins where the value is as wide, not the key without a position."""
    n = widths.v_head_dim
    return np.concatenate([kernel[:, -widths.qk_nope_head_dim :], kernel[:, :n]], axis=1)


def _by_lanes(kernel: np.ndarray, _: LatentConfig) -> np.ndarray:
    """Lanes before heads."""
    D, N, U = kernel.shape
    return kernel.reshape(D, U, N).swapaxes(1, 2)


def _swapped(map: str) -> Change:
    def changed(_: MistralConfig, weights: Weights, layer: int) -> Weights:
        gate, up = (in_layer(f"blocks.{map}.{word}.kernel", layer) for word in ("gate", "up"))
        return {gate: weights[up], up: weights[gate]}

    return changed


def _halves(_: Callable) -> Callable:
    """Pairs are half of the lanes apart, as in other Mistrals' files."""
    return lambda x: x


def _rotated(
    f: Callable[[Callable, Array, rope.Rotation], Array],
) -> Spoil:
    return lambda right: lambda x, by: f(right, x, by)


def _backwards(right: Callable, x: Array, by: rope.Rotation) -> Array:
    return right(x, rope.Rotation(by.cos, -by.sin))


def _normed_key(right: Callable, x: Array, by: rope.Rotation) -> Array:
    """The rotary key, which is one for all heads, is normed like the latent."""
    return right(x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True)) if x.shape[2] == 1 else x, by)


def _inner_norm(word: str, f: Callable[[Callable, Array], Array]) -> tuple[object, str, Callable]:
    """One of the two norms inside of attention, changed for as long as it computes."""

    def spoil(right: Callable) -> Callable:
        def call(self: latent.LatentAttention, *rest: Any) -> Any:
            norm = getattr(self, word)
            object.__setattr__(self, word, lambda x: f(norm, x))  # which is no module
            try:
                return right(self, *rest)
            finally:
                object.__setattr__(self, word, norm)

        return call

    return latent.LatentAttention, "__call__", spoil


def _without(norm: Callable, x: Array) -> Array:
    return x


def _twice(norm: Callable, x: Array) -> Array:
    return norm(norm(x))


def _normed_again(right: Callable) -> Callable:
    """The latents in the ring are normed when they are read."""

    def read(self: cache.Ring, layer: int) -> tuple[Array, Array]:
        k, v = right(self, layer)
        return k, v / jnp.sqrt(jnp.mean(v * v, -1, keepdims=True) + 1e-6)

    return read


def _scored(scale: Callable[[int, int, int], float]) -> Spoil:
    """Scores over the ring have another scale, of the widths of head, latent and rotary key."""

    def spoil(right: Callable) -> Callable:
        def attend_latents(q: attention.LatentQueries, *more: Any) -> Array:
            H = round(q.scale**-2)
            other = scale(H, q.plain.shape[-1], q.rotary.shape[-1])
            return right(q._replace(scale=other), *more)

        return attend_latents

    return spoil


def _of_plain_lanes(right: Callable) -> Callable:
    """The root is that of the lanes without a position alone."""

    def expanded(self: latent.LatentAttention, *parts: Array) -> tuple[Array, Array, Array]:
        q, k, v = right(self, *parts)
        return q * (q.shape[-1] / self.n_plain) ** 0.5, k, v

    return expanded


def _rotations(
    change: Callable[[rope.Rotations], rope.Rotations],
) -> Spoil:
    return lambda right: lambda *args: change(right(*args))


def _speeds_of_the_head(right: Callable) -> Callable:
    """The speeds are the first of those of a head as wide as all of its lanes."""

    def rotations(positions: Array, config: MistralConfig, dtype: Any) -> rope.Rotations:
        found = right(positions, config, dtype)
        whole = rope.rotation(positions, config.head_dim, config.rope_theta, dtype, config.yarn)
        k = rope.Rotation(*(part[..., : found.k.cos.shape[-1]] for part in whole))
        scale = 1 if found.scale is None else found.scale[..., None]
        return rope.Rotations(rope.Rotation(k.cos * scale, k.sin * scale), k, found.scale)

    return rotations


def _weighted_shared(right: Callable) -> Callable:
    """The shared expert is added in the share of the best chosen one."""

    def call(self: moe.Mixture, x: Array) -> tuple[Array, moe.Load]:
        y, load = right(self, x)
        shares = self.router(x.reshape(-1, x.shape[-1])).shares[:, :1].reshape(*x.shape[:-1], 1)
        return y + (shares - 1) * self.shared(x)[0], load

    return call


def _routed_alone(map: str) -> Change:
    return _rows(map, lambda kernel, _: np.zeros_like(kernel))


def _in_weights(name: str, change: Change, expected: str = "attn.0", layer: int = 0) -> Planted:
    def needs(config: MistralConfig) -> bool:
        is_mixed = config.n_shared_experts and config.n_dense_layers <= layer
        is_mixed = is_mixed and config.n_dense_layers < config.n_layers
        return _is_latent(config) and (expected != MIXED or bool(is_mixed))

    return in_weights(name, expected, change, layer=layer, base=BASE, needs=needs)


def _in_code(name: str, *wrong: tuple[object, str, Callable], expected: str = "attn.0") -> Planted:
    return in_code(name, expected, *wrong, base=BASE, needs=_is_latent)


LATENT = (
    in_config(
        "scores are multiplied by YaRN's square",
        lambda c: {"latent_attention": dataclasses.replace(_widths(c), squared_yarn_scale=True)},
        base=BASE,
        needs=lambda c: _is_latent(c) and c.yarn,
    ),
    in_config(
        "rotary keys are longer by YaRN's factor",
        lambda c: {"yarn": c.yarn and dataclasses.replace(c.yarn, apply_scale=True)},
        base=BASE,
        needs=lambda c: _is_latent(c) and c.yarn,
    ),
    _in_weights(
        "values are cut off where a value is as wide",
        _rows("attn.kv_b", _values_at_their_width),
    ),
    _in_weights("rotary lanes of a query come first", _rolled("attn.q_b", 1, "qk_rope_head_dim")),
    _in_weights(
        "the rotary key comes before the latent", _rolled("attn.kv_a", 0, "qk_rope_head_dim")
    ),
    _in_weights("the output reads lanes before heads", _rows("attn.o", _by_lanes)),
    _in_weights("gate and up of the shared expert are swapped", _swapped("mlp.shared"), MIXED, 1),
    _in_weights("the halves of gate and up are swapped", _swapped("mlp.experts"), MIXED, 1),
    _in_weights("the shared expert is missing", _routed_alone("mlp.shared.down"), MIXED, 1),
    _in_code(
        "rotary lanes are halves instead of neighbours",
        (latent, "deinterleaved", _halves),
    ),
    _in_code("rotary lanes go backwards", (latent, "rotate", _rotated(_backwards))),
    _in_code("the rotary key is normed", (latent, "rotate", _rotated(_normed_key))),
    _in_code("queries are not normed", _inner_norm("q_norm", _without)),
    _in_code("latents are not normed", _inner_norm("kv_norm", _without)),
    _in_code("latents are normed twice", _inner_norm("kv_norm", _twice)),
    _in_code(
        "latents are normed again when they are read from the cache",
        (cache.Ring, "read", _normed_again),
        expected="prefill",
    ),
    _in_code(
        "the scale is that of the absorbed width",
        (mistral, "attend_latents", _scored(lambda H, C, R: (C + R) ** -0.5)),
        expected="prefill",
    ),
    _in_code(
        "the scale is that of the lanes without a position",
        (latent.LatentAttention, "_expanded", _of_plain_lanes),
    ),
    _in_code(
        "only rotary lanes of a query grow",
        (mistral, "rotations", _rotations(lambda found: found._replace(scale=None))),
    ),
    _in_code(
        "only lanes of a query without a position grow",
        (mistral, "rotations", _rotations(lambda found: found._replace(q=found.k))),
    ),
    _in_code(
        "the growth of latent queries starts anew with each chunk",
        (rope, "query_scale", from_the_first),
        expected="prefill",
    ),
    _in_code(
        "the speeds are those of the whole head",
        (mistral, "rotations", _speeds_of_the_head),
    ),
    _in_code(
        "the shared expert has a share of the router's",
        (moe.Mixture, "__call__", _weighted_shared),
        expected=MIXED,
    ),
    _in_code(
        "the shares of the chosen do not add up to one beside a shared expert",
        (moe.Router, "__call__", shares_of_all),
        expected=MIXED,
    ),
)
