"""Continues text with a trained model, however long it gets.

The prompt and its continuation go to stdout as they come, the speed to stderr. Memory does
not grow with the text: each layer keeps its `sliding_window` tokens and no more.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import tyro

from lechat_jax.checkpoint.saved_model import Trained
from lechat_jax.cli import flags
from lechat_jax.cli.display import Reading, Visible
from lechat_jax.devices.compile_cache import enable_compilation_cache
from lechat_jax.errors import BadInput
from lechat_jax.files.atomic import check_writable, write_whole
from lechat_jax.generate.continuation import Sample, join, stop_texts
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.loaded_model import CONTEXT
from lechat_jax.generate.prompt_files import Prompt, read_prompts
from lechat_jax.generate.sampling import Sampling
from lechat_jax.quantize.scheme import Format
from lechat_jax.tokenizer.vocabulary import no_tokenizer

RULE = "-" * 72  # between two samples


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """The flags of `python -m lechat_jax.generate`.

    Attributes:
        folder: Folder of a training run, such as runs/NAME, or of weights in lechat's format, as
            python -m parity.convert writes it.
        prompt: Text to continue; may be given several times, and each is continued as if alone.
            Empty, or without any prompt, the model begins a text of its own.
        prompt_ids: Token ids to continue instead of a text, such as 1,415,2936; may be given
            several times. Nothing is put before them, so begin with BOS; no tokenizer is needed.
        prompts_file: File of prompts instead, a line each, or .jsonl with objects that have
            `prompt` (a text) or `ids`; "-" reads lines from stdin. Each is continued as if alone;
            an empty line is an empty prompt.
        max_tokens: Most new tokens in each sample.
        temperature: What logits are divided by before a draw: 1 is the model's own distribution,
            less is safer, 0 takes the likeliest token always.
        top_k: Draw from the k likeliest tokens only; 0 is all.
        top_p: Draw from the likeliest tokens only, as many as it takes to pass this probability; 1
            is all.
        min_p: Draw only from tokens at least this fraction as likely as the likeliest; 0 is all.
        seed: Of the draws: the same seed gives the same text.
        samples: How many continuations of each prompt.
        batch: Most continuations made at once. Each takes a cache of its own.
        stop: Text that ends a continuation, which is cut before it, wherever the borders of
            tokens are; may be given several times.
        ignore_eos: Go on when the model ends its text.
        context: Tokens that layers without a sliding window can hold, prompt included. Memory for
            all is taken at once, and generation stops there. Other models have no such limit.
        dtype: Type to compute in. By default as stored, but float32 on a CPU if that fits into
            memory. Weights of bfloat16 take half of it, and there prompts and batches are slower.
        quantize: Keep the weights in int8, a quarter of float32, or int4, an eighth; python -m
            parity.quality tells what that costs. A model stored like that stays so.
        speculate: Guess ahead from the text itself: the same text, sooner where it repeats itself.
        draft: Tokens that --speculate guesses at a time.
        json: File for the samples, each with its prompt, the index of that and the number of the
            sample, ids, log-probabilities in nats, text and why it stopped; and the speed.
    """

    folder: tyro.conf.Positional[Path]
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    prompt_ids: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    prompts_file: Path | None = None
    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int = 0
    samples: int = 1
    batch: int = 16
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    ignore_eos: bool = False
    context: int = CONTEXT
    dtype: Literal["bfloat16", "float32"] | None = None
    quantize: Format | None = None
    speculate: bool = False
    draft: int = 7
    json: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Generates as the flags say; see `--help`."""
    options = flags.parse(GenerateConfig, "python -m lechat_jax.generate", __doc__ or "", argv)
    sampling = Sampling(
        options.temperature, options.top_k, options.top_p, options.min_p, options.seed
    )
    _check(options)
    enable_compilation_cache()
    asked = _prompts(options)
    if any(isinstance(prompt, str) for prompt in asked):
        check_tokenizer(options.folder)
    generator = Generator.from_checkpoint(
        options.folder,
        context=options.context,
        dtype=options.dtype,
        quantize=options.quantize,
        batch=min(options.batch, len(asked) * options.samples),
        draft=options.draft if options.speculate else 0,
        on_read=Reading(),
    )
    rows = [ids for ids in map(generator.ids_of, asked) for _ in range(options.samples)]
    generator.check(rows, options.max_tokens)
    timed, samples = Timed(), list[Sample]()
    try:
        _tell(generator, rows, _batches(generator, rows, options, sampling, timed), samples)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        samples += [Sample([], [], "", "interrupted")] * (len(rows) - len(samples))
        if options.json:
            _write(options.json, asked, samples, timed.tokens_per_s)
        raise
    _report(options, timed, samples)
    if options.json:
        _write(options.json, asked, samples, timed.tokens_per_s)
    return 0


def _check(options: GenerateConfig) -> None:
    """Raises `BadInput` for what can be known to be wrong before anything is loaded."""
    for name in ("samples", "batch"):
        if getattr(options, name) < 1:
            raise BadInput(f"--{name} must be at least 1, not {getattr(options, name)}")
    if options.speculate and options.draft < 1:
        raise BadInput(f"--draft must be at least 1 token, not {options.draft}")
    stop_texts(options.stop)
    check_writable(options.json)


def check_tokenizer(folder: Path) -> None:
    """Raises `BadInput` for a model without a tokenizer, before its weights are read."""
    if Trained.open(folder).tokenizer is None:
        raise BadInput(f"{no_tokenizer(folder, 'a prompt cannot be read')}, or give --prompt-ids")


def _batches(
    generator: Generator,
    rows: list[Sequence[int]],
    options: GenerateConfig,
    sampling: Sampling,
    timed: "Timed",
) -> Iterator[Iterator[list[Sample]]]:
    """The rounds of one batch after the other."""
    for first in range(0, len(rows), options.batch):
        yield timed.watch(
            generator.stream_batch(
                rows[first : first + options.batch],
                options.max_tokens,
                sampling,
                eos_ids=() if options.ignore_eos else None,
                draft=options.draft if options.speculate else 0,
                first_row=first,
                stop=options.stop,
            )
        )


class Timed:
    """How fast the rounds of all batches came.

    Attributes:
        tokens: all that came, of all samples.
        first: seconds until the first round, which reads the prompts.
        tokens_per_s: of the rounds after the first of each batch, all samples together; `None`
            without any.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.first: float | None = None
        self._later, self._seconds = 0, 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """See the class."""
        return self._later / self._seconds if self._later else None

    def watch(self, rounds: Iterator[list[Sample]]) -> Iterator[list[Sample]]:
        """The same rounds, on the clock."""
        began = time.perf_counter()
        for number, pieces in enumerate(rounds):
            now = time.perf_counter()
            n = sum(len(piece.ids) for piece in pieces)
            self.tokens += n
            if number:
                self._later += n
                self._seconds += now - began
            elif self.first is None:
                self.first = now - began
            yield pieces
            began = time.perf_counter() if number else now


def _prompts(options: GenerateConfig) -> list[Prompt]:
    """What is to be continued, as text or ids.

    Raises:
        BadInput: it was said in two ways, or is no prompt.
    """
    said = [name for name in ("prompt", "prompt_ids", "prompts_file") if getattr(options, name)]
    if len(said) > 1:
        raise BadInput(f"give {' or '.join('--' + n.replace('_', '-') for n in said)}, not both")
    if options.prompts_file:
        prompts = read_prompts(options.prompts_file)
        if n_empty := prompts.count(""):
            print(
                f"{n_empty} of {len(prompts)} prompts in {options.prompts_file} are empty: there "
                "the model begins texts of its own",
                file=sys.stderr,
            )
        return prompts
    if options.prompt_ids:
        return [_ids(said) for said in options.prompt_ids]
    return [*options.prompt] or [""]


def _ids(said: str) -> list[int]:
    try:
        return [int(id_) for id_ in said.split(",")]
    except ValueError:
        raise BadInput(
            f"--prompt-ids must be numbers with commas between them, not {said!r}"
        ) from None


def _tell(
    generator: Generator,
    rows: list[Sequence[int]],
    batches: Iterable[Iterator[list[Sample]]],
    samples: list[Sample],
) -> None:
    """Prints all samples after their prompts: one alone as it comes, several when complete.

    They are appended to `samples`, interrupted ones too.
    """
    alone = len(rows) == 1
    visible = Visible().show if sys.stdout.isatty() else str

    def say(text: str, end: str = "") -> None:
        print(visible(text), end=end, flush=True)

    def shown(ids: Sequence[int], text: str) -> str:
        return text if generator.tokenizer else "".join(f"{id_} " for id_ in ids)

    def head(row: Sequence[int]) -> str:
        return shown(row, generator.tokenizer.decode(row) if generator.tokenizer else "")

    for rounds in batches:
        kept: list[list[Sample]] = []
        try:
            for pieces in rounds:
                if alone:  # after it was read, which may have taken a line of its own
                    say((head(rows[0]) if not kept else "") + shown(pieces[0].ids, pieces[0].text))
                kept.append(pieces)
        except KeyboardInterrupt:
            samples += [_interrupted(join(pieces)) for pieces in zip(*kept, strict=True)]
            raise
        for sample in (join(pieces) for pieces in zip(*kept, strict=True)):
            if not alone:
                rule = f"{RULE}\n" if samples else ""
                row = rows[len(samples)]
                say(rule + head(row) + shown(sample.ids, sample.text), end="\n")
            samples.append(sample)
    say("", end="\n" if alone else "")


def _interrupted(sample: Sample) -> Sample:
    """The sample as far as it came, unless it had ended by itself."""
    return dataclasses.replace(sample, stopped=sample.stopped or "interrupted")


def _report(options: GenerateConfig, timed: Timed, samples: list[Sample]) -> None:
    rate = f", then {timed.tokens_per_s:,.1f} tokens/s" if timed.tokens_per_s else ""
    print(f"{timed.tokens} tokens: the first after {timed.first or 0:.2f} s{rate}", file=sys.stderr)
    if full := sum(sample.stopped == "context" for sample in samples):
        print(
            f"{full} of {len(samples)} samples stopped at the context of {options.context} "
            "tokens; --context gives them more",
            file=sys.stderr,
        )


def _write(
    path: Path, prompts: Sequence[Prompt], samples: list[Sample], tokens_per_s: float | None
) -> None:
    """The samples as JSON, all of them or none, those of each prompt in a row.

    Raises:
        BadInput: the file cannot be written.
    """
    of_each = len(samples) // len(prompts)
    found = {
        "samples": [
            {
                "prompt": prompts[number // of_each],
                "index": number // of_each,
                "sample": number % of_each,
                **dataclasses.asdict(sample),
            }
            for number, sample in enumerate(samples)
        ],
        "tokens_per_s": tokens_per_s,
    }
    write_whole(path, json.dumps(found) + "\n")
