"""OpenAI's client for JavaScript finds its own API.

`LECHAT_TEST_NPM=1 pytest -m node tests/serve` fetches it from npm once, into pytest's cache.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.serve.conftest import Live

SCRIPT = Path(__file__).with_name("openai_client.mjs")
SECONDS = 200

pytestmark = pytest.mark.node


@pytest.fixture(scope="session")
def packages(pytestconfig: pytest.Config) -> Path:
    """A folder in which the client is installed."""
    if shutil.which("node") is None:
        pytest.skip("there is no Node.js")
    folder = pytestconfig.cache.mkdir("npm") if pytestconfig.cache else None
    if folder is None:
        pytest.skip("pytest has no cache folder to install npm's packages in")
    if not (folder / "node_modules/openai").is_dir():
        if not os.environ.get("LECHAT_TEST_NPM"):
            pytest.skip("npm's package openai is missing; LECHAT_TEST_NPM=1 installs it")
        install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), "openai"]
        subprocess.run(install, check=True, timeout=SECONDS)
    return folder


def test_openais_client_for_javascript_works(packages: Path, server: Live) -> None:
    command = ["node", str(SCRIPT), str(packages), server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 9
