"""The questions that two implementations of one model are asked, and how answers are judged.

`Exam.exact` asks in float64, where they must agree; `Exam.rounded` asks in another dtype,
where each must be as close to the float64 truth as PyTorch's own rounding allows. Both
yield one `Stage` after the other in the order of execution, so that whoever only wants to
know where two models part can stop at the first that is not ok.
"""

from collections.abc import Iterator, Sequence

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from parity.answers import GREEDY, TOPICS, Answers, Item, Model, Task, Topic, padding, trajectory
from parity.compare import (
    CEILING,
    EXACT,
    FEW,
    SAME_ROUNDING,
    SLACK,
    SLACK_OF_GRADIENTS,
    relative,
)
from parity.configs import to_hugging_face
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
        self._errors: dict[tuple[str, str], float] = {}  # of PyTorch in float32
        self.without = lacking(theirs.config)  # why transformers cannot run it, if so
        self._answers: dict[tuple[Implementation, Dtype], Answers] = {}

    @property
    def implementations(self) -> tuple[Implementation, ...]:
        """Those that can run this model."""
        return ("torch", "jax") if self.without else ("torch", "jax", "transformers")

    def answers(self, name: Implementation, dtype: Dtype) -> Answers:
        """What that implementation makes of the task in that dtype."""
        if (name, dtype) not in self._answers:
            if name == "jax":
                oracle: Oracle = JaxOracle(*self.ours, dtype)
            elif name == "torch":
                oracle = TorchOracle(*self.theirs, dtype)
            else:
                oracle = TransformersOracle(*self.theirs, dtype)
            self._answers[name, dtype] = Answers(oracle, self.task)
        return self._answers[name, dtype]

    @property
    def truth(self) -> Answers:
        """What lechat_torch answers in float64, unless it was known before."""
        return self._truth or self.answers("torch", "float64")

    def exact(self, *, transformers: bool = True) -> Iterator[Stage]:
        """Every stage in float64: lechat_jax, and transformers, against lechat_torch."""
        for topic in TOPICS:
            for item in topic(self.answers("jax", "float64"), self.truth):
                yield item.stage("jax", "float64", "torch", EXACT)
            if transformers and not self.without and topic not in (trajectory, padding):
                yield from self._transformers(topic)

    def _transformers(self, topic: Topic) -> Iterator[Stage]:
        """Transformers in float64, with what PyTorch loses in float32 for a budget.

        Whatever the dtype, its norms, rotations and softmax are float32. Its padding is no
        number in float64, since what it adds to the scores of padding is not finite there.
        """
        rounding = topic(self.answers("torch", "float32"), self.truth)
        self._errors |= {item.key: item.rel for item in rounding}
        for item in topic(self.answers("transformers", "float64"), self.truth):
            yield item.stage("transformers", "float64", "torch", _allowed(item, self._errors))

    def rounded(self, dtype: Dtype, topics: Sequence[Topic] = TOPICS) -> Iterator[Stage]:
        """Every stage of the topics in `dtype`, each implementation against the float64 truth.

        Raises:
            BadInput: `dtype` is float64, the truth itself.
        """
        if dtype == "float64":
            raise BadInput("float64 is the truth that other types are measured by")
        answers = {name: self.answers(name, dtype) for name in self.implementations}
        if dtype == "bfloat16":
            yield _norms(answers["jax"], answers["torch"])
        errors: dict[tuple[str, str], float] = {}  # PyTorch's own, by which JAX is measured
        for topic in topics:
            for name, found in answers.items():
                if topic is trajectory and (dtype != "float32" or name == "transformers"):
                    continue  # nobody trains weights that are kept in bfloat16
                truth = self.answers("jax", "float64") if name == "torch" else self.truth
                for item in topic(found, truth):
                    budget = CEILING[dtype]
                    if name == "torch":
                        errors[item.key] = item.rel
                    else:
                        budget = min(budget, _allowed(item, errors))
                    yield item.stage(name, dtype, truth.oracle.name, budget)


def lacking(config: MistralConfig) -> str:
    """Why transformers has no such model; nothing, if it has."""
    try:
        to_hugging_face(config, "float32", positions=None, bos_id=1, eos_id=2)
    except BadInput as error:
        return str(error)
    return ""


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
