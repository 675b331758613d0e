"""The layers that a block and the model are made of: RMSNorm, linear maps, the embedding."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from lechat_jax.config import MistralConfig
from lechat_jax.model.lora import Adapter
from lechat_jax.ops.matmul import from_bits, project
from lechat_jax.ops.matmul_int4 import project_int4


class RMSNorm(nnx.Module):
    """x / rms(x) * scale (Zhang & Sennrich 2019, arXiv:1910.07467).

    Normalised in at least float32 and rounded before the product with the scale, in the
    order of both PyTorch references. That product is exact in float32, so rounding it is
    what bfloat16 would have made of it; but the gradient of the scale, a sum over all
    positions, is then summed in float32, where XLA would take bfloat16 (measured: wrong by
    1.3 % after 4,096 positions instead of 0.2 %).
    """

    def __init__(self, dim: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones(dim))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """The same shape and dtype, with a root mean square of `scale`."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        rounded = (wide * jax.lax.rsqrt(mean_square + self.eps)).astype(x.dtype)
        scale = self.scale[...].astype(wide.dtype)
        return (rounded.astype(wide.dtype) * scale).astype(x.dtype)


class Linear(nnx.Module):
    """A linear map without bias, whose kernel has the axes it writes and then those it reads.

    All positions and all axes are flattened to one matrix product. The gradient of a
    product with batch axes writes transposed copies of its operands on a CPU, which costs
    a feed-forward layer 1.6 times its time.
    """

    def __init__(
        self, writes: tuple[int, ...], reads: tuple[int, ...], std: float, *, rngs: nnx.Rngs
    ) -> None:
        self.writes, self.reads = writes, reads
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (*writes, *reads)))
        self.kernel_scale: nnx.Param | None = None
        self.kernel_zero: nnx.Param | None = None
        self.kernel_order: nnx.Param | None = None
        self.lora: Adapter | None = None

    def __call__(self, x: Array) -> Array:
        """`x` [..., *reads] mapped to [..., *writes]."""
        positions = x.shape[: x.ndim - len(self.reads)]
        flat = x.reshape(-1, math.prod(self.reads))
        y = self._product(flat)
        if self.lora is not None:
            y = y + self.lora(flat)
        return y.reshape(*positions, *self.writes)

    def _product(self, x: Float[Array, "T D"]) -> Float[Array, "T F"]:
        """The kernel's own product, in whichever form it is: floats, int8 or int4."""
        F = math.prod(self.writes)
        matrix = self.kernel[...].reshape(F, -1)
        if self.kernel_scale is None:
            return project(x, matrix)
        scale = self.kernel_scale[...]
        if self.kernel_zero is None:
            return project(x, matrix, scale.reshape(F))
        zero = self.kernel_zero[...].reshape(F, -1)
        if self.kernel_order is not None:
            x = x[:, self.kernel_order[...]]
        return project_int4(x, matrix, scale.reshape(F, -1), zero)


class Embedding(nnx.Module):
    """One vector of width D for each token id: the embedding, and the head.

    Attributes:
        dtype: of the rows of an int8 table, which have none of their own.
    """

    dtype: str = "float32"

    def __init__(self, config: MistralConfig, std: float, *, rngs: nnx.Rngs) -> None:
        self.writes = (config.vocab_size,)
        shape = (config.vocab_size, config.dim)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape))
        self.kernel_scale: nnx.Param | None = None

    def rows(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The vectors of these ids."""
        if self.kernel_scale is not None:
            scale = self.kernel_scale[...][tokens][..., None]
            return (self.kernel[...][tokens] * scale).astype(self.dtype)
        return from_bits(_looked_up(self.kernel[...], tokens))

    def matrix(self) -> Float[Array, "V D"]:
        """All vectors; those of an int8 table are made, and are whole in memory."""
        if self.kernel_scale is None:
            return self.kernel[...]
        return (self.kernel[...] * self.kernel_scale[...][:, None]).astype(self.dtype)

    def scores(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The product with every vector, at least float32."""
        kernel = self.kernel[...]
        scale = None if self.kernel_scale is None else self.kernel_scale[...]
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        flat = hidden.reshape(-1, kernel.shape[1])
        return project(flat, kernel, scale, wide).reshape(*hidden.shape[:-1], kernel.shape[0])


@jax.custom_vjp
def _looked_up(kernel: Shaped[Array, "V D"], tokens: Int[Array, "B T"]) -> Shaped[Array, "B T D"]:
    """`kernel[tokens]`, whose gradient is added up in at least float32 and rounded once.

    A token may come thousands of times in a batch, and a sum in bfloat16 stops to grow when it
    has some hundred terms.
    """
    return kernel[tokens]


def _slope_of_table(kept: tuple[Array, Array], dy: Float[Array, "B T D"]) -> tuple[Array, None]:
    kernel, tokens = kept
    wide = jnp.promote_types(dy.dtype, jnp.float32)
    total = jnp.zeros(kernel.shape, wide).at[tokens].add(dy.astype(wide))
    return total.astype(kernel.dtype), None


_looked_up.defvjp(
    lambda kernel, tokens: (kernel[tokens], (kernel, tokens)),
    _slope_of_table,
)
