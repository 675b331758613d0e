"""Embeds texts with a decoder: one vector for each, to compare texts or to search among them."""

import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from jaxtyping import Float
from rich.console import Console

from lechat_jax.cli import flags
from lechat_jax.cli.display import Display
from lechat_jax.data.sources import load_texts
from lechat_jax.devices.compile_cache import enable_compilation_cache
from lechat_jax.embed.embedder import Embedder, EmbeddingOptions
from lechat_jax.errors import BadInput
from lechat_jax.files.atomic import check_writable, write_atomic
from lechat_jax.quantize.scheme import Format


@dataclasses.dataclass(frozen=True)
class EmbedConfig(EmbeddingOptions):
    """The flags of `python -m lechat_jax.embed`.

    Attributes:
        folder: Folder of a training run, such as runs/NAME, or of weights in lechat's, Hugging
            Face's or Mistral's format; a GGUF file; either in a bucket (gs:// or s3://); or the
            name of a model on the Hugging Face Hub.
        text: Text to embed; repeatable.
        data: Texts to embed instead: files of one text each, a folder or a glob, or records with
            a "text" each (.jsonl or .parquet).
        dtype: Type to compute in, float32 or bfloat16. By default as stored, but float32 on a CPU
            where that fits.
        quantize: Quantise the weights to int8 or int4 when they are loaded. By default they stay as
            stored.
        out: File of the vectors: .npy for an array [texts, D] of float32, .jsonl for an object a
            line, with "index", "tokens" and "embedding". By default such lines go to stdout.
    """

    folder: tyro.conf.Positional[Path]
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    data: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    quantize: Format | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.text) == (self.data is not None):
            raise BadInput("say what to embed: --text TEXT, once or more, or --data FILES")
        if self.out and self.out.suffix not in (".npy", ".jsonl"):
            raise BadInput(f"--out {self.out} must end in .npy or .jsonl")
        check_writable(self.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m lechat_jax.embed`; returns the exit code."""
    options = flags.parse(EmbedConfig, "lechat_jax.embed", __doc__ or "", argv)
    enable_compilation_cache()
    with Display(None, Console(stderr=True, highlight=False)) as display:
        texts = list(options.text)
        if options.data is not None:
            found = load_texts(options.data)
            texts = found.documents
            for note in found.notes:
                display.say(f"note: {note}")
        if not texts:
            raise BadInput(f"{options.data} has no text; give --data some to embed")
        display.wait("loading weights")
        embedder = Embedder.from_checkpoint(
            options.folder, options, dtype=options.dtype, quantize=options.quantize
        )
        ids = embedder.encode(texts)
        lengths = [min(len(row), options.max_tokens) for row in ids]
        if n_long := sum(len(row) > options.max_tokens for row in ids):
            display.say(
                f"note: {n_long} of {len(ids)} texts have more than {options.max_tokens} tokens, "
                "of which the first are embedded (--max-tokens)"
            )
        vectors = embedder.embed_ids(ids, display.counter("embedding", 1, " texts"))
    if options.out and options.out.suffix == ".npy":
        array = io.BytesIO()
        np.save(array, vectors)
        write_atomic(options.out, array.getvalue())
        return 0
    lines = "".join(as_line(*row) for row in zip(range(len(ids)), lengths, vectors, strict=True))
    if options.out:
        write_atomic(options.out, lines)
    else:
        sys.stdout.write(lines)
    return 0


def as_line(index: int, tokens: int, vector: Float[np.ndarray, "D"]) -> str:
    """A line of JSON: a text's number, how many tokens were embedded, and its vector."""
    return json.dumps({"index": index, "tokens": tokens, "embedding": vector.tolist()}) + "\n"
