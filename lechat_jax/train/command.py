"""Trains a Mistral on text and prints samples: `python -m lechat_jax.train`."""

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lechat_jax.checkpoint.load import free_bytes
from lechat_jax.checkpoint.run import RECIPE, Run
from lechat_jax.checkpoint.saved_model import Loaded
from lechat_jax.checkpoint.training_state import Checkpoints
from lechat_jax.cli import flags as cli
from lechat_jax.cli.config_file import to_yaml
from lechat_jax.cli.display import Display, clock
from lechat_jax.cli.signals import Stop
from lechat_jax.data.dataset import Dataset, open_dataset
from lechat_jax.data.rows import Rows
from lechat_jax.data.token_shards import Processes
from lechat_jax.devices import processes
from lechat_jax.devices.compile_ahead import Compilation
from lechat_jax.devices.compile_cache import enable_compilation_cache
from lechat_jax.devices.memory import OutOfMemory, running_out
from lechat_jax.devices.mesh import check_divides, make_mesh, usual_mesh
from lechat_jax.devices.platform import platform
from lechat_jax.devices.processes import from_first
from lechat_jax.errors import BadInput
from lechat_jax.files.atomic import check_new_folder
from lechat_jax.shell import command
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.tokenizer.vocabulary import GENERATION, beside
from lechat_jax.train.memory_plan import (
    REMEDY,
    check_memory,
    checkpoint_bytes,
    needed,
    simulated_mesh,
    summary,
)
from lechat_jax.train.options import MOVABLE, TrainConfig
from lechat_jax.train.schedule import elapsed, process_start
from lechat_jax.train.start import Start, load_base, resumed, run_of, started
from lechat_jax.train.step import described_call, jitted_steps
from lechat_jax.train.trackers import profile_steps, track_in_tensorboard, track_in_wandb
from lechat_jax.train.trainer import Trainer, described_rows_of_a_call
from lechat_jax.train.training_run import Diverged, Job, TrainingRun, step_options
from lechat_jax.train.unused_ids import UnusedIds, count_ids

COUNTED = 1 << 24  # ids of a large text whose frequencies stand for those of all


def run(options: TrainConfig) -> Run:
    """Trains from Python as `lechat train` does, and returns the run.

    It prints its progress, and its minutes count from this call. Ctrl-C and SIGTERM save the
    run, which `TrainConfig(resume=run.folder)` goes on with. Call it in the main thread.

    Raises:
        BadInput: the options, the text, the weights or the folder cannot be used.
        Diverged: the loss or a weight is NaN or infinite.
        BrokenPipeError: stdout is a pipe that nobody reads any more; the run was saved.
    """
    if options.config or options.dry_run:
        raise BadInput("config and dry_run are for the command line; leave them out")
    return _trained(options, time.time())


def _trained(options: TrainConfig, began: float) -> Run:
    """Trains to the end or to a signal; its minutes count from `began`."""
    if options.distributed or options.coordinator:
        processes.start(options.coordinator, options.num_processes, options.process_id)
    with processes.ending_together(), Display(None, audible=processes.is_first()) as display:
        enable_compilation_cache()
        run = run_of(options)
        try:
            trainer = set_up(run, options, began, display)
            training = trainer.training
            display.total = training.total
            kept = _forgotten_if_it_fails(run, training.job.tokenizer)
            with Stop() as stop, kept, running_out(REMEDY):
                trainer.train(stop)
            if training.step == training.total:
                finish(trainer)
            else:
                pause(trainer, stop.received)
        except Diverged as error:
            display.say(f"stopped: {error}", style="red")
            raise
        finally:
            run.release()
    if display.has_no_reader:
        raise BrokenPipeError(f"nobody reads stdout any more; {run.folder} was saved")
    return run


def set_up(run: Run, asked: TrainConfig, began: float, display: Display) -> Trainer:
    """Sets up the trainer of a new run, or of one that is resumed.

    Raises:
        BadInput: the options, the text, the weights or the folder cannot be used; nothing
            was written.
    """
    is_new = asked.resume is None
    start = started(asked) if is_new else resumed(run, asked)
    options, config, tokenizer = start.options, start.model, start.tokenizer
    shape = options.shape(platform())
    mesh = make_mesh(options.mesh) if options.mesh else usual_mesh()
    if mesh:
        check_divides(mesh, config, shape.batch // options.accumulate)
    _check_room(start, run, is_new, mesh, display)
    compilation, shapes = Compilation(), list[Rows]()

    def compile_step(batch: Rows, unused: UnusedIds) -> None:
        step = step_options(options, mesh, unused.n_sharing)
        rows = described_rows_of_a_call(batch, mesh)
        parts = start.parts.with_shared_row(unused)
        call = described_call(unused.narrow_config(config), step, *parts, rows)
        compilation.start(jitted_steps(step), *call)

    def see_shape(batch: Rows) -> None:
        nonlocal start
        shapes.append(batch)
        if is_new and start.learning:
            has_images = batch.images is not None
            start = start._replace(learning=start.learning.beside(has_images))
        if options.unused_ids != "shared":
            compile_step(batch, UnusedIds.none(config.vocab_size))

    dataset = open_dataset(
        options.data,
        tokenizer,
        shape.block,
        shape.batch,
        options.seed,
        options.packing,
        display.counter("tokenising"),
        see_shape,
        Processes(jax.process_index(), jax.process_count(), processes.anywhere),
        config.vision,
    )
    display.say(f"text:  {dataset.name}, {dataset.size}, SHA-256 {dataset.sha256}")
    for note in dataset.notes:
        display.say(f"note: {note}")
    known = dataset.sha256 if is_new else run.config["train"].get("corpus_sha256", "unknown")
    if known != dataset.sha256:
        raise BadInput(
            f"the text is not the one that {asked.resume} was started on (SHA-256 {known}); "
            "restore it or say with --data where it is, or start a new run"
        )
    if options.vision_tower == "trained" and shapes[0].images is None:
        lacks = f"{dataset.name} has no images" if config.vision else "the model has no tower"
        raise BadInput(f"--vision-tower trained, and {lacks}; leave it out")
    if options.unused_ids == "shared":
        counts = count_ids(dataset.ids, config.vocab_size)
        unused = UnusedIds.of(counts)
        compile_step(shapes[0], unused)
    else:  # of a large text a part tells the frequencies
        counts = count_ids(dataset.ids[:COUNTED], config.vocab_size)
        unused = UnusedIds.none(config.vocab_size)
    with running_out(REMEDY):
        source = start.source
        loaded = load_base(source, options, shape.dtype, mesh, display) if source else None
    if is_new:
        from_first(lambda: _begin_run(run, start, dataset, loaded))
    else:
        _remember(run, options)
    with _forgotten_if_it_fails(run, tokenizer), running_out(REMEDY):
        if options.tensorboard:
            track_in_tensorboard(run)
        if options.wandb:
            track_in_wandb(run, options.wandb)
        if options.profile:
            profile_steps(run, options.profile)
        job = Job(run, config, options, dataset, counts, unused, tokenizer, display, began, mesh)
        training = TrainingRun(job)
        trainer = Trainer(training, compilation, shapes[0])
        weights = loaded.weights if loaded else None
        if start.learning and loaded:
            training.freeze(loaded.weights, start.learning.adapters)
            weights = start.learning.first(config, options.seed, loaded.weights)
        display.say(
            f"model: {options.model_name}, {config.n_params:,} parameters, "
            f"window {config.sliding_window or 'full'}{_sharing(unused)}\n"
            f"step:  {shape.batch} x {shape.block} tokens, {shape.dtype} on {_devices(mesh)}\n"
            f"run:   {run.folder}, {options.keep} checkpoints of "
            f"{checkpoint_bytes(training.step_options, start.parts, unused) / 1e9:.2f} GB"
        )
        if is_new:
            training.begin(weights)
        else:
            training.restore()
    if not is_new and (asked.steps or asked.minutes):
        training.extend(asked.steps, asked.minutes)
    elif not is_new and not asked.asks_again():
        from_first(training.check_unfinished)
    return trainer


def _check_room(start: Start, run: Run, is_new: bool, mesh: Mesh | None, display: Display) -> None:
    """Raises `BadInput` if training does not fit into memory, or its checkpoints onto the disk."""
    options, parts = start.options, start.parts
    step, shape = step_options(options, mesh), options.shape(platform())
    free = free_bytes(jnp.zeros(()))
    asking = "asking XLA whether a step fits into memory"
    check_memory(
        start.model, step, shape.batch, shape.block, free, parts, lambda: display.wait(asking)
    )
    n_bytes = (options.keep + 1) * checkpoint_bytes(step, parts)
    if is_new:
        from_first(lambda: Run.check_new(run.folder, n_bytes))
    else:
        there = sum(path.stat().st_size for path in run.checkpoints.glob("[0-9]*/**/*"))
        from_first(lambda: check_new_folder(run.folder, max(0, n_bytes - there)))


@contextlib.contextmanager
def _forgotten_if_it_fails(run: Run, tokenizer: Tokenizer) -> Iterator[None]:
    """Context manager that deletes the folder of a run that ends with nothing saved."""
    try:
        yield
    except BadInput as error:
        has_learned = list(run.metrics()) and not isinstance(error, OutOfMemory)
        if not Checkpoints(run.checkpoints).steps() and not has_learned:
            run.forget(tokenizer.file_name, *(path.name for path in beside(run.folder)))
        raise


def _sharing(unused: UnusedIds) -> str:
    """Description of the ids that share a row, if there are any."""
    if unused.n_sharing == 1:
        return ""
    return (
        f"; {unused.n_sharing:,} of {len(unused.has_own):,} ids, which the text lacks, share a row"
    )


def _devices(mesh: Mesh | None) -> str:
    """Description of the devices."""
    if mesh is None:
        return platform()
    axes = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"{mesh.size} x {platform()}, {axes}, of {jax.process_count()} processes"


def _remember(run: Run, options: TrainConfig) -> None:
    """Stores the new paths of a run's text and base weights, which were just verified."""
    config, fields = run.config, options.to_dict()
    if any(config["train"].get(name) != fields[name] for name in MOVABLE):
        config["train"] |= {name: fields[name] for name in MOVABLE}
        run.config = config


def _begin_run(run: Run, start: Start, dataset: Dataset, loaded: Loaded | None) -> None:
    """Creates the folder of a new run, with its config and tokenizer."""
    options = start.options
    run.begin()
    start.tokenizer.save(run.folder)
    if start.source:
        for path in beside(start.source.tokenizer_folder):
            shutil.copyfile(path, run.folder / path.name)
        if (eos_ids := start.source.eos_ids) and not (run.folder / GENERATION).exists():
            run.write(GENERATION, json.dumps({"eos_token_id": sorted(eos_ids)}) + "\n")
    found: dict[str, Any] = options.shape(platform())._asdict()
    found |= {"corpus": dataset.name, "corpus_bytes": dataset.n_bytes}
    found |= {"corpus_sha256": dataset.sha256, "chat": dataset.chat}
    if loaded and start.source:
        found |= {"init_from_sha256": start.source.base.sha256(loaded.step)}
    fields = {"model": start.model.to_dict(), "train": options.to_dict() | found}
    if start.learning:
        fields["adapters"] = start.learning.adapters.to_dict()
    run.config = fields
    run.write(RECIPE, to_yaml(options.recipe(platform())))


def finish(trainer: Trainer) -> None:
    """Finishes a run: samples, full validation, curve and summary.

    A signal ends the validation, and what was scored so far counts.
    """
    training, job = trainer.training, trainer.job
    with Stop() as stop:
        trainer.events.sample()
        adapter = training.keep_adapter()
        scored = trainer.events.validate_all(stop)
        curve = job.run.draw()
    if job.dataset.chat:
        more = command("lechat_jax.chat", job.run.address)
    else:
        more = command("lechat_jax.generate", job.run.address, prompt=job.dataset.opening)
    job.display.say(
        f"{scored}\n"
        f"trained on {training.seen:,} tokens in {training.step} steps, lately "
        f"{trainer.speed.rate:,.0f} tokens/s, {clock(elapsed(job.began))} since the start\n"
        f"curve    {curve}\n"
        f"metrics  {job.run.folder / 'metrics.jsonl'}\n"
        f"samples  {job.run.samples}\n"
        f"weights  {adapter or job.run.checkpoints / str(training.step)}\n"
        f"generate more:\n  {more}"
    )


def pause(trainer: Trainer, signal: str) -> None:
    """Ends a run that was stopped: samples, curve and the command that resumes it."""
    training, run = trainer.training, trainer.job.run
    trainer.events.sample()
    run.draw()
    training.keep_adapter()
    trainer.job.display.say(
        f"stopped by {signal or 'a signal to another process'} after step {training.step}, saved; "
        f"continue with\n  {command('lechat_jax.train', resume=run.address)}"
    )


def foretell(asked: TrainConfig) -> str:
    """Report of --dry-run: the memory that training takes on each device.

    Raises:
        BadInput: the options cannot be used.
    """
    if asked.resume:
        raise BadInput("--dry-run tells of a new run; give its options instead of --resume")
    mesh = simulated_mesh(asked.mesh or "fsdp=1")
    start = started(asked)
    shape = start.options.shape(platform())
    check_divides(mesh, start.model, shape.batch // start.options.accumulate)
    options = step_options(start.options, mesh if mesh.size > 1 else None)
    # The banded form, whose scores are never all in memory, stands for the kernels of others.
    long = start.model.windows[0] is not None and shape.block > start.model.windows[0] // 4
    backend = "banded" if long else None
    step = dataclasses.replace(options, backend=backend)
    memory = needed(start.model, step, shape.batch, shape.block, start.parts)
    return (
        f"{start.options.model_name} on {mesh.size} devices, {shape.batch} x {shape.block} tokens "
        f"in {shape.dtype} with --remat {start.options.remat}, memory of each as XLA plans it for "
        "a CPU, where bfloat16 is computed in float32 and layers are written out (accelerators "
        "need less; one alone, without --remat, keeps more of its layers):\n"
        f"{summary(memory)}\n"
        f"{_beside_images(start)}"
        f"and of the disk {checkpoint_bytes(options, start.parts) / 1e9:.2f} GB for each of "
        f"{start.options.keep} checkpoints (--keep) and one that is being written"
    )


def _beside_images(start: Start) -> str:
    """What a dry run says of a model that sees, whose data it has not read."""
    if not start.model.vision:
        return ""
    learns = " the projector is counted among what learns, and" if start.learning else ""
    return f"with images in the text{learns} the pixels and the tower's activations come on top\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m lechat_jax.train`; returns the exit code."""
    asked = cli.parse(TrainConfig, "lechat_jax.train", __doc__ or "", argv)
    if asked.dry_run:
        print(foretell(asked))
        return 0
    try:
        _trained(asked, process_start())
    except Diverged:  # it was said
        return 1
    return 0
