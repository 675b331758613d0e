"""The product of a kernel and the positions it maps, in the form that the device is fast at.

A decoded token reads every weight once, so what counts is how close to the memory's speed
that goes. On a CPU XLA's matrix product does not come near it: it repacks the kernel at each
call, and what is not float32 it first writes out as float32, all of it. Multiplied and summed
up instead, a kernel streams through as it is stored (two AVX-512 cores; times of a plain
float32 matrix-vector product, kernels of 3,584 x 1,024 to 4,096 x 14,336):

    positions          1       2       8      16      64     256
    product, float32   1.0-15  2.1-3.8 2.1-4.6 3.1-4.8 6.7-8.2 20-28
    sum, float32       0.9-1.3 1.1-1.3 1.0-1.4 1.4-2.2 4.7-5.6
    sum, int8          0.7-1.1 0.7-1.2 0.9-1.7 1.6-2.1 5.0-5.7
    sum, bfloat16      0.7-1.5 2.3-2.7 4.2-9.3 8-18    28-69
    product, bfloat16  1.2-11  12-13   10-15   11-16   16-19   27-40
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

FEW = 64  # positions up to which a CPU multiplies and sums
FEW_BFLOAT16 = 12  # it converts bfloat16 once for each position


def project(
    x: Float[Array, "T D"],
    kernel: Shaped[Array, "F D"],
    scale: Float[Array, "F"] | None = None,
    dtype: DTypeLike | None = None,
) -> Float[Array, "T F"]:
    """`x` times the transposed kernel; D and F stand for whatever it reads and writes.

    Products are added up in at least float32 and rounded once.

    Args:
        x: positions, in the type that is computed in.
        kernel: of the same type, or int8.
        scale: of each output of an int8 kernel.
        dtype: of the result; by default that of `x`.
    """
    dtype = x.dtype if dtype is None else dtype
    wide = jnp.promote_types(x.dtype, jnp.float32)
    on_cpu = jax.default_backend() == "cpu"
    few = FEW_BFLOAT16 if kernel.dtype == jnp.bfloat16 else FEW
    if on_cpu and x.shape[0] <= few and wide == jnp.float32:
        y = _multiply_and_sum(x, kernel)
    elif scale is None and jnp.dtype(dtype) == x.dtype:
        y = x @ kernel.T
    else:
        if scale is not None:  # every int8 is a bfloat16
            kernel = _here(kernel, x)[0].astype(wide if on_cpu else x.dtype)
        y = jnp.einsum("TD,FD->TF", x, kernel, preferred_element_type=wide)
    return (y if scale is None else y * scale).astype(dtype)


def _multiply_and_sum(x: Float[Array, "T D"], kernel: Shaped[Array, "F D"]) -> Float[Array, "T F"]:
    """The product as a sum over D, which XLA fuses with the conversion of the kernel."""
    is_float32 = kernel.dtype == jnp.float32
    kernel, x = _here(kernel, x)
    kernel, x = kernel.astype(jnp.float32), x.astype(jnp.float32)
    if x.shape[0] > 1:
        return jnp.sum(kernel[None] * x[:, None], axis=-1)
    if is_float32:  # a product with a vector is not repacked, and a tenth faster
        return (kernel @ x[0])[None]
    # With a leading axis of one, the sum would take eighty times as long.
    return jnp.sum(kernel * x, axis=-1)[None]


def _here(kernel: Shaped[Array, "F D"], x: Float[Array, "T D"]) -> tuple[Array, Array]:
    """The same arrays, and XLA does not move the conversion of the kernel from where it is.

    It would convert all kernels before a loop that only reads them: a float32 copy of the
    whole model.
    """
    return jax.lax.optimization_barrier((kernel, x))
