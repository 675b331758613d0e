"""Activation checkpointing (rematerialization): what a layer keeps for its backward pass.

It trades compute for memory. Numbers that a layer of `lechat-15m` keeps per token in a row of
128, with D = 192:

    none   5372   everything
    dots   2016   its input, and the matmuls with weights q k v o gate up; the rest is cheap
    full    192   its input; a second forward pass, which makes 4/3 of the work

A step of 4,096 tokens then needs 0.66, 0.29 or 0.15 GB beside parameters, optimiser and gradients:
`python -m lechat_jax.train --batch 16 --block 256 --remat full --dry-run`.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
from jaxtyping import PyTree

from lechat_jax.devices.platform import platform
from lechat_jax.errors import BadInput

Remat = Literal["none", "dots", "full"]
Layer = Callable[..., Any]

POLICIES: dict[str, Callable[..., bool] | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,  # JAX's own default keeps nothing
}


# XLA for a CPU merges what is made again with what was made before, and orders its work for
# speed and not for memory, unless it is told otherwise.
KEPT_ON_A_CPU = {
    "xla_disable_hlo_passes": "cse_barrier_expander,cse",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}


def in_one_body(layers: Sequence[PyTree]) -> bool:
    """Whether layers are better compiled as the body of one loop (`scan`) than written out.

    Compiling then takes the time of one layer, of which an accelerator's compiler takes long.
    Their weights are copied into a stack for it: a CPU, which compiles fast, and devices of a
    mesh, which have little room beside what they gather, write the layers out. So are layers
    whose weights differ in form.
    """
    if len(layers) < 2 or platform() == "cpu" or not jax.sharding.get_abstract_mesh().empty:
        return False
    forms = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), layer) for layer in layers]
    return all(form == forms[0] for form in forms)


def recomputing(layer: Layer, name: str) -> Layer:
    """Activation checkpointing (`jax.checkpoint`) of a layer by a policy: `none`, `dots`, `full`.

    All its gradients are computed before the backward pass of the layer below. XLA might defer
    those of the weights, and keep all their operands until then.

    Raises:
        BadInput: there is no policy of that name.
    """
    if name not in get_args(Remat):
        raise BadInput(f"unknown remat {name!r}; choose one of {', '.join(get_args(Remat))}")
    if name == "none":
        return layer
    again = jax.checkpoint(layer, policy=POLICIES[name])
    return lambda *arguments: again(*_at_once(arguments))


@jax.custom_vjp
def _at_once(arguments: PyTree) -> PyTree:
    """Identity whose gradients are used only once all are computed (optimization barrier)."""
    return arguments


def _backward(_: None, slopes: PyTree) -> tuple[PyTree]:
    leaves, tree = jax.tree.flatten(slopes)
    has_slope = [leaf.dtype != jax.dtypes.float0 for leaf in leaves]  # int8 kernels have none
    made = iter(jax.lax.optimization_barrier(list(itertools.compress(leaves, has_slope))))
    return (
        tree.unflatten(
            [next(made) if has else leaf for has, leaf in zip(has_slope, leaves, strict=True)]
        ),
    )


_at_once.defvjp(lambda arguments: (arguments, None), _backward)
