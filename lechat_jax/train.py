"""Trains a Mistral on text and prints samples: `python -m lechat_jax.train`."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from lechat_jax import cli
from lechat_jax.compilation import enable_compilation_cache
from lechat_jax.config import MistralConfig
from lechat_jax.corpus import Corpus, load_corpus
from lechat_jax.data import Batches, load_tokens
from lechat_jax.display import Display, clock
from lechat_jax.errors import BadInput
from lechat_jax.options import TrainConfig
from lechat_jax.run import Run
from lechat_jax.stop import Stop
from lechat_jax.tokenizer import Tokenizer
from lechat_jax.trainer import Diverged, Trainer, elapsed


def set_up(asked: TrainConfig, display: Display) -> Trainer:
    """A trainer at the first step of a new run, or where a stopped one is to go on.

    Raises:
        BadInput: the options, the text or the folder cannot be used; nothing was written.
    """
    old = _stopped_run(asked) if asked.resume else None
    options, config = (old.options, old.model) if old else (asked, asked.model())
    tokenizer = Tokenizer.mistral_v1()
    if config.vocab_size < tokenizer.vocab_size:
        raise BadInput(
            f"the model has {config.vocab_size} token ids but the tokenizer "
            f"{tokenizer.vocab_size}; choose another preset"
        )
    corpus = load_corpus(options.data)
    display.say(f"text:  {corpus.name}, {corpus.n_bytes:,} bytes, SHA-256 {corpus.sha256}")
    if old and old.corpus_sha256 != corpus.sha256:
        raise BadInput(
            f"the text is not the one that {asked.resume} was started on (SHA-256 "
            f"{old.corpus_sha256}); restore it, or start a new run"
        )
    tokens = load_tokens(
        corpus, tokenizer, on_progress=lambda done, of: display.work("tokenising, byte", done, of)
    )
    if tokens.note:
        display.say(f"note: {tokens.note}")
    shape = options.shape(jax.default_backend())
    batches = Batches(len(tokens.train), shape.block, shape.batch, options.seed)
    run = old.run if old else _new_run(options, config, corpus, tokenizer)
    if options.tensorboard:
        run.mirror_to_tensorboard()
    trainer = Trainer(run, config, options, tokens, tokenizer, batches, display)
    display.say(
        f"model: {options.preset}, {config.n_params:,} parameters, "
        f"window {config.sliding_window or 'full'}\n"
        f"step:  {shape.batch} x {shape.block} tokens, {shape.dtype} on {jax.default_backend()}\n"
        f"run:   {run.folder}"
    )
    if old:
        trainer.restore()
    return trainer


class StoppedRun(NamedTuple):
    """What `config.json` of a run says."""

    run: Run
    options: TrainConfig
    model: MistralConfig
    corpus_sha256: str


def _stopped_run(asked: TrainConfig) -> StoppedRun:
    if flags := asked.contradictions():
        raise BadInput(f"--resume goes on with the run's own options; leave out {', '.join(flags)}")
    run = Run.open(Path(asked.resume or ""))
    config = run.config
    options = TrainConfig.from_dict(config["train"]).with_samples_of(asked)
    model = MistralConfig.from_dict(config["model"])
    return StoppedRun(run, options, model, config["train"].get("corpus_sha256", "unknown"))


def _new_run(
    options: TrainConfig, config: MistralConfig, corpus: Corpus, tokenizer: Tokenizer
) -> Run:
    name = options.name or f"{options.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = Run.create(options.out or Path("runs") / name)
    tokenizer.save(run.folder)
    shape = options.shape(jax.default_backend())._asdict()
    text = {"corpus": corpus.name, "corpus_bytes": corpus.n_bytes, "corpus_sha256": corpus.sha256}
    run.config = {"model": config.to_dict(), "train": options.to_dict() | shape | text}
    return run


def finish(trainer: Trainer, display: Display) -> None:
    """The full validation, the samples, the curve and the summary."""
    began = time.perf_counter()
    final = trainer.validator.full(
        trainer.state.weights, lambda done, of: display.work("validating, row", done, of)
    )
    if not any(row["step"] == trainer.step and "val/bpb" in row for row in trainer.run.metrics()):
        trainer.run.log([trainer.row() | final.metrics()])
    scored = final.tokens / (time.perf_counter() - began)
    trainer.sample()
    curve = trainer.run.draw()
    folder = trainer.run.folder
    display.say(
        f"{final.bits_per_byte:.4f} bits per byte on all {final.tokens:,} held-out tokens "
        f"({final.n_bytes:,} bytes, scored at {scored:,.0f} tokens/s)\n"
        f"trained on {trainer.seen:,} tokens in {trainer.step} steps, "
        f"lately {trainer.rate:,.0f} tokens/s, {clock(elapsed())} since the start\n"
        f"curve    {curve}\n"
        f"metrics  {folder / 'metrics.jsonl'}\n"
        f"samples  {trainer.run.samples}\n"
        f"weights  {trainer.run.checkpoints / str(trainer.step)}\n"
        "generate more:\n"
        f'  python -m lechat_jax.generate {folder} --prompt "{trainer.default_prompt()}"',
    )


def pause(trainer: Trainer, signal: str, display: Display) -> None:
    """The samples, the curve and the way on of a run that was asked to stop."""
    trainer.sample()
    trainer.run.draw()
    display.say(
        f"stopped by {signal} after step {trainer.step}, saved; continue with\n"
        f"  python -m lechat_jax.train --resume {trainer.run.folder}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The main job; see `--help`."""
    asked = cli.parse(TrainConfig, "python -m lechat_jax.train", __doc__ or "", argv)
    enable_compilation_cache()
    with Display(None) as display:
        trainer = set_up(asked, display)
        display.total = trainer.total
        try:
            with Stop() as stop:
                trainer.train(stop)
        except Diverged as error:
            display.say(f"stopped: {error}", style="red")
            return 1
        if trainer.step == trainer.total:
            finish(trainer, display)
        else:
            pause(trainer, stop.asked, display)
    return 0


if __name__ == "__main__":
    cli.run(main)
