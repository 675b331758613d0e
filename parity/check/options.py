"""Options of `python -m parity.check`, validated."""

import dataclasses
from pathlib import Path
from typing import Literal

from lechat_jax.errors import BadInput
from parity.architectures import ARCHITECTURES


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    """The flags of `python -m parity.check`.

    Attributes:
        checkpoint: Weights to check, in any format that parity.convert reads: a folder, or the
            name of a model on the Hugging Face Hub. Without them, a random model.
        against: A conversion, export or merge of the checkpoint, to be put on trial: lechat_jax
            runs these weights and the PyTorch implementations those of --checkpoint.
        weights_only: Compare the weights of --against with those of --checkpoint bit for bit, and
            nothing else: seconds for a model of seven billion. Without it, both are run as well.
        faults: Plant known faults one by one and see that each is found: in random models, or in
            the model of --checkpoint, which may have 50 million parameters.
        models: Kinds of random model: one for each kind of block that Mistral has released.
        dtypes: Arithmetic to check, beside float64, which proves the function.
        seed: Of the random weights and texts.
        window: Longest sliding window, in tokens; a checkpoint's own is shortened to it, so that
            a short text is longer than the window.
        tokens: Length of the text that a model over 50 million parameters reads.
        last_position: Where that text ends when it is read a second time.
        rope_theta: Base of the rotary frequencies, for a params.json that does not say it.
        revision: Branch, tag or commit of a model on the Hub.
        json: File for the report, for scripts.
        junit: File for the report as a test suite, for CI.
        markdown: File for the report as a CI job's summary.
        html: File for the report as a page with a map of the errors.
    """

    checkpoint: str | None = None
    against: str | None = None
    weights_only: bool = False
    faults: bool = False
    models: tuple[str, ...] = tuple(ARCHITECTURES)
    dtypes: tuple[Literal["float64", "float32", "bfloat16"], ...] = ("float32", "bfloat16")
    seed: int = 0
    window: int = 16
    tokens: int = 256
    last_position: int = 32767
    rope_theta: float | None = None
    revision: str | None = None
    json: Path | None = None
    junit: Path | None = None
    markdown: Path | None = None
    html: Path | None = None

    def __post_init__(self) -> None:
        if self.against and not self.checkpoint:
            raise BadInput("--against needs the --checkpoint that it was made from")
        if self.weights_only and not self.against:
            raise BadInput("--weights-only compares the weights of --against and --checkpoint")
        if self.faults and self.against:
            raise BadInput("--faults plants faults in one model; leave out --against")
        if unknown := sorted(set(self.models) - ARCHITECTURES.keys()):
            raise BadInput(
                f"--models has {', '.join(unknown)}; there are {', '.join(ARCHITECTURES)}"
            )
        if not self.models:
            raise BadInput(f"--models needs one of {', '.join(ARCHITECTURES)}")
        for name, least in {"window": 2, "tokens": 2, "seed": 0}.items():
            if getattr(self, name) < least:
                raise BadInput(f"--{name} must be at least {least}, not {getattr(self, name)}")
        if self.last_position < self.tokens:
            raise BadInput(
                f"--last-position must be at least --tokens ({self.tokens}), "
                f"not {self.last_position}"
            )
        for path in (self.json, self.junit, self.markdown, self.html):
            if path and not path.absolute().parent.is_dir():
                raise BadInput(
                    f"there is no folder {path.absolute().parent} to write {path.name} to"
                )
