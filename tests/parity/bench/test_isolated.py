"""An isolated process hands over what it measured, and whatever ends it is one clear sentence."""

import os
import signal
import time
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import pytest

from lechat_jax.errors import BadInput
from parity.bench import isolated


class Figure(NamedTuple):
    process: int
    number: float


def figures(*numbers: float) -> Iterator[Figure]:
    for number in numbers:
        print("a library says hello")
        yield Figure(os.getpid(), number)


def test_each_item_comes_as_it_was_yielded_in_one_other_process() -> None:
    items = list(isolated.run("no figures", figures, 1.5, float("inf")))
    assert [item.number for item in items] == [1.5, float("inf")]
    assert len({item.process for item in items} | {os.getpid()}) == 2


def raises(error: Exception) -> Iterator[int]:
    yield 1
    raise error


def is_killed() -> Iterator[int]:
    yield 1
    os.kill(os.getpid(), signal.SIGKILL)


def sleeps() -> Iterator[int]:
    yield 1
    time.sleep(300)


def exits() -> Iterator[int]:
    yield 1
    os._exit(3)


@pytest.mark.parametrize(
    ("job", "arguments", "reason"),
    [
        (raises, [ValueError("too wide")], "ValueError: too wide"),
        (raises, [MemoryError()], "MemoryError"),
        (raises, [BadInput("there is no folder x")], "there is no folder x"),
        (is_killed, [], "it was ended by SIGKILL"),
        (exits, [], "it said nothing and ended with exit code 3"),
        (sleeps, [], "there was no time left"),
    ],
)
def test_what_ends_it_is_told_after_what_it_yielded(
    job: Callable[..., Iterator[int]], arguments: list[object], reason: str
) -> None:
    items: list[int] = []
    with pytest.raises(BadInput) as error:
        items.extend(isolated.run("not measured", job, *arguments, until=time.time() + 8))
    assert items == [1]
    assert str(error.value) == f"not measured: {reason}"


def test_who_stops_listening_ends_it() -> None:
    items = isolated.run("no figures", endless)
    process = next(items)
    assert isinstance(items, Generator)
    items.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def endless() -> Iterator[int]:
    while True:
        yield os.getpid()
