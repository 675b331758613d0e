"""The product by groups, in each of its forms, against one product after the other in NumPy."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jaxtyping import Array

from lechat_jax.ops import grouped_matmul, grouped_matmul_cpu
from lechat_jax.ops.grouped_matmul import grouped
from lechat_jax.ops.kernel_forms import Dense, Ordered, PackedInt4, ScaledInt8

E, F, D = 5, 25, 8
# Rows in all, some of which may be nobody's, and those of each group.
CASES = {
    "even": (40, [11, 0, 17, 9, 0]),
    "uneven": (40, [0, 38, 0, 0, 0]),
    "fewer than a tile": (15, [4, 0, 7, 3, 0]),
    "few": (6, [0, 3, 0, 2, 1]),
}


@pytest.fixture(params=["whole", "blocks", "ragged", "alone"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """The form, made small enough that each of its loops turns more than once."""
    monkeypatch.setattr(grouped_matmul_cpu, "TILE", 16)
    monkeypatch.setattr(grouped_matmul_cpu, "SMALL", 4)
    if request.param == "blocks":
        monkeypatch.setattr(
            grouped_matmul_cpu, "BLOCK", 10 * D
        )  # three blocks, of which the last overlaps
    if request.param in ("ragged", "alone"):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    if request.param == "alone":  # with groups as few as here
        monkeypatch.setattr(grouped_matmul, "FEW", 0.5)
    return jax.jit(lambda *args: grouped(*args))


@pytest.mark.parametrize("case", CASES)
def test_each_row_meets_the_kernel_of_its_group(case: str, product: Callable, x64: None) -> None:
    A, counts = CASES[case]
    draw = np.random.default_rng(A).standard_normal
    rows, kernel, dy = draw((A, D)), draw((E, F, D)), draw((A, F))
    sizes = jnp.array(counts)
    group = np.repeat(np.arange(E), counts)
    n = len(group)

    def scored(rows: Array, kernel: Array) -> Array:
        return jnp.sum(product(rows, Dense(kernel), sizes)[:n] * dy[:n])

    y = product(rows, Dense(jnp.asarray(kernel)), sizes)
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


def in_int8() -> tuple[ScaledInt8, np.ndarray]:
    """A kernel, and the floats that they stand for."""
    draw = np.random.default_rng(1)
    q = draw.integers(-127, 128, (E, F, D)).astype(np.int8)
    scale = draw.uniform(0.5, 2, (E, F)).astype(np.float32)
    return ScaledInt8(jnp.asarray(q), jnp.asarray(scale)), q * scale[..., None]


def in_int4(is_ordered: bool) -> tuple[PackedInt4 | Ordered, np.ndarray]:
    """Likewise, worked out number by number; each kernel has its features in its own order."""
    draw = np.random.default_rng(2)
    q = draw.integers(0, 16, (E, F, D)).astype(np.uint8)
    scale = draw.uniform(0.5, 2, (E, F, 2)).astype(np.float32)
    zero = draw.integers(0, 17, (E, F, 2)).astype(np.uint8)
    order = np.stack([draw.permutation(D) if is_ordered else np.arange(D) for _ in range(E)])
    floats = np.zeros((E, F, D), np.float32)
    for e, f, d in np.ndindex(E, F, D):
        group = d // (D // 2)
        floats[e, f, order[e, d]] = (int(q[e, f, d]) - int(zero[e, f, group])) * scale[e, f, group]
    pairs = q[..., 0::2] + 16 * q[..., 1::2]
    kernel = PackedInt4(*map(jnp.asarray, (pairs, scale, zero)))
    return Ordered(kernel, jnp.asarray(order, jnp.int32)) if is_ordered else kernel, floats


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(  # what is in an order is int4 as well
    "form", ["int8", pytest.param("int4", marks=pytest.mark.slow), "int4 in an order"]
)
def test_quantised_kernels_are_the_floats_they_stand_for(
    form: str, case: str, product: Callable
) -> None:
    A, counts = CASES[case]
    kernels, floats = in_int8() if form == "int8" else in_int4(form == "int4 in an order")
    rows = np.random.default_rng(A).standard_normal((A, D)).astype(np.float32)
    sizes, n = jnp.array(counts), sum(counts)

    def scored(rows: Array, kernels: Any) -> tuple[Array, Array]:
        y = product(rows, kernels, sizes)[:n]
        return jnp.sum(y * y), y

    both = jax.jit(jax.grad(scored, has_aux=True))
    for found, expected in zip(
        both(rows, kernels), both(rows, Dense(jnp.asarray(floats))), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("product", ["whole", "blocks"], indirect=True)  # bits are for a CPU alone
def test_the_bits_of_bfloat16_are_its_numbers(case: str, product: Callable) -> None:
    A, counts = CASES[case]
    kernel = in_int8()[1].astype(ml_dtypes.bfloat16)
    rows = np.random.default_rng(A).standard_normal((A, D)).astype(np.float32)
    sizes, n = jnp.array(counts), sum(counts)
    expected = np.asarray(product(rows, Dense(jnp.asarray(kernel, jnp.float32)), sizes))[:n]
    found = product(rows, Dense(jnp.asarray(kernel.view(np.uint16))), sizes)[:n]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
