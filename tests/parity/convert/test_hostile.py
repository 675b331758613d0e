"""A checkpoint that is damaged, foreign or malicious is refused in one sentence that names it."""

import dataclasses
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.formats.configs.hugging_face import to_hugging_face
from lechat_jax.formats.configs.mistral import to_params
from lechat_jax.formats.names import Format, names, shapes
from parity.convert.command import main
from parity.convert.open_source import open_source
from parity.convert.torch_files import _torch_dtype

State = dict[str, torch.Tensor]
Change = Callable[[Path], object]


def state(config: MistralConfig, fmt: Format) -> State:
    torch.manual_seed(0)
    sizes = shapes(config, fmt)
    return {
        key: torch.randn(sizes[name], dtype=torch.bfloat16)
        for name, key in names(config, fmt).items()
    }


@pytest.fixture
def hf(tiny: MistralConfig, tmp_path: Path) -> Path:
    """A folder of Hugging Face's that is as it should be."""
    folder = tmp_path / "hf"
    folder.mkdir()
    fields = to_hugging_face(tiny, "bfloat16", positions=64, bos_id=1, eos_id=2)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(state(tiny, "hf"), folder / "model.safetensors")
    return folder


@pytest.fixture
def pickled(tiny: MistralConfig, tmp_path: Path) -> Path:
    """A folder of Mistral's first releases, with a pickle."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(to_params(tiny)))
    torch.save(state(tiny, "mistral"), folder / "consolidated.00.pth")
    return folder


def refused(folder: Path, message: str) -> str:
    """The one sentence with which the folder is refused; converting it leaves nothing."""
    with pytest.raises(BadInput, match=message) as error:
        open_source(folder)
    with pytest.raises(BadInput, match=message):
        main([str(folder), str(folder.parent / "out"), "--to", "lechat"])
    assert not any(name.endswith(("out", ".partial")) for name in os.listdir(folder.parent))
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


def edit(change: Callable[[State], object]) -> Change:
    """Changes the tensors of `hf`."""

    def changed(folder: Path) -> None:
        tensors = {key: tensor.clone() for key, tensor in load_file(weights_of(folder)).items()}
        change(tensors)
        save_file(tensors, weights_of(folder))

    return changed


def weights_of(folder: Path) -> Path:
    return folder / "model.safetensors"


def edit_config(**fields: Any) -> Change:
    def changed(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return changed


def put(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def test_what_is_as_it_should_be_is_read(hf: Path, pickled: Path) -> None:
    assert open_source(hf).format == "hf"
    assert open_source(pickled).format == "mistral"


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(lambda t: t.pop(Q)), f"lacks {Q}; config and weights are of different models"),
        (edit(lambda t: t.update(x=torch.ones(1))), "has x, which its config does not know"),
        (
            edit(lambda t: t.update({"model.layers.3.input_layernorm.weight": torch.ones(40)})),
            r"has model\.layers\.3\.input_layernorm\.weight",
        ),
        (
            edit(lambda t: t.update({Q: t[Q][:40]})),
            r"has the shape \[40, 40\] instead of \[48, 40\]",
        ),
        (
            edit(lambda t: t.update({Q: t[Q].T.contiguous()})),
            rf"{Q} in .* has the shape \[40, 48\]",
        ),
        (edit(lambda t: t.update({Q: t[Q].to(torch.int8)})), rf"{Q} in .* is int8; a weight must"),
        (
            edit(lambda t: t.update({Q: t[Q].to(torch.float8_e5m2)})),
            rf"{Q} in .* is F8_E5M2, which is not read here",
        ),
        (
            edit_config(num_hidden_layers=4),
            r"lacks model\.layers\.3\.input_layernorm\.weight.*more",
        ),
        (edit_config(num_hidden_layers=2), r"has model\.layers\.2\..*more, which"),
        (edit_config(vocab_size=98), r"has the shape \[97, 40\] instead of \[98, 40\]"),
        (
            edit_config(tie_word_embeddings=True),
            r"lm_head\.weight in .* differs from the embedding",
        ),
        (edit_config(model_type="qwen3"), "has the model_type 'qwen3'"),
        (edit_config(quantization_config={"quant_method": "quanto"}), "quantised by quanto"),
        (put("config.json", b"{"), "is not valid JSON"),
        (put("config.json", b"[" * 100_000), "is not valid JSON"),
        (put("config.json", b"[]"), "is not a JSON object"),
        (put("config.json", b"\xff\xfe"), "is not valid JSON"),
        (put("config.json", b"{}"), "holds no model"),
        (put("model.safetensors", b"<!DOCTYPE html>"), "is a web page saved under this name"),
        (put("model.safetensors", b"version https://git-lfs.github.com/spec/v1"), "git-lfs"),
        (lambda f: weights_of(f).unlink(), r"has neither model\.safetensors nor"),
        (lambda f: weights_of(f).rename(f / "pytorch_model.bin"), r"pytorch_model\.bin, a pickle"),
        (lambda f: weights_of(f).rename(f / "model-00001.safetensors"), "has neither"),
        (lambda f: os.truncate(weights_of(f), 9000), "is cut short at 9,000 bytes"),
    ],
)
def test_what_is_wrong_is_named(change: Change, message: str, hf: Path) -> None:
    change(hf)
    refused(hf, message)


def test_weights_of_several_dtypes_are_made_one_when_asked(hf: Path) -> None:
    edit(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}))(hf)
    with pytest.raises(BadInput, match=r"is float32 and .* is bfloat16; make them one .*--dtype"):
        _ = open_source(hf).dtype
    out = hf.parent / "out"
    with pytest.raises(BadInput, match=r"model\.norm\.weight in .* is float32"):
        main([str(hf), str(out), "--to", "lechat"])
    assert main([str(hf), str(out), "--to", "lechat", "--dtype", "float32"]) == 0
    assert open_source(out).dtype == np.float32


@pytest.mark.parametrize("fmt", ["hf", "mistral"])
def test_a_tied_models_head_may_repeat_the_embedding(
    fmt: Format, tiny: MistralConfig, tmp_path: Path
) -> None:
    tied = dataclasses.replace(tiny, tied_embeddings=True)
    tensors = state(tied, fmt)
    head = {"hf": "lm_head.weight", "mistral": "output.weight"}[fmt]
    tensors[head] = tensors[names(tied, fmt)["embed.kernel"]].clone()
    fields = to_hugging_face(tied, "bfloat16", 64, 1, 2) if fmt == "hf" else to_params(tied)
    file = {"hf": "config.json", "mistral": "params.json"}[fmt]
    stem = {"hf": "model", "mistral": "consolidated"}[fmt]
    folder = tmp_path / "tied"
    folder.mkdir()
    (folder / file).write_text(json.dumps(fields))
    save_file(tensors, folder / f"{stem}.safetensors")
    assert "head.kernel" not in open_source(folder).names
    tensors[head][-1, -1] += 1
    save_file(tensors, folder / f"{stem}.safetensors")
    refused(folder, f"{head} in .* differs from the embedding")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a\\b.safetensors"])
def test_a_shard_elsewhere_is_refused(name: str, hf: Path, tiny: MistralConfig) -> None:
    weights_of(hf).rename(hf.parent / "secret.safetensors")
    index = {"weight_map": dict.fromkeys(names(tiny, "hf").values(), name)}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(hf, "which is no file of its folder; do not trust this checkpoint")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model"])
def test_a_link_elsewhere_is_refused(name: str, hf: Path) -> None:
    (hf / name).unlink(missing_ok=True)
    (hf.parent / "secret").write_text("x")
    (hf / name).symlink_to("../secret")
    refused(hf, "is a link to .*secret, outside its folder")


class Bomb:
    """Unpickled, it would make a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_code_in_a_pickle_is_never_run(pickled: Path) -> None:
    target = pickled.parent / "exploded"
    path = pickled / "consolidated.00.pth"
    torch.save({"tok_embeddings.weight": Bomb(target)}, path)
    refused(pickled, r"consolidated\.00\.pth holds code beside its tensors, which was not run")
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # so it was a bomb


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a whole PyTorch file"),
        (b"junk", "holds code|is not a whole PyTorch file"),
        (b"PK\x03\x04", "is not a whole PyTorch file"),
        (pickle.dumps({"x": 1}), "holds code|is not a whole PyTorch file"),
    ],
)
def test_a_file_that_is_no_pytorch_file_is_refused(
    content: bytes, message: str, pickled: Path
) -> None:
    (pickled / "consolidated.00.pth").write_bytes(content)
    refused(pickled, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list, not tensors by name"),
        ({"model": {"x": torch.ones(1)}}, "has a dict at 'model', not a tensor"),
        ({3: torch.ones(1)}, "has a Tensor at 3"),
        ({"x": 3}, "has a int at 'x'"),
        ({"x": torch.ones(1)}, "lacks tok_embeddings.weight"),
    ],
)
def test_a_pickle_of_something_else_is_refused(content: Any, message: str, pickled: Path) -> None:
    torch.save(content, pickled / "consolidated.00.pth")
    refused(pickled, message)


def test_numbers_that_numpy_does_not_have_are_refused() -> None:
    with pytest.raises(BadInput, match="x is quint8, which is not read here"):
        _torch_dtype("torch.quint8", "x")


def test_a_cut_pickle_is_refused(pickled: Path) -> None:
    os.truncate(pickled / "consolidated.00.pth", 9000)
    refused(pickled, r"consolidated\.00\.pth is not a whole PyTorch file")


def test_a_model_cut_over_several_pickles_is_refused(pickled: Path) -> None:
    (pickled / "consolidated.01.pth").touch()
    refused(pickled, r"consolidated\.00\.pth, \.01\.pth and so on")


def test_without_pytorch_a_pickle_says_what_to_install(
    pickled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(BadInput, match=r"needs torch: pip install"):
        open_source(pickled)


def test_a_base_that_the_config_has_is_not_overruled(hf: Path) -> None:
    assert open_source(hf, rope_theta=1e4).format == "hf"
    with pytest.raises(BadInput, match="hf says rope_theta 10000; leave out --rope-theta"):
        open_source(hf, rope_theta=1e6)


def test_a_file_that_cannot_be_read_is_named(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    refused(hf, r"config\.json cannot be read: Permission denied")


def test_old_params_ask_for_the_base(pickled: Path, tiny: MistralConfig) -> None:
    fields = {key: value for key, value in to_params(tiny).items() if key != "rope_theta"}
    (pickled / "params.json").write_text(json.dumps(fields))
    refused(pickled, r"params\.json does not say rope_theta.*with --rope-theta 10000")
    assert open_source(pickled, rope_theta=1e4).config == tiny
    out = pickled.parent / "out"
    assert main([str(pickled), str(out), "--to", "hf", "--rope-theta", "1e4"]) == 0
    assert open_source(out).config == tiny


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "SHA256SUMS").unlink(), "is damaged: SHA256SUMS is missing"),
        (
            lambda f: (f / "model-2.safetensors").touch(),
            r"model-2\.safetensors is not in SHA256SUMS",
        ),
        (lambda f: (f / "config.json").write_text("{}"), "holds no model"),
        (edit_config(norm_eps=1e-6), r"config\.json is not what was saved"),
        (edit_config(quantisation="int8"), r"config\.json is not .*unknown fields: quantisation"),
        (edit_config(quantization="int4"), r"config\.json says quantization .int4., and only"),
        (edit_config(dim=0), r"config\.json is not .*dim must be positive"),
    ],
)
def test_a_folder_of_lechats_that_was_changed_is_refused(
    change: Change, message: str, hf: Path
) -> None:
    folder = hf.parent / "lechat"
    assert main([str(hf), str(folder), "--to", "lechat"]) == 0
    change(folder)
    refused(folder, message)


def test_a_note_beside_the_weights_is_let_be(hf: Path) -> None:
    folder = hf.parent / "lechat"
    assert main([str(hf), str(folder), "--to", "lechat"]) == 0
    (folder / "README.md").write_text("Mine.")
    assert open_source(folder).format == "lechat"


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("nowhere", "nowhere is not there"),
        ("file", "file is a file; name its folder"),
        ("empty", "empty holds no model"),
    ]:
        refused(tmp_path / name, message)
