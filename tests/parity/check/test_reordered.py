"""The reference with its vocabulary in another order is the same function, but for rounding."""

import numpy as np
import pytest

from parity.architectures import SMALL
from parity.check.oracles.interface import AdamW
from parity.check.oracles.lechat_torch import TorchOracle
from parity.check.oracles.reordered import Reordered
from parity.check.probes import Inputs
from parity.random_models import random_weights

INPUTS = Inputs.of(SMALL, 0)


@pytest.fixture(scope="module")
def both() -> tuple[TorchOracle, Reordered]:
    weights = random_weights(SMALL, 0)
    return TorchOracle(SMALL, weights, "float64"), Reordered(SMALL, weights, "float64")


def same(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_activations_gradients_and_steps_are_the_same(
    both: tuple[TorchOracle, Reordered],
) -> None:
    plain, other = both
    for name, leaf in plain.forward(INPUTS.tokens).items():
        same(other.forward(INPUTS.tokens)[name], leaf)
    for name, leaf in plain.gradients(INPUTS.steps[0]).by_weight.items():
        same(other.gradients(INPUTS.steps[0]).by_weight[name], leaf)
    steps = [oracle.train(INPUTS.steps[:2], AdamW(eps=1e-2)) for oracle in both]
    same(steps[0].losses, steps[1].losses)
    for name, leaf in steps[0].weights.items():
        same(steps[1].weights[name], leaf)


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
