"""Packages of npm, for tests that are run against programs of other people."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SECONDS = 300


def packages(config: pytest.Config, *names: str) -> Path:
    """A folder in which these packages are installed; `LECHAT_TEST_NPM=1` fetches missing ones.

    They are kept in pytest's cache. Without Node.js or a package the test is skipped.
    """
    if shutil.which("node") is None:
        pytest.skip("there is no Node.js")
    # A folder for each set, since tests of several processes may install at the same time.
    folder = config.cache.mkdir(f"npm-{names[0]}") if config.cache else None
    if folder is None:
        pytest.skip("pytest has no cache folder to install npm's packages in")
    missing = [name for name in names if not (folder / "node_modules" / name).is_dir()]
    if missing and not os.environ.get("LECHAT_TEST_NPM"):
        pytest.skip(f"npm's {' and '.join(missing)} is missing; LECHAT_TEST_NPM=1 installs it")
    if missing:
        # No scripts, which would compile or fetch more, and nothing optional.
        flags = ["--no-audit", "--no-fund", "--ignore-scripts", "--omit=optional"]
        install = ["npm", "install", *flags, "--prefix", str(folder), *names]
        subprocess.run(install, check=True, timeout=SECONDS)
    return folder


def run(script: Path, *arguments: str) -> str:
    """What a script prints under Node.js; its errors are the test's."""
    done = subprocess.run(
        ["node", str(script), *arguments], capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
