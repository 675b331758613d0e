"""Matmul of positions and a kernel (matrix-vector in decoding), in the device's fastest form.

Decoding reads every weight once per token, so it is bound by memory bandwidth. On a CPU XLA's
matrix product is far from that: it repacks the kernel at each call, and first converts other
types to float32, often all kernels at once. So few positions are multiplied and summed instead,
which XLA fuses into one pass over a float32 kernel as stored; an int8 kernel is multiplied in
integers, where XLA is fast at that; and otherwise a bfloat16 or int8 kernel is converted a block
at a time, which stays in the cache. Milliseconds for twelve kernels of 3,584 x 1,024 and one of
32,000 x 1,024, two AVX-512 cores, with jax 0.10.2 and 0.12.0:

    positions            1            4            8            64           256
    float32, product     7.6 / 40     -            21 / 21      66 / 65      -
    float32, sum         9.2 / 7.2    -            11 / 13      76 / 51      -
    int8, sum            9.0 / 6.3    10 / 65      11 / 52      78 / 89      -
    int8, blocks         5.4 / 9.3    7.8 / 10     10 / 10      55 / 56      226 / 231
    int8, integers       6.0 / 5.4    11 / 7.5     17 / 10      97 / 47      395 / 183
    bfloat16, sum        8.4 / 8.2    -            51 / 51      -            -
    bfloat16, blocks     6.9 / 12     -            12 / 12      57 / 57      -

Blocks take two to eight times as long while other processes use the cache; the other forms do
not.

A bfloat16 kernel that is read in blocks is passed as its bits, in uint16: otherwise XLA moves the
conversion before the slice, and converts the complete kernel.
"""

import functools
from collections.abc import Callable, Mapping
from platform import machine
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Int32, Shaped

from lechat_jax.config.layout import is_expert, is_matrix
from lechat_jax.devices.platform import platform

FEW = 64  # positions up to which a CPU multiplies and sums
BLOCK = 2 << 20  # numbers of a kernel that are float32 at once, 8 MB
# jax 0.12 is faster than the ones before at integers and at the sum of one position and a bfloat16
# kernel, which it does not convert beforehand; and many times as slow at other sums of int8.
IS_NEW = jax.__version_info__ >= (0, 12)
FEW_INTEGERS = FEW if IS_NEW else 4  # positions for which they are best
SUMMED = {"float32", "bfloat16"} | (set() if IS_NEW else {"int8"})
MOST_INTEGERS = 2**31 // 2**14 - 1  # products of two bytes that int32 can add up

Kernel = TypeVar("Kernel")  # an array, or several

# Of positions [T, D] and a kernel [F, D], in at least float32.
Product = Callable[[Array, Array], Array]


def project(
    x: Float[Array, "T D"],
    kernel: Shaped[Array, "F D"],
    scale: Float[Array, "F"] | None = None,
    dtype: DTypeLike | None = None,
) -> Float[Array, "T F"]:
    """Linear layer: `x` times the transposed kernel; D and F are its input and output features.

    Products are accumulated in at least float32 and rounded once. An int8 kernel and its scale
    have no gradient, only `x` has.

    Args:
        x: positions, in the compute dtype.
        kernel: weights in the same dtype, bfloat16 as bits (uint16), or int8.
        scale: scale of each output of an int8 kernel.
        dtype: dtype of the result; by default that of `x`.
    """
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    if scale is None:
        return _project(x, kernel, None, dtype)
    return _project_int8(x, kernel, scale, dtype, x.dtype)


def _project(
    x: Float[Array, "T D"],
    kernel: Shaped[Array, "F D"],
    scale: Float[Array, "F"] | None,
    dtype: np.dtype,
) -> Float[Array, "T F"]:
    if form := _cpu_form(x, kernel) if is_on_cpu() else None:
        y = form(x, kernel)
    elif scale is None and dtype == x.dtype:
        y = x @ kernel.T
    else:  # every int8 is a bfloat16
        kernel = kernel if scale is None else here(kernel, x)[0].astype(x.dtype)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        y = jnp.einsum("TD,FD->TF", x, kernel, preferred_element_type=wide)
    return (y if scale is None else y * scale).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _project_int8(
    x: Array, kernel: Array, scale: Array, dtype: np.dtype, x_dtype: np.dtype
) -> Array:
    """`project` for int8, with its own gradient: JAX's would keep the kernel as float32."""
    return _project(x, kernel, scale, dtype)


def _forward(
    x: Array, kernel: Array, scale: Array, dtype: np.dtype, x_dtype: np.dtype
) -> tuple[Array, tuple[Array, Array]]:
    return _project(x, kernel, scale, dtype), (kernel, scale)


def _backward(
    dtype: np.dtype, x_dtype: np.dtype, kept: tuple[Array, Array], dy: Float[Array, "T F"]
) -> tuple[Array, None, None]:
    """Gradient of `x`; kernels are dequantized one at a time."""
    kernel, scale = kept
    dy = (dy * scale).astype(x_dtype)
    kernel = here(kernel, dy)[0].astype(x_dtype)
    wide = jnp.promote_types(x_dtype, jnp.float32)
    dx = jnp.einsum("TF,FD->TD", dy, kernel, preferred_element_type=wide)
    return dx.astype(x_dtype), None, None


_project_int8.defvjp(_forward, _backward)


def as_bits(
    weights: Mapping[str, Array] | Mapping[str, jax.ShapeDtypeStruct], positions: int
) -> dict[str, Any]:
    """Weights for decoding: on a CPU, bfloat16 kernels are viewed as their bits (uint16).

    They share memory with the weights given. For single positions new versions of JAX take
    bfloat16 kernels as stored, but for those of experts, which are sliced from a stack.
    """
    if not is_on_cpu():
        return dict(weights)
    as_they_are = IS_NEW and positions == 1
    return {
        name: leaf if as_they_are and not is_expert(name) else _bits(name, leaf)
        for name, leaf in weights.items()
    }


def from_bits(rows: Shaped[Array, "*B D"]) -> Float[Array, "*B D"]:
    """The bfloat16 numbers of bits (uint16); other arrays as they are."""
    return jax.lax.bitcast_convert_type(rows, jnp.bfloat16) if rows.dtype == jnp.uint16 else rows


def is_on_cpu() -> bool:
    """Whether matmuls run on a CPU."""
    return platform() == "cpu"


def _bits(name: str, leaf: Array | jax.ShapeDtypeStruct) -> Array | jax.ShapeDtypeStruct:
    if leaf.dtype != jnp.bfloat16 or not is_matrix(name):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.uint16, sharding=leaf.sharding)
    return jax.device_put(np.asarray(leaf).view(np.uint16), leaf.sharding)


def _cpu_form(x: Float[Array, "T D"], kernel: Shaped[Array, "F D"]) -> Product | None:
    """The fastest form of the matmul for these positions on a CPU; `None` is XLA's own."""
    if kernel.dtype == jnp.int8 and _may_be_of_integers(x):
        return _of_integers
    if kernel.dtype.name in SUMMED and len(x) <= FEW:
        return _sum
    is_narrow = kernel.dtype in (jnp.int8, jnp.uint16)
    return _in_blocks if is_narrow else None


def _may_be_of_integers(x: Float[Array, "T D"]) -> bool:
    is_fast = machine() in ("x86_64", "AMD64")  # elsewhere XLA may have no such product
    is_exact = x.dtype != jnp.float64 and x.shape[1] <= MOST_INTEGERS
    return is_fast and is_exact and len(x) <= FEW_INTEGERS


def _of_integers(x: Float[Array, "T D"], kernel: Int8[Array, "F D"]) -> Float[Array, "T F"]:
    """Int8 matmul in integer arithmetic, exact in any order of summation.

    Activations of a position are rounded to steps of its absmax / (127 * 2**16), which is 1.2e-7
    of it, as is float32's own step there. So each is an integer of three bytes.
    """
    wide = x.astype(jnp.float32)
    # No division of all by one number, which XLA does in another way for one position alone.
    step = jnp.max(jnp.abs(wide), axis=1, keepdims=True) * (1 / (127 << 16))
    number = jnp.round(wide * (1 / jnp.where(step > 0, step, 1))).astype(jnp.int32)
    low, number = _last_byte(number)
    middle, high = _last_byte(number)
    kernel, columns = here(kernel, jnp.concatenate([high, middle, low]).astype(jnp.int8))
    dims = (((1,), (1,)), ((), ()))
    sums = jax.lax.dot_general(columns, kernel, dims, preferred_element_type=jnp.int32)
    high, middle, low = jnp.split(sums.astype(jnp.float32), 3)
    return (high * (1 << 16) + middle * (1 << 8) + low) * step


def _last_byte(number: Int32[Array, "T D"]) -> tuple[Int32[Array, "T D"], Int32[Array, "T D"]]:
    """Splits off the last byte, as a number from -128 to 127, from the rest."""
    last = (number << 24) >> 24
    return last, (number - last) >> 8


def _in_blocks(x: Float[Array, "T D"], kernel: Shaped[Array, "F D"]) -> Float[Array, "T F"]:
    """Matmul by blocks of the kernel's rows; the last block may overlap the one before."""
    F, D = kernel.shape
    rows = max(1, min(BLOCK // D, F // 2))
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def with_block(i: Array, y: Float[Array, "F T"]) -> Float[Array, "F T"]:
        start = jnp.minimum(i * rows, F - rows)
        few = jax.lax.dynamic_slice_in_dim(kernel, start, rows)
        made = _product(x, widened(few, x.dtype))
        return jax.lax.dynamic_update_slice_in_dim(y, made.T, start, axis=0)

    return jax.lax.fori_loop(0, -(-F // rows), with_block, zeros_after(x, (F, len(x)), x.dtype)).T


def zeros_after(x: Float[Array, "T D"], shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Zeros for a loop to overwrite, allocated when `x` is computed and not before.

    XLA would allocate plain zeros for the loops of all layers at the start of a program: 0.35 GB
    for 512 positions of a model of 0.28 billion weights.
    """
    return jnp.full(shape, x[0, 0] > jnp.inf, dtype)


def widened(block: Shaped[Array, "F D"], dtype: DTypeLike) -> Float[Array, "F D"]:
    """Converts a block, possibly the bits of bfloat16, to the dtype to multiply in."""
    if block.dtype == jnp.uint16:
        bits = block.astype(jnp.uint32) << 16
        block = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return block.astype(dtype)


def _product(x: Float[Array, "T D"], kernel: Float[Array, "F D"]) -> Float[Array, "T F"]:
    if x.shape[0] == 1:  # of a matrix and a vector, for which nothing is repacked
        return (kernel @ x[0])[None]
    return jnp.einsum("TD,FD->FT", x, kernel).T


def _sum(x: Float[Array, "T D"], kernel: Shaped[Array, "F D"]) -> Float[Array, "T F"]:
    """Matmul as a multiply and a sum over D, which XLA fuses with the conversion of the kernel."""
    kernel, x = here(kernel, x)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if x.shape[0] > 1:
        return jnp.sum(kernel.astype(wide)[None] * x.astype(wide)[:, None], axis=-1)
    if kernel.dtype == wide:  # a tenth faster
        return _product(x, kernel)
    # With a leading axis of one, the sum would take eighty times as long.
    return jnp.sum(kernel.astype(wide) * x.astype(wide), axis=-1)[None]


def here(kernel: Kernel, x: Array) -> tuple[Kernel, Array]:
    """Optimization barrier: keeps XLA from hoisting the conversion of a kernel out of a loop.

    Hoisted, all kernels would be converted before the decode loop: a float32 copy of the model.
    """
    return jax.lax.optimization_barrier((kernel, x))
