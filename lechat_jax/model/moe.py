"""Sparse mixture of experts (Mixtral, arXiv:2401.04088, section 2) in place of a feed-forward.

A router scores them for each token, the best few are applied, and what they make is added up
in shares that are the softmax of those scores. No token is dropped, whatever the others
choose, and no expert works on a token that has not chosen it.

That a softmax over all experts, cut to the best and divided by its sum, is the same as a
softmax over the best alone: exp(s) / sum(exp(all)) and exp(s) / sum(exp(best)) differ by a
factor that the division takes out. transformers does the one and Mistral the other.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lechat_jax.config import MistralConfig
from lechat_jax.devices.mesh import over_experts
from lechat_jax.model.layers import MLP
from lechat_jax.ops.grouped_matmul import grouped
from lechat_jax.ops.kernel_forms import as_form
from lechat_jax.ops.matmul import from_bits


class Load(NamedTuple):
    """Expert load: how tokens were spread over the experts; loads of layers or texts add up.

    Attributes:
        chosen: tokens that chose an expert.
        share: of the softmax over all experts, the sum over tokens.
        tokens: how many there were.
    """

    chosen: Float[Array, " E"]
    share: Float[Array, " E"]
    tokens: Float[Array, ""]


class Routing(NamedTuple):
    """Routing of each token: its experts and their weights.

    Attributes:
        experts: their numbers, the best first.
        shares: in which what they make is added, one in sum; at least float32.
        load: how all tokens were spread.
    """

    experts: Int[Array, "T chosen"]
    shares: Float[Array, "T chosen"]
    load: Load


class Router(nnx.Module):
    """Router: scores the experts in at least float32; rounded, near ties would fall either way."""

    def __init__(self, config: MistralConfig, *, rngs: nnx.Rngs) -> None:
        D, E = config.dim, config.n_experts
        self.kernel = nnx.Param(D**-0.5 * jax.random.normal(rngs.params(), (E, D)))
        self.n_chosen = config.n_experts_per_token

    def __call__(self, x: Float[Array, "T D"]) -> Routing:
        """Top-k experts of each token; of two that are equal, the first."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        kernel = from_bits(self.kernel[...]).astype(wide)
        scores = jnp.einsum("TD,ED->TE", x.astype(wide), kernel, precision="highest")
        best, experts = jax.lax.top_k(scores, self.n_chosen)
        chosen = jnp.zeros(scores.shape[1], wide).at[experts.reshape(-1)].add(1)
        tokens = jnp.asarray(len(scores), wide)
        load = Load(chosen, jnp.sum(jax.nn.softmax(scores), axis=0), tokens)
        return Routing(experts, jax.nn.softmax(best), load)


class Stack(nnx.Module):
    """Linear maps of all experts, stacked to one kernel."""

    def __init__(self, E: int, writes: int, reads: int, std: float, *, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (E, writes, reads)))


class Experts(nnx.Module):
    """Experts: feed-forwards of one shape, see `MLP`, each for the rows routed to it."""

    def __init__(self, config: MistralConfig, *, rngs: nnx.Rngs) -> None:
        E, D, X = config.n_experts, config.dim, config.expert_dim
        self.gate = Stack(E, X, D, D**-0.5, rngs=rngs)
        self.up = Stack(E, X, D, D**-0.5, rngs=rngs)
        self.down = Stack(E, D, X, (X * 2 * config.n_layers) ** -0.5, rngs=rngs)


class Mixture(nnx.Module):
    """Mixture-of-experts layer: router and experts, and the shared expert, if there is one.

    That is a feed-forward for every token, added without a weight (DeepSeekMoE, arXiv:2401.06066).
    """

    def __init__(self, config: MistralConfig, *, rngs: nnx.Rngs) -> None:
        self.router = Router(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        if n := config.n_shared_experts:
            self.shared = MLP(config, n * config.expert_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Load]:
        """Weighted sum of the chosen experts at each position, and the load."""
        flat = x.reshape(-1, x.shape[-1])
        routing = self.router(flat)
        maps = (self.experts.gate, self.experts.up, self.experts.down)
        kernels = tuple(as_form(one.kernel.get_value()) for one in maps)
        y = over_experts(_mixed, kernels, flat, routing.experts, routing.shares)
        y = y.astype(x.dtype).reshape(x.shape)
        return y + self.shared(x)[0] if hasattr(self, "shared") else y, routing.load


def _mixed(
    kernels: tuple[Any, Any, Any],
    x: Float[Array, "T D"],
    experts: Int[Array, "T chosen"],
    shares: Float[Array, "T chosen"],
) -> Float[Array, "T D"]:
    """Weighted sum of the experts of one device, at least float32; other ids add nothing."""
    gate, up, down = kernels
    E, (T, n_chosen) = len(jax.tree.leaves(gate)[0]), experts.shape
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    back = jnp.argsort(order)
    sizes = jnp.bincount(flat, length=E)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    repeated = jnp.repeat(x.astype(wide), n_chosen, axis=0)  # so gradients are added up wide
    rows = permuted(repeated.astype(x.dtype), order, back)
    hidden = grouped(rows, gate, sizes)
    hidden = jax.nn.silu(hidden.astype(wide)).astype(x.dtype)
    hidden = hidden * grouped(rows, up, sizes)
    made = permuted(grouped(hidden, down, sizes), back, order)
    is_ours = (experts < E)[..., None]
    made = jnp.where(is_ours, made.reshape(T, n_chosen, -1).astype(wide), 0)
    return jnp.sum(made * shares[..., None], axis=1)


@jax.custom_vjp
def permuted(
    rows: Float[Array, "T D"], order: Int[Array, " T"], back: Int[Array, " T"]
) -> Float[Array, "T D"]:
    """`rows[order]`, whose gradient is a gather by the inverse `back`, not a scatter-add.

    >>> rows, order = jnp.array([[1.0], [2.0], [3.0]]), jnp.array([1, 2, 0])
    >>> permuted(rows, order, jnp.argsort(order)).ravel().tolist()
    [2.0, 3.0, 1.0]
    """
    return rows[order]


permuted.defvjp(
    lambda rows, order, back: (rows[order], back), lambda back, dy: (dy[back], None, None)
)


def imbalance(load: Load) -> Float[Array, ""]:
    """Load-balancing loss: E times the sum over experts of their share of choices times softmax.

    It is the number of experts per token when all are chosen alike, and more when some are
    preferred (Switch Transformer, arXiv:2101.03961, equations 4 to 6; `transformers` adds it
    up over the best experts, and takes all layers for one text). Only the softmax has a slope.
    """
    chosen = jax.lax.stop_gradient(load.chosen) / load.tokens
    return len(chosen) * jnp.sum(chosen * load.share / load.tokens)
