"""Generation on many devices says what one device says; each holds its slice."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest

from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.config import MistralConfig
from lechat_jax.devices.mesh import make_mesh, on_mesh
from lechat_jax.errors import BadInput
from lechat_jax.generate.continuation import Sample
from lechat_jax.generate.decode import calls_for
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.sampling import Sampling
from lechat_jax.model.adapters import Adapters
from lechat_jax.model.binding import bind, weights_of
from lechat_jax.quantize.scheme import Format, quantize_weights, scheme_for
from lechat_jax.tokenizer.tokenizer import Tokenizer
from tests.support.models import random_model

WINDOWED = MistralConfig(
    dim=64,
    n_layers=2,
    n_heads=8,
    n_kv_heads=8,
    head_dim=8,
    hidden_dim=128,
    vocab_size=96,
    sliding_window=8,
    norm_eps=1e-5,
    rope_theta=1e4,
)
FULL = dataclasses.replace(WINDOWED, sliding_window=(8, None))
MIXTURE = dataclasses.replace(WINDOWED, n_experts=8, n_experts_per_token=2)
RNG = np.random.default_rng(0)
PROMPTS: list[list[int]] = [RNG.integers(3, 96, n).tolist() for n in (5, 17, 1, 9)]
GREEDY = Sampling(temperature=0)


def generator(config: MistralConfig, mesh: str | None, quantize: Format | None = None) -> Generator:
    weights = weights_of(random_model(config))
    if form := scheme_for(quantize, config):
        weights = quantize_weights(dict(weights), form)
    where = make_mesh(mesh) if mesh else None
    return Generator(bind(config, weights), chunk=4, context=64, mesh=where)


def assert_equal(found: list[Sample], expected: list[Sample]) -> None:
    assert [sample.ids for sample in found] == [sample.ids for sample in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "quantize", "mesh"),
    [
        (FULL, None, "fsdp=2,tp=4"),
        (FULL, "int4", "tp=8"),
        (MIXTURE, "int8", "tp=8"),
        pytest.param(FULL, "int8", "fsdp=2,tp=4", marks=pytest.mark.slow),
        pytest.param(MIXTURE, None, "tp=8", marks=pytest.mark.slow),
        pytest.param(MIXTURE, "int4", "fsdp=2,tp=4", marks=pytest.mark.slow),
    ],
)
def test_many_devices_say_what_one_says(
    config: MistralConfig, quantize: Format | None, mesh: str
) -> None:
    alone, shared = (generator(config, where, quantize) for where in (None, mesh))
    assert_equal(*(each.generate(PROMPTS, 12, GREEDY, eos_ids=()) for each in (shared, alone)))


def test_so_do_they_when_they_guess_ahead_and_draw() -> None:
    drawn = Sampling(temperature=0.9, seed=3)
    prompts: list[list[int]] = [[7, 8, 9] * 4, PROMPTS[0]]
    assert_equal(
        *(
            generator(WINDOWED, mesh).generate(prompts, 24, drawn, eos_ids=(), draft=3)
            for mesh in ("fsdp=2,tp=4", None)
        )
    )


def test_a_chat_goes_on_over_several_turns() -> None:
    config = dataclasses.replace(WINDOWED, vocab_size=32000)
    model = random_model(config)

    def answers(mesh: str | None) -> list[str]:
        where = make_mesh(mesh) if mesh else None
        made = Generator(model, Tokenizer.mistral_v1(), chunk=8, mesh=where)
        chat = made.chat(max_tokens=6, sampling=GREEDY)
        return ["".join(chat.say(text)) for text in ("Hello", "And you?")]

    assert answers("tp=8") == answers(None)


def test_each_device_holds_its_slice() -> None:
    made = generator(FULL, "fsdp=2,tp=4", "int4")
    whole = {name: leaf.nbytes for name, leaf in made.weights.items()}
    for name, leaf in made.weights.items():
        split = len(leaf.sharding.device_set) / len({str(s.index) for s in leaf.addressable_shards})
        is_norm = whole[name] == leaf.addressable_shards[0].data.nbytes
        assert split == (8 if is_norm else 2), name
    rows = made.continuous_batch(2)._state
    k = rows.cache.rings[0].k[0]
    assert k.sharding.shard_shape(k.shape) == (1, 2, *k.shape[2:])


def test_weights_go_from_the_file_to_their_slices(tmp_path: Path) -> None:
    save_weights(tmp_path / "model", WINDOWED, weights_of(random_model(WINDOWED)), None)
    made = Generator.from_checkpoint(tmp_path / "model", mesh="tp=4", batch=2)
    expected = Generator.from_checkpoint(tmp_path / "model")
    up = made.weights["blocks.0.mlp.up.kernel"]
    assert up.sharding.shard_shape(up.shape) == (32, 64)
    assert_equal(*(each.generate(PROMPTS[:2], 8, GREEDY) for each in (made, expected)))


def test_adapters_are_beside_them() -> None:
    weights = weights_of(random_model(WINDOWED))
    adapters = Adapters(rank=2, alpha=4.0, targets=("q", "down"))
    learned = {name: leaf + 0.1 for name, leaf in adapters.draw(WINDOWED, seed=1).items()}
    weights |= learned | adapters.scales(WINDOWED)
    found = [
        Generator(
            bind(WINDOWED, weights), chunk=4, mesh=make_mesh(mesh) if mesh else None
        ).generate(PROMPTS, 8, GREEDY, eos_ids=())
        for mesh in ("tp=8", None)
    ]
    assert_equal(*found)


def test_a_mesh_that_does_not_divide_the_model_is_refused() -> None:
    six = dataclasses.replace(WINDOWED, n_heads=6, n_kv_heads=6)
    with pytest.raises(BadInput, match="tp=4 of the mesh does not divide the 6 query heads"):
        generator(six, "tp=4")
    with pytest.raises(BadInput, match="has 16 devices and there are 8"):
        generator(WINDOWED, "tp=16")


def test_no_step_gathers_a_weight() -> None:
    made = generator(WINDOWED, "tp=8")
    call = calls_for(WINDOWED, made.weights, 1, (4,), 64, mesh=made.mesh)["decode"]
    with on_mesh(made.mesh):
        text = call.function.lower(*call.arguments).compile().as_text()
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text)
    sizes = [math.prod(int(n) for n in dims.split(",") if n) for dims in gathered]
    assert max(sizes, default=0) < WINDOWED.dim**2
    assert "all-reduce" in text
