"""Chunked cross-entropy loss over the vocabulary: the logits of all tokens are never in memory."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lechat_jax.devices.platform import platform

Gradients = tuple[Float[Array, "T D"], Float[Array, "V D"]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " T"],
    weights: Float[Array, " T"],
    chunk: int,
    n_sharing: int = 1,
) -> Float[Array, ""]:
    """Cross-entropy: sum over T tokens of weight * -log softmax(head @ hidden)[target], in nats.

    The last row of the head stands for `n_sharing` equal ones: the softmax is over all of them.

    The logits of `chunk` tokens are in memory at a time, at least float32. When differentiated,
    the forward pass also computes the gradients of `hidden` and `head`, so that no logit is
    computed twice: three matrix products in all, where recomputing would take four.
    `targets` and `weights` are data and have no gradient.
    """
    rows = _chunks(hidden, targets, weights, chunk)
    start = jnp.zeros((), rows[2].dtype)
    nats, _ = jax.lax.scan(
        lambda nats, row: (nats + _nats(head, *row, n_sharing=n_sharing)[0], None), start, rows
    )
    return nats


def target_scores(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " T"],
    chunk: int,
) -> tuple[Float[Array, " T"], Bool[Array, " T"]]:
    """Log-probability of each target in nats, and whether it is what greedy decoding takes.

    The logits of `chunk` tokens are in memory at a time, at least float32.
    """

    def scores(row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        h, target, weight = row
        logits = jnp.einsum("TD,VD->TV", h, head, preferred_element_type=weight.dtype)
        hit = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        return hit - jax.nn.logsumexp(logits, axis=1), logits.argmax(axis=1) == target

    T = len(targets)
    log_probs, is_greedy = jax.lax.map(
        scores, _chunks(hidden, targets, jnp.ones(T, hidden.dtype), chunk)
    )
    return log_probs.reshape(-1)[:T], is_greedy.reshape(-1)[:T]


def _chunks(hidden: Array, targets: Array, weights: Array, chunk: int) -> tuple[Array, ...]:
    """The tokens in rows of `chunk`, the last padded with tokens of weight 0."""
    T, D = hidden.shape
    chunk = min(chunk, T)
    pad = -T % chunk
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return (
        jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, chunk, D),
        jnp.pad(targets, (0, pad)).reshape(-1, chunk),
        jnp.pad(weights.astype(wide), (0, pad)).reshape(-1, chunk),
    )


def _nats(
    head: Array, h: Array, target: Array, weight: Array, n_sharing: int
) -> tuple[Array, Array, Array]:
    """The loss of one chunk in nats, and its softmax as numerators and denominators."""
    logits = jnp.einsum("TD,VD->TV", h, head, preferred_element_type=weight.dtype)
    top = logits.max(axis=-1)
    numerator = jnp.exp(logits - top[:, None])
    if n_sharing > 1:
        is_last = jnp.arange(head.shape[0]) == head.shape[0] - 1
        numerator *= jnp.where(is_last, n_sharing, 1).astype(numerator.dtype)
    denominator = numerator.sum(axis=-1)
    hit = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
    return jnp.sum(weight * (jnp.log(denominator) + top - hit)), numerator, denominator


def _forward(
    hidden: Array, head: Array, targets: Array, weights: Array, chunk: int, n_sharing: int
) -> tuple[Array, Gradients]:
    rows = _chunks(hidden, targets, weights, chunk)
    wide = rows[2].dtype

    def step(carry: tuple[Array, Array], row: tuple[Array, ...]) -> tuple:
        nats, d_head = carry
        h, target, weight = row
        more, numerator, denominator = _nats(head, *row, n_sharing=n_sharing)
        # d loss / d logit = weight * (softmax - onehot). The normaliser goes to the small
        # operand and the onehot becomes a gather, so the logits are not written again.
        share = (weight / denominator)[:, None]
        numerator = numerator.astype(head.dtype)
        d_h = jnp.einsum("TV,VD->TD", numerator, head, preferred_element_type=wide) * share
        d_h = d_h - weight[:, None] * head[target]
        shared = (h * share).astype(h.dtype)
        d_head += jnp.einsum("TV,TD->VD", numerator, shared, preferred_element_type=wide)
        d_head = d_head.at[target].add(-weight[:, None] * h)
        return (nats + more, d_head), d_h

    start = (jnp.zeros((), wide), jnp.zeros(head.shape, wide))
    (nats, d_head), d_hidden = jax.lax.scan(step, start, rows)
    d_hidden = d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return nats, (d_hidden.astype(hidden.dtype), d_head.astype(head.dtype))


def _backward(chunk: int, n_sharing: int, gradients: Gradients, scale: Array) -> tuple:
    d_hidden, d_head = gradients
    return (
        (scale * d_hidden).astype(d_hidden.dtype),
        (scale * d_head).astype(d_head.dtype),
        None,
        None,
    )


cross_entropy.defvjp(_forward, _backward)


def usual_chunk(D: int) -> int:
    """Tokens whose logits are in memory at a time, by the width D of the model.

    On a CPU as many as its cache holds; of a wide model more, since its products are worth it.
    """
    if platform() != "cpu":
        return 8192
    return 256 if D < 512 else 1024
