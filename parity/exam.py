"""The questions that two implementations of one model are asked, and how answers are judged.

`Exam.exact` asks in float64, where they must agree; `Exam.rounded` asks in another dtype,
where each must be as close to the float64 truth as PyTorch's own rounding allows. Both
yield one `Stage` after the other in the order of execution, so that whoever only wants to
know where two models part can stop at the first that is not ok.
"""

import functools
from collections.abc import Iterator

from lechat_jax.errors import BadInput
from parity.answers import GREEDY, TOPICS, Answers, Item, Model, Task, padding, trajectory
from parity.compare import (
    CEILING,
    EXACT,
    FEW,
    SAME_ROUNDING,
    SLACK,
    SLACK_OF_GRADIENTS,
    TRANSFORMERS_EXACT,
    relative,
)
from parity.oracle_jax import JaxOracle
from parity.oracle_torch import TorchOracle
from parity.oracle_transformers import TransformersOracle
from parity.oracles import Dtype, Implementation, Oracle
from parity.verdict import Stage


class Exam:
    """Two models side by side: `ours` in lechat_jax, `theirs` in the PyTorch implementations.

    Usually they are the same weights. An existing conversion is on trial when they are what
    it was made from and what it made.
    """

    def __init__(
        self, ours: Model, theirs: Model, task: Task, truth: Answers | None = None
    ) -> None:
        self.ours, self.theirs, self.task = ours, theirs, task
        self._truth = truth
        self.has_transformers = not isinstance(theirs.config.sliding_window, tuple)
        self._oracles: dict[tuple[Implementation, Dtype], Oracle] = {}

    @property
    def implementations(self) -> tuple[Implementation, ...]:
        """Those that can run this model."""
        return ("torch", "jax", "transformers") if self.has_transformers else ("torch", "jax")

    def oracle(self, name: Implementation, dtype: Dtype) -> Oracle:
        """That implementation in that dtype, made when first asked for."""
        if (name, dtype) not in self._oracles:
            if name == "jax":
                made: Oracle = JaxOracle(*self.ours, dtype)
            else:
                kind = {"torch": TorchOracle, "transformers": TransformersOracle}[name]
                made = kind(*self.theirs, dtype)
            self._oracles[name, dtype] = made
        return self._oracles[name, dtype]

    @functools.cached_property
    def truth(self) -> Answers:
        """What lechat_torch answers in float64, unless it was known before."""
        return self._truth or Answers(self.oracle("torch", "float64"), self.task)

    @functools.cached_property
    def other_truth(self) -> Answers:
        """What lechat_jax answers in float64; it judges lechat_torch's rounding."""
        return Answers(self.oracle("jax", "float64"), self.task)

    def exact(self, *, transformers: bool = True) -> Iterator[Stage]:
        """Every stage in float64: lechat_jax, and transformers, against lechat_torch."""
        ours = [(self.other_truth, EXACT)]
        if transformers and self.has_transformers:
            peer = Answers(self.oracle("transformers", "float64"), self.task)
            ours.append((peer, TRANSFORMERS_EXACT))
        for topic in TOPICS:
            for answers, budget in ours:
                # transformers' softmax is float32 whatever the dtype, where the lowest number
                # of float64 is minus infinity, so a padded row is no number.
                if answers.oracle.name == "transformers" and topic in (trajectory, padding):
                    continue
                for item in topic(answers, self.truth):
                    yield item.stage(answers.oracle.name, "float64", "torch", budget)

    def rounded(self, dtype: Dtype) -> Iterator[Stage]:
        """Every stage in `dtype`, each implementation against the float64 truth.

        Raises:
            BadInput: `dtype` is float64, the truth itself.
        """
        if dtype == "float64":
            raise BadInput("float64 is the truth that other types are measured by")
        answers = {
            name: Answers(self.oracle(name, dtype), self.task) for name in self.implementations
        }
        if dtype == "bfloat16":
            yield _norms(answers["jax"], answers["torch"])
        errors: dict[tuple[str, str], float] = {}  # PyTorch's own, by which JAX is measured
        for topic in TOPICS:
            for name, found in answers.items():
                if topic is trajectory and (dtype != "float32" or name == "transformers"):
                    continue  # nobody trains weights that are kept in bfloat16
                truth = self.other_truth if name == "torch" else self.truth
                for item in topic(found, truth):
                    budget = CEILING[dtype]
                    if name == "torch":
                        errors[item.key] = item.rel
                    else:
                        budget = min(budget, _allowed(item, errors))
                    yield item.stage(name, dtype, truth.oracle.name, budget)


def _allowed(item: Item, errors: dict[tuple[str, str], float]) -> float:
    """What an implementation may be wrong by where PyTorch is wrong by so much."""
    if item.label == "loss":  # one number may be right by luck; it is off by what logits are
        return SLACK * errors["logits", ""]
    if item.note == GREEDY:  # the worst of some tokens, in texts that need not be the same
        return FEW * SLACK * errors["decode", ""]
    slack = SLACK_OF_GRADIENTS if item.label.startswith("grad") else SLACK
    return slack * errors[item.key]


def _norms(found: Answers, other: Answers) -> Stage:
    """The first norm in both implementations, which read the very same numbers."""
    a, b = found.stages["norm.0"], other.stages["norm.0"]
    item = Item("norm.0", relative(a, b), a, b, note="both in bfloat16")
    return item.stage(found.oracle.name, found.oracle.dtype, other.oracle.name, SAME_ROUNDING)
