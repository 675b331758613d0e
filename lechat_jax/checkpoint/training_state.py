"""Training state checkpoints: Orbax with a SHA-256 manifest, written atomically and verified.

Orbax restores a flipped bit without a word (measured: 30 flips of 30), so each step
carries a manifest, and nothing is read that does not match it:

    <folder>/<step>/
        model/        one folder an item, as Orbax writes it (OCDBT, uncompressed)
        optimizer/
        meta.json     what is not an array, such as the tokens trained on
        SHA256SUMS    every other file, as `sha256sum -c SHA256SUMS` reads it

A step is built in `<step>.partial` and appears by one rename, so a killed process leaves
complete steps, and at worst such a folder, which the next save removes.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from lechat_jax.devices.processes import from_first, is_first
from lechat_jax.errors import BadInput
from lechat_jax.files.checksums import MANIFEST, fault, sync, write_manifest

META = "meta.json"
PARTIAL = ".partial"
# What is read of a checkpoint, so that none of it may be missing in the manifest.
READ = re.compile(
    r"meta\.json|(.+/)?(_[A-Z_]+|_sharding|manifest\.ocdbt|d/[0-9a-f]{32}|commit_success\.txt|"
    r"array_metadatas/process_\d+)"
)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored checkpoint, and the damaged ones that were skipped.

    Attributes:
        step: number of the step.
        items: each requested item, in the structure of its template.
        meta: the JSON object saved with them.
        refused: a sentence for each newer checkpoint that is damaged: which, where, why.
    """

    step: int
    items: dict[str, PyTree]
    meta: dict[str, Any]
    refused: tuple[str, ...]


class Checkpoints:
    """Checkpoint manager of a run, which keeps the newest `keep` good checkpoints.

    One run writes to a folder at a time; any number may read. Of a multi-host run each process
    must call `save` and `restore`: all write and read their shards of the arrays, in a shared
    folder, and the first does the rest.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise BadInput(f"keep must be at least 1 checkpoint, not {keep}")
        self.folder = Path(folder).absolute()  # Orbax takes no relative paths
        self.keep = keep

    def steps(self) -> list[int]:
        """The finished steps, oldest first, damaged ones included, which only `restore` detects."""
        return [step for step in self._folders() if (self._at(step) / MANIFEST).is_file()]

    def save(self, step: int, items: dict[str, PyTree], meta: dict[str, Any]) -> Path:
        """Saves a checkpoint, complete and synced to disk, and returns its folder.

        Older ones are deleted only then, and only beyond `keep` good ones: an older one counts as
        good once its manifest is verified again, at half a second per GB. An existing checkpoint
        of this step is replaced; newer steps stay.

        Args:
            step: the number of the step, 0 or more.
            items: pytrees of arrays by name; each can be restored without the others.
            meta: a JSON object.

        Raises:
            BadInput: the disk is full, the folder cannot be written, or a leaf is not restorable
                unchanged by JAX; older checkpoints are untouched.
        """
        if step < 0:
            raise BadInput(f"the step of a checkpoint must be 0 or more, not {step}")
        arrays = {item: _arrays(item, tree) for item, tree in items.items()}
        partial = self.folder / f"{step}{PARTIAL}"
        try:
            from_first(lambda: self._told(step, self._make_room))
            self._told(step, lambda: _write(partial / "new", arrays))
            from_first(lambda: self._told(step, lambda: self._complete(step, meta)))
        finally:
            if is_first():
                shutil.rmtree(partial, ignore_errors=True)
        if not (self._at(step) / MANIFEST).is_file():
            raise BadInput(
                f"{self.folder} is not the same for all processes; choose an --out that they share"
            )
        return self._at(step)

    def _make_room(self) -> None:
        """Creates the folder and deletes what a killed save left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"[0-9]*{PARTIAL}"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _complete(self, step: int, meta: dict[str, Any]) -> None:
        """Turns the arrays of a step into a checkpoint, by one atomic rename."""
        partial = self.folder / f"{step}{PARTIAL}"
        _seal(partial / "new", meta)
        if self._at(step).exists():
            self._at(step).rename(partial / "old")
        (partial / "new").rename(self._at(step))
        sync(self.folder)
        self._prune(step)

    def _told(self, step: int, work: Callable[[], None]) -> None:
        """Runs `work` and turns a disk error into `BadInput`."""
        try:
            work()
        except Exception as error:  # a full disk comes in many types; the rest is raised again
            if reason := _disk_error(error):
                raise BadInput(
                    f"checkpoint {step} cannot be saved in {self.folder}: {reason}; older "
                    "ones are untouched, so make room or choose another folder, and resume"
                ) from error
            raise

    def restore(self, templates: dict[str, PyTree], step: int | None = None) -> Restored:
        """Restores the newest checkpoint whose files match their SHA-256 manifest.

        Only the requested items are verified and read. A leaf whose template has a sharding gets
        it; the others are uncommitted on the default device, like new arrays: committed ones would
        recompile each jitted function, past the compilation cache.

        Args:
            templates: a pytree of `jax.ShapeDtypeStruct` or arrays for each requested item.
            step: this step only; by default the newest, and if that is damaged, the next.

        Raises:
            BadInput: there is no checkpoint, or all are damaged (each is named with its first
                damage), or leaves, shapes or dtypes differ from the template (the first
                difference is named).
        """
        while True:
            good, refused = from_first(lambda: self._newest_good(templates, step))
            whole = self._at(good)
            try:
                meta = json.loads((whole / META).read_text(encoding="utf-8"))
                return Restored(good, _read(whole, templates), meta, tuple(refused))
            except (OSError, ValueError) as error:
                if not whole.is_dir():  # deleted since by a run that trains, which has newer ones
                    continue
                if reason := _disk_error(error):
                    raise BadInput(f"{whole} cannot be read: {reason}") from error
                raise

    def _newest_good(self, items: Collection[str], step: int | None) -> tuple[int, list[str]]:
        """The step to restore, and a sentence for each damaged one that is skipped."""
        found = self._folders()
        if step is not None and step not in found:
            have = ", ".join(map(str, found)) or "none at all"
            raise BadInput(f"there is no checkpoint {step} in {self.folder}; there is {have}")
        refused: list[str] = []
        for candidate in reversed(found) if step is None else (step,):
            reason = _fault(self._at(candidate), items)
            if reason is None:
                return candidate, refused
            if not self._at(candidate).is_dir():  # deleted since, by a run that still trains
                return self._newest_good(items, step)
            refused.append(f"checkpoint {candidate} in {self.folder} is damaged: {reason}")
        if refused:
            raise BadInput("; ".join(refused) + "; no other is left to restore")
        raise BadInput(f"there is no checkpoint in {self.folder}; train first, or name another")

    def _at(self, step: int) -> Path:
        return self.folder / str(step)

    def _folders(self) -> list[int]:
        """All steps that have a folder, with a manifest or without, oldest first."""
        if not self.folder.is_dir():
            return []
        names = (path.name for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))

    def _prune(self, newest: int) -> None:
        """Deletes steps older than the `keep` newest good ones, of which `newest` is one."""
        good = 1
        for step in reversed([step for step in self._folders() if step < newest]):
            if good < self.keep:
                good += _fault(self._at(step)) is None
            else:  # renamed first, so that half a deletion does not look like damage
                old = self._at(step).rename(self.folder / f"{step}{PARTIAL}")
                shutil.rmtree(old, ignore_errors=True)  # NFS keeps what somebody has open


def _fault(whole: Path, items: Collection[str] | None = None) -> str | None:
    """Verifies these items of a checkpoint: the first damage, or `None`; see `checksums.fault`."""
    return fault(whole, items, is_read=lambda name, _: READ.fullmatch(name) is not None)


def _leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves by path, `blocks.0.attn.q.kernel`, in the order of the pytree.

    Orbax gets this flat dict, so it does not depend on the pytree's classes.
    """
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in pairs]
    if len(set(names)) < len(names) or any("/" in name or not name.strip(".") for name in names):
        raise BadInput(f"leaves need distinct names without '/' to be saved, not {sorted(names)}")
    return {name: leaf for name, (_, leaf) in zip(names, pairs, strict=True)}


def _arrays(item: str, tree: PyTree) -> dict[str, jax.Array]:
    """The leaves by path; refuses typed PRNG keys and Python numbers, which would change type."""
    arrays: dict[str, jax.Array] = {}
    for name, leaf in _leaves(tree).items():
        if not isinstance(dtype := getattr(leaf, "dtype", None), np.dtype):
            raise BadInput(f"{item}.{name} is {type(leaf).__name__}; only arrays can be saved")
        arrays[name] = leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf)
        if arrays[name].dtype != dtype:
            raise BadInput(f"{item}.{name} is {dtype}, which needs jax_enable_x64 to be restored")
    return arrays


def _checkpointer(items: Collection[str]) -> ocp.Checkpointer:
    """Orbax for these items, in its OCDBT format without compression.

    Measured on 182 MB of random float32 in 168 arrays, two cores: Orbax writes them in
    0.3 s, and in 0.8 s with its default zstd, which saves 8 % of the space. A folder an
    array (`use_ocdbt=False`) would be plainer to look at, but has 350 files to sync
    instead of 30: a whole save took 1.5 to 2.5 times as long on a busy disk.
    """
    handlers: dict[str, Any] = {
        item: ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False) for item in items
    }
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


def _write(whole: Path, items: dict[str, dict[str, jax.Array]]) -> None:
    """Writes the arrays to a path that is not visible yet; each process writes its shards."""
    filled = {item: arrays for item, arrays in items.items() if arrays}  # Orbax wants a leaf
    args = {item: ocp.args.PyTreeSave(arrays) for item, arrays in filled.items()}
    with _silence(), _checkpointer(filled) as checkpointer:
        checkpointer.save(whole, args=ocp.args.Composite(**args))


def _seal(whole: Path, meta: dict[str, Any]) -> None:
    """Adds metadata and manifest to the arrays, and syncs all to disk."""
    (whole / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    write_manifest(whole)
    for folder, _, names in os.walk(whole):
        for path in (*(Path(folder, name) for name in names), Path(folder)):
            sync(path)


def _read(whole: Path, templates: dict[str, PyTree]) -> dict[str, PyTree]:
    """Reads items of a verified checkpoint, in the structure of the templates."""
    wanted = {item: _leaves(template) for item, template in templates.items()}
    filled = [item for item in wanted if (whole / item).is_dir()]
    arrays: dict[str, dict[str, Any]] = {item: {} for item in wanted}
    with _silence(), _checkpointer(filled) as checkpointer:
        stored = checkpointer.metadata(whole).item_metadata
        for item, leaves in wanted.items():
            _check_fit(whole, item, leaves, stored[item].tree if item in filled else {})
        if filled:
            args = {
                item: ocp.args.PyTreeRestore(
                    restore_args={name: _place(leaf) for name, leaf in wanted[item].items()}
                )
                for item in filled
            }
            arrays |= checkpointer.restore(whole, args=ocp.args.Composite(**args)).items()
    return {
        item: jax.tree.unflatten(
            jax.tree.structure(template),
            [_on_device(arrays[item][name]) for name in wanted[item]],
        )
        for item, template in templates.items()
    }


def _place(leaf: Any) -> ocp.RestoreArgs:
    """Restores a leaf to its sharding if it has one, else to numpy, for `device_put`."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or not getattr(leaf, "committed", True):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding)


def _on_device(array: Any) -> jax.Array:
    return array if isinstance(array, jax.Array) else jax.device_put(array)


def _check_fit(whole: Path, item: str, wanted: dict[str, Any], stored: dict[str, Any]) -> None:
    """Checks that leaves, shapes and dtypes agree; Orbax would cast silently."""

    def say(leaf: Any) -> str:
        return "missing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"

    for name in (*wanted, *sorted(stored.keys() - wanted.keys())):
        there, here = say(stored.get(name)), say(wanted.get(name))
        if there != here:
            raise BadInput(
                f"{whole} does not fit: {item}.{name} is {there} in it and {here} in the state "
                "to restore; use the config it was trained with"
            )


def _disk_error(error: Exception) -> str | None:
    """The operating system's error message, if it is one; Tensorstore wraps it in a ValueError."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Context manager that silences Orbax's log: errors are raised as well, without tracebacks."""

    def drop(_: logging.LogRecord) -> bool:
        return False

    log = logging.getLogger("absl")
    log.addFilter(drop)
    try:
        yield
    finally:
        log.removeFilter(drop)
