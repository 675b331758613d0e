"""Compares training runs in one HTML page: python -m lechat_jax.report runs/A runs/B.

Curves over the tokens that were trained on, final figures, the options that differ, and samples
side by side. The page is one file that loads nothing, so it can be mailed or put on any server.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from lechat_jax.checkpoint.run import Run
from lechat_jax.cli import flags
from lechat_jax.errors import BadInput
from lechat_jax.files.atomic import check_writable, write_atomic
from lechat_jax.files.buckets import local_copy
from lechat_jax.report.page import Summary, page


@dataclasses.dataclass(frozen=True)
class Report:
    """The flags of `python -m lechat_jax.report`.

    Attributes:
        runs: Folders of training runs to compare; one is drawn alone.
        out: HTML file to write.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    out: Path = Path("report.html")

    def __post_init__(self) -> None:
        if not self.runs:
            raise BadInput("there is no run to report on; name its folder, such as runs/NAME")
        check_writable(self.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command `report`; returns the exit code."""
    options = flags.parse(Report, "lechat_jax.report", __doc__ or "", argv)
    summaries = [Summary.of(Run.open(local_copy(folder))) for folder in options.runs]
    write_atomic(options.out, page(summaries))
    print(f"{options.out}: {', '.join(one.name for one in summaries)}")
    return 0
