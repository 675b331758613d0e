"""How every command line of lechat reads its flags and reports what is wrong with them."""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import tyro

from lechat_jax.errors import BadInput

Args = TypeVar("Args")


def parse(options: type[Args], prog: str, description: str, argv: Sequence[str] | None) -> Args:
    """The options of a dataclass read from `argv` (or `sys.argv`), in kebab-case.

    The docstring below each field is its help; bad flags exit with code 2.
    """
    return tyro.cli(
        options,
        prog=prog,
        description=description,
        args=argv,
        config=(
            tyro.conf.FlagCreatePairsOff,
            tyro.conf.DisallowNone,
            tyro.conf.AvoidSubcommands,
        ),
    )


def run(main: Callable[[], int | None]) -> NoReturn:
    """Exits with what `main` returns, and with 2 and one line when the input is bad."""
    try:
        sys.exit(main() or 0)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
