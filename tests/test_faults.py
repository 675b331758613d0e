"""That the check can fail: planted faults are found, placed, and gone when the context ends."""

import pytest

pytest.importorskip("torch", reason="the reference is PyTorch's")
pytest.importorskip("xformers", reason="the reference takes its masks from xformers")

from parity.answers import Model, Task
from parity.check import main
from parity.exam import Exam
from parity.faults import CRITERIA, FAULTS, first_divergence
from parity.lively import SMALL, lively_weights
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
)


@pytest.fixture(scope="module")
def exam() -> Exam:
    model = Model(SMALL, lively_weights(SMALL))
    return Exam(model, model, Task.of(SMALL))


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.name in QUICK], ids=lambda f: f.name)
def test_a_planted_fault_is_found_where_it_is(exam: Exam, fault: Planted) -> None:
    found = first_divergence(exam, fault)
    assert found is not None
    assert found.label == fault.expected


def test_a_fault_is_gone_when_it_was_looked_for(exam: Exam) -> None:
    for fault in FAULTS:
        if not fault.base:  # the others are possible in another model only
            with fault.plant(exam.theirs, fault.layer):
                pass
    again = Exam(exam.theirs, exam.theirs, exam.task, truth=exam.truth)
    assert all(stage.ok for stage in again.exact(transformers=False))


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
