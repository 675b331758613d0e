"""That the check can fail: planted faults are found, placed, and gone when the context ends."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference is PyTorch's")
pytest.importorskip("xformers", reason="the reference takes its masks from xformers")

from lechat_jax.checkpoint.weights import save_weights
from parity.architectures import ARCHITECTURES, SMALL
from parity.check import probes, whole_model
from parity.check.command import main
from parity.check.faults import suite
from parity.check.faults.plant import Planted
from parity.check.faults.suite import CRITERIA, FAULTS, first_divergence
from parity.check.oracles.lechat_jax import JaxOracle
from parity.check.probes import Inputs, Model
from parity.check.verdict import STAGES
from parity.check.whole_model import Comparison
from parity.random_models import random_weights

# Of each place, those that show early; all of them are in the slow test and in CI's own command.
QUICK = (
    "ids are one too high in the embedding",
    "one bit of one weight is flipped",
    "the final norm is all ones",
    "the head is tied to the embedding",
    "the window has one key more",
    "kv heads are tiled instead of grouped",
    "norms scale before they round",
    "the last token has no loss",
    "padding is seen",
    "YaRN's scale is not applied",
)


def exam_of(base: dict[str, Any]) -> Comparison:
    """Two layers of the small model with these changes, and the right answers."""
    key = tuple(base.items())
    if key not in EXAMS:
        pattern = base.get("sliding_window")  # which has an entry for each layer
        n_layers = len(pattern) if isinstance(pattern, tuple) else 2
        config = dataclasses.replace(SMALL, **{**base, "n_layers": n_layers})
        model = Model(config, random_weights(config))
        EXAMS[key] = Comparison(model, model, Inputs.of(config))
    return EXAMS[key]


EXAMS: dict[tuple, Comparison] = {}


@pytest.fixture
def small() -> Comparison:
    return exam_of({})


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.name in QUICK], ids=lambda f: f.name)
def test_a_planted_fault_is_found_where_it_is(fault: Planted) -> None:
    found = first_divergence(exam_of(fault.base), fault)
    assert found is not None
    assert found.label == fault.expected


def test_a_fault_is_sought_in_models_that_can_have_it() -> None:
    ministral_3 = dataclasses.replace(ARCHITECTURES["ministral-3"], n_layers=9, rope_theta=1e6)
    can = {
        kind: {f.name for f in FAULTS if f.needs(SMALL if kind == "mistral" else ministral_3)}
        for kind in ("mistral", "ministral-3")
    }
    assert can["ministral-3"] - can["mistral"] > {"there is no YaRN", "queries do not grow"}
    assert can["mistral"] - can["ministral-3"] == {  # which has no window, and is tied
        "the window has one key more",
        "the window has one key less",
        "there is no window",
        "the ring is one slot short",
        "the ring does not wrap",
        "the head is tied to the embedding",
        "ids are one too high in the head",
    }
    assert "every layer has the window of some" not in can["ministral-3"]


def test_a_fault_is_gone_when_it_was_looked_for(small: Comparison) -> None:
    for fault in FAULTS:
        if not fault.base:  # the others are possible in another model only
            with fault.plant(small.theirs, fault.layer):
                pass
    again = Comparison(small.theirs, small.theirs, small.inputs, known=small)
    assert all(stage.ok for stage in again.exact(transformers=False))


def test_a_fault_deep_inside_reaches_the_cached_passes_and_does_not_outlive_its_context(
    small: Comparison,
) -> None:
    """A layer over a ring is traced once for all programs: that must be forgotten, twice."""
    (softmax,) = (fault for fault in FAULTS if fault.name == "the softmax is bfloat16")
    model, inputs = small.theirs, small.inputs

    def cached() -> np.ndarray:
        oracle = JaxOracle(model.config, model.weights, "float64")
        return oracle.cached(inputs.tokens, inputs.prompt, inputs.chunk)

    before = cached()
    with softmax.plant(model, softmax.layer):
        during = cached()
    assert np.max(np.abs(during - before)) > 1e-4
    np.testing.assert_array_equal(cached(), before)


def test_there_are_enough_of_them_and_all_are_named_once() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names)) >= 25
    assert set(QUICK) <= set(names)
    assert {fault.where for fault in FAULTS} == {"weights", "config", "code"}
    stages = {fault.expected.split(".")[0] for fault in FAULTS}
    assert stages == set(STAGES), "each stage is the first to be red for some fault"


def test_faults_are_planted_in_a_checkpoint_and_those_it_cannot_have_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swapped norms that are both all ones are no fault, nor is a head that is the embedding."""
    weights = random_weights(config := dataclasses.replace(SMALL, n_layers=2, tied_embeddings=True))
    ones = {name: np.ones_like(leaf) for name, leaf in weights.items() if "norm" in name}
    arrays = {name: jnp.asarray(leaf) for name, leaf in (weights | ones).items()}
    save_weights(tmp_path / "model", config, arrays, None)
    names = (
        "the two norms of a layer are swapped",
        "norms scale before they round",
        "the head is tied to the embedding",
        "there is no YaRN",
        "two layers are swapped",
        "one bit of one weight is flipped",
        "the window has one key more",
    )
    monkeypatch.setattr(suite, "FAULTS", [fault for fault in FAULTS if fault.name in names])
    report = tmp_path / "report.json"
    assert main(["--faults", "--checkpoint", str(tmp_path / "model"), "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert [(fault["name"], fault["found_stage"]) for fault in found["faults"]] == [
        ("one bit of one weight is flipped", "mlp.1"),
        ("the window has one key more", "attn.0"),
    ]
    (note,) = (note for note in found["notes"] if "cannot be in this model" in note)
    assert all(name in note for name in names[:5])
    assert f"Faults planted in {tmp_path / 'model'}" in capsys.readouterr().out


def test_a_fault_that_is_not_found_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, since a check that misses a fault proves nothing."""
    config = dataclasses.replace(SMALL, n_layers=1)
    arrays = {name: jnp.asarray(leaf) for name, leaf in random_weights(config).items()}
    save_weights(tmp_path / "model", config, arrays, None)
    (fault,) = (fault for fault in FAULTS if fault.name == "keys and values are swapped")
    monkeypatch.setattr(suite, "FAULTS", [fault])
    monkeypatch.setattr(whole_model, "EXACT", 1e20)
    monkeypatch.setattr(whole_model, "PROBES", (probes.forward,))
    monkeypatch.setattr(suite, "PROBES", (probes.forward,))
    assert main(["--faults", "--checkpoint", str(tmp_path / "model")]) == 1
    assert "0 of 1 faults found" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_fault_is_found_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--faults"]) == 0
    said = capsys.readouterr().out
    assert all(criterion.name in said for criterion in CRITERIA)
