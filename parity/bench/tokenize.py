"""Tokenising text for training beside the library tokenizers: how fast, in how much memory?"""

import dataclasses
import importlib
import json
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lechat_jax.cli.display import Meter
from lechat_jax.data.parallel_encoding import cores
from lechat_jax.data.sources import Document, TextStream, load_texts, open_texts
from lechat_jax.data.tokens import load_tokens
from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.tokenizer import Tokenizer
from parity.bench import isolated
from parity.bench.work import Work, cell
from parity.measure import PeakAnonymous
from parity.report import Report, Row, TableText

RARE = 0.02  # of the words of made-up text are in no other document, as in text of the web
DOCUMENT = 700  # words of a made-up document
GROUP = 1000  # documents that the peer is given at a time

Found = tuple[int, int, float, int | None]  # bytes, tokens, seconds, peak memory


@dataclasses.dataclass(frozen=True)
class Tokenize(Work):
    """Tokens a second when text is tokenised for training, from compressed shards to the cache.

    lechat reads the shards, tokenises them with Mistral's first tokenizer, splits and writes the
    two streams. The peer is the library tokenizers with the same tokenizer in its own format,
    which is given the documents in memory, and whose ids must be the same; it writes nothing.
    Each has all cores. The text is made up of the words of the default text, of which some are
    random letters; its documents all differ.
    """

    gb: float = 0.2
    """Text that is made up and tokenised, in GB before it is compressed."""
    peer_gb: float = 0.02
    """The beginning of it that the peer tokenises, in GB; 0 leaves the peer out."""
    shards: int = 4
    """Files of it."""
    folder: Path | None = None
    """Folder for shards and tokens, as large as the text; by default a temporary one."""

    COUNTS = ("shards",)
    AMOUNTS = ("gb", "read_gb")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folder and not self.folder.is_dir():
            raise BadInput(f"there is no folder {self.folder}")
        if self.peer_gb < 0:
            raise BadInput(f"--peer-gb must be at least 0, not {self.peer_gb}")

    def run(self, console: Console) -> Report:
        """See `Work.run`."""
        report = self.report()
        with tempfile.TemporaryDirectory(prefix="parity-", dir=self.folder) as folder:
            console.print("making up text", markup=False)
            texts = Path(folder, "text")
            texts.mkdir()
            self._make(texts, console)
            console.print("tokenising", markup=False)
            jobs: dict[str, tuple[Callable[..., Iterator[Found]], tuple[Any, ...]]] = {
                "lechat_jax": (_ours, (texts, Path(folder, "cache")))
            }
            if self.peer_gb:
                jobs["tokenizers"] = _theirs, (texts, int(self.peer_gb * 1e9))
            for impl, (job, arguments) in jobs.items():
                (found,) = isolated.run(f"{impl} cannot tokenise", job, *arguments)
                report.rows.append(_row(impl, *found))
        report.notes.append(f"each on {cores()} cores; memory is anonymous, of all processes")
        report.show(console, figures(report.rows))
        return report

    def _make(self, folder: Path, console: Console) -> None:
        """Writes the shards, compressed by Zstandard."""
        zstandard = importlib.import_module("zstandard")
        words = re.findall(r"\S+\s*", " ".join(load_texts(None).documents))
        each = self.gb * 1e9 / self.shards
        meter = Meter(int(self.gb * 1e9), console)
        with meter:
            for shard in range(self.shards):
                rng = random.Random(shard)
                path, n = folder / f"{shard:03}.jsonl.zst", 0
                with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as out:
                    while n < each:
                        text = _document(words, rng)
                        out.write(json.dumps({"text": text}).encode() + b"\n")
                        n += len(text.encode())
                        meter.add(len(text.encode()))


def _document(words: Sequence[str], rng: random.Random) -> str:
    """A passage of the words, some of which are others of random letters."""
    start = rng.randrange(len(words) - DOCUMENT)
    passage = [*words[start : start + DOCUMENT]]
    for place in rng.sample(range(DOCUMENT), int(RARE * DOCUMENT)):
        letters = rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(4, 12))
        passage[place] = "".join(letters) + " "
    return "".join(passage)


def _ours(texts: Path, cache: Path) -> Iterator[Found]:
    """Tokenises as training does, with an empty cache."""
    tokenizer = Tokenizer.mistral_v1()
    with PeakAnonymous() as memory:
        began = time.perf_counter()
        tokens = load_tokens(str(texts), tokenizer, cache)
        seconds = time.perf_counter() - began
    yield tokens.n_bytes, len(tokens.train) + len(tokens.val), seconds, memory.bytes


def _theirs(texts: Path, n_bytes: int) -> Iterator[Found]:
    """Tokenises the first documents by the library tokenizers."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    ours = Tokenizer.mistral_v1()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ours.path, Path(folder, "tokenizer.model"))
        transformers = importlib.import_module("transformers")
        tokenizer = transformers.LlamaTokenizer.from_pretrained(folder).backend_tokenizer
    source = open_texts(str(texts))
    documents = list[Document]()
    size = 0
    for document in TextStream(source).documents(source.files):
        documents.append(document)
        size += len(document.text.encode())
        if size >= n_bytes:
            break
    n_tokens, seconds = 0, 0.0
    with PeakAnonymous() as memory:
        for start in range(0, len(documents), GROUP):
            group = [document.text for document in documents[start : start + GROUP]]
            began = time.perf_counter()
            encoded = tokenizer.encode_batch_fast(group, add_special_tokens=False)
            ids = [each.ids for each in encoded]
            seconds += time.perf_counter() - began
            n_tokens += sum(map(len, ids))
            if [each.tolist() for each in ours.encode_batch(group)] != ids:
                raise BadInput("the ids are not lechat's")
    yield size, n_tokens, seconds, memory.bytes


def _row(impl: str, n_bytes: int, n_tokens: int, seconds: float, memory: int | None) -> Row:
    return Row(
        work="tokenize",
        impl=impl,
        dtype="",
        batch=0,
        context=0,
        tokens_per_s=n_tokens / seconds,
        peak_bytes=memory,
        details={"bytes": n_bytes, "tokens": n_tokens, "seconds": seconds},
    )


def figures(rows: list[Row]) -> TableText:
    """The table of the report."""
    lines = [
        [
            row.impl,
            f"{row.details['bytes'] / 1e9:.3f}",
            f"{row.details['seconds']:.1f}",
            cell("{:.2f}", row.tokens_per_s, 1e6),
            f"{row.details['bytes'] / 1e6 / row.details['seconds']:.1f}",
            cell("{:,.0f}", row.peak_bytes, 1e6),
        ]
        for row in rows
    ]
    header = ["tokenize", "GB", "seconds", "million tokens/s", "MB/s", "anonymous MB"]
    return TableText(header, lines)
