"""Training on several devices is training on one: the same losses, from slices of everything."""

import dataclasses
import logging
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from lechat_jax.checkpoint.run import Run
from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.checkpoint.training_state import Checkpoints
from lechat_jax.checkpoint.weights import save_weights, weight_shapes
from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import letters
from lechat_jax.data.batches import Batches
from lechat_jax.data.rows import Rows
from lechat_jax.devices.mesh import (
    check_divides,
    make_mesh,
    on_one_device,
    own_rows,
    placed,
    settled,
    shardings,
    usual_mesh,
)
from lechat_jax.errors import BadInput
from lechat_jax.model.adapters import Adapters
from lechat_jax.model.attention import KERNELS, dense_attention
from lechat_jax.model.binding import weights_of
from lechat_jax.model.scoring import score
from lechat_jax.quantize.scheme import INT8, Form, quantize_weights
from lechat_jax.train.step import StepOptions, TrainState, gradient, init_state, train_steps
from tests.support.models import random_model

B, T, CALLS = 8, 12, 4
TOKENS = np.random.default_rng(0).integers(0, 98, (5, CALLS, B, T + 1)).astype(np.int32)
DOCUMENTS = (np.arange(T + 1) >= np.arange(B)[:, None]).astype(np.int32) + np.zeros_like(TOKENS)
COUNTED = np.random.default_rng(1).random(TOKENS.shape) < 0.7


@pytest.fixture(scope="module")
def small(tiny: MistralConfig) -> MistralConfig:
    """No two dimensions agree; the heads and the words can be halved."""
    return dataclasses.replace(tiny, n_layers=2, vocab_size=98, sliding_window=5)


def curve(config: MistralConfig, options: StepOptions) -> tuple[np.ndarray, TrainState]:
    """Losses of twenty steps, and the state after them."""
    state, losses = init_state(config, options, seed=0), []
    for leaves in zip(TOKENS, COUNTED, DOCUMENTS, strict=True):
        rows = Rows(*(placed(options.mesh, "-BT", leaf) for leaf in leaves))
        state, more = train_steps(
            config, options, state, {}, rows, np.int32(CALLS), np.int32(len(TOKENS) * CALLS)
        )
        losses.append(np.asarray(more))
    return np.concatenate(losses), state


@pytest.fixture(scope="module")
def alone(small: MistralConfig) -> tuple[np.ndarray, TrainState]:
    return curve(small, StepOptions())


@pytest.mark.parametrize(
    "mesh",
    [
        "fsdp=2,tp=2",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("fsdp=8", "tp=2", "fsdp=4,tp=2")),
    ],
)
def test_many_devices_take_the_steps_of_one(
    mesh: str,
    small: MistralConfig,
    alone: tuple[np.ndarray, TrainState],
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = StepOptions(mesh=make_mesh(mesh))
    assert options.mesh
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        losses, state = curve(small, options)
    compiled = [m for m in caplog.messages if m.startswith("Compiling jit(_steps)")]
    assert len(compiled) == 1  # since the state keeps its places from call to call
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    for leaf, place in zip(
        jax.tree.leaves(state), jax.tree.leaves(shardings(options.mesh, state)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    # Every kernel, norm and moment is in as many parts as there are devices, or a part of them.
    held = sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(state))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(alone[1]))
    assert held < 1.05 * whole / options.mesh.size
    gathered = on_one_device(options.mesh, state.weights, np.float32)
    for name, leaf in gathered.items():
        np.testing.assert_allclose(leaf, alone[1].weights[name], rtol=0, atol=2e-5)
        assert leaf.devices() == {options.mesh.devices.flat[0]}
    rows = [TOKENS[0, 0, :, :-1], TOKENS[0, 0, :, 1:], COUNTED[0, 0, :, 1:]]
    nats = score(
        small, options, state.weights, *(placed(options.mesh, "BT", leaf) for leaf in rows)
    )
    expected = score(small, StepOptions(), gathered, *rows)
    assert float(nats) == pytest.approx(float(expected), rel=1e-6)


def test_a_hand_written_kernel_has_the_heads_of_its_device(
    small: MistralConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def kernel(q: Array, k: Array, v: Array, documents: Array, window: int) -> Array:
        seen.append((q.shape, k.shape, v.shape, documents.shape))
        return dense_attention(q, k, v, window, documents)

    monkeypatch.setitem(KERNELS, "splash", kernel)
    small = dataclasses.replace(small, n_layers=1)
    state = init_state(small, StepOptions(), seed=0)
    tokens, counted, documents = (
        jax.numpy.asarray(leaf[0, 0]) for leaf in (TOKENS, COUNTED, DOCUMENTS)
    )
    batch = Rows(tokens, counted, documents)
    (loss, slopes), (expected, their_slopes) = (
        jax.jit(partial(gradient, small, options, frozen={}, batch=batch))(state.weights)
        for options in (
            StepOptions(mesh=make_mesh("fsdp=4,tp=2"), backend="splash"),
            StepOptions(backend="dense"),
        )
    )
    N, K, H = small.n_heads // 2, small.n_kv_heads // 2, small.head_dim
    B = TOKENS.shape[2] // 4
    assert set(seen) == {((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T))}
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    for name, slope in slopes.items():
        np.testing.assert_allclose(slope, their_slopes[name], rtol=1e-4, atol=1e-6)


def test_bytes_that_a_mesh_does_not_divide_are_whole_on_every_device(small: MistralConfig) -> None:
    """Eight devices divide 40 features of int4, but not the 20 bytes in which they are."""
    mesh = make_mesh("fsdp=8")
    check_divides(mesh, small, B)
    weights = quantize_weights(weights_of(random_model(small)), Form("int4", 8))
    name = "blocks.0.mlp.up.kernel"
    assert (weights[name].shape, weights["blocks.0.mlp.down.kernel"].shape) == ((56, 20), (40, 28))
    on_mesh = settled(mesh, weights)
    assert on_mesh[name].addressable_data(0).shape == (56, 20)
    rows = TOKENS[0, 0, :, :-1], TOKENS[0, 0, :, 1:], COUNTED[0, 0, :, 1:]
    nats, expected = (
        float(score(small, StepOptions(mesh=where), of, *rows))
        for where, of in ((mesh, on_mesh), (None, weights))
    )
    assert nats == pytest.approx(expected, rel=1e-6)


def test_scales_are_not_rounded_where_weights_are_gathered(small: MistralConfig) -> None:
    """As a sample during training in bfloat16 has them: those of kernels and of adapters."""
    mesh = make_mesh("fsdp=4,tp=2")
    one = dataclasses.replace(small, n_layers=1)
    weights = quantize_weights(weights_of(random_model(one)), INT8)
    weights |= Adapters(rank=3, alpha=5.0, targets=("q",)).scales(one)
    found = on_one_device(mesh, settled(mesh, weights), "bfloat16")
    for name, leaf in weights.items():
        is_norm = name.endswith("norm.scale")
        expected = leaf.astype("bfloat16") if is_norm else leaf
        np.testing.assert_array_equal(found[name], expected, strict=True)


def test_every_weight_has_its_letters(small: MistralConfig) -> None:
    sizes = {"D": 40, "N": 6, "K": 2, "H": 8, "U": 8, "F": 56, "V": 98}
    for name, leaf in weight_shapes(small).items():
        assert tuple(sizes[letter] for letter in letters(name)) == leaf.shape
    assert letters("blocks.0.attn.q.kernel.scale") == letters("blocks.0.attn.q.lora.a") == ""


def test_an_axis_goes_to_who_can_be_divided() -> None:
    mesh = make_mesh("fsdp=4,tp=2")
    state = {"blocks.attn.q.kernel": np.zeros((4, 6, 8, 40)), "count": np.zeros(())}
    assert {k: v.spec for k, v in shardings(mesh, state).items()} == {
        "blocks.attn.q.kernel": P("fsdp", "tp"),
        "count": P(),
    }
    six = {"blocks.attn.q.kernel": np.zeros((6, 6, 8, 40))}
    assert shardings(mesh, six)["blocks.attn.q.kernel"].spec == P(None, "tp", None, "fsdp")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("fsdp=16", "has 16 devices and there are 8"),
        ("dp=2", "fsdp=4,tp=2, and not 'dp=2'"),
        ("fsdp=0", "not 'fsdp=0'"),
        ("fsdp", "not 'fsdp'"),
        ("", "not ''"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(asked: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        make_mesh(asked)


@pytest.mark.parametrize(
    ("mesh", "batch", "words"),
    [
        ("fsdp=4", 6, r"fsdp=4 of the mesh does not divide the 6 rows of a batch \(B, --batch\)"),
        ("tp=4", 8, r"tp=4 of the mesh does not divide the 6 query heads \(N\); choose --mesh"),
        ("tp=6", 8, r"tp=6 .* the 2 key-value heads \(K\); choose --mesh with a divisor of 2"),
    ],
)
def test_what_is_not_divided_is_named(
    mesh: str, batch: int, words: str, small: MistralConfig
) -> None:
    with pytest.raises(BadInput, match=words):
        check_divides(make_mesh(mesh), small, batch)


@pytest.mark.parametrize(
    ("change", "mesh", "batch", "words"),
    [
        ({"dim": 42}, "fsdp=4", 8, "42 model width"),
        ({"hidden_dim": 57}, "tp=2", 8, "57 feed-forward width"),
        ({"vocab_size": 97}, "tp=2", 8, "97 token ids"),
        ({"n_experts": 3, "n_experts_per_token": 2}, "tp=2", 8, "3 experts"),
        ({"n_kv_heads": 3}, "tp=2", 8, "3 key-value heads"),
        ({}, "fsdp=2,tp=2", 7, "7 rows of a batch"),
    ],
)
def test_every_axis_that_is_split_has_to_be_divided(
    change: dict, mesh: str, batch: int, words: str, small: MistralConfig
) -> None:
    with pytest.raises(BadInput, match=f"does not divide the {words}"):
        check_divides(make_mesh(mesh), dataclasses.replace(small, **change), batch)
    check_divides(make_mesh("tp=1"), dataclasses.replace(small, **change), batch)
    split = {"n_experts": 2, "n_experts_per_token": 2, "hidden_dim": 57}  # F is whole then
    check_divides(make_mesh("fsdp=4,tp=2"), dataclasses.replace(small, **split), 8)


def test_simulated_devices_are_used_only_when_asked_for() -> None:
    assert usual_mesh() is None


def test_weights_and_checkpoints_are_read_into_their_places(
    small: MistralConfig, tmp_path: Path
) -> None:
    mesh = make_mesh("fsdp=4,tp=2")
    weights = weights_of(random_model(small))
    save_weights(tmp_path / "weights", small, weights, None)
    run = Run.create(tmp_path / "run")
    run.config = {"model": small.to_dict(), "train": {}}
    Checkpoints(run.checkpoints).save(3, {"model": weights}, {})
    places = shardings(mesh, weights)
    for folder in ("weights", "run"):
        loaded = SavedModel.open(tmp_path / folder).load(mesh=mesh).weights
        for name, leaf in loaded.items():
            assert leaf.sharding == places[name]
            np.testing.assert_array_equal(leaf, weights[name])


def test_a_process_reads_the_rows_of_its_devices() -> None:
    assert own_rows(None, 8) == slice(None)
    assert own_rows(make_mesh("fsdp=4,tp=2"), 8) == slice(0, 8)
    batches = Batches(200, block=4, batch=8, seed=0)
    stream = np.arange(200)
    whole = batches.rows(stream, 3, 2).tokens
    part = batches.rows(stream, 3, 2, slice(2, 6)).tokens
    np.testing.assert_array_equal(part, whole[:, 2:6])
