"""Ahead-of-time compilation in a background thread, while the arguments are still being made."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from lechat_jax.devices.host_memory import give_back_memory
from lechat_jax.devices.platform import platform


class Compilation:
    """Compiles a jitted function beside other work: `start` it, and `wait` before the first call.

    It is lowered from `jax.ShapeDtypeStruct`s, so nothing is allocated on a device. JAX keeps the
    executable for the calls with arrays of these shapes and shardings, so nothing is compiled
    twice. A thread that still compiles keeps the process from ending, but not from saying why.

    Attributes:
        seconds: that tracing and compiling took, or finding the program in the cache.
        waited: seconds of them that `wait` took.
    """

    def __init__(self) -> None:
        self.seconds = self.waited = 0.0
        self._compile: Callable[[], None] | None = None
        self._done: Future[None] | None = None

    def start(self, function: Any, *arguments: Any) -> None:
        """Begins to compile a function of `jax.jit` for these arguments, or their descriptions.

        On a CPU it is left to `wait`: the compiler would take the cores from the other work,
        which then takes as much longer. So it is in one of several processes. GPUs' compilers
        exchange the kernels that they tuned, and each process waits for the others, so all must
        compile in one order, which a thread beside collectives of the main one would not keep.
        """

        def compiled() -> None:
            began = time.perf_counter()
            function.lower(*arguments).compile()
            give_back_memory()
            self.seconds = time.perf_counter() - began

        self._compile = compiled
        if platform() != "cpu" and jax.process_count() == 1:
            thread = ThreadPoolExecutor(1, "compile")
            self._done = thread.submit(compiled)
            thread.shutdown(wait=False)

    def wait(self) -> None:
        """Waits for the executable; raises what compiling raised, such as out of memory."""
        began = time.perf_counter()
        if self._done:
            self._done.result()
        elif self._compile:
            self._compile()
        self.waited = time.perf_counter() - began
