"""What is left of memory is known within containers too, and running out of it is a sentence."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from lechat_jax.devices import memory as room
from lechat_jax.devices.memory import available_bytes, check_fits, exhausted, running_out
from lechat_jax.errors import BadInput

GB = 10**9
STAT = "inactive_file 1000000000\nactive_file 500000000\ntotal_inactive_file 0\ntotal_active_file 0"
STAT_V1 = "inactive_file 0\nactive_file 0\ntotal_inactive_file 1000000000\ntotal_active_file 9"


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Control groups as Linux shows them, on a machine with 100 GB free."""
    memory = psutil.virtual_memory()._replace(available=100 * GB)
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: memory)

    def put(own: str, files: dict[str, object]) -> None:
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
        left = room._left_in_groups
        monkeypatch.setattr(
            room, "_left_in_groups", lambda: left(tmp_path / "groups", tmp_path / "own")
        )

    return put


def test_without_a_limit_it_is_what_the_system_has(groups: Callable[..., None]) -> None:
    groups("0::/user\n", {"user/memory.max": "max", "user/memory.current": 7})
    assert available_bytes() == 100 * GB


def test_a_control_group_leaves_its_limit_less_what_is_taken_but_files(
    groups: Callable[..., None],
) -> None:
    files = {"memory.max": 8 * GB, "memory.current": 5 * GB, "memory.stat": STAT}
    groups("0::/job\n", {f"job/{name}": text for name, text in files.items()})
    assert available_bytes() == 4_500_000_000


def test_the_narrowest_group_around_counts(groups: Callable[..., None]) -> None:
    files = {"a/memory.max": 3 * GB, "a/memory.current": GB, "a/memory.stat": "anon 1"}
    files |= {"a/b/memory.max": 9 * GB, "a/b/memory.current": GB, "a/b/memory.stat": "anon 1"}
    groups("0::/a/b\n", files)
    assert available_bytes() == 2 * GB


def test_a_container_that_sees_itself_as_the_root_is_limited(groups: Callable[..., None]) -> None:
    files = {"memory.max": 2 * GB, "memory.current": GB, "memory.stat": "anon 1"}
    groups("0::/docker/0123\n", files)
    assert available_bytes() == GB


def test_so_it_is_in_the_first_version_of_groups(groups: Callable[..., None]) -> None:
    files = {"memory.limit_in_bytes": 6 * GB, "memory.usage_in_bytes": 5 * GB}
    files |= {"memory.stat": STAT_V1}
    own = "12:cpu:/slurm/7\n9:hugetlb,memory:/slurm/7\n0::/\n"
    groups(own, {f"memory/slurm/7/{name}": text for name, text in files.items()})
    assert available_bytes() == 2 * GB + 9


def test_a_group_that_is_over_its_limit_leaves_nothing(groups: Callable[..., None]) -> None:
    files = {"memory.max": GB, "memory.current": 2 * GB, "memory.stat": "anon 1"}
    groups("0::/\n", files)
    assert available_bytes() == 0


def test_what_fits_is_let_pass_and_so_is_what_nobody_knows() -> None:
    check_fits("it takes", 5, 5, "free some")
    check_fits("it takes", 10**15, None, "free some")


# --- running out ---


def by_xla() -> None:
    jnp.zeros((400_000, 400_000)).block_until_ready()


def by_numpy() -> None:
    np.zeros((4_000_000, 4_000_000))


def by_the_system() -> None:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def by_cuda() -> None:
    raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total of")


@pytest.mark.parametrize("run_out", [by_xla, by_numpy, by_the_system, by_cuda])
def test_whoever_runs_out_it_is_one_sentence(run_out: Callable[[], None]) -> None:
    with pytest.raises(BadInput, match=r"^out of memory.*; take less$"), running_out("take less"):
        run_out()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("INVALID_ARGUMENT: shapes do not agree"),
        RuntimeError("RESOURCE_EXHAUSTED: shared memory size limit exceeded"),
        RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "notes.txt"),
    ],
    ids=str,
)
def test_any_other_error_stays_what_it_is(error: Exception) -> None:
    assert exhausted(error) is None
    with pytest.raises(type(error)), running_out("take less"):
        raise error


def test_xla_says_how_much_there_was_no_room_for() -> None:
    with pytest.raises(BadInput, match=r"no room for another 640\.00 GB"), running_out("take less"):
        by_xla()
