"""JAX's persistent compilation cache, so that the second start of a program is fast."""

import os
import sys

import jax

from lechat_jax.files.paths import cache_home

FOLDER = "jax_compilation_cache_dir"
# Each by the environment variable that has precedence over it.
KEEP_ALL = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.0,
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1,
}


def enable_compilation_cache() -> None:
    """Enables JAX's persistent compilation cache in `jax` below `cache_home()`, a private folder.

    Commands call it before anything is compiled; a library leaves this to its user. The folder
    is private because JAX runs what it reads there. A folder that is set already, by
    `JAX_COMPILATION_CACHE_DIR` or in `jax.config`, stays. A folder that cannot be used is
    reported on stderr and does not end the run.
    """
    if jax.config.values.get("jax_compilation_cache_dir"):
        return
    try:
        folder = cache_home() / "jax"
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)  # refused to whoever does not own it
    except OSError as error:
        print(f"warning: compiled programs are not kept: {error}", file=sys.stderr)
        return
    jax.config.update(FOLDER, str(folder))
    for variable, value in KEEP_ALL.items():
        if variable not in os.environ:
            jax.config.update(variable.lower(), value)
