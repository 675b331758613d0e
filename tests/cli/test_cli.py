"""A command line reads a dataclass; what is wrong with it is one line and exit code 2."""

import dataclasses
import errno
import importlib
import io
import os
import re
import sys
from collections.abc import Callable

import pytest

from lechat_jax.cli import flags
from lechat_jax.errors import BadInput

COMMANDS = [
    *(f"lechat_jax.{name}" for name in ("train", "generate", "chat", "eval")),
    *(f"parity.{name}" for name in ("check", "convert", "quality", "make_checkpoint")),
    *(f"parity.bench {work}" for work in ("train", "decode", "prefill", "convert")),
]


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of a small program."""

    n_cups: int = 1
    """Cups of coffee to make."""
    beans: str | None = None
    """Beans to grind. By default those that are open."""
    decaf: bool = False
    """Without caffeine."""
    guest: tuple[str, ...] = ()
    """Names to write on the cups."""

    def __post_init__(self) -> None:
        if self.n_cups < 1:
            raise BadInput(f"--n-cups must be at least 1, not {self.n_cups}")


def parse(*argv: str) -> Options:
    return flags.parse(Options, "coffee", "Makes coffee.", argv)


def exit_code(work: Callable[[], object]) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        work()
    return stop.value.code


def test_fields_are_flags_in_kebab_case() -> None:
    asked = parse("--n-cups", "3", "--guest", "Ada", "Grace", "--beans", "house")
    assert asked == Options(n_cups=3, beans="house", guest=("Ada", "Grace"))
    assert parse() == Options()


def test_a_yes_or_no_flag_takes_no_value() -> None:
    assert parse("--decaf") == Options(decaf=True)


def test_flags_are_read_from_the_command_line_when_none_are_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["coffee", "--n-cups", "2"])
    assert flags.parse(Options, "coffee", "", None) == Options(n_cups=2)


def test_help_says_what_each_flag_does_and_exits_with_0(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_code(lambda: parse("--help")) == 0
    said = capsys.readouterr()
    for part in ("usage: python -m coffee", "Makes coffee.", "--n-cups", "Cups of coffee", "1)"):
        assert part in said.out
    assert said.err == ""


def test_help_names_no_default_where_there_is_no_value(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of cups there is one; of no beans, no guests and "False" nobody could make anything."""
    exit_code(lambda: parse("--help"))
    assert re.findall(r"\(.*?\)", capsys.readouterr().out) == ["(default: 1)"]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_has_none_for_a_default(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *work = command.split()
    pytest.importorskip(name.partition(".")[0])
    room = importlib.import_module(name)
    main = getattr(room, "main", None) or importlib.import_module(f"{name}.__main__").main
    assert exit_code(lambda: main([*work, "--help"])) == 0
    assert not re.search(r"None|default:[\s│]+(False|\)|'')", capsys.readouterr().out)


@pytest.mark.parametrize("argv", [("--sugar", "2"), ("--n-cups", "two"), ("--n-cups",)])
def test_flags_that_cannot_be_read_exit_with_2(
    argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(lambda: parse(*argv)) == 2
    said = capsys.readouterr()
    assert argv[0] in said.err
    assert said.out == ""


def test_a_value_that_the_options_refuse_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        parse("--n-cups", "0")

    assert exit_code(lambda: flags.run(main)) == 2
    assert capsys.readouterr() == ("", "error: --n-cups must be at least 1, not 0\n")


def test_bad_input_at_work_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise BadInput("the tank is empty; fill it")

    assert exit_code(lambda: flags.run(main)) == 2
    assert capsys.readouterr() == ("", "error: the tank is empty; fill it\n")


def test_memory_that_runs_out_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 640000000000 bytes.")

    assert exit_code(lambda: flags.run(main)) == 2
    assert capsys.readouterr().err == (
        "error: out of memory: there was no room for another 640.00 GB; ask for less at a time, "
        "or free some\n"
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_is_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise OSError(number, os.strerror(number), "beans.txt")

    assert exit_code(lambda: flags.run(main)) == 2
    assert capsys.readouterr().err == f"error: beans.txt cannot be used: {os.strerror(number)}\n"


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (3, 3)])
def test_the_exit_code_is_what_the_work_returns(returned: int | None, code: int) -> None:
    assert exit_code(lambda: flags.run(lambda: returned)) == code


@pytest.mark.parametrize(
    ("encoding", "told"),
    [("utf-8", "caf\u00e9 \u2192 ?"), ("cp1252", "caf\u00e9 ? ?"), ("ascii", "caf? ? ?")],
)
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_letter_that_a_stream_lacks_is_a_question_mark(
    name: str, encoding: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows in a pipe; half a pair of UTF-16, or a byte of a path, is none in any."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding=encoding, newline="\n"))
    text = "caf\u00e9 \u2192 \udcff"
    assert (
        exit_code(lambda: flags.run(lambda: print(text, file=getattr(sys, name), flush=True))) == 0
    )
    assert raw.getvalue().decode(encoding) == told + "\n"


def test_without_any_stream_the_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)  # as for a service on Windows, or with >&-
    assert exit_code(lambda: flags.run(lambda: print("hello", file=sys.stderr) or 3)) == 3
    sys.stdout.close()
    sys.stderr.close()


@pytest.mark.parametrize("flush", [False, True])
def test_a_full_disk_is_one_line(
    flush: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no disk that is always full")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert exit_code(lambda: flags.run(lambda: print("hello", flush=flush))) == 2
    said = "error: a file cannot be used: No space left on device\n"
    assert capsys.readouterr().err == said


def test_a_fault_of_the_program_is_no_bad_input() -> None:
    def main() -> int:
        raise ValueError("a bug, which its traceback helps to find")

    with pytest.raises(ValueError, match="a bug"):
        flags.run(main)
