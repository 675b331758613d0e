"""The first signal is a wish; the second one is an order, unless a terminal has closed again."""

import signal
from collections.abc import Iterator

import pytest

from lechat_jax.cli.signals import Stop

ORDERS = (signal.SIGINT, signal.SIGTERM)
SIGNALS = (*ORDERS, signal.SIGHUP)


@pytest.fixture
def old_effect() -> Iterator[list[int]]:
    """What the signals did before, standing in for the end of this process."""
    heard: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def hear(number: int, frame: object) -> None:
        heard.append(number)

    for number in SIGNALS:
        signal.signal(number, hear)
    yield heard
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_by_name(number: signal.Signals, old_effect: list[int]) -> None:
    with Stop() as stop:
        assert stop.received == ""
        signal.raise_signal(number)
        assert stop.received == number.name
    assert old_effect == []


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", ORDERS)
def test_the_second_has_its_old_effect(
    first: signal.Signals, second: signal.Signals, old_effect: list[int]
) -> None:
    with Stop() as stop:
        signal.raise_signal(first)
        signal.raise_signal(second)
    assert old_effect == [second]
    assert stop.received == first.name


@pytest.mark.parametrize("first", SIGNALS)
def test_a_terminal_that_closes_is_a_wish_however_often_one_is_told(
    first: signal.Signals, old_effect: list[int]
) -> None:
    """The shell sends SIGHUP to its jobs, and then the system to what runs in the foreground."""
    with Stop() as stop:
        for number in (first, signal.SIGHUP, signal.SIGHUP):
            signal.raise_signal(number)
    assert old_effect == []
    assert stop.received == first.name


@pytest.mark.parametrize("number", SIGNALS)
def test_what_is_ignored_stays_ignored_as_under_nohup(
    number: signal.Signals, old_effect: list[int]
) -> None:
    signal.signal(number, signal.SIG_IGN)
    with Stop() as stop:
        signal.raise_signal(number)
        assert stop.received == ""
    assert signal.getsignal(number) == signal.SIG_IGN


def test_a_second_ctrl_c_interrupts_as_ever(old_effect: list[int]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop.received == "SIGINT"


@pytest.mark.parametrize("asked", [False, True])
def test_outside_signals_have_their_old_effect(asked: bool, old_effect: list[int]) -> None:
    def work() -> None:
        with Stop():
            if asked:
                signal.raise_signal(signal.SIGTERM)
            raise RuntimeError("the work failed")

    with pytest.raises(RuntimeError, match="the work failed"):
        work()
    for number in SIGNALS:
        signal.raise_signal(number)
    assert old_effect == list(SIGNALS)
