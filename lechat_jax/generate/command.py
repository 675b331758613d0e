"""Generates text: continues prompts with a trained model, to any length.

The prompt and its continuation stream to stdout, the speed goes to stderr. Memory does not grow
with the text: the KV cache of each layer holds its `sliding_window` tokens and no more.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tyro

from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.cli import flags
from lechat_jax.cli.display import PrefillProgress, Visible
from lechat_jax.devices.compile_cache import enable_compilation_cache
from lechat_jax.errors import BadInput
from lechat_jax.files.atomic import check_writable, write_atomic
from lechat_jax.generate.continuation import Sample, join
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.options import GenerationOptions
from lechat_jax.generate.prompt_files import Prompt, read_prompts
from lechat_jax.generate.sampling import Sampling
from lechat_jax.tokenizer.images import Image
from lechat_jax.tokenizer.vocabulary import no_tokenizer

RULE = "-" * 72  # between two samples


@dataclasses.dataclass(frozen=True)
class GenerateConfig(GenerationOptions):
    """The flags of `python -m lechat_jax.generate`.

    Attributes:
        prompt: Text to continue; repeatable, each prompt is independent. An empty prompt, or
            none at all, lets the model start from BOS.
        prompt_ids: Token ids to continue instead of text, such as 1,415,2936; repeatable. BOS is
            not added, so begin with it; needs no tokenizer.
        prompts_file: File of prompts instead: one a line, or .jsonl of objects with `prompt`
            (text) or `ids`; "-" reads lines from stdin. Each prompt is independent; an empty
            line is an empty prompt.
        image: Image before the prompt, for a model that sees: a file such as cat.jpg; repeatable,
            for one --prompt or none.
        samples: Number of samples of each prompt.
        batch: Maximum samples decoded at once; each has a KV cache of its own.
        ignore_eos: Continue after EOS, to --max-tokens. By default EOS ends a sample.
        json: JSON file for the samples and the speed in tokens/s: of each sample the prompt, its
            index, the sample's number, ids, log-probabilities in nats, text and stop reason. By
            default none is written.
    """

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    prompt_ids: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    prompts_file: Path | None = None
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    samples: int = 1
    batch: int = 16
    ignore_eos: bool = False
    json: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command `generate`: parses flags, generates, prints; returns the exit code."""
    options = flags.parse(GenerateConfig, "lechat_jax.generate", __doc__ or "", argv)
    sampling = options.sampling
    _check(options)
    enable_compilation_cache()
    asked = _prompts(options)
    if any(isinstance(prompt, str) for prompt in asked):
        check_tokenizer(options.saved)
    batch = min(options.batch, len(asked) * options.samples)
    generator = options.load(batch, PrefillProgress())
    images = generator.read_images(options.image)
    prompts = [generator.ids_of(prompt, images) for prompt in asked]
    rows = [ids for ids in prompts for _ in range(options.samples)]
    generator.check(rows, options.max_tokens, images=[images] * len(rows))
    timed, samples = Timed(), list[Sample]()
    try:
        batches = _batches(generator, rows, images, options, sampling, timed)
        _tell(generator, rows, batches, samples)
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
    """Validates the flags before anything is loaded; raises `BadInput`."""
    for name in ("samples", "batch"):
        if getattr(options, name) < 1:
            raise BadInput(f"--{name} must be at least 1, not {getattr(options, name)}")
    options.check()
    check_writable(options.json)
    if options.image and (options.prompt_ids or options.prompts_file or len(options.prompt) > 1):
        raise BadInput("--image belongs to one --prompt; give a single one, or none")
    if options.image and options.saved.config.vision is None:
        raise BadInput(f"{options.folder} has no vision tower, so it sees no --image")


def check_tokenizer(saved: SavedModel) -> None:
    """Raises `BadInput` for a model without a tokenizer, before its weights are loaded."""
    if saved.tokenizer is None:
        raise BadInput(
            f"{no_tokenizer(saved.folder, 'a prompt cannot be read')}, or give --prompt-ids"
        )


def _batches(
    generator: Generator,
    rows: list[Sequence[int]],
    images: list[Image],
    options: GenerateConfig,
    sampling: Sampling,
    timed: "Timed",
) -> Iterator[Iterator[list[Sample]]]:
    """Generates batch after batch: an iterator of rounds for each."""
    for first in range(0, len(rows), options.batch):
        several = rows[first : first + options.batch]
        yield timed.watch(
            generator.stream_batch(
                several,
                options.max_tokens,
                sampling,
                eos_ids=() if options.ignore_eos else None,
                draft=options.n_drafted,
                first_row=first,
                stop=options.stop,
                images=[images] * len(several),
            )
        )


class Timed:
    """Measures the generation speed over all batches, in tokens/s.

    Attributes:
        tokens: number of tokens generated, of all samples.
        first: time to first token in seconds: the prefill and the first round.
        tokens_per_s: decoding speed of all samples together, without the first round of each
            batch; `None` if there are no other rounds.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.first: float | None = None
        self._later, self._seconds = 0, 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding speed of all samples together; `None` if it was not measured."""
        return self._later / self._seconds if self._later else None

    def watch(self, rounds: Iterator[list[Sample]]) -> Iterator[list[Sample]]:
        """Passes the rounds of a batch through and times them."""
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
    """The prompts of the flags, as text or ids.

    Raises:
        BadInput: they are given in two ways, or one is not a prompt.
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
    """Prints prompts and samples: a single sample as it streams, several when complete.

    Samples are appended to `samples`, interrupted ones too.
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
    """Marks an unfinished sample as interrupted."""
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
    """Writes the samples as JSON, atomically, those of each prompt side by side.

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
    write_atomic(path, json.dumps(found) + "\n")
