"""A benchmark of training whose learners run alone: the same command, once for each of them."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from lechat_jax.errors import BadInput
from lechat_jax.shell import quoted
from parity.report import Row

PEERS = ("torch", "eager", "compile")


def measured_apart(asked: dict[str, Any], console: Console) -> list[tuple[Row, float]]:
    """The rows of all learners, each from a process of its own, with the memory's speed there.

    `asked` are the fields of `bench_train.Train`.

    Raises:
        BadInput: one of them did not end well.
    """
    rows = []
    for command in commands(asked):
        shown = quoted(["python", "-m", "parity.bench", *command])
        console.print(shown, markup=False, soft_wrap=True)
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            whole = [sys.executable, "-m", "parity.bench", *command, "--json", str(report)]
            done = subprocess.run(
                whole, capture_output=True, encoding="utf-8", errors="replace", check=False
            )
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                raise BadInput(f"{shown} failed: {said}")
            found = json.loads(report.read_text(encoding="utf-8"))
        rows += [(_row(row), found["read_gb_s"]) for row in found["rows"]]
    return rows


def commands(asked: dict[str, Any]) -> Iterator[list[str]]:
    """The flags with which each learner is measured alone."""
    kinds: list[dict[str, Any]] = []
    if asked["lechat"]:
        kinds += [{"lechat": True, "attention": (name,)} for name in asked["attention"]]
    kinds += [{name: True, "same_optimizer": False} for name in PEERS if asked[name]]
    rest = {name: value for name, value in asked.items() if name not in ("apart", "json")}
    nobody = dict.fromkeys(("lechat", *PEERS), False)
    for block in asked["block"]:
        batch = asked["batch"] * asked["block"][0] // block
        for kind in kinds:
            yield ["train", *_flags(rest | nobody | kind | {"block": (block,), "batch": batch})]


def _flags(values: dict[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif isinstance(value, tuple):
            yield from (f"--{flag}", *map(str, value))
        elif value is not None:
            yield from (f"--{flag}", str(value))


def _row(keys: dict[str, Any]) -> Row:
    """A row that a report in JSON has."""
    own = {field.name for field in dataclasses.fields(Row)}
    details = {name: value for name, value in keys.items() if name not in own}
    return Row(**{name: value for name, value in keys.items() if name in own}, details=details)
