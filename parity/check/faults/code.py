"""What ports get wrong: one function of lechat_jax at a time, replaced by a faulty one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from lechat_jax.config import MistralConfig
from lechat_jax.generate import continuous_batch
from lechat_jax.model import attention, block, cache, layers, mistral, rope, scoring
from parity.check.faults.plant import in_code


def _attend(change: Callable[..., Array]) -> tuple[tuple[object, str, Callable], ...]:
    """The same change to attention over whole sequences and over the cache."""

    def changed(right: Callable) -> Callable:
        return lambda *arrays: change(right, *arrays)

    return (attention, "attend", changed), (mistral, "attend_cached", changed)


def _tiled(right: Callable, q: Array, k: Array, *more: Array) -> Array:
    """Query head n reads kv head n mod K instead of n // G."""
    N, K = q.shape[2], k.shape[1 if right is attention.attend_cached else 2]
    order = np.arange(N).reshape(N // K, K).T.ravel()
    return right(q[:, :, order], k, *more)[:, :, np.argsort(order)]


def _unscaled(right: Callable, q: Array, *more: Array) -> Array:
    """Scores are divided by H instead of by its root."""
    return right(q * q.shape[3] ** -0.5, *more)


def _bf16_softmax(right: Callable) -> Callable:
    return lambda x, **options: right(x.astype(jnp.bfloat16), **options).astype(x.dtype)


def _rotate_neighbours(right: Callable) -> Callable:
    """Lanes 2h and 2h + 1 are a pair."""

    def rotate(x: Array, by: rope.Rotation) -> Array:
        order = np.concatenate([np.arange(0, x.shape[-1], 2), np.arange(1, x.shape[-1], 2)])
        return right(x[..., order], by)[..., np.argsort(order)]

    return rotate


def _rotate_backwards(right: Callable) -> Callable:
    return lambda x, by: right(x, rope.Rotation(by.cos, -by.sin))


def _rotate_half_the_lanes(right: Callable) -> Callable:
    def rotate(x: Array, by: rope.Rotation) -> Array:
        still = jnp.arange(by.cos.shape[-1]) >= by.cos.shape[-1] // 2
        return right(x, rope.Rotation(jnp.where(still, 1, by.cos), jnp.where(still, 0, by.sin)))

    return rotate


def _sine_for_cosine(right: Callable) -> Callable:
    """The second lane of a pair turns with the sine where it needs the cosine."""

    def rotate(x: Array, by: rope.Rotation) -> Array:
        first, second = jnp.split(x.astype(by.cos.dtype), 2, axis=-1)
        cos, sin = by.cos[:, :, None], by.sin[:, :, None]
        turned = [first * cos - second * sin, first * sin + second * sin]
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)

    return rotate


def _keys_one_late(right: Callable) -> Callable:
    """Queries are rotated by the position before theirs, so each key is one further away."""

    def call(self: block.Attention, x: Array, rotary: rope.Rotations, mix: Any, memory: Any) -> Any:
        def later(q: Array, k: Array, v: Array, memory: Any) -> Any:
            first = rope.Rotation(rotary.k.cos[:, 1:2], -rotary.k.sin[:, 1:2])  # back by one
            return mix(rope.rotate(q, first), k, v, memory)

        return right(self, x, rotary, later if x.shape[1] > 1 else mix, memory)

    return call


def _float32_angles(right: Callable) -> Callable:
    def rotations(positions: Array, config: Any, dtype: Any) -> rope.Rotations:
        return jax.tree.map(lambda x: x.astype(dtype), right(positions, config, "float32"))

    return rotations


def _rms_norm(f: Callable[[Array, Array, float], Array]) -> Callable[[Callable], Callable]:
    def spoil(_: Callable) -> Callable:
        def call(self: layers.RMSNorm, x: Array) -> Array:
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            return f(wide, self.scale[...].astype(wide.dtype), self.eps).astype(x.dtype)

        return call

    return spoil


def _mean_square(x: Array) -> Array:
    return jnp.mean(x * x, axis=-1, keepdims=True)


def _centred(x: Array) -> Array:
    return x - jnp.mean(x, axis=-1, keepdims=True)


def _block(f: Callable[..., tuple[Array, Any]]) -> Callable[[Callable], Callable]:
    return lambda _: lambda self, x, rotary, mix, memory: (*f(self, x, rotary, mix, memory), None)


def _no_residual(block: Any, x: Array, rotary: Any, mix: Any, memory: Any) -> tuple[Array, Any]:
    x, memory = block.attn(block.attn_norm(x), rotary, mix, memory)
    return x + block.mlp(block.mlp_norm(x))[0], memory


def _parallel(block: Any, x: Array, rotary: Any, mix: Any, memory: Any) -> tuple[Array, Any]:
    mixed, memory = block.attn(block.attn_norm(x), rotary, mix, memory)
    return x + mixed + block.mlp(block.mlp_norm(x))[0], memory


def _norm_after(block: Any, x: Array, rotary: Any, mix: Any, memory: Any) -> tuple[Array, Any]:
    mixed, memory = block.attn(x, rotary, mix, memory)
    x = x + block.attn_norm(mixed)
    return x + block.mlp_norm(block.mlp(x)[0]), memory


def _last_token_dropped(right: Callable) -> Callable:
    def cross_entropy(
        hidden: Array, head: Array, targets: Array, weights: Array, *static: int
    ) -> Array:
        return right(hidden, head, targets, weights.at[-1].set(0), *static)

    return cross_entropy


def _targets_not_shifted(right: Callable) -> Callable:
    def total_nats(
        config: Any, options: Any, weights: Any, inputs: Any, _: Any, *others: Any, **named: Any
    ) -> Array:
        return right(config, options, weights, inputs, inputs, *others, **named)

    return total_nats


def _gradient_of_one_chunk(right: Callable) -> Callable:
    """The loss is right, and the head learns from its first chunk of tokens alone."""

    def cross_entropy(
        hidden: Array, head: Array, targets: Array, weights: Array, chunk: int, *static: int
    ) -> Array:
        still = jax.lax.stop_gradient(head)
        first = right(hidden[:chunk], head, targets[:chunk], weights[:chunk], chunk, *static)
        others = hidden[chunk:], still, targets[chunk:], weights[chunk:]
        return first + right(*others, chunk, *static)

    return cross_entropy


def _coupled_decay(_: Callable) -> Callable:
    """Adam on the loss with a penalty on the weights, which was there before AdamW."""

    def adamw(rate: float, *, b1: float, b2: float, eps: float, weight_decay: float) -> Any:
        return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(rate, b1, b2, eps))

    return adamw


def _one_slot_short(right: Callable) -> Callable:
    return lambda window, chunk, context: (window or context) + chunk - 2


def _unguarded(right: Callable) -> Callable:
    return lambda self, positions, window: right(self, positions, None)


def _clamped_slots(_: Callable) -> Callable:
    """The slot after the last is the last, as `dynamic_update_slice` would have it."""
    return lambda self, positions: jnp.minimum(positions, self.capacity - 1)


def _top_left(right: Callable) -> Callable:
    """Queries and keys are numbered by where they lie in their arrays."""

    def window_mask(q_pos: Array, k_pos: Array, window: int | None) -> Array:
        rows = jnp.broadcast_to(jnp.arange(q_pos.shape[1]), q_pos.shape)
        columns = jnp.broadcast_to(jnp.arange(k_pos.shape[1]), k_pos.shape)
        return right(rows, jnp.where(k_pos < 0, k_pos, columns), window)

    return window_mask


def _decode_one_late(right: Callable) -> Callable:
    def seat(
        self: continuous_batch.ContinuousBatch,
        row: int,
        token: int,
        position: int,
        left: int,
        request: Any,
    ) -> None:
        right(self, row, token, position + 1, left, request)

    return seat


def _padding_seen(right: Callable) -> Callable:
    def chunk_of(prompt: Any, at: int, chunk: int) -> Any:
        tokens, positions = right(prompt, at, chunk)
        n_empty = int(np.sum(positions == cache.EMPTY))
        return np.roll(tokens, n_empty), np.arange(at, at + chunk, dtype=np.int32)[None]

    return chunk_of


def _wraps(config: MistralConfig) -> bool:
    """Whether there is a ring that a text is longer than."""
    return any(config.windows)


CODE = (
    in_code(
        "rotary pairs are neighbours instead of half a head apart",
        "attn.0",
        (block, "rotate", _rotate_neighbours),
    ),
    in_code("the rotation goes backwards", "attn.0", (block, "rotate", _rotate_backwards)),
    in_code(
        "the rotation takes a sine for a cosine", "attn.0", (block, "rotate", _sine_for_cosine)
    ),
    in_code(
        "only half of the lanes are rotated", "attn.0", (block, "rotate", _rotate_half_the_lanes)
    ),
    in_code(
        "keys are one position further away than they are",
        "attn.0",
        (block.Attention, "__call__", _keys_one_late),
    ),
    in_code(
        "angles are float32 in a float64 run", "attn.0", (mistral, "rotations", _float32_angles)
    ),
    in_code(
        "kv heads are tiled instead of grouped",
        "attn.0",
        *_attend(_tiled),
        needs=lambda c: 1 < c.n_kv_heads < c.n_heads,
    ),
    in_code("scores are divided by H instead of its root", "attn.0", *_attend(_unscaled)),
    in_code("the softmax is bfloat16", "attn.0", (jax.nn, "softmax", _bf16_softmax)),
    in_code(
        "the mean is subtracted before the norm",
        "attn.0",
        (
            layers.RMSNorm,
            "__call__",
            _rms_norm(
                lambda x, scale, eps: (
                    _centred(x) * jax.lax.rsqrt(_mean_square(_centred(x)) + eps) * scale
                )
            ),
        ),
    ),
    in_code(
        "norm scales are added to one",
        "attn.0",
        (
            layers.RMSNorm,
            "__call__",
            _rms_norm(lambda x, scale, eps: x * jax.lax.rsqrt(_mean_square(x) + eps) * (1 + scale)),
        ),
    ),
    in_code(
        "eps is added to the root instead of below it",
        "attn.0",
        (
            layers.RMSNorm,
            "__call__",
            _rms_norm(lambda x, scale, eps: x / (jnp.sqrt(_mean_square(x)) + eps) * scale),
        ),
    ),
    in_code(
        "norms scale before they round",
        "norm.0",
        (
            layers.RMSNorm,
            "__call__",
            _rms_norm(lambda x, scale, eps: x * jax.lax.rsqrt(_mean_square(x) + eps) * scale),
        ),
        dtype="bfloat16",
    ),
    in_code(
        "norms come after the layers instead of before",
        "attn.0",
        (block.Block, "__call__", _block(_norm_after)),
    ),
    in_code("attention has no residual", "mlp.0", (block.Block, "__call__", _block(_no_residual))),
    in_code(
        "attention and feed-forward read the same input",
        "mlp.0",
        (block.Block, "__call__", _block(_parallel)),
    ),
    in_code("the gate is a GELU", "mlp.0", (jax.nn, "silu", lambda _: jax.nn.gelu)),
    in_code("the last token has no loss", "loss", (scoring, "cross_entropy", _last_token_dropped)),
    in_code(
        "each token is to predict itself", "loss", (scoring, "total_nats", _targets_not_shifted)
    ),
    in_code(
        "the head learns from the first chunk alone",
        "grad",
        (scoring, "cross_entropy", _gradient_of_one_chunk),
    ),
    in_code("weight decay is part of the gradient", "trajectory", (optax, "adamw", _coupled_decay)),
    in_code(
        "the ring is one slot short",
        "prefill",
        (cache, "capacity", _one_slot_short),
        (cache.Ring, "claim", _unguarded),
        needs=_wraps,
    ),
    in_code(
        "the ring does not wrap", "prefill", (cache.Ring, "_slot", _clamped_slots), needs=_wraps
    ),
    in_code(
        "the mask of a chunk is aligned top-left", "prefill", (mistral, "window_mask", _top_left)
    ),
    in_code(
        "decoding starts one position late",
        "decode",
        (continuous_batch.ContinuousBatch, "_seat", _decode_one_late),
    ),
    in_code("padding is seen", "padding", (continuous_batch, "chunk_of", _padding_seen)),
)
