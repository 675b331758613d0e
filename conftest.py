"""What every test and doctest runs under: eight simulated CPU devices, hasty XLA, no network.

At the root and not in `tests`, because the doctests in the packages are tests as well.
"""

import gc
import importlib.util
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import psutil
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # programs that a test starts stay offline too
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it would ask Google
if "PYTEST_XDIST_WORKER" in os.environ:  # each core has a worker, which would wait for PyTorch's
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads as long as those wait for a core

import jax  # after JAX_PLATFORMS is set, since JAX reads it when imported

from lechat_jax.config import MistralConfig

# Not in XLA_FLAGS, which the programs that a test starts would inherit: those are to run as
# on a user's machine, with one device. A count given from outside wins.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 8)

OPTIMIZED = bool(os.environ.get("LECHAT_TEST_OPTIMIZED"))


def compile_quickly() -> None:
    """Leaves out most of XLA's optimisations, which took two fifths of the time of all tests.

    What is tested is the program that XLA is given, here and in the programs that a test starts.
    `python -m parity.check` is optimised as a user's program is, and so is every test with
    `LECHAT_TEST_OPTIMIZED=1 pytest`, which `.ci/run slow` does.
    """
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for the programs that a test starts
    jax.config.update("jax_disable_most_optimizations", True)
    if jax.__version_info__ < (0, 11):  # XLA ends a process over a flag that it has no longer
        # In one part, since compiling 32 parts at once takes more work where no core is idle.
        hasty = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {hasty}"


if os.environ["JAX_PLATFORMS"] == "cpu" and not OPTIMIZED:
    compile_quickly()

# No deadline, because the first example compiles; a shape of its own compiles each. In CI the same
# examples every time.
hypothesis.settings.register_profile("lechat", deadline=None, max_examples=100 if OPTIMIZED else 30)
hypothesis.settings.register_profile(
    "lechat-ci", hypothesis.settings.get_profile("lechat"), derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("lechat-ci" if os.environ.get("CI") else "lechat")

# What cannot be imported without an extra that the tests do without.
collect_ignore = [] if importlib.util.find_spec("lm_eval") else ["lechat_jax/eval/harness.py"]

GIGABYTE = 1_000_000_000
LOOPBACK = ("127.", "::1", "localhost")


def pytest_xdist_auto_num_workers() -> int:
    """A worker for each core, but no more than have two gigabytes each."""
    return max(1, min(psutil.cpu_count() or 1, psutil.virtual_memory().available // (2 * GIGABYTE)))


@pytest.fixture(scope="module", autouse=True)
def forgets_what_was_compiled() -> Iterator[None]:
    """Compiled programs are dropped after a file that leaves a worker larger than a gigabyte.

    Until then they spare other files the compiling of what they have in common. Whatever is still
    there after a file, imported modules above all, stays: no later search for garbage goes through
    it, which took a tenth of the time of all tests.
    """
    from lechat_jax.devices.host_memory import give_back_memory

    yield
    if psutil.Process().memory_info().rss > GIGABYTE:
        jax.clear_caches()
        gc.unfreeze()
    gc.collect()
    gc.freeze()
    give_back_memory()


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
    from tests.support.models import TINY  # now that the shapes of lechat_jax are checked

    return TINY


@pytest.fixture(scope="session")
def convert() -> Callable[[list[str]], int]:
    """`python -m parity.convert`; whoever asks is skipped where there is no parity."""
    return pytest.importorskip("parity.convert.command").main


@pytest.fixture
def x64() -> Iterator[None]:
    """Sixty-four-bit arithmetic for the length of one test."""
    with jax.enable_x64(True):
        yield
