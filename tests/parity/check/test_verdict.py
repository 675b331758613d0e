"""What counts as equal, where a divergence is said to begin, and JSON that any reader takes."""

import itertools
import json
import math
import random
from typing import Any

import pytest

from parity.check.verdict import STAGES, Fault, FaultReport, Stage, Verdict

PAIR = ("jax", "torch")
EXECUTION = [
    *("patches", "vision.0", "vision.1", "projector"),
    *("embed", "attn.0", "mlp.0", "attn.1", "mlp.1", "attn.2", "mlp.2", "norm", "logits"),
    *("loss", "grad", "trajectory", "prefill", "decode", "padding"),
]


def stage(label: str = "logits", rel: float = 1e-12, **fields: Any) -> Stage:
    name, _, layer = label.partition(".")
    given = {"dtype": "float64", "pair": PAIR, "budget": 1e-11} | fields
    return Stage(name, int(layer) if layer else None, rel=rel, **given)


def verdict(*stages: Stage) -> Verdict:
    return Verdict("tiny", stages)


def strict(value: object) -> Any:
    """What a reader of JSON that knows no NaN makes of it."""
    return json.loads(json.dumps(value, allow_nan=False))


# --- one stage ---


@pytest.mark.parametrize(
    ("rel", "budget", "ok"),
    [
        (0.9e-11, 1e-11, True),
        (1e-11, 1e-11, True),
        (1.1e-11, 1e-11, False),
        (0.0, 0.0, True),  # bit for bit
        (5e-324, 0.0, False),
        (math.nan, 1.0, False),
        (math.inf, math.inf, False),
        (0.0, math.nan, False),
    ],
)
def test_a_stage_is_ok_within_its_budget_and_never_when_it_is_no_number(
    rel: float, budget: float, ok: bool
) -> None:
    assert stage(rel=rel, budget=budget).ok is ok


@pytest.mark.parametrize(
    ("rel", "budget", "share"),
    [
        (2.0, 4.0, 0.5),
        (8.0, 4.0, 2.0),
        (0.0, 0.0, 0.0),
        (1e-300, 0.0, math.inf),
        (math.nan, 4.0, math.inf),
        (4.0, math.nan, math.inf),
        (math.inf, math.inf, math.inf),
    ],
)
def test_the_share_of_the_budget_is_a_number_or_infinite(
    rel: float, budget: float, share: float
) -> None:
    assert stage(rel=rel, budget=budget).share == share


def test_a_stage_is_labelled_with_its_layer() -> None:
    assert stage("attn.0").label == "attn.0"
    assert stage("mlp.12").label == "mlp.12"
    assert stage("logits").label == "logits"


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown stage 'attention'; it is one of patches, vision"):
        stage("attention")


# --- a verdict ---


def test_equal_is_all_of_them_and_at_least_one() -> None:
    assert verdict(stage("embed"), stage("logits")).equal
    assert not verdict(stage("embed"), stage("logits", rel=1.0)).equal
    assert not verdict(stage("embed"), stage("logits", rel=math.nan)).equal
    assert not verdict().equal


def test_stages_sort_as_the_model_executes_them() -> None:
    stages = [stage(label) for label in EXECUTION]
    random.Random(0).shuffle(stages)
    assert [s.label for s in sorted(stages, key=lambda s: s.order)] == EXECUTION
    assert {s.stage for s in stages} == set(STAGES)


@pytest.mark.parametrize(("first", "later"), list(itertools.pairwise(EXECUTION)))
def test_the_first_divergence_is_the_first_executed_not_the_largest(first: str, later: str) -> None:
    small, large = stage(first, rel=1e-9), stage(later, rel=1e3)
    assert verdict(large, small).first_divergence == small
    assert verdict(large, stage(first)).first_divergence == large


def test_the_tenth_layer_comes_after_the_second() -> None:
    assert verdict(stage("mlp.10", rel=1), stage("attn.2", rel=1)).first_divergence == stage(
        "attn.2", rel=1
    )


def test_of_one_stage_the_most_exact_dtype_is_the_first_divergence() -> None:
    half, single, double = (
        stage("mlp.1", rel=1.0, dtype=dtype) for dtype in ("bfloat16", "float32", "float64")
    )
    assert verdict(half, single, double).first_divergence == double
    assert verdict(half, single).first_divergence == single
    earlier = stage("attn.1", rel=1.0, dtype="bfloat16")
    assert verdict(half, single, double, earlier).first_divergence == earlier


def test_nothing_diverges_where_all_is_equal() -> None:
    assert verdict(stage("embed"), stage("logits")).first_divergence is None


def test_a_verdict_has_the_keys_that_scripts_read() -> None:
    found = Verdict(
        title="tiny",
        stages=(
            stage("attn.0", rel=0.031, position=7, note="eager", model="ministral"),
            stage("loss", dtype="float32", pair=("torch", "transformers")),
        ),
        notes=("seed 0",),
        hint="window off by one",
        seconds=1.5,
        machine="two cores",
    )
    attn = {
        "stage": "attn",
        "layer": 0,
        "dtype": "float64",
        "pair": ["jax", "torch"],
        "rel": 0.031,
        "budget": 1e-11,
        "ok": False,
        "position": 7,
        "note": "eager",
        "model": "ministral",
    }
    loss = {
        "stage": "loss",
        "layer": None,
        "dtype": "float32",
        "pair": ["torch", "transformers"],
        "rel": 1e-12,
        "budget": 1e-11,
        "ok": True,
        "position": None,
        "note": "",
        "model": "",
    }
    assert strict(found.to_dict()) == {
        "title": "tiny",
        "equal": False,
        "first_divergence": attn,
        "stages": [attn, loss],
        "notes": ["seed 0"],
        "hint": "window off by one",
        "seconds": 1.5,
        "machine": "two cores",
    }


def test_without_a_divergence_json_says_null() -> None:
    found = strict(verdict(stage()).to_dict())
    assert found["equal"] is True
    assert found["first_divergence"] is None


@pytest.mark.parametrize("rel", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_null_in_json_and_not_ok(rel: float) -> None:
    found = strict(verdict(stage(rel=rel)).to_dict())
    assert found["stages"][0]["rel"] is None
    assert found["stages"][0]["ok"] is False
    assert found["first_divergence"]["rel"] is None


# --- planted faults ---


def fault(detected: bool = True, found: str | None = "attn.0") -> Fault:
    return Fault("window one wider", "config", detected, "attn.0", found, ("levanter",))


def test_a_fault_counts_when_it_is_found_where_it_is() -> None:
    assert fault().ok
    assert not fault(found="mlp.0").ok
    assert not fault(detected=False, found=None).ok
    assert not fault(detected=False).ok


def test_a_report_of_faults_needs_all_of_them_and_at_least_one() -> None:
    assert FaultReport((fault(), fault())).all_found
    assert not FaultReport((fault(), fault(found="mlp.0"))).all_found
    assert not FaultReport(()).all_found


def test_a_report_of_faults_has_the_keys_that_scripts_read() -> None:
    report = FaultReport(
        (fault(detected=False, found=None),),
        ("levanter",),
        2.5,
        "two cores",
        "Faults planted in DIR",
        ("a note",),
    )
    assert strict(report.to_dict()) == {
        "title": "Faults planted in DIR",
        "notes": ["a note"],
        "all_found": False,
        "faults": [
            {
                "name": "window one wider",
                "where": "config",
                "detected": False,
                "expected_stage": "attn.0",
                "found_stage": None,
                "missed_by": ["levanter"],
            }
        ],
        "criteria": ["levanter"],
        "seconds": 2.5,
        "machine": "two cores",
    }
