"""What every test and doctest runs under: eight simulated CPU devices, hasty XLA, no network.

At the root and not in `tests`, because the doctests in the packages are tests as well.
"""

import os
import socket
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # programs that a test starts stay offline too

import jax  # after JAX_PLATFORMS is set, since JAX reads it when imported

from lechat_jax.config import MistralConfig

# Not in XLA_FLAGS, which the programs that a test starts would inherit: those are to run as
# on a user's machine, with one device. A count given from outside wins.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 8)

OPTIMIZED = bool(os.environ.get("LECHAT_TEST_OPTIMIZED"))


def compile_quickly() -> None:
    """Leaves out most of XLA's optimisations, which took two fifths of the time of all tests.

    What is tested is the program that XLA is given. Programs that a test starts, and
    `python -m parity.check`, are optimised as a user's are, and so is every test with
    `LECHAT_TEST_OPTIMIZED=1 pytest`.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    if jax.__version_info__ < (0, 11):  # XLA ends a process over a flag that it has no longer
        with pytest.MonkeyPatch.context() as patch:
            flags = os.environ.get("XLA_FLAGS", "")
            patch.setenv("XLA_FLAGS", f"{flags} --xla_cpu_use_fusion_emitters=false")
            jax.devices()  # now the flags are read, once


if os.environ["JAX_PLATFORMS"] == "cpu" and not OPTIMIZED:
    compile_quickly()

# No deadline, because the first example compiles. In CI the same examples every time.
hypothesis.settings.register_profile("lechat", deadline=None)
hypothesis.settings.register_profile("lechat-ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("lechat-ci" if os.environ.get("CI") else "lechat")

LOOPBACK = ("127.", "::1", "localhost")


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache is an empty folder of this run: nothing is read from a home, or left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LECHAT_CACHE", raising=False)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest) -> Iterator[None]:
    """Connecting to another machine fails, unless the test is marked `network`."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        is_inet = self.family in (socket.AF_INET, socket.AF_INET6)
        if is_inet and not str(address[0]).startswith(LOOPBACK):
            raise ConnectionRefusedError(f"a test must not reach {address[0]}; mark it `network`")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("network"):
            patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(scope="session")
def tiny() -> MistralConfig:
    """A model of three layers in which no two dimensions agree, so none can be confused."""
    from parity.architectures import (
        SMALL,  # not before the shapes of lechat_jax are checked at imports
    )

    return SMALL


@pytest.fixture
def x64() -> Iterator[None]:
    """Sixty-four-bit arithmetic for the length of one test."""
    with jax.enable_x64(True):
        yield
