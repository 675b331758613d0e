"""Multi-host training (`jax.distributed`): all processes take each step, the first logs and writes.

Each process runs the same program with the same flags and has its own devices. Decisions that
all must share although only one process knows the facts (a signal, the time of a step, which
checkpoint is good) are agreed on here. With a single process this costs nothing. The run's
folder must be on a file system that all processes share.
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lechat_jax.errors import BadInput

TIMEOUT = 300  # seconds for all processes to arrive


def start(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins a multi-host run (`jax.distributed.initialize`), before JAX looks for devices.

    On a Cloud TPU, under Slurm, Open MPI and on Kubernetes JAX detects all arguments itself.

    Args:
        coordinator: `host:port` of the first process, reachable by the others.
        num_processes: number of processes.
        process_id: index of this process, from 0.

    Raises:
        BadInput: nothing can be detected, or the other processes do not connect.
    """
    # Ours is the only handler of SIGTERM: JAX's own would take the signal from it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        why = str(error).strip().partition("\n")[0]
        raise BadInput(
            f"the processes do not find each other ({why}); start the same command on every "
            "host, and where JAX cannot find out the others by itself, give each of them "
            "--coordinator HOST:PORT, --num-processes and its own --process-id"
        ) from error


def is_first() -> bool:
    """Whether this is process 0, the one that logs and writes."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def from_first(work: Callable[[], Any]) -> Any:
    """Runs `work` in the first process and broadcasts its result, a JSON value, to all.

    Raises:
        BadInput: `work` raised it in the first process; raised in every process.
    """
    if not jax.distributed.is_initialized():
        return work()
    answer: dict[str, Any] = {}
    if is_first():
        try:
            answer = {"found": work()}
        except BadInput as error:
            answer = {"refused": str(error)}
    answer = json.loads(_told(json.dumps(answer)))
    if "refused" in answer:
        raise BadInput(answer["refused"])
    return answer["found"]


def anywhere(flag: bool) -> bool:
    """Logical or of a flag over all processes; every process must call it."""
    if not jax.distributed.is_initialized():
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def _told(text: str) -> str:
    """Broadcasts the first process's text to all."""
    raw = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(raw.size)))
    padded = np.resize(raw, size) if is_first() else np.zeros(size, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(padded)).decode()


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Context manager in which a failing process exits at once, so that no other waits for it.

    Otherwise it would wait for the others when Python exits, and they for it. After its exit a
    collective fails on the closed connection, or JAX ends the others when the first process has
    missed a heartbeat for 100 seconds.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        code = 1
        if isinstance(error, BadInput):
            print(f"error: {error}", file=sys.stderr)
            code = 2
        elif isinstance(error, jax.errors.JaxRuntimeError):
            why = str(error).partition("\n")[0]
            print(
                f"error: process {jax.process_index()} has lost another one ({why}); start all of "
                "them again with --resume",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
