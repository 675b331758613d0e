"""Speed side by side, in one run on one machine: python -m parity.bench WORK.

Whatever is compared takes turns, A B A B, and each figure is the median, since machines
drift. --json writes the figures for a script.
"""

import os
from collections.abc import Sequence

import tyro
from rich.console import Console

from lechat_jax.cli import flags
from lechat_jax.files.atomic import check_writable
from parity.bench.attention import Attention
from parity.bench.card import Card
from parity.bench.compiled import Compiled
from parity.bench.convert import Convert
from parity.bench.decode import Decode
from parity.bench.moe import Moe
from parity.bench.prefill import Prefill
from parity.bench.serve import Serve
from parity.bench.tokenize import Tokenize
from parity.bench.train import Train
from parity.bench.vision import Vision
from parity.bench.work import Work

WORKS: dict[str, type[Work]] = {
    "train": Train,
    "attention": Attention,
    "convert": Convert,
    "decode": Decode,
    "prefill": Prefill,
    "vision": Vision,
    "moe": Moe,
    "serve": Serve,
    "tokenize": Tokenize,
    "compiled": Compiled,
    "card": Card,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see `--help`."""
    read = tyro.extras.subcommand_cli_from_dict(
        {name: flags.without_empty_defaults(work) for name, work in WORKS.items()},
        prog=flags.program("parity.bench"),
        description=__doc__,
        args=argv,
        config=(tyro.conf.DisallowNone,),
    )
    # As the class itself, which an isolated process can be given.
    work = next(kind for kind in WORKS.values() if isinstance(read, kind))(**vars(read))
    check_writable(work.json, getattr(work, "plot", None))
    # JAX would take most of a GPU's memory at its first use, and leave none for the peer.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200, soft_wrap=True)
    report = work.run(console)
    if work.json:
        report.write(work.json)
        console.print(f"report: {work.json}", markup=False)
    return 0
