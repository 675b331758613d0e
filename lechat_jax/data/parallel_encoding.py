"""Parallel tokenisation of texts and fine-tuning examples in several processes.

Looking words up, and Mistral's template, which takes a conversation a millisecond or two, are
Python, which holds the GIL, so threads would not help. The processes import no JAX, which would
take longer than most files do.
"""

import contextlib
import hashlib
import importlib
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from lechat_jax.config import VisionConfig
from lechat_jax.data.dialects import Form, conversation
from lechat_jax.errors import BadInput
from lechat_jax.files.records import half_pair
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.tokenizer.transcripts import Transcripts, Unusable

Kind = Form | Literal["text"]
Fields = dict[str, Any]
Ids = Integer[np.ndarray, " ids"]

CHUNK = 250  # examples that a process writes between two reports of progress
FEWEST = 4  # chunks for which a process is worth the second that it takes to start
MOST = 16  # processes, each of which holds a tokenizer
AHEAD = 2  # chunks that are read ahead for each process


class Example(NamedTuple):
    """A tokenised example: its ids from BOS on, the loss mask, and where its images are."""

    ids: list[int]
    counted: list[bool]
    images: Sequence[str] = ()


class Page(NamedTuple):
    """A tokenised chunk of examples, concatenated, without those that are invalid.

    Attributes:
        lengths: number of tokens of each example.
        n_bytes: UTF-8 bytes of the answers of each example.
        ids: token ids of all examples.
        counted: loss mask of all ids.
        faults: index in the chunk and error of each invalid example.
        images: files or data URLs of the images of each example.
    """

    lengths: list[int]
    n_bytes: list[int]
    ids: Ids
    counted: Bool[np.ndarray, " ids"]
    faults: list[tuple[int, str]]
    images: list[Sequence[str]]


def pages(
    form: Form,
    tokenizer: Tokenizer,
    records: Sequence[Fields],
    on_progress: Callable[[int, int], None],
    vision: VisionConfig | None = None,
) -> Iterator[Page]:
    """Tokenises records in order, in several processes if there are many; `CHUNK` examples a page.

    Args:
        form: format of the records.
        tokenizer: the tokenizer.
        records: fields of each record.
        on_progress: called with the number of examples done and to do.
        vision: of the model's tower, if it sees.

    Raises:
        BadInput: a process died, as when memory runs out.
    """
    chunks = [[*records[i : i + CHUNK]] for i in range(0, len(records), CHUNK)]
    done = 0
    n = min(MOST, cores(), len(chunks) // FEWEST)
    with workers(form, tokenizer, n, vision) as work_each:
        for chunk, page in zip(chunks, work_each(chunks), strict=True):
            done += len(chunk)
            on_progress(done, len(records))
            yield page


def page(write: Callable[[Fields], Example], tokenizer: Tokenizer, records: list[Fields]) -> Page:
    """Tokenises a chunk of records."""
    lengths, n_bytes, ids, counted, faults, images = [], [], [], [], [], []
    for place, fields in enumerate(records):
        try:
            example = write(fields)
        except Unusable as error:
            faults.append((place, str(error)))
            continue
        own = np.array(example.ids, np.int32), np.array(example.counted, bool)
        lengths.append(len(example.ids))
        n_bytes.append(answer_bytes(tokenizer, *own))
        ids.append(own[0])
        counted.append(own[1])
        images.append(example.images)
    none = np.zeros(0, np.int32)
    return Page(
        lengths,
        n_bytes,
        np.concatenate([none, *ids]),
        np.concatenate([none.astype(bool), *counted]),
        faults,
        images,
    )


def answer_bytes(tokenizer: Tokenizer, ids: Ids, counted: Bool[np.ndarray, " ids"]) -> int:
    """UTF-8 bytes of the answers of an example, each decoded by itself."""
    edges = np.flatnonzero(np.diff(counted, prepend=False, append=False)).reshape(-1, 2).tolist()
    return sum(len(tokenizer.decode(ids[a:b].tolist()).encode()) for a, b in edges)


def writer(
    form: Form, tokenizer: Tokenizer, vision: VisionConfig | None = None
) -> Callable[[Fields], Example]:
    """A function that tokenises a record's fields, or raises `Unusable`."""
    if form == "messages":
        transcripts = Transcripts(tokenizer, vision)
        return lambda fields: Example(*transcripts.write(*conversation(fields)))

    def completion(fields: Fields) -> Example:
        for name in ("prompt", "completion"):
            if not isinstance(fields.get(name), str):
                raise Unusable(f"has no text in its `{name}` field")
        return write_completion(tokenizer, fields["prompt"], fields["completion"])

    return completion


def write_completion(tokenizer: Tokenizer, prompt: str, completion: str) -> Example:
    """Tokenises a prompt and its completion, with the loss on the completion.

    Raises:
        Unusable: the completion is empty, or a text is not Unicode.
    """
    if not completion:
        raise Unusable("has an empty `completion`")
    if bad := half_pair(prompt + completion):
        raise Unusable(bad)
    given = [tokenizer.bos_id, *(tokenizer.encode(prompt) if prompt else [])]
    said = tokenizer.encode_after(completion) if prompt else tokenizer.encode(completion)
    said = [*said, tokenizer.eos_id]
    return Example([*given, *said], [False] * len(given) + [True] * len(said))


Chunk = list[Any]
WorkEach = Callable[[Iterable[Chunk]], Iterator[Any]]


@contextlib.contextmanager
def workers(
    kind: Kind, tokenizer: Tokenizer, n: int, vision: VisionConfig | None = None
) -> Iterator[WorkEach]:
    """Context manager that gives a function that tokenises chunks, in order, in `n` processes.

    Of one process it is this one. Only a few chunks are read ahead of what was tokenised, so that
    any number of them fits into memory.
    """
    if n <= 1:
        work = worker(kind, tokenizer, vision=vision)
        yield lambda chunks: map(work, chunks)
        return
    idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()

    def work_on(chunk: Chunk) -> Any:
        process = idle.get()
        try:
            return process.work(chunk)
        finally:
            idle.put(process)

    with contextlib.ExitStack() as stack:
        for _ in range(n):
            process = stack.enter_context(_Process())
            process.send((kind, tokenizer.path.absolute(), tokenizer.vocabulary, vision))
            idle.put(process)
        threads = ThreadPoolExecutor(n)
        stack.callback(threads.shutdown, cancel_futures=True)

        def work_each(chunks: Iterable[Chunk]) -> Iterator[Any]:
            waiting = deque[Future[Any]]()
            for chunk in chunks:
                waiting.append(threads.submit(work_on, chunk))
                if len(waiting) > AHEAD * n:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        yield work_each


def worker(
    kind: Kind, tokenizer: Tokenizer, num_threads: int = 0, vision: VisionConfig | None = None
) -> Callable[[Chunk], Any]:
    """A function that tokenises a chunk: `page` of records, or `encode_texts` on some threads."""
    if kind == "text":
        return lambda chunk: encode_texts(tokenizer, chunk, num_threads)
    write = writer(kind, tokenizer, vision)
    return lambda chunk: page(write, tokenizer, chunk)


class Encoded(NamedTuple):
    """Tokenised texts, concatenated.

    Attributes:
        hashes: hash of each text, by which duplicates are found.
        lengths: number of tokens of each text.
        n_bytes: UTF-8 bytes of each text.
        ids: token ids of all texts, in the smallest dtype: BOS, those of a text, EOS.
    """

    hashes: Integer[np.ndarray, " texts"]
    lengths: Integer[np.ndarray, " texts"]
    n_bytes: Integer[np.ndarray, " texts"]
    ids: Ids


def encode_texts(
    tokenizer: Tokenizer, chunk: Sequence[tuple[str, bool]], num_threads: int = 0
) -> Encoded:
    """Tokenises texts, each given with whether it ends a document and EOS follows."""
    bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
    encoded = tokenizer.encode_batch([text for text, _ in chunk], num_threads)
    each = [(bos, ids, eos[: int(ends)]) for ids, (_, ends) in zip(encoded, chunk, strict=True)]
    parts = [part for parts in each for part in parts]
    raw = [text.encode() for text, _ in chunk]
    hashes = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in raw)
    return Encoded(
        np.frombuffer(hashes, np.uint64),
        np.array([sum(map(len, parts)) for parts in each], np.uint32),
        np.array([*map(len, raw)], np.uint32),
        np.concatenate(parts, dtype=dtype_of(tokenizer), casting="unsafe"),
    )


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """The smallest unsigned dtype that holds the token ids."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


class _Process:
    """A worker process that tokenises the chunks it is sent, after what it is to tokenise with."""

    def __init__(self) -> None:
        here = str(Path(__file__).parents[2])
        paths = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lechat_jax.data.parallel_encoding"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # Ctrl-C is for the process that started this one
        )

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *args: object) -> None:
        self._process.kill()  # it has nothing to lose
        self._process.communicate()

    def work(self, chunk: Chunk) -> Any:
        """Sends a chunk to the process and waits for its result."""
        assert self._process.stdout
        self.send(chunk)
        try:
            return pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise self._has_ended() from error

    def send(self, what: Any) -> None:
        """Sends the process anything that can be pickled."""
        assert self._process.stdin
        try:
            pickle.dump(what, self._process.stdin)
            self._process.stdin.flush()
        except OSError as error:
            raise self._has_ended() from error

    def _has_ended(self) -> BadInput:
        return BadInput(
            f"a process that tokenised ended with code {self._process.wait()} before all was done; "
            "is there too little memory?"
        )


def cores() -> int:
    """Number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _serve() -> None:
    """Worker loop: tokenises chunks from stdin until its end."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # for whatever a library prints
    kind, path, vocabulary, vision = pickle.load(sys.stdin.buffer)
    work = worker(kind, Tokenizer(path, vocabulary), 1, vision)
    while True:
        try:
            chunk = pickle.load(sys.stdin.buffer)
            pickle.dump(work(chunk), answers)
            answers.flush()
        except (EOFError, BrokenPipeError):  # the process that started this one has ended
            os._exit(0)


if __name__ == "__main__":
    # By its name, so that what is sent back is of the module that reads it.
    importlib.import_module("lechat_jax.data.parallel_encoding")._serve()
