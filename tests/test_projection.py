"""Products in the form that a CPU is fast at: the same numbers, and no copy of the kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike

from lechat_jax.projection import FEW, project

F, D = 96, 56


def kernel_of(dtype: DTypeLike) -> jax.Array:
    kernel = jax.random.normal(jax.random.key(1), (F, D))
    return jnp.round(20 * kernel).astype(jnp.int8) if dtype == "int8" else kernel.astype(dtype)


@pytest.mark.parametrize("T", [1, 2, 8, FEW, FEW + 1, 200])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_form_is_the_product(T: int, dtype: str) -> None:
    kernel, scale = kernel_of(dtype), jnp.linspace(0.01, 0.02, F) if dtype == "int8" else None
    x = jax.random.normal(jax.random.key(2), (T, D)).astype(kernel.dtype if scale is None else "f4")
    wide = [np.asarray(array, np.float64) for array in (x, kernel)]
    exact = wide[0] @ wide[1].T * (1 if scale is None else np.asarray(scale))
    for result in ("float32", x.dtype):
        found = jax.jit(project, static_argnums=3)(x, kernel, scale, jnp.dtype(result))
        assert found.dtype == result
        size = np.sqrt(np.mean(exact**2))
        budget = 1e-2 if found.dtype == jnp.bfloat16 else 1e-6
        assert np.max(np.abs(np.float64(found) - exact)) < budget * 4 * size


@pytest.mark.parametrize("T", [1, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_loop_does_not_convert_the_kernel_beforehand(T: int, dtype: str) -> None:
    """The scratch of a loop is a few activations, far below the kernel in float32."""
    kernel = jax.ShapeDtypeStruct((1024, 1024), dtype)
    scale = jax.ShapeDtypeStruct((1024,), "float32") if dtype == "int8" else None
    x = jax.ShapeDtypeStruct((T, 1024), "float32" if dtype == "int8" else dtype)

    def loop(x: jax.Array, kernel: jax.Array, scale: jax.Array | None, n: int) -> jax.Array:
        return jax.lax.fori_loop(0, n, lambda _, x: jnp.sin(project(x, kernel, scale)), x)

    memory = jax.jit(loop).lower(x, kernel, scale, 9).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * 1024 * 1024 / 4


def test_the_gradient_is_that_of_the_product() -> None:
    kernel, x = kernel_of("float32"), jax.random.normal(jax.random.key(2), (5, D))
    ours = jax.grad(lambda kernel, x: jnp.sum(jnp.sin(project(x, kernel))), (0, 1))(kernel, x)
    plain = jax.grad(lambda kernel, x: jnp.sum(jnp.sin(x @ kernel.T)), (0, 1))(kernel, x)
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
