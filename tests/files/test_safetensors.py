"""Tensors come from their files as they are, and no damaged or foreign file is taken for one."""

import hashlib
import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from jaxtyping import Shaped
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from lechat_jax.errors import BadInput
from lechat_jax.files import safetensors
from lechat_jax.files.safetensors import TensorFiles, write_tensors

BF16 = np.dtype(ml_dtypes.bfloat16)
Arrays = dict[str, Shaped[np.ndarray, "..."]]


@pytest.fixture
def arrays() -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "b": rng.standard_normal((3, 5)).astype(BF16),
        "a": rng.standard_normal((2, 4, 3)).astype(np.float32),
        "c": rng.integers(-128, 127, 7, np.int8),
        "empty": np.zeros((0, 4), np.float16),
        "number": np.array(2.5, np.float16),
    }


def write(folder: Path, arrays: Arrays, shard_bytes: int | None = None) -> list[Path]:
    infos = [(name, array.dtype, array.shape) for name, array in arrays.items()]
    return write_tensors(
        folder,
        "model",
        infos,
        arrays.__getitem__,
        shard_bytes=shard_bytes,
        metadata={"format": "pt"},
    )


@pytest.mark.parametrize(("shard_bytes", "n_files"), [(None, 1), (126, 3), (1, 6)])
def test_what_is_written_is_read_again(
    arrays: Arrays, shard_bytes: int | None, n_files: int, tmp_path: Path
) -> None:
    paths = write(tmp_path, arrays, shard_bytes)
    assert len(paths) == n_files
    files = TensorFiles.open(tmp_path)
    assert set(files) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(files.read(name), array, strict=True)
        assert (files[name].shape, files[name].dtype) == (array.shape, array.dtype)
        assert files[name].nbytes == array.nbytes


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn),
        (torch.bfloat16, ml_dtypes.bfloat16),
        *((getattr(torch, n), n) for n in ("float16", "float32", "float64", "bool")),
        *((getattr(torch, n), n) for n in ("int8", "int16", "int32", "int64", "uint8")),
        *((getattr(torch, n), n) for n in ("uint16", "uint32", "uint64")),
    ],
    ids=str,
)
def test_every_type_that_pytorch_writes_is_read_in_every_bit(
    tmp_path: Path, theirs: torch.dtype, ours: Any
) -> None:
    width = torch.empty(0, dtype=theirs).element_size()
    raw = torch.arange(6 * width, dtype=torch.uint8) % 2 if theirs == torch.bool else None
    raw = torch.arange(77, 77 + 6 * width, dtype=torch.uint8) if raw is None else raw
    save_torch({"x": raw.view(theirs).reshape(2, 3)}, tmp_path / "model.safetensors")
    found = TensorFiles.open(tmp_path).read("x")
    assert (found.dtype, found.shape) == (np.dtype(ours), (2, 3))
    assert found.tobytes() == raw.numpy().tobytes()


def test_other_libraries_read_what_is_written(arrays: Arrays, tmp_path: Path) -> None:
    del arrays["b"]  # safetensors' numpy side has no bfloat16
    [path] = write(tmp_path, arrays)
    for name, array in load_file(path).items():
        np.testing.assert_array_equal(array, arrays[name], strict=True)
    n_header = int.from_bytes(path.read_bytes()[:8], "little")
    assert n_header % 8 == 0  # so a map of the file is aligned


def test_what_other_libraries_write_is_read(tmp_path: Path) -> None:
    x = torch.randn(4, 6).to(torch.bfloat16)
    save_torch({"x": x}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    read = TensorFiles.open(tmp_path).read("x")
    assert read.dtype == BF16
    np.testing.assert_array_equal(read.astype(np.float32), x.float().numpy())


def test_shards_are_named_and_listed_as_hugging_face_does(arrays: Arrays, tmp_path: Path) -> None:
    names = [path.name for path in write(tmp_path, arrays, shard_bytes=126)]
    assert names == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert json.loads((tmp_path / names[-1]).read_text()) == {
        "metadata": {"total_size": 135},
        "weight_map": {
            "b": names[0],
            "a": names[0],
            "c": names[1],
            "empty": names[1],
            "number": names[1],
        },
    }


def test_reading_copies_nothing(arrays: Arrays, tmp_path: Path) -> None:
    write(tmp_path, arrays)
    files = TensorFiles.open(tmp_path)
    view = files.read("a")
    assert isinstance(view.base, mmap.mmap)
    assert not view.flags.writeable
    files.release()
    np.testing.assert_array_equal(view, arrays["a"])


def test_tensors_come_in_the_order_of_the_disk(arrays: Arrays, tmp_path: Path) -> None:
    write(tmp_path, arrays)
    assert list(TensorFiles.open(tmp_path)) == list(arrays)


def test_a_tensor_of_many_slabs_is_checked_hashed_and_counted_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors, "PIECE", 256)
    monkeypatch.setattr(safetensors, "SLAB", 64)
    monkeypatch.setattr(safetensors, "SYNC", 600)
    x = np.arange(1000, dtype=np.float32).reshape(10, 100)
    seen, counts, digests = [], [], {}
    [path] = write_tensors(
        tmp_path,
        "x",
        [("x", np.dtype(np.float16), (100, 10))],
        lambda name: x.T,
        shard_bytes=None,
        metadata={},
        on_slab=lambda name, piece: seen.append(piece.copy()),
        on_bytes=counts.append,
        on_file=digests.__setitem__,
    )
    assert [len(slab) for slab in seen] == [32] * 31 + [8]
    np.testing.assert_array_equal(np.concatenate(seen), x.T.ravel().astype(np.float16))
    np.testing.assert_array_equal(TensorFiles.open(tmp_path, "x").read("x"), x.T)
    assert digests == {path: hashlib.sha256(path.read_bytes()).hexdigest()}
    assert sum(counts) == path.stat().st_size


def test_every_file_is_hashed(arrays: Arrays, tmp_path: Path) -> None:
    digests: dict[Path, str] = {}
    infos = [(name, array.dtype, array.shape) for name, array in arrays.items()]
    paths = write_tensors(
        tmp_path,
        "model",
        infos,
        arrays.__getitem__,
        shard_bytes=30,
        metadata={},
        on_file=digests.__setitem__,
    )
    assert digests == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"x has the shape \[3\] instead of \[4\]"):
        write_tensors(
            tmp_path,
            "model",
            [("x", np.dtype(np.int8), (4,))],
            lambda name: np.zeros(3, np.int8),
            shard_bytes=None,
            metadata={},
        )


def test_a_full_disk_is_one_sentence(arrays: Arrays, tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "model.safetensors").symlink_to(full)
    with pytest.raises(BadInput, match=r"cannot write .*: No space left on device"):
        write(tmp_path, arrays)


Damage = Callable[[Path], None]


def header(text: str, data: bytes = b"") -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode() + data


def put(content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(content)

    return damage


def cut(n: int) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:n])

    return damage


def append(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")


def remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


A = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "has neither model.safetensors nor model.safetensors.index.json"),
        (put(b""), "is empty; download it again"),
        (put(b"abc"), "is cut short at 3 bytes"),
        (cut(20), "is cut short at 20 bytes"),
        (cut(-1), r"is cut short at [\d,]+ bytes"),
        (append, "is not a valid safetensors file"),
        (put(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "a git-lfs pointer"),
        (put(b"\n<!DOCTYPE html><html>404</html>"), "a web page"),
        (put(b"<html>404</html>"), "a web page"),
        (put(b'{"error":"Repository not found"}'), "a JSON text"),
        (put(b"PK\x03\x04" + bytes(99)), "a PyTorch file"),
        (put(b"\xff" * 64), "not a valid safetensors file"),
        (put(header("[]")), "not a valid safetensors file"),
        (put(header(f'{{"a":{A},"b":{A}}}', bytes(4))), "not a valid safetensors file"),
        (put(header(f'{{"a":{A},"a":{A}}}', bytes(4))), "has the key a twice"),
        (put(header(f'{{"a":{A}}}'.replace("[1]", "[2]"), bytes(4))), "not a valid safetensors"),
        (
            put(header('{"a":{"dtype":"F8_E5M2","shape":[4],"data_offsets":[0,4]}}', bytes(4))),
            r"a in .*model.safetensors is F8_E5M2, which is not read here",
        ),
    ],
)
def test_a_damaged_or_foreign_file_is_named(
    damage: Damage, message: str, arrays: Arrays, tmp_path: Path
) -> None:
    write(tmp_path, arrays)
    damage(tmp_path)
    with pytest.raises(BadInput, match=message) as error:
        TensorFiles.open(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of two shards: `a` in the first, `b` in the second."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    write(folder, {name: np.ones(2, np.float32) for name in "ab"}, shard_bytes=1)
    return folder


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def index(folder: Path, weight_map: object) -> None:
    text = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        "\\\\host\\share\\model.safetensors",
        "./model.safetensors",
        "..",
        "",
        "model.safetensors\0",
        "model.bin",
        3,
        None,
        ["model.safetensors"],
    ],
)
def test_a_shard_that_is_no_plain_name_is_refused(sharded: Path, shard: object) -> None:
    save_file({"b": np.ones(2, np.float32)}, sharded.parent / "model.safetensors")
    index(sharded, {"a": FIRST, "b": shard})
    with pytest.raises(BadInput, match="which is no file of its folder"):
        TensorFiles.open(sharded)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        ({"a": FIRST, "b": "other.safetensors"}, r"other.safetensors is missing; download"),
        ({"a": FIRST}, None),
        ({"a": FIRST, "b": SECOND, "c": SECOND}, f"{SECOND} lacks c, which"),
        ({"a": SECOND, "b": FIRST}, f"{SECOND} lacks a, which"),
        ({"a": FIRST, "b": FIRST}, f"{FIRST} lacks b, which"),
    ],
)
def test_an_index_and_its_shards_must_agree(
    sharded: Path, weight_map: object, message: str | None
) -> None:
    index(sharded, weight_map)
    if message is None:  # a shard that the index does not name is not looked for
        assert list(TensorFiles.open(sharded)) == ["a"]
        return
    with pytest.raises(BadInput, match=message):
        TensorFiles.open(sharded)


def test_a_tensor_that_the_index_does_not_list_is_refused(sharded: Path) -> None:
    save_file({"b": np.ones(2, np.float32), "c": np.ones(1, np.float32)}, sharded / SECOND)
    with pytest.raises(BadInput, match=f"{SECOND} has c, which .* does not list"):
        TensorFiles.open(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_file({"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}, sharded / SECOND)
    with pytest.raises(BadInput, match=f"a is in two shards, {FIRST} and {SECOND}"):
        TensorFiles.open(sharded)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"weight_map": {}, "weight_map": {}}'])
def test_an_index_that_is_no_json_object_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BadInput, match=r"index\.json (is not|has the key)"):
        TensorFiles.open(sharded)


def test_a_link_out_of_the_folder_is_refused(sharded: Path) -> None:
    (sharded / SECOND).rename(sharded.parent / SECOND)
    (sharded / SECOND).symlink_to(f"../{SECOND}")
    with pytest.raises(BadInput, match=f"{SECOND} is a link to .*, outside its folder"):
        TensorFiles.open(sharded)


@pytest.mark.parametrize(("home", "store"), [("versions", "blobs"), ("snapshots", "secrets")])
def test_links_out_of_what_is_no_cache_of_the_hub_are_refused(
    sharded: Path, home: str, store: str
) -> None:
    folder = sharded.parent / home / "main"
    outside = sharded.parent / store
    folder.parent.mkdir()
    outside.mkdir()
    sharded.rename(folder)
    (folder / SECOND).rename(outside / SECOND)
    (folder / SECOND).symlink_to(f"../../{store}/{SECOND}")
    with pytest.raises(BadInput, match=f"{SECOND} is a link to .*, outside its folder"):
        TensorFiles.open(folder)


def test_the_links_of_the_hubs_cache_are_followed(sharded: Path) -> None:
    snapshot = sharded.parent / "models--a--b" / "snapshots" / "0123abcd"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in sharded.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert set(TensorFiles.open(snapshot)) == {"a", "b"}


def test_other_weights_in_the_folder_are_not_looked_at(sharded: Path) -> None:
    save_file({"a": np.zeros(9, np.float32)}, sharded / "consolidated.safetensors")
    (sharded / "junk.safetensors").write_bytes(b"junk")
    files = TensorFiles.open(sharded)
    assert {name: info.shape for name, info in files.items()} == {"a": (2,), "b": (2,)}
    assert set(TensorFiles.open(sharded, "consolidated")) == {"a"}
