"""A mixture of experts beside transformers' Mixtral, and beside itself on many devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.mixtral import modeling_mixtral as theirs

from lechat_jax.checkpoint.weights import weight_shapes
from lechat_jax.config import MistralConfig, preset
from lechat_jax.config.layout import is_scale, letters
from lechat_jax.data.rows import Rows
from lechat_jax.devices.mesh import check_divides, make_mesh, settled
from lechat_jax.errors import BadInput
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.sampling import Sampling
from lechat_jax.model.adapters import Adapters
from lechat_jax.model.binding import Weights, bind
from lechat_jax.model.moe import Load, imbalance
from lechat_jax.quantize.scheme import INT8, Form, form_of, numbers_of, quantize_weights
from lechat_jax.train.step import StepOptions, gradient
from tests.support.models import TINY_MIXTURE, logits_of, random_weights

COEFFICIENT = 0.3  # of the auxiliary loss, so large that it matters


slope = jax.jit(gradient, static_argnums=(0, 1))


@pytest.fixture(scope="module")
def mixture() -> MistralConfig:
    """A layer whose heads, words and experts can be halved."""
    return dataclasses.replace(TINY_MIXTURE, n_layers=1, vocab_size=98, n_experts=4)


@pytest.fixture(scope="module")
def weights(mixture: MistralConfig) -> dict[str, np.ndarray]:
    return random_weights(mixture)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 98, (4, 13)).astype(np.int32)


def test_imbalance_is_the_loss_of_transformers() -> None:
    scores = [torch.randn(2 * 9, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    of_layers: Any = tuple(scores)
    expected = theirs.load_balancing_loss_func(of_layers, num_experts=5, top_k=2)
    every = jnp.concatenate([jnp.asarray(one.numpy()) for one in scores])
    chosen = jax.nn.one_hot(jax.lax.top_k(every, 2)[1], 5).sum((0, 1))
    load = Load(chosen, jax.nn.softmax(every).sum(0), jnp.float32(len(every)))
    assert float(imbalance(load)) == pytest.approx(float(expected), rel=1e-6)


def test_gradients_are_those_of_transformers_with_its_auxiliary_loss(
    mixture: MistralConfig, tokens: np.ndarray, x64: None
) -> None:
    """Of two layers, since its loss is of the experts of all layers at once."""
    oracles = pytest.importorskip("parity.check.oracles.transformers")
    mixture = dataclasses.replace(mixture, n_layers=2)
    weights = random_weights(mixture)
    oracle = oracles.TransformersOracle(mixture, weights, "float64")
    rows = torch.from_numpy(tokens.astype(np.int64))
    model: Any = oracle.model
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = COEFFICIENT
    out = model(rows[:, :-1], output_router_logits=True)
    nats = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), rows[:, 1:].flatten())
    (nats + COEFFICIENT * out.aux_loss).backward()
    slopes = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expected = oracle.by_lechat_name(slopes)
    ours = {name: jnp.asarray(leaf, jnp.float64) for name, leaf in weights.items()}

    def found(coefficient: float) -> tuple:
        options = StepOptions(dtype="float64", router_aux_loss=coefficient)
        return slope(mixture, options, ours, {}, Rows(tokens))

    loss, grads = found(COEFFICIENT)
    assert float(loss) == pytest.approx(nats.item(), rel=1e-7)  # their softmax is float32
    for name, wanted in expected.items():
        atol = 1e-6 * np.abs(wanted).max()
        np.testing.assert_allclose(grads[name], wanted, rtol=0, atol=atol)
    plain_loss, plain = found(0.0)
    assert loss == plain_loss
    name = "blocks.0.mlp.router.kernel"
    assert np.abs(plain[name] - grads[name]).max() > 0.01 * np.abs(grads[name]).max()


@pytest.mark.parametrize(
    "mesh", ["fsdp=2,tp=2", pytest.param("fsdp=4,tp=2", marks=pytest.mark.slow)]
)
def test_experts_on_many_devices_learn_as_on_one(
    mesh: str, mixture: MistralConfig, weights: dict[str, np.ndarray], tokens: np.ndarray
) -> None:
    found = []
    for where in (None, make_mesh(mesh)):
        remat = "dots" if where else "none"
        options = StepOptions(mesh=where, router_aux_loss=COEFFICIENT, remat=remat)
        found.append(slope(mixture, options, weights, {}, Rows(tokens)))
    (loss, grads), (sharded_loss, sharded) = found
    assert float(sharded_loss) == pytest.approx(float(loss), rel=1e-6)
    for name, wanted in grads.items():
        atol = 1e-5 * np.abs(wanted).max()
        np.testing.assert_allclose(sharded[name], wanted, rtol=0, atol=atol)


def test_no_device_has_the_experts_of_another(mixture: MistralConfig) -> None:
    sizes = {"D": 40, "N": 6, "K": 2, "H": 8, "U": 8, "X": 28, "V": 98, "E": 4}
    for name, leaf in weight_shapes(mixture).items():
        assert tuple(sizes[letter] for letter in letters(name)) == leaf.shape
    five = dataclasses.replace(mixture, n_experts=5)
    with pytest.raises(BadInput, match=r"tp=2 of the mesh does not divide the 5 experts \(E\)"):
        check_divides(make_mesh("tp=2"), five, batch=4)


def test_parts_of_a_batch_add_up_but_for_their_own_balance(
    mixture: MistralConfig, weights: dict[str, np.ndarray], tokens: np.ndarray
) -> None:
    twice = Rows(np.concatenate([tokens[:2], tokens[:2]])[[0, 2, 1, 3]])  # each part the same
    found = []
    for n in (1, 2):
        options = StepOptions(accumulate=n, router_aux_loss=COEFFICIENT)
        found.append(slope(mixture, options, weights, {}, twice))
    for name, wanted in found[0][1].items():
        atol = 1e-5 * np.abs(wanted).max()
        np.testing.assert_allclose(found[1][1][name], wanted, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def in_groups(mixture: MistralConfig) -> MistralConfig:
    """Experts wide enough for groups of eight features."""
    return dataclasses.replace(mixture, hidden_dim=32)


def quantised(config: MistralConfig, form: Form) -> tuple[Weights, Weights]:
    """A model in that form, its features in orders of their own if it has any, and its numbers.

    Scales are powers of two, so that the numbers are the same in any arithmetic.
    """
    made = {name: np.asarray(leaf) for name, leaf in random_weights(config).items()}
    shapes = {name: leaf.shape for name, leaf in made.items()}
    made = {name: np.array(leaf) for name, leaf in quantize_weights(made, form).items()}
    draw = np.random.default_rng(0)
    for name in made:
        if name.endswith(".order"):
            made[name] = draw.permuted(made[name], axis=-1)
        if is_scale(name):
            made[name] = np.exp2(np.rint(np.log2(made[name])))
    numbers = {
        name: numbers_of(name, made, shape) if form.format_of(name) else made[name]
        for name, shape in shapes.items()
    }
    return jax.tree.map(jnp.asarray, made), jax.tree.map(jnp.asarray, numbers)


# The second has all that the first has, and zeros, groups and an order of its features as well.
FORMS = [
    pytest.param(INT8, id="int8", marks=pytest.mark.slow),
    pytest.param(Form("int4", 8, is_ordered=True), id="ordered"),
]


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_mixture_is_the_one_of_its_numbers_and_its_router_is_whole(
    form: Form, in_groups: MistralConfig, tokens: np.ndarray
) -> None:
    weights, numbers = quantised(in_groups, form)
    assert form_of(weights) == form
    assert {name: leaf.shape for name, leaf in weights.items()} == {
        name: leaf.shape for name, leaf in weight_shapes(in_groups, form).items()
    }
    assert weights["blocks.0.mlp.router.kernel"].dtype == np.float32
    found, expected = (logits_of(in_groups, of, tokens) for of in (weights, numbers))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    one, other = (
        Generator(bind(in_groups, of), chunk=8, context=64).generate(
            tokens[:1].tolist(), 8, Sampling(temperature=0), eos_ids=()
        )[0]
        for of in (weights, numbers)
    )
    assert one.ids == other.ids
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_adapters_beside_quantised_experts_learn_on_many_devices_what_they_do_on_one(
    form: Form, in_groups: MistralConfig, tokens: np.ndarray, x64: None
) -> None:
    weights, numbers = quantised(in_groups, form)
    adapters = Adapters(rank=2, alpha=4.0, targets=("q", "o"))
    learning = {
        name: jax.random.normal(jax.random.key(i), leaf.shape)
        for i, (name, leaf) in enumerate(adapters.draw(in_groups, seed=0).items())
    }
    found = []
    for where, base in ((None, numbers), (None, weights), (make_mesh("fsdp=2,tp=2"), weights)):
        frozen = settled(where, base | adapters.scales(in_groups))
        options = StepOptions(dtype="float64", mesh=where)
        found.append(slope(in_groups, options, settled(where, learning), frozen, Rows(tokens))[1])
    for name, wanted in found[0].items():
        for other in found[1:]:
            atol = 1e-7 * np.abs(wanted).max()  # measured: 3e-9
            np.testing.assert_allclose(other[name], wanted, rtol=0, atol=atol)


def test_adapters_of_experts_are_refused(mixture: MistralConfig) -> None:
    with pytest.raises(BadInput, match=r"down, gate, up cannot .* o, since experts have none"):
        Adapters(rank=2, alpha=4.0).parts(mixture)
    assert len(Adapters(rank=2, alpha=4.0, targets=("q", "o")).parts(mixture)) == 2


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [  # as published, and what Mistral rounds to 12.9 and 39 billion
        ("mixtral-8x7b-v0.1", 46_702_792_704, 12_879_925_248),
        ("mixtral-8x22b-v0.1", 140_620_634_112, 39_152_031_744),
        ("mixtral-8x22b-v0.3", 140_630_071_296, 39_161_468_928),
    ],
)
def test_presets_have_the_published_sizes(name: str, total: int, active: int) -> None:
    config = preset(name)
    if name != "mixtral-8x22b-v0.1":  # the same with fewer words
        assert sum(leaf.size for leaf in weight_shapes(config).values()) == total
    assert (config.n_params, config.n_active_params) == (total, active)
