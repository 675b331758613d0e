"""Training run folder: config, metrics, loss curve, samples, checkpoints.

runs/<name>/
  config.json        the model, and every training option as resolved
  config.yaml        the options, for `--config`
  metrics.jsonl      an object a line; see `Run.log`
  loss.png           the loss curve
  samples/           one text a file
  checkpoints/       training state, with checksums
  tokenizer.model.v1 the tokenizer, in any of Mistral's formats: the folder suffices to generate
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lechat_jax.devices.processes import is_first
from lechat_jax.errors import BadInput
from lechat_jax.files.atomic import check_new_folder, disk_errors, write_atomic
from lechat_jax.files.buckets import BucketSync
from lechat_jax.files.lock import LOCK, Lock
from lechat_jax.formats.folder import CONFIG
from lechat_jax.shell import command

CHECKPOINTS, METRICS, CURVE = "checkpoints", "metrics.jsonl", "loss.png"
RECIPE = "config.yaml"
CUT = 20  # of the steps, the first one of so many does not decide how high the picture is
HELD_OUT = "val/held_out"  # beside the last score, which is of as many of these tokens as it says


class Run:
    """Folder of one training run. Files are written atomically; metrics are appended.

    Of several processes only the first writes; the others do nothing.

    Attributes:
        trackers: experiment trackers that get the logged metrics as well.
        bucket: keeps a copy in a bucket, if the run lives there.
        closing: what is to be done when this process lets the run go.
    """

    def __init__(self, folder: Path, bucket: BucketSync | None = None) -> None:
        self.folder, self.bucket = folder, bucket
        self.trackers: list[Callable[[Sequence[Mapping[str, Any]]], None]] = []
        self.closing = contextlib.ExitStack()
        if bucket and is_first():
            self.closing.callback(bucket.finish)
        self._lock: Lock | None = None
        self.checkpoints = folder / CHECKPOINTS
        self.samples = folder / "samples"

    @classmethod
    def create(cls, folder: Path) -> "Run":
        """Creates the folder of a new run.

        Raises:
            BadInput: as `check_new`, or another process creates a run there.
        """
        run = cls(folder)
        run.begin()
        return run

    def begin(self) -> None:
        """Creates the folder and locks it; raises `BadInput` as `create` does."""
        self.check_new(self.folder)
        with self._writing(self.samples):
            self.samples.mkdir(parents=True, exist_ok=True)
        self.hold()
        self.check_new(self.folder)  # another may have begun it, and ended, since

    def hold(self) -> None:
        """Locks the run: no other process can train it until this one ends or calls `release`.

        Readers, such as generate and convert, are not blocked.

        Raises:
            BadInput: another process holds the lock, or the folder cannot be written.
        """
        with self._writing(self.folder):
            self._lock = Lock(self.folder)
        if not self._lock.is_held:
            print(
                f"warning: the file system of {self.folder} has no locks, so nothing keeps a "
                "second process from training this run",
                file=sys.stderr,
            )

    def release(self) -> None:
        """Ends what watches the run, uploads what is left to upload, and releases the lock.

        Raises:
            BadInput: the bucket cannot be brought up to date.
        """
        try:
            self.closing.close()
        finally:
            if self._lock:
                self._lock.release()
                self._lock = None

    @staticmethod
    def check_new(folder: Path, n_bytes: int = 0) -> None:
        """Raises `BadInput` if a new run cannot be created in this folder.

        There is one already, or the folder cannot be written, or has less than `n_bytes` free.
        """
        if os.path.exists(folder / CONFIG):  # False, not an error, where one may not look
            raise BadInput(
                f"{folder} holds a run already; continue it with: "
                f"{command('lechat_jax.train', resume=folder)}, or name another folder with --out"
            )
        check_new_folder(folder, n_bytes)

    def forget(self, *others: str) -> None:
        """Deletes the files of an aborted run, so that another can be created here.

        Checkpoints and samples stay, if there are any, and so do files that are not a run's.

        Args:
            others: names of further files of the run.
        """
        if not is_first():
            return
        for name in (CONFIG, RECIPE, METRICS, LOCK, *others):
            (self.folder / name).unlink(missing_ok=True)
        for folder in (self.samples, self.checkpoints, self.folder):
            with contextlib.suppress(OSError):  # something is in it
                folder.rmdir()
        self.release()

    @property
    def address(self) -> str:
        """Where the run is to be found: its URI in a bucket, or its folder."""
        return self.bucket.uri if self.bucket else str(self.folder)

    def publish(self) -> None:
        """Begins to bring the copy in a bucket up to date, if there is one; `release` ends that."""
        if self.bucket and is_first():
            self.bucket.start()

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """Opens an existing run.

        Raises:
            BadInput: the folder is not a run.
        """
        if not os.path.isfile(folder / CONFIG):
            raise BadInput(f"{folder} is not a training run: it has no {CONFIG}")
        return cls(folder)

    @property
    def config(self) -> dict[str, Any]:
        """Contents of `config.json`: `{"model": {...}, "train": {...}}`."""
        path = self.folder / CONFIG
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            raise BadInput(f"{path} is not valid JSON") from None
        parts = config if isinstance(config, dict) else {}
        if not all(isinstance(parts.get(part), dict) for part in ("model", "train")):
            raise BadInput(f"{path} must have the parts 'model' and 'train'")
        return config

    @config.setter
    def config(self, config: dict[str, Any]) -> None:
        """Writes `config.json`, atomically."""
        self.write(CONFIG, json.dumps(config, indent=2) + "\n")

    def write(self, name: str, text: str) -> Path:
        """Writes a text file below the folder atomically."""
        path = self.folder / name
        if not is_first():
            return path
        with self._writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text, self._remedy)
        return path

    @property
    def _remedy(self) -> str:
        return f"make room for {self.folder}, and go on with --resume"

    def _writing(self, path: Path) -> contextlib.AbstractContextManager[None]:
        return disk_errors(path, self._remedy)

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Appends lines to `metrics.jsonl`.

        Always `step`, `time_s` since the process started and `tokens` trained on; if measured,
        `train/loss` and `val/loss` (nats per token), `train/tokens_per_sec`, `train/mfu` (see
        `flops`), `val/bpb` (bits per UTF-8 byte), `val/tokens` and `val/bytes`; with the first step
        of a process `train/compile_s`, and how much of it was waited for, `train/compile_wait_s`
        (seconds); with the last score also `val/held_out`, the number of all held-out tokens.
        Floats are written to round-trip exactly.
        """
        if not is_first():
            return
        path = self.folder / METRICS
        with self._writing(path), path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        for track in self.trackers:
            track(rows)

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of `metrics.jsonl`, up to one that a crash may have cut."""
        path = self.folder / METRICS
        if not path.exists():
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return

    def rewind(self, step: int) -> None:
        """Deletes the metrics after `step`, which a resumed run will measure again."""
        kept = [row for row in self.metrics() if row["step"] <= step]
        self.write(METRICS, "".join(json.dumps(row) + "\n" for row in kept))

    def draw(self) -> Path:
        """Plots `loss.png`: training loss in nats per token, validation in bits per byte, by step.

        The first steps, where the loss falls from that of a random model, are cut off: they would
        flatten the rest. The last score, of more held-out tokens, is not joined to the others.
        """
        from matplotlib.figure import Figure  # half a second, and only needed here

        rows = list(self.metrics())
        losses = np.array([row["train/loss"] for row in rows if "train/loss" in row])
        steps = np.array([row["step"] for row in rows if "train/loss" in row])
        scores = [row for row in rows if "val/bpb" in row]
        figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
        axes = figure.add_subplot(xlabel="step")
        axes.set_ylabel("training loss (nats per token)", color="tab:blue")
        bits = axes.twinx()
        bits.set_ylabel("validation (bits per byte)", color="tab:orange")
        title = self.folder.name
        if len(losses):
            n = max(1, len(losses) // 50)
            mean = np.convolve(losses, np.full(n, 1 / n), "valid")
            axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=0.7)
            axes.plot(steps[n - 1 :], mean, color="tab:blue", linewidth=1.5)
            low, high = losses.min(), losses[len(losses) // CUT :].max()
            title += f" · {rows[-1]['tokens']:,} tokens · loss from {losses[0]:.2f}"
            if high < losses[0]:
                axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
                title += " (cut off)"
        axes.set_title(title, fontsize=9)
        if part := [(r["step"], r["val/bpb"]) for r in scores if HELD_OUT not in r]:
            bits.plot(*zip(*part, strict=True), "o-", color="tab:orange", markersize=4)
        if full := [r for r in scores if HELD_OUT in r]:
            last = max(full, key=lambda row: (row["step"], row["val/tokens"]))
            n, of = last["val/tokens"], last[HELD_OUT]
            how_many = f"all {n:,}" if n == of else f"{n:,} of {of:,}"
            label = f"{last['val/bpb']:.3f} on {how_many} held-out tokens"
            place = [last["step"]], [last["val/bpb"]]
            bits.plot(*place, "*", color="tab:red", markersize=12, label=label)
            bits.legend(frameon=False, loc="upper right")
        for side in (axes, bits):
            side.spines["top"].set_visible(False)
        path = self.folder / CURVE
        if not is_first():
            return path
        content = io.BytesIO()
        figure.savefig(content, format="png")
        write_atomic(path, content.getvalue(), self._remedy)
        return path
