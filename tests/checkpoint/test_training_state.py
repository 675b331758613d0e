"""A checkpoint comes back bit for bit, or is refused by name; and a kill loses no older one."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from lechat_jax.checkpoint import training_state
from lechat_jax.checkpoint.training_state import Checkpoints
from lechat_jax.errors import BadInput

ROOT = Path(__file__).parents[2]


def random_bits(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> jax.Array:
    """Any bits at all: NaNs with payloads, infinities, negative zeros and subnormals too."""
    count = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    data = np.random.default_rng(seed).bytes(count)
    return jax.device_put(np.frombuffer(data, dtype).reshape(shape))


def state(seed: int) -> dict[str, PyTree]:
    weights = {"blocks": [{"kernel": random_bits((3, 5), np.float32, seed)}]}
    moments = {"mu": random_bits((3, 5), np.float32, seed + 1), "count": jnp.int32(seed)}
    return {"model": weights, "optimizer": moments}


def abstract(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def assert_same_bits(got: PyTree, want: PyTree) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def biggest(folder: Path) -> Path:
    """The file with the numbers in it, whose name Orbax makes up."""
    return max(files(folder), key=lambda path: path.stat().st_size)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


TEMPLATE = abstract(state(0))


@pytest.fixture
def two(tmp_path: Path) -> Checkpoints:
    """Steps 1 and 2, both good."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, state(step), {"seed": 2**70, "position": [step, 0]})
    return checkpoints


# What is saved comes back.


@pytest.mark.parametrize(
    "dtype", [np.float32, jnp.bfloat16, np.float16, np.int32, np.uint32, np.uint8, np.complex64]
)
def test_every_bit_pattern_comes_back(tmp_path: Path, dtype: Any) -> None:
    tree = {"matrix": random_bits((33, 7), dtype), "scalar": random_bits((), dtype, 1)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, {"item": tree}, {})
    assert_same_bits(checkpoints.restore({"item": abstract(tree)}).items["item"], tree)


@pytest.mark.usefixtures("x64")
def test_a_64_bit_run_comes_back(tmp_path: Path) -> None:
    tree = {"f": random_bits((9,), np.float64), "i": random_bits((9,), np.int64)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, {"item": tree}, {})
    assert_same_bits(checkpoints.restore({"item": abstract(tree)}).items["item"], tree)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1e-3),
        optax.contrib.muon(1e-3),
        optax.sgd(1e-3),  # a state without a single array
    ],
    ids=["adamw", "muon", "sgd"],
)
def test_an_optimizer_state_keeps_its_structure(
    tmp_path: Path, optimizer: optax.GradientTransformation
) -> None:
    weights = {"kernel": jnp.ones((4, 3)), "scale": jnp.ones(3)}
    updated = jax.jit(optimizer.update)(weights, optimizer.init(weights), weights)[1]
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, {"model": weights, "optimizer": updated}, {})
    template = jax.eval_shape(optimizer.init, weights)
    restored = checkpoints.restore({"optimizer": template}).items["optimizer"]
    assert_same_bits(restored, updated)


def test_the_meta_and_the_step_come_back(two: Checkpoints) -> None:
    restored = two.restore(TEMPLATE)
    assert (restored.step, restored.refused) == (2, ())
    assert restored.meta == {"seed": 2**70, "position": [2, 0]}
    assert_same_bits(restored.items, state(2))


def test_an_older_step_can_be_asked_for(two: Checkpoints) -> None:
    assert_same_bits(two.restore(TEMPLATE, step=1).items, state(1))


def test_an_item_is_restored_without_reading_the_others(two: Checkpoints) -> None:
    shutil.rmtree(two.folder / "2" / "optimizer")
    restored = two.restore({"model": TEMPLATE["model"]})
    assert (restored.step, restored.refused, list(restored.items)) == (2, (), ["model"])
    assert_same_bits(restored.items["model"], state(2)["model"])


def test_leaves_land_on_their_template_s_sharding_and_else_nowhere_in_particular(
    tmp_path: Path,
) -> None:
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    split, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in [("data",), ()])
    array = random_bits((16, 3), np.float32)
    saved = {"a": jax.device_put(array, split), "b": array, "c": jax.device_put(array, everywhere)}
    template = {
        "a": jax.ShapeDtypeStruct(array.shape, array.dtype),
        "b": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=split),
        "c": array,  # not bound to its device, though it has a sharding
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"item": saved}, {})
    restored = checkpoints.restore({"item": template}).items["item"]
    assert_same_bits(restored, template | {"a": array, "b": array})
    assert {name: leaf.committed for name, leaf in restored.items()} == {
        "a": False,
        "b": True,
        "c": False,
    }
    assert restored["b"].sharding == split


def test_nothing_is_logged(
    two: Checkpoints, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    two.save(3, state(3), {})
    two.restore(TEMPLATE)
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")


# What is damaged is refused, and the next older one is used.


@pytest.fixture(scope="module")
def flippable(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path_factory.mktemp("flips"))
    for step in (1, 2):
        checkpoints.save(step, state(step), {"step": step})
    return checkpoints


@settings(max_examples=40)
@given(which=st.integers(0, 10**6), where=st.integers(0, 10**6))
@example(which=0, where=0)
@example(which=0, where=49152)  # in the manifest, a file's folder
def test_any_flipped_bit_is_refused_and_the_file_named(
    flippable: Checkpoints, which: int, where: int
) -> None:
    newest = flippable.folder / "2"
    path = files(newest)[which % len(files(newest))]
    bit = where % (8 * path.stat().st_size)
    flip(path, bit)
    try:
        restored = flippable.restore(TEMPLATE)
    finally:
        flip(path, bit)
    assert restored.step == 1
    assert_same_bits(restored.items, state(1))
    (sentence,) = restored.refused
    assert f"checkpoint 2 in {flippable.folder} is damaged: " in sentence
    assert path.name in sentence or path.name == "SHA256SUMS"


def test_a_line_end_of_the_manifest_that_became_another_is_refused(two: Checkpoints) -> None:
    manifest = two.folder / "2" / "SHA256SUMS"
    flip(manifest, 8 * manifest.read_bytes().index(b"\n"))  # a vertical tab, to Python a line end
    assert two.restore(TEMPLATE).step == 1


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda step: os.truncate(biggest(step / "model"), 59), "is not what was saved"),
    "emptied": (lambda step: os.truncate(step / "meta.json", 0), "meta.json is not what was"),
    "missing": (lambda step: biggest(step / "optimizer").unlink(), " is missing"),
    "without its item": (lambda step: shutil.rmtree(step / "model"), "is missing"),
    "extra": (
        lambda step: (step / "model/d" / ("0" * 32)).touch(),
        f"model/d/{'0' * 32} is not in SHA256SUMS",
    ),
    "manifest cut at a line end": (
        lambda step: (step / "SHA256SUMS").write_bytes(
            b"".join((step / "SHA256SUMS").read_bytes().splitlines(keepends=True)[:-1])
        ),
        "is not in SHA256SUMS",
    ),
    "without manifest": (lambda step: (step / "SHA256SUMS").unlink(), "SHA256SUMS is missing"),
    "manifest cut": (lambda step: os.truncate(step / "SHA256SUMS", 99), "has a line that is no"),
    "manifest empty": (lambda step: os.truncate(step / "SHA256SUMS", 0), "is not in SHA256SUMS"),
    "unreadable": (
        lambda step: ((step / "meta.json").unlink(), (step / "meta.json").symlink_to("meta.json")),
        "meta.json cannot be read",
    ),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_left_where_it_is(
    two: Checkpoints, damage: Callable[[Path], Any], reason: str
) -> None:
    damage(two.folder / "2")
    before = files(two.folder)
    restored = two.restore(TEMPLATE)
    assert restored.step == 1
    assert_same_bits(restored.items, state(1))
    assert len(restored.refused) == 1
    assert reason in restored.refused[0]
    assert files(two.folder) == before


LITTER = ".DS_Store", "._meta.json", ".nfs000000000a1b2c3d", "Thumbs.db", "desktop.ini"


@pytest.mark.parametrize("inside", [".", "model", "model/d"])
def test_what_was_not_saved_is_passed_over(two: Checkpoints, inside: str) -> None:
    for name in (*LITTER, "a note.txt"):
        (two.folder / "2" / inside / name).write_text("of nobody's making")
    (two.folder / "2" / inside / "lost+found").mkdir()
    restored = two.restore(TEMPLATE)
    assert (restored.step, restored.refused) == (2, ())
    assert_same_bits(restored.items, state(2))


def test_what_a_system_left_while_saving_may_go_again(
    two: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training_state._write

    def littered(whole: Path, items: Any) -> None:
        real(whole, items)
        (whole / "model" / ".nfs000000000a1b2c3d").touch()

    monkeypatch.setattr(training_state, "_write", littered)
    whole = two.save(3, state(3), {})
    (whole / "model" / ".nfs000000000a1b2c3d").unlink()
    assert two.restore(TEMPLATE).refused == ()


def test_a_step_without_manifest_is_not_finished(two: Checkpoints) -> None:
    (two.folder / "2" / "SHA256SUMS").unlink()
    assert two.steps() == [1]


def test_when_none_is_good_each_is_named(two: Checkpoints) -> None:
    for step in "12":
        flip(two.folder / step / "meta.json", 5)
    with pytest.raises(BadInput, match=r"checkpoint 2 .*meta\.json.*checkpoint 1 .*meta\.json"):
        two.restore(TEMPLATE)


def test_a_damaged_step_that_was_asked_for_is_not_replaced_by_another(two: Checkpoints) -> None:
    flip(two.folder / "2" / "meta.json", 5)
    with pytest.raises(BadInput, match=r"checkpoint 2 .* is damaged: meta\.json"):
        two.restore(TEMPLATE, step=2)


def test_a_step_that_is_not_there_is_answered_with_those_that_are(two: Checkpoints) -> None:
    with pytest.raises(BadInput, match=r"no checkpoint 5 in .*; there is 1, 2"):
        two.restore(TEMPLATE, step=5)


def test_a_folder_without_checkpoints_is_bad_input(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadInput, match="there is no checkpoint in"):
            Checkpoints(folder).restore(TEMPLATE)


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs coreutils")
def test_sha256sum_agrees_on_every_file(two: Checkpoints) -> None:
    def check() -> subprocess.CompletedProcess[str]:
        command = ["sha256sum", "-c", "--strict", "SHA256SUMS"]
        return subprocess.run(command, cwd=two.folder / "2", capture_output=True, text=True)

    assert check().stdout.count(": OK\n") == len(files(two.folder / "2")) - 1
    damaged = biggest(two.folder / "2/optimizer")
    flip(damaged, 77)
    assert f"{damaged.relative_to(two.folder / '2')}: FAILED" in check().stdout


# What does not fit is named.


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"blocks": [{"kernel": jnp.ones((3, 6))}]},
            r"2 does not fit: model\.blocks\.0\.kernel is float32\[3, 5\] in it and "
            r"float32\[3, 6\] in the state to restore",
        ),
        (
            {"blocks": [{"kernel": jnp.ones((3, 5), jnp.bfloat16)}]},
            r"model\.blocks\.0\.kernel is float32\[3, 5\] in it and bfloat16\[3, 5\]",
        ),
        (
            {"blocks": [{"bias": jnp.ones(3), "kernel": jnp.ones((3, 5))}]},
            r"model\.blocks\.0\.bias is missing in it and float32\[3\]",
        ),
        ({}, r"model\.blocks\.0\.kernel is float32\[3, 5\] in it and missing in the state"),
    ],
    ids=["shape", "dtype", "leaf", "nothing"],
)
def test_the_first_leaf_that_differs_is_named(
    two: Checkpoints, model: PyTree, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        two.restore({"model": model})


def test_an_item_that_was_not_saved_is_named(two: Checkpoints) -> None:
    with pytest.raises(BadInput, match=r"average\.count is missing in it"):
        two.restore({"average": {"count": jnp.int32(0)}})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"lr": 0.1}, r"item\.lr is float; only arrays"),
        ({"key": jax.random.key(0)}, r"item\.key is PRNGKeyArray; only arrays"),
        ({"x": np.zeros(2)}, r"item\.x is float64, which needs jax_enable_x64"),
        ({"a/b": jnp.ones(2)}, "distinct names without '/'"),
        ({"a.b": jnp.ones(2), "a": {"b": jnp.ones(2)}}, "distinct names"),
        ({"..": jnp.ones(2)}, "distinct names"),
    ],
)
def test_a_leaf_that_would_not_come_back_the_same_is_not_saved(
    tmp_path: Path, tree: PyTree, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        Checkpoints(tmp_path).save(1, {"item": tree}, {})
    assert files(tmp_path) == []


# Saving loses nothing.


def test_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (0, 9, 10, 11, 100):
        assert checkpoints.save(step, state(step), {}) == tmp_path / str(step)
    assert checkpoints.steps() == [10, 11, 100]
    assert checkpoints.restore(TEMPLATE).step == 100


def test_a_damaged_one_does_not_count_among_those_kept(two: Checkpoints) -> None:
    flip(biggest(two.folder / "2/model"), 3)
    two.save(3, state(3), {})
    assert two.steps() == [1, 2, 3]  # 1 is the second good one
    two.save(4, state(4), {})
    assert two.steps() == [3, 4]


def test_a_step_saved_again_is_replaced_and_newer_ones_stay(two: Checkpoints) -> None:
    two.save(1, state(40), {"again": True})
    assert two.restore(TEMPLATE, step=1).meta == {"again": True}
    assert_same_bits(two.restore(TEMPLATE, step=1).items, state(40))
    assert two.steps() == [1, 2]


def test_only_what_a_killed_save_left_is_swept_away(two: Checkpoints) -> None:
    (two.folder / "3.partial/new/model").mkdir(parents=True)
    (two.folder / "notes").mkdir()
    two.save(5, state(5), {})
    assert sorted(path.name for path in two.folder.iterdir()) == ["2", "5", "notes"]


def assert_nothing_changed(checkpoints: Checkpoints) -> None:
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["1", "2"]
    assert_same_bits(checkpoints.restore(TEMPLATE).items, state(2))


def test_a_file_the_system_will_not_write_is_one_sentence(
    two: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    big = {"model": {"w": jnp.ones(1_000_000)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        with pytest.raises(BadInput, match=r"checkpoint 3 cannot be saved in .*: File too large; "):
            two.save(3, big, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caplog.text == ""
    assert_nothing_changed(two)


def test_a_full_disk_is_one_sentence(two: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(BadInput, match="No space left on device; older ones are untouched"):
            two.save(3, state(3), {})
    assert_nothing_changed(two)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"cannot be saved in .*: Not a directory"):
        Checkpoints(tmp_path / "file" / "run").save(1, state(1), {})


def test_an_interrupted_or_mistaken_save_leaves_nothing(
    two: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(TypeError, match="not JSON serializable"):
        two.save(3, state(3), {"seed": np.int32(1)})
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        two.save(3, state(3), {})
    assert_nothing_changed(two)


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="keep must be at least 1"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(BadInput, match="0 or more, not -1"):
        Checkpoints(tmp_path).save(-1, state(1), {})


# Saves steps from argv[2] on, for ever, or with an event to die at in the third and last.
SAVE_ON = """
import itertools, os, pathlib, signal, sys
import numpy as np
from lechat_jax.checkpoint.training_state import Checkpoints

def die(event, args):
    if event == sys.argv[3] and str(args[0]).endswith(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

checkpoints = Checkpoints(pathlib.Path(sys.argv[1]))
start = int(sys.argv[2])
for step in range(start, start + 3) if sys.argv[3:] else itertools.count(start):
    if step == start + 2 and sys.argv[3:]:
        sys.addaudithook(die)
    arrays = {name: np.full(100_000, step, np.int32) for name in "abcdef"}
    checkpoints.save(step, {"item": arrays}, {"step": step})
    print(step, flush=True)
"""


def saving(folder: Path, start: int, *death: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SAVE_ON, str(folder), str(start), *death]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def assert_whole(checkpoints: Checkpoints) -> int:
    """The step restored, which none was refused for, and whose arrays all hold its number."""
    template = {name: jax.ShapeDtypeStruct((100_000,), jnp.int32) for name in "abcdef"}
    restored = checkpoints.restore({"item": template})
    assert restored.refused == ()
    assert restored.meta == {"step": restored.step}
    for array in restored.items["item"].values():
        assert np.array_equal(array, np.full(100_000, restored.step))
    return restored.step


@pytest.mark.parametrize(
    ("event", "path", "newest"),
    [
        ("os.mkdir", "3.partial", 2),
        ("open", "3.partial/new/meta.json", 2),  # Orbax is done
        ("open", "3.partial/new/SHA256SUMS", 2),
        ("os.rename", "3.partial/new", 2),
        ("os.rename", "checkpoints/1", 3),
        ("shutil.rmtree", "1.partial", 3),
    ],
)
def test_killed_at_this_point_it_has_a_whole_step_and_cleans_up_later(
    tmp_path: Path, event: str, path: str, newest: int
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with saving(checkpoints.folder, 1, event, path) as saver:
        assert saver.wait() == -signal.SIGKILL
    assert assert_whole(checkpoints) == newest
    checkpoints.save(9, state(9), {})
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [str(newest), "9"]


def test_killed_at_any_moment_it_has_a_whole_step(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    moments = random.Random(0)
    finished = 0
    for _ in range(3):
        with saving(tmp_path, finished + 1) as saver:
            assert saver.stdout is not None
            saver.stdout.readline()
            time.sleep(moments.uniform(0, 0.4))
            saver.kill()
            printed = saver.stdout.read().split()
        restored = assert_whole(checkpoints)
        assert restored >= int(printed[-1] if printed else finished + 1)
        finished = restored
