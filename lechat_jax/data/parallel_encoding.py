"""Examples written down as ids, by several processes at once where there are many.

A conversation takes Mistral's template a millisecond or two, all of it Python, which threads would
take turns at. The processes import no JAX, which would take longer than most files do.
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
    """One document: its ids from BOS on, and which of them are learned."""

    ids: list[int]
    counted: list[bool]


class Page(NamedTuple):
    """Examples end to end, as far as they could be written.

    Attributes:
        lengths: tokens of each.
        n_bytes: UTF-8 bytes of the answers of each.
        ids: of all of them.
        counted: which of those are learned.
        faults: the place in the chunk of each that could not, and why.
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
    """The examples in order, `CHUNK` of them at a time.

    Args:
        form: how they are written.
        tokenizer: that they are read with.
        records: their fields.
        on_progress: called with the number of examples done and to do.

    Raises:
        BadInput: a process came to an end, as for want of memory.
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
    """The examples of a chunk."""
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
    """UTF-8 bytes of the answers, each decoded by itself."""
    edges = np.flatnonzero(np.diff(counted, prepend=False, append=False)).reshape(-1, 2).tolist()
    return sum(len(tokenizer.decode(ids[a:b].tolist()).encode()) for a, b in edges)


def writer(form: Form, tokenizer: Tokenizer) -> Callable[[Fields], Example]:
    """From the fields of a record to its example, or `Unusable`."""
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
    """A prompt as it is when a model is given it, and the completion that it is to say.

    Raises:
        Unusable: there is nothing to complete it with, or it is not Unicode.
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
    """Writes here."""
    write = writer(form, tokenizer)
    yield lambda chunks: (page(write, tokenizer, chunk) for chunk in chunks)


@contextlib.contextmanager
def _several(n: int, form: Form, tokenizer: Tokenizer) -> Iterator[WriteEach]:
    """Has `n` processes write, each with a thread here that waits for it."""
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
    """A process that writes what it is sent."""

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
        """The page of a chunk."""
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
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _serve(form: Form, path: Path) -> None:
    """Writes the chunks that come in on stdin until it ends."""
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
