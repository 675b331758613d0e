"""How every benchmark measures: in turn, at rest, with the memory and the machine it took."""

import gc
import importlib.metadata
import platform
import re
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from lechat_jax.data.parallel_encoding import cores
from lechat_jax.devices.host_memory import give_back_memory

Key = TypeVar("Key", bound=Hashable)

SAMPLE_SECONDS = 0.02  # between two looks at the memory
READS = 5  # of the array whose reading is timed; the best counts


def interleaved(
    tasks: Mapping[Key, Callable[[], float]], repetitions: int
) -> dict[Key, list[float]]:
    """What each task returns in each repetition, the tasks taking turns: A B A B.

    Machines drift, by heat and by neighbours. What is measured in turn drifts together.

    >>> ticks = iter(range(4))
    >>> interleaved({"A": lambda: next(ticks), "B": lambda: next(ticks)}, repetitions=2)
    {'A': [0, 2], 'B': [1, 3]}
    """
    results: dict[Key, list[float]] = {key: [] for key in tasks}
    for _ in range(repetitions):
        for key, task in tasks.items():
            results[key].append(task())
    return results


def wait_until_idle(limit_s: float = 1.0) -> bool:
    """Whether the threads of this process came to rest within `limit_s` seconds.

    A pool that has just worked spins for a few milliseconds before it sleeps, and would
    take a core from whoever is measured next.
    """
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        busy, began = time.process_time(), time.perf_counter()
        time.sleep(0.02)
        if time.process_time() - busy < 0.1 * (time.perf_counter() - began):
            return True
    return False


class PeakMemory:
    """A context that knows how much the process grew in it at most.

    `bytes` is the highest resident memory within, less that at the start, and `None`
    where the system does not say (only Linux does). Compiling within it counts; memory that
    was freed before and is only kept for reuse does not hide what is used now.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        give_back_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self._before = resident("VmRSS")
        except OSError:
            self._before = None
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None and (peak := resident("VmHWM")) is not None:
            self.bytes = max(0, peak - self._before)


class PeakAnonymous:
    """Peak anonymous memory (RssAnon) of the process and its children: what is no view of a file.

    `bytes` is all of it, what was loaded before included, and `None` where the system does not
    say (only Linux does).
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakAnonymous":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while (now := resident("RssAnon")) is not None:
            own = (resident("RssAnon", child.pid) or 0 for child in process.children())
            self.bytes = max(self.bytes or 0, now + sum(own))
            if self._is_over.wait(SAMPLE_SECONDS):
                return


def resident(key: str, process: int | str = "self") -> int | None:
    """A line of `/proc/self/status`, such as VmRSS, in bytes; `None` if the system has none.

    `process` may be the id of another one.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:  # only Linux has it, of processes that have not ended
        return None
    found = re.search(rf"^{key}:\s*(\d+) kB", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def device_peak() -> int | None:
    """Most bytes of JAX's accelerator that were in use since the start; `None` on a CPU."""
    device = jax.devices()[0]
    return None if device.platform == "cpu" else device.memory_stats()["peak_bytes_in_use"]


class Read(NamedTuple):
    """How fast memory was read: in 1e9 bytes a second, and how that was measured."""

    gb_s: float
    how: str


def read_speed(gigabytes: float) -> Read:
    """The best of several float32 reads of a large array, on all cores or on the accelerator.

    It bounds what a work that reads its weights once a token can reach. The array takes a
    quarter of the free memory at most, and `how` tells its size.
    """
    free = psutil.virtual_memory().available
    n = int(min(gigabytes * 1e9, free / 4)) // 4
    array = jax.block_until_ready(jnp.ones(n, jnp.float32))
    total = jax.jit(jnp.sum)
    best = {"XLA's sum": _best(lambda: jax.block_until_ready(total(array)))}
    if jax.default_backend() == "cpu":
        parts = np.array_split(np.asarray(array), cores())  # the same memory
        with ThreadPoolExecutor(cores()) as pool:
            seconds = _best(lambda: list(pool.map(lambda part: part @ part, parts)))
        best["numpy's dot, a thread a core"] = seconds
    name = min(best, key=best.__getitem__)
    short = f", since only {free / 1e9:.1f} GB are free" if n * 4 < gigabytes * 1e9 - 4 else ""
    return Read(n * 4 / best[name] / 1e9, f"{name} of {n * 4 / 1e9:.2g} GB, best of {READS}{short}")


def _best(task: Callable[[], object]) -> float:
    """The least seconds of `READS` runs, after one that does not count."""
    times = []
    for _ in range(READS + 1):
        began = time.perf_counter()
        task()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def machine_line() -> str:
    """Processor or accelerator, and the versions that matter, in one line."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        here = f"{_cpu_model()}, {cores()} cores"
    else:
        here = f"{jax.device_count()} x {device.device_kind}"
    versions = [f"Python {platform.python_version()}"]
    for name in ("jax", "torch", "transformers"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{here}; {', '.join(versions)}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
