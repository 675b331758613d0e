"""JAX's persistent compilation cache, so that the second start of a program is fast.

What is compiled on one machine is found on any other with the same chips, number of chips, versions
and options, if both name one folder or the second has a copy. For that nothing of the machine may
be in JAX's keys, and two things were: the path of XLA's autotuning cache, which is below the
folder, and the paths of source files, which are in the bodies of Pallas kernels.
"""

import os
import sys

import jax
from etils import epath

from lechat_jax.errors import BadInput
from lechat_jax.files.paths import cache_home

FOLDER = "jax_compilation_cache_dir"
# Each by the environment variable that has precedence over it.
SETTINGS = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.0,
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1,
    # What a program was tuned to is in the program; only one that was changed is tuned again.
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
    "JAX_HLO_SOURCE_FILE_CANONICALIZATION_REGEX": "^.*/",  # what is left out: the folders
}


def enable_compilation_cache() -> None:
    """Enables JAX's persistent compilation cache in the folder `JAX_COMPILATION_CACHE_DIR`.

    That may be a `gs://` or `s3://` URL. Without it, it is `jax` below `cache_home()`, a private
    folder, because JAX runs what it reads there; if that cannot be used, it is reported on stderr
    and does not end the run.

    Commands call it before anything is compiled; a library leaves this to its user. A folder
    that is set in `jax.config` already stays, with all other settings.

    Raises:
        BadInput: the folder in the environment cannot be made or reached.
    """
    named = os.environ.get(FOLDER.upper(), "")
    if (jax.config.values.get(FOLDER) or named) != named:
        return
    try:
        folder = _opened(named) if named else _private()
    except OSError as error:
        print(f"warning: compiled programs are not kept: {error}", file=sys.stderr)
        return
    jax.config.update(FOLDER, folder)
    for variable, value in SETTINGS.items():
        if variable not in os.environ:
            jax.config.update(variable.lower(), value)


def _private() -> str:
    folder = cache_home() / "jax"
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)  # refused to whoever does not own it
    return str(folder)


def _opened(named: str) -> str:
    """The folder, which is made unless it is there."""
    try:
        epath.Path(named).mkdir(parents=True, exist_ok=True)
    except Exception as error:  # each kind of storage has its own, as for a wrong password
        why = f"{error}".partition("\n")[0] or type(error).__name__
        raise BadInput(
            f"compiled programs cannot be kept in {named} (JAX_COMPILATION_CACHE_DIR): {why}; "
            "mend that, name another folder, or unset it"
        ) from error
    return named
