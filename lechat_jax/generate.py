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

from lechat_jax import cli
from lechat_jax.compilation import enable_compilation_cache
from lechat_jax.continuation import Sample, join
from lechat_jax.errors import BadInput
from lechat_jax.generator import CONTEXT, Generator
from lechat_jax.prompts import read_prompts
from lechat_jax.quantize import Format
from lechat_jax.sampling import Sampling
from lechat_jax.whole import check_writable, write_whole

RULE = "-" * 72  # between two samples


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """The flags of `python -m lechat_jax.generate`.

    Attributes:
        folder: Folder of a training run, such as runs/NAME, or of weights in lechat's format, as
            python -m parity.convert writes it.
        prompt: Text to continue. Empty: the model begins a text of its own.
        prompt_ids: Token ids to continue instead of a text, such as 1,415,2936. Nothing is put
            before them, so begin with BOS; no tokenizer is needed.
        prompts_file: File of prompts instead, a line each, or .jsonl with objects that have
            `prompt` (a text) or `ids`; "-" reads lines from stdin. Each is continued as if alone.
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
        ignore_eos: Go on when the model ends its text.
        context: Tokens that layers without a sliding window can hold, prompt included. Memory for
            all is taken at once, and generation stops there. Other models have no such limit.
        dtype: Type to compute in. By default as stored, but float32 on a CPU if that fits into
            memory. Weights of bfloat16 take half of it, and there prompts and batches are slower.
        quantize: Keep the weights in int8, a quarter of float32, or int4, an eighth; python -m
            parity.quality tells what that costs. A model stored like that stays so.
        speculate: Guess ahead from the text itself: the same text, sooner where it repeats itself.
        draft: Tokens that --speculate guesses at a time.
        json: File for ids, log-probabilities in nats, texts and tokens per second.
    """

    folder: tyro.conf.Positional[Path]
    prompt: str = ""
    prompt_ids: str = ""
    prompts_file: Path | None = None
    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int = 0
    samples: int = 1
    batch: int = 16
    ignore_eos: bool = False
    context: int = CONTEXT
    dtype: Literal["bfloat16", "float32"] | None = None
    quantize: Format | None = None
    speculate: bool = False
    draft: int = 7
    json: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Generates as the flags say; see `--help`."""
    options = cli.parse(GenerateConfig, "python -m lechat_jax.generate", __doc__ or "", argv)
    sampling = Sampling(
        options.temperature, options.top_k, options.top_p, options.min_p, options.seed
    )
    _check(options)
    enable_compilation_cache()
    asked = _prompts(options)
    generator = Generator.from_checkpoint(
        options.folder,
        context=options.context,
        dtype=options.dtype,
        quantize=options.quantize,
        batch=min(options.batch, len(asked) * options.samples),
        draft=options.draft if options.speculate else 0,
    )
    prompts = [prompt if isinstance(prompt, list) else generator.encode(prompt) for prompt in asked]
    rows = [prompt for prompt in prompts for _ in range(options.samples)]
    generator.check(rows, options.max_tokens)
    timed = Timed()
    samples = _tell(generator, rows, _batches(generator, rows, options, sampling, timed))
    _report(options, timed, samples)
    if options.json:
        _write(options.json, samples, timed.tokens_per_s)
    return 0


def _check(options: GenerateConfig) -> None:
    """Raises `BadInput` for what can be known to be wrong before anything is loaded."""
    for name in ("samples", "batch"):
        if getattr(options, name) < 1:
            raise BadInput(f"--{name} must be at least 1, not {getattr(options, name)}")
    if options.speculate and options.draft < 1:
        raise BadInput(f"--draft must be at least 1 token, not {options.draft}")
    check_writable(options.json)


def _batches(
    generator: Generator,
    rows: list[list[int]],
    options: GenerateConfig,
    sampling: Sampling,
    timed: "Timed",
) -> Iterator[Iterator[list[Sample]]]:
    """The rounds of one batch after the other."""
    for first in range(0, len(rows), options.batch):
        yield timed.watch(
            generator.stream(
                rows[first : first + options.batch],
                options.max_tokens,
                sampling,
                eos_ids=() if options.ignore_eos else None,
                draft=options.draft if options.speculate else 0,
                first_row=first,
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


def _prompts(options: GenerateConfig) -> list[str | list[int]]:
    """What is to be continued, as text or ids.

    Raises:
        BadInput: it was said twice, or is no prompt.
    """
    said = [name for name in ("prompt", "prompt_ids", "prompts_file") if getattr(options, name)]
    if len(said) > 1:
        raise BadInput(f"give {' or '.join('--' + n.replace('_', '-') for n in said)}, not both")
    if options.prompts_file:
        return read_prompts(options.prompts_file)
    if not options.prompt_ids:
        return [options.prompt]
    try:
        return [[int(id_) for id_ in options.prompt_ids.split(",")]]
    except ValueError:
        raise BadInput(
            f"--prompt-ids must be numbers with commas between them, not {options.prompt_ids!r}"
        ) from None


def _tell(
    generator: Generator, rows: list[list[int]], batches: Iterable[Iterator[list[Sample]]]
) -> list[Sample]:
    """All samples, printed after their prompts: one alone as it comes, several when complete."""

    def shown(ids: list[int], text: str) -> str:
        return text if generator.tokenizer else "".join(f"{id_} " for id_ in ids)

    def say(text: str, end: str = "") -> None:
        print(text, end=end, flush=True)

    alone = len(rows) == 1
    heads = [
        shown(row, generator.tokenizer.decode(row) if generator.tokenizer else "") for row in rows
    ]
    samples: list[Sample] = []
    say(heads[0] if alone else "")
    for rounds in batches:
        kept = []
        for pieces in rounds:
            kept.append(pieces)
            if alone:
                say(shown(pieces[0].ids, pieces[0].text))
        for sample in (join(pieces) for pieces in zip(*kept, strict=True)):
            if not alone:
                rule = f"{RULE}\n" if samples else ""
                say(rule + heads[len(samples)] + shown(sample.ids, sample.text), end="\n")
            samples.append(sample)
    say("", end="\n" if alone else "")
    return samples


def _report(options: GenerateConfig, timed: Timed, samples: list[Sample]) -> None:
    rate = f", then {timed.tokens_per_s:,.1f} tokens/s" if timed.tokens_per_s else ""
    print(f"{timed.tokens} tokens: the first after {timed.first or 0:.2f} s{rate}", file=sys.stderr)
    if full := sum(sample.stopped == "context" for sample in samples):
        print(
            f"{full} of {len(samples)} samples stopped at the context of {options.context} "
            "tokens; --context gives them more",
            file=sys.stderr,
        )


def _write(path: Path, samples: list[Sample], tokens_per_s: float | None) -> None:
    """The samples as JSON, all of them or none.

    Raises:
        BadInput: the file cannot be written.
    """
    found = {
        "samples": [
            {"ids": sample.ids, "logprobs": sample.logprobs, "text": sample.text}
            for sample in samples
        ],
        "tokens_per_s": tokens_per_s,
    }
    write_whole(path, json.dumps(found) + "\n")


if __name__ == "__main__":
    cli.run(main)
