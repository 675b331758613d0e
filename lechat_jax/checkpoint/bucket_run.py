"""Training runs in a bucket: trained in a local folder, which is mirrored after each checkpoint."""

import re
import shutil
from pathlib import Path

from lechat_jax.checkpoint.run import CHECKPOINTS, Run
from lechat_jax.errors import BadInput
from lechat_jax.files.buckets import (
    BucketSync,
    exists,
    fetch,
    names_in,
    read_file,
    uri_of,
    working_folder,
)
from lechat_jax.files.checksums import MANIFEST
from lechat_jax.formats.folder import CONFIG
from lechat_jax.shell import command


def new_run(path: Path) -> Run:
    """A run whose folder does not exist yet, here or in a bucket.

    Raises:
        BadInput: the bucket has such a run already or cannot be read, or another process begins it.
    """
    uri = uri_of(path)
    if uri is None:
        return Run(path)
    if exists(f"{uri}/{CONFIG}"):
        raise BadInput(
            f"{uri} holds a run already; continue it with: "
            f"{command('lechat_jax.train', resume=uri)}, or name another folder with --out"
        )
    local = working_folder(uri)
    if local.exists():  # of one that was killed before anything was uploaded
        left = Run(local)
        left.hold()
        shutil.rmtree(local, ignore_errors=True)
        left.release()
    return Run(local, BucketSync(local, uri))


def run_to_resume(path: Path) -> Run:
    """An existing run, here or in a bucket, whose folder is fetched unless it is ahead here.

    Raises:
        BadInput: there is no such run, the bucket cannot be read, or another process trains it.
    """
    uri = uri_of(path)
    if uri is None:
        return Run.open(path)
    local = working_folder(uri)
    local.mkdir(exist_ok=True)
    held = Run(local)
    held.hold()
    try:
        is_ahead = _is_ahead(local, uri)
        if not is_ahead:
            fetch(uri, local)
    finally:
        held.release()
    Run.open(local)
    return Run(local, BucketSync(local, uri, is_fetched=not is_ahead))


def _is_ahead(local: Path, uri: str) -> bool:
    """Whether the local folder has a later checkpoint of the run than the bucket.

    So it is where a run was killed before that was uploaded. Another run of that name is told by
    its config.
    """
    here = [int(path.parent.name) for path in (local / CHECKPOINTS).glob(f"[0-9]*/{MANIFEST}")]
    own = local / CONFIG
    if not here or not own.is_file():
        return False
    names = names_in(uri)
    form = re.compile(rf"{CHECKPOINTS}/(\d+)/{MANIFEST}")
    there = [int(found[1]) for name in names if (found := form.fullmatch(name))]
    is_same = CONFIG in names and read_file(f"{uri}/{CONFIG}") == own.read_bytes()
    return is_same and max(here) > max(there, default=-1)
