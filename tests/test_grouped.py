"""The product by groups, in each of its forms, against one product after the other in NumPy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jaxtyping import Array

from lechat_jax import grouped as module
from lechat_jax.grouped import grouped

E, F, D = 5, 24, 7
SIZES = {40: [11, 0, 17, 9, 0], 6: [0, 3, 0, 2, 1]}  # the first leaves three rows to nobody


@pytest.fixture(params=["whole", "blocks", "ragged"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """The form, made small enough that each of its loops turns more than once."""
    monkeypatch.setattr(module, "TILE", 4)
    if request.param == "blocks":
        monkeypatch.setattr(module, "BLOCK", 10 * D)  # three blocks, of which the last overlaps
    if request.param == "ragged":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    return jax.jit(lambda *args: grouped(*args))


@pytest.mark.parametrize("A", SIZES)
def test_each_row_meets_the_kernel_of_its_group(A: int, product: Callable, x64: None) -> None:
    draw = np.random.default_rng(A).standard_normal
    rows, kernel, dy = draw((A, D)), draw((E, F, D)), draw((A, F))
    sizes = jnp.array(SIZES[A])
    group = np.repeat(np.arange(E), SIZES[A])
    n = len(group)

    def scored(rows: Array, kernel: Array) -> Array:
        return jnp.sum(product(rows, kernel, sizes)[:n] * dy[:n])

    y = product(rows, kernel, sizes)
    d_rows, d_kernel = jax.jit(jax.grad(scored, (0, 1)))(rows, kernel)
    expected = np.stack([kernel[e] @ row for e, row in zip(group, rows, strict=False)])
    np.testing.assert_allclose(y[:n], expected, atol=1e-13)
    expected = np.stack([slope @ kernel[e] for e, slope in zip(group, dy, strict=False)])
    np.testing.assert_allclose(d_rows[:n], expected, atol=1e-13)
    assert not np.any(d_rows[n:])
    outer = np.zeros_like(kernel)
    for e, slope, row in zip(group, dy, rows, strict=False):
        outer[e] += np.outer(slope, row)
    np.testing.assert_allclose(d_kernel, outer, atol=1e-13)


@pytest.mark.parametrize("A", SIZES)
def test_int8_and_the_bits_of_bfloat16_are_their_numbers(A: int, product: Callable) -> None:
    draw = np.random.default_rng(A)
    rows = draw.standard_normal((A, D)).astype(np.float32)
    sizes, n = jnp.array(SIZES[A]), sum(SIZES[A])
    q = draw.integers(-127, 128, (E, F, D)).astype(np.int8)
    scale = draw.uniform(0.5, 2, (E, F)).astype(np.float32)
    wide = q.astype(np.float32) * scale[..., None]
    expected = np.asarray(product(rows, wide, sizes))[:n]
    found = product(rows, q, sizes, scale)[:n]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    if jax.default_backend() == "cpu":  # bits are for no other device
        kernel = wide.astype(ml_dtypes.bfloat16)
        expected = np.asarray(product(rows, kernel.astype(np.float32), sizes))[:n]
        found = product(rows, kernel.view(np.uint16), sizes)[:n]
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
