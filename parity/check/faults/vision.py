"""Faults of the vision tower, most of them seen in other ports of it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lechat_jax.config import MistralConfig
from lechat_jax.data.rows import Images, RowImages
from lechat_jax.model import mistral, vision
from lechat_jax.model.attention import attend
from lechat_jax.model.rope import Rotation
from parity.architectures import ARCHITECTURES
from parity.check.faults.plant import Planted, Weights, in_code, in_weights
from parity.check.probes import Model

_MERGED = {"sliding_window": None, "vision": ARCHITECTURES["mistral-small-3.1"].vision}
_PIXTRAL = {"sliding_window": None, "vision": ARCHITECTURES["pixtral"].vision}


def _sees(config: MistralConfig) -> bool:
    return config.vision is not None


def _merges(config: MistralConfig) -> bool:
    return config.vision is not None and config.vision.spatial_merge_size > 1


def _has_bias(config: MistralConfig) -> bool:
    return config.vision is not None and config.vision.projector_bias


def _weight(
    name: str, expected: str, key: str, change: Callable[[np.ndarray, MistralConfig], np.ndarray]
) -> Planted:
    """A fault of conversion: one weight of the tower is another."""

    def changed(config: MistralConfig, weights: Weights, layer: int) -> Weights:
        return {key: change(weights[key], config)}

    needs = _merges if key == "projector.merge.kernel" else _sees
    return in_weights(name, expected, changed, base=_MERGED, needs=needs)


def _neighbours(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of a kernel in Mistral's order, pairs side by side, of so many heads."""
    flat = rows.reshape(n_heads, 2, -1, rows.shape[-1])
    return flat.swapaxes(1, 2).reshape(rows.shape)


def _swapped_norms(config: MistralConfig, weights: Weights, layer: int) -> Weights:
    names = [f"vision.blocks.0.{norm}.scale" for norm in ("attn_norm", "mlp_norm")]
    return dict(zip(names, (weights[name] for name in reversed(names)), strict=True))


def _gate_for_up(config: MistralConfig, weights: Weights, layer: int) -> Weights:
    names = [f"vision.blocks.0.mlp.{word}.kernel" for word in ("gate", "up")]
    return dict(zip(names, (weights[name] for name in reversed(names)), strict=True))


def _other_theta() -> Planted:
    @contextlib.contextmanager
    def plant(right: Model, _: int) -> Iterator[Model]:
        tower = right.config.vision
        assert tower is not None
        wrong = dataclasses.replace(tower, rope_theta=10 * tower.rope_theta)
        yield Model(dataclasses.replace(right.config, vision=wrong), right.weights)

    name = "the tower's theta is another one"
    return Planted(name, "config", "vision.0", plant, base=_MERGED, needs=_sees)


def _code(name: str, expected: str, *wrong: tuple[object, str, Callable[[Any], Any]]) -> Planted:
    return in_code(name, expected, *wrong, base=_MERGED, needs=_sees)


def _columns_first(right: Callable) -> Callable:
    def rotation(places: Array, *rest: Any) -> Rotation:
        return right(places[..., ::-1], *rest)

    return rotation


def _angles(f: Callable[[Array, Array, Array], Array]) -> Callable[[Callable], Callable]:
    """A rotation by other angles of row, column and all frequencies."""

    def spoil(_: Callable) -> Callable:
        def rotation(places: Array, config: Any, dtype: Any) -> Rotation:
            lane = jnp.arange(0, config.head_dim, 2, dtype=dtype)
            speeds = 1.0 / config.rope_theta ** (lane / config.head_dim)
            row, column = jnp.split(places.astype(dtype), 2, axis=-1)
            angles = f(row, column, speeds)
            return Rotation(jnp.cos(angles), jnp.sin(angles))

        return rotation

    return spoil


def _in_halves(row: Array, column: Array, speeds: Array) -> Array:
    half = len(speeds) // 2
    return jnp.concatenate([row * speeds[:half], column * speeds[half:]], axis=-1)


def _same_speeds(row: Array, column: Array, speeds: Array) -> Array:
    return jnp.concatenate([row * speeds[0::2], column * speeds[0::2]], axis=-1)


def _in_turn(row: Array, column: Array, speeds: Array) -> Array:
    """Pairs turn by row and column alternately."""
    return jnp.where(jnp.arange(len(speeds)) % 2 == 0, row, column) * speeds


def _one_dimension(row: Array, column: Array, speeds: Array) -> Array:
    """Patches are numbered one after the other, as the tokens of a text."""
    order = jnp.cumsum(jnp.ones_like(row), axis=1) - 1
    return order * speeds


def _causal(_: Callable) -> Callable:
    def attend_patches(q: Array, k: Array, v: Array, n_patches: Array) -> Array:
        T = q.shape[1]
        seen = jnp.tril(jnp.ones((T, T), bool))[None] & _real(T, n_patches)
        return attend(q, k, v, seen)

    return attend_patches


def _padding_is_seen(_: Callable) -> Callable:
    def attend_patches(q: Array, k: Array, v: Array, n_patches: Array) -> Array:
        return attend(q, k, v, jnp.ones((1, 1, q.shape[1]), bool))

    return attend_patches


def _across_images(_: Callable) -> Callable:
    """All images of a batch see each other."""

    def attend_patches(q: Array, k: Array, v: Array, n_patches: Array) -> Array:
        T = q.shape[1]
        queries, keys, values = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
        real = _real(T, n_patches).reshape(1, 1, -1)
        return attend(queries, keys, values, real).reshape(q.shape)

    return attend_patches


def _real(T: int, n_patches: Array) -> Array:
    return (jnp.arange(T)[None] < n_patches[:, None])[:, None]


def _final_norm(right: Callable) -> Callable:
    """The tower ends with a norm, as the decoder does."""

    def see(self: mistral.Mistral, images: Images) -> Array:
        x = self.vision(images)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        size = jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True))
        return self.projector((wide / size * jnp.arange(1, 1 + x.shape[-1])).astype(x.dtype))

    return see


def _tanh_gelu(right: Callable) -> Callable:
    def gelu(x: Array, approximate: bool = True) -> Array:
        return right(x, approximate=True)

    return gelu


def _gelu_for_silu(right: Callable) -> Callable:
    """The activation that transformers' config has where a file does not say it."""
    return lambda x: jax.nn.gelu(x, approximate=False)


def _breaks_too(right: Callable) -> Callable:
    """The ends of rows are image tokens as well."""

    def embedded(self: mistral.Mistral, tokens: Array, features: Array | None) -> Array:
        tower = self.config.vision
        assert tower is not None
        ends = tokens == tower.image_break_token_id
        return right(self, jnp.where(ends, tower.image_token_id, tokens), features)

    return embedded


def _one_token_late(right: Callable) -> Callable:
    def see_rows(self: mistral.Mistral, rows: RowImages) -> Array:
        return jnp.roll(right(self, rows), 1, axis=1)

    return see_rows


def _no_bias(config: MistralConfig, weights: Weights, layer: int) -> Weights:
    return {"projector.linear_1.bias": np.zeros_like(weights["projector.linear_1.bias"])}


VISION = (
    _weight(
        "the patch kernel is transposed",
        "patches",
        "vision.patch.kernel",
        lambda kernel, _: np.ascontiguousarray(kernel.swapaxes(2, 3)),
    ),
    _weight(
        "red is taken for blue",
        "patches",
        "vision.patch.kernel",
        lambda kernel, _: np.ascontiguousarray(kernel[:, ::-1]),
    ),
    _weight(
        "the tower's queries have their pairs side by side",
        "vision.0",
        "vision.blocks.0.attn.q.kernel",
        lambda kernel, config: _neighbours(kernel, len(kernel)),
    ),
    _weight(
        "the tower's keys are permuted with the heads of the text",
        "vision.0",
        "vision.blocks.0.attn.k.kernel",
        lambda kernel, config: _neighbours(kernel, config.n_heads),
    ),
    in_weights(
        "the tower's norms are swapped", "vision.0", _swapped_norms, base=_MERGED, needs=_sees
    ),
    in_weights(
        "the tower's gate is taken for up", "vision.0", _gate_for_up, base=_MERGED, needs=_sees
    ),
    _weight(
        "merged lanes are ordered patch by patch",
        "projector",
        "projector.merge.kernel",
        lambda kernel, _: (
            kernel.reshape(len(kernel), kernel.shape[2], -1).swapaxes(1, 2).reshape(kernel.shape)
        ),
    ),
    _weight(
        "merged patches are ordered by column",
        "projector",
        "projector.merge.kernel",
        lambda kernel, _: np.ascontiguousarray(kernel[:, :, [0, 2, 1, 3]]),
    ),
    in_weights("the projector has no bias", "projector", _no_bias, base=_PIXTRAL, needs=_has_bias),
    _other_theta(),
    _code("rows are taken for columns", "vision.0", (vision, "rotation_2d", _columns_first)),
    _code(
        "rows have the fast half of the frequencies",
        "vision.0",
        (vision, "rotation_2d", _angles(_in_halves)),
    ),
    _code(
        "rows and columns have the same frequencies",
        "vision.0",
        (vision, "rotation_2d", _angles(_same_speeds)),
    ),
    _code(
        "pairs turn by row and column alternately",
        "vision.0",
        (vision, "rotation_2d", _angles(_in_turn)),
    ),
    _code(
        "patches are numbered like a text's tokens",
        "vision.0",
        (vision, "rotation_2d", _angles(_one_dimension)),
    ),
    _code("the tower is causal", "vision.0", (vision, "attend_patches", _causal)),
    _code(
        "padding is a part of the image", "vision.0", (vision, "attend_patches", _padding_is_seen)
    ),
    _code("images see each other", "vision.0", (vision, "attend_patches", _across_images)),
    _code("the tower's activation is GELU", "vision.0", (jax.nn, "silu", _gelu_for_silu)),
    _code("the tower ends with a norm", "projector", (mistral.Mistral, "see", _final_norm)),
    _code("GELU is approximated by tanh", "projector", (jax.nn, "gelu", _tanh_gelu)),
    _code("the ends of rows are image tokens", "embed", (mistral.Mistral, "embedded", _breaks_too)),
    _code("features come one token late", "embed", (mistral.Mistral, "see_rows", _one_token_late)),
)
