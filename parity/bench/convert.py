"""Converting weights beside copying them: how near to the speed of the disk, in how much memory?"""

import contextlib
import dataclasses
import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from lechat_jax.errors import BadInput
from lechat_jax.files.checksums import sync
from lechat_jax.formats.names import Format
from parity import make_checkpoint
from parity.bench.work import Work, cell
from parity.convert import command as convert
from parity.measure import PeakAnonymous, interleaved, wait_until_idle
from parity.report import Report, Row, TableText

COPY = "copy"


@dataclasses.dataclass(frozen=True)
class Convert(Work):
    """Seconds to convert a checkpoint, beside those to copy its files, on the same disk.

    Random weights of a released model's shapes in Hugging Face's format are converted to
    lechat's and back, with everything that belongs to it: weights that are not finite are
    looked for, checksums are made or compared, and the result is synced to disk. The copy is
    Python's shutil.copyfile, synced as well. They take turns, A B A B.
    """

    preset: str = "mistral-7b-v0.1"
    """Model whose shapes are taken."""
    layers: int | None = 5
    """Layers of it that are converted; 5 of Mistral-7B are 2.7 GB, all 32 are 14.5."""
    shard_gb: float = 5.0
    """Most weights in a file, in GB."""
    repetitions: int = 5
    """Times that each is measured; the median counts."""
    folder: Path | None = None
    """Folder for the files, three times the size of the weights; by default a temporary one."""

    COUNTS = ("repetitions",)
    AMOUNTS = ("shard_gb", "read_gb")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folder and not self.folder.is_dir():
            raise BadInput(f"there is no folder {self.folder}")

    def run(self, console: Console) -> Report:
        """See `Work.run`; `BadInput` if the disk has too little room."""
        report = self.report()
        with tempfile.TemporaryDirectory(prefix="parity-", dir=self.folder) as folder:
            console.print("making a checkpoint", markup=False)
            report.rows += self.measure(Path(folder))
        report.notes.append(
            "ratio: to the copy of the same repetition; both directions check that all weights "
            "are finite and all checksums"
        )
        report.show(console, figures(report.rows))
        return report

    def measure(self, folder: Path) -> list[Row]:
        """A row for the copy and for each direction."""
        hf, lechat, out = (folder / name for name in ("hf", "lechat", "out"))
        layers = [] if self.layers is None else ["--layers", str(self.layers)]
        with quiet():
            make_checkpoint.main([str(hf), "--preset", self.preset, *layers, *self._shards])
        self._convert(hf, lechat, "lechat")
        tasks: dict[str, Callable[[], None]] = {
            COPY: lambda: copy(hf, out),
            "hf to lechat": lambda: self._convert(hf, out, "lechat"),
            "lechat to hf": lambda: self._convert(lechat, out, "hf"),
        }
        anonymous = dict.fromkeys(tasks, 0)

        def timed(impl: str) -> float:
            os.sync()  # what others wrote is on the disk and off the clock
            wait_until_idle()
            with PeakAnonymous() as memory:
                began = time.perf_counter()
                tasks[impl]()
                seconds = time.perf_counter() - began
            shutil.rmtree(out)
            anonymous[impl] = max(anonymous[impl], memory.bytes or 0)
            return seconds

        times = interleaved(
            {impl: lambda impl=impl: timed(impl) for impl in tasks}, self.repetitions
        )
        n_bytes = sum(path.stat().st_size for path in hf.iterdir())
        return [row(impl, times[impl], times[COPY], n_bytes, anonymous[impl]) for impl in tasks]

    @property
    def _shards(self) -> list[str]:
        return ["--shard-gb", str(self.shard_gb)]

    def _convert(self, src: Path, dst: Path, to: Format) -> None:
        with quiet():
            convert.main([str(src), str(dst), "--to", to, *self._shards])


def row(impl: str, times: list[float], copies: list[float], n_bytes: int, anonymous: int) -> Row:
    """The figures of one task, from the seconds of each repetition and those of the copy."""
    seconds = statistics.median(times)
    ratios = [a / b for a, b in zip(times, copies, strict=True)]
    return Row(
        work="convert",
        impl=impl,
        dtype="bfloat16",
        batch=0,
        context=0,
        tokens_per_s=None,
        peak_bytes=anonymous or None,
        details={
            "seconds": seconds,
            "gb_s": n_bytes / 1e9 / seconds,
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "peak_anon_bytes": anonymous or None,
            "bytes": n_bytes,
        },
    )


def copy(src: Path, dst: Path) -> None:
    """Copies the files of a folder into a new one, synced to disk."""
    dst.mkdir()
    for path in sorted(src.iterdir()):
        shutil.copyfile(path, dst / path.name)
        sync(dst / path.name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What the commands say goes nowhere."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def figures(rows: list[Row]) -> TableText:
    """The table of the report."""
    lines = [
        [
            row.impl,
            f"{row.details['bytes'] / 1e9:.2f}",
            f"{row.details['seconds']:.2f}",
            f"{row.details['gb_s']:.2f}",
            f"{row.details['ratio']:.2f}",
            cell("{:,.0f}", row.peak_bytes, 1e6),
        ]
        for row in rows
    ]
    header = ["convert", "GB", "seconds", "GB/s", "ratio to copy", "anonymous MB"]
    return TableText(header, lines)
