"""One program on several hosts: every process takes each step, the first speaks and writes.

Each process runs the same program with the same flags and has its own devices. What all of
them must do alike, although only one can know it (a signal that came, how long a step took,
which checkpoint is good), they agree on here. With a single process nothing of it costs
anything. The folder of the run must be one that all processes share.
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
    """This process is one of several; to be called before JAX is asked for its devices.

    On a Cloud TPU, under Slurm, Open MPI and on Kubernetes JAX finds out everything itself.

    Args:
        coordinator: address and port of the first process, which the others can reach.
        num_processes: how many there are.
        process_id: which of them this is, from 0.

    Raises:
        BadInput: there is nothing to find out from, or the others do not come.
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
    """Whether this process is the one that speaks and writes."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def from_first(work: Callable[[], Any]) -> Any:
    """What the first process finds, as JSON can say it; the others wait for it.

    Raises:
        BadInput: in every process what `work` raised in the first.
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
    """Whether it is so in any process; every process has to ask."""
    if not jax.distributed.is_initialized():
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def _told(text: str) -> str:
    """The text of the first process, in all."""
    raw = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(raw.size)))
    padded = np.resize(raw, size) if is_first() else np.zeros(size, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(padded)).decode()


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Within it, a process that fails is gone at once, so that no other waits for it.

    Left to itself it would wait for the others when Python ends, and they for it: in a
    collective they notice that the connection is closed, or are ended by JAX when the first
    process has missed the dead one for 100 seconds.
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
