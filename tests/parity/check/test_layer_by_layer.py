"""How the check judges a layer at a time, by answers whose errors are known."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference is PyTorch's")
pytest.importorskip("xformers", reason="the reference takes its masks from xformers")

from jaxtyping import Array

from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.formats.source import Source
from lechat_jax.model import mistral
from lechat_jax.model.rope import Rotations
from parity.architectures import SMALL
from parity.check.faults.plant import in_code
from parity.check.layer_by_layer import Part, Streamed
from parity.check.verdict import Stage
from parity.convert.open_source import open_source
from parity.random_models import random_weights

CONFIG = dataclasses.replace(SMALL, n_layers=5)
TOKENS = np.arange(24) % CONFIG.vocab_size
SAMPLED = (0, 2, 4)  # the layers whose float64 truth is computed: first, middle and last


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("deep") / "model"
    weights = {name: jnp.asarray(leaf) for name, leaf in random_weights(CONFIG).items()}
    save_weights(folder, CONFIG, weights, None)
    return open_source(str(folder))


class Scripted(Streamed):
    """Each implementation is off by so much in `mlp` of one layer, and a little everywhere else."""

    def __init__(self, source: Source, layer: int, errors: Mapping[str, float]) -> None:
        super().__init__(source, source, TOKENS, (0,), window=7)
        self.layer, self.errors, self.at, self.asked = layer, errors, -1, []

    def _answers(self, part: Part, is_sampled: bool) -> list[dict]:
        self.at += 1
        names = ("torch", "jax", "transformers", *(["truth"] if is_sampled else []))
        return [{name: self._stages(name) for name in names}]

    def _truth_of(self, part: Part, ids: np.ndarray, first: int) -> dict:
        self.asked.append(self.at)
        return self._stages("truth")

    def _stages(self, name: str) -> dict:
        truth = np.ones((1, TOKENS.size, CONFIG.dim))
        signs = np.where(np.arange(truth.size) % 2, 1.0, -1.0).reshape(truth.shape)
        # In steps of their own, so that none is the other.
        share = {"torch": 1e-6, "jax": -1e-6, "transformers": 1e-6, "truth": 0.0}[name]
        stages = dict.fromkeys(("attn.0", "mlp.0", "norm", "logits"), truth + share * signs)
        if self.at == self.layer and name in self.errors:
            stages["mlp.0"] = truth + self.errors[name] * signs
        return stages | {"stream": truth}


def red(streamed: Streamed) -> list[tuple[str, str]]:
    stages = streamed.run(lambda *_: None)
    return [(stage.label, stage.pair[0]) for stage in stages if not stage.ok]


@pytest.mark.parametrize("layer", SAMPLED)
@pytest.mark.parametrize("who", ["jax", "torch", "transformers"])
@pytest.mark.parametrize(("times", "ok"), [(2.45, True), (2.55, False)])
def test_where_the_truth_is_known_none_may_be_much_more_wrong_than_the_others(
    source: Source, layer: int, who: str, times: float, ok: bool
) -> None:
    found = red(Scripted(source, layer, {who: times * 1e-6}))
    assert found == ([] if ok else [(f"mlp.{layer}", who)])


def test_elsewhere_twice_that_is_allowed_and_the_truth_not_asked_for(source: Source) -> None:
    """Two results that are each off by one rounding are apart by two."""
    streamed = Scripted(source, 3, {"jax": 1e-6 - 4.95e-6})
    assert red(streamed) == []
    assert streamed.asked == []


def test_beyond_it_the_truth_decides(source: Source) -> None:
    streamed = Scripted(source, 3, {"jax": 1e-6 - 5.05e-6})
    assert red(streamed) == [("mlp.3", "jax")]
    assert streamed.asked == [3]

    rough = Scripted(source, 3, {"torch": 3e-6, "jax": -4e-6, "transformers": 3e-6})
    assert red(rough) == [], "a layer that all round more"
    assert rough.asked == [3]


def test_the_size_of_all_errors_does_not_matter(source: Source) -> None:
    alike = {"torch": 1e-2, "jax": -1e-2, "transformers": 1e-2}
    assert red(Scripted(source, 2, alike)) == []


def test_a_fault_that_shows_far_into_a_text_alone_is_found_there(source: Source) -> None:
    """Positions that end at a thousand, as those of a table that is too short."""

    def shortened(right: Callable[..., Rotations]) -> Callable[..., Rotations]:
        def rotations(positions: Array, *rest: Any) -> Rotations:
            return right(jnp.minimum(positions, 1000), *rest)

        return rotations

    fault = in_code("positions end at a thousand", "attn.0", (mistral, "rotations", shortened))
    streamed = Streamed(source, source, TOKENS, (0, 32744), window=7)
    with fault.plant(streamed.part_of_head(np.zeros((48, CONFIG.dim), np.float32)).ours, 0):
        stages: list[Stage] = list(streamed.run(lambda *_: None))
    found = {(stage.stage, stage.note) for stage in stages if not stage.ok}
    assert ("attn", "positions 32744 to 32767") in found
    assert {note for _, note in found} == {"positions 32744 to 32767"}
    assert {stage.note for stage in stages} == {
        "",  # of the embedding
        "positions 0 to 23",
        "positions 32744 to 32767",
    }
