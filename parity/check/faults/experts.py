"""What ports of a mixture of experts get wrong, planted in a model that has one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lechat_jax.config import MistralConfig
from lechat_jax.model import moe
from lechat_jax.ops.grouped_matmul_cpu import group_of_each
from parity.check.faults.plant import Change, Weights, in_code, in_weights

BASE: dict[str, Any] = {"n_experts": 4, "n_experts_per_token": 2}


def has_experts(config: MistralConfig) -> bool:
    """Whether there are any to be wrong about, in all layers."""
    return config.n_experts > 0 and not config.n_dense_layers


KERNELS = ("gate", "up", "down")


def _expert(f: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Change:
    """The three stacks of a layer's experts, changed."""

    def change(_: MistralConfig, w: Weights, i: int) -> Weights:
        key = f"blocks.{i}.mlp.experts.{{}}.kernel"
        changed = f({name: w[key.format(name)].copy() for name in KERNELS})
        return {key.format(name): kernel for name, kernel in changed.items()}

    return change


def _swapped_in_one(kernels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    gate, up = kernels["gate"], kernels["up"]
    gate[1], up[1] = up[1].copy(), gate[1].copy()
    return {"gate": gate, "up": up}


def _last_two_downs(kernels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    *others, a, b = kernels["down"]
    return {"down": np.stack([*others, b, a])}


def shares_of_all(right: Callable) -> Callable:
    """The softmax over all experts is cut to the best, and not divided by their sum."""

    def call(self: moe.Router, x: Array) -> moe.Routing:
        routing = right(self, x)
        all_shares = jax.nn.softmax(x @ self.kernel[...].T)
        shares = jnp.take_along_axis(all_shares, routing.experts, axis=1)
        return routing._replace(shares=shares)

    return call


def _best_alone(right: Callable) -> Callable:
    """The best expert has all of the token."""

    def call(self: moe.Router, x: Array) -> moe.Routing:
        routing = right(self, x)
        return routing._replace(shares=jnp.ones_like(routing.shares).at[:, 1:].set(0))

    return call


def _dropping(right: Callable) -> Callable:
    """Of an expert's rows those beyond its fair part are dropped."""

    def grouped(rows: Array, kernels: Any, sizes: Array) -> Array:
        start = jnp.cumsum(sizes) - sizes
        place = jnp.arange(len(rows)) - start[group_of_each(len(rows), sizes)]
        kept = place < -(-len(rows) // len(sizes))
        return jnp.where(kept[:, None], right(rows, kernels, sizes), 0)

    return grouped


EXPERTS = (
    in_weights(
        "the experts come in another order than the router scores them",
        "mlp.1",
        _expert(lambda kernels: {name: np.roll(kernel, 1, 0) for name, kernel in kernels.items()}),
        layer=1,
        base=BASE,
        needs=has_experts,
    ),
    in_weights(
        "gate and up of one expert are swapped",
        "mlp.0",
        _expert(_swapped_in_one),
        base=BASE,
        needs=has_experts,
    ),
    in_weights(
        "two experts have each other's down map",
        "mlp.1",
        _expert(_last_two_downs),
        layer=1,
        base=BASE,
        needs=has_experts,
    ),
    in_code(
        "the shares of the chosen experts do not add up to one",
        "mlp.0",
        (moe.Router, "__call__", shares_of_all),
        base=BASE,
        needs=has_experts,
    ),
    in_code(
        "only the best expert is asked",
        "mlp.0",
        (moe.Router, "__call__", _best_alone),
        base=BASE,
        needs=has_experts,
    ),
    in_code(
        "an expert drops tokens beyond its fair part",
        "mlp.0",
        (moe, "grouped", _dropping),
        base=BASE,
        needs=has_experts,
    ),
)
