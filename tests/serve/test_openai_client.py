"""OpenAI's client for JavaScript finds its own API.

`LECHAT_TEST_NPM=1 pytest -m node tests/serve` fetches it from npm once, into pytest's cache.
"""

from pathlib import Path

import pytest

from tests.serve.conftest import Live
from tests.support import npm

pytestmark = pytest.mark.node


def test_openais_client_for_javascript_works(pytestconfig: pytest.Config, server: Live) -> None:
    folder = npm.packages(pytestconfig, "openai")
    said = npm.run(Path(__file__).with_name("openai_client.mjs"), str(folder), server.url)
    assert said.count("ok ") == 9
