"""Cross-entropy chunk by chunk is the plain formula, in value, gradients and precision.

The oracles are a log-softmax in float64 NumPy, and JAX differentiating the plain formula.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lechat_jax.ops.cross_entropy import cross_entropy
from tests.support.jaxprs import equations

T, D, V = 23, 5, 31
Loss = Callable[..., Any]
Parts = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def draw(dtype: str, scale: float = 1.0) -> Parts:
    """Hidden, head, targets and weights, of which some are zero."""
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(scale * rng.normal(size=(T, D)), dtype),
        jnp.asarray(rng.normal(size=(V, D)), dtype),
        jnp.asarray(rng.integers(V, size=T), jnp.int32),
        jnp.asarray(rng.uniform(size=T) * (rng.uniform(size=T) > 0.2), jnp.float32),
    )


def numpy_nats(hidden: Any, head: Any, targets: Any, weights: Any) -> float:
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(-(np.asarray(weights, np.float64) * log_p[np.arange(T), targets]).sum())


def naive(hidden: Any, head: Any, targets: Any, weights: Any, chunk: int) -> jax.Array:
    """All logits at once; `chunk` is only for having the same arguments."""
    log_p = jax.nn.log_softmax(hidden @ head.T)
    return -(weights * jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]).sum()


def differentiated(loss: Loss, chunk: int) -> Callable[..., Any]:
    return jax.value_and_grad(lambda *parts: loss(*parts, chunk), argnums=(0, 1))


def relative(x: Any, y: Any) -> float:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(np.abs(x - y).max() / np.abs(y).max())


@functools.cache
def exact(scale: float) -> tuple[float, Any]:
    parts = draw("float64", scale)
    return numpy_nats(*parts), jax.jit(differentiated(naive, 0))(*parts)[1]


# One token, some that do not divide T, all of them, more than there are.
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("chunk", [1, 8, T, 100])
def test_value_and_gradients_are_those_of_the_plain_formula(chunk: int) -> None:
    value, gradients = jax.jit(differentiated(cross_entropy, chunk))(*draw("float64"))
    expected, expected_gradients = exact(scale=1.0)
    assert value.dtype == jnp.float64
    assert relative(value, expected) < 1e-14
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == jnp.float64
        assert relative(gradient, other) < 1e-12


@pytest.mark.usefixtures("x64")
def test_without_a_gradient_the_value_is_the_same() -> None:
    parts = draw("float64")
    value, _ = jax.jit(differentiated(cross_entropy, 8))(*parts)
    assert float(cross_entropy(*parts, 8)) == float(value)


# Logits of some ten thousand: exp of one would overflow, and their spread underflows.
def test_extreme_logits_neither_overflow_nor_vanish() -> None:
    parts = draw("float32", scale=1e4)
    assert np.abs(np.asarray(parts[0] @ parts[1].T)).max() > 3e4
    value, gradients = jax.jit(differentiated(cross_entropy, 8))(*parts)
    assert relative(value, numpy_nats(*parts)) < 1e-6
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_a_token_of_weight_zero_counts_for_nothing() -> None:
    hidden, head, targets, weights = draw("float32")
    both = jax.jit(differentiated(cross_entropy, 8))
    out = np.asarray(weights) == 0
    assert 0 < out.sum() < T
    value, (d_hidden, d_head) = both(hidden, head, targets, weights)
    assert (np.asarray(d_hidden)[out] == 0).all()
    assert (np.asarray(d_hidden)[~out] != 0).any(axis=1).all()
    other = both(jnp.where(out[:, None], 7.0, hidden), head, jnp.where(out, 3, targets), weights)
    assert float(other[0]) == float(value)
    assert (np.asarray(other[1][1]) == np.asarray(d_head)).all()
    value, gradients = both(hidden, head, targets, 0 * weights)
    assert float(value) == 0
    assert not any(gradient.any() for gradient in gradients)


def test_what_comes_after_the_loss_scales_its_gradients() -> None:
    def times(factor: float, loss: Loss) -> Loss:
        return lambda *args: factor * loss(*args)

    _, gradients = jax.jit(differentiated(cross_entropy, 8))(*draw("float32"))
    _, others = jax.jit(differentiated(times(3, cross_entropy), 8))(*draw("float32"))
    for gradient, other in zip(gradients, others, strict=True):
        np.testing.assert_allclose(np.asarray(other), 3 * np.asarray(gradient), rtol=1e-6)


def test_half_precision_is_summed_in_single() -> None:
    parts = draw("bfloat16")
    value, gradients = jax.jit(differentiated(cross_entropy, 8))(*parts)
    assert value.dtype == jnp.float32
    assert relative(value, numpy_nats(*parts)) < 1e-6  # of the rounded operands
    exact_parts = (*(part.astype(jnp.float32) for part in parts[:2]), *parts[2:])
    _, expected = jax.jit(differentiated(naive, 0))(*exact_parts)
    for gradient, other in zip(gradients, expected, strict=True):
        assert gradient.dtype == jnp.bfloat16
        assert relative(gradient, other) < 0.01


# --- what it costs ---


def largest_value(program: Callable[..., Any], *parts: Any) -> int:
    """Elements of the largest array that the program computes."""
    jaxpr = jax.make_jaxpr(program)(*parts)
    return max(out.aval.size for eq in equations(jaxpr) for out in eq.outvars)


def n_products(program: Callable[..., Any], *parts: Any) -> int:
    jaxpr = jax.make_jaxpr(program)(*parts)
    return sum(equation.primitive.name == "dot_general" for equation in equations(jaxpr))


def test_the_logits_of_all_tokens_are_never_held_together() -> None:
    parts = draw("float32")
    assert largest_value(differentiated(naive, 0), *parts) == T * V
    assert largest_value(differentiated(cross_entropy, 8), *parts) == 8 * V
    assert largest_value(lambda *parts: cross_entropy(*parts, 8), *parts) == 8 * V


def test_no_logit_is_computed_twice() -> None:
    parts = draw("float32")
    assert n_products(differentiated(cross_entropy, 8), *parts) == 3
    assert n_products(lambda *parts: cross_entropy(*parts, 8), *parts) == 1


def test_memory_grows_with_the_chunk_and_not_with_the_text() -> None:
    def temporary(loss: Loss, n_tokens: int) -> int:
        shapes = [(n_tokens, 8), (4096, 8), (n_tokens,), (n_tokens,)]
        types = [jnp.float32, jnp.float32, jnp.int32, jnp.float32]
        parts = [jax.ShapeDtypeStruct(*part) for part in zip(shapes, types, strict=True)]
        compiled = jax.jit(differentiated(loss, 32)).lower(*parts).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    logits = 4 * 1024 * 4096
    assert temporary(naive, 1024) >= logits
    assert temporary(cross_entropy, 1024) < logits / 8
    assert temporary(cross_entropy, 2048) < 1.2 * temporary(cross_entropy, 1024)
