"""Matrices are turned orthogonal, tables and norms are left to Adam, one schedule rules all."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lechat_jax.config import MistralConfig
from lechat_jax.model.binding import Weights, shapes_of
from lechat_jax.train.optimizer import (
    MUON,
    Kind,
    Optimizer,
    Rates,
    RateSchedule,
    group,
    stack_blocks,
    unstack_blocks,
    usual_rule,
    warmup_then_cooldown,
)
from tests.support.models import TINY_MIXTURE

# A kernel is a map from what it reads (its last axes) to what it writes (its first): how
# many axes it writes.
WRITES = {"q": 2, "k": 2, "v": 2, "o": 1, "gate": 1, "up": 1, "down": 1}


@functools.cache
def shapes(config: MistralConfig) -> dict[str, tuple[int, ...]]:
    weights = shapes_of(config)
    return {name: leaf.shape for name, leaf in weights.items()}


@functools.cache
def gradients(config: MistralConfig, dtype: str = "float32") -> Weights:
    """Random ones, of no particular size."""
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.normal(size=shape) * rng.uniform(0.1, 10), dtype)
        for name, shape in shapes(config).items()
    }


def update(grads: Weights, learning_rate: float = 1.0) -> dict[str, np.ndarray]:
    """The first update; it depends on the gradients alone, so these stand for the weights."""
    optimizer = Optimizer(learning_rate)
    program = jax.jit(lambda grads: optimizer.update(grads, optimizer.init(grads), grads)[0])
    return {name: np.asarray(leaf) for name, leaf in program(grads).items()}


@functools.cache
def first_update(config: MistralConfig) -> dict[str, np.ndarray]:
    return update(gradients(config))


def as_matrix(name: str, kernel: Any) -> np.ndarray:
    """The kernel as [writing, reading]."""
    writes = WRITES[name.split(".")[-2]]
    return np.asarray(kernel, np.float64).reshape(np.prod(kernel.shape[:writes]), -1)


def matrices(config: MistralConfig) -> list[str]:
    return [name for name in shapes(config) if group(name) == "matrix"]


# --- groups ---


def test_each_weight_has_its_group(tiny: MistralConfig) -> None:
    groups: dict[str, set[str]] = {}
    for name in shapes(tiny):
        groups.setdefault(group(name), set()).add(name)
    assert groups.pop("embed") == {"embed.kernel"}
    assert groups.pop("head") == {"head.kernel"}
    assert groups.pop("norm") == {"norm.scale"} | {
        f"blocks.{i}.{norm}.scale" for i in range(3) for norm in ("attn_norm", "mlp_norm")
    }
    assert groups.pop("matrix") == {
        f"blocks.{i}.{part}.kernel"
        for i in range(3)
        for part in "attn.q attn.k attn.v attn.o mlp.gate mlp.up mlp.down".split()
    }
    assert not groups


def test_a_stack_has_the_group_of_its_parts(tiny: MistralConfig) -> None:
    assert {group(name) for name in stack_blocks(gradients(tiny))} == set(Rates._fields)


# --- stacks ---


@settings(max_examples=10)
@given(n_layers=st.integers(1, 23), data=st.data())
def test_stacking_blocks_and_unstacking_them_changes_nothing(
    n_layers: int, data: st.DataObject
) -> None:
    names = ["embed.kernel"] + [
        f"blocks.{i}.{part}" for i in range(n_layers) for part in ("attn.q.kernel", "norm.scale")
    ]
    separate = {
        name: jnp.full((2, 3), i, jnp.float32)
        for i, name in enumerate(data.draw(st.permutations(names)))
    }
    stacked = stack_blocks(separate)
    assert {name: leaf.shape for name, leaf in stacked.items()} == {
        "embed.kernel": (2, 3),
        "blocks.attn.q.kernel": (n_layers, 2, 3),
        "blocks.norm.scale": (n_layers, 2, 3),
    }
    for i in range(n_layers):  # in the order of their numbers, "10" after "9"
        layer = stacked["blocks.norm.scale"][i]
        assert (layer == separate[f"blocks.{i}.norm.scale"]).all()
    again = unstack_blocks(stacked, names)
    assert again.keys() == separate.keys()
    assert all((again[name] == separate[name]).all() for name in names)


# --- the schedule ---


def factor(step: int, total: int) -> float:
    return float(warmup_then_cooldown(jnp.int32(step), jnp.int32(total)))


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.1), (4, 0.5), (9, 1), (10, 1), (40, 1), (55, 0.75), (70, 0.5), (99, 1 / 60), (100, 0)],
)
def test_the_rate_rises_stays_and_falls_to_zero(step: int, expected: float) -> None:
    assert factor(step, total=100) == pytest.approx(expected, rel=1e-6)


def test_it_is_a_plain_run_of_that_length_from_any_first_step() -> None:
    plain = [factor(step, total=100) for step in range(100)]
    length = RateSchedule(np.int32(300), np.int32(400), np.float32(60))
    found = [float(warmup_then_cooldown(jnp.int32(300 + i), length)) for i in range(100)]
    assert found == pytest.approx(plain, rel=2**-22)  # two roundings of float32


def test_after_the_end_nothing_moves() -> None:
    assert factor(101, total=100) == factor(10_000, total=100) == 0


# The first steps are taken before the run's length is known.
@pytest.mark.parametrize("total", [100, 101, 12_345, np.iinfo(np.int32).max])
def test_the_first_four_tenths_do_not_depend_on_the_length(total: int) -> None:
    factors = [factor(step, total) for step in range(40)]
    assert factors[:10] == [np.float32(i / 10) for i in range(1, 11)]
    assert set(factors[9:]) == {1.0}


@given(total=st.integers(1, 10**6), data=st.data())
def test_the_rate_never_leaves_0_to_1(total: int, data: st.DataObject) -> None:
    assert 0 < factor(data.draw(st.integers(0, total - 1)), total) <= 1


# --- the matrices ---


# What an axis of heads on the wrong side would change: such a stack of small matrices is
# orthogonal in its slices, and not as the map that the model applies.
def test_the_update_of_each_matrix_is_nearly_orthogonal(tiny: MistralConfig) -> None:
    for name in matrices(tiny):
        matrix = as_matrix(name, first_update(tiny)[name])
        fan_out, fan_in = matrix.shape
        scale = Rates().matrix * max(1, fan_out / fan_in) ** 0.5
        singular = np.linalg.svd(matrix / scale, compute_uv=False)
        assert 0.5 < singular.min(), name
        assert singular.max() < 1.3, name


def test_it_is_the_newton_schulz_iteration_of_the_gradient(tiny: MistralConfig) -> None:
    for name in matrices(tiny):
        left, s, right = np.linalg.svd(as_matrix(name, gradients(tiny)[name]), full_matrices=False)
        s /= np.sqrt((s**2).sum())
        for _ in range(MUON.muon_steps):  # on a matrix it acts on the singular values alone
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        fan_out, fan_in = len(left), right.shape[1]
        scale = Rates().matrix * max(1, fan_out / fan_in) ** 0.5
        update = as_matrix(name, first_update(tiny)[name])
        np.testing.assert_allclose(update, -scale * (left * s) @ right, atol=1e-4 * scale)


def test_each_expert_and_each_router_is_a_map_of_its_own() -> None:
    """Turned alone: neither the experts of a layer nor the routers of all are one matrix."""
    config = dataclasses.replace(TINY_MIXTURE, n_layers=2)
    moved = first_update(config)
    for name in ("mlp.experts.up", "mlp.experts.down", "mlp.router"):
        whole = moved[f"blocks.1.{name}.kernel"].astype(np.float64)
        for matrix in whole if whole.ndim == 3 else whole[None]:
            fan_out, fan_in = matrix.shape
            scale = Rates().matrix * max(1, fan_out / fan_in) ** 0.5
            singular = np.linalg.svd(matrix / scale, compute_uv=False)
            assert 0.5 < singular.min(), name
            assert singular.max() < 1.3, name
    router = "blocks.{}.mlp.router.kernel"
    alone = update({router.format(0): gradients(config)[router.format(1)]})[router.format(0)]
    np.testing.assert_allclose(alone, moved[router.format(1)], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_layers_do_not_disturb_each_other(tiny: MistralConfig) -> None:
    """Each layer's kernel moves as it would in a model that has no other."""
    grads = gradients(tiny, "float64")
    together = update(grads)
    for layer in range(tiny.n_layers):
        name = f"blocks.{layer}.attn.o.kernel"
        alone = update({"blocks.0.attn.o.kernel": grads[name]})["blocks.0.attn.o.kernel"]
        atol = 1e-12 * np.abs(alone).max()
        np.testing.assert_allclose(alone, together[name], rtol=0, atol=atol)


# --- tables and norms ---


@pytest.mark.parametrize("kind", ["embed", "head", "norm"])
def test_tables_and_norms_take_adams_first_step(tiny: MistralConfig, kind: str) -> None:
    names = [name for name in shapes(tiny) if group(name) == kind]
    for name in names:
        expected = -getattr(Rates(), kind) * np.sign(gradients(tiny)[name])
        np.testing.assert_allclose(first_update(tiny)[name], expected, rtol=1e-4)


def test_a_row_of_a_table_moves_only_when_its_token_is_met() -> None:
    moved = update({"embed.kernel": jnp.zeros((4, 2)).at[1].set(1e-6)})["embed.kernel"]
    assert (moved[[0, 2, 3]] == 0).all()
    np.testing.assert_allclose(moved[1], -Rates().embed, rtol=1e-3)  # however small the gradient


@pytest.mark.usefixtures("x64")
def test_the_learning_rate_scales_every_update(tiny: MistralConfig) -> None:
    names = ["embed.kernel", "head.kernel", "norm.scale", "blocks.0.mlp.up.kernel"]
    grads = {name: gradients(tiny, "float64")[name] for name in names}
    whole, halved = update(grads), update(grads, learning_rate=0.5)
    for name in names:
        atol = 1e-12 * np.abs(whole[name]).max()
        np.testing.assert_allclose(halved[name], whole[name] / 2, rtol=0, atol=atol)


# --- trained weights ---


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_tables_and_norms_take_the_steps_of_pytorchs_adam(kind: Kind) -> None:
    """Beside matrices of either kind, whose decay is none of theirs; rows without a slope too."""
    rng = np.random.default_rng(0)
    shapes = {"embed.kernel": (6, 3), "head.kernel": (6, 3), "norm.scale": (3,)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(leaf)) for name, leaf in weights.items()}
    rule = usual_rule(kind, "random", weight_decay=0.3)
    groups = [{"params": [theirs[n]], "lr": 0.5 * getattr(rule.rates, group(n))} for n in shapes]
    adam = torch.optim.Adam(groups, betas=(rule.beta1, 0.95), eps=1e-10)
    optimizer = Optimizer(0.5, rule)
    ours = {name: jnp.asarray(leaf) for name, leaf in weights.items()}
    state = optimizer.init(ours)
    for step in range(4):
        grads = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        grads["embed.kernel"][step:] = 0
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[name])
        adam.step()
        moved, state = optimizer.update(jax.tree.map(jnp.asarray, grads), state, ours)
        ours = jax.tree.map(jnp.add, ours, moved)
    for name, parameter in theirs.items():
        np.testing.assert_allclose(ours[name], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_muon_turns_the_mean_of_the_last_gradients_with_more_of_the_newest() -> None:
    """Of two that share no direction, the update has some of the first as well."""
    first, second = jnp.eye(4)[:2].T, jnp.eye(4)[2:].T
    name = "blocks.0.mlp.up.kernel"
    weights = {name: jnp.zeros((4, 2))}
    optimizer = Optimizer()
    _, state = optimizer.update({name: first}, optimizer.init(weights), weights)
    moved, _ = optimizer.update({name: second}, state, weights)
    old, new = (-float((moved[name] * part).sum()) for part in (first, second))
    assert 0.2 * new < old < new


def test_adamw_is_that_of_pytorch_and_only_matrices_decay() -> None:
    rng = np.random.default_rng(0)
    shapes = {
        "blocks.0.attn.q.lora.a": (3, 5),
        "blocks.1.mlp.up.kernel": (4, 5),
        "norm.scale": (5,),
    }
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(leaf)) for name, leaf in weights.items()}
    decays = [theirs[name] for name in shapes if name != "norm.scale"]
    groups = [{"params": decays}, {"params": [theirs["norm.scale"]], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=4e-4, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.3)
    optimizer = Optimizer(20.0, usual_rule("adamw", "trained", weight_decay=0.3))
    ours = {name: jnp.asarray(leaf) for name, leaf in weights.items()}
    state = optimizer.init(ours)
    for _ in range(4):
        grads = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[name])
        adamw.step()
        moved, state = optimizer.update(jax.tree.map(jnp.asarray, grads), state, ours)
        ours = jax.tree.map(jnp.add, ours, moved)
    for name, parameter in theirs.items():
        np.testing.assert_allclose(ours[name], parameter.detach().numpy(), rtol=1e-6, atol=1e-7)
        assert np.abs(ours[name] - weights[name]).max() > 5e-4


def test_muon_takes_part_of_the_matrices_off_and_of_nothing_else() -> None:
    """In a step the rate times the decay of what was there, beside the turn of the gradient."""
    rng = np.random.default_rng(0)
    shapes = {"blocks.0.attn.q.kernel": (2, 3, 4), "norm.scale": (4,), "head.kernel": (5, 4)}
    weights, grads = (
        {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
        for _ in range(2)
    )

    def moved(weight_decay: float) -> Weights:
        optimizer = Optimizer(0.5, usual_rule("muon", "random", weight_decay))
        return optimizer.update(grads, optimizer.init(weights), weights)[0]

    plain, decayed = moved(0.0), moved(0.3)
    for name, leaf in weights.items():
        off = 0.5 * Rates().matrix * 0.3 * leaf if name.startswith("blocks.") else 0 * leaf
        np.testing.assert_allclose(decayed[name], plain[name] - off, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_momentum_and_moments_are_float32_and_nothing_else_is_kept(
    tiny: MistralConfig, kind: Kind
) -> None:
    state = jax.eval_shape(Optimizer(1.0, usual_rule(kind, "random")).init, shapes_of(tiny))
    # But for counts of steps, and the three coefficients of Newton and Schulz.
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.shape not in ((), (3,))]
    assert {leaf.dtype.name for leaf in leaves} == {"float32"}
    n = {name: leaf.size for name, leaf in shapes_of(tiny).items()}
    matrices = sum(size for name, size in n.items() if group(name) == "matrix")
    moments = 2 * sum(n.values()) - (matrices if kind == "muon" else 0)
    assert sum(leaf.size for leaf in leaves) == moments


@pytest.mark.parametrize(
    ("kind", "start", "rates"),
    [
        ("muon", "random", (0.02, 0.01, 0.006, 0.01)),
        ("adamw", "random", (3e-3,) * 4),
        ("adamw", "trained", (2e-5,) * 4),
        ("adamw", "adapters", (2e-4, 2e-5, 2e-5, 2e-5)),  # and a projector beside them
    ],
)
def test_each_start_has_its_usual_rates(kind: Kind, start: Any, rates: tuple) -> None:
    rule = usual_rule(kind, start)
    assert (rule.matrices, rule.rates, rule.weight_decay) == (kind, rates, 0.0)
