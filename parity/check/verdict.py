"""Verdict of a parity check: stages with their errors and budgets.

Standard library only, so that a script can read and judge a report without JAX or torch.
"""

import dataclasses
import math
from typing import Any

STAGES = (
    *("patches", "vision", "projector"),
    *("embed", "attn", "mlp", "norm", "logits", "loss", "grad", "trajectory"),
    *("prefill", "decode", "padding"),
)
"""Stages in the order of execution; `attn` and `mlp` alternate layer by layer.

The first three are of the vision tower: its patches, its layers, and what the decoder is given.
"""

DTYPES = ("float64", "float32", "bfloat16")
"""Dtypes of the comparisons, the strictest first."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One comparison of two implementations at one point of the model.

    Attributes:
        stage: one of `STAGES`.
        layer: which block, from 0; `None` where the stage belongs to no block.
        dtype: format of the arithmetic that is judged.
        pair: two of `jax`, `torch`, `transformers`. In float64 they are each other's
            oracle; in any other dtype the first is judged against the float64 result of
            the second, which may be its own.
        rel: relative root mean square error; NaN and infinity are never ok.
        budget: the largest `rel` that is ok.
        position: the first token position over budget, if the stage has positions.
        note: what a reader of the figure should know, or nothing.
        model: which of several that were checked, or nothing.

    Raises:
        ValueError: there is no such stage.
    """

    stage: str
    layer: int | None
    dtype: str
    pair: tuple[str, str]
    rel: float
    budget: float
    position: int | None = None
    note: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"unknown stage {self.stage!r}; it is one of {', '.join(STAGES)}")

    @property
    def ok(self) -> bool:
        """Whether the error is finite and within the budget."""
        return math.isfinite(self.rel) and bool(self.rel <= self.budget)

    @property
    def share(self) -> float:
        """Error over budget: too much above 1, infinite where the error is not finite."""
        if not math.isfinite(self.rel) or math.isnan(self.budget):
            return math.inf
        if self.budget <= 0:  # exact equality is asked for
            return 0.0 if self.ok else math.inf
        return float(self.rel / self.budget)

    @property
    def label(self) -> str:
        """Label of the stage, with its layer if it has one.

        >>> Stage("attn", 2, "float64", ("jax", "torch"), 0.0, 1e-11).label
        'attn.2'
        """
        return self.stage if self.layer is None else f"{self.stage}.{self.layer}"

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Sort key: by the order of execution, then by `DTYPES`."""
        layer = -1 if self.layer is None else self.layer
        step = STAGES.index(self.stage)
        # The blocks are one phase, in which the layer counts before the stage.
        phase = STAGES.index("attn") if self.stage in ("attn", "mlp") else step
        dtype = DTYPES.index(self.dtype) if self.dtype in DTYPES else len(DTYPES)
        return phase, layer, step, dtype

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: what is not finite is `None`, and not ok."""
        return {
            "stage": self.stage,
            "layer": self.layer,
            "dtype": self.dtype,
            "pair": list(self.pair),
            "rel": _number(self.rel),
            "budget": _number(self.budget),
            "ok": self.ok,
            "position": self.position,
            "note": self.note,
            "model": self.model,
        }


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Verdict of one check: all its stages, and what they are of.

    Attributes:
        title: what was checked, in one line.
        stages: the comparisons, in any order.
        notes: sentences for the reader.
        hint: the fault whose pattern was recognised, such as `window off by one`.
        seconds: how long the check took.
        machine: in one line.
    """

    title: str
    stages: tuple[Stage, ...]
    notes: tuple[str, ...] = ()
    hint: str = ""
    seconds: float = 0.0
    machine: str = ""

    @property
    def equal(self) -> bool:
        """Whether every stage is ok; without any, nothing has been shown."""
        return bool(self.stages) and all(stage.ok for stage in self.stages)

    @property
    def first_divergence(self) -> Stage | None:
        """The first stage that is not ok, in the order of execution, whatever its dtype.

        Where one stage fails in several dtypes it is the most exact of them.
        """
        return min((s for s in self.stages if not s.ok), key=lambda s: s.order, default=None)

    def to_dict(self) -> dict[str, Any]:
        """The verdict as strict JSON."""
        first = self.first_divergence
        return {
            "title": self.title,
            "equal": self.equal,
            "first_divergence": first and first.to_dict(),
            "stages": [stage.to_dict() for stage in self.stages],
            "notes": list(self.notes),
            "hint": self.hint,
            "seconds": _number(self.seconds),
            "machine": self.machine,
        }


@dataclasses.dataclass(frozen=True)
class Fault:
    """Result of one planted fault: whether and where the check found it.

    Attributes:
        name: what was changed.
        where: `weights`, `config` or `code`.
        detected: whether the check turned red.
        expected_stage: label of the stage where it must show first; see `Stage.label`.
        found_stage: label of the stage where it did, if anywhere.
        missed_by: published criteria that would have let it pass.
    """

    name: str
    where: str
    detected: bool
    expected_stage: str
    found_stage: str | None
    missed_by: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it was found at the expected stage."""
        return self.detected and self.found_stage == self.expected_stage

    def to_dict(self) -> dict[str, Any]:
        """The fault as strict JSON."""
        return dataclasses.asdict(self) | {"missed_by": list(self.missed_by)}


@dataclasses.dataclass(frozen=True)
class FaultReport:
    """Report on all planted faults.

    Attributes:
        faults: in the order they were planted.
        criteria: the published criteria that were tried on each.
        seconds: how long it all took.
        machine: in one line.
        title: in which model they were planted, in one line.
        notes: sentences for the reader.
    """

    faults: tuple[Fault, ...]
    criteria: tuple[str, ...] = ()
    seconds: float = 0.0
    machine: str = ""
    title: str = "Planted faults"
    notes: tuple[str, ...] = ()

    @property
    def all_found(self) -> bool:
        """Whether every fault was found at its stage; without any, nothing has been shown."""
        return bool(self.faults) and all(fault.ok for fault in self.faults)

    def to_dict(self) -> dict[str, Any]:
        """The report as strict JSON."""
        return {
            "title": self.title,
            "all_found": self.all_found,
            "faults": [fault.to_dict() for fault in self.faults],
            "criteria": list(self.criteria),
            "notes": list(self.notes),
            "seconds": _number(self.seconds),
            "machine": self.machine,
        }


def _number(value: float) -> float | None:
    """Python float, or `None` if it is not finite, which JSON cannot say."""
    return float(value) if math.isfinite(value) else None
