"""The proof that the check can fail: faults are planted, and each must be found and placed.

A fault changes the weights as a wrong conversion would, the config as a wrong reading
would, or the code as a wrong port would; the reference stays as it is. Beside each stands
who would have let it pass: the tolerances of published ports, each at the length and window
of its own test, on a freshly initialised model.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import softmax

from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import is_norm
from lechat_jax.formats import names
from parity.check.faults.code import CODE
from parity.check.faults.experts import EXPERTS
from parity.check.faults.latent import LATENT
from parity.check.faults.plant import Planted
from parity.check.faults.positions import POSITIONS
from parity.check.faults.vision import VISION
from parity.check.faults.weights import CONFIG, WEIGHTS
from parity.check.oracles.lechat_jax import JaxOracle
from parity.check.oracles.lechat_torch import TorchOracle
from parity.check.probes import PROBES, Inputs, Model
from parity.check.verdict import Fault, Stage
from parity.check.whole_model import Comparison
from parity.random_models import random_weights

FAULTS: tuple[Planted, ...] = (*WEIGHTS, *CONFIG, *CODE, *POSITIONS, *EXPERTS, *LATENT, *VISION)


class Criterion(NamedTuple):
    """What a published parity test asks for.

    Attributes:
        name: whose test it is.
        T: tokens in its sequence.
        window: of its model.
        passes: whether logits, float32, are close enough to the reference's.
    """

    name: str
    T: int
    window: int
    passes: Callable[[Float[np.ndarray, "B T V"], Float[np.ndarray, "B T V"]], bool]


def _probabilities(logits: Float[np.ndarray, "B T V"]) -> Float[np.ndarray, "B T V"]:
    return softmax(logits, axis=-1)


# tests/test_modeling_flax_common.py of transformers 4; tests/test_mistral.py of levanter;
# tests/modules/test_utils/comparators.py of EasyDeL; tests/test_model.py of litgpt, the only
# one whose text is longer than its window.
CRITERIA = (
    Criterion("FlaxMistral", 7, 7, lambda a, b: np.allclose(a, b, rtol=0, atol=1e-5)),
    Criterion(
        "levanter",
        128,
        4096,
        lambda a, b: np.allclose(_probabilities(a), _probabilities(b), 1e-4, 1e-4),
    ),
    Criterion("EasyDeL", 128, 4096, lambda a, b: np.allclose(a, b, rtol=0, atol=0.125)),
    Criterion("litgpt", 20, 10, lambda a, b: np.allclose(a, b, rtol=1.3e-6, atol=1e-5)),
)


def suite(model: Model, inputs: Inputs) -> Iterator[Fault]:
    """Each fault planted in turn, and what the check and the published tests make of it."""
    comparisons: dict[tuple, Comparison] = {}
    fresh = _FreshModels(model.config)
    for fault in FAULTS:
        key = tuple(fault.base.items())
        if key not in comparisons:
            config = dataclasses.replace(model.config, **fault.base)
            right = Model(config, random_weights(config)) if fault.base else model
            is_new = config.windows != model.config.windows
            comparisons[key] = Comparison(right, right, Inputs.of(config) if is_new else inputs)
        # No published test shows an image or has latents, so of these faults nothing is said.
        is_unheard = fault.base.get("vision") or fault.base.get("latent_attention")
        content = () if is_unheard else fresh.content(fault)
        yield _found(fault, first_divergence(comparisons[key], fault), content)


def suite_of_checkpoint(model: Model, inputs: Inputs) -> Iterator[Fault | str]:
    """Each fault that a model can have, planted in it; of the others, their names.

    A model can't have a fault that its shape has no place for, nor one that changes no bit of
    what it computes: swapped norms that are both all ones, say.
    """
    right = Comparison(model, model, inputs)
    for fault in FAULTS:
        if not fault.is_possible(model.config) or _changes_no_weight(fault, model):
            yield fault.name
            continue
        found = first_divergence(right, fault)
        if found is None and _changes_no_bit(right, fault):
            yield fault.name
        else:
            yield _found(fault, found)


def _found(fault: Planted, found: Stage | None, missed_by: tuple[str, ...] = ()) -> Fault:
    return Fault(
        fault.name,
        fault.where,
        detected=found is not None,
        expected_stage=fault.expected,
        found_stage=found.label if found else None,
        missed_by=missed_by,
    )


def first_divergence(right: Comparison, fault: Planted) -> Stage | None:
    """The first stage that is not ok when lechat_jax has the fault; the rest is not computed."""
    with fault.plant(right.theirs, fault.layer) as wrong:
        comparison = Comparison(wrong, right.theirs, right.inputs, known=right)
        is_exact = fault.dtype == "float64"
        stages = (
            comparison.exact(transformers=False)
            if is_exact
            else comparison.rounded(fault.dtype, ())
        )
        return next((stage for stage in stages if not stage.ok), None)


def _changes_no_weight(fault: Planted, right: Model) -> bool:
    """Whether a fault of weights or config leaves both as they are."""
    if fault.where == "code":
        return False
    with fault.plant(right, fault.layer) as wrong:
        return wrong.config == right.config and all(
            np.array_equal(leaf, right.weights[name]) for name, leaf in wrong.weights.items()
        )


def _changes_no_bit(right: Comparison, fault: Planted) -> bool:
    """Whether lechat_jax computes the same with the fault, to the last bit."""
    before = right.answers("jax", fault.dtype)
    with fault.plant(right.theirs, fault.layer) as wrong:
        after = Comparison(wrong, right.theirs, right.inputs).answers("jax", fault.dtype)
        if fault.dtype != "float64":
            return np.array_equal(after.stages["norm.0"], before.stages["norm.0"])
        return all(result.rel == 0 for probe in PROBES for result in probe(after, before))


class _FreshModels:
    """Models as an initialiser leaves them, on which published tests are run.

    Weights have a deviation of 0.02 and norms are one, so attention is nearly uniform, and
    most mistakes hardly change the logits.
    """

    def __init__(self, config: MistralConfig) -> None:
        self.config = dataclasses.replace(config, n_layers=2, vocab_size=1000)
        self._right: dict[tuple, tuple[Model, np.ndarray]] = {}

    def content(self, fault: Planted) -> tuple[str, ...]:
        """The published tests that are content with a model that has the fault."""
        found: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        for _, T, window, _ in CRITERIA:
            if (T, window) not in found:
                found[T, window] = self._logits(fault, T, window)
        return tuple(c.name for c in CRITERIA if c.passes(*found[c.T, c.window]))

    def _logits(self, fault: Planted, T: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the faulty model and of the right one."""
        changes = {**fault.base, "sliding_window": window, "n_layers": self.config.n_layers}
        if isinstance(pattern := fault.base.get("sliding_window"), tuple):
            kept = (own and window for own in pattern[: self.config.n_layers])
            changes["sliding_window"] = tuple(kept)
        config = dataclasses.replace(self.config, **changes)
        tokens = np.random.default_rng(T).integers(config.vocab_size, size=(1, T))
        if (config, T) not in self._right:
            right = Model(config, _initial_weights(config))
            logits = TorchOracle(*right, "float32").forward(tokens)["logits"]
            self._right[config, T] = right, logits
        right, logits = self._right[config, T]
        with fault.plant(right, fault.layer) as wrong:
            return JaxOracle(*wrong, "float32").forward(tokens)["logits"], logits


def _initial_weights(config: MistralConfig) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        name: np.ones(shape, np.float32)
        if is_norm(name)
        else (0.02 * draw.standard_normal(shape)).astype(np.float32)
        for name, shape in names.shapes(config, "lechat").items()
    }
