"""Comparison of two implementations of one model, stage by stage, within budgets.

`Comparison.exact` is in float64, where they must agree; `Comparison.rounded` in another dtype,
where none may be more wrong than rounding makes the others. Both yield one `Stage` after the
other in the order of execution, so that whoever only wants to know where two models part can
stop at the first that is not ok.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.formats.configs.hugging_face import to_hugging_face
from parity.check.oracles.interface import Dtype, Implementation, Oracle
from parity.check.oracles.lechat_jax import JaxOracle
from parity.check.oracles.lechat_torch import TorchOracle
from parity.check.oracles.reordered import Reordered
from parity.check.oracles.transformers import TransformersOracle
from parity.check.probes import PROBES, Answers, Inputs, Model, Probe, Result, padding, trajectory
from parity.check.tolerances import EXACT, ROUNDINGS, SAME_ROUNDING, UNIT, flips, slack
from parity.check.verdict import Stage


class Comparison:
    """Two models side by side: `ours` in lechat_jax, `theirs` in the PyTorch implementations.

    Usually they are the same weights. An existing conversion is on trial when they are what
    it was made from and what it made. `known` is a comparison of the same `theirs`, whose float64
    answers are used again.
    """

    def __init__(
        self, ours: Model, theirs: Model, inputs: Inputs, known: "Comparison | None" = None
    ) -> None:
        self.ours, self.theirs, self.inputs = ours, theirs, inputs
        self._known = known
        self.without = lacking(theirs.config)  # why transformers cannot run it, if so
        self._answers: dict[tuple[Implementation, Dtype], Answers] = {}

    @property
    def implementations(self) -> tuple[Implementation, ...]:
        """Those that can run this model."""
        return ("torch", "jax") if self.without else ("torch", "jax", "transformers")

    def answers(self, name: Implementation, dtype: Dtype) -> Answers:
        """What that implementation makes of the inputs in that dtype."""
        if (name, dtype) not in self._answers:
            if name == "jax":
                oracle: Oracle = JaxOracle(*self.ours, dtype)
            elif name == "torch":
                oracle = TorchOracle(*self.theirs, dtype)
            else:
                oracle = TransformersOracle(*self.theirs, dtype)
            self._answers[name, dtype] = Answers(oracle, self.inputs)
        return self._answers[name, dtype]

    @property
    def truth(self) -> Answers:
        """What lechat_torch answers in float64."""
        return self._known.truth if self._known else self.answers("torch", "float64")

    @property
    def moved(self) -> Answers:
        """What lechat_torch answers in float64 when each weight is rounded once more.

        And when the vocabulary is in another order, in which its sums round otherwise.
        """
        return self._known.moved if self._known else self._moved

    @functools.cached_property
    def _moved(self) -> Answers:
        return Answers(Reordered(*rounded_once_more(self.theirs), "float64"), self.inputs)

    def exact(self, *, transformers: bool = True) -> Iterator[Stage]:
        """Every stage in float64: lechat_jax, and transformers, against lechat_torch.

        Transformers' norms, rotations and softmax are float32 whatever the dtype, so it is held
        to what PyTorch loses in float32. Its padding is no number in float64, since what it adds
        to the scores of padding is not finite there.
        """
        errors, rounding = Errors("float64"), Errors("float32")
        for probe in PROBES:
            moved = list(probe(self.moved, self.truth))
            errors.note("moved", moved)
            for result in probe(self.answers("jax", "float64"), self.truth):
                yield result.stage("jax", "float64", "torch", errors.allowed("jax", result))
            if transformers and not self.without and probe not in (trajectory, padding):
                rounding.note("moved", moved)
                rounding.note("torch", probe(self.answers("torch", "float32"), self.truth))
                for result in probe(self.answers("transformers", "float64"), self.truth):
                    budget = rounding.allowed("transformers", result)
                    yield result.stage("transformers", "float64", "torch", budget)

    def rounded(self, dtype: Dtype, probes: Sequence[Probe] = PROBES) -> Iterator[Stage]:
        """Every stage of the probes in `dtype`, each implementation against the float64 truth.

        Each is judged by what rounding makes of the others, PyTorch's own among them. Trajectories
        are left to float64: what Adam makes of rounding differs thirtyfold between right programs.

        Raises:
            BadInput: `dtype` is float64, the truth itself.
        """
        if dtype == "float64":
            raise BadInput("float64 is the truth that other types are measured by")
        answers = {name: self.answers(name, dtype) for name in self.implementations}
        if dtype == "bfloat16":
            yield _norms(answers["jax"], answers["torch"])
        errors = Errors(dtype)
        for probe in probes:
            if probe is trajectory:
                continue  # each step multiplies rounding, in one program more than in another
            errors.note("moved", probe(self.moved, self.truth))
            found: dict[Implementation, list[Result]] = {}
            for name in self.implementations:
                found[name] = list(probe(answers[name], self._truth_of(name)))
                errors.note(name, found[name])
            for name, results in found.items():
                for result in results:
                    truth = self._truth_of(name).oracle.name
                    yield result.stage(name, dtype, truth, errors.allowed(name, result))

    def _truth_of(self, name: Implementation) -> Answers:
        """The float64 answers of another than the one that is judged."""
        return self.answers("jax", "float64") if name == "torch" else self.truth


class Errors:
    """Errors of several programs on the same questions, each the yardstick of the others.

    `moved` is the reference in float64, its weights rounded once more. In another dtype that
    has as much more effect as its rounding is coarser.
    """

    def __init__(self, dtype: Dtype) -> None:
        self.dtype: Dtype = dtype
        self._errors: dict[tuple[str, str], dict[str, float]] = {}

    def note(self, name: str, results: Iterable[Result]) -> None:
        """Remembers how wrong that one is."""
        scale = UNIT[self.dtype] / UNIT["float64"] if name == "moved" else 1.0
        for result in results:
            self._errors.setdefault(result.key, {})[name] = scale * result.rel

    def allowed(self, name: str, result: Result) -> float:
        """How wrong that one may be: a little more than the worst of the others."""
        errors = self._errors[result.yardstick]
        others = max(error for other, error in errors.items() if other != name)
        factor = EXACT if self.dtype == "float64" else slack(result.label, result.note)
        least = ROUNDINGS * result.rounding * min(UNIT[self.dtype], UNIT["float32"])
        return max(factor * others, least)


def rounded_once_more(model: Model) -> Model:
    """The model with each weight moved to the next larger or smaller float64 number."""
    draw = np.random.default_rng(0)
    return Model(
        model.config,
        {
            name: leaf * (1 + 2 * UNIT["float64"] * draw.choice([-1.0, 1.0], size=leaf.shape))
            for name, leaf in model.weights.items()
        },
    )


def lacking(config: MistralConfig) -> str:
    """Why transformers has no such model; nothing, if it has."""
    try:
        to_hugging_face(config, "float32", positions=None, bos_id=1, eos_id=2)
    except BadInput as error:
        return str(error)
    return ""


def _norms(found: Answers, other: Answers) -> Stage:
    """The first norm in both implementations, where they read the very same numbers.

    What stands for an image was rounded by its tower.
    """
    a, b = (x.stages["norm.0"] for x in (found, other))
    if found.inputs.pictures:
        is_same = np.all(found.stages["embed"] == other.stages["embed"], axis=-1)
        a, b = a[is_same][None], b[is_same][None]
    result = Result("norm.0", flips(a, b), a, b, note="both in bfloat16")
    return result.stage(found.oracle.name, found.oracle.dtype, other.oracle.name, SAME_ROUNDING)
