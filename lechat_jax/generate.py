"""Continues text with a trained model, however long it gets.

The prompt and its continuation go to stdout as they come, the speed to stderr. Memory does
not grow with the text: each layer keeps its `sliding_window` tokens and no more.
"""

import dataclasses
import io
import json
import os
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
from lechat_jax.sampling import Sampling

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
        max_tokens: Most new tokens in each sample.
        temperature: What logits are divided by before a draw: 1 is the model's own distribution,
            less is safer, 0 takes the likeliest token always.
        top_k: Draw from the k likeliest tokens only; 0 is all.
        top_p: Draw from the likeliest tokens only, as many as it takes to pass this probability; 1
            is all.
        min_p: Draw only from tokens at least this fraction as likely as the likeliest; 0 is all.
        seed: Of the draws: the same seed gives the same text.
        samples: How many continuations, made in one batch.
        ignore_eos: Go on when the model ends its text.
        context: Tokens that layers without a sliding window can hold, prompt included. Memory for
            all is taken at once, and generation stops there. Other models have no such limit.
        dtype: Type to compute in. By default as stored, but float32 on a CPU, where bfloat16 takes
            half the memory but ten times the time.
        json: File for ids, log-probabilities in nats, texts and tokens per second.
    """

    folder: tyro.conf.Positional[Path]
    prompt: str = ""
    prompt_ids: str = ""
    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int = 0
    samples: int = 1
    ignore_eos: bool = False
    context: int = CONTEXT
    dtype: Literal["bfloat16", "float32"] | None = None
    json: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Generates as the flags say; see `--help`."""
    options = cli.parse(GenerateConfig, "python -m lechat_jax.generate", __doc__ or "", argv)
    sampling = Sampling(
        options.temperature, options.top_k, options.top_p, options.min_p, options.seed
    )
    if options.samples < 1:
        raise BadInput(f"--samples must be at least 1, not {options.samples}")
    if options.json and not options.json.absolute().parent.is_dir():
        raise BadInput(f"there is no folder {options.json.absolute().parent} to write --json to")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where a terminal lacks a letter
    enable_compilation_cache()
    generator = Generator.from_checkpoint(
        options.folder, context=options.context, dtype=options.dtype
    )
    prompt = _prompt(options, generator)
    timed = Timed(
        generator.stream(
            [prompt] * options.samples,
            options.max_tokens,
            sampling,
            eos_ids=() if options.ignore_eos else None,
        )
    )
    samples = _tell(generator, prompt, timed, alone=options.samples == 1)
    _report(options, timed, samples)
    if options.json:
        _write(options.json, samples, timed.tokens_per_s)
    return 0


class Timed:
    """The rounds of a stream, and how fast they came.

    Attributes:
        tokens: all that came, of all samples.
        first: seconds until the first round, which reads the prompt and compiles.
        tokens_per_s: of the rounds after the first, all samples together; `None` without.
    """

    def __init__(self, rounds: Iterator[list[Sample]]) -> None:
        self._rounds = rounds
        self.tokens = 0
        self.first = 0.0
        self.tokens_per_s: float | None = None

    def __iter__(self) -> Iterator[list[Sample]]:
        began = time.perf_counter()
        later = 0
        for number, pieces in enumerate(self._rounds):
            seconds = time.perf_counter() - began
            n = sum(len(piece.ids) for piece in pieces)
            self.tokens += n
            if number == 0:
                self.first = seconds
            else:
                later += n
                self.tokens_per_s = later / (seconds - self.first)
            yield pieces


def _prompt(options: GenerateConfig, generator: Generator) -> list[int]:
    if not options.prompt_ids:
        return generator.encode(options.prompt)
    if options.prompt:
        raise BadInput("give --prompt or --prompt-ids, not both")
    try:
        return [int(id_) for id_ in options.prompt_ids.split(",")]
    except ValueError:
        raise BadInput(
            f"--prompt-ids must be numbers with commas between them, not {options.prompt_ids!r}"
        ) from None


def _tell(
    generator: Generator, prompt: list[int], rounds: Iterable[list[Sample]], alone: bool
) -> list[Sample]:
    """All samples, printed after the prompt: one alone as it comes, several when complete."""

    def shown(ids: list[int], text: str) -> str:
        return text if generator.tokenizer else "".join(f"{id_} " for id_ in ids)

    def say(text: str, end: str = "") -> None:
        print(text, end=end, flush=True)

    head = shown(prompt, generator.tokenizer.decode(prompt) if generator.tokenizer else "")
    kept = []
    say(head if alone else "")
    for pieces in rounds:
        kept.append(pieces)
        if alone:
            say(shown(pieces[0].ids, pieces[0].text))
    samples = [join(pieces) for pieces in zip(*kept, strict=True)]
    whole = [head + shown(sample.ids, sample.text) for sample in samples]
    say("" if alone else f"\n{RULE}\n".join(whole), end="\n")
    return samples


def _report(options: GenerateConfig, timed: Timed, samples: list[Sample]) -> None:
    rate = f", then {timed.tokens_per_s:,.1f} tokens/s" if timed.tokens_per_s else ""
    print(f"{timed.tokens} tokens: the first after {timed.first:.2f} s{rate}", file=sys.stderr)
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
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.write_text(json.dumps(found) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from error


if __name__ == "__main__":
    cli.run(main)
