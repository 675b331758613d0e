"""Products in the form that a CPU is fast at: the same numbers, and no copy of the kernel."""

import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike

from lechat_jax.ops import matmul
from lechat_jax.ops.matmul import FEW, FEW_INTEGERS, as_bits, from_bits, project

F, D = 96, 56


def kernel_of(dtype: DTypeLike) -> jax.Array:
    kernel = jax.random.normal(jax.random.key(1), (F, D))
    if dtype == "int8":
        return jnp.round(20 * kernel).astype(jnp.int8)
    return kernel.astype("bfloat16" if dtype == "bits" else dtype)


@pytest.mark.parametrize("block", [300, 1 << 20])  # of one kernel or a few rows
@pytest.mark.parametrize("T", [1, 2, 8, FEW, FEW + 1, 200])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bits", "int8"])
def test_every_form_is_the_product(
    monkeypatch: pytest.MonkeyPatch, T: int, dtype: str, block: int
) -> None:
    monkeypatch.setattr(matmul, "BLOCK", block)
    kernel, scale = kernel_of(dtype), jnp.linspace(0.01, 0.02, F) if dtype == "int8" else None
    x = jax.random.normal(jax.random.key(2), (T, D))
    x = x.astype(jnp.bfloat16 if dtype in ("bfloat16", "bits") else jnp.float32)
    wide = [np.asarray(array, np.float64) for array in (x, kernel)]
    exact = wide[0] @ wide[1].T * (1 if scale is None else np.asarray(scale))
    size = np.sqrt(np.mean(exact**2))
    (asked,) = as_bits({"head.kernel": kernel}, 2).values() if dtype == "bits" else (kernel,)
    for result in ("float32", x.dtype):
        found = project(x, asked, scale, jnp.dtype(result))
        assert found.dtype == result
        budget = 1e-2 if found.dtype == jnp.bfloat16 else 1e-6
        assert np.max(np.abs(np.asarray(found, np.float64) - exact)) < budget * 4 * size


@pytest.mark.parametrize("T", [1, FEW_INTEGERS])
def test_integers_are_as_fine_as_float32_at_the_largest_number(
    monkeypatch: pytest.MonkeyPatch, T: int
) -> None:
    """Whatever its size, with outliers in a position, and beside positions of other sizes."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")  # where they are used
    kernel = kernel_of("int8")
    sizes = 10.0 ** jnp.linspace(-30, 30, T)
    x = jax.random.t(jax.random.key(3), 2.0, (T, D)) * sizes[:, None]
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
    largest = np.max(np.abs(np.asarray(x, np.float64)), axis=1, keepdims=True)
    step = 2.0**-23 * largest * np.sum(np.abs(np.asarray(kernel, np.float64)), axis=1)
    found = project(x, kernel, jnp.ones(F))
    assert np.all(np.abs(np.asarray(found, np.float64) - exact) < step)
    alone = [project(row[None], kernel, jnp.ones(F))[0] for row in x]
    np.testing.assert_array_equal(found, alone, "integers are added up exactly in any order")


@pytest.mark.parametrize("number", [0.0, np.nan, np.inf])
def test_integers_stand_for_every_number(monkeypatch: pytest.MonkeyPatch, number: float) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    x = jnp.zeros((2, D)).at[0, 5].set(number)
    found = project(x, kernel_of("int8"), jnp.ones(F))
    np.testing.assert_array_equal(found[1], np.zeros(F))
    assert np.all(np.isfinite(found[0])) == np.isfinite(number)


def test_bits_are_those_of_the_kernels_and_share_their_memory() -> None:
    kernel, scale = kernel_of("bfloat16"), jnp.ones(F, jnp.bfloat16)
    weights = {"head.kernel": kernel, "norm.scale": scale, "embed.kernel": kernel_of("int8")}
    bits = as_bits(weights, 2)
    assert [leaf.dtype for leaf in bits.values()] == ["uint16", "bfloat16", "int8"]
    assert bits["head.kernel"].unsafe_buffer_pointer() == kernel.unsafe_buffer_pointer()
    np.testing.assert_array_equal(from_bits(bits["head.kernel"]), kernel)
    described = as_bits({"head.kernel": jax.ShapeDtypeStruct((F, D), jnp.bfloat16)}, 2)
    assert described == {"head.kernel": jax.ShapeDtypeStruct((F, D), jnp.uint16)}


@pytest.mark.parametrize("T", [1, 8, FEW + 1])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_loop_does_not_convert_the_kernel_beforehand(T: int, dtype: str) -> None:
    """Nor between all the layers of a prompt: the scratch is far below the kernels in float32."""
    kernel = jax.ShapeDtypeStruct((1024, 2048), dtype)
    kernels = [*as_bits({"head.kernel": kernel}, T).values()] * 8
    scale = jax.ShapeDtypeStruct((1024,), "float32") if dtype == "int8" else None
    x = jax.ShapeDtypeStruct((T, 2048), "float32" if dtype == "int8" else "bfloat16")

    def once(x: jax.Array, kernels: list[jax.Array], scale: jax.Array | None) -> jax.Array:
        for kernel in kernels:
            x = jnp.sin(jnp.tile(project(x, kernel, scale), 2))
        return x

    def loop(x: jax.Array, kernels: list[jax.Array], scale: jax.Array | None, n: int) -> jax.Array:
        return jax.lax.fori_loop(0, n, lambda _, x: once(x, kernels, scale), x)

    for program, more in ((once, ()), (loop, (9,))):
        memory = jax.jit(program).lower(x, kernels, scale, *more).compile().memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < 2 * 4 * 1024 * 2048  # of 8 kernels


def test_the_gradient_is_that_of_the_product() -> None:
    kernel, x = kernel_of("float32"), jax.random.normal(jax.random.key(2), (5, D))
    ours = jax.grad(lambda kernel, x: jnp.sum(jnp.sin(project(x, kernel))), (0, 1))(kernel, x)
    plain = jax.grad(lambda kernel, x: jnp.sum(jnp.sin(x @ kernel.T)), (0, 1))(kernel, x)
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_in_float64_an_int8_kernel_is_exact(x64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of float64 are never rounded to integers of three bytes."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    kernel, scale = kernel_of("int8"), jnp.linspace(0.01, 0.02, F, dtype=jnp.float64)
    for T in (1, 3, FEW + 1):
        x = jax.random.normal(jax.random.key(2), (T, D), jnp.float64)
        exact = np.asarray(x) @ np.asarray(kernel, np.float64).T * np.asarray(scale)
        np.testing.assert_allclose(project(x, kernel, scale), exact, rtol=0, atol=1e-13)


def test_more_products_than_an_integer_can_hold_are_not_added_up_in_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the largest bytes 132,105 products are less than 2**31 and 140,000 are more."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    kernel = jnp.full((2, 140_000), 127, jnp.int8)
    found = project(jnp.ones((1, 140_000)), kernel, jnp.ones(2))
    np.testing.assert_allclose(found, 140_000 * 127.0, rtol=1e-5)
    assert 128 * 127 * matmul.MOST_INTEGERS < 2**31
