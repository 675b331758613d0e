"""That the check can fail: planted faults are found, placed, and gone when the context ends."""

import dataclasses
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference is PyTorch's")
pytest.importorskip("xformers", reason="the reference takes its masks from xformers")

from parity.answers import Model, Task
from parity.architectures import ARCHITECTURES, SMALL
from parity.check import main
from parity.exam import Exam
from parity.faults import CRITERIA, FAULTS, first_divergence
from parity.lively import lively_weights
from parity.oracle_jax import JaxOracle
from parity.planting import Planted
from parity.verdict import STAGES

# One of each stage and each place; all of them are in the slow test and in CI's own command.
QUICK = (
    "ids are one too high in the embedding",
    "one bit of one weight is flipped",
    "the final norm is all ones",
    "the head is tied to the embedding",
    "the window has one key more",
    "kv heads are tiled instead of grouped",
    "norms scale before they round",
    "the last token has no loss",
    "the head learns from the first chunk alone",
    "the ring is one slot short",
    "decoding starts one position late",
    "padding is seen",
    "the windows of the layers are one layer off",
    "YaRN's scale is not applied",
    "queries grow with every token",
    "the growth of queries starts anew with each chunk",
)


def exam_of(base: dict[str, Any]) -> Exam:
    """The small model with these changes, and the right answers."""
    key = tuple(base.items())
    if key not in EXAMS:
        config = dataclasses.replace(SMALL, **base)
        model = Model(config, lively_weights(config))
        EXAMS[key] = Exam(model, model, Task.of(config))
    return EXAMS[key]


EXAMS: dict[tuple, Exam] = {}


@pytest.fixture
def exam() -> Exam:
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
    assert can["mistral"] <= can["ministral-3"]
    assert "every layer has the window of some" not in can["ministral-3"]


def test_a_fault_is_gone_when_it_was_looked_for(exam: Exam) -> None:
    for fault in FAULTS:
        if not fault.base:  # the others are possible in another model only
            with fault.plant(exam.theirs, fault.layer):
                pass
    again = Exam(exam.theirs, exam.theirs, exam.task, known=exam)
    assert all(stage.ok for stage in again.exact(transformers=False))


def test_a_fault_deep_inside_reaches_the_cached_passes_and_does_not_outlive_its_context(
    exam: Exam,
) -> None:
    """A layer over a ring is traced once for all programs: that must be forgotten, twice."""
    (softmax,) = (fault for fault in FAULTS if fault.name == "the softmax is bfloat16")
    model, task = exam.theirs, exam.task

    def cached() -> np.ndarray:
        oracle = JaxOracle(model.config, model.weights, "float64")
        return oracle.cached(task.tokens, task.prompt, task.chunk)

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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_fault_is_found_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--faults"]) == 0
    said = capsys.readouterr().out
    assert all(criterion.name in said for criterion in CRITERIA)
