"""Trains a Mistral on text and prints samples: `python -m lechat_jax.train`."""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lechat_jax.checkpoint.load import free_bytes, shapes_to_compute
from lechat_jax.checkpoint.run import HELD_OUT, RECIPE, Run
from lechat_jax.checkpoint.saved_model import Loaded, Trained
from lechat_jax.checkpoint.training_state import Checkpoints
from lechat_jax.checkpoint.weights import weight_shapes
from lechat_jax.cli import flags as cli
from lechat_jax.cli.config_file import to_yaml
from lechat_jax.cli.display import Display, clock
from lechat_jax.cli.signals import Stop
from lechat_jax.config import MistralConfig
from lechat_jax.data.dataset import Lessons, load_lessons
from lechat_jax.devices import processes
from lechat_jax.devices.compile_cache import enable_compilation_cache
from lechat_jax.devices.memory import OutOfMemory, running_out
from lechat_jax.devices.mesh import check_divides, make_mesh, usual_mesh
from lechat_jax.devices.processes import anywhere, from_first
from lechat_jax.errors import BadInput
from lechat_jax.files.atomic import check_new_folder
from lechat_jax.files.find import located
from lechat_jax.shell import command
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.tokenizer.vocabulary import beside, no_tokenizer
from lechat_jax.train.memory_plan import (
    REMEDY,
    Parts,
    check_memory,
    checkpoint_bytes,
    needed,
    simulated_mesh,
    told,
)
from lechat_jax.train.options import DEFAULT_PRESET, MOVABLE, TrainConfig
from lechat_jax.train.schedule import elapsed
from lechat_jax.train.start import Asked, adapters_asked, check_source, load_base
from lechat_jax.train.trackers import track_in_tensorboard, track_in_wandb
from lechat_jax.train.trainer import Diverged, Trainer, step_options


class Start(NamedTuple):
    """What a run begins or goes on with.

    Attributes:
        options: as asked, or those of the run that is resumed.
        model: its shape.
        tokenizer: of the folder that the weights come from, or Mistral's first.
        source: the folder with the weights to begin with, instead of random ones; or the run that
            is resumed, if it learns adapters beside weights that are elsewhere.
        learning: the adapters that learn, if not all weights do.
        run: the run to resume.
        corpus_sha256: of the text that it was started on.
    """

    options: TrainConfig
    model: MistralConfig
    tokenizer: Tokenizer
    source: Trained | None = None
    learning: Asked | None = None
    run: Run | None = None
    corpus_sha256: str = ""


def set_up(asked: TrainConfig, display: Display) -> Trainer:
    """A trainer at the first step of a new run, or where a stopped one is to go on.

    Raises:
        BadInput: the options, the text, the weights or the folder cannot be used; nothing
            was written.
    """
    start = _resumed(asked) if asked.resume else _started(asked)
    options, config, tokenizer = start.options, start.model, start.tokenizer
    shape = options.shape(jax.default_backend())
    mesh = make_mesh(options.mesh) if options.mesh else usual_mesh()
    if mesh:
        check_divides(mesh, config, shape.batch // options.accumulate)
    folder = start.run.folder if start.run else _new_folder(options)
    _check_room(start, folder, mesh, display)
    lessons = load_lessons(
        options.data,
        tokenizer,
        shape.block,
        shape.batch,
        options.seed,
        options.packing,
        lambda done, of: display.work("tokenising", done, of),
    )
    display.say(f"text:  {lessons.name}, {lessons.size}, SHA-256 {lessons.sha256}")
    for note in lessons.notes:
        display.say(f"note: {note}")
    if start.run and start.corpus_sha256 != lessons.sha256:
        raise BadInput(
            f"the text is not the one that {asked.resume} was started on (SHA-256 "
            f"{start.corpus_sha256}); restore it or say with --data where it is, or start a new run"
        )
    source = start.source
    with running_out(REMEDY):
        loaded = load_base(source, options, shape.dtype, mesh, display) if source else None
    run = start.run or Run(folder)
    if start.run:
        _remember(run, options)
    else:
        from_first(lambda: _begin_run(run, start, lessons, loaded))
    with _forgotten_if_it_fails(run, tokenizer), running_out(REMEDY):
        if options.tensorboard:
            track_in_tensorboard(run)
        if options.wandb:
            track_in_wandb(run, options.wandb)
        trainer = Trainer(run, config, options, lessons, tokenizer, display, mesh)
        weights = loaded.weights if loaded else None
        if start.learning and loaded:
            trainer.stay(loaded.weights, start.learning.adapters)
            weights = start.learning.first(config, options.seed)
        display.say(
            f"model: {options.model_name}, {config.n_params:,} parameters, "
            f"window {config.sliding_window or 'full'}\n"
            f"step:  {shape.batch} x {shape.block} tokens, {shape.dtype} on {_devices(mesh)}\n"
            f"run:   {run.folder}, {options.keep} checkpoints of "
            f"{checkpoint_bytes(trainer.step_options, _parts(start)) / 1e9:.2f} GB"
        )
        if start.run:
            trainer.restore()
        else:
            trainer.begin(weights)
    if start.run and (asked.steps or asked.minutes):
        trainer.extend(asked.steps, asked.minutes)
    elif start.run and not asked.asks_again():
        from_first(trainer.check_unfinished)
    return trainer


def _check_room(start: Start, folder: Path, mesh: Mesh | None, display: Display) -> None:
    """Raises `BadInput` for a training that does not fit into memory, or a run onto the disk."""
    options, parts = start.options, _parts(start)
    step = step_options(options, mesh)
    batch = options.shape(jax.default_backend()).batch
    free = free_bytes(jnp.zeros(()))
    asking = "asking XLA whether a step fits into memory"
    check_memory(start.model, step, batch, free, parts, lambda: display.wait(asking))
    n_bytes = (options.keep + 1) * checkpoint_bytes(step, parts)
    if start.run is None:
        from_first(lambda: Run.check_new(folder, n_bytes))
    else:
        there = sum(path.stat().st_size for path in start.run.checkpoints.glob("[0-9]*/**/*"))
        from_first(lambda: check_new_folder(folder, max(0, n_bytes - there)))


def _parts(start: Start) -> Parts:
    """The weights that learn, and those beside which they do."""
    if start.learning is None or start.source is None:
        return Parts(weight_shapes(start.model), {})
    adapters, options = start.learning.adapters, start.options
    dtype = options.shape(jax.default_backend()).dtype
    described = adapters.described(start.model)
    names = adapters.shapes(start.model)
    base = shapes_to_compute(start.source.base, dtype, start.source.of_base(options.quantize))
    scales = {name: leaf for name, leaf in described.items() if name not in names}
    return Parts({name: described[name] for name in names}, {**base, **scales})


@contextlib.contextmanager
def _forgotten_if_it_fails(run: Run, tokenizer: Tokenizer) -> Iterator[None]:
    """Within it, a run that ends with nothing saved leaves its name to the next one."""
    try:
        yield
    except BadInput as error:
        has_learned = list(run.metrics()) and not isinstance(error, OutOfMemory)
        if not Checkpoints(run.checkpoints).steps() and not has_learned:
            run.forget(tokenizer.file_name, *(path.name for path in beside(run.folder)))
        raise


def _started(asked: TrainConfig) -> Start:
    """A new run."""
    if asked.init_from is None:
        options = _located(dataclasses.replace(asked, preset=asked.preset or DEFAULT_PRESET))
        model, tokenizer, source = asked.model(), Tokenizer.mistral_v1(), None
        if model.vocab_size != tokenizer.vocab_size:
            raise BadInput(
                f"the model has {model.vocab_size} token ids but the tokenizer {tokenizer.path} "
                f"{tokenizer.vocab_size}; choose another preset"
            )
    else:
        options = _located(asked)
        source = Trained.open(asked.init_from)
        check_source(source, options)
        model, tokenizer = source.config, source.tokenizer
        if tokenizer is None:
            raise BadInput(no_tokenizer(asked.init_from, "no text can be read"))
        if flags := asked.contradictions_to(model):
            raise BadInput(
                f"--init-from takes the model from {asked.init_from}, which is another one; "
                f"leave out {', '.join(flags)}"
            )
    learning = adapters_asked(options, model)
    options = dataclasses.replace(options, optimizer=options.usual_optimizer)
    return Start(options, model, tokenizer, source, learning)


def _located(options: TrainConfig) -> TrainConfig:
    """The same options, whose text and weights are found from any folder, as a run may move on."""
    init_from = options.init_from and options.init_from.absolute()
    return dataclasses.replace(options, data=located(options.data), init_from=init_from)


def _resumed(asked: TrainConfig) -> Start:
    """What `config.json` of a run says, with its own tokenizer."""
    if flags := asked.contradictions():
        raise BadInput(f"--resume goes on with the run's own options; leave out {', '.join(flags)}")
    run = Run.open(Path(asked.resume or ""))
    from_first(run.hold)
    config = run.config
    trained = Trained.open(run.folder)
    if asked.init_from and not trained.adapters:
        raise BadInput(
            f"{run.folder} has all its weights and needs no others to go on; leave out --init-from"
        )
    trained = dataclasses.replace(trained, moved=asked.init_from and asked.init_from.absolute())
    tokenizer = trained.tokenizer
    if tokenizer is None:
        raise BadInput(f"{run.folder} has no tokenizer any more; put the run's own back into it")
    return Start(
        options=_located(TrainConfig.from_dict(config["train"]).with_changes_of(asked)),
        model=MistralConfig.from_dict(config["model"]),
        tokenizer=tokenizer,
        source=trained if trained.adapters else None,
        learning=Asked(trained.adapters) if trained.adapters else None,
        run=run,
        corpus_sha256=config["train"].get("corpus_sha256", "unknown"),
    )


def _devices(mesh: Mesh | None) -> str:
    """What it runs on, in words."""
    if mesh is None:
        return jax.default_backend()
    axes = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"{mesh.size} x {jax.default_backend()}, {axes}, of {jax.process_count()} processes"


def _new_folder(options: TrainConfig) -> Path:
    """The folder of a new run, which all processes share."""
    name = options.name or f"{options.model_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(from_first(lambda: str(options.out or Path("runs") / name)))


def _remember(run: Run, options: TrainConfig) -> None:
    """Where text and weights of a run are, which were just found to be the same, is stored."""
    config, fields = run.config, options.to_dict()
    if any(config["train"].get(name) != fields[name] for name in MOVABLE):
        config["train"] |= {name: fields[name] for name in MOVABLE}
        run.config = config


def _begin_run(run: Run, start: Start, lessons: Lessons, loaded: Loaded | None) -> None:
    """A new run in its folder, with all that is known at the start."""
    options = start.options
    run.begin()
    start.tokenizer.save(run.folder)
    for path in beside(start.source.folder) if start.source else []:
        shutil.copyfile(path, run.folder / path.name)
    found: dict[str, Any] = options.shape(jax.default_backend())._asdict()
    found |= {"corpus": lessons.name, "corpus_bytes": lessons.n_bytes}
    found |= {"corpus_sha256": lessons.sha256, "chat": lessons.chat}
    if loaded:
        found |= {"init_from_sha256": loaded.sha256}
    fields = {"model": start.model.to_dict(), "train": options.to_dict() | found}
    if start.learning:
        fields["adapters"] = start.learning.adapters.to_dict()
    run.config = fields
    run.write(RECIPE, to_yaml(options.recipe(jax.default_backend())))


def finish(trainer: Trainer, display: Display) -> None:
    """The samples, the full validation, the curve and the summary.

    A signal ends the validation, and what was scored so far counts.
    """
    with Stop() as stop:
        trainer.sample()
        adapter = trainer.keep_adapter()
        scored = _validate(trainer, stop, display)
        curve = trainer.run.draw()
    folder = trainer.run.folder
    display.say(
        f"{scored}\n"
        f"trained on {trainer.seen:,} tokens in {trainer.step} steps, "
        f"lately {trainer.speed.rate:,.0f} tokens/s, {clock(elapsed())} since the start\n"
        f"curve    {curve}\n"
        f"metrics  {folder / 'metrics.jsonl'}\n"
        f"samples  {trainer.run.samples}\n"
        f"weights  {adapter or trainer.run.checkpoints / str(trainer.step)}\n"
        f"generate more:\n{_next_command(trainer)}"
    )


def _validate(trainer: Trainer, stop: Stop, display: Display) -> str:
    """Scores what was held out, as much as there is time for, logs that and says it in words."""
    options, began = trainer.options, time.perf_counter()
    usual = trainer.timetable.minutes / 2
    minutes = usual if options.eval_minutes is None else options.eval_minutes

    def late() -> bool:
        return time.perf_counter() - began > 60 * minutes

    def show(done: int, of: int) -> None:
        left = clock((of - done) * (time.perf_counter() - began) / done)
        display.work("validating, row", done, of, f" · {left} left")

    final = trainer.validator.full(
        trainer.weights, show, options.eval_tokens, lambda: anywhere(bool(stop.asked) or late())
    )
    rate, of = final.tokens / (time.perf_counter() - began), trainer.validator.n_tokens
    known = (row for row in trainer.run.metrics() if row["step"] == trainer.step)
    if not any(row.get(HELD_OUT) and row["val/tokens"] >= final.tokens for row in known):
        trainer.run.log([trainer.row() | final.metrics() | {HELD_OUT: of}])
    part = f"all {of:,} held-out tokens"
    if final.tokens < of:
        bound = "--eval-tokens" if final.tokens >= options.eval_tokens else "--eval-minutes"
        part = f"{final.tokens:,} of {of:,} held-out tokens, evenly spread ({stop.asked or bound})"
    return (
        f"{final.bits_per_byte:.4f} bits per byte on {part} "
        f"({final.n_bytes:,} bytes, scored at {rate:,.0f} tokens/s)"
    )


def _next_command(trainer: Trainer) -> str:
    """How to talk to what was trained."""
    if trainer.lessons.chat:
        return f"  {command('lechat_jax.chat', trainer.run.folder)}"
    opening = trainer.lessons.opening
    return f"  {command('lechat_jax.generate', trainer.run.folder, prompt=opening)}"


def pause(trainer: Trainer, signal: str, display: Display) -> None:
    """The samples, the curve and the way on of a run that was asked to stop."""
    trainer.sample()
    trainer.run.draw()
    trainer.keep_adapter()
    display.say(
        f"stopped by {signal or 'a signal to another process'} after step {trainer.step}, saved; "
        "continue with\n"
        f"  {command('lechat_jax.train', resume=trainer.run.folder)}"
    )


def foretell(asked: TrainConfig) -> str:
    """What the training would take of the memory of each device, in words.

    Raises:
        BadInput: the options cannot be used.
    """
    if asked.resume:
        raise BadInput("--dry-run tells of a new run; give its options instead of --resume")
    mesh = simulated_mesh(asked.mesh or "fsdp=1")
    start = _started(asked)
    shape = start.options.shape(jax.default_backend())
    check_divides(mesh, start.model, shape.batch // start.options.accumulate)
    options = step_options(start.options, mesh if mesh.size > 1 else None)
    # The banded form, whose scores are never all in memory, stands for the kernels of others.
    long = start.model.windows[0] is not None and shape.block > start.model.windows[0] // 4
    backend = "banded" if long else None
    step = dataclasses.replace(options, backend=backend)
    memory = needed(start.model, step, shape.batch, _parts(start))
    return (
        f"{start.options.model_name} on {mesh.size} devices, {shape.batch} x {shape.block} tokens "
        f"in {shape.dtype} with --remat {start.options.remat}, memory of each as XLA plans it for "
        "a CPU, where bfloat16 is computed in float32 (an accelerator needs less):\n"
        f"{told(memory)}\n"
        f"and of the disk {checkpoint_bytes(options, _parts(start)) / 1e9:.2f} GB for each of "
        f"{start.options.keep} checkpoints (--keep) and one that is being written"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The main job; see `--help`."""
    asked = cli.parse(TrainConfig, "python -m lechat_jax.train", __doc__ or "", argv)
    if asked.dry_run:
        print(foretell(asked))
        return 0
    if asked.distributed or asked.coordinator:
        processes.start(asked.coordinator, asked.num_processes, asked.process_id)
    enable_compilation_cache()
    with processes.ending_together(), Display(None, audible=processes.is_first()) as display:
        trainer = set_up(asked, display)
        display.total = trainer.total
        try:
            kept = _forgotten_if_it_fails(trainer.run, trainer.tokenizer)
            with Stop() as stop, kept, running_out(REMEDY):
                trainer.train(stop)
        except Diverged as error:
            display.say(f"stopped: {error}", style="red")
            trainer.run.release()
            return 1
        if trainer.step == trainer.total:
            finish(trainer, display)
        else:
            pause(trainer, stop.asked, display)
        trainer.run.release()
    return cli.SIGPIPE if display.has_no_reader else 0
