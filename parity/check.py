"""Proves that two implementations of a model are the same function, or names where they part.

Without a checkpoint, a random model is built in which every detail matters, and lechat_jax is
compared with lechat_torch and with transformers: stage by stage, gradients, training and
generation included, in float64 first. With one, your own weights are compared, however large
they are.
"""

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from lechat_jax import cli
from lechat_jax.config import MistralConfig
from lechat_jax.display import Display
from lechat_jax.errors import BadInput
from lechat_jax.manifest import MANIFEST, fault
from parity import reports
from parity.against import same_weights
from parity.answers import Model, Task, shortened
from parity.diagnosis import recognise
from parity.exam import Exam
from parity.faults import CRITERIA, FAULTS, suite
from parity.lively import lively_weights
from parity.measure import machine_line
from parity.oracles import Dtype
from parity.sources import Source, open_source
from parity.streamed import Streamed
from parity.verdict import FaultReport, Stage, Verdict
from parity.wording import Report

WHOLE = 50_000_000  # parameters: larger models are checked a layer at a time

# The model of the check without a checkpoint: no two dimensions agree, so none can be confused.
SMALL = MistralConfig(
    dim=40,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    head_dim=8,
    hidden_dim=56,
    vocab_size=97,
    norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=7,
)


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    """The flags of `python -m parity.check`.

    Attributes:
        checkpoint: Weights to check, in any format that parity.convert reads: a folder, or the
            name of a model on the Hugging Face Hub. Without them, a random model.
        against: A conversion, export or merge of the checkpoint, to be put on trial: lechat_jax
            runs these weights and the PyTorch implementations those of --checkpoint.
        faults: Plant known faults one by one and see that each is found.
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
    faults: bool = False
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    seed: int = 0
    window: int = 64
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
        if self.faults and self.checkpoint:
            raise BadInput("--faults plants faults in a random model; leave out --checkpoint")
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see `--help`. Returns 0 for equal and 1 for different."""
    options = cli.parse(CheckConfig, "python -m parity.check", __doc__ or "", argv)
    # JAX would take most of a GPU's memory at its first use, and leave none for PyTorch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200, soft_wrap=True)
    with Display(None, console) as display:
        report = _report(options, display)
    reports.show(console, report)
    for path, write in (
        (options.json, reports.write_json),
        (options.junit, reports.write_junit),
        (options.markdown, reports.write_markdown),
        (options.html, reports.write_html),
    ):
        if path:
            write(path, report)
            console.print(f"report: {path}", markup=False)
    return 0 if (report.all_found if isinstance(report, FaultReport) else report.equal) else 1


def _report(options: CheckConfig, display: Display) -> Report:
    began = time.perf_counter()
    if options.faults:
        report: Report = _planted(options, display)
    elif options.checkpoint is None:
        report = _random(options, display)
    else:
        report = _checkpoint(options, display)
    seconds = time.perf_counter() - began
    return dataclasses.replace(report, seconds=seconds, machine=machine_line())


def _planted(options: CheckConfig, display: Display) -> FaultReport:
    model = Model(SMALL, lively_weights(SMALL, options.seed))
    found = []
    for one in suite(model, Task.of(SMALL, options.seed)):
        found.append(one)
        display.work("faults", len(found), len(FAULTS))
    return FaultReport(tuple(found), tuple(criterion.name for criterion in CRITERIA))


def _random(options: CheckConfig, display: Display) -> Verdict:
    model = Model(SMALL, lively_weights(SMALL, options.seed))
    return _whole(f"a random model, {SMALL.n_params:,} parameters", model, model, options, display)


def _checkpoint(options: CheckConfig, display: Display) -> Verdict:
    assert options.checkpoint is not None
    theirs = open_source(
        options.checkpoint, rope_theta=options.rope_theta, revision=options.revision
    )
    ours = theirs
    title, notes, stages = f"{options.checkpoint}", [], []
    if options.against:
        ours = open_source(options.against, rope_theta=options.rope_theta, verify=False)
        title = f"{options.against} against {options.checkpoint}"
        notes = _differences(ours, theirs)
        stages = list(same_weights(ours, theirs, display.work))
    if theirs.config.n_params > WHOLE:
        verdict = _streamed(title, ours, theirs, options, display)
    else:
        models = [_read(source) for source in ((ours, theirs) if options.against else (theirs,))]
        verdict = _whole(title, models[0], models[-1], options, display)
    return dataclasses.replace(
        verdict, stages=(*stages, *verdict.stages), notes=(*notes, *verdict.notes)
    )


def _read(source: Source) -> Model:
    return Model(
        source.config, {name: source.read(name).astype(np.float32) for name in source.names}
    )


def _differences(ours: Source, theirs: Source) -> list[str]:
    """What can be said of two checkpoints before any number is compared."""
    mine, other = ours.config.to_dict(), theirs.config.to_dict()
    notes = [
        f"{key} is {mine[key]} in {ours.path} and {other[key]} in {theirs.path}"
        for key in mine
        if mine[key] != other[key]
    ]
    if (ours.path / MANIFEST).is_file() and (reason := fault(ours.path)):
        notes.append(f"{ours.path} is not what was written: {reason}")
    return notes


def _whole(
    title: str, ours: Model, theirs: Model, options: CheckConfig, display: Display
) -> Verdict:
    """Every question, asked of models that fit into memory several times."""
    notes = _shortening(theirs.config, options.window)
    ours, theirs = (
        Model(shortened(model.config, options.window), model.weights) for model in (ours, theirs)
    )
    task = Task.of(theirs.config, options.seed)
    exam = Exam(ours, theirs, task)
    stages: list[Stage] = []
    dtypes: list[Dtype] = [dtype for dtype in options.dtypes if dtype != "float64"]
    asked = [exam.exact(), *map(exam.rounded, dtypes)]
    for done, questions in enumerate(asked):
        for stage in questions:
            stages.append(stage)
            display.work(f"{stage.dtype} {stage.label}", done, len(asked))
    display.work("stages", len(asked), len(asked))
    if not exam.has_transformers:
        notes.append("transformers' Mistral has one window for all layers, so it is left out")
    verdict = Verdict(title, tuple(stages), tuple(notes))
    if is_too_equal(stages):
        notes.append(
            "not a single bit differs in float64: that would be one function compared with itself"
        )
        return dataclasses.replace(verdict, stages=(), notes=tuple(notes))
    first = verdict.first_divergence
    if first is not None and first.pair[0] == "jax" and first.dtype == "float64":
        display.wait("looking for a known fault that does this")
        name = recognise(ours, theirs, first, task.tokens, "float64")
        verdict = dataclasses.replace(verdict, hint=_as_if(name))
    return verdict


def _streamed(
    title: str, ours: Source, theirs: Source, options: CheckConfig, display: Display
) -> Verdict:
    """Layer by layer, a text at the start and at the end of the positions."""
    notes = _shortening(theirs.config, options.window)
    draw = np.random.default_rng(options.seed)
    streamed = Streamed(
        ours,
        theirs,
        draw.integers(theirs.config.vocab_size, size=options.tokens),
        (0, options.last_position + 1 - options.tokens),
        options.window,
    )
    stages = tuple(streamed.run(display.work))
    hint = ""
    if streamed.failed and streamed.failed.stage.pair[0] == "jax":
        display.wait("looking for a known fault that does this")
        part, inner, stage, first = streamed.failed
        alone = dataclasses.replace(
            stage, stage=inner.partition(".")[0], layer=0 if "." in inner else None
        )
        row = streamed.ids[streamed.first_positions.index(first)][None]
        hint = _as_if(recognise(part.ours, part.theirs, alone, row, "float32", first))
    notes.append(
        f"layer by layer in float32, the float64 truth on layers "
        f"{', '.join(map(str, sorted(streamed.sampled)))} and the head"
    )
    return Verdict(title, stages, tuple(notes), hint)


def _shortening(config: MistralConfig, window: int) -> list[str]:
    if shortened(config, window) == config:
        return []
    return [
        f"the sliding window of {config.sliding_window} was shortened to {window} for the check"
    ]


def is_too_equal(stages: Sequence[Stage]) -> bool:
    """Whether not a single bit differs between lechat_jax and lechat_torch in float64."""
    exact = [s for s in stages if s.dtype == "float64" and s.pair == ("jax", "torch")]
    return bool(exact) and all(stage.rel == 0 for stage in exact)


def _as_if(name: str) -> str:
    return f"lechat_jax computes as if {name}" if name else ""


if __name__ == "__main__":
    cli.run(main)
