"""Layers of the decoder: RMSNorm, linear maps, the feed-forward, the embedding."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lechat_jax.config import MistralConfig, VisionConfig
from lechat_jax.ops.kernel_forms import as_form


class RMSNorm(nnx.Module):
    """RMSNorm: x / rms(x) * scale (Zhang & Sennrich 2019, arXiv:1910.07467).

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
        """Normalises each position; same shape and dtype."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        rounded = (wide * jax.lax.rsqrt(mean_square + self.eps)).astype(x.dtype)
        scale = self.scale[...].astype(wide.dtype)
        return (rounded.astype(wide.dtype) * scale).astype(x.dtype)


class Linear(nnx.Module):
    """Linear map, usually without a bias; its kernel has the output axes first, then the inputs'.

    All positions and all axes are flattened to one matrix product. The gradient of a
    product with batch axes writes transposed copies of its operands on a CPU, which costs
    a feed-forward layer 1.6 times its time.
    """

    def __init__(
        self,
        writes: tuple[int, ...],
        reads: tuple[int, ...],
        std: float,
        *,
        has_bias: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.writes, self.reads, self.has_bias = writes, reads, has_bias
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (*writes, *reads)))
        if has_bias:
            self.bias = nnx.Param(jnp.zeros(writes))

    def __call__(self, x: Array) -> Array:
        """`x` [..., *reads] mapped to [..., *writes]."""
        positions = x.shape[: x.ndim - len(self.reads)]
        flat = x.reshape(-1, math.prod(self.reads))
        y = as_form(self.kernel.get_value()).matmul(flat).reshape(*positions, *self.writes)
        return y + self.bias[...] if self.has_bias else y


class MLP(nnx.Module):
    """SwiGLU feed-forward (Shazeer 2020, arXiv:2002.05202): down(silu(gate x) * up x).

    The activation is at least float32 and rounded once, as PyTorch's is. In bfloat16 its
    derivative, the sum of two products, would be rounded at every step.
    """

    def __init__(self, config: MistralConfig | VisionConfig, width: int, *, rngs: nnx.Rngs) -> None:
        D = config.dim
        self.gate = Linear((width,), (D,), D**-0.5, rngs=rngs)
        self.up = Linear((width,), (D,), D**-0.5, rngs=rngs)
        self.down = Linear((D,), (width,), (width * 2 * config.n_layers) ** -0.5, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], None]:
        """Feed-forward of each position; without experts there is no load."""
        gate = self.gate(x)
        wide = gate.astype(jnp.promote_types(gate.dtype, jnp.float32))
        return self.down(jax.nn.silu(wide).astype(gate.dtype) * self.up(x)), None


class Embedding(nnx.Module):
    """Token embedding and output head: one vector of width D for each token id.

    Attributes:
        dtype: of the rows of an int8 table, which have none of their own.
    """

    dtype: str = "float32"

    def __init__(self, config: MistralConfig, std: float, *, rngs: nnx.Rngs) -> None:
        shape = (config.vocab_size, config.dim)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape))

    def rows(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks up the vectors of these ids."""
        return as_form(self.kernel.get_value()).lookup(tokens, self.dtype)

    def matrix(self) -> Float[Array, "V D"]:
        """The table of all vectors; an int8 one is dequantised, whole, in memory."""
        return as_form(self.kernel.get_value()).floats(self.dtype)

    def scores(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits: the product with every vector, at least float32."""
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        flat = hidden.reshape(-1, hidden.shape[-1])
        y = as_form(self.kernel.get_value()).matmul(flat, wide)
        return y.reshape(*hidden.shape[:-1], y.shape[1])
