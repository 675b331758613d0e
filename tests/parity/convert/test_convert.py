"""Weights go from any format to any other and back, byte for byte, or nothing is written."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lechat_jax.checkpoint.run import Run
from lechat_jax.checkpoint.training_state import Checkpoints
from lechat_jax.checkpoint.weights import load_weights
from lechat_jax.config import Llama4Scaling, MistralConfig, Yarn
from lechat_jax.errors import BadInput
from lechat_jax.files.safetensors import TensorFiles
from lechat_jax.formats.names import FORMATS, Format, names
from lechat_jax.tokenizer.tokenizer import Tokenizer
from parity.architectures import ARCHITECTURES, SMALL_MIXTURE
from parity.convert import command as module
from parity.convert.command import main
from parity.convert.finite import is_finite
from parity.convert.open_source import open_source
from parity.make_checkpoint import main as make
from tests.parity.checkpoints import (
    BF16,
    Weights,
    assert_equal,
    convert,
    random_weights,
    spoil,
    write_torch,
)

DTYPES = (BF16, np.dtype(np.float16), np.dtype(np.float32))


@pytest.fixture
def weights(tiny: MistralConfig) -> Weights:
    return random_weights(tiny)


@pytest.fixture
def start(tiny: MistralConfig, weights: Weights, tmp_path: Path) -> Path:
    return write_torch(tmp_path / "start", tiny, weights)


@pytest.fixture
def hf(start: Path, tmp_path: Path) -> Path:
    return convert(start, tmp_path / "hf", "hf")


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_any_format_leads_to_any_other(
    first: Format, second: Format, start: Path, weights: Weights, tiny: MistralConfig
) -> None:
    one = convert(start, start.parent / "one", first)
    two = convert(one, start.parent / "two", second)
    for folder, fmt in ((one, first), (two, second)):
        assert open_source(folder).format == fmt
        assert open_source(folder).config == tiny
        assert_equal(folder, weights)


# Fields, not configs: those would be type-checked while they are drawn, by lot.
MODELS = st.fixed_dictionaries(
    {
        "dim": st.integers(1, 9),
        "n_layers": st.integers(1, 2),
        "group": st.integers(1, 3),
        "n_kv_heads": st.integers(1, 3),
        "head_dim": st.sampled_from([2, 4, 6]),
        "hidden_dim": st.integers(1, 9),
        "vocab_size": st.integers(1, 9),
        "norm_eps": st.sampled_from([1e-5, 1e-6]),
        "rope_theta": st.sampled_from([1e4, 1e6]),
        "sliding_window": st.sampled_from([None, 1, 4096]),
        "tied_embeddings": st.booleans(),
        "yarn": st.sampled_from([None, Yarn(16.0, 16384, 32.0, 1.0, apply_scale=False)]),
        "llama_4_scaling": st.sampled_from([None, Llama4Scaling(0.1, 16384)]),
    }
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=MODELS,
    path=st.permutations(FORMATS),
    dtype=st.sampled_from(DTYPES),
    shard_gb=st.sampled_from(["0", "1e-7", "5"]),
)
def test_every_model_survives_a_journey_through_all_formats(
    fields: dict[str, Any],
    path: list[Format],
    dtype: np.dtype,
    shard_gb: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    n_heads = fields["group"] * fields["n_kv_heads"]
    config = MistralConfig(
        n_heads=n_heads, **{name: value for name, value in fields.items() if name != "group"}
    )
    folder = tmp_path_factory.mktemp("journey")
    weights = random_weights(config, dtype)
    at = write_torch(folder / "start", config, weights)
    for fmt in path:
        at = convert(at, folder / fmt, fmt, "--shard-gb", shard_gb)
        assert_equal(at, weights)
        assert open_source(at).config == config
    shutil.rmtree(folder)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", ["50GB", "20KB"])
def test_transformers_own_files_are_read_and_ours_load_to_the_same_logits(
    tied: bool, shards: str, tmp_path: Path
) -> None:
    words = transformers.MistralConfig(
        vocab_size=97,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=7,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    theirs = transformers.MistralForCausalLM(words).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shards)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == (shards == "20KB")
    lechat = convert(tmp_path / "theirs", tmp_path / "lechat", "lechat")
    mistral = convert(lechat, tmp_path / "mistral", "mistral")
    ours = convert(mistral, tmp_path / "ours", "hf", "--shard-gb", "2e-5")
    loaded, info = cast(
        tuple[Any, dict[str, Any]],
        transformers.AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True),
    )
    assert not any(info.values()), info
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected, found = theirs(ids).logits, loaded.eval()(ids).logits
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    a, b = (TensorFiles.open(folder) for folder in (tmp_path / "theirs", ours))
    assert set(a) == set(b)
    assert all(a.read(key).tobytes() == b.read(key).tobytes() for key in a)


@pytest.mark.parametrize("window", [None, 7, (7, None, 7)])
def test_windows_reach_transformers(
    window: int | None | tuple[int | None, ...], tiny: MistralConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny, sliding_window=window)
    start = write_torch(tmp_path / "start", config, random_weights(config))
    hf = convert(start, tmp_path / "hf", "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(hf)
    assert model.dtype == torch.bfloat16
    kind = "Ministral" if isinstance(window, tuple) else "Mistral"
    assert type(model).__name__ == f"{kind}ForCausalLM"
    seen = [getattr(layer.self_attn, "sliding_window", window) for layer in model.model.layers]
    assert seen == list(config.windows)
    assert open_source(hf).config == config


@pytest.mark.parametrize("kind", ["ministral-3", "devstral-2"])
def test_a_stretched_model_reaches_transformers(kind: str, tmp_path: Path) -> None:
    config = ARCHITECTURES[kind]
    weights = random_weights(config)
    start = write_torch(tmp_path / "start", config, weights)
    hf = convert(start, tmp_path / "hf", "hf")
    loaded, info = cast(
        tuple[Any, dict[str, Any]],
        transformers.AutoModelForCausalLM.from_pretrained(hf, output_loading_info=True),
    )
    assert not any(info.values()), info
    assert type(loaded).__name__ == "Ministral3ForCausalLM"
    state = loaded.state_dict()
    for ours, theirs in names(config, "hf").items():
        bits = state[theirs].view(torch.int16).numpy().tobytes()
        assert bits == weights[ours].tobytes(), theirs
    lechat = convert(hf, tmp_path / "int8", "lechat", "--quantize", "int8")
    assert open_source(lechat, dequantize=True).config == config
    assert load_weights(lechat)[0] == config


def test_consolidated_pickles_are_read(start: Path, weights: Weights, tmp_path: Path) -> None:
    mistral = convert(start, tmp_path / "mistral", "mistral")
    files = TensorFiles.open(mistral, "consolidated")
    state = {
        key: torch.from_numpy(files.read(key).view(np.int16).copy()).view(torch.bfloat16)
        for key in files
    }
    torch.save(state, mistral / "consolidated.00.pth")
    (mistral / "consolidated.safetensors").unlink()
    assert_equal(mistral, weights)
    assert "consolidated.00.pth" in open_source(mistral).where("embed.kernel")


def test_of_two_copies_one_is_read_and_it_says_so(
    start: Path, weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mistral = convert(start, tmp_path / "mistral", "mistral")
    (mistral / "consolidated.00.pth").write_bytes(b"junk")
    assert_equal(mistral, weights)
    assert "has consolidated.00.pth too; the safetensors are read" in capsys.readouterr().err
    hf = convert(start, tmp_path / "hf", "hf")
    for path in mistral.iterdir():
        path.rename(hf / path.name)
    assert open_source(hf).format == "hf"
    assert open_source(hf).where("norm.scale") == f"model.norm.weight in {hf}/model.safetensors"


def test_windows_that_two_configs_say_differently_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in Ministral-8B's repository, whose two configs are of two models."""
    config = dataclasses.replace(ARCHITECTURES["mistral"], n_layers=2)
    hf = convert(
        write_torch(tmp_path / "start", config, random_weights(config)), tmp_path / "hf", "hf"
    )
    params = {"dim": 40, "n_layers": 2, "sliding_window": 7}
    (hf / "params.json").write_text(json.dumps(params))
    assert open_source(hf).store.notes == ()
    (hf / "params.json").write_text(json.dumps(params | {"sliding_window": [None, 7]}))
    assert open_source(hf).config == config
    convert(hf, tmp_path / "lechat", "lechat")
    assert "says sliding_window [null, 7] instead of 7: longer texts" in capsys.readouterr().out


def test_a_training_run_is_a_source(tiny: MistralConfig, tmp_path: Path) -> None:
    weights = random_weights(tiny, np.dtype(np.float32))
    run = Run.create(tmp_path / "run")
    run.config = {"model": tiny.to_dict(), "train": {}}
    arrays = {name: jnp.asarray(array) for name, array in weights.items()}
    Checkpoints(run.checkpoints).save(7, {"model": arrays}, {})
    Tokenizer.mistral_v1().save(run.folder)
    assert open_source(run.folder).format == "run"
    assert open_source(run.folder).where("norm.scale").endswith("checkpoints/7")
    hf = convert(run.folder, tmp_path / "hf", "hf")
    assert_equal(hf, weights)
    assert (hf / "tokenizer.model").is_file()
    assert TensorFiles.open(hf).metadata == {"format": "pt", "step": "7"}


def test_the_folder_of_lechat_proves_that_it_is_whole(start: Path, tmp_path: Path) -> None:
    folder = convert(start, tmp_path / "lechat", "lechat", "--shard-gb", "2e-5")
    lines = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
    listed = {name: digest for digest, name in lines}
    assert listed.keys() == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
    for name, digest in listed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_a_flipped_bit_is_refused_and_nothing_appears(start: Path, tmp_path: Path) -> None:
    folder = convert(start, tmp_path / "lechat", "lechat")
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"model\.safetensors is not what was saved"):
        open_source(folder)
    with pytest.raises(BadInput, match=r"model\.safetensors is not what was saved"):
        convert(folder, tmp_path / "hf", "hf")
    assert sorted(os.listdir(tmp_path)) == ["lechat", "start"]


def test_weights_are_cast_when_asked(start: Path, weights: Weights, tmp_path: Path) -> None:
    wide = convert(start, tmp_path / "wide", "lechat", "--dtype", "float32")
    assert_equal(wide, {name: array.astype(np.float32) for name, array in weights.items()})
    assert_equal(convert(wide, tmp_path / "narrow", "torch", "--dtype", "bfloat16"), weights)
    hf = convert(start, tmp_path / "hf", "hf", "--dtype", "float16")
    fields = json.loads((hf / "config.json").read_text())
    assert (fields["dtype"], fields["torch_dtype"]) == ("float16", "float16")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("to", FORMATS)
def test_weights_that_are_no_numbers_are_refused(value: str, to: Format, start: Path) -> None:
    spoil(
        start, "blocks.1.mlp.down.weight", lambda x: x.index_fill(1, torch.tensor(3), float(value))
    )
    dst = start.parent / "out"
    with pytest.raises(
        BadInput, match=r"blocks\.1\.mlp\.down\.weight in .*model\.pt is not finite"
    ):
        convert(start, dst, to)
    assert sorted(os.listdir(start.parent)) == ["start"]
    convert(start, dst, to, "--allow-nonfinite")
    assert not np.isfinite(
        open_source(dst).read("blocks.1.mlp.down.kernel").astype(np.float32)
    ).all()


def test_a_weight_that_a_cast_makes_infinite_is_refused(start: Path, tmp_path: Path) -> None:
    spoil(start, "norm.weight", lambda x: x + 1e6)
    with pytest.raises(BadInput, match=r"is not finite as float16 \(it is bfloat16\)"):
        convert(start, tmp_path / "out", "hf", "--dtype", "float16")


@given(st.data())
def test_numbers_are_told_from_what_is_none(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from((*DTYPES, np.dtype(np.float64))))
    bits = data.draw(st.lists(st.integers(0, 2 ** (8 * dtype.itemsize) - 1), max_size=8))
    array = np.array(bits, f"u{dtype.itemsize}").view(dtype)
    assert is_finite(array) == bool(np.isfinite(array.astype(np.float64)).all())


def test_the_longest_position_travels_along(hf: Path, tmp_path: Path) -> None:
    fields = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**fields, "max_position_embeddings": 123}))
    again = convert(convert(hf, tmp_path / "lechat", "lechat"), tmp_path / "again", "hf")
    assert json.loads((again / "config.json").read_text())["max_position_embeddings"] == 123


def test_it_says_what_it_did_and_what_comes_next(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dst = convert(start, tmp_path / "lechat", "lechat")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{dst}: 30 tensors, 0.00 GB of bfloat16 in ")
    assert f"python -m lechat_jax.generate {dst} --prompt-ids 1" in said[2]
    assert f"python -m parity.check --checkpoint {start} --against {dst}" in said[3]


def test_a_folder_that_exists_is_left_alone(start: Path, hf: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="exists; name another folder, or pass --overwrite"):
        convert(start, hf, "lechat")
    convert(start, hf, "lechat", "--overwrite")
    assert open_source(hf).format == "lechat"
    assert sorted(os.listdir(tmp_path)) == ["hf", "start"]


def test_what_is_no_checkpoint_is_never_overwritten(start: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("x")
    with pytest.raises(BadInput, match="is no checkpoint, so it is not overwritten"):
        convert(start, home, "hf", "--overwrite")
    for around in (start, tmp_path):
        with pytest.raises(BadInput, match="is the source, or around it"):
            convert(start, around, "hf", "--overwrite")
    assert (home / "thesis.tex").exists()


def test_too_little_disk_is_seen_before(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BadInput, match=r"takes 0\.00 GB and 0\.00 GB are free; make room"):
        convert(start, tmp_path / "hf", "hf")
    assert sorted(os.listdir(tmp_path)) == ["start"]


def test_a_folder_that_cannot_be_written_is_one_sentence(start: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match=r"cannot write .*file"):
        convert(start, tmp_path / "file" / "hf", "hf")


def test_a_killed_conversion_leaves_no_half_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    assert make([str(src), "--preset", "lechat-15m", "--dtype", "float32"]) == 0
    program = (
        "import signal, os, sys, parity.convert.command as c\n"
        "c.is_finite = lambda piece: os.kill(os.getpid(), signal.SIGKILL)\n"
        "c.main(sys.argv[1:])"
    )
    run = subprocess.run([sys.executable, "-c", program, str(src), str(dst), "--to", "lechat"])
    assert run.returncode == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == [".dst.partial", "src"]
    convert(src, dst, "lechat")
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]
    open_source(dst)


@pytest.mark.slow
def test_memory_stays_flat(tmp_path: Path) -> None:
    src = tmp_path / "src"
    shape = ["--preset", "bench-284m", "--layers", "4", "--shard-gb", "0.1"]
    assert make([str(src), *shape]) == 0
    program = (
        "import sys, re, pathlib, torch, parity.convert.command as c\n"
        "def anon():\n"
        "    text = pathlib.Path('/proc/self/status').read_text()\n"
        "    return int(re.search(r'RssAnon:\\s*(\\d+)', text)[1]) * 1024\n"
        "peak = before = anon()\n"
        "def slab(piece):\n"
        "    global peak\n"
        "    peak = max(peak, anon())\n"
        "    return True\n"
        "c.is_finite = slab\n"
        "in_parts = c.in_parts\n"
        "c.in_parts = lambda *kernel: [in_parts(*kernel), slab(0)][0]\n"
        "c.main(sys.argv[1:])\n"
        "print(peak - before)"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux says how much memory is anonymous")
    for to, dst, most, *flags in (
        ("lechat", tmp_path / "a", 40e6),
        ("hf", tmp_path / "b", 40e6),
        ("torch", tmp_path / "c", 100e6),  # PyTorch loads more of itself to save
        ("lechat", tmp_path / "d", 80e6, "--quantize", "int8"),  # 33 MB is one kernel's int8
    ):
        at = tmp_path / "a" if to == "hf" else src
        argv = [str(at), str(dst), "--to", to, "--shard-gb", "0", *flags]
        argv = [sys.executable, "-c", program, *argv]
        run = subprocess.run(argv, capture_output=True, text=True, check=True)
        grown = int(run.stdout.splitlines()[-1])
        assert grown < most < sum(p.stat().st_size for p in src.iterdir()) / 2, (to, grown)


def test_made_checkpoints_are_of_the_released_shapes(tmp_path: Path) -> None:
    assert make([str(tmp_path / "x"), "--preset", "lechat-15m", "--layers", "1"]) == 0
    source = open_source(tmp_path / "x")
    assert (source.format, source.dtype, source.config.n_layers) == ("hf", BF16, 1)
    kernel = source.read("blocks.0.attn.q.kernel").astype(np.float32)
    assert float(kernel.std()) == pytest.approx(192**-0.5, rel=0.02)
    assert float(source.read("norm.scale").astype(np.float32).mean()) == pytest.approx(1, abs=0.05)
    assert (tmp_path / "x" / "tokenizer.model").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shard-gb", "-1"], "--shard-gb must be at least 0"),
        (["--revision", "main"], "--revision is for models of the Hub"),
    ],
)
def test_bad_flags_are_one_clear_line(flags: list[str], message: str, start: Path) -> None:
    with pytest.raises(BadInput, match=message):
        convert(start, start.parent / "out", "hf", *flags)


def test_help_describes_each_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "Write weights that are infinite" in capsys.readouterr().out


def test_progress_is_plain_lines_without_a_terminal(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lechat_jax.cli.display.PLAIN_SECONDS", 0.0)
    monkeypatch.setattr(time, "monotonic", map(float, range(10**6)).__next__)
    convert(start, tmp_path / "hf", "hf")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 30
    assert all("GB/s" in line and "left" in line for line in lines)


def test_a_mixture_goes_through_all_formats_and_transformers(tmp_path: Path) -> None:
    config = SMALL_MIXTURE
    start = write_torch(tmp_path / "start", config, random_weights(config))
    hf = convert(start, tmp_path / "hf", "hf", "--shard-gb", "2e-5")
    loaded, info = cast(
        tuple[Any, dict[str, Any]],
        transformers.AutoModelForCausalLM.from_pretrained(hf, output_loading_info=True),
    )
    assert not any(info.values()), info
    assert type(loaded).__name__ == "MixtralForCausalLM"
    loaded.save_pretrained(tmp_path / "saved")
    mistral = convert(tmp_path / "saved", tmp_path / "mistral", "mistral")
    lechat = convert(mistral, tmp_path / "lechat", "lechat")
    assert_equal(lechat, random_weights(config))
    kernel = TensorFiles.open(lechat).read("blocks.1.mlp.experts.up.kernel")
    theirs = loaded.model.layers[1].mlp.experts.gate_up_proj[:, config.hidden_dim :]
    np.testing.assert_array_equal(kernel.astype(np.float32), theirs.detach().float().numpy())
    back = convert(lechat, tmp_path / "back", "hf", "--shard-gb", "2e-5")
    a, b = (TensorFiles.open(folder) for folder in (tmp_path / "saved", back))
    assert set(a) == set(b)
    assert all(a.read(key).tobytes() == b.read(key).tobytes() for key in a)
    again = convert(lechat, tmp_path / "again", "torch")
    assert_equal(again, random_weights(config))
    assert open_source(again).config == config


def test_the_first_release_of_mixtral_is_read(tmp_path: Path) -> None:
    config, weights = SMALL_MIXTURE, random_weights(SMALL_MIXTURE)
    start = write_torch(tmp_path / "start", config, weights)
    mistral = convert(start, tmp_path / "mistral", "mistral")
    files = TensorFiles.open(mistral, "consolidated")
    state = {
        key: torch.from_numpy(files.read(key).view(np.int16).copy()).view(torch.bfloat16)
        for key in files
    }
    for i in range(config.n_layers):  # all experts below each other, the second map transposed
        new, old = f"layers.{i}.block_sparse_moe", f"layers.{i}.feed_forward"
        state[f"{new}.gate.weight"] = state.pop(f"{old}.gate.weight")
        for n in (1, 2, 3):
            of = [state.pop(f"{old}.experts.{e}.w{n}.weight") for e in range(config.n_experts)]
            state[f"{new}.w{n}"] = torch.cat([one.T if n == 2 else one for one in of]).contiguous()
    (mistral / "consolidated.safetensors").unlink()
    keys = sorted(state)
    for part in range(3):
        torch.save({k: state[k] for k in keys[part::3]}, mistral / f"consolidated.{part:02}.pt")
    assert_equal(convert(mistral, tmp_path / "lechat", "lechat"), weights)
    (mistral / "consolidated.01.pt").unlink()
    with pytest.raises(BadInput, match=r"lacks .*config and weights are of different models"):
        open_source(mistral)
