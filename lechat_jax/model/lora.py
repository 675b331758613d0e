"""LoRA: low-rank adapters that are trained beside a frozen kernel.

A map x -> W x becomes x -> W x + scale * B A x, with A [r, *reads], B [*writes, r] and a rank r
far below both widths (Hu et al. 2021, arXiv:2106.09685). B begins at zero, and with it the
adapter. The weights of a model with adapters have, for each map `<map>.kernel` that has one,
`<map>.lora.a`, `<map>.lora.b` and the number `<map>.lora.scale`, which is alpha / r.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lechat_jax.ops.kernel_forms import as_form
from lechat_jax.ops.matmul import project


class Adapted(NamedTuple):
    """Frozen kernel with a LoRA adapter, as one of the forms of `ops.kernel_forms`.

    Attributes:
        kernel: in whichever form; it does not learn.
        a: [r, *reads].
        b: [*writes, r].
        scale: alpha / r, in float32.
    """

    kernel: Any
    a: Float[Array, "..."]
    b: Float[Array, "..."]
    scale: Float[Array, ""]

    def floats(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """All numbers of kernel and adapter, rounded once."""
        kernel = as_form(self.kernel).floats(dtype)
        wide = jnp.promote_types(kernel.dtype, jnp.float32)
        low = jnp.tensordot(self.b.astype(wide), self.a.astype(wide) * self.scale, axes=1)
        return (kernel.astype(wide) + low).astype(kernel.dtype)

    def matmul(self, x: Float[Array, "T D"]) -> Float[Array, "T F"]:
        """Product of `x` with kernel and adapter, each rounded to the dtype of `x`.

        The latter is scaled before it is rounded, by a number of float32: rounded to bfloat16, a
        scale of 5/3 would be wrong by 0.2 % in all that the adapter does.
        """
        wide = jnp.promote_types(x.dtype, jnp.float32)
        y = as_form(self.kernel).matmul(x)
        low = project(x, self.a.reshape(len(self.a), -1), dtype=wide) * self.scale
        return y + project(low.astype(x.dtype), self.b.reshape(-1, self.b.shape[-1]))
