"""The reference with its vocabulary in another order is the same function, but for rounding."""

import dataclasses

import numpy as np
import pytest

from parity.architectures import SMALL
from parity.check import probes, whole_model
from parity.check.oracles.interface import AdamW
from parity.check.oracles.lechat_torch import TorchOracle
from parity.check.oracles.reordered import Reordered
from parity.check.probes import Inputs, Model
from parity.check.whole_model import Comparison
from parity.random_models import random_weights

INPUTS = Inputs.of(SMALL, 0)


@pytest.fixture(scope="module")
def both() -> tuple[TorchOracle, Reordered]:
    weights = random_weights(SMALL, 0)
    return TorchOracle(SMALL, weights, "float64"), Reordered(SMALL, weights, "float64")


def same(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_activations_gradients_and_steps_are_the_same(both: tuple[TorchOracle, Reordered]) -> None:
    adamw, steps = AdamW(eps=1e-2), INPUTS.steps[:2]
    stages = [oracle.forward(INPUTS.tokens) for oracle in both]
    gradients = [oracle.gradients(steps[0]).by_weight for oracle in both]
    trajectories = [oracle.train(steps, adamw) for oracle in both]
    same(trajectories[0].losses, trajectories[1].losses)
    for a, b in (stages, gradients, [of.weights for of in trajectories]):
        assert a.keys() == b.keys()
        for name, leaf in a.items():
            same(b[name], leaf)


def test_what_is_read_and_written_through_the_cache_is_the_same(
    both: tuple[TorchOracle, Reordered],
) -> None:
    plain, other = both
    read = INPUTS.tokens, INPUTS.prompt, INPUTS.chunk
    same(other.cached(*read), plain.cached(*read))
    asked = INPUTS.prompts, 6, INPUTS.chunk, INPUTS.context
    for a, b in zip(other.greedy(*asked), plain.greedy(*asked), strict=True):
        assert a.ids == b.ids
        same(np.array(a.logprobs), np.array(b.logprobs))


def test_thousands_of_equal_rows_are_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a trained model has them; with its vocabulary in one order alone they would be."""
    config = dataclasses.replace(SMALL, vocab_size=32_000, n_layers=1)
    weights = random_weights(config, 0)
    head = weights["head.kernel"] + 1
    head[1000:] = head[1000]
    model = Model(config, weights | {"head.kernel": head})
    inputs = Inputs.of(config, 0)
    monkeypatch.setattr(whole_model, "PROBES", (probes.forward, probes.loss, probes.gradients))

    def wrong() -> list[str]:
        stages = Comparison(model, model, inputs).exact(transformers=False)
        return [stage.note for stage in stages if not stage.ok]

    assert not wrong()
    monkeypatch.setattr(whole_model, "Reordered", TorchOracle)
    assert wrong()
