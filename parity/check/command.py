"""Proves that two implementations of a model are the same function, or names where they part.

Without a checkpoint, a random model is built in which every detail matters, and lechat_jax is
compared with lechat_torch and with transformers: stage by stage, gradients, training and
generation included, in float64 first. With one, your own weights are compared, however large
they are.
"""

import os
from collections.abc import Sequence

from rich.console import Console

from lechat_jax.cli import flags
from lechat_jax.cli.display import Display
from lechat_jax.files.atomic import check_writable
from parity.check.options import CheckConfig
from parity.check.reports import write as reports
from parity.check.verdict import FaultReport
from parity.peers.installed import need


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m parity.check`; returns 0 for equal and 1 for different."""
    options = flags.parse(CheckConfig, "parity.check", __doc__ or "", argv)
    check_writable(options.json, options.junit, options.markdown, options.html)
    need("torch", "transformers", "xformers")
    # JAX would take most of a GPU's memory at its first use, and leave none for PyTorch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200, soft_wrap=True)
    from parity.check.run import (
        compare,  # loads PyTorch, which takes seconds that --help need not wait
    )

    with Display(None, console) as display:
        report = compare(options, display)
    reports.show(console, report)
    for path, write in (
        (options.json, reports.write_json),
        (options.junit, reports.write_junit),
        (options.markdown, reports.write_markdown),
        (options.html, reports.write_html),
    ):
        if path:
            write(path, report)
            console.print(f"report: {path}", markup=False)
    return 0 if (report.all_found if isinstance(report, FaultReport) else report.equal) else 1
