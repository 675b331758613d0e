"""Optimizer: Muon for the matrices, Adam for embeddings and norms, one learning-rate schedule.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest orthogonal one,
which gets more out of each of the few hundred steps that five minutes on a small machine
allow. Embedding, head and norm scales are lookups and gains, not maps, and take Adam.

Muon turns a whole matrix at each step, as random weights need it. Trained ones are only to be
nudged, and the two thin factors of an adapter are no map by themselves: these take AdamW.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers, MuonState, muon

from lechat_jax.config import layout
from lechat_jax.devices.platform import platform
from lechat_jax.model.binding import Weights
from lechat_jax.train.options import BETA1, TrainConfig

WARMUP_STEPS = 10
COOLDOWN = 0.6  # the last part of the run in which the rate falls to zero, as a fraction


class Rates(NamedTuple):
    """Peak learning rates, measured together; `learning_rate` scales them all."""

    matrix: float = 0.02
    embed: float = 0.01
    head: float = 0.006
    norm: float = 0.01


Kind = Literal["muon", "adamw"]
Start = Literal["random", "trained", "adapters"]

# AdamW's peak rate, the same for all weights, by what it starts from.
ADAMW: dict[Start, float] = {"random": 3e-3, "trained": 2e-5, "adapters": 2e-4}


class Rule(NamedTuple):
    """How matrices are moved, and the peak rates, which `learning_rate` scales.

    Attributes:
        matrices: Muon, or AdamW as all the rest.
        rates: of each group of weights.
        weight_decay: part of a matrix that is taken off in a step, as a multiple of the rate.
        beta1: decay of Adam's first moment, in a step.
        muon_steps: Newton-Schulz steps by which Muon makes a matrix orthogonal.
        muon_momentum: decay of Muon's momentum in a step.
    """

    matrices: Kind = "muon"
    rates: Rates = Rates()
    weight_decay: float = 0.0
    beta1: float = BETA1["muon"]
    muon_steps: int = TrainConfig.muon_steps
    muon_momentum: float = TrainConfig.muon_momentum


MUON = Rule()


def usual_rule(kind: Kind, start: Start, weight_decay: float = 0.0) -> Rule:
    """The optimiser of that kind, with its usual rates for weights that are so far.

    Beside adapters, which are matrices, a trained projector may learn, with the rate of its own.

    >>> usual_rule("adamw", "adapters").rates
    Rates(matrix=0.0002, embed=2e-05, head=2e-05, norm=2e-05)
    """
    beside = "trained" if start == "adapters" else start
    rates = Rates(*[ADAMW[beside]] * len(Rates()))._replace(matrix=ADAMW[start])
    rates = Rates() if kind == "muon" else rates
    return Rule(kind, rates, weight_decay, BETA1[kind])


def axes_of(name: str) -> MuonDimensionNumbers:
    """Which axes of a stacked kernel [L, ...] a map reads, and which it writes.

    Of experts [L, E, ...] each is a map of its own.
    """
    row = layout.row_of(name)
    first = 2 if layout.is_expert(name) else 1
    n = len(row.writes)
    return MuonDimensionNumbers(
        reduction_axis=tuple(range(n, n + len(row.reads))), output_axis=tuple(range(first, n))
    )


def group(name: str) -> str:
    """The optimiser group of a weight, by its name.

    >>> group("blocks.0.attn.q.kernel"), group("blocks.attn_norm.scale"), group("head.kernel")
    ('matrix', 'norm', 'head')
    >>> group("vision.blocks.0.attn.q.kernel"), group("projector.linear_1.kernel")
    ('matrix', 'head')
    """
    if layout.is_norm(name) or layout.is_bias(name):
        return "norm"
    if layout.is_vision(name) and not layout.is_stack(layout.stacked(name)):
        return "head"  # patches and projector, each of which there is once
    module = layout.module_of(name)
    return module if module in ("embed", "head") else "matrix"


class RateSchedule(NamedTuple):
    """Learning-rate schedule: where the rate rises and falls.

    Attributes:
        first: the step at which it begins to rise.
        end: the step at which it is zero.
        cooldown: steps in which it would fall from its peak to zero.
    """

    first: Int[ArrayLike, ""]
    end: Int[ArrayLike, ""]
    cooldown: Float[ArrayLike, ""]


def warmup_then_cooldown(
    step: Int[Array, ""], length: RateSchedule | Int[ArrayLike, ""]
) -> Float[Array, ""]:
    """Warmup-stable-decay learning rate at a step, as a fraction of its peak.

    A function of the step and of the run's length alone; a number of steps is a run of so many.
    While the length is still being measured any large one will do, since the level part does not
    depend on it.
    """
    if not isinstance(length, RateSchedule):
        length = RateSchedule(0, length, COOLDOWN * length)
    up = (step - length.first + 1) / WARMUP_STEPS
    down = (length.end - step) / length.cooldown
    return jnp.clip(jnp.minimum(up, down), 0.0, 1.0).astype(jnp.float32)


class Optimizer:
    """Optimizer of weights by name, at `learning_rate` times the peak rates of a rule.

    For Muon the same kernel of all blocks is one stack [L, ...], so that a step orthogonalises
    7 stacks and not 7 L little matrices.
    """

    def __init__(self, learning_rate: float = 1.0, rule: Rule = MUON) -> None:
        rates = Rates(*(learning_rate * rate for rate in rule.rates))
        decay = rule.weight_decay

        def axes(params: Any) -> Any:
            return {
                name: axes_of(name) if group(name) == "matrix" else leaf
                for name, leaf in params.items()
            }

        def adam(rate: float, decay: float = 0.0) -> optax.GradientTransformation:
            # The small epsilon matters: most rows of the tables have no gradient in most steps.
            if not decay:
                return optax.adam(rate, b1=rule.beta1, b2=0.95, eps=1e-10)
            return optax.adamw(rate, b1=rule.beta1, b2=0.95, eps=1e-10, weight_decay=decay)

        matrices = {
            "muon": muon(
                rates.matrix,
                ns_steps=rule.muon_steps,
                beta=rule.muon_momentum,
                weight_decay=decay,
                muon_weight_dimension_numbers=axes,
            ),
            "adamw": adam(rates.matrix, decay),
        }
        self._muon_steps = rule.muon_steps
        self._is_stacked = rule.matrices == "muon"
        self._inner = optax.partition(
            {
                "matrix": matrices[rule.matrices],
                "embed": adam(rates.embed),
                "head": adam(rates.head),
                "norm": adam(rates.norm),
            },
            lambda params: {name: group(name) for name in params},
        )

    def _stacked(self, weights: Weights) -> Weights:
        return stack_blocks(weights) if self._is_stacked else dict(weights)

    def init(self, weights: Weights) -> optax.OptState:
        """Optimizer state before the first step."""
        return self._inner.init(self._stacked(weights))

    def update(
        self, grads: Weights, state: optax.OptState, weights: Weights
    ) -> tuple[Weights, optax.OptState]:
        """Updates to add to the weights at the full rate, and the next optimizer state."""
        state = _with_coefficients(state, lambda one: jnp.broadcast_to(one, (self._muon_steps, 3)))
        updates, state = self._inner.update(self._stacked(grads), state, self._stacked(weights))
        moves = cast(Weights, updates)
        moves = unstack_blocks(moves, grads) if self._is_stacked else moves
        return moves, _with_coefficients(state, lambda all: all[0])


def _with_coefficients(state: optax.OptState, make: Callable[[Array], Array]) -> optax.OptState:
    """Muon's state with other coefficients of its Newton-Schulz steps; on a CPU unchanged.

    Given a row for each step, optax makes a loop of the steps, which compiles in a fifth of the
    time. Given one row, it writes them out, which a CPU computes faster.
    """
    if platform() == "cpu":
        return state

    def is_muon(leaf: Any) -> bool:
        return isinstance(leaf, MuonState)

    def changed(leaf: Any) -> Any:
        return leaf._replace(ns_coeffs=make(leaf.ns_coeffs)) if is_muon(leaf) else leaf

    return jax.tree.map(changed, state, is_leaf=is_muon)


def stack_blocks(weights: Weights) -> Weights:
    """Stacks the layers: `blocks.0.x`, `blocks.1.x`, … become one `blocks.x` of shape [L, ...].

    What not all layers have, such as experts, is a stack of those that do.
    """
    return {
        stack: jnp.stack([weights[name] for name in names])
        if layout.is_stack(stack)
        else weights[stack]
        for stack, names in _stacks(weights).items()
    }


def unstack_blocks(stacked: Weights, names: Iterable[str]) -> Weights:
    """The inverse of `stack_blocks`, for weights of these names."""
    return {
        name: stacked[stack][i] if layout.is_stack(stack) else stacked[stack]
        for stack, names in _stacks(names).items()
        for i, name in enumerate(names)
    }


def _stacks(names: Iterable[str]) -> dict[str, list[str]]:
    """The weights of each stack in the order of their layers; what is in none is by itself."""
    found: dict[str, list[str]] = {}
    for name in sorted(names, key=_layer):
        found.setdefault(layout.stacked(name), []).append(name)
    return found


def _layer(name: str) -> int:
    """The number of the layer, of decoder or tower, that a weight is of; -1 outside them."""
    layer = layout.layer_of(name)
    layer = layout.vision_layer_of(name) if layer is None else layer
    return -1 if layer is None else layer
