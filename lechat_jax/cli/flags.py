"""Command-line parsing from dataclasses (tyro), and exit codes and error messages of commands."""

import contextlib
import dataclasses
import errno
import inspect
import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

import tyro

from lechat_jax.cli.config_file import with_recipe
from lechat_jax.devices.memory import exhausted
from lechat_jax.errors import BadInput

Args = TypeVar("Args")
SIGPIPE = 141  # what a shell makes of it

# Of an `OSError` that is no mistake of the program. (Windows lacks EDQUOT.)
OF_THE_DISK = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}
OF_THE_DISK |= {getattr(errno, "EDQUOT", errno.ENOSPC)}


def program(module: str) -> str:
    """Name of the running command in its usage line: `lechat VERB`, or `python -m MODULE`."""
    return sys.argv[0] if sys.argv[0].startswith("lechat ") else f"python -m {module}"


def parse(options: type[Args], module: str, description: str, argv: Sequence[str] | None) -> Args:
    """Parses `argv` (or `sys.argv`) into an options dataclass; flags are in kebab-case.

    The `Attributes` of the dataclass are the flags' help; bad flags exit with code 2. A field
    `config` is a YAML file of other flags.

    Raises:
        BadInput: the config file cannot be used.
    """
    argv = [*(sys.argv[1:] if argv is None else argv)]
    fields = inspect.signature(options).parameters
    if "config" in fields:
        switches = {name for name, field in fields.items() if isinstance(field.default, bool)}
        argv = with_recipe(argv, [*fields], switches)
    read = tyro.cli(
        without_empty_defaults(options),
        prog=program(module),
        description=description,
        args=argv,
        config=(
            tyro.conf.FlagCreatePairsOff,
            tyro.conf.DisallowNone,
            tyro.conf.AvoidSubcommands,
        ),
    )
    return options(**{name: getattr(read, name) for name in fields})


def without_empty_defaults(options: type[Args]) -> type[Args]:
    """The same dataclass, whose `--help` shows no empty default such as "(default: None)".

    What happens without such a flag is said in its own help.
    """
    hints = get_type_hints(options, include_extras=True)
    silent = tyro.conf.arg(help_behavior_hint="")

    def kept(field: inspect.Parameter) -> Any:
        kw_only = field.kind is inspect.Parameter.KEYWORD_ONLY
        return dataclasses.field(default=field.default, kw_only=kw_only)

    changed = [
        (field.name, Annotated[hints[field.name], silent], kept(field))
        for field in inspect.signature(options).parameters.values()
        if any(field.default is empty for empty in (None, False, "", ()))
    ]
    return dataclasses.make_dataclass(options.__name__, changed, bases=(options,), frozen=True)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command and exits with its exit code, without a traceback for bad input.

    `BadInput`, running out of memory and a disk that is full or refuses are one line on stderr
    and exit code 2. Ctrl-C (SIGINT) and a closed pipe (SIGPIPE, as by `head`) end it quietly with
    the shell's codes, 130 and 141. A character that stdout or stderr cannot encode becomes "?".
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started it
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):  # of cp1252, for example, as Windows' pipes are
            stream.reconfigure(errors="replace")
    # What fails while a checkpoint is written or read is raised; this would say it again, before.
    sys.excepthook = _but_for_echoes
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        code = main() or 0
        sys.stdout.flush()
    except BadInput as error:
        code = _refuse(str(error))
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = SIGPIPE
    except (MemoryError, RuntimeError, OSError) as error:
        if why := exhausted(error):
            code = _refuse(f"{why}; ask for less at a time, or free some")
        elif isinstance(error, OSError) and error.errno in OF_THE_DISK:
            code = _refuse(f"{error.filename or 'a file'} cannot be used: {error.strerror}")
        else:
            raise
    if code == SIGPIPE or not _is_flushed():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left
    sys.exit(code)


def _but_for_echoes(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Prints an uncaught error, but for repeats from threads whose event loop is closed.

    Tensorstore reports each part of a failed write to an asyncio loop, which the first one closed,
    and prints a traceback for each of the others.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if is_main or kind is not RuntimeError or str(error) != "Event loop is closed":
        sys.__excepthook__(kind, error, trace)


def _refuse(sentence: str) -> int:
    with contextlib.suppress(OSError):  # a terminal that was closed
        print(f"error: {sentence}", file=sys.stderr)
    return 2


def _is_flushed() -> bool:
    """Whether stdout flushes, so that Python will not fail to when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        return False
    return True
