"""Runs of `python -m parity.check`: random models, checkpoints, planted faults."""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from lechat_jax.cli.display import Display, clock
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.files.checksums import MANIFEST
from lechat_jax.formats.folder import fault_of
from lechat_jax.formats.source import Source
from parity.architectures import ARCHITECTURES, SMALL
from parity.check.faults.diagnose import FORWARD, recognise
from parity.check.faults.suite import CRITERIA, FAULTS, suite, suite_of_checkpoint
from parity.check.layer_by_layer import Streamed
from parity.check.options import CheckConfig
from parity.check.oracles.interface import Dtype
from parity.check.probes import PROBES, Inputs, Model, Probe, forward, shortened
from parity.check.reports.text import Report, describe
from parity.check.same_weights import rounded_as, same_weights
from parity.check.tower_by_layer import StreamedTower
from parity.check.verdict import Fault, FaultReport, Stage, Verdict
from parity.check.whole_model import Comparison
from parity.convert.open_source import open_source
from parity.measure import machine_line
from parity.random_models import random_weights

WHOLE = 50_000_000  # parameters: larger models are checked a layer at a time
SHOWN = 4  # weights that differ are named in the notes; the reports name all


def compare(options: CheckConfig, display: Display) -> Report:
    """Runs the check that the options ask for: a verdict, or a report on planted faults.

    Raises:
        BadInput: a checkpoint cannot be read, or two cannot be compared.
    """
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
    if options.checkpoint:
        return _planted_in(options.checkpoint, options, display)
    model = Model(SMALL, random_weights(SMALL, options.seed))
    found = []
    for one in suite(model, Inputs.of(SMALL, options.seed)):
        found.append(one)
        display.work("faults", len(found), len(FAULTS))
    return FaultReport(tuple(found), tuple(criterion.name for criterion in CRITERIA))


def _planted_in(checkpoint: str, options: CheckConfig, display: Display) -> FaultReport:
    """Plants the faults that apply to the model of a checkpoint in it."""
    source = open_source(checkpoint, rope_theta=options.rope_theta, revision=options.revision)
    if source.config.n_params > WHOLE:
        raise BadInput(
            f"{checkpoint} has {source.config.n_params:,} parameters; faults are planted in models "
            f"of at most {WHOLE:,}. Its layers are checked without --faults"
        )
    notes = _shortening(source.config, options.window)
    config = shortened(source.config, options.window)
    model = Model(config, _read(source).weights)
    found: list[Fault] = []
    impossible: list[str] = []
    for one in suite_of_checkpoint(model, Inputs.of(config, options.seed)):
        if isinstance(one, Fault):
            found.append(one)
        else:
            impossible.append(one)
        display.work("faults", len(found) + len(impossible), len(FAULTS))
    if impossible:
        notes.append(
            f"{len(impossible)} of {len(FAULTS)} faults cannot be in this model, or change no bit "
            f"of what it computes: {', '.join(impossible)}"
        )
    return FaultReport(tuple(found), title=f"Faults planted in {checkpoint}", notes=tuple(notes))


def _random(options: CheckConfig, display: Display) -> Verdict:
    """Checks a random model of each kind: the first in full, the others in one pass."""
    verdicts = []
    for kind in options.models:
        config = ARCHITECTURES[kind]
        model = Model(config, random_weights(config, options.seed))
        probes = PROBES if kind == options.models[0] else (forward,)
        verdicts.append(_whole(kind, model, model, options, display, probes))
    stages = [
        dataclasses.replace(stage, model=verdict.title)
        for verdict in verdicts
        for stage in verdict.stages
    ]
    return Verdict(
        f"random models: {', '.join(options.models)}",
        # One that compared nothing has shown nothing, whatever the others did.
        tuple(stages) if all(verdict.stages for verdict in verdicts) else (),
        tuple(f"{verdict.title}: {note}" for verdict in verdicts for note in verdict.notes),
        next((verdict.hint for verdict in verdicts if verdict.hint), ""),
    )


def _checkpoint(options: CheckConfig, display: Display) -> Verdict:
    assert options.checkpoint is not None
    theirs = open_source(
        options.checkpoint, rope_theta=options.rope_theta, revision=options.revision
    )
    ours = theirs
    title, stages = f"{options.checkpoint}", []
    notes = list(theirs.store.notes)
    if options.against:
        ours = open_source(options.against, rope_theta=options.rope_theta, verify=False)
        title = f"{options.against} against {options.checkpoint}"
        differences = _differences(ours, theirs)
        notes += differences
        theirs = rounded_as(theirs, ours)
        stages = list(same_weights(ours, theirs, display.work))
        different = [stage for stage in stages if not stage.ok]
        if different:
            notes += [f"other weights: {stage.note}" for stage in different[:SHOWN]]
            more = len(different) - SHOWN
            notes += [f"and in {more} more weights"] if more > 0 else []
        else:
            notes.append(f"all {len(stages)} tensors are equal, bit for bit")
        display.say(notes[-1])
        if options.weights_only:
            return Verdict(title, (*stages, *_other_config(ours, theirs)), tuple(notes))
        stages = different
    if theirs.config.n_params > WHOLE:
        verdict = _streamed(title, ours, theirs, options, display)
    else:
        models = [_read(source) for source in ((ours, theirs) if options.against else (theirs,))]
        verdict = _whole(title, models[0], models[-1], options, display)
    return dataclasses.replace(
        verdict, stages=(*stages, *verdict.stages), notes=(*notes, *verdict.notes)
    )


def _other_config(ours: Source, theirs: Source) -> list[Stage]:
    """Failed stage of configs that differ, which no weight shows."""
    if ours.config == theirs.config:
        return []
    note = "the configs differ"
    return [Stage("attn", 0, "float64", ("jax", "torch"), float("inf"), 0.0, note=note)]


def _read(source: Source) -> Model:
    return Model(
        source.config, {name: source.read(name).astype(np.float32) for name in source.names}
    )


def _differences(ours: Source, theirs: Source) -> list[str]:
    """Notes on two checkpoints before any number is compared."""
    mine, other = ours.config.to_dict(), theirs.config.to_dict()
    notes = [
        f"{key} is {mine.get(key)} in {ours.path} and {other.get(key)} in {theirs.path}"
        for key in mine | other
        if mine.get(key) != other.get(key)
    ]
    types = [{str(tensor.dtype) for tensor in source.stored.values()} for source in (ours, theirs)]
    if types[0] != types[1]:
        notes.append(
            f"the weights of {theirs.path}, {', '.join(types[1])}, were rounded to those of "
            f"{ours.path}, {', '.join(types[0])}, before they were compared"
        )
    if (ours.path / MANIFEST).is_file() and (reason := fault_of(ours.path)):
        notes.append(f"{ours.path} is not what was written: {reason}")
    return notes


def _whole(
    title: str,
    ours: Model,
    theirs: Model,
    options: CheckConfig,
    display: Display,
    probes: Sequence[Probe] = PROBES,
) -> Verdict:
    """Full comparison of models that fit into memory several times.

    In float64, that is; in other dtypes those of `probes`.
    """
    notes = _shortening(theirs.config, options.window)
    ours, theirs = (
        Model(shortened(model.config, options.window, theirs.config), model.weights)
        for model in (ours, theirs)
    )
    inputs = Inputs.of(theirs.config, options.seed)
    comparison = Comparison(ours, theirs, inputs)
    stages: list[Stage] = []
    dtypes: list[Dtype] = [dtype for dtype in options.dtypes if dtype != "float64"]
    if theirs.config.n_experts and "bfloat16" in dtypes:
        dtypes.remove("bfloat16")
        notes.append(
            "a model with experts is not judged in bfloat16: a token whose experts are nearly tied "
            "goes to one or the other, in any program, by how its scores were rounded"
        )
    progress = _Progress(display, [("float64", PROBES), *((dtype, probes) for dtype in dtypes)])
    for questions in (comparison.exact(), *(comparison.rounded(dtype, probes) for dtype in dtypes)):
        for stage in questions:
            stages.append(stage)
            progress.show(stages)
    if comparison.without:
        notes.append(f"transformers is left out: {comparison.without}")
    verdict = Verdict(title, tuple(stages), tuple(notes))
    if is_too_equal(stages):
        notes.append(
            "not a single bit differs in float64: that would be one function compared with itself"
        )
        return dataclasses.replace(verdict, stages=(), notes=tuple(notes))
    first = verdict.first_divergence
    if first is not None and first.pair[0] == "jax" and first.dtype == "float64":
        display.wait("looking for a known fault that does this")
        name = recognise(ours, theirs, first, inputs.tokens, "float64", pictures=inputs.pictures)
        verdict = dataclasses.replace(verdict, hint=_as_if(name))
    return verdict


class _Progress:
    """Progress of a check with the time left, and its first verdict as soon as there is one."""

    def __init__(self, display: Display, asked: Sequence[tuple[Dtype, Sequence[Probe]]]) -> None:
        self.display, self.began = display, time.monotonic()
        # The stages of one pass are one question.
        self.total = sum(len(probes) for _, probes in asked)
        self.seen: dict[tuple[str, str], None] = {}

    def show(self, stages: Sequence[Stage]) -> None:
        """Reports the last stage."""
        stage = stages[-1]
        if (stage.stage, stage.dtype, stage.pair) == ("logits", "float64", ("jax", "torch")):
            self._first_verdict(stages)
        probe = "one pass" if stage.stage in FORWARD else stage.stage
        if (stage.dtype, probe) in self.seen:
            return
        self.seen[stage.dtype, probe] = None
        done, seconds = len(self.seen), time.monotonic() - self.began
        left = seconds / done * (self.total - done)
        more = f" · about {clock(left)} left"
        self.display.work(f"{stage.dtype} {probe}", done, self.total, more)

    def _first_verdict(self, stages: Sequence[Stage]) -> None:
        wrong = next((stage for stage in stages if not stage.ok), None)
        seconds = f"after {time.monotonic() - self.began:.0f} s"
        found = f"different: {describe(wrong)}" if wrong else f"equal in {len(stages)} comparisons"
        self.display.say(f"first verdict, {seconds}: one pass in float64 is {found}")


def _streamed(
    title: str, ours: Source, theirs: Source, options: CheckConfig, display: Display
) -> Verdict:
    """Layer-by-layer comparison, of a text at the first and one at the last positions."""
    notes = _shortening(theirs.config, options.window)
    draw = np.random.default_rng(options.seed)
    streamed = Streamed(
        ours.text,
        theirs.text,
        draw.integers(theirs.config.vocab_size, size=options.tokens),
        (0, options.last_position + 1 - options.tokens),
        options.window,
    )
    stages, hint = tuple(streamed.run(display.work)), ""
    if theirs.config.vision:
        tower = StreamedTower(ours, theirs, options.seed)
        stages = (*tower.run(display.work), *stages)
    if streamed.failed and streamed.failed.stage.pair[0] == "jax":
        display.wait("looking for a known fault that does this")
        part, inner, stage, first = streamed.failed
        alone = dataclasses.replace(
            stage, stage=inner.partition(".")[0], layer=0 if "." in inner else None
        )
        row = streamed.ids[streamed.first_positions.index(first)][None]
        hint = _as_if(recognise(part.ours, part.theirs, alone, row, "float32", first))
    if streamed.without:
        notes.append(f"transformers is left out: {streamed.without}")
    notes.append(
        f"layer by layer in float32, the float64 truth on layers "
        f"{', '.join(map(str, sorted(streamed.sampled)))} and the head"
    )
    return Verdict(title, stages, tuple(notes), hint)


def _shortening(config: MistralConfig, window: int) -> list[str]:
    short = shortened(config, window)
    notes = []
    if short.windows != config.windows:
        notes.append(
            f"the sliding window of {config.sliding_window} was shortened to {window} for the check"
        )
    if short.llama_4_scaling != config.llama_4_scaling and (growth := config.llama_4_scaling):
        steps = growth.original_max_position_embeddings
        notes.append(
            f"the {steps} tokens after which queries grow were shortened to {window} for the check"
        )
    return notes


def is_too_equal(stages: Sequence[Stage]) -> bool:
    """Whether both are equal in float64 to the last bit, as one program compared with itself is."""
    exact = [s for s in stages if s.dtype == "float64" and s.pair == ("jax", "torch")]
    return bool(exact) and all(stage.rel == 0 for stage in exact)


def _as_if(name: str) -> str:
    return f"lechat_jax computes as if {name}" if name else ""
