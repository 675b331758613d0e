"""Low-rank adapters: what is learned beside a kernel that stays as it is.

A map x -> W x becomes x -> W x + scale * B A x, with A [r, *reads], B [*writes, r] and a rank r
far below both widths (Hu et al. 2021, arXiv:2106.09685). B begins at zero, and with it the
adapter. The weights of a model with adapters have, for each map `<map>.kernel` that has one,
`<map>.lora.a`, `<map>.lora.b` and the number `<map>.lora.scale`, which is alpha / r.
"""

from collections.abc import Iterable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lechat_jax.config.layout import LORA_A, module_of, part_of
from lechat_jax.ops.matmul import project


class Adapter(nnx.Module):
    """The product with a matrix of low rank, in two steps."""

    def __init__(self, writes: tuple[int, ...], reads: tuple[int, ...], rank: int) -> None:
        self.a = nnx.Param(jnp.zeros((rank, *reads)))
        self.b = nnx.Param(jnp.zeros((*writes, rank)))
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T F"]:
        """What is to be added to the kernel's product with `x`, in the type of `x`.

        Scaled before it is rounded, by a number of float32: rounded to bfloat16, a scale of 5/3
        would be wrong by 0.2 % in all that the adapter does.
        """
        a, b = self.a[...], self.b[...]
        wide = jnp.promote_types(x.dtype, jnp.float32)
        low = project(x, a.reshape(a.shape[0], -1), dtype=wide) * self.scale[...]
        return project(low.astype(x.dtype), b.reshape(-1, b.shape[-1]))


def adapted(names: Iterable[str]) -> frozenset[str]:
    """The maps that have an adapter among weights of these names.

    >>> adapted(["norm.scale", "blocks.0.attn.q.kernel", "blocks.0.attn.q.lora.a"])
    frozenset({'blocks.0.attn.q'})
    """
    return frozenset(module_of(name) for name in names if part_of(name) == LORA_A)
