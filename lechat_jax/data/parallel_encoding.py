"""Parallel tokenisation of fine-tuning examples in several processes.

A conversation takes Mistral's template a millisecond or two of Python, which holds the GIL, so
threads would not help. The processes import no JAX, which would take longer than most files do.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from lechat_jax.data.dialects import Form, conversation
from lechat_jax.errors import BadInput
from lechat_jax.files.jsonl import half_pair
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.tokenizer.transcripts import Transcripts, Unusable

Fields = dict[str, Any]
Ids = Integer[np.ndarray, " ids"]

CHUNK = 250  # examples that a process writes between two reports of progress
FEWEST = 4  # chunks for which a process is worth the second that it takes to start
MOST = 16  # processes, each of which holds a tokenizer


class Example(NamedTuple):
    """A tokenised example: its ids from BOS on, and the loss mask."""

    ids: list[int]
    counted: list[bool]


class Page(NamedTuple):
    """A tokenised chunk of examples, concatenated, without those that are invalid.

    Attributes:
        lengths: number of tokens of each example.
        n_bytes: UTF-8 bytes of the answers of each example.
        ids: token ids of all examples.
        counted: loss mask of all ids.
        faults: index in the chunk and error of each invalid example.
    """

    lengths: list[int]
    n_bytes: list[int]
    ids: Ids
    counted: Bool[np.ndarray, " ids"]
    faults: list[tuple[int, str]]


def pages(
    form: Form,
    tokenizer: Tokenizer,
    records: Sequence[Fields],
    on_progress: Callable[[int, int], None],
) -> Iterator[Page]:
    """Tokenises records in order, in several processes if there are many; `CHUNK` examples a page.

    Args:
        form: format of the records.
        tokenizer: the tokenizer.
        records: fields of each record.
        on_progress: called with the number of examples done and to do.

    Raises:
        BadInput: a process died, as when memory runs out.
    """
    chunks = [[*records[i : i + CHUNK]] for i in range(0, len(records), CHUNK)]
    n = min(MOST, _cores(), len(chunks) // FEWEST)
    done = 0
    with _several(n, form, tokenizer) if n > 1 else _alone(form, tokenizer) as write_each:
        for chunk, page in zip(chunks, write_each(chunks), strict=True):
            done += len(chunk)
            on_progress(done, len(records))
            yield page


def page(write: Callable[[Fields], Example], tokenizer: Tokenizer, records: list[Fields]) -> Page:
    """Tokenises a chunk of records."""
    lengths, n_bytes, ids, counted, faults = [], [], [], [], []
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
    none = np.zeros(0, np.int32)
    return Page(
        lengths,
        n_bytes,
        np.concatenate([none, *ids]),
        np.concatenate([none.astype(bool), *counted]),
        faults,
    )


def answer_bytes(tokenizer: Tokenizer, ids: Ids, counted: Bool[np.ndarray, " ids"]) -> int:
    """UTF-8 bytes of the answers of an example, each decoded by itself."""
    edges = np.flatnonzero(np.diff(counted, prepend=False, append=False)).reshape(-1, 2).tolist()
    return sum(len(tokenizer.decode(ids[a:b].tolist()).encode()) for a, b in edges)


def writer(form: Form, tokenizer: Tokenizer) -> Callable[[Fields], Example]:
    """A function that tokenises a record's fields, or raises `Unusable`."""
    if form == "messages":
        transcripts = Transcripts(tokenizer)
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


WriteEach = Callable[[list[list[Fields]]], Iterator[Page]]


@contextlib.contextmanager
def _alone(form: Form, tokenizer: Tokenizer) -> Iterator[WriteEach]:
    """Tokenises in this process."""
    write = writer(form, tokenizer)
    yield lambda chunks: (page(write, tokenizer, chunk) for chunk in chunks)


@contextlib.contextmanager
def _several(n: int, form: Form, tokenizer: Tokenizer) -> Iterator[WriteEach]:
    """Tokenises in `n` processes, each with a thread here that waits for it."""
    idle: queue.SimpleQueue[_Scribe] = queue.SimpleQueue()

    def write(chunk: list[Fields]) -> Page:
        scribe = idle.get()
        try:
            return scribe.write(chunk)
        finally:
            idle.put(scribe)

    with contextlib.ExitStack() as stack:
        for _ in range(n):
            idle.put(stack.enter_context(_Scribe(form, tokenizer.path)))
        threads = ThreadPoolExecutor(n)
        stack.callback(threads.shutdown, cancel_futures=True)
        yield lambda chunks: threads.map(write, chunks)


class _Scribe:
    """A worker process that tokenises the chunks it is sent."""

    def __init__(self, form: Form, tokenizer: Path) -> None:
        here = str(Path(__file__).parents[2])
        paths = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "lechat_jax.data.parallel_encoding",
                form,
                str(tokenizer.absolute()),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths},
        )

    def __enter__(self) -> "_Scribe":
        return self

    def __exit__(self, *args: object) -> None:
        self._process.kill()  # it has nothing to lose
        self._process.communicate()

    def write(self, chunk: list[Fields]) -> Page:
        """Sends a chunk to the process and waits for its page."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            pickle.dump(chunk, self._process.stdin)
            self._process.stdin.flush()
            return Page(*pickle.load(self._process.stdout))
        except (EOFError, OSError) as error:
            raise BadInput(
                f"a process that wrote examples down ended with code {self._process.wait()} "
                "before they were done; is there too little memory?"
            ) from error


def _cores() -> int:
    """Number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _serve(form: Form, path: Path) -> None:
    """Worker loop: tokenises chunks from stdin until its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # for whatever a library prints
    tokenizer = Tokenizer.from_file(path)
    write = writer(form, tokenizer)
    while True:
        try:
            chunk = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(tuple(page(write, tokenizer, chunk)), answers)
        answers.flush()


if __name__ == "__main__":
    _serve("messages" if sys.argv[1] == "messages" else "completion", Path(sys.argv[2]))
