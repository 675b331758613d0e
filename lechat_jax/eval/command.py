"""Perplexity of a text under a model, or tasks of lm-evaluation-harness.

    python -m lechat_jax.eval DIR --data FILE
    python -m lechat_jax.eval DIR --tasks hellaswag,arc_easy

Each document is read on its own, in windows that overlap: of a long one, every token is scored
once, with at least `--block` minus `--stride` tokens before it. BOS is given, and what is only
read in examples (questions, prompts) is not scored.
"""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro

from lechat_jax.checkpoint.load import load_to_compute
from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.cli import flags
from lechat_jax.cli.display import Display, clock
from lechat_jax.cli.signals import Stop
from lechat_jax.data.examples import load_examples
from lechat_jax.data.held_out import HeldOut, decoded_bytes
from lechat_jax.data.packing import Documents, Packed
from lechat_jax.data.sources import form_of, load_texts
from lechat_jax.data.tokens import load_tokens
from lechat_jax.devices.compile_cache import enable_compilation_cache
from lechat_jax.devices.mesh import ROWS, check_divides, make_mesh, shardings
from lechat_jax.errors import BadInput
from lechat_jax.eval.score import Score, Validator
from lechat_jax.files.atomic import check_writable, write_atomic
from lechat_jax.generate.generator import Generator
from lechat_jax.model.scoring import Forward
from lechat_jax.quantize.scheme import Format
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.tokenizer.vocabulary import no_tokenizer

ANY = 1 << 40  # tokens of a row that holds any example
OF_TEXT = ("data", "part", "stride", "tokens", "minutes")
OF_TASKS = ("include_path", "fewshot", "limit", "chat_template", "batch")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The flags of `python -m lechat_jax.eval`.

    Attributes:
        dir: Model: a training run, or a folder in lechat's, Hugging Face's or Mistral's format, a
            GGUF file, either in a bucket (gs:// or s3://), or the name of a model on the Hugging
            Face Hub.
        data: Text to score, as in training: files, a folder or a dataset; of examples only the
            answers are scored. By default what the run was trained on.
        part: Whether all of the text is scored or the held-out tenth (held-out). By default all of
            --data, and the held-out part of what the run was trained on.
        tasks: Tasks of lm-evaluation-harness instead of a text, with commas between them, such as
            hellaswag,arc_easy (extra lm-eval).
        include_path: Folder with tasks of your own (YAML) for --tasks.
        fewshot: Examples before each question of --tasks. By default as many as a task says.
        limit: Upper limit of questions of each of --tasks, for a try. By default all.
        chat_template: Ask the questions of --tasks as a conversation.
        batch: Rows that --tasks are scored or answered in at a time.
        block: Upper limit of tokens in a window; of --tasks those of a question with its answer,
            longer ones are cut at the left. By default 1024, and 4096 for --tasks.
        stride: Tokens between the starts of two windows of a long document; fewer give each token
            more context, and take longer. By default half of --block.
        dtype: Type to compute in, float32 or bfloat16. By default as stored, but float32 on a CPU
            where that fits.
        quantize: Quantise the weights to int8 or int4 when they are loaded. By default they stay as
            stored.
        mesh: Devices that share the work, such as fsdp=8 or fsdp=2,tp=4, as in training. By
            default one device.
        tokens: Upper limit of tokens to score, evenly spread over the text: the same ones each
            time. By default all.
        minutes: Time limit, in minutes; the figures then are of what was scored so far, as they are
            after Ctrl-C, and --tokens with their number scores just these again. By default there
            is none.
        json: JSON file to write the figures to, for scripts. By default there is none.
    """

    dir: tyro.conf.Positional[Path]
    data: str | None = None
    part: Literal["all", "held-out"] | None = None
    tasks: str | None = None
    include_path: Path | None = None
    fewshot: int | None = None
    limit: int | None = None
    chat_template: bool = False
    batch: int = 8
    block: int | None = None
    stride: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    quantize: Format | None = None
    mesh: str | None = None
    tokens: int | None = None
    minutes: float | None = None
    json: Path | None = None

    def __post_init__(self) -> None:
        for name, least in {"block": 1, "batch": 1, "limit": 1, "fewshot": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise BadInput(f"--{name} must be at least {least}, not {value}")
        if self.stride is not None and not 1 <= self.stride <= self.window:
            raise BadInput(
                f"--stride must be from 1 to the {self.window} of --block, not {self.stride}"
            )
        if self.tokens is not None and self.tokens < 1:
            raise BadInput(f"--tokens must be at least 1, not {self.tokens}")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise BadInput(f"--minutes must be a finite number above 0, not {self.minutes}")
        if self.tasks is not None and not self.task_names:
            raise BadInput("--tasks names no task; say some, with commas between them")
        if self.tasks and self.mesh:
            raise BadInput("--tasks runs on one device; leave out --mesh")
        of_other = OF_TEXT if self.tasks else OF_TASKS
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        if given := [name for name in of_other if getattr(self, name) != usual[name]]:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            of = "a text, and --tasks have their own" if self.tasks else "--tasks"
            raise BadInput(f"{names}: that is of {of}; leave it out")
        check_writable(self.json)

    @property
    def task_names(self) -> list[str]:
        """The tasks of --tasks."""
        return [name for part in (self.tasks or "").split(",") if (name := part.strip())]

    @property
    def window(self) -> int:
        """Tokens of a window at most."""
        return self.block or (4096 if self.tasks else 1024)


class Text(NamedTuple):
    """Documents to score, as windows of tokens.

    Attributes:
        name: of it, for people.
        documents: each on its own.
        n_bytes: of UTF-8 that the counted tokens stand for.
        notes: what a reader of the figures should know, a sentence each.
        tokenizer: that has read it.
    """

    name: str
    documents: Documents
    n_bytes: int
    notes: tuple[str, ...]
    tokenizer: Tokenizer


def windows(documents: Documents, block: int, stride: int) -> Documents:
    """Splits documents into strided windows of up to `block + 1` tokens, one every `stride`.

    What one piece has scored counts in no other. Pieces of which nothing counts are left out.

    >>> whole = Documents.of([([1, 5, 6, 7, 8], [False, True, True, True, True])])
    >>> parts = windows(whole, block=2, stride=1)
    >>> parts.ids.tolist(), parts.counted.astype(int).tolist()
    ([1, 5, 6, 5, 6, 7, 6, 7, 8], [0, 1, 1, 0, 0, 1, 0, 0, 1])

    Raises:
        BadInput: a document with images does not fit into a window.
    """
    pieces, images = [], []
    shown = documents.images or [()] * len(documents.lengths)
    for own, (begin, end) in zip(shown, itertools.pairwise(documents.begins.tolist()), strict=True):
        if own and end - begin > block + 1:
            lengths = zip(documents.lengths.tolist(), shown, strict=True)
            raise BadInput(
                "an example with images is scored in one window, and the longest has more than "
                f"{block} tokens; say --block {max(n for n, own in lengths if own) - 1}"
            )
        scored = begin + 1
        for start in range(begin, end, stride):
            stop = min(start + block + 1, end)
            counted = documents.counted[start:stop].copy()
            counted[: scored - start] = False
            if counted.any():
                pieces.append((documents.ids[start:stop], counted))
                images.append(own)
            scored = stop
            if stop == end:
                break
    ids, counted = (np.concatenate(leaves) for leaves in zip(*pieces, strict=True))
    begins = np.cumsum([0, *(len(piece) for piece, _ in pieces)])
    return Documents(ids, counted, begins, images if documents.images else ())


def load_text(options: EvalConfig, trained: SavedModel, display: Display) -> Text:
    """Reads and encodes the text or examples that the options name.

    Raises:
        BadInput: there is no such text, or no tokenizer that fits the model.
    """
    tokenizer = trained.tokenizer
    if tokenizer is None:
        raise BadInput(no_tokenizer(options.dir, "no text can be read"))
    asked = trained.run.config["train"].get("data") if trained.run else None
    data = options.data if options.data is not None else asked
    part = options.part or ("all" if options.data is not None else "held-out")

    progress = display.counter("tokenising")
    if data is not None and (form := form_of(data)):
        examples = load_examples(data, form, tokenizer, ANY, progress, vision=trained.config.vision)
        notes = _notes(examples.note)
        if part == "held-out":
            notes += _notes(trained.not_trained_on(options.data, data, examples.sha256))
            return Text(data, examples.val, sum(examples.val_bytes), notes, tokenizer)
        both = _joined(examples.train, examples.val)
        return Text(
            data, both, sum(examples.train_bytes) + sum(examples.val_bytes), notes, tokenizer
        )
    if part == "held-out":
        tokens = load_tokens(data, tokenizer, on_progress=progress)
        documents = Documents.of_stream(tokens.val, tokenizer.bos_id, ANY)
        changed = trained.not_trained_on(options.data, tokens.name, tokens.sha256)
        notes = _notes(tokens.note, changed)
        return Text(tokens.name, _but_bos(documents), tokens.val_bytes, notes, tokenizer)
    return _whole(data, tokenizer)


def _notes(*sentences: str) -> tuple[str, ...]:
    return tuple(filter(None, sentences))


def _whole(data: str | None, tokenizer: Tokenizer) -> Text:
    """Encodes all of the text that `data` names."""
    found = load_texts(data)
    texts = found.documents
    if not texts:
        raise BadInput(f"{found.name} is empty; give --data a text to score")
    ends = [tokenizer.bos_id], [tokenizer.eos_id]
    each = [np.concatenate([ends[0], ids, ends[1]]) for ids in tokenizer.encode_batch(texts)]
    ids = np.concatenate(each).astype(np.int32)
    documents = Documents(ids, np.ones(len(ids), bool), np.cumsum([0, *map(len, each)]))
    n_bytes = sum(len(text.encode()) for text in texts)
    return Text(found.name, _but_bos(documents), n_bytes, found.notes, tokenizer)


def _but_bos(documents: Documents) -> Documents:
    """Marks all tokens of the documents as counted but the first of each."""
    counted = documents.counted.copy()
    counted[documents.begins[:-1]] = False
    return documents._replace(counted=counted)


def _joined(a: Documents, b: Documents) -> Documents:
    return Documents(
        np.concatenate([a.ids, b.ids]),
        np.concatenate([a.counted, b.counted]),
        np.concatenate([a.begins, a.begins[-1] + b.begins[1:]]),
        [*a.images, *b.images],
    )


def measure(options: EvalConfig, display: Display) -> dict[str, Any]:
    """Scores a model on documents: loss, perplexity, bits per byte, as JSON types.

    Raises:
        BadInput: the model or the text cannot be used.
    """
    trained = SavedModel.open(options.dir)
    text = load_text(options, trained, display)
    for note in text.notes:
        display.say(f"note: {note}")
    stride = options.stride or -(-options.window // 2)
    pieces = windows(text.documents, options.window, stride)
    block = min(options.window, int(pieces.lengths.max()) - 1)
    packed = Packed(pieces, block, batch=1, seed=0, vision=trained.config.vision)
    display.wait("loading weights")
    mesh = make_mesh(options.mesh) if options.mesh else None
    if mesh:
        check_divides(mesh, trained.config, batch=mesh.shape[ROWS])
    how = (options.dtype, options.quantize, lambda shapes: None)
    weights = load_to_compute(trained, *how, mesh=mesh, places=shardings)
    dtype = str(weights["norm.scale"].dtype)
    scored = packed.one_epoch()
    bytes_of = decoded_bytes(scored, text.tokenizer)
    held = HeldOut(scored, text.n_bytes, np.arange(packed.windows), bytes_of, packed.images_of)
    forward = Forward(dtype="bfloat16" if dtype == "bfloat16" else "float32", mesh=mesh)
    validator = Validator(trained.config, forward, held)
    display.wait("compiling")
    began = time.perf_counter()
    end = math.inf if options.minutes is None else began + 60 * options.minutes
    with Stop() as stop:
        score = validator.full(
            weights,
            display.counter("scoring, row", packed.block, " tokens"),
            options.tokens,
            lambda: bool(stop.received) or time.perf_counter() > end,
        )
    return _figures(options, text, stride, dtype, score) | {
        "of_tokens": int(held.counts.sum()),
        "stopped": stop.received or None,
        "tokens_per_s": score.tokens / (time.perf_counter() - began),
        "quantization": trained.quantization or options.quantize,
        "device": jax.devices()[0].device_kind,
    }


def _figures(
    options: EvalConfig, text: Text, stride: int, dtype: str, score: Score
) -> dict[str, Any]:
    return {
        "folder": str(options.dir),
        "text": text.name,
        "documents": len(text.documents.lengths),
        "tokens": score.tokens,
        "bytes": score.n_bytes,
        "loss": score.loss,
        "perplexity": math.exp(min(score.loss, 700)),
        "bits_per_byte": score.bits_per_byte,
        "block": options.window,
        "stride": stride,
        "dtype": dtype,
        "notes": [*text.notes],
    }


def run_tasks(options: EvalConfig, display: Display) -> dict[str, Any]:
    """Runs tasks of lm-evaluation-harness; returns its results.

    Raises:
        BadInput: it is not installed, or the model or a task cannot be used.
    """
    try:
        from lechat_jax.eval.harness import HarnessModel, evaluate
    except ModuleNotFoundError as error:
        raise BadInput(
            f"{error.name} is not installed: pip install 'lechat-jax[lm-eval]'"
        ) from error
    saved = SavedModel.open(options.dir)
    display.wait("loading weights")
    model = Generator.from_checkpoint(
        saved, context=options.window, dtype=options.dtype, quantize=options.quantize
    )
    began = time.perf_counter()

    def progress(what: str, done: int, of: int) -> None:
        nonlocal began
        began = began if done else time.perf_counter()
        rate = done / (time.perf_counter() - began + 1e-9)
        left = f" · {clock((of - done) / rate)} left · {rate:,.1f} requests/s" if done else ""
        display.work(f"{what}, request", done, of, left)

    folder = saved.tokenizer_folder
    harness = HarnessModel(model, folder, options.window, options.batch, progress)
    return evaluate(
        harness,
        options.task_names,
        options.include_path,
        options.fewshot,
        options.limit,
        options.chat_template,
    ) | {"folder": str(options.dir), "block": options.window}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m lechat_jax.eval`; returns the exit code."""
    options = flags.parse(EvalConfig, "lechat_jax.eval", __doc__ or "", argv)
    enable_compilation_cache()
    with Display(None) as display:
        found = run_tasks(options, display) if options.tasks else measure(options, display)
    if options.tasks:
        print(found["table"])
    else:
        _print(found)
    if options.json:
        write_atomic(options.json, json.dumps(found, indent=1, allow_nan=False) + "\n")
        print(f"report: {options.json}")
    return 0


def _print(found: Mapping[str, Any]) -> None:
    """Prints the figures of a text."""
    n, of = found["tokens"], found["of_tokens"]
    part = f"{n:,} tokens" if n == of else f"{n:,} of {of:,} tokens, evenly spread (--tokens {n})"
    print(
        f"{found['loss']:.5f} nats per token, perplexity {found['perplexity']:,.4f}, "
        f"{found['bits_per_byte']:.5f} bits per byte\n"
        f"on {part} ({found['bytes']:,} bytes) of {found['text']}, "
        f"documents: {found['documents']:,}, each on its own, in windows of {found['block']:,} "
        f"tokens every {found['stride']:,}"
    )
