"""What a training step keeps of a layer for its backward pass, and what it makes again.

Memory is bought with time. Numbers that a layer of `lechat-15m` keeps of a token in a row of
128, out of D = 192:

    none   5372   everything
    dots   2016   its input, and the products with weights q k v o gate up; the rest is cheap
    full    192   its input; a second forward pass, which makes 4/3 of the work

That is what a GPU or TPU then holds. XLA for a CPU is free to begin the second pass at once,
and saves a tenth of the memory or so; a batch in parts (`StepOptions.accumulate`) saves more.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from lechat_jax.errors import BadInput

Remat = Literal["none", "dots", "full"]
Layer = Callable[..., Any]

POLICIES: dict[str, Callable[..., bool] | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,  # JAX's own default keeps nothing
}


def recomputing(layer: Layer, name: str) -> Layer:
    """The same function, of whose inner results the backward pass keeps what `name` says.

    Raises:
        BadInput: there is no policy of that name.
    """
    if name not in get_args(Remat):
        raise BadInput(f"unknown remat {name!r}; choose one of {', '.join(get_args(Remat))}")
    return layer if name == "none" else jax.checkpoint(layer, policy=POLICIES[name])
