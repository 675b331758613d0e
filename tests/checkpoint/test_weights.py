"""Weights on disk come into JAX as they are, a tensor at a time, or are refused by name."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Shaped
from safetensors.numpy import load_file, save_file

from lechat_jax.checkpoint import weights as module
from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.checkpoint.weights import load_weights, save_weights
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.files.checksums import write_manifest
from lechat_jax.files.safetensors import TensorFiles, write_tensors
from lechat_jax.formats.folder import fault_of, kind_of
from lechat_jax.model.binding import Weights, weights_of
from lechat_jax.quantize.scheme import Form, quantize_weights
from lechat_jax.tokenizer.tokenizer import Tokenizer
from tests.support.models import random_model

ROOT = Path(__file__).parents[2]
NAMES = [
    *("blocks.0.attn.k.kernel", "blocks.0.attn.o.kernel", "blocks.0.attn.q.kernel"),
    *("blocks.0.attn.v.kernel", "blocks.0.attn_norm.scale", "blocks.0.mlp.down.kernel"),
    *("blocks.0.mlp.gate.kernel", "blocks.0.mlp.up.kernel", "blocks.0.mlp_norm.scale"),
    *("embed.kernel", "head.kernel", "norm.scale"),
]


@pytest.fixture(scope="module")
def config(tiny: MistralConfig) -> MistralConfig:
    return dataclasses.replace(tiny, n_layers=1)


@pytest.fixture(scope="module")
def weights(config: MistralConfig) -> Weights:
    return weights_of(random_model(config))


@pytest.fixture
def folder(tmp_path: Path, config: MistralConfig, weights: Weights) -> Path:
    save_weights(tmp_path / "model", config, weights, None)
    return tmp_path / "model"


def bits(weights: Weights) -> dict[str, bytes]:
    return {name: np.asarray(leaf).tobytes() for name, leaf in weights.items()}


# --- there and back ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard_bytes", [None, 20_000])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_loaded_in_every_bit(
    tied: bool, shard_bytes: int | None, dtype: str, config: MistralConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, tied_embeddings=tied, sliding_window=(None,))
    weights = weights_of(random_model(config, dtype))
    save_weights(tmp_path / "m", config, weights, None, shard_bytes=shard_bytes)
    assert (tmp_path / "m" / "model.safetensors.index.json").exists() == (shard_bytes is not None)
    same, loaded = load_weights(tmp_path / "m")
    assert same == config
    assert list(loaded) == [name for name in NAMES if not (tied and name == "head.kernel")]
    assert bits(loaded) == bits(weights)
    assert {str(leaf.dtype) for leaf in loaded.values()} == {dtype}
    # Committed arrays would compile each jitted function anew.
    assert not any(leaf.committed for leaf in loaded.values())


def test_the_folder_is_what_other_programs_can_read(
    folder: Path, config: MistralConfig, weights: Weights
) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        *("SHA256SUMS", "config.json", "model.safetensors"),
    ]
    assert json.loads((folder / "config.json").read_text()) == {
        "dim": 40,
        "n_layers": 1,
        "n_heads": 6,
        "n_kv_heads": 2,
        "head_dim": 8,
        "hidden_dim": 56,
        "vocab_size": 97,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
        "sliding_window": 7,
        "tied_embeddings": False,
    }
    for name, array in load_file(folder / "model.safetensors").items():
        np.testing.assert_array_equal(array, weights[name], strict=True)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True)


def test_the_tokenizer_goes_with_the_weights(
    config: MistralConfig, weights: Weights, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.mistral_v1()
    save_weights(tmp_path / "m", config, weights, tokenizer.path)
    assert Tokenizer.from_file(tmp_path / "m" / "tokenizer.model.v1").sha256 == tokenizer.sha256
    load_weights(tmp_path / "m")  # and is among what is checked


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_are_cast_on_the_way(folder: Path, weights: Weights, dtype: str) -> None:
    _, loaded = load_weights(folder, dtype=dtype)
    assert bits(loaded) == bits({name: leaf.astype(dtype) for name, leaf in weights.items()})


@pytest.mark.parametrize("piece", [4, 100, 4096])
def test_a_tensor_that_comes_in_pieces_is_whole(
    folder: Path, weights: Weights, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of one row, of some rows with a rest, and of nearly all."""
    monkeypatch.setattr(module, "PIECE", piece)
    assert bits(load_weights(folder)[1]) == bits(weights)
    _, cast = load_weights(folder, dtype="float16")
    assert bits(cast) == bits({name: leaf.astype("float16") for name, leaf in weights.items()})


def test_double_precision_needs_to_be_enabled(folder: Path, weights: Weights) -> None:
    with pytest.raises(
        BadInput, match=r"^\S+ in .*model.safetensors is float64, which needs jax_enable_x64$"
    ):
        load_weights(folder, dtype="float64")
    with jax.enable_x64(True):
        _, loaded = load_weights(folder, dtype="float64")
        assert loaded["norm.scale"].dtype == jnp.float64
        np.testing.assert_array_equal(loaded["norm.scale"], np.float64(weights["norm.scale"]))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_number_too_large_for_the_type_is_refused(
    tmp_path: Path, config: MistralConfig, weights: Weights, stored: str
) -> None:
    cast = {name: leaf.astype(stored) for name, leaf in weights.items()}
    cast["norm.scale"] = cast["norm.scale"].at[3].set(1e5)
    save_weights(tmp_path / "m", config, cast, None)
    load_weights(tmp_path / "m", dtype="bfloat16")
    with pytest.raises(BadInput, match=r"norm.scale in .* has numbers too large for float16"):
        load_weights(tmp_path / "m", dtype="float16")


# --- int8 ---


@pytest.fixture(scope="module")
def in_int8(weights: Weights) -> Weights:
    return quantize_weights(dict(weights))


@pytest.fixture
def int8_folder(tmp_path: Path, config: MistralConfig, in_int8: Weights) -> Path:
    save_weights(tmp_path / "int8", config, in_int8, None)
    return tmp_path / "int8"


def test_int8_is_saved_with_its_scales_and_the_config_says_so(
    int8_folder: Path, config: MistralConfig, in_int8: Weights
) -> None:
    fields = json.loads((int8_folder / "config.json").read_text())
    assert fields == config.to_dict() | {"quantization": {"format": "int8"}}
    stored = load_file(int8_folder / "model.safetensors")
    kernels = [name for name in NAMES if name.endswith("kernel")]
    assert {str(stored[name].dtype) for name in kernels} == {"int8"}
    assert sorted(stored) == sorted([*NAMES, *(f"{name}.scale" for name in kernels)])
    for name, array in stored.items():
        np.testing.assert_array_equal(array, in_int8[name], strict=True)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_an_int8_folder_is_loaded_as_it_is(
    int8_folder: Path, config: MistralConfig, in_int8: Weights, quantize: Literal["int8"] | None
) -> None:
    assert kind_of(int8_folder) == "lechat"
    same, loaded = load_weights(int8_folder, quantize=quantize)
    assert same == config
    assert bits(loaded) == bits(in_int8)
    _, loaded = load_weights(int8_folder, dtype="bfloat16", quantize=quantize)
    for name, leaf in loaded.items():  # the scales of the kernels stay what they are
        is_norm = name.endswith("norm.scale")
        assert leaf.dtype == (jnp.bfloat16 if is_norm else in_int8[name].dtype), name


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_weights_become_int8_while_they_are_read(
    tmp_path: Path, config: MistralConfig, weights: Weights, stored: str
) -> None:
    cast = {name: leaf.astype(stored) for name, leaf in weights.items()}
    save_weights(tmp_path / "m", config, cast, None)
    _, loaded = load_weights(tmp_path / "m", dtype="float16", quantize="int8")
    expected = quantize_weights(dict(cast))
    assert list(loaded) == list(module.weight_shapes(config, Form("int8")))
    assert bits(loaded) == bits(
        {n: x.astype("float16") if n.endswith("norm.scale") else x for n, x in expected.items()}
    )


def test_int8_is_spread_over_devices(folder: Path, config: MistralConfig, in_int8: Weights) -> None:
    sharding = split_along_the_width(config)
    _, loaded = load_weights(folder, shardings=sharding, quantize="int8")
    assert bits(loaded) == bits(in_int8)
    assert len(loaded["head.kernel"].addressable_shards) == 8
    assert {shard.data.shape for shard in loaded["head.kernel"].addressable_shards} == {(97, 5)}


@pytest.mark.parametrize(
    "quantization",
    [
        "int8",
        {"format": "int4"},
        {},
        {"format": "int4", "group": 7},
        {"format": "int4", "group": 9},
    ],
)
def test_another_quantization_is_refused(int8_folder: Path, quantization: object) -> None:
    path = int8_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization": quantization}))
    with pytest.raises(BadInput, match=r"config.json says quantization .*only int8 and int4 as"):
        load_weights(int8_folder)


def test_a_folder_that_is_not_what_its_quantization_says_is_refused(
    folder: Path, int8_folder: Path
) -> None:
    for one, other in ((folder, int8_folder), (int8_folder, folder)):
        (one / "config.json").rename(other / "theirs")
    for one in (folder, int8_folder):
        (one / "theirs").rename(one / "config.json")
        write_manifest(one)
    with pytest.raises(BadInput, match=r"embed\.kernel\.scale is missing.* embed\.kernel is float"):
        load_weights(folder)
    with pytest.raises(BadInput, match=r"embed\.kernel\.scale is left over.* head\.kernel is int8"):
        load_weights(int8_folder)


def test_memory_is_told_before_anything_is_read(
    folder: Path, int8_folder: Path, weights: Weights, in_int8: Weights
) -> None:
    n_norms, n_all = 3 * 40, sum(leaf.size for leaf in weights.values())
    n_int8 = sum(leaf.nbytes for name, leaf in in_int8.items() if "norm" not in name)
    cases: tuple[tuple[SavedModel, str | None, Literal["int8"] | None, int], ...] = (
        (SavedModel.open(folder), None, None, 4 * n_all),
        (SavedModel.open(folder), "bfloat16", None, 2 * n_all),
        (SavedModel.open(folder), None, "int8", n_int8 + 4 * n_norms),
        (SavedModel.open(folder), "bfloat16", "int8", n_int8 + 2 * n_norms),
        (SavedModel.open(int8_folder), "bfloat16", None, n_int8 + 2 * n_norms),
        (SavedModel.open(int8_folder), "float32", "int8", n_int8 + 4 * n_norms),
    )
    for trained, dtype, quantize, expected in cases:
        assert trained.weights_bytes(dtype, quantize) == expected
        loaded = trained.load(dtype, quantize).weights
        assert sum(leaf.nbytes for leaf in loaded.values()) == expected


# --- where they go ---


def split_along_the_width(config: MistralConfig) -> Callable[[str], jax.NamedSharding]:
    """Every tensor in eight parts along its axis of 40, the width of the model."""
    mesh = jax.make_mesh((8,), ("model",))
    shapes = module.weight_shapes(config)

    def sharding(name: str) -> jax.NamedSharding:
        shape = shapes[name].shape if name in shapes else ()  # a scale goes everywhere
        axes = ["model" if size == config.dim else None for size in shape]
        return jax.NamedSharding(mesh, jax.P(*axes))

    return sharding


def test_each_device_gets_its_slice_and_nothing_whole_is_made(
    folder: Path, config: MistralConfig, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    copy = module._copy

    def spy(
        view: Shaped[np.ndarray, "..."], dtype: np.dtype, release: Callable[[], None]
    ) -> Shaped[np.ndarray, "..."]:
        copied.append(view.size)
        return copy(view, dtype, release)

    monkeypatch.setattr(module, "_copy", spy)
    sharding = split_along_the_width(config)
    _, loaded = load_weights(folder, dtype="bfloat16", shardings=sharding)
    for name, leaf in loaded.items():
        whole = np.asarray(weights[name].astype(jnp.bfloat16))
        assert leaf.sharding == sharding(name)
        assert len(leaf.addressable_shards) == 8
        for shard in leaf.addressable_shards:
            assert shard.data.size == whole.size // 8
            np.testing.assert_array_equal(shard.data, whole[shard.index])
    assert sorted(copied) == sorted(leaf.size // 8 for leaf in weights.values() for _ in range(8))


def test_shardings_can_be_given_in_three_ways(
    folder: Path, config: MistralConfig, weights: Weights
) -> None:
    sharding = split_along_the_width(config)
    everywhere = jax.NamedSharding(jax.make_mesh((8,), ("model",)), jax.P())
    for asked, expected in (
        (sharding, sharding),
        ({name: sharding(name) for name in NAMES}, sharding),
        (everywhere, lambda _: everywhere),
    ):
        _, loaded = load_weights(folder, shardings=asked)
        assert {name: leaf.sharding for name, leaf in loaded.items()} == {
            name: expected(name) for name in NAMES
        }
        assert bits(loaded) == bits(weights)


def aligned(folder: Path, config: MistralConfig, weights: Weights) -> None:
    """Rewrites the file so that its tensors could be used by JAX where they lie."""
    infos = [(name, np.dtype(leaf.dtype), leaf.shape) for name, leaf in weights.items()]
    for pad in range(64):
        write_tensors(
            folder,
            "model",
            infos,
            lambda name: np.asarray(weights[name]),
            shard_bytes=None,
            metadata={"pad": "x" * pad},
        )
        if TensorFiles.open(folder)["embed.kernel"].start % 64 == 0:
            return write_manifest(folder)
    raise AssertionError("no padding aligns it")


def test_no_array_shares_memory_with_the_file(
    folder: Path, config: MistralConfig, weights: Weights
) -> None:
    aligned(folder, config, weights)
    _, loaded = load_weights(folder)
    everywhere = jax.NamedSharding(jax.make_mesh((8,), ("model",)), jax.P())
    _, spread = load_weights(folder, shardings=everywhere)
    file = TensorFiles.open(folder)
    shared = jax.device_put(file.read("embed.kernel"))
    with (folder / "model.safetensors").open("r+b") as out:
        out.seek(file["embed.kernel"].start)
        out.write(bytes(file["embed.kernel"].nbytes))
    assert not np.asarray(shared).any(), "JAX no longer adopts a map: this test shows nothing"
    assert bits(loaded) == bits(weights) == bits(spread)


PEAK = """
import sys, threading, time
from pathlib import Path
import jax, numpy as np
from lechat_jax.files.safetensors import TensorFiles
from lechat_jax.checkpoint.weights import load_weights

def anonymous():
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

def watch():
    while not done.is_set():
        seen.append(anonymous())
        time.sleep(1e-3)

how, folder = sys.argv[1], Path(sys.argv[2])
jax.block_until_ready(jax.device_put(np.zeros(3)))
done, seen = threading.Event(), [anonymous()]
watcher = threading.Thread(target=watch)
watcher.start()
if how != "all at once":
    quantize = "int8" if how == "int8" else None
    _, weights = load_weights(folder, dtype="float32", quantize=quantize)
else:
    files = TensorFiles.open(folder)
    arrays = {name: files.read(name).astype("float32") for name in files}
    weights = jax.block_until_ready(jax.device_put(arrays))
done.set()
watcher.join()
print((max(seen) - seen[0]) / sum(leaf.nbytes for leaf in weights.values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc/self/status")
def test_loading_takes_the_memory_of_one_model(config: MistralConfig, tmp_path: Path) -> None:
    """182 MB of float32, cast from bfloat16; the largest tensor is a quarter of it.

    In int8 the pieces in float32 count for more than the tensors.
    """
    config = dataclasses.replace(config, dim=512, hidden_dim=4096, n_layers=2, vocab_size=24_000)
    shapes = module.weight_shapes(config)
    ones = {name: jnp.ones(leaf.shape, jnp.bfloat16) for name, leaf in shapes.items()}
    save_weights(tmp_path / "m", config, ones, None)

    def peak(how: str) -> float:
        command = [sys.executable, "-c", PEAK, how, str(tmp_path / "m")]
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
        assert run.returncode == 0, run.stderr
        return float(run.stdout)

    assert 0.9 < peak("lechat") < 1.4
    assert 0.9 < peak("int8") < 1.8  # a float model would be 4
    assert peak("all at once") > 1.7


# --- what is refused ---


def test_a_flipped_bit_is_refused_unless_nobody_looks(folder: Path, weights: Weights) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"model is not as it was saved: model\.safetensors is not"):
        load_weights(folder)
    _, loaded = load_weights(folder, check=False)
    assert bits(loaded) != bits(weights)


@pytest.mark.parametrize("how", ["as it is", "cast", "quantised", "spread", "by name"])
def test_a_flipped_bit_is_refused_however_weights_are_read(
    folder: Path, config: MistralConfig, how: str
) -> None:
    sharding = split_along_the_width(config)
    asked: dict[str, Any] = {
        "as it is": {},
        "cast": {"dtype": "bfloat16"},
        "quantised": {"quantize": "int8"},
        "spread": {"shardings": sharding},
        "by name": {"shardings": {name: sharding(name) for name in NAMES}, "dtype": "float16"},
    }[how]
    load_weights(folder, **asked)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(BadInput, match=r"model\.safetensors is not what was saved .*SHA-256"):
        load_weights(folder, **asked)


@pytest.mark.parametrize(
    ("name", "is_read"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        *((name, False) for name in ("NOTES.md", "my tokenizer.model", "config.json.bak")),
    ],
)
def test_only_what_would_be_read_of_a_folder_must_have_a_checksum(
    folder: Path, name: str, is_read: bool
) -> None:
    (folder / name).write_bytes(b"foreign")
    if not is_read:
        load_weights(folder)
        return
    with pytest.raises(BadInput, match=f"{re.escape(name)} is not in SHA256SUMS"):
        load_weights(folder)


def test_a_folder_without_checksums_is_refused_unless_nobody_looks(
    folder: Path, weights: Weights
) -> None:
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(BadInput, match="SHA256SUMS is missing"):
        load_weights(folder)
    assert bits(load_weights(folder, check=False)[1]) == bits(weights)


@pytest.mark.parametrize(
    ("saved", "added", "reason"),
    [
        (False, "tokenizer.model.v3", None),
        (False, "tekken.json", None),
        (False, "tokenizer_config.json", None),
        (True, "tekken.json", "tekken.json is not in SHA256SUMS"),  # it would be preferred
        (True, "tokenizer.model.v3", "tokenizer.model.v3 is not in SHA256SUMS"),
        (True, "added_tokens.json", "added_tokens.json is not in SHA256SUMS"),
        (True, "generation_config.json", "generation_config.json is not in SHA256SUMS"),
        (True, ".DS_Store", None),
        (True, "._tokenizer.model.v1", None),
        (True, "._model.safetensors", None),
        (True, "Thumbs.db", None),
        (True, "a note.txt", None),
        (True, "model.safetensors.index.json", "index.json is not in SHA256SUMS"),
        (True, "model-00002-of-00002.safetensors", "00002.safetensors is not in SHA256SUMS"),
    ],
)
def test_a_file_may_be_added_unless_it_would_change_what_is_read(
    saved: bool, added: str, reason: str | None, config: MistralConfig, tmp_path: Path
) -> None:
    """A tokenizer may be put in where none was saved, as the commands advise it."""
    tokenizer = Tokenizer.mistral_v1().path if saved else None
    save_weights(tmp_path / "model", config, weights_of(random_model(config)), tokenizer)
    assert fault_of(tmp_path / "model") is None
    (tmp_path / "model" / added).touch()
    found = fault_of(tmp_path / "model")
    assert found is None if reason is None else found is not None and found.endswith(reason)


def test_every_tensor_that_does_not_fit_is_named(folder: Path, weights: Weights) -> None:
    arrays = {name: np.asarray(leaf) for name, leaf in weights.items()}
    del arrays["head.kernel"], arrays["blocks.0.attn.q.kernel"]
    arrays["blocks.1.attn.q.kernel"] = arrays["head.bias"] = np.zeros(2, np.float32)
    arrays["blocks.0.mlp.up.kernel"] = arrays["blocks.0.mlp.up.kernel"].T.copy()
    arrays["norm.scale"] = arrays["norm.scale"].astype(np.int8)
    save_file(arrays, folder / "model.safetensors")
    write_manifest(folder)
    with pytest.raises(BadInput) as error:
        load_weights(folder)
    assert str(error.value) == (
        f"the weights of {folder} are not those of its config.json: "
        "blocks.0.attn.q.kernel is missing, head.kernel is missing, "
        "blocks.1.attn.q.kernel is left over, head.bias is left over, "
        "blocks.0.mlp.up.kernel is [40, 56] instead of [56, 40], norm.scale is int8"
    )


def test_a_config_with_a_fault_is_named(folder: Path) -> None:
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    for change, reason in (
        ({"quantisation": "int8"}, "model config has unknown fields: quantisation"),
        ({"head_dim": 7}, "head_dim must be even"),
    ):
        path.write_text(json.dumps(fields | change))
        with pytest.raises(BadInput, match=rf"config\.json is not the config of a model: {reason}"):
            load_weights(folder)


def test_nothing_is_saved_over_what_is_there(
    folder: Path, config: MistralConfig, weights: Weights
) -> None:
    with pytest.raises(BadInput, match=r"model exists already; choose another folder$"):
        save_weights(folder, config, weights, None)
    load_weights(folder)


def test_a_save_that_fails_leaves_nothing(
    tmp_path: Path, config: MistralConfig, weights: Weights
) -> None:
    (tmp_path / "file").touch()
    inside = tmp_path / "file" / "m"
    for path, cause in (
        (tmp_path / "m", f"cannot read the tokenizer {tmp_path / 'gone'}: No such file"),
        (inside, f"cannot write {inside}: .*Not a directory"),
    ):
        with pytest.raises(BadInput, match=cause):
            save_weights(path, config, weights, tmp_path / "gone")
    with pytest.raises(BadInput, match=r"norm\.scale is missing"):
        save_weights(tmp_path / "m", config, {k: weights[k] for k in NAMES[:-1]}, None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def folder_with(tmp_path: Path, name: str, files: dict[str, str]) -> Path:
    folder = tmp_path / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file, text in files.items():
        (folder / file).write_text(text)
    return folder


def test_a_folder_is_a_run_or_has_weights(folder: Path, tmp_path: Path) -> None:
    assert kind_of(folder) == "lechat"
    run = folder_with(tmp_path, "run", {"config.json": '{"model": {}, "train": {}}'})
    assert kind_of(run) == "run"
    with pytest.raises(BadInput, match="is a training run, whose weights are in its checkpoints"):
        load_weights(run)


def test_another_format_is_told_by_its_config_and_its_weights(tmp_path: Path) -> None:
    theirs = {"config.json": '{"model_type": "mistral", "hidden_size": 8}'}
    own, weights = {"params.json": '{"dim": 8}'}, {"model.safetensors": ""}
    for files, kind in (
        (theirs, "hf"),
        (theirs | own, "mistral"),
        (theirs | own | weights, "hf"),
        (own | weights, "mistral"),
    ):
        assert kind_of(folder_with(tmp_path, "7B v0.1", files)) == kind
    (tmp_path / "model.gguf").touch()
    assert kind_of(tmp_path / "model.gguf") == "gguf"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds no model: it is no training run, and has neither a config\.json of lecha"),
        ({"config.json": "{}"}, r"nor Mistral's params\.json$"),
        ({"config.json": '{"model": {}}'}, r"holds no model"),
        ({"config.json": "{"}, r"config\.json is not valid JSON"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        kind_of(folder_with(tmp_path, "some", files))


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nowhere is not there$"):
        kind_of(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(BadInput, match=r"model\.safetensors is a file; name its folder$"):
        kind_of(tmp_path / "model.safetensors")
